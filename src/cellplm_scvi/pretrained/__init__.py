"""Files of pre-trained models: the published format, our own, and where they come from."""

from ._checkpoint import read_checkpoint
from ._config import read_config
from ._errors import PretrainedFileError
from ._hub import model_card
from ._own import OwnCheckpoint, read_own, write_own
from ._published import PublishedCheckpoint, load_network, read_published
from ._report import PretrainedReport
from ._resolve import PretrainedFiles, resolve

__all__ = [
    "OwnCheckpoint",
    "PretrainedFileError",
    "PretrainedFiles",
    "PretrainedReport",
    "PublishedCheckpoint",
    "load_network",
    "model_card",
    "read_checkpoint",
    "read_config",
    "read_own",
    "read_published",
    "resolve",
    "write_own",
]
