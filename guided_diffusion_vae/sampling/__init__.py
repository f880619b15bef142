"""The sampling room: solvers, guidance, the sampler, sample files and contact sheets. Other rooms import from here.

`editing` is imported by its own name, which keeps import chains short.
"""

from .. import deprecated_names
from .generate import OWNED_MARKER, SAMPLE_FILES, SAMPLING_RECORD, generate_samples, project, sample_images
from .guidance import (
    Autoguidance, ClassifierFreeGuidance, GuidanceConfig, Unconditional, classifier_cond_fn, timesteps_in_interval,
)
from .sampler import (
    BaseConfig, CompiledNetwork, KeyedNoise, LowResConditioning, PixelSamplingConfig, Sampler, SamplingConfig,
    StudySamplingConfig, decoded_shape, noise_levels, parse_classes, resolve_sampler,
)
from .sheets import MAX_ROWS, contact_sheet, save_image, to_pil
from .solvers import SAMPLERS, SOLVERS, STOCHASTIC, applicable_samplers, deterministic_sampler, multistep_sample_loop

__getattr__ = deprecated_names("sampling")
