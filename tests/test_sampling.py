import dataclasses
import shutil
import threading
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from guided_diffusion_vae.data import (
    DataConfig, ImageFolder, VolumeFolder, open_colormap, open_npz, to_uint8, write_npz,
)
from guided_diffusion_vae.data.axes import SpectrogramAxes
from guided_diffusion_vae.gaussian_diffusion import DiffusionConfig, GaussianDiffusion
from guided_diffusion_vae.nn import keyed_randn
from guided_diffusion_vae.runs.factories import create_model_and_diffusion_vae, create_diffusion
from guided_diffusion_vae.runs.spaces import Space
from guided_diffusion_vae.sampling import generate as generate_module
from guided_diffusion_vae.sampling import (
    SAMPLERS, CompiledNetwork, KeyedNoise, LowResConditioning, Sampler, SamplingConfig, decoded_shape, generate_samples,
    parse_classes, resolve_sampler,
)
from guided_diffusion_vae.sampling.generate import SETTINGS_FILE
from guided_diffusion_vae.unet import ModelConfig, SuperResConfig
from guided_diffusion_vae.vae_wrapper import LatentNormalizer, PixelCodec

CPU = torch.device("cpu")
NAMES = ["push", "tapin", "tapout"]
# a network that predicts x0 keeps the samples of random weights in a sensible range
PROCESS = DiffusionConfig(diffusion_steps=4, noise_schedule="cosine", predict_xstart=True)


@pytest.fixture(scope="module")
def sampler():
    """Tiny class-conditional UNet on pixels, without zero-initialized weights."""
    model = ModelConfig(num_channels=32, channel_mult="1", num_res_blocks=1, attention_resolutions="8", in_channels=1,
                        class_cond=True, num_classes=3)
    network, diffusion = create_model_and_diffusion_vae((1, 8, 8), model, PROCESS)
    generator = torch.Generator().manual_seed(0)
    for p in network.parameters():
        torch.nn.init.normal_(p, std=0.1, generator=generator)
    normalizer = LatentNormalizer([0.1], [0.5], "channel")
    return Sampler(network.eval(), diffusion, (1, 8, 8), PixelCodec(1), normalizer, (1, 7, 8), 3, NAMES)


def pixels_of(path):
    with Image.open(path) as image:
        return np.asarray(image)


# --- Determinism ---


@pytest.mark.parametrize("solver, steps", [("ddpm", ""), ("ddim", ""), ("dpmpp", "logsnr3"), ("unipc", "logsnr3")])
def test_sample_depends_on_seed_and_index_only(sampler, solver, steps):
    diffusion = create_diffusion(dataclasses.replace(PROCESS, timestep_respacing=steps))
    sampler = dataclasses.replace(sampler, solver=solver, diffusion=diffusion)
    together = sampler.sample_x0(range(5), [2, 0], CPU)
    assert sampler.labels(range(5), [2, 0]).tolist() == [2, 0, 2, 0, 2]
    alone = torch.cat([sampler.sample_x0([i], [2, 0], CPU) for i in range(5)])
    torch.testing.assert_close(alone, together, atol=1e-5, rtol=0)
    torch.testing.assert_close(sampler.sample_x0([4, 1], [2, 0], CPU), together[[4, 1]], atol=1e-5, rtol=0)


def generate(sampler, folder, classes=(0, 1, 2), **config):
    """Generate samples into a folder; return those that were written."""
    path = generate_samples(sampler, classes and list(classes), SamplingConfig(**config), folder, CPU)
    return open_npz(path)


def test_batch_size_does_not_change_samples(sampler, tmp_path):
    one = generate(sampler, tmp_path / "one", num_samples=6, batch_size=1)
    four = generate(sampler, tmp_path / "four", num_samples=6, batch_size=4)
    assert one.images.shape == (6, 7, 8, 1) and one.labels.tolist() == [0, 1, 2, 0, 1, 2]
    assert np.abs(one.images.astype(int) - four.images).max() <= 1  # rounding to 8 bits


def test_other_seeds_and_classes_give_other_samples(sampler):
    first = sampler.sample_x0([0], [0], CPU)
    assert (first - dataclasses.replace(sampler, seed=1).sample_x0([0], [0], CPU)).abs().max() > 0.1
    assert (first - sampler.sample_x0([0], [1], CPU)).abs().max() > 1e-3


def test_keyed_noise_is_standard_normal_and_new_at_every_call():
    noise = KeyedNoise(0, range(64))
    first, second = noise(torch.empty(64, 2, 8, 8)), noise(torch.empty(64, 2, 8, 8))
    assert abs(first.mean()) < 0.03 and abs(first.std() - 1) < 0.03
    assert abs((first * second).mean()) < 0.03 and abs((first[:32] * first[32:]).mean()) < 0.03
    assert noise(torch.empty(64, 1, dtype=torch.float64)).dtype == torch.float64


def test_noise_that_is_drawn_ahead_is_the_same():
    ahead, x = KeyedNoise(3, [4, 9], (1, 8, 8)), torch.empty(2, 1, 8, 8)
    for call in range(4):
        assert torch.equal(ahead(x), keyed_noise(3, [4, 9], call))


