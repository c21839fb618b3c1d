"""CellPLM as a scvi-tools model."""

from __future__ import annotations

from numbers import Real
from typing import Any

import numpy as np
import torch
from anndata import AnnData
from mudata import MuData
from scvi.model.base import BaseModelClass

from cellplm_scvi import _constants as c
from cellplm_scvi._compat import (
    SCVI_UUID_KEY,
    AnnOrMuData,
    DataManager,
    copy_if_view,
    keep_registration,
    setup_anndata_dsp,
)
from cellplm_scvi.data._checks import check_library, check_sizes, counted, some, warn
from cellplm_scvi.data._corpus import CorpusRegistry, StartingPoint
from cellplm_scvi.data._fields import make_fields
from cellplm_scvi.data._loader import SpatialInputs
from cellplm_scvi.data._table import CellTable
from cellplm_scvi.module import CellPLMModule
from cellplm_scvi.nn import Encoder, GeneMasking, Latent, Position

from ._abundance import AbundanceMixin
from ._corpus import CorpusMixin
from ._defaults import default_hidden, default_latent, default_layers
from ._denoising import DenoisingMixin
from ._differential import DifferentialMixin
from ._embedding import EmbeddingMixin
from ._expression import ExpressionMixin
from ._extension import Extension, ExtensionMixin
from ._hub import HubMixin
from ._imputation import ImputationMixin
from ._perturbation import PerturbationMixin
from ._pretrained import PretrainedMixin
from ._query import QueryMixin
from ._registry import is_copy
from ._training import TrainingMixin


