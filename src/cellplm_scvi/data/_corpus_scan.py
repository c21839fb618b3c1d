"""A pass over a data set from end to end: checks, what it holds, and the order in which its cells go to disk."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import scipy.sparse as sp

from ._checks import check_counts, check_library, counted, some, warn
from ._content import content_keys
from ._contexts import rows_by_sample, tiles
from ._corpus import FORMAT, FORMAT_VERSION
from ._corpus_source import Cells, Source, opened
from ._nearest import located
from ._vocabulary import MIN_COUNTS_COVERED, logger, match_genes

#: cells of the smallest tiles that a spatial sample is ordered by
TILE = 64


@dataclass(frozen=True)
class Scan:
    """What a pass over a source found.

    Parameters
    ----------
    categories
        Names of its batches, platforms, data sets.
    samples
        Number of cells of each sample, in corpus order.
    measured
        Vocabulary genes that each data set measured.
    largest
        Largest count.
    n_dims
        Of the coordinates; 0 without.
    n_empty
        Cells without counts of the vocabulary.
    n_counts, n_counts_kept, n_counts_unknown, n_counts_second
        Counts in all, and of those that are kept, of genes that are not in the vocabulary, and of ``second`` names.
    unknown, second
        Genes that are not in the vocabulary, and further names of genes that a surer name stands for.
    """

    categories: dict[str, list[str]]
    samples: dict[str, int]
    measured: dict[str, np.ndarray]
    largest: int
    n_dims: int
    n_empty: int
    n_counts: float
    n_counts_kept: float
    n_counts_unknown: float
    n_counts_second: float
    unknown: list[str]
    second: list[str]


def scan_source(source: Source, genes: pd.Index, order_file: Path) -> Scan:
    """Check a source from end to end, and find the order in which its cells go to disk."""
    with opened(source) as cells:
        match = match_genes(genes, cells.genes, source.organism)
        columns, second = match.columns, cells.genes.isin(match.second)
        unknown = (columns < 0) & ~second
        if (columns < 0).all():
            raise ValueError(
                f"none of its {len(cells.genes):,} genes (such as {some(cells.genes)}) is in the vocabulary "
                f"({some(genes)})."
            )
        measured = measured_genes(cells, columns, len(genes))
        keys = np.empty(cells.n_cells, dtype=np.uint64)
        largest, n_empty, n_kept, totals = 0.0, 0, 0.0, np.zeros(len(cells.genes))
        for rows, given in cells.chunks(np.arange(cells.n_cells)):
            check_counts(given, source.layer or "X")
            counts = mapped_counts(given, rows, cells, columns, measured, len(genes))
            if cells.size_factor is not None:
                in_cell = counts.sum(1, dtype=np.float64).A1
                check_library(in_cell, cells.size_factor[rows], cells.obs.index.to_numpy()[rows])
            keys[rows] = content_keys(counts)
            largest = max(largest, float(counts.data.max(initial=0)))
            n_empty += int((np.diff(counts.indptr) == 0).sum())
            totals += given.sum(0, dtype=np.float64).A1
            n_kept += float(counts.sum(dtype=np.float64))
        order, samples = _order(cells, keys)
        new = order_file.with_name(f"new_{order_file.name}")
        np.save(new, order)
        new.replace(order_file)
        return Scan(
            {name: list(cells.obs[name].cat.categories) for name in ("batch", "platform", "dataset")},
            samples,
            measured,
            int(largest),
            0 if cells.coordinates is None else cells.coordinates.shape[1],
            n_empty,
            float(totals.sum()),
            n_kept,
            float(totals[unknown].sum()),
            float(totals[second].sum()),
            list(cells.genes[unknown]),
            list(cells.genes[second]),
        )


def measured_genes(cells: Cells, columns: np.ndarray, n_genes: int) -> dict[str, np.ndarray]:
    """Vocabulary genes that each data set of a source measured, (n_genes,) each."""
    found = {}
    for name in cells.obs["dataset"].cat.categories:
        given = columns >= 0
        if cells.measured is not None:
            given &= cells.measured[name].to_numpy()
        found[name] = np.zeros(n_genes, dtype=bool)
        found[name][columns[given]] = True
    return found


def mapped_counts(
    given: sp.csr_matrix,
    rows: np.ndarray,
    cells: Cells,
    columns: np.ndarray,
    measured: Mapping[str, np.ndarray],
    n_genes: int,
) -> sp.csr_matrix:
    """Counts of rows of a source, (n, n_given), in the vocabulary, (n, n_genes), without genes that were not measured."""
    places = columns[given.indices]
    keep = places >= 0
    if cells.measured is not None:
        panels = np.stack([measured[name] for name in cells.obs["dataset"].cat.categories])
        panel = np.repeat(cells.obs["dataset"].cat.codes.to_numpy()[rows], np.diff(given.indptr))
        keep &= panels[panel, places]
    keep &= given.data > 0
    offsets = np.concatenate([[0], np.cumsum(keep)])[given.indptr]
    counts = sp.csr_matrix((given.data[keep], places[keep], offsets), shape=(given.shape[0], n_genes))
    counts.sort_indices()
    return counts


def _order(cells: Cells, keys: np.ndarray) -> tuple[np.ndarray, dict[str, int]]:
    """Rows in corpus order, (n_cells,), and cells of each sample."""
    codes = cells.obs["sample"].cat.codes.to_numpy()
    names = pd.util.hash_array(cells.obs.index.to_numpy().astype(object))
    parts = []
    for rows in rows_by_sample(codes, np.arange(cells.n_cells)):
        has_position = located(cells.coordinates, rows)
        placed, loose = rows[has_position], rows[~has_position]
        if cells.coordinates is not None and placed.size:
            placed = placed[np.lexsort((names[placed], *cells.coordinates[placed].T))]
            cut = tiles(cells.coordinates[placed], -(-placed.size // TILE))
            placed = placed[np.concatenate(cut)]
        parts += [placed, loose[np.lexsort((names[loose], keys[loose]))]]
    sizes = np.bincount(codes, minlength=len(cells.obs["sample"].cat.categories))
    return np.concatenate(parts), dict(zip(cells.obs["sample"].cat.categories, sizes.tolist(), strict=True))


def report_scan(source: Source, scan: Scan) -> None:
    """Say which counts are left out, and why; warn if they are most of them, or all of a cell."""
    total = max(scan.n_counts, 1e-12)
    left_out = {
        f"of genes that are not in the vocabulary ({some(scan.unknown)})": scan.n_counts_unknown,
        f"of {len(scan.second):,} further names of the same genes ({some(scan.second)})": scan.n_counts_second,
        "of genes that their data set did not measure": scan.n_counts
        - scan.n_counts_kept
        - scan.n_counts_unknown
        - scan.n_counts_second,
    }
    reasons = [f"{n / total:.1%} are {why}" for why, n in left_out.items() if n > 0]
    if reasons:
        kept = scan.n_counts_kept / total
        summary = f'{kept:.1%} of the counts of source "{source.name}" are used; {", ".join(reasons)}.'
        warn(f"Only {summary}") if kept < MIN_COUNTS_COVERED else logger.info(summary)
    if scan.n_empty:
        warn(f'Source "{source.name}" has {counted(scan.n_empty, "cell")} without counts of genes in the vocabulary.')


def merge_scans(
    sources: list[Source], scans: list[Scan], genes: Sequence[str], request: dict[str, Any]
) -> tuple[dict[str, Any], np.ndarray]:
    """The manifest, and the genes that each data set measured, (n_datasets, n_genes)."""
    dims = {source.name: scan.n_dims for source, scan in zip(sources, scans, strict=True) if scan.n_dims}
    if len(set(dims.values())) > 1:
        raise ValueError(f"Coordinates have a different number of columns in the sources ({dims}).")
    panels: dict[str, np.ndarray] = {}
    for source, scan in zip(sources, scans, strict=True):
        for name, measured in scan.measured.items():
            if not np.array_equal(panels.setdefault(name, measured), measured):
                raise ValueError(
                    f'The data set "{name}" of source "{source.name}" is also in another source, which measured other '
                    "genes: give them different names."
                )
        report_scan(source, scan)
    names = {
        level: _distinct_names(sources, [scan.categories[level] for scan in scans], level == "batch")
        for level in ("batch", "platform", "dataset")
    }
    samples = _distinct_names(sources, [list(scan.samples) for scan in scans], True)
    n_cells = [sum(scan.samples.values()) for scan in scans]
    largest = max(scan.largest for scan in scans)
    if largest >= 2**32:
        raise ValueError(f"The largest count is {largest:,.0f}; a corpus holds counts below 2^32.")
    manifest = {
        "format": FORMAT,
        "version": FORMAT_VERSION,
        "request": request,
        "n_cells": sum(n_cells),
        "n_cells_of_sources": n_cells,
        "genes": list(genes),
        "categories": {
            level: sorted({name for mapping in found for name in mapping.values()}) for level, found in names.items()
        },
        "renamed": names,
        "samples": {
            "name": [mapping[name] for scan, mapping in zip(scans, samples, strict=True) for name in scan.samples],
            "n_cells": [n for scan in scans for n in scan.samples.values()],
            "source": [source.name for source, scan in zip(sources, scans, strict=True) for _ in scan.samples],
        },
        "n_dims": next(iter(dims.values()), 0),
        "size_factor": any(source.size_factor_key is not None for source in sources),
        "dtype": "uint8" if largest < 2**8 else "uint16" if largest < 2**16 else "uint32",
    }
    order = manifest["categories"]["dataset"]  # type: ignore[index]
    return manifest, np.packbits(np.stack([panels[name] for name in order]), axis=1)


def _distinct_names(sources: list[Source], found: list[list[str]], own: bool) -> list[dict[str, str]]:
    """New name of each category of each source; with ``own``, a name that several use gets the source behind it."""
    uses = pd.Index([name for names in found for name in names]).value_counts()
    taken = set(uses.index)
    renamed: list[dict[str, str]] = []
    for source, names in zip(sources, found, strict=True):
        renamed.append({})
        for name in names:
            new = _free_name(f"{name}-{source.name}", taken) if own and uses[name] > 1 else name
            renamed[-1][name] = new
            taken.add(new)
    return renamed


def _free_name(name: str, taken: Collection[str]) -> str:
    """The name, or with the first number behind it that makes it one that is not taken."""
    return next(free for n in count(1) if (free := name if n == 1 else f"{name}-{n}") not in taken)
