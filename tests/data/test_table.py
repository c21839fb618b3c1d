"""Reading: rows of counts from any form of matrix, minibatches, samplers, and splits."""

from __future__ import annotations

import anndata
import numpy as np
import pytest
import scipy.sparse as sp
import torch
from anndata import AnnData
from hypothesis import given
from hypothesis import strategies as st

from cellplm_scvi.data import _loader
from cellplm_scvi.data._loader import CellDataset, MinibatchRows, SpatialInputs, training_loader, whole_sample_loader
from cellplm_scvi.data._splitter import SampleSplitter, split_units
from cellplm_scvi.data._table import CellTable, CountRows

FORMS = {
    "csr_matrix": sp.csr_matrix,
    "csc_matrix": sp.csc_matrix,
    "csr_array": sp.csr_array,
    "csc_array": sp.csc_array,
    "dense": np.asarray,
    "int32": lambda x: sp.csr_matrix(x.astype(np.int32)),
    "uint16": lambda x: x.astype(np.uint16),
    "float16": lambda x: x.astype(np.float16),
}


@pytest.mark.parametrize("form", FORMS)
@given(
    seed=st.integers(0, 2**32 - 1), n_cells=st.integers(1, 20), n_given=st.integers(1, 12), n_genes=st.integers(1, 12)
)
def test_rows_of_counts_are_those_of_the_dense_matrix(form, seed, n_cells, n_given, n_genes):
    rng = np.random.default_rng(seed)
    dense = rng.poisson(1.0, (n_cells, n_given)).astype(np.float32)
    columns = rng.permutation(max(n_given, n_genes))[:n_given]
    columns[columns >= n_genes] = -1
    expected = np.zeros((n_cells, n_genes), np.float32)
    expected[:, columns[columns >= 0]] = dense[:, columns >= 0]
    rows = rng.integers(n_cells, size=rng.integers(0, 2 * n_cells))
    found = CountRows(FORMS[form](dense), columns, n_genes)[rows]
    assert found.dtype == np.float32
    np.testing.assert_array_equal(found.toarray(), expected[rows])


@pytest.mark.parametrize("dtype", [np.uint8, np.int16, np.float32])
@pytest.mark.parametrize("form", [sp.csr_matrix, sp.csr_array])
def test_entries_that_are_stored_twice_are_summed(form, dtype):
    highest = 250 if dtype == np.uint8 else 32_000
    x = form((np.full(3, highest, dtype), np.array([0, 1, 1]), np.array([0, 1, 3])), shape=(2, 2))
    np.testing.assert_array_equal(
        CountRows(x, np.arange(2), 2)[np.arange(2)].toarray(), [[highest, 0], [0, 2 * highest]]
    )
    assert x.nnz == 3  # the user's matrix stays as it is
    assert x.dtype == dtype


@pytest.mark.parametrize("dense", [False, True])
def test_rows_of_backed_counts_come_in_the_order_asked_for(tmp_path, dense):
    rng = np.random.default_rng(0)
    x = rng.poisson(1.0, (30, 7)).astype(np.float32)
    AnnData(x if dense else sp.csr_matrix(x)).write_h5ad(tmp_path / "x.h5ad")
    backed = anndata.read_h5ad(tmp_path / "x.h5ad", backed="r")
    columns = np.array([3, 2, 1, 0, -1, 4, 5])
    expected = np.zeros((30, 6), np.float32)
    expected[:, columns[columns >= 0]] = x[:, columns >= 0]
    rows = rng.integers(30, size=50)
    np.testing.assert_array_equal(CountRows(backed.X, columns, 6)[rows].toarray(), expected[rows])


def test_counts_outside_of_a_panel_are_left_out():
    x = np.arange(1.0, 13).reshape(3, 4).astype(np.float32)
    measured = np.array([[True, True, False, False], [False, True, True, True]])
    panel = np.array([0, 1, 0])
    rows = np.array([2, 1, 1])
    found = CountRows(sp.csr_matrix(x), np.arange(4), 4, measured, panel)[rows]
    np.testing.assert_array_equal(found.toarray(), (x * measured[panel])[rows])


