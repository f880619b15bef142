import ctypes
import dataclasses
import itertools
import re
from types import SimpleNamespace

import pytest
import torch

import guided_diffusion_vae
from guided_diffusion_vae import dist_util, logger
from guided_diffusion_vae.autoencoder import AutoencoderConfig, create_autoencoder
from guided_diffusion_vae.checkpoint_util import save_weights
from guided_diffusion_vae.config import as_dict, validate
from guided_diffusion_vae.evaluation import ReconstructionValidation
from guided_diffusion_vae.gaussian_diffusion import DiffusionConfig
from guided_diffusion_vae.runs import memory, planning
from guided_diffusion_vae.runs.factories import create_model_and_diffusion_vae
from guided_diffusion_vae.runs.memory import GIB, Estimate
from guided_diffusion_vae.runs.planning import PlanConfig, advice, estimated, memory_savings
from guided_diffusion_vae.runs.training import AutoencoderPlan, DiffusionPlan
from guided_diffusion_vae.train_util import (
    AutoencoderTrainConfig, DiffusionTrainConfig, TrainLoop, TrainTask, resolve_train_config,
)
from guided_diffusion_vae.unet import ModelConfig, SuperResConfig
from guided_diffusion_vae.vae.objective import AutoencoderObjective, DiscriminatorTrainer
from guided_diffusion_vae.vae import AutoencoderLossConfig, DiscriminatorConfig
from guided_diffusion_vae.vae_wrapper import PixelCodec, VAEInterface

NETWORK = AutoencoderConfig(num_channels=(16, 32), downsample_factors=(4,), attention_levels=(False, True))


ESTIMATES = {}


@pytest.fixture
def remembered(monkeypatch):
    """Compute the training of each plan once: reports and advice plan the same networks again and again."""
    compute = planning.Plan.training

    def training(plan):
        text = str(plan)    # contains all of its values
        if text not in ESTIMATES:
            ESTIMATES[text] = compute(plan)
        return ESTIMATES[text]

    monkeypatch.setattr(planning.Plan, "training", training)


def autoencoder_plan(shape=(1, 32, 32), network=None, train=None, **discriminator_config):
    return AutoencoderPlan(shape, dataclasses.replace(NETWORK, **(network or {})), AutoencoderTrainConfig(
        **{"batch_size": 2, **(train or {})}), AutoencoderLossConfig(), DiscriminatorConfig(**discriminator_config))


def diffusion_plan(train=None, super_res=None, low_res_shape=None, **model):
    flags = {"num_channels": 32, "channel_mult": "1,2", "num_res_blocks": 1, "attention_resolutions": "8", **model}
    return DiffusionPlan((4, 16, 16), ModelConfig(**flags), DiffusionTrainConfig(**{"batch_size": 2, **(train or {})}),
                         DiffusionConfig(), super_res, low_res_shape)


def actually_saved(network, forward):
    """Return the bytes of distinct storages that autograd saves in a real run, and of the result."""
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        result = forward(network)
    weights = {p.untyped_storage().data_ptr() for p in network.parameters()}
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in [*saved, *result]}
    return sum(size for address, size in storages.items() if address not in weights)


@pytest.mark.parametrize("flags", [
    {}, {"recompute_norms": True}, {"initial_downsample_factor": 2}, {"space_to_channel": True},
    {"initial_downsample_factor": 2, "final_upsample": "shuffle"}, {"spatial_dims": 3, "downsample_factors": (2,)},
])
def test_activations_of_an_autoencoder_equal_saved_tensors(flags):
    config = dataclasses.replace(NETWORK, in_channels=1, **flags)
    shape = (2, 1, 16, 16, 16) if config.spatial_dims == 3 else (2, 1, 64, 64)
    forward = lambda network: network(torch.zeros(shape), torch.zeros(2, *network.latent_shape(shape[2:])))
    expected = actually_saved(create_autoencoder(config), forward)
    layers = memory.saved_activations(create_autoencoder(config), forward)
    assert sum(layers.values()) == pytest.approx(expected, rel=0.02)
    assert layers["encoder.blocks.0.conv"] > 0


