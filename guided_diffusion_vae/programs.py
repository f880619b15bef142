"""The commands of the pipeline in its order, and how to call them: `gdvae NAME` or `python scripts/NAME.py`."""

import ast
import re
import sys
from pathlib import Path

COMMANDS = {
    "data": ["make_microdoppler", "make_spectrograms"],
    "autoencoder": ["plan_memory", "train_autoencoder", "check_roundtrip", "encode_dataset"],
    "diffusion": ["image_train_vae", "image_train", "super_res_train", "distill", "reconstruct_ema"],
    "classifier": ["classifier_train"],
    "samples": ["image_sample_vae", "image_sample", "classifier_sample", "super_res_sample", "image_edit"],
    "evaluation": ["evaluate", "augmentation_study", "image_nll", "detect_anomalies", "report"],
    "other programs": ["export", "push", "doctor"],
}
NAMES = [name for names in COMMANDS.values() for name in names]
PROGRAMS = "gdvae", "python -m guided_diffusion_vae"


def spell(name):
    """Return the name of a command as it is typed: `image-train` of "image_train"."""
    return name.replace("_", "-")


def summarize(name):
    """Return the first line of a command's documentation, without importing the command and with it PyTorch."""
    source = (Path(__file__).parent / "commands" / f"{name}.py").read_text(encoding="utf-8")
    return ast.get_docstring(ast.parse(source)).split("\n")[0]


def call_as_started(text):
    """Return a text that mentions scripts, with the commands instead if this process is one of `PROGRAMS`."""
    program = next((p for p in PROGRAMS if Path(sys.argv[0]).name.startswith(f"{p} ")), None)
    if program is None:
        return text

    def command(match):
        path, name = match.groups()
        if name not in NAMES:
            return match[0]
        return f"{program} {spell(name)}" if path else spell(name)

    return re.sub(r"\b((?:python )?scripts/)?(\w+)\.py\b", command, text)
