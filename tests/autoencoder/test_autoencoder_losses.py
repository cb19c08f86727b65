"""The losses of the autoencoder and of its discriminator."""

import pytest
import torch

from autoencoder import Autoencoder, AutoencoderConfig, DiscriminatorConfig, PatchDiscriminator
from autoencoder.losses.adversarial_loss import Adversary, adaptive_weight, discriminator_loss, feature_matching
from autoencoder.losses.generator_loss import LossConfig, generator_loss

SMALL = dict(block_out_channels=(16, 32), layers_per_block=1, norm_num_groups=8, codebook_size=64)


def parts(regularizer="kl", seed=0):
    torch.manual_seed(seed)
    autoencoder = Autoencoder(AutoencoderConfig(regularizer=regularizer, **SMALL)).double()
    discriminator = PatchDiscriminator(DiscriminatorConfig(channels=8, layers=2)).double()
    return autoencoder, discriminator, torch.rand(2, 3, 16, 16, dtype=torch.float64) * 2 - 1


def test_the_kl_loss_is_that_of_ldm_divided_by_the_number_of_values():
    autoencoder, _, x = parts()
    reconstruction = autoencoder(x)
    ldm = (x - reconstruction.images).abs().sum() / 2 + 1e-6 * reconstruction.posterior.kl().sum() / 2
    loss = generator_loss(x, reconstruction, LossConfig())
    assert loss.total.item() == pytest.approx(ldm.item() / (3 * 16 * 16))


def test_the_codebook_loss_is_not_scaled():
    autoencoder, _, x = parts("vq")
    reconstruction = autoencoder(x)
    loss = generator_loss(x, reconstruction, LossConfig())
    assert loss.kl is None
    assert loss.total.item() == pytest.approx(loss.pixel.item() + reconstruction.codebook_loss.item())


def test_the_perceptual_distance_is_weighted_and_has_gradients():
    autoencoder, _, x = parts()
    reconstruction = autoencoder(x)

    def distance(a, b):
        return (a - b).square().mean(dim=(1, 2, 3))

    loss = generator_loss(x, reconstruction, LossConfig(pixel=0.0, perceptual=2.0, kl=0.0), distance)
    assert loss.total.item() == pytest.approx(2.0 * distance(x, reconstruction.images).mean().item())
    loss.total.backward()
    assert autoencoder.encoder.conv_in.weight.grad.norm() > 0


def test_the_adaptive_weight_balances_gradients_at_the_last_layer():
    autoencoder, discriminator, x = parts()
    reconstruction = autoencoder(x)
    nll = (x - reconstruction.images).abs().mean()
    adversarial = -discriminator(reconstruction.images)[0].mean()
    weight = adaptive_weight(nll, adversarial, autoencoder.last_layer)
    norms = [
        torch.autograd.grad(term, autoencoder.last_layer, retain_graph=True)[0].norm() for term in (nll, adversarial)
    ]
    assert weight.item() == pytest.approx((norms[0] / (norms[1] + 1e-4)).item()) and not weight.requires_grad
    huge = adaptive_weight(1e9 * nll, 1e-9 * adversarial, autoencoder.last_layer)
    assert huge.item() == 1e4


def test_the_adversarial_term_is_that_of_ldm():
    autoencoder, discriminator, x = parts()
    reconstruction = autoencoder(x)
    plain = generator_loss(x, reconstruction, LossConfig())
    adversary = Adversary(*discriminator(reconstruction.images))
    loss = generator_loss(x, reconstruction, LossConfig(adversarial=0.5), None, adversary, autoencoder.last_layer)
    expected = plain.total + 0.5 * loss.adaptive_weight * -adversary.logits.mean()
    assert loss.total.item() == pytest.approx(expected.item())
    assert loss.feature_matching is None


def test_the_hinge_loss_is_zero_for_confident_logits_and_one_for_zero_logits():
    assert discriminator_loss(torch.full((2, 1, 3, 3), 1.5), torch.full((2, 1, 3, 3), -1.5)) == 0.0
    assert discriminator_loss(torch.zeros(2, 1, 3, 3), torch.zeros(2, 1, 3, 3)) == 1.0


def test_feature_matching_is_zero_for_equal_images_and_trains_only_the_autoencoder():
    autoencoder, discriminator, x = parts()
    assert feature_matching(discriminator(x)[1], discriminator(x)[1]) == 0.0
    image_features = [feature.detach().requires_grad_() for feature in discriminator(x)[1]]
    reconstruction = autoencoder(x)
    feature_matching(image_features, discriminator(reconstruction.images)[1]).backward()
    assert image_features[0].grad is None
    assert autoencoder.last_layer.grad.norm() > 0


def test_scalars_are_the_terms_in_use_without_gradients():
    autoencoder, discriminator, x = parts()
    reconstruction = autoencoder(x)
    adversary = Adversary(*discriminator(reconstruction.images), discriminator(x)[1])
    loss = generator_loss(x, reconstruction, LossConfig(feature_matching=1.0), None, adversary, autoencoder.last_layer)
    names = {"total", "pixel", "kl", "adversarial", "adaptive_weight", "feature_matching"}
    assert set(loss.scalars()) == names
    assert not any(value.requires_grad for value in loss.scalars().values())


@pytest.mark.parametrize("layers, pixels", [(1, 16), (2, 34), (3, 70)])
def test_the_receptive_field_of_a_logit_is_the_documented_one(layers, pixels):
    discriminator = PatchDiscriminator(DiscriminatorConfig(channels=4, layers=layers, norm="batch")).eval()
    x = torch.zeros(1, 3, 128, 128, requires_grad=True)
    logits, features = discriminator(x)
    logits[0, 0, logits.shape[2] // 2, logits.shape[3] // 2].backward()
    seen = x.grad.abs().sum(dim=(0, 1, 2)) > 0
    assert seen.sum() == pixels and len(features) == layers + 1


def test_logits_depend_on_the_batch_with_batch_norm_and_not_with_group_norm():
    x = torch.rand(4, 3, 32, 32) * 2 - 1
    for norm, independent in (("group", True), ("batch", False)):
        discriminator = PatchDiscriminator(DiscriminatorConfig(channels=8, layers=2, norm=norm))
        logits = discriminator(x)[0]
        assert torch.allclose(logits[:2], discriminator(x[:2])[0], atol=1e-6) is independent


def test_an_unknown_norm_is_an_error():
    with pytest.raises(ValueError, match="norm 'layer' is unknown; use one of group, batch"):
        PatchDiscriminator(DiscriminatorConfig(norm="layer"))


def test_a_discriminator_learns_to_distinguish_sharp_from_blurred():
    torch.manual_seed(0)
    discriminator = PatchDiscriminator(DiscriminatorConfig(channels=8, layers=2))
    optimizer = torch.optim.Adam(discriminator.parameters(), lr=2e-3)
    for _ in range(60):
        real = torch.randn(8, 3, 16, 16)
        fake = torch.nn.functional.avg_pool2d(real, 3, stride=1, padding=1)
        loss = discriminator_loss(discriminator(real)[0], discriminator(fake)[0])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss < 0.3
