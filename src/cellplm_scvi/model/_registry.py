"""Registries of data set-ups as pre-trained models carry them, and as users' data change them."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import numpy as np
import pandas as pd
import scvi
from anndata import AnnData
from mudata import MuData
from scvi.data import AnnDataManager

from cellplm_scvi import _constants as c
from cellplm_scvi._compat import SCVI_UUID_KEY, AnnOrMuData, copy_if_view
from cellplm_scvi.data._categories import ABSENT, CovariateField, as_text
from cellplm_scvi.data._checks import check_column, some
from cellplm_scvi.data._vocabulary import EARLIER_KEY, OF_DATA, UNNAMED_KEY
from cellplm_scvi.pretrained import PretrainedFileError, PublishedCheckpoint
from cellplm_scvi.pretrained._own import CONFIG_FILE

#: the argument of ``setup_anndata`` behind each registered covariate
KEY_ARGUMENTS = {
    c.BATCH_KEY: "batch_key",
    c.PLATFORM_KEY: "platform_key",
    c.DATASET_KEY: "dataset_key",
    c.SAMPLE_KEY: "sample_key",
}
#: where the keys are that data need not have
OPTIONAL_KEYS = {
    **dict.fromkeys(KEY_ARGUMENTS.values(), "obs"),
    "labels_key": "obs",
    "perturbation_key": "obs",
    "size_factor_key": "obs",
    "spatial_key": "obsm",
    "measured_genes_key": "varm",
}
#: words that go with keys
WORDS = {"labels_key": "unlabeled_category", "perturbation_key": "control_category"}
#: arguments of ``setup_anndata`` that a network has parts for
BUILT_FOR = (*(KEY_ARGUMENTS[name] for name in c.COVARIATES), "spatial_key")


def setup_of(
    model_class: type[Any], adata: AnnOrMuData | None, setup: Mapping[str, Any], saved: Mapping[str, Any]
) -> tuple[str | None, dict[str, Any]]:
    """Name and arguments of the set-up that the user asks for; no name: the one that the model was saved with.

    Of data that were set up, these are the keys that they were set up with, with ``setup`` in place of them.
    """
    known = inspect.signature(model_class.setup_anndata).parameters
    unknown = [name for name in setup if name not in known or name in ("adata", "kwargs")]
    if unknown:
        raise TypeError(f"Unexpected argument: {some(unknown)}, which setup_anndata does not take either.")
    if adata is None:
        return "setup_anndata" if setup else None, dict(setup)
    if not isinstance(adata, AnnData | MuData):
        raise TypeError(f"adata is of type {type(adata).__name__}; an AnnData of raw counts is needed.")
    manager = manager_of(model_class, adata)
    if manager is not None and manager.adata is not adata:
        copy_if_view(adata)
        del adata.uns[SCVI_UUID_KEY]  # a copy of what was set up, which gets an entry of its own
    if manager is None and not isinstance(adata, AnnData):
        raise ValueError("Call setup_mudata on the MuData first, so that it is known where its counts are.")
    method, own = "setup_anndata", {}
    if manager is not None:
        method, own = manager.registry["setup_method_name"], _named(manager.registry["setup_args"], adata, saved)
    for argument, key in setup.items():  # data that come later may lack a column, but not these
        place = OPTIONAL_KEYS.get(argument)
        if not isinstance(adata, AnnData) or key is None or place is None:
            continue
        if place == "obs":
            check_column(adata, key, argument)
        elif key not in (held := getattr(adata, place)):
            raise KeyError(
                f'{argument}="{key}" is not a key of adata.{place}, which has {some(list(held), 12) or "none"}.'
            )
    return method, {**own, **setup}


def manager_of(model_class: type[Any], adata: AnnOrMuData) -> AnnDataManager | None:
    """The set-up of data, or of what they are a copy of, with this class or one that it builds on."""
    stores = (getattr(cls, "_setup_adata_manager_store", {}) for cls in model_class.__mro__)
    key = adata.uns.get(SCVI_UUID_KEY)
    return next((store[key] for store in stores if key in store), None)


def is_copy(model_class: type[Any], adata: AnnOrMuData) -> bool:
    """Whether data bear the identifier of others, which were set up, or which a model has seen, before they were copied."""
    key = adata.uns.get(SCVI_UUID_KEY)
    known: list[AnnDataManager] = []
    for cls in (*model_class.__mro__, *model_class.__subclasses__()):
        stores = (
            getattr(cls, "_setup_adata_manager_store", {}),
            *getattr(cls, "_per_instance_manager_store", {}).values(),
        )
        known += [store[key] for store in stores if key in store]
    return bool(known) and not any(manager.adata is adata for manager in known)


def reading(registry: Mapping[str, Any], adata: AnnOrMuData, own: Mapping[str, Any] | None) -> dict[str, Any]:
    """Arguments of the set-up by which a model reads data that are not its own.

    A column has the name that the data were set up with, else the model's, else one that the model had before: the first
    that the data have. Data that were set up without it are read without it if the model was without it once.

    Parameters
    ----------
    registry
        Of the model.
    adata
        The data.
    own
        Arguments that the data were set up with, if they were.
    """
    saved = registry["setup_args"]
    if own is None:
        own = {"layer": saved["rna_layer"]} if isinstance(adata, AnnData) and "rna_layer" in saved else {}
    arguments = {name: own[name] for name in ("layer", "rna_layer", "modalities") if name in own}
    modalities = arguments.get("modalities") or saved.get("modalities") or {}
    modalities = {**modalities, "measured_genes_key": modalities.get("rna_layer")}
    earlier = registry["field_registries"][c.X_KEY]["state_registry"].get(EARLIER_KEY, {})
    for name, place in OPTIONAL_KEYS.items():
        # the model knows samples without having parts for them
        default = own.get(name, saved.get(name)) if name == "sample_key" else saved.get(name)
        if saved.get(name) is None:
            arguments[name] = default
            continue
        if name in own and own[name] in (None, ABSENT) and None in earlier.get(name, []):
            # without it on purpose, as the model was at that time
            arguments[name] = ABSENT if name in BUILT_FOR else None
            continue
        holder = getattr(part_of(adata, modalities.get(name)), place)
        keys = (own.get(name), saved[name], *earlier.get(name, []))
        arguments[name] = next((key for key in keys if key is not None and key in holder), default)
        if name in WORDS and own.get(name) is not None and WORDS[name] in own:
            arguments[WORDS[name]] = own[WORDS[name]]
    return arguments


def part_of(adata: AnnOrMuData, modality: str | None) -> AnnOrMuData:
    """A modality of a MuData, or all of it."""
    return adata if isinstance(adata, AnnData) else adata.mod.get(modality, adata)


def columns_read(adata: AnnOrMuData, arguments: Mapping[str, Any]) -> dict[str, Any]:
    """What stands in the columns of ``obs`` that a set-up names, to tell whether it has changed since."""
    modalities = arguments.get("modalities") or {}
    found: dict[str, Any] = {}
    for name in (*KEY_ARGUMENTS.values(), *WORDS):
        key = arguments.get(name)
        obs = part_of(adata, modalities.get(name)).obs
        if key is not None and key in obs:
            codes, names = pd.factorize(obs[key])
            found[name] = key, hash(codes.tobytes()), list(map(str, names))
    return found


def _named(own: Mapping[str, Any], adata: AnnOrMuData, saved: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments that data were set up with, without keys that they left open and the model has a name for.

    A key of the model counts if the data have it; that of the labels always, for without the column they are unknown.
    """
    arguments = dict(own)
    for name, place in OPTIONAL_KEYS.items():
        key = saved.get(name)
        if own.get(name) is None and key is not None and (name == "labels_key" or key in getattr(adata, place)):
            arguments.pop(name, None)
            arguments.pop(WORDS.get(name, ""), None)
    return arguments


