"""One training loop for diffusion models, classifiers and autoencoders; the losses come from an `Objective`.

Dropout is keyed by (seed, step, rank), all other random numbers by (seed, step, slot in the global batch): an
interruption changes no result, the number of ranks only dropout masks. On GPUs that holds for bits if PyTorch's
deterministic algorithms are on (`--deterministic True`).
"""

import contextlib
import copy
import math
import operator
import time
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any

import torch

from . import checkpoint_util, deprecated_names, dist_util, logger
from .checkpoint_util import parse_resume_step_from_filename as parse_resume_step_from_filename  # the reference's place
from .config import CommaSeparated, from_dict, option, require, resolve
from .data.config import state_options
from .ema_profiles import profile_decay, relative_stds, snapshot_name
from .fp16_util import MixedPrecisionTrainer
from .interfaces import BatchSource, Objective
from .logger import progress_bar
from .nn import fuse_norms, keyed_seed, to_device, update_ema, use_channels_last
from .objectives import DROPOUT, WEIGHTS, DiffusionObjective, StepRNGs
from .resample import SCHEDULE_SAMPLERS


def _adamw(params, **settings):
    return torch.optim.AdamW(params, fused=True, **settings)


def _adamw8bit(params, **settings):
    try:
        from bitsandbytes.optim import AdamW8bit
    except ImportError as error:
        raise ImportError("--optimizer adamw8bit requires bitsandbytes: "
                          "pip install 'guided-diffusion-vae[gpu]'") from error
    return AdamW8bit(params, **settings)


OPTIMIZERS = {"adamw": _adamw, "adamw8bit": _adamw8bit}
RESUME_FLAG = "--resume_checkpoint"
AMP_DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16}
MAX_SKIPPED_STEPS = 100     # in a row; a loss scale adapts within about 20


decays = CommaSeparated("rates", "comma-separated numbers in [0, 1), such as 0.99,0.9999", float,
                        lambda rates: all(0 <= rate < 1 for rate in rates))


format_names = CommaSeparated("formats", f"comma-separated names among {', '.join(logger.FORMATS)}", str,
                              lambda names: logger.FORMATS.keys() >= set(names))
_LOG_FORMATS = dict(
    default="", help="comma-separated formats of the log: stdout, log, csv, json, tensorboard, wandb (extra: wandb); "
                     "the last two show previews and histograms of weights, too; empty: $OPENAI_LOG_FORMAT, else "
                     "stdout,log,csv,tensorboard")


@dataclass
class TrainConfig:
    SECTION = "training"
    fsdp, fp16_scale_growth = False, 1e-3   # flags of diffusion models alone

    lr: float = option(1e-4, "learning rate of AdamW", minimum=0, essential="logdir")
    weight_decay: float = option(0.0, "decoupled weight decay of AdamW", minimum=0)
    lr_warmup_steps: int = option(0, "steps of linear learning rate warmup from 0", minimum=0)
    lr_anneal_steps: int = option(
        0, "steps of linear learning rate decay to 0, after which training ends; 0: constant", minimum=0)
    optimizer: str = option(
        "adamw", "adamw, or adamw8bit with a quarter of the state in memory (extra: gpu)", choices=tuple(OPTIMIZERS))
    max_steps: int = option(
        0, "step at which training ends; 0: at lr_anneal_steps, or never", minimum=0, essential="logdir")
    batch_size: int = option(1, "samples per step on each rank", minimum=1, essential=True)
    microbatch: int = option(
        -1, "samples per forward pass, to save memory; gradients are averaged; -1: same as batch_size", minimum=-1)
    gradient_accumulation_steps: int = option(
        1, "forward passes of batch_size each per step, the inverse way to set --microbatch", minimum=1)
    ema_rate: Annotated[str, decays] = option("0.9999", "comma-separated decays of the EMA weights; empty: none")
    ema_profiles: Annotated[str, relative_stds] = option(
        "", "comma-separated relative standard deviations of power-function EMA weights, such as 0.05,0.10, of which "
            "every checkpoint keeps a snapshot; reconstruct_ema.py then gives EMA weights of any length; empty: none")
    log_interval: int = option(10, "steps between rows of progress.csv", minimum=1)
    log_formats: Annotated[str, format_names] = option(**_LOG_FORMATS)
    save_interval: int = option(10000, "steps between checkpoints", minimum=1)
    keep_checkpoints: int = option(0, "number of latest checkpoints to keep; 0: all", minimum=0)
    preview_interval: int = option(
        0, "steps between previews and validation, made after the checkpoint is saved and at the end of a run, however "
           "short: sampling pixels may take longer than its steps; 0: at every checkpoint; -1: never", minimum=-1)
    resume_checkpoint: str = option(
        "", "model file (modelNNNNNN.pt) to resume from; empty or auto: the latest of the run folder")
    grad_clip: float = option(0.0, "maximum gradient norm; 0: no clipping", minimum=0)
    mixed_precision: bool = option(False, "run the forward pass in half-precision autocast; weights stay float32")
    amp_dtype: str = option(
        "bfloat16", "data type of --mixed_precision; float16 uses a loss scale", choices=tuple(AMP_DTYPES))
    compile: bool = option(False, "compile the network, with CUDA graphs on a GPU; the first step then takes minutes, "
                                  "which pays off after thousands of steps; excludes --recompute_norms")
    fuse_norms: bool = option(
        False, "compute each norm of a residual block with its scale, shift and activation in one compiled kernel, on "
               "GPUs only; excludes --compile")
    channels_last: bool = option(False, "keep channels last in memory, for half precision on GPUs; excludes --fsdp")
    init_from: str = option(
        "", "run or weights file to initialize a new run from, where names and shapes agree; other weights are listed")
    fast_dev_run: bool = option(False, "smoke test: train, validate, save and exit within a few steps, in the "
                                       "subfolder fast_dev_run, which is emptied first")
    fast_dev_run_batches: int = option(2, "steps of --fast_dev_run", minimum=1)
    seed: int = option(0, "seed of all random numbers in training")

    @property
    def autocast_dtype(self):
        """The dtype of autocast, None without mixed precision."""
        return AMP_DTYPES[self.amp_dtype] if self.mixed_precision else None

    @property
    def ema_rates(self):
        """The decays of the EMA weights."""
        return decays.parse(self.ema_rate, "ema_rate")

    @property
    def ema_profile_stds(self):
        """The relative standard deviations of the EMA profiles."""
        return relative_stds.parse(self.ema_profiles, "ema_profiles")


