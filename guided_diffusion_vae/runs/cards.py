"""Model cards: README.md beside an export, from its header and its run; and uploads to the Hugging Face hub."""

import csv
import json
import math
import re
from dataclasses import dataclass
from pathlib import Path

from .. import __version__
from ..checkpoint_util import Weights, committed_steps, read_marker
from ..config import format_shape, option, require
from ..files import atomic_path, file_errors
from .run import CONFIG_FILE, OLD_KEYS
from .spaces import works_on_pixels

CARD = "README.md"
REPOSITORY = r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*"
CLASSES_SHOWN = 20
KINDS = {"diffusion": "Diffusion model", "super_res": "Diffusion model that upsamples images",
         "classifier": "Classifier", "autoencoder": "KL autoencoder"}
USES = {
    "diffusion": "gdvae image-sample-vae --vae_path AUTOENCODER --model_path",
    "super_res": "gdvae super-res-sample --base_samples SAMPLES.npz --model_path",
    "classifier": "gdvae classifier-sample --model_path MODEL --classifier_path",
    "autoencoder": "gdvae encode-dataset --data_dir DIR --vae_path",
}


@dataclass
class PushConfig:
    export: str = option("", "exported folder, or .safetensors file, with its model card", essential=True)
    repo: str = option("", "repository of the Hugging Face hub, as owner/name", essential=True)
    private: bool = option(True, "create a repository that does not exist as a private one", essential=True)


# --- Content ---


def model_card(name: str, weights: Weights, library: str, license: str = "", metrics: str = "") -> str:
    """Return the model card of an export as Markdown with YAML front matter for the Hugging Face hub.

    Paths are not in it. Figures of training and metrics are those of the run folder of the weights, if any.

    :param name: name of the exported file or folder.
    :param library: the library that loads it, "diffusers" or "guided-diffusion-vae".
    :param license: identifier of a license on the hub, "" if it is not stated.
    :param metrics: path of the metrics.json of an evaluation; "": that of the run folder, if there is one.
    :raises ValueError: if the license is not an identifier, or metrics.json is not valid.
    :raises FileNotFoundError: if `metrics` does not exist.
    """
    require((re.fullmatch(r"[a-z0-9.-]*", license), f"--license {license!r} is not valid: expected an identifier of "
             "the Hugging Face hub such as mit, apache-2.0, cc-by-nc-4.0 or other"))
    header, folder = weights.header, Path(weights.path).parent
    images = "volumes" if len(header.get("image_shape") or ()) == 4 else "images"
    front = {"license": license, "library_name": library, "pipeline_tag":
             "unconditional-image-generation" if header["kind"] == "diffusion" and images == "images" else "",
             "tags": ["guided-diffusion-vae", header["kind"].replace("_", "-")]}
    path = Path(metrics) if metrics else folder / "metrics.json"
    measured = _read_json(path) if metrics or path.is_file() else _measured(folder, header)
    sections = {
        "Model": _describe_model(weights), "Data": _describe_data(header),
        "Training": _describe_training(folder, header), "Metrics": dict(_scalars(measured)),
    }
    stated = f"`{license}`" if license else "Not stated. Who publishes the weights chooses one that the data permits."
    lines = ["---", *(f"{key}: {json.dumps(value)}" for key, value in front.items() if value), "---",
             f"<!-- model card of {name} -->", "", f"# {name}", "",
             f"{KINDS[header['kind']]} for {images}, exported by guided-diffusion-vae {__version__}.", ""]
    for title, entries in sections.items():
        if entries:
            rows = [f"| {key} | {_format(value)} |" for key, value in entries.items()]
            lines += [f"## {title}", "", "| | |", "|---|---|", *rows, ""]
    lines += ["## Use", "", "```", _example(name, header, library), "```", "", "## License", "", stated, "",
              "## Limitations", "", "Not stated. Complete this section before the model is shared: the origin of the "
              "data, intended uses and known faults are not recorded with the weights.", ""]
    return "\n".join(lines)


def _example(name, header, library):
    """Return the lines that use an export."""
    kind = header["kind"]
    if library == "diffusers":
        cls = "AutoencoderKL" if kind == "autoencoder" else "DiffusionPipeline"
        return f"from diffusers import {cls}\n\nmodel = {cls}.from_pretrained({name!r})"
    pixels = kind == "diffusion" and works_on_pixels(header)
    return f"{'gdvae image-sample --model_path' if pixels else USES[kind]} {name}"


def _describe_model(weights):
    header = weights.header
    entries = {"kind": header["kind"], "parameters": sum(value.numel() for value in weights.state_dict.values()),
               "image shape": header.get("image_shape"), "latent shape": header.get("latent_shape")}
    if "diffusion" in header:
        process = header["diffusion"]
        entries |= {"process": process.get("process", "gaussian"), "timesteps": process["diffusion_steps"],
                    "noise schedule": process["noise_schedule"]}
    if header.get("attributes"):
        entries["attributes"] = ", ".join(header["attributes"]["names"])
    if header["kind"] != "autoencoder" and header.get("autoencoder") and not works_on_pixels(header):
        entries["SHA-256 of the autoencoder"] = header["autoencoder"]["sha256"]
    return {key: value for key, value in entries.items() if value is not None}


def _describe_data(header):
    """Return the data census of a header: the number of items, classes and the settings that were not empty."""
    classes = header.get("classes") or []
    listed = ", ".join(classes[:CLASSES_SHOWN]) + (", ..." if len(classes) > CLASSES_SHOWN else "")
    entries = {"items": header.get("data_count"), "fingerprint": header.get("data_fingerprint"),
               "classes": f"{len(classes)}: {listed}" if classes else None}
    settings = {f"`{key}`": value for key, value in (header.get("data") or {}).items()
                if isinstance(value, (str, int, float)) and value not in ("", 0, False)}
    return {key: value for key, value in {**entries, **settings}.items() if value is not None}


