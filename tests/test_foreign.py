"""Autoencoders and weights of other projects: layouts, containers, and what their files say about themselves."""

import json
import re

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file

from guided_diffusion_vae import checkpoint_util
from guided_diffusion_vae.autoencoder import AutoencoderKL
from guided_diffusion_vae.train_util import ClassifierTrainConfig, init_from_weights
from guided_diffusion_vae.unet import EncoderUNetModel, UNetModel
from guided_diffusion_vae.vae import compvis
from guided_diffusion_vae.vae_wrapper import VAEConfig, VAEInterface, create_vae

diffusers = pytest.importorskip("diffusers")
pytestmark = pytest.mark.filterwarnings("ignore")   # diffusers warns about its own dependencies

MONAI = {"spatial_dims": 2, "in_channels": 1, "out_channels": 1, "num_channels": (4, 8), "num_res_blocks": 1,
         "attention_levels": (False, False), "latent_channels": 3, "norm_num_groups": 2,
         "with_encoder_nonlocal_attn": False, "with_decoder_nonlocal_attn": False}


def vae(path, **arguments):
    return VAEInterface(str(path), device="cpu", **arguments)


def images(*shape):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(1))


def randomized(network):
    torch.manual_seed(0)
    for p in network.parameters():
        torch.nn.init.normal_(p, std=0.1)
    return network.eval().requires_grad_(False)


# --- The layout of CompVis ---


def compvis_network(latent_channels=4, levels=2, attention=False, quantized=True):
    """Return an AutoencoderKL of diffusers of a form that CompVis has."""
    down = ["DownEncoderBlock2D"] * (levels - 1) + ["AttnDownEncoderBlock2D" if attention else "DownEncoderBlock2D"]
    up = [name.replace("DownEncoder", "UpDecoder") for name in reversed(down)]
    return randomized(diffusers.AutoencoderKL(
        block_out_channels=tuple(32 * (i + 1) for i in range(levels)), down_block_types=down, up_block_types=up,
        layers_per_block=2, latent_channels=latent_channels, use_quant_conv=quantized, use_post_quant_conv=quantized,
    ))


def compvis_weights(network):
    """Return the weights of diffusers' network in the layout of CompVis, from its modules."""
    weights = {}

    def put(place, module):
        weights.update({f"{place}.{name}": value for name, value in module.state_dict().items()})

    def put_block(place, block):
        for name in ("norm1", "conv1", "norm2", "conv2"):
            put(f"{place}.{name}", getattr(block, name))
        if block.conv_shortcut is not None:
            put(f"{place}.nin_shortcut", block.conv_shortcut)

    def put_attention(place, attention):
        put(f"{place}.norm", attention.group_norm)
        for name, linear in zip("qkv", (attention.to_q, attention.to_k, attention.to_v)):
            put(f"{place}.{name}", linear)
        put(f"{place}.proj_out", attention.to_out[0])
        for name in ("q", "k", "v", "proj_out"):
            weights[f"{place}.{name}.weight"] = weights[f"{place}.{name}.weight"][:, :, None, None]

    def put_level(place, level, resample, convolution):
        for i, block in enumerate(level.resnets):
            put_block(f"{place}.block.{i}", block)
        for i, attention in enumerate(getattr(level, "attentions", ())):
            put_attention(f"{place}.attn.{i}", attention)
        if convolution:
            put(f"{place}.{resample}.conv", convolution[0].conv)

    for i, level in enumerate(network.encoder.down_blocks):
        put_level(f"encoder.down.{i}", level, "downsample", level.downsamplers)
    for i, level in enumerate(reversed(network.decoder.up_blocks)):
        put_level(f"decoder.up.{i}", level, "upsample", level.upsamplers)
    for side, part in (("encoder", network.encoder), ("decoder", network.decoder)):
        put(f"{side}.conv_in", part.conv_in)
        put(f"{side}.norm_out", part.conv_norm_out)
        put(f"{side}.conv_out", part.conv_out)
        put_block(f"{side}.mid.block_1", part.mid_block.resnets[0])
        put_block(f"{side}.mid.block_2", part.mid_block.resnets[1])
        put_attention(f"{side}.mid.attn_1", part.mid_block.attentions[0])
    for name in ("quant_conv", "post_quant_conv"):
        if getattr(network, name) is not None:
            put(name, getattr(network, name))
    return weights


