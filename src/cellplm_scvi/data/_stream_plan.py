"""Which cells make up which minibatch, planned from the sizes of samples alone, without reading a cell.

Every process makes the same plan, and reads of it what is its own.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np


@dataclass(frozen=True)
class Runs:
    """Cells of a minibatch: runs of neighbours on disk, each one context, which has two where it wraps around.

    Parameters
    ----------
    start, stop
        Of each run, (n_runs,).
    context
        Context of each run, ascending, (n_runs,).
    """

    start: np.ndarray
    stop: np.ndarray
    context: np.ndarray

    @property
    def rows(self) -> np.ndarray:
        """Rows of the corpus, (n_cells,)."""
        sizes = self.stop - self.start
        ends = np.cumsum(sizes)
        return np.arange(ends[-1]) + np.repeat(self.start - (ends - sizes), sizes)

    @property
    def lengths(self) -> np.ndarray:
        """Cells of each context, (n_contexts,)."""
        starts = np.flatnonzero(np.diff(self.context, prepend=-1))
        return np.add.reduceat(self.stop - self.start, starts).astype(np.int64)

    @property
    def n_cells(self) -> int:
        return int((self.stop - self.start).sum())


@dataclass
class EpochPlan:
    """Minibatches of whole samples, or of slices of the large ones, for one epoch after the other.

    A sample of at most ``context_size`` cells is one context. A larger one is a ring of its cells in their order on disk,
    cut at a place drawn for each epoch into the fewest contexts, which differ by one cell at most; so each stays a
    neighbourhood of tiles, or a random part of a dissociated sample. Contexts are then dealt out at random to minibatches of
    nearly equal size: every two contexts of the corpus may meet. Every cell is in one minibatch of an epoch.

    The number of minibatches depends on the sizes alone. It is a multiple of ``n_ranks``, which take turns, times
    ``accumulate``, so that steps are of equal size. Only where there are fewer contexts than that, the first minibatches are
    given out again.

    Parameters
    ----------
    start, n_cells
        Of each sample, (n_samples,).
    context_size, batch_size
        In cells.
    seed
        What is drawn is a function of it and of the epoch.
    n_ranks
        Processes that share the minibatches.
    accumulate
        Minibatches of an optimiser step on each rank.
    """

    start: np.ndarray
    n_cells: np.ndarray
    context_size: int
    batch_size: int
    seed: int
    n_ranks: int = 1
    accumulate: int = 1
    _made: tuple[int, list[Runs]] | None = field(default=None, repr=False)

    @property
    def n_contexts(self) -> int:
        return int((-(-self.n_cells // self.context_size)).sum())

    @property
    def n_batches(self) -> int:
        """Minibatches of an epoch, on all ranks together."""
        wanted = -(-int(self.n_cells.sum()) // self.batch_size)
        step = self.n_ranks * self.accumulate
        return min(-(-wanted // step), self.n_contexts // step) * step or self.n_contexts

    def __len__(self) -> int:
        """Minibatches of an epoch on each rank."""
        return -(-self.n_batches // self.n_ranks)

    def minibatches(self, epoch: int, rank: int = 0) -> list[Runs]:
        """Those of one rank."""
        if self._made is None or self._made[0] != epoch:
            self._made = (epoch, self._make(epoch))
        batches = self._made[1]
        return [batches[i % len(batches)] for i in range(rank, len(self) * self.n_ranks, self.n_ranks)]

    def _make(self, epoch: int) -> list[Runs]:
        rng = np.random.default_rng([self.seed, epoch])
        start, stop, context = self._contexts(rng)
        sizes = np.bincount(context, weights=stop - start).astype(np.int64)
        batch = deal(sizes, self.n_batches, rng)
        # runs by minibatch, in each by context
        order = np.argsort(batch[context], kind="stable")
        ends = np.searchsorted(batch[context][order], np.arange(self.n_batches), side="right")
        runs = []
        for low, high in zip(np.concatenate([[0], ends[:-1]]), ends, strict=True):
            part = order[low:high]
            runs.append(Runs(start[part], stop[part], np.unique(context[part], return_inverse=True)[1]))
        return runs

    def _contexts(self, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Start and stop of each run, and its context, (n_runs,) each."""
        n_slices = -(-self.n_cells // self.context_size)
        sample = np.repeat(np.arange(self.n_cells.shape[0]), n_slices)
        nth = np.arange(sample.shape[0]) - np.repeat(np.cumsum(n_slices) - n_slices, n_slices)
        # nearly equal parts: part k of n cells in s parts goes from k n // s to (k + 1) n // s
        n, s = self.n_cells[sample], n_slices[sample]
        turn = rng.integers(0, self.n_cells)[sample] * (s > 1)
        low = turn + nth * n // s
        high = turn + (nth + 1) * n // s
        first, last = self.start[sample], self.start[sample] + n
        wraps = (high > n) & (low < n)
        low, high = np.where(low >= n, low - n, low), np.where(low >= n, high - n, high)
        start, stop = first + low, np.minimum(first + high, last)
        context = np.arange(sample.shape[0])
        start = np.concatenate([start, first[wraps]])
        stop = np.concatenate([stop, (first + high - n)[wraps]])
        context = np.concatenate([context, context[wraps]])
        order = np.argsort(context, kind="stable")
        return start[order], stop[order], context[order]


def deal(sizes: np.ndarray, n_batches: int, rng: np.random.Generator) -> np.ndarray:
    """Minibatch of each context, (n_contexts,): at random, each to the lightest one, larger contexts first."""
    shuffled = rng.permutation(sizes.shape[0])
    shuffled = shuffled[np.argsort(-sizes[shuffled], kind="stable")]
    batch = np.empty(sizes.shape[0], dtype=np.int64)
    names = rng.permutation(n_batches).tolist()
    lightest = [(0, name) for name in range(n_batches)]
    for i, size in zip(shuffled.tolist(), sizes[shuffled].tolist(), strict=True):
        load, name = lightest[0]
        batch[i] = names[name]
        heapq.heapreplace(lightest, (load + size, name))
    return batch


def preloads(batches: list[Runs], n_cells: int) -> Iterator[list[Runs]]:
    """Minibatches that are read together: as many as hold ``n_cells`` cells, one at least."""
    group: list[Runs] = []
    size = 0
    for batch in batches:
        if group and size + batch.n_cells > n_cells:
            yield group
            group, size = [], 0
        group.append(batch)
        size += batch.n_cells
    if group:
        yield group