@pytest.mark.parametrize("class_cond", [False, True])
def test_activations_of_a_unet_equal_saved_tensors(class_cond):
    classes = {"class_cond": True, "num_classes": 3} if class_cond else {}
    model = ModelConfig(num_channels=32, channel_mult="1,2", num_res_blocks=1, attention_resolutions="8", **classes)
    build = lambda: create_model_and_diffusion_vae((3, 16, 16), model, DiffusionConfig())[0]
    labels = {"y": torch.zeros(2, dtype=torch.long)} if class_cond else {}
    forward = lambda network: [network(torch.zeros(2, 3, 16, 16), torch.zeros(2, dtype=torch.long), **labels)]
    assert sum(memory.saved_activations(build(), forward).values()) == pytest.approx(
        actually_saved(build(), forward), rel=0.02
    )


@pytest.mark.parametrize("plan", [
    autoencoder_plan(), autoencoder_plan(network={"recompute_norms": True}),
    autoencoder_plan(network={"use_checkpointing": True}), autoencoder_plan(discriminator_weight=0.5,
                                                                            discriminator_layers=1),
    diffusion_plan(), diffusion_plan(use_checkpoint=True),
    diffusion_plan(super_res=SuperResConfig(), low_res_shape=(4, 8, 8)),
    diffusion_plan(class_cond=True, num_classes=4),
    *(plan(train={"mixed_precision": True}, **flags) for plan, flags in [
        (autoencoder_plan, {}), (autoencoder_plan, {"network": {"recompute_norms": True}}), (diffusion_plan, {}),
        (autoencoder_plan, {"network": {"use_checkpointing": True}}), (diffusion_plan, {"recompute_norms": True}),
    ]),
], ids=str)
def test_plan_equals_the_peak_of_a_real_step(plan, monkeypatch):
    planned = plan.training()
    monkeypatch.setattr(memory, "_fake", memory._like_cuda)
    monkeypatch.setattr(memory, "_with_fake_parameters", lambda network: network.to_empty(device="cpu"))
    run = plan.training()
    assert planned.peak == pytest.approx(run.peak, rel=0.02)
    assert planned.activations == pytest.approx(run.activations, rel=0.02)
    assert planned.gradients == run.gradients == planned.parameters


@pytest.mark.parametrize("discriminator_config", [{}, {"discriminator_weight": 0.5}])
def test_accumulation_holds_one_forward_pass_at_a_time(discriminator_config, tmp_path):
    def peak(parts):
        plan = autoencoder_plan((1, 64, 64), train={"batch_size": 1, "gradient_accumulation_steps": parts},
                                **discriminator_config, discriminator_start=0, discriminator_channels=8,
                                discriminator_layers=1)
        network, *networks = plan.build()
        train = resolve_train_config(plan.train)
        trainer = DiscriminatorTrainer(*networks, plan.discriminator_config, train) if networks else None
        with logger.scoped_configure(str(tmp_path), []):
            loop = TrainLoop(
                model=network, data=iter(()), batch_size=train.batch_size, microbatch=train.microbatch, lr=1e-4,
                ema_rate="",
                task=TrainTask(AutoencoderObjective(plan.loss, network, (-1, 1), train, discriminator=trainer)),
            )
            batch = torch.rand(parts, 1, 64, 64)
            with memory._StorageTracker(network, *networks) as tracker:
                loop.run_step(batch, {})
        return tracker.peak, plan.training()

    for parts in (1, 8):
        actual, planned = peak(parts)
        # Earlier storages are not counted; from the second pass on there are gradients in addition to activations.
        assert actual <= 1.02 * (planned.peak - planned.parameters - planned.averages), parts


class Images:
    """Four random images, as much of a source as validation reads."""

    shape = unpadded_shape = (1, 64, 64)

    def __len__(self):
        return 4

    def batch(self, indices):
        return torch.rand(len(indices), *self.shape)


def test_validation_of_an_autoencoder_is_counted_in_float32(tmp_path):
    plan = autoencoder_plan(Images.shape, train={"mixed_precision": True})
    estimate = plan.training()
    network = create_autoencoder(plan.network).eval()
    validation = ReconstructionValidation(network, (-1, 1), Images(), 4, tmp_path, "cpu", plan.forward_size)
    with logger.scoped_configure(str(tmp_path), []), memory._StorageTracker(network) as tracker:
        validation(0)
    assert tracker.peak + estimate.parameters == pytest.approx(estimate.preview, rel=0.05)
    assert plan.with_flags(preview_interval=-1).training().preview == 0


