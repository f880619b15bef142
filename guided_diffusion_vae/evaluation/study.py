"""Measure what synthetic images are worth for a classifier: trained with and without them, tested on real images."""

import csv
import io
import itertools
import math
import re
from dataclasses import dataclass
from typing import Annotated, Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from .. import dist_util
from ..config import CommaSeparated, option, require, words
from ..data.augmentation import augment_spectrograms
from ..data.colormaps import Colormap
from ..files import atomic_stream, hash_lines, read_record, write_json, write_record
from ..logger import log_rank0, progress
from ..nn import keyed_rng, keyed_seed
from ..objectives import StepRNG
from .figures import interval_plot, save_image, study_table, study_title
from .set_metrics import calibration_error, classification_report, macro_f1

STUDY = 17              # second number of the keys of its random numbers; training and sampling use others
VERSION = 1             # of what a training does: one of another version is not reused
WARMUP_STEPS = 20
STOPS = 0.25, 0.5, 0.75, 1      # parts of the steps after which the validation images are measured
FILTER_SEED = 1000      # of the classifier of `--filter_samples`; arms have smaller ones
SELECTION_SEEDS = 3     # trainings of each strength on a part of the images, to choose the strength and the steps
HELD_BACK = 0.2         # part of a recording that validates, if its class has no other recording
TEST_BATCH = 256
SYNTHETIC = math.inf    # ratio of an arm without real images
METRICS = "error", "macro_f1", "calibration_error", "cross_entropy"
positive = CommaSeparated("1,2", "positive numbers", float, lambda numbers: min(numbers, default=0) > 0)


@dataclass
class StudyConfig:
    SECTION = "study"

    val_data_dir: str = option("", "test images, of other recordings than --data_dir: nothing is chosen by them",
                               essential=True)
    samples: Annotated[str, words] = option(
        "", "comma-separated sets of samples: folders of sampling scripts, or of images of make_microdoppler.py or in "
            "--allow_networks, which may lack classes; empty: none", essential=True)
    train_models: bool = option(
        False, "train an autoencoder (or use that of --vae_path) and a diffusion model on each share alone, with the "
               "settings of --config, and sample it", essential=True)
    group_by: str = option(
        "", "recording or subject of an image: regular expression, whose groups are searched in the file name, or a "
            "column of the label file; empty: images are independent", essential=True)
    shares: Annotated[str, words] = option(
        "all", "comma-separated shares of the training images, smaller ones first: N (first N recordings of each "
               "class), P% (first P percent of each recording), N:P%, or all", essential=True)
    ratios: Annotated[str, positive] = option(
        "1", "comma-separated numbers of synthetic images per real one in a batch")
    filter_samples: bool = option(
        False, "omit samples that a classifier does not assign to their class, which is trained on the real images of "
               "their share with the chosen augmentation")
    label_smoothing: float = option(
        0.0, "part of the target of a sample that is distributed over all classes; 0: its class alone, as of real "
             "images", minimum=0, below=1)
    strengths: Annotated[str, positive] = option(
        "0.5,1,2", "comma-separated strengths of classical augmentation (1: shifts by up to 25% of the time and 3% of "
                   "the Doppler axis, gain 10% of the range, noise 5%, masks 20%); one is chosen by validation")
    seeds: int = option(6, "trainings of each arm, with seeds that all arms share", minimum=2)
    steps: int = option(300, "optimizer steps of the schedule, equal for all arms", minimum=1)
    batch_size: int = option(64, "images in a batch, of all classes equally", minimum=2)
    width: int = option(8, "channels of the first layer of the classifier", minimum=1)
    lr: float = option(2e-3, "learning rate of AdamW, after a warmup decayed linearly to 0", above=0)
    weight_decay: float = option(0.05, "decoupled weight decay of AdamW", minimum=0)
    allow_groups: Annotated[str, words] = option(
        "", "comma-separated recordings that may have images in both --data_dir and --val_data_dir, of other times")
    allow_networks: Annotated[str, words] = option(
        "", "comma-separated paths of networks that may be trained on other images than those of a share, because they "
            "are known not to be test images: pretrained networks, simulations; and of such --samples themselves")