def in_model(weights, prefix="first_stage_model.", **others):
    """Return the state dict of a model that contains an autoencoder, with one more weight for each of `others`."""
    others = {name.replace("__", "."): torch.zeros(shape) for name, shape in others.items()}
    return {**{f"{prefix}{name}": value for name, value in weights.items()}, **others}


@pytest.fixture(scope="module")
def kl():
    network = compvis_network()
    return network, compvis_weights(network)


@pytest.mark.parametrize("form", [{}, {"levels": 3}, {"latent_channels": 16, "quantized": False}])
def test_compvis_weights_are_converted_as_by_diffusers(form):
    from diffusers.loaders.single_file_utils import convert_ldm_vae_checkpoint, create_vae_diffusers_config_from_ldm

    network = compvis_network(**form)
    weights, levels = compvis_weights(network), form.get("levels", 2)
    first_stage = {"ch": 32, "ch_mult": list(range(1, levels + 1)), "in_channels": 3, "out_ch": 3, "num_res_blocks": 2,
                   "z_channels": form.get("latent_channels", 4)}
    original = {"model": {"params": {"first_stage_config": {"params": {"ddconfig": first_stage}}}}}
    theirs = create_vae_diffusers_config_from_ldm(original, weights)
    config = compvis.diffusers_config(weights, "a.ckpt")
    compared = ("in_channels", "out_channels", "down_block_types", "up_block_types", "block_out_channels",
                "latent_channels", "layers_per_block")
    assert {name: config[name] for name in compared} == {name: theirs[name] for name in compared}
    expected = convert_ldm_vae_checkpoint(weights, theirs)
    converted = compvis.to_diffusers(weights, levels)
    assert converted.keys() == expected.keys() == network.state_dict().keys()
    assert all(torch.equal(value, expected[name]) for name, value in converted.items())


class PlainCompVis:
    """The functions of an autoencoder of CompVis, written out from its names."""

    def __init__(self, weights):
        self.weights = weights

    def conv(self, name, x, **arguments):
        return F.conv2d(x, self.weights[f"{name}.weight"], self.weights[f"{name}.bias"], **arguments)

    def norm(self, name, x):
        return F.group_norm(x, 32, self.weights[f"{name}.weight"], self.weights[f"{name}.bias"], 1e-6)

    def block(self, name, x):
        h = self.conv(f"{name}.conv1", F.silu(self.norm(f"{name}.norm1", x)), padding=1)
        h = self.conv(f"{name}.conv2", F.silu(self.norm(f"{name}.norm2", h)), padding=1)
        return h + (self.conv(f"{name}.nin_shortcut", x) if f"{name}.nin_shortcut.weight" in self.weights else x)

    def attention(self, name, x):
        q, k, v = (self.conv(f"{name}.{part}", self.norm(f"{name}.norm", x)).flatten(2) for part in "qkv")
        attended = v @ (q.mT @ k / q.shape[1] ** 0.5).softmax(-1).mT
        return x + self.conv(f"{name}.proj_out", attended.view_as(x))

    def level(self, name, x):
        i = 0
        while f"{name}.block.{i}.conv1.weight" in self.weights:
            x = self.block(f"{name}.block.{i}", x)
            x = self.attention(f"{name}.attn.{i}", x) if f"{name}.attn.{i}.q.weight" in self.weights else x
            i += 1
        return x

    def middle(self, side, x):
        x = self.attention(f"{side}.mid.attn_1", self.block(f"{side}.mid.block_1", x))
        return self.block(f"{side}.mid.block_2", x)

    def end(self, side, x):
        return self.conv(f"{side}.conv_out", F.silu(self.norm(f"{side}.norm_out", x)), padding=1)

    def encode(self, x, levels):
        x = self.conv("encoder.conv_in", x, padding=1)
        for i in range(levels):
            x = self.level(f"encoder.down.{i}", x)
            if i < levels - 1:
                x = self.conv(f"encoder.down.{i}.downsample.conv", F.pad(x, (0, 1, 0, 1)), stride=2)
        return self.conv("quant_conv", self.end("encoder", self.middle("encoder", x))).chunk(2, 1)[0]

    def decode(self, z, levels):
        x = self.middle("decoder", self.conv("decoder.conv_in", self.conv("post_quant_conv", z), padding=1))
        for i in reversed(range(levels)):
            x = self.level(f"decoder.up.{i}", x)
            if i:
                x = self.conv(f"decoder.up.{i}.upsample.conv", F.interpolate(x, scale_factor=2.0), padding=1)
        return self.end("decoder", x)


