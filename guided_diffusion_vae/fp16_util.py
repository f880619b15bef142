"""Optimizer steps in float32, or over float32 master weights of a half-precision model with a loss scale.

Micikevicius et al. 2018, "Mixed Precision Training", arXiv:1710.03740, Sec. 3.1 (master weights), 3.2 (loss scaling).
"""

import math

import torch
from torch import nn

from . import dist_util, logger
from .config import require

INITIAL_LOG_LOSS_SCALE = 20.0
CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


# --- Casting ---

def convert_module_to_f16(l: nn.Module) -> None:
    """Cast weight and bias of a convolution to float16; other modules are unchanged."""
    _cast(l, torch.float16)


def convert_module_to_f32(l: nn.Module) -> None:
    """Cast weight and bias of a convolution to float32; inverse of `convert_module_to_f16`."""
    _cast(l, torch.float32)


def _cast(module, dtype):
    if isinstance(module, CONVOLUTIONS):
        for parameter in module.parameters(recurse=False):
            parameter.data = parameter.data.to(dtype)


# --- Parameters of the model <=> flat float32 master weights ---

def get_param_groups_and_shapes(named_model_params) -> list[tuple[list, tuple]]:
    """Return [(list of (name, parameter), shape of master)]: parameters of up to one axis, then all others."""
    vectors: list[tuple] = []
    tensors: list[tuple] = []
    for name, parameter in named_model_params:
        (tensors if parameter.ndim > 1 else vectors).append((name, parameter))
    return [(group, shape) for group, shape in ((vectors, (-1,)), (tensors, (1, -1))) if group]


def make_master_params(param_groups_and_shapes: list) -> list[nn.Parameter]:
    """Return one float32 parameter per group: the concatenated values of the group in its shape."""
    return [nn.Parameter(_flatten((p.detach() for _, p in group), shape)) for group, shape in param_groups_and_shapes]


def _flatten(tensors, shape):
    tensors = list(tensors)
    flat = torch.empty(sum(t.numel() for t in tensors), device=tensors[0].device)
    torch._foreach_copy_(list(flat.split([t.numel() for t in tensors])), [t.reshape(-1) for t in tensors])
    return flat.view(shape)


def unflatten_master_params(param_group, master_param):
    """Return views of a master weight in the shapes of its group's parameters; inverse of `make_master_params`."""
    parts = master_param.reshape(-1).split([p.numel() for _, p in param_group])
    return [part.view(p.shape) for part, (_, p) in zip(parts, param_group)]


def model_grads_to_master_grads(param_groups_and_shapes, master_params):
    """Set the master weights' gradients to the model's in float32; a parameter without gradient counts as zeros."""
    for master, (group, shape) in zip(master_params, param_groups_and_shapes):
        master.grad = _flatten((param_grad_or_zeros(p) for _, p in group), shape)


@torch.no_grad()
def master_params_to_model_params(param_groups_and_shapes, master_params):
    """Copy the master weights into the model's parameters, rounded to their dtypes."""
    for master, (group, _) in zip(master_params, param_groups_and_shapes):
        torch._foreach_copy_([p for _, p in group], unflatten_master_params(group, master))


def master_params_to_state_dict(model, param_groups_and_shapes, master_params, use_fp16):
    """Return the model's state dict with the values of the master weights; buffers are the model's."""
    state = model.state_dict()
    if use_fp16:
        for master, (group, _) in zip(master_params, param_groups_and_shapes):
            state.update(zip((name for name, _ in group), unflatten_master_params(group, master.detach())))
    else:
        state.update(zip((name for name, _ in model.named_parameters()), master_params))
    return state


def state_dict_to_master_params(model, state_dict, use_fp16):
    """Return the master weights of a state dict of the model; inverse of `master_params_to_state_dict`."""
    named = [(name, state_dict[name]) for name, _ in model.named_parameters()]
    return make_master_params(get_param_groups_and_shapes(named)) if use_fp16 else [value for _, value in named]


