"""Labels and attributes beside the data, folders that are no classes, files that are left out, and their index."""

import io
import json
import math
import os
import pickle
import re
import threading
import time
import tracemalloc
import zlib

import blobfile
import numpy as np
import pytest
from PIL import Image, PngImagePlugin

from guided_diffusion_vae import dist_util, logger
from guided_diffusion_vae.config import as_dict
from guided_diffusion_vae.data import (
    DataConfig, VolumeFolder, decoding, image_folders, infer_classes, keep_numbers, listing, map_labels, open_folder,
)
from guided_diffusion_vae.data.cache_writer import LatentCacheConfig, _digest, _manifest_fields, write_cache
from guided_diffusion_vae.data.labels import find_labels, number_classes
from guided_diffusion_vae.files import write_record
from guided_diffusion_vae.latent_datasets import EncodedImages, LatentCache, LatentFolder
from guided_diffusion_vae.runs import spaces
from guided_diffusion_vae.runs.run import CONFIG_FILE, Run
from guided_diffusion_vae.sampling import parse_classes
from guided_diffusion_vae.sampling.sampler import Sampler
from guided_diffusion_vae.vae_wrapper import PixelCodec


def add(folder, *names, content=None):
    """Write files into a folder: 8 x 8 PNG images, or what `content` is."""
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if content is None:
            Image.fromarray(np.full((8, 8), len(name), np.uint8)).save(path, "PNG")
        else:
            path.write_bytes(content if isinstance(content, bytes) else content.encode())


def opened(folder, **fields):
    return open_folder(DataConfig(str(folder), 8, **fields))


def classes_of(source):
    return {name: source.class_names[label] for name, label in zip(source.names, source.labels)}


@pytest.fixture
def logged(monkeypatch):
    """Return the list of messages that are logged."""
    messages = []
    monkeypatch.setattr(logger, "warn", messages.append)
    monkeypatch.setattr(logger, "log_rank0", messages.append)
    return messages


THREE = "x/1.png", "x/2.png", "y/3.png"
CLASSES = {"x/1.png": "tap", "x/2.png": "push", "y/3.png": "tap"}
CSV = "{file}{s}gesture{s}{label}\nx/1.png{s}1{s}tap\nx/2.png{s}2{s}push\ny/3.png{s}3{s}tap\n"


@pytest.mark.parametrize("name, content", [
    *[("labels.csv", CSV.format(file=file, label="label", s=","))
      for file in ("file_name", "filename", "file", "image", "path", "name", "Filename")],
    *[("labels.csv", CSV.format(file="file", label=label, s=","))
      for label in ("labels", "class", "class_name", "category", "target", "y", "Label")],
    *[("labels.csv", CSV.format(file="file", label="label", s=s)) for s in (";", "\t")],
    ("labels.csv", b"\xef\xbb\xbf" + CSV.format(file="file", label="label", s=",").replace("\n", "\r\n").encode()),
    ("labels.csv", CSV.format(file="file", label="label", s=",").replace("x/1.png", '"./x\\1.png"')),
    ("labels.csv", CSV.format(file="file", label="label", s=",").replace(".png", "")),
    ("labels.csv", CSV.format(file="file", label="label", s=",").replace("x/", "").replace("y/", "")),
    ("metadata.csv", CSV.format(file="file_name", label="label", s=",") + "\n"),
    ("metadata.jsonl", "\n".join(json.dumps({"file_name": file, "gesture": 1, "label": label})
                                 for file, label in CLASSES.items())),
])
def test_label_files_give_the_classes_also_where_there_are_subfolders(tmp_path, name, content):
    add(tmp_path, *THREE)
    add(tmp_path, name, content=content)
    source = opened(tmp_path)
    assert source.class_names == ["push", "tap"] and source.labels.dtype == np.int64
    assert classes_of(source) == CLASSES
    assert source.left_out == {} and source.describe()["label_file"]["file"] == name


@pytest.mark.parametrize("labels, expected", [
    ([6, 2, 6], ["2", "6"]), ([[0, 0, 1], [0, 1, 0], [0.0, 0.0, 1.0]], ["1", "2"]), ([10, 9, 10], ["9", "10"]),
    ([6.0, 2, 6], ["2", "6"]),
])
def test_dataset_json_in_the_layout_of_edm_is_read(tmp_path, labels, expected):
    add(tmp_path, *THREE)
    content = {"labels": [[name, label] for name, label in zip(THREE, labels)]}
    add(tmp_path, "dataset.json", content=json.dumps(content))
    source = opened(tmp_path)
    assert source.class_names == expected and source.labels.tolist() == [1, 0, 1]
    assert find_labels(THREE, str(tmp_path), "labels").labels.tolist() == [1, 0, 1]
    assert opened(tmp_path, label_column="none").class_names == ["x", "y"]


def test_dataset_json_without_labels_has_no_classes(tmp_path, logged):
    add(tmp_path, *THREE)
    add(tmp_path, "dataset.json", content='{"labels": null}')
    source = opened(tmp_path)
    assert source.labels is None and source.class_names is None
    assert logged[0] == f"{tmp_path}/dataset.json states that there are no labels"


def test_dataset_json_of_the_simulator_is_no_label_file(tmp_path):
    add(tmp_path, *THREE)
    add(tmp_path, "dataset.json", content='{"simulation": 3, "classes": {}}')
    assert opened(tmp_path, allow_ignored=True).class_names == ["x", "y"]


