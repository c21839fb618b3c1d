"""A damaged, mismatched or hostile published file is refused with a message, and cheaply; an intact one loads in full."""

from __future__ import annotations

import io
import json
import os
import pickle
import resource
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from cellplm_scvi import CellPLM
from cellplm_scvi.pretrained import PretrainedFileError, load_network, read_published

NAN, INF = float("nan"), float("inf")


@pytest.fixture
def config(mixture_case: Any) -> Callable[[Any], Any]:
    """Replaces the configuration: by entries, or by raw text."""

    def write(content: Any) -> Any:
        content = content if isinstance(content, bytes) else json.dumps(content).encode()
        mixture_case.config_path.write_bytes(content)
        return mixture_case

    return write


@pytest.fixture
def checkpoint(mixture_case: Any) -> Callable[[Any], Any]:
    """Replaces the checkpoint: by an object to save, or by raw bytes."""

    def write(content: Any) -> Any:
        if isinstance(content, bytes):
            mixture_case.checkpoint_path.write_bytes(content)
        else:
            torch.save(content, mixture_case.checkpoint_path)
        return mixture_case

    return write


def read(case: Any) -> Any:
    return read_published(case.config_path, case.checkpoint_path)


def refused(case: Any, match: str = "") -> None:
    """The files are refused, by a message of a few lines that names one of them, with no more memory than they have."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(PretrainedFileError, match=match) as caught:
        read(case)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100 * 2**10  # of 1,024 bytes
    message = str(caught.value)
    assert 20 < len(message) < 800
    assert "a_gmvae_nb_cov." in message


def state_unless_refused(case: Any) -> dict[str, Tensor] | None:
    """The weights, where damage need not lead to an error of ours, but must not lead to another."""
    try:
        return read(case).state
    except PretrainedFileError:
        return None


def test_every_key_is_accounted_for(mixture_case: Any) -> None:
    found = read(mixture_case)
    report = found.report
    assert {*report.used, *report.unused} == set(mixture_case.weights)
    assert not set(report.used) & set(report.unused)
    assert all(report.unused.values())
    assert {*report.config_used, *report.config_unused, "gene_list"} == set(mixture_case.entries)
    assert set(report.used.values()) == set(found.state) == set(load_network(found).state_dict())
    for key in [*report.unused, *report.config_unused]:
        assert key.split(".")[0] in str(report)


def test_values_arrive(mixture_case: Any) -> None:
    """Each weight is where the report says, to the bit."""
    found, stored = read(mixture_case), mixture_case.weights
    together: dict[str, list[Tensor]] = {}
    for key, ours in found.report.used.items():
        together.setdefault(ours, []).append(stored[key])
    for ours, parts in together.items():
        assert torch.equal(found.state[ours], torch.cat(parts)), ours


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_precisions(dtype: torch.dtype, mixture_case: Any, checkpoint: Any) -> None:
    stored = {key: value.to(dtype) for key, value in mixture_case.weights.items()}
    found = read(checkpoint({"model_state_dict": stored}))
    assert all(value.dtype == torch.float32 for value in found.state.values())


def test_what_else_a_training_run_stores(mixture_case: Any, checkpoint: Any) -> None:
    """Keys of ``DistributedDataParallel``, parameters, an optimiser's state and an epoch."""
    stored = {f"module.{key}": torch.nn.Parameter(value) for key, value in mixture_case.weights.items()}
    found = read(checkpoint({"epoch": 3, "optimizer": {"state": [torch.ones(2)]}, "model_state_dict": stored}))
    assert {'"epoch"', '"optimizer"'} <= set(found.report.unused)
    assert any("module." in note for note in found.report.notes)
    assert all(not value.requires_grad for value in found.state.values())


# -- Configuration -----------------------------------------------------------

