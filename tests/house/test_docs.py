"""The documentation: links lead somewhere, paths that it names exist, and the README stays short."""

import re
import shlex
from pathlib import Path

import pytest

from stipple.__main__ import DRAWING, OTHERS, TRAINING

ROOT = Path(__file__).parents[2]
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), *ROOT.glob("checkpoints/**/README.md")])
LINK = re.compile(r"\]\(([^)\s]+)\)")
CODE_PATH = re.compile(r"`((?:stipple|stipple_core|ldm|autoencoder|conditioning|tests|benchmarks)/[\w/.-]+)`")
COMMAND = re.compile(r"^ *(?:\$ )?stipple +([\w-]+)", re.MULTILINE)


FILE = re.compile(
    r"(?<![\w/.-])((?:stipple|stipple_core|ldm|autoencoder|conditioning|tests|benchmarks|docs|configs)/[\w/-]+\.(?:py|md|yaml))\b"
)
OF_THE_SHELL = ("stipple: command not found",)
PACKAGES = ("stipple", "stipple_core", "ldm", "autoencoder", "conditioning", "benchmarks", "tests")


def page(path: Path) -> str:
    return str(path.relative_to(ROOT))


def anchors(text: str) -> set[str]:
    """The anchors of a page's headings, as code hosts and mkdocs make them."""
    headings = re.findall(r"^#+ +(.*)$", re.sub(r"```.*?```", "", text, flags=re.DOTALL), re.MULTILINE)
    plain = (re.sub(r"[^\w\- ]", "", re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", each)).lower() for each in headings)
    return {re.sub(r"[\s]+", "-", each.strip()) for each in plain}


@pytest.mark.parametrize("path", PAGES, ids=page)
def test_links_of_a_page_point_to_files_and_headings(path):
    for target in LINK.findall(re.sub(r"```.*?```", "", path.read_text("utf-8"), flags=re.DOTALL)):
        if "://" in target:
            continue
        name, _, anchor = target.partition("#")
        file = (path.parent / name).resolve() if name else path
        assert file.exists(), target
        if anchor:
            assert anchor in anchors(file.read_text("utf-8")), target


@pytest.mark.parametrize("path", PAGES, ids=page)
def test_code_that_a_page_names_exists(path):
    absent = [name for name in CODE_PATH.findall(path.read_text("utf-8")) if not (ROOT / name).exists()]
    recipes = {str(file.relative_to(ROOT / "configs").with_suffix("")) for file in ROOT.glob("configs/*/*.yaml")}
    assert not [name for name in absent if "NAME" not in name and name not in recipes]


def test_files_that_modules_and_configs_name_exist():
    modules = [*ROOT.glob("*.py"), *(path for package in PACKAGES for path in (ROOT / package).rglob("*.py"))]
    absent = [
        f"{page(path)}: {name}"
        for path in [*modules, *ROOT.glob("configs/**/*.yaml"), ROOT / "setup.cfg"]
        for name in FILE.findall(path.read_text("utf-8"))
        if not (ROOT / name).exists() and "KIND" not in name  # a placeholder
    ]
    assert not absent, "\n".join(absent)


@pytest.mark.parametrize("path", PAGES, ids=page)
def test_commands_of_a_page_exist(path):
    assert set(COMMAND.findall(path.read_text("utf-8"))) <= {*DRAWING, *TRAINING, *OTHERS, "COMMAND"}


def test_every_recipe_is_in_the_page_of_recipes():
    text = (ROOT / "docs/recipes.md").read_text("utf-8")
    recipes = {file.stem for file in ROOT.glob("configs/*/*.yaml") if file.parent.name != "accelerate"}
    assert not {name for name in recipes if not re.search(rf"\b{re.escape(name)}`", text)}


def test_the_readme_states_the_number_of_recipes():
    recipes = [file for file in ROOT.glob("configs/*/*.yaml") if file.parent.name != "accelerate"]
    assert f"There are {len(recipes)} recipes" in (ROOT / "README.md").read_text("utf-8")


def test_messages_on_the_page_of_troubleshooting_are_in_the_source():
    """The first word of a message may be a value, such as the path of a run folder."""
    source = "".join(path.read_text("utf-8") for package in PACKAGES[:-2] for path in (ROOT / package).rglob("*.py"))
    text = (ROOT / "docs/troubleshooting.md").read_text("utf-8")
    messages = [message for row in re.findall(r"^\| (`[^|]*`) \|", text, re.MULTILINE) for message in [row.strip("`")]]
    messages = [message for message in messages if message not in OF_THE_SHELL]
    assert len(messages) >= 5
    assert not [each for each in messages if each not in source and each.partition(" ")[2] not in source]


def test_the_readme_is_short_and_its_tables_are_narrow():
    text = (ROOT / "README.md").read_text("utf-8")
    assert len(text.split()) <= 900
    assert not [line for line in text.splitlines() if line.startswith("|") and len(line) > 120]


def test_the_map_is_short():
    assert len((ROOT / "ARCHITECTURE.md").read_text("utf-8").splitlines()) <= 120


def test_shell_blocks_can_be_parsed():
    for path in PAGES:
        for block in re.findall(r"```bash\n(.*?)```", path.read_text("utf-8"), re.DOTALL):
            for line in block.replace("\\\n", " ").splitlines():
                shlex.split(line, comments=True)
