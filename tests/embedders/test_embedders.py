"""Tests of embedders: embeddings of open_clip and transformers at unit scale, and storage in model folders."""

import json

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from autoencoder import ImageEmbeddings, open_autoencoder
from stipple_core.embedders import EmbedderConfig, build_embedder
from tests.helpers.models.small_encoders import save_open_clip

PROMPTS = ["a large red circle", "two small cats"]


@pytest.fixture(scope="module")
def config(tmp_path_factory) -> EmbedderConfig:
    return EmbedderConfig(name=f"local-dir:{save_open_clip(tmp_path_factory.mktemp('clip'))}")


@pytest.fixture(scope="module")
def embedder(config):
    return build_embedder(config)


def images(side: int = 32) -> torch.Tensor:
    return torch.rand(2, 3, side, side, generator=torch.Generator().manual_seed(0)) * 2 - 1


def test_embeddings_equal_those_of_open_clip_at_unit_scale(config, embedder):
    import open_clip

    model = open_clip.create_model(config.name).eval()
    mean, std = (torch.tensor(model.visual.preprocess_cfg[name]).reshape(-1, 1, 1) for name in ("mean", "std"))
    expected = model.encode_image(((images() + 1) / 2 - mean) / std), model.encode_text(_ids(20))
    for points, raw in zip((embedder.images(images()), embedder.texts(PROMPTS)), expected, strict=True):
        torch.testing.assert_close(points, F.normalize(raw, dim=-1) * 4)  # sqrt(16)
        torch.testing.assert_close(points.square().mean(1), torch.ones(2))


def _ids(length: int) -> torch.Tensor:
    from open_clip.tokenizer import SimpleTokenizer

    return SimpleTokenizer(context_length=length)(PROMPTS)


def test_embeddings_equal_those_of_transformers(tmp_path):
    from transformers import CLIPConfig, CLIPModel

    torch.manual_seed(0)
    sizes = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2)
    text, vision = {**sizes, "eos_token_id": 49407}, {**sizes, "image_size": 32, "patch_size": 16}
    config = CLIPConfig(text_config=text, vision_config=vision, projection_dim=16)
    config.text_config.projection_dim = config.vision_config.projection_dim = 16
    model = CLIPModel(config).eval()
    model.save_pretrained(tmp_path)
    built = build_embedder(EmbedderConfig(kind="transformers", name=str(tmp_path)))
    mean, std = (torch.tensor(built.config.network[name]).reshape(-1, 1, 1) for name in ("mean", "std"))
    with torch.no_grad():
        expected = model(input_ids=_ids(77), pixel_values=((images() + 1) / 2 - mean) / std)
    again = build_embedder(built.config)
    again.load_state_dict(built.state_dict())
    for embedder in (built, again):
        torch.testing.assert_close(embedder.images(images()), F.normalize(expected.image_embeds, dim=-1) * 4)
        torch.testing.assert_close(embedder.texts(PROMPTS), F.normalize(expected.text_embeds, dim=-1) * 4)


def test_gradients_reach_images_but_not_weights(embedder):
    pixels = images().requires_grad_()
    embedder.images(pixels)[:, 0].sum().backward()
    assert pixels.grad.abs().sum() > 0
    assert all(weight.grad is None and not weight.requires_grad for weight in embedder.parameters())


def test_only_the_center_square_is_embedded(embedder):
    wide = F.pad(images(), (8, 8), value=0.3)
    torch.testing.assert_close(embedder.images(wide), embedder.images(images()))


def test_config_and_weights_are_enough_to_rebuild_an_embedder(embedder):
    shape = json.loads(json.dumps(embedder.config.network))
    with torch.device("meta"):
        again = build_embedder(EmbedderConfig(name="gone", network=shape))
    again.load_state_dict(embedder.state_dict(), assign=True)
    torch.testing.assert_close(again.images(images(48)), embedder.images(images(48)))
    torch.testing.assert_close(again.texts(PROMPTS), embedder.texts(PROMPTS))
    assert again.fingerprint() == embedder.fingerprint() == again.half().fingerprint()


def test_an_unused_tower_is_removed(config, embedder):
    sees, reads = build_embedder(config, texts=False), build_embedder(config, images=False)
    torch.testing.assert_close(sees.images(images()), embedder.images(images()))
    torch.testing.assert_close(reads.texts(PROMPTS), embedder.texts(PROMPTS))
    count = [sum(weight.numel() for weight in each.parameters()) for each in (sees, reads, embedder)]
    assert count[0] + count[1] == count[2]


def test_embeddings_are_converted_to_latents_and_back(config, tmp_path):
    embedder = build_embedder(config, texts=False)
    points = embedder.images(images())
    space = ImageEmbeddings(embedder, mean=torch.full((16,), 0.2), std=torch.full((16,), 0.5))
    space.save(tmp_path)
    again = open_autoencoder(tmp_path)
    latents = again.encode(images()).mode()
    assert latents.shape == (2, 16, 1, 1) and again.downsampling == 32 and again.fingerprint() == space.fingerprint()
    torch.testing.assert_close(latents.flatten(1), (points - 0.2) / 0.5)
    torch.testing.assert_close(again.embeddings(latents), points)
    with pytest.raises(ValueError, match="embeddings, not images"):
        again.decode(latents)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (dict(kind="siglip"), "embedder kind 'siglip' is unknown; use one of open_clip, transformers"),
        (dict(), "an embedder needs `name`"),
        (dict(name="ViT-B-32"), "needs `pretrained`"),
        (dict(name="local-dir:/nowhere"), "can't be loaded"),
        (dict(kind="transformers", name="/nowhere"), "can't be loaded"),
    ],
)
def test_a_mistake_raises_in_one_line(config, message):
    with pytest.raises((ValueError, FileNotFoundError), match=message) as raised:
        build_embedder(EmbedderConfig(**config))
    assert "\n" not in str(raised.value)


def test_an_embedder_never_enters_training_mode(embedder):
    assert isinstance(embedder, nn.Module) and not embedder.train(True).training
