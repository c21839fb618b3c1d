"""A small real pre-training: human data sets as one corpus, then a data set that was left out, beside a random start.

The left-out set (`pbmc_3chemistries_symphony`) is embedded zero-shot, and trained on from both starts for as many epochs;
its validation loss is noted each epoch, and its embedding scored by scib-metrics at a tenth of the epochs and at the end.

    python benchmarks/pretraining.py --folder /tmp/pretraining --max-steps 1500 --epochs 50 --seeds 3
    python benchmarks/pretraining.py --folder /tmp/pretraining --table
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import anndata as ad
import numpy as np
from _common import DATA_DIR, RESULTS_DIR, ResultFile, markdown_table, read_dataset, seed_everything
from integration import BATCH, embed_pca, load_task, score

LEFT_OUT = "pbmc_3chemistries_symphony"
#: human; what shares cells with another stays out
SOURCES = (
    "kang2018_ctrl_8donors",
    "pbmc3k_labelled",
    "wu2021_breast_tnbc_CID4465",
    "lymphnode_sc_ref_330",
    "papalexi2021_thp1_eccite_rep12",
    "norman2019_k562_crispra_sub",
    "gasperini2019_k562_40k_unlabelled",
    "xenium_breast_rep1_4regions",
    "visium_lymphnode_1000",
)
MODEL = {"n_hidden": 128, "n_layers": 2, "n_heads": 4, "n_latent": 32, "position": "none"}
RESULTS = RESULTS_DIR / "pretraining.jsonl"


def pretrained(folder: Path, data: Path, max_steps: int) -> None:
    """Build the corpus and train on it; both go on where they were stopped."""
    from cellplm_scvi.cli import pretrain
    from cellplm_scvi.data import Source, build_corpus

    sources = []
    for name in SOURCES:
        read_dataset(data, name)  # leaves with a message where it is absent
        sources.append(Source(data / f"{name}.h5ad", batch_key="batch", platform_key="platform"))
    build_corpus(sources, folder / "corpus")
    pretrain(
        folder / "corpus",
        folder / "run",
        preset="tiny",
        model=MODEL,
        batch_size=512,
        max_epochs=100,
        max_steps=max_steps,
        validation=0.05,
        checkpoint_every=50,
        accelerator="cpu",
        devices=1,
        progress=False,
    )


def fine_tuned(adata: ad.AnnData, start: Path | None, seed: int, epochs: int) -> tuple[np.ndarray, list[float]]:
    """Embedding after so many epochs, and the validation loss after each (negative log-likelihood of a cell)."""
    from cellplm_scvi import CellPLM

    seed_everything(seed, 1)
    adata = adata.copy()
    if start is None:
        CellPLM.setup_anndata(adata, batch_key=BATCH)
        model = CellPLM(adata, **MODEL)
    else:
        model = CellPLM.from_pretrained(
            start, adata, batch_key=BATCH, new_categories="add", new_genes="add", accelerator="cpu"
        )
    if epochs == 0:
        return model.get_latent_representation(), []
    model.train(
        max_epochs=epochs,
        batch_size=128,
        accelerator="cpu",
        devices=1,
        check_val_every_n_epoch=1,
        enable_progress_bar=False,
        plan_kwargs={"lr": 1e-3},
    )
    losses = model.history["reconstruction_loss_validation"].to_numpy(dtype=float).ravel()
    return model.get_latent_representation(), losses.tolist()


def run(args: argparse.Namespace) -> None:
    """Measure both starts."""
    pretrained(args.folder, args.data, args.max_steps)
    results = ResultFile(RESULTS, ["start", "seed", "epochs", "max_steps"])
    adata = load_task(args.data, LEFT_OUT)
    before = embed_pca(adata)
    for seed in range(args.seeds):
        for epochs in (0, args.epochs // 10, args.epochs):
            for start in ("pre-trained", "random"):
                row: dict[str, Any] = {"start": start, "seed": seed, "epochs": epochs, "max_steps": args.max_steps}
                if row in results or (start == "random" and epochs == 0):
                    continue
                folder = args.folder / "run" / "model" if start == "pre-trained" else None
                z, losses = fine_tuned(adata, folder, seed, epochs)
                scores = score(adata, z, before)
                results.append(row | {"total": scores["Total"], "losses": losses, "scores": scores})
                print(json.dumps({**row, "total": scores["Total"], "loss": losses[-1:]}), flush=True)


def picture(file: Path) -> None:
    """Learning curves of the longest runs."""
    import matplotlib.pyplot as plt

    rows = ResultFile(RESULTS, ["start"]).rows()
    longest = max(row["epochs"] for row in rows)
    figure, axes = plt.subplots(figsize=(5, 3.2), layout="constrained")
    for start, colour in (("random", "grey"), ("pre-trained", "C0")):
        for row in rows:
            if row["start"] == start and row["epochs"] == longest:
                axes.plot(
                    np.arange(1, longest + 1), row["losses"], color=colour, label=start if row["seed"] == 0 else None
                )
    axes.set(xlabel="epoch of fine-tuning", ylabel="validation NB loss", xscale="log")
    axes.legend(frameon=False)
    figure.savefig(file, dpi=150)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path("pretraining"))
    parser.add_argument("--data", type=Path, default=DATA_DIR)
    parser.add_argument("--max-steps", type=int, default=1500)
    parser.add_argument("--epochs", type=int, default=50)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--table", action="store_true")
    parser.add_argument("--picture", type=Path)
    args = parser.parse_args()
    if args.picture is not None:
        picture(args.picture)
    elif args.table:
        rows = ResultFile(RESULTS, ["start"]).rows()
        for row in rows:
            row["loss"] = row["losses"][-1] if row["losses"] else float("nan")
        print(
            markdown_table(rows, ["start", "epochs"], {"loss": ("validation NB loss", 1), "total": ("scib total", 3)})
        )
    else:
        run(args)


if __name__ == "__main__":
    main()
