import json
import pickle
import resource
from pathlib import Path

import pytest
import torch

from guided_diffusion_vae import checkpoint_util as cu

HEADER = {"kind": "diffusion", "step": 3, "model": {"channel_mult": [1, 2], "rate": 0.1}, "classes": ["Füße", "b"]}


class Network(torch.nn.Sequential):
    """Network with a parameter, a buffer and, by the norm, a version in the metadata of its state dict."""

    def __init__(self, width=2):
        super().__init__(torch.nn.Linear(3, width), torch.nn.BatchNorm1d(width))


@pytest.fixture
def run(tmp_path):
    """Write steps 2, 4 and 6, each with a model, two EMAs and an optimizer."""
    for step in (2, 4, 6):
        names = [cu.model_name(step), cu.ema_name(0.9, step), cu.ema_name(0.9999, step), cu.optimizer_name(step)]
        cu.commit(tmp_path, step, {name: cu.save(tmp_path / name, {"w": torch.full((5,), float(step))})
                                   for name in names}, {"seed": 7})
    return tmp_path


def names_in(folder):
    return sorted(path.name for path in folder.iterdir())


# --- Weights with a header ---


def test_weights_file_loads_as_a_bare_state_dict(tmp_path):
    network = Network()
    cu.save_weights(tmp_path / "model.pt", network.state_dict(), HEADER)
    plain = torch.load(tmp_path / "model.pt", weights_only=True)
    assert list(plain) == list(network.state_dict()) and not any(v.requires_grad for v in plain.values())
    twin = Network()
    twin.load_state_dict(plain)
    assert all(torch.equal(a, b) for a, b in zip(twin.state_dict().values(), network.state_dict().values()))
    assert plain._metadata["1"] == {"version": 2}  # torch's own entries are kept


def test_header_survives_saving_and_loading(tmp_path):
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


def test_header_of_another_format_raises(tmp_path, monkeypatch):
    monkeypatch.setattr(cu, "FORMAT", 2)
    cu.save_weights(tmp_path / "model.pt", Network().state_dict(), HEADER)
    monkeypatch.undo()
    with pytest.raises(ValueError, match="model.pt: expected header format 1, got 2"):
        cu.load_weights(tmp_path / "model.pt")


@pytest.mark.parametrize("header, problem", [
    ("{", "its header is corrupt"), ("[1]", "its header is corrupt"), ('{"format": 2}', "expected header format 1"),
])
def test_corrupt_header_raises_with_the_file(tmp_path, header, problem):
    weights = Network().state_dict()
    weights._metadata[cu.HEADER_KEY] = header
    torch.save(weights, tmp_path / "model.pt")
    with pytest.raises(ValueError, match=f"model.pt: {problem}"):
        cu.load_weights(tmp_path / "model.pt")


def test_header_without_an_entry_raises_with_the_file_when_it_is_read(tmp_path):
    cu.save_weights(tmp_path / "model.pt", Network().state_dict(), {"step": 3})
    header = cu.load_weights(tmp_path / "model.pt")[1]
    assert header == {"step": 3, "format": 1} and header.get("kind") is None
    with pytest.raises(ValueError, match="model.pt is corrupt: its header has no entry 'kind'"):
        cu.require_kind(header, "diffusion", "model.pt", "--model_path")


