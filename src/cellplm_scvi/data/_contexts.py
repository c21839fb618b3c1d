"""Which cells see each other: whole samples, or slices of samples that exceed the context.

A slice is a function of its sample alone (of coordinates where there are any, else of the counts), never of the order of
rows, of the other samples or of what a call asks for.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
import scipy.sparse as sp
from scipy.spatial import cKDTree

from ._checks import CHUNK_ROWS
from ._table import CellTable

#: distances closer to each other than this share count as equal
TIE = 1e-6


@dataclass(frozen=True)
class Context:
    """Cells that attend to each other, and which of them count.

    Parameters
    ----------
    rows
        Row of each cell, (n,).
    target
        Whether it counts, (n,); the others are only seen.
    """

    rows: np.ndarray
    target: np.ndarray

    def __len__(self) -> int:
        return self.rows.shape[0]


@dataclass(frozen=True)
class NearestCells:
    """The k nearest cells of each cell inside its sample.

    Parameters
    ----------
    index
        Rows of the neighbours, (n_cells, k), -1 where there is none.
    distance
        Distances in units of the sample's typical spacing of cells, (n_cells, k), float32.
    """

    index: np.ndarray
    distance: np.ndarray


def rows_by_sample(sample: np.ndarray, rows: np.ndarray) -> list[np.ndarray]:
    """Split rows into those of each sample, keeping their order."""
    order = np.argsort(sample[rows], kind="stable")
    _, starts = np.unique(sample[rows][order], return_index=True)
    return np.split(rows[order], starts[1:])


def located(coordinates: np.ndarray | None, rows: np.ndarray) -> np.ndarray:
    """Which rows have a position, (n,)."""
    if coordinates is None:
        return np.zeros(rows.shape[0], dtype=bool)
    return np.isfinite(coordinates[rows]).all(1)


def nearest_cells(coordinates: np.ndarray, samples: Sequence[np.ndarray], n_neighbours: int) -> NearestCells:
    """The nearest cells within each sample.

    The unit of distance is the sample's median distance to the fifth neighbour, so that coordinates may be in pixels or
    micrometres. Of cells at the same distance, all are neighbours or none is (unless none at all would be left): on a grid,
    such as that of Visium, it must not be the order of rows that decides.
    """
    n_cells = coordinates.shape[0]
    index = np.full((n_cells, n_neighbours), -1, dtype=np.int64)
    distance = np.zeros((n_cells, n_neighbours), dtype=np.float32)
    for rows in samples:
        rows = rows[located(coordinates, rows)]
        if rows.shape[0] < 2:
            continue
        rows = rows[np.lexsort(coordinates[rows].T)]
        k = min(n_neighbours, rows.shape[0] - 1)
        n_asked = min(k + 2, rows.shape[0])  # the cell itself, and one more than needed
        far, near = cKDTree(coordinates[rows]).query(coordinates[rows], k=n_asked, workers=-1)
        # Cells in the same place may list each other before themselves; a cell is never its own neighbour.
        own = near == np.arange(rows.shape[0])[:, None]
        own[~own.any(1), -1] = True
        far, near = far[~own].reshape(-1, n_asked - 1), near[~own].reshape(-1, n_asked - 1)
        unit = np.median(far[:, min(4, k - 1)])
        unit = unit if unit > 0 else max(float(far[:, :k].max()), 1.0)
        nearer = far[:, :k] < far[:, k:] * (1 - TIE) if n_asked - 1 > k else np.ones((rows.shape[0], k), dtype=bool)
        nearer[~nearer.any(1)] = True
        index[rows, :k] = np.where(nearer, rows[near[:, :k]], -1)
        distance[rows, :k] = np.where(nearer, far[:, :k] / unit, 0.0)
    return NearestCells(index, distance)


def tiles(coordinates: np.ndarray, n_tiles: int, rng: np.random.Generator | None = None) -> list[np.ndarray]:
    """Cut cells into compact tiles of equal size (to one cell) by halving across the widest direction.

    Parameters
    ----------
    coordinates
        (n, n_dims), finite.
    n_tiles
        Number of tiles, at most that of the cells.
    rng
        Draws the direction of each cut; ``None`` takes the principal axis, so that a shift, rotation or mirror image of
        the sample has the same tiles.

    Returns
    -------
    Index arrays into ``coordinates``; every cell is in one tile.
    """

    def cut(rows: np.ndarray, n_tiles: int) -> list[np.ndarray]:
        if n_tiles == 1:
            return [rows]
        points = coordinates[rows] - coordinates[rows].mean(0)
        if rng is None:
            axes = np.linalg.svd(points.T @ points)[0]
            projected = points @ axes
            skew = (projected**3).sum(0)
            projected *= np.where(skew < 0, -1.0, 1.0)
            projected = np.round(projected / max(np.abs(projected).max(), 1e-12), 9)
            order = np.lexsort(projected.T[::-1])
        else:
            order = np.argsort(points @ rng.normal(size=points.shape[1]), kind="stable")
        first = n_tiles // 2
        at = round(rows.shape[0] * first / n_tiles)
        return cut(rows[order[:at]], first) + cut(rows[order[at:]], n_tiles - first)

    return cut(np.arange(coordinates.shape[0]), n_tiles)


def slices(
    placed: np.ndarray,
    loose: np.ndarray,
    n_slices: int,
    coordinates: np.ndarray | None,
    rng: np.random.Generator | None = None,
) -> list[np.ndarray]:
    """Cut a sample into slices of equal size (to one cell): compact tiles of the cells with a position, and others.

    Parameters
    ----------
    placed, loose
        Rows with and without a position; the latter are dealt out in their order.
    n_slices
        Number of slices, at most that of the cells.
    coordinates, rng
        As in :func:`tiles`; coordinates of all rows.
    """
    parts = [np.empty(0, dtype=np.int64)] * n_slices
    if placed.size:
        cut = tiles(coordinates[placed], min(n_slices, placed.size), rng)  # type: ignore[index]
        parts[: len(cut)] = [placed[tile] for tile in cut]
    sizes = np.array([part.shape[0] for part in parts])
    total, more = divmod(placed.shape[0] + loose.shape[0], n_slices)
    wanted = np.full(n_slices, total)
    wanted[np.argsort(-sizes, kind="stable")[:more]] += 1
    dealt = np.split(loose, np.cumsum(wanted - sizes)[:-1])
    return [np.concatenate([part, others]) for part, others in zip(parts, dealt, strict=True)]


def content_order(table: CellTable, rows: np.ndarray) -> np.ndarray:
    """An order of cells that depends on their counts (then on their names) alone, not on their rows."""
    keys = [
        content_keys(table.counts[rows[start : start + CHUNK_ROWS]]) for start in range(0, rows.shape[0], CHUNK_ROWS)
    ]
    names = pd.util.hash_array(table.names[rows].astype(object))
    return np.lexsort((names, np.concatenate(keys)))


def content_keys(counts: sp.csr_matrix) -> np.ndarray:
    """A pseudo-random number of each cell that its counts alone decide, (n_cells,).

    It is the sum over the cell's counts, (n_cells, n_genes), of a pseudo-random integer for each gene, modulo 2^64.
    """
    code = np.random.default_rng(0).integers(1, 2**63, size=counts.shape[1], dtype=np.uint64)
    products = counts.data.astype(np.uint64) * code[counts.indices]
    sums = np.concatenate([np.zeros(1, dtype=np.uint64), np.cumsum(products, dtype=np.uint64)])
    return sums[counts.indptr[1:]] - sums[counts.indptr[:-1]]


def whole_contexts(
    table: CellTable, pool: np.ndarray, targets: np.ndarray, max_context: int, nearest: NearestCells | None
) -> list[Context]:
    """Contexts for inference: every sample that holds a target, whole or in slices.

    A spatial slice is a tile together with the neighbours of its cells, which are seen but do not count.

    Parameters
    ----------
    pool
        Rows that may be seen.
    targets
        Rows that count, a subset of them.
    max_context
        Largest number of cells that attend to each other (the neighbours of a tile come on top).
    """
    wanted = np.zeros(table.n_cells, dtype=bool)
    wanted[targets] = True
    contexts = []
    for rows in rows_by_sample(table.sample, pool):
        if not wanted[rows].any():
            continue
        for core, context in _fixed_slices(table, rows, max_context, nearest):
            target = wanted[context] & np.isin(context, core, assume_unique=True)
            if target.any():
                contexts.append(Context(context, target))
    return contexts


def _fixed_slices(
    table: CellTable, rows: np.ndarray, max_context: int, nearest: NearestCells | None
) -> list[tuple[np.ndarray, np.ndarray]]:
    """Slices of one sample, each with its context."""
    if rows.shape[0] <= max_context:
        return [(rows, rows)]
    has_position = located(table.coordinates, rows)
    placed, loose = rows[has_position], rows[~has_position]
    if placed.size:  # one order for the same cells: on a grid, the principal axes are a matter of rounding errors
        names = pd.util.hash_array(table.names[placed].astype(object))
        placed = placed[np.lexsort((names, *table.coordinates[placed].T))]  # type: ignore[index]
    if loose.size:
        loose = loose[content_order(table, loose)]
    parts = slices(placed, loose, -(-rows.shape[0] // max_context), table.coordinates)
    if nearest is None:
        return [(part, part) for part in parts]
    around = [np.setdiff1d(nearest.index[part], part) for part in parts]
    return [(part, np.concatenate([part, near[near >= 0]])) for part, near in zip(parts, around, strict=True)]


def training_contexts(table: CellTable, pool: np.ndarray, context_size: int, rng: np.random.Generator) -> list[Context]:
    """Contexts for one epoch: random slices of every sample, compact tiles where there are coordinates.

    Their number and sizes do not depend on the draw.
    """
    contexts = []
    for rows in rows_by_sample(table.sample, pool):
        has_position = located(table.coordinates, rows)
        placed, loose = rows[has_position], rng.permutation(rows[~has_position])
        parts = slices(placed, loose, -(-rows.shape[0] // context_size), table.coordinates, rng)
        contexts += [Context(part, np.ones(part.shape[0], dtype=bool)) for part in parts]
    return contexts


def pack(contexts: Sequence[Context], batch_size: int, rng: np.random.Generator | None = None) -> list[list[Context]]:
    """Pack contexts into minibatches of about ``batch_size`` cells.

    With ``rng``, contexts are shuffled and the minibatches are of nearly equal size; their number depends on the sizes
    alone. Without, they keep their order and a minibatch holds at most ``batch_size`` cells, or one larger context.
    """
    sizes = np.array([len(context) for context in contexts])
    if rng is None:
        batches: list[list[Context]] = []
        room = 0
        for context, size in zip(contexts, sizes, strict=True):
            if size > room:
                batches.append([])
                room = batch_size
            batches[-1].append(context)
            room -= size
        return batches
    n_batches = min(-(-int(sizes.sum()) // batch_size), len(contexts))
    batches = [[] for _ in range(n_batches)]
    load = np.zeros(n_batches)
    shuffled = rng.permutation(len(contexts))
    for i in shuffled[np.argsort(-sizes[shuffled], kind="stable")]:
        lightest = int(load.argmin())
        batches[lightest].append(contexts[i])
        load[lightest] += sizes[i]
    rng.shuffle(batches)
    return batches
