"""Measure an autoencoder's round trip and the quality of samples; what is measured stands in `metrics`."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from . import figures, metrics
from .config import opt
from .files import write_json
from .image_datasets import DataConfig, PictureFolder, labels_in, unpad
from .sampling import read_npz


@dataclass
class RoundtripConfig:
    num_pictures: int = opt(0, "how many pictures to check, evenly spread over the folder; 0: all")
    batch_size: int = opt(32, "pictures at a time")
    min_psnr: float = opt(0.0, "exit with status 1 where the mean PSNR is below this many dB")
    min_ssim: float = opt(-1.0, "exit with status 1 where the mean SSIM is below this")
    max_l1: float = opt(1.0, "exit with status 1 where the mean absolute error is above this")


@dataclass
class EvaluateConfig:
    SECTION = "evaluation"

    samples: str = opt("", "what is judged: an .npz of image_sample_vae.py, or a folder of pictures")
    reference: str = opt("", "what it is held against: a folder of real pictures (or an .npz)")
    train_dir: str = opt("", "the training pictures, to look for copies and to measure them against the reference")
    classifier_path: str = opt("", "run of classifier_train.py, or one weights file of it, whose features and classes "
                                   "are used")
    paired: bool = opt(False, "sample i is a version of reference picture i: report PSNR, SSIM and L1 too")
    batch_size: int = opt(64, "pictures at a time")


def roundtrip(codec, pictures, config, folder, device):
    """Encode and decode pictures; return the report, after writing metrics.json and roundtrip.png to `folder`.

    The report holds means of PSNR (dB), SSIM and L1, the greatest error of a pixel, the same three for a bicubic
    down-and-up by the codec's total strides, and the latent's statistics; a channel whose standard deviation is below a
    thousandth of the widest one is listed as dead.
    """
    count = config.num_pictures or len(pictures)
    chosen = np.linspace(0, len(pictures) - 1, min(count, len(pictures))).round().astype(int)
    scores, latents, sheet = {}, [], None
    for start in _steps(len(chosen), config.batch_size, "round trip"):
        images = pictures.batch(chosen[start:start + config.batch_size]).to(device)
        with torch.no_grad():
            latent = codec.encode_batch(images)
            decoded = codec.decode_batch(latent).to(images.dtype)
        latents.append(latent.float().cpu())
        bicubic = metrics.bicubic_baseline(images, codec.factors)
        images, decoded, bicubic = (unpad(x, pictures.unpadded_shape) for x in (images, decoded, bicubic))
        for prefix, rival in {"": decoded, "bicubic_": bicubic}.items():
            for name in ("psnr", "ssim", "l1"):
                scores.setdefault(prefix + name, []).append(getattr(metrics, name)(images, rival).cpu())
        scores.setdefault("max_error", []).append(metrics.max_error(images, decoded).cpu())
        if sheet is None:
            sheet = figures.side_by_side(images[:12].cpu().numpy(), decoded[:12].cpu().numpy())
    latents = torch.cat(latents).double().transpose(0, 1).flatten(1)  # [C x values]
    std = latents.std(1, correction=0)
    report = {k: (torch.cat(v).max() if k == "max_error" else torch.cat(v).mean()).item() for k, v in scores.items()}
    report.update(
        pictures=len(chosen), latent_shape=list(codec.latent_shape(pictures.shape)), scale_factor=codec.scale_factor,
        latent_mean=latents.mean().item(), latent_std=latents.std(correction=0).item(),
        channel_mean=latents.mean(1).tolist(), channel_std=std.tolist(),
        dead_channels=[i for i, s in enumerate(std.tolist()) if s < 1e-3 * std.max().item()],
    )
    figures.save_picture(Path(folder) / "roundtrip.png", sheet)
    write_json(Path(folder) / "metrics.json", report)
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


def evaluate(config, data, extract, folder, class_names=None, image_shape=None, seed=0):
    """Hold samples against real pictures; return the report, after writing it and its figures to `folder`.

    :param extract: images [N x C x ...] in [0, 1] -> (features [N x D], logits [N x K] or None).
    :param class_names: what the logits mean, where `extract` gives any.
    :param image_shape: the only shape (C, H, W) that `extract` takes; None: any.
    :raises ValueError: where the pictures differ in shape, or have classes that `class_names` lacks.
    """
    reference = open_pictures(config.reference, data, "--reference")
    samples = open_pictures(config.samples, data, "--samples")
    if reference.shape != samples.shape:
        raise ValueError(f"{config.samples} holds pictures of shape {samples.shape}, {config.reference} of "
                         f"{reference.shape} (channels, height, width); set --image_size or --image_channels")
    if image_shape and reference.shape != tuple(image_shape):
        raise ValueError(f"{config.reference} holds pictures of shape {reference.shape}, {config.classifier_path} was "
                         f"trained on {tuple(image_shape)} (channels, height, width); set --image_size or "
                         "--image_channels, or take another --classifier_path")
    real, real_logits = _features(extract, reference, config.batch_size, "reference")
    made, made_logits = _features(extract, samples, config.batch_size, "samples")
    report = {"num_reference": len(reference), "num_samples": len(samples)}
    report.update(metrics.evaluate_sets(real, made, seed=seed))
    if config.paired:
        report.update(_paired_scores(reference, samples, config.batch_size))
    if real_logits is not None:
        for name, logits, pictures in (("reference", real_logits, reference), ("samples", made_logits, samples)):
            if pictures.labels is None:
                continue
            asked = labels_in(pictures, class_names)
            judged = metrics.classification_report(logits.argmax(1), asked, class_names)
            report["classifier_accuracy" if name == "reference" else "class_agreement"] = judged
            sheet = figures.confusion_plot(np.array(judged["confusion"]), class_names)
            figures.save_picture(Path(folder) / f"confusion_{name}.png", sheet)
    if config.train_dir:
        training = open_pictures(config.train_dir, data, "--train_dir")
        bank, _ = _features(extract, training, config.batch_size, "training")
        between = metrics.evaluate_sets(real, bank, seed=seed)
        report["training_to_reference"] = {"num_training": len(training), **between}
        report["neighbours"] = _neighbours(samples, made, real, training, bank, folder)
    write_json(Path(folder) / "metrics.json", report)
    return report


def _neighbours(samples, made, real, training, bank, folder, shown=12):
    """Compare distances to the nearest training picture: of samples, and of held-out pictures (which are no copies)."""
    distances, nearest = metrics.nearest_neighbours(made, bank, k=1)
    held_out, _ = metrics.nearest_neighbours(real, bank, k=1)
    rows = np.linspace(0, len(samples) - 1, min(shown, len(samples))).round().astype(int)
    sheet = figures.neighbour_sheet(
        samples.batch(rows).numpy(), training.batch(nearest[rows, 0]).numpy()[:, None], distances[rows]
    )
    figures.save_picture(Path(folder) / "neighbours.png", sheet)
    pixels = [float((samples.batch([r]) - training.batch([nearest[r, 0]])).abs().mean()) for r in rows]
    return {
        "median_distance_of_samples": float(np.median(distances)),
        "median_distance_of_reference": float(np.median(held_out)),
        "shown_samples": rows.tolist(), "shown_pixel_l1": pixels,
    }


def _paired_scores(reference, samples, batch_size):
    if len(reference) != len(samples):
        raise ValueError("--paired True wants as many samples as reference pictures, "
                         f"found {len(samples)} and {len(reference)}")
    scores = {"psnr": [], "ssim": [], "l1": []}
    for start in range(0, len(samples), batch_size):
        rows = range(start, min(start + batch_size, len(samples)))
        a, b = reference.batch(rows), samples.batch(rows)
        for name, values in scores.items():
            values.append(getattr(metrics, name)(a, b))
    return {name: torch.cat(values).mean().item() for name, values in scores.items()}


class SampleFile:
    """The pictures of an .npz of samples, with the interface of PictureFolder that is needed here."""

    def __init__(self, path):
        self.folder = path  # named so as that of PictureFolder, which may be an .npz too
        self.images, self.labels, self.class_names = read_npz(path)
        self.shape = tuple(self.images.shape[1:])

    def __len__(self):
        return len(self.images)

    def batch(self, indices):
        return self.images[np.asarray(indices)]


def open_pictures(path, data, flag):
    """Return the pictures of a folder (read as `data` says) or of an .npz of samples."""
    if not path:
        raise FileNotFoundError(f"{flag} is not given; it wants a folder of pictures or an .npz of samples")
    if str(path).endswith(".npz"):
        return SampleFile(path)
    return PictureFolder(data, data_dir=str(path))


def _features(extract, pictures, batch_size, what):
    steps = _steps(len(pictures), batch_size, what)
    batches = (pictures.batch(range(s, min(s + batch_size, len(pictures)))) for s in steps)
    return metrics.collect_features(extract, batches)


def _steps(count, batch_size, what):
    from tqdm import tqdm

    return tqdm(range(0, count, batch_size), desc=what, leave=False, mininterval=1)
