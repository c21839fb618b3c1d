"""The command ``cellplm``, and the same from Python: pre-training and embedding of corpora."""

from ._embed import embed
from ._main import main
from ._presets import PRESETS
from ._pretrain import pretrain

__all__ = ["PRESETS", "embed", "main", "pretrain"]
