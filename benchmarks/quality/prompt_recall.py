"""Whether a model draws what its prompts say: prompt recall, memorization, reconstruction, and sheets of images.

python -m benchmarks.quality.prompt_recall --checkpoint checkpoints/emoji --data data/emoji --output docs/emoji

Images are written to --pictures when they are made, so that an interrupted run can continue.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from autoencoder import Autoencoder
from autoencoder.losses.similarity import psnr, ssim
from benchmarks.quality.recall import nearest, recall, small_rgb
from benchmarks.quality.recall_pictures import Gallery, guidance_sheet, pairs_sheet, prompts_sheet, save_sheet
from benchmarks.quality.recall_prompts import KINDS, Case, choose_cases, read_metadata
from benchmarks.quality.recall_report import write_report
from ldm import TextToImage
from stipple.stages.ldm.ldm_run import LdmRunConfig
from stipple_core.config import load_config, one_line_errors
from stipple_core.data.dataset import ImageDataset
from stipple_core.data.records.records import Records
from stipple_core.data.sources.scan import scan
from stipple_core.images.drawn_pictures import check_writable, model_hash
from stipple_core.images.images import image_to_tensor, tensor_to_image

SCALES = (1.0, 2.0, 4.0, 7.0)
SHEET_SCALES = (0.0, *SCALES)
REFERENCES = 200
COPY_RATIO = 0.5  # an image whose relative distance is lower counts as a copy (Carlini et al. 2023)
SHEET_PROMPTS, SHEET_ROWS, SHEET_PAIRS = 16, 6, 24


class RecallScorer:
    """Compares pictures with R references and with all N training pictures.

    Args:
        autoencoder: whose latents are compared.
        references: images [R, 3, S, S] in [-1, 1].
        training: images as features of `small_rgb`, [N, d].
        places: [R], where the references are among the training pictures.
    """

    def __init__(self, autoencoder: Autoencoder, references: Tensor, training: Tensor, places: Tensor):
        self.autoencoder, self.training, self.places = autoencoder, training, places
        self.rgb, self.latents = small_rgb(references), encode(autoencoder, references)

    def score(self, images: Tensor) -> dict[str, Any]:
        """Compute recall and memorization of images [Q, 3, S, S]; image i was drawn for reference i."""
        right, rgb = torch.arange(len(images)), small_rgb(images)
        latents = encode(self.autoencoder, images)
        own = (nearest(rgb, self.training).index == self.places[: len(images)]).float().mean().item()
        return {
            "rgb": dataclasses.asdict(recall(rgb, self.rgb, right)),
            "latents": dataclasses.asdict(recall(latents, self.latents, right)),
            "nearest_training": self.memory(rgb) | {"own_reference": own},
        }

    def memory(self, rgb: Tensor, places: Tensor | None = None) -> dict[str, float]:
        """Compare features [Q, d] with training images, but for the image itself, whose index is in `places` [Q]."""
        found = nearest(rgb, self.training, places)
        copies = (found.ratio < COPY_RATIO).float().mean().item()
        return {"median_distance": statistics.median(found.distance.tolist()), "near_copies": copies}


@torch.inference_mode()
def encode(autoencoder: Autoencoder, images: Tensor) -> Tensor:
    """Return the mean latents of images [B, 3, S, S] as features [B, c * h * w]."""
    device = autoencoder.last_layer.device
    return torch.cat([autoencoder.encode(batch.to(device)).mode().flatten(1).cpu() for batch in images.split(32)])


@torch.inference_mode()
def reconstruct(autoencoder: Autoencoder, images: Tensor) -> Tensor:
    """Reconstruct images [B, 3, S, S] with the autoencoder, clamped to [-1, 1]."""
    device = autoencoder.last_layer.device
    made = [autoencoder.decode(autoencoder.encode(batch.to(device)).mode()).cpu() for batch in images.split(32)]
    return torch.cat(made).clamp(-1, 1)


def read_pictures(dataset: ImageDataset, indices: Sequence[int]) -> Tensor:
    """Load images [B, 3, S, S] as in training. Raises ValueError for an image that can't be decoded."""
    images = [dataset.picture(index) for index in indices]
    if dataset.skipped:
        skip = next(iter(dataset.skipped.values()))
        raise ValueError(f"{skip.path}: {skip.reason}; remove it from the folder")
    return torch.stack(images)


def stack(images: Sequence[Image.Image]) -> Tensor:
    return torch.stack([image_to_tensor(image) for image in images])