def test_flipped_bits_of_a_bare_weights_file_are_noticed(tmp_path):
    path = tmp_path / "model.pt"
    torch.save({"weight": torch.arange(3000.0)}, path)
    original = path.read_bytes()
    assert cu.load_weights(path)[0]["weight"].tolist() == list(range(3000))
    for place in range(0, 8 * len(original), 8 * 131 + 5):
        corrupt = bytearray(original)
        corrupt[place // 8] ^= 1 << place % 8
        path.write_bytes(corrupt)
        try:
            found = cu.load_weights(path)[0]["weight"]
        except (ValueError, FileNotFoundError) as error:
            assert "model.pt" in str(error)
        else:       # padding, and fields of the zip format that are not read
            assert found.tolist() == list(range(3000))


def test_weights_of_another_kind_raise():
    cu.require_kind(HEADER, "diffusion", "model.pt", "--model_path")
    with pytest.raises(ValueError, match="model.pt: --vae_path expects a model of kind 'autoencoder', got 'diffusion'"):
        cu.require_kind(HEADER, "autoencoder", "model.pt", "--vae_path")


@pytest.mark.parametrize("content", [torch.zeros(2), [torch.zeros(2)], {"state": {"w": torch.zeros(2)}}, {"step": 3}])
def test_other_content_than_a_state_dict_raises(tmp_path, content):
    torch.save(content, tmp_path / "opt.pt")
    with pytest.raises(ValueError, match="opt.pt is not a state dict .*--classifier_path expects a model or ema file"):
        cu.load_weights(tmp_path / "opt.pt", flag="--classifier_path")


def test_flipped_bits_of_safetensors_are_noticed(tmp_path):
    path, weights = tmp_path / "model.safetensors", Network().state_dict()
    cu.save_safetensors(path, weights, HEADER)
    original = path.read_bytes()
    expected = cu.load_weights(path)
    assert expected[1] == {"format": 1, **HEADER} and "sha256" not in expected[1]
    for place in range(0, 8 * len(original), 61):
        corrupt = bytearray(original)
        corrupt[place // 8] ^= 1 << place % 8
        path.write_bytes(corrupt)
        try:
            found = cu.load_weights(path)
        except ValueError as error:
            assert "model.safetensors" in str(error)
        else:       # a flip in the name of the checksum, or in the layout of the JSON
            assert found[1] == expected[1]
            assert all(torch.equal(value, found[0][name]) for name, value in expected[0].items())


def test_safetensors_that_are_not_finite_are_not_written(tmp_path):
    weights = Network().state_dict()
    weights["0.bias"][1] = float("nan")
    with pytest.raises(ValueError, match=r"a.safetensors was not written: 1 of 7 .* not finite, such as 0.bias"):
        cu.save_safetensors(tmp_path / "a.safetensors", weights, HEADER)
    assert names_in(tmp_path) == []


def test_load_strict_lists_differences(tmp_path):
    weights = Network(2).state_dict()
    cu.load_strict(Network(2), weights, "model.pt")
    with pytest.raises(ValueError, match=r"model.pt does not match the model \(6 of 7 entries differ; 0.bias: expected "
                                         r"\(4,\), got \(2,\); .*check --model_path and the flags of"):
        cu.load_strict(Network(4), weights, "model.pt")
    del weights["0.bias"]
    weights["0.gain"] = torch.zeros(())
    with pytest.raises(ValueError, match=r"0.bias: expected \(2,\), got nothing; 0.gain: expected nothing, got \(\)"):
        cu.load_strict(Network(2), weights, "model.pt")


# --- Reading and writing files ---


@pytest.mark.parametrize("content, problem", [
    (b"", "corrupt or truncated"), (b"not a checkpoint", "corrupt or truncated"), (None, "corrupt or truncated"),
    (pickle.dumps(print), "weights_only"), (pickle.dumps({"w": 1}, protocol=0), "weights_only"),
])
def test_corrupt_or_foreign_file_raises(tmp_path, content, problem):
    cu.save(tmp_path / "complete.pt", {"w": torch.zeros(100)})
    (tmp_path / "a.pt").write_bytes((tmp_path / "complete.pt").read_bytes()[:500] if content is None else content)
    with pytest.raises(ValueError, match=f"a.pt is .*{problem}.*check --model_path"):
        cu.load(tmp_path / "a.pt", flag="--model_path")


def test_pickled_code_is_not_executed(tmp_path):
    class Evil:
        def __reduce__(self):
            return Path.touch, (tmp_path / "was_here",)

    torch.save({"w": Evil()}, tmp_path / "a.pt")
    with pytest.raises(ValueError, match="weights_only"):
        cu.load(tmp_path / "a.pt")
    assert not (tmp_path / "was_here").exists()


def test_missing_file_raises_with_its_flag(tmp_path):
    for path in (tmp_path / "none.pt", tmp_path):
        with pytest.raises(FileNotFoundError, match=f"{path} does not exist; check --model_path"):
            cu.load(path, flag="--model_path")


def test_full_disk_raises_and_keeps_the_old_file(tmp_path):
    cu.save(tmp_path / "a.pt", {"w": torch.ones(3)})
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))  # files end there, as they do on a full disk
    try:
        with pytest.raises(OSError, match=rf"cannot write {tmp_path}/a.pt: File too large"):
            cu.save(tmp_path / "a.pt", {"w": torch.zeros(1_000_000)})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert torch.equal(cu.load(tmp_path / "a.pt")["w"], torch.ones(3)) and names_in(tmp_path) == ["a.pt"]


