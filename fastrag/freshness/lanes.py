"""Where passages are encoded: at once, or on a stream of their own under the next step.

A lane takes rows together with the passage encoder, and hands back vectors with the number of
optimiser steps of the weights that made them. It holds at most one job.
"""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from fastrag.index.encoding import PassageEncoder, encode_passages, encoder_inputs
from fastrag.profiling import stage

if TYPE_CHECKING:
    from fastrag.index.passages import PassageStore


class Encoded(NamedTuple):
    """Fresh vectors.

    Attributes:
        rows: `[n]` int64; None: all rows of the index.
        vectors: `[n, D]` float32.
        step: number of optimiser steps of the weights that made them.
    """

    rows: Tensor | None
    vectors: Tensor
    step: int


class Lane(Protocol):
    """Interface of a place where passages are encoded."""

    def submit(self, encoder: Any, rows: Tensor | None, step: int) -> None:
        """Begin to encode rows `[n]` (None: all) with the present weights of an encoder."""

    def collect(self, *, wait: bool) -> Encoded | None:
        """Return the finished job, if there is one; `wait`: also one that is under way."""

    @property
    def busy(self) -> bool:
        """Whether a job is under way."""

    def close(self) -> None:
        """Give up the job and release what the lane holds."""


class InlineLane:
    """Encode at once, in the training process.

    Args:
        passages: the passages.
        batch_size: passages per forward pass.
        dim: width that the vectors must have.
    """

    def __init__(self, passages: PassageStore, batch_size: int, dim: int) -> None:
        self.passages = passages
        self.batch_size = batch_size
        self.dim = dim
        self._done: Encoded | None = None

    def submit(self, encoder: Any, rows: Tensor | None, step: int) -> None:
        """Encode."""
        vectors = encode_passages(encoder, self.passages, self.batch_size, rows=rows, dim=self.dim)
        self._done = Encoded(rows, vectors, step)

    def collect(self, *, wait: bool = False) -> Encoded | None:
        """Return the job."""
        done, self._done = self._done, None
        return done

    @property
    def busy(self) -> bool:
        """Whether a job is under way: never."""
        return False

    def close(self) -> None:
        """Do nothing."""


class StreamLane:
    """Encode on a stream of its own, while the next training step runs.

    The weights are copied first, on the training stream's side of the optimiser step, so the next
    step may change them at once. Batches are sent without waiting for the device. The job is
    collected in the next step, hence the result does not depend on timing.

    Args:
        passages: the passages.
        batch_size: passages per forward pass.
        dim: width that the vectors must have.
        device: device of the encoder.
    """

    def __init__(
        self, passages: PassageStore, batch_size: int, dim: int, device: torch.device
    ) -> None:
        self.passages = passages
        self.batch_size = batch_size
        self.dim = dim
        self.device = device
        self._streams: Any = torch.get_device_module(device)
        # the stand-in for streams on the CPU knows no device
        self._stream = self._streams.Stream(*([device] if device.type == "cuda" else []))
        self._twin: nn.Module | None = None
        self._of: nn.Module | None = None
        self._job: tuple[Tensor | None, list[Tensor], list[Tensor], Any, int] | None = None

    def submit(self, encoder: Any, rows: Tensor | None, step: int) -> None:
        """Copy the weights and send all batches to the stream."""
        rows_ = torch.arange(len(self.passages)) if rows is None else rows.cpu()
        order = self.passages.lengths("encoder", rows_).argsort(descending=True, stable=True)
        twin = self._copy_of(encoder)
        training = self._streams.current_stream(self.device)
        batches = list(order.split(self.batch_size))
        vectors = []
        with self._streams.stream(self._stream), torch.no_grad():
            # before the stream waits for anything: a copy from the host blocks until it is done
            inputs = [
                encoder_inputs(self.passages, rows_[each].to(self.passages.device), self.device)
                for each in batches
            ]
            self._stream.wait_stream(training)
            copy_weights(encoder, twin)
            copied = self._event()
            with stage("refresh/encode"):
                for ids, mask in inputs:
                    vectors.append(twin(ids, mask).float())
                    _check_shape(vectors[-1], len(ids), self.dim)
            done = self._event()
        training.wait_event(copied)
        self._job = (rows, batches, vectors, done, step)

    def collect(self, *, wait: bool = False) -> Encoded | None:
        """Wait for the job and return the vectors on the CPU."""
        if self._job is None:
            return None
        (rows, batches, vectors, finished, step), self._job = self._job, None
        finished.synchronize()
        out = torch.empty(sum(map(len, batches)), self.dim)
        for batch, each in zip(batches, vectors, strict=True):
            out[batch] = each.cpu()
        return Encoded(rows, out, step)

    @property
    def busy(self) -> bool:
        """Whether a job is under way."""
        return self._job is not None

    def close(self) -> None:
        """Forget the job."""
        self._job = None

    def _event(self) -> Any:
        event = self._streams.Event()
        event.record(self._stream)
        return event

    def _copy_of(self, encoder: nn.Module) -> nn.Module:
        if self._twin is None or self._of is not encoder:
            self._twin, self._of = eval_copy(encoder), encoder
        return self._twin


def lane_of(
    passages: PassageStore, batch_size: int, dim: int, encoder: PassageEncoder | None
) -> InlineLane | StreamLane:
    """Return the lane for an encoder: a stream of its own on CUDA."""
    parameters = encoder.parameters() if isinstance(encoder, nn.Module) else iter(())
    device = next((each.device for each in parameters), torch.device("cpu"))
    if device.type == "cuda":
        return StreamLane(passages, batch_size, dim, device)
    return InlineLane(passages, batch_size, dim)


def eval_copy(encoder: nn.Module) -> nn.Module:
    """Return a copy of an encoder in eval mode, without gradients."""
    made = copy.deepcopy(encoder).eval()
    return made.requires_grad_(False)


def stochastic(encoder: Any) -> bool:
    """Return whether a training pass of an encoder gives other vectors than an eval pass.

    It does with active dropout and with normalisation over the batch. Dropout that is no module
    (`F.dropout` in an attention) is found by its rate in the configuration of a transformers model.
    """
    if not isinstance(encoder, nn.Module) or not encoder.training:
        return False
    configs = {}
    for module in filter(lambda each: each.training, encoder.modules()):
        if isinstance(module, nn.modules.dropout._DropoutNd) and module.p > 0.0:
            return True
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            return True
        config = getattr(module, "config", None)
        if hasattr(config, "model_type"):
            configs[id(config)] = config  # layers share that of the model
    return any(
        isinstance(rate, float) and rate > 0.0 and "classif" not in name
        for config in configs.values()
        for name, rate in vars(config).items()
        if "dropout" in name or "layerdrop" in name
    )


@torch.no_grad()
def copy_weights(encoder: nn.Module, twin: nn.Module) -> None:
    """Copy parameters and buffers into a twin."""
    theirs = [*encoder.parameters(), *encoder.buffers()]
    ours = [*twin.parameters(), *twin.buffers()]
    torch._foreach_copy_(ours, theirs)


def _check_shape(vectors: Tensor, n: int, dim: int) -> None:
    if vectors.shape != (n, dim):
        raise ValueError(
            f"encoder: expected vectors of the index's width {dim}, [{n}, {dim}], got "
            f"{list(vectors.shape)}"
        )
