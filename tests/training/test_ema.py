"""The moving average of weights: LDM's warm-up in closed form; applied weights are restored bit for bit."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from stipple.training.optimization.ema import Ema, EmaConfig
from stipple_core.files.training_state import load_state, save_state


def model(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Conv2d(2, 3, 3), nn.Flatten(), nn.Linear(3, 2)).to(memory_format=torch.channels_last)


def walk(network: nn.Module, ema: Ema, steps: int, seed: int = 1) -> None:
    """Change the weights randomly, and update the average after each change."""
    draws = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        with torch.no_grad():
            for p in network.parameters():
                p += torch.randn(p.shape, generator=draws)
        ema.update()


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_the_average_is_the_weighted_sum_of_all_previous_weights():
    network = nn.Linear(1, 1, bias=False).double()
    ema = Ema(network, EmaConfig(decay=0.9, warmup=False))
    values = torch.randn(20, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    first = network.weight.item()
    for value in values:
        network.weight.data.fill_(value)
        ema.update()
    weights = 0.1 * 0.9 ** torch.arange(19, -1, -1, dtype=torch.float64)
    expected = 0.9**20 * first + (weights * values).sum()
    assert ema.averages["weight"].item() == pytest.approx(expected.item(), abs=1e-6)


def test_the_decay_warms_up_as_in_ldm_and_is_constant_afterwards():
    ema = Ema(model(), EmaConfig(decay=0.5))
    decays = []
    for _ in range(12):
        decays.append(ema.decay())
        ema.update()
    assert decays == [min(0.5, (1 + n) / (10 + n)) for n in range(12)]
    assert decays[0] == 0.1 and decays[-1] == 0.5
    assert Ema(model(), EmaConfig(decay=0.5, warmup=False)).decay() == 0.5


def test_constant_weights_are_their_own_average_and_decay_0_is_no_average():
    network = model()
    ema = Ema(network, EmaConfig(decay=0.999))
    for _ in range(5):
        ema.update()
    assert same(ema.averages, dict(network.named_parameters()))
    unaveraged = Ema(network, EmaConfig(decay=0.0))
    walk(network, unaveraged, 3)
    assert same(unaveraged.averages, dict(network.named_parameters()))


def test_weights_are_restored_bit_for_bit_even_after_an_error():
    network = model()
    ema = Ema(network, EmaConfig())
    walk(network, ema, 3)
    before = {name: p.detach().clone() for name, p in network.named_parameters()}
    with pytest.raises(RuntimeError, match="inside"), ema.applied():
        assert same(dict(network.named_parameters()), ema.averages) and not same(before, ema.averages)
        raise RuntimeError("inside")
    assert same(dict(network.named_parameters()), before)


def test_only_trained_weights_are_averaged_and_always_in_float32():
    network = model().to(torch.bfloat16)
    network[0].requires_grad_(False)
    ema = Ema(network, EmaConfig())
    assert sorted(ema.averages) == ["2.bias", "2.weight"]
    assert {average.dtype for average in ema.averages.values()} == {torch.float32}


def test_a_saved_and_restored_average_continues_exactly(tmp_path):
    whole, broken = model(), model()
    expected, ema = Ema(whole, EmaConfig()), Ema(broken, EmaConfig())
    for seed in (1, 2):
        walk(whole, expected, 4, seed)
    walk(broken, ema, 4, 1)
    save_state(tmp_path, ema.state_dict())
    again = Ema(broken, EmaConfig())
    again.load_state_dict(load_state(tmp_path))
    walk(broken, again, 4, 2)
    assert again.updates == 8 and same(again.averages, expected.averages)


def test_averages_of_another_model_are_refused_by_name():
    state = Ema(nn.Linear(2, 2), EmaConfig()).state_dict()
    with pytest.raises(ValueError, match="EMA weights do not fit this model: 0.bias, 0.weight"):
        Ema(model(), EmaConfig()).load_state_dict(state)


def test_an_average_on_the_cpu_equals_one_beside_the_model():
    networks = model(), model()
    beside, apart = Ema(networks[0], EmaConfig()), Ema(networks[1], EmaConfig(device="cpu"))
    for network, ema in zip(networks, (beside, apart), strict=True):
        walk(network, ema, 20)
        with ema.applied():
            assert same(dict(network.named_parameters()), ema.averages)
    assert same(beside.averages, apart.averages)
    assert not any(
        a.data_ptr() == p.data_ptr() for a, p in zip(apart.averages.values(), networks[1].parameters(), strict=True)
    )


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_an_average_on_the_cpu_of_a_model_on_a_gpu_has_the_same_numbers():
    networks = model().cuda(), model().cuda()
    beside, apart = Ema(networks[0], EmaConfig()), Ema(networks[1], EmaConfig(device="cpu"))
    for step in range(20):
        for network, ema in zip(networks, (beside, apart), strict=True):
            draws = torch.Generator().manual_seed(step)
            with torch.no_grad():
                for p in network.parameters():
                    p += torch.randn(p.shape, generator=draws).cuda()
            ema.update()
    for name, average in apart.averages.items():
        assert not average.is_cuda and torch.allclose(average, beside.averages[name].cpu(), rtol=1e-6, atol=1e-6)


def test_an_unknown_device_for_the_averages_is_refused():
    with pytest.raises(ValueError, match="ema.device 'gpu' is unknown; use model or cpu"):
        EmaConfig(device="gpu")
