import dataclasses
import json
import runpy
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from guided_diffusion_vae import dist_util
from guided_diffusion_vae.data import DataConfig, ImageFolder, microdoppler
from guided_diffusion_vae.data.microdoppler import MicrodopplerConfig
from forks import FORKS

CONFIG = MicrodopplerConfig()
CW = MicrodopplerConfig(waveform="cw")
TINY = MicrodopplerConfig(classes="tapin,still", num_train=2, num_val=1, image_size="32", window_ms=32.0,
                          duration_s=1.024)


def with_(config=CONFIG, **changes):
    return dataclasses.replace(config, **changes)


def seconds(config):
    return np.arange(microdoppler.sampling(config)[2]) / config.prf_hz


def span(config):
    return microdoppler.sampling(config)[2] / config.prf_hz


def away(motion, config=CONFIG, seed=0):
    return microdoppler.MOTIONS[motion][0](seconds(config), span(config), np.random.default_rng(seed), config)


def images(motion, count, config=CONFIG):
    return np.stack([microdoppler.simulate(motion, "train", i, config) for i in range(count)]) / 255


def contents(folder):
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


# ---- physics ----


@pytest.mark.parametrize("waveform", ["cw", "fmcw"])
@pytest.mark.parametrize("image_size", ["64", "128", "81x40"])
@pytest.mark.parametrize("speed", [-0.9, -0.1, 0.0, 0.35, 1.1])
def test_constant_speed_is_in_the_row_of_its_doppler_frequency(waveform, image_size, speed):
    config = with_(waveform=waveform, image_size=image_size, fast_samples=128, gate_max_m=4.7)
    rows = int(image_size.split("x")[0])
    ranges = (2.2 + speed * seconds(config))[None]                          # away from the sensor if speed > 0
    image = microdoppler.spectrogram_db(microdoppler.receive(ranges, np.ones(1), config), config)
    expected = (rows - 1) // 2 - 2 * speed / microdoppler.wavelength_m(config) * rows / config.prf_hz
    assert image.shape == (rows, int(image_size.split("x")[-1]))
    assert np.abs(image.argmax(axis=0) - expected).max() <= 0.6


@pytest.mark.parametrize("waveform", ["cw", "fmcw"])
def test_noise_has_zero_db_and_a_tone_its_level(waveform):
    config = with_(waveform=waveform)
    window, _, samples = microdoppler.sampling(config)
    bins = 1 if waveform == "cw" else len(microdoppler.range_gate(config))
    noise = microdoppler.receive(np.zeros((1, samples)), np.zeros(1), config, np.random.default_rng(0))
    assert noise.shape == (bins, samples)
    assert np.mean(10 ** (microdoppler.spectrogram_db(noise, config) / 10)) == pytest.approx(1, rel=0.05)
    amplitude = np.sqrt(10 ** (25 / 10) * bins * 1.5 / window)
    tone = microdoppler.receive(np.full((1, samples), 0.35), np.array([amplitude]), config)
    assert microdoppler.spectrogram_db(tone, config)[31] == pytest.approx(25, abs=0.1)


def test_fmcw_echo_is_in_the_bin_of_its_range_and_gated_elsewhere():
    config = with_(gate_min_m=0.0, gate_max_m=1.2)
    bin_m = microdoppler.SPEED_OF_LIGHT / (2e9 * config.bandwidth_ghz)
    profile = np.abs(microdoppler.receive(np.full((1, 3), 10 * bin_m), np.ones(1), config))
    assert profile.shape == (32, 3) and (profile.argmax(axis=0) == 10).all()
    gated = with_(gate_min_m=0.1, gate_max_m=0.2)
    assert np.abs(microdoppler.receive(np.full((1, 3), 0.8), np.ones(1), gated)).max() < 0.02


@pytest.mark.parametrize("motion", microdoppler.MOTIONS)
def test_no_motion_exceeds_the_maximum_speed(motion):
    fastest = max(np.abs(np.diff(away(motion, seed=seed))).max() * CONFIG.prf_hz for seed in range(50))
    assert fastest <= CONFIG.speed_max_mps * (1 + 1e-6)
    assert motion == "still" or fastest > CONFIG.speed_min_mps


def hand(motion, seed, **changes):
    """Return (config, ranges of the hand, its amplitudes, range and amplitude of the clutter)."""
    config = with_(CW, **changes)
    ranges, amplitudes = microdoppler.draw_hand(motion, config, np.random.default_rng(seed))
    assert (ranges[-1] == ranges[-1, 0]).all()
    return config, ranges[:-1], amplitudes[:-1], ranges[-1, 0], amplitudes[-1]


