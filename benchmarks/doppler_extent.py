"""Compare the Doppler extent of radar samples with the speed that was requested, beside that of simulated images.

    python scripts/make_microdoppler.py --out_dir DATA …
    python scripts/image_train.py --data_dir DATA/train --condition_on speed_mps …
    python scripts/image_sample.py … --attributes speed_mps=0.1..0.95
    python benchmarks/doppler_extent.py --samples samples.npz --data_dir DATA --edges 0,0.35,0.6,0.8,1

The extent is the speed at which the second brightest column of a Doppler row falls below a threshold, interpolated
between rows. Correlations are over all items whose speed is between two edges.
"""

import dataclasses
import itertools
import json
from pathlib import Path

import common
import numpy as np

from guided_diffusion_vae.config import numbers, option
from guided_diffusion_vae.data import DataConfig, ImageFolder, open_npz
from guided_diffusion_vae.evaluation.physics import doppler_extent

COLUMNS = "requested speed in m/s", "Doppler extent in m/s"


@dataclasses.dataclass
class DopplerConfig:
    SECTION = "benchmark"

    samples: str = option("", "samples_NxHxWxC.npz of a model conditioned on --attribute")
    data_dir: str = option("", "dataset of make_microdoppler.py, whose val/ is measured, too")
    attribute: str = option("speed_mps", "attribute that determines the extent")
    edges: numbers = option("0,1", "comma-separated edges of the ranges of the attribute that are reported")
    threshold: float = option(0.25, "brightness at which the hand ends", above=0, below=1)
    plot: str = option("", "PNG file of a scatter plot; empty: none")


def main():
    (bench, config), device = common.configure(__doc__, DopplerConfig, without=("repetitions", "device"))
    axes = json.loads((Path(config.data_dir) / "dataset.json").read_bytes())["image"]
    extent = lambda image: axes["row_mps"] * doppler_extent(image, config.threshold, axes["zero_doppler_row"])
    samples = open_npz(config.samples)
    real = ImageFolder(DataConfig(str(Path(config.data_dir) / "val"), f"{axes['rows']}x{axes['columns']}"))
    sets = {
        "samples": (samples.attributes[config.attribute], [extent(image[..., 0] / 255) for image in samples.images]),
        "simulated": (real.attributes[config.attribute], [extent(real.batch([i])[0, 0].numpy())
                                                          for i in range(len(real))]),
    }
    edges, rows = numbers.parse(config.edges, "edges"), []
    for low, high in [(edges[0], edges[-1]), *itertools.pairwise(edges)]:
        row = {"m/s": f"{low:g} to {high:g}"}
        for name, (speeds, extents) in sets.items():
            inside = (speeds >= low) & (speeds < high)
            row |= {name: int(inside.sum()), f"r of {name}": _correlation(speeds[inside], np.array(extents)[inside])}
        rows.append(row)
    common.report("doppler_extent", rows, bench, device, **dataclasses.asdict(config))
    if config.plot:
        _plot(sets, edges, config.plot)


def _correlation(x, y):
    return float(np.corrcoef(x, y)[0, 1]) if len(x) > 2 else ""


def _plot(sets, edges, path):
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5, 4), layout="constrained")
    panel = figure.add_subplot(xlabel=COLUMNS[0], ylabel=COLUMNS[1])
    for (name, (speeds, extents)), color in zip(reversed(sets.items()), ("0.75", "C0")):
        panel.scatter(speeds, extents, 8, color, label=name)
    for edge in edges[1:-1]:
        panel.axvline(edge, color="0.5", linewidth=0.8, linestyle=":")
    panel.legend(frameon=False)
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    main()
