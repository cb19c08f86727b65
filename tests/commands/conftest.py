"""A small model for the tests of the drawing commands, and a way to run `stipple draw` in this process."""

from pathlib import Path

import pytest

import stipple.commands.draw as draw
from tests.helpers.models.small_models import build_model


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "small"
    build_model(tmp_path_factory.mktemp("encoder"), encoder="bert").save(folder)
    return folder


@pytest.fixture
def run(checkpoint, tmp_path, capsys):
    """Run the command in this process; returns the paths that it prints."""

    def call(*arguments) -> list[Path]:
        model = [] if "--checkpoint" in arguments or "--like" in arguments else ["--checkpoint", checkpoint]
        draw.main([str(word) for word in ["--outdir", tmp_path / "out", *model, *arguments]])
        return [Path(line) for line in capsys.readouterr().out.splitlines()]

    return call
