"""Matches the genes of an AnnData to the vocabulary of a pre-trained model: by name, else by what the names mean."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import pandas as pd
import scipy.sparse as sp

from cellplm_scvi.genes import map_genes

from ._checks import CHUNK_ROWS, some, warn

#: in the registry of counts: the organism whose gene names are translated; absent: names are compared as they are
ORGANISM_KEY = "organism"
#: in the registry of counts: how the genes of the data matched
MATCH_KEY = "gene_match"
#: in the registry of counts: the number of genes that the data had when they were set up, if the model is of others
N_GIVEN_KEY = "n_given"
#: in the registry of counts: for arguments of the set-up, the keys that the model had before this one, the latest first
EARLIER_KEY = "earlier_keys"
#: what in the registry of counts belongs to one AnnData
OF_DATA = (MATCH_KEY, N_GIVEN_KEY)
#: in the registry of a covariate: the model's categories have no names that data could share
UNNAMED_KEY = "unnamed"
#: below this share of counts covered, or of the vocabulary matched, new data get a warning
MIN_COUNTS_COVERED = 0.5
MIN_GENES_MATCHED = 0.01

#: kinds of match, the surest first
KINDS = ("name", "ensembl_id", "symbol", "previous", "alias")

logger = logging.getLogger("scvi.cellplm_scvi")


@dataclass(frozen=True)
class GeneMatch:
    """Which gene of the vocabulary each given gene is.

    Parameters
    ----------
    columns
        Place in the vocabulary of each given gene, -1 for none, (n_given,).
    by
        Number of genes matched by each kind of name.
    second
        Given genes whose place in the vocabulary a surer name (or a shorter one) took.
    """

    columns: np.ndarray
    by: dict[str, int]
    second: list[str]

    @property
    def n_matched(self) -> int:
        return int((self.columns >= 0).sum())


def gene_columns(state: Mapping[str, Any], given: pd.Index) -> np.ndarray:
    """Place in the model of each given gene, -1 for none, (n_given,); ``state`` is the registry of counts."""
    genes = pd.Index(state["column_names"])
    organism = state.get(ORGANISM_KEY)
    return genes.get_indexer(given) if organism is None else match_genes(genes, given, organism).columns


def match_genes(vocabulary: pd.Index, given: pd.Index, organism: str = "human") -> GeneMatch:
    """Match gene names with those of a vocabulary.

    A name that the vocabulary has is that gene; else Ensembl ids (versions ignored), approved symbols, previous symbols
    and unambiguous aliases are compared by the gene that they mean, see :func:`cellplm_scvi.genes.map_genes`. Of several
    names of one gene the surest counts, then the shortest (``"CD99"`` before ``"CD99-1"``), whatever their order.
    """
    return _match(tuple(map(str, vocabulary)), tuple(map(str, given)), organism)


@lru_cache(maxsize=8)
def _match(vocabulary: tuple[str, ...], given: tuple[str, ...], organism: str) -> GeneMatch:
    columns = pd.Index(vocabulary).get_indexer(pd.Index(given)).astype(np.int64)
    kind = np.where(columns >= 0, 0, len(KINDS))
    rest = np.flatnonzero(columns < 0)
    if rest.size:
        places = _places(vocabulary)
        mapping = map_genes([given[n] for n in rest], organism=organism)  # type: ignore[arg-type]
        for n, target, how in zip(rest, mapping.mapped, mapping.how, strict=True):
            place = places.get(target, -1) if isinstance(target, str) else -1
            if place >= 0 and how in KINDS:
                columns[n], kind[n] = place, KINDS.index(how)
    taken: set[int] = set()
    second = []
    for place in sorted(range(len(given)), key=lambda n: (kind[n], len(given[n]), given[n])):
        if columns[place] < 0:
            continue
        if columns[place] in taken:
            second.append(given[place])
            columns[place], kind[place] = -1, len(KINDS)
        taken.add(int(columns[place]))
    by = {name: int((kind == k).sum()) for k, name in enumerate(KINDS) if (kind == k).any()}
    return GeneMatch(columns, by, second)


@lru_cache(maxsize=8)
def _places(vocabulary: tuple[str, ...]) -> dict[str, int]:
    """Place of each Ensembl id in the vocabulary: of the name that means it most surely, if that is a single one."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        mapping = map_genes(vocabulary)
    # "Ccl3", which a mouse data set brought in, reads as a human gene: it takes nothing from that gene's own id
    places: dict[str, int] = {}
    sure: dict[str, int] = {}
    for place, (gene, how) in enumerate(zip(mapping.mapped, mapping.how, strict=True)):
        if not isinstance(gene, str) or how not in KINDS:
            continue
        rank = KINDS.index(how)
        if rank < sure.get(gene, len(KINDS)):
            places[gene], sure[gene] = place, rank
        elif rank == sure[gene]:
            places[gene] = -1
    return places


def report_match(vocabulary: pd.Index, given: pd.Index, x: object, organism: str) -> dict[str, Any]:
    """Say how genes matched and what share of the counts they cover; raise if none does.

    Parameters
    ----------
    vocabulary
        Genes of the model.
    given
        Genes of the data.
    x
        Counts, (n_cells, n_given).
    organism
        Whose gene names ``given`` are.
    """
    match = match_genes(vocabulary, given, organism)
    if match.n_matched == 0:
        raise ValueError(
            f"None of the {len(given):,} genes of this AnnData (such as {some(given)}) is among the model's "
            f"{len(vocabulary):,} genes (such as {some(vocabulary)}), neither by name nor through their Ensembl ids. "
            'Put gene symbols or Ensembl ids in var_names; for mouse genes pass organism="mouse".'
        )
    totals = _gene_totals(x)
    covered = float(totals[match.columns >= 0].sum() / totals.sum()) if totals.any() else 1.0
    names = ", ".join(f"{n:,} by {name.replace('_', ' ')}" for name, n in match.by.items())
    summary = (
        f"{match.n_matched:,} of the {len(given):,} genes match the model's {len(vocabulary):,} ({names}); they hold "
        f"{covered:.1%} of the counts."
    )
    if match.second:
        summary += f" {len(match.second):,} further names of the same genes are not used ({some(match.second)})."
    if covered < MIN_COUNTS_COVERED or match.n_matched < MIN_GENES_MATCHED * len(vocabulary):
        unknown = given[(match.columns < 0) & ~given.isin(match.second)]
        warn(f"{summary} Results may be poor." + (f" Unknown genes are {some(unknown)}." if len(unknown) else ""))
    else:
        logger.info(summary)
    return {"matched": match.n_matched, **match.by, "counts_covered": covered, "summary": summary}


def _gene_totals(x: Any) -> np.ndarray:
    """Counts of each gene, (n_genes,)."""
    if sp.issparse(x):
        return np.asarray(x.sum(0, dtype=np.float64)).ravel()
    if not hasattr(x, "dtype") or x.shape[0] == 0:
        return np.zeros(x.shape[1])
    starts = range(0, x.shape[0], CHUNK_ROWS)
    return sum(np.asarray(x[n : n + CHUNK_ROWS].sum(0, dtype=np.float64)).ravel() for n in starts)  # type: ignore[return-value]
