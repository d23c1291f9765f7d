"""Pictures of results: needle map, accuracy by length, perplexity by position, training curve.

Drawn with matplotlib's object interface (no pyplot, no global state), so a training process can draw too. A picture
is written aside and renamed: it exists whole or not at all.
"""

import math
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import rc_context
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullLocator

from pretrain import metrics_log
from pretrain.errors import RunDirError
from pretrain.evaluation.ppl import Mean, PplResult
from pretrain.evaluation.retrieval import TaskResult
from pretrain.evaluation.tally import total
from pretrain.evaluation.units import format_length

_STYLE: Any = {
    "font.size": 10,
    "axes.titlesize": 12,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "#777777",
    "xtick.color": "#444444",
    "ytick.color": "#444444",
    "axes.labelcolor": "#222222",
    "grid.color": "#e4e4e4",
    "legend.frameon": False,
}
_TITLES = {
    "niah_single": "Needle in a haystack",
    "niah_multikey": "Needle among other keys",
    "niah_multiquery": "Needles, 2 of 6 asked",
    "variable_tracking": "Variable tracking",
    "copy": "Copy",
    "niah_needles": "Needle in a haystack of needles",
}
_WORDING = {"train": "wording as in training", "eval": "wording never trained on"}
_LINES = ("#1f5fa8", "#d1662c", "#2f8f5b", "#8457a8", "#b23a48", "#5b6770", "#b58900")
_BANDS = ("#eef3f9", "#fbf3ea", "#eef6ee", "#f4eff8")
# readable with red-green blindness: lightness falls at both ends, and the cells carry numbers
_ACCURACY = LinearSegmentedColormap.from_list("accuracy", ["#8e1b2e", "#e08a5b", "#f7ecc6", "#86c2a5", "#11705a"])


def _save(figure: Figure, path: str | os.PathLike[str]) -> Path:
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    aside = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    try:
        FigureCanvasAgg(figure).print_figure(aside, format="png", dpi=150, bbox_inches="tight", facecolor="white")
        os.replace(aside, target)
    finally:
        aside.unlink(missing_ok=True)
    return target


def _length_label(length: int, context: int | None) -> str:
    label = format_length(length)
    if context is None:
        return label
    ratio = length / context
    return f"{label}\n{ratio:g}×" if ratio == int(ratio) or ratio < 1 else f"{label}\n{ratio:.1f}×"


def needle_map(
    result: TaskResult, path: str | os.PathLike[str], *, model: str, training_context: int | None = None
) -> Path:
    """Depth x length heat map of exact-match accuracy (0 to 100 %), a percentage in each cell.

    ``training_context`` (tokens) draws the border of what was trained, and the lengths are also given as its
    multiples. In the distance form the rows are needle distances. Returns ``path``.
    """
    lengths = result.lengths
    by_depth = bool(result.depths)
    rows: list = result.depths if by_depth else list(dict.fromkeys(cell.distance for cell in result.cells))
    grid = np.full((len(rows), len(lengths)), np.nan)
    for cell in result.cells:
        place = cell.depth if by_depth else cell.distance
        grid[rows.index(place), lengths.index(cell.length)] = 100 * cell.tally.accuracy
    with rc_context(_STYLE):
        figure = Figure(
            figsize=(max(5.4, 1.9 + 0.85 * len(lengths)), max(2.9, 1.6 + 0.42 * len(rows))), layout="constrained"
        )
        axes = figure.add_subplot()
        image = axes.imshow(grid, cmap=_ACCURACY, vmin=0, vmax=100, aspect="auto")
        for i, j in np.ndindex(*grid.shape):
            if not math.isnan(grid[i, j]):
                colour = "white" if grid[i, j] < 18 or grid[i, j] > 82 else "#222222"
                axes.text(j, i, f"{grid[i, j]:.0f}", ha="center", va="center", color=colour, fontsize=10)
        axes.set_xticks(range(len(lengths)), [_length_label(n, training_context) for n in lengths])
        if by_depth:
            axes.set_yticks(range(len(rows)), [f"{100 * depth:.0f} %" for depth in rows])
            axes.set_ylabel("needle depth")
        else:
            axes.set_yticks(range(len(rows)), [format_length(d) if d else "any" for d in rows])
            axes.set_ylabel("distance (tokens)" if rows != [None] else "")
        axes.set_xlabel("prompt length (tokens" + (", × training context)" if training_context else ")"))
        axes.tick_params(length=0)
        axes.spines[:].set_visible(False)
        axes.set_xticks(np.arange(len(lengths) + 1) - 0.5, minor=True)
        axes.set_yticks(np.arange(len(rows) + 1) - 0.5, minor=True)
        axes.grid(which="minor", color="white", linewidth=2)
        axes.tick_params(which="minor", length=0)
        if training_context is not None:
            trained = sum(n <= training_context for n in lengths) - 0.5
            if -0.5 < trained < len(lengths) - 0.5:
                axes.axvline(trained, color="#222222", linewidth=1.6, linestyle=(0, (4, 2)))
            if -0.5 < trained < len(lengths) - 1:
                axes.text(trained - 0.06, -0.56, "trained", ha="right", va="bottom", fontsize=9, color="#222222")
            if trained < len(lengths) - 1:
                axes.text(
                    max(trained, -0.5) + 0.06, -0.56, "beyond →", ha="left", va="bottom", fontsize=9, color="#222222"
                )
        counts = sorted({cell.tally.n for cell in result.cells})
        per_cell = f"n = {counts[0]}" if len(counts) == 1 else f"n = {counts[0]}-{counts[-1]}"
        figure.suptitle(
            f"{_TITLES.get(result.task, result.task)}: exact answers, %",
            x=0.01,
            ha="left",
            fontsize=12,
            fontweight="bold",
        )
        subtitle = f"{model} · {per_cell} per cell · {_WORDING.get(result.templates, result.templates)}"
        axes.set_title(subtitle, fontsize=9, fontweight="normal", pad=18)
        bar = figure.colorbar(image, ax=axes, ticks=[0, 25, 50, 75, 100], fraction=0.05, pad=0.02)
        bar.outline.set_visible(False)  # type: ignore[operator]
        bar.ax.tick_params(length=0)
        return _save(figure, path)


