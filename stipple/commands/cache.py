"""Encode images and captions once, and cache posterior moments and text contexts in memory-mapped files.

stipple cache --config configs/ldm/emoji.yaml data.folder=PATH cache=cache/emoji
"""

from __future__ import annotations

import argparse
import shlex
from collections.abc import Sequence
from datetime import timedelta
from functools import partial

import torch
from accelerate import Accelerator
from accelerate.utils import InitProcessGroupKwargs
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from autoencoder import Autoencoder
from conditioning.interface.conditioner import Conditioner
from ldm.formats.model_parts import ModelParts
from stipple.cli.training_arguments import read_arguments
from stipple.stages.data.data_check import bucketed
from stipple.stages.init_model import InitModel
from stipple.stages.ldm.build_model import make_autoencoder, make_conditioner
from stipple.stages.ldm.ldm_run import LdmRunConfig, config_from_init, open_init
from stipple.stages.ldm.run_cache import MOMENTS_DTYPES, cache_key, caches_contexts
from stipple.stages.ldm.shapes import check_shapes
from stipple.training.run.run_folder import RunFolder
from stipple_core.config import load_config, one_line_errors
from stipple_core.data.dataset import ImageDataset
from stipple_core.data.records.records import Records, merge_skipped
from stipple_core.data.sources.scan import scan
from stipple_core.latent_cache.reader import CachedLatents
from stipple_core.latent_cache.writer import LatentCacheWriter
from stipple_core.operators.winograd import lay_out

BATCH = 16  # images or captions encoded together


class Views(Dataset):
    """The image of each record, and its mirror image if the config has flips: [1 or 2, 3, H, W]; None if unreadable."""

    def __init__(self, images: ImageDataset):
        self.images, self.flips = images, (False, True) if images.config.flip else (False,)

    def __getitem__(self, record: int) -> torch.Tensor | None:
        views = [self.images.picture(record, flip) for flip in self.flips]
        return None if views[0] is None else torch.stack(views)


@torch.no_grad()
def cache_moments(
    writer: LatentCacheWriter, images: ImageDataset, autoencoder: Autoencoder, state: Accelerator, workers: int
) -> None:
    """Encode the images of this process; `workers` processes decode them."""
    missing = writer.missing("moments")
    batches = [[*part[first : first + BATCH]] for part in missing for first in range(0, len(part), BATCH)]
    views = iter(DataLoader(Views(images), batch_sampler=batches, num_workers=workers, collate_fn=list))
    for part in tqdm(missing, desc="images", disable=not state.is_main_process):
        moments: list[torch.Tensor | None] = []  # of each record [1 or 2, 2c, h, w]
        while len(moments) < len(part):
            moments += encode_views(autoencoder, next(views), state.device)
        writer.add_moments(part, moments)


def encode_views(
    autoencoder: Autoencoder, views: Sequence[torch.Tensor | None], device: torch.device
) -> list[torch.Tensor | None]:
    """Encode the views of each image to moments [1 or 2, 2c, h, w], one size at a time; None stays None."""
    moments: list[torch.Tensor | None] = [None] * len(views)
    for shape in {each.shape for each in views if each is not None}:
        alike = [i for i, each in enumerate(views) if each is not None and each.shape == shape]
        images = torch.cat([views[i] for i in alike]).to(device)
        encoded = autoencoder.encode(images).moments.cpu().unflatten(0, (len(alike), shape[0]))
        for i, each in zip(alike, encoded, strict=True):
            moments[i] = each
    return moments


def cache_contexts(writer: LatentCacheWriter, conditioner: Conditioner, state: Accelerator) -> None:
    """Encode the captions of this process."""
    for part in tqdm(writer.missing("contexts"), desc="captions", disable=not state.is_main_process):
        contexts: list[torch.Tensor] = []
        for first in range(part.start, part.stop, BATCH):
            captions = writer.captions[first : min(first + BATCH, part.stop)]
            contexts += encode_captions(conditioner, captions, state.device)
        writer.add_contexts(part, contexts)


@torch.no_grad()
def encode_captions(conditioner: Conditioner, captions: list[str], device: torch.device) -> list[torch.Tensor]:
    """The context [L, d] of each caption, without masked tokens."""
    tokens = conditioner.tokenize(captions)
    context = conditioner(tokens.ids.to(device), tokens.mask.to(device))
    if context.mask is None:
        return list(context.tokens)
    return [each[mask] for each, mask in zip(context.tokens, context.mask, strict=True)]