class Images(NamedTuple):
    """Images in [0, 1], float32 [N x C x H x W], and their classes, int64 [N], on the CPU.

    `colormap` is that of RGB images, whose scalars are augmented.
    """

    images: torch.Tensor
    labels: torch.Tensor
    colormap: Colormap | None = None

    def select(self, rows):
        """Return the images of some rows."""
        rows = torch.as_tensor(rows)
        return self._replace(images=self.images[rows], labels=self.labels[rows])


class Share(NamedTuple):
    """A share of the training images: its rows int64 [N], and {name: `Images`} of samples that it alone trained.

    `digests` identify the samples.
    """

    name: str
    rows: np.ndarray
    samples: dict
    digests: dict


class Arm(NamedTuple):
    """Training images of a classifier: `ratio` of the samples `source` per real one, augmented with `strength`."""

    ratio: float = 0
    strength: float = 0
    source: str = ""


def list_arms(config: StudyConfig, strength: float, sources, incomplete=()) -> dict[str, Arm]:
    """Return {name: `Arm`} of a share, with the chosen strength of classical augmentation and its sets of samples.

    :param incomplete: sets without samples of all classes, from which alone no classifier is trained.
    """
    strengths, ratios = positive.parse(config.strengths, "strengths"), positive.parse(config.ratios, "ratios")
    arms = {"real": Arm(), **{f"classical {each:g}": Arm(strength=each) for each in strengths}}
    for source in sources:
        of = f" of {source}" if len(sources) > 1 else ""
        arms |= {} if source in incomplete else {f"synthetic{of}": Arm(SYNTHETIC, 0, source)}
        arms |= {f"real + synthetic{of} 1:{ratio:g}": Arm(ratio, 0, source) for ratio in ratios}
        arms |= {f"classical + synthetic{of} 1:{ratio:g}": Arm(ratio, strength, source) for ratio in ratios}
    return arms


# --- Shares and validation images ---


def find_share(text: str, groups, labels) -> np.ndarray:
    """Return the rows int64 [N] of an entry of `--shares`.

    :param groups: recording of each image, whose order is that of time.
    :raises ValueError: if the text is none, or there are no such recordings.
    """
    found = re.fullmatch(r"all|(\d+)|(?:(\d+):)?(\d+(?:\.\d+)?)%", text)
    expected = f"--shares {text}: expected N (recordings of each class), P% (of each recording), N:P% or all"
    if found is None:
        raise ValueError(expected)
    count = int(found[1] or found[2] or len(groups))
    part = float(found[3] or 100) / 100
    require((count >= 1 and 0 < part <= 1, expected))
    rows = [chosen[:max(1, math.ceil(part * len(chosen) - 1e-9))]
            for recordings in _recordings(groups, labels) for chosen in recordings[:count]]
    return np.sort(np.concatenate(rows))


def split_validation(groups, labels, rows) -> tuple[np.ndarray, np.ndarray]:
    """Return rows (fitted, validation) of a share: the last recording of each class validates.

    The last HELD_BACK of it, if a class has one recording.

    :raises ValueError: if a class has one image.
    """
    fitted, validation = [], []
    for recordings in _recordings(groups[rows], labels[rows]):
        if len(recordings) > 1:
            *first, last = recordings
        else:
            recording, = recordings
            held_back = max(1, int(HELD_BACK * len(recording)))
            require((held_back < len(recording), "--shares: a share has one image of a class, expected two or more"))
            first, last = [recording[:-held_back]], recording[-held_back:]
        fitted += first
        validation.append(last)
    return rows[np.sort(np.concatenate(fitted))], rows[np.sort(np.concatenate(validation))]


