"""Figures of the reports, in one style: legible, colour-blind safe, with Chinese text, equal bytes for equal data.

Figures are made without pyplot, so they need no display, share no state, and leave nothing open.
"""

import contextlib
import functools
import importlib.util
import itertools
import logging
import textwrap
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path

import matplotlib
import numpy as np
from cycler import cycler
from matplotlib import font_manager
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from numpy.typing import ArrayLike

from scripts.common.artefacts import atomic_path
from scripts.common.errors import KilnError

log = logging.getLogger("kiln")


# Okabe & Ito, "Color Universal Design" (2008); yellow is left out: on white it cannot be read.
PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000")


GOOD, BAD, GREY, INK = "#009E73", "#D55E00", "#8C8C8C", "#222222"


DPI = 110


CJK_FAMILY = "Noto Sans CJK SC"


@functools.cache
def cjk_font_file() -> Path | None:
    """The packaged font with Chinese glyphs; None, with one warning, where `mplfonts` is not installed."""
    found = importlib.util.find_spec("mplfonts")  # located, not imported: importing it changes global settings
    for folder in (found.submodule_search_locations or []) if found else []:
        path = Path(folder) / "fonts" / "NotoSansCJKsc-Regular.otf"
        if path.is_file():
            return path
    log.warning("no font for Chinese text: figures show boxes in its place; pip install mplfonts")
    return None


@functools.cache
def _families() -> list[str]:
    path = cjk_font_file()
    if path is None:
        return ["DejaVu Sans"]
    font_manager.fontManager.addfont(path)
    return ["DejaVu Sans", CJK_FAMILY]


@contextlib.contextmanager
def style() -> Iterator[None]:
    """Context in which figures are made: fonts, colours, sizes; matplotlib's own settings come back after it."""
    cycle = cycler(linestyle=["-", "--", ":", "-."]) * cycler(color=PALETTE)
    wanted = {
        "font.family": _families(),
        "font.size": 11,
        "axes.titlesize": 12,
        "axes.titlepad": 10,
        "axes.labelsize": 11,
        "axes.edgecolor": INK,
        "axes.labelcolor": INK,
        "text.color": INK,
        "xtick.color": INK,
        "ytick.color": INK,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.grid": True,
        "axes.axisbelow": True,
        "axes.prop_cycle": cycle,
        "axes.unicode_minus": True,
        "grid.color": "#E3E3E3",
        "grid.linewidth": 0.8,
        "legend.frameon": False,
        "legend.fontsize": 10,
        "lines.linewidth": 1.8,
        "figure.constrained_layout.use": True,
        "figure.constrained_layout.h_pad": 0.09,
        "figure.constrained_layout.w_pad": 0.09,
        "figure.facecolor": "white",
        "figure.dpi": DPI,
    }
    # From the defaults, not from the user's matplotlibrc: equal data must give equal bytes.
    with matplotlib.rc_context({**matplotlib.rcParamsDefault, **wanted, "backend": matplotlib.rcParams["backend"]}):
        yield


def save(figure: Figure, path: Path) -> None:
    """Write a figure as PNG of `figure size in inches x DPI` pixels, atomically, with no date or version in it."""
    with style(), atomic_path(path) as temporary:
        figure.savefig(temporary, format="png", dpi=DPI, metadata={"Software": None})


