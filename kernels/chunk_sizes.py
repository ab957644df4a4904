"""Rows of a chunk, and its memory: by a CPU's caches, or by a GPU's processors and memory."""

import torch
from torch import Tensor

from redi.kernels.reference import accumulation_dtype

# Rows of a chunk on a CPU. A chunk reads the lm_head twice and rewrites dW once; beyond 256 rows
# that no longer shows in the time (384 and 512 measure the same), only in the memory.
CPU_CHUNK_TOKENS = 256

# On a GPU a chunk of [C, V] may take this share of the card's memory (80 GiB: 5 GiB).
GPU_CHUNK_SHARE = 16
# Output tile of the usual cuBLAS kernel, for counting waves.
TILE_ROWS, TILE_COLUMNS = 128, 256

# A GPU's buffer of logits is rounded up to a multiple of so many rows: the number of tokens differs
# from row to row, and a caching allocator reuses several GiB only for a request no larger.
GPU_BUFFER_ROWS = 512

# Each row of the buffer begins at a multiple of this many entries.
ROW_PADDING = 64


def split(start: int, end: int, most: int) -> list[tuple[int, int]]:
    """Cut [start, end) into the fewest ranges of at most `most`, as equal in size as can be.

    Equal sizes let a caching allocator hand the same memory out again.
    """
    if start == end:
        return []
    parts = -(-(end - start) // most)
    size = -(-(end - start) // parts)
    return [(i, min(i + size, end)) for i in range(start, end, size)]


def default_chunk_tokens(tokens: int, weight: Tensor, dtype: torch.dtype = torch.float32) -> int:
    """Rows of a chunk: so many that a CPU's caches hold it, or that it fills a GPU's processors.

    `dtype` is that of the chunk's [C, V].
    """
    if weight.device.type != "cuda":
        return CPU_CHUNK_TOKENS
    vocab, hidden_size = weight.shape
    card = torch.cuda.get_device_properties(weight.device)
    return gpu_chunk_tokens(
        tokens, vocab, hidden_size, dtype, card.total_memory, card.multi_processor_count
    )


def gpu_chunk_tokens(
    tokens: int, vocab: int, hidden_size: int, dtype: torch.dtype, memory: int, processors: int
) -> int:
    """Rows of a chunk on a GPU of so many bytes of memory and so many processors.

    `vocab` may be 0, of an empty shard of the lm_head.
    """
    most = max(TILE_ROWS, memory // GPU_CHUNK_SHARE // (dtype.itemsize * max(1, vocab)))
    return fill_waves(tokens, hidden_size, processors, most)


def gpu_workspace(
    tokens: int,
    vocab: int,
    hidden_size: int,
    dtype: torch.dtype,
    memory: int,
    processors: int,
    *,
    exponentials: bool = False,
    tiles: int = 0,
) -> int:
    """Bytes that a loss takes on a GPU while it runs, besides its results.

    A chunk's [C, V] (`chunk_buffer`), its hidden states and their gradient.

    Args:
        tokens: N, unmasked ones.
        dtype: of the operands.
        memory, processors: of the GPU.
        exponentials: as by `exp_gemm`: [C, V] in `dtype` instead of logits, and the targets' rows
            of the lm_head, in two dtypes, while dX is corrected by them.
        tiles: whose sums a filter keeps, of each row.
    """
    in_full = accumulation_dtype(dtype)
    buffer_dtype = dtype if exponentials else in_full
    most = gpu_chunk_tokens(tokens, vocab, hidden_size, buffer_dtype, memory, processors)
    rows = max((end - start for start, end in split(0, tokens, most)), default=0)
    in_buffer = buffer_rows(rows, torch.device("cuda")) * padded(vocab)
    states = (2 if exponentials else 1) * rows * hidden_size
    return (
        in_buffer * buffer_dtype.itemsize
        + states * (dtype.itemsize + in_full.itemsize)
        + rows * tiles * torch.float32.itemsize
    )


def fill_waves(tokens: int, hidden_size: int, processors: int, most: int) -> int:
    """The chunk size, `most` at most, for which dX = dZ W takes the fewest waves of tiles.

    dX has few tiles, ceil(C / 128) ceil(D / 256), and a last wave that is not full leaves
    processors idle: at D = 1536 on 132 of them, 5,632 or 8,448 rows fill every wave and 512 rows
    18 % of one. (Z has V / D times as many, and dW's number does not depend on C.) Of equals
    the larger wins, as every chunk reads and writes dW once.
    """
    columns = -(-hidden_size // TILE_COLUMNS)

    def waves(rows: int) -> int:
        return -(-(-(-rows // TILE_ROWS) * columns) // processors)

    fewest = max(1, -(-tokens // most))
    parts = min(
        range(fewest, 4 * fewest + 1), key=lambda parts: (parts * waves(-(-tokens // parts)), parts)
    )
    return max(1, -(-tokens // parts))


def buffer_rows(rows: int, device: torch.device) -> int:
    """Rows allocated for a chunk of so many."""
    step = GPU_BUFFER_ROWS if device.type == "cuda" else 1
    return -(-rows // step) * step


def padded(columns: int) -> int:
    """The next multiple of ROW_PADDING."""
    return -(-columns // ROW_PADDING) * ROW_PADDING


def chunk_buffer(ranges: list[tuple[int, int]], weight: Tensor, dtype: torch.dtype) -> Tensor:
    """Room for [C, V] of the largest chunk: logits, or the exponentials in their place.

    Rows begin at multiples of 128 bytes whatever V is: cuBLAS and the kernels then move 16 bytes
    at a time, both over the logits and over the halves that overwrite them.
    """
    rows = buffer_rows(max((end - start for start, end in ranges), default=0), weight.device)
    vocab = weight.shape[0]
    return torch.empty(rows, padded(vocab), dtype=dtype, device=weight.device)[:, :vocab]
