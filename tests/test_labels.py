"""Labels and attributes beside the data, folders that are no classes, and files that are left out."""

import json
import math
import re

import numpy as np
import pytest
from PIL import Image

from guided_diffusion_vae import logger
from guided_diffusion_vae.config import as_dict
from guided_diffusion_vae.data import DataConfig, VolumeFolder, infer_classes, keep_numbers, map_labels, open_folder
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
    (("1.png", "2.png"), None), (("1.png",), "1 items were removed"), (("1.png", "2.png", "3.png", "4.png"),
                                                                       "2 items were added"),
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
