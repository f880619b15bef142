import base64
import http.server
import json
import threading
import types

import pytest
import torch

from guided_diffusion_vae import checkpoint_util
from guided_diffusion_vae.checkpoint_util import Weights
from guided_diffusion_vae.runs import cards
from guided_diffusion_vae.runs.cards import PushConfig, card_path, model_card, push, write_card
from guided_diffusion_vae.runs.run import OLD_KEYS

huggingface_hub = pytest.importorskip("huggingface_hub")
constants = pytest.importorskip("huggingface_hub.constants")

OLD_NAME = OLD_KEYS["num_images"]
HEADER = {
    "kind": "diffusion", "step": 20, "image_shape": [1, 64, 64], "latent_shape": [4, 16, 16], "classes": ["a|b", "c"],
    "diffusion": {"diffusion_steps": 1000, "noise_schedule": "cosine"}, "data_count": 1234, "data_fingerprint": "f00d",
    "data": {"image_size": 64, "crop": "none", "pad": False, "value_range": ""},
    "autoencoder": {"config": {"class": "AutoencoderKL"}, "sha256": "beef", "path": "/home/someone/runs/vae"},
    "attributes": {"names": ["speed_mps"]},
}
ROWS = "step,samples,loss,steps_per_second\n10,40,0.5,1\n20,80,0.25,2\n30,120,0.1,2\n"


@pytest.fixture
def run(tmp_path):
    """Return the weights of a run folder with curves and an evaluation."""
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "progress.csv").write_text(ROWS)
    flags = {"data": {"data_dir": "/home/someone/data"}, "training": {"batch_size": 4, "lr": 0.1, "ema_rate": "0.9"}}
    (folder / "config.json").write_text(json.dumps({"flags": flags}))
    report = {"fid": 12.3456789, OLD_NAME: 5, "num_images": 5, "classes": {"accuracy": 0.5}, "indices": [1, 2]}
    (folder / "metrics.json").write_text(json.dumps(report))
    return Weights({"w": torch.zeros(1000, 3)}, HEADER, folder / "ema_0.9_000020.pt", "0")


def test_card_states_model_data_training_and_metrics(run, tmp_path):
    text = model_card("pipeline", run, "diffusers", "cc-by-nc-4.0")
    data = huggingface_hub.ModelCard(text).data
    assert data.license == "cc-by-nc-4.0" and data.library_name == "diffusers"
    assert data.pipeline_tag == "unconditional-image-generation" and data.tags == ["guided-diffusion-vae", "diffusion"]
    for row in ("parameters | 3,000", "image shape | 1x64x64", "timesteps | 1,000", "attributes | speed_mps",
                "items | 1,234", r"classes | 2: a\|b, c", "`image_size` | 64", "step | 20", "`batch_size` | 4",
                "samples | 80", "loss before step 20 | 0.25", "fid | 12.346", "classes / accuracy | 0.5",
                "SHA-256 of the autoencoder | beef"):
        assert f"| {row} |" in text
    assert "| hours | 0.0041667 |" in text     # 10 s at 1 step per second, 5 s at 2
    assert not any(word in text for word in ("someone", OLD_NAME, "indices", "`pad`", "value_range"))
    assert "DiffusionPipeline.from_pretrained('pipeline')" in text


def test_card_without_a_run_or_license_states_what_is_known(tmp_path):
    header = {"kind": "autoencoder", "image_shape": [1, 32, 64, 64], "data": {}}
    text = model_card("vae.safetensors", Weights({}, header, tmp_path / "vae.pt", None), "guided-diffusion-vae")
    data = huggingface_hub.ModelCard(text).data
    assert data.license is None and data.pipeline_tag is None and "KL autoencoder for volumes" in text
    assert "## Training" not in text and "## Metrics" not in text and "## License\n\nNot stated" in text
    assert "gdvae encode-dataset --data_dir DIR --vae_path vae.safetensors" in text


def test_card_has_the_validation_of_its_step(tmp_path):
    checkpoint_util.commit(tmp_path, 20, {}, {"measured": {"val_psnr": 31.5}})
    header = {"kind": "autoencoder", "step": 20}
    assert "| val_psnr | 31.5 |" in model_card("vae", Weights({}, header, tmp_path / "ema_0.9_000020.pt", None), "x")


