"""Draw docs/idea.png, the README's picture: a block with its switch, the forms of a layer, stages and cascade.

Usage: python scripts/draw_idea.py [file, docs/idea.png by default]
"""

import sys
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Circle, FancyBboxPatch, Rectangle

WIDTH, HEIGHT = 1000, 565  # units of the drawing; 100 of them are an inch
INK, GREY, PALE = "#22303c", "#8593a0", "#eef1f4"
STATIC, STATIC_PALE = "#1f77b4", "#d6e6f3"  # as in the pictures of results
DYNAMIC, DYNAMIC_PALE = "#d62728", "#fbe3e3"

CASCADE, CASCADE_PALE = "#2ca02c", "#dcf0dc"
# Forms of a 3x3 convolution of 64 channels: what it is called, its share of the FLOPs, and how long the bar of the
# predicted rise is drawn.
FORMS = (
    ("3×3, 64 channels: unchanged", 1.0, 0.0),
    ("1×1, 3×3, 1×1: 32 channels", (2 * 64 * 32 + 9 * 32 * 32) / (9 * 64 * 64), 0.3),
    ("1×1, 3×3, 1×1: 16 channels", (2 * 64 * 16 + 9 * 16 * 16) / (9 * 64 * 64), 1.0),
    ("1×1, 3×3 depthwise, 1×1", (2 * 64 * 64 + 9 * 64) / (9 * 64 * 64), 0.14),
)
CHOSEN = 3


def text(axis: Axes, x: float, y: float, words: str, size: float = 10, **style: object) -> None:
    axis.text(x, y, words, **{"fontsize": size, "color": INK, "ha": "center", "va": "center", **style})


def line(
    axis: Axes, *points: tuple[float, float], colour: str = INK, arrow: bool = False, dashed: bool = False
) -> None:
    """A line through the points, with an arrow's head at the last one."""
    x, y = zip(*points, strict=True)
    style = (0, (3, 2)) if dashed else "-"
    if not arrow:
        axis.plot(x, y, color=colour, linewidth=1.6, linestyle=style, solid_capstyle="round", zorder=1)
        return
    if len(points) > 2:
        line(axis, *points[:-1], colour=colour, dashed=dashed)
    head = {"arrowstyle": "-|>,head_width=0.28,head_length=0.55", "color": colour, "linewidth": 1.6, "zorder": 1}
    axis.annotate(
        "", points[-1], points[-2], arrowprops={**head, "linestyle": style, "shrinkA": 0, "shrinkB": 0}, zorder=1
    )


def box(axis: Axes, left: float, bottom: float, width: float, height: float, *, face: str, edge: str) -> None:
    look = {"boxstyle": "round,pad=0,rounding_size=5", "facecolor": face, "edgecolor": edge, "linewidth": 1.5}
    axis.add_patch(FancyBboxPatch((left, bottom), width, height, **look))


def heading(axis: Axes, x: float, y: float, words: str) -> None:
    text(axis, x, y, words, 13, ha="left", weight="bold")


def draw_block(axis: Axes) -> None:
    """A residual block: the shortcut always runs, the two convolutions where the gate switches them on."""
    heading(axis, 10, 582, "A block with its switch")
    carried, residual, fork, sum_ = 345, 435, 62, 400
    line(axis, (14, carried), (sum_ - 12, carried), arrow=True)
    line(axis, (fork, carried), (fork, 515), (108, 515), arrow=True, colour=GREY)
    line(axis, (fork, carried), (fork, residual), (104, residual))
    # The switch, open, with its two contacts.
    line(axis, (104, residual), (144, residual + 24), colour=DYNAMIC)
    for x in (104, 148):
        axis.add_patch(Circle((x, residual), 4, facecolor="white", edgecolor=DYNAMIC, linewidth=1.6, zorder=3))
    line(axis, (152, residual), (184, residual), arrow=True)
    box(axis, 110, 497, 74, 36, face=DYNAMIC_PALE, edge=DYNAMIC)
    text(axis, 147, 515, "gate")
    line(axis, (128, 497), (128, residual + 18), colour=DYNAMIC, arrow=True, dashed=True)
    for left in (186, 284):
        box(axis, left, residual - 21, 78, 42, face=STATIC_PALE, edge=STATIC)
        text(axis, left + 39, residual, "3×3 conv")
    line(axis, (264, residual), (282, residual), arrow=True)
    line(axis, (362, residual), (sum_, residual), (sum_, carried + 13), arrow=True)
    axis.add_patch(Circle((sum_, carried), 12, facecolor="white", edgecolor=INK, linewidth=1.6))
    text(axis, sum_, carried, "+", 13)
    line(axis, (sum_ + 12, carried), (462, carried), arrow=True)
    axis.add_patch(Circle((fork, carried), 3.5, color=INK))
    text(axis, 12, carried - 16, "features", 9.5, ha="left", color=GREY)
    text(axis, 196, 515, "looks at the features and decides,\nimage by image, whether the block runs", 9.5, ha="left")
    text(axis, 274, residual - 43, "run only on the images\nwhose switch is on", 9.5, color=DYNAMIC)
    text(axis, 230, carried - 16, "shortcut: on all images", 9.5, color=GREY)


