"""Split into training and validation, by cells or by whole samples."""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING, Any, Literal

import lightning.pytorch as pl
import numpy as np
from scvi import settings
from torch.utils.data import DataLoader

from ._checks import check_sizes, counted, some, warn
from ._loader import CellLoader, RandomSliceSampler, SpatialInputs, training_loader, whole_sample_loader
from ._table import CellTable

if TYPE_CHECKING:
    from scvi.data import AnnDataManager

#: what a loader of minibatches can be told
LOADER_ARGUMENTS = set(inspect.signature(DataLoader).parameters) - {"dataset", "sampler", "batch_sampler", "drop_last"}
#: smallest random slice of a dissociated sample in training
MIN_CONTEXT = 32


class SampleSplitter(pl.LightningDataModule):
    """Minibatches of whole samples for training, validation and test.

    Parameters
    ----------
    adata_manager
        Manager of a registered AnnData.
    train_size, validation_size
        Shares; the rest is the test set. ``train_size=None`` is 0.9, or what a larger ``validation_size`` leaves, and
        ``validation_size=None`` everything that is not training.
    shuffle_set_split
        Whether to draw the split at random; otherwise validation comes first, then training, then test.
    batch_size
        Cells packed in a training minibatch.
    split_by
        ``"cells"``: validation cells are hidden from training and see their whole sample in validation. ``"samples"``:
        whole samples are held out.
    context_size
        Cells that see each other in training; ``None``: the minibatch for spatial data, a quarter of it otherwise, so
        that a minibatch mixes samples.
    max_context
        Cells that see each other in validation.
    spatial
        What the model takes of positions.
    external_indexing
        Rows, or boolean masks, for training, validation and test, instead of a random split.
    """

    def __init__(
        self,
        adata_manager: AnnDataManager,
        train_size: float | None = None,
        validation_size: float | None = None,
        shuffle_set_split: bool = True,
        batch_size: int = 256,
        split_by: Literal["cells", "samples"] = "cells",
        context_size: int | None = None,
        max_context: int = 8192,
        spatial: SpatialInputs | None = None,
        external_indexing: list[np.ndarray] | None = None,
        **loader_kwargs: Any,
    ):
        super().__init__()
        check_sizes(batch_size=batch_size, **({} if context_size is None else {"context_size": context_size}))
        if "drop_last" in loader_kwargs:
            raise TypeError(
                'datasplitter_kwargs has "drop_last", but no cell is left out of a minibatch of whole samples.'
            )
        if unknown := [name for name in loader_kwargs if name not in LOADER_ARGUMENTS]:
            raise TypeError(
                f"datasplitter_kwargs has {some(unknown)}, which neither SampleSplitter nor DataLoader takes."
            )
        self.table = CellTable.from_manager(adata_manager)
        self.spatial = spatial or SpatialInputs()
        self.batch_size = batch_size
        self.context_size = context_size or self._default_context()
        self.max_context = max_context
        self.loader_kwargs = loader_kwargs
        if external_indexing is not None:
            self.train_idx, self.val_idx, self.test_idx = self._external(external_indexing)
        elif split_by in ("cells", "samples"):
            units = np.arange(self.table.n_cells) if split_by == "cells" else np.unique(self.table.sample)
            parts = split_units(
                units, train_size, validation_size, shuffle=shuffle_set_split, one=split_by == "samples"
            )
            rows = np.arange(self.table.n_cells)
            self.train_idx, self.val_idx, self.test_idx = (
                part if split_by == "cells" else rows[np.isin(self.table.sample, part)] for part in parts
            )
        else:
            raise ValueError(f'split_by="{split_by}" is neither "cells" nor "samples".')
        self.n_train, self.n_val = self.train_idx.shape[0], self.val_idx.shape[0]

    def _default_context(self) -> int:
        return self.batch_size if self.table.coordinates is not None else max(MIN_CONTEXT, self.batch_size // 4)

    def _external(self, indexing: list[np.ndarray]) -> list[np.ndarray]:
        if isinstance(indexing, np.ndarray) or not 1 <= len(indexing) <= 3:
            raise ValueError(
                "external_indexing is a list of rows, or of boolean masks, for training, validation and test, such as "
                "[training, validation]."
            )
        parts = [np.asarray(part if part is not None else []) for part in indexing]
        if other := [part for part in parts if part.size and (part.ndim != 1 or part.dtype.kind not in "iub")]:
            raise TypeError(
                f"external_indexing has an array of dtype {other[0].dtype} and shape {other[0].shape}; row numbers, one a cell, "
                "or a boolean mask are needed (for names, `adata.obs_names.get_indexer(names)`)."
            )
        masks = [part.shape for part in parts if part.dtype == bool and part.shape != (self.table.n_cells,)]
        if masks:
            raise ValueError(
                f"external_indexing has a mask of shape {masks[0]}; the AnnData has {self.table.n_cells:,} cells."
            )
        parts = [np.flatnonzero(part) if part.dtype == bool else part.astype(np.int64) for part in parts]
        parts += [np.empty(0, dtype=np.int64)] * (3 - len(parts))
        rows, uses = np.unique(np.concatenate(parts), return_counts=True)
        if uses.size and uses.max() > 1:
            raise ValueError(f"external_indexing names {counted(int((uses > 1).sum()), 'cell')} more than once.")
        if rows.size and not 0 <= rows[0] <= rows[-1] < self.table.n_cells:
            raise ValueError(f"external_indexing names rows outside of 0 to {self.table.n_cells - 1}.")
        if not parts[0].size:
            raise ValueError("external_indexing has no cells for training.")
        if rows.size < self.table.n_cells:
            warn(f"external_indexing leaves {counted(self.table.n_cells - rows.size, 'cell')} unused.")
        return parts

    @property
    def n_batches(self) -> int:
        """Optimiser steps of an epoch on one device."""
        return len(RandomSliceSampler(self.table, self.train_idx, self.context_size, self.batch_size, 0).batches())

    def train_dataloader(self) -> CellLoader:
        """Random slices of the training cells."""
        return training_loader(
            self.table,
            self.spatial,
            self.train_idx,
            batch_size=self.batch_size,
            context_size=self.context_size,
            seed=settings.seed or 0,  # every rank of a distributed run has to draw the same
            **self.loader_kwargs,
        )

    def val_dataloader(self) -> CellLoader | None:
        """Validation cells, seen among the training cells of their sample."""
        return self._held_out(self.val_idx)

    def test_dataloader(self) -> CellLoader | None:
        """Test cells, likewise."""
        return self._held_out(self.test_idx)

    def _held_out(self, targets: np.ndarray) -> CellLoader | None:
        if targets.shape[0] == 0:
            return None
        return whole_sample_loader(
            self.table,
            self.spatial,
            targets,
            pool=np.concatenate([self.train_idx, targets]),
            batch_size=self.max_context,
            max_context=self.max_context,
            shared=True,
            **self.loader_kwargs,
        )


def split_units(
    units: np.ndarray,
    train_size: float | None,
    validation_size: float | None,
    *,
    shuffle: bool,
    one: bool = False,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Training, validation and test part of cells or samples; each sorted.

    With ``one``, at least one of several units is for validation where a share of them was to be.
    """
    train = min(0.9, 1 - (validation_size or 0)) if train_size is None else train_size
    if not 0 < train <= 1:
        raise ValueError(f"train_size is {train}; it is a share in (0, 1].")
    validation = 1 - train if validation_size is None else validation_size
    if validation < 0 or train + validation > 1 + 1e-9:
        raise ValueError(
            f"train_size ({train}) and validation_size ({validation}) must be shares that sum to at most 1."
        )
    n_train = int(np.ceil(train * units.shape[0]))
    if one and train < 1 and validation > 0:
        n_train = max(1, min(n_train, units.shape[0] - 1))
    n_validation = units.shape[0] - n_train if validation_size is None else int(validation * units.shape[0])
    n_validation = min(max(n_validation, int(one and validation > 0)), units.shape[0] - n_train)
    if shuffle:
        units = np.random.RandomState(settings.seed or 0).permutation(units)
    parts = np.split(units, [n_validation, n_validation + n_train])
    return np.sort(parts[1]), np.sort(parts[0]), np.sort(parts[2])
