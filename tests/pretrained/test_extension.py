"""Published models are trained further, and queries are mapped onto them."""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
import pytest
import torch
from anndata import AnnData

from cellplm_scvi import CellPLM
from cellplm_scvi.pretrained import read_published

CPU: dict[str, Any] = {"accelerator": "cpu", "batch_key": "donor"}


@pytest.fixture
def new_data(mixture_case) -> AnnData:
    """50 of the model's genes and 3 others, in two donors."""
    genes = read_published(mixture_case.config_path, mixture_case.checkpoint_path).genes
    rng = np.random.default_rng(0)
    adata = AnnData(rng.poisson(1.0, (60, 53)).astype(np.float32))
    adata.var_names = ["new1", *genes[:50], "new2", "new3"]
    adata.obs["donor"] = np.where(np.arange(60) % 2, "a", "b")
    return adata


def test_added_categories_start_as_zero_shot(mixture_case, new_data):
    zero_shot = CellPLM.from_pretrained(mixture_case.prefix, new_data.copy(), **CPU)
    grown = CellPLM.from_pretrained(mixture_case.prefix, new_data, new_categories="add", **CPU)
    np.testing.assert_array_equal(grown.get_latent_representation(), zero_shot.get_latent_representation())
    np.testing.assert_allclose(grown.get_normalized_expression(), zero_shot.get_normalized_expression(), rtol=1e-5)
    mapping = grown.registry["field_registries"]["batch"]["state_registry"]["categorical_mapping"]
    assert list(mapping[-2:]) == ["a", "b"]


def test_added_genes_change_no_embedding_before_training(mixture_case, new_data, train, tmp_path):
    zero_shot = CellPLM.from_pretrained(mixture_case.prefix, new_data.copy(), **CPU)
    grown = CellPLM.from_pretrained(mixture_case.prefix, new_data, new_categories="add", new_genes="add", **CPU)
    np.testing.assert_allclose(grown.get_latent_representation(), zero_shot.get_latent_representation(), atol=1e-6)
    before = {name: p.detach().clone() for name, p in grown.module.named_parameters()}
    train(grown, max_epochs=2)
    assert (grown.module.embedder.weight[60:] != before["embedder.weight"][60:]).any(1).all()
    grown.save_pretrained(tmp_path / "grown")
    again = CellPLM.from_pretrained(tmp_path / "grown", new_data.copy(), accelerator="cpu")
    np.testing.assert_array_equal(again.get_latent_representation(), grown.get_latent_representation())
    np.testing.assert_array_equal(again.get_normalized_expression(), grown.get_normalized_expression())
    grown.save(str(tmp_path / "saved"))
    loaded = CellPLM.load(str(tmp_path / "saved"), adata=new_data.copy(), accelerator="cpu")
    np.testing.assert_array_equal(loaded.get_normalized_expression(), grown.get_normalized_expression())


@pytest.mark.parametrize("freeze", ["embedder", "encoder", "backbone"])
def test_freezing(mixture_case, new_data, train, freeze):
    grown = CellPLM.from_pretrained(mixture_case.prefix, new_data, new_categories="add", **CPU)
    before = {name: p.detach().clone() for name, p in grown.module.named_parameters()}
    train(grown, freeze=freeze, plan_kwargs={"layer_decay": 0.5, "weight_decay": 0.1})
    changed = {name for name, p in grown.module.named_parameters() if not torch.equal(p, before[name])}
    assert "decoder.layers.0.codes.batch.weight" in changed
    assert "decoder.weight" in changed
    assert ("encoder.layers.0.norm_attention.weight" in changed) == (freeze == "embedder")
    assert ("latent.hidden.weight" in changed) == (freeze != "backbone")
    assert ("decoder.layers.0.linear.weight" in changed) == (freeze != "backbone")
    assert not any(name.startswith("embedder.") for name in changed)


def test_a_query_trains_its_codes_alone(mixture_case, new_data, train):
    query = CellPLM.load_query_data(new_data, mixture_case.prefix, **CPU)
    before = {name: p.detach().clone() for name, p in query.module.named_parameters()}
    train(query, max_epochs=2)
    changed = {name for name, p in query.module.named_parameters() if not torch.equal(p, before[name])}
    assert changed == {"decoder.layers.0.codes.batch.weight"}


def test_a_checkpoint_without_a_decoder(annotation_case, new_data):
    genes = read_published(annotation_case.config_path, annotation_case.checkpoint_path).genes
    new_data.var_names = [*genes[:50], "new1", "new2", "new3"]
    with pytest.raises(ValueError, match="has no decoder"):
        CellPLM.from_pretrained(annotation_case.prefix, new_data, new_categories="add", **CPU)


def test_data_without_batches_are_no_new_batch(mixture_case: Any, published_data: AnnData) -> None:
    """The column that stands for no column is not added, and nothing is said of it."""
    with pytest.raises(ValueError, match="set up without batch_key"):
        CellPLM.load_query_data(published_data.copy(), mixture_case.prefix, accelerator="cpu")
    mean = CellPLM.from_pretrained(mixture_case.prefix, published_data.copy(), accelerator="cpu")
    published_data.obs["study"] = "new"
    keys = {"dataset_key": "study", "new_categories": "add", "accelerator": "cpu"}
    grown = CellPLM.from_pretrained(mixture_case.prefix, published_data, **keys)
    assert grown._extension.steps == [{"dataset": 1}]
    np.testing.assert_allclose(grown.get_normalized_expression(), mean.get_normalized_expression(), rtol=1e-5)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="The model has no contribution of its own")
        mean.train(1, accelerator="cpu", enable_progress_bar=False)
