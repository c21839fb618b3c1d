"""Every private import of other packages, and what works around their known defects."""

from __future__ import annotations

import warnings
from copy import deepcopy
from typing import Any

from anndata.abc import CSCDataset, CSRDataset
from lightning.pytorch.loggers.tensorboard import _TENSORBOARD_AVAILABLE as HAS_TENSORBOARD
from scvi._types import AnnOrMuData
from scvi.data import AnnDataManager
from scvi.data._constants import _MANAGER_UUID_KEY as MANAGER_UUID_KEY
from scvi.data._constants import _SCVI_UUID_KEY as SCVI_UUID_KEY
from scvi.data._utils import _check_if_view
from scvi.model._utils import parse_device_args
from scvi.model.base._de_core import _de_core as compare_groups
from scvi.module.base._decorators import _move_data_to_device as move_to_device
from scvi.train._logger import SimpleLogger
from scvi.utils._docstrings import devices_dsp, setup_anndata_dsp

# torch says at the first use in a process that its CSR layout is in beta; the two operations used here are tested.
warnings.filterwarnings("ignore", message="Sparse CSR tensor support is in beta", category=UserWarning)
warnings.filterwarnings("ignore", message="Sparse CSC tensor support is in beta", category=UserWarning)
warnings.filterwarnings("ignore", message="Sparse invariant checks are implicitly disabled", category=UserWarning)


def copy_if_view(adata: AnnOrMuData) -> None:
    """Make a view an AnnData of its own, with a warning; a view of a file cannot become one in memory by itself."""
    check_view(adata)
    _check_if_view(adata, copy_if_view=True)


def check_view(adata: AnnOrMuData) -> None:
    """Raise on a view of a backed AnnData."""
    if adata.is_view and adata.isbacked:
        raise ValueError(
            "This AnnData is a view of one that is backed by a file. Pass `adata.to_memory()`, or the whole and `indices`."
        )


class DataManager(AnnDataManager):
    """A manager that a failed registration leaves as it was.

    By itself it forgets its data first, and a model whose data another one has registered since could not even be saved.
    """

    def register_fields(self, adata: AnnOrMuData, source_registry: dict | None = None, **kwargs: Any) -> None:
        try:
            super().register_fields(adata, source_registry, **kwargs)
        except BaseException:
            if MANAGER_UUID_KEY in adata.uns:  # some codes may be written already: whoever is next writes all
                adata.uns[MANAGER_UUID_KEY] = ""
            raise

    def validate(self) -> None:
        adata, registry = self.adata, self._registry  # type: ignore[has-type]
        if adata is None or adata.uns[MANAGER_UUID_KEY] == self.id:
            super().validate()
            return
        before = deepcopy(registry)
        try:
            super().validate()
        except BaseException:
            self.adata = adata
            registry.clear()  # models hold it too
            registry.update(before)
            raise


def keep_registration(manager: AnnDataManager) -> None:
    """Let a manager that registers its data again, after another one did, know what it found the first time.

    By itself it makes the codes of categories anew, of what stands in the columns by then.
    """
    manager._source_registry = deepcopy(manager.registry)


__all__ = [
    "HAS_TENSORBOARD",
    "SCVI_UUID_KEY",
    "AnnOrMuData",
    "DataManager",
    "CSCDataset",
    "CSRDataset",
    "SimpleLogger",
    "compare_groups",
    "check_view",
    "copy_if_view",
    "keep_registration",
    "devices_dsp",
    "move_to_device",
    "parse_device_args",
    "setup_anndata_dsp",
]
