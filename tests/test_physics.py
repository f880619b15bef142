"""Physical quantities of spectrograms with known answers, and their comparison by `evaluate`."""

import dataclasses
import json

import numpy as np
import pytest
import torch
from PIL import Image
from scipy import stats

from guided_diffusion_vae.data import DataConfig, open_colormap, write_npz
from guided_diffusion_vae.data.axes import SpectrogramAxes, SpectrogramConfig
from guided_diffusion_vae.evaluation import EvaluateConfig, evaluate, figures, physics
from guided_diffusion_vae.evaluation.physics import Physics, spectra
from guided_diffusion_vae.runs import loading
from guided_diffusion_vae.runs.run import Run

AXES = SpectrogramAxes(16, 10, row_hz=20.0, column_s=0.1, zero_row=7, db_range=40.0)
DATA = DataConfig(image_size="16x10")
FLAGS = SpectrogramConfig(doppler_hz=320.0, frame_s=0.1, db_range=40.0)


def tone(*rows, columns=slice(None), value=0.5, background=0.0):
    image = np.full((1, 16, 10), background)
    image[0, list(rows), columns] = value
    return image


def quantity(name, image, axes=AXES, **fields):
    return physics.QUANTITIES[name][0](spectra(image, axes, **fields))[0]


@pytest.mark.parametrize("row, hertz", [(0, 140), (7, 0), (12, -100), (15, -160)])
def test_tone_has_its_frequency_as_centroid_and_no_bandwidth(row, hertz):
    assert quantity("centroid_hz", tone(row)) == pytest.approx(hertz)
    assert quantity("bandwidth_hz", tone(row)) == pytest.approx(0, abs=1e-4)
    assert quantity("extent_hz", tone(row)) == pytest.approx(0.95 * 20)
    turned = dataclasses.replace(AXES, first_row="negative")
    assert quantity("centroid_hz", tone(row), turned) == pytest.approx(-hertz)


def test_two_equal_tones_are_symmetric_about_their_centroid():
    pair = tone(4, 10)
    assert quantity("centroid_hz", pair) == pytest.approx(0) and quantity("bandwidth_hz", pair) == pytest.approx(60)
    assert quantity("extent_hz", pair) == pytest.approx((7 - 2 * 0.05) * 20)
    assert quantity("centroid_hz", tone(3, 5)) == pytest.approx(60) and quantity("symmetry", pair) == 1


def test_energy_is_linear_power_above_the_floor():
    image = tone(3, value=0.5) + tone(5, value=0.25)        # 20 and 10 dB above the floor: powers 99 and 9
    assert quantity("centroid_hz", image) == pytest.approx((99 * 80 + 9 * 40) / 108)
    assert quantity("symmetry", image + tone(9, value=0.5)) == pytest.approx(2 * 9 / (99 + 9 + 99))
    frames = physics.frame_energy(spectra(image, dataclasses.replace(AXES, db_floor=-90.0)))
    np.testing.assert_allclose(frames, -90 + 10 * np.log10(1 + 108 / 16))


def test_symmetry_is_that_of_one_time():
    toward_then_away = tone(4, columns=slice(0, 5)) + tone(10, columns=slice(5, 10))
    assert quantity("centroid_hz", toward_then_away) == pytest.approx(0)
    assert quantity("symmetry", toward_then_away) == 0 and quantity("symmetry", tone(4)) == 0
    assert np.isnan(quantity("symmetry", tone(4), dataclasses.replace(AXES, zero_row=15)))


def test_burst_has_its_mean_time_and_duration():
    burst = tone(4, columns=slice(2, 6))
    assert quantity("delay_s", burst) == pytest.approx(0.35)
    assert quantity("duration_s", burst) == pytest.approx(0.95 * 0.4)


def test_highest_doppler_is_where_10_db_end_on_either_side():
    assert quantity("highest_doppler_hz", tone(10, value=0.5)) == pytest.approx((3 + 0.5) * 20)
    assert quantity("highest_doppler_hz", tone(7, value=0.2)) == 0


def test_clutter_is_left_out():
    image = tone(7, value=1.0) + tone(8, value=0.9) + tone(3)
    assert quantity("centroid_hz", image) == pytest.approx(0, abs=10)
    assert quantity("centroid_hz", image, clutter_hz=20.0) == pytest.approx(80)


def test_black_images_have_finite_quantities():
    values = Physics(AXES).measure(torch.zeros(2, 1, 16, 10))
    assert values.shape == (2, 7 + 10) and np.isfinite(values).all() and (values[:, 7:] == 0).all()


def test_distance_is_the_area_between_distributions():
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=50), rng.normal(1, 2, 80)
    assert physics.wasserstein_distance(a, b) == pytest.approx(stats.wasserstein_distance(a, b))
    assert physics.wasserstein_distance(a, a + 3) == pytest.approx(3) and physics.wasserstein_distance(a, a) == 0


def test_colors_are_measured_as_the_scalars_that_they_stand_for():
    values = np.linspace(0, 1, 160).reshape(1, 1, 16, 10)
    table = open_colormap("jet/matplotlib")
    colors = torch.from_numpy(np.moveaxis(table.to_colors(values[:, 0]), -1, 1) / 255)
    np.testing.assert_allclose(Physics(AXES, colormap=table).measure(colors), Physics(AXES).measure(values), rtol=0.02,
                               atol=0.5)


# --- Evaluation ---


def images(hertz, count, seed):
    """Return images uint8 [N x 16 x 10] of tones around a frequency."""
    rows = np.random.default_rng(seed).integers(-1, 2, count) + 7 - round(hertz / 20)
    return np.concatenate([tone(row, value=200 / 255) * 255 for row in rows]).astype(np.uint8)


