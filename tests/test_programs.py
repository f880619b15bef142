"""The program `gdvae`: commands, help, names of programs in messages, configurations by name, tab completion."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy
import pytest

from guided_diffusion_vae import __main__ as program, __version__, dist_util
from guided_diffusion_vae.programs import NAMES, call_as_started, summarize
from guided_diffusion_vae.runs.configs import ModelConfig
from guided_diffusion_vae.runs.flags import parse, shipped_configs

ROOT = Path(__file__).parents[1]
SCRIPT = """\
from guided_diffusion_vae.commands.{0} import create_argparser, main

if __name__ == "__main__":
    main.launch()
"""


@pytest.fixture
def gdvae(monkeypatch, capsys):
    """Run `gdvae` with these words in this process; return (exit status, standard output, standard error)."""
    def call(*words, start="/usr/bin/gdvae"):
        monkeypatch.setattr(sys, "argv", [start, *map(str, words)])
        monkeypatch.setattr(dist_util, "_active_rank_info", None)
        status = 0
        try:
            program.main()
        except SystemExit as stop:
            status = stop.code
        return (status, *capsys.readouterr())
    return call


def test_every_command_is_listed_once_and_has_a_script_without_a_body():
    files = sorted(path.stem for path in (ROOT / "guided_diffusion_vae" / "commands").glob("*.py"))
    assert files == sorted(["__init__", *NAMES])
    assert {path.stem: path.read_text() for path in (ROOT / "scripts").glob("*.py")} == {
        name: SCRIPT.format(name) for name in NAMES}


def test_help_lists_the_commands_in_the_order_of_the_pipeline(gdvae):
    status, page, _ = gdvae()
    assert status == 0 and page == gdvae("--help")[1] and max(map(len, page.splitlines())) <= 120
    assert re.findall(r"^  ([\w-]+) +([A-Z].+)$", page, re.M)[:3] == [
        (name, summarize(name.replace("-", "_"))) for name in ("make-microdoppler", "make-spectrograms", "plan-memory")]
    places = [page.index(f"  {name} ") for name in ("train-autoencoder", "encode-dataset", "image-train-vae",
                                                    "image-sample-vae", "evaluate")]
    assert places == sorted(places) and gdvae("--version")[1] == f"gdvae {__version__}\n"


def test_list_of_commands_does_not_import_torch():
    source = ("import sys; sys.argv = ['gdvae', '--help']; from guided_diffusion_vae.__main__ import main; main(); "
              "sys.exit('torch' in sys.modules or 'numpy' in sys.modules)")
    assert subprocess.run([sys.executable, "-c", source], cwd=ROOT, stdout=subprocess.DEVNULL).returncode == 0


@pytest.mark.parametrize("word, end", [
    ("image-sampel-vae", "did you mean 'image-sample-vae'?"), ("evaluate.py", "did you mean 'evaluate'?"),
    ("xyz", "expected one of: augmentation-study, "),
])
def test_unknown_command_names_the_nearest(gdvae, word, end):
    status, _, error = gdvae(word)
    assert status == 2 and error.startswith(f"error: unknown command '{word}'; ") and end in error
    assert error.endswith("(gdvae --help lists all commands)\n")


@pytest.mark.parametrize("start, name, called", [
    ("/usr/bin/gdvae", "gdvae image-sample-vae", "mpiexec -n 2 gdvae image-sample-vae --model_path"),
    ("/lib/guided_diffusion_vae/__main__.py", "python -m guided_diffusion_vae image-sample-vae",
     "mpiexec -n 2 python -m guided_diffusion_vae image-sample-vae --model_path"),
])
def test_help_of_a_command_names_the_program_that_was_started(gdvae, start, name, called):
    for word in "image-sample-vae", "image_sample_vae":
        status, page, _ = gdvae(word, "--help", start=start)
        assert status == 0 and page.startswith(f"usage: {name} [--config") and called in page
        assert "run of image-train-vae, or" in page and ".py" not in page


def test_help_of_a_script_names_the_script(call):
    page = call("image_sample_vae", help="")[1]
    assert page.startswith("usage: image_sample_vae.py ") and "python scripts/image_sample_vae.py --model_path" in page


def test_errors_name_the_program_that_was_started(gdvae, call, tmp_path):
    numpy.save(tmp_path / "latents-00000-of-00001.npy", numpy.zeros([2, 4, 8, 8]))  # without its manifest
    status, _, error = gdvae("image-train-vae", "--cache_dir", tmp_path)
    assert status == 1 and "run gdvae encode-dataset again" in error
    status, _, error = call("image_train_vae", cache_dir=tmp_path)
    assert status == 1 and "run scripts/encode_dataset.py again" in error
    assert call_as_started("my_evaluate.py") == "my_evaluate.py"


# --- Configurations by name ---


def test_configuration_of_the_package_is_found_by_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    read = lambda name: parse("", ModelConfig, argv=["--config", name])[0]
    assert read("microdoppler_small") == read(str(ROOT / "configs" / "microdoppler_small.yaml")) != ModelConfig()
    assert read("volumes/low") == read("configs/volumes/low.yaml") == read(str(ROOT / "configs/volumes/low.yaml"))
    assert len(shipped_configs()) == len(list((ROOT / "configs").rglob("*.yaml")))


def test_existing_file_wins_over_a_configuration_of_the_package(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("quickstart").write_text("data: {image_size: 24}\nmodel: {num_channels: 24}")
    assert parse("", ModelConfig, argv=["--config", "quickstart"])[0].num_channels == 24


def test_unknown_configuration_lists_those_of_the_package():
    with pytest.raises(FileNotFoundError, match=r"^small does not exist; check --config, or .*quickstart, volumes/ext"):
        parse("", ModelConfig, argv=["--config", "small"])


# --- Completion ---


@pytest.mark.skipif(not shutil.which("bash"), reason="no bash")
def test_bash_completes_commands_flags_and_values(gdvae):
    status, script, _ = gdvae("completion", "bash")
    typed = {"image-t": "image-train-vae image-train", "evaluate --tstr": "--tstr_iterations --tstr_batch_size",
             "image_sample_vae --sampler eu": "euler", "image-train --config quick": "quickstart",
             "image-train --fsdp T": "True", "image-train --data_dir D": ""}
    lines = [f"COMP_WORDS=(gdvae {words}); COMP_CWORD={len(words.split())}; _gdvae; echo ${{COMPREPLY[*]}}"
             for words in typed]
    done = subprocess.run(["bash", "-c", "\n".join([script, *lines])], capture_output=True, text=True)
    assert (status, done.stderr) == (0, "") and done.stdout.splitlines() == list(typed.values())


def test_completion_of_another_shell_is_rejected(gdvae):
    assert gdvae("completion", "csh")[0] == "error: no completion for 'csh': expected bash; gdvae completion bash"


@pytest.mark.parametrize("interrupted", ["autoencoder", "diffusion", "classifier", None])
def test_quickstart_ends_after_an_interrupted_training(tmp_path, interrupted):
    """The programs are replaced by one that records its words, and a training that was sent SIGTERM ends with 0."""
    (tmp_path / "scripts").mkdir()
    (tmp_path / "bin").mkdir()
    shutil.copyfile(ROOT / "scripts" / "quickstart.sh", tmp_path / "scripts" / "quickstart.sh")
    fake = tmp_path / "bin" / "python"
    fake.write_text(f"""#!/bin/sh
echo "$*" >> calls.txt
while [ "$1" != --logdir ] && [ $# -gt 0 ]; do shift; done
[ $# -gt 0 ] || exit 0
mkdir -p "$2"
[ "$2" != quickstart/{interrupted} ] || echo "received a termination signal, saved step 3; rerun" >> "$2/log.txt"
echo "the last line" >> "$2/log.txt"
""")
    fake.chmod(0o755)
    shutil.copy(fake, tmp_path / "bin" / "mpiexec")
    done = subprocess.run(["bash", tmp_path / "scripts" / "quickstart.sh"], capture_output=True, text=True, timeout=60,
                          env={**os.environ, "PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}"})
    last = (tmp_path / "calls.txt").read_text().splitlines()[-1]
    if interrupted is None:
        assert done.returncode == 0 and last.startswith("- quickstart/evaluation/metrics.json")
    else:
        assert done.returncode == 143 and last.endswith(f"--logdir quickstart/{interrupted}")
        assert f"error: training into quickstart/{interrupted} was interrupted" in done.stderr
