"""Prompt recall, on features with a known recall and on a small model from end to end."""

import json
from pathlib import Path

import pytest
import torch
from PIL import Image

from benchmarks.quality import prompt_recall
from benchmarks.quality.recall import distances, nearest, ranks, recall, share, small_rgb
from benchmarks.quality.recall_pictures import Gallery, save_sheet
from benchmarks.quality.recall_prompts import choose_cases, read_metadata, share_a_word, words
from stipple_core.data.records.data_config import DataConfig
from stipple_core.data.records.rows import is_held_out
from stipple_core.data.sources.scan import scan
from tests.helpers.models.small_models import build_model

ROOT = Path(__file__).parents[2]
PICTURES = str(ROOT / "tests/pictures")
ALL = torch.arange(50)
pytestmark = pytest.mark.filterwarnings("ignore:a prompt is longer")  # the tokenizer of the small model has few words


def features(count: int = 50, seed: int = 0) -> torch.Tensor:
    return torch.randn(count, 12, generator=torch.Generator().manual_seed(seed))


def cases(seed: int = 0, count: int = 200):
    records = scan(DataConfig(folder=PICTURES, image_size=32)).train
    return choose_cases(records, read_metadata(PICTURES), count, seed), records


def test_references_are_always_recalled():
    found = recall(features(), features(), ALL)
    assert (found.at_1.value, found.at_5.value, found.median_rank) == (1, 1, 1)


def test_a_model_that_always_draws_the_same_image_is_exactly_at_chance():
    found = recall(features(1, seed=1).expand(50, -1), features(), ALL)
    assert (found.at_1.value, found.at_5.value, found.median_rank) == (1 / 50, 5 / 50, 25.5)


def test_images_that_ignore_their_prompts_are_within_the_interval_around_chance():
    references, right = features(200), torch.arange(200).repeat(20)
    found = recall(features(4000, seed=1), references, right)
    assert found.at_1.low < 1 / 200 < found.at_1.high
    assert found.at_5.low < 5 / 200 < found.at_5.high


def test_shuffled_images_are_not_recalled():
    assert recall(features(), features(), ALL.roll(1)).at_1.value == 0


def test_recall_does_not_depend_on_the_order_of_references():
    references, queries = features(), features() + features(seed=1)
    order = torch.randperm(50, generator=torch.Generator().manual_seed(2))
    assert recall(queries, references, ALL) == recall(queries, references[order], order.argsort())


def test_a_tie_does_not_count_as_recalled():
    assert ranks(torch.zeros(3, 7), torch.arange(3)).tolist() == [7, 7, 7]


def test_distances_are_mean_squared_differences():
    a, b = features(4), features(9, seed=1)
    assert torch.allclose(distances(a, b), (a[:, None] - b[None]).square().mean(2))


def test_small_images_are_means_of_areas():
    images = torch.rand(2, 3, 64, 64)
    assert torch.allclose(small_rgb(images), images.unflatten(3, (16, 4)).unflatten(2, (16, 4)).mean((3, 5)).flatten(1))


@pytest.mark.parametrize(("hits", "trials"), [(0, 200), (7, 200), (100, 200), (200, 200)])
def test_the_ends_of_the_interval_are_1_96_standard_deviations_from_the_share(hits, trials):
    found = share(hits, trials)
    assert found.low <= found.value <= found.high
    for end in (found.low, found.high):
        if 0 < end < 1:
            assert abs(found.value - end) / (end * (1 - end) / trials) ** 0.5 == pytest.approx(1.96)


def test_the_nearest_training_image_is_the_image_itself_unless_it_is_excluded():
    training = features()
    found = nearest(training[:5], training)
    assert torch.equal(found.index, ALL[:5]) and found.distance.max() == 0
    found = nearest(training[:5], training, ALL[:5])
    assert not (found.index == ALL[:5]).any() and found.distance.min() > 0


def test_distance_to_the_nearest_is_in_gray_levels():
    images = torch.zeros(2, 3, 16, 16)
    assert nearest(small_rgb(images + 2 * 10 / 255), small_rgb(images)).distance.tolist() == pytest.approx([10, 10])


def test_a_blurred_copy_is_distinguished_from_a_pale_image_that_is_near_to_many():
    training = features(200)
    copies, pale = training[:20] + 0.2 * features(20, seed=1), training.mean(0, keepdim=True)
    assert nearest(copies, training).ratio.max() < prompt_recall.COPY_RATIO < nearest(pale, training).ratio.min()


def test_cases_depend_on_the_seed_alone_and_have_distinct_concepts_in_alternating_styles():
    (first, records), (again, _), (other, _) = cases(), cases(), cases(seed=1)
    rows = read_metadata(PICTURES)
    names = [rows[records[case.index].name]["name"] for case in first]
    styles = [rows[records[case.index].name]["style"] for case in first]
    assert first == again != other
    assert len(set(names)) == len(names) > 4
    assert len(set(styles[:3])) == 3


