"""Import paths and names of version 0.1, which work until the next release with a DeprecationWarning."""

import importlib
import importlib.abc
import types
import warnings

PACKAGE = "guided_diffusion_vae"
# Where the names of a module are now. A module that still exists is listed for the names that left it.
MODULES = {
    "autoencoder": "vae.posterior vae.blocks autoencoder", "checkpoint_util": "checkpoint_util",
    "discriminator": "vae.discriminator", "dist_util": "dist_util",
    "evaluation": "evaluation evaluation.comparison evaluation.roundtrip evaluation.likelihood",
    "export": "runs.diffusers_export", "figures": "evaluation.figures sampling.sheets",
    "gaussian_diffusion": "gaussian_diffusion", "guidance": "sampling.guidance",
    "image_datasets": "data data.listing data.image_folders data.resizing data.batching data.decoding files",
    "latent_datasets": "data data.manifest data.cache_writer latent_datasets",
    "loading": "runs.loading runs.factories runs.export", "memory": "runs.memory runs.planning runs.training",
    "metrics": "evaluation.image_metrics evaluation.set_metrics evaluation.features",
    "microdoppler": "data.microdoppler", "nn": "nn", "objectives": "objectives data.augmentation vae.objective",
    "perceptual": "vae.perceptual", "previews": "evaluation.previews",
    "sampling": "sampling sampling.sampler sampling.generate data",
    "script_util": "runs.factories runs.flags runs.run runs.planning logger", "solvers": "sampling.solvers",
    "spaces": "runs.spaces", "streaming": "vae.streaming", "train_util": "train_util checkpoint_util logger",
    "training": "runs.training runs.tstr", "vae_wrapper": "vae vae.foreign vae_wrapper",
    "volume_datasets": "data data.volume_folders",
}
NAMES = {
    "Adversary": "DiscriminatorTrainer", "ClassifierFree": "ClassifierFreeGuidance", "Draws": "StepRNG",  # alias
    "EncodedPictures": "EncodedImages", "Moments": "RunningMoments", "PictureFolder": "ImageFolder",  # alias
    "Place": "RankInfo", "ReconstructionPreview": "ReconstructionValidation", "Saving": "MemorySaving",  # alias
    "ShrunkPictures": "DownsampledImages", "SmallPictures": "LowResConditioning",  # alias
    "advising_on_memory": "oom_advice", "augmented": "random_affine", "begin_with": "init_from_weights",  # alias
    "classes_of": "infer_classes", "classifier_gradient": "classifier_cond_fn",  # alias
    "conv_of_recomputed": "recomputed_conv", "conv_of_repeated": "upsample_conv",  # alias
    "create_process": "create_diffusion", "digest_of": "hash_lines", "draw": "generate_samples",  # alias
    "ending_of": "file_extension", "failures": "failed_thresholds", "forget_all_but": "prune_checkpoints",  # alias
    "hand": "draw_hand", "labels_in": "map_labels", "like": "distribute_like", "load_into": "load_strict",  # alias
    "mirrored": "random_flips", "names_below": "relative_names", "naming": "file_errors",  # alias
    "nearest_neighbours": "nearest_neighbors", "neighbour_sheet": "neighbor_grid",  # alias
    "newest_marker": "latest_marker", "newest_weights": "latest_weights", "parse_given": "parse_explicit",  # alias
    "part_of": "select_fields", "part_without": "drop_fields", "permuted": "permute_indices",  # alias
    "picture": "to_pil", "picture_batches": "ImageStream", "read_place": "read_rank_info",  # alias
    "save_picture": "save_image", "savings": "memory_savings", "say": "log_rank0",  # alias
    "scheduler_of": "create_scheduler", "seed_weights": "seed_initialization", "send": "to_device",  # alias
    "settled": "resolve_train_config", "shard": "shard_model", "side_by_side": "reconstruction_grid",  # alias
    "solver_of": "resolve_sampler", "stamp_of": "file_stamp", "starting_noise": "initial_noise",  # alias
    "steps": "committed_steps", "strides_in_words": "format_strides", "times_between": "timesteps_in_interval",  # alias
    "whole": "full_tensor",  # alias
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


class ModuleLoader(importlib.abc.Loader):
    """Loader of an empty module whose attributes are looked up by `find`."""

    def __init__(self, name):
        self.name = name

    def create_module(self, spec):
        module = types.ModuleType(spec.name)
        module.__getattr__ = lambda name: find(self.name, name)
        return module

    def exec_module(self, module):
        """Do nothing: the module stays empty."""
