"""Show on synthetic tissues what each part of the model recovers that a model without it does not.

Each (question, model, seed) gives one JSON line. A line that is there already is not computed again.

    python benchmarks/synthetic.py
    python benchmarks/synthetic.py --table
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import anndata as ad
import numpy as np
import pandas as pd
from _common import RESULTS_DIR, ResultFile, Row, markdown_table, seed_everything, versions
from sklearn.linear_model import LogisticRegression, RidgeCV
from sklearn.metrics import f1_score, r2_score
from sklearn.model_selection import LeaveOneGroupOut, cross_val_predict
from sklearn.neighbors import KNeighborsClassifier

from cellplm_scvi import CellPLM
from cellplm_scvi.data import synthetic_tissues, true_shares

KEY = ("question", "model", "seed")
PACKAGES = ("cellplm-scvi", "scvi-tools", "torch")
QUIET = {"accelerator": "cpu", "devices": 1, "enable_progress_bar": False}


def trained(adata: ad.AnnData, setup: dict[str, str], epochs: int, **model: Any) -> CellPLM:
    """A model trained on a copy of the data."""
    adata = adata.copy()
    CellPLM.setup_anndata(adata, **setup)
    fitted = CellPLM(adata, **model)
    fitted.train(max_epochs=epochs, **QUIET)
    return fitted


def held_out_r2(embedding: np.ndarray, truth: np.ndarray, groups: pd.Series) -> float:
    """R² of a ridge regression on the samples that it was not fitted to, mean over the columns of the truth."""
    predicted = cross_val_predict(
        RidgeCV(np.logspace(-2, 4, 13)), embedding, truth, groups=groups, cv=LeaveOneGroupOut()
    )
    return float(r2_score(truth, predicted))


def neighbours(model: dict[str, Any], seed: int) -> float:
    """Shares of the types among the 10 nearest cells, from the embedding; their effect on a third of the genes."""
    adata = synthetic_tissues(2400, 150, 4, n_niches=3, seed=seed)
    setup = {"batch_key": "batch", "sample_key": "sample", "spatial_key": "spatial"}
    z = trained(adata, setup, 80, **model).get_latent_representation()
    return held_out_r2(z, np.asarray(adata.obsm["neighbour_types"]), adata.obs["sample"])


def rare_type(model: dict[str, Any], seed: int) -> float:
    """F1 of a type of 2% of the cells, from the labels of the 15 nearest cells of other samples in the embedding."""
    adata = synthetic_tissues(3000, 150, 4, n_types=6, rare_share=0.02, type_effect=0.45, niche_effect=0.0, seed=seed)
    z = trained(adata, {"batch_key": "batch", "sample_key": "sample"}, 60, **model).get_latent_representation()
    types = adata.obs["cell_type"].astype(str)
    found = cross_val_predict(KNeighborsClassifier(15), z, types, groups=adata.obs["sample"], cv=LeaveOneGroupOut())
    rare = types.value_counts().index[-1]
    return float(f1_score(types == rare, found == rare))


def panels(model: dict[str, Any], seed: int) -> float:
    """Correlation with the truth of genes that the sections did not measure, mean over genes."""
    adata = synthetic_tissues(2400, 120, 4, n_dissociated=2, n_panel_genes=50, platform_effect=0.3, seed=seed)
    setup = {"dataset_key": "dataset", "sample_key": "sample", "spatial_key": "spatial"}
    known = model.pop("panels")
    fitted = trained(adata, setup | ({"measured_genes_key": "measured_genes"} if known else {}), 60, **model)
    measured = adata.varm["measured_genes"][adata.obs["dataset"]].to_numpy().T
    rows = np.flatnonzero(~measured.all(1))
    missing = adata.var_names[~measured[rows[0]]]
    imputed = fitted.get_imputed_expression(indices=rows, gene_list=list(missing))
    truth = true_shares(adata).loc[imputed.index, missing]
    return float(imputed.corrwith(truth).fillna(0).mean())


def batches(model: dict[str, Any], seed: int) -> float:
    """Accuracy of telling the batch of a cell from its embedding, above that of guessing; 0 is best."""
    adata = synthetic_tissues(2400, 150, 4, n_batches=2, batch_effect=0.6, niche_effect=0.0, seed=seed)
    known = model.pop("batch")
    setup = {"sample_key": "sample"} | ({"batch_key": "batch"} if known else {})
    z = trained(adata, setup, 60, **model).get_latent_representation()
    found = cross_val_predict(LogisticRegression(max_iter=2000), z, adata.obs["batch"], cv=5)
    return float((found == adata.obs["batch"]).mean() - adata.obs["batch"].value_counts(normalize=True).iloc[0])


#: question -> (what is measured, how, models by name)
QUESTIONS: dict[str, tuple[str, Callable[[dict[str, Any], int], float], dict[str, dict[str, Any]]]] = {
    "neighbours": (
        "R², held-out samples",
        neighbours,
        {
            "default": {},
            'position="none"': {"position": "none"},
            'encoder="mlp", position="none"': {"encoder": "mlp", "position": "none"},
        },
    ),
    "rare type": (
        "F1, held-out samples",
        rare_type,
        {
            "default": {},
            'latent="gaussian"': {"latent": "gaussian"},
            'latent="deterministic"': {"latent": "deterministic"},
        },
    ),
    "genes not measured": (
        "correlation with the truth",
        panels,
        {"default": {"panels": True}, "without measured_genes_key": {"panels": False}},
    ),
    "batch": (
        "accuracy above guessing",
        batches,
        {"default": {"batch": True}, "without batch_key": {"batch": False}},
    ),
}


def run(args: argparse.Namespace, results: ResultFile) -> None:
    """Compute and append every result that is not on file."""
    for question in args.questions:
        measure, compute, models = QUESTIONS[question]
        for seed in args.seeds:
            for name, model in models.items():
                row: Row = {"question": question, "model": name, "seed": seed, "measure": measure}
                if row in results:
                    continue
                seed_everything(seed, args.threads)
                row["value"] = round(compute(dict(model), seed), 4)
                print(question, name, seed, row["value"], flush=True)
                results.append(row | {"versions": versions(*PACKAGES)})


def parse_args() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--questions", nargs="+", choices=list(QUESTIONS), default=list(QUESTIONS))
    parser.add_argument("--out", type=Path, default=RESULTS_DIR / "synthetic", help="file of JSON lines")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--table", action="store_true", help="print the Markdown table of what is on file, run nothing")
    return parser.parse_args()


def main() -> None:
    """Run what is missing, or print the table."""
    args = parse_args()
    results = ResultFile(args.out, KEY)
    if not args.table:
        run(args, results)
    print(markdown_table(results.rows(), ("question", "measure", "model"), {"value": ("value", 3)}, [*QUESTIONS]))


if __name__ == "__main__":
    main()
