"""Collapse of the retriever: what a run looks like when it happens, and remedies against it.

    passages   one passage is retrieved for most questions       (Lewis et al. 2020, appendix H)
    certainty  the prior has decided, and the posterior disagrees
    silence    the answer does not change the weights of the passages

A retriever that is trained by likelihood alone has these fixed points: a passage that is never
retrieved has no gradient, a prior without entropy has none either, and a generator that ignores its
contexts gives none.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

if TYPE_CHECKING:
    from fastrag.nn import RagModel
    from fastrag.nn.retriever import Retriever

# Largest share of a window's questions that may retrieve one passage. A passage that more than half
# of them retrieve answers few of them, unless most questions are about it.
MOST_SHARED = 0.5
# Fewest questions of a window to judge it by.
_FEWEST_QUESTIONS = 32
# Share of log K below which the prior has decided, and nats by which the posterior then disagrees.
_DECIDED, _DISAGREES = 0.05, 0.5
_SILENT = 1e-4  # nats between posterior and prior

REMEDIES = {
    "passages": (
        "the retriever collapses: it finds the same passages for most questions (one of them for "
        "{top_passage:.0%} of those since the last line of the log, {unique_passages} different "
        "ones in all). Remedies: loss.in_batch (.1), retriever.freeze_steps until the generator "
        "reads its contexts, retriever.explore, a smaller retriever.learning_rate, or `fastrag "
        "warmup` before the run"
    ),
    "certainty": (
        "the prior over passages has decided (entropy {prior_entropy:.3f} nats) where the answers "
        "disagree (KL {kl:.2f} nats): passages other than the first have almost no gradient. "
        "Remedies: retriever.tau_start with retriever.tau_steps, a larger retriever.tau, "
        "retriever.explore"
    ),
    "silence": (
        "the answer does not change the weights of the passages (KL {kl:.1e} nats): the generator "
        "ignores its contexts, and the retriever cannot learn from it. Remedies: "
        "retriever.freeze_steps until the generator reads them, retriever.null_passage, "
        "data.force_labelled where questions name their passages"
    ),
}


def symptoms(figures: Mapping[str, float], n_docs: int, n_questions: int) -> list[str]:
    """Return the names of the symptoms that the figures of a window show.

    Args:
        figures: `StepStatistics.summary()`.
        n_docs: K.
        n_questions: number of questions of the window.

    Returns:
        Keys of `REMEDIES`.

    Example:
        >>> figures = {"top_passage": 0.9, "unique_passages": 7, "prior_entropy": 1.0, "kl": 0.2}
        >>> symptoms(figures, n_docs=5, n_questions=100)
        ['passages']
    """
    if n_questions < _FEWEST_QUESTIONS:
        return []
    found = []
    # With few passages, any retriever returns some of them to most questions.
    if (
        figures["top_passage"] > MOST_SHARED
        and figures["unique_passages"] * 4 < n_questions * n_docs
    ):
        found.append("passages")
    if n_docs > 1:
        decided = figures["prior_entropy"] < _DECIDED * math.log(n_docs)
        if decided and figures["kl"] > _DISAGREES:
            found.append("certainty")
        if figures["kl"] < _SILENT and not decided:
            found.append("silence")
    return found


class CollapseCallback(TrainerCallback):
    """Warn, once for each symptom, if the training figures show that the retriever collapses.

    A symptom has to show in two logs in a row, and the corpus has to be larger than the passages
    that a question gets.

    Args:
        model: the model that trains.
    """

    def __init__(self, model: RagModel) -> None:
        self.retriever: Retriever = model.retriever
        self._before: set[str] = set()
        self._told: set[str] = set()
        self._step = 0

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Start to count steps, after those of a run that is resumed."""
        self._step = state.global_step

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        """Judge the figures of a training log."""
        if not logs or "top_passage" not in logs or not state.is_world_process_zero:
            return
        n_steps, self._step = state.global_step - self._step, state.global_step
        n_questions = n_steps * args.train_batch_size * args.gradient_accumulation_steps
        n_questions *= args.world_size
        n_docs = self.retriever.n_docs
        if len(self.retriever.index) < 4 * n_docs:
            return
        shown = set(symptoms(logs, n_docs, n_questions))
        for name in sorted(shown & self._before - self._told):
            warnings.warn(REMEDIES[name].format_map(logs), stacklevel=2)
            self._told.add(name)
        self._before = shown


class TemperatureCallback(TrainerCallback):
    """Lower the temperature of the prior from `start` to `end`, geometrically, over some steps.

        tau_i = start (end / start)^min(1, i / steps)

    A soft prior in the beginning gives every passage of the K a gradient.

    Args:
        retriever: its temperature is set; it must not be learned.
        start: temperature at step 0.
        end: temperature from step `steps` on.
        steps: number of steps.
    """

    def __init__(self, retriever: Retriever, start: float, end: float, steps: int) -> None:
        self.retriever = retriever
        self.start, self.end, self.steps = start, end, steps

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Set the temperature of the step."""
        done = min(1.0, state.global_step / self.steps)
        tau = self.start * (self.end / self.start) ** done
        self.retriever.set_tau(self.end if done == 1.0 else tau)


class FreezeCallback(TrainerCallback):
    """Leave the retriever as it is for some steps, while the generator learns to read contexts.

    The gradients of the retriever are dropped before the optimiser sees them, so that its moments
    start with the first step that trains.

    Args:
        steps: number of steps.
    """

    def __init__(self, steps: int) -> None:
        self.steps = steps

    def on_pre_optimizer_step(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: Any = None,
        **kwargs: Any,
    ) -> None:
        """Drop the gradients."""
        if state.global_step < self.steps:
            model = getattr(model, "module", model)  # the model inside DistributedDataParallel
            for part in (model.retriever, model.loss_fn):
                for parameter in part.parameters():
                    parameter.grad = None


def remedies(model: RagModel, settings: Mapping[str, Any]) -> list[TrainerCallback]:
    """Return the callbacks of the settings `tau_start`, `tau_steps` and `freeze_steps`."""
    made: list[TrainerCallback] = []
    if settings.get("tau_start") is not None:
        retriever = model.retriever
        made.append(
            TemperatureCallback(
                retriever, settings["tau_start"], retriever.tau_value, settings["tau_steps"]
            )
        )
    if settings.get("freeze_steps"):
        made.append(FreezeCallback(settings["freeze_steps"]))
    return made
