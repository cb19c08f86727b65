"""The training images that prompt recall uses, and their prompts: their captions, and words that are in no caption."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from stipple_core.data.records.records import Record
from stipple_core.data.records.rows import is_held_out
from stipple_core.data.sources.metadata import read_rows
from stipple_core.randomness import generator

KINDS = ("caption", "keywords", "synonyms", "unseen")
COUNTS = {"keywords": 3, "synonyms": 2}  # words in place of the name
MAX_UNSEEN = 3  # words in a prompt of held-out keywords


@dataclass(frozen=True)
class Case:
    """A training picture and the prompts that describe it."""

    index: int  # of its record among the training records
    # by kind: its caption; three of its keywords; two that share no word with its name; and, if keywords are held out,
    # the keywords that share no word with its name and are in no caption
    prompts: dict[str, str]


def read_metadata(folder: str) -> dict[str, dict[str, Any]]:
    """Read the rows of the metadata.jsonl of a folder by file name. Raises FileNotFoundError."""
    path = os.path.join(folder, "metadata.jsonl")
    if not os.path.isfile(path):
        raise FileNotFoundError(f"no metadata.jsonl in {folder}; --data is a folder whose rows have name and keywords")
    return {row["file_name"]: row for _, row in read_rows(path) if isinstance(row, dict) and "file_name" in row}


def choose_cases(
    records: Sequence[Record], rows: Mapping[str, Mapping[str, Any]], count: int, seed: int, hold_out: float = 0.0
) -> list[Case]:
    """Choose at most `count` cases of different concepts, in turn from each style, by the records and the seed.

    A case requires three keywords besides its name, two of them synonyms, and a caption that contains the name. If
    `hold_out`, the fraction of keywords that no caption contains, is not 0, one of the synonyms must be held out.

    Raises:
        ValueError: there are fewer than two such records.
    """
    order = torch.randperm(len(records), generator=generator(seed, "recall references")).tolist()
    by_style: dict[str, list[int]] = {}
    for index in order:
        row = rows.get(records[index].name, {})
        if all(len(words(row, kind)) >= least for kind, least in COUNTS.items()):
            if row["name"] in records[index].captions[0][0] and (not hold_out or unseen(row, hold_out)):
                by_style.setdefault(str(row.get("style")), []).append(index)
    queues = [iter(by_style[style]) for style in sorted(by_style)]
    chosen: dict[str, int] = {}  # concept to record
    while queues and len(chosen) < count:
        queue = queues.pop(0)
        index = next((i for i in queue if concept_of(rows[records[i].name]) not in chosen), None)
        if index is not None:
            chosen[concept_of(rows[records[index].name])] = index
            queues.append(queue)
    if len(chosen) < 2:
        raise ValueError(f"{len(chosen)} records have their name in a caption, and enough keywords; recall needs 2")
    return [_make_case(index, records[index], rows[records[index].name], seed, hold_out) for index in chosen.values()]


def words(row: Mapping[str, Any], kind: str) -> list[str]:
    """Return the keywords of a row that can replace its name. Synonyms are those that share no word with the name."""
    name = str(row.get("name", ""))
    keywords = [word for word in row.get("keywords") or [] if re.search(r"\w\w", word)]  # signs, such as *, say nothing
    keywords = [word for word in keywords if word.casefold() != name.casefold()]
    return [word for word in keywords if kind == "keywords" or not share_a_word(word, name)]


def unseen(row: Mapping[str, Any], hold_out: float) -> list[str]:
    """Return the synonyms of a row that occur in no caption."""
    return [word for word in words(row, "synonyms") if is_held_out(word, hold_out)]


def share_a_word(one: str, other: str) -> bool:
    """Return whether a word of one text begins with a word of the other, such as grinning with grin."""
    first, second = (re.findall(r"\w+", text.casefold()) for text in (one, other))
    return any(a.startswith(b) or b.startswith(a) for a in first for b in second)


def _make_case(index: int, record: Record, row: Mapping[str, Any], seed: int, hold_out: float) -> Case:
    prompts = {"caption": record.captions[0][0]}
    choices = {kind: (words(row, kind), count) for kind, count in COUNTS.items()}
    if hold_out:
        choices["unseen"] = unseen(row, hold_out), MAX_UNSEEN
    for kind, (candidates, count) in choices.items():
        drawn = torch.randperm(len(candidates), generator=generator(seed, f"recall {kind}", index)).tolist()[:count]
        wording = ", ".join(candidates[i] for i in drawn)
        prompts[kind] = record.captions[0][0].replace(row["name"], wording, 1)
    return Case(index, prompts)


def concept_of(row: Mapping[str, Any]) -> str:
    """Return the concept of a row, which is the same for all styles."""
    return str(row.get("concept") or row["name"])
