"""Generate samples on all ranks and write them; an interrupted run resumes."""

import itertools
import re
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch

from .. import dist_util, logger
from ..config import require, validate
from ..data import open_colormap, open_npz, to_uint8, write_nifti, write_npz
from ..data.axes import AXES_FILE
from ..files import OWNED_MARKER, atomic_path, atomic_stream, read_record, write_record
from .sheets import MAX_ROWS, contact_sheet, save_image, to_pil

GRID_SIZE = 64  # samples on a contact sheet without classes
# Files in folders that sampling has created, and may therefore replace.
SETTINGS_FILE = "making.json"  # alias
SAMPLING_RECORD = "sampling.json"   # beside finished samples: the networks that made them
CONDITIONS_FILE = "conditions.txt"  # name of the condition of each sample, one per line
SAMPLE_FILES = re.compile(r"samples_(\d+x)+\d+\.npz")
_OTHERWISE = {"shards": "", "db": ", or --save_db False"}
_SHARD_FILES = re.compile(rf"\d{{8}}-\d{{8}}\.npy|{re.escape(SETTINGS_FILE)}|\..*\.part")


def generate_samples(sampler, classes: list[int] | None, config, folder, device) -> Path:
    """Generate all samples on all ranks and write them; return the path of samples_NxHxWxC.npz.

    contact_sheet.png is written next to it, with `config.save_individual` also png/ and volumes/, and conditions.txt if
    the samples have conditions. Until the end shards/ contains one file per batch; the same call again generates the
    missing ones.

    :raises ValueError: if shards/ contains samples with other settings.
    :raises FloatingPointError: if samples are not finite.
    """
    validate(config)
    warning = sampler.diffusion.unclipped_warning()
    if warning and not sampler.clip_denoised:
        logger.warn(warning)
    folder, shards = Path(folder), Path(folder) / "shards"
    _check_settings(shards, folder / "png", sampler, classes, config)
    starts = range(0, config.num_samples, config.batch_size)
    batches = [range(start, min(start + config.batch_size, config.num_samples)) for start in starts]
    missing = dist_util.broadcast_object([b for b in batches if not _shard_path(shards, b).exists()])
    if len(missing) < len(batches):
        logger.log(f"skipping {len(batches) - len(missing)} of {len(batches)} batches, which already exist")
    _sample_batches(sampler, missing[dist_util.rank()::dist_util.world_size()], classes, config, folder, device)
    dist_util.barrier()
    shape = config.num_samples, *sampler.image_shape[1:], sampler.image_shape[0]
    path = folder / f"samples_{'x'.join(map(str, shape))}.npz"
    if dist_util.rank() == 0:
        labels = sampler.labels(range(config.num_samples), classes)
        parts = (np.load(_shard_path(shards, b), mmap_mode="r", allow_pickle=False) for b in batches)
        attributes = sampler.attributes and dict(zip(sampler.attributes.names,
                                                     sampler.attribute_values(range(config.num_samples)).T))
        write_npz(path, shape, parts, labels, sampler.class_names, sampler.colormap, attributes)
        _remove_surplus_files(config.num_samples, folder)
        if sampler.condition is not None:
            names = sampler.condition.names
            lines = (f"{names[i % len(names)]}\n" for i in range(config.num_samples))
            with atomic_stream(folder / CONDITIONS_FILE) as stream:
                stream.write("".join(lines).encode(errors="surrogateescape"))
        _write_contact_sheet(folder / "contact_sheet.png", path, sampler, classes)
        shutil.rmtree(shards)
    dist_util.barrier()
    return path


def _sample_batches(sampler, batches, classes, config, folder, device):
    """Sample and decode batches on this rank; a batch is written, and the noise of the next one drawn, meanwhile.

    At most one batch is in memory beside the one that is sampled. If it cannot be written, sampling ends with the error
    when the next one is complete; if sampling ends with an error, the batch before is written first.
    """
    # The noise of a batch starts to be drawn when the pair of it and its predecessor is requested.
    drawn = ((indices, sampler.draw_noise(indices, device)) for indices in batches)
    with ThreadPoolExecutor(1, "writer") as writer:
        written = None
        for (indices, noise), _ in itertools.pairwise(itertools.chain(drawn, [None])):
            decoded = _sample_decoded(sampler, indices, classes, device, noise)
            values = decoded[:, 0].float().cpu().numpy() if sampler.spectrogram and len(decoded[0]) == 1 else None
            if written:
                written.result()
            written = writer.submit(_write_batch, folder, indices, to_uint8(decoded), sampler, classes, config, values)
        if written:
            written.result()


