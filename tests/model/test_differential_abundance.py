"""Differential abundance: how likely each cell is among those of each sample."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
import pytest
import scvi
import torch
from anndata import AnnData
from scvi.model.base import VAEMixin

from cellplm_scvi import CellPLM


@pytest.fixture(params=["dissociated", "spatial"])
def model(request, models, clone) -> CellPLM:
    """A model whose data a test may change."""
    return clone(models[request.param])


@pytest.fixture
def cells(dissociated_model, clone) -> CellPLM:
    return clone(dissociated_model)


def abundance(model: CellPLM, adata_sub: AnnData | None = None, **kwargs: Any) -> pd.DataFrame:
    model.differential_abundance(adata_sub=adata_sub, **{"sample_key": "sample", **kwargs})
    found: Any = (model.adata if adata_sub is None else adata_sub).obsm.pop("da_log_probs")
    return found


def test_is_that_of_scvi_tools(model):
    VAEMixin.differential_abundance(model, sample_key="sample")
    expected = model.adata.obsm.pop("da_log_probs")
    for batch_size in (7, 128):
        found = abundance(model, batch_size=batch_size)
        assert list(found.index) == list(model.adata.obs_names)
        assert set(found.columns) == set(model.adata.obs["sample"])
        np.testing.assert_allclose(found, expected[found.columns], rtol=1e-4)


@pytest.mark.parametrize("dof", [3.0, None])
def test_aggregated_posterior_of_any_rows(model, dof):
    """Rows as all methods take them; the mixture is that of scvi-tools."""
    mask = np.arange(model.adata.n_obs) % 9 == 4
    rows = np.flatnonzero(mask)
    z = torch.from_numpy(model.get_latent_representation())
    expected = VAEMixin.get_aggregated_posterior(model, indices=rows, dof=dof).log_prob(z)
    for indices in (mask, rows, rows.tolist(), tuple(rows), range(4, model.adata.n_obs, 9), rows - model.adata.n_obs):
        found = model.get_aggregated_posterior(indices=indices, dof=dof)
        torch.testing.assert_close(found.log_prob(z), expected)
    whole = model.get_aggregated_posterior()
    np.testing.assert_allclose(whole.mean, z.mean(0), rtol=1e-4, atol=1e-5)
    for empty in ([], np.zeros_like(mask)):
        with pytest.raises(ValueError, match="indices asks for no cell"):
            model.get_aggregated_posterior(indices=empty)


@pytest.mark.parametrize("seed", [0, 5, None])
def test_cells_that_stand_for_their_sample_are_drawn_alike(cells, seed):
    scvi.settings.seed = seed
    state = np.random.get_state()[1].copy()  # noqa: NPY002
    first, second = (abundance(cells, num_cells_posterior=5) for _ in range(2))
    pd.testing.assert_frame_equal(first, second)
    np.testing.assert_array_equal(np.random.get_state()[1], state)  # noqa: NPY002
    assert not np.allclose(first, abundance(cells))
    pd.testing.assert_frame_equal(abundance(cells, num_cells_posterior=1000), abundance(cells))
    part = cells.adata[cells.adata.obs["sample"] == "sample1"].copy()
    found = abundance(cells, part, num_cells_posterior=5)
    pd.testing.assert_frame_equal(found, first.loc[found.index, found.columns], rtol=1e-5)
    scvi.settings.seed = 9
    assert not np.allclose(first, abundance(cells, num_cells_posterior=5))


@pytest.mark.parametrize("order", [slice(None, None, 3), slice(None, None, -2)])
def test_a_part_has_the_company_of_the_whole(model, order, recwarn):
    whole = abundance(model)
    part = model.adata[order].copy()
    found = abundance(model, part)
    pd.testing.assert_frame_equal(found, whole.loc[part.obs_names, found.columns])
    assert not [w for w in recwarn if "company" in str(w.message)]


@pytest.mark.parametrize("other", ["names", "counts", "repeated names"])
def test_cells_that_the_whole_lacks_have_each_other(cells, other):
    """Names alone do not make cells the same: "0" is one of many data sets."""
    part = cells.adata[::3].copy()
    if other == "names":
        part.obs_names = [f"new{i}" for i in range(part.n_obs)]
    elif other == "counts":
        part.X = part.X * 2
    else:
        cells.adata.obs_names = ["cell0"] * cells.adata.n_obs
    with pytest.warns(
        UserWarning, match="30 of the 30 cells of adata_sub are not in adata.*each other alone for company"
    ):
        found = abundance(cells, part)
    samples = cells.adata.obs["sample"]
    z = torch.from_numpy(cells.get_latent_representation(part))
    for name in found:
        posterior = cells.get_aggregated_posterior(indices=(samples == name).to_numpy(), dof=None)
        np.testing.assert_allclose(found[name], posterior.log_prob(z), rtol=1e-4)


@pytest.mark.parametrize("form", ["category", "object", "string"])
def test_missing_samples_are_an_error(cells, form):
    """They would be a sample that holds every cell."""
    column = cells.adata.obs["cell_type"].astype(object)
    column.iloc[[4, 8]] = None
    cells.adata.obs["donor"] = column.astype(form)
    message = r'obs\["donor"\] has 2 missing values \(cells "cell4", "cell8"\)\. .* before differential_abundance'
    with pytest.raises(ValueError, match=message):
        abundance(cells, sample_key="donor")
    part = cells.adata[:9].copy()
    cells.adata.obs["donor"] = "A"
    with pytest.raises(ValueError, match=message):
        abundance(cells, part, sample_key="donor")


def test_samples_must_have_cells(cells):
    part = cells.adata[:9].copy()
    part.obs["sample"] = ["sample0"] * 7 + ["new1", "new2"]
    with pytest.raises(
        ValueError, match=r'2 of the samples in adata_sub\.obs\["sample"\] have no cell in adata \("new1"'
    ):
        abundance(cells, part)
    assert "da_log_probs" not in part.obsm


@pytest.mark.parametrize(
    ("asked", "error", "message"),
    [
        ({"sample_key": None}, ValueError, 'Name the column .* `sample_key=`: one of "cell_type", "batch", "sample"'),
        ({"sample_key": "nope"}, KeyError, 'sample_key="nope" is not a column of adata.obs, which has "cell_type"'),
        ({"num_cells_posterior": 0}, ValueError, "num_cells_posterior=0 must be a positive whole number"),
    ],
)
def test_arguments_that_make_no_sense(cells, asked, error, message):
    with pytest.raises(error, match=message):
        abundance(cells, **asked)


def test_points_have_no_density(tissues, build, train):
    model = train(build(tissues, latent="deterministic"))
    with pytest.raises(ValueError, match='With latent="deterministic", the embedding of a cell is a point'):
        model.get_aggregated_posterior()
    with pytest.raises(ValueError, match='With latent="deterministic"'):
        abundance(model)
