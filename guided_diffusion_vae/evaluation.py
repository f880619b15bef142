"""Measure an autoencoder's round trip and the quality of samples; what is measured stands in `metrics`."""

import math
import re
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch

from . import dist_util, figures, logger, metrics
from .config import opt
from .files import atomic_path, write_json
from .image_datasets import labels_in, open_archive, require_data_dir, unpad
from .latent_datasets import Moments
from .nn import keyed_seed
from .sampling import OURS, open_npz, to_uint8, write_npz
from .volume_datasets import open_folder

LIKELIHOOD = 11  # second number of the keys of noise, apart from those of training and sampling
_DRAWN = re.compile(r"samples_(\d+x)+\d+\.npz")


@dataclass
class RoundtripConfig:
    num_pictures: int = opt(0, "how many pictures to check, evenly spread over the folder; 0: all", least=0)
    batch_size: int = opt(32, "pictures at a time", least=1)
    min_psnr: float = opt(0.0, "exit with status 1 where the mean PSNR is below this many dB")
    min_ssim: float = opt(-1.0, "exit with status 1 where the mean SSIM is below this")
    max_l1: float = opt(1.0, "exit with status 1 where the mean absolute error is above this")
    save_npz: bool = opt(False, "write the reconstructions to reconstructions_NxHxWxC.npz, which evaluate.py takes as "
                                "--samples; with --inception_path its FID is what papers call rFID")


@dataclass
class EvaluateConfig:
    SECTION = "evaluation"

    samples: str = opt("", "what is judged: the run of a sampling script, an .npz of it, or a folder of pictures")
    reference: str = opt("", "what it is held against: a folder of real pictures, an .npz of them, or with "
                             "--inception_path an .npz of guided-diffusion with statistics (mu, sigma, mu_s, sigma_s)")
    train_dir: str = opt("", "the training pictures, to look for copies and to measure them against the reference")
    inception_path: str = opt("", "weights file of the Inception network (its name and SHA-256 are said where it is "
                                  "missing): distances are then FID, sFID, KID, and the Inception Score is given")
    classifier_path: str = opt("", "run of classifier_train.py, or one weights file of it: its classes are compared "
                                   "with those asked for, and without --inception_path its features are measured")
    paired: bool = opt(False, "sample i is a version of reference picture i: report PSNR, SSIM and L1 too")
    tstr_iterations: int = opt(0, "train a new classifier for so many steps on the samples (and one on --train_dir), "
                                  "and report its accuracy on the reference; 0: do not", least=0)
    tstr_batch_size: int = opt(32, "pictures in a step of that training, on each rank", least=1)
    batch_size: int = opt(64, "pictures at a time on each rank", least=1)


@dataclass
class LikelihoodConfig:
    SECTION = "evaluation"

    model_path: str = opt("", "run of image_train.py or image_train_vae.py, or one weights file of it, or one of "
                              "guided-diffusion, which the flags of the model describe")
    num_samples: int = opt(1000, "how many items of the data to measure, evenly spread", least=1)
    batch_size: int = opt(1, "items at a time on each rank", least=1)
    clip_denoised: bool = opt(True, "clip the predicted x0 to [-1, 1]; never done to latents unless the flag is given")
    seed: int = opt(0, "seed of the noise")


