"""Proofs of fine-tuning the shipped model: a style by LoRA, an object by textual inversion and by DreamBooth.

STIPPLE_EMOJI is the folder of the emoji set. If STIPPLE_RUNS is set, runs are kept in it and resumed.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch

from conditioning.text.new_tokens import new_token, read_embedding
from ldm import TextToImage
from ldm.formats.lora import merge, read_lora
from tests.helpers.proofs.finetune_proof import (
    LEARNED,
    NEW,
    SHOWN,
    THING,
    Real,
    choose_names,
    classify,
    draw,
    nearer,
    read_real,
    recall,
    reconstructed,
    train_classifier,
)
from tests.helpers.training.tiny_runs import ROOT, run_here

BASE = str(ROOT / "checkpoints" / "emoji")
DATA = os.environ.get("STIPPLE_EMOJI", "data/emoji")
COMMON = [f"init_from={BASE}", f"data.folder={DATA}", "data.validation=0", "validation.every=0", "samples.every=0"]

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not Path(DATA).is_dir(), reason="STIPPLE_EMOJI names no folder"),
    pytest.mark.usefixtures("settings_of_runs"),
]


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Path:
    return Path(os.environ.get("STIPPLE_RUNS") or tmp_path_factory.mktemp("runs"))


@pytest.fixture(scope="module")
def real() -> Real:
    return read_real(DATA)


def five(*settings: str, run: Path) -> None:
    """A run on five images of one object that the model was not trained on."""
    where = json.dumps({"style": SHOWN, "name": [THING], "skin_tone": [None]})
    few = ["diffusion.caption_dropout=0", "ema.decay=0", "optimizer.warmup_steps=5", "trainer.log_every=20"]
    run_here("train_ldm.py", *COMMON, f"data.where={where}", f"run={run}", *few, *settings)


def test_a_lora_of_30_images_changes_the_style_and_keeps_the_concept(runs, real):
    learned, asked = choose_names(real)
    where = json.dumps({"style": [NEW], "name": learned, "skin_tone": [None]})
    targets = (
        "lora.targets=[to_q,to_k,to_v,to_out.0,ff.net.0.proj,ff.net.2,conv1,conv2]"  # convolutions matter for styles
    )
    settings = [f"data.where={where}", "data.captions=['{name}, mono style']", f"run={runs}/lora", "ema.decay=0.99"]
    settings += ["lora.rank=16", "lora.alpha=16", targets, "optimizer.learning_rate=1e-3", "optimizer.warmup_steps=20"]
    settings += ["optimizer.schedule=cosine", "trainer.steps=900", "trainer.batch_size=16", "trainer.save_every=100"]
    run_here("train_ldm.py", *COMMON, *settings, "data.flip=true")
    classifier, styles, accuracy = train_classifier(reconstructed(TextToImage.load(BASE).autoencoder, real))
    shares, concept = {}, {}
    for weight in (0.0, 1.0):
        model = TextToImage.load(BASE)
        merge(read_lora(runs / "lora" / "lora"), weight, model.unet, model.conditioner.encoder)
        images = draw(model, [f"{name}, mono style" for name in asked[:80]], guidance_scale=2.0)
        shares[weight] = (classify(classifier, images) == styles.index(NEW)).float().mean().item()
        concept[weight] = recall(images, real.find(asked, NEW))
    print({"accuracy": accuracy, "share": shares, "concept": concept})
    assert accuracy >= 0.6 and shares[0.0] <= 0.1 and shares[1.0] >= 0.5
    assert concept[1.0]["nearer_than_another"] >= 0.65 and concept[1.0]["at_5"] >= 0.1  # by chance 0.5 and 0.025


def test_a_new_word_draws_the_object(runs, real):
    captions = "data.captions=['<santa>, {style} style','<santa>, {style} style','<santa>']"
    word = ["inversion.token=<santa>", "inversion.initial=face", captions, "optimizer.weight_decay=0"]
    five(*word, "optimizer.learning_rate=5e-3", "trainer.steps=200", "trainer.batch_size=4", run=runs / "inversion")
    model = TextToImage.load(BASE)
    before = nearer(draw(model, [f"face, {LEARNED[i % 3]} style" for i in range(12)]), real)
    new_token(model.conditioner.prompts, *read_embedding(runs / "inversion" / "embedding"))
    after = nearer(draw(model, [f"<santa>, {LEARNED[i % 3]} style" for i in range(12)]), real)
    print({"face": before, "<santa>": after})
    assert after["than_another"] >= 0.93 and after["than_another"] - before["than_another"] >= 0.1
    assert after["distance"] < before["distance"]


def test_dreambooth_learns_the_object_and_preservation_keeps_the_class(runs, real):
    kept = f"preservation={{folder: {runs}/faces, prompt: face, images: 30}}"
    learned, forgotten = {}, {}
    for name, settings in {"alone": ["trainer.batch_size=4"], "kept": ["trainer.batch_size=8", kept]}.items():
        rate = ["data.captions=[sks face]", "optimizer.learning_rate=1e-4", "trainer.steps=120"]
        five(*settings, *rate, run=runs / name)
        model = TextToImage.load(runs / name / "model")
        learned[name] = nearer(draw(model, ["sks face"] * 12), real)
        forgotten[name] = nearer(draw(model, ["face"] * 12), real)
    print({"sks face": learned, "face": forgotten})
    assert min(each["nearest"] for each in learned.values()) >= 0.8
    assert forgotten["kept"]["nearest"] <= 0.5 * forgotten["alone"]["nearest"]
    assert torch.tensor([each["distance"] for each in learned.values()]).isfinite().all()
