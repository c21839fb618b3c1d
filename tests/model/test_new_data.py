"""Saved models, and data that they have not seen."""

from __future__ import annotations

import warnings

import numpy as np
import pandas as pd
import pytest
import torch
from anndata import AnnData

from cellplm_scvi import CellPLM


@pytest.fixture(params=["dissociated", "spatial"])
def model(request, models) -> CellPLM:
    return models[request.param]


@pytest.fixture
def saved(model, tmp_path) -> str:
    model.save(str(tmp_path / "model"))
    return str(tmp_path / "model")


def test_a_saved_model_gives_the_same_numbers(model, saved):
    again = CellPLM.load(saved, adata=model.adata.copy(), accelerator="cpu")
    for ours, theirs in zip(model.module.state_dict().values(), again.module.state_dict().values(), strict=True):
        assert torch.equal(ours, theirs)
    np.testing.assert_array_equal(again.get_latent_representation(), model.get_latent_representation())
    np.testing.assert_array_equal(again.get_normalized_expression(), model.get_normalized_expression())
    assert float(again.get_elbo()) == float(model.get_elbo())
    pd.testing.assert_frame_equal(again.get_mixture_probabilities(), model.get_mixture_probabilities())
    assert again.history.keys() == model.history.keys()


def test_a_model_saved_with_its_data(model, tmp_path):
    model.save(str(tmp_path / "model"), save_anndata=True)
    again = CellPLM.load(str(tmp_path / "model"), accelerator="cpu")
    np.testing.assert_allclose(again.get_latent_representation(), model.get_latent_representation(), atol=1e-6)
    CellPLM.setup_anndata(model.adata.copy())


def test_setting_up_a_copy_leaves_the_original_as_it_is(make_tissues, build, train, tmp_path):
    """Copies share scvi-tools' identifier, but not the set-up."""
    model = train(build(make_tissues()))
    model.save_pretrained(tmp_path)
    CellPLM.setup_anndata(model.adata.copy())
    again = CellPLM.from_pretrained(tmp_path, model.adata.copy(), accelerator="cpu")
    assert again.registry_["setup_args"]["sample_key"] == "sample"
    np.testing.assert_array_equal(again.get_latent_representation(), model.get_latent_representation())


def test_a_model_loaded_without_data(model, saved):
    again = CellPLM.load(saved, adata=False, accelerator="cpu")
    np.testing.assert_allclose(
        again.get_latent_representation(model.adata.copy()), model.get_latent_representation(), atol=1e-6
    )


def test_loading_does_not_depend_on_the_new_data(model, saved, make_tissues):
    """Sizes and normalisation come from the saved model, whatever it is loaded with."""
    other = make_tissues(25, 30, spatial=True, seed=9)
    other.X = other.X * 7
    again = CellPLM.load(saved, adata=other, accelerator="cpu")
    np.testing.assert_array_equal(again.get_latent_representation(other), model.get_latent_representation(other.copy()))


def test_new_samples_are_embedded_without_a_word(model, make_tissues):
    other = make_tissues(40, 30, spatial=True, seed=5)
    other.obs["sample"] = [f"new{i % 3}" for i in range(40)]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        z = model.get_latent_representation(other)
    assert np.isfinite(z).all()
    other.obs["sample"] = [f"newer{i % 3}" for i in range(40)]
    np.testing.assert_allclose(model.get_latent_representation(other.copy()), z, atol=1e-6)


def test_fewer_and_other_genes(model):
    few = model.adata[:, model.adata.var_names != "gene4"].copy()
    few.var_names = [f"extra{i}" if i < 2 else name for i, name in enumerate(few.var_names)]
    message = (
        r'3 of the model\'s 30 genes are not in this AnnData \("gene0", "gene1", "gene4"\) and count as not measured; '
        r'2 of its genes are unknown to the model \("extra0", "extra1"\) and are not used\.$'
    )
    with pytest.warns(UserWarning, match=message):
        z = model.get_latent_representation(few)
    assert np.isfinite(z).all()
    whole = model.get_latent_representation()
    assert np.mean([np.corrcoef(a, b)[0, 1] for a, b in zip(z.T, whole.T, strict=True)]) > 0.5
    expression = model.get_normalized_expression(few)
    assert list(expression.columns) == [name for name in few.var_names if not name.startswith("extra")]
    np.testing.assert_allclose(expression.sum(1), 1.0, rtol=1e-4)
    assert np.isfinite(model.get_elbo(few))


