"""Claims about models of classes, layouts and nothing: trained, resumed to the bit, opened, gone on from."""

import json
from pathlib import Path

import pytest
import torch

from conditioning import ConditionerConfig, Unconditional, build_conditioner, load_conditioner
from conditioning.classes.class_names import ClassConfig
from conditioning.layouts.layout_tokenizer import LayoutConfig
from ldm.pipeline import TextToImage
from stipple.stages.ldm.build_model import make_conditioner
from stipple.stages.ldm.ldm_run import LdmRunConfig
from stipple_core.data.records.captions import columns_of, expand
from stipple_core.data.records.data_config import DataConfig
from stipple_core.data.records.records import Record, Records
from tests.helpers.data.layout_shapes import draw, draw_layout, find, make_set, overlaps, write_layout
from tests.helpers.training.tiny_runs import final_state, run_here

pytestmark = pytest.mark.usefixtures("settings_of_runs")

KINDS = {
    "class": ['data.captions=["{class}"]', "conditioner.kind=class", "conditioner.classes.width=32"],
    "vector": [
        *('data.captions=["{class}"]', "conditioner.kind=class", "conditioner.classes.width=24"),
        *("conditioner.classes.told_as=vector", "unet.cross_attention_dim=null", "unet.vector_dim=24"),
    ],
    "layout": [
        *('data.captions=["{objects}"]', "conditioner.kind=layout", "conditioner.layout.vocab_size=26"),
        *("conditioner.layout.width=32", "conditioner.layout.layers=1", "conditioner.layout.heads=2"),
    ],
    "unconditional": [
        *("data.captions=[]", "conditioner.kind=unconditional", "unet.attention=plain"),
        *("unet.cross_attention_dim=null", "diffusion.caption_dropout=0", "samples.guidance_scale=1"),
    ],
}
PROMPTS = {"class": "Two", "vector": "three", "layout": "RED circle 0 0 0.5 0.5", "unconditional": ""}


