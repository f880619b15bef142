"""The interface for notebooks and programs: train, sample, encode and evaluate with values of Python.

Its names are those of the package, such as `guided_diffusion_vae.Sampler`. Functions call what the commands call, and
each flag of a command is a keyword argument of the same name.
"""

import contextlib
import dataclasses
import importlib
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal, Protocol, TypeAlias, overload

import numpy as np
from PIL import Image

from . import dist_util, logger, sampling
from .commands import classifier_train, image_sample_vae, image_train, image_train_vae, train_autoencoder
from .commands import evaluate as evaluation_command
from .config import nearest, require
from .data import voxel_affine, write_npz
from .data.manifest import MANIFEST
from .latent_datasets import LatentCache
from .programs import NAMES
from .runs import loading
from .runs.configs import NormalizerConfig, RunConfig, SamplingConfig
from .runs.run import Run
from .sampling import project, sample_images, to_pil
from .vae_wrapper import VAEInterface

__all__ = ["LatentCache", "Sampler", "VAEInterface", "evaluate", "run_command", "train"]

# The commands that train, by the kind of their model.
TRAINED = {"autoencoder": train_autoencoder.main, "diffusion": image_train_vae.main, "pixels": image_train.main,
           "classifier": classifier_train.main}
# Settings of a command that writes samples, which have no effect on those that are returned.
FILE_SETTINGS = *(field.name for field in dataclasses.fields(RunConfig)), "save_individual", "save_db"


class ConfigObject(Protocol):
    """An object of a config class, which is a dataclass; `runs.configs` has all of them."""

    __dataclass_fields__: ClassVar[dict[str, Any]]


PathLike: TypeAlias = str | os.PathLike[str]
Config: TypeAlias = PathLike | ConfigObject | Sequence[ConfigObject] | None
Setting: TypeAlias = str | float | Sequence[Any] | os.PathLike[str]    # float stands for int and bool, too
ImageSet: TypeAlias = PathLike | np.ndarray


class Sampler:
    """A trained diffusion model whose samples are returned as arrays; sample i depends on (seed, i) only.

    :param run: the `Run` of a sampling command; `sampler`: the `sampling.Sampler` that it opens.
    """

    def __init__(self, run: Run, sampler: sampling.Sampler) -> None:
        self.run, self.sampler = run, sampler

    @classmethod
    def open(cls, path: PathLike, steps: int | str | None = None, config: Config = None,
             **settings: Setting) -> "Sampler":
        """Return the sampler of a run folder or weights file.

        :param path: a run of image_train_vae.py or image_train.py, or a weights file.
        :param steps: number of sampling steps, or another value of --timestep_respacing; None: those of the model.
        :param config: as in `train`.
        :param settings: flags of image_sample_vae.py, such as sampler="dpmpp_sde", cfg_scale=2.0, seed=1.
        :raises ValueError: for an unknown setting, one that conflicts with the model, or one for writing files.
        """
        if steps is not None:
            settings["timestep_respacing"] = str(steps)
        run = image_sample_vae.main.create_run(config, model_path=path, **settings)
        unused = [name for name in FILE_SETTINGS if name in run.explicit]
        require((not unused, f"{', '.join(unused)}: has no effect on samples that are returned; omit it"))
        dist_util.set_numerics(run[dist_util.LaunchConfig])
        return cls(run, loading.load_sampler(run, scale=run[NormalizerConfig]))

    @property
    def class_names(self) -> list[str] | None:
        """Names of the classes; None if the model has no classes, or they have no names."""
        return self.sampler.class_names

    @property
    def affine(self) -> np.ndarray | None:
        """Matrix float64 [4 x 4] from the voxel indices of a volume to mm, as in NIfTI; None for images."""
        return voxel_affine(self.sampler.spacing, self.sampler.orientation) if len(self.sampler.shape) == 4 else None

    @overload
    def images(self, classes: Sequence[str | int] | None = None, n: int | None = None, seed: int | None = None,
               pil: Literal[False] = False) -> np.ndarray: ...

    @overload
    def images(self, classes: Sequence[str | int] | None = None, n: int | None = None, seed: int | None = None,
               *, pil: Literal[True]) -> list[Image.Image]: ...

    def images(self, classes: Sequence[str | int] | None = None, n: int | None = None, seed: int | None = None,
               pil: bool = False) -> np.ndarray | list[Image.Image]:
        """Return samples, uint8 [n x H x W x C], of volumes [n x D x H x W x C]; `affine` belongs to these.

        :param classes: names or numbers of classes, assigned cyclically; None: those of `open`, else all.
        :param n: number of samples; None: the `num_samples` of `open`, 64 by default.
        :param seed: None: that of `open`.
        :param pil: return a list of PIL images, colored if the model has the scalars of a colormap; not of volumes.
        """
        config = self.run[SamplingConfig]
        sampler = self.sampler if seed is None else dataclasses.replace(self.sampler, seed=seed)
        numbers = sampler.parse_classes(config.classes if classes is None else ",".join(map(str, classes)))
        count = config.num_samples if n is None else n
        require((count >= 1, f"n: expected at least 1 sample, got {count}"),
                (not pil or self.affine is None, "pil: expected images, got a model of volumes; use the array"))
        parts = [sample_images(sampler, range(start, min(start + config.batch_size, count)), numbers, dist_util.dev())
                 for start in range(0, count, config.batch_size)]
        images = project(np.concatenate(parts), sampler.projection)
        if pil:
            return [to_pil(image.astype(np.float32) / 255, sampler.colormap) for image in images]
        return np.moveaxis(images, 1, -1)


