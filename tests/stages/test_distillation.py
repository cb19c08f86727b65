"""Distillation runs: results, resuming, accumulation, several processes, and refused configs."""

from __future__ import annotations

import gc
import json
import shlex
from dataclasses import replace
from pathlib import Path

import diffusers
import pytest
import torch

from conditioning import Unconditional
from conditioning.conditioners import ConditionerConfig
from ldm import TextToImage
from ldm.formats.opening import open_model
from ldm.networks.unet_config import UNetConfig
from ldm.sampling.defaults import default_settings
from stipple.stages.ldm.build_model import make_unet
from stipple.stages.ldm.denoiser_validation import LdmValidationConfig
from stipple.stages.ldm.distillation import DistillationConfig, scheduling_of
from stipple.stages.ldm.ldm_run import DiffusionConfig, LdmRunConfig, config_from_init
from stipple_core.config import load_config
from stipple_core.data.records.data_config import DataConfig
from stipple_core.images.drawn_pictures import read_record
from tests.helpers.models.small_models import build_model, build_model_of
from tests.helpers.training.many_processes import succeed
from tests.helpers.training.tiny_runs import differing, metrics, run_here

pytestmark = pytest.mark.usefixtures("settings_of_runs")
SHORT = [
    "train_ldm.py", "data.folder=tests/pictures", "data.validation=0.2", "trainer.steps=3", "trainer.batch_size=4",
    "trainer.micro_batch_size=2", "trainer.save_every=3", "trainer.log_every=1", "samples.every=0",
    "samples.prompts=[a red heart]", "ema.decay=0.5", "optimizer.learning_rate=1e-3", "optimizer.warmup_steps=0",
]  # fmt: skip
CASES = {
    "consistency": ["distillation={kind: consistency, guidance_scale: [3, 3], levels: 10, target_decay: 0.9}"],
    "consistency, conditioned on the scale": [
        "distillation={kind: consistency, guidance_scale: [2, 8], target_decay: 0}", "unet.guidance_dim=16"
    ],
    "guidance, conditioned on the scale": [
        "distillation={kind: guidance, guidance_scale: [1, 8]}",
        "unet.guidance_dim=16",
    ],
}  # fmt: skip


@pytest.fixture(scope="module")
def teacher(tmp_path_factory) -> Path:
    """The folder of a small trained model."""
    folder = tmp_path_factory.mktemp("teacher")
    build_model(folder).save(folder / "model")
    return folder / "model"


SLOW = [pytest.param(name, marks=pytest.mark.slow) for name in CASES][1:]


@pytest.fixture(scope="module", params=[*list(CASES)[:1], *SLOW])
def case(request, teacher, tmp_path_factory) -> tuple[list[str], Path]:
    """A command without its `run=`, and the folder of its uninterrupted run."""
    command = [*SHORT, f"init_from={teacher}", *CASES[request.param]]
    folder = tmp_path_factory.mktemp("whole") / "run"
    run_here(*command, f"run={folder}")
    return command, folder


def test_a_stopped_and_resumed_run_equals_an_uninterrupted_one(case, tmp_path):
    """It is stopped after a step, when the average already differs from the student."""
    command, whole = case
    with pytest.raises(SystemExit, match="0"):
        run_here(*command, f"run={tmp_path / 'run'}", "trainer.max_minutes=0")
    gc.collect()
    run_here(*command, f"run={tmp_path / 'run'}")
    assert metrics(tmp_path / "run") == metrics(whole)
    for part in ("state/step-0000003", "model"):
        assert differing(tmp_path / "run" / part, whole / part) == []


def test_only_the_student_is_trained(case, teacher):
    before, after = open_model(teacher), open_model(case[1] / "model")
    expected = before.unet.state_dict()
    change = {name: (weight - expected.get(name, 0)).abs().max() for name, weight in after.unet.state_dict().items()}
    assert 0 < max(change.values()) < 0.05
    for part in ("autoencoder", "conditioner"):
        pairs = zip(getattr(before, part).parameters(), getattr(after, part).parameters(), strict=True)
        assert all(torch.equal(a, b) for a, b in pairs)
    losses = [line["loss"] for line in metrics(case[1])]
    assert len(losses) == 3 and all(0 < loss < 10 for loss in losses)