def test_previews_of_a_diffusion_model_count_samples_decoder_and_its_weights(tmp_path):
    network = create_autoencoder(dataclasses.replace(NETWORK, in_channels=1))
    header = {"kind": "autoencoder", "autoencoder": as_dict(dataclasses.replace(NETWORK, in_channels=1))}
    save_weights(tmp_path / "vae.pt", network.state_dict(), header)
    plan = diffusion_plan(train={"batch_size": 1})
    small, alone = dataclasses.replace(plan, codec=PixelCodec(4)).training(), plan.training()
    assert alone.preview == alone.codec == 0    # without an autoencoder
    model = plan.build()[0].eval()
    with memory._StorageTracker(model) as tracker, torch.no_grad():
        model(torch.zeros(16, 4, 16, 16), torch.zeros(16))
    assert small.preview == pytest.approx(tracker.peak + small.parameters, rel=0.02)
    # In addition to weights, gradients, AdamW and EMA weights; a step with a single sample takes less.
    assert small.peak == small.parameters * 5 + small.preview > alone.peak and " of a preview" in small.summary()

    codec = VAEInterface(tmp_path / "vae.pt", device="cpu")
    plan = dataclasses.replace(plan.with_flags(batch_size=16), codec=codec)
    whole = plan.training()
    assert whole.codec == codec.nbytes == sum(p.nbytes for p in network.parameters())
    with memory._StorageTracker(model) as tracker:
        codec.decode_batch(torch.zeros(16, 4, 16, 16))
    assert whole.preview == pytest.approx(tracker.peak + whole.parameters, rel=0.02)
    assert " of a preview" not in whole.summary()
    codec.max_side = 32     # below 64 pixels: slab by slab
    assert plan.training().preview == small.preview
    upsampler = dataclasses.replace(plan, super_res=SuperResConfig(), low_res_shape=(4, 8, 8))
    for other in (upsampler, plan.with_flags(fsdp=True), plan.with_flags(preview_interval=-1)):
        assert not other.has_previews


def test_half_precision_has_weights_and_master_weights():
    full, half = (diffusion_plan(use_fp16=use_fp16).training() for use_fp16 in (False, True))
    assert half.parameters == full.parameters and 0.5 < half.copies / half.parameters < 0.6
    assert half.gradients == half.copies and half.activations < 0.7 * full.activations
    small = diffusion_plan(use_fp16=True, train={"batch_size": 1})
    small = dataclasses.replace(small, shape=(4, 4, 4)).training()
    # The workspace holds the gradients of the master weights.
    assert small.activations + small.workspace == pytest.approx(small.parameters, rel=1e-3)


def test_parts_follow_from_the_parameters():
    plan = autoencoder_plan(train={"ema_rate": "0.9,0.99", "optimizer": "adamw8bit"})
    network = create_autoencoder(plan.network)
    count = sum(p.numel() for p in network.parameters())
    estimate = plan.training()
    assert estimate.parameters == estimate.gradients == 4 * count
    assert estimate.averages == 8 * count and 2 * count <= estimate.optimizer <= 2.1 * count
    assert sum(estimate.layers.values()) == estimate.activations


def test_autocast_halves_convolutions_but_not_norms():
    plain, half = autoencoder_plan(), autoencoder_plan(train={"mixed_precision": True})
    a, b = plain.training().layers, half.training().layers
    assert b["decoder.blocks.0.conv"] < 0.6 * a["decoder.blocks.0.conv"]
    norms = [name for name in a if name.endswith("norm1")]
    assert norms and all(b[name] >= a[name] for name in norms)


def test_savings_are_ordered_from_harmless_to_another_network(remembered):
    steps = list(memory_savings(autoencoder_plan(train={"batch_size": 4})))
    assert [list(step.latest) for step in steps] == [
        [], ["mixed_precision"], ["recompute_norms"], ["batch_size", "gradient_accumulation_steps"],
        ["batch_size", "gradient_accumulation_steps"], ["use_checkpointing"], ["optimizer"],
        ["initial_downsample_factor", "downsample_factors", "final_upsample"],
        ["initial_downsample_factor", "downsample_factors", "final_upsample"],
    ]
    assert steps[4].flags["batch_size"] == 1 and steps[4].flags["gradient_accumulation_steps"] == 4
    same, smaller = (create_autoencoder(step.plan.network).factors for step in steps[-2:])
    assert same == (4, 4) and smaller == (8, 8)
    assert "--initial_downsample_factor 2 --downsample_factors [2]" in str(steps[-2])
    sizes = [estimate.required for _, estimate in estimated(autoencoder_plan((1, 128, 128), train={"batch_size": 4}))]
    assert sizes == sorted(sizes, reverse=True)