@pytest.mark.parametrize("form, name, wrapped", [
    ({}, "v1.ckpt", lambda w: {"state_dict": in_model(w, cond_stage_model__a=1), "epoch": 3, "global_step": 9}),
    ({}, "vae.pt", lambda w: {"state_dict": {**w, "loss.logvar": torch.zeros(())}}),
    ({"attention": True, "levels": 3}, "kl-f16.pt", dict),
    ({}, "v1.safetensors", lambda w: in_model(w, cond_stage_model__a=1)),
    ({}, "merged.safetensors", lambda w: in_model(w, "vae.", model__diffusion_model__a=1)),
])
def test_compvis_files_encode_and_decode_as_written_out(tmp_path, form, name, wrapped):
    weights, levels, path = compvis_weights(compvis_network(**form)), form.get("levels", 2), tmp_path / name
    content = wrapped(weights)
    if path.suffix == ".safetensors":
        save_file({name: value.contiguous() for name, value in content.items()}, path)
    else:
        torch.save(content, path)
    codec, x, expected = vae(path), images(2, 3, 16, 8), PlainCompVis(weights)
    z = expected.encode(2 * x - 1, levels)
    latents = codec.encode_batch(x)
    torch.testing.assert_close(latents, 0.18215 * z)
    decoded = (expected.decode(z, levels) + 1) / 2
    torch.testing.assert_close(codec.decode_batch(latents), decoded.clamp(0, 1))
    assert decoded.std() > 0.03 and codec.factors == (2 ** (levels - 1),) * 2 and codec.path == str(path)


WIDE = {"latent_channels": 16, "quantized": False}


@pytest.mark.parametrize("form, others, scale, shift", [
    ({}, {"cond_stage_model__transformer": 1}, 0.18215, 0), ({}, {"model__diffusion_model__out": 1}, 0.18215, 0),
    ({}, {"conditioner__embedders": 1, "model__diffusion_model__out": 1}, 0.13025, 0),
    ({}, {"model__diffusion_model__label_emb__0__0__weight": (4, 2816)}, 0.13025, 0),
    ({}, {"model__diffusion_model__label_emb__0__0__weight": (4, 2048)}, 0.18215, 0),   # unCLIP
    ({"levels": 3}, {"low_scale_model__betas": 1, "cond_stage_model__a": 1}, 0.08333, 0),
    (WIDE, {"model__diffusion_model__joint_blocks__0": 1}, 1.5305, 0.0609),
    (WIDE, {"model__diffusion_model__double_blocks__0": 1}, 0.3611, 0.1159),
    ({"latent_channels": 8}, {"cond_stage_model__a": 1}, None, 0),
])
def test_full_models_state_the_scale_of_their_latents(form, others, scale, shift):
    weights = compvis_weights(compvis_network(**form))
    (found, full), = compvis.find_autoencoders({"state_dict": in_model(weights, **others)}).values()
    assert found.keys() == weights.keys()
    assert compvis.latent_scale(found, full, {}) == (scale, shift, "")


def test_measured_scale_factor_of_a_latent_diffusion_model_counts_first(kl):
    full = {**in_model(kl[1], cond_stage_model__a=1), "scale_factor": torch.tensor(0.25)}
    assert compvis.latent_scale(kl[1], full, {"scaling_factor": 0.5}) == (0.25, 0, "")


def test_autoencoder_alone_uses_the_scale_stated_next_to_it(tmp_path, kl):
    torch.save(kl[1], tmp_path / "sdxl_vae.pt")
    kl[0].save_config(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "scaling_factor": 0.13025, "shift_factor": 0.5}))
    codec = vae(tmp_path / "sdxl_vae.pt")
    assert (codec.scale_factor, codec.shift_factor, codec.remark) == (0.13025, 0.5, "")
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ValueError, match="config.json: is not JSON"):
        vae(tmp_path / "sdxl_vae.pt")


