"""Folders to serve, and servers that several tests ask."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from fastrag.serve.source import Source
from tests.serve.live import Live, save_parts, serving


@pytest.fixture(scope="package")
def parts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`encoder`, `idx` with the vectors of that encoder, and `model` with its generator."""
    folder = tmp_path_factory.mktemp("parts")
    save_parts(folder)
    return folder


@pytest.fixture(scope="package")
def texts(parts: Path) -> Iterator[Live]:
    """A server of texts without a generator."""
    with serving(Source(encoder=str(parts / "encoder"), index=str(parts / "idx"))) as live:
        yield live


@pytest.fixture(scope="package")
def answers(parts: Path) -> Iterator[Live]:
    """A server with a generator, which is kept from ending an answer at once."""
    with serving(Source(model=str(parts / "model"))) as live:
        model = live.service.served.model
        assert model is not None
        model.generator.generation_config.suppress_tokens = [0, 1, 2, 3]
        yield live


@pytest.fixture(scope="package")
def vectors(parts: Path) -> Iterator[Live]:
    """A server without an encoder."""
    with serving(Source(index=str(parts / "idx"))) as live:
        yield live
