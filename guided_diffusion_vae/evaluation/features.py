"""Extract features of images: Inception, classifier, latents."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.nn import Conv1d, Conv2d, Conv3d, Linear

from ..config import require
from ..files import sha256_of_file
from ..nn import to_uint8
from ..unet import AttentionPool2d, EncoderUNetModel
from .image_metrics import to_tensor
from .set_metrics import FeatureStatistics


class Features(NamedTuple):
    """Features of a batch: pooled [n x D], logits [n x K] or None, spatial [n x S] or None; of a set NumPy arrays."""

    pooled: Any
    logits: Any = None
    spatial: Any = None


INCEPTION_FILE = "weights-inception-2015-12-05-6726825d.pth"
INCEPTION_URL = f"https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/{INCEPTION_FILE}"
INCEPTION_SHA256 = "6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2"
SPATIAL_CHANNELS = 7    # of the layer for sFID, as in guided-diffusion's evaluator


def inception_features(path, device=None, sha256: str = INCEPTION_SHA256) -> Callable:
    """Return a function from images [n x C x H x W] in [0, 1] to `Features` of the Inception network of FID.

    torch-fidelity's port of the network of Heusel et al. 2017, from a local weights file: 2048 pooled features, logits
    without bias [n x 1008], and for sFID (Nash et al. 2021) the first 7 channels of `mixed_6/conv`, 17 x 17 positions.
    Single channels are repeated. Images are rounded to 8 bits, as in files.

    :raises FileNotFoundError: if there is no such file; ValueError if its SHA-256 differs.
    :raises ImportError: if torch-fidelity is not installed (the extra `eval`).
    """
    expected = f"--inception_path expects {INCEPTION_FILE} (SHA-256 {sha256}), from {INCEPTION_URL}"
    require((Path(path).is_file(), f"{path} does not exist; {expected}"), error=FileNotFoundError)
    found = sha256_of_file(path)
    require((found == sha256, f"{path} has SHA-256 {found}; {expected}"))
    try:
        from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
    except (ImportError, RuntimeError) as error:  # the latter if the versions of torchvision and torch do not match
        raise ImportError("Inception features require torch-fidelity, and a torchvision that matches torch "
                          f"({error}): pip install 'guided-diffusion-vae[eval]'") from error
    network = FeatureExtractorInceptionV3("inception", ["2048", "logits_unbiased"], feature_extractor_weights_path=path)
    network.to(device or "cpu").eval()
    outputs = []
    network.Mixed_6d.branch1x1.register_forward_hook(lambda module, inputs, output: outputs.append(output))

    @torch.no_grad()
    def extract(images):
        values = torch.from_numpy(to_uint8(to_tensor(images))).to(next(network.parameters()).device)
        outputs.clear()
        pooled, logits = network(values.expand(-1, 3, -1, -1))
        return Features(pooled.float(), logits.float(), outputs[0][:, :SPATIAL_CHANNELS].flatten(1).float())

    return extract


def classifier_features(model: EncoderUNetModel, prepare: Callable | None = None) -> Callable:
    """Return a function from images [n x C x ...] in [0, 1] to `Features` with logits, float32.

    The features are the input of the layer that computes the logits: the average over positions (pool adaptive) or the
    hidden units (spatial, spatial_v2). The input of an attention pool is a grid, which is averaged, so that there are
    more features than classes.

    :param model: an EncoderUNetModel, which is put into evaluation mode and evaluated at timestep 0 (clean data).
    :param prepare: returns x0 of images, e.g. latents; None: the images in [-1, 1].
    """
    last = [layer for layer in model.out if isinstance(layer, (Linear, Conv1d, Conv2d, Conv3d, AttentionPool2d))][-1]
    model.eval()

    @torch.no_grad()
    def extract(images):
        images = to_tensor(images).float()
        x0 = (prepare(images) if prepare else images * 2 - 1).to(next(model.parameters()).device)
        require((x0.shape[1] == model.in_channels, f"images: the classifier requires {model.in_channels} channels, got "
                 f"{x0.shape[1]}; use a classifier trained on such images"))
        inputs_of_last = []
        hook = last.register_forward_pre_hook(lambda _, inputs: inputs_of_last.append(inputs[0]))
        try:
            logits = model(x0, torch.zeros(len(x0), dtype=torch.long, device=x0.device))
        finally:
            hook.remove()
        read = inputs_of_last[0].float()                        # [n x D], or [n x D x ...] with positions
        return Features(read if read.ndim == 2 else read.flatten(2).mean(2), logits.float())

    return extract


def latent_features(codec, grid: int = 2) -> Callable:
    """Return a function from images [n x C x ...] in [0, 1] to `Features` without logits, float32.

    Per channel of the scaled latents (posterior mode): the mean in every cell of a grid of `grid` cells per axis, and
    the standard deviation over all positions; D = Z (grid^axes + 1), 20 for 4 channels in 2D. The overall mean is
    omitted: as the average of the cells it would make every covariance singular. Detail finer than a cell is ignored,
    so these are coarser than the features of a classifier, but require no labels.
    """

    def extract(images):
        with torch.no_grad():
            latents = codec.encode_batch(codec.pad_to_factors(to_tensor(images).float())).float()
        cells = latents
        for axis in range(2, latents.ndim):
            parts = cells.tensor_split(min(grid, cells.shape[axis]), axis)
            cells = torch.stack([part.mean(axis) for part in parts], axis)
        std = latents.flatten(2).std(2, correction=0)
        return Features(torch.cat([cells.flatten(1), std], 1))

    return extract


def collect_features(extract: Callable, batches) -> Features:
    """Return `Features` over an iterable of image batches, as NumPy arrays; spatial ones as FeatureStatistics.

    Neither images nor spatial features are kept, so that memory grows with the pooled features only.
    """
    pooled, logits, spatial = [], [], None
    for batch in batches:
        read = extract(batch)
        pooled.append(read.pooled.cpu().numpy())
        logits += [] if read.logits is None else [read.logits.cpu().numpy()]
        if read.spatial is not None:
            spatial = (spatial or FeatureStatistics()).update(read.spatial.cpu())
    require((pooled, "features: expected at least one image, got an empty set"))
    return Features(np.concatenate(pooled), np.concatenate(logits) if logits else None, spatial)