def draw_forms(axis: Axes) -> None:
    """The candidates of one layer with their FLOPs and the predicted rise of the loss; one is taken."""
    heading(axis, 520, 582, "The best form of a layer")
    names, flops, loss, scale = 526, 752, 880, 96
    text(axis, flops, 538, "FLOPs", 9.5, ha="left", color=GREY)
    text(axis, loss, 538, "predicted rise", 9.5, ha="left", color=GREY)
    for i, (name, share, rise) in enumerate(FORMS):
        y = 508 - 34 * i
        if i == CHOSEN:
            box(axis, names - 8, y - 15, 478, 30, face="white", edge=STATIC)
        text(axis, names, y, name, 9.5, ha="left", weight="bold" if i == CHOSEN else "normal")
        for left, value, colour in ((flops, share, STATIC), (loss, rise, DYNAMIC)):
            axis.add_patch(Rectangle((left, y - 7), scale * value, 14, facecolor=colour, alpha=0.55, linewidth=0))
    text(
        axis, 520, 351, "The rise of the loss is predicted from second derivatives.\n"
        "The forms chosen meet the target with the smallest total rise.", 10, ha="left",
    )  # fmt: skip


def draw_network(
    axis: Axes, left: float, middle: float, height: float, runs: str, colours: tuple[str, str], switches: bool = True
) -> None:
    """A chain of blocks, ``runs`` with a 1 for each that runs and a 0 for each that is skipped."""
    step, width = 33, 22
    line(axis, (left, middle), (left + step * len(runs) + 16, middle), colour=GREY, arrow=True)
    for i, run in enumerate(runs):
        x, on = left + 10 + step * i, run == "1"
        style = {"facecolor": colours[1], "edgecolor": colours[0], "linewidth": 1.5}
        if not on:
            style = {"fill": False, "edgecolor": DYNAMIC, "linewidth": 1.2, "linestyle": (0, (2, 2))}
        axis.add_patch(Rectangle((x, middle - height / 2), width, height, zorder=2, **style))
        if switches and i > 0:
            face = DYNAMIC if on else "white"
            axis.add_patch(Circle((x - 5.5, middle), 3.6, facecolor=face, edgecolor=DYNAMIC, linewidth=1.3, zorder=4))


def draw_stages(axis: Axes) -> None:
    """The three stages, and the cascade."""
    step, top, static = 250, 278, (STATIC, STATIC_PALE)
    columns = (
        ("1", "Train", "main_sp.py", "With or without switches\nin front of the blocks.", INK),
        ("2", "Prune statically", "main_prune.py", "Measure, rebuild, fine-tune,\nwithin the accuracy budget.", STATIC),
        ("3", "Teach the switches", "main_rl_prune.py", "Reinforcement learning\nrewards saved FLOPs.", DYNAMIC),
        ("or", "Build a cascade", "main_cascade.py", "The small network answers\nif it is confident.", CASCADE),
    )
    line(axis, (10, 308), (990, 308), colour="#d5dbe1")
    for i, (number, title, script, words, colour) in enumerate(columns):
        left = 10 + step * i
        axis.add_patch(Circle((left + 13, top - 3), 13, color=colour))
        text(axis, left + 13, top - 4, number, 12 if len(number) == 1 else 9.5, color="white", weight="bold")
        text(axis, left + 36, top + 6, title, 12, ha="left", weight="bold")
        text(axis, left + 36, top - 14, script, 9.5, ha="left", family="monospace", color=GREY)
        text(axis, left, 66, words, 10, ha="left")
        if i < 2:
            x = left + step - 22
            axis.plot((x, x + 8, x), (183, 165, 147), color="#b9c3cc", linewidth=4, solid_joinstyle="round")
    draw_network(axis, 10, 165, 104, "111111", (INK, PALE))
    draw_network(axis, 10 + step, 165, 34, "111111", static)
    for middle, name, runs in ((196, "an easy image", "110010"), (122, "a hard image", "111011")):
        draw_network(axis, 10 + 2 * step, middle, 34, runs, static)
        text(axis, 20 + 2 * step, middle + 26, name, 9.5, ha="left", color=GREY)
    left = 10 + 3 * step
    draw_network(axis, left, 204, 20, "111", (CASCADE, CASCADE_PALE), switches=False)
    text(axis, left + 120, 204, "sure: the answer", 9.5, ha="left")
    line(axis, (left + 60, 192), (left + 60, 152), colour=CASCADE, arrow=True, dashed=True)
    text(axis, left + 70, 175, "not sure: hand it on", 9.5, ha="left", color=CASCADE)
    draw_network(axis, left, 126, 44, "11111", static, switches=False)
    text(axis, left + 186, 126, "answer", 9.5, ha="left")


def main(path: Path) -> None:
    figure = Figure(figsize=(WIDTH / 100, HEIGHT / 100), facecolor="white")
    axis = figure.add_axes((0, 0, 1, 1))
    draw_block(axis)
    draw_forms(axis)
    draw_stages(axis)
    axis.set(xlim=(0, WIDTH), ylim=(600 - HEIGHT, 600), aspect="equal")
    axis.axis("off")
    figure.savefig(path, dpi=180)


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else Path(__file__).parents[1] / "docs" / "idea.png"))
