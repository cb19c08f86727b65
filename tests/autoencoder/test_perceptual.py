"""Perceptual distances, and the network of features that is trained on the training images."""

import itertools

import pytest
import torch
import torch.nn.functional as F

from autoencoder.losses.lpips import LPIPS, VGG16, VGG16_STAGES
from autoencoder.losses.perceptual import PERCEPTUAL, MultiScaleSSIM, PerceptualConfig, make_perceptual
from autoencoder.losses.similarity import ssim
from autoencoder.losses.trained_features import (
    DEGRADATIONS,
    FeatureConfig,
    FeatureDistance,
    FeatureNetwork,
    disturb,
    train_features,
)

LOCAL = [kind for kind in PERCEPTUAL if kind not in ("none", "lpips")]


def drawings(count=8, size=32, seed=0):
    """Random rectangles on white with a black strip at the bottom, [count, 3, size, size]."""
    g = torch.Generator().manual_seed(seed)
    images = torch.ones(count, 3, size, size)
    for image in images:
        for _ in range(4):
            left, top = torch.randint(0, size - 6, (2,), generator=g).tolist()
            width, height = torch.randint(4, size // 2, (2,), generator=g).tolist()
            color = torch.rand(3, 1, 1, generator=g) * 2 - 1
            image[:, top : top + height, left : left + width] = color
        image[:, -4:] = -1.0
    return images


@pytest.fixture(scope="module")
def vgg_file(tmp_path_factory):
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("vgg") / "vgg16.pth"
    network = VGG16()
    for parameter in network.parameters():
        if parameter.ndim == 4:
            torch.nn.init.kaiming_normal_(parameter)
    torch.save(network.state_dict() | {"classifier.0.weight": torch.zeros(2, 2)}, path)
    return str(path)


@pytest.fixture(scope="module")
def linear_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("linear") / "vgg.pth"
    torch.manual_seed(0)
    widths = [stage[-1][2] for stage in VGG16_STAGES]
    torch.save({f"lin{i}.model.1.weight": torch.rand(1, width, 1, 1) for i, width in enumerate(widths)}, path)
    return str(path)


@pytest.mark.parametrize("kind", LOCAL)
def test_the_distance_of_an_image_to_itself_is_zero_and_grows_with_noise(kind):
    torch.manual_seed(0)
    distance, images = make_perceptual(PerceptualConfig(kind=kind)), drawings()
    noise = torch.randn_like(images)
    assert distance(images, images).abs().max() < 1e-5
    values = [distance(images, images + level * noise) for level in (0.05, 0.1, 0.2)]
    assert values[0].shape == (8,)
    assert (values[0] > 0).all() and (values[1] > values[0]).all() and (values[2] > values[1]).all()


@pytest.mark.parametrize("kind", LOCAL)
def test_the_distance_of_a_sample_does_not_depend_on_its_batch(kind):
    torch.manual_seed(0)
    distance, images = make_perceptual(PerceptualConfig(kind=kind)), drawings()
    others = images + 0.1 * torch.randn_like(images)
    assert torch.allclose(distance(images, others)[2:4], distance(images[2:4], others[2:4]), rtol=1e-4)


@pytest.mark.parametrize("kind", LOCAL)
def test_gradient_descent_on_a_distance_approaches_the_image(kind):
    torch.manual_seed(0)
    distance, images = make_perceptual(PerceptualConfig(kind=kind)), drawings(count=2)
    guess = F.avg_pool2d(images, 5, stride=1, padding=2).requires_grad_()
    optimizer = torch.optim.Adam([guess], lr=0.02)
    start = distance(images, guess).sum().item()
    for _ in range(25):
        optimizer.zero_grad()
        distance(images, guess).sum().backward()
        assert guess.grad.isfinite().all()
        optimizer.step()
    assert distance(images, guess).sum().item() < 0.6 * start


def test_ms_ssim_with_one_scale_is_ssim():
    images = drawings(size=16)  # large enough for one scale only
    others = (images + 0.1 * torch.randn_like(images)).clamp(-1, 1)
    assert torch.allclose(1 - MultiScaleSSIM()(images, others), ssim(images, others), atol=1e-6)


def test_ms_ssim_keeps_its_precision_under_autocast():
    images = drawings()
    others = images + 0.02 * torch.randn_like(images)
    with torch.autocast("cpu", torch.bfloat16):
        mixed = MultiScaleSSIM()(images, others)
    assert torch.equal(mixed, MultiScaleSSIM()(images, others))


def test_images_smaller_than_the_window_of_ms_ssim_are_an_error():
    with pytest.raises(ValueError, match="image size 8 is below the SSIM window; use at least 11"):
        MultiScaleSSIM()(torch.zeros(1, 3, 8, 8), torch.zeros(1, 3, 8, 8))


def test_focal_frequency_has_weight_1_for_the_worst_frequency():
    wave = torch.cos(torch.arange(16) * torch.pi / 2).expand(1, 3, 16, 16)
    distance = PERCEPTUAL["focal_frequency"](PerceptualConfig())
    spectrum = torch.fft.rfft2(wave, norm="ortho").abs().square()
    assert distance(torch.zeros_like(wave), wave).item() == pytest.approx(spectrum.mean().item(), rel=1e-5)


def test_lpips_is_the_weighted_difference_of_unit_features(vgg_file, linear_file):
    lpips, images = LPIPS.load(vgg_file, linear_file), drawings(count=2)
    others = (images + 0.2 * torch.randn_like(images)).clamp(-1, 1)
    weights, linear = torch.load(vgg_file), torch.load(linear_file)
    expected = torch.zeros(2)
    features, mean, std = [], torch.tensor([-0.030, -0.088, -0.188]), torch.tensor([0.458, 0.448, 0.450])
    for x in (images, others):
        x = (x - mean[:, None, None]) / std[:, None, None]
        features.append([])
        for layer in range(30):
            name = f"features.{layer}"
            if f"{name}.weight" in weights:
                x = F.conv2d(x, weights[f"{name}.weight"], weights[f"{name}.bias"], padding=1).relu()
            if layer in (4, 9, 16, 23):  # torchvision's max-pools
                x = F.max_pool2d(x, 2)
            if layer in (2, 7, 14, 21, 28):
                features[-1].append(F.normalize(x, dim=1))
    for i, (a, b) in enumerate(zip(*features, strict=True)):
        expected += F.conv2d((a - b).square(), linear[f"lin{i}.model.1.weight"]).mean(dim=(1, 2, 3))
    assert torch.allclose(lpips(images, others), expected, rtol=1e-4)


def test_lpips_is_frozen_and_has_gradients_for_reconstructions(vgg_file, linear_file):
    lpips, images = LPIPS.load(vgg_file, linear_file), drawings(count=2)
    others = images.clone().requires_grad_()
    lpips(images, others + 0.1).sum().backward()
    assert others.grad.isfinite().all() and others.grad.norm() > 0
    assert not any(parameter.requires_grad for parameter in lpips.parameters())


def test_the_error_for_missing_lpips_weights_tells_where_to_get_them(vgg_file, tmp_path):
    with pytest.raises(FileNotFoundError, match="VGG16 weights, and None is not a file; get vgg16-397923af.pth"):
        make_perceptual(PerceptualConfig(kind="lpips"))
    with pytest.raises(FileNotFoundError, match="LPIPS weights, and .* is not a file; get lpips/weights/v0.1/vgg.pth"):
        LPIPS.load(vgg_file, str(tmp_path / "absent.pth"))


def test_wrong_lpips_weights_are_an_error(vgg_file, linear_file):
    with pytest.raises(ValueError, match="does not contain VGG16"):
        LPIPS.load(linear_file, linear_file)
    with pytest.raises(ValueError, match="does not contain lin0.model.1.weight"):
        LPIPS.load(vgg_file, vgg_file)


def test_an_unknown_distance_is_an_error():
    with pytest.raises(ValueError, match="'vgg' is unknown; use one of none, lpips"):
        make_perceptual(PerceptualConfig(kind="vgg"))


def trained(seed=0, steps=5):
    config = FeatureConfig(channels=(8, 8, 16), steps=steps)
    torch.manual_seed(seed)  # must not matter
    network = FeatureNetwork(config)
    images = itertools.cycle([drawings(seed=0), drawings(seed=1)])
    return network, train_features(network, images, config, torch.Generator().manual_seed(7))


def test_training_features_depends_only_on_generator_and_images():
    (network, losses), (other, other_losses) = trained(0), trained(1)
    assert losses == other_losses
    assert all(torch.equal(a, b) for a, b in zip(network.parameters(), other.parameters(), strict=True))
    assert not any(parameter.requires_grad for parameter in network.parameters())


def test_training_features_decreases_the_loss():
    _, losses = trained(steps=80)
    assert sum(losses[-10:]) < 0.85 * sum(losses[:10])


def test_trained_features_are_restored_from_their_state_dict():
    distance, images = FeatureDistance(trained()[0]), drawings()
    others = images + 0.1
    again = FeatureDistance(FeatureNetwork(FeatureConfig(channels=(8, 8, 16))))
    again.load_state_dict(distance.state_dict())
    for loaded, own in zip(again.parameters(), distance.parameters(), strict=True):
        assert torch.equal(loaded, own) and loaded.stride() == own.stride()  # other strides take other kernels
    assert torch.equal(again(images, others), distance(images, others))


def test_disturb_rotates_and_degrades_each_image_as_specified():
    images = drawings(count=4)
    none, blur = list(DEGRADATIONS).index("none"), list(DEGRADATIONS).index("blur 3")
    turns, kinds = torch.tensor([0, 1, 2, 0]), torch.tensor([none, none, none, blur])
    result = disturb(images, turns, kinds, torch.Generator())
    assert torch.equal(result[0], images[0])
    assert torch.equal(result[1], torch.rot90(images[1], 1, dims=(1, 2)))
    assert torch.equal(result[2], images[2].flip(1, 2))
    assert torch.allclose(result[3, :, 1:-1, 1:-1], F.avg_pool2d(images[3:], 3, stride=1)[0], atol=1e-6)
