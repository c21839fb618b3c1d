"""Pre-trains a model on a corpus; a killed run goes on where its last checkpoint is."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any
from zipfile import is_zipfile

import scvi
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from lightning.pytorch.utilities import rank_zero_only

from cellplm_scvi._compat import HAS_TENSORBOARD, SimpleLogger
from cellplm_scvi.data._checks import check_sizes, some
from cellplm_scvi.data._corpus import read_json
from cellplm_scvi.data._streaming import CorpusDataModule
from cellplm_scvi.model import CellPLM
from cellplm_scvi.train import SaveTrainingState, StepLog

from ._load import load_model
from ._presets import PRESETS
from ._resume import changes

CHECKPOINT, MODEL, CONFIG, LOGS = "last.ckpt", "model", "config.json", "logs"
#: arguments that may be others when a run goes on: where and how fast it runs, how long, and what it notes. The checkpoint
#: knows the corpus, wherever it lies
MAY_CHANGE = frozenset(
    ("corpus", "folder", "max_epochs", "max_steps", "validate_every", "checkpoint_every", "log_every", "precision")
    + ("compile", "accelerator", "devices", "num_nodes", "strategy", "num_workers", "trainer")
)


def pretrain(
    corpus: str | Path,
    folder: str | Path,
    *,
    preset: str = "small",
    model: dict[str, Any] | None = None,
    start_from: str | Path | None = None,
    batch_size: int | None = None,
    context_size: int | None = None,
    validation: float | list[str] = 0.02,
    max_epochs: int = 10,
    max_steps: int = -1,
    accumulate: int = 1,
    lr: float | None = None,
    plan: dict[str, Any] | None = None,
    validate_every: int | None = None,
    checkpoint_every: int = 500,
    log_every: int = 50,
    precision: str = "32-true",
    compile: bool = False,
    accelerator: str = "auto",
    devices: int | str = "auto",
    num_nodes: int = 1,
    strategy: str = "auto",
    num_workers: int = 0,
    seed: int = 0,
    progress: bool = True,
    trainer: dict[str, Any] | None = None,
    callbacks: list[Callback] | None = None,
) -> CellPLM:
    """Pre-train a model on a corpus.

    Call it again in the same way to go on after a kill: on a CPU, the weights end up the same to the bit. How long the run
    is, where and how fast it runs, and what it notes may change then; the rest may not.

    Parameters
    ----------
    corpus
        Folder of the corpus.
    folder
        Where checkpoints, logs and at the end the model are written.
    preset
        Sizes of the model by a word: "85m" (as published), "medium", "small" or "tiny".
    model
        Arguments of CellPLM that replace those of the preset.
    start_from
        Folder of a model to train further, instead of a preset.
    batch_size
        Cells of a minibatch on each device.
    context_size
        Cells that see each other in training.
    validation
        Samples that are held out: their share, or their names.
    max_epochs
        Passes over the corpus.
    max_steps
        Optimiser steps at most; -1 for no limit.
    accumulate
        Minibatches of an optimiser step on each device.
    lr
        Peak learning rate.
    plan
        Further arguments of the training plan, such as weight_decay, warmup and final_lr.
    validate_every
        Minibatches between two validations; by default an epoch.
    checkpoint_every
        Optimiser steps between two checkpoints.
    log_every
        Optimiser steps between two lines of the log.
    precision
        Of Lightning, such as "bf16-mixed".
    compile
        Whether to compile the layers of the encoder.
    accelerator
        Of Lightning.
    devices
        Of Lightning.
    num_nodes
        Of Lightning.
    strategy
        Of Lightning: "ddp" or "fsdp" for several devices.
    num_workers
        Processes that read ahead, on each device.
    seed
        Of everything that is random.
    progress
        Whether to show a bar.
    trainer
        Further arguments of the trainer.
    callbacks
        Further callbacks.

    Returns
    -------
    The model, which is also in the folder "model" there, for CellPLM.from_pretrained.

    Raises
    ------
    ValueError
        If the folder holds a run with other arguments, or on another corpus.
    """
    folder = Path(folder).expanduser()
    arguments = {name: value for name, value in locals().items() if name not in ("callbacks", "progress")}
    if preset not in PRESETS:
        raise ValueError(f'preset="{preset}" is not one of {some(list(PRESETS), len(PRESETS))}.')
    if start_from is not None and model:
        raise ValueError(
            f"model={model} has no effect with start_from: the sizes are those of {start_from}. Leave one of them out."
        )
    check_sizes(accumulate=accumulate, checkpoint_every=checkpoint_every, log_every=log_every, max_epochs=max_epochs)
    check_sizes(**({} if validate_every is None else {"validate_every": validate_every}))
    check_sizes(**({} if max_steps == -1 else {"max_steps": max_steps}))
    checkpoint = folder / CHECKPOINT
    if checkpoint.exists():
        if checkpoint.is_file() and not is_zipfile(checkpoint):
            raise ValueError(f"{checkpoint} is damaged: it was not written to its end. Delete it to begin anew.")
        _check_unchanged(folder, arguments)
    scvi.settings.seed = seed
    run = PRESETS[preset]["run"]
    data = CorpusDataModule(
        corpus,
        batch_size=run["batch_size"] if batch_size is None else batch_size,
        context_size=context_size,
        validation=validation,
        seed=seed,
        num_workers=num_workers,
    )
    if checkpoint.is_file():
        _check_corpus(checkpoint, data)
    if start_from is None:
        network = CellPLM(registry=data.registry, **(PRESETS[preset]["model"] | (model or {})))
    else:
        network = load_model(start_from, accelerator="cpu")
    if compile:
        network.module.encoder.compile(dynamic=True)
    loggers = _loggers(folder)
    saving = SaveTrainingState(folder / CHECKPOINT, checkpoint_every)
    ours: list[Callback] = [_NoteArguments(folder, arguments), saving, StepLog(loggers, log_every)]
    if validate_every is not None and data.val_samples.size:
        ours.append(_ValidateEvery(validate_every))
    network.train(
        datamodule=data,
        max_epochs=max_epochs,
        accelerator=accelerator,
        devices=devices,  # type: ignore[arg-type]
        plan_kwargs={"lr": run["lr"] if lr is None else lr, **(plan or {})},
        max_steps=max_steps,
        accumulate_grad_batches=accumulate,
        precision=precision,
        num_nodes=num_nodes,
        enable_progress_bar=progress,
        logger=[SimpleLogger(), *loggers],
        log_every_n_steps=log_every,
        callbacks=[*ours, *(callbacks or [])],
        ckpt_path=str(checkpoint) if checkpoint.exists() else None,
        **({} if strategy == "auto" else {"strategy": strategy}),
        **({"check_val_every_n_epoch": 1} if data.val_samples.size else {}),
        **(trainer or {}),
    )
    saving.save(network.trainer)
    if network.trainer.is_global_zero:
        network.save_pretrained(folder / MODEL, overwrite=True)
    return network


class _ValidateEvery(Callback):
    """Validates after so many minibatches, or by epochs where these are shorter.

    How many minibatches an epoch has is known once the ranks are.
    """

    def __init__(self, n_batches: int):
        self.n_batches = n_batches

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Set it before the trainer counts the minibatches."""
        n_epoch = trainer.datamodule.n_batches  # type: ignore[attr-defined]
        if self.n_batches < n_epoch:
            trainer.val_check_interval = self.n_batches
        else:
            trainer.check_val_every_n_epoch = max(1, round(self.n_batches / n_epoch))


