r"""Rewrites written answers into forms that math-verify reads. Text only: it does the mathematics.

Each rule is narrow on purpose: a rule that strips too much accepts wrong answers.
"""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from decimal import Decimal

# Characters that mean the same in any text. Not NFKC, which would turn x² into x2.
_CHARACTERS: dict[int, str | None] = {
    **{code: chr(code - 0xFEE0) for code in range(0xFF01, 0xFF5F)},  # full-width ASCII
    **dict.fromkeys(map(ord, "\u00a0\u2002\u2003\u2007\u2008\u2009\u200a\u202f\u205f\u3000"), " "),
    **dict.fromkeys(map(ord, "\u200b\u2060\ufeff")),  # no width
    **{ord(minus): "-" for minus in "\u2212\ufe63"},
    **{ord("。"): ".", ord("、"): ","},
}
# Characters of a formula. Not for prose, where a command outside $...$ is no formula.
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
# A command or a mark around the whole answer that changes how it looks, not what it is.
_WRAPPED = re.compile(
    rf"(?:{_TEXT}|\\underline)\s*\{{([^{{}}]*)\}}"
    r"|\*\*([^*]+)\*\*|`([^`]+)`|\\\((.+)\\\)|\\\[(.+)\\\]|\$+([^$]+)\$+"
)
# 1{,}234  1{\small,}234: a comma in braces separates thousands and nothing else.
_BRACED_COMMA = re.compile(
    r"(?<=\d)\{\s*(?:\\[a-z]+\s*)?,\s*\}(?=\d{3})|(?<=\d)(?:\\!,|,\\!)(?=\d{3})"
)
# 1 234 567  1\,234: groups of three digits. Each group needs its three.
_SPACED = re.compile(
    rf"(?<![\d.,])(?<!\d\s)[1-9]\d{{0,2}}(?:{_SPACE}\d{{3}})+(?![\d,/^])(?!{_SPACE}\d)"
)
_MIXED = re.compile(r"(?<![\d./^_])(\d+)\s+(\d+)/(\d+)(?![\d/])")  # 3 1/2
# {1,30} here and below: int() refuses numbers of more than 4300 digits.
_REPEATING = re.compile(r"(?<![\d.])(\d{0,30})\.(\d{0,30})\\overline\{(\d{1,30})\}")
# 1.5e3  1.5\times 10^{3}. Not behind /, ^ or _, where the factor belongs to more than 1.5.
_SCIENTIFIC = re.compile(
    r"(?<![\w.\\^/])(\d{1,30}(?:\.\d{0,30})?|\.\d{1,30})"
    r"(?:[eE]([-+]?\d{1,3})(?!\w|\.\d)"
    r"|\s*(?:\\times|\\cdot|×|·|⋅|\*|[xX])\s*10\s*\^\s*"
    r"(?:\{\s*([-+]?\d{1,3})\s*\}|\(?([-+]?\d{1,3})(?!\d)\)?))"
)
# math-verify rounds decimals to six places, where 0.0000016 would equal 0.0000021.
_SMALL = re.compile(r"(?<![\d.])0?\.0000\d{1,30}(?!\d)")
_SCALES = {"hundred": 2, "thousand": 3, "million": 6, "billion": 9, "trillion": 12}
_SCALED = re.compile(
    rf"(?<![\w./])(\d{{1,30}}(?:\.\d{{1,30}})?){_SPACE}*({_TEXT}\{{)?\s*({'|'.join(_SCALES)})\b"
)

