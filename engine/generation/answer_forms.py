r"""Rewrite answers as text into forms that math-verify parses; math-verify does the mathematics.

Each rule is narrow on purpose: a rule that strips too much accepts incorrect answers.
"""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from collections.abc import Callable
from decimal import Decimal

# Characters with one meaning in any text. NFKC is not used, because it turns x² into x2.
_CHARACTERS: dict[int, str | None] = {
    **{code: chr(code - 0xFEE0) for code in range(0xFF01, 0xFF5F)},  # full-width ASCII
    **dict.fromkeys(map(ord, "\u00a0\u2002\u2003\u2007\u2008\u2009\u200a\u202f\u205f\u3000"), " "),
    **dict.fromkeys(map(ord, "\u200b\u2060\ufeff")),  # no width
    **{ord(minus): "-" for minus in "\u2212\ufe63"},
    **{ord("。"): ".", ord("、"): ","},
}
# Characters of a formula. Not for prose, because a command outside $...$ is not a formula.
_SYMBOLS = str.maketrans(
    {
        **{"°": r"^\circ ", "π": r"\pi ", "∞": r"\infty ", "±": r"\pm ", "≈": r"\approx "},
        **{"×": r"\times ", "·": r"\cdot ", "⋅": r"\cdot ", "∙": r"\cdot ", "÷": "/"},
        **{"≤": r"\le ", "⩽": r"\le ", "≥": r"\ge ", "⩾": r"\ge ", "≠": r"\ne "},
        **{"∪": r"\cup ", "∩": r"\cap ", "∈": r"\in ", "∅": r"\emptyset "},
    }
)
_FRACTION = re.compile("[¼-¾⅐-⅞]")
_RAISED = re.compile("[⁺⁻]?[⁰¹²³⁴-⁹]+")
_LOWERED = re.compile("[₀-₉]+")
_ROOT = re.compile(r"√\s*(?:\(([^()]*)\)|(\d+(?:\.\d+)?|[a-z]))")

_SPACE = r"(?:\\[,;:! ]|~|\s)"
_TEXT = r"\\(?:text|textrm|textbf|textit|mathrm|mathbf|mathit|boldsymbol|mbox)"
# A command or mark around the whole answer that changes only its appearance.
_WRAPPED = re.compile(
    rf"(?:{_TEXT}|\\underline)\s*\{{([^{{}}]*)\}}"
    r"|\*\*([^*]+)\*\*|`([^`]+)`|\\\((.+)\\\)|\\\[(.+)\\\]|\$+([^$]+)\$+"
)
# 1.5e3  1.5\times 10^{3}. Not after /, ^ or _, which bind more than the 1.5.
_SCIENTIFIC = re.compile(
    r"(?<![\w.\\^/])(\d{1,30}(?:\.\d{0,30})?|\.\d{1,30})"
    r"(?:[eE]([-+]?\d{1,3})(?!\w|\.\d)"
    r"|\s*(?:\\times|\\cdot|×|·|⋅|\*|[xX])\s*10\s*\^\s*"
    r"(?:\{\s*([-+]?\d{1,3})\s*\}|\(?([-+]?\d{1,3})(?!\d)\)?))"
)
_SCALES = {"hundred": 2, "thousand": 3, "million": 6, "billion": 9, "trillion": 12}

