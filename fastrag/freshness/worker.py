"""WorkerLane: passages are encoded by another process, for machines with a device to spare.

    training process                      worker
    copy weights into shared memory
    send rows                  ->         encode with these weights, in eval mode
    train on, search the old vectors      send vectors, block by block
    write all of them at once  <-

Nobody waits: a step that finds no finished job goes on. A job is written whole or not at all. If
the worker dies, its job is lost, the index stays as it is, and the next job starts another one.
"""

from __future__ import annotations

import copy
import signal
import warnings
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, multiprocessing, nn

from fastrag.freshness.lanes import Encoded, copy_weights, eval_copy
from fastrag.index.encoding import encode_passages

if TYPE_CHECKING:
    from multiprocessing.connection import Connection

    from fastrag.index.passages import PassageStore

BLOCK_ROWS = 4096  # of a message; a few megabytes
MAX_DEATHS = 3  # in a row, after which a worker is not started again
_POLL_SECONDS = 0.05


class WorkerLane:
    """Encode in another process.

    The process is spawned at the first job, so a script that trains needs the usual
    `if __name__ == "__main__":`. It ends with the training process.

    Args:
        passages: the passages. Files that are mapped here are mapped there.
        batch_size: passages per forward pass.
        dim: width that the vectors must have.
        device: device of the worker, such as `"cuda:1"` or `"cpu"`.
    """

    def __init__(
        self, passages: PassageStore, batch_size: int, dim: int, device: torch.device
    ) -> None:
        self.passages = passages
        self.batch_size = batch_size
        self.dim = dim
        self.device = device
        self._twin: nn.Module | None = None
        self._of: Any = None
        self._process: Any = None
        self._connection: Connection | None = None
        self._job: tuple[Tensor | None, int] | None = None
        self._blocks: list[Tensor] = []
        self._deaths = 0

    @property
    def busy(self) -> bool:
        """Whether a job is under way."""
        return self._job is not None

    def submit(self, encoder: Any, rows: Tensor | None, step: int) -> None:
        """Copy the weights and send the job.

        Raises:
            ValueError: the encoder is no module, or cannot be sent to another process.
            RuntimeError: the worker died several times in a row.
        """
        if not isinstance(encoder, nn.Module):
            raise ValueError(f"encoder: expected a module, got {type(encoder).__name__}")
        if self._twin is None or self._of is not encoder:
            self.close()
            self._twin, self._of = eval_copy(encoder).cpu().share_memory(), encoder
        copy_weights(encoder, self._twin)
        self._start()
        try:
            self._send(None if rows is None else rows.cpu().numpy())
        except OSError:
            self._died()
            return
        self._job, self._blocks = (rows, step), []

    def collect(self, *, wait: bool = False) -> Encoded | None:
        """Return the finished job, if there is one.

        Raises:
            RuntimeError: encoding failed; the message is the worker's.
        """
        while self._job is not None and self._connection is not None:
            try:
                if not self._connection.poll(_POLL_SECONDS if wait else 0.0):
                    if self._process is not None and not self._process.is_alive():
                        raise EOFError
                    if not wait:
                        return None
                    continue
                kind, content = self._connection.recv()
            except (EOFError, OSError):
                self._died()
                return None
            if kind == "vectors":
                self._blocks.append(torch.from_numpy(content))
                continue
            (rows, step), self._job = self._job, None
            blocks, self._blocks = self._blocks, []
            if kind == "failed":
                raise RuntimeError(f"worker: encoding failed: {content}")
            self._deaths = 0
            return Encoded(rows, torch.cat(blocks), step)
        return None

    def close(self) -> None:
        """End the worker; a job under way is lost."""
        if self._connection is not None:
            self._connection.close()
        if self._process is not None:
            self._process.kill()
            self._process.join()
        self._connection = self._process = self._job = None
        self._blocks = []

    def _start(self) -> None:
        if self._process is not None and self._process.is_alive():
            return
        if self._process is not None:
            self._died()
        if self._deaths >= MAX_DEATHS:
            raise RuntimeError(
                f"worker: expected a process that encodes passages on {self.device}, but it died "
                f"{self._deaths} times in a row"
            )
        context = multiprocessing.get_context("spawn")
        self._connection, theirs = context.Pipe()
        given = (theirs, self._twin, self.passages.handle(), self.batch_size, self.dim, self.device)
        self._process = context.Process(target=_main, args=given, daemon=True)
        try:
            self._process.start()
        except (TypeError, AttributeError, ValueError) as error:  # what pickle raises
            self._process = None
            self.close()
            raise ValueError(
                f"encoder: expected one that can be sent to another process: {error}"
            ) from error
        finally:
            theirs.close()

    def _send(self, message: Any) -> None:
        if self._connection is not None:
            self._connection.send(message)

    def _died(self) -> None:
        """Forget a dead worker and its job."""
        self._deaths += 1
        code = getattr(self._process, "exitcode", None)
        self.close()
        warnings.warn(
            f"the worker that encodes passages died (exit code {code}); its job is lost and the "
            "index is unchanged; the next job starts another one",
            stacklevel=3,
        )


def serve(
    connection: Connection,
    twin: nn.Module,
    passages: PassageStore,
    batch_size: int,
    dim: int,
    device: torch.device,
) -> None:
    """Encode the rows that come over a connection until it is closed.

    Args:
        connection: of the training process.
        twin: the encoder in shared memory, whose weights change between jobs.
        passages: the passages.
        batch_size: passages per forward pass.
        dim: width that the vectors must have.
        device: where to encode.
    """
    encoder = twin if device.type == "cpu" else copy.deepcopy(twin).to(device)
    try:
        while True:
            rows = connection.recv()
            at = torch.arange(len(passages)) if rows is None else torch.from_numpy(rows)
            try:
                if encoder is not twin:
                    copy_weights(twin, encoder)
                for block in at.split(BLOCK_ROWS):
                    vectors = encode_passages(encoder, passages, batch_size, rows=block, dim=dim)
                    connection.send(("vectors", vectors.numpy()))
                connection.send(("done", None))
            except Exception as error:
                connection.send(("failed", f"{type(error).__name__}: {error}"))
    except (EOFError, OSError):  # the training process is gone
        pass


def _main(connection: Connection, twin: nn.Module, handle: Any, *given: Any) -> None:
    from fastrag.index.passages import PassageStore

    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the training process
    if given[-1].type == "cpu":
        torch.set_num_threads(1)
    serve(connection, twin, PassageStore.from_handle(handle), *given)
