"""The stated truth of synthetic tissues holds in their counts."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
from anndata import AnnData

from cellplm_scvi import CellPLM
from cellplm_scvi.data import synthetic_tissues, true_shares
from cellplm_scvi.genes import map_genes


@pytest.fixture(scope="module")
def adata() -> AnnData:
    return synthetic_tissues(
        6000,
        80,
        4,
        n_types=4,
        n_dissociated=2,
        n_panel_genes=40,
        n_perturbations=4,
        n_pairs=3,
        mean_counts=2000,
        seed=1,
    )


def measured_mean(adata: AnnData) -> tuple[np.ndarray, np.ndarray]:
    """Expected counts and which of them were measured, each (n_cells, n_genes)."""
    mean = true_shares(adata).to_numpy() * adata.obs["depth"].to_numpy()[:, None]
    return mean, pd.DataFrame(adata.varm["measured_genes"])[adata.obs["dataset"]].to_numpy().T


def test_counts_have_the_mean_and_the_variance_of_the_negative_binomial(adata):
    mean, measured = measured_mean(adata)
    variance = mean + mean**2 / adata.var["inverse_dispersion"].to_numpy()
    x = adata.X.toarray()
    n = measured.sum(0)
    error = ((x - mean) * measured).sum(0) / np.sqrt((variance * measured).sum(0))
    assert np.abs(error).max() < 4.5  # in standard errors
    ratio = ((x - mean) ** 2 / variance * measured).sum(0) / n
    assert np.abs(ratio - 1).max() < 0.25
    # a Poisson's variance would be smaller by far
    assert ((x - mean) ** 2 / mean * measured).sum(0).mean() / n.mean() > 1.5


def test_what_a_panel_lacks_has_no_counts(adata):
    _, measured = measured_mean(adata)
    assert adata.X.toarray()[~measured].sum() == 0
    assert adata.varm["measured_genes"].sum().to_dict() == {"reference": 80, "spatial": 40}


@pytest.mark.parametrize(
    ("n_types", "rare_share", "expected"),
    [
        pytest.param(5, 0.03, 0.03, id="default"),
        pytest.param(8, 0.1, 0.1, id="even"),
        pytest.param(6, 0.005, 0.005, id="rare"),
        pytest.param(20, 0.3, 0.05, id="more than its share"),
        pytest.param(1, 0.03, 1.0, id="one"),
    ],
)
def test_the_rarest_type_has_its_share(n_types, rare_share, expected):
    shares = []
    for seed in range(4):
        adata = synthetic_tissues(6000, 4, 60, n_types=n_types, rare_share=rare_share, seed=seed)
        shares.append((adata.obs["cell_type"] == f"type{n_types - 1}").mean())
    assert np.mean(shares) == pytest.approx(expected, rel=0.15)


def test_niches_differ_in_their_mix():
    adata = synthetic_tissues(3000, 4, 4, seed=0)
    mixes = pd.crosstab(adata.obs["niche"], adata.obs["cell_type"], normalize="index")
    assert (mixes.max() - mixes.min()).max() > 0.2


def test_niche_genes_follow_the_neighbours_and_others_do_not():
    adata = synthetic_tissues(4000, 60, 2, n_types=3, batch_effect=0, rare_share=0.2, mean_counts=3000, seed=3)
    effects = adata.varm["neighbour_effects"]
    np.testing.assert_array_equal(effects.abs().sum(axis=1) > 0, adata.var["is_niche_gene"])
    # given the type, log counts follow the company; take the commonest type
    one = (adata.obs["cell_type"] == adata.obs["cell_type"].mode()[0]).to_numpy()
    company = adata.obsm["neighbour_types"][one].to_numpy()
    x = np.log1p(adata.X[one].toarray() / adata.obs["depth"].to_numpy()[one, None] * 3000)
    predicted = company @ effects.to_numpy().T
    strong = (adata.var["is_niche_gene"] & (adata.var["base_log_rate"] > 0)).to_numpy()
    follow = [np.corrcoef(x[:, g], predicted[:, g])[0, 1] for g in np.flatnonzero(strong)]
    assert np.median(follow) > 0.3
    niche = adata.obs["niche"].to_numpy()[one]
    means = pd.DataFrame(x).groupby(niche).mean()
    # what niche genes take of the library all others lose
    means = means.sub(means.loc[:, ~adata.var["is_niche_gene"].to_numpy()].mean(axis=1), axis=0)
    spread = (means.max() - means.min()).to_numpy()
    assert spread[strong].mean() > 1.5 * spread[~adata.var["is_niche_gene"].to_numpy()].mean()


def test_neighbour_types_are_those_of_the_nearest_cells(adata):
    rows = np.flatnonzero(adata.obs["sample"] == "sample0")
    position = adata.obsm["spatial"][rows]
    near = np.argsort(((position - position[0]) ** 2).sum(1))[1:11]
    found = adata.obs["cell_type"].iloc[rows[near]].value_counts(normalize=True)
    stated = adata.obsm["neighbour_types"].iloc[rows[0]]
    assert found.reindex(stated.index).fillna(0).to_numpy() == pytest.approx(stated.to_numpy())


def test_perturbation_effects_follow_the_graph(adata):
    weights = np.zeros((adata.n_vars, adata.n_vars))
    edges = adata.uns["regulation"]
    place = adata.var_names.get_indexer
    weights[place(edges["regulator"]), place(edges["target"])] = edges["weight"]
    effects = adata.varm["perturbation_effects"]
    for name, genes in adata.uns["perturbed_genes"].items():
        push = -2.0 * np.isin(adata.var_names, genes)
        # the change of each gene is its own push and what its regulators pass on
        np.testing.assert_allclose(effects[name], push + weights.T @ effects[name], atol=1e-9)
    assert (effects["control"] == 0).all()
    pair = next(name for name in effects if "+" in name)
    np.testing.assert_allclose(effects[pair], effects[pair.split("+")].sum(axis=1))


def test_perturbed_cells_differ_from_controls_as_stated():
    adata = synthetic_tissues(
        4000, 60, 1, n_types=1, n_batches=1, n_perturbations=2, niche_effect=0, mean_counts=4000, seed=2
    )
    x, depth = adata.X.toarray(), adata.obs["depth"].to_numpy()[:, None]
    control = (adata.obs["perturbation"] == "control").to_numpy()
    name = next(iter(adata.uns["perturbed_genes"]))
    perturbed = (adata.obs["perturbation"] == name).to_numpy()
    change = np.log((x / depth)[perturbed].mean(0) + 1e-4) - np.log((x / depth)[control].mean(0) + 1e-4)
    stated = adata.varm["perturbation_effects"][name].to_numpy()
    assert np.corrcoef(change, stated)[0, 1] > 0.95
    assert change[adata.var_names.get_loc(name)] < -1


def test_targets_follow_the_activity_of_their_regulators_between_cells():
    quiet = {"type_effect": 0.0, "niche_effect": 0.0, "batch_effect": 0.0, "platform_effect": 0.0}
    adata = synthetic_tissues(
        1500, 40, 1, n_types=2, n_perturbations=4, perturbed_share=0.0, regulator_activity=0.7, **quiet
    )
    activity, effects = pd.DataFrame(adata.obsm["regulator_activity"]), pd.DataFrame(adata.varm["regulator_effects"])
    assert activity.to_numpy().std() == pytest.approx(0.7, rel=0.05)
    edge = adata.uns["regulation"].iloc[0]
    assert effects.loc[edge["regulator"], edge["regulator"]] == pytest.approx(1.0)
    shares = np.log(true_shares(adata))
    # a difference of logs is free of the total; the regulator itself changes by its activity, what it does not reach by nothing
    for name in activity:
        alone = effects.index[(effects.drop(columns=name) == 0).all(axis=1)]
        reached, other = alone[effects.loc[alone, name] != 0], alone[effects.loc[alone, name] == 0]
        if len(reached) and len(other):
            difference = shares[reached[0]] - shares[other[0]]
            expected = activity[name] * effects.loc[reached[0], name]
            np.testing.assert_allclose(difference - difference.mean(), expected - expected.mean(), atol=1e-3)
    counts = pd.DataFrame(adata.X.toarray(), adata.obs_names, adata.var_names)
    mean = true_shares(adata).mul(adata.obs["depth"], axis=0)
    np.testing.assert_allclose(counts.mean(), mean.mean(), rtol=0.2, atol=0.1)


def test_dissociated_samples_have_no_position_and_another_platform(adata):
    lost = np.isnan(adata.obsm["spatial"]).all(1)
    np.testing.assert_array_equal(lost, adata.obs["dataset"] == "reference")
    assert set(adata.obs["sample"][lost]) == {"sample2", "sample3"}
    assert set(adata.obs["platform"][lost]) == {"droplet"}


def test_the_seed_decides():
    first, same, other = (synthetic_tissues(60, 20, seed=seed) for seed in (5, np.random.default_rng(5), 6))
    assert (first.X != same.X).nnz == 0
    assert (first.X != other.X).nnz > 0
    pd.testing.assert_frame_equal(first.obs, same.obs)


def test_real_gene_names():
    symbols = synthetic_tissues(20, 30, gene_names="symbol").var_names
    ids = synthetic_tissues(20, 30, gene_names="ensembl").var_names
    assert symbols.is_unique
    assert map_genes(symbols).mapped.tolist() == ids.tolist()


def test_the_model_takes_them():
    adata = synthetic_tissues(200, 30, 3, n_dissociated=1, n_panel_genes=15)
    CellPLM.setup_anndata(
        adata,
        batch_key="batch",
        dataset_key="dataset",
        sample_key="sample",
        spatial_key="spatial",
        perturbation_key="perturbation",
        measured_genes_key="measured_genes",
    )
    model = CellPLM(adata, n_hidden=16, n_latent=4, n_layers=1)
    model.train(max_epochs=1, accelerator="cpu", devices=1, enable_progress_bar=False)
    assert np.isfinite(model.get_latent_representation()).all()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        pytest.param({"n_cells": 2, "n_samples": 3}, "a cell for each of n_samples=3", id="more samples than cells"),
        pytest.param({"n_niches": 0}, "n_niches=0 must be a positive", id="niches"),
        pytest.param({"n_batches": 0}, "n_batches=0 must be a positive", id="batches"),
        pytest.param({"n_types": 0}, "n_types=0 must be a positive", id="types"),
        pytest.param({"rare_share": 0.0}, "rare_share=0.0 is not a share", id="rare share"),
        pytest.param({"n_dissociated": 5}, "not between 0 and the 4 samples", id="dissociated"),
        pytest.param({"n_panel_genes": 201}, "not between 1 and the 200 genes", id="panel"),
        pytest.param({"n_perturbations": 51}, "a quarter, 50", id="perturbations"),
        pytest.param({"n_perturbations": 3, "n_pairs": 4}, "make 3 pairs", id="pairs"),
        pytest.param({"gene_names": "entrez"}, 'gene_names="entrez"', id="names"),
    ],
)
def test_impossible_sizes(arguments, message):
    with pytest.raises(ValueError, match=message):
        synthetic_tissues(**arguments)


def test_true_shares_are_of_all_genes():
    adata = synthetic_tissues(60, 20, 2)
    assert true_shares(adata[:30].copy()).shape == (30, 20)
    with pytest.raises(ValueError, match="of 20 genes, 5 are left"):
        true_shares(adata[:, :5].copy())
    with pytest.raises(ValueError, match="these are not"):
        true_shares(AnnData(np.ones((3, 4))))


@pytest.mark.parametrize(
    "wrong",
    [
        {"perturbed_share": -0.5},
        {"perturbed_share": 1.5},
        {"mean_counts": -1},
        {"mean_counts": float("nan")},
        {"inverse_dispersion": 0},
        {"type_effect": -1},
        {"regulator_activity": -1},
    ],
)
def test_numbers_that_cannot_be(wrong):
    with pytest.raises(ValueError, match=f"{next(iter(wrong))}="):
        synthetic_tissues(50, 20, 1, **wrong)
