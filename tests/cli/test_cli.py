"""Long runs from disk to disk: killed at any moment, they end as if they had not been."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import anndata as ad
import numpy as np
import pytest
import torch
import yaml
from lightning.pytorch import Callback

from cellplm_scvi import CellPLM
from cellplm_scvi.cli import PRESETS, embed, main, pretrain
from cellplm_scvi.cli._embed import NOTE_EVERY
from cellplm_scvi.data import Corpus, build_corpus

pytest.importorskip("annbatch")
pytest.importorskip("jsonargparse")
pytest.importorskip("safetensors")

KEYS: dict[str, Any] = {"batch_key": "batch", "sample_key": "sample"}
NETWORK = {"n_hidden": 16, "n_layers": 1, "n_heads": 2, "n_latent": 4, "n_components": 3, "n_neighbours": 4, "n_niche": 2}
RUN: dict[str, Any] = {
    "preset": "tiny",
    "model": NETWORK,
    "batch_size": 16,
    "context_size": 8,
    "validation": 0.3,
    "max_epochs": 3,
    "checkpoint_every": 2,
    "log_every": 1,
    "accelerator": "cpu",
    "devices": 1,
    "progress": False,
}


class Stop(Callback):
    """Raises at a step, like a failure."""

    def __init__(self, step: int):
        self.step = step

    def on_train_batch_start(self, trainer: Any, *args: Any) -> None:
        if trainer.global_step == self.step:
            raise RuntimeError("stopped")


@pytest.fixture
def corpus(tmp_path, sections):
    return build_corpus(sections, tmp_path / "corpus", shard_size=40, progress=False, spatial_key="spatial", **KEYS)


def weights(model: CellPLM) -> dict[str, np.ndarray]:
    return {name: value.numpy().copy() for name, value in model.module.state_dict().items()}


def assert_same(first: dict[str, np.ndarray], second: dict[str, np.ndarray]) -> None:
    assert first.keys() == second.keys()
    for name, value in first.items():
        np.testing.assert_array_equal(value, second[name], err_msg=name)


@pytest.mark.parametrize(
    ("stop", "change"),
    [
        pytest.param(3, {}, id="within an epoch"),
        pytest.param(5, {}, id="at the end of an epoch"),
        pytest.param(7, {"accumulate": 2, "max_epochs": 5, "checkpoint_every": 1}, id="accumulation"),
        pytest.param(8, {"validate_every": 2, "num_workers": 1}, id="validation within an epoch"),
    ],
)
def test_a_run_that_failed_ends_with_the_same_weights(corpus, tmp_path, stop, change):
    run = RUN | change
    whole = pretrain(corpus.path, tmp_path / "whole", **run)
    with pytest.raises(RuntimeError, match="stopped"):
        pretrain(corpus.path, tmp_path / "stopped", **run, callbacks=[Stop(stop)])
    state = torch.load(tmp_path / "stopped" / "last.ckpt", weights_only=False)
    assert 0 < state["global_step"] <= stop
    assert {"state_dict", "optimizer_states", "lr_schedulers", "random_states", "CorpusDataModule"} <= set(state)
    went_on = pretrain(corpus.path, tmp_path / "stopped", **run)
    assert went_on.trainer.global_step == whole.trainer.global_step > stop
    assert_same(weights(whole), weights(went_on))
    loaded = CellPLM.from_pretrained(tmp_path / "stopped" / "model", accelerator="cpu")
    assert_same(weights(whole), weights(loaded))
    assert (tmp_path / "whole" / "logs" / "version_0" / "metrics.csv").read_text().count("\n") > 3


def test_killed_pretraining_goes_on_in_other_processes(corpus, tmp_path, killed_at_random):
    run = RUN | {"checkpoint_every": 1}
    whole = pretrain(corpus.path, tmp_path / "whole", **run)
    n_killed = killed_at_random(lambda: pretrain(corpus.path, tmp_path / "killed", **run), n_kills=3, longest=2.5)
    assert n_killed
    killed = CellPLM.from_pretrained(tmp_path / "killed" / "model", accelerator="cpu")
    assert_same(weights(whole), weights(killed))


def test_other_minibatches_are_refused(corpus, tmp_path):
    with pytest.raises(RuntimeError, match="stopped"):
        pretrain(corpus.path, tmp_path / "run", **RUN, callbacks=[Stop(3)])
    with pytest.raises(ValueError, match="batch_size was 16, is 32"):
        pretrain(corpus.path, tmp_path / "run", **(RUN | {"batch_size": 32}))


def test_presets_build(corpus):
    for name, preset in PRESETS.items():
        with torch.device("meta"):
            network = CellPLM(registry=dict(corpus.registry), **preset["model"])
        assert network.module.n_hidden == preset["model"]["n_hidden"], name
    with pytest.raises(ValueError, match='preset="huge" is not one of "85m"'):
        pretrain(corpus.path, "nowhere", preset="huge")


@pytest.fixture
def model(corpus):
    torch.manual_seed(0)
    found = CellPLM(registry=corpus.registry, **NETWORK)
    found.is_trained_ = True
    found.module.eval()
    return found


def test_embedding_to_disk_is_that_in_memory(corpus, model, sections, tmp_path):
    adata = corpus.to_anndata()
    expected = model.get_latent_representation(adata)
    found = ad.read_zarr(embed(model, corpus.path, tmp_path / "z.zarr", batch_size=32, progress=False))
    assert list(found.obs_names) == list(adata.obs_names)
    assert list(found.obs["sample"]) == list(adata.obs["sample"])
    np.testing.assert_allclose(found.X, expected, atol=1e-5)
    # a file, in its own order of cells and of genes
    shuffled = sections[np.random.default_rng(0).permutation(90)].copy()[:, ::-1].copy()
    shuffled.write_h5ad(tmp_path / "shuffled.h5ad")
    out = embed(
        model, tmp_path / "shuffled.h5ad", tmp_path / "y.zarr", sample_key="sample", spatial_key="spatial", progress=False
    )
    found = ad.read_zarr(out)
    assert list(found.obs_names) == list(shuffled.obs_names)
    back = found[adata.obs_names]
    np.testing.assert_allclose(back.X, expected, atol=1e-5)
    assert not (tmp_path / "y.zarr.part").exists()
    with pytest.raises(FileExistsError, match="exists"):
        embed(model, corpus.path, tmp_path / "y.zarr")


def test_a_killed_embedding_goes_on(corpus, model, tmp_path, killed_at_random, monkeypatch):
    monkeypatch.setattr("cellplm_scvi.cli._embed.NOTE_EVERY", 0.0)
    assert NOTE_EVERY > 0
    arguments: dict[str, Any] = {"batch_size": 1, "progress": False}
    whole = ad.read_zarr(embed(model, corpus, tmp_path / "whole.zarr", **arguments))

    def run() -> None:
        if not (tmp_path / "killed.zarr").exists():
            embed(model, Corpus(corpus.path), tmp_path / "killed.zarr", **arguments)

    killed_at_random(run, n_kills=3, longest=0.7)
    killed = ad.read_zarr(tmp_path / "killed.zarr")
    np.testing.assert_array_equal(killed.X, whole.X)
    assert killed.obs.equals(whole.obs)


def test_the_command(sections, tmp_path, capsys):
    sections.write_h5ad(tmp_path / "a.h5ad")
    folder = str(tmp_path / "corpus")
    main(["corpus", "build", folder, f'["{tmp_path / "a.h5ad"}"]', "--sample_key", "sample", "--spatial_key", "spatial"])
    main(["corpus", "info", folder])
    said = capsys.readouterr().out
    assert "cells: 90" in said
    assert "no cell is missing" in said
    config = RUN | {"corpus": folder, "folder": str(tmp_path / "run"), "max_epochs": 2, "validation": ["sample1"]}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    main(["pretrain", str(tmp_path / "config.yaml"), "--max_epochs", "1"])
    main(["embed", str(tmp_path / "run" / "model"), folder, str(tmp_path / "z.zarr"), "--accelerator", "cpu"])
    assert ad.read_zarr(tmp_path / "z.zarr").shape == (90, 4)


RANK = """
import sys
import numpy as np
import torch
torch.set_num_threads(1)
from lightning.pytorch import Callback
from cellplm_scvi.cli import pretrain
import json

