"""What an embedding depends on, and what it does not (interleaved samples, with and without coordinates)."""

from __future__ import annotations

from typing import Any

import anndata
import numpy as np
import pytest
import scipy.sparse as sp
import scvi
import torch
from anndata import AnnData
from hypothesis import given, settings
from hypothesis import strategies as st

from cellplm_scvi import CellPLM

TOLERANCE = {"rtol": 1e-4, "atol": 2e-5}


def embed(model: CellPLM, adata: AnnData | None = None, **kwargs: Any) -> np.ndarray:
    return np.asarray(model.get_latent_representation(adata, **kwargs))


@pytest.fixture(params=["dissociated", "dissociated-sliced", "spatial", "spatial-sliced"])
def model(request, models, clone) -> CellPLM:
    """A trained model; "sliced": its samples exceed the largest context."""
    kind, _, sliced = request.param.partition("-")
    if not sliced:
        return models[kind]
    model = clone(models[kind])
    model.module.max_context = 12
    return model


def test_embeddings_are_finite_and_tell_cells_apart(model):
    z = embed(model)
    assert z.shape == (model.adata.n_obs, 4)
    assert z.dtype == np.float32
    assert np.isfinite(z).all()
    assert len(np.unique(z.round(4), axis=0)) > 0.9 * len(z)


def test_two_calls_are_equal(model):
    np.testing.assert_array_equal(embed(model), embed(model))


@settings(max_examples=8)
@given(seed=st.integers(0, 2**32 - 1))
def test_indices_do_not_matter(model, seed):
    rng = np.random.default_rng(seed)
    n = model.adata.n_obs
    rows = rng.choice(n, size=rng.integers(1, n + 10), replace=True)
    np.testing.assert_allclose(embed(model, indices=rows), embed(model)[rows], **TOLERANCE)


def test_masks_and_negative_indices(model):
    z = embed(model)
    mask = np.arange(len(z)) % 3 == 0
    np.testing.assert_allclose(embed(model, indices=mask), z[mask], **TOLERANCE)
    np.testing.assert_allclose(embed(model, indices=[-1, 0]), z[[-1, 0]], **TOLERANCE)
    assert embed(model, indices=[]).shape == (0, 4)


@settings(max_examples=8)
@given(batch_size=st.integers(1, 200))
def test_batch_size_and_packing_do_not_matter(model, batch_size):
    np.testing.assert_allclose(embed(model, batch_size=batch_size), embed(model), **TOLERANCE)


@settings(max_examples=5)
@given(seed=st.integers(0, 2**32 - 1))
def test_permuting_cells_permutes_the_embedding(model, seed):
    order = np.random.default_rng(seed).permutation(model.adata.n_obs)
    np.testing.assert_allclose(embed(model, model.adata[order].copy()), embed(model)[order], **TOLERANCE)


def test_other_samples_do_not_matter(model):
    z = embed(model)
    for name in model.adata.obs["sample"].cat.categories:
        rows = np.flatnonzero(model.adata.obs["sample"] == name)
        np.testing.assert_allclose(embed(model, model.adata[rows].copy()), z[rows], **TOLERANCE)


def test_other_cells_of_the_sample_do_matter(models):
    for model in models.values():
        rows = np.flatnonzero(model.adata.obs["sample"] == "sample0")
        alone = embed(model, model.adata[rows[:5]].copy())
        assert np.abs(alone - embed(model)[rows[:5]]).max() > 1e-3


def test_samples_without_a_target_are_not_needed(model):
    """Whatever is asked for, samples are embedded whole: a sample of one cell included."""
    single = np.flatnonzero(model.adata.obs["sample"] == "sample3")
    assert single.size == 1
    np.testing.assert_allclose(embed(model, indices=single), embed(model)[single], **TOLERANCE)
    np.testing.assert_allclose(embed(model, model.adata[single].copy()), embed(model)[single], **TOLERANCE)


@pytest.mark.parametrize(
    "form",
    [sp.csc_matrix, sp.csr_array, sp.csc_array, lambda x: x.toarray(), lambda x: x.astype(np.int64)],
    ids=["csc_matrix", "csr_array", "csc_array", "dense", "int64"],
)
def test_the_form_of_the_matrix_does_not_matter(model, form):
    adata = model.adata.copy()
    adata.X = form(adata.X)
    np.testing.assert_allclose(embed(model, adata), embed(model), **TOLERANCE)


def test_a_view_gives_the_same_numbers(model):
    view = model.adata[model.adata.obs["sample"] == "sample0"]
    expected = embed(model)[(model.adata.obs["sample"] == "sample0").to_numpy()]
    np.testing.assert_allclose(embed(model, view), expected, **TOLERANCE)


