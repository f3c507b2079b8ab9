"""RAG-Token and RAG-Sequence: values, gradients, hard cases, reductions, bad input.

What autograd and the compiler may do with them is in test_marginal_nll_autograd.py, what a GPU is
not asked in test_marginal_nll_blind.py.
"""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

import fastrag.functional as F
from fastrag import reference
from fastrag.testing import assert_close

from .cases import (
    IGNORE,
    LOSSES,
    MANY,
    ORACLES,
    SHAPES,
    Problem,
    both_marginals,
    grads,
    make,
    oracle,
    with_and_without_smoothing,
)


@both_marginals
@with_and_without_smoothing
def test_reference_gradcheck(marginal: str, smoothing: float) -> None:
    p = make((2, 3, 2, 3, 4), head="softcap", missing=False)

    def loss(hidden: Tensor, weight: Tensor, scores: Tensor, bias: Tensor) -> Tensor:
        head = {**p.head(), "bias": bias}
        return ORACLES[marginal](
            hidden, weight, p.labels, scores, **head, label_smoothing=smoothing
        )[0]

    assert torch.autograd.gradcheck(loss, (p.hidden, p.weight, p.doc_scores, p.bias))


@both_marginals
@with_and_without_smoothing
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_op_gradcheck(marginal: str, smoothing: float, reduction: str, workspace: str) -> None:
    p = make((2, 3, 2, 3, 4), head="softcap", missing=False)
    example_weight = torch.tensor([0.5, 2.0], dtype=torch.float64, requires_grad=True)

    def loss(hidden: Tensor, weight: Tensor, scores: Tensor, bias: Tensor, ew: Tensor) -> Tensor:
        options = {**p.head(), "bias": bias, "label_smoothing": smoothing, "reduction": reduction}
        return LOSSES[marginal](hidden, weight, p.labels, scores, **options, example_weight=ew)

    inputs = (p.hidden, p.weight, p.doc_scores, p.bias, example_weight)
    assert torch.autograd.gradcheck(loss, inputs)


