"""Statistics of retrieval and generation over the steps since the last log line.

    prior entropy      H(p(z|x))          log K: the retriever does not choose; 0: it has decided
    posterior entropy  H(p(z|x,y))
    KL                 KL(p(z|x,y) || p(z|x)): what the retriever can learn from the answer

The sums stay on the device. `summary` alone reads them, once per log line, over all ranks.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from fastrag.ops.positions import IGNORE_INDEX
from fastrag.train.batches import ResumableCollator

if TYPE_CHECKING:
    from accelerate import Accelerator


class StepStatistics:
    """Accumulate the statistics of training steps between two log lines.

    Example:
        >>> statistics = StepStatistics()
        >>> scores, posterior = torch.zeros(1, 2), torch.full((1, 2), 0.5).log()
        >>> statistics.add({"doc_scores": scores, "rows": torch.tensor([[3, 4]]),
        ...                 "log_posterior": posterior}, torch.tensor([[5, 1]]))
        >>> summary = statistics.summary()
        >>> round(summary["prior_entropy"], 4), summary["unique_passages"], summary["kl"]
        (0.6931, 2, 0.0)
    """

    def __init__(self) -> None:
        self._clock = time.perf_counter
        self._reset()

    def _reset(self) -> None:
        self._sums: Tensor | None = None
        self._rows: list[Tensor] = []
        self._host = dict.fromkeys(("retrieval", "cut", "passages", "kept", "dropped"), 0.0)
        self._pruned = 0  # forward passes that were
        self._steps = 0
        self._seconds = 0.0
        self._started: float | None = None
        self.retriever_lr: float | None = None

    def start_step(self) -> None:
        """Start the clock of a step; time between steps (evaluation, saving) does not count."""
        self._started = self._clock()

    def end_step(self) -> None:
        """Stop the clock of a step."""
        if self._started is not None:
            self._seconds += self._clock() - self._started
            self._started = None
        self._steps += 1

    def add(self, outputs: Any, labels: Tensor | None, retrieval_seconds: float = 0.0) -> None:
        """Add the outputs of one forward pass.

        Args:
            outputs: a mapping with `doc_scores` [B, K], `rows` [B, K], `log_posterior` [B, K] or
                [B, K, T], and optionally `n_cut`, `n_kept` and `dropped`.
            labels: label ids, `[B, T]`.
            retrieval_seconds: time that the search took.
        """
        scores, log_posterior = outputs["doc_scores"], outputs["log_posterior"]
        rows = outputs["rows"]
        with torch.no_grad():
            sums = _sums(scores.detach(), log_posterior.detach(), labels)
            self._sums = sums if self._sums is None else self._sums + sums
            self._rows.append(rows.detach())
        self._host["passages"] += rows.numel()
        self._host["retrieval"] += retrieval_seconds
        n_cut = outputs.get("n_cut")
        if n_cut is not None:
            self._host["cut"] = self._host["cut"] + n_cut
        n_kept = outputs.get("n_kept")
        if n_kept is not None:
            self._host["kept"] = self._host["kept"] + n_kept
            self._host["dropped"] = self._host["dropped"] + outputs["dropped"]
            self._pruned += 1

    def summary(self, accelerator: Accelerator | None = None) -> dict[str, float]:
        """Return the figures since the last call and reset them.

        Args:
            accelerator: adds up the ranks of a distributed run, each of which has to call this.

        Returns:
            `prior_entropy`, `posterior_entropy`, `kl` (nats, per question or label token),
            `unique_passages`, `top_passage` (share of the questions that retrieved the most
            retrieved passage), `passages_cut` (share), `retrieval_ms` (per step),
            `tokens_per_second` (label tokens times passages) and `steps_per_second`; empty when
            nothing was added. If contexts were pruned, also `passages_read` (share that the
            generator read with gradient) and `posterior_dropped` (of the others).
        """
        if self._sums is None:
            self._reset()
            return {}
        host = self._sums.new_tensor([float(each) for each in self._host.values()])
        sums = torch.cat([self._sums, host])
        rows = torch.cat([rows.reshape(-1) for rows in self._rows])
        unique, counts = rows[rows >= 0].unique(return_counts=True)
        ranks = 1
        if accelerator is not None and accelerator.num_processes > 1:
            ranks = accelerator.num_processes
            sums = accelerator.reduce(sums)
            both = torch.stack([unique, counts], 1)
            both = accelerator.gather(accelerator.pad_across_processes(both, pad_index=-1))
            both = both[both[:, 0] >= 0]
            unique, where = both[:, 0].unique(return_inverse=True)
            counts = torch.zeros_like(unique).index_add(0, where, both[:, 1])
        prior, questions, posterior, kl, weight, tokens, *host_sums = sums.tolist()
        retrieval, cut, passages, kept, dropped = host_sums
        result = {
            "prior_entropy": prior / max(questions, 1.0),
            "posterior_entropy": posterior / max(weight, 1.0),
            "kl": kl / max(weight, 1.0),
            "unique_passages": len(unique),
            "top_passage": float(counts.max()) / max(questions, 1.0) if len(counts) else 0.0,
            "passages_cut": cut / max(passages, 1.0),
        }
        if self._pruned:
            result["passages_read"] = kept / max(passages, 1.0)
            result["posterior_dropped"] = dropped / (ranks * self._pruned)
        if self.retriever_lr is not None:
            result["retriever_lr"] = self.retriever_lr
        if self._steps:
            result["retrieval_ms"] = 1e3 * retrieval / (ranks * self._steps)
        if self._seconds > 0.0:
            result["tokens_per_second"] = tokens / self._seconds
            result["steps_per_second"] = self._steps / self._seconds
        self._reset()
        return result


class StepClockCallback(TrainerCallback):
    """Record times and learning rates in StepStatistics, and set the epoch of the collator.

    Args:
        statistics: the statistics.
        collator: its `epoch` is set at the start of each epoch.
    """

    def __init__(self, statistics: StepStatistics, collator: ResumableCollator) -> None:
        self.statistics = statistics
        self.collator = collator

    def on_epoch_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Set the epoch of the collator."""
        self.collator.epoch = int(state.epoch or 0)

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Start the clock."""
        self.statistics.start_step()

    def on_optimizer_step(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        optimizer: Any = None,
        **kwargs: Any,
    ) -> None:
        """Record the retriever's learning rate before the schedule changes it."""
        for group in optimizer.param_groups:
            if group.get("part") == "retriever":
                self.statistics.retriever_lr = group["lr"]

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Stop the clock."""
        self.statistics.end_step()


def _sums(scores: Tensor, log_posterior: Tensor, labels: Tensor | None) -> Tensor:
    """Sum over the batch: prior entropy, questions, posterior entropy, KL, weights, tokens."""
    scores = scores.float()
    found = torch.isfinite(scores)
    some = found.any(dim=1)  # [B]
    log_prior = torch.log_softmax(scores.masked_fill(~found, -1e30), dim=1)  # [B, K]
    prior = log_prior.exp() * found
    prior_entropy = -(prior * log_prior).sum(dim=1) * some
    if log_posterior.dim() == 3:
        log_prior = log_prior.unsqueeze(2)
        weight = some.unsqueeze(1).expand(-1, log_posterior.shape[2]).float()  # [B, T]
        if labels is not None:
            weight = weight * labels.ne(IGNORE_INDEX)
    else:
        weight = some.float()  # [B]
    finite = torch.isfinite(log_posterior)
    log_w = log_posterior.float().masked_fill(~finite, 0.0)
    w = log_w.exp() * finite
    posterior_entropy = -(w * log_w).sum(dim=1) * weight
    kl = (w * (log_w - log_prior.masked_fill(log_prior < -1e29, 0.0))).sum(dim=1) * weight
    tokens = scores.new_zeros(()) if labels is None else labels.ne(IGNORE_INDEX).sum().float()
    return torch.stack(
        [
            prior_entropy.sum(),
            some.sum().float(),
            posterior_entropy.sum(),
            kl.sum(),
            weight.sum(),
            tokens * scores.shape[1],
        ]
    )
