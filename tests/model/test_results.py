"""Public results: aligned with the names of cells and genes, repeatable, and what they claim to be."""

from __future__ import annotations

import anndata
import numpy as np
import pandas as pd
import pytest
import scvi
import torch
from scvi.model._utils import scrna_raw_counts_properties

from cellplm_scvi import CellPLM

ROWS = [17, 3, 3, 60, 41]


@pytest.fixture(params=["dissociated", "spatial"])
def model(request, models) -> CellPLM:
    return models[request.param]


def shuffled(model: CellPLM):
    """The model's data with the rows in another order, and that order."""
    order = np.random.default_rng(1).permutation(model.adata.n_obs)
    return model.adata[order].copy(), order


def test_normalised_expression_is_named_and_aligned(model):
    whole = model.get_normalized_expression()
    assert list(whole.index) == list(model.adata.obs_names)
    assert list(whole.columns) == list(model.adata.var_names)
    np.testing.assert_allclose(whole.sum(1), 1.0, rtol=1e-4)
    assert (whole.to_numpy() > 0).all()
    some = model.get_normalized_expression(indices=ROWS, batch_size=2)
    assert list(some.index) == list(model.adata.obs_names[ROWS])
    np.testing.assert_allclose(some, whole.iloc[ROWS], rtol=1e-4)
    adata, order = shuffled(model)
    pd.testing.assert_frame_equal(model.get_normalized_expression(adata), whole.iloc[order], rtol=1e-3, atol=1e-6)


def test_normalised_expression_follows_the_counts(model):
    x = model.adata.X.toarray()
    found = model.get_normalized_expression(library_size="latent").to_numpy()
    assert np.corrcoef(x.mean(0), found.mean(0))[0, 1] > 0.8
    own = np.mean([np.corrcoef(a, b)[0, 1] for a, b in zip(x, found, strict=True)])
    assert own > np.mean([np.corrcoef(a, b)[0, 1] for a, b in zip(x[::-1], found, strict=True)]) - 0.02


def test_library_size(model):
    share = model.get_normalized_expression(return_numpy=True)
    np.testing.assert_allclose(
        model.get_normalized_expression(library_size=1e4, return_numpy=True), share * 1e4, rtol=1e-4
    )
    total = np.asarray(model.adata.X.sum(1)).ravel()
    own = model.get_normalized_expression(library_size="latent", return_numpy=True)
    np.testing.assert_allclose(own, share * total[:, None], rtol=1e-4)
    np.testing.assert_allclose(model.get_latent_library_size(indices=ROWS), total[ROWS])


def test_gene_list(model):
    whole = model.get_normalized_expression()
    some = model.get_normalized_expression(gene_list=["gene7", "gene2"])
    assert set(some.columns) == {"gene2", "gene7"}
    pd.testing.assert_frame_equal(some, whole[some.columns])
    assert list(model.get_normalized_expression(gene_list="gene2").columns) == ["gene2"]
    with pytest.raises(ValueError, match=r'gene_list has 1 gene not known \("nothing"\)'):
        model.get_normalized_expression(gene_list=["gene2", "nothing"])
    with pytest.raises(
        TypeError, match=r'gene_list has "True", .*: pass names; of a mask, .* `adata.var_names\[mask\]`'
    ):
        model.get_normalized_expression(gene_list=np.ones(model.adata.n_vars, dtype=bool))


def test_transform_batch(model):
    own = model.get_normalized_expression()
    per_batch = [model.get_normalized_expression(transform_batch=name) for name in ("batch0", "batch1")]
    of_first = (model.adata.obs["batch"] == "batch0").to_numpy()
    np.testing.assert_allclose(per_batch[0][of_first], own[of_first], rtol=1e-5)
    np.testing.assert_allclose(per_batch[1][~of_first], own[~of_first], rtol=1e-5)
    assert np.abs(per_batch[0] - per_batch[1]).to_numpy().max() > 1e-5
    both = model.get_normalized_expression(transform_batch=["batch0", "batch1"])
    np.testing.assert_allclose(both, (per_batch[0] + per_batch[1]) / 2, rtol=1e-5)
    with pytest.raises(ValueError, match='"batch9" is no batch of these data or the model .*"batch0", "batch1"'):
        model.get_normalized_expression(transform_batch="batch9")


