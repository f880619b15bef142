"""Guide sampling toward classes: classifier guidance and classifier-free guidance."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F

from ..config import option
from ..interfaces import PerTimestep


@dataclass
class GuidanceConfig:
    classifier_path: str = option(
        "", "run of classifier_train.py on noised data, or a weights file of one", essential=True)
    classifier_scale: float = option(1.0, "scale of the classifier's gradient", essential=True)


def classifier_cond_fn(classifier: Callable, scale: float = 1.0) -> Callable:
    """Return a `cond_fn`: scale times the gradient of log p(y | x_t) by x_t (ADM, arXiv:2105.05233, Sec. 4.1).

    `classifier(x, timesteps)` returns logits [N x K]. The function is called as cond_fn(x, timesteps, y), ignores other
    conditioning and returns [N x C x ...].
    """

    def cond_fn(x, timesteps, y, **conditioning):
        with torch.enable_grad():
            point = x.detach().requires_grad_()
            loss = F.cross_entropy(classifier(point, timesteps).float(), y, reduction="sum")
            return torch.autograd.grad(loss, point)[0].mul(-scale)

    return cond_fn


class ClassifierFreeGuidance(PerTimestep):
    """A model guided by its unconditional prediction: u + scale (c - u).

    Ho and Salimans 2022 (arXiv:2207.12598), Eq. 6 with scale = w + 1; a scale of 1 disables it. Both predictions come
    from one batch of twice the size; a variance head is that of the conditional one. Noise, x_0 and velocity are
    linear in each other, so that the rule holds for each of them.

    :param null_label: the null class, which replaces dropped labels in training.
    :param timesteps: (lowest, highest) timesteps, as passed to the model, between which guidance applies; outside the
        model is evaluated once (Kynkäänniemi et al. 2024, arXiv:2404.07724). None: all.
    """

    def __init__(self, model: Callable, null_label: int, scale: float, timesteps: tuple | None = None):
        self.model, self.null_label, self.scale, self.timesteps = model, null_label, scale, timesteps

    def __call__(self, x, timesteps, y, **conditioning):
        network = self.at(float(timesteps[0])) if self.timesteps else self._guided
        return network(x, timesteps, y=y, **conditioning)

    def at(self, timestep):
        inside = not self.timesteps or self.timesteps[0] <= timestep <= self.timesteps[1]
        return self._guided if inside else self.model

    def _guided(self, x, timesteps, y, **conditioning):
        labels = torch.cat([y, torch.full_like(y, self.null_label)])
        doubled = {name: torch.cat([value, value]) for name, value in conditioning.items()}
        output = self.model(torch.cat([x, x]), torch.cat([timesteps, timesteps]), y=labels, **doubled)
        conditional, unconditional = output.chunk(2)
        channels = x.shape[1]
        prediction = unconditional[:, :channels].lerp(conditional[:, :channels], self.scale)
        return torch.cat([prediction, conditional[:, channels:]], dim=1)


class Unconditional:
    """The unconditional prediction of a model with classes: guidance with scale 0, at the cost of one evaluation.

    :param null_label: the null class, which replaces dropped labels in training.
    """

    def __init__(self, model: Callable, null_label: int):
        self.model, self.null_label = model, null_label

    def __call__(self, x, timesteps, **conditioning):
        labels = torch.full((len(x),), self.null_label, device=x.device)
        return self.model(x, timesteps, y=labels, **conditioning)


def timesteps_in_interval(diffusion, interval: tuple[float, float]) -> tuple | None:
    """Return the lowest and highest timestep, as passed to models, with a noise level sigma in `interval`; None:
    none."""
    sigma = diffusion.noise_levels()
    inside = np.flatnonzero((interval[0] <= sigma) & (sigma <= interval[1]))
    if not len(inside):
        return None
    return tuple(diffusion.model_timesteps(torch.from_numpy(inside[[0, -1]])).tolist())
