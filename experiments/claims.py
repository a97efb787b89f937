"""Checks claims about Bilevel-ZOFO against the results of single_task.py."""

import statistics
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np

from zofo_jax.tasks import get

Cell = dict[str, Any]
BILEVEL, LORA, MEZO = "bilevel", "peft", "mezo"
# Theta follows s: all of it, without any zeroth-order step, or by as much as
# forward passes say. The first is the recommended one.
ALL = "bilevel_all"
BY_FORWARD_PASSES = (
  *("bilevel_guided", "bilevel_matrices", "bilevel_history"),
  *("bilevel_metric", "bilevel_mixed"),
)


def score_name(cell: Cell) -> str:
  """Returns the name of a cell's metric."""
  return str(get(cell["task"]).metric)


def key(cell: Cell) -> tuple[str, ...]:
  """Returns what cells of two methods must share to be comparable."""
  common = {"size": "", "template": "0", "shots": "0", "processor": ""}
  others = (str(cell.get(name, value)) for name, value in common.items())
  return cell["task"], cell["seed"], *others


def pairs(
  cells: Iterable[Cell], method: str, baseline: str
) -> list[tuple[Cell, Cell]]:
  """Returns cells of two methods on the same task, seed and prompt 0."""
  by_method: dict[str, dict[Any, Cell]] = {method: {}, baseline: {}}
  for cell in cells:
    if cell["method"] in by_method and cell.get("template", "0") == "0":
      by_method[cell["method"]][key(cell)] = cell
  first, second = by_method[method], by_method[baseline]
  return [(first[k], second[k]) for k in sorted(first.keys() & second.keys())]


def first_time(curve: Sequence[Cell], name: str, score: float) -> float | None:
  """Returns the seconds after which a curve reaches a score, if ever."""
  for point in curve:
    if point[f"selection_{name}"] >= score:
      return float(point["seconds"])
  return None


def time_ratio(bilevel: Cell, mezo: Cell) -> float:
  """Returns MeZO's seconds to its best / ours to the same; 0 if never."""
  name = score_name(mezo)
  best = max(point[f"selection_{name}"] for point in mezo["curve"])
  mezo_seconds = first_time(mezo["curve"], name, best)
  bilevel_seconds = first_time(bilevel["curve"], name, best)
  assert mezo_seconds is not None
  return mezo_seconds / bilevel_seconds if bilevel_seconds else 0.0


def difference(
  ending: str = "", baseline_ending: str = ""
) -> Callable[[Cell, Cell], float]:
  """Returns a function for the difference of two cells' test scores.

  Args:
    ending: which of the first cell's scores: "" for the adapter that is kept,
      "_p" for p, "_base" for theta alone.
    baseline_ending: the same of the other cell.
  """

  def measure(cell: Cell, baseline: Cell) -> float:
    name = f"test_{score_name(cell)}"
    return float(cell[name + ending] - baseline[name + baseline_ending])

  return measure


def interval(
  values: Sequence[float], average: Callable[[Any], Any] = np.mean
) -> list[float]:
  """Returns a 95 % bootstrap interval of an average."""
  draw = np.random.RandomState(0).randint(len(values), size=(2000, len(values)))
  means = average(np.asarray(values)[draw], axis=1)
  return [float(x) for x in np.percentile(means, [2.5, 97.5])]


def claim(
  cells: Sequence[Cell],
  other: str,
  measure: Callable[[Cell, Cell], float],
  target: str,
  average: Callable[[Any], Any] = np.mean,
  method: str = BILEVEL,
) -> dict[str, Any] | None:
  """Compares a method with a baseline on all cells that both have.

  Args:
    cells: results.
    other: the baseline.
    measure: (the method's cell, the baseline's cell) -> number.
    target: the target, such as ">= 4".
    average: average of the numbers.
    method: the method.

  Returns:
    The value, its interval, tasks and seeds; None if there are no pairs.
  """
  both = pairs(cells, method, other)
  if not both:
    return None
  numbers = [(c["task"], c["seed"], measure(c, o)) for c, o in both]
  return {"method": method, **verdict(numbers, target, average)}


def verdict(
  numbers: Sequence[tuple[str, str, float]],
  target: str,
  average: Callable[[Any], Any] = np.mean,
) -> dict[str, Any]:
  """Returns an average with its interval, and whether it meets the target.

  Args:
    numbers: task, seed and number each.
    target: as for `claim`.
    average: as for `claim`.
  """
  values = [number for _, _, number in numbers]
  value = float(average(np.asarray(values), axis=0))
  sense, _, limit = target.partition(" ")
  met = value >= float(limit) if sense == ">=" else value <= float(limit)
  by_task: dict[str, list[float]] = {}
  for task, _, number in numbers:
    by_task.setdefault(task, []).append(round(number, 4))
  return {
    "value": value,
    "interval": interval(values, average),
    "target": target,
    "met": bool(met),
    "tasks": sorted(by_task),
    "seeds": sorted({seed for _, seed, _ in numbers}),
    "by_task": by_task,
  }


