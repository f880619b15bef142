import copy
import math

import pytest
import torch
from torch import nn

from guided_diffusion_vae import fp16_util, logger
from guided_diffusion_vae.fp16_util import MixedPrecisionTrainer


class Net(nn.Module):
    """A convolution that can be cast, and a norm that stays in float32."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(2, 3, 3, padding=1)
        self.norm = nn.GroupNorm(1, 3)
        self.register_buffer("seen", torch.tensor([5]))

    def convert_to_fp16(self):
        self.conv.apply(fp16_util.convert_module_to_f16)

    def forward(self, x):
        return self.norm(self.conv(x.to(self.conv.weight.dtype)).float())


@pytest.fixture(autouse=True)
def quiet(tmp_path):
    torch.manual_seed(0)
    logger.configure(str(tmp_path), [])
    yield
    logger.reset()


def loss_of(model):
    return (model(torch.linspace(-1, 1, 32).view(1, 2, 4, 4)) ** 2 * torch.linspace(0, 1, 48).view(1, 3, 4, 4)).mean()


def stepped(model, **options):
    trainer = MixedPrecisionTrainer(model=model, **options)
    opt = torch.optim.SGD(trainer.master_params, lr=0.5)
    trainer.zero_grad()
    trainer.backward(loss_of(model))
    return trainer, trainer.optimize(opt)


def test_float32_steps_update_the_models_parameters():
    model = Net()
    trainer, done = stepped(model)
    assert done is True
    assert all(a is b for a, b in zip(trainer.master_params, model.parameters()))
    grads = torch.cat([p.grad.reshape(-1) for p in model.parameters()])
    logged = logger.getkvs()
    assert logged["grad_norm"] == pytest.approx(grads.norm().item(), rel=1e-5)
    before = torch.cat([(p + 0.5 * p.grad).detach().reshape(-1) for p in model.parameters()])
    assert logged["param_norm"] == pytest.approx(before.norm().item(), rel=1e-5)
    trainer.zero_grad()
    assert all(p.grad is None for p in model.parameters())


def test_logging_norms_causes_no_host_sync(monkeypatch):
    def fail(tensor, *_):
        raise AssertionError("a tensor was read")

    model = Net()
    trainer = MixedPrecisionTrainer(model=model, grad_clip=0.1)
    opt = torch.optim.SGD(trainer.master_params, lr=0.1)
    trainer.backward(loss_of(model))
    for name in ("item", "__float__", "__bool__", "tolist"):
        monkeypatch.setattr(torch.Tensor, name, fail)
    trainer.optimize(opt)


def test_half_precision_step_matches_float32():
    single, half = Net(), Net()
    half.load_state_dict(single.state_dict())
    start = [p.detach().clone() for p in single.parameters()]
    trainer, _ = stepped(single)
    rounded, done = stepped(half, use_fp16=True, initial_lg_loss_scale=10.0, fp16_scale_growth=0.25)
    assert done is True and rounded.lg_loss_scale == 10.25
    assert half.conv.weight.dtype == torch.float16 and half.norm.weight.dtype == torch.float32
    assert [list(p.shape) for p in rounded.master_params] == [[9], [1, 54]]
    assert all(p.dtype == torch.float32 and p.grad is None for p in rounded.master_params)
    state = rounded.master_params_to_state_dict(rounded.master_params)
    assert list(state) == list(half.state_dict()) and state["seen"] == 5
    for (name, p), before in zip(single.named_parameters(), start):
        torch.testing.assert_close(state[name] - before, p.detach() - before, rtol=0.02, atol=2e-3)
        held = half.get_parameter(name)
        assert torch.equal(held, state[name].to(held.dtype))
    assert set(logger.getkvs()) == {"grad_norm", "param_norm", "lg_loss_scale"}


@pytest.mark.parametrize("bad", [float("inf"), float("nan")])
def test_overflow_skips_the_step_and_lowers_the_scale(bad):
    model = Net()
    trainer = MixedPrecisionTrainer(model=model, use_fp16=True)
    before = [p.detach().clone() for p in trainer.master_params]
    trainer.backward(loss_of(model))
    model.conv.weight.grad.view(-1)[3] = bad
    assert trainer.optimize(torch.optim.SGD(trainer.master_params, lr=1.0)) is False
    assert trainer.lg_loss_scale == 19
    assert all(torch.equal(a, b) for a, b in zip(before, trainer.master_params))


def test_steps_skipped_in_a_row_are_counted():
    model, counts = Net(), []
    trainer = MixedPrecisionTrainer(model=model, use_fp16=True, initial_lg_loss_scale=4)
    for bad in (True, True, False, True):
        trainer.zero_grad()
        trainer.backward(loss_of(model))
        if bad:
            model.conv.weight.grad.view(-1)[3] = math.nan
        trainer.optimize(torch.optim.SGD(trainer.master_params, lr=1e-3))
        counts.append(trainer.skipped_steps)
    assert counts == [1, 2, 0, 1]


@pytest.mark.parametrize("use_fp16", [False, True])
def test_state_dict_to_master_params_inverts_master_params_to_state_dict(use_fp16):
    trainer = MixedPrecisionTrainer(model=Net(), use_fp16=use_fp16)
    average = [torch.randn_like(p) for p in trainer.master_params]
    back = trainer.state_dict_to_master_params(trainer.master_params_to_state_dict(average))
    assert len(back) == len(average) and all(torch.equal(a, b) for a, b in zip(average, back))


def test_unflatten_inverts_make_master_params():
    model = Net()
    groups = fp16_util.get_param_groups_and_shapes(model.named_parameters())
    assert [dict(group).keys() for group, _ in groups] == [{"conv.bias", "norm.weight", "norm.bias"}, {"conv.weight"}]
    for master, (group, _) in zip(fp16_util.make_master_params(groups), groups):
        for part, (_, p) in zip(fp16_util.unflatten_master_params(group, master), group):
            assert torch.equal(part, p)


def test_parameter_without_gradient_counts_as_zeros():
    model = Net()
    groups = fp16_util.get_param_groups_and_shapes(model.named_parameters())
    masters = fp16_util.make_master_params(groups)
    model.norm.bias.grad = torch.ones(3)
    fp16_util.model_grads_to_master_grads(groups, masters)
    assert masters[0].grad.tolist() == [0.0] * 6 + [1.0] * 3 and not masters[1].grad.any()
    fp16_util.zero_master_grads(masters)
    assert masters[0].grad is None


@pytest.mark.parametrize("use_fp16", [False, True])
def test_gradients_are_clipped_to_grad_clip(use_fp16):
    model = Net()
    trainer = MixedPrecisionTrainer(model=model, use_fp16=use_fp16, initial_lg_loss_scale=8.0, grad_clip=1e-3)
    before = torch.cat([p.detach().clone().reshape(-1) for p in trainer.master_params])
    trainer.backward(loss_of(model))
    trainer.optimize(torch.optim.SGD(trainer.master_params, lr=1.0))
    after = torch.cat([p.detach().reshape(-1) for p in trainer.master_params])
    assert logger.getkvs()["grad_norm"] > 1e-2                          # logged before clipping
    assert (after - before).norm().item() == pytest.approx(1e-3, rel=1e-2)


def test_casting_changes_only_convolutions_and_inverts():
    for module in (nn.Conv1d(1, 1, 1), nn.Conv2d(1, 1, 1, bias=False), nn.Conv3d(1, 1, 1), nn.Linear(1, 1)):
        fp16_util.convert_module_to_f16(module)
        assert module.weight.dtype == (torch.float32 if isinstance(module, nn.Linear) else torch.float16)
        fp16_util.convert_module_to_f32(module)
        assert {p.dtype for p in module.parameters()} == {torch.float32}


@pytest.mark.parametrize("value", [float("inf"), -float("inf"), float("nan")])
def test_check_overflow_is_true_for_values_that_are_not_finite(value):
    assert fp16_util.check_overflow(value) and fp16_util.check_overflow(torch.tensor(value))
    assert not fp16_util.check_overflow(65504.0)


def test_model_without_convert_to_fp16_is_rejected():
    with pytest.raises(ValueError, match="requires a model with convert_to_fp16.*, got Linear; set --use_fp16 False"):
        MixedPrecisionTrainer(model=nn.Linear(1, 1), use_fp16=True)


# --- Optimizer files ---


def trained(use_fp16, steps=3):
    """Return (trainer, AdamW) of a network after some steps along random gradients."""
    trainer = MixedPrecisionTrainer(model=Net(), use_fp16=use_fp16)
    opt = torch.optim.AdamW(trainer.master_params, lr=0.1, fused=True)
    for seed in range(steps):
        step_along(trainer, opt, seed)
    return trainer, opt


def step_along(trainer, opt, seed):
    """Take one step of the master weights along a gradient that does not depend on their shape."""
    named = [(name, p) for name, p in trainer.model.named_parameters()]
    seeded = lambda i: torch.Generator().manual_seed(100 * seed + i)
    grads = [torch.randn(p.shape, generator=seeded(i)) for i, (_, p) in enumerate(named)]
    if trainer.use_fp16:
        groups = fp16_util.get_param_groups_and_shapes([(name, g) for (name, _), g in zip(named, grads)])
        grads = [p.detach() for p in fp16_util.make_master_params(groups)]
    for master, grad in zip(trainer.master_params, grads, strict=True):
        master.grad = grad
    opt.step()


def weights_of(trainer):
    state = trainer.master_params_to_state_dict(trainer.master_params)
    return torch.cat([state[name].detach().float().flatten() for name, _ in trainer.model.named_parameters()])


@pytest.mark.parametrize("before, after", [(True, False), (False, True), (True, True), (False, False)])
def test_load_optimizer_converts_between_precisions(before, after):
    old, old_opt = trained(before)
    content = copy.deepcopy(old_opt.state_dict())
    if before:  # as a file of guided-diffusion and an older torch has it
        assert len(content["state"]) == 2
        content["state"] = {i: {**entry, "step": int(entry["step"])} for i, entry in content["state"].items()}
        content["param_groups"] = [{"lr": 5.0, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.3,
                                    "amsgrad": False, "params": [0, 1]}]
    new, new_opt = trained(after, steps=0)
    with torch.no_grad():
        loaded = new.state_dict_to_master_params(old.master_params_to_state_dict(old.master_params))
        for master, value in zip(new.master_params, loaded, strict=True):
            master.copy_(value)
    new.load_optimizer(new_opt, content)
    assert new_opt.param_groups[0]["lr"] == 0.1 and new_opt.param_groups[0]["fused"] is True
    for trainer, opt in ((old, old_opt), (new, new_opt)):
        step_along(trainer, opt, 9)
    torch.testing.assert_close(weights_of(new), weights_of(old), rtol=1e-6, atol=1e-7)


def test_load_optimizer_passes_8bit_state_unchanged():
    class EightBit:
        def load_state_dict(self, content):
            self.content = content

    content = {"state": {0: {"state1": torch.zeros(3, dtype=torch.uint8), "step": 5}}, "param_groups": []}
    optimizer = EightBit()
    MixedPrecisionTrainer(model=Net()).load_optimizer(optimizer, content)
    assert optimizer.content is content


def test_load_optimizer_rejects_another_kind():
    trainer, opt = trained(False)
    content = {"state": {0: {"state1": torch.zeros(3, dtype=torch.uint8), "step": 5}}, "param_groups": []}
    with pytest.raises(ValueError, match="moments of adamw8bit; set --optimizer adamw8bit, or start .*init_from"):
        trainer.load_optimizer(opt, content)
    with pytest.raises(ValueError, match="set --optimizer adamw, or"):
        trainer.load_optimizer(object(), opt.state_dict())


def test_load_optimizer_rejects_another_model():
    trainer, opt = trained(False)
    other = nn.Linear(3, 4)
    wrong = torch.optim.AdamW(other.parameters())
    other(torch.ones(1, 3)).sum().backward()
    wrong.step()
    with pytest.raises(ValueError, match="another model: expected 4 tensors with 63 elements, got 2 with 16"):
        trainer.load_optimizer(opt, wrong.state_dict())
