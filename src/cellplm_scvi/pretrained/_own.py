"""Our format: weights as safetensors, everything else as JSON; nothing is executed to read it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, get_args

import numpy as np
import torch
from torch import Tensor

from cellplm_scvi import _constants as c
from cellplm_scvi.genes._tables import Organism

from ._checkpoint import DTYPES
from ._config import read_json
from ._errors import PretrainedFileError, listed, quoted

CONFIG_FILE, WEIGHTS_FILE = "cellplm_config.json", "model.safetensors"
FORMAT, FORMAT_VERSION = "cellplm-scvi", 1
_ENTRIES = ("format", "version", "model", "init", "registry", "origin", "package_version", "weights_sha256")


@dataclass(frozen=True)
class OwnCheckpoint:
    """A model that ``save_pretrained`` wrote.

    Parameters
    ----------
    model
        Name of its class.
    init
        Arguments of its constructor.
    registry
        scvi-tools' registry of its data set-up: genes, categories, keys.
    state
        Parameters and buffers by name.
    origin
        ``{"source": name}`` of the pre-trained model that the weights come from, or ``None``.
    """

    model: str
    init: dict[str, Any]
    registry: dict[str, Any]
    state: dict[str, Tensor]
    origin: dict[str, Any] | None = None


def write_own(folder: Path, checkpoint: OwnCheckpoint, package_version: str) -> None:
    """Write a folder with the two files.

    Raises
    ------
    ImportError
        Without the package safetensors.
    TypeError
        If something of the set-up cannot be written as JSON.
    """
    save_file = _safetensors("save_file")
    content = {
        "format": FORMAT,
        "version": FORMAT_VERSION,
        "package_version": package_version,
        "model": checkpoint.model,
        "init": checkpoint.init,
        "registry": checkpoint.registry,
        "origin": checkpoint.origin,
    }
    tensors = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in checkpoint.state.items()}
    folder.mkdir(parents=True, exist_ok=True)
    # under other names first: what was there stays whole if the disk is full
    with TemporaryDirectory(dir=folder, prefix=".saving-") as new:
        save_file(tensors, Path(new, WEIGHTS_FILE), metadata={"format": "pt"})
        content["weights_sha256"] = _sha256(Path(new, WEIGHTS_FILE))
        text = json.dumps(content, default=plain, allow_nan=False, indent=1)
        Path(new, CONFIG_FILE).write_text(text + "\n", encoding="utf-8")
        for name in (WEIGHTS_FILE, CONFIG_FILE):
            Path(new, name).replace(folder / name)


def read_own(config_path: Path, weights_path: Path) -> OwnCheckpoint:
    """Read and check a folder that :func:`write_own` wrote.

    Raises
    ------
    PretrainedFileError
        If a file is not what it should be.
    """
    content = read_json(config_path)
    file = config_path.name
    if content.get("format") != FORMAT:
        raise PretrainedFileError(f'{file}: format is {quoted(content.get("format"))}; "{FORMAT}" is needed.')
    version = content.get("version")
    if type(version) is not int or version < 1:
        raise PretrainedFileError(f"{file}: version is {quoted(version)}.")
    if version > FORMAT_VERSION:
        raise PretrainedFileError(f"{file} has version {version} of the format; this package reads {FORMAT_VERSION}.")
    unknown = [name for name in content if name not in _ENTRIES]
    if unknown:
        raise PretrainedFileError(f"{file} has unknown entries ({listed(unknown)}).")
    if not isinstance(content.get("model"), str):
        raise PretrainedFileError(f"{file}: model is {quoted(content.get('model'))}; the name of a class is needed.")
    for name in ("init", "registry"):
        if not isinstance(content.get(name), dict):
            raise PretrainedFileError(f"{file}: {name} is {quoted(content.get(name))}; an object is needed.")
    origin = content.get("origin")
    if origin is not None and not (isinstance(origin, dict) and isinstance(origin.get("source"), str)):
        raise PretrainedFileError(f"{file}: origin is {quoted(origin)}; an object with a source is needed.")
    registry = _checked_registry(content["registry"], file)
    written = content.get("weights_sha256")  # of folders that have it
    if written is not None and weights_path.is_file() and _sha256(weights_path) != written:
        raise PretrainedFileError(
            f"{weights_path.name} is not the file that {file} was written with: it is corrupt or was changed since "
            "(their SHA-256 differ). Copy or download both files again."
        )
    return OwnCheckpoint(content["model"], content["init"], registry, _read_tensors(weights_path), origin)


def check_state(state: Mapping[str, Tensor], expected: Mapping[str, Tensor], file: str) -> None:
    """Raise unless the weights are those of a module.

    Parameters
    ----------
    state
        What was read.
    expected
        State dict of the module, perhaps without memory (on the meta device).
    """
    missing = [name for name in expected if name not in state]
    extra = [name for name in state if name not in expected]
    if missing or extra:
        parts = [f"lacks {len(missing):,} weights ({listed(missing)})"] if missing else []
        parts += [f"has {len(extra):,} that the model does not know ({listed(extra)})"] if extra else []
        raise PretrainedFileError(f"{file} {' and '.join(parts)}: do the two files belong together?")
    wrong = [
        f"{name} is {tuple(state[name].shape)} {state[name].dtype}, needed {tuple(tensor.shape)} {tensor.dtype}"
        for name, tensor in expected.items()
        if state[name].shape != tensor.shape or state[name].dtype != tensor.dtype
    ]
    if wrong:
        raise PretrainedFileError(f"{file}: {len(wrong):,} weights do not fit: {'; '.join(wrong[:3])}.")


def _read_tensors(path: Path) -> dict[str, Tensor]:
    load_file = _safetensors("load_file")
    try:
        state = load_file(path)
    except Exception as error:  # noqa: BLE001 - the parser has its own error type, which moved between versions
        raise PretrainedFileError(f"{path.name} is truncated or corrupt: {str(error)[:200]}") from None
    for name, tensor in state.items():
        if tensor.dtype in DTYPES and not bool(torch.isfinite(tensor).all()):
            raise PretrainedFileError(f"{path.name}: {quoted(name)} has missing or infinite values.")
    return state


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _safetensors(name: str) -> Any:
    try:
        import safetensors.torch
    except ImportError:
        raise ImportError('This format needs the package safetensors: pip install "cellplm-scvi[hub]".') from None
    return getattr(safetensors.torch, name)


def plain(value: object) -> Any:
    """NumPy values as JSON has them."""
    if isinstance(value, np.ndarray):
        return value.tolist()
    if isinstance(value, np.generic):
        return value.item()
    raise TypeError(f"the set-up holds a {type(value).__name__}, which cannot be written as JSON")


def _checked_registry(registry: dict[str, Any], file: str) -> dict[str, Any]:
    """The registry with arrays where scvi-tools has them; raise if it is not one."""

    def needed(holder: object, name: str, kind: type, where: str) -> Any:
        value = holder.get(name) if isinstance(holder, dict) else None
        if type(value) is not kind:
            raise PretrainedFileError(f"{file}: {name} of {where} is {quoted(value)}; a {kind.__name__} is needed.")
        return value

    for argument, value in needed(registry, "setup_args", dict, "registry").items():
        if not isinstance(value, str | dict | None):
            raise PretrainedFileError(f"{file}: {quoted(argument)} of setup_args is {quoted(value)}; a key is needed.")
    needed(registry, "scvi_version", str, "registry")
    method = needed(registry, "setup_method_name", str, "registry")
    if method not in ("setup_anndata", "setup_mudata"):
        raise PretrainedFileError(f"{file}: setup_method_name is {quoted(method)}.")
    fields = needed(registry, "field_registries", dict, "registry")
    for name in (c.X_KEY, c.BATCH_KEY, c.SAMPLE_KEY):
        needed(fields, name, dict, "field_registries")
    for name, field in fields.items():
        where = quoted(name)
        needed(field, "data_registry", dict, where)
        state = needed(field, "state_registry", dict, where)
        for statistic in needed(field, "summary_stats", dict, where):
            needed(field["summary_stats"], statistic, int, f"summary_stats of {where}")
        if name == c.X_KEY:
            genes = needed(state, "column_names", list, where)
            state["column_names"] = _distinct(genes, str, f"{file}: column_names of {where}")
            if (organism := state.get("organism", "human")) not in get_args(Organism):
                raise PretrainedFileError(f"{file}: organism of {where} is {quoted(organism)}.")
            earlier = state.get("earlier_keys", {})
            if not isinstance(earlier, dict) or not all(isinstance(keys, list) for keys in earlier.values()):
                raise PretrainedFileError(f"{file}: earlier_keys of {where} is {quoted(earlier)}; lists are needed.")
            for argument, keys in earlier.items():
                _distinct(keys, (str, type(None)), f"{file}: earlier_keys, {quoted(argument)},")
        elif name in (c.SAMPLE_KEY, c.LABELS_KEY, c.PERTURBATION_KEY, *c.COVARIATES):
            needed(state, "original_key", str, where)
            names = needed(state, "categorical_mapping", list, where)
            state["categorical_mapping"] = _distinct(
                names, (str, int, float), f"{file}: categorical_mapping of {where}"
            )
            if not 0 <= needed(state, "n_known", int, where) <= len(state["categorical_mapping"]):
                raise PretrainedFileError(f"{file}: n_known of {where} is {state['n_known']:,}.")
            if not isinstance(state.get("default", ""), str):
                raise PretrainedFileError(f"{file}: default of {where} is {quoted(state['default'])}; text is needed.")
        elif name == c.COORDINATES_KEY and needed(state, "n_dims", int, where) not in (2, 3):
            raise PretrainedFileError(f"{file}: n_dims of {where} is {state['n_dims']:,}; 2 or 3 is needed.")
    return registry


def _distinct(names: list[Any], kinds: type | tuple[type, ...], where: str) -> np.ndarray:
    """Names of genes or of the categories of a column of ``obs``."""
    odd = [name for name in names if not isinstance(name, kinds)]
    if odd:
        raise PretrainedFileError(f"{where} holds a value {quoted(odd[0])}, which is no name.")
    if len(set(names)) < len(names):
        raise PretrainedFileError(f"{where} has a name more than once.")
    return np.asarray(names, dtype=object)
