"""Fits an annotation head to features: what to use and how strongly to regularise, by cross-validation over samples."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from itertools import product
from numbers import Real

import numpy as np
from scipy.optimize import minimize_scalar
from scipy.spatial.distance import cdist
from scipy.special import log_softmax
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import f1_score
from sklearn.model_selection import StratifiedGroupKFold, StratifiedKFold, train_test_split

Folds = list[tuple[np.ndarray, np.ndarray]]

#: inverse strengths of the L2 penalty to try
STRENGTHS = (0.01, 0.03, 0.1, 0.3)
MAX_FOLDS = 4
#: heads that are averaged
N_BEST = 4
#: logit of a class that the training cells of a fold lack
ABSENT = -30.0
#: most cells of a class in a fit: further ones cost time and add little
MAX_PER_CLASS = 2000


@dataclass
class HeadFit:
    """A fitted head.

    Parameters
    ----------
    weight, bias
        (n_classes, n_features) and (n_classes,), the mean of the heads that did best.
    temperature
        Divides the logits.
    used
        Their names, the best one first.
    scores
        Held-out macro-F1 of each choice.
    """

    weight: np.ndarray
    bias: np.ndarray
    temperature: float
    used: list[str]
    scores: dict[str, float]


def make_folds(labels: np.ndarray, groups: np.ndarray, seed: int, most: int = MAX_FOLDS) -> Folds:
    """Folds that leave whole samples out, and random cells of classes that one sample has; labels and groups (n_cells,)."""
    sizes = _class_sizes(labels)
    pairs = np.unique(np.stack([labels, groups], 1), axis=0)
    shared = np.bincount(pairs[:, 0])[labels] > 1
    n_groups = np.unique(groups[shared]).size
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # rare classes are not in every fold
        if not shared.any():
            n_folds = min(most, int(sizes.max()), max(2, int(sizes.min())))
            return list(StratifiedKFold(n_folds, shuffle=True, random_state=seed).split(labels, labels))
        n_folds = min(most, n_groups, int(_class_sizes(labels[shared]).max()))
        splitter = StratifiedGroupKFold(n_folds, shuffle=True, random_state=seed)
        folds = list(splitter.split(labels[shared], labels[shared], groups[shared]))
    if shared.all():
        return folds
    fold = np.empty(labels.size, dtype=np.int64)
    rows = np.flatnonzero(shared)
    for n, (_, test) in enumerate(folds):
        fold[rows[test]] = n
    # one class after the other, so that each is dealt out evenly
    order = np.random.default_rng(seed).permutation(np.flatnonzero(~shared))
    order = order[np.argsort(labels[order], kind="stable")]
    fold[order] = np.arange(order.size) % len(folds)
    return [(np.flatnonzero(fold != n), np.flatnonzero(fold == n)) for n in range(len(folds))]


def hold_out(labels: np.ndarray, groups: np.ndarray, share: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Training and held-out rows: about ``share`` of the cells, in whole samples if there are several."""
    if not isinstance(share, Real) or not 0 < share < 1:
        raise ValueError(f"held_out={share!r} must be above 0 and below 1.")
    if np.unique(groups).size > 1:
        return make_folds(labels, groups, seed, max(2, round(1 / share)))[0]
    _class_sizes(labels)
    train, test = train_test_split(np.arange(labels.size), test_size=share, random_state=seed)
    return np.sort(train), np.sort(test)


def _class_sizes(labels: np.ndarray) -> np.ndarray:
    """Cells of each class that has any; raise if there is none to leave out."""
    sizes = np.bincount(labels)[np.unique(labels)]
    if sizes.max() < 2:
        raise ValueError(
            f"Each of the {sizes.size} classes has one labelled cell. Cells are left out to choose and calibrate the head: "
            "label at least two of some class."
        )
    return sizes


def fit_regression(
    x: np.ndarray, labels: np.ndarray, n_classes: int, strength: float, seed: int
) -> tuple[np.ndarray, np.ndarray]:
    """Multinomial logistic regression in which a class weighs as much as the square root of its number of cells.

    That is halfway between cells of equal weight, which neglects rare classes, and classes of equal weight, which finds
    them where they are not.

    Returns
    -------
    Weights (n_classes, n_features) and biases (n_classes,).
    """
    rows, total = _at_most(labels, seed), np.bincount(labels)
    x, labels = x[rows], labels[rows]
    weight, bias = np.zeros((n_classes, x.shape[1])), np.full(n_classes, ABSENT)
    present = np.unique(labels)
    if present.size == 1:
        bias[present] = 0.0
        return weight, bias
    # those left out above count too
    weight_of_cell = (total[labels] ** 0.5) / np.bincount(labels)[labels]
    weight_of_cell /= weight_of_cell.mean()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        model = LogisticRegression(C=strength, max_iter=300, tol=1e-3)
        found = model.fit(x, labels, sample_weight=weight_of_cell)
    if present.size == 2:  # scikit-learn gives one row for two classes
        weight[present] = np.stack([-found.coef_[0], found.coef_[0]]) / 2
        bias[present] = np.array([-found.intercept_[0], found.intercept_[0]]) / 2
    else:
        weight[present], bias[present] = found.coef_, found.intercept_
    return weight, bias


