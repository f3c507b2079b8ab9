"""README.md and docs/ say what is so: code runs, configs are valid, commands parse, links lead."""

from __future__ import annotations

import json
import re
import shlex
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    DPRConfig,
    DPRContextEncoder,
    DPRQuestionEncoder,
    LlamaConfig,
    LlamaForCausalLM,
    RagTokenForGeneration,
    RagTokenizer,
)
from transformers import RagConfig as HuggingFaceConfig

from fastrag import cli
from fastrag.terminal import columns
from fastrag.train import RagConfig
from fastrag.train.sections import LossConfig
from tests import tiny

ROOT = Path(__file__).resolve().parents[1]
README = ROOT / "README.md"
PAGES = (README, *sorted((ROOT / "docs").glob("*.md")))
# Of a page's runs, what takes long: the text, and what it is here.
SHORTER = {'"max_steps": 2000': '"max_steps": 4', "every:200": "every:2"}
WINDOW = 512  # tokens; what configs ask for by default


def blocks(page: Path, language: str) -> list[str]:
    text = page.read_text(encoding="utf-8")
    return re.findall(rf"^```{language}\n(.*?)^```", text, flags=re.MULTILINE | re.DOTALL)


def commands() -> list[Any]:
    return [
        pytest.param(shlex.split(line, comments=True), id=f"{page.name}: {line.split('#')[0]}")
        for page in PAGES
        for block in blocks(page, "sh")
        for line in block.replace("\\\n", " ").splitlines()
        if shlex.split(line, comments=True)
    ]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working directory, with the models and the data that the pages speak of."""
    monkeypatch.chdir(tmp_path)
    models = tmp_path / "models"
    tiny.encoder().save_pretrained(models / "minilm")
    tiny.tokenizer("encoder").save_pretrained(models / "minilm")
    config = LlamaConfig(**tiny.LLAMA | {"max_position_embeddings": WINDOW})
    LlamaForCausalLM(config).save_pretrained(models / "smollm2")
    tiny.tokenizer("causal").save_pretrained(models / "smollm2")
    data = tmp_path / "data"
    data.mkdir()
    passages = [{"id": p.id, "title": p.title, "text": p.text} for p in tiny.passages()]
    questions = [{"question": q.question, "answers": q.answers} for q in tiny.questions()]
    for name, rows in (("passages", passages), ("train", questions), ("dev", questions)):
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (data / f"{name}.jsonl").write_text(text)
    return tmp_path


def save_rag(models: Path) -> None:
    """A checkpoint of Hugging Face's RAG, and the passage encoder beside it."""
    dpr = DPRConfig(**tiny.BERT)
    bart = BartConfig(
        vocab_size=tiny.VOCAB,
        d_model=16,
        encoder_layers=1,
        decoder_layers=1,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        encoder_ffn_dim=24,
        decoder_ffn_dim=24,
        max_position_embeddings=WINDOW,
        decoder_start_token_id=tiny.EOS,
        forced_eos_token_id=None,
        **tiny.SPECIAL_IDS,
    )
    tokenizers = RagTokenizer(tiny.tokenizer("encoder"), tiny.tokenizer("seq2seq"))
    tokenizers.save_pretrained(models / "rag-token-nq")
    RagTokenForGeneration(
        config=HuggingFaceConfig.from_question_encoder_generator_configs(dpr, bart),
        question_encoder=DPRQuestionEncoder(dpr),
        generator=BartForConditionalGeneration(bart),
    ).save_pretrained(models / "rag-token-nq")
    DPRContextEncoder(dpr).save_pretrained(models / "dpr-passage")
    tokenizers.question_encoder.save_pretrained(models / "dpr-passage")


def run(page: Path) -> dict[str, Any]:
    """Executes a page's blocks of Python in order; returns the names they leave."""
    names: dict[str, Any] = {}
    for i, text in enumerate(blocks(page, "python")):
        for long, short in SHORTER.items():
            text = text.replace(long, short)
        exec(compile(text, f"{page.name}, block {i}", "exec"), names)
    return names


def test_readme_runs(folder: Path) -> None:
    names = run(README)
    for name in ("hidden", "weight", "query_emb", "passage_emb"):
        tensor = names[name]
        assert isinstance(tensor, torch.Tensor)
        assert tensor.grad is not None and bool(tensor.grad.abs().sum() > 0), name
    assert names["trainer"].state.global_step == 4
    assert (folder / names["config"].training.output_dir / "model").is_dir()
    assert names["config"].loss.marginal == LossConfig.marginal  # both ways in train one model


