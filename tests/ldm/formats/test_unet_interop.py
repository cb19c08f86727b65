"""Our UNet and diffusers' UNet2DConditionModel, or UNet2DModel where attention is plain, are one network and folder."""

import pytest
import torch
from diffusers import UNet2DConditionModel, UNet2DModel
from safetensors.torch import load_file, save_file

from ldm.formats.diffusers.networks_folder import load_unet, save_unet
from ldm.networks.unet_config import UNetConfig
from tests.helpers.models.diffusers_unets import SHAPES, diffusers_unet, run_diffusers
from tests.helpers.models.small_unets import PLAIN, SMALL, close, context, random_unet


@pytest.fixture(params=SHAPES.values(), ids=SHAPES.keys())
def config(request) -> UNetConfig:
    return request.param


def context_for(config: UNetConfig, masked: bool):
    condition = context(width=config.cross_attention_dim)
    if config.vector_dim:
        condition.vector = torch.randn(2, config.vector_dim)
    if config.in_channels > 4:
        condition.latents = torch.randn(2, config.in_channels - 4, 8, 8)
    if masked and condition.tokens is not None:
        condition.mask = torch.tensor([[True] * 5, [True, True, False, False, False]])
    return condition


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_outputs_and_gradients_are_those_of_diffusers(config, dtype):
    """In float32 gradients are compared all together: those of queries are sums that cancel to a millionth."""
    stipple = random_unet(config).train()
    reference = diffusers_unet(stipple).to(dtype)
    stipple = stipple.to(dtype)
    condition, timestep = context_for(config, masked=dtype == torch.float32), torch.tensor([3.0, 700.25])
    for name, value in vars(condition).items():
        setattr(
            condition, name, value.to(dtype) if isinstance(value, torch.Tensor) and value.is_floating_point() else value
        )
    start = torch.linspace(-2, 2, 2 * 4 * 8 * 8, dtype=dtype).view(2, 4, 8, 8).sin()
    z_ours, z_theirs = start.clone().requires_grad_(), start.clone().requires_grad_()
    output, expected = stipple(z_ours, timestep, condition), run_diffusers(reference, z_theirs, timestep, condition)
    target = torch.randn_like(output)
    (output - target).square().mean().backward()
    (expected - target).square().mean().backward()
    gradients = dict(reference.named_parameters())
    pairs = [(output, expected), (z_ours.grad, z_theirs.grad)]
    found = [  # softmax does not feel the bias of keys: noise
        (value.grad, gradients[name].grad)
        for name, value in stipple.named_parameters()
        if not name.endswith("to_k.bias")
    ]
    if dtype == torch.float32:
        pairs.append(tuple(torch.cat([grad.flatten() for grad in side]) for side in zip(*found, strict=True)))
    else:
        pairs += found
    assert all(close(mine, other, 1e-5 if dtype == torch.float32 else 1e-10) for mine, other in pairs)


@pytest.mark.parametrize("size", [(7, 9), (12, 8)])
def test_odd_sizes_are_upsampled_as_diffusers_does(size):
    stipple = random_unet(SHAPES["attention on coarse levels"]).eval()
    z_t, condition = torch.randn(2, 4, *size), context()
    with torch.no_grad():
        assert close(
            stipple(z_t, torch.zeros(2), condition),
            run_diffusers(diffusers_unet(stipple).eval(), z_t, torch.zeros(2), condition),
        )


def test_diffusers_opens_folders_of_stipple_and_stipple_those_of_diffusers(config, tmp_path):
    stipple = random_unet(config).eval()
    save_unet(stipple, tmp_path / "ours")
    kind = UNet2DModel if config.attention == "plain" else UNet2DConditionModel
    reference, report = kind.from_pretrained(tmp_path / "ours" / "unet", output_loading_info=True)
    assert not any(report.values())
    reference.save_pretrained(tmp_path / "theirs" / "unet")
    back = load_unet(tmp_path / "theirs")
    assert back.config == config
    assert list(back.state_dict()) == list(stipple.state_dict())
    assert all(torch.equal(value, back.state_dict()[name]) for name, value in stipple.state_dict().items())
    condition, z_t = context_for(config, masked=False), torch.randn(2, 4, 8, 8)
    with torch.no_grad():
        expected = stipple(z_t, torch.zeros(2), condition)
        assert torch.equal(back(z_t, torch.zeros(2), condition), expected)
        assert close(run_diffusers(reference, z_t, torch.zeros(2), condition), expected)


