"""The manifest of a latent cache: names, format and validation."""

from pathlib import Path

from ..config import require
from ..files import read_record

CACHE_FLAG = "--cache_dir"
FORMAT, VERSION = "guided_diffusion_vae latent cache", 1
MANIFEST, LABELS, ATTRIBUTES, FILENAMES = "manifest.json", "labels.npy", "attributes.npy", "filenames.txt"
REENCODE_HINT = "remove the cache and re-encode it with scripts/encode_dataset.py"
EXACT = {"vae_dtype": "float32", "vae_tile": 0, "tf32": False}  # settings of encoding that are recorded if they differ

_KINDS = {"autoencoder": dict, "scale_factor": (int, float), "store": str, "dtype": str, "latent_shape": list,
          "image_shape": list, "count": int, "flips": bool, "class_names": (list, type(None)), "preprocessing": dict,
          "statistics": dict, "made_from": str, "files": dict, "shards": list}


def stored_shape(manifest):
    """Return the shape of one stored entry: (Z, ...) for modes, (2Z, ...) for moments."""
    channels, *grid = manifest["latent_shape"]
    return channels * (2 if manifest["store"] == "moments" else 1), *grid


def read_manifest(folder):
    """Return the manifest of a cache.

    :raises FileNotFoundError: if there is none.
    :raises ValueError: if it differs from its SHA-256, has another format or version, an entry is missing or invalid,
        or a file is outside of the folder.
    """
    path = folder / MANIFEST
    require((path.exists(), f"{folder} is not a latent cache: it contains no {MANIFEST}; if encoding was interrupted, "
                            f"run scripts/encode_dataset.py again, else check {CACHE_FLAG}"), error=FileNotFoundError)
    manifest = read_record(path, REENCODE_HINT)
    found = manifest.get("format"), manifest.get("version")
    require((found == (FORMAT, VERSION), f"{path}: expected format {FORMAT!r}, version {VERSION}, got format "
                                         f"{found[0]!r}, version {found[1]!r}; {REENCODE_HINT}"))
    wrong = [name for name, kind in _KINDS.items() if not isinstance(manifest.get(name, ()), kind)]
    wrong = wrong or [name for name, valid in {
        "dtype": manifest["dtype"] in ("float16", "float32"),
        "store": manifest["store"] in ("moments", "mode"),
        "latent_shape": len(manifest["latent_shape"]) > 1 and all(_is_count(n) for n in manifest["latent_shape"]),
        "count": _is_count(manifest["count"]),
        "shards": all(isinstance(s, dict) and _is_count(s.get("count")) and "first" in s and "sha256" in s
                      and "file" in s for s in manifest["shards"]),
        "autoencoder": {"sha256", "path"} <= set(manifest["autoencoder"]),
        "attributes": _are_distinct_names(manifest.get("attributes", [])),
        "statistics": {"mean", "std", "channel_mean", "channel_std"} <= set(manifest["statistics"]),
    }.items() if not valid]
    require((not wrong, f"{path} is corrupt: {', '.join(wrong)} missing or invalid; {REENCODE_HINT}"))
    for name in manifest["files"]:
        path_inside(folder, name)
    return manifest


def _is_count(value):
    return isinstance(value, int) and value > 0


def _are_distinct_names(value):
    return isinstance(value, list) and all(isinstance(name, str) for name in value) and len(set(value)) == len(value)


def path_inside(folder, name):
    """Return folder/name for a bare file name: a manifest is input and must not refer to files elsewhere.

    :raises ValueError: if the name has other parts.
    """
    bare = isinstance(name, str) and name not in ("", ".", "..") and Path(name).name == name and "\\" not in name
    require((bare, f"{folder / MANIFEST} refers to the file {name!r} outside of its folder; do not use this cache"))
    return folder / name
