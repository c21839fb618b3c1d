"""Expression of genes that a data set did not measure."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp
import scvi
import torch
from anndata import AnnData
from sklearn.decomposition import PCA
from sklearn.linear_model import Ridge

from cellplm_scvi import CellPLM, CellPLMAnnotator
from cellplm_scvi.data import synthetic_tissues, true_shares
from cellplm_scvi.model import _panel_regression
from cellplm_scvi.model._panel_regression import _fit
from cellplm_scvi.nn import PanelMasking, SparseCounts

KEYS = {
    "batch_key": "batch",
    "platform_key": "platform",
    "dataset_key": "dataset",
    "sample_key": "sample",
    "spatial_key": "spatial",
    "measured_genes_key": "measured_genes",
}


@pytest.fixture(scope="module")
def adata() -> AnnData:
    """Two dissociated samples with all 60 genes and two sections with 40 of them."""
    return synthetic_tissues(
        400, 60, 4, n_types=3, n_dissociated=2, n_panel_genes=40, niche_effect=0.5, rare_share=0.2, platform_effect=0.2
    )


@pytest.fixture(scope="module")
def model(adata) -> CellPLM:
    CellPLM.setup_anndata(adata, **KEYS)
    model = CellPLM(adata, n_hidden=32, n_latent=6, n_layers=1, n_components=4, n_neighbours=6, n_niche=4)
    model.train(
        15,
        accelerator="cpu",
        devices=1,
        enable_progress_bar=False,
        batch_size=64,
        train_size=1.0,
        plan_kwargs={"lr": 5e-3},
    )
    return model


@pytest.fixture(scope="module")
def known(adata) -> np.ndarray:
    """Which genes each cell's data set measured, (n_cells, n_genes)."""
    return pd.DataFrame(adata.varm["measured_genes"])[adata.obs["dataset"]].to_numpy().T


def test_every_gene_has_a_value_and_the_measured_ones_add_up(model, adata, known):
    imputed = model.get_imputed_expression(library_size=100)
    assert list(imputed.columns) == list(adata.var_names)
    assert list(imputed.index) == list(adata.obs_names)
    assert imputed.notna().all(axis=None)
    np.testing.assert_allclose((imputed.to_numpy() * known).sum(1), 100, rtol=1e-4)
    assert ((imputed.to_numpy() * ~known).sum(1) > 0).tolist() == (~known).any(1).tolist()


def test_measured_genes_are_as_they_are_otherwise(model, known):
    imputed = model.get_imputed_expression().to_numpy()
    decoded = model.get_normalized_expression().to_numpy()
    np.testing.assert_allclose(imputed[known], decoded[known], rtol=1e-4)


def test_the_own_library(model, adata, known):
    imputed = model.get_imputed_expression(library_size="latent").to_numpy()
    np.testing.assert_allclose((imputed * known).sum(1), np.asarray(adata.X.sum(1)).ravel(), rtol=1e-3)


def test_imputed_genes_follow_the_truth(model, adata, known):
    """Over the cells of the sections, better than chance for most genes that these did not measure."""
    check_imputation(model, adata, known)


def test_a_model_of_the_reference_learns_the_panels_that_it_goes_on_with(adata, known):
    reference = adata[adata.obs["dataset"] != "spatial"].copy()
    CellPLM.setup_anndata(reference, batch_key="batch", dataset_key="dataset", sample_key="sample")
    options = {"accelerator": "cpu", "devices": 1, "enable_progress_bar": False, "batch_size": 64, "train_size": 1.0}
    options["plan_kwargs"] = {"lr": 5e-3}
    first = CellPLM(reference, n_hidden=32, n_latent=6, n_layers=1, n_components=4)
    first.train(10, **options)
    keys = {name: key for name, key in KEYS.items() if name not in ("platform_key", "spatial_key")}
    model = CellPLM.from_pretrained(first, adata, new_categories="add", **keys)
    model.train(15, **options)
    check_imputation(model, adata, known)


