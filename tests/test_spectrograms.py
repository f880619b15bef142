"""Spectrograms of baseband, and the axes that data state about themselves."""

import csv
import dataclasses
import json

import numpy as np
import pytest
import scipy.io

from guided_diffusion_vae.data import DataConfig, ImageFolder, microdoppler
from guided_diffusion_vae.data.axes import SpectrogramConfig, find_axes, resolve_axes
from guided_diffusion_vae.data.cache_writer import _digest
from guided_diffusion_vae.data.spectrograms import StftConfig, make_spectrograms, read_recording, spectrograms

CONFIG = StftConfig(sample_rate_hz=1000.0, window_s=0.032, hop_s=0.016, num_frequencies=32, duration_s=0.256,
                    floor="-30")
RECORDED = {"rows": 32, "columns": 16, "row_hz": 31.25, "column_s": 0.016, "zero_row": 15, "first_row": "positive",
            "db_floor": -30.0, "db_range": 40.0}


def with_(**changes):
    return dataclasses.replace(CONFIG, **changes)


def tone(hertz, seconds=0.6, amplitude=1.0, channels=1):
    t = np.arange(round(seconds * 1000)) / 1000
    return np.tile(amplitude * np.exp(2j * np.pi * hertz * t), (channels, 1)).astype(np.complex64)


@pytest.fixture(scope="module")
def simulated(tmp_path_factory):
    """Folder of a tiny simulated dataset with baseband, and its configuration."""
    config = microdoppler.MicrodopplerConfig(
        out_dir=str(tmp_path_factory.mktemp("simulated")), classes="tapin,still", num_train=2, num_val=1,
        image_size="32", window_ms=32.0, duration_s=1.024, waveform="cw", baseband=True)
    microdoppler.write_dataset(config)
    return config


def write_recordings(folder, count=3):
    folder.mkdir()
    rng = np.random.default_rng(0)
    for i in range(count):
        noise = 0.05 * rng.standard_normal((600, 2)).view(complex)[:, 0]
        np.save(folder / f"{'ab'[i % 2]}_s{i}.npy", tone(250)[0] + noise)
    return folder


@pytest.mark.parametrize("hertz", [0.0, 125.0, -250.0, 468.75])
@pytest.mark.parametrize("amplitude, channels, level", [(1.0, 1, 0.0), (0.1, 1, -20.0), (1.0, 2, 10 * np.log10(2))])
def test_tone_is_in_the_row_of_its_frequency_at_its_level(hertz, amplitude, channels, level):
    images, starts, floor = spectrograms(tone(hertz, amplitude=amplitude, channels=channels), CONFIG)
    rows = 15 - np.arange(32)
    assert (images.argmax(1) == np.flatnonzero(np.isclose(rows * 31.25, hertz))).all() and floor == -30
    assert np.allclose(-30 + 40 * images.max(1), level, atol=0.01)
    assert images.shape == (2, 32, 16) and starts.tolist() == [0, 256]


def test_floor_is_the_median_of_the_noise_at_high_frequencies():
    rng = np.random.default_rng(0)
    noise = rng.standard_normal((1, 9000, 2)).view(complex)[..., 0]
    _, _, floor = spectrograms(noise + 30 * tone(0, 9), with_(floor=""))
    power = 2 * 1.5 / 32 * np.log(2)        # of a bin of white noise of power 2; the median of an exponential
    assert floor == pytest.approx(10 * np.log10(power), abs=0.3)
    images, *_ = spectrograms(noise, with_(floor="", noise_from_hz=100.0))
    assert (images == 0).mean() == pytest.approx(0.5, abs=0.02)


@pytest.mark.parametrize("overlap, starts", [(0.0, [0, 256]), (0.5, [0, 128, 256]), (0.9, [*range(0, 341, 32)])])
def test_overlapping_images_are_parts_of_one_transform(overlap, starts):
    recording = tone(100) + tone(-200) * np.linspace(0, 1, 600)
    images, found, _ = spectrograms(recording, with_(overlap=overlap))
    assert found.tolist() == starts
    for image, start in zip(images, starts):
        alone, _, _ = spectrograms(recording[:, start:start + 272], CONFIG)
        np.testing.assert_allclose(image, alone[0], atol=1e-5)


