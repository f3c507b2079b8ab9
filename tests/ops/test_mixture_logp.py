"""The marginal distribution of the next token against its equation in float64."""

from __future__ import annotations

import pytest
import torch

from fastrag import functional
from fastrag.ops import backends, cpp, mixture_logp
from fastrag.testing import assert_close

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


@pytest.mark.parametrize("backend", ABLE)
def test_the_sums_belong_to_the_products(monkeypatch, backend):
    """Bias, scale and softcap are part of log_z alone."""
    monkeypatch.setenv(backends.BACKEND_VARIABLE, backend)
    torch.manual_seed(0)
    hidden, weight, bias = torch.randn(5, 9), torch.randn(700, 9), torch.randn(700)
    bias[3] = -torch.inf
    found, log_z = mixture_logp.head_products(hidden, weight, bias, 2.0, 0.5)
    torch.testing.assert_close(found, hidden @ weight.t())
    given = (hidden.unsqueeze(0), weight, torch.zeros(1, 5), bias, 2.0, 0.5)
    torch.testing.assert_close(log_z.double(), literal(*given)[1][0], rtol=1e-5, atol=1e-5)


@pytest.mark.skipif("cpp" not in ABLE, reason="fastrag._C is not built")
@pytest.mark.parametrize("isa", cpp._C.instruction_sets() if "cpp" in ABLE else [])
@pytest.mark.parametrize("softcap", [None, 4.0], ids=["plain", "capped"])
def test_each_instruction_set(monkeypatch, isa, softcap):
    """Error at most that of plain torch; the bits do not depend on the number of threads."""
    monkeypatch.setenv(backends.ISA_VARIABLE, isa)
    torch.manual_seed(0)
    hidden, weight, bias = torch.randn(3, 4, 24), torch.randn(9001, 24), torch.randn(9001)
    log_prior = torch.randn(3, 4)
    log_prior[1, 2] = -torch.inf
    log_prior = log_prior.log_softmax(1)
    log_prior[2] = -torch.inf  # no passage at all
    bias[4100] = -torch.inf if softcap is None else bias[4100]  # an id that no passage allows
    given = (hidden, weight, log_prior, bias, softcap, 0.7)
    found = cpp.mixture_logp(*given)
    expected = literal(*given)
    for got, plain, exact in zip(
        found, mixture_logp.torch_mixture_logp(*given), expected[:2], strict=True
    ):
        assert_close(got, plain, exact)
    assert found[0][2].isneginf().all() and found[0][0].isfinite().sum() >= 9000
    one, _ = cpp.mixture_logp(hidden[:, :1], weight, log_prior[:, :1] * 0, bias, softcap, 0.7)
    torch.testing.assert_close(one[:2].exp().sum(1), torch.ones(2))
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    assert all(a.equal(b) for a, b in zip(cpp.mixture_logp(*given), found, strict=True))
    hidden[0, 1, 5] = torch.nan
    mixture, log_z = cpp.mixture_logp(*given)
    assert mixture[0].isnan().all() and not mixture[1:].isnan().any()
    assert log_z.isnan().nonzero().tolist() == [[0, 1]]


@pytest.mark.skipif("cpp" not in ABLE, reason="fastrag._C is not built")
@pytest.mark.parametrize(("n", "dim", "pitch"), [(21, 40, 48), (5, 1024, 1024)])
def test_products_are_the_scores_of_a_search(n: int, dim: int, pitch: int):
    """To the bit, for any number of threads, and of a matrix with padding between its rows."""
    torch.manual_seed(0)
    x, weight = torch.randn(n, dim), torch.randn(3001, pitch)[:, :dim]
    found, _ = cpp.head_products(x, weight, None, None, 1.0)
    scores, rows = functional.mips_topk(x, weight, 3001)
    assert found.gather(1, rows).equal(scores)
    threads = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        assert cpp.head_products(x, weight, None, None, 1.0)[0].equal(found)
    finally:
        torch.set_num_threads(threads)
