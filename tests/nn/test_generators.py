"""Adapters against the models' own logits: values, gradients, padding, refusals."""

from __future__ import annotations

import copy
import dataclasses

import pytest
import torch
from peft import LoraConfig, PrefixTuningConfig, PromptTuningConfig, get_peft_model
from torch import nn
from transformers import BertConfig, BertLMHeadModel, BertModel

from fastrag import functional, reference
from fastrag.nn import LMHead, adapt_generator, generators
from tests.architectures import GENERATORS, context, generator
from tests.tiny import CHECKPOINTING, VOCAB

# B = 2 questions, K = 3 contexts each, T = 4 labels; the second answer has two tokens.
LENGTHS = [5, 3, 6, 2, 6, 4]
LABELS = torch.tensor([[7, 9, 11, 2], [5, 2, -100, -100]])
SCORES = torch.tensor([[0.3, -0.2, 0.9], [1.0, 0.1, -torch.inf]], dtype=torch.float64)
NLL = {
    "token": (functional.rag_token_nll, reference.rag_token_nll),
    "sequence": (functional.rag_sequence_nll, reference.rag_sequence_nll),
}
CAUSAL = ["gpt2", "llama", "qwen3", "gemma2", "granite", "cohere", "phi"]


def own_logits(model, kind, ids, mask, labels):
    """The model's own logits [B, K, T, V] at the labels, from its plain forward."""
    n_docs = ids.shape[0] // labels.shape[0]
    known = labels.masked_fill(labels == -100, 0).repeat_interleave(n_docs, dim=0)
    if kind == "seq2seq":
        start = model.config.decoder_start_token_id
        shifted = torch.cat([torch.full((len(known), 1), start), known[:, :-1]], dim=1)
        out = model(input_ids=ids, attention_mask=mask, decoder_input_ids=shifted).logits
    else:
        counted = (labels != -100).repeat_interleave(n_docs, dim=0).long()
        full = torch.cat([mask, counted], dim=1)
        positions = (full.cumsum(dim=1) - 1).clamp(min=0)
        joined = torch.cat([ids, known], dim=1)
        out = model(input_ids=joined, attention_mask=full, position_ids=positions).logits
        out = out[:, -labels.shape[1] - 1 : -1]
    return out.unflatten(0, (labels.shape[0], n_docs))


def adapter_loss(model, marginal, head=None):
    adapter = adapt_generator(model)
    ids, mask = context(adapter.kind, LENGTHS)
    head = head or adapter.head()
    return NLL[marginal][0](
        adapter.hidden(ids, mask, LABELS),
        head.weight,
        LABELS,
        SCORES,
        bias=head.bias,
        softcap=head.softcap,
        logit_scale=head.logit_scale,
    )


def own_loss(model, marginal):
    """The same loss from the model's own logits: an identity head over the vocabulary."""
    kind = adapt_generator(model).kind
    logits = own_logits(model, kind, *context(kind, LENGTHS), LABELS)
    eye = torch.eye(logits.shape[-1], dtype=logits.dtype)
    return NLL[marginal][1](logits, eye, LABELS, SCORES)[0].sum() / (LABELS != -100).sum()


@pytest.mark.parametrize("marginal", ["token", "sequence"])
@pytest.mark.parametrize("name", GENERATORS)
def test_loss_and_gradients_equal_own_logits(name, marginal):
    model = generator(name)
    trained = {k: p for k, p in model.named_parameters() if p.requires_grad}
    expected = own_loss(model, marginal)
    wanted = torch.autograd.grad(expected, list(trained.values()), allow_unused=True)
    got = adapter_loss(model, marginal)
    gradients = torch.autograd.grad(got, list(trained.values()), allow_unused=True)
    torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-12)
    reached = 0
    for parameter, gradient, want in zip(trained, gradients, wanted, strict=True):
        if want is None:  # BERT's pooler
            assert gradient is None, parameter
            continue
        reached += bool(want.any())
        # Some norms work in float32 inside; a last bit there may fall either way.
        torch.testing.assert_close(
            gradient, want, rtol=1e-6, atol=1e-8, msg=lambda m, name=parameter: f"{name}: {m}"
        )
    assert reached > 5


@pytest.mark.parametrize("name", GENERATORS)
def test_logits_are_large_enough_to_tell(name):
    """The comparison would not see a softcap or scale on the tiny logits of a fresh model."""
    model = generator(name)
    kind = adapt_generator(model).kind
    largest = own_logits(model, kind, *context(kind, LENGTHS), LABELS).abs().max()
    assert largest > (2.9 if name == "gemma2" else 0.5)