def test_images_of_simulated_baseband_are_those_of_the_simulator(simulated, tmp_path):
    floor = 10 * np.log10(1.5 / 32)         # the mean noise power
    config = StftConfig(data_dir=f"{simulated.out_dir}/baseband", out_dir=str(tmp_path / "out"), sample_rate_hz=1000.0,
                        window_s=0.032, num_frequencies=32, duration_s=1.024, floor=f"{floor}", val_recordings="_val-")
    assert make_spectrograms(config) == {"train": 4, "val": 2, "skipped": []}
    made = ImageFolder(DataConfig(f"{tmp_path}/out/train", 32))
    own = ImageFolder(DataConfig(f"{simulated.out_dir}/train", 32))
    assert made.class_names == own.class_names and (made.labels == own.labels).all() and made.kinds == {"uint16": 4}
    np.testing.assert_allclose(made.batch(range(4)).numpy(), own.batch(range(4)).numpy(), atol=0.5 / 255 + 1e-4)
    for name, values in own.attributes.items():
        assert made.attributes[name].tolist() == values.tolist()
    found, simulators = made.preprocessing["spectrogram"], own.preprocessing["spectrogram"]
    assert found == {**simulators, "db_floor": pytest.approx(floor)}
    assert found["row_hz"] == 1000 / 32 and found["column_s"] == 0.032 and found["zero_row"] == 15


def test_baseband_is_added_to_an_existing_dataset(simulated, tmp_path):
    config = dataclasses.replace(simulated, out_dir=str(tmp_path), baseband=False)
    assert microdoppler.write_dataset(config) == {"train": 4, "val": 2} and not (tmp_path / "baseband").exists()
    config.baseband = True
    assert microdoppler.write_dataset(config) == {"baseband": 6} and microdoppler.write_dataset(config) == {}
    assert np.load(tmp_path / "baseband/tapin_val-00000.npy").shape == (1, 31 * 32 + 32)


def test_no_recording_is_in_train_and_val_and_the_table_names_it(tmp_path):
    data = write_recordings(tmp_path / "data")
    config = with_(data_dir=str(data), out_dir=str(tmp_path / "out"), val_recordings="s1", overlap=0.5)
    assert make_spectrograms(config) == {"train": 6, "val": 3, "skipped": []}
    assert make_spectrograms(config) == {}
    read = lambda split: list(csv.DictReader((tmp_path / f"out/{split}/metadata.csv").read_text().splitlines()))
    tables = [read("train"), read("val")]
    assert [{row["recording"] for row in table} for table in tables] == [{"a_s0", "a_s2"}, {"b_s1"}]
    assert tables[1][1] == {"file_name": "b_s1_00000128.png", "label": "b", "recording": "b_s1"}
    with pytest.raises(ValueError, match="other recordings or settings .stft differ"):
        make_spectrograms(dataclasses.replace(config, overlap=0.0))
    np.save(data / "c_short.npy", tone(0, 0.1)[0])
    made = make_spectrograms(dataclasses.replace(config, out_dir=str(tmp_path / "other")))
    assert made == {"train": 6, "val": 3, "skipped": ["c_short"]}


def test_recordings_without_classes_make_images_without(tmp_path):
    (tmp_path / "data").mkdir()
    np.save(tmp_path / "data/walk.npy", tone(100)[0])
    make_spectrograms(with_(data_dir=str(tmp_path / "data"), out_dir=str(tmp_path / "out")))
    source = ImageFolder(DataConfig(str(tmp_path / "out/train"), "32x16", label_column="none"))
    assert source.labels is None and source.names == ["walk-00000000.png", "walk-00000256.png"]


def test_recordings_are_read_from_matlab_files_and_either_axis(tmp_path):
    samples = tone(50, channels=3) * np.array([[1], [2], [3]])
    scipy.io.savemat(tmp_path / "a.mat", {"iq": samples.T, "fs": 1000.0})
    np.save(tmp_path / "b.npy", samples)
    scipy.io.savemat(tmp_path / "c.mat", {"iq": samples[:1].T, "iq2": samples[:1]})
    np.testing.assert_array_equal(read_recording(tmp_path / "a.mat", with_(time_axis=0)), samples)
    np.testing.assert_array_equal(read_recording(tmp_path / "b.npy", CONFIG), samples)
    np.testing.assert_array_equal(read_recording(tmp_path / "c.mat", with_(array_key="iq")), samples[:1])
    with pytest.raises(ValueError, match="expected one complex array, or one of --array_key, got iq .*iq2"):
        read_recording(tmp_path / "c.mat", CONFIG)
    np.save(tmp_path / "real.npy", samples.real)
    with pytest.raises(ValueError, match="real.npy: expected complex baseband .* got float64"):
        read_recording(tmp_path / "real.npy", CONFIG)


