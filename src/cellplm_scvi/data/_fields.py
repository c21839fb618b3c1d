"""How data of an AnnData are registered with scvi-tools, and matched when a model meets new data.

Columns of ``obs`` that tell groups of cells are in ``_categories``.
"""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any

import numpy as np
import pandas as pd
from anndata import AnnData
from scvi.data.fields import (
    BaseAnnDataField,
    LayerField,
    MuDataWrapper,
    NumericalObsField,
    ObsmField,
)

from cellplm_scvi import _constants as c

from ._categories import AnnotationField, CovariateField, PerturbationField, SampleField
from ._checks import check_column, check_coordinates, check_counts, check_library_sizes, check_names, dense, some, warn
from ._vocabulary import MATCH_KEY, N_GIVEN_KEY, ORGANISM_KEY, report_match

#: below this share of the model's genes, new data get a warning that says so
FEW_GENES = 0.5


class CountsField(LayerField):
    """Raw counts: every value is checked, the user's matrix is left as it is, genes are matched by name."""

    def __init__(self, registry_key: str, layer: str | None) -> None:
        super().__init__(registry_key, layer, is_count_data=False, correct_data_format=False)

    @property
    def where(self) -> str:
        return "adata.X" if self.attr_key is None else f'adata.layers["{self.attr_key}"]'

    def validate_field(self, adata: AnnData) -> None:
        check_names(adata)
        if self.attr_key is not None and self.attr_key not in adata.layers:
            layers = [name for name in adata.layers.keys() if name is not None]
            raise ValueError(
                f'layer="{self.attr_key}" is not a layer of the AnnData, which has {some(layers) or "none"}. Where raw counts '
                "are in another layer, or in X, set up this AnnData with that `layer=`, or without it."
            )
        if self.attr_key is None and adata.X is None:
            raise ValueError("adata.X is None. Pass the layer that holds the counts with `layer=`.")
        super().validate_field(adata)
        check_counts(self.get_field_data(adata), self.where)

    def transfer_field(self, state_registry: dict, adata_target: AnnData, **kwargs: Any) -> dict:
        self.validate_field(adata_target)
        genes = pd.Index(state_registry[self.COLUMN_NAMES_KEY])
        state = {**state_registry, self.N_OBS_KEY: adata_target.n_obs, N_GIVEN_KEY: adata_target.n_vars}
        if (organism := state.get(ORGANISM_KEY)) is None:
            report_genes(genes, adata_target.var_names)
            return state
        counts = self.get_field_data(adata_target)
        return {**state, MATCH_KEY: report_match(genes, adata_target.var_names, counts, organism)}


def report_genes(known: pd.Index, given: pd.Index, where: str = "this AnnData") -> None:
    """Say how the genes of new data match those of the model; raise if none does."""
    n_shared = int(known.isin(given).sum())
    if n_shared == 0:
        raise ValueError(
            f"None of the model's {len(known):,} genes (such as {some(known)}) is among the {len(given):,} genes of "
            f"{where} (such as {some(given)}). Use the same kind of gene identifiers in var_names."
        )
    parts = []
    if n_shared < len(known):
        absent = known[~known.isin(given)]
        parts.append(
            f"{len(absent):,} of the model's {len(known):,} genes {'is' if len(absent) == 1 else 'are'} not in "
            f"{where} ({some(absent)}) and {'counts' if len(absent) == 1 else 'count'} as not "
            "measured"
        )
    if n_shared < len(given):
        unknown = given[~given.isin(known)]
        parts.append(
            f"{len(unknown):,} of its genes {'is' if len(unknown) == 1 else 'are'} unknown to the model "
            f"({some(unknown)}) and {'is' if len(unknown) == 1 else 'are'} not used"
        )
    if parts:
        few = " These are few: results may be poor." if n_shared < FEW_GENES * len(known) else ""
        warn("; ".join(parts) + "." + few)


