"""A corpus on disk holds every cell once, whatever it is built from and however often the build is killed."""

from __future__ import annotations

import json
import warnings
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from anndata import AnnData
from mudata import MuData

from cellplm_scvi import CellPLM
from cellplm_scvi.data import Corpus, CorpusDataModule, Source, build_corpus

pytest.importorskip("annbatch")

KEYS = {"batch_key": "batch", "platform_key": "platform", "sample_key": "sample"}


def dense(adata: AnnData, cells: pd.Index, genes: pd.Index | list[str]) -> np.ndarray:
    return adata[cells].to_df()[list(genes)].to_numpy()


@pytest.mark.parametrize("kind", ["memory", "h5ad", "zarr", "layer", "csc", "dense"])
def test_what_was_written_is_what_is_read(tmp_path, sections, kind):
    source, keys = sections, dict(KEYS, spatial_key="spatial", dataset_key="study")
    if kind == "layer":
        source = sections.copy()
        source.layers["counts"], source.X = sections.X.copy(), None
        keys["layer"] = "counts"
    elif kind in ("csc", "dense"):
        source = sections.copy()
        source.X = sections.X.tocsc() if kind == "csc" else sections.X.toarray()
    if kind in ("h5ad", "csc", "layer"):
        source.write_h5ad(tmp_path / "a.h5ad")
        source = tmp_path / "a.h5ad"
    elif kind in ("zarr", "dense"):
        source.write_zarr(tmp_path / "a.zarr")
        source = tmp_path / "a.zarr"
    corpus = build_corpus(source, tmp_path / "corpus", shard_size=40, progress=False, **keys)
    corpus.verify()
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        found = corpus.to_anndata()
    assert corpus.n_shards == 3
    assert sorted(found.obs_names) == sorted(sections.obs_names)
    assert list(found.var_names) == list(sections.var_names)
    back = found[sections.obs_names]
    np.testing.assert_array_equal(back.X.toarray(), sections.X.toarray())
    np.testing.assert_array_equal(back.obsm["spatial"], sections.obsm["spatial"])
    for ours, theirs in {"batch": "batch", "platform": "platform", "dataset": "study", "sample": "sample"}.items():
        assert list(back.obs[ours].astype(str)) == list(sections.obs[theirs].astype(str))
    # cells of a sample are neighbours
    assert (np.diff(found.obs["sample"].cat.codes.to_numpy()) != 0).sum() == corpus.n_samples - 1
    cells = corpus.cells(np.arange(corpus.n_cells))
    assert list(sections.obs_names[cells["source_row"]]) == list(found.obs_names) == list(corpus.names(0, 90))


def test_a_small_corpus_in_memory(tmp_path, tissues):
    """Its places of counts are stored in the smallest type, which SciPy does not compute with."""
    corpus = build_corpus(tissues, tmp_path / "corpus", progress=False, **KEYS)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        found = corpus.to_anndata()
    assert found.X.indices.dtype.kind == "i"
    np.testing.assert_array_equal(found[tissues.obs_names].X.toarray(), tissues.X.toarray())


def test_annbatch_reads_it(tmp_path, tissues):
    from annbatch import DatasetCollection, Loader

    build_corpus(tissues, tmp_path / "corpus", shard_size=40, progress=False, **KEYS)
    loader = Loader(batch_size=32, chunk_size=8, preload_nchunks=4, preload_to_gpu=False)
    loader.use_collection(DatasetCollection(tmp_path / "corpus" / "counts.zarr", mode="r"))
    batches = list(loader)
    assert sum(batch["X"].sum() for batch in batches) == tissues.X.sum()
    assert set(batches[0]["obs"]) >= {"batch", "sample"}


