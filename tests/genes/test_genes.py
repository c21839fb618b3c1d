"""Translation of gene names: what may be translated is right, the rest is named."""

import importlib
import sys
from pathlib import Path

import anndata as ad
import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cellplm_scvi.genes import map_genes, to_ensembl, to_symbol
from cellplm_scvi.genes._build import human_table, mouse_table, write_table
from cellplm_scvi.genes._tables import HUMAN_COLUMNS, HUMAN_FILE, MOUSE_COLUMNS, MOUSE_FILE, _rows, gene_table

HGNC = pd.DataFrame(_rows(HUMAN_FILE, HUMAN_COLUMNS), columns=list(HUMAN_COLUMNS))
MOUSE = pd.DataFrame(_rows(MOUSE_FILE, MOUSE_COLUMNS), columns=list(MOUSE_COLUMNS))
WITH_ID = HGNC[(HGNC["ensembl_gene_id"] != "") & ~HGNC["ensembl_gene_id"].duplicated(keep=False)]
OLD_NAMES = sorted(
    {name for names in HGNC["prev_symbol"] + "|" + HGNC["alias_symbol"] for name in names.split("|")} - {""}
)

approved = st.sampled_from(WITH_ID["symbol"].tolist())
old = st.sampled_from(OLD_NAMES)
any_name = st.one_of(approved, old, st.text(max_size=8), st.none())


def test_every_approved_symbol_round_trips():
    mapping = map_genes(WITH_ID["symbol"])
    assert mapping.mapped.tolist() == WITH_ID["ensembl_gene_id"].tolist()
    assert set(mapping.how) == {"symbol"}
    assert to_symbol(mapping.mapped).tolist() == WITH_ID["symbol"].tolist()


@pytest.mark.parametrize(
    ("name", "symbol", "how"),
    [
        pytest.param("TP53", "TP53", "symbol", id="approved"),
        pytest.param("KIAA0391", "PRORP", "previous", id="previous"),
        pytest.param("p53", "TP53", "alias", id="alias"),
        pytest.param("ENSG00000141510", "TP53", "ensembl_id", id="Ensembl"),
        pytest.param("ENSG00000141510.18", "TP53", "ensembl_id", id="Ensembl-version"),
        pytest.param("ENSG00000141510.18_PAR_Y", "TP53", "ensembl_id", id="Ensembl-PAR"),
        pytest.param("ENSG00000141510-1", "TP53", "ensembl_id", id="Ensembl-made-unique"),
        pytest.param("ensg00000141510", "TP53", "ensembl_id", id="Ensembl-lower-case"),
        pytest.param("  TP53\t", "TP53", "symbol", id="blanks"),
        pytest.param("tp53", "TP53", "symbol", id="lower-case"),
        pytest.param("C1ORF112", "FIRRM", "previous", id="upper-case"),
        pytest.param("MATR3-1", "MATR3", "symbol", id="made-unique-by-AnnData"),
        pytest.param("MATR3.1", "MATR3", "symbol", id="made-unique-by-R"),
        pytest.param("KIAA0391.1", "PRORP", "previous", id="previous-made-unique"),
        pytest.param("NKX2-1", "NKX2-1", "symbol", id="approved-with-number"),
        # SEPT2 is an alias of SEPTIN6 too, but was the approved symbol of SEPTIN2
        pytest.param("SEPT2", "SEPTIN2", "previous", id="previous-wins-over-alias"),
    ],
)
def test_how_a_name_is_found(name, symbol, how):
    mapping = map_genes([name], "symbol")
    assert (mapping.mapped.iloc[0], mapping.how.iloc[0]) == (symbol, how)
    assert mapping.mapped.index.tolist() == [name]
    assert to_ensembl([name]).iloc[0] == to_ensembl([symbol]).iloc[0]


