"""Joining data sets that measured different genes."""

from __future__ import annotations

import warnings
from typing import Any

import anndata
import mudata
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp
from anndata import AnnData

from cellplm_scvi import CellPLM
from cellplm_scvi.data import concat_panels


def make(genes: list[str], n_cells: int = 6, seed: int = 0, **obs: Any) -> AnnData:
    rng = np.random.default_rng(seed)
    adata = AnnData(sp.csr_matrix(rng.poisson(2.0, (n_cells, len(genes))).astype(np.float32)))
    adata.var_names, adata.obs_names = genes, [f"cell{n}" for n in range(n_cells)]
    for name, value in obs.items():
        adata.obs[name] = value
    return adata


@pytest.fixture
def reference() -> AnnData:
    adata = make(list("ABCDE"), cell_type=pd.Categorical(["T", "B"] * 3), batch="donor")
    adata.var["symbol"] = adata.var_names.str.lower()
    return adata


@pytest.fixture
def section() -> AnnData:
    adata = make(list("DBX"), 4, seed=1, batch="slide", area=3.5)
    adata.obsm["spatial"] = np.arange(8.0).reshape(4, 2)
    return adata


def test_counts_genes_and_panels(reference, section):
    joined = concat_panels([reference, section], keys=["reference", "xenium"])
    assert list(joined.var_names) == list("ABCDEX")
    assert sp.isspmatrix_csr(joined.X)
    np.testing.assert_array_equal(joined[:6, reference.var_names].X.toarray(), reference.X.toarray())
    np.testing.assert_array_equal(joined[6:, section.var_names].X.toarray(), section.X.toarray())
    measured = joined.varm["measured_genes"]
    assert measured.index[measured["reference"]].tolist() == list("ABCDE")
    assert measured.index[measured["xenium"]].tolist() == list("BDX")
    assert measured.dtypes.eq(bool).all()
    # what was not measured is absent, not stored
    assert joined.X[6:].nnz == section.X.nnz


def test_cells(reference, section):
    joined = concat_panels([reference, section], keys=["reference", "xenium"])
    assert joined.obs["dataset"].tolist() == ["reference"] * 6 + ["xenium"] * 4
    assert joined.obs_names.is_unique
    assert joined.obs_names[6] == "cell0-xenium"
    assert joined.obs["cell_type"].isna().tolist() == [False] * 6 + [True] * 4
    assert isinstance(joined.obs["cell_type"].dtype, pd.CategoricalDtype)
    assert joined.obs["area"].isna().tolist() == [True] * 6 + [False] * 4
    assert set(joined.obs["batch"]) == {"donor", "slide"}
    assert np.isnan(joined.obsm["spatial"][:6]).all()
    np.testing.assert_array_equal(joined.obsm["spatial"][6:], section.obsm["spatial"])
    assert joined.var.loc["A", "symbol"] == "a"


def test_columns_of_text_are_joined_without_a_warning(reference, section):
    reference.obs["donor"] = pd.array(["a"] * 6, dtype="str")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", message=".*shares only")
        joined = concat_panels([reference, section])
    assert joined.obs["donor"].isna().tolist() == [False] * 6 + [True] * 4


def test_names_that_do_not_collide_are_kept(reference, section):
    section.obs_names = [f"spot{n}" for n in range(4)]
    joined = concat_panels([reference, section])
    assert joined.obs_names.tolist() == [*reference.obs_names, *section.obs_names]
    assert list(joined.obs["dataset"].cat.categories) == ["0", "1"]


def test_dict_and_mudata(reference, section):
    named = {"reference": reference, "xenium": section}
    from_list = concat_panels(list(named.values()), keys=list(named), label="study")
    section.obs_names = [f"spot{n}" for n in range(4)]
    from_dict = concat_panels(named, label="study")
    from_mudata = concat_panels(mudata.MuData(named), label="study")
    for other in (from_dict, from_mudata):
        assert (other.X != from_list.X).nnz == 0
        pd.testing.assert_frame_equal(other.varm["measured_genes"], from_list.varm["measured_genes"])
        assert other.obs["study"].tolist() == from_list.obs["study"].tolist()
    assert concat_panels(named, keys=["xenium", "reference"]).var_names[0] == "D"


def test_layer_dense_and_integer_counts(reference, section):
    for adata in (reference, section):
        adata.layers["counts"] = adata.X.toarray().astype(int)
        adata.X = np.log1p(adata.X.toarray())
    joined = concat_panels([reference, section], layer="counts")
    np.testing.assert_array_equal(joined[:6, reference.var_names].X.toarray(), reference.layers["counts"])
    with pytest.raises(ValueError, match='Data set "0": X does not hold counts: it looks log-normalised'):
        concat_panels([reference, section])


def test_the_inputs_stay_as_they_are(reference, section):
    before, counts = reference.copy(), section.X.copy()
    concat_panels([reference, section])
    np.testing.assert_array_equal(section.X.indices, counts.indices)
    np.testing.assert_array_equal(section.X.data, counts.data)
    pd.testing.assert_frame_equal(reference.obs, before.obs)
    assert list(reference.varm) == []


