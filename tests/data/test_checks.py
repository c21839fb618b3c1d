"""Bad input: each message says what was found, where, and what to do; odd input that is fine works."""

from __future__ import annotations

import warnings
from collections.abc import Callable

import mudata
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp
import scvi
from anndata import AnnData

from cellplm_scvi import CellPLM
from cellplm_scvi.data._table import CellTable

SETUP = CellPLM.setup_anndata


def spoilt(adata: AnnData, change: Callable[[np.ndarray], object]) -> AnnData:
    """The same cells with changed counts, dense."""
    x = adata.to_df().to_numpy(copy=True)
    changed = change(x)
    adata.X = x if changed is None else changed
    return adata


def put(value: float) -> Callable[[np.ndarray], None]:
    def change(x: np.ndarray) -> None:
        x[-1, -1] = value

    return change


def lognormalised(x: np.ndarray) -> np.ndarray:
    return np.log1p(x / x.sum(1, keepdims=True) * 1e4)


@pytest.mark.parametrize("form", [np.asarray, sp.csr_matrix, sp.csc_matrix, sp.csr_array], ids=lambda f: f.__name__)
@pytest.mark.parametrize(
    ("change", "message"),
    [
        pytest.param(put(np.nan), r"adata\.X has 1 missing or infinite value\. Counts must be finite", id="nan"),
        pytest.param(put(np.inf), r"adata\.X has 1 missing or infinite value", id="inf"),
        pytest.param(put(-1), r"adata\.X has 1 negative value \(lowest -1\).*Pass raw counts", id="negative"),
        pytest.param(put(0.5), r"adata\.X does not hold counts: 1 value is a fraction \(such as 0\.5\)", id="fraction"),
        pytest.param(lognormalised, r"looks log-normalised.*layer=\"counts\"", id="log-normalised"),
        pytest.param(lambda x: x - 1.0, "negative value", id="centred"),
    ],
)
def test_values_that_are_not_counts_are_named(tissues, form, change, message):
    adata = spoilt(tissues, change)
    adata.X = form(adata.X)
    with pytest.raises(ValueError, match=message):
        SETUP(adata)


def test_a_bad_value_in_a_layer_names_the_layer(tissues):
    tissues.layers["raw"] = spoilt(tissues.copy(), put(0.5)).X
    SETUP(tissues)
    with pytest.raises(ValueError, match=r'adata\.layers\["raw"\] does not hold counts'):
        SETUP(tissues, layer="raw")


def test_a_layer_that_is_absent_is_named_with_those_present(tissues):
    tissues.layers["counts"] = tissues.X.copy()
    with pytest.raises(ValueError, match='layer="cuonts" is not a layer of the AnnData, which has "counts"'):
        SETUP(tissues, layer="cuonts")


def test_no_matrix_at_all(tissues):
    tissues.layers["counts"] = tissues.X.copy()
    tissues.X = None
    with pytest.raises(ValueError, match=r"adata\.X is None.*layer="):
        SETUP(tissues)
    SETUP(tissues, layer="counts")
    assert CellPLM(tissues, n_hidden=16, n_heads=2).module.n_genes == tissues.n_vars


@pytest.mark.parametrize(
    "dtype",
    [np.int8, np.int32, np.int64, np.uint8, np.uint16, np.float16, np.float32, np.float64, bool],
    ids=lambda d: d.__name__,
)
def test_dtypes_of_whole_numbers_are_counts(tissues, build, dtype):
    x = np.minimum(tissues.X.toarray(), 1)
    tissues.X = x.astype(dtype)
    expected = tissues.copy()
    expected.X = x.astype(np.float32)
    found = build(tissues)
    assert float(found.module.embedder.target_sum) == float(build(expected).module.embedder.target_sum)


@pytest.mark.parametrize(("n_obs", "n_vars"), [(0, 5), (5, 0), (0, 0)])
def test_empty_anndata(n_obs, n_vars):
    with pytest.raises(ValueError, match=f"The AnnData is empty: it has {n_obs} cells and {n_vars} genes"):
        SETUP(AnnData(np.zeros((n_obs, n_vars), np.float32)))


