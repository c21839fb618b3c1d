"""Prediction of perturbations: recovery of a known truth, no leakage, and what is said of inputs that cannot work."""

from __future__ import annotations

import warnings

import numpy as np
import pandas as pd
import pytest
import scvi
import torch
from anndata import AnnData

from cellplm_scvi import CellPLM
from cellplm_scvi.data import synthetic_tissues, true_shares
from cellplm_scvi.data._loader import CellDataset, MinibatchRows, SpatialInputs
from cellplm_scvi.data._perturbation import are_controls, elements_of, observed_changes, pair_with_controls
from cellplm_scvi.data._table import CellTable
from cellplm_scvi.model import _perturbation_training
from cellplm_scvi.model._perturbation_fit import common_change, fit_process, trusted

QUIET = {"accelerator": "cpu", "devices": 1, "enable_progress_bar": False}
SIZES = {"n_hidden": 16, "n_layers": 1, "n_heads": 2, "n_latent": 4, "n_components": 2}
KEYS = {"batch_key": "batch", "sample_key": "sample", "perturbation_key": "perturbation"}


@pytest.fixture(scope="module")
def whole() -> AnnData:
    """Five perturbed genes and four pairs of them in cells of two types."""
    return synthetic_tissues(
        900,
        40,
        2,
        n_types=2,
        rare_share=0.3,
        n_perturbations=5,
        n_pairs=4,
        perturbed_share=0.7,
        niche_effect=0.3,
        mean_counts=800,
    )


@pytest.fixture(scope="module")
def pair(whole) -> str:
    """A pair that no training cell has."""
    return next(name for name in whole.varm["perturbation_effects"] if "+" in name)


@pytest.fixture(scope="module")
def adata(whole, pair) -> AnnData:
    return whole[(whole.obs["perturbation"] != pair).to_numpy()].copy()


def fit(adata: AnnData, keys: dict | None = None, **kwargs) -> CellPLM:
    CellPLM.setup_anndata(adata, **(KEYS | (keys or {})))
    model = CellPLM(adata, **SIZES)  # type: ignore[arg-type]
    model.train(2, batch_size=128, train_size=1.0, **QUIET)
    model.train_perturbation(**({"n_steps": 3, "progress_bar": False} | kwargs))
    return model


@pytest.fixture(scope="module")
def model(adata) -> CellPLM:
    return fit(adata)


def true_change(adata: AnnData, perturbation: str) -> pd.Series:
    """Log change of the mean shares of control cells, had they been perturbed."""
    controls = adata[(adata.obs["perturbation"] == "control").to_numpy()].copy()
    before = true_shares(controls).mean(axis="index")
    controls.obs["perturbation"] = perturbation
    return (true_shares(controls).mean(axis="index") / before).map(np.log)


def controls(adata: AnnData) -> np.ndarray:
    return (adata.obs["perturbation"] == "control").to_numpy()


def test_a_pair_that_was_not_seen_is_the_sum_of_its_genes(model, whole, adata, pair):
    truth = true_change(whole, pair)
    expression = model.predict_perturbation(pair)
    assert list(expression.index) == list(adata.obs_names[controls(adata)])
    assert list(expression.columns) == list(adata.var_names)
    np.testing.assert_allclose(expression.sum(1), 1, rtol=1e-4)
    effect = model.get_perturbation_effect(pair).loc[pair]
    found = effect["lfc_mean"] * np.log(2)
    assert np.corrcoef(found, truth)[0, 1] > 0.8
    assert np.abs(found - truth).mean() < 0.5 * np.abs(truth).mean()
    # the truth is within the uncertainty that is claimed
    assert (np.abs(found - truth) < 3 * effect["lfc_std"] * np.log(2) + 0.05).mean() > 0.9


def test_the_effect_is_that_of_the_predicted_expression(model, adata, pair):
    before = model.get_normalized_expression(adata[controls(adata)].copy()).mean(0)
    change = np.log2(model.predict_perturbation(pair).mean(0) / before)
    np.testing.assert_allclose(model.get_perturbation_effect(pair).loc[pair, "lfc_mean"], change, atol=2e-4)


