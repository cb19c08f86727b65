"""ldm/guidance/registry.py: what a config makes, with every sampler, and what it refuses."""

import math
from dataclasses import dataclass, field, replace

import pytest
import torch

from conditioning.interface.context import Context
from ldm.denoising.denoiser import Denoiser
from ldm.denoising.perturbed_context import PerturbedContext
from ldm.guidance.classifier_free import autoguidance, classifier_free, in_interval, rescaled
from ldm.guidance.combines import apg, cfg_plus_plus, zero_star
from ldm.guidance.perturbed_attention import perturbed_attention
from ldm.guidance.registry import GUIDANCES, GuidanceConfig, Ingredients, guided
from ldm.guidance.thresholding import thresholded
from ldm.samplers.onestep import ddim
from ldm.samplers.registry import SAMPLERS
from ldm.samplers.spacing import times
from tests.helpers.proofs.oracles import SCHEDULES

CONTEXT = Context(vector=torch.tensor([[1.0], [2.0]], dtype=torch.float64))
NULL = Context(vector=torch.tensor([[0.3]], dtype=torch.float64))
SCALES = {name: 0.6 if name == "cfg_plus_plus" else 3.0 for name in GUIDANCES}


@dataclass
class Network:
    """One that knows contexts and perturbed ones, and counts its batches."""

    strength: float = 1.0
    batches: list = field(default_factory=list)

    def __call__(self, z_in, timestep, context):
        self.batches.append(len(z_in))
        blind = context.count if isinstance(context, PerturbedContext) else 0
        context = context.context if isinstance(context, PerturbedContext) else context
        condition = torch.zeros(len(z_in), 1) if context is None else context.vector
        seen = torch.arange(len(z_in)) < len(z_in) - blind
        return torch.tanh(z_in * self.strength + (condition + 0.5 * seen[:, None])[:, :, None, None].to(z_in))


def ingredients(name="flow", prediction="velocity", steps=50, context=CONTEXT, network=None):
    schedule = SCHEDULES[name]
    denoiser = Denoiser(network or Network(), schedule, prediction)
    weak = replace(denoiser, network=Network(0.5))
    return Ingredients(denoiser=denoiser, context=context, null=NULL, times=times(schedule, steps), weak=weak)


def random(*shape):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


Z = random(2, 1, 3, 3)


def built(method, provided, scale):
    """What each row of the table should be."""
    condition = provided.denoiser, provided.context, provided.null
    coefficients = provided.denoiser.coefficients
    strong, weak = (classifier_free(denoiser, CONTEXT, None, 1.0) for denoiser in (provided.denoiser, provided.weak))
    return {
        "classifier_free": lambda: classifier_free(*condition, scale),
        "apg": lambda: classifier_free(*condition, scale, apg()),
        "cfg_plus_plus": lambda: classifier_free(
            *condition, cfg_plus_plus(scale, provided.times, provided.denoiser.schedule)
        ),
        "cfg_zero_star": lambda: classifier_free(*condition, scale, zero_star(coefficients)),
        "perturbed_attention": lambda: perturbed_attention(*condition, scale, 3.0),
        "autoguidance": lambda: autoguidance(strong, weak, scale),
    }[method]()


@pytest.mark.parametrize("method", GUIDANCES)
def test_a_config_builds_the_guidance_that_it_names_with_the_calls_of_the_table(method):
    provided = ingredients()
    config = GuidanceConfig(method=method, scale=SCALES[method])
    found = guided(config, provided)(Z, 0.5)
    sizes = [*provided.denoiser.network.batches, *provided.weak.network.batches]
    assert torch.equal(found, built(method, provided, SCALES[method])(Z, 0.5))
    assert sizes == {"perturbed_attention": [6], "autoguidance": [2, 2]}.get(method, [4])
    calls = GUIDANCES[method].calls
    assert calls.startswith("1 of B, 1 of B weaker" if len(sizes) == 2 else f"1 of {sizes[0] // 2} B")
    assert calls in GUIDANCES[method].summary and "\n" not in GUIDANCES[method].summary