def test_approved_symbol_wins_over_old_names_of_other_genes():
    """Hundreds of approved symbols are also an old name of another gene."""
    contested = HGNC[HGNC["symbol"].isin(OLD_NAMES)]["symbol"]
    assert len(contested) > 100
    mapping = map_genes(contested, "symbol")
    assert mapping.mapped.tolist() == contested.tolist()
    assert not mapping.ambiguous


@settings(deadline=None)  # the first example reads the tables
@given(name=old)
def test_an_old_name_is_translated_to_a_gene_that_had_it_or_not_at_all(name):
    mapping = map_genes([name], "symbol")
    symbol = mapping.mapped.iloc[0]
    bearers = {
        column: {
            row.symbol
            for row in HGNC[HGNC[column].str.contains(name, regex=False)].itertuples()
            if name in getattr(row, column).split("|")
        }
        for column in ("prev_symbol", "alias_symbol")
    }
    if name in set(HGNC["symbol"]):
        assert symbol == name
    elif pd.notna(symbol):
        assert {symbol} == (bearers["prev_symbol"] or bearers["alias_symbol"])
    else:
        assert bearers["prev_symbol"] | bearers["alias_symbol"] <= set(mapping.ambiguous[name])


def test_names_of_several_genes_are_listed_and_not_translated():
    # C11orf48 was split in two; Cad is an alias of one gene and, but for its case, the symbol of another
    mapping = map_genes(["TP53", "C11orf48", "Cad"])
    assert {name: sorted(genes) for name, genes in mapping.ambiguous.items()} == {
        "C11orf48": ["C11orf98", "LBHD1"],
        "Cad": ["B4GALNT2", "CAD"],
    }
    assert mapping.mapped.isna().tolist() == [False, True, True]
    assert mapping.unknown == []


def test_an_ensembl_id_of_two_genes_is_ambiguous_as_a_symbol_only():
    shared = HGNC.loc[(HGNC["ensembl_gene_id"] != "") & HGNC["ensembl_gene_id"].duplicated(), "ensembl_gene_id"].iloc[0]
    assert len(map_genes([shared], "symbol").ambiguous[shared]) == 2
    assert to_ensembl([shared]).tolist() == [shared]


def test_gene_without_ensembl_id_is_told_apart_from_an_unknown_one():
    without = HGNC.loc[HGNC["ensembl_gene_id"] == "", "symbol"].iloc[0]
    mapping = map_genes([without])
    assert mapping.how.tolist() == ["no_ensembl_id"]
    assert mapping.unknown == []
    assert to_symbol([without]).tolist() == [without]


def test_unknown_and_missing_names_are_listed_once_in_order():
    mapping = map_genes(
        ["zzz", None, "TP53", float("nan"), "", "zzz", pd.NA, "ENSMUSG00000059552", "XYZ-1", "U73166.2"]
    )
    assert mapping.unknown == ["zzz", None, "", "ENSMUSG00000059552", "XYZ-1", "U73166.2"]
    assert mapping.mapped.notna().sum() == 1
    assert (mapping.how != "unknown").tolist() == mapping.mapped.notna().tolist()


def test_an_ensembl_id_that_hgnc_lacks_stays_an_ensembl_id():
    assert to_ensembl(["ENSG00000999999.3"]).tolist() == ["ENSG00000999999"]
    assert map_genes(["ENSG00000999999.3"], "symbol").unknown == ["ENSG00000999999.3"]


@settings(deadline=None)  # the first example reads the tables
@given(names=st.lists(any_name, max_size=12), target=st.sampled_from(["ensembl", "symbol"]))
def test_results_are_aligned_with_the_names_whatever_their_order(names, target):
    mapping = map_genes(names, target)
    assert [None if pd.isna(name) else name for name in mapping.mapped.index] == names
    assert mapping.how.index.equals(mapping.mapped.index)
    # each name has the result that it has on its own
    for name, value, how in zip(names, mapping.mapped, mapping.how, strict=True):
        alone = map_genes([name], target)
        assert (how, pd.isna(value)) == (alone.how.iloc[0], alone.mapped.isna().iloc[0])
        assert pd.isna(value) or value == alone.mapped.iloc[0]
    # every name without a target is accounted for
    listed = set(mapping.unknown) | set(mapping.ambiguous)
    assert {name for name, how in zip(names, mapping.how, strict=True) if how in ("unknown", "ambiguous")} == listed


