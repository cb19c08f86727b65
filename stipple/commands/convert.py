"""Convert a single file in CompVis' format to a model folder, or a model folder to a single file.

stipple convert sd-v1-5.safetensors checkpoints/sd-v1-5
stipple convert checkpoints/mine mine.safetensors --precision fp16
stipple convert vae-ft-mse.ckpt checkpoints/vae-ft-mse

A file that contains an autoencoder alone becomes a folder with vae/ in it.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from stipple.cli.argument_parser import Parser
from stipple_core.config import one_line_errors, short_warnings

if TYPE_CHECKING:  # importing torch takes seconds, and --help does not need it
    import torch

PRECISIONS = {"fp32": "float32", "fp16": "float16"}
FILE = ".safetensors"


def make_parser() -> Parser:
    """Return the parser of the command."""
    parser = Parser("convert", "SOURCE TARGET [flags]", __doc__)
    first = parser.first
    first.add_argument("source", metavar="SOURCE", help="a .ckpt or .safetensors file, or a model folder")
    first.add_argument("target", metavar="TARGET", help=f"a folder or a {FILE} file that does not exist")
    first.add_argument("--precision", choices=PRECISIONS, help="of the written weights (default: as in SOURCE)")
    parser.add_help_flag(first)
    group = parser.add_argument_group("how the source is read")
    group.add_argument("--yaml", metavar="FILE", help="single file: its YAML config in CompVis' format")
    group.add_argument("--tokenizer", metavar="FOLDER", help="single file: its tokenizer (default: the usual one)")
    group.add_argument(
        "--prediction", choices=["noise", "clean", "velocity"], help="single file: what its UNet predicts"
    )
    group.add_argument("--variant", metavar="NAME", help="model folder: which of its weight files, such as fp16")
    return parser


def stored_dtype(weights: dict[str, torch.Tensor]) -> torch.dtype:
    """Return float16 if all matrices of an outline are float16, else float32."""
    import torch

    matrices = [value for value in weights.values() if value.ndim > 1 and value.is_floating_point()]
    return torch.float16 if all(value.dtype == torch.float16 for value in matrices) else torch.float32


def require_finite(source: Path, **networks: torch.nn.Module | None) -> None:
    """Raise ValueError, with the names of the first five, if any weights contain NaN or infinity."""
    names = [
        f"{name} of the {part}"
        for part, network in networks.items()
        if network is not None
        for name, value in network.state_dict().items()
        if not value.isfinite().all()
    ]
    if names:
        more = f"; and {len(names) - 5} more" if len(names) > 5 else ""
        raise ValueError(f"{source} has weights that are not finite: {'; '.join(names[:5])}{more}; get it again")


def convert_first_stage(arguments: argparse.Namespace, dtype: torch.dtype) -> None:
    """Convert an autoencoder alone: a file to a folder with vae/, or such a folder to a file."""
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
    """Convert a whole model, which is held in memory in its stored precision."""
    from ldm.formats.model_folder import save_model
    from ldm.formats.opening import open_model
    from ldm.formats.single_file_writer import save_single_file
    from stipple_core.files.checkpoint_folder import write_folder

    options = {"config_yaml": arguments.yaml, "tokenizer": arguments.tokenizer, "prediction": arguments.prediction}
    parts = open_model(arguments.source, stored, arguments.variant, **options)
    require_finite(arguments.source, UNet=parts.unet, autoencoder=parts.autoencoder, conditioner=parts.conditioner)
    if arguments.target.suffix == FILE:
        save_single_file(parts, arguments.target, dtype)
    else:
        write_folder(arguments.target, lambda folder: save_model(parts, folder, dtype))


def run(argv: Sequence[str]) -> None:
    """Check the arguments, read the source, then write the target."""
    arguments = make_parser().parse_args(argv)
    arguments.source, arguments.target = Path(arguments.source), Path(arguments.target)
    source, target = arguments.source, arguments.target
    if not source.exists():
        raise FileNotFoundError(f"{source} does not exist; give a .ckpt or {FILE} file, or a model folder")
    if target.exists():
        raise ValueError(f"{target} exists already; give a name that is not taken")

    import torch

    from stipple_core.files.weights import SUFFIXES

    if source.is_file() and target.suffix in SUFFIXES:
        raise ValueError(f"{source} and {target} are both files; give a folder as one of them")
    if target.suffix in SUFFIXES and target.suffix != FILE:
        raise ValueError(f"{target} must end in {FILE}: other single files are pickles, which are not written")
    weights, is_model = read_outline(source, arguments.variant)
    stored = stored_dtype(weights)
    dtype = getattr(torch, PRECISIONS[arguments.precision]) if arguments.precision else stored
    if is_model:
        convert_model(arguments, stored, dtype)
    else:
        convert_first_stage(arguments, dtype)
    print(f"{source} -> {target}")


def read_outline(source: Path, variant: str | None) -> tuple[dict[str, torch.Tensor], bool]:
    """Return names, shapes and types of weights, and whether they are a whole model and not an autoencoder alone."""
    from autoencoder.formats.compvis_first_stage import first_stage_keys
    from ldm.formats.compvis.compvis_unet import NETWORK
    from ldm.formats.diffusers.networks_folder import STEM
    from ldm.formats.model_folder import INDEX
    from stipple_core.files.weights import find_weights, outline

    if source.is_file():
        weights = outline(source)
        return weights, any(name.startswith(NETWORK) for name in weights) or not first_stage_keys(weights)
    is_model = (source / INDEX).is_file()
    folders = (source / "unet",) if is_model else (source / "vae", source / "vqvae", source)
    folder = next((path for path in folders if path.is_dir()), folders[0])
    return outline(find_weights(folder, STEM, variant)), is_model


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command line; exits with 2 after a user's mistake."""
    with short_warnings(), one_line_errors():
        run(sys.argv[1:] if argv is None else argv)


if __name__ == "__main__":
    main()
