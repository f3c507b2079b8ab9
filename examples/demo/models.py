"""The demo's tiny models: two tokenizers, two BERT encoders and a T5 generator, all from scratch.

The architectures are transformers' own, and so are the saved folders. What makes them learn within
minutes instead of days is how they start (options of the functions below; nothing of this is in
fastrag):

* Both encoders start from the same random weights, with small position and type embeddings. A
  mean over nearly untouched word embeddings is a bag of words: texts that share words begin close
  to each other, so that the first retrieved passages are about the right entity now and then.
* The generator starts with circuits for copying (`copying_start`), because copying an answer that
  was never seen in training is what a small random transformer learns last. Its weights start
  where copying is near, as trained models' weights are found to be; cf. mimetic initialisation,
  Trockman & Kolter 2023.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from tokenizers.trainers import BpeTrainer, WordLevelTrainer
from torch import nn
from transformers import (
    BertConfig,
    BertModel,
    PreTrainedTokenizerFast,
    T5Config,
    T5ForConditionalGeneration,
)

from fastrag.data import Passage, Question, Template
from fastrag.nn import TextEncoder

SEPARATOR = "<sep>"
MASK = "<mask>"
NEIGHBOUR_BIAS = 6.0  # e^6 to 1: a head that looks at one neighbour sees little else
SHARPNESS = 0.6  # a like token scores about 0.6^2 * d_head = 12, an unlike one about 2
QUIET = 0.3
TEMPLATE = Template(context=f"{{passage}}{SEPARATOR}{{question}}", passage="{title}: {text}")


class Tokenizers(NamedTuple):
    """One vocabulary for the encoders, one for the generator."""

    retriever: PreTrainedTokenizerFast
    generator: PreTrainedTokenizerFast


def train_tokenizers(
    passages: Sequence[Passage], questions: Iterable[Question], *, vocab_size: int = 8000
) -> Tokenizers:
    """Train both tokenizers on the corpus and the training questions.

    Args:
        passages: the corpus.
        questions: training questions; their answers are not looked at.
        vocab_size: limit on the generator's vocabulary; the default lets every word of the corpus
            be one token. The retriever knows every word too.

    Returns:
        The retriever's tokenizer, of lower-case words without accents in which all numbers are one
        word, and the generator's, byte-pair encoding.
    """
    texts = [TEMPLATE.render_passage(passage) for passage in passages]
    texts += [question.question for question in questions]

    words = Tokenizer(models.WordLevel(unk_token="[UNK]"))
    words.normalizer = normalizers.Sequence(
        [
            normalizers.NFD(),
            normalizers.StripAccents(),
            normalizers.Lowercase(),
            normalizers.Replace(Regex("[0-9][0-9.,]*"), "0"),
        ]
    )
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    words.train_from_iterator(
        texts, WordLevelTrainer(special_tokens=["[PAD]", "[UNK]"], show_progress=False)
    )

    pieces = Tokenizer(models.BPE(unk_token="<unk>"))
    # A full stop must not melt into the answer before it: copied pieces have to be whole.
    pieces.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Metaspace(),
            pre_tokenizers.Split(Regex("[.,?:]$"), "isolated"),
        ]
    )
    pieces.decoder = decoders.Metaspace()
    specials = ["<pad>", "</s>", "<unk>", SEPARATOR, MASK]
    pieces.train_from_iterator(
        texts, BpeTrainer(vocab_size=vocab_size, special_tokens=specials, show_progress=False)
    )
    pieces.post_processor = processors.TemplateProcessing(
        single="$A </s>", special_tokens=[("</s>", specials.index("</s>"))]
    )
    return Tokenizers(
        retriever=PreTrainedTokenizerFast(
            tokenizer_object=words, pad_token="[PAD]", unk_token="[UNK]"
        ),
        generator=PreTrainedTokenizerFast(
            tokenizer_object=pieces,
            pad_token="<pad>",
            eos_token="</s>",
            unk_token="<unk>",
            mask_token=MASK,
            additional_special_tokens=[SEPARATOR],
        ),
    )


def tiny_encoders(
    vocab_size: int, *, width: int = 256, position_scale: float = 0.3, shared_start: bool = True
) -> tuple[TextEncoder, TextEncoder]:
    """Make question and passage encoder: one BERT layer each, mean pooling, unit vectors.

    Args:
        vocab_size: size of the retriever's vocabulary.
        width: hidden width, the width D of the vectors. The wider, the more nearly orthogonal are
            the random vectors of two words, and the better are bags of words told apart.
        position_scale: factor on the random position and token type embeddings.
        shared_start: give both encoders the same random weights to start from.

    Returns:
        question_encoder, passage_encoder: separate parameters.
    """
    config = BertConfig(
        vocab_size=vocab_size,
        hidden_size=width,
        num_hidden_layers=1,
        num_attention_heads=4,
        intermediate_size=2 * width,
        max_position_embeddings=64,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        pad_token_id=0,
    )
    encoders = []
    for _ in range(2):
        bert = BertModel(config, add_pooling_layer=False)
        with torch.no_grad():
            bert.embeddings.position_embeddings.weight.mul_(position_scale)
            bert.embeddings.token_type_embeddings.weight.mul_(position_scale)
        encoders.append(TextEncoder(bert, pooling="mean", normalize=True))
    question_encoder, passage_encoder = encoders
    if shared_start:
        passage_encoder.load_state_dict(question_encoder.state_dict())
    return question_encoder, passage_encoder


def tiny_generator(
    tokenizer: PreTrainedTokenizerFast, *, width: int = 128, copying: bool = True
) -> T5ForConditionalGeneration:
    """Make the generator: a T5 of two encoder and two decoder layers.

    Args:
        tokenizer: the generator's tokenizer.
        width: hidden width.
        copying: start with `copying_start` instead of T5's own random weights.

    Returns:
        The generator.
    """
    generator = T5ForConditionalGeneration(
        T5Config(
            vocab_size=len(tokenizer),
            d_model=width,
            d_kv=width // 4,
            d_ff=2 * width,
            num_heads=4,
            num_layers=2,
            num_decoder_layers=2,
            dropout_rate=0.0,
            pad_token_id=tokenizer.pad_token_id,
            eos_token_id=tokenizer.eos_token_id,
            decoder_start_token_id=tokenizer.pad_token_id,
            tie_word_embeddings=True,
        )
    )
    if copying:
        copying_start(generator)
    return generator


@torch.no_grad()
def copying_start(generator: T5ForConditionalGeneration) -> None:
    """Bring a random T5 near copying, by its weights alone.

    * First self-attention of the encoder: head 0 looks at the previous token, head 1 at the next
      one, and each writes what it sees into a subspace of its own. So a place knows what stands
      before it and behind it.
    * First cross-attention of the decoder: queries are made of the token said last as head 0 sees
      tokens, keys are read from its subspace. So the decoder looks behind the place of what it
      said last, and goes on copying there: an induction head (Olsson et al. 2022).
    * Second cross-attention: keys and queries are the same map, so that the decoder looks at
      places that hold the like of what it has in mind.
    * Both: W_o = W_v^T, orthogonal, so that the token seen is the token said (the output head is
      tied to the embeddings).
    * Feed-forward layers begin quiet; until they have learnt something they blur what is copied.

    Args:
        generator: the model, changed in place.
    """
    config = generator.config
    width, d_head = config.d_model, config.d_kv
    neighbours = generator.encoder.block[0].layer[0].SelfAttention
    for head, offset in enumerate((-1, 1)):
        rows = slice(head * d_head, (head + 1) * d_head)
        neighbours.v.weight[rows] = nn.init.orthogonal_(torch.empty(d_head, width))
        neighbours.o.weight[:, rows] = nn.init.orthogonal_(torch.empty(width, d_head))
        bucket = neighbours._relative_position_bucket(
            torch.tensor([offset]),
            bidirectional=True,
            num_buckets=neighbours.relative_attention_num_buckets,
            max_distance=neighbours.relative_attention_max_distance,
        )
        neighbours.relative_attention_bias.weight[bucket, head] = NEIGHBOUR_BIAS
    seen, written = neighbours.v.weight[:d_head], neighbours.o.weight[:, :d_head]

    for number, block in enumerate(generator.decoder.block):
        attention = block.layer[1].EncDecAttention
        nn.init.orthogonal_(attention.v.weight)
        attention.o.weight.copy_(attention.v.weight.T)
        if number == 0:
            attention.q.weight.copy_(SHARPNESS * seen.repeat(config.num_heads, 1))
            attention.k.weight.copy_(SHARPNESS * written.T.repeat(config.num_heads, 1))
        else:
            nn.init.orthogonal_(attention.q.weight).mul_(SHARPNESS)
            attention.k.weight.copy_(attention.q.weight)
    for stack in (generator.encoder, generator.decoder):
        for block in stack.block:
            block.layer[-1].DenseReluDense.wo.weight.mul_(QUIET)
