"""The trained part of a network, if the rest is frozen: only this part is in checkpoints."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn


class PartialWeights:
    """The trained parameters of a model, as a part of the state of a run."""

    def __init__(self, model: nn.Module):
        self.trained = {name: p for name, p in model.named_parameters() if p.requires_grad}

    def state_dict(self) -> dict[str, Tensor]:
        """The trained parameters by name."""
        return {name: p.detach() for name, p in self.trained.items()}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Restore a `state_dict`. Raises ValueError if its names or shapes are not those of the model."""
        if self.trained.keys() != state.keys():
            raise ValueError(f"trained weights differ: {', '.join(sorted(self.trained.keys() ^ state.keys())[:5])}")
        for name, p in self.trained.items():
            if p.shape != state[name].shape:
                raise ValueError(f"{name} is {list(state[name].shape)} in it, {list(p.shape)} in the run")
            p.detach().copy_(state[name])


def saved_part(model: nn.Module) -> nn.Module | PartialWeights:
    """The part of a network that checkpoints hold: all of it if all of it is trained."""
    return model if all(p.requires_grad for p in model.parameters()) else PartialWeights(model)
