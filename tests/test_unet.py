"""unet.py against diffusers' UNet2DModel with the same weights, and what holds for any denoiser."""

from functools import lru_cache

import pytest
import torch
from diffusers import UNet2DModel

from unet import NETS, UNet

# What `python unet.py` must print: side, parameters and GFLOP as the paper and the released runs have them.
TABLE = {
    "fashion-mnist": ("32x32", "42,855,873", "3.98"),
    "cifar10": ("32x32", "35,746,307", "12.44"),
    "ddpm-cifar10": ("32x32", "35,746,307", "12.44"),
    "laptop": ("16x16", "267,313", "0.03"),
    "laptop-rgb": ("16x16", "267,891", "0.03"),
}

# The same nets in diffusers' words. The first two leave all else at diffusers' defaults, as the released runs do.
CIFAR = dict(
    in_channels=3, out_channels=3, layers_per_block=2, block_out_channels=(128, 256, 256, 256),
    down_block_types=("DownBlock2D", "AttnDownBlock2D", "DownBlock2D", "DownBlock2D"),
    up_block_types=("UpBlock2D", "UpBlock2D", "AttnUpBlock2D", "UpBlock2D"))
PEERS = {
    "fashion-mnist": dict(
        in_channels=1, out_channels=1, layers_per_block=1, block_out_channels=(64, 128, 256, 512),
        down_block_types=("DownBlock2D", "DownBlock2D", "DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D", "UpBlock2D", "UpBlock2D")),
    "cifar10": CIFAR,
    "ddpm-cifar10": dict(CIFAR, attention_head_dim=None, downsample_padding=0, flip_sin_to_cos=False, freq_shift=1,
                         norm_eps=1e-6),
}


def inputs(name):
    """Two images of the net's size, at times 7 and 999."""
    channels, side = NETS[name]["in_channels"], 4 * 2 ** (len(NETS[name]["channels"]) - 1)
    return torch.randn(2, channels, side, side, generator=torch.Generator().manual_seed(1)), torch.tensor([7, 999])


@lru_cache(maxsize=None)
def peer(name):
    """diffusers' net with random weights, norms included, so that no parameter could be swapped or skipped unseen."""
    torch.manual_seed(0)
    model = UNet2DModel(**PEERS[name]).eval()
    with torch.no_grad():
        for p in model.parameters():
            if p.ndim == 1:
                p += 0.1 * torch.randn_like(p)
        x_t, t = inputs(name)
        return model, model(x_t, t).sample


def gap(name, state):
    model = UNet(**NETS[name]).eval()
    model.load_state_dict(state, strict=True)
    with torch.no_grad():
        return (model(*inputs(name)) - peer(name)[1]).abs().max().item()


@pytest.mark.parametrize("name", PEERS)
def test_names_and_output_are_those_of_diffusers(name):
    theirs, eps = peer(name)
    assert eps.std() > 0.1  # else a difference below 1e-5 would say little
    assert gap(name, theirs.state_dict()) < 1e-5


def test_old_attention_names_load():
    state, old = peer("cifar10")[0].state_dict(), {}
    for key, value in state.items():
        for new, name in (("to_q.", "query."), ("to_k.", "key."), ("to_v.", "value."), ("to_out.0.", "proj_attn.")):
            key = key.replace(new, name)
        old[key] = value
    keys = list(old)
    assert len(set(keys) - set(state)) == 6 * 8  # six attention blocks: two down, one in the middle, three up
    assert gap("cifar10", old) < 1e-5
    assert list(old) == keys  # the caller's dict is left alone


@pytest.mark.parametrize("name", NETS)
def test_every_parameter_gets_a_gradient(name):
    """In float64, where rounding leaves 1e-16 of what is zero by mathematics: the gradient of the keys' bias b, which
    adds the same q b to all scores of a query q. GroupNorm cancels no bias, as its groups hold two channels or more."""
    torch.manual_seed(0)
    model = UNet(**dict(NETS[name], zero_init=False)).double().eval()
    x_t, t = inputs(name)
    eps = model(x_t.double(), t)
    (eps * torch.randn_like(eps)).sum().backward()
    for key, p in model.named_parameters():
        if key.endswith("to_k.bias"):
            assert p.grad.abs().max() < 1e-12, key
        else:
            assert p.grad.abs().max() > 1e-4 and (p.grad != 0).all(), key


def test_counts_are_those_of_the_paper_and_settle_its_contradictions():
    def count(**options):
        with torch.device("meta"):
            return sum(p.numel() for p in UNet(**dict(NETS["fashion-mnist"], **options)).parameters())

    assert count(attention=(2, 3)) == 43_646_913  # the paper's 42.9 million are in TABLE
    assert count(attention=(2, 3), layers=2) == 63_148_929


def test_command_prints_the_table(script):
    done = script("unet.py")
    head, *rows = [line.split() for line in done.stdout.splitlines()]
    assert head[:4] == ["net", "resolution", "parameters", "GFLOP/image"]
    assert {row[0]: tuple(row[1:]) for row in rows if not row[0].startswith("jdcl")} == TABLE  # those: test_jdcl.py
    assert list(dict.fromkeys(row[0] for row in rows)) == list(NETS)


def test_any_side_that_halves_evenly_will_do():
    with torch.no_grad():
        assert UNet(**NETS["laptop"])(torch.zeros(1, 1, 8, 20), torch.tensor([5])).shape == (1, 1, 8, 20)


@pytest.mark.parametrize("shape, times, message", [
    ((2, 3, 16, 16), 2, r"x_t must be \(B, 1, H, W\), not \(2, 3, 16, 16\)"),
    ((1, 16, 16), 1, r"x_t must be \(B, 1, H, W\), not \(1, 16, 16\)"),
    ((2, 1, 16, 18), 2, r"the sides of x_t must be multiples of 4, not \(16, 18\)"),
    ((2, 1, 14, 16), 2, r"the sides of x_t must be multiples of 4, not \(14, 16\)"),
    ((2, 1, 16, 16), 1, r"t must hold one time per image, \(2,\), not \(1,\)"),
])
def test_wrong_input_is_told(shape, times, message):
    with pytest.raises(AssertionError, match=message):
        UNet(**NETS["laptop"])(torch.zeros(shape), torch.zeros(times, dtype=torch.int64))
