"""Fault campaign: interrupt scripts and corrupt files at random, and compare with undisturbed runs.

    python tests/campaign.py                                                        # short; part of the tests
    python tests/campaign.py --kills 300 --flips 2000 --mutations 40000 --others 70 --ranks 40 --seed 1
    python tests/campaign.py --only kills/train#17 --seed 1                         # one case again

A case is named kind/target#index. Its random choices follow from the seed and that name alone; the moments of signals
are times, which a loaded machine stretches. Scripts of one process run in forks of this one, which has imported torch
but computes nothing with it.
"""

import argparse
import collections
import contextlib
import functools
import importlib.util
import json
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
import uuid
from pathlib import Path
from typing import NamedTuple

os.environ.update(OMP_NUM_THREADS="1", OPENBLAS_NUM_THREADS="1", OMP_WAIT_POLICY="PASSIVE",
                  CUDA_VISIBLE_DEVICES="")   # bits are promised on CPUs

import numpy as np
import yaml
from PIL import Image

from corruption import FLIPS, HANG_S, MUTATIONS, MUTATORS, Failure, corrupt_all, flip_bit, fork, keyed_rng, require
from corruption import write_formats
from guided_diffusion_vae import dist_util

ROOT = Path(__file__).parents[1]
ORPHAN_S = 30           # in which ranks end after their launcher
WRITES = ("os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.truncate")
SHOWN_FAILURES = 3      # per target and kind of failure
# Not compared: logs and reports contain times, and config.json the path of the run.
VOLATILE = re.compile(r"log.*\.txt|progress\.csv|config\.json|commands\.json|report\.html|events\.out.*|\..*")

for module in ("torch._dynamo", "torch.utils.tensorboard"):     # each script would import them; here once for all forks
    importlib.import_module(module)


# --- Scripts ---


class Script(NamedTuple):
    name: str
    flags: str                  # with {root} for the folder of the campaign
    output: str = "--logdir"    # the flag of the folder that is compared


TRAIN = "--max_steps 6 --save_interval 2 --log_interval 1 --batch_size 2 "
# In this order, as later ones read the results of earlier ones.
SCRIPTS = {
    "autoencoder": Script("train_autoencoder", TRAIN + "--data_dir {root}/images --discriminator_weight 0.5 "
                          "--discriminator_start 2 --discriminator_layers 1 --discriminator_channels 8 "
                          "--keep_checkpoints 2 --val_data_dir {root}/images"),
    "encode": Script("encode_dataset", "--data_dir {root}/images --vae_path {root}/autoencoder/run --shard_size 3",
                     "--cache_dir"),
    "train": Script("image_train_vae", TRAIN + "--cache_dir {root}/encode/run"),
    "sample": Script("image_sample_vae", "--model_path {root}/train/run --num_samples 6 --batch_size 1"),
    "pixels": Script("image_train", TRAIN + "--data_dir {root}/images --image_size 16"),
    "classifier": Script("classifier_train", "--iterations 6 --save_interval 2 --log_interval 1 --eval_interval 2 "
                         "--batch_size 2 --data_dir {root}/images --val_data_dir {root}/images --image_size 16"),
    "upsampler": Script("super_res_train", TRAIN + "--data_dir {root}/images --large_size 16 --small_size 8"),
}
LONG = Script("image_train_vae", "--max_steps 24 --save_interval 2 --log_interval 1 --batch_size 1 "
              "--cache_dir {root}/encode/run --preview_interval -1")
SETTINGS = {
    "autoencoder": {"num_channels": [8, 8], "norm_num_groups": 4, "latent_channels": 3, "num_res_blocks": 1},
    "data": {"image_size": 16},
    "model": {"num_channels": 32, "channel_mult": "1", "num_res_blocks": 1, "attention_resolutions": "",
              "class_cond": True},
    "diffusion": {"diffusion_steps": 4, "noise_schedule": "cosine"},
    "classifier": {"classifier_width": 64, "classifier_depth": 1, "classifier_attention_resolutions": "",
                   "classifier_channel_mult": "1", "classifier_pool": "adaptive"},
    "training": {"ema_rate": "0.9"},
}


