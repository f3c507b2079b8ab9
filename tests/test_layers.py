"""Imports point downwards only, layer by layer, and no modules import each other in a circle."""

from __future__ import annotations

import ast
import re
from collections.abc import Container
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
    "hf": {"nn", "index", "data", "functional", "ops", "folders", "messages", "manifests"},
    "serve": {"train", "generation", "nn", "index", "data", "ops", "folders", "messages"},
    "inspect": {
        "train",
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


# What a method imports when it is called, though it is built on the module itself.
CALLED_FROM_BELOW = {
    ("fastrag.nn.model", "fastrag.generation"),  # RagModel.generate
    ("fastrag.nn.exchange", "fastrag.hf.convert"),  # RagModel.from_hf, to_hf
}


def modules() -> dict[str, Path]:
    """Every module of the package by name, but for the root, which resolves names on first use."""
    found = {f"fastrag.kernels.{path.stem}": path for path in (ROOT / "kernels").glob("*.py")}
    for path in (ROOT / "fastrag").rglob("*.py"):
        parts = path.relative_to(ROOT).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    del found["fastrag"]
    return found


def needed(node: ast.AST, known: Container[str]) -> set[str]:
    """The modules that are imported anywhere in the code, in functions too; not for types alone."""
    if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test):
        return set()
    found = set()
    if isinstance(node, ast.Import):
        found = {alias.name for alias in node.names}
    elif isinstance(node, ast.ImportFrom):
        names = (f"{node.module}.{alias.name}" for alias in node.names)
        found = {name if name in known else str(node.module) for name in names}
    return found.union(*(needed(child, known) for child in ast.iter_child_nodes(node)))


def circles(imports: dict[str, set[str]]) -> dict[str, set[str]]:
    """What is left when modules that import none of the others, or that none imports, are gone."""
    while True:
        used = set().union(*imports.values())
        left = {name: found & imports.keys() for name, found in imports.items() if name in used}
        left = {name: found for name, found in left.items() if found}
        if left == imports:
            return left
        imports = left


def test_no_module_imports_itself_through_others() -> None:
    found = modules()
    imports = {
        name: needed(ast.parse(path.read_text(encoding="utf-8")), found) & found.keys() - {name}
        for name, path in found.items()
    }
    for above, below in CALLED_FROM_BELOW:
        assert below in imports[above], f"{above} no longer imports {below}: no exception"
        imports[above].remove(below)
    assert circles(imports) == {}


def test_a_circle_is_found() -> None:
    chain = {"top": {"a"}, "a": {"b"}, "b": {"c"}, "c": {"a", "leaf"}, "leaf": set()}
    assert circles(chain) == {"a": {"b"}, "b": {"c"}, "c": {"a"}}


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