def prompt_spread(cells: Iterable[Cell]) -> dict[str, Any] | None:
  """Compares the spread between prompts of Bilevel-ZOFO and of MeZO."""
  scores: dict[tuple[str, str, str], dict[str, float]] = {}
  for cell in cells:
    if cell["method"] in (BILEVEL, MEZO):
      which = (cell["method"], cell["task"], cell["seed"])
      versions = scores.setdefault(which, {})
      versions[cell.get("template", "0")] = cell[f"test_{score_name(cell)}"]
  spreads: dict[str, dict[tuple[str, str], float]] = {BILEVEL: {}, MEZO: {}}
  for (method, task, seed), versions in scores.items():
    if len(versions) > 1:
      spread = max(versions.values()) - min(versions.values())
      spreads[method][task, seed] = spread
  both = sorted(spreads[BILEVEL].keys() & spreads[MEZO].keys())
  if not both:
    return None
  means = [
    statistics.fmean(spreads[method][k] for k in both)
    for method in (BILEVEL, MEZO)
  ]
  value = means[0] / means[1] if means[1] else None
  return {
    "value": value,
    "interval": None,
    "target": "<= 0.5",
    "met": value is not None and value <= 0.5,
    "tasks": sorted({task for task, _ in both}),
    "seeds": sorted({seed for _, seed in both}),
    "spreads": dict(zip((BILEVEL, MEZO), means, strict=True)),
  }


def answers(cells: Sequence[Cell]) -> dict[str, Any]:
  """Checks every claim against the results."""

  def memory(bilevel: Cell, baseline: Cell) -> float:
    return bilevel["program_bytes"] / baseline["program_bytes"]

  def resident(bilevel: Cell, baseline: Cell) -> float:
    return bilevel["peak_rss_bytes"] / baseline["peak_rss_bytes"]

  return {
    "time_to_mezo_best_ratio": claim(
      cells, MEZO, time_ratio, ">= 4", np.median
    ),
    "accuracy_gain_over_lora": claim(cells, LORA, difference(), ">= 0.01"),
    "peak_memory_over_lora": claim(cells, LORA, memory, "<= 1.05", np.median),
    "peak_memory_over_mezo": claim(cells, MEZO, memory, "<= 1.3", np.median),
    "peak_resident_over_lora": claim(
      cells, LORA, resident, "<= 1.05", np.median
    ),
    "peak_resident_over_mezo": claim(
      cells, MEZO, resident, "<= 1.3", np.median
    ),
    "prompt_spread_over_mezo": prompt_spread(cells),
  }


def guided_answers(cells: Sequence[Cell], method: str = ALL) -> dict[str, Any]:
  """Checks the claims about steps of theta along what s has learned.

  What zeroth order adds is compared for every way of choosing lengths by
  forward passes; the value is that of the best of them.

  Args:
    cells: results.
    method: whose theta takes all of it.
  """

  def compare(other: str, ending: str, target: str) -> dict[str, Any] | None:
    return claim(cells, other, difference(ending), target, method=method)

  both = difference("_base", "_base")
  added = [
    found
    for other in BY_FORWARD_PASSES
    if (found := claim(cells, method, both, ">= 0.01", method=other))
  ]
  best = max(added, key=lambda found: found["value"], default=None)
  if best:
    means = {c["method"]: [c["value"], c["interval"]] for c in added}
    best |= {"met": best["met"] and best["interval"][0] > 0, "tried": means}
  return {
    "theta_alone_over_mezo": compare(MEZO, "_base", ">= 0.15"),
    "theta_alone_over_lora": compare(LORA, "_base", ">= -0.02"),
    "p_over_lora": compare(LORA, "_p", ">= -0.02"),
    "accuracy_gain_over_lora": compare(LORA, "", ">= 0"),
    "zeroth_order_over_all_of_it": best,
  }


def meta_answers(runs: Sequence[dict[str, Any]]) -> dict[str, Any]:
  """Checks the claims about held-out tasks after meta-training.

  Args:
    runs: of each seed, what `adapt` wrote about the bare model ("base"), the
      theta that followed s ("guided") and LoRA's meta-trained adapter ("peft").
  """
  few, zero = [], []
  for run in runs:
    rows = {(row["backbone"], row["task"]): row for row in run["outcome"]}
    for task in {task for _, task in rows}:
      guided, lora, bare = (
        rows[name, task] for name in ("guided", LORA, "base")
      )
      gains = np.subtract(guided["few_shot"], lora["few_shot"])
      few.append((task, str(run["seed"]), float(np.mean(gains))))
      gain = guided["zero_shot"] - bare["zero_shot"]
      zero.append((task, str(run["seed"]), gain))
  return {
    "few_shot_over_lora": verdict(sorted(few), ">= 0.01"),
    "meta_zero_shot_gain": verdict(sorted(zero), ">= 0.08"),
  }
