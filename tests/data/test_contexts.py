"""Which cells see each other: partitions, limits, and independence of the order of rows."""

from __future__ import annotations

from itertools import chain

import numpy as np
import pytest
import scipy.sparse as sp
from hypothesis import given, settings
from hypothesis import strategies as st

from cellplm_scvi.data._contexts import (
    Context,
    pack,
    rows_by_sample,
    tiles,
    training_contexts,
    whole_contexts,
)
from cellplm_scvi.data._nearest import nearest_cells
from cellplm_scvi.data._table import CellTable, CountRows


def make_table(
    rng: np.random.Generator, n_cells: int, n_samples: int, placed: float, *, grid: bool = False
) -> CellTable:
    """A table of random cells; a share ``placed`` of them has coordinates, on a square grid if asked for."""
    counts = sp.csr_matrix(rng.poisson(1.0, (n_cells, 8)).astype(np.float32))
    coordinates = None
    if placed > 0:
        side = int(np.ceil(np.sqrt(n_cells)))
        coordinates = np.stack(np.divmod(np.arange(n_cells), side), 1) if grid else rng.normal(size=(n_cells, 2))
        coordinates = coordinates.astype(float)
        coordinates[rng.random(n_cells) >= placed] = np.nan
    return CellTable(
        counts=CountRows(counts, np.arange(8), 8),
        covariates={},
        sample=rng.integers(n_samples, size=n_cells),
        names=np.array([f"c{i}" for i in range(n_cells)]),
        coordinates=coordinates,
    )


def permuted(table: CellTable, order: np.ndarray) -> CellTable:
    """The same cells in another order of rows."""
    return CellTable(
        counts=CountRows(table.counts[order], np.arange(8), 8),
        covariates={},
        sample=table.sample[order],
        names=table.names[order],
        coordinates=None if table.coordinates is None else table.coordinates[order],
    )


tables = st.builds(
    lambda seed, n_cells, n_samples, placed, grid: make_table(
        np.random.default_rng(seed), n_cells, n_samples, placed, grid=grid
    ),
    st.integers(0, 2**32 - 1),
    st.integers(1, 80),
    st.integers(1, 6),
    st.sampled_from([0.0, 0.1, 0.5, 1.0]),
    st.booleans(),
)


def samples_of(table: CellTable, contexts: list[Context]) -> list[set]:
    return [set(table.sample[context.rows]) for context in contexts]


@settings(max_examples=60)
@given(tables, st.integers(1, 40))
def test_every_cell_counts_once_and_sees_its_own_sample_only(table, max_context):
    contexts = whole_contexts(table, np.arange(table.n_cells), np.arange(table.n_cells), max_context, None)
    counted = np.concatenate([context.rows[context.target] for context in contexts])
    assert sorted(counted) == list(range(table.n_cells))
    assert all(len(samples) == 1 for samples in samples_of(table, contexts))
    assert max(len(context) for context in contexts) <= max_context


@settings(max_examples=100)
@given(tables, st.integers(1, 40), st.integers(0, 2**32 - 1))
def test_whole_contexts_depend_on_the_sample_alone(table, max_context, seed):
    rng = np.random.default_rng(seed)
    everything = np.arange(table.n_cells)

    def contexts_of(table: CellTable, targets: np.ndarray) -> dict[str, frozenset]:
        """The names of the cells that each counted cell sees."""
        nearest = (
            None if table.coordinates is None else nearest_cells(table, rows_by_sample(table.sample, everything), 4)
        )
        found = whole_contexts(table, everything, targets, max_context, nearest)
        return {
            table.names[row]: frozenset(table.names[context.rows])
            for context in found
            for row in context.rows[context.target]
        }

    expected = contexts_of(table, everything)
    assert set(expected) == set(table.names)
    some = rng.choice(table.n_cells, size=rng.integers(1, table.n_cells + 1), replace=False)
    for name, seen in contexts_of(table, some).items():
        assert seen == expected[name]
    assert contexts_of(permuted(table, rng.permutation(table.n_cells)), everything) == expected


@given(tables, st.integers(1, 5), st.integers(1, 40))
def test_a_slice_sees_the_neighbours_of_its_cells(table, k, max_context):
    if table.coordinates is None:
        return
    everything = np.arange(table.n_cells)
    nearest = nearest_cells(table, rows_by_sample(table.sample, everything), k)
    for context in whole_contexts(table, everything, everything, max_context, nearest):
        assert len(set(context.rows)) == len(context)
        wanted = nearest.index[context.rows[context.target]]
        assert set(wanted[wanted >= 0]) <= set(context.rows)


@given(tables, st.integers(1, 40), st.integers(0, 2**32 - 1))
def test_training_contexts_cover_the_pool_once(table, size, seed):
    rng = np.random.default_rng(seed)
    pool = np.sort(rng.choice(table.n_cells, size=rng.integers(1, table.n_cells + 1), replace=False))
    contexts = training_contexts(table, pool, size, rng)
    assert sorted(chain.from_iterable(context.rows for context in contexts)) == list(pool)
    assert all(len(samples) == 1 for samples in samples_of(table, contexts))
    assert all(context.target.all() for context in contexts)
    assert max(len(context) for context in contexts) <= size
    again = training_contexts(table, pool, size, np.random.default_rng(seed + 1))
    assert sorted(map(len, again)) == sorted(map(len, contexts))


