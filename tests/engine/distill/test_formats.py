"""Teachers' distributions as other programs write them, read and aligned with the traces."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from data_cases import save_tokenizer, settings, write_rows

from redi.engine.console import Console
from redi.engine.data.cache import TokenizedTraces
from redi.engine.data.distributions import Distributions, Store, write_store
from redi.engine.data.tokens import tokenize
from redi.engine.distill.given import PADDING
from redi.engine.distill.sources import read_teacher
from redi.engine.errors import InputError
from redi.kernels import topk_divergence

Row = dict[str, Any]


class Case:
    """Two traces, and a teacher's distributions of their tokens."""

    def __init__(self, folder: Path, tokenizer: str) -> None:
        self.folder, self.tokenizer = folder, tokenizer
        self.rows: list[Row] = [
            {"prompt": "2 + 2?", "completion": "It is 4, é."},
            {"prompt": "3 + 3?", "completion": "The answer is 6"},
        ]
        self.tokens = self.tokenized(self.rows)
        rng = np.random.default_rng(0)
        self.ids, self.logps = [], []
        for trace in range(2):
            own = self.tokens.ids(trace)
            noise = np.array([rng.permutation(250)[:5] for _ in own])
            noise[noise == own[:, None]] = 251
            noise[:, 1] = own  # the own token is among the entries
            self.ids.append(noise)
            self.logps.append(np.log(rng.dirichlet(np.ones(6), len(own)))[:, :5])

    def tokenized(self, rows: list[Row], name: str = "data.jsonl") -> TokenizedTraces:
        path = write_rows(self.folder / name, rows)
        chosen = settings(path, self.tokenizer)
        return tokenize(chosen, self.folder / "cache", processes=1, console=Console(quiet=True))

    def read(self, *paths: object, tokens: TokenizedTraces | None = None) -> Store:
        return read_teacher(
            [str(path) for path in paths],
            tokens or self.tokens,
            format="auto",
            train_on="last",
            faulty="error",
            tokenizer=self.tokenizer,
            cache_dir=self.folder / "cache",
            console=Console(quiet=True),
        )

    def check(self, store: Store, *, ends: bool = True) -> None:
        """The store has the distributions, to float16; without `ends` not those of ends."""
        assert store.meta.traces == 2
        for trace in range(2):
            prompt = int(self.tokens.prompt_lengths[trace])
            count = int(self.tokens.lengths[trace]) - prompt
            found = store.of(trace, count)
            assert found is not None
            ids, logps = found
            if not ends:
                assert np.all(ids[-1] == PADDING)
                assert np.all(logps[-1] == -np.inf)
            rows = slice(0, count if ends else count - 1)
            for place, (some, values) in enumerate(zip(ids[rows], logps[rows], strict=True)):
                wanted = dict(
                    zip(
                        self.ids[trace][prompt + place],
                        self.logps[trace][prompt + place],
                        strict=True,
                    )
                )
                theirs = {i: v for i, v in zip(some, values, strict=True) if i != PADDING}
                assert theirs.keys() == wanted.keys()
                for token, logp in theirs.items():
                    assert logp == pytest.approx(wanted[token], rel=2**-10, abs=1e-3)


@pytest.fixture(scope="module")
def case(tmp_path_factory: pytest.TempPathFactory) -> Case:
    folder = tmp_path_factory.mktemp("case")
    return Case(folder, save_tokenizer(folder / "tokenizer"))


def lists(case: Case, trace: int, start: int) -> Row:
    return {
        "logprobs": case.logps[trace][start:].tolist(),
        "target_token_ids": case.ids[trace][start:].tolist(),
    }


def of_completion(case: Case, trace: int) -> Row:
    return lists(case, trace, int(case.tokens.prompt_lengths[trace]))


def of_all(case: Case, trace: int) -> Row:
    """As for all tokens but the first, which has an empty list."""
    found = lists(case, trace, 1)
    return {name: [[], *values] for name, values in found.items()}


