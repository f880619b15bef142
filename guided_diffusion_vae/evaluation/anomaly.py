"""Anomaly detection: scores and heat maps of images under a diffusion model of normal ones."""

import csv
import io
import math
import shutil
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated

import numpy as np
import torch

from .. import dist_util, logger
from ..config import CommaSeparated, option, require, words
from ..data import unpad, write_nifti
from ..files import atomic_path, atomic_stream, read_record, write_record
from ..interfaces import ImageSource
from ..nn import keyed_seed
from ..sampling.sampler import Sampler, SamplingConfig
from ..sampling.sheets import contact_sheet, save_image, to_pil
from ..sampling.solvers import SAMPLERS
from .likelihood import LIKELIHOOD
from .set_metrics import nearest_neighbors

RECORD = "settings.json"    # of unfinished scores
MAP_GAIN = 4                # of heat maps: differences of 1 / MAP_GAIN have the last color
MAP_COLORS = "inferno"
MIN_TILE = 64               # pixels of an image on the sheet, which repeats those of smaller ones
SHEET_COLUMNS = 6           # images with the highest scores on a sheet, and with the lowest
positive_levels = CommaSeparated("0.5,1,2", "positive noise levels", float, lambda levels: min(levels, default=0) > 0)


@dataclass
class AnomalyConfig(SamplingConfig):
    SECTION = "anomaly"

    batch_size: int = option(16, "images in a batch per rank", minimum=1)
    sampler: str = option("", "sampler that denoises; empty: ddpm; of rectified flows euler", choices=("", *SAMPLERS))
    seed: int = option(0, "seed of the noise")
    noise_levels: Annotated[str, positive_levels] = option(
        "0.5,1,2", "comma-separated noise levels (sigma, the ratio of noise and signal) to which images are noised "
                   "before they are denoised; larger ones change larger structures", essential=True)
    bound: bool = option(True, "also score by the variational bound, one evaluation of the network per timestep "
                               "(--timestep_respacing)")
    reference_dir: str = option("", "normal images, such as the training images: also score by the mean distance to "
                                    "the nearest ones in x0 (normalized latents, or pixels)", essential=True)
    neighbors: int = option(5, "number of nearest reference images over which distances are averaged", minimum=1)
    normal_classes: Annotated[str, words] = option(
        "", "comma-separated names of the classes that are normal, all others are anomalies: report AUROC and AUPRC; "
            "empty: scores only", essential=True)
    bootstrap: int = option(1000, "resamplings of the images for 95% intervals of AUROC and AUPRC", minimum=2)
    save_maps: bool = option(True, "write a heat map of every image to maps/, a PNG file, of volumes .nii.gz too")


# --- Scores against labels ---


def auroc(scores, anomalous) -> float:
    """Return the area under the ROC curve: the probability that an anomaly has a higher score than a normal image.

    Equal scores count half (Mann and Whitney 1947).

    :param scores: numbers [N], higher for anomalies; `anomalous`: bool [N] with both values.
    """
    scores, anomalous = np.asarray(scores, np.float64), np.asarray(anomalous, bool)
    normal = np.sort(scores[~anomalous])
    below, up_to = (np.searchsorted(normal, scores[anomalous], side) for side in ("left", "right"))
    return float((below + up_to).mean() / (2 * len(normal)))


def auprc(scores, anomalous) -> float:
    """Return the area under the precision-recall curve as average precision: the sum of precision x gain of recall.

    One point per distinct score (Davis and Goadrich 2006, without interpolation). The value of random scores is the
    fraction of anomalies.

    :param scores: numbers [N], higher for anomalies; `anomalous`: bool [N] with both values.
    """
    scores, anomalous = np.asarray(scores, np.float64), np.asarray(anomalous, bool)
    order = np.argsort(-scores, kind="stable")
    last = np.append(np.diff(scores[order]) != 0, True)     # of each group of equal scores
    found = np.cumsum(anomalous[order])[last]
    return float((np.diff(found, prepend=0) * found / (np.flatnonzero(last) + 1)).sum() / found[-1])


def bootstrap_interval(metric, scores, anomalous, count=1000, seed=0) -> list[float]:
    """Return [low, high], the 95% percentile interval of a metric; both kinds of images are resampled separately."""
    rng, groups = np.random.default_rng(seed), [np.flatnonzero(anomalous == kind) for kind in (False, True)]
    rows = (np.concatenate([rng.choice(group, len(group)) for group in groups]) for _ in range(count))
    return np.quantile([metric(scores[each], anomalous[each]) for each in rows], [0.025, 0.975]).tolist()


# --- Scores of images ---


