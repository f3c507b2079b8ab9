"""Write the arrays of a `PassageStore`: block by block into a folder, or into memory."""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import operator
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal, NoReturn

import numpy as np

from fastrag.data.readers import Passage
from fastrag.index.progress import PassageBar
from fastrag.index.storage import ArrayStream
from fastrag.index.unfinished import ResumableWriter
from fastrag.messages import shown

if TYPE_CHECKING:
    from fastrag.data.processor import RagProcessor

Stream = Literal["encoder", "generator"]
STREAMS: tuple[Stream, ...] = ("encoder", "generator")
TEXTS = ("ids", "titles", "texts")
# A block of MiniLM's vectors takes 50 MB, and a GPU encodes it in seconds. Passages of like length
# are encoded together within a block, and in one of this size hardly any token is padding.
BLOCK_ROWS = 1 << 15
_BATCH = 1024
# Passages whose ids are sorted at once: 60 MB.
_SORTED_ROWS = 1 << 20


class Texts(Sequence[str]):
    """Texts in one array of UTF-8 bytes; each is decoded when it is accessed."""

    def __init__(self, arrays: Mapping[str, np.ndarray[Any, Any]], name: str) -> None:
        self._bytes, self._offsets = arrays[f"{name}_bytes"], arrays[f"{name}_offsets"]

    def __len__(self) -> int:
        return len(self._offsets) - 1

    def __getitem__(self, row: Any) -> Any:
        if isinstance(row, slice):
            return [self[i] for i in range(*row.indices(len(self)))]
        row = int(row)
        if not 0 <= row < len(self):
            raise IndexError(f"row: expected 0 to {len(self) - 1}, got {row}")
        return bytes(self._bytes[self._offsets[row] : self._offsets[row + 1]]).decode("utf-8")

    def encoded(self, start: int, stop: int) -> list[bytes]:
        """Return the UTF-8 bytes of rows `start` to `stop - 1`, read at once."""
        offsets = self._offsets[start : stop + 1]
        blob = bytes(self._bytes[offsets[0] : offsets[-1]])
        ends = (offsets - offsets[0]).tolist()
        return [blob[a:b] for a, b in itertools.pairwise(ends)]


class _MemoryArray:
    def __init__(self, dtype: Any) -> None:
        self._blocks = [np.empty(0, dtype=dtype)]

    def append(self, block: np.ndarray[Any, Any]) -> None:
        self._blocks.append(block)

    def rows(self) -> np.ndarray[Any, Any]:
        self._blocks = [np.concatenate(self._blocks)]
        return self._blocks[0]


class MemorySink:
    """Collect arrays in memory with the interface of a `ResumableWriter`."""

    n_rows = 0

    def __init__(self) -> None:
        self._streams: dict[str, _MemoryArray] = {}
        self.state: dict[str, Any] = {}

    def stream(self, name: str, dtype: Any) -> _MemoryArray:
        self._streams[name] = _MemoryArray(dtype)
        return self._streams[name]

    def end_block(self, n_rows: int, state: Mapping[str, Any]) -> None:
        pass

    def discard(self) -> None:
        pass

    def arrays(self) -> dict[str, np.ndarray[Any, Any]]:
        return {name: stream.rows() for name, stream in self._streams.items()}


class _Ragged:
    """Write rows of different lengths as one flat array and its offsets."""

    def __init__(
        self, sink: ResumableWriter | MemorySink, flat: str, offsets: str, dtype: Any, longest: int
    ) -> None:
        self._dtype = dtype
        self.flat: ArrayStream | _MemoryArray = sink.stream(flat, dtype)
        self.offsets: ArrayStream | _MemoryArray = sink.stream(offsets, np.int64)
        if sink.n_rows == 0:
            self.offsets.append(np.zeros(1, dtype=np.int64))
        self._end = int(self.offsets.rows()[-1])
        self.longest = longest

    def extend(self, rows: Sequence[Any]) -> None:
        lengths = np.array([len(row) for row in rows], dtype=np.int64)
        if self._dtype == np.uint8:
            flat = np.frombuffer(b"".join(rows), dtype=np.uint8)
        else:
            flat = np.fromiter(itertools.chain.from_iterable(rows), self._dtype, lengths.sum())
        self.flat.append(flat)
        self.offsets.append(self._end + np.cumsum(lengths))
        self._end += int(lengths.sum())
        self.longest = max(self.longest, int(lengths.max()))