def sample_images(sampler, indices, classes, device, noise=None):
    """Return the samples `indices` as uint8 [N x C x ...]; arguments as for `Sampler.sample_x0`.

    :raises FloatingPointError: if they are not finite.
    """
    return to_uint8(_sample_decoded(sampler, indices, classes, device, noise))


def _sample_decoded(sampler, indices, classes, device, noise):
    """Return the images of `sample_images` in [0, 1] before they are rounded."""
    x0 = sampler.sample_x0(indices, classes, device, progress=dist_util.rank() == 0, noise=noise)
    require((torch.isfinite(x0).all(), f"samples {indices.start} to {indices.stop - 1} are not finite: the "
             "model has diverged (use an earlier checkpoint), or its noise schedule ends in pure noise (train "
             "with more --diffusion_steps or --noise_schedule cosine)"), error=FloatingPointError)
    return sampler.complete(indices, sampler.decode(x0))


def _write_batch(folder, indices, images, sampler, classes, config, values=None):
    """Write the samples `indices`, uint8 [N x C x ...]: as single files if requested, then as the shard.

    :param values: of spectrograms, before they are rounded to 8 bits [N x H x W]; None: those of the colors.
    """
    images, shards = project(images, sampler.projection), folder / "shards"
    # Writing would create another folder, with a part of the samples and without their settings.
    require(((shards / SETTINGS_FILE).exists(), f"{shards} was removed while samples were written into it; rerun "
             "the same command"), error=FileNotFoundError)
    labels = sampler.labels(indices, classes)
    prefixes = ["" if labels is None else f"{_escape(_class_name(sampler, label))}_" for label in
                (indices if labels is None else labels)]
    stems = [f"{prefix}{i:06d}" for prefix, i in zip(prefixes, indices)]
    if config.save_individual:  # before the shard, whose existence marks the batch as complete
        for stem, image in zip(stems, images):
            _write_one(folder, stem, image, sampler)
    if sampler.spectrogram:
        _write_levels(folder / "db", stems, images, sampler, values)
    with atomic_stream(_shard_path(shards, indices)) as stream:
        np.save(stream, np.moveaxis(images, 1, -1))
    logger.log(f"created {indices.stop} samples")


def project(images, colormap):
    """Return RGB images on the nearest colors of the table of this name; empty: unchanged.  uint8 [N x 3 x ...]"""
    if not colormap:
        return images
    return np.moveaxis(open_colormap(colormap).project(np.moveaxis(images, 1, -1)), -1, 1)


def _write_levels(folder, stems, images, sampler, values):
    """Write samples in dB as float32 .npy, with their axes; colors are those of the scalars of a colormap."""
    if values is None:
        values = open_colormap(sampler.projection).to_scalars(np.moveaxis(images, 1, -1))[0]
    for stem, levels in zip(stems, sampler.spectrogram.to_db(values)):
        with atomic_stream(folder / f"{stem}.npy") as stream:
            np.save(stream, levels)
    write_record(folder / AXES_FILE, {"image": sampler.spectrogram.to_dict()})
    _claim(folder)


def _remove_surplus_files(count, folder):
    """Remove image files with an index >= `count`, left by an interrupted run with more samples."""
    for owned in (folder / name for name in ("png", "volumes", "db") if (folder / name / OWNED_MARKER).exists()):
        for path in owned.iterdir():
            found = re.search(r"(\d+)\.(png|nii\.gz|npy)$", path.name)
            if found and int(found[1]) >= count:
                path.unlink()


