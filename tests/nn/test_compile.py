"""torch.compile: the loss is one graph, and a compiled reader trains as it does without."""

from __future__ import annotations

import pytest
import torch

from fastrag.nn import LMHead, RagLoss
from tests.tiny import batch, rag_model


@pytest.mark.parametrize("marginal", ["token", "sequence"])
def test_the_loss_is_one_graph(marginal):
    torch._dynamo.reset()
    torch.manual_seed(0)
    labels = torch.tensor([[3, 4, -100], [5, 6, 7]])
    found = []
    for compiled in (False, True):
        torch.manual_seed(0)
        hidden = torch.randn(2, 3, 3, 8, requires_grad=True)
        weight = torch.randn(20, 8, requires_grad=True)
        doc_scores = torch.randn(2, 3, requires_grad=True)
        loss_fn = RagLoss(marginal)
        if compiled:
            loss_fn.compile(backend="aot_eager", fullgraph=True)
        output = loss_fn(hidden, LMHead(weight), labels, doc_scores)
        gradients = torch.autograd.grad(output.loss, [hidden, weight, doc_scores])
        found.append([*output, *gradients])
    torch.testing.assert_close(found[1], found[0])


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["seq2seq", "causal"])
def test_a_compiled_reader_has_the_same_gradients(kind):
    torch._dynamo.reset()
    plain, compiled = rag_model(kind, tau=0.1), rag_model(kind, tau=0.1)
    compiled.reader.compile(backend="aot_eager")
    for model in (plain, compiled):
        model(**batch(kind)).loss.backward()
    expected = dict(plain.named_parameters())
    for name, parameter in compiled.named_parameters():
        torch.testing.assert_close(parameter.grad, expected[name].grad, msg=name)
    torch._dynamo.utils.counters.clear()
    compiled(**batch(kind)).loss.backward()
    assert not torch._dynamo.utils.counters["stats"]  # nothing is compiled again
