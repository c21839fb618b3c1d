"""Columns of ``obs`` that tell groups of cells, as they are registered with scvi-tools: covariates, samples, annotations."""

from __future__ import annotations

import re
from numbers import Number
from typing import Any

import numpy as np
import pandas as pd
import rich.table
from anndata import AnnData
from scvi.data.fields import CategoricalObsField

from ._checks import check_column, check_no_missing, counted, some, warn
from ._vocabulary import UNNAMED_KEY

#: category of cells whose data have no such column
ABSENT = "(absent)"


def as_text(name: Any) -> str:
    """The name of a category as text. Whole numbers are alike in all types: missing values make those of a column floats."""
    if isinstance(name, str):
        return str(name)
    if isinstance(name, float | np.floating) and name.is_integer():
        name = int(name)
    return str(name).removesuffix(" 00:00:00")


def as_categories(column: pd.Series) -> pd.Series:
    """A column as categories that are text, numbers or truth values; others, such as dates, become text."""
    column = column.astype("category")
    names = list(column.cat.categories)
    if all(isinstance(name, str | Number | np.bool_) for name in names):
        return column
    return column.cat.rename_categories([as_text(name) for name in names])


def named_as(known: np.ndarray, column: pd.Series) -> pd.Series:
    """Categories under the names that the model knows, where only the type differs: 1, 1.0, "1" and "1.0" are the same."""
    names, there = column.cat.categories, set(known)
    renamed: dict[Any, Any] = {}
    for write in (as_text, _as_whole_number):
        by_text = {write(name): name for name in known}
        for name in names.difference([*there, *renamed], sort=False):
            new = by_text.get(write(name))
            if new is not None and new not in names and new not in renamed.values():
                renamed[name] = new
    return column.cat.rename_categories(renamed)


def _as_whole_number(name: Any) -> str:
    """The name as text, "1" for "1.0", which is what a column of floats writes."""
    return re.sub(r"^(-?\d+)\.0+$", r"\1", as_text(name))


class CovariateField(CategoricalObsField):
    """A covariate of the decoder. Categories that the model has not seen get codes past the end of its table."""

    #: number of categories that the model was built with, which a transfer to new data leaves as it is
    N_KNOWN_KEY = "n_known"

    def __init__(self, registry_key: str, attr_key: str | None, argument: str | None = None) -> None:
        super().__init__(registry_key, attr_key)
        self.argument = argument or f"{registry_key}_key"

    def validate_field(self, adata: AnnData) -> None:
        if self.is_default or (self._original_attr_key not in adata.obs and self.attr_key in adata.obs):
            return  # there are codes without a column where data came without it, see `transfer_field`
        check_no_missing(check_column(adata, self._original_attr_key, self.argument), self._original_attr_key)

    def register_field(self, adata: AnnData) -> dict:
        if self.is_default:
            self._setup_default_attr(adata)
        check_no_missing(check_column(adata, self._original_attr_key, self.argument), self._original_attr_key)
        # Unlike scvi-tools' field: categories without a cell get no code, which no cell could train.
        column = as_categories(pd.Series(adata.obs[self._original_attr_key])).cat.remove_unused_categories()
        adata.obs[self.attr_key] = column.cat.codes.astype(np.int64)
        mapping = column.cat.categories.to_numpy(copy=True)
        return {
            self.CATEGORICAL_MAPPING_KEY: mapping,
            self.ORIGINAL_ATTR_KEY: self._original_attr_key,
            self.N_KNOWN_KEY: len(mapping),
        }

    def transfer_field(self, state_registry: dict, adata_target: AnnData, **kwargs: Any) -> dict:
        known = state_registry[self.CATEGORICAL_MAPPING_KEY][: state_registry[self.N_KNOWN_KEY]]
        key = self._original_attr_key
        if self.is_default and not state_registry.get(UNNAMED_KEY):
            self._setup_default_attr(adata_target)
        elif self.is_default or key not in adata_target.obs:
            if not state_registry.get(UNNAMED_KEY) and key != ABSENT:
                self.say_absent(key, len(known))
            adata_target.obs[self.attr_key] = np.full(adata_target.n_obs, len(known))
            return {**state_registry, self.CATEGORICAL_MAPPING_KEY: np.append(np.asarray(known, dtype=object), ABSENT)}
        self.validate_field(adata_target)
        column = named_as(known, as_categories(pd.Series(adata_target.obs[self._original_attr_key])))
        there = set(known)
        unseen = [category for category in column.cat.categories[np.unique(column.cat.codes)] if category not in there]
        named = [category for category in unseen if category != ABSENT]
        if named and not state_registry.get(UNNAMED_KEY):
            self.say_unseen(key, named, int(column.isin(named).to_numpy().sum()))
        mapping = np.concatenate([np.asarray(known, dtype=object), np.asarray(unseen, dtype=object)])
        adata_target.obs[self.attr_key] = pd.Index(mapping).get_indexer(column.astype(object)).astype(np.int64)
        return {**state_registry, self.CATEGORICAL_MAPPING_KEY: mapping}

    def say_absent(self, key: str, n_known: int) -> None:
        if n_known > 1:  # a single category has nothing to say
            warn(f'This AnnData has no obs["{key}"]: its cells get the mean {self.registry_key} code.')

    def say_unseen(self, key: str, unseen: list, n_cells: int) -> None:
        warn(
            f'obs["{key}"] has {len(unseen)} categor{"y" if len(unseen) == 1 else "ies"} that the model has not seen '
            f"({some(unseen)}): {counted(n_cells, 'cell gets', 'cells get')} the mean {self.registry_key} code."
        )

    def get_summary_stats(self, state_registry: dict) -> dict:
        return {self.count_stat_key: len(state_registry[self.CATEGORICAL_MAPPING_KEY])}

    def view_state_registry(self, state_registry: dict) -> rich.table.Table | None:
        if len(state_registry[self.CATEGORICAL_MAPPING_KEY]) > 50:
            return None
        return super().view_state_registry(state_registry)