SIZES = ("enc_hid", "enc_layers", "post_latent_dim", "num_clusters", "dec_hid", "dec_layers", "out_dim", "enc_head")
COUNTS = ("batch_num", "dataset_num", "platform_num")
RATES = ("model_dropout", "mask_node_rate", "mask_feature_rate")
NUMBERS = ("lamda", "w_li", "w_en")
WORDS = ("enc_mod", "latent_mod", "dec_mod", "norm", "head_type", "pe_type", "objective")
FLAGS = ("cat_pe", "input_covariate", "dsbn", "dar", "dae")
ODD: dict[tuple[str, ...], tuple[Any, ...]] = {
    SIZES: (-1, 0, 2.0, 1.5, "32", True, None, [], {}, 10**9, 10**30, 31),
    COUNTS: (-1, 2.5, "3", True, None, [3], 10**9, 4),
    RATES: (-0.1, 1.1, "0.5", True, None, [], 10**400),
    NUMBERS: (1e300, "5", False, None, {}),
    WORDS: (0, True, "", "mlp ", [], {"a": 1}, "x" * 10**6),
    FLAGS: ("", 1, None, "true"),
}


@pytest.mark.parametrize(
    ("entry", "value"),
    [
        pytest.param(name, value, id=f"{name}={str(value)[:10]}-{n}")
        for names, values in ODD.items()
        for name in names
        for n, value in enumerate(values)
        if not (name == "dec_mod" and value is None)
    ],
)
def test_odd_entry(entry: str, value: Any, mixture_case: Any, config: Any) -> None:
    refused(config({**mixture_case.entries, entry: value}))


@pytest.mark.parametrize("entry", ["enc_mod", "enc_hid", "enc_layers", "post_latent_dim", "out_dim", "gene_list"])
def test_absent_entry(entry: str, mixture_case: Any, config: Any) -> None:
    entries = mixture_case.entries
    del entries[entry]
    refused(config(entries), entry)


@pytest.mark.parametrize("switch", ["cat_pe", "input_covariate", "dsbn", "dar"])
def test_unsupported_switch(switch: str, mixture_case: Any, config: Any) -> None:
    refused(config({**mixture_case.entries, switch: True}), switch)


@pytest.mark.parametrize(
    "change",
    [
        pytest.param(lambda genes: [], id="none"),
        pytest.param(lambda genes: genes[:-1], id="one less"),
        pytest.param(lambda genes: [*genes, "another"], id="one more"),
        pytest.param(lambda genes: [genes[0], *genes[:-1]], id="twice"),
        pytest.param(lambda genes: ["", *genes[1:]], id="empty"),
        pytest.param(lambda genes: ["  ", *genes[1:]], id="blank"),
        pytest.param(lambda genes: [None, *genes[1:]], id="null"),
        pytest.param(lambda genes: [7, *genes[1:]], id="number"),
        pytest.param(lambda genes: [["A"], *genes[1:]], id="list"),
        pytest.param(lambda genes: ["\ud800", *genes[1:]], id="surrogate"),
        pytest.param(lambda genes: ["A\nB\0", *genes[1:]], id="control"),
        pytest.param(lambda genes: ["A" * 10**6, *genes[1:]], id="long"),
        pytest.param(lambda genes: dict.fromkeys(genes), id="object"),
        pytest.param(lambda genes: ",".join(genes), id="text"),
    ],
)
def test_odd_genes(change: Callable[[list[str]], Any], mixture_case: Any, config: Any) -> None:
    entries = mixture_case.entries
    refused(config({**entries, "gene_list": change(entries["gene_list"])}))


@pytest.mark.parametrize(
    "text",
    [
        pytest.param(b"", id="empty"),
        pytest.param(b"null", id="null"),
        pytest.param(b"[]", id="list"),
        pytest.param(b"{}", id="no entries"),
        pytest.param(b"\x80\x02}q\x00.", id="pickle"),
        pytest.param(b"\xff\xfe\x00\xd8", id="not text"),
        pytest.param(b"[" * 10**6, id="deep"),
        pytest.param(b'{"a":' * 10**5 + b"1" + b"}" * 10**5, id="deep object"),
        pytest.param(b'{"enc_hid": ' + b"9" * 10**5 + b"}", id="long number"),
        pytest.param(b'{"lamda": NaN}', id="NaN"),
        pytest.param(b'{"lamda": -Infinity}', id="infinity"),
    ],
)
def test_not_a_configuration(text: bytes, config: Any) -> None:
    refused(config(text))


def test_configuration_of_gigabytes(mixture_case: Any) -> None:
    """A sparse file, which is not read."""
    with mixture_case.config_path.open("r+b") as file:
        file.truncate(2**33)
    refused(mixture_case, "no configuration")