def without_the_first(case: Case, trace: int) -> Row:
    return lists(case, trace, 1)


def token_id_objects(case: Case, trace: int) -> Row:
    start = int(case.tokens.prompt_lengths[trace])
    return {
        "logprobs": [
            [{"token": f"token_id:{i}", "logprob": v} for i, v in zip(*one, strict=True)]
            for one in zip(case.ids[trace][start:].tolist(), case.logps[trace][start:], strict=True)
        ]
    }


def vllm(case: Case, trace: int) -> Row:
    entries = [
        {
            str(i): {"logprob": v, "rank": rank, "decoded_token": "?"}
            for rank, (i, v) in enumerate(zip(*one, strict=True), start=1)
        }
        for one in zip(case.ids[trace].tolist(), case.logps[trace], strict=True)
    ]
    return {"prompt_logprobs": [None, *entries[1:]]}


def vllm_floats_as_text(case: Case, trace: int) -> Row:
    entries = [
        dict(zip(map(str, ids), values, strict=True))
        for ids, values in zip(case.ids[trace].tolist(), case.logps[trace].tolist(), strict=True)
    ]
    return {"prompt_logprobs": json.dumps([None, *entries[1:]])}


@pytest.mark.parametrize(
    "columns",
    [of_completion, of_all, without_the_first, token_id_objects, vllm, vllm_floats_as_text],
)
@pytest.mark.parametrize("where", ["data", "another file", "traces", "parquet"])
def test_columns_of_rows_are_read_wherever_they_are(
    case: Case, columns: Callable[[Case, int], Row], where: str, tmp_path: Path
) -> None:
    rows = [row | columns(case, trace) for trace, row in enumerate(case.rows)]
    if where == "data":
        tokens = case.tokenized(rows, "with.jsonl")
        case.check(case.read(case.folder / "with.jsonl", tokens=tokens))
        return
    path = tmp_path / "teacher.jsonl"
    if where == "traces":
        rows = [
            {
                "prompt": row["prompt"],
                "traces": [
                    {"text": "another", "correct": False},
                    {"text": row["completion"], "correct": True, **columns(case, trace)},
                ],
            }
            for trace, row in enumerate(case.rows)
        ]
    if where == "parquet":
        path = path.with_suffix(".parquet")
        pq.write_table(pa.Table.from_pylist(rows), path)
    else:
        write_rows(path, rows[::-1])  # in any order
    case.check(case.read(path))


def test_openai_tokens_are_found_by_their_text_or_bytes(case: Case, tmp_path: Path) -> None:
    rows = []
    for trace, row in enumerate(case.rows):
        start = int(case.tokens.prompt_lengths[trace])
        own = case.tokens.ids(trace)[start:-1]  # without the end
        spelled = [openai_token(case, int(token)) for token in own]
        content = [
            {
                **one,
                "logprob": case.logps[trace][start + place][1],
                "top_logprobs": [
                    {**openai_token(case, int(i)), "logprob": v}
                    for i, v in zip(
                        case.ids[trace][start + place],
                        case.logps[trace][start + place],
                        strict=True,
                    )
                ],
            }
            for place, one in enumerate(spelled)
        ]
        rows.append(row | {"logprobs": {"content": content, "refusal": None}})
    path = Path(write_rows(tmp_path / "openai.jsonl", rows))
    case.check(case.read(path), ends=False)
    rows[1]["logprobs"]["content"][0]["top_logprobs"][0] |= {"token": "zzz", "bytes": None}
    write_rows(path, rows)
    with pytest.raises(InputError, match=r"openai.jsonl:2: .*no token of the student has the text"):
        case.read(path)


def openai_token(case: Case, token: int) -> Row:
    from transformers import AutoTokenizer
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    tokenizer = AutoTokenizer.from_pretrained(case.tokenizer)
    piece = tokenizer.convert_ids_to_tokens(token)
    if token in tokenizer.added_tokens_decoder:
        return {"token": piece, "bytes": None}
    letters = {letter: number for number, letter in bytes_to_unicode().items()}
    spelled = bytes(letters[letter] for letter in piece)
    return {"token": spelled.decode(errors="replace"), "bytes": list(spelled)}


