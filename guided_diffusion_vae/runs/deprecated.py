"""Import paths and names of version 0.1, which work until the next release with a DeprecationWarning."""

import importlib
import types
import warnings

PACKAGE = "guided_diffusion_vae"
# Where the names of a module are now. A module that still exists is listed for the names that left it.
MODULES = {
    "autoencoder": "vae.posterior vae.blocks autoencoder", "checkpoint_util": "checkpoint_util",
    "discriminator": "vae.discriminator", "dist_util": "dist_util",
    "evaluation": "evaluation evaluation.comparison evaluation.roundtrip evaluation.likelihood",
    "export": "runs.diffusers_export", "figures": "evaluation.figures sampling.sheets", "gaussian_diffusion": "gaussian_diffusion",
    "guidance": "sampling.guidance",
    "image_datasets": "data data.listing data.image_folders data.resizing data.batching data.decoding files",
    "latent_datasets": "data data.manifest data.cache_writer latent_datasets",
    "loading": "runs.loading runs.factories runs.export", "memory": "runs.memory runs.planning runs.training",
    "metrics": "evaluation.image_metrics evaluation.set_metrics evaluation.features evaluation.label_metrics",
    "microdoppler": "data.microdoppler", "objectives": "objectives data.augmentation vae.objective",
    "perceptual": "vae.perceptual", "previews": "evaluation.previews",
    "sampling": "sampling sampling.sampler sampling.generate data", "script_util": "runs.factories runs.flags runs.run runs.planning logger",
    "solvers": "sampling.solvers", "spaces": "runs.spaces", "streaming": "vae.streaming",
    "train_util": "train_util logger", "training": "runs.training runs.tstr", "vae_wrapper": "vae vae.foreign vae_wrapper",
    "volume_datasets": "data data.volume_folders",
}
NAMES = {
    "Adversary": "DiscriminatorTrainer", "ClassifierFree": "ClassifierFreeGuidance", "Draws": "StepRNG",  # alias
    "EncodedPictures": "EncodedImages", "Moments": "RunningMoments",  # alias
    "PictureFolder": "ImageFolder", "Place": "RankInfo", "ReconstructionPreview": "ReconstructionValidation",  # alias
    "ShrunkPictures": "DownsampledImages", "SmallPictures": "LowResConditioning", "begin_with": "init_from_weights",  # alias
    "augmented": "random_affine", "classes_of": "infer_classes", "classifier_gradient": "classifier_cond_fn",  # alias
    "draw": "generate_samples", "failures": "failed_thresholds",  # alias
    "forget_all_but": "prune_checkpoints", "labels_in": "map_labels", "like": "distribute_like",  # alias
    "load_into": "load_strict", "mirrored": "random_flips",  # alias
    "nearest_neighbours": "nearest_neighbors", "neighbour_sheet": "neighbor_grid",  # alias
    "newest_marker": "latest_marker", "newest_weights": "latest_weights", "parse_given": "parse_explicit",  # alias
    "part_of": "select_fields", "part_without": "drop_fields", "permuted": "permute_indices", "picture": "to_pil",  # alias
    "picture_batches": "ImageStream", "savings": "memory_savings",  # alias
    "save_picture": "save_image", "say": "log_rank0", "scheduler_of": "create_scheduler",  # alias
    "seed_weights": "seed_initialization", "settled": "resolve_train_config", "shard": "shard_model",  # alias
    "side_by_side": "reconstruction_grid", "starting_noise": "initial_noise",  # alias
    "steps": "committed_steps", "strides_in_words": "format_strides", "times_between": "timesteps_in_interval",  # alias
    "Saving": "MemorySaving", "advising_on_memory": "oom_advice", "create_process": "create_diffusion",  # alias
    "digest_of": "hash_lines", "ending_of": "file_extension", "hand": "draw_hand", "names_below": "relative_names",  # alias
    "naming": "file_errors", "read_place": "read_rank_info", "solver_of": "resolve_sampler",  # alias
    "stamp_of": "file_stamp", "whole": "full_tensor",  # alias
}


def find(module, name):
    """Return what `module.name` of version 0.1 is now.

    :raises AttributeError: if there is no such name any more.
    """
    for place in MODULES[module].split():
        found = vars(importlib.import_module(f"{PACKAGE}.{place}")).get(NAMES.get(name, name))
        if found is not None:
            warnings.warn(f"{PACKAGE}.{module}.{name} is deprecated, use {PACKAGE}.{place}.{NAMES.get(name, name)}",
                          DeprecationWarning, stacklevel=3)
            return found
    raise AttributeError(f"module '{PACKAGE}.{module}' has no attribute {name!r}")


class ModuleLoader:
    """Loader of an empty module whose attributes are looked up by `find`."""

    def __init__(self, name):
        self.name = name

    def create_module(self, spec):
        module = types.ModuleType(spec.name)
        module.__getattr__ = lambda name: find(self.name, name)
        return module

    def exec_module(self, module):
        """Do nothing: the module stays empty."""
