"""Train the generative models of an augmentation study and sample them, by the commands that do this alone."""

from pathlib import Path

from .. import dist_util
from ..checkpoint_util import find_weights
from ..config import require
from ..data import DataConfig
from ..files import hash_lines
from ..logger import log_rank0
from ..sampling import SAMPLING_RECORD, StudySamplingConfig
from ..train_util import TrainConfig, resolve_train_config
from ..vae_wrapper import VAEConfig
from .factories import DiffusionConfig, ModelConfig
from .flags import drop_fields, flag_names, select_fields
from .run import Run, read_config_file

# Flags with which all models of a study are sampled; --batch_size is that of its classifiers.
SAMPLING = (drop_fields(StudySamplingConfig, "batch_size", "classes", "compile", "save_db"),
            select_fields(DiffusionConfig, "timestep_respacing"))
# Flags that change no result, and places of files, which are compared by their content.
INEFFECTIVE = {"data_dir", "cache_dir", "vae_path", "model_path", "guide_model_path", "logdir", "report", "log_formats",
               "log_interval", "collective_timeout_minutes", "save_individual"}


def _explicit(run, *classes):
    """Return {flag: value} of the flags of config classes that were set for a run."""
    return {name: value for name, value in run.explicit.items() if name in flag_names(*classes)}


# --- Training ---


def create_stages(run, folder: Path, data_dir: str) -> list[Run]:
    """Return the runs that train a model on a folder of images alone: autoencoder, latent cache, diffusion model.

    Their settings are those of `--config`. With `--vae_path` there is no autoencoder to train.

    :param folder: of autoencoder/, cache/ and diffusion/.
    :raises ValueError: if a training would not end, or the model has no classes.
    """
    config, vae_path = run.config_file, run[VAEConfig].vae_path
    require((config, "--train_models True requires the settings of an autoencoder and a diffusion model: set --config "
             "to a YAML file with them, such as configs/microdoppler_small.yaml"))
    data, training = _explicit(run, DataConfig), {"resume_checkpoint": ""}
    stages = []
    if not vae_path:
        stages.append(run.create_inner("train_autoencoder", config, **{**data, **training, "data_dir": data_dir},
                                       val_data_dir="", logdir=folder / "autoencoder"))
        vae_path = _output_folder(stages[0])
    latents = {"vae_path": vae_path, "cache_dir": folder / "cache"}
    encoding = run.create_inner("encode_dataset", config, **{**data, **latents, "data_dir": data_dir})
    diffusion = run.create_inner("image_train_vae", config, **{**data, **training, **latents, "data_dir": ""},
                                 logdir=folder / "diffusion")
    for stage, section in ((stages[0] if stages else diffusion, "autoencoder.training"), (diffusion, "training")):
        require((resolve_train_config(stage[TrainConfig]).max_steps, f"{config}: --train_models True would not end: "
                 f"expected lr_anneal_steps or max_steps in the section {section}, got neither; set one"))
    require((diffusion[ModelConfig].class_cond, f"{config}: --train_models True requires models with classes: expected "
             "class_cond: true in the section model"))
    return [*stages, encoding, diffusion]


def find_starts(stages: list[Run]) -> list[tuple[str, str]]:
    """Return (flag, path) of the networks that trainings are initialized from."""
    return [("--init_from", path) for path in filter(None, (stage.setting("init_from") for stage in stages))]


def train_model(run, stages: list[Run], fingerprint: str | None) -> Path:
    """Execute the runs of `create_stages`, each of which resumes; return the run folder of the diffusion model.

    :param fingerprint: of the images, which must be those of an interrupted training.
    :raises ValueError: if an interrupted or finished training had other settings or images.
    """
    for stage in stages:
        if TrainConfig in stage:
            _require_unchanged(stage, fingerprint)
        run.execute_inner(stage)
    return stages[-1].folder


def find_fingerprint(header: dict) -> str | None:
    """Return the fingerprint of the images that a network with this header was trained on; None if it has none."""
    return header.get("data_fingerprint") or (header.get("data") or {}).get("fingerprint")


def _output_folder(run):
    return Path(run.setting("logdir")) / ("fast_dev_run" if run.setting("fast_dev_run") else "")


def _require_unchanged(run, fingerprint):
    """Reject a training in a folder that has one with other settings or images: its steps would be a mixture."""
    folder = _output_folder(run)
    changed = sorted(set(run.changed_settings(folder)) - INEFFECTIVE)
    found = find_fingerprint(read_config_file(folder, "remove the folder").get("header", {}))
    require((not changed, f"{folder} was trained with other settings ({', '.join(changed)}): restore them in --config, "
             "remove the folder to train again, or set another --logdir"),
            (found in (None, fingerprint), f"{folder} was trained on other images than those of its share now: remove "
             "the folder to train again, or set another --logdir"))


# --- Sampling ---


def sample_model(run, path, name: str, count: int, folder: Path) -> Path:
    """Return the folder of samples of a model; a finished set of the same weights and settings is not sampled again.

    :param name: start of the folder's name; it ends in a hash of weights and settings, so that others have another.
    :param count: number of samples unless `--num_samples` is set.
    """
    networks = {flag: dist_util.broadcast_object(find_weights(network, f"--{flag}") if dist_util.rank() == 0 else None)
                for flag, network in model_paths(run, path).items()}
    flags = _explicit(run, *SAMPLING)
    flags["num_samples"] = flags.get("num_samples") or count
    settings = [f"{flag} {value}" for flag, value in sorted(flags.items()) if flag not in INEFFECTIVE]
    target = folder / f"{name}_{hash_lines([*(str(sha256) for _, sha256 in networks.values()), *settings])[:8]}"
    if dist_util.any_rank((target / SAMPLING_RECORD).is_file()):
        log_rank0(f"{target}: {flags['num_samples']} samples of {path} exist")
        return target
    log_rank0(f"{target}: sampling {flags['num_samples']} images of {path}")
    files = {flag: file for flag, (file, _) in networks.items()}
    run.execute_inner(run.create_inner("image_sample_vae", **{**flags, **_explicit(run, VAEConfig), **files},
                                       logdir=target))
    return target


def model_paths(run, path) -> dict:
    """Return {flag: path} of a model and of its guide, if there is one."""
    guide = run[StudySamplingConfig].guide_model_path
    return {"model_path": path, **({"guide_model_path": guide} if guide else {})}