def test_a_gene_never_perturbed_is_expected_to_change_itself_as_others_did(adata):
    held_out = next(name for name in adata.uns["perturbed_genes"] if "+" not in name)
    rest = ~adata.obs["perturbation"].astype(str).str.contains(rf"\b{held_out}\b")
    model = fit(adata[rest.to_numpy()].copy())
    truth = true_change(adata, held_out)
    found = model.get_perturbation_effect(held_out).loc[held_out, "lfc_mean"] * np.log(2)
    assert found.idxmin() == held_out
    assert np.abs(found - truth).mean() < np.abs(truth).mean()


def test_control_cells_alone_are_the_input(model, whole, pair):
    """With the counts of perturbed cells replaced, the same model predicts the same from the control cells."""
    perturbed = ~controls(model.adata)
    other = model.adata.copy()
    x = other.X.toarray()
    x[perturbed] = np.random.default_rng(0).poisson(2.0, x[perturbed].shape)
    other.X = x
    for name in (pair, "gene3"):
        pd.testing.assert_frame_equal(model.predict_perturbation(name, other), model.predict_perturbation(name))
    table = CellTable.from_manager(model.adata_manager)
    names = model.adata.obs["perturbation"].to_numpy().astype(str)
    pairs = pair_with_controls(table, names, "control")
    assert all((names[rows] == "control").all() for rows in pairs.controls)
    assert all((names[rows] != "control").all() for rows in pairs.perturbed)


def test_nothing_changes_where_nothing_was_found(adata):
    """Labels that mean nothing: the prediction stays near no change, closer than the observed change does."""
    null = adata[controls(adata)].copy()
    null.obs["perturbation"] = np.random.default_rng(0).choice(
        ["control", "A", "B", "C"], null.n_obs, p=[0.4, 0.2, 0.2, 0.2]
    )
    model = fit(null)
    table = CellTable.from_manager(model.adata_manager)
    pairs = pair_with_controls(table, null.obs["perturbation"].to_numpy().astype(str), "control")
    observed = np.abs(observed_changes(table, pairs).change).mean()
    found = model.get_perturbation_effect()["lfc_mean"] * np.log(2)
    assert np.abs(found).mean() < 0.25 * observed


def test_few_controls_beside_many_perturbed_cells_make_no_effect():
    """Half a count in 6 control cells is as much as 50 counts in 594 perturbed ones."""
    rng = np.random.default_rng(0)
    null = AnnData(rng.poisson(rng.uniform(0.02, 0.5, 200), (600, 200)).astype(np.float32))
    null.obs["perturbation"] = np.where(np.arange(600) < 6, "control", "A")
    CellPLM.setup_anndata(null, perturbation_key="perturbation")
    table = CellTable.from_manager(CellPLM(null, **SIZES).adata_manager)  # type: ignore[arg-type]
    pairs = pair_with_controls(table, null.obs["perturbation"].to_numpy().astype(str), "control")
    found = observed_changes(table, pairs)
    assert (found.change**2 / found.variance).mean() < 1


def test_before_anything_is_learned_no_change_is_predicted_exactly(model, adata):
    copy = fit(adata)
    for name in ("weights", "common", "expected", "trust"):
        getattr(copy.module.perturbation, name).zero_()
    assert (copy.get_perturbation_effect(["gene3", *adata.uns["perturbed_genes"]])["lfc_mean"] == 0).all()


@pytest.mark.parametrize("mark", ["learned", "constant", "none"])
def test_marks_reach_the_hidden_states_of_marked_samples_alone(adata, mark):
    model = fit(adata, mark=mark)
    module = model.module
    rows = np.flatnonzero(controls(adata))[:40]
    dataset = CellDataset(CellTable.from_manager(model.adata_manager), SpatialInputs(), None)
    tensors = dataset[MinibatchRows(rows, np.array([20, 20]), np.ones(40, dtype=bool))]
    with torch.no_grad():
        before = module.hidden(tensors)
        after = module.hidden(tensors | {"marked": torch.tensor([[5], [-2]])})
        other = module.hidden(tensors | {"marked": torch.tensor([[6], [-2]])})
    assert not torch.allclose(before[:20], after[:20], atol=1e-3)
    torch.testing.assert_close(before[20:], after[20:])
    assert torch.allclose(other, after) == (mark == "none")
    if mark == "constant":  # what the gene's own count was does not matter
        tensors["values"][tensors["genes"] == 5] *= 3
        library = tensors["library"].clone()
        with torch.no_grad():
            again = module.hidden(tensors | {"library": library, "marked": torch.tensor([[5], [-2]])})
        torch.testing.assert_close(again[:20], after[:20], rtol=1e-3, atol=1e-3)


