"""Training as users of scvi-tools know it."""

from __future__ import annotations

import pickle

import numpy as np
import pytest
import scanpy as sc
import scvi
import torch
from lightning.pytorch import Callback

from cellplm_scvi import CellPLM
from cellplm_scvi.train import ShardedStrategy, whole_afterwards

OPTIONS = [
    (encoder, latent, position)
    for encoder in ("flow", "softmax", "mlp")
    for latent in ("mixture", "gaussian", "deterministic")
    for position in ("local", "fourier", "sinusoidal", "none")
]


class Gradients(Callback):
    """Collects the parameters whose gradient is absent or not finite after any step, and the cells of each step."""

    def __init__(self) -> None:
        self.bad: set[str] = set()
        self.steps: list[list[float]] = []

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx) -> None:
        self.steps.append(sorted(batch["library"].tolist()))

    def on_after_backward(self, trainer, pl_module) -> None:
        for name, parameter in pl_module.module.named_parameters():
            if parameter.grad is None or not torch.isfinite(parameter.grad).all():
                self.bad.add(name)


@pytest.mark.parametrize(("encoder", "latent", "position"), OPTIONS)
def test_every_parameter_gets_a_gradient_in_every_step(sections, build, train, encoder, latent, position):
    model = build(sections, encoder=encoder, latent=latent, position=position, n_neighbours=6, n_niche=3)
    gradients = Gradients()
    train(model, callbacks=[gradients])
    assert gradients.steps
    assert not gradients.bad
    assert np.isfinite(model.get_latent_representation()).all()


def test_every_parameter_gets_a_gradient_without_coordinates(tissues, build, train):
    gradients = Gradients()
    train(build(tissues), callbacks=[gradients])
    assert not gradients.bad


def test_every_parameter_gets_a_gradient_where_no_cell_of_a_step_has_a_position(make_tissues, build, train):
    adata = make_tissues(spatial=True)
    adata.obsm["spatial"][(adata.obs["sample"] == "sample0").to_numpy()] = np.nan
    gradients = Gradients()
    train(build(adata, n_neighbours=4), callbacks=[gradients], batch_size=12, max_epochs=2)
    assert not gradients.bad


def test_an_epoch_sees_every_training_cell_once_and_epochs_differ(tissues, build, train):
    gradients = Gradients()
    model = train(build(tissues), callbacks=[gradients], max_epochs=2, batch_size=20)
    n_steps = len(gradients.steps) // 2
    assert n_steps > 2
    epochs = gradients.steps[:n_steps], gradients.steps[n_steps:]
    total = np.asarray(model.adata.X.sum(1)).ravel()
    expected = sorted(total[model.train_indices])
    for epoch in epochs:
        assert sorted(sum(epoch, [])) == expected
    assert epochs[0] != epochs[1]


def test_training_lowers_the_loss_and_is_recorded(tissues, build, train):
    model = train(build(tissues), max_epochs=12, plan_kwargs={"lr": 5e-3}, check_val_every_n_epoch=1)
    for key in (
        "train_loss",
        "elbo_train",
        "reconstruction_loss_train",
        "kl_local_train",
        "validation_loss",
        "elbo_validation",
        "reconstruction_loss_validation",
        "kl_local_validation",
    ):
        assert len(model.history[key]) == 12
        assert np.isfinite(model.history[key].to_numpy(float)).all()
    loss = model.history["reconstruction_loss_train"].to_numpy(float).ravel()
    assert loss[-1] < loss[0]
    assert model.is_trained_