def test_power_of_the_hand_follows_the_radar_equation():
    decibels, counts = [], set()
    for seed in range(60):
        config, ranges, amplitudes, clutter_range, clutter = hand("still", seed, hand_size_m=1e-9, drift_mm=0.0)
        rest, bin_noise = ranges[0, 0], 1.5 / microdoppler.sampling(config)[0]
        np.testing.assert_allclose(ranges, rest, atol=1e-8)
        expected = 10 ** (config.snr_db / 10) * bin_noise * (np.sqrt(0.25 * 0.45) / rest) ** 4
        assert np.sum(amplitudes**2) == pytest.approx(expected) and amplitudes.std() > 0.2 * amplitudes.mean()
        assert 0.25 <= rest <= 0.45 and 0.25 <= clutter_range <= 0.45
        decibels.append(10 * np.log10(clutter**2 / bin_noise) - config.clutter_db)
        counts.add(len(amplitudes))
    assert -3 <= min(decibels) < -2 and 2 < max(decibels) <= 3
    assert min(counts) >= 8 and max(counts) <= 24 and len(counts) > 10


def test_hand_at_rest_drifts_slowly_and_has_the_depth_of_half_its_width():
    amplitude, depth = [], []
    for seed in range(30):
        config, ranges, *_ = hand("still", seed, duration_s=4.032)
        moved = ranges - ranges.mean(1, keepdims=True)
        np.testing.assert_allclose(moved, moved[:1].repeat(len(moved), 0), atol=1e-12)
        amplitude.append(np.ptp(moved) / 2)
        depth.append(np.ptp(ranges[:, 0]) / 2)
    assert 3.5e-3 < max(amplitude) <= 4e-3 + 1e-12 and 0.09 / 4 * 0.9 < max(depth) <= 0.09 / 4


def test_scatterers_follow_the_motion_along_their_line_of_sight():
    aspects = []
    for seed in range(20):
        config, ranges, *_ = hand("circle", seed, drift_mm=0.0, range_min_m=0.35, range_max_m=0.35)
        path = away("circle", config, seed)     # the motion is sampled first
        fit, residuals, *_ = np.linalg.lstsq(np.stack([path.real, path.imag, np.ones(len(path))], 1), ranges.T, None)
        assert residuals.max() < 1e-20
        along, across, _ = fit
        lever, angle = np.hypot(along, across), np.arctan2(across, along)
        assert 0.35 <= lever.min() and lever.max() <= 1 and np.ptp(lever) > 0.2
        across_hand = 0.045 * (2 * ((lever - 0.35) / 0.65) ** 2 - 1)    # from the wrist to the fingertips in m
        aspect = np.rad2deg(angle - np.arctan(across_hand / 0.35))
        assert np.ptp(aspect) < 1e-6
        aspects.append(aspect[0])
    assert 30 < np.abs(aspects).max() <= 40


def test_gray_is_rounded_between_noise_and_the_dynamic_range():
    config = with_(TINY, dynamic_range_db=25.0)
    key = [0, 1, int.from_bytes(b"tapin", "big"), 2]
    rng = np.random.Generator(np.random.PCG64(key))
    echoes = microdoppler.receive(*microdoppler.draw_hand("tapin", config, rng), config, rng)
    decibels = microdoppler.spectrogram_db(echoes, config)
    image = microdoppler.simulate("tapin", "val", 2, config)
    assert np.abs(image - np.clip(decibels / 25, 0, 1) * 255).max() <= 0.5 and image.max() == 255


@pytest.mark.parametrize("motion, first, then", [("push", -1, 0), ("pull", 1, 0), ("tapin", -1, 1), ("tapout", 1, -1)])
def test_stroke_signature_is_on_its_side_of_zero_doppler(motion, first, then):
    speed = np.diff(away(motion))
    moving = np.sign(speed[np.abs(speed) > np.abs(speed).max() / 10])
    assert moving[0] == first and moving[-1] == (then or first)
    mean = images(motion, 12).mean(axis=0)
    above, below = mean[8:28].sum(), mean[35:55].sum()
    low, high = {"pull": (1.3, 99), "push": (0.01, 0.75)}.get(motion, (0.8, 1.25))
    assert low < above / below < high


def test_taps_come_back_and_push_does_not():
    for motion in ("tapin", "tapout"):
        assert away(motion)[-1] == pytest.approx(away(motion)[0], abs=1e-9)
    assert away("push")[-1] < -0.02