def test_guide_runs(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_rag(folder / "models")
    names = run(ROOT / "docs" / "guide.md")
    assert names["trainer"].state.global_step == 2
    assert names["model"].tau == 1.0 and names["model"].adapter.kind == "seq2seq"
    shown = capsys.readouterr().out
    assert re.search(r"^\d\.\d+ \d\.\d+ ", shown, flags=re.MULTILINE)
    assert shown.count("Passage(id=") == 3


def test_freshness_page_runs(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    names = run(ROOT / "docs" / "freshness.md")
    shown = capsys.readouterr().out
    assert shown.count("Refresh(step=") == 3 and "'staleness_retrieved': " in shown
    assert str(names["refresher"].policy) == "favourites:3+every:100"


def test_index_page_runs(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    page = ROOT / "docs" / "index.md"
    names = run(page)
    assert names["scores"].shape == names["rows"].shape == (2, 10)
    assert len(names["index"]) == 1000 and names["index"].n_live == 999
    for line in "".join(blocks(page, "sh")).splitlines():
        assert cli.main(shlex.split(line, comments=True)[1:]) == 0
    shown = capsys.readouterr().out
    assert "recall@10" in shown and "1000 vectors, all checksums hold" in shown


def test_evaluation_page_runs(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    record = {
        "_id": "5a8b57f2",
        "question": "Were they of the same nationality?",
        "answer": "yes",
        "supporting_facts": [["Ed Wood", 0]],
        "context": [["Ed Wood", ["He was an American."]]],
    }
    (folder / "data" / "hotpot_dev_distractor_v1.json").write_text(json.dumps([record]))
    tiny.rag_model().save_pretrained(folder / "runs" / "mine" / "model", include_index=True)
    names = run(ROOT / "docs" / "evaluation.md")
    shown = capsys.readouterr().out
    for name in ("recall@5", "em", "cover_em", "nll", "answer-mrr@5", "ece"):
        assert re.search(rf"^{name} ", shown, re.MULTILINE), name
    assert names["hits"].rows[0, 0] == 0 and names["passages"][0].title == "Ed Wood"
    assert "RAG-Token" in (folder / "results.md").read_text()


def test_inspector_page_runs(folder: Path) -> None:
    tiny.rag_model().save_pretrained(folder / "runs" / "mine" / "model", include_index=True)
    names = run(ROOT / "docs" / "inspector.md")
    assert len(names["readings"]) == len(tiny.questions())
    assert (folder / "page.html").read_text().count('class="question"') == len(names["readings"])


def test_the_transcript_is_of_the_readme() -> None:
    """Every command of the README is in it, and no line of output is wider than its terminal."""
    shown = blocks(ROOT / "docs" / "transcript.md", "text")
    commands = [block.partition("\n")[0].removeprefix("$ ") for block in shown]
    for line in next(each for each in blocks(README, "sh") if "fastrag train" in each).splitlines():
        if words := shlex.split(line, comments=True):
            assert any(shlex.split(each)[: len(words)] == words for each in commands), line
    output = [line for block in shown for line in block.splitlines()[1:]]
    assert max(map(columns, output)) <= 80 and "".join(output).count("cut") > 3


def test_no_other_page_has_code() -> None:
    """Each that has needs a test above."""
    pages = {page.name for page in PAGES if blocks(page, "python")}
    tested = ("README", "evaluation", "freshness", "guide", "index", "inspector")
    assert pages == {f"{name}.md" for name in tested}


def test_yaml_configs_are_valid() -> None:
    found = [text for page in PAGES for text in blocks(page, "yaml")]
    assert found
    for text in found:
        config = RagConfig.from_dict(yaml.safe_load(text))
        assert (config.training.max_steps, config.loss.marginal) == (2000, LossConfig.marginal)


def test_records_are_read(tmp_path: Path) -> None:
    from fastrag.data import read_passages, read_questions

    [block] = blocks(ROOT / "docs" / "guide.md", "json")
    (tmp_path / "passage.jsonl").write_text(block.splitlines()[0])
    (tmp_path / "question.jsonl").write_text(block.splitlines()[1])
    [passage] = read_passages(tmp_path / "passage.jsonl")
    [question] = read_questions(tmp_path / "question.jsonl")
    assert all(word in passage.text for word in question.answers[0].split())


@pytest.mark.parametrize("command", commands())
def test_commands_exist(command: list[str]) -> None:
    """Commands are parsed, not run: those of fastrag and make, modules, scripts and extras."""
    while "=" in command[0]:  # settings of the environment
        command = command[1:]
    name, *arguments = command
    if name == "fastrag" and arguments[0] == "train":
        assert cli.train.parser().parse_args(arguments[1:], defaults=False).config
    elif name == "fastrag":
        assert cli.parser().parse_args(arguments).run
    elif name == "make":
        makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
        assert re.search(rf"^{arguments[0]}:", makefile, flags=re.MULTILINE)
    elif name.startswith("python") and arguments[:1] == ["-m"] and arguments[1] != "pip":
        assert find_spec(arguments[1]), arguments[1]
    elif name.startswith("python") and "/" in arguments[0]:  # train.py is the reader's own
        assert (ROOT / arguments[0]).is_file()
    for extras in re.findall(r"^\.\[(.*)\]$", "\n".join(arguments), flags=re.MULTILINE):
        setup = (ROOT / "setup.py").read_text(encoding="utf-8")
        assert all(f'"{extra}": [' in setup for extra in extras.split(",")), extras


def test_every_fastrag_command_is_shown() -> None:
    found = [parameter.values[0] for parameter in commands()]
    shown = {command[1] for command in found if command[0] == "fastrag"}
    assert shown == {"train", "warmup", "evaluate", "ask", "inspect", "serve", "index", "info"}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    for link, heading in re.findall(r"\]\((?!https?://)([^)#]*)(?:#([^)]+))?\)", text):
        target = page.parent / link if link else page
        assert target.exists(), link
        if heading:
            titles = re.findall(r"^#+ (.+)$", target.read_text(encoding="utf-8"), re.MULTILINE)
            slugs = {re.sub(r"[^\w -]", "", title).lower().replace(" ", "-") for title in titles}
            assert heading in slugs, f"{link}#{heading}"


def test_readme_links_to_every_page() -> None:
    text = README.read_text(encoding="utf-8")
    assert [p.name for p in PAGES if p != README and f"(docs/{p.name})" not in text] == []