@dataclass
class DiffusionTrainConfig(TrainConfig):
    schedule_sampler: str = option(
        "uniform", "distribution of training timesteps: uniform, loss-second-moment (by their losses), or logit-normal "
                   "(intermediate ones are more probable, for rectified flows)", choices=tuple(SCHEDULE_SAMPLERS))
    fp16_scale_growth: float = option(1e-3, "growth of the log2 loss scale per step with --use_fp16")
    fsdp: bool = option(False, "shard weights, gradients, EMA weights and optimizer over the ranks (FSDP2), for models "
                               "larger than memory; checkpoints are the same files, but there are no previews")


@dataclass
class AutoencoderTrainConfig(TrainConfig):
    SECTION = "autoencoder.training"

    batch_size: int = option(16, "images per step on each rank", minimum=1, essential=True)
    ema_rate: Annotated[str, decays] = option("0.999", "comma-separated decays of the EMA weights; empty: none")
    save_interval: int = option(1000, "steps between checkpoints", minimum=1)
    augment_flip: bool = option(
        False, "flip images along every axis with probability 0.5, independently: more kinds of detail from few images")
    augment: float = option(0.0, "probability of a random affine augmentation (rotation, scale, translation) per "
                                 "training image", minimum=0, maximum=1)
    augment_rotation: float = option(5.0, "maximum angle of --augment in degrees, in both directions and every plane")
    augment_scale: float = option(0.05, "maximum relative change of scale of --augment", minimum=0, maximum=1)
    augment_translation: float = option(1.0, "maximum translation of --augment in pixels along every axis")
    augment_spectrogram: float = option(
        0.0, "strength of random changes of spectrograms (frequencies x frames on a dB scale, as gray levels or colors "
             "of a colormap): at 1, circular time shifts of up to 25%, Doppler shifts of 3% and gains of 10% of the "
             "range of levels, in both directions; 0: none", minimum=0)
    val_data_dir: str = option("", "validation images, whose PSNR, SSIM and L1 are measured at every preview; empty: "
                                   "training images", essential="logdir")
    max_val_samples: int = option(256, "maximum number of validation images", minimum=1)
    use_gradient_checkpointing: bool = option(False, "same as --use_checkpointing True")
    stop_at_psnr: float = option(0.0, "validation PSNR in dB at which training ends; 0: disabled", minimum=0)
    stop_at_l1: float = option(0.0, "validation mean absolute error at which training ends; 0: disabled", minimum=0)


@dataclass
class ClassifierTrainConfig:
    SECTION = "classifier.training"

    val_data_dir: str = option(
        "", "validation images or a cache of them, measured every --eval_interval steps", essential="iterations")
    max_val_samples: int = option(
        0, "maximum number of validation samples, evenly spaced; 0: one batch, the next one each time", minimum=0)
    noised: bool = option(
        True, "train on data noised to random timesteps, for guidance; False: on clean data", essential="iterations")
    iterations: int = option(150000, "training steps", minimum=1, essential=True)
    lr: float = option(3e-4, "learning rate of AdamW", minimum=0, essential="iterations")
    weight_decay: float = option(0.0, "decoupled weight decay of AdamW", minimum=0)
    anneal_lr: bool = option(False, "linear learning rate decay to 0 over --iterations")
    batch_size: int = option(4, "samples per step on each rank", minimum=1, essential=True)
    microbatch: int = option(-1, "samples per forward pass, to save memory; -1: same as batch_size", minimum=-1)
    schedule_sampler: str = option(
        "uniform", "distribution of training timesteps with --noised", choices=tuple(SCHEDULE_SAMPLERS))
    resume_checkpoint: str = option(
        "", "model file (modelNNNNNN.pt) to resume from; empty: the latest of the run folder, if any")
    init_from: str = option(
        "", "run or weights file to initialize a new run from, where names and shapes agree; other weights are listed")
    log_interval: int = option(10, "steps between rows of progress.csv", minimum=1)
    log_formats: Annotated[str, format_names] = option(**_LOG_FORMATS)
    eval_interval: int = option(
        5, "steps between measurements on --val_data_dir; 0: at every checkpoint; -1: never", minimum=-1)
    save_interval: int = option(10000, "steps between checkpoints", minimum=1)
    seed: int = option(0, "seed of all random numbers in training")

    def to_train_config(self) -> TrainConfig:
        """Return this training as a TrainConfig; classifiers of guided-diffusion have other names for some flags."""
        return replace(from_dict(TrainConfig, asdict(self)), ema_rate="", max_steps=self.iterations,
                       lr_anneal_steps=self.iterations if self.anneal_lr else 0, preview_interval=self.eval_interval)