# ---- the pair of flips in time ----


@pytest.mark.parametrize("seed", range(3))
def test_tapout_has_the_velocity_of_tapin_in_reversed_time(seed):
    there, back = np.diff(away("tapin", seed=seed)), np.diff(away("tapout", seed=seed))
    # v'(t) = v(T - t): interval k of one is interval N - 1 - k of the other; the first one reaches to T itself.
    np.testing.assert_allclose(back[1:], there[:0:-1], atol=1e-12)


@pytest.mark.parametrize("config", [CW, with_(fast_samples=64, gate_max_m=1.2)], ids=["cw", "fmcw"])
def test_equal_scatterers_give_tapout_as_tapin_flipped_in_time(config):
    rest, depth = 0.4, np.array([[-0.011], [0.004], [0.02]])
    if config.waveform == "fmcw":                       # the middle of the range bins: turned round, bins stay bins
        rest = 11 * microdoppler.SPEED_OF_LIGHT / (2e9 * config.bandwidth_ghz)
        config = with_(config, gate_min_m=0.0, gate_max_m=2 * rest + 1e-9)
    lever, amplitudes = np.array([[1.0], [0.8], [0.5]]), np.array([1.0, 0.7, 1.3])
    tapin = rest + depth + lever * away("tapin", config)
    tapout = rest - depth + lever * away("tapout", config)      # the hand turned round: front scatterers go to the back
    echoes = [microdoppler.receive(ranges, amplitudes, config) for ranges in (tapin, tapout)]
    toward, outward = (10 ** (microdoppler.spectrogram_db(e, config) / 10) for e in echoes)
    np.testing.assert_allclose(outward, toward[:, ::-1], atol=1e-3 * toward.max())
    assert np.abs(outward - toward).max() > 0.5 * toward.max()


def test_tapin_and_tapout_are_flips_in_time_on_average():
    toward, outward = (images(motion, 150, CW) for motion in ("tapin", "tapout"))

    def lag(stack):
        """Return the mean time of the upper half's energy minus the lower half's, in columns, one per image."""
        columns = np.arange(stack.shape[2])
        energy = np.clip(stack - 0.3, 0, None)
        upper, lower = energy[:, 5:29].sum(axis=1) + 1e-9, energy[:, 34:58].sum(axis=1) + 1e-9
        return (upper @ columns) / upper.sum(axis=1) - (lower @ columns) / lower.sum(axis=1)

    assert np.mean(lag(toward) > 0) > 0.95 and np.mean(lag(outward) < 0) > 0.95
    assert np.median(lag(toward)) == pytest.approx(np.median(lag(outward[:, :, ::-1])), abs=1)
    rows = [stack.mean(axis=(0, 2)) for stack in (toward, outward)]
    assert np.abs(rows[0] - rows[1]).max() < 0.03


# ---- a seed fixes every byte ----


def test_parameters_and_seed_determine_every_byte(tmp_path):
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        config = with_(TINY, out_dir=str(tmp_path / name), seed=seed)
        assert microdoppler.write_dataset(config) == {"train": 4, "val": 2}
    a, b, c = (contents(tmp_path / name) for name in "abc")
    assert a == b and set(a) == set(c)
    assert sorted(map(str, a)) == ["dataset.json", "train/metadata.csv", "train/still_00000.png",
                                   "train/still_00001.png", "train/tapin_00000.png", "train/tapin_00001.png",
                                   "val/metadata.csv", "val/still_00000.png", "val/tapin_00000.png"]
    assert len({*a.values(), *c.values()}) == 18
    with Image.open(tmp_path / "a" / "train" / "tapin_00000.png") as image:
        assert image.mode == "L" and image.size == (32, 32)
        assert (np.asarray(image) == microdoppler.simulate("tapin", "train", 0, TINY)).all()


def test_image_does_not_depend_on_other_classes_or_counts():
    expected = microdoppler.simulate("wave", "val", 3, TINY)
    other = with_(TINY, classes="wave,circle", num_train=9, num_val=7)
    assert (microdoppler.simulate("wave", "val", 3, other) == expected).all()
    assert (microdoppler.simulate("wave", "train", 3, other) != expected).any()


# ---- the folder ----


def test_complete_folder_is_unchanged(tmp_path):
    config = with_(TINY, out_dir=str(tmp_path / "set"))
    assert microdoppler.write_dataset(config) == {"train": 4, "val": 2}
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "set").rglob("*.*")}
    assert microdoppler.write_dataset(config) == {}
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "set").rglob("*.*")} == before