_CURRENCY = r"(?:\\\$|[$€£¥₹]|\\pounds|\\euro|USD|EUR|GBP|Rs\.?)"
_MONEY = re.compile(
    rf"([-+]?)(?:\\text\{{\s*)?({_CURRENCY})\s*\}}?{_SPACE}*(?=[-+]?[\d.])(.+)", re.DOTALL
)
_MONEY_BEHIND = re.compile(rf"([-+]?[\d.,]*\d){_SPACE}*({_CURRENCY})")
_POWER = r"(?:\^\{?-?\d\}?)?"
_PIECE = rf"{_TEXT}\s*\{{[^{{}}]*\}}{_POWER}"
_MARKED_UNIT = re.compile(  # \text{ m}^3  \text{km}/\text{h}  \frac{\text{km}}{\text{h}}
    rf"(.*[\d}})]){_SPACE}*((?:{_PIECE}|\\frac\{{{_PIECE}\}}\{{{_PIECE}\}})"
    rf"(?:{_SPACE}*(?:/|\\cdot)?{_SPACE}*{_PIECE})*)",
    re.DOTALL,
)
# Words without \text: after a number alone, since 5 x is a product.
_NUMBER = (
    r"[-+]?(?:\d[\d,]*(?:\.\d+)?|\.\d+|\d+/\d+|\d+:\d\d|"
    r"\d*\\pi|\d*\\sqrt\{\d+\}|\d*\\[dt]?frac\{\d+\}\{\d+\})"
)
_PLAIN_UNIT = re.compile(
    rf"({_NUMBER})({_SPACE}*)([A-Za-z][A-Za-z /.]*{_POWER}(?:/[a-z]+{_POWER})?)"
)
_TEMPERATURE = re.compile(r"(.*\\circ\}?)\s*(?:\\text\{\s*)?([CF])\}?")
# Units of which one is not another. Other words are not compared: 12 apples may be 12 fruits.
_UNITS = {
    alias: names.split()[0]
    for names in (
        "mm millimeter millimetre", "cm centimeter centimetre", "m meter metre",
        "km kilometer kilometre", "in inch inche inches", "ft foot feet", "yd yard", "mi mile",
        "mg milligram", "g gram", "kg kilogram", "lb pound", "oz ounce", "ml milliliter mL",
        "l liter litre L", "s sec second", "min minute", "h hr hour", "day", "week", "month",
        "year", r"dollar \$ USD", "cent", r"euro € EUR \euro", r"£ GBP \pounds", "¥ yen",
        "₹ rupee Rs Rs.", "am a.m. a.m", "pm p.m. p.m",
    )
    for alias in names.split()
}  # fmt: skip
# Words that change the number or say that there is no single one.
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


def clean_characters(text: str) -> str:
    """Full-width characters, odd spaces and minus signs as ASCII."""
    return text.translate(_CHARACTERS)


def clean_prose(text: str) -> str:
    """`clean_characters`, with the numbers that math-verify does not find in prose rewritten."""
    # A number is found after a space; Chinese and Japanese write none.
    text = re.sub(r"(?<=[\u3040-\u9fff：，。])(?=[-−－\d０-９$])", " ", text)
    return scientific(_FRACTION.sub(_vulgar, clean_characters(text)))


def clean_formula(text: str) -> str:
    r"""An answer without what only changes its look: Unicode symbols, \text{...}, **...**."""
    text = _FRACTION.sub(_vulgar, clean_characters(text))
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
    return text


def clean_numbers(text: str) -> str:
    """Thousands, mixed numbers, repeating decimals and small ones in plain digits."""
    text = _BRACED_COMMA.sub("", text)
    text = _SPACED.sub(lambda found: re.sub(_SPACE, "", found[0]), text)
    text = _MIXED.sub(r"\1\\frac{\2}{\3}", text)
    text = _REPEATING.sub(_repeating, text)
    text = _SMALL.sub(lambda found: _exact(found[0], 0), text)
    return _SCALED.sub(lambda found: _exact(found[1], _SCALES[found[3]]) + (found[2] or ""), text)


def scientific(text: str) -> str:
    """1.5e3 and 1.5 x 10^3 as 1500; exact, since math-verify rounds decimals to six places."""
    return _SCIENTIFIC.sub(
        lambda found: _exact(found[1], int(found[2] or found[3] or found[4])), text
    )


def split_unit(text: str) -> tuple[str, list[str]]:
    """The answer without its unit, and the unit's parts in a common spelling ([] if unknown)."""
    if (found := _MONEY.fullmatch(text)) or (found := _MONEY_BEHIND.fullmatch(text)):
        if found.re is _MONEY:
            value, behind = split_unit(found[1] + found[3])
            return value, behind or _unit(found[2])
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


def bounds(text: str) -> str | None:
    r"""What follows an answer and makes it a range: 12\text{ or more}. math-verify drops it."""
    found = _BOUND.search(text)
    return found[1].lower() if found else None


