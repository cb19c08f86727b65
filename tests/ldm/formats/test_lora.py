"""Claims about low-rank additions as files: keys of diffusers and Kohya, merged exactly, refused where they misfit."""

import json

import diffusers
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from ldm import TextToImage
from ldm.formats.lora import DIFFUSERS_FILE, KOHYA_FILE, Lora, LowRank, merge, read_lora, save_lora
from stipple.commands.drawing.add_ons import parse_lora
from stipple.stages.ldm.trainable import LoraConfig, LoraLayers
from stipple_core.files.weights import read_metadata
from tests.helpers.models.small_models import build_model

CONFIG = LoraConfig(rank=4, alpha=3.0, targets=["conv1", "to_q", "to_v", "to_out.0", "ff.net.2"], text_encoder=True)
SCHEDULER = {
    "_class_name": "DDIMScheduler",
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "clip_sample": False,
    "set_alpha_to_one": False,
    "steps_offset": 1,
}
DRAWN = dict(height=32, width=32, guidance_scale=5.0)


def adapted(folder) -> TextToImage:
    """A small model with layers of peft in it that have learned something."""
    model = build_model(folder)
    LoraLayers(CONFIG, "").prepare(model, [], 0)
    torch.manual_seed(3)
    for network in (model.unet, model.conditioner):
        for p in network.parameters():
            if p.requires_grad:
                torch.nn.init.normal_(p, std=0.4)
    return model


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model folder that diffusers might have written, and in lora/ what training leaves."""
    folder = tmp_path_factory.mktemp("model")
    build_model(tmp_path_factory.mktemp("encoder")).save(folder)
    (folder / "scheduler" / "scheduler_config.json").write_text(json.dumps(SCHEDULER))
    index = json.loads((folder / "model_index.json").read_text())
    del index["_stipple"]
    index |= {"_class_name": "StableDiffusionPipeline", "scheduler": ["diffusers", "DDIMScheduler"]}
    (folder / "model_index.json").write_text(json.dumps(index))
    LoraLayers(CONFIG, "").save(adapted(tmp_path_factory.mktemp("encoder")), folder / "lora", None)
    return folder


def opened(folder, lora=None, weight=1.0) -> TextToImage:
    model = TextToImage.load(folder)
    if lora is not None:
        merge(read_lora(lora), weight, model.unet, model.conditioner.encoder)
    return model


def drawn(model) -> np.ndarray:
    return np.asarray(model("a red heart", seed=5, steps=5, sampler="ddim", **DRAWN)[0]).astype(int)


def parameters(model) -> dict:
    return {**model.unet.state_dict(), **model.conditioner.encoder.state_dict()}


@pytest.mark.parametrize("file", [DIFFUSERS_FILE, KOHYA_FILE])
def test_diffusers_draws_the_same_with_our_file_as_we_do(file, folder):
    pipeline = diffusers.StableDiffusionPipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    pipeline.load_lora_weights(folder / "lora", weight_name=file)
    reference = pipeline(
        "a red heart", generator=torch.manual_seed(5), num_inference_steps=5, output_type="np", **DRAWN
    )
    reference = reference.images[0] * 255
    stipple_result = drawn(opened(folder, folder / "lora" / file))
    assert np.abs(stipple_result - reference).max() <= 1
    assert np.abs(stipple_result - drawn(opened(folder))).max() > 20  # it does something


def test_both_files_are_the_same_addition_bit_for_bit(folder):
    one, other = (parameters(opened(folder, folder / "lora" / name)) for name in (DIFFUSERS_FILE, KOHYA_FILE))
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_a_file_of_peft_is_merged_as_peft_itself_computes(folder, tmp_path):
    peft, merged = adapted(tmp_path), opened(folder, folder / "lora")
    z, t = torch.randn(2, 4, 8, 8), torch.tensor([500.0, 20.0])
    with torch.no_grad():
        contexts = [model.conditioner.encode(["a red heart", "a cat"]) for model in (peft, merged)]
        outputs = [model.unet(z, t, context) for model, context in zip((peft, merged), contexts, strict=True)]
    assert torch.allclose(contexts[0].tokens, contexts[1].tokens, atol=1e-5)
    assert torch.allclose(*outputs, atol=1e-4) and outputs[0].abs().mean() > 0.03


def test_weight_0_is_the_plain_model_bit_for_bit_and_weights_are_linear(folder):
    plain, none, half, whole = (parameters(opened(folder, folder / "lora", w)) for w in (0.0, 0.0, 0.5, 1.0))
    plain = parameters(opened(folder))
    assert all(torch.equal(plain[name], none[name]) for name in plain)
    middle = {name: (plain[name] + whole[name]) / 2 for name in plain}
    assert all(torch.allclose(half[name], middle[name], atol=1e-6) for name in plain)
    assert any(not torch.equal(plain[name], whole[name]) for name in plain)


def test_the_addition_of_a_convolution_is_a_product_of_matrices_in_whatever_memory_it_lies(folder):
    model = opened(folder)
    layer = "down_blocks.0.resnets.0.conv1"
    weight = model.unet.get_submodule(layer).weight
    before, strides = weight.detach().clone(), weight.stride()
    low = LowRank(down=torch.randn(2, 32, 3, 3), up=torch.randn(32, 2, 1, 1), alpha=1.0)
    merge(Lora({("unet", layer.replace(".", "_")): low}), 0.7, model.unet, None)
    expected = torch.einsum("orxy,rchw->ochw", low.up, low.down) * 0.35
    assert torch.allclose(weight - before, expected, atol=1e-5) and weight.stride() == strides


def test_alphas_come_from_the_file_the_metadata_or_are_the_rank(folder, tmp_path):
    weights = load_file(folder / "lora" / DIFFUSERS_FILE)
    specified = json.loads(read_metadata(folder / "lora" / DIFFUSERS_FILE)["lora_adapter_metadata"])
    save_file(weights, tmp_path / "plain.safetensors")
    specified |= {"unet.lora_alpha": 8, "unet.alpha_pattern": {"attn1.to_q": 2}, "unet.use_rslora": True}
    save_file(weights, tmp_path / "metadata.safetensors", {"lora_adapter_metadata": json.dumps(specified)})
    plain, condition = (read_lora(tmp_path / f"{name}.safetensors").layers for name in ("plain", "metadata"))
    first = "down_blocks.0.attentions.0.transformer_blocks.0"
    assert {low.scale for low in plain.values()} == {1.0}
    assert {low.scale for low in read_lora(folder / "lora").layers.values()} == {0.75}
    assert (
        condition["unet", f"{first}.attn1.to_q"].scale == 1.0 and condition["unet", f"{first}.attn2.to_q"].scale == 4.0
    )


def test_what_is_no_lora_or_of_another_model_is_refused_in_one_line_and_changes_nothing(folder, tmp_path):
    model, path = opened(folder), tmp_path / "x.safetensors"
    lora = read_lora(folder / "lora")
    key = "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"
    half = {f"{key}.lora_A.weight": torch.zeros(2, 32)}
    whole = half | {f"{key}.lora_B.weight": torch.zeros(32, 2)}
    for weights, condition in [
        ({"a.b": torch.zeros(1)}, "no plain LoRA"),
        (whole | {f"{key}.lora_magnitude_vector": torch.zeros(32)}, "lora_magnitude_vector"),
        (half, "one half only"),
        (half | {f"{key}.lora_B.weight": torch.full((32, 2), torch.nan)}, "not finite"),
    ]:
        save_file(weights, path)
        with pytest.raises(ValueError, match=condition):
            read_lora(path)
    before = {name: value.clone() for name, value in parameters(model).items()}
    last = list(lora.layers)[-1]
    for place, low in [
        (("unet", "nowhere.to_q"), lora.layers[last]),
        (last, LowRank(down=torch.zeros(2, 5), up=torch.zeros(7, 2), alpha=1.0)),
    ]:
        with pytest.raises(ValueError, match="not made for this model"):
            merge(Lora({**lora.layers, place: low}), 1.0, model.unet, model.conditioner.encoder)
    assert all(torch.equal(before[name], value) for name, value in parameters(model).items())


def test_half_precision_is_what_is_asked_for(folder, tmp_path):
    save_lora(read_lora(folder / "lora"), tmp_path, torch.float16)
    kinds = {value.dtype for name, value in load_file(tmp_path / KOHYA_FILE).items() if not name.endswith("alpha")}
    assert kinds == {torch.float16}


def test_paths_may_hold_colons(tmp_path):
    assert parse_lora("a/b:0.5") == ("a/b", 0.5) and parse_lora("a/b") == ("a/b", 1.0)
    assert parse_lora("C:\\x.safetensors") == ("C:\\x.safetensors", 1.0) and parse_lora("a:-1e-1") == ("a", -0.1)
    for wrong in ("a:nan", "a:", f"{tmp_path}:abc"):
        with pytest.raises(ValueError, match="has the weight .* finite number"):
            parse_lora(wrong)
    (tmp_path / "b:1").touch()
    assert parse_lora(f"{tmp_path}/b:1") == (f"{tmp_path}/b:1", 1.0)


def test_a_folder_without_a_lora_is_one_line(folder):
    for path in (folder, folder / "nothere"):
        with pytest.raises(
            FileNotFoundError, match=f"there is no LoRA in {path}; use a file, or the folder that training"
        ):
            read_lora(path)
