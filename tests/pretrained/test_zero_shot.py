"""A loaded model embeds any AnnData at once: whatever the order, choice and names of its genes, and its batches."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable
from typing import Any

import anndata
import numpy as np
import pandas as pd
import pytest
import torch
from anndata import AnnData
from hypothesis import given, settings
from hypothesis import strategies as st

import cellplm_scvi
from cellplm_scvi import CellPLM
from cellplm_scvi.genes import map_genes

#: sums over genes in another order
ROUNDING = 5e-5


@pytest.fixture
def load(mixture_case: Any) -> Callable[..., CellPLM]:
    """Loads the mixture case on data."""
    return lambda adata=None, **kwargs: CellPLM.from_pretrained(mixture_case.prefix, adata, accelerator="cpu", **kwargs)


@pytest.fixture
def embedding(load: Any, published_data: AnnData) -> np.ndarray:
    return load(published_data.copy()).get_latent_representation()


def renamed(adata: AnnData, names: list[str]) -> AnnData:
    adata = adata.copy()
    adata.var_names = names
    return adata


def symbols(adata: AnnData) -> list[str]:
    """Symbols, where a gene has one."""
    found = cellplm_scvi.genes.to_symbol(adata.var_names)
    return [symbol if isinstance(symbol, str) else str(gene) for gene, symbol in found.items()]


def test_two_calls_and_two_loads(load: Any, published_data: AnnData, embedding: np.ndarray) -> None:
    model = load(published_data)
    for _ in range(2):
        np.testing.assert_array_equal(model.get_latent_representation(), embedding)
    assert embedding.dtype == np.float32
    assert embedding.shape == (published_data.n_obs, 16)
    assert embedding.std(0).min() > 1e-3


@pytest.mark.parametrize("batch_size", [1, 5, 48, 1000])
def test_batch_size(batch_size: int, load: Any, published_data: AnnData, embedding: np.ndarray) -> None:
    model = load(published_data)
    np.testing.assert_allclose(model.get_latent_representation(batch_size=batch_size), embedding, atol=1e-6)


def test_published_numbers(case_named: Any) -> None:
    """Where the published code draws no noise into its result, ours is the same."""
    for name in ("c_vae_nb", "d_ae_annotation"):
        case = case_named(name)
        data = {key.removeprefix("in/x_"): value for key, value in case.arrays.items() if key.startswith("in/x_")}
        counts = np.zeros(data["shape"], dtype=np.float32)
        rows = np.repeat(np.arange(len(counts)), np.diff(data["indptr"]))
        counts[rows, data["indices"]] = data["data"]
        adata = AnnData(counts, var=pd.DataFrame(index=case.entries["gene_list"]))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # one of the cells has no counts
            found = CellPLM.from_pretrained(case.prefix, adata, accelerator="cpu").get_latent_representation()
        np.testing.assert_allclose(found, case.arrays["eval/z"], atol=1e-5)


@settings(max_examples=4)
@given(seed=st.integers(0, 2**32 - 1))
def test_order_of_cells_and_genes(seed: int, load: Any, published_data: AnnData, embedding: np.ndarray) -> None:
    rng = np.random.default_rng(seed)
    cells, genes = rng.permutation(published_data.n_obs), rng.permutation(published_data.n_vars)
    found = load(published_data[cells, genes].copy()).get_latent_representation()
    np.testing.assert_allclose(found, embedding[cells], atol=ROUNDING)


@pytest.mark.parametrize("share", [0.3, 0.7])
def test_subset_of_genes(share: float, load: Any, published_data: AnnData) -> None:
    """Genes that are absent are as good as genes without counts; unknown ones are not used."""
    rng = np.random.default_rng(0)
    absent = rng.random(published_data.n_vars) > share
    emptied = published_data.copy()
    counts = emptied.to_df().to_numpy(copy=True)
    counts[:, absent] = 0
    emptied.X = counts
    names = [
        f"no gene {n}" if out else name
        for n, (name, out) in enumerate(zip(published_data.var_names, absent, strict=True))
    ]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        expected = load(emptied).get_latent_representation()
        subset = load(published_data[:, ~absent].copy()).get_latent_representation()
        unknown = load(renamed(published_data, names)).get_latent_representation()
    np.testing.assert_allclose(subset, expected, atol=ROUNDING)
    np.testing.assert_allclose(unknown, expected, atol=ROUNDING)


@pytest.mark.parametrize("kind", ["versions", "symbols", "lower case", "mixed"])
def test_names_of_genes(kind: str, load: Any, published_data: AnnData, embedding: np.ndarray) -> None:
    ids, by_symbol = list(published_data.var_names), symbols(published_data)
    versions = [f"{name}.{n % 20}" for n, name in enumerate(ids)]
    names = {
        "versions": versions,
        "symbols": by_symbol,
        "lower case": [name.lower() for name in ids],
        "mixed": [(ids, versions, by_symbol)[n % 3][n] for n in range(len(ids))],
    }[kind]
    model = load(renamed(published_data, names))
    np.testing.assert_array_equal(model.get_latent_representation(), embedding)
    assert model.pretrained_report.genes["counts_covered"] == 1.0
    # also on data that come after the model has some
    np.testing.assert_array_equal(model.get_latent_representation(published_data.copy()), embedding)


def test_result_is_aligned(load: Any, published_data: AnnData, embedding: np.ndarray) -> None:
    """Whatever sample a cell is in, and whatever rows are asked for."""
    published_data.obs["section"] = np.random.default_rng(0).choice(["a", "b", "c"], published_data.n_obs)
    model = load(published_data, sample_key="section")
    found = model.get_latent_representation()
    for section in "abc":
        here = (published_data.obs["section"] == section).to_numpy()
        alone = load(published_data[here].copy()).get_latent_representation()
        np.testing.assert_allclose(found[here], alone, atol=ROUNDING)
    assert not np.allclose(found, embedding, atol=1e-2)  # a cell's company matters
    np.testing.assert_array_equal(model.get_latent_representation(indices=[7, 3, 30]), found[[7, 3, 30]])
    expression = model.get_normalized_expression()
    assert expression.index.equals(published_data.obs_names)
    assert list(expression.columns) == list(published_data.var_names)
    np.testing.assert_allclose(expression.sum(1), 1.0, rtol=1e-4)


def test_new_batches_get_the_mean_code(load: Any, published_data: AnnData) -> None:
    """Not a row of the pre-trained table: the decoder gives what it gives without any batch, for every new one."""
    without = load(published_data.copy()).get_normalized_expression()
    published_data.obs["donor"] = ["x", "y", "z"] * (published_data.n_obs // 3)
    published_data.obs["section"] = "one"
    model = load(published_data, batch_key="donor", dataset_key="donor", sample_key="section")
    np.testing.assert_array_equal(model.get_normalized_expression(), without)
    np.testing.assert_array_equal(model.get_normalized_expression(transform_batch="y"), without)
    tables = {name: table.weight.shape[0] for name, table in model.module.decoder.codes.items()}
    assert tables == {"batch": 3, "dataset": 2}  # as the checkpoint has them: nothing was added
    table = model.module.decoder.codes["batch"]
    known = table.contribution(table.weight).detach()
    mean = known.mean(0)
    for codes, expected in (
        ([3, 5], mean[None]),  # the same for both
        ([1, 5, 0, 1, -1], torch.stack([known[1], mean, known[0], known[1], mean])),
        ([2, 2], known[2:3]),
    ):
        np.testing.assert_allclose(table(torch.tensor(codes)).detach(), expected, rtol=1e-5, atol=1e-6)


def test_report_of_genes(load: Any, published_data: AnnData, caplog: pytest.LogCaptureFixture) -> None:
    names = symbols(published_data)
    names[:3] = ["no gene", "none either", f"{published_data.var_names[2]}.5"]
    caplog.set_level(logging.INFO, logger="scvi.cellplm_scvi")
    logging.getLogger("scvi.cellplm_scvi").addHandler(caplog.handler)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        report = load(renamed(published_data, names)).pretrained_report
    logging.getLogger("scvi.cellplm_scvi").removeHandler(caplog.handler)
    totals = np.asarray(published_data.X.sum(0)).ravel()  # type: ignore[union-attr]
    found = report.genes
    assert found["matched"] == 58
    assert found["ensembl_id"] == 1
    assert sum(found.get(kind, 0) for kind in ("name", "ensembl_id", "symbol", "previous", "alias")) == 58
    assert found["counts_covered"] == pytest.approx(1 - totals[:2].sum() / totals.sum())
    assert found["summary"] in str(report)
    assert found["summary"] in caplog.text


def test_few_counts_covered(load: Any, published_data: AnnData) -> None:
    """A warning at the user's line, with the share, and the unknown genes."""
    names = [name if n < 4 else f"G{n}x" for n, name in enumerate(published_data.var_names)]
    with pytest.warns(UserWarning, match=r"4 of the 60 genes .*% of the counts.*may be poor.*\"G4x\"") as caught:
        load(renamed(published_data, names))
    assert all(warning.filename == __file__ for warning in caught)


