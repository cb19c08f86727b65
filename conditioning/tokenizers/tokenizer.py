"""Text to token ids of one fixed length, by the `tokenizers` library alone: importing transformers costs seconds."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from conditioning.tokenizers.clip_bpe import clip_backend, read_vocabulary

if TYPE_CHECKING:
    import tokenizers

CHARACTERS_PER_TOKEN = 32  # only the first max_length * this many characters of a prompt are looked at
VOCABULARIES = ("vocab.json", "vocab.txt", "*.model")  # without a tokenizer.json, one of these is needed
CLIP_CLASSES = ("CLIPTokenizer", "CLIPTokenizerFast")
DEFAULT_MAX_LENGTH = 77  # where neither the user nor a shorter model decides: CLIP's and LDM's length


@dataclass(frozen=True, kw_only=True)
class Tokens:
    """Token ids of B prompts, padded to one length."""

    ids: Tensor  # [B, L] int64
    mask: Tensor  # [B, L] bool, False on padding


class Tokenizer:
    """A `tokenizers` pipeline with a fixed length, saved as the files that transformers' AutoTokenizer opens.

    Text is made fit for it first: lone surrogates become U+FFFD, NUL a space, white space around it goes, and only
    the first 32 * max_length characters are looked at (no more fit into the tokens, and a megabyte costs seconds).
    """

    def __init__(self, backend: tokenizers.Tokenizer, options: dict[str, Any], max_length: int) -> None:
        least = backend.num_special_tokens_to_add(False) + 1
        if max_length < least:
            raise ValueError(f"max_length {max_length} leaves no room for text; this tokenizer needs at least {least}")
        self.backend, self.options, self.max_length = backend, options, max_length
        self.rows_of: dict[str, str] = {}  # words that were added -> all tokens that each stands for
        pad = _content(options.get("pad_token") or options.get("eos_token"))
        pad_id = None if pad is None else backend.token_to_id(pad)
        if pad_id is None:
            raise ValueError(f"pad_token {pad!r} is not in the vocabulary; name one that is in tokenizer_config.json")
        backend.enable_truncation(max_length)
        backend.enable_padding(length=max_length, pad_id=pad_id, pad_token=pad)

    def __call__(self, prompts: Sequence[str]) -> Tokens:
        """Ids and mask [B, max_length] of B prompts; what does not fit is cut off."""
        encodings = self.backend.encode_batch([self._fit(prompt)[0] for prompt in prompts])
        shape = (len(prompts), self.max_length)
        ids = torch.tensor([e.ids for e in encodings], dtype=torch.long).reshape(shape)
        mask = torch.tensor([e.attention_mask for e in encodings], dtype=torch.bool).reshape(shape)
        return Tokens(ids=ids, mask=mask)

    def cut(self, prompt: str) -> str:
        """The end of the prompt, from the first word that does not fit into max_length tokens; "" where all fits."""
        head, tail = self._fit(prompt)
        encoding = self.backend.encode(head)
        if not encoding.overflowing:
            return tail.strip()
        lost = encoding.overflowing[0]
        first = lost.special_tokens_mask.index(0)
        starts = [lost.offsets[first][0]]
        if lost.word_ids[first] is not None:
            kept = zip(encoding.word_ids, encoding.offsets, strict=True)
            starts += [offset[0] for word, offset in kept if word == lost.word_ids[first]]
        return (head[min(starts) :] + tail).strip()

    def ids(self, text: str) -> list[int]:
        """The ids of a text alone, without those that mark its beginning and end."""
        encoding = self.backend.encode(self._fit(text)[0])
        return [id for id, special in zip(encoding.ids, encoding.special_tokens_mask, strict=True) if not special]

    def add(self, word: str, count: int = 1) -> int:
        """Add a word that stands for `count` tokens, WORD WORD_1 WORD_2 as diffusers has it; the first one's id.

        Raises:
            ValueError: it is known, or more than a word.
        """
        from tokenizers import AddedToken

        names = [word, *(f"{word}_{i}" for i in range(1, count))]
        if not word or word.split() != [word]:
            raise ValueError(f"token {word!r} must be one word, such as <toy>")
        if known := [name for name in names if self.backend.token_to_id(name) is not None]:
            raise ValueError(f"token {known[0]!r} is in the vocabulary; choose another, such as <{word.strip('<>')}-1>")
        self.backend.add_tokens([AddedToken(name, normalized=False) for name in names])
        self.rows_of[word] = " ".join(names)
        return self.backend.token_to_id(word)

    def save(self, folder: Path) -> None:
        """Writes tokenizer.json, tokenizer_config.json and the vocabulary files of slow tokenizers."""
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "tokenizer.json").write_text(self._json(), encoding="utf-8")
        special = {name: _content(value) for name, value in self.options.items() if name.endswith("_token") and value}
        options = {**self.options, **special, "model_max_length": self.max_length}
        for name, content in (("tokenizer_config.json", options), ("special_tokens_map.json", special)):
            (folder / name).write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
        self.backend.model.save(str(folder))

    def state_dict(self) -> dict[str, str]:
        """The pipeline as text: with trained weights goes what their ids meant."""
        return {"json": self._json()}

    def load_state_dict(self, state: dict[str, str]) -> None:
        """Take back a `state_dict`."""
        from tokenizers import Tokenizer as Backend

        self.backend = Tokenizer(Backend.from_str(state["json"]), self.options, self.max_length).backend

    def fingerprint(self) -> bytes:
        """Bytes that differ when ids could."""
        return f"{self.max_length} {self.options.get('open_clip_clean')} {self._json()}".encode()

    def _json(self) -> str:
        """tokenizer.json without our length, which is model_max_length's to say."""
        from tokenizers import Tokenizer as Backend

        plain = Backend.from_str(self.backend.to_str())
        plain.no_truncation()
        plain.no_padding()
        return plain.to_str(pretty=True)

    def _fit(self, prompt: str) -> tuple[str, str]:
        """The prompt as text that every tokenizer takes, split into what is looked at and the rest."""
        if not isinstance(prompt, str):
            raise ValueError(f"a prompt must be text, not {type(prompt).__name__}: {prompt!r:.80}")
        text = prompt.encode("utf-16", "surrogatepass").decode("utf-16", "replace").replace("\0", " ").strip()
        for word, tokens in self.rows_of.items():
            text = text.replace(word, tokens)
        limit = CHARACTERS_PER_TOKEN * self.max_length
        head, tail = text[:limit], text[limit:]
        if clean := self.options.get("open_clip_clean"):
            from open_clip.tokenizer import get_clean_fn

            head = get_clean_fn(clean)(head)
        return head, tail