def test_history_is_the_mean_over_the_cells_of_all_minibatches(tissues, build, train, monkeypatch):
    losses = {True: [], False: []}
    model = build(tissues)
    compute = type(model.module).loss

    def recorded(module, *args, **kwargs):
        found = compute(module, *args, **kwargs)
        losses[module.training].append(found.reconstruction_loss["reconstruction_loss"].detach())
        return found

    monkeypatch.setattr(type(model.module), "loss", recorded)
    train(model, max_epochs=2, batch_size=20, check_val_every_n_epoch=1, num_sanity_val_steps=0, callbacks=[])
    for training, mode in ((True, "train"), (False, "validation")):
        found = model.history[f"reconstruction_loss_{mode}"].to_numpy(float).ravel()
        steps = losses[training]
        assert len(steps) >= 2 * (2 if training else 1)
        halves = steps[: len(steps) // 2], steps[len(steps) // 2 :]
        np.testing.assert_allclose(found, [torch.cat(half).mean() for half in halves], rtol=1e-5)


def test_more_components_than_distinct_cells(make_tissues, build, train):
    """Cells that are all alike leave clusters of k-means empty."""
    adata = make_tissues(60, 10, n_samples=1)
    adata.X = np.tile(adata.X[:2].toarray(), (30, 1))
    adata.obs["sample"] = "one"
    model = train(build(adata, encoder="mlp", n_components=8), max_epochs=4)
    assert np.isfinite(model.get_latent_representation()).all()
    assert np.isfinite(model.get_mixture_probabilities().to_numpy()).all()
    assert np.isfinite(model.get_elbo())


def test_training_without_a_seed(tissues, build, train):
    scvi.settings.seed = None
    assert np.isfinite(train(build(tissues)).get_latent_representation()).all()


def test_all_cells_in_training(tissues, build, train):
    model = train(build(tissues), train_size=1.0)
    assert len(model.train_indices) == tissues.n_obs
    assert len(model.validation_indices) == 0


def test_early_stopping(tissues, build, train):
    model = train(
        build(tissues), max_epochs=30, early_stopping=True, early_stopping_patience=1, early_stopping_min_delta=1e9
    )
    assert len(model.history["elbo_validation"]) < 30


@pytest.mark.parametrize(
    "asked", [{"early_stopping": True}, {"check_val_every_n_epoch": 1}], ids=lambda asked: next(iter(asked))
)
def test_what_watches_validation_cells_needs_some(tissues, build, train, asked):
    with pytest.raises(ValueError, match=f"{next(iter(asked))} asked for validation cells; there are none"):
        train(build(tissues), train_size=1.0, **asked)


@pytest.mark.parametrize("latent", ["mixture", "gaussian"])
def test_training_that_diverges_is_an_error(tissues, build, train, latent):
    model = build(tissues, latent=latent)
    with pytest.raises(RuntimeError, match=r"Training has diverged.*smaller learning rate.* 1e\+30"):
        train(model, max_epochs=6, plan_kwargs={"lr": 1e30})
    assert not model.is_trained_


@pytest.mark.parametrize("precision", ["64-true", "bf16-true", 64])
def test_weights_are_in_single_precision(tissues, build, train, precision):
    with pytest.raises(ValueError, match=f'precision="{precision}" is not available.*"bf16-mixed"'):
        train(build(tissues), precision=precision)


def test_splitting_by_samples(make_tissues, build, train):
    model = train(
        build(make_tissues(120, 20, 6)),
        train_size=0.5,
        datasplitter_kwargs={"split_by": "samples"},
        check_val_every_n_epoch=1,
    )
    sample = model.adata.obs["sample"].to_numpy()
    training, validation = set(sample[model.train_indices]), set(sample[model.validation_indices])
    assert training
    assert validation
    assert not training & validation
    assert np.isfinite(model.history["elbo_validation"].to_numpy(float)).all()


@pytest.mark.parametrize("masks", [False, True])
def test_a_split_of_ones_own(tissues, build, train, masks):
    rows = np.random.default_rng(0).permutation(tissues.n_obs)
    parts = [rows[:50], rows[50:70], rows[70:]]
    given = [np.isin(np.arange(tissues.n_obs), part) for part in parts] if masks else parts
    model = train(build(tissues), datasplitter_kwargs={"external_indexing": given})
    for part, found in zip(parts, (model.train_indices, model.validation_indices, model.test_indices), strict=True):
        assert set(found) == set(part)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"train_size": 1.5}, r"train_size is 1\.5; it is a share in \(0, 1\]"),
        ({"train_size": 0.8, "validation_size": 0.4}, "must be shares that sum to at most 1"),
        ({"datasplitter_kwargs": {"split_by": "donors"}}, 'split_by="donors" is neither "cells" nor "samples"'),
        ({"datasplitter_kwargs": {"external_indexing": [[0, 1], [1]]}}, "names 1 cell more than once"),
        ({"datasplitter_kwargs": {"external_indexing": [[0, 900]]}}, "names rows outside of 0 to 89"),
        ({"datasplitter_kwargs": {"external_indexing": [[], [1]]}}, "has no cells for training"),
        ({"datasplitter_kwargs": {"external_indexing": [[True, False]]}}, r"a mask of shape \(2,\); .* has 90 cells"),
        (
            {"datasplitter_kwargs": {"external_indexing": [["cell1"], ["cell2"]]}},
            "row numbers, one a cell, or a boolean mask",
        ),
        ({"datasplitter_kwargs": {"external_indexing": [[0.5], [1.5]]}}, "dtype float64 .*row numbers, one a cell"),
        ({"datasplitter_kwargs": {"external_indexing": np.arange(90)}}, "is a list of rows, or of boolean masks, for"),
        (
            {"datasplitter_kwargs": {"external_indexing": [[0], [1], [2], [3]]}},
            "is a list of rows, or of boolean masks",
        ),
        ({"datasplitter_kwargs": {"context_size": 0}}, "context_size=0 must be a positive whole number"),
        ({"datasplitter_kwargs": {"context_size": 2.5}}, "context_size=2.5 must be a positive whole number"),
        ({"datasplitter_kwargs": {"nonsense": 1}}, 'datasplitter_kwargs has "nonsense"'),
        ({"datasplitter_kwargs": {"drop_last": True}}, "no cell is left out of a minibatch"),
        ({"max_epochs": 2.0}, r"max_epochs=2\.0 must be a positive whole number"),
        ({"batch_size": 64.0}, r"batch_size=64\.0 must be a positive whole number"),
        ({"max_epochs": 0}, "max_epochs=0 must be a positive whole number"),
        ({"max_epochs": -1}, "max_epochs=-1 must be a positive whole number"),
        ({"max_epochs": "2"}, "max_epochs='2' must be a positive whole number"),
    ],
)
def test_arguments_of_training_that_do_not_work(tissues, build, train, kwargs, message):
    with pytest.raises((ValueError, TypeError), match=message):
        train(build(tissues), **kwargs)


