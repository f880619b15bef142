"""Edits: known answers of their steps with exact networks, and each mode through the sampler on tiny images."""

import dataclasses
import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from guided_diffusion_vae import checkpoint_util
from guided_diffusion_vae.config import validate
from guided_diffusion_vae.data import DataConfig, open_folder, open_npz
from guided_diffusion_vae.data.attributes import Attributes
from guided_diffusion_vae.gaussian_diffusion import DiffusionConfig
from guided_diffusion_vae.interfaces import ImageSource
from guided_diffusion_vae.runs import spaces, training
from guided_diffusion_vae.runs.factories import create_diffusion, create_model_and_diffusion_vae
from guided_diffusion_vae.sampling import SAMPLERS, SamplingConfig, generate_samples
from guided_diffusion_vae.sampling import generate as generate_module
from guided_diffusion_vae.sampling.editing import (
    EditingConfig, ImageEdit, Inpainting, Interpolation, Inversion, Variation, inpaint, invert, levels, require_mode,
    resampling_timesteps, seam, slerp,
)
from guided_diffusion_vae.unet import ModelConfig
from guided_diffusion_vae.vae_wrapper import LatentNormalizer, PixelCodec

CPU = torch.device("cpu")
MEAN, STD = 0.4, 0.5
PROCESSES = {
    "eps": DiffusionConfig(timestep_respacing="40"), "v": DiffusionConfig(timestep_respacing="40", predict_v=True),
    "flow": DiffusionConfig(process="rectified_flow", timestep_respacing="40"),
}


def exact(process, mean=MEAN, std=STD):
    """Return the exact network of x0 that is normal with `mean` and `std`, possibly tensors."""
    whole = create_diffusion(dataclasses.replace(process, timestep_respacing=""))
    signal, noise = (torch.tensor(values, dtype=torch.float64) for values in levels(whole))

    def network(x, t, **conditioning):
        a, b = (values[t].view(-1, *(1,) * (x.dim() - 1)) for values in (signal, noise))
        x_0 = mean + a * std**2 / (a**2 * std**2 + b**2) * (x - a * mean)
        if process.process == "rectified_flow":
            return ((x - x_0) / b).to(x.dtype)
        eps = (x - a * x_0) / b
        return (a * eps - b * x_0 if process.predict_v else eps).to(x.dtype)
    return network


