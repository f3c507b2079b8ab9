"""Imports point downwards only: what is read at import time, layer by layer."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

# layer -> the layers that its modules may import when they are imported themselves
BELOW = {
    "messages": set(),
    "terminal": set(),
    "folders": set(),
    "manifests": {"messages"},
    "reference": set(),
    "kernels": set(),
    "profiling": set(),
    "ops": {"profiling", "messages"},
    "functional": {"ops", "messages"},
    "testing": set(),
    "data": {"functional", "ops", "messages", "manifests"},
    "index": {"profiling", "data", "functional", "ops", "folders", "messages", "manifests"},
    "freshness": {"profiling", "index", "functional", "ops", "messages"},
    "nn": {
        "profiling",
        "freshness",
        "index",
        "data",
        "functional",
        "ops",
        "folders",
        "messages",
        "manifests",
    },
    "generation": {"nn", "index", "data", "functional", "ops", "folders", "messages", "manifests"},
    "eval": {
        "generation",
        "nn",
        "index",
        "data",
        "functional",
        "ops",
        "folders",
        "messages",
        "manifests",
    },
    "train": {
        "profiling",
        "freshness",
        "eval",
        "generation",
        "nn",
        "index",
        "data",
        "functional",
        "ops",
        "folders",
        "messages",
        "manifests",
        "terminal",
    },
    "info": {"kernels", "ops", "profiling", "terminal"},
    # everything else is imported inside the commands, so that --help is quick
    "cli": {"messages", "terminal"},
}


# what else a module of a backend may import: it is imported itself when that backend is chosen
OF_BACKEND = {"triton": {"kernels"}, "cpp": {"_C"}}


def files(layer: str) -> list[Path]:
    if layer == "kernels":
        return sorted((ROOT / "kernels").glob("*.py"))
    folder = ROOT / "fastrag" / layer
    return sorted(folder.rglob("*.py")) if folder.is_dir() else [folder.with_suffix(".py")]


def imported(path: Path) -> set[str]:
    """The parts of fastrag that a module imports at its top level."""
    found = set()
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.ImportFrom) and node.module == "fastrag":
            found |= {name.name for name in node.names}
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("fastrag."):
            found.add(str(node.module).split(".")[1])
        elif isinstance(node, ast.Import):
            found |= {n.name.split(".")[1] for n in node.names if n.name.startswith("fastrag.")}
    return found - {"__version__"}


@pytest.mark.parametrize("layer", BELOW)
def test_imports_point_downwards(layer: str) -> None:
    assert files(layer), layer
    for path in files(layer):
        below = BELOW[layer] | OF_BACKEND.get(path.stem.partition("_")[0], set()) | {layer}
        above = imported(path) - below
        assert not above, f"{path.relative_to(ROOT)} imports {', '.join(sorted(above))}"


def test_every_module_has_a_layer() -> None:
    parts = {path.stem for path in (ROOT / "fastrag").iterdir() if not path.stem.startswith("_")}
    assert parts - {"py"} <= set(BELOW)


def test_the_documented_layers_are_these() -> None:
    """docs/architecture.md lists every layer, and each above the layers that it may import."""
    text = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    table = text.partition("| Layer | Folder | Holds |")[2].partition("\n\n")[0]
    folders = [row.split("|")[2] for row in table.strip().splitlines()]
    places = [re.findall(r"`(?:fastrag/)?(\w+)(?:\.py|/)?`", folder) for folder in folders]
    height = {layer: -i for i, row in enumerate(places) for layer in row if layer in BELOW}
    assert height.keys() == BELOW.keys()
    for layer, below in BELOW.items():
        above = {each for each in below if height[each] >= height[layer]}
        assert not above, f"{layer} may import {', '.join(sorted(above))}, which stands no lower"


def test_the_documented_files_exist() -> None:
    text = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    named = set(re.findall(r"`((?:\w+/)+(?:\w+\.py)?\w*|\w+\.(?:py|md))`", text)) - {"__init__.py"}
    assert "ops/chunks.py" in named and "tests/cli" in named
    for path in sorted(named):
        assert (ROOT / path).exists() or (ROOT / "fastrag" / path).exists(), path