def resolve_train_config(train: TrainConfig) -> TrainConfig:
    """Return the TrainConfig that the loop reads: pairs of flags are translated, `fast_dev_run` sets its few steps.

    :raises ValueError: if flags contradict each other or are out of bounds.
    """
    train, = resolve(train)
    if not train.fast_dev_run:
        return train
    require((train.resume_checkpoint in ("", "auto"), "--fast_dev_run True and --resume_checkpoint "
             f"{train.resume_checkpoint} are mutually exclusive: a smoke test starts from scratch; set only one, "
             "or to start from these weights, use --init_from"))
    steps = train.fast_dev_run_batches
    changes: dict[str, Any] = {"max_val_samples": train.batch_size} if isinstance(train, AutoencoderTrainConfig) else {}
    preview_interval = steps if train.preview_interval >= 0 else -1
    return replace(train, max_steps=steps, save_interval=steps, preview_interval=preview_interval, log_interval=1,
                   **changes)


def _concatenate_terms(parts):
    """Return (timesteps [N] or None, {name: losses [N]}) of a batch from those of its microbatches."""
    timesteps, terms = zip(*parts)
    losses = {name: torch.cat([t[name] for t in terms]) for name in terms[0]}
    return None if timesteps[0] is None else torch.cat(timesteps), losses


def seed_initialization(seed: int) -> None:
    """Make the initial weights of the model that is built next depend on `seed` alone."""
    torch.manual_seed(keyed_seed(seed, WEIGHTS))


class _IteratorSource(BatchSource):
    """A plain iterable as a `BatchSource` that cannot seek."""

    def __init__(self, batches):
        self.batches = iter(batches)

    def __next__(self):
        return next(self.batches)


@dataclass
class TrainTask:
    """The objective of a TrainLoop, if it is not that of guided-diffusion, and the description of its run.

    :param objective: an `Objective`; None: the losses of `diffusion`.
    :param header: dictionary that describes the model in its checkpoints (see `checkpoint_util.save_weights`).
    :param preview: `preview(step)`, called on rank 0 with the EMA weights in the model; may return {name: measured}.
        If it fails, training continues.
    :param monitor: name among the measured values; the step with the highest value counts as the best.
    :param early_stop: bounds {name: value}; training ends when one is reached.
    :param checkpoint: (marker, folder) as `find_checkpoint` returned it, so that files are hashed once; None: find it.
    """

    objective: Objective | None = None
    header: dict = field(default_factory=lambda: {"kind": "diffusion"})
    preview: Callable | None = None
    monitor: str = ""
    early_stop: dict = field(default_factory=dict)
    checkpoint: tuple | None = None


def _apply_deprecated(config, task, arguments):
    """Return config and task with the keyword arguments that TrainLoop had in version 0.1."""
    for old, value in arguments.items():
        name = {"best_by": "monitor", "stop_at": "early_stop"}.get(old, old)
        place = next((place for place in (config, task) if name in vars(place)), None)
        if place is None:
            raise TypeError(f"TrainLoop has no argument {old!r}")
        warnings.warn(f"TrainLoop({old}=...) is deprecated, use the field {name} of {type(place).__name__}",
                      DeprecationWarning, stacklevel=3)
        changed = replace(place, **{name: value})
        config, task = (changed, task) if place is config else (config, changed)
    return config, task


def _check_conflicts(config, use_fp16, discriminator, early_stop):
    not_sharded = {"a single rank": dist_util.world_size() == 1, "--use_fp16 True": use_fp16,
                   "--compile True": config.compile, "--optimizer adamw8bit": config.optimizer == "adamw8bit",
                   "--channels_last True": config.channels_last}
    require(
        (not (config.mixed_precision and use_fp16),
         "--mixed_precision and --use_fp16 are mutually exclusive; set only one"),
        (not (config.compile and discriminator),
         "--compile and --discriminator_weight are mutually exclusive: adversarial gradients pass through the network "
         "a second time, which a compiled one does not support; set only one"),
        (not (config.compile and config.fuse_norms),
         "--compile and --fuse_norms are mutually exclusive: the compiler fuses norms itself; set only one"),
        (not (config.preview_interval < 0 and early_stop),
         "--preview_interval -1 and --stop_at_psnr or --stop_at_l1 are mutually exclusive: the bounds are compared "
         "with what previews measure; set only one"),
        *((not (config.fsdp and present),
           f"--fsdp True conflicts with {option}: it shards a model over several ranks (mpiexec -n N, torchrun), with "
           "AdamW, and with --mixed_precision for half precision") for option, present in not_sharded.items()),
    )


