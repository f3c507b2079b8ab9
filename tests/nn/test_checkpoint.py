"""A saved RagModel with a part damaged or missing: the error says which."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from peft import LoraConfig, get_peft_model

from fastrag import RagModel
from tests.architectures import GENERATORS
from tests.tiny import rag_model


@pytest.fixture(scope="module")
def model() -> RagModel:
    def lora():
        return get_peft_model(GENERATORS["llama"](), LoraConfig(r=2, target_modules=["q_proj"]))

    return rag_model("causal", make_generator=lora)


@pytest.fixture
def folder(model: RagModel, tmp_path: Path) -> Path:
    """An adapter, the model under it, and two encoders."""
    model.save_pretrained(tmp_path / "m")
    return tmp_path / "m"


def reload(model: RagModel, folder: Path) -> RagModel:
    return RagModel.from_pretrained(folder, model.index, model.passages)


def test_settings_of_the_loss_come_back(tmp_path: Path) -> None:
    model = rag_model(objective="pdist", tau_lm=0.5, label_smoothing=0.1)
    model.save_pretrained(tmp_path / "m")
    loss_fn = reload(model, tmp_path / "m").loss_fn
    assert (loss_fn.objective, loss_fn.tau_lm, loss_fn.label_smoothing) == ("pdist", 0.5, 0.1)


@pytest.mark.parametrize(
    "part",
    ["generator/adapter_model.safetensors", "generator/adapter_config.json", "generator_base"],
)
def test_missing_parts_are_named(model: RagModel, folder: Path, part: str) -> None:
    """PEFT and transformers would ask the hub, and complain of the name of a repository."""
    path = folder / part
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    with pytest.raises(ValueError) as caught:
        reload(model, folder)
    assert str(caught.value).startswith(f"{path}: expected a part of a saved RagModel, got no such")


def test_missing_generator_is_named(tmp_path: Path) -> None:
    model = rag_model()
    model.save_pretrained(tmp_path / "m")
    shutil.rmtree(tmp_path / "m" / "generator")
    with pytest.raises(ValueError, match="m/generator: expected a part of a saved RagModel"):
        reload(model, tmp_path / "m")


@pytest.mark.parametrize("text", ["", "{", "[1]", '{"peft_type": 5}'])
def test_damaged_adapter_settings_are_named(model: RagModel, folder: Path, text: str) -> None:
    (folder / "generator" / "adapter_config.json").write_text(text)
    with pytest.raises(ValueError, match="generator/adapter_config.json: expected the settings of"):
        reload(model, folder)


@pytest.mark.parametrize("encoder", ["question_encoder", "passage_encoder"])
@pytest.mark.parametrize(
    ("file", "text"),
    [
        (None, None),
        ("config.json", None),
        ("config.json", "{"),
        ("config.json", "{}"),
        ("model.safetensors", None),
        ("model.safetensors", "cut"),
        ("fastrag_encoder.json", None),
        ("fastrag_encoder.json", "{"),
        ("fastrag_encoder.json", "[1]"),
    ],
)
def test_damaged_encoders_are_named(
    model: RagModel, folder: Path, encoder: str, file: str | None, text: str | None
) -> None:
    if file is None:
        shutil.rmtree(folder / encoder)
    elif text is None:
        (folder / encoder / file).unlink()
    else:
        (folder / encoder / file).write_text(text)
    with pytest.raises(ValueError, match=f"^{encoder}: ") as caught:
        reload(model, folder)
    assert str(folder / encoder) in str(caught.value) and "path:" not in str(caught.value)
