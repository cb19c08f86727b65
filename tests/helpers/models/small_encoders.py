"""Small random text encoders of each kind, saved in the formats of their libraries."""

import json
from pathlib import Path

import torch

from conditioning import ConditionerConfig, TextConditioner, TransformerConfig, build_conditioner

COLORS, SHAPES = ("red", "green", "blue", "dark blue"), ("heart", "circle", "smiling face", "Café", "naïve cat")
CAPTIONS = [f"a {size} {c} {s}, {s} again" for size in ("large", "small") for c in COLORS for s in SHAPES]
SCRATCH = TransformerConfig(vocab_size=600, width=32, layers=2, heads=2, max_length=16)


def save_bert(folder: Path, **changes) -> Path:
    """Save a small random BERT with a WordPiece vocabulary in the format of transformers."""
    from transformers import BertConfig, BertModel, BertTokenizer

    words = sorted({word.lower() for caption in CAPTIONS for word in caption.replace(",", " ,").split()})
    pieces = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *words, *"abcdefghij", "##s", "##a"]
    BertTokenizer({piece: i for i, piece in enumerate(pieces)}, model_max_length=24).save_pretrained(folder)
    settings = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=3, num_attention_heads=4)
    torch.manual_seed(0)
    model = BertModel(BertConfig(vocab_size=len(pieces), max_position_embeddings=24, **{**settings, **changes}))
    model.save_pretrained(folder)
    return folder


def save_t5(folder: Path) -> Path:
    """Save a small T5, encoder and decoder, with a Unigram tokenizer."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast, T5Config, T5ForConditionalGeneration

    backend = Tokenizer(models.Unigram())
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    special = ["<pad>", "</s>", "<unk>"]
    trainer = trainers.UnigramTrainer(vocab_size=80, special_tokens=special, unk_token="<unk>", show_progress=False)
    backend.train_from_iterator(CAPTIONS, trainer)
    backend.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    names = dict(pad_token="<pad>", eos_token="</s>", unk_token="<unk>")
    PreTrainedTokenizerFast(tokenizer_object=backend, **names).save_pretrained(folder)
    torch.manual_seed(0)
    T5ForConditionalGeneration(
        T5Config(vocab_size=80, d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4, decoder_start_token_id=0)
    ).save_pretrained(folder)
    return folder


def save_open_clip(folder: Path) -> Path:
    """Save a small random open_clip model with open_clip's tokenizer."""
    import open_clip

    text = {"context_length": 20, "vocab_size": 49408, "width": 32, "heads": 4, "layers": 3}
    vision = {"image_size": 32, "layers": 1, "width": 32, "head_width": 16, "patch_size": 16}
    config = {"model_cfg": {"embed_dim": 16, "vision_cfg": vision, "text_cfg": text}}
    (folder / "open_clip_config.json").write_text(json.dumps(config))
    torch.manual_seed(0)
    model = open_clip.CLIP(embed_dim=16, vision_cfg=vision, text_cfg=text)
    torch.save(model.state_dict(), folder / "open_clip_pytorch_model.bin")
    return folder


def build_scratch() -> TextConditioner:
    """A transformer trained from scratch, with a tokenizer learned from CAPTIONS."""
    return build_conditioner(ConditionerConfig(kind="scratch", scratch=SCRATCH), CAPTIONS, seed=3)


def ldm_bert_shapes(layers: int, width: int, vocab_size: int, length: int) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the weights of CompVis' TransformerWrapper, the cond_stage_model."""
    inner, hidden = 8 * 64, 4 * width
    shapes = {"token_emb.weight": (vocab_size, width), "pos_emb.emb.weight": (length, width)}
    for layer in range(2 * layers):
        block = f"attn_layers.layers.{layer}"
        shapes |= {f"{block}.0.weight": (width,), f"{block}.0.bias": (width,)}
        if layer % 2 == 0:
            shapes |= {f"{block}.1.to_{part}.weight": (inner, width) for part in "qkv"}
            shapes |= {f"{block}.1.to_out.weight": (width, inner), f"{block}.1.to_out.bias": (width,)}
        else:
            shapes |= {f"{block}.1.net.0.0.weight": (hidden, width), f"{block}.1.net.0.0.bias": (hidden,)}
            shapes |= {f"{block}.1.net.2.weight": (width, hidden), f"{block}.1.net.2.bias": (width,)}
    shapes |= {"norm.weight": (width,), "norm.bias": (width,)}
    shapes |= {"to_logits.weight": (vocab_size, width), "to_logits.bias": (vocab_size,)}
    return {f"transformer.{name}": shape for name, shape in shapes.items()}
