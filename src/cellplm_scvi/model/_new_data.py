"""How a model reads data that are not its own."""

from __future__ import annotations

from copy import deepcopy
from typing import Any

from anndata import AnnData
from mudata import MuData
from scvi.data import AnnDataManager
from scvi.model.base import BaseModelClass

from cellplm_scvi import _constants as c
from cellplm_scvi._compat import SCVI_UUID_KEY, AnnOrMuData, check_view, copy_if_view

from ._registry import columns_read, manager_of, reading, set_up_as


class NewDataMixin:
    """Registers data with a model, by their own set-up or by the model's."""

    #: whether the model's AnnData is the first one that a method was given, after it was loaded without
    _adopted = False

    @property
    def adata(self) -> Any:
        """Data attached to the model, an AnnData or a MuData, or ``None``."""
        return super().adata  # type: ignore[misc]

    @adata.setter
    def adata(self, adata: AnnOrMuData) -> None:
        BaseModelClass.adata.fset(self, adata)
        self._adopted = False

    def _validate_anndata(self, adata: AnnOrMuData | None = None, copy_if_view: bool = True) -> AnnOrMuData:
        if adata is None and self.adata_manager is None:  # type: ignore[attr-defined]
            raise ValueError(
                "This model was loaded without an AnnData. Pass one to the method, or set it with `model.adata = adata`."
            )
        if adata is not None:
            if not isinstance(adata, AnnData | MuData):
                raise TypeError(f"adata is of type {type(adata).__name__}; an AnnData of raw counts is needed.")
            check_view(adata)
            manager = self._own_managers.get(adata.uns.get(SCVI_UUID_KEY))
            if manager is None or manager.adata is not adata or self._has_changed(manager):
                self._register_data(adata, self._registry_for(adata))
                manager = self._own_managers[adata.uns[SCVI_UUID_KEY]]
                manager.columns_read = columns_read(adata, self._reading_of(adata, manager))  # type: ignore[attr-defined]
        return super()._validate_anndata(adata, copy_if_view)  # type: ignore[misc]

    def _has_changed(self, manager: AnnDataManager) -> bool:
        """Whether other columns are to be read of data, or others stand in them, than when they were registered."""
        if manager is self.adata_manager:  # type: ignore[attr-defined]
            return False  # the model's own data are those that it was built for
        now = columns_read(manager.adata, self._reading_of(manager.adata, manager))
        return now != getattr(manager, "columns_read", None)

    def _reading_of(self, adata: AnnOrMuData, manager: AnnDataManager | None) -> dict[str, Any]:
        """Arguments of the set-up by which the model reads data, with the set-up that they have, if any."""
        return reading(self.registry_, adata, None if manager is None else manager.registry["setup_args"])  # type: ignore[attr-defined]

    @property
    def _own_managers(self) -> dict[Any, AnnDataManager]:
        """Set-ups of data with this model, by the identifier of the data."""
        return self._per_instance_manager_store.get(self.id, {})  # type: ignore[attr-defined]

    def _registry_for(self, adata: AnnOrMuData) -> dict[str, Any]:
        """The model's registry, with the keys by which it reads data that are not its own."""
        registry: dict[str, Any] = deepcopy(self.registry_)  # type: ignore[attr-defined]
        manager = self._own_managers.get(adata.uns.get(SCVI_UUID_KEY)) or manager_of(type(self), adata)
        method = "setup_anndata" if isinstance(adata, AnnData) else "setup_mudata"
        if manager is None and method == "setup_mudata" != registry["setup_method_name"]:
            raise TypeError(
                "The model was set up with an AnnData; this is a MuData. Pass the modality of the counts, such as "
                f'mdata["{next(iter(adata.mod))}"], or call setup_mudata on it first.'
            )
        set_up_as(type(self), registry, method, self._reading_of(adata, manager))
        return registry

    def _register_data(self, adata: AnnOrMuData, registry: dict[str, Any]) -> None:
        """Register data with this model as a registry says; their set-up with the class stays as it was."""
        known = self._own_managers.get(adata.uns.get(SCVI_UUID_KEY))
        copy_if_view(adata)
        if known is not None and known.adata is not adata:
            del adata.uns[SCVI_UUID_KEY]  # a copy, which gets an entry of its own
        set_up = self._setup_adata_manager_store  # type: ignore[attr-defined]
        before = set_up.get(adata.uns.get(SCVI_UUID_KEY))
        setup = getattr(type(self), registry["setup_method_name"])
        setup(adata, source_registry=registry, **registry["setup_args"])
        key = adata.uns[SCVI_UUID_KEY]
        manager = set_up.pop(key)
        if before is not None and before.adata is adata:
            set_up[key] = before
        self._register_manager_for_instance(manager)  # type: ignore[attr-defined]
        if self.adata_manager is None:  # type: ignore[attr-defined]
            self._adata, self._adata_manager, self._adopted = adata, manager, True

    def _read_annotations(self) -> None:
        """Read labels and perturbations of the model's own data again: they may have been mended since the last training."""
        manager = self.adata_manager  # type: ignore[attr-defined]
        registered = manager.registry["field_registries"]
        for field in manager.fields:
            if field.registry_key in (c.LABELS_KEY, c.PERTURBATION_KEY):
                known = registered[field.registry_key]["state_registry"]
                registered[field.registry_key]["state_registry"] = field.transfer_field(known, manager.adata)

    def _attach(self, adata: AnnOrMuData) -> None:
        """Make data the model's own, by its own registry."""
        self._register_data(adata, self.registry_)  # type: ignore[attr-defined]
        self.adata = adata
