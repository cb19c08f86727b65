"""Checkpoints of a run, and the model that goes with each: written, and taken up again, by all processes together."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from stipple.training.distributed import fsdp
from stipple.training.distributed.collective import on_main, save_rows, write_together
from stipple.training.distributed.wrapped_networks import WrappedNetworks
from stipple.training.run.metrics import Metrics
from stipple.training.run.run_folder import RunFolder
from stipple.training.run_state import RunState
from stipple_core.files import checkpoint_folder as checkpoint

SaveModel = Callable[[Path | None], None]  # into a folder; None: see `Trainer.steps`


class Checkpoints:
    """What of a run is on disk; every process has one, and calls each method when the others do.

    Args:
        folder: of the run.
        parts: whose states are saved and restored.
        networks: which of them are sharded.
        metrics: whose lines are on disk before the checkpoint that they lead to.
        is_main: whether this is the process that writes.
    """

    def __init__(self, folder: RunFolder, parts: RunState, networks: WrappedNetworks, metrics: Metrics, is_main: bool):
        self.folder, self.is_main = folder, is_main
        self._parts, self._networks, self._metrics = parts, networks, metrics

    def resume(self, wanted: bool, say: Callable[[str], None]) -> int:
        """Take the run folder, and where it is wanted up its newest valid checkpoint; the step from which to go on.

        Raises ValueError where another run holds the folder, no checkpoint is valid, or it is not of these parts.
        """
        found = on_main(lambda: self._take_up(wanted), self.is_main)
        if found is None:
            self._metrics.rewind(0)
            return 0
        state = checkpoint.open_state(found)
        if not isinstance(state, dict) or state.keys() != {"step", "window", "parts"}:
            raise ValueError(f"{found} is no state of a run; remove it, and the one before it is used")
        self._parts.load_state_dict(state["parts"], found)
        self._metrics.rewind(state["step"], state["window"])
        say(f"resumed from {found}")
        return state["step"]

    def save(self, step: int, save_model: SaveModel | None) -> None:
        """Write state/step-N atomically, then the model folder, then prune."""
        window = self._metrics.window()  # over all processes, so every one takes part

        def state() -> dict[str, Any]:
            return {"step": step, "window": window, "parts": self._parts.state_dict()}

        on_main(self._metrics.sync, self.is_main)
        if self._networks.sharded:
            own = fsdp.rows_of_all(state())
            write_together(self.folder.checkpoint(step), lambda path: save_rows(path, own))
        else:
            on_main(lambda: self.folder.save(step, state()), self.is_main)
        self._complete(save_model)

    def finish(self, step: int, save_model: SaveModel | None) -> None:
        """Of a run that has made its last step, the model folder, unless it is whole and newer than the checkpoint."""
        has_model = on_main(lambda: self.folder.has_model(step), self.is_main)
        self._complete(None if has_model else save_model)

    def _take_up(self, wanted: bool) -> Path | None:
        self.folder.take()
        return self.folder.newest(wanted)

    def _complete(self, save_model: SaveModel | None) -> None:
        """After a checkpoint: the model folder, which the main process writes and others help to gather; then prune."""
        if save_model is not None:
            if self._networks.sharded:
                write_together(self.folder.model, lambda path: save_model(path if self.is_main else None))
            else:
                on_main(lambda: checkpoint.write_folder(self.folder.model, save_model), self.is_main)
        on_main(self.folder.prune, self.is_main)
