"""The commands and the Python code of guides run in their order, on tiny data with small networks and few steps."""

import re
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from forks import FORKS
from test_docs import commands

ROOT = Path(__file__).parents[1]
# The first page makes the models that the others read.
GUIDES = ("getting_started", "radar", "sampling", "editing", "evaluation", "training", "api")
AUTOENCODER = {"num_channels": "[8,8,8]", "num_res_blocks": 1, "norm_num_groups": 4, "max_steps": 1, "batch_size": 2}
NETWORK = {"num_channels": 32, "num_res_blocks": 1, "channel_mult": "1", "attention_resolutions": "", "max_steps": 1,
           "batch_size": 2, "diffusion_steps": 40, "report": False}
CLASSIFIER = {"classifier_width": 64, "classifier_channel_mult": "1", "classifier_attention_resolutions": "",
              "classifier_pool": "adaptive", "iterations": 1, "batch_size": 2, "diffusion_steps": 40}
SMALL = {
    "make_microdoppler": {"num_train": 2, "num_val": 2},
    "train_autoencoder": AUTOENCODER, "image_train_vae": NETWORK, "classifier_train": CLASSIFIER,
    "image_sample_vae": {"num_samples": 6}, "classifier_sample": {"num_samples": 2},
    "check_roundtrip": {"min_psnr": 0}, "detect_anomalies": {"normal_classes": "tapin", "neighbors": 2},
    "distill": {"lr_anneal_steps": 1, "batch_size": 2, "report": False},
}
# These require models or files of other projects or pages, an account, or minutes; doctor tests the machine.
OMITTED = re.compile(r"^(push|doctor|augmentation_study)\b|stable-diffusion|--attributes|--condition_dir|--ema_std")
SMALL_TRAIN = f"""
import guided_diffusion_vae as package
small = lambda *arguments, train=package.train, **settings: train(*arguments, **settings | {NETWORK | {"max_steps": 2}})
package.train = small
"""


def blocks(page, language):
    """Return the code blocks of a guide."""
    text = (ROOT / "docs" / f"{page}.md").read_text()
    return re.findall(rf"^```{language}\n(.*?)^```", text, re.MULTILINE | re.DOTALL)


def shrink(name, arguments):
    """Return the words of a command with small settings; a flag that is repeated has its last value."""
    words = [re.sub(r"\d+$", "2", word) if before == "--timestep_respacing" else word
             for before, word in zip(["", *arguments], arguments)]
    return [*words, *(str(word) for flag, value in SMALL.get(name, {}).items() for word in (f"--{flag}", value))]


def run_guide(page, folder):
    """Run the commands of a guide in a folder, then its Python code; return the number of runs."""
    lines = [(name, arguments) for name, arguments in commands("".join(blocks(page, "sh")))
             if not OMITTED.search(" ".join([name, *arguments]))]
    for name, arguments in lines:
        done = FORKS.run([ROOT / "scripts" / f"{name}.py", *shrink(name, arguments)], cwd=folder)
        assert done.returncode == 0, f"{done.args}\n{done.stdout}{done.stderr}"
    code = [block for block in blocks(page, "python") if "nibabel" not in block]    # which reads a model of volumes
    if code:
        done = FORKS.run_source(SMALL_TRAIN + "".join(code), cwd=folder)
        assert done.returncode == 0, f"{code}\n{done.stdout}{done.stderr}"
    return len(lines) + len(code)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder in which the commands of the first guide have run on images of two classes."""
    folder = tmp_path_factory.mktemp("guides")
    rng = np.random.default_rng(0)
    for part in ("train", "val", "test"):
        (folder / "DATA" / part).mkdir(parents=True)
        for i in range(4):
            image = rng.integers(0, 256, (64, 64), np.uint8)
            Image.fromarray(image).save(folder / "DATA" / part / f"{('tapin', 'tapout')[i % 2]}_{i}.png")
    (folder / "DIR").symlink_to("DATA")
    (folder / "configs").symlink_to(ROOT / "configs")
    run_guide(GUIDES[0], folder)
    diffusion = folder / "runs" / "diffusion"
    (folder / "runs" / "normal").symlink_to("diffusion")
    shutil.copy(diffusion / "ema_0.999_000001.pt", diffusion / "ema_0.9999_005000.pt")
    return folder


@pytest.mark.parametrize("page", GUIDES[1:])
def test_commands_and_code_of_a_guide_run(folder, page):
    assert run_guide(page, folder)
