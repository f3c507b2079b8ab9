"""What a config leaves open, and what is taken then."""

from __future__ import annotations

from pathlib import Path

import pytest

from fastrag.train import RagConfig, build
from tests import tiny


@pytest.mark.parametrize(
    ("settings", "corpus"), [({}, "default"), ({"corpus": "own.jsonl"}, "own.jsonl")]
)
def test_which_passages_are_encoded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, settings: dict[str, str], corpus: str
) -> None:
    tiny.save_parts(tmp_path)
    parts = {
        "question_encoder": str(tmp_path / "encoder"),
        "generator": str(tmp_path / "generator"),
        "output_dir": str(tmp_path / "run"),
    }

    def asked(source: str) -> None:
        raise LookupError(source)

    monkeypatch.setattr(build, "load_passages", asked)
    with pytest.raises(LookupError, match=f"^{corpus}$"):
        build.build_model(RagConfig.from_dict(parts | settings))


def test_no_collator_without_tokenizers() -> None:
    model = tiny.rag_model()
    model.question_tokenizer = None
    with pytest.raises(ValueError, match="^question_tokenizer: expected a model that holds one"):
        build.collator_for(model)
