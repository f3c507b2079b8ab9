"""What a config leaves open, and what is taken then."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from fastrag.ops import backends
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


@pytest.mark.parametrize(
    ("variable", "value", "message"),
    [
        ("FASTRAG_BACKEND", "tourch", "^FASTRAG_BACKEND: no backend is called 'tourch'"),
        ("FASTRAG_BACKEND", "triton", "^FASTRAG_BACKEND=triton cannot run here: "),
        ("FASTRAG_CPU_ISA", "sse9", "^FASTRAG_CPU_ISA: expected one of .* got 'sse9'"),
    ],
)
def test_forced_choices_are_checked_before_the_corpus_is_encoded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, variable: str, value: str, message: str
) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    if value == "triton" and not backends.why_not("triton"):
        pytest.skip("triton can run here")
    if variable == "FASTRAG_CPU_ISA" and (reason := backends.why_not("cpp")):
        pytest.skip(reason)
    monkeypatch.setenv(variable, value)
    model = tiny.rag_model()
    encoder: Any = model.passage_encoder
    monkeypatch.setattr(type(encoder), "forward", None)
    with pytest.raises((RuntimeError, ValueError), match=message):
        build.build_index(
            tmp_path / "index",
            tiny.passages(2),
            encoder,
            template=tiny.TEMPLATE,
            encoder_tokenizer=tiny.tokenizer("encoder"),
            generator_tokenizer=tiny.tokenizer("seq2seq"),
            progress=False,
        )
    assert not (tmp_path / "index").exists()
