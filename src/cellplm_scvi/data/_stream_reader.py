"""Reads planned minibatches with annbatch's loader. The only file that imports annbatch when it is imported."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

import numpy as np
import scipy.sparse as sp
from annbatch import Loader
from annbatch.abc import Sampler

if TYPE_CHECKING:
    from annbatch.types import LoadRequest

    from ._corpus import Corpus


class PlannedSampler(Sampler):
    """Asks for minibatches that are planned already; those of a group are read together."""

    batch_size = None  # every request says how it is split
    shuffle = False

    def __init__(self) -> None:
        self.groups: Iterable[list[np.ndarray]] = ()

    def n_batches(self, n_obs: int) -> int:
        """Unknown: groups are planned while they are read."""
        raise TypeError("The number of minibatches is a matter of the plan.")

    def validate(self, n_obs: int) -> None:
        """The plan is made for this corpus."""

    def _sample(self, n_obs: int) -> Iterator[LoadRequest]:
        for group in self.groups:
            ends = np.cumsum([rows.shape[0] for rows in group])
            splits = np.split(np.arange(ends[-1]), ends[:-1])
            yield {"requests": np.concatenate(group), "splits": splits}


class CountReader:
    """Counts of a corpus by rows."""

    def __init__(self, corpus: Corpus):
        self._sampler = PlannedSampler()
        self._loader = Loader(batch_sampler=self._sampler, preload_to_gpu=False)
        self._loader.add_datasets(corpus.count_arrays())

    def stream(self, groups: Iterable[list[np.ndarray]]) -> Iterator[sp.csr_matrix]:
        """Counts of each minibatch of each group, (n_cells, n_genes)."""
        self._sampler.groups = groups
        for found in self._loader:
            yield found["X"]

    def __getitem__(self, rows: np.ndarray) -> sp.csr_matrix:
        return next(self.stream([[rows]]))
