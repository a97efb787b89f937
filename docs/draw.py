"""Draws the figure of the README and the documentation: python docs/draw.py."""

import pathlib
import sys

import matplotlib

matplotlib.use("agg")
import matplotlib.pyplot as plt
from matplotlib import patches

HERE = pathlib.Path(__file__).parent
INK, PALE = "#37474f", "#eceff1"
FIRST, ZEROTH = "#ffe0b2", "#b3e5fc"


def figure(width, height):
  """Returns axes without a frame; units are inches from the upper left."""
  drawn = plt.figure(figsize=(width, height))
  axes = drawn.add_axes((0, 0, 1, 1))
  axes.set_xlim(0, width)
  axes.set_ylim(height, 0)
  axes.axis("off")
  return drawn, axes


def box(axes, x, y, width, height, text, color, size=9):
  axes.add_patch(
    patches.FancyBboxPatch(
      (x, y),
      width,
      height,
      boxstyle="round,pad=0,rounding_size=0.06",
      facecolor=color,
      edgecolor=INK,
      linewidth=0.8,
    )
  )
  middle = (x + width / 2, y + height / 2)
  axes.text(*middle, text, ha="center", va="center", size=size, color=INK)


def arrow(axes, start, end, text="", shift=(0, 0)):
  axes.annotate(
    "",
    end,
    start,
    arrowprops={"arrowstyle": "-|>", "color": INK, "linewidth": 1.0},
  )
  middle = [(a + b) / 2 + s for a, b, s in zip(start, end, shift, strict=True)]
  axes.text(*middle, text, ha="center", va="center", size=8, color=INK)


def save(drawn, name):
  drawn.savefig(HERE / f"{name}.svg", metadata={"Date": None})
  if len(sys.argv) > 1:  # a folder for a PNG preview
    drawn.savefig(pathlib.Path(sys.argv[1]) / f"{name}.png", dpi=110)


def method():
  drawn, axes = figure(9, 3.3)
  box(axes, 0.1, 0.35, 1.3, 0.7, "$D_p$\nrows", PALE)
  box(axes, 0.1, 2.15, 1.3, 0.7, "$D_f$\nrows", PALE)
  box(axes, 2.4, 0.35, 2.1, 0.7, "$s$: T steps on\n$L(\\theta, s; D_p)$", FIRST)
  box(
    axes,
    *(2.4, 2.15, 2.1, 0.7),
    "$p$: a step on $L(\\theta, p; D_f)$\n$+\\,\\lambda\\,L(\\theta, p; D_p)$",
    FIRST,
  )
  box(
    axes,
    *(5.35, 1.05, 1.75, 1.1),
    "$G(\\theta+\\epsilon z)$\n$G(\\theta-\\epsilon z)$\nforward only",
    ZEROTH,
  )
  box(
    axes,
    7.75,
    1.05,
    1.15,
    1.1,
    "$\\theta - \\eta\\,c\\,z$\nin place",
    ZEROTH,
  )
  arrow(axes, (1.4, 0.7), (2.4, 0.7))
  arrow(axes, (1.4, 2.5), (2.4, 2.5))
  arrow(axes, (1.4, 1.0), (2.4, 2.25))
  arrow(axes, (4.5, 0.7), (5.35, 1.35), "$s$", (0.05, -0.15))
  arrow(axes, (4.5, 2.5), (5.35, 1.85), "$p$", (0.05, 0.15))
  arrow(axes, (7.1, 1.6), (7.75, 1.6), "$c$", (0, -0.14))
  axes.text(
    *(7.0, 2.6),
    "$z$ from a key, drawn twice, never stored",
    ha="center",
    size=8,
    color=INK,
  )
  axes.text(
    3.45, 1.6, "first order, adapters only", ha="center", size=8, color=INK
  )
  axes.text(
    7.0, 0.75, "zeroth order, all of $\\theta$", ha="center", size=8, color=INK
  )
  save(drawn, "method")


if __name__ == "__main__":
  matplotlib.rcParams["svg.hashsalt"] = "zofo_jax"  # a reproducible file
  matplotlib.rcParams["svg.fonttype"] = "path"
  method()
