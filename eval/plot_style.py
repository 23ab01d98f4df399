"""The style of all plots: one name and one colour for each model, plain axes, and lines with names at their ends."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal


if TYPE_CHECKING:
    from matplotlib.axes import Axes


# The name and the colour of every model and method, by its key in the files of results.
STYLES: dict[str, tuple[str, str]] = {
    "rebased": ("ReBased", "#d62728"),
    "based": ("Based", "#1f77b4"),
    "softmax": ("softmax", "#555555"),
    # Associative recall: other numbers of heads, and the steps of the ablation.
    "rebased_3_heads": ("ReBased, 3 heads", "#ff7f0e"),
    "rebased_6_heads": ("ReBased, 6 heads", "#bcbd22"),
    "based_3_heads": ("Based, 3 heads", "#17becf"),
    "rebased_head_norm": ("ReBased, norm per head", "#f4a582"),
    "rebased_floor": ("ReBased with a floor", "#c2185b"),
    "x2": ("x²", "#8c564b"),
    "normalized": ("normalised x", "#2ca02c"),
    "gamma": ("γ x", "#e377c2"),
    "gamma_beta": ("γ x + β", "#9467bd"),
    # Models of flash-linear-attention.
    "gated_deltanet": ("Gated DeltaNet", "#0b8457"),
    "mamba2": ("Mamba-2", "#8a6d3b"),
    "rwkv7": ("RWKV-7", "#5b3a8c"),
    # Kernels of other libraries.
    "fla parallel_rebased": ("FLA parallel_rebased", "#c49c94"),
    "fla chunk_simple_gla": ("FLA chunk_simple_gla", "#6b8e23"),
    "retention power_retention": ("retention", "#7f5fbf"),
    # Students of a softmax model, and the two forms of one operator.
    "teacher": ("teacher (softmax)", "#222222"),
    "pure": ("pure", "#a50f15"),
    "window": ("window", "#e6ab02"),
    "hybrid": ("hybrid", "#1b9e77"),
    "chunked": ("linear form", "#e4572e"),
    "quadratic": ("quadratic form", "#3b6ea5"),
}
OTHERS = ("#4c6a92", "#9c755f", "#59a14f", "#b07aa1", "#edc948")  # for models that have no style


def label_of(model: str) -> str:
    """Return the name that pictures and tables give a model."""
    return STYLES.get(model.split(",")[0], (model, ""))[0]  # after a comma stand settings, "retention, chunks of 1024"


def color_of(model: str, others: Iterable[str] = ()) -> str:
    """Return the colour of a model. One without a style takes its place among `others`, the models of the picture."""
    if model.split(",")[0] in STYLES:
        return STYLES[model.split(",")[0]][1]
    unknown = [name for name in dict.fromkeys(others) if name not in STYLES]
    return OTHERS[unknown.index(model) % len(OTHERS)] if model in unknown else OTHERS[0]


def new_figure(rows: int, columns: int, width: float, height: float, **options: Any) -> tuple[Any, Any]:
    """Return a figure, which needs no display, and its axes [rows, columns]. Width and height are a panel's inches."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    pyplot.rcParams.update({"axes.spines.top": False, "axes.spines.right": False, "legend.frameon": False})
    size = (width * columns, height * rows)
    return pyplot.subplots(rows, columns, figsize=size, squeeze=False, layout="constrained", **options)


def save(figure: Any, path: str | Path) -> None:
    """Write a figure to a file and forget it."""
    from matplotlib import pyplot

    figure.savefig(path, dpi=150, facecolor="white")
    pyplot.close(figure)


def plain_log_axis(
    axis: Axes, which: Literal["x", "y"], values: Iterable[float], ticks: Iterable[float] | None = None
) -> None:
    """Make the "x" or "y" axis logarithmic with plain numbers at its ticks: 0.2, 1, 5, 2,048.

    Args:
        axis: the axes.
        which: "x" or "y".
        values: what is drawn; the ticks stay within its range.
        ticks: where the ticks are. By default 1, 2 and 5 times powers of ten, or the powers alone over a wide range.
    """
    values = [value for value in values if value > 0]
    low, high = min(values), max(values)
    if ticks is None:
        steps = (1, 2, 5) if high / low < 200 else (1,)
        ticks = [step * 10.0**power for power in range(-6, 9) for step in steps]
        ticks = [tick for tick in ticks if low / 1.6 <= tick <= high * 1.6]
    ticks = list(ticks)
    (axis.set_xscale if which == "x" else axis.set_yscale)("log")
    line = axis.xaxis if which == "x" else axis.yaxis
    line.set_ticks(ticks, [f"{tick:,.0f}" if tick >= 1000 else f"{tick:g}" for tick in ticks])
    line.set_ticks([], minor=True)
    axis.grid(True, which="major", axis=which, alpha=0.25)


def label_lines(
    axis: Axes, ends: Sequence[tuple[float, float, str, str]], gap: float = 0.065, inside: bool = True
) -> None:
    """Write each line's name beside its last point, apart from the others.

    Args:
        axis: the axes, whose limits and scales are final.
        ends: (x, y, name, colour) of the last point of each line.
        gap: the least distance of two names, as a part of the height of the axes.
        inside: write the name of a line that ends early above its last point, not at the right edge.
    """
    to_axes = axis.transData + axis.transAxes.inverted()
    places = []
    for x, y, name, color in ends:
        right, height = to_axes.transform((x, y))
        if inside and right < 0.85:
            axis.annotate(
                name, (x, y), (-4, 5), textcoords="offset points", color=color, fontsize=9, ha="right", va="bottom"
            )
        else:
            places.append((height, x, y, name, color))
    places.sort()
    heights = [place[0] for place in places]
    for _ in range(100):  # push neighbours apart until all have room
        for i in range(len(heights) - 1):
            lack = gap - (heights[i + 1] - heights[i])
            if lack > 1e-6:
                heights[i] -= lack / 2
                heights[i + 1] += lack / 2
    for height, (_, x, y, name, color) in zip(heights, places):
        axis.annotate(
            name,
            xy=(x, y),
            xytext=(1.02, height),
            textcoords="axes fraction",
            color=color,
            fontsize=9,
            va="center",
            annotation_clip=False,
            arrowprops={"arrowstyle": "-", "color": color, "alpha": 0.35, "lw": 0.8, "shrinkA": 0, "shrinkB": 4},
        )