def test_genes_are_matched_by_meaning(tmp_path, make_tissues):
    symbols, ids = make_tissues(n_genes=4), make_tissues(n_genes=4, seed=1)
    symbols.var_names = ["CD3E", "TP53", "made-up", "CD8A"]
    ids.var_names = ["ENSG00000141510.18", "ENSG00000198851", "other", "ENSG00000010610"]
    corpus = build_corpus({"a": symbols, "b": ids}, tmp_path / "c", progress=False, sample_key="sample")
    assert list(corpus.genes) == [
        "ENSG00000198851", "ENSG00000141510", "made-up", "ENSG00000153563", "other", "ENSG00000010610",
    ]  # fmt: skip
    found = corpus.to_anndata()
    rows = found.obs["dataset"] == "b"
    tp53 = pd.Series(ids.X[:, 0].toarray().ravel(), ids.obs_names)
    np.testing.assert_array_equal(found[rows].to_df()["ENSG00000141510"], tp53[found.obs_names[rows]].to_numpy())
    np.testing.assert_array_equal(corpus.panels, [[1, 1, 1, 1, 0, 0], [1, 1, 0, 0, 1, 1]])
    # names that both use are of different samples
    assert corpus.n_samples == 8
    assert set(corpus.samples["source"]) == {"a", "b"}


def test_a_mouse_data_set_takes_no_counts_from_a_human_one(tmp_path, make_tissues):
    human, mouse = make_tissues(n_genes=3), make_tissues(n_genes=3, seed=1)
    human.var_names = ["CCL3", "TP53", "CD3E"]
    mouse.var_names = ["Ccl3", "Trp53", "made-up"]  # the orthologue of Ccl3 is not certain
    sources = {"human": human, "mouse": Source(mouse, organism="mouse")}
    corpus = build_corpus(sources, tmp_path / "c", progress=False, sample_key="sample")
    assert list(corpus.genes) == ["ENSG00000277632", "ENSG00000141510", "ENSG00000198851", "Ccl3", "made-up"]
    found = corpus.to_anndata()
    for name, given, columns in (("human", human, [0, 1, 2]), ("mouse", mouse, [3, 1, 4])):
        cells = found[found.obs["dataset"] == name]
        np.testing.assert_array_equal(cells.X[:, columns].toarray(), given[cells.obs_names].X.toarray())


def test_names_that_sources_share_are_told_apart_also_from_those_that_look_so(tmp_path, make_tissues):
    sources = {"0": make_tissues(20), "1": make_tissues(20, seed=1), "1-2": make_tissues(20, seed=2)}
    names = {"0": ["donor", "donor-1"], "1": ["donor", "donor-1"], "1-2": ["donor", "donor-1-1"]}
    for key, adata in sources.items():
        adata.obs["donor"] = names[key] * 10
        adata.obs_names = [f"{key}_{name}" for name in adata.obs_names]
    given = pd.concat([adata.obs["donor"] for adata in sources.values()])
    corpus = build_corpus(sources, tmp_path / "c", progress=False, batch_key="donor", sample_key="donor")
    assert corpus.n_samples == len(corpus.categories["batch"]) == 6
    found = corpus.to_anndata().obs
    of = found["dataset"].astype(str) + given[found.index]
    for level in ("batch", "sample"):
        pairs = pd.DataFrame({"of": of, "name": found[level].astype(str)}).drop_duplicates()
        assert pairs["of"].is_unique
        assert pairs["name"].is_unique
    assert {"donor-0", "donor-1-1"} < set(corpus.samples.index)


def test_what_is_left_out_is_said(tmp_path, make_tissues, caplog):
    adata = make_tissues(n_genes=4)
    adata.var_names = ["SEPT2", "SEPTIN2", "TP53", "made-up"]
    adata.X = np.tile([2.0, 1.0, 1.0, 1.0], (90, 1))
    with caplog.at_level("INFO", logger="scvi.cellplm_scvi"):
        corpus = build_corpus(adata, tmp_path / "c", progress=False)
    assert corpus.to_anndata().X.sum() == 90 * 3
    said = '60.0% of the counts of source "0" are used; 40.0% are of 1 further names of the same genes ("SEPT2").'
    assert said in caplog.text
    with pytest.warns(
        UserWarning, match="Only 40.0% .* used; 20.0% are of genes that are not .* 40.0% are of 1 further"
    ):
        build_corpus(adata, tmp_path / "d", genes=["SEPTIN2", "TP53"], progress=False)
    everything = make_tissues()
    caplog.clear()
    with caplog.at_level("INFO", logger="scvi.cellplm_scvi"):
        build_corpus(everything, tmp_path / "e", progress=False)
    assert "are used" not in caplog.text


