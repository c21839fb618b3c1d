"""Pre-trained weights: loading the published format and our own, and writing the latter."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import nullcontext
from copy import deepcopy
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Self, get_args

import torch

from cellplm_scvi import _constants as c
from cellplm_scvi._compat import AnnOrMuData, parse_device_args
from cellplm_scvi.data._checks import check_sizes, counted, warn
from cellplm_scvi.data._vocabulary import MATCH_KEY, ORGANISM_KEY
from cellplm_scvi.genes._tables import Organism
from cellplm_scvi.module import PublishedModule
from cellplm_scvi.nn.published import PublishedConfig
from cellplm_scvi.pretrained import (
    OwnCheckpoint,
    PretrainedFileError,
    PretrainedReport,
    read_own,
    read_published,
    resolve,
    write_own,
)
from cellplm_scvi.pretrained._own import CONFIG_FILE, WEIGHTS_FILE, check_state

from ._extension import extend, unknown_categories, unknown_genes, unseen_is_expected
from ._new_data import NewDataMixin
from ._registry import portable, published_registry, set_up_as, setup_of

if TYPE_CHECKING:
    from cellplm_scvi.module import CellPLMModule

    from ._cellplm import CellPLM

#: constructor's arguments that count repeated parts: none can exceed the number of weights in a file
DEPTHS = ("n_layers", "n_decoder_layers")


class PretrainedMixin(NewDataMixin):
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
        organism: Organism | None = None,
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
            those that it knows, or, with ``"add"``, a contribution of their own, which is that mean before training.
        new_genes
            Whether to ``"ignore"`` genes that the model does not know, or to ``"add"`` them. An added gene starts with an
            embedding of zero and at its share of the counts. Before training, embeddings of cells are not changed by it, but for the
            library size: it is the sum over all genes of the model, the added ones too. Where counts are normalised by it (the
            default; published models take raw counts), embeddings change a little, unless ``size_factor_key`` gives it.
        organism
            Whose genes the data name: ``"human"``, or ``"mouse"`` to use their human orthologues; ``None``: what the model was
            last told, else human.
        overwrite_config
            Entries of a published ``PREFIX.config.json`` to replace, under their published names, such as
            ``{"objective": "imputation"}``.
        revision, cache_dir
            Of the hub.
        accelerator, device
            Where to put the model, as in :meth:`load`.
        **setup
            Arguments of :meth:`setup_anndata`, such as ``batch_key="donor"``, in place of those that ``adata`` was set up
            with, if it was. Keys that neither names are those that the model was saved with.

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
        check_words(
            organism=(organism or "human", get_args(Organism)),
            new_categories=(new_categories, ("mean", "add")),
            new_genes=(new_genes, ("ignore", "add")),
        )
        adding = new_categories == "add" or new_genes == "add"
        if adding and adata is None:
            raise ValueError("Pass the AnnData whose categories or genes are to be added.")
        with unseen_is_expected() if adding else nullcontext():
            model = cls._attached(
                path_or_name,
                adata,
                setup,
                organism,
                overwrite_config=overwrite_config,
                revision=revision,
                cache_dir=cache_dir,
                accelerator=accelerator,
                device=device,
            )
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
        *,
        accelerator: str,
        device: int | str,
        overwrite_config: Mapping[str, Any] | None = None,
        revision: str | None = None,
        cache_dir: str | Path | None = None,
    ) -> Self:
        """The model of the files, or a copy of a model, with an AnnData, whose genes match by name, else by meaning."""
        if isinstance(source, PretrainedMixin):
            if overwrite_config:
                raise ValueError("overwrite_config is for published files; this is a trained model.")
            if type(source) is not cls:
                raise TypeError(
                    f"The model is a {type(source).__name__}, not a {cls.__name__}: call this method of its own class."
                )
            registry, init, state, report = source._parts()
            file = "the model"
        elif not isinstance(source, str | Path):
            swapped = " Are the two arguments swapped?" if hasattr(source, "obs") else ""
            raise TypeError(
                f"The weights come from a folder, a name on the hub or a trained model; this is of type "
                f"{type(source).__name__}.{swapped}"
            )
        else:
            registry, init, state, report, file = cls._read(source, overwrite_config, revision, cache_dir)
        method, arguments = setup_of(cls, adata, setup, registry["setup_args"])
        without = not init.get("published") and c.SIZE_FACTOR_KEY not in registry["field_registries"]
        if without and (key := arguments.get("size_factor_key")) is not None:
            raise ValueError(
                f'size_factor_key="{key}": the model was trained without it, on the sum of each cell\'s counts, which is '
                "what its expected counts add up to. Pass size_factor_key=None."
            )
        set_up_as(cls, registry, method, arguments)
        counts = registry["field_registries"][c.X_KEY]["state_registry"]
        counts[ORGANISM_KEY] = organism or counts.get(ORGANISM_KEY, "human")
        model = cls._build(registry, init, state, file)
        model.pretrained_report_ = report
        _, _, where = parse_device_args(
            accelerator=accelerator, devices=device, return_device="torch", validate_single_device=True
        )
        model.to_device(where)  # type: ignore[attr-defined]
        if arguments.get("spatial_key") is not None and not (model.module.spatial or model.module.absolute_position):
            warn(f'spatial_key="{arguments["spatial_key"]}" has no effect: this model was trained without positions.')
            model.registry_["setup_args"]["spatial_key"] = None  # type: ignore[attr-defined]
        if adata is not None:
            model._attach(adata)
        return model

    @classmethod
    def _read(
        cls,
        path_or_name: str | Path,
        overwrite_config: Mapping[str, Any] | None,
        revision: str | None,
        cache_dir: str | Path | None,
    ) -> tuple[Any, ...]:
        """Registry, arguments of the constructor, weights and report of a model's files, and the name of one of them."""
        files = resolve(path_or_name, revision=revision, cache_dir=cache_dir)
        if files.format == "published":
            found = read_published(files.config, files.weights, overwrite=overwrite_config, source=files.source)
            init: dict[str, Any] = {"published": found.config.to_dict()}
            registry = published_registry(found, cls.__name__)
            return registry, init, found.state, found.report.to_dict(), files.weights.name
        if overwrite_config:
            raise ValueError(f'overwrite_config is for published files; "{files.source}" is of our own format.')
        own = read_own(files.config, files.weights)
        if own.model != cls.__name__:
            raise PretrainedFileError(
                f"{files.config.name} is of a {own.model[:60]}: load it with {own.model[:60]}.from_pretrained."
            )
        return own.registry, own.init, own.state, _report_of(own, files.source), files.weights.name

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
        return deepcopy(portable(self.registry_)), init, self.module.state_dict(), report.to_dict()  # type: ignore[attr-defined]

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
            portable(self.registry_),  # type: ignore[attr-defined]
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
        codes = ", ".join(counted(n, f"{name} category", f"{name} categories") for name, n in config.covariates.items())
        self._model_summary_string = (
            f"CellPLM of the published architecture with {sum(p.numel() for p in self.module.parameters()):,} parameters: "
            f"{n_genes:,} genes, n_hidden: {config.n_hidden}, n_layers: {config.n_layers}, n_heads: {config.n_heads}, "
            f"n_latent: {config.n_latent}, latent: {config.latent}, "
            + (f"decoder with {codes or 'no covariates'}" if config.has_decoder else f"head: {config.head}")
        )


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


def check_words(**words: tuple[str, tuple[str, ...]]) -> None:
    """Raise if an option is not one of its words; each is given with them."""
    for name, (word, allowed) in words.items():
        if word not in allowed:
            raise ValueError(f'{name}="{word}" is not {" or ".join(f'"{w}"' for w in allowed)}.')