@settings(deadline=None)  # the first example reads the tables
@given(names=st.lists(any_name, max_size=6))
def test_translating_twice_changes_nothing(names):
    once = map_genes(names, "symbol").mapped.dropna().tolist()
    assert map_genes(once, "symbol").mapped.tolist() == once


@pytest.mark.parametrize("container", [list, tuple, pd.Index, pd.Series, pd.Categorical, np.array, iter])
def test_any_container_of_names(container):
    names = ["CD3E", "TP53", "CD3E"]
    assert to_ensembl(container(names)).tolist() == ["ENSG00000198851", "ENSG00000141510", "ENSG00000198851"]


def test_no_names():
    mapping = map_genes([])
    assert len(mapping.mapped) == len(mapping.how) == 0
    assert (mapping.ambiguous, mapping.unknown, mapping.collisions) == ({}, [], {})
    assert repr(mapping)


@pytest.mark.parametrize(
    ("names", "error", "message"),
    [
        pytest.param("TP53", TypeError, r"Pass a list of names: \['TP53'\]", id="string"),
        pytest.param(None, TypeError, "NoneType", id="None"),
        pytest.param(["TP53", 7], TypeError, r"names\[1\] is 7, of type int", id="number"),
        pytest.param([b"TP53"], TypeError, "bytes", id="bytes"),
        pytest.param(pd.DataFrame({"gene": ["TP53"]}), ValueError, r"\(1, 1\)", id="table"),
    ],
)
def test_errors_name_what_was_passed(names, error, message):
    with pytest.raises(error, match=message):
        to_ensembl(names)


@pytest.mark.parametrize("wrong", [{"target": "entrez"}, {"organism": "rat"}])
def test_words_are_checked(wrong):
    with pytest.raises(ValueError, match="is not one of"):
        map_genes(["TP53"], **wrong)


@pytest.mark.filterwarnings("error")
def test_warns_of_names_left_over_and_only_then():
    to_ensembl(["TP53", "SEPT2"])
    with pytest.warns(UserWarning, match=r"1 of 2 names have no Ensembl id, for example zzz\.") as record:
        to_ensembl(["TP53", "zzz"])
    assert record[0].filename == __file__


def test_warns_of_mouse_names():
    with pytest.warns(UserWarning, match='Pass organism="mouse"') as record:
        map_genes(["Cd3e", "Trp53", "Sox2"])
    assert record[0].filename == __file__


def test_mouse_names_give_human_orthologues():
    # the orthologue of Trp53 is not found by capital letters; trp53 differs in case alone
    mapping = map_genes(
        ["Cd3e", "Trp53", "trp53", "ENSMUSG00000059552.5", "Gm0", "ENSG00000141510"],
        "symbol",
        organism="mouse",
    )
    assert mapping.mapped.iloc[:4].tolist() == ["CD3E", "TP53", "TP53", "TP53"]
    assert mapping.how.tolist() == ["symbol"] * 3 + ["ensembl_id", "unknown", "unknown"]


def test_mouse_genes_with_several_orthologues_are_ambiguous():
    pairs = MOUSE[MOUSE["mouse_symbol"] != ""].groupby("mouse_symbol")["human_ensembl"].nunique()
    mapping = map_genes(pairs.index, organism="mouse")
    assert set(mapping.ambiguous) == set(pairs.index[pairs > 1])
    assert mapping.mapped.notna().tolist() == (pairs == 1).tolist()
    assert sorted(mapping.ambiguous["Cd8b1"]) == ["CD8B", "CD8B2"]