def likelihood(model, diffusion, source, space, labels, clip_denoised, config, folder):
    """Return the report of the variational bound over a source, after writing it and its terms to `folder`.

    `bits_per_dim` of pictures, `nats_per_latent_dim` of latents (their x0, the posterior's mean). vb_terms.npz,
    mse_terms.npz and xstart_mse_terms.npz hold, as arr_0 [T] from the last time to the first, means over the items.
    """
    bits = space.is_pixels
    name, unit = ("bits_per_dim", 1.0) if bits else ("nats_per_latent_dim", math.log(2.0))
    chosen = np.linspace(0, len(source) - 1, min(config.num_samples, len(source))).round().astype(int)
    if len(chosen) < config.num_samples:
        logger.log(f"{source.folder} has {len(source)} items, fewer than --num_samples {config.num_samples}")
    starts = list(range(0, len(chosen), config.batch_size))[dist_util.rank()::dist_util.world_size()]
    totals, terms = [], {"vb": [], "mse": [], "xstart_mse": []}
    for start in starts:
        items = chosen[start:start + config.batch_size]
        torch.manual_seed(keyed_seed(config.seed, LIKELIHOOD, start))
        with torch.no_grad():
            x0 = space.normalizer.normalise(source.latents(source.read(items), device=dist_util.dev()))
        told = {} if labels is None else {"y": torch.from_numpy(labels[items]).to(x0.device)}
        measured = diffusion.calc_bpd_loop(model, x0, clip_denoised, told)
        totals += (measured["total_bpd"] * unit).tolist()
        for key, rows in terms.items():
            rows.append((measured[key] * (unit if key == "vb" else 1.0)).double().cpu().numpy())
        logger.log(f"done {len(totals)} samples on this rank: {'bpd' if bits else name}={np.mean(totals):.5f}")
    totals = np.concatenate(dist_util.gather_objects(totals))
    gathered = {key: dist_util.gather_objects(rows) for key, rows in terms.items()}
    report = {name: float(totals.mean()), "standard_error": float(totals.std() / math.sqrt(len(totals))),
              "count": len(totals)}
    if dist_util.rank() == 0:
        for key, ranks in gathered.items():
            mean = np.concatenate([rows for of_rank in ranks for rows in of_rank]).mean(0)
            with atomic_path(Path(folder) / f"{key}_terms.npz") as part, open(part, "wb") as stream:
                np.savez(stream, mean)
    write_report(report, folder)
    return report


def roundtrip(codec, pictures, config, folder, device):
    """Encode and decode pictures; return the report, after writing metrics.json and roundtrip.png to `folder`.

    The report holds means of PSNR (dB), SSIM and L1, the greatest error of a pixel, the same three for a bicubic
    down-and-up by the codec's total strides, and the latent's statistics; a channel whose standard deviation is below a
    thousandth of the widest one is listed as dead.
    """
    count = config.num_pictures or len(pictures)
    chosen = np.linspace(0, len(pictures) - 1, min(count, len(pictures))).round().astype(int)
    scores, moments, sheet, kept = {}, Moments(), None, []
    for start in _progress(range(0, len(chosen), config.batch_size), "round trip"):
        images = pictures.batch(chosen[start:start + config.batch_size]).to(device)
        with torch.no_grad():
            latent = codec.encode_batch(images)
            decoded = codec.decode_batch(latent).to(images.dtype)
        moments.add(latent.float().cpu().numpy())
        bicubic = metrics.bicubic_baseline(images, codec.factors)
        images, decoded, bicubic = (unpad(x, pictures.unpadded_shape) for x in (images, decoded, bicubic))
        for prefix, rival in {"": decoded, "bicubic_": bicubic}.items():
            for name in ("psnr", "ssim", "l1"):
                scores.setdefault(prefix + name, []).append(getattr(metrics, name)(images, rival).cpu())
        scores.setdefault("max_error", []).append(metrics.max_error(images, decoded).cpu())
        if config.save_npz:
            kept.append(np.moveaxis(to_uint8(decoded), 1, -1))
        if sheet is None:
            sheet = figures.side_by_side(images[:12].cpu().numpy(), decoded[:12].cpu().numpy())
    statistics = moments.statistics()
    std = statistics["channel_std"]
    report = {k: (torch.cat(v).max() if k == "max_error" else torch.cat(v).mean()).item() for k, v in scores.items()}
    report.update(
        pictures=len(chosen), latent_shape=list(codec.latent_shape(pictures.shape)), scale_factor=codec.scale_factor,
        latent_mean=statistics["mean"], latent_std=statistics["std"], channel_mean=statistics["channel_mean"],
        channel_std=std, dead_channels=[i for i, s in enumerate(std) if s < 1e-3 * max(std)],
    )
    figures.save_picture(Path(folder) / "roundtrip.png", sheet)
    write_json(Path(folder) / "metrics.json", report)
    if kept:
        shape = len(chosen), *kept[0].shape[1:]
        labels = None if pictures.labels is None else pictures.labels[chosen]
        path = Path(folder) / f"reconstructions_{'x'.join(map(str, shape))}.npz"
        write_npz(path, shape, kept, labels, pictures.class_names)
    return report


