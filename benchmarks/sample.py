"""Time one sampling step, plain and with classifier guidance, runs that write samples, and compare 50-step DDIM runs.

    OMP_NUM_THREADS=1 python benchmarks/sample.py --reference ../guided-diffusion
    OMP_NUM_THREADS=1 python benchmarks/sample.py --reference ../guided-diffusion --whole_runs 3
    OMP_NUM_THREADS=1 TORCHINDUCTOR_COMPILE_THREADS=1 python benchmarks/sample.py --size radar64 --compile_too True
    OMP_NUM_THREADS=1 python benchmarks/sample.py --written_runs 7

Both sides start from the same weights and the same noise. --whole_runs times runs of equal sample quality on the radar
model of docs/results.md: 250 ancestral steps of the baseline, and 15 steps of dpmpp_sde here. --written_runs times what
image_sample_vae.py does: 15 steps, decoding, and files of two batches of that model; "sampling thread" is the part that
the next batch waits for.
"""

import copy
import dataclasses
import functools
import os
import statistics
import tempfile
import time
from pathlib import Path

import common
import torch
import torch.nn.functional as F
from encode import random_network
from train_step import SIZES, reference_unet

from guided_diffusion_vae.autoencoder import AutoencoderConfig
from guided_diffusion_vae.config import as_dict, option
from guided_diffusion_vae.gaussian_diffusion import DiffusionConfig
from guided_diffusion_vae.runs.factories import create_classifier, create_model_and_diffusion_vae, create_diffusion
from guided_diffusion_vae.sampling.guidance import classifier_cond_fn
from guided_diffusion_vae.sampling import Sampler, SamplingConfig, generate_samples, multistep_sample_loop
from guided_diffusion_vae.unet import ClassifierConfig, ModelConfig
from guided_diffusion_vae.vae_wrapper import LatentNormalizer, VAEConfig, create_vae

# Of an earlier configs/microdoppler_small.yaml (latents 4x16x16), and the steps of dpmpp_sde that suffice for it.
AUTOENCODER, STEPS = AutoencoderConfig(in_channels=3, num_channels=(32, 64, 128), num_res_blocks=(3, 1, 1)), 15
ANCESTRAL_STEPS = 250   # of the baseline
CLASSIFIER = dict(classifier_channel_mult="1,2,2", classifier_attention_resolutions="8", classifier_in_channels=4,
                  classifier_num_classes=6)


@dataclasses.dataclass
class SampleConfig:
    SECTION = "benchmark"

    size: str = option("16m122", "latent grid and network", choices=tuple(SIZES))
    bench_batch_size: int = option(16, "batch size")
    whole_runs: int = option(0, "measurements of whole runs of 250 and of 15 steps; 0: disabled")
    compile_too: bool = option(False, "also measure steps of the compiled network, and when they pay off")
    written_runs: int = option(0, "measurements of runs of 15 steps that write their samples; 0: disabled")