def write_passages(
    passages: Iterable[Passage],
    processor: RagProcessor,
    sink: ResumableWriter | MemorySink,
    block_size: int,
    progress: bool,
) -> dict[str, Any]:
    """Tokenise and write all passages.

    Passages that the sink has already are only compared.

    Args:
        passages: the corpus, read once.
        processor: tokenises.
        sink: takes the arrays.
        block_size: passages per block.
        progress: show a progress bar.

    Returns:
        The manifest's `n`, and the `longest` passage of each stream in tokens.

    Raises:
        ValueError: as `PassageStore.build`.
    """
    if block_size < 1:
        raise ValueError(f"block_size: expected at least 1, got {block_size}")
    longest = sink.state.get("longest", {})
    tokens = {
        name: _Ragged(sink, f"{name}_tokens", f"{name}_offsets", np.int32, longest.get(name, 0))
        for name in STREAMS
    }
    blobs = {name: _Ragged(sink, f"{name}_bytes", f"{name}_offsets", np.uint8, 0) for name in TEXTS}

    def texts() -> dict[str, np.ndarray[Any, Any]]:
        found = {f"{name}_bytes": blobs[name].flat.rows() for name in TEXTS}
        return found | {f"{name}_offsets": blobs[name].offsets.rows() for name in TEXTS}

    total = operator.length_hint(passages) or None if progress else None
    iterator, n = iter(passages), sink.n_rows
    check_same_texts(texts(), n, iterator, progress=progress)
    with PassageBar("tokenise", total, n, progress) as bar:
        while block := tuple(itertools.islice(iterator, block_size)):
            for start in range(0, len(block), _BATCH):
                batch = block[start : start + _BATCH]
                _check(batch, n)
                made = processor.tokenize(batch)
                for name in STREAMS:
                    tokens[name].extend(made[name])
                for text, rows in _encoded(batch).items():
                    blobs[text].extend(rows)
                n += len(batch)
                bar.update(len(batch), sum(map(len, made["encoder"])))
            longest = {name: tokens[name].longest for name in STREAMS}
            sink.end_block(n, {"longest": longest})
    if n == 0:
        raise ValueError("passages: expected at least one passage, got an empty corpus")
    _write_order(Texts(texts(), "ids"), sink)
    return {"n": n, "longest": {name: tokens[name].longest for name in STREAMS}}


def check_same_texts(
    arrays: Mapping[str, np.ndarray[Any, Any]],
    n: int,
    passages: Iterator[Passage],
    *,
    complete: bool = False,
    progress: bool = False,
) -> None:
    """Check that the next n passages are those of a store, or of its finished blocks.

    Args:
        arrays: the texts of the store.
        n: number of passages to compare.
        passages: the corpus; n passages are taken from it.
        complete: the corpus must end there.
        progress: show a progress bar.

    Raises:
        ValueError: the first row that differs is named.
    """
    stored = {name: Texts(arrays, name) for name in TEXTS}
    start = 0
    with PassageBar("compare", n, 0, progress and n > 0) as bar:
        while start < n or complete:
            batch = tuple(itertools.islice(passages, min(_BATCH, n - start) or 1))
            if start == n and not batch:
                return
            _check(batch, start)
            stop = min(n, start + len(batch))
            found = _encoded(batch)
            expected = {name: texts.encoded(start, stop) for name, texts in stored.items()}
            if found != expected:
                for i in range(stop - start):
                    if any(found[name][i] != expected[name][i] for name in TEXTS):
                        _differs(start + i, stored["ids"], batch[i:])
            if start == stop:
                _differs(start, stored["ids"], batch)
            bar.update(stop - start)
            start = stop


