"""The layering of packages: a module imports from its own room and from rooms before it.

`ROOMS` lists every folder with modules, from the bottom up. Imports inside functions and under TYPE_CHECKING count too.
Each test names all offenders at once.
"""

from __future__ import annotations

import ast
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from tests.conftest import LONG

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
    "stipple/stages",
    "stipple/stages/data",
    "stipple/stages/autoencoder",
    "stipple/stages/ldm",
    "stipple/stages/classifier",
    "stipple/cli",  # command lines and launching
    "stipple/commands/drawing",  # what drawing commands share
    "stipple/commands",
    "stipple",
    ".",  # the scripts at the root
]
APART = [  # rooms, with all rooms in them, that do not import each other although one comes before the other
    ("conditioning", "autoencoder"),
    ("stipple/training", "autoencoder"),
    ("stipple/training", "conditioning"),
    ("stipple/training", "ldm"),
]
MAX_MODULES = 15  # of one room
MAX_LINES = 300  # of a module
MAX_FUNCTION = 75  # lines: a training loop is one function, so that it can be read from top to bottom
MAX_TEST_MODULES = 20  # of one folder in tests/
PACKAGES = {"autoencoder", "conditioning", "ldm", "stipple", "stipple_core"}
COMMAND_ROOMS = {".", "stipple", "stipple/commands", "stipple/commands/drawing", "stipple/cli"}
HEAVY = {"transformers", "open_clip", "tokenizers", "diffusers"}
SHARED_NAMES = {"__init__", "__main__", "registry"}  # module names that several rooms may have


@dataclass(frozen=True)
class Module:
    """A source file and its imports."""

    path: str  # relative to the root
    tree: ast.Module

    @property
    def room(self) -> str:
        return str(Path(self.path).parent)

    @property
    def stem(self) -> str:
        return Path(self.path).stem

    @property
    def dotted(self) -> str:
        return self.path.removesuffix(".py").replace("/", ".").removesuffix(".__init__")

    @cached_property
    def imports(self) -> frozenset[str]:
        """Dotted names of all imports, also inside functions."""
        return imports(ast.walk(self.tree))

    @cached_property
    def top_imports(self) -> frozenset[str]:
        """Dotted names of the imports at the top level of the module."""
        return imports(self.tree.body)


def imports(nodes: Iterator[ast.AST] | list[ast.stmt]) -> frozenset[str]:
    """Dotted names of what import statements import; a relative import keeps its dots."""
    names = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            module = "." * node.level + (node.module or "")
            names |= {f"{module}.{alias.name}" for alias in node.names} | {module}
    return frozenset(names)


def packages(names: frozenset[str]) -> set[str]:
    return {name.split(".")[0] for name in names}


def sources() -> Iterator[Path]:
    yield from ROOT.glob("*.py")
    for package in PACKAGES:
        yield from (ROOT / package).rglob("*.py")


MODULES = [Module(str(path.relative_to(ROOT)), ast.parse(path.read_text("utf-8"))) for path in sorted(sources())]
BY_NAME = {module.dotted: module for module in MODULES}


def imported_modules(module: Module) -> list[Module]:
    """The modules of ours that a module imports; a name of a package's `__init__` counts as the package's."""
    init = f"{module.room}/__init__.py"
    found = [BY_NAME[name] for name in sorted(module.imports) if name in BY_NAME]
    return [other for other in found if other.path not in (module.path, init)]


def place(module: Module) -> int:
    """The place of a module's room in ROOMS, -1 for an `__init__` of a folder without further modules."""
    return ROOMS.index(module.room) if module.room in ROOMS else -1


def last_place(module: Module) -> int:
    """The last place in ROOMS that a module may import from: its room, or for an `__init__` all rooms in its folder."""
    inside = [each for each in ROOMS if each == module.room or each.startswith(f"{module.room}/")]
    return max(map(ROOMS.index, inside)) if module.stem == "__init__" else ROOMS.index(module.room)


def functions(tree: ast.Module) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    yield from (node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef))


def test_every_folder_with_modules_is_a_room_in_the_list():
    rooms = {module.room for module in MODULES if module.stem != "__init__"}
    packages_alone = {module.room for module in MODULES} - rooms  # an `__init__.py` with nothing but a docstring
    missing, empty = sorted(rooms - set(ROOMS)), sorted(set(ROOMS) - rooms - packages_alone)
    assert not missing, f"add these folders to ROOMS, in their order: {missing}"
    assert not empty, f"these folders in ROOMS have no modules: {empty}"


def test_a_module_imports_from_its_own_room_and_from_rooms_before_it():
    later = [
        f"{module.path} imports {other.path}"
        for module in MODULES
        for other in imported_modules(module)
        if place(other) > last_place(module)
    ]
    assert not later, "\n".join(later)


