"""Reads the tensors of a published checkpoint without running anything that it contains."""

from __future__ import annotations

import pickletools
import re
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ._errors import PretrainedFileError, listed, quoted

WEIGHTS_KEY = "model_state_dict"
DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
MAX_ENTRIES = 100_000
#: names and shapes; the values of tensors lie beside it
MAX_PICKLE_BYTES = 64 * 2**20
#: what ``DistributedDataParallel`` puts before each key
PARALLEL_PREFIX = "module."

#: what the pickle of plain tensors by name calls
ALLOWED_CALLS = {"collections OrderedDict", "torch._utils _rebuild_tensor_v2", "torch._utils _rebuild_parameter"}
_STORAGE = re.compile(r"torch \w+Storage")
#: instructions of a pickle that import; torch.save writes the first of them only
IMPORTS = ("GLOBAL", "STACK_GLOBAL", "INST", "OBJ", "NEWOBJ", "NEWOBJ_EX", "EXT1", "EXT2", "EXT4")


@dataclass(frozen=True)
class ReadCheckpoint:
    """Tensors by key, as they were stored, and the names of what else the file holds."""

    tensors: dict[str, Tensor]
    others: list[str]
    notes: list[str]


def read_checkpoint(path: Path) -> ReadCheckpoint:
    """Read a ``PREFIX.best.ckpt``.

    Raises
    ------
    PretrainedFileError
        If it is truncated, corrupt, holds anything but tensors, or would have to run code to be read.
    """
    check_archive(path)
    try:
        # mapped, so that no storage can claim to be larger than the file
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:  # noqa: BLE001 - a damaged file may lead to any error of its parser
        raise PretrainedFileError(f"{path.name} is corrupt: {str(error)[:200] or type(error).__name__}") from None
    if not isinstance(content, Mapping) or WEIGHTS_KEY not in content:
        what = f"has the entries {listed(content)}" if isinstance(content, Mapping) else f"is {quoted(content)}"
        raise PretrainedFileError(f'{path.name} {what}; a published checkpoint has "{WEIGHTS_KEY}".')
    tensors = content[WEIGHTS_KEY]
    if not isinstance(tensors, Mapping) or not tensors:
        raise PretrainedFileError(f'{path.name}: "{WEIGHTS_KEY}" is {quoted(tensors)}; tensors by name are needed.')
    for key, tensor in tensors.items():
        _check_tensor(key, tensor, path.name)
    notes = []
    if all(key.startswith(PARALLEL_PREFIX) for key in tensors):
        tensors = {key.removeprefix(PARALLEL_PREFIX): tensor for key, tensor in tensors.items()}
        notes.append(f'keys were read without their prefix "{PARALLEL_PREFIX}"')
    others = [quoted(key).strip('"') for key in content if key != WEIGHTS_KEY]
    return ReadCheckpoint(dict(tensors), others, notes)


def check_archive(path: Path) -> None:
    """Raise unless the file is an intact archive of uncompressed parts, as ``torch.save`` writes it."""
    size = path.stat().st_size
    if not zipfile.is_zipfile(path):
        raise PretrainedFileError(
            f"{path.name} ({size:,} bytes) is not an archive as torch.save writes it: it is truncated, not a checkpoint, or "
            "of a version of torch before 1.6 (load it there and save it again)."
        )
    try:
        with zipfile.ZipFile(path) as archive:
            parts = archive.infolist()
            if len(parts) > MAX_ENTRIES or any(p.compress_type != zipfile.ZIP_STORED for p in parts):
                raise PretrainedFileError(f"{path.name} is a compressed archive; torch.save writes uncompressed ones.")
            if sum(part.file_size for part in parts) > size:
                raise PretrainedFileError(f"{path.name} claims to hold more than its {size:,} bytes: it is corrupt.")
            damaged = archive.testzip()
            pickles = [part for part in parts if part.filename.lower().endswith(".pkl")]
            if any(part.file_size > MAX_PICKLE_BYTES for part in pickles):
                raise PretrainedFileError(f"{path.name} holds a pickle of an implausible size.")
            called = [name for part in pickles for name in _calls(archive.read(part))]
    except PretrainedFileError:
        raise
    except Exception as error:  # noqa: BLE001 - as above
        raise PretrainedFileError(f"{path.name} is corrupt: {str(error)[:200] or type(error).__name__}") from None
    if damaged is not None:
        raise PretrainedFileError(f'{path.name} is corrupt: its part "{damaged[:60]}" fails its checksum.')
    refused = [name for name in called if name not in ALLOWED_CALLS and not _STORAGE.fullmatch(name)]
    if refused:
        raise PretrainedFileError(
            f"{path.name} is refused: to read it, {quoted(refused[0].replace(' ', '.'))} would have to be run, and only plain "
            "dense tensors are read. If you trust its origin, open it with torch yourself and save "
            f'{{"{WEIGHTS_KEY}": state_dict}} anew.'
        )


def _calls(pickled: bytes) -> list[str]:
    """Names that a pickle imports, found without running it."""
    return [
        str(argument) if opcode.name == "GLOBAL" else opcode.name
        for opcode, argument, _ in pickletools.genops(pickled)
        if opcode.name in IMPORTS
    ]


def _check_tensor(key: Any, tensor: Any, file: str) -> None:
    """Raise unless a value is a plain dense tensor that its storage really holds."""
    if not isinstance(key, str):
        raise PretrainedFileError(f"{file}: a key is {quoted(key)}; names are needed.")
    if not isinstance(tensor, Tensor):
        raise PretrainedFileError(f"{file}: {quoted(key)} is {quoted(tensor)}; a tensor is needed.")
    if tensor.layout != torch.strided or tensor.device.type != "cpu" or tensor.is_quantized or tensor.is_nested:
        raise PretrainedFileError(f"{file}: {quoted(key)} is not a plain dense tensor.")
    if tensor.dtype not in DTYPES:
        raise PretrainedFileError(f"{file}: {quoted(key)} holds {tensor.dtype}; floating-point weights are needed.")
    if tensor.numel() * tensor.element_size() > tensor.untyped_storage().nbytes():
        raise PretrainedFileError(f"{file}: {quoted(key)} claims more values than the file holds.")


def finite_float32(key: str, tensor: Tensor, file: str) -> Tensor:
    """The values as float32, in memory of their own; raise if one is missing or infinite."""
    values = tensor.detach().to(torch.float32, copy=True).contiguous()
    bad = int((~torch.isfinite(values)).sum())
    if bad:
        raise PretrainedFileError(f"{file}: {quoted(key)} has {bad:,} missing or infinite values.")
    return values