class TrainLoop:
    """Train until `max_steps` (or `lr_anneal_steps`, or a signal), saving checkpoints that resume bit-exactly on CPUs.

    The arguments are guided-diffusion's, plus:

    :param data: a `BatchSource`, which starts at the step to resume at, or as in guided-diffusion any iterable over
        (batch [N x C x ...], {"y": [N]} or {}), which starts where it is.
    :param config: a TrainConfig, of which only the options that guided-diffusion does not have are read; the others are
        the arguments (`from_config` passes both).
    :param task: a TrainTask; None: train a diffusion model.
    :raises FileNotFoundError: if a checkpoint to resume from is incomplete.
    :raises ValueError: if it is of another model.
    :raises FloatingPointError: if the loss is no longer finite, or too many steps in a row are skipped.
    """

    def __init__(
        self, *, model, diffusion=None, data, batch_size, microbatch=-1, lr, ema_rate="0.9999", log_interval=10,
        save_interval=10000, resume_checkpoint="", use_fp16=False, fp16_scale_growth=1e-3, schedule_sampler=None,
        weight_decay=0.0, lr_anneal_steps=0, config=None, task=None, **deprecated,
    ):
        config, task = _apply_deprecated(config or TrainConfig(), task or TrainTask(), deprecated)
        # batch_size counts all samples of a step on this rank, those of accumulated passes too.
        config, = resolve(replace(
            config, batch_size=batch_size, microbatch=microbatch, gradient_accumulation_steps=1, lr=lr,
            ema_rate=ema_rate, log_interval=log_interval, save_interval=save_interval, weight_decay=weight_decay,
            lr_anneal_steps=lr_anneal_steps,
        ))
        self.model, self.diffusion = model, diffusion
        self.data = data if isinstance(data, BatchSource) else _IteratorSource(data)
        self.objective = task.objective or DiffusionObjective(diffusion, schedule_sampler)
        self.discriminator = self.objective.discriminator
        _check_conflicts(config, use_fp16, self.discriminator, task.early_stop)
        self.batch_size = batch_size
        self.microbatch = microbatch if microbatch > 0 else batch_size
        self.lr, self.lr_warmup_steps, self.lr_anneal_steps = lr, config.lr_warmup_steps, lr_anneal_steps
        self.max_steps = config.max_steps or math.inf
        self.ema_rate, self.ema_profiles = list(config.ema_rates), list(config.ema_profile_stds)
        self.log_interval, self.save_interval = log_interval, save_interval
        self.preview_interval = config.preview_interval or save_interval
        self.preview = task.preview if self.preview_interval > 0 else None
        self.fast_dev_run = config.fast_dev_run
        self.keep_checkpoints = config.keep_checkpoints
        self.autocast_dtype = config.autocast_dtype
        self.seed, self.monitor, self.early_stop = config.seed, task.monitor, task.early_stop
        self.header = task.header
        self.folder = Path(logger.get_dir())
        self.device = dist_util.dev() if config.fsdp else next(model.parameters()).device
        self.rank = dist_util.rank()
        self.global_batch = batch_size * dist_util.world_size()
        self.slots = range(self.rank * batch_size, (self.rank + 1) * batch_size)
        self.rngs = StepRNGs(self.seed, self.slots, self.global_batch, self.device)

        checkpoint = task.checkpoint or find_checkpoint(self.folder, resume_checkpoint)
        if checkpoint[0] is None and config.init_from:
            init_from_weights(model, config.init_from)
        self.compile, self.fsdp, self.channels_last = config.compile, config.fsdp, config.channels_last
        if self.channels_last:
            use_channels_last(model)
        if config.fuse_norms and self.device.type == "cuda":
            fuse_norms(model)
        elif config.fuse_norms:
            logger.log("--fuse_norms True is for GPUs: norms stay separate kernels")
        dist_util.sync_params(model.parameters())
        if self.fsdp:
            dist_util.shard_model(model, self.autocast_dtype)
        self.mp_trainer = MixedPrecisionTrainer(
            model=model, use_fp16=use_fp16, fp16_scale_growth=fp16_scale_growth, grad_clip=config.grad_clip,
            scale_loss=self.autocast_dtype is torch.float16,
        )
        self.opt = OPTIMIZERS[config.optimizer](self.mp_trainer.master_params, lr=lr, weight_decay=weight_decay)
        self.ema_params = [[p.detach().clone() for p in self.mp_trainer.master_params]
                           for _ in (*self.ema_rate, *self.ema_profiles)]
        self.snapshots = {}     # of EMA profiles in this folder: what `checkpoint_util.save` returned, by file name
        self.best, self.measured, self.losses = None, {}, torch.zeros(1)
        self.marker, self.reported = {}, set()      # of the step saved last; kinds of errors of previews
        self.stopped = False    # by a signal, before the last step
        with _init_from_hint(resume_checkpoint):
            self.resume_step = self.step = self._resume(*checkpoint)
        self.use_ddp = dist_util.world_size() > 1 and not self.fsdp
        # `model` itself stays unwrapped: for checkpoints, and for previews, whose batches have other shapes.
        self.ddp_model = self._compiled(model) if self.compile else model
        if self.use_ddp:
            # Steps differ if a discriminator starts later or only the last microbatch synchronizes. For compiled
            # networks see `data_parallel`.
            static = not (self.discriminator or self.compile or self.microbatch < self.batch_size)
            self.ddp_model = dist_util.data_parallel(self.ddp_model, static_graph=static)

    @classmethod
    def from_config(cls, model, data, config: TrainConfig, task: TrainTask, use_fp16: bool = False) -> "TrainLoop":
        """Return the TrainLoop of a task with the options of a TrainConfig."""
        return cls(
            model=model, data=data, batch_size=config.batch_size, microbatch=config.microbatch, lr=config.lr,
            ema_rate=config.ema_rate, log_interval=config.log_interval, save_interval=config.save_interval,
            resume_checkpoint=config.resume_checkpoint, use_fp16=use_fp16, fp16_scale_growth=config.fp16_scale_growth,
            weight_decay=config.weight_decay, lr_anneal_steps=config.lr_anneal_steps, config=config, task=task,
        )

    def _compiled(self, network):
        """Return the network compiled for the shapes that it gets, sharing its weights."""
        # CUDA graphs save kernel launches, but own the memory of their gradients, so that those of microbatches cannot
        # be accumulated.
        graphs = self.device.type == "cuda" and self.microbatch >= self.batch_size
        return torch.compile(network, dynamic=False, mode="reduce-overhead" if graphs else None)

    # --- The loop ---

    def run_loop(self) -> int:
        """Run all steps, or until a signal (`stopped` is then True); return the number of the last one."""
        if self.preview and self.marker.get("preview_due"):
            logger.log(f"step {self.step} was saved and its preview interrupted: running it now")
            self._preview()
            self._record_preview()
            self.log_step()
            logger.dumpkvs()
        if self._early_stop_reached():
            logger.log(f"step {self.step} has already reached a bound of {self.early_stop}")
            self.max_steps = self.step
        self.data.seek(self.step)
        stop, closing = dist_util.StopSignal(), contextlib.closing
        # Threads that read ahead end with the loop, after an error or Ctrl-C in a notebook, too.
        with closing(self.data), closing(self.rngs), stop, progress_bar(self.max_steps, self.step, "training") as bar:
            self.clock = (time.perf_counter(), self.step)
            while self.step < self.max_steps:
                batch, cond = next(self.data)
                self.run_step(batch, cond)
                ending = self.step >= self.max_steps
                previewing = self.preview is not None and (ending or self.step % self.preview_interval == 0)
                # A scheduler kills a job seconds after its signal: then save, without a preview that takes minutes. As
                # ranks enter a preview together, they agree on the signal before each one.
                stopping = stop.received_on_any_rank() or previewing and dist_util.any_rank(stop.received)
                previewing = previewing and not stopping
                # Before the preview, which may fail or take minutes.
                saving = stopping or ending or self.step % self.save_interval == 0
                if saving:
                    self.save(preview_due=previewing)
                    self._log_histograms(batch)
                reached = False
                if previewing:
                    reached = self._preview()   # before _write_log, so that this row contains what it measured
                    if saving:
                        self._record_preview()
                    elif reached or self._is_best():
                        self.save()
                if saving or previewing:
                    dist_util.barrier()     # rank 0 may have written for longer than the timeout of a collective
                if stopping or ending or reached or self.step % self.log_interval == 0:
                    self._write_log(bar)
                bar.update()
                if reached:
                    logger.log(f"step {self.step} has reached a bound of {self.early_stop}")
                    break
                if stopping:
                    self.stopped = True
                    logger.log(f"received a termination signal, saved step {self.step}; rerun the same command to "
                               "resume")
                    break
        return self.step

    def run_step(self, batch: torch.Tensor, cond: dict[str, torch.Tensor]) -> None:
        """Take one optimizer step on this rank's batch [N x C x ...]."""
        started = time.perf_counter()
        self._anneal_lr()
        self.forward_backward(batch, cond)
        if self.mp_trainer.optimize(self.opt):
            self._update_ema()
        if self.discriminator:
            self.discriminator.optimizer_step(self.step, self._lr_factor)
        if self.compile and self.step == self.resume_step:
            logger.log(f"the first step took {time.perf_counter() - started:.0f} s, including compilation")
        self.step += 1
        self.log_step()
        trainers = [self.mp_trainer, *([self.discriminator.mp_trainer] if self.discriminator else [])]
        skipped = max(trainer.skipped_steps for trainer in trainers)
        if skipped >= MAX_SKIPPED_STEPS:
            self._raise_diverged(f"gradients overflowed in {skipped} steps in a row, the last one")

    def forward_backward(self, batch: torch.Tensor, cond: dict[str, torch.Tensor]) -> None:
        """Accumulate the gradient of the mean loss over the batch, one microbatch on the device at a time."""
        self.mp_trainer.zero_grad()
        torch.manual_seed(keyed_seed(self.seed, DROPOUT, self.step, self.rank))
        rng = self.rngs.at(self.step)
        parts = []      # (timesteps, losses) of each microbatch
        for start in range(0, len(batch), self.microbatch):
            stop = min(start + self.microbatch, len(batch))
            # Weights by size make the sum of the microbatches' gradients that of the mean over the batch.
            fraction, last = (stop - start) / len(batch), stop == len(batch)
            if self.compile:
                torch.compiler.cudagraph_mark_step_begin()
            micro = to_device(batch[start:stop], self.device)
            micro_cond = {k: to_device(v[start:stop], self.device) for k, v in cond.items()}
            with self._gradient_sync(self.ddp_model, last), self._autocast():
                terms, t = self.objective(
                    self.ddp_model, micro, micro_cond, rng.part(start, stop), self.mp_trainer.loss_scale
                )
                self.mp_trainer.backward(terms["loss"].mean() * fraction)
            parts.append((t, {k: v.detach() for k, v in terms.items()}))
            if self.discriminator:
                del terms   # frees the graph of the autoencoder before that of the discriminator is built
                with self._gradient_sync(self.discriminator.ddp_model, last), self._autocast():
                    self.discriminator.backward_discriminator(self.step, fraction)
        batch = micro if len(parts) == 1 else batch     # on the device already, so that logging copies nothing
        t, terms = parts[0] if len(parts) == 1 else _concatenate_terms(parts)
        self.losses = terms["loss"]     # read only if the step is saved
        self.objective.after_step(t, terms)
        self.objective.log(batch, t, terms)

    def _gradient_sync(self, network, last):
        """Return a context that synchronizes gradients only on the last microbatch."""
        if self.fsdp:
            self.model.set_requires_gradient_sync(last)
        return network.no_sync() if self.use_ddp and not last else contextlib.nullcontext()

    def _autocast(self):
        return torch.autocast(self.device.type, self.autocast_dtype, enabled=self.autocast_dtype is not None)

    def _ema_names(self, step):
        """Return the file names of the EMA weights of a step, in the order of `ema_params`."""
        return [*(checkpoint_util.ema_name(rate, step) for rate in self.ema_rate),
                *(snapshot_name(std, step) for std in self.ema_profiles)]

    def _update_ema(self):
        rates = [*self.ema_rate, *(profile_decay(std, self.step + 1) for std in self.ema_profiles)]
        for rate, params in zip(rates, self.ema_params):
            update_ema(params, self.mp_trainer.master_params, rate=rate)

    @property
    def _lr_factor(self):
        warmup = min((self.step + 1) / self.lr_warmup_steps, 1.0) if self.lr_warmup_steps else 1.0
        return warmup * (1 - self.step / self.lr_anneal_steps if self.lr_anneal_steps else 1.0)

    def _anneal_lr(self):
        for group in self.opt.param_groups:
            group["lr"] = self.lr * self._lr_factor

    # --- The log ---

    def log_step(self):
        logger.logkv("step", self.step)
        logger.logkv("samples", self.step * self.global_batch)

    def _write_log(self, bar):
        self._require_folder()
        now, (then, step) = time.perf_counter(), self.clock
        self.clock = (now, self.step)
        logger.logkv("steps_per_second", (self.step - step) / max(now - then, 1e-9))
        logger.logkv("lr", self.opt.param_groups[0]["lr"])
        if self.device.type == "cuda":
            logger.logkv("peak_memory_mib", torch.cuda.max_memory_allocated() / 2**20)
        row = logger.dumpkvs()
        loss = row.get("loss", row.get("train_loss", math.nan))
        bar.set_postfix_str(f"loss {loss:.4f}")
        if not math.isfinite(loss):
            self._raise_diverged(f"the loss is {loss}")

    def _log_histograms(self, batch):
        """Log the distribution of the batch and of the weights of each part of the model."""
        logger.loghistogram("batch", [batch], self.step)
        for name, part in () if self.fsdp else self.model.named_children():     # shards are on several ranks
            logger.loghistogram(f"weights/{name}", part.parameters(), self.step)

    def _raise_diverged(self, problem):
        last = max(checkpoint_util.committed_steps(self.folder), default="none")
        raise FloatingPointError(f"{problem} at step {self.step}; the last good checkpoint is {last}: lower --lr, set "
                                 "--grad_clip 1, or disable --use_fp16 / --mixed_precision")

    def _preview(self):
        """Run the preview on rank 0; return on every rank whether a bound of `early_stop` is reached."""
        measured = self._measure() if self.rank == 0 else None
        self.measured = measured = dist_util.broadcast_object(measured) or {}
        value = measured.get(self.monitor, math.nan)
        if not math.isnan(value) and (self.best is None or value > self.best[self.monitor]):
            self.best = {"step": self.step, self.monitor: value}
        return self._early_stop_reached()

    def _measure(self):
        """Return what the preview measures, None if it fails: a preview does not end a run, other than a smoke test."""
        try:
            with self.ema_weights():
                return self.preview(self.step)
        except Exception as error:
            if self.fast_dev_run:
                raise
            kind, advice = type(error).__name__, ""
            if dist_util.is_out_of_memory(error):
                kind, advice = "out of memory", "lower --microbatch or --batch_size, or "
            if kind not in self.reported:
                self.reported.add(kind)
                logger.warn(f"the preview or validation of step {self.step} failed ({kind}: {error}); training "
                            f"continues, and later failures of this kind are not reported: {advice}set "
                            "--preview_interval -1 (classifiers: --eval_interval -1) to turn previews off")
        if self.device.type == "cuda":
            torch.cuda.empty_cache()    # here, as `error` has kept the tensors of the preview alive
        return None

    def _early_stop_reached(self):
        met = {"val_psnr": operator.ge, "val_l1": operator.le}
        return any(name in self.measured and met[name](self.measured[name], bound)
                   for name, bound in self.early_stop.items())

    def _is_best(self):
        return self.best is not None and self.best["step"] == self.step

    @contextlib.contextmanager
    def ema_weights(self):
        """Put EMA weights, if there are any, into the model in evaluation mode inside the `with` block."""
        training_weights = copy.deepcopy(self.model.state_dict())
        try:
            if self.ema_rate:
                # The lowest decay follows training most closely. If steps are ranked, the highest one is measured, as
                # it represents the run (see `checkpoint_util.latest_weights`).
                rate = max(self.ema_rate) if self.monitor else min(self.ema_rate)
                ema = self.ema_params[self.ema_rate.index(rate)]
                self.model.load_state_dict(self.mp_trainer.master_params_to_state_dict(ema))
            self.model.eval()
            yield self.model
        finally:
            self.model.load_state_dict(training_weights)
            self.model.train()

    # --- Checkpoints ---

    def save(self, preview_due: bool = False) -> None:
        """Write model, EMA weights, optimizer and, last, the marker of this step (on rank 0).

        :param preview_due: the preview of this step follows, and after an interruption is run on resuming.
        :raises FloatingPointError: if a weight or the loss of the step is not finite on any rank. Such a step is never
            saved: with a `log_interval` above `save_interval`, the log has not seen the loss yet, and in half precision
            weights stay finite, as the step was skipped.
        """
        self._require_folder()
        discriminator = self.discriminator.network.parameters() if self.discriminator else ()
        weights = [p.detach() for p in (*self.mp_trainer.master_params, *discriminator)]
        norm = dist_util.full_tensor(torch.nn.utils.get_total_norm(weights))
        if not math.isfinite(norm):
            self._raise_diverged(f"the norm of the weights is {float(norm)}")
        loss = sum(dist_util.gather_objects(float(self.losses.float().mean()))) / dist_util.world_size()
        if not math.isfinite(loss):
            self._raise_diverged(f"the loss is {loss}")
        # All ranks take part in gathering sharded tensors, one at a time; rank 0 keeps and writes them.
        sets = [self._gathered(params) for params in (self.mp_trainer.master_params, *self.ema_params)]
        optimizer = self.opt.state_dict()
        optimizer["state"] = {i: dict(zip(entries, self._gathered(entries.values())))
                              for i, entries in optimizer["state"].items()}
        if self.rank == 0:
            logger.log(f"saving step {self.step} ...")
            with checkpoint_util.complete_or_removed(self.folder, self.step):
                self._write_step(sets, optimizer, preview_due)
            self._prune()

    def _write_step(self, sets, optimizer, preview_due):
        """Write the gathered weights of model and EMA, the state of the optimizer, and the marker."""
        names = [checkpoint_util.model_name(self.step), *self._ema_names(self.step)]
        header = {**self.header, "step": self.step}
        files = {}
        for name, params in zip(names, sets):
            state_dict = self.mp_trainer.master_params_to_state_dict(params)
            files[name] = checkpoint_util.save_weights(self.folder / name, state_dict, header)
        name = checkpoint_util.optimizer_name(self.step)
        files[name] = checkpoint_util.save(self.folder / name, optimizer)
        state = {"objective": self.objective.state_dict(), "lg_loss_scale": float(self.mp_trainer.lg_loss_scale),
                 "global_batch": self.global_batch, "seed": self.seed, "best": self.best, "measured": self.measured}
        if self.discriminator:
            its_files, entries = self.discriminator.save(self.folder, self.step, header)
            files, state = {**files, **its_files}, {**state, **entries}
        if self.ema_profiles:
            self.snapshots.update({name: files[name] for name in names[1 + len(self.ema_rate):]})
            state["profiles"] = self.snapshots
        if preview_due:
            state["preview_due"] = True
        # The marker makes the step exist: an interruption before this line leaves the previous checkpoint valid.
        self.marker = checkpoint_util.commit(self.folder, self.step, files, state)

    def _record_preview(self):
        """Write the result of the preview into the marker of the step, which was saved before it (on rank 0)."""
        self._require_folder()
        if self.rank == 0:
            marker = {**self.marker, "best": self.best, "measured": self.measured}
            marker.pop("preview_due")
            self.marker = checkpoint_util.rewrite_marker(self.folder, marker)
            self._prune()

    def _require_folder(self):
        """Check on rank 0 that the run folder exists: writing would create another one, with a part of the files."""
        require((self.rank or self.folder.is_dir(), f"{self.folder} was removed during the run; restore it and resume, "
                 "or start again with another --logdir"), error=FileNotFoundError)

    def _prune(self):
        if self.keep_checkpoints:
            # The step that was saved or loaded last is kept even if later ones, which are corrupt, count as the latest.
            kept = {record["step"] for record in (self.best, self.marker) if record}
            checkpoint_util.prune_checkpoints(self.folder, self.keep_checkpoints, kept)

    def _gathered(self, tensors):
        """Return contiguous tensors, or if they are sharded, full ones in main memory on rank 0 and None elsewhere."""
        if not self.fsdp:
            return [t.contiguous() if isinstance(t, torch.Tensor) else t for t in tensors]
        full = (dist_util.full_tensor(t) for t in tensors)
        return [t.cpu() if self.rank == 0 else None for t in full]

    def _resume(self, marker, folder):
        """Load the step to resume from, if there is one; return its number."""
        if marker is None:
            return 0
        step = marker["step"]
        for name, value in (("seed", self.seed), ("global_batch", self.global_batch)):
            if marker.get(name, value) != value:
                logger.warn(f"{name} is {value} now and was {marker[name]} until step {step}: from here on the run "
                            "differs from an uninterrupted one")
        device = "cpu" if self.fsdp else self.device    # no device may have room for a full model that is sharded
        self._load_model(folder, step, device)
        for i, name in enumerate(self._ema_names(step)):
            path, listed = folder / name, "--ema_rate must list rates" if i < len(self.ema_rate) else (
                "--ema_profiles must list standard deviations")
            require((path.is_file(), f"{path} does not exist; {listed} that the checkpoint has"),
                    error=FileNotFoundError)
            weights, _ = checkpoint_util.load_weights(path, device, RESUME_FLAG)
            weights = checkpoint_util.select_weights(self.model, weights, path, RESUME_FLAG)
            missing = sorted(self.model.state_dict().keys() - weights.keys())
            require((not missing, f"{path} has no weights {', '.join(missing[:3])} ({len(missing)} in total) of the "
                     "model: it is another model's; use the file of the same run"))
            values = self.mp_trainer.state_dict_to_master_params(weights)
            self.ema_params[i] = [dist_util.distribute_like(v.detach(), p) for v, p in zip(values, self.ema_params[i])]
        path = folder / checkpoint_util.optimizer_name(step)
        try:
            self.mp_trainer.load_optimizer(self.opt, checkpoint_util.load(path, device, RESUME_FLAG))
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{path}: {error}; check {RESUME_FLAG}") from error
        if self.channels_last:      # files are contiguous, optimizers require the layout of the weights
            for p, entries in self.opt.state.items():
                entries.update({name: torch.empty_like(p).copy_(value) for name, value in entries.items()
                                if value.shape == p.shape})
        self.mp_trainer.lg_loss_scale = marker.get("lg_loss_scale", self.mp_trainer.lg_loss_scale)
        self.objective.load_state_dict(marker.get("objective", {}))
        self.best, self.measured = marker.get("best"), marker.get("measured", {})
        if folder.resolve() == self.folder.resolve():   # else the run branches off there
            self.marker, self.snapshots = marker, dict(marker.get("profiles", {}))
            if self.rank == 0:
                checkpoint_util.remove_uncommitted(folder, step, logger.log)
                self._prune()
        if self.discriminator:
            self.discriminator.load(folder, marker, self.device)
        logger.log(f"resuming from step {step} in {folder}")
        return step

    def _load_model(self, folder, step, device):
        path = folder / checkpoint_util.model_name(step)
        weights, header = checkpoint_util.load_weights(path, device, RESUME_FLAG)
        if header is not None:      # files of guided-diffusion have none
            stored = header.get("step", step)
            require((stored == step, f"{path} contains step {stored}: the file was renamed; {RESUME_FLAG} expects "
                     f"{checkpoint_util.model_name(stored)} next to its optimizer and EMA files"))
            checkpoint_util.require_same_model(state_options(header), state_options(self.header), folder)
        if self.fsdp:
            own = self.model.state_dict()
            weights.update({name: dist_util.distribute_like(value, own[name]) for name, value in weights.items()
                            if name in own and value.shape == own[name].shape})
        weights = checkpoint_util.load_strict(self.model, weights, path, RESUME_FLAG)
        # With use_fp16 the model holds rounded weights, the masters continue with those of the file.
        with torch.no_grad():
            values = self.mp_trainer.state_dict_to_master_params(weights)
            for param, value in zip(self.mp_trainer.master_params, values):
                param.copy_(value)


