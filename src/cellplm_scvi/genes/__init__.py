"""Translate gene identifiers offline, with the tables that ship beside this file."""

from ._mapping import GeneMapping, map_genes, to_ensembl, to_symbol

__all__ = ["GeneMapping", "map_genes", "to_ensembl", "to_symbol"]
