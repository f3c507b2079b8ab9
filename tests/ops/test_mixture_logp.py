"""The marginal distribution of the next token against its equation in float64."""

from __future__ import annotations

import pytest
import torch

from fastrag import functional
from fastrag.ops import backends, cpp, mixture_logp

ABLE = [name for name in ("cpp", "torch") if not backends.why_not(name)]


def literal(hidden, weight, log_prior, bias, softcap, scale):
    z = scale * (hidden.double() @ weight.double().t() + (0.0 if bias is None else bias.double()))
    z = z if softcap is None else softcap * torch.tanh(z / softcap)
    joint = log_prior.double().unsqueeze(2) + z.log_softmax(2)
    return joint.logsumexp(1), z.logsumexp(2), z


@pytest.mark.parametrize("backend", ABLE)
@pytest.mark.parametrize("head", [(False, None, 1.0), (True, 3.0, 0.25)], ids=["plain", "capped"])
@pytest.mark.parametrize(
    ("n", "n_docs", "width", "vocab"),
    # one row; fewer rows than lanes; rows and token ids that fill no tile; beams of several panels
    [(1, 1, 8, 5), (1, 3, 7, 30), (4, 5, 33, 1009), (9, 7, 64, 300)],
)
def test_equals_the_equation(monkeypatch, backend, head, n, n_docs, width, vocab):
    monkeypatch.setenv(backends.BACKEND_VARIABLE, backend)
    biased, softcap, scale = head
    torch.manual_seed(0)
    hidden, weight = torch.randn(n, n_docs, width), torch.randn(vocab, width)
    log_prior = torch.randn(n, n_docs).log_softmax(1)
    if n_docs > 1:
        log_prior[0, 1] = -torch.inf
        log_prior = log_prior.log_softmax(1)
    bias = torch.randn(vocab) if biased else None
    given = (hidden, weight, log_prior, bias, softcap, scale)
    mixture, log_z = mixture_logp.mixture_logp(*given)
    expected, expected_log_z, z = literal(*given)
    torch.testing.assert_close(mixture.double(), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(log_z.double(), expected_log_z, rtol=1e-5, atol=1e-5)
    tokens = torch.randint(vocab, (n, 4))
    logit = mixture_logp.chosen_logit(
        hidden.unsqueeze(2).expand(-1, -1, 4, -1), weight, tokens, bias, softcap, scale
    )
    chosen = z.gather(2, tokens.unsqueeze(1).expand(-1, n_docs, -1))
    torch.testing.assert_close(logit.double(), chosen, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_other_dtypes_sum_in_float32_at_least(dtype):
    torch.manual_seed(0)
    hidden, weight = torch.randn(2, 3, 16).to(dtype), torch.randn(50, 16).to(dtype)
    log_prior = torch.zeros(2, 3).log_softmax(1)
    given = (hidden, weight, log_prior, None, None, 1.0)
    mixture, _ = mixture_logp.mixture_logp(*given)
    assert mixture.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    torch.testing.assert_close(mixture.double(), literal(*given)[0], rtol=1e-5, atol=1e-5)


@pytest.mark.skipif("cpp" not in ABLE, reason="fastrag._C is not built")
def test_products_are_the_scores_of_a_search():
    """To the bit, for any number of threads, and of a matrix with padding between its rows."""
    torch.manual_seed(0)
    x, weight = torch.randn(21, 40), torch.randn(3001, 48)[:, :40]
    found = cpp.products(x, weight)
    scores, rows = functional.mips_topk(x, weight, 3001)
    assert found.gather(1, rows).equal(scores)
    threads = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        assert cpp.products(x, weight).equal(found)
    finally:
        torch.set_num_threads(threads)
