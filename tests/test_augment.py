"""data.py's views: every operation against PIL or torchvision with the same parameters, then how these are drawn."""

import numpy as np
import pytest
import torch
from PIL import Image, ImageEnhance, ImageOps
from torchvision.transforms import RandomResizedCrop
from torchvision.transforms.v2 import functional as tv

import data

PEERS = {  # an operation on a PIL image with strength v and sign s, written from FixMatch's description
    "AutoContrast": lambda image, v, s: ImageOps.autocontrast(image),
    "Brightness": lambda image, v, s: ImageEnhance.Brightness(image).enhance(0.05 + 0.09 * v),
    "Color": lambda image, v, s: ImageEnhance.Color(image).enhance(0.05 + 0.09 * v),
    "Contrast": lambda image, v, s: ImageEnhance.Contrast(image).enhance(0.05 + 0.09 * v),
    "Equalize": lambda image, v, s: ImageOps.equalize(image),
    "Identity": lambda image, v, s: image,
    "Posterize": lambda image, v, s: ImageOps.posterize(image, 4 + int(0.4 * v)),
    "Rotate": lambda image, v, s: image.rotate(s * int(3 * v)),
    "Sharpness": lambda image, v, s: ImageEnhance.Sharpness(image).enhance(0.05 + 0.09 * v),
    "ShearX": lambda image, v, s: affine(image, 1, s * 0.03 * v, 0, 0, 1, 0),
    "ShearY": lambda image, v, s: affine(image, 1, 0, 0, s * 0.03 * v, 1, 0),
    "Solarize": lambda image, v, s: ImageOps.solarize(image, 256 - int(25.6 * v)),
    "TranslateX": lambda image, v, s: affine(image, 1, 0, -s * int(0.03 * v * image.width), 0, 1, 0),
    "TranslateY": lambda image, v, s: affine(image, 1, 0, 0, 0, 1, -s * int(0.03 * v * image.width)),
}


def affine(image, *matrix):
    return image.transform(image.size, Image.Transform.AFFINE, matrix, Image.Resampling.NEAREST)


def pictures(channels, side):
    """u8 (9, channels, side, side): noise, ramps, few levels, a narrow range of levels, a flat and a black image."""
    g = torch.Generator().manual_seed(side)
    noise = torch.rand(4, channels, side, side, generator=g)
    ramp = torch.linspace(0, 1, side).expand(1, channels, side, side)
    tilt = (ramp + ramp.mT * torch.tensor([0.5, 0.2, 0.9])[:channels, None, None]) / 2
    flat = torch.full_like(ramp, 0.3)
    images = torch.cat([noise[:2], noise[2:3] ** 4, noise[3:].mul(7).floor() / 7, ramp, tilt, 0.4 + 0.2 * tilt, flat,
                        torch.zeros_like(ramp)])
    return (images * 255.99).to(torch.uint8)


def through_pil(image, function, *arguments):
    """A PIL function on a uint8 tensor (C, side, side), as mode L or RGB."""
    array = image.permute(1, 2, 0).numpy()
    result = np.asarray(function(Image.fromarray(array[..., 0] if len(image) == 1 else array), *arguments))
    return torch.from_numpy(result.copy()).view(*image.shape[1:], len(image)).permute(2, 0, 1)


def seeded(function, *arguments, seed=0):
    torch.manual_seed(seed)
    return function(*arguments)


def uniform(counts, expected=None):
    """Pearson's chi-square of counts stays below its mean + 4 standard deviations."""
    counts = torch.as_tensor(counts).double().flatten()
    expected = counts.mean() if expected is None else torch.as_tensor(expected).double().flatten()
    freedom = len(counts) - 1
    assert ((counts - expected) ** 2 / expected).sum() < freedom + 4 * (2 * freedom) ** 0.5


def apart(a, b):
    """The Kolmogorov-Smirnov distance of two samples, in units of its 1 % bound."""
    a, b = a.sort().values.double(), b.sort().values.double()
    at = torch.cat([a, b])
    gap = torch.searchsorted(a, at, right=True) / len(a) - torch.searchsorted(b, at, right=True) / len(b)
    return gap.abs().max() / (1.63 * (1 / len(a) + 1 / len(b)) ** 0.5)


# ----------------------------------------------------------------------------- the strong view