def measure(
    gallery: Gallery, records: Records, config: LdmRunConfig, kinds: Sequence[str], limit: int, output: Path
) -> dict[str, Any]:
    """Compute all results and write the sheets. Images are generated for the first `limit` cases."""
    autoencoder = gallery.model.autoencoder
    dataset = ImageDataset(records.train, config.data)
    chunks = torch.arange(len(dataset)).split(256)
    training = torch.cat([small_rgb(read_pictures(dataset, chunk.tolist())) for chunk in chunks])
    places = torch.tensor([case.index for case in gallery.cases])
    references = read_pictures(dataset, places.tolist())
    scorer = RecallScorer(autoencoder, references, training, places)

    held_out = read_pictures(ImageDataset(records.validation, config.data), range(len(records.validation)))
    reconstructions = reconstruct(autoencoder, held_out)
    shown = [[tensor_to_image(image) for image in images[:SHEET_PAIRS]] for images in (held_out, reconstructions)]
    save_sheet(pairs_sheet(*shown), output / "reconstructions.webp")
    save_sheet(prompts_sheet(gallery, gallery.model.defaults.guidance_scale, SHEET_PROMPTS), output / "prompts.webp")
    pictures = [tensor_to_image(image) for image in references[:SHEET_ROWS]]
    save_sheet(guidance_sheet(gallery, SHEET_SCALES, pictures, SHEET_ROWS), output / "guidance.webp")

    rows = [{"kind": "reconstruction", "guidance_scale": None} | scorer.score(reconstruct(autoencoder, references))]
    for kind in kinds:
        for scale in SCALES:
            images = stack(gallery.make(kind, scale, range(limit)))
            rows.append({"kind": kind, "guidance_scale": scale} | scorer.score(images))
    quality = [f(held_out, reconstructions).mean().item() for f in (psnr, ssim)]
    return {
        "queries": limit,
        "references": len(gallery.cases),
        "chance": {"at_1": 1 / len(gallery.cases), "at_5": 5 / len(gallery.cases)},
        "rows": rows,
        "training_pictures": len(training),
        "near_copy_below_ratio": COPY_RATIO,
        "real": {
            "a reference, to another training picture": scorer.memory(scorer.rgb, places),
            "a held-out picture": scorer.memory(small_rgb(held_out)),
        },
        "reconstruction": {"pictures": len(held_out), "psnr": quality[0], "ssim": quality[1]},
    }


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    return add_options(parser).parse_args(argv)


def add_options(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """Add the options of the model, the pictures and the output folders."""
    parser.add_argument("--checkpoint", default="checkpoints/emoji", help="model folder")
    parser.add_argument("--data", required=True, help="the folder of images that the model was trained on")
    parser.add_argument("--config", default="configs/ldm/emoji.yaml", help="the stage-2 config it was trained by")
    parser.add_argument("--output", default="docs/emoji", help="folder of results.json, prompt_recall.md, sheets")
    parser.add_argument("--pictures", default="runs/prompt-recall", help="folder that keeps generated pictures")
    parser.add_argument("--limit", type=int, default=REFERENCES, help="generate pictures of so many references only")
    parser.add_argument(
        "--kinds", nargs="+", choices=KINDS, help="of prompts to measure; default: all that the config has"
    )
    parser.add_argument("--steps", type=int, help="of the sampler; default: the model's")
    parser.add_argument("--batch-size", type=int, default=8, help="pictures computed together")
    parser.add_argument("--seed", type=int, default=0, help="of the choice of references; picture i has seed + i")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    return parser


def prepare(options: argparse.Namespace) -> tuple[Gallery, Records, LdmRunConfig]:
    """Check the command line, and load the model and the records. Raises ValueError for invalid settings."""
    if options.limit < 2:
        raise ValueError(f"--limit {options.limit} must be at least 2; {REFERENCES} is all")
    check_writable(Path(options.output))
    config = load_config(LdmRunConfig, options.config, [f"data.folder={options.data}"])
    records = scan(config.data)
    if not records.validation:
        raise ValueError(f"data.validation {config.data.validation} holds no picture out; raise it in {options.config}")
    held_out = config.data.hold_out.get("keywords", 0.0)
    cases: list[Case] = choose_cases(records.train, read_metadata(options.data), REFERENCES, options.seed, held_out)
    options.kinds = options.kinds or list(cases[0].prompts)
    if missing := set(options.kinds) - set(cases[0].prompts):
        raise ValueError(f"--kinds {' '.join(missing)}: data.hold_out of {options.config} holds no keywords out")
    model = TextToImage.load(options.checkpoint, options.device)
    if model.defaults.height != config.data.image_size:
        sizes = f"{model.defaults.height} pixels, data.image_size is {config.data.image_size}"
        raise ValueError(f"{options.checkpoint} draws {sizes}; give the --config that it was trained by")
    gallery = Gallery(
        model,
        cases,
        Path(options.pictures),
        model_hash(Path(options.checkpoint)),
        batch_size=options.batch_size,
        steps=options.steps,
        seed=options.seed,
    )
    return gallery, records, config


def main(argv: Sequence[str] | None = None) -> None:
    options = parse(argv)
    with one_line_errors():
        gallery, records, config = prepare(options)
        output = Path(options.output)
        output.mkdir(parents=True, exist_ok=True)
    limit = min(options.limit, len(gallery.cases))
    results = measure(gallery, records, config, options.kinds, limit, output)
    settings = {key: getattr(gallery.settings, key) for key in ("sampler", "steps", "height", "width", "seed")}
    settings |= {
        "model_hash": model_hash(Path(options.checkpoint)),
        "default_guidance_scale": gallery.model.defaults.guidance_scale,
        "sheet_scales": SHEET_SCALES,
        "hold_out": config.data.hold_out,
        "device": options.device,
        "torch": torch.__version__,
    }
    results = {"settings": settings} | results
    (output / "results.json").write_text(json.dumps(results, indent=2) + "\n")
    page = write_report(results)
    (output / "prompt_recall.md").write_text(page)
    print(page)


if __name__ == "__main__":
    main()
