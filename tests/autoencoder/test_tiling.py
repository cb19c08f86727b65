"""Encoding and decoding in tiles equals that of the whole image, for any memory."""

import math

import pytest
import torch

from autoencoder import Autoencoder, AutoencoderConfig
from autoencoder.networks import tiling
from autoencoder.networks.tiling import Features, Local, Region, largest
from stipple.commands.drawing import open_model as opening
from stipple_core.operators.winograd import lay_out

KINDS = {
    "KL": dict(regularizer="kl"),
    "VQ, attention in a level": dict(regularizer="vq", codebook_size=32, attention_levels=(False, True, False)),
}
MEMORY = {  # fraction of the memory for the whole image
    "coarse levels whole, tiles kept": 0.8,
    "tiles computed again": 0.35,
    "smallest tiles": 0.01,
}
SHAPE = (26, 18)  # of latents; 104 x 72 pixels are several tiles even of the largest size


@pytest.fixture(scope="module", params=KINDS)
def exact(request) -> Autoencoder:
    """An autoencoder in float64, with random biases and norms."""
    torch.manual_seed(0)
    config = AutoencoderConfig(
        block_out_channels=(8, 16, 16), layers_per_block=1, norm_num_groups=4, **KINDS[request.param]
    )
    autoencoder = Autoencoder(config).eval()
    for parameter in autoencoder.parameters():
        if parameter.ndim == 1:
            torch.nn.init.normal_(parameter, 0.5, 0.3)
    return autoencoder.double()


def whole(network, x) -> int:
    """The smallest memory for which no tiles are used."""
    return tiling.LIVE * largest(network, x)


def record(module) -> list[torch.Size]:
    """A list to which the sizes of all further outputs of a module are appended."""
    sizes = []
    module.register_forward_hook(lambda module, inputs, output: sizes.append(output.shape))
    return sizes


@pytest.mark.parametrize("share", MEMORY.values(), ids=MEMORY)
@torch.no_grad()
def test_tiles_equal_the_whole_image(exact, share, monkeypatch):
    monkeypatch.setattr(tiling, "LEAST_TILE", 16)
    latents = torch.randn(2, 4, *SHAPE, dtype=torch.float64)
    images = torch.rand(1, 3, 4 * SHAPE[0], 4 * SHAPE[1], dtype=torch.float64) * 2 - 1
    for network, x in ((exact.decoder, latents), (exact.encoder, images)):
        runs = record(network.conv_in if network is exact.encoder else network.conv_out)
        result = tiling.run(network, x, int(share * whole(network, x)))
        assert len(runs) > len(x)  # tiles were used
        torch.testing.assert_close(result, network(x), rtol=0, atol=1e-10)


def test_images_that_fit_into_the_memory_are_computed_whole(exact):
    latents = torch.randn(1, 4, 8, 8, dtype=torch.float64)
    before = exact.memory
    try:
        with torch.no_grad():
            exact.memory = None
            plain = exact.decode(latents)
            exact.memory = whole(exact.decoder, latents)
            assert torch.equal(exact.decode(latents), plain)
            exact.memory -= 1
            assert not torch.equal(exact.decode(latents), plain)  # tiles differ in last bits
        assert exact.decode(latents).requires_grad  # no tiles with gradients
    finally:
        exact.memory = before


@torch.no_grad()
def test_tiles_in_float32_differ_by_less_than_a_tenth_of_an_8_bit_step():
    torch.manual_seed(0)
    autoencoder = lay_out(Autoencoder(AutoencoderConfig(block_out_channels=(96, 96), layers_per_block=1)).eval())
    latents = torch.randn(1, 4, 40, 48)
    autoencoder.memory = None
    plain = autoencoder.decode(latents)
    autoencoder.memory = whole(autoencoder.decoder, latents) // 3
    tiled = autoencoder.decode(latents)
    assert 0 < (tiled - plain).abs().max() < 0.1 / 127.5
    posterior = autoencoder.encode(plain).mode()
    autoencoder.memory = None
    assert (posterior - autoencoder.encode(plain).mode()).abs().max() < 1e-3


@torch.no_grad()
def test_tiles_normalized_separately_would_differ_visibly(exact):
    """The claims above are not trivial: tiles that are normalized separately and blended give another image."""
    latents = torch.randn(1, 4, 6, 48, dtype=torch.float64)
    latents[..., 24:] += 4  # like a bright sky over a dark street
    separate, together = (exact.decoder(part)[..., :32] for part in (latents[..., :24], latents))  # far from the cut
    assert (separate - together).abs().max() > 10 / 127.5


@torch.no_grad()
def test_the_memory_determines_the_size_of_tiles(exact):
    latents = torch.randn(1, 4, 64, 64, dtype=torch.float64)
    sides = [tiling._Tiling(exact.decoder, latents, 2**power).side for power in range(16, 28)]
    assert sides == sorted(sides) and sides[0] == tiling.LEAST_TILE < sides[-1]
    assert math.isclose((sides[-1] / sides[-3]) ** 2, 4, rel_tol=0.05)


@pytest.mark.parametrize("zoom", [0.5, 1.0, 2.0])
def test_any_part_of_a_pending_map_equals_the_part_of_the_whole(zoom):
    torch.manual_seed(0)
    convolution = torch.nn.Conv2d(2, 3, 3, stride=2 if zoom < 1 else 1, padding=0 if zoom < 1 else 1)

    def run(x):
        if zoom > 1:
            x = torch.nn.functional.interpolate(x, scale_factor=2.0)
        return convolution(torch.nn.functional.pad(x, (0, 1, 0, 1)) if zoom < 1 else x)

    x = torch.randn(1, 2, 12, 20)
    layer = Local(run=run, channels=3, zoom=zoom)
    with torch.no_grad():
        features, expected = Features(x).then(layer), run(x)
        assert features.shape == expected.shape[1:]
        _, height, width = features.shape
        for top in range(height):
            for left in range(0, width, 3):
                region = Region(top, min(top + 3, height), left, min(left + 5, width))
                torch.testing.assert_close(features.part(region), region.of(expected))
        torch.testing.assert_close(features.keep(4).kept, expected)


def test_tiles_cover_a_map_once():
    features = Features(torch.zeros(1, 1, 37, 64))
    for region in features.tiles(10):
        region.of(features.kept).add_(1)
        assert region.bottom - region.top <= 10 and region.right - region.left <= 10
    assert (features.kept == 1).all()


@pytest.mark.parametrize("text", ["0", "-1", "nan", "inf", "much"])
def test_a_memory_that_is_not_a_positive_number_of_gib_is_an_error(text):
    with pytest.raises(ValueError, match=f"decode memory {text} must be") as error:
        opening._bytes(text)
    assert "\n" not in str(error.value)
    assert opening._bytes("0.5") == 2**29
