"""The checkpoints of a run and the model that is saved with each: written and restored by all processes together."""

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

SaveModel = Callable[[Path | None], None]  # into a folder; for None see `Trainer.steps`


class Checkpoints:
    """Saves and restores a run. Every process has an instance, and all have to call each method together.

    Args:
        folder: of the run.
        run_state: the parts whose states are saved and restored.
        networks: tells whether any network is partitioned.
        metrics: their lines are made durable before the checkpoint that follows them.
        is_main: whether this is the process that writes.
    """

    def __init__(
        self, folder: RunFolder, run_state: RunState, networks: WrappedNetworks, metrics: Metrics, is_main: bool
    ):
        self.folder, self.is_main = folder, is_main
        self._run_state, self._networks, self._metrics = run_state, networks, metrics

    def resume(self, enabled: bool, print_line: Callable[[str], None]) -> int:
        """Lock the run folder, and restore its newest valid checkpoint if `enabled`; returns the step to start from.

        Raises:
            ValueError: another run holds the folder, no checkpoint is valid, or it does not fit this run.
        """
        newest = on_main(lambda: self._take_newest(enabled), self.is_main)
        if newest is None:
            self._metrics.rewind(0)
            return 0
        state = checkpoint.open_state(newest)
        if not isinstance(state, dict) or state.keys() != {"step", "window", "parts"}:
            raise ValueError(f"{newest} is not the state of a run; remove it to use the checkpoint before it")
        self._run_state.load_state_dict(state["parts"], newest)
        self._metrics.rewind(state["step"], state["window"])
        print_line(f"resumed from {newest}")
        return state["step"]

    def save(self, step: int, save_model: SaveModel | None) -> None:
        """Write state/step-N atomically, then the model folder, then remove old checkpoints."""
        window = self._metrics.window()  # a sum over all processes, so each has to call it

        def state() -> dict[str, Any]:
            return {"step": step, "window": window, "parts": self._run_state.state_dict()}

        on_main(self._metrics.sync, self.is_main)
        if self._networks.partitioned:
            rows = fsdp.rows_of_all(state())
            write_together(self.folder.checkpoint(step), lambda path: save_rows(path, rows))
        else:
            on_main(lambda: self.folder.save(step, state()), self.is_main)
        self._complete(save_model)

    def finish(self, step: int, save_model: SaveModel | None) -> None:
        """After the last step, write the model folder unless it is complete and newer than the checkpoint."""
        has_model = on_main(lambda: self.folder.has_model(step), self.is_main)
        self._complete(None if has_model else save_model)

    def _take_newest(self, enabled: bool) -> Path | None:
        self.folder.take()
        return self.folder.newest(enabled)

    def _complete(self, save_model: SaveModel | None) -> None:
        """Write the model folder, for which other processes send their rows; then remove old checkpoints."""
        if save_model is not None:
            if self._networks.partitioned:
                write_together(self.folder.model, lambda path: save_model(path if self.is_main else None))
            else:
                on_main(lambda: checkpoint.write_folder(self.folder.model, save_model), self.is_main)
        on_main(self.folder.prune, self.is_main)