class CellPLM(
    EmbeddingMixin,
    DifferentialMixin,
    AbundanceMixin,
    ExpressionMixin,
    DenoisingMixin,
    ImputationMixin,
    PerturbationMixin,
    TrainingMixin,
    PretrainedMixin,
    HubMixin,
    QueryMixin,
    ExtensionMixin,
    CorpusMixin,
    BaseModelClass,
):
    """Cell language model: a transformer whose tokens are cells and whose sentences are tissue samples (Wen et al. 2024).

    Parameters
    ----------
    adata
        AnnData or MuData registered with :meth:`setup_anndata` or :meth:`setup_mudata`.
    n_hidden
        Width of the network; ``None``: from the number of cells.
    n_layers
        Depth of the encoder; ``None``: from the number of cells.
    n_heads
        Attention heads.
    n_latent
        Dimensions of the embedding; ``None``: from the number of cells.
    n_components
        Components of the mixture prior.
    dropout_rate
        Dropout in encoder and decoder.
    encoder
        How the cells of a sample see each other: ``"flow"`` (linear attention), ``"softmax"`` (exact attention) or
        ``"mlp"`` (not at all).
    latent
        ``"mixture"`` (Gaussian-mixture prior), ``"gaussian"`` (standard normal prior) or ``"deterministic"``.
    position
        For cells with coordinates: ``"local"`` (attention over the nearest cells, biased by distance), an absolute code
        (``"fourier"`` or ``"sinusoidal"``, the published one), or ``"none"``.
    n_decoder_layers
        Hidden layers of the decoder.
    n_neighbours
        Nearest cells for local attention.
    n_niche
        With ``position="local"``: nearest cells whose summed counts z learns to predict; 0 switches that off.
    niche_weight
        Weight of that objective.
    masking
        Whether genes are hidden from the encoder in training.
    input_normalization
        ``"library"`` (log1p of counts scaled to the median library size) or ``"raw"`` (log1p of counts, as published).
    max_context
        Most cells that see each other at inference; larger samples are cut into slices.
    published
        Configuration of a published model, which :meth:`from_pretrained` sets; of the other sizes only ``max_context`` then
        matters.
    extension
        What was added to a trained model, which :meth:`from_pretrained` and :meth:`load_query_data` set.
    perturbation
        Which perturbations were trained, which :meth:`train_perturbation` sets.
    registry
        Registry of an AnnData set-up, or of a :class:`~cellplm_scvi.data.Corpus`, instead of ``adata``.

    Examples
    --------
    >>> adata = cellplm_scvi.data.pbmc()
    >>> CellPLM.setup_anndata(adata)
    >>> model = CellPLM(adata)
    >>> model.train()
    >>> adata.obsm["X_cellplm"] = model.get_latent_representation()
    """

    _module_cls = CellPLMModule

    @property
    def _network_class(self) -> type[CellPLM]:
        """Class of a model whose ``train`` trains a network like this one."""
        return type(self)

    def __init__(
        self,
        adata: AnnOrMuData | None = None,
        n_hidden: int | None = None,
        n_layers: int | None = None,
        n_heads: int = 4,
        n_latent: int | None = None,
        n_components: int = 16,
        dropout_rate: float = 0.1,
        encoder: Encoder = "flow",
        latent: Latent = "mixture",
        position: Position = "local",
        n_decoder_layers: int = 1,
        n_neighbours: int = 32,
        n_niche: int = 16,
        niche_weight: float = 0.4,
        masking: bool = True,
        input_normalization: str = "library",
        max_context: int = 8192,
        published: dict[str, Any] | None = None,
        extension: dict[str, Any] | None = None,
        perturbation: dict[str, Any] | None = None,
        registry: dict | None = None,
    ):
        super().__init__(adata, registry)
        if adata is not None:
            self.adata_manager.validate()  # the AnnData may hold the codes of another set-up
            for field in self.adata_manager.fields:
                field.validate_field(adata)  # or have been changed since
            keep_registration(self.adata_manager)
        elif isinstance(registry, CorpusRegistry):
            self.registry_ = dict(registry)  # a saved model does not depend on where the corpus is
        self._extension = Extension.from_dict(extension)
        self._perturbation = perturbation
        if published is not None:
            self._build_published(published, max_context)
            self._add_categories()
            self._add_parts()
            self.init_params_ = self._get_init_params(locals())
            return
        check_words(encoder=encoder, latent=latent, position=position, input_normalization=input_normalization)
        states = {name: field["state_registry"] for name, field in self.registry_["field_registries"].items()}
        n_genes = len(states[c.X_KEY]["column_names"])
        n_cells = self.summary_stats.n_cells
        n_hidden = default_hidden(n_cells) if n_hidden is None else n_hidden
        n_layers = default_layers(n_cells) if n_layers is None else n_layers
        n_latent = default_latent(n_cells) if n_latent is None else n_latent
        sizes = {"n_hidden": n_hidden, "n_layers": n_layers, "n_heads": n_heads, "n_latent": n_latent}
        sizes |= {"n_components": n_components, "n_decoder_layers": n_decoder_layers, "max_context": max_context}
        sizes |= {"n_neighbours": n_neighbours} | ({"n_niche": n_niche} if n_niche else {})
        check_sizes(**sizes)
        if not isinstance(dropout_rate, Real) or not 0 <= dropout_rate < 1:
            raise ValueError(f"dropout_rate={dropout_rate!r} is not a share of at least 0 and below 1.")
        if not isinstance(niche_weight, Real) or not niche_weight >= 0:
            raise ValueError(f"niche_weight={niche_weight!r} must be a number that is not negative.")
        categories = self._reference_sizes()
        target_sum, gene_shares, fold_changes = 1e4, None, None
        if adata is not None:
            target_sum, gene_shares, fold_changes = self._from_counts()
        elif isinstance(registry, CorpusRegistry):
            target_sum, gene_shares, fold_changes = from_statistics(registry.corpus.starting_point())
        if fold_changes is not None and len(fold_changes) != categories[c.BATCH_KEY]:
            fold_changes = None  # a saved model that meets other batches, and whose weights are loaded in a moment
        n_dims = states[c.COORDINATES_KEY]["n_dims"] if c.COORDINATES_KEY in states else 0
        self._n_niche = n_niche if n_dims and position == "local" and niche_weight > 0 else 0
        self.module = self._module_cls(
            n_genes,
            # a covariate of a single category has nothing to say
            {name: n for name, n in categories.items() if n > 1},
            n_hidden=n_hidden,
            n_layers=n_layers,
            n_heads=n_heads,
            n_latent=n_latent,
            n_components=n_components,
            dropout_rate=dropout_rate,
            encoder=encoder,
            latent=latent,
            position=position,
            n_decoder_layers=n_decoder_layers,
            n_spatial_dims=n_dims,
            n_neighbours=n_neighbours,
            niche_weight=niche_weight if n_niche > 0 else 0.0,
            masking=GeneMasking() if masking else None,
            target_sum=target_sum if input_normalization == "library" else None,
            gene_shares=gene_shares,
            batch_fold_changes=fold_changes,
            rest=c.SIZE_FACTOR_KEY in states,
            max_context=max_context,
        )
        self._add_categories()
        # a pre-trained model does not know those of its training
        n_samples = len(states[c.SAMPLE_KEY]["categorical_mapping"])
        samples = f" in {counted(n_samples, 'sample')}" if n_samples else ""
        self._model_summary_string = (
            f"CellPLM with {sum(p.numel() for p in self.module.parameters()):,} parameters: {n_genes:,} genes, "
            f"n_hidden: {n_hidden}, n_layers: {n_layers}, n_heads: {n_heads}, n_latent: {n_latent}, "
            f"encoder: {encoder}, latent: {latent}{f' ({n_components})' if latent == 'mixture' else ''}, "
            f"position: {position if n_dims else 'none (no coordinates)'}; {counted(n_cells, 'cell')}{samples}, "
            + ", ".join(
                counted(n + self._extension.n_added(name), f"{name} category", f"{name} categories")
                for name, n in categories.items()
            )
        )
        self._add_parts()
        self.init_params_ = self._get_init_params(locals())

    def _add_parts(self) -> None:
        """Parts of the module that were added after it was built; models built on this one add theirs."""
        self._add_perturbation()

    def _from_counts(self) -> tuple[float, torch.Tensor, torch.Tensor | None]:
        """Median library size, share of each gene in all counts, log fold changes of each batch from them."""
        table = CellTable.from_manager(self.adata_manager)
        check_totals(table)
        library = table.totals if table.size_factor is None else table.size_factor
        by_batch = table.gene_totals(c.BATCH_KEY)
        return from_statistics(
            StartingPoint(
                target_sum=float(np.median(library[table.totals > 0])),
                gene_totals=by_batch.sum(0),
                batch_totals=by_batch,
                library=min(1.0, table.totals.sum() / library.sum(dtype=np.float64)),
            )
        )

    @property
    def _spatial_inputs(self) -> SpatialInputs:
        module = self.module
        return SpatialInputs(module.n_neighbours, module.absolute_position, self._n_niche)

    @classmethod
    @setup_anndata_dsp.dedent
    def setup_anndata(
        cls,
        adata: AnnData,
        layer: str | None = None,
        batch_key: str | None = None,
        platform_key: str | None = None,
        dataset_key: str | None = None,
        sample_key: str | None = None,
        spatial_key: str | None = None,
        labels_key: str | None = None,
        unlabeled_category: str = "unknown",
        perturbation_key: str | None = None,
        control_category: str = "control",
        size_factor_key: str | None = None,
        measured_genes_key: str | None = None,
        **kwargs: Any,
    ) -> None:
        """Register an AnnData of raw counts.

        Parameters
        ----------
        %(param_adata)s
        layer
            Layer that holds the counts; ``None`` is ``X``.
        batch_key, platform_key, dataset_key
            Columns of ``obs`` whose effect on counts the decoder learns, so that the embedding need not carry it.
        sample_key
            Column of ``obs`` with the tissue sample (section, field of view, donor's sample) of each cell: its cells see
            each other. By default ``batch_key``, else all cells are one sample.
        spatial_key
            Key of ``obsm`` with coordinates, (n_cells, 2 or 3), in any unit; rows of NaN are cells without position.
        labels_key
            Column of ``obs`` with cell types, some of them ``unlabeled_category``; numbers are taken as text.
        perturbation_key
            Column of ``obs`` with the perturbation of each cell, ``control_category`` for none, ``"A+B"`` for two; there are
            no missing values.
        size_factor_key
            Column of ``obs`` with the library size over all genes, where ``X`` holds a subset of them.
        measured_genes_key
            Key of ``varm`` with a boolean DataFrame, genes x categories of ``dataset_key``: which genes each data set
            measured.

        Raises
        ------
        KeyError
            If a key is not there.
        ValueError
            If counts, categories, coordinates or names are not usable; the message says what was found where.
        """
        setup_method_args = cls._get_setup_method_args(**locals())
        if not isinstance(adata, AnnData):
            hint = "call setup_mudata" if isinstance(adata, MuData) else "an AnnData of raw counts is needed"
            raise TypeError(f"adata is of type {type(adata).__name__}: {hint}.")
        copy_if_view(adata)
        fields = make_fields(
            layer=layer,
            batch_key=batch_key,
            platform_key=platform_key,
            dataset_key=dataset_key,
            sample_key=sample_key,
            spatial_key=spatial_key,
            labels_key=labels_key,
            unlabeled_category=unlabeled_category,
            perturbation_key=perturbation_key,
            control_category=control_category,
            size_factor_key=size_factor_key,
            measured_genes_key=measured_genes_key,
        )
        cls._register(adata, fields, setup_method_args, kwargs)

    @classmethod
    @setup_anndata_dsp.dedent
    def setup_mudata(
        cls,
        mdata: MuData,
        rna_layer: str | None = None,
        batch_key: str | None = None,
        platform_key: str | None = None,
        dataset_key: str | None = None,
        sample_key: str | None = None,
        spatial_key: str | None = None,
        labels_key: str | None = None,
        unlabeled_category: str = "unknown",
        perturbation_key: str | None = None,
        control_category: str = "control",
        size_factor_key: str | None = None,
        measured_genes_key: str | None = None,
        modalities: dict[str, str] | None = None,
        **kwargs: Any,
    ) -> None:
        """Register a MuData of raw counts; arguments as in :meth:`setup_anndata`.

        Parameters
        ----------
        %(param_mdata)s
        rna_layer
            Layer of the RNA modality that holds the counts; ``None`` is its ``X``.
        batch_key, platform_key, dataset_key, sample_key, spatial_key, labels_key, unlabeled_category, perturbation_key,\
 control_category, size_factor_key, measured_genes_key
            As in :meth:`setup_anndata`.
        modalities
            Modality of each argument, ``{"rna_layer": "rna"}`` at least; arguments that it leaves out are looked up in the
            MuData itself.
        """
        setup_method_args = cls._get_setup_method_args(**locals())
        if not isinstance(mdata, MuData):
            hint = "call setup_anndata" if isinstance(mdata, AnnData) else "a MuData with raw counts is needed"
            raise TypeError(f"mdata is of type {type(mdata).__name__}: {hint}.")
        if not modalities or "rna_layer" not in modalities:
            raise ValueError(
                'modalities must name the modality of the counts, such as modalities={"rna_layer": "rna"}.'
            )
        cls._create_modalities_attr_dict(modalities, setup_method_args)  # raises on an argument that does not exist
        if modalities["rna_layer"] not in mdata.mod:
            raise KeyError(
                f'"{modalities["rna_layer"]}" is not a modality of the MuData, which has {some(list(mdata.mod))}.'
            )
        copy_if_view(mdata)
        fields = make_fields(
            layer=rna_layer,
            batch_key=batch_key,
            platform_key=platform_key,
            dataset_key=dataset_key,
            sample_key=sample_key,
            spatial_key=spatial_key,
            labels_key=labels_key,
            unlabeled_category=unlabeled_category,
            perturbation_key=perturbation_key,
            control_category=control_category,
            size_factor_key=size_factor_key,
            measured_genes_key=measured_genes_key,
            modalities=modalities,
        )
        cls._register(mdata, fields, setup_method_args, kwargs)

    @classmethod
    def _register(cls, adata: AnnOrMuData, fields: list, setup_method_args: dict, kwargs: dict) -> None:
        if kwargs and "source_registry" not in kwargs:  # which comes from transfers alone
            raise TypeError(f"{setup_method_args['setup_method_name']} takes no argument {some(list(kwargs))}.")
        if is_copy(cls, adata):
            del adata.uns[SCVI_UUID_KEY]  # it must not replace the set-up of what it was copied from
        manager = DataManager(fields=fields, setup_method_args=setup_method_args)
        manager.register_fields(adata, **kwargs)
        cls.register_manager(manager)


