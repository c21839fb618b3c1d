"""From cells of a corpus to the minibatches that :mod:`._loader` makes of an AnnData."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import scipy.sparse as sp

from cellplm_scvi import _constants as c

from ._categories import ABSENT, CovariateField, named_as
from ._checks import some, warn
from ._contexts import whole_contexts
from ._corpus import Corpus
from ._fields import report_genes
from ._loader import CellDataset, MinibatchRows, SpatialInputs, find_nearest
from ._nearest import NearestCells
from ._stream_plan import Runs, preloads
from ._table import CellTable, CountRows
from ._vocabulary import UNNAMED_KEY, gene_columns

if TYPE_CHECKING:
    from cellplm_scvi._typing import Minibatch

    from ._stream_reader import CountReader

#: cells that are read from disk together
PRELOAD = 8192


@dataclass
class CorpusCells:
    """Cells of a corpus as a model wants them: its genes, its codes, and what it takes of positions.

    Parameters
    ----------
    corpus
        The corpus.
    fields
        ``field_registries`` of the model.
    spatial
        What the model takes of positions.
    """

    corpus: Corpus
    fields: Mapping[str, Any]
    spatial: SpatialInputs = field(default_factory=SpatialInputs)

    def __post_init__(self) -> None:
        n_dims = self.fields[c.COORDINATES_KEY]["state_registry"]["n_dims"] if c.COORDINATES_KEY in self.fields else 0
        if n_dims and self.corpus.n_dims not in (0, n_dims):
            raise ValueError(
                f"The corpus has coordinates in {self.corpus.n_dims} dimensions; the model was set up with {n_dims}."
            )
        if c.SIZE_FACTOR_KEY in self.fields and not self.corpus.has_size_factor:
            raise ValueError(
                "The model was set up with library sizes (size_factor_key), which the corpus does not have: counts over some "
                "genes cannot be scaled without them. Build the corpus with size_factor_key."
            )
        self.n_dims: int = n_dims

    def __getstate__(self) -> dict[str, Any]:
        return {key: value for key, value in self.__dict__.items() if key != "reader"}

    @cached_property
    def reader(self) -> CountReader:
        """Opened by the process that reads."""
        from ._stream_reader import CountReader

        return CountReader(self.corpus)

    @cached_property
    def columns(self) -> np.ndarray:
        """Place in the model of each gene of the corpus, -1 for none, (n_corpus_genes,)."""
        columns = gene_columns(self.fields[c.X_KEY]["state_registry"], self.corpus.genes)
        if (columns < 0).all():
            raise ValueError("None of the genes of the corpus is known to the model.")
        return columns

    @cached_property
    def n_genes(self) -> int:
        return len(self.fields[c.X_KEY]["state_registry"]["column_names"])

    @cached_property
    def codes(self) -> dict[str, np.ndarray]:
        """The model's code of each category of the corpus; the last is that of an absent one."""
        found = {}
        for name in c.COVARIATES:
            if name not in self.fields:
                continue
            state = self.fields[name]["state_registry"]
            n_known = state[CovariateField.N_KNOWN_KEY]
            known = np.asarray(state[CovariateField.CATEGORICAL_MAPPING_KEY], dtype=object)[:n_known]
            # names are text on disk, and may be numbers in the model
            given = pd.Categorical(self.corpus.categories[name], categories=self.corpus.categories[name])
            names = named_as(known, pd.Series(given)).cat.categories
            places = pd.Index(known).get_indexer(names.astype(object))
            if state.get(UNNAMED_KEY):
                places = np.full_like(places, -1)
            # what the model has not seen gets a code past the end of its table
            found[name] = np.append(np.where(places < 0, n_known, places), n_known).astype(np.int64)
        return found

    @cached_property
    def measured(self) -> np.ndarray | None:
        """Genes of the model that each data set measured, (n_datasets, n_genes), or ``None`` for all by all."""
        panels = self.corpus.panels
        if panels is None:
            panels = np.ones((len(self.corpus.categories[c.DATASET_KEY]), self.corpus.n_genes), dtype=bool)
        known = self.columns >= 0
        measured = np.zeros((panels.shape[0], self.n_genes), dtype=bool)
        measured[:, self.columns[known]] = panels[:, known]
        return None if measured.all() else measured

    def report(self) -> None:
        """Say what of the corpus a trained model does not know, and what it misses there; as for a new AnnData."""
        known = pd.Index(self.fields[c.X_KEY]["state_registry"]["column_names"])
        panels = self.corpus.panels
        held = np.ones(self.corpus.n_genes, dtype=bool) if panels is None else panels.any(0)
        own, foreign = held & (self.columns >= 0), held & (self.columns < 0)
        report_genes(known, known[self.columns[own]].append(self.corpus.genes[foreign]), "the corpus")
        for name, codes in self.codes.items():
            state = self.fields[name]["state_registry"]
            n_known = state[CovariateField.N_KNOWN_KEY]
            if n_known < 2 or state.get(UNNAMED_KEY):
                continue  # there is one contribution for all, or no name to go by
            names = np.asarray(self.corpus.categories[name], dtype=object)
            unseen = names[codes[:-1] == n_known]
            if unseen.size == names.size and set(names) <= {ABSENT}:
                warn(f"The corpus has no {name}: its cells get the mean {name} code.")
            elif unseen.size:
                warn(
                    f"The corpus has {len(unseen):,} {name} categor{'y' if len(unseen) == 1 else 'ies'} that the model has not "
                    f"seen ({some(unseen)}): their cells get the mean {name} code."
                )
        if self.n_dims and not self.corpus.n_dims:
            warn("The corpus has no coordinates (spatial_key): its cells have no position.")

    def table(self, rows: np.ndarray, counts: Any, sample: np.ndarray | None = None) -> CellTable:
        """The cells in these rows of the corpus, (n_cells,), with their counts, (n_cells, n_corpus_genes).

        Samples are those of the corpus, unless codes are given, (n_cells,).
        """
        cells = self.corpus.cells(rows)
        panel = cells["dataset"].astype(np.int64) if self.measured is not None else None
        coordinates = None
        if self.n_dims:
            unknown = np.full((rows.shape[0], self.n_dims), np.nan)
            coordinates = np.ascontiguousarray(cells["position"]) if self.corpus.n_dims else unknown
        return CellTable(
            counts=CountRows(counts, self.columns, self.n_genes, self.measured, panel),
            covariates={name: codes[cells[name]] for name, codes in self.codes.items()},
            sample=cells["sample"] if sample is None else sample,
            names=rows,
            coordinates=coordinates,
            size_factor=cells["library"].copy() if c.SIZE_FACTOR_KEY in self.fields else None,
            measured=self.measured,
            panel=panel,
        )

    def nearest(self, table: CellTable) -> NearestCells | None:
        """Nearest cells within the samples of a table."""
        return find_nearest(table, self.spatial, np.arange(table.n_cells))

    def training(self, batches: list[Runs]) -> Iterator[Minibatch]:
        """Minibatches of a plan."""
        groups = ([batch.rows for batch in group] for group in preloads(batches, PRELOAD))
        for batch, counts in zip(batches, self.reader.stream(groups), strict=True):
            lengths = batch.lengths
            table = self.table(batch.rows, _AsRead(counts), np.repeat(np.arange(lengths.shape[0]), lengths))
            dataset = CellDataset(table, self.spatial, self.nearest(table))
            yield dataset[MinibatchRows(np.arange(table.n_cells), lengths)]

    def whole(self, units: Iterable[Unit], max_context: int) -> Iterator[tuple[np.ndarray, Minibatch]]:
        """Minibatches of whole samples, each with the rows of the corpus of its cells that count."""
        kept: tuple[int, CellDataset, list[MinibatchRows]] | None = None
        for unit in units:
            if kept is None or kept[0] != unit.start:
                kept = (unit.start, *self._whole_samples(unit, max_context))
            _, dataset, requests = kept
            request = requests[unit.nth]
            found = request.rows if request.target is None else request.rows[request.target]
            yield unit.start + found, dataset[request]

    def _whole_samples(self, unit: Unit, max_context: int) -> tuple[CellDataset, list[MinibatchRows]]:
        rows = np.arange(unit.start, unit.stop)
        if unit.n_slices == 1:
            table = self.table(rows, self.reader[rows])
        else:
            table = self.table(rows, _OnDisk(self.reader, unit.start, self.corpus.n_genes, rows.shape[0]))
            table = replace(table, names=self.corpus.names(unit.start, unit.stop))
        nearest = self.nearest(table)
        everything = np.arange(table.n_cells)
        contexts = whole_contexts(table, everything, everything, max_context, nearest)
        packed = [contexts] if unit.n_slices == 1 else [[context] for context in contexts]
        return CellDataset(table, self.spatial, nearest), [MinibatchRows.of(part) for part in packed]