@pytest.mark.parametrize("case", list(CASES)[:1], indirect=True)
def test_the_micro_batch_size_does_not_change_the_student(case, tmp_path):
    command, whole = case
    run_here(*command, f"run={tmp_path / 'run'}", "trainer.micro_batch_size=4")
    weights, expected = (open_model(run / "model").unet.state_dict() for run in (tmp_path / "run", whole))
    for name, weight in weights.items():
        torch.testing.assert_close(weight, expected[name], rtol=0, atol=2e-4)


def test_the_command_for_distilled_lora_layers_has_their_sampling_settings(teacher, tmp_path, capsys):
    """LCM-LoRA (Luo et al. 2023): the printed command draws with these settings."""
    run_here(*SHORT, f"init_from={teacher}", *CASES["consistency"], "lora.rank=2", f"run={tmp_path / 'run'}")
    command = shlex.split(capsys.readouterr().out.splitlines()[-1])
    flags = ["--sampler", "lcm", "--spacing", "trailing", "--steps", "4", "--guidance-scale", "1"]
    assert command[:3] == ["stipple", "draw", "a red heart"] and command[-len(flags) :] == flags
    run_here("txt2img.py", *command[2:], "--outdir", str(tmp_path / "drawn"))
    record = read_record(tmp_path / "drawn" / "00000.png")
    assert record["lora"] == [f"{tmp_path}/run/lora:1"] and record["pictures"][0]["sampler"] == "lcm"


@pytest.mark.slow
@pytest.mark.parametrize("case", list(CASES)[:2], indirect=True)
def test_two_processes_train_the_same_student_as_one_bit_for_bit(case, tmp_path):
    command, whole = case
    succeed(*command, f"run={tmp_path / 'run'}", processes=2)
    assert differing(tmp_path / "run" / "model", whole / "model") == []


@pytest.mark.parametrize("case", list(CASES)[:1], indirect=True)
def test_a_consistency_student_stores_four_lcm_steps_as_default_and_diffusers_opens_its_scheduler(case):
    model = TextToImage.load(case[1] / "model")
    (picture,) = model.plan("a red heart")
    assert (picture.sampler, picture.steps, picture.guidance_scale, picture.spacing) == ("lcm", 4, 1.0, "rungs")
    folder = case[1] / "model" / "scheduler"
    stored = json.loads((folder / "scheduler_config.json").read_text())
    scheduler = getattr(diffusers, stored["_class_name"]).from_pretrained(folder)
    assert isinstance(scheduler, diffusers.LCMScheduler)
    scheduler.set_timesteps(4)
    assert scheduler.timesteps.tolist() == [999, 759, 499, 259]


def test_guidance_students_and_students_of_other_levels_than_lcms_are_sampled_at_trailing_times():
    for config in (DistillationConfig(kind="guidance"), DistillationConfig(levels=10)):
        assert scheduling_of(config)["spacing"] == "trailing"
    assert scheduling_of(DistillationConfig())["spacing"] == "rungs"


@pytest.fixture
def student(teacher) -> TextToImage:
    """A copy of the teacher that reads the guidance scale, before training."""
    values = {"init_from": str(teacher), "distillation": {"kind": "guidance"}}
    options = [f"init_from={teacher}", *SHORT[1:3], *CASES["guidance, conditioned on the scale"]]
    config = load_config(LdmRunConfig, None, options, lambda _: config_from_init(values))
    init = open_model(teacher)
    return TextToImage(
        init.autoencoder, make_unet(config, init).eval(), init.conditioner, init.scheduling, default_settings(init)
    )


def test_a_student_starts_as_its_teacher_and_the_scale_has_no_effect_at_first(teacher, student):
    init = open_model(teacher)
    context = init.conditioner.encode(["a red heart"])
    z_t, timestep = torch.randn(1, init.unet.config.in_channels, 8, 8), torch.tensor([500.0])
    scaled = replace(context, guidance=torch.tensor([7.0]))
    with torch.no_grad():
        assert torch.equal(student.unet(z_t, timestep, scaled), init.unet(z_t, timestep, context))


