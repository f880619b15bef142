"""Open the images of an augmentation study, and check that the networks of its samples saw no others."""

import dataclasses
import hashlib
import itertools
import os
import re
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from .. import dist_util, logger
from ..checkpoint_util import find_weights, load_weights
from ..config import format_shape, require, words
from ..data import DataConfig, format_classes, map_labels, open_colormap, open_folder, require_labels
from ..data.archives import file_stamps
from ..data.axes import find_simulation
from ..data.labels import LABEL_FILES, read_column
from ..data.manifest import read_manifest
from ..evaluation.study import Images, Share, StudyConfig, find_share, run_study
from ..files import hash_lines, read_record, sha256_of_file
from ..latent_datasets import is_cache
from ..sampling import SAMPLE_FILES, SAMPLING_RECORD, StudySamplingConfig
from ..vae_wrapper import VAEConfig, create_vae
from .run import read_config_file
from .spaces import apply_trained_preprocessing, open_codec, works_on_pixels
from .study_models import (
    create_stages, find_fingerprint, find_starts, model_paths, sample_model, train_model,
)

SHA256_OF = {"model_path": "model", "guide_model_path": "guide_model", "classifier_path": "classifier"}
READ_BATCH = 64


class Seen(NamedTuple):
    """Images that a network was trained on: the path of the network and its flag, number and fingerprint of the images.

    Both are None if they are unknown. `folder` are the images, `validation` those by which its best step was chosen, ""
    if there are none or they are unknown.
    """

    path: str
    flag: str
    count: int | None  # type: ignore[assignment]  # tuples have a method of this name
    fingerprint: str | None
    folder: str = ""
    validation: str = ""


def study(run) -> dict | None:
    """Run the study of a command and return its report; a dry run logs the shares only.

    :raises ValueError: if training and test images share recordings, or samples do not belong to a share.
    """
    config, data = run[StudyConfig], run[DataConfig]
    unused = [flag for flag in ("filter_samples", "label_smoothing") if getattr(config, flag)]
    require((not unused or config.samples or config.train_models or run[StudySamplingConfig].model_path,
             f"--{' and --'.join(unused)}: expected samples, got none; set --samples, --model_path or "
             "--train_models True"))
    source = open_folder(data)
    test = open_folder(dataclasses.replace(data, data_dir=config.val_data_dir), flag="--val_data_dir")
    for images, flag in ((source, "--data_dir"), (test, "--val_data_dir")):
        require((len(images.shape) == 3, f"{images.folder} ({flag}): expected images, got volumes"))
        require_labels(images, True)
        logger.log_rank0(images.summary())
    require((source.shape == test.shape, f"{test.folder} (--val_data_dir): expected images of shape "
             f"{format_shape(source.shape)}, got {format_shape(test.shape)}"),
            (source.fingerprint != test.fingerprint, f"{test.folder} (--val_data_dir) has the images of "
             f"{source.folder}: expected images of other recordings"))
    if source.shape[0] == 3 and not _find_colormap(source):
        logger.warn(f"{source.folder} contains RGB images of no known colormap: classical augmentation adds gain and "
                    "noise to their channels; set --colormap or --image_channels 1 if they are spectrograms")
    groups = np.array(find_groups(source, config.group_by))
    _check_overlap(config, groups, source, test)
    shares = _open_shares(config, source, groups)
    samples = _find_samples(run, NetworkCheck(run, source, test, shares))
    if samples is None:
        return None
    for share in shares:
        for name, path in samples.get(share.name, {}).items():
            images, share.digests[name] = _open_sample_images(data, path, source)
            share.samples[name] = images
    training = _read(source)
    settings = hash_lines([source.fingerprint, test.fingerprint, repr(source.preprocessing)])
    return run_study(config, training, groups, _read(test, source.class_names), shares, source.class_names, run.folder,
                     settings, dist_util.dev())


# --- Recordings and shares ---


def find_groups(source, group_by: str) -> list[str]:
    """Return the recording of each image of a source by `--group_by`, its class if that is empty.

    :raises ValueError: if it is neither a column nor an expression that is found in all names.
    """
    if not group_by:
        return [source.class_names[label] for label in source.labels]
    column = read_column(source.names, source.folder, group_by)
    if column is not None:
        return column
    try:
        found = [re.search(group_by, str(name)) for name in source.names]
    except re.error as error:
        raise ValueError(f"--group_by {group_by}: expected a regular expression or a column of the label file "
                         f"({error})") from error
    without = [name for name, match in zip(source.names, found) if match is None]
    require((not without, f"--group_by {group_by} is no column of a label file in {source.folder}, and as a regular "
             f"expression not found in {len(without)} of {len(source)} names (first {', '.join(without[:1])})"))
    return ["_".join(filter(None, match.groups())) or match[0] for match in found if match]


