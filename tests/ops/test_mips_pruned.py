"""A search that drops rows by their leading coordinates has the answers of the plain search."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import fastrag.functional as F
from fastrag.index import codec, codes, rotation
from fastrag.ops import backends

_C = pytest.importorskip("fastrag._C", reason="the extension module is not built")

from fastrag.ops.cpp import CodedIndex  # noqa: E402

each_isa = pytest.mark.parametrize("isa", _C.instruction_sets())
KINDS = ["clusters", "duplicates", "ulp ties", "flat", "steep", "rank-deficient", "constant"]
KINDS += ["long rows", "off centre", "tiny", "huge"]


def corpus(kind: str, n: int, dim: int, generator: torch.Generator) -> Tensor:
    """n rows whose coordinates fall along random directions, unless the kind says otherwise."""
    falls = {"flat": 0.0, "steep": 2.0}.get(kind, 0.7)
    basis = torch.linalg.qr(torch.randn(dim, dim, generator=generator))[0]
    x = torch.randn(n, dim, generator=generator) * (torch.arange(dim) + 1.0) ** -falls
    if kind == "clusters":
        x = 0.2 * x + x[torch.randint(min(n, 20), (n,), generator=generator)]
    x = torch.nn.functional.normalize(x @ basis, dim=1)
    if kind == "duplicates":
        x = x[torch.randint(-(-n // 9), (n,), generator=generator)]
    elif kind == "ulp ties":
        x = x[torch.randint(-(-n // 9), (n,), generator=generator)]
        x = x * (1 + 2.0**-23 * torch.randint(0, 3, (n, 1), generator=generator))
    elif kind == "rank-deficient":
        x = x @ basis[: 1 + dim // 9].T @ basis[: 1 + dim // 9]
    elif kind == "constant":
        x = x[:1].repeat(n, 1)
    elif kind == "long rows":
        x[:: max(1, n // 3)] *= 1e4
    elif kind == "off centre":
        x = x + 5 * basis[0]
    elif kind in ("tiny", "huge"):
        x = x * (1e-38 if kind == "tiny" else 1e30)
    return x.contiguous()


def coded(index: Tensor, n_lead: int) -> CodedIndex:
    """Return the rows with codes and n_lead leading directions, whether or not they pay."""
    made = codec.fit_int8([index])
    assert made.offset is not None
    z = index - made.offset
    z, largest = z / z.abs().max().clamp(min=1e-45), z.abs().max()
    basis = rotation.mixed(rotation.directions(z, made.offset, n_lead))
    constants = rotation.constants(z @ basis.T, basis) * torch.stack([largest, largest, largest**0])
    codes = made.encode(index)[0]
    return CodedIndex(index, codes, **made.arguments, rotation=basis, lead_constants=constants)


def check(found: tuple[Tensor, Tensor], expected: tuple[Tensor, Tensor]) -> None:
    assert torch.equal(found[1], expected[1])
    assert torch.equal(found[0].view(torch.int32), expected[0].view(torch.int32))


@settings(derandomize=True, deadline=None, max_examples=60)
@given(st.data())
def test_equals_the_plain_search(data: st.DataObject) -> None:
    kind = data.draw(st.sampled_from(KINDS))
    n = data.draw(st.sampled_from([1, 7, 60, 5000, 9000]))
    dim = data.draw(st.sampled_from([1, 5, 64, 130, 257]))
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 10**6)))
    index = corpus(kind, n, dim, generator)
    made = coded(index, data.draw(st.integers(1, min(dim, 80))))
    n_queries, k = data.draw(st.sampled_from([1, 3, 9, 20])), data.draw(st.integers(1, 12))
    rows = torch.randint(n, (n_queries,), generator=generator)
    query = corpus("steep", n_queries, dim, generator)
    if kind != "huge":
        query = index[rows] + data.draw(st.sampled_from([0.0, 0.1, 9.0])) * query
    exclude = None
    if data.draw(st.booleans()):
        exclude = torch.rand(n, generator=generator) < 0.4
    changed = torch.randperm(n, generator=generator)[: data.draw(st.sampled_from([0, 1, 40]))]
    if len(changed):
        index[changed] = 3 * corpus("flat", len(changed), dim, generator) * index.abs().max()
        made.update(changed)
    expected = F.mips_topk(query, index, k, exclude=exclude)
    for isa in _C.instruction_sets():
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv(backends.ISA_VARIABLE, isa)
            check(made.search(query, k, exclude), expected)


@pytest.fixture(scope="module")
def clustered() -> tuple[Tensor, Tensor]:
    """Rows of 200 clusters whose coordinates fall along random directions, and rows near some."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(200, 256, generator=generator)[torch.arange(24000) % 200]
    x = (x + 0.5 * torch.randn(24000, 256, generator=generator)) / (torch.arange(256) + 1.0)
    basis = torch.linalg.qr(torch.randn(256, 256, generator=generator))[0]
    x = torch.nn.functional.normalize((x + 0.2) @ basis, dim=1)
    noise = corpus("flat", 16, 256, generator)
    return x, x[::1500] + 0.1 * noise


