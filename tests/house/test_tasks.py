"""No `if task`: names of tasks occur only in configs, in conditioning/ and in the commands named after them.

A task is a choice of conditioner, autoencoder, network and objective. Training and sampling do not depend on it.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[2]
TASKS = {  # words with which code would distinguish tasks
    "text to image": r"txt2img(?!.py)|text2img",
    "class": r"class_conditional|class_label|[Ii]mage[Nn]et|IMAGENET",
    "layout": r"layouts\b|^_?layout$|--layout|Layout(Tokenizer|Config)",
    "semantic synthesis": r"[Ss]emantic",
    "inpainting": r"[Ii]npaint",
    "super-resolution": r"super_?res|upscal|low_res",
    "depth": r"DepthHint|depth_map|EdgesHint",
    "variations": r"unclip|image_variation",
    "retrieval": r"[Rr]etriev|^neighbors$",
    "unconditional": r"Unconditional\b",  # not the unconditional estimate, which guidance moves away from
    "pixels": r"\bPixels\b|pixel_space",
    "a prior": r"PriorTransformer|ImageEmbeddings",
    "two text encoders": r"TwoEncoders",
    "cascade": r"cascade",
}
CORE = [  # rooms and modules that every training and every sampling goes through
    *("stipple/training", "stipple/commands/train.py", "stipple/commands/cache.py", "stipple_core/data/dataset.py"),
    *("stipple/stages/ldm/batch_encoder.py", "stipple/stages/ldm/diffusion_batch.py"),
    *("stipple/stages/ldm/denoiser_validation.py", "stipple/stages/ldm/objectives.py"),
    *("stipple/stages/data/run_data.py", "stipple/stages/data/data_check.py"),
    *("ldm/schedules", "ldm/denoising", "ldm/samplers", "ldm/guidance", "ldm/losses", "ldm/likelihood"),
    *(
        "ldm/networks/unet.py",
        "ldm/networks/unet_config.py",
        "ldm/networks/attention.py",
        "ldm/networks/unet_blocks.py",
    ),
    *("ldm/networks/cached_unet.py", "ldm/pipeline.py", "ldm/sampling"),
    *("stipple/commands/drawing/output.py", "stipple/commands/drawing/drawing_request.py"),
    "stipple_core/operators",
]
PACKAGES = ("autoencoder", "conditioning", "ldm", "stipple", "stipple_core")


def names(path: Path) -> Iterator[str]:
    """Identifiers and strings of the code of a module, without docstrings and messages."""
    tree = ast.parse(path.read_text("utf-8"))
    prose = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
            prose.add(node.value)  # a docstring
        if isinstance(node, ast.Raise | ast.JoinedStr):
            prose.update(ast.walk(node))
    for node in ast.walk(tree):
        if node in prose:
            continue
        for field in ("id", "attr", "arg", "name", "value", "module"):
            if isinstance(value := getattr(node, field, None), str):
                yield value


def tasks_in(path: Path) -> set[str]:
    """The tasks that the code of a module names."""
    words = [name for name in names(path) if len(name) < 80]
    return {task for task, pattern in TASKS.items() if any(re.search(pattern, word) for word in words)}


def test_what_trains_and_samples_names_no_task():
    assert all((ROOT / place).exists() for place in CORE)
    paths = [
        path for place in CORE for path in ((ROOT / place).rglob("*.py") if (ROOT / place).is_dir() else [ROOT / place])
    ]
    offenders = {str(path.relative_to(ROOT)): tasks for path in paths if (tasks := tasks_in(path))}
    assert not offenders


def test_every_module_that_names_a_task_is_listed():
    paths = [*ROOT.glob("*.py"), *(path for package in PACKAGES for path in (ROOT / package).rglob("*.py"))]
    found = {path.relative_to(ROOT).as_posix(): tasks for path in paths if (tasks := tasks_in(path))}
    assert found == PLACES


PLACES = {  # conditioning, formats of other programs, commands of tasks, and what builds models
    "autoencoder/__init__.py": {"a prior", "pixels"},
    "autoencoder/autoencoder_opening.py": {"a prior", "pixels"},
    "autoencoder/image_embeddings.py": {"a prior"},
    "autoencoder/pixels.py": {"pixels"},
    "conditioning/__init__.py": {"unconditional"},
    "conditioning/classes/class_conditioner.py": {"class", "unconditional"},
    "conditioning/conditioners.py": {"layout", "retrieval", "two text encoders", "unconditional"},
    "conditioning/formats/compvis_conditioner.py": {"layout", "unconditional"},
    "conditioning/formats/unet_inputs.py": {"inpainting", "semantic synthesis", "super-resolution", "unconditional"},
    "conditioning/hints/hints.py": {"depth", "inpainting", "semantic synthesis", "super-resolution"},
    "conditioning/layouts/layout_tokenizer.py": {"layout"},
    "conditioning/readers/registry.py": {"retrieval"},
    "conditioning/readers/retrieval.py": {"retrieval"},
    "conditioning/readers/spatial.py": {"inpainting", "semantic synthesis", "super-resolution"},
    "conditioning/text/two_encoders.py": {"two text encoders"},
    "ldm/formats/diffusers/network_kinds.py": {"a prior"},
    "ldm/formats/diffusers/prior_options.py": {"a prior"},
    "ldm/formats/model_folder.py": {"inpainting", "pixels"},
    "ldm/formats/single_file_writer.py": {"inpainting"},
    "ldm/networks/prior.py": {"a prior"},
    "stipple/__main__.py": {"inpainting", "layout", "super-resolution"},
    "stipple/commands/drawing/flags.py": {"super-resolution"},
    "stipple/commands/embed.py": {"a prior", "retrieval"},
    "stipple/commands/inpaint.py": {"inpainting"},
    "stipple/commands/sample.py": {"layout"},
    "stipple/commands/train_autoencoder.py": {"text to image"},
    "stipple/commands/upscale.py": {"super-resolution"},
    "stipple/stages/data/run_settings.py": {"retrieval"},
    "stipple/stages/ldm/shapes.py": {"a prior"},
    "stipple_core/data/records/captions.py": {"layout"},
    "stipple_core/files/pickled_weights.py": {"layout"},
}
