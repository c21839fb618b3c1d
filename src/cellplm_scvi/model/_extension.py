"""Adds categories and genes of new data to a trained model."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any, Self

import numpy as np
import pandas as pd
import torch

from cellplm_scvi import _constants as c
from cellplm_scvi.data._categories import ABSENT, CovariateField
from cellplm_scvi.data._checks import counted, some, warn
from cellplm_scvi.data._vocabulary import OF_DATA, ORGANISM_KEY, UNNAMED_KEY, _gene_totals, gene_columns, match_genes
from cellplm_scvi.nn import AnnotationHead
from cellplm_scvi.nn._nb import log_total

if TYPE_CHECKING:
    from ._cellplm import CellPLM

#: cells that the level of the logits is measured on
N_CALIBRATION_CELLS = 1024


@dataclass(frozen=True)
class Extension:
    """What was added to the covariates of a model after it was built.

    Parameters
    ----------
    steps
        For each time something was added, how many categories each covariate got.
    query
        Whether it was added to map a query, so that training leaves the rest as it is.
    """

    steps: list[dict[str, int]] = field(default_factory=list)
    query: bool = False

    @classmethod
    def from_dict(cls, values: Mapping[str, Any] | None) -> Self:
        """Inverse of :meth:`to_dict`; raise ValueError on anything else."""
        values = values or {}
        steps, query = values.get("steps", []), values.get("query", False)
        fine = isinstance(steps, list) and all(isinstance(step, dict) for step in steps) and isinstance(query, bool)
        if not fine or any(
            name not in c.COVARIATES or type(n) is not int or n < 1 for step in steps for name, n in step.items()
        ):
            raise ValueError(f"extension={str(dict(values))[:100]} does not say how many categories were added.")
        return cls(steps, query)

    def to_dict(self) -> dict[str, Any]:
        """As plain values, for JSON."""
        return asdict(self)

    def n_added(self, covariate: str) -> int:
        """Number of categories added to a covariate."""
        return sum(step.get(covariate, 0) for step in self.steps)

    def then(self, step: dict[str, int], *, query: bool) -> Extension:
        """With a further step."""
        return Extension([*self.steps, step] if step else self.steps, query)


class ExtensionMixin:
    """Builds the module of a model that something was added to."""

    _extension: Extension

    def _reference_sizes(self) -> dict[str, int]:
        """Number of categories of each covariate before any was added."""
        fields = self.registry_["field_registries"]  # type: ignore[attr-defined]
        sizes = {}
        for name in c.COVARIATES:
            if name in fields:
                sizes[name] = fields[name]["state_registry"][CovariateField.N_KNOWN_KEY] - self._extension.n_added(name)
        unfit = [name for step in self._extension.steps for name in step if sizes.get(name, -1) < 0]
        if unfit:
            raise ValueError(f"more categories of {some(unfit)} were added than there are.")
        return sizes

    def _add_categories(self) -> None:
        """Give the module the categories that were added."""
        known = self._reference_sizes()
        for step in self._extension.steps:
            self.module.add_categories({name: (known[name], n) for name, n in step.items()})  # type: ignore[attr-defined]
            known |= {name: known[name] + n for name, n in step.items()}

    @property
    def _default_freeze(self) -> Any:
        return "reference" if self._extension.query else None


def unknown_categories(model: CellPLM) -> dict[str, list[Any]]:
    """Categories of each covariate in the model's AnnData that have no code of their own."""
    fields = model.registry_["field_registries"]
    new = {}
    for name in c.COVARIATES:
        if name in fields:
            state = fields[name]["state_registry"]
            names = state[CovariateField.CATEGORICAL_MAPPING_KEY][state[CovariateField.N_KNOWN_KEY] :]
            new[name] = [category for category in names if category != ABSENT]
    return {name: names for name, names in new.items() if names}


def unknown_genes(model: CellPLM) -> list[str]:
    """Genes of the model's AnnData that the model does not know, but for further names of genes that it knows."""
    state = model.adata_manager.get_state_registry(c.X_KEY)
    given = model._gene_names(model.adata_manager)
    unknown = given[gene_columns(state, given) < 0]
    if (organism := state.get(ORGANISM_KEY)) is not None:
        unknown = unknown.difference(match_genes(pd.Index(state["column_names"]), given, organism).second, sort=False)
    return list(unknown)