def test_a_student_that_reads_the_scale_is_called_once_per_step_and_ignores_negative_prompts(student):
    calls = []
    student.unet.time_embedding.cond_proj.weight.data.normal_()
    student.unet.register_forward_hook(lambda module, inputs, output: calls.append(len(output)))
    asked = [{"guidance_scale": 1.0}, {"guidance_scale": 6.0}, {"guidance_scale": 6.0, "negative_prompt": "blue"}]
    pictures = [list(student("a red heart", steps=3, seed=1, **each)[0].getdata()) for each in asked]
    assert calls == [1] * 9 and pictures[0] != pictures[1] and pictures[1] == pictures[2]
    with pytest.raises(ValueError, match="guidance method apg does not go with"):
        student.plan("a red heart", guidance_method="apg")


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"kind": "progressive"}, "use one of consistency, guidance"),
        ({"guidance_scale": (5.0, 2.0)}, r"use such as \[3, 15\]"),
        ({"levels": 1}, "50 is usual"),
        ({"target_decay": 1.0}, "below 1"),
        ({"huber": -1.0}, "at least 0"),
        ({"kind": "guidance", "levels": 10}, "levels 10 only applies to kind consistency"),
        ({"kind": "guidance", "target_decay": 0.0}, "target_decay 0.0 only applies to kind consistency"),
        ({"kind": "guidance", "huber": 0.0}, "huber 0.0 only applies to kind consistency"),
    ],
)
def test_an_invalid_distillation_is_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        DistillationConfig(**settings)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"init_from": None}, "set init_from to a trained model"),
        ({"conditioner": ConditionerConfig(kind="scratch")}, "leave yours out"),
        ({"validation": LdmValidationConfig(every=5)}, "use 0"),
        ({"distillation": None, "unet": UNetConfig(guidance_dim=16)}, "or use null"),
        (
            {"diffusion": DiffusionConfig(weighting="min_snr")},
            "diffusion.weighting min_snr has no effect with distillation",
        ),
    ],
)
def test_settings_that_do_not_go_with_distillation_are_refused(changes, message):
    whole = {"init_from": "MODEL", "distillation": DistillationConfig(), "validation": LdmValidationConfig(every=0)}
    with pytest.raises(ValueError, match=message):
        LdmRunConfig(data=DataConfig(folder=""), autoencoder="MODEL", **whole | changes)


@pytest.mark.parametrize(
    "override, message",
    [
        ("diffusion.prediction=velocity", "diffusion.prediction velocity is not that of its teacher"),
        ("diffusion.schedule.timesteps=500", "diffusion.schedule.timesteps is 500"),
        ("distillation.levels=1001", "distillation.levels 1001 is more than its teacher"),
    ],
)
def test_another_prediction_or_schedule_than_the_teachers_is_one_line(teacher, override, message, tmp_path, capsys):
    with pytest.raises(SystemExit) as caught:
        run_here(*SHORT, f"run={tmp_path / 'run'}", f"init_from={teacher}", "distillation.kind=consistency", override)
    err = capsys.readouterr().err
    assert caught.value.code == 2 and err.count("\n") == 1 and message in err and not (tmp_path / "run").exists()


@pytest.mark.parametrize("case", SLOW[:1], indirect=True)
def test_a_distilled_model_can_not_be_a_teacher(case, tmp_path, capsys):
    with pytest.raises(SystemExit):
        run_here(*SHORT, f"run={tmp_path / 'run'}", f"init_from={case[1] / 'model'}", "distillation.kind=consistency")
    assert "is a distilled model; set init_from to its teacher" in capsys.readouterr().err


def test_an_unconditional_teacher_is_distilled_without_guidance_and_refused_with_it(tmp_path, capsys):
    build_model_of(Unconditional()).save(tmp_path / "model")
    command = [*SHORT, f"init_from={tmp_path}/model", "data.captions=[]", "samples.prompts=['']", "trainer.steps=1"]
    command += [f"run={tmp_path}/run", "distillation.kind=consistency"]
    with pytest.raises(SystemExit) as caught:
        run_here(*command)
    error = capsys.readouterr().err
    assert caught.value.code == 2 and error.count("\n") == 1 and "use [1, 1]" in error
    run_here(*command, "distillation.guidance_scale=[1, 1]")
    assert 0 < metrics(tmp_path / "run")[0]["loss"] < 10
