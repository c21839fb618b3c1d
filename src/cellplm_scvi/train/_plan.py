"""Training plan: AdamW by parameter groups, warm-up and decay of the learning rate by step, KL annealing."""

from __future__ import annotations

import math
from typing import Any

import torch
from scvi.module.base import BaseModuleClass
from scvi.train import TrainingPlan
from torch import nn


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
    n_epochs_kl_warmup
        Epochs over which the weight of the KL divergence rises from ``min_kl_weight`` to ``max_kl_weight``.
    **kwargs
        Of :class:`scvi.train.TrainingPlan`.
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
        n_epochs_kl_warmup: int | None = None,
        **kwargs: Any,
    ):
        super().__init__(
            module,
            optimizer="AdamW",
            lr=lr,
            weight_decay=weight_decay,
            eps=eps,
            n_epochs_kl_warmup=n_epochs_kl_warmup,
            **kwargs,
        )
        self.warmup = warmup
        self.final_lr = final_lr

    def configure_optimizers(self) -> dict[str, Any]:
        """AdamW and a schedule by step over the whole run."""
        optimizer = self._optimizer_creator_fn(torch.optim.AdamW)(self.parameter_groups())
        n_steps = int(self.trainer.estimated_stepping_batches)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: self.lr_share(step, n_steps))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def parameter_groups(self) -> list[dict[str, Any]]:
        """Matrices of linear layers with weight decay, everything else without."""
        decayed = {
            layer.weight
            for layer in self.module.modules()
            if isinstance(layer, nn.Linear) and layer.weight.requires_grad
        }
        other = [p for p in self.module.parameters() if p.requires_grad and p not in decayed]
        return [
            {"params": [p for p in self.module.parameters() if p in decayed]},
            {"params": other, "weight_decay": 0.0},
        ]

    def lr_share(self, step: int, n_steps: int) -> float:
        """Share of the peak learning rate at a step: linear warm-up, then cosine decay to ``final_lr``."""
        rise = max(1, round(self.warmup * n_steps))
        if step < rise:
            return (step + 1) / rise
        progress = min(1.0, (step - rise) / max(1, n_steps - rise))
        return self.final_lr + (1 - self.final_lr) * 0.5 * (1 + math.cos(math.pi * progress))
