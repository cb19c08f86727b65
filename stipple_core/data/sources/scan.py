"""The one door to data: `scan` finds the records of a folder, of tar or parquet shards, or of a saved dataset.

    data.folder=PICTURES                                 pictures with metadata or sidecar captions (stipple_core.data.sources.folder)
    data.folder=SHARDS                                   a folder that holds .tar or .parquet files and no pictures
    'data.shards=shards/{00000..00099}.tar'              webdataset tars (stipple_core.data.sources.tar); paths, * and {}, in quotes
    'data.shards=https://host/{00000..00099}.tar'        read by ranges; s3://, gs://, hf:// and all that fsspec knows
    'data.shards=pipe:curl -s https://host/{00..99}.tar' what a command writes
    'data.shards=rows/*.parquet'                         rows with a column of pictures (stipple_core.data.sources.tables)
    data.dataset=NAME data.split=train                   a Hugging Face dataset, by name or as save_to_disk wrote it

Names, templates, `data.where`, the share held out and the fingerprint are the same code for all (`stipple_core.data.records.rows`).
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
from stipple_core.data.sources.locations import Shard, find_shards
from stipple_core.data.sources.tables import images_in_dataset, images_in_parquet
from stipple_core.data.sources.tar_index import images_in_tar, index_of

PARQUET = ".parquet"
SHARDS = (PARQUET, ".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tar.xz", ".tar.zst")  # compressed tars, to refuse them
THREADS = 8  # shards indexed at a time; those behind URLs are mostly waited for


def scan(config: DataConfig, captioned: bool = True) -> Records:
    """The records of the data, from metadata, listings and indices only: no picture is decoded.

    With `captioned` false, as for an autoencoder, captions are not looked at and an image without one is used too.

    Raises FileNotFoundError if there is no such folder; ValueError if nothing is usable, if more than
    `max_bad_fraction` is not, or if a template or `where` names a column that no row has.
    """
    if not captioned:
        config = dataclasses.replace(config, captions=["image"])  # one that every image has
    required = config.missing_caption == "skip" and bool(config.captions) and all(map(columns_of, config.captions))
    return gather(_found(config, captioned and required), config)


def _found(config: DataConfig, captioned: bool) -> Iterator[SourceImage | Skip]:
    """What the data consist of, in their order; with `captioned`, a picture without a caption is a Skip."""
    if config.dataset:
        return images_in_dataset(config)
    if config.shards:
        return _of_shards(find_shards(config.shards, config.index), config, captioned)
    root = os.path.abspath(config.folder)
    if os.path.isfile(root):
        raise NotADirectoryError(f"data.folder {config.folder} is a file; give its folder, or a shard as data.shards")
    if not os.path.isdir(root):
        raise FileNotFoundError(f"data folder {config.folder} does not exist; data.folder is the folder of your images")
    files = dict(walk(root, ""))
    shards = sorted(name for name in files if name.lower().endswith(SHARDS))
    if not shards or any(map(is_image_name, files)):
        beside = [Skip(name, "a shard among pictures; give it as data.shards") for name in shards]
        return chain(beside, images_in_folder(root, files, captioned))
    paths = {name: os.path.join(root, name) for name in shards}
    return _of_shards([Shard(path, name, path) for name, path in paths.items()], config, captioned)


def _of_shards(shards: list[Shard], config: DataConfig, captioned: bool) -> Iterator[SourceImage | Skip]:
    def index(shard: Shard) -> str | Skip | None:
        return None if shard.name.endswith(PARQUET) else index_of(shard, config.index)

    with ThreadPoolExecutor(THREADS) as pool:
        for shard, found in zip(shards, pool.map(index, shards), strict=True):
            if found is None:
                yield from images_in_parquet(shard, config)
            elif isinstance(found, Skip):
                yield found
            else:
                yield from images_in_tar(shard, found, captioned)
