"""Pre-trained weights: loading the published format and our own, and writing the latter."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from contextlib import nullcontext
from copy import deepcopy
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Self, get_args

import numpy as np
import scvi
import torch
from anndata import AnnData
from mudata import MuData

from cellplm_scvi import _constants as c
from cellplm_scvi._compat import SCVI_UUID_KEY, AnnOrMuData, copy_if_view, parse_device_args
from cellplm_scvi.data._checks import check_column, check_sizes, some, warn
from cellplm_scvi.data._fields import CovariateField
from cellplm_scvi.data._vocabulary import MATCH_KEY, ORGANISM_KEY, UNNAMED_KEY
from cellplm_scvi.genes._tables import Organism
from cellplm_scvi.module import PublishedModule
from cellplm_scvi.nn.published import PublishedConfig
from cellplm_scvi.pretrained import (
    OwnCheckpoint,
    PretrainedFileError,
    PretrainedReport,
    PublishedCheckpoint,
    model_card,
    read_own,
    read_published,
    resolve,
    write_own,
)
from cellplm_scvi.pretrained._own import CONFIG_FILE, WEIGHTS_FILE, check_state

from ._extension import admit_covariates, check_choices, extend, unknown_categories, unknown_genes, unseen_is_expected

if TYPE_CHECKING:
    from scvi.hub import HubModel

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
        overwrite_config: Mapping[str, Any] | None = None,
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
        overwrite_config
            Entries of a published ``PREFIX.config.json`` to replace, under their published names, such as
            ``{"objective": "imputation"}``.
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
        if organism not in get_args(Organism):
            raise ValueError(f'organism="{organism}" is not one of {some(get_args(Organism))}.')
        adding = new_categories == "add" or new_genes == "add"
        if adding and adata is None:
            raise ValueError("Pass the AnnData whose categories or genes are to be added.")
        files = {"overwrite_config": overwrite_config, "revision": revision, "cache_dir": cache_dir}
        with unseen_is_expected() if adding else nullcontext():
            model = cls._attached(path_or_name, adata, setup, organism, accelerator, device, **files)
        if not adding:
            return model
        categories = unknown_categories(model) if new_categories == "add" else {}  # type: ignore[arg-type]
        genes = unknown_genes(model) if new_genes == "add" else []  # type: ignore[arg-type]
        return extend(model, categories, genes) if categories or genes else model  # type: ignore[type-var]

    @classmethod
    def _attached(
        cls,
        source: str | Path | CellPLM,
        adata: AnnOrMuData | None,
        setup: dict[str, Any],
        organism: Organism | None = None,
        accelerator: str = "auto",
        device: int | str = "auto",
        **files: Any,
    ) -> Self:
        """The model of the files, or a copy of a model, with an AnnData."""
        if isinstance(source, PretrainedMixin):
            registry, init, state, report, file = source._parts()
        else:
            registry, init, state, report, file = cls._read(source, **files)
        method, arguments = cls._setup_of(adata, setup)
        # what the network was built for stays registered, so that it can be built again; data may lack it
        built_for = [*(KEY_ARGUMENTS[name] for name in c.COVARIATES), "spatial_key"]
        arguments = {name: key for name, key in arguments.items() if key is not None or name not in built_for}
        admit_covariates(registry, {name: arguments.get(KEY_ARGUMENTS[name]) for name in c.COVARIATES}, KEY_ARGUMENTS)
        cls._set_up_as(registry, method, arguments)
        if organism is not None:
            registry["field_registries"][c.X_KEY]["state_registry"][ORGANISM_KEY] = organism
        model = cls._build(registry, init, state, file)
        model.pretrained_report_ = report
        _, _, where = parse_device_args(
            accelerator=accelerator, devices=device, return_device="torch", validate_single_device=True
        )
        model.to_device(where)  # type: ignore[attr-defined]
        if arguments.get("spatial_key") is not None and not (model.module.spatial or model.module.absolute_position):
            warn(f'spatial_key="{arguments["spatial_key"]}" has no effect: this model was trained without positions.')
        if adata is not None:
            model.adata = adata  # type: ignore[attr-defined]
        return model

    @classmethod
    def _read(
        cls,
        path_or_name: str | Path,
        overwrite_config: Mapping[str, Any] | None = None,
        revision: str | None = None,
        cache_dir: str | Path | None = None,
    ) -> tuple[dict[str, Any], dict[str, Any], dict[str, torch.Tensor], dict[str, Any], str]:
        """Registry, arguments of the constructor, weights and report of a model's files, and the name of one of them."""
        files = resolve(path_or_name, revision=revision, cache_dir=cache_dir)
        if files.format == "published":
            found = read_published(files.config, files.weights, overwrite=overwrite_config, source=files.source)
            registry = published_registry(found, cls.__name__)
            init: dict[str, Any] = {"published": found.config.to_dict()}
            state, report = found.state, found.report.to_dict()
        elif overwrite_config:
            raise ValueError(f'overwrite_config is for published files; "{files.source}" is of our own format.')
        else:
            own = read_own(files.config, files.weights)
            if own.model != cls.__name__:
                raise PretrainedFileError(
                    f"{files.config.name} is of a {own.model[:60]}: load it with {own.model[:60]}.from_pretrained."
                )
            registry, init, state = own.registry, own.init, own.state
            report = _report_of(own, files.source)
        return registry, init, state, report, files.weights.name

    def _parts(self) -> tuple[dict[str, Any], dict[str, Any], dict[str, torch.Tensor], dict[str, Any], str]:
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
        return deepcopy(_portable(self.registry_)), init, self.module.state_dict(), report.to_dict(), "the model"  # type: ignore[attr-defined]

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
        folder = Path(folder).expanduser()
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

    def save_for_hub(
        self,
        folder: str | Path,
        *,
        license_info: str,
        description: str = "",
        references: str = "",
        save_anndata: bool = False,
        overwrite: bool = False,
    ) -> HubModel:
        """Write a folder to upload to the Hugging Face hub, from where both formats can be loaded.

        It holds what :meth:`save_pretrained` writes, for ``CellPLM.from_pretrained("owner/name")``, and what scvi-tools' hub
        wants: the model as :meth:`save` writes it, its metadata, and a model card.

        Parameters
        ----------
        folder
            Where to write.
        license_info
            Identifier of the licence of the weights, such as ``"cc-by-4.0"``.
        description, references
            Text for the card: what the model was trained on, and what to cite.
        save_anndata
            Whether to write the AnnData too. Without it, data have to be passed to ``HubModel.load_model``.
        overwrite
            Whether to replace a model that is there.

        Returns
        -------
        scvi-tools' handle of the folder, whose ``push_to_huggingface_hub("owner/name")`` uploads it.

        Raises
        ------
        ImportError
            Without the packages huggingface_hub and safetensors.
        FileExistsError
            If a model is there.
        """
        try:
            import huggingface_hub  # noqa: F401
        except ImportError:
            raise ImportError('The hub needs the package huggingface_hub: pip install "cellplm-scvi[hub]".') from None
        from scvi.hub import HubMetadata, HubModel

        folder = Path(folder).expanduser()
        self.save_pretrained(folder, overwrite=overwrite)
        # the folder is there now, and that it may be used has just been checked
        self.save(str(folder), overwrite=True, save_anndata=save_anndata)  # type: ignore[attr-defined]
        metadata = HubMetadata.from_dir(
            str(folder), anndata_version=version("anndata"), model_parent_module=type(self).__module__.split(".")[0]
        )
        registry = self.registry_  # type: ignore[attr-defined]
        card = model_card(
            type(self).__name__,
            license_info=license_info,
            description=description,
            references=references,
            summary=f"{self._model_summary_string}.",
            arguments={name: v for name, v in self.init_params_["non_kwargs"].items() if v is not None},  # type: ignore[attr-defined]
            setup={name: value for name, value in registry["setup_args"].items() if value is not None},
            statistics=dict(self.summary_stats),  # type: ignore[attr-defined]
        )
        hub_model = HubModel(str(folder), metadata=metadata, model_card=card)
        hub_model.save(overwrite=True)
        return hub_model

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
    def _setup_of(cls, adata: AnnOrMuData | None, setup: Mapping[str, Any]) -> tuple[str | None, dict[str, Any]]:
        """Name and arguments of the set-up that the user asks for; no name: the one that the model was saved with."""
        known = inspect.signature(cls.setup_anndata).parameters  # type: ignore[attr-defined]
        unknown = [name for name in setup if name not in known or name in ("adata", "kwargs")]
        if unknown:
            raise TypeError(f"from_pretrained got {some(unknown)}, which setup_anndata does not take.")
        if adata is None:
            return "setup_anndata" if setup else None, dict(setup)
        if not isinstance(adata, AnnData | MuData):
            raise TypeError(f"adata is of type {type(adata).__name__}; an AnnData of raw counts is needed.")
        manager = cls._setup_adata_manager_store.get(adata.uns.get(SCVI_UUID_KEY))  # type: ignore[attr-defined]
        if manager is not None and manager.adata is not adata:
            copy_if_view(adata, copy_if_view=True)
            del adata.uns[SCVI_UUID_KEY]  # a copy of what was set up, which gets an entry of its own
        if manager is not None and not setup:
            registry = manager.registry
            return registry["setup_method_name"], dict(registry["setup_args"])
        if not isinstance(adata, AnnData):
            raise ValueError("Call setup_mudata on the MuData first, so that it is known where its counts are.")
        for argument, key in setup.items():  # data that come later may lack a column, but not these
            if key is not None and argument in KEY_ARGUMENTS.values():
                check_column(adata, key, argument)
        return "setup_anndata", dict(setup)

    @classmethod
    def _set_up_as(cls, registry: dict[str, Any], method: str | None, arguments: dict[str, Any]) -> None:
        """Let a registry ask data for the set-up of the user; what the user leaves open stays as the model was saved."""
        method = method or registry["setup_method_name"]
        parameters = inspect.signature(getattr(cls, method)).parameters.items()
        defaults = {name: p.default for name, p in parameters if p.default is not inspect.Parameter.empty}
        saved = registry["setup_args"]
        if method == registry["setup_method_name"] and (unknown := [name for name in saved if name not in defaults]):
            raise PretrainedFileError(f"{CONFIG_FILE}: setup_args has unknown arguments ({some(unknown)}).")
        registry["setup_method_name"] = method
        registry["setup_args"] = {name: arguments.get(name, saved.get(name, defaults[name])) for name in defaults}
        fields = registry["field_registries"]
        for name, argument in KEY_ARGUMENTS.items():
            if name in fields and arguments.get(argument) is not None:
                fields[name]["state_registry"][CovariateField.ORIGINAL_ATTR_KEY] = arguments[argument]

    def _validate_anndata(self, adata: AnnOrMuData | None = None, copy_if_view: bool = True) -> AnnOrMuData:
        if self.adata_manager is not None:  # type: ignore[attr-defined]
            return super()._validate_anndata(adata, copy_if_view)  # type: ignore[misc]
        if adata is None:
            raise ValueError(
                "This model was loaded without an AnnData. Pass one to the method, or set it with `model.adata = adata`."
            )
        if isinstance(adata, MuData) != (self.registry_["setup_method_name"] == "setup_mudata"):  # type: ignore[attr-defined]
            self._set_up_as(self.registry_, *self._setup_of(adata, {}))  # type: ignore[attr-defined]
        # scvi-tools sets up the first AnnData of such a model by the class's method. For other models it stays as it was.
        set_up = self._setup_adata_manager_store  # type: ignore[attr-defined]
        before = set_up.get(adata.uns.get(SCVI_UUID_KEY))
        adata = super()._validate_anndata(adata, copy_if_view)  # type: ignore[misc]
        set_up[adata.uns[SCVI_UUID_KEY]] = before
        if before is None:
            del set_up[adata.uns[SCVI_UUID_KEY]]
        return adata

    @classmethod
    def _build(cls, registry: dict[str, Any], init: dict[str, Any], state: dict[str, torch.Tensor], file: str) -> Self:
        """A model with these weights; sizes are compared before memory is taken for them."""
        parts = [part for part in (init, init.get("published")) if isinstance(part, dict)]
        deep = [n for part in parts for n in DEPTHS if isinstance(part.get(n), int | float) and part[n] > len(state)]
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
        check_sizes(max_context=max_context)
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
