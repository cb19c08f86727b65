"""Words: identifiers and prose use the standard terms of the field, and "shard" only means a tar or parquet shard.

Each test names all offenders, FILE:LINE with the word.
"""

from __future__ import annotations

import io
import re
import tokenize
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).parents[2]
PACKAGES = ("autoencoder", "conditioning", "ldm", "stipple", "stipple_core", "benchmarks", "tests")
NAMES = {  # parts of identifiers, split at "_" and at capitals -> what to write instead
    **dict.fromkeys(("told",), "context, is_conditional"),
    **dict.fromkeys(("given", "givens"), "inputs, values, provided"),
    **dict.fromkeys(("said",), "message, output, settings"),
    **dict.fromkeys(("mend", "mends", "mended"), "fix"),
    **dict.fromkeys(("sign", "signs", "signed"), "hash, file_hashes"),
    **dict.fromkeys(("habit", "habits"), "defaults"),
    **dict.fromkeys(("survey", "surveys", "surveyed"), "data check, inspection"),
    **dict.fromkeys(("judge", "judges", "judged", "judgement", "judgements"), "discriminator, evaluate"),
    **dict.fromkeys(("imagine", "imagined", "imagines", "imagining"), "sample_embeddings, prior_sampling"),
    **dict.fromkeys(("lead", "leads"), "gradient_guide"),
}
PROSE = {  # in docstrings, comments, messages and pages
    r"\btold\b": "is conditioned on; the message",
    r"\bsaid\b": "specified; the output",
    r"\bmend(s|ed|ing)?\b": "fix",
    r"\bhabits?\b": "defaults",
    r"\bsurvey(s|ed)?\b": "data check",
    r"\bjudg(e|es|ed|ing|e?ments?)\b": "evaluate, discriminate, measure",
    r"\bimagin(e|es|ed|ing|ings)\b": "sample embeddings",
    r"\bGiven\.\w": "ConditionInputs.",
    r"\b(the|what|all|what is|what was|as|than|those) given\b(?= *([.,;:)]|$|is\b|are\b|was\b))": "inputs, provided",
    r"\b(is|was) given\b(?= *([.,;:)]|$))": "is provided, is an input, is specified",
    r"\b(a|the|its|no|each|every|several|their|of) leads?\b(?! (time|to)\b)": "gradient guide",
    r"\b(what|that|which) leads\b(?! to\b)|\bleads? (away|by a gradient|a model|a picture|pictures)\b": "guides",
}
EXEMPT = {  # file -> pattern of what it may say
    "tests/house/test_words.py": r".*",
    **dict.fromkeys(  # a config key, stored in model folders
        (
            "conditioning/classes/class_names.py",
            "conditioning/classes/class_conditioner.py",
            "tests/house/test_configs.py",
            "tests/ldm/sampling/test_prompt_kinds.py",
        ),
        r"told_as",
    ),
}
SHARDS = (  # where a shard is a tar or parquet file, which data come in
    *(
        "stipple_core/data/",
        "tests/data/",
        "tests/helpers/data/data_sources.py",
        "benchmarks/speed/loading.py",
        "benchmarks/speed/scaling.py",
        "tests/house/test_benchmarks.py",
    ),
    *("stipple/stages/data/run_settings.py", "tests/robustness/"),
    "stipple/stages/ldm/preservation.py",
    *("docs/", "README.md", "ARCHITECTURE.md", "CONTRIBUTING.md", "CHANGELOG.md", "tests/house/test_words.py"),
)
SHARD_ALLOWED = (  # keys of configs, names of other programs, and the term itself
    r"data\.shards|fully_shard|reshard_after_forward|(FULL|HYBRID)_SHARD|shardshuffle|max_shard_size"
    r"|\bShard\(|import .*\bShard\b|(tar|parquet) shards?"
)


class Word(NamedTuple):
    """A piece of a file: an identifier, or a line of prose."""

    place: str  # FILE:LINE
    text: str


