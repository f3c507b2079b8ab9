"""IndexRefresher: due or not, whole or not at all, resumable, and open to other policies."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import Trainer, TrainingArguments

from fastrag import IndexRefresher
from fastrag.freshness import Refresh, RefreshPolicy, View
from fastrag.freshness.ledger import RowLedger
from fastrag.index import encode_passages
from fastrag.nn import RagModel
from fastrag.nn.retrieved import Retrieved
from fastrag.train import RagTrainer, RefreshCallback
from tests import tiny

N = 12


class Rolling(RefreshPolicy, word="roll"):
    """Encode n passages a step in a cyclic order, after those that this step has read."""

    usage = "roll:n"

    def __init__(self, n: int) -> None:
        self.n = n
        self.next = 0

    def choose(self, view: View) -> Tensor:
        n = len(view.ledger)
        rows = (self.next + torch.arange(self.n)) % n
        self.next = (self.next + self.n) % n
        return torch.cat([rows, view.retrieved]).unique()

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


def same_state(one: Any, other: Any) -> None:
    if isinstance(one, dict):
        assert one.keys() == other.keys()
        for name, value in one.items():
            same_state(value, other[name])
    elif isinstance(one, Tensor):
        assert torch.equal(one.nan_to_num(-1), other.nan_to_num(-1))
    else:
        assert one == other


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
@pytest.mark.parametrize("policy", ["every:1", "roll:2", "rolling:3+map"])
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
    same_state(refresher.state_dict(), state)
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


@pytest.mark.parametrize("policy", ["roll:5", "rolling:2+map:2", "0-3:map:2, 3-:rolling:4"])
def test_a_loaded_state_goes_on_alike(policy: str) -> None:
    """To the bit: chosen and drawn rows, priorities, map."""

    def drifting(made: RagModel, step: int) -> Retrieved:
        draws = torch.Generator().manual_seed(step)
        for parameter in made.passage_encoder.parameters():
            parameter.data += 0.02 * torch.randn(parameter.shape, generator=draws)
        data = tiny.batch(n=2 + step % 3)
        return made.retriever(data["input_ids"], data["attention_mask"])

    whole_model, cut_model = model(), model()
    whole, cut = IndexRefresher(whole_model, policy), IndexRefresher(cut_model, policy)
    for step in range(1, 8):
        whole.step(step, drifting(whole_model, step))
        if step <= 4:
            cut.step(step, drifting(cut_model, step))
    state = cut.state_dict()
    resumed = IndexRefresher(cut_model, policy, seed=9)
    cut_model.retriever.vector_map = None
    resumed.load_state_dict(state)
    for step in range(5, 8):
        resumed.step(step, drifting(cut_model, step))
    same_state(resumed.state_dict(), whole.state_dict())
    assert torch.equal(stored(cut_model), stored(whole_model))
    assert resumed.refreshed_at == 7


GOOD = IndexRefresher(tiny.rag_model(), "every:3").state_dict() | {"refreshed_at": 6}


@pytest.mark.parametrize(
    ("state", "message"),
    [
        (None, "^state_dict: expected policy, refreshed_at, state, .*, got None"),
        ({"policy": "every:3"}, "^state_dict: expected policy, refreshed_at, state, .*, got"),
        (GOOD | {"policy": "every:4"}, "^state_dict: expected the state of 'every:3', got .*'ev"),
        (GOOD | {"refreshed_at": -1}, "refreshed_at: expected a number of steps, got -1"),
        (GOOD | {"refreshed_at": True}, "refreshed_at: expected a number of steps, got True"),
        (GOOD | {"state": 3}, "state: expected a mapping, got 3"),
        (GOOD | {"state": {"next": 3}}, "expected no state of every:3, got"),
        (GOOD | {"rows": {}}, "rows: expected encoded_at, seen, rate, sums, got"),
        (GOOD | {"rows": RowLedger(99).state_dict()}, "rows: expected at most the 12 rows .* 99"),
        (GOOD | {"rows": GOOD["rows"] | {"seen": torch.zeros(3)}}, "rows: seen: expected"),
        (GOOD | {"drift": {"sums": [1]}}, "drift: expected sums of two numbers"),
        (GOOD | {"map": {"base": 0, "fit": None}}, "expected the state of a refresher: 'map'"),
        (GOOD | {"map": GOOD["map"] | {"fit": {"settings": ("affine", 3)}}}, "map: expected sett"),
        (GOOD | {"draws": torch.zeros(3)}, "expected the state of a refresher"),
        (GOOD | {"version": "1"}, "version: expected a number, got '1'"),
    ],
)
def test_a_state_that_does_not_fit_is_refused(state: Any, message: str) -> None:
    refresher = IndexRefresher(tiny.rag_model(), "every:3")
    refresher.load_state_dict(GOOD)
    with pytest.raises(ValueError, match=message):
        refresher.load_state_dict(state)
    same_state(refresher.state_dict(), GOOD)


def test_bad_arguments() -> None:
    with pytest.raises(ValueError, match="batch_size: expected at least 1, got 0"):
        IndexRefresher(tiny.rag_model(), batch_size=0)
    with pytest.raises(ValueError, match="samples: expected at least 0 or None, got -1"):
        IndexRefresher(tiny.rag_model(), samples=-1)
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


@pytest.mark.parametrize("policy", ["roll:5", "rolling:3+map:2+write-back"])
def test_a_run_resumes_to_the_bit(tmp_path: Path, policy: str) -> None:
    """The checkpoint has the place in the cycle, ages, draws and map; logs have figures."""

    def train(folder: str, resume: Path | None = None) -> RagTrainer:
        args = TrainingArguments(
            str(tmp_path / folder),
            max_steps=4,
            save_steps=3,
            per_device_train_batch_size=2,
            learning_rate=1e-2,
            lr_scheduler_type="constant",
            logging_steps=1,
            use_cpu=True,
            disable_tqdm=True,
            report_to=[],
        )
        made = tiny.rag_model(train_passage_encoder=True)
        run = RagTrainer(made, args, tiny.collator(), tiny.questions(), refresh=policy)
        run.train(resume_from_checkpoint=None if resume is None else str(resume))
        return run

    whole = train("whole")
    resumed = train("resumed", tmp_path / "whole" / "checkpoint-3")
    same_state(resumed.refresher.state_dict(), whole.refresher.state_dict())
    assert torch.equal(stored(resumed.model), stored(whole.model))
    tiny.same_weights(resumed.model, whole.model)
    if policy == "roll:5":
        assert resumed.refresher.policy.state_dict() == {"next": 4 * 5 % N}
        return
    assert (tmp_path / "whole" / "checkpoint-3" / "index_map.safetensors").is_file()
    assert resumed.model.retriever.vector_map is not None
    logs = [log for log in resumed.state.log_history if "loss" in log]
    assert {"staleness_retrieved", "overlap@10", "age_max"} <= logs[-1].keys()
    resumed.save_model()
    assert resumed.model.retriever.vector_map is None
    torch.testing.assert_close(stored(resumed.model), fresh(resumed.model))
