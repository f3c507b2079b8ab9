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
TEMPLATE = Template(context=f"{{passage}}{SEPARATOR}{{question}}", passage="{title}: {text}")


class Tokenizers(NamedTuple):
    """One vocabulary for the encoders, one for the generator."""

    retriever: PreTrainedTokenizerFast
    generator: PreTrainedTokenizerFast


def train_tokenizers(
    passages: Sequence[Passage], questions: Iterable[Question], *, vocab_size: int = 4000
) -> Tokenizers:
    """Train both tokenizers on the corpus and the training questions.

    Args:
        passages: the corpus.
        questions: training questions; their answers are not looked at.
        vocab_size: size of the generator's vocabulary. The retriever knows every word.

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
def copying_start(generator: T5ForConditionalGeneration, *, previous_bias: float = 6.0) -> None:
    """Bring a random T5 near copying, by its weights alone.

    Cross-attention of the decoder: keys and queries are the same map, W_q = W_k, so that a token
    looks at places that hold its like, and W_o = W_v^T, so that what is seen there is what is
    said (the output head is tied to the embeddings). First self-attention of the encoder: W_o =
    W_v^T, and head 0 looks at the previous token, so that a place also knows what stands before it.

    Args:
        generator: the model, changed in place.
        previous_bias: bias of head 0 towards the previous token.
    """
    for block in generator.decoder.block:
        attention = block.layer[1].EncDecAttention
        attention.k.weight.copy_(attention.q.weight * generator.config.d_model**0.25)
        attention.q.weight.copy_(attention.k.weight)
        attention.o.weight.copy_(attention.v.weight.T)
    attention = generator.encoder.block[0].layer[0].SelfAttention
    attention.o.weight.copy_(attention.v.weight.T)
    previous = attention._relative_position_bucket(
        torch.tensor([-1]),
        bidirectional=True,
        num_buckets=attention.relative_attention_num_buckets,
        max_distance=attention.relative_attention_max_distance,
    )
    attention.relative_attention_bias.weight[previous, 0] = previous_bias
