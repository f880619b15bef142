"""Re-exports of guided-diffusion's script_util: models are built in `runs.factories`, flags parsed in `runs.flags`."""

from . import deprecated_names
from .runs.factories import (
    NUM_CLASSES, classifier_and_diffusion_defaults, classifier_defaults, create_classifier,
    create_classifier_and_diffusion, create_gaussian_diffusion, create_model, create_model_and_diffusion,
    create_model_and_diffusion_vae, diffusion_defaults, model_and_diffusion_defaults, sr_create_model,
    sr_create_model_and_diffusion, sr_model_and_diffusion_defaults,
)
from .runs.flags import add_dict_to_argparser, args_to_dict, str2bool


__getattr__ = deprecated_names("script_util")