def read_tokenizer(folder: Path, max_length: int | None = None, longest: int | None = None) -> Tokenizer:
    """Reads a tokenizer folder in transformers' format.

    Args:
        folder: holds tokenizer.json, or files from which transformers can make one.
        max_length: tokens per prompt; None takes the tokenizer's own, at most 77.
        longest: what the encoder has positions for.

    Raises:
        FileNotFoundError, ValueError: where nothing usable is there, or max_length is more than longest.
    """
    from tokenizers import Tokenizer as Backend

    if not (folder / "tokenizer.json").is_file():
        return _read_slow(folder, max_length, longest)
    try:
        options, backend = _options(folder), Backend.from_file(str(folder / "tokenizer.json"))
    except Exception as error:  # the library raises bare Exception for a malformed tokenizer.json
        raise ValueError(f"{folder} does not hold a readable tokenizer: {_line(error)}") from None
    return _of_length(backend, options, max_length, longest)


def _options(folder: Path) -> dict[str, Any]:
    """What the JSON files beside a vocabulary say."""
    options: dict[str, Any] = {}
    for name in ("special_tokens_map.json", "tokenizer_config.json"):
        if (folder / name).is_file():
            options |= {k: v for k, v in json.loads((folder / name).read_text("utf-8")).items() if v is not None}
    options.pop("name_or_path", None)  # a path of the machine that saved it
    return options


def _of_length(
    backend: tokenizers.Tokenizer, options: dict[str, Any], max_length: int | None, longest: int | None
) -> Tokenizer:
    """The tokenizer of the length that the user, the folder or the encoder asks for."""
    own = int(min(options.get("model_max_length") or 10**9, longest or 10**9))
    length = max_length or min(own, DEFAULT_MAX_LENGTH)
    if longest is not None and length > longest:
        raise ValueError(f"max_length {length} exceeds the text encoder's {longest} positions; use at most {longest}")
    return Tokenizer(backend, options, length)


def _read_slow(folder: Path, max_length: int | None, longest: int | None) -> Tokenizer:
    """Lets transformers turn vocab.json + merges.txt, vocab.txt or spiece.model into a tokenizer.json; reads that."""
    import tempfile

    if not any(any(folder.glob(pattern)) for pattern in VOCABULARIES):  # AutoTokenizer would make an empty one
        raise FileNotFoundError(f"{folder} holds no tokenizer; it needs tokenizer.json, or {', '.join(VOCABULARIES)}")
    if (folder / "merges.txt").is_file() and _options(folder).get("tokenizer_class") in CLIP_CLASSES:
        return _read_clip(folder, max_length, longest)
    from transformers import AutoTokenizer

    try:
        slow = AutoTokenizer.from_pretrained(str(folder), local_files_only=True)
    except Exception as error:  # whatever the tokenizer's class raises when its files are missing
        raise ValueError(f"{folder} does not hold a readable tokenizer: {_line(error)}") from None
    with tempfile.TemporaryDirectory() as temporary:
        slow.save_pretrained(temporary)
        if not (Path(temporary) / "tokenizer.json").is_file():
            raise ValueError(f"{type(slow).__name__} in {folder} has no fast form; convert it to a tokenizer.json")
        return read_tokenizer(Path(temporary), max_length, longest)


def _read_clip(folder: Path, max_length: int | None, longest: int | None) -> Tokenizer:
    """CLIP's vocab.json + merges.txt, as in the folders of Stable Diffusion, without transformers' three seconds."""
    try:
        options = _options(folder)
        names = (f"{name}_token" for name in ("unk", "bos", "eos", "pad"))
        special = [options[name] for name in names if options.get(name)]
        backend = clip_backend(*read_vocabulary(folder), special)
    except Exception as error:  # malformed JSON, merges without their pieces
        raise ValueError(f"{folder} does not hold a readable tokenizer: {_line(error)}") from None
    return _of_length(backend, options, max_length, longest)


def _content(token: str | dict[str, Any] | None) -> str | None:
    """The text of a special token, which tokenizer_config.json writes as a string or as a dict."""
    return token["content"] if isinstance(token, dict) else token


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:200]
