"""push_to_hub, to a stand-in of the Hub on this disk, and the card that goes with it."""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub
import pytest
import torch
import yaml
from transformers import TrainingArguments

from fastrag import RagModel
from fastrag.nn.card import model_card, write_card
from fastrag.train import RagTrainer
from tests import tiny
from tests.hf.models import rag


class LocalHub:
    """huggingface_hub.HfApi, whose repositories are snapshots in the local cache."""

    def __init__(self, root: Path) -> None:
        self.root, self.calls = root, []

    def __call__(self, token=None):
        self.calls.append(("token", token))
        return self

    def create_repo(self, repo_id, *, private=None, exist_ok=False):
        huggingface_hub.utils.validate_repo_id(repo_id)
        self.calls.append(("repository", repo_id, private, exist_ok))
        return SimpleNamespace(repo_id=repo_id)

    def create_branch(self, repo_id, *, branch, exist_ok):
        self.calls.append(("branch", repo_id, branch, exist_ok))

    def upload_folder(self, *, repo_id, folder_path, revision, commit_message, create_pr):
        self.calls.append(("commit", repo_id, revision, commit_message, create_pr))
        repository = self.root / f"models--{repo_id.replace('/', '--')}"
        (repository / "refs").mkdir(parents=True)
        (repository / "refs" / "main").write_text("a" * 40)
        shutil.copytree(folder_path, repository / "snapshots" / ("a" * 40))
        return SimpleNamespace(oid="a" * 40)


@pytest.fixture
def hub(tmp_path, monkeypatch):
    made = LocalHub(tmp_path / "cache")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(made.root))
    monkeypatch.setattr(huggingface_hub, "HfApi", made)
    monkeypatch.chdir(tmp_path)
    return made


def card_of(path: Path) -> tuple[dict, str]:
    _, metadata, text = path.read_text(encoding="utf-8").split("---\n", 2)
    return yaml.safe_load(metadata), text


def test_a_pushed_model_is_read_by_its_id(hub):
    model = RagModel.from_hf(rag(retrieves=True, dtype=torch.float32))
    commit = model.push_to_hub("me/rag", include_index=True, private=True, token="secret")
    assert commit.oid == "a" * 40
    assert hub.calls == [
        ("token", "secret"),
        ("repository", "me/rag", True, True),
        ("commit", "me/rag", None, "Upload model", False),
    ]
    again = RagModel.from_pretrained("me/rag")
    batch = model.processor.collate([{"question": "ada", "answers": ["red"]}])
    torch.testing.assert_close(again(**batch).loss, model(**batch).loss)
    tiny.same_weights(again, model)
    [file] = hub.root.glob("models--me--rag/snapshots/*/README.md")
    metadata, text = card_of(file)
    assert metadata["library_name"] == "fastrag"
    assert metadata["tags"] == ["retrieval-augmented-generation"]
    assert '"me/rag"' in text and model.index.checksum() in text and "## Metrics" not in text


def test_a_branch_and_a_pull_request(hub):
    model = tiny.rag_model()
    model.push_to_hub("rag", revision="new", create_pr=True, commit_message="Try", card="mine\n")
    assert hub.calls[1:] == [
        ("repository", "rag", None, True),
        ("branch", "rag", "new", True),
        ("commit", "rag", "new", "Try", True),
    ]
    [file] = hub.root.glob("models--rag/snapshots/*/README.md")
    assert file.read_text() == "mine\n"
    with pytest.raises(ValueError, match="index: expected an index"):  # it was not pushed
        RagModel.from_pretrained("rag")
    with pytest.raises(ValueError, match="a b"):
        model.push_to_hub("a b")


def test_the_card_names_model_data_metrics_and_index(tmp_path):
    model = tiny.rag_model("causal", shared=True, marginal="sequence")
    model.passages.origin = {"corpus": "wiki|2018\nsmall"}
    card = model_card(
        model, data={"questions": "nq"}, metrics={"em": 0.41234567, "n": 12}, license="mit"
    )
    write_card(tmp_path, card)
    metadata, text = card_of(tmp_path / "README.md")
    assert metadata["license"] == "mit"
    rows = dict(re.findall(r"^\| (.+?) \| (.+) \|$", text, flags=re.MULTILINE))
    assert rows["marginal"] == "sequence" and rows["generator"] == "LlamaForCausalLM"
    assert rows["passage encoder"] == rows["question encoder"] == "BertModel"
    assert (rows["em"], rows["n"], rows["questions"]) == ("0.4123", "12", "nq")
    assert (rows["kind"], rows["passages"], rows["width"]) == ("FlatIndex", "12", "16")
    assert rows["corpus"] == r"wiki\|2018 small" and rows["checksum"] == model.index.checksum()
    assert text.startswith("\n# RAG-Sequence with LlamaForCausalLM\n")


def test_a_saved_model_with_a_card_is_replaced(tmp_path):
    model = tiny.rag_model()
    model.save_pretrained(tmp_path / "model", card="first\n")
    write_card(tmp_path / "model", "second\n")
    model.save_pretrained(tmp_path / "model", card="third\n", include_index=True)
    assert (tmp_path / "model" / "README.md").read_text() == "third\n"
    tiny.same_weights(RagModel.from_pretrained(tmp_path / "model"), model)


def test_a_trainer_writes_the_card_of_what_it_knows(tmp_path):
    model, questions = tiny.rag_model(), tiny.questions()
    arguments = TrainingArguments(tmp_path, report_to="none", use_cpu=True, disable_tqdm=True)
    trainer = RagTrainer(model, arguments, tiny.collator(), questions, questions)
    trainer.save_model(tmp_path / "before")
    assert "## Metrics" not in (tmp_path / "before" / "README.md").read_text()
    trainer.evaluate()
    trainer.save_model()
    _, text = card_of(tmp_path / "model" / "README.md")
    metrics = trainer.last_evaluation.metrics
    assert f"| recall@5 | {metrics['recall@5']:.4g} |" in text
    assert "| decoding | RAG-Token, K = 3 |" in text
    assert "| number of training questions | 12 |" in text and model.index.checksum() in text
    trainer.create_model_card(model_name="mine", license="mit")
    metadata, text = card_of(tmp_path / "README.md")
    assert metadata["license"] == "mit" and "\n# mine\n" in text