class Hook:
    """Audit hook that calls `act` before write number `at` below a folder, and counts these writes."""

    def __init__(self, folder, at=None, act=None):
        self.folder, self.at, self.act, self.count = str(folder), at, act, 0
        self.start, self.first = time.monotonic(), 0.0

    def __call__(self, event, args):
        writes = event in WRITES or event == "open" and args[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
        if writes and isinstance(args[0], (str, os.PathLike)) and os.fspath(args[0]).startswith(self.folder):
            self.first = self.first or time.monotonic() - self.start
            self.count += 1
            if self.count == self.at:
                self.act()


class Child:
    """A script in a fork of this process, its output in a file."""

    def __init__(self, script, words, output, hook=None, prepare=lambda: None):
        self.output, self.status, main = Path(output), None, load_main(script)
        self.pid = fork()
        if self.pid == 0:
            self._run(main, [f"{script}.py", *words], hook, prepare)

    def _run(self, main, words, hook, prepare):
        status = 99
        try:
            stream = os.open(self.output, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
            os.dup2(stream, 1)
            os.dup2(stream, 2)
            prepare()
            sys.argv = words
            if hook:
                sys.addaudithook(hook)
            dist_util.launch(main)
            status = 0
        except SystemExit as stop:
            status = stop.code or 0
        except BaseException:
            traceback.print_exc()
        sys.stdout.flush()
        if hook and status == 0:
            counts = {"writes": hook.count, "first": hook.first, "end": time.monotonic() - hook.start}
            self.output.with_suffix(".json").write_text(json.dumps(counts))
        os._exit(status)

    def wait(self, options=0):
        """Return the exit status, negative for a signal; with os.WUNTRACED "stopped" if it is stopped."""
        end = time.monotonic() + HANG_S
        while self.status is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG | options)
            if pid and os.WIFSTOPPED(status):
                return "stopped"
            if pid:
                self.status = os.waitstatus_to_exitcode(status)
            elif time.monotonic() > end:
                os.kill(self.pid, signal.SIGKILL)
                self.status = os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])
                raise Failure(f"hang: no end within {HANG_S} s, see {self.output}")
            time.sleep(0.002)
        return self.status

    def signal(self, number):
        if self.status is None:
            os.kill(self.pid, number)


@functools.cache
def load_main(script):
    spec = importlib.util.spec_from_file_location(script, ROOT / "scripts" / f"{script}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.main


class Launch:
    """A script on two ranks under a launcher, its output in a file; its processes are found by a variable."""

    def __init__(self, launcher, script, words, output):
        self.output, self.mark, bin = Path(output), uuid.uuid4().hex, Path(sys.executable).parent
        command = {"mpiexec": [bin / "mpiexec", "-n", "2", sys.executable],
                   "torchrun": [bin / "torchrun", "--standalone", "--nproc_per_node", "2"]}[launcher]
        others = {name for names in dist_util.LAUNCHERS.values() for name in names}
        environ = {name: value for name, value in os.environ.items() if name not in others}
        with open(output, "ab") as stream:
            self.process = subprocess.Popen(
                [*command, ROOT / "scripts" / f"{script}.py", *words], stdout=stream, stderr=stream,
                start_new_session=True, env={**environ, "PYTHONPATH": str(ROOT), "CAMPAIGN_MARK": self.mark})

    def processes(self, ranks=False):
        """Return the ids of its processes that have not ended, or of the ranks among them."""
        found = []
        for entry in Path("/proc").glob("[0-9]*/environ"):
            with contextlib.suppress(OSError):      # it has ended, or belongs to another user
                variables = entry.read_bytes().decode(errors="replace").split("\0")
                is_rank = any(variable.startswith(("RANK=", "PMI_RANK=")) for variable in variables)
                if f"CAMPAIGN_MARK={self.mark}" in variables and (is_rank or not ranks):
                    found.append(int(entry.parent.name))
        return sorted(found)

    @staticmethod
    def signal(pids, number=signal.SIGKILL):
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, number)

    def wait(self):
        """Return the exit status of the launcher after all processes have ended."""
        try:
            status = self.process.wait(2 * HANG_S)
        except subprocess.TimeoutExpired:
            self.signal(self.processes())
            raise Failure(f"hang: no end within {2 * HANG_S} s, see {self.output}") from None
        end = time.monotonic() + ORPHAN_S
        while (left := self.processes()) and time.monotonic() < end:
            time.sleep(0.1)
        self.signal(left)
        require(not left, "orphans", f"{len(left)} processes are left after {ORPHAN_S} s, see {self.output}")
        return status


# --- Comparison ---


def contents(folder):
    """Return {relative path: bytes} of the results below a folder."""
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in sorted(Path(folder).rglob("*"))
            if path.is_file() and not VOLATILE.fullmatch(path.name)}