def test_a_stimulus_may_change_each_type_differently(whole):
    adata = whole[controls(whole)].copy()
    rng = np.random.default_rng(0)
    stimulated = rng.random(adata.n_obs) < 0.5
    first = (adata.obs["cell_type"] == "type0").to_numpy()
    x = adata.X.toarray()
    x[:, 0], x[:, 1] = rng.poisson(5, adata.n_obs), rng.poisson(5, adata.n_obs)
    x[np.ix_(stimulated, [0])] *= 4
    x[np.ix_(stimulated & first, [1])] *= 4
    adata.X = x
    adata.obs["condition"] = np.where(stimulated, "IFNB", "control")
    model = fit(adata, {"perturbation_key": "condition", "labels_key": "cell_type"})
    rows = [np.flatnonzero(~stimulated & kind) for kind in (first, ~first)]
    effects = [model.get_perturbation_effect("IFNB", indices=r).loc["IFNB", "lfc_mean"].to_numpy() for r in rows]
    assert min(e[0] for e in effects) > 1
    assert effects[0][1] > effects[1][1]


def test_saved_loaded_and_published_models_predict_the_same(model, adata, pair, tmp_path):
    expected = model.predict_perturbation(pair, gene_list=["gene1", "gene7"])
    model.save(str(tmp_path / "model"))
    loaded = CellPLM.load(str(tmp_path / "model"), adata=adata.copy(), accelerator="cpu")
    pd.testing.assert_frame_equal(loaded.predict_perturbation(pair, gene_list=["gene1", "gene7"]), expected)
    model.save_pretrained(tmp_path / "folder")
    found = CellPLM.from_pretrained(tmp_path / "folder", adata.copy())
    pd.testing.assert_frame_equal(found.predict_perturbation(pair, gene_list=["gene1", "gene7"]), expected)


def test_training_leaves_the_rest_of_the_model_and_can_be_repeated(adata):
    model = fit(adata)
    before = model.get_latent_representation()
    first = model.get_perturbation_effect()
    model.train_perturbation(n_steps=3, progress_bar=False)
    np.testing.assert_array_equal(model.get_latent_representation(), before)
    pd.testing.assert_frame_equal(model.get_perturbation_effect(), first)
    model.train(1, batch_size=128, **QUIET)  # no parameter of the marks stands in the way


@pytest.mark.parametrize(
    "stop", [pytest.param(RuntimeError, id="failed"), pytest.param(KeyboardInterrupt, id="stopped")]
)
def test_training_that_does_not_end_leaves_what_was_there(adata, clone, monkeypatch, stop):
    def stopped(*args):
        raise stop

    model = fit(adata, n_steps=1)
    expected = model.get_perturbation_effect()
    never = clone(model)
    never.module.perturbation = never._perturbation = never.init_params_["non_kwargs"]["perturbation"] = None
    monkeypatch.setattr(_perturbation_training, "fit_process", stopped)
    for unfinished in (model, never):
        with pytest.raises(stop):
            unfinished.train_perturbation("none", n_steps=1, progress_bar=False)
    for found in (model, clone(model)):
        pd.testing.assert_frame_equal(found.get_perturbation_effect(), expected)
    for found in (never, clone(never)):
        with pytest.raises(ValueError, match="not trained: call train_perturbation"):
            found.predict_perturbation("gene1")


@pytest.mark.parametrize("n_steps", [1, 10, 11])
def test_marks_learn_in_any_number_of_steps(adata, n_steps):
    marks = fit(adata, n_steps=n_steps).module.perturbation
    assert marks is not None
    assert (marks.change.weight != 0).any()


def test_rows_and_units_are_those_asked_for(model, adata, pair):
    rows = np.flatnonzero(controls(adata))[[5, 2, 2]]
    some = model.predict_perturbation(pair, indices=rows, library_size=100)
    assert list(some.index) == list(adata.obs_names[rows])
    whole = model.predict_perturbation(pair)
    np.testing.assert_allclose(some, whole.loc[adata.obs_names[rows]] * 100, rtol=1e-4)
    new = adata[rows[:2]].copy()
    del new.obs["perturbation"]
    assert model.predict_perturbation(pair, new).shape == (2, adata.n_vars)