def test_card_reads_other_metrics_and_rejects_what_is_not_valid(run, tmp_path):
    (tmp_path / "other.json").write_text('{"kid": 0.125}')
    text = model_card("x", run, "diffusers", "mit", str(tmp_path / "other.json"))
    assert "| kid | 0.125 |" in text and "fid" not in text
    with pytest.raises(FileNotFoundError, match="absent.json does not exist; check --metrics"):
        model_card("x", run, "diffusers", "mit", str(tmp_path / "absent.json"))
    (tmp_path / "other.json").write_text("[1]")
    with pytest.raises(ValueError, match="expected an object of names and numbers; check --metrics"):
        model_card("x", run, "diffusers", "mit", str(tmp_path / "other.json"))
    with pytest.raises(ValueError, match="--license 'The MIT' is not valid: expected an identifier"):
        model_card("x", run, "diffusers", "The MIT")


def test_card_replaces_only_the_card_of_the_same_file(run, tmp_path):
    export = tmp_path / "model.safetensors"
    text = model_card(export.name, run, "x")
    assert write_card(text, export) == tmp_path / "README.md" == write_card(text, export)
    other = tmp_path / "other.safetensors"
    assert write_card(model_card(other.name, run, "x"), other) == tmp_path / "other.README.md"
    (tmp_path / "README.md").write_text("# My project\n")
    assert write_card(text, export) == tmp_path / "model.README.md" and card_path(tmp_path) == tmp_path / "README.md"
    assert (tmp_path / "README.md").read_text() == "# My project\n"


class FakeHub:
    """Stand-in for huggingface_hub.HfApi that records its calls; `error` is raised instead, if there is one."""

    error = None

    def __init__(self, calls):
        self.calls = calls

    def create_repo(self, repo, **settings):
        if self.error:
            raise self.error
        self.calls.append(("create_repo", repo, settings))
        return f"https://hub/{repo}"

    def upload_folder(self, repo_id, folder_path):
        self.calls.append(("upload_folder", repo_id, folder_path))

    def upload_file(self, repo_id, path_or_fileobj, path_in_repo):
        self.calls.append(("upload_file", repo_id, path_or_fileobj, path_in_repo))


@pytest.fixture
def hub(monkeypatch):
    """Return the calls of the hub, which no test reaches."""
    calls = []
    monkeypatch.setattr(huggingface_hub, "HfApi", lambda: FakeHub(calls))
    return calls


def test_push_uploads_an_export_with_its_card(run, tmp_path, hub):
    folder, file = tmp_path / "pipeline", tmp_path / "model.safetensors"
    folder.mkdir()
    file.touch()
    for export in (folder, file):
        write_card(model_card(export.name, run, "x", "mit"), export)
    assert push(PushConfig(str(folder), "me/pipeline")) == "https://hub/me/pipeline"
    assert hub == [("create_repo", "me/pipeline", {"private": True, "exist_ok": True}),
                   ("upload_folder", "me/pipeline", folder)]
    hub.clear()
    push(PushConfig(str(file), "me/model", private=False))
    assert hub == [("create_repo", "me/model", {"private": False, "exist_ok": True}),
                   ("upload_file", "me/model", file, "model.safetensors"),
                   ("upload_file", "me/model", tmp_path / "README.md", "README.md")]


def test_push_rejects_what_lacks_card_license_or_repository(run, tmp_path, hub):
    file = tmp_path / "model.safetensors"
    for repo, export, error in (("me/m", "", "'' does not exist; set --export"),
                                ("me/m", file, "model.safetensors' does not exist; set --export")):
        with pytest.raises(FileNotFoundError, match=error):
            push(PushConfig(str(export), repo))
    file.touch()
    with pytest.raises(FileNotFoundError, match="README.md does not exist: a model is not uploaded without its card"):
        push(PushConfig(str(file), "me/m"))
    write_card(model_card(file.name, run, "x"), file)
    with pytest.raises(ValueError, match="README.md states no license; export again with --license"):
        push(PushConfig(str(file), "me/m"))
    write_card(model_card(file.name, run, "x", "mit"), file)
    for repo in ("", "me", "me/a/b", "me/", "../x"):
        with pytest.raises(ValueError, match="--repo .* is not valid: expected owner/name"):
            push(PushConfig(str(file), repo))
    (tmp_path / "README.md").write_text((tmp_path / "README.md").read_text().replace('license: "mit"', "license: [mit"))
    with pytest.raises(ValueError, match="README.md cannot be read .*; fix its first lines, or export again"):
        push(PushConfig(str(file), "me/m"))
    assert hub == []


