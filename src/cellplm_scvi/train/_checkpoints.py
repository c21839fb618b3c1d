"""Long runs: checkpoints from which training goes on to the bit, and losses by step."""

from __future__ import annotations

import random
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import distributed


class SaveTrainingState(Callback):
    """Writes weights, optimiser, schedule, place in the epoch and random states, so that a killed run can go on.

    A checkpoint replaces the one before in one move: whenever the run is killed, there is a whole one. Pass it on as
    ``model.train(..., ckpt_path=file)`` together with this callback. Validation draws random numbers of its own, so that it
    does not matter for training whether or when it runs.

    Parameters
    ----------
    file
        Checkpoint to write.
    every_n_steps
        Optimiser steps between two of them.
    """

    def __init__(self, file: str | Path, every_n_steps: int = 1000):
        if every_n_steps < 1:
            raise ValueError(f"every_n_steps={every_n_steps} must be positive.")
        self.file = Path(file)
        self.every_n_steps = every_n_steps
        self._saved = -1
        self._states: list[dict[str, Any]] | None = None
        self._before_validation: dict[str, Any] | None = None

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Save every so many steps."""
        step = trainer.global_step
        if step % self.every_n_steps == 0 and step > 0 and step != self._saved:
            self.save(trainer)

    def save(self, trainer: Trainer) -> None:
        """Save now."""
        self._saved = trainer.global_step
        self.file.parent.mkdir(parents=True, exist_ok=True)
        new = self.file.with_name(f"{self.file.name}.new")
        trainer.save_checkpoint(new)
        if trainer.is_global_zero:
            new.replace(self.file)

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Add the random states of every rank."""
        states: list[Any] = [random_state()]
        if distributed.is_available() and distributed.is_initialized():
            states = [None] * distributed.get_world_size()
            distributed.all_gather_object(states, random_state())
        checkpoint["random_states"] = states

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Remember them until training starts."""
        self._states = checkpoint.get("random_states")
        self._saved = checkpoint["global_step"]

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Restore them."""
        if self._states is not None and len(self._states) == trainer.world_size:
            set_random_state(self._states[trainer.global_rank])
        self._states = None

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Draw the same numbers in each validation."""
        self._before_validation = random_state()
        torch.manual_seed(0)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Go on as if there had been none."""
        if self._before_validation is not None:
            set_random_state(self._before_validation)


def random_state() -> dict[str, Any]:
    """States of the generators of Python, NumPy and PyTorch, in plain values and tensors."""
    name, keys, position, has_gauss, gauss = np.random.get_state()  # noqa: NPY002 - that of other packages
    version, internal, gauss_next = random.getstate()
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
        "numpy": (name, keys.tolist(), position, has_gauss, gauss),  # type: ignore[union-attr]
        "python": (version, list(internal), gauss_next),
    }


def set_random_state(state: dict[str, Any]) -> None:
    """Put the generators back."""
    torch.set_rng_state(state["torch"])
    if state["cuda"] and len(state["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all(state["cuda"])
    name, keys, *rest = state["numpy"]
    np.random.set_state((name, np.asarray(keys, dtype=np.uint32), *rest))  # noqa: NPY002
    version, internal, gauss_next = state["python"]
    random.setstate((version, tuple(internal), gauss_next))


class StepLog(Callback):
    """Logs loss, learning rate and cells a second every so many steps, where scvi-tools logs by epoch.

    Parameters
    ----------
    loggers
        Where to.
    every_n_steps
        Optimiser steps between two lines.
    """

    def __init__(self, loggers: list[Any], every_n_steps: int = 50):
        self.loggers, self.every_n_steps = loggers, every_n_steps
        self._loss: list[torch.Tensor] = []
        self._cells, self._since = 0, time.perf_counter()
        self._logged = 0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start the clock."""
        self._since, self._logged = time.perf_counter(), trainer.global_step

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Log the means since the last line."""
        if not trainer.is_global_zero:
            return
        self._loss.append(outputs["loss"].detach() if isinstance(outputs, dict) else outputs.detach())
        self._cells += batch["library"].shape[0]
        step = trainer.global_step
        if step - self._logged < self.every_n_steps:
            return
        now = time.perf_counter()
        scale = trainer.accumulate_grad_batches  # Lightning hands out the loss divided by it
        metrics = {
            "loss_step": torch.stack(self._loss).mean().item() * scale,
            "lr": trainer.optimizers[0].param_groups[0]["lr"],
            "cells_per_s": self._cells * trainer.world_size / (now - self._since),
        }
        for logger in self.loggers:
            logger.log_metrics(metrics, step=step)
            logger.save()
        self._loss, self._cells, self._since, self._logged = [], 0, now, step