def test_unseen_wordings_are_not_training_captions_and_do_not_contain_the_name():
    chosen, records = cases()
    rows, captions = read_metadata(PICTURES), {text for r in records for group in r.captions for text in group}
    for case in chosen:
        row = rows[records[case.index].name]
        assert case.prompts["caption"] in captions
        for kind, count in (("keywords", 3), ("synonyms", 2)):
            *keywords, style = case.prompts[kind].split(", ")
            assert case.prompts[kind] not in captions and style == f"{row['style']} style"
            assert len(keywords) == count and set(keywords) <= set(row["keywords"]) - {row["name"]}
        assert not any(share_a_word(word, row["name"]) for word in case.prompts["synonyms"].split(", ")[:2])


def test_a_synonym_shares_no_word_with_the_name():
    row = {"name": "grinning face", "keywords": ["Grinning Face", "grin", "happy", "smiling face", "teeth", ":)", "*"]}
    assert words(row, "keywords") == ["grin", "happy", "smiling face", "teeth"]
    assert words(row, "synonyms") == ["happy", "teeth"]


def test_cases_have_prompts_of_held_out_keywords_if_the_config_holds_some_out():
    records = scan(DataConfig(folder=PICTURES, image_size=32)).train
    rows = read_metadata(PICTURES)
    made = choose_cases(records, rows, 200, 0, hold_out=0.5)
    assert len(made) >= 2 and "unseen" not in cases()[0][0].prompts
    for case in made:
        row = rows[records[case.index].name]
        held_out = [word for word in words(row, "synonyms") if is_held_out(word, 0.5)]
        assert held_out and case.prompts["unseen"] != case.prompts["caption"]
        assert any(word in case.prompts["unseen"] for word in held_out) and row["name"] not in case.prompts["unseen"]


def test_too_few_cases_are_refused():
    with pytest.raises(ValueError, match="keywords"):
        choose_cases([], {}, 200, 0)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("recall")
    build_model(folder).save(folder / "model")
    return folder / "model"


def test_an_interrupted_gallery_continues_with_the_same_images(checkpoint, tmp_path):
    from ldm import TextToImage

    model, chosen = TextToImage.load(checkpoint), cases()[0][:4]
    options = dict(batch_size=2, steps=2, seed=0)
    whole = Gallery(model, chosen, tmp_path / "a", "hash", **options).make("caption", 2.0, range(4))
    gallery = Gallery(model, chosen, tmp_path / "b", "hash", **options)
    gallery.make("caption", 2.0, [3])
    made = sorted(gallery.folder.glob("*/*.png"))
    assert [path.name for path in made] == ["0002.png", "0003.png"]
    times = [path.stat().st_mtime_ns for path in made]
    assert [p.tobytes() for p in gallery.make("caption", 2.0, range(4))] == [p.tobytes() for p in whole]
    assert [path.stat().st_mtime_ns for path in made] == times


def test_a_sheet_is_smaller_than_its_limit(tmp_path):
    noise = torch.randint(0, 256, (1000, 1000, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    save_sheet(Image.fromarray(noise.numpy()).resize((1056, 700)), tmp_path / "sheet.webp")
    assert (tmp_path / "sheet.webp").stat().st_size < 400_000


def test_a_small_model_from_end_to_end(checkpoint, tmp_path, capsys):
    arguments = ["--checkpoint", str(checkpoint), "--data", PICTURES, "--output", str(tmp_path / "out")]
    arguments += ["--config", str(ROOT / "configs/ldm/tiny.yaml"), "--pictures", str(tmp_path / "pictures")]
    prompt_recall.main([*arguments, "--steps", "1", "--limit", "2", "--device", "cpu"])
    results = json.loads((tmp_path / "out/results.json").read_text())
    kinds = [(row["kind"], row["guidance_scale"]) for row in results["rows"]]
    scales = (1, 2, 4, 7)
    assert kinds == [("reconstruction", None)] + [(k, s) for k in ("caption", "keywords", "synonyms") for s in scales]
    assert results["queries"] == 2 < results["references"]
    page = (tmp_path / "out/prompt_recall.md").read_text()
    assert page in capsys.readouterr().out and str(tmp_path) not in page
    for name in ("prompts", "guidance", "reconstructions"):
        assert f"({name}.webp)" in page
        with Image.open(tmp_path / "out" / f"{name}.webp") as sheet:
            assert min(sheet.size) > 128


@pytest.mark.parametrize("flags", [["--limit", "1"], ["--checkpoint", "nowhere"], ["--data", "nowhere"]])
def test_wrong_input_ends_in_one_line(flags, checkpoint, tmp_path, capsys):
    arguments = ["--checkpoint", str(checkpoint), "--data", PICTURES, "--output", str(tmp_path / "out")]
    arguments += ["--config", str(ROOT / "configs/ldm/tiny.yaml"), *flags]
    with pytest.raises(SystemExit) as stop:
        prompt_recall.main(arguments)
    assert stop.value.code == 2
    assert capsys.readouterr().err.startswith("error: ")
