"""The order of the rooms, enforced by reading imports: a module imports from its own room and from rooms before it.

`ROOMS` lists every folder with code, from the bottom up. Inside a room, and over all files, no imports run in a circle,
also where they stand inside functions or under TYPE_CHECKING.
"""

import ast
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
ROOMS = [
    "stipple_core/operators",  # fast arithmetic for layers
    "stipple_core/files",  # weights, checkpoints, state on disk
    "stipple_core",  # configs, addressed randomness, files of prompts
    "stipple_core/images",
    "stipple_core/data/records",
    "stipple_core/data/sources",
    "stipple_core/data",
    "stipple_core/latent_cache",
    "stipple_core/embedders",  # frozen CLIPs
    "autoencoder/networks",
    "autoencoder/formats",
    "autoencoder",
    "autoencoder/losses",
    "conditioning/interface",
    "conditioning/tokenizers",
    "conditioning/encoders",
    "conditioning/classes",
    "conditioning/layouts",
    "conditioning/text",
    "conditioning/hints",
    "conditioning/readers",
    "conditioning/formats",
    "conditioning",
    "ldm/schedules",
    "ldm/denoising",
    "ldm/networks",
    "ldm/samplers",
    "ldm/guidance",
    "ldm/losses",
    "ldm/likelihood",
    "ldm/formats/diffusers",
    "ldm/formats/compvis",
    "ldm/formats",
    "ldm/sampling",
    "ldm",
    "stipple/training/distributed",
    "stipple/training/optimization",
    "stipple/training/run",
    "stipple/training",
    "stipple/stages/data",
    "stipple/stages/autoencoder",
    "stipple/stages/ldm",
    "stipple/stages/classifier",
    "stipple/cli",  # the front door's machinery: parsing, launching
    "stipple/commands/drawing",  # what the drawing commands share
    "stipple/commands",
    "stipple",
    ".",  # the scripts at the root
]
APART = [  # rooms, with all in them, that know nothing of each other although one comes before the other
    ("conditioning", "autoencoder"),
    ("stipple/training", "autoencoder"),
    ("stipple/training", "conditioning"),
    ("stipple/training", "ldm"),
]
MOST_MODULES = 15  # of one room
OURS = {"autoencoder", "conditioning", "ldm", "stipple", "stipple_core"}
HEAVY = {"transformers", "open_clip", "tokenizers", "diffusers"}
FILES = sorted(path for room in ROOMS for path in (ROOT / room).glob("*.py"))
MODULES = {
    str(path.relative_to(ROOT).with_suffix("")).replace("/", ".").removesuffix(".__init__"): path for path in FILES
}


def statements(source: str) -> list[ast.Import | ast.ImportFrom]:
    """Every import of a source text, also inside functions."""
    return [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Import | ast.ImportFrom)]


def imports(source: str) -> set[str]:
    """Dotted names of all that a source text imports; a relative import comes as it is."""
    found = set()
    for node in statements(source):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        else:
            module = "." * node.level + (node.module or "")
            found |= {f"{module}.{alias.name}" for alias in node.names} | {module}
    return found


@cache
def imported_modules(path: Path) -> frozenset[Path]:
    """The files of ours that a file imports; a name of a package's `__init__` counts as the package's."""
    found = {MODULES[name] for name in imports(path.read_text()) if name in MODULES}
    return frozenset(found - {path, path.with_name("__init__.py")})


def room(path: Path) -> str:
    return str(path.parent.relative_to(ROOT))


def name(path: Path) -> str:
    return str(path.relative_to(ROOT))


def test_every_folder_with_code_is_a_room_in_the_list():
    folders = {room(path) for package in OURS for path in (ROOT / package).rglob("*.py")}
    assert folders | {"."} == set(ROOMS)


@pytest.mark.parametrize("path", FILES, ids=name)
def test_a_module_imports_from_its_own_room_and_from_rooms_before_it(path):
    own = ROOMS.index(room(path))
    above = [name(other) for other in imported_modules(path) if ROOMS.index(room(other)) > own]
    assert path.name == "__init__.py" or not above


def test_no_imports_run_in_a_circle():
    done, circles = set(), []

    def walk(path: Path, way: tuple[Path, ...]) -> None:
        if path in way:
            circles.append([name(each) for each in way[way.index(path) :]])
        elif path not in done:
            for other in imported_modules(path):
                walk(other, (*way, path))
            done.add(path)

    for path in FILES:
        walk(path, ())
    assert not circles


@pytest.mark.parametrize(("lower", "upper"), APART)
def test_some_rooms_know_nothing_of_each_other(lower, upper):
    for one, other in ((lower, upper), (upper, lower)):
        for path in (ROOT / one).rglob("*.py"):
            assert not [name(each) for each in imported_modules(path) if name(each).startswith(f"{other}/")], name(path)


@pytest.mark.parametrize("folder", ROOMS)
def test_a_room_has_few_modules(folder):
    assert len([path for path in (ROOT / folder).glob("*.py") if path.name != "__init__.py"]) <= MOST_MODULES


def test_a_module_has_a_name_of_its_own():
    names = [
        path.stem
        for path in FILES
        if room(path) != "." and path.stem not in ("__init__", "__main__", "registry", "base")
    ]
    assert sorted(names) == sorted(set(names))


@pytest.mark.parametrize("path", FILES, ids=name)
def test_only_commands_read_a_command_line(path):
    if room(path) not in (".", "stipple", "stipple/cli", "stipple/commands", "stipple/commands/drawing"):
        assert "argparse" not in {found.split(".")[0] for found in imports(path.read_text())}


@pytest.mark.parametrize("path", FILES, ids=name)
def test_imports_are_absolute(path):
    assert not [found for found in imports(path.read_text()) if found.startswith(".")]


@pytest.mark.parametrize("package", sorted(OURS))
def test_importing_a_package_itself_imports_nothing_heavy(package):
    """Names of `__init__.py` that need torch or transformers must be fetched when they are used."""
    source = (ROOT / package / "__init__.py").read_text()
    top = {alias.name for node in ast.parse(source).body if isinstance(node, ast.Import) for alias in node.names}
    top |= {node.module for node in ast.parse(source).body if isinstance(node, ast.ImportFrom)}
    assert not {found.split(".")[0] for found in top} & {"torch", "numpy", *HEAVY}


@pytest.mark.parametrize("path", FILES, ids=name)
def test_heavy_text_encoders_are_imported_only_where_used(path):
    """So that `--help` answers at once."""
    body = [node for node in ast.parse(path.read_text()).body if isinstance(node, ast.Import | ast.ImportFrom)]
    at_import = imports("\n".join(ast.unparse(node) for node in body))
    assert not {found.split(".")[0] for found in at_import} & HEAVY


def test_the_rule_would_notice_a_breach():
    breach = "def f():\n    from autoencoder.networks import Encoder\n"
    breach += "import argparse\nfrom . import x\nfrom ldm import unet\n"
    assert {"autoencoder.networks", "argparse", ".", "ldm.unet"} <= imports(breach)
