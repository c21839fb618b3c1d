"""Training goes on from trained and pre-trained weights, on data with new genes and new categories."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from anndata import AnnData

from cellplm_scvi import CellPLM

ADD: dict[str, Any] = {"accelerator": "cpu", "new_categories": "add", "new_genes": "add"}


@pytest.fixture
def new_data(make_tissues: Callable[..., AnnData]) -> AnnData:
    """30 genes that the models know and 4 that they do not; a known and a new batch; a new study."""
    adata = make_tissues(60, 34, seed=4, spatial=True)
    adata.obs["batch"] = np.where(np.arange(60) < 40, "new", "batch0")
    adata.obs["study"] = "three"
    return adata


@pytest.fixture(params=["dissociated", "spatial"])
def model(request, models) -> CellPLM:
    return models[request.param]


def test_added_categories_start_at_the_mean_contribution(model, new_data):
    same_genes = new_data[:, :30].copy()
    zero_shot = CellPLM.from_pretrained(model, same_genes.copy(), accelerator="cpu")
    grown = CellPLM.from_pretrained(model, same_genes, new_categories="add", accelerator="cpu")
    np.testing.assert_array_equal(grown.get_latent_representation(), zero_shot.get_latent_representation())
    np.testing.assert_allclose(grown.get_normalized_expression(), zero_shot.get_normalized_expression(), rtol=1e-5)
    names = grown.registry["field_registries"]["batch"]["state_registry"]["categorical_mapping"]
    assert list(names) == ["batch0", "batch1", "new"]
    assert any("1 batch category added" in note for note in grown.pretrained_report.notes)


def test_an_unseen_category_still_gets_the_mean_of_the_first_ones(model, new_data, train):
    grown = train(CellPLM.from_pretrained(model, new_data[:, :30].copy(), new_categories="add", accelerator="cpu"))
    for decoder in grown.module.decoders:
        for table in decoder.tables("batch"):
            unseen = table(torch.tensor([17, -1]))
            np.testing.assert_allclose(unseen.detach(), table.base.weight.mean(0).detach().expand(2, -1), atol=1e-7)
            assert not torch.equal(table(torch.tensor([2])), unseen[:1])


def test_what_a_model_knew_of_genes_is_kept_to_the_bit(model, new_data):
    grown = CellPLM.from_pretrained(model, new_data, **ADD)
    old, new = model.module, grown.module
    assert torch.equal(new.embedder.weight[:30], old.embedder.weight)
    assert (new.embedder.weight[30:] == 0).all()
    for before, after in zip(old.decoders, new.decoders, strict=True):
        for name in ("weight", "bias", "log_theta"):
            assert torch.equal(getattr(after, name)[:30], getattr(before, name))
            assert getattr(after, name).shape[0] == 34
    kept = dict(new.named_parameters())
    for name, parameter in old.named_parameters():
        if parameter.shape[:1] != (30,):
            in_table = name.replace(".weight", ".base.weight")
            assert torch.equal(kept[in_table if in_table in kept else name], parameter), name


def test_added_genes_start_at_their_share_of_the_counts(model, new_data):
    grown = CellPLM.from_pretrained(model, new_data, **ADD)
    expected = grown.get_normalized_expression().mean(0)[-4:]
    totals = np.asarray(new_data.X.sum(0)).ravel()
    np.testing.assert_allclose(expected, totals[-4:] / totals.sum(), rtol=0.25)
    assert list(grown.get_normalized_expression().columns) == list(new_data.var_names)
    assert any("4 genes added" in note for note in grown.pretrained_report.notes)


def test_added_genes_and_categories_learn(model, new_data, train):
    grown = CellPLM.from_pretrained(model, new_data, **ADD)
    before = {name: p.clone() for name, p in grown.module.named_parameters()}
    train(grown, max_epochs=3)
    after = dict(grown.module.named_parameters())
    assert (after["embedder.weight"][30:] != 0).any(1).all()
    for name in ("decoder.codes.batch.weight", "decoder.output_codes.dataset.weight", "decoder.weight"):
        assert not torch.equal(after[name], before[name])
    assert len(grown.history["train_loss"]) == 3


@pytest.mark.parametrize("way", ["save", "save_pretrained"])
def test_a_grown_and_trained_model_is_saved_and_loaded(model, new_data, train, tmp_path, way):
    grown = train(CellPLM.from_pretrained(model, new_data, **ADD))
    getattr(grown, way)(str(tmp_path / "model"))
    if way == "save":
        again = CellPLM.load(str(tmp_path / "model"), adata=new_data.copy(), accelerator="cpu")
    else:
        again = CellPLM.from_pretrained(tmp_path / "model", new_data.copy(), accelerator="cpu")
    np.testing.assert_array_equal(again.get_latent_representation(), grown.get_latent_representation())
    np.testing.assert_array_equal(again.get_normalized_expression(), grown.get_normalized_expression())


def test_a_model_grows_twice(model, new_data, train, tmp_path):
    grown = train(CellPLM.from_pretrained(model, new_data, **ADD))
    third = new_data.copy()
    third.obs["batch"] = "third"
    twice = CellPLM.from_pretrained(grown, third, **ADD)
    zero_shot = CellPLM.from_pretrained(grown, third.copy(), accelerator="cpu")
    np.testing.assert_allclose(twice.get_normalized_expression(), zero_shot.get_normalized_expression(), rtol=1e-5)
    twice.save_pretrained(tmp_path / "twice")
    again = CellPLM.from_pretrained(tmp_path / "twice", third.copy(), accelerator="cpu")
    np.testing.assert_array_equal(again.get_normalized_expression(), twice.get_normalized_expression())


def test_the_model_that_another_grows_from_stays_as_it_is(model, new_data, train):
    before = {name: tensor.clone() for name, tensor in model.module.state_dict().items()}
    setup = dict(model.registry["setup_args"])
    train(CellPLM.from_pretrained(model, new_data, layer=None, **ADD))
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.module.state_dict().items())
    assert model.registry["setup_args"] == setup


def test_a_covariate_that_the_model_was_built_without(make_tissues, build, train, new_data):
    model = train(build(make_tissues(), {"batch_key": None, "platform_key": None, "dataset_key": None}))
    grown = CellPLM.from_pretrained(model, new_data, batch_key="batch", platform_key="platform", **ADD)
    np.testing.assert_array_equal(
        grown.get_latent_representation(model.adata.copy()), model.get_latent_representation()
    )
    train(grown)
    assert (grown.module.decoder.codes["platform"].weight != 0).any()
    assert grown.module.decoder.codes["batch"].weight.shape[0] == 2


def test_data_without_a_covariate_of_the_model(model, new_data, train, tmp_path):
    del new_data.obs["platform"]
    grown = train(CellPLM.from_pretrained(model, new_data, platform_key=None, **ADD))
    grown.save_pretrained(tmp_path / "grown")
    again = CellPLM.from_pretrained(tmp_path / "grown", new_data.copy(), accelerator="cpu")
    np.testing.assert_array_equal(again.get_normalized_expression(), grown.get_normalized_expression())


def test_nothing_anneals_or_moves_again(model, new_data, train):
    grown = CellPLM.from_pretrained(model, new_data, **ADD)
    components = grown.module.latent.raw_mean.clone()
    train(grown, plan_kwargs={"lr": 1e-12})
    np.testing.assert_allclose(grown.module.latent.raw_mean.detach(), components.detach(), atol=1e-6)
    assert grown.trainer.lightning_module.kl_weight == 1.0


def test_a_loaded_model_is_trained_with_masking_and_dropout(model, new_data, monkeypatch, train):
    grown = CellPLM.from_pretrained(model, new_data, **ADD)
    modes = []
    encode = type(grown.module).encode

    def noted(self: torch.nn.Module, tensors: Any) -> Any:
        if torch.is_grad_enabled():
            modes.append(self.training)
        return encode(self, tensors)

    monkeypatch.setattr(type(grown.module), "encode", noted)
    train(grown, train_size=1.0)
    assert modes
    assert all(modes)


def test_training_with_categories_that_were_not_added_is_warned_about(model, new_data, train):
    zero_shot = CellPLM.from_pretrained(model, new_data, accelerator="cpu")
    with pytest.warns(UserWarning, match='no contribution of its own for batch "new"; dataset "three"'):
        train(zero_shot)


def test_wrong_words(model, new_data):
    with pytest.raises(ValueError, match='new_genes="all" is not "ignore" or "add"'):
        CellPLM.from_pretrained(model, new_data, new_genes="all")
    with pytest.raises(ValueError, match='new_categories="new" is not "mean" or "add"'):
        CellPLM.from_pretrained(model, new_data, new_categories="new")
    with pytest.raises(ValueError, match="Pass the AnnData whose categories or genes"):
        CellPLM.from_pretrained(model, new_genes="add")


def test_a_model_that_is_not_trained(tissues, build, new_data):
    with pytest.raises(ValueError, match="is not trained"):
        CellPLM.from_pretrained(build(tissues), new_data)


def test_a_file_that_says_something_else_was_added(model, new_data, tmp_path):
    grown = CellPLM.from_pretrained(model, new_data, **ADD)
    grown.save_pretrained(tmp_path / "model")
    config = tmp_path / "model" / "cellplm_config.json"
    text = config.read_text()
    for steps in ('{"batch": 9999999}', '{"batch": -1}', '{"cells": 1}', "[]", '{"batch": 3}'):
        old = '{\n     "batch": 1,\n     "dataset": 1\n    }'
        assert old in text
        config.write_text(text.replace(old, steps))
        with pytest.raises(ValueError, match=r"does not describe a model|do not fit|lacks|does not know"):
            CellPLM.from_pretrained(tmp_path / "model")
