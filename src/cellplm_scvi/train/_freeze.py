"""Which parts of a model training leaves as they are."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Literal, get_args

from torch import nn

if TYPE_CHECKING:
    from cellplm_scvi.module import CellPLMModule

Freeze = Literal["embedder", "encoder", "backbone", "reference"]


@contextmanager
def frozen(module: CellPLMModule, freeze: Freeze | None) -> Iterator[None]:
    """Freeze parts of a module while the context lasts.

    Frozen parameters have ``requires_grad=False``: no optimiser and no distributed wrapper takes them up. Frozen parts are in
    evaluation mode (no dropout); with the backbone frozen that is the whole module, so that no gene is masked either and
    the decoder meets the embedding that users get.

    Parameters
    ----------
    module
        The module.
    freeze
        ``"embedder"``: gene embedder and position code. ``"encoder"``: these and the encoder's layers. ``"backbone"``:
        everything but the decoder's contributions of categories and its output weights, biases and dispersions of genes (and
        a head). ``"reference"``: everything but the contributions of the categories that were added last.

    Raises
    ------
    ValueError
        If that is not one of these words, or if nothing is left to train.
    """
    trained = None if freeze is None else _trained(module, freeze)
    held = [] if trained is None else [p for p in module.parameters() if p.requires_grad and id(p) not in trained]
    if len(held) == sum(p.requires_grad for p in module.parameters()):
        raise ValueError(f"Nothing is left to train{f' with freeze="{freeze}"' if freeze else ''}.")
    for parameter in held:
        parameter.requires_grad_(False)
    module.resting = () if freeze is None else tuple(_resting(module, freeze))
    try:
        with warnings.catch_warnings():
            if module.resting:  # as is meant here
                warnings.filterwarnings("ignore", message=r"Found \d+ module\(s\) in eval mode")
            yield
    finally:
        module.resting = ()
        for parameter in held:
            parameter.requires_grad_(True)


def _resting(module: CellPLMModule, freeze: Freeze) -> list[nn.Module]:
    embedder: list[nn.Module | None] = [module.embedder, module.position]
    parts = {"embedder": embedder, "encoder": [*embedder, module.encoder]}
    return [part for part in parts.get(freeze, [module]) if part is not None]


def _trained(module: CellPLMModule, freeze: Freeze) -> set[int]:
    """Identities of the parameters that train."""
    if freeze not in get_args(Freeze):
        raise ValueError(f'freeze="{freeze}" is not one of {", ".join(map(repr, get_args(Freeze)))} and None.')
    if freeze == "reference":
        return set(map(id, module.newest_codes()))
    if freeze == "backbone":
        heads = [head for name in ("head", "annotation") if (head := getattr(module, name, None)) is not None]
        surface = [p for decoder in module.decoders for p in decoder.surface()]
        return set(map(id, surface + [p for head in heads for p in head.parameters()]))
    resting = {id(p) for part in _resting(module, freeze) for p in part.parameters()}
    return {id(p) for p in module.parameters()} - resting
