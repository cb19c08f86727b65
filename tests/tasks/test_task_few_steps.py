"""The shipped model, distilled to 4 steps, follows prompts nearly as often as in 20 guided steps, 5 times faster.

STIPPLE_EMOJI is the folder of emoji that the model was trained on (checkpoints/README.md). Runs in the folder
STIPPLE_RUNS are resumed. The results are in docs/tasks/few_steps.md.
"""

import os
from pathlib import Path

import pytest

from benchmarks.quality.few_steps import measure
from ldm import TextToImage
from tests.helpers.training.tiny_runs import ROOT, run_here

EMOJI = os.environ.get("STIPPLE_EMOJI")
RECALLS = ("rgb_at_1", "rgb_at_5", "latents_at_1", "latents_at_5")
pytestmark = [
    pytest.mark.usefixtures("settings_of_runs"),
    pytest.mark.slow,
    pytest.mark.skipif(EMOJI is None, reason="STIPPLE_EMOJI names no folder"),
]


@pytest.mark.parametrize(("kind", "share"), [("emoji-guidance", 0.9), ("emoji-lcm", 0.6)])
def test_four_steps_of_a_student_keep_the_recall_of_twenty_guided_ones_in_a_fifth_of_the_time(kind, share, tmp_path):
    """Nine tenths for guidance distillation. Consistency distillation misses them; its share only guards the recipe."""
    folder = Path(os.environ.get("STIPPLE_RUNS") or tmp_path)
    arguments = ["--config", f"configs/ldm/{kind}.yaml", f"data.folder={EMOJI}", f"run={folder / kind}"]
    arguments += [f"cache={folder / kind}-cache"]
    for script in ("stipple.commands.cache", "train_ldm.py"):
        run_here(script, *arguments)
    teacher = TextToImage.load(ROOT / "checkpoints/emoji")
    student = TextToImage.load(folder / kind / "model")
    config = str(ROOT / "configs/ldm/emoji.yaml")
    found, _ = measure(teacher, student, EMOJI, config, limit=200, kind="caption", batch=8)
    print(found)
    ours, theirs = found["student"], found["teacher, guided"]
    assert (ours["steps"], ours["guidance_scale"], theirs["steps"]) == (4, 1.0, 20)
    for recall in RECALLS:
        assert ours[recall] >= share * theirs[recall], recall
    assert theirs["seconds_per_picture"] >= 5 * ours["seconds_per_picture"]
