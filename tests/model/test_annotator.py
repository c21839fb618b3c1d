"""Annotation of cell types."""

from __future__ import annotations

import warnings

import anndata
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp
import torch
from anndata import AnnData
from sklearn.metrics import f1_score

from cellplm_scvi import CellPLM, CellPLMAnnotator
from cellplm_scvi.model._annotation_fit import fit_head, fit_regression, hold_out, make_folds
from cellplm_scvi.train import PlaceMixtureComponents


@pytest.fixture(scope="module")
def labelled(make_tissues, build, train) -> CellPLM:
    """A small model; one of its samples is unlabelled."""
    model = train(build(make_tissues(240)), max_epochs=3, plan_kwargs={"lr": 1e-2})
    labels = model.adata.obs["cell_type"].astype(object)
    labels[model.adata.obs["sample"] == "sample1"] = None
    model.adata.obs["label"] = labels
    return model


@pytest.fixture(scope="module")
def annotator(labelled) -> CellPLMAnnotator:
    annotator = CellPLMAnnotator.from_cellplm(labelled, "label", unlabeled_category="nobody knows")
    annotator.train()
    return annotator


def test_names_of_unlabelled_cells(annotator, labelled):
    adata = labelled.adata
    hidden = adata.obs["label"].isna().to_numpy()
    predicted = annotator.predict()
    assert predicted.shape == (adata.n_obs,)
    assert f1_score(adata.obs["cell_type"][hidden], predicted[hidden], average="macro") > 0.9


def test_the_model_stays_as_it_was(annotator, labelled):
    np.testing.assert_allclose(annotator.get_latent_representation(), labelled.get_latent_representation(), atol=1e-6)
    assert not hasattr(labelled.module, "annotation")
    assert "label" not in str(labelled.registry_["setup_args"]["labels_key"])


def test_probabilities(annotator, labelled):
    soft = annotator.predict(soft=True)
    assert list(soft.columns) == ["type0", "type1", "type2"]
    assert list(soft.index) == list(labelled.adata.obs_names)
    np.testing.assert_allclose(soft.sum(axis=1), 1, rtol=1e-4)
    np.testing.assert_array_equal(soft.columns[soft.to_numpy().argmax(1)], annotator.predict())
    rows = [5, 1, 100]
    pd.testing.assert_frame_equal(annotator.predict(indices=rows, soft=True), soft.iloc[rows], rtol=1e-4)


@pytest.mark.parametrize("dtype", ["int64", "float64"])
def test_labels_that_are_numbers(labelled, dtype):
    adata = labelled.adata.copy()
    numbers = adata.obs["cell_type"].str[-1].astype(int)
    hidden = (adata.obs["sample"] == "sample1").to_numpy()
    adata.obs["number"] = numbers.where(~hidden, -1).astype(dtype)
    annotator = CellPLMAnnotator.from_cellplm(labelled, "number", unlabeled_category=-1, adata=adata)
    annotator.train()
    assert annotator.classes.tolist() == ["0", "1", "2"]
    assert (annotator.predict()[hidden] == numbers[hidden].astype(str)).mean() > 0.9


def test_labels_that_were_mended_are_learned(labelled):
    adata = labelled.adata.copy()
    right = adata.obs["cell_type"].astype(str)
    adata.obs["mended"] = right.map({"type0": "type1", "type1": "type0", "type2": "type2"})
    annotator = CellPLMAnnotator.from_cellplm(labelled, "mended", adata=adata)
    annotator.train()
    adata.obs["mended"] = right
    annotator.train()
    assert (annotator.predict() == right).mean() > 0.9


def test_one_labelled_cell_a_class_is_too_few(labelled):
    adata = labelled.adata.copy()
    first = ~adata.obs["cell_type"].duplicated().to_numpy()
    adata.obs["few"] = adata.obs["cell_type"].astype(object).where(first, None)
    annotator = CellPLMAnnotator.from_cellplm(labelled, "few", adata=adata)
    with pytest.raises(ValueError, match="Each of the 3 classes has one labelled cell"):
        annotator.train()


def test_the_best_choices_are_averaged(annotator):
    used, scores = annotator.selection_["used"], annotator.selection_["macro_f1"]
    assert set(used) < set(scores)
    assert min(scores[name] for name in used) >= max(scores[name] for name in scores if name not in used)


