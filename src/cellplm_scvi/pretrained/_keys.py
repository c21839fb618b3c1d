"""Which parameter of ours each key of a published checkpoint is."""

from __future__ import annotations

from dataclasses import dataclass

from cellplm_scvi.nn.published import PublishedConfig

NO_POSITION = "built by the published code, but never part of its model"
REPLACED = "of the decoder, whose place a head takes"

#: cells of the published grid of positions
N_GRID = 10_000
N_MIXTURE_HIDDEN, N_OUTPUT_HIDDEN = 512, 128


@dataclass(frozen=True)
class Key:
    """A key of a published checkpoint.

    Parameters
    ----------
    name, shape
        As published.
    ours
        Our parameter, or ``None`` if it has no effect on the model.
    part
        Which third of our parameter it is, where queries, keys and values are one matrix.
    unused
        Why it has no effect.
    """

    name: str
    shape: tuple[int, ...]
    ours: str | None
    part: int | None = None
    unused: str = ""


def key_table(c: PublishedConfig) -> list[Key]:
    """Every key that a checkpoint of this configuration has."""
    keys = [*_embedder(c), *_encoder(c), *_latent(c)]
    if c.head is None:
        keys += _decoder(c)
    elif c.head == "annotation":
        widths = [c.n_latent, *[c.n_decoder_hidden] * (c.n_decoder_layers - 1), c.n_outputs]
        # a layer of dropout comes before each linear one, and an activation after each but the last
        step, first = (3, 1) if c.dropout_rate > 0 else (2, 0)
        for n, (n_in, n_out) in enumerate(zip(widths[:-1], widths[1:], strict=True)):
            keys += _linear(f"head.mlp.{first + step * n}", f"head.layers.{n}", n_in, n_out)
    return keys


def _linear(name: str, ours: str, n_in: int, n_out: int, part: int | None = None) -> list[Key]:
    return [Key(f"{name}.weight", (n_out, n_in), f"{ours}.weight", part), _bias(name, ours, n_out, part)]


def _bias(name: str, ours: str, n: int, part: int | None = None) -> Key:
    return Key(f"{name}.bias", (n,), f"{ours}.bias", part)


def _norm(name: str, ours: str | None, n: int, kind: str = "layernorm") -> list[Key]:
    parts = {"none": (), "rmsnorm": ("weight",)}.get(kind, ("weight", "bias"))
    why = "" if ours else NO_POSITION
    return [Key(f"{name}.{p}", (n,), f"{ours}.{p}" if ours else None, unused=why) for p in parts]


def _embedder(c: PublishedConfig) -> list[Key]:
    d = c.n_hidden
    keys = [Key("embedder.feat_enc.emb", (c.n_genes, d), "embedder.weight")]
    keys += _linear("embedder.extra_linear.0", "embedder.linear", d, d)
    keys += _norm("embedder.extra_linear.3", "embedder.norm", d, c.norm)
    keys += _norm("embedder.norm0", None, d, c.norm)
    if c.has_position:
        keys.append(Key("embedder.pe_enc.missing_pe", (d,), None, unused=NO_POSITION))
        keys.append(Key("embedder.pe_enc.pe_enc.weight", (N_GRID, d), None, unused=NO_POSITION))
    return keys


def _encoder(c: PublishedConfig) -> list[Key]:
    d = c.n_hidden
    keys = []
    for n in range(c.n_layers):
        theirs, ours = f"encoder.layers.{n}", f"encoder.layers.{n}"
        for part, name in enumerate(("query", "key", "value")):
            keys += _linear(f"{theirs}.self_attn.{name}_projection", f"{ours}.attention.qkv", d, d, part)
        keys += _linear(f"{theirs}.self_attn.out_projection", f"{ours}.attention.out", d, d)
        keys += _linear(f"{theirs}._ff_block.0", f"{ours}.feed_forward.0", d, 2 * d)
        keys += _linear(f"{theirs}._ff_block.3", f"{ours}.feed_forward.3", 2 * d, d)
        keys += _norm(f"{theirs}.norm1", f"{ours}.norm_attention", d)
        keys += _norm(f"{theirs}.norm2", f"{ours}.norm_feed_forward", d)
    return keys + _norm("pre_latent_norm.norm", "encoder.norm", d)


def _latent(c: PublishedConfig) -> list[Key]:
    d, z, k = c.n_hidden, c.n_latent, c.n_components
    layer = "latent.layers.1"
    match c.latent:
        case "ae":
            return _linear(f"{layer}.lat_2lat.0", "latent.mean", d, z)
        case "vae":
            return _linear(f"{layer}.hid_2mu", "latent.mean", d, z) + _linear(
                f"{layer}.hid_2sigma", "latent.log_variance", d, z
            )
        case "gmvae":
            net = f"{layer}.inference"
            return [
                *_linear(f"{net}.inference_qyx.0.logits", "latent.logits", d, k),
                *_linear(f"{net}.inference_qzyx.0", "latent.hidden", d + k, N_MIXTURE_HIDDEN),
                *_linear(f"{net}.inference_qzyx.2.mu", "latent.mean", N_MIXTURE_HIDDEN, z),
                *_linear(f"{net}.inference_qzyx.2.var", "latent.raw_variance", N_MIXTURE_HIDDEN, z),
                *_linear(f"{net}.y_mu", "latent.prior_mean", k, z),
                *_linear(f"{net}.y_var", "latent.prior_raw_variance", k, z),
            ]


def _decoder(c: PublishedConfig) -> list[Key]:
    h, g = c.n_decoder_hidden, c.n_genes
    keys = []
    for n in range(c.n_decoder_layers - 1):
        theirs, ours = f"decoder.layers.{n}", f"decoder.layers.{n}"
        keys += _linear(f"{theirs}.0", f"{ours}.linear", h if n else c.n_latent, h)
        keys.append(Key(f"{theirs}.1.weight", (1,), f"{ours}.activation.weight"))
        keys += _norm(f"{theirs}.3", f"{ours}.norm", h, c.norm)
        for name, size in c.covariates.items():
            theirs, codes = f"decoder.covariate_layers.{n}.{name}", f"{ours}.codes.{name}"
            keys.append(Key(f"{theirs}.0.weight", (size, h), f"{codes}.weight"))
            keys.append(Key(f"{theirs}.1.weight", (1,), f"{codes}.activation.weight"))
            keys += _norm(f"{theirs}.2", f"{codes}.norm", h, c.norm)
    out = "decoder.out_layer"
    keys.append(Key(f"{out}.dec_disp", (g,), "decoder.log_dispersion"))
    keys += _linear(f"{out}.dec_1", "decoder.output_hidden", h, N_OUTPUT_HIDDEN)
    keys.append(Key(f"{out}.dec_mean.0.weight", (g, N_OUTPUT_HIDDEN), "decoder.weight"))
    return [*keys, Key(f"{out}.dec_mean.0.bias", (g,), "decoder.bias")]
