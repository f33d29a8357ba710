"""Draws the figures of README.md and RESULTS.md from results.csv. It needs matplotlib.

python assets/figures.py      # writes curves, lambda, course and method.png beside this file
"""

import csv
from pathlib import Path

import matplotlib.pyplot as plt

HERE = Path(__file__).parent
PROBES = {"knn": "k-NN", "last": "linear, last block", "last4": "linear, last four blocks"}
COLOURS = {
    "masked": "#8c1c17",
    "patches alone": "#d6453d",
    "patches alone, rate to 0": "#e08a85",
    "patches alone narrow": "#eebfbc",
    "crops": "#2f6fd0",
    "I-JEPA": "#2e9e5b",
}


def rows(section):
    """The section's rows, with numbers where there are some."""
    with open(HERE / "results.csv") as file:
        found = [row for row in csv.DictReader(file) if row["section"] == section]
    numbers = "images", "share", "rank", *PROBES
    return [row | {n: float(row[n]) for n in numbers if row[n]} for row in found]


def curves():
    """Each probe over the images seen: CPU runs as lines, means of seeds; GPU runs hollow."""
    figure, axes = plt.subplots(1, 3, figsize=(10.5, 3.5), sharey=True)
    data = rows("cifar")
    for axis, (probe, title) in zip(axes, PROBES.items(), strict=True):
        for run, colour in COLOURS.items():
            on_cpu, on_gpu = {}, []
            for row in data:
                if row["run"] == run and "H200" in row["hardware"]:
                    on_gpu.append((row["images"], row[probe]))
                elif row["run"] == run:
                    on_cpu.setdefault(row["images"], []).append(row[probe])
            means = [
                (images, sum(on_cpu[images]) / len(on_cpu[images])) for images in sorted(on_cpu)
            ]
            if not means:
                continue
            name = "I-JEPA, simplified" if run == "I-JEPA" else run
            axis.plot(*zip(*means, strict=True), "o-", color=colour, ms=4, label=name)
            if on_gpu:
                axis.plot(*zip(*on_gpu, strict=True), "D", color=colour, ms=5, mfc="white")
        floor = next(row[probe] for row in data if row["run"] == "untrained")
        labels = sorted((row["images"], row["last"]) for row in data if row["run"] == "labels")
        axis.axhline(floor, color="#888888", ls=":", label="untrained")
        axis.plot(*zip(*labels, strict=True), "s--", color="#333333", ms=3, lw=1, label="labels")
        axis.set(xscale="log", title=title, xlabel="images seen")
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("CIFAR-10 top-1, %")
    axes[2].legend(fontsize=7, loc="lower right")
    figure.savefig(HERE / "curves.png", dpi=130, facecolor="white", bbox_inches="tight")


def lam():
    """The probes, and the effective rank, over lambda."""
    figure, axis = plt.subplots(figsize=(5.5, 3.2))
    data = rows("lambda")
    x, twin = [float(row["run"]) for row in data], axis.twinx()
    for (probe, title), colour in zip(
        PROBES.items(), ("#d6453d", "#2f6fd0", "#2e9e5b"), strict=True
    ):
        axis.plot(x, [row[probe] for row in data], "o-", color=colour, ms=4, label=title)
    rank = [row["rank"] for row in data]
    twin.plot(x, rank, "s:", color="#888888", ms=4, label="effective rank")
    twin.set_ylabel("effective rank, of 128")
    axis.set(xscale="log", xlabel="λ", ylabel="CIFAR-10 top-1, %")
    axis.grid(alpha=0.3)
    figure.legend(fontsize=7, loc="upper left", bbox_to_anchor=(0.13, 0.88))
    figure.savefig(HERE / "lambda.png", dpi=130, facecolor="white", bbox_inches="tight")


def course():
    """Effective rank and share over training, with the loss of whole images and without."""
    figure, axes = plt.subplots(1, 2, figsize=(8, 2.8))
    runs = {"patches alone": rows("masks"), "masked": rows("cifar")}
    titles = {"rank": "effective rank, of 128", "share": "share of variance not predicted"}
    for axis, (column, title) in zip(axes, titles.items(), strict=True):
        for run, data in runs.items():
            found = {}
            for row in data:
                if row["run"] == run and row["images"] <= 716_800:
                    found.setdefault(row["images"], []).append(row[column])
            means = [(images, sum(found[images]) / len(found[images])) for images in sorted(found)]
            points = [(images / 1000, mean) for images, mean in means]
            axis.plot(*zip(*points, strict=True), "o-", color=COLOURS[run], ms=4, label=run)
        axis.set(title=title, xlabel="thousand images seen")
        axis.grid(alpha=0.3)
    axes[0].legend(fontsize=8)
    figure.savefig(HERE / "course.png", dpi=130, facecolor="white", bbox_inches="tight")