def test_checkpoints(tissues, build, train, tmp_path):
    from scvi.train import SaveCheckpoint

    folder = tmp_path / "checkpoints"
    model = train(
        build(tissues),
        max_epochs=2,
        callbacks=[SaveCheckpoint(dirpath=str(folder), monitor="elbo_validation", load_best_on_end=True)],
        check_val_every_n_epoch=1,
        enable_checkpointing=True,
    )
    saved = [path for path in folder.iterdir() if path.is_dir()]
    assert saved
    again = CellPLM.load(str(saved[0]), adata=model.adata.copy(), accelerator="cpu")
    assert np.isfinite(again.get_latent_representation()).all()


@pytest.mark.parametrize("kind", ["dissociated", "spatial"])
def test_half_precision_learns_what_full_precision_does(make_tissues, build, train, kind):
    adata = make_tissues(spatial=kind == "spatial")

    def once(precision: str) -> CellPLM:
        scvi.settings.seed = 0
        return train(build(adata, latent="gaussian"), max_epochs=4, precision=precision)

    full, half = once("32-true"), once("bf16-mixed")
    ours, theirs = (m.history["reconstruction_loss_train"].to_numpy(float).ravel() for m in (half, full))
    np.testing.assert_allclose(ours, theirs, rtol=0.01)
    assert half.get_latent_representation().dtype == np.float32
    assert np.isfinite(half.get_latent_representation()).all()


@pytest.mark.parametrize("algorithm", ["norm", "value"])
@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_gradients_are_clipped(tissues, build, train, precision, algorithm):
    limit, found = 1e-3, []

    class Seen(Callback):
        def on_train_batch_end(self, trainer, pl_module, *_):
            gradients = torch.cat([p.grad.ravel() for p in pl_module.parameters() if p.grad is not None])
            found.append(float(gradients.norm() if algorithm == "norm" else gradients.abs().max()))
            assert trainer.optimizers[0].defaults["fused"]

    train(
        build(tissues),
        precision=precision,
        gradient_clip_val=limit,
        gradient_clip_algorithm=algorithm,
        callbacks=[Seen()],
    )
    assert found
    np.testing.assert_allclose(found, limit, rtol=1e-3)


def test_training_goes_on(tissues, build, train):
    model = train(build(tissues), max_epochs=2)
    before = {name: p.detach().clone() for name, p in model.module.named_parameters()}
    train(model, max_epochs=1)
    assert any(not torch.equal(before[name], p) for name, p in model.module.named_parameters())
    assert len(model.history["train_loss"]) == 3


def test_a_trained_model_can_be_pickled(tissues, build, train):
    model = train(build(tissues))
    copy = pickle.loads(pickle.dumps(model))
    np.testing.assert_array_equal(copy.get_latent_representation(), model.get_latent_representation())
    train(copy)


def test_a_loaded_model_is_trained_further(dissociated_model, clone, train):
    model = clone(dissociated_model)
    before = model.get_latent_representation()
    train(model)
    assert np.abs(model.get_latent_representation() - before).max() > 0