def test_genes_that_occur_twice_are_an_error(tissues):
    tissues.var_names = ["gene1", "gene1", *tissues.var_names[2:]]
    with pytest.raises(ValueError, match=r'1 gene name more than once \("gene1"\).*var_names_make_unique'):
        SETUP(tissues)


def test_cells_that_occur_twice_are_a_warning(tissues):
    tissues.obs_names = ["cell1", "cell1", *tissues.obs_names[2:]]
    with pytest.warns(UserWarning, match=r'1 cell name more than once \("cell1"\).*obs_names_make_unique'):
        SETUP(tissues)


def test_cells_without_counts_are_a_warning_and_embedded(tissues, build, train):
    x = tissues.X.toarray()
    x[[3, 5]] = 0
    tissues.X = sp.csr_matrix(x)
    with pytest.warns(UserWarning, match=r'2 cells have no counts \(cells "cell3", "cell5"\).*filter_cells'):
        model = build(tissues)
    assert np.isfinite(train(model).get_latent_representation()).all()
    assert np.isfinite(model.get_normalized_expression(library_size="latent").to_numpy()).all()
    assert np.isfinite(model.get_elbo())


def test_no_cell_has_counts(tissues, build):
    tissues.X = sp.csr_matrix(tissues.shape, dtype=np.float32)
    with pytest.raises(ValueError, match="No cell has any count"):
        build(tissues)


@pytest.mark.parametrize("argument", ["batch_key", "platform_key", "dataset_key", "sample_key", "size_factor_key"])
def test_a_column_that_is_absent_is_named_with_those_present(tissues, argument):
    with pytest.raises(KeyError, match=rf'{argument}="nothing" is not a column of adata\.obs, which has.*"cell_type"'):
        SETUP(tissues, **{argument: "nothing"})


@pytest.mark.parametrize("argument", ["labels_key", "perturbation_key"])
def test_an_annotation_that_is_absent_is_named_with_its_argument(tissues, argument):
    with pytest.raises(KeyError, match=rf'{argument}="nothing" is not a column of adata\.obs'):
        SETUP(tissues, **{argument: "nothing"})


@pytest.mark.parametrize("argument", ["batch_key", "layer", "spatial_key", "labels_key"])
def test_several_names_for_one_key(tissues, argument):
    with pytest.raises(TypeError, match=rf"{argument}=\['batch'\] must be one name"):
        SETUP(tissues, **{argument: ["batch"]})


def test_a_column_that_is_there_twice(tissues):
    tissues.obs = pd.concat([tissues.obs, tissues.obs[["batch"]]], axis=1)
    with pytest.raises(ValueError, match='batch_key="batch": adata.obs has 2 columns of this name'):
        SETUP(tissues, batch_key="batch")


def test_columns_of_scvi_tools_are_not_offered(tissues):
    SETUP(tissues, batch_key="batch")
    with pytest.raises(KeyError, match="which has ") as error:
        SETUP(tissues, batch_key="donor")
    assert "_scvi_" not in str(error.value)


@pytest.mark.parametrize("missing", [np.nan, None, pd.NA])
def test_categories_that_are_missing(tissues, missing):
    column = tissues.obs["batch"].astype(object)
    column.iloc[[2, 7]] = missing
    tissues.obs["batch"] = column
    with pytest.raises(ValueError, match=r'obs\["batch"\] has 2 missing values \(cells "cell2", "cell7"\)\. Fill'):
        SETUP(tissues, batch_key="batch")


def test_missing_labels_are_unlabelled(tissues):
    column = tissues.obs["cell_type"].astype(object)
    column.iloc[:5] = np.nan
    tissues.obs["cell_type"] = column
    SETUP(tissues, labels_key="cell_type", unlabeled_category="unknown")
    model = CellPLM(tissues, n_hidden=16, n_heads=2)
    mapping = model.adata_manager.get_state_registry("labels")["categorical_mapping"]
    names = np.asarray(mapping)[np.asarray(tissues.obs["_scvi_labels"])]
    assert list(names[:5]) == ["unknown"] * 5
    np.testing.assert_array_equal(names[5:], column.iloc[5:])


