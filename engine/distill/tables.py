"""Reads lists of numbers from the rows of a Parquet file, whatever its types and gaps."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import pyarrow as pa


def list_of(numbers: pa.DataType, depth: int = 1) -> pa.DataType:
    """The type of a column of lists, or of lists of lists."""
    return numbers if depth == 0 else pa.list_(list_of(numbers, depth - 1))


def typed(batch: pa.RecordBatch, types: Mapping[str, pa.DataType]) -> pa.RecordBatch:
    """The columns in these types.

    Raises:
        pa.ArrowInvalid: a column has other values, or numbers too large; names it.
    """
    columns = []
    for name, wanted in types.items():
        try:
            columns.append(batch[name].cast(wanted))
        except pa.ArrowException as error:
            raise pa.ArrowInvalid(f"column {name!r}: {error}") from None
    return pa.RecordBatch.from_arrays(columns, names=list(types))


def numbers(batch: pa.RecordBatch, name: str, place: int) -> np.ndarray:
    """The numbers [T] or [T, K] in a cell of a column of `list_of`.

    Raises:
        ValueError: it is null, has a null, or lists of different lengths.
    """
    values = batch[name][place].values
    if values is None:
        raise ValueError(f"{name} is null")
    shape: tuple[int, ...] = (len(values),)
    if pa.types.is_list(values.type) and not values.null_count:
        sizes = np.unique(values.value_lengths().to_numpy())
        if len(sizes) > 1:
            raise ValueError(
                f"{name} has {sizes[0]} entries of one token and {sizes[-1]} of another; each "
                "token must have K"
            )
        shape = (len(values), int(sizes.sum()))  # K, or 0 without any token
        values = values.flatten()
    if values.null_count:
        raise ValueError(f"{name} has a null")
    return values.to_numpy().reshape(shape)