def init_from_weights(model: torch.nn.Module, path: str | Path) -> None:
    """Load the weights of another run whose names and shapes agree with the model's, and log all others.

    :raises ValueError: if none agree.
    """
    path = checkpoint_util.latest_weights(path, "--init_from")
    source, _ = checkpoint_util.load_weights(path, "cpu", "--init_from")
    source = checkpoint_util.select_weights(model, source, path, "--init_from")
    own: Any = model.state_dict()
    common = {name: value for name, value in source.items() if name in own and own[name].shape == value.shape}
    own.update(common)
    # Modules migrate weights by the version stored with them; newly initialized ones have the module's own version.
    own._metadata = {**own._metadata, **source._metadata} if hasattr(source, "_metadata") else {}
    model.load_state_dict(own)
    logger.log(f"{len(common)} of {len(own)} weights are initialized from {path}")
    for problem, weights in (("newly initialized", own), ("not used", source)):
        for name in sorted(weights.keys() - common.keys()):
            logger.log(f"  {problem}: {name} {tuple(weights[name].shape)}")


def find_checkpoint(folder: str | Path, resume_checkpoint: str = "") -> tuple[dict | None, Path]:
    """Return (marker, folder) of the step to resume from, or (None, folder) if training starts; see `find_step`."""
    # Rank 0 alone reads and hashes the files, so that all ranks resume from the same step.
    checkpoint = None
    if dist_util.rank() == 0:
        with _init_from_hint(resume_checkpoint):
            checkpoint = checkpoint_util.find_step(folder, resume_checkpoint, logger.warn)
    return dist_util.broadcast_object(checkpoint)


@contextlib.contextmanager
def _init_from_hint(resume_checkpoint):
    """Add the alternative to errors about a checkpoint to resume from, if it was set."""
    try:
        yield
    except (FileNotFoundError, ValueError) as error:
        if resume_checkpoint in ("", "auto"):
            raise
        kind = FileNotFoundError if isinstance(error, FileNotFoundError) else ValueError
        raise kind(f"{error}; to start from these weights, use --init_from") from error


def get_blob_logdir() -> str:
    """Return the folder that checkpoints go to."""
    return logger.get_dir()


__getattr__ = deprecated_names("train_util")
