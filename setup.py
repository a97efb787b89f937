"""Builds the package; all settings but one are in pyproject.toml.

The configs lie next to the package, where they are edited. A wheel has a copy
of them inside the package, so that `--config=demo` works without a clone.
"""

import pathlib
import shutil

from setuptools import setup
from setuptools.command import build_py


class BuildWithConfigs(build_py.build_py):
  """Adds configs/ to the built package as zofo_jax/configs."""

  def run(self):
    super().run()
    if self.editable_mode:  # finds the clone's own
      return
    for file in config_files():
      target = pathlib.Path(self.build_lib, "zofo_jax", file)
      target.parent.mkdir(parents=True, exist_ok=True)
      shutil.copyfile(file, target)

  def get_source_files(self):
    """Returns what an archive of the sources needs."""
    return [*super().get_source_files(), *map(str, config_files())]


def config_files():
  return sorted(pathlib.Path("configs").rglob("*.py"))


setup(cmdclass={"build_py": BuildWithConfigs})