@pytest.mark.parametrize(
    ("names", "asked"),
    [([1, 2], "1"), ([1, 2], 1.0), (["1", "2"], 1), (pd.to_datetime(["2026-01-05", "2026-01-07"]), "2026-01-05")],
    ids=["number by text", "number by float", "text by number", "date by text"],
)
def test_batches_are_asked_for_in_any_type(tissues, build, train, names, asked):
    tissues.obs["batch"] = tissues.obs["batch"].map(dict(zip(["batch0", "batch1"], names, strict=True)))
    model = train(build(tissues))
    expected = model.get_normalized_expression(transform_batch=model.adata.obs["batch"].cat.categories[0])
    pd.testing.assert_frame_equal(model.get_normalized_expression(transform_batch=asked), expected)


def test_draws(model):
    draws = model.get_normalized_expression(indices=ROWS, n_samples=5, return_mean=False)
    assert draws.shape == (5, len(ROWS), model.adata.n_vars)
    assert np.ptp(draws, axis=0).max() > 0
    mean = model.get_normalized_expression(indices=ROWS, n_samples=5)
    np.testing.assert_allclose(mean, draws.mean(0), rtol=1e-4)
    pairs = model.get_normalized_expression(indices=ROWS, n_samples_overall=13, return_numpy=True)
    assert pairs.shape == (13, model.adata.n_vars)
    many = model.get_normalized_expression(indices=ROWS[:2], n_samples=300)
    point = model.get_normalized_expression(indices=ROWS[:2])
    assert np.corrcoef(many.to_numpy().ravel(), point.to_numpy().ravel())[0, 1] > 0.9


def test_importance_weights_are_refused(model):
    with pytest.raises(ValueError, match=r'weights="importance" is not available: .*standard normal prior'):
        model.get_normalized_expression(weights="importance")


def test_moments_and_draws_of_the_latent_space(model):
    mean, variance = model.get_latent_representation(indices=ROWS, return_dist=True)
    assert mean.shape == variance.shape == (len(ROWS), 4)
    np.testing.assert_array_equal(mean, model.get_latent_representation(indices=ROWS))
    assert (variance > 0).all()
    drawn = []
    for seed in range(40):
        scvi.settings.seed = seed
        drawn.append(model.get_latent_representation(indices=ROWS, give_mean=False))
    np.testing.assert_array_equal(model.get_latent_representation(indices=ROWS, give_mean=False), drawn[-1])
    drawn = np.stack(drawn)
    assert (np.abs(drawn.mean(0) - mean) < 5 * np.sqrt(variance / 40)).all()
    averaged = model.get_latent_representation(indices=ROWS, give_mean=False, mc_samples=2000)
    assert (np.abs(averaged - mean) < 5 * np.sqrt(variance / 2000)).all()


def test_precision(model):
    """Half the bits move an embedding a little, and differently from not at all."""
    whole = model.get_latent_representation()
    half = model.get_latent_representation(precision="bf16-mixed")
    assert half.dtype == np.float32
    error = np.sqrt(np.mean((half - whole) ** 2)) / whole.std()
    assert 0 < error < 0.05
    with pytest.raises(ValueError, match="neither"):
        model.get_latent_representation(precision="16")


