"""Execute the notebooks of this folder, or those that are named, and store their outputs: `make notebooks`."""

import base64
import io
import resource
import sys
import time
from pathlib import Path

import nbclient
import nbformat
from PIL import Image

FOLDER = Path(__file__).parent


def execute(path):
    """Run a notebook in its folder and write it with its outputs, without progress bars and warnings."""
    notebook = nbformat.read(path, as_version=4)
    client = nbclient.NotebookClient(notebook, timeout=None, record_timing=False,
                                     resources={"metadata": {"path": str(FOLDER)}})
    client.execute()
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.outputs = [output for output in cell.outputs if output.get("name") != "stderr"]
            for output in cell.outputs:
                compress(output)
    nbformat.write(notebook, path)


def compress(output):
    """Replace the PNG image of an output by a JPEG of at most 1280 pixels, which is a fraction of it."""
    png = output.get("data", {}).pop("image/png", None)
    if png:
        jpeg, image = io.BytesIO(), Image.open(io.BytesIO(base64.b64decode(png))).convert("RGB")
        image.thumbnail((1280, 1280))
        image.save(jpeg, "JPEG", quality=75)
        output["data"]["image/jpeg"] = base64.b64encode(jpeg.getvalue()).decode()


def cpu_seconds():
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


for path in map(Path, sys.argv[1:]) if len(sys.argv) > 1 else sorted(FOLDER.glob("*.ipynb")):
    wall, cpu = time.monotonic(), cpu_seconds()
    execute(path)
    print(f"{path.name}: {time.monotonic() - wall:.0f} s, {cpu_seconds() - cpu:.0f} s of CPU time", flush=True)