@pytest.mark.parametrize("form, scale, shift, remark", [
    ({}, 0.18215, 0, "0.18215 of Stable Diffusion 1 and 2 is used; set --scale_factor 0.13025 if .* SDXL"),
    (WIDE, 0.3611, 0.1159, "scale 0.3611 and shift 0.1159 of FLUX.1 .* Stable Diffusion 3, .* put the config.json of"),
])
def test_autoencoder_alone_that_could_be_of_two_models_is_reported(tmp_path, capsys, form, scale, shift, remark):
    path = tmp_path / "vae.pt"
    torch.save(compvis_weights(compvis_network(**form)), path)
    codec = create_vae(VAEConfig(vae_path=str(path)), "cpu")
    assert (codec.scale_factor, codec.shift_factor) == (scale, shift)
    assert re.search(f"--vae_path .*vae.pt: the .*{remark}", capsys.readouterr().out)
    assert create_vae(VAEConfig(vae_path=str(path), scale_factor=0.5), "cpu").scale_factor == 0.5
    assert capsys.readouterr().out == ""


def test_the_configuration_that_the_remark_names_gives_scale_and_shift_of_stable_diffusion_3(tmp_path):
    path, weights = tmp_path / "vae.pt", compvis_weights(compvis_network(**WIDE))
    torch.save(weights, path)
    flux = vae(path)
    (tmp_path / "config.json").write_text(re.search(r"\((\{.*\})\)", flux.remark)[1])
    codec, images = vae(path), torch.rand(1, 3, 32, 32)
    assert (codec.scale_factor, codec.shift_factor, codec.remark) == (1.5305, 0.0609, "")
    mean, (latents, other) = codec.network.encode(images * 2 - 1).latent_dist.mean, (
        each.encode_batch(images) for each in (codec, flux))
    torch.testing.assert_close(latents, (mean - 0.0609) * 1.5305)
    torch.testing.assert_close(other, (mean - 0.1159) * 0.3611)
    torch.testing.assert_close(codec.decode_batch(latents), flux.decode_batch(other))
    assert codec.describe()["shift_factor"] == 0.0609 and codec.fingerprint != flux.fingerprint


def test_ema_weights_of_an_autoencoder_in_a_checkpoint_are_used(tmp_path, capsys, kl):
    other = {name: value + 1 for name, value in kl[1].items()}
    torch.save({"state_dict": other, "model_ema": kl[1]}, tmp_path / "vae.ckpt")
    codec = vae(tmp_path / "vae.ckpt")
    assert torch.equal(codec.network.decoder.conv_in.weight, kl[0].decoder.conv_in.weight)
    assert "contains several autoencoders: state_dict/*, model_ema/*; the EMA weights are used" in (
        capsys.readouterr().out)


@pytest.mark.parametrize("change, problem", [
    (lambda w: {k: v for k, v in w.items() if not k.startswith("decoder.")}, "without decoder.conv_in.weight, decoder"),
    (lambda w: {**w, "encoder.conv_out.weight": w["encoder.conv_out.weight"][:4]},
     "the encoder returns 4 channels and the decoder reads 4: expected a KL autoencoder"),
    (lambda w: {**in_model(w), **in_model(w, "other.")}, r"several autoencoders: first_stage_model.\*, other.\*; save"),
    (lambda w: {k: v for k, v in w.items() if "mid.block_2" not in k}, "does not match the model .*--vae_path"),
])
def test_incomplete_or_other_autoencoders_are_rejected(tmp_path, kl, change, problem):
    torch.save(change(kl[1]), tmp_path / "vae.ckpt")
    with pytest.raises(ValueError, match=f"vae.ckpt.*{problem}"):
        vae(tmp_path / "vae.ckpt")


class ModelCheckpoint:
    """Stands for an object of PyTorch Lightning in an old checkpoint."""


def test_checkpoints_with_other_objects_say_how_to_convert_them(tmp_path, kl):
    torch.save({"state_dict": in_model(kl[1]), "callbacks": {ModelCheckpoint: {"best": 1}}}, tmp_path / "v1.ckpt")
    with pytest.raises(ValueError, match=r"v1.ckpt contains more than tensors .*ModelCheckpoint\), .*weights_only=True "
                                         "rejects, .*use a .safetensors version .*torch.save; check --vae_path"):
        vae(tmp_path / "v1.ckpt")


# --- Containers ---


def prefixed(prefix):
    return lambda weights: {f"{prefix}{name}": value for name, value in weights.items()}