def _check_corpus(checkpoint: Path, data: CorpusDataModule) -> None:
    """Raise if the run there was begun on another corpus: Lightning would only ask after it has restored the weights."""
    state = torch.load(checkpoint, map_location="cpu", mmap=True, weights_only=False).get(type(data).__qualname__, {})
    if state.get("corpus", data.corpus_checksum) != data.corpus_checksum:
        raise ValueError(
            f"{checkpoint.parent} holds a run on another corpus. Pass that one to go on, or choose another folder."
        )


def _check_unchanged(folder: Path, arguments: dict[str, Any]) -> None:
    """Raise if the run there was begun with other arguments, of those that decide what is trained."""
    file = folder / CONFIG
    if not file.exists():
        return
    begun = read_json(file)
    fixed = {name: value for name, value in _as_json(arguments).items() if name in begun and name not in MAY_CHANGE}
    if changed := changes(begun, fixed):
        raise ValueError(
            f"{folder} holds a run that was begun with other arguments: {changed}. Pass them as they were to go on, or "
            "choose another folder."
        )


def _as_json(arguments: dict[str, Any]) -> dict[str, Any]:
    return json.loads(json.dumps(arguments, default=str))


class _NoteArguments(Callback):
    """Writes ``config.json`` once training starts: by then, a checkpoint that does not fit has been refused."""

    def __init__(self, folder: Path, arguments: dict[str, Any]):
        self.file, self.arguments = folder / CONFIG, _as_json(arguments)

    @rank_zero_only
    def on_train_start(self, *_: Any) -> None:
        """Write it in one move."""
        self.file.parent.mkdir(parents=True, exist_ok=True)
        new = self.file.with_name(f"{CONFIG}.new")
        new.write_text(json.dumps(self.arguments, indent=1) + "\n", encoding="utf-8")
        new.replace(self.file)


def _loggers(folder: Path) -> list[Any]:
    """CSV, and TensorBoard where it is installed; each call writes a version of its own."""
    loggers: list[Any] = [CSVLogger(folder, LOGS)]
    if HAS_TENSORBOARD:
        loggers.append(TensorBoardLogger(str(folder), LOGS, version=loggers[0].version))
    return loggers
