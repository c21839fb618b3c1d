"""Paths and names lead to the files of a model, or to a message that says what was looked for."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path
from typing import Any

import pytest

from cellplm_scvi import CellPLM
from cellplm_scvi.pretrained import PretrainedFileError, resolve


@pytest.mark.parametrize("kind", [str, Path])
@pytest.mark.parametrize("end", ["a_gmvae_nb_cov", "a_gmvae_nb_cov.config.json", "a_gmvae_nb_cov.best.ckpt", ""])
def test_published_files(kind: type, end: str, mixture_case: Any) -> None:
    """By prefix, either file, or folder."""
    found = resolve(kind(mixture_case.prefix.parent / end))
    assert found.format == "published"
    assert (found.config, found.weights) == (mixture_case.config_path, mixture_case.checkpoint_path)


@pytest.mark.parametrize("path", ["a_gmvae_nb_cov", "./a_gmvae_nb_cov", ".", "./", "a_gmvae_nb_cov/"])
def test_relative_paths(path: str, mixture_case: Any, monkeypatch: Any) -> None:
    monkeypatch.chdir(mixture_case.prefix.parent)
    assert resolve(path).config.resolve() == mixture_case.config_path.resolve()


@pytest.mark.parametrize("end", ["", "/", "/cellplm_config.json", "/model.safetensors"])
def test_own_files(end: str, dissociated_model: CellPLM, tmp_path: Path) -> None:
    dissociated_model.save_pretrained(tmp_path / "model")
    found = resolve(f"{tmp_path / 'model'}{end}")
    assert found.format == "cellplm-scvi"
    assert found.config.parent == found.weights.parent == tmp_path / "model"


def test_prefix_with_dots(mixture_case: Any, tmp_path: Path) -> None:
    """``20231027_85M.v1.2`` has no suffix to take off."""
    for suffix in (".config.json", ".best.ckpt"):
        shutil.copy(f"{mixture_case.prefix}{suffix}", tmp_path / f"85M.v1.2{suffix}")
    assert resolve(tmp_path / "85M.v1.2").config.name == "85M.v1.2.config.json"


def test_several_models_in_a_folder(mixture_case: Any) -> None:
    shutil.copy(mixture_case.config_path, mixture_case.prefix.parent / "b.config.json")
    with pytest.raises(PretrainedFileError, match=r"2 models .*name one, such as .*a_gmvae_nb_cov"):
        resolve(mixture_case.prefix.parent)


@pytest.mark.parametrize("absent", ["config_path", "checkpoint_path"])
def test_one_of_two_files(absent: str, mixture_case: Any) -> None:
    path = getattr(mixture_case, absent)
    path.unlink()
    with pytest.raises(FileNotFoundError, match=f"not {path.name}"):
        resolve(mixture_case.prefix)


@pytest.mark.parametrize("name", ["", "nothing", "/no/such/prefix", "a\0b", "x" * 5000, "~/nothing", "a b/c"])
def test_nothing_there(name: str) -> None:
    with pytest.raises(FileNotFoundError, match=r"PREFIX\.config\.json"):
        resolve(name)


def test_empty_folder(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="save_pretrained"):
        resolve(tmp_path)


def test_a_path_is_no_name() -> None:
    with pytest.raises(FileNotFoundError, match="No model at"):
        resolve(Path("owner/name"))


def test_a_path_that_is_here_is_not_asked_of_the_hub(
    tmp_path: Path, monkeypatch: Any, dissociated_model: CellPLM
) -> None:
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)  # asking it would be an ImportError
    monkeypatch.chdir(tmp_path)
    (tmp_path / "x" / "empty").mkdir(parents=True)
    (tmp_path / "x" / "a.h5ad").touch()
    for name in ("x/empty", "x/a.h5ad", "x/typo"):
        with pytest.raises(FileNotFoundError, match=f'No model at "{name}"'):
            CellPLM.from_pretrained(name)
    dissociated_model.save(str(tmp_path / "x" / "saved"))
    with pytest.raises(FileNotFoundError, match="written by save, .* open it with load"):
        CellPLM.from_pretrained("x/saved")
    dissociated_model.save_pretrained("x/own")
    with pytest.raises(FileNotFoundError, match=r"CellPLM\.from_pretrained"):
        CellPLM.load("x/own")


# -- Names -------------------------------------------------------------------


def test_name_without_the_package(monkeypatch: Any) -> None:
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(ImportError, match=r'"owner/name".*cellplm-scvi\[hub\]'):
        CellPLM.from_pretrained("owner/name")


@pytest.fixture
def offline(monkeypatch: Any, tmp_path: Path) -> Path:
    """The hub's client in its offline mode; an empty cache."""
    constants = pytest.importorskip("huggingface_hub.constants")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    return tmp_path / "cache"


@pytest.mark.parametrize("name", ["owner/name", "owner/name/85M"])
def test_name_offline(name: str, offline: Path) -> None:
    """The message says which files to get, and what to do with them."""
    files = ("85M.config.json", "85M.best.ckpt") if name.endswith("85M") else ("cellplm_config.json", "safetensors")
    with pytest.raises(ConnectionError, match="not in the local cache") as caught:
        CellPLM.from_pretrained(name, cache_dir=offline)
    for text in ('"owner/name"', "pass the path of that folder", *files):
        assert text in str(caught.value)


@pytest.mark.parametrize("name", ["owner/name", "owner/name/a_gmvae_nb_cov"])
def test_name_in_the_cache(name: str, offline: Path, mixture_case: Any) -> None:
    """What the hub's client downloaded before is found without a network."""
    repository = offline / "models--owner--name"
    snapshot = repository / "snapshots" / ("0" * 40)
    snapshot.mkdir(parents=True)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("0" * 40)
    for path in (mixture_case.config_path, mixture_case.checkpoint_path):
        shutil.copy(path, snapshot)
    model = CellPLM.from_pretrained(name, cache_dir=offline)
    report = model.pretrained_report
    assert report is not None
    assert report.source == name
    for path in snapshot.iterdir():
        path.unlink()
    with pytest.raises(FileNotFoundError, match="holds neither"):
        CellPLM.from_pretrained(name, cache_dir=offline)