def test_a_given_vocabulary_leaves_genes_out_and_keeps_the_library(tmp_path, tissues):
    genes = ["gene3", "gene1", "absent"]
    with pytest.warns(UserWarning, match="of the counts of source"):
        corpus = build_corpus(tissues, tmp_path / "c", genes=genes, progress=False, sample_key="sample")
    found = corpus.to_anndata()
    assert list(found.var_names) == genes
    np.testing.assert_array_equal(found.X[:, 0].toarray(), tissues[found.obs_names, "gene3"].X.toarray())
    np.testing.assert_allclose(found.obs["library_size"], tissues[found.obs_names].X.sum(1).A1)
    np.testing.assert_array_equal(corpus.panels, [[True, True, False]])


def test_measured_genes_become_panels(tmp_path, tissues):
    table = pd.DataFrame(True, index=tissues.var_names, columns=["one", "two"])
    table.loc["gene5", "two"] = False
    tissues.varm["panel"] = table
    corpus = build_corpus(
        tissues, tmp_path / "c", progress=False, dataset_key="study", measured_genes_key="panel", sample_key="sample"
    )
    assert not corpus.panels[1, 5]
    assert corpus.panels.sum() == 59
    found = corpus.to_anndata()
    assert found[found.obs["dataset"] == "two", "gene5"].X.sum() == 0


def test_what_a_model_starts_from_is_in_the_shards(tmp_path, tissues):
    corpus = build_corpus(tissues, tmp_path / "c", shard_size=40, progress=False, **KEYS)
    start = corpus.starting_point()
    assert start.target_sum == np.median(tissues.X.sum(1).A1)
    np.testing.assert_array_equal(start.gene_totals, tissues.X.sum(0).A1)
    batch = (tissues.obs["batch"] == "batch1").to_numpy()
    np.testing.assert_array_equal(start.batch_totals[1], tissues.X[batch].sum(0).A1)


def test_a_killed_build_goes_on(tmp_path, sections, killed_at_random):
    keys = dict(KEYS, spatial_key="spatial", shard_size=10, progress=False)
    whole = build_corpus(sections, tmp_path / "whole", **keys)
    n_killed = killed_at_random(lambda: build_corpus(sections, tmp_path / "killed", **keys), n_kills=4, longest=0.8)
    assert n_killed
    killed = Corpus(tmp_path / "killed")
    killed.verify()
    for n in range(whole.n_shards):
        names = [f"done/{n}.json", f"cells/{n}.npy"]
        for name in names:
            assert (whole.path / name).read_bytes() == (killed.path / name).read_bytes()
    assert {entry.name for entry in killed.path.iterdir()} == {entry.name for entry in whole.path.iterdir()}


def test_a_corpus_that_is_not_complete_is_refused(tmp_path, tissues):
    corpus = build_corpus(tissues, tmp_path / "c", shard_size=40, progress=False, **KEYS)
    (corpus.path / "done" / "1.json").unlink()
    with pytest.raises(ValueError, match=r"lacks 1 of its 3 shards.*build_corpus again"):
        Corpus(corpus.path)
    with pytest.raises(ValueError, match="built in another way .*sources"):
        build_corpus(tissues, tmp_path / "c", shard_size=40, progress=False)
    build_corpus(tissues, tmp_path / "c", shard_size=40, progress=False, **KEYS).verify()
    with pytest.raises(FileNotFoundError, match="holds no corpus"):
        Corpus(tmp_path)