def from_statistics(
    start: StartingPoint,
) -> tuple[float, torch.Tensor, torch.Tensor | None]:
    """Median library size, share of each gene in all counts, log fold changes of each batch from them."""
    shares = smoothed_shares(start.gene_totals)
    fold_changes = None
    if start.batch_totals is not None:
        fold_changes = torch.from_numpy(np.log(smoothed_shares(start.batch_totals) / shares)).float()
    return (
        start.target_sum,
        # of the library, these genes may hold a part only
        torch.from_numpy(shares * start.library).float(),
        fold_changes,
    )


def check_words(**words: str) -> None:
    """Raise if an option is not one of its words."""
    allowed = {
        "encoder": ("flow", "softmax", "mlp"),
        "latent": ("mixture", "gaussian", "deterministic"),
        "position": ("local", "fourier", "sinusoidal", "none"),
        "input_normalization": ("library", "raw"),
    }
    for name, word in words.items():
        if word not in allowed[name]:
            raise ValueError(f'{name}="{word}" is not one of {some(allowed[name], 4)}.')


def smoothed_shares(totals: np.ndarray, pseudocount: float = 0.1) -> np.ndarray:
    """Share of each gene in the counts, (..., n_genes), none of them zero."""
    counts = totals + pseudocount
    return counts / counts.sum(-1, keepdims=True)


def check_totals(table: CellTable) -> None:
    """Warn of cells without counts; raise if a library size is smaller than the counts it should hold."""
    totals = table.totals
    empty = totals == 0
    if empty.all():
        raise ValueError("No cell has any count of the genes. Pass the layer that holds the counts, with `layer=`.")
    if empty.any():
        warn(
            f"{counted(int(empty.sum()), 'cell has', 'cells have')} no counts (cells {some(table.names[empty])}). "
            "Such cells are embedded, but say "
            "nothing; `sc.pp.filter_cells(adata, min_counts=1)` drops them."
        )
    outside = table.counts_outside_panels()
    if outside:
        warn(
            f"{outside:,} counts belong to genes that their data set did not measure, by measured_genes_key. They are left "
            "out; mend the table if they are real."
        )
    if table.size_factor is not None:
        check_library(totals, table.size_factor, table.names)