ROWS = "file,label\nx/1.png,a\nx/2.png,b\ny/3.png,a\n"


@pytest.mark.parametrize("name, content, fields, message", [
    ("labels.csv", ROWS.replace("label", "kind"), {}, "labels.csv has no column of labels: expected one of label, "
     "labels, class, class_name, category, target, y, got kind; set --label_column to the right one, or "
     "--label_column none to take classes from names"),
    ("labels.csv", ROWS, {"label_column": "kind"}, "labels.csv has no column of labels: expected kind, got label; set "
     "--label_column"),
    ("labels.csv", ROWS.replace("file", "id"), {}, "labels.csv: is not understood as a label file (no column of file "
     "names: expected one of file_name, filename, file, image, path, name, got id, label); fix it"),
    ("metadata.csv", ROWS, {}, "metadata.csv: is not understood as a label file (no column of file names: expected "
     "file_name, got file, label)"),
    ("labels.csv", "", {}, "labels.csv: is not understood as a label file (no column of file names"),
    ("labels.csv", ROWS + "x/4.png\n", {}, "labels.csv: is not understood as a label file (row 5 has 1 cells: expected "
     "2 as in the first)"),
    ("labels.csv", "file,label,label\n", {}, "labels.csv: is not understood as a label file (two columns are named "
     "label)"),
    ("labels.csv", 'file,label\n"x/1.png,a', {}, "labels.csv: is not understood as a label file (invalid CSV: "),
    ("labels.csv", ROWS.encode("utf-16"), {}, "labels.csv: not UTF-8 text (it contains null bytes, as UTF-16 does); "
     "save it as UTF-8"),
    ("labels.csv", "file,label\nx/1.png,é\n".encode("latin-1"), {}, "labels.csv: not UTF-8 text ("),
    ("labels.csv", ROWS.replace("y/3.png,a\n", ""), {}, "y/3.png has no row in {folder}/labels.csv: expected one per "
     "file, got none for 1 of 3 files; add them or remove the files"),
    ("labels.csv", "file,label\nz.png,a\n", {}, "labels.csv: none of its 1 rows names a file of the folder: expected "
     "names such as x/1.png, got z.png; write them relative to the folder"),
    ("labels.csv", ROWS + "x/1.png,b\n", {}, "labels.csv has two rows for x/1.png that differ: label is 'a' and 'b'; "
     "remove one"),
    ("labels.csv", ROWS.replace("2.png,b", "2.png,"), {}, "labels.csv: column label is empty for 1 of 3 files (first "
     "x/2.png); add their labels or remove the files"),
    ("labels.csv", ROWS.replace(",a", ",1.5").replace(",b", ",2"), {}, "labels.csv: column label has numbers that are "
     "not integers, such as 1.5: expected classes; set --label_column to another column, or --label_column none"),
    ("metadata.jsonl", '{"file_name": "x/1.png"}\n[1]\n', {}, "metadata.jsonl: is not understood as a label file "
     "(expected one object per line)"),
    ("metadata.jsonl", "{", {}, "metadata.jsonl: is not understood as a label file ("),
    ("metadata.parquet", "PAR1", {}, "metadata.parquet is not read: expected one of dataset.json, labels.csv, "
     "metadata.csv, metadata.jsonl; convert it"),
    ("dataset.json", "{", {}, "dataset.json: invalid JSON ("),
    ("dataset.json", '{"training": [], "numTest": 3}', {}, "dataset.json: invalid JSON (not understood: expected an "
     'object {{"labels": [[file, class], ...]}}, got the keys training, numTest); fix it, or set --label_column none '
     "to ignore it"),
    ("dataset.json", "[]", {}, "dataset.json: invalid JSON (not understood: expected an object"),
    ("dataset.json", '{"labels": {"0": "spleen"}}', {}, "dataset.json: is not understood as a label file (expected "
     '"labels": [[file, class], ...])'),
    ("dataset.json", '{"labels": [["x/1.png", [0.2, 0.8]]]}', {}, "dataset.json: is not understood as a label file "
     "(x/1.png has the label [0.2, 0.8]: expected an integer or a list with a single 1)"),
    ("dataset.json", '{"labels": [["x/1.png", "tap"]]}', {}, "dataset.json: is not understood as a label file (x/1.png "
     "has the label 'tap': expected an integer"),
])
def test_label_files_that_are_not_understood_are_rejected(tmp_path, name, content, fields, message):
    add(tmp_path, *THREE)
    add(tmp_path, name, content=content)
    with pytest.raises(ValueError, match="^" + re.escape(f"{tmp_path}/" + message.format(folder=tmp_path))):
        opened(tmp_path, **fields)


def test_two_label_files_are_rejected(tmp_path):
    add(tmp_path, *THREE)
    add(tmp_path, "labels.csv", "metadata.csv", content=ROWS)
    with pytest.raises(ValueError, match=f"^{tmp_path} contains two label files, labels.csv, metadata.csv: expected "):
        opened(tmp_path)


TABLE = ("file_name,label,speed,range_m,camera,frame\n1.png,3.0,1.5,,front,7\n2.png,11,2,3,rear,8\n"
         "4.png,3,2,9,rear,8\n2.png,11,2,3,rear,8\n")


