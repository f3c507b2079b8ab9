"""IndexRefresher: keep the vectors of an index close to a passage encoder that trains."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils.hooks import RemovableHandle

from fastrag.freshness.lanes import InlineLane, Lane, StreamLane, lane_of, stochastic
from fastrag.freshness.ledger import RowLedger
from fastrag.freshness.observations import Fresh, Observation, Observations, newest
from fastrag.freshness.policies import RefreshPolicy, View
from fastrag.freshness.running_map import RunningMap
from fastrag.freshness.staleness import (
    DriftEstimate,
    Staleness,
    age_histogram,
    drift_of,
    measure,
)
from fastrag.freshness.sweep import SweepLane
from fastrag.freshness.worker import WorkerLane
from fastrag.index.encoding import encode_passages
from fastrag.messages import shown
from fastrag.profiling import stage

if TYPE_CHECKING:
    from fastrag.index.encoding import PassageEncoder
    from fastrag.nn import RagModel
    from fastrag.nn.retrieved import Retrieved
    from fastrag.nn.retriever import Retriever

N_OVERLAP = 10  # k of the overlap in `summary`
CANDIDATES_PER_K = 4  # candidates that an overlap encodes for each of the k


@dataclass(frozen=True)
class Refresh:
    """Report of a refresh.

    Attributes:
        step: number of optimiser steps before the refresh.
        n_passages: number of passages that were encoded for it.
        version: version of the index after the refresh.
        n_written_back: number of vectors that the training step had encoded anyway.
    """

    step: int
    n_passages: int
    version: int
    n_written_back: int = 0


class IndexRefresher:
    """Encode the passages that a policy chooses, and write their vectors into the index.

    Call `step` after each optimiser step; `RefreshCallback(refresher)` does so under
    `transformers.Trainer`. All new vectors of a step become visible at once. A training step that
    has already searched keeps the vectors of the version that it searched. If encoding fails,
    index and policy are unchanged.

    Passages are encoded at once on a CPU; on CUDA on a stream of their own, while the next step
    runs, and written after it; with `worker` in another process, and written when it has finished.
    The encoder is in eval mode for it.

    Args:
        retriever: a `Retriever`, or the `RagModel` that has one.
        policy: a setting such as `"rolling:64"`, or a `RefreshPolicy`.
        batch_size: passages per forward pass of the encoder.
        samples: passages that are drawn uniformly and encoded in each step to measure staleness;
            None: as many as the policy asks for.
        worker: device of a process that encodes, such as `"cuda:1"`; None: no other process. A
            policy is asked again when the process has finished, so that a bound in steps becomes
            one in jobs.
        seed: seed of the draws.

    Raises:
        ValueError: an unknown policy, or numbers out of range.

    Example:
        >>> refresher = IndexRefresher(model, "rolling:64+map")  # doctest: +SKIP
        >>> refresher.watch()                                    # doctest: +SKIP
        >>> for step, batch in enumerate(batches, start=1):      # doctest: +SKIP
        ...     model(**batch).loss.backward()
        ...     optimizer.step()
        ...     refresher.step(step)
    """

    def __init__(
        self,
        retriever: Retriever | RagModel,
        policy: RefreshPolicy | str = "frozen",
        batch_size: int = 256,
        *,
        samples: int | None = None,
        worker: torch.device | str | None = None,
        seed: int = 0,
    ) -> None:
        if batch_size < 1:
            raise ValueError(f"batch_size: expected at least 1, got {batch_size}")
        if samples is not None and samples < 0:
            raise ValueError(f"samples: expected at least 0 or None, got {samples}")
        try:
            self.worker = None if worker is None else torch.device(worker)
        except RuntimeError as error:
            raise ValueError(f"worker: expected a device or None, got {shown(worker)}") from error
        owner: Any = retriever
        self.retriever: Retriever = getattr(owner, "retriever", owner)
        self.policy = RefreshPolicy.parse(policy)
        self.batch_size = batch_size
        self.samples = samples
        self.refreshed_at = 0
        self.ledger = RowLedger(0)
        self.estimate = DriftEstimate()
        self._observations = Observations()
        self._questions: Tensor | None = None
        self._draws = torch.Generator().manual_seed(seed)
        self._lane: Lane | None = None
        self._of: Any = None  # encoder of the lane
        self._sweep: Mapping[str, Any] | None = None  # of a loaded state, until there is a lane
        # Masks of the rows being encoded: those to be written, and those that were drawn uniformly.
        self._job: tuple[Tensor, Tensor] = (torch.empty(0), torch.empty(0))
        self._map = RunningMap()
        self._version: int | None = None

    @property
    def changing(self) -> bool:
        """Whether the policy ever changes the index."""
        return self.policy.changes_index

    @property
    def active(self) -> bool:
        """Whether steps have to be observed: the policy asks for it, or staleness is measured."""
        return self.policy.observes or bool(self.samples)

    def watch(self) -> RemovableHandle:
        """Observe every training pass of the retriever; `remove()` of the result ends it."""

        def observe(retriever: Retriever, _inputs: Any, retrieved: Retrieved) -> None:
            if retriever.training:
                self.observe(retrieved)

        return self.retriever.register_forward_hook(observe)

    def observe(self, retrieved: Retrieved) -> None:
        """Take note of a forward pass of the present step; `step` does so with `retrieved`."""
        usable = not stochastic(self.retriever.passage_encoder)
        self._observations.add(retrieved, usable=usable)

    def step(
        self,
        step: int,
        retrieved: Retrieved | None = None,
        encoder: PassageEncoder | None = None,
    ) -> Refresh | None:
        """Refresh what the policy chooses after this step.

        Args:
            step: number of optimiser steps done.
            retrieved: result of the retriever in this step; None after `watch` or `observe`.
            encoder: encodes the passages; None: the retriever's passage encoder.

        Returns:
            The report of the refresh, or None if no vector was encoded or written.

        Raises:
            ValueError: there is no passage encoder, or its vectors do not fit the index. Index and
                policy are unchanged.
        """
        if retrieved is not None:
            self.observe(retrieved)
        policy = self.policy.at(step)
        samples = policy.samples if self.samples is None else self.samples
        seen = self._observations.take(of_all_ranks=policy.observes or bool(samples))
        busy = self._lane is not None and self._lane.busy
        if not (policy.changes_index or samples or busy or self.retriever.vector_map):
            return None
        encoder = self.retriever.passage_encoder if encoder is None else encoder
        if encoder is None:
            raise ValueError("passage_encoder: expected a module to encode passages, got None")
        if seen.query_emb is not None:
            self._questions = seen.query_emb
        with stage("refresh"):
            self._catch_up(step, policy)
            before, draws = self.policy.state_dict(), self._draws.get_state()
            try:
                report = self._advance(step, policy, samples, seen, encoder)
            except BaseException:
                self.policy.load_state_dict(before)
                self._draws.set_state(draws)
                raise
        return report

    def refresh(
        self, step: int, rows: Tensor | None = None, encoder: PassageEncoder | None = None
    ) -> Refresh:
        """Encode passages now, without asking the policy.

        Args:
            step: number of optimiser steps done, stored in `refreshed_at`.
            rows: rows to encode, `[n]` without repetition; None: all.
            encoder: as for `step`.

        Returns:
            The report of the refresh.

        Raises:
            ValueError: as `step`.
        """
        with stage("refresh"):
            return self._refresh(step, rows, encoder)

    def finish(self, step: int) -> None:
        """Encode all passages whose vectors are older than the present weights, and drop the map.

        Args:
            step: number of optimiser steps done.
        """
        self.close()
        self.ledger.grow(len(self.retriever.index), 0)
        old = (self.ledger.encoded_at < step).nonzero()[:, 0]
        if len(old) == len(self.ledger):
            self.refresh(step)
            return
        self._fold(step)
        if len(old):
            self.refresh(step, old)

    def restart(self, step: int) -> None:
        """Count all vectors as made by the present weights, as after loading another index."""
        self.close()
        self._fold(step)
        self.ledger = RowLedger(len(self.retriever.index))
        self._wrote(None, step)
        self._noted_version()

    def flush(self) -> None:
        """Write vectors that are under way on a stream, as before a checkpoint.

        A worker is not waited for; its job is chosen again after a resume.
        """
        if isinstance(self._lane, StreamLane):
            _, parts = self._finished(self.refreshed_at)
            if parts:
                nothing = Observations().take(of_all_ranks=False)
                self._commit(parts[0].step, parts, nothing)

    def close(self) -> None:
        """Give up vectors that are under way, and end the worker if there is one."""
        self._sweep = None
        if self._lane is not None:
            self._lane.close()

    # ---- measuring -----------------------------------------------------------------------------

    def staleness(
        self,
        query_emb: Tensor | None = None,
        n_passages: int | None = None,
        k: int = N_OVERLAP,
        step: int | None = None,
    ) -> Staleness:
        """Measure how stale the index is, by encoding passages.

        Args:
            query_emb: questions `[B, D]` for overlap and rank correlation; None: those of the last
                step.
            n_passages: number of passages, drawn uniformly, for the mean drift, and of candidates
                of each question; None: all passages, which gives the exact values.
            k: k of the overlap.
            step: number of optimiser steps done; None: as of the last refresh.

        Returns:
            `Staleness`; overlap and rank correlation are NaN without a question.

        Raises:
            ValueError: there is no passage encoder, or a number below 1.
        """
        for name, value in (("n_passages", n_passages), ("k", k)):
            if value is not None and value < 1:
                raise ValueError(f"{name}: expected at least 1, got {value}")
        live = self._live()
        drift, overlap, correlation, n = measure(
            self.retriever,
            live if n_passages is None else self._draw(n_passages),
            self._questions if query_emb is None else query_emb,
            min(len(live), max(2 * k, n_passages or len(live))),
            k,
            self.batch_size,
        )
        self.ledger.grow(len(self.retriever.index), 0)
        ages = self.ledger.ages(self.refreshed_at if step is None else step, live)
        oldest = int(ages.max()) if len(ages) else 0
        return Staleness(n, drift, overlap, correlation, k, age_histogram(ages), oldest)

    def summary(self, step: int) -> dict[str, float]:
        """Return the figures since the last call, for a log.

        Args:
            step: number of optimiser steps done.

        Returns:
            `staleness`: estimated mean of 1 - cos(stored, fresh) over all passages;
            `staleness_retrieved`: the same over the retrieved ones; `rank_correlation` of stored
            to fresh scores of the K passages; `overlap@10`: share of the ten nearest passages of
            a question that stay among them with fresh vectors; `age_median` and `age_max` of the
            vectors, in steps. Empty if nothing was measured.
        """
        figures = self.estimate.summary()
        if not figures:
            return {}
        figures.pop("drawn", None)
        removed = self._removed()
        drift = self.estimate.mean(self.ledger, step, removed)
        result = {} if drift is None else {"staleness": drift}
        result |= figures
        if self._questions is not None and len(self.retriever.index) > N_OVERLAP:
            none, few = torch.empty(0, dtype=torch.int64), self._questions[:2]
            n = min(self.retriever.index.n_live, CANDIDATES_PER_K * N_OVERLAP)
            _, overlap, _, _ = measure(self.retriever, none, few, n, N_OVERLAP, self.batch_size)
            result[f"overlap@{N_OVERLAP}"] = overlap
        ages = self.ledger.ages(step, self._live())
        return result | {"age_median": float(ages.median()), "age_max": float(ages.max())}

    # ---- state ---------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Return the state that a resumed run needs, without the index.

        That is: the step of the last refresh, the state of the policy, age, retrievals and drift
        of each row, the estimate of the staleness, the map with the sums that it is fitted from,
        and the state of the random draws.
        """
        return {
            "policy": str(self.policy),
            "refreshed_at": self.refreshed_at,
            "state": self.policy.state_dict(),
            "rows": self.ledger.state_dict(),
            "drift": self.estimate.state_dict(),
            "map": self._map.state_dict(self.retriever.vector_map),
            "draws": self._draws.get_state(),
            "sweep": self._lane.state_dict() if isinstance(self._lane, SweepLane) else self._sweep,
            "version": self._version,
        }

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Load the result of `state_dict`; the index itself is not part of it.

        Raises:
            ValueError: the state belongs to another policy or index, or a value is not as expected.
                Nothing is loaded.
        """
        expected = self.state_dict()
        if not isinstance(state_dict, Mapping) or state_dict.keys() != expected.keys():
            raise ValueError(f"state_dict: expected {', '.join(expected)}, got {shown(state_dict)}")
        if state_dict["policy"] != expected["policy"]:
            raise ValueError(
                f"state_dict: expected the state of {shown(expected['policy'])}, got that of "
                f"{shown(state_dict['policy'])}"
            )
        refreshed_at, state, version = (
            state_dict[name] for name in ("refreshed_at", "state", "version")
        )
        if type(refreshed_at) is not int or refreshed_at < 0:
            raise ValueError(
                f"state_dict: refreshed_at: expected a number of steps, got {shown(refreshed_at)}"
            )
        if version is not None and type(version) is not int:
            raise ValueError(f"state_dict: version: expected a number, got {shown(version)}")
        if not isinstance(state, Mapping):
            raise ValueError(f"state_dict: state: expected a mapping, got {shown(state)}")
        try:
            ledger = RowLedger.from_state_dict(state_dict["rows"])
            if len(ledger) > len(self.retriever.index):
                raise ValueError(
                    f"rows: expected at most the {len(self.retriever.index)} rows of the index, "
                    f"got {len(ledger)}"
                )
            estimate = DriftEstimate()
            estimate.load_state_dict(state_dict["drift"])
            pairs, vector_map = RunningMap.from_state_dict(
                state_dict["map"], self.retriever.index.dim
            )
            draws = torch.Generator()
            draws.set_state(state_dict["draws"])
            sweep = state_dict["sweep"]
            if not (sweep is None or isinstance(sweep, Mapping)):
                raise ValueError(f"sweep: expected a mapping or None, got {shown(sweep)}")
        except (TypeError, RuntimeError, KeyError) as error:
            raise ValueError(f"state_dict: expected the state of a refresher: {error}") from error
        except ValueError as error:
            raise ValueError(f"state_dict: {error}") from error
        self.policy.load_state_dict(state)
        self.refreshed_at, self._version = refreshed_at, version
        self.ledger, self.estimate, self._draws = ledger, estimate, draws
        self._map, self.retriever.vector_map = pairs, vector_map
        self.close()
        self._lane, self._sweep = None, sweep

    # ---- one step ------------------------------------------------------------------------------

    def _catch_up(self, step: int, policy: RefreshPolicy) -> None:
        """Bring ledger and map in line with the index and with the policy of this step."""
        index = self.retriever.index
        self.ledger.grow(len(index), step if len(self.ledger) else 0)
        if self._version is not None and index.version != self._version:
            # Somebody else changed vectors, which older pairs do not describe.
            self.estimate.reset()
            self._map.forget()
        present = self.retriever.vector_map
        if policy.map is not None:
            self._map.follow(policy.map, index.dim, step, present)
        elif self._map.fit is not None or present is not None:
            self._fold(step)
        self._noted_version()

    def _advance(
        self,
        step: int,
        policy: RefreshPolicy,
        samples: int,
        seen: Observation,
        encoder: PassageEncoder,
    ) -> Refresh | None:
        """Ask the policy, encode, and write; nothing is changed before all of it is encoded."""
        none = seen.rows[:0]
        lane = self._lane_for(encoder, policy)
        report, parts = self._finished(step)
        if seen.fresh is not None:
            no = torch.zeros_like(seen.rows, dtype=torch.bool)
            parts.append(Fresh(seen.rows, seen.fresh, step - 1, no | policy.writes_back, no))
        if isinstance(lane, SweepLane) and samples:
            drawn = self._draw(samples)
            vectors = encode_passages(encoder, self.retriever.passages, self.batch_size, rows=drawn)
            no = torch.zeros_like(drawn, dtype=torch.bool)
            parts.append(Fresh(drawn, vectors, step, no, ~no))
            samples = 0
        if not lane.busy:
            removed = self._removed()
            drift = self.estimate.mean(self.ledger, step, removed) if samples else None
            with self.ledger.assuming([(each.rows[each.write], each.step) for each in parts]):
                chosen = policy.choose(View(step, self.ledger, seen.rows, removed, drift))
            if isinstance(chosen, str):
                if not isinstance(lane, SweepLane | WorkerLane):
                    return self._refresh(step, None, encoder)
                lane.submit(encoder, None, step)
            else:
                again = seen.rows if policy.writes_back and seen.noisy else none
                drawn = self._draw(samples)
                wanted = none if chosen is None else chosen.to("cpu", torch.int64)
                _require_distinct(wanted)
                written = [wanted, again, drawn] if policy.writes_back else [wanted]
                rows = torch.cat([wanted, again, drawn]).unique()
                if len(rows):
                    lane.submit(encoder, rows, step)
                    self._job = torch.isin(rows, torch.cat(written)), torch.isin(rows, drawn)
                if isinstance(lane, InlineLane):
                    parts += self._finished(step)[1]
        return self._commit(step, parts, seen) or report

    def _refresh(self, step: int, rows: Tensor | None, encoder: PassageEncoder | None) -> Refresh:
        self.retriever.refresh_index(self.batch_size, rows=rows, encoder=encoder)
        n = len(self.retriever.index) if rows is None else len(rows)
        self._wrote(None if rows is None else rows.cpu(), step)
        return Refresh(step, n, self._noted_version())

    def _finished(self, step: int) -> tuple[Refresh | None, list[Fresh]]:
        """Return the vectors of a finished job; those of all rows are written at once."""
        done = None if self._lane is None else self._lane.collect(wait=False)
        if done is None:
            return None, []
        if done.rows is not None:
            return None, [Fresh(done.rows, done.vectors, done.step, *self._job)]
        self.retriever.write_all(done.vectors)
        self._wrote(None, done.step)
        self.refreshed_at = step
        return Refresh(step, len(done.vectors), self._noted_version()), []

    def _commit(self, step: int, parts: list[Fresh], seen: Observation) -> Refresh | None:
        """Write all vectors, then take note of what they say about the stored ones."""
        for part in parts:
            if (bad := ~part.vectors.isfinite().all(dim=1)).any():
                raise ValueError(
                    "passage_encoder: expected finite vectors, got NaN or inf for row "
                    f"{int(part.rows[bad][0])}"
                )
        measured = [self._compared(each) for each in parts]
        rows, vectors, steps = newest(parts, self.ledger)
        present = self.retriever.vector_map
        now = [
            each
            for part, (each, _, _) in zip(parts, measured, strict=True)
            if part.step >= step - 1
        ]
        refitted, vector_map = self._map.refitted(step, now, present)
        try:
            # Rows are stored under the new map, so that it returns them as they are now.
            self.retriever.vector_map = vector_map
            if len(rows):
                self.retriever.write(vectors, rows)
                self.refreshed_at = step
        except BaseException:
            self.retriever.vector_map = present
            raise
        self._map = refitted
        self.ledger.retrieved(seen.found)
        if len(seen.correlations):
            self.estimate.saw(rank_correlation=seen.correlations)
        for part, (_, drift, predicted) in zip(parts, measured, strict=True):
            if part.vectors is seen.fresh:
                self.estimate.saw(staleness_retrieved=drift)
            if part.drawn.any():
                self.estimate.sampled(drift[part.drawn], predicted[part.drawn])
                self.estimate.saw(drawn=drift[part.drawn])
            self.ledger.measured(part.rows, drift, part.step)
        self.ledger.wrote(rows, steps)
        n_encoded = sum(len(each.rows) for each in parts if each.vectors is not seen.fresh)
        n_back = sum(int(each.write.sum()) for each in parts if each.vectors is seen.fresh)
        if not n_encoded and not n_back:
            return None
        return Refresh(step, n_encoded, self._noted_version(), n_back)

    def _compared(self, fresh: Fresh) -> tuple[tuple[Tensor, Tensor], Tensor, Tensor]:
        """Return pairs for the map, the drift of each row, and its prediction."""
        drift = drift_of(self.retriever.vectors(fresh.rows), fresh.vectors)
        predicted = self.ledger.predicted(fresh.step, fresh.rows)
        pairs = self._map.pairs(fresh, self.retriever.index, self.ledger)
        return pairs, drift, predicted

    # ---- small things --------------------------------------------------------------------------

    def _lane_for(self, encoder: PassageEncoder, policy: RefreshPolicy) -> Lane:
        sweep = self._lane.n if isinstance(self._lane, SweepLane) else 0
        if self._lane is None or self._of is not encoder or sweep != policy.sweep:
            if self._lane is not None:
                self._lane.close()
            given = (self.retriever.passages, self.batch_size, self.retriever.index.dim)
            if self.worker is not None:
                if policy.sweep:
                    raise ValueError(
                        f"worker: expected None with {policy}, which encodes in each step, got "
                        f"{self.worker}"
                    )
                if torch.distributed.is_initialized() and torch.distributed.get_world_size() > 1:
                    raise ValueError(
                        "worker: expected None with several training processes, whose indexes "
                        f"would change at different steps, got {self.worker}"
                    )
                self._lane = WorkerLane(*given, self.worker)
            else:
                self._lane = lane_of(*given, encoder)
            if policy.sweep:
                swept = SweepLane(given[0], given[2], policy.sweep, self._lane)
                swept.load_state_dict(self._sweep, encoder)
                self._lane, self._sweep = swept, None
            self._of = encoder
        return self._lane

    def _wrote(self, rows: Tensor | None, step: int) -> None:
        """Take note of vectors that weights of `step` made and that are in the index."""
        self.ledger.grow(len(self.retriever.index), 0)
        self.ledger.wrote(rows, step)
        self.refreshed_at = step
        if rows is None:
            self.estimate.reset()
            self._map.forget(step)

    def _noted_version(self) -> int:
        self._version = version = self.retriever.index.version
        return version

    def _fold(self, step: int) -> None:
        """Write the mapped vectors into the index, and forget the pairs of the old ones."""
        self.retriever.fold_map()
        self._map.forget(step)
        self._noted_version()

    def _removed(self) -> Tensor | None:
        index = self.retriever.index
        return None if index.n_live == len(index) else index.removed.cpu()

    def _live(self) -> Tensor:
        removed = self._removed()
        if removed is None:
            return torch.arange(len(self.retriever.index))
        return (~removed).nonzero()[:, 0]

    def _draw(self, n: int) -> Tensor:
        """Return up to n live rows, drawn uniformly."""
        index = self.retriever.index
        if not n or not index.n_live:
            return torch.empty(0, dtype=torch.int64)
        places = torch.randint(index.n_live, (n,), generator=self._draws).unique()
        return places if index.n_live == len(index) else self._live()[places]


def _require_distinct(rows: Tensor) -> None:
    if rows.unique().numel() != rows.numel():
        raise ValueError(f"policy: expected each row once, got some of {shown(rows)} again")
