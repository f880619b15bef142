"""Measure the discretization error of deterministic samplers on a trained model, over the number of steps.

    OMP_NUM_THREADS=1 python benchmarks/solvers.py --model_path runs/diffusion64

All samplers start from the same noise. The error is the root mean square distance of x0 from the x0 of many steps (the
converged path), in standard deviations of x0. Solvers take steps even in log-SNR, those of a rectified flow even times.
For the quality of the samples, use `scripts/evaluate.py`.
"""

import dataclasses
import time

import common
import torch

from guided_diffusion_vae.config import integers, option
from guided_diffusion_vae.nn import keyed_randn
from guided_diffusion_vae.runs.factories import create_diffusion
from guided_diffusion_vae.runs.loading import load_diffusion_model, open_weights
from guided_diffusion_vae.sampling import SAMPLERS, SOLVERS, STOCHASTIC
from guided_diffusion_vae.sampling.solvers import applicable_samplers



@dataclasses.dataclass
class SolversConfig:
    SECTION = "benchmark"

    model_path: str = option("", "run folder of image_train_vae.py, or a weights file")
    bench_batch_size: int = option(16, "number of samples, classes assigned cyclically")
    steps: integers = option("10,15,20,25,50", "comma-separated numbers of steps")
    converged_steps: int = option(200, "log-SNR steps of unipc for the converged path")


def main():
    (bench, config), device = common.configure(__doc__, SolversConfig, without=("repetitions",))
    weights = open_weights(config.model_path)
    network, header = load_diffusion_model(weights)[0].to(device), weights.header
    shape = (config.bench_batch_size, *header["latent_shape"])
    noise = keyed_randn(shape[1:], [(0, i) for i in range(shape[0])]).to(device)
    classes = len(header["classes"] or ())
    model_kwargs = {"y": torch.arange(shape[0], device=device) % classes} if classes else {}

    def sample(name, spacing):
        """Return (x0, CPU seconds)."""
        diffusion = create_diffusion({**header["diffusion"], "timestep_respacing": spacing})
        start = time.process_time()
        x0 = SAMPLERS[name][1](diffusion, network, shape, noise=noise, clip_denoised=False, model_kwargs=model_kwargs,
                               device=device)
        return x0, time.process_time() - start

    applicable = applicable_samplers(create_diffusion(header["diffusion"]))
    deterministic = [name for name in applicable if name not in ("ddpm", *STOCHASTIC)]
    converged, _ = sample("unipc", f"logsnr{config.converged_steps}")
    std = converged.std()
    error = lambda x0: ((x0 - converged).square().mean().sqrt() / std).item()
    rows = [{"sampler": "dpmpp", "steps": config.converged_steps,
             "error": error(sample("dpmpp", f"logsnr{config.converged_steps}")[0]), "CPU s": ""}]
    for steps in integers.parse(config.steps, "steps"):
        for name in deterministic:
            x0, cpu_s = sample(name, f"logsnr{steps}" if name in SOLVERS and "ddim" in applicable else f"ddim{steps}")
            rows.append({"sampler": name, "steps": steps, "error": error(x0), "CPU s": cpu_s})
    x0, cpu_s = sample(deterministic[0], "ddim250")
    rows.append({"sampler": deterministic[0], "steps": 250, "error": error(x0), "CPU s": cpu_s})
    common.report("solvers", rows, bench, device, **dataclasses.asdict(config))


if __name__ == "__main__":
    main()