def _recordings(groups, labels):
    """Return for each class the rows of each of its recordings, in natural order of their names."""
    natural = lambda name: [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", name)]
    return [[np.flatnonzero((groups == group) & (labels == label))
             for group in sorted(set(groups[labels == label]), key=natural)] for label in np.unique(labels)]


# --- One training ---


def create_network(channels: int, num_classes: int, width: int) -> nn.Module:
    """Return a convolutional classifier: images in [-1, 1], [N x C x H x W], to logits [N x K]."""
    widths = [channels, width, 2 * width, 4 * width, 4 * width]
    layers = [layer for a, b in itertools.pairwise(widths)
              for layer in (nn.Conv2d(a, b, 3, 2, 1), nn.GroupNorm(math.gcd(8, b), b), nn.SiLU())]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(4), nn.Flatten(), nn.Dropout(0.3),
                         nn.Linear(16 * widths[-1], num_classes))


def train(real: Images, samples: Images | None, arm: Arm, seed: int, config: StudyConfig, stops, device):
    """Train a classifier; yield it after each number of steps in `stops`.

    A batch has as many images of each class on average, and a constant number of samples; real images replace those of
    classes without samples. Initialization, classes and augmentation depend on the seed alone, so that arms are paired.
    """
    num_classes, batch_size = int(real.labels.max()) + 1, config.batch_size
    num_synthetic = batch_size if arm.ratio == SYNTHETIC else round(batch_size * arm.ratio / (1 + arm.ratio))
    pools: Any = [[torch.nonzero(part.labels == label)[:, 0] for label in range(num_classes)] if part else None
                  for part in (samples, real)]
    parts: Any = (samples, pools[0]), (real, pools[1])
    rng = keyed_rng(seed, STUDY)
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(keyed_seed(seed, STUDY))
        network = create_network(real.images.shape[1], num_classes, config.width).to(device)
        optimizer = torch.optim.AdamW(network.parameters(), config.lr, weight_decay=config.weight_decay)
        for step in range(max(stops)):
            for group in optimizer.param_groups:
                group["lr"] = config.lr * min(1, (step + 1) / WARMUP_STEPS) * (1 - step / config.steps)
            labels, positions = rng.integers(num_classes, size=batch_size), rng.random(batch_size)
            synthetic = [i < num_synthetic and len(pools[0][label]) > 0 for i, label in enumerate(labels)]
            batch = [(part.images, pool[label][int(position * len(pool[label]))])
                     for label, position, is_sample in zip(labels, positions, synthetic)
                     for part, pool in [parts[0] if is_sample else parts[1]]]
            images = torch.stack([source[row] for source, row in batch]).to(device)
            if arm.strength:
                images = augment_spectrograms(images, StepRNG(seed, step, range(batch_size), batch_size), arm.strength,
                                              colormap=real.colormap)
            targets = torch.from_numpy(labels)
            if config.label_smoothing and any(synthetic):
                part = config.label_smoothing * torch.tensor(synthetic)[:, None]
                targets = (1 - part) * F.one_hot(targets, num_classes) + part / num_classes
            loss = F.cross_entropy(network(2 * images - 1), targets.to(device))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            if step + 1 in stops:
                yield network


@torch.no_grad()
def predict(network: nn.Module, images: torch.Tensor, device) -> torch.Tensor:
    """Return the logits float64 [N x K] of a classifier for images in [0, 1], [N x C x H x W]."""
    network.eval()
    logits = torch.cat([network(2 * part.to(device) - 1).cpu() for part in images.split(TEST_BATCH)]).double()
    network.train()
    return logits


def measure(network: nn.Module, images: Images, device) -> dict:
    """Return the metrics of a classifier: METRICS, `accuracy` and the `recall` of each class."""
    logits = predict(network, images.images, device)
    report = classification_report(logits.argmax(1), images.labels, [str(k) for k in range(logits.shape[1])])
    return {"error": 1 - report["accuracy"], "accuracy": report["accuracy"], "macro_f1": macro_f1(report["confusion"]),
            "calibration_error": calibration_error(logits.softmax(1), images.labels),
            "cross_entropy": F.cross_entropy(logits, images.labels).item(),
            "recall": list(report["per_class"].values())}


