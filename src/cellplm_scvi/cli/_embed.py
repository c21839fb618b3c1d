"""Embeds a corpus, or a file of any size, from disk to disk; a killed run goes on where it was."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from inspect import signature
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from tqdm.auto import tqdm

from cellplm_scvi import _constants as c
from cellplm_scvi.data._categories import ABSENT
from cellplm_scvi.data._checks import check_sizes, some, warn
from cellplm_scvi.data._corpus import MANIFEST, Corpus
from cellplm_scvi.data._corpus_build import build_corpus
from cellplm_scvi.data._corpus_source import Source, named_sources, opened
from cellplm_scvi.data._streaming import CorpusDataModule
from cellplm_scvi.data._vocabulary import ORGANISM_KEY, match_genes
from cellplm_scvi.genes._tables import Organism
from cellplm_scvi.model import CellPLM
from cellplm_scvi.model._defaults import default_inference_batch_size
from cellplm_scvi.model._embedding import fixed_draws

from ._load import load_model
from ._resume import changes, model_checksum

#: in the folder of a run: how far it is, and the corpus of a file
NOTE, CORPUS = "progress.json", "corpus"
#: seconds between two notes of how far it is
NOTE_EVERY = 1.0
#: cells of a chunk of the result
CHUNK = 16_384


@torch.inference_mode()
def embed(
    model: str | Path | CellPLM,
    source: str | Path | Corpus,
    out: str | Path,
    *,
    layer: str | None = None,
    batch_key: str | None = None,
    sample_key: str | None = None,
    spatial_key: str | None = None,
    size_factor_key: str | None = None,
    organism: Organism | None = None,
    batch_size: int | None = None,
    accelerator: str = "auto",
    device: int | str = "auto",
    num_workers: int = 0,
    progress: bool = True,
) -> Path:
    """Embed every cell of a corpus or of a file, in the company of its sample.

    Memory does not grow with the number of cells. Call it again in the same way to go on after a kill; what another model
    began, or another corpus, is refused.

    Parameters
    ----------
    model
        Folder of a pre-trained model, or whatever CellPLM.from_pretrained takes.
    source
        Folder of a corpus; or an .h5ad file or .zarr folder, of which a temporary corpus is made first, beside the result.
    out
        Folder to write, in AnnData's zarr format: X is the embedding, (n_cells, n_latent), with the names of the cells in
        obs. Cells are in the order of the source. It is there once it is complete.
    layer
        Of the file: layer that holds the counts.
    batch_key
        Of the file: column of obs with the batch of each cell.
    sample_key
        Of the file: column of obs with the sample of each cell; by default each batch is one.
    spatial_key
        Of the file: key of obsm with coordinates.
    size_factor_key
        Of the file: column of obs with the library size over all genes.
    organism
        Of the file: whose genes it names, "human" or "mouse"; by default what the model was told.
    batch_size
        Cells that the encoder takes at once.
    accelerator
        Of Lightning.
    device
        Of Lightning.
    num_workers
        Processes that read ahead.
    progress
        Whether to show a bar.

    Returns
    -------
    Path of the result.
    """
    if batch_size is not None:
        check_sizes(batch_size=batch_size)
    out = Path(out).expanduser()
    if out.exists():
        raise FileExistsError(f"{out} exists. Choose another name, or remove it first.")
    keys: dict[str, Any] = {"layer": layer, "batch_key": batch_key, "sample_key": sample_key}
    keys |= {"spatial_key": spatial_key, "size_factor_key": size_factor_key, "organism": organism}
    given = _given(source, keys)
    network = model if isinstance(model, CellPLM) else load_model(model, accelerator=accelerator, device=device)
    by_source = isinstance(given, Source)
    genes = None
    if isinstance(given, Source):
        told = network.registry_["field_registries"][c.X_KEY]["state_registry"].get(ORGANISM_KEY, "human")
        given = replace(given, organism=organism or told)
        genes = _check_file(network, given)
    work = out.with_name(f"{out.name}.part")
    with _work_folder(work):
        corpus = given
        if isinstance(corpus, Source):
            corpus = build_corpus(corpus, work / CORPUS, genes=genes, progress=progress)
            # what no column says has the name of the file, which may be that of a batch of the model
            unnamed = [name for name in (c.BATCH_KEY, c.DATASET_KEY) if getattr(given, f"{name}_key") is None]
            corpus.categories |= dict.fromkeys(unnamed, [ABSENT])
        data = CorpusDataModule(corpus, validation=0.0, num_workers=num_workers)
        _embed_rows(network, data, work, batch_size, progress, by_source=by_source)
        _write_result(corpus, work, by_source=by_source)
        (work / "out").replace(out)
    shutil.rmtree(work)
    return out


def _given(source: str | Path | Corpus, keys: dict[str, Any]) -> Corpus | Source:
    """The corpus that is there, or else the file."""
    if isinstance(source, Corpus) or (Path(source) / MANIFEST).exists():
        defaults = {name: value.default for name, value in signature(embed).parameters.items()}
        if given := {name: value for name, value in keys.items() if value != defaults[name]}:
            raise ValueError(
                f"{', '.join(f'{name}={value!r}' for name, value in given.items())} is for files; the source is a corpus, "
                "which was built with its own. Leave it out."
            )
        return source if isinstance(source, Corpus) else Corpus(source)
    keys = {name: value for name, value in keys.items() if value is not None}
    return named_sources(Source(source, **keys), {})[0]


@contextmanager
def _work_folder(work: Path) -> Iterator[None]:
    """A folder that stays if something fails, unless there is nothing in it to go on with."""
    work.mkdir(parents=True, exist_ok=True)
    try:
        yield
    except BaseException:
        if not (work / NOTE).exists() and not (work / CORPUS / MANIFEST).exists():
            shutil.rmtree(work)
        raise


def _check_file(network: CellPLM, file: Source) -> list[str]:
    """Genes of the model; say what it misses in the file, or raise, before any of it is read."""
    fields = network.registry_["field_registries"]
    known = pd.Index(fields[c.X_KEY]["state_registry"]["column_names"])
    with opened(file) as cells:
        if c.SIZE_FACTOR_KEY in fields and cells.size_factor is None:
            raise ValueError(
                "the model was set up with library sizes. Pass size_factor_key, the column of obs with those of the file: "
                "counts over some genes cannot be scaled without them."
            )
        n_dims = None if cells.coordinates is None else cells.coordinates.shape[1]
        expected = fields[c.COORDINATES_KEY]["state_registry"]["n_dims"] if c.COORDINATES_KEY in fields else n_dims
        if n_dims is not None and n_dims != expected:
            raise ValueError(f'obsm["{file.spatial_key}"] has {n_dims} columns; the model was set up with {expected}.')
        unknown = cells.genes[match_genes(known, cells.genes, file.organism).columns < 0]
        if 0 < len(unknown) < len(cells.genes):
            warn(
                f"{len(unknown):,} of the {len(cells.genes):,} genes of {file.data} are unknown to the model "
                f"({some(unknown)}) and are not used."
            )
    setup = network.registry_["setup_args"]
    if file.sample_key is file.batch_key is None and (setup.get("sample_key") or setup.get("batch_key")):
        warn(f"Neither sample_key nor batch_key says which sample a cell is of: {file.data} is treated as one sample.")
    return list(known)


def _embed_rows(
    network: CellPLM, data: CorpusDataModule, work: Path, batch_size: int | None, progress: bool, *, by_source: bool
) -> None:
    """Fill ``embedding.npy``, (n_cells, n_latent); ``progress.json`` says how many minibatches are in it."""
    default = default_inference_batch_size(network.module.n_hidden, network.module.device.type)
    size = default if batch_size is None else batch_size
    loader = data.inference_dataloader(batch_size=size).serve(network)
    units = loader.units()
    note, file = work / NOTE, work / "embedding.npy"
    shape = (data.corpus.n_cells, network.module.latent.mean.out_features)
    run = {
        "model": model_checksum(network),
        "corpus": data.corpus_checksum,
        "of": "a file" if by_source else "a corpus",
        "n_units": len(units),
        "batch_size": size,
        "shape": list(shape),
    }
    done = 0
    if note.exists():
        begun = json.loads(note.read_text(encoding="utf-8"))
        if changed := changes(begun, run):
            raise ValueError(
                f"{work} holds an embedding that was begun in another way: {changed}. Choose another name, or remove that "
                "folder first."
            )
        done = begun["done"]
    if done == 0:
        np.lib.format.open_memmap(file, mode="w+", dtype=np.float32, shape=shape).flush()
    result = np.load(file, mmap_mode="r+")
    network.module.eval()
    finished = sum(unit.stop - unit.start for unit in units[:done] if unit.nth == 0)
    bar = tqdm(total=shape[0], initial=finished, unit="cells", unit_scale=True, disable=not progress, desc="embedding")
    noted = time.perf_counter()
    with bar, fixed_draws():
        for n, (rows, tensors) in enumerate(loader.numbered(units[done:]), start=done + 1):
            places = data.corpus.cells(rows)["source_row"] if by_source else rows
            z = network.module.embed(tensors).float()
            result[places] = network.module.aligned(z, tensors).cpu().numpy()
            bar.update(rows.shape[0])
            if time.perf_counter() - noted > NOTE_EVERY or n == len(units):
                result.flush()  # before the note: what is noted is on disk
                new = work / f"{NOTE}.new"
                new.write_text(json.dumps(run | {"done": n}), encoding="utf-8")
                new.replace(note)
                # a file that is mapped anew does not count as memory of this process
                result = np.load(file, mmap_mode="r+")
                noted = time.perf_counter()


def _write_result(corpus: Corpus, work: Path, *, by_source: bool) -> None:
    """The result as AnnData's zarr format, chunk by chunk."""
    import zarr

    shutil.rmtree(work / "out", ignore_errors=True)
    embedding = np.load(work / "embedding.npy", mmap_mode="r")
    n_cells, n_latent = embedding.shape
    root = zarr.open_group(work / "out", mode="w", attributes=_encoded("anndata", "0.1.0"))
    x = root.create_array(
        "X",
        shape=embedding.shape,
        chunks=(min(CHUNK, n_cells), n_latent),
        dtype=np.float32,
        attributes=_encoded("array", "0.2.0"),
    )
    frames = _frames(corpus, by_source)
    obs = root.create_group("obs", attributes=_frame_attributes(["sample"]))
    sample = obs.create_group("sample", attributes=_encoded("categorical", "0.2.0") | {"ordered": False})
    _strings(sample, "categories", np.asarray(corpus.samples.index))
    names = _strings(obs, "_index", None, n_cells)
    codes = sample.create_array(
        "codes", shape=(n_cells,), chunks=x.chunks[:1], dtype=np.int32, attributes=_encoded("array", "0.2.0")
    )
    for start in range(0, n_cells, CHUNK):
        stop = min(start + CHUNK, n_cells)
        x[start:stop] = embedding[start:stop]
    for start, frame in frames:
        names[start : start + len(frame)] = frame["name"].to_numpy(dtype=object)
        codes[start : start + len(frame)] = frame["sample"].to_numpy(dtype=np.int32)
    var = root.create_group("var", attributes=_frame_attributes([]))
    _strings(var, "_index", np.array([f"latent_{n}" for n in range(n_latent)]))


