"""Runs of the trainer that fit a line, y = 3 x_0 - 2 x_1, in this process or as a script.

python tests/helpers/training/line_runs.py FOLDER steps=40 batch_size=8 pause=0.05
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
import yaml
from torch import Tensor, nn

from stipple.training.optimization.ema import Ema, EmaConfig
from stipple.training.optimization.update_rules import OptimizerConfig
from stipple.training.trainer import Trainer
from stipple.training.trainer_config import TrainerConfig

OPTIMIZER = OptimizerConfig(learning_rate=0.1, warmup_steps=3, schedule="cosine", clip_norm=1.0)
SLOPE = torch.tensor([3.0, -2.0], dtype=torch.float64)


def line() -> nn.Module:
    return nn.Linear(2, 1).double()


@dataclass(frozen=True)
class Points:
    """A micro-batch."""

    x: Tensor  # [B, 2]
    names: list[str]


class Run:
    """A run in which sample `j` of step `i` has its own seed and the name i/j."""

    def __init__(self, folder: Path, model: Callable[[], nn.Module] = line, **settings):
        config = TrainerConfig(**{"steps": 8, "batch_size": 8, "save_every": 3, "log_every": 1, **settings})
        self.trainer = Trainer(config, folder, {"trainer": {"steps": config.steps}})
        torch.manual_seed(0)
        self.model = model()
        network = self.trainer.network("model", self.model)
        self.ema = Ema(self.model, EmaConfig())
        self.optimizer = self.trainer.optimizer("optimizer", [self.model], OPTIMIZER, [self.ema])
        self.trainer.resume()
        self.network, self.rates, self.batches = network, [], 0

    def loader(self) -> Iterator[Points]:
        trainer, size = self.trainer, self.trainer.share.micro_batch_size
        for step in range(trainer.step, trainer.config.steps):
            for micro in range(trainer.accumulation):
                first = (micro * trainer.world + trainer.rank) * size
                draws = [torch.Generator().manual_seed(1000 * step + j) for j in range(first, first + size)]
                x = torch.stack([torch.randn(2, dtype=torch.float64, generator=g) for g in draws])
                yield Points(x, [f"{step}/{j}" for j in range(first, first + size)])

    def train(self, each=lambda step, loss: loss, save_model=None) -> Run:
        """Train to the last step. `each` may change a loss or perform an action at a step."""
        for points in self.trainer.steps(self.loader(), save_model, lambda batch: batch.names):
            loss = (self.network(points.x)[:, 0] - points.x @ SLOPE).square().mean()
            self.trainer.update(each(self.trainer.step, loss), self.optimizer)
            self.rates.append(self.optimizer.rules[0].param_groups[0]["lr"])
            self.trainer.log(loss=loss, **{"rate": self.rates[-1]} if self.trainer.last_micro else {})
            self.batches += 1
        return self

    def numbers(self) -> list[Tensor]:
        """Weights, EMA and optimizer state."""
        moments = [value for state in self.optimizer.rules[0].state.values() for value in state.values()]
        return [value.detach().clone() for value in [*self.model.parameters(), *self.ema.averages.values(), *moments]]


def at(target: int, action: Callable[[], object]) -> Callable[[int, Tensor], Tensor]:
    """For `Run.train`: call `action` at a step, before its update."""

    def each(step: int, loss: Tensor) -> Tensor:
        if step == target:
            action()
        return loss

    return each


def main(folder: str, *arguments: str) -> None:
    settings = {"pause": 0.0, **yaml.safe_load("\n".join(each.replace("=", ": ", 1) for each in arguments) or "{}")}
    pause = settings.pop("pause")
    Run(Path(folder), **settings).train(lambda step, loss: (time.sleep(pause), loss)[1])


if __name__ == "__main__":
    main(*sys.argv[1:])