def test_the_model_takes_it(reference, section):
    joined = concat_panels({"reference": reference, "xenium": section})
    CellPLM.setup_anndata(
        joined, dataset_key="dataset", batch_key="batch", spatial_key="spatial", measured_genes_key="measured_genes"
    )
    model = CellPLM(joined, n_hidden=16, n_latent=4, n_layers=1)
    model.train(max_epochs=1, accelerator="cpu", devices=1, enable_progress_bar=False)
    assert model.get_normalized_expression().isna().to_numpy()[6:].sum() == 4 * 3


def test_mistakes(reference, section):
    with pytest.raises(ValueError, match="2 data sets and 1 keys"):
        concat_panels([reference, section], keys=["one"])
    with pytest.raises(ValueError, match="must differ"):
        concat_panels([reference, section], keys=["one", "one"])
    with pytest.raises(KeyError, match='keys has "three"'):
        concat_panels({"one": reference, "two": section}, keys=["one", "three"])
    with pytest.raises(TypeError, match="pass a list of AnnData"):
        concat_panels(reference)
    with pytest.raises(ValueError, match="joins several data sets; there is 1"):
        concat_panels([reference])
    with pytest.raises(ValueError, match='Data set "1": var_names has 1 gene name more than once'):
        concat_panels([reference, make(["A", "A"])])
    section.obsm["spatial"] = np.zeros((4, 2))
    reference.obsm["spatial"] = np.zeros((6, 3))
    with pytest.raises(ValueError, match="different number of columns"):
        concat_panels([reference, section])


def test_genes_that_do_not_match(reference):
    with pytest.raises(ValueError, match='Data set "0" shares none of its 5 genes .* Use the same kind'):
        concat_panels([reference, make(["X", "Y"])])
    with pytest.raises(ValueError, match="different organisms"):
        concat_panels([reference, make(["a", "b"])])
    ids = make(["ENSG00000000003", "ENSG00000000005"])
    with pytest.raises(ValueError, match=r"in different ways: .*symbols .*ENSG ids .*to_ensembl"):
        concat_panels([reference, ids])
    with pytest.raises(ValueError, match="ENSMUSG ids"):
        concat_panels([make(["ENSMUSG00000000003", "ENSMUSG00000000005"]), ids])
    versions = make(["ENSG00000000003.5", "ENSG00000000005.2"])
    with pytest.raises(ValueError, match=r'1 Ensembl ids have different versions .*ENSG00000000003.5 in "0".*Take the'):
        concat_panels([versions, make(["ENSG00000000003.7", "ENSG00000000005.2"])])
    with pytest.raises(ValueError, match="2 Ensembl ids have different versions"):
        concat_panels([versions, ids])
    with pytest.warns(UserWarning, match="shares only 1 of its 2 genes"):
        concat_panels([reference, make(["A", "Y"])])


def test_columns_of_truth_values_can_be_written(reference, section, tmp_path):
    for adata in (reference, section):
        adata.var["variable"] = adata.var_names.isin(["A", "D"])
    reference.obs["doublet"] = [True, False] * 3
    reference.var["known"] = True
    joined = concat_panels([reference, section])
    assert joined.var["variable"].dtype == bool
    assert joined.var_names[joined.var["variable"]].tolist() == ["A", "D"]
    assert joined.var["known"].isna().tolist() == [False] * 5 + [True]
    assert joined.obs["doublet"].iloc[:6].tolist() == [True, False] * 3
    assert joined.obs["doublet"].iloc[6:].isna().all()
    joined.write_h5ad(tmp_path / "joined.h5ad")
    again = anndata.read_h5ad(tmp_path / "joined.h5ad")
    pd.testing.assert_series_equal(again.obs["doublet"], joined.obs["doublet"])


def test_what_was_joined_before_is_not_taken_for_measured():
    rng = np.random.default_rng(0)
    parts = {
        name: AnnData(
            sp.csr_matrix(rng.poisson(1.0, (6, n)).astype(np.float32)),
            var=pd.DataFrame(index=[f"gene{i}" for i in range(n)]),
            obs=pd.DataFrame(index=[f"{name}{i}" for i in range(6)]),
        )
        for name, n in (("A", 20), ("B", 12), ("C", 15))
    }
    joined = concat_panels({"A": parts["A"], "B": parts["B"]})
    for label in ("dataset", "study"):
        with pytest.raises(ValueError, match='Data set "j": .*"B" did not measure all of its genes'):
            concat_panels({"j": joined, "C": parts["C"]}, label=label)
    # what it advises, and a part whose cells measured all
    table = joined.varm["measured_genes"]
    b = joined[(joined.obs["dataset"] == "B").to_numpy(), table["B"].to_numpy()].copy()
    a = joined[(joined.obs["dataset"] == "A").to_numpy()].copy()
    again = concat_panels({"A": a, "B": b, "C": parts["C"]})
    assert again.varm["measured_genes"].sum().tolist() == [20, 12, 15]