def test_a_head_is_the_mean_of_its_parts():
    rng = np.random.default_rng(0)
    labels = rng.integers(3, size=120)
    features = np.eye(3)[labels] @ rng.normal(size=(3, 6)) + rng.normal(size=(120, 6))
    folds = make_folds(labels, np.repeat(np.arange(4), 30), seed=0)
    fit = fit_head(features, {"left": np.arange(3), "right": np.arange(3, 6)}, labels, folds, 3, seed=0)
    parts = []
    for name in fit.used:
        columns = slice(0, 3) if name.startswith("left") else slice(3, 6)
        # three quarters of the cells trained each fold; half of that, on a log scale
        strength = float(name.split("=")[1]) * 0.75**0.5
        part = np.zeros((3, 6))
        part[:, columns] = fit_regression(features[:, columns], labels, 3, strength, seed=0)[0]
        parts.append(part)
    np.testing.assert_allclose(fit.weight, np.mean(parts, axis=0), atol=1e-10)


@pytest.mark.parametrize("n_groups", [1, 2, 5, 30])
def test_whole_samples_are_held_out(n_groups):
    rng = np.random.default_rng(0)
    labels, groups = rng.integers(3, size=300), rng.integers(n_groups, size=300)
    train, test = hold_out(labels, groups, 0.1, seed=0)
    np.testing.assert_array_equal(np.sort(np.concatenate([train, test])), np.arange(300))
    if n_groups > 1:
        assert not set(groups[train]) & set(groups[test])
    if n_groups in (1, 30):
        assert 20 <= test.size <= 40
    with pytest.raises(ValueError, match="held_out=1.0 must be above 0 and below 1"):
        hold_out(labels, groups, 1.0, seed=0)


@pytest.mark.parametrize("n_shared", [0, 2])
def test_a_class_that_one_sample_has_is_in_training_and_held_out(n_shared):
    """Of such classes cells are left out, of others samples."""
    rng = np.random.default_rng(0)
    groups = np.repeat(np.arange(5), 40)
    labels = np.where(rng.random(200) < 0.5, rng.integers(max(1, n_shared), size=200), n_shared + groups)
    labels = labels if n_shared else groups
    folds = make_folds(labels, groups, seed=0)
    np.testing.assert_array_equal(np.sort(np.concatenate([test for _, test in folds])), np.arange(200))
    for train, test in folds:
        np.testing.assert_array_equal(np.sort(np.concatenate([train, test])), np.arange(200))
        assert set(labels[test]) <= set(labels[train])
        shared = labels < n_shared
        assert not set(groups[train][shared[train]]) & set(groups[test][shared[test]])
    sizes = [np.bincount(labels[test], minlength=labels.max() + 1)[n_shared:] for _, test in folds]
    assert np.ptp(sizes, axis=0).max() <= 1


def test_cells_that_fit_no_class(annotator, labelled):
    strange = labelled.adata[:40].copy()
    counts = np.zeros(strange.shape, dtype=np.float32)
    counts[:, :2] = 200.0  # two genes alone, of different types
    strange.X = counts
    assert (annotator.predict(strange, unknown_rate=0.05) == "nobody knows").mean() > 0.9
    assert (annotator.predict(strange) != "nobody knows").all()
    known = annotator.predict(unknown_rate=0.05) == "nobody knows"
    assert known.mean() < 0.15
    soft = annotator.predict(strange, soft=True, unknown_rate=0.05)
    np.testing.assert_allclose(soft.sum(axis=1), 1, rtol=1e-4)
    assert soft["nobody knows"].mean() > 0.9
    # the rate is that of held-out cells
    assert (annotator.predict(unknown_rate=0.5) == "nobody knows").mean() > known.mean()


def test_a_rare_class_is_not_lost(labelled):
    adata = labelled.adata.copy()
    labels = adata.obs["cell_type"].astype(object)
    rare = np.flatnonzero(labels == "type2")
    labels.iloc[rare[6:]] = "unknown"
    adata.obs["few"] = labels
    annotator = CellPLMAnnotator.from_cellplm(labelled, "few", adata=adata)
    annotator.train()
    assert (annotator.predict(indices=rare[6:]) == "type2").mean() > 0.8


def test_save_load_and_go_on(annotator, labelled, tmp_path):
    annotator.save(str(tmp_path / "one"))
    again = CellPLMAnnotator.load(str(tmp_path / "one"), adata=labelled.adata.copy(), accelerator="cpu")
    pd.testing.assert_frame_equal(again.predict(soft=True), annotator.predict(soft=True), rtol=1e-4)
    again.train()
    np.testing.assert_array_equal(again.predict(), annotator.predict())


