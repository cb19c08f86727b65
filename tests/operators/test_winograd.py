"""Winograd's convolution and its gradients against PyTorch's in float64, and the memory layout that enables it."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from autoencoder import Autoencoder, AutoencoderConfig
from ldm.networks.unet import UNet
from ldm.networks.unet_config import UNetConfig
from stipple_core.operators import winograd_tiles
from stipple_core.operators.winograd import Convolution, convolve, has_fast_layout, keep_transforms, lay_out

SHAPES = [  # batch, channels, out, height, width
    (1, 96, 96, 4, 4),  # few pixels: one product with all patches
    (2, 96, 128, 13, 9),
    (3, 128, 96, 9, 30),  # no side a multiple of the tile
    (2, 640, 96, 16, 12),  # several blocks of weights
]


def relative(value: torch.Tensor, exact: torch.Tensor) -> float:
    return ((value.double() - exact).norm() / exact.norm()).item()


@pytest.mark.parametrize("tiles", [winograd_tiles.FEWEST_TILES, 12], ids=["one band", "bands"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_values_and_gradients_equal_the_definition(shape, tiles, monkeypatch):
    if tiles == 12:  # as for a cache of size 0: bands of rows of one image, and of several images
        monkeypatch.setattr(winograd_tiles, "FEWEST_TILES", tiles)
        monkeypatch.setattr(winograd_tiles, "TILES_IN_CACHE", 0)
        monkeypatch.setattr(winograd_tiles, "FEW_PIXELS", 0)
        rows, columns = -(-shape[3] // winograd_tiles.TILE), -(-shape[4] // winograd_tiles.TILE)
        assert (len(list(winograd_tiles.bands(shape[0], rows, columns, 1))) > 1) == (shape[0] * rows * columns > tiles)
    batch, channels, out, height, width = shape
    torch.manual_seed(0)
    x, weight = torch.randn(batch, channels, height, width), torch.randn(out, channels, 3, 3) / channels**0.5
    bias, gradient = torch.randn(out), torch.randn(batch, out, height, width)
    inputs = [value.requires_grad_() for value in (x, weight, bias)]
    exact = [value.detach().double().requires_grad_() for value in inputs]
    result, expected = convolve(*inputs), F.conv2d(*exact, padding=1)
    assert relative(result, expected) < 5e-6
    for computed, reference in zip(
        torch.autograd.grad(result, inputs, gradient),
        torch.autograd.grad(expected, exact, gradient.double()),
        strict=True,
    ):
        assert computed.shape == reference.shape
        assert relative(computed, reference) < 5e-6


def test_a_frozen_weight_and_an_absent_bias_get_no_gradient():
    x, weight = torch.randn(1, 96, 8, 8, requires_grad=True), torch.randn(96, 96, 3, 3)
    convolve(x, weight).sum().backward()
    assert x.grad is not None and weight.grad is None


def test_only_a_weight_that_is_laid_out_uses_winograd(monkeypatch):
    convolution, x = Convolution(96, 96), torch.randn(1, 96, 8, 8)
    slow = convolution(x)
    assert torch.equal(slow, F.conv2d(x, convolution.weight, convolution.bias, padding=1))
    lay_out(convolution)
    calls = []
    monkeypatch.setattr(
        "stipple_core.operators.winograd.convolve", lambda *inputs: calls.append(inputs) or convolve(*inputs)
    )
    assert relative(convolution(x), slow.double()) < 5e-6 and len(calls) == 1
    assert relative(convolution.double()(x.double()), slow.double()) < 5e-6 and len(calls) == 1  # float64


def test_autocast_uses_pytorchs_convolution():
    convolution, x = lay_out(Convolution(96, 96)), torch.randn(1, 96, 16, 16)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        result = convolution(x)
    exact = F.conv2d(x.double(), convolution.weight.double(), convolution.bias.double(), padding=1)
    assert result.dtype == torch.bfloat16 and relative(result, exact) < 1e-2  # Winograd in bfloat16 is ten times worse


def test_lay_out_changes_only_the_order_of_memory():
    config = UNetConfig(
        block_out_channels=(96, 96), attention_levels=(False, True), attention_heads=(4,), cross_attention_dim=None
    )
    torch.manual_seed(0)
    unet = UNet(config)
    before = {name: value.clone() for name, value in unet.state_dict().items()}
    lay_out(unet)
    after = unet.state_dict()
    assert list(before) == list(after)
    assert all(torch.equal(before[name], after[name]) for name in before)
    laid_out = [
        name
        for name, module in unet.named_modules()
        if isinstance(module, nn.Conv2d) and has_fast_layout(module.weight)
    ]
    assert "down_blocks.0.resnets.0.conv1" in laid_out and "conv_out" not in laid_out


def test_narrow_convolutions_use_pytorchs_memory_order():
    assert not has_fast_layout(lay_out(Convolution(32, 32)).weight)


def test_networks_of_both_stages_agree_with_and_without_lay_out():
    torch.manual_seed(0)
    autoencoder = Autoencoder(AutoencoderConfig(block_out_channels=(96, 128), layers_per_block=1)).eval()
    unet = UNet(UNetConfig(block_out_channels=(96, 128), attention_levels=(False, True), attention_heads=(4,)))
    for parameter in unet.parameters():  # the zero layers, too
        nn.init.normal_(parameter, std=0.5 * parameter[0].numel() ** -0.5 if parameter.ndim > 1 else 0.1)
    images, z, timestep = torch.randn(1, 3, 32, 24), torch.randn(2, 4, 16, 12), torch.tensor([3.0, 700.0])
    context = TokensOnly(torch.randn(2, 5, 1280))
    with torch.no_grad():
        slow = autoencoder(images).images, unet(z, timestep, context)
        lay_out(autoencoder), lay_out(unet)
        fast = autoencoder(images).images, unet(z, timestep, unet.read(context))
    for computed, exact in zip(fast, slow, strict=True):
        assert relative(computed, exact.double()) < 1e-5


class TokensOnly:
    """A context with tokens only."""

    mask = vector = latents = None

    def __init__(self, tokens: torch.Tensor):
        self.tokens = tokens


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_kept_transforms_give_equal_results_and_are_computed_once(shape, monkeypatch):
    batch, channels, out, height, width = shape
    torch.manual_seed(0)
    convolution = keep_transforms(lay_out(Convolution(channels, out)))
    x = torch.randn(batch, channels, height, width)
    made = []
    transform = winograd_tiles.transform
    monkeypatch.setattr(winograd_tiles, "transform", lambda weight: made.append(len(weight)) or transform(weight))
    with torch.no_grad():
        results = [convolution(x) for _ in range(3)]
    assert len(made) == (1 if batch * height * width > winograd_tiles.FEW_PIXELS else 0)
    expected = F.conv2d(x.double(), convolution.weight.double(), convolution.bias.double(), padding=1)
    assert relative(results[0], expected) < 5e-6
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])


def test_transforms_are_computed_anew_with_gradients():
    convolution = keep_transforms(lay_out(Convolution(96, 96)))
    x = torch.randn(1, 96, 16, 16)
    with torch.no_grad():
        before = convolution(x)
        convolution.weight.mul_(2)
        convolution.bias.zero_()
    assert not torch.allclose(convolution(x), before)  # with gradients
    assert convolution(x).requires_grad


@pytest.mark.parametrize("options", [dict(kernel_size=(1, 1), bias=False), dict(kernel_size=5), dict(padding=0)])
def test_other_kernels_strides_and_paddings_use_pytorchs_convolution(options):
    """peft makes the low-rank factors of a layer with the layer's class; from rank 96 on they would seem to fit."""
    convolution, x = Convolution(96, 128, **options), torch.randn(2, 96, 16, 16)
    before = F.conv2d(x, convolution.weight, convolution.bias, padding=convolution.padding)
    with torch.no_grad():
        assert torch.allclose(lay_out(convolution)(x), before, atol=1e-4)
    assert convolution(x).shape == before.shape
