"""The objectives of RagLoss equal their literal references, in value and in every gradient."""

from __future__ import annotations

import pytest
import torch

from fastrag import RagLoss, reference
from fastrag.nn import LMHead
from fastrag.nn.objectives import JSA, MAX_RATIO, RetrieverTerm, objective_words

OBJECTIVES = ("emdr2", "pdist", "replug")
REFERENCE = {"token": reference.rag_token_nll, "sequence": reference.rag_sequence_nll}
IGNORE = -100


def case(dtype=torch.float64):
    """Examples: plain, one passage missing, no label, all passages missing."""
    torch.manual_seed(0)
    hidden = (2.0 * torch.randn(4, 3, 4, 5, dtype=dtype)).requires_grad_()
    weight = torch.randn(11, 5, dtype=dtype, requires_grad=True)
    bias = torch.randn(11, dtype=dtype, requires_grad=True)
    scores = torch.randn(4, 3, dtype=dtype)
    scores[1, 0] = -torch.inf
    scores[3] = -torch.inf
    scores.requires_grad_()
    labels = torch.tensor([[1, 2, 3, 9], [4, IGNORE, 5, IGNORE], [IGNORE] * 4, [1, 2, 3, 4]])
    return (
        hidden,
        LMHead(weight, bias, softcap=4.0, logit_scale=1.3),
        labels,
        scores.requires_grad_(),
    )


def expected_loss(marginal, objective, generator_loss, inputs, weights, reduction, tau_lm):
    hidden, head, labels, scores = inputs
    settings = (head.bias, head.softcap, head.logit_scale)
    nll, _ = REFERENCE[marginal](hidden, head.weight, labels, scores.detach(), *settings)
    logp = reference.token_logp(hidden, head.weight, labels, *settings)
    term = reference.retriever_term(objective, scores, logp, labels != IGNORE, tau_lm)
    total = term if generator_loss == "none" else nll + term
    return reference.reduce(total, labels, reduction, None, weights)


def gradients(loss, inputs):
    hidden, head, _, scores = inputs
    leaves = (hidden, head.weight, head.bias, scores)
    found = torch.autograd.grad(loss.sum(), leaves, allow_unused=True)
    return [torch.zeros_like(x) if g is None else g for x, g in zip(leaves, found, strict=True)]


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("generator_loss", ["marginal", "none"])
@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("marginal", ["token", "sequence"])
def test_equals_the_reference(marginal, objective, generator_loss, reduction):
    inputs = case()
    weights = torch.tensor([1.0, 3.0, 0.5, 2.0], dtype=torch.float64)
    loss_fn = RagLoss(
        marginal, objective, tau_lm=0.7, generator_loss=generator_loss, reduction=reduction
    )
    loss = loss_fn(*inputs, example_weight=weights).loss
    expected = expected_loss(marginal, objective, generator_loss, inputs, weights, reduction, 0.7)
    torch.testing.assert_close(loss, expected)
    for got, want in zip(gradients(loss, inputs), gradients(expected, inputs), strict=True):
        torch.testing.assert_close(got, want)


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_each_term_reaches_its_own_side(objective):
    inputs = case()
    hidden, head, labels, scores = inputs
    dhidden, dweight, _, dscores = gradients(
        RagLoss("token", objective, generator_loss="none")(*inputs).loss, inputs
    )
    assert not dhidden.any() and not dweight.any() and dscores.abs().max() > 1e-3
    # The generator's gradient is that of the marginal likelihood under a prior held fixed.
    fixed = RagLoss("token")(hidden, head, labels, scores.detach()).loss
    both = RagLoss("token", objective, generator_loss="marginal")(*inputs).loss
    for got, want in zip(gradients(both, inputs)[:3], gradients(fixed, inputs)[:3], strict=True):
        torch.testing.assert_close(got, want)


def test_replug_leaves_the_generator_alone_by_default():
    inputs = case()
    assert RagLoss(objective="replug").generator_loss == "none"
    assert not gradients(RagLoss(objective="replug")(*inputs).loss, inputs)[0].any()


