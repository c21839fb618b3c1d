"""A corpus on disk: a handle for reading what it holds, and for checking it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any
from zlib import crc32

import anndata as ad
import numpy as np
import pandas as pd
import scipy.sparse as sp
import scvi

from cellplm_scvi import _constants as c

from ._categories import ABSENT, CovariateField
from ._checks import counted
from ._panels import MEASURED_GENES
from ._vocabulary import ORGANISM_KEY

MANIFEST, PANELS = "corpus.json", "panels.npy"
COUNTS_STORE, CELLS_FOLDER, DONE_FOLDER = "counts.zarr", "cells", "done"
FORMAT, FORMAT_VERSION = "cellplm-corpus", 1
#: batches x genes above which a model does not start from the fold changes of each batch
MAX_BATCH_TOTALS = 20_000_000
#: cells from which the median library size is taken
MAX_LIBRARIES = 1_000_000


def cell_dtype(n_dims: int) -> np.dtype:
    """What is known of a cell beside its counts: codes, -1 for an absent one, its totals, its place."""
    fields: list[Any] = [("source_row", "<i8"), ("sample", "<i4"), ("batch", "<i4"), ("dataset", "<i4")]
    # library: of all genes of its data set; total: of those in the vocabulary
    fields += [("platform", "<i2"), ("library", "<f4"), ("total", "<f4")]
    return np.dtype(fields + ([("position", "<f8", (n_dims,))] if n_dims else []))


def needs_annbatch() -> None:
    """Raise a message that says what to install, unless annbatch is there."""
    try:
        import annbatch  # noqa: F401
    except ImportError:
        raise ImportError('A corpus needs the package annbatch: pip install "cellplm-scvi[corpus]".') from None


def file_checksums(path: Path) -> dict[str, int]:
    """CRC-32 of a file, or of each file of a folder."""
    files = sorted(file for file in path.rglob("*") if file.is_file()) if path.is_dir() else [path]
    return {str(file.relative_to(path)) if path.is_dir() else "": _crc(file) for file in files}


def _check_files(path: Path, written: Mapping[str, int]) -> None:
    """Raise unless the checksums of a file, or of the files of a folder, are those of what was written."""
    found = file_checksums(path) if path.exists() else {}
    bad = [name for name in written.keys() | found.keys() if found.get(name) != written.get(name)]
    if bad:
        raise ValueError(f"{path} is damaged: {len(bad)} of its files differ from what was written.")


def read_json(file: Path) -> Any:
    """What a file holds that this package wrote; raise a ValueError that names it, if it is damaged."""
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:  # of JSON, and of bytes that are no text
        raise ValueError(f"{file} is damaged: it is not what was written ({error}).") from None


def _crc(file: Path) -> int:
    value = 0
    with file.open("rb") as stream:
        while part := stream.read(1 << 20):
            value = crc32(part, value)
    return value


@dataclass(frozen=True)
class StartingPoint:
    """What a model takes from counts before it is trained.

    Parameters
    ----------
    target_sum
        Median library size.
    gene_totals
        Counts of each gene, (n_genes,).
    batch_totals
        Counts of each gene in each batch, (n_batches, n_genes), or ``None`` where that is too large.
    library
        Share of the library that these genes hold.
    """

    target_sum: float
    gene_totals: np.ndarray
    batch_totals: np.ndarray | None
    library: float


class CorpusRegistry(dict):
    """Registry of a corpus, as scvi-tools has it of an AnnData; it also knows where the counts are."""

    corpus: Corpus


class Corpus:
    """A corpus that :func:`build_corpus` wrote.

    Parameters
    ----------
    path
        Its folder.

    Raises
    ------
    FileNotFoundError
        If there is no corpus.
    ValueError
        If it is not complete, or of a newer format.

    Examples
    --------
    >>> corpus = Corpus("corpus")
    >>> model = CellPLM(registry=corpus.registry)
    >>> model.train(datamodule=CorpusDataModule(corpus), max_epochs=2)
    """

    def __init__(self, path: str | Path):
        needs_annbatch()
        self.path = Path(path).expanduser()
        file = self.path / MANIFEST
        if not file.is_file():
            raise FileNotFoundError(f"{self.path} holds no corpus ({MANIFEST} is absent). build_corpus writes one.")
        manifest = read_json(file)
        if manifest.get("format") != FORMAT or manifest.get("version", 0) > FORMAT_VERSION:
            raise ValueError(
                f'{file} has format "{manifest.get("format")}" {manifest.get("version")}; this package reads "{FORMAT}" '
                f"{FORMAT_VERSION}."
            )
        self.n_cells: int = manifest["n_cells"]
        self.n_dims: int = manifest["n_dims"]
        self.has_size_factor: bool = manifest["size_factor"]
        self.genes = pd.Index(manifest["genes"])
        self.categories: dict[str, list[str]] = manifest["categories"]
        self.shard_size: int = manifest["request"]["shard_size"]
        self._panels_written: dict[str, int] | None = manifest.get("panels")  # absent from the oldest corpora
        self.sources: list[dict[str, Any]] = manifest["request"]["sources"]
        sizes = np.asarray(manifest["samples"]["n_cells"], dtype=np.int64)
        starts = np.cumsum(sizes) - sizes
        self.samples = pd.DataFrame(
            {"start": starts, "n_cells": sizes, "source": manifest["samples"]["source"]},
            index=pd.Index(manifest["samples"]["name"], name="sample"),
        )
        missing = [n for n in range(self.n_shards) if not (self.path / DONE_FOLDER / f"{n}.json").exists()]
        if missing:
            raise ValueError(
                f"{self.path} lacks {len(missing):,} of its {self.n_shards:,} shards: it was not built to the end. Call "
                "build_corpus again in the same way to go on."
            )

    @property
    def n_shards(self) -> int:
        return -(-self.n_cells // self.shard_size)

    @property
    def n_samples(self) -> int:
        return len(self.samples)

    @property
    def n_genes(self) -> int:
        return len(self.genes)

    @cached_property
    def panels(self) -> np.ndarray | None:
        """Genes that each data set measured, (n_datasets, n_genes), or ``None`` for all by all."""
        measured = np.unpackbits(np.load(self.path / PANELS), axis=1, count=self.n_genes).astype(bool)
        return None if measured.all() else measured

    @cached_property
    def _cell_files(self) -> list[np.ndarray]:
        # on disk: the operating system keeps what is used
        return [np.load(self.path / CELLS_FOLDER / f"{n}.npy", mmap_mode="r") for n in range(self.n_shards)]

    def cells(self, rows: np.ndarray) -> np.ndarray:
        """Record of each cell: codes of sample, batch, platform and data set, totals, position, row in its source."""
        shard, place = np.divmod(rows, self.shard_size)
        if rows.shape[0] and (shard == shard[0]).all():
            return np.asarray(self._cell_files[shard[0]][place])
        found = np.empty(rows.shape[0], dtype=cell_dtype(self.n_dims))
        for n in np.unique(shard):
            found[shard == n] = self._cell_files[n][place[shard == n]]
        return found

    def names(self, start: int, stop: int) -> np.ndarray:
        """Names of cells, in corpus order."""
        shards = range(start // self.shard_size, -(-stop // self.shard_size))
        first = start // self.shard_size * self.shard_size
        return np.concatenate([self._names(n) for n in shards])[start - first : stop - first]

    def _names(self, n: int) -> np.ndarray:
        obs = self._shard(n)["obs"]
        return np.asarray(_read(obs[obs.attrs["_index"]])).astype(object)

    def _shard(self, n: int) -> Any:
        import zarr

        return zarr.open_group(self.path / COUNTS_STORE / f"dataset_{n}", mode="r")

    def count_arrays(self) -> list[Any]:
        """Counts of each shard, on disk, (n_cells of it, n_genes)."""
        return [ad.io.sparse_dataset(self._shard(n)["X"]) for n in range(self.n_shards)]

    def to_anndata(self) -> ad.AnnData:
        """The whole corpus in memory.

        ``varm["measured_genes"]``, genes x data sets, is there if some measured only a part of the genes. Where sources without a
        platform meet others, their cells have the platform ``"(absent)"``.
        """
        shards = [_read(self._shard(n)) for n in range(self.n_shards)]
        for shard in shards:
            shard.uns.clear()
        adata = ad.concat(shards) if len(shards) > 1 else shards[0]
        # indices have the smallest type on disk; from their arrays, SciPy takes one that it computes with
        x: Any = adata.X
        adata.X = sp.csr_matrix((x.data.astype(np.float32), x.indices, x.indptr), shape=x.shape)
        for column in ("batch", "platform", "dataset", "sample"):
            values = pd.Series(adata.obs[column], dtype=object)
            if values.notna().any():  # some sources may have no platform
                values = values.fillna(ABSENT)
            adata.obs[column] = pd.Categorical(values)
        if self.panels is not None:
            adata.varm[MEASURED_GENES] = pd.DataFrame(
                self.panels.T, index=adata.var_names, columns=self.categories[c.DATASET_KEY]
            )
        return adata

    def starting_point(self) -> StartingPoint:
        """What a model takes from the counts before it is trained."""
        n_batches = len(self.categories[c.BATCH_KEY])
        by_batch = np.zeros((n_batches, self.n_genes)) if n_batches * self.n_genes <= MAX_BATCH_TOTALS else None
        totals = np.zeros(self.n_genes)
        for n in range(self.n_shards):
            uns = self._shard(n)["uns"]
            found = _read(uns["batch_totals"])
            totals += found.sum(0).A1
            if by_batch is not None:
                by_batch[_read(uns["batch"])] += found.toarray()
        step = max(1, self.n_cells // MAX_LIBRARIES)
        cells = np.concatenate([file[:: min(step, len(file))] for file in self._cell_files])
        library = cells["library" if self.has_size_factor else "total"]
        if not (cells["total"] > 0).any():
            raise ValueError("No cell of the corpus has any count.")
        return StartingPoint(
            float(np.median(library[cells["total"] > 0])),
            totals,
            by_batch,
            min(1.0, cells["total"].sum(dtype=np.float64) / library.sum(dtype=np.float64)),
        )

    @property
    def registry(self) -> dict[str, Any]:
        """What ``CellPLM(registry=...)`` takes: genes and categories, under the keys of :meth:`to_anndata`."""
        setup = {f"{name}_key": name for name in (c.BATCH_KEY, c.DATASET_KEY, c.SAMPLE_KEY)}
        categories: dict[str, Any] = {name: self.categories[name] for name in (c.BATCH_KEY, c.DATASET_KEY)}
        categories[c.SAMPLE_KEY] = list(self.samples.index)
        if self.categories[c.PLATFORM_KEY]:
            setup["platform_key"] = c.PLATFORM_KEY
            categories[c.PLATFORM_KEY] = self.categories[c.PLATFORM_KEY]
        fields: dict[str, Any] = {
            c.X_KEY: _field(
                {"attr_name": "X", "attr_key": None},
                {
                    "n_obs": self.n_cells,
                    "n_vars": self.n_genes,
                    "column_names": self.genes.to_numpy(dtype=object),
                    ORGANISM_KEY: "human",  # as the names of its sources were compared when it was built
                },
                {"n_vars": self.n_genes, "n_cells": self.n_cells},
            )
        }
        for name, names in categories.items():
            fields[name] = _field(
                {"attr_name": "obs", "attr_key": f"_scvi_{name}"},
                {
                    CovariateField.CATEGORICAL_MAPPING_KEY: np.asarray(names, dtype=object),
                    CovariateField.ORIGINAL_ATTR_KEY: name,
                    CovariateField.N_KNOWN_KEY: len(names),
                },
                {f"n_{name}": len(names)},
            )
        if self.n_dims:
            setup["spatial_key"] = "spatial"
            fields[c.COORDINATES_KEY] = _field(
                {"attr_name": "obsm", "attr_key": "spatial"}, {"n_dims": self.n_dims}, {"n_spatial_dims": self.n_dims}
            )
        if self.has_size_factor:
            setup["size_factor_key"] = "library_size"
            fields[c.SIZE_FACTOR_KEY] = _field({"attr_name": "obs", "attr_key": "library_size"}, {}, {})
        if self.panels is not None:
            setup["measured_genes_key"] = MEASURED_GENES
            fields[c.MEASURED_GENES_KEY] = _field({"attr_name": "varm", "attr_key": MEASURED_GENES}, {}, {})
        registry = CorpusRegistry(
            scvi_version=scvi.__version__,
            model_name="CellPLM",
            setup_method_name="setup_anndata",
            setup_args=setup,
            field_registries=fields,
        )
        registry.corpus = self
        return registry

    def verify(self) -> None:
        """Read every file, and raise a ValueError unless each is what :func:`build_corpus` wrote, no cell more or less."""
        if self._panels_written is not None:
            _check_files(self.path / PANELS, self._panels_written)
        if not (self.path / COUNTS_STORE / "zarr.json").is_file():
            raise ValueError(f"{self.path / COUNTS_STORE} is damaged: zarr.json is absent.")
        n_cells = 0
        for n in range(self.n_shards):
            done = read_json(self.path / DONE_FOLDER / f"{n}.json")
            _check_files(self.path / COUNTS_STORE / f"dataset_{n}", done["counts"])
            _check_files(self.path / CELLS_FOLDER / f"{n}.npy", done["cells"])
            self._check_names(n)
            n_cells += done["n_cells"]
        rows = np.concatenate([file["source_row"] for file in self._cell_files])
        sample = np.concatenate([file["sample"] for file in self._cell_files])
        source = pd.factorize(self.samples["source"])[0][sample]
        distinct = np.unique(np.stack([source, rows], 1), axis=0).shape[0]
        if not n_cells == self.n_cells == distinct:
            raise ValueError(
                f"{self.path} holds {distinct:,} different cells in {n_cells:,}; {self.n_cells:,} expected."
            )

    def _check_names(self, n: int) -> None:
        """Raise unless names of genes and categories are those that stand with the counts of a shard."""
        shard, cells = self._shard(n), self._cell_files[n]
        var, obs = shard["var"], _read(shard["obs"])
        names = {"genes": (_read(var[var.attrs["_index"]]), self.genes)}
        for level, known in {**self.categories, c.SAMPLE_KEY: list(self.samples.index)}.items():
            there = cells[level] >= 0
            names[level] = (obs[level][there], np.asarray(known, dtype=object)[cells[level][there]])
        for what, (found, expected) in names.items():
            if list(map(str, found)) != list(map(str, expected)):
                raise ValueError(f"{self.path / MANIFEST} is damaged: its {what} are not those of the counts.")

    @property
    def n_bytes(self) -> int:
        """Size on disk."""
        return sum(file.stat().st_size for file in self.path.rglob("*") if file.is_file())

    def info(self) -> dict[str, Any]:
        """Cells, samples, genes and so on in numbers."""
        sizes = self.samples["n_cells"]
        done = [read_json(self.path / DONE_FOLDER / f"{n}.json") for n in range(self.n_shards)]
        n_counts = sum(shard["n_counts"] for shard in done)
        return {
            "cells": self.n_cells,
            "genes": self.n_genes,
            "samples": self.n_samples,
            "cells_of_a_sample": {
                "smallest": int(sizes.min()),
                "median": int(sizes.median()),
                "largest": int(sizes.max()),
            },
            **{f"{name} categories": len(names) for name, names in self.categories.items()},
            "coordinates": self.n_dims,
            "gene panels": 0 if self.panels is None else len(np.unique(self.panels, axis=0)),
            "non-zero counts of a cell": round(n_counts / self.n_cells, 1),
            "shards": self.n_shards,
            "bytes": self.n_bytes,
            "bytes of a cell": round(self.n_bytes / self.n_cells, 1),
        }

    def __repr__(self) -> str:
        return (
            f"Corpus of {counted(self.n_cells, 'cell')} in {counted(self.n_samples, 'sample')}, "
            f"{counted(self.n_genes, 'gene')}, "
            f"{counted(self.n_shards, 'shard')} at {self.path}"
        )


def _read(element: Any) -> Any:
    return ad.io.read_elem(element)


def _field(data: Mapping[str, Any], state: Mapping[str, Any], statistics: Mapping[str, Any]) -> dict[str, Any]:
    return {"data_registry": dict(data), "state_registry": dict(state), "summary_stats": dict(statistics)}
