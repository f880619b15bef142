"""Step an optimiser in full precision, or over float32 masters of half-precision weights with an adaptive loss scale.

Micikevicius et al. 2018, "Mixed Precision Training", sections 3.1 (master copies) and 3.2 (loss scaling).
"""

import math

import torch
from torch import nn

from . import dist_util, logger

INITIAL_LOG_LOSS_SCALE = 20.0
CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


# Casting

def convert_module_to_f16(l):
    """Cast weight and bias of a convolution to float16; other modules stay as they are."""
    _cast(l, torch.float16)


def convert_module_to_f32(l):
    """Cast weight and bias of a convolution to float32; undoes `convert_module_to_f16`."""
    _cast(l, torch.float32)


def _cast(module, dtype):
    if isinstance(module, CONVOLUTIONS):
        for parameter in module.parameters(recurse=False):
            parameter.data = parameter.data.to(dtype)


# Parameters of the model <-> flat float32 masters

def get_param_groups_and_shapes(named_model_params):
    """Part parameters of up to one axis from the rest; return [(list of (name, parameter), shape of master)]."""
    few, many = [], []
    for name, parameter in named_model_params:
        (many if parameter.ndim > 1 else few).append((name, parameter))
    return [(group, shape) for group, shape in ((few, (-1,)), (many, (1, -1))) if group]


def make_master_params(param_groups_and_shapes):
    """Return one float32 parameter a group, holding the group's values one after another in the group's shape."""
    return [nn.Parameter(_flatten((p.detach() for _, p in group), shape)) for group, shape in param_groups_and_shapes]


def _flatten(tensors, shape):
    tensors = list(tensors)
    flat = torch.empty(sum(t.numel() for t in tensors), device=tensors[0].device)
    torch._foreach_copy_(list(flat.split([t.numel() for t in tensors])), [t.reshape(-1) for t in tensors])
    return flat.view(shape)


def unflatten_master_params(param_group, master_param):
    """Return views of a master in the shapes of its group's parameters; inverse of `make_master_params`."""
    parts = master_param.reshape(-1).split([p.numel() for _, p in param_group])
    return [part.view(p.shape) for part, (_, p) in zip(parts, param_group)]


def model_grads_to_master_grads(param_groups_and_shapes, master_params):
    """Set the masters' gradients to the model's, in float32, zeros where a parameter has none."""
    for master, (group, shape) in zip(master_params, param_groups_and_shapes):
        master.grad = _flatten((param_grad_or_zeros(p) for _, p in group), shape)


@torch.no_grad()
def master_params_to_model_params(param_groups_and_shapes, master_params):
    """Copy the masters into the model's parameters, rounding to their dtypes."""
    for master, (group, _) in zip(master_params, param_groups_and_shapes):
        torch._foreach_copy_([p for _, p in group], unflatten_master_params(group, master))


def master_params_to_state_dict(model, param_groups_and_shapes, master_params, use_fp16):
    """Return the model's state dict with its parameters' values taken from the masters, buffers as they are."""
    state = model.state_dict()
    if use_fp16:
        for master, (group, _) in zip(master_params, param_groups_and_shapes):
            state.update(zip((name for name, _ in group), unflatten_master_params(group, master.detach())))
    else:
        state.update(zip((name for name, _ in model.named_parameters()), master_params))
    return state


def state_dict_to_master_params(model, state_dict, use_fp16):
    """Return the masters that a state dict of the model describes; inverse of `master_params_to_state_dict`."""
    named = [(name, state_dict[name]) for name, _ in model.named_parameters()]
    return make_master_params(get_param_groups_and_shapes(named)) if use_fp16 else [value for _, value in named]


# Optimizer files

