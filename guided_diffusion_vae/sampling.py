"""Draw samples: which class sample i has and what noise it sees depend on (seed, i) alone, not on batches or ranks.

Samples are written as they come, a batch a shard, so that an interrupted sampling goes on where it stopped; when all
are there, they become one .npz file.
"""

import json
import math
import re
import shutil
import zipfile
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch

from . import dist_util, figures, logger
from .config import opt
from .files import atomic_path, write_json
from .gaussian_diffusion import ModelMeanType
from .image_datasets import open_archive
from .nn import keyed_randn, keyed_rng
from .solvers import LOOPS
from .objectives import noised_condition
from .vae_wrapper import PixelCodec
from .volume_datasets import write_nifti

# Share of x0's variance at the first sampling step below which its prediction from the noise is unsafe unclipped: the
# cosine schedule ends at 2e-9, the linear one at 4e-5.
FAINTEST = 1e-6
START, CONDITION = 5, 8  # second number of the keys of sampling noise, apart from those of training
SHEET, SHEET_ROWS = 64, 16  # pictures on a contact sheet without classes, classes on one with them
MAKING, OURS = "making.json", ".sampling"  # stand in folders that sampling has made, and may make anew
_OF_SHARDS = re.compile(r"\d{8}-\d{8}\.npy|making\.json|\..*\.part")


@dataclass
class SamplingConfig:
    model_path: str = opt("", "run of image_train_vae.py, or one weights file of it (ema_... or model...)")
    num_samples: int = opt(64, "how many samples to draw", least=1)
    batch_size: int = opt(16, "samples at a time on each rank; does not change the samples", least=1)
    sampler: str = opt("", "how steps are taken: ddpm (random), ddim (deterministic), or a multi-step solver, which 10 "
                           "to 25 steps are enough for: dpmpp_sde (random, forgives a model's errors), dpmpp, unipc; "
                           "empty: ddpm, or ddim with --use_ddim",
                       choices=("", *LOOPS))
    use_ddim: bool = opt(False, "the same as --sampler ddim, usually with --timestep_respacing ddim50")
    clip_denoised: bool = opt(False, "clip the predicted x0 to [-1, 1]: right for pixels, where it is the default, and "
                                     "wrong for latents, a third of which it would cut")
    cfg_scale: float = opt(1.0, "classifier-free guidance, for a model trained with --class_dropout: 1 is none, 2 to 4 "
                                "shows classes more clearly and with less variety")
    cfg_interval: str = opt("", "lo,hi: noise levels (noise per signal) between which --cfg_scale acts, such as 0.3,3; "
                                "empty: all")
    sample_dtype: str = opt("float32", "what the network computes in: bfloat16 is about twice as fast, and its samples "
                                       "differ a little", choices=("float32", "bfloat16"))
    classes: str = opt("", "names or numbers of the classes to draw, in turn: tapin,tapout; empty: all of them")
    seed: int = opt(0, "seed; sample i depends on (seed, i) alone")
    png: bool = opt(True, "write every sample as a PNG file too, and every volume as .nii.gz")


@dataclass
class PixelSamplingConfig(SamplingConfig):
    """The same with the defaults of guided-diffusion's sampling scripts."""

    SECTION = "sampling"

    model_path: str = opt("", "run of image_train.py or image_train_vae.py, or one weights file of it, or one of "
                              "guided-diffusion, which the flags of the model describe")
    num_samples: int = opt(10000, "how many samples to draw", least=1)
    clip_denoised: bool = opt(True, "clip the predicted x0 to [-1, 1]; never done to latents unless the flag is given")


@dataclass
class BaseConfig:
    SECTION = "sampling"

    base_samples: str = opt("", "the small pictures to start from: an .npz of a sampling script (arr_0, and arr_1 "
                                "for an upsampler with classes)")
    cond_noise_level: int = opt(0, "noise them to this time first, below the --cond_noise_steps of training; hides the "
                                   "faults of samples", least=0)


class KeyedNoise:
    """Standard normal noise for the samples `indices`, each from a stream of its own.

    Called with x [N x C x ...], it returns the next draw of every stream, on the device of x.
    """

    def __init__(self, seed, indices):
        self.streams = [keyed_rng(seed, START, i) for i in indices]

    def __call__(self, x):
        draws = np.stack([s.standard_normal(x.shape[1:], dtype=np.float32) for s in self.streams])
        return torch.from_numpy(draws).to(x.device, x.dtype)