PARTS = {
    "logit_scale": (["granite", "cohere"], 1.0),
    "bias": (["bart", "mbart", "marian", "pegasus", "phi", "encoder_decoder_bert"], None),
    "softcap": (["gemma2"], None),
}


@pytest.mark.parametrize(
    ("name", "part"), [(name, part) for part, (names, _) in PARTS.items() for name in names]
)
def test_deleting_a_part_of_the_head_shows(name, part):
    model = generator(name)
    head = adapt_generator(model).head()
    broken = dataclasses.replace(head, **{part: PARTS[part][1]})
    assert getattr(broken, part) != getattr(head, part) if part != "bias" else head.bias.any()
    expected = own_loss(model, "token")
    assert (adapter_loss(model, "token", broken) - expected).abs() > 1e-4
    torch.testing.assert_close(adapter_loss(model, "token", head), expected)


@pytest.mark.parametrize("name", GENERATORS)
def test_batch_equals_one_by_one(name):
    """Padding of contexts and answers changes nothing."""
    model = generator(name)
    adapter = adapt_generator(model)
    ids, mask = context(adapter.kind, LENGTHS)
    together = adapter.hidden(ids, mask, LABELS)
    n_docs = len(LENGTHS) // len(LABELS)
    for b, labels in enumerate(LABELS):
        labels = labels[labels != -100]
        for k in range(n_docs):
            row = mask[b * n_docs + k].bool()
            alone = adapter.hidden(
                ids[b * n_docs + k][row][None], mask[b * n_docs + k][row][None], labels[None]
            )
            torch.testing.assert_close(
                together[b, k, : len(labels)], alone[0, 0], rtol=1e-9, atol=1e-10
            )


@pytest.mark.parametrize("name", ["gpt2", "t5_tied"])
def test_interior_labels_do_not_leak(name):
    """The state that predicts label t does not know label t."""
    adapter = adapt_generator(generator(name))
    ids, mask = context(adapter.kind, LENGTHS)
    other = LABELS.clone()
    other[0, 2] = 12
    change = (adapter.hidden(ids, mask, LABELS) - adapter.hidden(ids, mask, other))[0].abs()
    assert change[:, :3].max() == 0
    assert change[:, 3].max() > 0


@pytest.mark.parametrize("name", ["bart", "llama"])
def test_head_is_live(name):
    """After new weights, a resize or a tie the head is the model's head."""
    model = generator(name)
    adapter = adapt_generator(model)
    before = adapter.head().weight.clone()
    model.load_state_dict(generator(name, seed=5).state_dict())
    assert not torch.equal(adapter.head().weight, before)
    assert adapter.head().weight is model.get_output_embeddings().weight
    model.resize_token_embeddings(VOCAB + 3)
    assert adapter.head().weight.shape[0] == VOCAB + 3
    assert adapter.head().bias is None or adapter.head().bias.shape == (VOCAB + 3,)
    model.to(torch.float32)
    assert adapter.head().weight.dtype == torch.float32


@pytest.mark.parametrize("name", ["bart", "gpt2"])
def test_gradient_checkpointing_passes_through(name):
    model = generator(name).train()
    torch.manual_seed(0)  # dropout is on
    plain = adapter_loss(model, "token")
    wanted = torch.autograd.grad(plain, list(model.parameters()), allow_unused=True)
    getattr(model, CHECKPOINTING + "_enable")()
    torch.manual_seed(0)
    loss = adapter_loss(model, "token")
    gradients = torch.autograd.grad(loss, list(model.parameters()), allow_unused=True)
    for gradient, want in zip(gradients, wanted, strict=True):
        assert (gradient is None) == (want is None)
        if want is not None:
            torch.testing.assert_close(gradient, want)


def test_construction_leaves_mode_and_random_state():
    torch.manual_seed(3)
    model = GENERATORS["bart"]().train()
    model.model.encoder.eval()
    modes = {name: part.training for name, part in model.named_modules()}
    state = torch.get_rng_state()
    adapt_generator(model)
    assert torch.equal(torch.get_rng_state(), state)
    assert modes == {name: part.training for name, part in model.named_modules()}
    assert all(parameter.grad is None for parameter in model.parameters())
    assert not model.get_output_embeddings()._forward_pre_hooks


def test_full_logits_are_not_made(monkeypatch):
    """The projection sees one position of one row, whatever the batch."""
    model = generator("llama")
    adapter = adapt_generator(model)
    seen = []
    head = model.get_output_embeddings()
    monkeypatch.setattr(
        head, "forward", lambda x: seen.append(x.shape) or nn.Linear.forward(head, x)
    )
    adapter.hidden(*context("causal", LENGTHS), LABELS)
    assert [tuple(shape) for shape in seen] == [(1, 1, 16)]