def failures(report, config):
    """Return one line for every threshold that the report of a round trip misses."""
    lines = []
    limits = ("psnr", config.min_psnr, True), ("ssim", config.min_ssim, True), ("l1", config.max_l1, False)
    for name, limit, below in limits:
        met = report[name] >= limit if below else report[name] <= limit
        if not met:  # so written, NaN fails too
            flag = f"--{'min' if below else 'max'}_{name}"
            lines.append(f"{name} is {report[name]:.4f}, {flag} asks for {'at least' if below else 'at most'} {limit}")
    if report["dead_channels"]:
        lines.append(f"latent channels {report['dead_channels']} are dead: their standard deviation is below a "
                     "thousandth of the widest channel's; lower --kl_weight or --latent_channels")
    return lines


def evaluate(config, data, extract, folder, judge=None, class_names=None, image_shape=None, seed=0):
    """Hold samples against real pictures; return the report, after writing it and its figures to `folder`.

    The ranks share the work of reading features; all of them call this, and rank 0 writes.

    :param extract: images [N x C x ...] in [0, 1] -> `metrics.Features`, between which distances are taken; where they
        hold spatial features too, these are Inception's and the distances go by the names of FID and its kin.
    :param judge: the same of a classifier whose logits mean `class_names`; may be `extract` itself.
    :param image_shape: the only shape (C, ...) that the classifier takes; None: any.
    :raises ValueError: before any is read, where the pictures differ in shape or have classes that `class_names` lacks.
    """
    reference = open_pictures(config.reference, data, "--reference")
    samples = open_pictures(config.samples, data, "--samples")
    training = open_pictures(config.train_dir, data, "--train_dir") if config.train_dir else None
    for flag, path, pictures in (("--samples", config.samples, samples), ("--train_dir", config.train_dir, training)):
        if pictures is not None and len(pictures) == 0:
            raise ValueError(f"{path} holds statistics and no pictures; {flag} wants the pictures themselves")
    if not len(reference) and not config.inception_path:
        raise ValueError(f"{config.reference} holds statistics of Inception features; give --inception_path to compare "
                         "with them, or pictures as --reference")
    for path, pictures in ((config.reference, reference), (config.train_dir, training)):
        if pictures is not None and len(pictures) and pictures.shape != samples.shape:
            raise ValueError(f"{config.samples} holds pictures of shape {samples.shape}, {path} of {pictures.shape} "
                             "(channels, height, width); set --image_size or --image_channels")
    if image_shape and samples.shape != tuple(image_shape):
        raise ValueError(f"{config.samples} holds pictures of shape {samples.shape}, {config.classifier_path} was "
                         f"trained on {tuple(image_shape)} (channels, height, width); set --image_size or "
                         "--image_channels, or take another --classifier_path")
    if config.paired and len(reference) != len(samples):
        raise ValueError("--paired True wants as many samples as reference pictures, "
                         f"found {len(samples)} and {len(reference)}")
    judged_sets = [(name, pictures, labels_in(pictures, class_names))
                   for name, pictures in (("reference", reference), ("samples", samples))
                   if judge is not None and len(pictures) and pictures.labels is not None]
    real = _measure(extract, reference, config.batch_size, "reference")
    made = _measure(extract, samples, config.batch_size, "samples")
    report = {"num_reference": len(reference), "num_samples": len(samples), **_distances(real, made, seed)}
    if config.paired:
        report.update(_paired_scores(reference, samples, config.batch_size))
    for name, pictures, labels in judged_sets:
        known = real.features if name == "reference" else made.features
        features = known if judge is extract else _read(judge, pictures, config.batch_size, "classes")
        judged = metrics.classification_report(features.logits.argmax(1), labels, class_names)
        report["classifier_accuracy" if name == "reference" else "class_agreement"] = judged
        if dist_util.rank() == 0 and len(class_names) <= figures.MOST_CLASSES:
            sheet = figures.confusion_plot(np.array(judged["confusion"]), class_names)
            figures.save_picture(Path(folder) / f"confusion_{name}.png", sheet)
    if training is not None:
        bank = _measure(extract, training, config.batch_size, "training")
        between = _distances(real, bank, seed)
        report["training_to_reference"] = {"num_training": len(training), **between}
        if dist_util.rank() == 0:
            report["neighbours"] = _neighbours(samples, made, real, training, bank, folder)
    write_report(report, folder)
    return report


