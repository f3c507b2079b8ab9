"""What is built, what an installation asks for, and what `import fastrag` costs.

The slow half builds sdist and wheel without a network and installs them, and an editable checkout,
into throw-away environments that see the packages of the running one but not its fastrag.
"""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from email.parser import HeaderParser
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import fastrag
from fastrag.ops import backends

ROOT = Path(__file__).resolve().parent.parent
BASE_REQUIREMENTS = {
    "accelerate",
    "docstring-parser",
    "jsonargparse",
    "numpy",
    "pyyaml",
    "safetensors",
    "torch",
    "tqdm",
    "transformers",
    "triton",
}
EXTRAS = {
    "bench",
    "bm25",
    "datasets",
    "demo",
    "faiss",
    "faiss-gpu",
    "inspect",
    "peft",
    "plots",
    "serve",
    "tensorboard",
    "test",
}


def run(*command: str | Path, cwd: Path, **variables: str) -> str:
    """Run a command and give its output; a failure shows what it printed."""
    done = subprocess.run(
        [str(part) for part in command],
        cwd=cwd,
        env={**os.environ, **variables},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, f"{command} in {cwd}:\n{done.stdout}\n{done.stderr}"
    return done.stdout


# ---------------------------------------------------------------------------------------- quick


def modules_after(statement: str) -> set[str]:
    """Top-level modules that a fresh interpreter holds after a statement, sockets forbidden."""
    code = (
        "import sys\n"
        "def forbid(event, args):\n"
        "    if event in ('socket.connect', 'socket.getaddrinfo'):\n"
        "        raise RuntimeError(f'network use: {event} {args}')\n"
        "sys.addaudithook(forbid)\n"
        f"{statement}\n"
        "print(*{name.partition('.')[0] for name in sys.modules})\n"
    )
    return set(run(sys.executable, "-c", code, cwd=ROOT).split())


def test_import_is_lean() -> None:
    modules = modules_after("import fastrag")
    assert "fastrag" in modules
    assert not modules & {"torch", "triton", "transformers", "numpy", "matplotlib"}


def test_the_functional_depth_needs_torch_alone() -> None:
    modules = modules_after("import fastrag.functional")
    assert "torch" in modules
    assert not modules & {"triton", "transformers", "matplotlib"}


@pytest.mark.parametrize("name", fastrag.__all__)
def test_public_name_resolves(name: str) -> None:
    value = getattr(fastrag, name)
    assert value is getattr(fastrag, name)
    assert name in dir(fastrag)
    if not isinstance(value, str):
        assert (value.__doc__ or "").strip(), f"{name} has no docstring"


def test_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'RagLos'"):
        _ = fastrag.RagLos  # type: ignore[attr-defined]


def test_kernels_is_not_ours() -> None:
    # A regular package here would hide, or be hidden by, the distribution of that name.
    assert not (ROOT / "kernels" / "__init__.py").exists()
    spec = importlib.util.find_spec("kernels")
    assert spec is None or spec.origin is None or not Path(spec.origin).is_relative_to(ROOT)
    assert importlib.util.find_spec("fastrag.kernels.doc_scores") is not None


@pytest.mark.skipif(
    os.environ.get("FASTRAG_EXPECT_EXT") != "1", reason="set by the targets of the Makefile"
)
def test_the_extension_is_built() -> None:
    """Without it the tests of the C++ kernels skip themselves, and nobody would notice."""
    assert backends.why_not("cpp") == ""


def test_an_extension_of_other_sources_is_not_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("fastrag._C", reason="the extension module is not built")
    copied = shutil.copytree(ROOT / "csrc", tmp_path / "csrc")
    monkeypatch.setattr(backends, "_CSRC", copied)
    assert backends._probe_extension() == ""
    with (copied / "isa.h").open("a") as header:
        header.write("// changed\n")
    assert "python setup.py build_ext --inplace --force" in backends._probe_extension()
    monkeypatch.setattr(backends, "_CSRC", tmp_path / "none")  # as where a wheel is installed
    assert backends._probe_extension() == ""


def test_import_does_not_load_the_extension() -> None:
    code = "import sys, fastrag.functional; print('fastrag._C' in sys.modules)"
    assert run(sys.executable, "-c", code, cwd=ROOT).strip() == "False"


def pins() -> dict[str, str]:
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    found = {}
    for line in lines:
        if line and not line.startswith("#"):
            match = re.fullmatch(r"([A-Za-z0-9._-]+)==([0-9][A-Za-z0-9.]*)", line)
            assert match, f"not an exact pin without a local part: {line!r}"
            found[canonicalize_name(match[1])] = match[2]
    return found


def test_constraints_are_exact() -> None:
    pinned = pins()
    assert pinned["torch"] == "2.13.0"
    assert pinned["triton"] == "3.6.0"
    assert tuple(map(int, pinned["numpy"].split("."))) < (2, 4)


# ----------------------------------------------------------------------------------------- slow


class Environment:
    """A virtual environment that sees the running one's packages, but not its editable fastrag.

    The running site-packages is a plain line of a .pth file: Python adds the folder to the path
    and does not act on the .pth files in it, which is how editable installs work.
    """

    def __init__(self, folder: Path) -> None:
        run(sys.executable, "-m", "venv", "--without-pip", folder, cwd=folder.parent)
        self.python = folder / "bin" / "python"
        paths = {"base": str(folder), "platbase": str(folder)}
        self.site = Path(sysconfig.get_path("purelib", "venv", vars=paths))
        borrowed = {sysconfig.get_path("purelib"), sysconfig.get_path("platlib")}
        (self.site / "borrowed.pth").write_text("\n".join(sorted(borrowed)) + "\n")

    def install(self, *what: str | Path, **variables: str) -> None:
        pip = [self.python, "-m", "pip", "install", "--quiet", "--no-index", "--ignore-installed"]
        run(*pip, "--no-deps", "--no-build-isolation", *what, cwd=self.site, **variables)


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the tree, so that a build leaves nothing in the tree and finds nothing stale."""
    copy = tmp_path_factory.mktemp("checkout") / "fastrag"
    ignored = (
        ".git",
        ".venv",
        "runs",
        "build",
        "dist",
        "*.egg-info",
        "__pycache__",
        ".*_cache",
        "*.so",
    )
    shutil.copytree(ROOT, copy, ignore=shutil.ignore_patterns(*ignored))
    return copy


@pytest.fixture(scope="module")
def built(checkout: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The sdist, and the wheel built from it."""
    out = tmp_path_factory.mktemp("dist")
    run(sys.executable, "-m", "build", "--no-isolation", "--outdir", out, checkout, cwd=out)
    (wheel,) = out.glob("*.whl")
    (sdist,) = out.glob("*.tar.gz")
    return {"wheel": wheel, "sdist": sdist}


@pytest.mark.slow
def test_wheel_metadata(built: dict[str, Path]) -> None:
    version = fastrag.__version__
    with zipfile.ZipFile(built["wheel"]) as archive:
        text = archive.read(f"fastrag_torch-{version}.dist-info/METADATA").decode()
        scripts = archive.read(f"fastrag_torch-{version}.dist-info/entry_points.txt").decode()
    metadata = HeaderParser().parsestr(text)
    assert metadata["Name"] == "fastrag-torch"
    assert metadata["Version"] == version
    assert metadata["Requires-Python"] == ">=3.11"
    assert metadata["License-Expression"] == "Apache-2.0"
    assert "fastrag = fastrag.cli:main" in scripts

    requirements = [Requirement(line) for line in metadata.get_all("Requires-Dist", [])]
    for requirement in requirements:
        operators = [specifier.operator for specifier in requirement.specifier]
        assert operators == [">="], f"{requirement} is more than one lower bound"
        assert requirement.url is None

    base = {r.name for r in requirements if "extra ==" not in str(r.marker)}
    assert base == BASE_REQUIREMENTS
    assert set(metadata.get_all("Provides-Extra", [])) == EXTRAS
    bounds = {r.name: str(r.specifier) for r in requirements if r.name in BASE_REQUIREMENTS}
    assert bounds["torch"] == ">=2.11"
    assert bounds["triton"] == ">=3.6"
    assert bounds["transformers"] == ">=5.17"

    pinned = pins()
    for requirement in requirements:
        pin = pinned.get(canonicalize_name(requirement.name))
        assert pin is not None, f"constraints.txt does not pin {requirement.name}"
        assert pin in requirement.specifier


@pytest.mark.slow
def test_wheel_contents(built: dict[str, Path]) -> None:
    with zipfile.ZipFile(built["wheel"]) as archive:
        names = set(archive.namelist())
    assert {
        "fastrag/__init__.py",
        "fastrag/py.typed",
        "fastrag/kernels/doc_scores.py",
        "fastrag/data/facts/passages.jsonl.xz",
        "fastrag/data/facts/questions.jsonl.xz",
        "fastrag/inspect/assets/page.html",
    } <= names
    assert any(re.fullmatch(r"fastrag/data/facts/[A-Z]+(\.md)?", name) for name in names)
    assert any(name.endswith("licenses/LICENSE") for name in names)
    suffix = sysconfig.get_config_var("EXT_SUFFIX")
    assert {f"fastrag/_C{suffix}", "fastrag/_C.pyi"} <= names
    tops = {name.partition("/")[0] for name in names}
    assert tops == {"fastrag", f"fastrag_torch-{fastrag.__version__}.dist-info"}
    # every module of the tree is there
    modules = {path.relative_to(ROOT).as_posix() for path in (ROOT / "fastrag").rglob("*.py")}
    assert modules <= names


PROBE = """
import fastrag, fastrag.kernels.doc_scores as doc_scores, importlib.util
from fastrag.data import default_dataset
assert len(default_dataset().passages) > 1000
print(fastrag.__file__)
print(doc_scores.__file__)
spec = importlib.util.find_spec("kernels")
print(spec.origin if spec else None)  # None: absent, or a mere folder, which yields to a package
"""

# The backend that an ordinary loss takes, and a loss and its gradient on it.
LOSS_PROBE = """
import torch, fastrag.functional as F
from fastrag.ops import backends
hidden = torch.randn(1, 2, 3, 4, requires_grad=True)
labels, scores = torch.zeros(1, 3, dtype=torch.long), torch.zeros(1, 2)
F.rag_token_nll(hidden, torch.randn(5, 4), labels, scores).backward()
assert hidden.grad.isfinite().all()
print(backends.choose("marginal_nll", hidden.device, hidden.dtype))
print(backends.why_not("cpp"))
"""


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["wheel", "sdist", "editable"])
def test_install_and_import(
    kind: str, checkout: Path, built: dict[str, Path], tmp_path: Path
) -> None:
    environment = Environment(tmp_path / "env")
    environment.install(*(["-e", checkout] if kind == "editable" else [built[kind]]))

    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    if kind == "editable":
        installed = (checkout / "fastrag", checkout / "kernels")
    else:
        package = environment.site / "fastrag"
        installed = (package, package / "kernels")
    # At the root of a checkout its source tree comes before any installed copy.
    in_checkout = (checkout / "fastrag", checkout / "kernels")

    for cwd, (package, kernels) in {checkout: in_checkout, elsewhere: installed}.items():
        lines = run(environment.python, "-c", PROBE, cwd=cwd).splitlines()
        assert lines[:2] == [str(package / "__init__.py"), str(kernels / "doc_scores.py")]
        assert not lines[2].startswith(str(checkout))

    usage = run(environment.python.with_name("fastrag"), "--help", cwd=elsewhere)
    assert "train" in usage
    assert run(environment.python, "-c", LOSS_PROBE, cwd=elsewhere).split() == ["cpp"]


