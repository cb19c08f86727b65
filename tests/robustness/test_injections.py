"""NaN and infinity in images, latents, losses and gradients of both trainings do not change the saved state."""

from __future__ import annotations

import math
import random
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from autoencoder import Autoencoder, AutoencoderConfig
from stipple.training.trainer import Trainer
from tests.helpers.training.run_files import assert_finite_on_disk, bad_steps
from tests.helpers.training.tiny_runs import STAGE_1, STAGE_2, run_here

pytestmark = pytest.mark.usefixtures("settings_of_runs")
BAD = [math.nan, math.inf, -math.inf]
MANY = ["trainer.steps=24", "trainer.save_every=5", "validation.every=0", "trainer.max_bad_steps=24"]
SCRIPTS = {
    "kl": [*STAGE_1, *MANY, "discriminator.norm=batch", "validation.scale_images=8"],
    "vq": [*STAGE_1, *MANY, "autoencoder.regularizer=vq", "validation.scale_images=8"],
    "ldm": [*STAGE_2, *MANY, "samples.every=0", "diffusion.density.name=importance", "diffusion.weighting=p2",
            "trainer.micro_batch_size=2"],
}  # fmt: skip
AFFECTS_ALL = ("images", "latents")  # a loss or a gradient affects one optimizer only


class Injections:
    """Injects values that are not finite into a script. `steps` maps the steps to the kind of injection."""

    def __init__(self, patch: pytest.MonkeyPatch, kinds: list[str], count: int, draws: random.Random):
        self.steps = {step: draws.choice(kinds) for step in draws.sample(range(24), count)}
        self.draws, self.trainer, self.changed = draws, None, {}
        self.wrap(patch, Trainer, "steps", self.begin)
        self.wrap(patch, Trainer, "update", self.update)
        self.wrap(patch, Trainer, "_end_step", self.end)
        self.wrap(patch, Autoencoder, "encode", self.encode)

    @staticmethod
    def wrap(patch: pytest.MonkeyPatch, owner: type, name: str, around: Callable) -> None:
        call = getattr(owner, name)
        patch.setattr(owner, name, lambda *arguments, **options: around(call, *arguments, **options))

    def value(self) -> float:
        return self.draws.choice(BAD)

    def kind(self) -> str:
        return self.steps.get(self.trainer.step, "") if self.trainer else ""

    def state(self) -> dict[str, Tensor]:
        """The saved state as flat tensors, without the counts of steps and of bad steps."""
        return flat(self.trainer._run_state.state_dict())

    def begin(self, steps, trainer, *arguments):
        self.trainer = trainer
        self.before = self.state()
        for batch in steps(trainer, *arguments):
            if self.kind() == "images" and trainer.micro == 0:
                batch.images[0, 0, 0, 0] = self.value()
            yield batch

    def encode(self, encode, *arguments):
        posterior = encode(*arguments)
        if self.kind() == "latents":
            posterior.mean[0, 0, 0, 0] = self.value()
        return posterior

    def update(self, update, trainer, loss, optimizer):
        kind = self.kind()
        if kind == f"gradient of {optimizer.name}" and trainer.last_micro:
            parameter = self.draws.choice(optimizer.parameters)
            handle = parameter.register_hook(lambda g: (handle.remove(), torch.full_like(g, self.value()))[1])
        update(trainer, loss * self.value() if kind == f"loss of {optimizer.name}" else loss, optimizer)

    def end(self, end, trainer, *arguments):
        trainer.step -= 1
        kind, after = self.kind(), self.state()
        trainer.step += 1
        names = {name for name in after if name not in self.before or not torch.equal(after[name], self.before[name])}
        self.changed[trainer.step - 1], self.before = (kind, names), after
        end(trainer, *arguments)


def flat(node: object, name: str = "") -> dict[str, Tensor]:
    if isinstance(node, Tensor):
        return {name: node.detach().clone()}
    items = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list | tuple) else ()
    return {key: value for inner, each in items for key, value in flat(each, f"{name}/{inner}").items()}


@pytest.mark.parametrize(
    ("script", "kinds"),
    [
        ("kl", ["images", "loss of optimizer", "gradient of optimizer", "gradient of discriminator_optimizer"]),
        ("vq", ["images", "loss of optimizer", "loss of discriminator_optimizer", "gradient of optimizer"]),
        ("ldm", ["images", "latents", "loss of optimizer", "gradient of optimizer"]),
    ],
)
def test_17_injections_into_each_training_do_not_change_the_saved_state(script, kinds, tmp_path, monkeypatch):
    torch.manual_seed(0)
    shape = AutoencoderConfig(block_out_channels=(16, 32, 32), layers_per_block=1, norm_num_groups=8, sample_size=32)
    Autoencoder(shape).save(tmp_path / "autoencoder")
    more = [f"autoencoder={tmp_path / 'autoencoder'}"] if script == "ldm" else ["discriminator_start=1"]
    injected = Injections(monkeypatch, kinds, 17, random.Random(script))
    run_here(*SCRIPTS[script], *more, f"run={tmp_path / 'run'}")
    for step, (kind, changed) in injected.changed.items():
        parts = {name.split("/")[1] for name in changed}
        if kind in AFFECTS_ALL or (kind and script == "ldm"):
            assert not changed, (step, kind)
        elif kind:
            of_discriminator = {"discriminator", "discriminator_optimizer"}
            others = {"autoencoder", "optimizer", "optimizer_ema0"} if "discriminator" in kind else of_discriminator
            assert parts <= others
            assert parts and not any("running" in name for name in changed), (step, kind)
        else:
            assert {"optimizer", "optimizer_ema0"} <= parts, step
    assert {line["step"] - 1 for line in bad_steps(tmp_path / "run")} == set(injected.steps)
    assert_finite_on_disk(tmp_path / "run")
