"""The U-Net that predicts the noise in an image, and the papers' nets: `model = UNet(**NETS["cifar10"])`.

    model(x_t, t) = eps      x_t (B, C, H, W), t (B,) int64 in 0 .. 999  ->  eps (B, C, H, W)
    model.classify(x_0)      logits (B, classes) from the encoder alone, of a net made with classes=N

The architecture is DDPM's (Ho et al., arXiv 2006.11239v2, Appendix B): residual blocks that are told the time,
attention at some resolutions, and a skip connection from each block of the way down to one of the way up. Parameters
have the names of diffusers' UNet2DModel, so that public weights load as they are.

    python unet.py      prints the resolution, parameters and cost of each net
"""

import math
from collections import OrderedDict
from functools import partial

import torch
import torch.nn.functional as F
import torchvision
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from torchvision.models.resnet import BasicBlock

# DEVIATION: the paper (arXiv 2311.14028, A.1.1) gives its Fashion-MNIST net "one layer" and "two residual blocks" per
# level, and attention at 8x8 and 4x4. The released code has one block on the way down, two on the way up, and
# attention at 4x4 alone. We follow the code, because it has the 42.9 M parameters that the paper counts: attention at
# both sizes would make 43.6 M, and with two blocks 63.1 M.

# DEVIATION: for CIFAR-10 the paper claims Ho et al.'s net "without any customization", but its released runs never
# pass those options on and train with diffusers' defaults: heads of width 8, symmetric padding, cosines first, eps
# 1e-5. The count is 35.7 M either way. "cifar10" follows the runs, which made the paper's tables; "ddpm-cifar10" is
# Ho et al.'s net as google/ddpm-cifar10-32 has it. Their dropout of 0.1 is in neither, nor in the released runs.
AS_RUN = dict(groups=32, eps=1e-5, head_width=8, padding=1, sin_first=False, shift=0)
AS_HO = dict(groups=32, eps=1e-6, head_width=256, padding=0, sin_first=True, shift=1)  # 256 channels, so one head
# 8 groups divide every width of the laptop nets, also 16 + 32 = 48, and each has two channels or more. With one channel
# GroupNorm would cancel the time, which a residual block adds to a channel as one number.
LAPTOP = dict(AS_RUN, groups=8, channels=(16, 32, 32), layers=1, attention=())
# DEVIATION: JDCL (arXiv 2411.08224) has attention at 32x32, 16x16 and 8x8 of ImageNet's 64x64, but its released code
# takes these sides for factors, and only 8x8 has it. "jdcl-imagenet100" follows the code.
JDCL = dict(AS_RUN, in_channels=3, layers=3, head_width=64, dropout=0.1, film=True, zero_init=True)
JDCL_LAPTOP = dict(JDCL, groups=8, channels=(16, 32, 32), layers=1, attention=(), head_width=8, dropout=0.0, hidden=128)

NETS = {
    "fashion-mnist": dict(AS_RUN, in_channels=1, channels=(64, 128, 256, 512), layers=1, attention=(3,)),
    "cifar10": dict(AS_RUN, in_channels=3, channels=(128, 256, 256, 256), layers=2, attention=(1,)),
    "ddpm-cifar10": dict(AS_HO, in_channels=3, channels=(128, 256, 256, 256), layers=2, attention=(1,)),
    "laptop": dict(LAPTOP, in_channels=1),
    "laptop-rgb": dict(LAPTOP, in_channels=3),
    "jdcl-cifar": dict(JDCL, channels=(128, 256, 256, 256), attention=(1, 2), hidden=1024),
    "jdcl-fashion-mnist": dict(JDCL, in_channels=1, channels=(128, 256, 256, 256), attention=(1, 2), hidden=1024),
    "jdcl-imagenet100": dict(JDCL, channels=(192, 384, 384, 384), attention=(3,), hidden=2048),
    "jdcl-laptop": dict(JDCL_LAPTOP, in_channels=1),
    "jdcl-laptop-rgb": dict(JDCL_LAPTOP),
}