def accuracy_by_length(
    results: Mapping[str, TaskResult], path: str | os.PathLike[str], *, model: str, training_context: int | None = None
) -> Path:
    """One line per task over the prompt length (log scale), 95 % Wilson intervals as whiskers."""
    with rc_context(_STYLE):
        figure = Figure(figsize=(7.2, 4.0), layout="constrained")
        axes = figure.add_subplot()
        lengths = sorted({n for result in results.values() for n in result.lengths})
        count = max(1, len(results))
        for number, (task, result) in enumerate(results.items()):
            tallies = result.by_length()
            share = np.array([tally.accuracy for tally in tallies.values()])
            low, high = np.array([tally.interval for tally in tallies.values()]).T
            # lines are moved a little against each other so that whiskers do not cover one another
            x = np.array(list(tallies), dtype=float) * 2 ** (0.09 * (number - (count - 1) / 2))
            whiskers = 100 * np.stack([np.maximum(share - low, 0), np.maximum(high - share, 0)])
            colour = _LINES[number % len(_LINES)]
            title = _TITLES.get(task, task)
            axes.errorbar(
                x,
                100 * share,
                yerr=whiskers,
                color=colour,
                marker="o",
                markersize=5,
                linewidth=1.8,
                elinewidth=1,
                label=title,
            )
        axes.set_xscale("log", base=2)
        axes.set_xticks(lengths, [_length_label(n, training_context) for n in lengths])
        axes.xaxis.set_minor_locator(NullLocator())
        axes.set_xlim(lengths[0] / 1.35, lengths[-1] * 1.35)
        axes.set_ylim(-3, 103)
        axes.grid(axis="y")
        axes.set_axisbelow(True)
        left, right = axes.get_xlim()
        if training_context is not None and left <= training_context <= right:
            _mark_training_context(axes, training_context)
        axes.set_xlabel("prompt length (tokens" + (", × training context)" if training_context else ")"))
        axes.set_ylabel("exact answers, %")
        n = total(tally for result in results.values() for tally in result.by_length().values()).n // max(
            1, len(lengths) * count
        )
        figure.suptitle("Long-context tasks by length", x=0.01, ha="left", fontsize=12, fontweight="bold")
        wording = " and ".join(
            sorted({_WORDING.get(result.templates, result.templates) for result in results.values()})
        )
        axes.set_title(f"{model} · n = {n} per point · {wording}", fontsize=9, fontweight="normal")
        axes.legend(loc="center left", bbox_to_anchor=(1.0, 0.5))
        return _save(figure, path)


