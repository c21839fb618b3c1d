"""From AnnData to minibatches of whole samples."""

from ._corpus import Corpus
from ._corpus_build import build_corpus
from ._corpus_source import Source
from ._datasets import pbmc
from ._panels import concat_panels
from ._splitter import SampleSplitter
from ._streaming import CorpusDataModule
from ._synthetic import synthetic_tissues, true_shares

__all__ = [
    "Corpus",
    "CorpusDataModule",
    "SampleSplitter",
    "Source",
    "build_corpus",
    "concat_panels",
    "pbmc",
    "synthetic_tissues",
    "true_shares",
]