# --- The study ---


def run_study(config: StudyConfig, training: Images, groups, test: Images, shares: list[Share], class_names, folder,
              settings, device) -> dict:
    """Train all arms of all shares; return the report, after writing tables and a plot to `folder`.

    The ranks share the trainings; all of them call this, and rank 0 writes the report. A finished training has a record
    in trainings/, named by its settings, and is not repeated.

    The strength of classical augmentation and the number of steps are chosen by validation images out of the share,
    without samples. Then all arms are trained on all images of the share, in that number of steps.

    :param groups: recording of each training image.
    :param settings: text of all that determines the images.
    """
    settings = [str(VERSION), settings, *(f"{name} {getattr(config, name)}" for name in
                                          ("steps", "batch_size", "width", "lr", "weight_decay")),
                *([f"colormap {training.colormap.name}"] if training.colormap else [])]
    shares = [share._replace(samples=dict(share.samples), digests=dict(share.digests)) for share in shares]
    labels = training.labels.numpy()
    strengths = positive.parse(config.strengths, "strengths")
    splits = {share.name: split_validation(groups, labels, share.rows) for share in shares}
    selections = [(share, Arm(strength=strength), seed) for share in shares for strength in strengths
                  for seed in range(SELECTION_SEEDS)]
    stops = sorted({math.ceil(part * config.steps) for part in STOPS})

    def select(share, arm, seed):
        fitted, validation = (training.select(rows) for rows in splits[share.name])
        return {"validation": [measure(network, validation, device)["cross_entropy"]
                               for network in train(fitted, None, arm, seed, config, stops, device)]}

    measured = _run("validation", selections, select, settings, folder)
    choices = {share.name: _choose(stops, {
        arm.strength: [result["validation"] for (other, arm_, _), result in zip(selections, measured)
                       if other is share and arm_ == arm] for arm in {task[1]: None for task in selections}
    }) for share in shares}
    for name, choice in choices.items():
        log_rank0(f"share {name}: strength {choice['strength']:g} and {choice['steps']} steps are chosen by validation")

    chosen = {name: str(choice["steps"]) for name, choice in choices.items()}

    def recognize(share, arm, seed):
        network, = train(training.select(share.rows), None, arm, seed, config, [choices[share.name]["steps"]], device)
        samples = share.samples[arm.source]
        return (predict(network, samples.images, device).argmax(1) == samples.labels).tolist()

    filters = [(share, Arm(0, choices[share.name]["strength"], source), FILTER_SEED)
               for share in shares for source in share.samples if config.filter_samples]
    filtered: dict[str, Any] = {}
    kept_samples = _run("filter", filters, recognize, settings, folder, chosen) if filters else []
    for (share, arm, _), kept in zip(filters, kept_samples):
        filtered.setdefault(share.name, {})[arm.source] = _filter(share, arm.source, kept, class_names)
    for share in shares if config.label_smoothing else ():
        for source, digest in share.digests.items():
            share.digests[source] = hash_lines([digest, f"label_smoothing {config.label_smoothing}"])

    is_incomplete = lambda images: len(images.labels.unique()) < len(class_names)
    arms = {share.name: list_arms(config, choices[share.name]["strength"], list(share.samples),
                                  [name for name, images in share.samples.items() if is_incomplete(images)])
            for share in shares}
    tasks = [(share, arm, seed) for share in shares for seed in range(config.seeds)
             for arm in arms[share.name].values()]

    def test_one(share, arm, seed):
        stop = choices[share.name]["steps"]
        network, = train(training.select(share.rows), share.samples.get(arm.source), arm, seed, config, [stop], device)
        return measure(network, test, device)

    results = dict(zip(((share.name, arm, seed) for share, arm, seed in tasks),
                       _run("trainings", tasks, test_one, settings, folder, chosen)))
    report = {"classes": class_names, "num_test": len(test.labels), "seeds": config.seeds, "shares": {}}
    for share in shares:
        choice, by_arm = choices[share.name], {
            name: [results[share.name, arm, seed] for seed in range(config.seeds)]
            for name, arm in arms[share.name].items()}
        report["shares"][share.name] = {"images": len(share.rows), **choice, **summarize(by_arm, choice["strength"])}
        if config.filter_samples:
            report["shares"][share.name]["filtered"] = filtered.get(share.name, {})
    if dist_util.rank() == 0:
        _write(report, results, arms, class_names, folder)
    return report


