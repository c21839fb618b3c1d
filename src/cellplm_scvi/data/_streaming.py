"""Streams a corpus from disk into training, validation and inference."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from functools import cached_property
from hashlib import blake2b
from typing import TYPE_CHECKING, Any, Protocol, cast

import lightning.pytorch as pl
import numpy as np
import pandas as pd
import torch
from scvi import settings
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from ._checks import check_sizes, some
from ._corpus import DONE_FOLDER, MANIFEST, Corpus
from ._loader import SpatialInputs, _rank
from ._splitter import MIN_CONTEXT
from ._stream_cells import CorpusCells, Unit, whole_units
from ._stream_plan import EpochPlan

if TYPE_CHECKING:
    from pathlib import Path

    from cellplm_scvi._typing import Minibatch

Numbered = tuple[np.ndarray | None, "Minibatch"]


class Reader(Protocol):
    """A model that minibatches are made for."""

    registry_: dict[str, Any]
    module: Any
    is_trained_: bool

    @property
    def _spatial_inputs(self) -> SpatialInputs: ...


def corpus_checksum(corpus: Corpus) -> str:
    """Of what is in a corpus, wherever it lies: genes, categories, samples, and what was written of each shard."""
    manifest = json.loads((corpus.path / MANIFEST).read_text(encoding="utf-8"))
    del manifest["request"]  # when and where its sources were
    digest = blake2b(json.dumps(manifest, sort_keys=True).encode(), digest_size=8)
    for n in range(corpus.n_shards):
        digest.update((corpus.path / DONE_FOLDER / f"{n}.json").read_bytes())
    return f"checksum {digest.hexdigest()}"


class CorpusDataModule(pl.LightningDataModule):
    """Minibatches of whole samples from a corpus on disk, for ``model.train(datamodule=...)``.

    Memory does not grow with the corpus, but for 8 bytes a cell that annbatch keeps. Every cell of the training samples is
    in one minibatch of an epoch; the page on pre-training says what is random, and how ranks share. With ``ckpt_path=``, an
    epoch that was interrupted goes on where it was.

    Parameters
    ----------
    corpus
        The corpus, or its folder.
    batch_size
        Cells of a training minibatch on each rank.
    context_size
        Cells that see each other in training; ``None``: the minibatch for spatial models, a quarter of it otherwise.
    validation
        Samples that are held out: their share, or their names.
    seed
        Of the split and of the order; ``None`` is ``scvi.settings.seed``.
    num_workers
        Processes that read ahead; minibatches do not depend on it.

    Examples
    --------
    >>> data = CorpusDataModule("corpus", batch_size=2048, validation=0.05)
    >>> model = CellPLM(registry=data.corpus.registry)
    >>> model.train(datamodule=data, max_epochs=10)
    >>> z = model.get_latent_representation(dataloader=data.inference_dataloader())
    """

    def __init__(
        self,
        corpus: Corpus | str | Path,
        batch_size: int = 1024,
        context_size: int | None = None,
        validation: float | Sequence[str] = 0.05,
        seed: int | None = None,
        num_workers: int = 0,
    ):
        super().__init__()
        self.corpus = corpus if isinstance(corpus, Corpus) else Corpus(corpus)
        check_sizes(batch_size=batch_size, **({} if context_size is None else {"context_size": context_size}))
        self.batch_size = batch_size
        self.context_size = context_size
        self.seed = (settings.seed or 0) if seed is None else seed
        self.num_workers = num_workers
        self.val_samples = self._held_out(validation)
        self.train_samples = np.setdiff1d(np.arange(self.corpus.n_samples), self.val_samples)
        if self.train_samples.size == 0:
            raise ValueError("Every sample of the corpus is held out; none is left to train on.")
        self._cells: CorpusCells | None = None
        self._resumed: dict[str, int] | None = None
        self.max_context = 8192
        #: minibatches of an optimiser step on each rank
        self.accumulate = 1

    def _held_out(self, validation: float | Sequence[str]) -> np.ndarray:
        names, n_samples = self.corpus.samples.index, self.corpus.n_samples
        if isinstance(validation, str):
            validation = [validation]
        if not isinstance(validation, float | int):
            absent = [name for name in validation if name not in names]
            if absent:
                raise KeyError(f"validation names {some(absent)}, which the corpus does not have.")
            return np.sort(names.get_indexer(pd.Index(validation)))
        if not 0 <= validation < 1:
            raise ValueError(f"validation={validation} is a share in [0, 1), or a list of samples.")
        n = min(max(1, round(validation * n_samples)), n_samples - 1) if validation else 0
        return np.sort(np.random.default_rng(self.seed).choice(n_samples, n, replace=False))

    @property
    def registry(self) -> dict[str, Any]:
        """That of the corpus."""
        return self.corpus.registry

    @property
    def n_train(self) -> int:
        return int(self._sizes(self.train_samples)[1].sum())

    @property
    def n_val(self) -> int:
        return int(self._sizes(self.val_samples)[1].sum())

    @property
    def n_batches(self) -> int:
        """Minibatches of an epoch on each rank."""
        return len(self.plan())

    @cached_property
    def corpus_checksum(self) -> str:
        """Of what is in the corpus."""
        return corpus_checksum(self.corpus)

    def _sizes(self, samples: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        table = self.corpus.samples.iloc[samples]
        return table["start"].to_numpy(), table["n_cells"].to_numpy()

    def serve(self, model: Reader) -> None:
        """Make minibatches for a model: its genes, codes and positions. Training and inference call it.

        Of a trained model, a warning says what of the corpus it does not know, or misses.
        """
        before, fields = self._cells, model.registry_["field_registries"]
        self._cells = CorpusCells(self.corpus, fields, model._spatial_inputs)
        if model.is_trained_ and (before is None or before.fields is not fields):
            self._cells.report()
        self.max_context = model.module.max_context
        self._spatial = bool(model.module.spatial or model.module.absolute_position)

    @property
    def cells(self) -> CorpusCells:
        """Cells of the corpus as the model wants them."""
        if self._cells is None:
            raise RuntimeError("Which model are the minibatches for? Call `serve(model)` first.")
        return self._cells

    def plan(self) -> EpochPlan:
        """The minibatches of every epoch."""
        context = self.context_size
        if context is None:
            spatial = self._spatial if self._cells is not None else self.corpus.n_dims > 0
            context = self.batch_size if spatial else max(MIN_CONTEXT, self.batch_size // 4)
        return EpochPlan(
            *self._sizes(self.train_samples),
            context_size=min(context, self.batch_size),
            batch_size=self.batch_size,
            seed=self.seed,
            n_ranks=_rank()[1],
            accumulate=self.accumulate,
        )

    def train_dataloader(self) -> CorpusLoader:
        """Training samples or their slices, packed at random."""
        loader = CorpusLoader(TrainingStream(self.cells, self.plan(), _rank()[0]), self.num_workers)
        if self._resumed is not None:
            loader.load_state_dict(self._resumed)
            self._resumed = None
        return loader

    def val_dataloader(self) -> CorpusLoader | None:
        """Held-out samples, whole."""
        if self.val_samples.size == 0:
            return None
        units = whole_units(*self._sizes(self.val_samples), self.max_context, self.max_context)
        rank, n_ranks = _rank()
        even = -(-len(units) // n_ranks) * n_ranks
        mine = [units[i % len(units)] for i in range(rank, even, n_ranks)]
        return CorpusLoader(WholeStream(self.cells, mine, self.max_context), self.num_workers)

    def inference_dataloader(
        self, samples: Sequence[str] | None = None, batch_size: int | None = None
    ) -> InferenceLoader:
        """Whole samples in corpus order, for ``get_latent_representation(dataloader=...)``; by default all of them."""
        names = self.corpus.samples.index
        chosen = np.arange(len(names)) if samples is None else np.sort(names.get_indexer(pd.Index(samples)))
        if (chosen < 0).any():
            raise KeyError(f"The corpus does not have {some([name for name in samples or [] if name not in names])}.")
        return InferenceLoader(self, chosen, batch_size)

    def state_dict(self) -> dict[str, Any]:
        """What has to be the same for training to go on from a checkpoint, and its place in the epoch."""
        plan = self.plan()
        loader = getattr(self.trainer, "train_dataloader", None)
        return {
            # Lightning has it too, but loses it when a schedule asks for the number of steps before it is restored
            "place": loader.state_dict() if isinstance(loader, CorpusLoader) else None,
            "corpus": self.corpus_checksum,
            "n_cells": self.corpus.n_cells,
            "seed": self.seed,
            "batch_size": self.batch_size,
            "context_size": plan.context_size,
            "n_ranks": plan.n_ranks,
            "accumulate": plan.accumulate,
            "validation": self.val_samples.tolist(),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from a checkpoint; raise unless it is of the same corpus and the same minibatches."""
        now = {key: value for key, value in self.state_dict().items() if key != "place"}
        place, loader = state_dict.get("place"), getattr(self.trainer, "train_dataloader", None)
        if isinstance(loader, CorpusLoader) and place is not None:
            loader.load_state_dict(place)  # strategies that shard set the loader up before they restore a checkpoint
        else:
            self._resumed = place
        differ = [f"{key} was {state_dict.get(key)}, is {now[key]}" for key in now if state_dict.get(key) != now[key]]
        if differ:
            raise ValueError(
                f"The checkpoint is of a run with another corpus or other minibatches: {'; '.join(differ)[:500]}."
            )