def _check_overlap(config, groups, source, test):
    """Reject recordings in both sets; without --group_by, warn if names look as if there were such."""
    if config.group_by:
        common = sorted(set(groups) & set(find_groups(test, config.group_by)) - set(words.parse(
            config.allow_groups, "allow_groups")))
        return require((not common, f"{test.folder} (--val_data_dir) and {source.folder} (--data_dir) both have images "
                        f"of {', '.join(common[:8])} (--group_by {config.group_by}): neighboring windows of a "
                        "recording are nearly the same image; split by recordings, or name those in --allow_groups "
                        "that are split by time"))
    start = lambda name: re.sub(r"\d+$", "", Path(str(name)).stem).rstrip("_-. ")
    common = sorted({start(name) for name in source.names} & {start(name) for name in test.names}
                    - {"", *source.class_names})
    if common and dist_util.rank() == 0:
        logger.warn(f"{test.folder} and {source.folder} have images of the same names except for a last number "
                    f"({', '.join(common[:4])}): if these are windows of the same recordings, which overlap, as a "
                    "random split has, errors are far too low; set --group_by to check")


def _open_shares(config, source, groups):
    texts = words.parse(config.shares, "shares")
    shares = [Share(text, find_share(text, groups, source.labels), {}, {}) for text in texts]
    for smaller, larger in itertools.pairwise(shares):
        require((set(smaller.rows) <= set(larger.rows), f"--shares {config.shares}: expected each to contain the one "
                 f"before it, {larger.name} does not contain {smaller.name}; list smaller ones first"))
    for share in shares:
        recordings = len(set(groups[share.rows]))
        logger.log_rank0(f"share {share.name}: {len(share.rows)} images of {recordings} recordings")
    return shares


def fingerprint_of_rows(source, rows) -> str | None:
    """Return the fingerprint that a folder of some images of a source has; None if images have no files of their own.
    """
    if len(rows) == len(source):
        return source.fingerprint
    if not _has_files(source):
        return None
    return hash_lines(f"{source.names[row]} {file_stamps(source.paths[row])[0]}" for row in rows)


def _has_files(source):
    """Return whether each image has a file of its own; those of archives have none."""
    paths = getattr(source, "paths", ())
    return len(paths) == len(source) and all(map(os.path.isfile, paths))


def _folder_of_share(source, share, folder) -> str:
    """Return the folder of the images of a share, "" if they have no files of their own.

    That of all images if the share has them, else that which `_link_share` creates in the run folder.
    """
    if len(share.rows) == len(source):
        return source.folder
    return str(folder / "shares" / _folder_name(share)) if _has_files(source) else ""


def _folder_name(share):
    return share.name.replace("%", "_percent").replace(":", "_")


def _link_share(source, share, folder):
    """Create the folder of links to the files of a share on rank 0, on which generative models can be trained."""
    target = _folder_of_share(source, share, folder)
    if dist_util.rank() == 0 and target not in ("", source.folder):
        shutil.rmtree(target, ignore_errors=True)
        paths = {source.names[row]: source.paths[row] for row in share.rows}
        paths |= {name: path for name in LABEL_FILES if os.path.isfile(path := os.path.join(source.folder, name))}
        for name, path in paths.items():
            link = Path(target, name)
            link.parent.mkdir(parents=True, exist_ok=True)
            try:
                os.symlink(os.path.abspath(path), link)
            except OSError:     # not permitted on Windows
                shutil.copy2(path, link)    # with its time, which the fingerprint contains
        logger.log(f"share {share.name}: linked in {target}")
    dist_util.barrier()


# --- Samples ---