def test_an_init_may_import_from_the_rooms_of_its_package_but_not_from_later_packages():
    init = BY_NAME["autoencoder"]
    assert last_place(init) == ROOMS.index("autoencoder/losses")
    assert last_place(init) < place(BY_NAME["conditioning.interface.context"])
    assert last_place(init) < place(BY_NAME["stipple.training.trainer"])


def test_no_imports_run_in_a_circle():
    done, circles = set(), []

    def visit(module: Module, path: tuple[str, ...]) -> None:
        if module.path in path:
            circles.append(" -> ".join([*path[path.index(module.path) :], module.path]))
        elif module.path not in done:
            for other in imported_modules(module):
                visit(other, (*path, module.path))
            done.add(module.path)

    for module in MODULES:
        visit(module, ())
    assert not circles, "\n".join(circles)


def test_rooms_that_are_apart_do_not_import_each_other():
    both_ways = [pair for lower, upper in APART for pair in ((lower, upper), (upper, lower))]
    wrong = [
        f"{module.path} imports {other.path}"
        for one, another in both_ways
        for module in MODULES
        if module.path.startswith(f"{one}/")
        for other in imported_modules(module)
        if other.path.startswith(f"{another}/")
    ]
    assert not wrong, "\n".join(wrong)


def test_no_room_has_too_many_modules():
    counts = {room: sum(module.room == room and module.stem != "__init__" for module in MODULES) for room in ROOMS}
    crowded = {room: count for room, count in counts.items() if count > MAX_MODULES}
    assert not crowded, f"more than {MAX_MODULES} modules: {crowded}"
    counts = Counter(str(path.parent.relative_to(ROOT)) for path in (ROOT / "tests").rglob("*.py"))
    crowded = {folder: count for folder, count in counts.items() if count > MAX_TEST_MODULES}
    assert not crowded, f"more than {MAX_TEST_MODULES} modules: {crowded}"


def test_modules_and_functions_are_short():
    lines = {module.path: len((ROOT / module.path).read_text("utf-8").splitlines()) for module in MODULES}
    long = [f"{path} has {count} lines" for path, count in lines.items() if count > MAX_LINES]
    long += [
        f"{module.path} {each.name} has {each.end_lineno - each.lineno + 1} lines"
        for module in MODULES
        for each in functions(module.tree)
        if each.end_lineno - each.lineno + 1 > MAX_FUNCTION
    ]
    assert not long, "\n".join(long)


def test_contributing_states_these_limits():
    text = (ROOT / "CONTRIBUTING.md").read_text("utf-8")
    assert f"A module has at most {MAX_LINES} lines, a function {MAX_FUNCTION};" in text


def test_every_module_has_a_name_of_its_own():
    paths: dict[str, list[str]] = {}
    for module in MODULES:
        if module.room != "." and module.stem not in SHARED_NAMES:
            paths.setdefault(module.stem, []).append(module.path)
    shared = {stem: same for stem, same in paths.items() if len(same) > 1}
    assert not shared, f"modules with the same name: {shared}"


def test_files_of_long_tests_exist():
    files = {path.stem for path in (ROOT / "tests").rglob("test_*.py")}
    assert not set(LONG) - files, f"LONG in tests/conftest.py names files that do not exist: {set(LONG) - files}"


def test_only_commands_read_a_command_line():
    wrong = [
        module.path for module in MODULES if module.room not in COMMAND_ROOMS and "argparse" in packages(module.imports)
    ]
    assert not wrong, f"argparse is only for commands: {wrong}"


def test_imports_are_absolute():
    wrong = [module.path for module in MODULES if any(name.startswith(".") for name in module.imports)]
    assert not wrong, f"relative imports: {wrong}"


def test_importing_a_package_imports_nothing_heavy():
    """Names of `__init__.py` that need torch or transformers must be imported when they are used."""
    inits = [BY_NAME[package] for package in sorted(PACKAGES)]
    wrong = [module.path for module in inits if packages(module.top_imports) & {"torch", "numpy", *HEAVY}]
    assert not wrong, f"heavy imports: {wrong}"


def test_heavy_libraries_are_imported_only_where_they_are_used():
    """Then `--help` answers at once."""
    wrong = [module.path for module in MODULES if packages(module.top_imports) & HEAVY]
    assert not wrong, f"import {sorted(HEAVY)} inside functions: {wrong}"


def test_the_rules_see_imports_inside_functions_and_relative_ones():
    source = "def f():\n    from autoencoder.networks import Encoder\n"
    source += "import argparse\nfrom . import x\nfrom ldm import unet\n"
    found = imports(ast.walk(ast.parse(source)))
    assert {"autoencoder.networks", "argparse", ".", "ldm.unet"} <= found
