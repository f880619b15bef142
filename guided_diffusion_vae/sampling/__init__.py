"""The sampling room: solvers, guidance, the sampler, sample files and contact sheets. Other rooms import from here."""

from .generate import OWNED_MARKER, SAMPLE_FILES, generate_samples
from .guidance import (
    ClassifierFreeGuidance, GuidanceConfig, classifier_cond_fn, parse_interval, timesteps_in_interval,
)
from .sampler import (
    BaseConfig, KeyedNoise, LowResConditioning, PixelSamplingConfig, Sampler, SamplingConfig, decoded_shape,
    parse_classes, resolve_sampler,
)
from .sheets import MAX_ROWS, contact_sheet, save_image, to_pil
from .solvers import SAMPLERS, SOLVERS, STOCHASTIC, multistep_sample_loop

__all__ = [
    "MAX_ROWS", "OWNED_MARKER", "SAMPLERS", "SAMPLE_FILES", "SOLVERS", "STOCHASTIC", "BaseConfig",
    "ClassifierFreeGuidance", "GuidanceConfig", "KeyedNoise", "LowResConditioning", "PixelSamplingConfig", "Sampler",
    "SamplingConfig", "classifier_cond_fn", "contact_sheet", "decoded_shape", "generate_samples",
    "multistep_sample_loop", "parse_classes", "parse_interval", "resolve_sampler", "save_image",
    "timesteps_in_interval", "to_pil",
]
