"""Generate samples over the ranks and write them; an interrupted run resumes."""

import json
import math
import re
import shutil
from pathlib import Path

import numpy as np
import torch

from .. import dist_util, logger
from ..data import open_npz, to_uint8, write_nifti, write_npz
from ..evaluation import figures
from ..files import atomic_path, write_json
from ..gaussian_diffusion import ModelMeanType

# Share of x0's variance at the first sampling step below which its prediction from the noise is unsafe unclipped: the
# cosine schedule ends at 2e-9, the linear one at 4e-5.
MIN_UNCLIPPED_ALPHA_BAR = 1e-6


GRID_SIZE, SHEET_ROWS = 64, 16  # pictures on a contact sheet without classes, classes on one with them
SETTINGS_FILE, OWNED_MARKER = "making.json", ".sampling"  # stand in folders that sampling has made, and may make anew
_OF_SHARDS = re.compile(r"\d{8}-\d{8}\.npy|making\.json|\..*\.part")


def generate_samples(sampler, classes, config, folder, device):
    """Draw all samples over the ranks and write them; return the path of samples_NxHxWxC.npz.

    Beside it stand contact_sheet.png and, with `config.png`, png/, and of volumes volumes/. While it goes on, shards/
    holds a file a batch; the same call again makes those that are missing.

    :raises ValueError: where there is nothing to generate_samples, or shards/ holds other samples than these.
    :raises FloatingPointError: where samples are not finite.
    """
    if config.num_samples < 1 or config.batch_size < 1:
        raise ValueError(f"--num_samples {config.num_samples} --batch_size {config.batch_size}: both are at least 1")
    _warn_of_unsafe_start(sampler)
    folder, shards = Path(folder), Path(folder) / "shards"
    _check_settings(shards, folder / "png", sampler, classes, config)
    starts = range(0, config.num_samples, config.batch_size)
    batches = [range(start, min(start + config.batch_size, config.num_samples)) for start in starts]
    missing = dist_util.broadcast_object([b for b in batches if not _shard_path(shards, b).exists()])
    name_of = _namer(sampler)
    if len(missing) < len(batches):
        logger.log(f"{len(batches) - len(missing)} of {len(batches)} batches are there already")
    for indices in missing[dist_util.rank()::dist_util.world_size()]:
        x0 = sampler.sample_x0(indices, classes, device, progress=dist_util.rank() == 0)
        if not torch.isfinite(x0).all():
            raise FloatingPointError(f"samples {indices.start} to {indices.stop - 1} are not finite: the model has "
                                     "diverged (take an earlier one), or its noise schedule ends in pure noise (train "
                                     "with more --diffusion_steps or --noise_schedule cosine)")
        images = to_uint8(sampler.decode(x0))
        if config.png:  # before the shard, whose presence says that all of the batch is written
            labels = sampler.labels(indices, classes)
            for row, i in enumerate(indices):
                prefix = "" if labels is None else f"{_in_a_file_name(name_of(labels[row]))}_"
                _write_one(folder, f"{prefix}{i:06d}", images[row], sampler.spacing)
        with atomic_path(_shard_path(shards, indices)) as part, open(part, "wb") as stream:
            np.save(stream, np.moveaxis(images, 1, -1))
        logger.log(f"created {min(indices.stop, config.num_samples)} samples")
    dist_util.barrier()
    *sides, channels = (*sampler.image_shape[1:], sampler.image_shape[0])
    shape = config.num_samples, *sides, channels
    path = folder / f"samples_{'x'.join(map(str, shape))}.npz"
    if dist_util.rank() == 0:
        labels = sampler.labels(range(config.num_samples), classes)
        whole = (np.load(_shard_path(shards, b), mmap_mode="r", allow_pickle=False) for b in batches)
        write_npz(path, shape, whole, labels, sampler.class_names)
        _remove_surplus_files(config.num_samples, folder)
        _write_sheet(folder / "contact_sheet.png", path, labels, classes, name_of)
        shutil.rmtree(shards)
    dist_util.barrier()
    return path


def _remove_surplus_files(count, folder):
    """Remove single files of samples that an interrupted sampling of more than `count` has left."""
    for ours in (folder / name for name in ("png", "volumes") if (folder / name / OWNED_MARKER).exists()):
        for path in ours.iterdir():
            found = re.search(r"(\d+)\.(png|nii\.gz|npy)$", path.name)
            if found and int(found[1]) >= count:
                path.unlink()


