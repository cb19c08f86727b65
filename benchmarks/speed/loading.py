"""Images per second from a folder, tar shards and the latent cache, beside webdataset and Hugging Face datasets.

python -m benchmarks.speed.loading --folder data/emoji --images 4000 --rounds 3

All contenders read the same images in random order, and decode, resize, crop and batch them; the cache contains them as
latents. The time includes the start of the workers. The last line is what the UNet of configs/ldm/emoji.yaml consumes
in training. Requires webdataset and datasets.
"""

from __future__ import annotations

import argparse
import io
import json
import statistics
import tarfile
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path

import torch
from PIL import Image

from benchmarks.shared import contest
from benchmarks.speed.training_case import CASES, Batch
from benchmarks.speed.training_step import our_step
from stipple_core.data.dataset import ImageDataset, collate
from stipple_core.data.loader import make_loader
from stipple_core.data.order import Order
from stipple_core.data.records.data_config import DataConfig
from stipple_core.data.records.records import Record
from stipple_core.data.sources.scan import scan
from stipple_core.latent_cache.reader import CachedLatents, cached_collate
from stipple_core.latent_cache.writer import LatentCacheWriter

SEED, PER_SHARD = 0, 1000
CACHE = "ours, cache"
TOKENS = 12  # of an average caption
Loop = Callable[[int], Iterator[tuple[torch.Tensor, list[str]]]]  # workers -> batches of pictures and captions


