"""Train a diffusion model on pictures themselves, as guided-diffusion does.

    mpiexec -n 2 python scripts/image_train.py --data_dir DIR --image_size 64 --class_cond True --learn_sigma True \\
        --lr 1e-4 --batch_size 16
"""

from guided_diffusion_vae import dist_util, script_util, spaces, training
from guided_diffusion_vae.gaussian_diffusion import DiffusionConfig
from guided_diffusion_vae.image_datasets import DataConfig
from guided_diffusion_vae.train_util import DiffusionTrainConfig
from guided_diffusion_vae.unet import ModelConfig
from guided_diffusion_vae.volume_datasets import open_folder

CONFIGS = (DataConfig, ModelConfig, DiffusionConfig, DiffusionTrainConfig, script_util.RunConfig)


def create_argparser():
    return script_util.argparser(__doc__, *CONFIGS)


def main():
    data, model, process, train, run = configs = script_util.parse(__doc__, *CONFIGS)
    folder = script_util.begin_run(run, configs)

    source, space = spaces.open_pixels(open_folder(data))
    training.train_diffusion("image_train", run, folder, configs, source, space, model, process, train)
    script_util.end_run(folder)


if __name__ == "__main__":
    dist_util.launch(main)
