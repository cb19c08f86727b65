"""Stage 2: train a latent diffusion model (Rombach et al. 2022, sections 3.2 and 3.3).

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

from conditioning.interface.caption_dropout import drop_context
from ldm.denoising.denoiser import Denoiser
from ldm.formats.model_parts import ModelParts
from ldm.losses.time_density import Importance, make_density
from stipple.cli.training_arguments import read_arguments
from stipple.stages.data.run_data import RunData
from stipple.stages.init_model import InitModel
from stipple.stages.ldm.batch_encoder import BatchEncoder
from stipple.stages.ldm.denoiser_validation import SamplePrompts, draw_samples, update_density, validate
from stipple.stages.ldm.diffusion_batch import DiffusionBatch
from stipple.stages.ldm.ldm_run import LdmRunConfig, config_from_init, open_init
from stipple.stages.ldm.ldm_training import LdmTraining
from stipple.stages.ldm.next_command import drawing_command, sampling_flags
from stipple.stages.ldm.objectives import make_objective
from stipple.stages.ldm.prepare_run import prepare_run
from stipple.stages.ldm.run_cache import open_cache
from stipple.stages.ldm.trainable import make_trainable
from stipple.training.run.run_folder import disk_errors
from stipple.training.trainer import Trainer
from stipple_core.config import load_config, one_line_errors, to_dict
from stipple_core.randomness import generator, normal, uniform

SAVED_DTYPES = {"fp32": None, "fp16": torch.float16}  # save_precision -> dtype; None: as trained


def train(config: LdmRunConfig, init: InitModel[ModelParts] | None = None) -> None:
    """Train, and save the result in the run folder: the model, its LoRA layers or a new word.

    Args:
        config: of the run.
        init: holds the model of `init_from` if reading the config has opened it.
    """
    init = init or InitModel(open_init)
    with one_line_errors():
        trainable = make_trainable(config.lora, config.inversion, config.init_from)
        product = trainable.product
        trainer = Trainer(config.trainer, config.run, to_dict(config), product)  # from here on, time and signals count
        start = init.open(config.init_from)
        model, data_check = prepare_run(config, start, trainable, trainer)
        cache = open_cache(config, data_check.records.train, model)
        data = RunData.open(config.data, data_check, config.seed, config.run, cache, model.conditioner.hint)
        objective = make_objective(config, model, trainer, start)
        init.release()
        del start
        training = LdmTraining.register(trainer, model, config, trainable, objective.averages)
        encoder = BatchEncoder(model.autoencoder, model.conditioner, training.text_network, cache, config.needs_null)
        samples = SamplePrompts.of(config.samples.prompts, data.examples, encoder)
        model.plan(samples.prompts, inputs=samples.inputs)  # raises now for settings that are not supported
    device, seed, diffusion = trainer.device, config.seed, config.diffusion
    density = make_density(diffusion.density, model.schedule)
    step_losses = torch.zeros(config.trainer.batch_size, device=device)  # of the global batch, for importance sampling
    if isinstance(density, Importance):
        trainer.keep("importance", density)
    with one_line_errors():
        data.begin(trainer, config)

    def save_model(folder: Path | None) -> None:
        with training.averaged(saved=True) as whole:
            if folder is not None:
                trainable.save(whole, folder, SAVED_DTYPES[config.save_precision])

    denoiser = Denoiser(training.network, model.schedule, diffusion.prediction)
    with data.reported(trainer):
        for batch in trainer.steps(data.loader(trainer, seed), save_model, data.names):
            step, positions = trainer.step, trainer.positions()
            if config.network.dropout:  # the only random numbers that are drawn inside a network
                torch.manual_seed(generator(seed, "dropout", step, positions[0]).initial_seed())
            posterior = encoder.posterior(batch, device)
            shape = posterior.mean.shape[1:]
            z_0 = posterior.sample(normal(seed, "posterior", step, positions, shape).to(device))
            z_0 = z_0.to(memory_format=torch.channels_last)
            noise = normal(seed, "noise", step, positions, shape).to(device, memory_format=torch.channels_last)
            t, weight = density.draw(uniform(seed, "t", step, positions))
            drop = uniform(seed, "caption dropout", step, positions) < diffusion.caption_dropout
            context, null = encoder.contexts(batch, device)
            context = context if null is None else drop_context(context, null, drop.to(device))
            draw = partial(uniform, seed, step=step, positions=positions)
            losses = objective(
                denoiser, DiffusionBatch(z_0=z_0, context=context, null=null, t=t, noise=noise, draw=draw)
            )
            loss = (losses * weight.to(losses) * data.weights(batch).to(losses)).mean()
            trainer.update(loss, training.optimizer)
            trainer.log(loss=loss)
            if isinstance(density, Importance):
                update_density(trainer, density, losses, step_losses, seed)
            if trainer.due(config.validation.every) and len(data.held_out):
                with training.averaged() as whole:
                    averaged = Denoiser(whole.unet, model.schedule, diffusion.prediction)
                    frozen = replace(encoder, conditioner=whole.conditioner, text_network=whole.conditioner)
                    validate(trainer, averaged, data.held_out, frozen, config.validation, seed)
            if trainer.due(config.samples.every):
                with training.averaged() as whole:
                    if trainer.is_main:
                        draw_samples(trainer, whole, samples, seed)
    flags = trainable.flags(config.run)
    if config.distillation is not None and product != "model":  # the adapted model has other defaults
        flags += sampling_flags(model.defaults)
    command = shlex.join(drawing_command(model, samples.prompts[0], flags))
    trainer.print(f"the {product} is in {config.run}/{product}; next:\n  {command}")


def read_config(arguments: argparse.Namespace) -> LdmRunConfig:
    """Return the config of a command line; exits with one line and code 2 after a mistake.

    The model of `init_from`, which decides defaults of the config, is kept in `arguments.init` for `run`.
    """
    arguments.init = InitModel(open_init)
    base = partial(config_from_init, init=arguments.init)
    with one_line_errors():
        return load_config(LdmRunConfig, arguments.config, arguments.overrides, base)


def run(config: LdmRunConfig, arguments: argparse.Namespace) -> None:
    """Train with a config that `read_config` returned."""
    with disk_errors(config.run):
        train(config, arguments.init)


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command line in this process, which accelerate may have started as one of several."""
    arguments = read_arguments("train", argv)
    run(read_config(arguments), arguments)


if __name__ == "__main__":
    main()
