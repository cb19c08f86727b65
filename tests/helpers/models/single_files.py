"""Small random models of every kind that CompVis published, and their YAML."""

from pathlib import Path

import torch

from autoencoder import Autoencoder, AutoencoderConfig
from conditioning.classes.class_conditioner import ClassConditioner, Unconditional
from conditioning.encoders.clip import Clip, clip_config
from conditioning.encoders.ldm_bert import LdmBert, ldm_bert_config
from conditioning.formats.unet_inputs import with_hints
from conditioning.interface.conditioner import Conditioner
from conditioning.layouts.layout_tokenizer import LayoutTokenizer
from conditioning.text.text_conditioner import TextConditioner
from conditioning.tokenizers.known_tokenizers import bert_tokenizer, clip_tokenizer
from ldm.formats.diffusers.scheduler import Scheduling
from ldm.formats.model_parts import ModelParts
from ldm.networks.unet import UNet
from ldm.networks.unet_config import UNetConfig
from ldm.schedules.noise_schedule import ScheduleConfig
from ldm.schedules.registry import make_schedule

PLAIN = ("unconditional", "churches", "semantic", "holes", "enlarging")  # no prompts, no cross-attention
KINDS = ("sd1", "sd2", "inpainting", "depth", "bert", "class", *PLAIN, "layout")
TEXT = ("sd1", "sd2", "inpainting", "depth", "bert")
EXTRA = {"inpainting": 5, "depth": 1, "semantic": 4, "holes": 5, "enlarging": 3}  # channels beside those of z_t
# of kinds without text
PROMPTS = {"class": "7", "layout": "3 0.1 0.1 0.5 0.5"} | dict.fromkeys(PLAIN, "")
VAE = dict(block_out_channels=(32, 64), layers_per_block=1, norm_num_groups=32, sample_size=16)
UNET = dict(sample_size=8, block_out_channels=(64, 128), layers_per_block=1, attention_levels=(True, False))
WIDTH = 64  # of tokens: one head of CLIP's and of LDM's transformer
YAML = """
model:
  target: os.system
  params:
    linear_start: 0.0015
    linear_end: 0.0195
    unet_config:
      target: builtins.exec
      params: {image_size: 8, num_heads: 4}
"""


def save_words(folder: Path) -> Path:
    """Write the vocabulary of a small BERT to a folder."""
    folder.mkdir(parents=True, exist_ok=True)
    pieces = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "photo", "of", "cat", "red", "heart"]
    (folder / "vocab.txt").write_text("\n".join(pieces))
    return folder


def clip(activation: str) -> TextConditioner:
    """Stable Diffusion 1's (quick_gelu) or 2's (gelu) text encoder, two layers of width 64."""
    sizes = dict(hidden_size=WIDTH, intermediate_size=128, num_hidden_layers=2, num_attention_heads=1)
    sizes |= dict(vocab_size=49408, max_position_embeddings=77, hidden_act=activation, projection_dim=WIDTH)
    sizes |= dict(bos_token_id=49406, eos_token_id=49407, pad_token_id=49407 if activation == "quick_gelu" else 0)
    pad = "<|endoftext|>" if activation == "quick_gelu" else "!"
    return TextConditioner(clip_tokenizer(77, pad), Clip(clip_config({"model_type": "clip_text_model"} | sizes)), False)


def bert_encoder(words: int) -> LdmBert:
    sizes = dict(vocab_size=words, d_model=WIDTH, max_position_embeddings=20, encoder_layers=2)
    sizes |= dict(encoder_ffn_dim=128, encoder_attention_heads=1, head_dim=64)
    return LdmBert(ldm_bert_config(sizes))


def conditioner(kind: str, folder: Path) -> Conditioner:
    """The conditioner of a kind."""
    if kind == "bert":
        return TextConditioner(bert_tokenizer(save_words(folder), 20), bert_encoder(30522), False)
    if kind == "class":
        return ClassConditioner(torch.zeros(1001, WIDTH), 1000)
    if kind in PLAIN:
        return Unconditional()
    if kind == "layout":
        return TextConditioner(LayoutTokenizer(8192, 20), bert_encoder(8192), False)
    return clip("gelu" if kind == "sd2" else "quick_gelu")


def randomize(module: torch.nn.Module) -> None:
    """Set random weights, also in layers that are initialized to zero."""
    for value in module.state_dict().values():
        scale = 0.1 if value.ndim < 2 else value[0].numel() ** -0.5
        value.copy_(torch.randn(value.shape) * scale + (0.5 if value.ndim < 2 else 0.0))


def build_parts(kind: str, folder: Path, seed: int = 0) -> ModelParts:
    """Build a model of one of KINDS. `folder` is for its tokenizer."""
    torch.manual_seed(seed)
    kl = kind in (*TEXT, "churches")
    codes = {"regularizer": "kl"} if kl else {"regularizer": "vq", "codebook_size": 64}
    autoencoder = Autoencoder(AutoencoderConfig(**codes, **VAE))
    prompts = conditioner(kind, folder)
    plain, extra = kind in PLAIN, EXTRA.get(kind, 0)
    options = {"attention": "plain"} if plain else {"use_linear_projection": kind == "sd2"}
    dim = None if plain else WIDTH
    config = UNetConfig(in_channels=4 + extra, cross_attention_dim=dim, attention_heads=(4,), **UNET, **options)
    unet = UNet(config)
    for module in (autoencoder, unet, prompts):
        randomize(module)
        module.requires_grad_(False).eval()
    autoencoder.scaling_factor = 0.25 if kind == "churches" else 0.18215 if kl else 1.0
    schedule = make_schedule(ScheduleConfig(beta_start=0.00085, beta_end=0.012)).config
    scheduling = Scheduling(
        schedule=schedule, prediction="velocity" if kind == "sd2" else "noise", spacing="leading", ends_clean=False
    )
    mapper = torch.randn(4, 182, 1, 1) if kind == "semantic" else None
    prompts = with_hints(prompts, extra, autoencoder.latent_channels, autoencoder.downsampling, mapper).eval()
    return ModelParts(autoencoder, unet, prompts, scheduling)


def write_yaml(folder: Path, text: str = YAML) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "model.yaml"
    path.write_text(text)
    return path
