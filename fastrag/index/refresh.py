"""When stored passage vectors are encoded again, and how.

A passage encoder that trains leaves the index stale. `frozen` never refreshes (Lewis et al. 2020
train the query side only), `every:n` encodes all passages again every n steps.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

import torch

from fastrag.messages import shown
from fastrag.profiling import stage

if TYPE_CHECKING:
    from fastrag.index.passages import PassageStore


class RefreshPolicy:
    """Says at which training steps the index is rebuilt; one word in a config.

    Subclasses register under their word; `parse` is the way to make one.

    Example:
        >>> policy = RefreshPolicy.parse("every:20")
        >>> [step for step in range(61) if policy.due(step)]
        [20, 40, 60]
        >>> str(policy)
        'every:20'
    """

    word: ClassVar[str] = ""
    usage: ClassVar[str] = ""
    _policies: ClassVar[dict[str, type[RefreshPolicy]]] = {}

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        RefreshPolicy._policies[cls.word] = cls

    @staticmethod
    def parse(text: str | RefreshPolicy) -> RefreshPolicy:
        """Reads a policy.

        Args:
            text: `"frozen"` or `"every:n"`; a policy is returned as it is.

        Raises:
            ValueError: another word or a bad number; the message lists the words that stand.
        """
        if isinstance(text, RefreshPolicy):
            return text
        word, colon, argument = str(text).strip().partition(":")
        policy = RefreshPolicy._policies.get(word)
        made = policy.from_argument(argument if colon else None) if policy else None
        if made is None:
            words = ", ".join(repr(known.usage) for known in RefreshPolicy._policies.values())
            raise ValueError(f"refresh: expected one of {words}, got {shown(text)}")
        return made

    @classmethod
    def from_argument(cls, argument: str | None) -> RefreshPolicy | None:
        """Makes the policy from what follows the colon; `None` when that does not fit."""
        raise NotImplementedError

    def due(self, step: int) -> bool:
        """Whether the index is to be rebuilt after this many finished steps."""
        raise NotImplementedError

    def __eq__(self, other: object) -> bool:
        return isinstance(other, RefreshPolicy) and str(self) == str(other)

    def __hash__(self) -> int:
        return hash(str(self))

    def __repr__(self) -> str:
        return f"RefreshPolicy.parse({str(self)!r})"


class Frozen(RefreshPolicy):
    """Never refreshes: the passage encoder does not train."""

    word = "frozen"
    usage = "frozen"

    @classmethod
    def from_argument(cls, argument: str | None) -> Frozen | None:
        """`frozen` takes no argument."""
        return cls() if argument is None else None

    def due(self, step: int) -> bool:
        """Never."""
        return False

    def __str__(self) -> str:
        return self.word


class Every(RefreshPolicy):
    """Rebuilds the whole index every n steps, while training waits.

    Args:
        n: number of steps, at least 1.
    """

    word = "every"
    usage = "every:n"

    def __init__(self, n: int) -> None:
        if n < 1:
            raise ValueError(f"n: expected at least 1 step, got {n}")
        self.n = n

    @classmethod
    def from_argument(cls, argument: str | None) -> Every | None:
        """`every:n` takes a whole number of at least 1."""
        if argument is None or not re.fullmatch(r"[1-9][0-9]*", argument):
            return None
        return cls(int(argument))

    def due(self, step: int) -> bool:
        """At every n-th step, not at step 0."""
        return step > 0 and step % self.n == 0

    def __str__(self) -> str:
        return f"{self.word}:{self.n}"


class PassageEncoder(Protocol):
    """What `encode_passages` needs of an encoder; `fastrag.nn.TextEncoder` is one."""

    training: bool

    def __call__(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor: ...

    def eval(self) -> Any: ...

    def train(self, mode: bool = True) -> Any: ...


@torch.no_grad()
def encode_passages(
    encoder: PassageEncoder,
    store: PassageStore,
    batch_size: int = 256,
    device: torch.device | str | None = None,
    progress: bool = False,
    *,
    rows: torch.Tensor | None = None,
    on_batch: Callable[[int], None] | None = None,
) -> torch.Tensor:
    """Encodes the store's passages with the encoder in eval mode and without gradients.

    Batches hold passages of like length, so little is spent on padding; the encoder's training
    mode, and that of each of its parts, is as before afterwards, also when it raises.

    Args:
        encoder: maps `input_ids`, `attention_mask` `[B, L]` to `[B, D]`.
        store: the passages; stream `"encoder"`.
        batch_size: passages per forward pass.
        device: where the encoder runs; `None`: where its parameters are, else the CPU.
        progress: show a progress bar.
        rows: encode these rows `[n]` only, in this order; `None`: all.
        on_batch: called with the number of passages after each batch.

    Returns:
        `[n, D]` fp32 on the CPU, in the order of the rows.

    Raises:
        ValueError: `batch_size` below 1, an empty store, or an encoder that returns another shape.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size: expected at least 1, got {batch_size}")
    rows = torch.arange(len(store)) if rows is None else rows.to("cpu", torch.int64)
    if rows.ndim != 1 or rows.numel() == 0:
        raise ValueError(f"rows: expected [n] with n > 0, got {list(rows.shape)}")
    device = _device_of(encoder) if device is None else torch.device(device)
    order = store.lengths("encoder")[rows].argsort(descending=True, stable=True)
    training = encoder.training
    # A user may hold parts of a training encoder in eval mode.
    parts = encoder.modules() if isinstance(encoder, torch.nn.Module) else ()
    modes = {part: part.training for part in parts}
    encoder.eval()
    out: torch.Tensor | None = None
    bar = _progress_bar(len(rows), progress)
    try:
        for batch in order.split(batch_size):
            with stage("refresh/gather"):
                ids, lengths = store.gather(rows[batch].to(store.device), "encoder")
                ids, lengths = ids.to(device), lengths.to(device)
                mask = torch.arange(ids.shape[-1], device=device)[None, :] < lengths[:, None]
            with stage("refresh/encode"):
                vectors = encoder(ids, mask.to(torch.int64)).float().cpu()
            if vectors.ndim != 2 or vectors.shape[0] != len(batch):
                raise ValueError(f"encoder: expected [{len(batch)}, D], got {list(vectors.shape)}")
            if out is None:
                out = torch.empty(len(rows), vectors.shape[1], dtype=torch.float32)
            out[batch] = vectors
            bar.update(len(batch))
            if on_batch is not None:
                on_batch(len(batch))
    finally:
        bar.close()
        encoder.train(training)
        for part, mode in modes.items():
            part.training = mode
    if out is None:
        raise ValueError("rows: expected at least one passage, got none")
    return out


def _device_of(encoder: PassageEncoder) -> torch.device:
    if isinstance(encoder, torch.nn.Module):
        for parameter in encoder.parameters():
            return parameter.device
    return torch.device("cpu")


def _progress_bar(total: int, progress: bool) -> Any:
    from tqdm.auto import tqdm

    return tqdm(total=total, desc="encode", unit=" passages", disable=not progress)