def check_imputation(model: CellPLM, adata: AnnData, known: np.ndarray) -> None:
    section = (adata.obs["dataset"] == "spatial").to_numpy()
    genes = np.flatnonzero(~known[section][0])
    found = model.get_imputed_expression()
    assert isinstance(found, pd.DataFrame)
    imputed = np.log(found.to_numpy()[section][:, genes])
    truth = np.log(true_shares(adata).to_numpy()[section][:, genes])
    correlations = [np.corrcoef(imputed[:, g], truth[:, g])[0, 1] for g in range(genes.size)]
    assert np.median(correlations) > 0.5
    # the scale is that of the truth too: shares relative to the measured genes
    relative = truth - np.log((true_shares(adata).to_numpy()[section] * known[section]).sum(1, keepdims=True))
    assert np.corrcoef(imputed.mean(0), relative.mean(0))[0, 1] > 0.8


def test_rows_and_genes_as_asked_for(model, adata):
    genes = list(adata.var_names[[50, 3, 20]])
    rows = [7, 2, 300]
    part = model.get_imputed_expression(indices=rows, gene_list=genes)
    whole = model.get_imputed_expression()
    pd.testing.assert_frame_equal(part, whole.iloc[rows][genes], rtol=1e-4)
    with pytest.raises(ValueError, match=r'1 gene that the model does not know \("geneX"\)'):
        model.get_imputed_expression(gene_list=["geneX"])


def test_genes_absent_from_new_data_are_imputed(model, adata, known):
    section = adata[adata.obs["dataset"] == "spatial"]
    panel = adata.varm["measured_genes"]["spatial"].to_numpy()
    new = section[:, panel].copy()
    with pytest.warns(UserWarning, match="count as not measured"):
        imputed = model.get_imputed_expression(new)
    expected = model.get_imputed_expression().loc[section.obs_names]
    np.testing.assert_allclose(imputed.to_numpy(), expected.to_numpy(), rtol=1e-3, atol=1e-6)


def test_a_model_of_whole_data_imputes_a_panel(model, adata, known):
    """Without a table of measured genes, its own cells measured them all."""
    whole = adata[adata.obs["dataset"] == "reference"].copy()
    CellPLM.setup_anndata(whole, batch_key="batch", sample_key="sample")
    reference = CellPLM(whole, n_hidden=16, n_latent=4, n_layers=1, n_components=2)
    reference.train(3, accelerator="cpu", enable_progress_bar=False)
    panel = adata.varm["measured_genes"]["spatial"].to_numpy()
    section = adata[adata.obs["dataset"] == "spatial", panel].copy()
    with pytest.warns(UserWarning, match="count as not measured"):
        imputed = reference.get_imputed_expression(section)
    assert imputed.notna().all(axis=None)
    joined = CellPLM.from_pretrained(reference, section.copy(), accelerator="cpu")
    decoded = [m.get_imputed_expression(a, regression_weight=0) for m, a in ((reference, section), (joined, None))]
    np.testing.assert_allclose(decoded[0].loc[:, panel], decoded[1].loc[:, panel], rtol=1e-4)
    assert np.corrcoef(np.log(decoded[0]).to_numpy().ravel(), np.log(decoded[1]).to_numpy().ravel())[0, 1] > 0.95
    # the regression is that of the cells of the model
    assert not np.allclose(imputed.loc[:, ~panel], decoded[0].loc[:, ~panel], rtol=1e-3)


def test_parts_of_large_data_do_not_depend_on_the_order_of_rows(model, adata, monkeypatch):
    monkeypatch.setattr(_panel_regression, "MAX_CELLS", 50)
    monkeypatch.setattr(_panel_regression, "MAX_REFERENCE", 60)
    imputed = model.get_imputed_expression(adata)
    shuffled = adata[np.random.default_rng(0).permutation(adata.n_obs)].copy()
    again = model.get_imputed_expression(shuffled)
    pd.testing.assert_frame_equal(again.loc[adata.obs_names], imputed, rtol=1e-4, atol=1e-7)


def test_uncertainty(model):
    mean, deviation = model.get_imputed_expression(indices=range(20), return_std=True)
    assert mean.shape == deviation.shape == (20, 60)
    assert (deviation > 0).all(axis=None)
    again = model.get_imputed_expression(indices=range(20), return_std=True)[1]
    pd.testing.assert_frame_equal(deviation, again)


