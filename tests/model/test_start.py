"""The decoder of trained weights starts at the mean counts of new data."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import scipy.sparse as sp
import torch
from anndata import AnnData

from cellplm_scvi import CellPLM

#: so little that nothing but the start is seen
STILL: dict[str, Any] = {"max_epochs": 1, "plan_kwargs": {"lr": 1e-12}, "train_size": 1.0}


@pytest.fixture
def shifted(make_tissues: Callable[..., AnnData]) -> AnnData:
    """Two new batches, in which genes are caught twice as often, or half as often, each by its own draw; and a known one."""
    adata = make_tissues(240, 30, seed=4, spatial=True)
    rng = np.random.default_rng(0)
    batch = np.arange(240) % 3
    common, own = rng.choice([0.25, 4.0], 30), rng.choice([0.5, 2.0], (3, 30))
    own[0] = 1.0
    adata.X = rng.poisson(dense(adata) * common * own[batch]).astype(np.float32)
    adata.obs["batch"] = np.asarray(["batch0", "new1", "new2"])[batch]
    return adata


@pytest.fixture(params=["dissociated", "spatial"])
def model(request, models) -> CellPLM:
    return models[request.param]


def dense(adata: AnnData) -> np.ndarray:
    """Counts as an array."""
    x: Any = adata.X
    return x.toarray() if sp.issparse(x) else np.asarray(x)


def misfit(model: CellPLM, batch: str) -> float:
    """Root mean square of the log of observed to expected counts of the genes in a batch."""
    cells = np.flatnonzero(model.adata.obs["batch"] == batch)
    counts = dense(model.adata[cells])
    shares = np.asarray(model.get_normalized_expression(indices=cells.tolist(), return_numpy=True))
    expected = shares * counts.sum(1, keepdims=True)
    return float(np.sqrt(np.mean(np.log((counts.sum(0) + 1) / (expected.sum(0) + 1)) ** 2)))


def test_expected_counts_of_each_batch_start_near_the_observed_ones(model, shifted, train):
    grown = CellPLM.from_pretrained(model, shifted, new_categories="add", accelerator="cpu")
    before = {batch: misfit(grown, batch) for batch in ("batch0", "new1", "new2")}
    train(grown, **STILL)
    for batch, error in before.items():
        assert misfit(grown, batch) < (0.5 if batch == "batch0" else 0.3) * error, batch


def test_a_query_leaves_the_reference_where_it_is(model, shifted, train):
    query = CellPLM.load_query_data(shifted, model, accelerator="cpu")
    before, state = misfit(query, "new1"), {name: p.clone() for name, p in query.module.state_dict().items()}
    known = misfit(query, "batch0")
    train(query, **STILL)
    assert misfit(query, "new1") < 0.8 * before
    assert misfit(query, "batch0") == known
    tables = [f"{decoder}output_codes.batch.weight" for decoder in ("decoder.", "niche.decoder.")]
    for name, p in query.module.state_dict().items():
        if name not in tables:
            torch.testing.assert_close(p, state[name], rtol=0, atol=1e-9, msg=name)


def test_only_the_first_training_starts_anew(model, shifted, train):
    grown = CellPLM.from_pretrained(model, shifted, new_categories="add", accelerator="cpu")
    before = grown.module.decoder.bias.detach().clone()
    train(grown, **STILL)
    started = grown.module.decoder.bias.detach().clone()
    assert (started - before).abs().max() > 0.1
    train(grown, **STILL)
    torch.testing.assert_close(grown.module.decoder.bias.detach(), started, rtol=0, atol=1e-9)


def test_a_model_that_fits_hardly_moves(model, train):
    """Data that the model drew itself."""
    drawn = model.adata.copy()
    drawn.X = model.posterior_predictive_sample().todense().astype(np.float32)
    again = CellPLM.from_pretrained(model, drawn, accelerator="cpu")
    before = again.module.decoder.bias.detach().clone()
    train(again, **STILL)
    step = (again.module.decoder.bias.detach() - before).abs()
    assert step.median() < 0.15


def test_the_start_looks_at_training_cells_only(model, shifted, train):
    held_out = (shifted.obs["sample"] == shifted.obs["sample"].iloc[0]).to_numpy()
    parts = [np.flatnonzero(~held_out), np.flatnonzero(held_out)]
    assert min(map(len, parts)) > 10
    starts = []
    for factor in (1, 5):
        adata = shifted.copy()
        adata.X[held_out] *= factor
        grown = CellPLM.from_pretrained(model, adata, new_categories="add", accelerator="cpu")
        train(grown, **(STILL | {"train_size": None}), datasplitter_kwargs={"external_indexing": parts})
        starts.append(grown.module.decoder.bias.detach().clone())
    torch.testing.assert_close(starts[0], starts[1], rtol=0, atol=1e-6)


def test_a_call_that_is_refused_leaves_the_model_as_it_is(model, shifted, train):
    grown = CellPLM.from_pretrained(model, shifted, new_categories="add", accelerator="cpu")
    before = {name: p.clone() for name, p in grown.module.state_dict().items()}
    with pytest.raises(ValueError, match='freeze="all"'):
        train(grown, freeze="all")
    for name, p in grown.module.state_dict().items():
        assert torch.equal(p, before[name]), name


def test_a_saved_model_that_was_trained_here_does_not_start_anew(model, shifted, train, tmp_path):
    grown = train(CellPLM.from_pretrained(model, shifted, new_categories="add", accelerator="cpu"), **STILL)
    grown.save(tmp_path / "model")
    again = CellPLM.load(tmp_path / "model", adata=shifted, accelerator="cpu")
    train(again, **STILL)
    for before, after in zip(grown.module.decoders, again.module.decoders, strict=True):
        torch.testing.assert_close(after.bias, before.bias, rtol=0, atol=1e-9)


@pytest.mark.parametrize("seed", range(5))
def test_expected_counts_are_never_further_off_than_before(model, make_tissues, train, seed):
    """Data that have nothing to do with what the model saw, a few genes with nearly all counts, others with none."""
    adata = make_tissues(120, 30, seed=seed, spatial=True)
    rng = np.random.default_rng(seed)
    adata.X = rng.poisson(rng.lognormal(-2, 4, 30).clip(0, 1e4) * rng.lognormal(0, 2, (120, 30))).astype(np.float32)
    adata.obs["batch"] = np.where(np.arange(120) % 2, "new1", "new2")
    grown = CellPLM.from_pretrained(model, adata, new_categories="add", accelerator="cpu")

    def deviance() -> float:
        expected = grown.get_normalized_expression(return_numpy=True) * adata.X.sum(1, keepdims=True)
        observed, expected = adata.X.sum(0).astype(float), expected.sum(0).astype(float)
        return float((observed * np.log(np.maximum(observed, 1e-9) / expected) - observed + expected).sum())

    before = deviance()
    train(grown, **STILL)
    assert deviance() < before


@pytest.mark.parametrize("share", [0.9, 0.5, 0.02])
def test_a_decoder_starts_at_the_share_of_the_library(make_tissues, build, share):
    adata = make_tissues(200)
    adata.obs["size"] = np.asarray(adata.X.sum(1)).ravel() / share
    model = build(adata, {"size_factor_key": "size"})
    total = model.module.decoder.bias.double().exp().sum()
    assert float(total / (1 + total)) == pytest.approx(share, rel=1e-4)