_CURRENCY = r"(?:\\\$|[$€£¥₹]|\\pounds|\\euro|USD|EUR|GBP|Rs\.?)"
_MONEY = re.compile(
    rf"([-+]?)(?:\\text\{{\s*)?({_CURRENCY})\s*\}}?{_SPACE}*(?=[-+]?[\d.])(.+)", re.DOTALL
)
_MONEY_AFTER = re.compile(rf"([-+]?[\d.,]*\d){_SPACE}*({_CURRENCY})")
_POWER = r"(?:\^\{?-?\d\}?)?"
_PIECE = rf"{_TEXT}\s*\{{[^{{}}]*\}}{_POWER}"
_MARKED_UNIT = re.compile(  # \text{ m}^3  \text{km}/\text{h}  \frac{\text{km}}{\text{h}}
    rf"(.*[\d}})]){_SPACE}*((?:{_PIECE}|\\frac\{{{_PIECE}\}}\{{{_PIECE}\}})"
    # Each space has one place in the pattern; with two, the number of ways to match is exponential.
    rf"(?:{_SPACE}*(?:(?:/|\\cdot){_SPACE}*)?{_PIECE})*)",
    re.DOTALL,
)
# Words without \text: only after a plain number, since 5 x is a product.
_NUMBER = (
    r"[-+]?(?:\d[\d,]*(?:\.\d+)?|\.\d+|\d+/\d+|\d+:\d\d|"
    r"\d*\\pi|\d*\\sqrt\{\d+\}|\d*\\[dt]?frac\{\d+\}\{\d+\})"
)
_PLAIN_UNIT = re.compile(
    rf"({_NUMBER})({_SPACE}*)([A-Za-z][A-Za-z /.]*{_POWER}(?:/[a-z]+{_POWER})?)"
)
_TEMPERATURE = re.compile(r"(.*\\circ\}?)\s*(?:\\text\{\s*)?([CF])\}?")
# Units that differ from each other. Other words are not compared: 12 apples may be 12 fruits.
_UNITS = {
    alias: names.split()[0]
    for names in (
        "mm millimeter millimetre", "cm centimeter centimetre", "m meter metre",
        "km kilometer kilometre", "in inch inche inches", "ft foot feet", "yd yard", "mi mile",
        "mg milligram", "g gram", "kg kilogram", "lb pound", "oz ounce", "ml milliliter mL",
        "l liter litre L", "s sec second", "min minute", "h hr hour", "day", "week", "month",
        "year", "N newton", "J joule", "kJ kilojoule", "W watt", "kW kilowatt", "V volt",
        "Hz hertz", "Pa pascal", "mol mole", r"dollar \$ $ USD", "cent", r"euro € EUR \euro",
        r"£ GBP \pounds", "¥ yen", "₹ rupee Rs Rs.", "am a.m. a.m", "pm p.m. p.m",
    )
    for alias in names.split()
}  # fmt: skip
# Words that change the number, or that make it more than one number.
_NO_UNIT = re.compile(
    r"\b(?:percent|percentage|pct|or|and|to|more|less|than|most|least|not|dozen|half|"
    r"halve|third|quarter|tenth|hundredth|"
    r"squared|cubed|factorial|mod|modulo|over|times|plus|minus|"
    r"sin|cos|tan|cot|sec|csc|log|ln|exp|sqrt|root|inf|infinity|infty|"
    r"alpha|beta|gamma|delta|epsilon|zeta|eta|theta|iota|kappa|lambda|mu|nu|xi|pi|rho|sigma|tau|"
    r"upsilon|phi|chi|psi|omega|hundred|thousand|million|billion|trillion)s?\b",
    re.IGNORECASE,
)
_BOUND = re.compile(
    r"\{\s*or\s+(more|less|fewer|greater|higher|lower|above|below)\b", re.IGNORECASE
)
_Rules = tuple[tuple[re.Pattern[str], str | Callable[[re.Match[str]], str]], ...]
# Numbers anywhere in an answer.
_NUMBER_RULES: _Rules = (
    # 1{,}234  1{\small,}234: a comma in braces only separates thousands.
    (
        re.compile(r"(?<=\d)\{\s*(?:\\[a-z]+\s*)?,\s*\}(?=\d{3})|(?<=\d)(?:\\!,|,\\!)(?=\d{3})"),
        "",
    ),
    # 1 234 567  1\,234: groups of exactly three digits.
    (
        re.compile(
            rf"(?<![\d.,])(?<!\d\s)[1-9]\d{{0,2}}(?:{_SPACE}\d{{3}})+(?![\d,/^])(?!{_SPACE}\d)"
        ),
        lambda found: re.sub(_SPACE, "", found[0]),
    ),
    # 3 1/2 would be a product.
    (
        re.compile(r"(?<![\d./^_])(\d+)\s+(\d+)/(\d+)(?![\d/])"),
        r"\1\\frac{\2}{\3}",
    ),
    # 0.1\overline{6} would be 0.1 * 6. {1,30}: int() refuses numbers of more than 4300 digits.
    (
        re.compile(r"(?<![\d.])(\d{0,30})\.(\d{0,30})\\overline\{(\d{1,30})\}"),
        lambda found: _repeating(found),
    ),
    # math-verify rounds decimals to six places, so 0.0000016 would equal 0.0000021.
    (re.compile(r"(?<![\d.])0?\.0000\d{1,30}(?!\d)"), lambda found: _exact(found[0], 0)),
    # 3 million would be 3.
    (
        re.compile(
            rf"(?<![\w./])(\d{{1,30}}(?:\.\d{{1,30}})?){_SPACE}*"
            rf"(?:({_TEXT}\{{)\s*)?({'|'.join(_SCALES)})\b"
        ),
        lambda found: _exact(found[1], _SCALES[found[3]]) + (found[2] or ""),
    ),
)
_RELATION = r"(?:[<>]|\\(?:[lg](?:t|e|eq|eqslant)|neq?)(?![a-zA-Z]))"
# An interval or a set, which may be equal to an inequality.
_SET = r"(?:,|\\(?:infty|mathbb|setminus|backslash|in|emptyset)(?![a-zA-Z]))"
# A whole answer, without its unit.
_ANSWER_RULES: _Rules = (
    # 1,000,000 would be a list of 1, 0 and 0.
    (
        re.compile(r"^(?:[A-Za-z]\s*=\s*)?[-+]?(?:\\?\$)?\d{1,3}(?:,\d{3})+(?:\.\d+)?$"),
        lambda found: found[0].replace(",", ""),
    ),
    # 3 and 4  3\text{ or }4: a list. Not within braces, where the words belong to a unit.
    (
        re.compile(
            rf"\s*(?:,\s*)?{_TEXT}\s*\{{\s*(?:and|or)\s*\}}"
            r"|\s*(?:,\s*)?\b(?:and|or)\b(?![^{}]*\})"
        ),
        ",",
    ),
    # > 7: without a left side, math-verify ignores the relation.
    (re.compile(rf"^(?=\s*{_RELATION})"), "x "),
)
_PERCENT = re.compile(rf"({_NUMBER}){_SPACE}*(?:{_TEXT}\{{\s*)?(?:\\?%|percent|per cent)\s*\}}?")
_MODULUS = re.compile(
    rf"(.*[\w}})\]]){_SPACE}*(?:\\pmod\s*(\d+|[a-z]|\{{[^{{}}]*\}})"
    rf"|\((?:\\?mod\b|{_TEXT}\{{\s*mod\s*\}})([^()]*)\))"
)
_ABOUT = re.compile(
    rf"({_TEXT}\s*\{{\s*)?(?:approximately|approx\.?|about|roughly)\s*(?(1)\}}){_SPACE}*"
    r"(?=[-+.\d\\$])",
    re.IGNORECASE,
)
# A number, a ratio or a time: 3  3:4  6:30 PM.
_RATIO = re.compile(r"\d+(?:\.\d+)?(?:\s*:\s*\d+(?:\.\d+)?)*(?:\s*[AaPp]\.?[Mm]\b)?")
# 3 hours 20 minutes  5 ft and 6 in
_QUANTITY = r"(\d+(?:\.\d+)?)\s*([A-Za-z]+)\.?"
_QUANTITIES = re.compile(rf"{_QUANTITY}(?:(?:\s*,)?(?:\s*and)?\s*{_QUANTITY})+")


