"""Keys under which data are registered, and under which they travel in a minibatch."""

from __future__ import annotations

from typing import Final

from scvi import REGISTRY_KEYS

X_KEY: Final = REGISTRY_KEYS.X_KEY
BATCH_KEY: Final = REGISTRY_KEYS.BATCH_KEY
LABELS_KEY: Final = REGISTRY_KEYS.LABELS_KEY
SAMPLE_KEY: Final = REGISTRY_KEYS.SAMPLE_KEY
SIZE_FACTOR_KEY: Final = REGISTRY_KEYS.SIZE_FACTOR_KEY
PLATFORM_KEY: Final = "platform"
DATASET_KEY: Final = "dataset"
PERTURBATION_KEY: Final = "perturbation"
COORDINATES_KEY: Final = "coordinates"
MEASURED_GENES_KEY: Final = "measured_genes"

#: covariates of the decoder, in the order in which they are added
COVARIATES: Final = (BATCH_KEY, PLATFORM_KEY, DATASET_KEY)
