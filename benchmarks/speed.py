"""Measure time and memory of training and embedding against the published code and scVI, side by side.

Both sides of a row do the same work on the same synthetic cells, in turns, in one process. Time is the median over the
repeats of wall seconds; seconds of the processor stand beside it, since they bear other programs on the machine better.
Memory is the peak above the loaded model, of a fresh process for each side (Linux). The published code (``cellplm``
0.1.0.post2 and ``einops``, ``torchmetrics``) is read from the folder ``--published``; without it, its rows are skipped.

    pip install --no-deps --target PUBLISHED cellplm==0.1.0.post2 einops torchmetrics
    python benchmarks/speed.py --published PUBLISHED
    python benchmarks/speed.py --rows profile
    python benchmarks/speed.py --table
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from _common import RESULTS_DIR, ResultFile, Row, seed_everything, versions
from _speed_sides import (
    SMALL,
    Work,
    configuration,
    counts,
    growth_embedding,
    loader_epoch,
    network_epoch,
    our_embedding,
    our_epoch,
    our_step,
    published_embedding,
    published_package,
    published_step,
    scvi_epoch,
)

DENSITY = 0.085
PACKAGES = ("cellplm-scvi", "torch", "scvi-tools", "numpy", "scipy")
#: row -> (what it is, target of the ratio of times, target of the ratio of memory)
ROWS: dict[str, tuple[str, str, str]] = {
    "step-85m": ("training step, 85M, 1,000 cells x 19,374 genes", ">= 3", ">= 3"),
    "kept-85m": ("the same, ours with recompute=False", ">= 3", ">= 3"),
    "step-256": ("training step, 256 units, 2,000 cells x 2,000 genes", ">= 3", ""),
    "bf16-85m": ("training step, 85M, ours with precision='bf16-mixed', theirs in float32", ">= 3", ">= 3"),
    "bf16-256": ("training step, 256 units, ours with precision='bf16-mixed', theirs in float32", ">= 3", ""),
    "compile-256": ("training step, 256 units, ours as it is, against ours compiled", "", ""),
    "embed-85m": ("embedding, 85M, 8,000 cells x 19,374 genes", ">= 1.5", ">= 3"),
    "epoch": ("one epoch, 12,000 cells x 1,300 genes, defaults, against scVI", ">= 1", ""),
    "growth one sample": ("time a cell, 5,000 / 100,000 cells, one sample", ">= 0.87", ""),
    "growth many samples": ("time a cell, 5,000 / 100,000 cells, samples of 1,000", ">= 0.87", ""),
    "growth spatial": ("time a cell, 5,000 / 100,000 cells, sections of 1,000", ">= 0.87", ""),
    "gpu-step-85m": ("training step on a GPU, 85M, 2,000 cells, ours in bfloat16, theirs in float32", ">= 8", ""),
    "gpu-embed-85m": ("embedding on a GPU, 85M, 8,000 cells, ours in bfloat16, theirs in float32", ">= 8", ""),
    "gpu-loader": ("minibatches of an epoch on a GPU alone, against the epoch", ">= 1", ""),
    "roofline": ("floating-point work of each part of the step-85m, and the rate of the machine", "", ""),
    "profile": ("profile of our training step, printed only", "", ""),
}
NEEDS_PUBLISHED = ("step-85m", "kept-85m", "bf16-85m", "step-256", "bf16-256", "embed-85m")
NEEDS_PUBLISHED += ("gpu-step-85m", "gpu-embed-85m")
#: where the rows "gpu-" run, and cells of their training step
GPU, GPU_CELLS = "cuda", 2000
WITH_MEMORY = ("step-85m", "kept-85m", "bf16-85m", "embed-85m")
BFLOAT16 = torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()
#: vector instructions, and whether bfloat16 is multiplied by them or emulated
PROCESSOR = torch.backends.cpu.get_cpu_capability() + (", bfloat16" if BFLOAT16 else "")
#: what our side of a training step does differently
VARIANTS: dict[str, dict[str, bool]] = {"step": {}, "kept": {"recompute": False}, "bf16": {"bf16": True}}


def sides(row: str, config: Path | None, folder: Path) -> dict[str, Callable[[], Work]]:
    """Makers of the work of both sides of a row, ``ours`` first."""
    large, small = configuration(config), configuration(None, **SMALL)
    match row:
        case _ if (variant := row.split("-")[0]) in VARIANTS:
            arguments: tuple[Any, ...] = (large, 1000, DENSITY) if row.endswith("-85m") else (small, 2000, DENSITY)
            return {
                "ours": partial(our_step, *arguments, **VARIANTS[variant]),
                "peer": partial(published_step, *arguments),
            }
        case "gpu-step-85m":
            arguments = (large, GPU_CELLS, DENSITY)
            return {
                "ours": partial(our_step, *arguments, bf16=True, device=GPU),
                "peer": partial(published_step, *arguments, device=GPU),
            }
        case "gpu-embed-85m":
            arguments = (large, folder, 8000, DENSITY)
            return {
                "ours": partial(our_embedding, *arguments, bf16=True, device=GPU),
                "peer": partial(published_embedding, *arguments, device=GPU),
            }
        case "gpu-loader":
            return {"ours": loader_epoch, "peer": partial(network_epoch, GPU)}
        case "compile-256":
            return {
                "ours": partial(our_step, small, 2000, DENSITY),
                "peer": partial(our_step, small, 2000, DENSITY, compile=True),
            }
        case "embed-85m":
            arguments = (large, folder, 8000, DENSITY)
            return {"ours": partial(our_embedding, *arguments), "peer": partial(published_embedding, *arguments)}
        case "epoch":
            return {"ours": our_epoch, "peer": scvi_epoch}
        case _:
            kind = row.removeprefix("growth ")
            return {"ours": partial(growth_embedding, 100_000, kind), "peer": partial(growth_embedding, 5_000, kind)}


def alternate(works: dict[str, Work], repeats: int) -> dict[str, dict[str, list[float]]]:
    """Wall and processor seconds of each side, in turns after one unmeasured round."""
    seconds: dict[str, dict[str, list[float]]] = {side: {"wall": [], "cpu": []} for side in works}
    for repeat in range(repeats + 1):
        for side, work in works.items():
            wall, cpu = time.perf_counter(), time.process_time()
            work()
            if repeat:
                seconds[side]["wall"].append(time.perf_counter() - wall)
                seconds[side]["cpu"].append(time.process_time() - cpu)
    return seconds


def resident(field: str) -> float:
    """``VmRSS`` (now) or ``VmHWM`` (peak) of this process, in megabytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{field}:")) / 1024


