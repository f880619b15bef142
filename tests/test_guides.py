"""The commands and the Python code of the pages run in their order, on tiny data with small networks and few steps.

Pages that build on each other share a folder. What does not run is listed with its reason, and parsed by `test_docs`.
"""

import json
import re
import shlex
import zipfile

import numpy as np
import pytest
import scipy.io
import torch
from PIL import Image

from guided_diffusion_vae import script_util
from guided_diffusion_vae.autoencoder import AutoencoderKL
from guided_diffusion_vae.data import open_colormap, write_nifti, write_npz
from forks import FORKS
from test_docs import ROOT, command_main, commands, shell_text

AUTOENCODER = {"num_channels": "[8,8,8]", "num_res_blocks": 1, "norm_num_groups": 4, "max_steps": 1, "batch_size": 2}
UNET = {"num_channels": 32, "num_res_blocks": 1, "channel_mult": "1", "attention_resolutions": ""}
TRAINING = {"max_steps": 1, "batch_size": 2, "diffusion_steps": 40, "preview_interval": -1}
CLASSIFIER_NETWORK = {"classifier_width": 64, "classifier_channel_mult": "1", "classifier_attention_resolutions": "",
                      "classifier_pool": "adaptive"}
CLASSIFIER = {**CLASSIFIER_NETWORK, "iterations": 1, "batch_size": 2, "diffusion_steps": 40}
SMALL = {
    "make_microdoppler": {"num_train": 2, "num_val": 2},
    "train_autoencoder": AUTOENCODER, "image_train_vae": {**UNET, **TRAINING, "ema_profiles": "0.05,0.10"},
    "image_train": {**UNET, **TRAINING, "use_fp16": False}, "classifier_train": CLASSIFIER,
    "image_sample_vae": {"num_samples": 4},
    "image_sample": {**UNET, "num_samples": 2}, "super_res_sample": {**UNET, "num_samples": 2},
    "classifier_sample": {**UNET, **CLASSIFIER_NETWORK, "num_samples": 2}, "check_roundtrip": {"min_psnr": 0},
    "detect_anomalies": {"normal_classes": "tapin", "neighbors": 2},
    "distill": {"lr_anneal_steps": 1, "batch_size": 2}, "reconstruct_ema": {"num_samples": 4},
}
# What replaces sizes, and which flags else have other values; sizes of configurations are flags in addition.
SIZES = {"512": "32", "256": "32", "128": "32", "64": "32", "112x128x80": "16x16x16", "64x64x64": "16x16x16",
         "64x64x32": "16x16x8"}
CONFIG_SIZES = {"configs/images/512.yaml": "32", "configs/images/progressive_256.yaml": "32",
                "configs/volumes/gpu_12gb.yaml": "32x32x16"}
VALUES = {"--timestep_respacing": lambda text: re.sub(r"\d+$", "2", text), "--patches_per_volume": lambda _: "2",
          "--image_size": lambda text: SIZES.get(text, text), "--large_size": lambda _: "32",
          "--small_size": lambda _: "16", "--num_head_channels": lambda _: "16", "--num_heads": lambda _: "2"}

# Commands, other lines and code of pages that do not run here, with the reason.
OMITTED = {
    r"^push ": "needs an account; tests/test_cards.py calls it without a network",
    r"^doctor ": "measures the machine; tests/test_doctor.py runs it",
    r"^augmentation_study ": "trains for minutes, on samples of two models; tests/test_study.py runs it",
    r"^plan_memory ": "counts for 5 s and more; tests/test_scripts.py runs it",
    r"^benchmarks/gpu.py ": "needs a GPU, and a checkout of guided-diffusion",
    r"^image_sample_vae .*--attributes speed_mps=0.4..1.0$": "needs a model with attributes, which is in data.md",
    r"^image_sample_vae .*--condition_dir ": "needs a model with conditions, which is in data.md",
    r"^(make|mkdocs|pip|python -m venv) ": "installs packages",
    r"^gdvae (--help|completion bash)": "tests/test_programs.py runs it",
    r"^(check_roundtrip --save_npz True|evaluate --paired True|reconstruct_ema --ema_std 0[.\d]+(,0[.\d]+)?|"
    r"distill --teacher_path runs/diffusion --student_steps 4)$": "names flags, and is no whole command",
}
SMALL_TRAIN = f"""
import guided_diffusion_vae as package
from guided_diffusion_vae import Sampler
small = lambda *arguments, train=package.train, **settings: train(*arguments, **settings | {UNET | TRAINING})
package.train = small
"""