def test_errors_say_what_is_missing(model, adata, pair):
    with pytest.raises(ValueError, match="neither a perturbation of the training data .* nor a gene"):
        model.predict_perturbation("stimulus")
    with pytest.warns(UserWarning, match="not measured"):
        model.predict_perturbation("TP53")
    with pytest.raises(ValueError, match="not the name of a perturbation"):
        model.predict_perturbation("gene1+")
    with pytest.raises(ValueError, match="get_normalized_expression"):
        model.predict_perturbation("control")
    with pytest.raises(ValueError, match="perturbed"):
        model.predict_perturbation(pair, indices=np.flatnonzero(~controls(adata))[:3])
    with pytest.raises(ValueError, match="no control cell"):
        model.predict_perturbation(pair, adata[~controls(adata)].copy())
    with pytest.raises(ValueError, match='mark="bold"'):
        model.train_perturbation(mark="bold")
    with pytest.raises(ValueError, match="n_steps=0 must be a positive whole number"):
        model.train_perturbation(n_steps=0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        pytest.param({"perturbation_key": None}, "No perturbations are registered", id="no key"),
        pytest.param({"control_category": "mock"}, 'no cell of control_category="mock"', id="no control"),
        pytest.param({"perturbation_key": "same"}, "there is no perturbation", id="only control"),
    ],
)
def test_data_without_pairs_are_refused(adata, change, message):
    copy = adata[:60].copy()
    copy.obs["same"] = "control"
    CellPLM.setup_anndata(copy, **(KEYS | change))
    model = CellPLM(copy, **SIZES)
    with pytest.raises(ValueError, match="not trained: call train"):
        model.train_perturbation()
    with pytest.raises(ValueError, match="call train_perturbation"):
        model.predict_perturbation("gene1")
    model.is_trained_ = True
    with pytest.raises(ValueError, match=message):
        model.train_perturbation()


def test_names_of_pairs_have_no_order():
    assert elements_of("B + A", "ctrl") == elements_of("A+B", "ctrl") == ("A", "B")


def test_the_control_is_nothing_beside_a_perturbation():
    assert elements_of("A+ctrl", "ctrl") == elements_of("ctrl+A", "ctrl") == ("A",)
    assert elements_of("ctrl", "ctrl") == elements_of("ctrl+ctrl", "ctrl") == ()
    assert are_controls(np.array(["A+ctrl", "ctrl+ctrl", "CD4+", "ctrl"]), "ctrl").tolist() == [
        False,
        True,
        False,
        True,
    ]


def test_perturbations_named_with_the_control_are_the_same(adata):
    """As in "A+ctrl" of some public data sets."""
    copy = adata.copy()
    names = copy.obs["perturbation"].astype(str)
    copy.obs["perturbation"] = [name if "+" in name else f"{name}+control" for name in names]
    fitted = []
    for data in (adata, copy):
        scvi.settings.seed = 0
        fitted.append(fit(data))
    one, other = fitted
    assert one._perturbation == other._perturbation
    pd.testing.assert_frame_equal(one.get_perturbation_effect(), other.get_perturbation_effect())
    name = one._perturbation["elements"][0]
    pd.testing.assert_frame_equal(other.predict_perturbation(f"control+{name}"), one.predict_perturbation(name))


def test_pairs_alone_are_enough(adata):
    """No element was ever perturbed by itself."""
    names = adata.obs["perturbation"].astype(str)
    model = fit(adata[((names == "control") | names.str.contains("+", regex=False)).to_numpy()].copy())
    assert len(model._perturbation["elements"]) >= 4
    assert np.isfinite(model.get_perturbation_effect()).all(axis=None)


def test_a_missing_perturbation_is_no_control(adata, model):
    copy = adata.copy()
    copy.obs["perturbation"] = copy.obs["perturbation"].astype(object)
    copy.obs.iloc[:2, copy.obs.columns.get_loc("perturbation")] = [None, np.nan]
    with pytest.raises(ValueError, match=r'obs\["perturbation"\] has 2 missing values .*Write "control"'):
        CellPLM.setup_anndata(copy, **KEYS)
    copy.uns.clear()
    with pytest.raises(ValueError, match="2 missing values"):
        model.predict_perturbation("gene1", copy)


