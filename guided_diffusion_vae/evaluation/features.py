"""Extract features of images: Inception, classifier, latents."""

from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch.nn import Conv1d, Conv2d, Conv3d, Linear

from ..files import sha256_of_file
from ..unet import AttentionPool2d
from .image_metrics import _bytes, _tensor
from .set_metrics import FeatureStatistics


class Features(NamedTuple):
    """What an extractor reads off pictures: features [n x D], logits [n x K] or None, spatial ones [n x S] or None."""

    pooled: torch.Tensor
    logits: torch.Tensor | None = None
    spatial: torch.Tensor | None = None


INCEPTION_FILE = "weights-inception-2015-12-05-6726825d.pth"
INCEPTION_URL = f"https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/{INCEPTION_FILE}"
INCEPTION_SHA256 = "6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2"
SPATIAL_CHANNELS = 7    # as many of a layer's channels as guided-diffusion's evaluator compares


def inception_features(path, device=None, sha256=INCEPTION_SHA256):
    """Return a function from pictures [n x C x H x W] in [0, 1] to `Features` of the Inception network of FID.

    torch-fidelity's port of the network of Heusel et al. 2017, from a local weights file: 2048 pooled features, logits
    without bias [n x 1008], and for sFID (Nash et al. 2021) the first 7 channels of `mixed_6/conv`, 17 x 17 positions.
    Grey pictures are repeated. 8-bit levels go in, as from files.

    :raises FileNotFoundError, ValueError: no such file, or another than the one with this SHA-256.
    :raises ImportError: without torch-fidelity (the extra `eval`).
    """
    wanted = f"{INCEPTION_FILE} (SHA-256 {sha256}), from {INCEPTION_URL}"
    if not Path(path).is_file():
        raise FileNotFoundError(f"{path} is not there; --inception_path wants {wanted}")
    found = sha256_of_file(path)
    if found != sha256:
        raise ValueError(f"{path} has SHA-256 {found}; --inception_path wants {wanted}")
    try:
        from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
    except (ImportError, RuntimeError) as error:  # a torchvision that does not fit torch raises the latter
        raise ImportError("Inception features need torch-fidelity, with a torchvision that fits torch "
                          f"({error}): pip install 'guided-diffusion-vae[eval]'") from error
    network = FeatureExtractorInceptionV3("inception", ["2048", "logits_unbiased"], feature_extractor_weights_path=path)
    network.to(device or "cpu").eval()
    seen = []
    network.Mixed_6d.branch1x1.register_forward_hook(lambda module, inputs, output: seen.append(output))

    @torch.no_grad()
    def extract(images):
        levels = torch.from_numpy(_bytes(_tensor(images))).to(next(network.parameters()).device)
        seen.clear()
        pooled, logits = network(levels.expand(-1, 3, -1, -1))
        return Features(pooled.float(), logits.float(), seen[0][:, :SPATIAL_CHANNELS].flatten(1).float())

    return extract


def classifier_features(model, prepare=None):
    """Return a function from images [n x C x ...] in [0, 1] to `Features` with logits, float32.

    `model` is an EncoderUNetModel; it is put into evaluation mode and sees what `prepare` makes of the images (x0 of
    latents; by default the images in [-1, 1]) at time step 0, where a classifier of noisy data meets clean ones. The
    features are what its last layer turns into logits: the
    average over positions (pool adaptive) or the hidden units (spatial, spatial_v2). An attention pool reads a whole
    grid, of which the average is taken, so that features do not shrink to the number of classes.
    """
    last = [layer for layer in model.out if isinstance(layer, (Linear, Conv1d, Conv2d, Conv3d, AttentionPool2d))][-1]
    model.eval()

    @torch.no_grad()
    def extract(images):
        x0 = prepare(_tensor(images).float()) if prepare else _tensor(images).float() * 2 - 1
        x0 = x0.to(next(model.parameters()).device)
        if x0.shape[1] != model.in_channels:
            raise ValueError(f"the classifier reads {model.in_channels} channels, the pictures have {x0.shape[1]}; "
                             "give a classifier that was trained on such pictures")
        seen = []
        hook = last.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
        try:
            logits = model(x0, torch.zeros(len(x0), dtype=torch.long, device=x0.device))
        finally:
            hook.remove()
        read = seen[0].float()                                  # [n x D], or [n x D x ...] with positions
        return Features(read if read.ndim == 2 else read.flatten(2).mean(2), logits.float())

    return extract


def latent_features(codec, grid=2):
    """Return a function from images [n x C x ...] in [0, 1] to `Features` without logits, float32.

    Per channel of the codec's latent (posterior mode, scaled): the mean in every cell of a grid of `grid` cells an
    axis, and the standard deviation over the whole; D = Z (grid^axes + 1), 20 for 4 channels in 2D. The overall mean
    is left out because it is the cells' average and would make every covariance singular. Blind to finer detail
    than a cell, so a coarse measure beside a classifier's features; it asks for no labels.
    """

    def extract(images):
        with torch.no_grad():
            latents = codec.encode_batch(codec.pad_to_factors(_tensor(images).float())).float()
        cells = latents
        for axis in range(2, latents.ndim):
            parts = cells.tensor_split(min(grid, cells.shape[axis]), axis)
            cells = torch.stack([part.mean(axis) for part in parts], axis)
        spread = latents.flatten(2).std(2, correction=0)
        return Features(torch.cat([cells.flatten(1), spread], 1))

    return extract


def collect_features(extract, batches):
    """Return `Features` over an iterable of image batches: NumPy arrays, but of the spatial ones the statistics alone.

    The images are not kept, and of spatial features neither is anything that would grow with their number.
    """
    pooled, logits, spatial = [], [], None
    for batch in batches:
        read = extract(batch)
        pooled.append(read.pooled.cpu().numpy())
        logits += [] if read.logits is None else [read.logits.cpu().numpy()]
        if read.spatial is not None:
            spatial = (spatial or FeatureStatistics()).update(read.spatial.cpu())
    if not pooled:
        raise ValueError("no images to take features from; the set is empty")
    return Features(np.concatenate(pooled), np.concatenate(logits) if logits else None, spatial)