def optimizer_state_of_params(state, named_params):
    """Return the state of an optimizer over parameters, given that of one over their flat masters; inverse of the next.

    `state` maps numbers of optimised tensors to their entries; values of a tensor's size are cut up, others (the count
    of steps) are given to every parameter.
    """
    number = {name: i for i, (name, _) in enumerate(named_params)}
    split = {}
    for (group, _), entries in zip(get_param_groups_and_shapes(named_params), state.values(), strict=True):
        size = sum(p.numel() for _, p in group)
        for name, _ in group:
            split[number[name]] = {}
        for key, value in entries.items():
            whole = isinstance(value, torch.Tensor) and value.numel() == size and value.dim() > 0
            parts = unflatten_master_params(group, value) if whole else [value] * len(group)
            for (name, _), part in zip(group, parts):
                split[number[name]][key] = part.clone() if isinstance(part, torch.Tensor) else part
    return split


def optimizer_state_of_masters(state, named_params):
    """Return the state of an optimizer over flat masters, given that of one over the parameters."""
    number = {name: i for i, (name, _) in enumerate(named_params)}
    joined = {}
    for i, (group, shape) in enumerate(get_param_groups_and_shapes(named_params)):
        entries = [(state[number[name]], p) for name, p in group]
        joined[i] = {
            key: _flatten((entry[key] for entry, _ in entries), shape) if value.shape == entries[0][1].shape else value
            for key, value in entries[0][0].items()
        }
    return joined


# Gradients

def param_grad_or_zeros(param):
    """Return a parameter's gradient, zeros of its shape where it has none."""
    return torch.zeros_like(param) if param.grad is None else param.grad.detach()


def zero_grad(model_params):
    """Drop gradients, which frees their memory and spares the next backward pass an addition."""
    for parameter in model_params:
        parameter.grad = None


def zero_master_grads(master_params):
    """Drop the masters' gradients."""
    zero_grad(master_params)


def check_overflow(value):
    """Return whether a number is infinite or not a number; waits for the device if it is a tensor."""
    return not math.isfinite(value)


