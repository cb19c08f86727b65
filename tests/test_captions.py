"""Captions: templates over columns, and text made clean."""

from __future__ import annotations

from collections import Counter

import pytest

from storage.captions import MAX_LENGTH, clean, columns_of, expand
from storage.dataset import DataConfig, Record, draw_caption
from storage.randomness import generator


@pytest.mark.parametrize("template", ["{", "{}", "{a!r}", "{a:>9}", "a}"])
def test_malformed_templates_are_refused(template):
    with pytest.raises(ValueError, match="caption template"):
        DataConfig(folder="x", captions=[template])


def test_templates_read_columns_and_never_attributes():
    assert columns_of("{{{a.__class__}}} {b[0]} {b[0]}") == ("a.__class__", "b[0]")
    row = {"a.__class__": "A", "b[0]": ["x", "y"], "a": "no"}
    assert expand("{{{a.__class__}}} {b[0]}", ("a.__class__", "b[0]"), row) == ("{A} x", "{A} y")
    assert expand("{a.__class__}", ("a.__class__",), {"a": "x"}) == ()


def test_list_columns_expand_to_all_combinations_up_to_a_limit():
    row = {"a": ["1", "2"], "b": ["x", "", None, "y"], "n": 7}
    assert expand("{a}{b}{n}", ("a", "b", "n"), row) == ("1x7", "1y7", "2x7", "2y7")
    with pytest.raises(ValueError, match="more than"):
        expand("{a}{b}", ("a", "b"), {"a": ["x"] * 2000, "b": ["y"] * 2000})


def test_cleaning_text_is_idempotent_and_keeps_emoji_and_accents():
    for text in ("a  b\n\tc ", "e\u0301t\xe9", "\U0001f469\u200d\U0001f680 astronaut", "雪だるま", "a\xa0b"):
        assert clean(clean(text)) == clean(text)
    assert clean(" a  b\n\tc ") == "a b c"
    assert clean("e\u0301") == "\xe9"
    assert clean("\U0001f469\u200d\U0001f680") == "\U0001f469\u200d\U0001f680"
    for text in ("", " \n", "a\0b", "a\x1bb", "a\ud800b", "x" * (MAX_LENGTH + 1)):
        with pytest.raises(ValueError):
            clean(text)


def test_captions_are_drawn_template_first():
    record = Record("", "", (("rare",), tuple(f"word {i}" for i in range(9)), ("rare",)))
    drawn = Counter(draw_caption(record, generator(0, "caption", i)) for i in range(900))
    assert 540 < drawn["rare"] < 660
    assert len(drawn) == 10 and all(15 < drawn[f"word {i}"] < 60 for i in range(9))
