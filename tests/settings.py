"""Settings of a run by dotted name, which is how tests state them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fastrag.train import RagConfig

PARTS = {"retriever.question_encoder": "encoder", "reader.generator": "generator"}


def nested(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return `{"retriever.n_docs": 3}` as `{"retriever": {"n_docs": 3}}`."""
    values: dict[str, Any] = {}
    for name, value in settings.items():
        *outer, last = name.split(".")
        section = values
        for each in outer:
            if not isinstance(section.get(each), dict):
                section[each] = {}
            section = section[each]
        known = section.get(last)
        both = isinstance(known, dict) and isinstance(value, dict)
        section[last] = known | value if both else value
    return values


def rag_config(settings: Mapping[str, Any] | None = None) -> RagConfig:
    """Return the config of `PARTS` and these settings."""
    return RagConfig.from_dict(nested(PARTS | dict(settings or {})))


def options(settings: Mapping[str, Any]) -> list[str]:
    """Return settings as the options of `fastrag train`."""
    return [f"--{name}={value}" for name, value in settings.items()]
