"""`fastrag info` and `fastrag --help`."""

from __future__ import annotations

import subprocess
import sys

import pytest

import fastrag
from fastrag.cli import main
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
