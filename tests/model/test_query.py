"""A query is mapped onto a reference that stays as it is."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import scvi
import torch
from anndata import AnnData

from cellplm_scvi import CellPLM
from cellplm_scvi.genes import map_genes


@pytest.fixture
def new_data(make_tissues: Callable[..., AnnData]) -> AnnData:
    """Two new batches and one that the models know, one new study, some cells without a position; a gene is absent and two are unknown."""
    adata = make_tissues(60, 32, seed=4, spatial=True)
    adata.obsm["spatial"][::7] = np.nan
    adata.obs["batch"] = np.asarray(["new1", "new2", "batch0"])[np.arange(60) % 3]
    adata.obs["study"] = "three"
    return adata[:, 1:].copy()


@pytest.fixture(params=["dissociated", "spatial"])
def reference(request, models) -> CellPLM:
    return models[request.param]


@pytest.fixture
def query(reference, new_data) -> CellPLM:
    return CellPLM.load_query_data(new_data, reference, accelerator="cpu")


def test_only_the_new_codes_train(query, train):
    before = {name: p.detach().clone() for name, p in query.module.state_dict().items()}
    train(query, max_epochs=2, plan_kwargs={"weight_decay": 0.5})
    changed = {name for name, p in query.module.state_dict().items() if not torch.equal(p, before[name])}
    decoders = ["decoder"] + (["niche.decoder"] if query.module.niche is not None else [])
    tables = [f"{decoder}.{codes}" for decoder in decoders for codes in ("codes", "output_codes")]
    assert changed == {f"{table}.{name}.weight" for table in tables for name in ("batch", "dataset")}
    assert before["decoder.codes.batch.weight"].shape[0] == 2


def test_the_reference_is_the_same_to_the_bit(reference, query, train):
    z, expression = reference.get_latent_representation(), reference.get_normalized_expression()
    for _ in range(2):
        np.testing.assert_array_equal(query.get_latent_representation(reference.adata.copy()), z)
        np.testing.assert_array_equal(query.get_normalized_expression(reference.adata.copy()), expression)
        train(query)
    np.testing.assert_array_equal(reference.get_latent_representation(), z)


def test_training_explains_the_query_better(query, train):
    before = float(query.get_elbo())
    train(query, max_epochs=15, train_size=1.0)
    assert float(query.get_elbo()) > before
    assert len(query.history["train_loss"]) == 15


def test_a_query_starts_as_zero_shot(reference, query, new_data):
    assert query.is_trained_
    np.testing.assert_allclose(
        query.get_normalized_expression(),
        reference.get_normalized_expression(new_data.copy()),
        rtol=1e-5,
    )


def test_everything_trains_if_asked_for(query, train):
    before = {name: p.detach().clone() for name, p in query.module.named_parameters()}
    train(query, freeze=None)
    assert not any(torch.equal(p, before[name]) for name, p in query.module.named_parameters() if "codes" not in name)


@pytest.mark.parametrize("way", ["save", "save_pretrained"])
def test_references_by_their_folder(reference, new_data, train, tmp_path, way):
    getattr(reference, way)(str(tmp_path / "reference"))
    query = train(CellPLM.load_query_data(new_data, tmp_path / "reference", accelerator="cpu"))
    np.testing.assert_array_equal(
        query.get_latent_representation(reference.adata.copy()), reference.get_latent_representation()
    )


@pytest.mark.parametrize("way", ["save", "save_pretrained"])
def test_a_query_is_saved_and_still_trains_its_codes_alone(query, new_data, train, tmp_path, way):
    train(query)
    getattr(query, way)(str(tmp_path / "query"))
    if way == "save":
        again = CellPLM.load(str(tmp_path / "query"), adata=new_data.copy(), accelerator="cpu")
    else:
        again = CellPLM.from_pretrained(tmp_path / "query", new_data.copy(), accelerator="cpu")
    np.testing.assert_array_equal(again.get_normalized_expression(), query.get_normalized_expression())
    before = again.module.embedder.weight.clone()
    codes = again.module.newest_codes()[0].clone()
    train(again)
    assert torch.equal(again.module.embedder.weight, before)
    assert not torch.equal(again.module.newest_codes()[0], codes)


def test_a_query_onto_a_query(query, train, new_data):
    train(query)
    third = new_data.copy()
    third.obs["batch"] = "third"
    next_query = train(CellPLM.load_query_data(third, query, accelerator="cpu"))
    np.testing.assert_array_equal(
        next_query.get_normalized_expression(new_data.copy()), query.get_normalized_expression()
    )
    assert next_query.module.decoder.codes["batch"].weight.shape[0] == 1


def test_a_query_with_nothing_new(reference):
    with pytest.raises(ValueError, match=r'knows every category of obs\["batch"\] \("batch0", "batch1"\).*rename them'):
        CellPLM.load_query_data(reference.adata.copy(), reference)


def test_a_query_without_the_column(reference, new_data):
    del new_data.obs["batch"], new_data.obs["study"], new_data.obs["platform"]
    with pytest.raises(ValueError, match='no column "batch".*batch_key="donor"'):
        CellPLM.load_query_data(new_data, reference)


def test_a_reference_without_batches(make_tissues, build, train, new_data):
    reference = train(build(make_tissues(), {"batch_key": None, "platform_key": None, "dataset_key": None}))
    with pytest.raises(ValueError, match="set up without batch_key"):
        CellPLM.load_query_data(new_data.copy(), reference)
    query = train(CellPLM.load_query_data(new_data, reference, batch_key="batch", accelerator="cpu"))
    assert query.module.decoder.codes["batch"].weight.shape[0] == 3
    old = reference.adata.copy()
    del old.obs["batch"]
    np.testing.assert_array_equal(query.get_normalized_expression(old), reference.get_normalized_expression())


def test_another_column_of_the_query(reference, new_data, train):
    new_data.obs["donor"] = new_data.obs.pop("batch")
    query = train(CellPLM.load_query_data(new_data, reference, batch_key="donor", accelerator="cpu"))
    assert query.module.decoder.codes["batch"].weight.shape[0] == 2


@pytest.fixture(scope="module")
def keyed(make_tissues, build, train) -> CellPLM:
    """A reference with a column of library sizes."""
    adata = make_tissues()
    adata.obs["size"] = np.asarray(adata.X.sum(1)).ravel() * 2
    return train(build(adata, {"size_factor_key": "size"}))


RENAMED = {"batch": "donor", "sample": "section", "size": "total"}


@pytest.fixture
def renamed(make_tissues) -> AnnData:
    """A query whose columns have other names."""
    adata = make_tissues(60, seed=4)
    adata.obs["size"] = np.asarray(adata.X.sum(1)).ravel() * 3
    adata.obs["batch"] = "new"
    adata.obs = adata.obs.rename(columns=RENAMED)
    return adata


@pytest.mark.parametrize("new_categories", ["query", "mean", "add"])
@pytest.mark.parametrize("way", [None, "save", "save_pretrained"])
def test_data_are_read_by_their_own_names_of_columns(keyed, renamed, train, tmp_path, new_categories, way):
    """Those that they were set up with; of data without a set-up, those that the model had before."""
    keys = {"batch_key": "donor", "sample_key": "section", "size_factor_key": "total", "accelerator": "cpu"}
    if new_categories == "query":
        model = train(CellPLM.load_query_data(renamed, keyed, **keys))
    else:
        model = CellPLM.from_pretrained(keyed, renamed, new_categories=new_categories, **keys)
    if way is not None:
        getattr(model, way)(str(tmp_path / "model"))
        load = {"save": CellPLM.load, "save_pretrained": CellPLM.from_pretrained}[way]
        model = load(str(tmp_path / "model"), adata=renamed.copy(), accelerator="cpu")
    plain = keyed.adata.copy()
    del plain.uns["_scvi_uuid"]
    z, expression = keyed.get_latent_representation(), keyed.get_normalized_expression(library_size="latent")
    both = keyed.adata.copy()
    both.obs["donor"], both.obs["section"], both.obs["total"] = "new", "all", both.obs["size"] * 2
    for old in (keyed.adata, keyed.adata.copy(), plain, both):
        np.testing.assert_array_equal(model.get_latent_representation(old), z)
        np.testing.assert_array_equal(model.get_normalized_expression(old, library_size="latent"), expression)
    np.testing.assert_array_equal(model.get_latent_representation(renamed.copy()), model.get_latent_representation())
    np.testing.assert_array_equal(keyed.get_latent_representation(), z)


def test_names_of_columns_are_remembered_twice(keyed, renamed, make_tissues):
    keys = {"batch_key": "donor", "sample_key": "section", "size_factor_key": "total", "accelerator": "cpu"}
    query = CellPLM.load_query_data(renamed, keyed, **keys)
    third = make_tissues(40, seed=5)
    third.obs["patient"] = "third"
    third.obs["section"], third.obs["total"] = "s", np.asarray(third.X.sum(1)).ravel()
    last = CellPLM.load_query_data(third, query, batch_key="patient", accelerator="cpu")
    for before in (keyed, query):
        old = before.adata.copy()
        del old.uns["_scvi_uuid"]
        np.testing.assert_array_equal(last.get_normalized_expression(old), before.get_normalized_expression())


MOUSE = ["Cd3e", "Trp53", "Sox2", "Vim", "Cd19", "Cd4", "Ptprc", "Epcam", "Kit", "Gata3"]


@pytest.fixture(scope="module")
def of_ids(make_tissues, build, train) -> CellPLM:
    """A reference whose genes have Ensembl ids."""
    adata = make_tissues(60, len(MOUSE))
    adata.var_names = map_genes(MOUSE, organism="mouse").mapped.to_numpy()
    return train(build(adata))


def new_batch(model: CellPLM, names: list[str]) -> AnnData:
    adata = AnnData(model.adata.X.copy(), obs=model.adata.obs[["sample"]].assign(batch="new"))
    adata.var_names = names
    return adata


def in_form(model: CellPLM, way: str | None, folder: Path) -> CellPLM | str:
    if way is not None:
        getattr(model, way)(str(folder / "reference"))
    return model if way is None else str(folder / "reference")


@pytest.mark.parametrize("way", [None, "save", "save_pretrained"])
def test_genes_match_by_meaning_whatever_form_the_reference_has(of_ids, tmp_path, way):
    symbols = map_genes(MOUSE, "symbol", organism="mouse").mapped.tolist()
    mixed = [*symbols[:5], *of_ids.adata.var_names[5:]]
    reference = in_form(of_ids, way, tmp_path)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*genes are")
        query = CellPLM.load_query_data(new_batch(of_ids, mixed), reference, accelerator="cpu")
    np.testing.assert_array_equal(
        query.get_latent_representation(align_batches=False), of_ids.get_latent_representation(align_batches=False)
    )
    with pytest.warns(UserWarning, match="2 of the model's 10 genes are not in this AnnData"):
        CellPLM.load_query_data(new_batch(of_ids, mixed)[:, :8].copy(), reference, accelerator="cpu")


@pytest.mark.parametrize("way", [None, "save", "save_pretrained"])
def test_the_organism_of_the_reference_is_remembered(of_ids, tmp_path, way):
    told = CellPLM.load_query_data(new_batch(of_ids, MOUSE), of_ids, organism="mouse", accelerator="cpu")
    third = new_batch(of_ids, MOUSE)
    third.obs["batch"] = "third"
    reference = in_form(told, way, tmp_path)
    expected = of_ids.get_latent_representation(align_batches=False)
    query = CellPLM.load_query_data(third.copy(), reference, accelerator="cpu")
    np.testing.assert_array_equal(query.get_latent_representation(), expected)
    if way != "save":
        again = CellPLM.from_pretrained(reference, third, accelerator="cpu")
        np.testing.assert_array_equal(again.get_latent_representation(), expected)
    with pytest.raises(ValueError, match='organism="rat"'):
        CellPLM.load_query_data(third, reference, organism="rat")


def test_genes_are_said(reference, new_data):
    with pytest.warns(UserWarning, match='1 of the model\'s 30 genes is not in this AnnData \\("gene0"\\)'):
        CellPLM.load_query_data(new_data, reference, accelerator="cpu")


def test_arguments_that_are_mixed_up(reference, new_data):
    with pytest.raises(TypeError, match=r"is of type AnnData\. Are the two arguments swapped\?"):
        CellPLM.load_query_data(reference, new_data)
    with pytest.raises(TypeError, match=r"is of type AnnData\. Are the two arguments swapped\?"):
        CellPLM.from_pretrained(new_data)
    with pytest.raises(TypeError, match=r"a folder, a name on the hub or a trained model; this is of type NoneType\.$"):
        CellPLM.from_pretrained(None)
    with pytest.raises(TypeError, match='Unexpected argument: "batchkey", which setup_anndata does not take'):
        CellPLM.load_query_data(new_data, reference, batchkey="batch")


@pytest.mark.parametrize("way", [None, "save", "save_pretrained"])
@pytest.mark.parametrize("added", ["batch_key", "sample_key", "platform_key", "dataset_key"])
def test_data_set_up_without_a_key_are_read_without_it(make_tissues, build, train, tmp_path, added, way):
    """Even if they have a column of the name that the query's has."""
    adata = make_tissues()
    adata.obs["extra"] = adata.obs["platform"].astype(str)
    keys = {"batch_key": "batch", "platform_key": None, "dataset_key": None, "sample_key": None} | {added: None}
    reference = train(build(adata, keys))
    new = make_tissues(60, seed=4)
    new.obs["batch"] = "new"
    new.obs["extra"] = "extra"
    if added == "batch_key":
        del new.obs["batch"]
    model = train(CellPLM.load_query_data(new, reference, **{added: "extra"}, accelerator="cpu"))
    if way is not None:
        getattr(model, way)(str(tmp_path / "model"))
        load = {"save": CellPLM.load, "save_pretrained": CellPLM.from_pretrained}[way]
        model = load(str(tmp_path / "model"), adata=new.copy(), accelerator="cpu")
    z, expression = reference.get_latent_representation(), reference.get_normalized_expression()
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        for old in (reference.adata, reference.adata.copy()):
            np.testing.assert_array_equal(model.get_latent_representation(old), z)
            np.testing.assert_array_equal(model.get_normalized_expression(old), expression)
    assert np.isfinite(model.get_latent_representation()).all()


