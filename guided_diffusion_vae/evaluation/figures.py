"""Image grids, Matplotlib plots and tables of an evaluation; of the first two, functions return a PIL image.

Images are [N x C x ...] in [0, 1], as in `sampling.sheets`.
"""

import numpy as np
from PIL import Image

from ..config import require
from ..sampling.sheets import BACKGROUND, FOREGROUND, MAX_ROWS, contact_sheet, save_image, to_numpy

__all__ = ["MAX_CLASSES", "MAX_ROWS", "confusion_plot", "contact_sheet", "curve_grid", "interval_plot", "line_plot",
           "neighbor_grid", "reconstruction_grid", "save_image", "study_table", "study_title"]

NEIGHBORS_FILE = "nearest_neighbors.npz"    # samples and their nearest training images, for a report page
MAX_IMAGES, MAX_VOLUMES = 240, 24   # samples in that file, and on a report page
MAX_CLASSES = 64  # in a confusion plot, whose area grows with their square


def reconstruction_grid(inputs, reconstructions, gain=5, scale=1) -> Image.Image:
    """Return a grid of three rows: inputs, their reconstructions, and the absolute difference times `gain`.

    The row label states the gain; differences above 1 / gain are clipped to white.

    :raises ValueError: if the shapes differ.
    """
    inputs, reconstructions = to_numpy(inputs), to_numpy(reconstructions)
    _require_shape("reconstructions", reconstructions.shape, inputs.shape)
    rows = [inputs, reconstructions, np.abs(inputs - reconstructions) * gain]
    labels = ["input", "reconstruction", f"|difference|\nx {gain:g}"]
    return contact_sheet(np.concatenate(rows), len(inputs), labels, scale=scale)


def neighbor_grid(samples, neighbors, distances=None, scale=1) -> Image.Image:
    """Return a grid with one row per sample: the sample, a gap, then its neighbors, nearest first.

    :param samples: [Q x C x ...]; `neighbors`: [Q x k x C x ...].
    :param distances: [Q x k] or None; row labels give the distance to the nearest.
    :raises ValueError: if the counts or shapes do not match.
    """
    samples = to_numpy(samples)
    flat = [to_numpy(row) for row in neighbors]
    for row in flat:
        _require_shape("neighbors", (len(flat), *row.shape[1:]), samples.shape)
    blank = np.ones_like(samples[:1])
    rows = [np.concatenate([sample[None], blank, row]) for sample, row in zip(samples, flat)]
    labels = [f"sample {i}" for i in range(len(samples))]
    if distances is not None:
        labels = [f"{label}\nd = {float(row[0]):.3g}" for label, row in zip(labels, distances)]
    header = f"left: sample; right: its {len(flat[0])} nearest, nearest first"
    return contact_sheet(np.concatenate(rows), len(rows[0]), labels, header, scale)


def line_plot(curves: dict, x: str, y: str, log_x=False, log_y=False) -> Image.Image:
    """Return a plot of curves {name: [(x, y), ...]} with marked points; `x` and `y` label the axes."""
    figure, panel = _figure(7, 4)
    for name, points in curves.items():
        panel.plot(*zip(*sorted(points)), linewidth=1.2, marker="o", markersize=4, label=name)
    if log_x:
        panel.set_xscale("log", base=2)
    if log_y:
        panel.set_yscale("log", base=2)
        panel.yaxis.set_major_formatter("{x:g}")
    panel.set_xlabel(x)
    panel.set_ylabel(y)
    panel.grid(alpha=0.3)
    panel.legend()
    return _render(figure)


def curve_grid(panels: dict) -> Image.Image:
    """Return a grid of small plots {row: {column: {curve: (x [n], y [n])}}}; the first curve is black and wide."""
    columns = list(next(iter(panels.values())))
    figure, axes = _figure(2.1 * len(columns), 0.6 + 1.6 * len(panels), len(panels), len(columns))
    for row, (group, plots) in enumerate(panels.items()):
        for panel, (title, curves) in zip(axes[row], plots.items()):
            for k, (name, (x, y)) in enumerate(curves.items()):
                color = FOREGROUND if not k else f"C{k - 1}"
                panel.plot(x, y, color=color, linewidth=1.0 if k else 2.2, label=name)
            panel.tick_params(labelsize=6)
            panel.grid(alpha=0.3)
            if row == 0:
                panel.set_title(title, fontsize=8)
        axes[row, 0].set_ylabel(group, fontsize=8)
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=4, fontsize=8)
    return _render(figure)


