import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image

from guided_diffusion_vae.evaluation import figures


def pictures(*shape):
    return np.random.default_rng(0).random(shape, dtype=np.float32)


def tile(sheet, row, column, height, width, left=0, top=0):
    y, x = top + figures.GAP + row * (height + figures.GAP), left + figures.GAP + column * (width + figures.GAP)
    return np.asarray(sheet)[y : y + height, x : x + width]


def test_contact_sheet_places_pictures_in_rows():
    images = pictures(5, 3, 8, 6)
    sheet = figures.contact_sheet(images, columns=3)
    assert sheet.size == (3 * 8 + 2, 2 * 10 + 2) and sheet.mode == "RGB"
    expected = np.rint(images[4] * 255).astype(np.uint8).transpose(1, 2, 0)
    assert np.array_equal(tile(sheet, 1, 1, 8, 6), expected)
    assert (tile(sheet, 1, 2, 8, 6) == 255).all()


def test_grey_stays_grey_and_scale_repeats_pixels():
    images = pictures(2, 1, 4, 4)
    sheet = figures.contact_sheet(torch.from_numpy(images), columns=2, scale=3)
    assert sheet.mode == "L"
    assert np.array_equal(tile(sheet, 0, 1, 12, 12)[::3, ::3], np.rint(images[1, 0] * 255))


def test_values_outside_the_range_are_clipped():
    images = np.stack([np.full((1, 4, 4), -0.5), np.full((1, 4, 4), 1.5)])
    sheet = figures.contact_sheet(images, columns=2)
    assert tile(sheet, 0, 0, 4, 4).max() == 0 and tile(sheet, 0, 1, 4, 4).min() == 255


def test_labels_and_header_take_room_of_their_own():
    images = np.zeros((4, 1, 32, 32))
    plain = figures.contact_sheet(images, 2)
    labelled = figures.contact_sheet(images, 2, ["doubletapin", "wiggle"], "step 1000")
    left, top = labelled.width - plain.width, labelled.height - plain.height
    assert left > 60 and top > 14
    assert not tile(labelled, 1, 1, 32, 32, left, top).any()
    gutter = np.asarray(labelled)[top:, :left]
    assert gutter[:34].min() < 100 and gutter[34:].min() < 100
    assert np.asarray(labelled)[:top].min() < 100


def test_rows_are_as_high_as_their_labels_and_the_sheet_as_wide_as_its_header():
    header = "a header longer than two pictures"
    sheet = figures.contact_sheet(np.zeros((2, 1, 4, 4)), 1, ["a\nb\nc", "d\ne\nf"], header)
    assert sheet.width > 150 and sheet.height > 2 * 3 * figures.FONT_SIZE


def test_a_volume_is_shown_by_the_middle_slice_of_each_axis():
    volume = pictures(1, 1, 4, 6, 8)
    sheet = np.asarray(figures.contact_sheet(volume, 1))
    levels = np.rint(volume[0, 0] * 255)
    g = figures.GAP
    assert np.array_equal(sheet[g : g + 6, g : g + 8], levels[2])
    assert np.array_equal(sheet[g : g + 4, 2 * g + 8 : 2 * g + 16], levels[:, 3])
    assert np.array_equal(sheet[g : g + 4, 3 * g + 16 : 3 * g + 22], levels[:, :, 4])


@pytest.mark.parametrize(
    "images, message",
    [
        (np.zeros((0, 1, 4, 4)), "found \\[0, 1, 4, 4\\]"),
        (np.zeros((2, 0, 4, 4)), "found \\[2, 0, 4, 4\\]"),
        (np.zeros((2, 1, 9)), "found \\[2, 1, 9\\]"),
        (np.full((1, 1, 4, 4), np.nan), "NaN"),
    ],
)
def test_contact_sheet_refuses_what_is_no_picture(images, message):
    with pytest.raises(ValueError, match=message):
        figures.contact_sheet(images, 1)


def test_of_two_or_four_channels_the_first_is_shown():
    images = pictures(2, 4, 5, 5)
    assert np.array_equal(figures.contact_sheet(images, 2), figures.contact_sheet(images[:, :1], 2))
    assert figures.reconstruction_grid(images[:, :2], images[:, 2:]).mode == "L"


