"""Suggestions for misspelled names."""

from stipple_core.nearest import did_you_mean


def test_the_most_similar_choice_is_suggested():
    assert did_you_mean("stpes", ["steps", "seed"]) == "steps"
    assert did_you_mean("zzz", iter(["steps"])) == "steps"


def test_there_is_no_suggestion_below_the_cutoff_or_without_choices():
    assert did_you_mean("zzz", ["steps"], cutoff=0.5) == ""
    assert did_you_mean("zzz", []) == ""
