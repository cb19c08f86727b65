"""Stage 2: train a latent UNet that reads captions (Rombach et al. 2022, sections 3.2 and 3.3).

accelerate launch train_ldm.py --config configs/ldm/emoji.yaml data.folder=PATH autoencoder=runs/emoji-autoencoder/model
accelerate launch train_ldm.py init_from=sd-v1-5.safetensors data.folder=PATH
"""

from __future__ import annotations

import argparse
import shlex
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch

from conditioning.context import drop_context
from ldm.denoiser import Denoiser
from ldm.densities import Importance, make_density
from ldm.loss import diffusion_loss
from stages.denoising import draw_samples, learn, validate
from stages.inputs import Inputs
from stages.ldm_parts import Learner, build_model, open_cache
from stages.ldm_run import RunConfig, inherited
from stages.pictures import Pictures
from stages.survey import Survey
from storage.config import load_config, one_line_errors, to_dict
from storage.dataset import scan
from storage.randomness import generator, normal, uniform
from training.command_line import parse
from training.run_folder import disk_errors
from training.trainer import Trainer


def train(config: RunConfig) -> None:
    """Train, and leave the model in `run/model`."""
    with one_line_errors():
        trainer = Trainer(config.trainer, config.run, to_dict(config))  # first: from here on time and signals count
        found = scan(config.data)
        survey = Survey.of(found, config.data, trainer, cached=config.cache is not None)
        model = build_model(config, survey.records.train, trainer.device)
        cache = open_cache(config, survey.records.train, model)
        pictures = Pictures.open(config.data, survey, config.seed, config.run, cache)
        shown = (pictures.records.validation or pictures.records.train)[:8]
        prompts = config.samples.prompts or [record.captions[0][0] for record in shown]
        model.plan(prompts)  # a wrong number of steps is to be found now, not at the first preview
        learner = Learner.register(trainer, model, config)
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
                whole.save(folder, {"fp32": None, "fp16": torch.float16}[config.save_precision])

    denoiser = Denoiser(learner.network, model.schedule, diffusion.prediction)
    inputs = Inputs(model.autoencoder, model.conditioner, learner.text_network, cache)
    with pictures.reported(trainer):
        for batch in trainer.steps(pictures.loader(trainer, seed), save_model, pictures.names):
            step, positions = trainer.step, trainer.positions()
            if config.unet.dropout:  # the one draw that is made inside a network
                torch.manual_seed(generator(seed, "dropout", step, positions[0]).initial_seed())
            posterior = inputs.posterior(batch, device)
            shape = posterior.mean.shape[1:]
            z_0 = posterior.sample(normal(seed, "posterior", step, positions, shape).to(device))
            z_0 = z_0.to(memory_format=torch.channels_last)
            noise = normal(seed, "noise", step, positions, shape).to(device, memory_format=torch.channels_last)
            t, weight = density.draw(uniform(seed, "t", step, positions))
            drop = uniform(seed, "caption dropout", step, positions) < diffusion.caption_dropout
            context = drop_context(*inputs.contexts(batch, device), drop.to(device))
            losses = diffusion_loss(denoiser, z_0, context, t, noise, diffusion.weighting, diffusion.gamma)
            loss = (losses * weight.to(losses)).mean()
            trainer.update(loss, learner.optimizer)
            trainer.log(loss=loss)
            if isinstance(density, Importance):
                learn(trainer, density, losses, seen, seed)
            if trainer.due(config.validation.every) and len(pictures.held_out):
                with learner.averaged() as whole:
                    single = Denoiser(whole.unet, model.schedule, diffusion.prediction)
                    told = replace(inputs, conditioner=whole.conditioner)
                    validate(trainer, single, pictures.held_out, told, config.validation, seed)
            if trainer.due(config.samples.every):
                with learner.averaged() as whole:
                    if trainer.is_main:
                        draw_samples(trainer, whole, prompts, seed)
    command = shlex.join(["python", "txt2img.py", prompts[0], "--checkpoint", f"{config.run}/model"])
    trainer.print(f"the model is in {config.run}/model; next:\n  {command}")


def main(argv: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments = parse(parser, "configs/ldm/emoji.yaml", argv)
    with one_line_errors():
        config = load_config(RunConfig, arguments.config, arguments.overrides, inherited)
    with disk_errors(config.run):
        train(config)


if __name__ == "__main__":
    main()
