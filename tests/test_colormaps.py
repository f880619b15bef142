import shutil
from pathlib import Path

import matplotlib
import numpy as np
import pytest
import torch
from PIL import Image

from guided_diffusion_vae.data import ImageFolder, colormaps, npz, open_npz, write_npz
from guided_diffusion_vae.data.colormaps import (
    COLORMAPS, Colormap, _tables, count_colors, fit_colormap, open_colormap, recognize_colormap, same_colormap,
)
from guided_diffusion_vae.evaluation import EvaluateConfig, RoundtripConfig, SamplePreview, roundtrip
from guided_diffusion_vae.runs import loading, spaces
from guided_diffusion_vae.runs.run import Run
from guided_diffusion_vae.sampling import Sampler, SamplingConfig, generate_samples, to_pil
from guided_diffusion_vae.vae_wrapper import LatentNormalizer, PixelCodec

GESTURES = Path(__file__).parents[2] / "shared" / "data" / "spectrograms" / "radar_gesture_64"
TABLES = [table for name in COLORMAPS for table in _tables(name)]
by_name = pytest.mark.parametrize("table", TABLES, ids=lambda table: table.name)


# --- Tables ---


@by_name
def test_every_table_inverts_without_error(table):
    count = len(table.table)
    scalars, distances = table.to_scalars(table.table)
    assert (distances == 0).all() and np.array_equal(table.to_colors(scalars), table.table)
    distinct = np.unique(table.table, axis=0, return_counts=True)[1] == 1
    if distinct.all():
        assert np.array_equal(scalars, (np.arange(count) / (count - 1)).astype(np.float32))
    else:   # of equal colors the first one
        first = [np.flatnonzero((table.table == color).all(1))[0] for color in table.table]
        assert np.array_equal(scalars, (np.array(first) / (count - 1)).astype(np.float32))


@by_name
def test_every_table_is_recognized(table):
    if table.name.startswith("gray_r"):
        return
    found = recognize_colormap(*count_colors([table.table]))
    assert np.array_equal(found.table, table.table) and same_colormap("auto", found.name)
    assert fit_colormap(*count_colors([table.table]), table.name.partition("/")[0]).name == table.name


@pytest.mark.parametrize("name", ["jet", "viridis", "turbo", "hot", "plasma", "inferno", "magma", "cividis"])
def test_tables_of_matplotlib_are_the_bytes_that_it_writes(name):
    written = matplotlib.colormaps[name](np.arange(256), bytes=True)[:, :3]
    assert np.array_equal(open_colormap(f"{name}/matplotlib-floor").table, written)
    rounded = np.rint(matplotlib.colormaps[name](np.arange(256))[:, :3] * 255)
    assert np.array_equal(open_colormap(name).table, rounded) and open_colormap(name).name == f"{name}/matplotlib"


