"""Meta-training on a group of tasks, and others held out.

  python -m zofo_jax.main --config=configs/metatrain.py:group=sentiment \
      --workdir=runs/meta

`method=peft`, `full` or `mezo` is what it is compared with. Any list of tasks
will do: --config.meta.train="('sst2','cr')"; so will the lists of MetaICL,
`meta.train` and `meta.target` both "('MetaICL/config/hr_to_lr.json',)" with
--config.data.dir=MetaICL/data.
"""

from zofo_jax.config import defaults


def get_config(arg: str = ""):
  """Returns the config of `model=...,group=...,method=...`."""
  args = defaults.parse_arg(
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