def require_equal(folder, expected):
    found = contents(folder)
    parts = [path.name for path in Path(folder).rglob(".*.part")]
    require(not parts, "temporary files left", ", ".join(parts))
    require(found.keys() == expected.keys(), "other files", " ".join(sorted(found.keys() ^ expected.keys())))
    wrong = [name for name in found if found[name] != expected[name]]
    require(not wrong, "other content", ", ".join(wrong))


def require_clear_error(output, name):
    """Check that a script has ended with a line "error: ..." that contains `name`, and without a traceback."""
    text = output.read_text(errors="replace")
    errors = [line for line in text.splitlines() if line.startswith("error: ")]
    require("Traceback" not in text, "traceback", f"see {output}")
    require(any(str(name) in line for line in errors), "error without file", errors or f"none, see {output}")


def require_success(status, output):
    require(status == 0, "rerun fails", f"status {status}, see {output}")


# --- One case each: return a note, or raise Failure ---


def kill_and_rerun(campaign, folder, rng, target):
    """Kill a script up to three times, before one of its writes or at a random time, then run it to its end."""
    expected, measured, kills = campaign.baseline(target), campaign.measured[target], 0
    script, words, run, output = campaign.command(SCRIPTS[target], folder)
    while not kills:    # it may end before it is killed
        shutil.rmtree(run, ignore_errors=True)
        for _ in range(rng.integers(1, 4)):
            at = int(rng.integers(1, measured["writes"] + 1)) if rng.random() < 0.5 else None
            child = Child(script, words, output, Hook(run, at, lambda: os.kill(os.getpid(), signal.SIGKILL)))
            if at is None:
                time.sleep(rng.uniform(measured["first"], measured["end"]))
                child.signal(signal.SIGKILL)
            kills += child.wait() == -signal.SIGKILL
    require_success(Child(script, words, output).wait(), output)
    require_equal(run, expected)
    return f"killed {kills}x"


def delete_folder(campaign, folder, rng, target):
    """Delete the folder of a script before one of its writes, then run the script again."""
    expected, measured = campaign.baseline(target), campaign.measured[target]
    script, words, run, output = campaign.command(SCRIPTS[target], folder)
    at = int(rng.integers(2, measured["writes"] + 1))
    status = Child(script, words, output, Hook(run, at, lambda: shutil.rmtree(run))).wait()
    require("Traceback" not in output.read_text(), "traceback", f"see {output}")
    if status:
        require_clear_error(output, folder)
    require_success(Child(script, words, output).wait(), output)
    if status:
        require_equal(run, expected)
    else:   # it has written its last files only, which must be those of an undisturbed run
        require_equal(run, {name: expected.get(name) for name in contents(run)})
    return "ended with an error" if status else "continued"


def fill_disk(campaign, folder, rng, target):
    """Run a script on a file system that is too small (a file size limit without root), then on one that is not."""
    expected = campaign.baseline(target)
    script, words, run, output = campaign.command(SCRIPTS[target], folder)
    sizes = [len(content) for content in expected.values()]
    options, limit = f"size={int(sum(sizes) * rng.uniform(0.05, 1))}", int(rng.uniform(0, max(sizes)))
    run.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", run]
    mounted = os.geteuid() == 0 and subprocess.run(mount, capture_output=True).returncode == 0
    try:
        prepare = lambda: mounted or resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
        status = Child(script, words, output, prepare=prepare).wait()
        if status:
            require_clear_error(output, run)
            left = contents(run)
            marked = {file for name in left if name.startswith("state") for file in json.loads(left[name])["files"]}
            half = {name for name in left if re.search(r"\d{6}\.pt$", name)} - marked
            require(not half, "files of an incomplete step", " ".join(sorted(half)))
        if mounted:
            subprocess.run(["mount", "-o", f"remount,size={sum(sizes) * 3 + 2**24}", run], check=True)
        require_success(Child(script, words, output).wait(), output)
        require_equal(run, expected)
    finally:
        if mounted:
            subprocess.run(["umount", run], check=True)
    return ("disk full" if mounted else "size limit") if status else "enough space"


