"""CLIP's tokenizer (Radford et al. 2021) with the `tokenizers` library: byte-level BPE of lower-case text."""

from __future__ import annotations

import functools
import gzip
from collections.abc import Iterable
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stipple_core.files.json_file import read_json

if TYPE_CHECKING:
    from tokenizers import Tokenizer as Backend

START, END = "<|startoftext|>", "<|endoftext|>"
WORDS = r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"
VOCAB_SIZE = 49408
MERGES = "bpe_simple_vocab_16e6.txt.gz"  # OpenAI's merges, which open_clip contains


def clip_backend(vocabulary: dict[str, int], merges: list[tuple[str, str]], special: Iterable[Any]) -> Backend:
    """Return CLIP's pipeline for a vocabulary that contains the start and end tokens.

    Args:
        special: Special tokens, as text or as the dicts of transformers.
    """
    from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, processors
    from tokenizers import Tokenizer as Backend

    backend = Backend(models.BPE(vocabulary, merges, end_of_word_suffix="</w>", unk_token=END))
    steps = [normalizers.NFC(), normalizers.Replace(Regex(r"\s+"), " "), normalizers.Lowercase()]
    backend.normalizer = normalizers.Sequence(steps)
    words = pre_tokenizers.Split(Regex(WORDS), behavior="removed", invert=True)
    backend.pre_tokenizer = pre_tokenizers.Sequence([words, pre_tokenizers.ByteLevel(add_prefix_space=False)])
    ends = (END, vocabulary[END]), (START, vocabulary[START])
    backend.post_processor = processors.RobertaProcessing(*ends, trim_offsets=False, add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    for token in special:
        flags = token if isinstance(token, dict) else {"content": token}
        backend.add_special_tokens([AddedToken(flags["content"], normalized=flags.get("normalized", False))])
    return backend


@functools.cache
def openai_vocabulary() -> tuple[dict[str, int], list[tuple[str, str]]]:
    """Return the 49,408 tokens of OpenAI's CLIP and Stable Diffusion, and their merges, which open_clip contains."""
    package = Path(find_spec("open_clip").origin).parent  # its import takes seconds
    lines = gzip.decompress((package / MERGES).read_bytes()).decode().split("\n")
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    letters = [chr(byte) for byte in printable]
    letters += [chr(256 + i) for i in range(256 - len(letters))]  # represent the bytes that are not printable
    count = VOCAB_SIZE - 2 * 256 - 2
    merges = [tuple(line.split()) for line in lines[1 : 1 + count]]
    pieces = [*letters, *(f"{letter}</w>" for letter in letters), *("".join(pair) for pair in merges), START, END]
    return {piece: index for index, piece in enumerate(pieces)}, merges


def read_vocabulary(folder: Path) -> tuple[dict[str, int], list[tuple[str, str]]]:
    """Read vocab.json and merges.txt, which older folders have instead of tokenizer.json."""
    lines = (folder / "merges.txt").read_text("utf-8").split("\n")
    merges = [tuple(line.split()) for line in lines if line and not line.startswith("#version")]
    return read_json(folder / "vocab.json"), merges
