"""Whatever configs, headers and manifests hold, what comes out is a value, or an error in one line: a long fuzzing run.

Each is made from a sound example by the changes that find most: bits, bytes, pieces doubled, removed, moved, and words
that mean something to the reader. STIPPLE_SEED repeats a run, STIPPLE_FUZZ sets how many executions there are of each.
"""

from __future__ import annotations

import os
import random
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch

from stipple.stages.ldm.ldm_run import LdmRunConfig
from stipple_core.config import load_config
from stipple_core.files import checkpoint_folder as checkpoint
from stipple_core.files.weights import outline, read_metadata, read_weights, write_weights

ROOT = Path(__file__).parents[2]
MANIFEST_WORDS = [b'"sha256"', b'"bytes"', b"../", b"/etc/passwd", b"null", b"[", b"{", b"}", b"-1", b"1e9", b'""']
HEADER_WORDS = [
    b'"dtype"',
    b'"F32"',
    b'"F8_E4M3"',
    b"[0,0]",
    b"[-1]",
    b"1e99",
    b'"__metadata__"',
    b"\xff" * 8,
    b"{",
    b"[",
]
CONFIG_WORDS = [
    b"&a ",
    b"*a",
    b"!!python/name:os.system",
    b"${run}",
    b"???",
    b"<<: ",
    b"[",
    b"{",
    b": ",
    b"- ",
    b"\n  ",
    b"\0",
]


@pytest.fixture
def draws() -> random.Random:
    seed = int(os.environ.get("STIPPLE_SEED") or time.time_ns() % 2**32)
    print(f"STIPPLE_SEED={seed}")
    return random.Random(seed)


def mutated(data: bytes, words: Sequence[bytes], draws: random.Random) -> bytes:
    """An example with some changes."""
    changed = bytearray(data)
    for _ in range(draws.randint(1, 4)):
        at, size = draws.randrange(len(changed) + 1), draws.choice([1, 2, 8, 40])
        kind = draws.randrange(6)
        if kind == 0 and changed:
            changed[at % len(changed)] ^= 1 << draws.randrange(8)
        elif kind == 1:
            changed[at : at + size] = draws.randbytes(size)
        elif kind == 2:
            del changed[at : at + size]
        elif kind == 3:
            changed[at:at] = changed[at : at + size] * draws.choice([1, 2, 50])
        elif kind == 4:
            changed[at:at] = draws.choice(words)
        else:
            del changed[at:]
    return bytes(changed)


def fuzz(act: Callable[[bytes], object], example: bytes, words: Sequence[bytes], draws: random.Random) -> None:
    """Act on so many changed examples; only ValueError and OSError may come out, in a line each."""
    count, values, started = int(os.environ.get("STIPPLE_FUZZ") or 20_000), 0, time.monotonic()
    for _ in range(count):
        data = mutated(example, words, draws)
        try:
            act(data)
            values += 1
        except (ValueError, OSError) as error:
            assert "\n" not in str(error), (str(error), data)
        except BaseException as error:
            raise AssertionError(f"{type(error).__name__}: {error}, of {data!r}") from error
    print(f"{count} executions in {time.monotonic() - started:.0f} s, {values} without an error")


@pytest.mark.slow
def test_configs_are_values_or_one_line(tmp_path, draws):
    path = tmp_path / "c.yaml"

    def act(data: bytes) -> None:
        path.write_bytes(data)
        load_config(LdmRunConfig, str(path))

    fuzz(act, (ROOT / "configs/ldm/tiny.yaml").read_bytes(), CONFIG_WORDS, draws)


@pytest.mark.slow
def test_weight_files_are_tensors_or_one_line(tmp_path, draws):
    path = tmp_path / "x.safetensors"
    write_weights({"a": torch.ones(3), "b.weight": torch.zeros(2, 2, dtype=torch.float16)}, path, {"title": "x"})

    def act(data: bytes) -> None:
        path.write_bytes(data)
        for read in (read_weights, outline, read_metadata):
            read(path)

    fuzz(act, path.read_bytes(), HEADER_WORDS, draws)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["manifest.json", "state.json", "state.safetensors"])
def test_checkpoints_are_states_or_one_line(name, tmp_path, draws):
    """A changed manifest is always noticed; the others are also read as by somebody who has not asked it."""
    state = {"step": 3, "parts": {"a": torch.ones(3), "b": [1.5, None, torch.zeros(2)]}}
    checkpoint.write_folder(tmp_path / "step-1", lambda path: checkpoint.save_state(path, state))
    path = tmp_path / "step-1" / name
    whole = path.read_bytes()

    def act(data: bytes) -> None:
        path.write_bytes(data)
        wrong = checkpoint.problem(tmp_path / "step-1")
        assert data == whole or (wrong and "\n" not in wrong), wrong
        checkpoint.load_state(tmp_path / "step-1")

    fuzz(act, whole, HEADER_WORDS if name == "state.safetensors" else MANIFEST_WORDS, draws)
