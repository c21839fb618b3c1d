"""The nearest cells of each cell inside its sample, which neither the order of rows nor the frame of coordinates decides."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from itertools import chain

import numpy as np
from scipy.spatial import cKDTree

from ._content import content_order
from ._table import CellTable

#: distances closer to each other than this share count as equal
TIE = 1e-6
#: the neighbour whose typical distance is the unit
UNIT_NEIGHBOUR = 5


@dataclass(frozen=True)
class NearestCells:
    """The nearest cells of each cell inside its sample.

    Parameters
    ----------
    index
        Rows of the neighbours that a cell attends to, (n_cells, n_neighbours), -1 where there is none.
    distance
        Distances to them in units of the sample's typical spacing of cells, (n_cells, n_neighbours), float32.
    niche
        Rows of the neighbours whose counts are summed, (n_cells, n_niche), -1 where there is none.
    """

    index: np.ndarray
    distance: np.ndarray
    niche: np.ndarray

    def around(self, rows: np.ndarray) -> np.ndarray:
        """Neighbours of these cells that are not among them, sorted."""
        near = np.zeros(self.index.shape[0] + 1, dtype=bool)  # the last stands for "no neighbour"
        near[self.index[rows]] = near[self.niche[rows]] = True
        near[rows] = False
        return np.flatnonzero(near[:-1])


def located(coordinates: np.ndarray | None, rows: np.ndarray) -> np.ndarray:
    """Which rows have a position, (n,)."""
    if coordinates is None:
        return np.zeros(rows.shape[0], dtype=bool)
    return np.isfinite(coordinates[rows]).all(1)


def nearest_cells(table: CellTable, samples: Sequence[np.ndarray], n_neighbours: int, n_niche: int = 0) -> NearestCells:
    """The nearest cells within each sample, of a table with coordinates.

    The unit of distance is the sample's median distance to the fifth neighbour (where that is zero, the median distance
    above zero), so that coordinates may be in pixels or micrometres. Of cells at the same distance, all are neighbours or
    none is: on a grid, such as that of Visium, it must not be the order of rows that decides. Where that would leave a
    cell without any, for more cells than it may have are nearest to it alike, their counts decide.

    Parameters
    ----------
    table
        The cells.
    samples
        Rows of each sample.
    n_neighbours, n_niche
        Most cells that a cell attends to, and whose counts are summed, if they measured the same genes; no more than the
        largest sample has take memory.
    """
    samples = [rows[located(table.coordinates, rows)] for rows in samples]
    most = max([2, *(rows.shape[0] for rows in samples)]) - 1
    n_neighbours, n_niche = min(n_neighbours, most), min(n_niche, most)
    found = NearestCells(
        index=np.full((table.n_cells, n_neighbours), -1, dtype=np.int64),
        distance=np.zeros((table.n_cells, n_neighbours), dtype=np.float32),
        niche=np.full((table.n_cells, n_niche), -1, dtype=np.int64),
    )
    genes = _genes_measured(table)
    for rows in samples:
        if rows.shape[0] < 2:
            continue
        points: np.ndarray = table.coordinates[rows]  # type: ignore[index]
        order = np.lexsort(points.T)
        rows, points = rows[order], points[order]
        sample = _Sample(points, max(n_neighbours, n_niche, UNIT_NEIGHBOUR), partial(content_order, table, rows))
        near, far = sample.nearest(n_neighbours)
        found.index[rows, : near.shape[1]] = np.where(near >= 0, rows[near], -1)
        found.distance[rows, : near.shape[1]] = np.where(near >= 0, far / sample.unit, 0.0)
        near, _ = sample.nearest(n_niche)
        summed = (near >= 0) & (genes[rows[near]] == genes[rows, None])
        found.niche[rows, : near.shape[1]] = np.where(summed, rows[near], -1)
    return found


def _genes_measured(table: CellTable) -> np.ndarray:
    """A number a cell, (n_cells,), the same for cells that measured the same genes: only their counts have a sum."""
    if table.measured is None or table.panel is None:
        return np.zeros(table.n_cells, dtype=np.int64)
    _, number = np.unique(table.measured, axis=0, return_inverse=True)
    return number.ravel()[table.panel]


class _Sample:
    """Cells with a position: at least two of one sample, those of one place side by side.

    Parameters
    ----------
    points
        Coordinates, (n, n_dims).
    most
        Most neighbours that are asked for.
    content
        Gives an order of the cells that their counts decide, (n,).
    """

    def __init__(self, points: np.ndarray, most: int, content: Callable[[], np.ndarray]):
        self.points, self._content = points, content
        self.tree = cKDTree(points)
        n_asked = min(most + 2, points.shape[0])  # the cell itself, and one more than needed
        far, near = self.tree.query(points, k=n_asked, workers=-1)
        others = _but_itself(near, np.arange(points.shape[0]))
        self.far, self.near = far[others].reshape(-1, n_asked - 1), near[others].reshape(-1, n_asked - 1)

    @cached_property
    def unit(self) -> float:
        """Typical spacing of the cells."""
        unit = np.median(self.far[:, min(UNIT_NEIGHBOUR, self.far.shape[1]) - 1])
        if unit == 0:
            apart = self.far[self.far > 0]
            unit = np.median(apart) if apart.size else 1.0
        return float(unit)

    @cached_property
    def rank(self) -> np.ndarray:
        """Place of each cell in the order that the counts decide, (n,)."""
        return np.argsort(self._content())

    def nearest(self, k: int) -> tuple[np.ndarray, np.ndarray]:
        """The k nearest cells of each, -1 for none, and how far they are, each (n, k) or fewer columns."""
        k = min(k, self.points.shape[0] - 1)
        near, far, beyond = self.near[:, :k].copy(), self.far[:, :k], self.far[:, k : k + 1]
        if k == 0 or beyond.shape[1] == 0:
            return near, far
        nearer = far < beyond * (1 - TIE)
        alike = np.flatnonzero(~nearer.any(1))
        near[~nearer] = -1
        if alike.size:
            near[alike] = self._of_the_nearest(alike, k)
        return near, far

    def _of_the_nearest(self, cells: np.ndarray, k: int) -> np.ndarray:
        """For cells to which more than k others are nearest alike, the k of them that come first by content, (n, k)."""
        # cells of one place have the same nearest cells: however many they are, these are looked up once
        points = self.points[cells]
        new = np.append(True, (points[1:] != points[:-1]).any(1))
        radius = self.far[cells[new], 0] * (1 + 2 * TIE)
        alike = self.tree.query_ball_point(points[new], radius, workers=-1)
        sizes = np.array([len(found) for found in alike])
        members = np.fromiter(chain.from_iterable(alike), dtype=np.int64, count=sizes.sum())
        members = members[np.lexsort((self.rank[members], np.repeat(np.arange(sizes.shape[0]), sizes)))]
        first = members[(sizes.cumsum() - sizes)[:, None] + np.arange(k + 1)][new.cumsum() - 1]
        return first[_but_itself(first, cells)].reshape(-1, k)


def _but_itself(near: np.ndarray, cells: np.ndarray) -> np.ndarray:
    """Which of the nearest cells of each, (n, k + 1), to keep as its k neighbours: not itself, or else not the last.

    Cells in the same place may list each other before themselves, or instead.
    """
    own = near == cells[:, None]
    own[~own.any(1), -1] = True
    return ~own