def test_numeric_columns_become_attributes_and_the_rest_is_logged(tmp_path, logged):
    add(tmp_path, "1.png", "2.png")
    add(tmp_path, "metadata.csv", content=TABLE)
    source = opened(tmp_path)
    assert source.class_names == ["3", "11"] and source.labels.tolist() == [0, 1]
    assert {name: values.dtype for name, values in source.attributes.items()} == dict.fromkeys(
        ("speed", "range_m", "frame"), np.float32)
    assert np.array_equal(source.attributes["range_m"], [math.nan, 3], equal_nan=True)
    assert source.attributes["speed"].tolist() == [1.5, 2] and source.attributes["frame"].tolist() == [7, 8]
    assert logged == [
        f"{tmp_path}/metadata.csv: 1 of 4 rows name no file of the folder (first 4.png)",
        f"{tmp_path}/metadata.csv: columns that are neither labels nor numbers are not used: camera"]
    assert source.summary().endswith("; classes: 3 1, 11 1; numbers: 3 -> 0, 11 -> 1; attributes: speed, range_m, "
                                     "frame")


def test_another_column_of_labels_or_none(tmp_path):
    add(tmp_path, "a_1.png", "b_2.png")
    add(tmp_path, "metadata.csv", content=TABLE.replace("\n1.", "\na_1.").replace("\n2.", "\nb_2."))
    by_camera, by_name = opened(tmp_path, label_column="camera"), opened(tmp_path, label_column="none")
    assert by_camera.class_names == ["front", "rear"] and by_camera.attributes["label"].tolist() == [3, 11]
    assert by_camera.preprocessing["label_column"] == "camera"
    assert by_name.class_names == ["a", "b"] and list(by_name.attributes) == ["label", "speed", "range_m", "frame"]


def test_files_without_a_row_have_no_attributes(tmp_path):
    add(tmp_path, "a_1.png", "b_2.png")
    add(tmp_path, "labels.csv", content="file,speed\na_1.png,2\n")
    values = opened(tmp_path, label_column="none").attributes["speed"]
    assert np.array_equal(values, [2, math.nan], equal_nan=True)
    add(tmp_path, "labels.csv", content="file,speed,room\na_1.png,,lab\n")
    source = opened(tmp_path, label_column="none")
    assert source.attributes == {} and "label_file" not in source.describe() and source.ignored == 1


def test_a_column_without_a_label_file_is_logged(tmp_path, logged):
    add(tmp_path, "a_1.png", "b_2.png")
    assert opened(tmp_path, label_column="kind").class_names == ["a", "b"]
    assert logged == [f"{tmp_path} contains no label file (dataset.json, labels.csv, metadata.csv, metadata.jsonl): "
                      "--label_column kind is not used, classes are those of the names"]


def test_a_table_of_the_folder_above_is_read(tmp_path, logged):
    add(tmp_path / "train", "1.png", "2.png")
    add(tmp_path / "train", "labels.csv", content="file,label\ntrain/1.png,a\ntrain/2.png,b\ntest/1.png,c\n")
    assert classes_of(opened(tmp_path / "train")) == {"1.png": "a", "2.png": "b"}
    assert "1 of 3 rows name no file of the folder (first test/1.png)" in logged[0]


def test_patches_of_a_volume_have_its_label_and_attributes(tmp_path):
    for name in ("ct.npy", "mr.npy"):
        np.save(tmp_path / name, np.zeros((8, 8, 16), np.uint8))
    add(tmp_path, "labels.csv", content="file,label,age\nct.npy,x,40\nmr.npy,w,50\n")
    volumes = VolumeFolder(DataConfig(str(tmp_path), "8x8x8", crop="grid"))
    assert volumes.labels.tolist() == [1, 1, 0, 0] and volumes.class_names == ["w", "x"]
    assert volumes.attributes["age"].tolist() == [40, 40, 50, 50]


