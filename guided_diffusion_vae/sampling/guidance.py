"""Guide sampling: classifier guidance, classifier-free guidance and autoguidance."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F

from ..config import option
from ..interfaces import PerTimestep
from ..nn import drop_conditioning


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


class _Guidance(PerTimestep):
    """A model whose prediction is extrapolated from a weaker one: weak + scale (strong - weak); scale 1 disables it.

    Noise, x_0 and velocity are linear in each other, so that the rule holds for each of them. A variance head is that
    of the stronger prediction. Subclasses return both.

    :param timesteps: (lowest, highest) timesteps, as passed to the model, between which guidance applies; outside the
        model is evaluated once (Kynkäänniemi et al. 2024, arXiv:2404.07724). None: all.
    :param rescale: fraction in which the result is rescaled to the standard deviation of the stronger prediction, per
        sample (Lin et al. 2023, arXiv:2305.08891, Eq. 15 and 16).
    """

    def __init__(self, model: Callable, scale: float, timesteps: tuple | None = None, rescale: float = 0.0):
        self.model, self.scale, self.timesteps, self.rescale = model, scale, timesteps, rescale

    def __call__(self, x, timesteps, **conditioning):
        network = self.at(float(timesteps[0])) if self.timesteps else self._guided
        return network(x, timesteps, **conditioning)

    def at(self, timestep):
        inside = not self.timesteps or self.timesteps[0] <= timestep <= self.timesteps[1]
        return self._guided if inside else self.model

    def _guided(self, x, timesteps, **conditioning):
        output, weak = self._predictions(x, timesteps, **conditioning)
        channels = x.shape[1]
        strong = output[:, :channels]
        prediction = weak[:, :channels].lerp(strong, self.scale)
        if self.rescale:
            axes = tuple(range(1, x.dim()))
            ratio = strong.std(axes, keepdim=True) / prediction.std(axes, keepdim=True).clamp(min=1e-8)
            prediction = prediction * (1.0 + self.rescale * (ratio - 1.0))
        return torch.cat([prediction, output[:, channels:]], dim=1)


class ClassifierFreeGuidance(_Guidance):
    """A model guided by its unconditional prediction (Ho and Salimans 2022, arXiv:2207.12598, Eq. 6, scale = w + 1).

    Both predictions come from one batch of twice the size. The unconditional one has the null class, and unknown
    attributes.

    :param null_label: the null class, which replaces dropped labels in training.
    """

    def __init__(self, model: Callable, null_label: int, scale: float, timesteps: tuple | None = None,
                 rescale: float = 0.0):
        super().__init__(model, scale, timesteps, rescale)
        self.null_label = null_label

    def _predictions(self, x, timesteps, **conditioning):
        null = _null_conditioning(conditioning, x, self.null_label)
        doubled = {name: torch.cat([value, null[name]]) for name, value in conditioning.items()}
        return self.model(torch.cat([x, x]), torch.cat([timesteps, timesteps]), **doubled).chunk(2)


class Autoguidance(_Guidance):
    """A model guided by a weaker one, such as an earlier checkpoint (Karras et al. 2024, arXiv:2406.02507, Eq. 3).

    :param guide: the weaker model, with the same conditioning. Without classes it is called without `y`; guidance then
        is classifier-free, with a model of its own for the unconditional prediction.
    """

    def __init__(self, model: Callable, guide: Callable, scale: float, timesteps: tuple | None = None,
                 rescale: float = 0.0, guide_has_classes: bool = True):
        super().__init__(model, scale, timesteps, rescale)
        self.guide, self.guide_has_classes = guide, guide_has_classes

    def _predictions(self, x, timesteps, **conditioning):
        shared = {name: value for name, value in conditioning.items() if name != "y" or self.guide_has_classes}
        return self.model(x, timesteps, **conditioning), self.guide(x, timesteps, **shared)


class Unconditional:
    """The unconditional prediction of a model: guidance with scale 0, at the cost of one evaluation.

    :param null_label: the null class, which replaces dropped labels in training; None without classes.
    """

    def __init__(self, model: Callable, null_label: int | None):
        self.model, self.null_label = model, null_label

    def __call__(self, x, timesteps, **conditioning):
        if self.null_label is not None:
            conditioning["y"] = torch.full((len(x),), self.null_label, device=x.device)
        return self.model(x, timesteps, **_null_conditioning(conditioning, x, self.null_label))


def _null_conditioning(conditioning, x, null_label):
    dropped = torch.ones(len(x), dtype=torch.bool, device=x.device)
    return drop_conditioning(conditioning, dropped, null_label)


def timesteps_in_interval(diffusion, interval: tuple[float, float]) -> tuple | None:
    """Return the lowest and highest timestep, as passed to models, with a noise level sigma in `interval`; None:
    none."""
    sigma = diffusion.noise_levels()
    inside = np.flatnonzero((interval[0] <= sigma) & (sigma <= interval[1]))
    if not len(inside):
        return None
    return tuple(diffusion.model_timesteps(torch.from_numpy(inside[[0, -1]])).tolist())
