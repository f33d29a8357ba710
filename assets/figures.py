"""Draws the figures of README.md and RESULTS.md from results.csv. It needs matplotlib.

python assets/figures.py      # writes curves.png and lambda.png beside this file
"""

import csv
from pathlib import Path

import matplotlib.pyplot as plt

HERE = Path(__file__).parent
PROBES = {"knn": "k-NN", "last": "linear, last block", "last4": "linear, last four blocks"}
COLOURS = {
    "masked": "#d6453d",
    "masked, rate to 0": "#8c1c17",
    "masked narrow": "#eba6a2",
    "crops": "#2f6fd0",
    "I-JEPA": "#2e9e5b",
}


def rows(section):
    """The section's rows, with numbers where there are some."""
    with open(HERE / "results.csv") as file:
        found = [row for row in csv.DictReader(file) if row["section"] == section]
    return [
        row | {n: float(row[n]) for n in ("images", "rank", *PROBES) if row[n]} for row in found
    ]


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
            axis.plot(*zip(*means, strict=True), "o-", color=colour, ms=4, label=run)
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


if __name__ == "__main__":
    curves()
    lam()