@pytest.mark.parametrize("what", ["counts", "genes", "cells", "batch", "coordinates"])
def test_another_anndata_of_the_same_shape_is_refused(tmp_path, sections, what):
    keys = dict(KEYS, spatial_key="spatial", progress=False)
    build_corpus(sections, tmp_path / "c", **keys)
    same = sections.copy()
    same.X = sections.X.tocsc()
    same.obs["cell_type"] = "not read"
    build_corpus(same, tmp_path / "c", **keys)
    other = sections.copy()
    if what == "counts":
        other.X = other.X[::-1].copy()
    elif what == "genes":
        other.var_names = other.var_names[::-1]
    elif what == "cells":
        other.obs_names = other.obs_names[::-1]
    elif what == "batch":
        other.obs["batch"] = other.obs["batch"].cat.rename_categories({"batch0": "another"})
    else:
        other.obsm["spatial"] = other.obsm["spatial"] + 1
    with pytest.raises(ValueError, match="built in another way .*sources"):
        build_corpus(other, tmp_path / "c", **keys)


def test_a_zarr_store_that_was_changed_is_refused(tmp_path, tissues):
    import zarr

    tissues.write_zarr(tmp_path / "a.zarr")
    build_corpus(tmp_path / "a.zarr", tmp_path / "c", progress=False)
    build_corpus(tmp_path / "a.zarr", tmp_path / "c", progress=False)
    values = zarr.open_group(tmp_path / "a.zarr", mode="r+")["X/data"]
    values[:] = values[:] * 5
    with pytest.raises(ValueError, match="built in another way .*sources"):
        build_corpus(tmp_path / "a.zarr", tmp_path / "c", progress=False)


def test_damage_is_found(tmp_path, tissues):
    corpus = build_corpus(tissues, tmp_path / "c", progress=False, **KEYS)
    file = next((corpus.path / "counts.zarr" / "dataset_0" / "X" / "data" / "c").rglob("*"))
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    with pytest.raises(ValueError, match="is damaged: 1 of its files"):
        corpus.verify()


def test_damaged_panels_are_found(tmp_path, tissues):
    corpus = build_corpus(tissues, tmp_path / "c", genes=["gene1", "gene2", "absent"], progress=False)
    corpus.verify()
    np.save(corpus.path / "panels.npy", ~np.load(corpus.path / "panels.npy"))
    with pytest.raises(ValueError, match=r"panels.npy is damaged"):
        Corpus(corpus.path).verify()
    # a corpus from before there was a checksum of it
    file = corpus.path / "corpus.json"
    manifest = json.loads(file.read_text())
    del manifest["panels"]
    file.write_text(json.dumps(manifest))
    Corpus(corpus.path).verify()


@pytest.mark.parametrize("what", ["genes", "batch", "group", "text", "shard"])
def test_damage_of_what_stands_beside_the_counts_is_found(tmp_path, tissues, what):
    corpus = build_corpus(tissues, tmp_path / "c", progress=False, **KEYS)
    file = corpus.path / "corpus.json"
    manifest = json.loads(file.read_text())
    swapped = manifest["genes"] if what == "genes" else manifest["categories"]["batch"]
    swapped[0], swapped[1] = swapped[1], swapped[0]
    if what in ("genes", "batch"):
        file.write_text(json.dumps(manifest))
    elif what == "group":
        (corpus.path / "counts.zarr" / "zarr.json").unlink()
    else:
        broken = file if what == "text" else corpus.path / "done" / "0.json"
        broken.write_bytes(b"\xff" + broken.read_bytes())
    with pytest.raises(ValueError, match=r"(corpus\.json|counts\.zarr|0\.json) is damaged"):
        Corpus(corpus.path).verify()


def test_counts_that_would_not_fit_are_refused(tmp_path, tissues):
    tissues = tissues.copy()
    tissues.X = tissues.X.astype(np.float64)
    tissues.X[0, 0] = 2.0**32 + 5
    with pytest.raises(ValueError, match=r"largest count is 4,294,967,301; .* below 2\^32"):
        build_corpus(tissues, tmp_path / "c", progress=False, **KEYS)