def train(config: Config = None, *, data: PathLike | LatentCache, logdir: PathLike, model: str = "diffusion",
          quiet: bool = False, **settings: Setting) -> Path:
    """Train a model as its command does, and return the run folder; the same call resumes an interrupted run.

    :param config: a YAML file or the name of one of the package, such as "microdoppler_small"; a config object or a
        list of such, whose fields that differ from their defaults are set; None: defaults.
    :param data: a folder or archive of images or volumes; or a `LatentCache` or its folder.
    :param model: "diffusion" (on latents: data is a cache, or vae_path is set), "pixels" (diffusion of images),
        "autoencoder" or "classifier".
    :param quiet: print nothing; log.txt of the run folder has all of it.
    :param settings: flags of the command, such as max_steps=1000; they win over `config`.
    :raises ValueError: for an unknown model or setting.
    :raises KeyboardInterrupt: on Ctrl-C, which discards the steps after the latest checkpoint, and after SIGTERM or
        SIGUSR1, for which a checkpoint is saved first (`dist_util.StoppedBySignal`).
    """
    require((model in TRAINED, f"model: unknown value {model!r}{nearest(model, TRAINED)}"))
    path = Path(data.folder if isinstance(data, LatentCache) else data)
    flag = "cache_dir" if (path / MANIFEST).is_file() else "data_dir"
    with _output(quiet):
        return _execute(TRAINED[model], config, {**settings, flag: path, "logdir": logdir})[0].folder


def run_command(name: str, config: Config = None, *, quiet: bool = False, **settings: Setting) -> Path | None:
    """Run any command of `gdvae` in this process, and return its run folder, None if it has none.

    :param name: such as "encode-dataset", or "encode_dataset".
    :param config, quiet: as in `train`; `settings`: flags of the command.
    :raises ValueError: for an unknown command or setting.
    """
    module = name.replace("-", "_")
    require((module in NAMES, f"name: unknown command {name!r}{nearest(module, NAMES)}"))
    command = importlib.import_module(f"{__package__}.commands.{module}").main
    with _output(quiet):
        return _execute(command, config, settings)[0].folder


def evaluate(samples: ImageSet, reference: ImageSet, features: PathLike | None = None, *,
             training: ImageSet | None = None, logdir: PathLike | None = None, config: Config = None,
             quiet: bool = True, **settings: Setting) -> dict[str, Any]:
    """Compare samples with real images as evaluate.py does, and return its report.

    :param samples: the folder of a sampling run, an .npz or folder of images, or an array uint8 [N x H x W x C] without
        classes; `reference`: real images, and `training`: those in which copies are looked for, in the same forms.
    :param features: where features come from: a run of classifier_train.py, an autoencoder, or the weights file of the
        Inception network under its published name; None: as `settings` specify.
    :param logdir: run folder for metrics.json and figures; None: they are not kept.
    :param quiet: print nothing; False: messages, progress bars and the report.
    :param config: as in `train`; `settings`: flags of evaluate.py, such as tstr_iterations=600.
    :raises ValueError: for an unknown setting, and shapes that do not match.
    """
    with _output(quiet), tempfile.TemporaryDirectory() as folder:
        sets: dict[str, Any] = {"samples": samples, "reference": reference, "train_dir": training}
        for name, images in sets.items():
            if isinstance(images, np.ndarray):
                require((images.dtype == np.uint8, f"{name}: expected 8-bit images, got {images.dtype}"))
                sets[name] = Path(folder) / f"{name}.npz"
                write_npz(sets[name], images.shape, [images])
        settings |= {name: path for name, path in sets.items() if path is not None}
        if features is not None:
            settings[_features_flag(features)] = features
        if logdir:
            return _execute(evaluation_command.main, config, {**settings, "logdir": logdir})[1]
        run = evaluation_command.main.create_run(config, **settings)
        run.folder = Path(folder)
        return evaluation_command.main.body(run)


def _output(quiet: bool) -> contextlib.AbstractContextManager[None]:
    return logger.quiet() if quiet else contextlib.nullcontext()


def _execute(command: Any, config: Config, settings: dict[str, Any]) -> tuple[Run, Any]:
    """Return (run, result) of a command with these settings; its log is closed afterwards."""
    run = command.create_run(config, **settings)
    try:
        return run, command.execute(run)
    finally:
        logger.reset()


def _features_flag(path: PathLike) -> str:
    """Return the flag of evaluate.py for a source of features."""
    if "inception" in Path(path).name:
        return "inception_path"
    try:
        header = loading.open_weights(path, "features").header or {}
    except (OSError, ValueError):   # an autoencoder of another project, or an error that opening it explains
        header = {}
    return "classifier_path" if header.get("kind") == "classifier" else "vae_path"