def set_up_as(
    model_class: type[Any], registry: dict[str, Any], method: str | None, arguments: Mapping[str, Any]
) -> None:
    """Let a registry ask data for the set-up of the user; what the user leaves open stays as the model was saved."""
    method = method or registry["setup_method_name"]
    parameters = inspect.signature(getattr(model_class, method)).parameters.items()
    defaults = {name: p.default for name, p in parameters if p.default is not inspect.Parameter.empty}
    saved = registry["setup_args"]
    if method == registry["setup_method_name"] and (unknown := [name for name in saved if name not in defaults]):
        raise PretrainedFileError(f"{CONFIG_FILE}: setup_args has unknown arguments ({some(unknown)}).")
    # what the network was built for stays registered, so that it can be built again, even if these data lack it
    arguments = {name: v for name, v in arguments.items() if v is not None or name not in BUILT_FOR}
    _admit_covariates(registry, arguments)
    registry["setup_method_name"] = method
    registry["setup_args"] = {name: arguments.get(name, saved.get(name, defaults[name])) for name in defaults}
    fields = registry["field_registries"]
    counts = fields[c.X_KEY]["state_registry"]
    for name in OPTIONAL_KEYS:
        if name in saved and name in registry["setup_args"] and registry["setup_args"][name] != (key := saved[name]):
            earlier = counts.get(EARLIER_KEY, {})
            others = [other for other in earlier.get(name, []) if other != key]
            counts[EARLIER_KEY] = earlier | {name: [key, *others]}
    for name, argument in KEY_ARGUMENTS.items():
        if name in fields and arguments.get(argument) is not None:
            fields[name]["state_registry"][CovariateField.ORIGINAL_ATTR_KEY] = arguments[argument]


