"""The manifest of a latent cache: names, format and validation."""

import json
from pathlib import Path

CACHE_FLAG = "--cache_dir"
FORMAT, VERSION = "guided_diffusion_vae latent cache", 1


MANIFEST, LABELS, FILENAMES = "manifest.json", "labels.npy", "filenames.txt"


_REENCODE_HINT = "remove the cache and encode it again"
_EXACT = {"vae_dtype": "float32", "vae_tile": 0}


def _stored_shape(head):
    channels, *grid = head["latent_shape"]
    return channels * (2 if head["store"] == "moments" else 1), *grid


def _read_manifest(folder):
    path = folder / MANIFEST
    if not path.exists():
        raise FileNotFoundError(f"{folder} is not a latent cache: it has no {MANIFEST}, so the encoding was "
                                "interrupted or this is another folder; run scripts/encode_dataset.py again, or check "
                                f"{CACHE_FLAG}")
    try:
        manifest = json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"{path} is not JSON ({error}); {_REENCODE_HINT}") from error
    found = (manifest.get("format"), manifest.get("version")) if isinstance(manifest, dict) else (None, None)
    if found != (FORMAT, VERSION):
        raise ValueError(f"{path} has format {found[0]!r}, version {found[1]!r}; this program reads {FORMAT!r}, "
                         f"version {VERSION}: encode again")
    kinds = {"autoencoder": dict, "scale_factor": (int, float), "store": str, "dtype": str, "latent_shape": list,
             "image_shape": list, "count": int, "flips": bool, "class_names": (list, type(None)), "preprocessing": dict,
             "statistics": dict, "made_from": str, "files": dict, "shards": list}
    wrong = [name for name, kind in kinds.items() if not isinstance(manifest.get(name, ()), kind)]
    wrong = wrong or [name for name, fits in {
        "dtype": manifest["dtype"] in ("float16", "float32"),
        "store": manifest["store"] in ("moments", "mode"),
        "latent_shape": len(manifest["latent_shape"]) > 1 and all(_is_count(n) for n in manifest["latent_shape"]),
        "count": _is_count(manifest["count"]),
        "shards": all(isinstance(s, dict) and _is_count(s.get("count")) and "first" in s and "sha256" in s
                      and "file" in s for s in manifest["shards"]),
        "autoencoder": {"sha256", "path"} <= set(manifest["autoencoder"]),
        "statistics": {"mean", "std", "channel_mean", "channel_std"} <= set(manifest["statistics"]),
    }.items() if not fits]
    if wrong:
        raise ValueError(f"{path} is damaged: {', '.join(wrong)} missing or not what it should be; {_REENCODE_HINT}")
    for name in manifest["files"]:
        _inside(folder, name)
    return manifest


def _is_count(value):
    return isinstance(value, int) and value > 0


def _inside(folder, name):
    """Return folder/name for a bare file name; a manifest is input and must not lead elsewhere."""
    if not isinstance(name, str) or name in ("", ".", "..") or Path(name).name != name or "\\" in name:
        raise ValueError(f"{folder / MANIFEST} names the file {name!r} outside of its folder; do not use this cache")
    return folder / name
