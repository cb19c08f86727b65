"""Open the model of a drawing command: as flags say, else as the record of a picture says, else by its own defaults."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stipple.commands.drawing.add_ons import add_to_model
from stipple.commands.drawing.open_guides import GUIDES, open_guides
from stipple_core.images.drawn_pictures import model_hash
from stipple_core.resources import resource

if TYPE_CHECKING:  # importing torch takes seconds, and --help does not need it
    from ldm.pipeline import TextToImage

CHECKPOINT = "checkpoints/emoji"  # the model that comes with Stipple
DTYPES = {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16"}
HASH = "_hash"  # end of the names of hashes in a record
FORMAT_OPTIONS = ("config_yaml", "tokenizer", "prediction", "variant")  # fields of Opening that TextToImage.load takes
RECORDED = (*FORMAT_OPTIONS, *GUIDES, "guidance_model", "prior", "decode_memory")  # fields of Opening, in a record
HASHED = (*GUIDES, "guidance_model", "prior")  # those of them that may name weights, whose hashes are recorded too


@dataclass(frozen=True, kw_only=True)
class Opening:
    """Which model is opened, and how; where a field is None, the record of the picture or the model decides."""

    checkpoint: str | None = None  # model folder or single file
    config_yaml: str | None = None  # single file: its YAML config in CompVis' format
    tokenizer: str | None = None  # single file: a folder
    prediction: str | None = None  # single file: noise, velocity or clean
    variant: str | None = None  # model folder: which of its weight files
    guidance_model: str | None = None  # autoguidance: a weaker version of the model
    lora: list[str] | None = None  # PATH:WEIGHT for each LoRA
    embedding: list[str] | None = None  # files of learned words
    prior: str | None = None  # decoders of image embeddings: the model that makes embeddings from prompts
    classifier: str | None = None  # classifier guidance: a folder that `stipple train-classifier` wrote
    clip_guidance: str | None = None  # CLIP guidance: an architecture of open_clip, or a folder with a CLIP
    clip_pretrained: str | None = None  # its weights: a tag of open_clip, or a file
    precision: str | None = None  # a key of DTYPES, or "auto"
    device: str = "auto"  # as torch names it
    decode_memory: float | None = None  # GiB; where decoding needs more, it is done in tiles
    keep_transforms: bool = False  # on a CPU: faster, for more memory


def open_for_drawing(
    opening: Opening, record: Mapping[str, Any], like: str | None = None
) -> tuple[TextToImage, dict[str, Any]]:
    """Open a model, and everything that flags or a record add to it.

    Args:
        opening: what the flags specify.
        record: of the picture that is drawn again, or {}.
        like: the file of that picture.

    Returns:
        The model, and what to record of it in pictures.

    Raises:
        FileNotFoundError, ValueError: for a model or device that does not exist or cannot be used.
    """
    import torch

    from ldm.pipeline import TextToImage
    from ldm.sampling.compatibility import check_draws

    recorded = record.get("checkpoint")
    path = find_checkpoint(opening.checkpoint, None if recorded is None else str(recorded))
    device = find_device(opening.device)
    kind = torch.device(device).type
    precision = find_precision(opening.precision, record, kind)
    hash = model_hash(path)
    if record.get("model_hash", hash) != hash and opening.checkpoint is None:
        before = record["model_hash"]
        warnings.warn(f"{like} was made by model {before}, this is {hash}: it will differ", stacklevel=1)
    settings_record = {} if opening.checkpoint else record  # it describes its own checkpoint, not another one
    sources = read_sources(opening, settings_record)
    load = {"device": device, "dtype": getattr(torch, DTYPES[precision]), "keep_transforms": opening.keep_transforms}
    options = {name: value for name, value in sources.items() if name in FORMAT_OPTIONS}
    model = TextToImage.load(path, **load, **options)
    check_draws(model)
    if "decode_memory" in sources:
        model.autoencoder.memory = _bytes(sources["decode_memory"])
    if "guidance_model" in sources:
        model.guide_by(TextToImage.load(sources["guidance_model"], **load))
    if "prior" in sources:
        model.use_prior(TextToImage.load(sources["prior"], **load))
    open_guides(model, sources)
    additions = add_to_model(model, opening.lora, opening.embedding, settings_record, like)
    hashes = dict(_hashes(model, sources))
    _warn_of_changes(hashes, opening, settings_record, like)
    about = {"checkpoint": opening.checkpoint or recorded or CHECKPOINT, "model_hash": hash, "precision": precision}
    return model, about | sources | hashes | additions | {"device": kind, "torch": torch.__version__}


def read_sources(opening: Opening, record: Mapping[str, Any]) -> dict[str, str]:
    """Return the fields of RECORDED that flags specify, or else the record, as text."""
    values = {name: getattr(opening, name) for name in RECORDED}
    values = {name: record.get(name) if value is None else value for name, value in values.items()}
    return {name: str(value) for name, value in values.items() if value not in (None, "")}


def find_checkpoint(path: str | None, recorded: str | None) -> Path:
    """Return where the model is: `path`, or else what a record names, or else the model that comes with Stipple.

    A relative path is in the current folder, or is that of a model that comes with Stipple.

    Raises:
        FileNotFoundError: there is no such model.
    """
    from ldm.formats.model_folder import read_index

    name = path or recorded or CHECKPOINT
    places = [resource(name), Path(name)]
    place = next((place for place in (reversed(places) if path else places) if place.exists()), None)
    if place is None:
        raise FileNotFoundError(f"checkpoint {name} does not exist; give a model folder or file with --checkpoint")
    if place.is_dir():
        read_index(place)
    return place


def find_device(name: str) -> str:
    """Return the name of a device that exists; `auto` is the fastest. Raises ValueError."""
    import torch

    best = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        device = torch.device(best if name == "auto" else name)
        torch.empty(1, device=device).item()
    except (RuntimeError, AssertionError, NotImplementedError):
        raise ValueError(f"device {name!r} is not here; use auto, which is {best} on this machine") from None
    return str(device)


def find_precision(name: str | None, record: Mapping[str, Any], device: str) -> str:
    """Return a key of DTYPES: `name`, else that of a picture made on such a device, else fp16 on CUDA and fp32."""
    name = name or (record.get("precision") if record.get("device") == device else "auto")
    return name if name in DTYPES else "fp16" if device == "cuda" else "fp32"


def _hashes(model: TextToImage, sources: Mapping[str, str]) -> Iterator[tuple[str, str]]:
    """Yield names and hashes of files besides the model's own: of guides, and of databases for retrieval."""
    from conditioning.readers.combined import files_of

    paths = [(name, Path(sources[name])) for name in HASHED if name in sources]
    for name, path in [*paths, *(("database", path) for path in files_of(model.conditioner))]:
        if path.exists():  # else it is the name of a pretrained model, which does not change
            yield f"{name}{HASH}", model_hash(path)


def _warn_of_changes(hashes: Mapping[str, str], opening: Opening, record: Mapping[str, Any], like: str | None) -> None:
    """Warn of files that are not what they were when the recorded picture was made."""
    for name, hash in hashes.items():
        field = name.removesuffix(HASH)
        if record.get(name, hash) != hash and getattr(opening, field, None) is None:
            what = f"{field.replace('_', ' ')} {record[name]}, this is {hash}"
            warnings.warn(f"{like} was made with {what}: it will differ", stacklevel=1)


def _bytes(gibibytes: str) -> int:
    """Return a number of GiB in bytes. Raises ValueError."""
    try:
        number = float(gibibytes)
    except ValueError:
        number = math.nan
    if not 0 < number < math.inf:
        raise ValueError(f"decode memory {gibibytes} must be a positive number of GiB; 2 is usual")
    return round(number * 2**30)