def test_perturbations_that_were_mended_are_learned(adata):
    copy = adata.copy()
    model = fit(copy)
    name = model._perturbation["elements"][0]
    copy.obs["perturbation"] = copy.obs["perturbation"].astype(str).str.replace(rf"\b{name}\b", "mended", regex=True)
    model.train_perturbation(n_steps=1, progress_bar=False)
    assert "mended" in model._perturbation["elements"]
    assert name not in model._perturbation["elements"]


def test_names_of_drugs_are_not_taken_for_genes_of_mice(adata):
    drugs = {
        name: f"Drug{'abcdefghi'[n]}" for n, name in enumerate(adata.obs["perturbation"].unique()) if name != "control"
    }
    adata = adata.copy()
    adata.obs["perturbation"] = [drugs.get(name, name) for name in adata.obs["perturbation"]]
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*mouse")
        model = fit(adata, n_steps=1)
        model.predict_perturbation(next(iter(drugs.values())))


def test_another_name_of_a_perturbed_gene_is_that_gene(adata):
    copy = adata.copy()
    first = next(name for name in copy.uns["perturbed_genes"] if "+" not in name)
    rename = {first: "STAT1"}
    copy.var_names = [rename.get(name, name) for name in copy.var_names]
    copy.obs["perturbation"] = copy.obs["perturbation"].astype(str).str.replace(rf"\b{first}\b", "STAT1", regex=True)
    model = fit(copy)
    effect = model.get_perturbation_effect(["STAT1", "ENSG00000115415", "stat1"])
    for name in ("ENSG00000115415", "stat1"):
        pd.testing.assert_frame_equal(effect.loc[name], effect.loc["STAT1"])
    assert effect.loc["STAT1", "lfc_mean"].abs().max() > 0.1


def test_perturbations_that_are_numbers(adata):
    names = ["control", *(name for name in adata.obs["perturbation"].unique() if "+" not in name and name != "control")]
    copy = adata[adata.obs["perturbation"].isin(names).to_numpy()].copy()
    copy.obs["perturbation"] = [names.index(name) for name in copy.obs["perturbation"]]
    model = fit(copy, {"control_category": "0"})
    effect = model.get_perturbation_effect()
    assert sorted(effect.index.unique("perturbation")) == [str(i) for i in range(1, len(names))]
    pd.testing.assert_frame_equal(model.get_perturbation_effect(1).loc[1], effect.loc["1"])
    pd.testing.assert_frame_equal(model.get_perturbation_effect([1.0, "2"]).loc["2"], effect.loc["2"])
    pd.testing.assert_frame_equal(model.predict_perturbation(1), model.predict_perturbation("1"))


def test_nothing_to_predict_or_to_predict_from(model):
    with pytest.raises(ValueError, match="perturbations names none"):
        model.get_perturbation_effect([])
    with pytest.raises(ValueError, match="indices asks for no cell"):
        model.get_perturbation_effect(indices=[])


def test_genes_that_no_control_cell_measured_have_no_effect(adata):
    copy = adata.copy()
    copy.obs["study"] = np.where(np.arange(copy.n_obs) % 2 == 0, "whole", "panel")
    copy.varm["measured"] = pd.DataFrame({"whole": True, "panel": np.arange(copy.n_vars) < 30}, index=copy.var_names)
    x = copy.X.toarray()
    x[1::2, 30:] = 0
    copy.X = x
    model = fit(copy, {"dataset_key": "study", "measured_genes_key": "measured"})
    name = model._perturbation["elements"][0]
    panel = np.flatnonzero(controls(copy) & (copy.obs["study"] == "panel").to_numpy())
    effect = model.get_perturbation_effect(name, indices=panel)
    assert effect.iloc[30:].isna().all(axis=None)
    assert effect.iloc[:30].notna().all(axis=None)
    assert model.get_perturbation_effect(name).notna().all(axis=None)


