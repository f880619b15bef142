"""Train a diffusion model on pictures themselves, as guided-diffusion does.

    mpiexec -n 2 python scripts/image_train.py --data_dir DIR --image_size 64 --class_cond True --learn_sigma True \\
        --lr 1e-4 --batch_size 16
"""

from guided_diffusion_vae import dist_util
from guided_diffusion_vae.data import DataConfig, open_folder
from guided_diffusion_vae.gaussian_diffusion import DiffusionConfig
from guided_diffusion_vae.runs import spaces, training
from guided_diffusion_vae.runs.flags import argparser, parse
from guided_diffusion_vae.runs.run import RunConfig, start_run, finish_run
from guided_diffusion_vae.train_util import DiffusionTrainConfig
from guided_diffusion_vae.unet import ModelConfig

CONFIGS = (DataConfig, ModelConfig, DiffusionConfig, DiffusionTrainConfig, RunConfig)


def create_argparser():
    return argparser(__doc__, *CONFIGS)


def main():
    data, model, process, train, run = configs = parse(__doc__, *CONFIGS)
    folder = start_run(run, configs)

    source, space = spaces.open_pixels(open_folder(data))
    training.train_diffusion("image_train", run, folder, configs, source, space, model, process, train)
    finish_run(folder)


if __name__ == "__main__":
    dist_util.launch(main)
