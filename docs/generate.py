"""Generate pages of the site: notebooks, the flags of every command and the API from docstrings. A hook of MkDocs."""

import base64
import importlib
import json
import pkgutil
import sys
from pathlib import Path

from mkdocs.structure.files import File

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

import guided_diffusion_vae  # noqa: E402
from guided_diffusion_vae.programs import COMMANDS, spell, summarize  # noqa: E402

COPIED = ["README.md", "CHANGELOG.md", "CONTRIBUTING.md", "LICENSE", "CITATION.cff"]
ROOMS = {
    "top": "Networks, processes and training", "data": "Data", "vae": "Autoencoders", "sampling": "Sampling",
    "evaluation": "Evaluation", "runs": "Runs",
}


def on_files(files, config):
    """Add the generated pages, and the files beside docs/ that README links to, to those of docs/."""
    pages = {name: (ROOT / name).read_text(encoding="utf-8").replace("](docs/", "](") for name in COPIED}
    pages["index.md"] = pages.pop("README.md")
    pages["reference/flags.md"] = flags_page()
    pages |= {f"reference/{room}.md": api_page(room, title) for room, title in ROOMS.items()}
    for path in sorted((ROOT / "docs" / "tutorials").glob("*.ipynb")):
        pages |= notebook_files(path)
    for name, content in pages.items():
        files.append(File.generated(config, name, content=content))
    return files


def on_page_markdown(markdown, page, **_):
    """Let links to notebooks, and those out of docs/, lead to their pages."""
    up = "../" * page.file.src_uri.count("/")
    markdown = markdown.replace(".ipynb)", ".md)").replace(f"]({up}../README.md", f"]({up}index.md")
    for name in COPIED:
        markdown = markdown.replace(f"]({up}../{name}", f"]({up}{name}")
    return markdown


def notebook_files(path):
    """Return {name: content} of the page of a notebook and of the images that its cells have displayed."""
    page, images = [], {}
    for cell in json.loads(path.read_text(encoding="utf-8"))["cells"]:
        source = "".join(cell["source"])
        page += [source if cell["cell_type"] == "markdown" else f"```python\n{source}\n```"]
        outputs = cell.get("outputs", [])
        if text := "".join(line for output in outputs for line in output.get("text", [])):
            page += [f"```text\n{text.rstrip()}\n```"]
        for output in outputs:
            if "data" in output:
                name = f"{path.stem}_{len(images)}.jpg"
                images[f"tutorials/{name}"] = base64.b64decode("".join(output["data"]["image/jpeg"]))
                page += [f"![output of the cell above]({name})"]
    link = f"[Download this notebook]({path.name}){{: download }}"
    return {f"tutorials/{path.stem}.md": "\n\n".join([page[0], link, *page[1:]]), **images}


def flags_page():
    """Return the tables of all flags, by command in the order of the pipeline and by group."""
    lines = ["# Commands and flags", "", "A command is `gdvae NAME` or `python scripts/NAME.py`. Flags are also keys",
             "of `--config FILE.yaml`, in the section of their group. Essential flags are bold.", ""]
    for heading, names in COMMANDS.items():
        lines += [f"## {heading.capitalize()}", ""]
        for name in names:
            parser = importlib.import_module(f"guided_diffusion_vae.commands.{name}").main.argparser()
            lines += [f"### {spell(name)}", "", summarize(name), ""]
            for group in parser._action_groups:
                actions = [action for action in group._group_actions if action.option_strings]
                if actions and group.title != "options":
                    lines += [f'??? note "{group.title}: {len(actions)} flags"', "",
                              "    | flag | value | default | meaning |", "    |---|---|---|---|"]
                    lines += [f"    {flag_row(action, action in parser.essential)}" for action in actions]
                    lines += [""]
    return "\n".join(lines)


def flag_row(action, essential):
    """Return one row of a table of flags."""
    flag, default = f"`{action.option_strings[-1]}`", action.default
    if isinstance(default, tuple):
        default = json.dumps(default) if default else ""
    cells = [f"**{flag}**" if essential else flag, f"`{escape(action.metavar or '')}`",
             "" if default in ("", None) else f"`{default}`", escape(action.help.replace("%%", "%"))]
    return f"| {' | '.join(cells)} |"


def escape(text):
    """Return the text of a table cell, in which HTML, Markdown and column separators are escaped."""
    return text.replace("<", "&lt;").replace("*", "&#42;").replace("|", "&#124;")


def api_page(room, title):
    """Return the modules of a room, whose documentation mkdocstrings inserts."""
    package = guided_diffusion_vae if room == "top" else importlib.import_module(f"guided_diffusion_vae.{room}")
    names = [module.name for module in pkgutil.iter_modules(package.__path__, f"{package.__name__}.")
             if not module.ispkg and not module.name.endswith("__main__")]
    return "\n".join([f"# {title}", "", *(f"::: {name}\n" for name in names)])
