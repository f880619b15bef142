"""Draw contact sheets with Pillow and plots with Matplotlib; every function takes arrays and returns a PIL image.

Pictures are [N x C x ...] in [0, 1]; three channels are colours, of other numbers the first one is shown in grey. A
volume is shown by the middle slice of each axis, side by side. `save_image` writes what the others return.
"""

import math
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

from ..files import atomic_path

GAP = 2  # pixels between tiles
MARGIN = 6  # pixels around text
FONT_SIZE = 14  # the smallest that reads well on a screen
MAX_CLASSES = 64  # in a confusion plot, whose area grows with their square
BACKGROUND, FOREGROUND = "white", "black"


def contact_sheet(images, columns, row_labels=None, header=None, scale=1):
    """Return a PIL image with `columns` tiles a row, labels to the left of the rows and `header` above.

    `images` [N x C x ...] fill the rows in order, the last row may be short. `row_labels` holds one text a row.
    `scale` repeats every pixel that many times. Values outside [0, 1] are clipped; NaN, no images, or a wrong number
    of labels raise ValueError.
    """
    tiles = [_tile(image, scale) for image in _to_numpy(images)]
    columns = min(columns, len(tiles))
    rows = math.ceil(len(tiles) / columns)
    if row_labels is not None and len(row_labels) != rows:
        raise ValueError(f"{len(row_labels)} row labels for {rows} rows ({len(tiles)} images, {columns} a row)")
    font = ImageFont.load_default(FONT_SIZE)
    labels = [str(label) for label in row_labels or []]
    boxes = [_text_box(label, font) for label in labels]
    left = max((width for width, _ in boxes), default=0)
    header_width, top = _text_box(header, font) if header else (0, 0)
    width, height = tiles[0].size
    # A row is never lower than its label, nor a sheet narrower than its header.
    pitch = max([height, *(label_height for _, label_height in boxes)]) + GAP
    size = (max(left + columns * (width + GAP) + GAP, header_width), top + rows * pitch + GAP)
    sheet = Image.new(tiles[0].mode, size, BACKGROUND)
    draw = ImageDraw.Draw(sheet)
    if header:
        draw.multiline_text((MARGIN, MARGIN), header, FOREGROUND, font)
    for row, (label, (_, label_height)) in enumerate(zip(labels, boxes)):
        centred = top + GAP + row * pitch + (pitch - GAP - label_height) // 2
        draw.multiline_text((MARGIN, centred + MARGIN), label, FOREGROUND, font)
    for index, tile in enumerate(tiles):
        row, column = divmod(index, columns)
        sheet.paste(tile, (left + GAP + column * (width + GAP), top + GAP + row * pitch))
    return sheet


def to_pil(image):
    """Return a PIL image of one picture [C x H x W] in [0, 1], or of the three middle slices of a volume."""
    return _tile(_to_numpy(image[None])[0], scale=1)


def reconstruction_grid(inputs, reconstructions, gain=5, scale=1):
    """Return a sheet of three rows: inputs, their reconstructions, and the absolute difference times `gain`.

    The row's label states the gain; differences above 1 / gain are drawn as white. ValueError where shapes differ.
    """
    inputs, reconstructions = _to_numpy(inputs), _to_numpy(reconstructions)
    if inputs.shape != reconstructions.shape:
        raise ValueError(f"inputs {list(inputs.shape)} against reconstructions {list(reconstructions.shape)}")
    rows = [inputs, reconstructions, np.abs(inputs - reconstructions) * gain]
    labels = ["input", "reconstruction", f"|difference|\nx {gain:g}"]
    return contact_sheet(np.concatenate(rows), len(inputs), labels, scale=scale)


def neighbor_grid(samples, neighbours, distances=None, scale=1):
    """Return a sheet with one row a sample: the sample, a gap, then its neighbours, nearest first.

    `samples` [Q x C x ...], `neighbours` [Q x k x C x ...], `distances` [Q x k] or None; the label of a row gives
    the distance to the nearest. ValueError where the counts or shapes do not fit together.
    """
    samples = _to_numpy(samples)
    flat = [_to_numpy(of_one) for of_one in neighbours]
    if len(flat) != len(samples) or any(of_one.shape[1:] != samples.shape[1:] for of_one in flat):
        raise ValueError(f"neighbours {[len(flat), *flat[0].shape]} do not fit samples {list(samples.shape)}")
    blank = np.ones_like(samples[:1])
    rows = [np.concatenate([sample[None], blank, of_one]) for sample, of_one in zip(samples, flat)]
    labels = [f"sample {i}" for i in range(len(samples))]
    if distances is not None:
        labels = [f"{label}\nd = {float(row[0]):.3g}" for label, row in zip(labels, distances)]
    header = f"left: sample; right: its {len(flat[0])} nearest, nearest first"
    return contact_sheet(np.concatenate(rows), len(rows[0]), labels, header, scale)