def test_a_vocabulary_with_marks_for_spaces_is_spelled_too() -> None:
    from tokenizers import Tokenizer, decoders, models
    from transformers import PreTrainedTokenizerFast

    from redi.engine.distill.token_texts import TokenTexts

    vocabulary = {"<unk>": 0, "<0x0A>": 1, "▁the": 2, "the": 3, "▁": 4, "x": 5}
    backend = Tokenizer(models.BPE(vocabulary, [], unk_token="<unk>", byte_fallback=True))
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    texts = TokenTexts(PreTrainedTokenizerFast(tokenizer_object=backend))
    assert [texts(t, None) for t in ("\n", " the", "the", " ", "x")] == [1, 2, 3, 4, 5]
    assert texts("?", [10]) == 1
    backend = Tokenizer(models.BPE({"a": 0, "<0x61>": 1}, [], byte_fallback=True))
    backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback()])
    with pytest.raises(ValueError, match="2 tokens have the text 'a'"):
        TokenTexts(PreTrainedTokenizerFast(tokenizer_object=backend))("a", None)


class Encoder:
    """DistillKit's compression, written from its settings alone."""

    def __init__(self, settings: Row) -> None:
        self.settings = settings

    def floats(self, values: np.ndarray, dtype: str) -> bytes:
        return torch.tensor(values).to(getattr(torch, dtype)).view(torch.uint8).numpy().tobytes()

    def pack(self, numbers: list[int], bits: int) -> bytes:
        text = "".join(f"{number:0{bits}b}" for number in numbers)
        text += "0" * (-len(text) % 8)
        return bytes(int(text[at : at + 8], 2) for at in range(0, len(text), 8))

    def ids(self, ids: np.ndarray) -> bytes:
        return self.pack(ids.tolist(), math.ceil(math.log2(self.settings["d"])))

    def logps(self, logps: np.ndarray) -> bytes:
        chosen = self.settings
        if chosen["delta_encoding"]:
            logps = np.diff(logps, prepend=0.0)
        found = self.floats(logps[: chosen["exact_k"]], chosen["exact_dtype"])
        rest = logps[chosen["exact_k"] :]
        if terms := chosen["polynomial_terms"]:
            x = np.linspace(0, 1, len(rest)) if chosen["normalize_t"] else np.arange(len(rest))
            columns = [x**t if isinstance(t, int) else getattr(np, t)(x) for t in terms]
            matrix = np.stack(columns, axis=1).astype(np.float64)
            coefficients = np.linalg.lstsq(matrix, rest, rcond=None)[0]
            found += self.floats(coefficients, chosen["term_dtype"])
            rest = rest - matrix @ coefficients
        start = 0
        for one in chosen["residual_bins"]:
            values = rest[start : start + one["num_elements"]]
            start += one["num_elements"]
            bits = one["element_bits"]
            scale = np.abs(values).max() / 2 ** (bits - 1) or 1.0
            low, high = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
            numbers = np.clip(np.round(values / scale), low, high).astype(int) - low
            found += self.floats(np.array([scale]), one["scale_dtype"])
            found += self.pack(numbers.tolist(), bits)
        return found


PLAIN = {
    "d": 300,
    "k": 5,
    "exact_k": 5,
    "exact_dtype": "float32",
    "polynomial_terms": None,
    "term_dtype": "float32",
    "residual_bins": [],
    "delta_encoding": False,
    "error_diffusion": False,
    "normalize_t": False,
}
RESIDUALS = PLAIN | {
    "exact_k": 2,
    "delta_encoding": True,
    "residual_bins": [
        {"scale_dtype": "float32", "element_bits": 16, "num_elements": 2},
        {"scale_dtype": "float32", "element_bits": 13, "num_elements": 1},
    ],
}
POLYNOMIAL = RESIDUALS | {"polynomial_terms": [0, 1, "sqrt"], "term_dtype": "float64"}