def test_own_format(annotator, labelled, tmp_path):
    pytest.importorskip("safetensors")
    annotator.save_pretrained(tmp_path / "own")
    new = labelled.adata.copy()
    new.uns.clear()  # as it was before it was set up
    for column in [*new.obs.columns[new.obs.columns.str.startswith("_scvi")], "label"]:
        del new.obs[column]
    again = CellPLMAnnotator.from_pretrained(tmp_path / "own", new, accelerator="cpu")
    np.testing.assert_array_equal(again.predict(), annotator.predict())


def test_labels_that_are_no_classes_are_said(annotator, labelled):
    adata = labelled.adata.copy()
    adata.obs["label"] = adata.obs["label"].where(adata.obs["cell_type"] != "type0", "macrophage")
    again = CellPLMAnnotator.from_pretrained(annotator, adata, accelerator="cpu")
    with pytest.warns(UserWarning, match='"macrophage"; it has "type0", "type1", "type2"'):
        again.train()
    assert "macrophage" in CellPLMAnnotator.from_cellplm(again, "label").classes


def test_a_set_up_without_labels_leaves_them_to_the_annotator(annotator, labelled):
    adata = labelled.adata.copy()
    CellPLM.setup_anndata(adata, batch_key="batch")
    CellPLMAnnotator.setup_anndata(adata, batch_key="batch")
    again = CellPLMAnnotator.from_pretrained(annotator, adata, accelerator="cpu")
    again.train()
    assert list(again.classes) == list(annotator.classes)


@pytest.mark.parametrize("n_added", [3, 90])
def test_added_genes_count_when_the_head_is_fitted_again(annotator, labelled, n_added):
    """There are more principal components of more genes, up to a hundred."""
    adata = labelled.adata.copy()
    counts = sp.csr_matrix(np.repeat(np.arange(adata.n_obs)[:, None] == 7, n_added, axis=1).astype(np.float32))
    further = AnnData(counts, var=pd.DataFrame(index=[f"further{n}" for n in range(n_added)]))
    further.obs_names = adata.obs_names
    wide = anndata.concat([adata, further], axis=1, merge="first")
    again = CellPLMAnnotator.from_pretrained(annotator, wide, new_genes="add", accelerator="cpu")
    rest = np.flatnonzero(np.arange(adata.n_obs) != 7)  # its library is another now
    expected = annotator.predict(soft=True).iloc[rest]
    pd.testing.assert_frame_equal(again.predict(soft=True).iloc[rest], expected, rtol=1e-3, atol=1e-4)
    again.train()
    assert again.module.annotation.loadings[-n_added:].abs().sum(1).gt(0).all()


def test_fine_tuning(labelled):
    annotator = CellPLMAnnotator.from_cellplm(labelled, "label")
    annotator.train(
        4, fine_tune=True, batch_size=48, accelerator="cpu", enable_progress_bar=False, plan_kwargs={"lr": 1e-2}
    )
    losses = annotator.history["labels_loss_train"].to_numpy(dtype=float).ravel()
    assert losses[-1] < losses[0]
    assert np.abs(annotator.get_latent_representation() - labelled.get_latent_representation()).max() > 1e-3
    hidden = labelled.adata.obs["label"].isna().to_numpy()
    right = annotator.predict()[hidden] == labelled.adata.obs["cell_type"][hidden]
    assert right.mean() > 0.9


def test_fine_tuning_without_the_usual_logger(labelled, train):
    annotator = CellPLMAnnotator.from_cellplm(labelled, "label")
    train(annotator, fine_tune=True, logger=False)
    assert annotator.history == {}
    assert annotator.predict().shape == (240,)


def test_fine_tuning_of_a_mapped_query(labelled, train):
    """The whole network learns the labels, though the query it comes from trains its codes alone."""
    new = labelled.adata.copy()
    new.obs["batch"] = "new"
    query = CellPLM.load_query_data(new, labelled, accelerator="cpu")
    annotator = CellPLMAnnotator.from_cellplm(query, "label")
    embedding = query.get_latent_representation()
    train(annotator, 1, fine_tune=True, plan_kwargs={"lr": 1e-2})
    assert np.abs(annotator.get_latent_representation() - embedding).max() > 1e-3


