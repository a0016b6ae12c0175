"""data.py's views: every operation against PIL or torchvision with the same parameters, then how these are drawn.

    python -m pytest tests/test_augment.py
"""

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
    "TranslateX": lambda image, v, s: affine(image, 1, 0, s * int(0.03 * v * image.width), 0, 1, 0),
    "TranslateY": lambda image, v, s: affine(image, 1, 0, 0, 0, 1, s * int(0.03 * v * image.width)),
}
# PIL's AutoContrast multiplies in floats and so misses whole numbers, its blends do where a compiler fuses them
FLOATS = {"AutoContrast", "Brightness", "Color", "Contrast", "Sharpness"}


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


# ----------------------------------------------------------------------------- one operation

@pytest.mark.parametrize("channels, side", [(1, 16), (3, 16), (1, 28), (1, 32), (3, 32), (1, 64)])
def test_every_operation_is_pils(channels, side):
    images = pictures(channels, side)
    op, v, sign, n = torch.cartesian_prod(*map(torch.tensor, (range(14), range(1, 10), (-1, 1), range(9)))).T
    shuffle = torch.randperm(len(op), generator=torch.Generator().manual_seed(0))  # all operations in one batch
    op, v, sign, n = op[shuffle], v[shuffle], sign[shuffle], n[shuffle]
    results = data.augment(images[n], op, v, sign)
    assert results.dtype == torch.uint8 and results.shape == (2268, channels, side, side) and list(PEERS) == [*data.OPS]
    off, changed = dict.fromkeys(PEERS, 0), dict.fromkeys(PEERS, False)
    for image, result, i, strength, s in zip(images[n], results, op.tolist(), v.tolist(), sign.tolist()):
        name = data.OPS[i]
        error = result.int() - through_pil(image, PEERS[name], strength, s).int()
        assert error.abs().max() <= (name in FLOATS), (name, strength, s)
        off[name] += (error != 0).float().mean().item() / 162
        changed[name] |= not torch.equal(result, image)
    assert max(off.values()) < 0.01, off
    assert [name for name in PEERS if not changed[name]] == (["Color"] if channels == 1 else []) + ["Identity"]


def test_grey_images_know_no_color():
    images = pictures(1, 16)
    op, one = torch.full((9,), data.OPS.index("Color")), torch.ones(9, dtype=torch.int64)
    assert torch.equal(data.augment(images, op, one, one), images)


