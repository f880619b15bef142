"""Distillation: known answers with exact teachers, and students of tiny models through the script."""

import dataclasses

import numpy as np
import pytest
import torch
from PIL import Image

from guided_diffusion_vae import checkpoint_util
from guided_diffusion_vae.data import DataConfig, open_folder, open_npz
from guided_diffusion_vae.data.attributes import Attributes
from guided_diffusion_vae.distillation import Distillation, DistillConfig, resolve_steps
from guided_diffusion_vae.gaussian_diffusion import DiffusionConfig
from guided_diffusion_vae.objectives import StepRNG
from guided_diffusion_vae.runs import spaces, training
from guided_diffusion_vae.runs.factories import create_diffusion, create_model_and_diffusion_vae
from guided_diffusion_vae.runs.teacher import Teacher
from guided_diffusion_vae.sampling import SAMPLERS, deterministic_sampler
from guided_diffusion_vae.sampling.solvers import levels
from guided_diffusion_vae.unet import ModelConfig

MEAN, STD = 0.4, 0.5
PROCESSES = {
    "eps": DiffusionConfig(), "x0": DiffusionConfig(predict_xstart=True), "v": DiffusionConfig(predict_v=True),
    "zero_snr": DiffusionConfig(predict_v=True, noise_schedule="linear_zero_snr"),
    "flow": DiffusionConfig(process="rectified_flow"),
}


def spaced(config, steps):
    return create_diffusion(dataclasses.replace(config, timestep_respacing=f"trailing{steps}"), discrete_data=False)


def predicting(config, denoise):
    """Return the network in the prediction of a process whose x0 at x and the timestep t is denoise(x, a, b, t)."""
    signal, noise = (torch.tensor(values, dtype=torch.float64) for values in levels(create_diffusion(config)))

    def network(x, t, **conditioning):
        a, b = (values[t].view(-1, *(1,) * (x.dim() - 1)) for values in (signal, noise))
        x_0 = denoise(x, a, b, t)
        eps = (x - a * x_0) / b
        outputs = {"flow": eps - x_0, "v": a * eps - b * x_0, "x0": x_0, "eps": eps}
        kind = "flow" if config.process == "rectified_flow" else "v" if config.predict_v else (
            "x0" if config.predict_xstart else "eps")
        return outputs[kind]
    return network


def exact(config):
    """Return the exact network of x0 that is normal with MEAN and STD."""
    return predicting(config, lambda x, a, b, t: MEAN + a * STD**2 / (a**2 * STD**2 + b**2) * (x - a * MEAN))


def sample(config, steps, network, noise):
    process = spaced(config, steps)
    loop = SAMPLERS[deterministic_sampler(process)][1]
    return loop(process, network, noise.shape, noise=noise, clip_denoised=False, device="cpu")


