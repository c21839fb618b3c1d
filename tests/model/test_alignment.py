"""The embedding has its batches aligned, and everything else takes it as the encoder gives it."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from cellplm_scvi import CellPLM
from cellplm_scvi.module import _module


@pytest.fixture(scope="module")
def model(make_tissues, build, train) -> CellPLM:
    return train(build(make_tissues(180, 30, 4)), max_epochs=3)


def test_embeddings_are_aligned_by_default(model):
    aligned, plain = model.get_latent_representation(), model.get_latent_representation(align_batches=False)
    assert aligned.dtype == plain.dtype == np.float32
    mean, variance = model.get_latent_representation(return_dist=True)
    np.testing.assert_array_equal(mean, aligned)
    np.testing.assert_array_equal(variance, model.get_latent_representation(return_dist=True, align_batches=False)[1])
    batch = model.adata.obs["batch"].to_numpy()

    def apart(z: np.ndarray) -> float:
        return float(np.linalg.norm(z[batch == "batch0"].mean(0) - z[batch == "batch1"].mean(0)))

    assert apart(aligned) < 0.5 * apart(plain)


def test_rows_and_copies_are_embedded_alike(model):
    z = model.get_latent_representation()
    rows = np.random.default_rng(0).permutation(180)
    np.testing.assert_allclose(model.get_latent_representation(indices=rows[:50]), z[rows[:50]], atol=1e-5)
    other = model.adata[rows].copy()
    np.testing.assert_allclose(model.get_latent_representation(other), z[rows], atol=1e-5)
    np.testing.assert_array_equal(model.get_latent_representation(), z)  # nothing was changed in place


@pytest.mark.parametrize("way", ["save", "save_pretrained"])
def test_saved_models_know_it(model, tmp_path, way):
    z = model.get_latent_representation()
    getattr(model, way)(str(tmp_path / "model"))
    if way == "save":
        again = CellPLM.load(str(tmp_path / "model"), model.adata.copy(), accelerator="cpu")
    else:
        again = CellPLM.from_pretrained(tmp_path / "model", model.adata.copy(), accelerator="cpu")
    np.testing.assert_array_equal(again.get_latent_representation(), z)


def test_cells_of_unknown_batches_stay(model):
    other = model.adata.copy()
    other.obs["batch"] = other.obs["batch"].astype(str) + " of another study"
    with pytest.warns(UserWarning, match="has not seen"):
        z = model.get_latent_representation(other)
    np.testing.assert_allclose(z, model.get_latent_representation(align_batches=False), atol=1e-6)


@pytest.mark.parametrize(
    "keys", [{"batch_key": None, "sample_key": "sample"}, {"batch_key": "one"}], ids=["no key", "one batch"]
)
def test_without_batches_there_is_nothing_to_align(make_tissues, build, train, keys):
    adata = make_tissues()
    adata.obs["one"] = "one"
    model = train(build(adata, keys))
    np.testing.assert_array_equal(
        model.get_latent_representation(), model.get_latent_representation(align_batches=False)
    )


def test_a_query_stays_where_it_is_beside_the_aligned_reference(model, make_tissues, train):
    z = model.get_latent_representation()
    new = make_tissues(120, 30, 2, seed=5)
    new.obs["batch"] = "new"
    query = train(CellPLM.load_query_data(new, model, accelerator="cpu"))
    np.testing.assert_array_equal(
        query.get_latent_representation(), query.get_latent_representation(align_batches=False)
    )
    np.testing.assert_array_equal(query.get_latent_representation(model.adata.copy()), z)


def test_training_on_fits_it_again_and_a_frozen_backbone_leaves_it(make_tissues, build, train):
    model = train(build(make_tissues(180, 30, 4)))
    first = model.module.alignment.centre.clone()
    z = model.get_latent_representation()
    train(model, freeze="backbone")
    np.testing.assert_array_equal(model.get_latent_representation(), z)
    train(model)
    assert model.module.alignment.fitted
    assert not torch.equal(model.module.alignment.centre, first)


def test_very_many_batches_are_not_aligned(make_tissues, build, train, monkeypatch):
    monkeypatch.setattr(_module, "MAX_ALIGNED", 4)
    model = train(build(make_tissues()))
    assert model.module.alignment is None
    np.testing.assert_array_equal(
        model.get_latent_representation(), model.get_latent_representation(align_batches=False)
    )
