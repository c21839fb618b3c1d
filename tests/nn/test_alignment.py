"""Batches are moved together cluster by cluster, by numbers that are fixed once they are fitted."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from cellplm_scvi.model._alignment import displace, place_clusters
from cellplm_scvi.nn import BatchAlignment

CENTRES = torch.tensor([[0.0, 0.0, 0.0], [8.0, 0.0, 0.0], [0.0, 9.0, 0.0]])


def draw(n_cells: int = 600, n_batches: int = 3, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Cells of three types in batches that lie apart by less than types do; the last type is in the first batch alone."""
    generator = torch.Generator().manual_seed(seed)
    kind = torch.randint(3, (n_cells,), generator=generator)
    batch = torch.randint(n_batches, (n_cells,), generator=generator)
    batch[kind == 2] = 0
    shift = 0.5 * torch.randn(n_batches, 3, 3, generator=generator)
    z = CENTRES[kind] + shift[batch, kind] + 0.5 * torch.randn(n_cells, 3, generator=generator)
    return z, batch, kind


def fitted(z: torch.Tensor, batch: torch.Tensor, n_batches: int = 3) -> BatchAlignment:
    alignment = BatchAlignment(n_batches, z.shape[1], n_clusters=3)
    moved = z.double()
    for step in range(alignment.n_steps):
        place_clusters(alignment, moved, step)
        displace(alignment, moved, batch, step)
        moved = alignment.move(moved, batch, step)
    return alignment


def distances(z: torch.Tensor, batch: torch.Tensor) -> float:
    """Mean distance of the batches' means from that of all."""
    return float(np.mean([(z[batch == b].mean(0) - z.mean(0)).norm() for b in batch.unique()]))


@pytest.mark.parametrize("seed", range(3))
def test_batches_come_together_and_types_stay_apart(seed):
    z, batch, kind = draw(seed=seed)
    aligned = fitted(z, batch)(z, batch)
    for k in (0, 1):
        assert distances(aligned[kind == k], batch[kind == k]) < 0.2 * distances(z[kind == k], batch[kind == k])
    means = torch.stack([aligned[kind == k].mean(0) for k in range(3)])
    before = torch.stack([z[kind == k].mean(0) for k in range(3)])
    torch.testing.assert_close(torch.pdist(means), torch.pdist(before), rtol=0.05, atol=0.1)


def test_a_type_that_one_batch_has_alone_stays():
    z, batch, kind = draw()
    aligned = fitted(z, batch)(z, batch)
    assert (aligned - z)[kind == 2].norm(dim=1).max() < 0.1 < (aligned - z)[kind == 0].norm(dim=1).max()


def test_what_lies_far_from_all_clusters_stays():
    z, batch, _ = draw()
    far = torch.tensor([[60.0, -60.0, 10.0]])
    torch.testing.assert_close(fitted(z, batch)(far, batch[:1]), far)


def test_without_a_fit_and_in_unknown_batches_cells_stay():
    z, batch, _ = draw()
    assert BatchAlignment(3, 3)(z, batch) is z
    alignment = fitted(z, batch)
    for unknown in (-1, 3, 100):
        assert torch.equal(alignment(z, torch.full_like(batch, unknown)), z)
    alignment.reset()
    assert alignment(z, batch) is z


@given(st.lists(st.integers(0, 599), min_size=1, max_size=40))
def test_where_a_cell_goes_does_not_depend_on_other_cells(rows):
    z, batch, _ = draw()
    alignment = fitted(z, batch)
    torch.testing.assert_close(alignment(z[rows], batch[rows]), alignment(z, batch)[rows], rtol=1e-6, atol=1e-6)


def test_batches_that_are_added_stay_and_leave_the_others():
    z, batch, _ = draw()
    alignment = fitted(z, batch)
    before = alignment(z, batch)
    alignment.add_batches(1)
    assert torch.equal(alignment(z, torch.full_like(batch, 3)), z)
    assert torch.equal(alignment(z, batch), before)