# --- The data of a folder ---


def random_images(*shape):
    """Return integers uint8 of this shape."""
    return np.random.default_rng(0).integers(0, 256, shape, np.uint8)


def write_images(folder, images):
    """Write images [N x H x W (x C)] of two classes."""
    folder.mkdir(parents=True)
    for i, image in enumerate(images):
        Image.fromarray(image).save(folder / f"{('tapin', 'tapout')[i % 2]}_{i}.png")


def make_spectrograms(folder):
    """Make names that pages give to the simulated images, and to runs; and a checkpoint with other objects."""
    (folder / "DIR").mkdir()
    for name, part in (("train", "train"), ("val", "val"), ("test", "val")):
        (folder / "DIR" / name).symlink_to(folder / "DATA" / part)
    (folder / "runs").mkdir()
    (folder / "runs" / "normal").symlink_to("diffusion")
    (folder / "runs" / "diffusion").mkdir()
    (folder / "runs" / "diffusion" / "ema_0.9999_005000.pt").symlink_to("ema_0.999_000001.pt")
    torch.save({"state_dict": {}}, folder / "v1.ckpt")


def make_photos(folder):
    """Make color images, and the autoencoders of other projects that pages read."""
    from test_foreign import compvis_network, compvis_weights, in_model
    from safetensors.torch import save_file

    for part in ("train", "val"):
        write_images(folder / "DATA" / part, random_images(4, 40, 40, 3))
    network = compvis_network()
    network.save_pretrained(folder / "stable-diffusion" / "vae")
    weights = compvis_weights(network)
    save_file(in_model(weights, model__diffusion_model__out=1), folder / "v1-5-pruned.safetensors")
    torch.save({"state_dict": weights}, folder / "vae-ft-mse-840000-ema-pruned.ckpt")


def make_checkpoints(folder):
    """Make the checkpoints of guided-diffusion."""
    write_images(folder / "DATA" / "train", random_images(4, 64, 64, 3))
    flags = {**UNET, "class_cond": True, "learn_sigma": True, "use_scale_shift_norm": True, "resblock_updown": True}
    heads = {"num_head_channels": 16}
    networks = {
        "256x256_diffusion.pt": script_util.create_model_and_diffusion(
            **script_util.model_and_diffusion_defaults() | flags | heads | {"image_size": 32})[0],
        "64_256_upsampler.pt": script_util.sr_create_model_and_diffusion(
            **script_util.sr_model_and_diffusion_defaults() | flags | {"num_heads": 2, "large_size": 32,
                                                                       "small_size": 16})[0],
        "256x256_classifier.pt": script_util.create_classifier_and_diffusion(
            **script_util.classifier_and_diffusion_defaults() | CLASSIFIER_NETWORK | {"image_size": 32})[0],
    }
    for name, network in networks.items():
        torch.save(network.state_dict(), folder / name)
    write_npz(folder / "64_samples.npz", (2, 16, 16, 3), [random_images(2, 16, 16, 3)], labels=np.arange(2))


