"""Draw docs/block.png: the model, one of its layers, and the five kinds of mixer.    python docs/draw_block.py"""

from pathlib import Path

import matplotlib


matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.patches import FancyBboxPatch


INK, MUTED = "#1f2933", "#52606d"
COLORS = {"plain": "#f5f7fa", "norm": "#e3e8ef", "mixer": "#ffe3c2", "mlp": "#d5ecd8", "learnt": "#ffd3d3"}


class Column:
    """Draw a column of boxes, bottom to top, in the order data flows. Heights count from `bottom`."""

    def __init__(self, ax: plt.Axes, x: float, bottom: float, title: str, remark: str = "") -> None:
        self.ax, self.x, self.bottom = ax, x, bottom
        ax.text(x, bottom + 8.6, title, ha="center", va="center", fontsize=13, fontweight="bold", color=INK)
        ax.text(x, bottom + 8.15, remark, ha="center", va="center", fontsize=9.5, color=MUTED)

    def box(self, y: float, text: str, kind: str = "plain", dx: float = 0.0, width: float = 2.6) -> None:
        """Draw a box of height 0.62 around the point (x + dx, y)."""
        style = "round,pad=0.02,rounding_size=0.12"
        left, bottom = self.x + dx - width / 2, self.bottom + y - 0.31
        patch = FancyBboxPatch((left, bottom), width, 0.62, boxstyle=style, fc=COLORS[kind], ec=INK, lw=1.1)
        self.ax.add_patch(patch)
        self.ax.text(self.x + dx, self.bottom + y, text, ha="center", va="center", fontsize=10, color=INK)

    def circle(self, y: float, text: str, dx: float = 0.0) -> None:
        """Draw an operation: a sum or a product."""
        center = (self.x + dx, self.bottom + y)
        self.ax.add_patch(plt.Circle(center, 0.19, fc="white", ec=INK, lw=1.1, zorder=3))
        self.ax.text(*center, text, ha="center", va="center", fontsize=11, color=INK, zorder=4)

    def arrow(self, y0: float, y1: float, dx0: float = 0.0, dx1: float | None = None) -> None:
        """Draw an arrow from height y0 to y1."""
        end = self.x + (dx0 if dx1 is None else dx1)
        arrow = {"arrowstyle": "-|>", "color": INK, "lw": 1.1, "shrinkA": 0, "shrinkB": 0}
        start = (self.x + dx0, self.bottom + y0)
        self.ax.annotate("", xy=(end, self.bottom + y1), xytext=start, arrowprops=arrow)

    def line(self, *points: tuple[float, float]) -> None:
        """Draw a line through points (dx, y)."""
        xs, ys = zip(*((self.x + dx, self.bottom + y) for dx, y in points))
        self.ax.plot(xs, ys, color=INK, lw=1.1)

    def skip(self, y0: float, y1: float, dx: float) -> None:
        """Draw a residual connection that leaves the trunk at y0 and enters the circle at y1."""
        self.line((0, y0), (dx, y0), (dx, y1))
        self.arrow(y1, y1, dx, -0.19 if dx < 0 else 0.19)

    def note(self, y: float, text: str, dx: float = 0.0, size: float = 9) -> None:
        """Write a remark."""
        self.ax.text(self.x + dx, self.bottom + y, text, ha="center", va="center", fontsize=size, color=MUTED)


def draw_model(ax: plt.Axes, x: float, bottom: float) -> None:
    """Draw the whole model."""
    model = Column(ax, x, bottom, "Model", "layer_types names the mixer of each layer")
    model.note(0.1, "token ids [B, T]")
    places = (1.0, 1.95, 2.9, 4.7, 5.7, 6.7)
    texts = ("word embedding", "layer 1", "layer 2", "layer N", "norm", "output layer")
    kinds = ("plain", "mixer", "mixer", "mixer", "norm", "plain")
    model.arrow(0.3, places[0] - 0.33)
    for y, text, kind in zip(places, texts, kinds):
        model.box(y, text, kind)
    for low, high in ((0, 1), (1, 2), (3, 4), (4, 5)):
        model.arrow(places[low] + 0.33, places[high] - 0.33)
    model.line((0, 3.21), (0, 3.45))
    model.note(3.77, "⋮", size=18)
    model.arrow(4.08, 4.37)
    model.arrow(7.03, 7.4)
    model.note(7.6, "logits [B, T, vocabulary]")


def draw_layer(ax: plt.Axes, x: float, bottom: float) -> None:
    """Draw one layer with its two residual connections."""
    layer = Column(ax, x, bottom, "One layer", "the same around every mixer")
    layer.note(0.15, "x [B, T, hidden size]")
    layer.arrow(0.32, 1.12)
    layer.box(1.45, "norm", "norm")
    layer.arrow(1.78, 2.22)
    layer.box(2.55, "one of five mixers", "mixer")
    layer.arrow(2.88, 3.31)
    layer.circle(3.5, "+")
    layer.skip(0.7, 3.5, -1.75)
    layer.arrow(3.69, 4.62)
    layer.box(4.95, "norm", "norm")
    layer.arrow(5.28, 5.62)
    layer.box(5.95, "MLP", "mlp")
    layer.arrow(6.28, 6.66)
    layer.circle(6.85, "+")
    layer.skip(4.1, 6.85, -1.75)
    layer.arrow(7.04, 7.5)


