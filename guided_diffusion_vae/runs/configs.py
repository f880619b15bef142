"""All config classes: what a YAML file may set."""

from ..autoencoder import AutoencoderConfig
from ..data.cache_writer import LatentCacheConfig
from ..data import ConditionConfig, DataConfig, SmallCacheConfig
from ..data.axes import SpectrogramConfig
from ..data.microdoppler import MicrodopplerConfig
from ..data.spectrograms import StftConfig
from ..distillation import DistillConfig
from ..dist_util import FastLaunchConfig, LaunchConfig
from ..ema_profiles import ReconstructConfig
from ..evaluation import EvaluateConfig, LikelihoodConfig, RoundtripConfig
from ..evaluation.anomaly import AnomalyConfig
from ..evaluation.report_page import ReportConfig
from ..evaluation.study import StudyConfig
from ..gaussian_diffusion import DiffusionConfig
from ..latent_datasets import LatentConfig
from ..sampling import BaseConfig, GuidanceConfig, PixelSamplingConfig, SamplingConfig, StudySamplingConfig
from ..sampling.editing import EditingConfig
from ..train_util import AutoencoderTrainConfig, ClassifierTrainConfig, DiffusionTrainConfig, TrainConfig
from ..unet import ClassifierConfig, ModelConfig, SuperResConfig
from ..vae import AutoencoderLossConfig, DiscriminatorConfig, PerceptualConfig
from ..vae_wrapper import NormalizerConfig, VAEConfig
from .cards import PushConfig
from .diffusers_export import ExportConfig
from .planning import PlanConfig
from .run import RunConfig

__all__ = [
    "AnomalyConfig", "AutoencoderConfig", "AutoencoderLossConfig", "AutoencoderTrainConfig", "BaseConfig",
    "ClassifierConfig", "ClassifierTrainConfig", "ConditionConfig", "DataConfig", "DiffusionConfig",
    "DiffusionTrainConfig", "DiscriminatorConfig", "DistillConfig", "EditingConfig", "EvaluateConfig", "ExportConfig",
    "FastLaunchConfig", "GuidanceConfig", "LatentCacheConfig", "LatentConfig", "LaunchConfig", "LikelihoodConfig",
    "MicrodopplerConfig", "ModelConfig", "NormalizerConfig", "PerceptualConfig", "PixelSamplingConfig", "PlanConfig",
    "PushConfig", "ReconstructConfig", "ReportConfig", "RoundtripConfig", "RunConfig", "SamplingConfig",
    "SmallCacheConfig", "SpectrogramConfig", "StftConfig", "StudyConfig", "StudySamplingConfig", "SuperResConfig",
    "TrainConfig", "VAEConfig",
]
CONFIGS = tuple(globals()[name] for name in __all__)
