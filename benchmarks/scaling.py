"""What pre-training costs on more devices than are at hand: a simulation of the sampler, and a cost model.

The simulation deals out samples of the published sizes to 64 ranks, and counts how long ranks wait for the one with the most
cells. The cost model multiplies measured figures; both need neither data nor a GPU.

    python benchmarks/scaling.py
"""

from __future__ import annotations

import argparse

import numpy as np

from cellplm_scvi.data._stream_plan import EpochPlan

#: floating-point operations of a training step for one cell of the preset "85m" with 19,374 genes, a tenth of them with
#: counts: forwards and backwards, as torch.utils.flop_counter counts them, and its parameters with 12,596 batches
FLOP_A_CELL, PARAMETERS = 316e6, 104.9e6
#: sustained work of a device in TFLOP/s: a third of the peak in single (V100) or bfloat16 (A100, H100) precision
DEVICES = {"V100": 5.0, "A100": 100.0, "H100": 300.0}
#: bytes a second of the slowest link of an all-reduce: NVLink inside a machine, InfiniBand of 200 Gb/s between machines
LINKS = {8: 100e9, 64: 20e9}


def published_sizes(rng: np.random.Generator) -> np.ndarray:
    """Cells of each sample: 9 million dissociated ones in 12,596 batches less the sections, 2.7 million of CosMx.

    Only the totals are published. Sizes are log-normal (sigma 1.2), sections of a field of view hold 2,000 cells or so.
    """
    sections = np.maximum(50, rng.normal(2_000, 500, 1_350)).astype(int)
    sizes = rng.lognormal(0, 1.2, 12_596 - sections.size)
    return np.concatenate([np.maximum(1, sizes / sizes.sum() * 9e6).astype(int), sections])


def simulate(sizes: np.ndarray, n_ranks: int, batch_size: int, context_size: int) -> dict[str, float]:
    """Balance of one epoch."""
    starts = np.cumsum(sizes) - sizes
    plan = EpochPlan(starts, sizes, context_size, batch_size, seed=0, n_ranks=n_ranks)
    cells = np.array([[batch.n_cells for batch in plan.minibatches(0, rank)] for rank in range(n_ranks)])
    mixed = np.mean([len(batch.lengths) for batch in plan.minibatches(0, 0)])
    return {
        "steps": cells.shape[1],
        "cells a step": float(cells.sum(0).mean()),
        "idle": 1 - float(cells.sum() / (cells.max(0).sum() * n_ranks)),
        "contexts": float(mixed),
        "once": float(cells.sum() == sizes.sum()),
    }


def whole_samples_each(sizes: np.ndarray, n_ranks: int, most: int, rng: np.random.Generator) -> float:
    """Idle share where each rank takes one sample at a time, at most ``most`` of its cells, in random order."""
    order = np.minimum(rng.permutation(sizes), most)
    steps = order[: order.size // n_ranks * n_ranks].reshape(-1, n_ranks)
    return 1 - float(steps.sum() / (steps.max(1).sum() * n_ranks))


def predict(n_cells: float, epochs: int, n_devices: int, device: str, batch_size: int = 2_000) -> dict[str, float]:
    """Hours, and what has to be loaded and sent."""
    steps = n_cells * epochs / (batch_size * n_devices)
    work = batch_size * FLOP_A_CELL / (DEVICES[device] * 1e12)
    wire = 2 * (n_devices - 1) / n_devices * 4 * PARAMETERS
    send = wire / LINKS[n_devices]
    # most of the gradients are sent while others are computed; here, as if none were
    return {
        "hours": steps * (work + send) / 3600,
        "share of sending": send / (work + send),
        "cells a second and device": batch_size / (work + send),
        "megabytes a step": wire / 1e6,
    }


def main() -> None:
    """Print both tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cells-a-core", type=float, default=20_600, help="that a core loads, by streaming.py")
    args = parser.parse_args()
    rng = np.random.default_rng(0)
    sizes = published_sizes(rng)
    print(
        f"{sizes.sum():,} cells, {sizes.size:,} samples of {sizes.min()} to {sizes.max():,}, median {np.median(sizes):,.0f}\n"
    )
    print("| ranks | cells of a minibatch | context | steps | contexts a minibatch | idle share | every cell once |")
    print("|---|---|---|---|---|---|---|")
    for n_ranks, context in ((8, 500), (64, 500), (64, 1_000), (64, 2_000)):
        row = simulate(sizes, n_ranks, 2_000, context)
        print(
            f"| {n_ranks} | 2,000 | {context:,} | {row['steps']:,} | {row['contexts']:.1f} | {row['idle']:.2%} | "
            f"{'yes' if row['once'] else 'no'} |"
        )
    idle = whole_samples_each(sizes, 64, 2_000, rng)
    print(f"| 64 | one sample, at most 2,000 | - | - | 1 | {idle:.1%} | no |\n")
    print(f"{FLOP_A_CELL / 1e6:.0f} MFLOP a cell and step\n")
    print("| cells | epochs | devices | hours | of them sending | cells/s a device | cores to load them |")
    print("|---|---|---|---|---|---|---|")
    for n_cells, epochs in ((11e6, 200), (100e6, 20)):
        for n_devices, device in ((8, "V100"), (8, "A100"), (8, "H100"), (64, "A100"), (64, "H100")):
            row = predict(n_cells, epochs, n_devices, device)
            rate = row["cells a second and device"]
            print(
                f"| {n_cells / 1e6:.0f}M | {epochs} | {n_devices} {device} | {row['hours']:.1f} | "
                f"{row['share of sending']:.0%} | {rate:,.0f} | {rate / args.cells_a_core:.1f} |"
            )


if __name__ == "__main__":
    main()