class Losses(Callback):
    def __init__(self):
        self.losses = []
    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        loss = outputs["loss"].detach().clone()
        if trainer.world_size > 1:
            torch.distributed.all_reduce(loss)
            loss /= trainer.world_size
        self.losses.append(loss.item() * trainer.accumulate_grad_batches)

losses = Losses()
run = json.loads(sys.argv[3])
model = pretrain(sys.argv[1], sys.argv[2], callbacks=[losses], **run)
if model.trainer.is_global_zero:
    np.savez(f"{sys.argv[2]}/losses.npz", losses=losses.losses)
"""


@pytest.mark.slow
def test_two_processes_train_like_one_with_the_same_global_batch(tmp_path, make_tissues):
    """Samples of one cell to most of them; without what is random in a step, but for the order of cells."""
    import json

    adata = make_tissues(n_cells=400, n_samples=5)
    corpus = build_corpus(adata, tmp_path / "corpus", progress=False, **KEYS)
    network = NETWORK | {"dropout_rate": 0.0, "masking": False, "latent": "deterministic"}
    run = RUN | {"model": network, "validation": ["sample1"], "batch_size": 32, "max_epochs": 2, "seed": 3}
    script = tmp_path / "rank.py"
    script.write_text(RANK)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]

    def start(folder: Path, change: dict[str, Any], **environment: str) -> subprocess.Popen:
        command = [sys.executable, str(script), str(corpus.path), str(folder), json.dumps(run | change)]
        known = os.environ | {"OMP_NUM_THREADS": "1", **environment}
        return subprocess.Popen(command, env=known, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)

    # as torchrun does it
    common = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    common |= {"TORCHELASTIC_RUN_ID": "test", "GROUP_RANK": "0"}
    two = {"devices": 2, "strategy": "ddp"}
    started = [
        start(tmp_path / "two", two, RANK=str(rank), LOCAL_RANK=str(rank), **common) for rank in range(2)
    ] + [start(tmp_path / "one", {"accumulate": 2})]
    for process in started:
        said, _ = process.communicate(timeout=500)
        assert process.returncode == 0, said[-4000:]
    losses = [np.load(tmp_path / name / "losses.npz")["losses"] for name in ("one", "two")]
    assert len(losses[0]) == 2 * len(losses[1]) > 8
    np.testing.assert_allclose(losses[0].reshape(-1, 2).mean(1), losses[1], atol=1e-4)
    one, both = (CellPLM.from_pretrained(tmp_path / name / "model", accelerator="cpu") for name in ("one", "two"))
    for name, value in weights(one).items():
        np.testing.assert_allclose(value, weights(both)[name], atol=1e-4, err_msg=name)