# --- Optimizer files ---

def optimizer_state_of_params(state: dict, named_params: list) -> dict:
    """Return the state of an optimizer over parameters from that of one over their flat master weights.

    The inverse is `optimizer_state_of_masters`. Values of a tensor's size are split, others (the number of steps) are
    copied to every parameter.

    :param state: {index of the optimized tensor: entries}.
    """
    number = {name: i for i, (name, _) in enumerate(named_params)}
    split: dict[int, dict] = {}
    for (group, _), entries in zip(get_param_groups_and_shapes(named_params), state.values(), strict=True):
        size = sum(p.numel() for _, p in group)
        for name, _ in group:
            split[number[name]] = {}
        for key, value in entries.items():
            flat = isinstance(value, torch.Tensor) and value.numel() == size and value.dim() > 0
            parts = unflatten_master_params(group, value) if flat else [value] * len(group)
            for (name, _), part in zip(group, parts):
                split[number[name]][key] = part.clone() if isinstance(part, torch.Tensor) else part
    return split


def optimizer_state_of_masters(state: dict, named_params: list) -> dict:
    """Return the state of an optimizer over flat master weights from that of one over the parameters."""
    number = {name: i for i, (name, _) in enumerate(named_params)}
    joined = {}
    for i, (group, shape) in enumerate(get_param_groups_and_shapes(named_params)):
        entries = [(state[number[name]], p) for name, p in group]
        joined[i] = {
            key: _flatten((entry[key] for entry, _ in entries), shape) if value.shape == entries[0][1].shape else value
            for key, value in entries[0][0].items()
        }
    return joined


# --- Gradients ---

def param_grad_or_zeros(param: torch.Tensor) -> torch.Tensor:
    """Return a parameter's gradient, zeros of its shape if there is none."""
    return torch.zeros_like(param) if param.grad is None else param.grad.detach()


def zero_grad(model_params: list) -> None:
    """Set gradients to None."""
    # Unlike zeros, this frees their memory and saves the next backward pass an addition.
    for parameter in model_params:
        parameter.grad = None


def zero_master_grads(master_params: list) -> None:
    """Set the gradients of master weights to None."""
    zero_grad(master_params)


def check_overflow(value: float | torch.Tensor) -> bool:
    """Return whether a number is infinite or NaN; a tensor on a GPU causes a host sync."""
    return not math.isfinite(value)