def prepare(options: argparse.Namespace) -> tuple[Path, list[Record]]:
    """Write the same images to a folder and to tar shards."""
    found = list(scan(DataConfig(folder=options.folder, validation=0.0)).train)
    root = Path(options.workdir) / f"loading-{options.pictures}"
    (root / "folder").mkdir(parents=True, exist_ok=True)
    (root / "tar").mkdir(exist_ok=True)
    rows = []
    for number in range(options.pictures):
        record = found[number % len(found)]
        name = f"{number:06d}{Path(record.name).suffix}"
        (root / "folder" / name).write_bytes(Path(record.path).read_bytes())
        rows.append({"file_name": name, "text": f"{record.captions[0][0]} {number}"})
    (root / "folder/metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for first in range(0, len(rows), PER_SHARD):
        with tarfile.open(root / f"tar/{first // PER_SHARD:05d}.tar", "w") as shard:
            for row in rows[first : first + PER_SHARD]:
                shard.add(root / "folder" / row["file_name"], row["file_name"])
                text = tarfile.TarInfo(f"{Path(row['file_name']).stem}.txt")
                text.size = len(row["text"].encode())
                shard.addfile(text, io.BytesIO(row["text"].encode()))
    return root, list(scan(DataConfig(folder=str(root / "folder"), validation=0.0)).train)


def of_images(data: DataConfig, batch_size: int, images: int, workers: int) -> Iterator[tuple[torch.Tensor, list[str]]]:
    """Return a loop over batches of images, loaded as in training."""
    dataset = ImageDataset(scan(data).train, data, SEED)
    order = Order(len(dataset), batch_size, batch_size, seed=SEED, steps=images // batch_size)
    return ((batch.images, batch.captions) for batch in make_loader(dataset, order, workers, collate))


def of_cache(folder: str, batch_size: int, images: int, workers: int) -> Iterator[tuple[torch.Tensor, list[str]]]:
    """Return a loop over batches of the latent cache, loaded as by `stipple train`."""
    dataset = CachedLatents(folder, seed=SEED)
    order = Order(len(dataset), batch_size, batch_size, seed=SEED, steps=images // batch_size)
    return ((batch.moments, batch.captions) for batch in make_loader(dataset, order, workers, cached_collate))


def write_cache(folder: Path, records: list[Record]) -> None:
    """Write a latent cache with the shapes of configs/ldm/emoji.yaml and arbitrary values."""
    unet = CASES["emoji"].unet
    writer = LatentCacheWriter(str(folder), 0, {"made for": "benchmarks.speed.loading"}, records)
    for part in writer.missing("moments"):
        writer.add_moments(part, torch.randn(len(part), 1, 2 * unet.in_channels, unet.sample_size, unet.sample_size))
    for part in writer.missing("contexts"):
        writer.add_contexts(part, [torch.randn(TOKENS, unet.cross_attention_dim) for _ in part])
    writer.close(torch.randn(2, unet.cross_attention_dim))


def their_transform(size: int) -> Callable[[Image.Image], torch.Tensor]:
    """Return the usual preprocessing of training scripts as torchvision transforms."""
    from torchvision.transforms import CenterCrop, Compose, InterpolationMode, Normalize, Resize, ToTensor

    return Compose([Resize(size, InterpolationMode.BICUBIC), CenterCrop(size), ToTensor(), Normalize([0.5], [0.5])])


def of_webdataset(pattern: str, size: int, batch_size: int, images: int, workers: int) -> Iterator:
    """Return a plain webdataset loop, with shards in random order and a shuffle buffer of 1,000."""
    import webdataset

    shards = webdataset.WebDataset(pattern, shardshuffle=False, resampled=True, seed=SEED).shuffle(1000)
    samples = shards.decode("pilrgb").to_tuple("png;jpg;webp", "txt").map_tuple(their_transform(size), str)
    loader = webdataset.WebLoader(samples.batched(batch_size), batch_size=None, num_workers=workers)
    return (batch for _, batch in zip(range(images // batch_size), loader, strict=False))


def of_datasets(folder: Path, size: int, batch_size: int, images: int, workers: int) -> Iterator:
    """Return a plain loop over a Hugging Face dataset with a transform and torch's DataLoader."""
    import datasets

    rows = [json.loads(line) for line in (folder / "metadata.jsonl").read_text().splitlines()]
    table = {"image": [str(folder / row["file_name"]) for row in rows], "text": [row["text"] for row in rows]}
    transform = their_transform(size)
    data = datasets.Dataset.from_dict(table).cast_column("image", datasets.Image())
    data = data.with_transform(partial(_transformed, transform))
    sampler = torch.utils.data.RandomSampler(data, num_samples=images // batch_size * batch_size)
    loader = torch.utils.data.DataLoader(data, batch_size, sampler=sampler, num_workers=workers)
    return ((batch["image"], batch["text"]) for batch in loader)


def _transformed(transform: Callable[[Image.Image], torch.Tensor], rows: dict) -> dict:
    return {"image": [transform(image.convert("RGB")) for image in rows["image"]], "text": rows["text"]}


def run_through(loop: Loop, workers: int) -> None:
    """Iterate over all batches."""
    for _ in loop(workers):
        pass


def require_same_pictures(loops: dict[str, Loop]) -> None:
    """Raise RuntimeError unless all contenders return the same tensor for the same image."""
    seen = {name: {text: image for images, texts in loop(0) for image, text in zip(images, texts, strict=True)}
            for name, loop in loops.items()}  # fmt: skip
    first, *others = seen
    for other in others:
        common = seen[first].keys() & seen[other].keys()
        worst = max((seen[first][text] - seen[other][text]).abs().max().item() for text in common)
        if not worst < 2.5 / 127.5:
            raise RuntimeError(f"pictures of {first} and {other} differ by {worst:.3f}; there is nothing to compare")
        contest.note(f"{len(common)} pictures of {first} and {other} differ by at most {worst * 127.5:.2f} of 255")


def consumption(steps: int) -> float:
    """Return the images per second of training the UNet of configs/ldm/emoji.yaml on latents."""
    case, draw = CASES["emoji"], partial(torch.randn, generator=torch.Generator().manual_seed(SEED))
    size, latent = case.batch_size, (case.unet.in_channels, case.size, case.size)
    tokens = draw(size, TOKENS, case.unet.cross_attention_dim)
    moments = draw(size, 2 * latent[0], *latent[1:])
    times = torch.linspace(0, 999, size).long()
    empty = torch.empty(0)
    batch = Batch(empty, empty, moments, tokens, None, draw(size, *latent), draw(size, *latent), times)
    step = our_step(case, batch)
    step()
    return size / statistics.median(contest.measure(step)[0] for _ in range(steps))


def image_loops(options: argparse.Namespace, root: Path) -> dict[str, Loop]:
    """Return the contenders that decode images, by name."""
    folder, size, batch = root / "folder", options.size, options.batch_size
    shards = f"{root}/tar/{{00000..{(options.pictures - 1) // PER_SHARD:05d}}}.tar"
    data = partial(DataConfig, image_size=size, validation=0.0, index=str(root / "index"))
    return {
        "ours, folder": partial(of_images, data(folder=str(folder)), batch, options.images),
        "datasets, folder": partial(of_datasets, folder, size, batch, options.images),
        "ours, tar": partial(of_images, data(shards=shards), batch, options.images),
        "webdataset, tar": partial(of_webdataset, shards, size, batch, options.images),
    }


def report(options: argparse.Namespace, times: dict[tuple[str, int], contest.Times], used: float) -> str:
    """Return a Markdown table of images per second by contender and workers, and of the cache against the UNet."""
    rates = {who: options.images / statistics.median(each.wall) for who, each in times.items()}
    lines = [
        f"{options.images} pictures per round, {options.rounds} rounds, medians; {contest.machine(options.threads)}"
    ]
    lines += ["", "| images/s | " + " | ".join(f"{workers} workers" for workers in options.workers) + " |"]
    lines += ["|---" * (len(options.workers) + 1) + "|"]
    for name in dict.fromkeys(name for name, _ in times):
        cells = [f"{rates[name, workers]:,.0f}" for workers in options.workers]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    multiples = [f"{rates[CACHE, workers] / used:.0f} ({workers} workers)" for workers in options.workers]
    lines += ["", f"The UNet of configs/ldm/emoji.yaml trains on {used:,.0f} images/s; the cache gives a multiple of"]
    return "\n".join([*lines, f"{', '.join(multiples)}."])


def main(argv: Sequence[str] | None = None) -> None:
    parser = contest.parser(__doc__, rounds=3)
    parser.add_argument("--folder", default=str(contest.ROOT / "tests/pictures"), help="of captioned pictures")
    parser.add_argument("--pictures", type=int, default=2000, help="different files; few pictures are repeated")
    parser.add_argument("--images", type=int, default=4000, help="read per round")
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--size", type=int, default=64, help="pixels that pictures are resized to")
    parser.add_argument("--workers", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--workdir", default=contest.WORKDIR, help="where the data is written to")
    options = parser.parse_args(argv)
    if options.tiny:
        options.pictures, options.images = 60, 64
    torch.set_num_threads(options.threads)
    root, records = prepare(options)
    write_cache(root / "cache", records)
    loops = image_loops(options, root)
    require_same_pictures(loops)
    loops[CACHE] = partial(of_cache, str(root / "cache"), options.batch_size, options.images)
    contenders = {(name, workers): partial(run_through, loop, workers)
                  for name, loop in loops.items() for workers in options.workers}  # fmt: skip
    times = contest.alternate(contenders, options.rounds)
    print(report(options, times, consumption(3 if options.tiny else 10)))


if __name__ == "__main__":
    main()
