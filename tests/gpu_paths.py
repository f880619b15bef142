"""Steps of training, sampling, encoding and decoding on the GPU of fake_cuda.py, and the faults that they have.

Tensors on the CPU are real. Those on CUDA are fake: they have shapes, dtypes and a device, but no data.
"""

import contextlib
import functools
import json
import sys
import tempfile
import traceback
import weakref
from collections.abc import Callable
from dataclasses import replace
from itertools import repeat
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, unset_fake_temporarily
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves, tree_map_only

import guided_diffusion_vae
from guided_diffusion_vae import checkpoint_util, logger, vae_wrapper
from guided_diffusion_vae.autoencoder import AutoencoderConfig, create_autoencoder
from guided_diffusion_vae.config import as_dict, from_dict
from guided_diffusion_vae.data import BatchPlan, Conditions, ImageFolder, ImageStream, LatentStream
from guided_diffusion_vae.data.cache_writer import LatentCacheConfig, write_cache
from guided_diffusion_vae.gaussian_diffusion import DiffusionConfig
from guided_diffusion_vae.latent_datasets import EncodedImages, LatentCache
from guided_diffusion_vae.objectives import ClassifierObjective, DiffusionObjective
from guided_diffusion_vae.resample import create_named_schedule_sampler
from guided_diffusion_vae.runs.factories import (
    PROCESSES, build_classifier, create_diffusion, create_model_and_diffusion_vae,
)
from guided_diffusion_vae.runs.spaces import Space
from guided_diffusion_vae.sampling import (
    ClassifierFreeGuidance, LowResConditioning, Sampler, classifier_cond_fn, timesteps_in_interval,
)
from guided_diffusion_vae.sampling.solvers import applicable_samplers
from guided_diffusion_vae.train_util import AutoencoderTrainConfig, DiffusionTrainConfig, TrainLoop, TrainTask
from guided_diffusion_vae.unet import ClassifierConfig, ModelConfig, SuperResConfig
from guided_diffusion_vae.vae import AutoencoderLossConfig, DiscriminatorConfig, create_discriminator
from guided_diffusion_vae.vae.objective import AutoencoderObjective, DiscriminatorTrainer
from guided_diffusion_vae.vae_wrapper import LatentNormalizer, PixelCodec, VAEInterface

PACKAGE = f"{Path(guided_diffusion_vae.__file__).parent}/"
GPU = torch.device("cuda", 0)
aten = torch.ops.aten
READS = (aten._local_scalar_dense.default, aten.is_nonzero.default, aten.equal.default)


# --- The device ---


class Watch(TorchDispatchMode):
    """Compute on the CPU with real tensors, inside a FakeTensorMode with fake ones on CUDA, and record `faults`.

    A fault is an operation on tensors of both devices, a value that the host reads, or a copy that the host waits for.
    Numbers that are read are 1.
    """

    def __init__(self):
        super().__init__()
        self.faults = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
        on_gpu = any(t.is_cuda for t in tensors)
        target = torch.device(kwargs.get("device") or ("cuda" if on_gpu else "cpu"))
        if not on_gpu and target.type != "cuda":
            with unset_fake_temporarily():
                return func(*args, **kwargs)
        if func in READS:
            self.record("the host reads a value")
            return 1.0 if tensors[0].is_floating_point() else 1
        if func is aten.nonzero.default:
            self.record("the host reads a shape")
            return torch.empty(0, args[0].dim(), dtype=torch.int64, device=GPU)
        if func is aten._to_copy.default:
            return self.copy(func, args, kwargs, tensors[0], target.type, kwargs.get("non_blocking"))
        if func is aten.copy_.default:
            non_blocking = kwargs.get("non_blocking", any(args[2:]))
            return self.copy(func, args, kwargs, args[1], args[0].device.type, non_blocking)
        # A tensor without axes on the CPU is passed to kernels as a number.
        if on_gpu and any(t.device.type == "cpu" and t.dim() for t in tensors):
            self.record(f"{func} mixes devices")
            upload = lambda t: t if t.is_cuda else aten._to_copy.default(t, device=GPU)
            args, kwargs = tree_map_only(torch.Tensor, upload, (args, kwargs))
        return func(*args, **kwargs)

    def copy(self, func, args, kwargs, source, target, non_blocking):
        if source.is_cuda and target == "cpu":
            if func is aten.copy_.default and non_blocking and args[0].is_pinned():     # the host waits when it reads
                return args[0]
            self.record("the host reads a tensor")
            if func is aten.copy_.default:
                return args[0]
            with unset_fake_temporarily():
                return torch.ones(source.shape, dtype=kwargs.get("dtype") or source.dtype)
        if not source.is_cuda and not (non_blocking and source.is_pinned()):
            self.record("the host waits for a copy to the device")
        return func(*args, **kwargs)

    def record(self, fault):
        frame = sys._getframe()
        while frame and not frame.f_code.co_filename.startswith(PACKAGE):
            frame = frame.f_back
        self.faults.append(fault if frame is None else f"{place(frame.f_code.co_filename, frame.f_lineno)}: {fault}")


