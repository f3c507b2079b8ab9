"""Tiny random generators of every architecture that is tested, and contexts for them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import (
    AttentionInterface,
    AttentionMaskInterface,
    BartConfig,
    BartForConditionalGeneration,
    BertConfig,
    CohereConfig,
    CohereForCausalLM,
    EncoderDecoderConfig,
    EncoderDecoderModel,
    Gemma2Config,
    Gemma2ForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    GraniteConfig,
    GraniteForCausalLM,
    MarianConfig,
    MarianMTModel,
    MBartConfig,
    MBartForConditionalGeneration,
    PegasusConfig,
    PegasusForConditionalGeneration,
    PhiConfig,
    PhiForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)
from transformers.masking_utils import eager_mask

from tests.tiny import BERT, BOS, LLAMA, PAD, SPECIAL_IDS, T5, VOCAB, llama, t5

_BARTLIKE = {
    "vocab_size": VOCAB,
    "d_model": 16,
    "encoder_layers": 1,
    "decoder_layers": 2,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
    "encoder_ffn_dim": 24,
    "decoder_ffn_dim": 24,
    "max_position_embeddings": 64,
    "decoder_start_token_id": BOS,
    "forced_eos_token_id": None,
    **SPECIAL_IDS,
}


def _exact_attention(module, query, key, value, attention_mask, scaling, softcap=None, **_):
    """Gemma 2's eager attention without its float32 softmax, in which -1e308, the float64 mask of
    padding, becomes -inf and a fully padded row NaN."""
    key = key.repeat_interleave(module.num_key_value_groups, dim=1)
    value = value.repeat_interleave(module.num_key_value_groups, dim=1)
    scores = query @ key.transpose(2, 3) * scaling
    scores = softcap * torch.tanh(scores / softcap) + attention_mask
    weights = scores.softmax(dim=-1)
    return (weights @ value).transpose(1, 2).contiguous(), weights


AttentionInterface.register("exact", _exact_attention)
AttentionMaskInterface.register("exact", eager_mask)


def _t5_untied() -> T5ForConditionalGeneration:
    config = T5Config(**T5, tie_word_embeddings=False)  # sets scale_decoder_outputs = False
    config.tie_word_embeddings = False  # T5Config sets it back to True
    return T5ForConditionalGeneration(config)


def _encoder_decoder() -> EncoderDecoderModel:
    config = EncoderDecoderConfig.from_encoder_decoder_configs(
        BertConfig(**BERT), BertConfig(**BERT), decoder_start_token_id=BOS, pad_token_id=PAD
    )
    return EncoderDecoderModel(config)


GENERATORS: dict[str, Callable[[], Any]] = {
    "bart": lambda: BartForConditionalGeneration(BartConfig(**_BARTLIKE)),
    "mbart": lambda: MBartForConditionalGeneration(MBartConfig(**_BARTLIKE)),
    "marian": lambda: MarianMTModel(MarianConfig(**_BARTLIKE)),
    "pegasus": lambda: PegasusForConditionalGeneration(PegasusConfig(**_BARTLIKE)),
    "t5_tied": t5,
    "t5_untied": _t5_untied,
    "encoder_decoder_bert": _encoder_decoder,
    "gpt2": lambda: GPT2LMHeadModel(
        GPT2Config(vocab_size=VOCAB, n_embd=16, n_layer=2, n_head=2, n_positions=64, **SPECIAL_IDS)
    ),
    "llama": llama,
    "qwen3": lambda: Qwen3ForCausalLM(Qwen3Config(**LLAMA, head_dim=8)),
    "gemma2": lambda: Gemma2ForCausalLM(
        Gemma2Config(**LLAMA, head_dim=8, final_logit_softcapping=3.0, attn_implementation="exact")
    ),
    "granite": lambda: GraniteForCausalLM(GraniteConfig(**LLAMA, logits_scaling=4.0)),
    "cohere": lambda: CohereForCausalLM(CohereConfig(**LLAMA, logit_scale=0.25)),
    "phi": lambda: PhiForCausalLM(PhiConfig(**LLAMA)),
}


def generator(name: str, *, seed: int = 0, dtype: torch.dtype = torch.float64) -> Any:
    """A generator in eval mode whose head has a random bias and large logits."""
    torch.manual_seed(seed)
    model = GENERATORS[name]().to(dtype).eval()
    head = model.get_output_embeddings()
    with torch.no_grad():
        if hasattr(model, "final_logits_bias"):
            model.final_logits_bias.normal_()
        if head.bias is not None:
            head.bias.normal_()
        for parameter in model.parameters():  # random norms and biases too, so that none is idle
            parameter.add_(0.02 * torch.randn_like(parameter))
        head.weight.mul_(60.0 if name == "gemma2" else 8.0)  # past the softcap
    return model


def lora_generator(name: str = "llama", seed: int = 0, **settings: Any) -> PeftModel:
    """A generator with LoRA on queries and head; B is not zero, so that the adapter shows."""
    torch.manual_seed(seed)
    settings = {"r": 2, "target_modules": ["q_proj", "lm_head"], **settings}
    model = get_peft_model(GENERATORS[name](), LoraConfig(**settings))
    torch.manual_seed(seed + 1)
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if "lora_B" in key:
                parameter.normal_(std=0.1)
    return model


def context(kind: str, lengths: list[int], *, seed: int = 1) -> tuple[torch.Tensor, torch.Tensor]:
    """Random contexts of these lengths, padded on the side that `kind` wants."""
    drawn = torch.Generator().manual_seed(seed)
    width = max(lengths)
    ids = torch.full((len(lengths), width), PAD)
    mask = torch.zeros(len(lengths), width, dtype=torch.int64)
    for row, length in enumerate(lengths):
        columns = slice(width - length, width) if kind == "causal" else slice(0, length)
        ids[row, columns] = torch.randint(3, VOCAB, (length,), generator=drawn)
        mask[row, columns] = 1
    return ids, mask
