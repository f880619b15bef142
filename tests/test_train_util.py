import contextlib
import csv
import inspect
import math
import os
import re
import shutil
import signal
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch

import rank_worker
from guided_diffusion_vae import checkpoint_util, dist_util, logger, nn, objectives
from guided_diffusion_vae.autoencoder import AutoencoderConfig, create_autoencoder
from guided_diffusion_vae.data.augmentation import (
    SPECTROGRAM_CHANGES, augment_spectrograms, random_affine, random_flips,
)
from guided_diffusion_vae.data.colormaps import open_colormap
from guided_diffusion_vae.gaussian_diffusion import DiffusionConfig
from guided_diffusion_vae.interfaces import BatchSource
from guided_diffusion_vae.objectives import (
    ClassifierObjective, DiffusionObjective, PlainObjective, StepRNG, StepRNGs,
)
from guided_diffusion_vae.resample import LossAwareSampler, LossSecondMomentResampler, UniformSampler
from guided_diffusion_vae.runs.factories import create_gaussian_diffusion, create_model_and_diffusion_vae
from guided_diffusion_vae.runs.run import Run, RunConfig
from guided_diffusion_vae.train_util import (
    MAX_SKIPPED_STEPS, AutoencoderTrainConfig, ClassifierTrainConfig, DiffusionTrainConfig, TrainConfig, TrainLoop,
    TrainTask, find_checkpoint, init_from_weights, parse_resume_step_from_filename, resolve_train_config,
    seed_initialization,
)
from guided_diffusion_vae.unet import ModelConfig, UNetModel
from guided_diffusion_vae.vae import (
    AutoencoderLossConfig, DiscriminatorConfig, PatchDiscriminator, create_discriminator,
)
from guided_diffusion_vae.vae.objective import AutoencoderObjective, DiscriminatorTrainer
from forks import FORKS
from launches import Launches
from rank_worker import END, GLOBAL_BATCH, KINDS, MICRO_STEPS, STOP, WITHOUT_DROPOUT, create_loop, schedule_of, train

ROOT = Path(__file__).parents[1]
HEADER = {"kind": "line", "model": {"width": 3}}


@pytest.fixture(autouse=True)
def closed_log(monkeypatch):
    for name in ("OPENAI_LOGDIR", "OPENAI_LOG_FORMAT"):
        monkeypatch.delenv(name, raising=False)
    yield
    logger.reset()


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    folder = tmp_path_factory.mktemp("training")
    rank_worker.prepare(folder)
    return folder


@pytest.fixture(scope="module")
def two_ranks(prepared):
    """Run rank_worker.py twice: the second start resumes after a signal ended the first."""
    stopped = None
    for part in ("first", "again"):
        done = FORKS.run([ROOT / "tests/rank_worker.py", prepared, part], ranks=2, timeout=500)
        assert done.returncode == 0, done.stderr
        stopped = stopped or {kind: checkpoint_util.committed_steps(prepared / f"2/{kind}-resumed") for kind in KINDS}
    return stopped


@pytest.fixture(scope="module")
def one_rank(prepared):
    """Train every kind without an interruption and, in another folder, with one, each time with new objects."""
    for kind in KINDS:
        schedule = schedule_of(kind)
        train(prepared, f"1/{kind}-full", kind, END, schedule=schedule)
        train(prepared, f"1/{kind}-resumed", kind, END, schedule=schedule, interrupt=STOP)
        train(prepared, f"1/{kind}-resumed", kind, END, schedule=schedule, start=1)


def files_of(folder, step, rate=0.9):
    of = checkpoint_util
    names = [of.model_name(step), of.ema_name(rate, step), of.optimizer_name(step)]
    discriminator = [of.discriminator_name(step), of.discriminator_optimizer_name(step)]
    return [of.load(folder / name) for name in names + [n for n in discriminator if (folder / n).exists()]]


def flat(content, at=""):
    """Return {path: tensor or number} of nested dictionaries and lists."""
    if isinstance(content, (dict, list, tuple)):
        items = content.items() if isinstance(content, dict) else enumerate(content)
        return {path: value for key, part in items for path, value in flat(part, f"{at}/{key}").items()}
    return {at: content}


def same_bits(one, other):
    one, other = flat(one), flat(other)
    return one.keys() == other.keys() and all(
        torch.equal(a, other[path]) if isinstance(a, torch.Tensor) else a == other[path] for path, a in one.items()
    )


def farthest(one, other):
    one, other = flat(one), flat(other)
    assert one.keys() == other.keys()
    return max((one[path].double() - other[path].double()).abs().max().item() for path in one)


# --- Arguments ---


REFERENCE_ARGUMENTS = (
    "model diffusion data batch_size microbatch lr ema_rate log_interval save_interval resume_checkpoint use_fp16 "
    "fp16_scale_growth schedule_sampler weight_decay lr_anneal_steps"
).split()


def test_loop_takes_the_reference_arguments_a_config_and_a_task():
    *parameters, deprecated = inspect.signature(TrainLoop).parameters.values()
    assert [parameter.name for parameter in parameters] == [*REFERENCE_ARGUMENTS, "config", "task"]
    assert all(parameter.kind is parameter.KEYWORD_ONLY for parameter in parameters)
    assert deprecated.kind is deprecated.VAR_KEYWORD
    defaults = {"use_fp16": False, "fp16_scale_growth": 1e-3, "schedule_sampler": None, "weight_decay": 0.0,
                "lr_anneal_steps": 0}
    assert {p.name: p.default for p in parameters if p.name in defaults} == defaults


def test_loop_called_as_in_the_reference_trains_and_saves(tmp_path):
    diffusion = rank_worker.process()
    batches = iter(lambda: (torch.ones(2, 4, 8, 8), {"y": torch.tensor([0, 1])}), None)
    logger.configure(str(tmp_path), [])
    sampler = UniformSampler(diffusion)
    loop = TrainLoop(
        model=rank_worker.unet(), diffusion=diffusion, data=batches, batch_size=2, microbatch=-1, lr=1e-4,
        ema_rate="0.9", log_interval=10, save_interval=1, resume_checkpoint="", use_fp16=False, fp16_scale_growth=1e-3,
        schedule_sampler=sampler, weight_decay=0.0, lr_anneal_steps=2,
    )
    loop.run_loop()
    assert loop.objective.schedule_sampler is sampler
    assert checkpoint_util.committed_steps(tmp_path) == [1, 2]
    assert checkpoint_util.load_weights(tmp_path / "model000002.pt")[1]["kind"] == "diffusion"


def test_from_config_passes_every_option_to_the_loop(tmp_path):
    config = DiffusionTrainConfig(
        lr=0.5, weight_decay=0.25, lr_warmup_steps=3, lr_anneal_steps=30, max_steps=20, batch_size=4, microbatch=2,
        ema_rate="0.5,0.75", log_interval=5, save_interval=6, keep_checkpoints=7, preview_interval=8, grad_clip=0.125,
        mixed_precision=True, amp_dtype="float16", seed=9, fp16_scale_growth=0.01,
    )
    task = TrainTask(PlainObjective(squared_error), HEADER, measuring([1.0]), "val_psnr", {"val_psnr": 9.0})
    logger.configure(str(tmp_path), [])
    loop = TrainLoop.from_config(torch.nn.Linear(3, 1), Points(), config, task)
    same = ("lr", "lr_warmup_steps", "lr_anneal_steps", "max_steps", "batch_size", "microbatch", "log_interval",
            "save_interval", "keep_checkpoints", "preview_interval", "seed")
    assert {name: getattr(loop, name) for name in same} == {name: getattr(config, name) for name in same}
    assert loop.opt.param_groups[0]["weight_decay"] == 0.25 and loop.ema_rate == [0.5, 0.75]
    assert loop.autocast_dtype is torch.float16
    assert (loop.mp_trainer.grad_clip, loop.mp_trainer.fp16_scale_growth) == (0.125, 0.01)
    assert (loop.objective, loop.header, loop.preview, loop.monitor, loop.early_stop) == (
        task.objective, HEADER, task.preview, "val_psnr", {"val_psnr": 9.0})


@pytest.mark.parametrize("anneal_lr, steps", [(True, 70), (False, 0)])
def test_classifier_config_converts_to_the_options_of_the_loop(anneal_lr, steps):
    config = ClassifierTrainConfig(iterations=70, anneal_lr=anneal_lr, eval_interval=6, lr=0.5, batch_size=3, seed=8)
    converted = config.to_train_config()
    assert (converted.max_steps, converted.lr_anneal_steps, converted.preview_interval) == (70, steps, 6)
    assert (converted.lr, converted.batch_size, converted.seed, converted.ema_rate) == (0.5, 3, 8, "")


def test_resuming_hashes_every_file_once(tmp_path, monkeypatch):
    line(tmp_path, 4)
    hashed = []
    sha256 = checkpoint_util.sha256_of_file
    monkeypatch.setattr(checkpoint_util, "sha256_of_file", lambda path: hashed.append(Path(path).name) or sha256(path))
    checkpoint = find_checkpoint(tmp_path)
    assert line(tmp_path, 4, checkpoint=checkpoint).resume_step == 4
    assert sorted(hashed) == ["ema_0.9_000004.pt", "model000004.pt", "opt000004.pt"]


# --- Ranks and interruptions ---


@pytest.mark.parametrize("kind", WITHOUT_DROPOUT)
def test_one_rank_with_twice_the_batch_matches_two_ranks(one_rank, two_ranks, prepared, kind):
    one, two = (files_of(prepared / f"{ranks}/{kind}-full", END) for ranks in (1, 2))
    assert farthest(one[0], two[0]) < 1e-6 and farthest(one[1], two[1]) < 1e-6
    assert len(one) == len(two) == (5 if kind == "adversarial" else 3)
    if kind == "adversarial":
        assert farthest(one[3], two[3]) < 1e-6
    torch.manual_seed(0)
    start, _ = rank_worker.network_and_loop_arguments(kind, prepared, 1)
    assert farthest(one[0], start.state_dict()) > 1e-3  # a thousand times the tolerance between the ranks


def test_fsdp_takes_the_same_steps_and_writes_the_same_files(one_rank, two_ranks, prepared):
    full, sharded = (files_of(prepared / name, END) for name in ("1/cached-full", "2/sharded-full"))
    assert farthest(full[0], sharded[0]) < 1e-6 and farthest(full[1], sharded[1]) < 1e-6
    assert flat(full[2]).keys() == flat(sharded[2]).keys() and farthest_moments(full[2], sharded[2]) < 1e-5
    micro = [files_of(prepared / f"2/{kind}-micro", MICRO_STEPS)[0] for kind in ("cached", "sharded")]
    assert farthest(*micro) < 1e-6
    assert same_bits(*(files_of(prepared / f"2/sharded-{run}", END) for run in ("full", "resumed")))
    logger.configure(str(prepared / "2/sharded-resumed"), [])
    unsharded = rank_worker.train(prepared, "2/sharded-resumed", "cached", END + 1, batch_size=GLOBAL_BATCH)
    assert unsharded.resume_step == END  # one rank resumes the checkpoint of two


def farthest_moments(one, other):
    pairs = [(one["state"][i], other["state"][i]) for i in one["state"]]
    return max((a[key] - b[key]).abs().max().item() for a, b in pairs for key in a)


def test_compile_with_a_discriminator_is_rejected(prepared, tmp_path):
    with pytest.raises(ValueError, match="--compile and --discriminator_weight are mutually exclusive"):
        train(prepared, tmp_path, "adversarial", 1, compile=True)


