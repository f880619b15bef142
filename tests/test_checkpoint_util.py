import json
import pickle
import resource
from pathlib import Path

import pytest
import torch

from guided_diffusion_vae import checkpoint_util as cu

HEADER = {"kind": "diffusion", "step": 3, "model": {"channel_mult": [1, 2], "rate": 0.1}, "classes": ["Füße", "b"]}


class Network(torch.nn.Sequential):
    """Holds a parameter, a buffer and, by the norm, a version in the metadata of its state dict."""

    def __init__(self, width=2):
        super().__init__(torch.nn.Linear(3, width), torch.nn.BatchNorm1d(width))


@pytest.fixture
def run(tmp_path):
    """Write steps 2, 4 and 6, each with a model, two averages and an optimizer."""
    for step in (2, 4, 6):
        names = [cu.model_name(step), cu.ema_name(0.9, step), cu.ema_name(0.9999, step), cu.optimizer_name(step)]
        for name in names:
            cu.save(tmp_path / name, {"w": torch.full((5,), float(step))})
        cu.commit(tmp_path, step, names, {"seed": 7})
    return tmp_path


def names_in(folder):
    return sorted(path.name for path in folder.iterdir())


# Weights that describe themselves


def test_a_weights_file_is_a_bare_state_dict_to_everyone_else(tmp_path):
    network = Network()
    cu.save_weights(tmp_path / "model.pt", network.state_dict(), HEADER)
    plain = torch.load(tmp_path / "model.pt", weights_only=True)
    assert list(plain) == list(network.state_dict()) and not any(v.requires_grad for v in plain.values())
    twin = Network()
    twin.load_state_dict(plain)
    assert all(torch.equal(a, b) for a, b in zip(twin.state_dict().values(), network.state_dict().values()))
    assert plain._metadata["1"] == {"version": 2}  # what torch itself keeps there survives


def test_the_header_survives_and_comes_back_as_it_was(tmp_path):
    cu.save_weights(tmp_path / "model.pt", Network().state_dict(), HEADER)
    weights, header = cu.load_weights(tmp_path / "model.pt")
    assert header == {"format": 1, **HEADER}
    cu.save_weights(tmp_path / "again.pt", weights, {"kind": "other"})
    assert cu.load_weights(tmp_path / "again.pt")[1] == {"format": 1, "kind": "other"}
    network = Network()
    network.load_state_dict(weights)
    assert cu.HEADER_KEY not in network.state_dict()._metadata


def test_a_released_checkpoint_has_no_header(tmp_path):
    torch.save(dict(Network().state_dict()), tmp_path / "model.pt")
    weights, header = cu.load_weights(tmp_path / "model.pt")
    assert header is None and set(weights) == set(Network().state_dict())


def test_a_header_of_another_version_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(cu, "FORMAT", 2)
    cu.save_weights(tmp_path / "model.pt", Network().state_dict(), HEADER)
    monkeypatch.undo()
    with pytest.raises(ValueError, match="model.pt has header format 2, this version reads format 1"):
        cu.load_weights(tmp_path / "model.pt")


def test_weights_of_another_kind_are_refused():
    cu.require_kind(HEADER, "diffusion", "model.pt", "--model_path")
    with pytest.raises(ValueError, match="model.pt holds a model of kind 'diffusion', --vae_path wants one of"):
        cu.require_kind(HEADER, "autoencoder", "model.pt", "--vae_path")


@pytest.mark.parametrize("content", [torch.zeros(2), [torch.zeros(2)], {"state": {"w": torch.zeros(2)}}, {"step": 3}])
def test_what_is_no_state_dict_is_refused(tmp_path, content):
    torch.save(content, tmp_path / "opt.pt")
    with pytest.raises(ValueError, match="opt.pt holds no state dict .*--classifier_path wants a model or ema file"):
        cu.load_weights(tmp_path / "opt.pt", flag="--classifier_path")


def test_differences_to_the_model_are_named(tmp_path):
    weights = Network(2).state_dict()
    cu.load_strict(Network(2), weights, "model.pt")
    with pytest.raises(ValueError, match=r"model.pt does not fit the model \(6 of 7 entries differ; 0.bias: \(2,\) in "
                                         r"the file, \(4,\) in the model; .*check --model_path and the flags of"):
        cu.load_strict(Network(4), weights, "model.pt")
    del weights["0.bias"]
    weights["0.gain"] = torch.zeros(())
    with pytest.raises(ValueError, match=r"0.bias: missing in the file, \(2,\) in the model; 0.gain: \(\) in the file, "
                                         "nothing in the model"):
        cu.load_strict(Network(2), weights, "model.pt")


# Reading and writing files


@pytest.mark.parametrize("content, problem", [
    (b"", "corrupt or truncated"), (b"not a checkpoint", "corrupt or truncated"), (None, "corrupt or truncated"),
    (pickle.dumps(print), "weights_only"), (pickle.dumps({"w": 1}, protocol=0), "weights_only"),
])
def test_a_damaged_or_foreign_file_is_refused(tmp_path, content, problem):
    cu.save(tmp_path / "whole.pt", {"w": torch.zeros(100)})
    (tmp_path / "a.pt").write_bytes((tmp_path / "whole.pt").read_bytes()[:500] if content is None else content)
    with pytest.raises(ValueError, match=f"a.pt is .*{problem}.*check --model_path"):
        cu.load(tmp_path / "a.pt", flag="--model_path")


