"""The input of a training step: tokenizer, passages and questions, from the embedded data set.

The longest context of a batch has exactly L tokens and every answer exactly T. Passage n starts
with fact n and continues with the facts after it; if there are more passages than facts, the next
ones leave out more and more facts in between. All is text, since Hugging Face's retriever decodes
questions and tokenises passages in every step.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from fastrag.data import Passage, Question, RagProcessor, Template

# Hugging Face's separators, as its retriever lays them out.
TITLE_SEP, DOC_SEP = " / ", " // "
TEMPLATE = Template(context="{passage}" + DOC_SEP + "{question}", passage="{title} / {text}")
BOS, PAD, EOS = 0, 1, 2  # as BART has them
SPECIALS = ("<s>", "<pad>", "</s>", "<unk>")
N_TOKENS = 4096  # that the tokenizer knows; the models' vocabularies are larger
FILLER = "a"  # one token, with a space before it or without


@functools.cache
def facts() -> Any:
    from fastrag.data import default_dataset

    return default_dataset()


@functools.cache
def tokenizer() -> Any:
    """Return a byte-level BPE of the facts that puts <s> and </s> around a text."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    known = facts()
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=N_TOKENS,
        special_tokens=list(SPECIALS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    texts = [TEMPLATE.render(TEMPLATE.render_passage(fact), "") for fact in known.passages]
    texts += [question.question for question in known.questions["train"]]
    made.train_from_iterator(texts, trainer)
    made.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", BOS), ("</s>", EOS)]
    )
    names = dict(zip(("bos_token", "pad_token", "eos_token", "unk_token"), SPECIALS, strict=True))
    return PreTrainedTokenizerFast(
        tokenizer_object=made, clean_up_tokenization_spaces=False, **names
    )


def processor(max_context: int = 512) -> RagProcessor:
    """Return a processor with one tokenizer for both sides and answers of any length."""
    return RagProcessor(
        tokenizer(), tokenizer(), template=TEMPLATE, max_answer=None, max_context=max_context
    )


def rag_config(encoder: Any, generator: Any, n_docs: int, context_width: int) -> Any:
    """Return Hugging Face's configuration of a RAG model of these two configurations."""
    from transformers import RagConfig

    return RagConfig.from_question_encoder_generator_configs(
        encoder,
        generator,
        n_docs=n_docs,
        max_combined_length=context_width,
        title_sep=TITLE_SEP,
        doc_sep=DOC_SEP,
    )


@functools.cache
def n_tokens(text: str) -> int:
    return len(tokenizer()(text, add_special_tokens=False)["input_ids"])


@dataclass(frozen=True)
class Corpus:
    """N passages, and the B questions of a batch with their answers."""

    passages: list[Passage]
    questions: list[Question]

    def store(self) -> Any:
        """Return the passages as a PassageStore."""
        from fastrag.index import PassageStore

        return PassageStore.build(self.passages, processor())

    def contexts(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Return ids and mask `[B*K, L]` of passages and questions, tokenised as whole texts."""
        whole = [
            TEMPLATE.render(TEMPLATE.render_passage(self.passages[row]), question.question)
            for question, of_question in zip(self.questions, rows.tolist(), strict=True)
            for row in of_question
        ]
        encoded = tokenizer()(whole, padding=True, return_tensors="pt")
        return encoded["input_ids"].to(rows.device), encoded["attention_mask"].to(rows.device)


def corpus(
    n_passages: int, n_questions: int, context_width: int, answer_width: int, ragged: bool
) -> Corpus:
    """Return texts whose contexts have at most `context_width` tokens, the longest exactly so.

    The widths include special tokens, L also the question. `ragged`: answers get shorter from
    question to question.

    Raises:
        ValueError: L or T leaves no room for a passage or an answer.
    """
    questions = _questions(n_questions, answer_width, ragged)
    longest = max(n_tokens(" " + question.question) for question in questions)
    room = context_width - 2 - n_tokens(DOC_SEP.rstrip()) - longest
    passages = [passage(n, room) for n in range(n_passages)]
    if not all(made.text for made in passages):
        need = f"room for a passage and questions of {longest} tokens"
        raise ValueError(f"L: expected {need}, got {context_width}")
    return Corpus(passages, questions)


def _questions(n_questions: int, answer_width: int, ragged: bool) -> list[Question]:
    if answer_width < 3:
        raise ValueError(f"T: expected at least 3 tokens (<s>, answer, </s>), got {answer_width}")
    known = facts().questions["train"]
    stride = max(1, len(known) // n_questions)  # neighbours ask the same
    made = []
    for i in range(n_questions):
        at = i * stride % len(known)
        words = (known[(at + 8 * j) % len(known)].answers[0] for j in range(answer_width))
        width = max(1, answer_width - 2 - (i if ragged else 0))
        answer = _fit(words, width, n_tokens)
        made.append(Question(str(i), known[at].question, (answer,)))
    return made


def passage(n: int, room: int) -> Passage:
    """Return passage n, whose title and text together have `room` tokens."""
    known = facts().passages
    turn, start = divmod(n, len(known))
    title = known[start].title
    texts = (known[(start + j * (1 + turn)) % len(known)].text for j in range(len(known)))
    # the text follows the title's separator
    left = room - n_tokens(title) - n_tokens(TITLE_SEP.rstrip())
    return Passage(str(n), title, _fit(texts, left, lambda word: n_tokens(" " + word)))


def _fit(texts: Iterator[str], width: int, first: Callable[[str], int]) -> str:
    """Return words of exactly `width` tokens: as many as fit, then fillers.

    `first` counts the tokens of the first word.
    """
    taken: list[str] = []
    for word in (word for text in texts for word in text.split(" ")):
        cost = n_tokens(" " + word) if taken else first(word)
        if cost > width:
            break
        taken.append(word)
        width -= cost
    return " ".join(taken + [FILLER] * width)