OPTIMIZER = {"state": {0: {"exp_avg": torch.zeros(2), "step": torch.tensor(1.0)}}, "param_groups": [{"lr": 0.1}]}
CONTAINERS = {
    "state_dict": lambda w: {"state_dict": w, "epoch": 3, "optimizer": OPTIMIZER},
    "model_state_dict": lambda w: {"model_state_dict": w, "optimizer_state_dict": OPTIMIZER, "loss": 0.5},
    "autoencoder_state_dict": lambda w: {"autoencoder_state_dict": w, "discriminator": {"conv.weight": torch.ones(3)}},
    "ema": lambda w: {"ema": w, "step": 7},
    "nested ema": lambda w: {"model": {"model_ema": w}},
    "DDP": prefixed("module."),
    "compiled": prefixed("_orig_mod."),
    "compiled DDP in a container": lambda w: {"model": prefixed("module._orig_mod.")(w)},
    "Lightning": lambda w: {"state_dict": {**prefixed("model.net.")(w), "loss.logvar": torch.zeros(())},
                            "pytorch-lightning_version": "2.0"},
    "next to numbers": lambda w: {**w, "epoch": 4},
}


SIZES = {"image_size": 8, "model_channels": 32, "num_res_blocks": 1, "channel_mult": (1,),
         "attention_resolutions": (1,)}


def unet(in_channels=3, out_channels=3, num_classes=None, **sizes):
    return UNetModel(in_channels=in_channels, out_channels=out_channels, num_classes=num_classes, **{**SIZES, **sizes})


NETWORKS = {
    "autoencoder": lambda: AutoencoderKL(**MONAI),
    "diffusion": lambda: unet(num_classes=3),
    "classifier": lambda: EncoderUNetModel(**SIZES, in_channels=3, out_channels=4, pool="attention",
                                           num_head_channels=32),
}


def equal(network, weights):
    return all(torch.equal(value, weights[name]) for name, value in network.state_dict().items())


@pytest.mark.parametrize("kind", NETWORKS)
@pytest.mark.parametrize("container", CONTAINERS)
def test_weights_in_containers_load_as_bare_ones(tmp_path, container, kind):
    source, strict, started = randomized(NETWORKS[kind]()), NETWORKS[kind](), NETWORKS[kind]()
    torch.save(CONTAINERS[container](source.state_dict()), tmp_path / "a.pt")
    content, header = checkpoint_util.load_weights(tmp_path / "a.pt")
    loaded = checkpoint_util.load_strict(strict, content, "a.pt")
    init_from_weights(started, tmp_path / "a.pt")
    assert header is None and loaded.keys() == source.state_dict().keys()
    assert equal(strict, source.state_dict()) and equal(started, source.state_dict())


def test_containers_keep_the_versions_of_modules(tmp_path):
    """Without them, attention would get the identity projection of GenerativeModels."""
    make = lambda: AutoencoderKL(**{**MONAI, "attention_levels": (False, True)})
    source, model = randomized(make()), torch.nn.Module()
    model.net = torch.compile(source)
    torch.save({"state_dict": model.state_dict()}, tmp_path / "a.pt")
    network = make()
    checkpoint_util.load_strict(network, checkpoint_util.load_weights(tmp_path / "a.pt")[0], "a.pt")
    assert equal(network, source.state_dict())


def test_parts_of_a_network_elsewhere_in_the_file_change_nothing():
    weights, network = randomized(torch.nn.Linear(3, 2)).state_dict(), torch.nn.Linear(3, 2)
    checkpoint_util.load_strict(network, {"model": weights, "head": {"bias": torch.ones(2)}}, "a.pt")
    assert equal(network, weights)


@pytest.mark.parametrize("key, prefix", [("ema", "module."), ("state_dict_ema", ""), ("other", "model_ema.")])
def test_ema_weights_in_containers_are_used(tmp_path, capsys, key, prefix):
    last = randomized(torch.nn.Linear(3, 2)).state_dict()
    averaged = {name: value + 1 for name, value in last.items()}
    torch.save({"model": last, key: prefixed(prefix)(averaged)}, tmp_path / "a.pt")
    content, _ = checkpoint_util.load_weights(tmp_path / "a.pt")
    strict, started = torch.nn.Linear(3, 2), torch.nn.Linear(3, 2)
    assert checkpoint_util.load_strict(strict, content, "a.pt").keys() == averaged.keys() and equal(strict, averaged)
    assert capsys.readouterr().out == ("a.pt contains several sets of weights that fit the model: model/*, "
                                       f"{key}/{prefix}*; the EMA weights are used\n")
    init_from_weights(started, tmp_path / "a.pt")
    assert equal(started, averaged) and "the EMA weights are used" in capsys.readouterr().out