def test_push_reports_an_error_of_the_hub(run, tmp_path, hub, monkeypatch):
    response = types.SimpleNamespace(headers={}, request=None)
    error = huggingface_hub.errors.HfHubHTTPError("401 Unauthorized", response=response)
    monkeypatch.setattr(FakeHub, "error", error)
    write_card(model_card("run", run, "x", "mit"), tmp_path / "run")
    with pytest.raises(OSError, match=r"rejected the upload to me/m \(401 Unauthorized.*; log in with `hf auth login`"):
        push(PushConfig(str(tmp_path / "run"), "me/m"))


class HubHandler(http.server.BaseHTTPRequestHandler):
    """Answer the client of huggingface_hub like the hub, and record its requests in `server.requests`.

    `server.status` is that of the answer to a new repository.
    """

    def do_POST(self):
        body = self.rfile.read(int(self.headers["Content-Length"]))
        path = self.path.partition("?")[0]
        self.server.requests.append((path, self.headers["Authorization"], body))
        files = json.loads(body)["files"] if "/preupload/" in path else []
        status = self.server.status if path == "/api/repos/create" else 200
        address = f"http://127.0.0.1:{self.server.server_port}/me/m"
        answer = json.dumps({
            "url": address, "commitUrl": f"{address}/commit/0", "commitOid": "0", "errors": [], "warnings": [],
            "files": [{"path": file["path"], "uploadMode": "regular", "shouldIgnore": False} for file in files],
        }).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(answer)))
        self.end_headers()
        self.wfile.write(answer)

    def do_GET(self):
        self.send_error(404)

    def log_message(self, *args):
        pass


@pytest.fixture
def server(monkeypatch):
    """Return a local server that huggingface_hub takes for the hub."""
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), HubHandler) as server:
        server.requests, server.status = [], 200
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{server.server_port}")
        monkeypatch.setenv("HF_TOKEN", "hf_test")
        yield server
        server.shutdown()


def test_push_sends_files_and_card_to_a_server(run, tmp_path, server):
    export = tmp_path / "pipeline"
    export.mkdir()
    (export / "weights.safetensors").write_bytes(b"weights")
    card = write_card(model_card("pipeline", run, "x", "mit"), export)
    assert push(PushConfig(str(export), "me/m")) == f"{constants.ENDPOINT}/me/m"
    bodies = {path: body for path, _, body in server.requests}
    created = json.loads(bodies["/api/repos/create"])
    assert (created["organization"], created["name"]) == ("me", "m")
    assert created.get("private") or created["visibility"] == "private"     # depends on the version of the client
    lines = [json.loads(line)["value"] for line in bodies["/api/models/me/m/commit/main"].splitlines()]
    sent = {line["path"]: base64.b64decode(line["content"]) for line in lines if "path" in line}
    assert sent == {"README.md": card.read_bytes(), "weights.safetensors": b"weights"}
    assert {token for path, token, _ in server.requests} == {"Bearer hf_test"}


def test_push_to_a_server_that_rejects_or_is_absent_is_one_error(run, tmp_path, server, monkeypatch):
    write_card(model_card("run", run, "x", "mit"), tmp_path / "run")
    server.status = 401
    with pytest.raises(OSError, match=r"rejected the upload to me/m \(.*401.*log in with `hf auth login`"):
        push(PushConfig(str(tmp_path / "run"), "me/m"))
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(OSError, match="127.0.0.1:9 cannot be reached .*; check the network and HF_ENDPOINT"):
        push(PushConfig(str(tmp_path / "run"), "me/m"))


def test_examples_name_commands():
    from guided_diffusion_vae.programs import NAMES, spell

    assert {text.split()[1] for text in cards.USES.values()} <= {spell(name) for name in NAMES}