def test_the_users_matrix_is_left_alone():
    x = sp.csr_matrix((np.ones(4, np.float32), [2, 0, 2, 2], [0, 2, 4]), shape=(2, 3))
    before = x.indices.copy()
    found = CountRows(x, np.arange(3), 3)[np.array([0, 1])]
    np.testing.assert_array_equal(found.toarray(), [[1, 0, 1], [0, 0, 2]])
    np.testing.assert_array_equal(x.indices, before)
    assert x.nnz == 4


def table_of(model) -> CellTable:
    return CellTable.from_manager(model.adata_manager)


@pytest.fixture(params=["dissociated", "spatial"])
def model(request, models):
    return models[request.param]


@given(
    batch_size=st.integers(1, 100),
    context_size=st.integers(1, 100),
    seed=st.integers(0, 2**31),
    epoch=st.integers(0, 50),
)
def test_a_training_epoch_gives_each_cell_once(model, batch_size, context_size, seed, epoch):
    table = table_of(model)
    pool = np.arange(0, table.n_cells, 2)
    loader = training_loader(
        table, model._spatial_inputs, pool, batch_size=batch_size, context_size=context_size, seed=seed
    )
    loader.sampler.set_epoch(epoch)
    requests = list(loader.sampler)
    assert len(requests) == len(loader.sampler) == len(loader)
    assert sorted(np.concatenate([request.rows for request in requests])) == list(pool)
    first = next(iter(loader))
    assert int(first["lengths"].sum()) == first["library"].shape[0]
    loader.sampler.set_epoch(epoch + 1)
    assert len(loader.sampler) == len(requests)


@given(n_ranks=st.integers(1, 5), batch_size=st.integers(1, 60))
def test_ranks_get_equal_numbers_and_together_everything(model, n_ranks, batch_size):
    table = table_of(model)
    everything = np.arange(table.n_cells)

    def samplers():
        kwargs = {"batch_size": batch_size}
        yield training_loader(table, SpatialInputs(), everything, context_size=16, seed=0, **kwargs).sampler
        yield whole_sample_loader(table, SpatialInputs(), everything, max_context=16, shared=True, **kwargs).sampler

    for sampler in samplers():
        shares = []
        for rank in range(n_ranks):
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(_loader, "_rank", lambda rank=rank: (rank, n_ranks))
                shares.append(list(sampler))
                assert len(sampler) == len(shares[-1])
        assert len({len(share) for share in shares}) == 1
        seen = np.concatenate([request.rows for share in shares for request in share])
        assert set(seen) == set(everything)
        given = sum(len(share) for share in shares)
        assert given - n_ranks < len(sampler.batches()) <= given
    for result in (
        whole_sample_loader(table, SpatialInputs(), everything, max_context=16, batch_size=batch_size).sampler,
        _loader.RowSampler(everything, batch_size),
    ):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(_loader, "_rank", lambda: (n_ranks - 1, n_ranks))
            rows = np.concatenate([r.rows if r.target is None else r.rows[r.target] for r in result])
        assert sorted(rows) == list(everything)


def test_a_minibatch_holds_what_the_table_holds(spatial_model):
    table = table_of(spatial_model)
    loader = training_loader(
        table, SpatialInputs(4, True, 2), np.arange(table.n_cells), batch_size=30, context_size=15, seed=0
    )
    x = spatial_model.adata.X.toarray()
    xy = spatial_model.adata.obsm["spatial"]
    for request, batch in zip(loader.sampler, loader, strict=True):
        n = len(request.rows)
        dense = np.zeros((n, 30))
        rows = np.repeat(np.arange(n), np.diff(batch["offsets"]))
        dense[rows, batch["genes"]] = batch["values"]
        np.testing.assert_array_equal(dense, x[request.rows])
        np.testing.assert_array_equal(batch["library"], dense.sum(1))
        np.testing.assert_array_equal(batch["batch"], table.covariates["batch"][request.rows])
        near = batch["neighbours"].numpy()
        assert near.shape == (n, 4)
        niche = np.zeros((n, 30))
        niche[np.repeat(np.arange(n), np.diff(batch["niche_offsets"])), batch["niche_genes"]] = batch["niche_values"]
        np.testing.assert_array_equal(niche, [dense[row[:2][row[:2] >= 0]].sum(0) for row in near])
        for cell, row in enumerate(near):
            others = row[row >= 0]
            assert cell not in others
            assert (table.sample[request.rows[others]] == table.sample[request.rows[cell]]).all()
        np.testing.assert_array_equal(batch["located"], np.isfinite(xy[request.rows, 0]))
        where = batch["coordinates"].numpy()
        np.testing.assert_array_equal(np.isnan(where[:, 0]), np.isnan(xy[request.rows, 0]))
        assert np.nanmin(where) >= 0
        assert np.nanmax(where) <= 1