def clean_characters(text: str) -> str:
    """Replace full-width characters, special spaces and minus signs by ASCII."""
    return text.translate(_CHARACTERS)


def clean_prose(text: str) -> str:
    """`clean_characters`, and rewrite numbers that math-verify does not find in prose."""
    # math-verify needs a space before a number; Chinese and Japanese have none.
    text = re.sub(r"[^\S\n]+", " ", text)
    text = re.sub(r"(?<=[\u3040-\u9fff：，。])(?=[-−－\d０-９$])", " ", text)
    return scientific(_FRACTION.sub(_vulgar, clean_characters(text)))


def clean_formula(text: str) -> str:
    r"""Remove what only changes an answer's appearance: Unicode symbols, \text{...}, **...**."""
    text = _FRACTION.sub(_vulgar, clean_characters(" ".join(text.split())))
    text = _RAISED.sub(lambda found: f"^{{{_narrow(found[0])}}}", text)
    text = _LOWERED.sub(lambda found: f"_{{{_narrow(found[0])}}}", text)
    text = _ROOT.sub(lambda found: rf"\sqrt{{{found[1] or found[2]}}}", text)
    text = re.sub(r"(?<![\\A-Za-z])pi(?![A-Za-z])", r"\\pi ", text)
    text = re.sub(r"^[–—](?=\s*[\d\\])", "-", text.strip())
    text = text.translate(_SYMBOLS).replace(r"\displaystyle", "")
    before = None
    while text != before:
        before, text = text, text.strip().removesuffix(".").rstrip()
        if found := _WRAPPED.fullmatch(text):
            text = next(group for group in found.groups() if group is not None).strip()
        if found := _ABOUT.match(text):
            text = text[found.end() :]
    return text


