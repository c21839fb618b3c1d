"""Finds the model that a command names."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from cellplm_scvi.model import CellPLM


def load_model(name: str | Path, **options: Any) -> CellPLM:
    """A model of a folder, of published files or of the hub, by :meth:`CellPLM.from_pretrained`.

    Raises
    ------
    FileNotFoundError
        If there is none; a path whose parent folder is here is not asked of the hub.
    """
    try:
        return CellPLM.from_pretrained(name, **options)
    except (ConnectionError, FileNotFoundError) as error:
        if Path(name).expanduser().exists():
            raise
        raise FileNotFoundError(f'There is no folder "{name}". {error}') from error