def test_mixture_probabilities(model):
    found = model.get_mixture_probabilities()
    assert list(found.index) == list(model.adata.obs_names)
    assert found.shape == (model.adata.n_obs, 3)
    np.testing.assert_allclose(found.sum(1), 1.0, rtol=1e-5)
    latent = model.module.latent
    z = torch.from_numpy(model.get_latent_representation(align_batches=False))
    with torch.no_grad():
        mean, variance = latent.components()
        components = torch.distributions.Normal(mean, variance.sqrt())
        joint = components.log_prob(z[:, None]).sum(-1) + latent.component_logit.log_softmax(0)
        expected = joint.softmax(1).numpy()
    np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-5)
    some = model.get_mixture_probabilities(indices=ROWS)
    assert list(some.index) == list(model.adata.obs_names[ROWS])
    np.testing.assert_allclose(some, found.iloc[ROWS], rtol=1e-3, atol=1e-5)
    adata, order = shuffled(model)
    pd.testing.assert_frame_equal(model.get_mixture_probabilities(adata), found.iloc[order], rtol=1e-3, atol=1e-5)


def test_mixture_probabilities_need_a_mixture(tissues, build, train):
    model = train(build(tissues, latent="gaussian"))
    with pytest.raises(
        ValueError, match='Only a model with latent="mixture" has mixture components; .* a GaussianLatent'
    ):
        model.get_mixture_probabilities()


@pytest.mark.parametrize("latent", ["mixture", "gaussian", "deterministic"])
def test_likelihoods_a_cell_are_aligned(make_tissues, build, train, latent):
    """Of one cell, the counts are spoilt: its likelihood alone falls."""
    model = train(build(make_tissues(), latent=latent, encoder="mlp"), max_epochs=2)
    elbo = model.get_elbo(return_mean=False)
    error = model.get_reconstruction_error(return_mean=False)["reconstruction_loss"]
    assert elbo.shape == error.shape == (model.adata.n_obs,)
    assert float(model.get_elbo()) == pytest.approx(float(elbo.mean()), rel=1e-3)
    assert float(model.get_reconstruction_error()["reconstruction_loss"]) == pytest.approx(
        float(error.mean()), rel=1e-3
    )
    spoilt = model.adata.copy()
    x = spoilt.X.toarray()
    x[41] = 0
    x[41, 5] = 500
    spoilt.X = x
    changed = model.get_elbo(spoilt, return_mean=False)
    assert int(np.argmin(changed)) == 41
    others = np.arange(model.adata.n_obs) != 41
    np.testing.assert_allclose(np.asarray(changed)[others], np.asarray(elbo)[others], rtol=1e-3, atol=1e-2)
    assert int(np.argmax(model.get_reconstruction_error(spoilt, return_mean=False)["reconstruction_loss"])) == 41


def test_likelihoods_of_rows(model):
    whole = model.get_reconstruction_error(return_mean=False)["reconstruction_loss"]
    some = model.get_reconstruction_error(indices=ROWS, return_mean=False)["reconstruction_loss"]
    # one draw of z each, so alike but not equal
    assert np.corrcoef(np.asarray(some), np.asarray(whole)[ROWS])[0, 1] > 0.8
    np.testing.assert_array_equal(model.get_elbo(return_mean=False), model.get_elbo(return_mean=False))


def test_predictive_samples(model):
    drawn = model.posterior_predictive_sample(n_samples=50)
    assert drawn.shape == (model.adata.n_obs, model.adata.n_vars, 50)
    dense = drawn.todense()
    assert (dense >= 0).all()
    np.testing.assert_array_equal(dense, np.rint(dense))
    expected = model.get_normalized_expression(library_size="latent").to_numpy()
    assert np.corrcoef(dense.mean(-1).ravel(), expected.ravel())[0, 1] > 0.9
    one = model.posterior_predictive_sample(indices=ROWS)
    assert one.shape == (len(ROWS), model.adata.n_vars)
    np.testing.assert_array_equal(one.todense(), model.posterior_predictive_sample(indices=ROWS).todense())