def curves(
    path: Path,
    series: Mapping[str, tuple[ArrayLike, ArrayLike]],
    xlabel: str,
    ylabel: str,
    title: str,
    floors: Mapping[str, float] | None = None,
    logarithmic: bool = False,
) -> None:
    """Lines {label: (x, y)}, and dashed horizontal `floors` {label: y} to compare them with.

    x and y are (n,) each; a y that is not finite leaves a gap. `logarithmic` is the axis of y, for lines that differ by
    orders of magnitude.

    Raises:
        KilnError: no series, an empty one, or x and y of different length.
    """
    if not series:
        raise KilnError(f"{path.name}: nothing to draw", "look at what was logged")
    with style():
        figure, axes = _axes(7.5, 4.6, title)
        for label, (x, y) in series.items():
            x, y = np.asarray(x, dtype=float), np.asarray(y, dtype=float)
            if x.shape != y.shape or x.ndim != 1 or not len(x):
                raise KilnError(f"{path.name}: {label}: {x.shape} x and {y.shape} y", "give one y per x")
            axes.plot(x, y, label=label, marker="o" if len(x) <= 20 else None, markersize=4)
        for (label, y), dash in zip((floors or {}).items(), itertools.cycle([(5, 3), (2, 2), (8, 2, 2, 2)])):
            axes.axhline(y, color=GREY, linewidth=1.4, dashes=dash, label=label)
        axes.set(xlabel=xlabel, ylabel=ylabel, yscale="log" if logarithmic else "linear")
        if all(float(value).is_integer() for x, _ in series.values() for value in np.asarray(x).ravel()[:1000]):
            axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        _legend(figure, len(series) + len(floors or {}))
        save(figure, path)


def confusion_matrix(
    path: Path, matrix: ArrayLike, labels: Sequence[str], title: str, columns: Sequence[str] | None = None
) -> None:
    """Counts (R, C), rows are true classes; each cell has its count and its share of the row, which colours it.

    Over 20 classes cells have no text, over 40 the classes no names: neither could be read. `columns` are
    the names of the predictions where they are not the classes (with "no answer", say).

    Raises:
        KilnError: names that do not fit the matrix.
    """
    matrix = np.asarray(matrix)
    columns = labels if columns is None else columns
    if matrix.shape != (len(labels), len(columns)) or not matrix.size:
        raise KilnError(f"{path.name}: {len(labels)} x {len(columns)} names for {matrix.shape}", "name each class once")
    totals = matrix.sum(axis=1, keepdims=True)
    shares = np.divide(matrix, totals, out=np.zeros(matrix.shape), where=totals > 0)
    rows, wide = matrix.shape
    longest, tallest = (max(len(str(name)) for name in names) for names in (labels, columns))
    with style():
        width, height = 2.6 + 0.09 * longest + 0.85 * wide, 1.8 + 0.06 * tallest + 0.7 * rows
        figure, axes = _axes(min(max(width, 4.8), 20), min(max(height, 3.6), 20), title)
        axes.grid(False)
        shown = axes.imshow(shares, cmap="Blues", vmin=0, vmax=1, aspect="auto")
        figure.colorbar(shown, ax=axes, label="share of the true class", fraction=0.05)
        if max(rows, wide) <= 40:
            axes.set_xticks(range(wide), columns, **({"rotation": 35, "ha": "right"} if tallest > 8 else {}))
            axes.set_yticks(range(rows), labels)
        axes.set(xlabel="predicted", ylabel="true")
        axes.spines[:].set_visible(False)
        axes.tick_params(length=0)
        for row, column in np.ndindex(matrix.shape) if max(rows, wide) <= 20 else ():
            share = shares[row, column]
            text = f"{matrix[row, column]:,}\n{share:.0%}"
            axes.text(column, row, text, ha="center", va="center", color="white" if share > 0.55 else INK, fontsize=10)
        save(figure, path)


def heat_map(
    path: Path, values: ArrayLike, title: str, xlabel: str, ylabel: str, groups: Sequence[str] | None = None
) -> None:
    """Finite values (N, N) as colours; `groups` names what each of the N belongs to, neighbours together.

    Raises:
        KilnError: another shape, no values, one that is not finite, or another count of groups.
    """
    values = np.asarray(values, dtype=float)
    n = len(values) if groups is None else len(groups)
    if not n or values.shape != (n, n) or not np.isfinite(values).all():
        raise KilnError(f"{path.name}: {values.shape} values, expected finite ones, {n} x {n}", "look at their source")
    with style():
        figure, axes = _axes(6.8 + 0.09 * max(map(len, groups or [""])), 6, title)
        axes.grid(False)
        shown = axes.imshow(values, cmap="viridis", aspect="equal", interpolation="nearest")
        figure.colorbar(shown, ax=axes, fraction=0.05)
        axes.set(xlabel=xlabel, ylabel=ylabel)
        if groups is not None:
            names, sizes = zip(*((name, len(list(run))) for name, run in itertools.groupby(groups)), strict=True)
            ends = np.cumsum(sizes)
            for end in ends[:-1]:
                axes.axhline(end - 0.5, color="white", linewidth=1)
                axes.axvline(end - 0.5, color="white", linewidth=1)
            axes.set_yticks(ends - np.asarray(sizes) / 2 - 0.5, names)
            axes.set_xticks([])
        axes.tick_params(length=0)
        save(figure, path)