def line_plot(curves, x, y, log_x=False, log_y=False):
    """Return a picture of the curves {name: [(x, y), ...]} in one panel, their points marked; x and y name the axes."""
    figure, (panel,) = _figure(1, width=7, height=4)
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


def confusion_plot(matrix, names):
    """Return a picture of a confusion matrix [C x C]: rows asked, columns predicted, shaded by the row's share."""
    matrix = np.asarray(matrix)
    if matrix.shape != (len(names), len(names)):
        raise ValueError(f"a confusion matrix {list(matrix.shape)} for {len(names)} names")
    shares = matrix / np.maximum(matrix.sum(1, keepdims=True), 1)
    if len(names) > MAX_CLASSES:
        raise ValueError(f"{len(names)} classes are too many to be drawn; {MAX_CLASSES} are not")
    side = 2.5 + 0.6 * len(names)
    figure, (panel,) = _figure(1, side, side)
    panel.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    panel.set_xticks(range(len(names)), names, rotation=45, ha="right")
    panel.set_yticks(range(len(names)), names)
    panel.set_xlabel("predicted")
    panel.set_ylabel("asked")
    for (row, column), count in np.ndenumerate(matrix):
        color = BACKGROUND if shares[row, column] > 0.5 else FOREGROUND
        panel.text(column, row, f"{count:g}", ha="center", va="center", color=color)
    return _render(figure)


def save_image(path, image):
    """Write a PIL image to `path`, whole or not at all; the suffix names the format (ValueError where none fits)."""
    kind = Image.registered_extensions().get(Path(path).suffix.lower())
    if kind is None:
        raise ValueError(f"{path}: no picture format goes by that suffix; use .png")
    with atomic_path(path) as part:
        # The temporary name ends in .part, so Pillow cannot tell the format from it.
        image.save(part, format=kind)


def _to_numpy(images):
    if isinstance(images, torch.Tensor):
        images = images.detach().float().cpu()
    pictures = np.asarray(images, dtype=np.float32)
    if pictures.ndim not in (4, 5) or 0 in pictures.shape[:2]:
        raise ValueError(f"pictures must be [N x C x H x W] or [N x C x D x H x W], found {list(pictures.shape)}")
    if pictures.shape[1] != 3:
        pictures = pictures[:, :1]
    if np.isnan(pictures).any():
        raise ValueError("pictures hold NaN; the model that made them has diverged")
    return pictures


def _tile(image, scale):
    """Return one PIL tile of a picture [C x H x W], or of the three middle slices of a volume [C x D x H x W]."""
    levels = np.rint(image.clip(0, 1) * 255).astype(np.uint8)
    if levels.ndim == 4:
        slices = [levels.take(levels.shape[axis] // 2, axis) for axis in (1, 2, 3)]
        height = max(part.shape[1] for part in slices)
        # Black beside black: most volumes fade to 0 at their rim.
        padded = [np.pad(part, ((0, 0), (0, height - part.shape[1]), (0, GAP))) for part in slices]
        levels = np.concatenate(padded, 2)[:, :, :-GAP]
    levels = levels.repeat(scale, 1).repeat(scale, 2)
    return Image.fromarray(levels[0] if len(levels) == 1 else levels.transpose(1, 2, 0))


def _text_box(text, font):
    """Return (width, height) of a text with its margins."""
    _, _, right, bottom = ImageDraw.Draw(Image.new("L", (1, 1))).multiline_textbbox((0, 0), text, font)
    return math.ceil(right) + 2 * MARGIN, math.ceil(bottom) + 2 * MARGIN


def _figure(panels, width, height):
    """Return (figure, list of axes stacked over one horizontal axis), outside pyplot's global state."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=100, layout="constrained")
    FigureCanvasAgg(figure)
    return figure, list(figure.subplots(panels, 1, sharex=True, squeeze=False)[:, 0])


def _render(figure):
    figure.canvas.draw()
    return Image.fromarray(np.asarray(figure.canvas.buffer_rgba()).copy()).convert("RGB")
