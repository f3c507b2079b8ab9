"""Templates: the text around passage and question, tokenised piece by piece.

A training step does not tokenise. The literal text of a template is tokenised once when the
template is bound to a tokenizer, a passage once when the store is built, a question and its answer
once in the collator. The generator's input is the concatenation of these pieces.

The concatenated pieces must equal the tokens of the whole text. Therefore a space before a slot
belongs to the slot's piece (`Answer:` + ` Paris`, not `Answer: ` + `Paris`). A piece that is not
the first is encoded after an anchor character if the tokenizer would otherwise treat it as the
start of a text (SentencePiece prepends `▁` there). Binding chooses the anchor, if any, by comparing
with the encoding of the whole.
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
TEMPLATES = ("plain", "chat")  # names of `Template.default` and `Template.from_chat` in settings
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
# Text before a literal or slot that is not the first.
_ANCHOR = "a"
_JOIN_PROBES = ("Paris", "the 12 items", "(x)")
_DEFAULT_USER = "Context: {passage}\nQuestion: {question}\nAnswer in a few words."


@dataclasses.dataclass(frozen=True, slots=True)
class Template:
    """The text around passage, question and answer; independent of any tokenizer.

    Args:
        context: text with `{passage}` and `{question}`, each exactly once, in either order. Other
            braces are ordinary text.
        passage: text with `{title}` and `{text}`; a passage without a title is only its text.
        answer: text with `{answer}`, including the space before the answer.
        answer_end: special token that ends an answer of a causal model, such as a chat's end of
            turn. `None`: the tokenizer's `eos_token`.
        add_special_tokens: put the tokenizer's special tokens around the context. False for a chat
            template, which contains them.

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
        """Return the template that is used if none is given.

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
        """Make a template from the tokenizer's chat template and its generation prompt.

        Args:
            tokenizer: a tokenizer with a `chat_template`.
            system: the system message; `None`: that of the chat template, if any.
            user: the user message, with `{passage}` and `{question}`.
            passage: see `Template`.
            **chat_kwargs: arguments of `apply_chat_template`, for example `enable_thinking=False`.

        Returns:
            A template whose answer ends with the chat's end of turn.

        Raises:
            ValueError: no chat template, one that rejects these messages, or one that does not keep
                both slots exactly once.
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
            # Llama 2 has a space between prompt and reply, which belongs to the answer's piece.
            answer=f"{gap if gap.isspace() else ''}{{answer}}",
            answer_end=max(ends, key=len) if ends else None,
            add_special_tokens=False,
        )

    def render_passage(self, passage: Passage) -> str:
        """Return the text of a passage's piece: title and text, or the text if it has no title."""
        text = passage.text.strip()
        title = passage.title.strip()
        if not title:
            return text
        # The title is filled in around the text, so a text that contains "{title}" stays as it is.
        before, _, after = self.passage.partition("{text}")
        return before.replace("{title}", title) + text + after.replace("{title}", title)

    def render(self, passage: str, question: str) -> str:
        """Return the generator's input as one text, for display."""
        values = {"passage": passage, "question": question}
        literals, slots = _split(self.context)
        parts = [literals[0]]
        for slot, literal in zip(slots, literals[1:], strict=True):
            parts += [values[slot], literal]
        return "".join(parts)

    def to_dict(self) -> dict[str, Any]:
        """Return the template as a JSON-serialisable dict, for `from_dict`."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, config: dict[str, Any]) -> Template:
        """Make a template from the dict of `to_dict`.

        Raises:
            ValueError: an unknown key, no `context`, or a value of another type.
        """
        _FIELDS(config, "template")
        return cls(**config)

    def bind(self, tokenizer: PreTrainedTokenizerBase, kind: Kind) -> BoundTemplate:
        """Tokenise the literal pieces for one tokenizer.

        Args:
            tokenizer: the generator's tokenizer.
            kind: `"seq2seq"` or `"causal"`.

        Raises:
            ValueError: the tokenizer has no token that can end an answer.
        """
        return BoundTemplate(self, tokenizer, kind)

    def passage_piece(self, tokenizer: PreTrainedTokenizerBase) -> Piece:
        """Return the encoder of the passage slot, which a PassageStore is built with."""
        return _join_slot(self, tokenizer, "passage")[0]


class Piece:
    """Encode the values of one slot to ids that continue the text before the slot.

    Args:
        tokenizer: the generator's tokenizer.
        anchor: a character before each value while it is encoded; its ids are dropped. "": none.
        lead: text before each value (the spaces of the slot).
        tail: text after each value.
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
        """Encode values; special tokens spelled in them stay text.

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
    """Return the encoder of a slot and the ids of the literal before it.

    The anchor is chosen so that literal and piece together equal the encoding of the whole text: it
    must end with the piece of each probe, and the ids before that piece, the literal, must be the
    same for every probe. If no anchor achieves this, the one that suits most probes is taken.
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
        template: the template.
        kind: `"seq2seq"` or `"causal"`.
        slots: the two slot names in order, `("question", "passage")` or the reverse.
        literals: three tuples of ids. The first begins with the special tokens that the tokenizer
            puts before a sequence, unless the template contains them; for seq2seq, the last ends
            with those that it puts after a sequence.
        bos_id: the id with which the context begins if it is the tokenizer's BOS, else `None`.
        eos_id: the id that ends an answer.
        pad_id: the tokenizer's pad id, or `eos_id` if it has none.
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
            # The spaces at the end of the last literal belong to the answer's piece.
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
        """Number of ids of the template itself, without passage and question."""
        return sum(len(ids) for ids in self.literals)

    def window(self, max_context: int) -> int:
        """Return how many tokens remain for question and passage together.

        Args:
            max_context: length limit of the generator's input, in tokens.

        Raises:
            ValueError: the template alone reaches the limit.
        """
        room = max_context - self.n_literal_tokens
        if room < 1:
            raise ValueError(
                f"max_context: expected more than the template's {self.n_literal_tokens} tokens, "
                f"got {max_context}"
            )
        return room

    def passage_pieces(self, rendered: Sequence[str]) -> list[list[int]]:
        """Return the ids of the pieces of rendered passages, without special tokens."""
        return self._pieces["passage"](rendered)

    def passage_ids(self, passage: Passage) -> list[int]:
        """Return the ids of a passage's piece, without special tokens."""
        return self.passage_pieces([self.template.render_passage(passage)])[0]

    def question_ids(self, text: str) -> list[int]:
        """Return the ids of a question's piece, without special tokens."""
        return self._pieces["question"]([text.strip()])[0]

    def answer_ids(self, text: str) -> list[int]:
        """Return the ids of an answer with its end: EOS (causal) or the target's special tokens."""
        if self.kind == "causal":
            content = self._answer_piece([text.strip()])[0]
        else:
            value = self._wrap[0] + text.strip() + self._wrap[1]
            content = encode_texts(self._tokenizer, [value], target=True)[0]
        return [*self._answer_open, *content, *self._answer_close]


def stream_fingerprint(tokenizer: PreTrainedTokenizerBase, template: Template | None = None) -> str:
    """Return a digest of a stream's tokenizer and template; see `PassageStore.fingerprint`.

    Args:
        tokenizer: the stream's tokenizer.
        template: the template of a generator stream; only the parts that affect passages count.

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
    """Split a context at its slots; return the three literals and the slots in order."""
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
    """Return the ids of a literal that follows other text."""
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
