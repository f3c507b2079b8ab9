"""PassageStore: the memory-mapped corpus as token ids in both vocabularies."""

from __future__ import annotations

import hashlib
import itertools
import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence, Sized
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Self

import numpy as np
import torch

from fastrag import manifests
from fastrag.data.readers import Passage
from fastrag.data.templates import Template, stream_fingerprint
from fastrag.index.inputs import usable_device
from fastrag.index.storage import (
    ArrayStream,
    FolderWriter,
    as_tensor,
    entry_of,
    read_folder,
    write_folder,
)
from fastrag.manifests import integer, optional, record, table, text
from fastrag.messages import shown
from fastrag.ops import backends, checks

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from fastrag.data.processor import RagProcessor

FORMAT = "fastrag.PassageStore"
VERSION = 1
Stream = Literal["encoder", "generator"]
STREAMS: tuple[Stream, ...] = ("encoder", "generator")
_TEXTS = ("ids", "titles", "texts")
_STREAM = {"fingerprint": text(), "max_tokens": optional(integer(1)), "longest": integer()}
_FIELDS = record(
    {
        "n": integer(1),
        "streams": record(
            {"encoder": record({**_STREAM, "prefix": text()}), "generator": record(_STREAM)}
        ),
        "template": record({}),  # as Template.from_dict reads it
    },
    {"origin": table(text())},
)
_BATCH = 1024