@pytest.mark.slow
@pytest.mark.parametrize(
    "variables", [{"CC": "false", "CXX": "false"}, {"FASTRAG_BUILD_EXT": "0"}], ids=str
)
def test_install_without_a_compiler(
    variables: dict[str, str], checkout: Path, tmp_path: Path
) -> None:
    """The installation succeeds, says what is missing, and the losses run on torch."""
    copy = tmp_path / "checkout"
    shutil.copytree(checkout, copy, ignore=shutil.ignore_patterns("build", "*.so"))
    environment = Environment(tmp_path / "env")
    environment.install(copy, **variables)
    said = run(environment.python, "-c", LOSS_PROBE, cwd=tmp_path).splitlines()
    assert said[0] == "torch"
    assert said[1].startswith("the extension module fastrag._C is not built")

    if "CC" not in variables:
        return
    build = [environment.python, "setup.py", "build_ext"]
    said = run("sh", "-c", '"$@" 2>&1', "sh", *build, cwd=copy, **variables)
    assert "fastrag._C is not built, fastrag will run on torch alone: " in said
    with pytest.raises(AssertionError, match="error: .*exit (code|status) 1"):
        run(*build, cwd=copy, FASTRAG_BUILD_EXT="1", **variables)


@pytest.mark.slow
def test_sdist_contents(built: dict[str, Path]) -> None:
    """All that the extension is built from."""
    with tarfile.open(built["sdist"]) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    sources = {path.relative_to(ROOT).as_posix() for path in (ROOT / "csrc").rglob("*.*")}
    assert sources <= names
    assert not any(name.endswith(".so") for name in names)


@pytest.mark.slow
def test_tests_run_uninstalled(checkout: Path, tmp_path: Path) -> None:
    environment = Environment(tmp_path / "env")
    listed = run(environment.python, "-m", "pip", "list", "--path", environment.site, cwd=tmp_path)
    assert "fastrag" not in listed
    chosen = "tests/test_packaging.py::test_kernels_is_not_ours"
    for options in ([], ["-P"]):  # -P: as the bare `pytest` script, which leaves cwd off the path
        said = run(environment.python, *options, "-m", "pytest", "-q", chosen, cwd=checkout)
        assert "1 passed" in said