def test_plan_arguments_reach_the_plan(tissues, build, train):
    model = train(build(tissues), plan_kwargs={"lr": 3e-3, "weight_decay": 0.1, "n_epochs_kl_warmup": 7, "warmup": 0.5})
    plan = model.trainer.lightning_module
    assert plan.n_epochs_kl_warmup == 7
    groups = model.trainer.optimizers[0].param_groups
    assert [group["weight_decay"] for group in groups] == [0.1, 0.0]
    assert {group["initial_lr"] for group in groups} == {3e-3}
    with pytest.raises(TypeError, match='plan_kwargs has "nonsense", which the training plan does not take'):
        train(build(tissues), plan_kwargs={"nonsense": 1})
    with pytest.raises(ValueError, match="warmup=5 is not a share"):
        train(build(tissues), plan_kwargs={"warmup": 5})


def test_every_parameter_is_in_one_group(sections, build, train):
    model = train(build(sections))
    grouped = [p for group in model.trainer.optimizers[0].param_groups for p in group["params"]]
    assert len({id(p) for p in grouped}) == len(grouped) == len(list(model.module.parameters()))


@pytest.mark.parametrize("spatial", [False, True])
def test_the_default_number_of_epochs_gives_few_cells_many_epochs_and_many_cells_many_steps(spatial):
    from cellplm_scvi.model._defaults import default_batch_size, default_max_epochs

    before = 0
    for n_cells in (100, 1_000, 10_000, 100_000, 1_000_000):
        size = default_batch_size(n_cells, spatial=spatial)
        assert size & (size - 1) == 0
        n_batches = -(-n_cells // size)
        epochs = default_max_epochs(n_cells, n_batches, spatial=spatial)
        assert 1 <= epochs <= 200
        assert epochs == 200 or epochs * n_batches >= 2_400
        assert epochs * n_batches >= before
        before = epochs * n_batches
    assert before > 2 * 4_800
    assert default_max_epochs(5_000, 40, spatial=True) < default_max_epochs(5_000, 40, spatial=False)


def test_workers(tissues, build, train):
    model = train(build(tissues), datasplitter_kwargs={"num_workers": 1})
    assert np.isfinite(model.get_latent_representation()).all()


def test_covariates_of_one_category_and_no_covariate(tissues, train):
    CellPLM.setup_anndata(tissues)
    model = train(CellPLM(tissues, n_hidden=16, n_heads=2, n_layers=1, n_latent=4, n_components=3))
    assert np.isfinite(model.get_elbo())
    assert model.get_normalized_expression().shape == tissues.shape


@pytest.mark.parametrize("words", [{"input_normalization": "raw"}, {"masking": False}, {"n_decoder_layers": 2}])
def test_options_that_change_the_model(tissues, build, train, words):
    plain, other = train(build(tissues)), train(build(tissues, **words))
    assert np.isfinite(other.get_latent_representation()).all()
    assert np.abs(other.get_latent_representation() - plain.get_latent_representation()).max() > 0


@pytest.mark.parametrize("strategy", ["fsdp_cpu_offload", "FSDPStrategy", "ModelParallelStrategy"])
def test_other_ways_to_shard_are_refused(tissues, build, train, strategy):
    import lightning.pytorch.strategies as strategies

    given = getattr(strategies, strategy)() if hasattr(strategies, strategy) else strategy
    with pytest.raises(ValueError, match=f'strategy="?{strategy}"? is not supported. Pass strategy="fsdp"'):
        train(build(tissues), strategy=given)


def test_a_sharded_training_that_raises_leaves_the_model_as_it_was(clone, models):
    model = clone(models["dissociated"])
    before = {name: p.clone() for name, p in model.module.state_dict().items()}
    training = whole_afterwards(model, ShardedStrategy())
    training.__enter__()
    for parameter in model.module.parameters():
        parameter.data += 1
    stopped = RuntimeError("stopped")
    assert not training.__exit__(RuntimeError, stopped, None)
    for name, p in model.module.state_dict().items():
        assert torch.equal(p, before[name]), name


@pytest.mark.parametrize(
    "argument", [{"optimizer": "Adam"}, {"reduce_lr_on_plateau": True}, {"lr_scheduler_metric": "elbo_validation"}]
)
def test_another_optimiser_is_refused_not_ignored(tissues, build, train, argument):
    with pytest.raises(ValueError, match=f'plan_kwargs has "{next(iter(argument))}": the optimiser is AdamW'):
        train(build(tissues), plan_kwargs=argument)


def test_a_mistyped_argument_of_the_plan_is_refused_before_training(tissues, build, train):
    with pytest.raises(TypeError, match='plan_kwargs has "wieght_decay", which the training plan does not take'):
        train(build(tissues), plan_kwargs={"wieght_decay": 0.1})


def test_the_divergence_rises_by_steps_if_asked_for(tissues, build, train):
    weights = []
    for plan in ({"n_steps_kl_warmup": 1000}, {"n_epochs_kl_warmup": 1}):
        model = build(tissues)
        train(model, max_epochs=3, plan_kwargs=plan)
        weights.append(model.trainer.lightning_module.kl_weight)
    assert 0 < weights[0] < 0.05
    assert weights[1] == 1


def test_the_divergence_rises_through_all_epochs_by_default(tissues, build, train):
    """Once: a model that is trained further does not begin again."""
    model = train(build(tissues), max_epochs=4)
    assert model.trainer.lightning_module.n_epochs_kl_warmup == 4
    train(model, max_epochs=2)
    assert model.trainer.lightning_module.n_epochs_kl_warmup is None
    assert model.trainer.lightning_module.kl_weight == 1


@pytest.mark.parametrize("n_samples", [2, 4])
def test_one_of_few_samples_is_held_out(make_tissues, build, train, n_samples):
    adata = make_tissues(60, n_samples=n_samples)
    adata.obs["sample"] = [f"s{n % n_samples}" for n in range(60)]
    model = train(build(adata), datasplitter_kwargs={"split_by": "samples"}, early_stopping=True)
    held_out = model.adata.obs["sample"].iloc[model.validation_indices]
    assert held_out.nunique() == 1
    assert len(held_out) == (adata.obs["sample"] == held_out.iloc[0]).sum()


def test_one_sample_cannot_be_held_out(make_tissues, build, train):
    adata = make_tissues(60)
    adata.obs["sample"] = "only"
    with pytest.raises(ValueError, match=r'there are none. .*split_by="samples" several samples'):
        train(build(adata), datasplitter_kwargs={"split_by": "samples"}, early_stopping=True)


@pytest.mark.parametrize("batch_size", [0, -1])
def test_batch_sizes_are_positive(dissociated_model, tissues, build, train, batch_size):
    with pytest.raises(ValueError, match=f"batch_size={batch_size} must be a positive whole number"):
        train(build(tissues), batch_size=batch_size)
    for method in ("get_latent_representation", "get_normalized_expression", "get_elbo"):
        with pytest.raises(ValueError, match=f"batch_size={batch_size} must be a positive whole number"):
            getattr(dissociated_model, method)(batch_size=batch_size)


def test_what_was_changed_since_it_was_set_up_is_noticed(make_tissues, build, train):
    adata = make_tissues()
    CellPLM.setup_anndata(adata)
    sc.pp.log1p(adata)
    with pytest.raises(ValueError, match="does not hold counts: it looks log-normalised"):
        CellPLM(adata)
    model = train(build(make_tissues()))
    names = model.adata.var_names
    model.adata.var_names = [f"other{n}" for n in range(len(names))]
    with pytest.raises(ValueError, match=r'None of the 30 genes .*"other0".*Were var_names changed'):
        model.get_latent_representation()
    model.adata.var_names = names
    sc.pp.log1p(model.adata)
    with pytest.raises(ValueError, match="changed since its set-up, does not hold counts: it looks log-normalised"):
        model.get_latent_representation()


def test_a_weight_of_the_neighbourhood_is_not_negative(make_tissues, build):
    with pytest.raises(ValueError, match="niche_weight=-1 must be a number that is not negative"):
        build(make_tissues(spatial=True), niche_weight=-1)


def test_a_model_trains_on_its_own_set_up_whichever_came_last(make_tissues, train):
    def weights(another: bool) -> torch.Tensor:
        adata = make_tissues()
        scvi.settings.seed = 0
        CellPLM.setup_anndata(adata, batch_key="batch", sample_key="sample")
        model = CellPLM(adata, n_hidden=16, n_layers=1, n_latent=4)
        if another:
            CellPLM.setup_anndata(adata, batch_key="cell_type")
        scvi.settings.seed = 0
        train(model, max_epochs=2)
        return torch.cat([p.detach().ravel() for p in model.module.parameters()])

    assert torch.equal(weights(False), weights(True))


def test_zeros_that_are_stored_do_not_matter(make_tissues, build, train):
    def embedding(stored: bool) -> np.ndarray:
        adata = make_tissues()
        if stored:
            adata.X.data[::3] = 0
        else:
            adata.X.data[::3] = 0
            adata.X.eliminate_zeros()
        scvi.settings.seed = 0
        return train(build(adata), max_epochs=2).get_latent_representation()

    np.testing.assert_array_equal(embedding(True), embedding(False))
