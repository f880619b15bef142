"""Measure on one GPU within 10 minutes what a CPU cannot show: agreement, waits, resumption, speed and memory.

    python benchmarks/gpu.py --reference ../guided-diffusion
    python benchmarks/gpu.py --only matrix_rate,train_step --minutes 4
    OMP_NUM_THREADS=1 python benchmarks/gpu.py --device cpu --tiny True                # proves the code, not the speed

The sections of SECTIONS run in order and share the time by weight. gpu.json is written after every case. A case that
fails is recorded with its error, and the next one runs; a section that has used its time skips the rest of its cases.
The last table compares the results with the goals of docs/scaling.md. diffusers takes part in "train_step"; with
--reference, guided-diffusion does, in "sampling" and "compile" too, and is the baseline.
"""

import collections
import contextlib
import copy
import dataclasses
import functools
import gc
import itertools
import os
import re
import tempfile
import time
import traceback
import warnings
from pathlib import Path

import common
import torch
import torch.nn.functional as F
from encode import NETWORKS, random_network
from torch.nn.attention import SDPBackend, sdpa_kernel
from train_step import SIZES, Side, diffusers_side, flops, own_side, reference_side, reference_unet

from guided_diffusion_vae.autoencoder import AutoencoderConfig, create_autoencoder
from guided_diffusion_vae.config import CommaSeparated, option
from guided_diffusion_vae.dist_util import CUBLAS_WORKSPACES, FastLaunchConfig, set_numerics
from guided_diffusion_vae.gaussian_diffusion import DiffusionConfig
from guided_diffusion_vae.nn import (
    GroupNorm32, allow_tf32, conv_nd, fuse_norms, norm_act, upsample_conv, upsample_nearest,
)
from guided_diffusion_vae.objectives import ClassifierObjective, DiffusionObjective
from guided_diffusion_vae.resample import UniformSampler
from guided_diffusion_vae.runs.factories import build_classifier, create_diffusion, create_model_and_diffusion_vae
from guided_diffusion_vae.runs.training import AutoencoderPlan, DiffusionPlan
from guided_diffusion_vae.sampling import SAMPLERS, Sampler
from guided_diffusion_vae.sampling.solvers import applicable_samplers
from guided_diffusion_vae.train_util import AutoencoderTrainConfig, TrainConfig, TrainLoop, TrainTask
from guided_diffusion_vae.unet import ClassifierConfig, ModelConfig
from guided_diffusion_vae.vae import AutoencoderLossConfig, DiscriminatorConfig, create_discriminator
from guided_diffusion_vae.vae.objective import AutoencoderObjective, DiscriminatorTrainer
from guided_diffusion_vae.vae.streaming import Streamer
from guided_diffusion_vae.vae_wrapper import PixelCodec, VAEConfig, create_vae

HALF = torch.bfloat16
CHANNELS_LAST = {2: torch.channels_last, 3: torch.channels_last_3d}
MEASURED_SECONDS = 0.2  # about which one measurement of training steps takes
WAIT = "called a synchronizing CUDA operation"    # the warning of torch.cuda.set_sync_debug_mode


@dataclasses.dataclass(frozen=True)
class Sizes:
    """The sizes of everything that is measured."""

    unets: dict             # of the speed sections: {name: (shape of the latents, flags of a ModelConfig)}
    batches: tuple          # of training steps
    calls: int              # most calls per measurement
    small_unet: dict        # of agreement, waits and resumption, on latents of side `small`
    small: int
    steps: int              # of the runs of resumption, which are interrupted in the middle
    autoencoders: dict      # {dims: AutoencoderConfig} of the speed sections
    images: tuple           # (batch, side) of images, `volumes` of volumes
    volumes: tuple
    heads: tuple            # channels of heads of attention, `tokens` their numbers
    tokens: tuple
    feature_maps: tuple     # of norms and upsampling: (batch, channels, *grid)
    matrix: int             # side of the matrices; 0: that of `common.matrix_product`
    sampling_steps: int


FULL = Sizes(
    unets={name: SIZES[name] for name in ("32m1224", "32adm256")}, batches=(64, 256), calls=10,
    small_unet=dict(num_channels=64, channel_mult="1,2", attention_resolutions="8", num_res_blocks=1), small=16,
    steps=6, autoencoders=NETWORKS, images=(16, 256), volumes=(1, 128), heads=(32, 64, 128, 256, 512),
    tokens=(256, 1024, 4096), feature_maps=((64, 256, 32, 32), (4, 128, 256, 256), (1, 64, 64, 64, 64)), matrix=0,
    sampling_steps=5,
)
TINY_UNET = dict(num_channels=64, channel_mult="1", attention_resolutions="8", num_res_blocks=1)
TINY = Sizes(
    unets={"8m1": ((4, 8, 8), TINY_UNET)}, batches=(2,), calls=1, small_unet=TINY_UNET, small=8, steps=2,
    autoencoders={3: AutoencoderConfig(in_channels=1, num_channels=(16, 16), spatial_dims=3)},
    images=(2, 16), volumes=(2, 16), heads=(32,), tokens=(16,), feature_maps=((2, 32, 8, 8), (1, 32, 4, 4, 4)),
    matrix=64, sampling_steps=2,
)


