"""A tiny RAG trained with the ops and one trained with the reference go the same way, step by step.

Encoder, index, builder and generator are the same code in both; all that is ours between them, the
retrieval scores and the loss, is either fastrag.functional on one backend or fastrag.reference.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from fastrag import functional, reference
from fastrag.functional import RagNLL
from fastrag.ops import backends
from tests.tiny import collator, questions, rag_model

N_STEPS = 15
ORACLES = {"token": reference.rag_token_nll, "sequence": reference.rag_sequence_nll}


def oracle_nll(
    marginal: str,
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    doc_scores: Tensor,
    *,
    reduction: str,
    normalizer: Any,
    example_weight: Tensor | None,
    valid_rows: Tensor | None,
    **options: Any,
) -> RagNLL:
    """What rag_nll promises, literally."""
    nll, log_posterior = ORACLES[marginal](hidden, weight, labels, doc_scores, **options)
    loss = reference.reduce(nll, labels, reduction, normalizer, example_weight)
    head = {name: options[name] for name in ("bias", "softcap", "logit_scale")}
    logp = reference.token_logp(hidden, weight, labels, **head)
    return RagNLL(loss, log_posterior.detach(), logp.detach())


def oracle_scores(
    query_emb: Tensor, passage_emb: Tensor, *, return_log_prior: bool = False, **options: Any
) -> Tensor | tuple[Tensor, Tensor]:
    scores = reference.doc_scores(query_emb, passage_emb, **options)
    return (scores, scores.log_softmax(1)) if return_log_prior else scores


def train(
    marginal: str, backend: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> dict[str, Tensor]:
    """Returns the losses of all steps and the weights after the last, the names of both with it."""
    model = rag_model(
        marginal=marginal, label_smoothing=0.05, train_passage_encoder=True, tau=0.1, learn_tau=True
    ).to(dtype)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.5)
    collate, asked = collator(), questions()
    losses = []
    with monkeypatch.context() as patch:
        if backend == "reference":
            patch.setattr("fastrag.nn.loss.rag_nll", oracle_nll)
            patch.setattr(functional, "doc_scores", oracle_scores)
        else:
            # A preference: whatever else the model calls may have no such backend.
            first = backends._named(backend)
            others = [each for each in backends._backends if each.name not in (backend, "torch")]
            order = dict.fromkeys([first, backends._named("torch"), *others])
            patch.setattr(backends, "_backends", list(order))
            patch.setattr(type(first), "devices", None)
        for step in range(N_STEPS):
            batch = collate([asked[(3 * step + i) % len(asked)] for i in range(3)])
            optimizer.zero_grad()
            loss = model(**batch).loss
            loss.backward()
            optimizer.step()
            losses.append(loss.detach())
    named = {name: x.detach() for name, x in model.named_parameters()}
    return {"losses": torch.stack(losses), **named}


def all_weights(run: dict[str, Tensor]) -> Tensor:
    return torch.cat([x.double().flatten() for name, x in run.items() if name != "losses"])


@pytest.mark.parametrize("marginal", ["token", "sequence"])
@pytest.mark.parametrize(
    ("backend", "dtype"),
    [
        ("torch", torch.float64),
        ("torch", torch.float32),
        ("cpp", torch.float32),
        pytest.param("triton", torch.float32, marks=pytest.mark.slow),  # in its interpreter
    ],
    ids=str,
)
def test_same_way(
    marginal: str, backend: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every loss and the last weights, to one unit of rounding of the dtype for each step."""
    if reason := backends.why_not(backend):
        pytest.skip(reason)
    if backend == "triton" and not backends.interpreting():
        pytest.skip("its launchers take CPU tensors under TRITON_INTERPRET=1")
    found = train(marginal, backend, dtype, monkeypatch)
    expected = train(marginal, "reference", torch.float64, monkeypatch)
    losses, true = found["losses"].double(), expected["losses"]
    assert true[-1] < 0.5 * true[0]
    bound = N_STEPS * torch.finfo(dtype).eps
    assert ((losses - true).abs() <= bound * true[0]).all(), (losses - true).abs().max()
    weights, wanted = all_weights(found), all_weights(expected)
    assert (weights - wanted).norm() <= bound * wanted.norm(), (weights - wanted).norm()
