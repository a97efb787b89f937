"""New tasks from a few rows, on one or more meta-trained backbones.

  zofo adapt --config=adapt:run=runs/meta --workdir=runs/adapt

Several runs are joined by "+", and so are tasks (`task=emo+cr`; the default is
the tasks that the first run holds out). The bare model is always evaluated as
well; without `run` it is the only one. All other fields are those of the first
run.
"""

from etils import epath

from zofo_jax.builders import run
from zofo_jax.config import defaults, files, paths


def get_config(arg: str = ""):
  """Returns the config of `run=...,task=...,start=...,model=...`."""
  args = files.parse_arg(
    arg, run="", task="", start="mean", model="facebook/opt-1.3b"
  )
  runs = filter(None, args["run"].split("+"))
  folders = tuple(map(paths.expand, runs))
  config = defaults.base_config()
  config.model.name = args["model"]
  # The command reports a run that does not exist.
  if folders and (epath.Path(folders[0]) / "config.json").exists():
    config = run.read_config(epath.Path(folders[0]))
  config.command = "adapt"
  config.adapt.runs = folders
  config.adapt.tasks = tuple(filter(None, args["task"].split("+")))
  config.adapt.start = args["start"]
  return config