INK, BLUE, RED, GREEN = "#333333", "#2f6fd0", "#d6453d", "#2e9e5b"


def box(axis, x, y, width, height, text, colour=INK):
    """A box around its centre, with its text."""
    corner = x - width / 2, y - height / 2
    style = {"boxstyle": "round,pad=0,rounding_size=0.08", "fc": "white", "ec": colour, "lw": 1.3}
    axis.add_patch(plt.matplotlib.patches.FancyBboxPatch(corner, width, height, **style))
    axis.text(x, y, text, ha="center", va="center", fontsize=8.5, color=colour)


def arrow(axis, start, end, colour=INK):
    axis.annotate("", end, start, arrowprops={"arrowstyle": "-|>", "color": colour, "lw": 1.2})


def picture(axis, x, y, pieces, grid=8, side=1.5):
    """An image as a grid of patches; pieces: (row, column, height, width, colour) in patches."""
    step = side / grid
    for row, column, height, width, colour in pieces:
        corner = x - side / 2 + column * step, y + side / 2 - (row + height) * step
        axis.add_patch(plt.Rectangle(corner, width * step, height * step, fc=colour, alpha=0.75))
    for i in range(grid + 1):
        at = -side / 2 + i * step
        axis.plot([x + at, x + at], [y - side / 2, y + side / 2], color=INK, lw=0.4)
        axis.plot([x - side / 2, x + side / 2], [y + at, y + at], color=INK, lw=0.4)


def method():
    """The two recipes side by side: an image, one encoder, and where the losses look."""
    figure, axes = plt.subplots(1, 2, figsize=(13, 4.4))
    for axis, title in zip(axes, ("--recipe masked", "--recipe crops"), strict=True):
        axis.set(xlim=(0, 12), ylim=(0, 8.4), aspect="equal")
        axis.set_title(title, family="monospace", fontsize=10, color=INK)
        axis.axis("off")
    left, right = axes
    first, second = (1, 0, 4, 4), (4, 4, 4, 4)
    holes = [(*block, "white") for block in (first, second)]
    pieces = [(0, 0, 8, 8, BLUE), *holes], [(*first, RED)], [(*second, GREEN)]
    for y, patches, name in zip(
        (6.9, 4.3, 1.7), pieces, ("context", "target", "target"), strict=True
    ):
        picture(left, 1.2, y, patches)
        left.text(1.2, y - 1.05, name, ha="center", fontsize=8.5, color=patches[0][4])
        arrow(left, (2.1, y), (2.85, 4.3 + (y - 4.3) * 0.6))
    box(left, 3.7, 4.3, 1.6, 4.4, "one\nencoder")
    for y, text, loss in (
        (6.9, "predictor: each side\nfrom the other's mean", "prediction error\nof patch tokens"),
        (4.3, "patch tokens", "SIGReg (legendre)"),
        (1.7, "head, on the\nmean patch tokens", "agreement of views,\nSIGReg (sketched)"),
    ):
        arrow(left, (4.55, 4.3 + (y - 4.3) * 0.6), (5.0, y))
        box(left, 6.85, y, 3.6, 1.3, text)
        arrow(left, (8.7, y), (9.15, y))
        left.text(9.25, y, loss, va="center", fontsize=8.5, weight="bold", color=INK)
    crops = (0, 0, 6, 6, BLUE), (2, 1, 6, 7, BLUE), (1, 4, 2, 3, RED), (5, 2, 2, 2, RED)
    names = "global", "global", "local", "local, and so on"
    for y, piece, name in zip((7.5, 5.4, 3.3, 1.2), crops, names, strict=True):
        picture(right, 1.2, y, [piece], side=1.3)
        right.text(1.2, y - 0.95, name, ha="center", fontsize=8.5, color=piece[4])
        arrow(right, (2.0, y), (2.85, 4.3 + (y - 4.3) * 0.6))
    box(right, 3.7, 4.3, 1.6, 4.4, "one\nencoder")
    arrow(right, (4.55, 4.3), (5.2, 4.3))
    box(right, 6.85, 4.3, 3.2, 1.3, "projector, on the\nmean patch tokens")
    for y, loss in (
        (5.6, "agreement with the\nmean of the global"),
        (3.0, "SIGReg (sketched)\nof each view"),
    ):
        arrow(right, (8.5, 4.3 + (y - 4.3) * 0.3), (9.05, y))
        right.text(9.15, y, loss, va="center", fontsize=8.5, weight="bold", color=INK)
    figure.savefig(HERE / "method.png", dpi=130, facecolor="white", bbox_inches="tight")


if __name__ == "__main__":
    curves()
    lam()
    course()
    method()