def test_a_mapped_query_trains_its_codes_alone(annotator, labelled, train):
    """It needs no labels, and what is said of the reference stays; labels are learned again where that is asked for."""
    new = labelled.adata.copy()
    new.obs["batch"] = "new"
    del new.obs["label"]
    query = CellPLMAnnotator.load_query_data(new, annotator, accelerator="cpu")
    before = {name: tensor.clone() for name, tensor in query.module.state_dict().items()}
    train(query, 2)
    changed = {name for name, tensor in query.module.state_dict().items() if not torch.equal(tensor, before[name])}
    assert changed == {"decoder.codes.batch.weight", "decoder.output_codes.batch.weight"}
    pd.testing.assert_frame_equal(
        query.predict(labelled.adata, soft=True), annotator.predict(soft=True), check_exact=True
    )
    for fine_tune in (False, True):
        with pytest.raises(ValueError, match="Labels of at least two of the classes"):
            query.train(fine_tune=fine_tune)
    new.obs["label"] = labelled.adata.obs["cell_type"].to_numpy()
    again = CellPLMAnnotator.load_query_data(new.copy(), annotator, accelerator="cpu")
    again.train(fine_tune=False)
    assert not torch.equal(again.module.annotation.weight, annotator.module.annotation.weight)
    assert torch.equal(again.module.embedder.weight, annotator.module.embedder.weight)


@pytest.mark.parametrize(
    "options",
    [
        {"train_size": 7},
        {"shuffle_set_split": False},
        {"datasplitter_kwargs": {"external_indexing": [[0], [1]]}},
        {"datasplitter_kwargs": {"split_by": "samples"}},
    ],
)
def test_fine_tuning_splits_by_itself(labelled, options):
    annotator = CellPLMAnnotator.from_cellplm(labelled, "label")
    with pytest.raises(ValueError, match="pass their share as held_out"):
        annotator.train(1, fine_tune=True, **options)


def test_a_network_that_is_not_trained(labelled, make_tissues, train, monkeypatch):
    """Its embeddings say nothing: it is trained from scratch, or an error says so."""
    adata = make_tissues(120)
    CellPLMAnnotator.setup_anndata(adata, labels_key="cell_type", sample_key="sample")
    annotator = CellPLMAnnotator(adata, n_hidden=16, n_layers=1, n_heads=2, n_latent=4, n_components=3)
    with pytest.raises(ValueError, match="not trained: its embeddings are random. Use .*from_cellplm.*fine_tune=True"):
        annotator.train()
    placed, lengths = [], {}
    place = PlaceMixtureComponents.place
    monkeypatch.setattr(PlaceMixtureComponents, "place", lambda *args: (placed.append(1), place(*args)))
    train(annotator, 6, fine_tune=True)
    assert placed
    assert annotator.is_trained_
    assert annotator.trainer.lightning_module.n_epochs_kl_warmup is not None  # of a trained network the weight is 1
    assert annotator.predict().shape == (120,)
    fresh = CellPLMAnnotator(adata, n_hidden=16, n_layers=1, n_heads=2, n_latent=4, n_components=3)
    of_trained = CellPLMAnnotator.from_cellplm(labelled, "cell_type", adata=make_tissues(120))
    for name, model in {"fresh": fresh, "trained": of_trained}.items():
        monkeypatch.setattr(CellPLM, "train", lambda self, n, name=name, **_: lengths.update({name: n}))
        monkeypatch.setattr(
            type(model), "trainer", type("", (), {"logger": type("", (), {"history": {}})}), raising=False
        )
        model.train(fine_tune=True)
    assert lengths["trained"] == lengths["fresh"] // 4


def test_labels_of_other_data(labelled, make_tissues):
    other = make_tissues(120, seed=3)
    for column in ("batch", "platform", "study"):
        other.obs[column] = other.obs[column].astype(str)
    annotator = CellPLMAnnotator.from_cellplm(labelled, "cell_type", adata=other)
    annotator.train()
    assert (annotator.predict(labelled.adata) == labelled.adata.obs["cell_type"]).mean() > 0.5
    assert annotator.predict().shape == (120,)


def test_mistakes(labelled, build, tissues: AnnData):
    with pytest.raises(ValueError, match="not trained: call model.train"):
        CellPLMAnnotator.from_cellplm(build(tissues), "cell_type")
    with pytest.raises(KeyError, match='labels_key="kind" is not a column'):
        CellPLMAnnotator.from_cellplm(labelled, "kind")
    one = labelled.adata.copy()
    one.obs["one"] = "same"
    with pytest.raises(ValueError, match="has 1 class beside"):
        CellPLMAnnotator.from_cellplm(labelled, "one", adata=one)
    annotator = CellPLMAnnotator.from_cellplm(labelled, "label")
    with pytest.raises(ValueError, match="not trained: call train"):
        annotator.predict()
    with pytest.raises(ValueError, match="fine_tune=True"):
        annotator.train(max_epochs=3)
    CellPLMAnnotator.setup_anndata(tissues)
    with pytest.raises(ValueError, match="needs labels"):
        CellPLMAnnotator(tissues)


