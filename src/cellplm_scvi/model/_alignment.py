"""Fits the alignment of batches once a model is trained."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
import torch
from sklearn.cluster import KMeans
from torch import Tensor

from cellplm_scvi import _constants as c

if TYPE_CHECKING:
    from cellplm_scvi.data._table import CellTable
    from cellplm_scvi.nn import BatchAlignment

    from ._cellplm import CellPLM

#: cells a cluster has at least, on average
CELLS_A_CLUSTER = 30
#: cells that it is fitted to, beside the first of each batch: it must be quick even where training is
MAX_CELLS, CELLS_A_BATCH = 5_000, 200
#: cells at the centre of each cluster that a batch is taken to have beside its own: a displacement that few cells tell of is small
PRIOR_CELLS = 5.0
#: rounds of finding the centres of soft clusters
N_ROUNDS = 2
#: where the centres of clusters lie that are not used
FAR = 1e6


@torch.inference_mode()
def fit_alignment(model: CellPLM, table: CellTable | None) -> None:
    """Fit the alignment of a trained model to cells; without these, take it away."""
    alignment = model.module.alignment
    if alignment is None:
        return
    alignment.reset()
    if table is None:
        return
    batch = table.covariates[c.BATCH_KEY]
    rows = np.flatnonzero((batch >= 0) & (batch < alignment.n_batches))
    if np.unique(batch[rows]).size < 2 or rows.size < 2 * CELLS_A_CLUSTER:
        return
    rows = _some_rows(rows, batch)
    mean = model._moments(table, rows, None, mean_only=True)[0]
    z = torch.from_numpy(mean[rows]).to(alignment.centre.device)
    codes = torch.from_numpy(batch[rows]).to(z.device)
    for step in range(alignment.n_steps):
        place_clusters(alignment, z, step)
        displace(alignment, z, codes, step)
        z = alignment.move(z, codes, step)


def _some_rows(rows: np.ndarray, batch: np.ndarray) -> np.ndarray:
    """Rows at random where there are many, with enough of each batch."""
    if rows.size <= MAX_CELLS:
        return rows
    shuffled = np.random.default_rng(0).permutation(rows)
    place = pd.Series(batch[shuffled]).groupby(batch[shuffled]).cumcount().to_numpy()
    return np.sort(shuffled[(np.arange(rows.size) < MAX_CELLS) | (place < CELLS_A_BATCH)])


def place_clusters(alignment: BatchAlignment, z: Tensor, step: int) -> None:
    """Find the clusters of a step: those of k-means first, then the ones of the step before, in rounds of soft clustering.

    Parameters
    ----------
    z
        Embeddings after the steps before, (n_cells, n_latent).
    step
        Number of the step.
    """
    if step == 0:
        n_clusters = min(alignment.n_clusters, z.shape[0] // CELLS_A_CLUSTER)
        clusters = KMeans(n_clusters, n_init=1, random_state=0).fit(z.cpu().numpy())
        alignment.scale.fill_(max(clusters.inertia_ / z.shape[0], 1e-12))
        alignment.centre.fill_(FAR)
        alignment.centre[:, :n_clusters] = torch.from_numpy(clusters.cluster_centers_).to(alignment.centre)
    else:
        alignment.centre[step] = alignment.centre[step - 1]
    for _ in range(N_ROUNDS):
        member = alignment.memberships(z, step)
        size = member.sum(0)[:, None]
        alignment.centre[step] = torch.where(size > 0, member.T @ z / size, alignment.centre[step])


def displace(alignment: BatchAlignment, z: Tensor, batch: Tensor, step: int) -> None:
    """Find how far the clusters of each batch that has cells here lie from the centres.

    Parameters
    ----------
    z
        Embeddings after the steps before, (n_cells, n_latent).
    batch
        Code of the batch of each cell, (n_cells,).
    step
        Number of the step.
    """
    member, centre = alignment.memberships(z, step), alignment.centre[step]
    for code in batch.unique().tolist():
        of_batch = member[batch == code]
        size = of_batch.sum(0)[:, None]
        distance = of_batch.T @ z[batch == code] - size * centre
        alignment.displacement[step, code] = distance / (size + PRIOR_CELLS)