def parse_classes(text, num_classes, names=None):
    """Return the class numbers that `--classes` asks for: names or numbers with commas between; empty: all.

    :raises ValueError: for a class that the model does not have.
    """
    if not num_classes:
        if text:
            raise ValueError(f"--classes {text}: this model was trained without classes; leave the flag away")
        return None
    wanted = []
    for word in [w.strip() for w in text.split(",") if w.strip()]:
        if names and word in names:
            wanted.append(names.index(word))
        elif word.isdigit() and int(word) < num_classes:
            wanted.append(int(word))
        else:
            known = ", ".join(names) if names else f"0 to {num_classes - 1}"
            raise ValueError(f"--classes: the model has no class {word!r}; it has {known}")
    return wanted or list(range(num_classes))


def solver_of(config):
    """Return the key of LOOPS that a SamplingConfig asks for.

    :raises ValueError: where --use_ddim contradicts --sampler.
    """
    if config.use_ddim and config.sampler not in ("", "ddim"):
        raise ValueError(f"--use_ddim True contradicts --sampler {config.sampler}; leave one of them away")
    return config.sampler or ("ddim" if config.use_ddim else "ddpm")


class SmallPictures:
    """What an upsampler starts from: sample i is made from small picture i, over and over.

    :param images: uint8 [N x C x ...], possibly memory-mapped; `labels`: int64 [N] or None.
    :param noise_level: time to which the encoded pictures are noised first; 0: not at all.
    """

    def __init__(self, images, labels, codec, normalizer, diffusion, noise_level=0, seed=0):
        self.images, self.labels, self.codec, self.normalizer = images, labels, codec, normalizer
        self.diffusion, self.noise_level, self.seed = diffusion, noise_level, seed

    def condition(self, indices, device):
        """Return what the network is told of the samples `indices`: {low_res [n x C x ...], low_res_times [n]}."""
        rows = [i % len(self.images) for i in indices]
        images = self.codec.fitted(torch.from_numpy(self.images[rows].astype(np.float32) / 255))
        low_res = self.normalizer.normalise(self.codec.encode_batch(images).to(device))
        if not self.noise_level:
            return {"low_res": low_res}
        noise = keyed_randn(low_res.shape[1:], [(self.seed, CONDITION, i) for i in indices]).to(device)
        times = torch.full((len(rows),), self.noise_level, device=device)
        return {"low_res": noised_condition(self.diffusion, low_res, times, noise), "low_res_times": times}


