"""What of a published configuration shapes the network and its objective."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, Literal, Self, get_args, get_origin, get_type_hints

import torch
from torch import Tensor, nn

PublishedNorm = Literal["groupnorm", "layernorm", "rmsnorm", "none"]
PublishedLatentKind = Literal["gmvae", "vae", "ae"]
PublishedHead = Literal["annotation", "embedder"]
PublishedObjective = Literal["nb", "imputation"]

#: groups of the published GroupNorm
NORM_GROUPS = 4


@dataclass(frozen=True)
class PublishedConfig:
    """The entries of a published ``PREFIX.config.json`` that the network depends on, under our names.

    Parameters
    ----------
    n_genes
        Length of ``gene_list``.
    n_hidden, n_layers, n_heads
        ``enc_hid``, ``enc_layers``, ``enc_head``.
    n_latent, latent, n_components
        ``post_latent_dim``, ``latent_mod``, ``num_clusters``.
    n_decoder_hidden, n_decoder_layers
        ``dec_hid`` and ``dec_layers``; the last of the layers is the output.
    n_batches, n_datasets, n_platforms
        ``batch_num``, ``dataset_num``, ``platform_num``; 0 where the decoder does not know the covariate.
    dropout_rate, norm
        ``model_dropout``, ``norm``.
    head
        ``head_type``: a head takes the place of the decoder.
    n_outputs
        ``out_dim``: genes, or classes of an annotation head.
    has_position
        Whether there is a position code (``pe_type``), which is built but never enters the published model.
    cell_mask_rate, gene_mask_rate
        ``mask_node_rate``, ``mask_feature_rate``.
    objective, dae
        Likelihood, and whether it is counted once more over the masked entries.
    latent_floor, weight_gaussian, weight_categorical
        ``lamda``, ``w_li``, ``w_en``.
    """

    n_genes: int
    n_hidden: int
    n_layers: int
    n_latent: int
    n_decoder_hidden: int
    n_decoder_layers: int
    n_outputs: int
    n_heads: int = 8
    latent: PublishedLatentKind = "vae"
    n_components: int = 16
    n_batches: int = 0
    n_datasets: int = 0
    n_platforms: int = 0
    dropout_rate: float = 0.1
    norm: PublishedNorm = "layernorm"
    head: PublishedHead | None = None
    has_position: bool = True
    cell_mask_rate: float = 0.5
    gene_mask_rate: float = 0.8
    objective: PublishedObjective = "nb"
    dae: bool = True
    latent_floor: float = 0.5
    weight_gaussian: float = 1.0
    weight_categorical: float = 1.0

    @property
    def covariates(self) -> dict[str, int]:
        """Number of categories of each covariate of the decoder, in the order in which they are added."""
        sizes = {"batch": self.n_batches, "dataset": self.n_datasets, "platform": self.n_platforms}
        return {name: n for name, n in sizes.items() if n > 0}

    @property
    def has_decoder(self) -> bool:
        """Whether the network decodes to genes."""
        return self.head is None

    def to_dict(self) -> dict[str, Any]:
        """As plain values, for JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """Inverse of :meth:`to_dict`; raise ValueError on anything else."""
        hints = get_type_hints(cls)
        unknown = [name for name in values if name not in hints]
        if unknown:
            raise ValueError(f"unknown entries in the configuration: {', '.join(map(str, unknown[:3]))}")
        for field in fields(cls):
            if field.name in values and not _is_a(values[field.name], hints[field.name]):
                raise ValueError(f"{field.name}={str(values[field.name])[:60]} is not {field.type}")
        try:
            return cls(**values)
        except TypeError as error:
            raise ValueError(f"incomplete configuration: {error}") from None


def _is_a(value: object, hint: Any) -> bool:
    """Whether a value is of the plain type or one of the words of an annotation; sizes are not negative."""
    if hint is int:
        return type(value) is int and value >= 0  # type: ignore[operator]
    if hint is float:
        return type(value) in (int, float)
    if hint is bool:
        return type(value) is bool
    if get_origin(hint) is Literal:
        return isinstance(value, str) and value in get_args(hint)
    return any(value is None if arg is type(None) else _is_a(value, arg) for arg in get_args(hint))


class RMSNorm(nn.RMSNorm):
    """Root-mean-square norm with the published epsilon."""

    def __init__(self, n_hidden: int):
        super().__init__(n_hidden, eps=1e-6)


class GroupNorm(nn.GroupNorm):
    """Group norm of rows, computed as a layer norm of each group, whose backward pass is far quicker on a CPU."""

    def __init__(self, n_hidden: int):
        super().__init__(NORM_GROUPS, n_hidden)

    def forward(self, x: Tensor) -> Tensor:
        groups = x.unflatten(-1, (self.num_groups, -1))
        normed = nn.functional.layer_norm(groups, groups.shape[-1:], eps=self.eps)
        return torch.addcmul(self.bias, normed.flatten(-2), self.weight)


def published_norm(kind: PublishedNorm, n_hidden: int) -> nn.Module:
    """The norm for a word."""
    match kind:
        case "groupnorm":
            return GroupNorm(n_hidden)
        case "layernorm":
            return nn.LayerNorm(n_hidden)
        case "rmsnorm":
            return RMSNorm(n_hidden)
        case "none":
            return nn.Identity()