def test_mismatch_names_the_architecture(monkeypatch):
    model = generator("llama")
    plain = type(model).forward

    def twisted(self, *args, **kwargs):
        out = plain(self, *args, **kwargs)
        out.logits = out.logits.roll(1, dims=-1)
        return out

    monkeypatch.setattr(type(model), "forward", twisted)
    with pytest.raises(ValueError, match="LlamaForCausalLM gives other logits"):
        adapt_generator(model)


def test_undeclared_softcap_is_found_out(monkeypatch):
    """A softcap that the configuration does not state shows only with loud logits."""
    model = GENERATORS["llama"]().eval()
    plain = type(model).forward

    def capped(self, *args, **kwargs):
        out = plain(self, *args, **kwargs)
        out.logits = 100 * torch.tanh(out.logits / 100)
        return out

    monkeypatch.setattr(type(model), "forward", capped)
    with pytest.raises(ValueError, match="LlamaForCausalLM gives other logits"):
        adapt_generator(model)


def by_accelerate(model):
    model._original_forward = model.forward  # as Accelerator(mixed_precision="bf16").prepare does
    return model


def in_place(model):
    model.compile()
    return model


@pytest.mark.parametrize(
    ("wrap", "got"),
    [
        (torch.compile, "OptimizedModule around GPT2LMHeadModel"),
        (nn.DataParallel, "DataParallel around GPT2LMHeadModel"),
        (in_place, "a compiled GPT2LMHeadModel"),
        (by_accelerate, "GPT2LMHeadModel with the forward of accelerate"),
    ],
)
def test_refuses_a_wrapped_model(wrap, got):
    advice = "adapt before accelerator.prepare or torch.compile"
    with pytest.raises(ValueError, match=f"^generator: expected a plain .*, got {got}; {advice}$"):
        adapt_generator(wrap(generator("gpt2")))


def test_refuses_a_model_without_weights():
    with pytest.raises(ValueError, match="^generator: .* got GPT2LMHeadModel on the meta device$"):
        adapt_generator(generator("gpt2").to("meta"))


def test_refuses_what_is_not_a_generator():
    config = BertConfig(
        vocab_size=9, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8
    )
    with pytest.raises(ValueError, match="generator: expected .* head, got BertModel"):
        adapt_generator(BertModel(config))
    with pytest.raises(ValueError, match="causal decoder, got BertLMHeadModel"):
        adapt_generator(BertLMHeadModel(config))
    with pytest.raises(ValueError, match="generator: expected a transformers model .* Linear"):
        adapt_generator(nn.Linear(2, 2))


def test_context_rows_must_match_labels():
    adapter = adapt_generator(generator("llama"))
    ids, mask = context("causal", [3, 4, 5])
    with pytest.raises(ValueError, match=r"context_ids: expected \[B\*K, L\] with B = 2"):
        adapter.hidden(ids, mask, LABELS)


def test_labels_outside_the_vocabulary_never_reach_an_embedding(monkeypatch):
    """On a GPU they would be a device-side fault; there the loss becomes NaN instead."""
    for name, kind in (("t5_tied", "seq2seq"), ("gpt2", "causal")):
        adapter = adapt_generator(generator(name))
        ids, mask = context(kind, [3, 4])
        for bad in (VOCAB, -5):
            labels = torch.tensor([[bad, 5], [6, 7]])
            with pytest.raises(ValueError, match=rf"labels: .* \[0, {VOCAB}\) .* {bad} at"):
                adapter.hidden(ids, mask, labels)
            with monkeypatch.context() as off_the_cpu:
                off_the_cpu.setattr(
                    generators, "check_label_values", lambda x, *_: (x < 0) | (x >= VOCAB)
                )
                assert adapter.hidden(ids, mask, labels).isfinite().all()


def test_answers_must_fit_the_positions_behind_the_context():
    adapter = adapt_generator(generator("gpt2"))  # 64 positions
    ids, mask = context("causal", [60])
    labels = torch.full((1, 5), 7)
    assert adapter.hidden(ids, mask, labels).isfinite().all()
    with pytest.raises(ValueError, match="labels: expected at most 5 tokens .* of 60 in"):
        adapter.hidden(ids, mask, torch.full((1, 6), 7))