@dataclasses.dataclass
class Setup:
    """The device, the sizes and the clock of all sections."""

    device: torch.device
    sizes: Sizes
    repetitions: int = 7
    reference: str = ""

    @property
    def is_gpu(self):
        return self.device.type == "cuda"

    def time(self, variants, calls=1):
        """Return {name: {"ms": of a call, "speedup": relative to the first, ...}} of functions by name.

        :param calls: calls per measurement: launches of one overlap the work of the one before, as they do in use.
        """
        repeated = {name: functools.partial(_repeat, function, calls) for name, function in variants.items()}
        measured = common.time_interleaved(repeated, self.repetitions, self.device)
        return {row.pop("variant"): row for row in common.speedup_table(measured, next(iter(variants)), calls)}

    def peak_mib(self, function):
        """Return the peak GPU memory of a call in MiB, beyond what was allocated before; None on a CPU."""
        return common.peak_memory(function) / 2**20 if self.is_gpu else None

    @functools.cached_property
    def matrix_rate(self):
        """Operations per second of a large bfloat16 product, to which "matrix rate" refers."""
        product = common.matrix_product(self.device, HALF, self.sizes.matrix)
        return 1e3 * product.flops / self.time({"product": product})["product"]["ms"]


def _repeat(function, calls):
    for _ in range(calls):
        function()


# --- The runner ---


def run_sections(chosen, setup, minutes, save):
    """Return {section: rows} of the `chosen` {name: (weight, cases)}; `save(sections=...)` is called after every case.

    `cases(setup)` yields (case, function that returns a row).
    """
    end, results = time.monotonic() + 60 * minutes, {}
    weights = {name: weight for name, (weight, _) in chosen.items()}
    for name, (weight, cases) in chosen.items():
        start, rows = time.monotonic(), results.setdefault(name, [])
        deadline = start + (end - start) * weight / sum(weights.values())     # unused time passes to later sections
        del weights[name]
        for row in guarded(cases(setup), deadline):
            rows.append(row)
            save(sections=results)
            release_memory(setup.device)
        print(f"{name} ({time.monotonic() - start:.0f} s)\n\n{common.table(rows)}\n", flush=True)
    return results


def guarded(cases, deadline):
    """Yield a row per case, one that failed with its "error"; stop at the deadline."""
    while True:
        start, case = time.monotonic(), "next case"
        try:
            case, measure = next(cases)
            if start > deadline:
                yield {"case": case, "error": "skipped with all that follow: out of time, raise --minutes"}
                return
            yield {"case": case, **measure(), "seconds": time.monotonic() - start}
        except StopIteration:
            return
        except Exception as error:
            place = traceback.extract_tb(error.__traceback__)[-1]
            yield {"case": case, "error": f"{type(error).__name__}: {str(error)[:300]} "
                                          f"({Path(place.filename).name}:{place.lineno})"}


def release_memory(device):
    """Free GPU memory that a case has left: in compiled code, cycles of objects, cached blocks of the allocator."""
    if device.type == "cuda":
        torch.compiler.reset()
        gc.collect()
        torch.cuda.empty_cache()


def describe_gpu(device):
    """Return the properties of the GPU that affect speed, {} on a CPU."""
    if device.type != "cuda":
        return {}
    properties = torch.cuda.get_device_properties(device)
    return {"name": properties.name, "capability": f"{properties.major}.{properties.minor}",
            "memory_bytes": properties.total_memory, "multiprocessors": properties.multi_processor_count,
            "cuda": torch.version.cuda, "cudnn": torch.backends.cudnn.version()}


# --- Modes of computation ---


@contextlib.contextmanager
def restored_numerics():
    """Restore on leaving the settings that `dist_util.set_numerics` and `nn.allow_tf32` change."""
    cudnn, cuda = torch.backends.cudnn, torch.backends.cuda
    owners = [(cudnn, "allow_tf32"), (cuda.matmul, "allow_tf32"), (cudnn, "deterministic"), (cudnn, "benchmark"),
              (torch.utils.deterministic, "fill_uninitialized_memory")]
    before = [getattr(owner, name) for owner, name in owners]
    algorithms, attention = torch.are_deterministic_algorithms_enabled(), cuda.cudnn_sdp_enabled()
    try:
        yield
    finally:
        for (owner, name), value in zip(owners, before):
            setattr(owner, name, value)
        torch.use_deterministic_algorithms(algorithms)
        cuda.enable_cudnn_sdp(attention)


@contextlib.contextmanager
def tf32(enabled):
    """Allow or forbid TF32 inside; None: PyTorch's default, in convolutions only."""
    with restored_numerics():
        if enabled is not None:
            allow_tf32(enabled)
        yield


@contextlib.contextmanager
def recorded_waits(device):
    """Yield a list that on leaving has the place of every call inside that waited for the GPU; empty on a CPU."""
    places = []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        if device.type == "cuda":
            torch.cuda.set_sync_debug_mode("warn")
        try:
            yield places
        finally:
            if device.type == "cuda":
                torch.cuda.set_sync_debug_mode("default")
            places += [f"{Path(wait.filename).name}:{wait.lineno}" for wait in caught
                       if WAIT in str(wait.message)]


# --- Networks and training loops ---


