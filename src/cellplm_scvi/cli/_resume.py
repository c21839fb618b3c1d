"""What has to be the same for a run that was stopped to go on."""

from __future__ import annotations

import json
from collections.abc import Mapping
from hashlib import blake2b
from typing import Any

import torch

from cellplm_scvi import _constants as c
from cellplm_scvi.data._vocabulary import ORGANISM_KEY
from cellplm_scvi.model import CellPLM


def changes(begun: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    """Each entry that is no longer what it was, in words; empty if there is none."""
    return "; ".join(
        f"{name} was {json.dumps(begun.get(name))}, is {json.dumps(value)}"
        for name, value in now.items()
        if begun.get(name) != value
    )


def model_checksum(network: CellPLM) -> str:
    """Of all that an embedding depends on: weights, arguments, genes and how their names are matched."""
    fields = network.registry_["field_registries"]
    counts = fields[c.X_KEY]["state_registry"]
    described = [
        type(network).__name__,
        {name: value for name, value in network.init_params_["non_kwargs"].items() if value is not None},
        network.module.max_context,
        list(counts["column_names"]),
        counts.get(ORGANISM_KEY),
        [key for key in (c.COORDINATES_KEY, c.SIZE_FACTOR_KEY) if key in fields],
    ]
    digest = blake2b(json.dumps(described, default=str, sort_keys=True).encode(), digest_size=8)
    for name, tensor in network.module.state_dict().items():
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return f"checksum {digest.hexdigest()}"
