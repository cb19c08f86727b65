"""unCLIP, whole and tiny: embeddings, prior, decoder and retrieval by the scripts, and pictures from prompts."""

import dataclasses
import json
import shutil
from pathlib import Path

import pytest
import torch

import stipple.commands.img2img as img2img
import txt2img
from conditioning import ConditionInputs
from conditioning.readers.retrieval import nearest
from ldm.formats.single_file_writer import save_single_file
from ldm.pipeline import TextToImage
from ldm.sampling import prior_sampling
from ldm.sampling.prior_sampling import sample_embeddings
from ldm.sampling.settings import Settings
from stipple.stages.ldm.batch_encoder import BatchEncoder
from stipple.stages.ldm.next_command import drawing_command
from stipple.stages.ldm.trainable import InversionConfig, LoraConfig, make_trainable
from stipple_core.data.dataset import ImageDataset, collate
from stipple_core.data.records.data_config import DataConfig
from stipple_core.data.records.records import Skip
from stipple_core.data.sources.scan import scan
from stipple_core.files.weights import read_weights, write_weights
from tests.helpers.models.drawn import photo, record, refused, run
from tests.helpers.models.small_encoders import save_open_clip
from tests.helpers.training.tiny_runs import ROOT, run_here

BRIEF = ["data.folder=tests/pictures", "data.verify=false", "data.validation=0.2", "trainer.steps=1"]
BRIEF += ["trainer.batch_size=2", "trainer.save_every=1", "optimizer.warmup_steps=1"]
UNET = ["unet.block_out_channels=[16,16]", "unet.cross_attention_dim=16", "unet.norm_num_groups=8"]


@pytest.fixture(scope="module")
def runs(tmp_path_factory, autoencoder, settings_of_runs) -> Path:
    """A folder with embeddings, and the models of a prior, a decoder and one that looks up, hardly trained."""
    folder = tmp_path_factory.mktemp("unclip")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(ROOT)
        clip = f"local-dir:{save_open_clip(folder)}"
        run_here(
            "stipple.commands.embed",
            "--folder=tests/pictures",
            f"--name={clip}",
            f"--output={folder / 'embeddings'}",
        )
        prior = [f"autoencoder={folder / 'embeddings'}", f"conditioner.name={clip}", "prior.embedding_dim=16"]
        prior += [f"conditioner.text.encoder.name={clip}", "prior.token_dim=32", "prior.vector_dim=16"]
        decoder = [f"autoencoder={autoencoder}", f"conditioner.image.encoder.name={clip}", "unet.vector_dim=16"]
        found = f"conditioner.retrieval.database={folder / 'embeddings' / 'embeddings.safetensors'}"
        rdm = [f"autoencoder={autoencoder}", f"conditioner.retrieval.encoder.name={clip}", found, *UNET]
        specified = {"unclip-prior": [*prior, "prior.text_tokens=20"], "rdm": rdm}
        specified["unclip-decoder"] = [*decoder, *UNET, "conditioner.image.token_dim=16"]
        for kind, settings in specified.items():
            run = f"run={folder / kind}"
            run_here("train_ldm.py", "--config", f"configs/ldm/{kind}-small.yaml", run, *BRIEF, *settings)
    return folder


def test_the_command_of_a_prior_names_its_decoder(runs):
    prior = TextToImage.load(runs / "unclip-prior" / "model")
    words = drawing_command(prior, "a cat", ["--checkpoint", "runs/prior/model"])
    assert words == ["stipple", "draw", "a cat", "--checkpoint", "DECODER", "--prior", "runs/prior/model"]


@pytest.mark.parametrize("expected", [LoraConfig(), InversionConfig(token="cat", initial="dog")])
def test_a_prior_is_not_adapted(runs, expected):
    prior = TextToImage.load(runs / "unclip-prior" / "model")
    kind = "lora" if isinstance(expected, LoraConfig) else "inversion"
    learning = make_trainable(**{"lora": None, "inversion": None, kind: expected}, source=str(runs))
    with pytest.raises(ValueError, match=f"{kind} adapts models that draw images, and this one makes embeddings"):
        learning.prepare(prior, [], 0)


def test_a_decoder_draws_prompts_through_its_prior(runs):
    model = TextToImage.load(runs / "unclip-decoder" / "model")
    with pytest.raises(ValueError, match="give an image, or a prior"):
        model.plan("")
    model.use_prior(TextToImage.load(runs / "unclip-prior" / "model"))
    first, again, other = (model("a cat", seed=seed, steps=2)[0] for seed in (0, 0, 1))
    assert first.tobytes() == again.tobytes() != other.tobytes()
    assert [image.size for image in model(["a cat", "a dog"], batch_size=2, steps=2)] == [(32, 32)] * 2