def test_predictive_samples_are_aligned_by_gene(model):
    """The most frequent gene has the most draws wherever its column is."""
    order = np.random.default_rng(2).permutation(model.adata.n_vars)
    adata = model.adata[:, order].copy()
    means = model.posterior_predictive_sample(n_samples=30).todense().mean((0, 2))
    found = model.posterior_predictive_sample(adata, n_samples=30).todense().mean((0, 2))
    assert np.corrcoef(found, means[order])[0, 1] > 0.97
    some = model.posterior_predictive_sample(adata, n_samples=30, gene_list=["gene3", "gene4"]).todense().mean((0, 2))
    columns = [gene for gene in adata.var_names if gene in ("gene3", "gene4")]
    np.testing.assert_allclose(some, pd.Series(found, adata.var_names)[columns], rtol=1e-6)


@pytest.fixture(scope="module")
def planted(make_tissues, build, train) -> CellPLM:
    """A model of data in which gene11 marks type0."""
    adata = make_tissues(160, 24, seed=3)
    x = adata.X.toarray()
    marked = (adata.obs["cell_type"] == "type0").to_numpy()
    x[:, 11] = np.random.default_rng(0).poisson(np.where(marked, 40, 1))
    adata.X = x
    scvi.settings.seed = 0
    model = build(adata, encoder="mlp", latent="gaussian")
    return train(model, max_epochs=80, plan_kwargs={"lr": 5e-3})


@pytest.mark.parametrize("batch_correction", [False, True])
def test_differential_expression_finds_a_planted_gene(planted, batch_correction):
    found = planted.differential_expression(
        groupby="cell_type", group1="type0", mode="change", batch_correction=batch_correction, silent=True
    )
    assert set(found.index) == set(planted.adata.var_names)
    assert found["lfc_mean"].idxmax() == "gene11"
    assert found.loc["gene11", "proba_de"] > 0.9
    again = planted.differential_expression(
        groupby="cell_type", group1="type0", mode="change", batch_correction=batch_correction, silent=True
    )
    pd.testing.assert_frame_equal(found, again)


def test_differential_expression_names_genes_in_another_order(planted):
    order = np.random.default_rng(4).permutation(planted.adata.n_vars)
    adata = planted.adata[:, order].copy()
    found = planted.differential_expression(adata, groupby="cell_type", group1="type0", mode="change", silent=True)
    assert found["lfc_mean"].idxmax() == "gene11"
    assert found["raw_mean1"].idxmax() == "gene11"


def test_differential_expression_of_data_with_other_genes(planted):
    few = planted.adata[:, 5:].copy()
    with pytest.warns(UserWarning, match="5 of the model's 24 genes are not in this AnnData"):
        found = planted.differential_expression(few, groupby="cell_type", group1="type0", mode="change", silent=True)
    assert found["lfc_mean"].idxmax() == "gene11"
    assert set(found.index) == set(few.var_names)
    few.var_names = ["new0", "new1", *few.var_names[2:]]
    asked = {"groupby": "cell_type", "group1": "type0", "mode": "change", "silent": True}
    with pytest.warns(UserWarning, match=r'2 genes of this AnnData are unknown .*\("new0", "new1"\), and not compared'):
        found = planted.differential_expression(few.copy(), **asked)
    assert found["lfc_mean"].idxmax() == "gene11"
    assert set(found.index) == set(few.var_names[2:])
    with pytest.raises(ValueError, match=r'2 genes of this AnnData are unknown to the model \("new0", "new1"\)'):
        planted.get_feature_correlation_matrix(few.copy(), n_samples=2)


def test_differential_expression_by_rows(planted):
    adata = planted.adata
    first = (adata.obs["cell_type"] == "type0").to_numpy()
    found = planted.differential_expression(idx1=first, idx2=~first, mode="change", silent=True)
    assert found["lfc_mean"].idxmax() == "gene11"