def test_categories_that_were_added(model, adata):
    """Shares of a table's categories mix their contributions, those of the added ones too."""
    new = adata.copy()
    new.obs["batch"] = "new " + new.obs["batch"].astype(str)
    grown = CellPLM.from_pretrained(model, new, new_categories="add", accelerator="cpu")
    n_new = new.obs["batch"].nunique()
    for table in grown.module.decoder.tables("batch"):
        torch.nn.init.normal_(table.weight)
        assert table.n_categories == 2 * n_new
        mixed = torch.stack([table(share) for share in torch.eye(2 * n_new)])
        torch.testing.assert_close(mixed, table(torch.arange(2 * n_new)))
    assert grown.get_imputed_expression().notna().all(axis=None)


def test_reliability(model, adata):
    found = model.get_imputation_reliability(
        max_epochs=8, batch_size=64, accelerator="cpu", enable_progress_bar=False, plan_kwargs={"lr": 5e-3}
    )
    panel = adata.varm["measured_genes"]["spatial"]
    held_out = found["held_out_correlation"].notna()
    assert held_out.sum() == 8
    assert panel[held_out].all()
    assert found.loc[~panel, "expected_correlation"].between(-1, 1).all()
    assert found.loc[panel & ~held_out, "expected_correlation"].isna().all()
    # the expectation never falls where the reference is predicted better
    ordered = found.dropna(subset=["expected_correlation"]).sort_values("reference_correlation")["expected_correlation"]
    assert (ordered.diff().dropna() >= 0).all()
    with pytest.raises(ValueError, match='dataset="xenium" is not one of "reference", "spatial"'):
        model.get_imputation_reliability("xenium")
    with pytest.raises(ValueError, match="held_out=0.05"):
        model.get_imputation_reliability(held_out=0.05)


def test_reliability_reads_the_counts_that_were_set_up(adata):
    """Counts in a layer, and data sets that are numbers, change nothing; nor does an annotator around the network."""
    quick = {"max_epochs": 2, "batch_size": 64, "accelerator": "cpu", "enable_progress_bar": False}
    sizes = {"n_hidden": 16, "n_latent": 4, "n_layers": 1, "n_components": 2, "n_neighbours": 4, "n_niche": 4}
    other = adata.copy()
    other.layers["counts"] = other.X.copy()
    other.X = other.X.log1p()
    code = {"reference": 7, "spatial": 3}
    other.obs["dataset"] = other.obs["dataset"].astype(str).map(code)
    other.varm["measured_genes"] = other.varm["measured_genes"].rename(columns=code)
    found = []
    for data, keys in ((adata.copy(), KEYS), (other, KEYS | {"layer": "counts"})):
        scvi.settings.seed = 0
        CellPLM.setup_anndata(data, **keys)
        model = CellPLM(data, **sizes)
        model.train(1, accelerator="cpu", enable_progress_bar=False)
        found.append(model.get_imputation_reliability(3 if data is other else "spatial", **quick))
    # categories have another order, and their codes start elsewhere
    held_out = [frame["held_out_correlation"].notna() for frame in found]
    assert held_out[0].equals(held_out[1])
    assert found[1].notna().sum().equals(found[0].notna().sum())
    assert list(other.varm["measured_genes"].columns) == [7, 3]
    annotator = CellPLMAnnotator.from_cellplm(model, "cell_type")
    before = torch.get_rng_state()
    pd.testing.assert_frame_equal(annotator.get_imputation_reliability(**quick), found[1])
    assert torch.equal(torch.get_rng_state(), before), "the global generator stays as it was"


