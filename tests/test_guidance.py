import numpy as np
import pytest
import torch
import torch.nn.functional as F

from guided_diffusion_vae.config import validate
from guided_diffusion_vae.nn import keyed_randn
from guided_diffusion_vae.objectives import ClassifierObjective, StepRNG
from guided_diffusion_vae.resample import ScheduleSampler
from guided_diffusion_vae.runs.factories import create_gaussian_diffusion
from guided_diffusion_vae.sampling import (
    Autoguidance, ClassifierFreeGuidance, SamplingConfig, classifier_cond_fn, noise_levels, timesteps_in_interval,
)

LABELS = torch.tensor([2, 0, 1])


def normal(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def test_cond_fn_is_gradient_of_log_probability():
    weight = normal(3, 4)
    classifier = lambda x, t: F.linear(x.flatten(1), weight) * (1 + t[:, None])
    x, t = normal(3, 1, 4, seed=1), torch.tensor([0, 1, 5])
    with torch.no_grad():  # as in a sampling loop
        gradient = classifier_cond_fn(classifier, 2.5)(x, t, y=LABELS, low_res="other conditioning")
    point = x.clone().requires_grad_()
    log_p = classifier(point, t).log_softmax(1)[range(3), LABELS].sum()
    torch.testing.assert_close(gradient, 2.5 * torch.autograd.grad(log_p, point)[0])
    assert not x.requires_grad


class LabelModel:
    """Model that returns its label in `heads` heads of one channel, and records its calls."""

    def __init__(self, heads=1):
        self.heads, self.calls = heads, []

    def __call__(self, x, t, y, low_res=None):
        self.calls.append((len(x), t.tolist(), y.tolist(), low_res))
        level = y.view(-1, 1, 1).to(x).expand_as(x)
        return torch.cat([level, *(-level for _ in range(self.heads - 1))], 1)


@pytest.mark.parametrize("heads", [1, 2])
@pytest.mark.parametrize("scale", [0.0, 1.0, 3.0])
def test_guidance_extrapolates_from_unconditional_prediction(scale, heads):
    model = LabelModel(heads)
    x, t = normal(3, 1, 4), torch.full((3,), 9)
    out = ClassifierFreeGuidance(model, 7, scale)(x, t, y=LABELS)
    expected = 7 + scale * (LABELS - 7.0)
    torch.testing.assert_close(out[:, 0], expected.view(3, 1).expand(3, 4))
    if heads == 2:  # the variance is that of the class
        torch.testing.assert_close(out[:, 1], -LABELS.float().view(3, 1).expand(3, 4))


def test_both_predictions_come_from_one_batch():
    model, low_res = LabelModel(), normal(3, 1, 2)
    ClassifierFreeGuidance(model, 7, 2.0)(normal(3, 1, 4), torch.full((3,), 9), y=LABELS, low_res=low_res)
    (count, times, labels, small), = model.calls
    assert count == 6 and times == [9] * 6 and labels == [2, 0, 1, 7, 7, 7]
    assert torch.equal(small, torch.cat([low_res, low_res]))


def test_model_is_evaluated_once_outside_the_interval():
    model = LabelModel()
    guided = ClassifierFreeGuidance(model, 7, 2.0, timesteps=(5, 9))
    for t in (4, 5, 9, 10):
        guided(normal(3, 1, 4), torch.full((3,), t), y=LABELS)
    assert [count for count, *_ in model.calls] == [3, 6, 6, 3]


def test_rescaling_restores_the_standard_deviation_of_the_conditional_prediction():
    network = lambda x, t, y: x * (1 + y.view(-1, 1, 1)) + (y == 7).view(-1, 1, 1) * x.flip(2)
    x, t = normal(3, 2, 8), torch.full((3,), 9)
    guided = lambda rescale: ClassifierFreeGuidance(network, 7, 3.0, rescale=rescale)(x, t, y=LABELS)
    std = network(x, t, LABELS).std((1, 2))
    plain, half, full = guided(0.0), guided(0.5), guided(1.0)
    assert (plain.std((1, 2)) / std - 1).abs().min() > 0.1
    torch.testing.assert_close(full.std((1, 2)), std)
    torch.testing.assert_close(half, (plain + full) / 2)
    torch.testing.assert_close(full / plain, (full / plain)[:, :1, :1].expand(-1, 2, 8))    # one factor per sample
    constant = ClassifierFreeGuidance(lambda x, t, y: torch.zeros_like(x), 7, 3.0, rescale=1.0)(x, t, y=LABELS)
    assert (constant == 0).all()


def test_autoguidance_extrapolates_from_the_guide():
    model, guide = LabelModel(heads=2), LabelModel()
    x, t, low_res = normal(3, 1, 4), torch.full((3,), 9), normal(3, 1, 2)
    guide_of = lambda x, t, y, low_res: guide(x, t, y, low_res) - 5.0
    out = Autoguidance(model, guide_of, 3.0)(x, t, y=LABELS, low_res=low_res)
    torch.testing.assert_close(out[:, 0], (LABELS + 10.0).view(3, 1).expand(3, 4))
    torch.testing.assert_close(out[:, 1], -LABELS.float().view(3, 1).expand(3, 4))  # the variance is the model's
    assert guide.calls == [(3, [9] * 3, LABELS.tolist(), low_res)]
    assert torch.equal(Autoguidance(model, guide_of, 1.0)(x, t, y=LABELS, low_res=low_res), model(x, t, LABELS))
    inside = Autoguidance(model, guide_of, 3.0, timesteps=(5, 8))
    assert torch.equal(inside(x, t, y=LABELS, low_res=low_res), model(x, t, LABELS))
    without = Autoguidance(model, lambda x, t: x * 0, 2.0, guide_has_classes=False)(x, t, y=LABELS)
    torch.testing.assert_close(without[:, 0], (2.0 * LABELS).view(3, 1).expand(3, 4))


@pytest.mark.parametrize("loop", ["p_sample_loop", "ddim_sample_loop"])
def test_sampling_applies_an_interval_without_reading_the_device(loop):
    process = create_gaussian_diffusion(steps=70, timestep_respacing="10", rescale_timesteps=True)
    timesteps = timesteps_in_interval(process, tuple(process.noise_levels()[[3, 6]]))
    sizes = []
    # Tensors on the meta device have no values: reading one on the host fails.
    network = lambda x, timesteps, y: sizes.append(len(x)) or 0 * x
    sample_loop = getattr(process, loop)
    sample_loop(ClassifierFreeGuidance(network, 7, 2.0, timesteps), (1, 1, 4), device="meta",
                model_kwargs={"y": torch.empty(1, device="meta")})
    assert sizes == [1] * 3 + [2] * 4 + [1] * 3


@pytest.mark.parametrize("flags", [{}, {"rescale_timesteps": True}, {"timestep_respacing": "7"}])
def test_timesteps_on_the_host_are_those_of_the_network(flags):
    process = create_gaussian_diffusion(steps=70, **flags)
    on_device = process.model_timesteps(torch.arange(process.num_timesteps)).tolist()
    assert [process.model_timestep(t) for t in range(process.num_timesteps)] == on_device


@pytest.mark.parametrize("rescale", [False, True])
def test_intervals_are_noise_to_signal_ratios(rescale):
    process = create_gaussian_diffusion(steps=100, timestep_respacing="10", rescale_timesteps=rescale)
    sigma = ((1 - process.alphas_cumprod) / process.alphas_cumprod) ** 0.5
    low, high = timesteps_in_interval(process, (sigma[3] - 1e-6, sigma[6] + 1e-6))
    factor = 10 if rescale else 1
    assert (low, high) == (factor * process.timestep_map[3], factor * process.timestep_map[6])
    assert timesteps_in_interval(process, (sigma[3] + 1e-6, sigma[4] - 1e-6)) is None
    assert timesteps_in_interval(process, (0, 1e9))[1] == factor * 99


def test_ends_of_an_interval_belong_to_it():
    process = create_gaussian_diffusion(steps=100)
    sigma = process.noise_levels()
    assert timesteps_in_interval(process, (sigma[20], sigma[60])) == (20, 60)


def test_an_interval_is_parsed_from_two_numbers():
    assert noise_levels.parse("", "x") == () and noise_levels.parse("0.3,3", "x") == (0.3, 3.0)
    assert noise_levels.parse("1,inf", "x") == (1.0, float("inf"))


@pytest.mark.parametrize("text", ["3,0.3", "1", "a,b", "-1,2", "1,2,3"])
def test_invalid_intervals_are_rejected(text):
    with pytest.raises(ValueError, match=f"--cfg_interval must be two noise levels, the lower first, .* got '{text}'"):
        validate(SamplingConfig(cfg_interval=text))


# --- Training of the classifier ---


class LaterTimesteps(ScheduleSampler):
    """Sample timesteps in proportion to their number."""

    def weights(self):
        return np.arange(1.0, 11.0)


def seven_classes(x, t):
    """Return logits [N x 7] that depend on every value of x, and on t."""
    return F.linear(x.flatten(1), normal(7, 4, seed=4)) * (1 + 0.1 * t[:, None])


@pytest.mark.parametrize("noised", [True, False])
def test_classifier_losses_are_weighted_cross_entropies_of_x_t(noised):
    process = create_gaussian_diffusion(steps=10, noise_schedule="cosine")
    x0, labels = 3 * normal(40, 1, 4, seed=5), torch.arange(40) % 7
    objective = ClassifierObjective(process, LaterTimesteps(), noised)
    terms, t = objective(seven_classes, x0, {"y": labels}, StepRNG(3, 6, range(40), 40))
    x_t, weights = x0, torch.ones(40)
    if noised:
        alpha_bar = torch.from_numpy(np.cumprod(1 - process.betas)).float()[t].view(-1, 1, 1)
        noise = keyed_randn((1, 4), [(3, 2, 6, slot) for slot in range(40)])
        x_t, weights = alpha_bar.sqrt() * x0 + (1 - alpha_bar).sqrt() * noise, 55 / (10 * (t + 1.0))
        assert set(t.tolist()) <= set(range(10)) and (t > 4).float().mean() > 0.5
    else:
        assert (t == 0).all()
    log_p = seven_classes(x_t, t).double().log_softmax(1)
    losses = -log_p[range(40), labels]
    rank = (log_p > log_p[range(40), labels][:, None]).sum(1)
    torch.testing.assert_close(terms["loss"].double(), losses * weights, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(terms["unweighted"].double(), losses, rtol=1e-4, atol=1e-5)
    assert torch.equal(terms["acc@1"] == 1, rank == 0) and torch.equal(terms["acc@5"] == 1, rank < 5)
    assert set(rank.tolist()) >= {0, 1, 3, 4, 5}
