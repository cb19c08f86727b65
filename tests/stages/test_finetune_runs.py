"""Claims about fine-tuning runs: what learns is all that is saved, and all that the trainer promises holds."""

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
from tests.helpers.single_files import build_parts
from tests.helpers.tiny_runs import differing, files, launch, losses, metrics, run_here

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
    """A small model folder of Stable Diffusion 1's kind."""
    folder = tmp_path_factory.mktemp("base")
    save_model(build_parts("sd1", folder / "words"), folder / "sd1")
    return folder / "sd1"


@pytest.fixture(scope="module", params=CASES)
def case(request, base, tmp_path_factory):
    """The product's name, a command that lacks its `run=`, and the folder of its uninterrupted run."""
    command = ["train_ldm.py", f"init_from={base}", *SETTINGS, *CASES[request.param]]
    folder = tmp_path_factory.mktemp("whole") / "run"
    run_here(*command, f"run={folder}")
    return request.param, command, folder


def stop_after_one_step(command, run) -> None:
    try:
        run_here(*command, f"run={run}", "trainer.max_minutes=0")
    except SystemExit as stopped:
        assert stopped.code == 0
    gc.collect()  # with the trainer goes its lock


def same(run, whole, product) -> None:
    assert metrics(run) == metrics(whole)
    assert differing(run / "state" / "step-0000004", whole / "state" / "step-0000004") == []
    assert differing(run / "samples", whole / "samples") == []
    assert [name for name in differing(run / product, whole / product) if name != "manifest.json"] == []


def test_a_stopped_run_goes_on_bit_for_bit_and_only_what_learns_is_saved(case, base, tmp_path):
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
def test_two_processes_learn_what_one_does(case, tmp_path):
    product, command, whole = case
    stop_after_one_step(command, tmp_path / "run")
    launch(*command, f"run={tmp_path / 'run'}", processes=2)
    assert differing(tmp_path / "run" / "state" / "step-0000004", whole / "state" / "step-0000004") == []


def test_the_files_of_a_run_do_what_was_learned(case, base):
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
        assert len(ids) == 1 and 0 < (row - first).abs().max() < 0.1  # four steps from there


def test_txt2img_draws_with_both_records_them_and_makes_the_picture_again(base, case, tmp_path, capsys):
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


def test_a_changed_file_is_said_and_weight_0_is_the_plain_picture(base, case, tmp_path, capsys):
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


def test_class_pictures_are_drawn_first_and_learned_beside_the_others_by_weight(base, tmp_path):
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


def test_class_pictures_weigh_what_is_said_and_are_half_of_all(base, tmp_path):
    from stipple.stages.ldm.ldm_run import LdmRunConfig, config_from_init
    from stipple.stages.ldm.preservation import with_class
    from stipple_core.config import load_config
    from stipple_core.data.sources.scan import scan

    class Main:
        is_main = True

    own, folder = tmp_path / "own", tmp_path / "class"
    for where, count in ((own, 2), (folder, 5)):
        where.mkdir()
        for i in range(count):
            Image.new("RGB", (16, 16), (50 * i, 40, 30)).save(where / f"{i}.png")
    given = [f"init_from={base}", f"data.folder={own}", "data.captions=[a sks heart]", "data.validation=0"]
    given += [f"preservation={{folder: {folder}, prompt: 'a {{heart}}', images: 5, weight: 0.25}}"]
    config = load_config(LdmRunConfig, None, given, config_from_init)
    found = with_class(scan(config.data), config, Main(), lambda records: None)
    assert len(found.train) == 10
    told = [(record.captions, record.weight) for record in found.train]
    assert told.count(((("a sks heart",),), 1.0)) == 5 and told.count(((("a {heart}",),), 0.25)) == 5


def test_what_does_not_go_together_is_one_line_and_nothing_is_written(base, tmp_path, capsys):
    def said(*arguments) -> str:
        capsys.readouterr()
        with pytest.raises(SystemExit) as caught:
            run_here("train_ldm.py", *SETTINGS, f"run={tmp_path}/run", *arguments)
        told = capsys.readouterr().err
        assert caught.value.code == 2 and told.count("\n") == 1
        return told

    init = f"init_from={base}"
    assert "give one of them" in said(init, *LORA, *WORD)
    assert "init_from names none" in said("autoencoder=x", "lora.rank=4")
    assert "nowhere is the end of no layer's name" in said(init, "lora.targets=[to_q, nowhere]")
    assert "proj_in can't be adapted" in said(init, "lora.targets=[proj_in]")
    assert "no caption holds inversion.token <toy>" in said(init, "inversion={token: <toy>, initial: heart}")
    assert "is in the vocabulary" in said(init, "inversion={token: a</w>, initial: heart}", "data.captions=[a</w>]")
    assert "preservation goes with init_from" in said("autoencoder=x", "preservation={folder: x, prompt: a}")
    kept = f"preservation={{folder: {tmp_path}/drawn, prompt: a heart, images: 200}}"
    assert "nowhere is the end of no layer's name" in said(init, kept, "lora.targets=[nowhere]")
    assert not (tmp_path / "drawn").exists()  # it is known before any picture is drawn
    assert not (tmp_path / "run").exists()
    assert json.loads((base / "model_index.json").read_text())["_class_name"]


def test_a_run_on_another_base_is_told_so(base, case, tmp_path, capsys):
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


def test_a_network_that_only_a_word_is_learned_through_computes_in_the_precision_of_the_run(base, tmp_path):
    seen = set()

    def note(module, told, output) -> None:
        if isinstance(module, torch.nn.Conv2d) and torch.is_grad_enabled():  # of the UNet; the encoder learns nothing
            seen.add(output.dtype)

    hook = torch.nn.modules.module.register_module_forward_hook(note)
    AcceleratorState._reset_state()  # which has the precision of this process's first run
    try:
        given = ["trainer.precision=bf16", "trainer.steps=1", "samples.every=0", f"run={tmp_path}/run"]
        run_here("train_ldm.py", f"init_from={base}", *SETTINGS, *WORD, *given)
    finally:
        hook.remove()
        AcceleratorState._reset_state()
    assert seen == {torch.bfloat16}