class SampleField(CovariateField):
    """The sample of each cell. Samples carry no parameters: new ones are expected."""

    def say_absent(self, key: str, n_known: int) -> None:
        warn(f'This AnnData has no obs["{key}"]: all its cells are treated as one sample.')

    def say_unseen(self, key: str, unseen: list, n_cells: int) -> None:
        """New samples are the normal case."""


class AnnotationField(CovariateField):
    """A label or a perturbation of each cell, as text; missing values and a missing column mean ``default``.

    Data that come later may have another word for it, which is read as that of the model.
    """

    #: the word of the data that the model was set up with
    DEFAULT_KEY = "default"

    def __init__(self, registry_key: str, attr_key: str, default: str) -> None:
        super().__init__(registry_key, attr_key)
        self.default = as_text(default)

    def _codes(self, adata: AnnData, known: np.ndarray | None, default: str) -> np.ndarray:
        key = self._original_attr_key
        given = adata.obs[key] if key in adata.obs else [default] * adata.n_obs
        column = pd.Series(given, dtype=object)
        missing = column.isna().to_numpy()
        column = column.map(as_text)
        column = column.mask(missing | (column == self.default).to_numpy(), default)
        mapping = list(known) if known is not None else []
        mapping += sorted(set(column) - set(mapping))
        if default not in mapping:
            mapping.append(default)
        adata.obs[self.attr_key] = pd.Index(mapping, dtype=object).get_indexer(column).astype(np.int64)
        return np.asarray(mapping, dtype=object)

    def validate_field(self, adata: AnnData) -> None:
        """A missing column and missing values are allowed."""

    def register_field(self, adata: AnnData) -> dict:
        check_column(adata, self._original_attr_key, self.argument)
        mapping = self._codes(adata, None, self.default)
        return {
            self.CATEGORICAL_MAPPING_KEY: mapping,
            self.ORIGINAL_ATTR_KEY: self._original_attr_key,
            self.N_KNOWN_KEY: len(mapping),
            self.DEFAULT_KEY: self.default,
        }

    def transfer_field(self, state_registry: dict, adata_target: AnnData, **kwargs: Any) -> dict:
        default = state_registry.get(self.DEFAULT_KEY, self.default)
        mapping = self._codes(adata_target, state_registry[self.CATEGORICAL_MAPPING_KEY], default)
        return {**state_registry, self.CATEGORICAL_MAPPING_KEY: mapping}


def are_controls(names: np.ndarray, control: str) -> np.ndarray:
    """Which names of perturbations, (n,), mean none, (n,); names that could not be trained are none of them."""
    return np.array([str(name) == control or parts_of(name) == {control} for name in names], dtype=bool)


def parts_of(perturbation: str) -> set[str]:
    """Names of what a name of a perturbation joins by "+"."""
    return {name.strip() for name in str(perturbation).split("+")}


class PerturbationField(AnnotationField):
    """The perturbation of each cell. A missing column means ``default``, the controls; a missing value is an error."""

    def validate_field(self, adata: AnnData) -> None:
        """A missing column is allowed."""
        key = self._original_attr_key
        if key in adata.obs and (missing := pd.Series(adata.obs[key]).isna().to_numpy()).any():
            raise ValueError(
                f'obs["{key}"] has {counted(int(missing.sum()), "missing value")} (cells '
                f"{some(adata.obs_names[missing])}): these "
                f'cells cannot be told from controls. Write "{self.default}" there if they are controls; else drop them.'
            )

    def register_field(self, adata: AnnData) -> dict:
        self.validate_field(adata)
        state = super().register_field(adata)
        names = state[self.CATEGORICAL_MAPPING_KEY]
        if not np.isin(adata.obs[self.attr_key], np.flatnonzero(are_controls(names, self.default))).any():
            found = names[names != self.default]
            warn(
                f'obs["{self._original_attr_key}"] has no cell of control_category="{self.default}" (it has {some(found)}): '
                "perturbations are learned and predicted from controls."
            )
        return state

    def transfer_field(self, state_registry: dict, adata_target: AnnData, **kwargs: Any) -> dict:
        self.validate_field(adata_target)
        return super().transfer_field(state_registry, adata_target, **kwargs)