@pytest.mark.parametrize("word", ["type0", "?"])
@pytest.mark.parametrize("way", ["query", "folder", "set-up"])
def test_a_query_with_another_word_for_no_label(annotator, labelled, make_tissues, tmp_path, word, way):
    new = make_tissues(60, seed=5)
    new.obs["sample"] = "new"
    new.obs["label"] = [word, "type1", "type2"] * 20
    expected = annotator.predict(new.copy(), soft=True)
    if way == "folder":
        annotator.save_pretrained(tmp_path / "model")
        query = CellPLMAnnotator.from_pretrained(tmp_path / "model", new, unlabeled_category=word)
    elif way == "query":
        query = CellPLMAnnotator.load_query_data(new, annotator, batch_key="sample", unlabeled_category=word)
    else:
        CellPLMAnnotator.setup_anndata(new, batch_key="sample", labels_key="label", unlabeled_category=word)
        query = CellPLMAnnotator.load_query_data(new, annotator)
    assert list(query.classes) == list(annotator.classes)
    assert query.unlabeled_category == "nobody knows"
    pd.testing.assert_frame_equal(query.predict(soft=True), expected, rtol=1e-4)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)  # the word is no class that would be foreign
        query.train(fine_tune=False)


def test_an_annotator_of_a_mapped_query_learns_labels(labelled, make_tissues, train):
    new = make_tissues(90, seed=5)
    new.obs["sample"] = "new"
    query = train(CellPLM.load_query_data(new, labelled, batch_key="sample"))
    annotator = CellPLMAnnotator.from_cellplm(query, "cell_type")
    annotator.train()
    assert f1_score(new.obs["cell_type"], annotator.predict(), average="macro") > 0.9


def test_classes_of_few_cells_in_many_samples():
    labels, groups = np.array([0, 0, 1, 1, *[2] * 30]), np.array([0, 1, 2, 3, *[4] * 30])
    for train, test in make_folds(labels, groups, 0):
        assert np.intersect1d(train, test).size == 0
        assert train.size + test.size == labels.size
        assert test.size


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"label_weight": -1, "fine_tune": True}, ValueError, "label_weight=-1 must be"),
        ({"label_weight": float("nan"), "fine_tune": True}, ValueError, "label_weight=nan must be"),
        ({"label_weight": "20", "fine_tune": True}, ValueError, "label_weight='20' must be"),
        ({"held_out": "a", "fine_tune": True}, ValueError, "held_out='a' must be"),
        ({"label_weight": 5.0}, ValueError, '"label_weight": the frozen backbone is not trained'),
        ({"held_out": 0.3}, ValueError, '"held_out": the frozen backbone is not trained'),
        ({"fine_tune": "yes"}, TypeError, "fine_tune='yes' must be"),
    ],
)
def test_options_of_training_that_mean_nothing(labelled, options, error, message):
    annotator = CellPLMAnnotator.from_cellplm(labelled, "label")
    with pytest.raises(error, match=message):
        annotator.train(**options)


def test_a_head_does_not_outlive_its_network(labelled, train):
    annotator = CellPLMAnnotator.from_cellplm(labelled, "label")
    annotator.train()
    with pytest.raises(RuntimeError, match="diverged"):
        train(annotator, max_epochs=4, fine_tune=True, plan_kwargs={"lr": 1e9})
    with pytest.raises(ValueError, match="not trained"):
        annotator.predict()


def test_cells_that_are_all_the_same(make_tissues, build, train):
    adata = make_tissues(60)
    adata.X = sp.csr_matrix(np.tile(adata.X[:1].toarray(), (60, 1)))
    annotator = CellPLMAnnotator.from_cellplm(train(build(adata)), "cell_type")
    annotator.train()
    assert np.isfinite(annotator.predict(soft=True).to_numpy()).all()


def test_where_labels_are_looked_for(labelled):
    annotator = CellPLMAnnotator.from_cellplm(labelled, "label")
    column = labelled.adata.obs.pop("label")
    with pytest.raises(ValueError, match=r'\("type0", "type1", "type2"\) are needed .* obs\["label"\] has none'):
        annotator.train()
    labelled.adata.obs["label"] = column
    with pytest.raises(TypeError, match="model is of type str"):
        CellPLMAnnotator.from_cellplm("folder", "label")
    with pytest.raises(TypeError, match="labels_key=.* must be one name"):
        CellPLMAnnotator.from_cellplm(labelled, ["label"])
