"""One data set of a corpus: what it is, and how it is read by rows, whatever it is stored in."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, fields, replace
from hashlib import blake2b
from pathlib import Path
from typing import Any

import anndata as ad
import h5py
import numpy as np
import pandas as pd
import scipy.sparse as sp
from mudata import MuData

from cellplm_scvi._compat import CSCDataset
from cellplm_scvi.genes._tables import Organism

from ._categories import as_text
from ._checks import CHUNK_ROWS, as_csr, check_column, check_coordinates, check_names, check_no_missing, some, warn
from ._fields import MeasuredGenesField, SizeFactorField

#: rows on disk that are this close are read together
MAX_GAP = 64


@dataclass(frozen=True)
class Source:
    """A data set of raw counts, and where in it things are.

    Parameters
    ----------
    data
        AnnData, or path of an ``.h5ad`` file or a ``.zarr`` folder, which are read by rows.
    name
        Name of the data set; by default that of the file, and of its folder where two files are named alike.
    layer, batch_key, platform_key, dataset_key, sample_key, spatial_key, size_factor_key, measured_genes_key
        As in :meth:`cellplm_scvi.CellPLM.setup_anndata`. Without ``batch_key`` the data set is one batch, without
        ``dataset_key`` one data set of this name, and without ``sample_key`` each batch is one sample.
    organism
        Whose genes ``var_names`` are: ``"human"``, or ``"mouse"`` to use their human orthologues.
    """

    data: ad.AnnData | str | Path
    name: str | None = None
    layer: str | None = None
    batch_key: str | None = None
    platform_key: str | None = None
    dataset_key: str | None = None
    sample_key: str | None = None
    spatial_key: str | None = None
    size_factor_key: str | None = None
    measured_genes_key: str | None = None
    organism: Organism = "human"


def named_sources(
    sources: Source | ad.AnnData | str | Path | Sequence[Any] | Mapping[str, Any], defaults: Mapping[str, Any]
) -> list[Source]:
    """Sources as the user gave them, each with a name of its own."""
    if isinstance(sources, Source | ad.AnnData | str | Path):
        sources = [sources]
    if not isinstance(sources, Iterable):  # a MuData would give its cells one by one, without an end
        raise _no_source("This", sources)
    pairs = list(sources.items()) if isinstance(sources, Mapping) else [(None, source) for source in sources]
    if not pairs:
        raise ValueError("There is no source. Pass paths of .h5ad files or .zarr folders, or AnnData.")
    named = []
    for n, (name, source) in enumerate(pairs):
        if not isinstance(source, Source):
            source = Source(source, **defaults)
        if not isinstance(source.data, ad.AnnData | str | Path):
            raise _no_source(f"Source {n}", source.data)
        if not isinstance(source.data, ad.AnnData) and not Path(source.data).exists():
            raise FileNotFoundError(f"{source.data} does not exist.")
        named.append(replace(source, name=str(name or source.name or "") or None))
    files = {
        n: Path(source.data).resolve() for n, source in enumerate(named) if not isinstance(source.data, ad.AnnData)
    }
    stems = _stems({n: file for n, file in files.items() if named[n].name is None})
    named = [replace(source, name=source.name or stems.get(n, str(n))) for n, source in enumerate(named)]
    names = pd.Index([source.name for source in named])
    if not names.is_unique:
        raise ValueError(
            f"Sources need different names; {some(names[names.duplicated()])} occurs more than once. Pass a mapping of names "
            "to sources."
        )
    return named


def _stems(files: Mapping[int, Path]) -> dict[int, str]:
    """Names of files, behind as many of their folders as it takes to tell them apart."""
    names = {n: file.stem for n, file in files.items()}
    for depth in range(1, max((len(file.parts) for file in files.values()), default=0) - 1):
        uses = Counter(names.values())
        for n, file in files.items():
            if uses[names[n]] > 1:
                names[n] = "_".join([*file.parent.parts[-depth:], file.stem])
    return names


def _no_source(what: str, data: object) -> TypeError:
    hint = ' Pass the modality that holds the counts, such as mdata["rna"].' if isinstance(data, MuData) else ""
    return TypeError(f"{what} is a {type(data).__name__}; an AnnData, a path or a Source is needed.{hint}")


@dataclass(frozen=True)
class Cells:
    """A source that is open.

    Parameters
    ----------
    counts
        Counts, (n_cells, n_given): a matrix, or one on disk that is read by rows.
    genes
        Their names, (n_given,).
    obs
        Batch, platform (missing where it is not known), data set and sample of each cell, all categorical.
    coordinates
        (n_cells, n_dims), NaN without position, or ``None``.
    size_factor
        True library size, (n_cells,), or ``None``.
    measured
        Genes measured by each of the data sets, (n_given, n_datasets), or ``None`` for all by all.
    """

    counts: Any
    genes: pd.Index
    obs: pd.DataFrame
    coordinates: np.ndarray | None
    size_factor: np.ndarray | None
    measured: pd.DataFrame | None

    @property
    def n_cells(self) -> int:
        return len(self.obs)

    def chunks(self, rows: np.ndarray) -> Iterator[tuple[np.ndarray, sp.csr_matrix]]:
        """Counts of ascending rows, a few thousand at a time, each with its rows."""
        for run in np.split(rows, np.flatnonzero(np.diff(rows) > MAX_GAP) + 1):
            for start in range(0, run.shape[0], CHUNK_ROWS):
                near = run[start : start + CHUNK_ROWS]
                # rows on disk that lie close together are read at once: one by one, it takes a thousand times as long
                part = as_csr(self.counts[near[0] : near[-1] + 1])[near - near[0]]
                if not part.has_canonical_format:
                    part = part.astype(np.float32)  # in which sums cannot overflow
                    part.sum_duplicates()
                yield near, part


@contextmanager
def opened(source: Source) -> Iterator[Cells]:
    """Open a source; counts stay where they are, everything else is read and checked."""
    with _anndata(source) as adata:
        try:
            yield _cells(source, adata)
        except (KeyError, TypeError, ValueError) as error:
            if str(error.args[0]).startswith('Source "'):
                raise
            raise type(error)(f'Source "{source.name}": {error.args[0]}') from error


def fingerprint(source: Source) -> dict[str, Any]:
    """What has to be the same for a stopped build to go on: the arguments, and the data."""
    known = {field.name: getattr(source, field.name) for field in fields(source) if field.name != "data"}
    if isinstance(source.data, ad.AnnData):
        return known | {"shape": list(source.data.shape), "digest": _content_digest(source)}
    path = Path(source.data)
    return known | {"path": str(path.resolve()), "digest": _files_digest(path)}


def _content_digest(source: Source) -> str:
    """Digest of all that is read of a source, however its counts are stored."""
    digest = blake2b(digest_size=16)
    with opened(source) as cells:
        names = [cells.genes, *(() if cells.measured is None else (cells.measured.columns,))]
        for values in names:
            digest.update(pd.util.hash_array(values.to_numpy(dtype=object)).tobytes())
        digest.update(pd.util.hash_pandas_object(cells.obs.astype(object)).to_numpy().tobytes())
        for values in (cells.coordinates, cells.size_factor, cells.measured):
            digest.update(b"" if values is None else np.ascontiguousarray(values).tobytes())
        for _, counts in cells.chunks(np.arange(cells.n_cells)):
            counts.eliminate_zeros()
            for part, kind in ((counts.indptr, np.int64), (counts.indices, np.int64), (counts.data, np.float64)):
                digest.update(part.astype(kind).tobytes())
    return digest.hexdigest()


def _files_digest(path: Path) -> str:
    """Digest of the size and the time of the last change of a file, or of every file of a folder."""
    digest = blake2b(digest_size=16)
    for file in sorted(file for file in path.rglob("*") if file.is_file()) if path.is_dir() else [path]:
        status = file.stat()
        digest.update(f"{file.relative_to(path)} {status.st_size} {status.st_mtime_ns}\n".encode())
    return digest.hexdigest()


def gene_names(source: Source) -> pd.Index:
    """Names of the genes of a source."""
    with _anndata(source) as adata:
        return adata.var_names


def check_keys(sources: Sequence[Source]) -> None:
    """Raise if no source has the coordinates, or the measured genes, that it was asked for; say which ones lack them."""
    for argument, place in (("spatial_key", "obsm"), ("measured_genes_key", "varm")):
        asked = [source for source in sources if getattr(source, argument) is not None]
        there = {source.name: _keys(source, place) for source in asked}
        lacking = [source for source in asked if getattr(source, argument) not in there[source.name]]
        if not lacking:
            continue
        names, key = some([str(source.name) for source in lacking]), getattr(lacking[0], argument)
        if len(lacking) == len(asked):
            held = some(list(dict.fromkeys(name for keys in there.values() for name in keys)), 12)
            raise KeyError(f'{argument}="{key}" is not in {place} of source {names}, which has {held or "nothing"}.')
        what = "its cells have no position" if place == "obsm" else "all genes that it holds count as measured"
        warn(f'There is no {place}["{key}"] in source {names}: {what}.')


def _keys(source: Source, place: str) -> list[str]:
    """Keys of ``obsm`` or ``varm``."""
    if isinstance(source.data, ad.AnnData):
        return list(getattr(source.data, place))
    with _group(source) as group:
        return list(group[place]) if place in group else []


@contextmanager
def _anndata(source: Source) -> Iterator[ad.AnnData]:
    """The source as an AnnData whose counts are on disk unless they were in memory."""
    if isinstance(source.data, ad.AnnData):
        yield source.data
        return
    with _group(source) as group:
        yield _backed(source, group)


@contextmanager
def _group(source: Source) -> Iterator[Any]:
    """The file or the folder of a source, open."""
    path = Path(source.data)  # type: ignore[arg-type]
    with ExitStack() as stack:
        try:
            if path.is_file():
                group: Any = stack.enter_context(h5py.File(path, "r"))
            else:
                import zarr

                group = zarr.open_group(path, mode="r")
        except (OSError, ValueError) as error:
            raise OSError(
                f'Source "{source.name}": {path} cannot be opened as an .h5ad file or a .zarr folder ({error}). Is it '
                "complete?"
            ) from error
        if "mod" in group:
            read, first = "read_h5mu" if path.is_file() else "read_zarr", next(iter(group["mod"]), "rna")
            raise ValueError(
                f'Source "{source.name}": {path} holds a MuData. Pass the modality that holds the counts, or write it to a '
                f'file of its own: mudata.{read}("{path}")["{first}"].write_h5ad("{first}.h5ad").'
            )
        for name in ("obs", "var"):
            if name not in group:
                raise KeyError(f'Source "{source.name}": {path} holds no AnnData: it has no {name}.')
        yield group


def _backed(source: Source, group: Any) -> ad.AnnData:
    where = "X" if source.layer is None else f"layers/{source.layer}"
    if where not in group:
        raise KeyError(f'Source "{source.name}": {source.data} has no {where}.')
    x = group[where]
    sparse = x.attrs.get("encoding-type") in ("csr_matrix", "csc_matrix")
    obsm: dict[str, Any] = {}
    if source.spatial_key is not None and f"obsm/{source.spatial_key}" in group:
        obsm[source.spatial_key] = np.asarray(ad.io.read_elem(group[f"obsm/{source.spatial_key}"]))
    varm: dict[str, Any] = {}
    if source.measured_genes_key is not None and f"varm/{source.measured_genes_key}" in group:
        varm[source.measured_genes_key] = ad.io.read_elem(group[f"varm/{source.measured_genes_key}"])
    counts = ad.io.sparse_dataset(x) if sparse else x
    obs: Any = ad.io.read_elem(group["obs"])
    var: Any = ad.io.read_elem(group["var"])
    layers = {} if source.layer is None else {source.layer: counts}
    return ad.AnnData(
        X=counts if source.layer is None else None,
        layers=layers,
        obs=obs,
        var=var,
        obsm=obsm,
        varm=varm,
    )


def _cells(source: Source, adata: ad.AnnData) -> Cells:
    check_names(adata)
    if source.layer is not None and source.layer not in adata.layers:
        raise KeyError(f'layer="{source.layer}" is not a layer of it.')
    counts: Any = adata.X if source.layer is None else adata.layers[source.layer]
    if counts is None:
        raise ValueError("X is None. Pass the layer that holds the counts with `layer=`.")
    if isinstance(counts, CSCDataset):
        counts = counts.to_memory()
    if sp.issparse(counts) and counts.format != "csr":
        counts = counts.tocsr()
    coordinates = None
    if source.spatial_key is not None and source.spatial_key in adata.obsm:
        coordinates = np.asarray(adata.obsm[source.spatial_key])
        check_coordinates(coordinates, source.spatial_key, adata.obs_names)
        coordinates = coordinates.astype(np.float64)
    size_factor = None
    if source.size_factor_key is not None:
        SizeFactorField("size_factor", source.size_factor_key).validate_field(adata)
        size_factor = np.asarray(adata.obs[source.size_factor_key], dtype=np.float32)
    measured = None
    if source.measured_genes_key is not None and source.measured_genes_key in adata.varm:
        if source.dataset_key is None:
            raise ValueError("measured_genes_key says which genes each data set measured: pass dataset_key too.")
        MeasuredGenesField("measured", source.measured_genes_key, source.dataset_key).validate_field(adata)
        measured = pd.DataFrame(adata.varm[source.measured_genes_key])
        measured = measured.set_axis(measured.columns.astype(str), axis=1)
    return Cells(counts, adata.var_names, _columns(source, adata), coordinates, size_factor, measured)


def _columns(source: Source, adata: ad.AnnData) -> pd.DataFrame:
    def column(name: str, default: Any) -> Any:
        key = getattr(source, f"{name}_key")
        if key is None:
            return default if isinstance(default, pd.Categorical) else pd.Categorical([default] * adata.n_obs)
        values = check_column(adata, key, f"{name}_key")
        check_no_missing(values, key)
        # categories without a cell get no code, which no cell could train
        values = values.astype("category")
        return pd.Categorical(
            np.array([as_text(name) for name in values.cat.categories], dtype=object)[values.cat.codes]
        )

    batch = column("batch", source.name)
    return pd.DataFrame(
        {
            "batch": batch,
            "platform": column("platform", pd.Categorical([None] * adata.n_obs)),
            "dataset": column("dataset", source.name),
            "sample": column("sample", batch),
        },
        index=adata.obs_names,
    )