def test_shrinkage_beats_the_observation_where_few_genes_change():
    rng = np.random.default_rng(0)
    truth = np.where(rng.random((3, 200)) < 0.1, rng.normal(0, 1, (3, 200)), 0.0)
    membership = np.array([[1, 0, 0], [0, 1, 0], [0, 0, 1], [1, 1, 0]], dtype=bool)
    variance = np.full((4, 200), 0.05)
    observed = membership @ truth + rng.normal(0, variance**0.5)
    found = fit_process(observed, variance, membership, np.zeros((4, 2)))
    estimate = np.vstack([found.weights[i] + found.settings.attenuation * (i < 2) * found.weights[3] for i in range(3)])
    error = ((estimate - truth) ** 2).mean()
    assert error < 0.4 * ((observed[:3] - truth) ** 2).mean()
    assert 0.5 * error < found.variance.mean() < 3 * error


@pytest.mark.parametrize("shared", [True, False])
def test_what_perturbations_have_in_common_is_expected_of_a_further_one(shared):
    rng = np.random.default_rng(0)
    own = np.where(rng.random((12, 400)) < 0.1, rng.normal(0, 1, (12, 400)), 0.0)
    together = np.where(np.arange(400) < 40, 0.4, 0.0) * shared
    variance = rng.uniform(0.01, 0.1, own.shape)
    observed = own + together + rng.normal(size=own.shape) * np.sqrt(variance)
    found = common_change(observed, variance)
    if shared:
        assert found[:40].mean() > 0.25
        assert ((found - together) ** 2).mean() < ((observed.mean(0) - together) ** 2).mean()
    assert np.abs(found[40:]).mean() < 0.3 * np.abs(observed.mean(0)[40:]).mean()
    # nothing is known of what was not measured
    assert (common_change(np.zeros_like(observed), np.full_like(variance, 1e6)) == 0).all()


def test_predictions_that_do_not_generalise_are_not_trusted():
    rng = np.random.default_rng(0)
    truth = rng.normal(0, 1, (8, 100))
    good, bad = truth + rng.normal(0, 0.3, truth.shape), rng.normal(0, 1, truth.shape)
    trust = trusted(truth, np.full_like(truth, 0.01), np.stack([good, bad]), [(0.0, 1.0)] * 2)
    assert trust[0] > 0.7
    assert trust[1] < 0.1


def test_another_word_for_controls(model, adata):
    new = adata.copy()
    new.obs["perturbation"] = new.obs["perturbation"].astype(str).replace("control", "ctrl")
    expected = model.predict_perturbation("gene1", adata.copy())
    CellPLM.setup_anndata(new, **(KEYS | {"control_category": "ctrl"}))
    pd.testing.assert_frame_equal(model.predict_perturbation("gene1", new), expected, rtol=1e-4)
    with pytest.warns(UserWarning, match='no cell of control_category="nobody" \\(it has'):
        CellPLM.setup_anndata(new, **(KEYS | {"control_category": "nobody"}))


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"batch_size": 0}, ValueError, "batch_size=0 must"),
        ({"batch_size": "a"}, ValueError, "batch_size='a' must"),
        ({"library_size": -1}, ValueError, "library_size=-1 must"),
        ({"library_size": None}, ValueError, "library_size=None must"),
        ({"perturbation": float("nan")}, TypeError, "perturbation=nan is not the name"),
        ({"perturbation": ["gene1", "gene2"]}, TypeError, "get_perturbation_effect takes a list"),
    ],
)
def test_arguments_that_mean_nothing(model, options, error, message):
    with pytest.raises(error, match=message):
        model.predict_perturbation(**({"perturbation": "gene1"} | options))


def test_the_own_library_of_a_perturbed_cell(model, adata):
    name = model._perturbation["elements"][0]
    shares, counts = model.predict_perturbation(name), model.predict_perturbation(name, library_size="latent")
    library = pd.Series(model.get_latent_library_size(), index=adata.obs_names)[shares.index]
    np.testing.assert_allclose(counts, shares.mul(library, axis=0), rtol=1e-4)


def test_learning_rates_that_teach_nothing(adata):
    with pytest.raises(ValueError, match="lr=0 must be a positive number"):
        fit(adata.copy(), lr=0)
    with pytest.raises(RuntimeError, match=r"diverged with lr=1e\+30"):
        fit(adata.copy(), lr=1e30)