@pytest.mark.parametrize("key", ["generator", "ema_decay"])
def test_several_sets_of_weights_that_fit_are_listed(tmp_path, key):
    weights = torch.nn.Linear(3, 2).state_dict()
    content = {"model": weights, key: prefixed("module.")(weights), "other": {"a": torch.ones(1)}}
    torch.save(content, tmp_path / "a.pt")
    content, _ = checkpoint_util.load_weights(tmp_path / "a.pt")
    text = rf"contains several sets of weights that fit the model: model/\*, {key}/module.\*; save one .*set {{}}"
    with pytest.raises(ValueError, match=text.format("--model_path")):
        checkpoint_util.load_strict(torch.nn.Linear(3, 2), content, "a.pt")
    with pytest.raises(ValueError, match=text.format("--init_from")):
        init_from_weights(torch.nn.Linear(3, 2), tmp_path / "a.pt")


def test_containers_without_fitting_weights_list_what_they_contain(tmp_path):
    weights = torch.nn.Linear(3, 2).state_dict()
    torch.save({"net": prefixed("module.")(weights), "scale": torch.ones(1), "epoch": 3}, tmp_path / "a.pt")
    content, _ = checkpoint_util.load_weights(tmp_path / "a.pt")
    contents = "it contains scale and 0 others in the file itself, module.weight and 1 others in net; check"
    lines = r"1 of 2 entries differ; weight: expected \(2, 4\), got \(2, 3\)\)"
    with pytest.raises(ValueError, match=f"{lines}; {contents}"):
        checkpoint_util.load_strict(torch.nn.Linear(4, 2), content, "a.pt")
    with pytest.raises(ValueError, match=f"no weights in common with this model; {contents} --init_from"):
        init_from_weights(torch.nn.Linear(4, 5), tmp_path / "a.pt")
    lines = r"3 of 2 entries differ; bias: expected \(2,\), got nothing; gain: expected nothing, got \(3,\)"
    with pytest.raises(ValueError, match=lines):
        checkpoint_util.load_strict(torch.nn.Linear(3, 2), {"gain": torch.zeros(3)}, "a.pt")


@pytest.mark.parametrize("there, here, flags", [
    ({"num_classes": 4}, {}, "--class_cond True"), ({}, {"num_classes": 4}, "--class_cond False"),
    ({"out_channels": 6}, {}, "--learn_sigma True"), ({}, {"out_channels": 6}, "--learn_sigma False"),
    ({"num_classes": 4, "out_channels": 6}, {}, "--class_cond True and --learn_sigma True"),
])
def test_flags_that_explain_another_model_are_named(there, here, flags):
    with pytest.raises(ValueError, match=f"; it seems to be a model with {flags}; check --model_path and the flags"):
        checkpoint_util.load_strict(unet(**here), unet(**there).state_dict(), "a.pt", "--model_path")


# --- Fine-tuning ---


@pytest.mark.parametrize("there, here, new, unused", [
    ({"num_classes": 1000}, {"num_classes": 5}, {"label_emb.weight (5, 128)"}, {"label_emb.weight (1000, 128)"}),
    ({"num_classes": 4}, {}, set(), {"label_emb.weight (4, 128)"}),
    ({}, {"in_channels": 4}, {"input_blocks.0.0.weight (32, 4, 3, 3)"}, {"input_blocks.0.0.weight (32, 3, 3, 3)"}),
    ({"out_channels": 6}, {}, {"out.2.weight (3, 32, 3, 3)", "out.2.bias (3,)"},
     {"out.2.weight (6, 32, 3, 3)", "out.2.bias (6,)"}),    # learn_sigma
    ({"image_size": 16}, {}, set(), set()),
])
def test_init_from_takes_what_fits_of_a_guided_diffusion_checkpoint(tmp_path, capsys, there, here, new, unused):
    source, model = randomized(unet(**there)), unet(**here)
    torch.save(dict(source.state_dict()), tmp_path / "model500000.pt")
    before = {name: value.clone() for name, value in model.state_dict().items()}
    init_from_weights(model, tmp_path / "model500000.pt")
    out = capsys.readouterr().out
    listed = {kind: set(re.findall(rf"  {kind}: (.*)", out)) for kind in ("newly initialized", "not used")}
    assert listed == {"newly initialized": new, "not used": unused}
    names = {text.split()[0] for text in new}
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name] if name in names else source.state_dict()[name])
    assert f"{len(before) - len(new)} of {len(before)} weights are initialized from" in out


def test_classifiers_start_from_weights_too():
    assert ClassifierTrainConfig(init_from="a.pt").to_train_config().init_from == "a.pt"