def place(filename, line):
    return f"{filename.removeprefix(PACKAGE)}:{line}"


class PinnedMemory:
    """Replacement for the functions that allocate pinned memory, which requires a driver."""

    def __init__(self):
        self.storages, empty = set(), torch.empty
        torch.empty = lambda *size, pin_memory=False, **options: (
            self.pin(empty(*size, **options)) if pin_memory else empty(*size, **options))
        torch.Tensor.pin_memory = lambda tensor, device=None: tensor if tensor.is_pinned() else self.pin(tensor)
        torch.Tensor.is_pinned = lambda tensor, device=None: tensor.untyped_storage()._cdata in self.storages

    def pin(self, tensor):
        pinned = tensor.clone()
        storage = pinned.untyped_storage()
        self.storages.add(storage._cdata)
        weakref.finalize(storage, self.storages.discard, storage._cdata)
        return pinned


class NoStream:
    """Replacement for streams and events: all methods do nothing."""

    def __init__(self, *_):
        pass

    def __getattr__(self, name):
        return lambda *_: None


def replace_driver():
    """Replace what torch and the project ask of the driver, beyond tensors."""
    PinnedMemory()
    torch.cuda.amp.common.amp_definitely_not_available = lambda: False
    torch.cuda.is_bf16_supported = lambda *_: True
    torch.cuda.get_rng_state = lambda *_: torch.zeros(16, dtype=torch.uint8)
    torch.cuda.set_rng_state = torch.Tensor.record_stream = lambda *_: None
    torch.cuda.Stream = torch.cuda.Event = torch.cuda.current_stream = NoStream
    torch.cuda.stream = contextlib.nullcontext
    torch.nn.Module._apply = apply_to_fake
    vae_wrapper.open_autoencoder = on_the_cpu(vae_wrapper.open_autoencoder)


def on_the_cpu(function):
    """Return a function that is called outside of all modes: torch.load, for example, would create fake tensors."""
    def call(*args, **kwargs):
        with _disable_current_modes():
            return function(*args, **kwargs)
    return call


def apply_to_fake(module, fn, recurse=True):
    """Do what `Module._apply` does: it neither turns real parameters into fake ones nor converts fake ones."""
    for part in module.modules():
        for name, parameter in part._parameters.items():
            if isinstance(parameter, FakeTensor):
                parameter.data = fn(parameter.data)
            elif parameter is not None:
                part._parameters[name] = torch.nn.Parameter(fn(parameter.detach()), parameter.requires_grad)
        part._buffers.update({name: fn(buffer) for name, buffer in part._buffers.items() if buffer is not None})
    return module


# --- Scenarios ---


class Scenario(NamedTuple):
    """A step on the GPU. What building it takes, such as the upload of weights, is no fault.

    :param build: a function of the folder of `prepare`, which returns the step, a function without arguments.
    :param backward: whether the step has a backward pass.
    :param known: pattern of the faults that belong to the step; at least one must occur.
    """

    build: Callable
    backward: bool = False
    known: str = ""