def _write_one(folder, stem, image, sampler):
    """Write a sample uint8 [C x ...] as .png; for a volume its middle slices, and the volume as .nii.gz (or .npy)."""
    save_image(folder / "png" / f"{stem}.png", to_pil(image.astype(np.float32) / 255, sampler.colormap))
    if image.ndim == 4:
        try:
            with atomic_path(folder / "volumes" / f"{stem}.nii.gz") as part:
                volume = part.with_name(part.name + ".nii.gz")   # the extension selects the compression
                write_nifti(volume, image, sampler.spacing, sampler.orientation)
                volume.rename(part)
        except ImportError:     # nibabel is an extra
            with atomic_stream(folder / "volumes" / f"{stem}.npy") as stream:
                np.save(stream, image)
    for name in ("png", "volumes")[:image.ndim - 2]:
        _claim(folder / name)   # again, as writing creates a folder that was removed meanwhile


def _check_settings(shards, png, sampler, classes, config):
    """Start a folder of shards, or compare the settings of an existing one, so that all shards have the same ones."""
    if dist_util.rank() == 0:
        settings = {**sampler.settings, "seed": sampler.seed, "sampler": sampler.solver, "classes": classes,
                    "steps": [int(t) for t in sampler.diffusion.timestep_map], "clip_denoised": sampler.clip_denoised,
                    "batch_size": config.batch_size, "image_shape": list(sampler.image_shape),
                    "png": config.save_individual}
        if sampler.spectrogram:
            settings["db"] = sampler.spectrogram.to_dict()
        record = shards / SETTINGS_FILE
        if not record.exists():
            written = ["png", "volumes"][:len(sampler.image_shape) - 2] if config.save_individual else []
            _start_folders(shards, png.parent, [*written, *(["db"] if sampler.spectrogram else [])])
            write_record(record, settings)
        else:
            found = read_record(record, "remove its folder")
            other = sorted(key for key in settings.keys() | found.keys() if settings.get(key) != found.get(key))
            require((not other, f"{shards} contains an unfinished run with another {', '.join(other)}; use the same "
                     "flags to resume it, use another --logdir, or remove the folder"))
    dist_util.barrier()


def _start_folders(shards, parent, written):
    """Remove the files of an earlier run, and create the folders of single files that are `written`, by name.

    :raises FileExistsError: if one of these contains files of another origin; nothing is removed then.
    """
    image_folders = [parent / name for name in ("png", "volumes", "db")]
    for folder in (shards, *(parent / name for name in written)):
        names = [path.name for path in folder.iterdir()] if folder.exists() else []
        owned = all(map(_SHARD_FILES.fullmatch, names)) if folder == shards else not names or OWNED_MARKER in names
        require((owned, f"{folder} already exists and was not created by sampling; use another --logdir"
                 f"{_OTHERWISE.get(folder.name, ', or --save_individual False')}"), error=FileExistsError)
    for older in (shards, *(folder for folder in image_folders if (folder / OWNED_MARKER).exists())):
        shutil.rmtree(older, ignore_errors=True)
    for name in written:
        _claim(parent / name)


def _claim(folder):
    """Create a folder of images, and the marker by which the next run knows that it may replace it."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / OWNED_MARKER).touch()


def _shard_path(shards, indices):
    return shards / f"{indices.start:08d}-{indices.stop:08d}.npy"


def _class_name(sampler, label):
    return sampler.class_names[label] if sampler.class_names else str(label)


def _escape(name):
    """Return a class name as the start of a file name: the class ends at the first _, and no path is formed."""
    return re.sub(r'[\\/_:*?"<>|\x00-\x1f]', "-", name).lstrip(".") or "-"


def _write_contact_sheet(path, npz, sampler, classes):
    """Write a contact sheet of samples, with one row per requested class if there are any."""
    samples = open_npz(npz)
    rows = list(dict.fromkeys(classes))[:MAX_ROWS] if samples.labels is not None and classes else []
    per_row = min((12, *(int((samples.labels == c).sum()) for c in rows)))
    if rows and per_row:
        chosen = np.concatenate([np.flatnonzero(samples.labels == c)[:per_row] for c in rows])
        names, columns = [_class_name(sampler, c) for c in rows], per_row
    else:
        chosen, names = np.arange(min(GRID_SIZE, len(samples.images))), None
        columns = min(8, len(chosen))
    unit = np.moveaxis(samples.images[chosen], -1, 1).astype(np.float32) / 255
    save_image(path, contact_sheet(unit, columns, row_labels=names, colormap=sampler.colormap))