def test_a_cell_that_is_there_twice_is_found(tmp_path, tissues):
    corpus = build_corpus(tissues, tmp_path / "c", progress=False, **KEYS)
    file = corpus.path / "cells" / "0.npy"
    cells = np.load(file)
    cells["source_row"][1] = cells["source_row"][0]
    np.save(file, cells)
    done = json.loads((corpus.path / "done" / "0.json").read_text())
    from cellplm_scvi.data._corpus import file_checksums

    (corpus.path / "done" / "0.json").write_text(json.dumps(done | {"cells": file_checksums(file)}))
    with pytest.raises(ValueError, match="89 different cells in 90"):
        Corpus(corpus.path).verify()


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        pytest.param({"batch_key": "nowhere"}, KeyError, 'Source "0": batch_key="nowhere" is not a column', id="key"),
        pytest.param(
            {"spatial_key": "spatail"}, KeyError, 'spatial_key="spatail" is not in obsm .* has "spatial"', id="spatial"
        ),
        pytest.param(
            {"dataset_key": "study", "measured_genes_key": "panel"},
            KeyError,
            'genes_key="panel" is not in varm',
            id="panel",
        ),
        pytest.param({"genes": ["x"]}, ValueError, 'Source "0": none of its 30 genes', id="genes"),
        pytest.param({"genes": ["gene1", "gene1"]}, ValueError, "more than once", id="vocabulary"),
        pytest.param({"layer": "raw"}, KeyError, 'layer="raw" is not a layer', id="layer"),
        pytest.param({"nonsense": 1}, TypeError, "nonsense", id="argument"),
        pytest.param({"shard_size": 0}, ValueError, "shard_size=0", id="shard"),
    ],
)
def test_messages_say_what_is_wrong(tmp_path, sections, change, error, message):
    with pytest.raises(error, match=message):
        build_corpus(sections, tmp_path / "c", progress=False, **change)


@pytest.mark.parametrize("kind", ["memory", "h5ad", "zarr"])
def test_some_sources_may_lack_coordinates_but_not_all(tmp_path, sections, tissues, kind):
    sources = {"section": sections, "cells": tissues}
    if kind != "memory":
        for name, adata in sources.items():
            getattr(adata, f"write_{kind}")(tmp_path / f"{name}.{kind}")
        sources = {name: tmp_path / f"{name}.{kind}" for name in sources}
    with pytest.warns(UserWarning, match=r'no obsm\["spatial"\] in source "cells": its cells have no position'):
        corpus = build_corpus(sources, tmp_path / "c", progress=False, spatial_key="spatial")
    unplaced = np.isnan(corpus.to_anndata().obsm["spatial"]).all(1)
    assert unplaced.sum() == tissues.n_obs + np.isnan(sections.obsm["spatial"]).all(1).sum()
    with pytest.raises(KeyError, match='is not in obsm of source "cells", which has nothing'):
        build_corpus({"cells": sources["cells"]}, tmp_path / "d", progress=False, spatial_key="spatial")
    assert not (tmp_path / "d").exists()


def test_libraries_below_the_counts_are_found_in_the_build(tmp_path, tissues):
    tissues.obs["total"] = tissues.X.sum(1).A1
    tissues.obs.loc["cell7", "total"] -= 1
    with pytest.raises(ValueError, match=r'Source "x": The library size .* of 1 cell .* \(cells "cell7"\)'):
        build_corpus({"x": tissues}, tmp_path / "c", progress=False, size_factor_key="total")


def test_fractions_are_no_counts(tmp_path, tissues):
    tissues.X = tissues.X * 0.5
    with pytest.raises(ValueError, match='Source "x": X does not hold counts'):
        build_corpus([Source(tissues, name="x")], tmp_path / "c", progress=False)


def test_sources_have_names_of_their_own(tmp_path, tissues):
    with pytest.raises(ValueError, match='"a" occurs more than once'):
        build_corpus([Source(tissues, "a"), Source(tissues, "a")], tmp_path / "c")
    with pytest.raises(FileNotFoundError, match="does not exist"):
        build_corpus(tmp_path / "none.h5ad", tmp_path / "c")
    with pytest.raises(ValueError, match="no source"):
        build_corpus([], tmp_path / "c")