class CoordinatesField(ObsmField):
    """Positions of cells; a row of NaN, or new data without the key, means no position."""

    N_DIMS_KEY = "n_dims"

    def validate_field(self, adata: AnnData) -> None:
        if self.attr_key not in adata.obsm:
            warn(f'This AnnData has no obsm["{self.attr_key}"]: its cells have no position.')
            return
        check_coordinates(dense(adata.obsm[self.attr_key]), self.attr_key, adata.obs_names)

    def register_field(self, adata: AnnData) -> dict:
        if self.attr_key not in adata.obsm:
            raise KeyError(
                f'spatial_key="{self.attr_key}" is not in adata.obsm, which has {some(list(adata.obsm)) or "nothing"}.'
            )
        self.validate_field(adata)
        return {self.N_DIMS_KEY: adata.obsm[self.attr_key].shape[1]}

    def transfer_field(self, state_registry: dict, adata_target: AnnData, **kwargs: Any) -> dict:
        self.validate_field(adata_target)
        if self.attr_key in adata_target.obsm:
            coordinates, n_dims = dense(adata_target.obsm[self.attr_key]), state_registry[self.N_DIMS_KEY]
            check_coordinates(coordinates, self.attr_key, adata_target.obs_names, n_dims)
        return state_registry

    def get_summary_stats(self, state_registry: dict) -> dict:
        return {"n_spatial_dims": state_registry[self.N_DIMS_KEY]}


class SizeFactorField(NumericalObsField):
    """True library size of each cell."""

    def validate_field(self, adata: AnnData) -> None:
        check_library_sizes(check_column(adata, self.attr_key, "size_factor_key"), self.attr_key)


class MeasuredGenesField(BaseAnnDataField):
    """Which genes each data set measured: a boolean table ``adata.varm[key]``, genes x categories of the data set.

    On new data the table may be absent: every gene that the AnnData holds then counts as measured.
    """

    def __init__(self, registry_key: str, attr_key: str, dataset_key: str) -> None:
        super().__init__()
        self._registry_key, self._attr_key, self.dataset_key = registry_key, attr_key, dataset_key

    registry_key = property(lambda self: self._registry_key)
    attr_name = property(lambda self: "varm")
    attr_key = property(lambda self: self._attr_key)
    is_empty = False

    def validate_field(self, adata: AnnData) -> None:
        if self.attr_key not in adata.varm:
            return
        table = adata.varm[self.attr_key]
        if not isinstance(table, pd.DataFrame):
            raise TypeError(
                f'varm["{self.attr_key}"] is a {type(table).__name__}; a DataFrame is needed whose columns are the '
                f'categories of obs["{self.dataset_key}"].'
            )
        if any(dtype != np.dtype(bool) for dtype in table.dtypes):
            found = ", ".join(sorted({str(dtype) for dtype in table.dtypes if dtype != np.dtype(bool)}))
            raise TypeError(
                f'varm["{self.attr_key}"] has columns of the type {found}; it must be bool. If they hold True and False (or '
                f'1 and 0) alone: adata.varm["{self.attr_key}"] = adata.varm["{self.attr_key}"].astype(bool).'
            )
        if self.dataset_key not in adata.obs:  # of a MuData, in another place: see `CellTable`
            return
        categories = adata.obs[self.dataset_key].astype(str).unique()
        absent = [name for name in categories if name not in table.columns.astype(str)]
        if absent:
            raise ValueError(
                f'varm["{self.attr_key}"] has no column for the data set{"s" * (len(absent) > 1)} {some(absent)} of '
                f'obs["{self.dataset_key}"].'
            )
        empty = [name for name in categories if not table.loc[:, table.columns.astype(str) == name].to_numpy().any()]
        if empty:
            raise ValueError(
                f'varm["{self.attr_key}"]: no gene is measured in the data set{"s" * (len(empty) > 1)} {some(empty)}.'
            )

    def register_field(self, adata: AnnData) -> dict:
        if self.attr_key not in adata.varm:
            raise KeyError(
                f'measured_genes_key="{self.attr_key}" is not in adata.varm, which has {some(list(adata.varm)) or "nothing"}.'
            )
        self.validate_field(adata)
        return {}

    def transfer_field(self, state_registry: dict, adata_target: AnnData, **kwargs: Any) -> dict:
        self.validate_field(adata_target)
        return state_registry

    def get_summary_stats(self, state_registry: dict) -> dict:
        return {}

    def view_state_registry(self, state_registry: dict) -> None:
        return None