def test_interrupted_folder_is_completed_without_partial_splits(tmp_path, monkeypatch):
    config = with_(TINY, out_dir=str(tmp_path / "set"))
    simulate = microdoppler.simulate

    def interrupted(motion, split, index, config):
        if split == "val":
            raise KeyboardInterrupt
        return simulate(motion, split, index, config)

    monkeypatch.setattr(microdoppler, "simulate", interrupted)
    with pytest.raises(KeyboardInterrupt):
        microdoppler.write_dataset(config)
    assert sorted(path.name for path in (tmp_path / "set").iterdir()) == ["dataset.json", "train"]
    monkeypatch.undo()
    assert microdoppler.write_dataset(config) == {"val": 2}
    microdoppler.write_dataset(with_(config, out_dir=str(tmp_path / "whole")))
    assert contents(tmp_path / "set") == contents(tmp_path / "whole")


def test_folder_with_other_data_is_rejected(tmp_path):
    (tmp_path / "holiday.jpg").write_text("")
    with pytest.raises(ValueError, match=r"contains other data \(holiday.jpg\).*--out_dir"):
        microdoppler.write_dataset(with_(TINY, out_dir=str(tmp_path)))
    assert [path.name for path in tmp_path.iterdir()] == ["holiday.jpg"]


def test_folder_with_another_dataset_is_rejected_with_the_difference(tmp_path):
    microdoppler.write_dataset(with_(TINY, out_dir=str(tmp_path), num_train=1))
    with pytest.raises(ValueError, match=r"num_train is 1 there, 2 here.*--out_dir"):
        microdoppler.write_dataset(with_(TINY, out_dir=str(tmp_path)))


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"simulation": 1, "parameters": 3}'])
def test_invalid_metadata_is_rejected(tmp_path, text):
    (tmp_path / "dataset.json").write_text(text)
    with pytest.raises(ValueError, match="dataset.json( does not describe a simulated dataset|: invalid JSON)"):
        microdoppler.write_dataset(with_(TINY, out_dir=str(tmp_path)))


def test_split_with_a_missing_image_is_rejected(tmp_path):
    config = with_(TINY, out_dir=str(tmp_path))
    microdoppler.write_dataset(config)
    (tmp_path / "train" / "tapin_00001.png").unlink()
    with pytest.raises(ValueError, match="train contains 3 of its 4 images and 0 other files; delete"):
        microdoppler.write_dataset(config)


def test_metadata_contains_all_parameters_and_the_axes(tmp_path):
    microdoppler.write_dataset(with_(TINY, out_dir=str(tmp_path), num_val=0))
    record = json.loads((tmp_path / "dataset.json").read_text())
    assert set(record["parameters"]) == {f.name for f in dataclasses.fields(TINY)} - {"out_dir", "baseband"}
    assert record["image"]["row_hz"] == 1000 / 32 and record["image"]["column_s"] == 0.032
    assert not (tmp_path / "val").exists()


def test_label_file_has_classes_and_physical_parameters(tmp_path):
    config = with_(TINY, out_dir=str(tmp_path), num_train=3, num_val=0)
    microdoppler.write_dataset(config)
    images = ImageFolder(DataConfig(str(tmp_path / "train"), image_size=32))
    assert images.class_names == ["still", "tapin"] and images.labels.tolist() == [0, 0, 0, 1, 1, 1]
    assert list(images.attributes) == ["speed_mps", "range_m", "aspect_deg"]
    for row, name in enumerate(images.names):
        parameters = microdoppler.physical_parameters(name.partition("_")[0], "train", row % 3, config)
        for key, values in images.attributes.items():
            assert values[row] == pytest.approx(parameters[key], rel=1e-5)
    speeds, ranges = images.attributes["speed_mps"], images.attributes["range_m"]
    assert speeds[:3].max() < 0.02 and 0.2 < speeds[3:].min() < speeds[3:].max() < config.speed_max_mps + 0.02
    assert config.range_min_m <= ranges.min() < ranges.max() <= config.range_max_m
    (tmp_path / "train" / "metadata.csv").unlink()      # as in version 0.3
    assert microdoppler.write_dataset(config) == {} and not (tmp_path / "train" / "metadata.csv").exists()


def run_script(monkeypatch, *flags):
    script = Path(__file__).parents[1] / "scripts" / "make_microdoppler.py"
    monkeypatch.setattr("sys.argv", [str(script), *flags])
    monkeypatch.setattr(dist_util, "_active_rank_info", None)
    runpy.run_path(str(script), run_name="__main__")


