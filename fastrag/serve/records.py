"""Passages and answers as JSON; `fastrag ask --json` prints the same records."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from fastrag.data.readers import Passage

if TYPE_CHECKING:
    from fastrag.generation.answers import Answer


def passage_record(passage: Passage) -> dict[str, str]:
    """Return a passage as a document of the retrieval protocol.

    Args:
        passage: the passage.

    Example:
        >>> passage_record(Passage("7", "Radium", "Found in 1898."))["contents"]
        '"Radium"\\nFound in 1898.'
    """
    title = " ".join(passage.title.split())  # clients read the first line as the title
    return {
        "id": passage.id,
        "title": passage.title,
        "text": passage.text,
        "contents": f'"{title}"\n{passage.text}',
    }


def answer_record(answer: Answer) -> dict[str, Any]:
    """Return an answer with its citations; `warnings` is left out if there are none.

    Args:
        answer: the answer.

    Example:
        >>> answer_record(answer)["citations"][0]["posterior"]              # doctest: +SKIP
        0.94
    """
    return {
        "question": answer.question,
        "answer": answer.text,
        "log_prob": answer.log_prob,
        "probability": answer.probability,
        "probability_per_token": answer.probability_per_token,
        "n_tokens": answer.n_tokens,
        "citations": [
            {
                "document": passage_record(each.passage),
                "prior": each.prior,
                "posterior": each.posterior,
                "supports": each.supports,
            }
            for each in answer.citations
        ],
        **({"warnings": list(answer.warnings)} if answer.warnings else {}),
    }