def test_genes_removed_after_the_set_up_are_said(make_tissues, build, train):
    """Of the model's own data, and of new ones."""
    model = train(build(make_tissues()))
    new = make_tissues(seed=1)
    model.get_latent_representation(new)
    for adata in (model.adata, new):
        adata._inplace_subset_var(adata.var_names[10:])
        with pytest.warns(UserWarning, match="had 30 genes when it was set up, and has 20 now. .* 10 that it lacks"):
            model.get_latent_representation(adata)


def test_few_genes_are_called_few(model):
    with pytest.warns(UserWarning, match="22 of the model's 30 genes.*These are few"):
        model.get_latent_representation(model.adata[:, :8].copy())


def test_no_shared_gene_is_an_error(model):
    other = model.adata.copy()
    other.var_names = [f"ENSG{i:08}" for i in range(other.n_vars)]
    with pytest.raises(
        ValueError, match=r"None of the model's 30 genes \(such as \"gene0\".*\"ENSG00000000\".*identifiers"
    ):
        model.get_latent_representation(other)


@pytest.mark.parametrize("key", ["batch", "platform", "study"])
def test_unseen_categories_get_the_mean_code(model, key):
    other = model.adata.copy()
    other.obs[key] = np.where(np.arange(other.n_obs) < 10, "unseen", other.obs[key].astype(str))
    with pytest.warns(
        UserWarning, match=rf'obs\["{key}"\] has 1 category that the model has not seen \("unseen"\): 10 cells'
    ):
        expression = model.get_normalized_expression(other)
    known = model.get_normalized_expression()
    np.testing.assert_allclose(expression[10:], known[10:], rtol=1e-4)
    assert np.abs(expression[:10] - known[:10]).to_numpy().max() > 1e-6
    for align in [False] if key == "batch" else [False, True]:  # a batch that is not known is not moved
        z = (model.get_latent_representation(data, align_batches=align) for data in (other, None))
        np.testing.assert_allclose(*z, atol=1e-6)
    other.obs[key] = "also unseen"
    with pytest.warns(UserWarning, match="also unseen"):
        every = model.get_normalized_expression(other.copy())
    np.testing.assert_allclose(every[:10], expression[:10], rtol=1e-4)


@pytest.mark.parametrize("key", ["batch", "platform", "study"])
def test_a_missing_covariate_gets_the_mean_code(model, key):
    other = model.adata.copy()
    del other.obs[key]
    with pytest.warns(UserWarning, match=rf'no obs\["{key}"\]: its cells get the mean'):
        expression = model.get_normalized_expression(other)
    unseen = model.adata.copy()
    unseen.obs[key] = "unseen"
    np.testing.assert_allclose(expression, model.get_normalized_expression(unseen), rtol=1e-5)


def test_missing_columns_are_no_matter_at_the_second_call(model):
    other = model.adata.copy()
    other.obs = other.obs[["sample", "cell_type"]]
    other.obsm.clear()
    first = model.get_latent_representation(other)
    np.testing.assert_array_equal(model.get_latent_representation(other), first)
    assert model.get_normalized_expression(other).shape == other.shape
    assert (
        model.differential_expression(other, groupby="cell_type", group1="type0", silent=True).shape[0] == other.n_vars
    )


def test_a_missing_sample_column_is_one_sample(model):
    other = model.adata.copy()
    del other.obs["sample"]
    with pytest.warns(UserWarning, match="all its cells are treated as one sample"):
        z = model.get_latent_representation(other)
    one = model.adata.copy()
    one.obs["sample"] = "one"
    np.testing.assert_allclose(model.get_latent_representation(one), z, atol=1e-6)


def test_a_mistyped_key_is_an_error_after_an_earlier_set_up(tissues):
    CellPLM.setup_anndata(tissues, batch_key="batch")
    with pytest.raises(KeyError, match='batch_key="bacth"'):
        CellPLM.setup_anndata(tissues, batch_key="bacth")


def test_bad_new_data_are_refused(model):
    other = model.adata.copy()
    other.X = other.X * 0.5
    with pytest.raises(ValueError, match="does not hold counts"):
        model.get_latent_representation(other)


WRITTEN = {
    "int": lambda codes: codes,
    "float": lambda codes: codes.astype(float),
    "str": lambda codes: codes.astype(str),
    "float, then str": lambda codes: codes.astype(float).astype(str),
}


