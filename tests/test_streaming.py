import contextlib

import pytest
import torch

from guided_diffusion_vae.autoencoder import AutoencoderKL
from guided_diffusion_vae.vae.streaming import Streamer

BASE = {"in_channels": 1, "num_channels": (8, 8, 16), "num_res_blocks": 1, "attention_levels": (False, False, True),
        "norm_num_groups": 4, "with_encoder_nonlocal_attn": False, "with_decoder_nonlocal_attn": True}


def random_network(**flags):
    torch.manual_seed(0)
    network = AutoencoderKL(**{**BASE, **flags}).eval()
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter, std=0.15)
    return network


@pytest.mark.parametrize("flags", [
    {"spatial_dims": 1}, {"spatial_dims": 2}, {"spatial_dims": 3},
    {"spatial_dims": 2, "initial_downsample_factor": 2, "downsample_factors": (4, 2), "space_to_channel": True},
    {"spatial_dims": 3, "initial_downsample_factor": (1, 2, 2), "downsample_factors": (2, 3),
     "final_upsample": "shuffle"},
    {"spatial_dims": 2, "use_convtranspose": True, "downsample_factors": (3, (2, 4))},
    {"spatial_dims": 2, "downsample_kernel_size": 3, "downsample_factors": (4, 5)},
    {"spatial_dims": 2, "downsample_kernel_size": 7, "downsample_factors": ((1, 2), (2, 1)), "use_convtranspose": True},
    {"spatial_dims": 2, "downsample_kernel_size": 11, "initial_downsample_factor": 2, "downsample_factors": (2, 2)},
    {"spatial_dims": 2, "initial_downsample_factor": 8, "downsample_factors": (1, 1), "space_to_channel": True},
])
@pytest.mark.parametrize("longest", [0, -1])
def test_streaming_equals_a_single_pass_for_any_slab(flags, longest):
    network = random_network(**flags)
    sizes = [2 * factor for factor in network.factors]
    sizes[longest] = 7 * max(network.factors) * network.factors[longest] // network.factors[longest]
    sizes[longest] -= sizes[longest] % network.factors[longest]
    x = torch.randn(2, 1, *sizes)
    with torch.no_grad():
        mean, logvar = network.moments(x)
        decoded = network.decode(mean)
    for rows in (1, max(network.factors), 2 * max(network.factors) + 1, 1000):
        streamer = Streamer(network, "cpu", rows)
        for actual, expected in zip(streamer.moments(x), (mean, logvar)):
            torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5 * expected.abs().max().item())
        scale = decoded.abs().max().item()
        torch.testing.assert_close(streamer.decode(mean), decoded, rtol=1e-4, atol=1e-5 * scale)


def test_device_holds_one_slab_at_a_time(monkeypatch):
    network = random_network(spatial_dims=2, attention_levels=(False,) * 3, with_decoder_nonlocal_attn=False)
    lengths = []
    for module in network.modules():
        if isinstance(module, torch.nn.Conv2d):
            module.register_forward_pre_hook(lambda _, inputs: lengths.append(inputs[0].shape[2]))
    x = torch.randn(1, 1, 400, 8)
    with torch.no_grad():
        mean, _ = network.moments(x)
    lengths.clear()
    Streamer(network, "cpu", 16).moments(x)
    # 16 rows plus two at either end; strided convolutions add two strides.
    assert max(lengths[:-2]) <= 16 + 2 * 4 + 1 and len(lengths) > 100
    lengths.clear()
    Streamer(network, "cpu", 16).decode(mean)
    assert max(lengths[1:]) <= 16 + 2 * 4


class Stream:
    """Stand-in for a CUDA stream that records in `log` what it waits for and what happens on it."""

    current = None

    def __init__(self, name, log):
        self.name, self.log = name, log

    def wait_stream(self, other):
        self.log.append(f"{self.name} waits for {other.name}")

    @contextlib.contextmanager
    def active(self):
        before, Stream.current = Stream.current, self
        yield
        Stream.current = before


class Event:
    def record(self):
        self.stream = Stream.current

    def synchronize(self):
        self.stream.log.append(f"host waits for {self.stream.name}")


def test_slabs_are_copied_by_other_streams_while_one_is_processed(monkeypatch):
    network = random_network(spatial_dims=2, attention_levels=(False,) * 3, with_decoder_nonlocal_attn=False)
    log, x = [], torch.randn(1, 1, 96, 8)
    with torch.no_grad():
        expected = Streamer(network, "cpu", 16).moments(x)
    compute, *copying = (Stream(name, log) for name in ("compute", "upload", "download"))
    Stream.current, empty = compute, torch.empty
    monkeypatch.setattr(torch.cuda, "stream", Stream.active)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: Stream.current)
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.Tensor, "record_stream", lambda tensor, stream: log.append(f"kept for {stream.name}"))
    monkeypatch.setattr(torch, "empty", lambda *args, pin_memory=False, **kwargs: empty(*args, **kwargs))
    streamer = Streamer(network, "cpu", 16)
    streamer.copies._streams = copying
    for actual, value in zip(streamer.moments(x), expected):
        assert torch.equal(actual, value)
    # The first convolution: 6 slabs in, of which the host waits for one only after the next was processed.
    slab = ["compute waits for upload", "kept for compute", "download waits for compute", "kept for download"]
    assert log[:29] == slab + 5 * [*slab, "host waits for download"]


def test_statistics_keep_precision_at_large_means():
    network = random_network(spatial_dims=1, num_channels=(8,), attention_levels=(False,),
                             with_decoder_nonlocal_attn=False)
    x = torch.randn(1, 1, 4096) * 1e-2 + 100
    with torch.no_grad():
        expected, _ = network.moments(x)
    actual, _ = Streamer(network, "cpu", 64).moments(x)
    torch.testing.assert_close(actual, expected, rtol=1e-2, atol=1e-2 * expected.std().item())
