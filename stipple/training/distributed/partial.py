"""A network of which a part learns: what is frozen comes from elsewhere and is in no checkpoint."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn


class PartialWeights:
    """The parameters of a model that learn, as a part of a run's state."""

    def __init__(self, model: nn.Module):
        self.learning = {name: p for name, p in model.named_parameters() if p.requires_grad}

    def state_dict(self) -> dict[str, Tensor]:
        """By the model's names."""
        return {name: p.detach() for name, p in self.learning.items()}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Take back a `state_dict`; ValueError when names or shapes are not this model's."""
        if self.learning.keys() != state.keys():
            raise ValueError(f"what learns differs: {', '.join(sorted(self.learning.keys() ^ state.keys())[:5])}")
        for name, p in self.learning.items():
            if p.shape != state[name].shape:
                raise ValueError(f"{name} is {list(state[name].shape)} in it, {list(p.shape)} in the run")
            p.detach().copy_(state[name])


def saved_part(model: nn.Module) -> nn.Module | PartialWeights:
    """What of a network a checkpoint holds: all of it where all of it learns."""
    return model if all(p.requires_grad for p in model.parameters()) else PartialWeights(model)
