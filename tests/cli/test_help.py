"""`fastrag info` and `fastrag --help`."""

from __future__ import annotations

import contextlib
import re
import subprocess
import sys

import pytest

import fastrag
from fastrag.cli import main
from fastrag.train import RagConfig
from fastrag.train.parsing import dotted_hints
from tests.cli.commands import ENVIRONMENT


def test_info(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["info"]) == 0
    out = capsys.readouterr().out
    assert "torch 2." in out and "backend triton" in out


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="^0$"):
        main(["--version"])
    assert capsys.readouterr().out == f"fastrag {fastrag.__version__}\n"


def test_help_needs_no_heavy_import() -> None:
    code = (
        "import sys, fastrag.cli\n"
        "try: fastrag.cli.main(['--help'])\n"
        "except SystemExit: pass\n"
        "print(sorted({'torch', 'transformers', 'numpy'} & sys.modules.keys()), file=sys.stderr)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    assert done.stderr.strip() == "[]"
    assert "index build or verify" not in done.stderr and "evaluate" in done.stdout


COMMANDS = ("", "train", "warmup", "index", "index build", "index verify", "index info")
COMMANDS += ("evaluate", "ask", "inspect", "serve", "info")


@pytest.mark.parametrize(
    "words", [*(f"{command} --help" for command in COMMANDS), "train --training.help"]
)
def test_help_fits_80_columns(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, words: str
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    with contextlib.suppress(SystemExit):
        main(words.split())
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("usage: fastrag")
    assert [line for line in lines if len(line) > 80] == []


def test_help_of_train_lists_settings_alone(capsys: pytest.CaptureFixture[str]) -> None:
    """One option for each setting, with its type and default; none that reads a file of them."""
    with contextlib.suppress(SystemExit):
        main(["train", "--help"])
    text = capsys.readouterr().out
    main(["train", "--training.help"])
    whole = capsys.readouterr().out
    fields = set(re.findall(r"^  --([\w.]+)", text + whole, re.MULTILINE))
    own = {"resume", "print_config", "training.help"}
    assert fields - own == dotted_hints(RagConfig).keys()
    assert "  --retriever.n_docs INTEGER\n" in text and "K (default: 5)" in text
    assert "  --training.bf16 {true,false}\n" in text
    assert "--training.optim " not in text and "  --training.optim TEXT\n" in whole
    assert "null" in text and not re.search("None|False|Union|Literal|configuration file", text)