def clean_numbers(text: str) -> str:
    """Rewrite thousands, mixed numbers, repeating and small decimals in plain digits."""
    for pattern, rewrite in _NUMBER_RULES:
        text = pattern.sub(rewrite, text)
    return text


def clean_answer(text: str) -> str:
    """Rewrite a whole answer, without its unit: thousands, and/or in a list, > 7."""
    for pattern, rewrite in _ANSWER_RULES:
        text = pattern.sub(rewrite, text)
    return text


def scientific(text: str) -> str:
    """Rewrite 1.5e3 and 1.5 x 10^3 as 1500; exact, as math-verify rounds to six places."""
    return _SCIENTIFIC.sub(
        lambda found: _exact(found[1], int(found[2] or found[3] or found[4])), text
    )


def split_unit(text: str) -> tuple[str, list[str]]:
    """Split off the unit; returns the answer and the unit's parts, normalized ([] if unknown)."""
    if (found := _MONEY.fullmatch(text)) or (found := _MONEY_AFTER.fullmatch(text)):
        if found.re is _MONEY:
            value, unit = split_unit(found[1] + found[3])
            return value, unit or _unit(found[2])
        return found[1], _unit(found[2])
    if found := _TEMPERATURE.fullmatch(text):
        return found[1], [found[2]]
    if (found := _MARKED_UNIT.fullmatch(text)) and not _NO_UNIT.search(found[2]):
        return found[1], _unit(found[2])
    if (found := _PLAIN_UNIT.fullmatch(text)) and not _NO_UNIT.search(found[3]):
        unit = _unit(found[3])
        words = re.split(r"[ /.^]+", found[3])
        # 5m and 5 abc may be products: a unit needs a space or two letters, other words need four.
        if (found[2] and (unit or max(map(len, words)) >= 4)) or (unit and len(words[0]) >= 2):
            return found[1], unit
    return text, []


def _unit(text: str) -> list[str]:
    words = (
        re.sub(rf"{_TEXT}|\\frac|\\cdot|\^\{{?-?\d\}}?|[{{}}]", " ", text).replace("/", " ").split()
    )
    return [_UNITS[word] for word in (_singular(word) for word in words) if word in _UNITS]


def _singular(word: str) -> str:
    return word if word in _UNITS else word.lower().removesuffix("s")


def split_choice(text: str) -> tuple[str | None, str | None]:
    r"""Letters of a choice and its value: (B) 12 -> "B", "12"; A and C -> "AC", None.

    (None, None) if the answer is not a choice.
    """
    text = re.sub(rf"{_TEXT}\s*\{{([^{{}}]*)\}}", r"\1", text)
    text = re.sub(rf"\*\*|{_SPACE}+", lambda found: "" if found[0] == "**" else " ", text).strip()
    text = re.sub(r"^(?:the )?(?:option|choice|answer)s?[ :]+", "", text, flags=re.IGNORECASE)
    if found := re.fullmatch(r"\(?([A-Ja-j])\)?", text):
        return found[1].upper(), None
    letters = re.sub(r"[\s,;&()]|\band\b", "", text)
    if re.fullmatch("[A-J]{2,}", letters) and len(set(letters)) == len(letters):
        return letters, None
    if found := re.fullmatch(r"\(?([A-J]) ?[).:] ?(.+)", text, re.DOTALL):
        # A second letter is a second choice: (A) 5 and (B) 6 is ambiguous.
        return (None, None) if re.search(r"\b[A-J]\b", found[2]) else (found[1], found[2].strip())
    return None, None


def same_letters(given: str, right: str) -> bool:
    """Compare letters as a set; if the correct ones are unsorted, they are a ranking: in order."""
    ordered = "".join(sorted(right))
    return "".join(sorted(given)) == right if right == ordered else given == right


