"""Training, as users of scvi-tools know it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Literal

import torch
from scvi.train import TrainRunner

from cellplm_scvi import _constants as c
from cellplm_scvi._compat import devices_dsp
from cellplm_scvi.data._categories import CovariateField
from cellplm_scvi.data._checks import check_sizes, some, warn
from cellplm_scvi.data._splitter import SampleSplitter
from cellplm_scvi.data._streaming import CorpusDataModule
from cellplm_scvi.data._table import CellTable
from cellplm_scvi.module import PublishedModule
from cellplm_scvi.nn import MixtureLatent
from cellplm_scvi.train import (
    CellPLMTrainingPlan,
    Freeze,
    PlaceMixtureComponents,
    TakeAlignmentAway,
    frozen,
    strategy_of,
    whole_afterwards,
)

from ._alignment import fit_alignment
from ._defaults import default_batch_size, default_max_epochs
from ._extension import unknown_categories
from ._start import start_decoders

if TYPE_CHECKING:
    from lightning import LightningDataModule

    from cellplm_scvi.module import CellPLMModule


#: peak learning rates: of the contributions of new categories alone, and of published weights (as published)
CODES_LR, PUBLISHED_LR = 1e-2, 2e-4
#: precisions, in Lightning's words, that weights cannot have
NOT_SINGLE = ("64", "64-true", "bf16-true", "16-true")
#: arguments of the trainer that ask for losses of validation cells
VALIDATING = ("check_val_every_n_epoch", "val_check_interval")


class TrainingMixin:
    """Trains a model on minibatches of whole samples."""

    module: CellPLMModule
    _data_splitter_cls = SampleSplitter
    _training_plan_cls = CellPLMTrainingPlan
    _train_runner_cls = TrainRunner

    @devices_dsp.dedent
    def train(
        self,
        max_epochs: int | None = None,
        accelerator: str = "auto",
        devices: int | list[int] | str = "auto",
        train_size: float | None = None,
        validation_size: float | None = None,
        shuffle_set_split: bool = True,
        batch_size: int | None = None,
        early_stopping: bool = False,
        datasplitter_kwargs: dict[str, Any] | None = None,
        plan_kwargs: dict[str, Any] | None = None,
        datamodule: LightningDataModule | None = None,
        freeze: Freeze | Literal["auto"] | None = "auto",
        **trainer_kwargs: Any,
    ) -> None:
        """Train the model, or train it further.

        A model that is trained already, or pre-trained, goes on from where it is: the weight of the KL divergence does not
        rise from zero again, and the components of the mixture prior keep their places. The first time after
        :meth:`from_pretrained` or :meth:`load_query_data`, the decoder starts at the mean counts of genes in the training cells
        of the new data.

        Where there are several batches, it ends with finding how these lie apart within clusters of the embedding, which
        :meth:`get_latent_representation` takes out.

        Parameters
        ----------
        max_epochs
            Passes over the data; ``None``: as many as make 4,800 optimiser steps (2,400 with coordinates), more for many cells, and
            at most 300, or 400 where these are less than half the steps.
        %(param_accelerator)s
        %(param_devices)s
        train_size, validation_size
            Shares of the cells (or of the samples, see ``datasplitter_kwargs``); by default 0.9 and the rest.
        shuffle_set_split
            Whether to draw the split at random.
        batch_size
            Number of cells packed in a minibatch; ``None``: from their number.
        early_stopping
            Stop when the validation ELBO no longer improves.
        datasplitter_kwargs
            Of :class:`~cellplm_scvi.data.SampleSplitter`: ``split_by``, ``context_size``, ``external_indexing``,
            ``num_workers`` and so on.
        plan_kwargs
            Of :class:`~cellplm_scvi.train.CellPLMTrainingPlan`: ``lr``, ``layer_decay``, ``n_epochs_kl_warmup`` and so on.
        datamodule
            Minibatches from elsewhere instead of the model's AnnData, such as those of a corpus on disk
            (:class:`~cellplm_scvi.data.CorpusDataModule`); ``max_epochs`` is then needed.
        freeze
            What stays as it is, to the bit: ``"embedder"`` (gene embedder and position code), ``"encoder"`` (these and the
            layers of the encoder), ``"backbone"`` (everything but the decoder's contributions of categories and its output
            layer, a row a gene; embeddings do not change, and batches are not aligned anew) or ``"reference"`` (everything but the contributions of the
            categories that were added last). ``"auto"``: ``"reference"`` after :meth:`load_query_data`, else ``None``.
            Frozen parts have no dropout.
        **trainer_kwargs
            Of :class:`scvi.train.Trainer`, such as ``precision="bf16-mixed"``, ``strategy="ddp"``, ``callbacks``. ``strategy="fsdp"``
            shards weights, gradients and optimiser state over the devices (FSDP2).
        """
        data = datamodule or self._splitter(
            train_size, validation_size, shuffle_set_split, batch_size, datasplitter_kwargs
        )
        if isinstance(data, CorpusDataModule):
            data.serve(self)  # type: ignore[arg-type]
            data.accumulate = trainer_kwargs.get("accumulate_grad_batches", 1)
        if isinstance(data, CorpusDataModule | SampleSplitter):
            measured = data.cells.measured if isinstance(data, CorpusDataModule) else data.table.measured
            self.module.panels = None if measured is None else torch.from_numpy(measured).to(self.module.device)
            if measured is not None and not self.is_trained_ and not (learned := measured.any(0)).all():  # type: ignore[attr-defined, has-type]
                genes = self._vocabulary(None)[1][~learned]  # type: ignore[attr-defined]
                warn(
                    f"{len(genes):,} gene{'s are' if len(genes) > 1 else ' is'} measured in no data set, by measured_genes_key "
                    f"({some(genes)}): nothing is learned of them, and what get_imputed_expression says of them means "
                    "nothing. Drop them before setup_anndata."
                )
        if max_epochs is None:
            if not isinstance(data, SampleSplitter):
                raise ValueError("Pass max_epochs together with datamodule.")
            max_epochs = default_max_epochs(data.n_train, data.n_batches, spatial=self.module.spatial)
        check_sizes(max_epochs=max_epochs)
        if (precision := str(trainer_kwargs.get("precision"))) in NOT_SINGLE:
            raise ValueError(
                f'precision="{precision}" is not available: weights and sums over counts are in single precision. Use '
                '"32-true", "bf16-mixed" or "16-mixed".'
            )
        n_val, how = None, ""
        if isinstance(data, SampleSplitter):
            n_val, how = data.n_val, 'a train_size below 1, and with split_by="samples" several samples'
        elif isinstance(data, CorpusDataModule):
            n_val, how = data.val_samples.size, "CorpusDataModule(..., validation=0.02)"
        if n_val == 0:
            asked = {"early_stopping": early_stopping, **{name: trainer_kwargs.get(name) for name in VALIDATING}}
            if watching := [name for name, value in asked.items() if value]:
                raise ValueError(f"{' and '.join(watching)} asked for validation cells; there are none. Use {how}.")
        if self.adata is not None and (new := unknown_categories(self)):  # type: ignore[attr-defined, arg-type]
            warn(
                f"The model has no contribution of its own for {'; '.join(f'{name} {some(n)}' for name, n in new.items())}: "
                'these train with the mean one. from_pretrained(..., new_categories="add") or load_query_data add them.'
            )
        freeze = self._default_freeze if freeze == "auto" else freeze  # type: ignore[attr-defined]
        # of weights that come from elsewhere, and have not been trained here
        starts = self.is_trained_ and not self.history_  # type: ignore[attr-defined, has-type]
        # of a corpus there may be few epochs: what happens in between them happens at steps
        n_steps = None
        if isinstance(data, CorpusDataModule):
            n_steps = max_epochs * data.n_batches // trainer_kwargs.get("accumulate_grad_batches", 1)
            if 0 < (limit := trainer_kwargs.get("max_steps", -1)) < n_steps:
                n_steps = limit
        plan_kwargs = self._plan_defaults(max_epochs, freeze, n_steps, plan_kwargs or {})
        callbacks = list(trainer_kwargs.pop("callbacks", None) or [])
        if isinstance(self.module.latent, MixtureLatent) and not self.is_trained_:  # type: ignore[attr-defined]
            step = None if n_steps is None else n_steps // 3
            callbacks.append(PlaceMixtureComponents(epoch=max_epochs // 3, step=step))
        if "strategy" in trainer_kwargs:
            trainer_kwargs["strategy"] = strategy_of(trainer_kwargs["strategy"])
        changes_embedding = freeze not in ("backbone", "reference")
        if changes_embedding:
            callbacks.append(TakeAlignmentAway())
        moved = self._aligned_batches()
        sharding = whole_afterwards(self, trainer_kwargs.get("strategy"))
        with sharding, frozen(self.module, freeze), self._history_kept(), self._compiled_at_most_here():
            if starts and isinstance(data, SampleSplitter):
                start_decoders(self, data.train_idx, biases=freeze != "reference")  # type: ignore[arg-type]
            # loading leaves a module in evaluation mode, and Lightning trains in the mode that it finds
            self.module.train()
            self._train_runner_cls(
                self,
                training_plan=self._training_plan_cls(self.module, **plan_kwargs),
                data_splitter=data,
                max_epochs=max_epochs,
                accelerator=accelerator,
                devices=devices,
                early_stopping=early_stopping,
                callbacks=callbacks,
                # the samplers share their minibatches out among ranks themselves
                **({"use_distributed_sampler": False} if isinstance(data, CorpusDataModule | SampleSplitter) else {}),
                **{"gradient_clip_val": 1.0, **trainer_kwargs},
            )()
        if changes_embedding:
            fit_alignment(self, data.table if isinstance(data, SampleSplitter) else None)  # type: ignore[arg-type]
            self._report_alignment(moved)

    def align_batches(self) -> None:
        """Align the batches of the model's AnnData anew.

        :meth:`train` ends with it. Call it for a model that has not come to this end: one that was loaded from a checkpoint
        of a training or whose training was interrupted, or after training on a corpus, with an AnnData of some of its cells.

        Raises
        ------
        ValueError
            If the model has no AnnData, or nothing that could be aligned: one batch, or a published network.
        """
        self._check_if_trained(warn=False)  # type: ignore[attr-defined]
        if self.adata is None:  # type: ignore[attr-defined]
            raise ValueError("The model has no AnnData whose batches could be aligned: load it with one.")
        if self.module.alignment is None:
            raise ValueError(
                "The model has no batches to align: it knows one batch_key category alone, or a great many, or it is a "
                "published network."
            )
        moved = self._aligned_batches()
        fit_alignment(self, CellTable.from_manager(self.adata_manager))  # type: ignore[arg-type, attr-defined]
        self._report_alignment(moved)

    def _aligned_batches(self) -> list[int]:
        """Codes of the batches that are moved."""
        return [] if self.module.alignment is None else self.module.alignment.moved_batches.tolist()

    def _report_alignment(self, moved: list[int]) -> None:
        """Say which of the batches that were moved before are not any more."""
        now = self._aligned_batches()
        if lost := [code for code in moved if code not in now]:
            state = self.registry_["field_registries"][c.BATCH_KEY]["state_registry"]  # type: ignore[attr-defined]
            names = [state[CovariateField.CATEGORICAL_MAPPING_KEY][code] for code in lost]
            warn(
                f"Batches are aligned where cells of them are in the data: {some(names)} {'were' if len(names) > 1 else 'was'} "
                "aligned and now stay where the encoder puts them. Training on all batches together, or align_batches() of a "
                "model loaded with all of them, aligns all."
            )

    def _plan_defaults(
        self, max_epochs: int, freeze: Freeze | None, n_steps: int | None, given: Mapping[str, Any]
    ) -> dict[str, Any]:
        """Arguments of the training plan: those given, and others that depend on what is trained."""
        defaults: dict[str, Any] = {}
        if not self.is_trained_ and not {"n_steps_kl_warmup", "n_epochs_kl_warmup"} & given.keys():  # type: ignore[attr-defined]
            if n_steps is None:
                defaults["n_epochs_kl_warmup"] = max(1, max_epochs)
            else:
                defaults["n_steps_kl_warmup"] = max(1, n_steps)
        if freeze == "reference":
            defaults["lr"] = CODES_LR
        elif isinstance(self.module, PublishedModule):
            defaults["lr"] = PUBLISHED_LR
        return {**defaults, **given}

    @contextmanager
    def _history_kept(self) -> Iterator[None]:
        """Let scvi-tools begin a history for pre-trained weights, which it only does for a model that is not trained."""
        was_trained = self.is_trained_  # type: ignore[has-type]
        self.is_trained_ = was_trained and bool(self.history_)  # type: ignore[attr-defined]
        try:
            yield
        finally:
            self.is_trained_ = self.is_trained_ or was_trained

    @contextmanager
    def _compiled_at_most_here(self) -> Iterator[None]:
        """Run the encoder as it is from here on: a result has to be the same before and after saving."""
        try:
            yield
        finally:
            self.module.encoder._compiled_call_impl = None

    def _splitter(
        self,
        train_size: float | None,
        validation_size: float | None,
        shuffle_set_split: bool,
        batch_size: int | None,
        datasplitter_kwargs: dict[str, Any] | None,
    ) -> SampleSplitter:
        if self.adata is None:  # type: ignore[attr-defined]
            raise ValueError("This model has no AnnData. Load it with `adata=` or pass `datamodule` to train it.")
        spatial = self._spatial_inputs  # type: ignore[attr-defined]
        n_cells = self.adata.n_obs  # type: ignore[attr-defined]
        return self._data_splitter_cls(
            self.adata_manager,  # type: ignore[attr-defined]
            train_size=train_size,
            validation_size=validation_size,
            shuffle_set_split=shuffle_set_split,
            batch_size=default_batch_size(n_cells, spatial=self.module.spatial) if batch_size is None else batch_size,
            spatial=spatial,
            max_context=self.module.max_context,
            **(datasplitter_kwargs or {}),
        )