def main():
    (bench, comparison, config), device = common.configure(__doc__, common.ComparisonConfig, SampleConfig)
    shape, flags = SIZES[config.size]
    network, _ = create_model_and_diffusion_vae(shape, ModelConfig(**flags), DiffusionConfig())
    spaced = functools.cache(lambda steps: create_diffusion(DiffusionConfig(timestep_respacing=steps)))
    common.randomize_zero_parameters(network).eval()
    classifier = create_classifier(shape[-1], **as_dict(ClassifierConfig(**CLASSIFIER)))
    common.randomize_zero_parameters(classifier).eval()
    weights = network.state_dict(), classifier.state_dict()
    x = torch.randn(config.bench_batch_size, *shape, generator=torch.Generator().manual_seed(0)).to(device)
    labels = torch.arange(len(x), device=device) % 6

    sides = {}
    if comparison.reference:
        sides["guided-diffusion"] = reference_side(comparison.reference, shape, flags, weights, device)
    cond_fn = classifier_cond_fn(classifier.to(device), 1.0)
    sides["float32"] = network.to(device), spaced, cond_fn
    if comparison.reference:
        compare_runs(sides, x, device)
    half = copy.deepcopy(network), copy.deepcopy(classifier)
    for model in half:
        model.convert_to_bf16()
    sides["bfloat16"] = half[0], spaced, classifier_cond_fn(half[1], 1.0)

    for guided in (False, True):
        steps = {name: lambda side=side, y=labels if guided else None: step(*side, x, y)
                 for name, side in sides.items()}
        times = common.time_interleaved(steps, bench.repetitions, device)
        if comparison.profile:
            common.print_operators(steps, device)
        name = f"sample_{config.size}_{'guided' if guided else 'plain'}"
        common.report(name, common.speedup_table(times, next(iter(sides))), bench, device, guided=guided,
                      size=config.size, batch_size=config.bench_batch_size, baseline=next(iter(sides)))
    if config.compile_too:
        report_compiled({name: side for name, side in sides.items() if name != "guided-diffusion"}, x, bench, device)
    if config.written_runs:
        report_written_runs(config.written_runs, config.bench_batch_size, bench, device)
    if config.whole_runs:
        runs = whole_runs(sides, x, device)
        times = common.time_interleaved(runs, config.whole_runs, device, warmup=0)
        rows = common.speedup_table(times, next(iter(runs)))
        common.report(f"sample_{config.size}_whole", rows, bench, device, size=config.size, samples=len(x),
                      repetitions=config.whole_runs)


def report_compiled(sides, x, bench, device):
    """Report steps of the networks as they are and compiled, and after how many samples of 15 steps that pays off."""
    for name, (network, spaced, _) in sides.items():
        compiled = torch.compile(network, dynamic=False)
        steps = {name: functools.partial(step, network, spaced, None, x, None),
                 f"{name}, compiled": functools.partial(step, compiled, spaced, None, x, None)}
        start = sum(os.times()[:4])     # of this process and of the compilers that it starts
        steps[f"{name}, compiled"]()
        first = sum(os.times()[:4]) - start
        times = common.time_interleaved(steps, bench.repetitions, device)
        plain, fast = map(statistics.median, times.values())
        samples = (first - fast) / (plain - fast) / STEPS * len(x) if fast < plain else float("inf")
        print(f"{name}: compiling took {first:.0f} s of CPU time, recovered after {samples:,.0f} samples\n", flush=True)
        common.report(f"sample_compiled_{name}", common.speedup_table(times, name), bench, device,
                      compile_seconds=first, samples_that_pay_it_back=samples)


def report_written_runs(repetitions, batch_size, bench, device):
    """Report runs of `generate_samples` by the precision of the network and of the autoencoder."""
    shape, flags = SIZES["radar64"]
    network, diffusion = create_model_and_diffusion_vae(
        shape, ModelConfig(**flags), DiffusionConfig(timestep_respacing=f"logsnr{STEPS}"))
    half = copy.deepcopy(common.randomize_zero_parameters(network).to(device).eval())
    half.convert_to_bf16()
    with common.silent() as folder:
        path = random_network(Path(folder) / "vae.pt", AUTOENCODER)
        codecs = [create_vae(VAEConfig(vae_path=str(path), vae_dtype=dtype), device)
                  for dtype in ("float32", "bfloat16")]
        own = {"float32": (network, codecs[0]), "bfloat16, decoded in float32": (half, codecs[0]),
               "bfloat16": (half, codecs[1])}
        config = SamplingConfig(num_samples=2 * batch_size, batch_size=batch_size)
        on_thread = {name: [] for name in own}

        def run(name, model, codec):
            sampler = Sampler(model, diffusion, shape, codec, LatentNormalizer([0], [1], "none"),
                              (3, *(4 * n for n in shape[1:])), solver="dpmpp_sde")
            with tempfile.TemporaryDirectory(dir=folder) as out:
                start = time.thread_time()
                generate_samples(sampler, None, config, out, device)
                on_thread[name].append(time.thread_time() - start)

        runs = {name: functools.partial(run, name, *parts) for name, parts in own.items()}
        times = common.time_interleaved(runs, repetitions, device)
    rows = common.speedup_table(times, "float32")
    for row in rows:
        row["sampling thread (ms)"] = 1e3 * statistics.median(on_thread[row["variant"]][1:])
    common.report("sample_written", rows, bench, device, samples=2 * batch_size, repetitions=repetitions)


