"""Files that come with Stipple: the recipes in configs/ and the model in checkpoints/."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from stipple_core.nearest import did_you_mean

PACKAGES = Path(__file__).resolve().parents[1]  # the folder that the packages are in: a checkout, or site-packages


def resource(path: str | Path) -> Path:
    """Return where a file or folder of configs/ or checkpoints/ is, such as `configs/ldm/emoji.yaml`.

    An installed wheel has them inside the package `stipple`; a checkout has them beside it. The path may not exist.
    """
    installed = PACKAGES / "stipple" / path
    return installed if installed.exists() else PACKAGES / path


def find_recipe(name: str, folders: Sequence[str]) -> str:
    """Return the path of the YAML file that `--config` names.

    Args:
        name: a file; a file of configs/, from any folder; or the name of a recipe, such as `emoji`.
        folders: the folders of configs/ whose recipes may be given by name, such as ["ldm", "finetune"].

    Raises:
        FileNotFoundError: there is no such file and no such recipe; the message names the nearest one.
    """
    if Path(name).is_file():
        return name
    if resource(name).is_file():
        return str(resource(name))
    recipes = {path.stem: path for folder in reversed(folders) for path in resource(f"configs/{folder}").glob("*.yaml")}
    if name.removesuffix(".yaml") in recipes:
        return str(recipes[name.removesuffix(".yaml")])
    nearest = did_you_mean(Path(name).stem, recipes, cutoff=0.6)
    hint = f"did you mean {nearest}?" if nearest else f"give a YAML file or a recipe: {', '.join(sorted(recipes))}"
    raise FileNotFoundError(f"config file {name} does not exist; {hint}")