def write_report(report, folder):
    """Write metrics.json (on rank 0)."""
    if dist_util.rank() == 0:
        write_json(Path(folder) / "metrics.json", report)


@dataclass
class _Measured:
    """What is known of a set: features (None where only statistics were given) and their statistics."""

    features: metrics.Features | None
    statistics: metrics.FeatureStatistics
    spatial: metrics.FeatureStatistics | None


def _measure(extract, pictures, batch_size, what):
    """Return the `_Measured` of a set; statistics that came with it are taken for Inception's, as they were made."""
    known = pictures.statistics if isinstance(pictures, SampleFile) else {}
    features = _read(extract, pictures, batch_size, what) if len(pictures) else None
    inception = features is None or features.spatial is not None
    if known and inception:
        return _Measured(features, known["pooled"], known.get("spatial", features and features.spatial))
    return _Measured(features, metrics.FeatureStatistics().update(features.pooled), features.spatial)


def _distances(real, made, seed):
    """Return the distances of two measured sets by name, as far as both sets allow."""
    inception = made.spatial is not None
    names = ("fid", "kid") if inception else ("frechet", "kernel")
    report = {names[0]: metrics.frechet_distance(real.statistics, made.statistics)}
    if real.spatial is not None and inception:
        report["sfid"] = metrics.frechet_distance(real.spatial, made.spatial)
    if inception:
        report["inception_score"] = metrics.inception_score(made.features.logits)
    if real.features is not None:
        pair = real.features.pooled, made.features.pooled
        report[names[1]] = metrics.kernel_distance(*pair, seed=seed)
        report["precision"], report["recall"] = metrics.precision_recall(*pair)
    return report


def _neighbours(samples, made, real, training, bank, folder, shown=12):
    """Compare distances to the nearest training picture: of samples, and of held-out pictures (which are no copies)."""
    bank = bank.features.pooled
    distances, nearest = metrics.nearest_neighbours(made.features.pooled, bank, k=1)
    rows = np.linspace(0, len(samples) - 1, min(shown, len(samples))).round().astype(int)
    sheet = figures.neighbour_sheet(
        samples.batch(rows).numpy(), training.batch(nearest[rows, 0]).numpy()[:, None], distances[rows]
    )
    figures.save_picture(Path(folder) / "neighbours.png", sheet)
    pixels = [float((samples.batch([r]) - training.batch([nearest[r, 0]])).abs().mean()) for r in rows]
    report = {"median_distance_of_samples": float(np.median(distances)), "shown_samples": rows.tolist(),
              "shown_pixel_l1": pixels}
    if real.features is not None:
        held_out, _ = metrics.nearest_neighbours(real.features.pooled, bank, k=1)
        report["median_distance_of_reference"] = float(np.median(held_out))
        # Samples that stand nearer to a training picture than all but one in a hundred held-out pictures do.
        report["share_suspiciously_near"] = float((distances[:, 0] < np.quantile(held_out, 0.01)).mean())
    return report


def _paired_scores(reference, samples, batch_size):
    scores = {"psnr": [], "ssim": [], "l1": []}
    for start in range(0, len(samples), batch_size):
        rows = range(start, min(start + batch_size, len(samples)))
        a, b = reference.batch(rows), samples.batch(rows)
        for name, values in scores.items():
            values.append(getattr(metrics, name)(a, b))
    return {name: torch.cat(values).mean().item() for name, values in scores.items()}