@pytest.mark.parametrize("kept", np.linspace(0, 1, 25, endpoint=False).round(3))
def test_truncated_configuration(kept: float, mixture_case: Any, config: Any) -> None:
    whole = mixture_case.config_path.read_bytes()
    refused(config(whole[: int(kept * len(whole))]), "config.json")


# -- Checkpoint --------------------------------------------------------------


@pytest.mark.parametrize("kept", np.linspace(0, 1, 40, endpoint=False).round(3))
def test_truncated_checkpoint(kept: float, mixture_case: Any, checkpoint: Any) -> None:
    whole = mixture_case.checkpoint_path.read_bytes()
    refused(checkpoint(whole[: int(kept * len(whole))]), "best.ckpt")


@pytest.mark.parametrize("n", range(60))
def test_flipped_bytes(n: int, mixture_case: Any, checkpoint: Any) -> None:
    """Weights are protected by checksums; the little of an archive that is not may change without effect."""
    rng = np.random.default_rng(n)
    expected = read(mixture_case).state
    content = bytearray(mixture_case.checkpoint_path.read_bytes())
    # half of them near the directory at the end, where damage could hide
    places = rng.integers(0 if n % 2 else len(content) - 12_000, len(content), size=1 + n % 3)
    for place in places:
        content[place] ^= 1 << int(rng.integers(8))
    case = checkpoint(bytes(content))
    found = state_unless_refused(case)
    assert found is None or all(torch.equal(found[name], value) for name, value in expected.items())


@pytest.mark.parametrize(
    ("change", "match"),
    [
        pytest.param(lambda w: w.pop("encoder.layers.1.norm2.bias"), "lacks 1 .*norm2.bias", id="one missing"),
        pytest.param(lambda w: [w.pop(k) for k in list(w) if "latent" in k], "lacks", id="latent missing"),
        pytest.param(lambda w: w.clear(), "by name are needed", id="all missing"),
        pytest.param(lambda w: w.update(extra=torch.ones(3)), 'does not account for .*"extra"', id="extra"),
        pytest.param(lambda w: w.update({"x.y": w.pop("decoder.out_layer.dec_disp")}), "lacks", id="renamed"),
        pytest.param(lambda w: w.update({7: torch.ones(1)}), "names are needed", id="key is a number"),
        pytest.param(lambda w: w.update({("a", 1): torch.ones(1)}), "names are needed", id="key is a tuple"),
    ],
)
def test_other_keys(change: Callable[[dict[Any, Tensor]], Any], match: str, mixture_case: Any, checkpoint: Any) -> None:
    weights = mixture_case.weights
    change(weights)
    refused(checkpoint({"model_state_dict": weights}), match)