def test_a_reader_that_needs_no_latents_gets_no_encoder(runs):
    model = TextToImage.load(runs / "unclip-decoder" / "model")
    assert not hasattr(model.conditioner.readers["image"], "encode")


def test_a_prior_makes_points_on_the_sphere_of_embeddings_that_depend_on_the_prompt(runs):
    prior = TextToImage.load(runs / "unclip-prior" / "model")
    points = sample_embeddings(prior, prior.plan(["a cat", "a dog"], steps=2))
    torch.testing.assert_close(points.square().mean(1), torch.ones(2))
    assert not torch.allclose(points[0], points[1])
    assert torch.equal(prior.unet.clip_std[0], prior.autoencoder.std)  # which diffusers looks for there


def test_an_image_takes_the_place_of_the_prior(runs):
    model = TextToImage.load(runs / "unclip-decoder" / "model")
    (settings,) = model.plan("", image=str(ROOT / "tests" / "pictures" / "photos" / "hat.webp"), strength=1.0, steps=2)
    assert settings.strength == 1.0


def test_a_prior_of_other_embeddings_is_refused(runs):
    decoder, augmented = (TextToImage.load(runs / name / "model") for name in ("unclip-decoder", "rdm"))
    for model, prior in ((augmented, decoder), (decoder, augmented)):
        with pytest.raises(ValueError, match="must make embeddings of the image encoder"):
            model.use_prior(prior)


def test_the_model_is_conditioned_on_what_is_retrieved_for_a_prompt(runs):
    model = TextToImage.load(runs / "rdm" / "model")
    reader = model.conditioner.readers["retrieval"]
    (tokens,) = model.conditioner.encode(["a cat"], ConditionInputs(prompts=["a cat"])).tokens
    found = nearest(reader.embedder.texts(["a cat"]), reader.database, reader.config.neighbors)[0]
    assert torch.equal(tokens, reader.database[found])
    assert model("a cat", steps=2)[0].size == (32, 32)


def test_a_prior_has_no_single_file(runs, tmp_path):
    prior = TextToImage.load(runs / "unclip-prior" / "model")
    with pytest.raises(ValueError, match="a model of ImageEmbeddings can't be stored in a CompVis file"):
        save_single_file(prior.parts, tmp_path / "prior.safetensors")


def test_no_candidate_of_a_prior_is_that_of_a_neighboring_seed(runs, monkeypatch):
    prior, seeds = TextToImage.load(runs / "unclip-prior" / "model"), []
    sample = prior_sampling.run
    recorded = lambda model, batch, *rest: seeds.append(batch[0].seed) or sample(model, batch, *rest)  # noqa: E731
    monkeypatch.setattr(prior_sampling, "run", recorded)
    sample_embeddings(prior, [Settings(prompt="a cat", steps=2, seed=seed) for seed in (0, 1, 2**64 - 1)])
    assert len(set(seeds)) == 2 * 3


def test_a_prior_refuses_to_draw_before_it_computes(runs, tmp_path, capsys, monkeypatch):
    prior = TextToImage.load(runs / "unclip-prior" / "model")
    monkeypatch.setattr(prior, "sample", lambda batch: pytest.fail("it was sampled"))
    with pytest.raises(ValueError, match="makes embeddings, not pictures"):
        prior("a cat", steps=2)
    assert "it serves a decoder" in refused(
        txt2img.main, capsys, tmp_path / "out", "a cat", "--checkpoint", runs / "unclip-prior" / "model"
    )


def test_words_that_an_image_or_nothing_takes_the_place_of_are_refused(runs, tmp_path, capsys):
    decoder, augmented = (TextToImage.load(runs / name / "model") for name in ("unclip-decoder", "rdm"))
    decoder.use_prior(TextToImage.load(runs / "unclip-prior" / "model"))
    for model in (decoder, augmented):
        for settings in ({}, {"image": photo(32, 32)}):
            with pytest.raises(ValueError, match="negative prompt 'a dog' is read by nothing"):
                model.plan("" if settings else "a cat", negative_prompt="a dog", guidance_scale=3.0, **settings)
        with pytest.raises(ValueError, match="prompt 'a cat' and an image can't both be used.*leave one out"):
            model.plan("a cat", image=photo(32, 32))
        assert model.plan("", image=photo(32, 32)) and model.plan("a cat", steps=2)
    with pytest.raises(ValueError, match="also '1 a dog' is not read by a prior"):
        decoder.plan("a cat", also="1 a dog")
    photo(32, 32).save(tmp_path / "photo.png")
    words = ("--checkpoint", runs / "unclip-decoder" / "model", "--prior", runs / "unclip-prior" / "model")
    assert "--prior makes embeddings from prompts, and the image replaces them" in refused(
        img2img.main, capsys, tmp_path / "out", tmp_path / "photo.png", *words
    )