def distribution(
    path: Path, values: ArrayLike, title: str, xlabel: str, marks: Mapping[str, float] | None = None
) -> None:
    """Histogram of (n,) finite values, with vertical lines at `marks` {label: x}; no bar reaches over a mark.

    Raises:
        KilnError: no values, or one that is not finite.
    """
    values = np.asarray(values, dtype=float).ravel()
    if not len(values) or not np.isfinite(values).all():
        raise KilnError(f"{path.name}: no values, or one that is not finite", "find out which item it is and why")
    with style():
        figure, axes = _axes(7.5, 4.2, f"{title}  (n = {len(values):,})")
        axes.hist(
            values,
            bins=_bin_edges(values, list((marks or {}).values())),
            color=PALETTE[4],
            edgecolor="white",
            linewidth=0.6,
        )
        for (label, x), colour in zip((marks or {}).items(), itertools.cycle((PALETTE[1], PALETTE[6], PALETTE[2]))):
            axes.axvline(x, color=colour, linestyle="--", label=f"{label}: {x:.4g}")
        axes.set(xlabel=xlabel, ylabel="items")
        axes.yaxis.set_major_locator(MaxNLocator(integer=True))
        _legend(figure, len(marks or {}))
        save(figure, path)


def _bin_edges(values: np.ndarray, marks: Sequence[float]) -> np.ndarray:
    edges = np.histogram_bin_edges(values, bins="auto")
    if len(edges) > 61:  # a far outlier makes thousands of bins
        edges = np.histogram_bin_edges(values, bins=60)
    low, high, width = edges[0], edges[-1], edges[1] - edges[0]
    first = next((mark for mark in marks if low <= mark <= high), None)
    if first is not None:  # the bins move to the first mark; a further one cuts the bin that it falls into
        steps = np.arange(np.floor((low - first) / width), np.floor((high - first) / width) + 2)
        edges = first + width * steps
        edges[0], edges[-1] = min(edges[0], low), max(edges[-1], high)
    return np.union1d(edges, [mark for mark in marks if edges[0] < mark < edges[-1]])


def funnel(path: Path, stages: Sequence[tuple[str, int]], title: str) -> None:
    """How many items are left after each stage [(label, count)], with shares of the first and of the one before.

    Raises:
        KilnError: no stage, or a negative count.
    """
    if not stages or min(count for _, count in stages) < 0:
        raise KilnError(f"{path.name}: stages {list(stages)}", "give at least one stage, and counts of 0 or more")
    names, counts = [name for name, _ in stages], [count for _, count in stages]
    most = max(*counts, 1)
    with style():
        figure, axes = _axes(8.2, 1.2 + 0.55 * len(stages), title)
        axes.grid(False)
        axes.barh(range(len(counts)), counts, color=PALETTE[0], height=0.62)
        for i, count in enumerate(counts):
            text = f"{count:,}"
            if i and counts[0]:
                text += f"   {count / counts[0]:.1%} of all"
            if i > 1 and counts[i - 1]:
                text += f", {count / counts[i - 1]:.1%} of the stage before"
            axes.text(count + 0.012 * most, i, text, va="center", fontsize=10)
        axes.set_yticks(range(len(names)), names)
        axes.set_xlim(0, most * 1.75)  # room for the text of a full bar
        axes.set_xticks([])
        axes.invert_yaxis()
        axes.tick_params(length=0)
        axes.spines["bottom"].set_visible(False)
        save(figure, path)


