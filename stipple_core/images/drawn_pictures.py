"""Generated pictures on disk: PNG files numbered, never overwritten, that tell how they were made.

Two text chunks tell it: `parameters` in the words of AUTOMATIC1111's web UI, which other programs show and search, and
a JSON record with everything needed to make the picture again.
"""

from __future__ import annotations

import io
import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

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
    """Raise a ValueError unless pictures can be written to `folder`, which need not exist yet. Makes nothing."""
    existing = folder
    while not existing.exists():
        existing = existing.parent
    if not existing.is_dir():
        raise ValueError(f"outdir {folder} can't be made, because {existing} is a file; give another --outdir")
    if not os.access(existing, os.W_OK | os.X_OK):
        raise ValueError(f"outdir {folder} can't be written to, because {existing} is read-only; give another --outdir")


def encode_png(image: Image.Image, texts: Mapping[str, str]) -> bytes:
    """A PNG file's bytes, with text chunks ahead of the pixels; lone surrogates in them become `?`."""
    from PIL.PngImagePlugin import PngInfo

    info = PngInfo()
    for key, text in texts.items():
        info.add_text(key, text.encode("utf-8", "replace").decode())
    buffer = io.BytesIO()
    image.save(buffer, "PNG", pnginfo=info)
    return buffer.getvalue()


def write_numbered(data: bytes, folder: Path, prefix: str = "", digits: int = 5) -> Path:
    """Write to `folder`/PREFIXnnnnn.png, n being one more than the highest number there; never over another file.

    Two processes may write to one folder: creating the file is exclusive, and whoever comes second takes the next
    number. A file that can't be written whole is removed.
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
    """Put new contents into a file of ours in one step: who watches it never sees half a picture."""
    unfinished = path.with_name(f".{path.name}.{os.getpid()}")
    unfinished.write_bytes(data)
    os.replace(unfinished, path)


def a1111_parameters(picture: Mapping[str, Any], model: str, model_hash: str) -> str:
    """How a picture was made, in the words of AUTOMATIC1111's web UI.

    Args:
        picture: prompt, negative_prompt, steps, sampler, guidance_scale, seed, width, height, eta; where there is an
            image, its strength.
        model: its name.
        model_hash: as `model_hash` gives it.
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
    """A value as it is, or as a JSON string where it holds what separates values."""
    text = str(value)
    return json.dumps(text, ensure_ascii=False) if set(text) & set(",:\n") else text


def read_record(path: Path) -> dict[str, Any]:
    """The JSON record of a PNG file.

    Raises:
        FileNotFoundError, ValueError: in one line: no such file, not a PNG, or no record in it.
    """
    from PIL import Image

    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist; give a PNG file that a drawing command wrote")
    try:
        with Image.open(path, formats=("PNG",)) as image:
            text = image.info.get(RECORD)
    except Exception as error:  # damaged chunks: Pillow raises SyntaxError, ValueError, OSError, struct.error
        raise ValueError(f"{path} is not a readable PNG file ({type(error).__name__}); give another") from None
    if text is None:
        raise ValueError(f"{path} does not say how it was made; give a PNG file that a drawing command wrote")
    try:
        record = json.loads(text)
    except (ValueError, RecursionError):
        record = None
    if not isinstance(record, dict):
        raise ValueError(f"{path} has a record that is not readable; give a PNG file that a drawing command wrote")
    return record


def model_hash(model: Path) -> str:
    """Ten hex digits that tell models apart: from name, size, first and last MiB of every weights file in a folder.

    They lie in its subfolders, or where there are none in itself. Of a single file the name does not count.

    Training changes all weights, so that is enough; reading all of a large model would take longer than a picture.
    """
    import hashlib

    digest, mebibyte = hashlib.sha256(), 1 << 20
    found = (sorted(path for path in model.glob(depth) if path.suffix in WEIGHTS) for depth in ("*/*", "*"))
    for path in [model] if model.is_file() else next(filter(None, found), []):
        size = path.stat().st_size
        digest.update(f"{path.relative_to(model).as_posix()} {size}".encode())
        with open(path, "rb") as file:
            digest.update(file.read(mebibyte))
            file.seek(max(size - mebibyte, 0))
            digest.update(file.read())
    return digest.hexdigest()[:10]


def file_hash(path: Path) -> str:
    """Ten hex digits that tell a file from another that has its name."""
    import hashlib

    return hashlib.sha256(path.read_bytes()).hexdigest()[:10]
