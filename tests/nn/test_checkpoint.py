"""A RagModel as a folder: it comes back the same, whole, and what is damaged is named."""

from __future__ import annotations

import json
import shutil
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import Qwen3ForCausalLM

from fastrag import FlatIndex, RagModel, manifests
from fastrag.nn import checkpoint
from tests.architectures import GENERATORS, lora_generator
from tests.tiny import TEMPLATE, batch, rag_model, same_weights


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


def test_an_index_of_other_content_is_a_warning_and_of_other_length_an_error(
    model: RagModel, folder: Path
) -> None:
    other = FlatIndex(16)
    other.add(torch.randn(12, 16))
    with pytest.warns(
        UserWarning, match=f"index: {folder} was saved with 12 passages in version 1"
    ):
        RagModel.from_pretrained(folder, other, model.passages)
    with pytest.warns(UserWarning, match="was saved with"):
        checkpoint.load_retriever(folder, other, model.passages)
    other.add(torch.randn(1, 16))
    message = "^index: expected one vector per passage, got 13 vectors and 12 passages"
    with pytest.warns(UserWarning, match="saved with"), pytest.raises(ValueError, match=message):
        RagModel.from_pretrained(folder, other, model.passages)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        reload(model, folder)
        RagModel.from_pretrained(folder, FlatIndex(16), model.passages)  # still to be filled
    settings = json.loads((folder / "rag_config.json").read_text())
    del settings["index"]["version"]  # as folders from before there were versions
    (folder / "rag_config.json").write_text(json.dumps(settings))
    reload(model, folder)


@pytest.mark.parametrize("kind", ["seq2seq", "causal"])
@pytest.mark.parametrize("shared", [False, True], ids=["two_encoders", "shared"])
def test_saved_folder_gives_the_same_loss(tmp_path, kind, shared):
    model = rag_model(kind, shared=shared, tau=0.2, learn_tau=True, marginal="sequence")
    with torch.no_grad():
        model.log_tau.add_(0.3)
    model.save_pretrained(tmp_path / "m")
    again = reload(model, tmp_path / "m")
    assert (again.passage_encoder is again.question_encoder) == shared
    model.eval()
    data = batch(kind)
    torch.testing.assert_close(again(**data).loss, model(**data).loss)
    same_weights(model, again)
    for name in ("n_docs", "marginal", "explore_tau"):
        assert getattr(again, name) == getattr(model, name)
    assert again.processor.template == model.processor.template
    words = again.processor.generator_tokenizer
    assert words.get_vocab() == model.processor.generator_tokenizer.get_vocab()


def test_folder_with_its_index(tmp_path):
    model = rag_model(tau=0.1).eval()
    model.save_pretrained(tmp_path / "m", include_index=True)
    again = RagModel.from_pretrained(tmp_path / "m", n_docs=2)
    assert again.n_docs == 2
    data = batch()
    assert again(**data).rows.equal(model(**data).rows[:, :2])


@pytest.mark.parametrize("name", ["README.md", "generator/notes.txt", "index/notes.txt"])
def test_foreign_files_stop_a_save(tmp_path: Path, name: str) -> None:
    model = rag_model()
    model.save_pretrained(tmp_path / "m", include_index=True)
    model.save_pretrained(tmp_path / "m", include_index=True)  # all that is there is its own
    (tmp_path / "m" / name).write_text("keep")
    with pytest.raises(ValueError, match=f"m: expected only files that .* got {name}$"):
        model.save_pretrained(tmp_path / "m")
    assert (tmp_path / "m" / name).read_text() == "keep"


def test_saving_again_replaces_whole(tmp_path):
    """A failed save leaves the good folder as it was, and no other behind."""
    model = rag_model(tau=0.1).eval()
    model.save_pretrained(tmp_path / "m")
    expected = model(**batch()).loss
    before = sorted(path.relative_to(tmp_path) for path in tmp_path.rglob("*"))

    def broken(*_, **__):
        raise OSError("disk full")

    other = rag_model(tau=0.1, seed=4)
    other.generator.save_pretrained = broken
    with pytest.raises(OSError, match="disk full"):
        other.save_pretrained(tmp_path / "m")
    assert sorted(path.relative_to(tmp_path) for path in tmp_path.rglob("*")) == before
    torch.testing.assert_close(reload(model, tmp_path / "m")(**batch()).loss, expected)
    del other.generator.save_pretrained
    other.save_pretrained(tmp_path / "m")
    with pytest.raises(AssertionError):
        same_weights(reload(model, tmp_path / "m"), model)
    same_weights(reload(model, tmp_path / "m"), other)


