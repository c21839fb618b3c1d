"""Prediction of perturbations: what they change in control cells."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from numbers import Number
from typing import Any, Literal

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from cellplm_scvi import _constants as c
from cellplm_scvi._compat import AnnOrMuData, move_to_device
from cellplm_scvi.data._categories import AnnotationField, are_controls, as_text
from cellplm_scvi.data._checks import check_library_size, check_sizes, some, warn
from cellplm_scvi.data._perturbation import elements_of
from cellplm_scvi.data._table import registered_codes
from cellplm_scvi.nn._perturbation import UNKNOWN, perturbed_shares

from ._embedding import fixed_draws
from ._perturbation_training import PerturbationTrainingMixin, genes_meant


class PerturbationMixin(PerturbationTrainingMixin):
    """Predicts what perturbations change in control cells."""

    @torch.inference_mode()
    def predict_perturbation(
        self,
        perturbation: str,
        adata: AnnOrMuData | None = None,
        indices: Sequence[int] | None = None,
        gene_list: Sequence[str] | None = None,
        library_size: float | Literal["latent"] = 1,
        batch_size: int | None = None,
    ) -> pd.DataFrame:
        """Expected expression of control cells, had they been perturbed.

        Parameters
        ----------
        perturbation
            A name as in ``adata.obs[perturbation_key]``, several of them as ``"A+B"`` whether or not they were seen
            together, or a gene that was never perturbed. Another name of a perturbed gene is that gene.
        adata
            AnnData with control cells; ``None`` is the one that the model was built with. Without a column of
            perturbations, all its cells are controls.
        indices
            Control cells to predict, in this order; ``None`` is all of them.
        gene_list
            Genes to return, in the order of ``adata.var_names``; ``None`` is all that the AnnData shares with the model.
        library_size
            Counts that the expression of a cell adds up to, over the genes it measured, with genes that ``size_factor_key`` alone
            counts if there are such; ``"latent"`` is the cell's own library.
        batch_size
            Cells that the encoder takes at once; ``None`` chooses by memory.

        Returns
        -------
        (n_control_cells, n_genes), in the units of :meth:`get_normalized_expression`, rows named by ``obs_names``. NaN where
        a cell's data set did not measure a gene.

        Raises
        ------
        ValueError
            If perturbations are not trained, ``perturbation`` is neither one of the training data nor a gene, or there are
            no control cells.
        """
        check_library_size(library_size)
        adata, rows, genes, names = self._asked(adata, indices, gene_list)
        predicted = np.empty((rows.size, len(names)), dtype=np.float32)
        for places, _, (after,) in self._perturbed(adata, rows, [self._resolve(perturbation)], batch_size):
            predicted[places] = after[:, genes].cpu().numpy()
        if library_size == "latent":
            predicted *= self.get_latent_library_size(adata, rows)[:, None]  # type: ignore[attr-defined]
        else:
            predicted *= library_size
        return pd.DataFrame(predicted, index=adata.obs_names[rows], columns=names)

    @torch.inference_mode()
    def get_perturbation_effect(
        self,
        perturbations: str | Sequence[str] | None = None,
        adata: AnnOrMuData | None = None,
        indices: Sequence[int] | None = None,
        gene_list: Sequence[str] | None = None,
        batch_size: int | None = None,
    ) -> pd.DataFrame:
        """Mean change of expression by perturbations, with its uncertainty.

        Parameters
        ----------
        perturbations
            As in :meth:`predict_perturbation`; ``None`` is all elements of the training data one by one.
        adata, indices, gene_list, batch_size
            As in :meth:`predict_perturbation`.

        Returns
        -------
        DataFrame with a row for each perturbation and gene (a MultiIndex of these), and columns ``lfc_mean``, the log2 fold
        change of the mean expression of the control cells (in the company of control cells alone, as if only they were in the
        AnnData), and ``lfc_std``, its standard error: what the number of
        cells and the shrinkage leave open, or for elements that were never perturbed how far changes usually are from
        what is expected. NaN for genes that the data set of no control cell measured.

        Raises
        ------
        ValueError
            As :meth:`predict_perturbation`.
        """
        adata, rows, genes, names = self._asked(adata, indices, gene_list)
        if perturbations is None:
            perturbations = self._perturbation["elements"]  # type: ignore[index]
        asked: list[Any] = list(perturbations) if pd.api.types.is_list_like(perturbations) else [perturbations]
        if not asked:
            raise ValueError("perturbations names none.")
        resolved = [self._resolve(name) for name in asked]
        total = torch.zeros(1 + len(asked), len(names))
        measured = torch.zeros(len(names), dtype=torch.bool)
        for _, before, after in self._perturbed(adata, rows, resolved, batch_size):
            measured |= before[:, genes].isfinite().any(0).cpu()
            for i, shares in enumerate([before, *after]):
                total[i] += shares[:, genes].nansum(0).cpu()
        change = (total[1:].clamp_min(1e-12) / total[0].clamp_min(1e-12)).log2().numpy()
        deviation = np.stack([self._deviation(*perturbation)[genes] for perturbation in resolved]) / np.log(2)
        change[:, ~measured] = deviation[:, ~measured] = np.nan
        index = pd.MultiIndex.from_product([asked, names], names=["perturbation", "gene"])
        return pd.DataFrame({"lfc_mean": change.ravel(), "lfc_std": deviation.ravel()}, index=index)

    def _asked(
        self, adata: AnnOrMuData | None, indices: Sequence[int] | None, gene_list: Sequence[str] | None
    ) -> tuple[Any, np.ndarray, np.ndarray, pd.Index]:
        """The data, rows of control cells, columns of the genes asked for and their names."""
        if self.module.perturbation is None:
            raise ValueError("Perturbations are not trained: call train_perturbation() first.")
        adata = self._validate_anndata(adata)  # type: ignore[attr-defined]
        genes, names = self._genes(self.get_anndata_manager(adata, required=True), gene_list)  # type: ignore[attr-defined]
        control = self._is_control(adata)
        rows = np.flatnonzero(control) if indices is None else self._rows(adata.obs_names, indices)  # type: ignore[attr-defined]
        if rows.size == 0:
            if indices is not None:
                raise ValueError("indices asks for no cell.")
            raise ValueError(f'There is no control cell (control_category="{self._control}") to predict from.')
        if not control[rows].all():
            bad = adata.obs_names[rows[~control[rows]]]
            raise ValueError(
                f"{len(bad):,} of the cells in indices {'is' if len(bad) == 1 else 'are'} perturbed ({some(bad)}): "
                "predictions start from control cells."
            )
        return adata, rows, genes, names

    def _is_control(self, adata: AnnOrMuData) -> np.ndarray:
        """Which cells are controls, (n_cells,): all where nothing else is registered."""
        manager = self.get_anndata_manager(adata, required=True)  # type: ignore[attr-defined]
        if c.PERTURBATION_KEY not in manager.data_registry:
            return np.ones(adata.n_obs, dtype=bool)
        mapping = manager.get_state_registry(c.PERTURBATION_KEY)[AnnotationField.CATEGORICAL_MAPPING_KEY]
        codes = registered_codes(manager, c.PERTURBATION_KEY)
        return are_controls(mapping, self._control)[codes]

    def _resolve(self, perturbation: str) -> tuple[list[int], list[int]]:
        """Indices of the elements that training had, and codes of the others."""
        if not isinstance(perturbation, str | Number) or pd.isna(perturbation):
            raise TypeError(
                f"perturbation={perturbation!r} is not the name of one; get_perturbation_effect takes a list of names."
            )
        elements = elements_of(as_text(perturbation), self._control)
        if not elements:
            raise ValueError(f'"{self._control}" is no perturbation; get_normalized_expression gives it.')
        seen: list[str] = self._perturbation["elements"]  # type: ignore[index]
        known, new = self._recognised(elements)
        codes = [int(code) for code in self._element_genes(new)]
        absent = [name for name, code in zip(new, codes, strict=True) if code < 0]
        if absent:
            unknown = [name for name, found in zip(absent, genes_meant(absent).notna(), strict=True) if not found]
            if unknown:
                within = "" if unknown == [as_text(perturbation)] else f'"{perturbation}": '
                raise ValueError(
                    f"{within}{some(unknown)} is neither a perturbation of the training data ({some(seen)}) nor a gene."
                )
            warn(
                f"{some(absent)}: perturbed in no training cell and not measured, so that nothing tells it from other genes. "
                "It is predicted to do what they do on average."
            )
        return known, [code if code >= 0 else UNKNOWN for code in codes]

    def _recognised(self, names: Sequence[str]) -> tuple[list[int], list[str]]:
        """Indices of the elements that training had, under these or other names of the same genes, and the other names."""
        seen: list[str] = self._perturbation["elements"]  # type: ignore[index]
        known = {name: seen.index(name) for name in names if name in seen}
        others = [name for name in names if name not in seen]
        if others:
            genes = genes_meant(seen).tolist()
            for name, gene in zip(others, genes_meant(others), strict=True):
                if isinstance(gene, str) and genes.count(gene) == 1:
                    known[name] = genes.index(gene)
        return sorted(set(known.values())), [name for name in names if name not in known]

    def _perturbed(
        self, adata: AnnOrMuData, rows: np.ndarray, perturbations: list[tuple[list[int], list[int]]], size: int | None
    ) -> Iterable[tuple[np.ndarray, Tensor, list[Tensor]]]:
        """For some rows at a time: their places in ``rows``, shares of genes, and those with each perturbation."""
        if size is not None:
            check_sizes(batch_size=size)
        module = self.module.eval()
        table = self._table(adata)  # type: ignore[attr-defined]
        pool = np.flatnonzero(self._is_control(adata))
        places: dict[int, list[int]] = {}
        for place, row in enumerate(rows.tolist()):
            places.setdefault(row, []).append(place)
        loader = self._control_loader(table, np.unique(rows), pool, size)
        with fixed_draws():
            for request, tensors in zip(loader.sampler, loader, strict=True):
                tensors = move_to_device(tensors, module.device)
                target = tensors.get("target", torch.ones_like(tensors["library"], dtype=torch.bool))
                hidden = module.hidden(tensors)
                z, library = module.latent.posterior_mean(hidden)[target], tensors["library"][target]
                inputs = module._get_generative_input(tensors, {"z": z, "library": library})  # type: ignore[typeddict-item]
                output, panel = module.decoder.output(inputs["measured"]), inputs["panel"]
                log_shares = output.log_shares(module.decoder(z, inputs["covariates"]), panel)
                measured = None if output.measured is None or panel is None else output.measured[panel]
                after = []
                for known, new in perturbations:
                    change = self._change(tensors, hidden, z, target, known, new, output.weight)
                    after.append(_hide(perturbed_shares(log_shares, change), measured))
                found = request.rows[target.cpu().numpy()]
                # a row may be asked for more than once
                repeats = np.repeat(np.arange(found.size), [len(places[row]) for row in found])
                where = np.concatenate([places[row] for row in found])
                yield where, _hide(log_shares.exp(), measured)[repeats], [shares[repeats] for shares in after]

    def _change(
        self, tensors: Any, hidden: Tensor, z: Tensor, target: Tensor, known: list[int], new: list[int], weight: Tensor
    ) -> Tensor:
        """Change of log shares of the cells that count, (n_targets, n_genes)."""
        head = self.module.perturbation
        device, n_elements = hidden.device, len(known) + len(new)
        change = head.seen(z, torch.tensor(known, dtype=torch.int64, device=device), n_elements)  # type: ignore[union-attr]
        for code in new:
            element = torch.tensor([code], device=device)
            marked = element.expand(tensors["lengths"].shape[0], 1)
            difference = (self.module.hidden(tensors | {"marked": marked}) - hidden)[target]
            change = change + head.unseen(difference, element, weight)  # type: ignore[union-attr]
        return change

    def _deviation(self, known: list[int], new: list[int]) -> np.ndarray:
        """Standard error of the mean change of log shares, (n_genes,)."""
        head = self.module.perturbation
        return head.variance_of(known, len(new)).sqrt().cpu().numpy()  # type: ignore[union-attr]


def _hide(shares: Tensor, measured: Tensor | None) -> Tensor:
    return shares if measured is None else shares.masked_fill(~measured, torch.nan)
