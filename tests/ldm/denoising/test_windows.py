"""Windows fused at every step: when they change nothing, the context of each, and that settings record them."""

from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from conditioning import Context
from ldm.denoising.perturbed_context import PerturbedContext
from ldm.denoising.windows import Windowed
from ldm.sampling.settings import Settings
from tests.helpers.models.small_models import SIDE, build_model

SIZES = [(8, 8), (8, 21), (37, 16), (19, 40)]  # of latents


def noise(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def blur(z_t, timestep, context):
    """A local network: each output sees one latent to each side, and depends on the time."""
    return F.avg_pool2d(z_t.tanh(), 3, stride=1, padding=1) * timestep[:, None, None, None]


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_a_network_that_sees_less_than_the_rim_is_wide_gives_the_same(size):
    z_t, condition = noise(2, 3, *size), torch.tensor([3.0, 700.0])
    fused = Windowed(blur, 8, 4)(z_t, condition, None)
    torch.testing.assert_close(fused, blur(z_t, condition, None), rtol=0, atol=1e-12)


@pytest.mark.parametrize("overlap", range(5))
def test_weights_add_up_to_1_for_every_size(overlap):
    for length in range(4, 60):
        constant = Windowed(lambda z_t, *_: torch.ones_like(z_t), 8, overlap)(noise(1, 1, length, 9), None, None)
        torch.testing.assert_close(constant, torch.ones_like(constant), rtol=0, atol=1e-12)


def test_latents_that_fit_into_one_window_are_handed_on_as_they_are():
    seen = []
    context, z_t, t = Context(latents=noise(1, 1, 8, 6)), noise(1, 2, 8, 6), torch.ones(1)
    result = Windowed(lambda *condition: seen.append(condition) or condition[0], 8, 4)(z_t, t, context)
    assert result is z_t and seen[0][2] is context and len(seen) == 1


@pytest.mark.parametrize("overlap", range(5))
def test_windows_overlap_as_configured_and_are_no_more_than_needed(overlap):
    for length in range(4, 60):
        starts = []
        network = Windowed(lambda z_t, *_: starts.append(z_t.storage_offset()) or z_t, 8, overlap)  # noqa: B023
        network(noise(1, 1, 1, length), None, None)
        assert starts[0] == 0 and starts[-1] == max(0, length - 8)
        assert all(0 < distance <= 8 - overlap for distance in np.diff(starts))
        assert len(starts) == max(1, -(-(length - overlap) // (8 - overlap)))


@pytest.mark.parametrize("perturbed", [False, True])
def test_a_window_has_its_part_of_the_context_latents_and_all_tokens(perturbed):
    """An output that depends on the aligned map and nothing else is whole where each window has its own part."""
    condition = Context(tokens=noise(1, 3, 5), vector=noise(1, 4), latents=noise(1, 2, 20, 30))
    context = PerturbedContext(condition, 1, ("mid_block",)) if perturbed else condition

    def echo(z_t, timestep, context):
        inner = context.context if perturbed else context
        assert inner.tokens is condition.tokens and inner.vector is condition.vector
        return inner.latents

    fused = Windowed(echo, 8, 4)(noise(1, 2, 20, 30), torch.ones(1), context)
    torch.testing.assert_close(fused, condition.latents, rtol=0, atol=1e-12)


def test_a_context_without_latents_stays_the_same_object_so_that_it_is_read_once():
    seen = set()
    context = Context(tokens=noise(1, 3, 5))
    Windowed(lambda z, t, c: seen.add(id(c)) or z, 8, 4)(noise(1, 1, 8, 30), torch.ones(1), context)
    assert seen == {id(context)}


@pytest.mark.parametrize(
    "provided, word",
    [
        ({"window": 1}, "window 1"),
        ({"window": 8, "overlap": 5}, "overlap 5"),
        ({"window": 8, "overlap": -1}, "overlap -1"),
    ]
    + [({"overlap": 2}, "requires window"), ({"window": 8, "reuse": 2}, "reuse 2")],
)
def test_windows_that_can_not_be_are_refused_in_one_line(provided, word):
    with pytest.raises(ValueError, match=word) as error:
        Settings(**provided)
    assert "\n" not in str(error.value)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return build_model(tmp_path_factory.mktemp("encoder"), encoder="bert")


def pixels(images) -> np.ndarray:
    return np.stack([np.asarray(image) for image in images]).astype(int)


def test_a_picture_that_one_window_holds_is_the_plain_one_bit_for_bit(model):
    plain = pixels(model("a cat"))
    assert np.array_equal(pixels(model("a cat", window=SIDE // 4)), plain)
    assert not np.array_equal(pixels(model("a cat", window=SIDE // 8)), plain)


@pytest.mark.parametrize("method", ["classifier_free", "perturbed_attention", "apg"])
def test_every_guidance_works_on_windows_and_batches_do_not_matter(model, method):
    settings = dict(window=8, overlap=3, width=2 * SIDE, steps=2, guidance_method=method, num_images=2)
    alone, together = (pixels(model("a cat", batch_size=size, **settings)) for size in (1, 2))
    assert alone.shape == (2, SIDE, 2 * SIDE, 3) and np.abs(alone - together).max() <= 1


def test_windows_bound_what_the_network_sees(model, monkeypatch):
    sizes, forward = [], model.unet.forward
    monkeypatch.setattr(
        model.unet, "forward", lambda z_t, *condition: sizes.append(z_t.shape[2:]) or forward(z_t, *condition)
    )
    model("a cat", window=8, overlap=4, width=5 * SIDE, steps=1)
    assert len(sizes) > 5 and set(sizes) == {(8, 8)}


def test_a_record_of_windows_makes_the_picture_again(model):
    (made,) = model.generate("a cat", window=8, overlap=2, width=2 * SIDE, steps=2)
    assert (made.settings.window, made.settings.overlap) == (8, 2)
    again = replace(made.settings)
    *_, last = model.sample([again])
    (same,) = model.finish([again], last.z)
    assert same.image.tobytes() == made.image.tobytes()