KEYS = (
    *("embedder.feat_enc.emb", "encoder.layers.0.self_attn.key_projection.weight", "pre_latent_norm.norm.bias"),
    *("decoder.covariate_layers.0.batch.0.weight", "decoder.layers.0.1.weight", "embedder.norm0.weight"),
)
VALUES: dict[str, Callable[[Tensor], Any]] = {
    "transposed": lambda w: w.new_ones(*reversed(w.shape), 2),
    "one row less": lambda w: w.new_ones(w.shape[0] + 1, *w.shape[1:]),
    "flat": lambda w: w.reshape(1, -1),
    "no values": lambda w: w[:0],
    "whole numbers": lambda w: w.long(),
    "complex": lambda w: w.to(torch.complex64),
    "boolean": lambda w: w > 0,
    "one NaN": lambda w: w.clone().index_fill_(0, torch.tensor([0]), NAN),
    "infinite": lambda w: w.clone().index_fill_(0, torch.tensor([0]), -INF),
    "beyond float32": lambda w: w.double() + 1e300,
    "sparse": lambda w: w.to_sparse(),
    "quantised": lambda w: torch.quantize_per_tensor(w, 0.1, 0, torch.qint8),
    "nested": lambda w: torch.nested.nested_tensor([w]),
    "without memory": lambda w: w.to("meta"),
    "one value repeated": lambda w: torch.zeros(1).expand(*w.shape) if w.numel() > 1 else w[:0],
    "claims gigabytes": lambda w: torch.zeros(1).expand(2**33),
    "number": lambda w: 3.0,
    "array": lambda w: w.numpy(),
    "list": lambda w: w.tolist(),
    "null": lambda w: None,
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", VALUES)
@pytest.mark.parametrize("key", KEYS)
def test_odd_weight(key: str, kind: str, mixture_case: Any, checkpoint: Any) -> None:
    weights = mixture_case.weights
    weights[key] = VALUES[kind](weights[key])
    refused(checkpoint({"model_state_dict": weights}))


@pytest.mark.parametrize(
    "content",
    [
        pytest.param({}, id="nothing"),
        pytest.param([], id="list"),
        pytest.param(3, id="number"),
        pytest.param(torch.ones(3), id="tensor"),
        pytest.param({"state_dict": {}}, id="another name"),
        pytest.param({"model_state_dict": None}, id="null"),
        pytest.param({"model_state_dict": [torch.ones(2)]}, id="list of tensors"),
        pytest.param({"model_state_dict": {}}, id="no tensors"),
    ],
)
def test_other_content(content: Any, checkpoint: Any) -> None:
    refused(checkpoint(content))


def test_bare_state_dict(mixture_case: Any, checkpoint: Any) -> None:
    refused(checkpoint(mixture_case.weights), "model_state_dict")


class Runs:
    """Touches a file when it is unpickled."""

    def __init__(self, call: Callable[..., Any], *arguments: Any):
        self.call, self.arguments = call, arguments

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return self.call, self.arguments


@pytest.mark.parametrize("place", ["weights", "beside"])
@pytest.mark.parametrize(
    ("call", "arguments"),
    [
        pytest.param(os.mkdir, ("TRACE",), id="mkdir"),
        pytest.param(eval, ("__import__('os').mkdir('TRACE')",), id="eval"),
        pytest.param(os.system, ("mkdir TRACE",), id="system"),
        # what torch's restricted unpickler would let pass
        pytest.param(bytearray, (2**36,), id="64 gigabytes"),
        pytest.param(torch.device, ("cpu",), id="device"),
    ],
)
def test_code_is_not_run(
    call: Any, arguments: Any, place: str, mixture_case: Any, checkpoint: Any, monkeypatch: Any
) -> None:
    monkeypatch.chdir(mixture_case.prefix.parent)
    weights = mixture_case.weights
    hostile: dict[str, Any] = {"x": Runs(call, *arguments)}
    content = {"model_state_dict": weights | hostile} if place == "weights" else {"model_state_dict": weights} | hostile
    refused(checkpoint(content), "would have to be run")
    assert not Path("TRACE").exists()


@pytest.mark.parametrize("protocol", [0, 2, 4, 5])
def test_pickle_without_archive(protocol: int, mixture_case: Any, checkpoint: Any, monkeypatch: Any) -> None:
    monkeypatch.chdir(mixture_case.prefix.parent)
    content = pickle.dumps({"model_state_dict": Runs(os.mkdir, "TRACE")}, protocol=protocol)
    refused(checkpoint(content), "not an archive")
    assert not Path("TRACE").exists()


def test_other_protocols(mixture_case: Any) -> None:
    """Newer instructions of pickle, which could hide what is imported, are refused."""
    content = {"model_state_dict": {**mixture_case.weights, "x": Runs(os.mkdir, "TRACE")}}
    torch.save(content, mixture_case.checkpoint_path, pickle_protocol=4)
    refused(mixture_case, "would have to be run")


def test_format_of_old_torch(mixture_case: Any) -> None:
    torch.save(
        {"model_state_dict": mixture_case.weights}, mixture_case.checkpoint_path, _use_new_zipfile_serialization=False
    )
    refused(mixture_case, "torch before 1.6")


def repacked(case: Any, change: Callable[[str, bytes], bytes], compression: int = zipfile.ZIP_STORED) -> bytes:
    """The archive with its parts changed and its checksums made right."""
    content = io.BytesIO()
    with (
        zipfile.ZipFile(case.checkpoint_path) as source,
        zipfile.ZipFile(content, "w", compression) as target,
    ):
        for name in source.namelist():
            target.writestr(name, change(name, source.read(name)))
    return content.getvalue()


def test_zip_bomb(mixture_case: Any, checkpoint: Any) -> None:
    """Megabytes of zeros in a few kilobytes."""
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w", zipfile.ZIP_DEFLATED) as archive, archive.open("archive/data.pkl", "w") as part:
        for _ in range(2**6):
            part.write(bytes(2**20))
    refused(checkpoint(content.getvalue()), "compressed")


def test_pickle_under_another_case(mixture_case: Any, checkpoint: Any) -> None:
    """Readers of archives differ in whether the case of a name counts."""
    content = io.BytesIO(mixture_case.checkpoint_path.read_bytes())
    with zipfile.ZipFile(content, "a") as archive:
        archive.writestr("archive/DATA.PKL", pickle.dumps(Runs(os.mkdir, "TRACE"), protocol=2))
    refused(checkpoint(content.getvalue()), "would have to be run")


def test_overlapping_parts(mixture_case: Any, checkpoint: Any) -> None:
    """Thousands of directory entries for the same bytes."""
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w") as archive:
        archive.writestr("archive/data.pkl", bytes(10**5))
        for n in range(500):
            entry = zipfile.ZipInfo(f"archive/data/{n}")
            part = archive.filelist[0]
            for name in ("CRC", "file_size", "compress_size", "header_offset"):
                setattr(entry, name, getattr(part, name))
            archive.filelist.append(entry)
    refused(checkpoint(content.getvalue()), "claims to hold more")


def test_empty_archive(checkpoint: Any) -> None:
    refused(checkpoint(b"PK\x05\x06" + bytes(18)))


def test_storage_that_claims_more(mixture_case: Any, checkpoint: Any) -> None:
    """A tensor of a billion values over a storage of a few."""
    weights = {"x": torch.arange(4.0)}
    torch.save({"model_state_dict": weights}, mixture_case.checkpoint_path)
    claim = b"J" + (10**9).to_bytes(4, "little")

    def change(name: str, content: bytes) -> bytes:
        if not name.endswith("data.pkl"):
            return content
        larger = content.replace(b"K\x04t", claim + b"t").replace(b"K\x00K\x04\x85", b"K\x00" + claim + b"\x85")
        assert len(larger) == len(content) + 6
        return larger

    refused(checkpoint(repacked(mixture_case, change)), "corrupt")


@pytest.mark.parametrize("n", range(40))
def test_damaged_pickle(n: int, mixture_case: Any, checkpoint: Any) -> None:
    """Changed instructions under a checksum that was made right again."""
    rng = np.random.default_rng(n)

    def change(name: str, content: bytes) -> bytes:
        damaged = bytearray(content)
        if name.endswith("data.pkl"):
            for place in rng.integers(len(content), size=1 + n % 4):
                damaged[place] = rng.integers(256)
        return bytes(damaged)

    expected = read(mixture_case).state
    found = state_unless_refused(checkpoint(repacked(mixture_case, change)))
    if found is not None:  # the change hit something like the name of a device
        assert found.keys() == expected.keys()
        assert all(bool(value.isfinite().all()) for value in found.values())


# -- By way of the model -----------------------------------------------------


@pytest.mark.parametrize("file", ["config", "checkpoint"])
def test_the_model_raises_the_same(file: str, mixture_case: Any, config: Any, checkpoint: Any) -> None:
    (config if file == "config" else checkpoint)(b"{}")
    with pytest.raises(PretrainedFileError):
        CellPLM.from_pretrained(mixture_case.prefix)


def test_overwritten_entries(mixture_case: Any) -> None:
    model = CellPLM.from_pretrained(mixture_case.prefix, overwrite_config={"head_type": "embedder"})
    report = model.pretrained_report
    assert report is not None
    assert report.config_used["head_type"] == "embedder"
    decoder = {key for key in mixture_case.weights if key.startswith("decoder.")}
    assert decoder <= set(report.unused)
    with pytest.raises(PretrainedFileError, match="another shape"):
        CellPLM.from_pretrained(mixture_case.prefix, overwrite_config={"enc_hid": 64})
    with pytest.warns(UserWarning, match='has no "objectve", and nothing here depends on it'):
        CellPLM.from_pretrained(mixture_case.prefix, overwrite_config={"objectve": "imputation", "lr": 1.0})


def test_annotation_checkpoint(annotation_case: Any) -> None:
    found = read(annotation_case)
    assert {*found.report.used, *found.report.unused} == set(annotation_case.weights)
    assert any(name.startswith("head.") for name in found.state)