def matlab_jet(count):
    """Return jet(count) as MATLAB constructs it: one trapezoid, shifted per channel."""
    n = -(-count // 4)
    ramp = np.concatenate([np.arange(1, n + 1) / n, np.ones(n - 1), np.arange(n, 0, -1) / n])
    colors = np.zeros((count, 3))
    for channel, shift in enumerate((n, 0, -n)):
        rows = -(-n // 2) + np.arange(len(ramp)) + shift
        inside = (rows >= 0) & (rows < count)
        colors[rows[inside], channel] = ramp[inside]
    return colors


def matlab_hot(count):
    n = 3 * count // 8
    rise, rest = np.arange(1, n + 1) / n, count - 2 * n
    red = np.concatenate([rise, np.ones(count - n)])
    green = np.concatenate([np.zeros(n), rise, np.ones(rest)])
    blue = np.concatenate([np.zeros(2 * n), np.arange(1, rest + 1) / rest])
    return np.stack([red, green, blue], 1)


@pytest.mark.parametrize("count", [64, 256])
@pytest.mark.parametrize("name, colors", [("jet", matlab_jet), ("hot", matlab_hot)])
def test_jet_and_hot_of_matlab_have_their_colors(name, colors, count):
    assert np.array_equal(open_colormap(f"{name}/matlab{count}").table, np.rint(colors(count) * 255))


def test_parula_has_the_published_colors():
    old, new = open_colormap("parula/r2014b-64").table, open_colormap("parula/r2017b-256").table
    for table, entry, color in ((old, 0, (0.2081, 0.1663, 0.5292)), (old, 32, (0.2178, 0.7250, 0.6193)),
                                (old, 63, (0.9763, 0.9831, 0.0538)), (new, 0, (0.2422, 0.1504, 0.6603)),
                                (new, 130, (0.1023, 0.7510, 0.7088)), (new, 255, (0.9769, 0.9839, 0.0805))):
        assert table[entry].tolist() == np.rint(np.array(color) * 255).tolist()
    between = open_colormap("parula/r2014b-256").table
    assert between[0].tolist() == old[0].tolist() and between[-1].tolist() == old[-1].tolist()
    assert np.array_equal(open_colormap("parula/r2017b-64").table[[0, 21, 63]], new[[0, 85, 255]])


def test_inverse_gray_is_the_complement():
    assert np.array_equal(open_colormap("gray_r").table[:, 1], 255 - np.arange(256))


def test_colors_beside_the_table_become_the_nearest_with_their_distance():
    table = Colormap("a/b", np.array([[0, 0, 0], [100, 0, 0], [100, 100, 0]], np.uint8))
    scalars, distances = table.to_scalars(np.array([[[3, 4, 0], [100, 0, 0]], [[100, 60, 0], [255, 0, 0]]], np.uint8))
    assert scalars.tolist() == [[0, 0.5], [1, 0.5]] and distances.tolist() == [[5, 0], [40, 155]]
    assert table.project(np.array([[90, 20, 20]], np.uint8)).tolist() == [[100, 0, 0]]
    assert table.to_colors(np.array([-1, 0.2, 0.3, 2])).tolist() == [[0, 0, 0], [0, 0, 0], [100, 0, 0], [100, 100, 0]]


@pytest.mark.parametrize("colors", [
    np.random.default_rng(0).integers(0, 256, (500, 3)),                    # photographs
    np.arange(256)[:, None].repeat(3, 1),                                   # grayscale
    open_colormap("jet").table[:15],                                        # too few for one map
    np.concatenate([open_colormap("jet").table, [[5, 3, 127]]]),            # one color beside it
    np.random.default_rng(0).integers(0, 2, (2000, 3)) + np.arange(2000)[:, None] % 250,
])
def test_other_colors_are_not_recognized(colors):
    assert recognize_colormap(*count_colors([colors.astype(np.uint8)])) is None


def test_rounding_errors_of_one_are_recognized():
    shifted = (open_colormap("viridis").table + np.array([1, 0, 1])).astype(np.uint8)
    assert recognize_colormap(*count_colors([shifted])).name.startswith("viridis/")


def test_the_most_frequent_colors_choose_the_table():
    jet, hot = open_colormap("jet/matlab64").table, open_colormap("hot").table
    colors, counts = count_colors([jet, jet, jet, jet, jet, hot])
    assert counts.sum() == 5 * 64 + 256 and fit_colormap(colors, counts).name.startswith("jet/")


def test_rare_colors_do_not_choose_the_table(monkeypatch):
    monkeypatch.setattr(colormaps, "MAX_FITTED", 64)
    jet, hot = open_colormap("jet/matlab64").table, open_colormap("hot").table
    assert fit_colormap(*count_colors([jet, jet, *[hot[8:]]])).name == "jet/matlab64"


@pytest.mark.parametrize("name", ["jets", "jet/matlab65"])
def test_unknown_names_are_rejected_with_the_known_ones(name):
    with pytest.raises(ValueError, match=f"--colormap {name}: expected auto or one of: jet, parula, "):
        open_colormap(name)


def test_a_colormap_stands_for_each_of_its_tables():
    for requested, same in (("jet", True), ("auto", True), ("jet/matlab64", True), ("jet/matlab256", False),
                            ("hot", False), ("", False)):
        assert same_colormap(requested, "jet/matlab64") is same
    assert not same_colormap("auto", "") and not same_colormap("", "")


# --- Folders ---


SCALARS = np.stack([np.random.default_rng(i).permutation(np.arange(64).repeat(4)).reshape(16, 16) for i in range(4)])


@pytest.fixture
def colored(tmp_path):
    """Four images of jet(64) and the scalars that they show."""
    write_images(tmp_path / "images", open_colormap("jet/matlab64"))
    return tmp_path / "images"


def write_images(folder, colormap, extension="png", **options):
    folder.mkdir()
    for i, indices in enumerate(SCALARS):
        Image.fromarray(colormap.table[indices]).save(folder / f"a_{i}.{extension}", **options)


def folder_of(path, **fields):
    return ImageFolder(data_dir=str(path), **{"image_size": 16, **fields})


@pytest.mark.parametrize("name", ["jet", "auto", "jet/matlab64"])
def test_colored_images_become_exactly_their_scalars(colored, name):
    folder = folder_of(colored, colormap=name)
    assert folder.shape == (1, 16, 16) and folder.preprocessing["colormap"] == "jet/matlab64"
    assert np.array_equal(folder.batch(range(4)).numpy()[:, 0], (SCALARS / 63).astype(np.float32))
    assert folder.notes[-1] == ("colormap jet/matlab64: colors of 4 files are at most 0.0 and on average 0.00 (of 441) "
                                "from it")


def test_colored_images_are_recognized_and_remain_rgb(colored):
    folder = folder_of(colored)
    assert folder.notes[-1] == ("all pixels of 4 RGB files lie on colormap jet (jet/matlab64): --colormap jet reads "
                                "them as scalars")
    assert folder.shape == (3, 16, 16) and folder.preprocessing["recognized_colormap"] == "jet/matlab64"
    assert folder.describe()["recognized_colormap"] == "jet/matlab64" and "colormap" not in folder.preprocessing


def test_folders_of_other_images_state_no_colormap(tmp_path):
    photo = np.random.default_rng(0).integers(0, 256, (16, 16, 3)).astype(np.uint8)
    Image.fromarray(photo).save(tmp_path / "a.png")
    folder = folder_of(tmp_path)
    assert not folder.notes and "recognized_colormap" not in folder.preprocessing
    Image.fromarray(photo[..., 0]).save(tmp_path / "a.png")
    assert not folder_of(tmp_path).notes


def test_scalars_are_resized_instead_of_colors(colored):
    resized = folder_of(colored, colormap="jet", image_size=8).read(0)
    expected = (SCALARS[0] / 63).reshape(8, 2, 8, 2).mean((1, 3))
    assert np.allclose(resized[0], expected, atol=1e-6)


def test_colors_beside_the_map_are_rejected_with_distance_and_file(colored):
    pixels = open_colormap("jet/matlab64").table[SCALARS[2]]
    pixels[3, 3] = 255, 255, 255
    folder = folder_of(colored, colormap="jet")
    Image.fromarray(pixels).save(colored / "a_2.png")
    distance = np.linalg.norm(open_colormap("jet/matlab64").table.astype(float) - 255, axis=1).min()
    match = (f"a_2.png: a color is {distance:.1f} .of 441. from colormap jet/matlab64: expected at most "
             "--colormap_tolerance 2; set a larger tolerance for artifacts of JPEG, or omit")
    with pytest.raises(ValueError, match=match):
        folder_of(colored, colormap="jet")
    with pytest.raises(ValueError, match=match):     # changed after it was opened
        folder.read(2)
    scalars = folder_of(colored, colormap="jet", colormap_tolerance=distance + 0.1).batch(range(4)).numpy()[:, 0]
    assert (scalars != (SCALARS / 63).astype(np.float32)).sum() == 1


def test_artifacts_of_jpeg_require_a_tolerance(tmp_path):
    smooth = np.linspace(0, 255, 256).reshape(16, 16).astype(int)
    (tmp_path / "images").mkdir()
    Image.fromarray(open_colormap("viridis").table[smooth]).save(tmp_path / "images" / "a.jpg", quality=95)
    with pytest.raises(ValueError, match="a.jpg: a color is .* from colormap viridis/.*--colormap_tolerance 2"):
        folder_of(tmp_path / "images", colormap="auto")
    folder = folder_of(tmp_path / "images", colormap="auto", colormap_tolerance=60)
    assert folder.preprocessing["colormap"].startswith("viridis/") and folder.preprocessing["colormap_tolerance"] == 60
    assert abs(folder.read(0)[0] * 255 - smooth).mean() < 4


@pytest.mark.parametrize("fields", [{"value_range": "0,255"}, {"value_window": "0,9"}, {"image_channels": 3}])
def test_colormap_excludes_other_conversions(colored, fields):
    with pytest.raises(ValueError, match="--colormap jet gives one channel in .0, 1.: omit --value_range"):
        folder_of(colored, colormap="jet", **fields)


def test_colormap_requires_8_bits_and_images(tmp_path):
    np.save(tmp_path / "a.npy", np.zeros((16, 16, 3), np.uint16))
    with pytest.raises(ValueError, match="a.npy: --colormap jet requires 8-bit RGB images, got uint16"):
        folder_of(tmp_path, colormap="jet")
    with pytest.raises(ValueError, match="--colormap jet is for images"):
        spaces.open_folder(spaces.DataConfig(image_size="8x8x8", colormap="jet"), data_dir=str(tmp_path))


def test_gray_files_are_inverted_by_gray_r_only(tmp_path):
    Image.fromarray(np.arange(256).astype(np.uint8).reshape(16, 16)).save(tmp_path / "a.png")
    assert np.allclose(folder_of(tmp_path, colormap="gray_r").read(0).ravel(), 1 - np.arange(256) / 255)
    with pytest.raises(ValueError, match="a.png: a color is .* from colormap jet"):
        folder_of(tmp_path, colormap="jet")


def test_archives_of_colors_are_read_and_those_of_scalars_unchanged(tmp_path):
    colors = open_colormap("hot").table[SCALARS * 4]
    np.savez(tmp_path / "rgb.npz", images=colors)
    assert np.allclose(folder_of(tmp_path / "rgb.npz", colormap="hot").batch(range(4))[:, 0], SCALARS * 4 / 255)
    np.savez(tmp_path / "gray.npz", images=(SCALARS * 4).astype(np.uint8))
    assert np.allclose(folder_of(tmp_path / "gray.npz", colormap="hot").batch(range(4))[:, 0], SCALARS * 4 / 255)


@pytest.mark.skipif(not GESTURES.is_dir(), reason="the shared radar data are not available")
def test_radar_gestures_invert_from_jet_without_error():
    folder = ImageFolder(data_dir=str(GESTURES / "val"), image_size=64)
    assert folder.recognized_colormap == "jet/linear64"
    folder = ImageFolder(data_dir=str(GESTURES / "val"), image_size=64, colormap="jet", colormap_tolerance=0)
    scalars = folder.batch(range(0, len(folder), 4)).numpy()[:, 0]
    levels = np.rint(scalars * 63).astype(float)    # the images were drawn with 64 levels of v
    assert np.allclose(scalars, levels / 63, atol=1e-7) and len(np.unique(levels)) > 50
    v = levels[..., None] / 63
    colors = np.rint(np.clip(1.5 - abs(4 * v - np.array([3, 2, 1])), 0, 1) * 255)
    stored = [np.asarray(Image.open(path)) for path in folder.paths[::4]]
    assert np.array_equal(colors, np.stack(stored))


# --- Checkpoints, samples and evaluations ---


def test_the_table_of_training_is_that_of_its_colormap():
    trained = {"colormap": "jet/matlab64", "colormap_tolerance": 5.0}
    read = lambda explicit: spaces.apply_trained_preprocessing(
        spaces.DataConfig(**explicit), explicit, trained).colormap
    assert read({}) == read({"colormap": "jet"}) == read({"colormap": "auto"}) == "jet/matlab64"
    assert read({"colormap": "hot"}) == "hot" and read({"colormap": ""}) == ""
    assert spaces.apply_trained_preprocessing(spaces.DataConfig(), {}, {"crop": "none"}).colormap == ""


def test_flags_are_compared_with_the_colormap_of_a_cache():
    cache = type("Cache", (), {"folder": "c", "preprocessing": {"image_size": 8, "colormap": "jet/matlab64"}})
    for name in ("jet", "auto", "jet/matlab64"):
        spaces.require_same_preprocessing(cache, {"colormap": name})
    with pytest.raises(ValueError, match="--colormap hot conflicts with the cache c, .*colormap=jet/matlab64"):
        spaces.require_same_preprocessing(cache, {"colormap": "hot"})
    cache.preprocessing = {"image_size": 8}
    with pytest.raises(ValueError, match="--colormap jet conflicts with the cache c, .*colormap=;"):
        spaces.require_same_preprocessing(cache, {"colormap": "jet"})


def sampler_of(images, **fields):
    """Return a Sampler whose samples are given images, float32 [N x C x H x W] in [0, 1]."""
    codec = PixelCodec(images.shape[1])
    x0 = images * 2 - 1

    class Fixed(Sampler):
        def sample_x0(self, indices, classes, device, progress=False, noise=None):
            return x0[list(indices)]

    process = type("Process", (), {"timestep_map": [0], "num_timesteps": 1, "unclipped_warning": lambda self: None})()
    shape = tuple(images.shape[1:])
    return Fixed(None, process, shape, codec, LatentNormalizer([0], [1], "none"), shape, solver="ddpm", **fields)


def generate(sampler, folder, count=4):
    config = SamplingConfig(num_samples=count, batch_size=3)
    return generate_samples(sampler, None, config, folder, torch.device("cpu"))


def test_samples_of_scalars_are_colored_and_their_archive_has_the_scalars(tmp_path):
    scalars = torch.from_numpy((SCALARS / 63).astype(np.float32))[:, None]
    samples = open_npz(generate(sampler_of(scalars, colormap="jet/matlab64"), tmp_path))
    assert samples.colormap == "jet/matlab64"
    assert np.array_equal(samples.images[..., 0], np.rint(SCALARS / 63 * 255))
    table = open_colormap("jet/matlab64").table
    for i in range(4):
        with Image.open(tmp_path / "png" / f"{i:06d}.png") as image:
            assert np.array_equal(np.asarray(image), table[SCALARS[i]])
    with Image.open(tmp_path / "contact_sheet.png") as sheet:
        assert sheet.mode == "RGB" and np.array_equal(np.asarray(sheet)[2:18, 2:18], table[SCALARS[0]])
    shutil.rmtree(tmp_path / "png" / ".sampling", ignore_errors=True)
    assert np.array_equal(folder_of(tmp_path / "png", colormap="jet").batch(range(4)).numpy()[:, 0],
                          (SCALARS / 63).astype(np.float32))


def test_rgb_samples_are_moved_onto_the_map(tmp_path):
    table = open_colormap("jet/linear64")
    noisy = table.table[SCALARS].astype(int) + np.random.default_rng(0).integers(-6, 7, (*SCALARS.shape, 3))
    images = torch.from_numpy(np.moveaxis(noisy.clip(0, 255) / 255, -1, 1).astype(np.float32))
    samples = open_npz(generate(sampler_of(images, projection="jet/linear64"), tmp_path))
    assert samples.images.shape == (4, 16, 16, 3) and samples.colormap == ""
    scalars, distances = table.to_scalars(np.asarray(samples.images))
    assert (distances == 0).all() and abs(scalars * 63 - SCALARS).max() <= 1
    assert np.array_equal(samples.images, table.project(noisy.clip(0, 255).astype(np.uint8)))
    with Image.open(tmp_path / "png" / "000001.png") as image:
        assert np.array_equal(np.asarray(image), samples.images[1])


def test_previews_are_colored(tmp_path):
    scalars = torch.from_numpy((SCALARS / 63).astype(np.float32))[:, None].repeat(3, 1, 1, 1)
    sampler = sampler_of(scalars, colormap="jet/matlab64")
    SamplePreview(sampler, tmp_path, "cpu", columns=2)(7)
    with Image.open(tmp_path / "previews" / "000007.png") as sheet:
        assert np.array_equal(np.asarray(sheet)[2:18, 2:18], open_colormap("jet/matlab64").table[SCALARS[0]])


def test_reconstructions_of_scalars_state_their_colormap(tmp_path, colored):
    source = folder_of(colored, colormap="jet")
    roundtrip(PixelCodec(1), source, RoundtripConfig(save_npz=True), tmp_path, "cpu")
    assert open_npz(tmp_path / "reconstructions_4x16x16x1.npz").colormap == "jet/matlab64"


@pytest.mark.parametrize("requested, recognized, expected", [
    ("", "jet/linear64", ""), ("False", "jet/linear64", ""), ("True", "jet/linear64", "jet/linear64"),
    ("true", "hot/matlab64", "hot/matlab64"), ("jet", "jet/linear64", "jet/linear64"), ("jet", "", "jet/matplotlib"),
    ("hot", "jet/linear64", "hot/matplotlib"), ("jet/matlab64", "", "jet/matlab64"),
])
def test_project_colormap_is_that_of_training_or_a_name(requested, recognized, expected):
    header = {"data": {"recognized_colormap": recognized} if recognized else {}}
    assert loading._projection(requested, header, (3, 8, 8)) == expected


@pytest.mark.parametrize("requested, shape, match", [
    ("True", (3, 8, 8), "--project_colormap True: the model does not record a colormap.*set the name"),
    ("jet", (1, 8, 8), "--project_colormap jet: expected a model of RGB images, got samples of shape .1, 8, 8.; omit"),
    ("jet", (3, 8, 8, 8), "expected a model of RGB images"), ("jets", (3, 8, 8), "--colormap jets: expected auto or"),
])
def test_project_colormap_rejects_other_models_and_names(requested, shape, match):
    with pytest.raises(ValueError, match=match):
        loading._projection(requested, {"data": None}, shape)


def open_sets(tmp_path, samples, folder, explicit=None, **data):
    config = EvaluateConfig(samples=str(samples), reference=str(folder))
    return loading.open_sets(Run("evaluate", [config, spaces.DataConfig(image_size=16, **data)], explicit or {}))


def test_references_are_read_as_the_scalars_that_samples_are(tmp_path, colored):
    write_npz(tmp_path / "s.npz", (4, 16, 16, 1), [np.rint(SCALARS / 63 * 255)[..., None]], colormap="jet/matlab64")
    for data in ({}, {"colormap": "jet"}):
        sets = open_sets(tmp_path, tmp_path / "s.npz", colored, data, **data)
        assert sets["reference"].images.shape == sets["samples"].images.shape == (1, 16, 16)
        assert torch.allclose(sets["reference"].images.batch(range(4)), sets["samples"].images.batch(range(4)),
                              atol=0.5 / 255 + 1e-6)
    assert open_sets(tmp_path, tmp_path / "s.npz", colored, {"colormap": ""})["reference"].images.shape[0] == 3


def test_rgb_samples_are_evaluated_as_scalars_with_a_colormap(tmp_path, colored):
    colors = open_colormap("jet/matlab64").table[SCALARS]
    colors[0, 0, 0] += np.array([3, 0, 2], np.uint8)    # beside the map, as samples are
    write_npz(tmp_path / "s.npz", (4, 16, 16, 3), [colors])
    assert open_sets(tmp_path, tmp_path / "s.npz", colored)["samples"].images.shape == (3, 16, 16)
    sets = open_sets(tmp_path, tmp_path / "s.npz", colored, {"colormap": "jet"}, colormap="jet")
    assert sets["samples"].images.shape == sets["reference"].images.shape == (1, 16, 16)
    assert np.array_equal(sets["samples"].images.batch([1, 2]).numpy()[:, 0], (SCALARS[1:3] / 63).astype(np.float32))


def test_archives_of_an_evaluation_are_unpacked_once(tmp_path, colored, monkeypatch):
    colors = open_colormap("jet/matlab64").table[SCALARS]
    np.savez_compressed(tmp_path / "s.npz", arr_0=colors)
    np.savez_compressed(tmp_path / "r.npz", images=colors)
    opened, read = [], npz._read_member
    monkeypatch.setattr(npz, "_read_member", lambda path, *rest: opened.append(path) or read(path, *rest))
    sets = open_sets(tmp_path, tmp_path / "s.npz", tmp_path / "r.npz", {"colormap": "jet"}, colormap="jet")
    assert sets["samples"].images.shape == sets["reference"].images.shape == (1, 16, 16)
    assert sorted(opened) == [str(tmp_path / "r.npz"), str(tmp_path / "s.npz")]


def test_headers_color_the_samples_of_a_sampler():
    header = {"latent_shape": [1, 8, 8], "image_shape": [1, 8, 8], "model": {"num_classes": 0}, "classes": None,
              "data": {"colormap": "jet/matlab64"}}
    sampler = sampler_of(torch.zeros(1, 1, 8, 8))
    space = spaces.Space.of_pixels(1)
    read = lambda header: Sampler.from_header(None, sampler.diffusion, space, header, solver="ddpm").colormap
    assert read(header) == "jet/matlab64" and read({**header, "data": {}}) == read({**header, "data": None}) == ""


def test_a_volume_or_rgb_image_is_not_colored():
    rgb = np.random.default_rng(0).random((3, 4, 4)).astype(np.float32)
    assert np.array_equal(np.asarray(to_pil(rgb, "jet")), np.asarray(to_pil(rgb)))


def test_the_digest_of_a_cache_ignores_a_recognized_colormap():
    from guided_diffusion_vae.data.cache_writer import _digest

    fields = {"autoencoder": {"sha256": "0"}, "preprocessing": {"crop": "center"}}
    recognized = {**fields, "preprocessing": {"crop": "center", "recognized_colormap": "jet/linear64"}}
    read = {**fields, "preprocessing": {"crop": "center", "colormap": "jet/linear64"}}
    assert _digest(fields) == _digest(recognized) != _digest(read)
