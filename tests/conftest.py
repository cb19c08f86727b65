"""Set before torch is imported, here and in every process that a test starts."""

import os

import pytest

# the tests' tensors are small: a second thread costs more than it brings, and two busy processes with two each crawl
os.environ.setdefault("OMP_NUM_THREADS", "1")

# files that take 10 CPU seconds or more, the longest first: begun last, one would keep a single process busy at the end
LONG = (
    "test_chain", "test_samplers", "test_kills", "test_resume", "test_finetune_runs", "test_pipeline",
    "test_single_file", "test_launch", "test_convert", "test_redraw", "test_draw", "test_benchmarks", "test_init_from",
    "test_stochastic", "test_likelihood",
    "test_langevin", "test_unet_interop", "test_prompt_kinds", "test_processes", "test_unclip", "test_distillation",
    "test_faults", "test_draw_process", "test_fsdp",
)  # fmt: skip


def pytest_collection_modifyitems(items):
    """Begin with the long files; setup.cfg has xdist keep this order (it would take files of many tests first)."""
    places = {name: place for place, name in enumerate(LONG)}
    items.sort(key=lambda item: places.get(item.path.stem, len(LONG)))


@pytest.fixture(scope="module")
def settings_of_runs():
    """One thread, and the environment of small runs, also for what tests run in this process."""
    import torch

    from tests.helpers.training.tiny_runs import SETTINGS

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        for name, value in SETTINGS.items():
            patch.setenv(name, value)
        yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def autoencoder(tmp_path_factory) -> str:
    """A model folder for stage 2; nothing here depends on how good it is."""
    import torch

    from autoencoder import Autoencoder, AutoencoderConfig

    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("autoencoder")
    config = AutoencoderConfig(block_out_channels=(16, 32, 32), layers_per_block=1, norm_num_groups=8, sample_size=32)
    Autoencoder(config).save(folder)
    return str(folder)