def _describe_training(folder, header):
    """Return the figures of a training up to the step of a header, from config.json and progress.csv of its folder."""
    step, entries = header.get("step"), {"step": header.get("step")}
    if (folder / CONFIG_FILE).is_file():
        flags = _read_json(folder / CONFIG_FILE).get("flags", {})
        training = next((values for section, values in flags.items() if section.endswith("training")), {})
        entries |= {f"`{name}`": training.get(name) for name in ("batch_size", "lr", "ema_rate", "seed")}
    rows = []
    if step is not None and (folder / "progress.csv").is_file():
        with open(folder / "progress.csv", newline="", encoding="utf-8") as stream:
            rows = [row for row in csv.DictReader(stream) if _number(row.get("step")) <= step]
    if rows:
        last = rows[-1]
        samples, loss = (_number(last.get(key)) for key in ("samples", "loss" if "loss" in last else "train_loss"))
        hours, before = 0.0, 0
        for row in rows:
            now, speed = _number(row["step"]), _number(row.get("steps_per_second"))
            hours += (now - before) / speed / 3600 if 0 < speed < math.inf else 0
            before = now
        entries |= {"samples": int(samples) if samples < math.inf else None, "hours": hours or None,
                    f"loss before step {last['step']}": loss if loss < math.inf else None}
    return {key: value for key, value in entries.items() if value not in (None, "")}


def _measured(folder, header):
    """Return what validation measured at the step of a header, {} if the folder has no such step."""
    step = header.get("step")
    return read_marker(folder, step, lambda marker: None).get("measured", {}) if step in committed_steps(folder) else {}


def _number(text):
    """Return a number of progress.csv, infinity for one that is missing."""
    return float(text) if text else math.inf


def _scalars(report, prefix=""):
    """Yield (name, number) of a report, without those under their old names."""
    for key, value in report.items():
        if isinstance(value, dict):
            yield from _scalars(value, f"{prefix}{key} / ")
        elif isinstance(value, (int, float)) and key not in OLD_KEYS.values():
            yield f"{prefix}{key}", value


def _format(value):
    if isinstance(value, list):
        return format_shape(value)
    text = f"{value:.5g}" if isinstance(value, float) else f"{value:,}" if type(value) is int else str(value)
    return text.replace("|", r"\|")


def _read_json(path):
    require((path.is_file(), f"{path} does not exist; check --metrics"), error=FileNotFoundError)
    with file_errors(path):
        content = json.loads(path.read_bytes())
    require((isinstance(content, dict), f"{path}: expected an object of names and numbers; check --metrics"))
    return content


# --- Files and uploads ---


def card_path(export: str | Path) -> Path:
    """Return the path of the model card of an export.

    In a folder it is README.md. Beside a file, too, unless that is not the card of this file: then STEM.README.md.
    """
    export = Path(export)
    path = export / CARD if export.is_dir() else export.with_name(CARD)
    is_free = export.is_dir() or not path.exists()
    if is_free or f"<!-- model card of {export.name} -->" in path.read_text("utf-8", "replace"):
        return path
    return export.with_name(f"{export.stem}.{CARD}")


def write_card(text: str, export: str | Path) -> Path:
    """Write the model card of an exported file or folder; return its path."""
    path = card_path(export)
    with atomic_path(path) as part:
        part.write_text(text, "utf-8")
    return path


def push(config: PushConfig) -> str:
    """Upload an export with its model card to a repository of the Hugging Face hub, and return its address.

    :raises ValueError: if the repository is not owner/name, or the card states no license or is not valid.
    :raises FileNotFoundError: if the export or its card does not exist.
    :raises OSError: if the hub rejects the upload, or is not reached.
    """
    from huggingface_hub import HfApi, ModelCard
    from huggingface_hub.errors import HfHubHTTPError

    export = Path(config.export)
    require((config.export and export.exists(), f"{config.export!r} does not exist; set --export to a folder or file "
             "that export.py has written"), error=FileNotFoundError)
    require((re.fullmatch(REPOSITORY, config.repo), f"--repo {config.repo!r} is not valid: expected owner/name"))
    path = card_path(export)
    require((path.is_file(), f"{path} does not exist: a model is not uploaded without its card; export it again"),
            error=FileNotFoundError)
    try:
        card = ModelCard.load(path)
    except Exception as error:      # of its YAML parser, or ValueError
        raise ValueError(f"{path} cannot be read ({' '.join(str(error).split())}); fix its first lines, or export again"
                         ) from error
    require((card.data.license, f"{path} states no license; export again with --license, or add a line `license: ...` "
             "between the first two lines `---`"))
    api = HfApi()
    try:
        url = api.create_repo(config.repo, private=config.private, exist_ok=True)
        if export.is_dir():
            api.upload_folder(repo_id=config.repo, folder_path=export)
        else:
            for file, name in ((export, export.name), (path, CARD)):
                api.upload_file(repo_id=config.repo, path_or_fileobj=file, path_in_repo=name)
    except HfHubHTTPError as error:
        raise OSError(f"the Hugging Face hub rejected the upload to {config.repo} ("
                      f"{' '.join(str(error).split())}); log in with `hf auth login`, or check --repo") from error
    except (OSError, ValueError):
        raise
    except Exception as error:      # of the HTTP client, which depends on the version of huggingface_hub
        raise OSError(f"{api.endpoint} cannot be reached for the upload to {config.repo} ({type(error).__name__}: "
                      f"{error}); check the network and HF_ENDPOINT, then run the same command again") from error
    return str(url)