def test_other_panels_in_training():
    torch.manual_seed(0)
    dense = torch.poisson(torch.full((400, 10), 3.0))
    sparse = dense.to_sparse_csr()
    counts = SparseCounts(sparse.values(), sparse.col_indices(), sparse.crow_indices(), 10)
    panels = torch.zeros(2, 10, dtype=torch.bool)
    panels[0], panels[1, :4] = True, True
    shown, library = PanelMasking(cell_rate=1.0)(counts, dense.sum(1) + 5, panels)
    whole = (shown.to_dense() == dense).all(1)
    part = shown.to_dense()[:, 4:].sum(1) == 0
    assert (whole | part).all()
    assert 0.3 < part.float().mean() < 0.7
    # the library loses what is hidden, and keeps what is outside of the table
    torch.testing.assert_close(library, shown.to_dense().sum(1) + 5)
    unchanged, same = PanelMasking(cell_rate=0.0)(counts, dense.sum(1), panels)
    torch.testing.assert_close(unchanged.to_dense(), dense)
    torch.testing.assert_close(same, dense.sum(1))


def test_the_regression_adds_what_the_embedding_lost(adata, known):
    """An embedding of one dimension keeps little; genes that were measured are left as they are."""
    CellPLM.setup_anndata(adata, **KEYS)
    model = CellPLM(adata, n_hidden=16, n_latent=1, n_layers=1, latent="gaussian", n_neighbours=6, n_niche=4)
    model.train(3, accelerator="cpu", devices=1, enable_progress_bar=False, batch_size=64)
    section = (adata.obs["dataset"] == "spatial").to_numpy()
    truth = np.log(true_shares(adata).to_numpy()[section][:, ~known[section][0]])

    def correlation(weight: float) -> float:
        imputed = model.get_imputed_expression(regression_weight=weight).to_numpy()
        assert (imputed > 0).all()
        np.testing.assert_allclose(imputed[known], model.get_normalized_expression().to_numpy()[known], rtol=1e-4)
        found = np.log(imputed[section][:, ~known[section][0]])
        return float(np.mean([np.corrcoef(a, b)[0, 1] for a, b in zip(found.T, truth.T, strict=True)]))

    assert correlation(0.5) > correlation(0.0) + 0.1
    with pytest.raises(ValueError, match="regression_weight=2 must be from 0 to 1"):
        model.get_imputed_expression(regression_weight=2)


@pytest.mark.parametrize("n_cells", [60, 7])
def test_the_regression_is_ridge_on_principal_vectors_of_standardised_logs(n_cells):
    rng = np.random.default_rng(0)
    loadings = rng.normal(size=12)
    states = (rng.normal(size=(n, 1)) for n in (200, n_cells))
    reference, own = (sp.csr_matrix(rng.poisson(np.exp(s * loadings + 1)).astype(np.float32)) for s in states)
    shared, genes = np.arange(8), np.array([9, 11])
    fit = _fit(reference, own, shared, genes, 0)
    assert fit is not None

    def logs(x, columns, depth):
        x = x.toarray()
        return np.log1p(x[:, columns] / x[:, shared].sum(1, keepdims=True) * depth)

    depth = np.median(own.toarray()[:, shared].sum(1))
    x, y, new = logs(reference, shared, depth), logs(reference, genes, depth), logs(own, shared, depth)
    x, new = ((values - values.mean(0)) / values.std(0) for values in (x, new))
    components, own_components = (PCA(min(4, n_cells - 1)).fit(values).components_ for values in (x, new))
    rotation, cosine, _ = np.linalg.svd(components @ own_components.T)
    directions = components.T @ rotation[:, cosine > 0.5]
    assert 1 <= directions.shape[1] < len(components)
    ridge = Ridge(alpha=len(x)).fit(x @ directions, y)
    expected = ridge.predict(new @ directions) - ridge.intercept_
    np.testing.assert_allclose(fit.deviation(own), expected, atol=1e-4)


def test_data_sets_that_vary_along_different_genes_have_no_regression():
    """One program of genes in the reference, another in the cells to impute."""
    rng = np.random.default_rng(0)
    programs = np.zeros((2, 42))
    # half of a program up, half down, so that the totals of cells say nothing
    programs[0, :10] = programs[1, 20:30] = programs[0, 40] = 0.7
    programs[0, 10:20] = programs[1, 30:40] = programs[0, 41] = -0.7
    reference, own = (
        sp.csr_matrix(rng.poisson(np.exp(rng.normal(size=(300, 1)) * program + 2)).astype(np.float32))
        for program in programs
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_panel_regression, "MAX_COMPONENTS", 1)
        assert _fit(reference, own, np.arange(40), np.array([40, 41]), 0) is None
        assert _fit(reference, reference, np.arange(40), np.array([40, 41]), 0) is not None


