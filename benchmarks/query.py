"""Map a query onto a reference: label transfer, and mixing of query and reference.

A reference model is trained on some batches of a labelled data set; the others are the query. Labels of query cells are
those of their 15 nearest reference cells. What is compared is the embedding of the query by the reference alone
("zero-shot"), after ``load_query_data`` and training, and scVI's way of the latter.
"""

from __future__ import annotations

import argparse
import json
import logging
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import anndata as ad
import numpy as np
import scanpy as sc
from _common import (
    DATA_DIR,
    RESULTS_DIR,
    ResultFile,
    Row,
    markdown_table,
    read_dataset,
    seed_everything,
    versions,
)
from sklearn.decomposition import PCA
from sklearn.metrics import f1_score
from sklearn.model_selection import train_test_split
from sklearn.neighbors import KNeighborsClassifier, NearestNeighbors

BATCH, LABEL = "batch", "cell_type"
N_NEIGHBORS = 15
KEY = ("dataset", "method", "seed", "kwargs")
PACKAGES = ("cellplm-scvi", "scvi-tools", "torch", "scib-metrics")
QUIET = {"accelerator": "cpu", "devices": 1, "enable_progress_bar": False}

#: file, batches of the query, and cells to keep
TASKS: dict[str, tuple[str, list[str], int | None]] = {
    "chemistries": ("pbmc_3chemistries_symphony", ["5p"], None),
    "donors": ("kang2018_ctrl_8donors", ["donor_1256", "donor_1488"], 4000),
}
#: of the reference's cells and of the query's, and the negative ELBO of the query, nats a cell
Embedded = tuple[np.ndarray, np.ndarray, float | None]
TITLES = {
    "pca": "PCA of the reference",
    "zero_shot": "CellPLM, zero-shot",
    "query": "CellPLM, load_query_data, train",
    "query_all": "CellPLM, load_query_data, train(freeze=None)",
    "scvi": "scVI, load_query_data, train",
}
CELLPLM = ("zero_shot", "query", "query_all")


def load_task(folder: Path, name: str) -> tuple[ad.AnnData, ad.AnnData]:
    """Return reference and query of a task."""
    file, batches, n_cells = TASKS[name]
    adata = read_dataset(folder, file)
    adata = adata[adata.obs[LABEL].notna()].copy()
    adata.obs[BATCH] = adata.obs[BATCH].astype(str).astype("category")
    if n_cells is not None and n_cells < adata.n_obs:
        rows, _ = train_test_split(
            np.arange(adata.n_obs), train_size=n_cells, stratify=adata.obs[BATCH], random_state=0
        )
        adata = adata[np.sort(rows)].copy()
    is_query = adata.obs[BATCH].isin(batches).to_numpy()
    return adata[~is_query].copy(), adata[is_query].copy()


def embed_pca(reference: ad.AnnData, query: ad.AnnData) -> Embedded:
    """Return 50 principal components of the reference, and the query's cells on them."""

    def normalised(adata: ad.AnnData) -> np.ndarray:
        copy = adata.copy()
        sc.pp.normalize_total(copy, target_sum=1e4)
        sc.pp.log1p(copy)
        return copy.X.toarray()

    pca = PCA(50, random_state=0).fit(normalised(reference))
    return pca.transform(normalised(reference)), pca.transform(normalised(query)), None


def embed_cellplm(
    reference: ad.AnnData, query: ad.AnnData, methods: list[str], kwargs: dict[str, Any]
) -> dict[str, Callable[[], Embedded]]:
    """Train one reference, and return what maps the query onto it by each method."""
    from cellplm_scvi import CellPLM

    CellPLM.setup_anndata(reference, batch_key=BATCH)
    model = CellPLM(reference)
    model.train(**(QUIET | kwargs))

    def embed(method: str) -> Embedded:
        mapped, new = model, query.copy()
        if method != "zero_shot":
            mapped = CellPLM.load_query_data(new, model, accelerator="cpu")
            unfrozen = {"freeze": None, "plan_kwargs": {"lr": 1e-4}} if method == "query_all" else {}
            mapped.train(**(QUIET | unfrozen | kwargs))
        # as the encoder gives them: of a query, batches are not aligned
        z_reference = mapped.get_latent_representation(reference.copy(), align_batches=False)
        return z_reference, mapped.get_latent_representation(new, align_batches=False), -float(mapped.get_elbo(new))

    return {method: partial(embed, method) for method in methods}


def embed_scvi(reference: ad.AnnData, query: ad.AnnData) -> Embedded:
    """Return scVI's embeddings with the settings that its tutorial of query mapping recommends."""
    from scvi.model import SCVI

    SCVI.setup_anndata(reference, batch_key=BATCH)
    model = SCVI(
        reference, n_layers=2, dropout_rate=0.2, encode_covariates=True, use_layer_norm="both", use_batch_norm="none"
    )
    model.train(**QUIET)
    new = query.copy()
    mapped = SCVI.load_query_data(new, model, accelerator="cpu")
    mapped.train(max_epochs=200, plan_kwargs={"weight_decay": 0.0}, **QUIET)
    return mapped.get_latent_representation(reference), mapped.get_latent_representation(), None