def test_too_many_classes_for_a_plot_are_refused():
    with pytest.raises(ValueError, match="65 classes are too many to be drawn; 64 are not"):
        figures.confusion_plot(np.zeros((65, 65)), list("x" * 65))


def test_contact_sheet_refuses_a_wrong_number_of_labels():
    with pytest.raises(ValueError, match=r"2 row labels for 3 rows \(5 images, 2 a row\)"):
        figures.contact_sheet(np.zeros((5, 1, 4, 4)), 2, ["a", "b"])


def test_side_by_side_amplifies_the_difference():
    inputs = np.full((2, 1, 50, 50), 0.5, np.float32)
    sheet = figures.reconstruction_grid(inputs, inputs - 0.1, gain=4)
    left = sheet.width - (2 * 52 + 2)
    middles = [tile(sheet, row, 0, 50, 50, left)[25, 25] for row in range(3)]
    assert middles == [128, 102, 102]


def test_side_by_side_refuses_different_shapes():
    with pytest.raises(ValueError, match="inputs .* against reconstructions"):
        figures.reconstruction_grid(np.zeros((1, 1, 4, 4)), np.zeros((1, 1, 4, 5)))


def test_neighbour_sheet_puts_the_sample_left_and_its_neighbours_right():
    samples, neighbours = np.zeros((2, 1, 40, 40)), np.full((2, 3, 1, 40, 40), 0.5)
    sheet = figures.neighbor_grid(samples, neighbours, np.array([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]]))
    middle = np.asarray(sheet)[-22, -5 * 42 - 2 :]
    assert [middle[2 + 20 + 42 * column] for column in range(5)] == [0, 255, 128, 128, 128]


def test_neighbour_sheet_refuses_neighbours_of_other_samples():
    with pytest.raises(ValueError, match=r"neighbours \[3, 2, 1, 4, 4\] do not fit samples \[2, 1, 4, 4\]"):
        figures.neighbor_grid(np.zeros((2, 1, 4, 4)), np.zeros((3, 2, 1, 4, 4)))


def test_line_plot_draws_every_curve_in_a_colour_of_its_own():
    plot = np.asarray(figures.line_plot({"a": [(2, 1.0), (1, 2.0)], "b": [(1, 1.5), (2, 1.5)]}, "x", "y", log_x=True))
    colours = {tuple(c) for c in plot.reshape(-1, 3)}
    assert plot.shape == (400, 700, 3) and {(31, 119, 180), (255, 127, 14)} <= colours


def test_confusion_plot_shades_the_diagonal():
    plot = np.asarray(figures.confusion_plot([[9, 1], [0, 10]], ["tapin", "tapout"]))
    assert (np.abs(plot.astype(int) - [8, 48, 107]).sum(2) < 3).sum() > 1000  # the darkest blue: a share of 1
    with pytest.raises(ValueError, match=r"\[2, 2\] for 3 names"):
        figures.confusion_plot(np.eye(2), ["a", "b", "c"])


def test_a_saved_picture_reads_back_and_leaves_nothing_beside_it(tmp_path):
    sheet = figures.contact_sheet(pictures(2, 1, 8, 8), 2)
    figures.save_image(tmp_path / "previews" / "000000.png", sheet)
    with Image.open(tmp_path / "previews" / "000000.png") as again:
        assert again.mode == "L" and np.array_equal(np.asarray(again), np.asarray(sheet))
    assert [path.name for path in (tmp_path / "previews").iterdir()] == ["000000.png"]


def test_a_picture_without_a_known_suffix_is_refused(tmp_path):
    with pytest.raises(ValueError, match="no picture format"):
        figures.save_image(tmp_path / "sheet.txt", Image.new("L", (4, 4)))


def test_contact_sheets_do_not_load_matplotlib():
    code = (
        "import sys, numpy; from guided_diffusion_vae.evaluation import figures;"
        "figures.contact_sheet(numpy.zeros((1, 1, 4, 4)), 1, ['a']); assert 'matplotlib' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
