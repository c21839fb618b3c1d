"""Alignment of batches in the latent space."""

from __future__ import annotations

import torch
from torch import Tensor, nn

#: squared distance, relative to the mean one within clusters, over which a cell changes from one cluster to another
SOFTNESS = 0.5
#: relative squared distance from which on a cell rather belongs to no cluster
OUTSIDE = 9.0


class BatchAlignment(nn.Module):
    r"""Moves the cells of each batch, cluster by cluster, to where these clusters lie in all batches.

    In each of a few steps, a cell at :math:`z` belongs to cluster :math:`k` with centre :math:`c_k` by

    .. math:: r_k = \frac{e^{-|z - c_k|^2 / \tau}}{e^{-9 s / \tau} + \sum_j e^{-|z - c_j|^2 / \tau}},\quad \tau = s / 2,

    where :math:`s` is the mean squared distance of cells to their centre, and moves by :math:`-\sum_k r_k d_{bk}`, with
    :math:`d_{bk}` the displacement of the cluster in the cell's batch :math:`b`. What lies far from all clusters stays. This is
    what Harmony does (Korsunsky et al. 2019), but for its clusters, which it draws over many batches; here clusters and
    displacements are numbers of the model, so that a cell's place is a function of its embedding and its batch alone.

    Parameters
    ----------
    n_batches
        Number of batches.
    n_latent
        Dimensions of the embedding.
    n_clusters, n_steps
        Number of clusters in each step, at most, and of steps.
    """

    centre: Tensor
    scale: Tensor
    displacement: Tensor

    def __init__(self, n_batches: int, n_latent: int, n_clusters: int = 30, n_steps: int = 5):
        super().__init__()
        # a step whose scale is 0 is not fitted
        self.register_buffer("scale", torch.zeros(n_steps))
        self.register_buffer("centre", torch.zeros(n_steps, n_clusters, n_latent))
        self.register_buffer("displacement", torch.zeros(n_steps, n_batches, n_clusters, n_latent))

    @property
    def n_steps(self) -> int:
        return self.scale.shape[0]

    @property
    def n_clusters(self) -> int:
        return self.centre.shape[1]

    @property
    def n_batches(self) -> int:
        return self.displacement.shape[1]

    @property
    def fitted(self) -> bool:
        """Whether there is anything to do."""
        return bool((self.scale > 0).all())

    @property
    def moved_batches(self) -> Tensor:
        """Codes of the batches that are moved, (n_moved,)."""
        return self.displacement.abs().sum((0, 2, 3)).nonzero()[:, 0]

    def reset(self) -> None:
        """Let all cells stay where they are."""
        for buffer in (self.scale, self.centre, self.displacement):
            buffer.zero_()

    def add_batches(self, n_added: int) -> None:
        """Add batches, which stay where they are until all are fitted anew."""
        shape = (self.n_steps, n_added, *self.displacement.shape[2:])
        self.displacement = torch.cat([self.displacement, self.displacement.new_zeros(shape)], 1)

    def memberships(self, z: Tensor, step: int) -> Tensor:
        """How much cells belong to each cluster of a step, (n_cells, n_clusters), for z (n_cells, n_latent)."""
        distance = torch.cdist(z, self.centre[step].to(z.dtype)).square() / self.scale[step].to(z.dtype)
        outside = torch.full_like(distance[:, :1], OUTSIDE)
        return (torch.cat([distance, outside], 1) / -SOFTNESS).softmax(1)[:, :-1]

    def move(self, z: Tensor, batch: Tensor, step: int) -> Tensor:
        """Positions after one step, (n_cells, n_latent)."""
        member, moved = self.memberships(z, step), z.clone()
        for code in batch.unique().tolist():
            if 0 <= code < self.n_batches:
                cells = batch == code
                moved[cells] -= member[cells] @ self.displacement[step, code].to(z.dtype)
        return moved

    def forward(self, z: Tensor, batch: Tensor) -> Tensor:
        """Align cells.

        Parameters
        ----------
        z
            Embeddings, (n_cells, n_latent).
        batch
            Code of the batch of each cell, (n_cells,). Cells of other codes stay where they are.

        Returns
        -------
        Embeddings, (n_cells, n_latent).
        """
        if not self.fitted:
            return z
        # products of doubles: how many cells there are must not show in the result
        moved = z.double()
        for step in range(self.n_steps):
            moved = self.move(moved, batch, step)
        return moved.to(z.dtype)
