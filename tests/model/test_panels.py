"""Gene panels, true library sizes, and MuData."""

from __future__ import annotations

from typing import Any

import mudata
import numpy as np
import pandas as pd
import pytest
import scvi
import torch
from anndata import AnnData

from cellplm_scvi import CellPLM, CellPLMAnnotator
from cellplm_scvi.data._contexts import rows_by_sample
from cellplm_scvi.data._nearest import nearest_cells
from cellplm_scvi.data._table import CellTable

TINY: dict[str, Any] = {"n_hidden": 16, "n_layers": 1, "n_heads": 2, "n_latent": 4, "n_components": 3}


@pytest.fixture
def with_panels(tissues) -> AnnData:
    """Study "two" did not measure the last ten genes, and has zeros there."""
    table = pd.DataFrame({"one": True, "two": np.arange(tissues.n_vars) < 20}, index=tissues.var_names)
    tissues.varm["panel"] = table
    x = tissues.X.toarray()
    x[np.ix_((tissues.obs["study"] == "two").to_numpy(), np.arange(20, 30))] = 0
    tissues.X = x
    return tissues


PANEL = {"measured_genes_key": "panel"}


def test_expression_of_genes_that_were_not_measured_is_nan(with_panels, build, train):
    model = train(build(with_panels, PANEL))
    expression = model.get_normalized_expression()
    two = (with_panels.obs["study"] == "two").to_numpy()
    assert expression[two].iloc[:, 20:].isna().all(axis=None)
    assert expression[two].iloc[:, :20].notna().all(axis=None)
    assert expression[~two].notna().all(axis=None)
    np.testing.assert_allclose(expression.sum(1), 1.0, rtol=1e-4)
    assert np.isfinite(model.get_elbo())


def test_counts_outside_of_the_panel_change_nothing(with_panels, build, train):
    model = train(build(with_panels, PANEL))
    spoilt = model.adata.copy()
    x = spoilt.X.copy()
    x[np.ix_((spoilt.obs["study"] == "two").to_numpy(), np.arange(20, 30))] = 9
    spoilt.X = x
    np.testing.assert_allclose(model.get_latent_representation(spoilt), model.get_latent_representation(), atol=1e-6)
    np.testing.assert_allclose(model.get_elbo(spoilt, return_mean=False), model.get_elbo(return_mean=False), rtol=1e-5)
    scvi.settings.seed = 0
    trained = train(build(spoilt, PANEL))
    for ours, theirs in zip(trained.module.parameters(), model.module.parameters(), strict=True):
        np.testing.assert_allclose(ours.detach(), theirs.detach(), atol=1e-5)


def test_neighbours_that_measured_other_genes_have_no_sum(sections, build, train):
    lacking = np.arange(sections.n_obs) % 3 == 0  # in every sample
    names = np.where(lacking, "part", np.where(np.arange(sections.n_obs) % 2 == 0, "whole", "also whole"))
    sections.obs["of"] = pd.Categorical(names)
    table = {"part": np.arange(sections.n_vars) < 20, "whole": True, "also whole": True}
    sections.varm["panel"] = pd.DataFrame(table, index=sections.var_names)
    model = train(build(sections, {"dataset_key": "of", "measured_genes_key": "panel", "spatial_key": "spatial"}))
    assert np.isfinite(model.history["niche_loss_train"].to_numpy(dtype=float)).all()
    for parameter in model.module.niche.parameters():
        assert torch.isfinite(parameter).all()

    cells = CellTable.from_manager(model.adata_manager)
    niche = nearest_cells(cells, rows_by_sample(cells.sample, np.arange(cells.n_cells)), 4, 16).niche
    of, near = np.nonzero(niche >= 0)
    assert (lacking[of] == lacking[niche[of, near]]).all()
    assert {(names[i], names[j]) for i, j in zip(of, niche[of, near], strict=True)} >= {
        ("whole", "also whole"),
        ("part",) * 2,
    }