# --- Folders and files of diffusers ---


@pytest.fixture
def folder(tmp_path, kl):
    kl[0].save_pretrained(tmp_path / "vae")
    return tmp_path / "vae"


STEM = "diffusion_pytorch_model"


def test_folder_with_a_variant_only_opens(folder, kl):
    whole = vae(folder)
    (folder / f"{STEM}.safetensors").unlink()
    kl[0].save_pretrained(folder, variant="fp16")
    assert [path.name for path in folder.glob("*.safetensors")] == [f"{STEM}.fp16.safetensors"]
    assert vae(folder).fingerprint == whole.fingerprint
    kl[0].save_pretrained(folder, variant="bf16")
    with pytest.raises(ValueError, match="weights of the variants bf16, fp16 only; set --vae_path to one of the files"):
        vae(folder)
    assert vae(folder / f"{STEM}.bf16.safetensors").fingerprint == whole.fingerprint
    kl[0].save_pretrained(folder)
    assert vae(folder).fingerprint == whole.fingerprint


@pytest.mark.parametrize("name", [f"{STEM}.safetensors", "vae.safetensors", "vae.pt", "vae.ckpt"])
def test_weights_file_in_a_folder_opens_by_its_config(folder, kl, name):
    whole, x = vae(folder), images(1, 3, 8, 8)
    content = checkpoint_util.load_weights(folder / f"{STEM}.safetensors")[0]
    if name.endswith(".safetensors"):
        save_file(content, folder / name)
    else:
        torch.save({"state_dict": prefixed("vae.")(content)} if name.endswith(".ckpt") else content, folder / name)
    codec = vae(folder / name)
    assert codec.fingerprint == whole.fingerprint and codec.path == str(folder / name)
    torch.testing.assert_close(codec.encode_batch(x), whole.encode_batch(x))


def test_attention_names_of_old_diffusers_are_read_in_folders_and_files(folder, kl):
    path = folder / f"{STEM}.safetensors"
    names = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    whole, content = vae(folder), checkpoint_util.load_weights(path)[0]
    for new, old in names.items():
        content = {name.replace(f".{new}.", f".{old}."): value for name, value in content.items()}
    save_file(content, path)
    assert vae(folder).fingerprint == vae(path).fingerprint == whole.fingerprint


def test_diffusers_weights_without_a_usable_config_name_it(folder):
    path, config = folder / f"{STEM}.safetensors", folder / "config.json"
    text = config.read_text()
    for damaged in (text[:100], "", "[1]", text.replace(":", ";")):
        config.write_text(damaged)
        for each in (folder, path):
            with pytest.raises(ValueError, match=r"config.json: is not JSON \(.*\); check --vae_path"):
                vae(each)
    config.write_text(text.replace('"_class_name"', '"_class_nam"'))
    with pytest.raises(ValueError, match=r"nor a diffusers folder \(no config.json with _class_name\)"):
        vae(folder)
    config.write_text(text.replace('"block_out_channels"', '"block_out_channel"'))
    with pytest.raises(ValueError, match="config.json: no AutoencoderKL has this configuration .*; check --vae_path"):
        vae(path)
    config.write_text(text.replace('"latent_channels": 4', '"latent_channels": 5'))
    with pytest.raises(ValueError, match="safetensors does not match the model .*--vae_path"):
        vae(path)
    config.write_text(text.replace('"AutoencoderKL"', '"UNet2DModel"'))
    with pytest.raises(ValueError, match="config.json describes a UNet2DModel: expected one of: AutoencoderKL, Auto"):
        vae(path)
    config.unlink()
    with pytest.raises(FileNotFoundError, match=r"config.json with their _class_name does not exist; download it"):
        vae(path)


# --- Bundles of MONAI ---


BUNDLE = {
    "imports": ["$import torch"], "bundle_root": ".", "spatial_dims": 2, "image_channels": 1,
    "sizes": {"latent": [3, 9]}, "device": "$torch.device('cpu')", "groups": "@norm_groups", "norm_groups": 2,
    "autoencoder_def": {
        "_target_": "monai.networks.nets.autoencoderkl.AutoencoderKL", "spatial_dims": "@spatial_dims",
        "in_channels": "@image_channels", "out_channels": "@autoencoder_def::in_channels", "channels": [4, 8],
        "num_res_blocks": 1, "attention_levels": [False, False], "latent_channels": "@sizes#latent#0",
        "norm_num_groups": "@groups", "norm_eps": 1e-6, "include_fc": False,
        "with_encoder_nonlocal_attn": False, "with_decoder_nonlocal_attn": False,
    },
    "load_autoencoder_path": "$@bundle_root + '/models/model_autoencoder.pt'",
    "autoencoder": "$@autoencoder_def.to(@device)",
}