def test_genes_that_cells_without_positions_teach_do_not_depend_on_positions(model, adata, known):
    """The reference has none; measured genes keep what the neighbourhood says of them."""
    moved = adata.copy()
    section = np.isfinite(moved.obsm["spatial"]).all(1)
    moved.obsm["spatial"][section] = np.random.default_rng(0).permutation(moved.obsm["spatial"][section])
    before, after = (x.to_numpy() for x in (model.get_imputed_expression(), model.get_imputed_expression(moved)))
    # the unit is that of the measured genes, whose sum is 1 either way
    np.testing.assert_allclose(after[~known], before[~known], rtol=1e-3, atol=1e-6)
    assert not np.allclose(after[section][known[section]], before[section][known[section]], rtol=1e-2)


@pytest.fixture(scope="module")
def nested(adata) -> AnnData:
    """The reference, a section with 40 of its genes, and one with 25 of those."""
    nested = adata.copy()
    names = nested.obs["dataset"].astype(str)
    names[nested.obs["sample"] == nested.obs["sample"][names == "spatial"].iloc[0]] = "small"
    nested.obs["dataset"] = names
    measured = nested.varm["measured_genes"]
    panel = measured["spatial"].to_numpy()
    nested.varm["measured_genes"] = measured.assign(small=panel & (panel.cumsum() <= 25))
    return nested


@pytest.mark.parametrize("regression_weight", [0.0, 0.7])
def test_nested_panels_are_imputed_the_same_alone_and_together(nested, regression_weight):
    """Of a gene, cells with positions teach it or not, whichever cells are asked for."""
    CellPLM.setup_anndata(nested, **KEYS)
    model = CellPLM(nested, n_hidden=16, n_latent=4, n_layers=1, n_components=2, n_neighbours=4, n_niche=4)
    model.train(1, accelerator="cpu", devices=1, enable_progress_bar=False)
    imputed = model.get_imputed_expression(regression_weight=regression_weight)
    for name in ("spatial", "small"):
        rows = (nested.obs["dataset"] == name).to_numpy()
        alone = model.get_imputed_expression(indices=rows, regression_weight=regression_weight)
        pd.testing.assert_frame_equal(alone, imputed[rows], rtol=1e-4, atol=1e-7)
    moved = nested.copy()
    placed = np.flatnonzero(np.isfinite(moved.obsm["spatial"]).all(1))
    moved.obsm["spatial"][placed] = moved.obsm["spatial"][placed[::-1]]
    again = model.get_imputed_expression(moved, regression_weight=regression_weight)
    large = nested.varm["measured_genes"]["spatial"].to_numpy()
    np.testing.assert_allclose(again.loc[:, ~large], imputed.loc[:, ~large], rtol=1e-3, atol=1e-6)
    # what the larger panel teaches the smaller one depends on neighbours
    taught = large & ~nested.varm["measured_genes"]["small"].to_numpy()
    small = (nested.obs["dataset"] == "small").to_numpy()
    assert not np.allclose(again.loc[small, taught], imputed.loc[small, taught], rtol=1e-3)


def test_columns_that_are_marked_as_unmeasured_are_imputed_like_absent_ones(model, adata, tmp_path):
    """A part of joined data keeps the columns of the genes that only the other part measured."""
    model.save(str(tmp_path / "model"))
    panel = adata.varm["measured_genes"]["spatial"].to_numpy()
    part = adata[adata.obs["dataset"] == "spatial"].copy()
    raw = part[:, panel].copy()
    del raw.varm["measured_genes"]
    expected = CellPLM.from_pretrained(model, raw, accelerator="cpu").get_imputed_expression()
    assert expected.notna().all(axis=None)
    query = part.copy()
    query.obs["dataset"] = "query"
    query.varm["measured_genes"] = part.varm["measured_genes"][["spatial"]].set_axis(["query"], axis=1)
    for found in (
        CellPLM.from_pretrained(model, part.copy(), accelerator="cpu"),
        CellPLM.load(str(tmp_path / "model"), adata=part.copy(), accelerator="cpu"),
    ):
        pd.testing.assert_frame_equal(found.get_imputed_expression(), expected, rtol=1e-4, atol=1e-7)
    mapped = CellPLM.load_query_data(query, model, accelerator="cpu")
    for frame in mapped.get_imputed_expression(return_std=True):
        assert frame.notna().all(axis=None)


