"""Sizes and lengths that follow from the data, from a thousand cells to millions."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ._cellplm import CellPLM


def default_hidden(n_cells: int) -> int:
    """Width of the network."""
    if n_cells < 100_000:
        return 128
    return 256 if n_cells < 1_000_000 else 512


def default_layers(n_cells: int) -> int:
    """Depth of the encoder."""
    return 2 if n_cells < 1_000_000 else 4


def default_latent(n_cells: int) -> int:
    """Dimensions of the embedding."""
    return 32 if n_cells < 1_000_000 else 64


def default_batch_size(n_cells: int, *, spatial: bool) -> int:
    """Cells of a minibatch: a power of two, about a 24th of the data, larger where neighbours have to be in it."""
    low, high = (256, 1024) if spatial else (128, 512)
    return min(high, max(low, 1 << round(math.log2(max(n_cells, 24) / 24))))


def default_max_epochs(n_cells: int, n_batches: int, *, spatial: bool) -> int:
    """Epochs: 4,800 optimiser steps, and for many cells 2,400 times the square root of their tens of thousands.

    Where there are neighbours to predict, 2,400: more only take from what tells cell types apart. At most 200 epochs: with
    more, types of few cells lie less far apart.
    """
    n_steps = max(2_400 if spatial else 4_800, 2_400 * (n_cells / 10_000) ** 0.5)
    return max(1, math.ceil(min(n_steps / max(n_batches, 1), 200)))


def default_inference_batch_size(n_hidden: int, device_type: str) -> int:
    """Cells that the encoder takes at once: tensors that stay in a CPU's cache, or a quarter of a gigabyte elsewhere."""
    if device_type == "cpu":
        return max(1024, min(4096, 2**18 // n_hidden))
    return max(256, min(8192, 2**26 // (16 * n_hidden)))


def default_row_batch_size(n_genes: int) -> int:
    """Cells that the decoder takes at once, each with a dense row of genes: about 64 megabytes a tensor."""
    return max(16, min(4096, 2**24 // max(n_genes, 1)))


def sizes_of(model: CellPLM, init: dict[str, Any]) -> dict[str, int]:
    """Sizes that the model's constructor chose by the number of its cells, which need not be that of the labelled ones."""
    if "published" in init:
        return {}
    module = model.module
    return {
        "n_hidden": module.n_hidden,
        "n_layers": len(module.encoder.layers),
        "n_latent": module.latent.mean.out_features,
    }
