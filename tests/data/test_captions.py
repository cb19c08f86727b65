"""Captions: templates over columns, and text cleaning."""

from __future__ import annotations

import random
import time
import unicodedata
from collections import Counter
from collections.abc import Iterator

import pytest

from stipple_core.data.dataset import draw_caption
from stipple_core.data.records.captions import DRAWS, MAX_LENGTH, clean, columns_of, expand, fields_of
from stipple_core.data.records.data_config import DataConfig
from stipple_core.data.records.records import Record
from stipple_core.data.records.rows import is_held_out, without_held_out
from stipple_core.randomness import generator


@pytest.mark.parametrize("template", ["{", "{}", "{a!r}", "{a:>9}", "{a:0}", "a}"])
def test_malformed_templates_are_errors(template):
    with pytest.raises(ValueError, match="caption template"):
        DataConfig(folder="x", captions=[template])


def test_templates_use_columns_and_never_attributes():
    assert columns_of("{{{a.__class__}}} {b[0]} {b[0]}") == ("a.__class__", "b[0]")
    row = {"a.__class__": "A", "b[0]": ["x", "y"], "a": "no"}
    assert expand("{{{a.__class__}}} {b[0]}", ("a.__class__", "b[0]"), row) == ("{A} x", "{A} y")
    assert expand("{a.__class__}", ("a.__class__",), {"a": "x"}) == ()


def test_list_columns_expand_to_all_combinations_up_to_a_limit():
    row = {"a": ["1", "2"], "b": ["x", "", None, "y"], "n": 7}
    assert expand("{a}{b}{n}", ("a", "b", "n"), row) == ("1x7", "1y7", "2x7", "2y7")
    with pytest.raises(ValueError, match="more than"):
        expand("{a}{b}", ("a", "b"), {"a": ["x"] * 2000, "b": ["y"] * 2000})


def test_a_hash_selects_several_elements_of_a_list_which_are_joined_with_commas():
    row, template = {"name": "cat", "words": list("abcdefgh")}, "{name}: {words:3}"
    assert fields_of(template) == ("name", "words:3") and columns_of(template) == ("name", "words")
    captions = expand(template, fields_of(template), row)
    assert captions == expand(template, fields_of(template), row) and len(set(captions)) == DRAWS
    for caption in captions:
        drawn = caption.removeprefix("cat: ").split(", ")
        assert len(set(drawn)) == 3 and set(drawn) <= set(row["words"])
    (both,) = {frozenset(text.split(", ")) for text in expand("{words:9}", ("words:9",), {"words": ["a", "b"]})}
    assert both == {"a", "b"} and expand("{words:2}", ("words:2",), {"words": []}) == ()


def test_held_out_values_are_in_no_caption_in_any_row_or_case():
    words = [f"word {number}" for number in range(400)]
    held_out = {word for word in words if is_held_out(word, 0.25)}
    assert 60 < len(held_out) < 140 and all(is_held_out(word.upper(), 0.25) for word in held_out)
    row = {"name": "cat", "words": words, "one": next(iter(held_out))}
    shown = without_held_out(row, {"words": 0.25, "one": 0.25})
    assert shown["name"] == "cat" and set(shown["words"]) == set(words) - held_out and shown["one"] is None
    with pytest.raises(ValueError, match="data.hold_out.words is 1.5; it is a fraction"):
        DataConfig(folder="x", hold_out={"words": 1.5})


def test_cleaning_text_is_idempotent_and_keeps_emoji_and_accents():
    for text in ("a  b\n\tc ", "e\u0301t\xe9", "\U0001f469\u200d\U0001f680 astronaut", "雪だるま", "a\xa0b"):
        assert clean(clean(text)) == clean(text)
    assert clean(" a  b\n\tc ") == "a b c"
    assert clean("e\u0301") == "\xe9"
    assert clean("\U0001f469\u200d\U0001f680") == "\U0001f469\u200d\U0001f680"
    for text in ("", " \n", "\0\x1b\x85", "\r\n"):
        with pytest.raises(ValueError, match="empty"):
            clean(text)


def test_invalid_characters_are_replaced_and_long_text_is_truncated():
    assert clean("a\0b\x1b\x7f\x85c") == "a b c"
    assert clean("a\ud800b\udc00") == "a\ufffdb\ufffd" and clean("\ud83d\ude00") == "\N{GRINNING FACE}"
    assert clean("x" * 1_000_000) == "x" * MAX_LENGTH
    assert clean("word " * 10_000) == ("word " * (MAX_LENGTH // 5)).strip()


def test_long_runs_of_accents_do_not_take_quadratic_time():
    started = time.perf_counter()
    clean("a" + "\u0301\u0323" * 500_000)  # sorting them all takes 1.5 seconds for 100,000
    assert time.perf_counter() - started < 3


def test_any_text_becomes_one_line_of_encodable_nfc_and_cleaning_is_idempotent():
    for text in random_texts(2_000):
        check(text)


@pytest.mark.slow
def test_a_million_texts_become_one_line_of_nfc():
    for text in random_texts(1_000_000):
        check(text)


def random_texts(count: int) -> Iterator[str]:
    """Texts of ordinary, combining, control, private, surrogate and unassigned characters."""
    draw = random.Random(0)
    ranges = [(32, 126), (0, 160), (0x300, 0x370), (0x1100, 0x1200), (0xD7F0, 0xE010), (0xFB00, 0xFFFF), (0, 0x10FFFF)]
    for _ in range(count):
        yield "".join(chr(draw.randint(*draw.choice(ranges))) for _ in range(draw.randint(0, 24)))


def check(text: str) -> None:
    """Check what the docstring of `clean` specifies."""
    try:
        cleaned = clean(text)
    except ValueError:
        assert not "".join(character for character in text if unicodedata.category(character) != "Cc").strip()
        return
    assert clean(cleaned) == cleaned == " ".join(cleaned.split()) == unicodedata.normalize("NFC", cleaned) != ""
    assert not any(unicodedata.category(character) in ("Cc", "Cs") for character in cleaned)
    assert len(cleaned) <= MAX_LENGTH and cleaned.encode().decode() == cleaned


def test_captions_are_drawn_template_first():
    record = Record("", "", (("rare",), tuple(f"word {i}" for i in range(9)), ("rare",)))
    drawn = Counter(draw_caption(record, generator(0, "caption", i)) for i in range(900))
    assert 540 < drawn["rare"] < 660
    assert len(drawn) == 10 and all(15 < drawn[f"word {i}"] < 60 for i in range(9))