def test_training_says_which_genes_nothing_teaches(adata):
    part = adata[adata.obs["dataset"] == "spatial"].copy()
    CellPLM.setup_anndata(part, **KEYS)
    model = CellPLM(part, n_hidden=16, n_latent=4, n_layers=1, n_components=2, n_neighbours=4, n_niche=4)
    with pytest.warns(UserWarning, match="20 genes are measured in no data set.*nothing is learned of them"):
        model.train(1, accelerator="cpu", devices=1, enable_progress_bar=False)


def test_data_sets_without_cells_teach_nothing(adata):
    """Genes that only they share are not hidden."""
    target = adata[(adata.obs["dataset"] == "spatial").to_numpy()].copy()
    CellPLM.setup_anndata(target, dataset_key="dataset", measured_genes_key="measured_genes")
    model = CellPLM(target, n_hidden=16, n_layers=1, n_latent=4)
    model.train(max_epochs=1, accelerator="cpu", enable_progress_bar=False)
    with pytest.raises(ValueError, match="shares with other data sets are 0"):
        model.get_imputation_reliability("spatial")


def test_what_was_given_before_does_not_matter(model, adata, tmp_path):
    """A model that was loaded without data takes the reference from those that it is given, each time."""
    model.save(str(tmp_path / "model"))
    expected = model.get_imputed_expression(adata.copy())
    section = adata[(adata.obs["dataset"] == "spatial").to_numpy()].copy()
    loaded = CellPLM.load(str(tmp_path / "model"), adata=False, accelerator="cpu")
    with pytest.warns(
        UserWarning, match="20 genes are measured by no cell that the model has at hand .*Load the model with"
    ):
        alone = loaded.get_imputed_expression(section.copy())
    pd.testing.assert_frame_equal(loaded.get_imputed_expression(adata.copy()), expected, rtol=1e-4)
    whole = CellPLM.load(str(tmp_path / "model"), adata=adata.copy(), accelerator="cpu")
    again = whole.get_imputed_expression(section.copy())
    pd.testing.assert_frame_equal(again, expected.loc[again.index], rtol=1e-4)
    assert not np.allclose(alone, again)
    late = CellPLM.load(str(tmp_path / "model"), adata=False, accelerator="cpu")
    late.adata = adata.copy()
    pd.testing.assert_frame_equal(late.get_imputed_expression(section.copy()), again, rtol=1e-4)


def test_panels_without_a_common_gene_are_said(adata):
    adata = adata.copy()
    table = pd.DataFrame(adata.varm["measured_genes"]).copy()
    table["reference"] = ~table["spatial"]
    adata.varm["measured_genes"] = table
    adata.X = sp.csr_matrix(adata.X.toarray() * table[adata.obs["dataset"]].to_numpy().T)
    CellPLM.setup_anndata(adata, **KEYS)
    model = CellPLM(adata, n_hidden=16, n_latent=4, n_layers=1)
    model.train(1, accelerator="cpu", enable_progress_bar=False)
    with pytest.warns(UserWarning, match="60 genes are NaN .*: no data set that measured them shares a gene"):
        model.get_imputed_expression()


def test_a_table_of_genes_without_a_column_of_data_sets(model, adata):
    section = adata[(adata.obs["dataset"] == "spatial").to_numpy()].copy()
    del section.obs["dataset"]
    with pytest.warns(UserWarning, match='"dataset".* is absent: every gene of the AnnData counts as measured'):
        z = model.get_latent_representation(section)
    assert np.isfinite(z).all()
