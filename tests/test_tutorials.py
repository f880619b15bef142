"""The notebooks of docs/tutorials run, with settings that take seconds, and their files are small."""

import json
import logging
from pathlib import Path

import pytest

TUTORIALS = Path(__file__).parents[1] / "docs" / "tutorials"
NOTEBOOKS = sorted(TUTORIALS.glob("*.ipynb"))
MAX_BYTES = 300_000     # with outputs
# Replacements of the cell tagged `parameters`.
FAST = {
    "editing": dict(IMAGES=4, AUTOENCODER_STEPS=1, DIFFUSION_STEPS=1, SAMPLING_STEPS=4),
    "own_images": dict(IMAGES=8, SHAPES=16, AUTOENCODER_STEPS=1, DIFFUSION_STEPS=1, SAMPLING_STEPS=2),
    "radar": dict(RECORDINGS=8, VAL_RECORDINGS=8, SAMPLES=24, AUTOENCODER_STEPS=1, DIFFUSION_STEPS=1,
                  CLASSIFIER_STEPS=4, SEEDS=2, SAMPLING_STEPS=2),
    "volumes": dict(VOLUMES=4, AUTOENCODER_STEPS=1, DIFFUSION_STEPS=1, SAMPLING_STEPS=2),
}


def cells(path, kind):
    return [cell for cell in json.loads(path.read_text(encoding="utf-8"))["cells"] if cell["cell_type"] == kind]


def run(path, parameters):
    """Execute the code of a notebook in this process; return what it displays."""
    shown = []

    def display(image):
        image.load()    # and closes its file
        shown.append(image)

    names = {"__name__": "__main__", "display": display}
    for cell in cells(path, "code"):
        exec(compile("".join(cell["source"]), path.name, "exec"), names)
        if "parameters" in cell["metadata"].get("tags", []):
            assert parameters.keys() <= names.keys()
            names.update(parameters)
    return shown


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
@pytest.mark.filterwarnings("ignore:Fréchet distance from")
@pytest.mark.usefixtures("one_process", "numerics")
def test_notebook_runs(path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("OPENAI_LOG_FORMAT", "")     # which notebooks set
    # Report pages and previews take longer than the rest, and have tests of their own.
    monkeypatch.setattr("guided_diffusion_vae.runs.run.write_page", lambda *_: None)
    monkeypatch.setattr("guided_diffusion_vae.runs.training.PREVIEW_STEPS", 2)
    monkeypatch.setattr(logging.getLogger("nibabel.global"), "level", logging.ERROR)
    shown = run(path, {**FAST[path.stem], "FOLDER": "output"})
    assert len(shown) >= 3 and all(min(image.size) >= 64 for image in shown)
    assert [entry.name for entry in tmp_path.iterdir()] == ["output"]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_outputs_of_notebook_are_small_and_complete(path):
    assert path.stat().st_size <= MAX_BYTES
    outputs = [output for cell in cells(path, "code") for output in cell["outputs"]]
    assert {output.get("name", output["output_type"]) for output in outputs} <= {"stdout", "display_data"}
    counts = [cell["execution_count"] for cell in cells(path, "code")]
    assert counts in ([None] * len(counts), [*range(1, len(counts) + 1)])   # not executed, or once from top to bottom