def split_base(text: str) -> tuple[str, int] | None:
    """Digits and base of a number such as 1011_2."""
    found = re.fullmatch(r"\(?(\d[\dA-F]{0,99})\)?_\{?(\d{1,2})\}?", text.replace(" ", ""))
    if not found:
        return None
    base = int(found[2])
    if not 2 <= base <= 16 or any(int(digit, 16) >= base for digit in found[1]):
        return None
    return found[1].lstrip("0") or "0", base


def split_percent(text: str) -> tuple[str, bool]:
    """Split off the percent sign of a number; True if there is one."""
    found = _PERCENT.fullmatch(text)
    return (found[1], True) if found else (text, False)


def split_modulus(text: str) -> tuple[str, str | None]:
    r"""Split x \equiv 3 \pmod 7 into x = 3 and the modulus 7; None if there is no modulus."""
    found = _MODULUS.fullmatch(text)
    if not found:
        return text, None
    return found[1].replace(r"\equiv", "="), (found[2] or found[3]).strip("{} ")


def quantities(text: str) -> list[tuple[Decimal, str]]:
    """Numbers and units of a quantity of two or more units, such as 5 ft 6 in; else []."""
    text = re.sub(
        rf"{_TEXT}\s*\{{([^{{}}]*)\}}|{_SPACE}+", lambda found: f" {found[1] or ''} ", text
    )
    if not _QUANTITIES.fullmatch(text.strip()):
        return []
    found = [(Decimal(number), _unit(unit)) for number, unit in re.findall(_QUANTITY, text)]
    return [(number, unit[0]) for number, unit in found] if all(unit for _, unit in found) else []


def last_ratio(prose: str, right: str) -> str | None:
    """The text's last number, if it is a ratio or time and the correct answer is one, too."""
    found = _RATIO.findall(prose)
    if not (found and _RATIO.fullmatch(right) and re.search("[:mM]", right)):
        return None
    return found[-1] if re.search("[:mM]", found[-1]) else None


def same_structure(given: str, right: str) -> bool:
    """False if the answers differ in what math-verify ignores: relations, repeated elements."""
    if _bound(given) != _bound(right):
        return False
    for one, other in ((given, right), (right, given)):
        if re.search(_RELATION, one) and not re.search(rf"{_RELATION}|{_SET}", other):
            return False
    parts, expected = _elements(given), _elements(right)
    if len(expected) > 1:
        return not _is_tuple(given) and _repeats(parts) == _repeats(expected)
    return len(parts) == 1 or bool(re.search(r",|\\pm", right))


def _bound(text: str) -> str | None:
    r"""Word that turns an answer into a range, which math-verify ignores: 12\text{ or more}."""
    found = _BOUND.search(text)
    return found[1].lower() if found else None


def _elements(text: str) -> list[str]:
    """Parts of a list, split at its outermost commas."""
    parts, depth = [""], 0
    for character in text.replace(r"\{", "{").replace(r"\}", "}"):
        depth += (character in "([{") - (character in ")]}")
        if character in ",;" and not depth:
            parts.append("")
        else:
            parts[-1] += character
    return [part.strip() for part in parts]


def _is_tuple(text: str) -> bool:
    """True if the whole answer is (...) with a comma."""
    text = text.replace(r"\left", "").replace(r"\right", "")
    return len(_elements(text)) == 1 < len(_elements(text[1:-1])) and text[0] + text[-1] == "()"


def _repeats(elements: list[str]) -> int:
    return max(Counter(elements).values())


def _narrow(text: str) -> str:
    return unicodedata.normalize("NFKC", text).replace("−", "-").replace("+", "")


def _vulgar(found: re.Match[str]) -> str:
    over, under = unicodedata.normalize("NFKC", found[0]).split("⁄")
    return rf"\frac{{{over}}}{{{under}}}"


def _exact(digits: str, exponent: int) -> str:
    """digits * 10^exponent as an integer or a fraction."""
    _, figures, places = Decimal(digits).as_tuple()
    whole = int("".join(map(str, figures)))
    exponent += int(places)
    return str(whole * 10**exponent) if exponent >= 0 else rf"\frac{{{whole}}}{{{10**-exponent}}}"


def _repeating(found: re.Match[str]) -> str:
    whole, fixed, again = found.groups()
    over = int(whole + fixed + again) - int(whole + fixed or "0")
    return rf"\frac{{{over}}}{{{'9' * len(again)}{'0' * len(fixed)}}}"