@pytest.mark.parametrize("channels, side", [(1, 16), (3, 32), (1, 28), (1, 64)])
@pytest.mark.parametrize("name", PEERS)
def test_every_operation_is_pils(name, channels, side):
    images, errors, changed = pictures(channels, side), [], False
    for v, s in [(v, s) for v in range(1, 10) for s in (-1, 1)]:
        results = data.OPS[name](images, v, s)
        assert results.dtype == torch.uint8 and results.shape == images.shape
        errors += [(ours.int() - through_pil(image, PEERS[name], v, s).int()).abs()
                   for image, ours in zip(images, results)]
        changed |= not torch.equal(results, images)
    errors = torch.stack(errors)
    if name.startswith("Shear") or name == "Rotate":  # now and then a place between two pixels is rounded otherwise
        assert (errors > 0).float().mean() < 0.01
    else:  # torchvision rounds greys and means otherwise
        assert errors.max() <= {"AutoContrast": 1, "Color": 1, "Contrast": 2, "Sharpness": 1}.get(name, 0)
    assert changed == (name != "Identity" and (name, channels) != ("Color", 1)) and list(PEERS) == list(data.OPS)


def test_strong_view_draws_as_fixmatch(monkeypatch):
    n, calls = 28000, []
    for op, name in enumerate(data.OPS):
        def record(u8, v, sign, op=op):
            number = u8[:, 0, 0, 0].int() * 256 + u8[:, 1, 0, 0]
            calls.append((op, v, sign, number))
            return u8
        monkeypatch.setitem(data.OPS, name, record)
    number = torch.arange(n)[:, None, None]
    images = torch.stack([number // 256, number % 256, 0 * number], 1).to(torch.uint8).repeat(1, 1, 8, 8)
    seeded(data.strong_view, images, True)
    chosen = torch.full((2, n), 14)  # of each image its first and its second operation; 14 is none
    for k, (op, _, _, numbers) in enumerate(calls):
        chosen[k // 14, numbers.long()] = op
    expected = torch.tensor([0.5 / 14] * 14 + [0.5])
    uniform((chosen[0] * 15 + chosen[1]).bincount(minlength=225), n * expected[:, None] * expected)  # independent
    calls.clear()
    for seed in range(200):
        seeded(data.strong_view, images[:64], True, seed=seed)
    ops, v, sign = torch.tensor([call[:3] for call in calls]).T
    uniform(((v - 1) * 2 + (sign + 1) // 2).bincount(minlength=18))
    uniform(ops.bincount(minlength=14))


@pytest.mark.parametrize("channels, side", [(1, 16), (3, 32), (1, 28), (1, 64)])
def test_every_strong_view_has_a_grey_square(channels, side):
    width, n = min(16, side // 2), 40 * side**2 // 16
    black = torch.zeros(n, channels, side, side, dtype=torch.uint8)  # which every operation leaves black
    results = torch.cat([seeded(data.strong_view, part, True, seed=i) for i, part in enumerate(black.split(2000))])
    squares = {}
    for y in range(side):
        for x in range(side):
            top, left = max(0, y - width // 2), max(0, x - width // 2)
            square = np.zeros((channels, side, side), np.uint8)
            square[:, top:top + width, left:left + width] = 127
            squares[square.tobytes()] = squares.get(square.tobytes(), 0) + 1  # moved inside, several are the same
    found = dict.fromkeys(squares, 0)
    for result in results.numpy():
        found[result.tobytes()] += 1
    uniform(list(found.values()), torch.tensor(list(squares.values())) * n / side**2)


# ----------------------------------------------------------------------------- the weak view

@pytest.mark.parametrize("channels, side, flip", [(1, 16, True), (3, 64, True), (1, 16, False)])
def test_weak_view_is_any_window_of_the_reflected_image(channels, side, flip):
    pad, image = {16: 2, 64: 4}[side], pictures(channels, side)[0].numpy()
    windows = []
    for turned in (image, image[:, :, ::-1])[:1 + flip]:
        wide = np.pad(turned, ((0, 0), (pad, pad), (pad, pad)), mode="reflect")
        windows += [wide[:, i:i + side, j:j + side].tobytes() for i in range(2 * pad + 1) for j in range(2 * pad + 1)]
    number = {window: k for k, window in enumerate(windows)}
    images = torch.from_numpy(image).repeat(20 * len(windows), 1, 1, 1)
    found = [number[result.numpy().tobytes()] for result in seeded(data.weak_view, images, flip)]
    assert len(number) == (1 + flip) * (2 * pad + 1) ** 2 == len(set(found))
    uniform(np.bincount(found, minlength=len(number)))


# ----------------------------------------------------------------------------- the diffusion view

@pytest.mark.parametrize("channels, side", [(1, 16), (3, 32)])
def test_enlarge_is_torchvisions_resized_crop(channels, side):
    g = torch.Generator().manual_seed(1)
    size = torch.randint(1, side + 1, (2, 300), generator=g)
    corner = (torch.rand(2, 300, generator=g) * (side - size + 1)).floor().long()
    images = pictures(channels, side)[torch.arange(300) % 9]
    results = data.enlarge(images, corner, size)
    for image, result, (top, left), (h, w) in zip(images, results, corner.T.tolist(), size.T.tolist()):
        peer = tv.resized_crop(image.float(), top, left, h, w, [side, side])
        assert (result - peer).abs().max() <= 0.501, (top, left, h, w)
    whole = torch.full((2, 9), side)
    assert torch.equal(data.enlarge(images[:9], torch.zeros(2, 9), whole), images[:9])


@pytest.mark.parametrize("smallest, side", [(0.08, 32), (0.8, 16)])
def test_diffusion_view_draws_as_torchvision(monkeypatch, smallest, side):
    crops = []
    monkeypatch.setattr(data, "enlarge", lambda u8, corner, size: crops.append([*corner, *size]) or u8)
    images = torch.zeros(20000, 1, side, side, dtype=torch.uint8)
    seeded(data.diffusion_view, images, False, smallest)
    (top, left, h, w), = crops
    peer = [RandomResizedCrop.get_params(images[0], (smallest, 1.0), (3 / 4, 4 / 3)) for _ in range(4000)]
    peer_top, peer_left, peer_h, peer_w = torch.tensor(peer).T
    for ours, theirs in ((top, peer_top), (left, peer_left), (h, peer_h), (w, peer_w), (h * w, peer_h * peer_w),
                         (w / h, peer_w / peer_h), (top - left, peer_top - peer_left)):
        assert apart(ours, theirs) < 1
    assert (top >= 0).all() and (left >= 0).all() and (top + h <= side).all() and (left + w <= side).all()
    assert not torch.equal(top, left) and not torch.equal(h, w)


def test_diffusion_view_flips_half_the_images():
    ramp = torch.arange(16, dtype=torch.uint8).repeat(2000, 1, 16, 1)
    assert torch.equal(seeded(data.diffusion_view, ramp, False, 1), ramp)
    for flip, smallest in (True, 0.5), (True, 1), (False, 0.5):
        falling = seeded(data.diffusion_view, ramp, flip, smallest)[:, 0, 0].int().diff().sum(1) < 0
        assert 920 < falling.sum() < 1080 if flip else not falling.any()


# ----------------------------------------------------------------------------- all views

VIEWS = {"diffusion": lambda u8: data.diffusion_view(u8, True, 0.6), "weak": lambda u8: data.weak_view(u8, True),
         "strong": lambda u8: data.strong_view(u8, True)}


@pytest.mark.parametrize("view", VIEWS.values(), ids=VIEWS)
@pytest.mark.parametrize("channels, side", [(1, 16), (3, 32)])
def test_views_are_uint8_follow_the_seed_and_leave_their_input(view, channels, side):
    images = pictures(channels, side)
    before, results = images.clone(), seeded(view, images)
    assert results.dtype == torch.uint8 and results.shape == images.shape and torch.equal(images, before)
    assert torch.equal(results, seeded(view, images)) and not torch.equal(results, seeded(view, images, seed=1))
    assert torch.equal(results, seeded(view, images.contiguous(memory_format=torch.channels_last)))
    assert view(images[:1]).shape == (1, channels, side, side)
    same = seeded(view, images[:1].repeat(100, 1, 1, 1))
    assert len(same.flatten(1).unique(dim=0)) > 40  # each image is varied by itself


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@pytest.mark.parametrize("view", VIEWS.values(), ids=VIEWS)
def test_views_on_cuda(view):
    results = view(pictures(3, 32).cuda())
    assert results.is_cuda and results.dtype == torch.uint8 and results.shape == (9, 3, 32, 32)
