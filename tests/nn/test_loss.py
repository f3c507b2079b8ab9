"""RagLoss hands everything to the functional operations, whose values are tested there."""

from __future__ import annotations

import pytest
import torch

from fastrag import RagLoss, reference
from fastrag.nn import LMHead

REFERENCE = {"token": reference.rag_token_nll, "sequence": reference.rag_sequence_nll}


def case(seed=0):
    torch.manual_seed(seed)
    hidden = torch.randn(2, 3, 4, 5, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(11, 5, dtype=torch.float64, requires_grad=True)
    bias = torch.randn(11, dtype=torch.float64, requires_grad=True)
    scores = torch.randn(2, 3, dtype=torch.float64, requires_grad=True)
    labels = torch.tensor([[1, 2, 3, -7], [4, -7, -7, -7]])
    return hidden, LMHead(weight, bias, softcap=4.0, logit_scale=1.3), labels, scores


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("marginal", ["token", "sequence"])
def test_every_setting_arrives(marginal, smoothing):
    hidden, head, labels, scores = case()
    weights = torch.tensor([1.0, 3.0], dtype=torch.float64)
    loss_fn = RagLoss(marginal, label_smoothing=smoothing, ignore_index=-7)
    out = loss_fn(hidden, head, labels, scores, normalizer=9, example_weight=weights)
    nll, log_posterior = REFERENCE[marginal](
        hidden, head.weight, labels, scores, head.bias, 4.0, 1.3, smoothing, -7
    )
    expected = (weights * nll).sum() / 9
    torch.testing.assert_close(out.loss, expected)
    torch.testing.assert_close(out.log_posterior, log_posterior)
    leaves = [hidden, head.weight, head.bias, scores]
    for got, want in zip(
        torch.autograd.grad(out.loss, leaves), torch.autograd.grad(expected, leaves), strict=True
    ):
        torch.testing.assert_close(got, want)


@pytest.mark.parametrize("reduction", ["sum", "none"])
def test_reductions(reduction):
    hidden, head, labels, scores = case()
    out = RagLoss("token", reduction=reduction, ignore_index=-7)(hidden, head, labels, scores)
    nll, _ = reference.rag_token_nll(
        hidden, head.weight, labels, scores, head.bias, 4.0, 1.3, 0.0, -7
    )
    torch.testing.assert_close(out.loss, nll.sum() if reduction == "sum" else nll)


def test_hidden_as_hugging_face_has_it():
    hidden, head, labels, scores = case()
    loss_fn = RagLoss("sequence", ignore_index=-7)
    torch.testing.assert_close(
        loss_fn(hidden.flatten(0, 1), head, labels, scores).loss,
        loss_fn(hidden, head, labels, scores).loss,
    )


def test_rejects_words_and_numbers():
    with pytest.raises(ValueError, match=r"marginal: expected one of \('token', 'sequence'\)"):
        RagLoss("tokens")
    with pytest.raises(ValueError, match="reduction: expected one of"):
        RagLoss(reduction="avg")
    with pytest.raises(ValueError, match="label_smoothing: expected 0 <= number < 1, got -0.1"):
        RagLoss(label_smoothing=-0.1)


def test_module_needs_no_transformers(tmp_path):
    import subprocess
    import sys

    code = "import fastrag, sys; fastrag.RagLoss(); assert 'transformers' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