def test_differential_expression_gives_scvi_tools_statistics_of_counts(planted):
    adata = planted.adata
    columns = list(adata.obs.columns)
    found = planted.differential_expression(groupby="cell_type", mode="change", silent=True)
    assert list(adata.obs.columns) == columns
    first = (adata.obs["cell_type"] == "type1").to_numpy()
    expected = scrna_raw_counts_properties(planted.adata_manager, first, ~first)
    found = found[found["group1"] == "type1"].loc[adata.var_names]
    for name, values in expected.items():
        np.testing.assert_allclose(found[name], values, rtol=1e-5, err_msg=name)


def test_groups_of_one_size_are_drawn_independently(planted):
    """The same noise in both would cancel: changes are as uncertain as between groups of other sizes, in any order of rows."""
    rows = np.flatnonzero(planted.adata.obs["cell_type"] != "type0")
    rng = np.random.default_rng(0)
    for batch_correction in (False, True):
        spread = []
        for n in (40, 41):
            for _ in range(2):
                drawn = rng.permutation(rows)
                found = planted.differential_expression(
                    idx1=drawn[:40],
                    idx2=drawn[40 : 40 + n],
                    mode="change",
                    batch_correction=batch_correction,
                    silent=True,
                )
                spread.append(found["lfc_std"].median())
        assert max(spread) < 1.5 * min(spread)
    chosen = planted.get_normalized_expression(n_samples_overall=500)
    np.testing.assert_array_equal(chosen, planted.get_normalized_expression(n_samples_overall=500))


