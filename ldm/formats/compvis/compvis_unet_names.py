"""Where each module of the UNet stands in CompVis' UNet, which counts layers, steps down and steps up in one list."""

from __future__ import annotations

from collections.abc import Iterator

from ldm.networks.unet_config import UNetConfig

ENDS = {  # Stipple's names -> CompVis' names
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
    """Names in Stipple and CompVis of each spatial transformer or plain attention, and its number of heads."""
    yield "mid_block.attentions.0", "middle_block.1", config.attention_heads[-1]
    for block, layer, compvis, level in _layers(config):
        if config.attention_levels[level]:
            yield f"{block}.attentions.{layer}", f"{compvis}.1", config.attention_heads[level]


def module_names(config: UNetConfig) -> dict[str, str]:
    """Stipple's names -> CompVis' names, of modules within which the rest of a name is the same."""
    names = dict(ENDS)
    residuals = {"mid_block.resnets.0": "middle_block.0", "mid_block.resnets.1": "middle_block.2"}
    residuals |= {f"{block}.resnets.{layer}": f"{compvis}.0" for block, layer, compvis, _ in _layers(config)}
    for stipple, compvis in _steps(config):
        if config.resample == "residual":
            residuals[stipple] = compvis
        else:
            names[f"{stipple}.conv"] = f"{compvis}.op" if stipple.startswith("down") else f"{compvis}.conv"
    for stipple, compvis in residuals.items():
        names |= {f"{stipple}.{part}": f"{compvis}.{name}" for part, name in RESIDUAL.items()}
    for stipple, compvis, _ in attentions(config):
        parts = {f"{stipple}.{part}": f"{compvis}.{name}" for part, name in PLAIN.items()}
        names |= parts if config.attention == "plain" else {stipple: compvis}
    return names


def renamed(name: str, names: dict[str, str]) -> str:
    """A parameter's name in CompVis, by `module_names`."""
    module, rest = name, ""
    while module not in names:
        module, _, last = module.rpartition(".")
        rest = f".{last}{rest}"
    return names[module] + rest


def _layers(config: UNetConfig) -> Iterator[tuple[str, int, str, int]]:
    """Each residual block: the block of stipple that it is in and its index there, their block, its level."""
    levels, layers = len(config.block_out_channels), config.layers_per_block
    for level in range(levels):
        for layer in range(layers):
            yield f"down_blocks.{level}", layer, f"input_blocks.{level * (layers + 1) + layer + 1}", level
    for block, level in enumerate(reversed(range(levels))):
        for layer in range(layers + 1):
            yield f"up_blocks.{block}", layer, f"output_blocks.{block * (layers + 1) + layer}", level


def _steps(config: UNetConfig) -> Iterator[tuple[str, str]]:
    """Names in Stipple and CompVis of each step between levels; down, they have their own index in CompVis."""
    levels, layers = len(config.block_out_channels), config.layers_per_block
    for level in range(levels - 1):
        yield f"down_blocks.{level}.downsamplers.0", f"input_blocks.{(level + 1) * (layers + 1)}.0"
    for block in range(levels - 1):
        place = 2 if config.attention_levels[levels - 1 - block] else 1  # behind residual block and attention
        yield f"up_blocks.{block}.upsamplers.0", f"output_blocks.{(block + 1) * (layers + 1) - 1}.{place}"
