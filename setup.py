"""Adds the recipes and the shipped model to the wheel; everything else about the package is in setup.cfg."""

from pathlib import Path
from shutil import copytree, rmtree

from setuptools import setup
from setuptools.command.build_py import build_py

RESOURCES = ("configs", "checkpoints/emoji")  # found by `stipple_core.resources.resource`


class BuildWithResources(build_py):
    """Copies RESOURCES into the package `stipple`; an editable install reads them from the checkout."""

    def run(self):
        rmtree(self.build_lib, ignore_errors=True)  # modules of an earlier build that do not exist any more
        super().run()
        if not self.editable_mode:
            for folder in RESOURCES:
                copytree(folder, Path(self.build_lib) / "stipple" / folder, dirs_exist_ok=True)


setup(cmdclass={"build_py": BuildWithResources})
