"""Generated images on disk: numbered PNG files that are never overwritten and contain their settings.

Each file has two text chunks: `parameters` in the format of AUTOMATIC1111's web UI, which other programs display and
search, and a JSON record with all settings needed to generate the image again.
"""

from __future__ import annotations

import io
import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stipple_core.files.atomic import writing
from stipple_core.files.hashing import file_sha256

if TYPE_CHECKING:
    from PIL import Image

WEIGHTS = (".safetensors", ".bin")
RECORD = "stipple"  # key of the JSON record
PARAMETERS = "parameters"  # key of the text for other programs
A1111_SAMPLERS = {
    "ddim": "DDIM",
    "ddpm": "DDPM",
    "pndm": "PLMS",
    "euler": "Euler",
    "euler_ancestral": "Euler a",
    "heun": "Heun",
    "dpm2": "DPM2",
    "lms": "LMS",
    "dpmpp_2m": "DPM++ 2M",
    "dpmpp_sde": "DPM++ SDE",
    "dpmpp_2m_sde": "DPM++ 2M SDE",
    "dpmpp_3m_sde": "DPM++ 3M SDE",
    "unipc": "UniPC",
    "restart": "Restart",
    "lcm": "LCM",
}


def check_writable(folder: Path) -> None:
    """Raise a ValueError unless files can be written to `folder`, which need not exist. Creates nothing."""
    existing = folder
    while not existing.exists():
        existing = existing.parent
    if not existing.is_dir():
        raise ValueError(f"outdir {folder} can't be made, because {existing} is a file; use another --outdir")
    if not os.access(existing, os.W_OK | os.X_OK):
        raise ValueError(f"outdir {folder} can't be written to, because {existing} is read-only; use another --outdir")


def encode_png(image: Image.Image, texts: Mapping[str, str]) -> bytes:
    """Encode an image as PNG with text chunks before the pixels. Lone surrogates in the texts become `?`."""
    from PIL.PngImagePlugin import PngInfo

    info = PngInfo()
    for key, text in texts.items():
        info.add_text(key, text.encode("utf-8", "replace").decode())
    buffer = io.BytesIO()
    image.save(buffer, "PNG", pnginfo=info)
    return buffer.getvalue()


def write_numbered(data: bytes, folder: Path, prefix: str = "", digits: int = 5) -> Path:
    """Write to `folder`/PREFIXnnnnn.png, with a number one higher than the highest in the folder; return the path.

    Several processes may write to one folder: files are created exclusively, and the number is increased if the file
    exists. A file that can't be written completely is removed.
    """
    folder.mkdir(parents=True, exist_ok=True)
    numbered = re.compile(re.escape(prefix) + r"(\d+)[^/]*\.png", re.ASCII)
    taken = (numbered.fullmatch(name) for name in os.listdir(folder))
    number = max((int(match[1]) for match in taken if match), default=-1) + 1
    while True:
        path = folder / f"{prefix}{number:0{digits}d}.png"
        try:
            file = open(path, "xb")
            break
        except FileExistsError:
            number += 1
    try:
        with file:
            file.write(data)
    except BaseException:
        path.unlink(missing_ok=True)
        raise
    return path


def replace_file(data: bytes, path: Path) -> None:
    """Write a file atomically, so that a program that displays it never sees an incomplete image."""
    with writing(path) as file:
        file.write(data)


def a1111_parameters(picture: Mapping[str, Any], model: str, model_hash: str) -> str:
    """The settings of an image in the format of AUTOMATIC1111's web UI.

    Args:
        picture: prompt, negative_prompt, steps, sampler, guidance_scale, seed, width, height, eta, and with a source
            image also `image` and `strength`.
        model: the model's name.
        model_hash: the result of `model_hash`.
    """
    values = {
        "Steps": picture["steps"],
        "Sampler": A1111_SAMPLERS.get(picture["sampler"], picture["sampler"]),
        "CFG scale": f"{picture['guidance_scale']:g}",
        "Seed": picture["seed"],
        "Size": f"{picture['width']}x{picture['height']}",
        "Model hash": model_hash,
        "Model": model,
    }
    if picture.get("image") is not None:
        values["Denoising strength"] = f"{picture['strength']:g}"
    if picture["eta"]:
        values["Eta"] = f"{picture['eta']:g}"
    negative = [f"Negative prompt: {picture['negative_prompt']}"] if picture["negative_prompt"] else []
    return "\n".join([picture["prompt"], *negative, ", ".join(f"{key}: {_quoted(v)}" for key, v in values.items())])


def _quoted(value: Any) -> str:
    """A value as text, or as a JSON string if it contains a separator."""
    text = str(value)
    return json.dumps(text, ensure_ascii=False) if set(text) & set(",:\n") else text


def read_record(path: Path) -> dict[str, Any]:
    """Return the JSON record of a PNG file.

    Raises:
        FileNotFoundError: the file does not exist.
        ValueError: it is not a PNG, or has no record.
    """
    from PIL import Image

    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist; use a PNG file that a drawing command wrote")
    try:
        with Image.open(path, formats=("PNG",)) as image:
            text = image.info.get(RECORD)
    except Exception as error:  # damaged chunks: Pillow raises SyntaxError, ValueError, OSError, struct.error
        raise ValueError(f"{path} is not a readable PNG file ({type(error).__name__}); use another") from None
    if text is None:
        raise ValueError(f"{path} does not contain its settings; use a PNG file that a drawing command wrote")
    try:
        record = json.loads(text)
    except (ValueError, RecursionError):
        record = None
    if not isinstance(record, dict):
        raise ValueError(f"{path} has a record that is not readable; use a PNG file that a drawing command wrote")
    return record


def model_hash(model: Path) -> str:
    """Ten hexadecimal digits that identify a model: a hash of name, size, first and last MiB of its weight files.

    Training changes all weights, so this is enough; reading a large model completely would take longer than sampling.

    Args:
        model: a single weight file, whose name is ignored, or a folder with weight files in its subfolders or in
            itself.
    """
    import hashlib

    digest, mebibyte = hashlib.sha256(), 1 << 20
    by_depth = (sorted(path for path in model.glob(depth) if path.suffix in WEIGHTS) for depth in ("*/*", "*"))
    for path in [model] if model.is_file() else next(filter(None, by_depth), []):
        size = path.stat().st_size
        digest.update(f"{path.relative_to(model).as_posix()} {size}".encode())
        with open(path, "rb") as file:
            digest.update(file.read(mebibyte))
            file.seek(max(size - mebibyte, 0))
            digest.update(file.read())
    return digest.hexdigest()[:10]


def file_hash(path: Path) -> str:
    """The first ten hexadecimal digits of a file's SHA-256."""
    return file_sha256(path)[:10]
