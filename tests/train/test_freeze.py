"""What is frozen stays the same to the bit, and everything else trains; learning rates by layer."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from lightning.pytorch import Callback

from cellplm_scvi import CellPLM
from cellplm_scvi.train import CellPLMTrainingPlan, frozen

EMBEDDER = ("embedder.", "position.")
SURFACE = ("codes.", "decoder.weight", "decoder.bias", "decoder.log_theta")


def stays(name: str, freeze: str | None) -> bool:
    """Whether a parameter is frozen, by its name."""
    if freeze == "backbone":
        return not any(part in name for part in SURFACE)
    return name.startswith({None: (), "embedder": EMBEDDER, "encoder": (*EMBEDDER, "encoder.")}[freeze])


@pytest.fixture
def model(spatial_model, clone) -> CellPLM:
    return clone(spatial_model)


@pytest.mark.parametrize("freeze", ["embedder", "encoder", "backbone", None])
def test_each_parameter_stays_or_trains(model, train, freeze):
    before = {name: p.detach().clone() for name, p in model.module.named_parameters()}
    train(model, max_epochs=2, freeze=freeze, plan_kwargs={"weight_decay": 0.5})
    after = dict(model.module.named_parameters())
    same = {name for name, p in after.items() if torch.equal(p, before[name])}
    assert same == {name for name in before if stays(name, freeze)}
    assert all(p.requires_grad for p in after.values())
    assert model.module.resting == ()


def test_a_frozen_backbone_leaves_embeddings_as_they_are(model, train):
    before, expression = model.get_latent_representation(), model.get_normalized_expression()
    train(model, freeze="backbone")
    np.testing.assert_array_equal(model.get_latent_representation(), before)
    assert not np.array_equal(model.get_normalized_expression(), expression)


def test_frozen_parameters_are_not_in_the_optimiser(model, train):
    train(model, freeze="encoder")
    optimised = {id(p) for group in model.trainer.optimizers[0].param_groups for p in group["params"]}
    named = model.module.named_parameters()
    assert optimised == {id(p) for name, p in named if not stays(name, "encoder")}


class Modes(Callback):
    """Records which dropouts are active in training."""

    def __init__(self) -> None:
        self.active: set[str] = set()

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        self.active |= {name.split(".")[0] for name, part in pl_module.module.named_modules() if part.training}


@pytest.mark.parametrize(
    ("freeze", "resting"),
    [
        ("embedder", {"embedder", "position"}),
        ("encoder", {"embedder", "position", "encoder"}),
        ("backbone", {"embedder", "position", "encoder", "latent", "decoder", "niche", "alignment", ""}),
        (None, set()),
    ],
)
def test_frozen_parts_have_no_dropout(model, train, freeze, resting):
    modes = Modes()
    train(model, max_epochs=2, freeze=freeze, callbacks=[modes], check_val_every_n_epoch=1)
    parts = {name.split(".")[0] for name, _ in model.module.named_modules()}
    assert modes.active == parts - resting


def test_training_after_a_frozen_run_trains_all(model, train):
    train(model, freeze="backbone")
    before = {name: p.detach().clone() for name, p in model.module.named_parameters()}
    train(model)
    assert not any(torch.equal(p, before[name]) for name, p in model.module.named_parameters())


def test_parameters_are_released_after_an_error(model, train):
    class Stop(Callback):
        def on_train_batch_start(self, *args: Any) -> None:
            raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        train(model, freeze="encoder", callbacks=[Stop()])
    assert all(p.requires_grad for p in model.module.parameters())
    assert model.is_trained_


def test_what_the_user_froze_stays_frozen(model, train):
    model.module.encoder.norm.requires_grad_(False)
    before = model.module.encoder.norm.weight.clone()
    train(model, freeze="embedder")
    assert torch.equal(model.module.encoder.norm.weight, before)
    assert not model.module.encoder.norm.weight.requires_grad


def test_wrong_words(model, train):
    with pytest.raises(ValueError, match='freeze="all" is not one of'):
        train(model, freeze="all")
    with pytest.raises(ValueError, match='Nothing is left to train with freeze="reference"'):
        train(model, freeze="reference")
    with pytest.raises(ValueError, match="layer_decay=2 must be above 0"):
        train(model, plan_kwargs={"layer_decay": 2})
    assert all(p.requires_grad for p in model.module.parameters())


def test_learning_rates_fall_from_layer_to_layer(model):
    plan = CellPLMTrainingPlan(model.module, lr=1.0, layer_decay=0.5, weight_decay=0.1)
    rate = {id(p): group["lr"] for group in plan.parameter_groups() for p in group["params"]}
    expected = {"embedder": 0.125, "position": 0.125, "encoder.layers.0": 0.25, "encoder.layers.1": 0.5}
    for name, parameter in model.module.named_parameters():
        part = next((part for part in expected if name.startswith(part)), None)
        assert rate[id(parameter)] == (1.0 if part is None else expected[part]), name


def test_groups_hold_each_parameter_once(model):
    plan = CellPLMTrainingPlan(model.module, layer_decay=0.9, weight_decay=0.1)
    with frozen(model.module, "embedder"):
        groups = plan.parameter_groups()
    ids = [id(p) for group in groups for p in group["params"]]
    named = dict(model.module.named_parameters())
    assert sorted(ids) == sorted(id(p) for name, p in named.items() if not stays(name, "embedder"))
    decayed = {id(p) for group in groups if group["weight_decay"] for p in group["params"]}
    assert id(named["decoder.input.weight"]) in decayed
    assert decayed.isdisjoint({id(named["decoder.weight"]), id(named["decoder.codes.batch.weight"])})