@pytest.mark.parametrize("mode", ["change", "vanilla"])
def test_genes_are_compared_between_cells_that_measured_them(with_panels, build, train, mode):
    """What no cell of a group measured is NaN; what some did not is compared between the others."""
    model = train(build(with_panels, PANEL), max_epochs=20, plan_kwargs={"lr": 1e-2})
    adata = model.adata
    table = adata.varm["panel"]
    study = adata.obs["study"].to_numpy()
    lacking = table.index[~table["two"]]
    rows = np.flatnonzero(study == "two")
    one = (adata.obs["cell_type"] == "type0").to_numpy()
    within = model.differential_expression(idx1=rows[one[rows]], idx2=rows[~one[rows]], mode=mode, silent=True)
    numbers = within.select_dtypes("number").columns
    assert within.loc[lacking, numbers].isna().all(axis=None)
    assert within.drop(lacking)[numbers].notna().all(axis=None)
    assert set(within.index) == set(adata.var_names)
    if mode == "change":
        assert not within.loc[lacking, "is_de_fdr_0.05"].any()
        others = model.differential_expression(idx1=one & (study == "one"), idx2=~one, mode=mode, silent=True)
        assert others[numbers].notna().all(axis=None)
        # as between the cells of the study that measured these genes, for there are no others
        there = model.differential_expression(
            idx1=one & (study == "one"), idx2=~one & (study == "one"), mode=mode, silent=True
        )
        difference = (others["lfc_mean"] - there["lfc_mean"])[lacking].abs()
        assert (difference < 0.5 * there.loc[lacking, "lfc_std"] + 0.1).all()


def test_panels_of_new_data(with_panels, build, train):
    model = train(build(with_panels, PANEL))
    without = model.adata.copy()
    del without.varm["panel"]
    assert model.get_normalized_expression(without).notna().all(axis=None)
    assert np.isfinite(model.get_elbo(without))
    third = model.adata.copy()
    third.obs["study"] = "three"
    with pytest.raises(ValueError, match='no column for the data set "three"'):
        model.get_latent_representation(third)


def test_panels_survive_saving(with_panels, build, train, clone):
    model = train(build(with_panels, PANEL))
    again = clone(model)
    pd.testing.assert_frame_equal(again.get_normalized_expression(), model.get_normalized_expression())


def test_the_true_library_size_reaches_the_model(tissues, build, train):
    total = np.asarray(tissues.X.sum(1)).ravel()
    tissues.obs["total"] = total * 4
    model = train(build(tissues, {"size_factor_key": "total"}), max_epochs=10, plan_kwargs={"lr": 5e-3})
    np.testing.assert_allclose(model.get_latent_library_size(), total * 4)
    # the modelled genes are a quarter of the library, and the others are not squeezed into them
    share = model.get_normalized_expression().sum(1)
    assert (share < 0.6).all()
    counts = model.get_normalized_expression(library_size="latent").sum(1)
    assert np.corrcoef(counts, total)[0, 1] > 0.9
    assert np.median(counts / total) == pytest.approx(1.0, rel=0.3)


def test_a_library_size_that_new_data_lack(tissues, build, train):
    tissues.obs["total"] = np.asarray(tissues.X.sum(1)).ravel() * 4
    model = train(build(tissues, {"size_factor_key": "total"}))
    other = model.adata.copy()
    del other.obs["total"]
    with pytest.raises(KeyError, match='size_factor_key="total" is not a column'):
        model.get_latent_representation(other)


@pytest.fixture
def multimodal(make_tissues) -> mudata.MuData:
    """RNA with positions and batches in its own obs, protein beside it, samples in the shared obs."""
    rna = make_tissues(spatial=True)
    protein = AnnData(np.ones((rna.n_obs, 3), np.float32), obs=rna.obs[[]].copy())
    protein.var_names = ["p0", "p1", "p2"]
    shared = rna.obs["sample"].copy()
    del rna.obs["sample"]
    data = mudata.MuData({"rna": rna, "adt": protein})
    data.obs["sample"] = shared
    data.obs["cell_type"] = rna.obs["cell_type"]
    return data


MODALITIES = {"rna_layer": "rna", "batch_key": "rna", "spatial_key": "rna"}
KEYS = {"batch_key": "batch", "sample_key": "sample", "spatial_key": "spatial"}


@pytest.fixture
def multimodal_model(multimodal, train) -> CellPLM:
    CellPLM.setup_mudata(multimodal, **KEYS, modalities=MODALITIES)
    return train(CellPLM(multimodal, **TINY))


def test_mudata_give_the_numbers_of_their_rna(multimodal_model, train):
    mdata = multimodal_model.adata
    adata = mdata["rna"].copy()
    adata.obs["sample"] = mdata.obs["sample"]
    CellPLM.setup_anndata(adata, **KEYS)
    from_rna = CellPLM(adata, **TINY)
    from_rna.module.load_state_dict(multimodal_model.module.state_dict())
    from_rna.is_trained_ = True
    np.testing.assert_allclose(
        from_rna.get_latent_representation(), multimodal_model.get_latent_representation(), atol=1e-6
    )


