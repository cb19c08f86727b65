"""A small CLIP (Radford et al. 2021) of open_clip, trained on captioned shapes in 7 minutes on one core."""

from __future__ import annotations

import json
import random
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stipple_core.files.weights import write_weights
from stipple_core.images.images import image_to_tensor
from tests.helpers.data.shapes import PAIRS, SINGLES, Scene, caption, draw

STEPS = 2000
LENGTH = 16  # tokens; the longest caption has 11
CONFIG = {
    "embed_dim": 64,
    "vision_cfg": {"image_size": 32, "layers": 3, "width": 96, "head_width": 32, "patch_size": 8},
    "text_cfg": {"context_length": LENGTH, "vocab_size": 49408, "width": 64, "heads": 2, "layers": 3},
}
PREPROCESS = {"mean": [0.5, 0.5, 0.5], "std": [0.5, 0.5, 0.5], "interpolation": "bicubic", "resize_mode": "shortest"}
HELD_OUT = set(random.Random(1).sample(PAIRS, 60))  # scenes that are not used for training


def pictures(scenes: list[Scene], draws: random.Random) -> Tensor:
    """Draw one image of each scene, [B, 3, 32, 32] in [-1, 1]."""
    return torch.stack([image_to_tensor(draw(scene, draws)) for scene in scenes])


def contrast(images: Tensor, texts: Tensor, scale: Tensor, same: Tensor) -> Tensor:
    """CLIP's loss for unit vectors [B, d]. `same` [B, B] marks equal captions, which share the target probability."""
    logits, target = scale * images @ texts.T, same.float() / same.sum(1, keepdim=True)
    return (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target.T)) / 2


def train(steps: int, batch: int = 64, seed: int = 0) -> nn.Module:
    """Train an open_clip.CLIP on steps x batch images of scenes that are not held out."""
    import open_clip
    from open_clip.tokenizer import SimpleTokenizer

    torch.manual_seed(seed)
    draws, tokenizer = random.Random(seed), SimpleTokenizer(context_length=LENGTH)
    model = open_clip.CLIP(**CONFIG).train()
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3, betas=(0.9, 0.98), weight_decay=0.05, fused=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-3, steps, pct_start=0.1)
    seen = [scene for scene in PAIRS if scene not in HELD_OUT]
    ids = {scene: tokenizer([caption(scene)])[0] for scene in [*SINGLES, *seen]}
    for step in range(steps):
        scenes = [draws.choice(SINGLES if draws.random() < 1 / 4 else seen) for _ in range(batch)]
        tokens = torch.stack([ids[scene] for scene in scenes])
        same = (tokens[:, None] == tokens[None]).all(-1)
        images, texts, scale = model(pictures(scenes, draws), tokens)
        loss = contrast(images, texts, scale, same)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        model.logit_scale.data.clamp_(0, 4.6052)
        if step % 100 == 99:
            print(f"step {step + 1}: loss {loss.item():.3f}, scale {scale.item():.1f}", flush=True)
    return model.eval()


def save(model: nn.Module, folder: Path) -> None:
    """Write open_clip_config.json and open_clip_model.safetensors, which `local-dir:FOLDER` reads."""
    folder.mkdir(parents=True, exist_ok=True)
    config = {"model_cfg": CONFIG, "preprocess_cfg": {**PREPROCESS, "size": CONFIG["vision_cfg"]["image_size"]}}
    (folder / "open_clip_config.json").write_text(json.dumps(config, indent=2))
    write_weights(model.state_dict(), folder / "open_clip_model.safetensors")
