"""Reads and checks the configuration of a published model."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from cellplm_scvi.data._checks import warn
from cellplm_scvi.nn.published import PublishedConfig

from ._errors import PretrainedFileError, listed, quoted

#: a configuration is a few hundred kilobytes of gene names
MAX_JSON_BYTES = 64 * 2**20
MAX_LAYERS = 1000
MAX_SIZE = 2**31
MAX_NAME = 100


@dataclass(frozen=True)
class ReadConfig:
    """A checked configuration.

    Parameters
    ----------
    config
        What shapes the network.
    genes
        Gene vocabulary, Ensembl ids.
    used
        Entries that were read, with their values.
    unused
        Names of the others.
    """

    config: PublishedConfig
    genes: list[str]
    used: dict[str, Any]
    unused: list[str]


def read_json(path: Path) -> dict[str, Any]:
    """An object from a JSON file of unknown origin."""
    size = path.stat().st_size
    if size > MAX_JSON_BYTES:
        raise PretrainedFileError(f"{path.name} has {size:,} bytes: this is no configuration.")

    def refuse(constant: str) -> NoReturn:
        raise ValueError(f"{constant} is not a number")

    try:
        found = json.loads(path.read_bytes(), parse_constant=refuse)
    except (ValueError, RecursionError) as error:
        reason = str(error)[:200] or type(error).__name__
        raise PretrainedFileError(f"{path.name} is not valid JSON, perhaps truncated: {reason}") from None
    if not isinstance(found, dict):
        raise PretrainedFileError(f"{path.name} holds a {type(found).__name__}; an object of settings is needed.")
    return found


class Entries:
    """Typed access to the entries of a configuration, which remembers those that were asked for."""

    def __init__(self, entries: Mapping[str, Any], file: str):
        self._entries, self._file = entries, file
        self.used: dict[str, Any] = {}

    def fail(self, name: str, what: str) -> NoReturn:
        """Raise for an entry."""
        raise PretrainedFileError(f"{self._file}: {name} is {quoted(self._entries.get(name))}; {what}.")

    def _take(self, name: str, default: Any, check: Callable[[Any], bool], what: str) -> Any:
        if name not in self._entries:
            if default is ...:
                raise PretrainedFileError(f"{self._file} has no entry {name}: it is not a published configuration.")
            return default
        value = self._entries[name]
        if not check(value):
            self.fail(name, f"needed is {what}")
        self.used[name] = value
        return value

    def size(self, name: str, default: Any = ..., low: int = 1, high: int = MAX_SIZE) -> int:
        """A whole number."""
        return self._take(name, default, lambda v: type(v) is int and low <= v <= high, f"a whole number from {low:,}")

    def number(self, name: str, default: float, low: float = -math.inf, high: float = math.inf) -> float:
        """A finite number."""

        def check(value: Any) -> bool:
            return type(value) in (int, float) and abs(value) < 1e30 and low <= value <= high

        return float(self._take(name, default, check, f"a number from {low:g} to {high:g}"))

    def flag(self, name: str, default: bool) -> bool:
        """True or false."""
        return self._take(name, default, lambda v: type(v) is bool, "true or false")

    def word(self, name: str, default: Any, allowed: Mapping[str | None, Any]) -> Any:
        """One of a few words, translated."""
        words = listed(allowed, 12)
        value = self._take(name, default, lambda v: isinstance(v, str | None) and v in allowed, f"one of {words}")
        return allowed[value]

    def refuse(self, name: str, why: str) -> None:
        """Raise if a switch is on."""
        if self.flag(name, False):
            self.fail(name, why)

    def genes(self, name: str) -> list[str]:
        """The vocabulary."""
        genes = self._take(name, ..., lambda v: isinstance(v, list) and len(v) > 0, "a list of gene names")
        for n, gene in enumerate(genes):
            if not isinstance(gene, str) or not gene.strip() or len(gene) > MAX_NAME or not gene.isprintable():
                raise PretrainedFileError(
                    f"{self._file}: {name} holds {quoted(gene)} in place {n:,}; a name is needed."
                )
        twice = [gene for gene, n in Counter(genes).items() if n > 1]
        if twice:
            raise PretrainedFileError(f"{self._file}: {name} has {listed(twice)} more than once.")
        return genes


def read_config(path: Path, overwrite: Mapping[str, Any] | None = None) -> ReadConfig:
    """Read and check a published ``PREFIX.config.json``.

    Parameters
    ----------
    path
        The file.
    overwrite
        Entries to replace, as the published pipelines do.

    Raises
    ------
    PretrainedFileError
        If it is not one, or needs something that is not supported.
    """
    in_file = read_json(path)
    raw = {**in_file, **(overwrite or {})}
    entries = Entries(raw, path.name)
    genes = entries.genes("gene_list")
    entries.word("enc_mod", ..., {"flowformer": "flow"})
    position = entries.word(
        "pe_type", "sin", dict.fromkeys(("sin", "sinu", "sinusoidal", "learnable", "bin"), True) | {None: False}
    )
    head = entries.word("head_type", None, {None: None, "annotation": "annotation", "embedder": "embedder"})
    latent = entries.word("latent_mod", "vae", {word: word for word in ("gmvae", "vae", "ae")})
    if head is None:
        entries.word("dec_mod", ..., {"nbmlp": "nbmlp"})
    if position:
        entries.refuse("cat_pe", "a concatenated position code is not supported, nor was it by the published code")
    for switch in ("input_covariate", "dsbn", "dar"):
        entries.refuse(switch, "models pre-trained with it are not supported")
    n_decoder_layers = entries.size("dec_layers", high=MAX_LAYERS)
    rates = {name: entries.number(name, default, 0.0, 1.0) for name, default in _RATES.items()}
    norms = {"groupnorm": "groupnorm", "layernorm": "layernorm", "rmsnorm": "rmsnorm", "none": "none", None: "none"}
    config = PublishedConfig(
        n_genes=len(genes),
        n_hidden=entries.size("enc_hid"),
        n_layers=entries.size("enc_layers", high=MAX_LAYERS),
        n_heads=entries.size("enc_head", 8),
        n_latent=entries.size("post_latent_dim"),
        latent=latent,
        n_components=entries.size("num_clusters", 16),
        n_decoder_hidden=entries.size("dec_hid"),
        n_decoder_layers=n_decoder_layers,
        n_outputs=entries.size("out_dim"),
        n_batches=entries.size("batch_num", 0, low=0),
        n_datasets=entries.size("dataset_num", 0, low=0),
        n_platforms=entries.size("platform_num", 0, low=0),
        dropout_rate=rates["model_dropout"],
        norm=entries.word("norm", "layernorm", norms),
        head=head,
        has_position=position,
        cell_mask_rate=rates["mask_node_rate"],
        gene_mask_rate=rates["mask_feature_rate"],
        objective=entries.word("objective", "nb", {"nb": "nb", "imputation": "imputation"}),
        dae=entries.flag("dae", True),
        latent_floor=entries.number("lamda", 0.5),
        weight_gaussian=entries.number("w_li", 1.0),
        weight_categorical=entries.number("w_en", 1.0),
    )
    _check_together(config, path.name)
    if odd := [name for name in overwrite or {} if name not in entries.used and name not in in_file]:
        warn(
            f"overwrite_config: {path.name} has no {listed(odd)}, and nothing here depends on it. What counts is "
            f"{listed(sorted(entries.used), 40)}."
        )
    return ReadConfig(config, genes, entries.used, sorted(name for name in raw if name not in entries.used))


_RATES = {"model_dropout": 0.1, "mask_node_rate": 0.5, "mask_feature_rate": 0.8}


def _check_together(config: PublishedConfig, file: str) -> None:
    """Raise if sizes do not fit each other."""
    problems = []
    if config.n_hidden % config.n_heads:
        problems.append(f"enc_hid={config.n_hidden} is not a multiple of enc_head={config.n_heads}")
    if config.norm == "groupnorm":
        decodes = config.head is None and config.n_decoder_layers > 1
        for name, width in (("enc_hid", config.n_hidden), ("dec_hid", config.n_decoder_hidden if decodes else 4)):
            if width % 4:
                problems.append(f"{name}={width} is not a multiple of the 4 groups of its norm")
    if config.head is None and config.n_outputs != config.n_genes:
        problems.append(f"out_dim={config.n_outputs:,} differs from the {config.n_genes:,} genes of gene_list")
    if config.head is None and config.n_decoder_layers == 1 and config.n_decoder_hidden != config.n_latent:
        problems.append(
            f"dec_layers=1 needs dec_hid={config.n_decoder_hidden} to equal post_latent_dim={config.n_latent}"
        )
    if problems:
        raise PretrainedFileError(f"{file}: {'; '.join(problems)}.")