def test_names_of_attention_in_diffusers_first_files_are_understood(tmp_path):
    stipple, old = random_unet(PLAIN), {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    save_unet(stipple, tmp_path)
    state = {}
    for name, value in stipple.state_dict().items():
        for new, former in old.items():
            name = name.replace(f".{new}.", f".{former}.")
        state[name] = value
    assert "mid_block.attentions.0.proj_attn.bias" in state
    save_file(state, tmp_path / "unet" / "diffusion_pytorch_model.safetensors")
    back = load_unet(tmp_path).state_dict()
    assert all(torch.equal(value, back[name]) for name, value in stipple.state_dict().items())


def test_half_precision_is_stored_at_half_the_size_and_loaded_as_asked(tmp_path):
    stipple = random_unet(SMALL).to(memory_format=torch.channels_last)
    save_unet(stipple, tmp_path, torch.float16)
    stored = load_file(tmp_path / "unet" / "diffusion_pytorch_model.safetensors")
    assert {value.dtype for value in stored.values()} == {torch.float16}
    assert stipple.conv_in.weight.dtype == torch.float32
    back = load_unet(tmp_path)
    assert torch.equal(back.conv_in.weight, stipple.conv_in.weight.half().float())
    assert load_unet(tmp_path, torch.float16).conv_in.weight.dtype == torch.float16


def test_a_loaded_network_can_be_trained(tmp_path):
    save_unet(random_unet(SMALL), tmp_path)
    unet = load_unet(tmp_path).train()
    unet(torch.randn(2, 4, 8, 8), torch.zeros(2), context()).square().mean().backward()
    torch.optim.SGD(unet.parameters(), lr=0.1).step()
    assert not torch.equal(unet.conv_in.weight, load_unet(tmp_path).conv_in.weight)  # and the file is untouched
    assert torch.equal(load_unet(tmp_path).conv_in.weight, random_unet(SMALL).conv_in.weight)


def test_weights_that_do_not_fit_are_named_at_most_five(tmp_path):
    save_unet(random_unet(SMALL), tmp_path)
    path = tmp_path / "unet" / "diffusion_pytorch_model.safetensors"
    state = load_file(path)
    del state["conv_in.weight"]
    state["conv_out.bias"] = torch.zeros(9)
    save_file({name: value.clone() for name, value in state.items()} | {"stray": torch.zeros(1)}, path)
    with pytest.raises(
        ValueError, match="conv_in.weight is missing; stray is not known; conv_out.bias is \\[9\\], not"
    ):
        load_unet(tmp_path)
    save_file({"stray": torch.zeros(1)}, path)
    with pytest.raises(ValueError, match="; and [0-9]+ more$"):
        load_unet(tmp_path)


def test_missing_and_damaged_files_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="config.json does not exist"):
        load_unet(tmp_path)
    save_unet(random_unet(SMALL), tmp_path)
    weights = tmp_path / "unet" / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(ValueError, match="is not a readable safetensors file"):
        load_unet(tmp_path)
    weights.unlink()
    with pytest.raises(FileNotFoundError, match="no diffusion_pytorch_model.safetensors in"):
        load_unet(tmp_path)
    (tmp_path / "unet" / "config.json").write_text("{")
    with pytest.raises(ValueError, match="is not readable JSON"):
        load_unet(tmp_path)
    (tmp_path / "unet" / "config.json").write_text('{"_class_name": "UNet1DModel"}')
    with pytest.raises(ValueError, match="describes a UNet1DModel; only"):
        load_unet(tmp_path)
