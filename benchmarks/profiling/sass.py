"""The instructions of an op's kernels, by family. Needs no GPU."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass, replace

from fastrag.kernels import aot

# Modules of kernels/ that each op launches.
_LOSS = ("linear_logp", "row_pass")
MODULES = {
    "marginal_loss": (*_LOSS, "mixture_pass", "group_pass"),
    "token_logp": _LOSS,
    "doc_scores": ("doc_scores",),
    "mips": ("mips", "mips_rescore"),
    "contexts": (),
    "decode": ("mixture_logp",),
}
# Matrix products come first: of a warpgroup (sm_90), of a warp, of the fifth generation (sm_100).
# Copies to shared memory follow, by the tensor memory accelerator and by a thread, asynchronously;
# then plain access to memory, and spilled registers.
FAMILIES = {
    "wgmma": r"[A-Z]GMMA",
    "mma": r"[HBIDQO]MMA",
    "tcgen05": r"UTC[A-Z]*MMA",
    "tma": r"UTMA(LD|ST|RED)G|UBLKCP",
    "ldgsts": r"LDGSTS",
    "ldg": r"LDG",
    "ldg.128": r"LDG\..*\b128",  # those of 16 bytes for each thread, among the above
    "stg": r"STG",
    "atomic": r"ATOMG?|REDG?",  # of global memory; the compiler's own, of shared memory, are ATOMS
    "spill": r"LDL|STL",
}
# A line of nvdisasm: an address, perhaps a predicate, and the instruction with its modifiers.
_LINE = re.compile(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]*)", re.MULTILINE)


@dataclass(frozen=True)
class Instructions:
    name: str
    arch: int
    total: int  # without the padding after the end
    families: dict[str, int]


def configs(op: str, pattern: str | None = None) -> list[aot.AotConfig]:
    """Return the configurations of an op's kernels whose names match.

    Raises:
        ValueError: there are none.
        RuntimeError: this process cannot compile (see `aot.all_configs`).
    """
    modules = MODULES.get(op, sorted({m for modules in MODULES.values() for m in modules}))
    if not modules:
        raise ValueError(f"--op: {op} launches no kernel of fastrag's")
    every = [config for module in modules for config in aot.all_configs(module)]
    found = [config for config in every if re.search(pattern or "", config.name)]
    if not found:
        raise ValueError(f"--kernel: none of {len(every)} configurations matches {pattern!r}")
    return found


def aligned(config: aot.AotConfig) -> aot.AotConfig:
    """Return the same with D, H, V and all strides as multiples of 16, as in most models."""
    there = [
        name
        for name in config.kernel.arg_names
        if (name in ("D", "H", "V") or name.startswith("stride_"))
        and name not in (*config.constants, *config.aligned)
    ]
    return replace(config, aligned=(*config.aligned, *there))


def count(config: aot.AotConfig, arch: int) -> Instructions:
    """Compile a configuration and count its instructions as they stand, not as they run."""
    listing = aot.examine(aot.build(config, arch).asm["cubin"], "nvdisasm", "-c")
    return Instructions(config.name, arch, *tally(listing))


def tally(listing: str) -> tuple[int, dict[str, int]]:
    """Return how many instructions a listing of nvdisasm has, and how many of each family."""
    found = Counter(_LINE.findall(listing))
    families = {
        family: sum(n for name, n in found.items() if re.match(rf"({pattern})(\.|$)", name))
        for family, pattern in FAMILIES.items()
    }
    return found.total() - found["NOP"], families


def describe(found: Instructions) -> str:
    some = " ".join(f"{family} {n}" for family, n in found.families.items() if n)
    return f"sm_{found.arch:<4} {found.total:>6} instructions  {some or '-':<44}  {found.name}"