def test_names_of_the_same_gene_are_reported():
    mapping = map_genes(["MATR3", "MATR3-1", "TP53", "TP53", "no gene", None])
    assert mapping.collisions == {"ENSG00000015479": ["MATR3", "MATR3-1"]}


def test_summary_counts_and_names():
    text = repr(map_genes(["TP53", "CD3E", "SEPT2", "C11orf48", "zzz", "MATR3", "MATR3-1"]))
    assert "7 names to human Ensembl ids" in text
    assert "mapped: 5 (4 by symbol, 1 by previous)" in text
    assert "ambiguous: 1: C11orf48 (C11orf98 or LBHD1)" in text
    assert "unknown: 1: zzz" in text
    assert "same target: 1: MATR3/MATR3-1 (ENSG00000015479)" in text


def test_result_fits_into_an_anndata(tmp_path):
    adata = ad.AnnData(np.zeros((1, 3)), var=pd.DataFrame(index=["CD3E", "zzz", "TP53"]))
    adata.var["ensembl_id"] = map_genes(adata.var_names).mapped
    assert adata.var["ensembl_id"].iloc[[0, 2]].tolist() == ["ENSG00000198851", "ENSG00000141510"]
    adata.write_h5ad(tmp_path / "a.h5ad")
    assert ad.read_h5ad(tmp_path / "a.h5ad").var["ensembl_id"].isna().tolist() == [False, True, False]


def test_shipped_tables():
    assert len(HGNC) > 44_000
    assert HGNC["symbol"].is_unique
    ids = HGNC.loc[HGNC["ensembl_gene_id"] != "", "ensembl_gene_id"]
    assert ids.str.fullmatch(r"ENSG\d{11}").all()
    assert set(MOUSE["human_ensembl"]) <= set(ids)
    assert MOUSE["mouse_ensembl"].str.fullmatch(r"ENSMUSG\d{11}").all()
    assert gene_table("human") is gene_table("human")


def test_import_reads_no_table():
    gene_table.cache_clear()
    importlib.reload(sys.modules[map_genes.__module__])
    assert gene_table.cache_info().currsize == 0
    map_genes(["TP53"])
    assert gene_table.cache_info().currsize == 1


def test_tables_are_rebuilt_from_their_sources(tmp_path: Path):
    hgnc = pd.DataFrame(
        {
            "hgnc_id": ["HGNC:2", "HGNC:1", "HGNC:3"],
            "symbol": ["B", "A", "C"],
            "status": ["Approved", "Approved", "Entry Withdrawn"],
            "ensembl_gene_id": ["ENSG00000000002", None, "ENSG00000000003"],
            "prev_symbol": ["B1|B2", None, None],
            "alias_symbol": [None, '5"A', None],
        }
    )
    human = human_table(hgnc)
    assert human.to_numpy().tolist() == [["A", "", "", '5"A'], ["B", "ENSG00000000002", "B1|B2", ""]]
    orthologues = pd.DataFrame(
        {
            "Gene stable ID": ["ENSMUSG00000000001", "ENSMUSG00000000001", "ENSMUSG00000000002", "ENSMUSG00000000003"],
            "Gene name": ["b", "b", "c", None],
            "Human gene stable ID": ["ENSG00000000002", "ENSG00000000002", "ENSG00000000003", None],
        }
    )
    assert mouse_table(orthologues, human).to_numpy().tolist() == [["ENSMUSG00000000001", "b", "ENSG00000000002"]]

    for name in ("first.gz", "second.gz"):
        write_table(human, tmp_path / name)
    assert (tmp_path / "first.gz").read_bytes() == (tmp_path / "second.gz").read_bytes()
    assert pd.read_csv(tmp_path / "first.gz", sep="\t", keep_default_na=False, quoting=3).equals(human)

    with pytest.raises(ValueError, match="prev_symbol"):
        human_table(hgnc.drop(columns="prev_symbol"))
    with pytest.raises(ValueError, match="Gene name"):
        mouse_table(orthologues.drop(columns="Gene name"), human)