def test_float16_networks_are_not_advised_to_use_mixed_precision():
    float32, float16 = (list(memory_savings(diffusion_plan(use_fp16=use_fp16))) for use_fp16 in (False, True))
    assert any("mixed_precision" in saving.latest for saving in float32)
    assert not any("mixed_precision" in saving.latest for saving in float16)


def test_compiled_networks_are_not_advised_to_recompute_norms():
    steps = memory_savings(autoencoder_plan(train={"batch_size": 1, "compile": True}))
    assert not any("recompute_norms" in step.latest for step in steps)


@pytest.mark.parametrize("batch_size, parts", [(6, [(3, 2), (1, 6)]), (7, [(1, 7)])])
def test_savings_keep_the_samples_per_step(batch_size, parts):
    steps = memory_savings(autoencoder_plan(train={"batch_size": batch_size}))
    assert [tuple(step.latest.values()) for step in steps if "batch_size" in step.latest] == parts


def test_savings_start_from_the_configured_microbatch():
    plan = diffusion_plan(train={"batch_size": 8, "microbatch": 2, "mixed_precision": True})
    assert plan.forward_size == 2
    assert [step.latest for step in memory_savings(plan) if "microbatch" in step.latest] == [{"microbatch": 1}]


def test_advice_is_the_least_lossy_saving_that_fits(remembered):
    plan = autoencoder_plan((1, 128, 128), train={"batch_size": 4})
    required = [estimate.required for _, estimate in estimated(plan)]
    assert "--mixed_precision True would take" in advice(plan, required[1])
    assert "--mixed_precision True --recompute_norms True would take" in advice(plan, required[2])
    assert "no flag brings" in advice(plan, 0.1 * GIB)
    on_cpu = [estimate.resident for _, estimate in estimated(plan)]
    assert f"about {on_cpu[0] / GIB:.1f} GiB as configured" in advice(plan, on_cpu[1], "cpu")


def test_memory_of_a_cpu_includes_freed_memory_that_is_kept():
    estimate, ratio = Estimate(parameters=GIB), 2.6 if guided_diffusion_vae.KEEPS_FREED_MEMORY else 1.5
    assert estimate.resident == estimate.required_on("cpu") == 0.25 * GIB + ratio * GIB
    assert estimate.required_on("cuda") == estimate.required
    assert estimate.fits(1.7 * GIB) and not estimate.fits(1.7 * GIB, "cpu") and estimate.fits(3 * GIB, "cpu")
    assert f"up to {estimate.resident / GIB:.2f} resident on a CPU" in estimate.summary()


def test_estimate_includes_the_overhead_of_a_gpu():
    estimate = Estimate(parameters=GIB)
    assert estimate.required > 1.5 * GIB and estimate.fits(2 * GIB) and not estimate.fits(1.2 * GIB)


def test_strides_that_do_not_divide_the_size_are_skipped(remembered):
    assert [saving.latest for saving, _ in estimated(autoencoder_plan((1, 36, 36)))][-1] != {}
    assert len(list(estimated(autoencoder_plan((1, 36, 36))))) == len(list(memory_savings(autoencoder_plan()))) - 1


def test_report_lists_parts_layers_and_budgets(remembered):
    lines = list(planning.report(autoencoder_plan(), [1, 3], [12.0, 0.61]))
    text = "\n".join(lines)
    assert lines[0].startswith("initial=1, layers=(4,), total downsampling: 4x: 1x32x32 (0.00 MiB) -> 4x8x8")
    assert "MiB  decoder.blocks." in text and "as configured" in text
    alone = text.split("with one change:")[1].split("\n\n")[0]
    assert "--gradient_accumulation_steps 2" in alone and "--initial_downsample_factor 2" in alone
    assert "least lossy within 12 GiB: as configured" in text and "least lossy within 0.61 GiB" in text
    for changes in ("--mixed_precision True", "--recompute_norms True", "--use_checkpointing True"):
        assert sum(line.endswith(changes) for line in lines) == 2  # alone, and with all before it


