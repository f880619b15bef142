"""The teacher of a distillation: a trained model, and data in the space of its x0."""

import dataclasses
from typing import NamedTuple

import torch

from ..config import from_dict, require
from ..data import ConditionConfig, DataConfig, keep_numbers, open_folder
from ..distillation import Distillation, DistillConfig, resolve_steps
from ..interfaces import Process
from ..sampling import ClassifierFreeGuidance
from .factories import DiffusionConfig, ModelConfig, create_diffusion
from .loading import load_diffusion_model, open_weights
from .spaces import (
    LatentConfig, LatentNormalizer, Space, VAEConfig, apply_trained_preprocessing, describe_autoencoder,
    describe_conditions, open_encodings, open_pixels, require_same_space, works_on_pixels,
)

TEACHER_FLAG = "--teacher_path"


class Teacher(NamedTuple):
    """A teacher, and what is equal in its student; see `train_diffusion`.

    `network` predicts in the `diffusion` of its steps, `model` and `process` are the configs of the student, `entry`
    the entry of its header.
    """

    network: torch.nn.Module
    diffusion: Process
    header: dict
    model: ModelConfig
    process: DiffusionConfig
    entry: dict
    cfg_scale: float

    @property
    def nbytes(self):
        """The size of its weights on a device."""
        return sum(p.nbytes for p in self.network.parameters())

    def initialize(self, student):
        """Load the weights of the teacher into the network of the student."""
        student.load_state_dict(self.network.state_dict())

    def objective(self, diffusion, schedule_sampler, is_pixels):
        """Return the objective of a student with this process."""
        network, null_label = self.network, self.model.num_classes
        if self.cfg_scale != 1:
            network = ClassifierFreeGuidance(network, null_label, self.cfg_scale)
        # The unconditional prediction is a part of a guided one, and not distilled by itself.
        dropout = self.model.class_dropout if self.entry["cfg_scale"] == 1 else 0.0
        return Distillation(diffusion, network, self.diffusion, schedule_sampler, dropout, null_label, is_pixels)


def open_teacher(run):
    """Return the Teacher of a DistillConfig.

    A student of a teacher that predicts noise predicts velocity: at the first of few steps, noise does not determine
    x0 (arXiv:2202.00512, Sec. 4).

    :raises ValueError: if it is no diffusion model of this project, diverges in equal steps, or does not fit the flags.
    """
    config, own = run[DistillConfig], run[ModelConfig]
    weights = open_weights(config.teacher_path, TEACHER_FLAG)
    header, path = weights.header, weights.path
    require((header, f"{path} has no header; {TEACHER_FLAG} expects a checkpoint of this project"))
    network, _ = load_diffusion_model(weights, {"use_fp16": False}, flag=TEACHER_FLAG)
    before = header.get("distillation") or {}
    steps = resolve_steps(config, before.get("steps", 0))
    trained = from_dict(ModelConfig, header["model"])
    require((config.cfg_scale == 1 or trained.class_dropout, f"--cfg_scale {config.cfg_scale:g} requires a teacher "
             f"trained with --class_dropout > 0; {path} was not and has no unconditional prediction"),
            (config.cfg_scale == 1 or before.get("cfg_scale", 1) == 1, f"--cfg_scale {config.cfg_scale:g} conflicts "
             f"with {path}, a student that is guided by itself; omit the flag"))
    process = from_dict(DiffusionConfig, {**header["diffusion"], "timestep_respacing": f"trailing{steps}"})
    pixels = works_on_pixels(header)
    diffusion = create_diffusion(process, pixels)
    require((pixels or not diffusion.unclipped_warning(), f"{path} ({TEACHER_FLAG}) predicts noise and its "
             "schedule ends in pure noise, from which its x0 diverge; use a teacher trained with --predict_v True or "
             "--noise_schedule linear"))
    student = dataclasses.replace(process, timestep_respacing=f"trailing{config.student_steps}")
    if process.process == "gaussian" and not process.predict_xstart:
        student = dataclasses.replace(student, predict_v=True)
    model = dataclasses.replace(
        trained, **{name: vars(own)[name] for name in ("use_fp16", "use_checkpoint", "recompute_norms", "dropout")})
    entry = {"teacher": {"path": str(path), "sha256": weights.sha256}, "teacher_steps": steps,
             "steps": config.student_steps,
             "cfg_scale": config.cfg_scale if config.cfg_scale != 1 else before.get("cfg_scale", 1.0)}
    return Teacher(network.requires_grad_(False), diffusion, header, model, student, entry, config.cfg_scale)


def open_teacher_data(run, teacher):
    """Return (run that reads conditions as the teacher did, latent source, Space): data in the space of a Teacher.

    :raises ValueError: if their autoencoder, classes or conditions differ from those of the teacher.
    """
    header, path = teacher.header, teacher.entry["teacher"]["path"]
    data, vae, cache_dir = run[DataConfig], run[VAEConfig], run[LatentConfig].cache_dir
    if works_on_pixels(header):
        require((not cache_dir, f"--cache_dir {cache_dir} conflicts with {path}, a model of pixels; set --data_dir"))
        data = apply_trained_preprocessing(data, run.explicit, header["data"])
        source, space = open_pixels(open_folder(data))
    else:
        if data.data_dir and not vae.vae_path and header["autoencoder"]:
            run = run.override(dataclasses.replace(vae, vae_path=header["autoencoder"]["path"]))
        source, codec = open_encodings(run)
        space = Space(codec, LatentNormalizer.from_dict(header["normalizer"]))
    # A plain folder of latents has no description of its autoencoder.
    found = {"autoencoder": describe_autoencoder(source, space) or header["autoencoder"],
             "normalizer": space.normalizer.to_dict(), "latent_shape": list(source.latent_shape)}
    require_same_space(header, found, source.folder, "the data")
    if header["model"]["class_cond"]:
        keep_numbers(source, header["classes"])
        require((source.class_names == header["classes"], f"{source.folder}: expected the classes of {path} "
                 f"({TEACHER_FLAG}), {', '.join(header['classes'] or ['none'])}; got "
                 f"{', '.join(source.class_names or ['none'])}"))
    return _with_conditions(run, header.get("condition"), path), source, space


def _with_conditions(run, described, path):
    """Return a run that reads its conditions as the teacher did."""
    config = run[ConditionConfig]
    require(
        (described or not config.condition_dir, f"--condition_dir {config.condition_dir}: {path} ({TEACHER_FLAG}) was "
         "trained without conditions; omit the flag"),
        (not described or config.condition_dir, f"--condition_dir is not set: {path} ({TEACHER_FLAG}) was trained with "
         f"{described and describe_conditions(described)}"),
    )
    if not described:
        return run
    labels = ",".join(map(str, described["labels"]))
    return run.override(dataclasses.replace(
        config, condition_labels=labels, condition_value_range=described["value_range"]))
