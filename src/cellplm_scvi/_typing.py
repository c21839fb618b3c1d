"""What travels: a minibatch, and what the module's steps hand to each other."""

from __future__ import annotations

from typing import Required, TypedDict

from torch import Tensor
from torch.distributions import Normal

from .module._expression import ExpressionDistribution


class Minibatch(TypedDict, total=False):
    """Cells of whole samples (or slices of them), packed side by side; n_cells = sum of ``lengths``."""

    values: Required[Tensor]
    """Non-zero counts, (n_nonzero,)."""
    genes: Required[Tensor]
    """Gene of each of them, (n_nonzero,)."""
    offsets: Required[Tensor]
    """Where each cell begins in ``values``, (n_cells + 1,)."""
    library: Required[Tensor]
    """Library size, (n_cells,), counts."""
    batch: Required[Tensor]
    """Batch code, (n_cells,)."""
    platform: Tensor
    dataset: Tensor
    lengths: Tensor
    """Cells of each packed sample, (n_samples,)."""
    target: Tensor
    """Cells that count (the others are context), (n_cells,), boolean; absent: all."""
    marked: Tensor
    """Elements of the perturbation marked in each packed sample, (n_samples, n_elements), see ``PerturbationHead``."""
    located: Tensor
    """Which cells have a position, (n_cells,), boolean; absent: none."""
    coordinates: Tensor
    """Position in the sample scaled to [0, 1], (n_cells, n_dims), NaN where unknown."""
    neighbours: Tensor
    """Rows of the nearest cells, (n_cells, k), -1 where there is none."""
    distances: Tensor
    """Distance to them in units of the sample's cell spacing, (n_cells, k)."""
    measured: Tensor
    """Genes measured by each panel, (n_panels, n_genes), boolean; absent: all by all."""
    panel: Tensor
    """Row of ``measured`` for each cell, (n_cells,)."""
    niche_values: Tensor
    """Counts summed over the neighbours, as ``values``; with ``niche_genes`` and ``niche_offsets``."""
    niche_genes: Tensor
    niche_offsets: Tensor
    qz_mean: Tensor
    """Mean of q(z|h), (n_cells, n_latent), where the encoder has run already."""
    qz_variance: Tensor


class InferenceOutputs(TypedDict):
    """Of the encoder, for the cells that count."""

    z: Tensor
    qz: Normal
    qzm: Tensor
    qzv: Tensor
    library: Tensor


class GenerativeOutputs(TypedDict):
    """Of the decoder."""

    hidden: Tensor
    px: ExpressionDistribution
