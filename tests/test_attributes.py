"""Conditioning on continuous attributes: statistics, network, training, guidance, sampling and its files."""

import json
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from guided_diffusion_vae import objectives, unet
from guided_diffusion_vae.data import (
    Attributes, BatchPlan, DataConfig, ImageFolder, LatentStream, attribute_ranges, open_npz, sample_attributes,
    write_npz,
)
from guided_diffusion_vae.evaluation import HeldOutData
from guided_diffusion_vae.latent_datasets import EncodedImages
from guided_diffusion_vae.runs import loading, training
from guided_diffusion_vae.runs.factories import create_gaussian_diffusion
from guided_diffusion_vae.runs.run import CONFIG_FILE
from guided_diffusion_vae.sampling import ClassifierFreeGuidance, Sampler, Unconditional
from guided_diffusion_vae.vae_wrapper import LatentNormalizer, PixelCodec

NAN = math.nan
SPEED, MASS = np.float32([1, 3, NAN, 2]), np.float32([10, 10, 40, 20])
# Added to features, an embedding has no effect in networks whose norms have one channel per group.
TINY = dict(model_channels=32, num_res_blocks=1, attention_resolutions=(), channel_mult=(1,), use_scale_shift_norm=True)


def source(**attributes):
    return SimpleNamespace(folder="data/train", attributes=attributes)


@pytest.fixture
def trained():
    return Attributes.of_source(source(speed=SPEED, mass=MASS), ("speed", "mass"))


# --- Statistics and requested values ---


def test_statistics_are_those_of_known_values(trained):
    assert trained.names == ("speed", "mass") and trained.mean == (2.0, 20.0)
    assert trained.std == pytest.approx((math.sqrt(2 / 3), math.sqrt(150)))
    assert (trained.low, trained.high, trained.missing) == ((1.0, 10.0), (3.0, 40.0), (0.25, 0.0))
    assert Attributes.from_dict(json.loads(json.dumps(vars(trained)))) == trained
    assert Attributes.from_dict(None) is None and Attributes.of_source(source(), ()) is None
    normalized = trained.of_items(source(mass=MASS, speed=SPEED))
    assert normalized.dtype == np.float32 and np.isnan(normalized[:, 0]).tolist() == [False, False, True, False]
    assert np.nanmean(normalized, 0) == pytest.approx([0, 0], abs=1e-6) and np.nanstd(normalized, 0) == pytest.approx(
        [1, 1])


@pytest.mark.parametrize("names, message", [
    (("speed", "age"), r"data/train has no attribute age \(--condition_on\): expected .*, got speed, mass, fixed;"),
    (("fixed",), "attribute fixed has 1 distinct values: expected at least 2; omit it from --condition_on"),
])
def test_attributes_that_cannot_be_learned_are_rejected(names, message):
    with pytest.raises(ValueError, match=message):
        Attributes.of_source(source(speed=SPEED, mass=MASS, fixed=np.full(4, 7.0)), names)


def test_requested_ranges_complete_those_of_training(trained):
    assert trained.parse_ranges("") == ((1, 3), (10, 40))
    assert trained.parse_ranges("mass=-5..1e2") == ((1, 3), (-5, 100))
    assert trained.parse_ranges(" speed = 2.5 ") == ((2.5, 2.5), (10, 40))
    assert np.isnan(trained.parse_ranges("speed=unknown,mass=12")[0]).all()
    with pytest.raises(ValueError, match="--attributes age=3: the model is not conditioned on age: expected speed"):
        trained.parse_ranges("age=3")


@pytest.mark.parametrize("text", ["speed", "speed=", "=2", "speed=3..1", "speed=1..", "speed=..1", "speed=fast",
                                  "speed=1,speed=2", "speed=inf", "speed=1..inf", "speed=-inf..1", "speed=nan..1"])
def test_invalid_ranges_are_rejected(text):
    with pytest.raises(ValueError, match="--attributes must be comma-separated NAME=VALUE"):
        attribute_ranges.parse(text, "attributes")


def test_sampled_values_depend_on_seed_and_index_alone():
    ranges = ((1.0, 3.0), (5.0, 5.0), (NAN, NAN))
    values = sample_attributes(ranges, 3, range(200))
    assert values.dtype == np.float32 and values.shape == (200, 3)
    assert np.array_equal(values[[7, 4]], sample_attributes(ranges, 3, [7, 4]), equal_nan=True)
    assert (values[:, 1] == 5).all() and np.isnan(values[:, 2]).all()
    assert 1 <= values[:, 0].min() < 1.1 and 2.9 < values[:, 0].max() <= 3 and abs(values[:, 0].mean() - 2) < 0.1
    assert not np.array_equal(values[:, 0], sample_attributes(ranges, 4, range(200))[:, 0])