def test_a_save_while_it_is_read_gives_the_new_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Encoders of one save and a generator of another would be a model that nobody trained."""
    old, new = rag_model(seed=0), rag_model(seed=5)
    old.save_pretrained(tmp_path / "m")
    load_generator, saved = checkpoint._load_generator, []

    def interrupted(*arguments: Any) -> Any:
        if not saved:
            saved.append(new.save_pretrained(tmp_path / "m"))
        return load_generator(*arguments)

    monkeypatch.setattr(checkpoint, "_load_generator", interrupted)
    same_weights(reload(old, tmp_path / "m"), new)


@pytest.mark.parametrize(
    "settings",
    [
        {"target_modules": ["q_proj", "lm_head"]},
        {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
    ],
    ids=["head", "modules_to_save"],
)
@pytest.mark.parametrize("named", [False, True], ids=["base_kept", "base_named"])
def test_adapter_is_saved_as_adapter(tmp_path, settings, named):
    def make():
        model = lora_generator("qwen3", **settings)
        if not named:
            return model
        torch.manual_seed(0)  # the weights under lora_generator's adapter
        GENERATORS["qwen3"]().save_pretrained(tmp_path / "base")
        base = Qwen3ForCausalLM.from_pretrained(tmp_path / "base")
        wrapped = get_peft_model(base, LoraConfig(r=2, **settings))
        wrapped.load_state_dict(model.state_dict())
        return wrapped

    model = rag_model("causal", make_generator=make, tau=0.1).eval()
    model.save_pretrained(tmp_path / "m")
    assert (tmp_path / "m" / "generator" / "adapter_model.safetensors").exists()
    assert not (tmp_path / "m" / "generator" / "model.safetensors").exists()
    assert (tmp_path / "m" / "generator_base").exists() != named
    again = reload(model, tmp_path / "m")
    data = batch("causal")
    torch.testing.assert_close(again(**data).loss, model(**data).loss)
    trained = {name for name, p in model.generator.named_parameters() if p.requires_grad}
    assert trained == {n for n, p in again.generator.named_parameters() if p.requires_grad}


def test_merged_adapter(tmp_path):
    model = rag_model("causal", make_generator=lambda: lora_generator("qwen3"), tau=0.1).eval()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    model.save_pretrained(tmp_path / "m", merge_adapter=True)
    assert not (tmp_path / "m" / "generator" / "adapter_config.json").exists()
    again = reload(model, tmp_path / "m")
    data = batch("causal")
    torch.testing.assert_close(again(**data).loss, model(**data).loss, rtol=1e-4, atol=1e-5)
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


def test_merge_into_a_tied_head_is_refused(tmp_path):
    model = rag_model("causal", make_generator=lora_generator)
    with pytest.raises(ValueError, match="merge_adapter: expected an untied head, got LoRA"):
        model.save_pretrained(tmp_path / "m", merge_adapter=True)
    assert not (tmp_path / "m").exists()
    model.save_pretrained(tmp_path / "m")
    data = batch("causal")
    model.eval()
    torch.testing.assert_close(reload(model, tmp_path / "m")(**data).loss, model(**data).loss)


def test_save_killed_between_the_renames_is_taken_back(tmp_path):
    model = rag_model().eval()
    model.save_pretrained(tmp_path / "m")
    (tmp_path / "m").rename(tmp_path / ".m.old")
    torch.testing.assert_close(reload(model, tmp_path / "m")(**batch()).loss, model(**batch()).loss)


@pytest.mark.parametrize(
    "part",
    [
        "generator",
        "generator/adapter_model.safetensors",
        "generator/adapter_config.json",
        "generator/tokenizer_config.json",
        "generator_base",
        "generator_base/generation_config.json",
        "question_encoder",
        "question_encoder/config.json",
        "question_encoder/tokenizer_config.json",
        "passage_encoder/fastrag_encoder.json",
        "passage_encoder/model.safetensors",
    ],
)
def test_missing_parts_are_named(model: RagModel, folder: Path, part: str) -> None:
    """PEFT and transformers would take a default, or ask the hub for a repository of that name."""
    path = folder / part
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    with pytest.raises(ValueError) as caught:
        reload(model, folder)
    assert str(caught.value) == (
        f"{path}: expected a part of a saved RagModel, got no such file or folder"
    )


def test_index_and_base_may_be_given_instead(model: RagModel, folder: Path) -> None:
    model.save_pretrained(folder, include_index=True)
    for part in ("index", "passages", "generator_base"):
        shutil.rmtree(folder / part)
    again = RagModel.from_pretrained(
        folder, model.index, model.passages, base_generator=GENERATORS["llama"]()
    )
    assert again.index is model.index


@pytest.mark.parametrize("text", ["", "{", "[1]", '{"peft_type": 5}'])
def test_damaged_adapter_settings_are_named(model: RagModel, folder: Path, text: str) -> None:
    (folder / "generator" / "adapter_config.json").write_text(text)
    with pytest.raises(ValueError, match="generator/adapter_config.json: expected the settings of"):
        reload(model, folder)


@pytest.mark.parametrize("encoder", ["question_encoder", "passage_encoder"])
@pytest.mark.parametrize(
    ("file", "text"),
    [
        ("config.json", "{"),
        ("config.json", "{}"),
        ("model.safetensors", "cut"),
        ("fastrag_encoder.json", "{"),
        ("fastrag_encoder.json", "[1]"),
    ],
)
def test_damaged_encoders_are_named(
    model: RagModel, folder: Path, encoder: str, file: str, text: str
) -> None:
    (folder / encoder / file).write_text(text)
    with pytest.raises(ValueError, match=f"^{encoder}: ") as caught:
        reload(model, folder)
    assert str(folder / encoder) in str(caught.value) and "path:" not in str(caught.value)


def test_rejects_folders(tmp_path):
    model = rag_model()
    with pytest.raises(ValueError, match="path: expected a model folder that save_pretrained"):
        reload(model, tmp_path / "none")
    folder = tmp_path / "m"
    model.save_pretrained(folder)
    with pytest.raises(ValueError, match="index: expected an index"):
        RagModel.from_pretrained(folder)
    with pytest.raises(ValueError, match="index: expected vectors of width 16, .* got 8"):
        RagModel.from_pretrained(folder, FlatIndex(8), model.passages)
    with pytest.raises(ValueError, match="^index: expected an index, such as .* got str$"):
        RagModel.from_pretrained(folder, "runs/index", model.passages)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("keep")
    with pytest.raises(ValueError, match="expected an empty folder or a fastrag-model one"):
        model.save_pretrained(tmp_path / "mine")
    assert (tmp_path / "mine" / "notes.txt").read_text() == "keep"
    config = json.loads((folder / "generator" / "config.json").read_text())
    (folder / "generator" / "config.json").write_text(json.dumps({**config, "num_layers": 3}))
    with pytest.raises(ValueError, match="generator: expected the weights of a T5"):
        reload(model, folder)
    settings = json.loads((folder / "rag_config.json").read_text())
    (folder / "generator" / "config.json").write_text(json.dumps(config))
    for change, message in (
        ({"n_docs": "3"}, "rag_config.json: n_docs: expected a whole number .*1, got '3'"),
        ({"template": 5}, "rag_config.json: template: expected a mapping, got 5"),
    ):
        (folder / "rag_config.json").write_text(json.dumps({**settings, **change}))
        with pytest.raises(ValueError, match=message):
            reload(model, folder)
    (folder / "rag_config.json").write_text("5")
    with pytest.raises(ValueError, match="rag_config.json: expected a mapping, got 5"):
        reload(model, folder)
    (folder / "rag_config.json").write_text(json.dumps({**settings, "depth": 9}))
    with pytest.raises(ValueError, match="rag_config.json: expected the keys"):
        reload(model, folder)
    (folder / "rag_config.json").unlink()
    with pytest.raises(ValueError, match="rag_config.json: expected a JSON file, got No such file"):
        reload(model, folder)


@pytest.mark.parametrize(
    "file",
    [
        "generator/adapter_model.safetensors",
        "generator/tokenizer.json",
        "generator_base/config.json",
    ],
)
def test_rejects_damaged_files(tmp_path, file):
    model = rag_model("causal", make_generator=lora_generator)
    model.save_pretrained(tmp_path / "m")
    path = tmp_path / "m" / file
    path.write_bytes(path.read_bytes()[:40])
    with pytest.raises(ValueError, match=file.split("/")[0]):
        reload(model, tmp_path / "m")


@pytest.mark.parametrize("kind", ["seq2seq", "causal"])
def test_folders_without_a_processor_load(tmp_path: Path, kind: str) -> None:
    """Format 2 kept template and window in rag_config.json and the lengths nowhere."""
    model = rag_model(kind, tau=0.3).eval()
    folder = tmp_path / "m"
    model.save_pretrained(folder, include_index=True)
    with pytest.raises(ValueError, match="processor.json: expected a part of a saved RagModel"):
        (folder / "processor.json").unlink()
        RagModel.from_pretrained(folder)
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["parts"].remove("processor.json")
    manifest["version"] = 2
    del manifest[manifests.SEAL]
    manifests.write(folder / "manifest.json", manifests.sealed(manifest))
    settings = json.loads((folder / "rag_config.json").read_text())
    former = {"template": model.processor.template.to_dict(), "max_context": 32}
    manifests.write(folder / "rag_config.json", {**settings, **former})
    again = RagModel.from_pretrained(folder)
    assert again(**batch(kind)).loss.equal(model(**batch(kind)).loss)
    assert again.processor.max_context == 32 and again.processor.template == TEMPLATE
    retriever, processor = checkpoint.load_retriever(folder, None, None)
    assert len(retriever.passages) == 12 and processor.template == TEMPLATE
    manifests.write(folder / "rag_config.json", settings)
    with pytest.raises(ValueError, match=f"processor: expected a RagProcessor, as {folder} holds"):
        RagModel.from_pretrained(folder)
    assert RagModel.from_pretrained(folder, processor=model.processor).processor is model.processor