@pytest.mark.parametrize("changes, match", [
    ({"sample_rate_hz": 0.0}, "--sample_rate_hz is not set"),
    ({"window_s": 0.064}, "--window_s 0.064 is 64 samples .* 4 to --num_frequencies 32"),
    ({"hop_s": 0.05}, "--hop_s 0.05 is 50 samples"),
    ({"duration_s": 0.016}, "--duration_s 0.016 is 1 columns"),
    ({"duration_s": 9.0}, "no recording of train/ is as long as an image of 9 s"),
    ({"noise_from_hz": 500.0}, "--noise_from_hz 500: expected less than half"),
    ({"val_recordings": "x"}, "--val_recordings x: expected to find it in some of 3 recordings such as a_s0.npy"),
    ({"val_recordings": "s"}, "got 3"),
    ({"val_recordings": "("}, r"--val_recordings \(: expected a regular expression"),
    ({"out_dir": ""}, "set --out_dir"),
])
def test_settings_that_do_not_fit_are_rejected_before_images_are_written(tmp_path, changes, match):
    data = write_recordings(tmp_path / "data")
    fields = {"data_dir": str(data), "out_dir": str(tmp_path / "out"), **changes}
    with pytest.raises(ValueError, match=match):
        make_spectrograms(with_(**fields))
    assert not list(tmp_path.glob("out/t*"))


def test_recordings_without_a_floor_or_with_nan_are_rejected():
    with pytest.raises(ValueError, match="no noise at 400 Hz and above"):
        spectrograms(np.zeros((1, 600), complex), with_(floor=""))
    with pytest.raises(ValueError, match="contains NaN or infinity"):
        spectrograms(tone(0) * np.nan, CONFIG)


def test_folder_of_other_data_is_not_written_into(tmp_path):
    data = write_recordings(tmp_path / "data")
    (tmp_path / "out").mkdir()
    (tmp_path / "out/notes.txt").touch()
    with pytest.raises(ValueError, match="contains other data .notes.txt"):
        make_spectrograms(with_(data_dir=str(data), out_dir=str(tmp_path / "out")))


# --- Axes ---


def test_doppler_and_levels_of_axes():
    axes = resolve_axes(SpectrogramConfig(), RECORDED, (32, 16))
    assert axes.doppler[[0, 15, 31]].tolist() == [468.75, 0, -500] and axes.seconds[2] == 0.032
    assert axes.to_db(np.array([0, 1])).tolist() == [-30, 10] and axes.to_dict() == RECORDED
    flags = SpectrogramConfig(doppler_hz=1000.0, frame_s=0.016, db_range=40.0, db_floor="-30")
    assert resolve_axes(flags, {}, (32, 16)) == axes == resolve_axes(flags, RECORDED, (32, 16))
    turned = resolve_axes(dataclasses.replace(flags, first_row="negative", zero_row=16), {}, (32, 16))
    assert turned.doppler[[0, 16, 31]].tolist() == [-500, 0, 468.75]


@pytest.mark.parametrize("flags, recorded, match", [
    ({"doppler_hz": 500.0}, RECORDED, "--doppler_hz 500.0 conflicts with D: expected 1000.0"),
    ({"zero_row": 16}, RECORDED, "--zero_row 16 conflicts"),
    ({"first_row": "negative"}, RECORDED, "--first_row negative"),
    ({"db_floor": "0"}, RECORDED, "--db_floor 0.0 conflicts with D: expected -30.0"),
    ({"doppler_hz": 1000.0, "frame_s": 0.1}, {}, "--db_range is not set, and D does not record it"),
    ({"frame_s": 0.1}, {}, "--doppler_hz is not set, and D does not record it: expected the range of the Doppler axis"),
    ({"zero_row": 32, "frame_s": 1.0, "doppler_hz": 1.0, "db_range": 1.0}, {}, "--zero_row 32: expected a row"),
])
def test_axes_that_conflict_or_are_unknown_raise(flags, recorded, match):
    with pytest.raises(ValueError, match=match):
        resolve_axes(SpectrogramConfig(**flags), recorded, (32, 16), "D")


def test_axes_of_another_size_or_scale_do_not_apply(simulated, tmp_path):
    folder = f"{simulated.out_dir}/train"
    assert find_axes(folder, (32, 32))[0]["row_hz"] == 31.25
    small = ImageFolder(DataConfig(folder, 16))
    assert "spectrogram" not in small.preprocessing and "32x32, which are read as 16x16" in small.notes[-1]
    scaled = ImageFolder(DataConfig(folder, 32, value_range="0,100", value_window=""))
    assert "spectrogram" not in scaled.preprocessing
    levels = ImageFolder(DataConfig(folder, 32, value_window="0,40"))
    assert levels.preprocessing["spectrogram"]["db_range"] == 40
    (tmp_path / "dataset.json").write_text(json.dumps({"labels": [["a.png", 0]]}))
    assert find_axes(str(tmp_path), (32, 32)) == ({}, "")
    (tmp_path / "spectrogram.json").write_text("{}")
    with pytest.raises(ValueError, match="does not describe the axes"):
        find_axes(str(tmp_path), (32, 32))


def test_recorded_axes_do_not_change_the_digest_of_a_cache():
    fields = {"autoencoder": {"sha256": "0"}, "preprocessing": {"image_size": 32}}
    assert _digest(fields) == _digest({**fields, "preprocessing": {"image_size": 32, "spectrogram": RECORDED}})