@both_marginals
@with_and_without_smoothing
@pytest.mark.parametrize("head", ["plain", "bias", "softcap"])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
def test_float64(
    marginal: str, smoothing: float, head: str, shape: tuple[int, ...], workspace: str
) -> None:
    """In float64 the chunked op is the reference to rounding, values and gradients."""
    p = make(shape, head=head)
    loss, posterior = LOSSES[marginal](
        *p.args(), **p.head(), label_smoothing=smoothing, reduction="none", return_posterior=True
    )
    true, true_posterior = oracle(marginal, p, smoothing)
    torch.testing.assert_close(loss, true, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(posterior, true_posterior, rtol=1e-12, atol=1e-12)
    upstream = torch.randn_like(loss)
    found, expected = grads(loss, p, upstream), grads(true, p, upstream)
    mean = LOSSES[marginal](*p.args(), **p.head(), label_smoothing=smoothing)
    found_mean = grads(mean, p)
    expected_mean = grads(reference.reduce(oracle(marginal, p, smoothing)[0], p.labels), p)
    for name in expected:
        torch.testing.assert_close(found[name], expected[name], rtol=1e-11, atol=1e-12)
        torch.testing.assert_close(found_mean[name], expected_mean[name], rtol=1e-11, atol=1e-12)


@both_marginals
@with_and_without_smoothing
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("head", ["plain", "softcap"])
@pytest.mark.parametrize("size", [1.0, 20.0], ids=["logits ~4", "logits ~80"])
@pytest.mark.usefixtures("each_backend")
def test_three_way(
    marginal: str, smoothing: float, dtype: torch.dtype, head: str, size: float
) -> None:
    """Against float64 of the same inputs, no more error than plain torch in the same dtype."""
    p = make(MANY, head=head, scale=size).to(dtype)
    exact = p.to(torch.float64)
    loss = LOSSES[marginal](*p.args(), **p.head(), label_smoothing=smoothing)
    plain = reference.reduce(oracle(marginal, p, smoothing)[0], p.labels)
    true = reference.reduce(oracle(marginal, exact, smoothing)[0], exact.labels)
    assert loss.dtype == torch.float32
    assert_close(loss, plain.float(), true, name="loss")
    found, base, expected = grads(loss, p), grads(plain, p), grads(true, exact)
    for name in expected:
        assert found[name].dtype == dtype
        assert_close(found[name], base[name], expected[name], name=name)


ADVERSARIAL = ["offset", "certain", "uniform", "one-hot posterior", "duplicates", "far apart"]


@both_marginals
@with_and_without_smoothing
@pytest.mark.parametrize("kind", ADVERSARIAL)
@pytest.mark.usefixtures("each_backend")
def test_adversarial(marginal: str, smoothing: float, kind: str) -> None:
    p = make(MANY, head="bias")
    with torch.no_grad():
        if kind == "offset":
            p.bias += 1e4
        elif kind == "certain":  # every label has probability near 1
            p.weight.zero_()
            p.labels.clamp_(min=0).zero_()
            p.bias[0] += 30.0
        elif kind == "uniform":
            p.hidden.zero_(), p.bias.zero_(), p.doc_scores.zero_()
        elif kind == "one-hot posterior":
            p.doc_scores[:, 0] += 200.0
        elif kind == "duplicates":
            p.hidden.copy_(p.hidden[:, :1].expand_as(p.hidden).clone())
            p.doc_scores.zero_()
        else:  # exp(-max) underflows for most of the vocabulary
            p.bias.copy_(torch.linspace(-300, 300, len(p.bias)))
    p = p.to(torch.float32)
    exact = p.to(torch.float64)
    loss = LOSSES[marginal](*p.args(), **p.head(), label_smoothing=smoothing)
    plain = reference.reduce(oracle(marginal, p, smoothing)[0], p.labels)
    true = reference.reduce(oracle(marginal, exact, smoothing)[0], exact.labels)
    # A mean of log-probabilities per token, of which the prior alone has a few nats.
    assert_close(loss, plain, true, name="loss", scale=1.0)
    found, base, expected = grads(loss, p), grads(plain, p), grads(true, exact)
    for name in expected:
        # prior - posterior, each at most 1, over the number of labels that count
        scale = 1.0 / int((p.labels != IGNORE).sum()) if name == "doc_scores" else 0.0
        assert_close(found[name], base[name], expected[name], name=name, scale=scale)


@both_marginals
def test_equal_passages_share_equally(marginal: str, workspace: str) -> None:
    """However unlikely the target: rounding of a joint of -400 nats must not reach the weights."""
    p = make((2, 7, 60, 8, 997), padding=False, missing=False).to(torch.float32)
    # Whole numbers: the logits are exact in whatever order a BLAS adds them up.
    p.hidden = torch.randint(-3, 4, (2, 1, 60, 8)).float().expand(-1, 7, -1, -1)
    p.weight = torch.randint(-2, 3, (997, 8)).float()
    p.doc_scores = torch.full((2, 7), 3.3, requires_grad=True)
    loss, posterior = LOSSES[marginal](*p.args(), reduction="sum", return_posterior=True)
    assert loss > 400
    # Seven roundings in the sum over passages, one in the exponential and one in the logarithm.
    atol = 9 * torch.finfo(torch.float32).eps
    torch.testing.assert_close(
        posterior, torch.full_like(posterior, -math.log(7)), rtol=0, atol=atol
    )
    assert torch.autograd.grad(loss, p.doc_scores)[0].abs().max() < 1e-4


@both_marginals
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_nothing_counts(marginal: str, reduction: str, workspace: str) -> None:
    """All labels ignored: loss 0 and gradients 0, no NaN; the posterior is the prior."""
    p = make()
    p.labels.fill_(IGNORE)
    loss, posterior = LOSSES[marginal](*p.args(), reduction=reduction, return_posterior=True)
    assert (loss == 0).all()
    for grad in grads(loss.sum(), p).values():
        assert (grad == 0).all()
    prior = reference.log_prior(p.doc_scores)
    expected = prior if marginal == "sequence" else prior.unsqueeze(2).expand_as(posterior)
    torch.testing.assert_close(posterior, expected)


@both_marginals
@with_and_without_smoothing
def test_all_passages_missing(marginal: str, smoothing: float, workspace: str) -> None:
    """Such an example has loss 0 and gradient 0, and leaves the others as they are."""
    p = make()
    with torch.no_grad():
        p.doc_scores[1] = -torch.inf
        p.hidden[1] = torch.nan
    options = {"reduction": "none", "label_smoothing": smoothing}
    loss = LOSSES[marginal](*p.args(), **options)
    assert loss[1] == 0
    found = grads(loss.sum(), p)
    assert all(grad.isfinite().all() for grad in found.values())
    assert (found["hidden"][1] == 0).all() and (found["doc_scores"][1] == 0).all()
    alone = LOSSES[marginal](p.hidden[:1], p.weight, p.labels[:1], p.doc_scores[:1], **options)
    torch.testing.assert_close(loss[:1], alone, rtol=1e-13, atol=0)
    torch.testing.assert_close(found["weight"], torch.autograd.grad(alone.sum(), p.weight)[0])


@both_marginals
def test_missing_passage_is_absent(marginal: str, workspace: str) -> None:
    """A missing passage equals a smaller K, whatever its hidden states hold."""
    p = make(missing=False)
    with torch.no_grad():
        p.doc_scores[:, -1] = -torch.inf
        p.hidden[:, -1] = torch.nan
    loss = LOSSES[marginal](*p.args(), reduction="sum")
    found = grads(loss, p)
    fewer = LOSSES[marginal](
        p.hidden[:, :-1], p.weight, p.labels, p.doc_scores[:, :-1], reduction="sum"
    )
    torch.testing.assert_close(loss, fewer)
    assert (found["hidden"][:, -1] == 0).all() and (found["doc_scores"][:, -1] == 0).all()
    torch.testing.assert_close(found["weight"], torch.autograd.grad(fewer, p.weight)[0])


@both_marginals
def test_ignored_position_is_absent(marginal: str, workspace: str) -> None:
    """What stands at an ignored position is never read."""
    p = make()
    expected = LOSSES[marginal](*p.args())
    with torch.no_grad():
        p.hidden[0, :, -1] = torch.nan
    loss = LOSSES[marginal](*p.args())
    torch.testing.assert_close(loss, expected)
    assert (grads(loss, p)["hidden"][0, :, -1] == 0).all()


def test_one_passage_is_cross_entropy() -> None:
    p = make(SHAPES["one passage"])
    logits = (p.hidden @ p.weight.t()).view(-1, 6)
    expected = torch.nn.functional.cross_entropy(logits, p.labels.view(-1), ignore_index=IGNORE)
    for op in LOSSES.values():
        torch.testing.assert_close(op(*p.args()), expected)
        smooth = torch.nn.functional.cross_entropy(
            logits, p.labels.view(-1), ignore_index=IGNORE, label_smoothing=0.1
        )
        torch.testing.assert_close(op(*p.args(), label_smoothing=0.1), smooth)


def test_token_and_sequence_agree_on_one_token() -> None:
    p = make(SHAPES["one token"])
    torch.testing.assert_close(F.rag_token_nll(*p.args()), F.rag_sequence_nll(*p.args()))


@both_marginals
def test_reductions(marginal: str) -> None:
    p = make()
    nll = oracle(marginal, p)[0]
    weight = torch.tensor([0.5, 3.0], dtype=torch.float64)
    count = int((p.labels != IGNORE).sum())
    op = LOSSES[marginal]
    torch.testing.assert_close(op(*p.args()), nll.sum() / count)
    torch.testing.assert_close(op(*p.args(), reduction="sum"), nll.sum())
    torch.testing.assert_close(op(*p.args(), example_weight=weight), (weight * nll).sum() / count)
    torch.testing.assert_close(op(*p.args(), reduction="none", example_weight=weight), weight * nll)
    for normalizer in (20, 20.0, torch.tensor(20), torch.tensor([20.0])):
        torch.testing.assert_close(op(*p.args(), normalizer=normalizer), nll.sum() / 20)
    for nothing in (0, torch.tensor(0)):
        assert op(*p.args(), normalizer=nothing) == 0


@both_marginals
def test_accumulation_equals_one_batch(marginal: str) -> None:
    """Two micro-batches with the global count of tokens are one batch: loss and gradients."""
    p = make(SHAPES["odd"])
    count = (p.labels != IGNORE).sum()
    whole = LOSSES[marginal](*p.args())
    parts = [
        LOSSES[marginal](p.hidden[i], p.weight, p.labels[i], p.doc_scores[i], normalizer=count)
        for i in (slice(0, 1), slice(1, 3))
    ]
    torch.testing.assert_close(sum(parts), whole)
    expected = grads(whole, p)
    for name, grad in grads(sum(parts), p).items():
        torch.testing.assert_close(grad, expected[name])


@both_marginals
@with_and_without_smoothing
@pytest.mark.parametrize("sizes", [(0, 3, 4), (2, 3, 0), (0, 1, 0)], ids=str)
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_empty(marginal: str, smoothing: float, sizes: tuple[int, ...], reduction: str) -> None:
    p = make((*sizes, 5, 7), padding=False, missing=False)
    options = {"reduction": reduction, "label_smoothing": smoothing, "return_posterior": True}
    loss, posterior = LOSSES[marginal](*p.args(), **options)
    assert loss.shape == (sizes[:1] if reduction == "none" else ()) and (loss == 0).all()
    assert posterior.shape == (sizes if marginal == "token" else sizes[:2])
    assert all((grad == 0).all() for grad in grads(loss.sum(), p).values())


@both_marginals
def test_hugging_face_layout(marginal: str) -> None:
    p = make()
    flat = p.hidden.flatten(0, 1)
    expected = LOSSES[marginal](*p.args())
    torch.testing.assert_close(LOSSES[marginal](flat, *p.args()[1:]), expected)


@both_marginals
def test_strided_inputs(marginal: str) -> None:
    p = make(SHAPES["odd"], head="bias")
    expected = LOSSES[marginal](*p.args(), **p.head())
    expected_grads = grads(expected, p)
    strided = p.to(torch.float64)
    strided.hidden = p.hidden.detach().transpose(1, 2).contiguous().transpose(1, 2)
    strided.weight = p.weight.detach().t().contiguous().t()
    strided.doc_scores = p.doc_scores.detach().t().contiguous().t()
    strided.bias = p.bias.detach().repeat_interleave(2)[::2]
    strided.labels = p.labels.t().contiguous().t()
    for x in strided.leaves().values():
        assert not x.is_contiguous()
        x.requires_grad_()
    loss = LOSSES[marginal](*strided.args(), **strided.head())
    torch.testing.assert_close(loss, expected)
    for name, grad in grads(loss, strided).items():
        torch.testing.assert_close(grad, expected_grads[name])


@both_marginals
def test_mixed_dtypes(marginal: str) -> None:
    """Autocast: bfloat16 hidden states meet a float32 master weight, whose gradient is float32."""
    p = make(SHAPES["odd"]).to(torch.float32)
    hidden = p.hidden.detach().bfloat16().requires_grad_()
    exact = p.to(torch.float64)
    exact.hidden = hidden.detach().double().requires_grad_()
    true = reference.reduce(oracle(marginal, exact)[0], p.labels)
    plain_inputs = exact.to(torch.float32)
    plain = reference.reduce(oracle(marginal, plain_inputs)[0], p.labels)
    expected, base = grads(true, exact), grads(plain, plain_inputs)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = LOSSES[marginal](hidden, *p.args()[1:])
    loss.backward()
    assert_close(loss, plain, true, name="loss", scale=1.0)
    scale = 1.0 / int((p.labels != IGNORE).sum())  # of differences of probabilities
    assert_close(p.weight.grad, base["weight"], expected["weight"], name="weight", scale=scale)
    assert hidden.grad.dtype == torch.bfloat16
    assert_close(hidden.grad, base["hidden"].bfloat16(), expected["hidden"], name="hidden")


@both_marginals
def test_float16_under_a_loss_scale(marginal: str) -> None:
    """Gradients below the range of float16 survive until GradScaler's factor has been applied."""
    p = make(SHAPES["odd"], missing=False).to(torch.float16)
    with torch.no_grad():
        p.doc_scores[:, 1:] -= 10.0  # posteriors near 1e-5
        p.weight *= 0.1
    exact = p.to(torch.float64)
    found = grads(LOSSES[marginal](*p.args()) * 65536.0, p)["hidden"]
    true = grads(reference.reduce(oracle(marginal, exact)[0], p.labels) * 65536.0, exact)["hidden"]
    count = (p.labels != IGNORE).sum()
    unscaled = true[:, 1:].abs() * count / 65536.0
    assert unscaled.median() < torch.finfo(torch.float16).smallest_normal
    torch.testing.assert_close(found.double(), true, rtol=2e-3, atol=1e-7)


def bad(**changes: object) -> tuple[Problem, dict[str, object]]:
    p = make()
    fields = {k: v for k, v in changes.items() if hasattr(p, k)}
    for name, value in fields.items():
        setattr(p, name, value)
    return p, {**p.head(), **{k: v for k, v in changes.items() if k not in fields}}


NAN_SCORES = torch.tensor([[0.0, 1.0, 2.0], [0.0, torch.nan, 1.0]], dtype=torch.float64)
BAD_LABELS = torch.tensor([[0, 1, 2, 3], [0, 1, 7, IGNORE]])


@both_marginals
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden": torch.zeros(2, 4, 4, 5)}, r"hidden: expected \[B, K, T, H\].*\[2, 4, 4, 5\]"),
        ({"hidden": torch.zeros(5, 4, 5)}, r"hidden: expected \[B\*K, T, H\].*\[6, \*, \*\]"),
        ({"hidden": [1.0]}, "hidden: expected a tensor, got list"),
        ({"hidden": torch.zeros(2, 3, 4, 5).long()}, "hidden: expected a floating point dtype"),
        ({"weight": torch.zeros(7, 6)}, r"weight: expected \[V, H\] .*\[\*, 5\], got \[7, 6\]"),
        ({"weight": torch.zeros(0, 5)}, "weight: expected V and H of at least 1"),
        ({"labels": torch.zeros(2, 3).long()}, r"labels: expected \[B, T\].*\[2, 4\], got \[2, 3"),
        ({"labels": torch.zeros(2, 4)}, "labels: expected int64, got .* float32"),
        ({"labels": BAD_LABELS}, r"labels: expected values in \[0, 7\).* got 7 at \[1, 2\]"),
        ({"labels": -BAD_LABELS}, r"labels: expected values in \[0, 7\).* got -1 at \[0, 1\]"),
        ({"doc_scores": torch.zeros(2, 0)}, "doc_scores: expected at least one passage.*K = 0"),
        ({"doc_scores": torch.zeros(2)}, r"doc_scores: expected \[B, K\], got \[2\]"),
        ({"doc_scores": NAN_SCORES}, r"doc_scores: expected finite values.* got nan at \[1, 1\]"),
        ({"doc_scores": -torch.log(NAN_SCORES * 0)}, r"doc_scores.* got inf at \[0, 0\]"),
        ({"bias": torch.zeros(6)}, r"bias: expected \[V\] with sizes \[7\], got \[6\]"),
        ({"softcap": 0.0}, "softcap: expected a positive number or None, got 0.0"),
        ({"logit_scale": math.nan}, "logit_scale: expected a finite number"),
        ({"label_smoothing": 1.0}, r"label_smoothing: expected a number in \[0, 1\)"),
        ({"reduction": "avg"}, "reduction: expected 'mean', 'sum' or 'none', got 'avg'"),
        ({"label_smoothing": "x"}, r"label_smoothing: expected a number in \[0, 1\), got 'x'"),
        ({"logit_scale": "x"}, "logit_scale: expected a finite number, got 'x'"),
        ({"softcap": "x"}, "softcap: expected a positive number or None, got 'x'"),
        ({"ignore_index": 1.5}, "ignore_index: expected a whole number, got 1.5"),
        ({"normalizer": "x"}, "normalizer: expected a number of at least 0, got 'x'"),
        ({"normalizer": -1.0}, "normalizer: expected a number of at least 0"),
        ({"normalizer": torch.tensor(-1.0)}, "normalizer: expected a number of at least 0, got -1"),
        ({"normalizer": torch.ones(2)}, "normalizer: expected a number or a 0-d tensor"),
        ({"normalizer": 3, "reduction": "sum"}, "normalizer: expected None with reduction 'sum'"),
        ({"example_weight": torch.ones(3)}, r"example_weight: expected \[B\] with sizes \[2\]"),
        ({"valid_rows": torch.zeros(3)}, "valid_rows: expected int64 or int32"),
        ({"weight": torch.zeros(7, 5, device="meta")}, "expected all tensors on one device"),
    ],
)
def test_rejects_bad_input(marginal: str, changes: dict[str, object], message: str) -> None:
    p, options = bad(**changes)
    with pytest.raises(ValueError, match=message):
        LOSSES[marginal](*p.args(), **options)


def test_forced_backend(monkeypatch: pytest.MonkeyPatch) -> None:
    p = make()
    monkeypatch.setenv("FASTRAG_BACKEND", "torch")
    F.rag_token_nll(*p.args())
    monkeypatch.setenv("FASTRAG_BACKEND", "triton")
    with pytest.raises(RuntimeError, match="FASTRAG_BACKEND=triton cannot run marginal_nll"):
        F.rag_token_nll(*p.args())
    monkeypatch.setenv("FASTRAG_BACKEND", "cuda")
    with pytest.raises(
        RuntimeError, match="^FASTRAG_BACKEND: no backend is called 'cuda'; backends: triton, cpp, "
    ):
        F.rag_token_nll(*p.args())
