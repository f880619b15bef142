"""Hold samples against real pictures: Fréchet and kernel distance, precision, recall, class agreement, copies.

The features come from a classifier of yours (classifier_train.py --noised False) or from an autoencoder's latents; no
pretrained network is needed. Writes metrics.json, confusion matrices and nearest training pictures to the run folder.

    python scripts/evaluate.py --samples samples_300x64x64x3.npz --reference DIR/val --train_dir DIR/train \\
        --classifier_path runs/classifier/model002000.pt
"""

from guided_diffusion_vae import dist_util, evaluation, metrics, script_util
from guided_diffusion_vae.image_datasets import DataConfig
from guided_diffusion_vae.vae_wrapper import VAEConfig, create_vae

CONFIGS = (evaluation.EvaluateConfig, VAEConfig, DataConfig, script_util.RunConfig)


def create_argparser():
    return script_util.argparser(__doc__, *CONFIGS)


def main():
    configs, given = script_util.parse_given(__doc__, *CONFIGS)
    config, vae, data, run = configs
    folder = script_util.begin_run(run, configs)
    if run.dry_run:
        return

    names = shape = None
    if config.classifier_path:
        classifier, header = script_util.load_classifier(config.classifier_path, dist_util.dev())
        extract, names, shape = metrics.classifier_features(classifier), header["classes"], header["image_shape"]
        read = header["data"]
    else:
        codec = create_vae(vae, dist_util.dev())
        extract, read = metrics.latent_features(codec), codec.preprocessing
    data = script_util.as_trained(data, given, read)

    script_util.print_report(evaluation.evaluate(config, data, extract, folder, names, shape))
    script_util.end_run(folder)


if __name__ == "__main__":
    dist_util.launch(main)