def normal(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def drawing(seed):
    """Return a `noise_fn`."""
    generator = torch.Generator().manual_seed(seed)
    return lambda x: torch.randn(x.shape, generator=generator, dtype=x.dtype)


# --- Steps ---


@pytest.mark.parametrize("name", PROCESSES)
def test_levels_are_those_of_the_process(name):
    process = create_diffusion(PROCESSES[name])
    x_0, eps, t = normal(40, 1, 3), normal(40, 1, 3, seed=1), torch.arange(40)
    signal, noise = (torch.tensor(values[:-1]).view(-1, 1, 1) for values in levels(process))
    torch.testing.assert_close(signal * x_0 + noise * eps, process.q_sample(x_0, t, eps), atol=1e-6, rtol=0)
    assert levels(process)[0][-1] == 1 and levels(process)[1][-1] == 0


@pytest.mark.parametrize("name", ["v", "flow"])
def test_inversion_of_normal_data_gives_normal_noise_that_samples_the_same_data(name):
    process, network = create_diffusion(PROCESSES[name]), exact(PROCESSES[name])
    x_0 = MEAN + STD * normal(500, 1, 4)
    sampler = SAMPLERS["euler" if name == "flow" else "ddim"][1]
    errors = []
    for refinements in (0, 1, 3):
        noise = invert(process, network, x_0, refinements, CPU, clip_denoised=False)
        sampled = sampler(process, network, x_0.shape, noise=noise, clip_denoised=False, device=CPU)
        errors.append((sampled - x_0).square().mean().sqrt().item())
    assert abs(noise.mean()) < 0.1 and abs(noise.std() - 1) < 0.1
    assert errors[0] < 0.1 and errors[1] < errors[0] / 3 and errors[2] < 1e-3


def test_sections_are_walked_several_times():
    assert resampling_timesteps(5, 2, 2) == [4, 3, 4, 3, 2, 1, 2, 1, 0, 0]
    assert resampling_timesteps(3, 1, 1) == resampling_timesteps(3, 9, 1) == [2, 1, 0]


@pytest.mark.parametrize("name, section, times", [("eps", 1, 1), ("v", 4, 3), ("flow", 4, 3)])
def test_inpainting_keeps_the_known_part_and_samples_the_rest(name, section, times):
    process = create_diffusion(dataclasses.replace(PROCESSES[name], timestep_respacing="200"))
    known, region = torch.full((2000, 1, 2), 3.0, dtype=torch.float64), torch.tensor([[[False, True]]])
    draw = drawing(1)
    sampled = inpaint(process, exact(PROCESSES[name]), draw(known), known, region, draw, section, times, CPU,
                      clip_denoised=False)
    assert (sampled[..., 0] == 3).all()
    assert abs(sampled[..., 1].mean() - MEAN) < 0.05 and abs(sampled[..., 1].std() / STD - 1) < 0.06


def test_resampling_makes_the_filled_part_agree_with_the_known_one():
    """Both parts of x0 are equal; filled parts are then to equal the known ones, which are one deviation above."""
    process = create_diffusion(DiffusionConfig(timestep_respacing="10", predict_v=True))
    known, region = torch.ones(1000, 1, 2, dtype=torch.float64), torch.tensor([[[False, True]]])

    def network(x, t):      # the mean of both determines the common value, its noise has half the variance
        a = torch.tensor(levels(create_diffusion(DiffusionConfig()))[0])[t].view(-1, 1, 1)
        b = (1 - a**2).sqrt()
        x_0 = (a / (a**2 + b**2 / 2) * x.mean(-1, keepdim=True)).expand_as(x)
        return (a * x - x_0) / b

    draw, errors = drawing(1), []
    for times in (1, 8):
        sampled = inpaint(process, network, draw(known), known, region, draw, 2, times, CPU, clip_denoised=False)
        errors.append((sampled[..., 1] - 1).abs().mean().item())
    assert errors[1] < 0.6 * errors[0]


def test_slerp_passes_from_end_to_end_at_constant_norm():
    a, b = normal(1, 2, 5000), normal(1, 2, 5000, seed=1)
    path = slerp(a.expand(5, -1, -1), b.expand(5, -1, -1), torch.linspace(0, 1, 5))
    torch.testing.assert_close(path[[0, 4]], torch.cat([a, b]))
    assert abs(path.std((1, 2)) - 1).max() < 0.03
    torch.testing.assert_close(slerp(a, a, torch.tensor([0.3])), a)


def test_seam_is_the_step_across_the_edge():
    image, region = np.zeros((1, 4, 4)), np.zeros((4, 4), bool)
    region[:2], image[0, :2], image[0, 0] = True, 0.5, 9.0
    assert seam(image, region) == 0.5 and seam(image, region | True) is None


@pytest.mark.parametrize("name", ["v", "flow"])
@pytest.mark.parametrize("solver", ["default", "dpmpp"])
def test_truncated_process_samples_normal_data_from_noised_data(name, solver):
    process, network = create_diffusion(PROCESSES[name]), exact(PROCESSES[name])
    part = process.truncated(15)
    solver = ("euler" if name == "flow" else "ddim") if solver == "default" else solver
    x_0 = MEAN + STD * normal(2000, 1, 2)
    start = part.q_sample(x_0, torch.full((2000,), 14), normal(2000, 1, 2, seed=1))
    sampled = SAMPLERS[solver][1](part, network, x_0.shape, noise=start, clip_denoised=False, device=CPU)
    assert abs(sampled.mean() - MEAN) < 0.03 and abs(sampled.std() / STD - 1) < 0.1
    assert len(part.noise_levels()) == len(part.scales()) == 15 and part.timestep_map == process.timestep_map[:15]


# --- Samplers ---


@dataclasses.dataclass
class Images(ImageSource):
    """Arrays [N x C x ...] as an image source."""

    values: torch.Tensor
    folder, class_names, preprocessing, fingerprint = "images", None, {}, ""
    labels = None

    def __post_init__(self):
        self.shape = self.unpadded_shape = tuple(self.values.shape[1:])
        self.names = [str(i) for i in range(len(self.values))]

    def batch(self, indices, flips=None, rngs=None):
        return self.values[torch.as_tensor(indices)]


class Coarse(PixelCodec):
    """A lossy codec: a latent of 2 x 2 pixels, which sees all others through their mean."""

    def __init__(self):
        super().__init__(1)
        self.factors = (2, 2)

    def encode_batch(self, images, eps=None):
        return F.avg_pool2d(2 * images - 1, 2) + images.mean((1, 2, 3), keepdim=True)

    def decode_batch(self, latents, channels=None):
        return F.interpolate((latents + 1) / 2, scale_factor=2).clamp(0, 1)


def editor(kind, images, config=PROCESSES["v"], codec=None, **fields):
    """Return an edit of images in [0, 1] by the exact network of normal latents, by default of pixels."""
    shape = tuple(images.shape[1:])
    codec = codec or PixelCodec(shape[0], len(shape) - 1)
    return kind(exact(config), create_diffusion(config), codec.latent_shape(shape), codec,
                LatentNormalizer([0], [1], "none"), shape, clip_denoised=False, source=Images(images), **fields)


def images_like(*shape):
    """Return images of which most pixels are typical of the exact network, and on the grid of 8 bits."""
    pixels = 2 * torch.from_numpy(np.random.default_rng(0).normal(0.5 + MEAN / 2, STD / 4, shape)).float().clamp(0, 1)
    return (255 * pixels / 2).round() / 255


def run(sampler, folder, count=None, **config):
    """Return results as they are written, [N x *image_shape] in 1/255."""
    config = SamplingConfig(**{"num_samples": count or sampler.count, "batch_size": 2, **config})
    path = generate_samples(sampler, None, config, folder, CPU)
    return torch.from_numpy(np.moveaxis(open_npz(path).images, -1, 1).copy())


@pytest.mark.parametrize("shape, codec", [((3, 2, 6, 8), None), ((2, 1, 4, 6, 4), None), ((3, 1, 8, 8), Coarse())])
def test_inpainting_keeps_all_pixels_outside_the_region(shape, codec, tmp_path):
    images, region = images_like(*shape), np.zeros(shape[2:], bool)
    region[..., 1:3, 2:4] = True
    sampler = editor(Inpainting, images, codec=codec, region=region, section=5, times=2)
    results = run(sampler, tmp_path)
    outside = torch.from_numpy(~region).expand(shape)
    assert torch.equal(results[outside], (255 * images[outside]).round().to(torch.uint8))
    inside = results[~outside] / 127.5 - 1
    assert (results[~outside] != (255 * images[~outside]).round()).float().mean() > 0.9
    assert codec or abs(inside.mean() - MEAN) < 0.25 and abs(inside.std() - STD) < 0.3
    report = sampler.report(results.numpy())
    assert report["max_error_of_known_pixels"] < 1e-6 and report["filled_fraction"] == region.mean()
    assert sampler.sheet(results.numpy()).size[1] > 0


def test_inpainting_does_not_see_the_pixels_of_the_region():
    images = images_like(2, 1, 6, 8)
    region = np.zeros((6, 8), bool)
    region[2:4, 3:6] = True
    other = torch.where(torch.from_numpy(region), 1 - images, images)
    one, two = (editor(Inpainting, each, codec=Coarse(), region=region).sample_x0([0, 1], None, CPU)
                for each in (images, other))
    torch.testing.assert_close(one, two)


def test_masks_are_filled_above_half_of_their_maximum():
    masks = torch.tensor([[0.0, 1.0, 0.4, 0.6], [0.0, 1 / 255, 0.0, 0.0]]).view(2, 1, 1, 4)
    sampler = editor(Inpainting, images_like(3, 1, 1, 4), region=Images(masks))
    expected = [[False, True, False, True], [False, True, False, False]]
    assert sampler.regions([0, 1, 2]).view(3, 4).tolist() == [*expected, expected[0]]


def test_latents_of_the_region_are_those_with_a_pixel_in_it(monkeypatch):
    region, seen = np.zeros((8, 8), bool), []
    region[3, 4] = True
    sampler = editor(Inpainting, images_like(1, 1, 8, 8), codec=Coarse(), region=region)
    monkeypatch.setattr("guided_diffusion_vae.sampling.editing.inpaint",
                        lambda diffusion, model, x, known, region, *rest, **more: seen.append(region) or x)
    sampler.sample_x0([0], None, CPU)
    assert seen[0].nonzero().tolist() == [[0, 0, 1, 2]] and seen[0].shape == (1, 1, 4, 4)


def test_variation_of_strength_0_is_the_reconstruction_and_of_strength_1_any_sample(tmp_path):
    images = images_like(3, 1, 4, 4)
    kept = run(editor(Variation, images, strength=0.0), tmp_path / "0")
    assert torch.equal(kept, (255 * images).round().to(torch.uint8))
    flow = editor(Variation, images, PROCESSES["flow"], strength=1.0)
    plain = editor(ImageEdit, images, PROCESSES["flow"])
    torch.testing.assert_close(flow.sample_x0([0, 1], None, CPU), plain.sample_x0([0, 1], None, CPU))
    distances = []
    for count in (2, 6, 40):
        sampler = editor(Variation, images, strength=count / 40)
        sampler = dataclasses.replace(sampler, diffusion=sampler.diffusion.truncated(count))
        distances.append(sampler.report(run(sampler, tmp_path / str(count)).numpy())["l1"])
    assert 0 < distances[0] < distances[1] < distances[2]


@pytest.mark.parametrize("name, solver", [("v", "ddim"), ("flow", "euler")])
def test_inverted_images_are_sampled_again(name, solver, tmp_path, capsys):
    images = images_like(5, 1, 4, 4)
    sampler = editor(Inversion, images, PROCESSES[name], solver=solver, refinements=3)
    results = run(sampler, tmp_path)
    assert (results.float() - 255 * images).abs().max() <= 1.01
    assert sampler.report(results.numpy())["psnr"] > 45 and "round trip of x0: RMS error" in capsys.readouterr().out


@pytest.mark.parametrize("batch", [1, 4])
def test_interpolation_of_images_goes_from_one_to_the_next(batch, tmp_path):
    images = images_like(3, 1, 4, 4)
    sampler = editor(Interpolation, images, solver="ddim", refinements=3, frames=5)
    results = run(sampler, tmp_path, batch_size=batch)
    assert len(results) == 10 and sampler.items(range(10)) == [0, 0, 0, 1, 1, 1, 1, 1, 2, 2]
    for frame, image in ((0, 0), (4, 1), (5, 1), (9, 2)):
        assert (results[frame].float() - 255 * images[image]).abs().max() <= 1.01
    report = sampler.report(results.numpy())
    assert report["l1_of_ends"] < 0.005 and report["largest_step"] < 2 * report["mean_step"]
    assert sampler.sheet(results.numpy()).size[0] > 7 * 4


def test_interpolation_of_seeds_ends_at_their_samples():
    sampler = editor(Interpolation, images_like(1, 1, 4, 4), solver="ddim", frames=3, seeds=(7, 8))
    ends = sampler.sample_x0(range(3, 6), None, CPU)[[0, 2]]
    plain = [dataclasses.replace(editor(ImageEdit, images_like(1, 1, 4, 4), solver="ddim"), seed=seed)
             .sample_x0([1], None, CPU) for seed in (7, 8)]
    torch.testing.assert_close(ends, torch.cat(plain), atol=1e-5, rtol=1e-4)


def test_results_have_the_class_of_their_image_unless_another_is_requested():
    sampler = editor(Variation, images_like(3, 1, 4, 4), num_classes=4, source_labels=np.array([3, 1, 0]))
    assert sampler.labels(range(4), sampler.parse_classes("")).tolist() == [3, 1, 0, 3]
    assert sampler.labels(range(4), sampler.parse_classes("2,1")).tolist() == [2, 1, 2, 2]
    with pytest.raises(ValueError, match="--classes is not set: expected classes of the results, as the images have"):
        dataclasses.replace(sampler, source_labels=None).parse_classes("")


def test_images_are_inverted_with_their_attributes_and_sampled_with_the_requested_ones():
    seen, network = [], exact(PROCESSES["v"])
    attributes = Attributes(("speed",), (1.0,), (2.0,), (0.0,), (5.0,), (0.0,))
    sampler = editor(Inversion, images_like(2, 1, 4, 4), solver="ddim", attributes=attributes,
                     source_attributes=np.array([[3.0], [5.0]], np.float32))
    sampler = dataclasses.replace(sampler, model=lambda x, t, attributes: seen.append(attributes.tolist())
                                  or network(x, t))
    sampler.sample_x0([0, 1], None, CPU)
    assert seen[0] == seen[-1] == [[1.0], [2.0]]
    dataclasses.replace(sampler, attribute_ranges=((-1.0, -1.0),)).sample_x0([0, 1], None, CPU)
    assert seen[80] == [[1.0], [2.0]] and seen[-1] == [[-1.0], [-1.0]]


@pytest.mark.parametrize("flags, data_dir, match", [
    ({}, "d", "--mode is not set: expected one of: inpaint, variation, interpolate, invert"),
    ({"mode": "invert"}, "", "--data_dir is not set: --mode invert expects images to edit"),
    ({"mode": "invert", "strength": 0.4}, "d", "--strength 0.4 has no effect with --mode invert; omit it, or set"),
    ({"mode": "inpaint"}, "d", "--mode inpaint: expected either --mask_dir or --mask_box"),
    ({"mode": "inpaint", "mask_dir": "m", "mask_box": "0:1,0:1"}, "d", "expected either --mask_dir or --mask_box"),
    ({"mode": "inpaint", "mask_dir": "m", "sampler": "ddim"}, "d", "--sampler does not apply to --mode inpaint"),
    ({"mode": "invert", "sampler": "dpmpp"}, "d", "--sampler dpmpp does not apply to --mode invert"),
    ({"mode": "interpolate", "seeds": "1"}, "", "--seeds 1: expected two seeds, such as 1,2"),
    ({"mode": "interpolate", "seeds": "1,2"}, "d", "--seeds 1,2 and --data_dir d are mutually exclusive"),
])
def test_flags_that_do_not_fit_the_mode_are_named(flags, data_dir, match):
    with pytest.raises(ValueError, match=match):
        require_mode(EditingConfig(**flags), flags, data_dir)


@pytest.mark.parametrize("text", ["4:2,0:1", "1,2", "a:b"])
def test_invalid_boxes_are_rejected(text):
    with pytest.raises(ValueError, match="--mask_box must be a range start:stop per axis"):
        validate(EditingConfig(mask_box=text))


# --- The script ---


def write_model(folder, size):
    """Write model.pt into a folder: a tiny, untrained model of the data in its subfolder images."""
    source, space = spaces.open_pixels(open_folder(DataConfig(data_dir=str(folder / "images"), image_size=size)))
    model = ModelConfig(num_channels=32, channel_mult="1", num_res_blocks=1, attention_resolutions="", class_cond=True)
    model = training.infer_model_config(model, source)
    process = DiffusionConfig(diffusion_steps=6, noise_schedule="cosine", predict_v=True)
    network, _ = create_model_and_diffusion_vae(source.latent_shape, model, process)
    header = training.diffusion_header(source, space, model, process)
    checkpoint_util.save_weights(folder / "model.pt", network.state_dict(), {**header, "step": 1})


@pytest.fixture(scope="module")
def edited(tmp_path_factory):
    """Return a folder with images of two classes, masks, and a model of them."""
    folder = tmp_path_factory.mktemp("edited")
    for name in ("images", "masks"):
        (folder / name).mkdir()
    for i, label in enumerate("abab"):
        pixels = (127 * images_like(1, 1, 8, 8)[0, 0].roll(i, 0).numpy() + 60 * i).astype(np.uint8)
        Image.fromarray(pixels).save(folder / f"images/{label}_{i}.png")
        Image.fromarray(np.tri(8, k=i - 3, dtype=np.uint8) * 255).save(folder / f"masks/{label}_{i}.png")
    write_model(folder, 8)
    return folder


@pytest.mark.usefixtures("one_process")
def test_volumes_are_filled_where_the_mask_of_their_name_is(call, tmp_path):
    rng = np.random.default_rng(0)
    for name in ("images", "masks"):
        (tmp_path / name).mkdir()
    volumes, masks = rng.integers(0, 256, (2, 4, 6, 8), np.uint8), rng.integers(0, 2, (2, 4, 6, 8), np.uint8)
    for i, label in enumerate("ab"):
        np.save(tmp_path / f"images/{label}_{i}.npy", volumes[i])
        np.save(tmp_path / f"masks/{label}_{i}.npy", masks[i])
    write_model(tmp_path, "4x6x8")
    status, _, err = call("image_edit", mode="inpaint", model_path=tmp_path / "model.pt", data_dir=tmp_path / "images",
                          mask_dir=tmp_path / "masks", resampling=1, logdir=tmp_path / "run")
    assert status == 0, err
    results = open_npz(tmp_path / "run/samples_2x4x6x8x1.npz").images[..., 0]
    assert (results == volumes)[masks == 0].all() and (results == volumes)[masks == 1].mean() < 0.1


@pytest.mark.usefixtures("one_process")
@pytest.mark.parametrize("flags, count, row", [
    ({"mode": "inpaint", "mask_dir": "masks", "resampling": 2}, 4, "seam"),
    ({"mode": "inpaint", "mask_box": "2:6,0:3", "classes": "b", "num_samples": 5}, 5, "seam_of_images"),
    ({"mode": "variation", "strength": 0.5, "sampler": "dpmpp_sde"}, 4, "psnr"),
    ({"mode": "invert", "refinements": 0}, 4, "psnr"), ({"mode": "interpolate", "num_frames": 3}, 9, "l1_of_ends"),
    ({"mode": "interpolate", "seeds": "1,2", "num_samples": 8}, 8, "largest_step"),
])
def test_script_writes_results_sheet_and_report(edited, call, tmp_path, flags, count, row):
    images = {} if "seeds" in flags else {"data_dir": edited / "images"}
    flags = {**flags, **({"mask_dir": edited / "masks"} if "mask_dir" in flags else {}), "logdir": tmp_path}
    status, out, err = call("image_edit", model_path=edited / "model.pt", **images, **flags)
    assert status == 0, err
    samples = open_npz(tmp_path / f"samples_{count}x8x8x1.npz")
    assert len(list((tmp_path / "png").glob("*.png"))) == count and (tmp_path / "edits.png").exists()
    assert row in json.loads((tmp_path / "metrics.json").read_text()) and row in out
    if flags.get("classes"):
        assert samples.labels.tolist() == [1] * count
    elif images and flags["mode"] != "interpolate":
        assert samples.labels.tolist() == [0, 0, 1, 1]


@pytest.mark.usefixtures("one_process")
@pytest.mark.parametrize("flags, match", [
    ({"mode": "inpaint", "mask_box": "0:9,0:2"}, "--mask_box 0:9,0:2: expected 2 ranges within 8"),
    ({"mode": "inpaint", "mask_dir": "images/a_0.png"}, "a_0.png"),
    ({"mode": "interpolate", "num_samples": 30}, "--num_samples 30: expected at most 24, --num_frames 8 for each of 3"),
    ({"mode": "interpolate", "num_samples": 12}, "--num_samples 12: expected a multiple of --num_frames 8"),
    ({"mode": "invert", "timestep_respacing": "1"}, "--timestep_respacing: expected 2 steps or more for an inversion"),
    ({"mode": "invert", "image_size": 4}, "--image_size 4 conflicts with"),
])
def test_script_names_what_does_not_fit(edited, call, tmp_path, flags, match):
    flags = {**flags, **({"mask_dir": edited / flags["mask_dir"]} if "mask_dir" in flags else {})}
    status, _, err = call("image_edit", model_path=edited / "model.pt", data_dir=edited / "images",
                          logdir=tmp_path / "run", **flags)
    assert status != 0 and match in err and not list(tmp_path.glob("run/*.npz"))


@pytest.mark.usefixtures("one_process")
def test_interrupted_edits_are_resumed_by_the_same_command_only(edited, call, tmp_path, monkeypatch):
    flags = {"mode": "variation", "model_path": edited / "model.pt", "data_dir": edited / "images", "batch_size": 2}
    with monkeypatch.context() as patch:
        patch.setattr(generate_module, "write_npz", lambda *args: 1 / 0)
        assert call("image_edit", **flags, strength=0.5, logdir=tmp_path / "run")[0] != 0
    assert len(list((tmp_path / "run/shards").glob("*.npy"))) == 2
    for changed, name in (({"strength": 1}, "steps, strength"), ({"classes": "b", "strength": 0.5}, "classes")):
        status, _, err = call("image_edit", **flags, **changed, logdir=tmp_path / "run")
        assert status != 0 and f"unfinished run with another {name}; use the same" in err
    status, out, err = call("image_edit", **flags, strength=0.5, logdir=tmp_path / "run")
    assert status == 0 and "skipping 2 of 2 batches" in out, err