@pytest.mark.parametrize(
    "chosen",
    [
        PLAIN,
        PLAIN | {"delta_encoding": True, "exact_dtype": "float64"},
        RESIDUALS,
        POLYNOMIAL,
        POLYNOMIAL | {"normalize_t": True, "residual_bins": [], "polynomial_terms": [0, 1, 2]},
    ],
)
def test_distillkit_is_decoded_by_its_settings(case: Case, chosen: Row, tmp_path: Path) -> None:
    folder = tmp_path / "distillkit"
    folder.mkdir()
    write_distillkit(case, folder, chosen)
    case.check(case.read(folder))


def write_distillkit(case: Case, folder: Path, chosen: Row) -> None:
    import yaml

    encoder = Encoder(chosen)
    rows = []
    for trace in range(2):
        ids = case.tokens.ids(trace).tolist()
        order = np.argsort(-case.logps[trace], axis=1)
        likely = np.take_along_axis(case.ids[trace], order, axis=1)[1:]
        values = np.take_along_axis(case.logps[trace], order, axis=1)[1:]
        if trace:  # as if there was a pad after the end
            ids = [*ids, 0]
            likely, values = (np.concatenate([a, a[:1]]) for a in (likely, values))
        rows.append(
            {
                "input_ids": ids,
                "compressed_logprobs": [list(encoder.logps(one)) for one in values],
                "bytepacked_indices": [list(encoder.ids(one)) for one in likely],
            }
        )
    schema = pa.schema(
        [
            ("input_ids", pa.list_(pa.uint64())),
            ("compressed_logprobs", pa.list_(pa.list_(pa.uint8()))),
            ("bytepacked_indices", pa.list_(pa.list_(pa.uint8()))),
        ]
    )
    pq.write_table(pa.Table.from_pylist(rows, schema), folder / "data_0.parquet")
    (folder / "compression_config.yaml").write_text(yaml.safe_dump(chosen))


def test_distillkit_in_bfloat16_is_read_to_its_rounding(case: Case, tmp_path: Path) -> None:
    folder = tmp_path / "distillkit"
    folder.mkdir()
    write_distillkit(case, folder, PLAIN | {"exact_dtype": "bfloat16"})
    store = case.read(folder)
    prompt = int(case.tokens.prompt_lengths[0])
    found = store.of(0, int(case.tokens.lengths[0]) - prompt)
    assert found is not None
    wanted = np.sort(case.logps[0][prompt:], axis=1)
    np.testing.assert_allclose(np.sort(found[1], axis=1), wanted, rtol=2**-8, atol=0.01)


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"d": 9999}, "bytes of a token for 5 numbers of 14 bits"),
        ({"exact_k": 4}, "left over"),
        ({"exact_dtype": "float64"}, "bytes of a token, but"),
        ({"exact_dtype": "int8"}, "unknown dtype int8"),
        ({"zip": 1}, "unknown key zip"),
        (None, "No such file"),
    ],
)
def test_wrong_settings_of_distillkit_are_an_error(
    case: Case, tmp_path: Path, change: Row | None, problem: str
) -> None:
    import yaml

    folder = tmp_path / "distillkit"
    folder.mkdir()
    write_distillkit(case, folder, PLAIN)
    config = folder / "compression_config.yaml"
    config.unlink()
    if change is not None:
        config.write_text(yaml.safe_dump(PLAIN | change))
    with pytest.raises(InputError, match=problem):
        case.read(folder)


def spoil(row: Row, place: int, token: int | None = None, logp: float | None = None) -> Row:
    """A changed entry of one token."""
    row = json.loads(json.dumps(row))
    if token is not None:
        row["target_token_ids"][place][0] = token
    if logp is not None:
        row["logprobs"][place][0] = logp
    return row