def small_networks(sizes):
    """Return {name: (network, its inputs)} of all kinds of networks, on the CPU."""
    side, flags, timesteps = sizes.small, sizes.small_unet, torch.tensor([3, 700])
    rng = torch.Generator().manual_seed(0)
    torch.manual_seed(0)
    networks = {}
    for dims in (2, 3):
        shape = (4, *(side,) * dims)
        model, _ = create_model_and_diffusion_vae(shape, ModelConfig(**flags, resample_depth=True), DiffusionConfig())
        networks[f"UNet {dims}D"] = model, (torch.randn(2, *shape, generator=rng), timesteps)
        network = create_autoencoder(AutoencoderConfig(in_channels=1, num_channels=(32, 64), spatial_dims=dims))
        images = torch.rand(2, 1, *(side * (4 - dims),) * dims, generator=rng)
        networks[f"autoencoder {dims}D"] = network, (images, torch.zeros(2, *network.latent_shape(images.shape[2:])))
    classifier, _ = small_classifier(sizes)
    networks["classifier"] = classifier, networks["UNet 2D"][1]
    return {name: (common.randomize_zero_parameters(network), inputs) for name, (network, inputs) in networks.items()}


def small_classifier(sizes):
    """Return (classifier with adaptive pooling, process)."""
    config = ClassifierConfig(
        classifier_width=sizes.small_unet["num_channels"], classifier_depth=1, classifier_in_channels=4,
        classifier_num_classes=6,
        classifier_attention_resolutions=sizes.small_unet["attention_resolutions"], classifier_pool="adaptive",
        classifier_channel_mult=sizes.small_unet["channel_mult"],
    )
    return build_classifier(config, DiffusionConfig(), (4, sizes.small, sizes.small))


@dataclasses.dataclass
class Training:
    """A TrainLoop and the batch of its steps."""

    loop: TrainLoop
    batch: torch.Tensor
    cond: dict = dataclasses.field(default_factory=dict)

    def step(self):
        self.loop.run_step(self.batch, self.cond)

    def weights(self):
        """Return all weights in a vector on the CPU."""
        return torch.cat([p.detach().flatten().cpu() for p in self.loop.model.parameters()])


def _training(network, batch, cond, train, objective):
    """Return a Training that logs and saves only on request."""
    config = dataclasses.replace(train, batch_size=len(batch), log_interval=10**9, save_interval=10**9)
    return Training(TrainLoop.from_config(network, iter(()), config, TrainTask(objective)), batch, cond)


def unet_training(setup, **flags):
    """Return the Training of a small UNet in bfloat16."""
    shape = 4, setup.sizes.small, setup.sizes.small
    torch.manual_seed(0)
    network, diffusion = create_model_and_diffusion_vae(
        shape, ModelConfig(**setup.sizes.small_unet, **flags), DiffusionConfig())
    batch = torch.randn(4, *shape, generator=torch.Generator().manual_seed(1))
    return _training(network.to(setup.device), batch, {}, TrainConfig(mixed_precision=True),
                     DiffusionObjective(diffusion))


def classifier_training(setup):
    """Return the Training of a small classifier with adaptive pooling."""
    torch.manual_seed(0)
    network, diffusion = small_classifier(setup.sizes)
    batch = torch.randn(4, 4, setup.sizes.small, setup.sizes.small, generator=torch.Generator().manual_seed(1))
    objective = ClassifierObjective(diffusion, UniformSampler(diffusion))
    return _training(network.to(setup.device), batch, {"y": torch.arange(4)}, TrainConfig(ema_rate=""), objective)


def autoencoder_training(setup, config=None, images=None, adversarial=True, **options):
    """Return the Training of an autoencoder, by default a small one with a discriminator.

    :param images: (batch, side).
    """
    config = config or AutoencoderConfig(in_channels=1, num_channels=(16, 16))
    count, side = images or (2, 2 * setup.sizes.small)
    train = AutoencoderTrainConfig(**options)
    torch.manual_seed(0)
    network = create_autoencoder(config).to(setup.device)
    trainer = None
    if adversarial:
        adversary = DiscriminatorConfig(discriminator_weight=0.5, discriminator_start=0, discriminator_channels=8,
                                        discriminator_layers=2)
        discriminator = create_discriminator(adversary, config.spatial_dims, config.in_channels).to(setup.device)
        trainer = DiscriminatorTrainer(discriminator, adversary, train)
    batch = torch.rand(count, config.in_channels, *(side,) * config.spatial_dims,
                       generator=torch.Generator().manual_seed(1))
    objective = AutoencoderObjective(AutoencoderLossConfig(), network, config.image_range, train, discriminator=trainer)
    return _training(network, batch, {}, train, objective)


TRAININGS = {
    "UNet": unet_training,
    "UNet, recompute_norms and dropout": functools.partial(unet_training, recompute_norms=True, dropout=0.1),
    "classifier": classifier_training,
    "autoencoder and discriminator": functools.partial(autoencoder_training, mixed_precision=True),
}