def make_volumes(folder):
    """Make CT and MR volumes, an autoencoder of MONAI, and the images of the page on data."""
    for i, part in enumerate(["DATA/train"] * 2 + ["DATA/val"] * 2 + ["ct"] * 2):
        (folder / part).mkdir(parents=True, exist_ok=True)
        volume = 5 * random_images(36, 36, 20).astype(np.int16) - 1000
        write_nifti(folder / part / f"{('head', 'chest')[i % 2]}_{i}.nii.gz", volume, (1, 1, 1.5))
    (folder / "mr").mkdir()
    for path in (folder / "DATA" / "train").iterdir():
        write_nifti(folder / "mr" / path.name, np.ones((36, 36, 20), np.int16), (1, 1, 1.5))
    arguments = {"spatial_dims": 3, "in_channels": 1, "out_channels": 1, "num_channels": [4, 8], "num_res_blocks": 1,
                 "attention_levels": [False, False], "latent_channels": 3, "norm_num_groups": 2}
    (folder / "arguments.yaml").write_text(json.dumps(arguments))
    bundle = folder / "brats_mri_generative_diffusion"
    for path, content in (("configs/inference.json", {"autoencoder_def": arguments}), ("models/autoencoder.pt", None)):
        (bundle / path).parent.mkdir(parents=True)
        if content:
            (bundle / path).write_text(json.dumps(content))
    torch.save(AutoencoderKL(**arguments).state_dict(), folder / "monai.pt")
    (bundle / "models" / "autoencoder.pt").symlink_to(folder / "monai.pt")
    (folder / "runs").mkdir()
    (folder / "runs" / "ct").symlink_to("diffusion")


def make_files(folder):
    """Make images of the formats of the page on data."""
    gray, color = random_images(4, 32, 32), random_images(4, 32, 32, 3)
    jet = open_colormap("jet").to_colors(np.linspace(0, 1, 4 * 32 * 32).reshape(4, 32, 32))
    write_images(folder / "radar_gesture_64" / "train", jet)
    write_images(folder / "images", color)
    for name in ("masks", "new_masks"):
        write_images(folder / name, gray % 3)
    write_images(folder / "gestures", gray)
    names = sorted(path.name for path in (folder / "gestures").iterdir())
    (folder / "gestures" / "labels.csv").write_text("file_name,label,speed_mps,range_m\n" + "".join(
        f"{name},tap,{0.4 + 0.2 * i},{0.2 + 0.1 * i}\n" for i, name in enumerate(names)))
    with zipfile.ZipFile(folder / "cifar10-32x32.zip", "w") as archive:
        for i, path in enumerate(sorted((folder / "images").iterdir())):
            archive.write(path, f"00000/{i}.png")
        archive.writestr("dataset.json", json.dumps({"labels": [[f"00000/{i}.png", i % 2] for i in range(4)]}))
    (folder / "recordings" / "walk").mkdir(parents=True)
    for i in range(2):
        x = np.exp(1j * np.arange(40 * 32).reshape(40, 32)).astype(np.complex64)
        scipy.io.savemat(folder / "recordings" / "walk" / f"{i}.mat", {"x": x, "fs": 1000.0})
    scipy.io.savemat(folder / "gestures.mat", {"X": gray, "y": np.arange(4) % 2})


# The pages of each folder, in their order, and what makes its data.
FOLDERS = {
    "spectrograms": ([make_spectrograms], ["getting_started", "README", "radar", "sampling", "editing", "evaluation",
                                           "training", "api", "autoencoder"]),
    "photos": ([make_photos], ["images_512", "from_diffusers"]),
    "stable_diffusion": ([make_photos], ["from_stable_diffusion"]),
    "guided_diffusion": ([make_checkpoints], ["guided_diffusion"]),
    "volumes": ([make_volumes, make_files], ["volumes", "from_monai", "data", "api"]),
}
# Commands for what a page has from another one.
BEFORE = {
    "getting_started": ["make_microdoppler --out_dir DATA"],
    "from_diffusers": ["train_autoencoder --data_dir DATA/train --image_size 32 --logdir runs/autoencoder"],
    "data": ["image_train --data_dir radar_gesture_64/train --image_size 32 --logdir rgb_run",
             "train_autoencoder --data_dir gestures --image_size 32 --logdir runs/gestures",
             "encode_dataset --data_dir gestures --vae_path runs/gestures --cache_dir latents_cache/gestures"],
}
# What stands for values that pages leave open.
OPEN = [("… --condition_on", "--cache_dir latents_cache/gestures --logdir runs/attributes --condition_on"),
        ("… --attributes", "--model_path runs/attributes --attributes"),
        ("--init_from …", "--init_from 256x256_diffusion.pt")]


# --- What a page contains ---