def test_ranges_outside_of_the_training_data_are_reported(trained):
    warnings = lambda text, has_null=False: trained.warnings(trained.parse_ranges(text), has_null)
    assert warnings("") == warnings("speed=1..3,mass=40") == warnings("speed=unknown") == []
    assert warnings("speed=0.5..2") == ["speed=0.5..2 is outside of the training data, 1..3"]
    assert warnings("mass=41") == ["mass=41 is outside of the training data, 10..40"]
    assert warnings("mass=unknown") == ["mass=unknown: in training it was known for every item"]
    assert warnings("mass=unknown", has_null=True) == []


# --- The network ---


def test_unknown_attributes_have_a_learned_vector():
    torch.manual_seed(0)
    embedding = unet.AttributeEmbedding(2, 8)
    torch.nn.init.normal_(embedding.unknown)
    out = embedding(torch.tensor([[0.5, NAN], [0.5, 2.0], [NAN, NAN]]))
    first, second = embedding.known[0](torch.tensor([[0.5]])), embedding.known[1](torch.tensor([[2.0]]))
    expected = torch.cat([first + embedding.unknown[1], first + second, embedding.unknown.sum(0, keepdim=True)])
    torch.testing.assert_close(out, expected)
    out.square().sum().backward()       # no gradient is NaN, and none is missing, which DDP does not accept
    assert all(parameter.grad.isfinite().all() for parameter in embedding.parameters())


