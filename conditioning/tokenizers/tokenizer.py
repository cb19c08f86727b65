"""Conversion of text to token ids of one fixed length, with `tokenizers`: the import of transformers takes seconds."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from conditioning.interface.tokens import Tokens
from conditioning.tokenizers.clip_bpe import clip_backend, read_vocabulary
from stipple_core.files.json_file import read_json

if TYPE_CHECKING:
    import tokenizers

CHARACTERS_PER_TOKEN = 32  # characters of a prompt after max_length * 32 are ignored
VOCABULARIES = ("vocab.json", "vocab.txt", "*.model")  # one of them is required if there is no tokenizer.json
CLIP_CLASSES = ("CLIPTokenizer", "CLIPTokenizerFast")
DEFAULT_MAX_LENGTH = 77  # length of CLIP and LDM; the default unless the model is shorter


class Tokenizer:
    """A pipeline of the `tokenizers` library with a fixed length; AutoTokenizer of transformers opens its files.

    Text is cleaned first: lone surrogates become U+FFFD, NUL becomes a space, and white space at both ends is removed.
    Only the first 32 * max_length characters are read, because more do not fit and long texts take seconds.

    Attributes:
        tokens_of: Words added by `add`, and the tokens that each of them stands for.
    """

    has_positions = False

    def __init__(self, backend: tokenizers.Tokenizer, options: dict[str, Any], max_length: int) -> None:
        least = backend.num_special_tokens_to_add(False) + 1
        if max_length < least:
            raise ValueError(f"max_length {max_length} is too small for text; this tokenizer requires at least {least}")
        self.backend, self.options, self.max_length = backend, options, max_length
        self.tokens_of: dict[str, str] = {}
        pad = _content(options.get("pad_token") or options.get("eos_token"))
        pad_id = None if pad is None else backend.token_to_id(pad)
        if pad_id is None:
            raise ValueError(f"pad_token {pad!r} is not in the vocabulary; correct it in tokenizer_config.json")
        backend.enable_truncation(max_length)
        backend.enable_padding(length=max_length, pad_id=pad_id, pad_token=pad)

    def __call__(self, prompts: Sequence[str]) -> Tokens:
        """Return ids and mask [B, max_length] of B prompts; prompts that are too long are truncated."""
        encodings = self.backend.encode_batch([self._clean(prompt)[0] for prompt in prompts])
        shape = (len(prompts), self.max_length)
        ids = torch.tensor([e.ids for e in encodings], dtype=torch.long).reshape(shape)
        mask = torch.tensor([e.attention_mask for e in encodings], dtype=torch.bool).reshape(shape)
        return Tokens(ids=ids, mask=mask)

    def cut(self, prompt: str) -> str:
        """Return the end of the prompt, from the first word that exceeds max_length tokens; "" if the prompt fits."""
        head, tail = self._clean(prompt)
        encoding = self.backend.encode(head)
        if not encoding.overflowing:
            return tail.strip()
        overflow = encoding.overflowing[0]
        first = overflow.special_tokens_mask.index(0)
        starts = [overflow.offsets[first][0]]
        if overflow.word_ids[first] is not None:  # a word may be divided by the limit
            fitting = zip(encoding.word_ids, encoding.offsets, strict=True)
            starts += [offset[0] for word, offset in fitting if word == overflow.word_ids[first]]
        return (head[min(starts) :] + tail).strip()

    def ids(self, text: str) -> list[int]:
        """Return the ids of a text without start, end and padding tokens."""
        encoding = self.backend.encode(self._clean(text)[0])
        return [id for id, special in zip(encoding.ids, encoding.special_tokens_mask, strict=True) if not special]

    def add(self, word: str, count: int = 1) -> int:
        """Add a word that stands for `count` tokens, named WORD WORD_1 WORD_2 as in diffusers; return the first id.

        Raises:
            ValueError: The word is already in the vocabulary, or is not a single word.
        """
        from tokenizers import AddedToken

        names = [word, *(f"{word}_{i}" for i in range(1, count))]
        if not word or word.split() != [word]:
            raise ValueError(f"token {word!r} must be one word, such as <toy>")
        if taken := [name for name in names if self.backend.token_to_id(name) is not None]:
            raise ValueError(f"token {taken[0]!r} is in the vocabulary; use another, such as <{word.strip('<>')}-1>")
        self.backend.add_tokens([AddedToken(name, normalized=False) for name in names])
        self.tokens_of[word] = " ".join(names)
        return self.backend.token_to_id(word)

    def save(self, folder: Path) -> None:
        """Write tokenizer.json, tokenizer_config.json, special_tokens_map.json and the vocabulary files."""
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "tokenizer.json").write_text(self._json(), encoding="utf-8")
        special = {name: _content(value) for name, value in self.options.items() if name.endswith("_token") and value}
        options = {**self.options, **special, "model_max_length": self.max_length}
        for name, content in (("tokenizer_config.json", options), ("special_tokens_map.json", special)):
            (folder / name).write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
        self.backend.model.save(str(folder))

    def state_dict(self) -> dict[str, str]:
        """Return the pipeline as JSON, which a training run stores with the weights."""
        return {"json": self._json()}

    def load_state_dict(self, state: dict[str, str]) -> None:
        """Restore a `state_dict`."""
        from tokenizers import Tokenizer as Backend

        self.backend = Tokenizer(Backend.from_str(state["json"]), self.options, self.max_length).backend

    def fingerprint(self) -> bytes:
        """Return bytes that differ between tokenizers that may produce different ids."""
        return f"{self.max_length} {self.options.get('open_clip_clean')} {self._json()}".encode()

    def _json(self) -> str:
        """Return tokenizer.json without truncation and padding: model_max_length stores the length."""
        from tokenizers import Tokenizer as Backend

        plain = Backend.from_str(self.backend.to_str())
        plain.no_truncation()
        plain.no_padding()
        return plain.to_str(pretty=True)

    def _clean(self, prompt: str) -> tuple[str, str]:
        """Return the cleaned prompt, split into the part that is read and the rest."""
        if not isinstance(prompt, str):
            raise ValueError(f"a prompt must be text, not {type(prompt).__name__}: {prompt!r:.80}")
        text = prompt.encode("utf-16", "surrogatepass").decode("utf-16", "replace").replace("\0", " ").strip()
        for word, tokens in self.tokens_of.items():
            text = text.replace(word, tokens)
        limit = CHARACTERS_PER_TOKEN * self.max_length
        head, tail = text[:limit], text[limit:]
        if clean := self.options.get("open_clip_clean"):
            from open_clip.tokenizer import get_clean_fn

            head = get_clean_fn(clean)(head)
        return head, tail


def read_tokenizer(folder: Path, max_length: int | None = None, longest: int | None = None) -> Tokenizer:
    """Load a tokenizer from a folder in transformers' format.

    Args:
        folder: Contains tokenizer.json, or files that transformers can convert to it.
        max_length: Tokens per prompt; None is the length of the tokenizer, at most 77.
        longest: Number of positions of the encoder.

    Raises:
        FileNotFoundError, ValueError: The folder has no readable tokenizer, or max_length exceeds `longest`.
    """
    from tokenizers import Tokenizer as Backend

    if not (folder / "tokenizer.json").is_file():
        return _read_slow(folder, max_length, longest)
    try:
        options, backend = _options(folder), Backend.from_file(str(folder / "tokenizer.json"))
    except Exception as error:  # the library raises Exception for a malformed tokenizer.json
        raise ValueError(f"{folder} has no readable tokenizer: {_line(error)}") from None
    return _of_length(backend, options, max_length, longest)


def _options(folder: Path) -> dict[str, Any]:
    """Return the options in the JSON files beside a vocabulary."""
    options: dict[str, Any] = {}
    for name in ("special_tokens_map.json", "tokenizer_config.json"):
        if (folder / name).is_file():
            options |= {k: v for k, v in read_json(folder / name).items() if v is not None}
    options.pop("name_or_path", None)  # a path on the machine that saved the tokenizer
    return options


def _of_length(
    backend: tokenizers.Tokenizer, options: dict[str, Any], max_length: int | None, longest: int | None
) -> Tokenizer:
    """Return the tokenizer with the length that the user, the folder or the encoder requires."""
    limit = int(min(options.get("model_max_length") or 10**9, longest or 10**9))
    length = max_length or min(limit, DEFAULT_MAX_LENGTH)
    if longest is not None and length > longest:
        raise ValueError(f"max_length {length} exceeds the text encoder's {longest} positions; use at most {longest}")
    return Tokenizer(backend, options, length)


def _read_slow(folder: Path, max_length: int | None, longest: int | None) -> Tokenizer:
    """Load vocab.json + merges.txt, vocab.txt or spiece.model, which transformers converts to a tokenizer.json."""
    import tempfile

    if not any(any(folder.glob(pattern)) for pattern in VOCABULARIES):  # AutoTokenizer would return an empty one
        raise FileNotFoundError(f"{folder} has no tokenizer; it needs tokenizer.json, or {', '.join(VOCABULARIES)}")
    if (folder / "merges.txt").is_file() and _options(folder).get("tokenizer_class") in CLIP_CLASSES:
        return _read_clip(folder, max_length, longest)
    from transformers import AutoTokenizer

    try:
        slow = AutoTokenizer.from_pretrained(str(folder), local_files_only=True)
    except Exception as error:  # the tokenizer's class may raise anything for missing files
        raise ValueError(f"{folder} has no readable tokenizer: {_line(error)}") from None
    with tempfile.TemporaryDirectory() as temporary:
        slow.save_pretrained(temporary)
        if not (Path(temporary) / "tokenizer.json").is_file():
            raise ValueError(f"{type(slow).__name__} in {folder} has no fast version; convert it to a tokenizer.json")
        return read_tokenizer(Path(temporary), max_length, longest)


def _read_clip(folder: Path, max_length: int | None, longest: int | None) -> Tokenizer:
    """Load CLIP's vocab.json + merges.txt, as in Stable Diffusion's folders, without transformers, which takes 3 s."""
    try:
        options = _options(folder)
        names = (f"{name}_token" for name in ("unk", "bos", "eos", "pad"))
        special = [options[name] for name in names if options.get(name)]
        backend = clip_backend(*read_vocabulary(folder), special)
    except Exception as error:  # malformed JSON, merges of unknown pieces
        raise ValueError(f"{folder} has no readable tokenizer: {_line(error)}") from None
    return _of_length(backend, options, max_length, longest)


def _content(token: str | dict[str, Any] | None) -> str | None:
    """Return the text of a special token, which tokenizer_config.json stores as a string or a dict."""
    return token["content"] if isinstance(token, dict) else token


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:200]
