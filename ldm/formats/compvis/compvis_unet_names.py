"""Where each module of the UNet stands in CompVis' UNet, which counts layers, steps down and steps up in one list."""

from __future__ import annotations

from collections.abc import Iterator

from ldm.networks.unet_config import UNetConfig

ENDS = {  # ours -> theirs
    "conv_in": "input_blocks.0.0",
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "class_embedding.linear_1": "label_emb.0.0",
    "class_embedding.linear_2": "label_emb.0.2",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
}
RESIDUAL = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
PLAIN = {"group_norm": "norm", "to_out.0": "proj_out"}  # to_q, to_k and to_v are one module there, qkv


def attentions(config: UNetConfig) -> Iterator[tuple[str, str, int]]:
    """Our name and theirs of each spatial transformer or plain attention, and the number of its heads."""
    yield "mid_block.attentions.0", "middle_block.1", config.attention_heads[-1]
    for block, layer, theirs, level in _layers(config):
        if config.attention_levels[level]:
            yield f"{block}.attentions.{layer}", f"{theirs}.1", config.attention_heads[level]


def module_names(config: UNetConfig) -> dict[str, str]:
    """Our names -> theirs, of modules within which the rest of a name is the same."""
    names = dict(ENDS)
    residuals = {"mid_block.resnets.0": "middle_block.0", "mid_block.resnets.1": "middle_block.2"}
    residuals |= {f"{block}.resnets.{layer}": f"{theirs}.0" for block, layer, theirs, _ in _layers(config)}
    for ours, theirs in _steps(config):
        if config.resample == "residual":
            residuals[ours] = theirs
        else:
            names[f"{ours}.conv"] = f"{theirs}.op" if ours.startswith("down") else f"{theirs}.conv"
    for ours, theirs in residuals.items():
        names |= {f"{ours}.{part}": f"{theirs}.{name}" for part, name in RESIDUAL.items()}
    for ours, theirs, _ in attentions(config):
        parts = {f"{ours}.{part}": f"{theirs}.{name}" for part, name in PLAIN.items()}
        names |= parts if config.attention == "plain" else {ours: theirs}
    return names


def renamed(name: str, names: dict[str, str]) -> str:
    """A parameter's name in theirs, given `module_names`."""
    module, rest = name, ""
    while module not in names:
        module, _, last = module.rpartition(".")
        rest = f".{last}{rest}"
    return names[module] + rest


def _layers(config: UNetConfig) -> Iterator[tuple[str, int, str, int]]:
    """Each residual block: the block of ours that it is in and its index there, their block, its level."""
    levels, layers = len(config.block_out_channels), config.layers_per_block
    for level in range(levels):
        for layer in range(layers):
            yield f"down_blocks.{level}", layer, f"input_blocks.{level * (layers + 1) + layer + 1}", level
    for block, level in enumerate(reversed(range(levels))):
        for layer in range(layers + 1):
            yield f"up_blocks.{block}", layer, f"output_blocks.{block * (layers + 1) + layer}", level


def _steps(config: UNetConfig) -> Iterator[tuple[str, str]]:
    """Our name and theirs of each step between levels; theirs have a place of their own down, not up."""
    levels, layers = len(config.block_out_channels), config.layers_per_block
    for level in range(levels - 1):
        yield f"down_blocks.{level}.downsamplers.0", f"input_blocks.{(level + 1) * (layers + 1)}.0"
    for block in range(levels - 1):
        place = 2 if config.attention_levels[levels - 1 - block] else 1  # behind residual block and attention
        yield f"up_blocks.{block}.upsamplers.0", f"output_blocks.{(block + 1) * (layers + 1) - 1}.{place}"