@pytest.mark.parametrize("loaded", [False, True])
def test_mudata_and_anndata_mixed(multimodal_model, tissues, build, train, tmp_path, loaded):
    """Each is read by its own set-up, the modality of the counts by the names of the MuData's columns, in any order."""
    mdata = multimodal_model.adata
    rna = mdata["rna"].copy()
    rna.obs["sample"] = mdata.obs["sample"]
    expected = multimodal_model.get_latent_representation()
    plain = train(build(tissues))
    if loaded:
        multimodal_model.save(str(tmp_path / "m"))
        plain.save(str(tmp_path / "a"))
        multimodal_model = CellPLM.load(str(tmp_path / "m"), adata=False, accelerator="cpu")
        plain = CellPLM.load(str(tmp_path / "a"), adata=False, accelerator="cpu")
    np.testing.assert_array_equal(multimodal_model.get_latent_representation(rna), expected)
    np.testing.assert_array_equal(multimodal_model.get_latent_representation(mdata), expected)
    np.testing.assert_array_equal(plain.get_latent_representation(mdata), plain.get_latent_representation(rna.copy()))
    new = mudata.MuData({"rna": rna.copy()})
    with pytest.raises(
        TypeError, match=r'set up with an AnnData; this is a MuData.*mdata\["rna"\], or call setup_mudata'
    ):
        plain.get_latent_representation(new)
    with pytest.raises(TypeError, match="adata is of type DataFrame"):
        plain.get_latent_representation(rna.obs)


def test_mudata_results(multimodal_model):
    mdata = multimodal_model.adata
    expression = multimodal_model.get_normalized_expression()
    assert list(expression.columns) == list(mdata["rna"].var_names)
    assert list(expression.index) == list(mdata.obs_names)
    assert multimodal_model.get_mixture_probabilities().shape == (mdata.n_obs, 3)
    assert np.isfinite(multimodal_model.get_elbo())
    assert multimodal_model.posterior_predictive_sample().shape == (mdata.n_obs, 30)


def test_mudata_differential_expression(multimodal_model):
    found = multimodal_model.differential_expression(groupby="cell_type", group1="type0", mode="change", silent=True)
    assert set(found.index) == set(multimodal_model.adata["rna"].var_names)


def test_modalities_in_an_order_of_their_own(multimodal, train):
    """Results are those of the same cells in one order, and named by the MuData's."""
    multimodal["rna"].obs["study"] = multimodal["rna"].obs["study"].astype(str)
    order = np.random.default_rng(0).permutation(multimodal.n_obs)
    protein = multimodal["adt"][order].copy()
    shuffled = mudata.MuData({"adt": protein, "rna": multimodal["rna"].copy()})
    for column in ("sample", "cell_type"):
        shuffled.obs[column] = multimodal.obs[column].loc[shuffled.obs_names].to_numpy()
    assert list(shuffled.obs_names) != list(shuffled["rna"].obs_names)
    shuffled["rna"].varm["panel"] = multimodal["rna"].varm["panel"] = pd.DataFrame(
        {"one": True, "two": np.arange(30) < 20}, index=multimodal["rna"].var_names
    )
    keys = KEYS | {"dataset_key": "study", "measured_genes_key": "panel", "perturbation_key": "cell_type"}
    models = []
    for data in (multimodal, shuffled):
        CellPLM.setup_mudata(data, **keys, control_category="type0", modalities=MODALITIES | {"dataset_key": "rna"})
        models.append(CellPLM(data, **TINY))
    one, other = models
    train(one)
    other.module.load_state_dict(one.module.state_dict())
    other.is_trained_ = True
    for model in models:
        adata = model.adata
        model.adata.obsm["z"] = model.get_latent_representation()
        expression = model.get_normalized_expression(library_size="latent")
        assert list(expression.index) == list(adata.obs_names)
    names = multimodal.obs_names
    z = [pd.DataFrame(data.obsm["z"], index=data.obs_names).loc[names] for data in (multimodal, shuffled)]
    np.testing.assert_allclose(z[0], z[1], atol=1e-5)
    pd.testing.assert_frame_equal(
        one.get_normalized_expression().loc[names], other.get_normalized_expression().loc[names], rtol=1e-3, atol=1e-6
    )
    np.testing.assert_array_equal(one._is_control(one.adata), (one.adata.obs["cell_type"] == "type0").to_numpy())
    np.testing.assert_array_equal(other._is_control(other.adata), (other.adata.obs["cell_type"] == "type0").to_numpy())


