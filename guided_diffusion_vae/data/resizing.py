"""Crop and resize images."""

import math

import numpy as np
from PIL import Image

MIN_CROP_FRACTION = 0.8


def fit(pixels, height, width, crop, rng):
    """Return [height x width x C] of an image [H x W x C] at least that large; without a change if the size is equal.

    :param crop: "center", "random" (with an `rng`, else center), or "none" to ignore the aspect ratio.
    """
    if pixels.shape[:2] == (height, width) and (crop != "random" or rng is None):
        return pixels
    if crop == "none":
        return _resample(pixels, lambda image: _resize_exact(image, height, width))
    if crop == "random" and rng is not None:
        # At most the size of the image itself: a larger size would upsample it.
        max_zoom = min(pixels.shape[0] / height, pixels.shape[1] / width)
        zoom = min(max_zoom, 1 / rng.uniform(MIN_CROP_FRACTION, 1))
        tall, wide = math.ceil(height * zoom - 1e-9), math.ceil(width * zoom - 1e-9)
        resized = _resample(pixels, lambda image: downsample_to_cover(image, tall, wide))
        top, left = (int(rng.integers(n - m + 1)) for n, m in zip(resized.shape, (height, width)))
        return resized[top:top + height, left:left + width]
    return center_window(_resample(pixels, lambda image: downsample_to_cover(image, height, width)), height, width)


def _resample(pixels, resize):
    """Apply a function of Pillow images to [H x W x C]: to uint8 as one image, to float32 per channel, unrounded."""
    if pixels.dtype == np.uint8:
        image = pixels if pixels.shape[-1] == 3 else pixels[..., 0]
        resized = np.asarray(resize(Image.fromarray(np.ascontiguousarray(image))))
        return resized if resized.ndim == 3 else resized[..., None]
    layers = [resize(Image.fromarray(np.ascontiguousarray(layer))) for layer in np.moveaxis(pixels, -1, 0)]
    # Bicubic interpolation overshoots at edges; 8-bit images saturate in the same way.
    return np.clip(np.stack([np.asarray(layer) for layer in layers], axis=-1), 0, 1)


def downsample_to_cover(image, height, width):
    """Resize a Pillow image to just cover height x width: box filters by 2 while possible, then one bicubic step."""
    image = _halve(image, height, width)
    scale = max(height / image.height, width / image.width)
    size = round(scale * image.width), round(scale * image.height)
    return image.resize(size, Image.Resampling.BICUBIC)


def _resize_exact(image, height, width):
    return _halve(image, height, width).resize((width, height), Image.Resampling.BICUBIC)


def _halve(image, height, width):
    while image.height >= 2 * height and image.width >= 2 * width:
        half = image.width // 2, image.height // 2
        image = image.resize(half, Image.Resampling.BOX)
    return image


def center_window(pixels, height, width):
    """Return the central height x width of an array [H x W (x C)]."""
    top, left = (pixels.shape[0] - height) // 2, (pixels.shape[1] - width) // 2
    return pixels[top:top + height, left:left + width]