def sampler_of(network, shape, solver, steps):
    """Return a Sampler of a network in evaluation mode without a codec, for `steps` steps of a solver."""
    spacing = {"dpmpp": "logsnr", "dpmpp_sde": "logsnr", "unipc": "logsnr", "ddim": "ddim"}.get(solver, "")
    config = DiffusionConfig(timestep_respacing=f"{spacing}{steps}")
    if solver not in applicable_samplers(create_diffusion(config)):
        config.process = "rectified_flow"
    return Sampler(network, create_diffusion(config), shape, PixelCodec(shape[0]), None, shape, solver=solver)


# --- Sections: agreement, waits, resumption ---


def matrix_rate(setup):
    """Yield the rates of matrix products by number format, and that of a copy in memory."""
    for name, dtype, allowed in (("float32", torch.float32, False), ("float32, TF32", torch.float32, True),
                                 ("float16", torch.float16, False), ("bfloat16", HALF, False)):
        yield f"product, {name}", functools.partial(_product_rate, setup, dtype, allowed)
    yield "copy", functools.partial(_copy_rate, setup)


def _product_rate(setup, dtype, allowed):
    with tf32(allowed):
        product = common.matrix_product(setup.device, dtype, setup.sizes.matrix)
        ms = setup.time({"product": product})["product"]["ms"]
    return {"ms": ms, "TFLOP/s": product.flops / ms / 1e9}


def _copy_rate(setup):
    source = torch.zeros(2**28 if setup.is_gpu else 2**20, device=setup.device)
    target = torch.empty_like(source)
    ms = setup.time({"copy": lambda: target.copy_(source)})["copy"]["ms"]
    return {"ms": ms, "GB/s": 2 * source.nbytes / ms / 1e6}


def agreement(setup):
    """Yield the relative differences of outputs and gradients from those of the CPU in float32."""
    for (name, (network, inputs)), allowed in itertools.product(small_networks(setup.sizes).items(), (False, True)):
        yield (f"{name}, TF32 {'on' if allowed else 'off'}",
               functools.partial(_differences, setup, network, inputs, allowed))


def _differences(setup, network, inputs, allowed):
    expected = _outputs_and_gradients(network, inputs)
    network, inputs = copy.deepcopy(network).to(setup.device), [x.to(setup.device) for x in inputs]
    row = {}
    with tf32(allowed):
        for name, dtype in (("float32", None), ("bfloat16", HALF)):
            with torch.autocast(setup.device.type, dtype or HALF, enabled=dtype is not None):
                actual = _outputs_and_gradients(network, inputs)
            for part, value, other in zip(("outputs", "gradients"), actual, expected):
                row[f"{part}, {name}"] = ((value - other).norm() / other.norm()).item()
    return row


def _outputs_and_gradients(network, inputs):
    network.zero_grad(set_to_none=True)
    outputs = network(*inputs)
    y = outputs[0] if isinstance(outputs, tuple) else outputs
    y.float().square().mean().backward()
    gradients = torch.cat([p.grad.flatten() for p in network.parameters() if p.grad is not None])
    return y.detach().double().cpu(), gradients.double().cpu()


def waits(setup):
    """Yield the calls that wait for the GPU in steps that do not log; 0 on a CPU."""
    for name, build in TRAININGS.items():
        training = build(setup)
        yield f"training step, {name}", functools.partial(_count_waits, setup, training.step, warmup=3)
    shape, (network, _) = (4, setup.sizes.small, setup.sizes.small), small_networks(setup.sizes)["UNet 2D"]
    network = network.to(setup.device).eval()
    for solver in SAMPLERS:
        sampler = sampler_of(network, shape, solver, setup.sizes.sampling_steps)
        sample = functools.partial(sampler.sample_x0, range(2), None, setup.device)
        yield f"{setup.sizes.sampling_steps} steps of {solver}", functools.partial(_count_waits, setup, sample)
    codec, images = open_codec(setup, next(iter(setup.sizes.autoencoders)), "float32")
    yield "encoding", functools.partial(_count_waits, setup, lambda: codec.encode_batch(images))
    z = codec.encode_batch(images)
    yield "decoding", functools.partial(_count_waits, setup, lambda: codec.decode_batch(z))


def _count_waits(setup, function, warmup=1):
    for _ in range(warmup):
        function()
    with recorded_waits(setup.device) as places:
        function()
    return {"waits": len(places), "at": ", ".join(f"{place} x{n}" for place, n in collections.Counter(places).items())}


def resumption(setup):
    """Yield whether training has the same bits when it is repeated, and when it is resumed."""
    for (name, build), enabled in itertools.product(TRAININGS.items(), (False, True)):
        yield (f"{name}, {'deterministic' if enabled else 'as configured'}",
               functools.partial(_compare_runs, setup, build, enabled))