def _frames(corpus: Corpus, by_source: bool) -> Iterator[tuple[int, pd.DataFrame]]:
    """Name and sample code of cells in the order of the result, shard by shard; a file is read at once."""

    def frame(start: int, stop: int) -> pd.DataFrame:
        cells = corpus.cells(np.arange(start, stop))
        columns = {"name": corpus.names(start, stop), "sample": cells["sample"], "row": cells["source_row"]}
        return pd.DataFrame(columns)

    starts = range(0, corpus.n_cells, corpus.shard_size)
    parts = ((start, frame(start, min(start + corpus.shard_size, corpus.n_cells))) for start in starts)
    if not by_source:
        yield from parts
        return
    yield 0, pd.concat([part for _, part in parts]).sort_values("row")


def _encoded(kind: str, version: str) -> dict[str, Any]:
    return {"encoding-type": kind, "encoding-version": version}


def _frame_attributes(columns: list[str]) -> dict[str, Any]:
    return _encoded("dataframe", "0.2.0") | {"_index": "_index", "column-order": columns}


def _strings(group: Any, name: str, values: np.ndarray | None, n: int | None = None) -> Any:
    n = len(values) if values is not None else n
    array = group.create_array(
        name, shape=(n,), chunks=(min(CHUNK, n or 1),), dtype=str, attributes=_encoded("string-array", "0.2.0")
    )
    if values is not None:
        array[:] = values.astype(object)
    return array