def test_no_gene_matches(load: Any, published_data: AnnData) -> None:
    data = renamed(published_data, [f"G{n}x" for n in range(60)])
    for attempt in (lambda: load(data), lambda: load().get_latent_representation(data)):
        with pytest.raises(ValueError, match=r'such as "G0x".*such as "ENSG') as caught:
            attempt()
        assert "mouse" in str(caught.value)


def test_two_names_of_one_gene(load: Any, published_data: AnnData) -> None:
    """The surest name counts, and the report says so."""
    names = list(published_data.var_names)
    names[1] = f"{names[0]}.2"
    report = load(renamed(published_data, names)).pretrained_report
    assert report.genes["matched"] == 59
    assert f'not used ("{names[1]}")' in report.genes["summary"]


@pytest.mark.parametrize("suffix", ["-1", ".2"])
def test_a_name_made_unique_stands_back_wherever_it_is(load: Any, published_data: AnnData, suffix: str) -> None:
    """``var_names_make_unique`` leaves two columns that mean one gene: the one with the gene's name counts."""
    second = published_data[:, :2].copy()
    second.var_names = [f"{name}{suffix}" for name in map_genes(published_data.var_names[:2], "symbol").mapped]
    symbols = renamed(published_data, list(map_genes(published_data.var_names, "symbol").mapped))
    wide = anndata.concat([symbols, second], axis=1, merge="first")
    expected = load(symbols).get_latent_representation()
    for data in (wide, wide[:, ::-1].copy()):
        model = load(data)
        np.testing.assert_allclose(model.get_latent_representation(), expected, atol=1e-5)
        assert "2 further names" in model.pretrained_report.genes["summary"]


