"""Tokenizers of CLIP and BERT, which single-file checkpoints do not contain."""

from __future__ import annotations

from pathlib import Path

from conditioning.tokenizers.clip_bpe import END, START, clip_backend, openai_vocabulary
from conditioning.tokenizers.tokenizer import Tokenizer, read_tokenizer
from stipple_core.files.hub_download import download

BERT_BASE = "google-bert/bert-base-uncased"  # LDM's tokenizer on the Hugging Face hub
TOKENIZER_FILES = ["tokenizer*.json", "special_tokens_map.json", "vocab.txt"]


def clip_tokenizer(max_length: int = 77, pad: str = END) -> Tokenizer:
    """Return CLIP's tokenizer, made offline from the vocabulary that open_clip contains.

    Args:
        pad: Padding token: the end token in Stable Diffusion 1, "!" (id 0) in Stable Diffusion 2. A "!" in a prompt has
            id 256, as in training; transformers converts it to padding.
    """
    vocabulary, merges = openai_vocabulary()
    names = {"bos_token": START, "eos_token": END, "unk_token": END, "pad_token": pad}
    options = {"tokenizer_class": "CLIPTokenizer", "do_lower_case": True, **names}
    return Tokenizer(clip_backend(vocabulary, merges, (START, END)), options, max_length)


def bert_tokenizer(source: str | Path | None = None, max_length: int = 77) -> Tokenizer:
    """Return the WordPiece tokenizer of LDM's text transformer: [CLS] text [SEP], padded.

    Args:
        source: Folder with tokenizer.json or vocab.txt; None downloads bert-base-uncased from the Hugging Face hub.

    Raises:
        FileNotFoundError, ValueError: In one line, if the tokenizer is missing or unreadable.
    """
    if source is None:
        fix = f"`hf download {BERT_BASE} vocab.txt --local-dir FOLDER`, then use FOLDER as the tokenizer"
        folder = download(BERT_BASE, TOKENIZER_FILES, "tokenizer", fix)
    else:
        folder = Path(source).expanduser()
    if (folder / "tokenizer.json").is_file() or not (folder / "vocab.txt").is_file():
        return read_tokenizer(folder, max_length)
    return _word_pieces(folder / "vocab.txt", max_length)


def _word_pieces(path: Path, max_length: int) -> Tokenizer:
    """Return BERT's uncased tokenizer for a vocabulary file with one piece per line."""
    from tokenizers import Tokenizer as Backend
    from tokenizers import decoders, models, normalizers, pre_tokenizers, processors

    vocabulary = {piece: index for index, piece in enumerate(path.read_text("utf-8").splitlines())}
    special = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
    if missing := [token for token in special if token not in vocabulary]:
        raise ValueError(f"{path} is not BERT's vocabulary: it has no {', '.join(missing)}")
    backend = Backend(models.WordPiece(vocabulary, unk_token="[UNK]"))
    backend.normalizer = normalizers.BertNormalizer(lowercase=True)
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    ends = [(token, vocabulary[token]) for token in ("[CLS]", "[SEP]")]
    backend.post_processor = processors.TemplateProcessing(single="[CLS] $A [SEP]", special_tokens=ends)
    backend.decoder = decoders.WordPiece()
    backend.add_special_tokens(list(special))
    names = dict(zip(("pad_token", "unk_token", "cls_token", "sep_token", "mask_token"), special, strict=True))
    return Tokenizer(backend, {"tokenizer_class": "BertTokenizer", "do_lower_case": True, **names}, max_length)
