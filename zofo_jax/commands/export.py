"""Exports a run: a Hugging Face checkpoint, or a PEFT adapter.

  zofo export RUN DIR --what {merged,base,adapter}

`base` is theta, `adapter` is p for this base, and `merged` is theta with p
folded in, if p is a LoRA.
"""

import pathlib
from collections.abc import Collection, Sequence

from etils import epath

from zofo_jax import adapters, errors, report
from zofo_jax.builders import model
from zofo_jax.checkpoints import inputs
from zofo_jax.commands import arguments as arguments_lib
from zofo_jax.commands import evaluate
from zofo_jax.config import paths
from zofo_jax.core import factors
from zofo_jax.models.hf import peft

WHAT = ("merged", "base", "adapter")


def export(
  run_folder: str, folder: str, what: str, may_change: Collection[str] = ()
) -> None:
  """Writes the result of a run, at its best checkpoint.

  Args:
    run_folder: folder of the run.
    folder: written to; created if it does not exist.
    what: "base": theta, with the configuration and the tokenizer, for
      transformers. "adapter": p, or s if `config.keep` selects it, for PEFT on
      that base. "merged": theta with the adapter folded in, for transformers.
    may_change: see `inputs.check`.

  Raises:
    UserError: there is no run, p cannot be merged, or nothing can be written.
  """
  if what not in WHAT:
    raise errors.UserError(
      f"--what: expected one of {', '.join(WHAT)}; found '{what}'."
      f"{errors.nearest(what, WHAT)}"
    )
  place = pathlib.Path(folder)
  if place.is_dir() and any(place.iterdir()):
    raise errors.UserError(f"{folder} is not empty; expected a new folder.")
  report.make_folder(epath.Path(folder), "zofo export")
  run = evaluate.load_run(epath.Path(run_folder))
  inputs.check(run, epath.Path(run_folder), may_change=may_change)
  state = evaluate.restore(run, epath.Path(run_folder))
  try:
    if what == "adapter":
      peft.save(
        place,
        run.model.family,
        run.model.module.config,
        run.selected_adapter(state),
        model_name=run.model.name,
      )
    else:
      base = state.base
      if what == "merged":
        folded = adapters.fold_lora(run.selected_adapter(state))
        base = factors.displace(base, folded)
      model.save_base(place, run.model, base)
  except OSError as error:
    raise errors.UserError(
      f"{folder} cannot be written to ({error.strerror})."
    ) from error
  print(f"In {folder}: {what} of {run_folder} at step {int(state.step)}.")


def main(arguments: Sequence[str]) -> None:
  """Runs the command."""
  parser = arguments_lib.make_parser("export", __doc__)
  parser.add_argument("run", type=paths.expand, help="folder of the run")
  parser.add_argument(
    "folder", type=paths.expand, help="a new folder to write to"
  )
  parser.add_argument("--what", required=True, help=", ".join(WHAT))
  arguments_lib.add_may_change(parser)
  options = parser.parse(arguments)
  export(options.run, options.folder, options.what, options.may_change)
