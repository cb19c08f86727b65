"""`CachedUNet` computes nothing twice, and the error of reused features is bounded."""

import pytest
import torch

from conditioning import Context
from ldm.networks.cached_unet import CachedUNet
from ldm.networks.unet import UNet
from ldm.networks.unet_config import UNetConfig
from tests.helpers.models.small_models import UNET, build_model

WIDTH = 24


@pytest.fixture(scope="module", params=[1, 2], ids=["one layer", "two layers"])
def unet(request) -> UNet:
    torch.manual_seed(0)
    unet = UNet(UNetConfig(**UNET | dict(layers_per_block=request.param), cross_attention_dim=WIDTH)).eval()
    for parameter in unet.parameters():
        torch.nn.init.normal_(parameter, std=0.2 if parameter.ndim == 1 else parameter[0].numel() ** -0.5)
    return unet.requires_grad_(False)


def context(batch: int = 2) -> Context:
    return Context(tokens=torch.randn(batch, 5, WIDTH))


def calls_of(module: torch.nn.Module) -> list[int]:
    """Grows by one with each call."""
    found: list[int] = []
    module.register_forward_hook(lambda *_: found.append(1))
    return found


def test_without_reuse_every_call_is_the_networks_own(unet):
    reader, condition = CachedUNet(unet), context()
    for timestep in (900.0, 500.0, 20.0):
        z_t, timesteps = torch.randn(2, 4, 8, 8), torch.full((2,), timestep)
        assert torch.equal(reader(z_t, timesteps, condition), unet(z_t, timesteps, unet.read(condition)))


@pytest.mark.parametrize("reuse", [2, 3])
def test_inner_layers_are_computed_at_every_nth_call_and_outer_ones_at_each(unet, reuse):
    reader, condition = CachedUNet(unet, reuse), context()
    inner, outer = calls_of(unet.mid_block.resnets[0]), calls_of(unet.down_blocks[0].resnets[0])
    made = []
    for _ in range(7):
        reader(torch.randn(2, 4, 8, 8), torch.full((2,), 500.0), condition)
        made.append((len(outer), len(inner)))
    assert made == [(call + 1, call // reuse + 1) for call in range(7)]


def test_what_is_computed_is_exact_and_what_is_reused_is_exact_where_nothing_changes(unet):
    reader, condition, timesteps = CachedUNet(unet, 2), context(), torch.full((2,), 500.0)
    first, second, third = torch.randn(3, 2, 4, 8, 8)
    exact = [unet(z_t, timesteps, condition) for z_t in (first, second, third)]
    torch.testing.assert_close(reader(first, timesteps, condition), exact[0])
    assert not torch.allclose(reader(second, timesteps, condition), exact[1], rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(reader(third, timesteps, condition), exact[2])
    torch.testing.assert_close(reader(third, timesteps, condition), exact[2])


def test_another_context_or_an_interval_of_guidance_begins_anew(unet):
    reader, timesteps = CachedUNet(unet, 5), torch.full((2,), 500.0)
    z_t, some, others = torch.randn(2, 4, 8, 8), context(), context()
    reader(torch.randn(2, 4, 8, 8), timesteps, some)
    torch.testing.assert_close(reader(z_t, timesteps, others), unet(z_t, timesteps, others))
    torch.testing.assert_close(reader(z_t, timesteps, some), unet(z_t, timesteps, some))


def test_pictures_with_reuse_are_near_those_without_and_nearer_with_more_steps(tmp_path):
    model = build_model(tmp_path, encoder="bert")

    def end(steps: int, reuse: int) -> torch.Tensor:
        (batch,) = model.batches(model.plan("a red heart", sampler="ddim", steps=steps, reuse=reuse), 1)
        *_, last = model.sample(batch)
        return last.z

    errors = [((end(steps, 2) - end(steps, 1)).norm() / end(steps, 1).norm()).item() for steps in (10, 80)]
    assert 0 < errors[1] < errors[0] / 3