@pytest.mark.parametrize("solver, steps, draws", [("ddpm", "", 6), ("ddim", "", 1), ("dpmpp_sde", "logsnr3", 5)])
def test_noise_is_drawn_on_another_thread_and_only_if_it_is_used(sampler, monkeypatch, solver, steps, draws):
    draw, threads = KeyedNoise._draw, []
    monkeypatch.setattr(KeyedNoise, "_draw", lambda self, shape: threads.append(threading.current_thread().name)
                        or draw(self, shape))
    diffusion = create_diffusion(dataclasses.replace(PROCESS, timestep_respacing=steps))
    sampler = dataclasses.replace(sampler, solver=solver, diffusion=diffusion)
    noise = sampler.draw_noise([0], CPU)
    sampler.sample_x0([0], [0], CPU, noise=noise)
    if noise.ahead:     # one more than the steps use, as nothing tells that the last one was the last
        noise.ahead.result()
    assert threads.count("MainThread") == (draws > 1) and len(threads) == draws


@pytest.fixture
def spy(monkeypatch):
    """Enter a sampler that records its arguments."""
    calls = []

    def loop(diffusion, model, shape, **arguments):
        calls.append({"diffusion": diffusion, "model": model, "shape": shape, **arguments})
        return arguments["noise"]
    monkeypatch.setitem(SAMPLERS, "spy", (GaussianDiffusion, loop))
    return calls


def test_sampling_loop_gets_noise_guidance_and_clipping(sampler, spy):
    gradient = lambda x, t, y: x
    for clip in (False, True):
        dataclasses.replace(sampler, solver="spy", seed=3, cond_fn=gradient, clip_denoised=clip).sample_x0(
            [4, 9], [2, 0], CPU)
        arguments = spy.pop()
        assert arguments["clip_denoised"] is clip and arguments["cond_fn"] is gradient
        assert arguments["model_kwargs"]["y"].tolist() == [2, 2 if 9 % 2 == 0 else 0]
        start, *later = (keyed_noise(3, [4, 9], call) for call in range(3))
        assert torch.equal(arguments["noise"], start) and arguments["shape"] == (2, 1, 8, 8)
        assert all(torch.equal(arguments["noise_fn"](torch.empty(2, 1, 8, 8)), noise) for noise in later)


def keyed_noise(seed, indices, call, shape=(1, 8, 8)):
    """Return draw number `call` of the stream (seed, 5, i) of every sample i."""
    draws = keyed_randn((call + 1, *shape), [(seed, 5, i) for i in indices])
    return draws[:, call]


def test_compiled_network_gets_batches_of_its_size_only(monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda network, dynamic: lambda x, *args, **conditioning: "compiled")
    network = CompiledNetwork(lambda x, t, y: "plain", {2, 4})
    assert [network(torch.empty(n), None, y=None) for n in (1, 2, 3, 4)] == ["plain", "compiled"] * 2


def test_missing_compiler_raises_before_the_first_step(monkeypatch):
    def fail(x, *args):
        raise torch._dynamo.exc.BackendCompilerFailed("inductor", RuntimeError("no working C++ compiler"), None)

    monkeypatch.setattr(torch, "compile", lambda network, dynamic: fail)
    with pytest.raises(RuntimeError, match="--compile True does not work here: expected a compiler for cpu, got .*no "
                                           r"working C\+\+ compiler.* set \$CXX\), or omit the flag"):
        CompiledNetwork(None, {1})(torch.empty(1), None)


def test_guidance_of_an_unconditional_model_gets_the_classes(sampler):
    labels = []
    model = lambda x, t: 0 * x     # without an argument for classes
    guided = dataclasses.replace(sampler, model=model, num_classes=0, guided_classes=3,
                                 cond_fn=lambda x, t, y: labels.append(y.tolist()) or 0 * x)
    assert guided.parse_classes("tapout,0") == [2, 0] and guided.parse_classes("") == [0, 1, 2]
    guided.sample_x0(range(3), [2, 0], CPU)
    assert labels == [[2, 0, 2]] * sampler.diffusion.num_timesteps


def test_header_describes_shape_and_spacing_of_volumes(sampler):
    header = {"latent_shape": [1, 2, 3, 4], "image_shape": None, "classes": ["a"], "model": {"num_classes": 1},
              "data": {"spacing": "3,2,1.5"}}
    codec = PixelCodec(1, dims=3)
    codec.factors = (4, 2, 2)
    built = Sampler.from_header(None, sampler.diffusion, Space(codec, sampler.normalizer), header)
    assert built.image_shape == decoded_shape(header, codec) == (1, 8, 6, 8)
    assert built.spacing == (3.0, 2.0, 1.5) and built.class_names == ["a"] and built.shape == (1, 2, 3, 4)
    assert decoded_shape({**header, "image_shape": [1, 7, 6, 8]}, codec) == (1, 7, 6, 8)
    assert built.orientation == "RAS"   # version 0.2 recorded none
    header["data"]["orientation"] = "LPI"
    assert Sampler.from_header(None, sampler.diffusion, Space(codec, sampler.normalizer), header).orientation == "LPI"
    for data in ({}, None, {"spacing": ""}):    # of latents without images, and of volumes without spacing
        built = Sampler.from_header(None, sampler.diffusion, Space(codec, sampler.normalizer), {**header, "data": data})
        assert built.spacing == (1.0, 1.0, 1.0)


