"""Denoised expression lies between what the decoder expects and what was counted."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

from cellplm_scvi import CellPLM
from cellplm_scvi.data import synthetic_tissues

ROWS = [17, 3, 3, 60, 41]


@pytest.fixture(params=["dissociated", "spatial"])
def model(request, models) -> CellPLM:
    return models[request.param]


def test_between_the_decoder_and_the_counts(model):
    counts = model.adata.X.toarray()
    decoded = model.get_normalized_expression(library_size="latent", return_numpy=True)
    found = model.get_denoised_expression(library_size="latent", return_numpy=True)
    low, high = np.minimum(decoded, counts), np.maximum(decoded, counts)
    assert (found >= low * (1 - 1e-4) - 1e-6).all()
    assert (found <= high * (1 + 1e-4) + 1e-6).all()
    assert np.abs(found - counts).mean() < np.abs(decoded - counts).mean()


def test_rows_genes_and_library(model):
    whole = model.get_denoised_expression()
    assert list(whole.index) == list(model.adata.obs_names)
    assert list(whole.columns) == list(model.adata.var_names)
    genes = list(whole.columns[[4, 2]])
    some = model.get_denoised_expression(indices=ROWS, gene_list=genes, library_size=100, batch_size=2)
    expected = 100 * whole[[g for g in whole.columns if g in genes]].iloc[ROWS]
    pd.testing.assert_frame_equal(some, expected, rtol=1e-3)
    order = np.random.default_rng(0).permutation(model.adata.n_obs)
    shuffled = model.get_denoised_expression(model.adata[order].copy())
    pd.testing.assert_frame_equal(shuffled, whole.iloc[order], rtol=1e-3, atol=1e-6)
    assert model.get_denoised_expression(indices=[]).shape == (0, whole.shape[1])


def test_a_cell_without_counts_has_what_its_state_says(model):
    adata = model.adata[:5].copy()
    adata.X = adata.X.multiply((np.arange(5) != 2)[:, None]).tocsr()
    denoised = model.get_denoised_expression(adata, library_size=100)
    decoded = model.get_normalized_expression(adata, library_size=100)
    np.testing.assert_allclose(denoised.iloc[2], decoded.iloc[2], rtol=1e-4)
    assert (model.get_denoised_expression(adata, library_size=100, log1p=True, depth=100).iloc[2] > 0).all()


def test_expected_logarithm(model):
    """It is below the logarithm of what is expected, which it approaches with depth."""
    of_mean = np.log1p(model.get_denoised_expression(library_size=1e3, return_numpy=True))
    own = model.get_denoised_expression(library_size=1e3, log1p=True, return_numpy=True)
    assert (own <= of_mean + 1e-4).all()
    assert own.mean() < 0.95 * of_mean.mean()
    assert (own >= 0).all()
    shallow = model.get_denoised_expression(library_size=1e3, log1p=True, depth=10, return_numpy=True)
    assert shallow.mean() < own.mean()


def test_expected_logarithm_is_that_of_draws(model):
    """Means of draws of counts, by the Gamma posterior of the rate."""
    decoded = model.get_normalized_expression(library_size="latent", return_numpy=True)[:5]
    theta = model.module.decoder.log_theta.exp().detach().numpy()
    counts, library = model.adata.X[:5].toarray(), np.asarray(model.adata.X[:5].sum(1))
    rng = np.random.default_rng(0)
    rate = rng.gamma(counts + theta, 1 / (1 + theta / decoded), (20_000, *counts.shape))
    draws = np.log1p(rng.poisson(rate * (200 / library)) * (1e3 / 200)).mean(0)
    found = model.get_denoised_expression(indices=range(5), library_size=1e3, log1p=True, depth=200, return_numpy=True)
    np.testing.assert_allclose(found, draws, atol=0.06)
    assert np.abs(found - draws).mean() < 0.01


@pytest.mark.parametrize(
    "arguments", [{"depth": 10}, *({"depth": depth, "log1p": True} for depth in (0, -1.0, np.inf))]
)
def test_depth_that_means_nothing(model, arguments):
    with pytest.raises(ValueError, match="depth"):
        model.get_denoised_expression(**arguments)


@pytest.mark.parametrize("log1p", [False, True])
def test_genes_that_were_not_measured_are_missing(build, train, log1p):
    adata = synthetic_tissues(80, 30, 2, n_types=2, n_dissociated=1, n_panel_genes=12)
    model = train(
        build(adata, {"dataset_key": "dataset", "platform_key": None, "measured_genes_key": "measured_genes"})
    )
    found = model.get_denoised_expression(log1p=log1p)
    measured = adata.varm["measured_genes"][adata.obs["dataset"]].to_numpy().T
    assert not measured.all()
    np.testing.assert_array_equal(found.notna(), measured)
