"""What ``save_pretrained`` writes gives the same model back; anything else in its place is refused with a message."""

from __future__ import annotations

import json
import resource
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from anndata import AnnData
from mudata import MuData
from safetensors.torch import load_file, save_file

from cellplm_scvi import CellPLM
from cellplm_scvi.pretrained import PretrainedFileError

CONFIG, WEIGHTS = "cellplm_config.json", "model.safetensors"


def reload(model: CellPLM, folder: Path, adata: Any = None, **kwargs: Any) -> CellPLM:
    model.save_pretrained(folder, overwrite=True)
    return CellPLM.from_pretrained(folder, adata, accelerator="cpu", **kwargs)


def same_results(one: CellPLM, other: CellPLM, **kwargs: Any) -> None:
    for method in ("get_latent_representation", "get_normalized_expression"):
        found, expected = getattr(other, method)(**kwargs), getattr(one, method)(**kwargs)
        np.testing.assert_array_equal(np.asarray(found), np.asarray(expected), err_msg=method)
        if isinstance(expected, pd.DataFrame):
            assert found.index.equals(expected.index)
            assert found.columns.equals(expected.columns)


# -- The same model ----------------------------------------------------------


@pytest.mark.parametrize("name", ["dissociated", "spatial"])
def test_same_numbers(name: str, models: dict[str, CellPLM], tmp_path: Path) -> None:
    """On the same data and, without a file of them, with the same set-up."""
    model = models[name]
    adata = model.adata.copy()
    again = reload(model, tmp_path, adata)
    same_results(model, again)
    assert again.is_trained
    assert again.get_elbo() == model.get_elbo()
    state = again.module.state_dict()
    assert all(torch.equal(state[key], value) for key, value in model.module.state_dict().items())
    batch = model.adata.obs["batch"].cat.categories[0]
    expected = model.get_normalized_expression(transform_batch=batch)
    np.testing.assert_array_equal(again.get_normalized_expression(transform_batch=batch), expected)


def test_published_model(mixture_case: Any, published_data: AnnData, tmp_path: Path) -> None:
    """With its genes, so that symbols still match, and with its unnamed codes."""
    model = CellPLM.from_pretrained(mixture_case.prefix, published_data)
    published_data.var["symbol"] = published_data.var_names
    again = reload(model, tmp_path / "one", published_data.copy())
    same_results(model, again)
    versioned = published_data.copy()
    versioned.var_names = [f"{name}.3" for name in versioned.var_names]
    np.testing.assert_array_equal(
        again.get_latent_representation(versioned), again.get_latent_representation(), strict=True
    )
    report = again.pretrained_report
    assert report is not None
    assert report.format == "cellplm-scvi"
    assert any(mixture_case.name in note for note in report.notes)
    assert str(tmp_path.parent) not in (tmp_path / "one" / CONFIG).read_text()
    same_results(model, reload(again, tmp_path / "two", published_data.copy()))


def test_published_model_by_save_and_load(mixture_case: Any, published_data: AnnData, tmp_path: Path) -> None:
    """scvi-tools' own format works too."""
    model = CellPLM.from_pretrained(mixture_case.prefix, published_data)
    model.save(tmp_path / "model")
    again = CellPLM.load(tmp_path / "model", adata=published_data.copy(), accelerator="cpu")
    same_results(model, again)
    assert str(again.pretrained_report) == str(model.pretrained_report)
    without = CellPLM.load(tmp_path / "model", adata=False, accelerator="cpu")
    np.testing.assert_array_equal(
        without.get_latent_representation(published_data.copy()), model.get_latent_representation()
    )


def test_annotation_head(annotation_case: Any, tmp_path: Path) -> None:
    model = CellPLM.from_pretrained(annotation_case.prefix)
    again = reload(model, tmp_path)
    assert again.module.head is not None
    for key, value in model.module.state_dict().items():
        assert torch.equal(again.module.state_dict()[key], value)


