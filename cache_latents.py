"""Encode images and captions once: posterior moments and text contexts in memory-mapped shards, split over processes.

accelerate launch cache_latents.py --config configs/ldm/emoji.yaml data.folder=PATH cache=cache/emoji
"""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Sequence
from datetime import timedelta

import torch
from accelerate import Accelerator
from accelerate.utils import InitProcessGroupKwargs
from tqdm import tqdm

from autoencoder import Autoencoder
from conditioning.conditioner import Conditioner
from operators.winograd import lay_out
from stages.ldm_parts import cache_key, caches_contexts, check_shapes, make_conditioner
from stages.ldm_run import RunConfig, inherited, opened
from stages.survey import bucketed
from storage.config import load_config, one_line_errors
from storage.dataset import ImageDataset, scan, write_skipped
from storage.shards import CachedLatents, ShardWriter

BATCH = 16  # images, or captions, encoded at a time


@torch.no_grad()
def cache_moments(writer: ShardWriter, dataset: ImageDataset, autoencoder: Autoencoder, state: Accelerator) -> None:
    """Encode this process's parts of the images, and their mirror images where the config has flips."""
    flips = (False, True) if dataset.config.flip else (False,)
    for part in tqdm(writer.missing("moments"), desc="images", disable=not state.is_main_process):
        moments: dict[int, torch.Tensor] = {}  # record -> [1 or 2, 2c, h, w]
        for first in range(part.start, part.stop, BATCH):
            pictures = {}
            for record in range(first, min(first + BATCH, part.stop)):
                views = [dataset.picture(record, flip) for flip in flips]
                if views[0] is not None:
                    pictures[record] = torch.stack(views)  # [1 or 2, 3, H, W]
            for size in {views.shape for views in pictures.values()}:
                alike = [record for record, views in pictures.items() if views.shape == size]
                images = torch.cat([pictures[record] for record in alike]).to(state.device)
                encoded = autoencoder.encode(images).moments.cpu().unflatten(0, (len(alike), len(flips)))
                moments.update(zip(alike, encoded, strict=True))
        writer.add_moments(part, [moments.get(record) for record in part])


@torch.no_grad()
def cache_contexts(writer: ShardWriter, conditioner: Conditioner, state: Accelerator) -> None:
    """Encode this process's parts of the captions."""
    for part in tqdm(writer.missing("contexts"), desc="captions", disable=not state.is_main_process):
        contexts: list[torch.Tensor] = []
        for first in range(part.start, part.stop, BATCH):
            captions = writer.captions[first : min(first + BATCH, part.stop)]
            contexts += encode_captions(conditioner, captions, state.device)
        writer.add_contexts(part, contexts)


def encode_captions(conditioner: Conditioner, captions: list[str], device: torch.device) -> list[torch.Tensor]:
    """The context [L, d] of each caption, without masked tokens."""
    tokens = conditioner.tokenize(captions)
    context = conditioner(tokens.ids.to(device), tokens.mask.to(device))
    if context.mask is None:
        return list(context.tokens)
    return [each[mask] for each, mask in zip(context.tokens, context.mask, strict=True)]


def cache(config: RunConfig, arguments: Sequence[str]) -> None:
    """Fill `config.cache`; what is already there is not made again. `arguments` are shown for the next command."""
    with one_line_errors():
        if config.cache is None:
            raise ValueError("there is no folder to write to; give cache=FOLDER")
        # a process may have to make all that another run left undone, so the others wait long for it
        patience = InitProcessGroupKwargs(timeout=timedelta(days=7))
        state = Accelerator(kwargs_handlers=[patience])  # unlike PartialState it reads ACCELERATE_USE_CPU
        records = scan(config.data)
        if config.data.crop == "random":
            raise ValueError("data.crop random cannot be cached; use data.crop=center, or train without a cache")
        autoencoder = Autoencoder.load(config.autoencoder).eval().requires_grad_(False)
        conditioner = make_conditioner(config, opened(config), records.train)
        check_shapes(config, autoencoder, conditioner)
        key = cache_key(config, records.train, autoencoder, conditioner)
        with state.main_process_first():  # the first one writes the key that the others check
            writer = ShardWriter(
                config.cache, state.process_index, key, records.train, state.num_processes,
                {"fp32": "float32", "fp16": "float16"}[config.cache_precision],
                contexts=caches_contexts(config, conditioner),
            )  # fmt: skip
        if state.is_main_process:
            write_skipped(records.skipped, f"{config.cache}/skipped.jsonl")
    lay_out(autoencoder.to(state.device))
    conditioner.to(state.device)
    with one_line_errors():
        buckets = bucketed(records.train, config.data, (state.process_index, state.num_processes))
        dataset = ImageDataset(records.train, config.data, config.seed, f"{config.cache}/skipped.jsonl", buckets)
        cache_moments(writer, dataset, autoencoder, state)
        cache_contexts(writer, conditioner, state)
        state.wait_for_everyone()
        with torch.no_grad():
            writer.close(encode_captions(conditioner, [""], state.device)[0] if writer.contexts else None)
        state.wait_for_everyone()
    if state.is_main_process:
        cached = len(CachedLatents(config.cache))
        undecodable = len(records.train) - cached
        print(f"{cached} images and {len(writer.captions)} captions are in {config.cache}")
        print(f"{len(records.skipped)} skipped, {undecodable} not decoded (see {config.cache}/skipped.jsonl); next:")
        print("  " + shlex.join(["accelerate", "launch", "train_ldm.py", *arguments]))


def main(argv: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", help="the config of the stage-2 run, such as configs/ldm/emoji.yaml")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="such as data.folder=PATH cache=cache/emoji")
    argv = sys.argv[1:] if argv is None else argv
    arguments = parser.parse_intermixed_args(argv)
    with one_line_errors():
        config = load_config(RunConfig, arguments.config, arguments.overrides, inherited)
    cache(config, argv)


if __name__ == "__main__":
    main()