class SampleFile:
    """The pictures of an .npz of samples, with the interface of PictureFolder that is needed here; read as needed.

    Statistics of Inception features that stand beside them, or alone, are in `statistics`: {"pooled", "spatial"}.
    """

    def __init__(self, path):
        self.folder = path  # named so as that of PictureFolder, which may be an .npz too
        content = open_archive(path)
        self.statistics = {}
        for name, mean, covariance in (("pooled", "mu", "sigma"), ("spatial", "mu_s", "sigma_s")):
            if mean in content and covariance in content:
                self.statistics[name] = metrics.FeatureStatistics.given(content[mean], content[covariance])
        if self.statistics and "arr_0" not in content:
            self.images, self.labels, self.class_names, self.shape = (), None, None, None
            return
        samples = open_npz(path)
        self.images, self.labels, self.class_names = samples.images, samples.labels, samples.class_names
        self.shape = self.images.shape[-1], *self.images.shape[1:-1]

    def __len__(self):
        return len(self.images)

    def batch(self, indices):
        """Return pictures as float32 [n x C x ...] in [0, 1]."""
        return torch.from_numpy(np.moveaxis(self.images[np.asarray(indices)], -1, 1).astype(np.float32) / 255)


def require_given(path, flag):
    """Raise FileNotFoundError where there is no such set of pictures."""
    if not path:
        raise FileNotFoundError(f"{flag} is not given; it wants a folder of pictures or an .npz of samples")
    require_data_dir(str(path), flag)


def open_pictures(path, data, flag):
    """Return the pictures of an .npz of samples, given itself or by its run, or of a folder, read as `data` says."""
    require_given(path, flag)
    if str(path).endswith(".npz") and {"arr_0", "mu"} & set(open_archive(path)):
        return SampleFile(path)
    found = sorted(Path(path).glob("samples_*.npz")) if flag == "--samples" else []
    drawn = [file for file in found if _DRAWN.fullmatch(file.name)]
    if len(drawn) > 1:
        raise ValueError(f"{path} holds {', '.join(p.name for p in drawn)}; give one of them as {flag}")
    return SampleFile(drawn[0]) if drawn else open_folder(as_read(path, data), flag=flag, data_dir=str(path))


def as_read(path, data):
    """Return a DataConfig for a folder: what sampling has written has 8 bits, whatever the range of the real values."""
    if not (Path(path) / OURS).exists():
        return data
    return replace(data, value_range="", value_window="", dynamic_range_db=0.0, reference_db="", crop="center",
                   patches_per_volume=1)


def _read(extract, pictures, batch_size, what):
    """Return the `Features` of all pictures, on every rank; each rank reads every so many batches."""
    starts = range(0, len(pictures), batch_size)[dist_util.rank()::dist_util.world_size()]
    mine = []
    for start in _progress(starts, what):
        batch = pictures.batch(range(start, min(start + batch_size, len(pictures))))
        mine.append((start, metrics.collect_features(extract, [batch])))
    spatial = None
    if any(read.spatial for _, read in mine):
        spatial = metrics.FeatureStatistics()
        for _, read in mine:
            spatial.merge(read.spatial)
    rows = [(start, read.pooled, read.logits) for start, read in mine]
    gathered = dist_util.gather_objects((rows, spatial))
    rows = sorted((row for of_rank, _ in gathered for row in of_rank), key=lambda row: row[0])
    spatial = [of_rank for _, of_rank in gathered if of_rank is not None]
    for other in spatial[1:]:
        spatial[0].merge(other)
    logits = None if rows[0][2] is None else np.concatenate([row[2] for row in rows])
    return metrics.Features(np.concatenate([row[1] for row in rows]), logits, spatial[0] if spatial else None)


def _progress(starts, what):
    from tqdm import tqdm

    return tqdm(starts, desc=what, leave=False, mininterval=1, disable=dist_util.rank() != 0)
