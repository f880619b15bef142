"""Train a KL autoencoder on a folder of pictures: reconstruction (L1 or L2) and KL.

    python scripts/train_autoencoder.py --config configs/microdoppler_small.yaml --data_dir DIR \\
        --logdir runs/autoencoder
"""

import dataclasses

import torch

from guided_diffusion_vae import dist_util, pipeline, script_util
from guided_diffusion_vae.autoencoder import AutoencoderConfig, AutoencoderLossConfig, create_autoencoder
from guided_diffusion_vae.config import as_dict
from guided_diffusion_vae.image_datasets import BatchPlan, DataConfig, PictureFolder, picture_batches
from guided_diffusion_vae.previews import ReconstructionPreview
from guided_diffusion_vae.train_util import AutoencoderTrainConfig, TrainLoop, autoencoder_objective, seed_weights

CONFIGS = (DataConfig, AutoencoderConfig, AutoencoderLossConfig, AutoencoderTrainConfig, script_util.RunConfig)


def create_argparser():
    return script_util.argparser(__doc__, *CONFIGS)


def main():
    data, autoencoder, loss, train, run = configs = script_util.parse(__doc__, *CONFIGS)
    folder = script_util.begin_run(run, configs)

    network = create_autoencoder(dataclasses.replace(autoencoder, in_channels=autoencoder.in_channels or 1))
    pictures = PictureFolder(data, multiple=network.factors)
    autoencoder = dataclasses.replace(autoencoder, in_channels=autoencoder.in_channels or pictures.shape[0])
    seed_weights(train.seed)
    network = create_autoencoder(autoencoder)
    latent_shape = network.latent_shape(pictures.shape[1:])
    script_util.say(pictures.summary())
    script_util.say(f"total downsampling {network.factors}: pictures {pictures.shape} -> latents {latent_shape}")
    plan = BatchPlan(len(pictures), train.batch_size, dist_util.rank(), dist_util.world_size(), train.seed)
    script_util.say(plan.summary())
    if run.dry_run:
        return script_util.print_model_size(network, lambda m: m(torch.zeros(1, *pictures.shape))[0], train.batch_size)

    header = {"kind": "autoencoder", "autoencoder": as_dict(autoencoder), "image_shape": list(pictures.shape),
              "data": pictures.preprocessing}
    network.to(dist_util.dev())
    held_out = PictureFolder(data, network.factors, data_dir=train.val_data_dir) if train.val_data_dir else pictures
    preview = ReconstructionPreview(
        network, autoencoder.image_range, held_out, train.val_pictures, folder, dist_util.dev()
    )
    loop = TrainLoop(
        model=network, data=picture_batches(pictures, plan), header=header, preview=preview,
        objective=autoencoder_objective(loss, network, autoencoder.image_range, train.mirror),
        **pipeline.loop_arguments(train),
    )
    script_util.write_config(folder, "train_autoencoder", configs, header)
    loop.run_loop()
    script_util.end_run(folder)


if __name__ == "__main__":
    dist_util.launch(main)
