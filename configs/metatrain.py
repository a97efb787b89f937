"""Meta-training on a group of tasks, and others held out.

  zofo metatrain --config=metatrain:group=sentiment --workdir=runs/meta

`method=peft`, `full` and `mezo` are the baselines. Any list of tasks works:
--config.meta.train="('sst2','cr')"; so do the lists of MetaICL, with both
`meta.train` and `meta.target` "('MetaICL/config/hr_to_lr.json',)" and
--config.data.dir=MetaICL/data.
"""

from zofo_jax.config import defaults, files


def get_config(arg: str = ""):
  """Returns the config of `model=...,group=...,method=...`."""
  args = files.parse_arg(
    arg, model="facebook/opt-1.3b", group="sentiment", method="bilevel"
  )
  config = defaults.base_config()
  config.command = "metatrain"
  config.model.name = args["model"]
  config.method = args["method"]
  config.meta.train = (args["group"],)
  config.meta.target = (args["group"],)
  config.data.num_selection = 100
  config.data.max_length = 256
  config.data.long_rows = "truncate"
  return config
