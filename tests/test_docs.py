"""The documentation: links lead to files and headings that exist, and commands parse with flags that exist."""

import ast
import functools
import importlib
import re
import shlex
from pathlib import Path

import pytest

from guided_diffusion_vae.programs import NAMES, spell
from guided_diffusion_vae.runs.flags import parse_explicit

ROOT = Path(__file__).parents[1]
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")])
CONFIGS = sorted((ROOT / "configs").rglob("*.yaml"))
COMMANDS = [ROOT / "guided_diffusion_vae" / "commands" / f"{name}.py" for name in NAMES]
FENCED = re.compile(r"^ *```.*?^ *```", re.DOTALL | re.MULTILINE)
PLACEHOLDERS = {"LOW,HIGH": "0,1", "N": "8"}
# Flags of launchers in the text.
OTHER_PROGRAMS = {"--gpus-per-task", "--nproc_per_node", "--shutdown-timeout", "--signal", "--signals-to-handle"}
PROGRAM = re.compile(r"(?:scripts/)?(\w+)\.py$|(benchmarks/\w+\.py)$")


def heading_anchors(text):
    """Return the anchors of the headings of a page, as GitHub and the site form them."""
    headings = re.findall(r"^#+ (.+)$", FENCED.sub("", text), re.MULTILINE)
    plain = (re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", heading).lower() for heading in headings)
    return {re.sub(r"[^\w\- ]", "", heading).replace(" ", "-") for heading in plain}


def dead_links(page):
    """Return the relative links of a page to files or headings that do not exist."""
    dead = []
    for link in re.findall(r"\]\(([^)\s]+)\)", FENCED.sub("", page.read_text())):
        name, _, anchor = link.partition("#")
        target = page.parent / name if name else page
        exists = target.exists() and (not anchor or anchor in heading_anchors(target.read_text()))
        if not exists and "://" not in link:
            dead.append(link)
    return dead


def shell_text(path):
    """Return the shell text of a file: code of a page, indented lines of a docstring or a YAML header."""
    text = path.read_text()
    if path.suffix == ".md":
        code = [block.strip("` \n").removeprefix("sh\n") for block in FENCED.findall(text)]
        return "\n".join([*code, *re.findall(r"`([^`\n]+)`", FENCED.sub("", text))])
    if path.suffix == ".py":
        return "\n".join(re.findall(r"^    .+", ast.get_docstring(ast.parse(text), clean=False), re.MULTILINE))
    return "\n".join(re.findall(r"^# {3,}(.+)", text, re.MULTILINE))


def commands(text):
    """Return [(command of the pipeline or path of a benchmark, its arguments)] of shell text, variables replaced."""
    variables, found = {}, []
    replaced = lambda text: re.sub(r"\$(\w+)", lambda name: variables.get(name[1], name[0]), text)
    for line in re.sub(r"\\\n\s*", "", text).splitlines():
        for name, quoted, plain in re.findall(r'\b([A-Z_]+)=(?:"([^"]*)"|([^\s";]+))', line):
            variables[name] = replaced(quoted or plain)
        lexer = shlex.shlex(replaced(line), posix=True, punctuation_chars=True)
        lexer.whitespace_split = True
        try:
            words = list(lexer)
        except ValueError:
            continue    # not shell, but code with an apostrophe
        arguments = None
        for before, word in zip(["", *words], words):
            program = PROGRAM.search(word)
            if program and (program[1] in NAMES or program[2]):
                found.append((program[1] or program[2], arguments := []))
            elif before in ("gdvae", "guided_diffusion_vae") and word.replace("-", "_") in NAMES:
                found.append((word.replace("-", "_"), arguments := []))
            elif re.fullmatch(r"[;&|<>()]+", word):
                arguments = None
            elif arguments is not None and re.fullmatch(r"…|\.\.\.|\$\w+", word):
                del arguments[len(arguments) - before.startswith("--"):]    # a value that is left open, with its flag
            elif arguments is not None:
                arguments.append(re.sub(r"\bLOW,HIGH$|^N$", lambda name: PLACEHOLDERS[name[0]], word))
    return found


@functools.cache
def command_main(name):
    return importlib.import_module(f"guided_diffusion_vae.commands.{name}").main


@functools.cache
def names_in(benchmark):
    """Return the words of the code of a benchmark, among which the fields of its configuration are."""
    source = (ROOT / benchmark).read_text()
    return set(re.findall(r"\w+", source.replace(ast.get_docstring(ast.parse(source), clean=False), "")))


def fault(name, arguments, capsys):
    """Return the error message of a command line, "" if its flags and values exist."""
    if name not in NAMES:
        flags = [word.split("=")[0] for word in arguments if re.match(r"--\S+$", word)]     # not a text of flags
        return ", ".join(flag for flag in flags if flag[2:] not in names_in(name))
    try:
        parse_explicit(*command_main(name).argparser.args, argv=arguments)
    except SystemExit:
        return capsys.readouterr().err
    except (ValueError, OSError) as error:
        return str(error)
    return ""


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_links_of_a_page_lead_to_files_and_headings(page):
    assert dead_links(page) == []


@pytest.mark.parametrize("path", [*PAGES, *CONFIGS, *COMMANDS], ids=lambda path: path.relative_to(ROOT).as_posix())
def test_commands_of_a_file_parse(path, capsys, monkeypatch):
    monkeypatch.chdir(ROOT)
    faults = [f"{spell(name)} {' '.join(arguments)}: {message}" for name, arguments in commands(shell_text(path))
              if (message := fault(name, arguments, capsys))]
    assert faults == []


def test_flags_in_the_text_of_pages_exist():
    known = {flag for name in NAMES for flag in command_main(name).argparser().words}
    own = {f"--{word}" for path in [*(ROOT / "benchmarks").glob("*.py"), ROOT / "tests" / "campaign.py"]
           for word in names_in(path)}
    unknown = {(page.name, flag) for page in PAGES if page.name != "CHANGELOG.md"   # which has former flags, too
               for flag in re.findall(r"(?<![\w-])--[a-z][\w-]*", page.read_text())} - OTHER_PROGRAMS
    assert {flag for _, flag in unknown} - known - own - OTHER_PROGRAMS == set()


def test_site_has_every_page():
    listed = re.findall(r": (\S+\.md)$", (ROOT / "mkdocs.yml").read_text(), re.MULTILINE)
    pages = [path.relative_to(ROOT / "docs").as_posix() for path in PAGES if ROOT / "docs" in path.parents]
    assert set(pages) - set(listed) == set()


def test_readme_is_short():
    assert len((ROOT / "README.md").read_text().splitlines()) <= 120    # the rest belongs into docs/


def test_docstrings_contain_no_html_tags():
    """A browser would run or hide them in the pages of the Python reference."""
    kinds = (ast.Module, ast.ClassDef, ast.FunctionDef)
    tags = {(path.name, tag) for path in (ROOT / "guided_diffusion_vae").rglob("*.py") if path not in COMMANDS
            for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, kinds)
            for tag in re.findall(r"<[a-zA-Z][\w-]*>", re.sub(r"`[^`]*`", "", ast.get_docstring(node) or ""))}
    assert tags == set()


def test_faults_of_pages_are_found(tmp_path, capsys):
    page = tmp_path / "page.md"
    page.write_text("# A *b* [c](d.md): e\n[1](#a-b-c-e) [2](#f) [3](page.md#a-b-c-e) [4](https://x/y)\n"
                    "```sh\n# [5](g)\n```\n")
    assert dead_links(page) == ["d.md", "#f"]
    text = """C="--config configs/quickstart.yaml"
mpiexec -n 2 python scripts/evaluate.py $C --samples A --logdir … | tee x
gdvae image-train --lr 1 \\
    --steps 2 && python benchmarks/loader.py --lr 3
"""
    assert commands(text) == [
        ("evaluate", ["--config", "configs/quickstart.yaml", "--samples", "A"]),
        ("image_train", ["--lr", "1", "--steps", "2"]), ("benchmarks/loader.py", ["--lr", "3"])]
    assert "unrecognized arguments: --steps" in fault("image_train", ["--lr", "1", "--steps", "2"], capsys)
    assert "max_steps must be" in fault("image_train", ["--max_steps", "-1"], capsys)
    assert fault("benchmarks/loader.py", ["--lr", "3"], capsys) == "--lr"
