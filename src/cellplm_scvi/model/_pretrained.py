"""Pre-trained weights: loading the published format and our own, and writing the latter."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from contextlib import nullcontext, suppress
from copy import deepcopy
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Self

import numpy as np
import scvi
import torch
from anndata import AnnData

from cellplm_scvi import _constants as c
from cellplm_scvi._compat import SCVI_UUID_KEY, AnnOrMuData, parse_device_args
from cellplm_scvi.data._checks import some
from cellplm_scvi.data._fields import CovariateField
from cellplm_scvi.data._vocabulary import MATCH_KEY, ORGANISM_KEY, UNNAMED_KEY
from cellplm_scvi.module import PublishedModule
from cellplm_scvi.nn.published import PublishedConfig
from cellplm_scvi.pretrained import (
    OwnCheckpoint,
    PretrainedFileError,
    PretrainedReport,
    PublishedCheckpoint,
    read_own,
    read_published,
    resolve,
    write_own,
)
from cellplm_scvi.pretrained._own import CONFIG_FILE, WEIGHTS_FILE, check_state

from ._extension import describe_added, extend, unknown_categories, unknown_genes, unseen_is_expected

if TYPE_CHECKING:
    from cellplm_scvi.genes._tables import Organism
    from cellplm_scvi.module import CellPLMModule

    from ._cellplm import CellPLM

#: the argument of ``setup_anndata`` behind each registered covariate
KEY_ARGUMENTS = {
    c.BATCH_KEY: "batch_key",
    c.PLATFORM_KEY: "platform_key",
    c.DATASET_KEY: "dataset_key",
    c.SAMPLE_KEY: "sample_key",
}
#: constructor's arguments that count repeated parts: none can exceed the number of weights in a file
DEPTHS = ("n_layers", "n_decoder_layers")


class PretrainedMixin:
    """Loads and saves pre-trained weights."""

    module: CellPLMModule
    pretrained_report_: dict[str, Any] | None = None

    @classmethod
    def from_pretrained(
        cls,
        path_or_name: str | Path | CellPLM,
        adata: AnnOrMuData | None = None,
        *,
        new_categories: Literal["mean", "add"] = "mean",
        new_genes: Literal["ignore", "add"] = "ignore",
        organism: Organism = "human",
        revision: str | None = None,
        cache_dir: str | Path | None = None,
        accelerator: str = "auto",
        device: int | str = "auto",
        **setup: Any,
    ) -> Self:
        """Load pre-trained weights: the published files, or a folder that :meth:`save_pretrained` wrote.

        Nothing in the files is executed, and their sizes, shapes and values are checked before a model is built.
        :attr:`pretrained_report` says what became of each of their entries.

        The model embeds any AnnData of raw counts at once. Its genes may be any subset, in any order, named by Ensembl id
        (with or without version) or by symbol, see :func:`cellplm_scvi.genes.map_genes`. How they matched is logged; a
        warning says so if they hold less than half of the counts.

        To train it further on the AnnData with :meth:`train`, let it learn what is new there with ``new_categories`` and
        ``new_genes``.

        Parameters
        ----------
        path_or_name
            A folder that :meth:`save_pretrained` wrote; the common prefix, with its folder, of a published model's
            ``PREFIX.config.json`` and ``PREFIX.best.ckpt``; ``"owner/name"`` on the Hugging Face hub; or a trained model,
            which stays as it is.
        adata
            AnnData to attach; it need not be set up. ``None``: pass it to each method, such as
            :meth:`get_latent_representation`.
        new_categories
            What batches, platforms and data sets that the model does not know contribute to the decoder: the ``"mean"`` of
            those that it knows, or, with ``"add"``, a contribution of their own, which starts there.
        new_genes
            Whether to ``"ignore"`` genes that the model does not know, or to ``"add"`` them. An added gene starts with an
            embedding of zero and at its share of the counts; embeddings of cells are not changed by it before training.
        organism
            Whose genes the data name: ``"human"``, or ``"mouse"`` to use their human orthologues.
        revision, cache_dir
            Of the hub.
        accelerator, device
            Where to put the model, as in :meth:`load`.
        **setup
            Arguments of :meth:`setup_anndata`, such as ``batch_key="donor"``; by default those that ``adata`` was set up
            with, if it was, and those that the model was saved with.

        Returns
        -------
        The model, with the weights of the files.

        Raises
        ------
        FileNotFoundError
            If there is no such model.
        PretrainedFileError
            If a file is truncated, corrupt, does not fit the other, or would have to be executed to be read.
        ValueError
            If no gene of ``adata`` is among those of the model.

        Examples
        --------
        >>> model = CellPLM.from_pretrained("ckpt/20230926_85M", adata, sample_key="section")
        >>> adata.obsm["X_cellplm"] = model.get_latent_representation()

        >>> model = CellPLM.from_pretrained("folder", adata, batch_key="donor", new_categories="add", new_genes="add")
        >>> model.train(freeze="encoder")
        """
        check_choices(new_categories=new_categories, new_genes=new_genes)
        adding = new_categories == "add" or new_genes == "add"
        if adding and adata is None:
            raise ValueError("Pass the AnnData whose categories or genes are to be added.")
        with unseen_is_expected() if adding else nullcontext():
            model = cls._attached(path_or_name, adata, setup, organism, revision, cache_dir, accelerator, device)
        if not adding:
            return model
        categories = unknown_categories(model) if new_categories == "add" else {}
        genes = unknown_genes(model) if new_genes == "add" else []
        model = extend(model, categories, genes) if categories or genes else model
        report = model.pretrained_report_ or {}
        model.pretrained_report_ = report | {"notes": [*report["notes"], *describe_added(categories, genes)]}
        return model

    @classmethod
    def _attached(
        cls,
        source: str | Path | CellPLM,
        adata: AnnOrMuData | None,
        setup: dict[str, Any],
        organism: Organism | None = None,
        revision: str | None = None,
        cache_dir: str | Path | None = None,
        accelerator: str = "auto",
        device: int | str = "auto",
    ) -> Self:
        """The model of the files, or a copy of a model, with an AnnData."""
        method, arguments = cls._setup_of(adata, setup)
        if isinstance(source, PretrainedMixin):
            registry, init, state, report = source._parts()
            file = "the model"
        else:
            registry, init, state, report, file = cls._read(source, revision, cache_dir)
        _set_up_as(registry, method, arguments, organism, inspect.signature(cls.setup_anndata).parameters)  # type: ignore[attr-defined]
        model = cls._build(registry, init, state, file)
        model.pretrained_report_ = report
        _, _, where = parse_device_args(
            accelerator=accelerator, devices=device, return_device="torch", validate_single_device=True
        )
        model.to_device(where)  # type: ignore[attr-defined]
        if adata is not None:
            model.adata = adata  # type: ignore[attr-defined]
        return model

    @classmethod
    def _read(cls, path_or_name: str | Path, revision: str | None, cache_dir: str | Path | None) -> tuple[Any, ...]:
        """Registry, arguments of the constructor, weights and report of a model's files, and the name of one of them."""
        files = resolve(path_or_name, revision=revision, cache_dir=cache_dir)
        if files.format == "published":
            found = read_published(files.config, files.weights, source=files.source)
            registry = published_registry(found, cls.__name__)
            init: dict[str, Any] = {"published": found.config.to_dict()}
            state, report = found.state, found.report.to_dict()
        else:
            own = read_own(files.config, files.weights)
            if own.model != cls.__name__:
                raise PretrainedFileError(
                    f"{files.config.name} is of a {own.model[:60]}: load it with {own.model[:60]}.from_pretrained."
                )
            registry, init, state = own.registry, own.init, own.state
            report = _report_of(own, files.source)
        return registry, init, state, report, files.weights.name

    def _parts(self) -> tuple[dict[str, Any], dict[str, Any], dict[str, torch.Tensor], dict[str, Any]]:
        """Registry, arguments of the constructor, weights and report, as if the model came from files."""
        if not self.is_trained_:  # type: ignore[attr-defined]
            raise ValueError("This model is not trained: there is nothing to go on from. Call train() first.")
        init = {name: value for name, value in self.init_params_["non_kwargs"].items() if value is not None}  # type: ignore[attr-defined]
        report = PretrainedReport(
            source=f"a trained {type(self).__name__}",
            format="cellplm-scvi",
            used={name: name for name in self.module.state_dict()},
            config_used=init,
        )
        return deepcopy(_portable(self.registry_)), init, self.module.state_dict(), report.to_dict()  # type: ignore[attr-defined]

    def save_pretrained(self, folder: str | Path, *, overwrite: bool = False) -> None:
        """Write weights (safetensors) and everything else (JSON) to a folder that :meth:`from_pretrained` reads.

        Unlike :meth:`save`, reading it executes nothing. It holds names of genes, categories and ``obs`` columns, no cells.

        Parameters
        ----------
        folder
            Where to write.
        overwrite
            Whether to replace a model that is there.

        Raises
        ------
        FileExistsError
            If a model is there.
        """
        folder = Path(folder)
        there = [name for name in (CONFIG_FILE, WEIGHTS_FILE) if (folder / name).exists()]
        if there and not overwrite:
            raise FileExistsError(
                f'"{folder}" already holds {" and ".join(there)}. Pass overwrite=True to replace them.'
            )
        init = self.init_params_["non_kwargs"]  # type: ignore[attr-defined]
        # of a local path only the last part: the folder may be shared
        origin = self.pretrained_report_ and {"source": self.pretrained_report_["source"].rstrip("/").rsplit("/")[-1]}
        checkpoint = OwnCheckpoint(
            type(self).__name__,
            {name: value for name, value in init.items() if value is not None},
            _portable(self.registry_),  # type: ignore[attr-defined]
            self.module.state_dict(),
            origin,
        )
        write_own(folder, checkpoint, version("cellplm-scvi"))

    @property
    def pretrained_report(self) -> PretrainedReport | None:
        """What became of each entry of the files that the weights come from, and how the genes of the AnnData matched.

        ``None`` for a model that was built from data.
        """
        if self.pretrained_report_ is None:
            return None
        report = PretrainedReport(**self.pretrained_report_)
        manager = self.adata_manager  # type: ignore[attr-defined]
        if manager is None:
            return report
        return replace(report, genes=manager.get_state_registry(c.X_KEY).get(MATCH_KEY))

    @classmethod
    def _setup_of(cls, adata: AnnOrMuData | None, setup: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
        """Name and arguments of the set-up that the user asks for."""
        known = inspect.signature(cls.setup_anndata).parameters  # type: ignore[attr-defined]
        unknown = [name for name in setup if name not in known or name in ("adata", "kwargs")]
        if unknown:
            raise TypeError(f"from_pretrained got {some(unknown)}, which setup_anndata does not take.")
        manager = None
        if adata is not None and not setup and SCVI_UUID_KEY in adata.uns:
            with suppress(ValueError):  # a copy of an AnnData that was set up is not set up itself
                manager = cls._get_most_recent_anndata_manager(adata)  # type: ignore[attr-defined]
        if manager is not None:
            registry = manager.registry
            return registry["setup_method_name"], dict(registry["setup_args"])
        if adata is not None and not isinstance(adata, AnnData):
            raise ValueError("Call setup_mudata on the MuData first, so that it is known where its counts are.")
        return "setup_anndata", dict(setup)

    @classmethod
    def _build(cls, registry: dict[str, Any], init: dict[str, Any], state: dict[str, torch.Tensor], file: str) -> Self:
        """A model with these weights; sizes are compared before memory is taken for them."""
        deep = [name for name in DEPTHS if isinstance(init.get(name), int) and init[name] > len(state)]
        deep += [name for name in DEPTHS if (init.get("published") or {}).get(name, 0) > len(state)]
        if deep:
            raise PretrainedFileError(f"{deep[0]} is larger than the number of weights in {file}.")
        try:
            with torch.device("meta"):
                sketch = cls(registry=registry, **init)  # type: ignore[call-arg]
        except Exception as error:  # noqa: BLE001 - of values that come from a file
            raise PretrainedFileError(
                f"The configuration of {file} does not describe a model: {str(error)[:200]}"
            ) from None
        check_state(state, sketch.module.state_dict(), file)
        model = cls(registry=registry, **init)  # type: ignore[call-arg]
        model.module.load_state_dict(state)
        model.module.eval()
        model.is_trained_ = True  # type: ignore[attr-defined]
        return model

    def _build_published(self, published: dict[str, Any], max_context: int) -> None:
        """The module of a published configuration."""
        config = PublishedConfig.from_dict(published)
        n_genes = len(self.registry_["field_registries"][c.X_KEY]["state_registry"]["column_names"])  # type: ignore[attr-defined]
        if config.n_genes != n_genes:
            raise ValueError(
                f"The published configuration has {config.n_genes:,} genes and the data {n_genes:,}: load published weights "
                "with from_pretrained, which matches genes."
            )
        self._n_niche = 0
        self.module = PublishedModule(config, max_context=max_context)
        codes = ", ".join(f"{n:,} {name} categories" for name, n in config.covariates.items())
        self._model_summary_string = (
            f"CellPLM of the published architecture with {sum(p.numel() for p in self.module.parameters()):,} parameters: "
            f"{n_genes:,} genes, n_hidden: {config.n_hidden}, n_layers: {config.n_layers}, n_heads: {config.n_heads}, "
            f"n_latent: {config.n_latent}, latent: {config.latent}, "
            + (f"decoder with {codes or 'no covariates'}" if config.has_decoder else f"head: {config.head}")
        )


def published_registry(found: PublishedCheckpoint, model_name: str) -> dict[str, Any]:
    """What scvi-tools would have registered of the data that a published model was trained on."""
    config = found.config
    sizes = {c.BATCH_KEY: config.n_batches, c.PLATFORM_KEY: config.n_platforms, c.DATASET_KEY: config.n_datasets}
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
                UNNAMED_KEY: True,
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


def _set_up_as(
    registry: dict[str, Any],
    method: str,
    arguments: dict[str, Any],
    organism: str | None,
    parameters: Mapping[str, inspect.Parameter],
) -> None:
    """Let the registry ask for the set-up of the user, and match genes by what their names mean, given an organism."""
    # what the network was built for stays registered, so that it can be built again; data may lack it
    built_for = [*(KEY_ARGUMENTS[name] for name in c.COVARIATES), "spatial_key"]
    arguments = {
        name: value
        for name, value in arguments.items()
        if value is not None or name not in built_for or registry["setup_args"].get(name) is None
    }
    _admit_covariates(registry, arguments)
    if arguments and method != registry["setup_method_name"]:
        registry["setup_args"] = {}
    registry["setup_method_name"] = method if arguments else registry["setup_method_name"]
    registry["setup_args"] |= arguments
    if registry["setup_method_name"] == "setup_anndata":
        defaults = {name: p.default for name, p in parameters.items() if p.default is not inspect.Parameter.empty}
        unknown = [name for name in registry["setup_args"] if name not in defaults]
        if unknown:
            raise PretrainedFileError(f"The set-up of the file has unknown arguments ({some(unknown)}).")
        registry["setup_args"] = defaults | registry["setup_args"]
    fields = registry["field_registries"]
    if organism is not None:
        fields[c.X_KEY]["state_registry"][ORGANISM_KEY] = organism
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


def check_choices(*, new_categories: str, new_genes: str) -> None:
    """Raise if an option is not one of its words."""
    if new_categories not in ("mean", "add"):
        raise ValueError(f'new_categories="{new_categories}" is not "mean" or "add".')
    if new_genes not in ("ignore", "add"):
        raise ValueError(f'new_genes="{new_genes}" is not "ignore" or "add".')


def _portable(registry: Mapping[str, Any]) -> dict[str, Any]:
    """The registry without what belongs to one AnnData."""
    fields = {}
    for name, field in registry["field_registries"].items():
        state = {key: value for key, value in field["state_registry"].items() if key != MATCH_KEY}
        if CovariateField.N_KNOWN_KEY in state:
            # samples carry no parameters, nor do categories that the model was not built with
            n_known = 0 if name == c.SAMPLE_KEY else state[CovariateField.N_KNOWN_KEY]
            known = state[CovariateField.CATEGORICAL_MAPPING_KEY][:n_known]
            state |= {CovariateField.N_KNOWN_KEY: n_known, CovariateField.CATEGORICAL_MAPPING_KEY: known}
        fields[name] = {**field, "data_registry": _plain_dict(field["data_registry"]), "state_registry": state}
    return {**{key: value for key, value in registry.items() if key != "field_registries"}, "field_registries": fields}


def _plain_dict(value: Any) -> dict[str, Any]:
    return {key: value[key] for key in value}


def _report_of(own: OwnCheckpoint, source: str) -> dict[str, Any]:
    """Of a folder of our own, which may remember where its weights once came from."""
    notes = [f"{len(own.registry['field_registries'][c.X_KEY]['state_registry']['column_names']):,} genes"]
    if own.origin is not None:
        notes.append(f"saved from a model that was loaded from {own.origin['source'][:200]}")
    report = PretrainedReport(
        source=source,
        format="cellplm-scvi",
        used={name: name for name in own.state},
        config_used=own.init,
        notes=notes,
    )
    return report.to_dict()
