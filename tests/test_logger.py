import csv
import io
import json
import os
import re
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from guided_diffusion_vae import logger
from guided_diffusion_vae.logger import CSVOutputFormat, JSONOutputFormat, Logger, TensorBoardOutputFormat
from forks import FORKS
from launches import Launches

ROOT = Path(__file__).parents[1]


@pytest.fixture(autouse=True)
def default_environment(monkeypatch, tmp_path):
    for name in ("OPENAI_LOGDIR", "OPENAI_LOG_FORMAT", "OPENAI_LOG_FORMAT_MPI"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.chdir(tmp_path)
    yield
    logger.reset()


def read_rows(path):
    with open(path, newline="") as stream:
        return list(csv.DictReader(stream))


def test_dumpkvs_returns_and_clears_means_and_values():
    logger.configure("run", [])
    for value in (1, 2, 6):
        logger.logkv_mean("loss", value)
    logger.logkv("step", 1)
    logger.logkvs({"step": 7, "name": "x"})
    assert logger.getkvs() == {"loss": 3.0, "step": 7, "name": "x"}
    assert logger.dumpkvs() == {"loss": 3.0, "step": 7, "name": "x"}
    assert logger.getkvs() == {} and logger.dumpkvs() == {}


def test_logkv_mean_averages_tensors_without_reading_them():
    logger.configure("run", [])
    leaf = torch.tensor(1.0, requires_grad=True)
    logger.logkv_mean("loss", leaf * 2)
    logger.logkv_mean("loss", torch.tensor([4.0], dtype=torch.bfloat16))
    logger.logkv_mean("loss", 6.0)
    # A tensor on the meta device has no values: reading it would fail.
    logger.logkv_mean("unread", torch.ones((), device="meta"))
    logger.logkv_mean("unread", torch.ones((), device="meta"))
    del logger.get_current()._pending_values["unread"]
    assert logger.dumpkvs() == {"loss": 4.0}


def test_logkv_mean_is_weighted_and_omits_names_without_weight():
    logger.configure("run", [])
    for value, weight in ((1.0, 3), (9.0, 0), (5.0, 1)):
        logger.logkv_mean("plain", value, weight=weight)
        logger.logkv_mean("tensor", torch.tensor(value), weight=torch.tensor(float(weight)))
        logger.logkv_mean("nothing", value, weight=torch.tensor(0.0))
    assert logger.dumpkvs() == {"plain": 2.0, "tensor": 2.0}


def test_logkv_mean_discards_a_value_that_was_set():
    logger.configure("run", [])
    logger.logkv("loss", 100.0)
    logger.logkv_mean("loss", 1.0)
    logger.logkv_mean("loss", 2.0)
    assert logger.getkvs() == {"loss": 1.5}


def test_logging_tensors_launches_no_kernel_before_the_dump():
    logger.configure("run", [])
    loss, weight = torch.tensor([2.0]), torch.tensor(3)
    with Launches() as launches:
        logger.logkv("a", loss)
        logger.logkv_mean("b", loss, weight)
        logger.logkv_mean("b", loss * 2, 1)
    assert launches.total == 1      # the product
    assert logger.getkvs() == {"a": 2.0, "b": 2.5}


def test_logkv_mean_rejects_tensors_of_several_elements():
    with pytest.raises(ValueError, match=r"'loss': expected a tensor of one element, got shape \(2,\); log .*mean\(\)"):
        logger.logkv_mean("loss", torch.zeros(2))


def test_csv_adds_columns_for_new_names(tmp_path):
    out = CSVOutputFormat(tmp_path / "progress.csv")
    out.writekvs({"step": 1, "loss": 0.5})
    out.writekvs({"step": 2, "loss": np.float32(0.25), "grad, norm": 3.0})
    out.writekvs({"grad, norm": 4.0})
    out.close()
    assert (tmp_path / "progress.csv").read_text() == 'loss,step,"grad, norm"\n0.5,1,\n0.25,2,3.0\n,,4.0\n'
    assert os.listdir(tmp_path) == ["progress.csv"]


@pytest.mark.parametrize("kind, name", [(CSVOutputFormat, "p.csv"), (JSONOutputFormat, "p.json")])
def test_rows_are_written_to_disk_immediately(tmp_path, kind, name):
    out = kind(tmp_path / name)
    for step in range(3):
        out.writekvs({"step": step})
        assert (tmp_path / name).read_text().count("\n") == step + 1 + (kind is CSVOutputFormat)
    out.close()


def test_resumed_table_has_every_step_once(tmp_path):
    path = tmp_path / "progress.csv"
    path.write_text("step,loss\n10,0.5\n20,0.4\n30,0.3\n40,0.")          # killed while writing step 40
    out = CSVOutputFormat(path, resume_step=20)
    out.writekvs({"step": 30, "loss": 0.35, "extra": 1})
    out.close()
    assert path.read_text() == "step,loss,extra\n10,0.5,\n20,0.4,\n30,0.35,1\n"
    path = tmp_path / "progress.json"
    path.write_text('{"step": 10}\n{"step": 20}\n{"step": 30}\n{"st')
    out = JSONOutputFormat(path, resume_step=20)
    out.writekvs({"step": 30, "loss": np.float64(1)})
    out.close()
    assert [json.loads(line) for line in path.read_text().splitlines()] == [
        {"step": 10}, {"step": 20}, {"step": 30, "loss": 1.0}]


def test_resuming_without_a_table_creates_one_and_a_new_run_overwrites_it(tmp_path):
    path = tmp_path / "progress.csv"
    for resume_step, step in ((5, 6), (None, 1)):
        out = CSVOutputFormat(path, resume_step=resume_step)
        out.writekvs({"step": step})
        out.close()
        assert path.read_text() == f"step\n{step}\n"


def test_configure_writes_the_reference_files(capsys):
    logger.configure("run", ["stdout", "log", "csv", "json"])
    logger.logkv("step", 123456)
    logger.logkv("Loss", 0.123456)
    logger.dumpkvs()
    logger.info("hello", 3)
    assert sorted(os.listdir("run")) == ["log.txt", "progress.csv", "progress.json"]
    text = Path("run/log.txt").read_text()
    assert re.search(r"\| Loss +\| 0\.1235 +\|\n\| step +\| 123456 +\|", text) and "hello 3\n" in text
    assert capsys.readouterr().out == text
    assert read_rows("run/progress.csv") == [{"Loss": "0.123456", "step": "123456"}]


def test_configure_resuming_appends_to_the_log(tmp_path):
    for _ in range(2):
        logger.configure("run", ["log"], resume_step=3)
    assert Path("run/log.txt").read_text().count("Logging to run") == 2


@pytest.mark.parametrize("resume_step", [None, 1])
def test_configure_without_rows_leaves_existing_curves_unchanged(resume_step):
    for step in (1, 2):
        logger.configure("run", ["csv", "json"], resume_step=step - 1 or None)
        logger.logkv("step", step)
        logger.dumpkvs()
    before = [Path(f"run/progress.{kind}").read_text() for kind in ("csv", "json")]
    logger.configure("run", ["csv", "json"], resume_step=resume_step)
    logger.reset()
    assert [Path(f"run/progress.{kind}").read_text() for kind in ("csv", "json")] == before


def test_letters_that_a_terminal_or_file_cannot_show_are_escaped(monkeypatch):
    terminal = io.TextIOWrapper(io.BytesIO(), encoding="cp1252")
    monkeypatch.setattr(sys, "stdout", terminal)
    logger.configure("run", ["stdout", "log"])
    logger.log("Fréchet 距離 \udcff.png")
    terminal.seek(0)
    assert r"Fréchet \u8ddd\u96e2 \udcff.png" in terminal.read()
    assert r"Fréchet 距離 \udcff.png" in Path("run/log.txt").read_text("utf-8")


def test_configure_reads_folder_and_formats_from_the_environment(monkeypatch):
    monkeypatch.setenv("OPENAI_LOGDIR", "from_env")
    monkeypatch.setenv("OPENAI_LOG_FORMAT", "json")
    logger.configure()
    assert logger.get_dir() == "from_env" and os.listdir("from_env") == ["progress.json"]


def test_configure_default_folder_is_named_by_script_and_unique(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["scripts/image_train.py"])
    monkeypatch.setenv("OPENAI_LOG_FORMAT", "stdout")
    folders = []
    for _ in range(3):
        logger.configure()
        folders.append(logger.get_dir())
        assert re.fullmatch(r"runs/image_train-\d{4}(-\d\d){5}(-\d)?", folders[-1])
    assert len(set(folders)) == 3 and sorted(os.listdir("runs")) == sorted(f[5:] for f in folders)
    assert capsys.readouterr().out.startswith("Logging to runs/image_train-")


def test_logger_before_configure_writes_nothing_to_disk(capsys):
    logger.reset()
    logger.log("hello")
    logger.logkv("loss", 1.0)
    logger.dumpkvs()
    assert "hello" in (printed := capsys.readouterr().out) and "loss" in printed
    assert logger.get_dir() is None and os.listdir() == []


def test_set_level_suppresses_messages(capsys):
    logger.configure("run", ["stdout"])
    logger.debug("no")
    logger.set_level(logger.WARN)
    logger.info("no")
    logger.warn("yes")
    logger.error("yes")
    logger.set_level(logger.DISABLED)
    logger.error("no")
    logger.logkv("no", 1)
    logger.dumpkvs()
    assert capsys.readouterr().out == "Logging to run\nyes\nyes\n"


def test_scoped_configure_restores_the_outer_logger():
    logger.configure("outer", ["csv"])
    logger.logkv("loss", 1)
    with logger.scoped_configure("inner", ["csv"]):
        logger.logkv("loss", 2)
        logger.dumpkvs()
    assert logger.get_dir() == "outer" and logger.getkvs() == {"loss": 1}
    logger.dumpkvs()
    assert read_rows("inner/progress.csv") == [{"loss": "2"}] and read_rows("outer/progress.csv") == [{"loss": "1"}]


def test_profile_sums_seconds():
    logger.configure("run", [])

    @logger.profile("work")
    def work(value):
        return value + 1

    assert work(1) == 2
    once = logger.getkvs()["wait_work"]
    with logger.profile_kv("work"):
        pass
    assert logger.getkvs()["wait_work"] > once > 0


def test_configure_rejects_unknown_formats():
    expected = "unknown log format 'cvs': expected one of: stdout, log, json, csv, tensorboard"
    with pytest.raises(ValueError, match=expected):
        logger.configure("run", ["cvs"])


def test_tensorboard_writes_numbers_at_their_step(tmp_path):
    events = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    out = TensorBoardOutputFormat(str(tmp_path))
    out.writekvs({"step": 40, "loss": 0.5, "name": "x"})
    out.close()
    out = TensorBoardOutputFormat(str(tmp_path), resume_step=30)        # step 40 is written again
    out.writekvs({"step": 40, "loss": 0.25})
    out.close()
    content = events.EventAccumulator(str(tmp_path)).Reload()
    assert sorted(content.Tags()["scalars"]) == ["loss", "step"]
    assert [(event.step, event.value) for event in content.Scalars("loss")] == [(40, 0.25)]


def test_tensorboard_shows_images_and_histograms_at_their_step(tmp_path):
    events = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    logger.configure(str(tmp_path), ["csv", "tensorboard"])
    logger.logimage("preview", Image.new("L", (6, 4), 128), 40)
    logger.loghistogram("weights", [torch.tensor([[1.0, 2.0]], requires_grad=True), torch.full((5,), 3.0)], 40)
    logger.loghistogram("none", [], 40)
    logger.set_level(logger.DISABLED)
    logger.logimage("hidden", Image.new("L", (6, 4)), 41)
    logger.reset()
    content = events.EventAccumulator(str(tmp_path)).Reload()
    assert content.Tags()["images"] == ["preview"] and content.Tags()["histograms"] == ["weights"]
    image, histogram = content.Images("preview")[0], content.Histograms("weights")[0]
    assert (image.step, image.width, image.height) == (40, 6, 4)
    values = histogram.histogram_value
    assert (histogram.step, values.num, values.min, values.max, values.sum) == (40, 7, 1, 3, 18)


def test_loghistogram_reads_evenly_spaced_elements_of_the_tensors(monkeypatch):
    monkeypatch.setattr(logger, "HISTOGRAM_VALUES", 4)
    recorder = Recorder()
    monkeypatch.setattr(logger.Logger, "CURRENT", Logger("run", [recorder]))
    logger.loghistogram("weights", [torch.arange(6), torch.arange(10, 13)], 7)
    assert recorder.histograms == [("weights", [0, 3, 10], 7)]


class Recorder(logger.MediaWriter):
    """Format that records histograms."""

    def __init__(self):
        self.histograms = []

    def writehistogram(self, key, values, step):
        self.histograms.append((key, values.tolist(), step))

    def close(self):
        pass


class FakeWandb(types.ModuleType):
    """Stand-in for the package wandb: records the runs and what they log; with `error`, they cannot be started."""

    Image, Histogram, Settings = (staticmethod(lambda value=None, **fields: (value, fields)) for _ in range(3))

    def __init__(self, error=None):
        super().__init__("wandb")
        self.error, self.started, self.rows, self.finished = error, [], [], 0

    def init(self, **settings):
        self.started.append(settings)
        if self.error:
            raise self.error
        return types.SimpleNamespace(id=settings["id"] or "abc", log=self.rows.append, finish=self.finish,
                                     define_metric=lambda name, step_metric: self.rows.append((name, step_metric)))

    def finish(self):
        self.finished += 1


def test_wandb_receives_rows_images_and_histograms_and_continues_its_run(tmp_path, monkeypatch):
    package = FakeWandb()
    monkeypatch.setitem(sys.modules, "wandb", package)
    (tmp_path / "config.json").write_text('{"flags": {"training": {"lr": 0.1}}}')
    image = Image.new("L", (6, 4))
    logger.configure(str(tmp_path), ["wandb"])
    assert not package.started      # a command that fails before its first row starts no run
    logger.logkvs({"step": 3, "loss": 0.5, "name": "x"})
    logger.dumpkvs()
    logger.logimage("preview", image, 4)
    logger.loghistogram("weights", [torch.ones(2)], 4)
    logger.reset()
    assert package.rows[:3] == [("*", "step"), {"step": 3, "loss": 0.5}, {"preview": (image, {}), "step": 4}]
    assert package.rows[3]["weights"][0].tolist() == [1, 1] and package.finished == 1
    logger.configure(str(tmp_path), ["wandb"], resume_step=3)
    logger.logkv("step", 4)
    logger.dumpkvs()
    logger.configure(str(tmp_path), ["wandb"])
    logger.logkv("step", 1)
    logger.dumpkvs()
    assert [(run["id"], run["resume"]) for run in package.started] == [(None, None), ("abc", "allow"), (None, None)]
    assert package.started[0]["dir"] == str(tmp_path) and package.started[0]["config"] == {"training": {"lr": 0.1}}


def test_wandb_that_cannot_start_is_attempted_and_reported_once(tmp_path, monkeypatch, capsys):
    package = FakeWandb(OSError("no connection"))
    monkeypatch.setitem(sys.modules, "wandb", package)
    logger.configure(str(tmp_path), ["stdout", "wandb"])
    for step in (1, 2):
        logger.logkv("step", step)
        assert logger.dumpkvs() == {"step": step}
        logger.logimage("preview", Image.new("L", (6, 4)), step)
    logger.reset()
    assert len(package.started) == 1
    assert capsys.readouterr().out.count("log format wandb cannot be written") == 1


@pytest.mark.parametrize("name", ["wandb", "tensorboard"])
def test_format_without_its_package_is_rejected(tmp_path, monkeypatch, name):
    monkeypatch.setitem(sys.modules, {"wandb": "wandb", "tensorboard": "torch.utils.tensorboard"}[name], None)
    with pytest.raises(ImportError, match=f"log format {name} requires the package {name}.*or --log_formats"):
        logger.configure(str(tmp_path), [name])


def test_configure_other_ranks_write_their_own_log(monkeypatch):
    monkeypatch.setattr(logger.dist_util, "rank", lambda: 2)
    logger.configure("run", ["stdout", "log", "csv"], log_suffix="-a")
    assert os.listdir("run") == ["log-a-rank002.txt"]


def test_configure_unconnected_ranks_require_a_folder(monkeypatch):
    monkeypatch.setattr(logger.dist_util, "world_size", lambda: 2)
    with pytest.raises(RuntimeError, match="setup_dist"):
        logger.configure()


def test_dumpkvs_weights_means_of_ranks(monkeypatch):
    other_rank = {"loss": (6.0, 1), "only": (5.0, 2), "step": (7, 1), "name": ("y", 1)}
    monkeypatch.setattr(logger.dist, "is_initialized", lambda: True)
    monkeypatch.setattr(logger.dist_util, "gather_objects", lambda item: [item, other_rank])
    for comm, loss in ((None, 3.0), (False, 2.0)):
        local = Logger("run", [], comm)
        for value in (1.0, 2.0, 3.0):
            local.logkv_mean("loss", value)
        local.logkv("step", 7)
        local.logkv("name", "x")
        assert local.dumpkvs() == {"loss": loss, "step": 7, "name": "x"} | ({"only": 5.0} if comm is None else {})


def test_two_ranks_share_folder_and_means(tmp_path):
    script = """
import torch
from guided_diffusion_vae import dist_util, logger
def main():
    dist_util.setup_dist()
    logger.configure()
    logger.logkv_mean("loss", torch.tensor(1.0 + dist_util.rank()))
    logger.logkv("step", 4)
    assert logger.dumpkvs() == {"loss": 1.5, "step": 4}
dist_util.launch(main)
"""
    environ = os.environ | {"OPENAI_LOG_FORMAT": "log,csv"}
    process = FORKS.run_source(script, ranks=2, environ=environ, cwd=tmp_path)
    assert process.returncode == 0, process.stderr
    folder, = (tmp_path / "runs").iterdir()
    assert sorted(os.listdir(folder)) == ["log-rank001.txt", "log.txt", "progress.csv"]
    assert read_rows(folder / "progress.csv") == [{"loss": "1.5", "step": "4"}]


def test_disk_without_space_is_reported_once_and_by_the_other_formats(tmp_path, capsys):
    if not os.path.exists("/dev/full"):
        pytest.skip("no /dev/full")
    full = logger.HumanOutputFormat("/dev/full")
    table = CSVOutputFormat(tmp_path / "progress.csv")
    Logger.CURRENT = Logger("run", [full, logger.HumanOutputFormat(sys.stdout), table])
    for step in (1, 2):
        logger.log(f"step {step}")
        logger.logkv("step", step)
        assert logger.dumpkvs() == {"step": step}
    logger.reset()
    out = capsys.readouterr().out
    assert out.startswith("log format log cannot be written to run (OSError: [Errno 28] No space left on device); the "
                          "run continues without these lines, and later failures are not reported: free some space")
    assert out.count("cannot be written") == 1 and "step 1\n" in out and "step 2\n" in out
    assert read_rows(tmp_path / "progress.csv") == [{"step": "1"}, {"step": "2"}]


def test_only_log_that_fails_is_reported_on_stderr(capsys):
    class Broken(logger.KVWriter):
        def writekvs(self, kvs):
            raise RuntimeError("closed")

    alone = Logger("run", [Broken()])
    alone.dumpkvs(), alone.dumpkvs()
    assert capsys.readouterr().err.count("log format custom cannot be written to run (RuntimeError: closed)") == 1


def test_quiet_block_writes_files_and_turns_warnings_into_those_of_python(tmp_path, capfd):
    logger.configure(str(tmp_path), ["stdout", "log"])
    capfd.readouterr()
    with logger.quiet():
        logger.log("a message")
        with pytest.warns(UserWarning, match="^a warning$"):
            logger.warn("a warning")
        logger.logkv("loss", 1.5)
        logger.dumpkvs()
        with logger.progress_bar(3, 0, "training") as bar:
            bar.update()
    assert capfd.readouterr() == ("", "")
    assert all(text in (tmp_path / "log.txt").read_text() for text in ("a message", "a warning", "1.5"))
    logger.warn("another")
    assert capfd.readouterr().out == "another\n"
