"""Long runs from disk to disk: killed at any moment, they end as if they had not been."""

from __future__ import annotations

import json
import multiprocessing
import os
import re
import shutil
import socket
from typing import Any

import anndata as ad
import numpy as np
import pytest
import torch
from lightning.pytorch import Callback

from cellplm_scvi import CellPLM
from cellplm_scvi.cli import PRESETS, embed, main, pretrain
from cellplm_scvi.cli._embed import NOTE_EVERY
from cellplm_scvi.data import Corpus, CorpusDataModule, build_corpus
from cellplm_scvi.train import PlaceMixtureComponents

pytest.importorskip("annbatch")
pytest.importorskip("jsonargparse")
pytest.importorskip("safetensors")

KEYS: dict[str, Any] = {"batch_key": "batch", "sample_key": "sample"}
NETWORK = {
    "n_hidden": 16,
    "n_layers": 1,
    "n_heads": 2,
    "n_latent": 4,
    "n_components": 3,
    "n_neighbours": 4,
    "n_niche": 2,
}
RUN: dict[str, Any] = {
    "preset": "tiny",
    "model": NETWORK,
    "batch_size": 16,
    "context_size": 8,
    "validation": 0.3,
    "max_epochs": 2,
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


@pytest.fixture(scope="module")
def corpus(tmp_path_factory, make_tissues):
    adata = make_tissues(spatial=True)
    adata.obsm["spatial"][::11] = np.nan
    folder = tmp_path_factory.mktemp("corpora") / "corpus"
    return build_corpus(adata, folder, shard_size=50, progress=False, spatial_key="spatial", **KEYS)


def weights(model: CellPLM) -> dict[str, np.ndarray]:
    return {name: value.numpy().copy() for name, value in model.module.state_dict().items()}


def assert_same(first: dict[str, np.ndarray], second: dict[str, np.ndarray]) -> None:
    assert first.keys() == second.keys()
    for name, value in first.items():
        np.testing.assert_array_equal(value, second[name], err_msg=name)


@pytest.mark.parametrize(
    ("stop", "change"),
    [
        pytest.param(6, {"checkpoint_every": 6}, id="at the end of an epoch"),
        pytest.param(4, {"accumulate": 2, "validate_every": 2, "num_workers": 1}, id="within an epoch"),
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


@pytest.fixture(scope="module")
def stopped_run(corpus, tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "run"
    with pytest.raises(RuntimeError, match="stopped"):
        pretrain(corpus.path, folder, **RUN, callbacks=[Stop(3)])
    return folder


@pytest.mark.parametrize(
    ("change", "said"),
    [
        pytest.param({"batch_size": 32}, "batch_size was 16, is 32", id="minibatches"),
        pytest.param({"lr": 0.5, "seed": 2}, "lr was null, is 0.5; seed was 0, is 2", id="learning rate and seed"),
        pytest.param({"plan": {"weight_decay": 1.0}}, 'plan was null, is {"weight_decay": 1.0}', id="plan"),
        pytest.param(
            {"model": NETWORK | {"n_hidden": 32}}, "model was {.n_hidden.: 16, .*}, is {.n_hidden.: 32, .*}", id="sizes"
        ),
    ],
)
def test_a_run_does_not_go_on_with_other_arguments(corpus, stopped_run, change, said):
    before = (stopped_run / "config.json").read_text()
    with pytest.raises(ValueError, match=f"begun with other arguments: {said}. Pass them as they were"):
        pretrain(corpus.path, stopped_run, **(RUN | change))
    assert (stopped_run / "config.json").read_text() == before


def test_a_run_does_not_go_on_with_another_corpus(corpus, stopped_run, tmp_path):
    before = (stopped_run / "config.json").read_text()
    other = another(corpus, tmp_path / "other")
    fewer = other.to_anndata()[:, :-3].copy()  # of another shape, which no weights of the run would fit
    few = build_corpus(fewer, tmp_path / "few", shard_size=50, progress=False, spatial_key="spatial", **KEYS)
    for path in (other.path, few.path):
        with pytest.raises(ValueError, match="run holds a run on another corpus"):
            pretrain(path, stopped_run, **RUN)
    assert (stopped_run / "config.json").read_text() == before


@pytest.mark.parametrize("kept", [0, 1000])
@pytest.mark.parametrize("file", ["last.ckpt", "config.json"])
def test_a_damaged_run_is_named(corpus, stopped_run, tmp_path, capsys, file, kept):
    folder = shutil.copytree(stopped_run, tmp_path / "run")
    (folder / file).write_bytes((folder / file).read_bytes()[: min(kept, 50 if file == "config.json" else kept)])
    settings = tmp_path / "run.yaml"
    settings.write_text(json.dumps({"corpus": str(corpus.path), "folder": str(folder), **RUN}))
    with pytest.raises(SystemExit, match="2"):
        main(["pretrain", str(settings)])
    assert f"{file} is damaged" in capsys.readouterr().err


def test_a_run_goes_on_for_longer_and_in_another_way(corpus, stopped_run, tmp_path):
    """What may change takes effect, and is noted; a corpus may have moved."""
    folder = shutil.copytree(stopped_run, tmp_path / "run")
    moved = shutil.copytree(corpus.path, tmp_path / "moved")
    change = {
        "max_epochs": 3,
        "validate_every": 2,
        "log_every": 2,
        "num_workers": 1,
        "trainer": {"gradient_clip_val": 0.5},
    }
    longer = pretrain(moved, folder, **(RUN | change))
    assert longer.trainer.current_epoch == 3
    assert longer.trainer.gradient_clip_val == 0.5
    noted = json.loads((folder / "config.json").read_text())
    assert {name: noted[name] for name in change} == change


def test_components_are_placed_once(corpus, tmp_path, monkeypatch, capsys):
    """Also where a run goes on for longer, so that the step where they would be placed comes again."""
    placed = []

    def place(self: PlaceMixtureComponents, trainer: Any, pl_module: Any) -> None:
        placed.append(trainer.global_step)
        original(self, trainer, pl_module)

    original = PlaceMixtureComponents.place
    monkeypatch.setattr(PlaceMixtureComponents, "place", place)
    pretrain(corpus.path, tmp_path, **(RUN | {"max_epochs": 3}))
    assert len(placed) == 1
    longer = pretrain(corpus.path, tmp_path, **(RUN | {"max_epochs": 12}))
    assert longer.trainer.current_epoch == 12
    assert len(placed) == 1
    with pytest.raises(SystemExit):
        main(["pretrain", str(tmp_path / "config.json"), "--max_epochs", "2"])
    assert "max_epochs=2" in capsys.readouterr().err.splitlines()[-1]


def test_sizes_of_a_model_to_start_from_cannot_be_changed(corpus, tmp_path):
    with pytest.raises(ValueError, match="model={'n_hidden': 32} has no effect with start_from"):
        pretrain(corpus.path, tmp_path / "run", start_from="somewhere", **(RUN | {"model": {"n_hidden": 32}}))
    assert not (tmp_path / "run").exists()


class Validations(Callback):
    """Notes after how many minibatches there was one."""

    def __init__(self) -> None:
        self.after: list[int] = []
        self.n_batches = 0

    def on_train_batch_end(self, *_: Any) -> None:
        self.n_batches += 1

    def on_validation_start(self, trainer: Any, pl_module: Any) -> None:
        if not trainer.sanity_checking:
            self.after.append(self.n_batches)


@pytest.mark.parametrize(
    ("accumulate", "every", "after"),
    [
        pytest.param(1, 4, [4, 9], id="within an epoch of 5"),
        pytest.param(3, 4, [3, 6], id="accumulation leaves an epoch of 3"),
        pytest.param(1, 10, [10], id="two epochs"),
        pytest.param(1, None, [5, 10], id="every epoch"),
    ],
)
def test_validation_comes_after_so_many_minibatches(make_tissues, tmp_path, accumulate, every, after):
    """Five contexts to train on: a minibatch each, of which three in a row make a step."""
    sources = {f"s{n}": make_tissues(n_cells=12, n_samples=1, seed=n) for n in range(6)}
    corpus = build_corpus(sources, tmp_path / "corpus", progress=False)
    change = {"validation": ["s0"], "batch_size": 12, "context_size": 12, "accumulate": accumulate}
    validations = Validations()
    model = pretrain(corpus.path, tmp_path / "run", **(RUN | change), validate_every=every, callbacks=[validations])
    assert validations.n_batches == 2 * model.trainer.datamodule.n_batches
    assert validations.after == after


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
        model,
        tmp_path / "shuffled.h5ad",
        tmp_path / "y.zarr",
        sample_key="sample",
        spatial_key="spatial",
        progress=False,
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


@pytest.fixture
def stopped_embedding(corpus, model, tmp_path, monkeypatch):
    """Where an embedding was begun that stopped at its fourth minibatch."""
    monkeypatch.setattr("cellplm_scvi.cli._embed.NOTE_EVERY", 0.0)
    n_done = []

    def embed_or_stop(tensors: Any) -> torch.Tensor:
        if len(n_done) == 3:
            raise RuntimeError("stopped")
        n_done.append(1)
        return type(model.module).embed(model.module, tensors)

    with monkeypatch.context() as patched:
        patched.setattr(model.module, "embed", embed_or_stop)
        with pytest.raises(RuntimeError, match="stopped"):
            embed(model, corpus.path, tmp_path / "z.zarr", batch_size=1, progress=False)
    assert json.loads((tmp_path / "z.zarr.part" / "progress.json").read_text())["done"] == 3
    return tmp_path / "z.zarr"


def another(corpus: Corpus, folder: Any) -> Corpus:
    """A corpus of the same cells, samples and genes with other counts."""
    adata = corpus.to_anndata()
    adata.X = adata.X[::-1].copy()
    return build_corpus(adata, folder, shard_size=50, progress=False, spatial_key="spatial", **KEYS)


def test_an_embedding_of_another_model_or_corpus_does_not_go_on(corpus, model, stopped_embedding, tmp_path):
    torch.manual_seed(1)
    other = CellPLM(registry=corpus.registry, **NETWORK)
    other.is_trained_ = True
    attention = CellPLM(registry=corpus.registry, **(NETWORK | {"encoder": "softmax"}))
    attention.module.load_state_dict(model.module.state_dict())
    for network in (other, attention):
        with pytest.raises(ValueError, match='begun in another way: model was "checksum .*remove that folder'):
            embed(network, corpus.path, stopped_embedding, batch_size=1, progress=False)
    with pytest.raises(ValueError, match='begun in another way: corpus was "checksum [0-9a-f]*", is "checksum [^;]*$'):
        embed(model, another(corpus, tmp_path / "other"), stopped_embedding, batch_size=1, progress=False)
    with pytest.raises(ValueError, match="batch_size was 1, is 8"):
        embed(model, corpus.path, stopped_embedding, batch_size=8, progress=False)


def test_an_embedding_goes_on_with_the_model_and_corpus_of_another_place(corpus, model, stopped_embedding, tmp_path):
    moved = shutil.copytree(corpus.path, tmp_path / "moved")
    again = CellPLM(registry=corpus.registry, **NETWORK)
    again.module.load_state_dict(model.module.state_dict())
    n_embedded = []
    whole = model.get_latent_representation(dataloader=CorpusDataModule(corpus).inference_dataloader())
    again.module.embed = lambda tensors: n_embedded.append(1) or model.module.embed(tensors)
    found = ad.read_zarr(embed(again, moved, stopped_embedding, batch_size=1, progress=False))
    assert len(n_embedded) == corpus.n_samples - 3
    np.testing.assert_allclose(found.X, whole, atol=1e-6)


def test_batches_are_aligned_on_disk_as_in_memory_until_a_corpus_is_trained_on(corpus, tmp_path):
    adata = corpus.to_anndata()
    CellPLM.setup_anndata(adata, **corpus.registry["setup_args"])
    model, quiet = CellPLM(adata, **NETWORK), {"accelerator": "cpu", "devices": 1, "enable_progress_bar": False}
    model.train(1, **quiet)
    z = model.get_latent_representation()
    assert np.abs(z - model.get_latent_representation(align_batches=False)).max() > 1e-3
    found = ad.read_zarr(embed(model, corpus.path, tmp_path / "z.zarr", progress=False))
    np.testing.assert_allclose(found.X, z, atol=1e-4)
    streamed = model.get_latent_representation(dataloader=CorpusDataModule(corpus).inference_dataloader())
    np.testing.assert_allclose(streamed, z, atol=1e-4)
    model.train(1, datamodule=CorpusDataModule(corpus, validation=0.0), **quiet)
    np.testing.assert_array_equal(
        model.get_latent_representation(), model.get_latent_representation(align_batches=False)
    )


@pytest.mark.parametrize("kind", [int, float, bool, str])
def test_batches_of_a_file_are_those_of_the_model_whatever_their_type(make_tissues, tmp_path, kind):
    adata = make_tissues(120, 30, 4)
    adata.obs["batch"] = adata.obs["batch"].cat.codes.astype(kind)
    CellPLM.setup_anndata(adata, batch_key="batch", sample_key="sample")
    model = CellPLM(adata, **NETWORK)
    model.train(1, accelerator="cpu", devices=1, enable_progress_bar=False)
    z = model.get_latent_representation()
    assert np.abs(z - model.get_latent_representation(align_batches=False)).max() > 1e-3
    adata.write_h5ad(tmp_path / "a.h5ad")
    keys = {"batch_key": "batch", "sample_key": "sample", "progress": False}
    found = ad.read_zarr(embed(model, tmp_path / "a.h5ad", tmp_path / "z.zarr", **keys))
    np.testing.assert_allclose(found[adata.obs_names].X, z, atol=1e-4)


def test_the_name_of_a_file_is_no_batch(make_tissues, tmp_path):
    adata = make_tissues(120, 30, 4)
    CellPLM.setup_anndata(adata, batch_key="batch", sample_key="sample")
    model = CellPLM(adata, **NETWORK)
    model.train(1, accelerator="cpu", devices=1, enable_progress_bar=False)
    adata.write_h5ad(tmp_path / "batch0.h5ad")
    with pytest.warns(UserWarning, match="The corpus has no batch: its cells get the mean batch code"):
        path = embed(model, tmp_path / "batch0.h5ad", tmp_path / "z.zarr", sample_key="sample", progress=False)
    plain = model.get_latent_representation(align_batches=False)
    np.testing.assert_allclose(ad.read_zarr(path)[adata.obs_names].X, plain, atol=1e-4)


def test_what_a_model_misses_in_a_file_is_said(model, sections, tmp_path, recwarn):
    few = sections[:, :20].copy()
    few.var_names = [*few.var_names[:10], *(f"other{n}" for n in range(10))]
    few.write_h5ad(tmp_path / "few.h5ad")
    recwarn.clear()
    embed(model, tmp_path / "few.h5ad", tmp_path / "z.zarr", progress=False)
    text = " ".join(str(warning.message) for warning in recwarn)
    for part in (
        "10 of the 20 genes of .*few.h5ad are unknown to the model",
        "20 of the model's 30 genes are not in the corpus .*results may be poor",
        "The corpus has no batch: its cells get the mean batch code",
        "The corpus has no coordinates",
        "few.h5ad is treated as one sample",
    ):
        assert re.search(part, text), part


def test_a_file_that_a_model_cannot_use_is_refused_before_it_is_read(model, make_tissues, tmp_path):
    adata = make_tissues(spatial=True, n_dims=3)
    adata.write_h5ad(tmp_path / "a.h5ad")
    with pytest.raises(ValueError, match=r'obsm\["spatial"\] has 3 columns; the model was set up with 2'):
        embed(model, tmp_path / "a.h5ad", tmp_path / "z.zarr", sample_key="sample", spatial_key="spatial")
    adata.obs["library"] = 2 * np.asarray(adata.X.sum(1)).ravel()
    CellPLM.setup_anndata(adata, sample_key="sample", size_factor_key="library")
    scaled = CellPLM(adata, **NETWORK)
    with pytest.raises(ValueError, match="set up with library sizes. Pass size_factor_key"):
        embed(scaled, tmp_path / "a.h5ad", tmp_path / "z.zarr", sample_key="sample")
    corpus = build_corpus(adata, tmp_path / "corpus", progress=False, **KEYS)
    with pytest.raises(ValueError, match="set up with library sizes .* Build the corpus with size_factor_key"):
        embed(scaled, corpus, tmp_path / "y.zarr")


def test_the_command(sections, tmp_path, capsys):
    sections.write_h5ad(tmp_path / "a.h5ad")
    folder = str(tmp_path / "corpus")
    main(["corpus", "build", folder, str(tmp_path / "a.h5ad"), "--sample_key", "sample", "--spatial_key", "spatial"])
    main(["corpus", "info", folder])
    said = capsys.readouterr().out
    assert "cells: 90" in said
    assert "no cell is missing" in said
    config = RUN | {"corpus": folder, "folder": str(tmp_path / "run"), "max_epochs": 2, "validation": ["sample1"]}
    (tmp_path / "config.yaml").write_text(json.dumps(config))  # which is YAML too
    main(["pretrain", str(tmp_path / "config.yaml"), "--max_epochs", "1"])
    main(["embed", str(tmp_path / "run" / "model"), folder, str(tmp_path / "z.zarr"), "--accelerator", "cpu"])
    assert ad.read_zarr(tmp_path / "z.zarr").shape == (90, 4)


@pytest.mark.parametrize(
    ("command", "said"),
    [
        pytest.param("corpus info nowhere", "nowhere holds no corpus", id="no corpus"),
        pytest.param("corpus build c nowhere.h5ad", "nowhere.h5ad does not exist", id="no file"),
        pytest.param("corpus build c a.h5ad --batch_key donor", 'Source "a": batch_key="donor" is not', id="no column"),
        pytest.param("corpus build c a.h5ad --genes g.txt", "There is no file g.txt of genes", id="no vocabulary"),
        pytest.param("pretrain --corpus nowhere --folder run", "nowhere holds no corpus", id="no corpus to train on"),
        pytest.param("pretrain --corpus c --folder run --preset huge", 'preset="huge" is not one of', id="no preset"),
        pytest.param(
            "pretrain --corpus corpus --folder run --max_steps 0", "max_steps=0 must be a positive", id="no step"
        ),
        pytest.param(
            'pretrain --corpus corpus --folder run --preset tiny --plan {"wramup":0.1}',
            'plan_kwargs has "wramup", which the training plan does not take',
            id="no argument of the plan",
        ),
        pytest.param("embed model corpus z.zarr --batch_size 0", "batch_size=0 must be a positive", id="no minibatch"),
        pytest.param("pretrain --corpus corpus --folder run --start_from ./mode", 'no folder "./mode"', id="no start"),
        pytest.param("embed ./mode a.h5ad z.zarr", 'There is no folder "./mode"', id="no model"),
        pytest.param("embed kept/modl a.h5ad z.zarr", 'There is no folder "kept/modl"', id="no model, but its parent"),
        pytest.param("embed model nowhere.h5ad z.zarr", "nowhere.h5ad does not exist", id="no file to embed"),
        pytest.param("embed model a.h5ad z.zarr --sample_key donor", 'sample_key="donor" is not', id="no sample"),
        pytest.param("embed model fractions.h5ad z.zarr", "X does not hold counts", id="no counts"),
        pytest.param("embed model a.h5ad kept", "kept exists", id="result exists"),
        pytest.param(
            "embed model corpus z.zarr --sample_key sample --organism mouse",
            "sample_key='sample', organism='mouse' is for files; the source is a corpus",
            id="keys of a corpus",
        ),
    ],
)
def test_a_mistake_is_said_in_a_line_and_leaves_nothing(
    corpus, model, sections, tmp_path, capsys, monkeypatch, command, said
):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(corpus.path, "corpus")
    os.mkdir("kept")
    model.save_pretrained("model")
    sections.write_h5ad("a.h5ad")
    half = sections.copy()
    half.X = half.X / 2
    half.write_h5ad("fractions.h5ad")
    with pytest.raises(SystemExit) as stopped:
        main(command.split())
    assert stopped.value.code == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith("cellplm: error: ")
    assert said in last
    assert last[len("cellplm: error: ")] not in "'\"", "the repr of a message"
    assert {path.name for path in tmp_path.iterdir()} == {"corpus", "kept", "model", "a.h5ad", "fractions.h5ad"}


def test_an_error_that_is_no_mistake_keeps_its_traceback(monkeypatch):
    def broken(path: str) -> None:
        """Break."""
        raise RuntimeError("broken")

    monkeypatch.setattr("cellplm_scvi.cli._main.info", broken)
    with pytest.raises(RuntimeError, match="broken"):
        main(["corpus", "info", "somewhere"])


class Losses(Callback):
    """Keeps the loss of each minibatch, the mean over ranks."""

    def __init__(self) -> None:
        self.losses: list[float] = []

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        loss = outputs["loss"].detach().clone()
        if trainer.world_size > 1:
            torch.distributed.all_reduce(loss)
            loss /= trainer.world_size
        self.losses.append(loss.item() * trainer.accumulate_grad_batches)


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_two_processes_train_like_one_with_the_same_global_batch(tmp_path, make_tissues, strategy):
    """Samples of one cell to most of them; without what is random in a step, but for the order of cells. One run stops."""
    adata = make_tissues(n_cells=300, n_samples=5)
    corpus = build_corpus(adata, tmp_path / "corpus", progress=False, **KEYS)
    network = NETWORK | {"dropout_rate": 0.0, "masking": False, "latent": "deterministic"}
    run = RUN | {"model": network, "validation": ["sample1"], "batch_size": 32, "max_epochs": 2, "seed": 3}
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]

    def train(name: str, change: Any, environment: Any, stop: int = -1) -> None:
        os.environ.update(environment)
        losses = Losses()
        model = pretrain(corpus.path, tmp_path / name, callbacks=[losses, Stop(stop)], **(run | change))
        if model.trainer.is_global_zero:
            np.save(tmp_path / name / "losses.npy", losses.losses)

    # as torchrun does it
    common = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    common |= {"TORCHELASTIC_RUN_ID": "test", "GROUP_RANK": "0"}
    ranks = [common | {"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(2)]
    context = multiprocessing.get_context("fork")
    two = {"devices": 2, "strategy": strategy}

    def started(name: str, change: Any, environments: list[Any], *stop: int) -> list[Any]:
        processes = [context.Process(target=train, args=(name, change, each, *stop)) for each in environments]
        for process in processes:
            process.start()
        return processes

    alone = started("one", {"accumulate": 2}, [{}])
    for process in started("two", two, ranks, 5):
        process.join(300)
        assert process.exitcode == 1
    for process in alone + started("two", two, ranks):
        process.join(300)
        assert process.exitcode == 0
    one, two = (np.load(tmp_path / name / "losses.npy") for name in ("one", "two"))
    assert len(one) == 4 * len(two) > 8
    np.testing.assert_allclose(one.reshape(-1, 2).mean(1)[-len(two) :], two, atol=1e-4)
    models = [CellPLM.from_pretrained(tmp_path / name / "model", accelerator="cpu") for name in ("one", "two")]
    for name, value in weights(models[0]).items():
        np.testing.assert_allclose(value, weights(models[1])[name], atol=1e-4, err_msg=name)


def test_a_file_is_of_the_organism_that_the_model_was_told(make_tissues, tmp_path):
    human, mouse = ["CD3E", "TP53", "SOX2", "VIM", "CD19"], ["Cd3e", "Trp53", "Sox2", "Vim", "Cd19"]
    adata = make_tissues(60, 5)
    adata.var_names = human
    CellPLM.setup_anndata(adata, sample_key="sample")
    reference = CellPLM(adata, **NETWORK)
    reference.train(max_epochs=1, accelerator="cpu", enable_progress_bar=False)
    adata = adata.copy()
    adata.var_names = mouse
    model = CellPLM.from_pretrained(reference, adata, organism="mouse", accelerator="cpu")
    model.save_pretrained(str(tmp_path / "model"))
    adata.write_h5ad(tmp_path / "mouse.h5ad")
    out = embed(
        tmp_path / "model",
        tmp_path / "mouse.h5ad",
        tmp_path / "z.zarr",
        sample_key="sample",
        progress=False,
        accelerator="cpu",
    )
    np.testing.assert_allclose(ad.read_zarr(out).X, model.get_latent_representation(), atol=1e-5)