def test_x0_is_clipped_by_default_for_pixels_only(sampler):
    assert sampler.clip_denoised
    latents = SimpleNamespace(is_pixels=False)
    assert not dataclasses.replace(sampler, codec=latents, clip_denoised=None).clip_denoised
    assert not dataclasses.replace(sampler, clip_denoised=False).clip_denoised


@pytest.mark.parametrize("changes, warned", [
    ({"predict_xstart": False}, True), ({}, False), ({"predict_xstart": False, "timestep_respacing": "2,1"}, False),
    ({"predict_xstart": False, "noise_schedule": "linear"}, False),
])
def test_unclipped_sampling_from_pure_noise_warns(sampler, tmp_path, capsys, changes, warned):
    config = dataclasses.replace(PROCESS, **{"diffusion_steps": 1000, "timestep_respacing": "2", **changes})
    model = lambda x, t, y: 0 * x
    for clip in (False, True):
        diffusion = create_diffusion(config)
        generate(dataclasses.replace(sampler, model=model, diffusion=diffusion, clip_denoised=clip),
                 tmp_path / str(clip), num_samples=1)
        printed = "".join(capsys.readouterr())
        assert ("x0 is not clipped and" in printed) == (warned and not clip)


def test_diverged_model_raises(sampler, tmp_path):
    factor = torch.ones(1, 8, 8)
    factor[0, 3, 4] = float("nan")
    broken = dataclasses.replace(sampler, model=lambda x, t, **kwargs: x * factor, num_classes=0)
    with pytest.raises(FloatingPointError, match="samples 0 to 1 are not finite: the model has diverged"):
        generate(broken, tmp_path, None, num_samples=2)


def test_zero_samples_raise(sampler, tmp_path):
    with pytest.raises(ValueError, match="--num_samples must be >= 1, got 0"):
        generate(sampler, tmp_path, num_samples=0)


@pytest.mark.parametrize("flags, solver", [({}, "ddpm"), ({"use_ddim": True}, "ddim"), ({"sampler": "unipc"}, "unipc"),
                                           ({"sampler": "ddim", "use_ddim": True}, "ddim")])
def test_sampler_is_specified_by_either_flag(flags, solver):
    assert resolve_sampler(SamplingConfig(**flags), create_diffusion(PROCESS)) == solver


def test_conflicting_samplers_raise():
    with pytest.raises(ValueError, match="--sampler dpmpp and --use_ddim True are mutually exclusive; set only one"):
        resolve_sampler(SamplingConfig(use_ddim=True, sampler="dpmpp"), create_diffusion(PROCESS))


def test_sampler_is_complete_when_constructed(sampler):
    assert sampler.solver == "ddpm" and sampler.clip_denoised is True
    with pytest.raises(dataclasses.FrozenInstanceError):
        sampler.seed = 1


# --- Interrupted runs ---


FIVE = {"num_samples": 5, "batch_size": 2}


def interrupted(sampler, folder, after, **config):
    """Generate until `after` batches are written, as if the process was killed then."""
    def model(x, t, **conditioning):
        model.calls += 1
        if model.calls > after * sampler.diffusion.num_timesteps:
            raise KeyboardInterrupt
        return sampler.model(x, t, **conditioning)

    model.calls = 0
    with pytest.raises(KeyboardInterrupt):
        generate(dataclasses.replace(sampler, model=model), folder, **config)
    return model


def test_interrupted_run_resumes_from_shards_bitwise_identically(sampler, tmp_path):
    generate(sampler, tmp_path / "whole", **FIVE)
    interrupted(sampler, tmp_path / "parts", 2, **FIVE)
    kept = {path: path.stat().st_mtime_ns for path in (tmp_path / "parts/shards").glob("*.npy")}
    assert [path.name for path in sorted(kept)] == ["00000000-00000002.npy", "00000002-00000004.npy"]
    assert sum(len(np.load(path)) for path in kept) == 4 and not list((tmp_path / "parts").glob("*.npz"))
    calls = []
    counting = lambda x, t, **conditioning: calls.append(len(x)) or sampler.model(x, t, **conditioning)
    generate(dataclasses.replace(sampler, model=counting), tmp_path / "parts", **FIVE)
    assert calls == [1] * sampler.diffusion.num_timesteps  # the last batch only
    files = {name: {path.relative_to(tmp_path / name).as_posix(): path.read_bytes()
                    for path in (tmp_path / name).rglob("*") if path.is_file()} for name in ("whole", "parts")}
    assert files["whole"] == files["parts"] and "samples_5x7x8x1.npz" in files["whole"]
    assert not (tmp_path / "parts/shards").exists()


