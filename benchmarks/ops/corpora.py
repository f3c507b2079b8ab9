"""Corpora that `mips` searches, and questions to them: a mode may name one after a slash.

`randn`: normal numbers, in which no direction and no row stands out. Questions are normal as well.

`embeddings`: vectors with the properties that vectors of a text encoder have. With a random
orthonormal basis U [D, D], its dimensions scaled by s_i = (i + 8)^(-EXPONENT / 2) for i = 0, 1, ...
and s divided by its norm,

    x = v / |v|,    v = MEAN u + sqrt(SHARE) (c * s) U + sqrt(1 - SHARE) (e * s) U

where u is a unit vector along which all rows point alike, c normal numbers of one of CLUSTERS
clusters, drawn for each row, and e normal numbers of the row. A file (`--vectors`) has vectors of
an actual encoder.

Questions to the last two lie near rows, as questions lie near the passages that answer them:

    q = |x| v / |v|,    v = x + NOISE (y - z)

with x, y and z three rows drawn at random, so that the noise has the spectrum of the corpus.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

RANDN, EMBEDDINGS = "randn", "embeddings"
CORPORA = (RANDN, EMBEDDINGS)
VARIABLE = "FASTRAG_BENCHMARK_VECTORS"  # the file of --vectors, also for the processes of a run
BLOCK_ROWS = 65536
MATRIX_SEED, QUERY_SEED = 1, 0
EXPONENT, MEAN, SHARE, CLUSTERS, NOISE = 1.25, 0.4, 0.3, 1000, 0.9


def join(mode: str, corpus: str) -> str:
    return mode if corpus == RANDN else f"{mode}/{corpus}"


def split(mode: str) -> tuple[str, str]:
    """Return the mode without its corpus, and the corpus."""
    mode, _, corpus = mode.partition("/")
    return mode, corpus or RANDN


def read(file: Path) -> Tensor:
    """Map the vectors of a file.

    Raises:
        ValueError: it holds something else.
    """
    try:
        found = np.load(file, mmap_mode="c", allow_pickle=False)
    except (OSError, ValueError) as error:
        raise ValueError(f"{file}: {error}") from error
    if found.ndim != 2 or found.dtype != np.float32 or not found.size:
        raise ValueError(f"{file}: expected float32 [n, D], got {found.dtype} {[*found.shape]}")
    return torch.from_numpy(found)


def use(file: Path) -> tuple[int, int]:
    """Let this run read the vectors of a file; return how many they are, and their width.

    Raises:
        ValueError: the file holds something else, or its name is that of a corpus.
    """
    if file.stem in CORPORA:
        raise ValueError(f"expected a file with a name other than {' and '.join(CORPORA)}")
    os.environ[VARIABLE] = str(file.absolute())
    n_rows, width = read(file).shape
    return n_rows, width


def blocks(corpus: str, n_rows: int, width: int, device: torch.device) -> Iterator[Tensor]:
    """Yield the float32 vectors, a block of rows at a time."""
    generator = torch.Generator(device).manual_seed(MATRIX_SEED)
    for first in range(0, n_rows, BLOCK_ROWS):
        n = min(BLOCK_ROWS, n_rows - first)
        if corpus == RANDN:
            yield torch.randn((n, width), generator=generator, device=device)
        elif corpus == EMBEDDINGS:
            yield _like_embeddings(n, width, generator)
        else:
            yield read(Path(os.environ[VARIABLE]))[first : first + n].to(device)


def near(rows: Tensor, n: int) -> Tensor:
    """Return `[n, D]` questions that lie near rows."""
    generator = torch.Generator(rows.device).manual_seed(QUERY_SEED)
    x, y, z = rows[torch.randint(len(rows), (3, n), generator=generator, device=rows.device)]
    v = x + NOISE * (y - z)
    return v * (x.norm(dim=1, keepdim=True) / v.norm(dim=1, keepdim=True))


def _like_embeddings(n: int, width: int, generator: torch.Generator) -> Tensor:
    basis, mean, centres = _fixed(width, generator.device)
    options = {"generator": generator, "device": generator.device}
    e = torch.randn((n, width), **options).mul_((1 - SHARE) ** 0.5)
    e += centres[torch.randint(CLUSTERS, (n,), **options)]
    return torch.nn.functional.normalize(torch.addmm(mean, e, basis), dim=1)


@cache
def _fixed(width: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Return s U, MEAN u, and the centres of the clusters before they are scaled by s."""
    generator = torch.Generator(device).manual_seed(MATRIX_SEED)
    options = {"generator": generator, "device": device}
    spectrum = (torch.arange(width, device=device) + 8.0) ** (-EXPONENT / 2)
    basis, _ = torch.linalg.qr(torch.randn((width, width), **options))
    mean = torch.nn.functional.normalize(torch.randn(width, **options), dim=0)
    centres = SHARE**0.5 * torch.randn((CLUSTERS, width), **options)
    return (spectrum / spectrum.norm())[:, None] * basis, MEAN * mean, centres