@pytest.mark.parametrize("dense", [False, True])
def test_backed_data_give_the_same_numbers(model, tmp_path, dense):
    adata = model.adata.copy()
    adata.uns.clear()
    adata.X = adata.X.toarray() if dense else adata.X
    adata.write_h5ad(tmp_path / "cells.h5ad")
    backed = anndata.read_h5ad(tmp_path / "cells.h5ad", backed="r")
    assert backed.isbacked
    np.testing.assert_allclose(embed(model, backed), embed(model), **TOLERANCE)


def test_genes_in_another_order_give_the_same_numbers(model):
    order = np.random.default_rng(0).permutation(model.adata.n_vars)
    np.testing.assert_allclose(embed(model, model.adata[:, order].copy()), embed(model), **TOLERANCE)


def test_explicit_zeros_and_unsummed_entries_do_not_matter(model):
    adata = model.adata.copy()
    x = adata.X.tocoo()
    rows = np.concatenate([x.row, x.row, [0, 0]])
    columns = np.concatenate([x.col, x.col, [3, 4]])
    values = np.concatenate([x.data - 1, np.ones_like(x.data), [0, 0]]).astype(np.float32)
    by_row = np.argsort(rows, kind="stable")
    offsets = np.concatenate([[0], np.cumsum(np.bincount(rows, minlength=adata.n_obs))])
    adata.X = sp.csr_matrix((values[by_row], columns[by_row], offsets), shape=adata.shape)
    assert not adata.X.has_canonical_format
    np.testing.assert_allclose(embed(model, adata), embed(model), **TOLERANCE)
    np.testing.assert_allclose(
        model.get_elbo(adata, return_mean=False), model.get_elbo(return_mean=False), rtol=1e-3, atol=1e-2
    )


@settings(max_examples=8)
@given(
    angle=st.floats(0, 2 * np.pi),
    mirror=st.booleans(),
    shift=st.tuples(st.floats(-1e3, 1e3), st.floats(-1e3, 1e3)),
    scale=st.floats(0.01, 100),
)
def test_shift_rotation_mirror_and_unit_of_a_section_do_not_matter(spatial_model, angle, mirror, shift, scale):
    turn = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    if mirror:
        turn[:, 0] *= -1
    moved = spatial_model.adata.copy()
    moved.obsm["spatial"] = scale * moved.obsm["spatial"] @ turn.T + np.array(shift)
    np.testing.assert_allclose(embed(spatial_model, moved), embed(spatial_model), rtol=1e-3, atol=1e-4)


def test_positions_do_matter(spatial_model):
    mixed = spatial_model.adata.copy()
    mixed.obsm["spatial"] = np.random.default_rng(0).permutation(mixed.obsm["spatial"])
    assert np.abs(embed(spatial_model, mixed) - embed(spatial_model)).max() > 1e-3


@pytest.mark.parametrize("position", ["fourier", "sinusoidal"])
def test_absolute_positions_do_matter_but_not_their_unit(make_tissues, build, train, position):
    model = train(build(make_tissues(spatial=True), position=position))
    moved = model.adata.copy()
    moved.obsm["spatial"] = moved.obsm["spatial"] * 8.0 + 64.0
    np.testing.assert_allclose(embed(model, moved), embed(model), rtol=1e-3, atol=1e-3)
    moved.obsm["spatial"] = np.random.default_rng(0).permutation(moved.obsm["spatial"])
    assert np.abs(embed(model, moved) - embed(model)).max() > 1e-3


@pytest.mark.parametrize("position", ["local", "fourier", "sinusoidal", "none"])
def test_a_missing_key_means_the_same_as_rows_of_nan(make_tissues, build, train, position):
    model = train(build(make_tissues(spatial=True), position=position))
    nowhere, keyless = model.adata.copy(), model.adata.copy()
    nowhere.obsm["spatial"] = np.full_like(nowhere.obsm["spatial"], np.nan)
    del keyless.obsm["spatial"]
    with pytest.warns(UserWarning, match=r'no obsm\["spatial"\]: its cells have no position'):
        found = embed(model, keyless)
    np.testing.assert_allclose(found, embed(model, nowhere), **TOLERANCE)


def test_cells_without_position_do_not_depend_on_positions_elsewhere(spatial_model):
    """A dissociated sample is embedded alike alone and beside a section."""
    adata = spatial_model.adata.copy()
    loose = (adata.obs["sample"] == "sample1").to_numpy()
    adata.obsm["spatial"][loose] = np.nan
    together = embed(spatial_model, adata)[loose]
    np.testing.assert_allclose(embed(spatial_model, adata[loose].copy()), together, **TOLERANCE)


def places(name: str) -> np.ndarray:
    """64 places on a square or hexagonal grid, or few that cells share."""
    i, j = np.divmod(np.arange(64), 8)
    if name == "shared":
        return np.random.default_rng(0).normal(size=(8, 2))[j]
    return np.stack([i, j] if name == "square" else [0.75**0.5 * i, j + 0.5 * (i % 2)], 1).astype(float)