def _find_samples(run, check) -> dict[str, dict] | None:
    """Return {share: {name: path}} of the sets of samples: those of `--samples`, and of models that are sampled here.

    All networks are checked before the first one is trained or sampled. A dry run ends with that, and returns None.
    """
    config, source, shares = run[StudyConfig], check.source, check.shares
    found: dict[str, dict] = {share.name: {} for share in shares}

    def add(share, folder, path):
        sets = found[share.name]
        sets[str(folder) if folder.name in sets else folder.name] = path

    for path in map(Path, words.parse(config.samples, "samples")):
        folder = path.parent if path.suffix == ".npz" else path
        if not (folder / SAMPLING_RECORD).is_file() and (find_simulation(str(folder)) or check.allows(path)):
            logger.log_rank0(f"all shares: images of {path}, which are "
                             f"{'simulated' if find_simulation(str(folder)) else 'named in --allow_networks'}")
            for share in shares:
                add(share, folder, path)
            continue
        share = check.require_share(path, seen_images(folder, run[VAEConfig]))
        logger.log_rank0(f"share {share.name}: samples of {path}, whose networks saw no other real images")
        add(share, folder, path)
    models = []
    for path in words.parse(run[StudySamplingConfig].model_path, "model_path"):
        share = check.require_share(path, _seen_by_model(run, path))
        _require_same_images(path, source)
        logger.log_rank0(f"share {share.name}: model {path}, whose networks saw no other real images")
        models.append((share, path, Path(path if os.path.isdir(path) else os.path.dirname(path)).resolve().name))
    stages = _plan_trainings(run, check) if config.train_models else {}
    if run.dry_run:
        return None
    for share in shares:
        _link_share(source, share, run.folder)
    for share in shares if config.train_models else ():
        logger.log_rank0(f"share {share.name}: training a model on {_folder_of_share(source, share, run.folder)}")
        path = train_model(run, stages[share.name], fingerprint_of_rows(source, share.rows))
        models.append((check.require_share(path, _seen_by_model(run, path)), path, _folder_name(share)))
    for share, path, name in models:
        folder = sample_model(run, path, name, len(share.rows), run.folder / "samples")
        add(share, folder, folder)
    return found


def _plan_trainings(run, check):
    """Return {share: runs that train its model}, none of which starts from networks that saw more than the share."""
    stages, folder = {}, run.folder or Path()
    vae_path = run[VAEConfig].vae_path
    autoencoder = create_vae(run[VAEConfig], dist_util.dev()) if vae_path else None
    for share in check.shares:
        data_dir = _folder_of_share(check.source, share, folder)
        require((data_dir, f"{check.source.folder}: --train_models True trains on folders of the files of a share, but "
                 "its images have no files of their own; set --data_dir to a folder of images, or --shares all"))
        stages[share.name] = create_stages(run, folder / "models" / _folder_name(share), data_dir)
        starts = [_seen_by_network(path, flag, None, run[VAEConfig]) for flag, path in find_starts(stages[share.name])]
        starts += [_seen_by_autoencoder(autoencoder)] if autoencoder else []
        largest = check.find_share(run.config_file, itertools.chain(*starts))
        require((largest is None or len(largest.rows) <= len(share.rows),
                 f"--train_models True: the model of share {share.name} would start from a network that was trained on "
                 f"share {largest and largest.name}, which has more images; train it on {data_dir}, or name it in "
                 "--allow_networks if its images are known not to be test images"))
    return stages


def _require_same_images(path, source):
    """Reject a model whose samples have another shape or other classes than the images, before it is sampled."""
    file, _ = find_weights(path)
    header = load_weights(file, "cpu")[1] or {}
    shape, missing = tuple(header.get("image_shape") or ()), set(source.class_names) - set(header.get("classes") or ())
    require((shape == tuple(source.shape), f"{file} (--model_path): expected a model of images of shape "
             f"{format_shape(source.shape)}, got {format_shape(shape)}"),
            (not missing, f"{file} (--model_path): expected a model of the classes of {source.folder}, has none of "
             f"{', '.join(sorted(missing))}; train it with --class_cond True"))


