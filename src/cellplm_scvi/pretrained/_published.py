"""A published model from its two files: configuration and checkpoint, checked against each other."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cellplm_scvi.nn.published import PublishedConfig, PublishedNetwork

from ._checkpoint import finite_float32, read_checkpoint
from ._config import read_config
from ._errors import PretrainedFileError, listed
from ._keys import REPLACED, Key, key_table
from ._report import PretrainedReport

CONFIG_SUFFIX, CHECKPOINT_SUFFIX = ".config.json", ".best.ckpt"


@dataclass(frozen=True)
class PublishedCheckpoint:
    """A published model, read and checked.

    Parameters
    ----------
    config
        Configuration.
    genes
        Gene vocabulary, Ensembl ids.
    state
        Our parameters by name, float32.
    report
        What became of each entry of the files.
    """

    config: PublishedConfig
    genes: list[str]
    state: dict[str, Tensor]
    report: PretrainedReport


def read_published(
    config_path: Path, checkpoint_path: Path, *, overwrite: Mapping[str, Any] | None = None, source: str | None = None
) -> PublishedCheckpoint:
    """Read a published model; nothing is built from files that do not fit each other.

    Parameters
    ----------
    config_path, checkpoint_path
        ``PREFIX.config.json`` and ``PREFIX.best.ckpt``.
    overwrite
        Entries of the configuration to replace, as the published pipelines do.
    source
        Where the files come from, for the report.

    Raises
    ------
    PretrainedFileError
        If a file is not what it should be; the message says what was found.
    """
    read = read_config(config_path, overwrite)
    stored = read_checkpoint(checkpoint_path)
    table = key_table(read.config)
    unused = _check_keys(stored.tensors, table, read.config, checkpoint_path.name)
    state = _translate(stored.tensors, table, checkpoint_path.name)
    for key in unused:
        finite_float32(key, stored.tensors[key], checkpoint_path.name)
    report = PretrainedReport(
        source=source or str(checkpoint_path.with_name(checkpoint_path.name.removesuffix(CHECKPOINT_SUFFIX))),
        format="published",
        used={key.name: key.ours for key in table if key.ours is not None},
        unused=unused | {f'"{name}"': "not part of the model's weights" for name in stored.others},
        config_used={name: value for name, value in read.used.items() if name != "gene_list"},
        config_unused=read.unused,
        notes=[f"{len(read.genes):,} genes", *_notes(read.config), *stored.notes],
    )
    return PublishedCheckpoint(read.config, read.genes, state, report)


def load_network(checkpoint: PublishedCheckpoint) -> PublishedNetwork:
    """The network with its weights, in evaluation mode."""
    network = PublishedNetwork(checkpoint.config)
    network.load_state_dict(checkpoint.state)
    return network.eval()


def _check_keys(tensors: Mapping[str, Tensor], table: list[Key], config: PublishedConfig, file: str) -> dict[str, str]:
    """Raise unless keys and shapes are those of the configuration; why each key without effect has none."""
    expected = {key.name: key for key in table}
    missing = [key.name for key in table if key.ours is not None and key.name not in tensors]
    if missing:
        raise PretrainedFileError(
            f"{file} lacks {len(missing):,} of the {len(table):,} weights of its configuration ({listed(missing)})."
        )
    wrong = [
        f"{name} is {tuple(tensor.shape)}, by the configuration {expected[name].shape}"
        for name, tensor in tensors.items()
        if name in expected and tuple(tensor.shape) != expected[name].shape
    ]
    if wrong:
        raise PretrainedFileError(
            f"{file}: {len(wrong):,} weights have another shape than the configuration says: {'; '.join(wrong[:3])}."
        )
    unused = {name: expected[name].unused for name in tensors if name in expected and expected[name].ours is None}
    extra = [name for name in tensors if name not in expected]
    if config.head is not None:
        unused |= {name: REPLACED for name in extra if name.startswith("decoder.")}
    unknown = [name for name in extra if name not in unused]
    if unknown:
        raise PretrainedFileError(
            f"{file} has {len(unknown):,} weights that its configuration does not account for ({listed(unknown)}): are the "
            "two files of the same model?"
        )
    return unused


def _translate(tensors: Mapping[str, Tensor], table: list[Key], file: str) -> dict[str, Tensor]:
    """Our parameters from theirs; queries, keys and values are joined."""
    state: dict[str, Tensor] = {}
    parts: dict[str, list[Tensor]] = {}
    for key in table:
        if key.ours is None:
            continue
        values = finite_float32(key.name, tensors[key.name], file)
        if key.part is None:
            state[key.ours] = values
        else:
            parts.setdefault(key.ours, []).append(values)
    return state | {name: torch.cat(values) for name, values in parts.items()}


def _notes(config: PublishedConfig) -> list[str]:
    notes = []
    if config.covariates and config.head is None:
        codes = " and ".join(f"{n:,} {name}" for name, n in config.covariates.items())
        notes.append(f"its {codes} codes have no names: new categories get their mean")
    if config.head == "annotation":
        notes.append(f"an annotation head of {config.n_outputs:,} classes without names is loaded as module.head")
    if config.head is not None:
        notes.append("no decoder: it embeds cells, but does not give expression and cannot be trained further")
    return notes
