"""Minibatches of whole samples, sparse from the AnnData to the module."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence, Sized
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import scipy.sparse as sp
import torch
from scvi import settings
from torch import distributed
from torch.utils.data import DataLoader, Dataset, Sampler

from ._checks import check_library
from ._contexts import Context, pack, rows_by_sample, training_contexts, whole_contexts
from ._nearest import NearestCells, located, nearest_cells
from ._table import CellTable

if TYPE_CHECKING:
    from cellplm_scvi._typing import Minibatch


@dataclass(frozen=True)
class MinibatchRows:
    """Rows of one minibatch: the cells of each packed context side by side.

    Parameters
    ----------
    rows
        (n_cells,).
    lengths
        Cells of each context, (n_contexts,), or ``None`` where cells are read one by one (the encoder has run).
    target
        Which cells count, (n_cells,), or ``None`` for all.
    """

    rows: np.ndarray
    lengths: np.ndarray | None = None
    target: np.ndarray | None = None

    @classmethod
    def of(cls, contexts: Sequence[Context]) -> MinibatchRows:
        target = np.concatenate([context.target for context in contexts])
        return cls(
            rows=np.concatenate([context.rows for context in contexts]),
            lengths=np.array([len(context) for context in contexts], dtype=np.int64),
            target=None if target.all() else target,
        )


@dataclass(frozen=True)
class SpatialInputs:
    """What a model wants to know of positions.

    Parameters
    ----------
    n_neighbours
        Nearest cells for local attention; 0 for none.
    absolute
        Whether it takes coordinates.
    n_niche
        Nearest cells whose counts it learns to predict; 0 for none.
    """

    n_neighbours: int = 0
    absolute: bool = False
    n_niche: int = 0


class CellDataset(Dataset):
    """Reads minibatches from a table of cells.

    Parameters
    ----------
    table
        The registered data.
    spatial
        What to give of positions.
    nearest
        Nearest cells, if ``spatial`` asks for them.
    moments
        Mean and variance of q(z|h) of every row, each (n_cells, n_latent), where the encoder has run.
    """

    def __init__(
        self,
        table: CellTable,
        spatial: SpatialInputs,
        nearest: NearestCells | None,
        moments: tuple[np.ndarray, np.ndarray] | None = None,
    ):
        self.table, self.spatial, self.nearest, self.moments = table, spatial, nearest, moments
        self.scaled = _scaled_to_sample(table) if spatial.absolute else None

    def __len__(self) -> int:
        return self.table.n_cells

    def __getitem__(self, request: MinibatchRows) -> Minibatch:
        table, rows = self.table, request.rows
        counts = table.counts[rows]
        library = counts.sum(1, dtype=np.float32).A1
        if table.size_factor is not None:
            totals, library = library, table.size_factor[rows]
            check_library(totals, library, table.names[rows])
        arrays: dict[str, np.ndarray] = {"library": library, **_csr("", counts)}
        arrays |= {name: codes[rows] for name, codes in table.covariates.items()}
        arrays |= {name: codes[rows] for name, codes in table.annotations.items()}
        if table.measured is not None and table.panel is not None:
            used, panel = np.unique(table.panel[rows], return_inverse=True)
            arrays |= {"measured": table.measured[used], "panel": panel}
        if self.moments is not None:
            mean, variance = self.moments
            arrays |= {"qz_mean": mean[rows], "qz_variance": variance[rows]}
        if request.lengths is not None:
            arrays["lengths"] = request.lengths
            # without context cells, no row occurs twice and contexts may look into each other
            arrays |= self._positions(rows, counts, None if request.target is None else request.lengths)
        if request.target is not None:
            arrays["target"] = request.target
        return {name: torch.from_numpy(np.ascontiguousarray(a)) for name, a in arrays.items()}  # type: ignore[return-value]

    def _positions(self, rows: np.ndarray, counts: sp.csr_matrix, lengths: np.ndarray | None) -> dict[str, np.ndarray]:
        arrays: dict[str, np.ndarray] = {}
        if self.table.coordinates is not None:
            arrays["located"] = located(self.table.coordinates, rows)
        if self.scaled is not None:
            arrays["coordinates"] = self.scaled[rows]
        if self.nearest is None:
            return arrays
        arrays["neighbours"] = self._places(self.nearest.index[rows], rows, lengths)
        arrays["distances"] = self.nearest.distance[rows]
        if self.spatial.n_niche:
            near = self._places(self.nearest.niche[rows], rows, lengths)
            cells, nth = np.nonzero(near >= 0)
            adjacency = sp.csr_matrix(
                (np.ones(cells.shape[0], np.float32), (cells, near[cells, nth])), shape=(rows.shape[0],) * 2
            )
            arrays |= _csr("niche_", adjacency @ counts)
        return arrays

    def _places(self, index: np.ndarray, rows: np.ndarray, lengths: np.ndarray | None) -> np.ndarray:
        """Where in the minibatch (with ``lengths``: in the same context) the nearest cells lie, (n_cells, k), -1: not."""
        place = np.full(self.table.n_cells + 1, -1, dtype=np.int64)  # the last stands for "no neighbour"
        neighbours = np.empty_like(index)
        ends = np.cumsum([rows.shape[0]] if lengths is None else lengths)
        for start, end in zip(np.concatenate([[0], ends[:-1]]), ends, strict=True):
            place[rows[start:end]] = np.arange(start, end)
            neighbours[start:end] = place[index[start:end]]
            place[rows[start:end]] = -1
        return neighbours


def _csr(prefix: str, counts: sp.csr_matrix) -> dict[str, np.ndarray]:
    return {
        f"{prefix}values": counts.data,
        f"{prefix}genes": counts.indices.astype(np.int64),
        f"{prefix}offsets": counts.indptr.astype(np.int64),
    }


def _scaled_to_sample(table: CellTable) -> np.ndarray | None:
    """Coordinates with the longest side of each sample scaled to [0, 1], (n_cells, n_dims), float32."""
    if table.coordinates is None:
        return None
    scaled = np.full(table.coordinates.shape, np.nan, dtype=np.float32)
    for rows in rows_by_sample(table.sample, np.arange(table.n_cells)):
        points = table.coordinates[rows]
        if np.isfinite(points).any():
            low, high = np.nanmin(points, 0), np.nanmax(points, 0)
            scaled[rows] = (points - low) / max((high - low).max(), 1e-12)
    return scaled


class MinibatchSampler(Sampler[MinibatchRows], Sized, ABC):
    """Yields the rows of minibatches; in distributed training every rank yields the same number of them.

    Ranks take turns; where the minibatches do not divide evenly, the first ones are given out once more.
    """

    epoch = 0
    #: whether ranks share the minibatches out; each needs all of them where a result is computed
    shared = True

    def set_epoch(self, epoch: int) -> None:
        """Called by Lightning before each epoch."""
        self.epoch = epoch

    @abstractmethod
    def batches(self) -> list[MinibatchRows]:
        """All minibatches of the current epoch, the same on every rank."""

    def __iter__(self) -> Iterator[MinibatchRows]:
        rank, n_ranks = _rank() if self.shared else (0, 1)
        batches = self.batches()
        even = -(-len(batches) // n_ranks) * n_ranks
        for i in range(rank, even, n_ranks):
            yield batches[i % len(batches)]

    def __len__(self) -> int:
        return -(-len(self.batches()) // (_rank()[1] if self.shared else 1))


def _rank() -> tuple[int, int]:
    """Rank of this process, and how many there are."""
    if distributed.is_available() and distributed.is_initialized():
        return distributed.get_rank(), distributed.get_world_size()
    return 0, 1


class WholeSampleSampler(MinibatchSampler):
    """Every sample that holds a target, in fixed contexts and order."""

    def __init__(self, contexts: Sequence[Context], batch_size: int, *, shared: bool):
        self._batches = [MinibatchRows.of(packed) for packed in pack(contexts, batch_size)]
        self.shared = shared

    def batches(self) -> list[MinibatchRows]:
        return self._batches


@dataclass
class RandomSliceSampler(MinibatchSampler):
    """Random slices of samples, packed at random; a function of seed and epoch."""

    table: CellTable
    pool: np.ndarray
    context_size: int
    batch_size: int
    seed: int
    _made: tuple[int, list[MinibatchRows]] | None = field(default=None, repr=False)

    def batches(self) -> list[MinibatchRows]:
        if self._made is None or self._made[0] != self.epoch:
            rng = np.random.default_rng([self.seed, self.epoch])
            contexts = training_contexts(self.table, self.pool, self.context_size, rng)
            packed = pack(contexts, self.batch_size, rng)
            self._made = (self.epoch, [MinibatchRows.of(contexts) for contexts in packed])
        return self._made[1]


class RowSampler(MinibatchSampler):
    """Cells one by one in the order asked for, after the encoder has run."""

    shared = False

    def __init__(self, rows: np.ndarray, batch_size: int):
        self._batches = [MinibatchRows(rows[i : i + batch_size]) for i in range(0, rows.shape[0], batch_size)]

    def batches(self) -> list[MinibatchRows]:
        return self._batches


class CellLoader(DataLoader):
    """Loads minibatches of one of the samplers."""

    def __init__(self, dataset: CellDataset, sampler: MinibatchSampler, **kwargs: Any):
        # the default generator is the user's: computing a result must not move it
        kwargs.setdefault("generator", torch.Generator())
        kwargs.setdefault("pin_memory", torch.cuda.is_available())
        kwargs.setdefault("num_workers", settings.dl_num_workers)
        kwargs.setdefault("persistent_workers", settings.dl_persistent_workers and kwargs["num_workers"] > 0)
        super().__init__(dataset, sampler=sampler, batch_size=None, **kwargs)


def whole_sample_loader(
    table: CellTable,
    spatial: SpatialInputs,
    targets: np.ndarray,
    *,
    batch_size: int,
    max_context: int,
    pool: np.ndarray | None = None,
    shared: bool = False,
    **kwargs: Any,
) -> CellLoader:
    """A loader whose minibatches hold every context with a target, for inference and (``shared``) validation."""
    pool = np.arange(table.n_cells) if pool is None else pool
    nearest = find_nearest(table, spatial, pool)
    contexts = whole_contexts(table, pool, targets, max_context, nearest)
    return CellLoader(
        CellDataset(table, spatial, nearest), WholeSampleSampler(contexts, batch_size, shared=shared), **kwargs
    )


def training_loader(
    table: CellTable,
    spatial: SpatialInputs,
    pool: np.ndarray,
    *,
    batch_size: int,
    context_size: int,
    seed: int,
    **kwargs: Any,
) -> CellLoader:
    """A loader of random slices for training."""
    dataset = CellDataset(table, spatial, find_nearest(table, spatial, pool))
    return CellLoader(dataset, RandomSliceSampler(table, pool, context_size, batch_size, seed), **kwargs)


def find_nearest(table: CellTable, spatial: SpatialInputs, pool: np.ndarray) -> NearestCells | None:
    """Nearest cells within the samples of a pool of rows, if the model takes any of positions."""
    if table.coordinates is None or not (spatial.n_neighbours or spatial.n_niche):
        return None
    return nearest_cells(table, rows_by_sample(table.sample, pool), spatial.n_neighbours, spatial.n_niche)
