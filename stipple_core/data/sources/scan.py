"""`scan` finds the records of any data source: a folder, tar or parquet shards, or a dataset.

    data.folder=IMAGES                                   images with metadata files or sidecars (`folder`)
    data.folder=SHARDS                                   a folder with .tar or .parquet files and no images
    'data.shards=shards/{00000..00099}.tar'              webdataset tars (`tar`); paths, * and {}, in quotes
    'data.shards=https://host/{00000..00099}.tar'        read by ranges; s3://, gs://, hf:// and all protocols of fsspec
    'data.shards=pipe:curl -s https://host/{00..99}.tar' the output of a command
    'data.shards=rows/*.parquet'                         tables with a column of images (`tables`)
    data.dataset=NAME data.split=train                   a Hugging Face dataset: a name, or a folder of save_to_disk

Names, caption templates, `data.where`, the validation split and the fingerprint do not depend on the source
(`stipple_core.data.records.rows`).
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import chain

from stipple_core.data.records.captions import columns_of
from stipple_core.data.records.data_config import DataConfig
from stipple_core.data.records.records import Records, Skip
from stipple_core.data.records.rows import SourceImage, gather
from stipple_core.data.sources.folder import images_in_folder, is_image_name, walk
from stipple_core.data.sources.shards import Shard, find_shards
from stipple_core.data.sources.tables import images_in_dataset, images_in_parquet
from stipple_core.data.sources.tar_index import images_in_tar, index_of

PARQUET = ".parquet"
SHARDS = (
    PARQUET,
    ".tar",
    ".tar.gz",
    ".tgz",
    ".tar.bz2",
    ".tar.xz",
    ".tar.zst",
)  # compressed: skipped
THREADS = 8  # shards that are indexed at a time; remote ones mostly wait for the network


def scan(config: DataConfig, captioned: bool = True) -> Records:
    """Return the records of the data, from metadata, listings and indices. No image is decoded.

    Args:
        config: the data section of the config.
        captioned: False, as for an autoencoder, ignores captions and also uses images without one.

    Raises:
        FileNotFoundError: the folder does not exist.
        ValueError: no image is usable, more than `max_bad_fraction` are unusable, or a caption template or `where`
            names a column that no row has.
    """
    if not captioned:
        config = dataclasses.replace(config, captions=["image"])  # a constant caption
    required = config.missing_caption == "skip" and bool(config.captions) and all(map(columns_of, config.captions))
    return gather(_source_images(config, captioned and required), config)


def _source_images(config: DataConfig, captioned: bool) -> Iterator[SourceImage | Skip]:
    """The images of the data in order; with `captioned`, an image without a caption is a Skip."""
    if config.dataset:
        return images_in_dataset(config)
    if config.shards:
        return _of_shards(find_shards(config.shards, config.index), config, captioned)
    root = os.path.abspath(config.folder)
    if os.path.isfile(root):
        raise NotADirectoryError(f"data.folder {config.folder} is a file; use its folder, or data.shards for a shard")
    if not os.path.isdir(root):
        raise FileNotFoundError(f"data folder {config.folder} does not exist; set data.folder to your images")
    files = dict(walk(root, ""))
    shards = sorted(name for name in files if name.lower().endswith(SHARDS))
    if not shards or any(map(is_image_name, files)):
        skipped = [Skip(name, "a shard in a folder of images; use data.shards for it") for name in shards]
        return chain(skipped, images_in_folder(root, files, captioned))
    paths = {name: os.path.join(root, name) for name in shards}
    return _of_shards([Shard(path, name, path) for name, path in paths.items()], config, captioned)


def _of_shards(shards: list[Shard], config: DataConfig, captioned: bool) -> Iterator[SourceImage | Skip]:
    def index(shard: Shard) -> str | Skip | None:
        return None if shard.name.endswith(PARQUET) else index_of(shard, config.index)

    with ThreadPoolExecutor(THREADS) as pool:
        for shard, indexed in zip(shards, pool.map(index, shards), strict=True):
            if indexed is None:
                yield from images_in_parquet(shard, config)
            elif isinstance(indexed, Skip):
                yield indexed
            else:
                yield from images_in_tar(shard, indexed, captioned)