def peak_above(work: Work, repeats: int) -> float:
    """Peak memory of the work above what is resident before, in megabytes."""
    Path("/proc/self/clear_refs").write_text("5")  # sets the peak to what is resident now
    before = resident("VmRSS")
    for _ in range(repeats):
        work()
    return resident("VmHWM") - before


def peak_of(row: str, side: str, args: argparse.Namespace) -> float:
    """:func:`peak_above` in a fresh process."""
    command = [sys.executable, __file__, "--rows", row, "--memory-of", side, "--threads", str(args.threads)]
    command += ["--published", str(args.published)] + (["--config", str(args.config)] if args.config else [])
    output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    return float(output.splitlines()[-1])


def measure(row: str, args: argparse.Namespace) -> Row:
    """Times, ratios and memory of one row."""
    with tempfile.TemporaryDirectory() as folder:
        works = {side: make() for side, make in sides(row, args.config, Path(folder)).items()}
        seconds = alternate(works, args.repeats)
    medians = {side: {kind: statistics.median(times) for kind, times in of.items()} for side, of in seconds.items()}
    scale = 20.0 if row.startswith("growth") else 1.0  # a hundred thousand cells against five thousand
    result: Row = {
        "row": row,
        "what": ROWS[row][0],
        "ours_s": medians["ours"]["wall"],
        "peer_s": medians["peer"]["wall"],
        "ratio": scale * medians["peer"]["wall"] / medians["ours"]["wall"],
        "ratio_cpu": scale * medians["peer"]["cpu"] / medians["ours"]["cpu"],
        "target": ROWS[row][1],
        "seconds": seconds,
    }
    if row == "gpu-step-85m":
        flop = sum(gflop(args.config, GPU_CELLS).values()) * 1e9
        result |= {"flop_per_s": flop / medians["ours"]["wall"], "matmul_flop_per_s": product_rate(GPU)}
        result["utilisation"] = result["flop_per_s"] / result["matmul_flop_per_s"]
    if row in WITH_MEMORY:
        ours, peer = (peak_of(row, side, args) for side in ("ours", "peer"))
        result |= {"ours_mb": ours, "peer_mb": peer, "ratio_memory": peer / ours, "target_memory": ROWS[row][2]}
    return result