def _mark_training_context(axes, context: int) -> None:
    axes.axvline(context, color="#222222", linewidth=1.2, linestyle=(0, (4, 2)), zorder=1)
    axes.text(
        context,
        0.02,
        " trained up to here",
        transform=axes.get_xaxis_transform(),
        fontsize=8,
        va="bottom",
        color="#222222",
    )


def perplexity_by_position(
    result: PplResult, path: str | os.PathLike[str], *, model: str, training_context: int | None = None
) -> Path:
    """Perplexity of held-out text over the position (log scale), one line per context, with the unigram model's level.

    Shaded: 95 % interval. The dashed line marks the training context.
    """
    with rc_context(_STYLE):
        figure = Figure(figsize=(7.2, 4.0), layout="constrained")
        axes = figure.add_subplot()
        furthest = max(item.context for item in result.contexts)
        for number, item in enumerate(result.contexts):
            buckets = [b for b in item.buckets if b.end > 16 or len(item.buckets) == 1]
            x = [math.sqrt(b.start * b.end) for b in buckets]
            label = f"context {format_length(item.context)}: {item.overall.perplexity:.2f} over all"
            _line_in_band(axes, x, [b.mean for b in buckets], math.exp, _LINES[number % len(_LINES)], label)
        if result.unigram_nll is not None:
            level = math.exp(result.unigram_nll)
            axes.axhline(level, color="#777777", linewidth=1.2)
            axes.text(
                1.0, level, f"unigram {level:.0f} ", transform=axes.get_yaxis_transform(), ha="right", va="bottom",
                fontsize=9, color="#555555",
            )  # fmt: skip
        _length_axis(axes)
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axes.yaxis.set_minor_formatter(FuncFormatter(lambda value, _: f"{value:g}" if str(value)[0] in "235" else ""))
        axes.grid(which="both", axis="y")
        axes.set_axisbelow(True)
        if training_context is not None and training_context <= furthest:
            _mark_training_context(axes, training_context)
        axes.set_xlabel("position in the sequence (tokens)")
        axes.set_ylabel("perplexity")
        tokens = sum(item.overall.n for item in result.contexts)
        figure.suptitle("Held-out perplexity by position", x=0.01, ha="left", fontsize=12, fontweight="bold")
        axes.set_title(f"{model} · {tokens:,} scored tokens", fontsize=9, fontweight="normal")
        axes.legend(loc="upper right" if result.unigram_nll is None else "best", fontsize=9)
        return _save(figure, path)


def perplexity_by_context(
    result: PplResult, path: str | os.PathLike[str], *, model: str, training_context: int | None = None
) -> Path:
    """What every context makes of the same tokens' perplexity, in % of the reference context's (log scale of contexts).

    For a result with ``last``. Shaded: 95 % interval of the differences. The dashed line marks the training context.
    """
    differences = [(item.context, item.difference) for item in result.contexts if item.difference is not None]
    reference = next(item for item in result.contexts if item.context == result.reference)
    with rc_context(_STYLE):
        figure = Figure(figsize=(7.2, 4.0), layout="constrained")
        axes = figure.add_subplot()
        x = [context for context, _ in differences]
        axes.axhline(0, color="#777777", linewidth=1.2)
        _line_in_band(axes, x, [mean for _, mean in differences], lambda nats: 100 * math.expm1(nats), _LINES[0])
        _length_axis(axes)
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:+g} %" if value else "0"))
        axes.grid(axis="y")
        axes.set_axisbelow(True)
        if training_context is not None and training_context <= max(x):
            _mark_training_context(axes, training_context)
        axes.set_xlabel("context (tokens)")
        axes.set_ylabel(f"perplexity against {format_length(reference.context)}")
        figure.suptitle(
            "The same held-out text behind every context", x=0.01, ha="left", fontsize=12, fontweight="bold"
        )
        axes.set_title(
            f"{model} · last {result.last} tokens of {reference.sequences} sequences, "
            f"perplexity {reference.overall.perplexity:.2f} at {format_length(reference.context)}",
            fontsize=9,
            fontweight="normal",
        )
        return _save(figure, path)


def _line_in_band(
    axes, x: list, means: Sequence[Mean], value: Callable[[float], float], colour: str, label: str | None = None
) -> None:
    """A line of value(nats) and its 95 % interval, shaded where there is one."""
    axes.plot(x, [value(m.nll) for m in means], color=colour, marker="o", markersize=4, linewidth=1.8, label=label)
    low = [value(m.nll if math.isnan(m.low) else m.low) for m in means]
    high = [value(m.nll if math.isnan(m.high) else m.high) for m in means]
    axes.fill_between(x, low, high, color=colour, alpha=0.15, linewidth=0)