class _AsRead:
    """Counts of a minibatch: nothing is copied, or checked again, where all are asked for in their order."""

    def __init__(self, counts: sp.csr_matrix):
        # scipy's astype would copy the indices too
        parts = (counts.data.astype(np.float32), counts.indices, counts.indptr)
        self.counts, self.shape = sp.csr_matrix(parts, shape=counts.shape, copy=False), counts.shape

    def __getitem__(self, rows: np.ndarray) -> sp.csr_matrix:
        return self.counts if np.array_equal(rows, np.arange(self.shape[0])) else self.counts[rows]


class _OnDisk:
    """Counts of a sample that is larger than a context: rows are read when they are asked for."""

    def __init__(self, reader: CountReader, start: int, n_genes: int, n_cells: int):
        self.reader, self.start, self.shape = reader, start, (n_cells, n_genes)

    def __getitem__(self, rows: np.ndarray) -> sp.csr_matrix:
        return self.reader[self.start + rows]


@dataclass(frozen=True)
class Unit:
    """A minibatch of whole samples, ``start`` to ``stop`` in the corpus, or slice ``nth`` of a large one."""

    start: int
    stop: int
    nth: int = 0
    n_slices: int = 1


def whole_units(start: np.ndarray, n_cells: np.ndarray, batch_size: int, max_context: int) -> list[Unit]:
    """Units of samples, in corpus order; a unit holds at most ``batch_size`` cells, or one larger context."""
    units: list[Unit] = []
    low = high = -1
    for first, size in zip(start.tolist(), n_cells.tolist(), strict=True):
        if high == first and size <= max_context and first + size - low <= batch_size:
            high = first + size
            continue
        if high >= 0:
            units.append(Unit(low, high))
        low = high = -1
        n_slices = -(-size // max_context)
        if n_slices > 1:
            units += [Unit(first, first + size, nth, n_slices) for nth in range(n_slices)]
        else:
            low, high = first, first + size
    if high >= 0:
        units.append(Unit(low, high))
    return units