@pytest.mark.parametrize("versioned", [True, False])
def test_init_from_keeps_the_attention_projection_that_was_applied(tmp_path, versioned):
    torch.manual_seed(0)
    first, then = (create_autoencoder(AutoencoderConfig(in_channels=1, num_channels=(16, 16), attention_levels=levels))
                   for levels in ((False, True), (True, True)))
    weights = first.state_dict() if versioned else dict(first.state_dict())
    if versioned:
        checkpoint_util.save_weights(tmp_path / "model.pt", weights, {"kind": "autoencoder"})
    else:  # as GenerativeModels writes it, whose projection is never applied
        torch.save(weights, tmp_path / "model.pt")
    logger.configure(str(tmp_path), [])
    init_from_weights(then, tmp_path / "model.pt")
    name = next(n for n in first.state_dict() if n.endswith("proj_attn.weight") and n in then.state_dict())
    expected = first.state_dict()[name] if versioned else torch.eye(16)
    assert torch.equal(then.state_dict()[name], expected)


def test_fsdp_with_a_single_rank_is_rejected(tmp_path):
    with pytest.raises(ValueError, match="--fsdp True conflicts with a single rank: .* several ranks .mpiexec"):
        line(tmp_path, 1, fsdp=True)


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("kind", KINDS)
def test_interrupted_run_resumes_bit_exactly(request, prepared, kind, ranks):
    request.getfixturevalue("one_rank" if ranks == 1 else "two_ranks")
    full, resumed = (files_of(prepared / f"{ranks}/{kind}-{run}", END) for run in ("full", "resumed"))
    assert same_bits(full, resumed)


def test_signal_to_one_of_two_ranks_saves_the_next_step(two_ranks):
    assert two_ranks == {kind: [STOP + 1] for kind in KINDS}


def test_loss_aware_sampler_was_active_before_the_interruption(one_rank, two_ranks, prepared):
    for ranks in (1, 2):
        marker = checkpoint_util.read_marker(prepared / f"{ranks}/cached-resumed", STOP + ranks - 1)
        assert min(marker["objective"]["counts"]) == 2
    histories = [checkpoint_util.read_marker(prepared / f"{ranks}/cached-full", END)["objective"] for ranks in (1, 2)]
    assert histories[0]["counts"] == histories[1]["counts"]
    np.testing.assert_allclose(histories[0]["losses"], histories[1]["losses"], rtol=1e-4)


@pytest.mark.parametrize("kind", ["cached", "adversarial", "classifier"])
def test_gradient_does_not_depend_on_the_microbatch(prepared, tmp_path, monkeypatch, kind):
    """Gradients, as Adam turns one that is rounding error into a full step."""
    monkeypatch.setattr(TrainLoop, "run_loop", lambda self: None)
    gradients = {}
    for size in (-1, 1, 3):
        loop = train(prepared, tmp_path / str(size), kind, 1, microbatch=size)
        networks = [loop.model, *([loop.discriminator.network] if loop.discriminator else [])]
        generator = torch.Generator().manual_seed(0)    # no weight is zero, as many are before the first step
        for p in (parameters := [p for network in networks for p in network.parameters()]):
            p.data += 0.05 * torch.randn(p.shape, generator=generator)
        loop.step = 5       # the discriminator is active
        loop.data.seek(loop.step)
        loop.forward_backward(*next(loop.data))
        loop.data.close()
        gradients[size] = torch.cat([p.grad.flatten() for p in parameters])
    assert gradients[-1].norm() > 1e-2
    for size in (1, 3):
        assert (gradients[size] - gradients[-1]).norm() < 1e-5 * gradients[-1].norm()


def mean_gradients(content):
    """Return the running mean of the gradients of an optimizer file."""
    return torch.cat([entries["exp_avg"].flatten() for entries in content["state"].values()])


def test_gradient_does_not_depend_on_the_microbatch_of_two_ranks(two_ranks, prepared, tmp_path):
    train(prepared, tmp_path, "cached", MICRO_STEPS)
    one, two = (mean_gradients(files_of(folder, MICRO_STEPS)[2]) for folder in (tmp_path, prepared / "2/cached-micro"))
    assert (one - two).norm() < 1e-4 * one.norm()


def test_half_precision_resumes_bit_exactly_with_its_loss_scale(prepared, tmp_path):
    # Convolutions in float16 are slow on CPUs: few steps of small batches.
    options = {"use_fp16": True, "fp16_scale_growth": 0.25, "batch_size": 1}
    train(prepared, tmp_path / "full", "classifier", 3, **options)
    train(prepared, tmp_path / "resumed", "classifier", 2, **options)
    train(prepared, tmp_path / "resumed", "classifier", 3, start=1, **options)
    assert same_bits(files_of(tmp_path / "full", 3), files_of(tmp_path / "resumed", 3))
    scales = [checkpoint_util.read_marker(tmp_path / run, 3)["lg_loss_scale"] for run in ("full", "resumed")]
    assert scales[0] == scales[1] != checkpoint_util.read_marker(tmp_path / "resumed", 2)["lg_loss_scale"]


@pytest.mark.parametrize("kind, stop, end", [("adversarial", 4, 6), ("classifier", 2, 3)])
def test_float16_autocast_resumes_bit_exactly_with_its_loss_scales(prepared, tmp_path, kind, stop, end):
    options = {"mixed_precision": True, "amp_dtype": "float16", "fp16_scale_growth": 0.25, "batch_size": 1}
    train(prepared, tmp_path / "full", kind, end, **options)
    train(prepared, tmp_path / "resumed", kind, stop, **options)
    train(prepared, tmp_path / "resumed", kind, end, start=1, **options)
    assert same_bits(files_of(tmp_path / "full", end), files_of(tmp_path / "resumed", end))
    full, resumed, before = (checkpoint_util.read_marker(tmp_path / run, step)
                            for run, step in (("full", end), ("resumed", end), ("resumed", stop)))
    for scale in ("lg_loss_scale", *(["discriminator_lg_loss_scale"] if kind == "adversarial" else [])):
        assert full[scale] == resumed[scale] != before[scale]


def test_discriminator_is_trained_only_from_its_start_on(prepared, tmp_path):
    weights = {}
    for steps in (1, 3, 4):
        train(prepared, tmp_path / str(steps), "adversarial", steps)
        weights[steps] = files_of(tmp_path / str(steps), steps)[3]
    assert same_bits(weights[1], weights[3]) and not same_bits(weights[3], weights[4])


def test_discriminator_parts_do_nothing_before_it_is_active(tmp_path):
    logger.configure(str(tmp_path), [])
    network = create_discriminator(rank_worker.DISCRIMINATOR, 2, 1)
    trainer = DiscriminatorTrainer(network, rank_worker.DISCRIMINATOR, AutoencoderTrainConfig())
    before = {name: value.clone() for name, value in network.state_dict().items()}
    last_layer = torch.ones(1, requires_grad=True)
    fake, step = torch.rand(2, 1, 16, 16) * last_layer, rank_worker.DISCRIMINATOR.discriminator_start

    def take(step):
        terms = {"loss": fake.mean((1, 2, 3))}
        trainer.add_generator_loss(step, terms, torch.rand(2, 1, 16, 16), fake, last_layer, 1.0)
        trainer.backward_discriminator(step, 1.0)
        trainer.optimizer_step(step)
        return terms.keys()

    assert take(step - 1) == {"loss"}
    assert same_bits(network.state_dict(), before) and not trainer.opt.state_dict()["state"]
    assert not logger.getkvs()
    assert take(step) == {"loss", "adversarial_loss"} and not same_bits(network.state_dict(), before)


def test_generator_loss_gets_the_loss_scale_of_float16(prepared, tmp_path, monkeypatch):
    scales, add = [], DiscriminatorTrainer.add_generator_loss
    monkeypatch.setattr(DiscriminatorTrainer, "add_generator_loss", lambda *args: scales.append(args[-1]) or add(*args))
    train(prepared, tmp_path / "float32", "adversarial", 1)
    train(prepared, tmp_path / "float16", "adversarial", 1, mixed_precision=True, amp_dtype="float16")
    assert scales == [1.0, 2.0**20]


class Interpolation:
    """The members of a Process that training reads: x_t between x0 and noise, as in a rectified flow."""

    num_timesteps = 4

    def q_sample(self, x_start, t, noise=None):
        return x_start + t.view(-1, 1, 1, 1) / self.num_timesteps * (noise - x_start)

    def training_losses(self, model, x_start, t, model_kwargs=None, noise=None):
        output = model(self.q_sample(x_start, t, noise), t, **model_kwargs)
        return {"loss": (output - noise + x_start).square().mean((1, 2, 3))}

    def noise_condition(self, low_res, t, noise):
        return self.q_sample(low_res, t, noise)


def test_diffusion_objective_trains_any_process():
    seen = {}

    def model(x, t, low_res, low_res_times, y):
        seen.update(low_res=low_res, low_res_times=low_res_times, y=y)
        return torch.zeros_like(x)

    objective = DiffusionObjective(Interpolation(), class_dropout=0.5, null_label=9, cond_noise_steps=3)
    x0, cond = torch.ones(64, 1, 2, 2), {"y": torch.zeros(64, dtype=torch.int64), "low_res": torch.ones(64, 1, 1, 1)}
    rng = StepRNG(0, 5, range(64), 64)
    terms, t = objective(model, x0, cond, rng)
    noise = rng.normal((1, 2, 2), "cpu")
    assert torch.equal(terms["loss"], (1 - noise).square().mean((1, 2, 3))) and set(t.tolist()) == set(range(4))
    assert set(seen["low_res_times"].tolist()) == set(range(3)) and set(seen["y"].tolist()) == {0, 9}
    assert torch.equal(seen["low_res"] == 1, (seen["low_res_times"] == 0).view(-1, 1, 1, 1))
    with pytest.raises(ValueError, match="--cond_noise_steps must be <= 4, .* got 5; lower it or raise"):
        DiffusionObjective(Interpolation(), cond_noise_steps=5)


class SkewedSampler(LossAwareSampler):
    """Sample the last timestep most often, and keep the losses of the last update."""

    last_weight = 5.0

    def weights(self):
        return np.array([1.0, 1.0, 1.0, self.last_weight])

    def update_with_all_losses(self, ts, losses):
        self.update = ts, losses


def test_loss_aware_sampler_gets_losses_without_importance_weights():
    sampler = SkewedSampler()
    objective = DiffusionObjective(Interpolation(), sampler)
    rng = StepRNG(0, 5, range(8), 8)
    terms, t = objective(lambda x, t: torch.zeros_like(x), torch.ones(8, 1, 2, 2), {}, rng)
    objective.after_step(t, terms)
    losses = (1 - rng.normal((1, 2, 2), "cpu")).square().mean((1, 2, 3))
    assert sampler.update == (t.tolist(), losses.tolist()) and not torch.equal(terms["loss"], losses)


def test_classifier_loss_is_the_weighted_cross_entropy_of_noised_x0(tmp_path):
    seen, x0, labels = {}, torch.randn(4, 1, 2, 3), torch.tensor([0, 6, 2, 4])
    logits = torch.randn(4, 7, generator=torch.Generator().manual_seed(0))

    def model(x, t):
        seen.update(x=x, t=t)
        return logits

    rng, sampler = StepRNG(3, 5, range(2, 6), 8), SkewedSampler()
    times, weights = rng.timesteps(sampler, "cpu")
    losses = -logits.log_softmax(1)[range(4), labels]
    order = [sorted(range(7), key=lambda k: -row[k]) for row in logits.tolist()]
    objective = ClassifierObjective(Interpolation(), sampler, prefix="val")
    terms, t = objective(model, x0, {"y": labels}, rng)
    x_t = Interpolation().q_sample(x0, times, rng.normal(x0.shape[1:], "cpu"))
    assert torch.equal(t, times) and torch.equal(seen["t"], times) and torch.equal(seen["x"], x_t)
    torch.testing.assert_close(terms["loss"], losses * weights)
    torch.testing.assert_close(terms["unweighted"], losses)
    assert weights.unique().numel() == 2 and not torch.equal(terms["loss"], terms["unweighted"])
    assert terms["acc@1"].tolist() == [float(o[0] == y) for o, y in zip(order, labels.tolist())]
    assert terms["acc@5"].tolist() == [float(y in o[:5]) for o, y in zip(order, labels.tolist())]
    objective.after_step(t, terms)
    assert sampler.update == (times.tolist(), terms["unweighted"].tolist())
    logger.configure(str(tmp_path), [])
    objective.log(x0, t, terms)
    row = logger.getkvs()
    assert row["val_loss"] == pytest.approx((losses * weights).mean().item()) and "val_unweighted" not in row
    assert row["val_acc@5"] == terms["acc@5"].mean() and "val_loss_q3" in row

    clean, t = ClassifierObjective(Interpolation(), sampler, noised=False)(model, x0, {"y": labels}, rng)
    assert torch.equal(seen["x"], x0) and not t.any() and not seen["t"].any()
    torch.testing.assert_close(clean["loss"], losses)