def test_batches_are_written_while_the_next_one_is_sampled(sampler, tmp_path, monkeypatch):
    write, order, sampled = generate_module._write_batch, [], threading.Event()

    def model(x, t, **conditioning):
        if len(x) == 1:     # the last batch
            sampled.set()
        return sampler.model(x, t, **conditioning)

    def wait(folder, indices, *rest):
        order.append(threading.current_thread().name)
        assert indices.start == 0 or indices.stop == 5 or sampled.wait(60)
        write(folder, indices, *rest)

    monkeypatch.setattr(generate_module, "_write_batch", wait)
    whole = generate(dataclasses.replace(sampler, model=model), tmp_path, **FIVE)
    assert len(whole.images) == 5 and len(order) == 3 and threading.current_thread().name not in order


@pytest.mark.parametrize("count", [9, 4])   # the second batch cannot be written: one of five, and the last one
def test_batch_that_cannot_be_written_ends_the_run_and_is_repeated(sampler, tmp_path, monkeypatch, count):
    write, calls, config = generate_module.atomic_stream, [], {"num_samples": count, "batch_size": 2}

    def fail(path):
        calls.append(path.name)
        if len(calls) == 2:
            raise OSError(28, "No space left on device", str(path))
        return write(path)

    with monkeypatch.context() as patch:
        patch.setattr(generate_module, "atomic_stream", fail)
        with pytest.raises(OSError, match="No space left on device.*shards/00000002-00000004.npy"):
            generate(sampler, tmp_path / "run", **config)
    assert len(calls) == 2      # no later batch is written after it
    assert [path.name for path in (tmp_path / "run/shards").glob("*.npy")] == ["00000000-00000002.npy"]
    resumed = generate(sampler, tmp_path / "run", **config)
    assert np.array_equal(resumed.images, generate(sampler, tmp_path / "whole", **config).images)


def test_folder_that_is_removed_while_sampling_raises_and_is_not_created_again(sampler, tmp_path):
    def remove(x, t, **conditioning):
        shutil.rmtree(tmp_path / "run", ignore_errors=True)
        return sampler.model(x, t, **conditioning)

    with pytest.raises(FileNotFoundError, match="run/shards was removed while samples were written"):
        generate(dataclasses.replace(sampler, model=remove), tmp_path / "run", **FIVE)
    assert not (tmp_path / "run").exists()


def test_folder_that_is_removed_before_an_image_is_written_is_replaced_by_the_next_run(sampler, tmp_path, monkeypatch):
    write, done = generate_module.save_image, []

    def remove(path, image):
        done.append(path)
        if len(done) == 2:
            shutil.rmtree(tmp_path / "run")
            (tmp_path / "run/png").mkdir(parents=True)      # as saving did
        write(path, image)

    with monkeypatch.context() as patch:
        patch.setattr(generate_module, "save_image", remove)
        with pytest.raises(FileNotFoundError):
            generate(sampler, tmp_path / "run", **FIVE)
    assert generate(sampler, tmp_path / "run", **FIVE).images.shape[0] == 5
    assert len(list((tmp_path / "run/png").glob("*.png"))) == 5


def test_resumed_run_may_have_more_samples(sampler, tmp_path):
    interrupted(sampler, tmp_path / "more", 1, **FIVE)
    more = generate(sampler, tmp_path / "more", num_samples=7, batch_size=2)
    assert np.array_equal(more.images, generate(sampler, tmp_path / "seven", num_samples=7, batch_size=2).images)


@pytest.mark.parametrize("change, config, name", [
    ({"seed": 1}, {}, "seed"), ({"solver": "ddim"}, {}, "sampler"), ({}, {"batch_size": 1}, "batch_size"),
    ({"settings": {"model": "another"}}, {}, "model"), ({}, {"classes": (0,)}, "classes"),
    ({"clip_denoised": False}, {}, "clip_denoised"), ({"image_shape": (1, 6, 8)}, {}, "image_shape"),
    ({"diffusion": create_diffusion(dataclasses.replace(PROCESS, timestep_respacing="2"))}, {}, "steps"),
    ({}, {"save_individual": False}, "png"),
])
def test_shards_with_other_settings_raise(sampler, tmp_path, change, config, name):
    interrupted(sampler, tmp_path, 1, **FIVE)
    with pytest.raises(ValueError, match=f"shards contains an unfinished run with another {name}; use the same"):
        generate(dataclasses.replace(sampler, **change), tmp_path, **{**FIVE, **config})
    assert len(list((tmp_path / "shards").glob("*.npy"))) == 1


