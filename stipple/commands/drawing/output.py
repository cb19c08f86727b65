"""Draw pictures under a progress bar, and write them to numbered PNG files that record how they were made."""

from __future__ import annotations

import json
import math
import sys
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stipple_core.config import one_line_errors
from stipple_core.images.drawn_pictures import (
    PARAMETERS,
    RECORD,
    a1111_parameters,
    encode_png,
    file_hash,
    replace_file,
    write_numbered,
)

if TYPE_CHECKING:
    from PIL import Image
    from torch import Tensor

    from ldm.pipeline import TextToImage
    from ldm.sampling.decoding import FinishedImage
    from ldm.sampling.settings import Settings


class Output:
    """The folder that pictures are written to, and what is recorded in them.

    Args:
        folder: is made when the first picture is written.
        about: what to record of the model; None: no metadata is written.
    """

    def __init__(self, folder: Path, about: Mapping[str, Any] | None):
        self.folder, self.about, self.preview_path = folder, about, None

    def write(self, image: Image.Image, pictures: Sequence[Settings], prefix: str = "", digits: int = 5) -> Path:
        """Write an image, with the settings of the picture or pictures in it; return its path."""
        texts = {}
        if self.about is not None:
            records = [asdict(picture) for picture in pictures]
            name = Path(self.about["checkpoint"]).name
            texts[PARAMETERS] = a1111_parameters(records[0], name, self.about["model_hash"])
            texts[RECORD] = json.dumps({**self.about, "pictures": records})
        return write_numbered(encode_png(image, texts), self.folder, prefix, digits)

    def preview(self, model: TextToImage, z_0: Tensor) -> None:
        """Write estimates of clean latents [B, c, h, w] to the preview file of this command."""
        from stipple_core.images.images import grid

        images = model.preview(z_0)
        data = encode_png(grid(images, columns(images)) if len(images) > 1 else images[0], {})
        if self.preview_path is None:
            self.preview_path = write_numbered(data, self.folder, "preview-", 4)
            print(f"preview: {self.preview_path}", file=sys.stderr)
        else:
            replace_file(data, self.preview_path)


def input_hashes(
    pictures: Sequence[Settings], record: Mapping[str, Any], like: str | None
) -> dict[str, dict[str, str]]:
    """Return the hashes of the input images, to be recorded; warn of a file that differs from the recorded one.

    Args:
        pictures: planned from a command line, so that their images are paths.
        record: of the picture that is drawn again, or {}.
        like: the file of that picture.
    """
    paths = dict.fromkeys(path for p in pictures for path in (p.image, p.mask, p.map) if path is not None)
    hashes = {path: file_hash(Path(path)) for path in paths}
    recorded = record.get("files")
    for path, hash in hashes.items():
        if isinstance(recorded, dict) and recorded.get(path, hash) != hash:
            warnings.warn(f"{like} was made of another {path}: it will differ", stacklevel=1)
    return {"files": hashes} if hashes else {}


def columns(images: Sequence[Image.Image]) -> int:
    """Return the number of columns of a grid that is as square as possible."""
    return math.isqrt(len(images) - 1) + 1


def draw_batches(
    model: TextToImage, batches: Sequence[list[Settings]], output: Output, preview_every: int | None
) -> Iterator[FinishedImage]:
    """Draw batches of pictures under a progress bar; write each picture, print its path, and yield it."""
    from tqdm import tqdm

    with tqdm(total=sum(model.steps(batch[0]) for batch in batches), unit="step", disable=None) as bar:
        for batch in batches:
            for step in model.sample(batch):
                bar.update()
                if preview_every and (step.index + 1) % preview_every == 0:
                    with one_line_errors():
                        output.preview(model, step.z_0)
            with one_line_errors():
                for picture in model.finish(batch, step.z):
                    path = output.write(picture.image, [picture.settings])
                    tqdm.write(str(path), file=sys.stdout)
                    sys.stdout.flush()
                    yield picture