def test_random_numbers_of_a_step_are_keyed_by_seed_stream_step_and_slot():
    rng, slots = StepRNG(3, 5, range(2, 6), 8), range(2, 6)
    for stream in (2, 10):
        expected = nn.keyed_randn((2, 3), [(3, stream, 5, slot) for slot in slots])
        assert torch.equal(rng.normal((2, 3), "cpu", stream), expected)
        numbers = np.random.RandomState(nn.keyed_seed(3, stream, 5) % 2**32).random_sample(8)
        assert rng.uniform(stream, "cpu").tolist() == numbers[2:6].tolist()
    assert torch.equal(rng.normal((2, 3), "cpu"), rng.normal((2, 3), "cpu", 2))
    t, weights = SkewedSampler().sample(8, "cpu", np.random.RandomState(nn.keyed_seed(3, 3, 5) % 2**32))
    for actual, expected in zip(rng.timesteps(SkewedSampler(), "cpu"), (t, weights)):
        assert torch.equal(actual, expected[2:6])
    assert list(rng.part(1, 3).slots) == [3, 4]


@pytest.fixture
def drawing_threads(monkeypatch):
    """Return a list to which the thread of every `keyed_randn` of a training step is added."""
    threads, draw = [], objectives.keyed_randn
    monkeypatch.setattr(objectives, "keyed_randn",
                        lambda *args: threads.append(threading.current_thread().name) or draw(*args))
    return threads


def test_numbers_drawn_ahead_equal_those_drawn_on_request(drawing_threads):
    uniform, skewed = UniformSampler(Interpolation()), SkewedSampler()
    rngs = StepRNGs(3, range(2, 6), 8, "cpu")

    def numbers(rng, shape):
        parts = [rng.part(0, 3), rng.part(3, 4)]
        return [torch.cat([part.normal(shape, "cpu", stream) for part in parts]) for stream in (2, 10)] + [
            torch.cat([part.uniform(7, "cpu") for part in parts]), rng.uniform(9, "cpu"),
            *rng.timesteps(uniform, "cpu"), *rng.part(1, 4).timesteps(skewed, "cpu"),
        ]

    # In order, after a jump as on resuming, and with requests for another shape than the step before.
    for step, shape in ((5, (2, 3)), (6, (2, 3)), (7, (2, 3)), (3, (2, 3)), (4, (1,)), (5, (2, 3))):
        skewed.last_weight = 2 * step       # follows the losses of the steps before
        for actual, expected in zip(numbers(rngs.at(step), shape), numbers(StepRNG(3, step, range(2, 6), 8), shape)):
            assert torch.equal(actual, expected)
    rngs.close()


def test_training_draws_its_noise_beside_the_steps(tmp_path, drawing_threads):
    logger.configure(str(tmp_path), [])
    model = UNetModel(4, 1, 32, 1, 1, (), channel_mult=(1,))
    batches = iter(lambda: (torch.zeros(4, 1, 4, 4), {}), None)
    loop = TrainLoop(model=model, diffusion=Interpolation(), data=batches, batch_size=4, microbatch=2, lr=1e-4,
                     config=TrainConfig(max_steps=4, preview_interval=-1, save_interval=9))
    loop.run_loop()
    assert drawing_threads[:2] == ["MainThread"] * 2    # the two parts of the first step
    assert set(drawing_threads[2:]) == {"prefetch"} and 3 <= len(drawing_threads[2:]) <= 6


def train_unet(folder, **config):
    """Train a UNet of one level, on the same two batches in turn; return the TrainLoop."""
    logger.configure(str(folder), [])
    torch.manual_seed(0)
    model = UNetModel(4, 1, 32, 1, 1, (), channel_mult=(1,))
    batches = [torch.randn(2, 1, 4, 4) for _ in range(2)]
    loop = TrainLoop(model=model, diffusion=Interpolation(), data=iter(()), batch_size=2, lr=1e-3, ema_rate="0.5",
                     config=TrainConfig(preview_interval=-1, **config))
    while loop.step < loop.max_steps:
        loop.run_step(batches[loop.step % 2], {})
    loop.save()
    loop.rngs.close()
    return loop


def test_channels_last_resumes_bit_exactly_and_saves_contiguous_weights(tmp_path):
    plain = train_unet(tmp_path / "plain", max_steps=4)
    full = train_unet(tmp_path / "full", max_steps=4, channels_last=True)
    for steps in (2, 4):
        resumed = train_unet(tmp_path / "resumed", max_steps=steps, channels_last=True)
    weight = resumed.model.input_blocks[1][0].in_layers[2].weight
    assert weight.is_contiguous(memory_format=torch.channels_last) and not weight.is_contiguous()
    assert resumed.opt.state[weight]["exp_avg"].stride() == weight.stride()
    files = files_of(tmp_path / "full", 4, 0.5)
    assert same_bits(files, files_of(tmp_path / "resumed", 4, 0.5))
    assert all(tensor.is_contiguous() for tensor in flat(files).values() if isinstance(tensor, torch.Tensor))
    for expected, actual in zip(plain.model.parameters(), full.model.parameters()):
        torch.testing.assert_close(actual.contiguous(), expected, rtol=0, atol=1e-3)


def test_layout_and_fusion_flags_are_rejected_or_logged_if_they_cannot_apply(tmp_path, capsys):
    with pytest.raises(ValueError, match="--compile and --fuse_norms are mutually exclusive"):
        train_unet(tmp_path, max_steps=1, compile=True, fuse_norms=True)
    with pytest.raises(ValueError, match="--channels_last True requires images or volumes"):
        nn.use_channels_last(UNetModel(4, 1, 32, 1, 1, (), channel_mult=(1,), dims=1))
    logger.configure(str(tmp_path), ["stdout"])
    loop = TrainLoop(model=UNetModel(4, 1, 32, 1, 1, (), channel_mult=(1,)), diffusion=Interpolation(), data=iter(()),
                     batch_size=2, lr=1e-3, ema_rate="", config=TrainConfig(fuse_norms=True))
    assert "--fuse_norms True is for GPUs" in capsys.readouterr().out
    assert not any(getattr(module, "is_fused", False) for module in loop.model.modules())


@pytest.fixture
def pinning_threads(monkeypatch):
    """Let tensors be pinned without a GPU; return a list to which the thread of each is added."""
    threads = []
    monkeypatch.setattr(torch.Tensor, "pin_memory",
                        lambda tensor: threads.append(threading.current_thread().name) or tensor)
    return threads


def test_numbers_for_a_gpu_are_pinned_beside_the_steps(pinning_threads):
    rngs = StepRNGs(3, range(4), 4, "cuda")
    for step in range(3):
        rng = rngs.at(step)
        rng.normal((2,), "cpu"), rng.timesteps(UniformSampler(Interpolation()), "cpu")
    rngs.close()
    assert len(pinning_threads) >= 6 and set(pinning_threads) == {"prefetch"}


def test_upsampler_condition_is_noised_with_its_own_timestep_and_noise():
    seen, low_res = {}, torch.randn(4, 1, 2, 2)
    rng = StepRNG(3, 5, range(4), 4)
    model = lambda x, t, **conditioning: seen.update(conditioning) or torch.zeros_like(x)
    objective = DiffusionObjective(Interpolation(), class_dropout=0.5, null_label=9, cond_noise_steps=3)
    objective(model, torch.ones(4, 1, 4, 4), {"low_res": low_res, "y": torch.arange(4)}, rng)
    times = (3 * rng.uniform(9, "cpu")).long()
    assert torch.equal(seen["low_res_times"], times) and times.unique().numel() > 1
    noised = Interpolation().q_sample(low_res, times, rng.normal((1, 2, 2), "cpu", 10))
    torch.testing.assert_close(seen["low_res"], noised)
    dropped = rng.uniform(7, "cpu") < 0.5
    assert torch.equal(seen["y"], torch.where(dropped, 9, torch.arange(4))) and 0 < dropped.sum() < 4


def test_dropout_masks_are_seeded_by_seed_step_and_rank(tmp_path):
    for seed, step, rank in ((0, 3, 0), (0, 3, 1), (0, 4, 1), (6, 4, 1)):
        loop = line(tmp_path / f"{seed}-{step}-{rank}", 1, seed=seed)
        loop.step, loop.rank = step, rank
        loop.forward_backward(*next(Points()))
        assert torch.initial_seed() == nn.keyed_seed(seed, 4, step, rank)


class Distance(torch.nn.Module):
    """A perceptual distance that depends on the order of its arguments and on the generator."""

    def forward(self, x, y, rng):
        return float(rng.random()) * (x**3 - 2 * y).square().mean((1, 2, 3))


@pytest.mark.parametrize("kind, real_term", [("least_squares", lambda logits: (logits - 1) ** 2),
                                             ("hinge", lambda logits: (1 - logits).relu())])