def test_files_of_the_same_name_are_told_apart_by_their_folders(tmp_path, tissues):
    files = [tmp_path / place / "cells.h5ad" for place in ("a/outs", "b/outs", "b/more", ".")]
    for file in files:
        file.parent.mkdir(parents=True, exist_ok=True)
        tissues.write_h5ad(file)
    other = tmp_path / "other.h5ad"
    tissues.write_h5ad(other)
    corpus = build_corpus([*files, other], tmp_path / "c", progress=False)
    assert list(corpus.samples["source"]) == [
        "a_outs_cells", "b_outs_cells", "more_cells", f"{tmp_path.name}_cells", "other",
    ]  # fmt: skip
    with pytest.raises(ValueError, match="occurs more than once. Pass a mapping"):
        build_corpus([other, other], tmp_path / "d", progress=False)


def test_a_mudata_is_refused_at_once(tmp_path, tissues):
    mdata = MuData({"rna": tissues})
    for sources in (mdata, [mdata], {"a": mdata}, Source(mdata)):
        with pytest.raises(TypeError, match=r'is a MuData; .* such as mdata\["rna"\]'):
            build_corpus(sources, tmp_path / "c", progress=False)
    mdata.write_h5mu(tmp_path / "m.h5mu")
    mdata.write_zarr(tmp_path / "m.zarr")
    for name in ("m.h5mu", "m.zarr"):
        with pytest.raises(ValueError, match=rf'Source "m": .*{name} holds a MuData.*\["rna"\]'):
            build_corpus(tmp_path / name, tmp_path / name[2:], progress=False, spatial_key="spatial")


def test_what_cannot_be_read_is_named(tmp_path, tissues):
    tissues.write_h5ad(tmp_path / "whole.h5ad")
    content = (tmp_path / "whole.h5ad").read_bytes()
    (tmp_path / "half.h5ad").write_bytes(content[: len(content) // 2])
    (tmp_path / "text.h5ad").write_text("no HDF5")
    (tmp_path / "folder.zarr").mkdir()
    for name in ("half.h5ad", "text.h5ad", "folder.zarr"):
        with pytest.raises(OSError, match=rf'Source "{Path(name).stem}": .*{name} cannot be opened'):
            build_corpus([tmp_path / "whole.h5ad", tmp_path / name], tmp_path / f"c_{name}", progress=False)


def test_some_sources_may_lack_a_platform(tmp_path, make_tissues):
    with_platform, without = make_tissues(), make_tissues(40, seed=1)
    without.obs_names = "other " + without.obs_names
    sources = [
        Source(with_platform, name="a", batch_key="batch", sample_key="sample", platform_key="platform"),
        Source(without, name="b", batch_key="batch", sample_key="sample"),
    ]
    corpus = build_corpus(sources, tmp_path / "c", progress=False)
    model = CellPLM(registry=corpus.registry, n_hidden=16, n_layers=1, n_latent=4)
    model.train(datamodule=CorpusDataModule(corpus), max_epochs=1, accelerator="cpu", enable_progress_bar=False)
    adata = corpus.to_anndata()
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        embedded = model.get_latent_representation(adata)
    data = CorpusDataModule(corpus)
    np.testing.assert_allclose(
        embedded, model.get_latent_representation(dataloader=data.inference_dataloader()), atol=1e-5
    )
    assert set(adata.obs["platform"]) == {"drop", "plate", "(absent)"}


def test_categories_that_are_numbers_are_those_of_the_corpus(tmp_path, tissues):
    """Which are text there."""
    tissues.obs["batch"] = tissues.obs["batch"].cat.codes.to_numpy()
    corpus = build_corpus(tissues, tmp_path / "c", progress=False, **KEYS)
    model = CellPLM(registry=corpus.registry, n_hidden=16, n_layers=1, n_latent=4)
    model.train(datamodule=CorpusDataModule(corpus), max_epochs=1, accelerator="cpu", enable_progress_bar=False)
    expected = model.get_normalized_expression(corpus.to_anndata()).loc[tissues.obs_names]
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        np.testing.assert_allclose(model.get_normalized_expression(tissues), expected, rtol=1e-4)
    with pytest.raises(ValueError, match="nothing new to train"):
        CellPLM.load_query_data(tissues.copy(), model, accelerator="cpu", dataset_key=None)
    assert set(tissues.obs["batch"]) == {0, 1}