def score(reference: ad.AnnData, query: ad.AnnData, z_reference: np.ndarray, z_query: np.ndarray) -> dict[str, float]:
    """Return accuracy and macro-F1 of label transfer, and mixing of query and reference (scib-metrics; 1 is best)."""
    from scib_metrics import ilisi_knn, silhouette_batch
    from scib_metrics.nearest_neighbors import NeighborsResults

    knn = KNeighborsClassifier(N_NEIGHBORS).fit(z_reference, reference.obs[LABEL].astype(str))
    truth, predicted = query.obs[LABEL].astype(str), knn.predict(z_query)
    both = np.concatenate([z_reference, z_query])
    labels = np.concatenate([reference.obs[LABEL].astype(str), truth])
    side = np.repeat(["reference", "query"], [len(z_reference), len(z_query)])
    distances, indices = NearestNeighbors(n_neighbors=90).fit(both).kneighbors(both)
    return {
        "accuracy": float(np.mean(predicted == truth)),
        "macro_f1": float(f1_score(truth, predicted, average="macro")),
        "ilisi": float(ilisi_knn(NeighborsResults(indices=indices, distances=distances), side)),
        "silhouette_batch": float(silhouette_batch(both, labels, side)),
    }


def run(args: argparse.Namespace, results: ResultFile) -> None:
    """Compute and append every result that is not on file."""
    for name in args.datasets:
        reference, query = load_task(args.data, name)
        for seed in args.seeds:
            run_seed(args, results, reference, query, {"dataset": name, "seed": seed})


def run_seed(args: argparse.Namespace, results: ResultFile, reference: ad.AnnData, query: ad.AnnData, row: Row) -> None:
    """Run what is missing of one seed; the methods of CellPLM share a reference."""
    seed = row["seed"]
    methods = [method for method in args.methods if method != "pca" or seed == args.seeds[0]]
    rows = {m: {**row, "method": m, "kwargs": args.train_kwargs if m in CELLPLM else {}} for m in methods}
    missing = [method for method, key in rows.items() if key not in results]
    ours = [method for method in missing if method in CELLPLM]
    seed_everything(seed, args.threads)
    embed: dict[str, Callable[[], Embedded]] = {
        "pca": lambda: embed_pca(reference, query),
        "scvi": lambda: embed_scvi(reference.copy(), query),
    }
    embed |= embed_cellplm(reference.copy(), query, ours, args.train_kwargs) if ours else {}
    for method in missing:
        seed_everything(seed, args.threads)
        z_reference, z_query, loss = embed[method]()
        scores = {key: round(value, 4) for key, value in score(reference, query, z_reference, z_query).items()}
        scores |= {} if loss is None else {"negative_elbo": round(loss, 2)}
        results.append({**rows[method], **scores, "versions": versions(*PACKAGES)})
        print(row, method, scores, flush=True)


def table(rows: list[Row], datasets: list[str]) -> str:
    """Return the Markdown table: mean ± standard deviation over seeds."""
    columns = {
        "accuracy": ("accuracy", 3),
        "macro_f1": ("macro-F1", 3),
        "ilisi": ("iLISI", 3),
        "silhouette_batch": ("batch silhouette", 3),
    }
    wanted = [{**row, "method": TITLES[row["method"]]} for row in rows if row["dataset"] in datasets]
    order = [*TASKS, *TITLES.values()]
    trained = [row for row in wanted if "negative_elbo" in row]
    likelihoods = markdown_table(
        trained, ("dataset", "method", "kwargs"), {"negative_elbo": ("negative ELBO of the query", 1)}, order
    )
    return markdown_table(wanted, ("dataset", "method", "kwargs"), columns, order) + "\n\n" + likelihoods


def parse_args() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=DATA_DIR, help="folder of the .h5ad files")
    parser.add_argument("--out", type=Path, default=RESULTS_DIR / "query", help="file of JSON lines")
    parser.add_argument("--datasets", nargs="+", choices=TASKS, default=list(TASKS))
    parser.add_argument("--methods", nargs="+", choices=TITLES, default=list(TITLES))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--train-kwargs", type=json.loads, default={}, help="JSON for train(...) of CellPLM")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--table", action="store_true", help="print the Markdown table of what is on file, run nothing")
    return parser.parse_args()


def main() -> None:
    """Run what is missing, or print the table."""
    args = parse_args()
    results = ResultFile(args.out, KEY)
    if not args.table:
        logging.getLogger("scvi").setLevel(logging.WARNING)
        run(args, results)
    print(table(results.rows(), args.datasets))


if __name__ == "__main__":
    main()