@pytest.fixture
def bundle(tmp_path):
    """Return (the folder of a bundle without definition, its weights file, the network)."""
    network = randomized(AutoencoderKL(**MONAI))
    for name in ("configs", "models"):
        (tmp_path / "bundle" / name).mkdir(parents=True)
    path = tmp_path / "bundle" / "models" / "model_autoencoder.pt"
    torch.save(dict(network.state_dict()), path)
    torch.save({}, path.with_name("model.pt"))      # of the diffusion model
    return tmp_path / "bundle", path, network


@pytest.mark.parametrize("name", ["inference.json", "inference.yaml", "inference_autoencoder.json"])
def test_bundles_open_with_their_references(bundle, name):
    folder, path, network = bundle
    (folder / "configs" / "inference.json").write_text('{"network_def": {"spatial_dims": 2}}')
    text = json.dumps(BUNDLE) if name.endswith(".json") else json.dumps(BUNDLE).replace("1e-06", "1.0e-06")
    (folder / "configs" / name).write_text(text)
    x = images(2, 1, 8, 8)
    expected = network.moments(x)[0] * 0.18215
    for where in (folder, path):
        torch.testing.assert_close(vae(where).encode_batch(x), expected)
    other = path.rename(folder.parent / "alone.pt")
    torch.testing.assert_close(vae(other, vae_config=str(folder / "configs" / name)).encode_batch(x), expected)


@pytest.mark.parametrize("change, problem", [
    ({"spatial_dims": "$1 + 1"}, r"autoencoder_def::spatial_dims, through @spatial_dims, is '\$1 \+ 1': "
     "expected a value, as expressions are not run; replace it, .*--vae_config"),
    ({"image_channels": "%other.json::channels"}, "autoencoder_def::in_channels, .* is '%other.json::channels': expe"),
    ({"groups": "@nothing"}, "autoencoder_def::norm_num_groups, through @groups, is '@nothing': expected a re"),
    ({"sizes": {"latent": []}}, "autoencoder_def::latent_channels is '@sizes#latent#0': expected a reference to a key"),
    ({"norm_groups": "@groups"}, "autoencoder_def::norm_num_groups, .* is '@groups', which refers to itself"),
    ({"groups": [f"@g{i}" for i in range(40)], **{f"g{i}": [f"@g{i + 1}"] * 9 for i in range(40)},
      "g40": 1}, "autoencoder_def::norm_num_groups, through @g39, refers to too many values"),
    ({**{f"g{i}": f"@g{i + 1}" for i in range(999)}, "groups": "@g0"}, "through @g48, refers to too many values"),
    ({"autoencoder_def": "$make()"}, r"inference.json: autoencoder_def is '\$make\(\)': expected a value"),
    ({"autoencoder_def": {"channels": [4, "$2 * 4"]}}, r"autoencoder_def::channels::1 is '\$2 \* 4': expected a value"),
])
def test_expressions_and_references_to_nothing_are_rejected_by_key(bundle, change, problem):
    folder, path, _ = bundle
    (folder / "configs" / "inference.json").write_text(json.dumps({**BUNDLE, **change}))
    with pytest.raises(ValueError, match=problem):
        vae(path)


def test_vae_config_counts_before_a_config_of_diffusers_next_to_the_file(bundle):
    folder, path, network = bundle
    (path.parent / "config.json").write_text('{"_class_name": "AutoencoderKL"}')
    (folder / "arguments.json").write_text(json.dumps(MONAI))
    x = images(2, 1, 8, 8)
    codec = vae(path, vae_config=str(folder / "arguments.json"))
    torch.testing.assert_close(codec.encode_batch(x), network.moments(x)[0] * 0.18215)


def test_bundles_without_one_autoencoder_are_rejected(bundle):
    folder, path, _ = bundle
    with pytest.raises(FileNotFoundError, match="model_autoencoder.yaml with the arguments of MONAI's .*--vae_config"):
        vae(folder)
    path.rename(path.with_name("vae.pt"))
    with pytest.raises(ValueError, match="models contains model.pt, vae.pt: expected one file with autoencoder in its"):
        vae(folder)
