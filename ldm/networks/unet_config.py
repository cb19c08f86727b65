"""The shape of the latent UNet: its options, and which of them go together (Rombach et al. 2022, appendix E)."""

from __future__ import annotations

from dataclasses import dataclass

# Kinds of attention, each with the options of which it has one value only.
ATTENTIONS = {
    "transformer": {"resample": "conv"},
    "plain": {
        "cross_attention_dim": None,
        "frame_width": None,
        "guidance_dim": None,
        "transformer_layers": 1,
        "use_linear_projection": False,
        "vector_dim": None,
    },
}
FRAME_NUMBERS = 6  # height and width of the whole, top and left, height and width of the cutout
RESAMPLINGS = ("conv", "residual")


@dataclass(frozen=True, kw_only=True)
class UNetConfig:
    """The shape of a UNet; the defaults are the paper's text-to-image model (872 M parameters).

    Raises:
        ValueError: if a tuple has not one entry per level, channels can't be divided into groups or heads, or options
            exclude each other.
    """

    sample_size: int = 32  # height and width of the latents that it is trained on
    in_channels: int = 4  # of z_t, plus those of context.latents
    out_channels: int = 4  # of z_t
    block_out_channels: tuple[int, ...] = (320, 640, 1280, 1280)  # features per level, finest first
    layers_per_block: int = 2  # residual blocks per level on the way down; one more on the way up
    attention_levels: tuple[bool, ...] = (True, True, True, False)  # levels with attention; the middle has one
    attention_heads: tuple[int, ...] = (8,)  # of each level, or one number for all; 1 where there is no attention
    cross_attention_dim: int | None = 1280  # d of context.tokens; None: no tokens, twice self-attention
    transformer_layers: int | tuple[int, ...] = (
        1  # transformer blocks per spatial transformer, of all levels or of each
    )
    use_linear_projection: bool = False  # store the transformers' projections as matrices (SD2), not 1x1 convolutions
    vector_dim: int | None = None  # of context.vector, added to the time embedding; None: no vector
    frame_width: int | None = None  # of vector_dim, for each of a frame's six numbers (SDXL); only names what is stored
    guidance_dim: int | None = None  # of the embedded guidance scale, which distilled networks read; None: they don't
    dropout: float = 0.0  # in residual blocks, before the second convolution
    norm_num_groups: int = 32  # of every GroupNorm
    norm_eps: float = 1e-5  # of every GroupNorm but the transformers', which have 1e-6
    attention: str = "transformer"  # or "plain": self-attention of pixels, in the paper's unconditional models
    resample: str = "conv"  # between levels: a convolution, or "residual": a residual block (plain attention only)
    scale_shift: bool = False  # the embedding scales and shifts the features of residual blocks; else it is added

    @property
    def downsampling(self) -> int:
        """Latents on the finest level per one on the coarsest, along a side."""
        return 2 ** (len(self.block_out_channels) - 1)

    def __post_init__(self):
        heads = (self.attention_heads,) if isinstance(self.attention_heads, int) else tuple(self.attention_heads)
        levels = len(self.block_out_channels)
        object.__setattr__(self, "block_out_channels", tuple(self.block_out_channels))
        object.__setattr__(self, "attention_levels", tuple(self.attention_levels))
        object.__setattr__(self, "attention_heads", heads * levels if len(heads) == 1 else heads)
        for name in ("attention_levels", "attention_heads"):
            if len(getattr(self, name)) != levels:
                raise ValueError(f"{name} {getattr(self, name)} needs one entry for each of the {levels} levels")
        attends = (*self.attention_levels[:-1], True)  # the middle is of the last level's shape
        heads = tuple(count if has else 1 for count, has in zip(self.attention_heads, attends, strict=True))
        object.__setattr__(self, "attention_heads", heads)
        object.__setattr__(self, "transformer_layers", self._depths(attends))
        self._check_channels()
        self._check_kinds()

    def depth(self, level: int) -> int:
        """Transformer blocks of each spatial transformer of a level."""
        return self.transformer_layers if isinstance(self.transformer_layers, int) else self.transformer_layers[level]

    def _depths(self, attends: tuple[bool, ...]) -> int | tuple[int, ...]:
        """transformer_layers as one number where all levels that attend share it; else 1 for those that do not."""
        if isinstance(self.transformer_layers, int):
            return self.transformer_layers
        if len(self.transformer_layers) != len(attends):
            raise ValueError(
                f"transformer_layers {self.transformer_layers} needs one entry for each of the {len(attends)} levels"
            )
        used = {count for count, has in zip(self.transformer_layers, attends, strict=True) if has}
        if len(used) == 1:
            return used.pop()
        return tuple(count if has else 1 for count, has in zip(self.transformer_layers, attends, strict=True))

    def _check_channels(self) -> None:
        for level, (channels, count) in enumerate(zip(self.block_out_channels, self.attention_heads, strict=True)):
            if channels % self.norm_num_groups:
                raise ValueError(
                    f"block_out_channels {channels} is not divisible by norm_num_groups {self.norm_num_groups}; "
                    f"use {max(channels // self.norm_num_groups, 1) * self.norm_num_groups} channels or fewer groups"
                )
            if channels % count:
                raise ValueError(
                    f"attention_heads {count} does not divide the {channels} channels of level {level}; "
                    "give one number per level"
                )

    def _check_kinds(self) -> None:
        for name, kinds in (("attention", ATTENTIONS), ("resample", RESAMPLINGS)):
            if getattr(self, name) not in kinds:
                raise ValueError(f"{name} {getattr(self, name)!r} is not known; use one of {', '.join(kinds)}")
        if self.frame_width is not None and (self.vector_dim or 0) < FRAME_NUMBERS * self.frame_width:
            raise ValueError(
                f"frame_width {self.frame_width} is part of vector_dim {self.vector_dim}; that must be "
                f"{FRAME_NUMBERS * self.frame_width} or more"
            )
        for name, value in ATTENTIONS[self.attention].items():
            if getattr(self, name) != value:
                raise ValueError(
                    f"{name} {getattr(self, name)!r} does not go with attention {self.attention!r}, "
                    f"which has {value!r} only; set it so, or choose another attention"
                )
