"""Text transformer trained together with the UNet (Rombach et al. 2022, section 3.3): a small CLIPTextModel.

Its weights are initialized as in transformers. Every program that opens Stable Diffusion opens its folder.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch

from conditioning.encoders.clip import PROJECTS, Clip, clip_config, clip_weights, empty_clip
from conditioning.encoders.pretrained import quiet
from conditioning.tokenizers.clip_bpe import END, START
from conditioning.tokenizers.tokenizer import Tokenizer, read_tokenizer
from stipple_core.files.weights import place

SMALLEST_VOCABULARY = 2 * 256 + 2  # each byte inside and at the end of a word, start, end


@dataclass(frozen=True, kw_only=True)
class TransformerConfig:
    """Size of a text transformer that is trained from scratch."""

    vocab_size: int = 4096  # maximum; few captions have fewer merges
    width: int = 384  # d of the tokens
    layers: int = 6  # residual blocks
    heads: int = 6  # attention heads per block
    max_length: int = 77  # tokens per prompt, start and end included


def train_tokenizer(captions: Iterable[str], vocab_size: int, max_length: int) -> Tokenizer:
    """Train a byte-level BPE tokenizer on captions, as CLIP's: lower case, "</w>" at the end of a word.

    The order of the captions does not matter. The vocabulary contains every byte, so no text is unknown.

    Raises:
        ValueError: vocab_size is below 514, or the captions contain no text.
    """
    from tokenizers import Tokenizer as Backend
    from tokenizers import models, pre_tokenizers, trainers
    from transformers import CLIPTokenizer

    if vocab_size < SMALLEST_VOCABULARY:
        raise ValueError(f"vocab_size {vocab_size} can't hold all bytes; it must be at least {SMALLEST_VOCABULARY}")
    clip = CLIPTokenizer().backend_tokenizer
    trained = Backend(models.BPE(end_of_word_suffix="</w>"))
    trained.normalizer, trained.pre_tokenizer = clip.normalizer, clip.pre_tokenizer
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    ends = [f"{letter}</w>" for letter in letters]
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, end_of_word_suffix="</w>", initial_alphabet=letters, show_progress=False,
        special_tokens=ends,  # otherwise the order of a hash map numbers them and breaks ties between pairs
    )  # fmt: skip
    texts = (caption.encode("utf-8", "replace").decode().replace("\0", " ") for caption in captions)
    trained.train_from_iterator(texts, trainer)
    merges = [tuple(pair) for pair in json.loads(trained.to_str())["model"]["merges"]]
    if not merges:
        raise ValueError("the captions have no repeated words to train a tokenizer on; use more captions")
    merges = merges[: vocab_size - SMALLEST_VOCABULARY]
    pieces = [*letters, *ends, *("".join(pair) for pair in merges), START, END]
    vocabulary = {piece: index for index, piece in enumerate(dict.fromkeys(pieces))}
    with tempfile.TemporaryDirectory() as folder:
        CLIPTokenizer(vocabulary, merges, model_max_length=max_length).save_pretrained(folder)
        return read_tokenizer(Path(folder), max_length)


def random_transformer(config: TransformerConfig, tokenizer: Tokenizer, seed: int, projection: bool = False) -> Clip:
    """Return a CLIPTextModel for a tokenizer with weights drawn from the seed, without a change to global random state.

    Args:
        projection: Whether to add the projection of the pooled output.
    """
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    if config.width % config.heads:
        raise ValueError(f"width {config.width} is not divisible by {config.heads} heads; change one of the two")
    start, end = (tokenizer.backend.token_to_id(token) for token in (START, END))
    settings = CLIPTextConfig(
        vocab_size=tokenizer.backend.get_vocab_size(),
        hidden_size=config.width,
        intermediate_size=4 * config.width,
        num_hidden_layers=config.layers,
        num_attention_heads=config.heads,
        max_position_embeddings=config.max_length,
        projection_dim=config.width,
        bos_token_id=start,
        eos_token_id=end,
        pad_token_id=end,
    )
    with torch.random.fork_rng(devices=[]), quiet():
        torch.manual_seed(seed)
        weights = (CLIPTextModelWithProjection if projection else CLIPTextModel)(settings).float().state_dict()
    clip = empty_clip(clip_config(settings.to_dict() | (PROJECTS if projection else {})))
    place(clip, clip_weights(weights, config.layers, projection), "a random CLIPTextModel")
    return clip