def _length_axis(axes) -> None:
    """Tokens from left to right on a log scale."""
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: format_length(round(value))))
    axes.xaxis.set_minor_locator(NullLocator())


def training_curve(
    metrics: Sequence[Mapping],
    path: str | os.PathLike[str],
    *,
    model: str,
    probes: Iterable[tuple[str, int, float]] = (),
) -> Path:
    """Loss by step with a band per stage; below it the probes, if there are any.

    ``metrics``: rows of RUN/metrics.jsonl (step, stage, loss). ``probes``: (name, step, value from 0 to 1).
    """
    step = np.array([row["step"] for row in metrics])
    loss = np.array([row["loss"] for row in metrics], dtype=float)
    by_name: dict[str, list[tuple[int, float]]] = {}
    for name, at, value in probes:
        by_name.setdefault(name, []).append((at, value))
    with rc_context(_STYLE):
        figure = Figure(figsize=(8.4, 5.4 if by_name else 3.8), layout="constrained")
        panels = figure.subplots(
            2 if by_name else 1, 1, sharex=True, squeeze=False, height_ratios=[2, 1] if by_name else [1]
        )[:, 0]
        axes = panels[0]
        axes.plot(step, loss, color=_LINES[0], alpha=0.25, linewidth=0.8)
        start = 0
        for number, (stage, run) in enumerate(groupby(str(row["stage"]) for row in metrics)):
            end = start + len(list(run))
            left = step[start] - 0.5
            right = step[end - 1] + 0.5
            for panel in panels:
                panel.axvspan(left, right, color=_BANDS[number % len(_BANDS)], zorder=0, linewidth=0)
            axes.text(
                (left + right) / 2, 1.0, stage, transform=axes.get_xaxis_transform(), ha="center", va="bottom",
                fontsize=9, color="#444444",
            )  # fmt: skip
            # smoothed inside a stage only: context and mix change at a border, and the loss may jump there
            axes.plot(step[start:end], _smooth(loss[start:end]), color=_LINES[0], linewidth=1.8)
            start = end
        axes.set_ylabel("training loss (nats per token)")
        axes.grid(axis="y")
        axes.set_xlim(step[0] - 0.5, step[-1] + 0.5)
        finite = loss[np.isfinite(loss)]
        if finite.size:
            low, high = np.percentile(finite, [0, 99.5])
            pad = 0.06 * max(high - low, 1e-3)
            axes.set_ylim(low - pad, high + pad)
        figure.suptitle("Training", x=0.01, ha="left", fontsize=12, fontweight="bold")
        axes.set_title(model, fontsize=9, fontweight="normal", pad=18)
        for number, (name, values) in enumerate(by_name.items()):
            x, y = zip(*sorted(values), strict=True)
            panels[1].plot(
                x,
                [100 * value for value in y],
                color=_LINES[(number + 1) % len(_LINES)],
                marker="o",
                markersize=3.5,
                label=name,
            )
        if by_name:
            panels[1].set_ylim(-4, 104)
            panels[1].set_ylabel("probe, %")
            panels[1].grid(axis="y")
            panels[1].legend(fontsize=8, loc="best")
        panels[-1].set_xlabel("step")
        return _save(figure, path)


def _smooth(values: np.ndarray) -> np.ndarray:
    """Centred running mean over about 1/25 of the stage."""
    width = max(1, values.size // 25) | 1
    kernel = np.ones(width)
    return np.convolve(values, kernel, mode="same") / np.convolve(np.ones_like(values), kernel, mode="same")


def training_curve_of_run(run_dir: str | os.PathLike[str], path: str | os.PathLike[str]) -> Path:
    """`training_curve` of a run directory; each record of evaluations.jsonl with an ``accuracy`` is a probe's point.

    Raises RunDirError when the run has no steps yet or its logs are damaged.
    """
    run = Path(run_dir)
    metrics = list(metrics_log.read(run / "metrics.jsonl"))
    if not metrics:
        raise RunDirError(f"{run} has no steps to draw (metrics.jsonl is missing or empty): train it first")
    probes = [
        (str(record.get("name", "evaluation")), int(record["step"]), float(record["accuracy"]))
        for record in metrics_log.read(run / "evaluations.jsonl")
        if "accuracy" in record
    ]
    return training_curve(metrics, path, model=run.name, probes=probes)
