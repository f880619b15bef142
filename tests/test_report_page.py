"""The report page: its content is read from the JSON inside, its behavior tested in Chromium where one is installed."""

import dataclasses
import json
import re
import sys

import numpy as np
import pytest
from PIL import Image

from guided_diffusion_vae import logger
from guided_diffusion_vae.data import evenly_spaced_per_class, write_npz
from guided_diffusion_vae.evaluation import report_page
from guided_diffusion_vae.evaluation.report_page import collect, read_commands, write_page
from guided_diffusion_vae.evaluation.study import format_tables
from guided_diffusion_vae.files import write_json, write_record
from guided_diffusion_vae.runs import run
from guided_diffusion_vae.runs.run import RunConfig, script
from browser import CHROMIUM, DRIVER, Browser

EVIL = "<script>window.hacked=1</script>\"'&"     # a class, an attribute, a flag and a line of the log
CLASSES = [EVIL, "tapin", "tapout"]


def write_samples(folder, count=12, shape=(8, 8, 1), attributes=True):
    """Write an .npz in which image i has the value i everywhere, class i % 3 and the attribute i / 10."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"samples_{'x'.join(map(str, (count, *shape)))}.npz"
    rows = np.arange(count)
    write_npz(path, (count, *shape), (np.full(shape, i % 256, np.uint8) for i in rows), rows % 3, CLASSES,
              attributes={"speed " + EVIL: rows / 10} if attributes else None)
    return path


def write_training(folder, steps=(10, 20, 30), loss=1.0):
    """Write the files of a training run with previews."""
    (folder / "previews").mkdir(parents=True)
    header = {"kind": "diffusion", "classes": CLASSES, "model": {"num_channels": 32},
              "data": {"files": 120, "kinds": {"uint8": 120}}, "statistics": {"std": 0.34}}
    write_record(folder / "config.json", {
        "script": "image_train_vae", "header": header,
        "flags": {"training": {"lr": loss / 100, "batch_size": 16}, "data": {"data_dir": EVIL}}})
    lines = ["grad_norm,loss,loss_q0,step", *(f"{s / 10},{loss / s},nan,{s}" for s in steps)]
    (folder / "progress.csv").write_text("\n".join(lines) + "\n")
    (folder / "log.txt").write_text(f"resuming\n-----\n| step | 1 |\n-----\n{EVIL}\n")
    for step in steps:
        Image.new("L", (40, 20), step).save(folder / "previews" / f"{step:06d}.png")
    return folder


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory):
    """Return {name: folder} of two trainings, samples, volumes and an evaluation."""
    folder = tmp_path_factory.mktemp("runs")
    folders = {name: folder / name for name in ("a", "b", "samples", "volumes", "evaluation")}
    write_training(folders["a"])
    write_training(folders["b"], loss=2.0)
    samples = write_samples(folders["samples"])
    volumes = np.arange(3 * 4 * 5 * 6, dtype=np.uint8).reshape(3, 4, 5, 6, 1)
    folders["volumes"].mkdir()
    write_npz(folders["volumes"] / "samples_3x4x5x6x1.npz", volumes.shape, [volumes])
    evaluation = folders["evaluation"]
    evaluation.mkdir()
    classes = {"accuracy": 0.75, "count": 4, "per_class": {EVIL: 1.0, "tapin": 0.5}, "confusion": [[2, 0], [1, 1]]}
    write_json(evaluation / "metrics.json", {
        "num_samples": 12, "frechet": 0.5, "recall": float("nan"), "class_agreement": classes,
        "classifier_accuracy": {**classes, "accuracy": 0.9}, "training_to_reference": {"frechet": 0.25},
        "nearest_neighbors": {"median_distance_samples": 3.0, "median_distance_reference": 4.0, "example_indices": [1]},
        "neighbours": {"share_suspiciously_near": 0}})     # alias
    write_record(evaluation / "commands.json", {"commands": [{
        "command": f"scripts/evaluate.py --samples '{EVIL}'", "script": "evaluate", "version": "0.3.0",
        "started": "2026-11-29 07:00:00", "working_folder": str(folder), "ranks": 1, "seconds": 1.5,
        "peak_memory_mib": {"host": 100.0}, "warnings": ["a warning"],
        "flags": {"evaluation": {"samples": samples.relative_to(folder).as_posix()}}}]})
    np.savez(evaluation / "nearest_neighbors.npz", indices=[0, 4], distances=[[0.5, 1.0], [2.0, 3.0]],
             neighbors=np.full((2, 2, 8, 8), 7, np.uint8))
    return folders


@pytest.fixture(scope="module")
def page(pipeline):
    return write_page(pipeline.values(), pipeline["a"].parent / "report.html")


def embedded(path):
    """Return the data in a page."""
    found, = re.findall(r'<script type="application/json" id="report">(.*?)</script>', path.read_text(), re.DOTALL)
    return json.loads(found)


def pixels(uri):
    """Return the pixels of the data URI of a PNG file."""
    import base64
    import io

    start, content = uri.split(",")
    assert start == "data:image/png;base64"
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(content))))


def test_page_contains_curves_previews_and_configuration_of_all_runs(page):
    report = embedded(page)
    a, b, *_ = report["runs"]
    assert [run["name"] for run in report["runs"]] == ["a", "b", "samples", "volumes", "evaluation"]
    assert a["curves"] == {"grad_norm": [1, 2, 3], "loss": [0.1, 0.05, 0.0333333], "step": [10, 20, 30]}
    assert b["curves"]["loss"] == [0.2, 0.1, 0.0666667]
    assert [preview["name"] for preview in a["previews"]] == ["000010", "000020", "000030"]
    assert (pixels(a["previews"][2]["image"]) == np.full((20, 40), 30)).all()
    config = {row["name"]: row for row in report["config"]}
    assert config["training.lr"]["values"][:2] == [0.01, 0.02] and config["training.lr"]["differs"]
    assert config["header.model.num_channels"]["values"] == [32, 32, None, None, None]
    assert not config["header.model.num_channels"]["differs"]
    data = {row["name"]: row["values"][0] for row in report["data"]}
    assert (data["files"], data["kinds.uint8"], data["classes"], data["latents.std"]) == (120, 120, CLASSES, 0.34)
    assert a["log"] == ["resuming", EVIL] and a["kind"] == "diffusion"


def test_page_contains_metrics_beside_those_of_real_data(page):
    report = embedded(page)
    run = report["runs"][-1]
    pairs = {name: (entry["value"], entry["real"]) for name, entry in run["metrics"].items()}
    assert pairs == {
        "num_samples": (12, None), "frechet": (0.5, 0.25), "recall": (None, None),
        "class_agreement.accuracy": (0.75, 0.9), "class_agreement.count": (4, None),
        "classifier_accuracy.count": (4, None), "nearest_neighbors.median_distance_samples": (3.0, 4.0)}
    assert [(entry["title"], entry["names"], entry["matrix"]) for entry in run["confusion"]] == [
        ("class agreement", [EVIL, "tapin"], [[2, 0], [1, 1]]),
        ("classifier accuracy", [EVIL, "tapin"], [[2, 0], [1, 1]])]
    assert run["warnings"] == ["a warning"] and run["commands"][0]["seconds"] == 1.5


def test_page_contains_samples_with_class_attributes_and_neighbors(page):
    gallery = embedded(page)["gallery"]
    images, volumes = gallery["sets"]
    assert (images["count"], images["shown"], images["shape"], images["neighbors"]) == (12, 12, "8x8x1", True)
    assert (volumes["count"], volumes["shape"], volumes["neighbors"]) == (3, "4x5x6x1", False)
    item = gallery["items"][4]
    assert (item["index"], item["class"], item["set"]) == (4, "tapin", 0)
    assert item["attributes"] == {"speed " + EVIL: pytest.approx(0.4)} and (pixels(item["image"]) == 4).all()
    assert [neighbor["distance"] for neighbor in item["neighbors"]] == [2, 3]
    assert (pixels(item["neighbors"][1]["image"]) == 7).all() and gallery["items"][5]["neighbors"] == []
    volume = gallery["items"][13]["volume"]
    assert (volume["shape"], volume["columns"], volume["stride"]) == ([4, 5, 6], 2, 1)
    expected = np.arange(120, 240).reshape(4, 5, 6)     # slices along the depth, two in a row
    assert (pixels(volume["image"]) == np.block([[expected[0], expected[1]], [expected[2], expected[3]]])).all()


def test_page_has_the_tables_of_an_augmentation_study(tmp_path):
    arm = {"error": [0.1, 0.08, 0.12], "macro_f1": [0.9, 0.8, 1], "calibration_error": [0.05, 0, 0.1],
           "recall": [0.95, None, 0.85]}
    share = {"images": 40, "baseline": "classical 1", "arms": {
        "classical 1": {**arm, "relative_difference": [0, 0, 0]},
        EVIL: {**arm, "relative_difference": [-0.2, -0.3, 0]}}}
    report = {"classes": CLASSES, "num_test": 20, "seeds": 3, "shares": {"1": share}}
    write_json(tmp_path / "study.json", report)
    (tmp_path / "log.txt").touch()
    Image.new("L", (4, 4)).save(tmp_path / "study.png")
    text = write_page([tmp_path]).read_text()
    run, = embedded(tmp_path / "report.html")["runs"]
    assert [figure["name"] for figure in run["figures"]] == ["study"]
    headings, *rows = run["study"][0]["rows"]
    assert headings[-1] == "error relative to classical 1 in %" and rows == [
        ["classical 1", "10.00 [8.00, 12.00]", "0.900", "0.850 tapout", "0.050", ""],
        [EVIL, "10.00 [8.00, 12.00]", "0.900", "0.850 tapout", "0.050", "-20 [-30, +0]"]]
    assert "Share 1: 40 training images, 20 test images" in text and "<script>window" not in text
    title, *table = format_tables(report)       # the log has the same rows
    assert title == run["study"][0]["title"] and [re.split("  +", line.strip()) for line in table] == [
        [cell for cell in row if cell] for row in run["study"][0]["rows"]]
    (tmp_path / "study.json").write_text("{}")
    run, = collect([tmp_path])["runs"]
    assert run["study"] == [] and "study.json" in run["warnings"][0]


def test_page_escapes_all_text(page):
    text = page.read_text()
    assert "<script>window" not in text and text.count("&lt;script&gt;window") > 5


def test_page_loads_nothing(page):
    head = page.read_text().split("</head>")[0]
    assert "default-src 'none'" in head and not re.findall(r'(?:src|href)="(?!data:|#)', page.read_text()[:len(head)])


@pytest.mark.parametrize("shape", [(64, 64, 3), (32, 32, 32, 1)])
def test_page_of_50000_samples_is_bounded(tmp_path, monkeypatch, shape):
    count = 50_000 if len(shape) == 3 else 200
    noise = np.random.default_rng(0).integers(0, 256, (1, *shape), dtype=np.uint8)
    images = np.broadcast_to(noise, (count, *shape))       # incompressible images without 600 MB
    monkeypatch.setattr(report_page, "open_npz", lambda path: report_page_samples(images, count))
    (tmp_path / f"samples_{'x'.join(map(str, images.shape))}.npz").touch()
    page = write_page([tmp_path])
    entry, = embedded(page)["gallery"]["sets"]
    assert (entry["count"], entry["shown"]) == (count, 240 if len(shape) == 3 else 20)
    assert page.stat().st_size < 20e6


def report_page_samples(images, count):
    from guided_diffusion_vae.data import Samples

    return Samples("samples.npz", images, np.arange(count) % 10, list("abcdefghij"))


def test_budgets_of_a_page_are_below_20_mb():
    images = (report_page.SAMPLE_BYTES + report_page.PREVIEW_BYTES + report_page.FIGURE_BYTES) * 4 / 3
    assert images + len(report_page._pack_plotlyjs()) < 17e6


def test_large_images_become_smaller_until_they_fit(tmp_path):
    noise = np.random.default_rng(0).integers(0, 256, (128, 128, 3), dtype=np.uint8)
    uri = report_page._embed(Image.fromarray(noise), 3000)
    assert uri.startswith("data:image/jpeg") and len(uri) < 4100


def write_evaluation(folder, samples, **data):
    """Write the record of an evaluation, and the nearest training images of the sample 2."""
    folder.mkdir()
    write_record(folder / "commands.json", {"commands": [{
        "working_folder": str(folder.parent), "flags": {"evaluation": {"samples": samples}, "data": data}}]})
    np.savez(folder / "nearest_neighbors.npz", indices=[2], distances=[[0.5]],
             neighbors=np.zeros((1, 1, 4, 4), np.uint8))
    return folder


def test_gallery_of_an_evaluated_folder_of_images(tmp_path):
    for name, side, value in (("b_1", 4, 30), ("a_2", 5, 20), ("a_1", 4, 10)):
        (tmp_path / "images").mkdir(exist_ok=True)
        Image.new("L", (side, 4), value).save(tmp_path / "images" / f"{name}.png")
    gallery = collect([write_evaluation(tmp_path / "run", "images", value_range="0,100", image_size="3")])["gallery"]
    entry, = gallery["sets"]
    assert (entry["count"], entry["classes"], entry["shape"]) == (3, ["a", "b"], "various sizes")
    assert [item["class"] for item in gallery["items"]] == ["a", "a", "b"]     # in the order of an image folder
    assert [pixels(item["image"]).shape for item in gallery["items"]] == [(4, 4), (4, 5), (4, 4)]
    assert [pixels(item["image"])[0, 0] for item in gallery["items"]] == [26, 51, 76]      # of 255, as 100 is white
    assert [len(item["neighbors"]) for item in gallery["items"]] == [0, 0, 1]


def test_gallery_of_an_evaluated_folder_of_volumes(tmp_path):
    (tmp_path / "volumes").mkdir()
    voxels = np.arange(2 * 4 * 5 * 6, dtype=np.float32).reshape(2, 4, 5, 6)
    for name, volume in zip(("a_1", "b_1"), voxels):
        np.save(tmp_path / "volumes" / f"{name}.npy", volume)
    run = write_evaluation(tmp_path / "run", "volumes", value_range="0,255", image_size="3x4x5", crop="center")
    gallery = collect([run])["gallery"]
    entry, = gallery["sets"]
    assert (entry["count"], entry["shape"], entry["classes"]) == (2, "3x4x5x1", ["a", "b"])
    volume = gallery["items"][1]["volume"]
    assert (volume["shape"], volume["columns"], gallery["items"][1]["class"]) == ([3, 4, 5], 2, "b")
    expected = voxels[1, :3, :4, :5]        # slices along the depth, two in a row
    assert (pixels(volume["image"]) == np.block([[expected[0], expected[1]], [expected[2], 0 * expected[0]]])).all()
    write_record(run / "commands.json", {"commands": [*read_commands(run / "commands.json"), {"flags": {"data": {}}}]})
    assert collect([run])["gallery"] == gallery     # another command in the folder does not change how they are read


def test_images_of_a_folder_that_cannot_be_read_are_a_warning(tmp_path):
    (tmp_path / "images").mkdir()
    Image.new("L", (4, 4), 200).save(tmp_path / "images" / "a.png")
    report = collect([write_evaluation(tmp_path / "run", "images", value_range="0,100")])
    assert not report["gallery"]["items"] and "outside --value_range" in report["runs"][0]["warnings"][0]
    (tmp_path / "images" / ".sampling").touch()     # the values of generated images are not those of the data
    report = collect([tmp_path / "run"])
    assert (pixels(report["gallery"]["items"][0]["image"]) == 200).all() and not report["runs"][0]["warnings"]


def test_unreadable_files_are_warnings(tmp_path):
    write_training(tmp_path / "run")
    (tmp_path / "run" / "config.json").write_text("{}x")
    (tmp_path / "run" / "previews" / "000010.png").write_bytes(b"no image")
    run, = collect([tmp_path / "run"])["runs"]
    assert len(run["previews"]) == 2 and len(run["warnings"]) == 2
    assert "config.json" in run["warnings"][0] and "000010.png" in run["warnings"][1]


def test_a_folder_of_another_kind_is_an_error(tmp_path):
    with pytest.raises(ValueError, match="is not a run folder: expected one of config.json"):
        collect([tmp_path])


def test_without_plotly_the_error_names_the_extra(pipeline, monkeypatch):
    monkeypatch.setitem(sys.modules, "plotly.offline", None)
    report_page._pack_plotlyjs.cache_clear()
    with pytest.raises(ImportError, match=r"guided-diffusion-vae\[report\]"):
        write_page([pipeline["a"]])


def test_evenly_spaced_per_class_takes_equally_many_of_each_class():
    labels = np.array([0] * 10 + [1] * 4 + [2])
    np.testing.assert_array_equal(evenly_spaced_per_class(labels, 15, 6), [0, 9, 10, 13, 14])
    np.testing.assert_array_equal(evenly_spaced_per_class(labels, 15, 2), [0, 14])
    np.testing.assert_array_equal(evenly_spaced_per_class(None, 15, 3), [0, 7, 14])


# --- At the end of a run ---


@pytest.fixture
def finished(tmp_path, one_process):
    """Run a script whose body is given, in the folder `run` below; return the log and the names of the files in it."""
    def finished(body, **flags):
        argv = ["--logdir", str(tmp_path / "run"), *(str(w) for k, v in flags.items() for w in (f"--{k}", v))]
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(sys, "argv", ["gdvae evaluate", *argv])
            script("doc", RunConfig)(body)()
        logger.reset()
        return (tmp_path / "run" / "log.txt").read_text(), {path.name for path in (tmp_path / "run").iterdir()}
    return finished


def test_a_run_records_its_command_and_writes_its_page(finished, tmp_path):
    log, files = finished(lambda run: (write_samples(run.folder), logger.warn("a problem")))
    assert {"report.html", "commands.json"} <= files
    record, = read_commands(tmp_path / "run" / "commands.json")
    assert record["command"].startswith("gdvae evaluate --logdir ") and record["warnings"] == ["a problem"]
    assert 0 <= record["seconds"] < 60 and record["flags"]["run"]["report"] is True
    report = embedded(tmp_path / "run" / "report.html")
    assert len(report["gallery"]["items"]) == 12 and report["runs"][0]["warnings"] == ["a problem"]
    finished(lambda run: None)
    assert len(read_commands(tmp_path / "run" / "commands.json")) == 2


def test_a_run_records_the_settings_that_it_takes_from_a_model(finished, tmp_path):
    finished(lambda run: run.resolve(dataclasses.replace(run[RunConfig], logdir="elsewhere")) and None)
    record, = read_commands(tmp_path / "run" / "commands.json")
    assert record["flags"]["run"]["logdir"] == "elsewhere" and "seconds" in record


def test_report_false_writes_no_page(finished):
    assert "report.html" not in finished(lambda run: None, report=False)[1]


def test_a_run_continues_without_its_page(finished, monkeypatch):
    monkeypatch.setattr(run, "write_page", lambda *args: 1 / 0)
    log, files = finished(lambda run: None)
    assert "report.html: cannot be written (ZeroDivisionError" in log and "report.html" not in files


def test_a_failed_check_has_a_page_and_a_dry_run_none(finished, tmp_path):
    with pytest.raises(SystemExit):
        finished(lambda run: sys.exit(1))
    assert (tmp_path / "run" / "report.html").exists()
    (tmp_path / "run" / "report.html").unlink()
    finished(lambda run: None, dry_run=True)
    assert not (tmp_path / "run" / "report.html").exists()


# --- In a browser ---


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    if not (CHROMIUM and DRIVER):
        pytest.skip("no chromium or chromedriver (Debian: chromium chromium-driver)")
    try:
        browser = Browser(tmp_path_factory.mktemp("profile"))
    except RuntimeError as error:   # its libraries or permissions are missing, which says nothing about the page
        pytest.skip(f"{CHROMIUM} does not start: {str(error)[:200]}")
    yield browser
    browser.close()


def test_page_works_in_a_browser(browser, page):
    browser.open(page)
    assert browser.run("return window.hacked ?? null") is None
    # Curves: a zoom in one plot is that of all, and of the fields.
    browser.wait("return document.querySelectorAll('.plot .main-svg').length >= 2")
    browser.run("return Plotly.relayout(document.getElementById('plot-loss'),"
                " {'xaxis.range[0]': 12, 'xaxis.range[1]': 20}).then(() => 1)")
    range_of = "return document.getElementById('plot-grad_norm').layout.xaxis.range"
    assert browser.wait(range_of) == [12, 20]
    browser.run("Plotly.Fx.hover('plot-loss', {xval: 20})")
    assert "0.1" in browser.wait("return document.querySelector('#plot-loss .hoverlayer').textContent")
    assert browser.run("return document.getElementById('step-to').value") == "20"
    browser.run("document.getElementById('zoom-out').click()")
    assert browser.run("return document.getElementById('plot-grad_norm').layout.xaxis.autorange")
    buttons = set(browser.run("return [...document.querySelectorAll('.modebar-btn')].map((b) => b.dataset.title)"))
    assert buttons == {"Zoom", "Pan", "Reset axes"}     # none that sends data to a server
    # Previews
    browser.run("const s = document.querySelector('.preview input'); s.value = 0; s.dispatchEvent(new Event('input'))")
    assert browser.run("return document.querySelector('.preview output').textContent") == "step 10"
    # The gallery filters by class and attribute.
    assert browser.run("return document.querySelectorAll('.tile').length") == 15
    change = "arguments[0].value = arguments[1]; arguments[0].dispatchEvent(new Event('input', {bubbles: true}))"
    choose = f"((...arguments) => {{ {change} }})"
    browser.run(f"{choose}(document.getElementById('class-filter'), 'tapin')")
    assert browser.run("return document.getElementById('count').textContent") == "4 of 15"
    browser.run(f"{choose}(document.querySelector('#filters input'), '0.5')")
    names = "return [...document.querySelectorAll('.tile')].map((tile) => tile.title)"
    assert browser.run(names) == ["sample 7, tapin", "sample 10, tapin"]
    # Nearest training images are shown beside the samples that have some.
    images = "return [...document.querySelectorAll('.tile .images')].map((images) => images.children.length)"
    assert browser.run(images) == [1, 1]
    browser.run(f"{choose}(document.querySelector('#filters input'), ''); document.getElementById('compared').click()")
    assert browser.run(images) == [1, 3, 1, 1]
    assert "tapin, distance 2" in browser.run("return document.querySelectorAll('.tile')[1].textContent")
    browser.run("document.getElementById('compared').click()")
    browser.run(f"{choose}(document.querySelector('#filters input'), '0.5')")
    assert browser.run(images) == [1, 1]
    # A tile opens large, by keyboard; arrows step, Escape closes.
    browser.run("document.querySelector('.tile').focus()")
    browser.key("Enter")
    title = "return document.querySelector('#viewer strong')?.textContent"
    assert browser.wait(title) == "sample 7, tapin"
    browser.key("ArrowRight")
    assert browser.run(title) == "sample 10, tapin"
    browser.key("Escape")
    assert not browser.run("return document.getElementById('viewer').open")
    # Slices of a volume: the axes are depth, height, width.
    browser.run(f"{choose}(document.getElementById('class-filter'), '')")
    browser.run(f"{choose}(document.querySelector('#filters input'), '')")
    browser.run("document.querySelectorAll('.tile')[13].click()")
    browser.wait("return document.querySelectorAll('.slice output')[2]?.textContent === 'width 3'")
    browser.run(f"{choose}(document.querySelectorAll('.slice input')[1], 1)")
    slices = browser.run("""return [...document.querySelectorAll('.slice canvas')].map((canvas) => {
        const data = canvas.getContext('2d').getImageData(0, 0, canvas.width, canvas.height).data;
        return [canvas.width, canvas.height, data[0], data[4 * (canvas.width + 1)]]; })""")
    volume = np.arange(120, 240).reshape(4, 5, 6)
    assert slices == [[6, 5, *volume[2, [0, 1], [0, 1]]], [6, 4, *volume[[0, 1], 1, [0, 1]]],
                      [5, 4, *volume[[0, 1], [0, 1], 3]]]
    # Dark and light
    browser.run("document.getElementById('viewer').close()")
    background = "return getComputedStyle(document.body).backgroundColor"
    before = browser.run(background)
    browser.key("d")
    assert browser.run(background) != before
    # Printed are all plots, in the colors of paper and as wide as half of it, and the gallery.
    browser.command("Emulation.setEmulatedMedia", media="print")
    browser.run("dispatchEvent(new Event('beforeprint'))")
    plot = ("const { width, font } = document.getElementById('plot-loss')._fullLayout;"
            " return [Math.min(width, 345), font.color]")
    assert browser.run(plot) == [344, "#1b1f26"]
    assert browser.run("return getComputedStyle(document.querySelector('.tile')).display") != "none"
    assert browser.run(background) == "rgb(255, 255, 255)"
    browser.command("Emulation.setEmulatedMedia", media="")
    browser.run("dispatchEvent(new Event('afterprint'))")
    assert browser.run(plot) == [345, "#e4e7ec"]
    loaded = "return performance.getEntriesByType('resource').filter((entry) => !entry.name.startsWith('data:'))"
    assert browser.run(loaded) == []
    assert browser.errors() == []
