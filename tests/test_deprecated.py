"""Import paths and names of version 0.1 work for one release, each with a warning that names its successor."""

import importlib
import json
from pathlib import Path

import pytest
import torch

from guided_diffusion_vae import logger
from guided_diffusion_vae.objectives import PlainObjective
from guided_diffusion_vae.runs import deprecated
from guided_diffusion_vae.train_util import TrainLoop
from guided_diffusion_vae.vae_wrapper import LatentNormalizer

# Public functions and classes of the commit before the reorganization, by module; internals of config, files, nn, unet
# and respace are left out.
OLD_NAMES = json.loads((Path(__file__).parent / "data/names_0_1.json").read_text())
# Gone, or of another signature: internals of the command line, which take a `runs.run.Run` now.
REMOVED = {
    "dist_util": ["memory_flags"], "evaluation": ["write_report", "require_given", "open_pictures", "as_read"],  # alias
    "image_datasets": ["range_of", "parse_range", "mirrored"], "objectives": ["noised_condition"],
    "guidance": ["parse_interval"],
    "loading": ["described_by", "open_base", "sampler_from", "load_with_data", "weights_file",  # alias
                "is_described"],  # alias
    "script_util": ["section_of", "begin_run", "end_run", "write_config", "print_configuration", "print_report"],
    "spaces": ["open_latent_source", "open_held_out", "open_pictures", "open_small", "with_sizes",  # alias
               "as_trained", "require_same_pictures", "verify", "say_source", "begun_with", "codec_of",  # alias
               "space_of"],  # alias
    "training": ["sets_to_train_on", "train_on_samples", "loop_arguments", "with_classes", "classifier_for"],
}


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("module", sorted(OLD_NAMES))
def test_names_of_version_0_1_are_found_in_their_module(module):
    found = importlib.import_module(f"guided_diffusion_vae.{module}")
    missing = [name for name in OLD_NAMES[module] if not hasattr(found, name)]
    assert sorted(missing) == sorted(REMOVED.get(module, []))


def test_a_moved_name_warns_and_is_its_successor():
    with pytest.warns(DeprecationWarning, match=r"metrics\.psnr is deprecated, use .*evaluation\.image_metrics\.psnr"):
        from guided_diffusion_vae.metrics import psnr
    from guided_diffusion_vae.evaluation.image_metrics import psnr as successor
    assert psnr is successor


def test_a_renamed_name_warns_in_a_module_that_still_exists():
    with pytest.warns(DeprecationWarning, match=r"use guided_diffusion_vae\.data\.ImageFolder"):
        from guided_diffusion_vae.image_datasets import PictureFolder  # alias
    from guided_diffusion_vae.data import ImageFolder
    assert PictureFolder is ImageFolder  # alias


def test_old_methods_of_the_normalizer_warn_and_call_their_successors():
    normalizer, latents = LatentNormalizer([1], [2], "channel"), torch.tensor([[[3.0]]])
    with pytest.warns(DeprecationWarning, match="LatentNormalizer.normalise is deprecated, use normalize"):  # alias
        x0 = normalizer.normalise(latents)  # alias
    with pytest.warns(DeprecationWarning, match="LatentNormalizer.inverse is deprecated, use denormalize"):
        assert x0.item() == 1 and torch.equal(normalizer.inverse(x0), latents)


def test_arguments_of_the_old_training_loop_are_applied_with_a_warning(tmp_path):
    def squared_error(model, batch, cond, rng):
        return {"loss": model(batch).square().mean(1)}

    logger.configure(str(tmp_path), [])
    arguments = {"objective": PlainObjective(squared_error), "max_steps": 3, "best_by": "val_psnr"}
    expected = r"TrainLoop\(max_steps=...\) is deprecated, use the field max_steps of"
    with pytest.warns(DeprecationWarning, match=expected):
        loop = TrainLoop(model=torch.nn.Linear(2, 1), data=iter(()), batch_size=1, lr=1.0, **arguments)
    logger.reset()
    assert loop.objective is arguments["objective"] and (loop.max_steps, loop.monitor) == (3, "val_psnr")
    with pytest.raises(TypeError, match="TrainLoop has no argument 'nothing'"):
        TrainLoop(model=torch.nn.Linear(2, 1), data=iter(()), batch_size=1, lr=1.0, nothing=1)


def test_an_unknown_name_or_module_is_an_error():
    with pytest.raises(AttributeError, match="metrics' has no attribute 'nothing'"):
        deprecated.find("metrics", "nothing")
    with pytest.raises(ModuleNotFoundError):
        importlib.import_module("guided_diffusion_vae.nothing")