@pytest.mark.parametrize("method", GUIDANCES)
@pytest.mark.parametrize("prediction", ["velocity", "flow"])
def test_at_scale_1_guided_is_conditional_to_the_last_bit_and_null_is_not_read(method, prediction):
    """Of CFG++, whose lambda of 1 is a guided step, where the scale is 1; of perturbed attention without its own."""
    if method == "cfg_plus_plus":
        return
    provided = replace(ingredients(prediction=prediction), null=None)
    config = GuidanceConfig(method=method, scale=1.0, perturbed_scale=0.0)
    assert not config.reads_null
    for t in (1.0, 0.5, 0.01):
        assert torch.equal(guided(config, provided)(Z, t), provided.denoiser(Z, t, CONTEXT))
    assert not provided.weak.network.batches


@pytest.mark.parametrize("method", GUIDANCES)
def test_what_has_no_context_is_not_guided_but_by_itself(method):
    provided = ingredients(context=None)
    found = guided(GuidanceConfig(method=method, scale=SCALES[method]), replace(provided, null=None))(Z, 0.5)
    assert torch.equal(found, provided.denoiser(Z, 0.5, None)) == (
        method not in ("perturbed_attention", "autoguidance")
    )


@pytest.mark.parametrize("method", [name for name in GUIDANCES if name != "cfg_plus_plus"])
def test_interval_threshold_and_rescaling_go_around_every_guidance(method):
    provided = ingredients()
    config = GuidanceConfig(
        method=method, scale=SCALES[method], rescale=0.7, start=0.8, stop=0.3, bound=0.9, percentile=90.0
    )
    denoise, plain = guided(config, provided), classifier_free(provided.denoiser, CONTEXT, None, 1.0)
    inside = guided(GuidanceConfig(method=method, scale=SCALES[method], rescale=0.7), provided)
    assert not torch.equal(
        inside(Z, 0.5), guided(GuidanceConfig(method=method, scale=SCALES[method]), provided)(Z, 0.5)
    )
    expected = thresholded(in_interval(inside, plain, 0.8, 0.3), 0.9, 90.0)
    inside_again = guided(GuidanceConfig(method=method, scale=SCALES[method], rescale=0.7), provided)
    assert torch.equal(denoise(Z, 0.5), thresholded(inside_again, 0.9, 90.0)(Z, 0.5))
    for t in (0.9, 0.2):
        assert torch.equal(denoise(Z, t), expected(Z, t))
        assert torch.equal(denoise(Z, t), thresholded(plain, 0.9, 90.0)(Z, t))


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("method", GUIDANCES)
def test_every_sampler_takes_every_guidance(method, sampler):
    """Also from where no signal is left, and in inference mode, as pictures are made."""
    run, time_defaults = SAMPLERS[sampler].run, SAMPLERS[sampler].time_defaults
    options = {"tolerance": 0.1} if "tolerance" in SAMPLERS[sampler].options else {}
    for name, prediction in (("scaled_linear", "noise"), ("zero_terminal", "velocity"), ("flow", "flow")):
        provided = replace(ingredients(name, prediction), times=times(SCHEDULES[name], 5, "trailing", time_defaults))
        around = {} if method == "cfg_plus_plus" else {"rescale": 0.5, "bound": 3.0}
        config = GuidanceConfig(method=method, scale=SCALES[method], start=1.0, stop=0.3, **around)
        generators = [torch.Generator().manual_seed(i) for i in range(2)]
        with torch.inference_mode():
            *_, last = run(guided(config, provided), Z, provided.times, SCHEDULES[name], generators, **options)
        assert last.z.isfinite().all() and last.z.shape == Z.shape and last.z.dtype == Z.dtype


@pytest.mark.parametrize("around", [{"rescale": 0.5}, {"bound": 3.0}], ids=str)
def test_cfg_plus_plus_refuses_what_changes_its_estimate(around):
    with pytest.raises(ValueError, match="does not support guidance rescale and guidance bound"):
        GuidanceConfig(method="cfg_plus_plus", scale=0.5, **around)


@pytest.mark.parametrize("prediction, still", [("flow", 2), ("velocity", 2), ("noise", 0), ("clean", 0)])
def test_cfg_zero_star_leaves_the_first_25th_of_a_walk_standing(prediction, still):
    """Not where a network predicts noise, whose 0 is no direction of rest."""
    name = "flow" if prediction == "flow" else "scaled_linear"
    provided = ingredients(name, prediction)
    denoise = guided(GuidanceConfig(method="cfg_zero_star", scale=3.0), provided)
    list(ddim(denoise, Z, provided.times, SCHEDULES[name], []))
    assert len(provided.denoiser.network.batches) == 50 - still


