"""Train a diffusion model on pixels, as in guided-diffusion.

    mpiexec -n 2 python scripts/image_train.py --data_dir DIR --image_size 64 --class_cond True --learn_sigma True \\
        --lr 1e-4 --batch_size 16
    python scripts/image_train.py --data_dir DIR --image_size 64 --condition_dir MASKS --condition_labels 0,1,2"""

from ..data import open_folder
from ..runs import spaces, training
from ..runs.configs import (
    ConditionConfig, DataConfig, DiffusionConfig, DiffusionTrainConfig, ModelConfig, RunConfig,
)
from ..runs.run import script


@script(
    __doc__, DataConfig, ConditionConfig, ModelConfig, DiffusionConfig, DiffusionTrainConfig, RunConfig, trains=True,
)
def main(run):
    training.train_diffusion(run, *spaces.open_pixels(open_folder(run[DataConfig])))


create_argparser = main.argparser