@dataclass(frozen=True)
class Detector:
    """A diffusion model of normal images, with which images of a source are scored.

    :param sampler: an unconditional `Sampler`, `source`: an `ImageSource` of images of its shape.
    :param timesteps: {noise level: timestep of the process}.
    :param bank: x0 of normal images [M x D] or None; `neighbors`: how many of them a distance is averaged over.
    :param bound: score by the variational bound.
    """

    sampler: Sampler
    source: ImageSource
    timesteps: dict
    bank: torch.Tensor | None = None
    neighbors: int = 5
    bound: bool = True

    def encode(self, images, device):
        """Return x0 of images in [0, 1].  [N x C x ...] -> [N x *shape]"""
        codec = self.sampler.codec
        return self.sampler.normalizer.normalize(codec.encode_batch(codec.pad_to_factors(images)).to(device).float())

    @torch.no_grad()
    def score(self, indices, device) -> tuple[dict, dict]:
        """Return ({name: scores float64 [N]}, {noise level: restored images [N x C x ...]}) of the images `indices`.

        All scores are higher for images that are unlike normal ones:

        * denoising_S: mean squared difference between the image and what the model makes of it when it is noised to
          level S and denoised (AnoDDPM, Wyatt et al. 2022, arXiv:2206.02577, Alg. 1 and 2 for images);
        * bound: the variational bound, nats per dimension of latents or bits per dimension of pixels;
        * autoencoder: mean squared error of the codec, unless x0 are pixels;
        * neighbors: mean Euclidean distance to the nearest x0 of the bank.
        """
        sampler, images = self.sampler, unpad(self.source.batch(np.array(indices)), self.sampler.image_shape)
        x0, noise = self.encode(images, device), sampler.draw_noise(indices, device)
        difference = lambda other: (other.cpu().float() - images).square().flatten(1).double().mean(1).numpy()
        scores, restored = {}, {}
        for level, timestep in self.timesteps.items():
            t = torch.full((len(x0),), timestep, device=device)
            x_t = sampler.diffusion.q_sample(x0, t, noise(x0))
            part = replace(sampler, diffusion=sampler.diffusion.truncated(timestep + 1))
            restored[level] = sampler.decode(part.walk(indices, x_t, noise_fn=noise, device=device)).cpu().float()
            scores[f"denoising_{level:g}"] = difference(restored[level])
        if self.bound:
            torch.manual_seed(keyed_seed(sampler.seed, LIKELIHOOD, indices[0]))
            bound = sampler.diffusion.calc_bpd_loop(sampler.model, x0, bool(sampler.clip_denoised))["total_bpd"]
            unit = 1.0 if sampler.codec.is_pixels else math.log(2.0)
            scores["bound"] = bound.cpu().double().numpy() * unit
        if not sampler.codec.is_pixels:
            scores["autoencoder"] = difference(sampler.decode(x0))
        if self.bank is not None:
            distances, _ = nearest_neighbors(x0.cpu(), self.bank, self.neighbors)
            scores["neighbors"] = distances.mean(1)
        return scores, restored

    def heat_maps(self, indices, restored):
        """Return the mean over noise levels and channels of |image - restored|, float32 [N x 1 x ...]."""
        images = unpad(self.source.batch(np.array(indices)), self.sampler.image_shape)
        return torch.stack([(images - each).abs().mean(1, keepdim=True) for each in restored.values()]).mean(0).numpy()


def detect_anomalies(detector: Detector, config: AnomalyConfig, folder, device) -> dict:
    """Score all images of a detector on all ranks, write scores.csv, maps/ and anomalies.png; return the report.

    Until the end scores/ contains one file per batch; the same call again computes the missing ones. The report has the
    number of images and, with `config.normal_classes`, {"auroc", "auroc_interval", "auprc", "auprc_interval"} of each
    score.

    :raises ValueError: if scores/ contains scores with other settings.
    """
    folder, shards, count = Path(folder), Path(folder) / "scores", len(detector.source)
    anomalous = find_anomalous(detector.source, config.normal_classes)
    _check_settings(shards, detector, config)
    batches = [range(start, min(start + config.batch_size, count)) for start in range(0, count, config.batch_size)]
    path_of = lambda batch: shards / f"{batch.start:08d}.npz"
    missing = dist_util.broadcast_object([batch for batch in batches if not path_of(batch).exists()])
    if len(missing) < len(batches):
        logger.log(f"skipping {len(batches) - len(missing)} of {len(batches)} batches, which already exist")
    for batch in missing[dist_util.rank()::dist_util.world_size()]:
        scores, restored = detector.score(batch, device)
        require((all(np.isfinite(values).all() for values in scores.values()),
                 f"scores of images {batch.start} to {batch.stop - 1} are not finite: the model has diverged; use an "
                 "earlier checkpoint"), error=FloatingPointError)
        if config.save_maps:    # before the scores, whose existence marks the batch as complete
            for i, heat in zip(batch, detector.heat_maps(batch, restored)):
                _write_map(folder / "maps", f"{i:06d}_{Path(str(detector.source.names[i])).name}", heat, detector)
        with atomic_path(path_of(batch)) as part, open(part, "wb") as stream:
            np.savez(stream, **scores)
        logger.log(f"scored {batch.stop} of {count} images")
    dist_util.barrier()
    parts = [dict(np.load(path_of(batch), allow_pickle=False)) for batch in batches]
    dist_util.barrier()     # before rank 0 removes them
    scores = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
    report = {"num_images": count}
    if anomalous is not None:
        report["num_anomalies"] = int(anomalous.sum())
        report.update({name: _report_one(values, anomalous, config) for name, values in scores.items()})
    if dist_util.rank() == 0:
        _write_table(folder / "scores.csv", detector.source, anomalous, scores)
        save_image(folder / "anomalies.png", _sheet(detector, next(iter(scores.values())), device))
        shutil.rmtree(shards)
    dist_util.barrier()
    return report


