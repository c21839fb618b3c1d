"""Which cells see each other: whole samples, or slices of samples that exceed the context.

A slice is a function of its sample alone (of coordinates where there are any, else of the counts), never of the order of
rows, of the other samples or of what a call asks for.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, partial

import numpy as np

from ._content import content_order, content_weights
from ._nearest import NearestCells, located
from ._table import CellTable

#: what is smaller than this, as a share of what it is of, is a matter of rounding
SYMMETRIC = 1e-6


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


def rows_by_sample(sample: np.ndarray, rows: np.ndarray) -> list[np.ndarray]:
    """Split rows into those of each sample, keeping their order."""
    order = np.argsort(sample[rows], kind="stable")
    _, starts = np.unique(sample[rows][order], return_index=True)
    return np.split(rows[order], starts[1:])


def tiles(
    coordinates: np.ndarray,
    n_tiles: int,
    rng: np.random.Generator | None = None,
    weight: Callable[[], np.ndarray] | None = None,
) -> list[np.ndarray]:
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
    weight
        Gives weights of the cells, (n,), that decide on the axes of a symmetric set of cells, such as a grid.

    Returns
    -------
    Index arrays into ``coordinates``; every cell is in one tile.
    """

    def cut(rows: np.ndarray, n_tiles: int) -> list[np.ndarray]:
        if n_tiles == 1:
            return [rows]
        points = coordinates[rows] - coordinates[rows].mean(0)
        if rng is None:
            along = _along_axes(points, lambda: np.ones(rows.shape[0]) if weight is None else weight()[rows])
            order = np.lexsort(_levels(along).T[::-1])
        else:
            order = np.argsort(points @ rng.normal(size=points.shape[1]), kind="stable")
        first = n_tiles // 2
        at = round(rows.shape[0] * first / n_tiles)
        return cut(rows[order[:at]], first) + cut(rows[order[at:]], n_tiles - first)

    return cut(np.arange(coordinates.shape[0]), n_tiles)


def _along_axes(points: np.ndarray, weight: Callable[[], np.ndarray]) -> np.ndarray:
    """Centred points, (n, n_dims), along their principal axes, the widest first, each towards its longer tail.

    Where the points are as wide in two directions, or their tails as long, those of the weighted points are taken.
    Axes that the points do not extend along are left out.
    """
    spread, axes = np.linalg.eigh(points.T @ points)
    wide = spread >= SYMMETRIC**2 * spread[-1]
    if (np.diff(spread[wide]) <= SYMMETRIC * spread[-1]).any():
        spread, axes = np.linalg.eigh((points * weight()[:, None]).T @ points)
    along = points @ axes[:, wide][:, ::-1]
    cubes = along**3
    skew = cubes.sum(0)
    if (even := np.abs(skew) <= SYMMETRIC * np.abs(cubes).sum(0)).any():
        skew = np.where(even, weight() @ cubes, skew)
    return along * np.where(skew < 0, -1.0, 1.0)


def _levels(values: np.ndarray) -> np.ndarray:
    """Ranks in each column, (n, n_columns); values that only rounding tells apart share one."""
    order = values.argsort(0)
    steps = np.diff(np.take_along_axis(values, order, 0), axis=0) > 1e-9 * np.abs(values).max()
    ranks = np.zeros(values.shape, dtype=np.int64)
    np.put_along_axis(ranks, order[1:], steps.cumsum(0), 0)
    return ranks


def slices(
    placed: np.ndarray,
    loose: np.ndarray,
    n_slices: int,
    coordinates: np.ndarray | None,
    rng: np.random.Generator | None = None,
    weight: Callable[[], np.ndarray] | None = None,
) -> list[np.ndarray]:
    """Cut a sample into slices of equal size (to one cell): compact tiles of the cells with a position, and others.

    Parameters
    ----------
    placed, loose
        Rows with and without a position; the latter are dealt out in their order.
    n_slices
        Number of slices, at most that of the cells.
    coordinates, rng, weight
        As in :func:`tiles`; coordinates of all rows, weights of those with a position.
    """
    parts = [np.empty(0, dtype=np.int64)] * n_slices
    if placed.size:
        cut = tiles(coordinates[placed], min(n_slices, placed.size), rng, weight)  # type: ignore[index]
        parts[: len(cut)] = [placed[tile] for tile in cut]
    sizes = np.array([part.shape[0] for part in parts])
    total, more = divmod(placed.shape[0] + loose.shape[0], n_slices)
    wanted = np.full(n_slices, total)
    wanted[np.argsort(-sizes, kind="stable")[:more]] += 1
    dealt = np.split(loose, np.cumsum(wanted - sizes)[:-1])
    return [np.concatenate([part, others]) for part, others in zip(parts, dealt, strict=True)]


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
    if placed.size:  # one order for the same cells, so that sums round alike
        if np.unique(table.coordinates[placed], axis=0).shape[0] < placed.size:  # type: ignore[index]
            placed = placed[content_order(table, placed)]
        placed = placed[np.lexsort(table.coordinates[placed].T)]  # type: ignore[index]
    if loose.size:
        loose = loose[content_order(table, loose)]
    weight = cache(partial(content_weights, table, placed))
    parts = slices(placed, loose, -(-rows.shape[0] // max_context), table.coordinates, weight=weight)
    if nearest is None:
        return [(part, part) for part in parts]
    return [(part, np.concatenate([part, nearest.around(part)])) for part in parts]


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