MuDataCountsField = MuDataWrapper(CountsField)
MuDataCovariateField = MuDataWrapper(CovariateField)
MuDataSampleField = MuDataWrapper(SampleField)
MuDataAnnotationField = MuDataWrapper(AnnotationField)
MuDataPerturbationField = MuDataWrapper(PerturbationField)
MuDataCoordinatesField = MuDataWrapper(CoordinatesField)
MuDataSizeFactorField = MuDataWrapper(SizeFactorField)
MuDataMeasuredGenesField = MuDataWrapper(MeasuredGenesField)


def make_fields(
    *,
    layer: str | None,
    batch_key: str | None,
    platform_key: str | None,
    dataset_key: str | None,
    sample_key: str | None,
    spatial_key: str | None,
    labels_key: str | None,
    unlabeled_category: str,
    perturbation_key: str | None,
    control_category: str,
    size_factor_key: str | None,
    measured_genes_key: str | None,
    modalities: dict[str, str] | None = None,
) -> list[BaseAnnDataField]:
    """The fields for the arguments of ``setup_anndata``; with ``modalities`` those for a MuData."""
    keys = {
        "layer": layer,
        "batch_key": batch_key,
        "platform_key": platform_key,
        "dataset_key": dataset_key,
        "sample_key": sample_key,
        "spatial_key": spatial_key,
        "labels_key": labels_key,
        "perturbation_key": perturbation_key,
        "size_factor_key": size_factor_key,
        "measured_genes_key": measured_genes_key,
    }
    for argument, key in keys.items():
        if not isinstance(key, Hashable):
            raise TypeError(f"{argument}={key!r} must be one name, not several.")
    if measured_genes_key is not None and dataset_key is None:
        raise ValueError("measured_genes_key says which genes each data set measured: pass dataset_key too.")
    mu = modalities is not None

    if modalities is not None:  # the table has a row a gene
        modalities = {**modalities, "measured_genes_key": modalities["rna_layer"]}

    def field(single: type, multi: type, argument: str, *args: Any, **kwargs: Any) -> BaseAnnDataField:
        if modalities is None:
            return single(*args, **kwargs)
        return multi(*args, mod_key=modalities.get(argument), **kwargs)

    def covariate(key: str, attr: str | None, argument: str) -> BaseAnnDataField:
        return field(CovariateField, MuDataCovariateField, argument, key, attr, argument)

    sample, sample_argument = (sample_key, "sample_key") if sample_key is not None else (batch_key, "batch_key")
    fields = [
        field(CountsField, MuDataCountsField, "rna_layer" if mu else "layer", c.X_KEY, layer),
        covariate(c.BATCH_KEY, batch_key, "batch_key"),
        field(SampleField, MuDataSampleField, sample_argument, c.SAMPLE_KEY, sample, sample_argument),
    ]
    if platform_key is not None:
        fields.append(covariate(c.PLATFORM_KEY, platform_key, "platform_key"))
    if dataset_key is not None:
        fields.append(covariate(c.DATASET_KEY, dataset_key, "dataset_key"))
    if spatial_key is not None:
        fields.append(field(CoordinatesField, MuDataCoordinatesField, "spatial_key", c.COORDINATES_KEY, spatial_key))
    if labels_key is not None:
        fields.append(
            field(AnnotationField, MuDataAnnotationField, "labels_key", c.LABELS_KEY, labels_key, unlabeled_category)
        )
    if perturbation_key is not None:
        fields.append(
            field(
                PerturbationField,
                MuDataPerturbationField,
                "perturbation_key",
                c.PERTURBATION_KEY,
                perturbation_key,
                control_category,
            )
        )
    if size_factor_key is not None:
        fields.append(
            field(SizeFactorField, MuDataSizeFactorField, "size_factor_key", c.SIZE_FACTOR_KEY, size_factor_key)
        )
    if measured_genes_key is not None:
        fields.append(
            field(
                MeasuredGenesField,
                MuDataMeasuredGenesField,
                "measured_genes_key",
                c.MEASURED_GENES_KEY,
                measured_genes_key,
                dataset_key,
            )
        )
    return fields
