"""The trained networks of a stage-2 run with their optimizer and averages, registered with the trainer."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

from torch import nn

from conditioning.readers.combined import files_of
from ldm.pipeline import TextToImage
from stipple.stages.ldm.ldm_run import LdmRunConfig
from stipple.stages.ldm.trainable import Trainable
from stipple.training.optimization.ema import Ema
from stipple.training.optimization.optimizer import Optimizer
from stipple.training.trainer import Trainer
from stipple_core.images.drawn_pictures import model_hash


@dataclass(frozen=True, kw_only=True)
class LdmTraining:
    """The trained networks of a stage-2 run with their optimizer and averages."""

    trainer: Trainer
    model: TextToImage
    modules: list[nn.Module]  # the trained modules of the model: the UNet, the text encoder, or both
    network: nn.Module  # the UNet, wrapped for several processes if it is trained
    text_network: nn.Module  # the text encoder, likewise
    averages: list[Ema]  # one for each module
    optimizer: Optimizer

    @classmethod
    def register(
        cls,
        trainer: Trainer,
        model: TextToImage,
        config: LdmRunConfig,
        trainable: Trainable,
        followers: Sequence[Ema] = (),
    ) -> LdmTraining:
        """Register all state with the trainer; `followers` are the averages of the objective."""
        modules, network, text_network = [], model.unet, model.conditioner
        if trainable.base is not None:
            trainer.watch("model that is adapted", trainable.base)
        for path in files_of(model.conditioner):
            trainer.watch("database", model_hash(path))
        if any(p.requires_grad for p in model.unet.parameters()):
            modules.append(model.unet)
            network = trainer.network("unet", model.unet, may_partition=trainable.base is None)
        else:  # wrapped so that it computes in the precision of the run
            network = trainer.accelerator.prepare_model(model.unet, evaluation_mode=True)
        if model.conditioner.trainable:
            modules.append(model.conditioner)
            if model.conditioner.tokenizer is not None:
                trainer.keep("tokenizer", model.conditioner.tokenizer)  # trained on captions, which may change
            text_network = trainer.network("conditioner", model.conditioner, may_partition=trainable.base is None)
        averages = [Ema(module, config.ema) for module in modules]
        optimizer = trainer.optimizer("optimizer", modules, config.optimizer, [*averages, *followers])
        return cls(
            trainer=trainer, model=model, modules=modules, network=network, text_network=text_network,
            averages=averages, optimizer=optimizer,
        )  # fmt: skip

    @contextmanager
    def averaged(self, saved: bool = False) -> Iterator[TextToImage | None]:
        """Within the block, the networks have the averaged weights and are in evaluation mode; yields the whole model.

        Every process has to enter it. With `saved`, the model is only going to be saved, see `Trainer.whole`.
        """
        with ExitStack() as stack:
            for average in self.averages:
                stack.enter_context(average.applied())
            try:
                for module in self.modules:
                    module.eval()
                yield self._whole(saved)
            finally:
                for module in self.modules:
                    module.train()

    def _whole(self, saved: bool) -> TextToImage | None:
        copies, model = {module: self.trainer.whole(module, saved) for module in self.modules}, self.model
        if None in copies.values():
            return None
        unet, conditioner = (copies.get(part, part) for part in (model.unet, model.conditioner))
        return TextToImage(model.autoencoder, unet.eval(), conditioner.eval(), model.scheduling, model.defaults)