@pytest.mark.parametrize("dtype", ["Int64", "float64"])
@pytest.mark.parametrize("missing", [False, True])
def test_labels_that_are_numbers_are_text(tissues, missing, dtype):
    """Missing values make a column of whole numbers one of floating point, and "2.0" no other label than "2"."""
    tissues.obs["cluster"] = pd.array(np.arange(tissues.n_obs) % 3, dtype=dtype)
    if missing:
        tissues.obs.loc[tissues.obs_names[:5], "cluster"] = pd.NA
    SETUP(tissues, labels_key="cluster", unlabeled_category=2)
    state = CellPLM(tissues, n_hidden=16, n_heads=2).adata_manager.get_state_registry("labels")
    names = np.asarray(state["categorical_mapping"])[np.asarray(tissues.obs["_scvi_labels"])]
    expected = tissues.obs["cluster"].fillna(2).astype(int).map(str)
    assert names.tolist() == expected.tolist()


COORDINATES = [
    pytest.param(
        lambda xy: xy[:, :1], ValueError, r"has shape \(90, 1\); coordinates are \(n_cells, 2\)", id="1-column"
    ),
    pytest.param(lambda xy: np.hstack([xy, xy]), ValueError, r"has shape \(90, 4\); coordinates are", id="4-columns"),
    pytest.param(lambda xy: xy.astype(str), TypeError, r"has dtype .*; coordinates are numbers", id="strings"),
]


@pytest.mark.parametrize(("change", "error", "message"), COORDINATES)
def test_coordinates_of_the_wrong_form(make_tissues, change, error, message):
    adata = make_tissues(spatial=True)
    adata.obsm["spatial"] = change(adata.obsm["spatial"])
    with pytest.raises(error, match=r'obsm\["spatial"\] ' + message):
        SETUP(adata, spatial_key="spatial")


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (np.inf, "2 cells have infinite coordinates"),
        (np.nan, "2 cells have coordinates of which only some are NaN"),
        (np.finfo(float).max, r"2 cells have coordinates beyond 1e\+150, whose distances cannot be computed"),
    ],
)
def test_coordinates_that_are_no_positions(make_tissues, value, message):
    adata = make_tissues(spatial=True)
    adata.obsm["spatial"][[4, 6], 0] = value
    with pytest.raises(ValueError, match=message + r' \(cells "cell4", "cell6"\)'):
        SETUP(adata, spatial_key="spatial")


def test_coordinates_that_are_absent(tissues):
    with pytest.raises(KeyError, match=r'spatial_key="spatial" is not in adata\.obsm, which has nothing'):
        SETUP(tissues, spatial_key="spatial")


@pytest.mark.parametrize("form", ["int", "frame", "sparse", "3d", "all-nan"])
def test_coordinates_of_other_forms_work(make_tissues, build, train, form):
    adata = make_tissues(spatial=True, n_dims=3 if form == "3d" else 2)
    xy = adata.obsm["spatial"]
    if form == "int":
        adata.obsm["spatial"] = xy.round().astype(np.int64)
    elif form == "frame":
        adata.obsm["spatial"] = pd.DataFrame(xy, index=adata.obs_names, columns=["x", "y"])
    elif form == "sparse":
        adata.obsm["spatial"] = sp.csr_matrix(xy)
    elif form == "all-nan":
        adata.obsm["spatial"] = np.full_like(xy, np.nan)
    assert np.isfinite(train(build(adata)).get_latent_representation()).all()


def test_library_sizes_that_are_too_small(tissues, build):
    tissues.obs["total"] = np.asarray(tissues.X.sum(1)).ravel() * 2
    tissues.obs.loc[["cell1", "cell8"], "total"] = 1.0
    with pytest.raises(ValueError, match=r'library size \(size_factor_key\) of 2 cells is smaller.*"cell1", "cell8"'):
        build(tissues, {"size_factor_key": "total"})


