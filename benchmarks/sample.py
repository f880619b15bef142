"""Time one sampling step, plain and guided by a classifier, and compare whole 50-step DDIM runs.

    OMP_NUM_THREADS=1 python benchmarks/sample.py --reference ../guided-diffusion
    OMP_NUM_THREADS=1 python benchmarks/sample.py --reference ../guided-diffusion --whole_runs 3

Both sides start from the same weights and the same noise. --whole_runs times what stands for the same quality on the
radar model of docs/results.md: 250 random steps, and 15 of dpmpp_sde here.
"""

import copy
import dataclasses
import functools

import common
import torch
import torch.nn.functional as F
from train_step import SIZES

from guided_diffusion_vae.config import as_dict, option
from guided_diffusion_vae.gaussian_diffusion import DiffusionConfig
from guided_diffusion_vae.runs.factories import create_classifier, create_model_and_diffusion_vae, create_diffusion
from guided_diffusion_vae.sampling.guidance import classifier_cond_fn
from guided_diffusion_vae.sampling import multistep_sample_loop
from guided_diffusion_vae.unet import ClassifierConfig, ModelConfig

CLASSIFIER = dict(classifier_channel_mult="1,2,2", classifier_attention_resolutions="8", classifier_in_channels=4,
                  classifier_num_classes=6)


@dataclasses.dataclass
class SampleConfig:
    SECTION = "benchmark"

    size: str = option("16m122", "latent grid and network", choices=tuple(SIZES))
    bench_batch_size: int = option(16, "samples at a time")
    whole_runs: int = option(0, "how often to time whole runs of 250 steps beside whole runs of 15; 0: not at all")


def main():
    (bench, against, config), device = common.configure(__doc__, common.ComparisonConfig, SampleConfig)
    shape, flags = SIZES[config.size]
    network, _ = create_model_and_diffusion_vae(shape, ModelConfig(**flags), DiffusionConfig())
    spaced = functools.cache(lambda steps: create_diffusion(DiffusionConfig(timestep_respacing=steps)))
    common.randomize_zero_parameters(network).eval()
    judge = common.randomize_zero_parameters(create_classifier(shape[-1], **as_dict(ClassifierConfig(**CLASSIFIER)))).eval()
    weights = network.state_dict(), judge.state_dict()
    x = torch.randn(config.bench_batch_size, *shape, generator=torch.Generator().manual_seed(0)).to(device)
    labels = torch.arange(len(x), device=device) % 6

    sides = {}
    if against.reference:
        sides["guided-diffusion"] = reference_side(against.reference, shape, flags, weights, device)
    gradient = classifier_cond_fn(judge.to(device), 1.0)
    sides["float32"] = network.to(device), spaced, gradient
    if against.reference:
        compare_runs(sides, x, device)
    half = copy.deepcopy(network), copy.deepcopy(judge)
    for model in half:
        model.convert_to_bf16()
    sides["bfloat16"] = half[0], spaced, classifier_cond_fn(half[1], 1.0)

    for guided in (False, True):
        steps = {name: (lambda side=side: step(*side, x, labels if guided else None)) for name, side in sides.items()}
        times = common.time_interleaved(steps, bench.repetitions, device)
        if against.profile:
            common.print_operators(steps, device)
        name = f"sample_{config.size}_{'guided' if guided else 'plain'}"
        common.report(name, common.speedup_table(times, next(iter(sides))), bench, device, guided=guided, size=config.size,
                      batch_size=config.bench_batch_size, baseline=next(iter(sides)))
    if config.whole_runs:
        runs = whole_runs(sides, x, device)
        rows = common.speedup_table(common.time_interleaved(runs, config.whole_runs, device, warmup=0), next(iter(runs)))
        common.report(f"sample_{config.size}_whole", rows, bench, device, size=config.size, samples=len(x),
                      repetitions=config.whole_runs)


def whole_runs(sides, x, device):
    """Return {name: function that draws samples}: the first side in 250 random steps, ours in 15 of dpmpp_sde."""
    def plain(network, spaced, _):
        return spaced("250").p_sample_loop(network, tuple(x.shape), noise=x.clone(), clip_denoised=False, device=device)

    @torch.no_grad()
    def few(network, spaced, _):
        return multistep_sample_loop(spaced("logsnr15"), network, tuple(x.shape), "dpmpp_sde", noise=x.clone(),
                                     clip_denoised=False, device=device)

    first = next(iter(sides))
    own = {name: side for name, side in sides.items() if name != "guided-diffusion"}
    return {f"{first}, 250 steps": functools.partial(plain, *sides[first]),
            **{f"{name}, 15 of dpmpp_sde": functools.partial(few, *side) for name, side in own.items()}}


@torch.no_grad()
def step(network, spaced, gradient, x, labels):
    """Take one random step, with the classifier's gradient where there are labels."""
    diffusion = spaced("ddim50")
    t = torch.full((len(x),), diffusion.num_timesteps // 2, device=x.device)
    told = {} if labels is None else {"y": labels}
    ask = lambda x, t, y=None: network(x, t)
    return diffusion.p_sample(ask, x, t, clip_denoised=False, cond_fn=None if labels is None else gradient,
                              model_kwargs=told)["sample"]


def compare_runs(sides, x, device):
    """Print how far the samples of a whole DDIM run are apart."""
    found = []
    for network, spaced, _ in sides.values():
        with torch.no_grad():
            found.append(spaced("ddim50").ddim_sample_loop(network, tuple(x.shape), noise=x.clone(),
                                                           clip_denoised=False, device=device))
    far = (found[0] - found[1]).abs().max() / found[0].std()
    print(f"50 steps of DDIM: samples at most {far:.1e} apart, in units of their standard deviation\n", flush=True)


def reference_side(folder, shape, flags, weights, device):
    """Return network, process by its spacing, and classifier gradient of guided-diffusion on the same weights."""
    theirs = common.open_reference(folder)
    multipliers = tuple(int(m) for m in flags["channel_mult"].split(","))
    at = tuple(shape[-1] // int(r) for r in flags["attention_resolutions"].split(","))
    known = dict(image_size=shape[-1], in_channels=shape[0], model_channels=flags["num_channels"], num_res_blocks=2,
                 use_scale_shift_norm=True)
    network = theirs.unet.UNetModel(out_channels=shape[0], attention_resolutions=at, channel_mult=multipliers,
                                    num_heads=4, **known)
    network.load_state_dict(weights[0])
    own = ClassifierConfig()
    judge = theirs.unet.EncoderUNetModel(
        **{**known, "model_channels": own.classifier_width, "num_res_blocks": own.classifier_depth}, out_channels=6,
        attention_resolutions=(shape[-1] // 8,), channel_mult=(1, 2, 2), num_head_channels=64, resblock_updown=True,
        pool="attention",
    )
    judge.load_state_dict(weights[1])
    network, judge = network.to(device).eval(), judge.to(device).eval()
    spaced = functools.cache(lambda steps: theirs.script_util.create_gaussian_diffusion(timestep_respacing=steps))

    def gradient(x, t, y):
        with torch.enable_grad():
            x = x.detach().requires_grad_(True)
            chosen = F.log_softmax(judge(x, t), dim=-1).gather(1, y[:, None])
            return torch.autograd.grad(chosen.sum(), x)[0]

    return network, spaced, gradient


if __name__ == "__main__":
    main()