def _at_most(labels: np.ndarray, seed: int) -> np.ndarray:
    """Rows with at most ``MAX_PER_CLASS`` of each label."""
    order = np.random.default_rng(seed).permutation(labels.size)
    nth = np.zeros(labels.size, dtype=np.int64)
    for label in np.unique(labels):
        rows = order[labels[order] == label]
        nth[rows] = np.arange(rows.size)
    return np.flatnonzero(nth < MAX_PER_CLASS)


def fit_temperature(logits: np.ndarray, labels: np.ndarray) -> float:
    """Temperature that makes held-out labels likeliest; logits (n_cells, n_classes)."""
    rows = np.arange(labels.size)
    seen = logits[rows, labels] > ABSENT / 2  # a class that a fold could not learn says nothing of calibration
    if not seen.any():
        return 1.0
    logits, labels, rows = logits[seen], labels[seen], np.arange(int(seen.sum()))

    def loss(log_temperature: float) -> float:
        return -float(log_softmax(logits / np.exp(log_temperature), axis=1)[rows, labels].mean())

    return float(np.exp(minimize_scalar(loss, bounds=(-2.0, 3.0), method="bounded").x))


def fit_head(
    features: np.ndarray, choices: dict[str, np.ndarray], labels: np.ndarray, folds: Folds, n_classes: int, seed: int
) -> HeadFit:
    """Rank features and penalties by held-out macro-F1, fit the best to all cells, and calibrate on held-out logits.

    The logits of the ``N_BEST`` first are averaged, which is again linear in the features: held-out scores differ by
    less than they are uncertain, and an average errs less than a choice.

    Parameters
    ----------
    features
        Standardised, (n_cells, n_features).
    choices
        Columns of each set of features to try.
    labels
        (n_cells,), codes.
    folds
        Training and held-out rows.
    """
    held = np.concatenate([test for _, test in folds])
    candidates = []
    for (name, columns), strength in product(choices.items(), STRENGTHS):
        logits = np.concatenate(
            [
                _predict(
                    features[np.ix_(test, columns)],
                    fit_regression(features[np.ix_(train, columns)], labels[train], n_classes, strength, seed),
                )
                for train, test in folds
            ]
        )
        score = f1_score(labels[held], logits.argmax(1), average="macro")
        # few held-out cells tie often: then the likelihood of their labels decides
        likelihood = float(log_softmax(logits, axis=1)[np.arange(held.size), labels[held]].mean())
        candidates.append((round(float(score), 4), likelihood, name, strength, logits))
    candidates.sort(key=lambda candidate: candidate[:2], reverse=True)
    best = candidates[:N_BEST]
    # A fit sums over its cells, so that more of them weaken the penalty. Half of that (on a log scale) is undone: all of
    # it makes the head as cautious as those of the folds, nothing of it bolder than the temperature was fitted for.
    share = float(np.mean([train.size for train, _ in folds])) / labels.size
    weight, bias = np.zeros((n_classes, features.shape[1])), np.zeros(n_classes)
    for _, _, name, strength, _ in best:
        fit = fit_regression(features[:, choices[name]], labels, n_classes, strength * share**0.5, seed)
        weight[:, choices[name]] += fit[0] / len(best)
        bias += fit[1] / len(best)
    temperature = fit_temperature(np.mean([logits for *_, logits in best], axis=0), labels[held])
    scores = {_title(name, strength): score for score, _, name, strength, _ in candidates}
    return HeadFit(weight, bias, temperature, [_title(name, strength) for _, _, name, strength, _ in best], scores)


def _title(name: str, strength: float) -> str:
    return f"{name}, C={strength}"


def _predict(x: np.ndarray, fit: tuple[np.ndarray, np.ndarray]) -> np.ndarray:
    return x @ fit[0].T + fit[1]


def held_out_distances(features: np.ndarray, labels: np.ndarray, folds: Folds, n_classes: int) -> np.ndarray:
    """Distance of each held-out cell from the nearest class of its fold's training cells."""
    distances = []
    for train, test in folds:
        means, whitening = within_class_whitening(features[train], labels[train], n_classes)
        distances.append(cdist(features[test] @ whitening, means @ whitening).min(1))
    return np.concatenate(distances)


def within_class_whitening(
    features: np.ndarray, labels: np.ndarray, n_classes: int, shrinkage: float = 0.1
) -> tuple[np.ndarray, np.ndarray]:
    """Means of classes, (n_classes, n_features), and the matrix that makes the covariance within classes unity.

    A class without a cell gets a mean that no cell is near.
    """
    means = np.full((n_classes, features.shape[1]), 1e6)
    for label in np.unique(labels):
        means[label] = features[labels == label].mean(0)
    rest = features - means[labels]
    covariance = rest.T @ rest / max(1, features.shape[0])
    covariance = (1 - shrinkage) * covariance + shrinkage * np.trace(covariance) / len(covariance) * np.eye(
        len(covariance)
    )
    values, vectors = np.linalg.eigh(covariance)
    return means, vectors / np.sqrt(np.maximum(values, 1e-8))