def open_writer(
    config: LdmRunConfig, records: Records, autoencoder: Autoencoder, conditioner: Conditioner, state: Accelerator
) -> LatentCacheWriter:
    """Create the cache, or check that an existing one fits; the first process does so before the others."""
    check_shapes(config, autoencoder, conditioner)
    key = cache_key(config, records.train, autoencoder, conditioner)
    with state.main_process_first():
        writer = LatentCacheWriter(
            config.cache, state.process_index, key, records.train, state.num_processes,
            MOMENTS_DTYPES[config.cache_precision], contexts=caches_contexts(config, conditioner),
        )  # fmt: skip
    if state.is_main_process:
        merge_skipped(records.skipped, f"{config.cache}/skipped.jsonl")
    return writer


def check(config: LdmRunConfig) -> None:
    """Raise ValueError if the config names no cache, or its data can't be cached."""
    if config.cache is None:
        raise ValueError("cache has no value; set it to the folder to write to: cache=FOLDER")
    if config.data.crop == "random":
        raise ValueError("data.crop=random can't be cached; use data.crop=center, or train without a cache")


def cache(config: LdmRunConfig, arguments: Sequence[str], init: InitModel[ModelParts] | None = None) -> None:
    """Fill `config.cache` with what is not in it yet.

    Args:
        config: of the stage-2 run that will use the cache.
        arguments: of the next command, which is printed.
        init: holds the model of `init_from` if reading the config has opened it.
    """
    # one process may have to finish the work of a stopped run, while the others wait
    patience = InitProcessGroupKwargs(timeout=timedelta(days=7))
    state = Accelerator(kwargs_handlers=[patience])  # unlike PartialState, it reads ACCELERATE_USE_CPU
    records = scan(config.data)
    init = (init or InitModel(open_init)).open(config.init_from)
    autoencoder, conditioner = make_autoencoder(config, init), make_conditioner(config, init, records)
    # locked while this function runs, so that one run at a time fills the cache
    folder = RunFolder(config.cache, keep=2, accepts_signals=False)
    if state.is_main_process:
        folder.take()
    writer = open_writer(config, records, autoencoder, conditioner, state)
    lay_out(autoencoder.to(state.device))
    conditioner.to(state.device)
    buckets = bucketed(records.train, config.data, (state.process_index, state.num_processes))
    entries = len(records.train) + len(records.validation) + len(records.skipped)
    skipped = f"{config.cache}/skipped.jsonl"
    images = ImageDataset(records.train, config.data, config.seed, skipped, buckets, entries)
    cache_moments(writer, images, autoencoder, state, config.trainer.workers)
    cache_contexts(writer, conditioner, state)
    state.wait_for_everyone()
    writer.close(encode_captions(conditioner, [""], state.device)[0] if writer.contexts else None)
    state.wait_for_everyone()
    if state.is_main_process:
        cached = len(CachedLatents(config.cache))
        print(f"{cached} images and {len(writer.captions)} captions are in {config.cache}")
        unused = f"{len(records.skipped)} skipped, {len(records.train) - cached} not decoded"
        print(f"{unused} (see {skipped}); next:")
        print("  " + shlex.join(["stipple", "train", *arguments]))


def read_config(arguments: argparse.Namespace) -> LdmRunConfig:
    """Return the config of a command line; exits with one line and code 2 after a mistake.

    The model of `init_from`, which decides defaults of the config, is kept in `arguments.init` for `run`.
    """
    arguments.init = InitModel(open_init)
    base = partial(config_from_init, init=arguments.init)
    with one_line_errors():
        config = load_config(LdmRunConfig, arguments.config, arguments.overrides, base)
        check(config)
    return config


def run(config: LdmRunConfig, arguments: argparse.Namespace) -> None:
    """Fill the cache with a config that `read_config` returned."""
    with one_line_errors():
        cache(config, arguments.argv, arguments.init)


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command line in this process, which accelerate may have started as one of several."""
    arguments = read_arguments("cache", argv)
    run(read_config(arguments), arguments)


if __name__ == "__main__":
    main()