def test_few_steps_are_all_guided():
    for steps in (1, 2, 12):
        provided = ingredients("flow", "flow", steps)
        list(ddim(guided(GuidanceConfig(method="cfg_zero_star"), provided), Z, provided.times, SCHEDULES["flow"], []))
        assert len(provided.denoiser.network.batches) == steps


def test_a_sampler_that_goes_back_above_its_first_time_is_guided_there_too():
    provided = replace(ingredients("flow", "flow"), times=torch.tensor([0.8, 0.4, 0.0], dtype=torch.float64))
    guided(GuidanceConfig(method="cfg_zero_star"), provided)(Z, 0.9)
    assert provided.denoiser.network.batches == [4]


def test_each_run_has_a_momentum_of_its_own():
    provided, config = ingredients(), GuidanceConfig(method="apg", norm=1.0)
    first, second = guided(config, provided), guided(config, provided)
    once = first(Z, 0.5)
    assert torch.equal(second(Z, 0.5), once)
    assert not torch.equal(first(Z + 1, 0.5), guided(config, provided)(Z + 1, 0.5))


def test_the_rescaled_combines_are_those_of_the_table():
    provided = ingredients()
    found = guided(GuidanceConfig(method="apg", scale=3.0, rescale=0.7, norm=2.0), provided)(Z, 0.5)
    combine = rescaled(0.7, provided.denoiser.coefficients, apg(norm=2.0))
    assert torch.equal(found, classifier_free(provided.denoiser, CONTEXT, NULL, 3.0, combine)(Z, 0.5))


@pytest.mark.parametrize(
    "options, words",
    [
        ({"method": "cgf"}, "guidance method 'cgf' is unknown; did you mean .*There are classifier_free, apg"),
        ({"scale": math.nan}, "guidance scale nan must be a finite number"),
        ({"scale": math.inf, "method": "autoguidance"}, "guidance scale inf must be a finite number"),
        ({"scale": 5.0, "method": "cfg_plus_plus"}, "guidance scale 5.0 of cfg_plus_plus must be between 0 and 1"),
        ({"scale": math.nan, "method": "cfg_plus_plus"}, "guidance scale nan of cfg_plus_plus"),
        ({"rescale": 1.5}, "guidance rescale 1.5 must be between 0"),
        ({"start": 0.2, "stop": 0.6}, "guidance interval from t = 0.2 to 0.6"),
        ({"start": math.nan}, "guidance interval from t = nan"),
        ({"bound": -1.0}, "guidance bound -1.0 must be a positive number"),
        ({"bound": 1.0, "percentile": 0.995}, "guidance percentile 0.995 must be between 50 and 100"),
        ({"percentile": 99.5}, "guidance percentile 99.5 needs a guidance bound"),
        ({"norm": 2.0}, "guidance norm 2.0 is for method apg, not classifier_free"),
        ({"norm": 0.0, "method": "apg"}, "guidance norm 0.0 must be a positive number"),
        ({"method": "perturbed_attention", "perturbed_scale": math.nan}, "perturbed scale nan must be a finite"),
        ({"method": "perturbed_attention", "scale": -2.0}, "guidance scale -2.0 and perturbed scale 3.0 add up to 1"),
    ],
)
def test_an_invalid_config_is_refused_in_one_line(options, words):
    with pytest.raises(ValueError, match=words) as raised:
        GuidanceConfig(**options)
    assert "\n" not in str(raised.value)


def test_options_of_other_methods_do_not_stand_in_the_way():
    assert GuidanceConfig(scale=-2.0).reads_null
    assert GuidanceConfig(method="cfg_plus_plus", scale=1.0).reads_null
    assert not GuidanceConfig(method="autoguidance", scale=2.0).reads_null


def test_autoguidance_without_a_weaker_model_is_refused():
    with pytest.raises(ValueError, match="autoguidance requires a weaker model; specify one"):
        guided(GuidanceConfig(method="autoguidance"), replace(ingredients(), weak=None))
