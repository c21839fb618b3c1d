"""Cell-type annotation on top of a CellPLM."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from copy import deepcopy
from numbers import Real
from typing import TYPE_CHECKING, Any, Self

import numpy as np
import pandas as pd
import scipy.sparse as sp
import torch
from scvi import settings
from sklearn.decomposition import PCA

from cellplm_scvi import _constants as c
from cellplm_scvi._compat import AnnOrMuData
from cellplm_scvi.data._categories import AnnotationField, as_text
from cellplm_scvi.data._checks import CHUNK_ROWS, check_column, counted, some, warn
from cellplm_scvi.data._table import CellTable
from cellplm_scvi.module import AnnotatorModule
from cellplm_scvi.module._annotator import balanced_weights
from cellplm_scvi.nn import AnnotationHead
from cellplm_scvi.nn._annotation import N_QUANTILES

from ._annotation_fit import fit_head, held_out_distances, hold_out, make_folds, within_class_whitening
from ._cellplm import CellPLM
from ._defaults import default_max_epochs, sizes_of
from ._registry import part_of

if TYPE_CHECKING:
    from anndata import AnnData

#: principal components of expression beside the embedding, and most cells that they are computed from
N_COMPONENTS = 100
MAX_PCA_CELLS = 20_000
#: smallest standard deviation of log expression that a gene is divided by
MIN_DEVIATION = 0.1
#: arguments of a split, which fine-tuning makes itself
SPLIT_ARGUMENTS = ("train_size", "validation_size", "shuffle_set_split", "split_by", "external_indexing")


class CellPLMAnnotator(CellPLM):
    """Names the types of cells with a trained CellPLM and some labelled cells.

    Made by :meth:`from_cellplm`. Multinomial logistic regressions learn from the embedding, from principal components
    of expression, or from both; those that cross-validation over samples finds best are averaged. Everything that a
    :class:`~cellplm_scvi.CellPLM` does, such as :meth:`get_latent_representation`, :meth:`save` and
    :meth:`save_pretrained`, it does too.

    Examples
    --------
    >>> annotator = CellPLMAnnotator.from_cellplm(model, "cell_type", unlabeled_category="unknown")
    >>> annotator.train()
    >>> adata.obs["predicted"] = annotator.predict()
    """

    _module_cls = AnnotatorModule
    #: What cross-validation found, as the choices that are averaged and held-out macro-F1 of all; ``None`` before it, and for
    #: weights from :meth:`from_pretrained`.
    selection_: dict[str, Any] | None = None

    @property
    def _network_class(self) -> type[CellPLM]:
        return CellPLM

    def _add_parts(self) -> None:
        super()._add_parts()
        states = self.registry_["field_registries"]
        if c.LABELS_KEY not in states:
            raise ValueError("CellPLMAnnotator needs labels: pass labels_key to setup_anndata, or use from_cellplm.")
        n_genes = len(states[c.X_KEY]["state_registry"]["column_names"])
        n_latent = self.module.latent.mean.out_features
        self.module.annotation = AnnotationHead(n_latent, n_genes, min(N_COMPONENTS, n_genes), len(self.classes))
        self._model_summary_string = (
            f"CellPLMAnnotator of {len(self.classes)} classes on a {self._model_summary_string}"
        )

    @property
    def classes(self) -> np.ndarray:
        """Names of the classes, (n_classes,), in the order of :meth:`predict`'s columns."""
        state = self.registry_["field_registries"][c.LABELS_KEY]["state_registry"]
        names = np.asarray(state[AnnotationField.CATEGORICAL_MAPPING_KEY], dtype=object)[
            : state[AnnotationField.N_KNOWN_KEY]
        ]
        return names[names != self.unlabeled_category]

    @property
    def unlabeled_category(self) -> str:
        """The word for cells without a label, of the data that the annotator was made with; a query may have another."""
        state = self.registry_["field_registries"][c.LABELS_KEY]["state_registry"]
        return as_text(state.get(AnnotationField.DEFAULT_KEY, self.registry_["setup_args"]["unlabeled_category"]))

    @classmethod
    def from_cellplm(
        cls,
        model: CellPLM,
        labels_key: str,
        unlabeled_category: str = "unknown",
        adata: AnnData | None = None,
    ) -> Self:
        """Start from a trained or pre-trained model; its weights are copied.

        Parameters
        ----------
        model
            A trained :class:`~cellplm_scvi.CellPLM`, or one from :meth:`~cellplm_scvi.CellPLM.from_pretrained`.
        labels_key
            Column of ``obs`` with cell types; numbers are taken, and given back, as text. Of a MuData, it is in the
            modality that its set-up names for ``labels_key``, else in ``obs`` of the MuData itself or of the modality of the counts.
        unlabeled_category
            The word for cells without a label in that column; missing values mean the same. These cells are the context of
            the others, and in fine-tuning they are trained on as before.
        adata
            AnnData with the labels; ``None`` is that of the model.

        Raises
        ------
        ValueError
            If the model is not trained, or fewer than two classes have a cell.
        KeyError
            If the column is absent.
        """
        if not isinstance(model, CellPLM):
            raise TypeError(
                f"model is of type {type(model).__name__}; a CellPLM is needed, such as CellPLM.from_pretrained(...) gives."
            )
        for name, value in (("labels_key", labels_key), ("unlabeled_category", unlabeled_category)):
            if value is None or not isinstance(value, Hashable):
                raise TypeError(f"{name}={value!r} must be one name.")
        if not model.is_trained_:
            raise ValueError("The model is not trained: call model.train() first, or use CellPLM.from_pretrained.")
        adata = model.adata if adata is None else adata
        if adata is None:
            raise ValueError("The model has no AnnData: pass the one with the labels as adata.")
        unlabeled_category = as_text(unlabeled_category)
        registry = deepcopy(model.registry_) if adata is model.adata else model._registry_for(adata)
        modalities = registry["setup_args"].get("modalities") or {}
        modality = modalities.get("labels_key")
        if modality is None and modalities and labels_key not in adata.obs:
            modality = modalities["rna_layer"]
            registry["setup_args"]["modalities"] = {**modalities, "labels_key": modality}
        labels = check_column(part_of(adata, modality), labels_key, "labels_key").astype(object)
        names = sorted({as_text(name) for name in labels[labels.notna()].unique()} - {unlabeled_category})
        if len(names) < 2:
            raise ValueError(
                f'obs["{labels_key}"] has {len(names)} class{"es" * (len(names) != 1)} beside "{unlabeled_category}" '
                f"({some(names)}); at least two are needed."
            )
        registry["setup_args"] |= {"labels_key": labels_key, "unlabeled_category": unlabeled_category}
        registry["field_registries"][c.LABELS_KEY] = {
            "data_registry": {"attr_name": "obs", "attr_key": f"_scvi_{c.LABELS_KEY}"}
            | ({} if modality is None else {"mod_key": modality}),
            "state_registry": {
                AnnotationField.CATEGORICAL_MAPPING_KEY: np.asarray([*names, unlabeled_category], dtype=object),
                AnnotationField.ORIGINAL_ATTR_KEY: labels_key,
                AnnotationField.N_KNOWN_KEY: len(names) + 1,
                AnnotationField.DEFAULT_KEY: unlabeled_category,
            },
            "summary_stats": {f"n_{c.LABELS_KEY}": len(names) + 1},
        }
        registry["model_name"] = cls.__name__
        init = {name: value for name, value in model.init_params_["non_kwargs"].items() if value is not None}
        if "extension" in init:  # its training is to learn labels, whatever the model was made for
            init["extension"] = {**init["extension"], "query": False}
        annotator = cls(registry=registry, **(init | sizes_of(model, init)))
        state = model.module.state_dict()
        own = {name: value for name, value in annotator.module.state_dict().items() if name.startswith("annotation.")}
        annotator.module.load_state_dict({**own, **{k: v for k, v in state.items() if not k.startswith("annotation.")}})
        annotator.to_device(model.device)
        annotator.module.eval()
        annotator.pretrained_report_ = model.pretrained_report_
        annotator.is_trained_ = True  # the network; the head knows of itself whether it is fitted
        annotator._attach(adata)
        return annotator

    def train(  # type: ignore[override]
        self,
        max_epochs: int | None = None,
        *,
        fine_tune: bool | None = None,
        label_weight: float | None = None,
        held_out: float | None = None,
        **kwargs: Any,
    ) -> None:
        """Learn the classes from the labels that are there now; called again, it goes on from the present weights.

        With the backbone frozen, cross-validation over samples (over random cells where all labels are of one sample)
        ranks features and penalties by macro-F1, and the four best heads are averaged; a class weighs as the square root of its number of cells. The
        predictions for held-out samples calibrate the probabilities (one temperature, Guo et al. 2017) and the distances by which
        :meth:`predict` leaves cells unknown.

        Parameters
        ----------
        max_epochs
            Of training the network; ``None``: of fine-tuning, a quarter of what :meth:`CellPLM.train` takes for spatial data, or
            all that it would take if the network is not trained yet.
        fine_tune
            ``True``: first train the whole network on the labels beside its usual objective, with all cells, labelled or
            not. A share of the labelled cells takes no part in that, and is what the head is chosen and calibrated on.
            ``False``: learn the labels with the network as it is. ``None``: the same, but after :meth:`load_query_data` learn
            no labels, of which none are needed then: as :meth:`CellPLM.train` does, train the contributions of the new
            categories alone, so that everything that is said of the reference's data stays the same to the bit.
        label_weight
            Of the cross-entropy in fine-tuning, relative to the negative ELBO of a cell; ``None`` is 20.
        held_out
            Share of the labelled cells held out from fine-tuning, ``None`` is 0.1: whole samples if several have labels, at least
            one of them, which is half of the cells where there are two.
        **kwargs
            Of :meth:`CellPLM.train`, for training the network.

        Raises
        ------
        ValueError
            If there are no labels of two classes, if the network is neither trained nor to be, or on arguments without effect.
        """
        if self.adata is None:
            raise ValueError("The annotator has no AnnData. Load it with `adata=`, or set `annotator.adata`.")
        if not isinstance(fine_tune, bool | None):
            raise TypeError(f"fine_tune={fine_tune!r} must be True, False or None.")
        options = {"label_weight": label_weight, "held_out": held_out}
        given = [name for name, value in options.items() if value is not None]
        if fine_tune is None and self._extension.query:
            if given:
                raise ValueError(f"{some(given)}: the labels take no part in this. Pass fine_tune=True to learn them.")
            super().train(max_epochs, **kwargs)
            return
        if not fine_tune and not self.is_trained_:
            raise ValueError(
                "The network is not trained: its embeddings are random. Use CellPLMAnnotator.from_cellplm with a trained "
                "CellPLM, or pass fine_tune=True to train it here."
            )
        given += ["max_epochs"] * (max_epochs is not None) + list(kwargs)
        if not fine_tune and given:
            raise ValueError(f"{some(given)}: the frozen backbone is not trained. Pass fine_tune=True to train it.")
        self._read_annotations()
        table = CellTable.from_manager(self.adata_manager)
        self._say_other_classes(table)
        classes = self._classes_of(table)
        labelled = np.flatnonzero(classes >= 0)
        if np.unique(classes[labelled]).size < 2:
            raise ValueError(self._too_few_classes(classes))
        seed = settings.seed or 0
        if fine_tune:
            share, weight = 0.1 if held_out is None else held_out, 20.0 if label_weight is None else label_weight
            if not isinstance(weight, Real) or not 0 <= weight < np.inf:
                raise ValueError(f"label_weight={weight!r} must be a number that is not negative.")
            train, test = hold_out(classes[labelled], table.sample[labelled], share, seed)
            self._fine_tune(classes, labelled[train], labelled[test], max_epochs, float(weight), kwargs)
            folds = [(train, test)]
        else:
            folds = make_folds(classes[labelled], table.sample[labelled], seed)
        self._fit_head(table, classes, labelled, folds, seed)

    def _classes_of(self, table: CellTable) -> np.ndarray:
        """Class of each cell, -1 for unlabelled, (n_cells,)."""
        return self._class_of_code()[table.annotations[c.LABELS_KEY]]

    def _say_other_classes(self, table: CellTable) -> None:
        """Warn of labels that are none of the classes."""
        state = self.adata_manager.get_state_registry(c.LABELS_KEY)
        names = np.asarray(state[AnnotationField.CATEGORICAL_MAPPING_KEY], dtype=object)
        labels = names[table.annotations[c.LABELS_KEY]]
        other = labels[~np.isin(labels, [*self.classes, self.unlabeled_category])]
        if other.size:
            warn(
                f"{counted(other.size, 'cell has a label', 'cells have labels')} in "
                f'obs["{state[AnnotationField.ORIGINAL_ATTR_KEY]}"] outside the classes of '
                f"this annotator ({some(np.unique(other.astype(str)))}; it has {some(self.classes)}), taken as unlabelled. "
                "CellPLMAnnotator.from_cellplm(annotator, ...) makes one of all the classes."
            )

    def _too_few_classes(self, classes: np.ndarray) -> str:
        """Where labels are looked for, and what is there."""
        key = self.adata_manager.get_state_registry(c.LABELS_KEY)[AnnotationField.ORIGINAL_ATTR_KEY]
        found = some(self.classes[np.unique(classes[classes >= 0])]) or "none"
        return (
            f'Labels of at least two of the classes ({some(self.classes)}) are needed to learn them; obs["{key}"] has '
            f"{found}. Write the labels of some cells there; a missing column counts as no labels."
        )

    def _class_of_code(self) -> np.ndarray:
        mapping = self.adata_manager.get_state_registry(c.LABELS_KEY)[AnnotationField.CATEGORICAL_MAPPING_KEY]
        return pd.Index(self.classes).get_indexer(pd.Index(mapping)).astype(np.int64)

    def _fine_tune(
        self,
        classes: np.ndarray,
        train: np.ndarray,
        test: np.ndarray,
        max_epochs: int | None,
        label_weight: float,
        kwargs: dict[str, Any],
    ) -> None:
        module = self.module
        if not isinstance(module, AnnotatorModule):
            raise ValueError("Fine-tuning on labels is not available for published networks: use the frozen backbone.")
        further = kwargs.pop("datasplitter_kwargs", None) or {}
        if given := [name for name in SPLIT_ARGUMENTS if name in kwargs or name in further]:
            raise ValueError(f"{some(given)}: fine-tuning leaves out labelled cells; pass their share as held_out.")
        rest = np.setdiff1d(np.arange(classes.size), test)
        module.class_of_code = torch.from_numpy(self._class_of_code())
        module.class_weight = balanced_weights(torch.from_numpy(classes[train]), len(self.classes))
        module.label_weight = label_weight
        split = {"external_indexing": [rest, test]}
        if max_epochs is None:
            splitter = self._splitter(None, None, True, kwargs.get("batch_size"), split)
            # a quarter of what spatial data take, which have fewer steps
            spatial = module.spatial or self.is_trained_
            max_epochs = default_max_epochs(splitter.n_train, splitter.n_batches, spatial=spatial)
            max_epochs = max(1, max_epochs // 4) if self.is_trained_ else max_epochs
        self.history_ = {}
        self.module.annotation.fitted.fill_(False)  # it was of the network of before
        options = {"freeze": None, **kwargs, "datasplitter_kwargs": {**further, **split}}
        try:
            super().train(max_epochs, **options)
        finally:
            module.class_of_code = module.class_weight = None
        # other loggers, and none, have no history
        self.history_ = dict(getattr(self.trainer.logger, "history", None) or {})

    def _fit_head(self, table: CellTable, classes: np.ndarray, labelled: np.ndarray, folds: list, seed: int) -> None:
        head = self.module.annotation
        self._place_components(table, seed)
        features = self._raw_features(table, np.arange(table.n_cells))
        # one scale for each block, so that components keep their weight relative to each other
        blocks = np.split(np.arange(features.shape[1]), [head.n_latent])
        mean, scale = features.mean(0), np.ones(features.shape[1], np.float32)
        for block in blocks:
            scale[block] = max(float(features[:, block].var(0).mean()) ** 0.5, 1e-6)
        features = ((features - mean) / scale)[labelled]
        labels, n_classes = classes[labelled], len(self.classes)
        choices = {"embedding": blocks[0], "expression": blocks[1], "both": np.concatenate(blocks)}
        fit = fit_head(features, choices, labels, folds, n_classes, seed)
        means, whitening = within_class_whitening(features, labels, n_classes)
        distances = held_out_distances(features, labels, folds, n_classes)
        values = {
            "feature_mean": mean,
            "feature_scale": scale,
            "weight": fit.weight,
            "bias": fit.bias,
            "temperature": fit.temperature,
            "class_mean": means,
            "whitening": whitening,
            "distances": np.quantile(distances, np.linspace(0, 1, N_QUANTILES)),
            "fitted": True,
        }
        for name, value in values.items():
            buffer = getattr(head, name)
            buffer.copy_(torch.as_tensor(value, dtype=buffer.dtype))
        self.selection_ = {"used": fit.used, "macro_f1": fit.scores}

    def _place_components(self, table: CellTable, seed: int) -> None:
        """Principal components of standardised log-normalised expression of all cells, labelled or not."""
        head = self.module.annotation
        library = _library(table)
        head.target_sum.fill_(float(np.median(library[library > 0])) if library.any() else 1.0)
        rows = np.arange(table.n_cells)
        if rows.size > MAX_PCA_CELLS:
            rows = np.sort(np.random.default_rng(seed).choice(rows, MAX_PCA_CELLS, replace=False))
        x = self._log_expression(table, rows)
        # Standardised genes: weak markers count as much as strong genes, which annotation gains from more than it loses.
        variance = np.asarray(x.multiply(x).mean(0)).ravel() - np.asarray(x.mean(0)).ravel() ** 2
        weight = 1 / np.maximum(np.sqrt(np.maximum(variance, 0)), MIN_DEVIATION)
        n = min(head.loadings.shape[1], min(x.shape) - 1)
        head.loadings.zero_()
        if n > 0 and variance.max() > 1e-6:  # cells are not all the same
            found = PCA(n, svd_solver="arpack", random_state=seed).fit(x @ sp.diags(weight))
            head.loadings[:, :n].copy_(torch.from_numpy(found.components_.T * weight[:, None]))

    def _log_expression(self, table: CellTable, rows: np.ndarray) -> sp.csr_matrix:
        x = table.counts[rows]
        scale = float(self.module.annotation.target_sum) / np.maximum(_library(table)[rows], 1e-8)
        return (sp.diags(scale) @ x).log1p().tocsr()

    def _raw_features(self, table: CellTable, rows: np.ndarray, batch_size: int | None = None) -> np.ndarray:
        """Embedding and principal components of expression, (n_cells, n_features)."""
        mean, _ = self._moments(table, rows, batch_size, mean_only=True)
        loadings = self.module.annotation.loadings.cpu().numpy()
        parts = [
            self._log_expression(table, rows[start : start + CHUNK_ROWS]) @ loadings
            for start in range(0, rows.size, CHUNK_ROWS)
        ]
        components = np.concatenate(parts) if parts else np.zeros((0, loadings.shape[1]))
        return np.hstack([mean[rows], components]).astype(np.float32)

    @torch.inference_mode()
    def predict(
        self,
        adata: AnnOrMuData | None = None,
        indices: Sequence[int] | None = None,
        soft: bool = False,
        unknown_rate: float | None = None,
        batch_size: int | None = None,
    ) -> np.ndarray | pd.DataFrame:
        """Name the type of each cell.

        Parameters
        ----------
        adata, indices, batch_size
            As in :meth:`get_latent_representation`.
        soft
            Return calibrated probabilities.
        unknown_rate
            Leave cells unknown that fit no class: those farther from every class than all but this share of the labelled
            cells were, when they were held out. So at most about this share of the cells of known classes, in samples like
            those that were held out, is called unknown. ``None`` names every cell.

        Returns
        -------
        Names (n_cells,), ``unlabeled_category`` for unknown cells; or with ``soft`` a DataFrame (n_cells, n_classes) of
        probabilities, with a last column for ``unlabeled_category``, 1 where a cell is unknown, if ``unknown_rate`` is given.

        Raises
        ------
        ValueError
            If the annotator is not trained, or ``unknown_rate`` is not a share.
        """
        head = self.module.annotation
        if not bool(head.fitted):
            raise ValueError("The annotator is not trained: call train() first (of a query, train(fine_tune=False)).")
        if unknown_rate is not None and not (isinstance(unknown_rate, Real) and 0 <= unknown_rate < 1):
            raise ValueError(f"unknown_rate={unknown_rate!r} is not a share of cells, such as 0.05.")
        adata = self._validate_anndata(adata)
        table = self._table(adata)
        rows = self._rows(table.names, indices)
        raw = torch.from_numpy(self._raw_features(table, rows, batch_size)).to(self.module.device)
        features = head.features(raw[:, : head.n_latent], raw[:, head.n_latent :])
        probabilities = head.log_probabilities(features).exp().cpu().numpy()
        unknown = np.zeros(rows.size, dtype=bool)
        if unknown_rate is not None:
            unknown = (head.fit_p_values(features) < unknown_rate).cpu().numpy()
        if not soft:
            return np.where(unknown, self.unlabeled_category, self.classes[probabilities.argmax(1)])
        frame = pd.DataFrame(probabilities, index=adata.obs_names[rows], columns=self.classes)
        if unknown_rate is not None:
            frame[unknown] = 0.0
            frame[self.unlabeled_category] = unknown.astype(np.float32)
        return frame


def _library(table: CellTable) -> np.ndarray:
    return table.totals if table.size_factor is None else table.size_factor
