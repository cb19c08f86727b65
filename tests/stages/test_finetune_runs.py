"""Fine-tuning runs: only the trained part is saved, and runs are resumed exactly."""

import gc
import json
from pathlib import Path

import pytest
import torch
from accelerate.state import AcceleratorState
from PIL import Image
from safetensors.torch import load_file

from ldm import TextToImage
from ldm.formats.lora import DIFFUSERS_FILE, KOHYA_FILE, merge, read_lora
from ldm.formats.model_folder import save_model
from ldm.formats.opening import open_model
from stipple_core.files.training_state import open_state
from stipple_core.images.drawn_pictures import read_record
from tests.helpers.models.single_files import build_parts
from tests.helpers.training.many_processes import succeed
from tests.helpers.training.tiny_runs import differing, files, losses, metrics, run_here

SETTINGS = [
    *("data.folder=tests/pictures", "data.validation=0", "trainer.steps=4", "trainer.batch_size=4", "trainer.keep=9"),
    *("trainer.micro_batch_size=2", "trainer.save_every=2", "trainer.log_every=1", "validation.every=0"),
    *("samples.every=4", "samples.steps=2", "samples.prompts=[a red heart]", "optimizer.learning_rate=1e-2"),
]
LORA = ["lora.rank=4", "lora.alpha=2", "lora.targets=[to_q,to_v,to_out.0,ff.net.2]", "lora.text_encoder=true"]
WORD = ["inversion={token: <toy>, initial: heart}", "data.captions=[a <toy>]"]
CASES = {"lora": LORA, "embedding": WORD}

pytestmark = pytest.mark.usefixtures("settings_of_runs")


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    """A small model folder in the layout of Stable Diffusion 1."""
    folder = tmp_path_factory.mktemp("base")
    save_model(build_parts("sd1", folder / "words"), folder / "sd1")
    return folder / "sd1"


@pytest.fixture(scope="module", params=CASES)
def case(request, base, tmp_path_factory):
    """The name of the product, a command without its `run=`, and the folder of its uninterrupted run."""
    command = ["train_ldm.py", f"init_from={base}", *SETTINGS, *CASES[request.param]]
    folder = tmp_path_factory.mktemp("whole") / "run"
    run_here(*command, f"run={folder}")
    return request.param, command, folder


def stop_after_one_step(command, run) -> None:
    try:
        run_here(*command, f"run={run}", "trainer.max_minutes=0")
    except SystemExit as stopped:
        assert stopped.code == 0
    gc.collect()  # releases the lock of the trainer


def same(run, whole, product) -> None:
    assert metrics(run) == metrics(whole)
    assert differing(run / "state" / "step-0000004", whole / "state" / "step-0000004") == []
    assert differing(run / "samples", whole / "samples") == []
    assert [name for name in differing(run / product, whole / product) if name != "manifest.json"] == []


def test_a_run_is_resumed_bit_for_bit_and_saves_only_what_is_trained(case, base, tmp_path):
    product, command, whole = case
    stop_after_one_step(command, tmp_path / "run")
    run_here(*command, f"run={tmp_path / 'run'}")
    same(tmp_path / "run", whole, product)
    assert not (whole / "model").exists() and len({loss for _, loss in losses(whole)}) == 4
    weights = open_state(whole / "state" / "step-0000004")["parts"]
    learned = {name for part in ("unet", "conditioner") for name in weights.get(part, {})}
    assert learned and all("lora_" in name or name.endswith("rows") for name in learned)
    size = (whole / "state" / "step-0000004" / "state.safetensors").stat().st_size
    assert size < sum(map(len, files(base).values())) / 8  # weights, averages and two moments


@pytest.mark.slow
def test_two_processes_train_the_same_as_one(case, tmp_path):
    product, command, whole = case
    stop_after_one_step(command, tmp_path / "run")
    succeed(*command, f"run={tmp_path / 'run'}", processes=2)
    assert differing(tmp_path / "run" / "state" / "step-0000004", whole / "state" / "step-0000004") == []


