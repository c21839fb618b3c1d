"""The published objectives, to the digit: dense, with their epsilons, floors and clamps."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from ._latents import DENSITY_EPS

EPS = 1e-10
#: floor of the KL of ``latent_mod="vae"``, which the configuration does not set
GAUSSIAN_FLOOR = 1.0


def negative_binomial(x: Tensor, mean: Tensor, dispersion: Tensor) -> Tensor:
    """Elementwise negative log-likelihood with the published epsilons."""
    gammas = torch.lgamma(dispersion + EPS) + torch.lgamma(x + 1.0) - torch.lgamma(x + dispersion + EPS)
    logs = (dispersion + x) * torch.log(1.0 + mean / (dispersion + EPS))
    return gammas + logs + x * (torch.log(dispersion + EPS) - torch.log(mean + EPS))


def rescaled(mean: Tensor, truth: Tensor) -> Tensor:
    """Mean with the total of the counts, (n_cells, n_genes)."""
    return mean / mean.sum(1, keepdim=True) * truth.sum(1, keepdim=True)


def reconstruction(x: Tensor, mean: Tensor, dispersion: Tensor, hidden: Tensor, genes: Tensor, *, dae: bool) -> Tensor:
    """NB loss of the cells with a masked gene, summed over genes.

    Parameters
    ----------
    x, mean, dispersion
        Counts, expected counts and dispersions, (n_cells, n_genes).
    hidden
        Which entries were masked, (n_cells, n_genes), boolean.
    genes
        Which genes count, (n_genes,), boolean.
    dae
        Whether the masked entries count once more.
    """
    cells = hidden.any(1)
    truth = x[:, genes][cells]
    loss = negative_binomial(truth, rescaled(mean[:, genes][cells], truth), dispersion[:, genes][cells])
    if dae:
        mask = hidden[cells].to(x.dtype)
        truth = x[cells] * mask
        masked = negative_binomial(truth, rescaled(mean[cells] * mask, truth), dispersion[cells] * mask)
        loss = loss + masked
    return loss.sum(-1).mean()


def imputation(x: Tensor, mean: Tensor, dispersion: Tensor, genes: Tensor) -> tuple[Tensor, Tensor]:
    """NB loss over the measured genes, and the prediction for all of the input's genes.

    The published prediction is scaled by the totals of the measured genes.
    """
    truth = x[:, genes]
    factor = truth.sum(1, keepdim=True) / mean[:, genes].sum(1, keepdim=True)
    loss = negative_binomial(truth, mean[:, genes] * factor, dispersion[:, genes])
    return loss.sum(-1).mean(), mean * factor


def log_normal(x: Tensor, mean: Tensor, variance: Tensor) -> Tensor:
    """Log density of a diagonal Gaussian, (n_cells,)."""
    variance = variance + DENSITY_EPS
    return -0.5 * (math.log(2.0 * math.pi) + torch.log(variance) + (x - mean).square() / variance).sum(-1)


def categorical_divergence(logits: Tensor) -> Tensor:
    """Mean KL of q(y|h) from uniform, in nats."""
    entropy = -(logits.softmax(-1) * F.log_softmax(logits, -1)).sum(-1).mean()
    return math.log(logits.shape[-1]) - entropy


def gaussian_divergence(mean: Tensor, variance: Tensor) -> Tensor:
    """Mean KL of q(z|h) from the standard normal, in nats."""
    return -0.5 * (1 + variance.log() - mean.square() - variance).sum(1).mean()


def at_least(floor: float, value: Tensor) -> Tensor:
    """The value, or the floor: a constant without gradient."""
    return value if bool(value > floor) else value.new_tensor(floor)