# --- Steps of a run ---


def test_marker_lists_every_file_of_its_step(run):
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


@pytest.mark.parametrize("corrupt, problem", [
    (lambda path: path.unlink(), "opt000006.pt is missing"),
    (lambda path: path.write_bytes(b"short"), "opt000006.pt: expected [0-9]+ bytes, got 5"),
    (lambda path: path.write_bytes(path.read_bytes()[:-1] + b"!"), "opt000006.pt is corrupt: its SHA-256 is not that"),
])
def test_corrupt_file_is_found_by_size_and_sha256(run, corrupt, problem):
    corrupt(run / "opt000006.pt")
    with pytest.raises(ValueError, match=problem):
        cu.read_marker(run, 6)


@pytest.mark.parametrize("text", [
    "", "{", "[]", "{}", '{"files": {}}', '{"format": 1, "step": 6, "files": []}',
    '{"format": 1, "step": 6, "files": {"model000006.pt": 3}}',
    '{"format": 1, "step": 6, "files": {"model000006.pt": {"bytes": 3}}}',
])
def test_corrupt_marker_is_a_corrupt_step(run, text):
    (run / "state000006.json").write_text(text)
    with pytest.raises(ValueError, match="state000006.json(: invalid JSON| is corrupt)"):
        cu.read_marker(run, 6)
    assert cu.latest_marker(run, warn=lambda text: None)["step"] == 4


def test_step_with_a_removed_file_is_not_committed(run):
    entry = cu.save(run / "model000008.pt", {"w": torch.ones(2)})
    (run / "model000008.pt").unlink()
    with pytest.raises(FileNotFoundError, match="model000008.pt was removed while step 8 was saved"):
        cu.commit(run, 8, {"model000008.pt": entry}, {})
    assert cu.committed_steps(run) == [2, 4, 6]


def test_renamed_marker_raises(run):
    (run / "state000004.json").rename(run / "state000008.json")
    with pytest.raises(ValueError, match="state000008.json: expected format 1 and step 8, got format 1 and step 4"):
        cu.read_marker(run, 8)


def test_latest_intact_step_is_used_and_others_are_reported(run):
    warnings = []
    assert cu.latest_marker(run, warnings.append)["step"] == 6 and warnings == []
    (run / "model000006.pt").unlink()
    assert cu.latest_marker(run, warnings.append)["step"] == 4
    assert len(warnings) == 1 and "checkpoint 6 of" in warnings[0] and "model000006.pt is missing" in warnings[0]
    for step in (2, 4):
        (run / cu.ema_name(0.9, step)).write_bytes(b"")
    with pytest.raises(ValueError, match=f"every checkpoint of {run} is corrupt"):
        cu.latest_marker(run, warnings.append)


def test_without_ema_files_the_error_names_the_flag_for_other_weights(run):
    for path in run.glob("ema_*.pt"):
        path.unlink()
    with pytest.raises(ValueError, match=r"restore the files, or set --vae_path to a weights file in it that is not$"):
        cu.find_weights(run, "--vae_path", lambda message: None)
    assert cu.find_weights(run / "model000006.pt")[0] == run / "model000006.pt"


def test_folder_without_steps_has_no_weights(tmp_path):
    assert cu.latest_marker(tmp_path) is None
    with pytest.raises(FileNotFoundError, match=r"no complete checkpoint \(stateNNNNNN.json\); check --vae_path"):
        cu.latest_weights(tmp_path, "--vae_path")


