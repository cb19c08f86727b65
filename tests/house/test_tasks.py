"""No `if task`: the names of the tasks occur in configs, in conditioning/ and in the commands named after them.

A task is a choice of conditioner, autoencoder, network and objective. What trains and what samples must not know which.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
TASKS = {  # the words by which code would tell tasks apart
    "text to image": r"txt2img(?!.py)|text2img",
    "class": r"class_conditional|class_label|[Ii]mage[Nn]et|IMAGENET",
    "layout": r"layouts\b|^_?layout$|--layout|Layout(Tokenizer|Config)",
    "semantic synthesis": r"[Ss]emantic",
    "inpainting": r"[Ii]npaint",
    "super-resolution": r"super_?res|upscal|low_res",
    "depth": r"DepthHint|depth_map|EdgesHint",
    "variations": r"unclip|image_variation",
    "retrieval": r"[Rr]etriev|^neighbors$",
    "unconditional": r"Unconditional\b",  # not the unconditional estimate, which guidance leads away from
    "pixels": r"\bPixels\b|pixel_space",
    "a prior": r"PriorTransformer|ImageEmbeddings",
    "two text encoders": r"TwoEncoders",
    "cascade": r"cascade",
}
CORE = [  # whatever is trained, and however it is sampled, goes through these
    *("stipple/commands/train.py", "stipple/commands/cache.py", "stipple_core/data/dataset.py"),
    *(f"stages/{name}.py" for name in ("inputs", "denoising", "objectives", "pictures", "gallery", "requests")),
    *(f"ldm/{name}.py" for name in ("unet", "unet_config", "attention", "blocks", "denoiser", "loss", "densities")),
    *(f"ldm/{name}.py" for name in ("walk", "times", "samplers", "onestep", "singlestep", "multistep", "stochastic")),
    *(f"ldm/{name}.py" for name in ("langevin", "probability_flow", "guidance", "combines", "guidances", "prediction")),
    *(f"ldm/{name}.py" for name in ("schedule", "levels", "tables", "continuous", "reading", "pipeline")),
    *(f"ldm/{name}.py" for name in ("planning", "sources", "windows", "learned_variance", "settings")),
    *sorted(path.relative_to(ROOT).as_posix() for path in (ROOT / "training").glob("*.py")),
    *sorted(path.relative_to(ROOT).as_posix() for path in (ROOT / "operators").glob("*.py")),
]


def names(path: Path) -> Iterator[str]:
    """Identifiers and texts of a module's code, without docstrings and messages."""
    tree = ast.parse(path.read_text("utf-8"))
    said = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
            said.add(node.value)  # a docstring
        if isinstance(node, ast.Raise | ast.JoinedStr):
            said.update(ast.walk(node))
    for node in ast.walk(tree):
        if node in said:
            continue
        for field in ("id", "attr", "arg", "name", "value", "module"):
            if isinstance(value := getattr(node, field, None), str):
                yield value


def mentioned(path: Path) -> set[str]:
    """The tasks that a module's code names."""
    found = [name for name in names(path) if len(name) < 80]
    return {task for task, word in TASKS.items() if any(re.search(word, name) for name in found)}


@pytest.mark.parametrize("module", CORE)
def test_what_trains_and_samples_names_no_task(module):
    assert mentioned(ROOT / module) == set()


def test_every_place_that_names_a_task_is_listed():
    inside = [path for path in ROOT.glob("*/*.py") if path.parent.name not in ("tests", "benchmarks")]
    rooms = [*ROOT.glob("*.py"), *inside]
    found = {path.relative_to(ROOT).as_posix(): tasks for path in rooms if (tasks := mentioned(path))}
    assert found == PLACES


PLACES = {  # conditioning/ and configs; single files and folders of others; commands; what makes models
    "autoencoder/__init__.py": {"a prior", "pixels"},
    "autoencoder/image_embeddings.py": {"a prior"},
    "autoencoder/pixels.py": {"a prior", "pixels"},
    "conditioning/__init__.py": {"unconditional"},
    "conditioning/conditioners.py": {"layout", "retrieval", "two text encoders", "unconditional"},
    "conditioning/classes/class_conditioner.py": {"class", "unconditional"},
    "conditioning/text/text_conditioner.py": {"layout"},
    "conditioning/hints/hints.py": {"depth", "inpainting", "semantic synthesis", "super-resolution"},
    "conditioning/formats/compvis_conditioner.py": {"layout", "unconditional"},
    "conditioning/layouts/layout_tokenizer.py": {"layout"},
    "conditioning/readers/registry.py": {"retrieval"},
    "conditioning/readers/retrieval.py": {"retrieval"},
    "conditioning/text/two_encoders.py": {"two text encoders"},
    "conditioning/readers/spatial.py": {"inpainting", "semantic synthesis", "super-resolution"},
    "conditioning/formats/unet_inputs.py": {"inpainting", "semantic synthesis", "super-resolution", "unconditional"},
    "stipple/commands/embed.py": {"a prior", "retrieval"},
    "stipple/commands/inpaint.py": {"inpainting"},
    "ldm/formats/diffusers/network_kinds.py": {"a prior"},
    "ldm/formats/model_folder.py": {"a prior", "inpainting", "pixels"},
    "ldm/networks/prior.py": {"a prior"},
    "ldm/formats/diffusers/prior_options.py": {"a prior"},
    "ldm/sampling/run.py": {"inpainting"},
    "ldm/formats/single_file.py": {"inpainting"},
    "stipple/commands/sample.py": {"layout"},
    "stipple/stages/classifier/classifier_run.py": {"pixels"},
    "stipple/stages/ldm/shapes.py": {"a prior"},
    "stipple/stages/data/run_settings.py": {"retrieval"},
    "stipple_core/data/records/captions.py": {"layout"},
    "stipple_core/files/weights.py": {"layout"},
    "stipple/commands/train_autoencoder.py": {"text to image"},
    "stipple/commands/upscale.py": {"super-resolution"},
}