SCENARIOS = {}
SIZE, BATCH, CLASSES = 16, 4, 2
AUTOENCODER = {"num_channels": (8, 16), "num_res_blocks": 1, "norm_num_groups": 4, "in_channels": 1}


def scenario(name, backward=False, known="", **options):
    """Enter the decorated function with its options into SCENARIOS."""
    def enter(build):
        SCENARIOS[name] = Scenario(functools.partial(build, **options), backward, known)
        return build
    return enter


def prepare(folder):
    """Write images of two classes, an autoencoder [1 x 16 x 16] -> [4 x 8 x 8], one of volumes, and a cache."""
    (folder / "images").mkdir()
    for i in range(2 * BATCH):
        pixels = np.random.default_rng(i).integers(0, 256, (SIZE, SIZE), np.uint8)
        Image.fromarray(pixels).save(folder / "images" / f"{'ab'[i % CLASSES]}_{i}.png")
    for dims in (2, 3):
        config = AutoencoderConfig(**AUTOENCODER, spatial_dims=dims)
        header = {"kind": "autoencoder", "autoencoder": as_dict(config)}
        checkpoint_util.save_weights(folder / f"vae{dims}.pt", create_autoencoder(config).state_dict(), header)
    config = LatentCacheConfig(str(folder / "cache"), latent_dtype="float32")
    write_cache(images_in(folder), VAEInterface(folder / "vae2.pt", device="cpu"), config)
    logger.configure(str(folder / "run"), [])


def images_in(folder):
    return ImageFolder(data_dir=str(folder / "images"), image_size=SIZE)


def open_codec(folder, dims=2, **options):
    return VAEInterface(folder / f"vae{dims}.pt", device=GPU, **options)


def build_unet(shape, process=None, super_res=None, condition_channels=0, **model):
    """Return (network on the GPU, process) for x0 of `shape`."""
    options = {"num_channels": 32, "channel_mult": "1", "num_res_blocks": 1, "attention_resolutions": "", **model}
    config = ModelConfig(in_channels=shape[0], dims=len(shape) - 1, **options)
    network, diffusion = create_model_and_diffusion_vae(shape, config, process or DiffusionConfig(), super_res,
                                                        condition_channels=condition_channels)
    return network.to(GPU), diffusion


def training_step(network, objective, batches, **options):
    """Return a function that takes a training step on the next batch."""
    loop = TrainLoop.from_config(network, iter(()), DiffusionTrainConfig(batch_size=BATCH, **options),
                                 TrainTask(objective), use_fp16=getattr(network, "use_fp16", False))
    return lambda: loop.run_step(*next(batches))


def latent_stream(source):
    normalizer = LatentNormalizer([0.1] * 4, [2.0] * 4, "channel")
    return LatentStream(source, normalizer, BatchPlan(source.count, BATCH), GPU, with_labels=True)