@pytest.mark.parametrize("value", [np.nan, -1.0, np.inf])
def test_library_sizes_that_are_not_numbers(tissues, value):
    tissues.obs["total"] = np.asarray(tissues.X.sum(1)).ravel() * 2
    tissues.obs.loc["cell1", "total"] = value
    with pytest.raises(ValueError, match=r'obs\["total"\] is the library size.*1 value is.*"cell1"'):
        SETUP(tissues, size_factor_key="total")


@pytest.mark.parametrize(
    ("table", "error", "message"),
    [
        (lambda a: np.ones((a.n_vars, 2), bool), TypeError, r'varm\["panel"\] is a ndarray; a DataFrame is needed'),
        (lambda a: frame(a, one=1, two=0), TypeError, r"columns of the type int64.*\.astype\(bool\)"),
        (
            lambda a: frame(a, one=True, two=[True, False] * 15).astype({"two": object}),
            TypeError,
            "of the type object; it",
        ),
        (lambda a: frame(a, one=True), ValueError, r'has no column for the data set "two" of obs\["study"\]'),
        (lambda a: frame(a, one=True, two=False), ValueError, 'no gene is measured in the data set "two"'),
    ],
    ids=["array", "ints", "objects", "column", "empty"],
)
def test_panels_of_the_wrong_form(tissues, table, error, message):
    tissues.varm["panel"] = table(tissues)
    with pytest.raises(error, match=message):
        SETUP(tissues, dataset_key="study", measured_genes_key="panel")


def frame(adata: AnnData, **columns: object) -> pd.DataFrame:
    return pd.DataFrame(columns, index=adata.var_names)


