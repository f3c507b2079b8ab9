"""PassageStore: the memory-mapped corpus as token ids in both vocabularies."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import numpy as np
import torch

from fastrag import manifests
from fastrag.data.readers import Passage
from fastrag.data.templates import Template, stream_fingerprint
from fastrag.index.inputs import usable_device
from fastrag.index.passage_writer import (
    BLOCK_ROWS,
    STREAMS,
    TEXTS,
    MemorySink,
    Stream,
    Texts,
    check_same_texts,
    id_hash,
    write_passages,
)
from fastrag.index.storage import (
    as_tensor,
    entry_of,
    read_folder,
    write_folder,
)
from fastrag.index.unfinished import ResumableWriter
from fastrag.manifests import integer, optional, record, table, text
from fastrag.messages import shown
from fastrag.ops import backends, checks

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from fastrag.data.processor import RagProcessor

FORMAT = "fastrag.PassageStore"
VERSION = 1
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
        self.ids: Sequence[str] = Texts(arrays, "ids")
        self._titles, self._bodies = Texts(arrays, "titles"), Texts(arrays, "texts")

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
        block_size: int = BLOCK_ROWS,
        progress: bool = False,
    ) -> Self:
        """Tokenise a corpus; with `dir`, in bounded memory.

        A build into a folder that is interrupted or killed continues after its last finished block
        when it is called again with the same settings. The passages of the finished blocks are read
        again and compared. The result is the same, byte for byte.

        Args:
            passages: any iterable, read once. If it has a length, or a hint of one, the progress
                bar shows the time left.
            processor: tokenizers, template, prefix and length.
            dir: write the store to this folder block by block and map it; `None`: keep it in
                memory.
            origin: description of the origin of the passages, by name; saved as `origin`.
            block_size: passages per block, which is what a kill can lose.
            progress: show a progress bar.

        Raises:
            ValueError: no passages, an empty text, an id that occurs twice (the message names both
                rows), a length that leaves no room for text, a folder that cannot be written, or
                an unfinished build of other passages or settings. An older store in the folder
                stays, and finished blocks are kept for the next build.
        """
        manifest: dict[str, Any] = {
            "template": processor.template.to_dict(),
            "streams": processor.streams(),
            "origin": dict(origin or {}),
        }
        if dir is None:
            sink = MemorySink()
            _record(manifest, write_passages(passages, processor, sink, block_size, progress))
            return cls(manifest, sink.arrays())
        task = cls.task(processor)
        with ResumableWriter(dir, format=FORMAT, version=VERSION, task=task) as writer:
            _record(manifest, write_passages(passages, processor, writer, block_size, progress))
            writer.commit(manifest)
        return cls.load(dir)

    @staticmethod
    def task(processor: RagProcessor) -> dict[str, str]:
        """Return the settings on which the token ids of a build depend, as texts by name."""
        streams = {f"{name} stream": json.dumps(processor.streams()[name]) for name in STREAMS}
        return {**streams, "template": json.dumps(processor.template.to_dict())}

    def check_same(self, passages: Iterable[Passage], progress: bool = False) -> None:
        """Check that passages are those of this store: ids, titles and texts, in the same order.

        Args:
            passages: any iterable, read once.
            progress: show a progress bar.

        Raises:
            ValueError: the first row that differs is named.
        """
        given = iter(passages)
        check_same_texts(self._arrays, len(self), given, complete=True, progress=progress)

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
        wanted = np.uint64(id_hash(id)[0])
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

    def lengths(self, stream: Stream, rows: torch.Tensor | None = None) -> torch.Tensor:
        """Return the number of tokens of passages, `[n]` int64, on the CPU.

        Args:
            stream: `"encoder"` or `"generator"`.
            rows: rows of the store, `[n]` int64 on the CPU; `None`: all.
        """
        _check_stream(stream)
        offsets = self._arrays[f"{stream}_offsets"]
        if rows is None:
            return as_tensor(np.diff(offsets))
        return as_tensor(offsets[rows.numpy() + 1] - offsets[rows.numpy()])

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


def _record(manifest: dict[str, Any], written: Mapping[str, Any]) -> None:
    manifest["n"] = written["n"]
    for name in STREAMS:
        manifest["streams"][name]["longest"] = written["longest"][name]


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
    pairs += [(f"{name}_bytes", f"{name}_offsets", np.uint8) for name in TEXTS]
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
