"""What our defaults change against the published behaviour, on the same published weights.

Both sides use the same network: ours is :class:`cellplm_scvi.CellPLM`, the other is the reference pass that the parity tests
hold to the published code's numbers, with fresh noise at each call as the published code draws it.

    python benchmarks/published.py PREFIX            # PREFIX.config.json and PREFIX.best.ckpt
    python benchmarks/published.py CONFIG --random   # random weights for a configuration

Differences are root mean squares over cells and dimensions, in units of the standard deviation of the embedding over cells.
"""

from __future__ import annotations

import argparse
import resource
import tempfile
import time
from pathlib import Path

import numpy as np
import pandas as pd
import scipy.sparse as sp
import torch
from anndata import AnnData

from cellplm_scvi import CellPLM
from cellplm_scvi.nn import SparseCounts
from cellplm_scvi.nn.published import Draws, PublishedNetwork, ReferenceInput, reference_pass
from cellplm_scvi.pretrained import load_network, read_config, read_published
from cellplm_scvi.pretrained._keys import key_table


def random_checkpoint(config_path: Path, folder: Path) -> Path:
    """Files of a published model with random weights, of the scale of an initialised one; returns their prefix."""
    generator = torch.Generator().manual_seed(0)
    weights = {}
    for key in key_table(read_config(config_path).config):
        values = torch.randn(key.shape, generator=generator)
        if key.name.endswith("feat_enc.emb"):
            values *= 0.005
        elif len(key.shape) == 2 and "covariate" not in key.name:
            values *= key.shape[1] ** -0.5
        elif len(key.shape) == 1:
            values = 0.02 * values + (1.0 if "norm" in key.name and key.name.endswith("weight") else 0.0)
        weights[key.name] = values
    torch.save({"model_state_dict": weights}, folder / "random.best.ckpt")
    (folder / "random.config.json").write_bytes(config_path.read_bytes())
    return folder / "random"


def toy_cells(genes: list[str], n_cells: int) -> AnnData:
    """Counts of five kinds of cells with their own genes, about a tenth of the entries non-zero."""
    rng = np.random.default_rng(0)
    rate = rng.gamma(0.1, 1.0, (5, len(genes)))
    counts = rng.poisson(rate[rng.integers(5, size=n_cells)] * rng.lognormal(0, 0.4, (n_cells, 1)))
    counts[:, 0] += 1
    return AnnData(sp.csr_matrix(counts.astype(np.float32)), var=pd.DataFrame(index=genes))


def published_pass(network: PublishedNetwork, adata: AnnData, seed: int, rows: slice = slice(None)) -> np.ndarray:
    """Embedding of some cells in the company of each other, as the published code does it, with the seed's noise."""
    config, generator = network.config, torch.Generator().manual_seed(seed)
    x = sp.csr_matrix(adata.X)[rows]
    counts = SparseCounts(
        torch.from_numpy(x.data), torch.from_numpy(x.indices).long(), torch.from_numpy(x.indptr).long(), x.shape[1]
    )
    uniform = torch.rand(len(adata), config.n_components, generator=generator)
    normal = torch.randn(len(adata), config.n_latent, generator=generator)
    with torch.inference_mode():
        found = reference_pass(network, ReferenceInput(counts), Draws(uniform[rows], normal[rows]))
    return found.activations["z"].numpy()


def difference(one: np.ndarray, other: np.ndarray, spread: float) -> str:
    """Root mean square, in units of the spread."""
    return f"{np.sqrt(np.square(one - other).mean()) / spread:.3f}"


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("prefix", type=Path)
    parser.add_argument("--random", action="store_true", help="PREFIX is a configuration; make weights for it")
    parser.add_argument("--cells", type=int, default=500)
    parser.add_argument("--draws", type=int, default=8, help="published evaluations to average")
    options = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        prefix = random_checkpoint(options.prefix, Path(folder)) if options.random else options.prefix
        found = read_published(Path(f"{prefix}.config.json"), Path(f"{prefix}.best.ckpt"))
        network = load_network(found)
        adata = toy_cells(found.genes, options.cells)
        start = time.perf_counter()
        model = CellPLM.from_pretrained(prefix, adata, accelerator="cpu")
    loading = time.perf_counter() - start
    half = len(adata) // 2

    start = time.perf_counter()
    ours = model.get_latent_representation()
    seconds = time.perf_counter() - start
    spread = float(ours.std(0).mean())
    z = [published_pass(network, adata, seed) for seed in range(options.draws)]
    halves = np.concatenate([published_pass(network, adata, 0, rows) for rows in (slice(half), slice(half, None))])
    mean = np.mean(z, 0)
    small_batches = model.get_latent_representation(batch_size=half)

    shares = model.get_normalized_expression(return_numpy=True)
    with torch.inference_mode():
        hidden = network.decoder.layer_states(torch.from_numpy(ours), {}, absent="of_sum")[-1]
        logits = torch.relu(network.decoder.output_hidden(hidden)) @ network.decoder.weight.T + network.decoder.bias
    log_ratio = logits.log_softmax(-1).numpy() - np.log(shares)
    fold = float(np.exp(np.abs(log_ratio).mean()))
    has_codes = bool(found.config.covariates)

    rows = [
        ("two evaluations of the same cells", difference(z[0], z[1], spread), "0"),
        ("two batches of cells instead of one", difference(halves, z[0], spread), difference(small_batches, ours, spread)),
        (f"from the mean of {options.draws} published evaluations", difference(z[0], mean, spread), difference(ours, mean, spread)),
        ("expression without covariates, published to ours: mean fold change of a gene", f"{fold:.2f}" if has_codes else "-", "1"),
    ]  # fmt: skip
    print(
        f"{len(adata):,} cells x {len(found.genes):,} genes, {sum(p.numel() for p in model.module.parameters()):,} parameters"
    )
    print(f"loaded in {loading:.1f} s, embedded in {seconds:.1f} s on one thread; ", end="")
    print(f"peak memory of all of this {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20:.1f} GB\n")
    print("| | published | ours |\n| --- | ---: | ---: |")
    for row in rows:
        print("| " + " | ".join(row) + " |")


if __name__ == "__main__":
    main()