def test_the_saved_files_have_the_effect_of_the_training(case, base):
    product, _, run = case
    model = TextToImage.load(base)
    shown = dict(seed=1, steps=2, sampler="ddim", guidance_scale=2.0)
    if product == "lora":
        before = model("a red heart", **shown)[0]
        for path in (run / "lora" / DIFFUSERS_FILE, run / "lora" / KOHYA_FILE):
            lora = read_lora(path)
            assert {low.scale for low in lora.layers.values()} == {0.5}
            assert any(low.up.abs().max() > 0 for low in lora.layers.values())
        merge(lora, 1.0, model.unet, model.conditioner.encoder)
        assert list(before.getdata()) != list(model("a red heart", **shown)[0].getdata())
    else:
        row = load_file(run / "embedding" / "learned_embeds.safetensors")["<toy>"]
        ids = model.conditioner.tokenizer.ids("heart")
        first = model.conditioner.encoder.text_model.embeddings.token_embedding.weight[ids[0]]
        assert len(ids) == 1 and 0 < (row - first).abs().max() < 0.1  # four steps away


def test_txt2img_draws_with_both_records_them_and_reproduces_the_image(base, case, tmp_path, capsys):
    product, _, run = case
    flags = ["--lora", f"{run}/lora:0.5"] if product == "lora" else ["--embedding", f"{run}/embedding"]
    prompt = ["a <toy>", "--checkpoint", str(base), "--steps", "2", "--outdir", str(tmp_path)]
    run_here("txt2img.py", *prompt, *flags)
    run_here("txt2img.py", "--like", f"{tmp_path}/00000.png", "--outdir", str(tmp_path))
    run_here("txt2img.py", *prompt)
    first, again, plain = (Image.open(tmp_path / f"0000{i}.png").tobytes() for i in range(3))
    assert first == again != plain
    record = read_record(tmp_path / "00000.png")
    assert record[product] == flags[1:] and len(record[f"{product}_hash"]) == 1
    assert read_record(tmp_path / "00001.png") == record and product not in read_record(tmp_path / "00002.png")


def test_a_changed_file_is_reported_and_weight_0_has_no_effect(base, case, tmp_path, capsys):
    product, _, run = case
    if product != "lora":
        pytest.skip("of LoRA")
    prompt = ["a red heart", "--checkpoint", str(base), "--steps", "2", "--outdir", str(tmp_path)]
    path = tmp_path / "x.safetensors"
    path.write_bytes((run / "lora" / DIFFUSERS_FILE).read_bytes())
    run_here("txt2img.py", *prompt, "--lora", f"{path}:0")
    run_here("txt2img.py", *prompt)
    assert Image.open(tmp_path / "00000.png").tobytes() == Image.open(tmp_path / "00001.png").tobytes()
    path.write_bytes((run / "lora" / KOHYA_FILE).read_bytes())
    capsys.readouterr()
    run_here("txt2img.py", "--like", f"{tmp_path}/00000.png", "--outdir", str(tmp_path))
    assert "was made with lora" in capsys.readouterr().err


def test_missing_class_images_are_drawn_before_training_and_each_has_its_own_seed(base, tmp_path):
    own, folder = tmp_path / "own", tmp_path / "class"
    own.mkdir()
    for i in range(2):
        Image.new("RGB", (16, 16), (200, 40 * i, 30)).save(own / f"{i}.png")
    command = ["train_ldm.py", f"init_from={base}", *SETTINGS, f"data.folder={own}", "data.captions=[a sks heart]"]
    command += [f"preservation={{folder: {folder}, prompt: a heart, images: 3, weight: 0.5}}", "optimizer.clip_norm=0"]
    run_here(*command, f"run={tmp_path}/whole")
    drawn = files(folder)
    assert sorted(drawn) == [f"prior-0000{i}.png" for i in range(3)]
    (folder / "prior-00001.png").unlink()
    stop_after_one_step(command, tmp_path / "run")
    assert files(folder) == drawn  # each has its own seed
    run_here(*command, f"run={tmp_path}/run")
    same(tmp_path / "run", tmp_path / "whole", "model")
    assert open_model(tmp_path / "run" / "model").unet is not None