def _unit(text: str) -> list[str]:
    words = (
        re.sub(rf"{_TEXT}|\\frac|\\cdot|\^\{{?-?\d\}}?|[{{}}]", " ", text).replace("/", " ").split()
    )
    return [_UNITS[word] for word in (_singular(word) for word in words) if word in _UNITS]


def _singular(word: str) -> str:
    return word if word in _UNITS else word.lower().removesuffix("s")


def split_choice(text: str) -> tuple[str | None, str | None]:
    r"""The letters of a choice and its value: (B) 12 -> "B", "12"; A and C -> "AC", None.

    (None, None) if the answer is no choice.
    """
    text = re.sub(rf"{_TEXT}\s*\{{([^{{}}]*)\}}", r"\1", text)
    text = re.sub(rf"\*\*|{_SPACE}+", lambda found: "" if found[0] == "**" else " ", text).strip()
    text = re.sub(r"^(?:the )?(?:option|choice|answer)s?[ :]+", "", text, flags=re.IGNORECASE)
    if found := re.fullmatch(r"\(?([A-Ja-j])\)?", text):
        return found[1], None
    letters = re.sub(r"[\s,;&()]|\band\b", "", text)
    if re.fullmatch("[A-J]{2,}", letters) and len(set(letters)) == len(letters):
        return letters, None
    if found := re.fullmatch(r"\(?([A-J]) ?[).:] ?(.+)", text, re.DOTALL):
        # Another letter, another choice: (A) 5 and (B) 6 chooses nothing.
        return (None, None) if re.search(r"\b[A-J]\b", found[2]) else (found[1], found[2].strip())
    return None, None


def same_letters(given: str, right: str) -> bool:
    """Several letters are a set, except where the right ones are out of order: a ranking."""
    given, ordered = given.upper(), "".join(sorted(right))
    return "".join(sorted(given)) == right if right == ordered else given == right


def split_base(text: str) -> tuple[str, int] | None:
    """The digits and the base of a number as 1011_2."""
    found = re.fullmatch(r"\(?(\d[\dA-F]{0,99})\)?_\{?(\d{1,2})\}?", text.replace(" ", ""))
    if not found:
        return None
    base = int(found[2])
    if not 2 <= base <= 16 or any(int(digit, 16) >= base for digit in found[1]):
        return None
    return found[1].lstrip("0") or "0", base


def elements(text: str) -> list[str]:
    """The parts of a list between its outermost commas."""
    parts, depth = [""], 0
    for character in text.replace(r"\{", "{").replace(r"\}", "}"):
        depth += (character in "([{") - (character in ")]}")
        if character in ",;" and not depth:
            parts.append("")
        else:
            parts[-1] += character
    return [part.strip() for part in parts]


def is_tuple(text: str) -> bool:
    """True if (...) with a comma is the whole answer."""
    text = text.replace(r"\left", "").replace(r"\right", "")
    inner = text[1:-1]
    return text[:1] + text[-1:] == "()" and len(elements(inner)) > 1 and len(elements(text)) == 1


def repeats(text: str) -> list[int]:
    """How often the elements of a list without brackets are repeated, most first."""
    return sorted(Counter(elements(text)).values(), reverse=True)


def _narrow(text: str) -> str:
    return unicodedata.normalize("NFKC", text).replace("−", "-").replace("+", "")


def _vulgar(found: re.Match[str]) -> str:
    over, under = unicodedata.normalize("NFKC", found[0]).split("⁄")
    return rf"\frac{{{over}}}{{{under}}}"


def _exact(digits: str, exponent: int) -> str:
    """digits * 10^exponent as a whole number or a fraction."""
    _, figures, places = Decimal(digits).as_tuple()
    whole = int("".join(map(str, figures)))
    exponent += int(places)
    return str(whole * 10**exponent) if exponent >= 0 else rf"\frac{{{whole}}}{{{10**-exponent}}}"


def _repeating(found: re.Match[str]) -> str:
    whole, fixed, again = found.groups()
    over = int(whole + fixed + again) - int(whole + fixed or "0")
    return rf"\frac{{{over}}}{{{'9' * len(again)}{'0' * len(fixed)}}}"