def test_mudata_save_and_load(multimodal_model, tmp_path):
    multimodal_model.save(str(tmp_path / "model"), save_anndata=True)
    again = CellPLM.load(str(tmp_path / "model"), accelerator="cpu")
    np.testing.assert_allclose(
        again.get_latent_representation(), multimodal_model.get_latent_representation(), atol=1e-6
    )


def test_mudata_panels(multimodal, train):
    rna = multimodal["rna"]
    rna.varm["panel"] = pd.DataFrame({"one": True, "two": np.arange(rna.n_vars) < 20}, index=rna.var_names)
    modalities = MODALITIES | {"dataset_key": "rna", "measured_genes_key": "rna"}
    CellPLM.setup_mudata(multimodal, **KEYS, dataset_key="study", measured_genes_key="panel", modalities=modalities)
    model = train(CellPLM(multimodal, **TINY))
    two = (rna.obs["study"] == "two").to_numpy()
    assert model.get_normalized_expression()[two].iloc[:, 20:].isna().all(axis=None)


def test_mudata_panels_beside_the_counts_are_not_overlooked(multimodal, train):
    """The table belongs to the modality of the counts, whatever ``modalities`` says of it or leaves out."""
    rna = multimodal["rna"]
    rna.varm["panel"] = pd.DataFrame({"one": True, "two": np.arange(rna.n_vars) < 20}, index=rna.var_names)
    multimodal.obs["study"] = rna.obs["study"].to_numpy()
    CellPLM.setup_mudata(multimodal, **KEYS, dataset_key="study", measured_genes_key="panel", modalities=MODALITIES)
    model = train(CellPLM(multimodal, **TINY))
    two = (multimodal.obs["study"] == "two").to_numpy()
    assert model.get_normalized_expression()[two].iloc[:, 20:].isna().all(axis=None)


def test_mudata_annotator_of_labels_in_a_modality(multimodal, train, tmp_path):
    """They are where the set-up says that labels are."""
    modalities = MODALITIES | {"labels_key": "rna"}
    CellPLM.setup_mudata(multimodal, **KEYS, labels_key="cell_type", modalities=modalities)
    del multimodal.obs["cell_type"]
    annotator = CellPLMAnnotator.from_cellplm(train(CellPLM(multimodal, **TINY)), "cell_type")
    annotator.train()
    expected = annotator.predict(soft=True)
    assert list(expected.columns) == list(multimodal["rna"].obs["cell_type"].cat.categories)
    annotator.save(str(tmp_path / "annotator"))
    again = CellPLMAnnotator.load(str(tmp_path / "annotator"), multimodal, accelerator="cpu")
    pd.testing.assert_frame_equal(again.predict(soft=True), expected)
    rna = multimodal["rna"].copy()
    rna.obs["sample"] = multimodal.obs["sample"]
    assert list(CellPLMAnnotator.from_cellplm(annotator, "cell_type", adata=rna).classes) == list(expected.columns)


def test_mudata_annotator(multimodal_model, tmp_path):
    """Labels in the common obs; saved, loaded, fine-tuned."""
    data = multimodal_model.adata
    types = data["rna"].obs["cell_type"].reindex(data.obs_names).astype(object)
    data.obs["type"] = types.where(np.arange(data.n_obs) % 3 > 0)
    annotator = CellPLMAnnotator.from_cellplm(multimodal_model, "type")
    annotator.train()
    soft = annotator.predict(soft=True)
    assert list(soft.index) == list(data.obs_names)
    annotator.save(tmp_path / "annotator")
    loaded = CellPLMAnnotator.load(tmp_path / "annotator", data)
    np.testing.assert_array_equal(loaded.predict(), soft.columns[soft.to_numpy().argmax(1)])
    loaded.train(fine_tune=True, max_epochs=1, accelerator="cpu", enable_progress_bar=False)
    assert set(loaded.predict()) <= set(types.dropna())


def test_labels_beside_the_counts_of_a_mudata(multimodal):
    """They need not be named when the MuData is set up."""
    del multimodal.obs["cell_type"]
    CellPLM.setup_mudata(multimodal, **KEYS, modalities=MODALITIES)
    model = CellPLM(multimodal, **TINY)
    model.train(2, accelerator="cpu", enable_progress_bar=False)
    annotator = CellPLMAnnotator.from_cellplm(model, "cell_type")
    annotator.train()
    assert (annotator.predict() == multimodal["rna"].obs["cell_type"].to_numpy()).mean() > 0.8