class PassageStore:
    """Passages tokenised in both vocabularies, and their texts. Row i is row i of the index.

    `build` and `load` make a store. Stream `"encoder"` holds the input of the passage encoder, with
    special tokens; stream `"generator"` holds the passage's piece of the template, without special
    tokens. On disk both are flat int32 token ids with int64 offsets, which a loaded store maps.

    Example:
        >>> from tokenizers import Tokenizer, models, pre_tokenizers
        >>> from transformers import PreTrainedTokenizerFast
        >>> from fastrag.data import RagProcessor
        >>> vocabulary = {"?": 0, "Paris": 1, "capital": 2, "</s>": 3}
        >>> words = Tokenizer(models.WordLevel(vocabulary, unk_token="?"))
        >>> words.pre_tokenizer = pre_tokenizers.Whitespace()
        >>> tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, eos_token="</s>")
        >>> store = PassageStore.build(
        ...     [Passage("p1", "", "Paris"), Passage("p2", "", "capital Paris")],
        ...     RagProcessor(tokenizer, tokenizer, kind="causal"),
        ... )
        >>> store.gather(torch.tensor([[1, 0, -1]]), "encoder")
        (tensor([[[2, 1], [1, 0], [0, 0]]]), tensor([[2, 1, 0]]))
    """

    def __init__(
        self, manifest: Mapping[str, Any], arrays: Mapping[str, np.ndarray[Any, Any]]
    ) -> None:
        self._manifest = {key: manifest[key] for key in ("n", "streams", "template")}
        # Not part of the content: stores of equal texts have equal checksums.
        self.origin: dict[str, str] = dict(manifest.get("origin", {}))
        self._arrays = dict(arrays)
        files = manifest.get("files", {})
        self._sha256 = {name: str(entry["sha256"]) for name, entry in files.items()}
        self._tokens = {name: as_tensor(arrays[f"{name}_tokens"]) for name in STREAMS}
        self._offsets = {name: as_tensor(arrays[f"{name}_offsets"]) for name in STREAMS}
        self.ids: Sequence[str] = _Texts(arrays, "ids")
        self._titles, self._bodies = _Texts(arrays, "titles"), _Texts(arrays, "texts")

    def __len__(self) -> int:
        return int(self._manifest["n"])

    def __repr__(self) -> str:
        n = {name: self._tokens[name].numel() for name in STREAMS}
        return f"PassageStore(n={len(self)}, tokens={n}, device='{self.device}')"

    @classmethod
    def build(
        cls,
        passages: Iterable[Passage],
        processor: RagProcessor,
        *,
        dir: str | os.PathLike[str] | None = None,
        origin: Mapping[str, str] | None = None,
        progress: bool = False,
    ) -> Self:
        """Tokenise a corpus; with `dir`, in bounded memory.

        Args:
            passages: any iterable, read once. If it has a length, the progress bar shows it.
            processor: tokenizers, template, prefix and length.
            dir: write the store to this folder block by block and map it; `None`: keep it in
                memory.
            origin: description of the origin of the passages, by name; saved as `origin`.
            progress: show a progress bar.

        Raises:
            ValueError: no passages, an empty text, an id that occurs twice (the message names both
                rows), a length that leaves no room for text, or a folder that cannot be written.
                No unfinished folder remains.
        """
        manifest: dict[str, Any] = {
            "template": processor.template.to_dict(),
            "streams": processor.streams(),
            "origin": dict(origin or {}),
        }
        encode = processor.tokenize
        if dir is None:
            sink = _MemorySink()
            _record(manifest, _write(passages, encode, sink, progress))
            return cls(manifest, sink.arrays())
        with FolderWriter(dir, format=FORMAT, version=VERSION) as writer:
            _record(manifest, _write(passages, encode, writer, progress))
            writer.commit(manifest)
        return cls.load(dir)

    def save(self, dir: str | os.PathLike[str]) -> None:
        """Write the store to a folder; an interrupted save leaves the previous folder in place.

        Args:
            dir: the folder: new, empty, or one of an older PassageStore, which is replaced.

        Raises:
            ValueError: the path holds something else or cannot be written.
        """
        described = {**self._manifest, "origin": self.origin}
        write_folder(dir, self._arrays, {**described, "format": FORMAT, "version": VERSION})

    @classmethod
    def load(cls, dir: str | os.PathLike[str], mmap: bool = True, verify: bool = False) -> Self:
        """Open a saved store.

        Args:
            dir: the folder.
            mmap: map the files instead of reading them.
            verify: check every byte against the manifest's SHA-256.

        Raises:
            ValueError: a missing, truncated or altered file, or another format; the message names
                the file.
        """
        manifest, arrays = read_folder(
            dir, format=FORMAT, version=VERSION, fields=_FIELDS, mmap=mmap, verify=verify
        )
        with manifests.named(dir):
            Template.from_dict(manifest["template"])
        _check_arrays(Path(dir), manifest, arrays)
        return cls(manifest, arrays)

    def handle(self) -> tuple[dict[str, Any], dict[str, Any]]:
        """Return a picklable description from which another process opens the store.

        Mapped files are named, so the other process maps them as well.
        """
        arrays = {name: _by_file(array) for name, array in self._arrays.items()}
        return {**self._manifest, "origin": self.origin}, arrays

    @classmethod
    def from_handle(cls, handle: tuple[dict[str, Any], dict[str, Any]]) -> Self:
        """Open the store of a `handle`, on the host."""
        manifest, arrays = handle
        return cls(manifest, {name: _opened(each) for name, each in arrays.items()})

    @property
    def device(self) -> torch.device:
        """Device of the token streams."""
        return self._tokens["encoder"].device

    def to(self, device: torch.device | str) -> Self:
        """Move the token streams (texts stay on the host); return the store itself.

        Raises:
            ValueError: a device that torch cannot use; nothing moves.
        """
        device = usable_device(device)
        for name in STREAMS:
            self._tokens[name] = self._tokens[name].to(device)
            self._offsets[name] = self._offsets[name].to(device)
        return self

    @property
    def template(self) -> Template:
        """Template with which the generator's stream was built."""
        return Template.from_dict(self._manifest["template"])

    def title(self, row: int) -> str:
        """Return the title of a row; it may be empty."""
        return self._titles[row]

    def text(self, row: int) -> str:
        """Return the text of a row."""
        return self._bodies[row]

    def passage(self, row: int) -> Passage:
        """Return id, title and text of a row."""
        return Passage(self.ids[row], self.title(row), self.text(row))

    def row_of(self, id: str) -> int:
        """Return the row of a passage id, found by binary search over the hashes of the ids.

        Raises:
            ValueError: no passage has this id.
        """
        hashes, rows = self._arrays["id_hashes"], self._arrays["id_rows"]
        wanted = np.uint64(_id_hash(id)[0])
        for at in range(int(np.searchsorted(hashes, wanted)), len(hashes)):
            if hashes[at] != wanted:
                break
            if self.ids[int(rows[at])] == id:
                return int(rows[at])
        raise ValueError(f"id: expected the id of one of {len(self)} passages, got {shown(id)}")

    def checksum(self) -> str:
        """Return a digest of the content: ids, texts, token ids, and how they were tokenised.

        It is taken from the manifest of a loaded store, and computed once for a store in memory.

        Returns:
            32 hexadecimal digits, the same for equal content on every device.
        """
        if not self._sha256:
            self._sha256 = {
                f"{name}.npy": hashlib.sha256(array.data).hexdigest()
                for name, array in self._arrays.items()
            }
        described = json.dumps([self._manifest, self._sha256], sort_keys=True)
        return hashlib.sha256(described.encode("utf-8")).hexdigest()[:32]

    def fingerprint(self, stream: Stream) -> str:
        """Return a digest of the tokenizer (and passage template) of a stream."""
        _check_stream(stream)
        return str(self._manifest["streams"][stream]["fingerprint"])

    def check_tokenizer(
        self, stream: Stream, tokenizer: PreTrainedTokenizerBase, template: Template | None = None
    ) -> None:
        """Reject a tokenizer or template that is not the one of a stream.

        Args:
            stream: `"encoder"` or `"generator"`.
            tokenizer: the tokenizer to compare.
            template: the template to compare, for `"generator"`; `None`: the store's own.

        Raises:
            ValueError: the stream was built with another tokenizer or passage template.
        """
        if stream == "generator":
            template = template or self.template
        found = stream_fingerprint(tokenizer, template if stream == "generator" else None)
        if found != self.fingerprint(stream):
            raise ValueError(
                f"passages: the {stream} stream was built with another tokenizer"
                f"{' or template' if stream == 'generator' else ''}: expected fingerprint "
                f"{self.fingerprint(stream)}, got {found}"
            )

    @property
    def prefix(self) -> str:
        """Text before each passage in the encoder's stream."""
        return str(self._manifest["streams"]["encoder"]["prefix"])

    def max_tokens(self, stream: Stream) -> int:
        """Return the number of tokens of the longest passage of a stream."""
        _check_stream(stream)
        return int(self._manifest["streams"][stream]["longest"])

    def lengths(self, stream: Stream) -> torch.Tensor:
        """Return the number of tokens of every passage, `[N]` int64, on the CPU."""
        _check_stream(stream)
        return as_tensor(np.diff(self._arrays[f"{stream}_offsets"]))

    def gather(
        self, rows: torch.Tensor, stream: Stream, max_length: int | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the token ids of passages, right-padded.

        Memory: one padded batch; only its passages are read. On the CPU, the batch is as wide as
        its longest passage. On a GPU, where reading a length would wait for the device, it is as
        wide as the smaller of `max_length` and the store's longest passage.

        Args:
            rows: `[...]` int64, any shape; -1 is missing. On a GPU, a row outside the store counts
                as missing, because an error would have to wait for the device.
            stream: `"encoder"` or `"generator"`.
            max_length: cut passages at this many tokens.

        Returns:
            token_ids `[..., L]` int64, padded with 0, and lengths `[...]` int64 (0 where missing),
            both on the rows' device.

        Raises:
            ValueError: unknown stream, `rows` is not an integer tensor, `max_length` below 1, or
                (on the CPU) a row outside the store or offsets outside its tokens.
        """
        _check_stream(stream)
        checks.check_integer("rows", rows)
        if max_length is not None and max_length < 1:
            raise ValueError(f"max_length: expected at least 1 token or None, got {max_length}")
        tokens, offsets = self._tokens[stream], self._offsets[stream]
        at = rows.to(tokens.device, torch.int64)
        # torch.compile warns about a call of an extension, which it cannot trace.
        native = checks.readable(tokens) and not torch.compiler.is_compiling()
        if native and not backends.why_not("cpp"):
            token_ids, lengths = _gather_cpp(tokens, offsets, at, max_length)
        else:
            longest = self.max_tokens(stream)
            token_ids, lengths = _gather_torch(tokens, offsets, at, max_length, longest)
        return token_ids.to(rows.device), lengths.to(rows.device)


def _by_file(array: np.ndarray[Any, Any]) -> Any:
    """Return the place of a mapped array in its file, or the array if it is in memory."""
    if not isinstance(array, np.memmap) or array.filename is None:
        return array
    return str(array.filename), array.dtype, array.offset, array.shape


def _opened(place: Any) -> np.ndarray[Any, Any]:
    if isinstance(place, np.ndarray):
        return place
    file, dtype, offset, shape = place
    return np.memmap(file, dtype=dtype, mode="r", offset=offset, shape=shape)


def _gather_cpp(
    tokens: torch.Tensor, offsets: torch.Tensor, rows: torch.Tensor, max_length: int | None
) -> tuple[torch.Tensor, torch.Tensor]:
    from fastrag import _C

    store, at = (tokens.numpy(), offsets.numpy()), rows.contiguous().view(-1).numpy()
    lengths = torch.empty(len(at), dtype=torch.int64)
    limit = tokens.numel() if max_length is None else max_length
    width = max(1, _C.passage_lengths(*store, at, lengths.numpy(), limit))
    token_ids = torch.empty(len(at), width, dtype=torch.int64)
    _C.gather_tokens(*store, at, token_ids.numpy())
    return token_ids.view(*rows.shape, width), lengths.view(rows.shape)


def _gather_torch(
    tokens: torch.Tensor,
    offsets: torch.Tensor,
    rows: torch.Tensor,
    max_length: int | None,
    longest: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    n = len(offsets) - 1
    outside = (rows < -1) | (rows >= n)
    on_host = checks.readable(tokens)
    if on_host and bool(outside.any()):
        raise ValueError(f"rows: expected -1 to {n - 1}, got {int(rows[outside][0])}")
    missing = (rows < 0) | outside
    at = rows.clamp(0, n - 1)
    starts, stops = (offsets[i].masked_fill(missing, 0) for i in (at, at + 1))
    if on_host:
        _check_spans(at, starts, stops, len(tokens))
    lengths = stops - starts
    if max_length is not None:
        lengths = lengths.clamp(max=max_length)
    width = longest if max_length is None else min(longest, max_length)
    if on_host:
        width = int(lengths.max()) if lengths.numel() else 0
    columns = torch.arange(max(1, width), device=tokens.device)
    mask = columns < lengths[..., None]
    positions = (starts[..., None] + columns).masked_fill(~mask, 0)
    return tokens[positions].to(torch.int64).masked_fill(~mask, 0), lengths


def _check_spans(
    rows: torch.Tensor, starts: torch.Tensor, stops: torch.Tensor, n_tokens: int
) -> None:
    bad = (starts < 0) | (stops < starts) | (stops > n_tokens)
    if bool(bad.any()):
        row, start, stop = (int(x[bad][0]) for x in (rows, starts, stops))
        raise ValueError(
            f"offsets: expected a part of the {n_tokens} tokens for row {row}, got {start} to "
            f"{stop}: the store is damaged"
        )


class _Texts(Sequence[str]):
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


class _MemoryArray:
    def __init__(self, dtype: Any) -> None:
        self._blocks = [np.empty(0, dtype=dtype)]

    def append(self, block: np.ndarray[Any, Any]) -> None:
        self._blocks.append(block)

    def whole(self) -> np.ndarray[Any, Any]:
        return np.concatenate(self._blocks)


class _MemorySink:
    """Collect arrays in memory with the interface of a FolderWriter."""

    def __init__(self) -> None:
        self._streams: dict[str, _MemoryArray] = {}

    def stream(self, name: str, dtype: Any) -> _MemoryArray:
        self._streams[name] = _MemoryArray(dtype)
        return self._streams[name]

    def arrays(self) -> dict[str, np.ndarray[Any, Any]]:
        return {name: stream.whole() for name, stream in self._streams.items()}


class _Ragged:
    """Write rows of different lengths as one flat array and its offsets."""

    def __init__(self, sink: FolderWriter | _MemorySink, flat: str, offsets: str, dtype: Any):
        self._dtype = dtype
        self._flat: ArrayStream | _MemoryArray = sink.stream(flat, dtype)
        self._offsets: ArrayStream | _MemoryArray = sink.stream(offsets, np.int64)
        self._offsets.append(np.zeros(1, dtype=np.int64))
        self._end = 0
        self.longest = 0

    def extend(self, rows: Sequence[Any]) -> None:
        lengths = np.array([len(row) for row in rows], dtype=np.int64)
        if self._dtype == np.uint8:
            flat = np.frombuffer(b"".join(rows), dtype=np.uint8)
        else:
            flat = np.fromiter(itertools.chain.from_iterable(rows), self._dtype, lengths.sum())
        self._flat.append(flat)
        self._offsets.append(self._end + np.cumsum(lengths))
        self._end += int(lengths.sum())
        self.longest = max(self.longest, int(lengths.max()))


def _write(
    passages: Iterable[Passage],
    encode: Any,
    sink: FolderWriter | _MemorySink,
    progress: bool,
) -> dict[str, Any]:
    """Tokenise and write all passages; return the manifest's `n` and the `longest` passages."""
    from tqdm.auto import tqdm

    tokens = {
        name: _Ragged(sink, f"{name}_tokens", f"{name}_offsets", np.int32) for name in STREAMS
    }
    blobs = {name: _Ragged(sink, f"{name}_bytes", f"{name}_offsets", np.uint8) for name in _TEXTS}
    hashes: list[np.ndarray[Any, Any]] = []
    n = 0
    total = len(passages) if isinstance(passages, Sized) else None
    with tqdm(total=total, desc="tokenise", unit=" passages", disable=not progress) as bar:
        for batch in _batches(passages):
            for row, passage in enumerate(batch, n):
                if not isinstance(passage, Passage):
                    raise ValueError(
                        f"passages: row {row}: expected a Passage (read_passages makes them), got "
                        f"{type(passage).__name__}"
                    )
                for name in ("id", "title", "text"):
                    if not isinstance(value := getattr(passage, name), str):
                        raise ValueError(
                            f"passages: row {row}: {name}: expected text, got "
                            f"{type(value).__name__}"
                        )
                if not passage.text.strip():
                    raise ValueError(
                        f"passages: row {row} (id {shown(passage.id)}): expected text, got an "
                        f"empty one"
                    )
            for name, ids in encode(batch).items():
                tokens[name].extend(ids)
            blobs["ids"].extend([passage.id.encode("utf-8") for passage in batch])
            blobs["titles"].extend([passage.title.encode("utf-8") for passage in batch])
            blobs["texts"].extend([passage.text.encode("utf-8") for passage in batch])
            hashes.append(np.array([_id_hash(passage.id) for passage in batch], dtype=np.uint64))
            n += len(batch)
            bar.update(len(batch))
    if n == 0:
        raise ValueError("passages: expected at least one passage, got an empty corpus")
    both = np.concatenate(hashes)
    order = np.lexsort((both[:, 1], both[:, 0]))
    ordered = both[order]
    same = (ordered[1:] == ordered[:-1]).all(axis=1).nonzero()[0]
    if same.size:
        first, again = sorted((int(order[same[0]]), int(order[same[0] + 1])))
        raise ValueError(f"passages: expected unique ids, got rows {first} and {again} with one id")
    sink.stream("id_hashes", np.uint64).append(np.ascontiguousarray(ordered[:, 0]))
    sink.stream("id_rows", np.int64).append(order.astype(np.int64))
    return {"n": n, "longest": {name: tokens[name].longest for name in STREAMS}}


def _record(manifest: dict[str, Any], written: Mapping[str, Any]) -> None:
    manifest["n"] = written["n"]
    for name in STREAMS:
        manifest["streams"][name]["longest"] = written["longest"][name]


def _batches(passages: Iterable[Passage]) -> Iterator[list[Passage]]:
    iterator = iter(passages)
    while batch := list(itertools.islice(iterator, _BATCH)):
        yield batch


def _id_hash(id: str) -> tuple[int, int]:
    digest = hashlib.blake2b(id.encode("utf-8"), digest_size=16).digest()
    return int.from_bytes(digest[:8], "little"), int.from_bytes(digest[8:], "little")


def _check_stream(stream: str) -> None:
    if stream not in STREAMS:
        raise ValueError(f"stream: expected one of {list(STREAMS)}, got {shown(stream)}")


def _check_arrays(
    path: Path, manifest: Mapping[str, Any], arrays: Mapping[str, np.ndarray[Any, Any]]
) -> None:
    """Raise ValueError unless dtypes and lengths agree: N + 1 offsets that end with their data."""
    n = int(manifest["n"])
    pairs: list[tuple[str, str, Any]]
    pairs = [(f"{name}_tokens", f"{name}_offsets", np.int32) for name in STREAMS]
    pairs += [(f"{name}_bytes", f"{name}_offsets", np.uint8) for name in _TEXTS]
    expected: dict[str, tuple[Any, int | None]] = {
        "id_hashes": (np.uint64, n),
        "id_rows": (np.int64, n),
    }
    for flat, offsets, dtype in pairs:
        expected |= {flat: (dtype, None), offsets: (np.int64, n + 1)}
    for name, (dtype, length) in expected.items():
        found = entry_of(arrays, name, path, FORMAT)
        fits = found.ndim == 1 and length in (None, len(found))
        if found.dtype != dtype or not fits:
            raise ValueError(
                f"{path / name}.npy: expected {np.dtype(dtype)} [{length or 'n'}], got "
                f"{found.dtype} {list(found.shape)}"
            )
    for flat, offsets, _ in pairs:
        end = int(arrays[offsets][-1])
        if end != len(arrays[flat]):
            raise ValueError(
                f"{path / offsets}.npy: expected {n + 1} offsets up to {len(arrays[flat])}, got "
                f"{n + 1} up to {end}"
            )
