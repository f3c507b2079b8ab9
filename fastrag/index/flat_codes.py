"""The int8 codes next to the float32 rows of a FlatIndex: when they are made, used, saved and read.

Files in the folder of the index, one for each array of `RowCodes`:

    codes-NAME.npy   an array; the rows of a matrix of bytes start at multiples of 64 bytes
    manifest.json    `row_codes`: version of the arrays, and the shape of each without padding
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastrag.index import codec, codes
from fastrag.index.codec import Codec
from fastrag.index.codes import RowCodes
from fastrag.index.lock import ReadWriteLock
from fastrag.index.storage import as_tensor, entry_of
from fastrag.manifests import integer, items, record, table
from fastrag.messages import shown
from fastrag.ops import backends

# Counts the meanings of the arrays. Codes of another version are not read, but made again.
VERSION = 1
FIELDS = record({"version": integer(1), "shapes": table(items(integer()))})
_PREFIX = "codes-"
# Making the codes takes about as long as this many searches of the rows for one question, and a
# search for this many questions takes about as long as one for one, since it reads the rows once.
SEARCHES_TO_MAKE = 50
QUESTIONS_PER_SEARCH = 16
_ROWS_CHECKED = 16


class FlatCodes:
    """The codes of an index, if it has any; a copy has codes of its own.

    Searches only add codes. All other methods are for the one writer, or while no search runs.

    Args:
        wanted: False: none. True: as soon as a search is faster with them. None: as soon as
            the searches that they would have made faster have taken as long as making them takes,
            in searches of the rows; on a CPU with the C++ extension, and not on a GPU.
    """

    def __init__(self, wanted: bool | None) -> None:
        self.wanted = wanted
        self._made: RowCodes | None = None
        self._mapped = False  # from a folder, read-only
        self._n_searches = 0  # of the rows, in searches for one question
        self._making = ReadWriteLock()

    def for_search(self, query: Tensor, index_emb: Tensor, k: int) -> RowCodes | None:
        """Return the codes for a search that is faster with them, or None if there are none."""
        if not codes.pay(query, index_emb, k) or not self._useful(index_emb):
            return None
        if self._made is not None:
            return self._made
        with self._making.write():  # the first caller makes them
            self._n_searches += -(-len(query) // QUESTIONS_PER_SEARCH)
            if self._made is None and (self.wanted or self._n_searches >= SEARCHES_TO_MAKE):
                self._made = RowCodes(index_emb)
            return self._made

    def for_save(
        self, index_emb: Tensor, room: Callable[[], Tensor] | None = None
    ) -> RowCodes | None:
        """Return the codes if a search for one question is faster with them.

        Args:
            index_emb: the rows `[N, D]`.
            room: returns `[N, D]` int8 for codes that are made now; None: they are made in memory.
        """
        one = index_emb.new_empty(1, index_emb.shape[1])
        if index_emb.is_cuda or not codes.pay(one, index_emb, 1) or not self._useful(index_emb):
            return None
        with self._making.write():
            if self._made is None:
                self._made = RowCodes(index_emb, None if room is None else room())
            return self._made

    def drop(self) -> None:
        """Forget the codes: there are other rows, and their searches are counted from now on."""
        self._made, self._mapped, self._n_searches = None, False, 0

    def move(self, index_emb: Tensor) -> None:
        """Take over the same rows from another place in memory, where they will be written to."""
        if self._made is None:
            return
        arrays = self._made.arrays()
        if self._mapped:
            arrays = {name: _copied(x) for name, x in arrays.items()}
        self._made, self._mapped = RowCodes.from_arrays(index_emb, arrays), False

    def take(self) -> RowCodes | None:
        """Hand over the codes, if there are any; if a change is interrupted, there are none."""
        made, self._made = self._made, None
        return made

    def put(self, made: RowCodes | None) -> None:
        """Take the codes back after a change of rows."""
        self._made = made

    def load(
        self,
        arrays: Mapping[str, np.ndarray[Any, Any]],
        manifest: Mapping[str, Any],
        index_emb: Tensor,
        dir: str | os.PathLike[str],
        *,
        mapped: bool,
    ) -> None:
        """Read the codes of a folder of FlatIndex; codes of another version are not read.

        Raises:
            ValueError: an array is missing or has another shape, or some codes are not those of
                the rows; the message names the file.
        """
        entry = manifest.get("row_codes")
        if self.wanted is False or entry is None or entry["version"] != VERSION:
            return
        if backends.choose("mips_topk", index_emb.device, torch.float32) != "cpp":
            return  # nothing could keep the norms of the rows right
        found = {}
        for name, shape in entry["shapes"].items():
            array = entry_of(arrays, _PREFIX + name, dir, manifest["format"])
            if len(array.shape) != len(shape) or not (np.array(array.shape) >= shape).all():
                raise ValueError(
                    f"{dir}: {_PREFIX}{name}.npy: expected {shape}, got {list(array.shape)}"
                )
            found[name] = as_tensor(array)[tuple(map(slice, shape))]
        _check(found, index_emb, dir)
        self._made, self._mapped = RowCodes.from_arrays(index_emb, found), mapped

    def reads(self, index_emb: Tensor) -> int:
        """Return the bytes that a search for one question reads of all rows or their codes."""
        n = len(index_emb)
        kept = [index_emb]
        if self._made is not None and codes.pay(index_emb[:1], index_emb, 1):
            kept = [x for x in self._made.arrays().values() if len(x) == n]
        return sum(x.numel() * x.itemsize for x in kept)

    def _useful(self, index_emb: Tensor) -> bool:
        """Return whether the index may have codes here."""
        if self.wanted is not None:
            return self.wanted
        return backends.choose("mips_topk", index_emb.device, torch.float32) == "cpp"


def checked_codes(dtype: str, codes: bool | None, exact: str | None) -> tuple[str, bool | None]:
    """Return dtype and codes of a FlatIndex; codes are False if the rows are not float32.

    Raises:
        ValueError: another combination, or another `exact`.
    """
    if exact is not None:
        if (exact, dtype) != ("float32", "int8") or codes is False:
            raise ValueError(
                f"exact: expected 'float32' with dtype 'int8' and codes, got {shown(exact)} with "
                f"{dtype!r} and codes={codes}"
            )
        warnings.warn(
            "exact='float32' with dtype='int8': write codes=True, or leave out all three: codes "
            "are then made when they pay",
            FutureWarning,
            stacklevel=3,
        )
        return "float32", True
    if codes is not None and (type(codes) is not bool or (codes and dtype != "float32")):
        raise ValueError(
            f"codes: expected True with dtype 'float32', False or None, got {shown(codes)} with "
            f"{dtype!r}; int8 codes are the smallest and fastest addition to float32 rows"
        )
    return dtype, codes if dtype == "float32" else False


def arrays_of(made: RowCodes) -> tuple[dict[str, np.ndarray[Any, Any]], dict[str, Any]]:
    """Return the arrays of a folder that hold the codes, and their entry in its manifest."""
    found = made.arrays()
    shapes = {name: list(x.shape) for name, x in found.items()}
    whole = {_PREFIX + name: _with_padding(x).numpy() for name, x in found.items()}
    return whole, {"version": VERSION, "shapes": shapes}


def _with_padding(x: Tensor) -> Tensor:
    """View a matrix with the padding between its rows."""
    return x.as_strided((len(x), x.stride(0)), x.stride()) if x.dim() == 2 else x


def _copied(x: Tensor) -> Tensor:
    if x.dtype != torch.int8:
        return x.clone()
    room = codec.allocate(len(x), x.shape[1], "int8", x.device)[:, : x.shape[1]]
    return room.copy_(x)


def _check(found: Mapping[str, Tensor], index_emb: Tensor, dir: object) -> None:
    """Check the codes that every version has, some of them against the rows."""
    n, dim = index_emb.shape
    for name, shape, dtype in (
        ("codes", (n, dim), torch.int8),
        ("scale", (dim,), torch.float32),
        ("offset", (dim,), torch.float32),
    ):
        x = found.get(name)
        if x is None or tuple(x.shape) != shape or x.dtype != dtype:
            got = "none" if x is None else f"{x.dtype} {list(x.shape)}"
            raise ValueError(
                f"{dir}: {_PREFIX}{name}.npy: expected {dtype} {list(shape)}, got {got}"
            )
    rows = torch.linspace(0, n - 1, min(n, _ROWS_CHECKED)).long()
    chosen = Codec("int8", found["scale"], found["offset"])
    if not torch.equal(chosen.encode(index_emb[rows])[0], found["codes"][rows]):
        raise ValueError(f"{dir}: {_PREFIX}codes.npy: expected the codes of vectors.npy")