class TrainingStream(IterableDataset):
    """Minibatches of one rank, from any place of any epoch on."""

    def __init__(self, cells: CorpusCells, plan: EpochPlan, rank: int):
        self.cells, self.plan, self.rank = cells, plan, rank
        self.epoch, self.start = 0, 0

    def __len__(self) -> int:
        return len(self.plan)

    def __iter__(self) -> Iterator[Numbered]:
        batches = _share_of_worker(self.plan.minibatches(self.epoch, self.rank)[self.start :])
        for minibatch in self.cells.training(batches):
            yield None, minibatch


class WholeStream(IterableDataset):
    """Minibatches of whole samples."""

    epoch, start = 0, 0

    def __init__(self, cells: CorpusCells, units: list[Unit], max_context: int):
        self.cells, self.units, self.max_context = cells, units, max_context

    def __len__(self) -> int:
        return len(self.units)

    def __iter__(self) -> Iterator[Numbered]:
        yield from self.cells.whole(_share_of_worker(self.units[self.start :]), self.max_context)


def _share_of_worker(parts: list[Any]) -> list[Any]:
    """PyTorch takes a minibatch of each worker in turn, so their order stays the same."""
    worker = get_worker_info()
    return parts if worker is None else parts[worker.id :: worker.num_workers]