class NetworkCheck:
    """Finds the share of a study that networks were trained on, and rejects networks that saw other images."""

    def __init__(self, run, source, test, shares):
        self.data, self.source, self.test, self.shares = run[DataConfig], source, test, shares
        self.allowed = {os.path.realpath(path)
                        for path in words.parse(run[StudyConfig].allow_networks, "allow_networks")}
        self.prints = {fingerprint_of_rows(source, share.rows): share for share in shares}

    def allows(self, path) -> bool:
        """Return whether a file, or its folder, is in `--allow_networks`."""
        return not self.allowed.isdisjoint({os.path.realpath(path), os.path.dirname(os.path.realpath(path))})

    def find_share(self, path, networks: Iterable["Seen"]) -> Share | None:
        """Return the largest share that one of the networks of `path` saw; None if all are in `--allow_networks`.

        :raises ValueError: if one saw images that are of no share, or its best step was chosen by test images.
        """
        largest = None
        for seen in networks:
            if self.allows(seen.path):
                continue
            share = self.prints.get(seen.fingerprint) or _share_of_content(seen, self.data, self.source, self.shares)
            known = ", ".join(f"{share.name} ({len(share.rows)} images)" for share in self.shares)
            require(
                (share, f"{seen.path} ({seen.flag} of {path}) was trained on "
                 f"{f'{seen.count} other' if seen.fingerprint else 'unknown'} images: expected those of a share of "
                 f"{self.source.folder} (--data_dir), --shares {known}; train it on the folder of that share that this "
                 "command creates in shares/, or name it in --allow_networks if its images are known not to be test "
                 "images"),
                (os.path.realpath(seen.validation) != os.path.realpath(self.test.folder) or not seen.validation,
                 f"{seen.path} ({seen.flag} of {path}): its best step was chosen by the test images, "
                 f"{self.test.folder} (its --val_data_dir); train it without them, or name it in --allow_networks"))
            largest = share if largest is None else max(largest, share, key=lambda share: len(share.rows))
        return largest

    def require_share(self, path, networks: Iterable["Seen"]) -> Share:
        """Return the result of `find_share`; samples of networks that are all allowed belong to no share."""
        share = self.find_share(path, networks)
        if share is None:
            raise ValueError(f"{path}: all of its networks are in --allow_networks; expected one that was trained on a "
                             "share of --data_dir")
        return share


def _share_of_content(seen, data, source, shares):
    """Return the share whose files have the content of the images that a network was trained on, None if none has.

    Fingerprints contain the times of files, which copies may not keep.
    """
    if not seen.folder or not os.path.isdir(seen.folder):
        return None
    images = open_folder(dataclasses.replace(data, data_dir=seen.folder), flag=seen.flag)
    if images.fingerprint != seen.fingerprint:
        return None
    content = sorted(map(sha256_of_file, images.paths))
    return next((share for share in shares if len(share.rows) == len(content)
                 and sorted(sha256_of_file(source.paths[row]) for row in share.rows) == content), None)


def _seen_by_model(run, path) -> Iterator[Seen]:
    """Yield the images that the networks of a model that is sampled by a run were trained on."""
    for flag, network in model_paths(run, path).items():
        yield from _seen_by_network(network, f"--{flag}", None, run[VAEConfig])


def seen_images(folder, vae: VAEConfig) -> Iterator[Seen]:
    """Yield the images that the networks of a folder of samples were trained on, by its sampling.json.

    :raises ValueError: if there is none, or a network is not the one that made the samples any more.
    """
    path = Path(folder) / SAMPLING_RECORD
    require((path.is_file(), f"{folder} has no {SAMPLING_RECORD}, which names the networks of samples; sample again "
             "with a sampling script and pass its folder as --samples, or name it in --allow_networks if its images "
             "are known not to be test images"), error=FileNotFoundError)
    record = read_record(path, "sample again")
    paths, settings = record["paths"], record["settings"]
    for flag, network in paths.items():
        if flag in SHA256_OF:
            yield from _seen_by_network(network, f"--{flag}", settings.get(SHA256_OF[flag]),
                                        dataclasses.replace(vae, vae_path=vae.vae_path or paths.get("vae_path", "")))
        elif flag == "base_samples":
            yield from seen_images(os.path.dirname(network), vae)
    for name in ("images", "condition"):    # that are edited, or that samples are conditioned on
        if settings.get(name):
            yield Seen(paths.get("data_dir", str(folder)), f"--{name}", None, settings[name])


