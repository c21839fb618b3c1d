"""Training of perturbations: what was observed in pairs of sets, and what marks make of it for those never seen."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Sequence
from numbers import Real
from typing import TYPE_CHECKING, Any, cast, get_args

import numpy as np
import pandas as pd
import torch
from scvi import settings
from torch import Tensor

from cellplm_scvi import _constants as c
from cellplm_scvi._compat import move_to_device
from cellplm_scvi.data._categories import AnnotationField, are_controls, as_text
from cellplm_scvi.data._checks import check_sizes, some
from cellplm_scvi.data._loader import CellDataset, find_nearest, whole_sample_loader
from cellplm_scvi.data._perturbation import Changes, ControlPairs, observed_changes, pair_with_controls
from cellplm_scvi.data._table import CellTable
from cellplm_scvi.genes import map_genes
from cellplm_scvi.genes._mapping import Target
from cellplm_scvi.module import PublishedModule
from cellplm_scvi.nn import PerturbationHead, PerturbationMark

from ._defaults import default_inference_batch_size
from ._embedding import fixed_draws
from ._perturbation_fit import common_change, fit_process, trusted
from ._perturbation_marks import MIN_ELEMENTS, MarkTraining, pad

if TYPE_CHECKING:
    from cellplm_scvi.module import CellPLMModule

#: times that some perturbations are left out to see what the others say of them
MAX_LEFT_OUT = 20
#: range of what marks, the perturbed gene itself, and slopes on it count for
TRUST_BOUNDS = [(0.0, 1.0), (-5.0, 5.0), (-5.0, 5.0)]


def genes_meant(names: Sequence[str], target: Target = "ensembl") -> pd.Series:
    """Genes that names of perturbations mean, missing where they mean none; as :func:`~cellplm_scvi.genes.map_genes`."""
    with warnings.catch_warnings():
        # so do names of drugs
        warnings.filterwarnings("ignore", message=".*look like those of mouse genes", category=UserWarning)
        return map_genes(names, target).mapped


class PerturbationTrainingMixin:
    """Learns what perturbations change."""

    module: CellPLMModule
    #: names of the elements, kind of mark and number of observations of a trained head, as plain values
    _perturbation: dict[str, Any] | None = None

    def train_perturbation(
        self,
        mark: PerturbationMark = "learned",
        n_steps: int = 100,
        lr: float = 5e-3,
        progress_bar: bool = True,
    ) -> None:
        """Learn what perturbations change, after :meth:`train`.

        The rest of the model stays as it is, to the bit, so that embeddings and expression do not depend on this. The
        input are control cells alone; perturbed cells are only ever compared with what is predicted from them. Sets of
        perturbed cells are paired with the control cells of their batch (and cell type, with ``labels_key``).

        First, marks in the input of control cells are trained, with elements of perturbations held out in turn; what they
        predict for those decides how far they are believed, for perturbations that were never seen. Then the changes that
        were observed are shrunk towards that, gene by gene, by adaptive shrinkage. See the page on perturbations.

        Parameters
        ----------
        mark
            How a perturbed gene is marked in the input. ``"learned"``: a vector computed from the gene's embedding, and one
            that all perturbations share; ``"constant"``: its expression is set to -100, as in the paper; ``"none"``: only
            the vector that all share.
        n_steps, lr
            Optimiser steps and learning rate of the marks, for each of at most 3 folds and once for all.
        progress_bar
            Whether to show one.

        Raises
        ------
        ValueError
            If the model is not trained, the data have no perturbations or no control cells, the network is a published
            one, or ``n_steps`` is not positive. What was trained before stays, whatever stops this.
        """
        check_sizes(n_steps=n_steps)
        if not isinstance(lr, Real) or not 0 < lr < np.inf:
            raise ValueError(f"lr={lr!r} must be a positive number.")
        if mark not in get_args(PerturbationMark):
            raise ValueError(f'mark="{mark}" is not one of {some(get_args(PerturbationMark))}.')
        if isinstance(self.module, PublishedModule):
            raise ValueError(
                "Perturbations cannot be trained with a published network: train a CellPLM of your own data."
            )
        if not self.is_trained_:  # type: ignore[attr-defined]
            raise ValueError("The model is not trained: call train() before train_perturbation().")
        if self.adata is None:  # type: ignore[attr-defined]
            raise ValueError("The model has no AnnData: load it with `adata=` to train perturbations.")
        self._read_annotations()  # type: ignore[attr-defined]
        table = CellTable.from_manager(self.adata_manager)  # type: ignore[attr-defined]
        pairs = pair_with_controls(table, self._perturbation_of_cells(table), self._control)
        names = sorted({name for elements in pairs.perturbations for name in elements})
        before = self._perturbation, self.module.perturbation
        try:
            self._perturbation = {"elements": names, "mark": mark, "n_observations": len(pairs)}
            self._add_perturbation()
            self._fit_perturbation(table, pairs, n_steps, lr, progress_bar)
        except BaseException:  # an interruption, too, would leave a head that predicts no change
            self._perturbation, self.module.perturbation = before
            raise
        self.init_params_["non_kwargs"]["perturbation"] = self._perturbation  # type: ignore[attr-defined]

    @property
    def _control(self) -> str:
        """The word for controls, of the data that the model was set up with."""
        field = self.registry_["field_registries"].get(c.PERTURBATION_KEY, {})  # type: ignore[attr-defined]
        asked = self.registry_["setup_args"].get("control_category", "control")  # type: ignore[attr-defined]
        return as_text(field.get("state_registry", {}).get(AnnotationField.DEFAULT_KEY, asked))

    def _perturbation_of_cells(self, table: CellTable) -> np.ndarray:
        """Perturbation of each cell, (n_cells,); raise if there is nothing to learn from."""
        if c.PERTURBATION_KEY not in table.annotations:
            raise ValueError(
                "No perturbations are registered: pass perturbation_key (and control_category) to setup_anndata."
            )
        state = self.adata_manager.get_state_registry(c.PERTURBATION_KEY)  # type: ignore[attr-defined]
        mapping = np.asarray(state[AnnotationField.CATEGORICAL_MAPPING_KEY], dtype=object)
        names, key = mapping[table.annotations[c.PERTURBATION_KEY]], state[AnnotationField.ORIGINAL_ATTR_KEY]
        used = pd.unique(names)
        controls = are_controls(used, self._control)
        found = list(used[~controls])
        if not controls.any():
            raise ValueError(
                f'obs["{key}"] has no cell of control_category="{self._control}"; it has {some(found)}. Pass the name of '
                "the control to setup_anndata."
            )
        if not found:
            raise ValueError(f'obs["{key}"] has "{self._control}" only: there is no perturbation to learn from.')
        return names

    def _add_perturbation(self) -> None:
        """Give the module the head that ``_perturbation`` describes."""
        if self._perturbation is None:
            return
        names: Any = self._perturbation.get("elements")
        n: Any = self._perturbation.get("n_observations")
        fine = isinstance(names, list) and all(isinstance(name, str) for name in names) and type(n) is int and n > 0
        if not fine or self._perturbation.get("mark") not in get_args(PerturbationMark):
            raise ValueError(f"perturbation={str(self._perturbation)[:100]} does not say what was trained.")
        module, genes = self.module, self._element_genes(names)
        with torch.random.fork_rng():
            torch.manual_seed(settings.seed or 0)
            module.perturbation = PerturbationHead(
                module.n_hidden,
                module.latent.mean.out_features,
                module.n_genes,
                len(names),
                int((genes < 0).sum()),
                n,
                self._perturbation["mark"],
            ).to(module.device)

    def _element_genes(self, names: Iterable[str]) -> np.ndarray:
        """Column in the model of each element, -1 where it is no gene of the model."""
        genes = pd.Index(self.registry_["field_registries"][c.X_KEY]["state_registry"]["column_names"])  # type: ignore[attr-defined]
        names = list(names)
        columns = genes.get_indexer(pd.Index(names))
        for target in get_args(Target):  # perturbations may be named in another way than genes
            if (columns < 0).any():
                translated = pd.Index(genes_meant(names, target))
                columns = np.where(columns < 0, genes.get_indexer(translated), columns)
        return columns

    def _fit_perturbation(
        self, table: CellTable, pairs: ControlPairs, n_steps: int, lr: float, progress_bar: bool
    ) -> None:
        module, head = self.module, cast("PerturbationHead", self.module.perturbation)  # which was added just now
        module.eval()
        changes = observed_changes(table, pairs)
        names = self._perturbation["elements"]  # type: ignore[index]
        membership = np.array([[name in elements for name in names] for elements in pairs.perturbations])
        controls = np.unique(np.concatenate(pairs.controls))
        mean = self._control_codes(table, controls)
        codes = np.array([mean[rows].mean(0) for rows in pairs.controls])[pairs.context]
        centre = codes.mean(0)
        unit = np.sqrt(max(((codes - centre) ** 2).sum(1).mean(), 1e-12))

        elements = self._element_genes(names)
        elements[elements < 0] = module.n_genes + np.arange((elements < 0).sum())
        head.elements.copy_(torch.from_numpy(elements))
        head.covariance.copy_(self._decoder_covariance(table, pairs))
        common, expected = np.zeros(module.n_genes), np.zeros((len(names), module.n_genes))
        trust = np.zeros(len(head.trust))
        if len(names) >= MIN_ELEMENTS:
            alone = [np.flatnonzero(membership[:, i] & (membership.sum(1) == 1)) for i in range(len(names))]
            judged = [i for i, rows in enumerate(alone) if rows.size]
            pooled = np.array([_pooled(changes, alone[i]) for i in judged]).reshape(len(judged), 2, module.n_genes)
            observed, variance = pooled[:, 0], pooled[:, 1]
            by_others = np.zeros_like(observed)
            if len(judged) >= MIN_ELEMENTS:
                common = common_change(observed, variance)
                fold = np.arange(len(judged)) % MAX_LEFT_OUT
                for f in np.unique(fold):
                    by_others[fold == f] = common_change(observed[fold != f], variance[fold != f])
            dataset = CellDataset(table, self._spatial_inputs, find_nearest(table, self._spatial_inputs, controls))  # type: ignore[attr-defined]
            marked = pad([elements[np.flatnonzero(row)].tolist() for row in membership])
            beyond = Changes(changes.change - common, changes.variance)
            training = MarkTraining(
                module, dataset, pairs, beyond, marked, n_steps, lr, settings.seed or 0, progress_bar
            )
            predictions = np.stack([training.cross_fit(elements), *self._of_genes(elements)])
            trust = trusted(observed - by_others, variance, predictions[:, judged], TRUST_BOUNDS)
            expected = np.tensordot(trust, predictions, 1)
        # a pair is expected to do what its elements do
        residual = changes.change - common - membership.astype(np.float64) @ expected
        fit = fit_process(residual, changes.variance, membership, (codes - centre) / unit)
        n_elements = membership.sum(1, keepdims=True)
        spread = np.maximum(residual**2 - changes.variance, 0.0) / n_elements
        values = {
            "membership": membership,
            "weights": fit.weights,
            "places": codes,
            "centre": centre,
            "common": common,
            "expected": expected,
            "variance": fit.variance,
            "new_variance": spread.mean(0),
            "trust": trust,
            "slope": fit.settings.slope / unit**2,
            "attenuation": fit.settings.attenuation,
            "interaction": fit.settings.interaction,
        }
        if not all(np.isfinite(value).all() for value in values.values()):
            raise RuntimeError(f"Training of perturbations has diverged with lr={lr:g}: pass a smaller one.")
        for name, value in values.items():
            buffer = getattr(head, name)
            buffer.copy_(torch.as_tensor(np.asarray(value), dtype=buffer.dtype))

    def _of_genes(self, elements: np.ndarray) -> np.ndarray:
        """Whether a gene is the perturbed one, and its slope on that over control cells, (2, n_elements, n_genes)."""
        head, weight = self.module.perturbation, self.module.decoder.weight.detach()
        codes = torch.from_numpy(elements).to(weight.device)[:, None]
        own = torch.stack([head.own_genes(code) for code in codes])  # type: ignore[union-attr]
        slopes = torch.stack([head.response(code, weight) for code in codes])  # type: ignore[union-attr]
        return torch.stack([own, slopes]).cpu().numpy()

    @torch.inference_mode()
    def _decoder_covariance(self, table: CellTable, pairs: ControlPairs) -> Tensor:
        """Covariance of the decoder's last hidden states within sets of control cells, (n_hidden, n_hidden)."""
        controls = np.unique(np.concatenate(pairs.controls))
        loader = self._control_loader(table, controls, controls, None)
        context = np.full(table.n_cells, -1)
        for i, rows in enumerate(pairs.controls):
            context[rows] = i
        states, sets = [], []
        for request, tensors in zip(loader.sampler, loader, strict=True):
            tensors = move_to_device(tensors, self.module.device)
            outputs = self.module.inference(tensors)
            inputs = self.module._get_generative_input(tensors, outputs)
            states.append(self.module.decoder(outputs["qzm"], inputs["covariates"]))
            sets.append(request.rows if request.target is None else request.rows[request.target])
        state, of = torch.cat(states), torch.from_numpy(context[np.concatenate(sets)]).to(self.module.device)
        mean = state.new_zeros(len(pairs.controls), state.shape[1]).index_add(0, of, state)
        mean = mean / torch.bincount(of, minlength=len(mean)).clamp_min(1)[:, None]
        centred = state - mean[of]
        return centred.T @ centred / max(len(centred) - 1, 1)

    @torch.inference_mode()
    def _control_codes(self, table: CellTable, rows: np.ndarray) -> np.ndarray:
        """Mean of q(z|h) of control cells in the company of control cells alone, (n_cells, n_latent); others are NaN."""
        mean = np.full((table.n_cells, self.module.latent.mean.out_features), np.nan, dtype=np.float32)
        loader = self._control_loader(table, rows, rows, None)
        with fixed_draws():
            for request, tensors in zip(loader.sampler, loader, strict=True):
                found = request.rows if request.target is None else request.rows[request.target]
                mean[found] = self.module.embed(tensors).float().cpu().numpy()
        return mean

    def _control_loader(self, table: CellTable, rows: np.ndarray, pool: np.ndarray, batch_size: int | None) -> Any:
        return whole_sample_loader(
            table,
            self._spatial_inputs,  # type: ignore[attr-defined]
            rows,
            batch_size=batch_size or default_inference_batch_size(self.module.n_hidden, self.module.device.type),
            max_context=self.module.max_context,
            pool=pool,
        )


def _pooled(changes: Changes, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean change over observations weighted by precision, and its variance, each (n_genes,)."""
    precision = 1 / changes.variance[rows]
    total = precision.sum(0)
    return (changes.change[rows] * precision).sum(0) / total, 1 / total
