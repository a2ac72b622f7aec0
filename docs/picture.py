"""Draw the pictures of the README and of link previews from stored results: docs/picture.py"""

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


def save(figure, name):
    """Save a figure beside the pages."""
    target = ROOT / "docs" / "_static" / name
    target.parent.mkdir(exist_ok=True)
    figure.savefig(target, dpi=120)
    print(target)


def preview(records, curves):
    """Draw the picture that stands beside links: 1,280 x 640 pixels."""
    figure = Figure(figsize=(1280 / 120, 640 / 120))
    axis = figure.add_axes((0.56, 0.14, 0.41, 0.74))
    panel(axis, records, curves, "factor", "")
    axis.set_ylabel("distance to the low-rank truth")
    axis.legend(frameon=False, fontsize=9, loc="lower left")
    ends = {}
    for r in records:
        if r["panel"] == "end" and r["model"] == "factor":
            ends.setdefault(r["scenario"], []).append(r["error"])
    without, *_, off = (np.median(errors) for errors in ends.values())
    figure.text(0.04, 0.74, "mirrorflow", fontsize=38, weight="bold")
    figure.text(
        0.04, 0.55, "What weight decay does to a model,\nand when to switch it off", fontsize=17
    )
    said = (
        "Matrix sensing, X = U Uᵀ: decay switched off\nhalf way ends "
        f"{without / off:.0f} times closer to the truth\nthan training without decay"
    )
    figure.text(0.04, 0.22, said, fontsize=13, color="0.3", linespacing=1.5)
    return figure


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
    save(figure, "demo.png")
    save(preview(result["records"], curves), "preview.png")


if __name__ == "__main__":
    main()