@pytest.mark.parametrize("channels, side", [(1, 16), (3, 32), (1, 28)])
def test_cutout_at_every_centre(channels, side):
    y, x = torch.cartesian_prod(torch.arange(side), torch.arange(side)).T
    images = torch.full((side**2, channels, side, side), 9, dtype=torch.uint8)
    results = data.cutout(images, y, x)
    for cy, cx, result in zip(y.tolist(), x.tolist(), results):
        top, left = max(0, cy - side // 4), max(0, cx - side // 4)
        expected = np.full((channels, side, side), 9)
        expected[:, top:min(side, top + side // 2), left:min(side, left + side // 2)] = 127
        assert np.array_equal(result, expected)
    area = (results[:, 0] == 127).sum((1, 2)).view(side, side)
    assert area[0, 0] == area[side // 2, side // 2] == (side // 2) ** 2  # moved inside at the top left, there whole
    assert area[-1, -1] == (side // 4 + 1) ** 2 and (images == 9).all()  # cut at the bottom right


# ----------------------------------------------------------------------------- the strong view

@pytest.fixture
def recorded(monkeypatch):
    """Calls of data.augment and data.cutout, as (name, images, arguments, result)."""
    calls = []
    for name, function in (("augment", data.augment), ("cutout", data.cutout)):
        def record(u8, *arguments, name=name, function=function):
            calls.append((name, u8, arguments, function(u8, *arguments)))
            return calls[-1][3]
        monkeypatch.setattr(data, name, record)
    return calls


def test_strong_view_is_weak_view_two_operations_and_cutout(recorded):
    images = pictures(3, 16).repeat(3, 1, 1, 1)
    result, weak = seeded(data.strong_view, images, True), seeded(data.weak_view, images, True)
    assert [call[0] for call in recorded] == ["augment", "augment", "cutout"]
    for (_, images, _, _), before in zip(recorded, [weak, recorded[0][3], recorded[1][3]]):
        assert torch.equal(images, before)
    assert torch.equal(result, recorded[2][3])
    assert all(len(argument) == 27 for call in recorded for argument in call[2])


def test_strong_view_draws_as_fixmatch(monkeypatch):
    drawn, side, n = [], 8, 30000
    for name in ("augment", "cutout"):
        monkeypatch.setattr(data, name, lambda u8, *arguments: drawn.append(arguments) or u8)
    seeded(data.strong_view, torch.zeros(n, 1, side, side, dtype=torch.uint8), True)
    (op1, v1, sign1), (op2, v2, sign2), (y, x) = drawn
    expected = torch.full((14,), 0.5 / 14)
    expected[data.OPS.index("Identity")] += 0.5
    for op, v, sign in (op1, v1, sign1), (op2, v2, sign2):
        cells = (op * 9 + v - 1) * 2 + (sign + 1) // 2
        uniform(cells.bincount(minlength=252), (expected * n / 18).repeat_interleave(18))
        assert set(v.tolist()) == set(range(1, 10)) and set(sign.tolist()) == {-1, 1}
    uniform((op1 * 14 + op2).bincount(minlength=196), n * expected[:, None] * expected)  # the two are independent
    uniform((v1 * 9 + v2 - 10).bincount(minlength=81))
    uniform((y * side + x).bincount(minlength=side**2))
    uniform((v2 * side + y - side).bincount(minlength=9 * side))


def test_every_strong_view_has_a_grey_square():
    for side in (16, 32):
        results = seeded(data.strong_view, torch.zeros(500, 1, side, side, dtype=torch.uint8), False)
        assert ((results == 127).sum((1, 2, 3)) >= (side // 4 + 1) ** 2).all()


# ----------------------------------------------------------------------------- the weak view

@pytest.mark.parametrize("channels, side, flip", [(1, 16, True), (3, 32, True), (1, 16, False)])
def test_weak_view_is_any_window_of_the_reflected_image(channels, side, flip):
    pad, image = side // 8, pictures(channels, side)[0].numpy()
    windows = []
    for turned in (image, image[:, :, ::-1])[:1 + flip]:
        wide = np.pad(turned, ((0, 0), (pad, pad), (pad, pad)), mode="reflect")
        windows += [wide[:, i:i + side, j:j + side].tobytes() for i in range(2 * pad + 1) for j in range(2 * pad + 1)]
    number = {window: k for k, window in enumerate(windows)}
    images = torch.from_numpy(image).repeat(20 * len(windows), 1, 1, 1)
    found = [number[result.numpy().tobytes()] for result in seeded(data.weak_view, images, flip)]
    assert len(number) == (1 + flip) * (2 * pad + 1) ** 2 == len(set(found))
    uniform(np.bincount(found, minlength=len(number)))


def test_weak_view_keeps_images_apart():
    images = torch.arange(200, dtype=torch.uint8)[:, None, None, None].repeat(1, 3, 16, 16)
    assert torch.equal(seeded(data.weak_view, images, True), images)


# ----------------------------------------------------------------------------- the diffusion view

@pytest.mark.parametrize("channels, side", [(1, 16), (3, 32)])
def test_enlarge_is_torchvisions_resized_crop(channels, side):
    g = torch.Generator().manual_seed(1)
    size = torch.randint(1, side + 1, (2, 300), generator=g)
    corner = (torch.rand(2, 300, generator=g) * (side - size + 1)).floor().long()
    images = pictures(channels, side)[torch.arange(300) % 9]
    results = data.enlarge(images, corner, size)
    for image, result, (top, left), (h, w) in zip(images, results, corner.T.tolist(), size.T.tolist()):
        peer = tv.resized_crop(image, top, left, h, w, [side, side]).int()  # rounds rows, then columns
        assert (result.int() - peer).abs().max() <= 1, (top, left, h, w)
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
    fitted = (h < side) | (w < side)
    margin = (side + 1) ** 2 / side**2 if smallest > 0.5 else 1.2  # rounding of the sides moves area and ratio
    assert (h * w)[fitted].min() >= smallest * side**2 / margin
    assert (w / h).max() < 4 / 3 * 1.1 and (w / h).min() > 3 / 4 / 1.1 and (w / h).max() > 1.2
    assert not torch.equal(top, left) and not torch.equal(h, w)


def test_diffusion_view_flips_half_the_images_and_no_more():
    images = pictures(3, 16)[:1].repeat(2000, 1, 1, 1)
    assert torch.equal(seeded(data.diffusion_view, images, False, 1), images)
    results = seeded(data.diffusion_view, images, True, 1.0)
    kept, turned = ((results == peer).flatten(1).all(1) for peer in (images, images.flip(3)))
    assert (kept ^ turned).all() and 920 < kept.sum() < 1080
    ramp = torch.arange(16, dtype=torch.uint8).repeat(2000, 1, 16, 1)
    for flip in (True, False):
        falling = seeded(data.diffusion_view, ramp, flip, 0.5)[:, 0, 0].int().diff().sum(1) < 0
        assert 920 < falling.sum() < 1080 if flip else not falling.any()


# ----------------------------------------------------------------------------- all views

VIEWS = {"diffusion": lambda u8: data.diffusion_view(u8, True, 0.6), "weak": lambda u8: data.weak_view(u8, True),
         "strong": lambda u8: data.strong_view(u8, True)}
every_view = pytest.mark.parametrize("view", VIEWS.values(), ids=VIEWS)


@every_view
@pytest.mark.parametrize("channels, side", [(1, 16), (3, 32)])
def test_views_are_uint8_follow_the_seed_and_leave_their_input(view, channels, side):
    images = pictures(channels, side)
    before, results = images.clone(), seeded(view, images)
    assert results.dtype == torch.uint8 and results.shape == images.shape and torch.equal(images, before)
    assert torch.equal(results, seeded(view, images)) and not torch.equal(results, seeded(view, images, seed=1))
    assert not torch.equal(results, view(images))
    apart = images.contiguous(memory_format=torch.channels_last)
    assert torch.equal(results, seeded(view, apart)) and torch.equal(results, seeded(view, images.mT.contiguous().mT))
    assert view(images[:1]).shape == (1, channels, side, side)


@every_view
def test_views_differ_between_the_images_of_a_batch(view):
    results = seeded(view, pictures(3, 32)[:1].repeat(100, 1, 1, 1))
    assert len(results.flatten(1).unique(dim=0)) > 60  # of weak ones there are 162


@every_view
def test_views_never_ask_for_a_value(view):
    """Tensors of the meta device have no values: a branch on one, or a tensor left on another device, is an error."""
    assert view(torch.empty(5, 3, 32, 32, dtype=torch.uint8, device="meta")).shape == (5, 3, 32, 32)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@every_view
def test_views_on_a_gpu_wait_for_nothing(view):
    images = pictures(3, 32).cuda()
    view(images)
    torch.cuda.set_sync_debug_mode("error")
    try:
        results = view(images)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert results.device == images.device and results.shape == images.shape


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_operations_on_a_gpu_are_those_of_the_cpu():
    op, v, sign, n = torch.cartesian_prod(*map(torch.tensor, (range(14), range(1, 10), (-1, 1), range(9)))).T
    images = pictures(3, 32)[n]
    error = data.augment(images.cuda(), op.cuda(), v.cuda(), sign.cuda()).cpu().int() - data.augment(
        images, op, v, sign).int()
    assert error.abs().max() <= 1 and (error != 0).float().mean() < 0.01  # a blend may end on either side of a level
