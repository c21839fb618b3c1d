"""Measure how well cell types are named in samples without labels.

Each fold hides the labels of whole samples (donors, chemistries, sections; random fifths of the one sample of ``breast``)
and scores their prediction: macro-F1 over the classes of the hidden cells, and the expected calibration error of the
largest probability (15 bins). Methods that can use unlabelled cells get them without their labels. Lines that are on file
are not computed again; ``--table`` prints them as Markdown.

    python benchmarks/annotation.py
    python benchmarks/annotation.py --table
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import anndata as ad
import numpy as np
import pandas as pd
import scanpy as sc
from _common import (
    ResultFile,
    Row,
    benchmark_parser,
    kept_or_trained,
    markdown_table,
    read_dataset,
    seed_everything,
    versions,
)
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import f1_score
from sklearn.multiclass import OneVsRestClassifier
from sklearn.neighbors import KNeighborsClassifier
from sklearn.preprocessing import StandardScaler

KEY = ("data", "method", "seed", "fold", "kwargs")
PACKAGES = ("scvi-tools", "scanpy", "scikit-learn", "torch")
LABELS, HIDDEN = "label", "unknown"


@dataclass(frozen=True)
class Task:
    """A data set, its labels, and what is left out.

    Parameters
    ----------
    file
        Name of the file.
    label
        Column with cell types.
    spatial
        Whether there are coordinates.
    donors
        Hide half of the batches, drawn by the seed, instead of each in turn.
    """

    file: str
    label: str
    spatial: bool = False
    donors: bool = False

    def folds(self, adata: ad.AnnData, seed: int) -> list[np.ndarray]:
        """Return the cells to hide of each fold, boolean ``(n_cells,)``."""
        rng = np.random.default_rng(seed)
        batches = np.unique(adata.obs["batch"])
        if self.donors:
            return [adata.obs["batch"].isin(rng.permutation(batches)[: len(batches) // 2]).to_numpy()]
        if len(batches) > 1:
            return [(adata.obs["batch"] == batch).to_numpy() for batch in batches]
        return [rng.integers(5, size=adata.n_obs) == 0]


TASKS = {
    "kang": Task("kang2018_ctrl_8donors", "cell_type", donors=True),
    "chemistries": Task("pbmc_3chemistries_symphony", "cell_type"),
    "starmap": Task("starmap_mouse_mpfc", "cell_type", spatial=True),
    "breast": Task("wu2021_breast_tnbc_CID4465", "cell_type_minor"),
}

#: the last CellPLM trained, by task and seed
TRAINED: dict[tuple[Task, int], Any] = {}

#: probabilities of the classes for hidden cells
Method = Callable[[ad.AnnData, np.ndarray, Task, int, argparse.Namespace], pd.DataFrame]


def log_normalised(adata: ad.AnnData, target_sum: float | None = None) -> ad.AnnData:
    """Return a copy with log1p of counts scaled to the median library or to ``target_sum``."""
    copy = ad.AnnData(adata.X.copy(), obs=adata.obs[[LABELS, "batch"]].copy(), var=adata.var[[]].copy())
    sc.pp.normalize_total(copy, target_sum=target_sum)
    sc.pp.log1p(copy)
    return copy


def components(adata: ad.AnnData) -> np.ndarray:
    """Return 50 principal components of all cells."""
    normalised = log_normalised(adata)
    sc.pp.pca(normalised, n_comps=50, svd_solver="arpack", random_state=0)
    return np.asarray(normalised.obsm["X_pca"])


def classified(classifier: object, adata: ad.AnnData, hidden: np.ndarray) -> pd.DataFrame:
    """Fit a classifier to principal components of the labelled cells."""
    x = components(adata)
    classifier.fit(x[~hidden], adata.obs[LABELS][~hidden].astype(str))
    return pd.DataFrame(classifier.predict_proba(x[hidden]), columns=classifier.classes_)


def logistic(adata: ad.AnnData, hidden: np.ndarray, task: Task, seed: int, args: argparse.Namespace) -> pd.DataFrame:
    """L2 logistic regression."""
    return classified(LogisticRegression(C=1.0, max_iter=1000), adata, hidden)


def knn(adata: ad.AnnData, hidden: np.ndarray, task: Task, seed: int, args: argparse.Namespace) -> pd.DataFrame:
    """15 nearest neighbours."""
    return classified(KNeighborsClassifier(15), adata, hidden)


def celltypist(adata: ad.AnnData, hidden: np.ndarray, task: Task, seed: int, args: argparse.Namespace) -> pd.DataFrame:
    """Train the classifier of CellTypist (Dominguez Conde et al. 2022): one against the rest on all standardised genes.

    Written out, because CellTypist 1.7 passes an argument to scikit-learn that its release 1.8 took away.
    """
    x = log_normalised(adata, 1e4).X.toarray()
    scaler = StandardScaler().fit(x[~hidden])
    x = np.minimum(scaler.transform(x), 10)
    classifier = OneVsRestClassifier(LogisticRegression(C=1.0, max_iter=200)).fit(
        x[~hidden], adata.obs[LABELS][~hidden].astype(str)
    )
    return pd.DataFrame(classifier.predict_proba(x[hidden]), columns=classifier.classes_)


def scanvi(adata: ad.AnnData, hidden: np.ndarray, task: Task, seed: int, args: argparse.Namespace) -> pd.DataFrame:
    """Train scANVI (Xu et al. 2021) from scVI, as its tutorial does."""
    import scvi

    seed_everything(seed, args.threads)
    own = adata.copy()
    scvi.model.SCVI.setup_anndata(own, batch_key="batch", labels_key=LABELS)
    model = scvi.model.SCVI(own, n_layers=2, n_latent=30, gene_likelihood="nb")
    model.train(max_epochs=args.scvi_epochs, **options(args))
    model = scvi.model.SCANVI.from_scvi_model(model, unlabeled_category=HIDDEN)
    model.train(max_epochs=20, n_samples_per_label=100, **options(args))
    return model.predict(indices=np.flatnonzero(hidden), soft=True)


def cellplm(adata: ad.AnnData, task: Task, seed: int, args: argparse.Namespace) -> Any:
    """Return a CellPLM trained on all cells; as no label takes part, folds share it."""
    from cellplm_scvi import CellPLM

    if (task, seed) in TRAINED:
        return TRAINED[task, seed]
    own = adata.copy()

    def train() -> CellPLM:
        seed_everything(seed, args.threads)
        CellPLM.setup_anndata(own, batch_key="batch", **({"spatial_key": "spatial"} if task.spatial else {}))
        model = CellPLM(own, **args.cellplm_kwargs)
        model.train(**{**options(args), **args.train_kwargs})
        return model

    def load(path: Path) -> CellPLM:
        return CellPLM.load(path, adata=own, accelerator=args.accelerator)

    model = kept_or_trained(args.models, f"{task.file}-{seed}", load, train)
    TRAINED.clear()
    TRAINED[task, seed] = model
    return model


def options(args: argparse.Namespace) -> dict[str, Any]:
    """Return what all trainings are told."""
    return {"accelerator": args.accelerator, "devices": 1, "enable_progress_bar": False}


def annotator(
    adata: ad.AnnData, hidden: np.ndarray, task: Task, seed: int, args: argparse.Namespace, fine_tune: bool = False
) -> pd.DataFrame:
    """CellPLM trained on all cells without labels, then the annotator."""
    from cellplm_scvi import CellPLMAnnotator

    model = cellplm(adata, task, seed, args)
    seed_everything(seed, args.threads)
    head = CellPLMAnnotator.from_cellplm(model, LABELS, unlabeled_category=HIDDEN, adata=adata.copy())
    head.train(**({"fine_tune": True, **options(args)} if fine_tune else {}))
    print("   ", head.selection_, flush=True)
    return head.predict(indices=np.flatnonzero(hidden), soft=True)


def fine_tuned(adata: ad.AnnData, hidden: np.ndarray, task: Task, seed: int, args: argparse.Namespace) -> pd.DataFrame:
    """Likewise, with fine-tuning."""
    return annotator(adata, hidden, task, seed, args, fine_tune=True)


METHODS: dict[str, Method] = {
    "PCA + logistic regression": logistic,
    "PCA + kNN": knn,
    "CellTypist": celltypist,
    "scANVI": scanvi,
    "CellPLMAnnotator": annotator,
    "CellPLMAnnotator, fine-tuned": fine_tuned,
}


def calibration_error(probability: np.ndarray, right: np.ndarray, n_bins: int = 15) -> float:
    """Return the expected calibration error: mean over equal bins of |accuracy - probability|, weighted by cells."""
    bins = np.minimum((probability * n_bins).astype(int), n_bins - 1)
    gaps = [abs(right[bins == b].mean() - probability[bins == b].mean()) * (bins == b).mean() for b in np.unique(bins)]
    return float(sum(gaps))


def scores(soft: pd.DataFrame, truth: np.ndarray) -> dict[str, float]:
    """Return macro-F1, accuracy and expected calibration error."""
    predicted = soft.columns.to_numpy()[soft.to_numpy().argmax(1)].astype(str)
    found = {
        "macro_f1": f1_score(truth, predicted, average="macro", labels=np.unique(truth)),
        "accuracy": (predicted == truth).mean(),
        "ece": calibration_error(soft.to_numpy().max(1), predicted == truth),
    }
    return {name: round(float(value), 6) for name, value in found.items()}


def run(args: argparse.Namespace, results: ResultFile) -> None:
    """Compute and append every result that is not on file."""
    for name in args.data_sets:
        task = TASKS[name]
        adata = read_dataset(args.data, task.file)
        truth = adata.obs[task.label].astype(str).to_numpy()
        for seed in args.seeds:
            for fold, hidden in enumerate(task.folds(adata, seed)):
                adata.obs[LABELS] = pd.Categorical(np.where(hidden, HIDDEN, truth))
                for method in args.methods:
                    kwargs = {**args.cellplm_kwargs, **args.train_kwargs} if method.startswith("CellPLM") else {}
                    identity = {"data": name, "method": method, "seed": seed, "fold": fold, "kwargs": kwargs}
                    if identity in results:
                        continue
                    start = time.perf_counter()
                    soft = METHODS[method](adata, hidden, task, seed, args)
                    row = {**identity, **scores(soft, truth[hidden]), "seconds": round(time.perf_counter() - start, 1)}
                    results.append({**row, "contended": args.contended, "versions": versions(*PACKAGES)})
                    print(f"{name} {method} {seed} {fold}: {row['macro_f1']:.4f}, ECE {row['ece']:.4f}", flush=True)


def table(rows: list[Row]) -> str:
    """Return the Markdown table: mean ± standard deviation over seeds and folds."""
    columns = {"macro_f1": ("macro-F1", 3), "accuracy": ("accuracy", 3), "ece": ("ECE", 3), "seconds": ("seconds", 0)}
    return markdown_table(rows, ("data", "method", "kwargs"), columns, [*TASKS, *METHODS])


def parse_args() -> argparse.Namespace:
    """Read the command line."""
    parser = benchmark_parser(__doc__, "annotation", models=True)
    parser.add_argument("--data-sets", nargs="+", choices=list(TASKS), default=list(TASKS))
    parser.add_argument("--methods", nargs="+", choices=list(METHODS), default=list(METHODS))
    parser.add_argument("--scvi-epochs", type=int, default=None)
    return parser.parse_args()


def main() -> None:
    """Run what is missing, or print the table."""
    args = parse_args()
    results = ResultFile(args.out, KEY)
    if not args.table:
        run(args, results)
    print(table(results.rows()))


if __name__ == "__main__":
    main()
