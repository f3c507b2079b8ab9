"""Ctrl-C and kill: finish the step, write a checkpoint, then stop.

The first SIGINT or SIGTERM only sets a flag, which the trainer reads after each optimiser step; a
second one raises KeyboardInterrupt at once.
"""

from __future__ import annotations

import os
import signal
import threading
from types import FrameType, TracebackType
from typing import Any

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

AGREE_EVERY = 8
SIGNALS = (signal.SIGINT, signal.SIGTERM)


class TrainingInterrupted(KeyboardInterrupt):
    """Report that a signal ended `RagTrainer.train`, when its checkpoint is on disk.

    This is a KeyboardInterrupt, so a script that does not handle it stops as after any Ctrl-C.

    Args:
        signum: the signal that came.
        step: optimiser steps done.
        checkpoint: folder to resume from; None if nothing could be saved.

    Example:
        >>> error = TrainingInterrupted(15, 120, "runs/x/checkpoint-120")
        >>> error.exit_code
        143
        >>> print(error)
        interrupted by SIGTERM after step 120; resume from runs/x/checkpoint-120
    """

    def __init__(self, signum: int, step: int, checkpoint: str | None) -> None:
        self.signum = signum
        self.step = step
        self.checkpoint = checkpoint
        where = f"; resume from {checkpoint}" if checkpoint else "; nothing was saved"
        super().__init__(f"interrupted by {signal.Signals(signum).name} after step {step}{where}")

    @property
    def exit_code(self) -> int:
        """Exit status that a shell expects, 128 + signal number."""
        return 128 + self.signum


class SignalGuard:
    """Turn the first SIGINT or SIGTERM inside its `with` block into a flag.

    Outside the main thread, where Python allows no handlers, it does nothing.

    Example:
        >>> with SignalGuard() as guard:
        ...     guard.received is None
        True
    """

    def __init__(self) -> None:
        self.received: int | None = None
        self._process = os.getpid()
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> SignalGuard:
        if threading.current_thread() is threading.main_thread():
            for signum in SIGNALS:
                self._previous[signum] = signal.signal(signum, self._handle)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for signum, handler in self._previous.items():
            signal.signal(signum, handler)
        self._previous.clear()

    def _handle(self, signum: int, frame: FrameType | None) -> None:
        if os.getpid() != self._process:
            return  # a data loader's worker, forked with this handler: the trainer ends it
        if self.received is not None:
            raise KeyboardInterrupt
        self.received = signum
        name = signal.Signals(signum).name
        # os.write: the handler may interrupt a write to a buffered stream
        os.write(2, f"\n{name}: finishing this step and saving; again stops at once\n".encode())


class SignalCallback(TrainerCallback):
    """End training after the current step, with a checkpoint, once a signal has come.

    Several ranks have to stop at the same step, whichever of them was signalled: they agree on it
    every eighth step, since asking at each would make the host wait for the device.

    Args:
        guard: the guard that holds the signal.
    """

    def __init__(self, guard: SignalGuard) -> None:
        self.guard = guard

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> TrainerControl:
        """Ask for a log line, a checkpoint and the end of training; no evaluation."""
        if args.world_size > 1:
            stops = state.global_step % AGREE_EVERY == 0 and self._agree(args.device)
        else:
            stops = self.guard.received is not None
        if stops:
            control.should_log = True
            control.should_save = True
            control.should_evaluate = False
            control.should_training_stop = True
        return control

    def _agree(self, device: torch.device) -> bool:
        signum = torch.tensor(self.guard.received or 0, device=device)
        torch.distributed.all_reduce(signum, torch.distributed.ReduceOp.MAX)
        agreed = int(signum)
        if agreed:
            self.guard.received = agreed
        return agreed != 0