def _run(description, tasks, function, settings, folder, chosen=None):
    """Return the result of `function` of each task on all ranks, each from its record or computed by one rank."""
    trainings = folder / "trainings"
    trainings.mkdir(parents=True, exist_ok=True)
    paths = []
    for share, arm, seed in tasks:
        key = hash_lines([*settings, description, hash_lines(map(str, share.rows)), repr(arm._replace(source="")),
                          share.digests.get(arm.source, ""), str(seed), (chosen or {}).get(share.name, "")])
        paths.append(trainings / f"{key[:16]}.json")
    recorded = sum(path.exists() for path in paths)
    log_rank0(f"{description}: {recorded} trainings are reused from {trainings}, {len(paths) - recorded} are new")
    own = {}
    for number in progress(range(len(tasks))[dist_util.rank()::dist_util.world_size()], description):
        (share, arm, seed), path = tasks[number], paths[number]
        if path.exists():
            own[number] = read_record(path, "remove it: the training is repeated")["result"]
        else:
            own[number] = function(share, arm, seed)
            about = {"share": share.name, "arm": arm._asdict() | {"ratio": str(arm.ratio)}, "seed": seed}
            write_record(path, {**about, "result": own[number]})
    results = {number: result for part in dist_util.gather_objects(own) for number, result in part.items()}
    return [results[number] for number in range(len(tasks))]


def _filter(share, source, kept, class_names):
    """Keep some samples of a source in a share; return {class: [samples that are kept, samples]}.

    :param kept: whether each sample is kept.
    :raises ValueError: if none of a class is.
    """
    samples, kept = share.samples[source], torch.tensor(kept)
    of_class = {name: samples.labels == label for label, name in enumerate(class_names)}
    counts = {name: [int((kept & rows).sum()), int(rows.sum())] for name, rows in of_class.items()}
    lost = [name for name, (count, total) in counts.items() if total and not count]
    require((not lost, f"--filter_samples True omits all samples of {', '.join(lost)} of {source} in share "
             f"{share.name}: a classifier of its real images assigns none to their class; set it to False, or use "
             "other samples"))
    log_rank0(f"share {share.name}: {int(kept.sum())} of {len(kept)} samples of {source} are kept: "
              + ", ".join(f"{name} {count} of {total}" for name, (count, total) in counts.items()))
    share.samples[source] = samples.select(kept)
    share.digests[source] = hash_lines([share.digests.get(source, ""), *map(str, kept.nonzero()[:, 0].tolist())])
    return counts


def _choose(stops, losses):
    """Return the strength and steps with the lowest mean validation loss.

    :param losses: {strength: one list per seed, of the loss after each of `stops`}.
    """
    means = {strength: np.mean(rows, 0).tolist() for strength, rows in losses.items()}
    _, strength, steps = min((loss, strength, steps) for strength, row in means.items()
                             for loss, steps in zip(row, stops))
    return {"strength": strength, "steps": steps,
            "validation_loss": {f"{strength:g}": dict(zip(map(str, stops), row)) for strength, row in means.items()}}


# --- Statistics ---


