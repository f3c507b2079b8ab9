"""Ahead-of-time compilation of every shipped kernel configuration, on a machine without a GPU.

`aot_configs()` of a kernel module returns the specialisations that its launchers can use. This
module compiles all of them for each architecture and reads their resources from the assembler. It
thus finds kernels that spill, or need more shared memory than the architecture has, before they run
on a user's GPU.

    python -m fastrag.kernels.aot [--arch 90] [--module NAME] [--candidates] [--sample] [--json]
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib
import json
import pkgutil
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import triton
import triton.backends.nvidia
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

# Compute capability -> bytes of shared memory that one block may have.
SHARED_LIMIT = {80: 163 << 10, 86: 99 << 10, 90: 227 << 10, 100: 227 << 10}
_WARP_SIZE = 32
_REGISTERS_PER_SM = 65536
_REGISTER_GRANULE = 8  # per thread; a warp's registers are allocated in such steps
_WARPS_PER_SM = {80: 64, 86: 48, 90: 64, 100: 64}
_SHARED_PER_SM = {80: 164 << 10, 86: 100 << 10, 90: 228 << 10, 100: 228 << 10}
_SHARED_RESERVED = 1 << 10  # per block, by the driver


@dataclass(frozen=True)
class AotConfig:
    """One specialisation of a kernel: what the launcher fixes before it compiles."""

    kernel: Any  # triton.JITFunction
    types: Mapping[str, str]  # argument -> Triton type, e.g. "*fp32", "i32"
    constants: Mapping[str, Any]  # constexpr argument -> value, and integers specialised to 1
    num_warps: int = 4
    num_stages: int = 3
    aligned: tuple[str, ...] = ()  # integers that the launcher makes multiples of 16
    archs: tuple[int, ...] = ()  # compute capabilities that it is launched on; empty: all

    @property
    def name(self) -> str:
        used = (self.types.get(name, "") for name in self.kernel.arg_names)
        kinds = ("*fp", "*bf", "*i8", "tensordesc")
        stored = {t.removeprefix("*") for t in used if t.startswith(kinds)}
        flags = ",".join(f"{key}={value}" for key, value in self.constants.items())
        return f"{self.kernel.fn.__name__}[{'/'.join(sorted(stored))},{flags}]"

    def source(self) -> ASTSource:
        names = self.kernel.arg_names
        signature = {n: "constexpr" if n in self.constants else self.types[n] for n in names}
        # torch allocates on 512-byte boundaries; the launcher specialises on it.
        aligned = [
            i for i, n in enumerate(names) if signature[n].startswith("*") or n in self.aligned
        ]
        return ASTSource(
            fn=self.kernel,
            signature=signature,
            constexprs=dict(self.constants),
            attrs={(i,): [["tt.divisibility", 16]] for i in aligned},
        )


@dataclass(frozen=True)
class Resources:
    """What the assembler gave one configuration on one architecture."""

    name: str
    arch: int
    num_warps: int
    registers: int  # per thread
    stack: int  # bytes per thread; above 0 the kernel spills
    shared: int  # bytes per block, dynamic included
    instructions: tuple[str, ...]  # matrix and asynchronous copy instructions in use

    @property
    def occupancy(self) -> float:
        """Share of the warps of a multiprocessor that registers and shared memory let live."""
        granted = -(-self.registers // _REGISTER_GRANULE) * _REGISTER_GRANULE
        by_registers = _REGISTERS_PER_SM // (granted * _WARP_SIZE * self.num_warps)
        by_shared = _SHARED_PER_SM[self.arch] // (self.shared + _SHARED_RESERVED)
        by_warps = _WARPS_PER_SM[self.arch] // self.num_warps
        blocks = min(by_registers, by_shared, by_warps)
        return blocks * self.num_warps / _WARPS_PER_SM[self.arch]

    def defects(self) -> list[str]:
        """Return what makes this configuration unfit to ship; empty if nothing does."""
        found = []
        if self.stack:
            found.append(f"{self.name} on sm_{self.arch} spills {self.stack} bytes a thread")
        if self.shared > SHARED_LIMIT[self.arch]:
            found.append(
                f"{self.name} on sm_{self.arch} wants {self.shared} bytes of shared memory, "
                f"the limit is {SHARED_LIMIT[self.arch]}"
            )
        return found


def all_configs(module: str | None = None, offered_by: str = "aot_configs") -> list[AotConfig]:
    """Return the configurations of every kernel module, or of one.

    offered_by: the function of a module that names them, `aot_configs` for what the launchers ask
    for where nothing was measured, `aot_candidates` for all that tuning may choose from.

    Raises:
        RuntimeError: TRITON_INTERPRET is set, under which kernels cannot be compiled.
        ValueError: there is no kernel module of that name with configurations.
    """
    if triton.knobs.runtime.interpret:
        raise RuntimeError("kernels cannot be compiled in a process with TRITON_INTERPRET set")
    package = importlib.import_module("fastrag.kernels")
    names = [m.name for m in pkgutil.iter_modules(package.__path__) if m.name != "aot"]
    modules = {name: importlib.import_module(f"fastrag.kernels.{name}") for name in names}
    offers = {name: getattr(m, offered_by) for name, m in modules.items() if hasattr(m, offered_by)}
    if module is not None and module not in offers:
        raise ValueError(f"module: expected one of {sorted(offers)}, got {module!r}")
    chosen = offers.values() if module is None else [offers[module]]
    return [config for offer in chosen for config in offer()]


def sample(configs: Iterable[AotConfig]) -> list[AotConfig]:
    """Return as many as show every dtype, flag and block size of every kernel at least once."""
    chosen: list[AotConfig] = []
    seen: set[tuple[str, str, Any]] = set()
    for config in configs:
        kernel = config.kernel.fn.__name__
        options = {**config.types, **config.constants, "num_warps": config.num_warps}
        shown = {(kernel, name, value) for name, value in options.items()}
        if not shown <= seen:
            chosen.append(config)
            seen |= shown
    return chosen


def build(config: AotConfig, arch: int) -> Any:
    """Compile one configuration for one compute capability: a triton CompiledKernel."""
    options = {"num_warps": config.num_warps, "num_stages": config.num_stages}
    target = GPUTarget("cuda", arch, _WARP_SIZE)
    return triton.compile(config.source(), target=target, options=options)


def examine(cubin: bytes, tool: str, *options: str) -> str:
    """Return what a tool that comes with Triton, cuobjdump or nvdisasm, says of an object."""
    path = Path(triton.backends.nvidia.__file__).parent / "bin" / tool
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        done = subprocess.run(
            [path, *options, file.name], capture_output=True, text=True, check=True
        )
    return done.stdout


def compile_config(config: AotConfig, arch: int) -> Resources:
    """Compile one configuration for one compute capability and read its resources.

    Raises:
        RuntimeError: the resources cannot be read from the compiled object.
    """
    compiled = build(config, arch)
    said = examine(compiled.asm["cubin"], "cuobjdump", "--dump-resource-usage")
    usage = re.search(r"REG:(\d+) STACK:(\d+)", said)
    if usage is None:
        raise RuntimeError(f"{config.name}: cuobjdump says {said!r}")
    ptx = compiled.asm["ptx"]
    seen = tuple(word for word in ("wgmma", "mma.sync", "tcgen05", "cp.async") if word in ptx)
    return Resources(
        name=config.name,
        arch=arch,
        num_warps=config.num_warps,
        registers=int(usage[1]),
        stack=int(usage[2]),
        shared=compiled.metadata.shared,
        instructions=seen,
    )


def compile_all(configs: Iterable[AotConfig], archs: Iterable[int]) -> Iterator[Resources]:
    """Compile every configuration for every compute capability in `archs`."""
    for arch in archs:
        for config in configs:
            if not config.archs or arch in config.archs:
                yield compile_config(config, arch)


def main(argv: list[str] | None = None) -> int:
    """Print the resources of every configuration; exit code 1 if one of them is unfit to ship."""
    parser = argparse.ArgumentParser(prog="python -m fastrag.kernels.aot", description=__doc__)
    parser.add_argument("--arch", type=int, action="append", choices=sorted(SHARED_LIMIT))
    parser.add_argument("--module", help="one kernel module, e.g. doc_scores (default: all)")
    parser.add_argument(
        "--candidates", action="store_true", help="what tuning may choose from (slow)"
    )
    parser.add_argument(
        "--sample", action="store_true", help="every dtype, flag and block size once (quick)"
    )
    parser.add_argument("--json", action="store_true", help="one JSON object a line")
    args = parser.parse_args(argv)
    defects = []
    offered_by = "aot_candidates" if args.candidates else "aot_configs"
    configs = all_configs(args.module, offered_by)
    if args.sample:
        configs = sample(configs)
    for found in compile_all(configs, args.arch or sorted(SHARED_LIMIT)):
        defects += found.defects()
        row = dataclasses.asdict(found) | {"occupancy": round(found.occupancy, 3)}
        line = json.dumps(row) if args.json else describe(found)
        sys.stdout.write(line + "\n")
    sys.stderr.writelines(f"{defect}\n" for defect in defects)
    return 1 if defects else 0


def describe(found: Resources) -> str:
    """Return the resources as one line."""
    return (
        f"sm_{found.arch:<4} {found.registers:>4} registers {found.stack:>5} B stack "
        f"{found.shared:>7} B shared {found.occupancy:>5.0%} occupancy  {found.name}"
    )


if __name__ == "__main__":
    sys.exit(main())
