import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image

from guided_diffusion_vae.evaluation import figures
from guided_diffusion_vae.sampling import sheets


def random_images(*shape):
    return np.random.default_rng(0).random(shape, dtype=np.float32)


def tile(sheet, row, column, height, width, left=0, top=0):
    y, x = top + sheets.GAP + row * (height + sheets.GAP), left + sheets.GAP + column * (width + sheets.GAP)
    return np.asarray(sheet)[y : y + height, x : x + width]


def test_contact_sheet_fills_rows():
    images = random_images(5, 3, 8, 6)
    sheet = sheets.contact_sheet(images, columns=3)
    assert sheet.size == (3 * 8 + 2, 2 * 10 + 2) and sheet.mode == "RGB"
    expected = np.rint(images[4] * 255).astype(np.uint8).transpose(1, 2, 0)
    assert np.array_equal(tile(sheet, 1, 1, 8, 6), expected)
    assert (tile(sheet, 1, 2, 8, 6) == 255).all()


def test_single_channels_stay_grayscale_and_scale_repeats_pixels():
    images = random_images(2, 1, 4, 4)
    sheet = sheets.contact_sheet(torch.from_numpy(images), columns=2, scale=3)
    assert sheet.mode == "L"
    assert np.array_equal(tile(sheet, 0, 1, 12, 12)[::3, ::3], np.rint(images[1, 0] * 255))


def test_values_outside_the_unit_interval_are_clipped():
    images = np.stack([np.full((1, 4, 4), -0.5), np.full((1, 4, 4), 1.5)])
    sheet = sheets.contact_sheet(images, columns=2)
    assert tile(sheet, 0, 0, 4, 4).max() == 0 and tile(sheet, 0, 1, 4, 4).min() == 255


def test_labels_and_header_do_not_overlap_tiles():
    images = np.zeros((4, 1, 32, 32))
    plain = sheets.contact_sheet(images, 2)
    labeled = sheets.contact_sheet(images, 2, ["doubletapin", "wiggle"], "step 1000")
    left, top = labeled.width - plain.width, labeled.height - plain.height
    assert left > 60 and top > 14
    assert not tile(labeled, 1, 1, 32, 32, left, top).any()
    gutter = np.asarray(labeled)[top:, :left]
    assert gutter[:34].min() < 100 and gutter[34:].min() < 100
    assert np.asarray(labeled)[:top].min() < 100


def test_rows_fit_labels_and_the_sheet_fits_its_header():
    header = "a header longer than two images"
    sheet = sheets.contact_sheet(np.zeros((2, 1, 4, 4)), 1, ["a\nb\nc", "d\ne\nf"], header)
    assert sheet.width > 150 and sheet.height > 2 * 3 * sheets.FONT_SIZE


def test_volume_is_shown_by_its_middle_slices():
    volume = random_images(1, 1, 4, 6, 8)
    sheet = np.asarray(sheets.contact_sheet(volume, 1))
    levels = np.rint(volume[0, 0] * 255)
    g = sheets.GAP
    assert np.array_equal(sheet[g : g + 6, g : g + 8], levels[2])
    assert np.array_equal(sheet[g : g + 4, 2 * g + 8 : 2 * g + 16], levels[:, 3])
    assert np.array_equal(sheet[g : g + 4, 3 * g + 16 : 3 * g + 22], levels[:, :, 4])


@pytest.mark.parametrize(
    "images, message",
    [
        (np.zeros((0, 1, 4, 4)), "got \\[0, 1, 4, 4\\]"),
        (np.zeros((2, 0, 4, 4)), "got \\[2, 0, 4, 4\\]"),
        (np.zeros((2, 1, 9)), "got \\[2, 1, 9\\]"),
        (np.full((1, 1, 4, 4), np.nan), "NaN"),
    ],
)
def test_contact_sheet_rejects_other_shapes_and_nan(images, message):
    with pytest.raises(ValueError, match=message):
        sheets.contact_sheet(images, 1)


def test_first_of_two_or_four_channels_is_shown():
    images = random_images(2, 4, 5, 5)
    assert np.array_equal(sheets.contact_sheet(images, 2), sheets.contact_sheet(images[:, :1], 2))
    assert figures.reconstruction_grid(images[:, :2], images[:, 2:]).mode == "L"


def test_confusion_plot_of_too_many_classes_raises():
    with pytest.raises(ValueError, match="confusion plot: expected at most 64 classes, got 65"):
        figures.confusion_plot(np.zeros((65, 65)), list("x" * 65))


def test_contact_sheet_rejects_wrong_number_of_labels():
    with pytest.raises(ValueError, match="row labels: expected 3 for 5 images in 2 columns, got 2"):
        sheets.contact_sheet(np.zeros((5, 1, 4, 4)), 2, ["a", "b"])


def test_reconstruction_grid_amplifies_the_difference():
    inputs = np.full((2, 1, 50, 50), 0.5, np.float32)
    sheet = figures.reconstruction_grid(inputs, inputs - 0.1, gain=4)
    left = sheet.width - (2 * 52 + 2)
    middles = [tile(sheet, row, 0, 50, 50, left)[25, 25] for row in range(3)]
    assert middles == [128, 102, 102]