def test_emdr2_over_the_token_marginal_is_the_joint_gradient():
    inputs = case()
    joint = RagLoss("token")(*inputs).loss
    emdr2 = RagLoss("token", "emdr2")(*inputs).loss
    torch.testing.assert_close(emdr2, 2 * joint)
    for got, want in zip(gradients(emdr2, inputs), gradients(joint, inputs), strict=True):
        torch.testing.assert_close(got, want)


@pytest.mark.parametrize("word", ["pdist", "replug"])
def test_divergence_vanishes_where_the_retriever_agrees(word):
    counts = torch.tensor([[True, True, False]])
    logp = torch.randn(1, 4, 3, dtype=torch.float64)
    said = (logp * counts).sum(2) / (1 if word == "pdist" else 2)
    scores = (said + 3.0).requires_grad_()
    value = RetrieverTerm.named(word)(scores, logp, counts)
    (grad,) = torch.autograd.grad(value.sum(), scores)
    torch.testing.assert_close(value, torch.zeros_like(value))
    torch.testing.assert_close(grad, torch.zeros_like(grad))


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_far_apart_passages_stay_finite(objective):
    """A posterior of 0 and 1 in float32, and a prior that says the opposite."""
    logp = torch.tensor([[[-500.0], [-0.1]]])
    scores = torch.tensor([[100.0, -100.0]], requires_grad=True)
    term = RetrieverTerm.named(objective)
    value = term(scores, logp, torch.ones(1, 1, dtype=torch.bool))
    (grad,) = torch.autograd.grad(value.sum(), scores)
    assert value.isfinite().all() and grad.isfinite().all() and grad[0, 1] < 0 < grad[0, 0]


def test_a_term_from_outside_with_a_parameter_of_its_own(monkeypatch):
    monkeypatch.setattr(RetrieverTerm, "_known", dict(RetrieverTerm._known))

    class Margin(RetrieverTerm, word="margin"):
        """The best passage by the generator is to score above all others by a learned margin."""

        def __init__(self, tau_lm=1.0):
            super().__init__(tau_lm)
            self.margin = torch.nn.Parameter(torch.tensor(1.0, dtype=torch.float64))

        def forward(self, doc_scores, token_logp, label_mask):
            best = (token_logp * label_mask[:, None]).sum(2).argmax(1, keepdim=True)
            scores = doc_scores.clamp(min=-9.0)
            return (self.margin + scores - scores.gather(1, best)).relu().sum(1)

    inputs = case()
    assert "margin" in objective_words()
    for loss_fn in (RagLoss(objective="margin"), RagLoss(objective=Margin())):
        assert loss_fn.objective == "margin"
        loss_fn(*inputs).loss.backward()
        assert [p.grad > 0 for p in loss_fn.parameters()] == [True]
    dhidden, *_, dscores = gradients(RagLoss(objective="margin")(*inputs).loss, inputs)
    fixed = RagLoss()(*inputs[:3], inputs[3].detach()).loss
    torch.testing.assert_close(dhidden, torch.autograd.grad(fixed, inputs[0])[0])
    assert dscores.any()


