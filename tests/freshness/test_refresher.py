"""IndexRefresher: due or not, whole or not at all, resumable, and open to other policies."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from transformers import Trainer, TrainingArguments

from fastrag import IndexRefresher
from fastrag.freshness import Refresh, RefreshPolicy
from fastrag.index import encode_passages
from fastrag.nn import RagModel
from fastrag.train import RagTrainer, RefreshCallback
from tests import tiny

N = 12


class Rolling(RefreshPolicy, word="roll"):
    """Encode n passages a step in a cyclic order, after those that this step has read."""

    usage = "roll:n"

    def __init__(self, n: int) -> None:
        self.n = n
        self.next = 0

    def choose(self, step: int, retriever: Any, retrieved: Any, encoder: Any) -> Tensor:
        if retrieved is None:
            raise ValueError("retrieved: expected what the retriever returned, got None")
        rows = (self.next + torch.arange(self.n)) % len(retriever.index)
        self.next = (self.next + self.n) % len(retriever.index)
        seen = retrieved.hits.rows.flatten()
        return torch.cat([rows, seen[seen >= 0]]).unique()

    def state_dict(self) -> dict[str, Any]:
        return {"next": self.next}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        self.next = state_dict["next"]


def model(**settings: Any) -> RagModel:
    """A model whose passage encoder has moved on since the index was built."""
    made = tiny.rag_model(train_passage_encoder=True, **settings)
    with torch.no_grad():
        for parameter in made.passage_encoder.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return made


def fresh(made: RagModel) -> Tensor:
    return encode_passages(made.passage_encoder, made.passages)


def stored(made: RagModel) -> Tensor:
    return made.index.vectors(torch.arange(len(made.index)))


def test_every_second_step() -> None:
    made = model()
    refresher = IndexRefresher(made, "every:2", batch_size=5)
    stale, version = stored(made), made.index.version
    assert refresher.step(1) is None and torch.equal(stored(made), stale)
    assert refresher.step(2) == Refresh(step=2, n_passages=N, version=version + 1)
    torch.testing.assert_close(stored(made), fresh(made))
    assert refresher.refreshed_at == 2 and refresher.changing
    frozen = IndexRefresher(made.retriever)
    assert not frozen.changing and all(frozen.step(step) is None for step in range(5))


def test_chosen_rows_and_another_encoder() -> None:
    made, other = model(), model()
    stale, rows = stored(made), torch.tensor([7, 2])
    done = IndexRefresher(made).refresh(3, rows, other.passage_encoder)
    assert (done.step, done.n_passages) == (3, 2)
    expected = stale.clone()
    expected[rows] = fresh(other)[rows]
    torch.testing.assert_close(stored(made), expected)


def broken(kind: str) -> tuple[nn.Module, type[Exception], str]:
    class Encoder(nn.Module):
        def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
            if kind == "raises":
                raise RuntimeError("out of order")
            width = 8 if kind == "narrow" else 16
            return torch.full((len(input_ids), width), torch.nan if kind == "nan" else 1.0)

    return Encoder(), *{
        "raises": (RuntimeError, "out of order"),
        "narrow": (ValueError, "encoder: expected vectors of the index's width 16, got width 8"),
        "nan": (ValueError, "expected finite"),
    }[kind]


@pytest.mark.parametrize("kind", ["raises", "narrow", "nan"])
@pytest.mark.parametrize("policy", ["every:1", "roll:2"])
def test_a_refresh_that_fails_leaves_everything_as_it_was(policy: str, kind: str) -> None:
    made = model()
    refresher = IndexRefresher(made, policy)
    data = tiny.batch()
    retrieved = made.retriever(data["input_ids"], data["attention_mask"])
    refresher.step(1, retrieved)
    vectors, version, state = stored(made), made.index.version, refresher.state_dict()
    encoder, error, message = broken(kind)
    with pytest.raises(error, match=message):
        refresher.step(2, retrieved, encoder)
    assert torch.equal(stored(made), vectors) and made.index.version == version
    assert refresher.state_dict() == state
    assert refresher.step(2, retrieved) is not None


def test_a_refresh_in_the_middle_of_a_step_from_another_thread() -> None:
    """The step keeps the vectors that it searched; the next one finds the new ones."""

    def gradient(meanwhile: bool) -> tuple[Tensor, RagModel]:
        torch.manual_seed(0)
        made = model()
        made.train_passage_encoder = False
        loss = made(**tiny.batch()).loss
        if meanwhile:
            thread = threading.Thread(target=IndexRefresher(made, "every:1").step, args=(1,))
            thread.start()
            thread.join()
            torch.testing.assert_close(stored(made), fresh(made))
        loss.backward()
        grads = [p.grad.flatten() for p in made.question_encoder.parameters()]
        return torch.cat(grads), made

    (expected, undisturbed), (found, refreshed) = gradient(False), gradient(True)
    assert torch.equal(found, expected)
    assert not torch.equal(stored(undisturbed), stored(refreshed))


@given(steps=st.integers(0, 9), n=st.integers(1, 5))
def test_a_loaded_state_goes_on_alike(steps: int, n: int) -> None:
    class Index:
        version = 0
        __len__ = lambda self: N  # noqa: E731

    class Retriever:
        index, passage_encoder = Index(), None

        def __init__(self) -> None:
            self.rows: list[list[int]] = []

        def refresh_index(self, batch_size: int, *, rows: Tensor, encoder: Any) -> None:
            self.rows.append(rows.tolist())

    class Nothing:
        class hits:
            rows = torch.full((1, 1), -1)

    first, second = Retriever(), Retriever()
    whole, cut = (IndexRefresher(each, f"roll:{n}") for each in (first, second))  # type: ignore
    for step in range(steps):
        whole.step(step, Nothing)  # type: ignore[arg-type]
    cut.load_state_dict(whole.state_dict())
    assert cut.refreshed_at == whole.refreshed_at == max(steps - 1, 0)
    for step in range(steps, steps + 3):
        whole.step(step, Nothing)  # type: ignore[arg-type]
        cut.step(step, Nothing)  # type: ignore[arg-type]
    assert second.rows == first.rows[steps:]


GOOD = {"policy": "every:3", "refreshed_at": 6, "state": {}}


@pytest.mark.parametrize(
    ("state", "message"),
    [
        (None, "^state_dict: expected policy, refreshed_at, state, got None"),
        ({"policy": "every:3"}, "^state_dict: expected policy, refreshed_at, state, got"),
        (GOOD | {"policy": "every:4"}, "^state_dict: expected the state of 'every:3', got .*'ev"),
        (GOOD | {"refreshed_at": -1}, "refreshed_at: expected a number of steps, got -1"),
        (GOOD | {"refreshed_at": True}, "refreshed_at: expected a number of steps, got True"),
        (GOOD | {"state": 3}, "state: expected a mapping, got 3"),
        (GOOD | {"state": {"next": 3}}, "expected no state of every:3, got"),
    ],
)
def test_a_state_that_does_not_fit_is_refused(state: Any, message: str) -> None:
    refresher = IndexRefresher(tiny.rag_model(), "every:3")
    refresher.load_state_dict(GOOD)
    with pytest.raises(ValueError, match=message):
        refresher.load_state_dict(state)
    assert refresher.state_dict() == GOOD


def test_bad_arguments() -> None:
    with pytest.raises(ValueError, match="batch_size: expected at least 1, got 0"):
        IndexRefresher(tiny.rag_model(), batch_size=0)
    with pytest.raises(ValueError, match="refresh: expected one of 'frozen', 'every:n'"):
        IndexRefresher(tiny.rag_model(), "hourly")
    without = tiny.rag_model()
    without.passage_encoder = None
    with pytest.raises(ValueError, match="passage_encoder: expected a module to encode passages"):
        IndexRefresher(without, "every:1").step(1)


@pytest.mark.parametrize("trainer", ["RagTrainer", "Trainer"])
def test_a_policy_from_outside_trains(tmp_path: Path, trainer: str) -> None:
    """`Rolling` above, as a setting: with 4 of 12 passages a step, none is older than 3 steps."""
    made = model()
    stale = stored(made)
    args = TrainingArguments(
        str(tmp_path),
        max_steps=3,
        per_device_train_batch_size=2,
        learning_rate=1e-2,
        use_cpu=True,
        disable_tqdm=True,
        save_strategy="no",
        report_to=[],
        remove_unused_columns=False,
    )
    version = made.index.version
    if trainer == "RagTrainer":
        run = RagTrainer(made, args, tiny.collator(), tiny.questions(), refresh="roll:4")
        run.train()
        assert run.refresher.policy.state_dict() == {"next": 0}
    else:
        refresher = IndexRefresher(made, "roll:4")
        Trainer(
            model=made,
            args=args,
            data_collator=tiny.collator(),
            train_dataset=tiny.questions(),
            callbacks=[RefreshCallback(refresher)],
        ).train()
        assert refresher.refreshed_at == 3
    assert made.index.version == version + 3
    assert (stored(made) != stale).any(1).all()
    last = stored(made)[8:]  # chosen in the last step, hence encoded after it
    torch.testing.assert_close(last, fresh(made)[8:])


def test_a_policy_from_outside_resumes_to_the_bit(tmp_path: Path) -> None:
    """Its place in the cycle is in the checkpoint."""

    def train(folder: str, resume: Path | None = None) -> RagTrainer:
        args = TrainingArguments(
            str(tmp_path / folder),
            max_steps=4,
            save_steps=3,
            per_device_train_batch_size=2,
            learning_rate=1e-2,
            lr_scheduler_type="constant",
            use_cpu=True,
            disable_tqdm=True,
            report_to=[],
        )
        made = tiny.rag_model(train_passage_encoder=True)
        run = RagTrainer(made, args, tiny.collator(), tiny.questions(), refresh="roll:5")
        run.train(resume_from_checkpoint=None if resume is None else str(resume))
        return run

    whole = train("whole")
    resumed = train("resumed", tmp_path / "whole" / "checkpoint-3")
    assert resumed.refresher.state_dict() == whole.refresher.state_dict()
    assert resumed.refresher.policy.state_dict() == {"next": 4 * 5 % N}
    assert torch.equal(stored(resumed.model), stored(whole.model))
    tiny.same_weights(resumed.model, whole.model)
