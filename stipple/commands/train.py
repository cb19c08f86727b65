"""Stage 2: train a latent UNet that reads captions (Rombach et al. 2022, sections 3.2 and 3.3).

stipple train --config configs/ldm/emoji.yaml data.folder=PATH autoencoder=runs/emoji-autoencoder/model
stipple train init_from=sd-v1-5.safetensors data.folder=PATH
"""

from __future__ import annotations

import argparse
import shlex
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch

from conditioning.interface.context import drop_context
from ldm.denoising.denoiser import Denoiser
from ldm.losses.time_density import Importance, make_density
from stipple.cli.training_arguments import read_arguments
from stipple.stages.data.data_check import DataCheck
from stipple.stages.data.run_data import RunData
from stipple.stages.ldm.batch_encoder import BatchEncoder
from stipple.stages.ldm.denoiser_validation import (
    SamplePrompts,
    draw_samples,
    drawing_command,
    learn,
    sampling_flags,
    validate,
)
from stipple.stages.ldm.diffusion_batch import DiffusionBatch
from stipple.stages.ldm.ldm_parts import LdmTraining, build_model, open_cache
from stipple.stages.ldm.ldm_run import LdmRunConfig, config_from_init
from stipple.stages.ldm.objectives import make_objective
from stipple.stages.ldm.preservation import with_class
from stipple.stages.ldm.trainable import Trainable, make_trainable
from stipple.training.run.run_folder import disk_errors
from stipple.training.trainer import Trainer
from stipple_core.config import load_config, one_line_errors, to_dict
from stipple_core.data.records.records import Records
from stipple_core.data.sources.scan import scan
from stipple_core.randomness import generator, normal, uniform


def check(config: LdmRunConfig, learning: Trainable, device: torch.device, found: Records) -> None:
    """Raise ValueError for what can't be trained, before anything that takes long."""
    learning.prepare(build_model(config, found, device), found.train, config.seed)


def train(config: LdmRunConfig) -> None:
    """Train, and leave what has learned in the run folder: the model, or what is added to it."""
    with one_line_errors():
        learning = make_trainable(config.lora, config.inversion, config.init_from)
        product = learning.product
        trainer = Trainer(config.trainer, config.run, to_dict(config), product)  # from here on time and signals count
        found = with_class(scan(config.data), config, trainer, partial(check, config, learning, trainer.device))
        data_check = DataCheck.of(found, config.data, trainer, cached=config.cache is not None)
        model = build_model(config, data_check.records, trainer.device)
        learning.prepare(model, data_check.records.train, config.seed)
        cache = open_cache(config, data_check.records.train, model)
        pictures = RunData.open(config.data, data_check, config.seed, config.run, cache, model.conditioner.hint)
        objective = make_objective(config, model, trainer)
        learner = LdmTraining.register(trainer, model, config, learning, objective.averages)
        inputs = BatchEncoder(model.autoencoder, model.conditioner, learner.text_network, cache, config.drops)
        shown = SamplePrompts.of(config.samples.prompts, pictures.examples, inputs)
        model.plan(shown.prompts, inputs=shown.given)  # a wrong number of steps is to be found now
    device, seed, diffusion = trainer.device, config.seed, config.diffusion
    density = make_density(diffusion.density, model.schedule)
    seen = torch.zeros(config.trainer.batch_size, device=device)  # losses of a step, for a density that learns
    if isinstance(density, Importance):
        trainer.keep("importance", density)
    with one_line_errors():
        pictures.begin(trainer, config)

    def save_model(folder: Path | None) -> None:
        with learner.averaged(saved=True) as whole:
            if folder is not None:
                learning.save(whole, folder, {"fp32": None, "fp16": torch.float16}[config.save_precision])

    denoiser = Denoiser(learner.network, model.schedule, diffusion.prediction)
    with pictures.reported(trainer):
        for batch in trainer.steps(pictures.loader(trainer, seed), save_model, pictures.names):
            step, positions = trainer.step, trainer.positions()
            if config.network.dropout:  # the one draw that is made inside a network
                torch.manual_seed(generator(seed, "dropout", step, positions[0]).initial_seed())
            posterior = inputs.posterior(batch, device)
            shape = posterior.mean.shape[1:]
            z_0 = posterior.sample(normal(seed, "posterior", step, positions, shape).to(device))
            z_0 = z_0.to(memory_format=torch.channels_last)
            noise = normal(seed, "noise", step, positions, shape).to(device, memory_format=torch.channels_last)
            t, weight = density.draw(uniform(seed, "t", step, positions))
            drop = uniform(seed, "caption dropout", step, positions) < diffusion.caption_dropout
            told, null = inputs.contexts(batch, device)
            context = told if null is None else drop_context(told, null, drop.to(device))
            draw = partial(uniform, seed, step=step, positions=positions)
            losses = objective(
                denoiser, DiffusionBatch(z_0=z_0, context=context, null=null, t=t, noise=noise, draw=draw)
            )
            loss = (losses * weight.to(losses) * pictures.weights(batch).to(losses)).mean()
            trainer.update(loss, learner.optimizer)
            trainer.log(loss=loss)
            if isinstance(density, Importance):
                learn(trainer, density, losses, seen, seed)
            if trainer.due(config.validation.every) and len(pictures.held_out):
                with learner.averaged() as whole:
                    single = Denoiser(whole.unet, model.schedule, diffusion.prediction)
                    told = replace(inputs, conditioner=whole.conditioner, text_network=whole.conditioner)
                    validate(trainer, single, pictures.held_out, told, config.validation, seed)
            if trainer.due(config.samples.every):
                with learner.averaged() as whole:
                    if trainer.is_main:
                        draw_samples(trainer, whole, shown, seed)
    opening = learning.flags(config.run)
    if config.distillation is not None and product != "model":  # what it is added to is sampled otherwise
        opening += sampling_flags(model.defaults)
    command = shlex.join(drawing_command(model, shown.prompts[0], opening))
    trainer.print(f"the {product} is in {config.run}/{product}; next:\n  {command}")


def read_config(arguments: argparse.Namespace) -> LdmRunConfig:
    """Return the config of a command line; exits with one line and code 2 after a mistake."""
    with one_line_errors():
        return load_config(LdmRunConfig, arguments.config, arguments.overrides, config_from_init)


def run(config: LdmRunConfig, arguments: argparse.Namespace) -> None:
    """Train with a config that `read_config` returned."""
    with disk_errors(config.run):
        train(config)


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command line in this process, which accelerate may have started as one of several."""
    arguments = read_arguments("train", argv)
    run(read_config(arguments), arguments)


if __name__ == "__main__":
    main()