def test_neighbours_lie_in_the_same_context(spatial_model):
    """Slices of one sample share cells; in one minibatch each sees its own copy."""
    table = table_of(spatial_model)
    loader = whole_sample_loader(
        table, SpatialInputs(4, False, 0), np.arange(table.n_cells), batch_size=1000, max_context=10
    )
    repeated = 0
    for request, batch in zip(loader.sampler, loader, strict=True):
        repeated += len(request.rows) - len(set(request.rows))
        context = torch.repeat_interleave(torch.arange(len(batch["lengths"])), batch["lengths"])
        cells, nth = torch.nonzero(batch["neighbours"] >= 0, as_tuple=True)
        assert torch.equal(context[batch["neighbours"][cells, nth]], context[cells])
        found = request.rows[batch["neighbours"][cells, nth].numpy()]
        np.testing.assert_array_equal(found, loader.dataset.nearest.index[request.rows][cells.numpy(), nth.numpy()])
        n_near = (loader.dataset.nearest.index[request.rows] >= 0).sum(1)[batch["target"]]
        np.testing.assert_array_equal((batch["neighbours"] >= 0).sum(1)[batch["target"]], n_near)
    assert repeated > 0


def test_rows_one_by_one(model):
    table = table_of(model)
    rows = np.array([5, 2, 2, 40])
    moments = np.arange(table.n_cells)[:, None] * np.ones(3), np.ones((table.n_cells, 3))
    batch = CellDataset(table, SpatialInputs(), None, moments)[MinibatchRows(rows)]
    np.testing.assert_array_equal(batch["qz_mean"][:, 0], rows)
    assert "lengths" not in batch


@given(st.integers(1, 60), st.floats(0.05, 1.0), st.booleans())
def test_a_split_is_a_partition(n, train_size, shuffle):
    units = np.arange(n) * 3
    parts = split_units(units, train_size, None, shuffle=shuffle)
    assert sorted(np.concatenate(parts)) == list(units)
    assert len(parts[0]) >= max(1, int(train_size * n))
    assert len(parts[2]) == 0
    assert all((np.diff(part) > 0).all() for part in parts)


def test_a_split_leaves_a_test_set():
    train, validation, test = split_units(np.arange(100), 0.6, 0.3, shuffle=True)
    assert [len(part) for part in (train, validation, test)] == [60, 30, 10]


def test_validation_cells_are_hidden_from_training(models):
    """They see the training cells of their sample, and training sees none of them."""
    model = models["dissociated"]
    splitter = SampleSplitter(model.adata_manager, train_size=0.7, batch_size=20, validation_size=0.2)
    trained = np.concatenate([request.rows for request in splitter.train_dataloader().sampler])
    assert not set(trained) & (set(splitter.val_idx) | set(splitter.test_idx))
    for loader, targets in (
        (splitter.val_dataloader(), splitter.val_idx),
        (splitter.test_dataloader(), splitter.test_idx),
    ):
        requests = list(loader.sampler)
        counted = np.concatenate([r.rows if r.target is None else r.rows[r.target] for r in requests])
        assert sorted(counted) == list(targets)
        seen = set(np.concatenate([request.rows for request in requests]))
        assert seen <= set(splitter.train_idx) | set(targets)
        assert seen & set(splitter.train_idx)
