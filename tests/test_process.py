"""A diffusion process is one file and one line in each of two tables: shown with straight lines from noise to data."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

from guided_diffusion_vae import checkpoint_util
from guided_diffusion_vae.config import as_dict
from guided_diffusion_vae.data import open_npz
from guided_diffusion_vae.gaussian_diffusion import DiffusionConfig, LossType, ModelMeanType, ModelVarType
from guided_diffusion_vae.interfaces import Process
from guided_diffusion_vae.respace import space_timesteps
from guided_diffusion_vae.runs import factories
from guided_diffusion_vae.runs.factories import PROCESSES, create_diffusion, create_gaussian_diffusion
from guided_diffusion_vae.sampling import SAMPLERS
from guided_diffusion_vae.sampling.solvers import applicable_samplers
from guided_diffusion_vae.unet import ClassifierConfig, ModelConfig, SuperResConfig

pytestmark = pytest.mark.usefixtures("one_process")


class StraightLines(Process):
    """x_t = (1 - s) x0 + s eps with s = (t + 1) / T; the network predicts the velocity eps - x0."""

    def __init__(self, steps, respacing):
        self.timestep_map = sorted(space_timesteps(steps, respacing or [steps]))
        self.num_timesteps = len(self.timestep_map)
        self.times = (torch.tensor(self.timestep_map) + 1) / steps

    def _time(self, t, x):
        return self.times.to(t.device)[t].view(-1, *(1,) * (x.dim() - 1))

    def q_sample(self, x_start, t, noise=None):
        noise = torch.randn_like(x_start) if noise is None else noise
        return torch.lerp(x_start, noise, self._time(t, x_start))

    def training_losses(self, model, x_start, t, model_kwargs=None, noise=None):
        noise = torch.randn_like(x_start) if noise is None else noise
        velocity = model(self.q_sample(x_start, t, noise), self.model_timesteps(t), **(model_kwargs or {}))
        return {"loss": ((noise - x_start - velocity) ** 2).flatten(1).mean(1)}

    def predict_xstart(self, model, x, t, clip_denoised=True, denoised_fn=None, cond_fn=None, model_kwargs=None):
        velocity = model(x, self.model_timesteps(t), **(model_kwargs or {}))
        x0 = x - self._time(t, x) * velocity
        return x0.clamp(-1, 1) if clip_denoised else x0

    def noise_levels(self):
        with np.errstate(divide="ignore"):
            return (self.times / (1 - self.times)).double().numpy()

    def model_timesteps(self, t):
        return torch.tensor(self.timestep_map, device=t.device)[t]


class MeasurableLines(StraightLines):
    def calc_bpd_loop(self, model, x_start, clip_denoised=True, model_kwargs=None):
        row = x_start.flatten(1).mean(1, keepdim=True).expand(-1, self.num_timesteps)
        return {"total_bpd": row.sum(1), "vb": row, "mse": row, "xstart_mse": row}


@torch.no_grad()
def euler_loop(diffusion, model, shape, noise=None, clip_denoised=True, device=None, model_kwargs=None, **_):
    """Return x0, integrated from the last timestep to the first."""
    x, times = noise, [0.0, *diffusion.times.tolist()]
    for i in reversed(range(diffusion.num_timesteps)):
        t = torch.full((len(x),), i, device=device)
        x0 = diffusion.predict_xstart(model, x, t, clip_denoised, model_kwargs=model_kwargs)
        x = x0 + (x - x0) * times[i] / times[i + 1]
    return x


@pytest.fixture
def straight(monkeypatch):
    """Enter the process and its sampler into the tables."""
    create = lambda config, discrete_data: StraightLines(config.diffusion_steps, config.timestep_respacing)
    monkeypatch.setitem(PROCESSES, "straight", create)
    monkeypatch.setitem(SAMPLERS, "euler", (StraightLines, euler_loop))


@pytest.fixture
def data(tmp_path):
    """Folder of constant 8x8 images, dark ones of class a and bright ones of class b."""
    (tmp_path / "data").mkdir()
    for i in range(8):
        value = 30 + i if i % 2 else 220 + i
        Image.new("L", (8, 8), value).save(tmp_path / "data" / f"{'ab'[i % 2 == 0]}_{i}.png")
    return tmp_path / "data"


FLAGS = {"image_size": 8, "num_channels": 32, "num_res_blocks": 1, "channel_mult": "1", "attention_resolutions": "8",
         "class_cond": True, "class_dropout": 0.2, "diffusion_steps": 20, "process": "straight", "batch_size": 8}


def test_toy_process_trains_samples_and_is_guided_by_the_scripts(straight, call, data, tmp_path):
    run = tmp_path / "run"
    flags = {**FLAGS, "lr": 3e-3, "ema_rate": "0.9", "save_interval": 60, "log_interval": 20, "max_steps": 60}
    status, _, err = call("image_train", data_dir=data, logdir=run, **flags)
    assert status == 0, err
    assert (run / "previews" / "000060.png").is_file()
    weights, header = checkpoint_util.load_weights(run / "ema_0.9_000060.pt")
    assert header["diffusion"]["process"] == "straight" and header["normalizer"]["mode"] == "none"

    means = {}
    for scale in (1, 3):
        folder = tmp_path / f"scale_{scale}"
        status, out, err = call("image_sample", model_path=run, num_samples=4, batch_size=4, cfg_scale=scale,
                                cfg_interval="" if scale == 1 else "0.1,9", timestep_respacing="10", logdir=folder)
        assert status == 0 and "10 steps of euler" in out, err
        samples = open_npz(folder / "samples_4x8x8x1.npz")
        assert samples.labels.tolist() == [0, 1, 0, 1]
        means[scale] = samples.images.reshape(2, 2, -1).mean((0, 2))
    assert means[1][1] - means[1][0] > 60       # the classes differ as in the data, and guidance separates them
    assert means[3][1] - means[3][0] >= means[1][1] - means[1][0]

    status, _, err = call("image_sample", model_path=run, sampler="ddim", num_samples=1, logdir=tmp_path / "other")
    assert status == 1 and "--sampler ddim does not apply to the process of the model: expected one of: euler" in err
    status, _, err = call("export", model_path=run, format="diffusers", out=tmp_path / "exported")
    assert status == 1 and "its diffusion process is straight (--process)" in err
    status, _, err = call("export", model_path=run, out=tmp_path / "exported.safetensors")
    assert status == 0 and checkpoint_util.load_weights(tmp_path / "exported.safetensors")[1] == header, err


def test_toy_process_is_measured_only_if_it_defines_a_likelihood(straight, call, data, tmp_path, monkeypatch):
    status, _, err = call("image_train", data_dir=data, logdir=tmp_path / "run", max_steps=1, **FLAGS)
    assert status == 0, err
    flags = {"model_path": tmp_path / "run", "data_dir": data, "num_samples": 2, "logdir": tmp_path / "nll"}
    status, _, err = call("image_nll", **flags)
    assert status == 1 and "error: StraightLines defines no likelihood" in err and "Traceback" not in err
    create = lambda config, discrete_data: MeasurableLines(config.diffusion_steps, config.timestep_respacing)
    monkeypatch.setitem(PROCESSES, "straight", create)
    status, _, err = call("image_nll", **flags)
    assert status == 0 and "bits_per_dim" in json.loads((tmp_path / "nll" / "metrics.json").read_text()), err


def test_toy_process_trains_on_a_latent_cache_with_its_normalizer(straight, call, tmp_path):
    (tmp_path / "latents").mkdir()
    latents = 3 * np.random.default_rng(0).normal(size=(8, 4, 8, 8)).astype(np.float32)
    for i, latent in enumerate(latents):
        np.save(tmp_path / "latents" / f"{'ab'[i % 2]}_{i}.npy", latent)
    flags = {name: value for name, value in FLAGS.items() if name != "image_size"}
    status, _, err = call("image_train_vae", cache_dir=tmp_path / "latents", logdir=tmp_path / "run", max_steps=1,
                          **flags)
    assert status == 0, err
    header = checkpoint_util.load_weights(tmp_path / "run" / "model000001.pt")[1]
    assert header["normalizer"] == {"mode": "auto", "shift": [0.0], "std": [pytest.approx(latents.std(), rel=1e-5)]}
    row = (tmp_path / "run" / "progress.csv").read_text().splitlines()
    assert float(dict(zip(row[0].split(","), row[1].split(",")))["x0_std"]) == pytest.approx(1, rel=1e-5)


def test_process_is_read_from_the_table_and_absent_means_gaussian(straight):
    assert applicable_samplers(create_diffusion({"process": "straight"})) == ["euler"]
    assert "euler" not in applicable_samplers(create_diffusion({"diffusion_steps": 30}))
    with pytest.raises(ValueError, match="--process curved: expected one of: gaussian, rectified_flow, straight"):
        create_diffusion({"process": "curved"})


@pytest.mark.parametrize("create", [lambda: create_diffusion({}), lambda: StraightLines(10, "")])
def test_processes_have_every_member_of_the_interface(create):
    process = create()
    assert isinstance(process, Process)
    assert len(process.noise_levels()) == len(process.scales()) == process.num_timesteps
    x, noise, t = torch.zeros(2, 1, 4), torch.ones(2, 1, 4), torch.tensor([0, 3])
    diffused = process.noise_condition(noise, t, x)
    assert (diffused[0] == 1).all() and (diffused[1] < 1).all()
    # sigma is the ratio of noise to signal in x_t
    ratio = process.q_sample(x, t, noise) / process.q_sample(noise, t, x)
    torch.testing.assert_close(ratio[:, 0, 0].double(), torch.from_numpy(process.noise_levels())[t], rtol=1e-4, atol=0)


def test_process_without_a_required_method_cannot_be_constructed():
    class Incomplete(Process):
        pass

    with pytest.raises(TypeError, match="abstract"):
        Incomplete()


# --- Factories ---


@pytest.mark.parametrize("flags, mean, var, loss", [
    ({}, "EPSILON", "FIXED_LARGE", "MSE"), ({"sigma_small": True}, "EPSILON", "FIXED_SMALL", "MSE"),
    ({"learn_sigma": True, "rescale_learned_sigmas": True}, "EPSILON", "LEARNED_RANGE", "RESCALED_MSE"),
    ({"use_kl": True, "predict_xstart": True}, "START_X", "FIXED_LARGE", "RESCALED_KL"),
    ({"predict_v": True, "min_snr_gamma": 3.0, "rescale_timesteps": True}, "VELOCITY", "FIXED_LARGE", "MIN_SNR"),
])
def test_flags_select_prediction_variance_and_loss(flags, mean, var, loss):
    process = create_gaussian_diffusion(steps=50, discrete_data=False, **flags)
    assert (process.model_mean_type, process.model_var_type) == (ModelMeanType[mean], ModelVarType[var])
    assert process.loss_type == LossType[loss] and process.min_snr_gamma == flags.get("min_snr_gamma", 0)
    assert process.rescale_timesteps == flags.get("rescale_timesteps", False) and process.discrete_data is False
    assert create_gaussian_diffusion(steps=50).discrete_data is True


@pytest.fixture
def networks(monkeypatch):
    """Networks are the arguments of their classes."""
    for name in ("UNetModel", "SuperResModel", "EncoderUNetModel"):
        monkeypatch.setattr(factories, name, lambda name=name, **arguments: {"class": name, **arguments})


@pytest.mark.parametrize("size, unet, classifier, upsampler", [
    (512, (0.5, 1, 1, 2, 2, 4, 4), (0.5, 1, 1, 2, 2, 4, 4), (1, 1, 2, 2, 4, 4)),
    (256, (1, 1, 2, 2, 4, 4), (1, 1, 2, 2, 4, 4), (1, 1, 2, 2, 4, 4)), (128, (1, 1, 2, 3, 4), (1, 1, 2, 3, 4), None),
    (64, (1, 2, 3, 4), (1, 2, 3, 4), (1, 2, 3, 4)), (32, (1, 2, 2, 4), None, None), (16, (1, 2, 2), None, None),
])
def test_default_widths_are_those_of_the_released_networks(networks, size, unet, classifier, upsampler):
    shape, model = (3, size // 2, size), ModelConfig(attention_resolutions="16,8")     # the longest side decides
    build = factories.create_model_and_diffusion_vae
    built = {"unet": build(shape, model, DiffusionConfig())[0]}
    if classifier:
        built["classifier"] = factories.build_classifier(ClassifierConfig(), DiffusionConfig(), shape)[0]
    if upsampler:
        built["upsampler"] = build(shape, model, DiffusionConfig(), SuperResConfig(large_size=size))[0]
    expected = {"unet": unet, "classifier": classifier, "upsampler": upsampler}
    assert {name: network["channel_mult"] for name, network in built.items()} == {
        name: mult for name, mult in expected.items() if mult}
    assert built["unet"]["attention_resolutions"] == (size // 16, size // 8)
    assert "classifier" not in built or built["classifier"]["image_size"] == (size // 2, size)


def test_networks_get_the_flags_and_the_facts_of_the_data(networks):
    model = ModelConfig(num_channels=96, num_res_blocks=3, channel_mult="1,2", class_cond=True, num_classes=5,
                        class_dropout=0.1, dropout=0.2, use_fp16=True)
    diffusion = DiffusionConfig(learn_sigma=True)
    network, process = factories.create_model_and_diffusion_vae((4, 8, 8, 8), model, diffusion)
    facts = {"class": "UNetModel", "image_size": 8, "in_channels": 4, "out_channels": 8, "dims": 3, "num_classes": 6,
             "model_channels": 96, "num_res_blocks": 3, "dropout": 0.2, "use_fp16": True}
    assert network.items() >= facts.items() and process.discrete_data is False
    network, process = factories.create_model_and_diffusion_vae((4, 8, 8, 8), model, diffusion, SuperResConfig(), True)
    assert network.items() >= {**facts, "class": "SuperResModel"}.items() and process.discrete_data is True
    config = ClassifierConfig(
        classifier_width=128, classifier_depth=4, classifier_channel_mult="1,2", classifier_dims=3,
        classifier_in_channels=4, classifier_num_classes=7, classifier_use_fp16=True,
        classifier_attention_resolutions="4", classifier_pool="spatial",
    )
    network, process = factories.build_classifier(config, diffusion, (4, 8, 8, 8))
    assert network.items() >= {
        "class": "EncoderUNetModel", "image_size": 8, "in_channels": 4, "out_channels": 7, "model_channels": 128,
        "num_res_blocks": 4, "num_head_channels": 64, "dims": 3, "use_fp16": True, "attention_resolutions": (2,),
        "pool": "spatial", "channel_mult": (1, 2)}.items()
    assert create_diffusion(as_dict(diffusion), discrete_data=False).discrete_data is False