@pytest.mark.parametrize(
    ("spoiled", "problem"),
    [
        (lambda row: spoil(row, 3, logp=0.5), "token 3: 0.5 is no log-prob"),
        (lambda row: spoil(row, 3, logp=math.nan), "token 3: nan is no log-prob"),
        (lambda row: spoil(row, 2, token=row["target_token_ids"][2][1]), "token 2: id .* twice"),
        (lambda row: spoil(row, 2, token=-7), "token 2: a negative id"),
        (lambda row: spoil(row, 2, logp=-0.0), "token 2: the probabilities sum to 1.[0-9]+"),
        (
            lambda row: row | {"logprobs": row["logprobs"][2:]},
            r"tokens, but target_token_ids has",
        ),
        (
            lambda row: {name: values[3:] for name, values in row.items()},
            r"it has distributions of \d+ tokens, but the completion has",
        ),
        (lambda row: row | {"logprobs": 5}, "no teacher's distributions"),
        (lambda row: {"logprobs": {"content": [{}]}}, "no teacher's distributions"),
        (lambda row: {"prompt_logprobs": {"a": 1}}, "no teacher's distributions"),
        (lambda row: {"prompt_logprobs": "["}, "not valid JSON"),
    ],
)
def test_a_row_without_proper_distributions_is_named(
    case: Case, tmp_path: Path, spoiled: Callable[[Row], Row], problem: str
) -> None:
    rows = [row | of_completion(case, trace) for trace, row in enumerate(case.rows)]
    rows[1] = case.rows[1] | spoiled(of_completion(case, 1))
    path = write_rows(tmp_path / "teacher.jsonl", rows)
    with pytest.raises(InputError, match=rf"teacher.jsonl:2: .*{problem}"):
        case.read(path)


def table_of(case: Case) -> list[Row]:
    """The distributions as a table of `redi logprobs --top`."""
    rows = []
    for trace in range(2):
        start = int(case.tokens.prompt_lengths[trace])
        rows.append(
            {
                "hash": case.tokens.hash(trace),
                "row": f"data.jsonl:{trace + 1}",
                "token_ids": case.tokens.ids(trace)[start:].tolist(),
                "top_ids": case.ids[trace][start:].tolist(),
                "top_logps": case.logps[trace][start:].tolist(),
            }
        )
    return rows


def in_first(name: str, change: Callable[[list[Any]], Any]) -> Callable[[list[Row]], None]:
    def spoil_table(rows: list[Row]) -> None:
        rows[0][name] = change(rows[0][name])

    return spoil_table


def in_all(name: str, change: Callable[[Any], Any]) -> Callable[[list[Row]], None]:
    def spoil_table(rows: list[Row]) -> None:
        for row in rows:
            row[name] = [[change(entry) for entry in token] for token in row[name]]

    return spoil_table


@pytest.mark.parametrize(
    ("spoiled", "problem"),
    [
        (in_first("top_ids", lambda value: None), r":1 \(of data.jsonl:1\): top_ids is null"),
        (in_first("token_ids", lambda value: None), ":1 .*token_ids is null"),
        (in_first("top_logps", lambda value: [None, *value[1:]]), ":1 .*top_logps has a null"),
        (in_first("top_ids", lambda value: [[None] * 5, *value[1:]]), ":1 .*top_ids has a null"),
        (
            in_first("top_ids", lambda value: [value[0][:4], *value[1:]]),
            ":1 .*top_ids has 4 entries of one token and 5 of another",
        ),
        (
            in_first("top_logps", lambda value: [token[:3] for token in value]),
            r":1 .*top_ids \[\d+, 5\] and top_logps \[\d+, 3\] must have K entries of each",
        ),
        (in_all("top_ids", lambda entry: f"token {entry}"), ": .*column 'top_ids': .*token"),
        (
            in_all("top_ids", lambda entry: entry + (1 << 40)),
            ".*column 'top_ids'.*not in range",
        ),
    ],
)
def test_a_faulty_table_is_an_error_with_row_or_column(
    case: Case, tmp_path: Path, spoiled: Callable[[list[Row]], None], problem: str
) -> None:
    path = tmp_path / "table.parquet"
    rows = table_of(case)
    pq.write_table(pa.Table.from_pylist(rows[::-1]), path)
    case.check(case.read(path))  # in any order
    spoiled(rows)
    pq.write_table(pa.Table.from_pylist(rows), path)
    with pytest.raises(InputError, match=f"table.parquet{problem}") as raised:
        case.read(path)
    assert "\n" not in str(raised.value)