def run_twice(campaign, folder, rng, target):
    """Stop a script before one of its writes, start the same one in the same folder, then continue the first."""
    expected, measured = campaign.baseline(target), campaign.measured[target]
    script, words, run, output = campaign.command(SCRIPTS[target], folder)
    outputs = output, folder / "second.txt"
    at = int(rng.integers(1, measured["writes"] + 1))
    first = Child(script, words, output, Hook(run, at, lambda: os.kill(os.getpid(), signal.SIGSTOP)))
    try:
        require(first.wait(os.WUNTRACED) == "stopped", "not stopped", f"see {output}")
        locked = any("lock" in path.name for path in run.rglob("*"))
        second = Child(script, words, outputs[1]).wait()
        first.signal(signal.SIGCONT)
        statuses = first.wait(), second
    finally:
        first.signal(signal.SIGKILL)
    if locked or 0 not in statuses:
        require(statuses[0] == 0 != second, "two runs in one folder", f"status {statuses}, see {folder}")
    for status, file in zip(statuses, outputs):
        if status:
            require_clear_error(file, run)
    require_equal(run, expected)
    return "second rejected" if second else "first rejected" if statuses[0] else "one after the other"


def signal_ranks(campaign, folder, rng, launcher, victim):
    """Signal the ranks or the launcher of a run on two ranks at a random time, then run it to its end."""
    expected = campaign.baseline(f"{launcher}-2", LONG, launcher)
    script, words, run, output = campaign.command(LONG, folder)
    options = ["--collective_timeout_minutes", "0.1"] if victim == "stopped" else []
    launch, end = Launch(launcher, script, words + options, output), time.monotonic() + HANG_S
    while not (run / "state000002.json").exists() and launch.process.poll() is None and time.monotonic() < end:
        time.sleep(0.01)
    time.sleep(rng.uniform(0, 1))
    ranks = launch.processes(ranks=True)
    if victim == "all":
        launch.signal(launch.processes())
    elif victim == "launcher":
        launch.signal([launch.process.pid])
    elif victim == "paused":
        launch.signal(ranks[:1], signal.SIGSTOP)
        time.sleep(rng.uniform(0, 3))
        launch.signal(ranks[:1], signal.SIGCONT)
    else:
        number = {"killed": signal.SIGKILL, "raising": signal.SIGINT, "stopped": signal.SIGSTOP}[victim]
        launch.signal(ranks[rng.integers(2):][:1], number)
    status = launch.wait()
    if victim == "paused":
        require_success(status, output)
    else:
        require(status != 0 or len(ranks) < 2, "status 0 without one of its ranks", f"see {output}")
        require_success(Launch(launcher, script, words, output).wait(), output)
    require_equal(run, expected)
    return "" if len(ranks) == 2 else "ended before"


# Kind of fault: {target: (function of a case, its further arguments)}
VICTIMS = ("all", "launcher", "killed", "raising", "paused", "stopped")
CASES = {
    "kills": {target: (kill_and_rerun, target) for target in SCRIPTS},
    "deleted": {target: (delete_folder, target) for target in SCRIPTS},
    "disk": {target: (fill_disk, target) for target in SCRIPTS},
    "twice": {target: (run_twice, target) for target in SCRIPTS},
    "ranks": {f"{launcher}-{victim}": (signal_ranks, launcher, victim)
              for launcher in ("mpiexec", "torchrun") for victim in VICTIMS},
}
# Kind of fault: ({target: format}, mutations)
CORRUPTIONS = {"flips": (FLIPS, [flip_bit]), "mutations": (MUTATIONS, MUTATORS)}