def test_panels_need_a_table_and_a_data_set(tissues):
    with pytest.raises(KeyError, match=r'measured_genes_key="panel" is not in adata\.varm, which has nothing'):
        SETUP(tissues, dataset_key="study", measured_genes_key="panel")
    with pytest.raises(ValueError, match="pass dataset_key too"):
        SETUP(tissues, measured_genes_key="panel")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ({"encoder": "flowformer"}, 'encoder="flowformer" is not one of "flow", "softmax", "mlp"'),
        ({"latent": "vae"}, 'latent="vae" is not one of "mixture", "gaussian", "deterministic"'),
        ({"position": "absolute"}, 'position="absolute" is not one of "local", "fourier", "sinusoidal", "none"'),
        ({"input_normalization": "log"}, 'input_normalization="log" is not one of "library", "raw"'),
        ({"n_hidden": 15, "n_heads": 2}, r"n_hidden \(15\) must be a multiple of n_heads \(2\)"),
        ({"n_layers": 0}, "n_layers=0 must be a positive whole number"),
        ({"n_latent": 2.5}, "n_latent=2.5 must be a positive whole number"),
        ({"max_context": -1}, "max_context=-1 must be a positive whole number"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_options_that_do_not_exist(tissues, build, words, message):
    with pytest.raises(ValueError, match=message):
        build(tissues, **words)


def test_an_anndata_that_was_not_set_up(tissues):
    with pytest.raises(ValueError, match=r"set up your AnnData"):
        CellPLM(tissues)


def test_a_type_that_holds_no_counts(tissues):
    tissues.X = tissues.X.toarray().astype(complex)
    with pytest.raises(TypeError, match=r"adata\.X holds values of dtype complex128; counts are needed"):
        SETUP(tissues)


def test_the_data_stay_as_they_were(make_tissues, build, train):
    adata = make_tissues(spatial=True)
    adata.X = adata.X[:, ::-1].tocsr()
    adata.X.indices = adata.X.indices[::1].copy()
    before = adata.copy()
    CellPLM.setup_anndata(adata, batch_key="batch", sample_key="sample", spatial_key="spatial", labels_key="cell_type")
    model = train(CellPLM(adata, n_hidden=16, n_heads=2, n_layers=1, n_latent=4, n_components=3))
    model.get_latent_representation()
    assert adata.X.dtype == before.X.dtype
    for name in ("data", "indices", "indptr"):
        np.testing.assert_array_equal(getattr(adata.X, name), getattr(before.X, name))
    own = [column for column in adata.obs if not column.startswith("_scvi")]
    pd.testing.assert_frame_equal(adata.obs[own], before.obs)
    np.testing.assert_array_equal(adata.obsm["spatial"], before.obsm["spatial"])
    assert set(adata.obsm) == set(before.obsm)
    assert set(adata.varm) == set(before.varm)
    assert {key for key in adata.uns if not key.startswith("_scvi")} == set(before.uns)


@pytest.mark.parametrize(
    "categories",
    [
        pytest.param([0, 1], id="ints"),
        pytest.param([10.5, 2.0], id="floats"),
        pytest.param([True, False], id="bools"),
        pytest.param(["a", 3], id="mixed"),
        pytest.param(["", "a b/c"], id="odd-strings"),
    ],
)
def test_categories_of_any_type(make_tissues, build, train, clone, categories):
    adata = make_tissues(60, 12)
    first = (adata.obs["batch"] == "batch0").to_numpy()
    adata.obs["batch"] = pd.Series(
        [categories[0] if f else categories[1] for f in first], adata.obs_names, dtype=object
    )
    model = train(build(adata))
    a, b = (model.get_normalized_expression(transform_batch=c) for c in categories)
    assert not np.allclose(a, b)
    again = clone(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        embedded = again.get_latent_representation(adata.copy())
    np.testing.assert_allclose(embedded, model.get_latent_representation(), atol=1e-5)
    np.testing.assert_allclose(again.get_normalized_expression(transform_batch=categories[0]), a, rtol=1e-4)


def test_unused_categories_do_not_enter_the_mean_code(tissues, build):
    tissues.obs["batch"] = tissues.obs["batch"].cat.add_categories(["never"])
    model = build(tissues)
    assert model.module.decoder.codes["batch"].weight.shape[0] == 2
    assert "never" in model.adata.obs["batch"].cat.categories


def test_names_of_cells_that_were_numbers(make_tissues, build, train):
    adata = make_tissues(40, 10)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        adata.obs.index = pd.RangeIndex(40)
        adata = AnnData(adata.X, obs=adata.obs, var=adata.var)
    model = train(build(adata))
    assert list(model.get_normalized_expression().index) == list(adata.obs_names)


def test_one_gene(make_tissues, build, train):
    adata = make_tissues(50, 6)[:, :1].copy()
    model = train(build(adata))
    assert np.isfinite(model.get_latent_representation()).all()
    np.testing.assert_allclose(model.get_normalized_expression(), 1.0, rtol=1e-5)


def test_one_cell(make_tissues, build, train):
    adata = make_tissues(30, 10)[:1].copy()
    model = train(build(adata), train_size=1.0)
    assert model.get_latent_representation().shape == (1, 4)
    assert np.isfinite(model.get_latent_representation()).all()


def test_a_view_is_set_up(tissues, train):
    view = tissues[tissues.obs["batch"] == "batch0"]
    assert view.is_view
    CellPLM.setup_anndata(view, sample_key="sample")
    model = train(CellPLM(view, n_hidden=16, n_heads=2, n_layers=1, n_latent=4, n_components=3))
    assert model.get_latent_representation().shape == (view.n_obs, 4)
    assert tissues.n_obs > view.n_obs


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"modalities": None}, ValueError, 'modalities={"rna_layer": "rna"}'),
        (
            {"modalities": {"rna_layer": "gex"}},
            KeyError,
            '"gex" is not a modality of the MuData, which has "rna", "adt"',
        ),
        ({"modalities": {"rna_layer": "rna"}, "batch_key": "no"}, KeyError, 'batch_key="no" is not a column'),
        (
            {"modalities": {"rna_layer": "rna"}, "batch_key": "batch"},
            KeyError,
            'Modality "rna" has it: pass modalities={"batch_key": "rna"}',
        ),
    ],
    ids=["none", "unknown", "column", "column of a modality"],
)
def test_mudata_that_is_set_up_wrongly(tissues, arguments, error, message):
    protein = AnnData(np.ones((tissues.n_obs, 3), np.float32), obs=tissues.obs[[]])
    with pytest.raises(error, match=message):
        CellPLM.setup_mudata(mudata.MuData({"rna": tissues, "adt": protein}), **arguments)