@pytest.mark.parametrize("known", WRITTEN)
def test_batches_named_by_numbers_are_known_in_any_type(make_tissues, build, train, known):
    def named(written):
        adata = make_tissues()
        adata.obs["batch"] = WRITTEN[written](pd.Series(adata.obs["batch"].cat.codes, adata.obs_names))
        return adata

    model = train(build(named(known)), max_epochs=1)
    expected = model.get_normalized_expression()
    for given in WRITTEN:
        with warnings.catch_warnings():
            warnings.filterwarnings("error", message=".*has not seen")
            pd.testing.assert_frame_equal(model.get_normalized_expression(named(given)), expected)


def test_two_names_are_not_taken_for_one(make_tissues, build, train):
    adata = make_tissues()
    adata.obs["batch"] = adata.obs["batch"].cat.codes.to_numpy()
    model = train(build(adata), max_epochs=1)
    other = make_tissues()
    other.obs["batch"] = np.where(np.arange(other.n_obs) % 2, "1.0", "1")
    with pytest.warns(
        UserWarning, match=r'obs\["batch"\] has 1 category that the model has not seen \("1.0"\): 45 cells'
    ):
        model.get_normalized_expression(other)


def test_coordinates_of_another_dimension(spatial_model, make_tissues):
    other = make_tissues(30, 30, spatial=True, n_dims=3)
    with pytest.raises(ValueError, match=r'obsm\["spatial"\] has 3 columns; the model was set up with 2'):
        spatial_model.get_latent_representation(other)


@pytest.mark.parametrize("own", [True, False], ids=["own", "new"])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda xy: np.c_[xy, xy[:, :1]], r'obsm\["spatial"\] has 3 columns; the model was set up with 2'),
        (
            lambda xy: np.where(np.arange(xy.size).reshape(xy.shape) == 6, np.nan, xy),
            "1 cell has .* some are NaN.*cell3",
        ),
        (
            lambda xy: np.where(np.arange(xy.size).reshape(xy.shape) == 6, np.inf, xy),
            "1 cell has infinite coordinates",
        ),
    ],
    ids=["columns", "part", "infinite"],
)
def test_coordinates_are_checked_whenever_they_are_read(spatial_model, clone, own, change, message):
    model = clone(spatial_model)
    adata = model.adata if own else model.adata.copy()
    model.get_latent_representation(adata)
    adata.obsm["spatial"] = change(adata.obsm["spatial"])
    with pytest.raises(ValueError, match=message):
        model.get_latent_representation(adata)


def test_library_sizes_are_checked_whenever_they_are_read(tissues, build, train):
    tissues.obs["total"] = np.asarray(tissues.X.sum(1)).ravel() * 2
    model = train(build(tissues, {"size_factor_key": "total"}))
    new = model.adata.copy()
    model.get_latent_representation(new)
    new.obs.loc["cell3", "total"] = np.nan
    with pytest.raises(ValueError, match=r'obs\["total"\] is the library size.*1 value is missing.*"cell3"'):
        model.get_latent_representation(new)


def test_one_new_cell(model):
    one = model.adata[:1].copy()
    assert np.isfinite(model.get_latent_representation(one)).all()
    assert model.get_normalized_expression(one).shape == (1, 30)


def test_new_data_of_zero_cells(model):
    with pytest.raises(ValueError, match="The AnnData is empty: it has 0 cells"):
        model.get_latent_representation(model.adata[:0].copy())


def test_counts_that_are_not_in_the_layer_of_the_model(make_tissues, build, train):
    adata = make_tissues()
    adata.layers["counts"] = adata.X
    model = train(build(adata, {"layer": "counts"}))
    new = make_tissues()
    with pytest.raises(
        ValueError, match=r'layer="counts" is not a layer.*set up this AnnData with that `layer=`, or without'
    ):
        model.get_latent_representation(new)
    CellPLM.setup_anndata(new, batch_key="batch", sample_key="sample")
    np.testing.assert_array_equal(model.get_latent_representation(new), model.get_latent_representation())


def test_new_cells_without_counts(model):
    empty = AnnData(np.zeros((3, 30), np.float32), obs=model.adata.obs.iloc[:3], var=model.adata.var)
    assert np.isfinite(model.get_latent_representation(empty)).all()
    assert np.isfinite(model.get_normalized_expression(empty).to_numpy()).all()


def test_genes_in_another_order_load_without_a_word(dissociated_model, tmp_path):
    dissociated_model.save(str(tmp_path / "model"))
    adata = dissociated_model.adata[:, ::-1].copy()
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*var_names")
        again = CellPLM.load(str(tmp_path / "model"), adata=adata, accelerator="cpu")
    np.testing.assert_allclose(
        again.get_latent_representation(), dissociated_model.get_latent_representation(), atol=1e-5
    )


