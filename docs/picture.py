"""Draw the README's picture from the stored results: python docs/picture.py"""

from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from mirrorflow.lab import framework

ROOT = Path(__file__).parents[1]
DASHES = ((0, (7, 2)), (0, (5, 2, 1, 2)), (0, (1.5, 1.5)), "solid")
COLOURS = ("#0072B2", "#E69F00", "#009E73", "black")


def panel(axis, records, curves, model, title):
    """Draw the median over the seeds of |X - X*|, and their range."""
    names = list(dict.fromkeys(r["scenario"] for r in records if r["panel"] == "end"))
    seeds = sorted({key.split("/")[0] for key in curves if key.startswith("seed")})
    values = np.stack([curves[f"{seed}/{model}/error"] for seed in seeds])
    t = curves[f"{seeds[0]}/t"]
    for i, name in enumerate(names):
        style = {"color": COLOURS[i], "linestyle": DASHES[i], "linewidth": 2}
        axis.plot(t, np.median(values[:, i], axis=0), label=name, **style)
        low, high = values[:, i].min(0), values[:, i].max(0)
        axis.fill_between(t, low, high, color=COLOURS[i], alpha=0.15, linewidth=0)
    axis.axvline(t[-1] / 2, color="grey", linewidth=1, linestyle=(0, (1, 2)))
    axis.annotate("decay off", (t[-1] / 2, 0.42), xytext=(5, 0), textcoords="offset points")
    axis.set(yscale="log", xlabel="time t = learning rate × step", title=title)
    axis.grid(alpha=0.25)


def main():
    """Find the stored run of matrix sensing and draw its two models side by side."""
    found = framework.find_results(ROOT / "results")
    (result,) = [r for r in found if r["experiment"] == "fig02_matrix_sensing"]
    curves = framework.trajectory(result["folder"])
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    axes = figure.subplots(1, 2, sharey=True)
    panel(axes[0], result["records"], curves, "factor", "X = U Uᵀ, weight decay on U")
    panel(axes[1], result["records"], curves, "linear", "X itself, nuclear-norm penalty")
    axes[0].set_ylabel("distance to the low-rank truth")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside upper center", ncols=4)
    target = ROOT / "docs" / "_static" / "demo.png"
    target.parent.mkdir(exist_ok=True)
    figure.savefig(target, dpi=120)
    print(target)


if __name__ == "__main__":
    main()
