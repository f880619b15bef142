"""Score images by how unlike normal ones they are, under a diffusion model of normal images.

    python scripts/detect_anomalies.py --model_path runs/normal --data_dir DIR/test --reference_dir DIR/train \\
        --normal_classes healthy --timestep_respacing 50
    mpiexec -n 2 python scripts/detect_anomalies.py --model_path runs/normal --data_dir DIR/test --noise_levels 0.3,1

Images are noised in part and denoised (AnoDDPM); what changes is unlike the training images. Baselines are the
variational bound, the error of the autoencoder and the distance to the nearest reference images. Writes scores.csv,
heat maps (maps/), anomalies.png and metrics.json. Rerun the same command to resume an interrupted run."""

from .. import dist_util
from ..evaluation.anomaly import detect_anomalies
from ..runs import loading
from ..runs.configs import AnomalyConfig, DataConfig, DiffusionConfig, RunConfig, VAEConfig
from ..runs.run import script, select_fields


@script(
    __doc__, select_fields(AnomalyConfig, *loading.ANOMALY_FLAGS), DataConfig, VAEConfig,
    select_fields(DiffusionConfig, "timestep_respacing"), RunConfig,
)
def main(run):
    detector = loading.open_detector(run)
    if not run.dry_run:
        run.write_report(detect_anomalies(detector, run[AnomalyConfig], run.folder, dist_util.dev()))


create_argparser = main.argparser