def interval_plot(curves: dict, ticks: list[str], x: str, y: str) -> Image.Image:
    """Return a plot of values with intervals; `x` and `y` label the axes.

    :param curves: {name: {tick: (value, low, high)}}, side by side at each of `ticks`.
    """
    figure, panel = _figure(max(7, 0.45 * len(curves) * len(ticks) + 4), 4.5)
    for i, (name, points) in enumerate(curves.items()):
        present = [tick for tick in ticks if tick in points]
        value, low, high = np.array([points[tick] for tick in present]).reshape(-1, 3).T
        position = np.array([ticks.index(tick) for tick in present]) + 0.7 * ((i + 0.5) / len(curves) - 0.5)
        panel.errorbar(position, value, [value - low, high - value], fmt="os^Dv"[i % 5], markersize=4, capsize=3,
                       color=f"C{i % 10}", label=name)
    panel.set_xticks(range(len(ticks)), ticks)
    panel.set_xlabel(x)
    panel.set_ylabel(y)
    panel.set_ylim(bottom=0)
    panel.grid(alpha=0.3, axis="y")
    panel.legend(loc="center left", bbox_to_anchor=(1, 0.5), fontsize=8)
    return _render(figure)


def study_table(report: dict, name: str) -> list[list[str]]:
    """Return the table of a share of an augmentation study, as text: the headings, then a row per arm."""
    share = report["shares"][name]
    percent = lambda form, values: "{} [{}, {}]".format(*(form.format(100 * value) for value in values))
    rows = [["training images", "error in %", "macro-F1", "lowest recall", "calibration error",
             f"error relative to {share['baseline']} in %"]]
    for arm, values in share["arms"].items():
        recall, label = min((recall, label) for recall, label in zip(values["recall"], report["classes"])
                            if recall is not None)
        relative = None if arm == share["baseline"] else values.get("relative_difference")
        rows.append([arm, percent("{:.2f}", values["error"]), f"{values['macro_f1'][0]:.3f}", f"{recall:.3f} {label}",
                     f"{values['calibration_error'][0]:.3f}", percent("{:+.0f}", relative) if relative else ""])
    return rows


def study_title(report: dict, name: str) -> str:
    """Return what the table of a share is about."""
    return (f"share {name}: {report['shares'][name]['images']} training images, {report['num_test']} test images, mean "
            f"of {report['seeds']} seeds [95% interval]")


def confusion_plot(matrix, names: list[str]) -> Image.Image:
    """Return a plot of a confusion matrix [K x K]: rows target, columns predicted, shaded by the fraction of the
    row."""
    matrix = np.asarray(matrix)
    _require_shape("confusion matrix", matrix.shape, (len(names),) * 2)
    require((len(names) <= MAX_CLASSES, f"confusion plot: expected at most {MAX_CLASSES} classes, got {len(names)}"))
    fractions = matrix / np.maximum(matrix.sum(1, keepdims=True), 1)
    side = 2.5 + 0.6 * len(names)
    figure, panel = _figure(side, side)
    panel.imshow(fractions, cmap="Blues", vmin=0, vmax=1)
    panel.set_xticks(range(len(names)), names, rotation=45, ha="right")
    panel.set_yticks(range(len(names)), names)
    panel.set_xlabel("predicted")
    panel.set_ylabel("target")
    for (row, column), count in np.ndenumerate(matrix):
        color = BACKGROUND if fractions[row, column] > 0.5 else FOREGROUND
        panel.text(column, row, f"{count:g}", ha="center", va="center", color=color)
    return _render(figure)


def _require_shape(name, shape, expected):
    require((tuple(shape) == tuple(expected), f"{name}: expected shape {list(expected)}, got {list(shape)}"))


def _figure(width, height, rows=0, columns=0):
    """Return (figure, its axes, with `rows` an array [rows x columns]), without pyplot's global state."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=100, layout="constrained")
    FigureCanvasAgg(figure)
    return figure, figure.subplots(rows, columns, squeeze=False) if rows else figure.subplots()


def _render(figure):
    figure.canvas.draw()
    return Image.fromarray(np.asarray(figure.canvas.buffer_rgba()).copy()).convert("RGB")