class MixedPrecisionTrainer:
    """Step an optimiser over a model's parameters, or with `use_fp16` over float32 masters of a half-precision model.

    With `use_fp16`, and with `scale_loss` (for autocast to float16), the loss is multiplied by 2 ** lg_loss_scale
    before the backward pass. The exponent grows by `fp16_scale_growth` at each step and drops by 1 when a gradient
    overflows; that step is left out. `grad_clip` is the greatest norm over all gradients (after unscaling), 0 leaves
    them alone. Log keys begin with `name`.
    """

    def __init__(self, *, model, use_fp16=False, fp16_scale_growth=1e-3, initial_lg_loss_scale=INITIAL_LOG_LOSS_SCALE,
                 grad_clip=0.0, scale_loss=False, name=""):
        self.model = model
        self.name = name
        self.use_fp16 = use_fp16
        self.scale_loss = scale_loss or use_fp16
        self.fp16_scale_growth = fp16_scale_growth
        self.lg_loss_scale = initial_lg_loss_scale
        self.grad_clip = grad_clip
        self.model_params = list(model.parameters())
        self.master_params = self.model_params
        self.param_groups_and_shapes = None
        if use_fp16:
            if not hasattr(model, "convert_to_fp16"):
                raise ValueError(f"--use_fp16 True needs a model that has convert_to_fp16(), "
                                 f"{type(model).__name__} has not; set --use_fp16 False")
            # Masters are made of the weights before rounding.
            self.param_groups_and_shapes = get_param_groups_and_shapes(model.named_parameters())
            self.master_params = make_master_params(self.param_groups_and_shapes)
            model.convert_to_fp16()

    def zero_grad(self):
        """Drop the model's gradients."""
        zero_grad(self.model_params)

    @property
    def loss_scale(self):
        """What the loss is multiplied by before its gradient is taken."""
        return 2 ** self.lg_loss_scale if self.scale_loss else 1.0

    def backward(self, loss):
        """Add the gradients of a scalar loss, times the loss scale in half precision, to those of the model."""
        (loss * self.loss_scale if self.scale_loss else loss).backward()

    def optimize(self, opt):
        """Step the optimiser; return False where half-precision gradients overflowed and the step was left out.

        Logs grad_norm and param_norm, both before the step. In float32 nothing here waits for the device.
        """
        return self._step_scaled(opt) if self.scale_loss else self._step(opt)

    def _step(self, opt):
        grads = [p.grad for p in self.master_params if p.grad is not None]
        grad_norm = nn.utils.get_total_norm(grads)
        param_norm = nn.utils.get_total_norm([p.detach() for p in self.master_params])
        logger.logkv_mean(f"{self.name}grad_norm", dist_util.full_tensor(grad_norm))
        logger.logkv_mean(f"{self.name}param_norm", dist_util.full_tensor(param_norm))
        if self.grad_clip > 0:
            nn.utils.clip_grads_with_norm_(self.master_params, self.grad_clip, grad_norm)
        opt.step()
        return True

    def _step_scaled(self, opt):
        logger.logkv_mean(f"{self.name}lg_loss_scale", self.lg_loss_scale)
        if self.use_fp16:
            model_grads_to_master_grads(self.param_groups_and_shapes, self.master_params)
        grads = [master.grad for master in self.master_params if master.grad is not None]
        usable = not check_overflow(dist_util.full_tensor(nn.utils.get_total_norm(grads)))
        if usable:
            torch._foreach_mul_(grads, 2.0 ** -self.lg_loss_scale)
            self._step(opt)
            if self.use_fp16:
                master_params_to_model_params(self.param_groups_and_shapes, self.master_params)
            self.lg_loss_scale += self.fp16_scale_growth
        else:
            self.lg_loss_scale -= 1
            logger.log(f"gradients overflowed, step left out; {self.name}lg_loss_scale is now {self.lg_loss_scale:g}")
        zero_master_grads(self.master_params)
        return usable

    def load_optimizer(self, opt, content):
        """Take over an optimizer's state dict, whether it was saved in half precision (over flat masters) or in full.

        So a run changes its precision when it goes on, and files of guided-diffusion's half-precision runs are read.
        Settings (learning rate and such) stay as they are in `opt`.

        :raises ValueError: where the file is of an optimizer over other tensors, or of another kind.
        """
        of_adamw = all("exp_avg" in entries for entries in content["state"].values())
        if content["state"] and of_adamw != isinstance(opt, torch.optim.AdamW):
            kind = "adamw" if of_adamw else "adamw8bit"
            raise ValueError(f"the optimizer file holds moments of {kind}, and the run is to go on with another one; "
                             f"give --optimizer {kind}, or begin a run from its weights (--init_from)")
        if not of_adamw:
            return opt.load_state_dict(content)
        state = {i: {**entries, "step": torch.as_tensor(float(entries["step"]))}     # a number in files of old torch
                 for i, entries in content["state"].items()}
        named = list(self.model.named_parameters())
        flat = get_param_groups_and_shapes(named)
        sizes = [state[i]["exp_avg"].numel() for i in sorted(state)]
        if sizes == [p.numel() for _, p in named] and self.use_fp16:
            state = optimizer_state_of_masters(state, named)
        elif sizes == [sum(p.numel() for _, p in group) for group, _ in flat] and not self.use_fp16:
            state = optimizer_state_of_params(state, named)
        elif state and sizes != [p.numel() for p in self.master_params]:
            raise ValueError(f"the optimizer file is over {len(sizes)} tensors of {sum(sizes)} numbers in all, the "
                             f"model has {len(named)} of {sum(p.numel() for _, p in named)}; it belongs to another one")
        for i, entries in state.items():
            master = self.master_params[i]
            state[i] = {key: dist_util.distribute_like(value, master) if value.shape == master.shape else value
                        for key, value in entries.items()}
        opt.load_state_dict({"state": state, "param_groups": opt.state_dict()["param_groups"]})

    def master_params_to_state_dict(self, master_params):
        """Return a state dict of the model with these values, which may be an average, for its parameters."""
        return master_params_to_state_dict(self.model, self.param_groups_and_shapes, master_params, self.use_fp16)

    def state_dict_to_master_params(self, state_dict):
        """Return the list of masters described by a state dict of the model."""
        return state_dict_to_master_params(self.model, state_dict, self.use_fp16)