def normal(*shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def student_config(config):
    return dataclasses.replace(config, predict_v=True) if config == DiffusionConfig() else config


def distillation(config, steps, teacher_steps):
    return Distillation(spaced(student_config(config), steps), exact(config), spaced(config, teacher_steps))


# --- Known answers ---


@pytest.mark.parametrize("name", PROCESSES)
@pytest.mark.parametrize("steps, teacher_steps", [(1, 2), (2, 4), (3, 12)])
def test_student_that_predicts_the_targets_takes_the_path_of_its_teacher(name, steps, teacher_steps):
    config, noise = PROCESSES[name], normal(7, 2, 3)
    objective = distillation(config, steps, teacher_steps)
    kept = objective.diffusion.timestep_map
    own = lambda x, a, b, t: objective.target(x, torch.tensor([kept.index(i) for i in t.tolist()]))
    student = predicting(student_config(config), own)
    expected = sample(config, teacher_steps, exact(config), noise)
    torch.testing.assert_close(sample(student_config(config), steps, student, noise), expected, atol=1e-4, rtol=1e-4)
    assert (sample(config, steps, exact(config), noise) - expected).abs().max() > 1e-2


@pytest.mark.parametrize("name", ["v", "eps", "flow"])
def test_trained_student_of_one_step_gives_the_samples_of_two_steps_of_its_teacher(name):
    """Steps on normal data are affine, and so is the student."""
    config, weight, bias = PROCESSES[name], torch.zeros(1, requires_grad=True), torch.zeros(1, requires_grad=True)
    objective, x_0 = distillation(config, 1, 2), (MEAN + STD * normal(64, 1, 1)).float()
    student = lambda x, t, **conditioning: weight * x + bias
    rng = StepRNG(0, 0, range(64), 64)
    optimizer = torch.optim.LBFGS([weight, bias], max_iter=50, line_search_fn="strong_wolfe")

    def closure():
        optimizer.zero_grad()
        loss = objective(student, x_0, {}, rng)[0]["loss"].mean()
        loss.backward()
        return loss
    optimizer.step(closure)
    noise = normal(20, 1, 1).float()
    with torch.no_grad():
        sampled = sample(student_config(config), 1, student, noise)
    torch.testing.assert_close(sampled, sample(config, 2, exact(config), noise).float(), atol=2e-3, rtol=0)


@pytest.mark.parametrize("name", ["v", "zero_snr"])
def test_loss_is_the_squared_error_of_the_velocity(name):
    objective, x_0, rng = distillation(PROCESSES[name], 4, 8), normal(16, 1, 2).float(), StepRNG(0, 0, range(16), 16)
    terms, t = objective(lambda x, t: 0 * x, x_0, {}, rng)
    a, b = (torch.tensor(values).float()[t].view(-1, 1, 1) for values in levels(objective.diffusion))
    x = objective.diffusion.q_sample(x_0, t, rng.normal((1, 2), "cpu"))
    velocity = (a * x - objective.target(x, t)) / b
    torch.testing.assert_close(terms["loss"].float(), velocity.square().mean((1, 2)).float(), rtol=1e-3, atol=1e-5)
    assert len(set(t.tolist())) == 4


def test_targets_are_those_of_the_dropped_conditioning():
    seen = {"teacher": [], "student": []}

    def network(name):
        return lambda x, t, y: seen[name].append(y.tolist()) or 0 * x
    process = PROCESSES["v"]
    objective = Distillation(spaced(process, 2), network("teacher"), spaced(process, 4), None, 0.5, 9)
    labels = torch.arange(16) % 3
    objective(network("student"), normal(16, 1, 2).float(), {"y": labels}, StepRNG(0, 0, range(16), 16))
    assert seen["teacher"] == 2 * seen["student"] and 0 < seen["student"][0].count(9) < 16


def test_targets_of_a_guided_teacher():
    def network(x, t, y):
        return 0.3 * x * (1 + y.view(-1, 1, 1))

    def guided(x, t, y):
        weak = network(x, t, 0 * y + 2)
        return weak + 3 * (network(x, t, y) - weak)
    process, config = PROCESSES["v"], ModelConfig(num_classes=2, class_dropout=0.1)
    teacher = Teacher(network, spaced(process, 4), {}, config, process, {"cfg_scale": 3.0}, 3.0)
    objective, t, y = teacher.objective(spaced(process, 2), None, False), torch.arange(2), {"y": torch.arange(2)}
    expected = Distillation(spaced(process, 2), guided, spaced(process, 4)).target(normal(2, 1, 3), t, y)
    torch.testing.assert_close(objective.target(normal(2, 1, 3), t, y), expected)
    assert objective.class_dropout == 0
    plain = teacher._replace(cfg_scale=1.0, entry={"cfg_scale": 1.0})
    assert plain.objective(spaced(process, 2), None, False).class_dropout == 0.1


def test_steps_of_the_teacher():
    config = DistillConfig(student_steps=4)
    assert resolve_steps(config) == 16 and resolve_steps(config, 8) == 8
    assert resolve_steps(dataclasses.replace(config, teacher_steps=20)) == 20
    for steps, of_teacher in ((6, 0), (4, 0), (0, 4), (0, 2)):
        with pytest.raises(ValueError, match="--student_steps 4 does not divide the . steps of the teacher: expected"):
            resolve_steps(dataclasses.replace(config, teacher_steps=steps), of_teacher)
    with pytest.raises(ValueError, match="--teacher_steps 16: the teacher is a student of 8 steps; omit the flag"):
        resolve_steps(dataclasses.replace(config, teacher_steps=16), 8)


# --- Runs ---


def write_data(folder, shape=(8, 8)):
    (folder / "images").mkdir(parents=True)
    rng = np.random.default_rng(0)
    for i, label in enumerate("abab"):
        values = rng.integers(0, 256, shape, np.uint8)
        if len(shape) == 2:
            Image.fromarray(values).save(folder / f"images/{label}_{i}.png")
        else:
            np.save(folder / f"images/{label}_{i}.npy", values)
    (folder / "images/labels.csv").write_text("name,label,speed\n" + "".join(
        f"{path.name},{path.name[0]},{i}\n" for i, path in enumerate(sorted((folder / "images").glob("?_*")))))


def write_teacher(path, size=8, process=None, condition=None, **flags):
    """Write the weights of a tiny, untrained model of the images beside it."""
    data = DataConfig(data_dir=str(path.parent / "images"), image_size=size)
    source, space = spaces.open_pixels(open_folder(data))
    model = ModelConfig(**{"num_channels": 32, "channel_mult": "1", "num_res_blocks": 1, "attention_resolutions": "",
                           "class_cond": True, "class_dropout": 0.1, **flags})
    model = training.infer_model_config(model, source)
    process = process or DiffusionConfig(predict_v=True, diffusion_steps=20)
    torch.manual_seed(0)
    network, _ = create_model_and_diffusion_vae(
        source.latent_shape, model, process, condition_channels=condition["channels"] if condition else 0)
    for p in network.parameters():      # the last layers start at zero
        torch.nn.init.normal_(p, std=0.1)
    attributes = Attributes.of_source(source, ("speed",)) if model.condition_on else None
    header = training.diffusion_header(source, space, model, process, attributes=attributes)
    checkpoint_util.save_weights(path, network.state_dict(), {**header, "condition": condition, "step": 1})
    return path


FLAGS = {"batch_size": 2, "max_steps": 1, "log_interval": 1, "ema_rate": 0.5, "student_steps": 2, "teacher_steps": 4}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Return a folder with images of two classes, a model of them, and a student of that."""
    folder = tmp_path_factory.mktemp("distilled")
    write_data(folder)
    write_teacher(folder / "model.pt")
    return folder


@pytest.fixture
def student(folder, call, one_process):
    if not (folder / "student").exists():
        status, _, err = call("distill", teacher_path=folder / "model.pt", data_dir=folder / "images", **FLAGS,
                              logdir=folder / "student")
        assert status == 0, err
    return folder / "student"


def test_student_is_a_run_that_names_its_teacher_and_is_sampled_in_its_steps(folder, student, call, tmp_path):
    assert {"model000001.pt", "ema_0.5_000001.pt", "opt000001.pt", "state000001.json", "config.json",
            "progress.csv"} <= {path.name for path in student.iterdir()} and list(student.glob("previews/*.png"))
    weights, header = checkpoint_util.load_weights(student / "ema_0.5_000001.pt")
    start = checkpoint_util.load_weights(folder / "model.pt")[0]    # one step of 1e-4 away
    assert 0 < max((weights[name] - start[name]).abs().max() for name in start) < 2e-4
    sha256 = checkpoint_util.find_weights(folder / "model.pt")[1]
    assert header["kind"] == "diffusion" and header["distillation"] == {
        "teacher": {"path": str(folder / "model.pt"), "sha256": sha256}, "teacher_steps": 4, "steps": 2, "cfg_scale": 1}
    flags = {"model_path": student, "num_samples": 2, "logdir": tmp_path}
    status, out, err = call("image_sample", **flags)
    assert status == 0 and "2 steps of ddim" in out, err
    assert open_npz(tmp_path / "samples_2x8x8x1.npz").labels.tolist() == [0, 1]
    for more, message in (
        ({"timestep_respacing": "5"}, f"--timestep_respacing 5 conflicts with {student}/ema_0.5_000001.pt, which was "
                                      "distilled for 2 steps; omit the flag"),
        ({"sampler": "ddpm"}, "ema_0.5_000001.pt, which was distilled for steps of ddim; omit the flag"),
    ):
        status, _, err = call("image_sample", **{**flags, **more, "logdir": tmp_path / "other"})
        assert status != 0 and message in err
    assert call("image_sample", **flags, cfg_scale=2, use_ddim=True, timestep_respacing="trailing2")[0] == 0


def test_student_resumes_and_is_distilled_again(student, folder, call, tmp_path):
    flags = {**FLAGS, "teacher_path": folder / "model.pt", "data_dir": folder / "images"}
    for steps in (1, 2):
        status, _, err = call("distill", **{**flags, "max_steps": steps}, logdir=tmp_path / "run")
        assert status == 0, err
    assert call("distill", **{**flags, "max_steps": 2}, logdir=tmp_path / "whole")[0] == 0
    for name in ("model000002.pt", "ema_0.5_000002.pt"):
        one, two = (checkpoint_util.load_weights(tmp_path / run / name)[0] for run in ("run", "whole"))
        assert all(torch.equal(one[key], two[key]) for key in one)
    status, _, err = call("distill", **{**flags, "student_steps": 1}, logdir=tmp_path / "run")
    assert status != 0 and "distillation.steps is 1 now, 2 in the checkpoint" in err
    again = {**flags, "teacher_path": student, "student_steps": 1, "teacher_steps": 0}
    status, _, err = call("distill", **again, logdir=tmp_path / "again")
    assert status == 0, err
    header = checkpoint_util.load_weights(tmp_path / "again/model000001.pt")[1]["distillation"]
    assert (header["teacher_steps"], header["steps"]) == (2, 1)


@pytest.mark.usefixtures("one_process")
def test_guidance_is_distilled(folder, call, tmp_path):
    flags = {**FLAGS, "teacher_path": folder / "model.pt", "data_dir": folder / "images", "cfg_scale": 3}
    status, _, err = call("distill", **flags, logdir=tmp_path / "run")
    assert status == 0, err
    assert checkpoint_util.load_weights(tmp_path / "run/model000001.pt")[1]["distillation"]["cfg_scale"] == 3
    status, _, err = call("image_sample", model_path=tmp_path / "run", num_samples=1, cfg_scale=2, logdir=tmp_path)
    assert status != 0 and "a student that is guided with scale 3 by itself; omit the flag" in err
    status, _, err = call("distill", **{**flags, "teacher_path": tmp_path / "run", "teacher_steps": 0,
                                        "student_steps": 1}, logdir=tmp_path / "again")
    assert status != 0 and "a student that is guided by itself; omit the flag" in err


@pytest.mark.usefixtures("one_process")
@pytest.mark.parametrize("shape, process, flags", [
    ((4, 6, 8), {"process": "rectified_flow"}, {}),
    ((8, 8), {"learn_sigma": True, "diffusion_steps": 1000}, {"condition_on": "speed"}),
    ((8, 8), {"predict_xstart": True}, {
        "class_cond": False, "class_dropout": 0.0, "condition": {"channels": 1, "labels": [], "value_range": ""}}),
])
def test_other_teachers(shape, process, flags, call, tmp_path):
    write_data(tmp_path, shape)
    size = "x".join(map(str, shape)) if len(shape) == 3 else 8
    write_teacher(tmp_path / "model.pt", size, DiffusionConfig(**{"diffusion_steps": 20, **process}), **flags)
    paths = {"teacher_path": tmp_path / "model.pt", "data_dir": tmp_path / "images"}
    conditions = {"condition_dir": tmp_path / "images"} if "condition" in flags else {}
    if conditions:
        status, _, err = call("distill", **paths, **FLAGS, logdir=tmp_path / "run")
        assert status != 0 and "model.pt (--teacher_path) was trained with images of 1 channels on the grid" in err
    status, _, err = call("distill", **paths, **conditions, **FLAGS, logdir=tmp_path / "run")
    assert status == 0, err
    header = checkpoint_util.load_weights(tmp_path / "run/model000001.pt")[1]
    predicts_v = header["diffusion"]["predict_v"]
    assert predicts_v == ("learn_sigma" in process) and header["diffusion"]["timestep_respacing"] == "trailing2"
    status, out, err = call("image_sample", model_path=tmp_path / "run", num_samples=2, logdir=tmp_path / "samples",
                            **conditions)
    assert status == 0 and f"2 steps of {'euler' if len(shape) == 3 else 'ddim'}" in out, err


@pytest.mark.usefixtures("one_process")
def test_teachers_and_data_that_do_not_fit_are_rejected(folder, call, tmp_path):
    write_data(tmp_path / "other")
    labels = tmp_path / "other/images/labels.csv"
    labels.write_text(labels.read_text().replace(",b,", ",c,"))
    weights, header = checkpoint_util.load_weights(folder / "model.pt")
    changes = {
        "bare": None, "upsampler": {"kind": "super_res"},
        "cosine": {"diffusion": {"noise_schedule": "cosine", "diffusion_steps": 1000}, "autoencoder": None},
        "other_latents": {"autoencoder": {"config": {}, "sha256": "0" * 64, "path": "", "scale_factor": 1.0}},
        "plain": {"model": {**header["model"], "class_dropout": 0.0, "num_classes": 3}},
    }
    for name, change in changes.items():
        if change is None:
            torch.save(dict(weights), tmp_path / f"{name}.pt")
        else:
            checkpoint_util.save_weights(tmp_path / f"{name}.pt", weights, {**header, **change})
    for name, flags, message in (
        ("bare", {}, "bare.pt has no header; --teacher_path expects a checkpoint of this project"),
        ("upsampler", {}, "--teacher_path expects a model of kind 'diffusion', got 'super_res'"),
        ("cosine", {}, "cosine.pt (--teacher_path) predicts noise and its schedule ends in pure noise"),
        ("plain", {"cfg_scale": 2}, "--cfg_scale 2 requires a teacher trained with --class_dropout > 0"),
        (folder / "model", {"cache_dir": tmp_path}, f"--cache_dir {tmp_path} conflicts with {folder}/model.pt"),
        (folder / "model", {"condition_dir": tmp_path}, "was trained without conditions; omit the flag"),
        (folder / "model", {"data_dir": tmp_path / "other/images"}, "expected the classes of"),
        (folder / "model", {"image_size": 4}, "does not match the diffusion model: expected x0 shape [1, 8, 8]"),
        (folder / "model", {"student_steps": 3}, "--student_steps 3 does not divide the 4 steps of the teacher"),
    ):
        flags = {**FLAGS, "teacher_path": tmp_path / f"{name}.pt", "data_dir": folder / "images", **flags}
        status, _, err = call("distill", **flags, logdir=tmp_path / "run")
        assert status != 0 and message in err, (message, err)
