"""Names and shapes of the parameters of CompVis' first stages, from CompVis' options."""

from collections.abc import Iterator

Shapes = dict[str, tuple[int, ...]]

KL = dict(double_z=True)
FIRST_STAGES = {  # models/first_stage_models of CompVis' latent-diffusion: options, and numbers of parameters
    "kl-f4": (dict(ch_mult=(1, 2, 4), z_channels=3, embed_dim=3, **KL), 55_312_063),
    "kl-f8": (dict(ch_mult=(1, 2, 4, 4), z_channels=4, embed_dim=4, **KL), 83_653_863),
    "kl-f16": (dict(ch_mult=(1, 1, 2, 2, 4), z_channels=16, embed_dim=16, attention=(4,), **KL), 69_610_963),
    "kl-f32": (dict(ch_mult=(1, 1, 2, 2, 4, 4), z_channels=64, embed_dim=64, attention=(4, 5), **KL), 103_880_131),
    "vq-f4": (dict(ch_mult=(1, 2, 4), z_channels=3, embed_dim=3, n_embed=8192), 55_322_782),
    "vq-f4-noattn": (dict(ch_mult=(1, 2, 4), z_channels=3, embed_dim=3, n_embed=8192, middle=False), 53_219_486),
    "vq-f8": (dict(ch_mult=(1, 2, 2, 4), z_channels=4, embed_dim=4, n_embed=16384, attention=(3,)), 67_717_295),
    "vq-f16": (dict(ch_mult=(1, 1, 2, 2, 4), z_channels=8, embed_dim=8, n_embed=16384, attention=(4,)), 69_593_371),
}


def first_stage(
    ch_mult: tuple[int, ...],
    z_channels: int,
    embed_dim: int,
    ch: int = 128,
    num_res_blocks: int = 2,
    attention: tuple[int, ...] = (),  # levels with attention; 0 is the finest
    double_z: bool = False,
    n_embed: int | None = None,
    middle: bool = True,
) -> Shapes:
    """The state dict of AutoencoderKL (double_z) or VQModel (n_embed), without losses."""
    moments = 2 if double_z else 1
    wide = [ch * mult for mult in ch_mult]
    shapes: Shapes = {}
    shapes |= conv("encoder.conv_in", 3, ch, 3)
    into = ch
    for i, out in enumerate(wide):
        for j in range(num_res_blocks):
            shapes |= resnet(f"encoder.down.{i}.block.{j}", into, out)
            shapes |= attend(f"encoder.down.{i}.attn.{j}", out) if i in attention else {}
            into = out
        shapes |= conv(f"encoder.down.{i}.downsample.conv", out, out, 3) if i < len(wide) - 1 else {}
    shapes |= mid("encoder", into, middle) | norm("encoder.norm_out", into)
    shapes |= conv("encoder.conv_out", into, moments * z_channels, 3)
    shapes |= conv("decoder.conv_in", z_channels, into, 3) | mid("decoder", into, middle)
    for i, out in reversed(list(enumerate(wide))):
        for j in range(num_res_blocks + 1):
            shapes |= resnet(f"decoder.up.{i}.block.{j}", into, out)
            shapes |= attend(f"decoder.up.{i}.attn.{j}", out) if i in attention else {}
            into = out
        shapes |= conv(f"decoder.up.{i}.upsample.conv", out, out, 3) if i else {}
    shapes |= norm("decoder.norm_out", into) | conv("decoder.conv_out", into, 3, 3)
    shapes |= conv("quant_conv", moments * z_channels, moments * embed_dim, 1)
    shapes |= conv("post_quant_conv", embed_dim, z_channels, 1)
    return shapes | ({} if n_embed is None else {"quantize.embedding.weight": (n_embed, embed_dim)})


def conv(name: str, into: int, out: int, size: int) -> Shapes:
    return {f"{name}.weight": (out, into, size, size), f"{name}.bias": (out,)}


def norm(name: str, channels: int) -> Shapes:
    return {f"{name}.{part}": (channels,) for part in ("weight", "bias")}


def resnet(name: str, into: int, out: int) -> Shapes:
    shapes = norm(f"{name}.norm1", into) | conv(f"{name}.conv1", into, out, 3)
    shapes |= norm(f"{name}.norm2", out) | conv(f"{name}.conv2", out, out, 3)
    return shapes | (conv(f"{name}.nin_shortcut", into, out, 1) if into != out else {})


def attend(name: str, channels: int) -> Shapes:
    parts = [conv(f"{name}.{part}", channels, channels, 1) for part in ("q", "k", "v", "proj_out")]
    return dict(pair for shapes in (norm(f"{name}.norm", channels), *parts) for pair in shapes.items())


def mid(name: str, channels: int, middle: bool) -> Shapes:
    shapes = attend(f"{name}.mid.attn_1", channels) if middle else {}
    return (
        shapes | resnet(f"{name}.mid.block_1", channels, channels) | resnet(f"{name}.mid.block_2", channels, channels)
    )


def lines(shapes: Shapes) -> Iterator[str]:
    """Names and shapes in a fixed order, for hashing."""
    return (f"{name} {list(shape)}" for name, shape in sorted(shapes.items()))
