"""Training plan: AdamW by parameter groups, warm-up and decay of the learning rate by step, KL annealing."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from inspect import signature
from typing import TYPE_CHECKING, Any

import torch
from lightning.pytorch.plugins import MixedPrecision, Precision
from lightning.pytorch.utilities import GradClipAlgorithmType
from scvi.module.base import BaseModuleClass, LossOutput
from scvi.train import TrainingPlan
from torch import nn
from torch.distributed.fsdp import FSDPModule

from cellplm_scvi.data._checks import some

from ._callbacks import diverged
from ._sharding import shard

if TYPE_CHECKING:
    from cellplm_scvi._typing import Minibatch


#: arguments of scvi-tools' plan for an optimiser or a schedule of another kind
OTHER_OPTIMISER = (
    *("optimizer", "optimizer_creator", "reduce_lr_on_plateau", "lr_factor", "lr_patience", "lr_threshold"),
    *("lr_scheduler_metric", "lr_min"),
)


class CellPLMTrainingPlan(TrainingPlan):
    """scvi-tools' training plan with an optimiser that fits a transformer.

    Parameters
    ----------
    module
        The module to train.
    lr
        Peak learning rate.
    weight_decay
        Decoupled weight decay of the matrices of linear layers; embeddings, norms, biases and priors have none.
    eps
        Of AdamW.
    warmup
        Share of the steps over which the learning rate rises.
    final_lr
        Share of ``lr`` that a cosine decay ends at.
    layer_decay
        Factor of the learning rate from each layer of the encoder to the one below: of L layers, layer l learns at
        ``lr * layer_decay ** (L + 1 - l)``, gene embedder and position code (l = 0) slowest, what follows the layers at
        ``lr``. Below 1 it keeps a pre-trained model close to what it was.
    compile
        Whether to compile the encoder (``torch.compile``), once for all sizes of samples and minibatches. What comes
        before and after works on sparse counts, which cannot be compiled.
    compile_kwargs
        Of :func:`torch.compile`.
    recompute
        Whether the backward pass computes what is inside the encoder's layers again instead of keeping it: less memory,
        for up to a third more time in the encoder. ``None``: on a CPU, for layers of 1,024 units or more. Elsewhere, for
        models and minibatches that do not fit otherwise.
    n_epochs_kl_warmup
        Epochs over which the weight of the KL divergence rises from ``min_kl_weight`` to ``max_kl_weight``; by default,
        :meth:`~cellplm_scvi.CellPLM.train` has it rise through all of them.
    **kwargs
        Of :class:`scvi.train.TrainingPlan`, but for those of other optimisers and schedules.
    """

    def __init__(
        self,
        module: BaseModuleClass,
        *,
        lr: float = 1e-3,
        weight_decay: float = 0.01,
        eps: float = 1e-8,
        warmup: float = 0.05,
        final_lr: float = 0.05,
        layer_decay: float = 1.0,
        compile: bool = False,
        compile_kwargs: dict[str, Any] | None = None,
        recompute: bool | None = None,
        n_epochs_kl_warmup: int | None = None,
        **kwargs: Any,
    ):
        if other := [name for name in kwargs if name in OTHER_OPTIMISER]:
            raise ValueError(
                f"plan_kwargs has {some(other)}: the optimiser is AdamW, with a rate that rises and falls by step (lr, warmup, "
                "final_lr, weight_decay, eps). For another one, override configure_optimizers."
            )
        super().__init__(
            module,
            optimizer="AdamW",
            lr=lr,
            weight_decay=weight_decay,
            eps=eps,
            n_epochs_kl_warmup=n_epochs_kl_warmup,
            **kwargs,
        )
        # what scvi-tools' plan does not know, it passes to the loss, which would complain at the first step
        if unknown := [name for name in self.loss_kwargs if name not in signature(module.loss).parameters]:
            raise TypeError(f"plan_kwargs has {some(unknown)}, which the training plan does not take.")
        self._logged: tuple[Any, ...] = ()
        self._kl_weight: float | None = None
        self.warmup = warmup
        self.final_lr = final_lr
        for name, share in (("warmup", warmup), ("final_lr", final_lr)):
            if not 0 <= share <= 1:
                raise ValueError(f"{name}={share} is not a share, from 0 to 1.")
        if not 0 < layer_decay <= 1:
            raise ValueError(f"layer_decay={layer_decay} must be above 0 and at most 1.")
        self.layer_decay = layer_decay
        module.encoder.recompute = recompute
        if compile:
            module.encoder.compile(**({"dynamic": True} | (compile_kwargs or {})))

    @property
    def use_sync_dist(self) -> bool:
        """Whether losses are averaged over processes."""
        return self.trainer.world_size > 1

    def configure_model(self) -> None:
        """Shard the module where the strategy is to."""
        if self.device_mesh is not None and not isinstance(self.module, FSDPModule):
            shard(self.module, self.device_mesh["data_parallel"])  # type: ignore[arg-type]

    def training_step(self, batch: Minibatch, batch_idx: int) -> torch.Tensor:
        """One step on a minibatch."""
        self._n_cells, self._is_first = batch["library"].shape[0], batch_idx == 0
        loss = super().training_step(batch, batch_idx)
        self._loss = loss.detach()
        return loss

    def on_train_epoch_end(self) -> None:
        """Stop where nothing is left to learn with."""
        super().on_train_epoch_end()
        if not torch.isfinite(self._loss):
            raise diverged(self.lr)

    def validation_step(self, batch: Minibatch, batch_idx: int) -> None:
        """Losses of one minibatch of validation cells."""
        self._n_cells = int(batch["target"].sum()) if "target" in batch else batch["library"].shape[0]
        self._is_first = batch_idx == 0
        super().validation_step(batch, batch_idx)

    def log(self, name: str, value: Any, **kwargs: Any) -> None:
        """Log a value as the mean over the cells of the minibatch, which Lightning cannot tell from sparse counts.

        The weight of the KL divergence is logged where it changes and at the first minibatch of an epoch: it stays on record.
        """
        if name == "kl_weight":
            if value == self._kl_weight and not self._is_first:
                return
            self._kl_weight = value
        super().log(name, value, **{"batch_size": self._n_cells, **kwargs})

    def log_dict(self, dictionary: Mapping[str, Any], **kwargs: Any) -> None:
        """Log metrics, which add up by themselves what they are updated with, at the first minibatch of an epoch.

        To log the four of them takes Lightning as long as an encoder takes for a small minibatch.
        """
        now = (self.current_epoch, *dictionary)
        if self.on_step or self._is_first or now != self._logged:  # the last: resumed in the middle of an epoch
            self._logged = now
            super().log_dict(dictionary, **kwargs)

    def compute_and_log_metrics(self, loss_output: LossOutput, metrics: dict[str, Any], mode: str) -> None:
        """Log what scvi-tools logs, and further losses of the module.

        The latter are logged here because scvi-tools does it in inference mode, which a distributed run cannot average.
        """
        further = dict(loss_output.extra_metrics or {})
        super().compute_and_log_metrics(replace(loss_output, extra_metrics={}), metrics, mode)
        for name, value in further.items():
            self.log(f"{name}_{mode}", value, on_step=False, on_epoch=True, sync_dist=self.use_sync_dist)

    def configure_optimizers(self) -> dict[str, Any]:
        """AdamW and a schedule by step over the whole run."""
        if self.trainer.precision == "16-mixed":
            self.fused_optimizer = False  # it would undo the scaling of gradients in its step, after they are clipped
        optimizer = self._optimizer_creator_fn(torch.optim.AdamW)(self.parameter_groups())
        n_steps = int(self.trainer.estimated_stepping_batches)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, partial(self.lr_share, n_steps=n_steps))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def configure_gradient_clipping(
        self,
        optimizer: torch.optim.Optimizer,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """Clip gradients, in bfloat16 those of a fused optimiser too.

        Lightning refuses that under any mixed precision; without a scaler of gradients nothing stands against it.
        """
        plugin = self.trainer.precision_plugin
        if isinstance(plugin, MixedPrecision) and plugin.scaler is None:
            algorithm = GradClipAlgorithmType(gradient_clip_algorithm or "norm")
            Precision.clip_gradients(plugin, optimizer, gradient_clip_val or 0.0, algorithm)
        else:
            super().configure_gradient_clipping(optimizer, gradient_clip_val, gradient_clip_algorithm)

    def parameter_groups(self) -> list[dict[str, Any]]:
        """Parameters that train, by learning rate; matrices of linear layers with weight decay, everything else without."""
        decayed = {layer.weight for layer in self.module.modules() if isinstance(layer, nn.Linear)}
        groups: dict[tuple[int, bool], list[nn.Parameter]] = {}
        for name, parameter in self.module.named_parameters():
            if parameter.requires_grad:
                groups.setdefault((self._height(name), parameter in decayed), []).append(parameter)
        return [
            {
                "params": parameters,
                "lr": self.lr * self.layer_decay**height,
                "weight_decay": self.weight_decay if decays else 0.0,
            }
            for (height, decays), parameters in sorted(groups.items(), key=lambda group: (group[0][0], not group[0][1]))
        ]

    def _height(self, name: str) -> int:
        """How many steps of ``layer_decay`` a parameter lies below the latent space."""
        if self.layer_decay == 1:
            return 0
        n_layers = len(self.module.encoder.layers)
        part, *rest = name.split(".")
        if part in ("embedder", "position"):
            return n_layers + 1
        return n_layers - int(rest[1]) if part == "encoder" and rest[0] == "layers" else 0

    def lr_share(self, step: int, n_steps: int) -> float:
        """Share of the peak learning rate at a step: linear warm-up, then cosine decay to ``final_lr``."""
        rise = max(1, round(self.warmup * n_steps))
        if step < rise:
            return (step + 1) / rise
        progress = min(1.0, (step - rise) / max(1, n_steps - rise))
        return self.final_lr + (1 - self.final_lr) * 0.5 * (1 + math.cos(math.pi * progress))
