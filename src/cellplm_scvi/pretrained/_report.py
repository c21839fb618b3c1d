"""What became of each entry of a pre-trained model's files."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any


@dataclass(frozen=True)
class PretrainedReport:
    """Where the weights of a model come from, and what of the files was used.

    Parameters
    ----------
    source
        Path, or name on the hub.
    format
        ``"published"`` or ``"cellplm-scvi"``.
    used
        Parameter of this model that each key of the checkpoint went to.
    unused
        Why each other key was not used.
    config_used, config_unused
        Entries of the configuration that shape the model, with their values; and the others.
    notes
        What else a user may want to know.
    genes
        How the genes of the AnnData matched: numbers by kind of name, and the share of counts covered; ``None`` without an
        AnnData.
    """

    source: str
    format: str
    used: dict[str, str]
    unused: dict[str, str] = field(default_factory=dict)
    config_used: dict[str, Any] = field(default_factory=dict)
    config_unused: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    genes: Mapping[str, Any] | None = None

    def to_dict(self) -> dict[str, Any]:
        """As plain values."""
        return asdict(self)

    def __str__(self) -> str:
        lines = [f"{self.format} model from {self.source}", f"  {len(self.used):,} keys of the checkpoint used"]
        for reason in dict.fromkeys(self.unused.values()):
            keys = [key for key, why in self.unused.items() if why == reason]
            lines.append(
                f"  {len(keys):,} not used ({reason}): {', '.join(keys[:3])}{', ...' if len(keys) > 3 else ''}"
            )
        if self.config_unused:
            lines.append(f"  entries of the configuration without effect: {', '.join(self.config_unused)}")
        lines += [f"  {note}" for note in self.notes]
        if self.genes is not None:
            lines.append(f"  {self.genes['summary']}")
        return "\n".join(lines)