def interval(values) -> list[float]:
    """Return [mean, low, high] of values over seeds: the 95% interval of Student's t distribution."""
    from scipy.stats import t

    values = np.asarray(values, np.float64)
    half = t.ppf(0.975, len(values) - 1) * values.std(ddof=1) / math.sqrt(len(values))
    return [float(values.mean()), float(values.mean() - half), float(values.mean() + half)]


def summarize(results: dict[str, list[dict]], strength: float) -> dict:
    """Return means and intervals over seeds of {arm: results by seed}, and differences to classical augmentation.

    `baseline` is the arm of the chosen strength; `best_classical` the one with the lowest error on the test images,
    a bound that no honest choice reaches. Differences are paired by seed; `relative` ones are parts of the mean error
    of the other arm.
    """
    baseline = f"classical {strength:g}"
    mean_error = {name: np.mean([each["error"] for each in rows]) for name, rows in results.items()}
    best = min((name for name in results if re.fullmatch(r"classical \S+", name)), key=mean_error.__getitem__)
    arms: dict[str, Any] = {}
    for name, rows in results.items():
        arms[name] = {metric: interval([row[metric] for row in rows]) for metric in METRICS}
        arms[name]["recall"] = [None if None in values else float(np.mean(values))
                                for values in zip(*(row["recall"] for row in rows))]
        for key, other in (("difference", baseline), ("difference_to_best", best)):
            values = interval([row["error"] - base["error"] for row, base in zip(rows, results[other])])
            arms[name][key] = values
            if mean_error[other]:
                arms[name][f"relative_{key}"] = [value / mean_error[other] for value in values]
    return {"baseline": baseline, "best_classical": best, "arms": arms}


def format_tables(report: dict) -> list[str]:
    """Return lines of the tables of a report, one table per share."""
    lines = []
    for name in report["shares"]:
        rows = study_table(report, name)
        widths = [max(map(len, column)) for column in zip(*rows)]
        lines += [study_title(report, name), *(
            "  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]).rstrip() for row in rows)]
    return lines


def verdict(report: dict) -> list[str]:
    """Return one line per share with samples: what they changed beside classical augmentation."""
    lines = []
    for name, share in report["shares"].items():
        both = next((arm for arm in share["arms"] if arm.startswith("classical + ")), None)
        if both is None:
            continue
        values, base = share["arms"][both], share["arms"][share["baseline"]]
        low, high = values["difference"][1:]
        effect = "lower" if high < 0 else "higher" if low > 0 else "not significantly different"
        change = "{:+.0%} [{:+.0%}, {:+.0%}], ".format(*values["relative_difference"]) if base["error"][0] else ""
        lines.append(f"share {name}: {both}: error {values['error'][0]:.2%} instead of {base['error'][0]:.2%} with "
                     f"{share['baseline']} alone: {change}{effect}")
    return lines


def _write(report, results, arms, class_names, folder):
    """Write study.json, study.csv and study.png, and log the tables."""
    write_json(folder / "study.json", report)
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["share", "arm", "seed", *METRICS, *(f"recall_{name}" for name in class_names)])
    names = {(share, arm): name for share, by_name in arms.items() for name, arm in by_name.items()}
    for (share, arm, seed), result in results.items():
        writer.writerow([share, names[share, arm], seed, *(f"{result[metric]:.6g}" for metric in METRICS),
                         *("" if recall is None else f"{recall:.6g}" for recall in result["recall"])])
    with atomic_stream(folder / "study.csv") as stream:
        stream.write(text.getvalue().encode())
    curves = {}
    for share, summary in report["shares"].items():
        for name, values in summary["arms"].items():
            name = "classical (chosen)" if name == summary["baseline"] else name
            curves.setdefault(name, {})[share] = [100 * value for value in values["error"]]
    shown = {name: points for name, points in curves.items() if not re.fullmatch(r"classical \d\S*", name)}
    save_image(folder / "study.png", interval_plot(shown, list(report["shares"]), "share of real training images",
                                                   "error on test images in %"))
    for line in [*format_tables(report), *verdict(report)]:
        log_rank0(line)