@pytest.mark.parametrize("dims", [2, 3])
@pytest.mark.parametrize("kind", [unet.UNetModel, unet.SuperResModel])
def test_networks_depend_on_attributes_only_if_conditioned(kind, dims):
    x, t = torch.randn(2, 1, *(4,) * dims), torch.tensor([3, 9])
    low_res = {"low_res": x[..., ::2]} if kind is unet.SuperResModel else {}
    build = lambda **options: kind(4, 1, out_channels=1, dims=dims, num_classes=3, **TINY, **options)
    plain, network = build(), build(num_attributes=2)
    names = set(network.state_dict()) - set(plain.state_dict())
    assert names and all(name.startswith("attribute_emb.") for name in names)
    torch.nn.init.normal_(network.out[2].weight)
    torch.nn.init.normal_(network.attribute_emb.unknown)
    for block in network.modules():
        if isinstance(block, unet.ResBlock):
            torch.nn.init.normal_(block.out_layers[3].weight, std=0.1)
    call = lambda attributes: network(x, t, y=t // 5, attributes=attributes, **low_res)
    values = torch.tensor([[0.5, 1.0], [NAN, 2.0]])
    assert (call(values) - call(None)).flatten(1).abs().amax(1).min() > 1e-4
    assert torch.equal(call(None), call(torch.full((2, 2), NAN)))
    for attributes, shape in ((values[:, :1], r"\(2, 2\), got \(2, 1\)"), (values[:1], r"\(2, 2\), got \(1, 2\)")):
        with pytest.raises(ValueError, match=f"attributes: expected 2 per sample .--condition_on., shape {shape}"):
            call(attributes)
    with pytest.raises(ValueError, match="attributes: expected 0 per sample"):
        plain(x, t, y=t // 5, attributes=values, **low_res)


# --- Training and guidance ---


def record_conditioning(dropout, cond, slots=range(64)):
    """Return the conditioning that the network of a DiffusionObjective gets."""
    process, calls = create_gaussian_diffusion(steps=25), []
    objective = objectives.DiffusionObjective(process, class_dropout=dropout, null_label=7)
    x0 = torch.zeros(len(slots), 1, 2)
    rng = objectives.StepRNG(0, 5, slots, len(slots))
    objective(lambda x, t, **conditioning: calls.append(conditioning) or x, x0, cond, rng)
    return calls[0]


def test_attributes_are_dropped_together_with_the_class():
    y, values = torch.arange(64) % 3, torch.randn(64, 2)
    values[3, 1] = NAN
    both = record_conditioning(0.4, {"y": y, "attributes": values})
    dropped = both["y"] == 7
    assert 10 < dropped.sum() < 45 and both["attributes"][dropped].isnan().all()
    assert torch.equal(both["attributes"][~dropped].nan_to_num(9), values[~dropped].nan_to_num(9))
    assert torch.equal(both["y"], record_conditioning(0.4, {"y": y})["y"])     # as without attributes
    alone = record_conditioning(0.4, {"attributes": values})["attributes"]
    assert torch.equal(alone.isnan().all(1), dropped)
    assert torch.equal(record_conditioning(0.0, {"attributes": values})["attributes"].nan_to_num(9),
                       values.nan_to_num(9))


def test_guidance_extrapolates_from_unknown_attributes():
    model = lambda x, t, attributes, y=None: (attributes.nan_to_num(10).sum(1) + (0 if y is None else 100 * y)).view(
        -1, 1, 1).expand_as(x)
    x, t, values = torch.zeros(2, 1, 4), torch.tensor([3, 3]), torch.tensor([[1.0, 2.0], [NAN, 5.0]])
    out = ClassifierFreeGuidance(model, 3, 2.0)(x, t, attributes=values)
    assert out[:, 0, 0].tolist() == [2 * 3 - 20, 2 * 15 - 20]
    out = ClassifierFreeGuidance(model, 3, 2.0)(x, t, attributes=values, y=torch.tensor([0, 1]))
    assert out[:, 0, 0].tolist() == [2 * 3 - 320, 2 * 115 - 320]
    calls = []
    for null_label in (3, None):
        Unconditional(lambda x, t, **conditioning: calls.append(conditioning), null_label)(x, t)
    assert calls[0]["y"].tolist() == [3, 3] and calls[1] == {}


# --- Data, scripts and files ---


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Images whose brightness is the attribute `level`, unknown for the first, and one without meaning."""
    folder, rng = tmp_path_factory.mktemp("attributes") / "train", np.random.default_rng(0)
    folder.mkdir()
    rows = ["file_name,label,level,other"]
    for i in range(12):
        Image.fromarray(rng.integers(15 * i, 15 * i + 20, (8, 8), np.uint8)).save(folder / f"{i:02d}.png")
        rows.append(f"{i:02d}.png,{'ab'[i % 2]},{'' if i == 0 else i / 4},{i % 5}")
    (folder / "metadata.csv").write_text("\n".join(rows))
    return folder


@pytest.mark.parametrize("bulk", [False, True])
def test_stream_has_the_attributes_of_its_items(folder, bulk):
    images = ImageFolder(DataConfig(str(folder), image_size=8))
    encoded = EncodedImages(images, PixelCodec(1))
    encoded.supports_bulk_reads = bulk
    values = np.stack([images.attributes["level"], images.attributes["other"]], 1)
    plan = BatchPlan(12, 4, seed=2)
    stream = LatentStream(encoded, LatentNormalizer([0], [1], "none"), plan, "cpu", with_labels=True, attributes=values)
    for step in range(4):
        _, conditioning = next(stream)
        assert list(conditioning) == ["y", "attributes"] and conditioning["attributes"].dtype == torch.float32
        assert np.array_equal(conditioning["attributes"], values[plan.indices(step)], equal_nan=True)
    stream.close()


def test_samples_record_their_attributes(tmp_path):
    path, images = tmp_path / "samples.npz", np.zeros((3, 2, 2, 1), np.uint8)
    values = {"speed": [1, 2, NAN], "mass": [4, 5, 6]}
    write_npz(path, images.shape, [images], attributes=values)
    found = open_npz(path).attributes
    assert list(found) == ["speed", "mass"] and found["mass"].dtype == np.float32
    assert np.array_equal(np.stack(list(found.values())), list(values.values()), equal_nan=True)
    write_npz(path, images.shape, [images])
    assert open_npz(path).attributes == {} and sorted(np.load(path)) == ["arr_0"]
    np.savez(path, arr_0=images, attributes=np.zeros((2, 1)), attribute_names=np.array(["speed"]))
    with pytest.raises(ValueError, match=r"expected attributes as numbers \(3, 1\) with distinct attribute_names"):
        open_npz(path)
    np.savez(path, arr_0=images, attributes=np.zeros((2, 1)))
    assert open_npz(path).attributes == {}


@pytest.fixture
def run(one_process, call):
    def run(script, expected=0, **flags):
        status, out, err = call(script, **flags)
        assert status == expected, err
        return out + err
    return run


NETWORK = {"image_size": 8, "image_channels": 1, "num_channels": 32, "num_res_blocks": 1, "channel_mult": "1",
           "attention_resolutions": "1000", "diffusion_steps": 25, "batch_size": 4, "preview_interval": -1}


def test_sampler_normalizes_the_values_that_it_records(trained):
    sampler = Sampler(None, create_gaussian_diffusion(steps=25), (1, 2, 2), PixelCodec(1), None, (1, 2, 2),
                      attributes=trained, attribute_ranges=((3.0, 3.0), (NAN, NAN)))
    conditioning, _ = sampler.conditioning(range(2), None, "cpu")
    assert np.array_equal(sampler.attribute_values(range(2)), [[3, NAN]] * 2, equal_nan=True)
    assert conditioning["attributes"][:, 0].tolist() == pytest.approx([math.sqrt(1.5)] * 2)
    assert conditioning["attributes"][:, 1].isnan().all() and conditioning["attributes"].dtype == torch.float32


def test_scripts_train_and_sample_with_attributes(run, folder, tmp_path, monkeypatch):
    streams, held_out = [], []
    monkeypatch.setattr(training, "LatentStream", lambda *args, attributes, **options: streams.append(attributes)
                        or LatentStream(*args, attributes=attributes, **options))
    monkeypatch.setattr(loading, "HeldOutData", lambda *parts: held_out.append(parts[3]) or HeldOutData(*parts))
    train = {**NETWORK, "data_dir": folder, "condition_on": "level,other", "logdir": tmp_path / "run",
             "class_cond": True, "class_dropout": 0.2, "max_steps": 2}
    run("image_train", **train)
    header = json.loads((tmp_path / "run" / CONFIG_FILE).read_text())["header"]
    assert header["attributes"]["names"] == ["level", "other"] and header["attributes"]["missing"][0] == 1 / 12
    assert header["attributes"]["high"] == [2.75, 4] and header["model"]["condition_on"] == "level,other"
    (folder / "metadata.csv").write_text((folder / "metadata.csv").read_text().replace(",2.75,", ",5.5,"))
    run("image_train", **{**train, "max_steps": 3})     # a resumed run keeps the statistics of its start
    assert json.loads((tmp_path / "run" / CONFIG_FILE).read_text())["header"]["attributes"] == header["attributes"]

    sample = {"model_path": tmp_path / "run", "num_samples": 6, "batch_size": 4, "save_individual": False,
              "timestep_respacing": "3"}
    printed = run("image_sample", **sample, attributes="level=0.5..3,other=unknown", cfg_scale=2, logdir=tmp_path / "s")
    assert "warning: level=0.5..3 is outside of the training data, 0.25..2.75; such samples" in printed
    assert "2 classes, attributes level, other" in printed
    samples = open_npz(str(tmp_path / "s" / "samples_6x8x8x1.npz"))
    level = samples.attributes["level"]
    assert np.isnan(samples.attributes["other"]).all() and 0.5 <= level.min() < level.max() <= 3
    run("image_sample", **sample, logdir=tmp_path / "all")
    other = open_npz(str(tmp_path / "all" / "samples_6x8x8x1.npz")).attributes["other"]
    assert 0 <= other.min() < other.max() <= 4
    run("image_sample", **sample, cfg_scale=0, logdir=tmp_path / "null")
    assert sorted(np.load(tmp_path / "null" / "samples_6x8x8x1.npz")) == ["arr_0"]

    report = run("image_nll", model_path=tmp_path / "run", data_dir=folder, num_samples=4, batch_size=4,
                 timestep_respacing="3", logdir=tmp_path / "nll")
    assert "bits_per_dim" in report
    assert np.nanmean(streams[0], 0) == pytest.approx([0, 0], abs=1e-6) and np.nanstd(streams[0], 0) == pytest.approx(
        [1, 1])
    assert np.array_equal(streams[1], held_out[0], equal_nan=True)  # of the changed file, and the same statistics
    rejected = run("export", 1, model_path=tmp_path / "run", format="diffusers", out=tmp_path / "exported")
    assert "it is conditioned on attributes (--condition_on); set --format safetensors" in rejected
    for flags, message in ({"attributes": "mass=1"}, "not conditioned on mass: expected level, other"), (
            {"attributes": "level=1", "cfg_scale": 0}, "--attributes level=1 has no effect with --cfg_scale 0"):
        assert message in run("image_sample", 1, **sample, **flags, logdir=tmp_path / "rejected")
    assert "has no attribute size (--condition_on)" in run("image_train", 1, **{
        **train, "condition_on": "size", "logdir": tmp_path / "size"})


def test_models_without_attributes_reject_them(run, folder, tmp_path):
    run("image_train", **NETWORK, data_dir=folder, logdir=tmp_path / "run", max_steps=1)
    sample = {"model_path": tmp_path / "run", "num_samples": 2, "logdir": tmp_path / "s"}
    assert "the model was trained without --condition_on; omit the flag" in run("image_sample", 1, **sample,
                                                                                attributes="level=1")
    assert "--condition_on level conflicts" in run("image_sample", 1, **sample, condition_on="level")
    header = json.loads((tmp_path / "run" / CONFIG_FILE).read_text())["header"]
    assert "attributes" not in header and header["model"]["condition_on"] == ""
