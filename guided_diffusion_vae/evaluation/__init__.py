"""The evaluation room: metrics, features, reports, previews and figures. Other rooms import from here."""

from .. import deprecated_names
from .comparison import (
    EvaluateConfig, EvaluationClassifier, ImageSet, SampleFile, check_sets, evaluate, feature_statistics,
    open_sample_file,
)
from .features import (
    Features, classifier_features, collect_features, inception_features, latent_features,
)
from .image_metrics import PAIRED_METRICS, bicubic_baseline, l1, max_error, paired_metrics, psnr, ssim
from .likelihood import HeldOutData, LikelihoodConfig, likelihood
from .previews import PREVIEW_IMAGES, ClassifierValidation, ReconstructionValidation, SamplePreview
from .roundtrip import RoundtripConfig, failed_thresholds, roundtrip
from .set_metrics import (
    FeatureStatistics, class_agreement, classification_report, confusion_matrix, frechet_distance, inception_score,
    kernel_distance, nearest_neighbors, precision_recall,
)

__getattr__ = deprecated_names("evaluation")
