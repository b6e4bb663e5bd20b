"""Megatron's indexed data sets (`NAME.idx` and `NAME.bin`), read by megatron-core itself."""

from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from megatron.core.datasets.indexed_dataset import IndexedDataset

from megatron_fapo.errors import DataError


def documents(prefix: Path) -> Iterator[list[np.ndarray[Any, Any]]]:
    """The token ids [T] of each sequence of each document. Raises DataError when the two files are not such a set."""
    for suffix in (".idx", ".bin"):
        if not Path(f"{prefix}{suffix}").is_file():
            raise DataError(f"{prefix}{suffix}: no such file; a Megatron data set is NAME.idx and NAME.bin")
    try:
        data = IndexedDataset(str(prefix))
    except (AssertionError, ValueError, OSError) as error:
        raise DataError(f"{prefix}.idx: not an index of Megatron's: {error}") from None
    for first, last in pairwise(data.document_indices):
        yield [np.asarray(data[place]) for place in range(first, last)]
