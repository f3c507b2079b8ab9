"""README.md says what is so: its code runs, its configs are valid, its commands parse."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
import torch
import yaml

from fastrag import cli
from fastrag.train import RagConfig

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", README, flags=re.MULTILINE | re.DOTALL)


def test_the_loss_alone_runs() -> None:
    names: dict[str, object] = {}
    exec(blocks("python")[0], names)
    for name in ("hidden", "weight", "query_emb", "passage_emb"):
        tensor = names[name]
        assert isinstance(tensor, torch.Tensor)
        assert tensor.grad is not None and bool(tensor.grad.abs().sum() > 0), name


def test_the_system_is_configured_as_shown() -> None:
    imports, _, rest = blocks("python")[1].partition("config = ")
    call, _, training = rest.partition("\nmodel = ")
    names: dict[str, object] = {}
    exec(f"{imports}config = {call}", names)
    assert isinstance(names["config"], RagConfig)
    compile(f"model = {training}", "README.md", "exec")
    assert re.findall(r"\b(build_model|build_collator|RagTrainer|read_questions)\(", training)
    assert all(callable(names[name]) for name in ("build_model", "build_collator", "RagTrainer"))


def test_yaml_configs_are_valid() -> None:
    found = blocks("yaml")
    assert found
    for text in found:
        assert RagConfig.from_dict(yaml.safe_load(text)).steps == 2000


def test_commands_parse() -> None:
    commands = [
        shlex.split(line, comments=True)[1:]
        for block in blocks("sh")
        for line in block.splitlines()
        if line.startswith("fastrag ")
    ]
    assert {command[0] for command in commands} == {"train", "evaluate", "ask", "index", "info"}
    parser = cli._parser()
    for command in commands:
        assert parser.parse_args(command).run


@pytest.mark.parametrize("name", sorted(p.name for p in (ROOT / "docs").glob("*.md")))
def test_links_lead_somewhere(name: str) -> None:
    for source in (ROOT / "README.md", ROOT / "docs" / name):
        text = source.read_text(encoding="utf-8")
        for link in re.findall(r"\]\((?!https?://)([^)#]+)", text):
            assert (source.parent / link).exists(), f"{source.name}: {link}"


def test_make_targets_exist() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    targets = set(re.findall(r"^make ([a-z-]+)", "\n".join(blocks("sh")), flags=re.MULTILINE))
    assert targets >= {"demo", "test"}
    for target in targets:
        assert re.search(rf"^{target}:", makefile, flags=re.MULTILINE), target
