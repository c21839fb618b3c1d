"""Which cells the groups of a differential expression have, in every form in which they can be asked for."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pandas as pd
import pytest

from cellplm_scvi import CellPLM


@pytest.fixture
def cells(dissociated_model, clone) -> CellPLM:
    """A model whose data a test may change."""
    return clone(dissociated_model)


def compare(model: CellPLM, **asked: Any) -> pd.DataFrame:
    return model.differential_expression(**asked, silent=True)


def means(model: CellPLM, mask: np.ndarray) -> pd.Series:
    """Mean counts of cells, by gene."""
    return pd.Series(model.adata.X[mask].mean(0).A1, model.adata.var_names)


@pytest.mark.parametrize("n_names", [45, 70, 90], ids=["all twice", "some twice", "unique"])
def test_a_query_chooses_rows_whatever_their_names(cells, n_names):
    """Cells "0" and "1", ... of two experiments are different cells."""
    adata = cells.adata
    adata.obs_names = [f"cell{i % n_names}" for i in range(adata.n_obs)]
    adata.obs["half"] = np.where(np.arange(adata.n_obs) < 45, "A", "B")
    first = (adata.obs["half"] == "A").to_numpy()
    expected = compare(cells, idx1=first)
    pd.testing.assert_frame_equal(compare(cells, idx1="half == 'A'"), expected)
    pd.testing.assert_frame_equal(compare(cells, idx1="half == 'A'", idx2="half == 'B'"), expected)
    np.testing.assert_allclose(expected["raw_mean1"], means(cells, first)[expected.index], rtol=1e-5)


def test_a_query_may_ask_for_names(cells):
    found = compare(cells, idx1="index in ['cell3', 'cell7']")
    pd.testing.assert_frame_equal(found, compare(cells, idx1=[3, 7]))


@pytest.mark.parametrize(
    ("form", "names"),
    [
        (lambda kind: pd.array(kind, dtype="string"), ("type1", "type2")),
        (lambda kind: pd.Categorical(kind), ("type1", "type2")),
        (lambda kind: kind, ("type1", "type2")),
        (lambda kind: pd.array([None if k is None else int(k[-1]) for k in kind], dtype="Int64"), (1, 2)),
        (lambda kind: pd.array([None if k is None else k == "type1" for k in kind], dtype="boolean"), (True, False)),
    ],
    ids=["string", "category", "object", "Int64", "boolean"],
)
def test_cells_without_a_value_are_of_no_group(cells, form: Callable, names):
    kind = cells.adata.obs["cell_type"].to_numpy(dtype=object, copy=True)
    kind[::7] = None
    cells.adata.obs["kind"] = form(kind)
    first = kind == "type1"
    second = (kind == "type0") | (kind == "type2") if names == (True, False) else kind == "type2"
    found = compare(cells, groupby="kind", group1=names[0], group2=names[1])
    np.testing.assert_allclose(found["raw_mean1"], means(cells, first)[found.index], rtol=1e-5)
    np.testing.assert_allclose(found["raw_mean2"], means(cells, second)[found.index], rtol=1e-5)
    each = compare(cells, groupby="kind")
    assert set(each["group1"]) == set(cells.adata.obs["kind"].dropna())
    rest = each[each["group1"] == names[0]]
    np.testing.assert_allclose(rest["raw_mean2"], means(cells, ~first)[rest.index], rtol=1e-5)


def test_categories_without_a_cell_are_no_groups(cells):
    cells.adata.obs["kind"] = cells.adata.obs["cell_type"].cat.add_categories(["zz"])
    found, expected = compare(cells, groupby="kind"), compare(cells, groupby="cell_type")
    pd.testing.assert_frame_equal(found, expected)
    with pytest.raises(ValueError, match=r'no cell of the group "zz"; it has "type0", "type1", "type2"\.'):
        compare(cells, groupby="kind", group1="zz")


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"idx1": []}, "idx1 has no cell"),
        ({"idx1": [1], "idx2": ()}, "idx2 has no cell"),
        ({"groupby": "one"}, r'obs\["one"\] has one group only \("A"\): there is nothing to compare'),
        ({"groupby": "none"}, r'obs\["none"\] has no value: there is nothing to compare'),
    ],
)
def test_groups_without_a_cell(cells, asked, message):
    cells.adata.obs["one"] = pd.Categorical(["A"] * cells.adata.n_obs, categories=["A", "B"])
    cells.adata.obs["none"] = pd.array([None] * cells.adata.n_obs, dtype="string")
    with pytest.raises(ValueError, match=message):
        compare(cells, **asked)


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({}, "Say which cells to compare"),
        ({"idx2": [1, 2]}, "Say which cells to compare"),
        ({"groupby": "cell_type", "idx2": [1, 2]}, "Say which cells to compare"),
        ({"idx1": [900]}, "idx1: indices go from 900 to 900; the AnnData has 90 cells"),
        ({"idx1": [True, False]}, r"idx1: indices is a mask of shape \(2,\)"),
        ({"idx1": [1], "idx2": ["cell3"]}, "idx2: indices must be row numbers, one a cell, or a boolean mask"),
        ({"groupby": "cell_type", "batchid1": ["batch0"]}, "which batch_correction=True does"),
    ],
)
def test_cells_that_are_not_there(dissociated_model, asked, message):
    with pytest.raises((IndexError, TypeError, ValueError), match=message):
        compare(dissociated_model, **asked)