@pytest.mark.parametrize("layout", ["square", "hexagonal", "shared"])
@pytest.mark.parametrize(
    "sizes", [{"n_neighbours": 6}, {"n_neighbours": 4, "n_niche": 4}, {"n_neighbours": 10, "max_context": 20}]
)
def test_neither_rows_nor_frame_nor_unit_of_a_grid_matter(make_tissues, build, train, layout, sizes):
    adata = make_tissues(64, n_samples=1, spatial=True)
    adata.obsm["spatial"] = places(layout)
    model = train(build(adata, **sizes))
    z = embed(model)
    order = np.random.default_rng(0).permutation(64)
    np.testing.assert_allclose(embed(model, model.adata[order].copy()), z[order], **TOLERANCE)
    for turn in ([[-1, 0], [0, 1]], [[0, 1], [-1, 0]], [[0.6, 0.8], [-0.8, 0.6]], [[1000, 0], [0, 1000]]):
        moved = model.adata.copy()
        moved.obsm["spatial"] = moved.obsm["spatial"] @ np.array(turn)
        np.testing.assert_allclose(embed(model, moved), z, **TOLERANCE)
    renamed = model.adata.copy()
    renamed.obs_names = [f"{name}-{n * 7 % 64}" for n, name in enumerate(renamed.obs_names)]
    np.testing.assert_allclose(embed(model, renamed), z, **TOLERANCE)


@pytest.mark.parametrize("position", ["local", "none"])
def test_cells_are_marked_for_having_no_position_not_for_having_no_neighbour(make_tissues, build, train, position):
    """An MLP sees one cell at a time; with one cell a sample there are no neighbours either."""
    adata = make_tissues(20, n_samples=1, spatial=True)
    adata.obsm["spatial"][10:] = np.nan
    adata.obs["sample"] = [f"sample{i}" for i in range(20)]
    model = train(build(adata, encoder="mlp", position=position))
    torch.nn.init.normal_(model.module.position.no_position)
    nowhere = model.adata.copy()
    nowhere.obsm["spatial"][:] = np.nan
    changed = np.abs(embed(model, nowhere) - embed(model)).max(1)
    assert changed[:10].min() > 1e-3
    np.testing.assert_allclose(changed[10:], 0, atol=1e-5)


def test_cells_seen_over_the_border_of_a_tile_have_a_position(make_tissues, build, train):
    """Without global attention, one layer embeds a cell by its neighbours: tiles change nothing."""
    adata = make_tissues(60, n_samples=1, spatial=True)
    # the nearest of each is the one before it, whose own nearest may lie outside of the tile
    adata.obsm["spatial"] = 1.1 ** np.arange(60)[:, None] * [1.0, 0.0]
    model = train(build(adata, encoder="mlp", n_layers=1, n_neighbours=1, n_niche=0))
    torch.nn.init.normal_(model.module.position.no_position)
    whole = embed(model)
    model.module.max_context = 15
    np.testing.assert_allclose(embed(model), whole, **TOLERANCE)


@pytest.mark.parametrize("encoder", ["flow", "softmax"])
@pytest.mark.parametrize("latent", ["mixture", "gaussian", "deterministic"])
def test_the_same_seed_gives_the_same_model(make_tissues, build, train, encoder, latent):
    adata = make_tissues(60, 16)

    def once(seed: int) -> np.ndarray:
        scvi.settings.seed = seed
        return embed(train(build(adata, encoder=encoder, latent=latent), max_epochs=2))

    first, second, other = once(1), once(1), once(2)
    np.testing.assert_array_equal(first, second)
    assert np.abs(first - other).max() > 1e-3


def test_results_leave_the_random_generators_as_they_were(dissociated_model):
    torch.manual_seed(3)
    np.random.seed(3)  # noqa: NPY002
    expected = torch.rand(2), np.random.random()  # noqa: NPY002
    torch.manual_seed(3)
    np.random.seed(3)  # noqa: NPY002
    dissociated_model.get_latent_representation()
    dissociated_model.get_elbo()
    dissociated_model.posterior_predictive_sample(indices=[0])
    dissociated_model.get_normalized_expression(n_samples=2)
    dissociated_model.differential_expression(groupby="batch", group1="batch0", group2="batch1", silent=True)
    np.testing.assert_array_equal(torch.rand(2), expected[0])
    assert np.random.random() == expected[1]  # noqa: NPY002


def test_the_mlp_sees_one_cell_at_a_time(make_tissues, build, train):
    model = train(build(make_tissues(60, 16), encoder="mlp"))
    some = model.adata[::7].copy()
    np.testing.assert_allclose(embed(model, some), embed(model)[::7], **TOLERANCE)