def test_another_tokenizer_is_an_error_with_row_and_token(case: Case, tmp_path: Path) -> None:
    rows = [row | vllm(case, trace) for trace, row in enumerate(case.rows)]
    entries = rows[1]["prompt_logprobs"]
    place = int(case.tokens.prompt_lengths[1]) + 2
    entries[place] = {"7": -0.1}
    path = write_rows(tmp_path / "teacher.jsonl", rows)
    with pytest.raises(
        InputError,
        match=r"teacher.jsonl:2: the teacher's tokens are not the student's: token 2 of the "
        r"completion is \d+, .*data.jsonl:2",
    ):
        case.read(path)


def test_files_without_any_trace_of_the_data_are_an_error(case: Case, tmp_path: Path) -> None:
    other = [{"prompt": "?", "completion": "!", **of_completion(case, 0)}]
    path = write_rows(tmp_path / "other.jsonl", other)
    with pytest.raises(InputError, match=r"other.jsonl: has distributions of none of the 2 traces"):
        case.read(path)
    with pytest.raises(InputError, match=r"data.jsonl: has distributions of none"):
        case.read(case.folder / "data.jsonl")


def test_a_table_written_as_json_is_an_error_with_advice(case: Case, tmp_path: Path) -> None:
    path = write_rows(tmp_path / "table.jsonl", [{"hash": "ab", "top_ids": [[1]], "logp_mean": -1}])
    with pytest.raises(InputError, match=r"jsonl:1: the columns .*; .*\.parquet table of `redi"):
        case.read(path)


def test_several_teachers_are_a_mixture_of_probabilities(case: Case, tmp_path: Path) -> None:
    rows = [row | of_completion(case, trace) for trace, row in enumerate(case.rows)]
    first = case.read(write_rows(tmp_path / "first.jsonl", rows))
    other = {"logprobs": [], "target_token_ids": []}
    for ids, logps in zip(rows[0]["target_token_ids"], rows[0]["logprobs"], strict=True):
        other["target_token_ids"].append([ids[1], 299])
        other["logprobs"].append([logps[1] / 2, -9.0])
    second = case.read(write_rows(tmp_path / "second.jsonl", [case.rows[0] | other]))
    both = Distributions([first, second], [3.0, 1.0])
    assert both.kept == 7
    count = len(rows[0]["logprobs"])
    ids, logps = both.of(0, count)
    for place in range(count):
        wanted: dict[int, float] = {}
        for weight, one in ((0.75, rows[0]), (0.25, other)):
            for token, logp in zip(
                one["target_token_ids"][place], one["logprobs"][place], strict=True
            ):
                wanted[token] = wanted.get(token, 0) + weight * math.exp(logp)
        found = {
            i: math.exp(v) for i, v in zip(ids[place], logps[place], strict=True) if i != PADDING
        }
        assert found == pytest.approx(wanted, rel=5e-3)
    # The second teacher has nothing of the second trace: the first one's share is all of it.
    alone, mixed = first.of(1, len(rows[1]["logprobs"])), both.of(1, len(rows[1]["logprobs"]))
    assert alone is not None
    for ids_and_logps, width in ((alone, 5), (mixed, 7)):
        assert ids_and_logps[0].shape[1] == width
    order = np.argsort(-mixed[1].astype(float), axis=1)[:, :5]
    np.testing.assert_allclose(
        np.take_along_axis(mixed[1], order, axis=1), -np.sort(-alone[1], axis=1), rtol=2**-10
    )


