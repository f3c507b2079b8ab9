"""Tiny random generators, encoders, tokenizers and passages for the tests of nn and generation."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    AttentionInterface,
    AttentionMaskInterface,
    BartConfig,
    BartForConditionalGeneration,
    BertConfig,
    BertModel,
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
    LlamaConfig,
    LlamaForCausalLM,
    MarianConfig,
    MarianMTModel,
    MBartConfig,
    MBartForConditionalGeneration,
    PegasusConfig,
    PegasusForConditionalGeneration,
    PhiConfig,
    PhiForCausalLM,
    PreTrainedTokenizerFast,
    Qwen3Config,
    Qwen3ForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)
from transformers.masking_utils import eager_mask

from fastrag import FlatIndex, PassageStore, RagModel, TextEncoder
from fastrag.data import Passage, RagCollator, Template

VOCAB = 37
PAD, BOS, EOS = 0, 1, 2
_SPECIAL = {"pad_token_id": PAD, "bos_token_id": BOS, "eos_token_id": EOS}
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
    **_SPECIAL,
}
_LLAMALIKE = {
    "vocab_size": VOCAB,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 64,
    **_SPECIAL,
}
_T5 = {
    "vocab_size": VOCAB,
    "d_model": 16,
    "d_kv": 8,
    "d_ff": 24,
    "num_layers": 2,
    "num_heads": 2,
    "dropout_rate": 0.0,
    "decoder_start_token_id": PAD,
    **_SPECIAL,
}
_BERT = {
    "vocab_size": VOCAB,
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 24,
    "max_position_embeddings": 64,
    "pad_token_id": PAD,
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
    config = T5Config(**_T5, tie_word_embeddings=False)  # sets scale_decoder_outputs = False
    config.tie_word_embeddings = False  # T5Config sets it back to True
    return T5ForConditionalGeneration(config)


def _encoder_decoder() -> EncoderDecoderModel:
    config = EncoderDecoderConfig.from_encoder_decoder_configs(
        BertConfig(**_BERT), BertConfig(**_BERT), decoder_start_token_id=BOS, pad_token_id=PAD
    )
    return EncoderDecoderModel(config)


GENERATORS: dict[str, Callable[[], Any]] = {
    "bart": lambda: BartForConditionalGeneration(BartConfig(**_BARTLIKE)),
    "mbart": lambda: MBartForConditionalGeneration(MBartConfig(**_BARTLIKE)),
    "marian": lambda: MarianMTModel(MarianConfig(**_BARTLIKE)),
    "pegasus": lambda: PegasusForConditionalGeneration(PegasusConfig(**_BARTLIKE)),
    "t5_tied": lambda: T5ForConditionalGeneration(T5Config(**_T5)),
    "t5_untied": _t5_untied,
    "encoder_decoder_bert": _encoder_decoder,
    "gpt2": lambda: GPT2LMHeadModel(
        GPT2Config(vocab_size=VOCAB, n_embd=16, n_layer=2, n_head=2, n_positions=64, **_SPECIAL)
    ),
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**_LLAMALIKE, tie_word_embeddings=True)),
    "qwen3": lambda: Qwen3ForCausalLM(Qwen3Config(**_LLAMALIKE, head_dim=8)),
    "gemma2": lambda: Gemma2ForCausalLM(
        Gemma2Config(
            **_LLAMALIKE, head_dim=8, final_logit_softcapping=3.0, attn_implementation="exact"
        )
    ),
    "granite": lambda: GraniteForCausalLM(GraniteConfig(**_LLAMALIKE, logits_scaling=4.0)),
    "cohere": lambda: CohereForCausalLM(CohereConfig(**_LLAMALIKE, logit_scale=0.25)),
    "phi": lambda: PhiForCausalLM(PhiConfig(**_LLAMALIKE)),
}


def generator(name: str, *, seed: int = 0, dtype: torch.dtype = torch.float64) -> Any:
    """Make a generator in eval mode whose head has a random bias and large logits."""
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


def context(kind: str, lengths: list[int], *, seed: int = 1) -> tuple[torch.Tensor, torch.Tensor]:
    """Make random contexts of these lengths, padded on the side that `kind` wants."""
    drawn = torch.Generator().manual_seed(seed)
    width = max(lengths)
    ids = torch.full((len(lengths), width), PAD)
    mask = torch.zeros(len(lengths), width, dtype=torch.int64)
    for row, length in enumerate(lengths):
        columns = slice(width - length, width) if kind == "causal" else slice(0, length)
        ids[row, columns] = torch.randint(3, VOCAB, (length,), generator=drawn)
        mask[row, columns] = 1
    return ids, mask


WORDS = [f"w{i}" for i in range(VOCAB - 3)]


def tokenizer() -> PreTrainedTokenizerFast:
    """Make a word tokenizer over w0, w1, ... with pad, bos and eos."""
    vocab = {word: i for i, word in enumerate(["<pad>", "<s>", "</s>", *WORDS])}
    words = Tokenizer(models.WordLevel(vocab, unk_token="w0"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="<pad>", bos_token="<s>", eos_token="</s>"
    )


def encoder(*, seed: int = 0, normalize: bool = True, dropout: float = 0.0) -> TextEncoder:
    """Make a one-layer BERT encoder of width 16."""
    torch.manual_seed(seed)
    config = BertConfig(**_BERT, hidden_dropout_prob=dropout, attention_probs_dropout_prob=dropout)
    return TextEncoder(BertModel(config, add_pooling_layer=False), normalize=normalize)


def passages(n: int = 12) -> list[Passage]:
    """Make n passages: a key word and the word that answers it."""
    return [Passage(id=f"p{i}", title="", text=f"w{i} w{i + 16}") for i in range(n)]


def questions(n: int = 12) -> list[dict[str, Any]]:
    """Ask for the answer word of each key word."""
    return [{"id": f"q{i}", "question": f"w{i}", "answers": [f"w{i + 16}"]} for i in range(n)]


TEMPLATE = Template(context="{passage} w15 {question} w14", answer=" {answer}")


def rag_model(
    kind: str = "seq2seq",
    *,
    make_generator: Callable[[], Any] | None = None,
    n_passages: int = 12,
    shared: bool = False,
    fill_index: bool = True,
    seed: int = 0,
    normalize: bool = True,
    dropout: float = 0.0,
    **settings: Any,
) -> RagModel:
    """Make a whole RagModel over `passages(n_passages)`; float32, eval mode off."""
    words = tokenizer()
    question_encoder = encoder(seed=seed, normalize=normalize, dropout=dropout)
    passage_encoder = (
        question_encoder if shared else encoder(seed=seed, normalize=normalize, dropout=dropout)
    )
    torch.manual_seed(seed)
    default = GENERATORS["t5_tied" if kind == "seq2seq" else "llama"]
    store = PassageStore.build(
        passages(n_passages),
        template=TEMPLATE,
        question_tokenizer=words,
        generator_tokenizer=words,
    )
    model = RagModel(
        question_encoder,
        passage_encoder,
        (make_generator or default)(),
        FlatIndex(16),
        store,
        template=TEMPLATE,
        question_tokenizer=words,
        generator_tokenizer=words,
        **{"n_docs": 3, "max_context": 32, **settings},
    )
    if fill_index:
        model.refresh_index()
    return model.train()


def collator(kind: str = "seq2seq") -> RagCollator:
    """Make the collator that fits `rag_model(kind)`."""
    words = tokenizer()
    return RagCollator(words, words, template=TEMPLATE, kind=kind)


def batch(kind: str = "seq2seq", n: int = 4) -> dict[str, torch.Tensor]:
    """Collate the first n questions."""
    return collator(kind)(questions(n))
