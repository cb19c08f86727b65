"""The tokenizers that single-file checkpoints leave out, because their programs know them by name."""

from __future__ import annotations

from pathlib import Path

from conditioning.encoders.pretrained import download
from conditioning.tokenizers.clip_bpe import END, START, clip_backend, openai_vocabulary
from conditioning.tokenizers.tokenizer import Tokenizer, read_tokenizer

BERT_BASE = "google-bert/bert-base-uncased"  # LDM's tokenizer on the Hugging Face hub
TOKENIZER_FILES = ["tokenizer*.json", "special_tokens_map.json", "vocab.txt"]


def clip_tokenizer(max_length: int = 77, pad: str = END) -> Tokenizer:
    """CLIP's tokenizer, made offline from the vocabulary that open_clip ships.

    Args:
        pad: what follows the end of the text: the end again in Stable Diffusion 1, "!" (id 0) in 2. A "!" in a prompt
            stays the word that it was in training (id 256), while transformers takes it for padding.
    """
    vocabulary, merges = openai_vocabulary()
    names = {"bos_token": START, "eos_token": END, "unk_token": END, "pad_token": pad}
    options = {"tokenizer_class": "CLIPTokenizer", "do_lower_case": True, **names}
    return Tokenizer(clip_backend(vocabulary, merges, (START, END)), options, max_length)


def bert_tokenizer(source: str | Path | None = None, max_length: int = 77) -> Tokenizer:
    """The WordPiece tokenizer of LDM's text transformer: [CLS] text [SEP], padded.

    Args:
        source: a folder with tokenizer.json or vocab.txt; None fetches bert-base-uncased from the Hugging Face hub.

    Raises:
        FileNotFoundError, ValueError: in one line with the mend.
    """
    if source is None:
        mend = f"`hf download {BERT_BASE} vocab.txt --local-dir FOLDER`, then give FOLDER as the tokenizer"
        folder = download(BERT_BASE, TOKENIZER_FILES, "tokenizer", mend)
    else:
        folder = Path(source).expanduser()
    if (folder / "tokenizer.json").is_file() or not (folder / "vocab.txt").is_file():
        return read_tokenizer(folder, max_length)
    return _word_pieces(folder / "vocab.txt", max_length)


def _word_pieces(path: Path, max_length: int) -> Tokenizer:
    """BERT's uncased tokenizer of a list of pieces, one a line."""
    from tokenizers import Tokenizer as Backend
    from tokenizers import decoders, models, normalizers, pre_tokenizers, processors

    vocabulary = {piece: index for index, piece in enumerate(path.read_text("utf-8").splitlines())}
    special = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
    if lacking := [token for token in special if token not in vocabulary]:
        raise ValueError(f"{path} is not BERT's vocabulary: it has no {', '.join(lacking)}")
    backend = Backend(models.WordPiece(vocabulary, unk_token="[UNK]"))
    backend.normalizer = normalizers.BertNormalizer(lowercase=True)
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    ends = [(token, vocabulary[token]) for token in ("[CLS]", "[SEP]")]
    backend.post_processor = processors.TemplateProcessing(single="[CLS] $A [SEP]", special_tokens=ends)
    backend.decoder = decoders.WordPiece()
    backend.add_special_tokens(list(special))
    names = dict(zip(("pad_token", "unk_token", "cls_token", "sep_token", "mask_token"), special, strict=True))
    return Tokenizer(backend, {"tokenizer_class": "BertTokenizer", "do_lower_case": True, **names}, max_length)