def whole_runs(sides, x, device):
    """Return {name: sampling function}: 250 ancestral steps of the first side, 15 of dpmpp_sde of this project's."""
    def ancestral(network, spaced, _):
        diffusion = spaced(str(ANCESTRAL_STEPS))
        return diffusion.p_sample_loop(network, tuple(x.shape), noise=x.clone(), clip_denoised=False, device=device)

    @torch.no_grad()
    def multistep(network, spaced, _):
        return multistep_sample_loop(spaced("logsnr15"), network, tuple(x.shape), "dpmpp_sde", noise=x.clone(),
                                     clip_denoised=False, device=device)

    first = next(iter(sides))
    own = {name: side for name, side in sides.items() if name != "guided-diffusion"}
    return {f"{first}, {ANCESTRAL_STEPS} steps": functools.partial(ancestral, *sides[first]),
            **{f"{name}, 15 of dpmpp_sde": functools.partial(multistep, *side) for name, side in own.items()}}


@torch.no_grad()
def step(network, spaced, cond_fn, x, labels):
    """Return the sample after one ancestral step, with classifier guidance if `labels` are given."""
    diffusion = spaced("ddim50")
    t = torch.full((len(x),), diffusion.num_timesteps // 2, device=x.device)
    model_kwargs = {} if labels is None else {"y": labels}
    model_fn = lambda x, t, y=None: network(x, t)
    return diffusion.p_sample(model_fn, x, t, clip_denoised=False, cond_fn=None if labels is None else cond_fn,
                              model_kwargs=model_kwargs)["sample"]


def compare_runs(sides, x, device):
    """Print the maximum difference between the DDIM samples of the first two sides."""
    samples = []
    for network, spaced, _ in sides.values():
        with torch.no_grad():
            samples.append(spaced("ddim50").ddim_sample_loop(network, tuple(x.shape), noise=x.clone(),
                                                             clip_denoised=False, device=device))
    error = (samples[0] - samples[1]).abs().max() / samples[0].std()
    print(f"50 steps of DDIM: samples differ by at most {error:.1e} standard deviations\n", flush=True)


def reference_side(folder, shape, flags, weights, device):
    """Return guided-diffusion's network, processes by spacing, and cond_fn, on the same weights."""
    reference = common.open_reference(folder)
    network = reference_unet(reference, shape, flags)
    network.load_state_dict(weights[0])
    own = ClassifierConfig()
    classifier = reference.unet.EncoderUNetModel(
        image_size=shape[-1], in_channels=shape[0], model_channels=own.classifier_width, out_channels=6,
        num_res_blocks=own.classifier_depth, attention_resolutions=(shape[-1] // 8,), channel_mult=(1, 2, 2),
        num_head_channels=64, use_scale_shift_norm=True, resblock_updown=True, pool="attention",
    )
    classifier.load_state_dict(weights[1])
    network, classifier = network.to(device).eval(), classifier.to(device).eval()
    spaced = functools.cache(lambda steps: reference.script_util.create_gaussian_diffusion(timestep_respacing=steps))

    def cond_fn(x, t, y):
        with torch.enable_grad():
            x = x.detach().requires_grad_(True)
            chosen = F.log_softmax(classifier(x, t), dim=-1).gather(1, y[:, None])
            return torch.autograd.grad(chosen.sum(), x)[0]

    return network, spaced, cond_fn


if __name__ == "__main__":
    main()