@pytest.mark.parametrize("set_up", [True, False])
def test_library_sizes_cannot_be_added(reference, new_data, set_up):
    """Expected counts of the reference add up to the sum of each cell's counts."""
    new_data.obs["size"] = 1e4
    if set_up:
        CellPLM.setup_anndata(new_data, batch_key="batch", size_factor_key="size")
    keys = {} if set_up else {"size_factor_key": "size"}
    with pytest.raises(ValueError, match='size_factor_key="size": the model was trained without it.*=None'):
        CellPLM.load_query_data(new_data, reference, accelerator="cpu", **keys)
    query = CellPLM.load_query_data(new_data, reference, accelerator="cpu", size_factor_key=None)
    assert np.isfinite(query.get_normalized_expression()).all(axis=None)


def test_a_folder_saved_with_a_prefix(reference, new_data, tmp_path):
    reference.save(str(tmp_path / "model"), prefix="mine_")
    with pytest.raises(ValueError, match='saved with prefix="mine_".*CellPLM.load'):
        CellPLM.load_query_data(new_data, tmp_path / "model", accelerator="cpu")


def test_half_precision_does_not_overflow_where_genes_are_added_up(of_ids):
    """Its largest number is 65,504."""
    names = [*of_ids.adata.var_names[1:], "new gene"]
    half = new_batch(of_ids, names)
    half.X = np.minimum(half.X.toarray() * 800, 60_000).astype(np.float16)
    single = half.copy()
    single.X = half.X.astype(np.float32)
    found = []
    for adata in (half, single):
        scvi.settings.seed = 0  # where added genes start is measured on draws of z
        model = CellPLM.from_pretrained(of_ids, adata, new_genes="add", accelerator="cpu")
        found.append(model.get_normalized_expression().to_numpy())
    np.testing.assert_array_equal(*found)
    assert np.isfinite(found[0]).all()


def test_imputation_takes_names_of_the_data_that_mean_genes_of_the_model(of_ids):
    adata = new_batch(of_ids, [name.upper() for name in MOUSE])
    model = CellPLM.from_pretrained(of_ids, adata, accelerator="cpu")
    by_symbol = model.get_imputed_expression(gene_list=["CD4", "VIM"])
    assert list(by_symbol) == ["CD4", "VIM"]
    ids = of_ids.adata.var_names[[MOUSE.index("Cd4"), MOUSE.index("Vim")]]
    np.testing.assert_array_equal(by_symbol, model.get_imputed_expression(gene_list=list(ids)))


def test_frozen_parts_are_not_warned_of(query, train):
    """Lightning takes parts in evaluation mode for a mistake."""
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        train(query)
    assert not [warning for warning in said if "in eval mode" in str(warning.message)]
