"""Hands a run's result over: a Hugging Face checkpoint, a PEFT adapter.

  python -m zofo_jax.export RUN DIR --what {merged,base,adapter}

`base` is theta, `adapter` p for theta, `merged` both in one, if p is a LoRA.
"""

import argparse
import pathlib
import sys
from collections.abc import Sequence

from etils import epath

from zofo_jax import adapters, errors
from zofo_jax.builders import model
from zofo_jax.commands import evaluate
from zofo_jax.models.hf import peft

WHAT = ("merged", "base", "adapter")


def export(run_folder: str, folder: str, what: str) -> None:
  """Writes what a run came to, at its best checkpoint.

  Args:
    run_folder: folder of the run.
    folder: written to; created if it does not exist.
    what: "base": theta, with the configuration and the tokenizer, for
      transformers. "adapter": p, or what `config.keep` says, for PEFT on
      that base. "merged": theta with it folded in, for transformers.

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
  run = evaluate.find(epath.Path(run_folder))
  state = evaluate.restore(run, epath.Path(run_folder))
  try:
    if what == "adapter":
      peft.save(
        place,
        run.model.family,
        run.model.module.config,
        run.selected_adapter(state),
        model_name=run.config.model.name,
      )
    else:
      base = state.base
      if what == "merged":
        base = adapters.merge_lora(base, run.selected_adapter(state))
      model.save_base(place, run.config, run.model, base)
  except OSError as error:
    raise errors.UserError(
      f"{folder} cannot be written to ({error.strerror})."
    ) from error
  print(f"In {folder}: {what} of {run_folder} at step {int(state.step)}.")


def main(arguments: Sequence[str] | None = None) -> int:
  """Runs the command line and returns the exit code."""
  parser = argparse.ArgumentParser(
    "python -m zofo_jax.export", description="Hands a run's result over."
  )
  parser.add_argument("run", help="folder of the run")
  parser.add_argument("folder", help="a new folder to write to")
  parser.add_argument("--what", required=True, help=", ".join(WHAT))
  given = parser.parse_args(arguments)
  try:
    export(given.run, given.folder, given.what)
  except errors.UserError as error:
    print(f"zofo_jax: {error}", file=sys.stderr)
    return 2
  return 0


if __name__ == "__main__":
  sys.exit(main())
