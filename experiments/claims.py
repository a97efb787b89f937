"""Checks claims about Bilevel-ZOFO against the results of single_task.py."""

import statistics
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np

from zofo_jax.tasks import get

Cell = dict[str, Any]
BILEVEL, LORA, MEZO = "bilevel", "peft", "mezo"


def score_name(cell: Cell) -> str:
  """Returns the name of a cell's metric."""
  return str(get(cell["task"]).metric)


def key(cell: Cell) -> tuple[str, str, str, str]:
  """Returns what cells of two methods must share to be comparable."""
  prompt, processor = cell.get("template", "0"), cell.get("processor", "")
  return cell["task"], cell["seed"], prompt, processor


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


def gain(bilevel: Cell, lora: Cell) -> float:
  """Returns the difference of the test scores."""
  name = f"test_{score_name(bilevel)}"
  return bilevel[name] - lora[name]


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
  """Compares Bilevel-ZOFO with a baseline on all cells that both have.

  Args:
    cells: results.
    other: the baseline.
    measure: (Bilevel-ZOFO's cell, the baseline's cell) -> number.
    target: the target, such as ">= 4".
    average: average of the numbers.

  Returns:
    The value, its interval, tasks and seeds; None if there are no pairs.
  """
  both = pairs(cells, BILEVEL, other)
  if not both:
    return None
  values = [measure(*pair) for pair in both]
  value = float(average(np.asarray(values), axis=0))
  sense, _, limit = target.partition(" ")
  met = value >= float(limit) if sense == ">=" else value <= float(limit)
  by_task: dict[str, list[float]] = {}
  for (cell, _), number in zip(both, values, strict=True):
    by_task.setdefault(cell["task"], []).append(round(number, 4))
  return {
    "value": value,
    "interval": interval(values, average),
    "target": target,
    "met": bool(met),
    "tasks": sorted(by_task),
    "seeds": sorted({cell["seed"] for cell, _ in both}),
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
