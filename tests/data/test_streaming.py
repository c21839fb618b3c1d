"""Minibatches from disk are those of an AnnData: whole samples, every cell once an epoch, shared out evenly."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import scipy.sparse as sp
import torch
from hypothesis import given
from hypothesis import strategies as st

from cellplm_scvi import CellPLM
from cellplm_scvi.data import CorpusDataModule, build_corpus
from cellplm_scvi.data._stream_cells import _AsRead, whole_units
from cellplm_scvi.data._stream_plan import EpochPlan

pytest.importorskip("annbatch")

KEYS: dict[str, Any] = {
    "batch_key": "batch", "platform_key": "platform", "dataset_key": "study", "sample_key": "sample",
}  # fmt: skip
TINY = {"n_hidden": 16, "n_layers": 1, "n_heads": 2, "n_latent": 4, "n_components": 3, "n_neighbours": 6, "n_niche": 4}


def plan_of(
    sizes: list[int], *, context: int = 20, batch: int = 50, seed: int = 0, n_ranks: int = 1, accumulate: int = 1
) -> EpochPlan:
    n_cells = np.array(sizes)
    return EpochPlan(np.cumsum(n_cells) - n_cells, n_cells, context, batch, seed, n_ranks, accumulate)


SIZES = st.lists(st.integers(1, 200), min_size=1, max_size=30)


@given(
    sizes=SIZES,
    context=st.integers(1, 60),
    extra=st.integers(0, 60),
    n_ranks=st.integers(1, 5),
    epoch=st.integers(0, 3),
)
def test_an_epoch_has_every_cell_once_and_ranks_have_as_many_minibatches(sizes, context, extra, n_ranks, epoch):
    plan = plan_of(sizes, context=context, batch=context + extra, n_ranks=n_ranks)
    shares = [plan.minibatches(epoch, rank) for rank in range(n_ranks)]
    assert {len(share) for share in shares} == {len(plan)}
    rows = np.concatenate([batch.rows for share in shares for batch in share])
    if plan.n_contexts >= n_ranks:
        np.testing.assert_array_equal(np.sort(rows), np.arange(sum(sizes)))
    else:
        assert set(rows) == set(range(sum(sizes)))
    sample = np.repeat(np.arange(len(sizes)), sizes)
    for batch in (batch for share in shares for batch in share):
        assert batch.lengths.sum() == batch.n_cells == batch.rows.shape[0]
        assert batch.lengths.max() <= context
        ends = np.cumsum(batch.lengths)
        for part in np.split(batch.rows, ends[:-1]):
            assert len(set(sample[part])) == 1, "a context is of one sample"
        if len(batch.lengths) > 1:
            assert batch.n_cells <= context + extra + context


@given(sizes=SIZES, n_ranks=st.integers(1, 4))
def test_the_order_is_a_function_of_seed_and_epoch(sizes, n_ranks):
    def rows(epoch: int, seed: int = 0) -> list[list[int]]:
        batches = plan_of(sizes, seed=seed, n_ranks=n_ranks).minibatches(epoch)
        return [batch.rows.tolist() for batch in batches]

    assert rows(1) == rows(1)
    if sum(sizes) > 100 and n_ranks == 1:
        assert rows(1) != rows(2)
        assert rows(1) != rows(1, seed=1)


def test_ranks_together_see_what_one_sees():
    sizes = [130, 1, 44, 60, 9, 156]
    one, two = plan_of(sizes, accumulate=2), plan_of(sizes, n_ranks=2)
    assert one.n_batches == two.n_batches == 8
    shares = [two.minibatches(0, rank) for rank in range(2)]
    taken_in_turn = [batch.rows.tolist() for pair in zip(*shares, strict=True) for batch in pair]
    assert taken_in_turn == [batch.rows.tolist() for batch in one.minibatches(0)]


def test_neighbours_on_disk_are_cut_elsewhere_in_each_epoch():
    plan = plan_of([1000], context=100, batch=100)
    starts = [{int(batch.start[0]) % 100 for batch in plan.minibatches(epoch)} for epoch in range(4)]
    assert len(set.union(*starts)) > 2


@given(sizes=st.lists(st.integers(1, 90), min_size=1, max_size=20), batch=st.integers(1, 60), most=st.integers(1, 60))
def test_units_cover_every_sample_in_order(sizes, batch, most):
    n_cells = np.array(sizes)
    starts = np.cumsum(n_cells) - n_cells
    units = whole_units(starts, n_cells, batch, most)
    covered = [(unit.start, unit.stop) for unit in units if unit.nth == 0]
    assert [start for start, _ in covered] == [0, *(stop for _, stop in covered[:-1])]
    assert covered[-1][1] == sum(sizes)
    assert {start for start, _ in covered} <= set(starts.tolist())
    for unit in units:
        size = unit.stop - unit.start
        assert size <= max(batch, most) or unit.n_slices == -(-size // most)


@pytest.fixture
def corpus(tmp_path, sections):
    return build_corpus(sections, tmp_path / "c", shard_size=40, progress=False, spatial_key="spatial", **KEYS)


@pytest.fixture
def dissociated(tmp_path, tissues):
    return build_corpus(tissues, tmp_path / "d", shard_size=40, progress=False, **KEYS)


@pytest.fixture
def grid(tmp_path, sections):
    """Cells on a coarse grid, several in one place: distances and axes do not decide."""
    sections.obsm["spatial"] = (sections.obsm["spatial"] / 60).round()
    return build_corpus(sections, tmp_path / "g", shard_size=40, progress=False, spatial_key="spatial", **KEYS)


def model_of(corpus: Any, **arguments: Any) -> CellPLM:
    model = CellPLM(registry=corpus.registry, **(TINY | arguments))
    model.is_trained_ = True
    return model


def anndata_model(corpus: Any, model: CellPLM, **arguments: Any) -> CellPLM:
    adata = corpus.to_anndata()
    CellPLM.setup_anndata(adata, **corpus.registry["setup_args"])
    same = CellPLM(adata, **(TINY | arguments))
    same.module.load_state_dict(model.module.state_dict())
    same.module.eval()
    same.is_trained_ = True
    return same


@pytest.mark.parametrize("kind", ["corpus", "grid", "dissociated"])
@pytest.mark.parametrize("max_context", [8192, 20])
def test_a_model_starts_and_embeds_as_with_an_anndata(request, kind, max_context):
    corpus = request.getfixturevalue(kind)
    torch.manual_seed(0)
    model = model_of(corpus, max_context=max_context)
    adata = corpus.to_anndata()
    CellPLM.setup_anndata(adata, **corpus.registry["setup_args"])
    torch.manual_seed(0)
    fresh = CellPLM(adata, max_context=max_context, **TINY).module.state_dict()
    for name, value in model.module.state_dict().items():
        torch.testing.assert_close(value, fresh[name], atol=1e-5, rtol=1e-4)
    z = model.get_latent_representation(dataloader=CorpusDataModule(corpus).inference_dataloader())
    same = anndata_model(corpus, model, max_context=max_context)
    np.testing.assert_allclose(z, same.get_latent_representation(), atol=1e-5)


def test_minibatches_are_those_of_the_in_memory_loader(corpus):
    model = model_of(corpus)
    data = CorpusDataModule(corpus, batch_size=500, validation=0.0)
    data.serve(model)
    theirs = anndata_model(corpus, model)._splitter(1.0, None, False, 500, None)
    ours, theirs = next(iter(data.train_dataloader())), next(iter(theirs.train_dataloader()))
    assert ours.keys() == theirs.keys()
    for name in ours:
        assert ours[name].dtype == theirs[name].dtype, name
        assert ours[name].shape[1:] == theirs[name].shape[1:], name
    for name in ("library", "batch", "platform", "dataset", "values"):
        np.testing.assert_allclose(np.sort(ours[name]), np.sort(theirs[name]))


def test_counts_of_a_minibatch_come_in_the_order_asked_for():
    counts = sp.csr_matrix(np.arange(12.0).reshape(4, 3))
    for rows in (np.arange(4), np.array([2, 0, 3, 1]), np.array([1, 3])):
        np.testing.assert_array_equal(_AsRead(counts)[rows].toarray(), counts[rows].toarray())


def test_workers_do_not_change_minibatches(corpus):
    model = model_of(corpus)
    orders = []
    for num_workers in (0, 2):
        data = CorpusDataModule(corpus, batch_size=16, context_size=8, num_workers=num_workers)
        data.serve(model)
        orders.append([batch["library"].tolist() for batch in data.train_dataloader()])
    assert orders[0] == orders[1]


def test_an_epoch_goes_on_where_it_was(corpus):
    model = model_of(corpus)
    data = CorpusDataModule(corpus, batch_size=16, context_size=8)
    data.serve(model)
    loader = data.train_dataloader()
    loader.set_epoch(2)
    whole = [batch["library"].tolist() for batch in loader]
    loader.set_epoch(2)
    stopped = iter(loader)
    first = [next(stopped)["library"].tolist() for _ in range(3)]
    state = loader.state_dict()
    later = data.train_dataloader()
    later.load_state_dict(state)
    later.set_epoch(2)
    assert first + [batch["library"].tolist() for batch in later] == whole
    later.set_epoch(3)
    assert len(list(later)) == len(whole)


def test_samples_are_held_out_whole(corpus):
    model = model_of(corpus)
    data = CorpusDataModule(corpus, batch_size=16, validation=["sample1"])
    assert list(CorpusDataModule(corpus, validation="sample1").val_samples) == list(data.val_samples)
    data.serve(model)
    seen = [batch["library"] for batch in data.train_dataloader()]
    held_out = [batch["library"] for batch in data.val_dataloader()]
    cells = corpus.to_anndata().obs["sample"]
    assert sum(map(len, held_out)) == data.n_val == (cells == "sample1").sum()
    assert sum(map(len, seen)) == data.n_train == (cells != "sample1").sum()


def test_panels_travel(tmp_path, make_tissues):
    few, many = make_tissues(n_genes=20), make_tissues(n_genes=30, seed=1)
    corpus = build_corpus({"few": few, "many": many}, tmp_path / "c", progress=False, sample_key="sample")
    model = model_of(corpus)
    data = CorpusDataModule(corpus, batch_size=200, validation=0.0)
    model.train(1, datamodule=data, accelerator="cpu", devices=1, enable_progress_bar=False)
    np.testing.assert_array_equal(model.module.panels.sum(1), [20, 30])
    batch = next(iter(data.train_dataloader()))
    np.testing.assert_array_equal(batch["measured"].sum(1), [20, 30])
    assert set(batch["panel"].tolist()) == {0, 1}


def test_what_was_not_measured_is_so_in_memory_too(tmp_path, make_tissues):
    few, many = make_tissues(n_genes=20), make_tissues(n_genes=30, seed=1)
    for name, adata in {"few": few, "many": many}.items():
        adata.obs_names = [f"{name}_{cell}" for cell in adata.obs_names]
    corpus = build_corpus({"few": few, "many": many}, tmp_path / "c", progress=False, sample_key="sample")
    model, adata = model_of(corpus), corpus.to_anndata()
    assert adata.varm["measured_genes"].sum().to_dict() == {"few": 20, "many": 30}
    absent = model.get_normalized_expression(adata).isna()
    np.testing.assert_array_equal(absent.sum(axis=1), np.where(adata.obs["dataset"] == "few", 10, 0))
    model.module.eval()
    stream = CorpusDataModule(corpus, validation=0.0).inference_dataloader().serve(model)
    assert float(model.get_elbo(adata)) == pytest.approx(float(model.get_elbo(dataloader=stream)), rel=1e-4)
    model.save(str(tmp_path / "model"))
    loaded = CellPLM.load(str(tmp_path / "model"), adata=False, accelerator="cpu")
    np.testing.assert_array_equal(loaded.get_normalized_expression(adata).isna(), absent)
    del adata.varm["measured_genes"]
    assert not loaded.get_normalized_expression(adata.copy()).isna().any(axis=None)


def test_a_model_with_other_genes_and_batches_reads_a_corpus(corpus, sections):
    known = sections[:, 5:].copy()
    known = known[known.obs["batch"] == "batch0"].copy()
    known.obs["batch"] = np.where(np.arange(known.n_obs) % 2, "batch0", "new")
    CellPLM.setup_anndata(known, batch_key="batch", sample_key="sample", spatial_key="spatial")
    model = CellPLM(known, **TINY)
    data = CorpusDataModule(corpus, batch_size=200, validation=0.0)
    data.serve(model)
    batch = next(iter(data.train_dataloader()))
    assert int(batch["genes"].max()) < 25
    assert "platform" not in batch
    assert set(batch["batch"].tolist()) == {0, 2}, "known, and past the end of the table"


def test_a_trained_model_says_once_what_it_does_not_know_of_a_corpus(corpus, dissociated, sections, recwarn):
    known = sections[:, 5:].copy()
    known.obs["batch"] = known.obs["batch"].astype(str) + "-new"
    known.var_names = [*known.var_names[:-2], "other1", "other2"]
    CellPLM.setup_anndata(known, batch_key="batch", platform_key="platform", sample_key="sample", spatial_key="spatial")
    model = CellPLM(known, **TINY)
    recwarn.clear()
    data = CorpusDataModule(dissociated, validation=0.0)
    data.serve(model)
    own = CorpusDataModule(corpus, validation=0.0)
    own.serve(model_of(corpus))
    assert not recwarn, "an untrained model has nothing to miss, nor does one of this corpus"
    model.is_trained_ = True
    data = CorpusDataModule(dissociated, validation=0.0)
    for _ in range(2):
        data.serve(model)
    said = [str(warning.message) for warning in recwarn]
    assert len(said) == 3
    assert said[0].startswith("2 of the model's 25 genes are not in the corpus")
    assert "7 of its genes are unknown to the model" in said[0]
    assert said[1].startswith("The corpus has 2 batch categories that the model has not seen")
    assert said[2].startswith("The corpus has no coordinates")


def test_train_save_and_load(corpus, tmp_path):
    model = CellPLM(registry=corpus.registry, **TINY)
    data = CorpusDataModule(corpus, batch_size=24, validation=["sample1"])
    quiet = {"accelerator": "cpu", "devices": 1, "enable_progress_bar": False}
    model.train(max_epochs=2, datamodule=data, check_val_every_n_epoch=1, **quiet)
    assert np.isfinite(model.history["elbo_validation"].to_numpy(dtype=float)).all()
    z = model.get_latent_representation(dataloader=data.inference_dataloader())
    assert z.shape == (90, 4)
    some = model.get_latent_representation(dataloader=data.inference_dataloader(samples=["sample1"]))
    rows = (corpus.to_anndata().obs["sample"] == "sample1").to_numpy()
    np.testing.assert_allclose(some, z[rows], atol=1e-6)
    model.save(str(tmp_path / "saved"))
    for loaded in (
        CellPLM.load(str(tmp_path / "saved"), adata=False, accelerator="cpu"),
        CellPLM.load(str(tmp_path / "saved"), datamodule=data, accelerator="cpu"),
    ):
        np.testing.assert_array_equal(loaded.get_latent_representation(dataloader=data.inference_dataloader()), z)
    adata = corpus.to_anndata()
    np.testing.assert_allclose(loaded.get_latent_representation(adata), z, atol=1e-5)


def test_messages(corpus):
    with pytest.raises(KeyError, match='validation names "nowhere"'):
        CorpusDataModule(corpus, validation=["nowhere"])
    with pytest.raises(ValueError, match="validation=1.5"):
        CorpusDataModule(corpus, validation=1.5)
    with pytest.raises(RuntimeError, match=r"serve\(model\)"):
        CorpusDataModule(corpus).train_dataloader()
    with pytest.raises(ValueError, match="early_stopping asked for validation cells; .* validation=0.02"):
        CellPLM(registry=corpus.registry, n_hidden=16, n_layers=1).train(
            datamodule=CorpusDataModule(corpus, validation=0.0), max_epochs=1, early_stopping=True
        )
    with pytest.raises(NotImplementedError, match="build_corpus"):
        CellPLM.setup_annbatch()
    data = CorpusDataModule(corpus)
    with pytest.raises(ValueError, match="batch_size was 1024, is 16"):
        CorpusDataModule(corpus, batch_size=16, context_size=256).load_state_dict(data.state_dict())


def test_a_model_of_a_corpus_knows_what_names_of_genes_mean(tmp_path, make_tissues, build):
    """The corpus has Ensembl ids where any source has: the sources with symbols are read all the same."""
    symbols, ids = make_tissues(n_genes=3), make_tissues(n_genes=3, seed=1)
    symbols.var_names = ["CD3E", "TP53", "CD8A"]
    ids.var_names = ["ENSG00000198851", "ENSG00000141510", "ENSG00000153563"]
    corpus = build_corpus({"a": symbols, "b": ids}, tmp_path / "c", progress=False, batch_key="batch")
    model = CellPLM(registry=corpus.registry, **TINY)
    model.is_trained_ = True
    renamed = symbols.copy()
    renamed.var_names = ids.var_names
    np.testing.assert_array_equal(model.get_latent_representation(symbols), model.get_latent_representation(renamed))