@dataclass
class Sampler:
    """A diffusion model with what turns its x0 into pictures, and the way in which it is sampled.

    :param shape: of x0, [C x ...]; `image_shape`: of the pictures, which the decoder's padding is cropped to.
    :param solver: a key of `solvers.LOOPS`.
    :param clip_denoised: clip predicted x0 to [-1, 1]; None: where x0 are pixels.
    :param cond_fn: a gradient of guidance towards one of `guided_classes`, which the model need not know itself.
    :param small: `SmallPictures`, for an upsampler.
    :param spacing: distance of neighbouring voxels of a volume in mm.
    :param made_from: what else than these settings makes the samples what they are, a dictionary for JSON.
    """

    model: callable
    diffusion: object
    shape: tuple
    codec: object
    normalizer: object
    image_shape: tuple
    num_classes: int = 0
    class_names: list | None = None
    solver: str = "ddpm"
    clip_denoised: bool | None = None
    seed: int = 0
    cond_fn: callable = None
    guided_classes: int = 0
    small: SmallPictures | None = None
    made_from: dict = field(default_factory=dict)
    spacing: tuple = (1.0, 1.0, 1.0)

    def __post_init__(self):
        if self.clip_denoised is None:
            self.clip_denoised = isinstance(self.codec, PixelCodec)

    def labels(self, indices, classes):
        """Return the classes of the samples `indices`, int64 [N], or None where there are none."""
        if self.small is not None and self.small.labels is not None:
            return np.array([self.small.labels[i % len(self.small.labels)] for i in indices], np.int64)
        return None if classes is None else np.array([classes[i % len(classes)] for i in indices], np.int64)

    @torch.no_grad()
    def x0(self, indices, classes, device, progress=False):
        """Draw the samples `indices`; return x0 [N x *shape]."""
        labels = self.labels(indices, classes)
        told = {} if labels is None else {"y": torch.from_numpy(labels).to(device)}
        if self.small is not None:
            told.update(self.small.condition(indices, device))
        noise = KeyedNoise(self.seed, indices)
        x = noise(torch.empty(len(indices), *self.shape, device=device))
        return LOOPS[self.solver](
            self.diffusion, self._ask, tuple(x.shape), noise=x, clip_denoised=self.clip_denoised, cond_fn=self.cond_fn,
            model_kwargs=told, device=device, noise_fn=noise, progress=progress,
        )

    def _ask(self, x, times, y=None, **told):
        """Call the network, which is told the class only if it has classes."""
        return self.model(x, times, **({"y": y} if self.num_classes else {}), **told)

    def decode(self, x0):
        """Turn x0 [N x *shape] into pictures [N x *image_shape] in [0, 1]."""
        images = self.codec.decode_batch(self.normalizer.inverse(x0), channels=self.image_shape[0])
        return images[(..., *(slice(n) for n in self.image_shape[1:]))]

    def summary(self):
        """Return one line for the log."""
        classes = f"{self.num_classes} classes" if self.num_classes else "no classes"
        latents, pictures = ("x".join(map(str, shape)) for shape in (self.shape, self.image_shape))
        steps = f"{self.diffusion.num_timesteps} steps of {self.solver}"
        return f"latents {latents} -> pictures {pictures}, {classes}, {steps}"


def draw(sampler, classes, config, folder, device):
    """Draw all samples over the ranks and write them; return the path of samples_NxHxWxC.npz.

    Beside it stand contact_sheet.png and, with `config.png`, png/, and of volumes volumes/. While it goes on, shards/
    holds a file a batch; the same call again makes those that are missing.

    :raises ValueError: where there is nothing to draw, or shards/ holds other samples than these.
    :raises FloatingPointError: where samples are not finite.
    """
    if config.num_samples < 1 or config.batch_size < 1:
        raise ValueError(f"--num_samples {config.num_samples} --batch_size {config.batch_size}: both are at least 1")
    _warn_of_unsafe_start(sampler)
    folder, shards = Path(folder), Path(folder) / "shards"
    _agree_on(shards, folder / "png", sampler, classes, config)
    starts = range(0, config.num_samples, config.batch_size)
    batches = [range(start, min(start + config.batch_size, config.num_samples)) for start in starts]
    missing = dist_util.broadcast_object([b for b in batches if not _shard_path(shards, b).exists()])
    name_of = _namer(sampler)
    if len(missing) < len(batches):
        logger.log(f"{len(batches) - len(missing)} of {len(batches)} batches are there already")
    for indices in missing[dist_util.rank()::dist_util.world_size()]:
        x0 = sampler.x0(indices, classes, device, progress=dist_util.rank() == 0)
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
        _forget_beyond(config.num_samples, folder)
        _write_sheet(folder / "contact_sheet.png", path, labels, classes, name_of)
        shutil.rmtree(shards)
    dist_util.barrier()
    return path


def _forget_beyond(count, folder):
    """Remove single files of samples that an interrupted sampling of more than `count` has left."""
    for ours in (folder / name for name in ("png", "volumes") if (folder / name / OURS).exists()):
        for path in ours.iterdir():
            found = re.search(r"(\d+)\.(png|nii\.gz|npy)$", path.name)
            if found and int(found[1]) >= count:
                path.unlink()


def _write_one(folder, stem, image, spacing):
    """Write a sample uint8 [C x ...] as a PNG file; of a volume its middle slices, and itself as .nii.gz (or .npy)."""
    figures.save_picture(folder / "png" / f"{stem}.png", figures.picture(image.astype(np.float32) / 255))
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
    unsafe = first < FAINTEST and not sampler.clip_denoised
    if unsafe and sampler.diffusion.model_mean_type is ModelMeanType.EPSILON:
        logger.warn(f"the first step sees {math.sqrt(first):.1g} of the latent and the rest is noise: an unclipped "
                    "prediction of it may run away and leave noisy pictures; --timestep_respacing ddim100 begins a "
                    "little later")