def product_rate(device: str, size: int = 8192) -> float:
    """Operations a second of a large product in bfloat16, the card's limit in practice."""
    a = torch.randn(size, size, device=device, dtype=torch.bfloat16)
    seconds = []
    for _ in range(10):
        start = time.perf_counter()
        torch.mm(a, a)[0, 0].item()
        seconds.append(time.perf_counter() - start)
    return 2 * size**3 / statistics.median(seconds)


def gflop(config: Path | None, n: int = 1000) -> dict[str, float]:
    """Multiplications and additions of the parts of a training step of ``n`` cells (three times the forward pass)."""
    c = configuration(config)
    d, z, g = c["enc_hid"], c["post_latent_dim"], c["out_dim"]
    x = counts(n, g, DENSITY)
    mixture = (d + c["num_clusters"]) * 512 + 512 * 2 * z  # in training, of the component that is drawn
    macs = {
        "bag of genes (2 passes)": x.nnz * d * 2 / 3,
        "projection": n * d * d,
        "encoder": n * c["enc_layers"] * (8 * d * d + 2 * d * d // 8),
        "latent mixture": n * mixture,
        "decoder": n * (z * c["dec_hid"] + c["dec_hid"] * 128),
        "last layer and likelihood": n * 128 * g,
    }
    return {part: 6 * count / 1e9 for part, count in macs.items()}


def roofline(config: Path | None) -> Row:
    """Operations of each part of a training step, and the rate of products, in GFLOP."""
    n, d = 1000, configuration(config)["enc_hid"]
    a, b = torch.randn(n, d), torch.randn(d, 2 * d)
    speeds = []
    for _ in range(10):
        wall, cpu = time.perf_counter(), time.process_time()
        torch.mm(a, b)
        speeds.append((time.perf_counter() - wall, time.process_time() - cpu))
    flop = 2 * n * d * 2 * d / 1e9
    return {
        "row": "roofline",
        "gflop": gflop(config),
        "gemm_gflop_per_s": flop / statistics.median(wall for wall, _ in speeds),
        "gemm_gflop_per_cpu_s": flop / statistics.median(cpu for _, cpu in speeds),
    }


def print_profile(config: Path | None) -> None:
    """Table of the torch profiler for one training step of the 85M configuration."""
    step = our_step(configuration(config), 1000, DENSITY)
    step()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        step()
    print(profile.key_averages().table(sort_by="self_cpu_time_total", row_limit=16, max_name_column_width=40))


def table(results: list[Row]) -> str:
    """Markdown of the newest result of each row, for each kind of processor."""
    kinds = dict.fromkeys(result["processor"] for result in results if "processor" in result)
    return "\n\n".join(
        f"{kind}:\n\n{table_of([result for result in results if result.get('processor') == kind])}" for kind in kinds
    )


def table_of(results: list[Row]) -> str:
    """Markdown of the newest result of each row."""
    newest = {result["row"]: result for result in results}
    heads = ["work", "ours", "peer", "times faster", "by processor time", "target", "memory", "peer's", "times less"]
    lines = ["| " + " | ".join(heads) + " |", "|" + "---|" * len(heads)]
    for row in (row for row in ROWS if row in newest and "ratio" in newest[row]):
        r = newest[row]
        cells = [r["what"], f"{r['ours_s']:.2f} s", f"{r['peer_s']:.2f} s", f"{r['ratio']:.2f}"]
        cells += [f"{r['ratio_cpu']:.2f}", r["target"]]
        memory = "ratio_memory" in r
        cells += (
            [f"{r['ours_mb']:,.0f} MB", f"{r['peer_mb']:,.0f} MB", f"{r['ratio_memory']:.2f}"] if memory else [""] * 3
        )
        lines.append("| " + " | ".join(cells) + " |")
    if "utilisation" in newest.get("gpu-step-85m", {}):
        r = newest["gpu-step-85m"]
        rate, limit = (f"{r[name] / 1e12:.0f}" for name in ("flop_per_s", "matmul_flop_per_s"))
        lines += ["", f"Training step on the GPU: {rate} TFLOP/s, {r['utilisation']:.0%} of a large product's {limit}."]
    if "roofline" in newest:
        r = newest["roofline"]
        lines += ["", "| part of a training step | GFLOP |", "|---|---|"]
        lines += [f"| {part} | {gflop:.0f} |" for part, gflop in r["gflop"].items()]
        lines += ["", f"Matrix products: {r['gemm_gflop_per_s']:.0f} GFLOP/s of wall time, "]
        lines[-1] += f"{r['gemm_gflop_per_cpu_s']:.0f} of processor time."
    return "\n".join(lines)


def parse_args() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    rows = [row for row in ROWS if row != "profile"]
    parser.add_argument("--rows", nargs="+", choices=list(ROWS), default=rows, help="what to measure")
    parser.add_argument("--published", type=Path, default=Path("published"), help="folder of the published code")
    parser.add_argument("--config", type=Path, help="a published config.json; by default its sizes are built in")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--output", type=Path, default=RESULTS_DIR / "speed.jsonl")
    parser.add_argument("--memory-of", choices=["ours", "peer"], help=argparse.SUPPRESS)
    parser.add_argument("--table", action="store_true", help="print what is on file")
    return parser.parse_args()


def main() -> None:
    """Measure what was asked for and print the table."""
    args = parse_args()
    file = ResultFile(args.output, key=("row",))
    if args.table:
        print(table(file.rows()))
        return
    seed_everything(0, args.threads)
    published = published_package(args.published)
    if args.memory_of:
        with tempfile.TemporaryDirectory() as folder:
            work = sides(args.rows[0], args.config, Path(folder))[args.memory_of]()
            print(peak_above(work, 2))
        return
    common = {"threads": args.threads, "repeats": args.repeats, "processor": PROCESSOR, "versions": versions(*PACKAGES)}
    for row in args.rows:
        if row in NEEDS_PUBLISHED and not published:
            print(f"{row}: skipped, {args.published} does not hold the published code (see --help).", file=sys.stderr)
            continue
        if row.startswith("bf16") and not BFLOAT16:
            print(f"{row}: skipped, this processor has no instructions for bfloat16.", file=sys.stderr)
            continue
        if row.startswith("gpu") and not torch.cuda.is_available():
            print(f"{row}: skipped, there is no GPU.", file=sys.stderr)
            continue
        if row == "profile":
            print_profile(args.config)
            continue
        result = roofline(args.config) if row == "roofline" else measure(row, args)
        if row.startswith("gpu"):
            result["processor"] = torch.cuda.get_device_name()
        file.append(common | result | {"load": os.getloadavg()[0]})
        print(json.dumps({key: value for key, value in result.items() if key != "seconds"}), flush=True)
    print(table(file.rows()))


if __name__ == "__main__":
    main()