def find_anomalous(source, normal_classes):
    """Return which images are anomalies, bool [N]: those of other classes; None without `normal_classes`.

    :raises ValueError: if the images have no classes, or one of these names is none of them, or there is only one kind.
    """
    names, flag = words.parse(normal_classes, "normal_classes"), f"--normal_classes {normal_classes}"
    if not names:
        return None
    require((source.labels is not None, f"{source.folder} has no classes; omit {flag}"))
    unknown = [name for name in names if name not in source.class_names]
    require((not unknown, f"{flag}: {source.folder} has no class {', '.join(unknown)}: expected some of: "
             f"{', '.join(source.class_names)}"))
    anomalous = ~np.isin(source.labels, [source.class_names.index(name) for name in names])
    require((0 < anomalous.sum() < len(anomalous), f"{flag}: expected normal and other images in {source.folder}, got "
             f"{len(anomalous) - anomalous.sum()} and {anomalous.sum()}"))
    return anomalous


def _report_one(scores, anomalous, config):
    report = {}
    for metric in (auroc, auprc):
        report[metric.__name__] = metric(scores, anomalous)
        report[f"{metric.__name__}_interval"] = bootstrap_interval(metric, scores, anomalous, config.bootstrap)
    return report


def _check_settings(shards, detector, config):
    """Start a folder of scores, or compare the settings of an existing one, so that all scores have the same ones."""
    if dist_util.rank() == 0:
        sampler = detector.sampler
        settings = {**sampler.settings, "images": detector.source.fingerprint, "seed": sampler.seed,
                    "sampler": sampler.solver, "timesteps": [int(t) for t in sampler.diffusion.timestep_map],
                    "clip_denoised": sampler.clip_denoised, "batch_size": config.batch_size, "maps": config.save_maps,
                    "noise_levels": config.noise_levels, "bound": config.bound, "neighbors": config.neighbors,
                    "reference": config.reference_dir}
        record = shards / RECORD
        if record.exists():
            found = read_record(record, "remove its folder")
            other = sorted(key for key in settings if settings[key] != found.get(key))
            require((not other, f"{shards} contains unfinished scores with another {', '.join(other)}; use the same "
                     "flags to resume, use another --logdir, or remove the folder"))
        else:
            write_record(record, settings)
    dist_util.barrier()


def _write_map(folder, stem, heat, detector):
    """Write a heat map [1 x ...] as .png, of a volume its middle slices, and the volume of differences as .nii.gz."""
    stem = stem.partition(".")[0]
    save_image(folder / f"{stem}.png", to_pil(np.clip(MAP_GAIN * heat, 0, 1), MAP_COLORS))
    if heat.ndim == 4:
        with atomic_path(folder / f"{stem}.nii.gz") as part:
            volume = part.with_name(part.name + ".nii.gz")   # the extension selects the compression
            write_nifti(volume, heat, detector.sampler.spacing, detector.sampler.orientation)
            volume.rename(part)


def _write_table(path, source, anomalous, scores):
    """Write one line per image: name, class, whether it is an anomaly (both only if known), and scores."""
    columns = {"name": [str(name) for name in source.names]}
    if source.labels is not None:
        columns["class"] = [source.class_names[label] for label in source.labels]
    if anomalous is not None:
        columns["anomaly"] = anomalous.astype(int)
    columns.update({name: [f"{value:.9g}" for value in values] for name, values in scores.items()})
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerows([list(columns), *zip(*columns.values())])
    with atomic_stream(path) as stream:
        stream.write(text.getvalue().encode())


def _sheet(detector, scores, device):
    """Return a sheet of the images with the highest and the lowest scores: image, restored image and heat map."""
    columns = min(SHEET_COLUMNS, (len(scores) + 1) // 2)
    rows, labels = [], []
    for name, signed in (("highest scores", -scores), ("lowest scores", scores)):
        chosen = np.argsort(signed, kind="stable")[:columns]
        sampler = detector.sampler
        _, restored = replace(detector, bound=False, bank=None).score(chosen.tolist(), device)
        images = unpad(detector.source.batch(chosen), sampler.image_shape).numpy()
        heat = np.clip(MAP_GAIN * detector.heat_maps(chosen, restored), 0, 1)
        rows += [images, *(each.numpy() for each in restored.values()), np.broadcast_to(heat, images.shape)]
        labels += [name, *(f"restored, {level:g}" for level in restored), f"|difference|\nx {MAP_GAIN}"]
    return contact_sheet(np.concatenate(rows), columns, labels, scale=max(1, MIN_TILE // images.shape[-1]))