def test_report_is_exact_for_every_batch_size():
    """Large inputs are recomputed in slices, so that memory does not grow in proportion."""
    plan = autoencoder_plan((1, 256, 256), {"recompute_norms": True}, train={"batch_size": 2})
    row = next(line for line in planning.report(plan, [1, 16], [12.0]) if line.endswith("  as configured"))
    exact = [plan.with_flags(batch_size=n).training().required / GIB for n in (1, 16)]
    assert [float(n) for n in re.findall(r"[\d.]+", row)] == pytest.approx(exact, abs=0.01)


def test_encoding_is_planned_in_its_own_precision(remembered):
    plan = autoencoder_plan((1, 128, 128), train={"mixed_precision": True})
    report = planning.report(plan, [1, 8], [12.0])
    lines = list(itertools.takewhile(lambda line: "by samples per forward pass" not in line, report))
    assert plan.inference("decoding").workspace > 1.1 * plan.inference("decoding", torch.bfloat16).workspace
    for name in ("encoding", "decoding"):
        for dtype in (torch.float32, torch.bfloat16):
            row = next(line for line in lines if line.endswith(f"{name}, --vae_dtype {str(dtype)[6:]}"))
            exact = [plan.with_flags(batch_size=n).inference(name, dtype).required / GIB for n in (1, 8)]
            assert [float(n) for n in row.split()[:2]] == pytest.approx(exact, abs=0.01)


@pytest.mark.parametrize("levels", [16, (16,)])
def test_single_level_autoencoders_can_be_planned(levels):
    plan = autoencoder_plan(network={"num_channels": levels, "downsample_factors": (), "attention_levels": ()})
    assert any("--initial_downsample_factor 2 --final_upsample shuffle" in line
               for line in planning.report(plan, [1], [12.0]))


@pytest.mark.parametrize("fail", [lambda: torch.empty(2**60), lambda: (_ for _ in ()).throw(
    torch.OutOfMemoryError("CUDA out of memory"))])
def test_out_of_memory_errors_carry_advice(fail):
    def run():
        result = fail()
        next(result)

    with pytest.raises(torch.OutOfMemoryError, match="^give less than [0-9]+; .*(memory)"):
        with dist_util.oom_advice(lambda budget: f"give less than {budget}"):
            run()


def test_other_errors_are_unchanged():
    with pytest.raises(RuntimeError, match="^shapes differ$"):
        with dist_util.oom_advice(lambda budget: "advice"):
            raise RuntimeError("shapes differ")


@pytest.mark.parametrize("flags", [{"budget_gb": "12,none"}, {"budget_gb": "0"}, {"plan_batch_sizes": ""},
                                   {"plan_batch_sizes": "1.5"}])
def test_plan_config_rejects_other_than_positive_numbers(flags):
    with pytest.raises(ValueError, match=f"--{next(iter(flags))} must be .* > 0, such as .*, got"):
        validate(PlanConfig(**flags))


# --- The allocator ---


@pytest.mark.parametrize("environ", [
    {"MALLOC_ARENA_MAX": "2"}, {"LD_PRELOAD": "libjemalloc.so.2"}, {"GLIBC_TUNABLES": "glibc.malloc.tcache_count=0"},
    {"GDVAE_KEEP_MEMORY": "0"},
])
def test_a_configured_allocator_is_not_changed(environ, monkeypatch):
    monkeypatch.setattr(ctypes, "CDLL", lambda name: pytest.fail("glibc is configured"))
    assert guided_diffusion_vae._keep_freed_memory(environ) is False


def test_freed_memory_is_kept_by_glibc(monkeypatch):
    calls = []
    libc = SimpleNamespace(gnu_get_libc_version=None, mallopt=lambda option, value: calls.append((option, value)) or 1)
    monkeypatch.setattr(ctypes, "CDLL", lambda name: libc)
    assert guided_diffusion_vae._keep_freed_memory({"PATH": "/bin", "GDVAE_KEEP_MEMORY": "1"}) is True
    assert calls == [(-4, 0), (-1, 512 * 2**20)]    # M_MMAP_MAX and M_TRIM_THRESHOLD of malloc.h
    del libc.gnu_get_libc_version   # musl
    assert guided_diffusion_vae._keep_freed_memory({}) is False and len(calls) == 2