def test_ranks_share_the_batches(sampler, tmp_path, monkeypatch):
    whole = generate(sampler, tmp_path / "whole", **FIVE)
    monkeypatch.setattr("guided_diffusion_vae.dist_util.world_size", lambda: 2)
    for name in ("barrier", "broadcast_object"):
        monkeypatch.setattr(f"guided_diffusion_vae.dist_util.{name}", lambda *item: item[0] if item else None)
    (tmp_path / "ranks" / "shards").mkdir(parents=True)
    (tmp_path / "ranks" / "shards" / SETTINGS_FILE).touch()     # as rank 0 does at first
    monkeypatch.setattr("guided_diffusion_vae.dist_util.rank", lambda: 1)
    generate_samples(sampler, [0, 1, 2], SamplingConfig(**FIVE), tmp_path / "ranks", CPU)
    assert [path.name for path in (tmp_path / "ranks/shards").glob("*.npy")] == ["00000002-00000004.npy"]
    # Rank 0 comes last here and must not start the folder again.
    monkeypatch.setattr("guided_diffusion_vae.sampling.generate._check_settings", lambda *args: None)
    monkeypatch.setattr("guided_diffusion_vae.dist_util.rank", lambda: 0)
    monkeypatch.setattr("guided_diffusion_vae.dist_util.world_size", lambda: 1)
    assert np.array_equal(generate(sampler, tmp_path / "ranks", **FIVE).images, whole.images)


def test_images_and_contact_sheet_are_next_to_the_npz(sampler, tmp_path):
    samples = generate(sampler, tmp_path, (2, 0), num_samples=7, batch_size=3)
    names = sorted(path.name for path in (tmp_path / "png").glob("*.png"))
    assert names == ["push_000001.png", "push_000003.png", "push_000005.png",
                     *(f"tapout_00000{i}.png" for i in (0, 2, 4, 6))]
    assert np.array_equal(pixels_of(tmp_path / "png" / "push_000003.png"), samples.images[3, ..., 0])
    tall, wide = pixels_of(tmp_path / "contact_sheet.png").shape[:2]
    assert wide > 3 * 8 and tall >= 2 * 7 and samples.class_names == NAMES


def test_contact_sheet_has_one_row_per_requested_class(sampler, tmp_path, monkeypatch):
    sheets = []
    record = lambda images, columns, row_labels, colormap: sheets.append(
        (images, columns, row_labels)) or Image.new("L", (1, 1))
    monkeypatch.setattr("guided_diffusion_vae.sampling.generate.contact_sheet", record)
    samples = generate(sampler, tmp_path, (2, 0), num_samples=7, batch_size=3)
    (images, columns, labels), = sheets
    assert columns == 3 and labels == ["tapout", "push"]    # as many as the class with the fewest samples
    assert np.array_equal(images, samples.images[[0, 2, 4, 1, 3, 5]].transpose(0, 3, 1, 2) / np.float32(255))


@pytest.mark.parametrize("orientation", ["RAS", "LPI", "SLA"])
def test_volumes_have_the_values_axes_and_spacing_of_the_samples(sampler, tmp_path, orientation):
    nibabel = pytest.importorskip("nibabel")
    volume = dataclasses.replace(
        sampler, model=lambda x, t: x, num_classes=0, class_names=None, shape=(1, 8, 6, 4), codec=PixelCodec(1, dims=3),
        image_shape=(1, 8, 6, 4), spacing=(3.0, 2.0, 1.5), orientation=orientation)
    samples = generate(volume, tmp_path, None, num_samples=2)
    read = VolumeFolder(DataConfig(str(tmp_path / "volumes"), "8x6x4", value_range="0,255", orientation=orientation))
    assert np.array_equal(np.rint(255 * read.batch([0, 1]).numpy()), samples.images.transpose(0, 4, 1, 2, 3))
    assert samples.images.std() > 10 and [tuple(spacing) for spacing in read.spacings] == [(3.0, 2.0, 1.5)] * 2
    assert nibabel.aff2axcodes(nibabel.load(read.paths[0]).affine) == tuple(orientation)


def test_colors_are_the_last_axis_of_the_samples(sampler, tmp_path):
    rgb = dataclasses.replace(sampler, model=lambda x, t: x, num_classes=0, class_names=None, shape=(3, 8, 8),
                              codec=PixelCodec(3), image_shape=(3, 8, 6))
    images = to_uint8(rgb.decode(rgb.sample_x0(range(3), None, CPU)))
    assert np.array_equal(generate(rgb, tmp_path, None, num_samples=3).images, images.transpose(0, 2, 3, 1))
    assert np.array_equal(pixels_of(tmp_path / "png" / "000002.png"), images[2].transpose(1, 2, 0))


def test_new_samples_replace_images_of_earlier_ones(sampler, tmp_path):
    generate(sampler, tmp_path, num_samples=4)
    generate(sampler, tmp_path, (2,), num_samples=2)
    assert sorted(p.name for p in (tmp_path / "png").glob("*.png")) == ["tapout_000000.png", "tapout_000001.png"]
    generate(sampler, tmp_path, num_samples=2, save_individual=False)
    assert not (tmp_path / "png").exists()


