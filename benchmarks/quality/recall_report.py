"""The results of prompt recall as a page of Markdown."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

TITLES = {
    "caption": "training caption",
    "keywords": "three keywords",
    "synonyms": "two synonyms",
    "unseen": "keywords held out of all captions",
    "reconstruction": "the reference itself, reconstructed",
}
PAGE = """# Prompt recall

Each of {queries} training pictures, all of other concepts and spread over the styles, was asked for in the words of its
caption; by three of its keywords in place of its name; and by two that share no word with its name (synonyms, or what
it has to do with). {keywords} Recall: of {references} reference pictures the one nearest to
the generated picture is the right one (@1), or the right one is among the nearest five (@5); near by mean squared
difference of 16 x 16 RGB pictures, or of the autoencoder's latents. Chance is {chance_1:.1%} and {chance_5:.1%}. In
parentheses: 95 % binomial (Wilson) interval.

{settings}

{recall}

## Is it memory?

Distance to the nearest of all {training} training pictures: root mean squared difference of 16 x 16 RGB, in gray levels
of 255. A near copy is nearer to it than half the mean distance of its nearest 50 (Carlini et al. 2023,
arXiv:2301.13188). What a perfect memory would show is the row of the references' own reconstructions; what none would,
that of held-out pictures.

{memory}

## Reconstruction

The autoencoder on {held_out} held-out pictures: PSNR {psnr:.2f} dB, SSIM {ssim:.4f}.

## Sheets

Guidance scale {default_scale:g}, first captions the model was trained on, then unseen wordings:

![prompts](prompts.webp)

Guidance scales {sheet_scales}, then the reference picture:

![guidance](guidance.webp)

Held-out pictures above their reconstructions:

![reconstructions](reconstructions.webp)
"""


def write_report(results: Mapping[str, Any]) -> str:
    """Return the Markdown page for the contents of results.json."""
    settings = results["settings"]
    words = "{sampler}, {steps} steps, {height} x {width} pixels, seeds from {seed}, model {model_hash}."
    shown = "Captions contain other keywords, but not those that the config holds out, which are a kind of prompt too."
    return PAGE.format(
        keywords=shown if settings.get("hold_out") else "No caption calls it by its keywords.",
        queries=results["queries"],
        references=results["references"],
        chance_1=results["chance"]["at_1"],
        chance_5=results["chance"]["at_5"],
        settings=words.format(**settings),
        recall=recall_table(results["rows"]),
        training=results["training_pictures"],
        memory=memory_table(results["rows"], results["real"]),
        held_out=results["reconstruction"]["pictures"],
        psnr=results["reconstruction"]["psnr"],
        ssim=results["reconstruction"]["ssim"],
        default_scale=settings["default_guidance_scale"],
        sheet_scales=", ".join(f"{scale:g}" for scale in settings["sheet_scales"]),
    )


def recall_table(rows: list[Mapping[str, Any]]) -> str:
    """Return a table of recall by kind of prompt and guidance scale."""
    titles = ["prompt", "guidance scale"]
    titles += [f"{name}, {space}" for space in ("RGB", "latents") for name in ("@1", "@5", "median rank")]
    lines = [titles, ["---"] * len(titles)]
    for row in rows:
        cells = [TITLES[row["kind"]], _scale(row)]
        for space in ("rgb", "latents"):
            found = row[space]
            cells += [_share(found["at_1"]), _share(found["at_5"]), f"{found['median_rank']:g}"]
        lines.append(cells)
    return _table(lines)


def memory_table(rows: list[Mapping[str, Any]], real: Mapping[str, Mapping[str, float]]) -> str:
    """Return a table of the distances of generated and of real images to the nearest training image."""
    titles = ["picture", "guidance scale", "median distance", "near copies", "nearest is its own reference"]
    lines = [titles, ["---"] * len(titles)]
    for name, found in real.items():
        lines.append([name, "", f"{found['median_distance']:.1f}", f"{found['near_copies']:.1%}", ""])
    for row in rows:
        found = row["nearest_training"]
        shares = [f"{found['near_copies']:.1%}", f"{found['own_reference']:.1%}"]
        lines.append([TITLES[row["kind"]], _scale(row), f"{found['median_distance']:.1f}", *shares])
    return _table(lines)


def _scale(row: Mapping[str, Any]) -> str:
    return "" if row["guidance_scale"] is None else f"{row['guidance_scale']:g}"


def _share(found: Mapping[str, float]) -> str:
    return f"{found['value']:.1%} ({100 * found['low']:.0f}-{100 * found['high']:.0f})"


def _table(lines: list[list[str]]) -> str:
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)
