"""A few rows of new tasks, on one or more meta-trained backbones.

  python -m zofo_jax.main --config=configs/adapt.py:run=runs/meta \
      --workdir=runs/adapt

Several runs are joined by "+", and so are tasks (`task=emo+cr`; without, the
tasks that the first run holds out). The bare model is always there to compare
with; without any run it is alone. What is not said here is as in the first run.
"""

from etils import epath

from zofo_jax.builders import run
from zofo_jax.config import defaults


def get_config(arg: str = ""):
  """Returns the config of `run=...,task=...,start=...,model=...`."""
  args = defaults.parse_arg(
    arg, run="", task="", start="mean", model="facebook/opt-1.3b"
  )
  folders = tuple(filter(None, args["run"].split("+")))
  config = defaults.base_config()
  config.model.name = args["model"]
  # A run that is not there is noticed by the command.
  if folders and (epath.Path(folders[0]) / "config.json").exists():
    config = run.read_config(epath.Path(folders[0]))
  config.command = "adapt"
  config.adapt.runs = folders
  config.adapt.tasks = tuple(filter(None, args["task"].split("+")))
  config.adapt.start = args["start"]
  return config