def test_ema_with_the_largest_decay_of_the_latest_step_is_used(run):
    assert cu.latest_weights(run) == run / "ema_0.9999_000006.pt"
    cu.commit(run, 8, {}, {})
    assert cu.latest_weights(run).name == "model000008.pt"


@pytest.fixture
def hashed(monkeypatch):
    """Record the names of the files that are hashed."""
    names, original = [], cu.sha256_of_file
    monkeypatch.setattr(cu, "sha256_of_file", lambda path: names.append(path.name) or original(path))
    return names


def test_find_weights_hashes_the_file_it_returns_only(run, hashed):
    (run / "opt000006.pt").write_bytes(b"corrupt")     # of no interest
    expected = json.loads((run / "state000006.json").read_text())["files"]["ema_0.9999_000006.pt"]["sha256"]
    for path in (run, run / "ema_0.9999_000006.pt"):
        assert cu.find_weights(path) == (run / "ema_0.9999_000006.pt", expected)
        assert hashed == ["ema_0.9999_000006.pt"]
        hashed.clear()
    (run / "copy.pt").write_bytes((run / "ema_0.9999_000006.pt").read_bytes())
    assert cu.find_weights(run / "copy.pt") == (run / "copy.pt", expected) and hashed == ["copy.pt"]
    assert cu.find_weights("gs://bucket/model.pt") == ("gs://bucket/model.pt", None)


def test_find_weights_of_the_best_step_hashes_no_other_step(run, hashed):
    cu.rewrite_marker(run, {**cu.read_marker(run, 6, lambda marker: None), "best": {"step": 2}})
    assert cu.find_weights(run)[0].name == "ema_0.9999_000002.pt" and hashed == ["ema_0.9999_000002.pt"]
    (run / "ema_0.9999_000002.pt").write_bytes(b"corrupt")
    assert cu.find_weights(run, warn=lambda text: None)[0].name == "ema_0.9999_000006.pt"


def test_corrupt_marker_is_reported_although_the_best_step_is_another(run):
    cu.rewrite_marker(run, {**cu.read_marker(run, 4), "best": {"step": 2}})
    (run / "state000006.json").write_text("corrupt")
    seen = []
    assert cu.find_weights(run, warn=seen.append)[0].name == "ema_0.9999_000002.pt"
    assert len(seen) == 1 and "checkpoint 6 of" in seen[0] and "state000006.json: invalid JSON" in seen[0]


def test_weights_file_that_differs_from_its_marker_raises(run):
    path = run / "ema_0.9_000004.pt"
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    with pytest.raises(ValueError, match="ema_0.9_000004.pt is corrupt: its SHA-256 is not that of state000004.json"):
        cu.find_weights(path)
    assert cu.find_weights(run / "model000004.pt")[1]


def test_prune_keeps_the_latest_steps(run):
    kept = [name for name in names_in(run) if "000006" in name]
    (run / "state000004.json").write_text("corrupt")
    (run / "config.json").write_text("{}")
    cu.prune_checkpoints(run, 1)
    assert names_in(run) == sorted([*kept, "config.json"])


def test_prune_deletes_what_an_interrupted_one_has_left(run, monkeypatch):
    kept, unlink, deleted = [name for name in names_in(run) if "000006" in name], Path.unlink, []

    def fail_later(path, missing_ok=False):
        deleted.append(path)
        if len(deleted) == 3:
            raise KeyboardInterrupt
        unlink(path, missing_ok)

    monkeypatch.setattr(Path, "unlink", fail_later)
    with pytest.raises(KeyboardInterrupt):
        cu.prune_checkpoints(run, 1)
    assert len(cu.committed_steps(run)) == 3
    cu.prune_checkpoints(run, 1)
    assert names_in(run) == kept


def test_prune_deletes_no_file_outside_the_folder(run):
    victim = run.parent / "victim.pt"
    victim.write_text("precious")
    marker = cu.read_marker(run, 2)
    marker["files"]["../victim.pt"] = {"bytes": 8, "sha256": ""}
    cu.rewrite_marker(run, marker)
    cu.prune_checkpoints(run, 2)
    assert victim.read_text() == "precious" and cu.committed_steps(run) == [4, 6]