class MixedPrecisionTrainer:
    """Backward passes and optimizer steps of a model in float32, float16 (`use_fp16`) or autocast (`scale_loss`).

    With `use_fp16` the optimizer updates float32 master weights of a half-precision model. With `use_fp16` or
    `scale_loss` (autocast to float16) the loss is multiplied by 2 ** lg_loss_scale, so that small gradients do not
    underflow. The exponent grows by `fp16_scale_growth` in each step; when a gradient overflows, it decreases by 1 and
    the step is skipped.

    :param grad_clip: maximum norm over all (unscaled) gradients; 0: no clipping.
    :param name: prefix of the log keys.
    :raises ValueError: if `use_fp16` is set for a model without `convert_to_fp16`.
    """

    def __init__(self, *, model, use_fp16=False, fp16_scale_growth=1e-3, initial_lg_loss_scale=INITIAL_LOG_LOSS_SCALE,
                 grad_clip=0.0, scale_loss=False, name=""):
        self.model = model
        self.name = name
        self.use_fp16 = use_fp16
        self.scale_loss = scale_loss or use_fp16
        self.fp16_scale_growth = fp16_scale_growth
        self.lg_loss_scale = initial_lg_loss_scale
        self.skipped_steps = 0      # in a row, up to now
        self.grad_clip = grad_clip
        self.model_params = list(model.parameters())
        self.master_params = self.model_params
        self.param_groups_and_shapes = None
        if use_fp16:
            require((hasattr(model, "convert_to_fp16"), "--use_fp16 True requires a model with convert_to_fp16(), got "
                     f"{type(model).__name__}; set --use_fp16 False"))
            # Before the model is cast: master weights must not be rounded.
            self.param_groups_and_shapes = get_param_groups_and_shapes(model.named_parameters())
            self.master_params = make_master_params(self.param_groups_and_shapes)
            model.convert_to_fp16()

    def zero_grad(self) -> None:
        """Set the model's gradients to None."""
        zero_grad(self.model_params)

    @property
    def loss_scale(self) -> float:
        """Factor of the loss in the backward pass."""
        return 2 ** self.lg_loss_scale if self.scale_loss else 1.0

    def backward(self, loss: torch.Tensor) -> None:
        """Accumulate the gradients of a scalar loss, scaled in half precision."""
        (loss * self.loss_scale if self.scale_loss else loss).backward()

    def optimize(self, opt: torch.optim.Optimizer) -> bool:
        """Take an optimizer step; return False if half-precision gradients overflowed and the step was skipped.

        Logs grad_norm and param_norm, both before the step. In float32 there is no host sync.
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
            self.skipped_steps = 0
        else:
            self.lg_loss_scale -= 1
            self.skipped_steps += 1
            scale = f"{self.name}lg_loss_scale is now {self.lg_loss_scale:g}"
            logger.log(f"gradients overflowed, skipped the step; {scale}")
        zero_master_grads(self.master_params)
        return usable

    def load_optimizer(self, opt: torch.optim.Optimizer, content: dict) -> None:
        """Load an optimizer's state dict, saved in half precision (over flat master weights) or in float32.

        A run can thus resume in another precision, and files of guided-diffusion's half-precision runs can be loaded.
        Settings of `opt`, such as the learning rate, are unchanged.

        :raises ValueError: if the file belongs to an optimizer over other tensors or of another kind.
        """
        is_adamw = all("exp_avg" in entries for entries in content["state"].values())
        kind = "adamw" if is_adamw else "adamw8bit"
        require((not content["state"] or is_adamw == isinstance(opt, torch.optim.AdamW),
                 f"the optimizer file contains moments of {kind}; set --optimizer {kind}, or start a run from its "
                 "weights (--init_from)"))
        if not is_adamw:
            opt.load_state_dict(content)
            return
        state = {i: {**entries, "step": torch.as_tensor(float(entries["step"]))}     # files of old torch have a number
                 for i, entries in content["state"].items()}
        named = list(self.model.named_parameters())
        flat = get_param_groups_and_shapes(named)
        sizes = [state[i]["exp_avg"].numel() for i in sorted(state)]
        if sizes == [p.numel() for _, p in named] and self.use_fp16:
            state = optimizer_state_of_masters(state, named)
        elif sizes == [sum(p.numel() for _, p in group) for group, _ in flat] and not self.use_fp16:
            state = optimizer_state_of_params(state, named)
        else:
            require((not state or sizes == [p.numel() for p in self.master_params],
                     f"the optimizer file belongs to another model: expected {len(named)} tensors with "
                     f"{sum(p.numel() for _, p in named)} elements, got {len(sizes)} with {sum(sizes)}"))
        for i, entries in state.items():
            master = self.master_params[i]
            state[i] = {key: dist_util.distribute_like(value, master) if value.shape == master.shape else value
                        for key, value in entries.items()}
        opt.load_state_dict({"state": state, "param_groups": opt.state_dict()["param_groups"]})

    def master_params_to_state_dict(self, master_params: list) -> dict:
        """Return a state dict of the model with the values of master weights or of their EMA."""
        return master_params_to_state_dict(self.model, self.param_groups_and_shapes, master_params, self.use_fp16)

    def state_dict_to_master_params(self, state_dict: dict) -> list:
        """Return the list of master weights of a state dict of the model."""
        return state_dict_to_master_params(self.model, state_dict, self.use_fp16)