def _compare_runs(setup, build, enabled):
    with restored_numerics():
        set_numerics(FastLaunchConfig(deterministic=enabled))
        first, repeated, resumed = (_train(setup, build, stop) for stop in (None, None, setup.sizes.steps // 2))
    return {"same bits repeated": torch.equal(first, repeated), "same bits resumed": torch.equal(first, resumed),
            "difference": ((first - resumed).norm() / first.norm()).item()}


def _train(setup, build, stop):
    """Return the weights after training with a checkpoint and a new start after `stop` steps, if it is not None."""
    with common.silent():
        training = build(setup)
        for step in range(setup.sizes.steps):
            if step == stop:
                training.loop.save()
                training = build(setup)
            training.step()
    return training.weights()


# --- Sections: speed ---


class StepComparison:
    """Training steps of a UNet at one batch size, each interleaved with those of the first one that ran."""

    def __init__(self, setup, shape, flags, count):
        self.setup, self.shape, self.flags, self.count = setup, shape, flags, count
        self.model, self.diffusion = create_model_and_diffusion_vae(shape, ModelConfig(**flags), DiffusionConfig())
        common.randomize_zero_parameters(self.model)
        self.batch = torch.randn(count, *shape, generator=torch.Generator().manual_seed(1)).to(setup.device)
        self.baseline = None    # (name, function)

    def own(self, recompute_norms=False, **options):
        flags = {**self.flags, "recompute_norms": recompute_norms}
        return own_side(self.shape, flags, self.model.state_dict(), self.count, self.setup.device, **options)

    def guided_diffusion(self, **options):
        return reference_side(self.setup.reference, self.shape, self.flags, self.model, self.count, self.setup.device,
                              **options)

    def diffusers(self, autocast=None):
        # It has one head size per network, unlike the other sides.
        flags = {**self.flags, "num_head_channels": 64}
        model, _ = create_model_and_diffusion_vae(self.shape, ModelConfig(**flags), DiffusionConfig())
        return diffusers_side(flags, model, self.setup.device, autocast)

    @functools.cached_property
    def flops(self):
        """Operations of a step of this project's network."""
        side = Side(None, copy.deepcopy(self.model).to(self.setup.device), self.diffusion)
        return self.count * flops(side, self.batch[:1], self.setup.device)

    def measure(self, name, build, allowed=None):
        """Return the row of a Side, which is freed then unless it is the baseline."""
        start = time.perf_counter()
        side = build()

        def run():
            with tf32(allowed):
                side.run_step(self.batch, {})

        self._wall_clock(run)
        first_step = time.perf_counter() - start
        peak, step = self.setup.peak_mib(run), self._wall_clock(run)
        self.baseline = self.baseline or (name, run, step)
        base, run_base, base_step = self.baseline
        calls = max(1, min(self.setup.sizes.calls, int(MEASURED_SECONDS / max(step, base_step))))
        row = self.setup.time({base: run_base, name: run}, calls)[name]
        return {"ms": row["ms"], "samples/s": 1e3 * self.count / row["ms"], "speedup": row["speedup"],
                "from": row["from"], "to": row["to"], "relative to": base,
                "matrix rate": self.flops / (row["ms"] / 1e3) / self.setup.matrix_rate, "peak MiB": peak,
                "s until first step": first_step}

    def _wall_clock(self, run):
        start = time.perf_counter()
        run()
        if self.setup.is_gpu:
            torch.cuda.synchronize()
        return time.perf_counter() - start


class LoopWithoutGraphs(TrainLoop):
    """A TrainLoop whose compiled network does not use CUDA graphs."""

    def _compiled(self, network):
        return torch.compile(network, dynamic=False)


def train_step(setup):
    """Yield the time of training steps in eager mode, beside those of guided-diffusion and diffusers."""
    half = {"mixed_precision": True}
    return _training_steps(setup, lambda c: {
        "bfloat16": functools.partial(c.own, **half),
        "bfloat16, channels last": functools.partial(c.own, memory_format=torch.channels_last, **half),
        "bfloat16, recompute_norms": functools.partial(c.own, recompute_norms=True, **half),
        "bfloat16, fuse_norms": functools.partial(c.own, fuse_norms=True, **half),
        "diffusers, bfloat16": functools.partial(c.diffusers, HALF),
        "float32, TF32": c.own, "float32": c.own, "diffusers, float32": c.diffusers,
    })


def compiled_step(setup):
    """Yield the time of compiled training steps; each compilation takes up to minutes."""
    compiled = {"mixed_precision": True, "compile": True}
    return _training_steps(setup, lambda c: {
        "bfloat16": functools.partial(c.own, mixed_precision=True),
        "bfloat16, compiled with CUDA graphs": functools.partial(c.own, **compiled),
        "bfloat16, compiled": functools.partial(c.own, cls=LoopWithoutGraphs, **compiled),
    })


def _training_steps(setup, own_sides):
    """Yield the cases of a section of training steps: guided-diffusion's, and those of own_sides(StepComparison)."""
    for (size, (shape, flags)), count in itertools.product(setup.sizes.unets.items(), setup.sizes.batches):
        comparison, sides = StepComparison(setup, shape, flags, count), {}
        if setup.reference:
            sides = {"guided-diffusion, float32": comparison.guided_diffusion,
                     "guided-diffusion, float16": functools.partial(comparison.guided_diffusion, use_fp16=True)}
        for name, build in {**sides, **own_sides(comparison)}.items():
            allowed = {"float32": False, "float32, TF32": True}.get(name)
            yield (f"{size}, batch of {count}, {name}", functools.partial(comparison.measure, name, build, allowed))


def sampling(setup):
    """Yield samples per second, noise included, relative to guided-diffusion's ancestral steps with --reference."""
    steps, count = setup.sizes.sampling_steps, setup.sizes.batches[0]
    for size, (shape, flags) in setup.sizes.unets.items():
        torch.manual_seed(0)
        network, _ = create_model_and_diffusion_vae(shape, ModelConfig(**flags), DiffusionConfig())
        network = common.randomize_zero_parameters(network).to(setup.device).eval()
        half = copy.deepcopy(network)
        half.convert_to_bf16()
        runs = {}
        if setup.reference:
            runs["guided-diffusion, ddpm, float32"] = _reference_run(setup, shape, flags, network.state_dict(), count)
        for (name, model), solver in itertools.product((("float32", network), ("bfloat16", half)), SAMPLERS):
            sampler = sampler_of(model, shape, solver, steps)
            runs[f"{solver}, {name}"] = functools.partial(sampler.sample_x0, range(count), None, setup.device)
        baseline = next(iter(runs.items()))
        for name, run in runs.items():
            yield f"{size}, batch of {count}, {name}", functools.partial(_sampling_row, setup, baseline, name, run)


def _sampling_row(setup, baseline, name, run):
    steps, count = setup.sizes.sampling_steps, setup.sizes.batches[0]
    row = setup.time(dict([baseline, (name, run)]))[name]
    return {"ms per step": row["ms"] / steps, "samples/s at 50 steps": 1e3 * count * steps / row["ms"] / 50,
            "speedup": row["speedup"], "from": row["from"], "to": row["to"], "relative to": baseline[0],
            "peak MiB": setup.peak_mib(run)}


def _reference_run(setup, shape, flags, weights, count):
    """Return a function that takes guided-diffusion's ancestral steps."""
    reference = common.open_reference(setup.reference)
    network = reference_unet(reference, shape, flags)
    network.load_state_dict(weights)
    network = network.to(setup.device).eval()
    spacing = str(setup.sizes.sampling_steps)
    diffusion = reference.script_util.create_gaussian_diffusion(timestep_respacing=spacing)
    return lambda: diffusion.p_sample_loop(network, (count, *shape), clip_denoised=False, device=setup.device)


def codecs(setup):
    """Yield encoded and decoded images and volumes per second."""
    for dims in setup.sizes.autoencoders:
        for work in ("encoding", "decoding"):
            opened = {dtype: open_codec(setup, dims, dtype) for dtype in ("float32", "bfloat16")}
            shape = "x".join(map(str, next(iter(opened.values()))[1].shape))
            yield f"{work} {shape}", functools.partial(_codec_row, setup, opened, work)


def open_codec(setup, dims, dtype):
    """Return (VAEInterface with random weights, images or volumes on the CPU)."""
    count, side = {2: setup.sizes.images, 3: setup.sizes.volumes}[dims]
    with tempfile.TemporaryDirectory() as folder:
        torch.manual_seed(0)
        path = random_network(Path(folder) / "vae.pt", setup.sizes.autoencoders[dims])
        codec = create_vae(VAEConfig(vae_path=str(path), vae_dtype=dtype), setup.device)
    images = torch.rand(count, codec.in_channels, *(side,) * dims, generator=torch.Generator().manual_seed(0))
    return codec, images


def _codec_row(setup, opened, work):
    functions = {}
    for name, (codec, images) in opened.items():
        z = codec.encode_batch(images)
        functions[name] = functools.partial(*((codec.encode_batch, images) if work == "encoding" else
                                              (codec.decode_batch, z)))
    measured = setup.time(functions)
    row = {}
    for name, (_, images) in opened.items():
        row |= {f"ms, {name}": measured[name]["ms"], f"samples/s, {name}": 1e3 * len(images) / measured[name]["ms"],
                f"peak MiB, {name}": setup.peak_mib(functions[name])}
    return {**row, "speedup": measured["bfloat16"]["speedup"]}


def attention(setup):
    """Yield milliseconds of attention, forward and backward, by head size and backend; empty: not supported."""
    for channels, tokens, dtype in itertools.product(setup.sizes.heads, setup.sizes.tokens, (HALF, torch.float32)):
        name = str(dtype).removeprefix("torch.")
        yield f"heads of {channels}, {tokens} tokens, {name}", functools.partial(
            _attention_row, setup, channels, tokens, dtype)


def _attention_row(setup, channels, tokens, dtype):
    q = torch.randn(8, 512 // channels, tokens, channels, device=setup.device, dtype=dtype, requires_grad=True)
    run = with_backward(lambda: F.scaled_dot_product_attention(q, q, q), q)

    def restricted(backend):
        with sdpa_kernel(backend):
            run()

    variants = {"as chosen": run}
    for backend in (SDPBackend.FLASH_ATTENTION, SDPBackend.CUDNN_ATTENTION, SDPBackend.EFFICIENT_ATTENTION,
                    SDPBackend.MATH):
        function = functools.partial(restricted, backend)
        with warnings.catch_warnings(), contextlib.suppress(RuntimeError):
            warnings.simplefilter("ignore")     # the reasons for which a backend does not apply
            function()
            variants[backend.name.lower()] = function
    return {name: row["ms"] for name, row in setup.time(variants, setup.sizes.calls).items()}


def with_backward(function, *inputs):
    """Return a function that computes function() and the gradients of `inputs`."""
    gradient = torch.randn_like(function().detach())
    return lambda: torch.autograd.grad(function(), inputs, gradient)


def norms(setup):
    """Yield milliseconds of a norm and SiLU in bfloat16, forward and backward: eager, compiled, and as --fuse_norms."""
    for shape, channels_last in itertools.product(setup.sizes.feature_maps, (False, True)):
        yield _map_name(shape, channels_last), functools.partial(_norm_row, setup, shape, channels_last)


def _map_name(shape, channels_last):
    return f"{'x'.join(map(str, shape))}{', channels last' if channels_last else ''}"


def _feature_map(setup, shape, channels_last):
    x = torch.randn(shape, device=setup.device, dtype=HALF)
    memory_format = CHANNELS_LAST[len(shape) - 2] if channels_last else torch.contiguous_format
    return x.contiguous(memory_format=memory_format).requires_grad_()


def _norm_row(setup, shape, channels_last):
    x, norm = _feature_map(setup, shape, channels_last), GroupNorm32(32, shape[1]).to(setup.device)
    fused = copy.deepcopy(norm)
    fuse_norms(fused)
    eager = lambda: F.silu(norm(x))
    runs = {"eager": with_backward(eager, x, *norm.parameters()),
            "compiled": with_backward(torch.compile(eager, dynamic=False), x, *norm.parameters()),
            "fuse_norms": with_backward(lambda: norm_act(fused, x), x, *fused.parameters())}
    times = setup.time(runs, setup.sizes.calls)
    row = {name: each["ms"] for name, each in times.items()}
    for name in ("compiled", "fuse_norms"):
        row[f"speedup, {name}"] = times[name]["speedup"]
        # The least traffic: x is read and the result written, then x and the gradient are read and another one written.
        row[f"GB/s, {name}"] = 5 * x.nbytes / times[name]["ms"] / 1e6
    return row


def upsampling(setup):
    """Yield milliseconds of upsampling by 2 and a convolution, in two steps and as a transposed convolution."""
    for shape, channels_last in itertools.product(setup.sizes.feature_maps, (False, True)):
        yield _map_name(shape, channels_last), functools.partial(_upsampling_row, setup, shape, channels_last)


def _upsampling_row(setup, shape, channels_last):
    count, channels, *grid = shape
    x = _feature_map(setup, (count, channels, *(max(n // 2, 1) for n in grid)), channels_last)
    conv = conv_nd(len(grid), channels, channels, 3, padding=1).to(setup.device, HALF)
    if channels_last:
        conv = conv.to(memory_format=CHANNELS_LAST[len(grid)])
    forward = {"two steps": lambda: conv(upsample_nearest(x, 2)), "transposed": lambda: upsample_conv(conv, x, 2)}
    times = setup.time({name: with_backward(f, x, *conv.parameters()) for name, f in forward.items()},
                       setup.sizes.calls)
    return {name: row["ms"] for name, row in times.items()} | {"speedup": times["transposed"]["speedup"]}


# --- Sections: memory ---


def planner(setup):
    """Yield the planned memory of a training step beyond weights and optimizer, and the measured one."""
    for half in (True, False):
        for size, (shape, flags) in setup.sizes.unets.items():
            yield (f"{size}, batch of {setup.sizes.batches[0]}, {'bfloat16' if half else 'float32'}",
                   functools.partial(_planned_unet, setup, shape, flags, half))
        for dims, config in setup.sizes.autoencoders.items():
            for recompute_norms in (False, True) if half else (False,):
                changed = dataclasses.replace(config, recompute_norms=recompute_norms)
                name = f"autoencoder {dims}D, {'bfloat16' if half else 'float32'}"
                yield (f"{name}{', recompute_norms' if recompute_norms else ''}",
                       functools.partial(_planned_autoencoder, setup, changed, half))


def _planned_unet(setup, shape, flags, half):
    train = TrainConfig(batch_size=setup.sizes.batches[0], mixed_precision=half)
    plan = DiffusionPlan(shape, ModelConfig(**flags), train, DiffusionConfig())
    network, diffusion = create_model_and_diffusion_vae(shape, ModelConfig(**flags), DiffusionConfig())
    training = _training(network.to(setup.device), torch.randn(train.batch_size, *shape), {}, train,
                         DiffusionObjective(diffusion))
    return _planner_row(setup, plan, training)


def _planned_autoencoder(setup, config, half):
    count, side = {2: setup.sizes.images, 3: setup.sizes.volumes}[config.spatial_dims]
    train = AutoencoderTrainConfig(batch_size=count, mixed_precision=half)
    plan = AutoencoderPlan((config.in_channels, *(side,) * config.spatial_dims), config, train,
                           AutoencoderLossConfig(), DiscriminatorConfig())
    training = autoencoder_training(setup, config, (count, side), adversarial=False, mixed_precision=half)
    return _planner_row(setup, plan, training)


def _planner_row(setup, plan, training):
    estimate = plan.training()
    planned = (estimate.gradients + estimate.activations + estimate.workspace) / 2**20
    training.step()     # creates the state of the optimizer
    training.loop.mp_trainer.zero_grad()
    measured = setup.peak_mib(training.step)
    return {"planned MiB": planned, "measured MiB": measured, "planned / measured": measured and planned / measured}


def slabs(setup):
    """Yield the difference of encoding and decoding by slabs from that in one piece, with time and peak memory."""
    config = setup.sizes.autoencoders[3]
    torch.manual_seed(0)
    network = create_autoencoder(config).to(setup.device).eval()
    side = setup.sizes.volumes[1]
    x = torch.rand(1, config.in_channels, *(side,) * 3, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        z = network.moments(x.to(setup.device))[0].cpu()
    streamer = Streamer(network, setup.device, side // 4)
    pairs = {"encoding": (lambda: network.moments(x.to(setup.device))[0], lambda: streamer.moments(x)[0]),
             "decoding": (lambda: network.decode(z.to(setup.device)), lambda: streamer.decode(z))}
    for (work, pair), allowed in itertools.product(pairs.items(), (False, True)):
        yield (f"{work} of {side}x{side}x{side}, TF32 {'on' if allowed else 'off'}",
               functools.partial(_slab_row, setup, *pair, allowed))


def _slab_row(setup, whole, slabs, allowed):
    with tf32(allowed), torch.no_grad():
        expected = whole().float().cpu()
        difference = (slabs().float().cpu() - expected).norm() / expected.norm()
        times = setup.time({"whole": whole, "slabs": slabs})
        return {"difference": difference.item(), "ms, whole": times["whole"]["ms"], "ms, slabs": times["slabs"]["ms"],
                "peak MiB, whole": setup.peak_mib(whole), "peak MiB, slabs": setup.peak_mib(slabs)}


# {section: (part of the time, its cases)}, the most important ones first, compilation last.
SECTIONS = {
    "matrix_rate": (1, matrix_rate), "agreement": (2, agreement), "waits": (2, waits), "resumption": (4, resumption),
    "train_step": (20, train_step), "planner": (3, planner), "sampling": (5, sampling), "codecs": (3, codecs),
    "slabs": (2, slabs), "attention": (3, attention), "norms": (3, norms), "upsampling": (2, upsampling),
    "compiled_step": (15, compiled_step),
}


# --- Goals ---


def goals(results):
    """Return rows {"goal", "measured", "reached"} of the goals of docs/scaling.md; None if not measured."""
    def values(section, key, pattern=""):
        """Return the values of the rows whose "case, relative to ..." the pattern matches from the start."""
        return [row[key] for row in results.get(section, ()) if row.get(key) is not None
                and re.match(pattern, f"{row['case']}, relative to {row.get('relative to')}")]

    steps = lambda *what: values("train_step", *what) + values("compiled_step", *what)
    own = lambda count: steps("speedup", rf"\w+, batch of {count}, bfloat16.*, relative to guided-diffusion, float32")
    ratios = values("planner", "planned / measured")
    table = [
        ("float32 without TF32 within 1e-5 of the CPU", values("agreement", "outputs, float32", ".*, TF32 off"), max,
         lambda v: v <= 1e-5),
        ("no training step waits", values("waits", "waits", "training step"), max, lambda v: v == 0),
        ("deterministic training resumes bit-exactly", values("resumption", "same bits resumed", ".*, deterministic"),
         min, bool),
        ("5 times guided-diffusion in float32 at batch size 64", own(64), max, lambda v: v >= 5),
        ("3 times guided-diffusion in float32 at batch size 256", own(256), max, lambda v: v >= 3),
        ("50% of the matrix rate with 256 channels", steps("matrix rate", r"32adm256, batch of \d+, bfloat16"), max,
         lambda v: v >= 0.5),
        ("planned memory within 15% of the measured one", [max(r, 1 / r) for r in ratios], max, lambda v: v <= 1.15),
    ]
    rows = []
    for goal, found, choose, is_reached in table:
        value = choose(found) if found else None
        rows.append({"goal": goal, "measured": value, "reached": is_reached(value) if found else None})
    return rows


# --- The command ---


sections = CommaSeparated("sections", f"comma-separated names among {', '.join(SECTIONS)}", str,
                          lambda names: set(names) <= set(SECTIONS))


@dataclasses.dataclass
class GPUConfig:
    SECTION = "benchmark"

    reference: str = option("", "checkout of openai/guided-diffusion to compare with; empty: without it")
    only: sections = option("", "sections to run; empty: all")
    minutes: float = option(10.0, "time that the sections share; the case that is running then is completed", above=0)
    tiny: bool = option(False, "tiny sizes, which only show that every section runs")


def main():
    (bench, config), device = common.configure(__doc__, GPUConfig)
    names = sections.parse(config.only, "only") or tuple(SECTIONS)
    if config.reference:
        common.open_reference(config.reference)
    # Deterministic products require it; it is read at the first one.
    os.environ["CUBLAS_WORKSPACE_CONFIG"] = os.environ.get("CUBLAS_WORKSPACE_CONFIG") or CUBLAS_WORKSPACES[0]
    setup = Setup(device, TINY if config.tiny else FULL, bench.repetitions, config.reference)
    save = functools.partial(common.write, "gpu", bench, device, settings=dataclasses.asdict(config),
                             gpu=describe_gpu(device))
    with common.silent():
        results = run_sections({name: SECTIONS[name] for name in names}, setup, config.minutes, save)
    path = save(sections=results, goals=goals(results))
    print(f"goals\n\n{common.table(goals(results))}\n\nwrote {path}", flush=True)


if __name__ == "__main__":
    main()