@pytest.mark.parametrize(
    "values",
    [
        pytest.param([3, 1, 2], id="whole numbers"),
        pytest.param([0.5, 1.5, -2.0], id="numbers"),
        pytest.param([True, False, True], id="booleans"),
        pytest.param(["b", "a", "ü\n"], id="strings"),
    ],
)
def test_categories(values: list[Any], tissues: AnnData, build: Any, train: Any, tmp_path: Path) -> None:
    tissues.obs["batch"] = np.asarray(values)[np.arange(tissues.n_obs) % 3]
    model = train(build(tissues))
    again = reload(model, tmp_path, tissues)
    same_results(model, again)
    one = tissues.obs["batch"].iloc[0]
    expected = model.get_normalized_expression(transform_batch=one)
    np.testing.assert_array_equal(again.get_normalized_expression(transform_batch=one), expected)


def test_panels(tissues: AnnData, build: Any, train: Any, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    table = pd.DataFrame({"one": True, "two": rng.random(tissues.n_vars) < 0.7}, index=tissues.var_names)
    tissues.varm["measured"] = table
    counts = tissues.to_df().to_numpy(copy=True)
    counts[np.ix_((tissues.obs["study"] == "two").to_numpy(), ~table["two"].to_numpy())] = 0
    tissues.X = counts
    model = train(build(tissues, setup={"measured_genes_key": "measured"}))
    same_results(model, reload(model, tmp_path, tissues))


def test_labels_and_library(tissues: AnnData, build: Any, train: Any, tmp_path: Path) -> None:
    tissues.obs["size"] = np.asarray(tissues.X.sum(1)).ravel() * 2.0  # type: ignore[union-attr]
    model = train(build(tissues, setup={"labels_key": "cell_type", "size_factor_key": "size"}))
    same_results(model, reload(model, tmp_path, tissues))


def test_mudata(tissues: AnnData, train: Any, tmp_path: Path) -> None:
    """From a MuData to another, and to an AnnData, whose layer has to be named."""
    protein = AnnData(np.ones((tissues.n_obs, 2)), obs=pd.DataFrame(index=tissues.obs_names))
    mdata = MuData({"rna": tissues.copy(), "protein": protein})
    setup = {"batch_key": "batch", "modalities": {"rna_layer": "rna", "batch_key": "rna"}}
    CellPLM.setup_mudata(mdata, **setup)
    model = train(CellPLM(mdata, n_hidden=16, n_layers=1, n_heads=2, n_latent=4, n_components=3))
    other = MuData({"rna": tissues.copy(), "protein": protein.copy()})
    CellPLM.setup_mudata(other, **setup)
    again = reload(model, tmp_path, other)
    expected = model.get_latent_representation()
    np.testing.assert_array_equal(again.get_latent_representation(), expected)
    np.testing.assert_array_equal(reload(model, tmp_path, tissues).get_latent_representation(), expected)
    with pytest.raises(ValueError, match="setup_mudata"):
        CellPLM.from_pretrained(tmp_path, MuData({"rna": tissues.copy(), "protein": protein.copy()}))


def test_other_column(dissociated_model: CellPLM, tmp_path: Path) -> None:
    """A user's column may have another name than the one that the model was saved with."""
    adata = dissociated_model.adata.copy()
    adata.obs = adata.obs.rename(columns={"batch": "donor"})
    again = reload(dissociated_model, tmp_path, adata, batch_key="donor")
    same_results(dissociated_model, again)


def test_what_is_passed_stands_beside_what_was_set_up(dissociated_model: CellPLM, tmp_path: Path) -> None:
    """One more keyword changes none of the keys that the data were set up with."""
    adata = dissociated_model.adata.copy()
    adata.layers["raw"], adata.X = adata.X.copy(), adata.X.log1p()  # type: ignore[union-attr]
    adata.obs = adata.obs.rename(columns={"batch": "donor", "sample": "piece"})
    CellPLM.setup_anndata(adata, layer="raw", batch_key="donor", platform_key="platform", dataset_key="study")
    again = reload(dissociated_model, tmp_path, adata, sample_key="piece")
    same_results(dissociated_model, again)
    assert again.registry_["setup_args"]["layer"] == "raw"


def test_a_set_up_leaves_other_keys_to_the_model(tissues: AnnData, build: Any, train: Any, tmp_path: Path) -> None:
    tissues.obs["size"] = np.asarray(tissues.X.sum(1)).ravel() * 2.0  # type: ignore[union-attr]
    tissues.obs["guide"] = ["ctrl", "gene1"] * (tissues.n_obs // 2)
    keys = {"size_factor_key": "size", "perturbation_key": "guide", "control_category": "ctrl"}
    model = train(build(tissues, setup=keys))
    adata = tissues.copy()
    CellPLM.setup_anndata(adata, batch_key="batch")
    again = reload(model, tmp_path, adata)
    same_results(model, again)
    assert {name: again.registry_["setup_args"][name] for name in keys} == keys
    del adata.obs["size"]
    assert reload(model, tmp_path, adata).registry_["setup_args"]["size_factor_key"] is None


def test_positions_that_a_model_has_no_part_for(dissociated_model: CellPLM, make_tissues: Any) -> None:
    """Data that were set up with coordinates meet a model without, which gets new categories."""
    adata = make_tissues(spatial=True, seed=5)
    adata.obs["batch"] = "new"
    CellPLM.setup_anndata(adata, batch_key="batch", spatial_key="spatial")
    with pytest.warns(UserWarning, match='spatial_key="spatial" has no effect'):
        model = CellPLM.from_pretrained(dissociated_model, adata, new_categories="add", accelerator="cpu")
    without = adata.copy()
    without.uns.clear()
    del without.obsm["spatial"]
    np.testing.assert_array_equal(
        model.get_latent_representation(), dissociated_model.get_latent_representation(without)
    )


def test_words_that_are_numbers(tissues: AnnData, build: Any, train: Any, tmp_path: Path) -> None:
    tissues.obs["dose"] = [0, 10] * (tissues.n_obs // 2)
    setup = {"perturbation_key": "dose", "control_category": 0, "labels_key": "dose", "unlabeled_category": 10}
    model = train(build(tissues, setup=setup))
    model.train_perturbation(n_steps=1, progress_bar=False)
    again = reload(model, tmp_path, tissues)
    same_results(model, again)
    pd.testing.assert_frame_equal(again.predict_perturbation("10"), model.predict_perturbation("10"))


def test_the_summary_counts_no_samples_that_it_does_not_know(
    dissociated_model: CellPLM, tmp_path: Path, capsys: Any
) -> None:
    again = reload(dissociated_model, tmp_path, dissociated_model.adata.copy())
    repr(again)
    shown = " ".join(capsys.readouterr().out.split())
    assert "90 cells, " in shown
    assert "samples" not in shown


def test_data_may_come_later(dissociated_model: CellPLM, tmp_path: Path) -> None:
    again = reload(dissociated_model, tmp_path)
    for method in ("get_latent_representation", "get_normalized_expression", "get_elbo", "posterior_predictive_sample"):
        with pytest.raises(ValueError, match="without an AnnData"):
            getattr(again, method)()
    expected = dissociated_model.get_latent_representation()
    np.testing.assert_array_equal(again.get_latent_representation(dissociated_model.adata.copy()), expected)


def test_what_was_set_up_stays(dissociated_model: CellPLM, mixture_case: Any, published_data: AnnData) -> None:
    """Loading a model on an AnnData does not change what a model built from it later sees, nor that of the original."""
    published_data.obs["batch"] = ["x", "y"] * (published_data.n_obs // 2)
    CellPLM.setup_anndata(published_data, batch_key="batch")
    loaded = CellPLM.from_pretrained(mixture_case.prefix, published_data)
    embedding = loaded.get_latent_representation()
    built = CellPLM(published_data, n_hidden=8, n_layers=1, n_heads=2, n_latent=2)
    assert built.summary_stats.n_batch == 2
    of_copy = CellPLM.from_pretrained(mixture_case.prefix, published_data.copy())
    np.testing.assert_array_equal(of_copy.get_latent_representation(), embedding)
    np.testing.assert_array_equal(loaded.get_latent_representation(), embedding)


def test_nothing_is_replaced_unasked(dissociated_model: CellPLM, tmp_path: Path) -> None:
    dissociated_model.save_pretrained(tmp_path)
    before = (tmp_path / WEIGHTS).read_bytes()
    with pytest.raises(FileExistsError, match="overwrite=True"):
        dissociated_model.save_pretrained(tmp_path)
    assert (tmp_path / WEIGHTS).read_bytes() == before
    assert {path.name for path in tmp_path.iterdir()} == {CONFIG, WEIGHTS}


def test_home_folder(dissociated_model: CellPLM, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))
    dissociated_model.save_pretrained("~/model")
    assert (tmp_path / "model" / CONFIG).is_file()
    assert CellPLM.from_pretrained("~/model").is_trained


def test_without_safetensors(dissociated_model: CellPLM, tmp_path: Path, monkeypatch: Any) -> None:
    """The package is an extra: a message says how to get it, and nothing is written."""
    dissociated_model.save_pretrained(tmp_path / "there")
    monkeypatch.setitem(sys.modules, "safetensors", None)
    monkeypatch.setitem(sys.modules, "safetensors.torch", None)
    with pytest.raises(ImportError, match=r"cellplm-scvi\[hub\]"):
        dissociated_model.save_pretrained(tmp_path / "new")
    assert not (tmp_path / "new").exists()
    with pytest.raises(ImportError, match=r"cellplm-scvi\[hub\]"):
        CellPLM.from_pretrained(tmp_path / "there")


# -- Damage ------------------------------------------------------------------


@pytest.fixture(scope="module")
def saved(models: dict[str, CellPLM], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("saved")
    models["spatial"].save_pretrained(folder)
    return folder


@pytest.fixture
def own(saved: Path, tmp_path: Path) -> Path:
    """A copy of a saved model to spoil, without the checksum that any change of the weights would break."""
    for name in (CONFIG, WEIGHTS):
        (tmp_path / name).write_bytes((saved / name).read_bytes())
    put(tmp_path, "weights_sha256", ...)
    return tmp_path


def entries(folder: Path) -> dict[str, Any]:
    return json.loads((folder / CONFIG).read_text())


def put(folder: Path, path: str, value: Any) -> None:
    """Set the entry of the configuration at a path such as ``registry/field_registries/X``; ``...`` removes it."""
    content = holder = entries(folder)
    *way, last = path.split("/")
    for name in way:
        holder = holder[name]
    if value is ...:
        del holder[last]
    else:
        holder[last] = value
    (folder / CONFIG).write_text(json.dumps(content))


def refused(folder: Path) -> None:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(PretrainedFileError) as caught:
        CellPLM.from_pretrained(folder, accelerator="cpu")
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100 * 2**10  # of 1,024 bytes
    assert 20 < len(str(caught.value)) < 800
    assert any(name in str(caught.value) for name in (CONFIG, WEIGHTS))


INIT: dict[str, tuple[Any, ...]] = {
    **dict.fromkeys(
        ("n_hidden", "n_layers", "n_heads", "n_latent", "n_components", "n_decoder_layers"),
        (0, -1, 1.5, "16", [16], {}, 7, 10**9, 1e9, 10**30),
    ),
    **dict.fromkeys(("max_context", "n_neighbours"), (0, -1, 1.5, "many", [16])),
    **dict.fromkeys(("encoder", "latent", "position", "input_normalization"), ("", 0, [], "lstm", "mlp\0")),
    "dropout_rate": (-1, 2, "0.1", []),
    "n_niche": (-1, 1.5, "3"),
    "niche_weight": ("x", []),
    "published": ("x", [], {}, {"n_layers": "x"}, {"n_layers": 10**9}, {"n_genes": 30, "n_hidden": 10**9}),
    "adata": ("x", {}),
    "registry": ({}, "x"),
    "unknown": (1,),
    "__class__": ("os.system",),
    "self": (1,),
}


@pytest.mark.parametrize(
    ("name", "value"),
    [pytest.param(k, v, id=f"{k}={str(v)[:12]}-{n}") for k, values in INIT.items() for n, v in enumerate(values)],
)
def test_odd_argument(name: str, value: Any, own: Path) -> None:
    put(own, f"init/{name}", value)
    refused(own)


FIELDS = "registry/field_registries"
PLACES: dict[str, tuple[Any, ...]] = {
    "format": (..., "other", 1, None),
    "version": (..., 0, 2, -1, "1", None, True, 1.0),
    "model": (..., "SCVI", 3, "os.system", "X" * 10**6),
    "init": (..., [], "x", None),
    "origin": ("x", {}, {"source": 3}, []),
    "more": (1,),
    "registry": (..., {}, [], "x"),
    "registry/setup_method_name": (..., "os", "train", "__init__", None, "setup_datamodule"),
    "registry/scvi_version": (..., 3),
    "registry/setup_args": (..., [], {"unknown": "a"}, {"adata": "x"}, {"layer": 3}, {"batch_key": ["a"]}),
    "registry/field_registries": (..., {}, [], None),
    f"{FIELDS}/X": (..., {}, [], "x"),
    f"{FIELDS}/X/state_registry": (..., {}, []),
    f"{FIELDS}/X/summary_stats": (..., [], {"n_cells": "many"}, {"n_cells": -1.5}),
    f"{FIELDS}/X/data_registry": (..., [], None),
    f"{FIELDS}/X/state_registry/column_names": (..., [], "x", ["a"] * 30, ["a"], [1, 2], [None] * 30, {"a": 1}),
    f"{FIELDS}/batch": (..., {}, 3),
    f"{FIELDS}/batch/state_registry": (..., {}),
    f"{FIELDS}/batch/state_registry/categorical_mapping": (
        ...,
        [],
        ["a", "a"],
        ["a"],
        [["a"], ["b"]],
        "ab",
        [None, "a"],
    ),
    f"{FIELDS}/batch/state_registry/n_known": (..., -1, 3, "2", 10**9, 1.0, True, None),
    f"{FIELDS}/batch/state_registry/original_key": (..., 3, None),
    f"{FIELDS}/batch/summary_stats": (..., {"n_batch": "2"}),
    f"{FIELDS}/sample": (..., {}),
    f"{FIELDS}/sample/state_registry/n_known": (..., 7),
    f"{FIELDS}/coordinates/state_registry/n_dims": (..., 0, 4, "2", 10**9),
    f"{FIELDS}/new": (3, {}, {"state_registry": {}}),
}


@pytest.mark.parametrize(
    ("place", "value"),
    [pytest.param(k, v, id=f"{k}={str(v)[:12]}-{n}") for k, values in PLACES.items() for n, v in enumerate(values)],
)
def test_odd_entry(place: str, value: Any, own: Path) -> None:
    put(own, place, value)
    refused(own)


@pytest.mark.parametrize("kept", np.linspace(0, 1, 20, endpoint=False).round(3))
@pytest.mark.parametrize("name", [CONFIG, WEIGHTS])
def test_truncated(name: str, kept: float, own: Path) -> None:
    whole = (own / name).read_bytes()
    (own / name).write_bytes(whole[: int(kept * len(whole))])
    refused(own)


def read_weights(folder: Path) -> dict[str, torch.Tensor]:
    """Clones, for what was read is a map of the file, which is about to be written anew."""
    return {name: value.clone() for name, value in load_file(folder / WEIGHTS).items()}


CHANGES: dict[str, Callable[[dict[str, torch.Tensor], str], Any]] = {
    "missing": lambda w, k: w.pop(k),
    "extra": lambda w, k: w.update(extra=torch.ones(2)),
    "renamed": lambda w, k: w.update(other=w.pop(k)),
    "longer": lambda w, k: w.update({k: w[k].new_ones(w[k].shape[0] + 1, *w[k].shape[1:])}),
    "flat": lambda w, k: w.update({k: w[k].reshape(1, -1)}),
    "doubles": lambda w, k: w.update({k: w[k].double()}),
    "whole numbers": lambda w, k: w.update({k: w[k].long()}),
    "NaN": lambda w, k: w.update({k: torch.full_like(w[k], torch.nan)}),
    "infinite": lambda w, k: w.update({k: torch.full_like(w[k], torch.inf)}),
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("place", [0, 7, -1])
def test_odd_weights(change: str, place: int, own: Path) -> None:
    weights = read_weights(own)
    key = [name for name, value in sorted(weights.items()) if value.ndim == 2][place]
    CHANGES[change](weights, key)
    save_file(weights, own / WEIGHTS)
    refused(own)


@pytest.mark.parametrize(
    "header",
    [
        pytest.param(b"", id="none"),
        pytest.param(b"not json", id="text"),
        pytest.param(
            b'{"a":{"dtype":"F32","shape":[1000000000,1000],"data_offsets":[0,4000000000000]}}', id="terabytes"
        ),
        pytest.param(b'{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,4]}}', id="too short"),
        pytest.param(b'{"a":{"dtype":"F32","shape":[-1],"data_offsets":[0,4]}}', id="negative"),
        pytest.param(b'{"a":{"dtype":"PICKLE","shape":[1],"data_offsets":[0,4]}}', id="unknown type"),
        pytest.param(b"[" * 10**5, id="deep"),
    ],
)
@pytest.mark.parametrize("claimed", [None, 2**60])
def test_odd_header(header: bytes, claimed: int | None, own: Path) -> None:
    size = len(header) if claimed is None else claimed
    (own / WEIGHTS).write_bytes(size.to_bytes(8, "little") + header + bytes(4))
    refused(own)


def test_a_flipped_bit(saved: Path, own: Path) -> None:
    """Folders with a checksum of the weights do not load others; those without load as they are."""
    CellPLM.from_pretrained(saved, accelerator="cpu")
    weights = bytearray((saved / WEIGHTS).read_bytes())
    weights[-2] ^= 1
    (own / WEIGHTS).write_bytes(weights)
    CellPLM.from_pretrained(own, accelerator="cpu")
    (own / CONFIG).write_bytes((saved / CONFIG).read_bytes())
    with pytest.raises(PretrainedFileError, match=f"{WEIGHTS} is not the file that {CONFIG} was written with"):
        CellPLM.from_pretrained(own, accelerator="cpu")


def test_pickle_for_weights(own: Path) -> None:
    torch.save(read_weights(own), own / WEIGHTS)
    refused(own)


def test_of_another_model(own: Path, mixture_case: Any, tmp_path: Path) -> None:
    CellPLM.from_pretrained(mixture_case.prefix).save_pretrained(tmp_path / "other")
    (own / WEIGHTS).write_bytes((tmp_path / "other" / WEIGHTS).read_bytes())
    refused(own)


@pytest.mark.parametrize("absent", [CONFIG, WEIGHTS])
def test_half_a_folder(absent: str, own: Path) -> None:
    (own / absent).unlink()
    with pytest.raises(FileNotFoundError, match=absent):
        CellPLM.from_pretrained(own)
