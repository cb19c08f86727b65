"""Train a classifier of noisy latents, which guides a model of these latents (Dhariwal & Nichol 2021, section 4).

stipple train-classifier --config configs/classifier/pixels-small.yaml data.folder=PATH
stipple sample --checkpoint MODEL --classifier runs/classifier/model --classifier-scale 3 --classifier-class apple
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch

from ldm.formats.classifier_folder import save_classifier
from stipple.cli.training_arguments import read_arguments
from stipple.stages.classifier.classifier_run import ClassifierRunConfig, ClassifierTraining, build_classifier, validate
from stipple.stages.data.data_check import DataCheck
from stipple.stages.data.run_data import RunData
from stipple.training.run.run_folder import disk_errors
from stipple.training.trainer import Trainer
from stipple_core.config import load_config, one_line_errors, to_dict
from stipple_core.data.sources.scan import scan
from stipple_core.randomness import generator, normal, uniform


def train(config: ClassifierRunConfig) -> None:
    """Train, and save the classifier in `run/model/classifier`."""
    with one_line_errors():
        trainer = Trainer(config.trainer, config.run, to_dict(config))  # first: from here on, time and signals count
        data_check = DataCheck.of(scan(config.data), config.data, trainer)
        classifier, autoencoder = build_classifier(config, data_check.records, trainer.device)
        data = RunData.open(config.data, data_check, config.seed, config.run)
        training = ClassifierTraining.register(trainer, classifier, config)
    device, seed = trainer.device, config.seed
    with one_line_errors():
        data.begin(trainer, config)

    def save_model(folder: Path) -> None:
        with training.averaged() as averaged:
            save_classifier(averaged, folder)

    with data.reported(trainer):
        for batch in trainer.steps(data.loader(trainer, seed), save_model, data.names):
            step, positions = trainer.step, trainer.positions()
            if config.unet.dropout:  # the only random numbers that are drawn inside a network
                torch.manual_seed(generator(seed, "dropout", step, positions[0]).initial_seed())
            with torch.no_grad():
                posterior = autoencoder.encode(batch.images.to(device, non_blocking=True))
            shape = posterior.mean.shape[1:]
            z_0 = posterior.sample(normal(seed, "posterior", step, positions, shape).to(device))
            z_0 = z_0.to(memory_format=torch.channels_last)
            noise = normal(seed, "noise", step, positions, shape).to(device, memory_format=torch.channels_last)
            t = training.schedule.quantize(uniform(seed, "t", step, positions))
            losses, correct = training.losses(z_0, batch.captions, t, noise)
            trainer.update(losses.mean(), training.optimizer)
            trainer.log(loss=losses.mean(), accuracy=correct.mean())
            if trainer.due(config.validation.every) and len(data.held_out):
                with training.averaged():
                    validate(trainer, training, data.held_out, autoencoder, config.validation, seed)
    trainer.print(f"the classifier is in {config.run}/model; pass it to drawing commands with --classifier")


def read_config(arguments: argparse.Namespace) -> ClassifierRunConfig:
    """Return the config of a command line; exits with one line and code 2 after a mistake."""
    with one_line_errors():
        return load_config(ClassifierRunConfig, arguments.config, arguments.overrides)


def run(config: ClassifierRunConfig, arguments: argparse.Namespace) -> None:
    """Train with a config that `read_config` returned."""
    with disk_errors(config.run):
        train(config)


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command line in this process, which accelerate may have started as one of several."""
    arguments = read_arguments("train-classifier", argv)
    run(read_config(arguments), arguments)


if __name__ == "__main__":
    main()