@pytest.fixture(scope="module")
def pictures(tmp_path_factory) -> Path:
    """Shapes in boxes, with a column of objects, and a column that says how many there are."""
    folder = tmp_path_factory.mktemp("pictures") / "set"
    make_set(folder, 8, seed=0)
    rows = [json.loads(line) for line in (folder / "metadata.jsonl").read_text().splitlines()]
    rows = [row | {"class": ("two", "three")[len(row["objects"]) - 2]} for row in rows]
    (folder / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def train(kind: str, pictures: Path, autoencoder: str, run: Path, *more: str) -> None:
    provided = [f"data.folder={pictures}", f"autoencoder={autoencoder}", f"run={run}", "data.validation=0"]
    few = ["trainer.steps=2", "trainer.save_every=1", "samples.every=0", "validation.every=0"]
    prompts = [f"samples.prompts=['{PROMPTS[kind]}']"]
    run_here("train_ldm.py", "--config", "configs/ldm/tiny.yaml", *provided, *few, *prompts, *KINDS[kind], *more)


@pytest.mark.parametrize("kind", KINDS)
def test_a_model_of_each_kind_learns_and_opens_again(kind, pictures, autoencoder, tmp_path):
    fast = ["ema.decay=0", "optimizer.learning_rate=1e-2", "optimizer.warmup_steps=0", "optimizer.weight_decay=0"]
    train(kind, pictures, autoencoder, tmp_path / "run", *fast, "trainer.steps=3")
    train(kind, pictures, autoencoder, tmp_path / "first", *fast, "trainer.steps=1")  # a new UNet reads nothing yet
    model, first = (TextToImage.load(tmp_path / run / "model") for run in ("run", "first"))
    assert model.conditioner.trainable is (kind != "unconditional")
    before, after = first.conditioner.state_dict(), model.conditioner.state_dict()
    moved = [(after[name] - before[name]).abs().max().item() for name in before]
    assert kind == "unconditional" or 1e-3 < max(moved) < 0.1
    (picture,) = model(PROMPTS[kind], steps=2)
    assert picture.size == (32, 32)


@pytest.mark.parametrize("kind", ["class", "layout"])
def test_a_resumed_run_equals_an_uninterrupted_one(kind, pictures, autoencoder, tmp_path):
    train(kind, pictures, autoencoder, tmp_path / "whole")
    train(kind, pictures, autoencoder, tmp_path / "parts", "trainer.steps=1")
    train(kind, pictures, autoencoder, tmp_path / "parts")
    assert final_state(tmp_path / "whole") == final_state(tmp_path / "parts")


def test_what_goes_on_from_a_model_keeps_the_names_of_its_classes(pictures, autoencoder, tmp_path):
    train("class", pictures, autoencoder, tmp_path / "run")
    few = ["trainer.steps=1", "trainer.batch_size=2", "samples.every=0", "samples.prompts=[two]", "validation.every=0"]
    provided = [f"init_from={tmp_path}/run/model", f"data.folder={pictures}", 'data.captions=["{class}"]']
    run_here("train_ldm.py", *provided, *few, "data.validation=0", f"run={tmp_path}/on")
    conditioner = load_conditioner(tmp_path / "on" / "model")
    assert conditioner.tokenizer.names == ["three", "two"]  # taken from the captions, sorted
    assert conditioner.tokenize(["two", " THREE", "0", ""]).ids.tolist() == [[1], [0], [0], [2]]


def test_a_table_from_scratch_has_a_row_of_its_own_for_no_class():
    conditioner = build_conditioner(ConditionerConfig(kind="class", classes=ClassConfig(count=3, width=4)), ["2"])
    assert conditioner.embedding.weight.shape == (4, 4) and conditioner.null_class == 3
    condition = conditioner.encode(["2", "", "0"]).tokens
    assert torch.equal(condition, conditioner.embedding.weight[[2, 3, 0]][:, None])
    vector = ClassConfig(names=["a", "b"], width=4, told_as="vector")
    context = build_conditioner(ConditionerConfig(kind="class", classes=vector)).encode(["b", ""])
    assert context.tokens is None and context.vector.shape == (2, 4)


def test_layouts_name_their_classes_and_keep_them_on_disk(tmp_path):
    sizes = LayoutConfig(vocab_size=26, max_objects=2, width=8, layers=1, heads=2)
    captions = ["traffic light 0 0 1 0.5; car 0 0.5 1 1", ""]
    conditioner = build_conditioner(ConditionerConfig(kind="layout", layout=sizes), captions).eval()
    assert conditioner.tokenizer.classes.names == ["car", "traffic light"]
    ids = conditioner.tokenize(captions).ids
    assert ids.tolist() == [[1, 0, 2 * 5 + 4, 0, 2 * 5, 24, 0, 24], [25] * 6 + [0, 24]]
    conditioner.save(tmp_path)
    assert torch.equal(load_conditioner(tmp_path).encode(captions).tokens, conditioner.encode(captions).tokens)


@pytest.mark.parametrize(
    ("config", "captions", "message"),
    [
        ({"kind": "class", "classes": ClassConfig(names=["shoes", "hat"])}, ["shoe"], "did you mean 'shoes'"),
        ({"kind": "class", "classes": ClassConfig(names=["shoes", "hat"])}, ["3"], "'3' is not a class"),
        ({"kind": "class"}, [""], "there are no classes"),
        (
            {"kind": "layout", "layout": LayoutConfig(names=["cat"])},
            ["dog 0 0 1 1"],
            "not an object .* the classes are cat",
        ),
        ({"kind": "layout"}, ["dog 0 0 1"], "is not an object of a layout"),
        ({"kind": "unconditional"}, ["a dog"], r"reads no captions; set data.captions=\[\]"),
        ({"kind": "clas"}, [], "kind 'clas' is unknown; use one of transformers, open_clip, scratch, class"),
    ],
)
def test_captions_that_a_kind_can_not_read_are_one_line(config, captions, message):
    with pytest.raises(ValueError, match=message) as error:
        build_conditioner(ConditionerConfig(**config), captions)
    assert "\n" not in str(error.value)


def test_mirroring_pictures_of_layouts_is_refused_before_anything_is_written(pictures, autoencoder, tmp_path, capsys):
    with pytest.raises(SystemExit) as left:
        train("layout", pictures, autoencoder, tmp_path / "run", "data.flip=true")
    assert left.value.code == 2 and "boxes of layouts" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_a_column_of_objects_reads_as_a_layout():
    row = {"objects": [{"label": "red circle", "box": [0, 0.25, 0.5, 1]}, {"label": "cat", "box": [0.5, 0, 1, 1]}]}
    template = "{objects}"
    assert expand(template, columns_of(template), row) == ("red circle 0 0.25 0.5 1; cat 0.5 0 1 1",)
    assert expand(template, columns_of(template), {"objects": [{"label": "cat"}]}) == ()


def test_the_analysis_finds_the_boxes_of_known_layouts_and_no_others():
    import random

    draws = random.Random(0)
    layouts = [draw_layout(draws) for _ in range(40)]
    found = [overlap for layout in layouts for overlap in overlaps(draw(layout), layout)]
    assert min(found) > 0.9
    others = [overlap for a, b in zip(layouts, layouts[1:], strict=False) for overlap in overlaps(draw(a), b)]
    assert sum(others) / len(others) < 0.3
    blank = draw(())
    assert find(blank, "red") is None and write_layout(()) == ""


def test_an_unconditional_model_has_no_context():
    conditioner = build_conditioner(ConditionerConfig(kind="unconditional"), [""])
    assert isinstance(conditioner, Unconditional) and conditioner.encode(["", ""]).tokens is None


def test_classes_that_only_held_out_pictures_have_are_known():
    def record(caption: str) -> Record:
        return Record("", "", ((caption,),))

    for kind, one, other in (("class", "cat", "dog"), ("layout", "cat 0 0 1 1", "dog 0 0 1 1")):
        layout = LayoutConfig(vocab_size=26, width=8, layers=1, heads=2)
        config = LdmRunConfig(
            data=DataConfig(folder=""), autoencoder="", conditioner=ConditionerConfig(kind=kind, layout=layout)
        )
        conditioner = make_conditioner(config, None, Records([record(one)], [record(other)], []))
        assert len(conditioner.tokenize([one, other]).ids.unique(dim=0)) == 2
