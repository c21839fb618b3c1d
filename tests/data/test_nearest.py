"""Which cells are nearest: those of a full table of distances, whatever the order of rows, the frame or the unit."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.sparse as sp
from hypothesis import given
from hypothesis import strategies as st

from cellplm_scvi.data._contexts import rows_by_sample
from cellplm_scvi.data._nearest import NearestCells, nearest_cells
from cellplm_scvi.data._table import CellTable, CountRows


def table_at(
    xy: np.ndarray,
    sample: np.ndarray | None = None,
    counts: sp.csr_matrix | None = None,
    names: np.ndarray | None = None,
) -> CellTable:
    """Cells in these places, with random counts unless some are given."""
    n = len(xy)
    if counts is None:
        counts = sp.csr_matrix(np.random.default_rng(0).poisson(1.0, (n, 8)).astype(np.float32))
    return CellTable(
        counts=CountRows(counts, np.arange(8), 8),
        covariates={},
        sample=np.zeros(n, dtype=np.int64) if sample is None else sample,
        names=np.array([f"c{i}" for i in range(n)]) if names is None else names,
        coordinates=xy,
    )


def nearest(table: CellTable, n_neighbours: int, n_niche: int = 0) -> NearestCells:
    return nearest_cells(table, rows_by_sample(table.sample, np.arange(table.n_cells)), n_neighbours, n_niche)


def sets(index: np.ndarray) -> list[set]:
    """The neighbours of each cell."""
    return [set(row[row >= 0]) for row in index]


def layout_of(name: str) -> np.ndarray:
    """Coordinates on a grid, or in a few places that many cells share."""
    i, j = (index.astype(float) for index in np.divmod(np.arange(64), 8))
    match name:
        case "square":
            return np.stack([i, j], 1)
        case "hexagonal":
            return np.stack([np.sqrt(0.75) * i, j + 0.5 * (i % 2)], 1)
        case _:
            return np.random.default_rng(1).normal(size=(8, 2))[j.astype(int)]


@given(
    st.integers(1, 40), st.integers(1, 12), st.integers(0, 2**32 - 1), st.sampled_from(["free", "grid", "same", "nan"])
)
def test_nearest_cells_are_those_of_a_full_table_of_distances(n, k, seed, layout):
    rng = np.random.default_rng(seed)
    xy = rng.normal(size=(n, 2))
    if layout == "grid":
        xy = rng.integers(3, size=(n, 2)).astype(float)
    elif layout == "same":
        xy[:] = 1.0
    elif layout == "nan":
        xy[rng.random(n) < 0.5] = np.nan
    sample = rng.integers(2, size=n)
    found = nearest(table_at(xy, sample), k, 13 - k)
    distance = np.linalg.norm(xy[:, None] - xy[None], axis=-1)
    distance[(sample[:, None] != sample[None]) | np.eye(n, dtype=bool) | ~np.isfinite(distance)] = np.inf
    for index in (found.index, found.niche):
        for row in range(n):
            near = index[row][index[row] >= 0]
            assert row not in near
            assert len(set(near)) == len(near)
            assert np.isfinite(distance[row, near]).all()
            left = np.delete(distance[row], near)
            if near.size < index.shape[1]:  # those left out are as far as each other or further than all that are in
                assert near.size == 0 or distance[row, near].max() < left.min() or not np.isfinite(left).any()
                assert near.size > 0 or not np.isfinite(left).any()
            else:
                np.testing.assert_allclose(np.sort(distance[row, near]), np.sort(distance[row])[: near.size])
    assert np.isfinite(found.distance).all()
    assert (found.distance >= 0).all()


@pytest.mark.parametrize("layout", ["square", "hexagonal", "places"])
@given(
    n_neighbours=st.integers(1, 12),
    n_niche=st.integers(1, 12),
    angle=st.floats(0, 2 * np.pi),
    mirror=st.booleans(),
    seed=st.integers(0, 2**32 - 1),
)
def test_neither_rows_nor_the_frame_decide_between_cells_at_the_same_distance(
    layout, n_neighbours, n_niche, angle, mirror, seed
):
    table = table_at(layout_of(layout))
    expected = nearest(table, n_neighbours, n_niche)
    turn = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    if mirror:
        turn[:, 0] *= -1
    order = np.random.default_rng(seed).permutation(table.n_cells)
    moved = table_at((table.coordinates @ turn.T + 10)[order], counts=table.counts[order], names=table.names[order])
    found = nearest(moved, n_neighbours, n_niche)
    for ours, theirs in ((expected.index, found.index), (expected.niche, found.niche)):
        rows = np.where(theirs >= 0, order[theirs], -1)
        assert sets(rows) == [sets(ours)[row] for row in order]
    np.testing.assert_allclose(np.sort(found.distance), np.sort(expected.distance[order]), rtol=1e-4, atol=1e-6)


def test_each_number_of_neighbours_has_whole_rings():
    """On a hexagonal grid, rings of 6, 6 and 6 cells."""
    found = nearest(table_at(layout_of("hexagonal")), 6, 16)
    middle = 8 * 4 + 4
    assert (found.index[middle] >= 0).sum() == 6
    assert (found.niche[middle] >= 0).sum() == 12
    assert (nearest(table_at(layout_of("hexagonal")), 5).index >= 0).any(1).all()


def test_all_cells_that_share_a_place_have_neighbours():
    found = nearest(table_at(np.ones((300, 2))), 4)
    assert (found.index >= 0).all()
    assert (found.distance == 0).all()
    assert all(row not in near for row, near in enumerate(sets(found.index)))


def test_counts_are_looked_at_only_where_distances_do_not_decide(monkeypatch):
    monkeypatch.setattr(CountRows, "__getitem__", None)
    nearest(table_at(np.random.default_rng(0).normal(size=(50, 2))), 6)
    nearest(table_at(layout_of("square")), 6)
    with pytest.raises(TypeError):
        nearest(table_at(layout_of("places")), 6)


@pytest.mark.parametrize("n_each", [1, 3, 10])
@given(st.floats(1e-3, 1e3), st.integers(0, 2**32 - 1))
def test_distances_have_no_unit(n_each, scale, seed):
    """Also where most cells share their place with more than five."""
    xy = np.repeat(np.random.default_rng(seed).normal(size=(30, 2)), n_each, 0)
    a, b = (nearest(table_at(points), 20) for points in (xy, xy * scale))
    np.testing.assert_allclose(a.distance, b.distance, rtol=1e-4)
    np.testing.assert_array_equal(sets(a.index), sets(b.index))
    assert a.distance.max() > 0


def test_the_unit_is_the_distance_to_the_fifth_neighbour_however_many_there_are():
    table = table_at(np.random.default_rng(0).normal(size=(60, 2)))
    ten = nearest(table, 10).distance
    assert np.median(ten[:, 4]) == pytest.approx(1.0)
    for k in (1, 3, 6):
        np.testing.assert_allclose(nearest(table, k).distance, ten[:, :k], rtol=1e-6)


def test_more_neighbours_than_cells_take_no_memory():
    """Of a size that a file may claim, only what the largest sample has is made."""
    table = table_at(np.random.default_rng(0).random((30, 2)))
    found = nearest_cells(table, [np.arange(20), np.arange(20, 30)], 10**12, 10**12)
    assert found.index.shape == found.niche.shape == (30, 19)
    assert (found.index[20:] >= 0).sum(1).tolist() == [9] * 10
