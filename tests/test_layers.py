"""The layering rule, enforced by reading imports.

scripts -> stages -> {ldm, training} -> {autoencoder, conditioning, storage}, with operators and embedders below all.

One module is open to all rooms but training: storage.weights. Weights of strangers are read in one place, because what
must be guarded against there (code in pickles, truncation, missing shards, shapes) is the same for all networks.
Inside ldm/ the mathematics knows neither networks nor files. tests/ and benchmarks/ may import what they like.
"""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SCRIPTS = {path.stem for path in ROOT.glob("*.py")}
PACKAGES = {  # what each may import of ours
    "operators": set(),
    "embedders": set(),
    "autoencoder": {"operators", "embedders"},
    "conditioning": {"embedders"},
    "storage": set(),
    "training": {"storage"},
    "stages": {"ldm", "training", "autoencoder", "conditioning", "storage", "operators", "embedders"},
    "ldm": {"operators"},  # and more in the modules that put rooms together, below
}
# modules of ldm that put rooms together
WHOLE_MODELS = {
    "agreement",
    "developing",
    "pipeline",
    "planning",
    "imagining",
    "run",
    "sources",
    "parts",
    "single_file",
}
OUTSIDE_LDM = {"autoencoder", "conditioning", "storage"}
WEIGHTS = "storage.weights"  # imports nothing of ours itself
READ_WEIGHTS = ["autoencoder", "conditioning", "ldm/compvis.py", "ldm/interop.py", "ldm/lora.py", "ldm/classifier.py"]
INSIDE_LDM = {  # what each module of ldm may import of ldm
    "levels": set(),
    "tables": {"levels"},
    "continuous": {"levels"},
    "schedule": {"levels", "tables", "continuous"},
    "prediction": set(),
    "guidance": set(),
    "combines": {"guidance", "schedule"},
    "perturbed_attention": {"guidance"},
    "guidance_by_gradient": {"guidance", "prediction", "schedule"},
    "guidances": {"guidance", "combines", "perturbed_attention", "denoiser"},
    "attention": set(),
    "blocks": {"attention"},
    "unet_config": set(),
    "denoiser": {"schedule", "prediction"},
    "loss": {"denoiser"},
    "consistency": {"denoiser", "guidance", "prediction", "schedule"},
    "densities": {"schedule"},
    "times": {"schedule"},
    "walk": {"schedule", "times"},
    "variational_bound": {"schedule", "walk"},
    "likelihood": {"ode", "schedule", "variational_bound", "walk"},
    "inpainting": {"guidance", "schedule", "walk"},
    "onestep": {"schedule", "walk"},
    "interpolation": set(),
    "multistep": {"interpolation", "schedule", "prediction", "walk"},
    "singlestep": {"schedule", "walk"},
    "probability_flow": {"ode", "schedule", "walk"},
    "ode": set(),
    "stochastic": {"interpolation", "onestep", "schedule", "times", "walk"},
    "langevin": {"schedule", "walk"},
    "windows": {"perturbed_attention"},
    "learned_variance": set(),
    "samplers": {
        "langevin",
        "multistep",
        "onestep",
        "probability_flow",
        "singlestep",
        "stochastic",
        "times",
        "walk",
    },
    "settings": {"guidances", "onestep", "samplers", "times", "windows"},
    "known_schedulers": set(),
    "scheduling": {"known_schedulers", "samplers", "schedule", "prediction", "times"},
    "unet": {"attention", "blocks", "unet_config"},
    "classifier": {"attention", "blocks", "options", "prediction", "schedule", "unet", "unet_config"},
    "leads": {"classifier", "guidance", "guidance_by_gradient", "schedule", "settings"},
    "reading": {"unet", "attention", "perturbed_attention"},
    "known_options": set(),
    "options": {"unet", "known_options"},
    "compvis_names": {"unet"},
    "compvis": {"unet", "compvis_names"},
    "compvis_schedule": {"schedule"},
    "schedule_buffers": {"schedule", "tables"},
    "prior_config": set(),
    "prior_options": {"prior_config"},
    "prior": {"blocks", "prior_config", "unet"},
    "networks": {"options", "prior", "prior_config", "prior_options", "unet"},
    "interop": {"networks", "scheduling"},
    "lora": set(),
}
MODULES = sorted(path for package in PACKAGES for path in (ROOT / package).rglob("*.py"))
LDM_MODULES = sorted((ROOT / "ldm").glob("*.py"))
OURS = set(PACKAGES) | SCRIPTS | {"tests", "benchmarks"}


