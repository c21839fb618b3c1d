"""Embed 700 blood cells with CellPLM, draw their UMAP, and compare with PCA on the same cells.

The data come with scanpy, so nothing is downloaded. Two files are written to the folder that is given, or to the
current one: ``pbmc_cellplm.h5ad`` with ``obsm["X_cellplm"]``, and ``pbmc_cellplm_umap.png``.

    python tutorials/quickstart.py [folder]
"""

import sys
from pathlib import Path

import numpy as np
import pandas as pd
import scanpy as sc
import scvi
from sklearn.cluster import KMeans
from sklearn.metrics import adjusted_rand_score, f1_score, normalized_mutual_info_score, silhouette_score
from sklearn.model_selection import StratifiedKFold, cross_val_predict
from sklearn.neighbors import KNeighborsClassifier

import cellplm_scvi
from cellplm_scvi import CellPLM


def embed_pca(adata: sc.AnnData) -> np.ndarray:
    """Return 50 principal components, (n_cells, 50), of log1p counts per 10,000 counts of the whole library."""
    normalised = adata.copy()
    normalised.X = adata.X.multiply(1e4 / adata.obs["n_counts"].to_numpy()[:, None]).tocsr()
    sc.pp.log1p(normalised)
    sc.pp.pca(normalised, n_comps=50)
    return normalised.obsm["X_pca"]


def separation(embedding: np.ndarray, types: pd.Series) -> dict[str, float]:
    """Score how well cell types separate in an embedding, (n_cells, n_dims); 1 is best."""
    clusterings = [KMeans(types.nunique(), n_init=1, random_state=seed).fit_predict(embedding) for seed in range(10)]
    folds = StratifiedKFold(5, shuffle=True, random_state=0)
    predicted = cross_val_predict(KNeighborsClassifier(15), embedding, types, cv=folds)
    return {
        "silhouette": silhouette_score(embedding, types),
        "k-means ARI": np.mean([adjusted_rand_score(types, clusters) for clusters in clusterings]),
        "k-means NMI": np.mean([normalized_mutual_info_score(types, clusters) for clusters in clusterings]),
        "kNN accuracy": np.mean(predicted == types),
        "kNN macro-F1": f1_score(types, predicted, average="macro"),
    }


def main(folder: Path) -> None:
    """Train, write the results and print the scores."""
    scvi.settings.seed = 0

    adata = cellplm_scvi.data.pbmc()
    CellPLM.setup_anndata(adata, size_factor_key="n_counts")
    model = CellPLM(adata)
    print(model)
    model.train()

    adata.obsm["X_cellplm"] = model.get_latent_representation()
    adata.obsm["X_pca"] = embed_pca(adata)
    sc.pp.neighbors(adata, use_rep="X_cellplm")
    sc.tl.umap(adata)

    folder.mkdir(parents=True, exist_ok=True)
    adata.write_h5ad(folder / "pbmc_cellplm.h5ad")
    figure = sc.pl.umap(adata, color="cell_type", title="PBMC, CellPLM", size=30, frameon=False, return_fig=True)
    figure.savefig(folder / "pbmc_cellplm_umap.png", bbox_inches="tight", dpi=150)

    scores = {name: separation(adata.obsm[key], adata.obs["cell_type"]) for name, key in METHODS.items()}
    print(f"\nHow well {adata.obs['cell_type'].nunique()} cell types separate (1 is best):\n")
    print(pd.DataFrame(scores).round(3).to_string())
    print(f"\nWritten: {folder / 'pbmc_cellplm.h5ad'} and {folder / 'pbmc_cellplm_umap.png'}")


METHODS = {"CellPLM": "X_cellplm", "PCA": "X_pca"}

if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "."))
