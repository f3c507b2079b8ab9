"""Hub ids: a folder first, then the cache of huggingface_hub; a refusal says what was tried."""

from __future__ import annotations

from pathlib import Path

import huggingface_hub
import pytest
import torch
from transformers import T5ForConditionalGeneration

from fastrag import RagModel, TextEncoder
from fastrag.nn.checkpoint import load_whole
from fastrag.nn.hub import model_folder
from fastrag.train import pretrained
from tests.tiny import batch, encoder, rag_model, same_weights, t5, tokenizer


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    cache = tmp_path / "cache"
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(cache))
    monkeypatch.chdir(tmp_path)
    return cache


def cached(cache: Path, repo: str) -> Path:
    """An empty repository in the cache, as a download leaves it; returns its snapshot."""
    root = cache / f"models--{repo.replace('/', '--')}"
    (root / "refs").mkdir(parents=True)
    (root / "refs" / "main").write_text("a" * 40)
    (root / "snapshots" / ("a" * 40)).mkdir(parents=True)
    return root / "snapshots" / ("a" * 40)


def as_links(snapshot: Path) -> None:
    """Replace files by links to blobs, which is what the cache holds."""
    blobs = snapshot.parents[1] / "blobs"
    blobs.mkdir()
    for i, file in enumerate(each for each in [*snapshot.rglob("*")] if each.is_file()):
        file.rename(blobs / str(i))
        file.symlink_to(blobs / str(i))


def test_encoder_and_generator_by_id(cache):
    expected, generator = encoder(), t5()
    expected.save_pretrained(cached(cache, "org/encoder"))
    generator.save_pretrained(cached(cache, "generator"))
    same_weights(TextEncoder.from_pretrained("org/encoder"), expected)
    same_weights(load_whole(T5ForConditionalGeneration, "generator"), generator)
    encoder(seed=4).save_pretrained("org/encoder")  # a folder of that name goes first
    same_weights(TextEncoder.from_pretrained("org/encoder"), encoder(seed=4))


def test_the_parts_of_a_config_by_id(cache):
    generator = t5()
    generator.save_pretrained(cached(cache, "org/generator"))
    tokenizer("seq2seq").save_pretrained(cache / "models--org--generator/snapshots" / ("a" * 40))
    expected = encoder()
    expected.save_pretrained(cached(cache, "org/encoder"))
    same_weights(pretrained.load_encoder("org/encoder", "question_encoder", "query"), expected)
    same_weights(pretrained.load_generator("org/generator"), generator)
    assert pretrained.generator_kind("org/generator") == "seq2seq"
    read = pretrained.load_tokenizer("org/generator", "generator")
    assert read.get_vocab() == tokenizer("seq2seq").get_vocab()
    with pytest.raises(ValueError, match="^generator: expected a model folder or a Hub id, got"):
        pretrained.load_generator("org/none")


def test_a_saved_model_by_id(cache, tmp_path):
    model = rag_model().eval()
    model.save_pretrained(tmp_path / "model", include_index=True)
    snapshot = cached(cache, "org/rag")
    snapshot.rmdir()
    (tmp_path / "model").rename(snapshot)
    as_links(snapshot)
    again = RagModel.from_pretrained("org/rag")
    assert torch.equal(again(**batch()).loss, model(**batch()).loss)


@pytest.mark.parametrize("source", ["org/none", "none"])
def test_an_id_that_is_nowhere_says_what_was_tried(cache, source):
    with pytest.raises(ValueError) as refused:
        TextEncoder.from_pretrained(source)
    assert str(refused.value) == (
        f"path: expected a model folder with config.json or modules.json or a Hub id, got "
        f"{source!r}: there is no such folder, no copy in the cache {cache}, and offline mode "
        "(HF_HUB_OFFLINE) forbids to ask the Hub"
    )


def test_the_hubs_answer_is_told(cache, monkeypatch):
    def unreachable(*_args, **_options):
        raise huggingface_hub.errors.LocalEntryNotFoundError("Got: ConnectError: no route\nmore")

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", unreachable)
    with pytest.raises(ValueError, match=r"the Hub does not give it \(Got: ConnectError: no route"):
        model_folder("generator", "org/none")


@pytest.mark.parametrize("source", ["./none", "/a/b", "a/b/c", "a b", Path("org/none")])
def test_what_can_only_be_a_folder_is_no_id(cache, source):
    with pytest.raises(ValueError, match="generator: .*: there is no such folder$"):
        model_folder("generator", source)


def test_only_the_files_of_a_model_are_asked_for(cache, monkeypatch):
    asked = []

    def download(repo, allow_patterns, ignore_patterns):
        asked.append((repo, allow_patterns, ignore_patterns))
        folder = cache / "got"
        folder.mkdir(parents=True, exist_ok=True)
        return str(folder)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    model_folder("generator", "org/old")
    (first, second) = asked
    assert "*.safetensors" in first[1] and "*.bin" not in first[1] and "onnx/*" in first[2]
    assert "*.bin" in second[1]  # a repository without safetensors
    model_folder("path", "org/rag", whole=True)
    assert asked[2] == ("org/rag", None, None)
