"""Bend sampling towards classes: by a classifier's gradient, or by what a model says with and without the class."""

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F

from ..config import option


@dataclass
class GuidanceConfig:
    classifier_path: str = option("", "run of classifier_train.py on noised data, or one weights file of it")
    classifier_scale: float = option(1.0, "how strongly the classifier's gradient pulls")


def classifier_cond_fn(classifier, scale=1.0):
    """Return a `cond_fn`: scale times the gradient of log p(y | x_t) by x_t (ADM, arXiv 2105.05233, section 4.1).

    `classifier(x, times)` gives logits [N x K]; the function is called as cond_fn(x, times, y) and passes over whatever
    else a model is told. It returns [N x C x ...].
    """

    def cond_fn(x, times, y, **told):
        with torch.enable_grad():
            point = x.detach().requires_grad_()
            loss = F.cross_entropy(classifier(point, times).float(), y, reduction="sum")
            return torch.autograd.grad(loss, point)[0].mul(-scale)

    return cond_fn


class ClassifierFreeGuidance:
    """A model whose prediction is pushed away from what it says of no class: u + scale (c - u).

    Ho and Salimans 2022 (arXiv 2207.12598), equation 6 with scale = w + 1; 1 is no guidance. Both predictions come from
    one batch of twice the size. A variance head is taken from the one with the class. Noise, x_0 and velocity depend on
    each other linearly, so it does not matter which of them the model predicts.

    :param null_label: the label that stands for no class.
    :param times: (lowest, highest) times, as models are told them, between which guidance acts; outside of it the model
        is asked once (Kynkäänniemi et al. 2024, arXiv 2404.07724). None: always.
    """

    def __init__(self, model, null_label, scale, times=None):
        self.model, self.null_label, self.scale, self.times = model, null_label, scale, times

    def __call__(self, x, times, y, **told):
        if self.times is not None and not self.times[0] <= float(times[0]) <= self.times[1]:
            return self.model(x, times, y=y, **told)
        labels = torch.cat([y, torch.full_like(y, self.null_label)])
        twice = {name: torch.cat([value, value]) for name, value in told.items()}
        with_class, without = self.model(torch.cat([x, x]), torch.cat([times, times]), y=labels, **twice).chunk(2)
        channels = x.shape[1]
        prediction = without[:, :channels].lerp(with_class[:, :channels], self.scale)
        return torch.cat([prediction, with_class[:, channels:]], dim=1)


def parse_interval(text):
    """Return (lo, hi) from "lo,hi", None from an empty text.

    :raises ValueError: where it is not two numbers from 0 up, the lower first.
    """
    if not text:
        return None
    try:
        low, high = (float(part) for part in text.split(","))
    except ValueError:
        low, high = 1.0, 0.0
    if not 0 <= low < high:
        raise ValueError(f"--cfg_interval is {text!r}; needed are two noise levels, the lower first, such as 0.3,3")
    return low, high


def timesteps_in_interval(diffusion, interval):
    """Return the lowest and highest times told to models whose noise level is inside; None: no time is.

    The level is sigma = sqrt(1 - alpha-bar) / sqrt(alpha-bar), noise per signal.
    """
    low, high = interval
    with np.errstate(divide="ignore"):
        sigma = np.sqrt((1.0 - diffusion.alphas_cumprod) / diffusion.alphas_cumprod)
    inside = np.flatnonzero((low <= sigma) & (sigma <= high))
    if not len(inside):
        return None
    ends = torch.from_numpy(inside[[0, -1]])
    return tuple(diffusion.model_timesteps(ends).tolist())