@cache
def read(path: Path) -> tuple[list[Word], list[Word]]:
    """Identifiers of a module, and the lines of its strings and comments."""
    identifiers, prose, name = [], [], path.relative_to(ROOT).as_posix()
    for token in tokenize.generate_tokens(io.StringIO(path.read_text("utf-8")).readline):
        if token.type == tokenize.NAME:
            identifiers.append(Word(f"{name}:{token.start[0]}", token.string))
        elif token.type in (tokenize.STRING, tokenize.COMMENT, getattr(tokenize, "FSTRING_MIDDLE", -1)):
            lines = token.string.split("\n")
            prose += [Word(f"{name}:{token.start[0] + number}", line) for number, line in enumerate(lines)]
    return identifiers, prose


def modules() -> list[Path]:
    paths = [*ROOT.glob("*.py"), *(path for package in PACKAGES for path in (ROOT / package).rglob("*.py"))]
    return sorted(paths)


def pages() -> Iterator[Word]:
    """The lines of all pages, and of the comments of configs."""
    paths = [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), *(ROOT / "checkpoints").rglob("*.md")]
    for path in sorted(paths):
        for number, line in enumerate(path.read_text("utf-8").splitlines(), 1):
            yield Word(f"{path.relative_to(ROOT).as_posix()}:{number}", line)
    for path in sorted((ROOT / "configs").rglob("*.yaml")):
        for number, line in enumerate(path.read_text("utf-8").splitlines(), 1):
            if "#" in line:
                yield Word(f"{path.relative_to(ROOT).as_posix()}:{number}", line.partition("#")[2])


def parts(identifier: str) -> set[str]:
    """The words of an identifier in lower case: of `GivenInputs` and `given_inputs`, given and inputs."""
    return {word.lower() for word in re.findall(r"[A-Z]?[a-z]+|[A-Z]+(?![a-z])", identifier)}


def exempt(word: Word) -> bool:
    pattern = EXEMPT.get(word.place.rpartition(":")[0])
    return pattern is not None and re.search(pattern, word.text) is not None


def shown(offenders: list[str]) -> str:
    return f"{len(offenders)} offenders:\n" + "\n".join(offenders)


def test_identifiers_use_standard_terms():
    offenders = [
        f"{word.place} {word.text}: use {NAMES[part]}"
        for path in modules()
        for word in dict.fromkeys(read(path)[0])
        for part in sorted(parts(word.text) & NAMES.keys())
        if not exempt(word)
    ]
    assert not offenders, shown(offenders)


def prose_offenders(words: Iterator[Word]) -> list[str]:
    return [
        f"{word.place} {found[0]!r}: use {instead}"
        for word in words
        for pattern, instead in PROSE.items()
        if (found := re.search(pattern, word.text, re.IGNORECASE)) and not exempt(word)
    ]


def test_docstrings_comments_and_messages_use_standard_terms():
    offenders = prose_offenders(word for path in modules() for word in read(path)[1])
    assert not offenders, shown(offenders)


def test_pages_and_comments_of_configs_use_standard_terms():
    offenders = prose_offenders(pages())
    assert not offenders, shown(offenders)


def test_a_shard_is_a_file_of_data():
    """Not a part of the latent cache, of a weight file, or of a partitioned network (FSDP)."""
    code = (word for path in modules() for words in read(path) for word in words)
    offenders = [
        f"{word.place} {word.text.strip()[:100]}"
        for word in dict.fromkeys(code)
        if re.search("shard", re.sub(SHARD_ALLOWED, "", word.text), re.IGNORECASE)
        and not word.place.startswith(SHARDS)
        and word.text not in ("fully_shard", "Shard", "shards", "reshard_after_forward")
    ]
    assert not offenders, shown(offenders)


def test_files_in_the_lists_of_exceptions_exist():
    assert not [name for name in (*EXEMPT, *SHARDS) if not (ROOT / name).exists()]


@pytest.mark.parametrize(
    ("text", "allowed"),
    [
        ("given that z_t is known", True),
        ("a time is given by its index", True),
        ("what is given.", False),
        ("this leads to larger errors", True),
        ("a lead that is opened", False),
        ("the model is told the class", False),
        ("the sign of the gradient", True),
        ("Told nothing.", False),
        ("What a step is given: raw, and as it is cached.", False),
    ],
)
def test_the_rules_for_prose_allow_ordinary_english(text, allowed):
    assert (not prose_offenders(iter([Word("x.py:1", text)]))) == allowed