def test_reconstruction_grid_rejects_different_shapes():
    with pytest.raises(ValueError, match=r"reconstructions: expected shape \[1, 1, 4, 4\], got \[1, 1, 4, 5\]"):
        figures.reconstruction_grid(np.zeros((1, 1, 4, 4)), np.zeros((1, 1, 4, 5)))


def test_neighbor_grid_shows_sample_left_and_neighbors_right():
    samples, neighbors = np.zeros((2, 1, 40, 40)), np.full((2, 3, 1, 40, 40), 0.5)
    sheet = figures.neighbor_grid(samples, neighbors, np.array([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]]))
    middle = np.asarray(sheet)[-22, -5 * 42 - 2 :]
    assert [middle[2 + 20 + 42 * column] for column in range(5)] == [0, 255, 128, 128, 128]


def test_neighbor_grid_rejects_neighbors_of_other_samples():
    with pytest.raises(ValueError, match=r"neighbors: expected shape \[2, 1, 4, 4\], got \[3, 1, 4, 4\]"):
        figures.neighbor_grid(np.zeros((2, 1, 4, 4)), np.zeros((3, 2, 1, 4, 4)))


def test_line_plot_uses_one_color_per_curve():
    plot = np.asarray(figures.line_plot({"a": [(2, 1.0), (1, 2.0)], "b": [(1, 1.5), (2, 1.5)]}, "x", "y", log_x=True))
    colors = {tuple(c) for c in plot.reshape(-1, 3)}
    assert plot.shape == (400, 700, 3) and {(31, 119, 180), (255, 127, 14)} <= colors


def test_confusion_plot_shades_the_diagonal():
    plot = np.asarray(figures.confusion_plot([[9, 1], [0, 10]], ["tapin", "tapout"]))
    assert (np.abs(plot.astype(int) - [8, 48, 107]).sum(2) < 3).sum() > 1000  # the darkest blue: a fraction of 1
    with pytest.raises(ValueError, match=r"confusion matrix: expected shape \[3, 3\], got \[2, 2\]"):
        figures.confusion_plot(np.eye(2), ["a", "b", "c"])


@pytest.fixture
def unrendered(monkeypatch):
    """Plots are returned as Matplotlib axes instead of images."""
    monkeypatch.setattr(figures, "_render", lambda figure: figure.axes[0])


def test_confusion_plot_has_targets_as_rows_shaded_by_their_fractions(unrendered):
    panel = figures.confusion_plot(np.array([[6, 2], [3, 0]]), ["tapin", "tapout"])
    assert panel.images[0].get_array().tolist() == [[0.75, 0.25], [1, 0]]
    texts = {(int(y), int(x)): (text.get_text(), text.get_color()) for text in panel.texts
             for x, y in [text.get_position()]}
    assert texts == {(0, 0): ("6", "white"), (0, 1): ("2", "black"), (1, 0): ("3", "white"), (1, 1): ("0", "black")}
    assert (panel.get_xlabel(), panel.get_ylabel()) == ("predicted", "target")
    assert [label.get_text() for label in panel.get_yticklabels()] == ["tapin", "tapout"]


def test_line_plot_sorts_points_and_scales_the_requested_axis(unrendered):
    panel = figures.line_plot({"a": [(4, 1.0), (1, 2.0)]}, "steps", "error", log_y=True)
    assert panel.lines[0].get_xydata().tolist() == [[1, 2], [4, 1]]
    assert (panel.get_xscale(), panel.get_yscale()) == ("linear", "log")
    assert (panel.get_xlabel(), panel.get_ylabel()) == ("steps", "error")


def test_neighbor_grid_states_the_distance_to_the_nearest(monkeypatch):
    labels = []
    monkeypatch.setattr(figures, "contact_sheet", lambda images, columns, row_labels, header, scale:
                        labels.extend(row_labels))
    figures.neighbor_grid(np.zeros((2, 1, 4, 4)), np.zeros((2, 2, 1, 4, 4)), np.array([[1.5, 2.0], [3.0, 4.0]]))
    assert labels == ["sample 0\nd = 1.5", "sample 1\nd = 3"]


def test_difference_of_a_brighter_reconstruction_is_its_absolute_value():
    inputs = np.full((1, 1, 50, 50), 0.25, np.float32)
    sheet = figures.reconstruction_grid(inputs, inputs + 0.1, gain=4)
    assert np.asarray(sheet)[-25, -25] == 102


def test_saved_image_reads_back_and_leaves_no_other_file(tmp_path):
    sheet = sheets.contact_sheet(random_images(2, 1, 8, 8), 2)
    sheets.save_image(tmp_path / "previews" / "000000.png", sheet)
    with Image.open(tmp_path / "previews" / "000000.png") as again:
        assert again.mode == "L" and np.array_equal(np.asarray(again), np.asarray(sheet))
    assert [path.name for path in (tmp_path / "previews").iterdir()] == ["000000.png"]


def test_saving_to_an_unknown_extension_raises(tmp_path):
    with pytest.raises(ValueError, match="sheet.txt: unknown image format; use .png"):
        sheets.save_image(tmp_path / "sheet.txt", Image.new("L", (4, 4)))


def test_contact_sheets_do_not_load_matplotlib():
    code = (
        "import sys, numpy, guided_diffusion_vae.evaluation; from guided_diffusion_vae.sampling import sheets;"
        "sheets.contact_sheet(numpy.zeros((1, 1, 4, 4)), 1, ['a']); assert 'matplotlib' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
