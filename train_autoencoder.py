"""Stage 1: train an autoencoder on a folder of images (Rombach et al. 2022, section 3.1).

accelerate launch train_autoencoder.py --config configs/autoencoder/emoji.yaml data.folder=PATH
accelerate launch train_autoencoder.py init_from=vae-ft-mse.safetensors data.folder=PATH
"""

from __future__ import annotations

import argparse
import dataclasses
import shlex
from collections.abc import Sequence
from pathlib import Path

import torch
from accelerate import PartialState

from autoencoder.losses import discriminator_loss, generator_loss
from stages.autoencoder_parts import AutoencoderLearner, begin_linearly, build_networks, cut, train_perceptual
from stages.autoencoder_run import RunConfig, inherited
from stages.judgement import judge
from stages.pictures import Pictures
from stages.reconstruction import measure_scale, validate
from stages.survey import Survey
from storage.config import load_config, one_line_errors, to_dict
from storage.dataset import scan
from storage.randomness import normal
from training.command_line import parse
from training.run_folder import disk_errors
from training.trainer import Trainer


def train(config: RunConfig) -> None:
    """Train, measure, and leave the model in `run/model`."""
    with one_line_errors():
        trainer = Trainer(config.trainer, config.run, to_dict(config))  # first: from here on time and signals count
        found = scan(config.data, captioned=False)
        networks = build_networks(config, trainer.device)
        survey = Survey.of(found, config.data, trainer)
        pictures = Pictures.open(config.data, survey, config.seed, config.run)
        learner = AutoencoderLearner.register(trainer, networks, config)
    with one_line_errors():
        pictures.begin(trainer, config)
    begin_linearly(trainer, networks.autoencoder, learner.average, pictures, config)
    train_perceptual(trainer, networks.perceptual, pictures, config)
    autoencoder, device, seed = networks.autoencoder, trainer.device, config.seed

    def save_model(folder: Path) -> None:
        last = trainer.step == config.trainer.steps
        count = config.validation.scale_images if last else 256
        with learner.average.applied():
            if config.decoder_only:  # its latents, and their scale, are as they were
                autoencoder.save(folder)
            else:
                degree = config.latent_balance if last else 0.0  # takes half a minute
                measure_scale(autoencoder, pictures.squares, count, device, degree).save(folder)

    channels, f = config.autoencoder.code_channels, autoencoder.downsampling
    with pictures.reported(trainer):
        for batch in trainer.steps(pictures.loader(trainer, seed), save_model, pictures.names):
            images = batch.images.to(device, memory_format=torch.channels_last, non_blocking=True)
            images = cut(images, config.patch, config.seed, trainer.step, trainer.positions())
            latent_shape = (channels, images.shape[2] // f, images.shape[3] // f)
            noise = normal(seed, "posterior", trainer.step, trainer.positions(), latent_shape).to(device)
            reconstruction = learner.network(images, noise)
            # accelerate makes float32 of tensors that leave a network under autocast, but not of those in a dataclass
            reconstruction = dataclasses.replace(reconstruction, images=reconstruction.images.float())
            judging = config.discriminator_start is not None and trainer.step + 1 >= config.discriminator_start
            judgement = judge(networks.discriminator, images, reconstruction.images, config.loss) if judging else None
            loss = generator_loss(
                images, reconstruction, config.loss, networks.perceptual, judgement, autoencoder.last_layer
            )
            trainer.update(loss.total, learner.optimizer)
            trainer.log(loss=loss.total, **{k: v for k, v in loss.scalars().items() if k != "total"})
            if judging:
                logits, _ = learner.judging_network(torch.cat([images, reconstruction.images.detach()]))
                judge_loss = discriminator_loss(*logits.chunk(2))
                trainer.update(judge_loss, learner.judge_optimizer)
                trainer.log(discriminator_loss=judge_loss)
            if learner.codebook is not None:
                learner.codebook.add(reconstruction.indices, reconstruction.posterior.mean)
                if learner.codebook.due(config.revive_every):
                    trainer.record(**learner.codebook.revive(seed, learner.average, learner.optimizer))
            if trainer.due(config.validation.every) and len(pictures.held_out):
                with learner.average.applied():
                    validate(trainer, autoencoder, pictures.held_out, config.validation)


def next_command(config: RunConfig, path: str | None) -> str:
    """The command that caches latents with the trained autoencoder, its config named like this run's (`path`)."""
    stem = Path(path or "").name
    ldm = f"configs/ldm/{stem}" if Path(f"configs/ldm/{stem}").is_file() else "configs/ldm/txt2img-small.yaml"
    given = [*config.data.overrides, f"autoencoder={config.run}/model"]
    given += [f"cache=cache/{Path(config.run).name}"]
    return shlex.join(["accelerate", "launch", "cache_latents.py", "--config", ldm, *given])


def main(argv: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments = parse(parser, "configs/autoencoder/kl-f8.yaml", argv)
    with one_line_errors():
        config = load_config(RunConfig, arguments.config, arguments.overrides, inherited)
    with disk_errors(config.run):
        train(config)
    if PartialState().is_main_process:
        print(f"the autoencoder is in {config.run}/model; next:\n  {next_command(config, arguments.config)}")


if __name__ == "__main__":
    main()