def shares(path: Path, rows: Mapping[str, Mapping[str, int]], title: str) -> None:
    """Each row {label: {part: count}} as a bar of its parts, up to four, with counts and shares below; a row without
    items is left empty. Of a part's name there is room for some 26 letters.

    Raises:
        KilnError: no row, more parts than have room, or a negative count.
    """
    counts = [count for parts in rows.values() for count in parts.values()]
    if not counts or min(counts) < 0 or max(map(len, rows.values())) > 4:
        raise KilnError(f"{path.name}: rows {dict(rows)}", "give rows of one to four parts, and counts of 0 or more")
    with style():
        figure, axes = _axes(8.6, 1.0 + 1.0 * len(rows), title)
        axes.grid(False)
        for row, parts in enumerate(rows.values()):
            total, left = sum(parts.values()), 0.0
            for place, (name, count) in enumerate(parts.items()):
                share, colour = count / total if total else 0.0, PALETTE[place]
                axes.barh(row, share, left=left, color=colour, height=0.42)
                axes.plot(0.25 * place + 0.008, row + 0.42, "s", color=colour, markersize=7, clip_on=False)
                name = textwrap.shorten(name, 28, placeholder=" …")
                axes.text(0.25 * place + 0.022, row + 0.42, name, va="center", fontsize=9)
                axes.text(0.25 * place + 0.022, row + 0.62, f"{count:,}  ({share:.1%})", va="center", fontsize=9)
                left += share
        axes.set_yticks(range(len(rows)), list(rows))
        axes.set(xlim=(0, 1), ylim=(len(rows) - 0.25, -0.35))
        axes.set_xticks([])
        axes.tick_params(length=0)
        axes.spines[:].set_visible(False)
        save(figure, path)


