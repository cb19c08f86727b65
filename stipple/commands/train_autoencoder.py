"""Stage 1: train an autoencoder on a folder of images (Rombach et al. 2022, section 3.1).

stipple train-autoencoder --config configs/autoencoder/emoji.yaml data.folder=PATH
stipple train-autoencoder init_from=vae-ft-mse.safetensors data.folder=PATH
"""

from __future__ import annotations

import argparse
import dataclasses
import shlex
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import torch
from accelerate import PartialState

from autoencoder import Autoencoder
from autoencoder.losses.adversarial_loss import discriminator_loss
from autoencoder.losses.generator_loss import generator_loss
from stipple.cli.training_arguments import read_arguments
from stipple.stages.autoencoder.adversary import discriminate
from stipple.stages.autoencoder.autoencoder_parts import (
    AutoencoderTraining,
    build_networks,
    crop_squares,
    initialize_linearly,
    train_perceptual,
)
from stipple.stages.autoencoder.autoencoder_run import AutoencoderRunConfig, config_from_init
from stipple.stages.autoencoder.reconstruction import measure_scale, validate
from stipple.stages.data.data_check import DataCheck
from stipple.stages.data.run_data import RunData
from stipple.stages.init_model import InitModel
from stipple.training.run.run_folder import disk_errors
from stipple.training.trainer import Trainer
from stipple_core.config import load_config, one_line_errors, to_dict
from stipple_core.data.sources.scan import scan
from stipple_core.randomness import normal
from stipple_core.resources import resource


def train(config: AutoencoderRunConfig, init: InitModel[Autoencoder] | None = None) -> None:
    """Train, measure the scale of latents, and save the model in `run/model`.

    Args:
        config: of the run.
        init: holds the autoencoder of `init_from` if reading the config has opened it.
    """
    init = init or InitModel(Autoencoder.load)
    with one_line_errors():
        trainer = Trainer(config.trainer, config.run, to_dict(config))  # first: from here on, time and signals count
        records = scan(config.data, captioned=False)
        networks = build_networks(config, init.open(config.init_from), trainer.device)
        init.release()
        data_check = DataCheck.of(records, config.data, trainer)
        data = RunData.open(config.data, data_check, config.seed, config.run)
        training = AutoencoderTraining.register(trainer, networks, config)
    with one_line_errors():
        data.begin(trainer, config)
    initialize_linearly(trainer, networks.autoencoder, training.average, data, config)
    train_perceptual(trainer, networks.perceptual, data, config)
    autoencoder, device, seed = networks.autoencoder, trainer.device, config.seed

    def save_model(folder: Path) -> None:
        last = trainer.step == config.trainer.steps
        count = config.validation.scale_images if last else 256
        with training.average.applied():
            if config.decoder_only:  # latents and their scale have not changed
                autoencoder.save(folder)
            else:
                degree = config.latent_balance if last else 0.0  # measuring takes half a minute
                measure_scale(autoencoder, data.squares, count, device, degree).save(folder)

    channels, f = config.autoencoder.code_channels, autoencoder.downsampling
    with data.reported(trainer):
        for batch in trainer.steps(data.loader(trainer, seed), save_model, data.names):
            images = batch.images.to(device, memory_format=torch.channels_last, non_blocking=True)
            images = crop_squares(images, config.patch, seed, trainer.step, trainer.positions())
            latent_shape = (channels, images.shape[2] // f, images.shape[3] // f)
            noise = normal(seed, "posterior", trainer.step, trainer.positions(), latent_shape).to(device)
            reconstruction = training.network(images, noise)
            # under autocast, accelerate converts the outputs of a network to float32, but not those in a dataclass
            reconstruction = dataclasses.replace(reconstruction, images=reconstruction.images.float())
            adversarial = config.discriminator_start is not None and trainer.step + 1 >= config.discriminator_start
            adversary = (
                discriminate(networks.discriminator, images, reconstruction.images, config.loss)
                if adversarial
                else None
            )
            loss = generator_loss(
                images, reconstruction, config.loss, networks.perceptual, adversary, autoencoder.last_layer
            )
            trainer.update(loss.total, training.optimizer)
            trainer.log(loss=loss.total, **{k: v for k, v in loss.scalars().items() if k != "total"})
            if adversarial:
                logits, _ = training.discriminator_network(torch.cat([images, reconstruction.images.detach()]))
                critic_loss = discriminator_loss(*logits.chunk(2))
                trainer.update(critic_loss, training.discriminator_optimizer)
                trainer.log(discriminator_loss=critic_loss)
            if training.codebook is not None:
                training.codebook.add(reconstruction.indices, reconstruction.posterior.mean)
                if training.codebook.due(config.revive_every):
                    trainer.record(**training.codebook.revive(seed, training.average, training.optimizer))
            if trainer.due(config.validation.every) and len(data.held_out):
                with training.average.applied():
                    validate(trainer, autoencoder, data.held_out, config.validation)


def next_command(config: AutoencoderRunConfig, path: str | None) -> str:
    """Return the command that caches latents of the trained autoencoder.

    Args:
        config: of this run.
        path: of its YAML file; a recipe of stage 2 with the same name is the next one.
    """
    recipe = f"configs/ldm/{Path(path or '').name}"
    if not Path(recipe).is_file() and not resource(recipe).is_file():
        recipe = "configs/ldm/txt2img-small.yaml"
    overrides = [*config.data.overrides, f"autoencoder={config.run}/model", f"cache=cache/{Path(config.run).name}"]
    return shlex.join(["stipple", "cache", "--config", recipe, *overrides])


def read_config(arguments: argparse.Namespace) -> AutoencoderRunConfig:
    """Return the config of a command line; exits with one line and code 2 after a mistake.

    The model of `init_from`, which decides defaults of the config, is kept in `arguments.init` for `run`.
    """
    arguments.init = InitModel(Autoencoder.load)
    base = partial(config_from_init, init=arguments.init)
    with one_line_errors():
        return load_config(AutoencoderRunConfig, arguments.config, arguments.overrides, base)


def run(config: AutoencoderRunConfig, arguments: argparse.Namespace) -> None:
    """Train with a config that `read_config` returned."""
    with disk_errors(config.run):
        train(config, arguments.init)
    if PartialState().is_main_process:
        print(f"the autoencoder is in {config.run}/model; next:\n  {next_command(config, arguments.config)}")


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command line in this process, which accelerate may have started as one of several."""
    arguments = read_arguments("train-autoencoder", argv)
    run(read_config(arguments), arguments)


if __name__ == "__main__":
    main()