class CorpusLoader:
    """Yields the minibatches of a stream; Lightning saves and restores its place in the epoch.

    Parameters
    ----------
    stream
        Where they come from.
    num_workers
        Processes that read ahead.
    """

    def __init__(self, stream: TrainingStream | WholeStream, num_workers: int = 0):
        self.stream, self.num_workers = stream, num_workers
        self.epoch, self.position = 0, 0
        self._resumed: dict[str, int] | None = None

    #: Lightning asks for it wherever there is a sampler
    batch_sampler = None

    @property
    def sampler(self) -> CorpusLoader:
        """Lightning calls ``sampler.set_epoch``."""
        return self

    def set_epoch(self, epoch: int) -> None:
        """Called by Lightning before each epoch."""
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.stream)

    def numbered(self) -> Iterator[Numbered]:
        """Minibatches with the rows of the corpus of their cells that count (``None`` in training)."""
        resumed, self._resumed = self._resumed, None
        self.position = resumed["position"] if resumed is not None and resumed["epoch"] == self.epoch else 0
        self.stream.epoch, self.stream.start = self.epoch, self.position
        found: Any = self.stream
        if self.num_workers:
            found = DataLoader(
                self.stream,
                batch_size=None,
                num_workers=self.num_workers,
                generator=torch.Generator(),  # the default one is the user's
                pin_memory=torch.cuda.is_available(),
            )
        for item in found:
            self.position += 1
            yield item

    def __iter__(self) -> Iterator[Minibatch]:
        for _, minibatch in self.numbered():
            yield minibatch

    def state_dict(self) -> dict[str, int]:
        """Epoch, and minibatches of it that were given out."""
        return {"epoch": self.epoch, "position": self.position}

    def load_state_dict(self, state_dict: dict[str, int]) -> None:
        """Go on from there when that epoch comes."""
        self._resumed = dict(state_dict)


class InferenceLoader:
    """Whole samples of a corpus for whichever model asks, in corpus order."""

    def __init__(self, data: CorpusDataModule, samples: np.ndarray, batch_size: int | None):
        self.data, self.samples, self.batch_size = data, samples, batch_size

    def units(self) -> list[Unit]:
        """Minibatches to come."""
        size = self.batch_size or self.data.max_context
        return whole_units(*self.data._sizes(self.samples), size, self.data.max_context)

    def serve(self, model: Reader) -> InferenceLoader:
        """Make minibatches for a model."""
        self.data.serve(model)
        return self

    def numbered(self, units: list[Unit] | None = None) -> Iterator[tuple[np.ndarray, Minibatch]]:
        """Minibatches with the rows of the corpus of their cells that count."""
        stream = WholeStream(self.data.cells, self.units() if units is None else units, self.data.max_context)
        # only minibatches for training come without rows
        yield from cast(
            "Iterator[tuple[np.ndarray, Minibatch]]", CorpusLoader(stream, self.data.num_workers).numbered()
        )

    def __iter__(self) -> Iterator[Minibatch]:
        for _, minibatch in self.numbered():
            yield minibatch

    def __len__(self) -> int:
        return len(self.units())