def imports(source: str) -> set[str]:
    """Dotted names of all that a source text imports, also inside functions; a relative import comes as it is."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            module = "." * node.level + (node.module or "")
            found |= {f"{module}.{alias.name}" for alias in node.names} | {module}
    return found


def packages(path: Path) -> set[str]:
    return {name.split(".")[0] for name in imports(path.read_text())}


def name(path: Path) -> str:
    return str(path.relative_to(ROOT))


@pytest.mark.parametrize("path", MODULES, ids=name)
def test_a_package_imports_only_the_layers_below_it(path):
    package = path.relative_to(ROOT).parts[0]
    whole = package == "ldm" and path.stem in WHOLE_MODELS
    allowed = PACKAGES[package] | {package} | (OUTSIDE_LDM if whole else set())
    found = imports(path.read_text())
    if any(name(path).startswith(place) for place in READ_WEIGHTS):
        found = {dotted for dotted in found if dotted != WEIGHTS and not dotted.startswith(f"{WEIGHTS}.")}
    assert {dotted.split(".")[0] for dotted in found} & OURS <= allowed


def test_the_module_that_all_rooms_may_import_imports_nothing_of_ours_but_what_reads_safetensors():
    ours = {dotted for dotted in imports((ROOT / WEIGHTS.replace(".", "/")).with_suffix(".py").read_text())}
    assert {dotted for dotted in ours if dotted.split(".")[0] in OURS} <= {"storage", "storage.safe_tensors"}
    assert not packages(ROOT / "storage" / "safe_tensors.py") & OURS


@pytest.mark.parametrize("path", MODULES, ids=name)
def test_a_package_reads_no_command_line(path):
    assert "argparse" not in packages(path)


@pytest.mark.parametrize("path", MODULES, ids=name)
def test_imports_across_packages_are_absolute(path):
    assert not [found for found in imports(path.read_text()) if found.startswith(".")]


@pytest.mark.parametrize("path", LDM_MODULES, ids=name)
def test_modules_of_ldm_import_only_what_they_build_on(path):
    if path.stem == "__init__" or path.stem in WHOLE_MODELS:
        return  # names what is public; puts all together
    found = {dotted.split(".")[1] for dotted in imports(path.read_text()) if dotted.startswith("ldm.")}
    assert path.stem in INSIDE_LDM, f"say in INSIDE_LDM what {path.stem} may import"
    assert found <= INSIDE_LDM[path.stem]


@pytest.mark.parametrize("package", PACKAGES)
def test_importing_a_package_itself_imports_nothing_heavy(package):
    """Names of `__init__.py` that need torch or transformers must be fetched when they are used."""
    source = (ROOT / package / "__init__.py").read_text() if (ROOT / package / "__init__.py").exists() else ""
    top = {alias.name for node in ast.parse(source).body if isinstance(node, ast.Import) for alias in node.names}
    top |= {node.module for node in ast.parse(source).body if isinstance(node, ast.ImportFrom)}
    assert not {found.split(".")[0] for found in top} & {"torch", "transformers", "open_clip", "diffusers", "numpy"}


@pytest.mark.parametrize("path", MODULES, ids=name)
def test_heavy_text_encoders_are_imported_only_where_used(path):
    """`txt2img.py --help` answers at once."""
    heavy = {"transformers", "open_clip", "tokenizers", "diffusers"}
    body = [node for node in ast.parse(path.read_text()).body if isinstance(node, ast.Import | ast.ImportFrom)]
    at_import = imports("\n".join(ast.unparse(node) for node in body))
    assert not {found.split(".")[0] for found in at_import} & heavy


def test_the_rule_would_notice_a_breach():
    breach = "def f():\n    from autoencoder.networks import Encoder\n"
    breach += "import argparse\nfrom . import x\nfrom ldm import unet\n"
    assert {"autoencoder.networks", "argparse", ".", "ldm.unet"} <= imports(breach)