def page_path(page):
    return ROOT / f"{page}.md" if page == "README" else ROOT / "docs" / f"{page}.md"


def page_commands(page):
    """Return the commands with arguments, in code blocks and then in the text: [(name, arguments)]."""
    text = shell_text(page_path(page))
    for short, whole in OPEN:
        text = text.replace(short, whole)
    return [(name, arguments) for name, arguments in commands(text) if arguments]


def other_lines(page):
    """Return the lines of shell code that are no commands of the pipeline."""
    lines = re.sub(r"\\\n\s*", "", "".join(blocks(page, "sh"))).splitlines()
    return [line for line in lines if re.match(r"[a-z]", line) and not commands(line)]


def blocks(page, language):
    """Return the code blocks of a page."""
    return re.findall(rf"^```{language}\n(.*?)^```", page_path(page).read_text(), re.MULTILINE | re.DOTALL)


def reason(text):
    """Return why a command or line does not run, "" if it does."""
    return next((why for pattern, why in OMITTED.items() if re.search(pattern, text)), "")


# --- Running it ---


def shrink(name, arguments, index):
    """Return the words of a command with small settings; a flag that is repeated has its last value."""
    words = [VALUES[before](word) if before in VALUES else word for before, word in zip(["", *arguments], arguments)]
    known, added = command_main(name).argparser().words, dict(SMALL.get(name, {}))
    if "--report" in known:
        added["report"] = False
    if "--logdir" in known and "--logdir" not in words:
        added["logdir"] = f"runs/{index}"
    if "--timestep_respacing" in known and not {"--timestep_respacing", "runs/student2"} & set(words):
        added["timestep_respacing"] = 4
    size = next((CONFIG_SIZES[word] for word in words if word in CONFIG_SIZES), None)
    if size and "--image_size" in known:
        added["image_size"] = size
    return [*words, *(str(word) for flag, value in added.items() for word in (f"--{flag}", value))]


def require_success(done):
    assert done.returncode == 0, f"{done.args}\n{done.stdout}{done.stderr}"


def run_page(page, folder, done):
    """Run the commands of a page in a folder, except those in `done`, to which they are added; then its Python code."""
    before = [(words[0], words[1:]) for words in map(str.split, BEFORE.get(page, []))]
    for name, arguments in [*before, *page_commands(page)]:
        line = " ".join([name, *arguments])
        if line not in done and not reason(line):
            words = shrink(name, arguments, len(done))
            require_success(FORKS.run([ROOT / "scripts" / f"{name}.py", *words], cwd=folder))
            done.append(line)
    for line in filter(lambda line: not reason(line), other_lines(page)):
        program, option, code = shlex.split(line)
        assert (program, option) == ("python", "-c")
        require_success(FORKS.run_source(code, cwd=folder))
    of_volumes = (folder / "runs" / "ct").exists()
    code = [re.sub(r"steps=\d+", "steps=2", block) for block in blocks(page, "python")
            if block not in done and ("runs/ct" in block) == of_volumes]
    if code:
        require_success(FORKS.run_source(SMALL_TRAIN + "".join(code), cwd=folder))
        done += blocks(page, "python")


@pytest.mark.filterwarnings("ignore")   # diffusers warns about its own dependencies
@pytest.mark.parametrize("name", FOLDERS)
def test_commands_and_code_of_pages_run(name, tmp_path):
    make, pages = FOLDERS[name]
    for each in make:
        each(tmp_path)
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    done = []
    for page in pages:
        run_page(page, tmp_path, done)


def test_pages_with_commands_run():
    pages = ["README", *(path.stem for path in (ROOT / "docs").glob("*.md"))]
    lines = {page: [*other_lines(page), *(" ".join([name, *arguments]) for name, arguments in page_commands(page))]
             for page in pages}
    runnable = {page for page in pages if blocks(page, "python") or not all(map(reason, lines[page]))}
    assert runnable - {page for _, pages in FOLDERS.values() for page in pages} == set()
    every = [line for page in pages for line in lines[page]]
    assert [pattern for pattern in OMITTED if not any(re.search(pattern, line) for line in every)] == []
