"""The model card of a RagModel, which the Hub shows: its parts, data, metrics and index."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastrag import folders
from fastrag.nn.heads import architecture
from fastrag.nn.index_reference import IndexReference

if TYPE_CHECKING:
    from fastrag.nn.model import RagModel

CARD = "README.md"
_USE = """```python
from fastrag import RagModel

model = RagModel.from_pretrained("{place}")  # index and passages too, if the folder holds none
batch = model.processor.collate([{{"question": "..."}}])
print(model.processor.decode(model.generate(**batch).sequences))
```"""


def model_card(
    model: RagModel,
    *,
    data: Mapping[str, Any] | None = None,
    metrics: Mapping[str, float | str] | None = None,
    name: str | None = None,
    **metadata: Any,
) -> str:
    """Describe a model in Markdown, with the metadata block that the Hub reads.

    Args:
        model: the model.
        data: what it was trained and evaluated on, by name.
        metrics: its metrics by name.
        name: the heading; None: the marginal likelihood and the generator's class.
        metadata: further fields of `huggingface_hub.ModelCardData`, such as `license`.

    Returns:
        The card.

    Example:
        >>> card = model_card(model, metrics={"em": 0.41})              # doctest: +SKIP
        >>> model.push_to_hub("me/my-rag", card=card)                   # doctest: +SKIP
    """
    from huggingface_hub import ModelCardData

    tags = ["retrieval-augmented-generation", *(metadata.pop("tags", None) or ())]
    block = ModelCardData(library_name="fastrag", tags=tags, **metadata).to_yaml()
    reference, passages = IndexReference.of(model.index), model.retriever.passages
    index = {
        "kind": type(model.index).__name__,
        **model.index.settings,
        "passages": len(passages),
        "width": reference.dim,
        "checksum": reference.checksum,
        **passages.origin,
    }
    parts = {
        "marginal": model.marginal,
        "objective": model.loss_fn.objective,
        "generator": architecture(model.generator),
        "question encoder": _kind(model.question_encoder),
        "passage encoder": _kind(model.retriever.passage_encoder),
        "passages per question": model.n_docs,
    }
    title = name or f"RAG-{model.marginal.capitalize()} with {parts['generator']}"
    sections = {"Model": parts, "Data": data, "Metrics": metrics, "Index": index}
    text = [f"# {title}", _USE.format(place=name or "path/or/id")]
    text += [f"## {heading}\n\n{_table(rows)}" for heading, rows in sections.items() if rows]
    return f"---\n{block}\n---\n\n" + "\n\n".join(text) + "\n"


def write_card(folder: str | os.PathLike[str], card: str) -> None:
    """Write or replace the card in a folder.

    Args:
        folder: the folder, for example of a saved model.
        card: its text.
    """
    with folders.replacing(Path(folder) / CARD) as file:
        file.write_text(card, encoding="utf-8")


def _kind(encoder: Any) -> str:
    return "none" if encoder is None else type(getattr(encoder, "model", encoder)).__name__


def _table(rows: Mapping[str, Any]) -> str:
    def cell(value: Any) -> str:
        text = f"{value:.4g}" if isinstance(value, float) else str(value)
        return " ".join(text.split()).replace("|", "\\|")

    lines = [f"| {cell(name)} | {cell(value)} |" for name, value in rows.items()]
    return "\n".join(["| | |", "|---|---|", *lines])