@each_isa
def test_most_codes_are_not_read(
    isa: str, clustered: tuple[Tensor, Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(backends.ISA_VARIABLE, isa)
    index, query = clustered
    made = codec.fit_int8([index])
    codes, offset = made.encode(index)[0], made.offset
    assert offset is not None
    found = rotation.fit(index, offset)
    assert found["rotation"].shape[0] == rotation.STEP
    pruned = CodedIndex(index, codes, **made.arguments, **found)
    plain = CodedIndex(index, codes, **made.arguments)
    for n, share in ((1, 0.5), (16, 0.9)):
        check(pruned.search(query[:n], 10), F.mips_topk(query[:n], index, 10))
        assert plain.n_codes_read(query[:n], 10) == n * len(index)
        assert 10 * n <= pruned.n_codes_read(query[:n], 10) < share * n * len(index)
    # Such questions have no near rows: nothing is dropped by few coordinates.
    far = corpus("flat", 3, 256, torch.Generator().manual_seed(1))
    check(pruned.search(far, 10), F.mips_topk(far, index, 10))
    assert pruned.n_codes_read(far, 10) > 0.9 * len(far) * len(index)


def test_the_bound_of_a_row_contains_its_score(clustered: tuple[Tensor, Tensor]) -> None:
    """Norms of rows and rest of a query are those of the equation, in float64."""
    index, query = clustered
    index = index[:500] * torch.logspace(-3, 3, 500)[:, None]
    made = coded(index, 64).tensors
    z, p = (index - made["offset"]).double(), query.double() @ made["rotation"].T.double()
    step, share, defect = made["lead_constants"].double()
    y = z @ made["rotation"].T.double()
    rest = (y - step * made["lead_codes"]).norm(dim=1)
    tail = (z - y @ made["rotation"].double()).norm(dim=1)
    assert bool((made["lead_norm"] >= rest / share).all())
    assert bool((made["lead_norm"] >= made["lead_codes"].double().norm(dim=1)).all())
    assert bool((made["tail_norm"] >= tail).all())
    assert bool((made["tail_norm"] <= 1.01 * tail + 0.05 * z.norm(dim=1)).all())
    assert 0 < defect < 1e-5
    assert torch.equal(made["lead_sum"], made["lead_codes"].sum(1, dtype=torch.int32))
    bound = p.norm(dim=1)[:, None] * share * made["lead_norm"]
    bound += (query.double().square().sum(1) - p.square().sum(1)).sqrt()[:, None] * made[
        "tail_norm"
    ]
    score = F.mips_topk(query, index, 500)
    found = torch.empty(16, 500, dtype=torch.float64).scatter_(1, score[1], score[0].double())
    estimate = query.double() @ made["offset"].double()
    estimate = estimate[:, None] + step * p @ made["lead_codes"].double().T
    assert bool(((found - estimate).abs() <= bound).all())


@pytest.mark.parametrize("kind", ["flat", "constant"])
def test_no_rotation_where_it_would_not_pay(kind: str) -> None:
    index = corpus(kind, 3000, 256, torch.Generator().manual_seed(0))
    assert rotation.fit(index, index.mean(0)) == {}
    assert rotation.fit(index[:, :127], index[:, :127].mean(0)) == {}  # too narrow


def test_long_rows_do_not_choose_the_directions(clustered: tuple[Tensor, Tensor]) -> None:
    index, query = clustered
    index = index.clone()
    index[::400] = 1e4 * corpus("flat", 60, 256, torch.Generator().manual_seed(0))
    made = codec.fit_int8([index])
    assert made.offset is not None
    found = rotation.fit(index, made.offset)
    pruned = CodedIndex(index, made.encode(index)[0], **made.arguments, **found)
    check(pruned.search(query, 10), F.mips_topk(query, index, 10))


def test_changed_rows_have_new_bounds(clustered: tuple[Tensor, Tensor]) -> None:
    index, query = clustered
    index = index.clone()
    made = codec.fit_int8([index])
    assert made.offset is not None
    leading = rotation.fit(index, made.offset)
    pruned = CodedIndex(index, made.encode(index)[0], **made.arguments, **leading)
    rows = torch.arange(100, 24000, 1600)
    index[rows] = 1.5 * query[: len(rows)]
    pruned.update(rows)
    for one in query.split(1):  # most rows are dropped by their leading coordinates
        check(pruned.search(one, 3), F.mips_topk(one, index, 3))


def test_leading_coordinates_are_for_few_questions(monkeypatch: pytest.MonkeyPatch) -> None:
    """A search of many questions reads all codes, and finds the same."""
    seen = []
    real = _C.mips_topk_by_codes

    def search(*given: object, **named: object) -> tuple[int, int]:
        seen.append("rotation" in named)
        return real(*given, **named)

    generator = torch.Generator().manual_seed(0)
    index = corpus("steep", 3000, 192, generator)
    query = corpus("steep", codes.MOST_BY_LEADS + 1, 192, generator)
    made = codes.RowCodes(index)
    made.arrays()
    monkeypatch.setattr(_C, "mips_topk_by_codes", search)
    for n in (codes.MOST_BY_LEADS, len(query)):
        check(made.search(query[:n], 5, None), F.mips_topk(query[:n], index, 5))
    assert seen == [True, False]
