"""Draw docs/idea.png, the README's picture: a block with its switch, a convolution rebuilt, the three stages.

Usage: python scripts/draw_idea.py [file, docs/idea.png by default]
"""

import sys
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Circle, FancyBboxPatch, Polygon, Rectangle

WIDTH, HEIGHT = 1000, 565  # units of the drawing; 100 of them are an inch
INK, GREY, PALE = "#22303c", "#8593a0", "#eef1f4"
STATIC, STATIC_PALE = "#1f77b4", "#d6e6f3"  # as in the pictures of results
DYNAMIC, DYNAMIC_PALE = "#d62728", "#fbe3e3"

CELLS, KEPT = 16, 6  # directions drawn of a layer, and those that stay: 64 and 24 channels, four to a cell


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


def box(
    axis: Axes, left: float, bottom: float, width: float, height: float, *, face: str, edge: str, rounding: float = 5
) -> None:
    style = f"round,pad=0,rounding_size={rounding}"
    axis.add_patch(
        FancyBboxPatch((left, bottom), width, height, boxstyle=style, facecolor=face, edgecolor=edge, linewidth=1.5)
    )


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


def weights() -> tuple[np.ndarray, np.ndarray]:
    """Sizes of a made-up layer's weights [CELLS, CELLS] between channels, and between directions of the eigenbasis."""
    generator = np.random.default_rng(3)
    decay = np.exp(-np.arange(CELLS) / 3.0)
    rotated = generator.standard_normal((CELLS, CELLS)) * np.sqrt(np.outer(decay, decay)) + 0.05
    bases = [np.linalg.qr(generator.standard_normal((CELLS, CELLS)))[0] for _ in range(2)]
    return np.abs(bases[0] @ rotated @ bases[1].T), np.abs(rotated)


def draw_matrix(axis: Axes, values: np.ndarray, left: float, bottom: float, side: float) -> None:
    extent = (left, left + side, bottom, bottom + side)
    axis.imshow(values**0.6, extent=extent, cmap="Blues", vmin=0, vmax=1.15 * values.max() ** 0.6, zorder=2)
    axis.add_patch(Rectangle((left, bottom), side, side, fill=False, edgecolor=STATIC, linewidth=1.5, zorder=4))


def draw_convolution(axis: Axes) -> None:
    """A weight, the same in the eigenbasis with the directions that go, and two forms of what is left."""
    heading(axis, 520, 582, "A convolution in a cheaper form")
    side, bottom = 112, 407
    channels, directions = weights()
    first, second, third = 520, 682, 858
    draw_matrix(axis, channels, first, bottom, side)
    draw_matrix(axis, directions, second, bottom, side)
    kept = side * KEPT / CELLS
    gone = {"facecolor": "white", "alpha": 0.72, "zorder": 3}
    axis.add_patch(Rectangle((second, bottom), side, side - kept, **gone))
    axis.add_patch(Rectangle((second + kept, bottom + side - kept), side - kept, kept, **gone))
    axis.add_patch(
        Rectangle((second, bottom + side - kept), kept, kept, fill=False, edgecolor=INK, linewidth=1.8, zorder=5)
    )
    text(axis, second + (side + kept) / 2 - 18, bottom + (side - kept) / 2, "matters\nlittle", 10, zorder=6)
    middle = bottom + side / 2
    line(axis, (first + side + 6, middle), (second - 6, middle), arrow=True)
    text(axis, (first + side + second) / 2, middle + 14, "rotate", 9.5)
    line(axis, (second + side + 6, middle), (third - 8, middle), arrow=True)
    text(axis, (second + side + third) / 2, middle + 14, "rebuild", 9.5)
    draw_form(axis, third, middle + 32, 1)
    text(axis, third + 66, middle, "or", 9.5, color=GREY)
    draw_form(axis, third, middle - 32, 5)
    text(axis, first + side / 2, bottom + side + 14, "64 → 64 channels", 9.5)
    text(axis, second + side / 2, bottom + side + 14, "64 → 64 directions", 9.5)
    text(axis, third + 66, bottom + side + 14, "64 → 24 → 24 → 64", 9.5)
    text(axis, first + side / 2, bottom - 16, "3×3 weights", 9.5, color=GREY)
    text(axis, third + 66, bottom - 16, "3×3 of each channel", 9.5, color=GREY)
    text(axis, second + side / 2, bottom - 16, "weighed by curvature", 9.5, color=GREY)
    text(
        axis, 520, 346, "In the eigenbasis of the loss's curvature a few directions matter.\n"
        "Every layer takes the form that loses least for its FLOPs.", 10, ha="left",
    )  # fmt: skip