def draw_conv(ax: plt.Axes, x: float, bottom: float) -> None:
    """Draw the short convolution of the paper's models."""
    conv = Column(ax, x, bottom, '"conv"', "short convolution (BaseConv)")
    conv.note(0.15, "x [B, T, hidden size]")
    conv.arrow(0.32, 5.46)
    conv.line((-1.4, 0.9), (1.4, 0.9))
    for dx, text in ((-1.4, "causal conv,\n3 tokens"), (1.4, "W x + b")):
        conv.arrow(0.9, 2.12, dx)
        conv.box(2.45, text, "mixer" if dx < 0 else "plain", dx, 2.3)
        conv.line((dx, 2.78), (dx, 4.0), (1.4, 4.0))
    conv.circle(4.0, "×", dx=1.4)
    conv.line((1.4, 4.19), (1.4, 5.65))
    conv.arrow(5.65, 5.65, 1.4, 0.19)
    conv.circle(5.65, "+")
    conv.arrow(5.84, 7.5)


def draw_attention(
    ax: plt.Axes,
    x: float,
    bottom: float,
    *,
    names: tuple[str, str],
    step: tuple[str, str],
    sums: tuple[str, str],
    kept: str,
) -> None:
    """Draw attention: the step that queries and keys pass (text and kind of box), the two sums, and what is kept."""
    mixer = Column(ax, x, bottom, *names)
    mixer.note(0.15, "x [B, T, hidden size]")
    mixer.arrow(0.32, 1.12)
    for dx, name in ((-1.8, "q = W_q x"), (0.0, "k = W_k x"), (1.8, "v = W_v x")):
        if dx:
            mixer.line((0, 0.7), (dx, 0.7))
            mixer.arrow(0.7, 1.12, dx)
        mixer.box(1.45, name, "plain", dx, 1.6)
    for dx in (-1.8, 0.0):
        mixer.arrow(1.78, 2.27, dx)
        mixer.box(2.6, *step, dx, 1.6)
        mixer.arrow(2.93, 3.57, dx, dx / 2 - 0.4)
    mixer.box(3.9, sums[0], "mixer", -0.8, 3.6)
    mixer.arrow(4.23, 4.87, -0.8)
    mixer.arrow(1.78, 4.87, 1.8)
    mixer.box(5.2, sums[1], "mixer", 0.3, 4.2)
    mixer.arrow(5.53, 6.02)
    mixer.box(6.35, "W_o, all heads", "plain")
    mixer.arrow(6.68, 7.2)
    mixer.note(7.4, kept)


def draw_linear(ax: plt.Axes, x: float, bottom: float) -> None:
    """Draw ReBased linear attention."""
    draw_attention(
        ax,
        x,
        bottom,
        names=('"linear_attention"', "ReBased, over the whole past"),
        step=("norm, γ, β", "learnt"),
        sums=("w = (q · k / √F)²   for j ≤ i", "o = Σ w v / (Σ w + ε)"),
        kept="state: F(F+1)/2 × (D+1) numbers per head",
    )


def draw_softmax(ax: plt.Axes, x: float, bottom: float) -> None:
    """Draw softmax attention, over a window or over everything."""
    draw_attention(
        ax,
        x,
        bottom,
        names=('"sliding_attention", "full_attention"', "softmax, over a window or the whole past"),
        step=("rotary, if set", "norm"),
        sums=("w = exp(q · k / √D)   for j ≤ i", "o = Σ w v / Σ w"),
        kept="cache: keys and values of all tokens in reach",
    )


def draw_hybrid(ax: plt.Axes, x: float, bottom: float) -> None:
    """Draw ReBased and a softmax window in one layer."""
    hybrid = Column(ax, x, bottom, '"hybrid_sliding"', "ReBased and a softmax window in one layer")
    hybrid.note(0.15, "x [B, T, hidden size]")
    hybrid.arrow(0.32, 1.12)
    hybrid.box(1.45, "v = W_v x", "plain", 0.0, 1.6)
    for side in (-1, 1):
        hybrid.line((0, 0.7), (side * 2.0, 0.7))
        hybrid.arrow(0.7, 1.12, side * 2.0)
        hybrid.box(1.45, "q, k", "plain", side * 2.0, 1.6)
        hybrid.arrow(1.78, 3.12, side * 2.0, side * 1.7)
        hybrid.arrow(1.78, 3.12, 0.0, side * 1.0)
    hybrid.box(3.45, "ReBased,\nwhole past", "mixer", -1.4, 2.4)
    hybrid.box(3.45, "softmax,\nwindow", "mixer", 1.4, 2.4)
    hybrid.arrow(3.78, 4.87, -1.4, -0.8)
    hybrid.arrow(3.78, 4.87, 1.4, 0.8)
    hybrid.box(5.2, "g · ReBased + (1 - g) · softmax", "learnt", 0.0, 4.2)
    hybrid.note(4.35, "g: learnt, one\nper head", size=8.5)
    hybrid.arrow(5.53, 6.02)
    hybrid.box(6.35, "W_o, all heads", "plain")
    hybrid.arrow(6.68, 7.2)
    hybrid.note(7.4, "cache: the state, and the window's keys and values")


def draw(path: Path) -> None:
    """Draw the picture into `path`."""
    fig, ax = plt.subplots(figsize=(14, 13.2))
    ax.set_xlim(0, 18)
    ax.set_ylim(0, 18.1)
    ax.set_aspect("equal")
    ax.axis("off")
    for part, x, bottom in (
        (draw_model, 3.0, 9.3),
        (draw_layer, 9.0, 9.3),
        (draw_conv, 15.0, 9.3),
        (draw_linear, 3.0, 0.0),
        (draw_softmax, 9.0, 0.0),
        (draw_hybrid, 15.0, 0.0),
    ):
        part(ax, x, bottom)
    fig.savefig(path, dpi=100, bbox_inches="tight", facecolor="white")


if __name__ == "__main__":
    draw(Path(__file__).with_name("block.png"))