def test_spectrograms_are_written_in_db_without_rounding_and_with_their_axes(sampler, tmp_path):
    axes = SpectrogramAxes(7, 8, 10.0, 0.1, 3, db_floor=-60.0, db_range=40.0)
    radar = dataclasses.replace(sampler, spectrogram=axes)
    written = generate(radar, tmp_path, save_individual=False, num_samples=4, batch_size=3)
    exact = radar.decode(radar.sample_x0(range(4), [0, 1, 2], CPU))[:, 0].numpy()
    names = sorted(file.name for file in (tmp_path / "db").glob("*.npy"))
    assert names == sorted(f"{NAMES[i % 3]}_{i:06d}.npy" for i in range(4))
    for i in range(4):
        levels = np.load(tmp_path / f"db/{NAMES[i % 3]}_{i:06d}.npy")
        np.testing.assert_allclose(levels, -60 + 40 * exact[i], atol=1e-4)
        pixels = written.images[i, ..., 0]
        assert levels.dtype == np.float32 and np.array_equal(np.rint((levels + 60) / 40 * 255), pixels)
    source = ImageFolder(DataConfig(str(tmp_path / "db"), "7x8", value_range="-60,-20"))
    assert source.preprocessing["spectrogram"] == axes.to_dict() and source.class_names == sorted(set(NAMES))
    generate(radar, tmp_path, save_individual=False, num_samples=2)
    assert len(list((tmp_path / "db").glob("*.npy"))) == 2
    generate(sampler, tmp_path, save_individual=False, num_samples=2)
    assert not (tmp_path / "db").exists()


def test_colors_are_written_in_db_as_the_scalars_that_they_stand_for(sampler, tmp_path):
    table = open_colormap("jet/linear64")
    colors = np.moveaxis(table.to_colors(np.linspace(0, 1, 64).reshape(1, 8, 8)), -1, 1)
    radar = dataclasses.replace(sampler, projection=table.name, spectrogram=SpectrogramAxes(8, 8, db_range=63.0))
    generate_module._write_levels(tmp_path, ["a"], colors, radar, None)
    np.testing.assert_allclose(np.load(tmp_path / "a.npy"), np.arange(64).reshape(8, 8), atol=1e-4)


def test_images_of_other_origin_are_never_removed(sampler, tmp_path):
    mine = tmp_path / "png" / "mine.png"
    mine.parent.mkdir()
    mine.write_bytes(b"precious")
    expected = "png already exists .*; use another --logdir, or --save_individual False"
    with pytest.raises(FileExistsError, match=expected):
        generate(sampler, tmp_path, num_samples=2)
    generate(sampler, tmp_path, num_samples=2, save_individual=False)
    assert mine.read_bytes() == b"precious"


def test_shards_folder_of_other_origin_is_unchanged(sampler, tmp_path):
    (tmp_path / "shards").mkdir()
    (tmp_path / "shards" / "mine").write_bytes(b"precious")
    with pytest.raises(FileExistsError, match="shards already exists and was not created by sampling.*--logdir$"):
        generate(sampler, tmp_path, num_samples=2)
    assert (tmp_path / "shards" / "mine").read_bytes() == b"precious"
    (tmp_path / "shards" / "mine").rename(tmp_path / "shards" / "00000000-00000002.npy")  # interrupted removal
    assert len(generate(sampler, tmp_path, num_samples=2).images) == 2


def test_fewer_samples_remove_surplus_images(sampler, tmp_path):
    interrupted(sampler, tmp_path, 2, **FIVE)
    generate(sampler, tmp_path, num_samples=3, batch_size=2)
    assert sorted(path.name[-10:-4] for path in (tmp_path / "png").glob("*.png")) == ["000000", "000001", "000002"]


def test_class_names_cannot_form_paths(sampler, tmp_path):
    named = dataclasses.replace(sampler, class_names=["../../evil/a", "tap_in", "plain"])
    generate(named, tmp_path / "run", num_samples=3)
    found = {path.name.split("_")[0] for path in (tmp_path / "run/png").glob("*.png")}
    assert found == {"-..-evil-a", "tap-in", "plain"}
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


@pytest.mark.parametrize("classes, count", [(None, 1), ((1, 2), 1)])
def test_contact_sheet_of_few_samples_or_no_classes(sampler, tmp_path, classes, count):
    plain = dataclasses.replace(sampler, model=lambda x, t, y=None: 0 * x, num_classes=3 if classes else 0)
    generate(plain, tmp_path, classes, num_samples=count)
    assert min(pixels_of(tmp_path / "contact_sheet.png").shape[:2]) >= 7


# --- Upsamplers ---


def test_sample_i_is_conditioned_on_image_i_and_its_class():
    images, labels = np.arange(3 * 2 * 2, dtype=np.uint8).reshape(3, 1, 2, 2), np.array([2, 0, 1])
    identity = LatentNormalizer([0], [1], "none")
    process = create_diffusion(PROCESS)
    low_res = LowResConditioning(images, labels, PixelCodec(1), identity, process)
    calls = []
    model = lambda x, t, y, low_res: calls.append((y, low_res)) or 0 * x
    sampler = Sampler(model, process, (1, 4, 4), PixelCodec(1), identity, (1, 4, 4), 3, NAMES, low_res=low_res)
    sampler.sample_x0([1, 5], None, CPU)
    assert calls[0][0].tolist() == [0, 1]
    torch.testing.assert_close(calls[0][1], torch.from_numpy(images[[1, 2]]) / 127.5 - 1)


