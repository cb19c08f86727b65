"""How a drawing command opens its model: as flags say, else as the record of a picture says, else as the model says."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stipple.commands.drawing.add_ons import add
from stipple.commands.drawing.open_guides import LEADING, guide
from stipple_core.images.drawn_pictures import model_hash

if TYPE_CHECKING:  # torch takes seconds to import: what makes pictures imports it, so that --help answers at once
    from ldm.pipeline import TextToImage

HERE = Path(__file__).resolve().parents[3]
CHECKPOINT = "checkpoints/emoji"  # in the folder of the scripts
DTYPES = {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16"}
HASH = "_hash"  # how names of hashes end in a record
OF_LOAD = ("config_yaml", "tokenizer", "prediction", "variant")  # fields of Opening that `TextToImage.load` takes
# how a picture was made, besides the model's own
RECORDED = (*OF_LOAD, *LEADING, "guidance_model", "prior", "decode_memory")
BESIDE = (*LEADING, "guidance_model", "prior")  # that may be weights, whose hashes are recorded, too


@dataclass(frozen=True, kw_only=True)
class Opening:
    """Which model, and how it is opened; a field that is None is left to the record, then to the model."""

    checkpoint: str | None = None  # model folder or single file
    config_yaml: str | None = None  # of a single file: CompVis' YAML
    tokenizer: str | None = None  # of a single file: a folder
    prediction: str | None = None  # of a single file: noise, velocity or clean
    variant: str | None = None  # of a folder: which of its weights
    guidance_model: str | None = None  # of autoguidance: a weaker version of the model
    lora: list[str] | None = None  # PATH:WEIGHT each, of low-rank additions
    embedding: list[str] | None = None  # files of learned words
    prior: str | None = None  # of a decoder of image embeddings: the model that makes them of prompts
    classifier: str | None = None  # of classifier guidance: a folder that stipple train-classifier wrote
    clip_guidance: str | None = None  # of CLIP guidance: an architecture of open_clip, or a folder with a CLIP
    clip_pretrained: str | None = None  # its weights: a tag of open_clip, or a file
    precision: str | None = None  # a key of DTYPES or "auto"
    device: str = "auto"  # as torch names it
    decode_memory: float | None = None  # GiB for feature maps of the autoencoder; beyond, it works in tiles
    keep_transforms: bool = False  # on a CPU: memory for time


def open_for_drawing(
    opening: Opening, record: Mapping[str, Any], like: str | None = None
) -> tuple[TextToImage, dict[str, Any]]:
    """The model, and what there is to record of it.

    Args:
        opening: what was asked for.
        record: of the picture that is to be made again, or {}.
        like: the file of that picture.

    Raises:
        FileNotFoundError, ValueError: in one line, for a model or a device that is not there, or can't be opened so.
    """
    import torch

    from ldm.pipeline import TextToImage
    from ldm.sampling.compatibility import check_draws

    recorded = record.get("checkpoint")
    path = find_checkpoint(opening.checkpoint, None if recorded is None else str(recorded))
    device = find_device(opening.device)
    kind = torch.device(device).type
    precision = opening.precision or (record.get("precision") if record.get("device") == kind else "auto")
    if precision not in DTYPES:
        precision = "fp16" if kind == "cuda" else "fp32"
    sign = model_hash(path)
    if record.get("model_hash", sign) != sign and opening.checkpoint is None:
        was = record["model_hash"]
        warnings.warn(f"{like} was made by model {was}, this is {sign}: it will differ", stacklevel=1)
    again = {} if opening.checkpoint else record  # of another checkpoint it says nothing
    asked = {name: getattr(opening, name) for name in RECORDED}
    said = {name: again.get(name) if value is None else value for name, value in asked.items()}
    said = {name: str(value) for name, value in said.items() if value not in (None, "")}
    dtype, keep = getattr(torch, DTYPES[precision]), opening.keep_transforms
    of_load = {name: value for name, value in said.items() if name in OF_LOAD}
    model = TextToImage.load(path, device, dtype, **of_load, keep_transforms=keep)
    check_draws(model)
    if "decode_memory" in said:
        model.autoencoder.memory = _bytes(said["decode_memory"])
    if "guidance_model" in said:
        model.guide_by(TextToImage.load(said["guidance_model"], device, dtype, keep_transforms=keep))
    if "prior" in said:
        model.use_prior(TextToImage.load(said["prior"], device, dtype, keep_transforms=keep))
    guide(model, said)
    added = add(model, opening.lora, opening.embedding, again, like)
    about = {"checkpoint": opening.checkpoint or recorded or CHECKPOINT, "model_hash": sign, "precision": precision}
    signs = dict(_signs(model, said))
    for name, sign in signs.items():
        if again.get(name, sign) != sign and getattr(opening, name.removesuffix(HASH), None) is None:
            told = f"{name.removesuffix(HASH).replace('_', ' ')} {again[name]}, this is {sign}"
            warnings.warn(f"{like} was made with {told}: it will differ", stacklevel=1)
    return model, about | said | signs | added | {"device": kind, "torch": torch.__version__}


def _signs(model: TextToImage, said: Mapping[str, str]) -> Iterator[tuple[str, str]]:
    """Names and hashes of what a model works with that is not its own: who leads it, where it looks things up."""
    from conditioning.readers.combined import files_of

    paths = [(name, Path(said[name])) for name in BESIDE if name in said]
    for name, path in [*paths, *(("database", path) for path in files_of(model.conditioner))]:
        if path.exists():  # else it is what a library calls it, which does not change
            yield f"{name}{HASH}", model_hash(path)


def find_checkpoint(given: str | None, recorded: str | None) -> Path:
    """The model: as given; else as a picture's record says, from here or the scripts' folder; else ours."""
    from ldm.formats.model_folder import read_index

    places = [Path(given)] if given else [HERE / (recorded or CHECKPOINT), Path(recorded or CHECKPOINT)]
    path = next((place for place in places if place.exists()), None)
    if path is None:
        name = given or recorded or CHECKPOINT
        raise FileNotFoundError(f"checkpoint {name} does not exist; give a model folder or file with --checkpoint")
    if path.is_dir():
        read_index(path)
    return path


def find_device(name: str) -> str:
    """A device that is there."""
    import torch

    best = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        device = torch.device(best if name == "auto" else name)
        torch.empty(1, device=device).item()
    except (RuntimeError, AssertionError, NotImplementedError):
        raise ValueError(f"device {name!r} is not here; use auto, which is {best} on this machine") from None
    return str(device)


def _bytes(gibibytes: str) -> int:
    """Of so many GiB. Raises ValueError."""
    try:
        number = float(gibibytes)
    except ValueError:
        number = math.nan
    if not 0 < number < math.inf:
        raise ValueError(f"decode memory {gibibytes} must be a positive number of GiB; 2 is usual")
    return round(number * 2**30)