def test_a_mixture_is_a_distribution_where_entries_are_certain_or_nearly_impossible(
    tmp_path: Path,
) -> None:
    """Shares of 1 add up to more in float32, and exp(-900) is 0 in float64."""
    ids, logps = np.array([[4, 9]], np.int32), np.array([[0.0, -900.0]], np.float32)
    stores = [write_store(tmp_path / name, name, [(0, ids, logps, ids[:, 0])]) for name in "abcde"]
    weights = np.random.default_rng(0).uniform(0.1, 10, (100, len(stores))).tolist()
    mixed = [Distributions(stores, shares).of(0, 1) for shares in weights]
    all_ids, all_logps = (
        torch.from_numpy(np.concatenate(part)) for part in zip(*mixed, strict=True)
    )
    assert (all_ids[all_ids != PADDING].view(-1, 2) == torch.tensor([4, 9])).all()
    found = all_logps[all_ids != PADDING].view(-1, 2).float()
    torch.testing.assert_close(found, torch.tensor([[0.0, -900.0]]).expand_as(found))
    hidden = torch.randn(100, 10, requires_grad=True)
    made = topk_divergence(
        hidden, torch.eye(10), all_ids, all_logps, torch.ones(100), direction="reverse"
    )
    made.loss.backward()
    assert made.loss.isfinite()
    assert hidden.grad is not None
    assert hidden.grad.isfinite().all()


def test_the_cache_is_used_until_the_file_changes(
    case: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from redi.engine.distill import sources

    rows = [row | of_completion(case, trace) for trace, row in enumerate(case.rows)]
    path = write_rows(tmp_path / "teacher.jsonl", [*rows, rows[0] | {"new": 1}])
    made = case.read(path)
    calls: list[object] = []
    write = sources.write_store
    monkeypatch.setattr(sources, "write_store", lambda *a: calls.append(a) or write(*a))
    assert case.read(path).folder == made.folder
    assert not calls
    made.files[1].unlink()  # as if it was killed before the end
    assert case.read(path).meta == made.meta
    assert len(calls) == 1
    content = made.files[0].read_bytes()
    for damaged in (bytes([content[400] ^ 1]), b"\xff" * 8):  # of the same size
        made.files[0].write_bytes(content[:400] + damaged + content[400 + len(damaged) :])
        assert case.read(path).meta == made.meta
        assert made.files[0].read_bytes() == content
    assert len(calls) == 3
    write_rows(Path(path), [rows[0] | {"new": 2}])
    assert case.read(path).meta.traces == 1


def test_equal_traces_share_a_row(case: Case, tmp_path: Path) -> None:
    tokens = case.tokenized([case.rows[0], case.rows[1], case.rows[0]], "twice.jsonl")
    path = write_rows(tmp_path / "teacher.jsonl", [case.rows[0] | of_completion(case, 0)])
    store = case.read(path, tokens=tokens)
    count = int(tokens.lengths[0] - tokens.prompt_lengths[0])
    assert [store.has(trace) for trace in range(3)] == [True, False, True]
    first, second = store.of(0, count), store.of(2, count)
    assert first is not None
    assert second is not None
    assert np.array_equal(first[0], second[0])


def test_figures_of_a_cache_are_counted(case: Case, tmp_path: Path) -> None:
    rows = [row | of_completion(case, trace) for trace, row in enumerate(case.rows)]
    meta = case.read(write_rows(tmp_path / "teacher.jsonl", rows)).meta
    tokens = sum(len(row["logprobs"]) for row in rows)
    assert (meta.traces, meta.tokens, meta.kept) == (2, tokens, 5)
    assert meta.likely == tokens
    mass = sum(np.exp(row["logprobs"]).sum() for row in rows)
    assert meta.mass == pytest.approx(mass, rel=1e-3)
    assert meta.bytes > 30 * tokens