def extend[Model: CellPLM](
    model: Model, categories: Mapping[str, list[Any]], genes: list[str], *, query: bool = False
) -> Model:
    """A model that knows more categories and genes, with the AnnData of the one given.

    Added categories contribute what an unseen one does, and added genes say nothing of a cell and are expected at their
    share of the counts: the extended model embeds cells as the given one does, and all weights that the latter had are the
    same to the bit. Only the library size, without ``size_factor_key``, is the sum over more genes, which changes the input of
    models that normalise by it.

    Parameters
    ----------
    model
        A trained model, attached to the new data.
    categories
        Categories to add to each covariate.
    genes
        Genes to add.
    query
        Whether training is to leave everything else as it is.
    """
    if not model.module.decoders:
        raise ValueError("This checkpoint has no decoder: there is nothing to add categories or genes to.")
    module = deepcopy(model.module)
    sizes = {
        name: (_state(model.registry_, name)[CovariateField.N_KNOWN_KEY], len(new)) for name, new in categories.items()
    }
    if genes:
        module.add_genes(_start_biases(model, genes))
        if module.perturbation is not None:
            warn(
                "What perturbations do to the added genes is not known, so what was trained of perturbations is left out: "
                "call train_perturbation() again."
            )
        module.perturbation = None
    if sizes:
        module.add_categories(sizes)
    init = {name: value for name, value in model.init_params_["non_kwargs"].items() if value is not None}
    init["extension"] = model._extension.then({name: n for name, (_, n) in sizes.items()}, query=query).to_dict()
    if genes:
        init.pop("perturbation", None)
    if init.get("published"):
        init["published"] = init["published"] | {
            name: init["published"][name] + len(genes) for name in ("n_genes", "n_outputs")
        }
    extended = type(model)(registry=_grown_registry(model.registry_, categories, genes), **init)
    if isinstance(head := getattr(module, "annotation", None), AnnotationHead):
        extended.module.annotation.take_over(head)
        module.annotation = extended.module.annotation
    extended.module.load_state_dict(module.state_dict())
    extended.module.to(model.module.device)
    extended.module.eval()
    extended.is_trained_ = True
    extended._attach(model.adata)
    report = model.pretrained_report_ or {"notes": []}
    extended.pretrained_report_ = report | {"notes": [*report["notes"], *_describe_added(categories, genes)]}
    return extended


def _state(registry: Mapping[str, Any], name: str) -> dict[str, Any]:
    return registry["field_registries"][name]["state_registry"]


def _grown_registry(
    registry: Mapping[str, Any], categories: Mapping[str, list[Any]], genes: list[str]
) -> dict[str, Any]:
    fields = dict(registry["field_registries"])
    for name, new in categories.items():
        state = {key: value for key, value in fields[name]["state_registry"].items() if key != UNNAMED_KEY}
        n_known = state[CovariateField.N_KNOWN_KEY]
        known = np.asarray(state[CovariateField.CATEGORICAL_MAPPING_KEY][:n_known], dtype=object)
        mapping = np.concatenate([known, np.asarray(new, dtype=object)])
        state |= {CovariateField.CATEGORICAL_MAPPING_KEY: mapping, CovariateField.N_KNOWN_KEY: len(mapping)}
        fields[name] = {**fields[name], "state_registry": state}
    state = {key: value for key, value in fields[c.X_KEY]["state_registry"].items() if key not in OF_DATA}
    names = np.concatenate([np.asarray(state["column_names"], dtype=object), np.asarray(genes, dtype=object)])
    fields[c.X_KEY] = {**fields[c.X_KEY], "state_registry": state | {"column_names": names, "n_vars": len(names)}}
    return {**registry, "field_registries": fields}


@torch.inference_mode()
def _start_biases(model: CellPLM, genes: list[str]) -> list[torch.Tensor]:
    r"""Logits in each decoder at which new genes are expected at their share of the counts, each (n_added,).

    With the share :math:`s_j` of a new gene in all counts, the share :math:`S` of all new genes, and the mean over cells
    :math:`m` of the log of the softmax's denominator over the genes that the model knows,
    :math:`b_j = m + \log s_j - \log(1 - S)`.
    """
    manager = model.adata_manager
    given = model._gene_names(manager)
    totals = pd.Series(_gene_totals(manager.get_from_registry(c.X_KEY)), index=given) + 0.1
    known = totals[gene_columns(manager.get_state_registry(c.X_KEY), given) >= 0].sum()
    relative = torch.as_tensor(np.log(totals[genes].to_numpy() / known), dtype=torch.float32)
    rows = np.random.default_rng(0).permutation(model.adata.n_obs)[:N_CALIBRATION_CELLS]
    levels: list[list[torch.Tensor]] = [[] for _ in model.module.decoders]
    for tensors in model._make_data_loader(model.adata, rows):  # type: ignore[arg-type]
        tensors = {name: tensor.to(model.module.device) for name, tensor in tensors.items()}
        inputs = model.module._get_generative_input(tensors, model.module.inference(tensors))  # type: ignore[arg-type]
        for level, decoder in zip(levels, model.module.decoders, strict=True):
            output = decoder.output(inputs["measured"])
            logits = torch.nn.functional.linear(decoder(inputs["z"], inputs["covariates"]), output.weight, output.bias)
            if output.measured is not None:
                logits = logits.masked_fill(~output.measured[inputs["panel"]], -torch.inf)
            level.append(log_total(logits, rest=False))
    return [torch.cat(level).mean() + relative.to(level[0]) for level in levels]


@contextmanager
def unseen_is_expected() -> Iterator[None]:
    """Say nothing of categories and genes that the model does not know, since they are about to be added."""
    with warnings.catch_warnings():
        warnings.filterwarnings(
            "ignore", message=".*(has not seen|unknown to the model|Unknown genes)", category=UserWarning
        )
        yield


def _describe_added(categories: Mapping[str, list[Any]], genes: list[str]) -> list[str]:
    """Lines for the report of a pre-trained model."""
    lines = [
        f"{len(names):,} {name} categor{'y' if len(names) == 1 else 'ies'} added ({some(names)}), each with the mean "
        "contribution to start from"
        for name, names in categories.items()
    ]
    if genes:
        lines.append(
            f"{counted(len(genes), 'gene')} added ({some(genes)}): embeddings start at zero, expected counts at "
            "their share in the "
            "new data, dispersions at the mean of the others"
        )
    return lines