def draw_form(axis: Axes, left: float, middle: float, kernels: int) -> None:
    """1x1, core, 1x1, as high as they have channels; the core of one kernel for all channels, or one for each."""
    high, low = 25, 13
    for start, a, b in ((left, high, low), (left + 92, low, high)):
        corners = [(start, middle - a), (start, middle + a), (start + 40, middle + b), (start + 40, middle - b)]
        axis.add_patch(Polygon(corners, facecolor=PALE, edgecolor=GREY, linewidth=1.5, joinstyle="round"))
        text(axis, start + 20, middle, "1×1", 9.5)
    height = 2 * low / kernels
    for i in range(kernels):
        axis.add_patch(
            Rectangle(
                (left + 45, middle - low + i * height), 42, height, facecolor=STATIC_PALE, edgecolor=STATIC,
                linewidth=1.5 if kernels == 1 else 1.0,
            )
        )  # fmt: skip
    if kernels == 1:
        text(axis, left + 66, middle, "3×3", 9.5)


def draw_network(axis: Axes, left: float, middle: float, height: float, runs: str, *, switches: bool) -> None:
    """A chain of blocks, ``runs`` with a 1 for each that runs and a 0 for each that is skipped."""
    colour, face = (INK, PALE) if height > 40 else (STATIC, STATIC_PALE)
    step, width = 33, 22
    line(axis, (left, middle), (left + step * len(runs) + 18, middle), colour=GREY, arrow=True)
    for i, run in enumerate(runs):
        x = left + 10 + step * i
        if run == "1":
            axis.add_patch(
                Rectangle(
                    (x, middle - height / 2), width, height, facecolor=face, edgecolor=colour, linewidth=1.5, zorder=2
                )
            )
        else:
            outline = {"edgecolor": DYNAMIC, "linewidth": 1.2, "linestyle": (0, (2, 2)), "zorder": 2}
            axis.add_patch(Rectangle((x, middle - height / 2), width, height, fill=False, **outline))
        if switches and i > 0:
            on = run == "1"
            axis.add_patch(
                Circle(
                    (x - 5.5, middle), 3.6, facecolor=DYNAMIC if on else "white", edgecolor=DYNAMIC, linewidth=1.3,
                    zorder=4,
                )
            )  # fmt: skip


def draw_stages(axis: Axes) -> None:
    lefts, top = (10, 352, 694), 278
    titles = ("Train network and switches", "Prune statically", "Teach the switches to skip")
    scripts = ("main_sp.py", "main_prune.py", "main_rl_prune.py")
    says = (
        "Supervised. On half of the images every\nblock runs, on the others switches decide.",
        "Measure, rebuild, fine-tune, repeat,\nwhile the accuracy stays within the budget.",
        "By REINFORCE: rewarded for FLOPs saved.\nThose that do not pay are fixed at the end.",
    )
    colours = (INK, STATIC, DYNAMIC)
    line(axis, (10, 308), (990, 308), colour="#d5dbe1")
    for i, (left, title, script, words, colour) in enumerate(zip(lefts, titles, scripts, says, colours, strict=True)):
        axis.add_patch(Circle((left + 13, top - 3), 13, color=colour))
        text(axis, left + 13, top - 4, str(i + 1), 12, color="white", weight="bold")
        text(axis, left + 36, top + 6, title, 12, ha="left", weight="bold")
        text(axis, left + 36, top - 14, script, 9.5, ha="left", family="monospace", color=GREY)
        text(axis, left, 66, words, 10, ha="left")
        if i < 2:
            x = lefts[i + 1] - 30
            axis.plot((x, x + 10, x), (185, 165, 145), color="#b9c3cc", linewidth=4, solid_joinstyle="round")
    draw_network(axis, lefts[0], 165, 104, "11111111", switches=True)
    draw_network(axis, lefts[1], 165, 34, "11111111", switches=True)
    for middle, name, runs in ((202, "an easy image", "11001000"), (126, "a hard image", "11111011")):
        draw_network(axis, lefts[2], middle, 34, runs, switches=True)
        text(axis, lefts[2] + 10, middle + 27, name, 9.5, ha="left", color=GREY)


def main(path: Path) -> None:
    figure = Figure(figsize=(WIDTH / 100, HEIGHT / 100), facecolor="white")
    axis = figure.add_axes((0, 0, 1, 1))
    draw_block(axis)
    draw_convolution(axis)
    draw_stages(axis)
    axis.set(xlim=(0, WIDTH), ylim=(600 - HEIGHT, 600), aspect="equal")
    axis.axis("off")
    figure.savefig(path, dpi=180)


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else Path(__file__).parents[1] / "docs" / "idea.png"))
