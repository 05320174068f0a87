"""The report's figures: inline SVG in the page's own colours, the same bytes for the same data."""

from __future__ import annotations

import io
import re
import warnings
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from itertools import accumulate
from typing import Any

import numpy as np
from markupsafe import Markup

# Drawn in these colours, which then become the page's variables, so that dark pages work too.
TEXT, SOFT, LINE = "#221d18", "#6f665b", "#e5ded3"
SERIES = ("#a9532a", "#2b6f77", "#8a7d6d", "#6b5b95")  # the newest checkpoint's first
VARIABLES = {TEXT: "text", SOFT: "soft", LINE: "line",
             **{colour: f"series-{k}" for k, colour in enumerate(SERIES)}}
HUES = ("#f7e9de", "#ebc3a0", "#d3b9a0", "#8fb0ab", "#3c8087", "#17505a")  # 0% to 100%
STYLE = {"svg.fonttype": "none", "svg.hashsalt": "vicugna", "text.parse_math": False,
         "font.size": 9, "text.color": TEXT, "axes.edgecolor": LINE, "axes.labelcolor": SOFT,
         "xtick.color": LINE, "ytick.color": LINE, "xtick.labelcolor": SOFT,
         "ytick.labelcolor": SOFT, "grid.color": LINE, "axes.grid": True, "axes.axisbelow": True,
         "axes.spines.top": False, "axes.spines.right": False, "legend.frameon": False}


def curves(lines: Mapping[str, Sequence[tuple[float, float]]], steps: int) -> Markup:
    """Lines of (step, value) by name: raw faint and smoothed over it, or points where a line has
    values for few of the `steps`."""
    def draw(axes: Any) -> None:
        for (name, points), colour in zip(lines.items(), SERIES, strict=False):
            x, y = np.array(points)[:: 1 + len(points) // 2000].T
            if len(points) < max(8, steps / 2):
                axes.plot(x, y, "o-", color=colour, markersize=3.5, linewidth=1, label=name)
                continue
            axes.plot(x, y, color=colour, linewidth=0.7, alpha=0.3)
            keep = 1 - 1 / max(2, len(y) / 40)
            fade = partial(accumulate, func=lambda total, value, keep=keep: keep * total + value)
            trend = np.array(list(fade(y))) / np.array(list(fade(np.ones(len(y)))))
            axes.plot(x, trend, color=colour, linewidth=1.8, label=name)
        axes.set_xlabel("step")
        axes.margins(x=0.02)
        if len(lines) > 1:
            axes.legend(loc="best")
    return _svg(5, 2.7, draw)


def heat_map(columns: Sequence[Mapping[str, Any]], trained: float) -> Markup:
    """Share right by length (a column each: tokens, label, cells) and needle depth, with a line
    after the lengths that were trained on. Empty where no needle has a planned depth."""
    columns = [column for column in columns if column["cells"]]
    depths = sorted({depth for column in columns for depth in column["cells"]})

    def draw(axes: Any) -> None:
        from matplotlib.colors import LinearSegmentedColormap
        share = np.full((len(depths), len(columns)), np.nan)
        for x, column in enumerate(columns):
            for depth, (right, n) in column["cells"].items():
                y = depths.index(depth)
                share[y, x] = 100 * right / n
                ink = "#ffffff" if share[y, x] > 65 else "#2a211a"
                axes.text(x, y - 0.08, f"{share[y, x]:.0f}%", ha="center", va="center", color=ink)
                axes.text(x, y + 0.29, f"n={n}", ha="center", va="center", color=ink, size=6.5)
        colours = LinearSegmentedColormap.from_list("share", HUES)
        mesh = axes.pcolormesh(np.arange(len(columns) + 1) - 0.5, np.arange(len(depths) + 1) - 0.5,
                               share, vmin=0, vmax=100, cmap=colours, edgecolors="none")
        axes.figure.colorbar(mesh, ax=axes, format="%d%%", aspect=30).outline.set_visible(False)
        axes.grid(False)
        axes.invert_yaxis()
        axes.set_xticks(range(len(columns)), [column["label"] for column in columns])
        axes.set_yticks(range(len(depths)), [f"{depth:.0%}" for depth in depths])
        axes.set(xlabel="length of the prompt, tokens", ylabel="needle's depth in the text")
        if trained:
            edge = sum(column["tokens"] <= trained for column in columns) - 0.5
            axes.axvline(edge, color=TEXT, linewidth=2.2, linestyle=(0, (3, 1.5)))
    return _svg(2 + 0.8 * len(columns), 1.1 + 0.48 * len(depths), draw) if depths else Markup()


def dot_plot(names: Sequence[str], rows: Sequence[tuple[str, Mapping[str, Any]]]) -> Markup:
    """A line for each (label, results' row by checkpoint's name): accuracy with its interval."""
    def draw(axes: Any) -> None:
        for k, (name, colour) in enumerate(zip(reversed(names), SERIES, strict=False)):
            y = np.arange(len(rows)) + 0.32 * ((len(names) - 1) / 2 - k)
            seen = [(y[i], row[name]) for i, (_, row) in enumerate(rows) if name in row]
            axes.hlines([at for at, _ in seen], [100 * row.low for _, row in seen],
                        [100 * row.high for _, row in seen], color=colour, linewidth=2, alpha=0.55)
            axes.plot([100 * row.accuracy for _, row in seen], [at for at, _ in seen], "o",
                      color=colour, markersize=5.5, label=name, clip_on=False)
        axes.set_yticks(range(len(rows)), [text for text, _ in rows])
        axes.set(xlim=(0, 100), ylim=(len(rows) - 0.5, -0.5))
        axes.set_xlabel("right answers, percent (bars: 95% intervals)")
        axes.tick_params(axis="y", length=0)
        axes.spines["left"].set_visible(False)
        axes.figure.legend(loc="outside upper right", ncols=len(names), fontsize=9.5)
    return _svg(7.4, 1.1 + (0.22 + 0.13 * len(names)) * len(rows), draw) if rows else Markup()


def _svg(width: float, height: float, draw: Callable[[Any], None]) -> Markup:
    from matplotlib import style  # takes a second, which no other command should wait
    from matplotlib.figure import Figure

    with style.context(["default", STYLE]), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of letters that the measuring font does not have
        figure, file = Figure((width, height), layout="constrained"), io.StringIO()
        draw(figure.add_subplot())
        figure.savefig(file, format="svg", transparent=True,
                       metadata=dict.fromkeys(("Date", "Creator", "Format", "Type")))
    text = file.getvalue()
    text = re.sub(r'<g id="[^"]*"', "<g", text[text.index("<svg"):])
    for colour, variable in VARIABLES.items():
        text = text.replace(colour, f"var(--{variable})")
    return Markup(text)  # matplotlib has escaped the labels