def _seen_by_network(path, flag, sha256=None, vae=None):
    """Yield the images of a network, of its autoencoder, and of the networks that it was initialized from."""
    file, found = find_weights(path, flag)
    require((sha256 in (None, found), f"{file} ({flag}) has other weights than the samples were made with; sample "
             "again"))
    header = load_weights(file, "cpu", flag)[1] or {}
    flags = _recorded_flags(Path(file).parent)
    yield Seen(str(file), flag, header.get("data_count", header.get("data", {}).get("files")),
               find_fingerprint(header), _data_folder(flags),
               flags.get("val_data_dir", ""))
    if header.get("autoencoder") and header.get("kind") != "autoencoder" and not works_on_pixels(header):
        yield from _seen_by_autoencoder(open_codec(header["autoencoder"], vae))
    teacher = (header.get("distillation") or {}).get("teacher")
    if teacher:
        yield from _seen_by_network(teacher["path"], "--teacher_path", teacher["sha256"], vae)
    resumed = flags.get("resume_checkpoint", "")
    for name in ("init_from", *(["resume_checkpoint"] if os.path.dirname(resumed) else [])):
        if flags.get(name) and Path(flags[name]).parent.resolve() != Path(file).parent.resolve():
            yield from _seen_by_network(flags[name], f"--{name}", None, vae)


def _seen_by_autoencoder(codec):
    """Yield the images of a codec; those of autoencoders of other projects, whose files do not state them, are unknown.
    """
    if codec.preprocessing:
        yield from _seen_by_network(codec.path, "--vae_path")
    else:
        yield Seen(codec.path, "--vae_path", None, None)


def _recorded_flags(folder):
    """Return {flag: value} of the config.json of a run folder, {} if there is none."""
    sections = read_config_file(folder, "restore the file: it names what else the network was trained on")
    return {name: value for section in sections.get("flags", {}).values() for name, value in section.items()}


def _data_folder(flags):
    """Return the folder of images that a training read, from its flags, or through its latent cache; "" if unknown."""
    cache = flags.get("cache_dir")
    if cache and is_cache(cache):
        return read_manifest(Path(cache))["preprocessing"].get("data_dir", "")
    return flags.get("data_dir", "")


def _open_sample_images(data, path, source):
    """Return (Images, digest of what determines them) of a set of samples, with the classes of a source.

    Other images than those of a sampling script, such as simulated ones, need not have all of them.
    """
    archives = [path] if path.suffix == ".npz" else sorted(
        file for file in path.glob("samples_*.npz") if SAMPLE_FILES.fullmatch(file.name))
    is_sampled = bool(archives) or (path / SAMPLING_RECORD).is_file()
    require((len(archives) == 1 or not is_sampled,
             f"{path} (--samples): expected one file samples_*.npz, got {len(archives)}"))
    place = str(archives[0] if is_sampled else path)
    data = dataclasses.replace(apply_trained_preprocessing(data, {}, source.preprocessing), data_dir=place,
                               value_range="", value_window="")
    if not is_sampled:      # gray levels are scalars, too
        data = dataclasses.replace(data, label_column="")
        gray = open_folder(dataclasses.replace(data, colormap=""), flag="--samples").shape[0] == 1
        data = dataclasses.replace(data, colormap="" if gray else data.colormap)
    samples = open_folder(data, flag="--samples")
    require((samples.shape == source.shape, f"{place} (--samples): expected images of shape "
             f"{format_shape(source.shape)}, got {format_shape(samples.shape)}"))
    require_labels(samples, True)
    images = _read(samples, source.class_names)
    missing = [name for label, name in enumerate(source.class_names) if label not in images.labels]
    require((not missing or not is_sampled, f"{place} (--samples) has no samples of {', '.join(missing)}; sample all "
             f"classes{format_classes(source)}"))
    if missing:
        logger.log_rank0(f"{place} has no images of {', '.join(missing)}: real ones take their places in batches")
    digest = sha256_of_file(place) if is_sampled else hashlib.sha256(
        images.images.numpy().tobytes() + images.labels.numpy().tobytes()).hexdigest()
    return images, digest


def _read(source, class_names=None):
    """Return the `Images` of a source, labels numbered as `class_names`."""
    starts = range(0, len(source), READ_BATCH)
    images = torch.cat([source.batch(range(start, min(start + READ_BATCH, len(source)))) for start in starts])
    labels = map_labels(source, class_names) if class_names else source.labels
    return Images(images, torch.as_tensor(np.array(labels), dtype=torch.int64), _find_colormap(source))


def _find_colormap(source):
    """Return the colormap of RGB images, None for gray levels and for colors that are on no known map."""
    name = source.preprocessing.get("recognized_colormap", "")
    return open_colormap(name) if name and source.shape[0] == 3 else None
