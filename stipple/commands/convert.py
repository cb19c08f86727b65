"""Turn a single file of CompVis' kind into a model folder, or a model folder into a single file.

stipple convert sd-v1-5.safetensors checkpoints/sd-v1-5
stipple convert checkpoints/mine mine.safetensors --precision fp16
stipple convert vae-ft-mse.ckpt checkpoints/vae-ft-mse     (a first stage alone gives a folder with vae/)
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from stipple_core.config import one_line_errors, short_warnings

if TYPE_CHECKING:  # torch takes seconds to import: --help answers at once
    import torch

PRECISIONS = {"fp32": "float32", "fp16": "float16"}
FILE = ".safetensors"


class Parser(argparse.ArgumentParser):
    """A parser whose complaints are one line."""

    def error(self, message: str) -> None:
        raise ValueError(message)


def parser() -> Parser:
    """The command line."""
    p = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    p.add_argument("source", metavar="SRC", help="a .ckpt or .safetensors file, or a model folder")
    p.add_argument("target", metavar="DST", help=f"a folder, or a {FILE} file; it must not exist")
    p.add_argument("--yaml", metavar="FILE", help="CompVis' YAML of a single file, for what its keys don't tell")
    p.add_argument("--tokenizer", metavar="FOLDER", help="the text encoder's, where a single file needs another")
    p.add_argument("--prediction", choices=["noise", "clean", "velocity"], help="what a single file's UNet outputs")
    p.add_argument("--precision", choices=list(PRECISIONS), help="of the weights written; default: as in SRC")
    p.add_argument("--variant", metavar="NAME", help="such as fp16: which weights of a folder that has several")
    return p


def stored_dtype(weights: dict[str, torch.Tensor]) -> torch.dtype:
    """float16 where all matrices of an outline are, else float32."""
    import torch

    matrices = [value for value in weights.values() if value.ndim > 1 and value.is_floating_point()]
    return torch.float16 if all(value.dtype == torch.float16 for value in matrices) else torch.float32


def require_finite(source: Path, **networks: torch.nn.Module | None) -> None:
    """Raise a ValueError that names the first five weights which hold NaN or infinity, if there are any."""
    wrong = [
        f"{name} of the {part}"
        for part, network in networks.items()
        if network is not None
        for name, value in network.state_dict().items()
        if not value.isfinite().all()
    ]
    if wrong:
        more = f"; and {len(wrong) - 5} more" if len(wrong) > 5 else ""
        raise ValueError(f"{source} has weights that are not finite: {'; '.join(wrong[:5])}{more}; get it again")


def convert_first_stage(arguments: argparse.Namespace, dtype: torch.dtype) -> None:
    """An autoencoder alone: a file of it to a folder with vae/, or such a folder to a file."""
    from autoencoder import Autoencoder
    from ldm.formats.single_file_writer import save_first_stage
    from stipple_core.files.checkpoint_folder import write_folder

    autoencoder = Autoencoder.load(arguments.source, variant=arguments.variant)
    require_finite(arguments.source, autoencoder=autoencoder)
    if arguments.target.suffix == FILE:
        save_first_stage(autoencoder, arguments.target, dtype)
    else:
        write_folder(arguments.target, lambda folder: autoencoder.save(folder, dtype))


def convert_model(arguments: argparse.Namespace, stored: torch.dtype, dtype: torch.dtype) -> None:
    """A whole model, held in memory in the precision that it is stored in, which is the least."""
    from ldm.formats.model_folder import save_model
    from ldm.formats.opening import open_model
    from ldm.formats.single_file_writer import save_single_file
    from stipple_core.files.checkpoint_folder import write_folder

    said = {"config_yaml": arguments.yaml, "tokenizer": arguments.tokenizer, "prediction": arguments.prediction}
    parts = open_model(arguments.source, stored, arguments.variant, **said)
    require_finite(arguments.source, UNet=parts.unet, autoencoder=parts.autoencoder, conditioner=parts.conditioner)
    if arguments.target.suffix == FILE:
        save_single_file(parts, arguments.target, dtype)
    else:
        write_folder(arguments.target, lambda folder: save_model(parts, folder, dtype))


def run(argv: Sequence[str]) -> None:
    """Check, read, and only then write."""
    arguments = parser().parse_args(argv)
    arguments.source, arguments.target = Path(arguments.source), Path(arguments.target)
    source, target = arguments.source, arguments.target
    if not source.exists():
        raise FileNotFoundError(f"{source} does not exist; give a .ckpt or {FILE} file, or a model folder")
    if target.exists():
        raise ValueError(f"{target} exists already; give a name that is not taken")

    import torch

    from autoencoder.formats.compvis_first_stage import first_stage_keys
    from ldm.formats.compvis.compvis_unet import NETWORK
    from ldm.formats.diffusers.networks_folder import STEM
    from ldm.formats.model_folder import INDEX
    from stipple_core.files.weights import SUFFIXES, find_weights, outline

    if source.is_file() and target.suffix in SUFFIXES:
        raise ValueError(f"{source} and {target} are both files; give a folder as one of them")
    if target.suffix in SUFFIXES and target.suffix != FILE:
        raise ValueError(f"{target} must end in {FILE}: other single files are pickles, which are not written")
    if source.is_file():
        weights = outline(source)
        whole = any(name.startswith(NETWORK) for name in weights) or not first_stage_keys(weights)
    else:
        whole = (source / INDEX).is_file()
        inner = source / "unet" if whole else next(p for p in (source / "vae", source / "vqvae", source) if p.is_dir())
        weights = outline(find_weights(inner, STEM, arguments.variant))
    stored = stored_dtype(weights)
    dtype = getattr(torch, PRECISIONS[arguments.precision]) if arguments.precision else stored
    if whole:
        convert_model(arguments, stored, dtype)
    else:
        convert_first_stage(arguments, dtype)
    print(f"{source} -> {target}")


def main(argv: Sequence[str] | None = None) -> None:
    """The command line; exits with 2 after a user's mistake."""
    with short_warnings(), one_line_errors():
        run(sys.argv[1:] if argv is None else argv)


if __name__ == "__main__":
    main()
