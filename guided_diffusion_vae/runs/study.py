"""Open the images of an augmentation study, and check that the networks of its samples saw no others."""

import dataclasses
import itertools
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from .. import dist_util, logger
from ..checkpoint_util import find_weights, load_weights
from ..config import format_shape, require, words
from ..data import DataConfig, format_classes, map_labels, open_folder, require_labels
from ..data.archives import file_stamps
from ..data.labels import LABEL_FILES, read_column
from ..data.manifest import read_manifest
from ..evaluation.study import Images, Share, StudyConfig, find_share, run_study
from ..files import hash_lines, read_record, sha256_of_file
from ..latent_datasets import is_cache
from ..sampling import SAMPLE_FILES
from ..vae_wrapper import VAEConfig
from .loading import SAMPLING_RECORD
from .run import read_config_file
from .spaces import apply_trained_preprocessing, open_codec, works_on_pixels

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
    groups = np.array(find_groups(source, config.group_by))
    _check_overlap(config, groups, source, test)
    shares = _open_shares(config, source, groups)
    samples = _open_samples(run, source, test, shares)
    for share in shares:
        if len(share.rows) < len(source) and not run.dry_run:
            _link_share(source, share, run.folder)
        for name, path in samples.get(share.name, {}).items():
            images, share.digests[name] = _open_sample_images(data, path, source)
            share.samples[name] = images
    if run.dry_run:
        return None
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
    if len(getattr(source, "paths", ())) != len(source):
        return None
    return hash_lines(f"{source.names[row]} {file_stamps(source.paths[row])[0]}" for row in rows)


def _link_share(source, share, folder):
    """Create a folder of links to the files of a share, on which generative models can be trained."""
    target = folder / "shares" / share.name.replace("%", "").replace(":", "_")
    if dist_util.rank() or not all(map(os.path.isfile, getattr(source, "paths", [""]))):
        return
    shutil.rmtree(target, ignore_errors=True)
    paths = {source.names[row]: source.paths[row] for row in share.rows}
    paths |= {name: path for name in LABEL_FILES if os.path.isfile(path := os.path.join(source.folder, name))}
    for name, path in paths.items():
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        try:
            os.symlink(os.path.abspath(path), target / name)
        except OSError:     # not permitted on Windows
            shutil.copy2(path, target / name)   # with its time, which the fingerprint contains
    logger.log(f"share {share.name}: linked in {target}")


# --- Samples ---


def _open_samples(run, source, test, shares):
    """Return {share: {name: path}} of the sets of `--samples`, each in the share that its networks were trained on."""
    config, found = run[StudyConfig], {}
    allowed = {os.path.realpath(path) for path in words.parse(config.allow_networks, "allow_networks")}
    is_allowed = lambda path: not allowed.isdisjoint({os.path.realpath(path), os.path.dirname(os.path.realpath(path))})
    prints = {fingerprint_of_rows(source, share.rows): share for share in shares}
    for path in map(Path, words.parse(config.samples, "samples")):
        folder, largest = path.parent if path.suffix == ".npz" else path, None
        for seen in seen_images(folder, run[VAEConfig]):
            if is_allowed(seen.path):
                continue
            share = prints.get(seen.fingerprint) or _share_of_content(seen, run[DataConfig], source, shares)
            known = ", ".join(f"{share.name} ({len(share.rows)} images)" for share in shares)
            require(
                (share, f"{seen.path} ({seen.flag} of {path}) was trained on "
                 f"{f'{seen.count} other' if seen.fingerprint else 'unknown'} images: expected those of a share of "
                 f"{source.folder} (--data_dir), --shares {known}; train it on the folder of that share that this "
                 "command creates in shares/, or name it in --allow_networks if its images are known not to be test "
                 "images"),
                (os.path.realpath(seen.validation) != os.path.realpath(test.folder) or not seen.validation,
                 f"{seen.path} ({seen.flag} of {path}): its best step was chosen by the test images, {test.folder} "
                 "(its --val_data_dir); train it without them, or name it in --allow_networks"))
            largest = share if largest is None else max(largest, share, key=lambda share: len(share.rows))
        require((largest, f"{path}: all of its networks are in --allow_networks; expected one that was trained on a "
                 "share of --data_dir"))
        sets = found.setdefault(largest.name, {})
        sets[str(folder) if folder.name in sets else folder.name] = path
        logger.log_rank0(f"share {largest.name}: samples of {path}, whose networks saw no other real images")
    return found


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


def seen_images(folder, vae: VAEConfig) -> Iterator[Seen]:
    """Yield the images that the networks of a folder of samples were trained on, by its sampling.json.

    :raises ValueError: if there is none, or a network is not the one that made the samples any more.
    """
    path = Path(folder) / SAMPLING_RECORD
    require((path.is_file(), f"{folder} has no {SAMPLING_RECORD}, which names the networks of samples; sample again "
             "with a sampling script, and pass its folder as --samples"), error=FileNotFoundError)
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
               header.get("data_fingerprint") or (header.get("data") or {}).get("fingerprint"), _data_folder(flags),
               flags.get("val_data_dir", ""))
    if header.get("autoencoder") and header.get("kind") != "autoencoder" and not works_on_pixels(header):
        codec = open_codec(header["autoencoder"], vae)
        if codec.preprocessing:     # of an autoencoder of this project, whose header states its images
            yield from _seen_by_network(codec.path, "--vae_path")
        else:
            yield Seen(codec.path, "--vae_path", None, None)
    teacher = (header.get("distillation") or {}).get("teacher")
    if teacher:
        yield from _seen_by_network(teacher["path"], "--teacher_path", teacher["sha256"], vae)
    if flags.get("init_from"):
        yield from _seen_by_network(flags["init_from"], "--init_from", None, vae)


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
    """Return (Images, SHA-256 of the file) of a set of samples, with the classes of a source."""
    archives = [path] if path.suffix == ".npz" else sorted(
        file for file in path.glob("samples_*.npz") if SAMPLE_FILES.fullmatch(file.name))
    require((len(archives) == 1, f"{path} (--samples): expected one file samples_*.npz, got {len(archives)}"))
    data = apply_trained_preprocessing(data, {}, source.preprocessing)
    samples = open_folder(data, flag="--samples", data_dir=str(archives[0]), value_range="", value_window="")
    require((samples.shape == source.shape, f"{archives[0]} (--samples): expected images of shape "
             f"{format_shape(source.shape)}, got {format_shape(samples.shape)}"))
    require_labels(samples, True)
    images = _read(samples, source.class_names)
    missing = [name for label, name in enumerate(source.class_names) if label not in images.labels]
    require((not missing, f"{archives[0]} (--samples) has no samples of {', '.join(missing)}; sample all classes"
             f"{format_classes(source)}"))
    return images, sha256_of_file(archives[0])


def _read(source, class_names=None):
    """Return the `Images` of a source, labels numbered as `class_names`."""
    starts = range(0, len(source), READ_BATCH)
    images = torch.cat([source.batch(range(start, min(start + READ_BATCH, len(source)))) for start in starts])
    labels = map_labels(source, class_names) if class_names else source.labels
    return Images(images, torch.as_tensor(np.array(labels), dtype=torch.int64))
