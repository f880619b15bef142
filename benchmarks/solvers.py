"""Measure how far the deterministic samplers are from the converged path of a trained model, over the steps they take.

    OMP_NUM_THREADS=1 python benchmarks/solvers.py --model_path runs/diffusion64

All begin with the same noise. What they err by is the root mean square distance of their x0 from that of many steps, in
standard deviations of x0. How well a converged path draws is another question, for `scripts/evaluate.py`.
"""

import dataclasses
import time

import common
import torch

from guided_diffusion_vae.config import option
from guided_diffusion_vae.nn import keyed_randn
from guided_diffusion_vae.runs.factories import create_diffusion
from guided_diffusion_vae.runs.loading import load_diffusion_model, open_weights
from guided_diffusion_vae.sampling import SAMPLERS, STOCHASTIC

DETERMINISTIC = [name for name in SAMPLERS if name not in ("ddpm", *STOCHASTIC)]


@dataclasses.dataclass
class SolversConfig:
    SECTION = "benchmark"

    model_path: str = option("", "run of image_train_vae.py, or one weights file of it")
    bench_batch_size: int = option(16, "samples, over all classes in turn")
    steps: str = option("10,15,20,25,50", "how many steps are tried")
    converged_steps: int = option(200, "log-SNR steps of unipc that stand for the converged path")


def main():
    (bench, config), device = common.configure(__doc__, SolversConfig, without=("repetitions",))
    weights = open_weights(config.model_path)
    network, header = load_diffusion_model(weights)[0].to(device), weights.header
    shape = (config.bench_batch_size, *header["latent_shape"])
    noise = keyed_randn(shape[1:], [(0, i) for i in range(shape[0])]).to(device)
    classes = len(header["classes"] or ())
    conditioning = {"y": torch.arange(shape[0], device=device) % classes} if classes else {}

    def sampled(name, spacing):
        diffusion = create_diffusion({**header["diffusion"], "timestep_respacing": spacing})
        begun = time.process_time()
        x0 = SAMPLERS[name][1](diffusion, network, shape, noise=noise, clip_denoised=False, model_kwargs=conditioning,
                               device=device)
        return x0, time.process_time() - begun

    converged, _ = sampled("unipc", f"logsnr{config.converged_steps}")
    spread = converged.std()
    far = lambda x0: ((x0 - converged).square().mean().sqrt() / spread).item()
    rows = [{"sampler": "dpmpp", "steps": config.converged_steps,
             "error": far(sampled("dpmpp", f"logsnr{config.converged_steps}")[0]), "CPU s": ""}]
    for steps in map(int, config.steps.split(",")):
        for name in DETERMINISTIC:
            x0, taken = sampled(name, f"ddim{steps}" if name == "ddim" else f"logsnr{steps}")
            rows.append({"sampler": name, "steps": steps, "error": far(x0), "CPU s": taken})
    x0, taken = sampled("ddim", "ddim250")
    rows.append({"sampler": "ddim", "steps": 250, "error": far(x0), "CPU s": taken})
    common.report("solvers", rows, bench, device, **dataclasses.asdict(config))


if __name__ == "__main__":
    main()