@pytest.mark.parametrize("level", [0, 2])
def test_low_res_images_are_normalized_and_diffused_to_the_noise_level(sampler, spy, level):
    images = np.random.default_rng(0).integers(0, 256, (3, 1, 8, 8), np.uint8)
    process, normalizer = create_diffusion(PROCESS), LatentNormalizer([0.1], [0.5], "channel")
    spaced = create_diffusion(dataclasses.replace(PROCESS, timestep_respacing="2"))
    low_res = LowResConditioning(images, None, PixelCodec(1), normalizer, process, level, seed=3)
    dataclasses.replace(sampler, diffusion=spaced, num_classes=0, low_res=low_res, solver="spy").sample_x0(
        [1, 6], None, CPU)
    conditioning, x0 = spy[0]["model_kwargs"], ((2.0 * images[[1, 0]] / 255 - 1) - 0.1) / 0.5
    if level:
        alpha_bar = np.cumprod(1 - process.betas)[level]
        noise = keyed_randn((1, 8, 8), [(3, 8, i) for i in (1, 6)]).numpy()
        x0 = np.sqrt(alpha_bar) * x0 + np.sqrt(1 - alpha_bar) * noise
        assert conditioning["low_res_times"].tolist() == [level] * 2
        assert abs(np.corrcoef(noise.ravel(), spy[0]["noise"].numpy().ravel())[0, 1]) < 0.3
    assert conditioning["low_res"].numpy() == pytest.approx(x0, abs=1e-5) and len(conditioning) == 1 + (level > 0)


@pytest.mark.parametrize("steps", [0, 1, 4])
def test_upsampler_depends_on_every_condition_it_is_trained_with(steps):
    model = ModelConfig(num_channels=32, channel_mult="1", num_res_blocks=1, attention_resolutions="", in_channels=1,
                        class_cond=True, num_classes=3)
    network, _ = create_model_and_diffusion_vae((1, 8, 8), model, PROCESS, SuperResConfig(cond_noise_steps=steps))
    assert network.noised_condition == (steps > 0)
    generator = torch.Generator().manual_seed(0)
    for p in network.parameters():
        torch.nn.init.normal_(p, std=0.2, generator=generator)
    conditions = {"timesteps": torch.tensor([3, 70]), "y": torch.tensor([2, 0]),
                  "low_res": torch.randn(2, 1, 4, 4, generator=generator)}
    if steps:
        conditions["low_res_times"] = torch.tensor([0, 3])
    x = torch.randn(2, 1, 8, 8, generator=generator)
    with torch.no_grad():
        for name, value in conditions.items():
            change = network(x, **conditions) - network(x, **{**conditions, name: value.flip(0)})
            assert (change.flatten(1).std(1) > 0.01).all(), name


def test_conditioning_noise_depends_on_the_sample_only():
    images = np.zeros((2, 1, 8, 8), np.uint8)
    process = create_diffusion(PROCESS)
    normalizer = LatentNormalizer([0], [1], "none")
    low_res = LowResConditioning(images, None, PixelCodec(1), normalizer, process, noise_level=2)
    both, one = low_res.condition([0, 3], CPU), low_res.condition([3], CPU)
    assert both["low_res_times"].tolist() == [2, 2]
    torch.testing.assert_close(both["low_res"][1:], one["low_res"])
    std = float(np.sqrt(1 - process.alphas_cumprod[2]))
    assert both["low_res"].std() == pytest.approx(std, rel=0.2)
    assert (both["low_res"][0] - both["low_res"][1]).abs().max() > 0.1


def test_low_res_images_are_padded_as_in_training():
    codec = PixelCodec(1)
    codec.factors, codec.preprocessing = (2, 2), {"pad": True}
    images = np.arange(9, dtype=np.uint8).reshape(1, 1, 3, 3)
    process = create_diffusion(PROCESS)
    low_res = LowResConditioning(images, None, codec, LatentNormalizer([0], [1], "none"), process)
    padded = low_res.condition([0], CPU)["low_res"]
    assert padded.shape == (1, 1, 4, 4) and torch.equal(padded[..., 3, :3], padded[..., 2, :3])


def test_decode_inverts_normalization_and_crops_padding(sampler):
    images = torch.rand(2, 1, 8, 8)
    x0 = sampler.normalizer.normalize(sampler.codec.encode_batch(images))
    torch.testing.assert_close(sampler.decode(x0), images[:, :, :7])


def test_decode_requests_the_channels_of_the_images(sampler):
    codec = SimpleNamespace(decode_batch=lambda latents, channels: torch.zeros(len(latents), channels, 8, 8),
                            is_pixels=False)
    assert dataclasses.replace(sampler, codec=codec).decode(torch.zeros(2, 4, 8, 8)).shape == (2, 1, 7, 8)


# --- Classes ---


