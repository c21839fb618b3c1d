"""The embedding has its batches aligned, and everything else takes it as the encoder gives it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from lightning.pytorch import Callback
from scvi.train import SaveCheckpoint

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


class Interrupted(Callback):
    def on_train_epoch_end(self, *args: object) -> None:
        raise RuntimeError("enough")


@pytest.mark.parametrize("freeze", [None, "embedder", "encoder"])
def test_an_interrupted_training_leaves_none_and_it_can_be_fitted_afterwards(make_tissues, build, train, freeze):
    """That of the training before does not fit the weights any more."""
    model = train(build(make_tissues(180, 30, 4)))
    with pytest.raises(RuntimeError, match="enough"):
        train(model, callbacks=[Interrupted()], freeze=freeze)
    plain = model.get_latent_representation(align_batches=False)
    np.testing.assert_array_equal(model.get_latent_representation(), plain)
    model.align_batches()
    assert np.abs(model.get_latent_representation() - plain).max() > 1e-3


def test_what_does_not_change_the_embedding_leaves_it(make_tissues, build, train):
    model = train(build(make_tissues(180, 30, 4)))
    z = model.get_latent_representation()
    with pytest.raises(RuntimeError, match="enough"):
        train(model, callbacks=[Interrupted()], freeze="backbone")
    with pytest.raises(TypeError, match="nonsense"):
        train(model, nonsense=1)
    np.testing.assert_array_equal(model.get_latent_representation(), z)


def test_a_checkpoint_is_aligned_as_the_model_that_has_its_weights(make_tissues, build, train, tmp_path):
    model = build(make_tissues(180, 30, 4))
    for folder in ("first", "second"):
        saving = SaveCheckpoint(str(tmp_path / folder), monitor="elbo_validation", load_best_on_end=True)
        train(model, callbacks=[saving], check_val_every_n_epoch=1, enable_checkpointing=True)
        (path,) = Path(tmp_path / folder).iterdir()
        loaded = CellPLM.load(str(path), model.adata.copy(), accelerator="cpu")
        plain = loaded.get_latent_representation(align_batches=False)
        np.testing.assert_array_equal(loaded.get_latent_representation(), plain)
        np.testing.assert_array_equal(plain, model.get_latent_representation(align_batches=False))
        loaded.align_batches()
        np.testing.assert_allclose(loaded.get_latent_representation(), model.get_latent_representation(), atol=1e-5)


def test_batches_that_are_not_in_the_data_of_further_training_are_named(make_tissues, build, train):
    adata = make_tissues(180, 30, 4)
    model = train(build(adata))
    part = adata[adata.obs["batch"] == "batch0"].copy()
    further = CellPLM.from_pretrained(model, part, accelerator="cpu")
    with pytest.warns(UserWarning, match='"batch0", "batch1" were aligned and now stay'):
        train(further)
    z = further.get_latent_representation(adata.copy())
    np.testing.assert_array_equal(z, further.get_latent_representation(adata.copy(), align_batches=False))


def test_batches_added_to_a_model_of_one_are_aligned(make_tissues, build, train, tmp_path):
    adata = make_tissues(180, 30, 4)
    model = train(build(adata[adata.obs["batch"] == "batch0"].copy()))
    grown = train(CellPLM.from_pretrained(model, adata.copy(), new_categories="add", accelerator="cpu"))
    z = grown.get_latent_representation()
    assert np.abs(z - grown.get_latent_representation(align_batches=False)).max() > 1e-3
    grown.save(str(tmp_path / "grown"))
    again = CellPLM.load(str(tmp_path / "grown"), adata.copy(), accelerator="cpu")
    np.testing.assert_array_equal(again.get_latent_representation(), z)


def test_what_cannot_be_aligned(make_tissues, build, train, model, tmp_path):
    with pytest.raises(ValueError, match="no batches to align"):
        train(build(make_tissues(), {"sample_key": "sample", "batch_key": None})).align_batches()
    model.save(str(tmp_path / "model"))
    with pytest.raises(ValueError, match="no AnnData whose batches"):
        CellPLM.load(str(tmp_path / "model"), adata=False, accelerator="cpu").align_batches()