def test_class_images_have_their_weight_and_are_half_of_all(base, tmp_path):
    from stipple.stages.ldm.build_model import captions_of
    from stipple.stages.ldm.ldm_run import LdmRunConfig, config_from_init
    from stipple.stages.ldm.preservation import with_class, with_class_captions
    from stipple_core.config import load_config
    from stipple_core.data.sources.scan import scan

    class Main:
        is_main = True

    own, folder = tmp_path / "own", tmp_path / "class"
    for where, count in ((own, 2), (folder, 5)):
        where.mkdir()
        for i in range(count):
            Image.new("RGB", (16, 16), (50 * i, 40, 30)).save(where / f"{i}.png")
    overrides = [f"init_from={base}", f"data.folder={own}", "data.captions=[a sks heart]", "data.validation=0"]
    overrides += [f"preservation={{folder: {folder}, prompt: 'a {{heart}}', images: 5, weight: 0.25}}"]
    config = load_config(LdmRunConfig, None, overrides, config_from_init)
    records = scan(config.data)
    joined, expected = with_class(records, config, Main(), None), with_class_captions(records, config.preservation)
    assert len(joined.train) == 10
    pairs = [(record.captions, record.weight) for record in joined.train]
    assert pairs.count(((("a sks heart",),), 1.0)) == 5 and pairs.count(((("a {heart}",),), 0.25)) == 5
    assert captions_of(expected.train) == captions_of(joined.train)


def test_settings_that_exclude_each_other_are_one_line_and_nothing_is_written(base, tmp_path, capsys):
    def error_of(*arguments) -> str:
        capsys.readouterr()
        with pytest.raises(SystemExit) as caught:
            run_here("train_ldm.py", *SETTINGS, f"run={tmp_path}/run", *arguments)
        error = capsys.readouterr().err
        assert caught.value.code == 2 and error.count("\n") == 1
        return error

    init = f"init_from={base}"
    assert "set one of them" in error_of(init, *LORA, *WORD)
    assert "init_from has no value" in error_of("autoencoder=x", "lora.rank=4")
    assert "no layer's name ends in nowhere" in error_of(init, "lora.targets=[to_q, nowhere]")
    assert "proj_in can't be adapted" in error_of(init, "lora.targets=[proj_in]")
    assert "no caption contains inversion.token <toy>" in error_of(init, "inversion={token: <toy>, initial: heart}")
    assert "is in the vocabulary" in error_of(init, "inversion={token: a</w>, initial: heart}", "data.captions=[a</w>]")
    assert "preservation requires init_from" in error_of("autoencoder=x", "preservation={folder: x, prompt: a}")
    preservation = f"preservation={{folder: {tmp_path}/drawn, prompt: a heart, images: 200}}"
    assert "no layer's name ends in nowhere" in error_of(init, preservation, "lora.targets=[nowhere]")
    assert not (tmp_path / "drawn").exists()  # refused before any image is drawn
    assert not (tmp_path / "run").exists()
    assert json.loads((base / "model_index.json").read_text())["_class_name"]


def test_a_run_that_is_resumed_with_another_base_model_warns(base, case, tmp_path, capsys):
    product, command, _ = case
    if product != "embedding":
        pytest.skip("once is enough")
    other = tmp_path / "other"
    parts = open_model(base)
    with torch.no_grad():
        parts.unet.conv_in.weight.mul_(1.5)
    save_model(parts, other)
    stop_after_one_step(command, tmp_path / "run")
    capsys.readouterr()
    run_here(*command, f"run={tmp_path}/run", f"init_from={other}", "trainer.steps=2")
    assert "model that is adapted changed" in capsys.readouterr().out


def test_the_frozen_unet_of_textual_inversion_computes_in_the_precision_of_the_run(base, tmp_path):
    seen = set()

    def note(module, inputs, output) -> None:
        if isinstance(module, torch.nn.Conv2d) and torch.is_grad_enabled():  # of the UNet; the encoder is frozen
            seen.add(output.dtype)

    hook = torch.nn.modules.module.register_module_forward_hook(note)
    AcceleratorState._reset_state()  # it has the precision of the first run of this process
    try:
        overrides = ["trainer.precision=bf16", "trainer.steps=1", "samples.every=0", f"run={tmp_path}/run"]
        run_here("train_ldm.py", f"init_from={base}", *SETTINGS, *WORD, *overrides)
    finally:
        hook.remove()
        AcceleratorState._reset_state()
    assert seen == {torch.bfloat16}
