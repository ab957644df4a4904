"""The launch table: which launch of `exp_gemm_triton` on which GPU, and whether it is faster.

Committed (`launches.json`) and not searched for at run time: a choice that varied by run or rank
would break bitwise resume. `python -m redi.bench.tune` measures on a card and writes entries; an
entry without a measurement never makes `backend="auto"` choose "triton-exp".
"""

import json
import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from redi.kernels.reference import Backend

TABLE = Path(__file__).with_name("launches.json")

# Small, so that tests have several groups.
INTERPRETER_L2_BYTES = 8 << 10


@dataclass(frozen=True)
class Launch:
    """Of `exp_gemm_triton.exp_gemm_kernel`.

    A filter leaves out tiles of these rows and columns, so its result depends on the launch.
    """

    rows: int
    """Of a tile."""
    columns: int
    depth: int
    """Of D that one step of a tile's product takes."""
    warps: int
    stages: int
    """Steps whose operands are in shared memory or on the way there."""
    stores: int
    """In how many parts, 1 or 2, a tile is stored: shared memory holds one of them."""
    programs: int
    """That a processor runs at once. Two need half of its registers and shared memory each, and
    one multiplies while the other takes exponentials."""
    l2_share: float
    """Of the L2 cache for hidden states: see `most_in_group`."""
    flatten: bool
    """Whether the next tile's operands are fetched during the epilogue. (Not with a filter: that
    needs more registers than there are.)"""
    kept_width: int
    """Columns of a tile of a filtered product, `filter_triton.py`."""


@dataclass(frozen=True)
class Entry:
    """A row of the table; architecture, dtype and hidden are its key."""

    architecture: str
    """As `architecture_of` names it."""
    dtype: str
    hidden: int
    """D."""
    backend: Literal["triton", "triton-exp"]
    """The faster one; "triton" where nothing was measured."""
    launch: Launch
    measured: dict[str, Any] | None = None
    """Where, when and what was measured; None: the launch is derived, its speed unknown."""


def read_table(path: Path = TABLE) -> list[Entry]:
    """The entries of a file."""
    rows = json.loads(path.read_text(encoding="utf-8"))
    return [Entry(**row | {"launch": Launch(**row["launch"])}) for row in rows]


def write_entry(entry: Entry, path: Path = TABLE) -> None:
    """Put an entry in a file; it replaces the one with its key."""

    def key(row: Entry) -> tuple[str, str, int]:
        return row.architecture, row.dtype, row.hidden

    rows = [row for row in read_table(path) if key(row) != key(entry)]
    lines = [json.dumps(asdict(row)) for row in sorted([*rows, entry], key=key)]
    path.write_text("[\n  " + ",\n  ".join(lines) + "\n]\n", encoding="utf-8")


_ENTRIES = read_table()


def architecture_of(device: torch.device) -> str:
    """ "sm_90" and the like, AMD's "gfx942", or "interpreter" for a CPU."""
    if device.type != "cuda":
        return "interpreter"
    if torch.version.hip is not None:
        return str(torch.cuda.get_device_properties(device).gcnArchName)
    return "sm_{}{}".format(*torch.cuda.get_device_capability(device))


def entries_for(architecture: str, dtype: torch.dtype = torch.bfloat16) -> list[Entry]:
    """Those of an architecture; none where the kernels were never built for it."""
    name = str(dtype).removeprefix("torch.")
    return [
        entry for entry in _ENTRIES if (entry.architecture, entry.dtype) == (architecture, name)
    ]


def launch_for(weight: torch.Tensor) -> Launch:
    """The launch for an lm_head [V, D] (or [C, D]) in bfloat16: the nearest D's in the table."""
    entries = entries_for(architecture_of(weight.device))
    hidden = weight.shape[1]
    return min(entries, key=lambda entry: abs(math.log(entry.hidden / hidden))).launch


def most_in_group(launch: Launch, hidden_size: int, l2_bytes: int) -> int:
    """Blocks of rows of bfloat16 hidden states, at most, that share a walk over the columns.

    So many that their hidden states stay in the L2 cache: each block of the lm_head is then fetched
    from memory once a group. Decides the order of tiles and no result.
    """
    in_a_block = launch.rows * hidden_size * torch.bfloat16.itemsize
    return max(1, int(launch.l2_share * l2_bytes) // in_a_block)


def l2_cache_bytes(device: torch.device) -> int:
    """Of a GPU, or what the interpreter pretends to have."""
    if device.type != "cuda":
        return INTERPRETER_L2_BYTES
    return torch.cuda.get_device_properties(device).L2_cache_size


def fastest_backend(architecture: str, dtype: torch.dtype, hidden: int) -> Backend:
    """ "triton-exp" where it was measured to be faster at this very D, else "triton"."""
    for entry in entries_for(architecture, dtype):
        if entry.hidden == hidden and entry.measured is not None:
            return entry.backend
    return "triton"
