"""Small synthetic data, and small models trained on them, that all tests share."""

from __future__ import annotations

import multiprocessing
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp
import scvi
import torch
from anndata import AnnData
from hypothesis import HealthCheck, settings

from cellplm_scvi import CellPLM

torch.set_num_threads(1)
settings.register_profile(
    "suite",
    deadline=None,
    max_examples=15,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
settings.load_profile("suite")

TINY: dict[str, Any] = {"n_hidden": 16, "n_layers": 2, "n_heads": 2, "n_latent": 4, "n_components": 3}
QUIET: dict[str, Any] = {"accelerator": "cpu", "devices": 1, "enable_progress_bar": False}


def make_tissues(
    n_cells: int = 90,
    n_genes: int = 30,
    n_samples: int = 4,
    *,
    n_types: int = 3,
    n_batches: int = 2,
    spatial: bool = False,
    n_dims: int = 2,
    seed: int = 0,
) -> AnnData:
    """Counts of cells of a few types in interleaved samples of unequal size, the last one of a single cell.

    ``obs`` has type, batch (a function of the sample), sample, platform (likewise) and study; ``obsm["spatial"]`` has one
    domain a cell type in each sample. Each type has its own third of marker genes, each batch scales a few genes.
    """
    rng = np.random.default_rng(seed)
    share = np.arange(n_samples, 0, -1, dtype=float)
    sample = rng.choice(n_samples, size=n_cells, p=share / share.sum())
    if n_samples > 1:
        sample[sample == n_samples - 1] = 0
        sample[n_cells // 2] = n_samples - 1
    kind = rng.integers(n_types, size=n_cells)
    batch = sample % n_batches
    rate = rng.gamma(1.0, 1.0, size=n_genes)
    markers = np.where(np.arange(n_genes)[None] % n_types == np.arange(n_types)[:, None], 4.0, 1.0)
    shift = np.where(rng.random((n_batches, n_genes)) < 0.2, 2.0, 1.0)
    depth = rng.lognormal(0.0, 0.3, size=(n_cells, 1))
    counts = rng.poisson(rate * markers[kind] * shift[batch] * depth)
    counts[:, 0] += 1  # no cell is empty
    adata = AnnData(
        sp.csr_matrix(counts.astype(np.float32)),
        obs=pd.DataFrame(
            {
                "cell_type": pd.Categorical([f"type{k}" for k in kind]),
                "batch": pd.Categorical([f"batch{b}" for b in batch]),
                "sample": pd.Categorical([f"sample{s}" for s in sample]),
                "platform": pd.Categorical(np.where(sample < 2, "drop", "plate")),
                "study": pd.Categorical(np.where(sample % 2 == 0, "one", "two")),
            },
            index=[f"cell{i}" for i in range(n_cells)],
        ),
        var=pd.DataFrame(index=[f"gene{j}" for j in range(n_genes)]),
    )
    if spatial:
        angle = 2 * np.pi * kind / n_types
        centre = np.stack([np.cos(angle), np.sin(angle), np.zeros(n_cells)], 1)[:, :n_dims]
        adata.obsm["spatial"] = 100 * (centre + rng.normal(0, 0.4, size=(n_cells, n_dims)))
    return adata


SETUP = {
    "batch_key": "batch",
    "platform_key": "platform",
    "dataset_key": "study",
    "sample_key": "sample",
}


def build_model(adata: AnnData, setup: dict[str, Any] | None = None, **model: Any) -> CellPLM:
    """Set up a copy of the data, with the keys that it has unless ``setup`` says otherwise, and build a small model."""
    adata = adata.copy()
    keys: dict[str, Any] = SETUP | ({"spatial_key": "spatial"} if "spatial" in adata.obsm else {}) | (setup or {})
    CellPLM.setup_anndata(adata, **keys)
    return CellPLM(adata, **(TINY | model))


def train_model(model: CellPLM, max_epochs: int = 1, **kwargs: Any) -> CellPLM:
    """Train for a moment, without a bar."""
    model.train(**(QUIET | {"max_epochs": max_epochs, "batch_size": 48} | kwargs))
    return model


# Test files cannot import from here (pytest's import mode "importlib"), so functions travel as fixtures.


@pytest.fixture(scope="session", name="make_tissues")
def _make_tissues() -> Callable[..., AnnData]:
    return make_tissues


@pytest.fixture(scope="session", name="build")
def _build() -> Callable[..., CellPLM]:
    return build_model


@pytest.fixture(scope="session", name="train")
def _train() -> Callable[..., CellPLM]:
    return train_model


@pytest.fixture(autouse=True)
def _same_seed() -> Iterator[None]:
    """Each test starts from the same seed, which is how users make runs repeatable."""
    scvi.settings.seed = 0
    yield
    scvi.settings.seed = 0


@pytest.fixture
def tissues() -> AnnData:
    """Dissociated samples."""
    return make_tissues()


@pytest.fixture
def sections() -> AnnData:
    """Spatial samples; some cells have no position."""
    adata = make_tissues(spatial=True)
    adata.obsm["spatial"][::11] = np.nan
    return adata


@pytest.fixture(scope="session")
def dissociated_model() -> CellPLM:
    """A small model trained on dissociated samples; do not change its data."""
    scvi.settings.seed = 0
    return train_model(build_model(make_tissues()), max_epochs=3, plan_kwargs={"lr": 1e-2})


@pytest.fixture(scope="session")
def spatial_model() -> CellPLM:
    """A small model with local attention; do not change its data."""
    scvi.settings.seed = 0
    adata = make_tissues(spatial=True)
    adata.obsm["spatial"][::11] = np.nan
    model = build_model(adata, n_neighbours=6, n_niche=4)
    return train_model(model, max_epochs=3, plan_kwargs={"lr": 1e-2})


@pytest.fixture(scope="session")
def models(dissociated_model: CellPLM, spatial_model: CellPLM) -> dict[str, CellPLM]:
    """Both trained models by name."""
    return {"dissociated": dissociated_model, "spatial": spatial_model}


@pytest.fixture
def clone(tmp_path: Any) -> Callable[..., CellPLM]:
    """Copies a trained model with its data, by way of the disk, so that a test may change either."""

    def copy(model: CellPLM, adata: AnnData | None = None) -> CellPLM:
        folder = tmp_path / "clone"
        model.save(str(folder), overwrite=True)
        return CellPLM.load(str(folder), adata=model.adata.copy() if adata is None else adata, accelerator="cpu")

    return copy


@pytest.fixture
def killed_at_random() -> Callable[..., int]:
    """Runs something in a process that is killed (signal 9) at random moments, then to its end; counts the kills."""

    def run(function: Callable[[], Any], n_kills: int, longest: float, seed: int = 0) -> int:
        rng = np.random.default_rng(seed)
        context = multiprocessing.get_context("fork")
        n_killed = 0
        for n in range(n_kills + 1):
            process = context.Process(target=function)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", DeprecationWarning)  # the other threads of this process only wait
                process.start()
            process.join(rng.uniform(0.02, longest) if n < n_kills else 300)
            if process.is_alive():
                process.kill()
                process.join()
                n_killed += 1
            if n == n_kills:
                assert process.exitcode == 0
        return n_killed

    return run