class Campaign:
    """Undisturbed runs, and the results of the cases."""

    def __init__(self, root, seed):
        self.root, self.seed = Path(root), seed
        self.results = collections.defaultdict(list)    # kind/target -> [(name, failure or "", note or "")]
        self.baselines, self.measured = {}, {}
        for name in ("cases", "images"):
            (self.root / name).mkdir(parents=True)
        (self.root / "tiny.yaml").write_text(yaml.safe_dump(SETTINGS))
        for i in range(6):
            pixels = np.random.default_rng(i).integers(0, 256, (16, 16), np.uint8)
            Image.fromarray(pixels).save(self.root / "images" / f"{'ab'[i % 2]}_{i}.png")

    def command(self, script, folder):
        """Return (script, its words, its folder, file for its output) for a case in `folder`."""
        words = [*script.flags.format(root=self.root).split(), "--config", f"{self.root}/tiny.yaml"]
        return script.name, [*words, script.output, str(folder / "run")], folder / "run", folder / "output.txt"

    def baseline(self, target, script=None, launcher=None):
        """Return the files that an undisturbed run leaves."""
        if target not in self.baselines:
            folder = self.root / target
            folder.mkdir()
            name, words, run, output = self.command(script or SCRIPTS[target], folder)
            status = (Launch(launcher, name, words, output) if launcher else
                      Child(name, words, output, Hook(run))).wait()
            if status != 0:
                sys.exit(f"error: the undisturbed run {target} ended with status {status}:\n{output.read_text()}")
            self.measured[target] = None if launcher else json.loads(output.with_suffix(".json").read_text())
            self.baselines[target] = contents(run)
        return self.baselines[target]

    def run(self, kind, target, indices):
        """Run the cases of a target and record their results."""
        names, results = [f"{kind}/{target}#{index}" for index in indices], self.results[f"{kind}/{target}"]
        if kind in CORRUPTIONS:
            formats, mutators = CORRUPTIONS[kind]
            results += corrupt_all(self.root, self.seed, formats[target], names, mutators)
            return
        case, *arguments = CASES[kind][target]
        for name in names:
            folder, failure, note = self.root / "cases" / name.replace("/", "-"), "", ""
            folder.mkdir()
            try:
                note = case(self, folder, keyed_rng(self.seed, name), *arguments)
                shutil.rmtree(folder)
            except Failure as error:
                failure = str(error)
            results.append((name, failure, note))

    def report(self):
        """Print the table and the failures; return whether there are none."""
        groups = collections.defaultdict(list)
        print(f"\n{'kind/target':28} {'cases':>7} {'passed':>7} {'failed':>7}  notes")
        totals = collections.Counter()
        for target, results in self.results.items():
            failures = [(name, failure) for name, failure, _ in results if failure]
            notes = collections.Counter(note for _, _, note in results if note)
            counts = {"cases": len(results), "passed": len(results) - len(failures), "failed": len(failures)}
            print(f"{target:28} " + " ".join(f"{count:7}" for count in counts.values()) + "  "
                  + ", ".join(f"{note} {count}" for note, count in sorted(notes.items())))
            totals.update(counts)
            for name, failure in failures:
                groups[target, failure.split(":")[0]].append((name, failure))
        print(f"{'total':28} " + " ".join(f"{totals[name]:7}" for name in ("cases", "passed", "failed")))
        for (target, kind), members in groups.items():
            print(f"\n{target}: {kind} ({len(members)})")
            for name, failure in members[:SHOWN_FAILURES]:
                print(f"  --seed {self.seed} --only {name}\n    {failure[:400]}")
        return not groups


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    counts = {
        "kills": (7, "runs of one process that are killed"),
        "flips": (110, "files with a checksum in which a bit is flipped"),
        "mutations": (270, "files of all formats that are corrupted"),
        "others": (2, "runs each whose folder is deleted, whose disk is full, and that meet another in their folder"),
        "ranks": (0, "runs of two ranks under mpiexec and torchrun"),
    }
    for name, (default, text) in counts.items():
        parser.add_argument(f"--{name}", type=int, default=default, help=f"{text} (default: {default})")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", default="", metavar="NAME", help="kind, kind/target or kind/target#index")
    parser.add_argument("--folder", default="", help="folder of the campaign, which is kept; empty: temporary")
    options = parser.parse_args()
    root, start = Path(options.folder or tempfile.mkdtemp(prefix="campaign-")), time.monotonic()
    campaign = Campaign(root, options.seed)
    for target in SCRIPTS:
        campaign.baseline(target)
    write_formats(root)
    only_kind, only_target, only_index = re.fullmatch(r"([^/#]*)/?([^#]*)#?(\d*)", options.only).groups()
    for kind in ("kills", "deleted", "disk", "twice", "ranks", "flips", "mutations"):
        targets = CORRUPTIONS[kind][0] if kind in CORRUPTIONS else CASES[kind]
        count = vars(options).get(kind, options.others)
        for number, target in enumerate(targets):
            indices = range(count // len(targets) + (number < count % len(targets)))
            indices = [int(only_index)] if only_index else indices
            if indices and only_kind in ("", kind) and only_target in ("", target):
                campaign.run(kind, target, indices)
    passed = campaign.report()
    print(f"{time.monotonic() - start:.0f} s" + ("" if passed else f"; the failed cases are in {root / 'cases'}"))
    if passed and not options.folder:
        shutil.rmtree(root)
    sys.exit(not passed)


if __name__ == "__main__":
    main()