def test_what_is_set_up_in_the_wrong_way_says_so(tissues):
    multimodal = mudata.MuData({"rna": tissues.copy()})
    with pytest.raises(TypeError, match="adata is of type MuData: call setup_mudata"):
        SETUP(multimodal)
    with pytest.raises(TypeError, match="mdata is of type AnnData: call setup_anndata"):
        CellPLM.setup_mudata(tissues, modalities={"rna_layer": "rna"})
    with pytest.raises(TypeError, match="adata is of type DataFrame: an AnnData of raw counts is needed"):
        SETUP(tissues.to_df())
    with pytest.raises(TypeError, match='setup_anndata takes no argument "batchkey"'):
        SETUP(tissues, batchkey="batch")


@pytest.mark.parametrize("unit", ["ns", "s", "period", "interval", "date"])
@pytest.mark.parametrize("way", ["new", "save_pretrained"])
def test_categories_that_are_dates(make_tissues, build, train, tmp_path, unit, way):
    """They are text to the model, so that they can be saved."""
    adata = make_tissues()
    day = pd.to_datetime("2024-03-01") + pd.to_timedelta(adata.obs["batch"].cat.codes.to_numpy(), unit="D")
    adata.obs["batch"] = {
        "period": day.to_period("D"),
        "interval": pd.cut(adata.obs["batch"].cat.codes, [-1, 0, 1]),
        "date": day.date,
    }.get(unit, day.astype(f"datetime64[{unit}]") if len(unit) < 3 else None)
    model = train(build(adata))
    expression = model.get_normalized_expression()
    if way == "save_pretrained":
        model.save_pretrained(str(tmp_path / "model"))
        model = CellPLM.from_pretrained(str(tmp_path / "model"), accelerator="cpu")
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        np.testing.assert_array_equal(model.get_normalized_expression(adata.copy()), expression)
    if unit not in ("period", "interval"):
        adata.obs["batch"] = np.where(adata.obs["batch"] == adata.obs["batch"].min(), "2024-03-01", "2024-03-02")
        np.testing.assert_array_equal(model.get_normalized_expression(adata), expression)


def test_names_of_genes_that_are_numbers(tissues):
    tissues.var.index = pd.RangeIndex(tissues.n_vars)
    with pytest.raises(TypeError, match="30 names that are no text .such as 0 of type int.*var_names.astype"):
        CellPLM.setup_anndata(tissues)


def test_counts_in_the_byte_order_of_another_machine(tissues, build, train):
    expected = train(build(tissues)).get_latent_representation()
    tissues.X = tissues.X.toarray().astype(np.dtype(np.float32).newbyteorder())
    scvi.settings.seed = 0
    np.testing.assert_array_equal(train(build(tissues)).get_latent_representation(), expected)


def test_nullable_coordinates_are_numbers(make_tissues):
    adata = make_tissues(spatial=True)
    values = np.asarray(adata.obsm["spatial"], dtype=float).copy()
    values[3] = np.nan
    adata.obsm["spatial"] = values
    nullable = adata.copy()
    nullable.obsm["spatial"] = pd.DataFrame(values, index=adata.obs_names, columns=["x", "y"]).astype("Float64")
    found = []
    for data in (adata, nullable):
        CellPLM.setup_anndata(data, spatial_key="spatial")
        manager = CellPLM(data, n_hidden=16, n_layers=1).adata_manager
        found.append(CellTable.from_manager(manager).coordinates)
    np.testing.assert_array_equal(found[0], found[1])