@given(st.lists(st.integers(1, 30), min_size=1, max_size=30), st.integers(1, 60), st.integers(0, 2**32 - 1))
def test_packing_keeps_every_context(sizes, batch_size, seed):
    contexts = [Context(np.full(size, i), np.ones(size, bool)) for i, size in enumerate(sizes)]
    fixed = pack(contexts, batch_size)
    assert [c.rows[0] for c in chain.from_iterable(fixed)] == list(range(len(sizes)))
    assert all(sum(map(len, batch)) <= batch_size or len(batch) == 1 for batch in fixed)
    drawn = pack(contexts, batch_size, np.random.default_rng(seed))
    assert sorted(c.rows[0] for c in chain.from_iterable(drawn)) == list(range(len(sizes)))
    assert all(drawn)
    assert len(drawn) == len(pack(contexts, batch_size, np.random.default_rng(seed + 1)))
    assert len(drawn) == min(-(-sum(sizes) // batch_size), len(sizes))
    loads = [sum(map(len, batch)) for batch in drawn]
    assert max(loads) - min(loads) <= max(sizes)


@given(st.integers(1, 60), st.integers(1, 20), st.integers(2, 3), st.integers(0, 2**32 - 1), st.booleans())
def test_tiles_partition_the_cells(n, max_size, n_dims, seed, drawn):
    rng = np.random.default_rng(seed)
    parts = tiles(rng.normal(size=(n, n_dims)), -(-n // max_size), rng if drawn else None)
    assert sorted(np.concatenate(parts)) == list(range(n))
    assert 1 <= min(map(len, parts))
    assert max(map(len, parts)) <= max_size
    assert max(map(len, parts)) - min(map(len, parts)) <= 1


def moved(xy: np.ndarray, angle: float, mirror: bool) -> np.ndarray:
    turn = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    if mirror:
        turn[:, 0] *= -1
    return np.concatenate([xy[:, :2] @ turn.T + [100.0, 30.0], xy[:, 2:]], 1)


@given(st.integers(10, 80), st.floats(0, 2 * np.pi), st.booleans(), st.integers(0, 2**32 - 1))
def test_tiles_move_with_the_section(n, angle, mirror, seed):
    rng = np.random.default_rng(seed)
    xy = rng.normal(size=(n, 2)) * [5, 2] + rng.gamma(1, 3, size=(n, 2))
    parts = tiles(moved(xy, angle, mirror), 7)
    assert {frozenset(part) for part in tiles(xy, 7)} == {frozenset(part) for part in parts}


SYMMETRIC = {
    "square": np.stack(np.divmod(np.arange(144.0), 12), 1),
    "rectangle": np.stack(np.divmod(np.arange(140.0), 10), 1),
    "hexagonal": np.stack([np.arange(144) % 12 + np.arange(144) // 12 % 2 / 2, np.arange(144) // 12 * 0.75**0.5], 1),
    "line": np.stack([np.arange(50.0), np.zeros(50)], 1),
    "box": np.stack(np.unravel_index(np.arange(216), (6, 6, 6)), 1).astype(float),
    "plane in space": np.stack([*np.divmod(np.arange(144.0), 12), np.full(144, 5.0)], 1),
}


@pytest.mark.parametrize("layout", SYMMETRIC)
@given(st.floats(0, 2 * np.pi), st.booleans(), st.integers(0, 2**32 - 1))
def test_tiles_of_a_grid_move_with_it(layout, angle, mirror, seed):
    """Its axes and their signs are a matter of rounding; the counts of the cells decide."""
    xy = SYMMETRIC[layout]
    n = len(xy)
    counts = sp.csr_matrix(np.random.default_rng(seed).poisson(1.0, (n, 8)).astype(np.float32))
    first, second = (
        CellTable(
            counts=CountRows(counts, np.arange(8), 8),
            covariates={},
            sample=np.zeros(n, dtype=np.int64),
            names=np.array([f"c{i}" for i in range(n)]),
            coordinates=points,
        )
        for points in (xy, moved(xy, angle, mirror))
    )
    everything = np.arange(n)
    found = [
        {frozenset(context.rows) for context in whole_contexts(table, everything, everything, 20, None)}
        for table in (first, second)
    ]
    assert found[0] == found[1]


def test_counts_are_looked_at_only_where_coordinates_do_not_decide(monkeypatch):
    table = make_table(np.random.default_rng(0), 60, 1, 1.0)
    monkeypatch.setattr(CountRows, "__getitem__", None)
    whole_contexts(table, np.arange(60), np.arange(60), 10, None)


def test_tiles_are_compact():
    xy = np.random.default_rng(0).random((400, 2))
    within = np.mean([xy[part].var(0).sum() for part in tiles(xy, 16)])
    assert within < 0.2 * xy.var(0).sum()


@given(st.lists(st.integers(0, 5), min_size=1, max_size=50), st.integers(0, 2**32 - 1))
def test_rows_by_sample_split_rows_in_their_order(sample, seed):
    codes = np.array(sample)
    rows = np.random.default_rng(seed).permutation(len(codes))
    parts = rows_by_sample(codes, rows)
    assert [codes[part[0]] for part in parts] == sorted(set(sample))
    for part in parts:
        np.testing.assert_array_equal(part, rows[codes[rows] == codes[part[0]]])


def test_the_pool_hides_the_other_cells():
    table = make_table(np.random.default_rng(0), 40, 3, 1.0)
    pool, targets = np.arange(0, 40, 2), np.arange(0, 40, 4)
    nearest = nearest_cells(table, rows_by_sample(table.sample, pool), 4)
    contexts = whole_contexts(table, pool, targets, 6, nearest)
    assert set(np.concatenate([c.rows for c in contexts])) <= set(pool)
    assert sorted(np.concatenate([c.rows[c.target] for c in contexts])) == list(targets)
