"""The directions along which the rows of an index differ most, for a search that prunes by them.

Vectors of an encoder vary far more along some directions than along others. In the orthonormal
basis of the eigenvectors of their second moment, few coordinates of a row then bound its score
closely enough to drop most rows: with p the leading coordinates of a query, y those of a row, and
t the part of a vector that is orthogonal to these directions,

    q . x  <=  q . offset + p . y + |t(q)| |t(x - offset)|                        (Cauchy-Schwarz)

`CodedIndex` of the C++ backend has codes of y and includes the rounding of the directions.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastrag.index.codec import MAX_CODE

SAMPLE_ROWS = 8192
SAMPLE_QUERIES = 64
SAMPLE_HITS = 2
STEP = 64  # coordinates, bytes of a cache line
MAX_SHARE = 3  # at most a third of the coordinates
# A row that is not dropped costs as much as the codes of so many rows that are read in order.
LOOK_COST = 2.0
# An index for which a search reads more than this share of the codes is searched without.
WORTH = 0.8
# Share of |q| and |x| by which rounding to codes and digits increases |t(q)| and |t(x)|.
SLACK = 0.02


@torch.no_grad()
def fit(index_emb: Tensor, offset: Tensor) -> dict[str, Tensor]:
    """Choose the leading directions from a sample of rows, or none if they would not pay.

    The search for the neighbours of some sampled rows tells for how many of the rows the bound of
    a number of directions suffices.

    Args:
        index_emb: `[N, D]` float32, N > 0, on the CPU.
        offset: `[D]` float32, about the mean of the rows.

    Returns:
        The arguments `rotation` and `lead_constants` of `CodedIndex`; empty if no number of
        directions pays.
    """
    n, dim = index_emb.shape
    most = dim // MAX_SHARE // STEP * STEP
    if not most or n < 2 * SAMPLE_HITS:
        return {}
    z = index_emb[:: -(-n // SAMPLE_ROWS)] - offset
    largest = float(z.abs().max())
    if not largest:
        return {}
    z /= largest  # no square overflows
    basis = directions(z, offset, most)
    y = z @ basis
    picked = slice(None, None, max(1, len(z) // SAMPLE_QUERIES))
    best = (z[picked] @ z.T).topk(SAMPLE_HITS + 1).values[:, -1:]
    squares = z.square().sum(1)
    costs = {}
    for n_lead in range(STEP, most + 1, STEP):
        part = y[:, :n_lead]
        tail = (squares - part.square().sum(1)).clamp_(min=0).sqrt_()
        upper = part[picked] @ part.T + (tail + SLACK)[picked, None] * (tail + SLACK)
        costs[n_lead] = n_lead / dim + LOOK_COST * float((upper >= best).float().mean())
    n_lead = min(costs, key=costs.__getitem__)
    if costs[n_lead] > WORTH:
        return {}
    rotation = mixed(basis[:, :n_lead])
    found = constants(z @ rotation.T, rotation) * torch.tensor([largest, largest, 1.0])
    return {"rotation": rotation, "lead_constants": found}


def directions(z: Tensor, offset: Tensor, n: int) -> Tensor:
    """Return n orthonormal directions, `[D, n]`: the offset, then eigenvectors.

    All rows point along the offset, and most queries do as well. The rest of a query is shorter
    without this direction, though it tells the rows apart no more than others.

    Args:
        z: `[n, D]`, rows minus offset. The eigenvectors are those of the second moment of their
            directions, so that long rows count no more than others.
        offset: `[D]`.
        n: number of directions, at most D.
    """
    unit = torch.nn.functional.normalize(z, dim=1)
    _, vectors = torch.linalg.eigh(unit.T @ unit)
    found = torch.cat([offset[:, None], vectors.flip(1)[:, : n - 1]], dim=1)
    return torch.linalg.qr(found.double())[0].float()


def mixed(basis: Tensor) -> Tensor:
    """Return n other orthonormal directions, `[n, D]`, that span the same as `basis [D, n]`.

    They are random, but the same at each call. None of the coordinates along them is much larger
    than the others, so that one step of their codes suits all.
    """
    n, generator = basis.shape[1], torch.Generator().manual_seed(0)
    mixing, _ = torch.linalg.qr(torch.randn(n, n, dtype=torch.float64, generator=generator))
    return (mixing.T @ basis.double().T).float().contiguous()


def constants(y: Tensor, rotation: Tensor) -> Tensor:
    """Return step of the codes, share of their rest, and defect of a rotation, `[3]` float32.

    Args:
        y: `[n, n_lead]`, coordinates of sampled rows. A few rows may be much longer than the rest,
            whose codes must not be zero: the step covers most rows, and others are clamped.
        rotation: `[n_lead, D]`.
    """
    step = float(y.abs().amax(1).quantile(0.99)) / MAX_CODE or 1.0
    codes = (y / step).round_().clamp_(-MAX_CODE, MAX_CODE)
    rest, size = (y - step * codes).norm(dim=1), codes.norm(dim=1)
    share = float((rest / size.clamp(min=1.0)).median()) or step
    wide = rotation.double()
    defect = float((wide @ wide.T - torch.eye(len(wide)).double()).norm())
    return torch.tensor([step, share, 1.001 * defect + 1e-9])