def _differs(row: int, ids: Texts, batch: Sequence[Passage]) -> NoReturn:
    """Raise the error of a corpus whose next passages, from a row on, differ from a store."""
    expected = shown(ids[row]) if row < len(ids) else "no more passages"
    got = shown(batch[0].id) if batch else "no more passages"
    got += " with another title or text" if got == expected else ""
    raise ValueError(
        f"passages: expected the corpus of the unfinished build, in row {row} {expected}, got {got}"
    )


def _check(batch: Sequence[Any], first_row: int) -> None:
    for row, passage in enumerate(batch, first_row):
        if not isinstance(passage, Passage):
            raise ValueError(
                f"passages: row {row}: expected a Passage (read_passages makes them), got "
                f"{type(passage).__name__}"
            )
        for name in ("id", "title", "text"):
            if not isinstance(value := getattr(passage, name), str):
                raise ValueError(
                    f"passages: row {row}: {name}: expected text, got {type(value).__name__}"
                )
        if not passage.text.strip():
            raise ValueError(
                f"passages: row {row} (id {shown(passage.id)}): expected text, got an empty one"
            )


def _encoded(batch: Sequence[Passage]) -> dict[str, list[bytes]]:
    return {
        "ids": [passage.id.encode("utf-8") for passage in batch],
        "titles": [passage.title.encode("utf-8") for passage in batch],
        "texts": [passage.text.encode("utf-8") for passage in batch],
    }


def _write_order(ids: Texts, sink: ResumableWriter | MemorySink) -> None:
    """Write the hashes of all ids in ascending order, and their rows.

    The range of hashes is divided into equal parts, which are sorted one after the other, so that
    memory does not grow with the corpus.

    Raises:
        ValueError: two rows with one id.
    """
    out_hashes, out_rows = sink.stream("id_hashes", np.uint64), sink.stream("id_rows", np.int64)
    n_parts = -(-len(ids) // _SORTED_ROWS)
    width = -(-(1 << 64) // n_parts)
    with _hashes_of(ids, sink) as hashes:
        for part in range(n_parts):
            low, high = np.uint64(part * width), np.uint64(min((part + 1) * width, 1 << 64) - 1)
            rows = np.concatenate(
                [
                    start + np.flatnonzero((high >= block[:, 0]) & (block[:, 0] >= low))
                    for start in range(0, len(ids), _SORTED_ROWS)
                    for block in (hashes[start : start + _SORTED_ROWS],)
                ]
            )
            own = hashes[rows]
            order = np.lexsort((own[:, 1], own[:, 0]))
            ordered, rows = own[order], rows[order]
            same = (ordered[1:] == ordered[:-1]).all(axis=1).nonzero()[0]
            if same.size:
                sink.discard()
                first, again = (int(rows[same[0] + i]) for i in (0, 1))
                raise ValueError(
                    f"passages: expected unique ids, got rows {first} and {again} with one id, "
                    f"{shown(ids[first])}"
                )
            out_hashes.append(np.ascontiguousarray(ordered[:, 0]))
            out_rows.append(rows.astype(np.int64))


@contextlib.contextmanager
def _hashes_of(ids: Texts, sink: ResumableWriter | MemorySink) -> Iterator[np.ndarray[Any, Any]]:
    """Give the hashes of all ids, `[N, 2]` uint64; if the sink is a folder, in a nameless file."""
    starts = range(0, len(ids), _BATCH)
    blocks = (
        np.array([_hash(id) for id in ids.encoded(i, min(i + _BATCH, len(ids)))], np.uint64)
        for i in starts
    )
    if isinstance(sink, MemorySink):
        yield np.concatenate(list(blocks))
        return
    with tempfile.TemporaryFile(dir=sink.folder) as file:
        with sink.writing():
            for block in blocks:
                file.write(block.data)
            file.flush()
        yield np.memmap(file, np.uint64, "r", shape=(len(ids), 2))


def id_hash(id: str) -> tuple[int, int]:
    """Return the 128-bit hash of an id as two integers."""
    return _hash(id.encode("utf-8"))


def _hash(id: bytes) -> tuple[int, int]:
    digest = hashlib.blake2b(id, digest_size=16).digest()
    return int.from_bytes(digest[:8], "little"), int.from_bytes(digest[8:], "little")