def sinusoids(t, dim, sin_first, shift):
    """[cos(t f_k), sin(t f_k)] with f_k = 10000^(-k / (dim/2 - shift)), k = 0 .. dim/2 - 1; t (B,) -> (B, dim).

    The sinusoids of Vaswani et al. (arXiv 1706.03762v7, Section 3.5), all cosines before all sines, or after them if
    `sin_first`. An angle near 999 has a rounding error of 3e-5 in float32; f_k is computed in the very order in which
    diffusers does it, so that both make the same error.
    """
    k = torch.arange(dim // 2, dtype=torch.float32, device=t.device)
    f = torch.exp(-math.log(10000) * k / (dim // 2 - shift))
    angle = t[:, None].float() * f                                                  # (B,) -> (B, dim/2)
    pair = [angle.sin(), angle.cos()] if sin_first else [angle.cos(), angle.sin()]
    return torch.cat(pair, dim=1)                                                   # -> (B, dim)


class ResBlock(nn.Module):
    """s(x) + conv(SiLU(GN(conv(SiLU(GN(x))) + W SiLU(e)))); x (B, ci, H, W), e (B, 4 C0) -> (B, co, H, W).

    The skip s is the identity, or a 1x1 convolution where the width changes. With `film` the time scales and shifts
    what is normalised instead, GN(.) (1 + scale) + shift with [scale, shift] = W SiLU(e).
    """

    def __init__(self, ci, co, e_dim, norm, dropout, film):
        super().__init__()
        self.film = film
        self.norm1 = norm(ci)
        self.conv1 = nn.Conv2d(ci, co, 3, padding=1)
        self.time_emb_proj = nn.Linear(e_dim, 2 * co if film else co)
        self.norm2 = norm(co)
        self.dropout = nn.Dropout(dropout)
        self.conv2 = nn.Conv2d(co, co, 3, padding=1)
        self.conv_shortcut = nn.Conv2d(ci, co, 1) if ci != co else nn.Identity()

    def forward(self, x, e):
        h = self.conv1(F.silu(self.norm1(x)))                                       # (B, ci, H, W) -> (B, co, H, W)
        e = self.time_emb_proj(F.silu(e))[:, :, None, None]                         # -> (B, co or 2 co, 1, 1)
        if self.film:
            scale, shift = e.chunk(2, dim=1)
            h = self.norm2(h) * (1 + scale) + shift
        else:
            h = self.norm2(h + e)
        return self.conv_shortcut(x) + self.conv2(self.dropout(F.silu(h)))


class Attention(nn.Module):
    """x + W softmax(q k^T / sqrt(d)) v over all pixels, in heads of d channels; q, k, v are linear in GN(x)."""

    def __init__(self, c, head_width, norm):
        super().__init__()
        self.head_width = head_width
        self.group_norm = norm(c)
        self.to_q, self.to_k, self.to_v = nn.Linear(c, c), nn.Linear(c, c), nn.Linear(c, c)
        self.to_out = nn.Sequential(nn.Linear(c, c))  # a Sequential for diffusers' name, to_out.0

    def forward(self, x):
        y = self.group_norm(x).flatten(2).transpose(1, 2)                           # (B, C, H, W) -> (B, H*W, C)
        q, k, v = (linear(y).unflatten(2, (-1, self.head_width)).transpose(1, 2)    # -> (B, heads, H*W, d)
                   for linear in (self.to_q, self.to_k, self.to_v))
        y = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)      # -> (B, H*W, C)
        return x + self.to_out(y).transpose(1, 2).unflatten(2, x.shape[2:])         # -> (B, C, H, W)

    def _load_from_state_dict(self, state_dict, prefix, *args):
        """Accept the four names that these layers had in diffusers up to 0.16, and so in older files."""
        for old, new in {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}.items():
            for name in ("weight", "bias"):
                if f"{prefix}{old}.{name}" in state_dict:
                    state_dict[f"{prefix}{new}.{name}"] = state_dict.pop(f"{prefix}{old}.{name}")
        super()._load_from_state_dict(state_dict, prefix, *args)


def downsampler(c, padding):
    """3x3 convolution of stride 2; padding 1 is on all four sides, padding 0 means one pixel at right and bottom."""
    pad = nn.Identity() if padding else nn.ZeroPad2d((0, 1, 0, 1))
    return nn.Sequential(OrderedDict(pad=pad, conv=nn.Conv2d(c, c, 3, stride=2, padding=padding)))


def upsampler(c):
    """Each pixel becomes 2x2 equal ones, then a 3x3 convolution."""
    return nn.Sequential(OrderedDict(repeat=nn.Upsample(scale_factor=2), conv=nn.Conv2d(c, c, 3, padding=1)))


class UNet(nn.Module):
    """eps_theta(x_t, t): x_t (B, C, H, W), t (B,) int64 -> eps (B, C, H, W); H and W divisible by 2^(levels - 1).

    in_channels        C
    channels           width of each level; a level has half the side of the one before it
    layers             residual blocks of a level on the way down; there is one more on the way up
    attention          levels, from 0, with attention after every residual block; the middle has it always
    groups, eps        of every GroupNorm
    head_width         channels of one attention head
    padding            of the downsampling convolutions, 1 or 0, see downsampler
    sin_first, shift   of the time embedding, see sinusoids
    dropout, film      of the residual blocks, see ResBlock
    zero_init          whether the last layer of every block and of the net starts at zero, as with Ho et al.; all else
                       starts as PyTorch initialises it, as in the released runs
    hidden, classes    width and outputs of the classifier's head, a perceptron; classes=0 leaves it out
    """

    def __init__(self, in_channels, channels, layers, attention, groups, eps, head_width, padding, sin_first, shift,
                 dropout=0.0, film=False, zero_init=False, hidden=0, classes=0):
        super().__init__()
        C0, last = channels[0], len(channels) - 1
        self.in_channels = in_channels
        self.factor = 2**last                                                       # by which the sides shrink
        norm = partial(nn.GroupNorm, groups, eps=eps)
        resnet = partial(ResBlock, e_dim=4 * C0, norm=norm, dropout=dropout, film=film)
        attend = partial(Attention, head_width=head_width, norm=norm)

        def level(i, widths, **resample):
            """Level i: a residual block for each (ci, co), attention if the level has it, then the change of side."""
            resnets = [resnet(ci, co) for ci, co in widths]
            attentions = [attend(co) if i in attention else nn.Identity() for _, co in widths]
            lists = dict(resnets=resnets, attentions=attentions, **resample)
            return nn.ModuleDict({name: nn.ModuleList(modules) for name, modules in lists.items()})

        self.sinusoids = partial(sinusoids, dim=C0, sin_first=sin_first, shift=shift)
        self.time_embedding = nn.Sequential(OrderedDict(
            linear_1=nn.Linear(C0, 4 * C0), act=nn.SiLU(), linear_2=nn.Linear(4 * C0, 4 * C0)))
        self.conv_in = nn.Conv2d(in_channels, C0, 3, padding=1)

        self.down_blocks = nn.ModuleList()
        c, skips = C0, [C0]                                                         # width of h, widths of the skips
        for i, co in enumerate(channels):
            widths = [(c, co)] + [(co, co)] * (layers - 1)
            down = [downsampler(co, padding)] if i < last else []
            self.down_blocks.append(level(i, widths, downsamplers=down))
            skips += [co] * (layers + len(down))
            c = co

        self.mid_block = nn.ModuleDict(dict(
            resnets=nn.ModuleList([resnet(c, c), resnet(c, c)]), attentions=nn.ModuleList([attend(c)])))
        if classes:
            self.head = nn.Sequential(nn.Linear(sum(skips) + c, hidden), nn.LeakyReLU(0.2), nn.Dropout(0.1),
                                      nn.Linear(hidden, classes))

        self.up_blocks = nn.ModuleList()
        for i, co in reversed(list(enumerate(channels))):
            widths = [(ci + skips.pop(), co) for ci in [c] + [co] * layers]         # ResBlock sees h beside a skip
            self.up_blocks.append(level(i, widths, upsamplers=[upsampler(co)] if i > 0 else []))
            c = co

        self.conv_norm_out = norm(C0)
        self.conv_out = nn.Conv2d(C0, in_channels, 3, padding=1)
        if zero_init:
            for name, p in self.named_parameters():
                if {"conv2", "to_out", "conv_out"} & {*name.split(".")}:
                    nn.init.zeros_(p)

    def encode(self, x_t, t):
        """The way down and the middle: h (B, c, H/factor, W/factor), all skips in the order computed, e (B, 4 C0)."""
        assert x_t.ndim == 4 and x_t.shape[1] == self.in_channels, (
            f"x_t must be (B, {self.in_channels}, H, W), not {tuple(x_t.shape)}")
        assert x_t.shape[2] % self.factor == 0 and x_t.shape[3] % self.factor == 0, (
            f"the sides of x_t must be multiples of {self.factor}, not {tuple(x_t.shape[2:])}")
        assert t.shape == x_t.shape[:1], f"t must hold one time per image, ({len(x_t)},), not {tuple(t.shape)}"

        e = self.time_embedding(self.sinusoids(t).to(x_t.dtype))                    # (B,) -> (B, C0) -> (B, 4 C0)
        h = self.conv_in(x_t)                                                       # (B, C, H, W) -> (B, C0, H, W)
        skips = [h]
        for block in self.down_blocks:
            for resnet, attention in zip(block.resnets, block.attentions, strict=True):
                h = attention(resnet(h, e))
                skips.append(h)
            for downsample in block.downsamplers:
                h = downsample(h)
                skips.append(h)
        h = self.mid_block.attentions[0](self.mid_block.resnets[0](h, e))
        return self.mid_block.resnets[1](h, e), skips, e

    def features(self, x_0):
        """The means over all pixels of every map of the way down and of the middle, at t = 0: (B, sum of widths)."""
        h, skips, _ = self.encode(x_0, torch.zeros(len(x_0), dtype=torch.int64, device=x_0.device))
        return torch.cat([m.mean((2, 3)) for m in [*skips, h]], dim=1)

    def classify(self, x_0):
        """Logits (B, classes) of clean images (B, C, H, W), from the encoder alone (JDCL, arXiv 2411.08224)."""
        return self.head(self.features(x_0))

    def forward(self, x_t, t):
        h, skips, e = self.encode(x_t, t)
        for block in self.up_blocks:
            for resnet, attention in zip(block.resnets, block.attentions, strict=True):
                h = attention(resnet(torch.cat([h, skips.pop()], dim=1), e))
            for upsample in block.upsamplers:
                h = upsample(h)
        return self.conv_out(F.silu(self.conv_norm_out(h)))                         # (B, C0, H, W) -> (B, C, H, W)


def resnet18(channels, classes, width=64, imagenet=False):
    """torchvision's ResNet18, (B, channels, H, W) -> (B, classes): eval_fid.py's labeller, and a classifier for JDCL.

    It has a 3x3 stem, `width` channels at first, and no max pooling. `imagenet` is torchvision's own layout, with a 7x7
    stem for three channels, which ImageNet's weights fit.

    DEVIATION: the released code starts from ImageNet weights and their stem, which leaves one pixel of 32x32. The
    default needs no download and classifies better; `eval_fid.py --labeller imagenet` is the released one.
    """
    net = torchvision.models.resnet18()
    if not imagenet:
        net.inplanes, net.maxpool = width, nn.Identity()
        net.conv1, net.bn1 = nn.Conv2d(channels, width, 3, 1, 1, bias=False), nn.BatchNorm2d(width)
        for i, stride in enumerate((1, 2, 2, 2)):
            setattr(net, f"layer{i + 1}", net._make_layer(BasicBlock, width * 2**i, 2, stride))
        for conv in (m for m in net.modules() if isinstance(m, nn.Conv2d)):
            nn.init.kaiming_normal_(conv.weight, mode="fan_out", nonlinearity="relu")  # as torchvision does
    net.fc = nn.Linear(net.layer4[1].conv2.out_channels, classes)
    return net.to(memory_format=torch.channels_last)  # a fifth faster on a CPU


def why_unfit(name, channels, side):
    """Why the net of this name does not take images of so many channels and that side, or None if it does."""
    net = NETS[name]
    factor = 2 ** (len(net["channels"]) - 1)
    if net["in_channels"] != channels:
        return f"--unet {name} takes images of {net['in_channels']} channels, these have {channels}"
    if side % factor:
        return f"--image-size {side} must be a multiple of {factor} for --unet {name}"


def cost(name):
    """(side, parameters, FLOP of an image's forward pass) of a net without a head.

    2 FLOP per multiply-add, of convolutions and matrix products alone.
    """
    with torch.device("meta"), FlopCounterMode(display=False) as counter:
        model = UNet(**NETS[name])
        side = 64 if name == "jdcl-imagenet100" else 4 * model.factor               # the others' lowest level is 4x4
        model(torch.empty(1, model.in_channels, side, side), torch.zeros(1, dtype=torch.int64))
    return side, sum(p.numel() for p in model.parameters()), counter.get_total_flops()


if __name__ == "__main__":
    print(f"{'net':<20}{'resolution':>10}{'parameters':>14}{'GFLOP/image':>14}")
    for name in NETS:
        side, parameters, flop = cost(name)
        print(f"{name:<20}{f'{side}x{side}':>10}{parameters:>14,}{flop / 1e9:>14.2f}")