def _agree_on(shards, png, sampler, classes, config):
    """Have all shards come from one making: begin a folder for them, or refuse one of another making."""
    if dist_util.rank() == 0:
        making = {**sampler.made_from, "seed": sampler.seed, "sampler": sampler.solver, "classes": classes,
                  "steps": [int(t) for t in sampler.diffusion.timestep_map], "clip_denoised": sampler.clip_denoised,
                  "batch_size": config.batch_size, "image_shape": list(sampler.image_shape), "png": config.png}
        record = shards / MAKING
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
        ours = all(map(_OF_SHARDS.fullmatch, found)) if folder == shards else not found or OURS in found
        if not ours:
            instead = "" if folder == shards else ", or --png False"
            raise FileExistsError(f"{folder} is there and not from a sampling, and samples would be written into it; "
                                  f"give another --logdir{instead}")
    for older in (shards, *(folder for folder in pictures if (folder / OURS).exists())):
        shutil.rmtree(older, ignore_errors=True)
    for folder in pictures[:count]:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / OURS).touch()


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
        chosen, names = np.arange(min(SHEET, len(samples.images))), None
        columns = min(8, len(chosen))
    unit = np.moveaxis(samples.images[chosen], -1, 1).astype(np.float32) / 255
    figures.save_picture(path, figures.contact_sheet(unit, columns, row_labels=names))


def to_uint8(images):
    """Round images in [0, 1] to 0..255; a NumPy array.  [N x C x ...] -> same."""
    return (images.float() * 255).round().clamp(0, 255).to(torch.uint8).cpu().numpy()


def write_npz(path, shape, parts, labels=None, names=None):
    """Write a file in the layout of guided-diffusion: arr_0 `shape` [N x H x W x C] uint8, arr_1 labels [N].

    `parts` are arrays that follow each other in arr_0; one of them at a time is in memory. Class names, where there are
    any, stand beside them as `class_names`. The same arrays give the same bytes.
    """
    with atomic_path(path) as part, zipfile.ZipFile(part, "w", zipfile.ZIP_STORED) as archive:
        with archive.open("arr_0.npy", "w", force_zip64=True) as stream:
            layout = {"descr": "|u1", "fortran_order": False, "shape": tuple(shape)}
            np.lib.format.write_array_header_1_0(stream, layout)
            for images in parts:
                stream.write(np.ascontiguousarray(images, np.uint8).data)
        small = {} if labels is None else {"arr_1": np.asarray(labels)}
        if names and labels is not None:
            small["class_names"] = np.array(names)
        for name, array in small.items():
            with archive.open(f"{name}.npy", "w") as stream:
                np.lib.format.write_array(stream, array, allow_pickle=False)


@dataclass
class Samples:
    """An .npz of samples: images uint8 [N x H x W x C] on disk, labels int64 [N] or None, names or None."""

    folder: str     # the file; named so as that of PictureFolder, which may be an .npz too
    images: np.ndarray
    labels: np.ndarray | None
    class_names: list | None


def open_npz(path):
    """Return the `Samples` of an .npz, ours or guided-diffusion's; the pictures are read when they are asked for.

    :raises ValueError: where there is no arr_0 of 8-bit pictures, or labels of another number.
    """
    content = open_archive(path)
    if "arr_0" not in content:
        raise ValueError(f"{path} is no batch of samples: it holds {', '.join(content)}, needed is arr_0 "
                         "[N x H x W x C]")
    images, labels, names = content["arr_0"], content.get("arr_1"), content.get("class_names")
    if images.dtype != np.uint8 or images.ndim not in (4, 5):
        raise ValueError(f"{path}: arr_0 is {images.dtype} {list(images.shape)}, needed is uint8 [N x H x W x C] or "
                         "[N x D x H x W x C]")
    if labels is not None and labels.shape != images.shape[:1]:
        raise ValueError(f"{path}: arr_1 has shape {list(labels.shape)}, not one label for each of {len(images)} "
                         "pictures")
    return Samples(path, images, labels, None if names is None else names.tolist())
