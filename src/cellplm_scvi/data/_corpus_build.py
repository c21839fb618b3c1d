"""Writes a corpus: data sets of any size as one store of whole samples, shard by shard."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import anndata as ad
import numpy as np
import pandas as pd
import scipy.sparse as sp
from tqdm.auto import tqdm

from cellplm_scvi.genes import map_genes
from cellplm_scvi.genes._tables import Organism

from ._checks import CHUNK_ROWS, some
from ._corpus import (
    CELLS_FOLDER,
    COUNTS_STORE,
    DONE_FOLDER,
    MANIFEST,
    PANELS,
    Corpus,
    cell_dtype,
    file_checksums,
    needs_annbatch,
)
from ._corpus_scan import mapped_counts, measured_genes, merge_scans, scan_source
from ._corpus_source import Cells, Source, check_keys, fingerprint, gene_names, named_sources, opened
from ._vocabulary import match_genes

#: where what is not complete lies
WORK = ".building"


def build_corpus(
    sources: Source | ad.AnnData | str | Path | Sequence[Any] | Mapping[str, Any],
    path: str | Path,
    *,
    genes: Sequence[str] | None = None,
    shard_size: int = 16_384,
    n_obs_per_chunk: int = 256,
    progress: bool = True,
    **keys: Any,
) -> Corpus:
    """Write data sets of raw counts as a corpus on disk, to pre-train on more cells than fit into memory.

    Genes of all data sets are mapped to one vocabulary, and the cells of a sample become neighbours on disk: those with
    coordinates tile by tile, the others in an order that their counts decide, as good as a random one. Memory holds one
    shard, and 24 bytes for each cell of one data set. A build that was stopped, at any moment, goes on when it is called
    again in the same way.

    Parameters
    ----------
    sources
        Paths of ``.h5ad`` files or ``.zarr`` folders, AnnData, or :class:`Source` for those with keys of their own; a
        mapping names them.
    path
        Folder to write. Its ``counts.zarr`` is a collection that annbatch reads.
    genes
        Vocabulary; by default the union of all genes, named by Ensembl id where there is one.
    shard_size
        Cells of a shard.
    n_obs_per_chunk
        Cells of a compressed chunk: it costs about as much to find one as to unpack it, so as many as a context has.
    progress
        Whether to show a bar.
    **keys
        Of :class:`Source`, for the sources that are not one: ``batch_key="donor"``, ``organism="mouse"`` and so on.

    Returns
    -------
    The corpus, open for reading.

    Raises
    ------
    ValueError
        If a source holds no counts, its genes are not in the vocabulary, or ``path`` holds another corpus.

    Examples
    --------
    >>> corpus = build_corpus(["a.h5ad", "b.h5ad"], "corpus", batch_key="donor", sample_key="section")
    """
    needs_annbatch()
    path = Path(path).expanduser()
    named = named_sources(sources, keys)
    if shard_size < 1 or n_obs_per_chunk < 1:
        raise ValueError(f"shard_size={shard_size} and n_obs_per_chunk={n_obs_per_chunk} must be positive.")
    request = {
        "sources": [fingerprint(source) for source in named],
        "genes": None if genes is None else list(genes),
        "shard_size": shard_size,
        "n_obs_per_chunk": n_obs_per_chunk,
    }
    manifest = _planned(path, named, request)
    _write_shards(path, named, manifest, progress)
    _finish(path)
    return Corpus(path)


def union_vocabulary(sources: Sequence[Source]) -> list[str]:
    """All genes of the sources in order of appearance, by Ensembl id where there is one, else by their name."""
    genes: dict[str, None] = {}
    for source in sources:
        names = gene_names(source)
        mapped = map_genes(names, organism=source.organism).mapped
        genes |= dict.fromkeys(
            target if isinstance(target, str) else name for name, target in zip(names, mapped, strict=True)
        )
    return list(genes)


def _planned(path: Path, sources: list[Source], request: dict[str, Any]) -> dict[str, Any]:
    """The manifest: what is in the corpus and where; made at the first call, read at the next ones."""
    file = path / MANIFEST
    if file.exists():
        manifest = json.loads(file.read_text(encoding="utf-8"))
        if manifest["request"] != request:
            differ = [key for key in request if manifest["request"].get(key) != request[key]]
            raise ValueError(
                f"{path} holds a corpus that was built in another way ({some(differ)} differ). Choose another folder, "
                "or remove this one first."
            )
        _order_again(path, sources, manifest)
        return manifest
    if path.exists() and any(entry.name not in (WORK, PANELS, f"{MANIFEST}.new") for entry in path.iterdir()):
        raise ValueError(f"{path} is not empty, and is no corpus. Choose another folder.")
    check_keys(sources)
    work = path / WORK
    with _cleared_up(path):
        work.mkdir(parents=True)
        genes = union_vocabulary(sources) if request["genes"] is None else request["genes"]
        if len(set(genes)) < len(genes) or not genes:
            raise ValueError("The vocabulary is empty, or names a gene more than once.")
        scans = [scan_source(source, pd.Index(genes), work / f"order_{n}.npy") for n, source in enumerate(sources)]
        manifest, panels = merge_scans(sources, scans, genes, request)
    np.save(path / PANELS, panels)
    manifest["panels"] = file_checksums(path / PANELS)
    _write_json(file, manifest)  # last: from here on, the plan stands
    return manifest


@contextmanager
def _cleared_up(path: Path) -> Iterator[None]:
    """Begin without what an earlier call left there, and leave nothing if something fails."""
    existed = path.exists()
    shutil.rmtree(path / WORK, ignore_errors=True)
    try:
        yield
    except BaseException:
        shutil.rmtree(path / WORK, ignore_errors=True)
        if not existed and path.exists():
            path.rmdir()
        raise


def _order_again(path: Path, sources: list[Source], manifest: dict[str, Any]) -> None:
    """For a shard that was lost after the build: the orders of cells were cleared up."""
    n_shards = -(-manifest["n_cells"] // manifest["request"]["shard_size"])
    if all((path / DONE_FOLDER / f"{n}.json").exists() for n in range(n_shards)):
        return
    (path / WORK).mkdir(exist_ok=True)
    for n, source in enumerate(sources):
        file = path / WORK / f"order_{n}.npy"
        if not file.exists():
            scan_source(source, pd.Index(manifest["genes"]), file)


def _write_shards(path: Path, sources: list[Source], manifest: dict[str, Any], progress: bool) -> None:
    import zarr

    for folder in (CELLS_FOLDER, DONE_FOLDER, COUNTS_STORE, WORK):
        (path / folder).mkdir(exist_ok=True)
    zarr.open_group(path / COUNTS_STORE, mode="a")
    size, n_cells = manifest["request"]["shard_size"], manifest["n_cells"]
    bar = tqdm(total=n_cells, unit="cells", unit_scale=True, disable=not progress, desc="corpus")
    with bar, _Writer(path, sources, manifest) as writer:
        for n, start in enumerate(range(0, n_cells, size)):
            stop = min(start + size, n_cells)
            if not (path / DONE_FOLDER / f"{n}.json").exists():
                _write_shard(path, n, *writer.read(start, stop), manifest)
            bar.update(stop - start)


class _Writer:
    """Reads cells in corpus order from the sources, which it opens one at a time."""

    def __init__(self, path: Path, sources: list[Source], manifest: dict[str, Any]):
        self.path, self.sources, self.manifest = path, sources, manifest
        self.genes = pd.Index(manifest["genes"])
        self.starts = np.concatenate([[0], np.cumsum(manifest["n_cells_of_sources"])])
        self.sample_starts = np.concatenate([[0], np.cumsum(manifest["samples"]["n_cells"])])
        self._open: tuple[int, Any, Cells] | None = None

    def __enter__(self) -> _Writer:
        return self

    def __exit__(self, *error: object) -> None:
        if self._open is not None:
            self._open[1].__exit__(None, None, None)

    def _cells(self, n: int) -> Cells:
        if self._open is None or self._open[0] != n:
            self.__exit__()
            context = opened(self.sources[n])
            self._open = (n, context, context.__enter__())
        return self._open[2]

    def read(self, start: int, stop: int) -> tuple[sp.csr_matrix, np.ndarray, pd.Index]:
        """Counts, record and name of the cells from ``start`` to ``stop``."""
        parts = list(self._parts(start, stop))
        return (
            sp.vstack([counts for counts, _, _ in parts], format="csr"),
            np.concatenate([cells for _, cells, _ in parts]),
            pd.Index(np.concatenate([names for _, _, names in parts])),
        )

    def _parts(self, start: int, stop: int) -> Iterator[tuple[sp.csr_matrix, np.ndarray, np.ndarray]]:
        for n, source in enumerate(self.sources):
            low, high = max(start, self.starts[n]), min(stop, self.starts[n + 1])
            if low >= high:
                continue
            cells = self._cells(n)
            order = np.load(self.path / WORK / f"order_{n}.npy", mmap_mode="r")
            rows = np.array(order[low - self.starts[n] : high - self.starts[n]])
            counts, library = self._counts(cells, rows, source.organism)
            record = np.zeros(rows.shape[0], dtype=cell_dtype(self.manifest["n_dims"]))
            record["source_row"] = rows
            record["sample"] = np.searchsorted(self.sample_starts, np.arange(low, high), side="right") - 1
            for level in ("batch", "platform", "dataset"):
                names = self.manifest["renamed"][level][n]
                # an absent platform has the code -1, here and for the decoder
                places = pd.Index(self.manifest["categories"][level]).get_indexer(
                    [names[name] for name in cells.obs[level].cat.categories]
                )
                record[level] = np.append(places, -1)[cells.obs[level].cat.codes.to_numpy()[rows]]
            record["total"] = counts.sum(1, dtype=np.float32).A1
            record["library"] = library if cells.size_factor is None else cells.size_factor[rows]
            if self.manifest["n_dims"]:
                record["position"] = np.nan if cells.coordinates is None else cells.coordinates[rows]
            yield counts, record, cells.obs.index.to_numpy()[rows]

    def _counts(self, cells: Cells, rows: np.ndarray, organism: Organism) -> tuple[sp.csr_matrix, np.ndarray]:
        """Counts of rows of a source in the vocabulary, as narrow as they are stored, and the totals over all genes."""
        columns = match_genes(self.genes, cells.genes, organism).columns
        measured = measured_genes(cells, columns, len(self.genes))
        ascending = np.argsort(rows)
        parts, totals = [], []
        for near, given in cells.chunks(rows[ascending]):
            counts = mapped_counts(given, near, cells, columns, measured, len(self.genes))
            parts.append(counts.astype(self.manifest["dtype"]))
            totals.append(given.sum(1, dtype=np.float32).A1)
        places = np.argsort(ascending)
        return sp.vstack(parts, format="csr")[places], np.concatenate(totals)[places]


def _write_shard(
    path: Path, n: int, counts: sp.csr_matrix, cells: np.ndarray, names: pd.Index, manifest: dict[str, Any]
) -> None:
    """Write a shard under another name and move it into place; the last move makes it count."""
    import zarr
    from annbatch import write_sharded

    work = path / WORK / str(n)
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    adata = ad.AnnData(
        counts,
        obs=_obs(cells, names, manifest),
        var=pd.DataFrame(index=pd.Index(manifest["genes"])),
        uns=_batch_totals(counts, cells["batch"]),
    )
    if manifest["n_dims"]:
        adata.obsm["spatial"] = cells["position"]
    write_sharded(
        zarr.open_group(work / "counts", mode="w"),
        adata,
        n_obs_per_chunk=manifest["request"]["n_obs_per_chunk"],
        shard_size=counts.shape[0],
    )
    np.save(work / "cells.npy", cells)
    done = {
        "n_cells": counts.shape[0],
        "n_counts": int(counts.nnz),
        "counts": file_checksums(work / "counts"),
        "cells": file_checksums(work / "cells.npy"),
    }
    _write_json(work / "done.json", done)
    places = {
        "counts": path / COUNTS_STORE / f"dataset_{n}",
        "cells.npy": path / CELLS_FOLDER / f"{n}.npy",
        "done.json": path / DONE_FOLDER / f"{n}.json",
    }
    shutil.rmtree(places["counts"], ignore_errors=True)
    for name, place in places.items():
        (work / name).replace(place)
    shutil.rmtree(work)


def _obs(cells: np.ndarray, index: pd.Index, manifest: dict[str, Any]) -> pd.DataFrame:
    known = manifest["categories"] | {"sample": manifest["samples"]["name"]}
    columns: dict[str, Any] = {}
    for level in ("batch", "platform", "dataset", "sample"):
        used, codes = np.unique(cells[level], return_inverse=True)
        absent = int((used < 0).any())  # it sorts first
        names = pd.Index([known[level][code] for code in used[absent:]], dtype=str)
        columns[level] = pd.Categorical.from_codes(codes - absent, names)
    return pd.DataFrame(columns | {"library_size": cells["library"]}, index=index.astype(str))


def _batch_totals(counts: sp.csr_matrix, batch: np.ndarray) -> dict[str, Any]:
    """Counts of each gene in each batch of a shard, from which a model starts."""
    used, place = np.unique(batch, return_inverse=True)
    totals = sp.csr_matrix((used.shape[0], counts.shape[1]), dtype=np.float64)
    for start in range(0, batch.shape[0], CHUNK_ROWS):
        part = place[start : start + CHUNK_ROWS]
        member = sp.csr_matrix(
            (np.ones(part.shape[0]), (part, np.arange(part.shape[0]))), (used.shape[0], part.shape[0])
        )
        totals += member @ counts[start : start + CHUNK_ROWS]
    return {"batch": used, "batch_totals": totals}


def _finish(path: Path) -> None:
    """Declare the collection complete, so that annbatch opens it, and clear up."""
    import zarr

    zarr.open_group(path / COUNTS_STORE, mode="a").attrs.update(
        {"encoding-type": "annbatch-preshuffled", "encoding-version": "0.1.0"}
    )
    shutil.rmtree(path / WORK, ignore_errors=True)


def _write_json(file: Path, content: dict[str, Any]) -> None:
    """Write a file that is there whole or not at all, also after a power cut."""
    new = file.with_name(file.name + ".new")
    with new.open("w", encoding="utf-8") as stream:
        json.dump(content, stream)
        stream.flush()
        os.fsync(stream.fileno())
    new.replace(file)
