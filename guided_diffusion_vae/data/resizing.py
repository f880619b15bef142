"""Crop and resize images."""

import math

import numpy as np
from PIL import Image

MIN_CROP_FRACTION = 0.8


def _fit(pixels, height, width, crop, rng):
    """Return [height x width x C] of a picture at least that large; one of the very size is returned as it is."""
    if pixels.shape[:2] == (height, width) and (crop != "random" or rng is None):
        return pixels
    if crop == "none":
        return _resample(pixels, lambda picture: _resize_exact(picture, height, width))
    if crop == "random" and rng is not None:
        # Never above the picture's own size: that would enlarge it.
        room = min(pixels.shape[0] / height, pixels.shape[1] / width)
        zoom = min(room, 1 / rng.uniform(MIN_CROP_FRACTION, 1))
        tall, wide = math.ceil(height * zoom - 1e-9), math.ceil(width * zoom - 1e-9)
        shrunk = _resample(pixels, lambda picture: _downsample_to_cover(picture, tall, wide))
        top, left = (int(rng.integers(n - m + 1)) for n, m in zip(shrunk.shape, (height, width)))
        return shrunk[top:top + height, left:left + width]
    return _window(_resample(pixels, lambda picture: _downsample_to_cover(picture, height, width)), height, width)


def _resample(pixels, change):
    """Apply a change of size to [H x W x C]: uint8 as a picture, float32 channel by channel without rounding."""
    if pixels.dtype == np.uint8:
        whole = pixels if pixels.shape[-1] == 3 else pixels[..., 0]
        changed = np.asarray(change(Image.fromarray(np.ascontiguousarray(whole))))
        return changed if changed.ndim == 3 else changed[..., None]
    layers = [change(Image.fromarray(np.ascontiguousarray(layer))) for layer in np.moveaxis(pixels, -1, 0)]
    # Bicubic weights overshoot at edges, by the interpolation and not by the data; 8-bit pictures saturate likewise.
    return np.clip(np.stack([np.asarray(layer) for layer in layers], axis=-1), 0, 1)


def _downsample_to_cover(picture, height, width):
    """Resample until height x width is just covered: box halvings while twice as large, then one bicubic step."""
    picture = _halve(picture, height, width)
    scale = max(height / picture.height, width / picture.width)
    size = round(scale * picture.width), round(scale * picture.height)
    return picture.resize(size, Image.Resampling.BICUBIC)


def _resize_exact(picture, height, width):
    return _halve(picture, height, width).resize((width, height), Image.Resampling.BICUBIC)


def _halve(picture, height, width):
    while picture.height >= 2 * height and picture.width >= 2 * width:
        half = picture.width // 2, picture.height // 2
        picture = picture.resize(half, Image.Resampling.BOX)
    return picture


def _window(pixels, height, width):
    top, left = (pixels.shape[0] - height) // 2, (pixels.shape[1] - width) // 2
    return pixels[top:top + height, left:left + width]