def _admit_covariates(registry: dict[str, Any], arguments: Mapping[str, Any]) -> None:
    """Let the data have covariates that the model was set up without: all their categories are then unseen."""
    fields = registry["field_registries"]
    for name in c.COVARIATES:
        if arguments.get(KEY_ARGUMENTS[name]) is None or registry["setup_args"].get(KEY_ARGUMENTS[name]) is not None:
            continue
        state = fields[name]["state_registry"] if name in fields else {CovariateField.N_KNOWN_KEY: 0}
        if state.get(UNNAMED_KEY):
            continue
        n_known = state[CovariateField.N_KNOWN_KEY]
        names = np.asarray([f"(without {KEY_ARGUMENTS[name]})"] * n_known, dtype=object)
        state = state | {CovariateField.CATEGORICAL_MAPPING_KEY: names, CovariateField.N_KNOWN_KEY: n_known}
        fields[name] = {
            "data_registry": {"attr_name": "obs", "attr_key": f"_scvi_{name}"},
            "summary_stats": {f"n_{name}": n_known},
            **fields.get(name, {}),
            "state_registry": state | {UNNAMED_KEY: True},
        }


def published_registry(found: PublishedCheckpoint, model_name: str) -> dict[str, Any]:
    """What scvi-tools would have registered of the data that a published model was trained on."""
    config = found.config
    sizes = {c.BATCH_KEY: config.n_batches, c.PLATFORM_KEY: config.n_platforms, c.DATASET_KEY: config.n_datasets}
    unnamed = set(sizes)
    sizes |= {c.SAMPLE_KEY: 0}
    fields: dict[str, Any] = {
        c.X_KEY: {
            "data_registry": {"attr_name": "X", "attr_key": None},
            "state_registry": {
                "n_obs": 0,
                "n_vars": len(found.genes),
                "column_names": np.asarray(found.genes, dtype=object),
            },
            "summary_stats": {"n_vars": len(found.genes), "n_cells": 0},
        }
    }
    for name, size in sizes.items():
        names = np.asarray([f"(pre-training {name} {n})" for n in range(size)], dtype=object)
        fields[name] = {
            "data_registry": {"attr_name": "obs", "attr_key": f"_scvi_{name}"},
            "state_registry": {
                CovariateField.CATEGORICAL_MAPPING_KEY: names,
                CovariateField.ORIGINAL_ATTR_KEY: f"_scvi_{name}",
                CovariateField.N_KNOWN_KEY: size,
                UNNAMED_KEY: name in unnamed,
            },
            "summary_stats": {f"n_{name}": size},
        }
    return {
        "scvi_version": scvi.__version__,
        "model_name": model_name,
        "setup_method_name": "setup_anndata",
        "setup_args": {},
        "field_registries": fields,
    }


def portable(registry: Mapping[str, Any]) -> dict[str, Any]:
    """The registry without what belongs to one AnnData."""
    fields = {}
    for name, field in registry["field_registries"].items():
        state = {key: value for key, value in field["state_registry"].items() if key not in OF_DATA}
        if CovariateField.N_KNOWN_KEY in state:
            # samples carry no parameters, nor do categories that the model was not built with
            n_known = 0 if name == c.SAMPLE_KEY else state[CovariateField.N_KNOWN_KEY]
            known = state[CovariateField.CATEGORICAL_MAPPING_KEY][:n_known]
            state |= {CovariateField.N_KNOWN_KEY: n_known, CovariateField.CATEGORICAL_MAPPING_KEY: known}
        fields[name] = {**field, "data_registry": _plain_dict(field["data_registry"]), "state_registry": state}
    # words are compared as text
    words = {name: as_text(registry["setup_args"][name]) for name in WORDS.values() if name in registry["setup_args"]}
    return {**registry, "setup_args": registry["setup_args"] | words, "field_registries": fields}


def _plain_dict(value: Any) -> dict[str, Any]:
    return {key: value[key] for key in value}
