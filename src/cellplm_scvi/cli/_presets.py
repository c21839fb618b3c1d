"""Configurations by name."""

from __future__ import annotations

from typing import Any, Final

#: arguments of the model, and of the run where they differ from its defaults
PRESETS: Final[dict[str, dict[str, Any]]] = {
    # sizes of the published model, and of its training
    "85m": {
        "model": {
            "n_hidden": 1024,
            "n_layers": 4,
            "n_heads": 8,
            "n_latent": 512,
            "n_components": 16,
            "n_decoder_layers": 2,
            "dropout_rate": 0.2,
        },
        "run": {"lr": 2e-4, "batch_size": 2000},
    },
    "medium": {
        "model": {"n_hidden": 512, "n_layers": 4, "n_heads": 8, "n_latent": 128, "n_decoder_layers": 2},
        "run": {"lr": 3e-4, "batch_size": 2048},
    },
    "small": {
        "model": {"n_hidden": 256, "n_layers": 2, "n_heads": 4, "n_latent": 64},
        "run": {"lr": 1e-3, "batch_size": 1024},
    },
    "tiny": {
        "model": {"n_hidden": 64, "n_layers": 2, "n_heads": 2, "n_latent": 16},
        "run": {"lr": 1e-3, "batch_size": 512},
    },
}
