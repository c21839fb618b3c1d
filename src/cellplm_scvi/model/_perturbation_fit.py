"""Adaptive shrinkage of observed changes: a Gaussian process over perturbations and contexts, a gene at a time.

The prior variance of a gene's change is one of a grid, zero included, with weights learned for each group of perturbations
that share elements (adaptive shrinkage, Stephens 2017): where nothing changes, no change is predicted, and strong changes
are kept. Pairs are sums of their elements' changes, attenuated, and an interaction; changes differ between contexts as a
linear function of their latent codes. How much, is chosen by the marginal likelihood.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
from scipy.sparse.csgraph import connected_components

#: prior standard deviations of a log change
SCALES = np.concatenate([[0.0], np.geomspace(0.03, 2.0, 8)])
#: weight of "no change", in genes, beside one for each other scale
NULL_WEIGHT = 1.0
#: genes, those with the most signal, whose likelihood the settings are chosen by
N_CHOOSING = 200
#: entries of a chunk of matrices
CHUNK_ENTRIES = 1 << 22
GRIDS = {
    "slope": (0.0, 0.1, 0.3, 1.0),
    "context": (0.03, 0.1, 0.3),
    "attenuation": (1.0, 0.8, 0.6),
    "interaction": (0.03, 0.1, 0.3),
}


@dataclass(frozen=True)
class Settings:
    """Of the kernel, relative to the variance that all contexts and perturbations share.

    Parameters
    ----------
    slope
        Variance along the latent codes of contexts, which have unit mean square.
    context
        Variance that each set of perturbed cells has to itself.
    attenuation
        Share of each element's change that remains in a perturbation of several.
    interaction
        Variance that a perturbation of several has to itself.
    """

    slope: float = 0.0
    context: float = 0.1
    attenuation: float = 1.0
    interaction: float = 0.1


@dataclass(frozen=True)
class Fit:
    """A fitted process.

    Parameters
    ----------
    weights
        Of each observation, (n_observations, n_genes).
    variance
        Posterior variance of the change by each element alone in the mean context, (n_elements, n_genes).
    settings
        Of the kernel.
    """

    weights: np.ndarray
    variance: np.ndarray
    settings: Settings


def fit_process(change: np.ndarray, variance: np.ndarray, membership: np.ndarray, places: np.ndarray) -> Fit:
    """Fit the process to changes.

    Parameters
    ----------
    change, variance
        Observed, less what was expected, and their sampling variance, (n_observations, n_genes).
    membership
        Elements of each observation's perturbation, (n_observations, n_elements), boolean.
    places
        Latent code of each observation's context, centred and of unit mean square, (n_observations, n_latent).
    """
    groups = _groups(membership)
    settings = _choose(change, variance, membership, places, groups)
    kernel = _kernel(membership, places, settings)
    weights = np.zeros_like(change)
    posterior = np.zeros((membership.shape[1], change.shape[1]))
    n = membership.sum(1)
    scale = np.where(n > 1, settings.attenuation, 1.0)
    for rows in groups:
        elements = np.flatnonzero(membership[rows].any(0))
        cross = membership[np.ix_(rows, elements)].T * scale[rows]
        weights[rows], posterior[elements] = _posterior(change[rows], variance[rows], kernel[np.ix_(rows, rows)], cross)
    return Fit(weights, posterior, settings)


def _groups(membership: np.ndarray) -> list[np.ndarray]:
    """Observations that share elements, directly or by others."""
    together = membership.astype(np.float32) @ membership.T.astype(np.float32) > 0
    n, label = connected_components(together, directed=False)
    return [np.flatnonzero(label == i) for i in range(n)]


def _kernel(membership: np.ndarray, places: np.ndarray, settings: Settings) -> np.ndarray:
    n = membership.sum(1)
    scale = np.where(n > 1, settings.attenuation, 1.0)
    common = membership.astype(np.float64) @ membership.T
    same = (common == n[:, None]) & (common == n[None])
    likeness = scale[:, None] * scale * common + settings.interaction * (same & (n > 1)[:, None])
    return likeness * (1 + settings.slope * places @ places.T + settings.context * np.eye(n.size))


def _choose(
    change: np.ndarray, variance: np.ndarray, membership: np.ndarray, places: np.ndarray, groups: list[np.ndarray]
) -> Settings:
    """Settings of the highest marginal likelihood, one after the other."""
    genes = np.argsort(-(change**2 / variance).sum(0))[:N_CHOOSING]
    change, variance = change[:, genes], variance[:, genes]
    several = np.ptp(places, axis=0).any()
    asked = ["slope", "context"] * bool(several) + ["attenuation", "interaction"] * bool((membership.sum(1) > 1).any())
    settings = Settings()

    def likelihood(candidate: Settings) -> float:
        kernel = _kernel(membership, places, candidate)
        return sum(
            _evidence(change[rows], variance[rows], kernel[np.ix_(rows, rows)]) for rows in groups if rows.size > 1
        )

    for name in asked:
        scores = {value: likelihood(replace(settings, **{name: value})) for value in GRIDS[name]}
        settings = replace(settings, **{name: max(scores, key=scores.__getitem__)})
    return settings


def _log_likelihoods(change: np.ndarray, variance: np.ndarray, kernel: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Log-likelihood of each gene at each scale, (n_genes, n_scales), and S^-1 d, (n_scales, n_observations, n_genes)."""
    n, n_genes = change.shape
    likelihood, solved = np.empty((n_genes, SCALES.size)), np.empty((SCALES.size, n, n_genes))
    size = max(1, CHUNK_ENTRIES // n**2)
    for start in range(0, n_genes, size):
        genes = slice(start, start + size)
        for s, scale in enumerate(SCALES):
            factor = np.linalg.cholesky(_covariance(variance[:, genes], scale, kernel))
            half = np.linalg.solve(factor, change[:, genes].T[..., None])
            solved[s, :, genes] = np.linalg.solve(factor.swapaxes(1, 2), half)[..., 0].T
            likelihood[genes, s] = -0.5 * (half[..., 0] ** 2).sum(1)
            likelihood[genes, s] -= np.log(np.diagonal(factor, axis1=1, axis2=2)).sum(1)
    return likelihood, solved


def _covariance(variance: np.ndarray, scale: float, kernel: np.ndarray) -> np.ndarray:
    return scale**2 * kernel + variance.T[:, :, None] * np.eye(variance.shape[0])


def _mixture(likelihood: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Weight of each scale, and its probability for each gene, (n_genes, n_scales), by expectation maximisation."""
    relative = np.exp(likelihood - likelihood.max(1, keepdims=True))
    weight = np.full(SCALES.size, 1 / SCALES.size)
    probability = relative
    for _ in range(100):
        probability = relative * weight
        probability /= probability.sum(1, keepdims=True)
        weight = probability.sum(0) + 0.1
        weight[0] += NULL_WEIGHT
        weight /= weight.sum()
    return weight, probability


def _evidence(change: np.ndarray, variance: np.ndarray, kernel: np.ndarray) -> float:
    likelihood, _ = _log_likelihoods(change, variance, kernel)
    weight, _ = _mixture(likelihood)
    top = likelihood.max(1, keepdims=True)
    return float((top[:, 0] + np.log(np.exp(likelihood - top) @ weight)).sum())


def _posterior(
    change: np.ndarray, variance: np.ndarray, kernel: np.ndarray, cross: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Weights of the observations, (n_observations, n_genes), and variance of new values with covariances ``cross``."""
    likelihood, solved = _log_likelihoods(change, variance, kernel)
    _, probability = _mixture(likelihood)
    prior = probability.T * SCALES[:, None] ** 2  # (n_scales, n_genes)
    weights = (prior[:, None] * solved).sum(0)
    mean, second = cross @ weights, np.zeros((cross.shape[0], change.shape[1]))
    size = max(1, CHUNK_ENTRIES // change.shape[0] ** 2)
    for s, scale in enumerate(SCALES[1:], start=1):
        second += probability[:, s] * (scale**2 * (cross @ solved[s])) ** 2
        for start in range(0, change.shape[1], size):
            genes = slice(start, start + size)
            covariance = _covariance(variance[:, genes], scale, kernel)
            explained = np.einsum("ei,gie->ge", cross, np.linalg.solve(covariance, cross.T[None]))
            second[:, genes] += probability[genes, s] * (scale**2 - scale**4 * explained.T)
    return weights, np.maximum(second - mean**2, 0.0)


def common_change(change: np.ndarray, variance: np.ndarray) -> np.ndarray:
    r"""Change that a further perturbation is expected to make, from what perturbations have in common, (n_genes,).

    A random-effects mean: with the variance :math:`\tau_g^2` between perturbations (DerSimonian and Laird 1986), the mean with
    weights :math:`1 / (v_{pg} + \tau_g^2)` has the variance :math:`1 / \sum_p` of these, and is shrunk over genes as changes of
    single perturbations are: where they agree in nothing, nothing is expected.

    Parameters
    ----------
    change, variance
        Of each perturbation, (n_perturbations, n_genes).
    """
    weight = 1 / variance
    total = weight.sum(0)
    excess = (weight * (change - (weight * change).sum(0) / total) ** 2).sum(0) - (len(change) - 1)
    between = np.maximum(excess / np.maximum(total - (weight**2).sum(0) / total, 1e-12), 0.0)
    weight = 1 / (variance + between)
    mean, error = (weight * change).sum(0) / weight.sum(0), 1 / weight.sum(0)
    whole = SCALES**2 + error[:, None]
    _, probability = _mixture(-0.5 * (np.log(whole) + mean[:, None] ** 2 / whole))
    return mean * (probability * SCALES**2 / whole).sum(1)


def trusted(
    change: np.ndarray,
    variance: np.ndarray,
    predictions: np.ndarray,
    bounds: list[tuple[float, float]],
    spread: float = 0.01,
) -> np.ndarray:
    r"""How far predictions for held-out perturbations are to be believed, (n_predictors,).

    Weighted least squares, within bounds, of the changes, (n_perturbations, n_genes), on the predictions (n_predictors,
    n_perturbations, n_genes). Each
    coefficient is multiplied by :math:`1 - (2\,\mathrm{se} / \lambda)^2` (not below 0), with the jackknife standard error
    over perturbations: what does not generalise from perturbation to perturbation counts for nothing.
    """
    n = change.shape[0]
    weight = 1 / (variance + spread)
    a = np.einsum("pg,ipg,jpg->pij", weight, predictions, predictions)
    b = np.einsum("pg,ipg,pg->pi", weight, predictions, change)

    def solve(keep: np.ndarray) -> np.ndarray:
        matrix, vector = a[keep].sum(0), b[keep].sum(0)
        found = np.zeros(len(vector))
        for _ in range(50):
            for i in range(len(vector)):
                rest = vector[i] - matrix[i] @ found + matrix[i, i] * found[i]
                found[i] = np.clip(rest / matrix[i, i], *bounds[i]) if matrix[i, i] > 1e-9 else 0.0
        return found

    if n < 3:
        return np.zeros(len(predictions))
    whole = solve(np.ones(n, dtype=bool))
    left_out = np.array([solve(np.arange(n) != i) for i in range(n)])
    squared_error = (n - 1) / n * ((left_out - left_out.mean(0)) ** 2).sum(0)
    return whole * np.maximum(1 - 4 * squared_error / np.maximum(whole**2, 1e-12), 0.0)