def test_a_folder_of_latents_has_labels_and_attributes(tmp_path):
    for name in ("1.npy", "2.npy", ".cache/3.npy"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        np.save(tmp_path / name, np.zeros((4, 8, 8), np.float32))
    add(tmp_path, "labels.csv", content="file,label,age\n1.npy,x,40\n2.npy,w,50\n")
    latents = LatentFolder(tmp_path)
    assert latents.labels.tolist() == [1, 0] and latents.attributes["age"].tolist() == [40, 50]
    before = latents.fingerprint
    np.save(tmp_path / "2.npy", np.zeros((4, 8, 8), np.float64))
    assert LatentFolder(tmp_path).fingerprint != before


# Numbers of classes


def test_numeric_names_sort_as_numbers():
    names = [str(n) for n in range(12)]
    assert number_classes(sorted(names))[0] == names
    assert number_classes(["10.5", "-3", "9"])[0] == ["-3", "9", "10.5"]
    assert number_classes(["10", "9", "a"])[0] == ["10", "9", "a"]
    assert number_classes(["10", "9"], sorted)[0] == ["10", "9"]     # guided-diffusion's load_data
    assert infer_classes(["10_x.png", "9_x.png"], "")[0] == ["9", "10"]


def test_names_come_before_numbers_and_the_log_has_both():
    assert parse_classes("2,0", 3, ["0", "2", "11"]) == [1, 0]
    assert parse_classes("1", 3, ["0", "2", "11"]) == [1]
    sampler = Sampler(None, None, (1,), PixelCodec(1), None, (1,), 3, ["0", "2", "11"], solver="ddim")
    assert sampler.format_classes("2,1,11") == "2 -> number 1, 1 -> number 1 (2), 11 -> number 2"


def test_at_most_twenty_classes_are_logged(tmp_path):
    add(tmp_path, *[f"{i}/1.png" for i in range(21)])
    text = opened(tmp_path).summary()
    assert "; classes: 0 1, 1 1, " in text and ", 19 1, ...; numbers: 0 -> 0, " in text
    assert text.endswith(", 19 -> 19, ...")


def test_classes_keep_the_numbers_of_an_earlier_order(tmp_path):
    add(tmp_path, *[f"{i}/1.png" for i in range(11)])
    source, old = opened(tmp_path), sorted(map(str, range(11)))
    files = classes_of(source)
    assert not keep_numbers(source, None) and not keep_numbers(source, [*old, "x"]) and not keep_numbers(
        source, source.class_names)
    assert keep_numbers(source, old)
    assert source.class_names == old and source.labels.tolist()[2] == old.index("10") == 2
    assert classes_of(source) == files and map_labels(source, old).tolist() == source.labels.tolist()


def resumed(tmp_path, **header):
    """Return a Run that resumes a run with this header from --resume_checkpoint."""
    write_record(tmp_path / CONFIG_FILE, {"header": header})
    return Run("image_train", (), {}, checkpoint=({"step": 2}, tmp_path))


def test_the_header_of_the_folder_comes_before_that_of_the_checkpoint(tmp_path, monkeypatch):
    run = resumed(tmp_path, classes=["a"])
    assert run.previous_header == {"classes": ["a"]} and Run("image_train", (), {}).previous_header == {}
    (tmp_path / "own").mkdir()
    write_record(tmp_path / "own" / CONFIG_FILE, {"header": {"classes": ["b"]}})
    run.folder = tmp_path / "own"
    assert run.previous_header == {"classes": ["a"]}    # no step is committed there
    monkeypatch.setattr("guided_diffusion_vae.runs.run.committed_steps", lambda folder: [2])
    assert run.previous_header == {"classes": ["b"]}


def test_a_resumed_run_keeps_the_numbers_of_its_classes(tmp_path, monkeypatch):
    add(tmp_path / "data", *[f"{i}/1.png" for i in range(11)])
    old, log = sorted(map(str, range(11))), []
    monkeypatch.setattr(spaces, "log_rank0", log.append)
    source = EncodedImages(opened(tmp_path / "data"), PixelCodec(1))
    spaces.compare_with_resumed_data(resumed(tmp_path, classes=old), source)
    assert source.class_names == old
    assert source.labels.tolist() == [old.index(name.split("/")[0]) for name in source.filenames]
    assert len(log) == 1 and "classes are numbered as in the run that is resumed; classes: 0 1, 1 1, 10 1" in log[0]


@pytest.mark.parametrize("names, text", [
    (("1.png", "2.png"), None), (("1.png",), "items removed: 1"), (("1.png", "2.png", "3.png", "4.png"),
                                                                    "items added: 2"),
    (("1.png", "3.png"), "the number of items is the same, but names, sizes or times of files changed"),
])
def test_changes_of_the_data_of_a_resumed_run_are_logged(tmp_path, monkeypatch, names, text):
    add(tmp_path / "data", "1.png", "2.png", "3.png", "4.png")
    log = []
    monkeypatch.setattr(spaces, "log_rank0", log.append)

    def open_files(names):
        for path in (tmp_path / "data").iterdir():
            path.rename(tmp_path / path.name)
        for name in names:
            (tmp_path / name).rename(tmp_path / "data" / name)
        images = opened(tmp_path / "data")
        for path in (tmp_path / "data").iterdir():
            path.rename(tmp_path / path.name)
        return images

    run = resumed(tmp_path, **spaces.data_header(open_files(("1.png", "2.png"))))
    spaces.compare_with_resumed_data(run, open_files(names))
    message = (f"{tmp_path}/data differs from the data of the run that is resumed: {text}; training continues with the "
               "data as they are now")
    assert log == ([] if text is None else [message])
    log.clear()
    spaces.compare_with_resumed_data(resumed(tmp_path, classes=None), open_files(names))    # of version 0.2
    assert log == []


# Caches


def test_a_cache_has_the_attributes(tmp_path):
    add(tmp_path / "data", "1.png", "2.png")
    add(tmp_path / "data", "labels.csv", content="file,label,speed,mass\n1.png,b,1.5,\n2.png,a,2.5,4\n")
    config = LatentCacheConfig(str(tmp_path / "cache"), store="mode", latent_dtype="float32")
    cache = write_cache(opened(tmp_path / "data"), PixelCodec(1), config)
    assert cache.labels.tolist() == [1, 0] and list(cache.attributes) == ["speed", "mass"]
    assert cache.attributes["speed"].tolist() == [1.5, 2.5]
    assert np.array_equal(cache.attributes["mass"], [math.nan, 4], equal_nan=True)
    assert np.load(tmp_path / "cache" / "attributes.npy").shape == (2, 2)
    cache.verify()
    assert write_cache(opened(tmp_path / "data"), PixelCodec(1), config).count == 2     # complete: kept
    np.save(tmp_path / "cache" / "attributes.npy", np.zeros((2, 2), np.float32))
    with pytest.raises(ValueError, match="attributes.npy is corrupt: its SHA-256 differs from the manifest"):
        cache.verify()
    np.save(tmp_path / "cache" / "attributes.npy", np.zeros((2, 1), np.float32))
    with pytest.raises(ValueError, match=r"attributes.npy: expected float32 \(2, 2\) as in the manifest, got float32"):
        LatentCache(tmp_path / "cache")


def test_a_cache_of_other_labels_is_noticed(tmp_path):
    add(tmp_path / "data", "1.png", "2.png")
    config = LatentCacheConfig(str(tmp_path / "cache"), store="mode")
    for content in ("file,label\n1.png,a\n2.png,b\n", "file,label\n1.png,b\n2.png,a\n"):
        add(tmp_path / "data", "labels.csv", content=content)
        if content.endswith("b\n"):
            write_cache(opened(tmp_path / "data"), PixelCodec(1), config)
    with pytest.raises(ValueError, match="cache contains a cache of other images or settings"):
        write_cache(opened(tmp_path / "data"), PixelCodec(1), config)


def test_a_cache_with_classes_in_the_order_of_text_is_kept(tmp_path):
    add(tmp_path / "data", *[f"{i}/1.png" for i in range(11)])
    config, old = LatentCacheConfig(str(tmp_path / "cache"), store="mode"), sorted(map(str, range(11)))
    source = opened(tmp_path / "data")
    keep_numbers(source, old)
    written = write_cache(source, PixelCodec(1), config)
    kept = write_cache(opened(tmp_path / "data"), PixelCodec(1), config)
    assert kept.class_names == old and kept.labels.tolist() == written.labels.tolist()


def test_manifest_of_a_folder_without_label_file_is_that_of_earlier_versions(tmp_path):
    add(tmp_path, "a_1.png", "b_2.png")
    source = opened(tmp_path)
    fields = _manifest_fields(source, PixelCodec(1), LatentCacheConfig())
    assert not {"attributes"} & set(fields)
    assert not {"label_column", "label_file", "allow_ignored", "verify_data"} & set(fields["preprocessing"])
    assert _digest(fields) == _digest(_manifest_fields(opened(tmp_path, allow_ignored=True), PixelCodec(1),
                                                       LatentCacheConfig()))
    assert "label_column" in as_dict(DataConfig())


# Folders that are no classes


def test_hidden_folders_and_those_of_systems_are_skipped_at_any_depth(tmp_path, logged):
    add(tmp_path, "a/1.png", "b/2.png")
    skipped = ("a/.ipynb_checkpoints/1-checkpoint.png", ".cache/3.png", "__MACOSX/a/1.png", "a/@eaDir/1.png",
               "b/__pycache__/1.png", "a/.1.png")
    add(tmp_path, *skipped)
    source = opened(tmp_path)
    assert classes_of(source) == {"a/1.png": "a", "b/2.png": "b"}
    assert source.ignored == len(skipped) and source.left_out == {} and logged == []


@pytest.mark.parametrize("folders", [
    ("train", "test"), ("Train", "Test"), ("Training", "Testing"), ("train", "val", "cat"), ("TRAIN", "valid"),
    ("train_set", "dev"), ("trainset", "testset"), ("train2017", "val2017"), ("train-images", "holdout"),
    ("val", "valid"), ("train", "eval"), ("imagesTrain", "Hold-Out"),
    ("imagesTr", "imagesTs", "labelsTr"), ("01_train", "02_validation"),
])
def test_splits_in_any_spelling_are_rejected(tmp_path, folders):
    add(tmp_path, *[f"{folder}/a_1.png" for folder in folders], *[f"{folder}/b_2.png" for folder in folders])
    first, every = sorted(folders)[0], ", ".join(sorted(folders))
    message = f"{tmp_path} contains dataset splits, not classes: {every}; set --data_dir to one of them, such as "
    with pytest.raises(ValueError, match="^" + re.escape(f"{message}{tmp_path}/{first}")):
        opened(tmp_path)
    add(tmp_path, "labels.csv", content="file,label\n" + "".join(
        f"{folder}/{name}.png,x\n" for folder in folders for name in ("a_1", "b_2")))
    with pytest.raises(ValueError, match="^" + re.escape(message)):
        opened(tmp_path)


@pytest.mark.parametrize("folders", [("train", "car", "plane"), ("test", "car"), ("set", "images"),
                                     ("training_a", "b")])
def test_a_class_may_be_called_like_a_split(tmp_path, folders):
    add(tmp_path, *[f"{folder}/1.png" for folder in folders])
    assert opened(tmp_path).class_names == sorted(folders)


@pytest.mark.parametrize("names, prefix, classes", [
    (("data/a/1.png", "data/b/2.png"), "data", ["a", "b"]), (("x/y/a/1.png", "x/y/b/2.png"), "x/y", ["a", "b"]),
    (("imgs/a_1.png", "imgs/b_2.png"), "imgs", ["a", "b"]), (("train/a/1.png", "train/b/1.png"), "train", ["a", "b"]),
    (("train/1.png", "train/2.png"), "train", None), (("Train/a/1.png",), "Train", ["a"]),
])
def test_one_wrapper_folder_is_entered(tmp_path, logged, names, prefix, classes):
    add(tmp_path, *names)
    source = opened(tmp_path)
    assert source.class_names == classes and source.names == list(names)
    assert logged == [f"{tmp_path}: labels are those of {tmp_path}/{prefix}, which contains all files"]


def test_one_folder_that_contains_no_classes_stays_one(tmp_path, logged):
    add(tmp_path, "tap/1.png", "tap/2.png")
    assert opened(tmp_path).class_names == ["tap"] and logged == []


def test_splits_and_label_files_in_a_wrapper_folder_are_noticed(tmp_path):
    add(tmp_path, "set/train/1.png", "set/test/1.png")
    with pytest.raises(ValueError, match=f"^{tmp_path}/set contains dataset splits, not classes: test, train; .* as "
                                         f"{tmp_path}/set/test"):
        opened(tmp_path)
    add(tmp_path, "set/loose.png")
    with pytest.raises(ValueError, match=f"^{tmp_path}/set contains dataset splits, not classes: test, train"):
        opened(tmp_path)
    add(tmp_path / "other", "set/1.png", "set/2.png")
    add(tmp_path / "other", "set/labels.csv", content="file,label\n1.png,a\n2.png,b\n")
    assert opened(tmp_path / "other").class_names == ["a", "b"]


# Files that are left out


def test_left_out_files_are_counted_by_ending_and_must_be_acknowledged(tmp_path, logged):
    add(tmp_path, *[f"a_{i}.png" for i in range(18)])
    add(tmp_path, "1.txt", "2.TXT", content="")
    add(tmp_path, *[f".{i}.txt" for i in range(20)], content="")
    assert len(opened(tmp_path)) == 18 and logged == [f"{tmp_path}: 2 files left out: 2 txt"]
    add(tmp_path, "clip.mp4", "README", content="")
    message = (f"{tmp_path}: 4 of 22 files are not read (2 txt, 1 without ending, 1 mp4), more than 10%; convert or "
               "remove them, or set --allow_ignored True")
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        opened(tmp_path)
    logged.clear()
    assert len(opened(tmp_path, allow_ignored=True)) == 18
    assert logged == [f"{tmp_path}: 4 files left out: 2 txt, 1 without ending, 1 mp4"]


# Headers, their index, and large sets


def png(mode="RGB", chunks=(), after=(), **options):
    """Return the bytes of a PNG of 5 x 4 pixels with chunks (name, data) before and after its pixels."""
    stream = io.BytesIO()
    Image.new(mode, (4, 5)).save(stream, "PNG", **options)
    content = stream.getvalue()
    encode = lambda pairs: b"".join(len(data).to_bytes(4, "big") + name + data
                                    + zlib.crc32(name + data).to_bytes(4, "big") for name, data in pairs)
    return content[:33] + encode(chunks) + content[33:-12] + encode(after) + content[-12:]


def png_of_type(bits, color, kind=b"\0\0\0"):
    return png_header(b"\0\0\0\4\0\0\0\5" + bytes([bits, color]) + kind)


def png_header(data):
    """Return a PNG with this header, of which no pixel can be decoded."""
    content = png()
    return content[:16] + data + zlib.crc32(b"IHDR" + data).to_bytes(4, "big") + content[33:]


def jpeg(mode="RGB", **options):
    stream = io.BytesIO()
    Image.new(mode, (4, 5)).save(stream, "JPEG", **options)
    return stream.getvalue()


def exif(orientation):
    data = Image.Exif()
    data[274] = orientation
    return data.tobytes()


text = PngImagePlugin.PngInfo()
text.add_text("Software", "Matplotlib")
PLAIN = {
    **{f"png {mode}": png(mode) for mode in ("1", "L", "LA", "I;16", "P", "RGB", "RGBA")},
    **{f"png of {bits} bits, type {color}": png_of_type(bits, color) for bits, color in (
        (1, 0), (2, 0), (4, 0), (16, 2), (16, 6), (1, 3), (4, 3))},
    "png with text and density": png(pnginfo=text, dpi=(72, 72)), "png interlaced": png_of_type(8, 2, b"\0\0\1"),
    "png with gamma": png(chunks=[(b"gAMA", b"\0\0\xb1\x8f"), (b"sRGB", b"\0")]),
    "png with text after": png(after=[(b"tEXt", b"Comment\0x"), (b"zzZz", b"")]), "jpeg": jpeg(),
    "jpeg gray": jpeg("L"), "jpeg progressive": jpeg(progressive=True),
    "jpeg with comment": jpeg(comment=b"x"),
    "jpeg optimized": jpeg(optimize=True, dpi=(300, 300)),
}
UNUSUAL = {
    "png rotated": png(exif=exif(6)), "png rotated after": png(after=[(b"eXIf", exif(6).removeprefix(b"Exif\0\0"))]),
    "png with profile": png(icc_profile=b"profile"), "png with transparency": png("L", transparency=3),
    "png with raw profile": png(chunks=[(b"tEXt", b"Raw profile type exif\0x")]), "png of type 5": png_of_type(8, 5),
    "png of 16 bits, type 4": png_of_type(16, 4), "png filter": png_of_type(8, 2, b"\0\1\0"),
    "png of no size": png_header(b"\0\0\0\0\0\0\0\5\x08\2\0\0\0"),
    "png of any size": png_header(b"\0\1\0\0\0\1\0\0\x08\2\0\0\0"),
    "png corrupt": png()[:20] + b"x" + png()[21:], "png truncated": png()[:30], "png signature": png()[:8],
    "empty": b"",
    "png corrupt chunk": png(chunks=[(b"gAMA", b"\0\0\xb1\x8f")]).replace(b"gAMA\0", b"gAMA\1"),
    "jpeg rotated": jpeg(exif=exif(8)), "jpeg cmyk": jpeg("CMYK"), "jpeg truncated": jpeg()[:100], "text": b"hello",
    "jpeg of 12 bits": jpeg().replace(b"\xff\xc0\0\x11\x08", b"\xff\xc0\0\x11\x0c"),
    "gif": b"GIF89a\4\0\5\0\0\0\0;",
}


@pytest.mark.parametrize("name", [*PLAIN, *UNUSUAL])
def test_headers_without_pillow_are_those_of_pillow(tmp_path, name):
    path = str(tmp_path / ("a.jpg" if "jpeg" in name else "a.png"))
    (tmp_path / path).write_bytes({**PLAIN, **UNUSUAL}[name])
    found = decoding.read_plain_header(path)
    assert (found is not None) == (name in PLAIN)
    try:
        expected = decoding._read_header(path, 2**29)
    except ValueError as error:
        assert found is None
        with pytest.raises(ValueError, match=re.escape(str(error))):
            decoding.read_header(path)
    else:
        assert decoding.read_header(path) == expected and found in (None, expected)
        assert all(type(a) is type(b) for a, b in zip(decoding.read_header(path).sides, expected.sides))
    assert decoding.read_plain_header(path, max_pixels=19) is None


def test_named_pipes_and_folders_are_not_opened(tmp_path, named_pipe):
    named_pipe(tmp_path / "a.png")
    (tmp_path / "b.png").mkdir()
    for name in ("a.png", "b.png", "c.png"):
        assert decoding.read_plain_header(str(tmp_path / name)) is None


@pytest.fixture
def index(tmp_path, monkeypatch):
    """Use an index for any number of files; return (its folder, function that opens and returns the files read)."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(listing, "INDEX_MINIMUM", 1)
    read = []
    plain = decoding.read_plain_header

    def read_plain_header(path, *args):
        read.append(os.path.basename(path))
        return plain(path, *args)

    monkeypatch.setattr(decoding, "read_plain_header", read_plain_header)

    def files_read(**fields):
        read.clear()
        source = opened(tmp_path / "data", image_channels=1, **fields)
        files_read.source = source
        return read

    return tmp_path / "cache" / "guided_diffusion_vae", files_read


def test_headers_are_read_again_only_if_a_file_changes(tmp_path, index):
    folder, files_read = index
    add(tmp_path / "data", "a_1.png", "b_2.png")
    Image.fromarray(np.zeros((9, 8, 3), np.uint8)).save(tmp_path / "data" / "b_3.png")
    assert files_read() == ["a_1.png", "b_2.png", "b_3.png"]
    first = files_read.source
    assert files_read() == [] and list(tmp_path.rglob("*.json")) == list(folder.iterdir())
    again = files_read.source
    assert again.fingerprint == first.fingerprint and again.describe() == first.describe()
    assert again._headers == first._headers == [(1, (8, 8), "uint8"), (1, (8, 8), "uint8"), (3, (9, 8), "uint8")]
    assert {type(header) for header in again._headers} == {decoding.FileHeader}
    os.utime(tmp_path / "data" / "a_1.png", ns=(1, 1))
    assert len(files_read()) == 3 and files_read() == []
    times = os.stat(tmp_path / "data" / "a_1.png")
    Image.fromarray(np.full((8, 8), 7, np.uint8)).save(tmp_path / "data" / "a_1.png")
    os.utime(tmp_path / "data" / "a_1.png", ns=(times.st_atime_ns, times.st_mtime_ns))     # same size and time
    assert len(files_read()) == 3 and files_read() == []
    add(tmp_path / "data", "c_1.png")
    assert len(files_read()) == 4 and files_read() == []
    (tmp_path / "data" / "c_1.png").rename(tmp_path / "data" / "d_1.png")
    assert len(files_read()) == 4 and files_read() == []
    assert len(files_read(max_pixels=1000)) == 4 and files_read(max_pixels=1000) == []
    assert files_read.source.class_names == ["a", "b", "d"] and len(list(folder.iterdir())) == 1


def test_an_index_that_cannot_be_used_is_not(tmp_path, index, monkeypatch):
    folder, files_read = index
    add(tmp_path / "data", "a_1.png", "b_2.png")
    files_read()
    (path,) = folder.iterdir()
    content = path.read_text()
    for corrupt in (content[:-9], content.replace('"numbers": "', '"numbers": "AQAA'), "[]", "{}", "\0"):
        path.write_text(corrupt)
        assert len(files_read()) == 2 and files_read() == []
    path.unlink()
    folder.rmdir()
    folder.write_text("a file, not a folder")
    assert len(files_read()) == 2 and len(files_read()) == 2
    monkeypatch.setattr(listing, "INDEX_MINIMUM", 3)
    folder.unlink()
    assert len(files_read()) == 2 and not folder.exists()


def test_files_are_read_on_threads_only_if_they_are_waited_for():
    def threads_of(function):
        used = set()
        assert listing._map_files(lambda n: (used.add(threading.get_ident()), function(n))[1], range(100)) == [
            2 * n for n in range(100)]
        return used

    assert threads_of(lambda n: 2 * n) == {threading.get_ident()}
    assert len(threads_of(lambda n: time.sleep(0.002) or 2 * n)) > 2
    # At times another process has the core.
    assert threads_of(lambda n: n % 4 == 0 and time.sleep(0.01) or 2 * n) == {threading.get_ident()}


@pytest.mark.parametrize("names", [["a/{}.png", "b/{}.png"], ["{}.png", "a_{}.png"]])
def test_calls_of_the_remote_path_library_do_not_grow_with_the_files(tmp_path, monkeypatch, names):
    calls = []
    for name in ("basename", "dirname", "join", "isdir", "exists", "stat"):
        function = getattr(blobfile, name)
        monkeypatch.setattr(blobfile, name, lambda *args, f=function: calls.append(args) or f(*args))
    add(tmp_path, *(name.format(i) for name in names for i in range(50)))
    opened(tmp_path)
    assert len(calls) < 20


def test_a_link_to_nothing_is_named(tmp_path):
    add(tmp_path, "a_1.png")
    (tmp_path / "b_1.png").symlink_to(tmp_path / "nothing.png")
    with pytest.raises((OSError, ValueError), match="b_1.png"):
        opened(tmp_path)


def test_an_archive_of_a_million_images_opens_in_little_time_and_memory(tmp_path):
    path = tmp_path / "set.npz"

    def open_many(count):
        np.savez(path, arr_0=np.zeros((count, 2, 2, 1), np.uint8), arr_1=np.arange(count) % 3)
        start = time.process_time()
        return open_folder(DataConfig(str(path), 2)), time.process_time() - start

    tracemalloc.start()
    open_many(10**5)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    source, seconds = open_many(10**6)
    assert seconds < 2 and peak < 100 * 2**20 / 10
    assert len(source) == 10**6 and source.names[10**6 - 1] == "set.npz[999999]" == source.names[-1]
    assert source.kinds == {"uint8": 10**6} and source.names[1:3] == ["set.npz[1]", "set.npz[2]"]
    assert source.paths[7] == f"{path}[7]"
    with pytest.raises(IndexError):
        source.names[10**6]


def test_names_of_items_are_compared_as_sequences():
    names = listing.ItemNames("a.npz", 2)
    assert names == ["a.npz[0]", "a.npz[1]"] and ["a.npz[0]", "a.npz[1]"] == names == listing.ItemNames("a.npz", 2)
    assert names != ["a.npz[0]"] and names != ["a.npz[0]", "b"] and list(names) == names


@pytest.mark.parametrize("packed", [None, np.savez, np.savez_compressed])
def test_other_ranks_receive_the_source_of_rank_0(tmp_path, monkeypatch, packed):
    if packed:
        images = np.arange(3 * 64, dtype=np.uint8).reshape(3, 8, 8)
        packed(tmp_path / "set.npz", images=images, labels=[1, 0, 1])
    else:
        add(tmp_path, "a_1.png", "b_22.png", "b_3.png")
        add(tmp_path, "labels.csv", content="file,label,x\na_1.png,v,1\nb_22.png,w,2\nb_3.png,v,3\n")
    path, sent = tmp_path / "set.npz" if packed else tmp_path, []
    monkeypatch.setattr(dist_util, "broadcast_object", lambda item: sent.append(pickle.dumps(item)) or item)
    first = opened(path)
    monkeypatch.setattr(dist_util, "rank", lambda: 1)
    monkeypatch.setattr(dist_util, "broadcast_object", lambda item: pickle.loads(sent[0]))
    monkeypatch.setattr(image_folders.ImageFolder, "__init__", None)    # only rank 0 reads the folder
    second = opened(path)
    assert second.describe() == first.describe() and second.class_names == first.class_names
    assert second.labels.tolist() == first.labels.tolist() and second.attributes.keys() == first.attributes.keys()
    assert np.array_equal(second.batch([2, 0]), first.batch([2, 0])) and len(sent[0]) < 5000


# Faulty files


def test_all_faulty_files_are_listed_before_anything_else(tmp_path, logged):
    add(tmp_path, *[f"a_{i:02d}.png" for i in range(25)])
    assert len(opened(tmp_path, verify_data=True)) == 25
    assert logged == [f"{tmp_path}: all 25 files are read"]
    for i in (3, 7):
        path = tmp_path / f"a_{i:02d}.png"
        path.write_bytes(path.read_bytes()[:-20])
    opened(tmp_path)
    with pytest.raises(ValueError) as error:
        opened(tmp_path, verify_data=True)
    first, *lines = str(error.value).splitlines()
    assert first == f"{tmp_path}: 2 of 25 files cannot be read:"
    assert [line.partition(":")[0] for line in lines] == [f"{tmp_path}/a_03.png", f"{tmp_path}/a_07.png"]
    assert all("cannot be read (PNG is truncated" in line for line in lines)


def test_at_most_twenty_faulty_files_are_listed_over_all_ranks(tmp_path, monkeypatch):
    add(tmp_path, *[f"a_{i:02d}.png" for i in range(46)])
    for path in tmp_path.iterdir():
        path.write_bytes(path.read_bytes()[:-20])
    monkeypatch.setattr(dist_util, "world_size", lambda: 2)
    monkeypatch.setattr(dist_util, "broadcast_object", lambda item: item)
    monkeypatch.setattr(dist_util, "gather_objects", lambda part: [
        part, [(number + 1, message.replace("a_", "b_")) for number, message in part]])
    with pytest.raises(ValueError) as error:
        opened(tmp_path, verify_data=True)
    first, *lines, last = str(error.value).splitlines()
    assert "46 of 46 files cannot be read" in first and len(lines) == 20 and last == "..."
    assert lines[0].startswith(f"{tmp_path}/a_00.png") and lines[1].startswith(f"{tmp_path}/b_00.png")


def test_volumes_are_verified(tmp_path):
    np.save(tmp_path / "a.npy", np.zeros((8, 8, 8), np.float32))
    np.save(tmp_path / "b.npy", np.full((8, 8, 16), np.nan, np.float32))
    config = DataConfig(str(tmp_path), "8x8x8", value_range="0,1", crop="random", patches_per_volume=9,
                        verify_data=True)
    with pytest.raises(ValueError, match="1 of 2 files cannot be read:\n.*b.npy: 1024 of 1024 values are not finite"):
        open_folder(config)
