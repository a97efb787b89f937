"""What is claimed of Bilevel-ZOFO, from the results of single_task.py."""

import statistics
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np

from zofo_jax.tasks import get

Cell = dict[str, Any]
OURS, LORA, MEZO = "bilevel", "peft", "mezo"


def score_name(cell: Cell) -> str:
  """Returns what a cell's task is measured by."""
  return str(get(cell["task"]).metric)


def key(cell: Cell) -> tuple[str, str, str, str]:
  """Returns what two methods' cells must share to be compared."""
  prompt, processor = cell.get("template", "0"), cell.get("processor", "")
  return cell["task"], cell["seed"], prompt, processor


def pairs(
  cells: Iterable[Cell], one: str, other: str
) -> list[tuple[Cell, Cell]]:
  """Returns cells of two methods on the same task, seed and prompt 0."""
  found: dict[str, dict[Any, Cell]] = {one: {}, other: {}}
  for cell in cells:
    if cell["method"] in found and cell.get("template", "0") == "0":
      found[cell["method"]][key(cell)] = cell
  both = sorted(found[one].keys() & found[other].keys())
  return [(found[one][k], found[other][k]) for k in both]


def first_time(curve: Sequence[Cell], name: str, score: float) -> float | None:
  """Returns the seconds after which a curve is at a score, if ever."""
  for point in curve:
    if point[f"selection_{name}"] >= score:
      return float(point["seconds"])
  return None


def time_ratio(ours: Cell, mezo: Cell) -> float:
  """Returns MeZO's seconds to its best over ours to the same; 0 for never."""
  name = score_name(mezo)
  best = max(point[f"selection_{name}"] for point in mezo["curve"])
  theirs, mine = (
    first_time(cell["curve"], name, best) for cell in (mezo, ours)
  )
  assert theirs is not None
  return theirs / mine if mine else 0.0


def gain(ours: Cell, lora: Cell) -> float:
  """Returns the difference of the test scores."""
  name = f"test_{score_name(ours)}"
  return ours[name] - lora[name]


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
) -> dict[str, Any] | None:
  """Measures ours against another method on all cells that both have.

  Args:
    cells: results.
    other: the method.
    measure: (our cell, its) -> number.
    target: what was hoped for, as ">= 4".
    average: of the numbers.

  Returns:
    The value, its interval, tasks, seeds; None where nothing can be compared.
  """
  both = pairs(cells, OURS, other)
  if not both:
    return None
  values = [measure(*pair) for pair in both]
  value = float(average(np.asarray(values), axis=0))
  sense, _, limit = target.partition(" ")
  met = value >= float(limit) if sense == ">=" else value <= float(limit)
  by_task: dict[str, list[float]] = {}
  for (ours, _), number in zip(both, values, strict=True):
    by_task.setdefault(ours["task"], []).append(round(number, 4))
  return {
    "value": value,
    "interval": interval(values, average),
    "target": target,
    "met": bool(met),
    "tasks": sorted(by_task),
    "seeds": sorted({ours["seed"] for ours, _ in both}),
    "by_task": by_task,
  }


def prompt_spread(cells: Iterable[Cell]) -> dict[str, Any] | None:
  """Compares how far prompts are apart, with ours and with MeZO."""
  scores: dict[tuple[str, str, str], dict[str, float]] = {}
  for cell in cells:
    if cell["method"] in (OURS, MEZO):
      which = (cell["method"], cell["task"], cell["seed"])
      versions = scores.setdefault(which, {})
      versions[cell.get("template", "0")] = cell[f"test_{score_name(cell)}"]
  spreads: dict[str, dict[tuple[str, str], float]] = {OURS: {}, MEZO: {}}
  for (method, task, seed), versions in scores.items():
    if len(versions) > 1:
      apart = max(versions.values()) - min(versions.values())
      spreads[method][task, seed] = apart
  both = sorted(spreads[OURS].keys() & spreads[MEZO].keys())
  if not both:
    return None
  means = [
    statistics.fmean(spreads[method][k] for k in both)
    for method in (OURS, MEZO)
  ]
  value = means[0] / means[1] if means[1] else None
  return {
    "value": value,
    "interval": None,
    "target": "<= 0.5",
    "met": value is not None and value <= 0.5,
    "tasks": sorted({task for task, _ in both}),
    "seeds": sorted({seed for _, seed in both}),
    "spreads": dict(zip((OURS, MEZO), means, strict=True)),
  }


def answers(cells: Sequence[Cell]) -> dict[str, Any]:
  """Answers each claim of the method's from the results."""

  def memory(one: Cell, other: Cell) -> float:
    return one["program_bytes"] / other["program_bytes"]

  def resident(one: Cell, other: Cell) -> float:
    return one["peak_rss_bytes"] / other["peak_rss_bytes"]

  return {
    "time_to_mezo_best_ratio": claim(
      cells, MEZO, time_ratio, ">= 4", np.median
    ),
    "accuracy_gain_over_lora": claim(cells, LORA, gain, ">= 0.01"),
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
