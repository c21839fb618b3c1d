"""scvi-tools' search for hyper-parameters takes our model as it is."""

from __future__ import annotations

import pytest

from cellplm_scvi import CellPLM

pytest.importorskip("ray")
pytest.importorskip("hyperopt")


@pytest.mark.slow
def test_a_search_over_model_and_training(tissues, tmp_path):
    from ray import tune
    from scvi.autotune import run_autotune

    CellPLM.setup_anndata(tissues, batch_key="batch", sample_key="sample")
    experiment = run_autotune(
        CellPLM,
        tissues,
        metrics=["elbo_validation"],
        mode="min",
        search_space={
            "model_params": {"n_hidden": tune.choice([8, 16]), "n_latent": 4, "n_layers": 1, "n_heads": 2},
            "train_params": {"max_epochs": 2, "plan_kwargs": {"lr": tune.loguniform(1e-4, 1e-2)}},
        },
        num_samples=2,
        resources={"cpu": 1},
        seed=0,
        scheduler="asha",
        searcher="hyperopt",
        logging_dir=str(tmp_path),
        ignore_reinit_error=True,
    )
    best = experiment.result_grid.get_best_result(metric="elbo_validation", mode="min")
    assert best.metrics["elbo_validation"] > 0
    assert best.config["model_params"]["n_hidden"] in (8, 16)