def write_folder(path, count, seed=0, away=100, mode="L"):
    path.mkdir()
    for name, hertz in (("away", away), ("toward", -100)):
        for i, image in enumerate(images(hertz, count, seed)):
            Image.fromarray(image).convert(mode).save(path / f"{name}_{i:02d}.png")
    return str(path)


@pytest.fixture
def run(tmp_path):
    """Evaluate samples, whose class "away" has another Doppler frequency than the reference."""
    write_folder(tmp_path / "val", 9)
    pixels = np.concatenate([images(60, 12, 1), images(-100, 12, 1)])[..., None]
    write_npz(tmp_path / "samples.npz", pixels.shape, [pixels], np.repeat([0, 1], 12), ["away", "toward"])

    def run(flags=FLAGS, data=DATA, **fields):
        config = EvaluateConfig(**{"samples": str(tmp_path / "samples.npz"), "reference": str(tmp_path / "val"),
                                   "physics": True, "batch_size": 5, **fields})
        job = Run("evaluate", [config, data, flags], {})
        sets = loading.open_sets(job)
        return evaluate(config, sets, None, tmp_path / "run", physics=loading.open_physics(job, sets))
    return run


def test_distances_per_class_are_in_physical_units_beside_those_of_training(run, tmp_path):
    report = run(train_dir=write_folder(tmp_path / "train", 20, seed=2))
    assert set(report) == {"num_reference", "num_samples", "physics"} and report["num_samples"] == 24
    found = report["physics"]
    compared = found["samples_to_reference"]
    assert compared["classes"] == ["away", "toward"] and found["zero_row"] == 7 and found["doppler_hz"] == 320
    centroid = compared["centroid_hz"]
    drawn = lambda count, seed: -20 * np.random.default_rng(seed).integers(-1, 2, count)
    expected = [stats.wasserstein_distance(hertz + drawn(9, 0), other + drawn(12, 1))
                for hertz, other in ((100, 60), (-100, -100))]
    assert centroid["per_class"] == pytest.approx(expected) and expected[0] > 40 > 20 > expected[1]
    assert centroid["wasserstein"] == pytest.approx(np.mean(centroid["per_class"]))
    assert centroid["per_class_normalized"] == pytest.approx(np.array(expected) / drawn(9, 0).std())
    assert max(found["training_to_reference"]["centroid_hz"]["per_class"]) < 20
    assert compared["duration_s"]["normalized"] is None     # all have the same
    assert {"frame_energy_db", "envelope_db", *physics.QUANTITIES} < set(compared)
    Run("evaluate", [], {}, tmp_path / "run").write_report(report)
    assert json.loads((tmp_path / "run/metrics.json").read_text())["physics"] == found
    with Image.open(tmp_path / "run/physics.png") as plot:
        assert plot.width > 1000


def test_axes_are_those_that_the_reference_states(run, tmp_path, monkeypatch):
    monkeypatch.setattr(figures, "curve_grid", lambda curves: Image.new("RGB", (8, 8)))     # slow to render
    stated = {**AXES.to_dict(), "row_hz": 40.0}
    (tmp_path / "spectrogram.json").write_text(json.dumps({"image": stated}))
    assert run(SpectrogramConfig())["physics"]["doppler_hz"] == 640
    with pytest.raises(ValueError, match="--doppler_hz 320.0 conflicts with .*val: expected 640.0"):
        run()
    (tmp_path / "other").mkdir()
    train = write_folder(tmp_path / "other/train", 9)
    (tmp_path / "other/spectrogram.json").write_text(json.dumps({"image": AXES.to_dict()}))
    with pytest.raises(ValueError, match="other/train and .*val have different axes"):
        run(SpectrogramConfig(), train_dir=train)


def test_sets_without_physical_quantities_are_rejected(run, tmp_path):
    with pytest.raises(ValueError, match="--frame_s is not set, and .*val does not record it"):
        run(dataclasses.replace(FLAGS, frame_s=0.0))
    with pytest.raises(ValueError, match="--clutter_hz 20 has no effect without --physics True"):
        run(physics=False, clutter_hz=20.0)
    with pytest.raises(ValueError, match="--clutter_hz 5000 leaves no row of .*: expected less than .* Doppler freq"):
        run(clutter_hz=5000.0)
    np.savez(tmp_path / "statistics.npz", mu=np.zeros(2), sigma=np.eye(2))
    with pytest.raises(ValueError, match="statistics.npz contains statistics: --physics True requires images"):
        run(reference=str(tmp_path / "statistics.npz"))
    pixels = np.zeros((4, 16, 10, 3), np.uint8)
    write_npz(tmp_path / "color.npz", pixels.shape, [pixels])
    with pytest.raises(ValueError, match="color.npz contains RGB images whose colormap is unknown"):
        run(samples=str(tmp_path / "color.npz"), reference=str(tmp_path / "color.npz"))
    pixels = np.zeros((4, 8, 16, 10, 1), np.uint8)
    write_npz(tmp_path / "volumes.npz", pixels.shape, [pixels])
    with pytest.raises(ValueError, match="volumes.npz contains volumes"):
        run(samples=str(tmp_path / "volumes.npz"), reference=str(tmp_path / "volumes.npz"))


def test_sets_without_a_common_class_raise_and_without_classes_are_compared_as_one():
    with pytest.raises(ValueError, match="the sets reference, samples have no class in common"):
        physics.class_rows({"reference": ["a"], "samples": ["b"]}, ("reference", "samples"))
    assert list(physics.class_rows({"reference": ["a"], "samples": None}, ("reference", "samples"))) == ["all"]
