"""Templates: how a passage and a question become the generator's input, one piece at a time.

A training step never tokenises. The literal text of a template is tokenised once when the template
is bound to a tokenizer, a passage once when the store is built, a question and its answer once in
the collator; the generator's input is these pieces laid end to end.

For the pieces to add up to what the tokenizer would say of the whole, a space before a slot belongs
to the slot's piece (`Answer:` + ` Paris`, not `Answer: ` + `Paris`), and a piece that is not the
first is encoded behind an anchor character where the tokenizer would otherwise treat it as the
start of a text (SentencePiece prepends `▁` there). Which anchor, if any, is decided at binding by
comparing with the joint encoding.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal

from fastrag import manifests
from fastrag.data.readers import Passage
from fastrag.data.tokenization import (
    encode_markup,
    encode_texts,
    special_frame,
    tokenizer_fingerprint,
)
from fastrag.messages import shown

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Kind = Literal["seq2seq", "causal"]
KINDS: tuple[Kind, ...] = ("seq2seq", "causal")
TEMPLATES = ("plain", "chat")  # the words for `Template.default` and `Template.from_chat`
_SLOTS = ("passage", "question")
_FIELDS = manifests.record(
    {"context": manifests.text()},
    {
        "passage": manifests.text(),
        "answer": manifests.text(),
        "answer_end": manifests.optional(manifests.text()),
        "add_special_tokens": manifests.flag(),
    },
    closed=True,
)
# Stands for "some text came before": a literal or slot that is not first is measured behind it.
_ANCHOR = "a"
_JOIN_PROBES = ("Paris", "the 12 items", "(x)")
_DEFAULT_USER = "Context: {passage}\nQuestion: {question}\nAnswer in a few words."


@dataclasses.dataclass(frozen=True, slots=True)
class Template:
    """The text around passage, question and answer; independent of any tokenizer.

    Args:
        context: text with `{passage}` and `{question}`, each exactly once, in either order. Other
            braces are ordinary text.
        passage: how title and text are joined; a passage without a title is its text alone.
        answer: the answer's piece with `{answer}`; it owns its leading space.
        answer_end: special token that ends an answer (causal models; a chat's end of turn). `None`:
            the tokenizer's `eos_token`.
        add_special_tokens: put the tokenizer's own special tokens around the context. A chat
            template writes them itself.

    Raises:
        ValueError: a slot is missing or appears twice.

    Example:
        >>> template = Template.default("causal")
        >>> template.render("Paris is in France.", "Where is Paris?")
        'Context: Paris is in France.\\nQuestion: Where is Paris?\\nAnswer:'
    """

    context: str
    passage: str = "{title}: {text}"
    answer: str = "{answer}"
    answer_end: str | None = None
    add_special_tokens: bool = True

    def __post_init__(self) -> None:
        required = (
            ("context", self.context, _SLOTS),
            ("passage", self.passage, ("text",)),
            ("answer", self.answer, ("answer",)),
        )
        for name, text, slots in required:
            for slot in slots:
                count = text.count("{" + slot + "}") if isinstance(text, str) else 0
                if count != 1:
                    raise ValueError(
                        f"{name}: expected {{{slot}}} exactly once, got {count} in {shown(text)}"
                    )

    @classmethod
    def default(cls, kind: Kind) -> Template:
        """The template used when none is given.

        Args:
            kind: `"seq2seq"` or `"causal"`.
        """
        _check_kind(kind)
        if kind == "seq2seq":
            return cls(context="question: {question} context: {passage}")
        return cls(context="Context: {passage}\nQuestion: {question}\nAnswer:", answer=" {answer}")

    @classmethod
    def from_chat(
        cls,
        tokenizer: PreTrainedTokenizerBase,
        *,
        system: str | None = None,
        user: str = _DEFAULT_USER,
        passage: str = "{title}: {text}",
        **chat_kwargs: Any,
    ) -> Template:
        """Renders the tokenizer's chat template with placeholders, generation prompt included.

        Args:
            tokenizer: a tokenizer with a `chat_template`.
            system: the system message; `None` leaves it to the chat template.
            user: the user message, with `{passage}` and `{question}`.
            passage: see `Template`.
            **chat_kwargs: passed on to `apply_chat_template`, for example `enable_thinking=False`.

        Returns:
            A template whose answer ends with the chat's end of turn.

        Raises:
            ValueError: no chat template, one that refuses these messages, or one that does not
                keep both slots exactly once.
        """
        if not getattr(tokenizer, "chat_template", None):
            raise ValueError(
                f"tokenizer: expected a chat_template, got {type(tokenizer).__name__} without one"
            )
        messages = [{"role": "user", "content": user}]
        if system is not None:
            messages.insert(0, {"role": "system", "content": system})
        reply = {"role": "assistant", "content": "fastrag-reply"}

        def render(turns: list[dict[str, str]], prompt: bool) -> str:
            try:
                return tokenizer.apply_chat_template(
                    turns, tokenize=False, add_generation_prompt=prompt, **chat_kwargs
                )
            except Exception as error:  # jinja2's TemplateError, raised by the template itself
                raise ValueError(
                    f"chat template of {type(tokenizer).__name__}: expected one that takes "
                    f"{[turn['role'] for turn in turns]} messages, got {error}"
                ) from error

        context = render(messages, True)
        before_reply, _, after_reply = render([*messages, reply], False).rpartition(
            reply["content"]
        )
        gap = before_reply.removeprefix(context) if before_reply.startswith(context) else ""
        after_reply = after_reply.lstrip()
        specials = {str(token) for token in tokenizer.added_tokens_decoder.values()}
        ends = [token for token in specials if after_reply.startswith(token)]
        return cls(
            context=context,
            passage=passage,
            # Llama 2 writes a space between its prompt and the reply: the answer owns it.
            answer=f"{gap if gap.isspace() else ''}{{answer}}",
            answer_end=max(ends, key=len) if ends else None,
            add_special_tokens=False,
        )

    def render_passage(self, passage: Passage) -> str:
        """The text of a passage's piece: title and text joined, or the text where no title is."""
        text = passage.text.strip()
        title = passage.title.strip()
        if not title:
            return text
        # Title first, by position: a text that contains "{title}" stays as it is.
        before, _, after = self.passage.partition("{text}")
        return before.replace("{title}", title) + text + after.replace("{title}", title)

    def render(self, passage: str, question: str) -> str:
        """The whole input as one text, for people; training lays pieces end to end instead."""
        values = {"passage": passage, "question": question}
        literals, slots = _split(self.context)
        parts = [literals[0]]
        for slot, literal in zip(slots, literals[1:], strict=True):
            parts += [values[slot], literal]
        return "".join(parts)

    def to_dict(self) -> dict[str, Any]:
        """The template as a JSON-able dict; `from_dict` reads it back."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, config: dict[str, Any]) -> Template:
        """Reads back what `to_dict` wrote.

        Raises:
            ValueError: an unknown key, no `context`, or a value of another type.
        """
        _FIELDS(config, "template")
        return cls(**config)

    def bind(self, tokenizer: PreTrainedTokenizerBase, kind: Kind) -> BoundTemplate:
        """Tokenises the literal pieces for one tokenizer.

        Args:
            tokenizer: the generator's tokenizer.
            kind: `"seq2seq"` or `"causal"`.

        Raises:
            ValueError: the tokenizer has no token that can end an answer.
        """
        return BoundTemplate(self, tokenizer, kind)

    def passage_piece(self, tokenizer: PreTrainedTokenizerBase) -> Piece:
        """The encoder of this template's passage slot alone (what a PassageStore needs)."""
        return _join_slot(self, tokenizer, "passage")[0]


class Piece:
    """Encodes the values of one slot to ids that join on to what stands before the slot.

    Args:
        tokenizer: the generator's tokenizer.
        anchor: a character to encode each value behind, its ids dropped again; empty: none.
        lead: what is put before each value (the slot's own spaces).
        tail: what is put after each value.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        anchor: str = "",
        lead: str = "",
        tail: str = "",
    ) -> None:
        self._tokenizer = tokenizer
        self.anchor, self.lead, self.tail = anchor, lead, tail

    def __call__(self, texts: Sequence[str]) -> list[list[int]]:
        """Encodes values; special tokens spelled in them stay text.

        Args:
            texts: the values of the slot.

        Returns:
            One list of ids per value, no special tokens.
        """
        values = [self.lead + text + self.tail for text in texts]
        if not self.anchor:
            return encode_texts(self._tokenizer, values)
        anchor_ids = encode_texts(self._tokenizer, [self.anchor])[0]
        n = len(anchor_ids)
        joint = encode_texts(self._tokenizer, [self.anchor + value for value in values])
        pieces = [ids[n:] if ids[:n] == anchor_ids else None for ids in joint]
        merged = [i for i, ids in enumerate(pieces) if ids is None]  # the anchor joined the value
        plain = dict(
            zip(merged, encode_texts(self._tokenizer, [values[i] for i in merged]), strict=True)
        )
        return [plain[i] if ids is None else ids for i, ids in enumerate(pieces)]


def _join(
    tokenizer: PreTrainedTokenizerBase, before: str, *, first: bool, lead: str, tail: str = ""
) -> tuple[Piece, list[int]]:
    """The encoder of a slot and the ids of the literal before it, which together equal the whole.

    Each anchor is tried on the probes: the joint encoding must end with the probe's piece, and what
    is left of it is the literal, the same for every probe.
    """
    opening = before if first else _ANCHOR + before
    joint = [encode_markup(tokenizer, opening + lead + probe + tail) for probe in _JOIN_PROBES]
    best, best_count, rest = Piece(tokenizer, "", lead, tail), 0, tuple[int, ...]()
    for anchor in dict.fromkeys(["", before[-1:], _ANCHOR]):
        piece = Piece(tokenizer, anchor, lead, tail)
        rests = Counter(
            tuple(whole[: len(whole) - len(ids)])
            for whole, ids in zip(joint, piece(_JOIN_PROBES), strict=True)
            if whole[len(whole) - len(ids) :] == ids
        )
        for found, count in rests.most_common(1):
            if count > best_count:
                best, best_count, rest = piece, count, found
    ahead = [] if first else encode_markup(tokenizer, _ANCHOR)
    if best_count and list(rest[: len(ahead)]) == ahead:
        return best, list(rest[len(ahead) :])
    return best, encode_markup(tokenizer, before) if first else _literal_after(tokenizer, before)


class BoundTemplate:
    """A template tokenised for one generator.

    A context is `literals[0] slots[0] literals[1] slots[1] literals[2]`.

    Attributes:
        template: the template it was made from.
        kind: `"seq2seq"` or `"causal"`.
        slots: the two slot names in order, `("question", "passage")` or the reverse.
        literals: three tuples of ids around them. The first opens with BOS or the encoder's own
            special tokens (never twice), the last closes with the encoder's.
        bos_id: the id that opens the context, or `None`.
        eos_id: the id that ends an answer.
        pad_id: the tokenizer's pad id, or `eos_id` where it has none. Masks come from lengths.
    """

    def __init__(self, template: Template, tokenizer: PreTrainedTokenizerBase, kind: Kind) -> None:
        _check_kind(kind)
        self.template = template
        self.kind = kind
        texts, self.slots = _split(template.context)
        joined = {slot: _join_slot(template, tokenizer, slot) for slot in self.slots}
        self._pieces = {slot: piece for slot, (piece, _) in joined.items()}
        literals = [literal for _, literal in joined.values()]
        self._tokenizer = tokenizer
        self._wrap = template.answer.partition("{answer}")[::2]
        if kind == "causal":
            # The answer follows the last literal and owns its trailing spaces.
            last = texts[-1].rstrip(" ")
            lead = texts[-1][len(last) :] + self._wrap[0]
            self._answer_piece, literal = _join(
                tokenizer, last, first=False, lead=lead, tail=self._wrap[1]
            )
            literals.append(literal)
        else:
            literals.append(_literal_after(tokenizer, texts[-1]))
        if template.add_special_tokens:
            prefix, suffix = special_frame(tokenizer)
            if literals[0][: len(prefix)] != prefix:
                literals[0] = prefix + literals[0]
            if kind == "seq2seq" and (not suffix or literals[-1][-len(suffix) :] != suffix):
                literals[-1] = literals[-1] + suffix
        self.literals = tuple(tuple(ids) for ids in literals)
        bos = tokenizer.bos_token_id
        self.bos_id: int | None = bos if self.literals[0][:1] == (bos,) else None

        if kind == "causal":
            self._answer_open: list[int] = []
            self._answer_close = [_end_id(template, tokenizer)]
        else:
            self._answer_open, self._answer_close = special_frame(tokenizer, target=True)
            self._answer_close = self._answer_close or [_end_id(template, tokenizer)]
        eos = tokenizer.eos_token_id
        self.eos_id: int = eos if eos in self._answer_close else self._answer_close[-1]
        pad = tokenizer.pad_token_id
        self.pad_id: int = self.eos_id if pad is None else pad

    @property
    def n_literal_tokens(self) -> int:
        """Number of ids that are neither passage nor question."""
        return sum(len(ids) for ids in self.literals)

    def window(self, max_context: int) -> int:
        """Room that a window leaves for question and passage together.

        Args:
            max_context: length of the generator's input, in tokens.

        Raises:
            ValueError: the template alone fills the window.
        """
        room = max_context - self.n_literal_tokens
        if room < 1:
            raise ValueError(
                f"max_context: expected more than the template's {self.n_literal_tokens} tokens, "
                f"got {max_context}"
            )
        return room

    def passage_pieces(self, rendered: Sequence[str]) -> list[list[int]]:
        """Return the ids of the pieces of rendered passages, no special tokens."""
        return self._pieces["passage"](rendered)

    def passage_ids(self, passage: Passage) -> list[int]:
        """Ids of one passage's piece, no special tokens."""
        return self.passage_pieces([self.template.render_passage(passage)])[0]

    def question_ids(self, text: str) -> list[int]:
        """Ids of one question's piece, no special tokens."""
        return self._pieces["question"]([text.strip()])[0]

    def answer_ids(self, text: str) -> list[int]:
        """Ids of one answer with its end: EOS (causal) or the tokenizer's own target tokens."""
        if self.kind == "causal":
            content = self._answer_piece([text.strip()])[0]
        else:
            value = self._wrap[0] + text.strip() + self._wrap[1]
            content = encode_texts(self._tokenizer, [value], target=True)[0]
        return [*self._answer_open, *content, *self._answer_close]


def stream_fingerprint(tokenizer: PreTrainedTokenizerBase, template: Template | None = None) -> str:
    """Name how a stream of a PassageStore is tokenised; see `PassageStore.fingerprint`.

    Args:
        tokenizer: the stream's tokenizer.
        template: the template of a generator stream; only what touches its passage slot counts.

    Returns:
        32 hexadecimal digits.
    """
    name = tokenizer_fingerprint(tokenizer)
    if template is None:
        return name
    piece = template.passage_piece(tokenizer)
    described = json.dumps([name, template.passage, piece.lead, piece.anchor])
    return hashlib.sha256(described.encode("utf-8")).hexdigest()[:32]


def _check_kind(kind: str) -> None:
    if kind not in KINDS:
        raise ValueError(f"kind: expected one of {list(KINDS)}, got {shown(kind)}")


def _split(context: str) -> tuple[list[str], tuple[str, str]]:
    """Splits a context at its slots: three literals and the slots' order."""
    first, second = sorted(_SLOTS, key=lambda slot: context.index("{" + slot + "}"))
    head, _, rest = context.partition("{" + first + "}")
    middle, _, end = rest.partition("{" + second + "}")
    return [head, middle, end], (first, second)


def _join_slot(
    template: Template, tokenizer: PreTrainedTokenizerBase, slot: str
) -> tuple[Piece, list[int]]:
    texts, slots = _split(template.context)
    at = slots.index(slot)
    before = texts[at].rstrip(" ")
    return _join(tokenizer, before, first=at == 0, lead=texts[at][len(before) :])


def _literal_after(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Ids of a literal that follows a slot: as they stand behind other text, not at its start."""
    anchor_ids = encode_markup(tokenizer, _ANCHOR)
    joint = encode_markup(tokenizer, _ANCHOR + text)
    if joint[: len(anchor_ids)] == anchor_ids:
        return joint[len(anchor_ids) :]
    return encode_markup(tokenizer, text)


def _end_id(template: Template, tokenizer: PreTrainedTokenizerBase) -> int:
    if template.answer_end is not None:
        ids = encode_markup(tokenizer, template.answer_end)
        if len(ids) == 1:
            return ids[0]
        raise ValueError(
            f"answer_end: expected one token of {type(tokenizer).__name__}, "
            f"got {shown(template.answer_end)} = {ids}"
        )
    if tokenizer.eos_token_id is None:
        raise ValueError(
            f"tokenizer: expected one with an eos_token to end the answer, got "
            f"{type(tokenizer).__name__} without (set it, or Template.answer_end)"
        )
    return int(tokenizer.eos_token_id)