def test_script_writes_once_and_prints_one_line_on_errors(tmp_path, monkeypatch, capfd):
    flags = ["--out_dir", str(tmp_path / "set"), "--classes", "tapout", "--num_train", "2", "--num_val", "1"]
    run_script(monkeypatch, *flags)
    assert capfd.readouterr().out.endswith("3 images written\n")
    run_script(monkeypatch, *flags)
    assert capfd.readouterr().out.endswith("already exists\n")
    with pytest.raises(SystemExit) as stop:
        run_script(monkeypatch, *flags, "--carrier_ghz", "122")
    assert stop.value.code == 1
    assert capfd.readouterr().err.startswith("error: motions of up to")


def test_one_of_several_ranks_writes_the_folder(tmp_path):
    script = Path(__file__).parents[1] / "scripts" / "make_microdoppler.py"
    flags = ["--out_dir", tmp_path / "set", "--classes", "tapin,still", "--num_train", "2", "--num_val", "0"]
    done = FORKS.run([script, *flags], ranks=2)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("4 images written") == 1 and "already exists" not in done.stdout
    assert len(contents(tmp_path / "set")) == 6


# ---- parameters that do not go together ----


@pytest.mark.parametrize("changes, message", [
    (dict(speed_max_mps=1.3), r"would alias; set --prf_hz above 10\d\d or --speed_max_mps below 1.2"),
    (dict(carrier_ghz=77.0), "would alias"),
    (dict(classes="tapin,salsa"), "--classes must be comma-separated distinct names of: circle, .* got 'tapin,salsa'"),
    (dict(classes="tapin,tapin"), "--classes must be .* distinct names of: .* got 'tapin,tapin'"),
    (dict(classes=""), "--classes must be .* got ''"),
    (dict(classes="tapin,,still"), "--classes must be .* got 'tapin,,still'"),
    (dict(image_size="big"), "--image_size must be a size such as 64, .* got .big"),
    (dict(image_size="32"), "--window_ms 64.0 is 64 pulses.*32 Doppler rows"),
    (dict(duration_s=0.02), "--duration_s 0.02 over 64 columns is a hop of 0 pulses"),
    (dict(duration_s=9.0), "is a hop of 141 pulses: expected 1 to 64"),
    (dict(duration_s=0.5), "a doubletapin takes up to .* use a larger --duration_s"),
    (dict(range_min_m=0.1), "--range_min_m is 0.1; use a larger one"),
    (dict(range_max_m=2.0), r"unambiguous up to 1.20 m; use more --fast_samples"),
    (dict(gate_min_m=0.101, gate_max_m=0.102), "no range bin is between --gate_min_m 0.101"),
    (dict(range_min_m=0.5), "--range_min_m must be <= --range_max_m, got 0.5 and 0.45"),
    (dict(scatterers_min=0), "--scatterers_min must be >= 1, got 0"),
    (dict(prf_hz=0.0), "--prf_hz must be > 0, got 0.0"),
    (dict(snr_db=float("nan")), "--snr_db must be finite, got nan"),
    (dict(speed_max_mps=float("nan")), "--speed_max_mps must be finite, got nan"),
    (dict(aspect_max_deg=90.0), "--aspect_max_deg must be <= 80, got 90.0"),
    (dict(num_train=0), "--num_train must be >= 1, got 0"),
    (dict(seed=-1), "--seed must be >= 0, got -1"),
    (dict(waveform="pulse"), "--waveform must be one of cw, fmcw, got 'pulse'"),
])
def test_conflicting_parameters_are_rejected_before_writing(tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        microdoppler.write_dataset(with_(out_dir=str(tmp_path / "set"), **changes))
    assert not (tmp_path / "set").exists()


def test_missing_folder_or_file_instead_error_names_the_flag(tmp_path):
    with pytest.raises(ValueError, match="set --out_dir"):
        microdoppler.write_dataset(TINY)
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="--out_dir"):
        microdoppler.write_dataset(with_(TINY, out_dir=str(tmp_path / "file")))


def test_scene_is_finite_for_every_motion_and_waveform():
    for motion in microdoppler.MOTIONS:
        for waveform in ("cw", "fmcw"):
            config = with_(waveform=waveform)
            ranges, amplitudes = microdoppler.draw_hand(motion, config, np.random.default_rng(1))
            assert config.scatterers_min < len(ranges) == len(amplitudes) <= config.scatterers_max + 1
            assert 0 < ranges.min() and ranges.max() < 1.2 and np.isfinite(amplitudes).all()
            assert microdoppler.simulate(motion, "train", 0, config).std() > 10