@pytest.mark.parametrize("text, numbers", [
    ("", [0, 1, 2]), ("tapin", [1]), ("2, push", [2, 0]), ("tapin,tapin,0", [1, 1, 0]),
])
def test_classes_are_parsed_by_name_or_index(text, numbers):
    assert parse_classes(text, 3, NAMES) == numbers


def test_class_names_take_precedence_over_indices():
    assert parse_classes("7,0", 2, ["7", "9"]) == [0, 0]


@pytest.mark.parametrize("text, names, match", [
    ("tapon", NAMES, "--classes: there is no class 'tapon': expected one of: push, tapin, tapout"),
    ("3", NAMES, "no class '3'"),
    ("-1", None, "no class '-1': expected one of: 0 to 2"),
])
def test_unknown_class_raises(text, names, match):
    with pytest.raises(ValueError, match=match):
        parse_classes(text, 3, names)


def test_classes_of_an_unconditional_model_raise():
    assert parse_classes("", 0) is None
    with pytest.raises(ValueError, match="--classes 1: the samples have no classes; omit the flag"):
        parse_classes("1", 0)


# --- Files ---


def write(folder, images, labels=None, names=None, parts=1):
    """Write images [N x C x ...] in `parts` parts; return the path."""
    last = np.moveaxis(images, 1, -1)
    path = folder / f"samples_{'x'.join(map(str, last.shape))}.npz"
    write_npz(path, last.shape, np.array_split(last, parts), labels, names)
    return path


@pytest.mark.parametrize("sides", [(4, 6), (3, 4, 5)])
def test_npz_has_the_layout_of_guided_diffusion(tmp_path, sides):
    images = np.random.default_rng(0).integers(0, 256, (5, 3, *sides), np.uint8)
    path = write(tmp_path, images, np.array([0, 1, 0, 1, 0]), parts=2)
    with np.load(path) as content:
        assert content["arr_0"].dtype == np.uint8 and content["arr_0"].shape == (5, *sides, 3)
        assert np.array_equal(np.moveaxis(content["arr_0"], -1, 1), images)
        assert content["arr_1"].tolist() == [0, 1, 0, 1, 0]
    back = open_npz(path)
    assert np.array_equal(np.moveaxis(back.images, -1, 1), images) and back.class_names is None
    assert isinstance(back.images, np.memmap) and back.labels.tolist() == [0, 1, 0, 1, 0]
    assert list(tmp_path.iterdir()) == [path]


def test_npz_bytes_are_independent_of_parts(tmp_path):
    images = np.random.default_rng(0).integers(0, 256, (5, 1, 4, 4), np.uint8)
    first = write(tmp_path, images, np.arange(5), NAMES).read_bytes()
    assert write(tmp_path, images, np.arange(5), NAMES, parts=4).read_bytes() == first


def test_npz_without_classes_has_no_labels(tmp_path):
    path = write(tmp_path, np.zeros((2, 1, 4, 4), np.uint8))
    with np.load(path) as content:
        assert content.files == ["arr_0"]
    assert open_npz(path).labels is None and open_npz(path).class_names is None


def test_npz_stores_class_names(tmp_path):
    assert open_npz(write(tmp_path, np.zeros((2, 1, 4, 4), np.uint8), np.array([2, 0]), NAMES)).class_names == NAMES


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_open_npz_reads_other_archives(tmp_path, save):
    images = np.random.default_rng(0).integers(0, 256, (3, 4, 4, 3), np.uint8)
    save(tmp_path / "theirs.npz", images, np.array([1, 2, 3]))
    found = open_npz(tmp_path / "theirs.npz")
    assert np.array_equal(found.images, images) and found.labels.tolist() == [1, 2, 3]
    np.savez(tmp_path / "fortran.npz", np.asfortranarray(images))
    assert np.array_equal(open_npz(tmp_path / "fortran.npz").images, images)


def test_open_npz_rejects_other_files(tmp_path):
    (tmp_path / "cut.npz").write_bytes(b"PK\3\4 and no more")
    np.savez(tmp_path / "other.npz", images=np.zeros((1, 4, 4)))
    np.savez(tmp_path / "float.npz", np.zeros((1, 4, 4, 1)))
    np.savez(tmp_path / "few.npz", np.zeros((2, 4, 4, 1), np.uint8), np.array([1]))
    for name in ("cut.npz", "gone.npz"):
        with pytest.raises(ValueError, match=f"{name}: cannot be read as an .npz archive"):
            open_npz(tmp_path / name)
    with pytest.raises(ValueError, match="other.npz is not a batch of samples: expected arr_0 .*, got images"):
        open_npz(tmp_path / "other.npz")
    with pytest.raises(ValueError, match="float.npz: expected arr_0 as uint8 .*, got float64"):
        open_npz(tmp_path / "float.npz")
    with pytest.raises(ValueError, match="few.npz: expected one label in arr_1 for each of 2 images, got shape .1,"):
        open_npz(tmp_path / "few.npz")


def test_to_uint8_rounds_to_nearest():
    assert to_uint8(torch.tensor([0, 0.4 / 255, 0.6 / 255, 1])).tolist() == [0, 0, 1, 255]