@scenario("train a UNet on a cache", backward=True, class_cond=True, num_classes=CLASSES, class_dropout=0.1,
          microbatch=BATCH // 2, use_checkpoint=True, grad_clip=1.0)
@scenario("train a UNet in bfloat16", backward=True, mixed_precision=True, dropout=0.1, recompute_norms=True)
@scenario("train a UNet in float16", backward=True, use_fp16=True, known="fp16_util.py.* reads")    # for the loss scale
@scenario("train a UNet with a loss-aware sampler", backward=True, learn_sigma=True,
          schedule_sampler="loss-second-moment", known="resample.py.* reads")   # whose losses are kept by the host
def train_unet(folder, **options):
    process = from_dict(DiffusionConfig, options)
    model = {name: value for name, value in options.items() if name in vars(ModelConfig())}
    train = {name: value for name, value in options.items() if name in vars(DiffusionTrainConfig())}
    network, diffusion = build_unet((4, 8, 8), process, **model)
    sampler = create_named_schedule_sampler(options.get("schedule_sampler", "uniform"), diffusion)
    objective = DiffusionObjective(diffusion, sampler, options.get("class_dropout", 0.0), CLASSES)
    batches = ((x0, cond if network.num_classes else {}) for x0, cond in latent_stream(LatentCache(folder / "cache")))
    return training_step(network, objective, batches, **train)


@scenario("train a UNet on volumes", backward=True)
def train_unet_on_volumes(folder):
    network, diffusion = build_unet((1, 8, 8, 8), resample_depth=True, channel_mult="1,2", attention_resolutions="4")
    return training_step(network, DiffusionObjective(diffusion), repeat((torch.zeros(BATCH, 1, 8, 8, 8), {})))


@scenario("train an upsampler", backward=True)
def train_upsampler(folder):
    network, diffusion = build_unet((1, 8, 8), super_res=SuperResConfig(cond_noise_steps=100))
    batch = torch.zeros(BATCH, 1, 8, 8), {"low_res": torch.zeros(BATCH, 1, 4, 4)}
    return training_step(network, DiffusionObjective(diffusion, cond_noise_steps=100), repeat(batch))


def build_small_classifier(shape):
    config = ClassifierConfig(
        classifier_width=64, classifier_depth=1, classifier_channel_mult="1", classifier_attention_resolutions="",
        classifier_in_channels=shape[0], classifier_dims=len(shape) - 1, classifier_num_classes=CLASSES,
    )
    classifier, diffusion = build_classifier(config, DiffusionConfig(), shape)
    return classifier.to(GPU), diffusion


@scenario("train a UNet with conditions", backward=True)
def train_unet_with_conditions(folder):
    images, space = images_in(folder), Space.of_pixels(1)
    network, diffusion = build_unet(images.shape, condition_channels=1)
    conditions = Conditions(images, np.arange(len(images)), images.shape, space.encode)
    stream = LatentStream(EncodedImages(images, space.codec), space.normalizer, BatchPlan(len(images), BATCH), GPU,
                          condition=conditions)
    return training_step(network, DiffusionObjective(diffusion, class_dropout=0.1), stream)


@scenario("train a classifier", backward=True)
def train_classifier(folder):
    classifier, diffusion = build_small_classifier((4, 8, 8))
    objective = ClassifierObjective(diffusion, create_named_schedule_sampler("uniform", diffusion))
    return training_step(classifier, objective, latent_stream(LatentCache(folder / "cache")))


@scenario("train an autoencoder", backward=True, augment=0.5, augment_flip=True,
          augment_spectrogram=1.0)
@scenario("train an autoencoder with a discriminator", backward=True, mixed_precision=True, recompute_norms=True,
          discriminator_weight=0.5, adaptive_weight=True)
@scenario("train an autoencoder in float16", backward=True, mixed_precision=True, amp_dtype="float16",
          discriminator_weight=0.5, known="fp16_util.py.* reads")
def train_autoencoder(folder, **options):
    config = AutoencoderConfig(**AUTOENCODER, recompute_norms=options.pop("recompute_norms", False))
    images = ImageStream(images_in(folder), BatchPlan(2 * BATCH, BATCH))
    return autoencoder_step(config, images, options)


@scenario("train an autoencoder of volumes", backward=True, use_checkpointing=True, space_to_channel=True,
          final_upsample="shuffle", initial_downsample_factor=2)
def train_autoencoder_of_volumes(folder, **options):
    config = AutoencoderConfig(**AUTOENCODER, spatial_dims=3, **options)
    return autoencoder_step(config, repeat((torch.zeros(2, 1, SIZE, SIZE, SIZE), {})), {"discriminator_weight": 0.5})


def autoencoder_step(config, batches, options):
    train, discriminator = from_dict(AutoencoderTrainConfig, options), from_dict(DiscriminatorConfig, options)
    network, trainer = create_autoencoder(config).to(GPU), None
    if discriminator.discriminator_weight:
        discriminator = replace(discriminator, discriminator_start=0, discriminator_channels=16, discriminator_layers=1)
        adversary = create_discriminator(discriminator, config.spatial_dims, 1).to(GPU)
        trainer = DiscriminatorTrainer(adversary, discriminator, train)
    objective = AutoencoderObjective(AutoencoderLossConfig(), network, config.image_range, train, None, trainer)
    return training_step(network, objective, batches, mixed_precision=train.mixed_precision, amp_dtype=train.amp_dtype)


def sampling_step(model, diffusion, shape, codec, **fields):
    """Return a function that samples and decodes the next batch."""
    image_shape = (1, *(n * factor for n, factor in zip(shape[1:], codec.factors)))
    normalizer = LatentNormalizer([0.1] * shape[0], [2.0] * shape[0], "channel")
    sampler = Sampler(model, diffusion, shape, codec, normalizer, image_shape, **fields)
    return lambda: sampler.decode(sampler.sample_x0(range(BATCH), list(range(CLASSES)), GPU))


SAMPLED = [(process, solver) for process in PROCESSES
           for solver in applicable_samplers(create_diffusion(DiffusionConfig(process=process)))]


def enter_samplers(build):
    for process, solver in SAMPLED:
        scenario(f"sample by {solver} ({process})", process=process, solver=solver)(build)


@enter_samplers
def sample(folder, process, solver):
    network, diffusion, codec = sampled_model(folder, process)
    return sampling_step(network, diffusion, (4, 8, 8), codec, num_classes=CLASSES, solver=solver)


@functools.cache
def sampled_model(folder, process):
    process = DiffusionConfig(process=process, timestep_respacing="3")
    return *build_unet((4, 8, 8), process, class_cond=True, num_classes=CLASSES), open_codec(folder)


@scenario("sample with classifier-free guidance")
def sample_with_classifier_free_guidance(folder):
    process = DiffusionConfig(timestep_respacing="3", learn_sigma=True)
    network, diffusion = build_unet((1, 8, 8), process, class_cond=True, num_classes=CLASSES, class_dropout=0.1)
    timesteps = timesteps_in_interval(diffusion, (0.3, 30.0))
    model = ClassifierFreeGuidance(network.convert_to_bf16() or network, CLASSES, 2.0, timesteps)
    return sampling_step(model, diffusion, (1, 8, 8), PixelCodec(1), num_classes=CLASSES)


@scenario("sample with a classifier", backward=True)
def sample_with_classifier(folder):
    network, diffusion = build_unet((1, 8, 8, 8), DiffusionConfig(timestep_respacing="3"))
    classifier, _ = build_small_classifier((1, 8, 8, 8))
    return sampling_step(network, diffusion, (1, 8, 8, 8), PixelCodec(1, 3), guided_classes=CLASSES,
                         cond_fn=classifier_cond_fn(classifier.requires_grad_(False)))


@scenario("sample an upsampler")
def sample_upsampler(folder):
    super_res = SuperResConfig(cond_noise_steps=100)
    network, diffusion = build_unet((1, 8, 8), DiffusionConfig(timestep_respacing="3"), super_res)
    unspaced, normalizer = create_diffusion(DiffusionConfig()), LatentNormalizer([0], [1], "none")
    low_res = LowResConditioning(np.zeros((BATCH, 1, 4, 4), np.uint8), None, PixelCodec(1), normalizer, unspaced, 5)
    return sampling_step(network, diffusion, (1, 8, 8), PixelCodec(1), low_res=low_res)


@scenario("likelihood")
def likelihood(folder):
    network, diffusion = build_unet((1, 8, 8), DiffusionConfig(timestep_respacing="3"))
    return lambda: diffusion.calc_bpd_loop(network, torch.zeros(BATCH, 1, 8, 8, device=GPU))


@scenario("encode and decode images")
@scenario("encode and decode images in bfloat16", dtype="bfloat16", batch_size=2)
@scenario("encode and decode volumes", dims=3)
@scenario("encode and decode slab by slab", tile=8, known="vae(_wrapper|/streaming).py.* (reads a tensor|waits)")
def encode_and_decode(folder, dims=2, **options):
    codec, images = open_codec(folder, dims, **options), torch.zeros(BATCH, 1, *[SIZE] * dims)
    return lambda: codec.decode_batch(codec.encode_batch(images, torch.zeros(BATCH, 4, *[SIZE // 2] * dims)))


@scenario("read a cache", resident=False)
@scenario("read a cache that is kept on the GPU", resident=True)
def read_cache(folder, resident):
    cache = LatentCache(folder / "cache")
    if resident:
        cache.on_device(GPU)
    stream = latent_stream(cache)
    return lambda: next(stream)


@scenario("encode images on the fly")
def encode_on_the_fly(folder):
    stream = latent_stream(EncodedImages(images_in(folder), open_codec(folder), statistics={}))
    return lambda: next(stream)


# --- Faults that must be found ---

NOTICED = {
    "item": ("the host reads a value", lambda x: x.sum().item()),
    "bool": ("the host reads a value", lambda x: bool(x.sum() > 0)),
    "tolist": ("the host reads a value", lambda x: x.tolist()),
    "float of a maximum": ("the host reads a value", lambda x: float(x.amax())),
    "equal": ("the host reads a value", lambda x: torch.equal(x, x)),
    "cpu": ("the host reads a tensor", lambda x: x.cpu().numpy()),
    "copy to the CPU": ("the host reads a tensor", lambda x: torch.zeros(3).copy_(x)),
    "nonzero": ("the host reads a shape", lambda x: x.nonzero()),
    "mask": ("DynamicOutputShapeException", lambda x: x[x > 0]),
    "pageable memory": ("the host waits for a copy", lambda x: torch.zeros(3).to(GPU, non_blocking=True)),
    "blocking copy": ("the host waits for a copy", lambda x: torch.zeros(3).pin_memory().to(GPU)),
    "tensor of numbers": ("the host waits for a copy", lambda x: torch.tensor([1.0, 2.0], device=GPU)),
    "assignment": ("the host waits for a copy", lambda x: x[1:].copy_(torch.zeros(2).pin_memory())),
    "sum of both devices": ("aten.add.Tensor mixes devices", lambda x: x + torch.zeros(3)),
    "indices of the other device": ("aten.index.Tensor mixes devices", lambda x: x[torch.tensor([0, 2])]),
}


def enter_noticed(build):
    for name, (fault, use) in NOTICED.items():
        scenario(f"notice {name}", known=fault, use=use)(build)


@enter_noticed
def notice(folder, use):
    return lambda: use(torch.zeros(3, device=GPU))


@scenario("no fault in what a device allows")
def allowed(folder):
    number, pinned = torch.tensor(2.0), torch.zeros(3).pin_memory()[1:]
    return lambda: (pinned.to(GPU, non_blocking=True) * number).sum() + torch.full((), 3, device=GPU)


# --- Run ---


def main(backward):
    """Print [name, list of faults] of each scenario as a line of JSON; with `backward` of those that need it, too."""
    replace_driver()
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    with tempfile.TemporaryDirectory() as folder:
        prepare(Path(folder))
        for name, scenario in SCENARIOS.items():
            if backward or not scenario.backward:
                print(json.dumps([name, faults_of(scenario.build, Path(folder), mode)]), flush=True)


def faults_of(build, folder, mode):
    """Return the faults of the step of a scenario; an error is one, too."""
    watch = Watch()
    try:
        with mode, watch:
            step = build(folder)
            watch.faults.clear()
            step()
    except Exception as error:
        places = [place(frame.filename, frame.lineno) for frame in traceback.extract_tb(error.__traceback__)
                  if frame.filename.startswith(PACKAGE)]
        watch.faults.append(": ".join([*places[-1:], type(error).__name__, str(error)]))
    return sorted(set(watch.faults))
