"""Draw docs/block.png: the model, one layer of it, and its two mixers.    python docs/draw_block.py"""

from pathlib import Path

import matplotlib


matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.patches import FancyBboxPatch


INK, MUTED = "#1f2933", "#7b8794"
COLORS = {"plain": "#f5f7fa", "norm": "#e3e8ef", "mixer": "#ffe3c2", "mlp": "#d5ecd8", "learnt": "#ffd3d3"}


class Column:
    """A column of boxes, bottom to top, in the order data flows."""

    def __init__(self, ax: plt.Axes, x: float, title: str) -> None:
        self.ax, self.x = ax, x
        ax.text(x, 11.55, title, ha="center", va="center", fontsize=12, fontweight="bold", color=INK)

    def box(self, y: float, text: str, kind: str = "plain", dx: float = 0.0, width: float = 2.6) -> None:
        """Draw a box of height 0.7 around the point (x + dx, y)."""
        style = "round,pad=0.02,rounding_size=0.12"
        left, bottom = self.x + dx - width / 2, y - 0.35
        patch = FancyBboxPatch((left, bottom), width, 0.7, boxstyle=style, fc=COLORS[kind], ec=INK, lw=1.1)
        self.ax.add_patch(patch)
        self.ax.text(self.x + dx, y, text, ha="center", va="center", fontsize=9.5, color=INK)

    def circle(self, y: float, text: str, dx: float = 0.0) -> None:
        """Draw an operation: a sum or a product."""
        self.ax.add_patch(plt.Circle((self.x + dx, y), 0.2, fc="white", ec=INK, lw=1.1, zorder=3))
        self.ax.text(self.x + dx, y, text, ha="center", va="center", fontsize=11, color=INK, zorder=4)

    def arrow(self, y0: float, y1: float, dx0: float = 0.0, dx1: float | None = None) -> None:
        """Draw an arrow from height y0 to y1."""
        end = self.x + (dx0 if dx1 is None else dx1)
        arrow = {"arrowstyle": "-|>", "color": INK, "lw": 1.1, "shrinkA": 0, "shrinkB": 0}
        self.ax.annotate("", xy=(end, y1), xytext=(self.x + dx0, y0), arrowprops=arrow)

    def skip(self, y0: float, y1: float, dx: float) -> None:
        """Draw a residual connection that leaves the trunk at y0 and enters the circle at y1."""
        side = self.x + dx
        self.ax.plot([self.x, side, side], [y0, y0, y1], color=INK, lw=1.1)
        self.arrow(y1, y1, dx, -0.2 if dx < 0 else 0.2)

    def note(self, y: float, text: str, dx: float = 0.0) -> None:
        """Write a remark."""
        self.ax.text(self.x + dx, y, text, ha="center", va="center", fontsize=8.5, color=MUTED)


def draw(path: Path) -> None:
    """Draw the picture into `path`."""
    fig, ax = plt.subplots(figsize=(13.5, 8.2))
    ax.set_xlim(0, 20)
    ax.set_ylim(0, 12)
    ax.axis("off")

    model = Column(ax, 2.0, "Model")
    model.note(0.35, "token ids  [B, T]")
    boxes = [("word embedding", "plain"), ("layer: conv", "mixer"), ("layer: ReBased", "mixer")]
    boxes += [("layer: conv", "mixer"), ("layer: ReBased", "mixer"), ("norm", "norm"), ("tied output layer", "plain")]
    for i, (text, kind) in enumerate(boxes):
        model.arrow(0.55 if i == 0 else 1.4 * i + 0.2, 1.4 * i + 0.85)
        model.box(1.4 * i + 1.2, text, kind)
    model.arrow(9.95, 10.75)
    model.note(10.95, "logits  [B, T, vocabulary]")
    model.note(6.1, "…", dx=1.6)

    layer = Column(ax, 6.4, "One layer")
    layer.note(0.35, "x  [B, T, hidden]")
    layer.arrow(0.55, 2.05)
    layer.box(2.4, "norm", "norm")
    layer.arrow(2.75, 3.45)
    layer.box(3.8, "mixer: conv or ReBased", "mixer", width=3.2)
    layer.arrow(4.15, 5.0)
    layer.circle(5.2, "+")
    layer.skip(1.2, 5.2, -1.75)
    layer.arrow(5.4, 6.95)
    layer.box(7.3, "norm", "norm")
    layer.arrow(7.65, 8.35)
    layer.box(8.7, "MLP", "mlp")
    layer.arrow(9.05, 9.9)
    layer.circle(10.1, "+")
    layer.skip(6.1, 10.1, -1.75)
    layer.arrow(10.3, 10.9)

    attention = Column(ax, 11.7, "ReBased mixer")
    attention.note(0.35, "x  [B, T, hidden]")
    attention.arrow(0.55, 1.65)
    for dx, name in ((-1.75, "q = W_q x"), (0.0, "k = W_k x"), (1.75, "v = W_v x")):
        if dx:
            attention.ax.plot([attention.x, attention.x + dx], [1.1, 1.1], color=INK, lw=1.1)
            attention.arrow(1.1, 1.65, dx)
        attention.box(2.0, name, "plain", dx, 1.55)
    for dx in (-1.75, 0.0):
        attention.arrow(2.35, 3.15, dx)
        attention.box(3.5, "norm, γ, β", "learnt", dx, 1.55)
        attention.arrow(3.85, 5.0, dx, dx / 3)
    attention.box(5.35, "w = (q · k / √F)²   for j ≤ i", "mixer", -0.3, 3.3)
    attention.arrow(5.7, 6.95, -0.3, -0.3)
    attention.arrow(2.35, 6.95, 1.75, 1.75)
    attention.box(7.3, "o = Σ w v / (Σ w + ε)", "mixer", 0.3, 4.3)
    attention.arrow(7.65, 8.35, 0.0)
    attention.box(8.7, "W_o, all heads", "plain")
    attention.arrow(9.05, 10.9)
    attention.note(9.95, "linear in T: w is φ(q) · φ(k), so a state\nof F(F+1)/2 × (D+1) a head is enough", dx=2.35)

    conv = Column(ax, 17.4, "conv mixer (BaseConv)")
    conv.note(0.35, "x  [B, T, hidden]")
    conv.arrow(0.55, 7.4)
    conv.ax.plot([conv.x - 1.3, conv.x + 1.3], [1.1, 1.1], color=INK, lw=1.1)
    for dx, text in ((-1.3, "causal conv,\n3 tokens deep"), (1.3, "W x + b")):
        conv.arrow(1.1, 3.15, dx)
        conv.box(3.5, text, "mixer" if dx < 0 else "plain", dx, 2.2)
        conv.ax.plot([conv.x + dx, conv.x + dx, conv.x + 1.3], [3.85, 5.2, 5.2], color=INK, lw=1.1)
    conv.circle(5.2, "×", dx=1.3)
    conv.ax.plot([conv.x + 1.3, conv.x + 1.3], [5.4, 7.6], color=INK, lw=1.1)
    conv.arrow(7.6, 7.6, 1.3, 0.2)
    conv.circle(7.6, "+")
    conv.arrow(7.8, 10.9)

    fig.savefig(path, dpi=130, bbox_inches="tight", facecolor="white")


if __name__ == "__main__":
    draw(Path(__file__).with_name("block.png"))