def test_mouse(load: Any, published_data: AnnData) -> None:
    """Human orthologues on demand only."""
    from cellplm_scvi.genes._tables import gene_table

    table = gene_table("mouse").symbol
    wanted = {gene: n for n, gene in enumerate(published_data.var_names)}
    mouse: dict[int, str] = {}
    for name in table._exact:
        genes = table.exact(name)
        if len(genes) == 1 and genes[0].ensembl in wanted and name != genes[0].symbol:
            mouse.setdefault(wanted[genes[0].ensembl], name)
    columns = sorted(mouse)[:20]
    data = renamed(published_data[:, columns].copy(), [mouse[n] for n in columns])
    report = load(data, organism="mouse").pretrained_report
    assert report.genes["matched"] > len(columns) // 2
    with pytest.raises(ValueError, match="organism"):
        load(data, organism="rat")


def test_what_was_asked_for_must_be_there(load: Any, published_data: AnnData) -> None:
    """A misspelt key is an error, not a batch that nobody has."""
    with pytest.raises(KeyError, match="donor"):
        load(published_data, batch_key="donor")
    with pytest.raises(TypeError, match="bacth_key"):
        load(published_data, bacth_key="donor")
    with pytest.raises(TypeError, match="AnnData"):
        load(published_data.X)
    published_data.obsm["spatial"] = np.ones((published_data.n_obs, 2))
    with pytest.warns(UserWarning, match="trained without positions"):
        load(published_data, spatial_key="spatial")


def test_counts_in_a_layer(load: Any, published_data: AnnData, embedding: np.ndarray) -> None:
    counts = published_data.to_df().to_numpy(copy=True)
    published_data.layers["counts"] = counts
    published_data.X = np.log1p(counts)
    np.testing.assert_array_equal(load(published_data, layer="counts").get_latent_representation(), embedding)
    with pytest.raises(ValueError, match="counts"):
        load(published_data)


def test_without_a_decoder(annotation_case: Any) -> None:
    """It embeds; what needs a decoder says that there is none."""
    genes = annotation_case.entries["gene_list"]
    adata = AnnData(np.ones((5, len(genes)), dtype=np.float32), var=pd.DataFrame(index=genes))
    model = CellPLM.from_pretrained(annotation_case.prefix, adata)
    assert np.isfinite(model.get_latent_representation()).all()
    with pytest.raises(ValueError, match="no decoder"):
        model.get_normalized_expression()
    with pytest.raises(ValueError, match="mixture"):
        model.get_mixture_probabilities()


def test_genes_that_only_pre_training_knew_are_imputed(mixture_case: Any, published_data: AnnData) -> None:
    """At their shares relative to the genes that are there, decoded with the mean codes."""
    panel = published_data[:, :-20].copy()
    model = CellPLM.from_pretrained(mixture_case.prefix, panel, accelerator="cpu")
    found = model.get_imputed_expression()
    assert isinstance(found, pd.DataFrame)
    genes = list(mixture_case.entries["gene_list"])
    assert list(found.columns) == genes
    assert np.isfinite(found.to_numpy()).all()
    measured = found[[gene for gene in genes if gene in set(panel.var_names)]]
    np.testing.assert_allclose(measured.sum(axis=1), 1.0, rtol=1e-5)
    expected = model.get_normalized_expression()[measured.columns]
    np.testing.assert_allclose(measured, expected, rtol=1e-4)
    with torch.no_grad():
        z = torch.from_numpy(model.get_latent_representation())
        logits = model.module.decoder.output().log_shares(model.module.decoder(z, {}), None).exp().numpy()
    whole = pd.DataFrame(logits, index=found.index, columns=genes)
    scale = whole[measured.columns].sum(axis=1)
    absent = [gene for gene in genes if gene not in set(panel.var_names)]
    np.testing.assert_allclose(found[absent], whole[absent].div(scale, axis=0), rtol=1e-3)