def test_differential_expression_of_a_file(planted, tmp_path):
    planted.adata.write_h5ad(tmp_path / "cells.h5ad")
    backed = anndata.read_h5ad(tmp_path / "cells.h5ad", backed="r")
    kwargs = {"groupby": "cell_type", "group1": "type0", "mode": "change", "silent": True}
    found, expected = planted.differential_expression(backed, **kwargs), planted.differential_expression(**kwargs)
    pd.testing.assert_frame_equal(found.loc[expected.index], expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(
    ("asked", "error", "message"),
    [
        ({"groupby": "kind"}, KeyError, 'groupby="kind" is not a column'),
        ({"groupby": "cell_type", "group1": "type9"}, ValueError, 'no cell of the group "type9"; it has "type'),
        ({"groupby": "cell_type", "group1": "type0", "group2": "type9"}, ValueError, 'no cell of the group "type9"'),
        ({"groupby": "cell_type", "group1": 1}, ValueError, 'no cell of the group 1; it has "type0", '),
        ({"groupby": "cell_type", "group2": ["type0", "type1"]}, TypeError, "is one group.*pass idx1 and idx2"),
        (
            {"idx1": "cell_type = 1"},
            ValueError,
            "idx1='cell_type = 1' is no query of adata.obs, which has .*\"cell_type\"",
        ),
        ({"idx1": np.zeros(160, dtype=bool)}, ValueError, "idx1 has no cell"),
        ({"idx1": "cell_type == 'type0'", "idx2": "cell_type == 'x'"}, ValueError, "idx2 has no cell"),
    ],
)
def test_groups_that_are_not_there(planted, asked, error, message):
    with pytest.raises(error, match=message):
        planted.differential_expression(**asked, silent=True)


def test_feature_correlations(planted):
    found = planted.get_feature_correlation_matrix(n_samples=4, correlation_type="pearson")
    assert list(found.index) == list(found.columns) == list(planted.adata.var_names)
    np.testing.assert_allclose(np.diag(found), 1.0, rtol=1e-5)
    np.testing.assert_allclose(found, found.T, atol=1e-6)


def test_likelihood_parameters(model):
    found = model.get_likelihood_parameters(indices=ROWS)
    assert found["mean"].shape == found["dispersions"].shape == (len(ROWS), model.adata.n_vars)
    assert (found["dispersions"] > 0).all()
    expected = model.get_normalized_expression(indices=ROWS, library_size="latent").to_numpy()
    assert np.corrcoef(found["mean"].ravel(), expected.ravel())[0, 1] > 0.9


def test_marginal_likelihood_works_or_says_that_it_does_not(model):
    with pytest.raises(NotImplementedError, match="marginal"):
        model.get_marginal_ll()


def test_results_need_training(tissues, build):
    model = build(tissues)
    with pytest.raises(RuntimeError, match="rain"):
        model.get_latent_representation()
    with pytest.raises(RuntimeError, match="rain"):
        model.get_mixture_probabilities()


@pytest.mark.parametrize(
    ("indices", "error", "message"),
    [
        ([0, 90], IndexError, "indices go from 0 to 90; the AnnData has 90 cells"),
        ([-91], IndexError, "indices go from -91"),
        (np.ones(5, bool), ValueError, r"indices is a mask of shape \(5,\); the AnnData has 90 cells"),
        (["cell1"], TypeError, "row numbers.*or a boolean mask, and is an array of <U5 of shape .*; for names"),
        ([[1, 2]], TypeError, "row numbers"),
        ([0.5], TypeError, "row numbers"),
    ],
    ids=["high", "low", "mask", "names", "nested", "floats"],
)
@pytest.mark.parametrize("method", ["get_latent_representation", "get_normalized_expression", "get_elbo"])
def test_indices_that_do_not_fit(model, method, indices, error, message):
    with pytest.raises(error, match=message):
        getattr(model, method)(indices=indices)


def test_masks_with_names_are_of_the_cells_in_their_order(model):
    """A column of obs is; the same mask in another order is an error instead of other cells."""
    adata = model.adata
    mask = pd.Series(np.arange(adata.n_obs) % 3 == 0, index=adata.obs_names)
    expected = model.get_latent_representation(indices=mask.to_numpy())
    np.testing.assert_array_equal(model.get_latent_representation(indices=mask), expected)
    np.testing.assert_array_equal(model.get_latent_representation(indices=mask.reset_index(drop=True)), expected)
    with pytest.raises(ValueError, match=r"a mask whose index .* Pass `mask.loc\[adata.obs_names\]`"):
        model.get_latent_representation(indices=mask[::-1])
    with pytest.raises(ValueError, match="idx2: indices is a mask whose index"):
        model.differential_expression(idx1=mask, idx2=~mask[::-1])


@pytest.mark.parametrize("dtype", [np.int8, np.uint8, np.int32, np.uint64])
def test_row_numbers_of_any_integer_type(model, make_tissues, dtype):
    """Also of one that cannot hold the number of cells."""
    adata = make_tissues(300)
    rows = np.array([7, 0, 100], dtype=dtype)
    expected = model.get_latent_representation(adata, indices=[7, 0, 100])
    np.testing.assert_array_equal(model.get_latent_representation(adata, indices=rows), expected)


def test_a_loader_of_ones_own(model):
    loader = model._make_data_loader(model.adata, indices=ROWS)
    np.testing.assert_array_equal(
        model.get_latent_representation(dataloader=loader), model.get_latent_representation(indices=ROWS)
    )
    with pytest.raises(ValueError, match="The dataloader has no minibatch"):
        model.get_latent_representation(dataloader=[])
    with pytest.raises(ValueError, match="Pass either `dataloader` or"):
        model.get_latent_representation(indices=ROWS, dataloader=loader)


def test_the_summary_tells_sizes(model, capsys):
    repr(model)
    shown = " ".join(capsys.readouterr().out.split())
    for part in ("30 genes", "n_hidden: 16", "n_layers: 2", "n_latent: 4", "encoder: flow", "90 cells in 4 samples"):
        assert part in shown
    assert "Trained" in shown


def test_the_setup_is_shown(model, capsys):
    model.view_anndata_setup()
    shown = capsys.readouterr().out
    for part in ("batch1", "drop", "sample3", "adata.X"):
        assert part in shown


@pytest.mark.parametrize(
    "method",
    [
        *("get_elbo", "get_reconstruction_error", "posterior_predictive_sample", "get_likelihood_parameters"),
        "get_feature_correlation_matrix",
    ],
)
def test_no_cell_has_no_mean(model, method):
    for nobody in ([], np.zeros(model.adata.n_obs, dtype=bool)):
        with pytest.raises(ValueError, match="indices asks for no cell"):
            getattr(model, method)(indices=nobody)


@pytest.mark.parametrize(
    ("method", "arguments", "message"),
    [
        (
            "get_normalized_expression",
            {"library_size": "own"},
            "library_size='own' must be a positive number of counts",
        ),
        ("get_normalized_expression", {"library_size": -5}, "library_size=-5 must be a positive"),
        ("get_denoised_expression", {"library_size": 0}, "library_size=0 must be a positive"),
        ("get_imputed_expression", {"library_size": float("nan")}, "library_size=nan must be a positive"),
        ("get_normalized_expression", {"n_samples": 0}, "n_samples=0 must be a positive whole number"),
        ("get_normalized_expression", {"transform_batch": []}, "transform_batch is empty"),
        ("posterior_predictive_sample", {"transform_batch": []}, "transform_batch is empty"),
        ("posterior_predictive_sample", {"n_samples": 0}, "n_samples=0 must be a positive whole number"),
        ("get_imputed_expression", {"n_samples": 2.5}, "n_samples=2.5 must be a positive whole number"),
        ("get_latent_representation", {"give_mean": False, "mc_samples": 0}, "mc_samples=0 must be a positive"),
    ],
)
def test_sizes_that_mean_nothing(model, method, arguments, message):
    with pytest.raises(ValueError, match=message):
        getattr(model, method)(**arguments)


def test_a_view_of_a_file(model, tmp_path):
    model.adata.write_h5ad(tmp_path / "a.h5ad")
    adata = anndata.read_h5ad(tmp_path / "a.h5ad", backed="r")
    for use in (model.get_latent_representation, lambda view: CellPLM.setup_anndata(view, batch_key="batch")):
        with pytest.raises(ValueError, match="a view of one that is backed by a file"):
            use(adata[:20])
    adata.file.close()


def test_arguments_are_not_swallowed(model):
    with pytest.raises(TypeError, match="n_sample"):
        model.posterior_predictive_sample(n_sample=10)
    with pytest.raises(TypeError, match="nothing"):
        model.get_latent_library_size(nothing=1)


def test_groups_that_cannot_be_compared(planted):
    adata = planted.adata
    with pytest.raises(ValueError, match="Each cell of idx1 is one of idx2 too"):
        planted.differential_expression(idx1=[0, 1], idx2=[0, 1, 2, 3], silent=True)
    with pytest.warns(UserWarning, match="2 cells are in idx1 and in idx2"):
        planted.differential_expression(idx1=[0, 1, 2], idx2=[1, 2, 3, 4], silent=True)
    with pytest.raises(ValueError, match="group1 is empty"):
        planted.differential_expression(groupby="cell_type", group1=[], silent=True)
    with pytest.raises(ValueError, match="group1 and group2 are both 'type0'"):
        planted.differential_expression(groupby="cell_type", group1="type0", group2="type0", silent=True)
    with pytest.raises(ValueError, match='mode="changed" is not "vanilla" or "change"'):
        planted.differential_expression(groupby="cell_type", mode="changed", silent=True)
    found = planted.differential_expression(groupby="cell_type", group2="type0", silent=True)
    assert "type0" not in set(found["group1"])
    assert set(found["group1"]) == set(adata.obs["cell_type"]) - {"type0"}


@pytest.mark.parametrize(
    ("method", "options", "error"),
    [
        ("get_normalized_expression", {"library_size": np.ones(3)}, ValueError),
        ("get_normalized_expression", {"gene_list": 5}, TypeError),
        ("get_denoised_expression", {"log1p": True, "depth": np.ones(3)}, ValueError),
    ],
)
def test_options_of_another_type_are_named(planted, method, options, error):
    with pytest.raises(error, match=list(options)[-1]):
        getattr(planted, method)(**options)