@pytest.mark.parametrize("adaptive", [False, True])
def test_adversarial_step_equals_its_formulas(tmp_path, kind, real_term, adaptive):
    logger.configure(str(tmp_path), [])
    torch.manual_seed(0)
    mean_of = lambda x: x.flatten(1).mean(1)
    network = create_autoencoder(AutoencoderConfig(in_channels=1, num_channels=(4, 8), norm_num_groups=2))
    config = DiscriminatorConfig(discriminator_weight=0.5, discriminator_start=5, discriminator_loss=kind,
                                 adaptive_weight=adaptive, discriminator_lr=0.01)
    discriminator = PatchDiscriminator(2, 1, 8, 1)
    trainer = DiscriminatorTrainer(discriminator, config, AutoencoderTrainConfig(grad_clip=1e6))
    objective = AutoencoderObjective(
        AutoencoderLossConfig(kl_weight=0.25, recon_loss="l2"), network, (0.0, 2.0),
        AutoencoderTrainConfig(augment_flip=True, augment=1.0, augment_rotation=10), (0.3, Distance()), trainer)
    images, rng = torch.rand(3, 1, 16, 16), StepRNG(3, 5, range(3), 3)
    terms, _ = objective(network, images, {}, rng, 16.0)

    x = 2 * random_affine(random_flips(images, rng), rng, objective.train)
    mean, logvar = network.moments(x)
    reconstruction = network.decode(mean + (0.5 * logvar).exp() * rng.normal((4, 8, 8), "cpu"))
    divergence = mean_of(0.5 * (mean**2 + logvar.exp() - 1 - logvar))
    distance = Distance()(reconstruction, x, rng.generator(15))
    plain = mean_of((reconstruction - x) ** 2) + 0.25 * divergence + 0.3 * distance
    fake = discriminator(reconstruction)
    adversarial = mean_of(0.5 * (fake - 1) ** 2 if kind == "least_squares" else -fake)
    last = network.decoder.blocks[-1].conv.weight
    large, small = (torch.autograd.grad(loss.mean(), last, retain_graph=True)[0].norm()
                    for loss in (plain, adversarial))
    factor = large / (small + 1e-4) if adaptive else 1.0
    torch.testing.assert_close(terms["loss"], plain + 0.5 * factor * adversarial, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(terms["perceptual_loss"], distance, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(terms["adversarial_loss"], adversarial, rtol=1e-4, atol=1e-5)
    gradients = torch.autograd.grad(terms["loss"].sum(), [last, network.encoder.blocks[0].conv.weight])
    expected = torch.autograd.grad((plain + 0.5 * (factor.detach() if adaptive else 1) * adversarial).sum(),
                                   [last, network.encoder.blocks[0].conv.weight])
    torch.testing.assert_close(gradients, expected, rtol=1e-3, atol=1e-4)
    assert all(p.grad is None and p.requires_grad for p in discriminator.parameters())

    real, fake = discriminator(x.detach()), discriminator(reconstruction.detach())
    opposite = fake**2 if kind == "least_squares" else (1 + fake).relu()
    loss = 0.5 * (mean_of(real_term(real)) + mean_of(opposite)).mean()
    expected = torch.autograd.grad(loss, list(discriminator.parameters()))
    trainer.backward_discriminator(5, 0.25)
    torch.testing.assert_close([p.grad for p in discriminator.parameters()], [0.25 * g for g in expected],
                               rtol=1e-3, atol=1e-5)
    row = logger.getkvs()
    for name, value in (("discriminator_loss", loss), ("logits_real", real.mean()), ("logits_fake", fake.mean())):
        assert row[name] == pytest.approx(value.item(), rel=1e-4)
    before = [(p.detach().clone(), p.grad) for p in discriminator.parameters()]
    trainer.optimizer_step(5, 0.5)
    for p, (start, gradient) in zip(discriminator.parameters(), before):    # the first step of Adam
        update = -0.005 * gradient / (gradient.abs() + 1e-8)
        torch.testing.assert_close(p.detach() - start, update, rtol=1e-2, atol=1e-6)
        assert p.grad is None
    assert {"discriminator_grad_norm", "discriminator_param_norm"} <= logger.getkvs().keys()
    assert trainer.opt.param_groups[0]["betas"] == (0.5, 0.9) and trainer.opt.param_groups[0]["weight_decay"] == 0


def test_generator_of_a_step_is_that_of_old_runs():
    assert StepRNG(0, 5, range(4), 4).generator(15).integers(0, 2**31, 2).tolist() == [598665788, 1761058431]


def test_discriminator_that_is_not_finite_is_not_saved(prepared, tmp_path):
    loop = train(prepared, tmp_path, "adversarial", 2)
    with torch.no_grad():
        next(loop.discriminator.network.parameters())[0] = math.nan
    loop.step += 1
    with pytest.raises(FloatingPointError, match="the last good checkpoint is 2"):
        loop.save()


def test_run_without_discriminator_resumes_with_a_new_one(prepared, tmp_path, capsys):
    train(prepared, tmp_path, "autoencoder", 2)
    weights = files_of(tmp_path, 2)
    logger.reset()
    loop = train(prepared, tmp_path, "adversarial", 4, header_kind="autoencoder")
    assert loop.resume_step == 2 and len(files_of(tmp_path, 4)) == 5 and len(weights) == 3


# --- The course of a run, with a line through the origin as a fast model ---


class Points(BatchSource):
    """Batches (x [4 x 3], {"y": [4]}) that depend only on the step; `nan_at`: a step or a range of steps."""

    def __init__(self, nan_at=None, hook=None):
        self.step, self.nan_at, self.hook = 0, nan_at, hook

    def seek(self, step):
        self.step = step

    def __next__(self):
        generator = torch.Generator().manual_seed(self.step)
        x = torch.randn(4, 3, generator=generator)
        if self.step == self.nan_at or isinstance(self.nan_at, range) and self.step in self.nan_at:
            x = x * math.nan
        self.step += 1
        if self.hook:
            self.hook(self.step)
        return x, {"y": x.sum(1)}


def squared_error(model, x, cond, rng):
    return {"loss": (model(x)[:, 0] - cond["y"]) ** 2}


def line(folder, steps, header=HEADER, data=None, formats=(), bias=False, **options):
    torch.manual_seed(0)
    logger.configure(str(folder), list(formats))
    options = {"lr": 0.1, "ema_rate": "0.9", "save_interval": 2, "log_interval": 1, "batch_size": 4, **options}
    loop = create_loop(
        model=torch.nn.Linear(3, 1, bias=bias), objective=PlainObjective(squared_error), header=header,
        data=data or Points(), max_steps=steps, **options
    )
    loop.run_loop()
    return loop


def names_in(folder):
    return sorted(path.name for path in Path(folder).iterdir())


def weights_in(folder, step):
    return checkpoint_util.load(Path(folder) / checkpoint_util.model_name(step))["weight"]


def test_file_n_holds_n_updates(tmp_path):
    line(tmp_path / "long", 4)
    for step in (2, 4):
        line(tmp_path / f"{step}", step)
        assert same_bits(files_of(tmp_path / "long", step), files_of(tmp_path / f"{step}", step))
        state = files_of(tmp_path / "long", step)[2]["state"]
        assert [int(s["step"]) for s in state.values()] == [step]
    names = ("ema_0.9_{}.pt", "model{}.pt", "opt{}.pt", "state{}.json")
    assert names_in(tmp_path / "long") == sorted(name.format(step) for name in names for step in ("000002", "000004"))


def test_resumed_run_continues_with_the_next_update(tmp_path):
    seen = []
    line(tmp_path, 3)
    loop = line(tmp_path, 5, data=Points(hook=seen.append))
    assert loop.resume_step == 3 and loop.step == 5 and seen == [4, 5]
    assert line(tmp_path, 5).step == 5  # no step is left


def test_ema_follows_the_weights_step_by_step(tmp_path):
    torch.manual_seed(0)
    average = torch.nn.Linear(3, 1, bias=False).weight.detach()
    line(tmp_path, 4, save_interval=1)
    for step in range(1, 5):
        average = 0.9 * average + 0.1 * weights_in(tmp_path, step)
        assert torch.allclose(files_of(tmp_path, step)[1]["weight"], average, atol=1e-7)


def test_every_ema_has_its_own_rate(tmp_path):
    torch.manual_seed(0)
    start = torch.nn.Linear(3, 1, bias=False).weight.detach()
    line(tmp_path, 1, ema_rate="0.9,0.5")
    for rate in (0.9, 0.5):
        expected = rate * start + (1 - rate) * weights_in(tmp_path, 1)
        torch.testing.assert_close(files_of(tmp_path, 1, rate)[1]["weight"], expected)


def test_ema_rate_may_hold_no_rate_or_several(tmp_path):
    line(tmp_path / "none", 2, ema_rate="")
    assert names_in(tmp_path / "none") == ["model000002.pt", "opt000002.pt", "state000002.json"]
    line(tmp_path / "two", 2, ema_rate="0.9,0.9999")
    assert {"ema_0.9_000002.pt", "ema_0.9999_000002.pt"} < set(names_in(tmp_path / "two"))
    assert checkpoint_util.latest_weights(tmp_path / "two").name == "ema_0.9999_000002.pt"
    assert checkpoint_util.latest_weights(tmp_path / "none").name == "model000002.pt"


def test_learning_rate_decays_linearly_to_zero_at_the_last_step(tmp_path):
    line(tmp_path, 0, lr_anneal_steps=4, formats=["csv"])
    with open(tmp_path / "progress.csv", newline="") as stream:
        rates = [float(row["lr"]) for row in csv.DictReader(stream)]
    assert rates == pytest.approx([0.1, 0.075, 0.05, 0.025])  # the next update would have rate 0
    assert line(tmp_path / "both", 9, lr_anneal_steps=4).step == 4
    assert line(tmp_path / "both", 9, lr_anneal_steps=4).step == 4


def test_learning_rate_warms_up_and_then_decays(tmp_path):
    line(tmp_path, 0, lr_warmup_steps=3, lr_anneal_steps=6, formats=["csv"])
    with open(tmp_path / "progress.csv", newline="") as stream:
        rates = [float(row["lr"]) for row in csv.DictReader(stream)]
    expected = [0.1 * min((step + 1) / 3, 1) * (1 - step / 6) for step in range(6)]
    assert rates == pytest.approx(expected)


@pytest.mark.parametrize("options, expected", [
    ({"batch_size": 2, "gradient_accumulation_steps": 3}, {"batch_size": 6, "microbatch": 2}),
    ({"batch_size": 2, "microbatch": 1}, {"batch_size": 2, "microbatch": 1}),
    ({"batch_size": 5, "fast_dev_run": True}, {"max_steps": 2, "save_interval": 2, "max_val_samples": 5}),
    ({"fast_dev_run": True, "fast_dev_run_batches": 7}, {"max_steps": 7, "preview_interval": 7}),
])
def test_resolve_train_config_translates_accumulation_and_smoke_tests(options, expected):
    train = resolve_train_config(AutoencoderTrainConfig(**options))
    assert {name: getattr(train, name) for name in expected} == expected


@pytest.mark.parametrize("options, match", [
    ({"gradient_accumulation_steps": 0}, "--gradient_accumulation_steps must be >= 1, got 0"),
    ({"gradient_accumulation_steps": 2, "microbatch": 1},
     "--microbatch 1 and --gradient_accumulation_steps 2 are mutually exclusive; set only one of them"),
])
def test_microbatch_and_accumulation_are_mutually_exclusive(options, match):
    with pytest.raises(ValueError, match=match):
        resolve_train_config(AutoencoderTrainConfig(**options))


def measuring(values):
    """Return a preview that measures these PSNRs one after another."""
    values = iter(values)
    return lambda step: {"val_psnr": next(values), "val_l1": 0.5}


def test_best_step_is_kept_and_represents_the_run(tmp_path):
    options = {"monitor": "val_psnr", "keep_checkpoints": 1, "save_interval": 9, "preview_interval": 1}
    line(tmp_path, 4, preview=measuring([1.0, 5.0, 3.0, 4.0]), **options)
    assert checkpoint_util.committed_steps(tmp_path) == [2, 4]
    assert checkpoint_util.latest_weights(tmp_path).name == "ema_0.9_000002.pt"
    assert checkpoint_util.read_marker(tmp_path, 4)["best"] == {"step": 2, "val_psnr": 5.0}
    line(tmp_path, 6, preview=measuring([4.5, 6.0]), **options)  # the best step is restored on resuming
    assert checkpoint_util.committed_steps(tmp_path) == [6]
    assert checkpoint_util.latest_weights(tmp_path).name == "ema_0.9_000006.pt"


def test_monitored_run_measures_the_ema_that_represents_it(tmp_path):
    seen, found = [], measuring([1.0, 2.0])
    options = {"monitor": "val_psnr", "ema_rate": "0.5,0.99", "save_interval": 1}
    torch.manual_seed(0)
    logger.configure(str(tmp_path), [])
    loop = create_loop(
        model=torch.nn.Linear(3, 1, bias=False), objective=PlainObjective(squared_error), header=HEADER, data=Points(),
        batch_size=4, max_steps=2, lr=0.1, **options,
        preview=lambda step: seen.append(loop.model.weight.detach().clone()) or found(step),
    )
    loop.run_loop()
    path = checkpoint_util.latest_weights(tmp_path)
    assert path.name == "ema_0.99_000002.pt"
    assert torch.equal(seen[-1], checkpoint_util.load_weights(path)[0]["weight"])


def test_run_resumes_in_another_precision(tmp_path):
    header = {**HEADER, "model": {"width": 3, "use_fp16": False, "classifier_use_fp16": True}}
    line(tmp_path, 2, header=header)
    other = {**HEADER, "model": {"width": 3, "use_fp16": True, "classifier_use_fp16": False}}
    assert line(tmp_path, 3, header=other).resume_step == 2


def test_corrupt_best_step_is_skipped(tmp_path):
    line(tmp_path, 3, preview=measuring([5.0, 1.0, 1.0]), monitor="val_psnr", preview_interval=1, save_interval=1)
    (tmp_path / "ema_0.9_000001.pt").write_bytes(b"corrupt")
    assert checkpoint_util.latest_weights(tmp_path).name == "ema_0.9_000003.pt"


@pytest.mark.parametrize("early_stop, step", [({"val_psnr": 3.0}, 2), ({"val_l1": 0.5}, 1), ({"val_psnr": 99.0}, 3)])
def test_run_ends_when_a_bound_is_reached(tmp_path, early_stop, step):
    loop = line(tmp_path, 3, preview=measuring([1.0, 4.0, 2.0]), preview_interval=1, early_stop=early_stop)
    assert loop.step == step and step in checkpoint_util.committed_steps(tmp_path)


def test_run_that_reached_a_bound_resumes_only_with_another_bound(tmp_path):
    again = lambda bound: line(tmp_path, 9, preview=measuring([1.0, 4.0, 9.0]), preview_interval=1,
                               early_stop={"val_psnr": bound}).step
    assert [again(3.0), again(3.0), again(8.0)] == [2, 2, 5]


def test_smoke_test_does_not_resume_a_checkpoint():
    with pytest.raises(ValueError, match="--fast_dev_run True and --resume_checkpoint model000002.pt are mutual"):
        resolve_train_config(AutoencoderTrainConfig(fast_dev_run=True, resume_checkpoint="model000002.pt"))


def test_discriminator_uses_the_schedule_and_clipping_of_the_autoencoder(prepared, tmp_path):
    loop = train(prepared, tmp_path, "adversarial", 6, lr_anneal_steps=12, grad_clip=1e-3)
    rate = loop.discriminator.opt.param_groups[0]["lr"]
    assert rate == pytest.approx(loop.discriminator.lr * (1 - 5 / 12))
    assert loop.discriminator.mp_trainer.grad_clip == 1e-3


def test_init_from_loads_weights_that_agree_and_lists_the_others(tmp_path, capsys):
    line(tmp_path / "first", 2)
    model = torch.nn.Linear(3, 1)
    logger.configure(str(tmp_path / "log"), ["stdout"])
    init_from_weights(model, tmp_path / "first")
    out = capsys.readouterr().out
    assert torch.equal(model.weight, files_of(tmp_path / "first", 2)[1]["weight"])
    assert "1 of 2 weights are initialized from" in out and "newly initialized: bias (1,)" in out
    wide = torch.nn.Linear(5, 1)
    with pytest.raises(ValueError, match="model000002.pt has no weights in common with this model; check --init_from"):
        init_from_weights(wide, tmp_path / "first" / "model000002.pt")


def test_resumed_run_ignores_init_from(tmp_path):
    line(tmp_path / "other", 2, lr=0.3)
    line(tmp_path / "run", 2)
    line(tmp_path / "run", 4, init_from=str(tmp_path / "other"))
    line(tmp_path / "full", 4)
    assert same_bits(files_of(tmp_path / "run", 4), files_of(tmp_path / "full", 4))


def test_affine_augmentation_is_as_precise_under_autocast():
    images = torch.rand(8, 1, 256, 256)
    rng, config = StepRNG(0, 5, range(8), 8), AutoencoderTrainConfig(augment=1.0)
    with torch.autocast("cpu", torch.bfloat16):
        narrow = random_affine(images, rng, config)
    assert narrow.dtype == torch.float32 and torch.allclose(narrow, random_affine(images, rng, config), atol=1e-5)


@pytest.mark.parametrize("recompute_norms", [False, True])
def test_compiled_run_is_one_graph_and_takes_the_same_steps(tmp_path, monkeypatch, recompute_norms):
    # aot_eager traces the graph that --compile passes to the compiler, without requiring a C++ compiler.
    compile = torch.compile
    monkeypatch.setattr(torch, "compile", lambda network, dynamic, mode: compile(
        network, dynamic=dynamic, backend="aot_eager"))
    torch._dynamo.reset()
    counters = torch._dynamo.utils.counters
    weights = {}
    for compiled in (False, True):
        counters.clear()
        torch.manual_seed(0)
        network = UNetModel(image_size=8, in_channels=4, model_channels=32, out_channels=4, num_res_blocks=1,
                            attention_resolutions=(2,), channel_mult=(1, 2), num_head_channels=16,
                            recompute_norms=recompute_norms)
        generator = torch.Generator().manual_seed(1)
        data = ((torch.randn(4, 4, 8, 8, generator=generator), {}) for _ in range(3))
        with logger.scoped_configure(str(tmp_path / str(compiled)), ["log"]):
            create_loop(model=network, diffusion=create_gaussian_diffusion(), data=data, batch_size=4, microbatch=2,
                        lr=1e-3, max_steps=3, compile=compiled).run_loop()
        weights[compiled] = network.state_dict()
        assert counters["stats"].get("unique_graphs", 0) == compiled and not counters["graph_break"]
    assert farthest(weights[False], weights[True]) < 1e-5
    assert "including compilation" in (tmp_path / "True/log.txt").read_text()


@pytest.mark.parametrize("amp, most", [(False, 800), (True, 1500)])
def test_step_launches_few_kernels_and_causes_no_host_sync(tmp_path, monkeypatch, amp, most):
    """guided-diffusion: 2,591 and 548 for this network on a GPU; autocast adds one cast per weight."""
    monkeypatch.setattr(nn, "NORMS_ADD_IN_FLOAT32", set())  # as on a GPU
    flags = ModelConfig(num_channels=128, channel_mult="1,2,2", attention_resolutions="16,8")
    network, diffusion = create_model_and_diffusion_vae((4, 16, 16), flags, DiffusionConfig())
    with logger.scoped_configure(str(tmp_path), ["csv"]):
        loop = create_loop(model=network, diffusion=diffusion, data=iter(()), batch_size=2, lr=1e-4,
                           ema_rate="0.99,0.9999", mixed_precision=amp)
        batch = torch.randn(2, 4, 16, 16)
        loop.run_step(batch, {})
        with Launches() as launches:
            loop.run_step(batch, {})
    assert 400 < launches.total <= most and launches.synchronizations == 0, sorted(launches.counts.items())


@pytest.mark.parametrize("kind", [UniformSampler, LossSecondMomentResampler])
def test_random_numbers_reach_the_device_without_a_host_sync(kind):
    """The meta device represents a GPU: copies to it are counted without being made."""
    sampler = kind(create_gaussian_diffusion(steps=100))
    rng = StepRNG(0, 5, range(2, 6), 8)
    with Launches() as launches:
        drawn = [*rng.timesteps(sampler, "meta"), rng.normal((4, 2, 2), "meta"), rng.uniform(7, "meta")]
        torch.zeros(1).to("meta", non_blocking=True)
    assert all(x.device.type == "meta" and len(x) == 4 for x in drawn) and launches.synchronizations == 0
    with Launches() as launches:
        torch.zeros(1).to("meta")
    assert launches.synchronizations == 1


def test_optimizer_error_names_the_extra_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    monkeypatch.setitem(sys.modules, "bitsandbytes.optim", None)
    with pytest.raises(ImportError, match=r"--optimizer adamw8bit requires bitsandbytes: pip install .*\[gpu\]"):
        line(tmp_path, 1, optimizer="adamw8bit")


@pytest.mark.parametrize("shape", [(64, 1, 3, 4), (64, 2, 3, 2, 2)])
def test_each_axis_is_flipped_independently(shape):
    images = torch.rand(shape)
    out = random_flips(images, StepRNG(0, 5, range(64), 64))
    axes = range(2, images.dim())
    kinds = [tuple(axis for axis in axes if flips >> (axis - 2) & 1) for flips in range(2 ** len(axes))]
    counts = [sum(torch.equal(o, i.flip([axis - 1 for axis in kind])) for o, i in zip(out, images)) for kind in kinds]
    assert sum(counts) == 64 and min(counts) > 0
    part = random_flips(images[10:20], StepRNG(0, 5, range(10, 20), 64))
    assert torch.equal(part, out[10:20])  # flips belong to the slot in the global batch


def spots(*shape):
    """Return (images [64 x 1 x *shape] with a bright spot off center, position of the spot from the center)."""
    axes = [torch.arange(n) - (n - 1) / 2 for n in shape]
    place = torch.tensor([n / 4 for n in shape])
    squared = sum(axis.sub(p).square().view([-1 if i == j else 1 for i in range(len(shape))])
                  for j, (axis, p) in enumerate(zip(axes, place)))
    return torch.exp(-squared / 4).expand(64, 1, *shape).clone(), place


def centers(images):
    """Return the positions of bright spots from the center.  [N x 1 x ...] -> [N x axes]."""
    total = images.flatten(1).sum(1)
    axes = [torch.arange(n) - (n - 1) / 2 for n in images.shape[2:]]
    along = lambda i: images[:, 0].sum([j + 1 for j in range(len(axes)) if j != i])
    return torch.stack([along(i) @ axis / total for i, axis in enumerate(axes)], dim=1)


@pytest.mark.parametrize("shape", [(24, 40), (24, 40, 28)])
def test_affine_augmentation_stays_within_its_bounds(shape):
    images, place = spots(*shape)
    rng = StepRNG(0, 5, range(64), 64)
    only = lambda **bounds: AutoencoderTrainConfig(**{"augment": 0.5, "augment_rotation": 0, "augment_scale": 0,
                                                      "augment_translation": 0, **bounds})
    assert torch.allclose(random_affine(images, rng, only()), images, atol=1e-5)
    assert torch.equal(random_affine(images, rng, only(augment=0, augment_rotation=90)), images)
    for bounds in ({"augment_translation": 2}, {"augment_rotation": 10}, {"augment_scale": 0.2}):
        out = random_affine(images, rng, only(**bounds))
        moved = centers(out) - place
        changed = torch.tensor([not torch.equal(o, i) for o, i in zip(out, images)])
        assert 20 < changed.sum() < 44 and moved[~changed].abs().max() < 1e-3
        if "augment_translation" in bounds:
            assert 1.5 < moved.abs().max() < 2.02
        elif "augment_rotation" in bounds:  # by up to 10 degrees in each plane, at an unchanged distance
            assert centers(out).norm(dim=1).sub(place.norm()).abs().max() < 0.1
            angles = torch.nn.functional.cosine_similarity(centers(out), place[None]).clamp(max=1).acos().rad2deg()
            assert 6 < angles.max() < (10.1 if len(shape) == 2 else 18)
        else:
            stretch = (centers(out) / place).view(64, -1)
            assert stretch.std(1).max() < 0.02 and 0.12 < (stretch - 1).abs().max() < 0.26
    everything = AutoencoderTrainConfig(augment=0.5)
    batch, part = (random_affine(images[s], StepRNG(0, 5, range(64)[s], 64), everything)
                   for s in (slice(64), slice(9, 20)))
    assert torch.allclose(batch[9:20], part, atol=1e-6)


def test_spectrogram_changes_stay_within_their_bounds():
    n, rows, columns = 64, 32, 40
    images = (0.3 + 0.4 * torch.rand(n, 1, rows, columns)).clamp(0.3, 0.7)
    rng = StepRNG(0, 5, range(n), n)
    change = lambda *names, strength=1.0: augment_spectrograms(images, rng, strength, names)
    assert torch.equal(change(), images) and torch.equal(change(*SPECTROGRAM_CHANGES, strength=0.0), images)

    shifted = change("time_shift")
    shifts = [next(s for s in range(-10, 11) if torch.equal(out, image.roll(s, -1)))
              for out, image in zip(shifted, images)]
    assert min(shifts) < -7 and max(shifts) > 7
    shifted = change("doppler_shift", strength=2.0)     # edges are repeated
    taken = [next(s for s in range(-2, 3) if torch.equal(out, image[:, (torch.arange(rows) + s).clamp(0, rows - 1)]))
             for out, image in zip(shifted, images)]
    assert set(taken) == {-2, -1, 0, 1, 2}
    gain = (change("gain") - images).flatten(1)
    assert gain.std(1).max() < 1e-6 and gain.amin() < -0.08 and 0.08 < gain.amax() <= 0.1
    assert change("gain", strength=9.0).aminmax() == (0, 1)
    noise = (change("noise") - images).flatten(1).std(1)
    assert noise.min() < 0.01 and 0.04 < noise.max() < 0.055 and noise.unique().numel() == n
    masked = change("masks")[:, 0] == 0
    heights, widths = masked.all(2).sum(1), masked.all(1).sum(1)
    assert heights.max() in (6, 7) and widths.max() in (7, 8) and heights.min() == 0
    assert torch.equal(masked, masked.all(2)[:, :, None] | masked.all(1)[:, None, :])

    # Each change is the same whichever others are chosen, and belongs to the slot in the global batch.
    both = change("time_shift", "gain")
    assert torch.allclose(both, torch.stack([i.roll(s, -1) for i, s in zip(images, shifts)]) + gain.view(n, 1, 32, 40))
    part = augment_spectrograms(images[10:20], StepRNG(0, 5, range(10, 20), n), 1.0)
    assert torch.equal(part, change(*SPECTROGRAM_CHANGES)[10:20])


def test_colors_of_spectrograms_change_as_their_scalars():
    table = open_colormap("jet/linear64")
    levels = torch.randint(0, 64, (8, 1, 16, 20), generator=torch.Generator().manual_seed(0))
    colored = lambda levels: torch.from_numpy(table.to_colors((levels[:, 0] / 63).numpy())).movedim(-1, 1).float() / 255
    rng = StepRNG(0, 5, range(8), 8)
    changed = augment_spectrograms(colored(levels), rng, 1.0, colormap=table)
    scalars = augment_spectrograms(levels / 63, rng, 1.0)
    assert torch.equal(changed, colored(scalars * 63)) and not torch.equal(changed, colored(levels))
    settings = AutoencoderTrainConfig(augment_spectrogram=0.5, augment_flip=True)
    network = ReconstructedExactly()
    objective = AutoencoderObjective(AutoencoderLossConfig(), network, (0.0, 1.0), settings, colormap=table)
    objective(network, colored(levels), {}, rng)
    changes = "time_shift", "doppler_shift", "gain"
    expected = augment_spectrograms(random_flips(colored(levels), rng), rng, 0.5, changes, table)
    assert torch.equal(network.images, expected)


class ReconstructedExactly(torch.nn.Module):
    """Keep the images that it gets, and return them as their reconstructions."""

    def latent_shape(self, spatial):
        return 1, *spatial

    def forward(self, x, eps):
        self.images = x
        return x, torch.zeros_like(eps), torch.ones_like(eps)


def test_resumed_run_uses_the_current_learning_rate(tmp_path):
    line(tmp_path, 2)
    group = line(tmp_path, 3, lr=0.05, weight_decay=0.5).opt.param_groups[0]
    assert (group["lr"], group["weight_decay"]) == (0.05, 0.5)


def test_only_the_latest_checkpoints_are_kept(tmp_path):
    line(tmp_path, 9, keep_checkpoints=2)
    assert checkpoint_util.committed_steps(tmp_path) == [8, 9]
    assert len(names_in(tmp_path)) == 8


def test_previews_use_the_ema_and_do_not_change_training(tmp_path):
    seen = []

    def preview(step):
        seen.append((step, loop.model.training, loop.model.weight.detach().clone()))
        torch.rand(3)

    line(tmp_path / "without", 4)
    logger.configure(str(tmp_path / "with"), [])
    torch.manual_seed(0)
    loop = create_loop(
        model=torch.nn.Linear(3, 1, bias=False), objective=PlainObjective(squared_error), header=HEADER, data=Points(),
        batch_size=4, max_steps=4, lr=0.1, ema_rate="0.9,0.99", save_interval=2, log_interval=1, preview=preview
    )
    loop.run_loop()
    assert [(step, training) for step, training, _ in seen] == [(2, False), (4, False)] and loop.model.training
    for step, _, weight in seen:  # the EMA with the smaller decay
        assert torch.equal(weight, files_of(tmp_path / "with", step)[1]["weight"])
    assert same_bits(files_of(tmp_path / "with", 4), files_of(tmp_path / "without", 4))


def test_step_is_saved_before_its_preview_and_its_marker_completed_after(tmp_path, monkeypatch):
    hashed, seen = [], []
    sha256 = checkpoint_util.sha256_of_file
    monkeypatch.setattr(checkpoint_util, "sha256_of_file", lambda path: hashed.append(Path(path).name) or sha256(path))

    def preview(step):
        seen.append((step, checkpoint_util.committed_steps(tmp_path / "with")))
        assert checkpoint_util.read_marker(tmp_path / "with", step, lambda marker: None)["measured"] == (
            {"val_psnr": 4.0} if step == 5 else {})
        return {"val_psnr": 5.0 - len(seen)}

    line(tmp_path / "with", 5, save_interval=4, preview_interval=4, preview=preview, monitor="val_psnr")
    assert seen == [(4, [4]), (5, [4, 5])]
    assert hashed == []     # they were hashed while they were written
    line(tmp_path / "without", 5, save_interval=4)
    for step, measured in ((4, 4.0), (5, 3.0)):
        one, other = (checkpoint_util.read_marker(tmp_path / name, step) for name in ("with", "without"))
        assert one == {**other, "best": {"step": 4, "val_psnr": 4.0}, "measured": {"val_psnr": measured}}
        assert list(one) == list(other)


class Killed(BaseException):
    """Stands for the end of the process: no handler of exceptions catches it."""


def test_preview_that_was_interrupted_is_run_on_resuming(tmp_path):
    def run(name, values):
        measure = measuring(values)
        return line(tmp_path / name, 6, preview=lambda step: logger.logkv("val", step) or measure(step),
                    monitor="val_psnr", keep_checkpoints=1, early_stop={"val_psnr": 9.0}, formats=["csv"])

    def killed(step):
        raise Killed

    run("whole", [3.0, 2.0, 1.0])
    with pytest.raises(Killed):
        line(tmp_path / "killed", 6, preview=killed, monitor="val_psnr", keep_checkpoints=1)
    assert checkpoint_util.read_marker(tmp_path / "killed", 2)["preview_due"] is True
    line(tmp_path / "branch", 2, preview=killed, resume_checkpoint=str(tmp_path / "killed/model000002.pt"))
    shutil.copytree(tmp_path / "killed", tmp_path / "bound")
    assert run("killed", [3.0, 2.0, 1.0]).resume_step == 2
    for step in (2, 6):
        one, other = (checkpoint_util.read_marker(tmp_path / name, step) for name in ("whole", "killed"))
        assert one == other and one["best"] == {"step": 2, "val_psnr": 3.0}
    assert names_in(tmp_path / "whole") == names_in(tmp_path / "killed")
    with open(tmp_path / "killed/progress.csv", newline="") as stream:
        rows = [(row["step"], row["val"]) for row in csv.DictReader(stream)]
    assert rows == [("2", "2"), ("3", ""), ("4", "4"), ("5", ""), ("6", "6")]
    assert run("bound", [9.5]).step == 2


FAILURES = {
    "RuntimeError: no space": lambda: RuntimeError("no space"),
    "FloatingPointError: samples 0 to 1": lambda: FloatingPointError("samples 0 to 1 are not finite"),
    "out of memory: CUDA": lambda: torch.OutOfMemoryError("CUDA out of memory"),
    "out of memory: .*DefaultCPUAllocator": lambda: RuntimeError("DefaultCPUAllocator: not enough memory"),
}


@pytest.mark.parametrize("text", FAILURES)
def test_failing_preview_is_reported_once_and_changes_nothing(tmp_path, capsys, text):
    def preview(step):
        torch.rand(3)
        raise FAILURES[text]()

    line(tmp_path / "without", 6)
    loop = line(tmp_path / "with", 6, preview=preview, formats=["log"], monitor="val_psnr")
    assert loop.model.training and same_bits(loop.model.state_dict(), files_of(tmp_path / "with", 6)[0])
    for step in (2, 4, 6):
        assert same_bits(files_of(tmp_path / "with", step), files_of(tmp_path / "without", step))
        assert checkpoint_util.read_marker(tmp_path / "with", step) == checkpoint_util.read_marker(
            tmp_path / "without", step)
    log = (tmp_path / "with/log.txt").read_text()
    assert len(re.findall(f"validation of step 2 failed .{text}", log)) == log.count(" failed (") == 1
    assert log.count("set --preview_interval -1") == 1
    assert log.count("lower --microbatch") == text.startswith("out of memory")


def test_preview_that_fails_on_loading_the_ema_leaves_the_weights(tmp_path, monkeypatch):
    load, calls = torch.nn.Linear.load_state_dict, []

    def failing(network, state, *args, **options):
        result = load(network, state, *args, **options)
        calls.append(1)
        if len(calls) == 1:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return result

    line(tmp_path / "without", 4)
    monkeypatch.setattr(torch.nn.Linear, "load_state_dict", failing)
    line(tmp_path / "with", 4, preview=lambda step: None)
    monkeypatch.undo()
    assert same_bits(files_of(tmp_path / "with", 4), files_of(tmp_path / "without", 4))


def test_smoke_test_ends_in_the_error_of_its_preview(tmp_path):
    def preview(step):
        raise RuntimeError("no decoder")

    with pytest.raises(RuntimeError, match="no decoder"):
        line(tmp_path, 2, preview=preview, fast_dev_run=True)
    assert checkpoint_util.committed_steps(tmp_path) == [2]


def test_value_that_is_not_a_number_is_not_the_best(tmp_path):
    options = {"monitor": "val_psnr", "save_interval": 9, "preview_interval": 1, "keep_checkpoints": 1}
    line(tmp_path, 4, preview=measuring([math.nan, 2.0, math.nan, 1.0]), **options)
    assert checkpoint_util.committed_steps(tmp_path) == [2, 4]
    assert checkpoint_util.read_marker(tmp_path, 4)["best"] == {"step": 2, "val_psnr": 2.0}


def test_preview_interval_of_minus_one_runs_no_preview(tmp_path):
    def preview(step):
        raise AssertionError("preview")

    options = {"preview": preview, "preview_interval": -1, "fast_dev_run": True}
    assert line(tmp_path, 4, **options).step == 4
    assert checkpoint_util.committed_steps(tmp_path) == [2, 4]
    for config in (AutoencoderTrainConfig(preview_interval=-1, fast_dev_run=True),
                   ClassifierTrainConfig(eval_interval=-1).to_train_config()):
        assert resolve_train_config(config).preview_interval == -1
    with pytest.raises(ValueError, match="--preview_interval -1 and --stop_at_psnr or --stop_at_l1 are mutually excl"):
        line(tmp_path, 4, early_stop={"val_psnr": 1.0}, **options)
    with pytest.raises(ValueError, match="--preview_interval must be >= -1, got -2"):
        line(tmp_path, 4, preview_interval=-2)


@pytest.mark.parametrize("failing", ["csv", "tensorboard", "log", "stdout"])
def test_log_that_cannot_be_written_does_not_end_the_run(tmp_path, monkeypatch, capsys, failing):
    def fail(*args):
        raise OSError(28, "No space left on device")

    if failing == "tensorboard":
        pytest.importorskip("tensorboard")
    kinds = {"csv": logger.CSVOutputFormat, "tensorboard": logger.TensorBoardOutputFormat}
    make = logger.FORMATS[failing]

    def broken(*args):
        out = make(*args)
        assert isinstance(out, kinds.get(failing, logger.HumanOutputFormat))
        close = out.close
        out.writekvs = out.writeseq = fail
        out.close = lambda: close() or fail()
        return out

    line(tmp_path / "whole", 4)
    monkeypatch.setitem(logger.FORMATS, failing, broken)
    formats = ["stdout", "log", "csv", *(["tensorboard"] if failing == "tensorboard" else [])]
    line(tmp_path / "run", 4, formats=formats)
    logger.reset()
    assert same_bits(files_of(tmp_path / "whole", 4), files_of(tmp_path / "run", 4))
    texts = {"stdout": capsys.readouterr().out, "log": (tmp_path / "run/log.txt").read_text()}
    text = f"log format {failing} cannot be written to {tmp_path / 'run'} (OSError: [Errno 28] No space left on device)"
    for name, content in texts.items():
        assert content.count(text) == content.count("remove the format from OPENAI_LOG_FORMAT") == (name != failing)
        assert ("saving step 4" in content) == (name != failing)
    if failing != "csv":
        with open(tmp_path / "run/progress.csv", newline="") as stream:
            assert [row["step"] for row in csv.DictReader(stream)] == ["1", "2", "3", "4"]


def test_checkpoints_log_histograms_of_batch_and_weights(tmp_path, monkeypatch):
    logged = []
    monkeypatch.setattr(logger, "loghistogram", lambda key, tensors, step: logged.append(
        (key, [tuple(tensor.shape) for tensor in tensors], step)))
    logger.configure(str(tmp_path), [])
    create_loop(model=torch.nn.Sequential(torch.nn.Linear(3, 1)), objective=PlainObjective(squared_error),
                header=HEADER, data=Points(), max_steps=3, save_interval=2, batch_size=4, lr=0.1).run_loop()
    assert logged == [entry for step in (2, 3) for entry in (
        ("batch", [(4, 3)], step), ("weights/0", [(1, 3), (1,)], step))]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_signal_saves_the_step_and_ends_the_run(tmp_path, number):
    former = signal.getsignal(number)
    loop = line(tmp_path, 9, data=Points(hook=lambda step: step == 3 and os.kill(os.getpid(), number)))
    assert loop.step == 3 and checkpoint_util.committed_steps(tmp_path) == [2, 3]
    assert signal.getsignal(number) is former


def test_signal_skips_the_preview(tmp_path):
    def preview(step):
        raise AssertionError("preview")

    data = Points(hook=lambda step: step == 3 and os.kill(os.getpid(), signal.SIGTERM))
    assert line(tmp_path, 9, data=data, preview=preview, preview_interval=100).step == 3
    assert checkpoint_util.committed_steps(tmp_path) == [2, 3]


def test_loss_that_is_not_finite_ends_the_run_with_advice(tmp_path):
    with pytest.raises(FloatingPointError, match="the loss is nan at step 3; the last good .* is 2: lower --lr"):
        line(tmp_path, 9, data=Points(nan_at=2))


def test_weights_that_are_not_finite_are_not_saved(tmp_path):
    with pytest.raises(FloatingPointError, match="weights is nan at step 4; the last good .* is 2: .*grad_clip"):
        line(tmp_path, 9, data=Points(nan_at=2), save_interval=2, log_interval=10)
    assert checkpoint_util.committed_steps(tmp_path) == [2] and torch.isfinite(weights_in(tmp_path, 2)).all()


HALF = {"mixed_precision": True, "amp_dtype": "float16", "log_interval": 1000}


def test_step_whose_loss_is_not_finite_is_not_saved_and_the_last_good_one_kept(tmp_path):
    with pytest.raises(FloatingPointError, match="the loss is nan at step 4; the last good .* is 2: lower --lr"):
        line(tmp_path, 9, data=Points(nan_at=3), keep_checkpoints=1, **HALF)  # the step is skipped: weights are finite
    line(tmp_path / "other", 2, **HALF)
    assert checkpoint_util.committed_steps(tmp_path) == [2]
    assert same_bits(files_of(tmp_path, 2), files_of(tmp_path / "other", 2))


def test_ranks_meet_after_a_step_is_saved(tmp_path, monkeypatch):
    saved = []
    monkeypatch.setattr(dist_util, "barrier", lambda: saved.append(sorted(p.name for p in tmp_path.glob("model*"))))
    line(tmp_path, 4, save_interval=3)
    assert saved == [["model000003.pt"], ["model000003.pt", "model000004.pt"]]


def test_loss_that_is_not_finite_on_another_rank_is_not_saved(tmp_path, monkeypatch):
    loop = line(tmp_path, 2)
    loop.step += 1
    monkeypatch.setattr(dist_util, "world_size", lambda: 2)
    monkeypatch.setattr(dist_util, "gather_objects", lambda item: [item, math.inf])
    with pytest.raises(FloatingPointError, match="the loss is inf at step 3; the last good checkpoint is 2"):
        loop.save()
    assert checkpoint_util.committed_steps(tmp_path) == [2]


def test_run_ends_if_too_many_steps_in_a_row_are_skipped(tmp_path):
    line(tmp_path, 50, save_interval=1000, **HALF)
    with pytest.raises(FloatingPointError, match="overflowed in 100 steps in a row, the last one at step 150; the last "
                                                 "good checkpoint is 50: lower --lr, .* disable --use_fp16 / --mixed"):
        line(tmp_path, 400, data=Points(nan_at=range(50, 400)), save_interval=1000, keep_checkpoints=1, **HALF)
    assert checkpoint_util.committed_steps(tmp_path) == [50]


def test_run_ends_if_too_many_steps_of_the_discriminator_are_skipped(prepared, tmp_path):
    loop = train(prepared, tmp_path, "adversarial", 2)
    loop.discriminator.mp_trainer.skipped_steps = MAX_SKIPPED_STEPS
    with pytest.raises(FloatingPointError, match="overflowed in 100 steps in a row"):
        loop.run_step(*next(loop.data))


def test_log_contains_means_over_the_quarters_of_the_process(tmp_path):
    logger.configure(str(tmp_path), [])
    times = torch.tensor([0, 1, 2, 7])
    terms = {"loss": torch.tensor([1.0, 3.0, 5.0, 7.0]), "unweighted": torch.zeros(4)}
    DiffusionObjective(rank_worker.process()).log(torch.tensor([0.0, 4.0]), times // 2, terms)
    assert logger.dumpkvs() == {"x0_std": 2.0, "loss": 4.0, "loss_q0": 2.0, "loss_q1": 5.0, "loss_q3": 7.0}


def test_log_contains_the_steps_per_second_since_the_last_row(tmp_path, monkeypatch):
    seconds = [100.0]
    monkeypatch.setattr(time, "perf_counter", lambda: seconds[0])
    tick = lambda step: seconds.append(seconds.pop() + (0.25 if step <= 2 else 0.5))
    line(tmp_path, 4, data=Points(hook=tick), formats=["csv"], log_interval=2)
    with open(tmp_path / "progress.csv", newline="") as stream:
        assert [float(row["steps_per_second"]) for row in csv.DictReader(stream)] == pytest.approx([4, 2])


def test_log_counts_steps_and_samples(tmp_path):
    line(tmp_path, 4, formats=["csv"], log_interval=2)
    with open(tmp_path / "progress.csv", newline="") as stream:
        rows = list(csv.DictReader(stream))
    assert [(row["step"], row["samples"]) for row in rows] == [("2", "8"), ("4", "16")]
    assert {"loss", "grad_norm", "param_norm", "lr", "steps_per_second"} <= rows[0].keys()


# --- Checkpoints to resume from ---


def corrupt(path, how):
    if how == "missing":
        path.unlink()
    elif how == "truncated":
        path.write_bytes(path.read_bytes()[:-7])
    else:
        content = bytearray(path.read_bytes())
        content[len(content) // 2] ^= 1
        path.write_bytes(content)


@pytest.mark.parametrize("how", ["missing", "truncated", "another bit"])
@pytest.mark.parametrize("name", ["model000004.pt", "ema_0.9_000004.pt", "opt000004.pt", "state000004.json"])
def test_corrupt_step_is_reported_and_the_previous_one_resumed(tmp_path, capsys, name, how):
    line(tmp_path, 4)
    expected = files_of(tmp_path, 4)
    corrupt(tmp_path / name, how)
    loop = line(tmp_path, 4, formats=["stdout"])
    assert loop.resume_step == 2 and same_bits(files_of(tmp_path, 4), expected)
    if (name, how) != ("state000004.json", "missing"):  # a step without a marker does not exist
        assert f"checkpoint 4 of {tmp_path} cannot be used" in capsys.readouterr().out


def test_run_does_not_restart_if_all_steps_are_corrupt(tmp_path):
    line(tmp_path, 4)
    for step in (2, 4):
        corrupt(tmp_path / f"opt00000{step}.pt", "missing")
    with pytest.raises(ValueError, match=f"every checkpoint of {tmp_path} is corrupt; use another --logdir"):
        line(tmp_path, 6)


def test_files_of_an_interrupted_save_are_ignored(tmp_path, capsys):
    line(tmp_path, 2)
    shutil.copy(tmp_path / "model000002.pt", tmp_path / "model000004.pt")
    (tmp_path / ".model000005.pt.99.part").write_bytes(b"half")
    (tmp_path / ".state000005.json.99.part").write_text("{}")
    torch.save({"w": torch.ones(1)}, tmp_path / "model000006.pt")   # of another project
    assert line(tmp_path, 2).resume_step == 2
    assert sorted(path.name for path in tmp_path.glob("model*")) == ["model000002.pt", "model000006.pt"]
    (tmp_path / "state000002.json").unlink()
    assert line(tmp_path, 2, formats=["stdout"]).resume_step == 0
    assert "model000002.pt, model000006.pt but no marker" in capsys.readouterr().out


def test_resuming_keeps_the_step_that_it_loads_if_later_ones_are_corrupt(tmp_path):
    line(tmp_path, 4)
    (tmp_path / "model000004.pt").write_bytes(b"corrupt")
    assert line(tmp_path, 2, keep_checkpoints=1).resume_step == 2   # nothing is trained or saved
    assert checkpoint_util.committed_steps(tmp_path) == [2, 4]
    assert line(tmp_path, 6, keep_checkpoints=1).resume_step == 2
    assert checkpoint_util.committed_steps(tmp_path) == [6]


def test_resuming_from_an_ema_file_with_a_part_of_the_weights_raises(tmp_path):
    (tmp_path / "guided").mkdir()
    torch.save({"weight": torch.ones(1, 3), "bias": torch.ones(1)}, tmp_path / "guided/model000002.pt")
    torch.save({"weight": torch.ones(1, 3)}, tmp_path / "guided/ema_0.9_000002.pt")
    with pytest.raises(ValueError, match=r"ema_0.9_000002.pt has no weights bias \(1 in total\) of the model"):
        line(tmp_path / "run", 4, bias=True, resume_checkpoint=str(tmp_path / "guided/model000002.pt"))


def test_failed_save_leaves_no_files_and_the_steps_before_it(tmp_path, monkeypatch):
    line(tmp_path, 2)
    before, save = sorted(tmp_path.iterdir()), checkpoint_util.save

    def full_disk(path, content):
        if Path(path).name == "opt000004.pt":
            raise OSError(28, "No space left on device")
        return save(path, content)

    monkeypatch.setattr(checkpoint_util, "save", full_disk)
    with pytest.raises(OSError, match="No space left"):
        line(tmp_path, 4)
    assert sorted(tmp_path.iterdir()) == before and checkpoint_util.committed_steps(tmp_path) == [2]
    monkeypatch.undo()
    assert line(tmp_path, 4).resume_step == 2


def test_run_whose_folder_is_removed_ends_with_one_error(tmp_path):
    folder = tmp_path / "run"

    def remove(step):
        shutil.rmtree(folder)

    for save_interval, log_interval in ((2, 10), (4, 10), (10, 3)):     # noticed in the marker, a checkpoint, the log
        with pytest.raises(FileNotFoundError, match="run was removed during the run"):
            line(folder, 5, save_interval=save_interval, log_interval=log_interval, preview_interval=2, preview=remove)
        assert not folder.exists()


def test_resuming_another_configuration_names_the_differences(tmp_path):
    line(tmp_path, 2)
    with pytest.raises(ValueError, match="model.width is 4 now, 3 in the checkpoint.*set the same flags again"):
        line(tmp_path, 4, header={"kind": "line", "model": {"width": 4}})
    with pytest.raises(ValueError, match="kind is 'curve' now, 'line' in the checkpoint"):
        line(tmp_path, 4, header={"kind": "curve"})
    with pytest.raises(ValueError, match=r"does not match the model .*bias: expected \(1,\), got nothing"):
        line(tmp_path, 4, bias=True)
    with pytest.raises(FileNotFoundError, match="ema_0.5_000002.pt does not exist; --ema_rate must list rates"):
        line(tmp_path, 4, ema_rate="0.5")


def test_run_branches_off_a_checkpoint_of_another_run(tmp_path):
    line(tmp_path / "a", 4)
    loop = line(tmp_path / "b", 4, resume_checkpoint=str(tmp_path / "a/model000002.pt"))
    assert loop.resume_step == 2 and same_bits(files_of(tmp_path / "a", 4), files_of(tmp_path / "b", 4))
    # The same command resumes its own steps; in the folder of the other run it would overwrite steps.
    assert line(tmp_path / "b", 6, resume_checkpoint=str(tmp_path / "a/model000002.pt")).resume_step == 4
    with pytest.raises(ValueError, match="contains step 4, which is later than .*model000002.pt; .* another --logdir"):
        line(tmp_path / "a", 6, resume_checkpoint=str(tmp_path / "a/model000002.pt"))
    assert line(tmp_path / "b", 6, resume_checkpoint="auto").resume_step == 6


def test_same_branching_command_resumes_its_own_steps(tmp_path):
    line(tmp_path / "a", 4)
    again = lambda: line(tmp_path / "b", 6, resume_checkpoint=str(tmp_path / "a/model000002.pt"))
    assert again().resume_step == 2 and checkpoint_util.committed_steps(tmp_path / "b") == [4, 6]
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    assert again().resume_step == 6
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before


def test_run_without_logdir_branches_off_the_given_checkpoint(tmp_path, monkeypatch):
    line(tmp_path / "a", 2)
    logger.reset()
    monkeypatch.chdir(tmp_path)
    run = Run("image_train", [RunConfig(), TrainConfig(resume_checkpoint=str(tmp_path / "a/model000002.pt"))], {})
    with contextlib.ExitStack() as held:
        run.open_folder(True, held)
    assert run.checkpoint[0]["step"] == 2 and run.checkpoint[1] == tmp_path / "a" != run.folder


def test_find_checkpoint_prefers_later_steps_of_the_folder(tmp_path):
    for folder, steps in (("a", 4), ("b", 2)):
        line(tmp_path / folder, steps)
    find = lambda name: find_checkpoint(tmp_path / "b", name if name == "auto" else str(tmp_path / name))
    assert [(marker["step"], folder.name) for marker, folder in map(find, (
        "auto", "a/model000002.pt", "a/model000004.pt", "b/model000002.pt"
    ))] == [(2, "b"), (2, "a"), (4, "a"), (2, "b")]
    line(tmp_path / "b", 6)
    assert [(marker["step"], folder.name) for marker, folder in map(find, (
        "auto", "a/model000002.pt", "a/model000004.pt", "b/model000006.pt"
    ))] == [(6, "b")] * 4
    with pytest.raises(ValueError, match="b contains step 6, which is later than .*b/model000002.pt; to branch off"):
        find("b/model000002.pt")
    assert find_checkpoint(tmp_path / "none", "auto") == find_checkpoint(tmp_path / "none") == (None, tmp_path / "none")


@pytest.mark.parametrize("change, text", [
    ({"seed": 1}, "seed is 1 now and was 0 until step 2"),
    ({"batch_size": 2}, "global_batch is 2 now and was 4 until step 2"),
])
def test_resuming_with_another_seed_or_batch_warns(tmp_path, capsys, change, text):
    line(tmp_path, 2)
    line(tmp_path, 2, formats=["stdout"])
    assert "the run differs" not in capsys.readouterr().out
    line(tmp_path, 2, formats=["stdout"], **change)
    assert f"{text}: from here on the run differs from an uninterrupted one" in capsys.readouterr().out


def test_initial_weights_depend_only_on_the_seed():
    def weights(seed, before):
        torch.rand(before)  # other code may have used random numbers before
        seed_initialization(seed)
        return torch.nn.Linear(3, 2).weight.tolist()

    assert weights(0, 1) == weights(0, 5) != weights(1, 1)
    script = ("import torch; from guided_diffusion_vae.train_util import seed_initialization; seed_initialization(0);"
              "print(torch.nn.Linear(3, 2).weight.tolist())")
    elsewhere = FORKS.run_source(script)
    assert elsewhere.stdout == f"{weights(0, 2)}\n", elsewhere.stderr


@pytest.mark.parametrize("options, problem", [
    ({"ema_rate": "0.9,often"}, "--ema_rate must be .* got '0.9,often'"),
    ({"ema_rate": "1"}, "--ema_rate must be .* got '1'"),
    ({"ema_rate": "0.9,-0.1"}, r"numbers in \[0, 1\)"), ({"batch_size": 0}, "--batch_size must be >= 1, got 0"),
    ({"save_interval": 0}, "--save_interval must be >= 1, got 0"),
    ({"log_interval": -1}, "--log_interval must be >= 1, got -1"),
])
def test_options_out_of_bounds_are_rejected_by_flag(tmp_path, options, problem):
    with pytest.raises(ValueError, match=problem):
        line(tmp_path, 2, **options)


def test_errors_about_a_checkpoint_to_resume_from_name_init_from(tmp_path):
    line(tmp_path / "run", 4)
    names = "best.pt", "opt000009.pt", "ema_0.9_000009.pt", "model000009.pt"
    for name in names:      # files of another project, without markers
        torch.save({"weight": torch.zeros(1, 5)}, tmp_path / name)

    def problem_of(resume_checkpoint, logdir="new", **options):
        with pytest.raises((FileNotFoundError, ValueError)) as caught:
            line(tmp_path / logdir, 6, resume_checkpoint=str(resume_checkpoint), **options)
        text, hint = str(caught.value), "; to start from these weights, use --init_from"
        assert text.count("--init_from") == 1 and text.endswith(hint)
        return text

    last = tmp_path / "run/model000004.pt"
    assert "model000006.pt does not exist" in problem_of(tmp_path / "run/model000006.pt")
    assert "run is a folder; --resume_checkpoint expects a model file" in problem_of(tmp_path / "run")
    assert "expects a file named like" in problem_of(tmp_path / "best.pt")
    assert "which is later than" in problem_of(tmp_path / "run/model000002.pt", "run")
    assert "another configuration" in problem_of(last, header={**HEADER, "kind": "classifier"})
    assert "weight: expected (1, 3), got (1, 5)" in problem_of(tmp_path / "model000009.pt")
    assert "ema_0.5_000004.pt does not exist; --ema_rate must" in problem_of(last, ema_rate="0.5")
    torch.save({"weight": torch.zeros(1, 3)}, tmp_path / "model000009.pt")
    assert "ema_0.9_000009.pt has no weights in common" in problem_of(tmp_path / "model000009.pt")
    assert "opt000009.pt: " in problem_of(tmp_path / "model000009.pt", ema_rate="")
    (tmp_path / "opt000009.pt").unlink()
    assert "opt000009.pt does not exist" in problem_of(tmp_path / "model000009.pt", ema_rate="")
    corrupt(tmp_path / "run" / "opt000004.pt", "missing")
    assert "opt000004.pt is missing" in problem_of(last)
    with pytest.raises(ValueError, match="is 'classifier' now.*another --logdir$"):     # nothing was set
        line(tmp_path / "run", 6, header={**HEADER, "kind": "classifier"})


def test_incomplete_or_renamed_checkpoint_is_rejected(tmp_path):
    line(tmp_path, 4)
    resume = lambda name: line(tmp_path / "other", 6, resume_checkpoint=str(tmp_path / name))
    with pytest.raises(FileNotFoundError, match="model000006.pt does not exist; --resume_checkpoint"):
        resume("model000006.pt")
    (tmp_path / "best.pt").write_bytes((tmp_path / "model000004.pt").read_bytes())
    with pytest.raises(ValueError, match="best.pt: --resume_checkpoint expects a file named like"):
        resume("best.pt")
    for kind in ("model", "opt", "ema_0.9_"):
        (tmp_path / f"{kind}000003.pt").write_bytes((tmp_path / f"{kind}000004.pt").read_bytes())
    with pytest.raises(ValueError, match="model000003.pt contains step 4: the file was renamed"):
        resume("model000003.pt")
    corrupt(tmp_path / "opt000004.pt", "missing")
    with pytest.raises(ValueError, match="opt000004.pt is missing"):
        resume("model000004.pt")
    assert not list((tmp_path / "other").glob("*.pt"))


def test_checkpoint_without_marker_requires_all_its_files(tmp_path):
    """Checkpoints of guided-diffusion have neither."""
    line(tmp_path / "own", 2)
    for name in ("model000002.pt", "ema_0.9_000002.pt", "opt000002.pt"):
        content = torch.load(tmp_path / "own" / name, weights_only=True)
        if hasattr(content, "_metadata"):
            del content._metadata
        torch.save(content, tmp_path / name)
    resume = lambda: line(tmp_path / "new", 4, resume_checkpoint=str(tmp_path / "model000002.pt"))
    assert find_checkpoint(tmp_path, str(tmp_path / "model000002.pt")) == ({"step": 2}, tmp_path)
    corrupt(tmp_path / "opt000002.pt", "missing")
    with pytest.raises(FileNotFoundError, match="opt000002.pt does not exist; check --resume_checkpoint"):
        resume()
    shutil.copy(tmp_path / "own/opt000002.pt", tmp_path)
    assert resume().resume_step == 2
    line(tmp_path / "own", 4)
    assert same_bits(files_of(tmp_path / "new", 4), files_of(tmp_path / "own", 4))


@pytest.mark.parametrize("name, step", [
    ("runs/a/model000123.pt", 123), ("model1000000.pt", 1000000), ("ema_0.9999_000100.pt", 0), ("model.pt", 0),
])
def test_step_is_parsed_from_the_name_of_the_model_file(name, step):
    assert parse_resume_step_from_filename(name) == step


def test_saved_network_loads_with_plain_load_state_dict(one_rank, prepared):
    for name in (checkpoint_util.model_name(END), checkpoint_util.ema_name(0.9, END)):
        weights = torch.load(prepared / "1/cached-full" / name, weights_only=True)
        rank_worker.unet().load_state_dict(weights)
        assert checkpoint_util.load_weights(prepared / "1/cached-full" / name)[1] == {
            "format": 1, "kind": "cached", "step": END
        }
    assert GLOBAL_BATCH == checkpoint_util.read_marker(prepared / "1/cached-full", END)["global_batch"]
