"""The model with random weights that the benchmarks open, in the layout of diffusers.

python -m benchmarks.shared.model_folder --workdir DIR

writes the folder if it does not exist, and prints its path.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from autoencoder import Autoencoder
from benchmarks.peers.diffusers_calls import SCALE
from benchmarks.shared import contest
from benchmarks.shared.models import empty, randomize, shapes
from conditioning.encoders.clip import Clip
from conditioning.text.text_conditioner import TextConditioner
from conditioning.tokenizers.known_tokenizers import clip_tokenizer
from ldm.formats.diffusers.scheduler import Scheduling
from ldm.networks.unet import UNet
from ldm.pipeline import TextToImage
from ldm.sampling.settings import Settings
from ldm.schedules.noise_schedule import ScheduleConfig


def model_folder(workdir: str | Path, tiny: bool) -> Path:
    """Return a model folder in the layout of diffusers; writes random weights (4.3 GB for SD) if it is missing."""
    request = shapes(tiny)
    folder = Path(workdir) / request.name
    if (folder / "model_index.json").is_file():
        return folder
    autoencoder = randomize(empty(Autoencoder, request.vae), seed=1)
    autoencoder.scaling_factor = SCALE
    conditioner = TextConditioner(clip_tokenizer(), randomize(empty(Clip, request.text), seed=2), use_mask=False)
    schedule = ScheduleConfig(beta_start=0.00085, beta_end=0.012)
    scheduling = Scheduling(schedule=schedule, prediction="noise", spacing="leading", ends_clean=False)
    unet, defaults = randomize(empty(UNet, request.unet), seed=3), Settings(guidance_scale=7.5, spacing="leading")
    TextToImage(autoencoder.eval(), unet.eval(), conditioner.eval(), scheduling, defaults).save(folder)
    return folder


def main(argv: Sequence[str] | None = None) -> None:
    parser = contest.parser(__doc__, rounds=0)
    parser.add_argument("--workdir", default=contest.WORKDIR, help="where the model is written to")
    options = parser.parse_args(argv)
    print(json.dumps({"folder": str(model_folder(options.workdir, options.tiny).resolve())}))


if __name__ == "__main__":
    main()