def _write_one(folder, stem, image, spacing):
    """Write a sample uint8 [C x ...] as a PNG file; of a volume its middle slices, and itself as .nii.gz (or .npy)."""
    figures.save_image(folder / "png" / f"{stem}.png", figures.to_pil(image.astype(np.float32) / 255))
    if image.ndim == 4:
        try:
            with atomic_path(folder / "volumes" / f"{stem}.nii.gz") as part:
                whole = part.with_name(part.name + ".nii.gz")   # the name says how it is packed
                write_nifti(whole, image, spacing)
                whole.rename(part)
        except ImportError:     # nibabel is an extra
            with atomic_path(folder / "volumes" / f"{stem}.npy") as part, open(part, "wb") as stream:
                np.save(stream, image)


def _warn_of_unsafe_start(sampler):
    first = sampler.diffusion.alphas_cumprod[-1]
    unsafe = first < MIN_UNCLIPPED_ALPHA_BAR and not sampler.clip_denoised
    if unsafe and sampler.diffusion.model_mean_type is ModelMeanType.EPSILON:
        logger.warn(f"the first step sees {math.sqrt(first):.1g} of the latent and the rest is noise: an unclipped "
                    "prediction of it may run away and leave noisy pictures; --timestep_respacing ddim100 begins a "
                    "little later")


def _check_settings(shards, png, sampler, classes, config):
    """Have all shards come from one making: begin a folder for them, or refuse one of another making."""
    if dist_util.rank() == 0:
        making = {**sampler.settings, "seed": sampler.seed, "sampler": sampler.solver, "classes": classes,
                  "steps": [int(t) for t in sampler.diffusion.timestep_map], "clip_denoised": sampler.clip_denoised,
                  "batch_size": config.batch_size, "image_shape": list(sampler.image_shape), "png": config.png}
        record = shards / SETTINGS_FILE
        try:
            found = json.loads(record.read_text())
        except (OSError, ValueError):   # none, or one that a kill cut short before any shard was written
            _begin_folders(shards, (png, png.with_name("volumes")), len(sampler.image_shape) - 2 if config.png else 0)
            write_json(record, making)
        else:
            other = sorted(key for key in making.keys() | found.keys() if making.get(key) != found.get(key))
            if other:
                raise ValueError(f"{shards} holds an unfinished sampling with another {', '.join(other)}; give the "
                                 "same flags to go on with it, another --logdir, or remove that folder")
    dist_util.barrier()


def _begin_folders(shards, pictures, count):
    """Remove what an earlier sampling has left, and make the first `count` folders of `pictures`.

    :raises FileExistsError: where one of these holds what no sampling has written; nothing is removed then.
    """
    for folder in (shards, *pictures[:count]):
        found = [path.name for path in folder.iterdir()] if folder.exists() else []
        ours = all(map(_OF_SHARDS.fullmatch, found)) if folder == shards else not found or OWNED_MARKER in found
        if not ours:
            instead = "" if folder == shards else ", or --png False"
            raise FileExistsError(f"{folder} is there and not from a sampling, and samples would be written into it; "
                                  f"give another --logdir{instead}")
    for older in (shards, *(folder for folder in pictures if (folder / OWNED_MARKER).exists())):
        shutil.rmtree(older, ignore_errors=True)
    for folder in pictures[:count]:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / OWNED_MARKER).touch()


def _shard_path(shards, indices):
    return shards / f"{indices.start:08d}-{indices.stop:08d}.npy"


def _namer(sampler):
    return lambda label: sampler.class_names[label] if sampler.class_names else str(label)


def _in_a_file_name(name):
    """Return a class's name as a file's can begin: the class ends at the first _, and nothing leads to a folder."""
    return re.sub(r'[\\/_:*?"<>|\x00-\x1f]', "-", name).lstrip(".") or "-"


def _write_sheet(path, npz, labels, classes, name_of):
    """Write a contact sheet of samples, one row a class where they were drawn in turn."""
    samples = open_npz(npz)
    rows = list(dict.fromkeys(classes))[:SHEET_ROWS] if labels is not None and classes else []
    per_row = min((12, *(int((labels == c).sum()) for c in rows)))
    if rows and per_row:
        chosen = np.concatenate([np.flatnonzero(labels == c)[:per_row] for c in rows])
        names, columns = [name_of(c) for c in rows], per_row
    else:
        chosen, names = np.arange(min(GRID_SIZE, len(samples.images))), None
        columns = min(8, len(chosen))
    unit = np.moveaxis(samples.images[chosen], -1, 1).astype(np.float32) / 255
    figures.save_image(path, figures.contact_sheet(unit, columns, row_labels=names))