def reliability(path: Path, models: Mapping[str, tuple[Sequence[Mapping], float]], title: str) -> None:
    """Reliability diagrams side by side, {name: (bins, expected calibration error)}.

    A bar is the share of right decisions of a bin of the largest probability, a dash the bin's mean largest
    probability; the dash stands on the diagonal. Below, how many items each bin holds.

    Args:
        models: bins as of `classification.calibration`.

    Raises:
        KilnError: no model, or one without an item.
    """
    if not models or not all(sum(one["n"] for one in bins) for bins, _ in models.values()):
        raise KilnError(f"{path.name}: no model, or one without an item", "evaluate on at least two images")
    label = "share of right decisions (below the dash: over-confident)"
    most = max(one["n"] for bins, _ in models.values() for one in bins)
    with style():
        figure = Figure(figsize=(1.2 + 4.2 * len(models), 5.8))
        figure.suptitle(title, fontsize=13, wrap=True)
        grid = figure.subplots(2, len(models), sharex=True, sharey="row", squeeze=False, height_ratios=(3, 1))
        for (upper, lower), (name, (bins, error)) in zip(grid.T, models.items(), strict=True):
            left, right = (np.array([one[end] for one in bins]) for end in ("from", "to"))
            upper.plot([0, 1], [0, 1], color=GREY, linestyle="--", linewidth=1.4, label="perfectly calibrated")
            held = [one for one in bins if one["n"]]
            place, width = [(one["from"] + one["to"]) / 2 for one in held], [one["to"] - one["from"] for one in held]
            heights = [one["accuracy"] for one in held]
            upper.bar(place, heights, width, color=PALETTE[4], edgecolor="white", label=label)
            starts, ends = [one["from"] for one in held], [one["to"] for one in held]
            confidences = [one["confidence"] for one in held]
            upper.hlines(confidences, starts, ends, color=PALETTE[1], linewidth=3, label="mean largest probability")
            upper.set(xlim=(0, 1), ylim=(0, 1.05), title=f"{name}: expected calibration error {error:.3f}")
            lower.bar((left + right) / 2, [one["n"] for one in bins], right - left, color=GREY, edgecolor="white")
            for one, x in zip(held, place, strict=True):
                lower.text(x, one["n"] + 0.04 * most, f"{one['n']:,}", ha="center", fontsize=9)
            lower.set(ylim=(0, 1.3 * most), xlabel="largest probability")
            lower.yaxis.set_major_locator(MaxNLocator(integer=True, nbins=3))
        grid[0, 0].set_ylabel("share of right decisions")
        grid[1, 0].set_ylabel("items")
        figure.legend(*grid[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=3)
        save(figure, path)


def intervals(
    path: Path,
    groups: Mapping[str, Mapping[str, tuple[float, Sequence[float] | None]]],
    xlabel: str,
    title: str,
    floors: Mapping[str, float] | None = None,
    baselines: Collection[str] = (),
) -> None:
    """Scores {group: {name: (value, (lo, hi) or None)}} in [0, 1] as points with whiskers, and vertical `floors`.

    Rows of a group stand together below its heading (none where it is ""). A name has one colour in all groups; the
    legend tells which. `baselines` are the names that are compared with: they are drawn hollow.

    Raises:
        KilnError: no rows.
    """
    names = list(dict.fromkeys(name for rows in groups.values() for name in rows))
    if not names:
        raise KilnError(f"{path.name}: nothing to draw", "look at what was scored")
    places, headings, end = _stacked(groups)
    colours = {name: PALETTE[i % len(PALETTE)] for i, name in enumerate(names)}
    with style():
        entries = (len(names) if len(names) > 1 else 0) + len(floors or {})
        figure, axes = _axes(7.8, 1.7 + 0.31 * end + 0.2 * -(-entries // 3), title)
        axes.grid(False, axis="y")
        for heading, y in headings.items():
            axes.axhspan(y - 0.5, y + 0.5, color="#F0F0F0", zorder=1.5)
            axes.text(0.01, y, heading, va="center", transform=axes.get_yaxis_transform())
        for (group, name), y in places.items():
            value, interval = groups[group][name]
            if interval is not None:
                axes.hlines(y, *interval, color=colours[name], linewidth=2.2)
            axes.plot(value, y, **_point(colours[name], name in baselines))
            axes.text(1.02, y, f"{value:.3f}", va="center", transform=axes.get_yaxis_transform(), fontsize=10)
        for name in names if len(names) > 1 else ():
            axes.plot([], [], label=name, **_point(colours[name], name in baselines))
        for (label, x), dash in zip((floors or {}).items(), itertools.cycle([(5, 3), (2, 2), (8, 2, 2, 2)])):
            axes.axvline(x, color=GREY, linewidth=1.4, dashes=dash, label=f"{label}: {x:.3f}", zorder=1)
        axes.set_yticks(list(places.values()), [name for _, name in places])
        axes.set(xlim=(0, 1.02), ylim=(end - 0.5, -0.5), xlabel=xlabel)
        _legend(figure, entries)
        save(figure, path)


def _stacked(
    groups: Mapping[str, Mapping[str, object]],
) -> tuple[dict[tuple[str, str], float], dict[str, float], float]:
    """({(group, name): its y}, {heading: its y}, the y after all) of rows below headings, with a gap between groups."""
    places, headings, y = {}, {}, 0.0
    for group, rows in groups.items():
        if not rows:
            continue
        y += 0.4 if places else 0
        if group:
            headings[group], y = y, y + 1
        for name in rows:
            places[group, name], y = y, y + 1
    return places, headings, y


def _point(colour: str, hollow: bool) -> dict[str, object]:
    look = {"color": colour, "linestyle": "none", "marker": "D" if hollow else "o", "markersize": 6 if hollow else 7}
    return {**look, "markerfacecolor": "white", "markeredgewidth": 1.8} if hollow else look


def _axes(width: float, height: float, title: str):
    figure = Figure(figsize=(width, height))
    axes = figure.add_subplot()
    # On the figure, not the axes: there it is wrapped at the edge of the picture, and takes its room.
    figure.suptitle(title, fontsize=13, wrap=True)
    return figure, axes


def _legend(figure: Figure, entries: int) -> None:
    if entries:  # below the axes, where it hides no data
        figure.legend(loc="outside lower center", ncols=1 if entries == 1 else min(3, entries))