def differences(got, want, inputs):
    torch.testing.assert_close(got, want)
    for one, other in zip(gradients(got, inputs), gradients(want, inputs), strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("n_read", [1, 2, 3])
@pytest.mark.parametrize("marginal", ["token", "sequence"])
def test_straight_through_equals_the_reference(marginal, n_read):
    inputs = case()
    hidden, head, labels, scores = inputs
    read = scores.detach().argsort(1, descending=True).argsort(1) < n_read
    kept = scores.detach().masked_fill(~read, -torch.inf)
    settings = (head.bias, head.softcap, head.logit_scale)
    nll, _ = REFERENCE[marginal](hidden, head.weight, labels, kept, *settings)
    logp = reference.token_logp(hidden, head.weight, labels, *settings)
    term = reference.straight_through_term(scores, logp, labels != IGNORE, n_read, marginal)
    want = reference.reduce(nll + term, labels)
    loss_fn = RagLoss(marginal, f"topk:{n_read}")
    differences(loss_fn(*inputs).loss, want, inputs)
    if n_read == 3:  # all passages: nothing is chosen, and the gradient is that of the marginal
        both = [gradients(each(*inputs).loss, inputs) for each in (loss_fn, RagLoss(marginal))]
        for one, other in zip(*both, strict=True):
            torch.testing.assert_close(one, other)


def test_straight_through_bounds_what_was_not_read():
    logp = torch.tensor([[[-50.0], [-0.1]]])
    scores = torch.tensor([[1.0, 0.0]], requires_grad=True)
    term = RetrieverTerm.named("topk:1")(scores, logp, torch.ones(1, 1, dtype=torch.bool))
    (grad,) = torch.autograd.grad(term.sum(), scores)
    prior = scores.detach().softmax(1)[0]
    assert term.item() == pytest.approx(50.0)
    torch.testing.assert_close(grad[0, 1], -prior[1] * prior[0] * (MAX_RATIO - 1.0))


@pytest.mark.parametrize("posterior", [True, False])
def test_jsa_equals_the_reference(posterior):
    inputs = case()
    hidden, head, labels, scores = inputs
    learned = torch.randn_like(scores).masked_fill(scores.isneginf(), -torch.inf).detach()
    q_scores = learned.requires_grad_() if posterior else scores
    loss_fn = RagLoss("sequence", "jsa:9")
    torch.manual_seed(1)
    given = {"posterior_scores": q_scores} if posterior else {}
    got = loss_fn(*inputs, **given).loss
    logp = reference.token_logp(
        hidden, head.weight, labels, head.bias, head.softcap, head.logit_scale
    )
    likelihood = (logp * (labels != IGNORE).unsqueeze(1)).sum(2)
    alive = scores.detach().isfinite()
    prior, q = (
        torch.where(alive.any(1, keepdim=True), each, 0.0).log_softmax(1)
        for each in (scores, q_scores)
    )
    torch.manual_seed(1)
    proposals = q.detach().exp().multinomial(9, replacement=True)
    uniforms = torch.rand_like(proposals, dtype=torch.float64)
    shares = reference.independence_shares(
        (prior + likelihood).detach(), q.detach(), proposals, uniforms
    )
    shares[2:] = 0.0  # no label, no passage
    wanted = likelihood + prior + (q if posterior else 0.0)
    want = reference.reduce(-torch.where(shares > 0, shares * wanted, 0.0).sum(1), labels)
    if posterior:
        one, other = (torch.autograd.grad(x, q_scores, retain_graph=True)[0] for x in (got, want))
        torch.testing.assert_close(one, other)
    differences(got, want, inputs)


def test_jsa_chain_converges_to_the_posterior():
    torch.manual_seed(0)
    scores, logp = torch.randn(3, 5), -3.0 * torch.rand(3, 5, 2)
    counts = torch.ones(3, 2, dtype=torch.bool)
    shares = JSA(n_steps=20_000).draw(scores, logp, counts, torch.randn(3, 5))
    torch.testing.assert_close(
        shares, (scores.log_softmax(1) + logp.sum(2)).softmax(1), rtol=0, atol=0.03
    )


def test_number_after_the_word():
    assert RagLoss(objective="topk:4").objective == "topk:4"
    assert RagLoss("sequence", "jsa").objective == "jsa:50"
    for objective, message in (
        ("pdist:3", "objective: expected pdist without a number, got 'pdist:3'"),
        ("topk:0", "objective: expected topk:<n_read>, an integer >= 1, got 'topk:0'"),
        ("topk:x", "objective: expected topk:<n_read>, an integer >= 1, got 'topk:x'"),
    ):
        with pytest.raises(ValueError, match=message):
            RagLoss(objective=objective)
    with pytest.raises(ValueError, match="marginal: expected 'sequence' with the objective jsa"):
        RagLoss("token", "jsa")


def test_rejects_words_and_numbers():
    with pytest.raises(ValueError, match="objective: expected a word or a RetrieverTerm, got int"):
        RagLoss(objective=3)
    with pytest.raises(ValueError, match="objective: expected one of .*'replug'.*, got 'x'"):
        RagLoss(objective="x")
    with pytest.raises(ValueError, match="generator_loss: expected one of .*, got 'frozen'"):
        RagLoss(generator_loss="frozen")
    with pytest.raises(ValueError, match=r"tau_lm: expected a positive number, got 0\.0"):
        RagLoss(objective="pdist", tau_lm=0.0)
