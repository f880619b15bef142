"""Find the length of EMA weights whose samples are closest to real images."""

import dataclasses
from pathlib import Path

import numpy as np
import torch

from .. import checkpoint_util, dist_util
from ..config import require
from ..data import DataConfig, require_data_dir
from ..ema_profiles import ReconstructConfig, save_reconstruction
from ..evaluation import EvaluateConfig, ImageSet, check_sets, feature_statistics, frechet_distance
from ..files import read_record, write_record
from ..logger import log_rank0
from ..sampling import Sampler, SamplingConfig, sample_images
from . import loading
from .spaces import VAEConfig, apply_trained_preprocessing

RECORD = "ema_sweep.json"


@dataclasses.dataclass(frozen=True)
class GeneratedImages:
    """Images of a `Sampler` that are sampled when they are read, rounded to 8 bits as in files."""

    sampler: Sampler
    classes: list | None
    count: int
    labels = class_names = None

    def __len__(self):
        return self.count

    @property
    def shape(self):
        """Shape of an image, (C, ...)."""
        return self.sampler.image_shape

    def batch(self, indices):
        """Return images as float32 [n x C x ...] in [0, 1]."""
        images = sample_images(self.sampler, indices, self.classes, dist_util.dev())
        return torch.from_numpy(images.astype(np.float32) / 255)


def reconstruct_files(config: ReconstructConfig, stds):
    """Yield (relative standard deviation, path) of the EMA weights that rank 0 writes; it logs each one."""
    for std in stds:
        written = dist_util.rank() == 0 and save_reconstruction(config.model_path, std, config.ema_step)
        path, error = dist_util.broadcast_object(written)
        log_rank0(f"wrote {path}: error of the profile {error:.1e}")
        yield std, path


def sweep_ema(run, stds) -> None:
    """Sample with EMA weights of each length, from the same noise, and keep the file of the one with the best samples.

    These have the lowest Fréchet distance to `--reference`. The distances are written to ema_sweep.json in the folder
    of the model, from which an interrupted sweep continues.

    :raises ValueError: before anything is reconstructed, if there is one length only, the model is no diffusion model
        that samples without conditions, or the reference has images of another shape.
    """
    config, request = run[ReconstructConfig], run[EvaluateConfig]
    require((len(set(stds)) > 1, f"--ema_std {config.ema_std}: expected two lengths or more, of which --reference "
             "finds the best; add others, or omit --reference"))
    require_data_dir(config.reference, "--reference")
    trained = loading.open_weights(config.model_path)
    require((trained.header, f"{trained.path} has no header; --model_path expects a run folder"))
    checkpoint_util.require_kind(trained.header, "diffusion", trained.path, "--model_path")
    data = apply_trained_preprocessing(run[DataConfig], run.explicit, trained.header["data"])
    reference = loading.open_set(config.reference, data, "--reference")
    extract, classifier, _ = loading.open_extractors(run)
    expected = _open_samples(run, trained.path)     # of other weights, which are sampled alike
    check_sets(request, {"reference": reference, "samples": expected}, classifier)

    sampler = expected.images.sampler
    settings = {**sampler.settings, "ema_step": config.ema_step, "seed": sampler.seed, "sampler": sampler.solver,
                "classes": expected.images.classes, "steps": [int(t) for t in sampler.diffusion.timestep_map],
                "clip_denoised": sampler.clip_denoised, "num_samples": config.num_samples,
                "reference": config.reference,
                "features": request.inception_path or request.classifier_path or run[VAEConfig].vae_path}
    record = Path(config.model_path) / RECORD
    distances = dist_util.broadcast_object(_read_distances(record, settings) if dist_util.rank() == 0 else None)
    measure = lambda images, label: feature_statistics(images, extract, run[SamplingConfig].batch_size, label)
    real, paths = None, {}
    for std, path in reconstruct_files(config, stds):
        name = f"{std:g}"
        paths[name] = path
        if name not in distances:
            real = real or measure(reference, "reference")
            distances[name] = frechet_distance(real, measure(_open_samples(run, path), f"samples, {name}"))
            _write(record, settings, distances)
    best = min(paths, key=distances.get)
    log_rank0(f"Fréchet distance of {config.num_samples} samples:")
    for name in paths:
        log_rank0(f"  {name:<6} {distances[name]:.5g}{'  best' * (name == best)}")
    dist_util.barrier()     # all ranks have read the files
    if dist_util.rank() == 0:
        for name in paths.keys() - {best}:
            paths[name].unlink()
    _write(record, settings, distances, best)
    log_rank0(f"kept {paths[best]}, removed the files of the other lengths")


def _open_samples(run, path) -> ImageSet:
    """Return the samples of the weights at `path`."""
    config = dataclasses.replace(run[SamplingConfig], model_path=str(path))
    sampler = loading.load_sampler(run.override(config))
    classes = sampler.parse_classes(config.classes)
    return ImageSet(str(path), GeneratedImages(sampler, classes, run[ReconstructConfig].num_samples))


def _read_distances(record, settings):
    """Return {length: distance} of an unfinished sweep with these settings, else {}."""
    found = read_record(record, "remove it") if record.exists() else {}
    return found["frechet"] if found.get("settings") == settings and not found["best"] else {}


def _write(record, settings, distances, best=""):
    if dist_util.rank() == 0:
        write_record(record, {"settings": settings, "frechet": distances, "best": best})