@pytest.mark.parametrize(
    "labels", [LABELS[0], LABELS.float(), LABELS.int(), LABELS[:, :0]], ids=["1d", "f", "i32", "T0"]
)
def test_labels_of_another_shape_or_dtype(labels):
    adapter = adapt_generator(generator("llama"))
    ids, mask = context("causal", [3, 4])
    with pytest.raises(ValueError, match=r"labels: expected int64 \[B, T\]|context_ids: exp"):
        adapter.hidden(ids, mask, labels)


# PEFT


def lora(model, **settings):
    settings = {"r": 3, "lora_alpha": 6, "init_lora_weights": False, **settings}
    torch.manual_seed(11)
    return get_peft_model(model, LoraConfig(**settings)).double().eval()


@pytest.mark.parametrize(
    ("name", "targets"),
    [
        ("llama", ["q_proj", "down_proj"]),
        ("llama", ["q_proj", "lm_head"]),
        ("gemma2", ["lm_head"]),
        ("t5_untied", ["q", "lm_head"]),
        ("bart", ["q_proj", "lm_head"]),
    ],
)
@pytest.mark.parametrize("rslora", [False, True], ids=["lora", "rslora"])
@pytest.mark.filterwarnings("ignore:.*tie:UserWarning")
def test_lora_body_and_head(name, targets, rslora):
    model = lora(generator(name), target_modules=targets, use_rslora=rslora)
    trained = [p for p in model.parameters() if p.requires_grad]
    expected = own_loss(model, "sequence")
    wanted = torch.autograd.grad(expected, trained)
    got = adapter_loss(model, "sequence")
    gradients = torch.autograd.grad(got, trained)
    torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-12)
    for gradient, want in zip(gradients, wanted, strict=True):
        assert want.any()
        torch.testing.assert_close(gradient, want, rtol=1e-8, atol=1e-10)
    if "lm_head" in targets:
        base = model.get_base_model().get_output_embeddings().base_layer.weight
        plain = dataclasses.replace(adapt_generator(model).head(), weight=base)
        assert (adapter_loss(model, "sequence", plain) - expected).abs() > 1e-4


def test_modules_to_save_head():
    model = lora(generator("qwen3"), target_modules=["q_proj"], modules_to_save=["lm_head"])
    with torch.no_grad():
        model.get_base_model().lm_head.modules_to_save["default"].weight.mul_(1.5)
    trained = [p for p in model.parameters() if p.requires_grad]
    expected = own_loss(model, "token")
    wanted = torch.autograd.grad(expected, trained)
    got = adapter_loss(model, "token")
    torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-12)
    for gradient, want in zip(torch.autograd.grad(got, trained), wanted, strict=True):
        torch.testing.assert_close(gradient, want, rtol=1e-8, atol=1e-10)


def test_disabled_adapter_gives_the_base_head():
    model = lora(generator("llama"), target_modules=["lm_head"])
    adapter = adapt_generator(model)
    base = model.get_base_model().get_output_embeddings().base_layer.weight
    assert not torch.equal(adapter.head().weight, base)
    with model.disable_adapter():
        assert adapter.head().weight is base


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"lora_dropout": 0.1}, "expected lora_dropout=0 .* LlamaForCausalLM, got 0.1"),
        ({"use_dora": True}, "expected plain LoRA .* got DoraLinearVariant"),
        ({"lora_bias": True}, "expected lora_bias=False"),
    ],
)
def test_refuses_lora_variants_on_the_head(settings, message):
    body = lora(generator("llama"), target_modules=["q_proj"], **{**settings, "lora_bias": False})
    adapt_generator(body)  # on the body they are the model's own affair
    if settings.get("lora_bias"):
        base = generator("phi")  # a bias needs a head with one
        message = message + ".* PhiForCausalLM"
    else:
        base = generator("llama")
    with pytest.raises(ValueError, match=message):
        adapt_generator(lora(base, target_modules=["lm_head"], **settings))


@pytest.mark.parametrize(
    "config",
    [
        PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2),
        PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2),
    ],
    ids=["prompt", "prefix"],
)
def test_refuses_prompt_learning(config):
    model = get_peft_model(generator("llama"), copy.deepcopy(config))
    with pytest.raises(ValueError, match=f"prompt-learning .* {config.peft_type.value}"):
        adapt_generator(model)


def test_head_logits_are_the_equation():
    head = LMHead(torch.eye(3), torch.tensor([1.0, 0.0, -1.0]), softcap=2.0, logit_scale=0.5)
    hidden = torch.tensor([[4.0, -2.0, 0.0]])
    expected = 2 * torch.tanh(0.5 * torch.tensor([[5.0, -2.0, -1.0]]) / 2)
    torch.testing.assert_close(head.logits(hidden), expected)