def test_a_file_that_would_run_code_is_not_run(tmp_path):
    class Evil:
        def __reduce__(self):
            return Path.touch, (tmp_path / "was_here",)

    torch.save({"w": Evil()}, tmp_path / "a.pt")
    with pytest.raises(ValueError, match="weights_only"):
        cu.load(tmp_path / "a.pt")
    assert not (tmp_path / "was_here").exists()


def test_a_file_that_is_not_there_is_named_with_its_flag(tmp_path):
    for path in (tmp_path / "none.pt", tmp_path):
        with pytest.raises(FileNotFoundError, match=f"{path} does not exist; check --model_path"):
            cu.load(path, flag="--model_path")


def test_running_out_of_space_is_reported_and_leaves_the_old_file(tmp_path):
    cu.save(tmp_path / "a.pt", {"w": torch.ones(3)})
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))  # files end there, as they do on a full disk
    try:
        with pytest.raises(OSError, match=rf"cannot write {tmp_path}/a.pt: File too large"):
            cu.save(tmp_path / "a.pt", {"w": torch.zeros(1_000_000)})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert torch.equal(cu.load(tmp_path / "a.pt")["w"], torch.ones(3)) and names_in(tmp_path) == ["a.pt"]


# The steps of a run


def test_a_marker_names_every_file_of_its_step(run):
    marker = cu.read_marker(run, 4)
    assert (marker["step"], marker["seed"], marker["format"]) == (4, 7, 1)
    assert list(marker["files"]) == ["model000004.pt", "ema_0.9_000004.pt", "ema_0.9999_000004.pt", "opt000004.pt"]
    assert marker["files"]["opt000004.pt"]["bytes"] == (run / "opt000004.pt").stat().st_size


def test_only_steps_with_a_marker_count(run):
    for name in ("model000008.pt", ".state000008.json.1.part", "state8.json", "state000008.json.bak", "stateless.json"):
        (run / name).write_text("{}")
    assert cu.committed_steps(run) == [2, 4, 6]
    (run / "state1000000.json").write_text("{}")
    assert cu.committed_steps(run)[-1] == 1000000
    assert cu.committed_steps(run / "nowhere") == []


@pytest.mark.parametrize("spoil, problem", [
    (lambda path: path.unlink(), "opt000006.pt is missing"),
    (lambda path: path.write_bytes(b"short"), "opt000006.pt has 5 bytes, [0-9]+ were written"),
    (lambda path: path.write_bytes(path.read_bytes()[:-1] + b"!"), "opt000006.pt does not hold what was written"),
])
def test_a_damaged_file_is_found_by_size_and_digest(run, spoil, problem):
    spoil(run / "opt000006.pt")
    with pytest.raises(ValueError, match=problem):
        cu.read_marker(run, 6)


@pytest.mark.parametrize("text", [
    "", "{", "[]", "{}", '{"files": {}}', '{"format": 1, "step": 6, "files": []}',
    '{"format": 1, "step": 6, "files": {"model000006.pt": 3}}',
    '{"format": 1, "step": 6, "files": {"model000006.pt": {"bytes": 3}}}',
])
def test_a_damaged_marker_is_a_damaged_step(run, text):
    (run / "state000006.json").write_text(text)
    with pytest.raises(ValueError, match="state000006.json is damaged"):
        cu.read_marker(run, 6)
    assert cu.latest_marker(run, warn=lambda text: None)["step"] == 4


def test_a_renamed_marker_is_no_step(run):
    (run / "state000004.json").rename(run / "state000008.json")
    with pytest.raises(ValueError, match="state000008.json is of format 1 and step 4, needed are format 1 and step 8"):
        cu.read_marker(run, 8)


def test_the_newest_undamaged_step_is_taken_and_others_are_reported(run):
    told = []
    assert cu.latest_marker(run, told.append)["step"] == 6 and told == []
    (run / "model000006.pt").unlink()
    assert cu.latest_marker(run, told.append)["step"] == 4
    assert len(told) == 1 and "checkpoint 6 of" in told[0] and "model000006.pt is missing" in told[0]
    for step in (2, 4):
        (run / cu.ema_name(0.9, step)).write_bytes(b"")
    with pytest.raises(ValueError, match=f"every checkpoint of {run} is damaged"):
        cu.latest_marker(run, told.append)


def test_a_folder_without_steps_has_no_newest(tmp_path):
    assert cu.latest_marker(tmp_path) is None
    with pytest.raises(FileNotFoundError, match=r"holds no finished checkpoint \(stateNNNNNN.json\); check --vae_path"):
        cu.latest_weights(tmp_path, "--vae_path")


def test_the_slowest_average_of_the_newest_step_is_used(run):
    assert cu.latest_weights(run) == run / "ema_0.9999_000006.pt"
    cu.commit(run, 8, [], {})
    assert cu.latest_weights(run).name == "model000008.pt"


def test_all_but_the_newest_steps_are_forgotten(run):
    kept = [name for name in names_in(run) if "000006" in name]
    (run / "state000004.json").write_text("damaged")
    (run / "config.json").write_text("{}")
    cu.prune_checkpoints(run, 1)
    assert names_in(run) == sorted([*kept, "config.json"])


def test_forgetting_touches_nothing_that_a_marker_names_elsewhere(run):
    victim = run.parent / "victim.pt"
    victim.write_text("precious")
    marker = json.loads((run / "state000002.json").read_text())
    marker["files"]["../victim.pt"] = {"bytes": 8, "sha256": ""}
    (run / "state000002.json").write_text(json.dumps(marker))
    cu.prune_checkpoints(run, 2)
    assert victim.read_text() == "precious" and cu.committed_steps(run) == [4, 6]