@pytest.mark.parametrize("key", ["batch", "sample", "study"])
@pytest.mark.parametrize("first", ["absent", "other"])
def test_columns_that_are_mended_are_read_again(model, key, first):
    """A warning asks for it."""
    expected = model.adata.copy()
    new = model.adata.copy()
    column = new.obs.pop(key)
    if first == "other":
        new.obs[key] = "other"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        before = model.get_latent_representation(new), model.get_normalized_expression(new).to_numpy()
    new.obs[key] = column
    assert not all(
        np.array_equal(a, b)
        for a, b in zip(
            before, (model.get_latent_representation(new), model.get_normalized_expression(new)), strict=True
        )
    )
    np.testing.assert_array_equal(model.get_latent_representation(new), model.get_latent_representation(expected))
    np.testing.assert_array_equal(model.get_normalized_expression(new), model.get_normalized_expression(expected))


def test_a_batch_that_was_renamed_moves_no_other(tissues, build, train):
    """A second set-up makes the first one read its columns again; the codes stay those that were trained."""
    model = train(build(tissues))
    adata, before = model.adata, model.get_normalized_expression()
    adata.obs["batch"] = adata.obs["batch"].astype(str).replace("batch0", "renamed")
    CellPLM.setup_anndata(adata, batch_key="study")
    with pytest.warns(UserWarning, match=r'1 category that the model has not seen \("renamed"\)'):
        after = model.get_normalized_expression()
    other = (adata.obs["batch"] == "batch1").to_numpy()
    np.testing.assert_array_equal(after[other], before[other])
    np.testing.assert_array_equal(model.get_normalized_expression(transform_batch="batch0")[~other], before[~other])


def test_a_covariate_of_one_category_is_not_missed(tissues, build, train):
    """It has nothing to say."""
    tissues.obs["study"] = "one"
    model = train(build(tissues))
    other = model.adata.copy()
    del other.obs["study"]
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        expression = model.get_normalized_expression(other)
    np.testing.assert_array_equal(expression, model.get_normalized_expression())


@pytest.mark.parametrize("new", [int, float, str])
@pytest.mark.parametrize("old", [int, float, str])
def test_batches_that_are_whole_numbers_are_known_in_any_type(tissues, build, train, old, new):
    codes = tissues.obs["batch"].cat.codes.astype(int)
    tissues.obs["batch"] = codes.astype(old)
    model = train(build(tissues))
    other = model.adata.copy()
    other.obs["batch"] = codes.astype(new)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        expression = model.get_normalized_expression(other)
    np.testing.assert_array_equal(expression, model.get_normalized_expression())


@pytest.mark.parametrize("harm", ["counts", "missing batch"])
def test_a_failed_check_leaves_models_of_the_same_data_as_they_were(make_tissues, build, train, tmp_path, harm):
    first = train(build(make_tissues(60)))
    adata = first.adata
    CellPLM.setup_anndata(adata, batch_key="batch")
    second = train(CellPLM(adata, n_hidden=16, n_layers=1))
    before = first.get_latent_representation(), second.get_latent_representation()
    counts, batches = adata.X, adata.obs["batch"].copy()
    if harm == "counts":
        adata.X = adata.X.log1p()
    else:
        adata.obs["batch"] = batches.astype(object).where(np.arange(adata.n_obs) > 3)
    with pytest.raises(ValueError, match="counts|missing"):
        first.get_latent_representation()
    adata.X, adata.obs["batch"] = counts, batches
    for model, expected in zip((first, second), before, strict=True):
        np.testing.assert_array_equal(model.get_latent_representation(), expected)
    first.save(tmp_path / "model")
    loaded = CellPLM.load(tmp_path / "model", adata=adata, accelerator="cpu")
    np.testing.assert_array_equal(loaded.get_latent_representation(), before[0])
    train(first)


def test_the_set_up_of_a_copy_is_not_that_of_the_original(make_tissues, build, train):
    model = train(build(make_tissues(60)))
    new = make_tissues(40, seed=1)
    new.obs["sample"] = "new"
    new.obs["donor"] = ["d0", "d1"] * 20
    model.get_latent_representation(new)
    copied = new.copy()
    CellPLM.setup_anndata(copied, batch_key="donor")
    query = CellPLM.load_query_data(new, model, batch_key="sample")
    again = CellPLM.load_query_data(new.copy(), model, batch_key="sample")
    assert query.registry_["setup_args"]["batch_key"] == again.registry_["setup_args"]["batch_key"] == "sample"
    assert CellPLM.from_pretrained(model, new).registry_["setup_args"] == model.registry_["setup_args"]