def test_a_negative_prompt_reaches_both_that_a_prior_reads(runs):
    prior = TextToImage.load(runs / "unclip-prior" / "model")
    context = prior.conditioner.encode(["a dog"], ConditionInputs(prompts=["a dog"], dropped=torch.tensor([True])))
    condition = prior.conditioner.encode(["a dog"])
    assert torch.equal(context.vector, condition.vector) and torch.equal(context.tokens, condition.tokens)


def test_a_database_is_found_from_everywhere_missed_at_once_and_recorded(runs, tmp_path, capsys, monkeypatch):
    model, out = tmp_path / "model", tmp_path / "out"
    shutil.copytree(runs / "rdm" / "model", model)
    path = model / "conditioner" / "config.json"
    specified = json.loads(path.read_text())
    assert Path(specified["retrieval"]["database"]).is_absolute()
    shutil.copytree(runs / "embeddings", tmp_path / "embeddings")
    monkeypatch.chdir(tmp_path)
    found = Path("embeddings") / "embeddings.safetensors"
    path.write_text(json.dumps({"retrieval": {**specified["retrieval"], "database": str(found)}}))
    (picture,) = run(txt2img.main, capsys, out, "a cat", "--steps", 1, "--checkpoint", model)
    assert record(picture)["database_hash"]
    points = read_weights(found)["embeddings"]
    write_weights({"embeddings": points.flip(0)}, found)
    txt2img.main(["--like", str(picture), "--outdir", str(out)])
    assert "was made with database" in capsys.readouterr().err
    found.unlink()
    assert "embeddings.safetensors' does not exist; make it" in refused(
        txt2img.main, capsys, tmp_path / "none", "a cat", "--checkpoint", model
    )


def test_training_refuses_a_database_that_is_not_there_before_it_writes(runs, autoencoder, tmp_path, capsys):
    specified = [f"autoencoder={autoencoder}", f"conditioner.retrieval.encoder.name=local-dir:{runs}", *UNET, *BRIEF]
    with pytest.raises(SystemExit):
        run_here("train_ldm.py", "--config", "configs/ldm/rdm-small.yaml", f"run={tmp_path / 'run'}", *specified)
    assert "retrieval.database" in capsys.readouterr().err and not (tmp_path / "run").exists()


def test_in_training_no_image_is_conditioned_on_itself_mirrored_or_cropped(runs):
    """Also where it is seen otherwise than stipple embed saw it, and where another stands in for it."""
    model = TextToImage.load(runs / "rdm" / "model")
    reader, folder = model.conditioner.readers["retrieval"], str(ROOT / "tests" / "pictures")
    data = DataConfig(folder=folder, image_size=32, flip=True, crop="random", captions=[], validation=0.02)
    pictures = ImageDataset(scan(data, captioned=False).train, data)
    pictures.skipped[2] = Skip("gone", "damaged")
    batch = collate([pictures[0, i] for i in range(8)])
    own = reader.database[[reader.rows[name] for name in batch.names]][:, None]  # [B, 1, d]
    values = BatchEncoder(model.autoencoder, model.conditioner, model.conditioner, None).condition_inputs(batch)

    def is_own_neighbor(values: ConditionInputs) -> int:
        return int((reader(values).tokens == own).all(-1).any(1).sum())

    assert is_own_neighbor(values) == 0 < is_own_neighbor(dataclasses.replace(values, names=None))


def test_a_run_that_resumes_with_another_database_warns(runs, autoencoder, tmp_path, capsys):
    shutil.copytree(runs / "rdm", tmp_path / "run")
    write_weights({"embeddings": torch.randn(30, 16)}, tmp_path / "embeddings.safetensors")
    specified = [f"autoencoder={autoencoder}", f"conditioner.retrieval.encoder.name=local-dir:{runs}", *UNET, *BRIEF]
    specified += [f"conditioner.retrieval.database={tmp_path / 'embeddings.safetensors'}", "trainer.steps=2"]
    run_here("train_ldm.py", "--config", "configs/ldm/rdm-small.yaml", f"run={tmp_path / 'run'}", *specified)
    assert "the database changed since the run was stopped" in capsys.readouterr().out
