"""Contact sheets of images and volumes, rendered with Pillow.

Images are [N x C x ...] in [0, 1]. Three channels are RGB, otherwise the first one is shown in grayscale, or in the
colors of a colormap. A volume is shown by the middle slices of its axes, side by side. Functions return a PIL image,
which `save_image` writes.
"""

import math
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

from ..config import require
from ..data.colormaps import open_colormap
from ..files import atomic_path

MAX_ROWS = 16  # classes on a contact sheet
GAP = 2  # pixels between tiles
MARGIN = 6  # pixels around text
FONT_SIZE = 14  # minimum legible size on a screen
BACKGROUND, FOREGROUND = "white", "black"


def contact_sheet(images, columns: int, row_labels=None, header=None, scale=1, colormap="") -> Image.Image:
    """Return a PIL image with `columns` tiles per row, labels to the left of the rows and `header` above.

    :param images: [N x C x ...], which fill the rows in order; the last row may be shorter. Values are clipped to [0,
        1].
    :param row_labels: one text per row.
    :param scale: repeat every pixel this many times.
    :param colormap: name of the table that colors images of one channel; empty: grayscale.
    :raises ValueError: for NaN, no images, or a wrong number of labels.
    """
    tiles = [_tile(image, scale, colormap) for image in to_numpy(images)]
    columns = min(columns, len(tiles))
    rows = math.ceil(len(tiles) / columns)
    labels = [str(label) for label in row_labels or []]
    require((row_labels is None or len(labels) == rows,
             f"row labels: expected {rows} for {len(tiles)} images in {columns} columns, got {len(labels)}"))
    font = ImageFont.load_default(FONT_SIZE)
    boxes = [_text_box(label, font) for label in labels]
    left = max((width for width, _ in boxes), default=0)
    header_width, top = _text_box(header, font) if header else (0, 0)
    width, height = tiles[0].size
    # A row is at least as high as its label, and a sheet as wide as its header.
    pitch = max([height, *(label_height for _, label_height in boxes)]) + GAP
    size = (max(left + columns * (width + GAP) + GAP, header_width), top + rows * pitch + GAP)
    sheet = Image.new(tiles[0].mode, size, BACKGROUND)
    draw = ImageDraw.Draw(sheet)
    if header:
        draw.multiline_text((MARGIN, MARGIN), header, FOREGROUND, font)
    for row, (label, (_, label_height)) in enumerate(zip(labels, boxes)):
        centered = top + GAP + row * pitch + (pitch - GAP - label_height) // 2
        draw.multiline_text((MARGIN, centered + MARGIN), label, FOREGROUND, font)
    for index, tile in enumerate(tiles):
        row, column = divmod(index, columns)
        sheet.paste(tile, (left + GAP + column * (width + GAP), top + GAP + row * pitch))
    return sheet


def to_pil(image, colormap="") -> Image.Image:
    """Return a PIL image of one image [C x H x W] in [0, 1], or of the three middle slices of a volume.

    :param colormap: name of the table that colors an image of one channel; empty: grayscale.
    """
    return _tile(to_numpy(image[None])[0], 1, colormap)


def save_image(path, image: Image.Image) -> None:
    """Write a PIL image atomically; the file extension selects the format.

    :raises ValueError: for an unknown extension.
    """
    kind = Image.registered_extensions().get(Path(path).suffix.lower())
    require((kind is not None, f"{path}: unknown image format; use .png"))
    with atomic_path(path) as part:
        # The temporary name ends in .part, from which Pillow cannot derive the format.
        image.save(part, format=kind)


def to_numpy(images) -> np.ndarray:
    """Return images as float32 arrays with one or three channels.

    :raises ValueError: for another number of axes, no images, or NaN.
    """
    if isinstance(images, torch.Tensor):
        images = images.detach().float().cpu()
    images = np.asarray(images, dtype=np.float32)
    require((images.ndim in (4, 5) and 0 not in images.shape[:2],
             f"images: expected shape [N x C x H x W] or [N x C x D x H x W], got {list(images.shape)}"))
    if images.shape[1] != 3:
        images = images[:, :1]
    require((not np.isnan(images).any(), "images contain NaN: the model has diverged"))
    return images


def _tile(image, scale, colormap):
    """Return one PIL tile of an image [C x H x W], or of the three middle slices of a volume [C x D x H x W]."""
    values = np.rint(image.clip(0, 1) * 255).astype(np.uint8)
    if colormap and len(values) == 1:
        values = np.moveaxis(open_colormap(colormap).to_colors(values[0] / 255), -1, 0)
    if values.ndim == 4:
        slices = [values.take(values.shape[axis] // 2, axis) for axis in (1, 2, 3)]
        height = max(part.shape[1] for part in slices)
        # Black padding, as most volumes are 0 at their borders.
        padded = [np.pad(part, ((0, 0), (0, height - part.shape[1]), (0, GAP))) for part in slices]
        values = np.concatenate(padded, 2)[:, :, :-GAP]
    values = values.repeat(scale, 1).repeat(scale, 2)
    return Image.fromarray(values[0] if len(values) == 1 else values.transpose(1, 2, 0))


def _text_box(text, font):
    """Return (width, height) of a text with its margins."""
    _, _, right, bottom = ImageDraw.Draw(Image.new("L", (1, 1))).multiline_textbbox((0, 0), text, font)
    return math.ceil(right) + 2 * MARGIN, math.ceil(bottom) + 2 * MARGIN
