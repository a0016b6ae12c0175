"""train_jdcl.py and the nets of unet.py that classify: losses by hand, replay by stubs, whole runs, killed and resumed.

    python -m pytest tests/test_jdcl.py
"""

import copy
import functools
import json
import math
import multiprocessing
import os
import re
import signal
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn
from torch.testing import assert_close

import data
import run
import train_jdcl
from ddim import T, alpha_bar, q_sample, reseed, sample
from unet import NETS, Attention, ResBlock, UNet, cost, resnet18

# Runs in this process have a smaller net and dataset. Tasks of one class are learned at once, so that the very first
# images drawn are of it; 9 images make a batch of which 4 are old, so that both forms of distillation differ.
SMALL = dict(NETS["jdcl-laptop"], channels=(8, 16), groups=4, hidden=32)
LIKE_CIFAR = dict(NETS["jdcl-cifar"], channels=(8, 16, 16, 16), groups=4, head_width=8, hidden=32)
TINY = ("--dataset shapes --scale laptop --device cpu --class-order 0|4 --batch-size 9 --local-iterations 6 --alpha 1 "
        "--lr 0.005 --sample-steps 2 --eval-every 4").split()
REPLAY = "--replay-per-class 150 --replay-steps 2 --replay-cap 1000".split()
STAGE_2 = "--global-iterations 6 --classifier-start 2".split()
CLOCK = {"ms_per_update", "images_per_s", "peak_memory_mb", "seconds"}  # what a machine decides
ABAR = alpha_bar("jdcl")
shapes = functools.cache(functools.partial(data.load_images, "shapes"))


def few_shapes(dataset, split, data_dir, side):
    """60 shapes of each class to train with, 20 to test."""
    n = {"train": 600, "test": 200}[split]
    return tuple(x[:n].clone() for x in shapes(split, data_dir, side))


def learn(folder, *flags, load=few_shapes, **notes):
    """main in this process, in a second; notes[name](...) sees the arguments of each call of train_jdcl.<name>."""
    def tapped(function, note):
        def call(*args, **kwargs):
            note(*args, **kwargs)
            return function(*args, **kwargs)
        return call

    two_stages = [] if "--replay" in flags else REPLAY if "--one-stage" in flags else REPLAY + STAGE_2
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(NETS, "jdcl-laptop", SMALL)
        patch.setattr(data, "load_images", load)
        for name, note in notes.items():
            patch.setattr(train_jdcl, name, tapped(getattr(train_jdcl, name), note))
        try:
            train_jdcl.main([*TINY, *two_stages, *flags, "--out", str(folder)])
        finally:
            while run.locks:
                run.locks.pop().release()
            for number, handler in handlers.items():
                signal.signal(number, handler)
    return folder


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """finished("--no-kd") is the folder of a run with these flags that nothing disturbed."""
    return functools.cache(lambda *flags: learn(tmp_path_factory.mktemp("finished") / "run", *flags))


def read(folder, name):
    return json.loads((folder / name).read_text(encoding="utf-8"))


def records(folder, k=None):
    """The records of a run, or of its task k, without what the machine decides."""
    lines = map(json.loads, (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines())
    return [{key: r[key] for key in r if key not in CLOCK} for r in lines if k in (None, r["task"])]


def saved(folder, name):
    return torch.load(folder / f"{name}.pt", weights_only=True)


def same(a, b):
    return list(a) == list(b) and all(torch.equal(a[key], b[key]) for key in a)


def random_net(name=1, **options):
    """A net without a zero in it, so that no layer could be left out unseen."""
    reseed("net", name)
    model = UNet(**dict(SMALL, **options))
    with torch.no_grad():
        for p in model.parameters():
            p += 0.1 * torch.randn_like(p)
    return model.eval()


def close(a, b, **tolerance):
    assert_close(torch.as_tensor(a).double(), torch.as_tensor(b).double(), **(tolerance or dict(rtol=1e-5, atol=1e-6)))


# ------------------------------------------------------------------------------------------ nets that classify

def maps_of(model, x, t):
    """The maps of the way down and of the middle as hooks see them in a full pass, in the order of their making."""
    maps, note = [], lambda module, inputs, output: maps.append(output)
    down = [module for block in model.down_blocks for module in (*block.attentions, *block.downsamplers)]
    hooks = [m.register_forward_hook(note) for m in (model.conv_in, *down, model.mid_block.resnets[1])]
    model(x, t)
    for hook in hooks:
        hook.remove()
    return maps


@pytest.mark.parametrize("name, classes, side, parameters, head, gflop", [
    ("jdcl-cifar", 10, 32, 52_542_979, 3_812_362, [16.77, 5.05]), ("jdcl-cifar", 100, 32, 52_542_979, 3_904_612, None),
    ("jdcl-imagenet100", 100, 64, 114_003_459, 11_610_212, None)])
def test_the_papers_counts_maps_and_cost(name, classes, side, parameters, head, gflop):
    with torch.device("meta"):
        model = UNet(**NETS[name], classes=classes)
        maps = maps_of(model, torch.empty(1, 3, side, side), torch.zeros(1, dtype=torch.int64))
    assert sum(p.numel() for p in model.parameters()) == parameters + head
    assert {m.dropout.p for m in model.modules() if isinstance(m, ResBlock)} == {0.1}
    width = NETS[name]["channels"][0]
    wide = 2 * width
    assert [m.shape[1:3] for m in maps] == [
        *[(width, side)] * 4, (width, side // 2), *[(wide, side // 2)] * 3, (wide, side // 4), *[(wide, side // 4)] * 3,
        (wide, side // 8), *[(wide, side // 8)] * 4]  # of the last four three are of the way down, one of the middle
    assert model.head[0].in_features == 29 * width  # 3712, 5568
    if gflop:
        about = cost(name, classes)
        assert about[:3] == (side, parameters, head) and [round(flop / 1e9, 2) for flop in about[3:]] == gflop


@pytest.mark.parametrize("net", [LIKE_CIFAR, SMALL])
def test_logits_are_those_of_the_pooled_maps_of_a_full_pass_at_time_0(net):
    model, x = random_net(**dict(net, classes=10)), torch.randn(3, net["in_channels"], 16, 16)
    with torch.no_grad():
        first, later = (torch.cat([m.mean((2, 3)) for m in maps_of(model, x, torch.full((3,), t))], 1) for t in (0, 1))
        features, logits = model.features(x), model.classify(x)
        assert torch.equal(features, first) and not torch.equal(features, later)
    w = [p for layer in (model.head[0], model.head[-1]) for p in (layer.weight, layer.bias)]
    hidden = features @ w[0].T + w[1]
    close(logits, torch.where(hidden > 0, hidden, 0.2 * hidden) @ w[2].T + w[3])
    assert logits.shape == (3, 10) and model.train() and not torch.equal(model.classify(x), logits), "dropout"
    names = [set(UNet(**dict(net, **more)).state_dict()) for more in ({}, dict(classes=10))]
    assert {name.split(".")[0] for name in names[1] - names[0]} == {"head"}, "without classes there is none"


def test_every_block_starts_as_the_identity_or_its_shortcut():
    model = UNet(**LIKE_CIFAR, classes=10)
    e, blocks = torch.randn(2, 32), [m for m in model.modules() if isinstance(m, (ResBlock, Attention))]
    kinds = {"identity": 0, "shortcut": 0, "attention": 0}
    for block in blocks:
        if isinstance(block, Attention):
            x = torch.randn(2, block.to_q.in_features, 4, 4)
            assert torch.equal(block(x), x)
            kinds["attention"] += 1
        else:
            x = torch.randn(2, block.conv1.in_channels, 4, 4)
            assert torch.equal(block(x, e), block.conv_shortcut(x))
            kinds["identity" if torch.equal(block.conv_shortcut(x), x) else "shortcut"] += 1
    # 12 residual blocks on the way down, of which one changes the width, 2 in the middle; the 16 on the way up all do
    assert kinds == {"identity": 11 + 2, "shortcut": 1 + 16, "attention": 2 * 3 + 1 + 2 * 4}
    assert not model(torch.randn(2, 3, 16, 16), torch.tensor([0, 999])).any(), "and the net as zero"


def test_film_and_dropout_by_hand():
    """s(x) + conv2(dropout(SiLU(GN(conv1(SiLU(GN(x)))) (1 + scale) + shift))), [scale, shift] = W SiLU(e) + b."""
    reseed("film")
    norm = functools.partial(nn.GroupNorm, 2, eps=1e-5)
    block = ResBlock(4, 6, 5, norm, dropout=0.3, film=True, zero_init=nn.Identity())
    for p in block.parameters():
        nn.init.normal_(p)
    x, e = torch.randn(3, 4, 8, 8), torch.randn(3, 5)

    h = F.silu(F.group_norm(x, 2, block.norm1.weight, block.norm1.bias))
    h = F.conv2d(h, block.conv1.weight, block.conv1.bias, padding=1)
    scale, shift = (F.silu(e) @ block.time_emb_proj.weight.T + block.time_emb_proj.bias)[..., None, None].split(6, 1)
    h = F.silu(F.group_norm(h, 2, block.norm2.weight, block.norm2.bias) * (1 + scale) + shift)
    shortcut = F.conv2d(x, block.conv_shortcut.weight, block.conv_shortcut.bias)
    reseed("dropout")
    kept = F.dropout(torch.ones_like(h), 0.3) * h  # 0, or 1 / 0.7 of it
    for training, inside in ((True, kept), (False, h)):
        reseed("dropout")
        out = block.train(training)(x, e)
        assert_close(out, shortcut + F.conv2d(inside, block.conv2.weight, block.conv2.bias, padding=1), rtol=0,
                     atol=1e-3)
    assert out.std() > 10


# ---------------------------------------------------------------------------------------------- moving average

@pytest.mark.parametrize("n, d", [(1, 2 / 11), (8, 0.5), (990, 0.991), (10**6, 0.9999)])
def test_ema_after_update_n(n, d):
    reseed("ema")
    ema, model = nn.Linear(5, 4), nn.Linear(5, 4)
    expected = [d * a.double() + (1 - d) * b.double() for a, b in zip(ema.parameters(), model.parameters())]
    before = copy.deepcopy(model.state_dict())
    train_jdcl.update_ema(ema, model, n)
    for a, b in zip(ema.parameters(), expected):
        assert_close(a.double(), b, rtol=0, atol=1e-6 if n < 1000 else 3e-8)  # 1e-4 of a step is to be seen
    assert same(model.state_dict(), before)


@pytest.mark.parametrize("scale, width", [("laptop", 16), ("small", 16), ("paper", 64)])
def test_the_separate_classifier_and_the_average_of_its_batch_norms(scale, width):
    args = train_jdcl.get_args(["--dataset", "shapes", "--scale", scale, "--separate", "--unet", "jdcl-laptop"])
    model = train_jdcl.build(args)
    assert model.head[0].conv1.out_channels == width
    ema = copy.deepcopy(model).eval().requires_grad_(False)
    model.classify(torch.randn(4, 1, 16, 16))
    train_jdcl.update_ema(ema, model, 5)
    buffers = [name for name, _ in model.named_buffers()]
    assert len(buffers) == 3 * 20 and all(torch.equal(a, b) for a, b in zip(ema.buffers(), model.buffers()))
    assert model.head[0].bn1.num_batches_tracked == 1 and model.head[0].bn1.running_mean.abs().sum() > 0


def test_a_run_averages_every_update_and_keeps_both_models(finished, tmp_path):
    """The average by hand of the weights that update_ema is shown, against every average and task1.pt."""
    by_hand, seen, ends = {}, [], {}

    def note(ema, model, n):
        seen.append(n)
        for key, p in ema.named_parameters():
            if n in (1, 7):  # a stage begins
                by_hand[key] = p.double()
            assert_close(p.double(), by_hand[key], rtol=0, atol=1e-6)
        d = min(0.9999, (1 + n) / (10 + n))
        by_hand.update({key: d * by_hand[key] + (1 - d) * p.detach().double() for key, p in model.named_parameters()})
        ends[len(seen)] = dict(by_hand)
    learn(tmp_path / "run", update_ema=note)
    assert seen == [*range(1, 7), *range(1, 7), *range(7, 13)], "a local model counts anew, the global one goes on"
    for name, n in (("task1", 6), ("local2", 12), ("task2", 18)):
        state = saved(tmp_path / "run", name)
        for key, value in ends[n].items():
            assert_close(state["model"][key].double(), value, rtol=0, atol=1e-6)
            assert not torch.equal(state["model"][key], state["raw"][key]), key
        assert state["count"] == seen[n - 1]
    assert same(state["model"], saved(finished(), "task2")["model"]), "the same run twice is the same bit for bit"


# ------------------------------------------------------------------------------------------------------ losses

class Stub:
    """A model that predicts a x_t + t / T, whose logits are an image's own pixels times c; it notes its calls."""

    def __init__(self, a=1.0, c=1.0):
        self.a, self.c, self.calls = torch.tensor(a, requires_grad=True), torch.tensor(c, requires_grad=True), []

    def __call__(self, x_t, t):
        self.calls.append(("denoise", x_t, t))
        return self.a * x_t + t.view(-1, 1, 1, 1) / T

    def classify(self, x):
        self.calls.append(("classify", x))
        return self.c * x.flatten(1)

    def names(self):
        return [call[0] for call in self.calls]


def batch(n=6):
    """x_0, x_c (n, 1, 2, 2) and one of four classes for each image."""
    reseed("batch")
    return torch.randn(n, 1, 2, 2), 3 * torch.randn(n, 1, 2, 2), torch.arange(n) % 4


def diffused(x_0):
    """The x_t, t and eps that a loss will draw after reseed("losses"), and t / T for each image."""
    reseed("losses")
    t, eps = torch.randint(T, (len(x_0),)), torch.randn_like(x_0)
    reseed("losses")
    return q_sample(x_0, t, eps, ABAR), t, eps, t.view(-1, 1, 1, 1) / T


def H(q, logits):
    """-sum_c q_c log p_c of each image."""
    return -(q * logits.log_softmax(1)).sum(1)


def CE(logits, y):
    return -logits.log_softmax(1)[torch.arange(len(y)), y]


def settings(weighting=None):
    return SimpleNamespace(alpha=0.7, kd_weighting=weighting)


def check(terms, **expected):
    assert set(terms) == set(expected)
    for name, value in expected.items():
        close(terms[name], value)


def test_joint_losses_by_hand():
    (x_0, x_c, y), model = batch(), Stub(0.9, 1.3)
    x_t, t, eps, time = diffused(x_0)
    denoise, ce = (0.9 * x_t + time - eps).square().mean(), CE(1.3 * x_c.flatten(1), y).mean()
    terms = train_jdcl.joint_losses(settings(), model, x_0, x_c, y, ABAR)
    check(terms, loss=denoise + 0.7 * ce, denoise=denoise, ce=ce)
    assert model.names() == ["denoise", "classify"]
    assert torch.equal(model.calls[0][1], x_t) and torch.equal(model.calls[1][1], x_c)
    model.calls.clear()
    reseed("losses")
    check(train_jdcl.joint_losses(settings(), model, x_0, None, y, ABAR, on=False), loss=denoise, denoise=denoise)
    assert model.names() == ["denoise"]


@pytest.mark.parametrize("weighting", ["sample", "group"])
@pytest.mark.parametrize("on", [True, False])
def test_distillation_by_hand_each_image_from_its_own_teacher(weighting, on):
    """At an image the teacher's prediction is distilled at the student's own x_t and t, its probabilities at x_c."""
    (x_0, x_c, y), args = batch(), settings(weighting)
    model, old, new = Stub(0.9, 1.3), Stub(0.5, 0.6), Stub(-0.4, 2.0)
    x_t, t, eps, time = diffused(x_0)
    terms = train_jdcl.distillation_losses(args, model, old, new, 2, x_0, x_c if on else None, y, ABAR, on)
    for teacher, rows in ((model, slice(None)), (old, slice(2)), (new, slice(2, None))):
        assert sorted(teacher.names()) == ["classify", "denoise"][1 - on:]
        for call in teacher.calls:
            if call[0] == "denoise":
                assert torch.equal(call[1], x_t[rows]) and torch.equal(call[2], t[rows])
            else:
                assert torch.equal(call[1], x_c[rows])
    a, c = torch.tensor([0.5] * 2 + [-0.4] * 4).view(-1, 1, 1, 1), torch.tensor([0.6] * 2 + [2.0] * 4).view(-1, 1)
    pred, logits = 0.9 * x_t + time, 1.3 * x_c.flatten(1)
    weight = torch.full((6,), 2 / 6) if weighting == "sample" else torch.tensor([1 / 2] * 2 + [1 / 4] * 4)
    denoise, kd = (pred - eps).square().mean(), (weight * (pred - (a * x_t + time)).square().mean((1, 2, 3))).sum()
    ce, kd_class = CE(logits, y).mean(), (weight * H((c * x_c.flatten(1)).softmax(1), logits)).sum()
    if on:
        check(terms, loss=kd + 0.01 * denoise + 0.7 * kd_class + 0.01 * 0.7 * ce, denoise=denoise, kd=kd, ce=ce,
              kd_class=kd_class)
    else:
        check(terms, loss=kd + 0.01 * denoise, denoise=denoise, kd=kd)
    terms["loss"].backward()
    assert model.a.grad.abs() > 0 and (model.c.grad is not None) == on
    assert all(p.grad is None for teacher in (old, new) for p in (teacher.a, teacher.c))


def test_one_stage_by_hand():
    """The replayed images distil, the real ones are denoised, all are classified."""
    (x_0, x_c, y), model, old = batch(), Stub(0.9, 1.3), Stub(0.5, 0.6)
    x_t, t, eps, time = diffused(x_0)
    terms = train_jdcl.one_stage_losses(settings(), model, old, 2, x_0, x_c, y, ABAR)
    assert torch.equal(old.calls[0][1], x_t[:2]) and torch.equal(old.calls[0][2], t[:2])
    assert torch.equal(old.calls[1][1], x_c[:2])
    pred, logits = 0.9 * x_t + time, 1.3 * x_c.flatten(1)
    denoise, kd = (pred - eps)[2:].square().mean(), (pred - 0.5 * x_t - time)[:2].square().mean()
    ce, kd_class = CE(logits, y).mean(), H((0.6 * x_c[:2].flatten(1)).softmax(1), logits[:2]).mean()
    check(terms, loss=4 / 6 * denoise + 2 / 6 * kd + 0.7 * (ce + 2 / 6 * kd_class), denoise=denoise, kd=kd, ce=ce,
          kd_class=kd_class)
    terms["loss"].backward()
    assert model.a.grad.abs() > 0 and old.a.grad is None and old.c.grad is None


@pytest.mark.parametrize("world", [2, 3, 4, 8])  # of 6 images, 3 of them old: 2 old and 1, 1 each, and all at each
def test_the_mean_over_processes_is_the_loss_of_one(monkeypatch, world):
    (x_0, x_c, y), old, new = batch(), Stub(0.5, 0.6), Stub(-0.4, 2.0)

    def found(losses):
        model = Stub(0.9, 1.3)
        reseed("losses")
        loss = losses(model)["loss"]
        loss.backward()
        return torch.stack([loss.detach(), model.a.grad, model.c.grad])

    distil = functools.partial(train_jdcl.distillation_losses, old=old, new=new, n_old=3, x_0=x_0, x_c=x_c, y=y,
                               abar=ABAR, on=True)
    for losses in (
            lambda model: train_jdcl.joint_losses(settings(), model, x_0, x_c, y, ABAR),
            lambda model: distil(settings("sample"), model), lambda model: distil(settings("group"), model),
            lambda model: train_jdcl.one_stage_losses(settings(), model, old, 3, x_0, x_c, y, ABAR),
            lambda model: train_jdcl.semi_supervised_losses(settings(), model, x_0, x_c[:5], y[:5], x_c, x_0, ABAR)):
        one, shares = found(losses), []
        for rank in range(world):
            monkeypatch.setattr(run, "rank", rank)
            monkeypatch.setattr(run, "world", world)
            shares.append(found(losses))
        monkeypatch.undo()
        close(torch.stack(shares).mean(0), one)


def test_real_teachers_get_no_gradient_and_every_weight_of_the_student_does():
    model, old, new = (random_net(i, classes=10).train() for i in range(3))
    reseed("batch")
    x_0, x_c, y = torch.randn(4, 1, 16, 16), torch.randn(4, 1, 16, 16), torch.arange(4)
    for terms in (train_jdcl.distillation_losses(settings("sample"), model, old, new, 1, x_0, x_c, y, ABAR, True),
                  train_jdcl.one_stage_losses(settings(), model, old, 1, x_0, x_c, y, ABAR)):
        model.zero_grad()
        terms["loss"].backward()
        assert all(p.grad is None for teacher in (old, new) for p in teacher.parameters())
        assert all(p.grad.abs().sum() > 0 for name, p in model.named_parameters() if not name.endswith("to_k.bias"))


def test_fixmatch_by_hand():
    """Of five unlabelled images one is sure, one just sure enough and three are not: the mean is over all five."""
    above, below = (torch.tensor([p, *[(1 - p) / 3] * 3]).log() for p in (0.9501, 0.9499))
    x_weak = torch.stack([torch.tensor([0.0, 0, 9, 0]), above, below, torch.zeros(4), torch.tensor([1.0, 0, 0, 2])])
    reseed("fixmatch")
    x_0, x_strong, x_l = torch.randn(5, 1, 2, 2), 2 * torch.randn(5, 1, 2, 2), 2 * torch.randn(3, 1, 2, 2)
    x_weak, y_l, model = x_weak.view(5, 1, 2, 2).requires_grad_(), torch.tensor([3, 0, 1]), Stub(0.9)
    x_t, _, eps, time = diffused(x_0)
    terms = train_jdcl.semi_supervised_losses(settings(), model, x_0, x_l, y_l, x_weak, x_strong, ABAR)
    unlabelled = CE(x_strong[:2].flatten(1), torch.tensor([2, 0])).sum() / 5
    labelled, denoise = CE(x_l.flatten(1), y_l).mean(), (0.9 * x_t + time - eps).square().mean()
    check(terms, loss=denoise + 0.7 * (labelled + unlabelled), denoise=denoise, ce=labelled, ce_unlabelled=unlabelled)
    terms["loss"].backward()
    assert x_weak.grad is None, "what an image is taken for is a constant"
    c = torch.ones((), requires_grad=True)
    (CE(c * x_strong[:2].flatten(1), torch.tensor([2, 0])).sum() / 5 + CE(c * x_l.flatten(1), y_l).mean()).backward()
    close(model.c.grad, 0.7 * c.grad)


# ------------------------------------------------------------------------------------------------------ replay

class Figures(nn.Module):
    """A generator whose images are tanh of their noise, so that all of them differ."""

    def forward(self, x_T, t):
        a = ABAR[t].view(-1, 1, 1, 1)
        return (x_T - a.sqrt() * x_T.tanh()) / (1 - a).sqrt()


class Parity:
    """A labeller that tells classes 0 .. 4 by the level of the first pixel, modulo 5: half a level changes it."""

    def __init__(self, never=()):
        self.never = never

    def classify(self, x):
        y = ((x[:, 0, 0, 0] + 1) * 127.5).round().long() % 5
        for c in self.never:
            y = torch.where(y == c, 0, y)
        return F.one_hot(y, 5).float()


def job(tmp_path, kept=None, **more):
    """What `draw` needs; its images are 4x4."""
    args = dict(batch_size=2, replay_per_class=5, replay_cap=1000.0, seed=3, replay_steps=1, clip=True, flip=False,
                save_every=("updates", 1e9), class_names=[*"abcde"])
    return SimpleNamespace(args=SimpleNamespace(**args | more), k=2, shape=(1, 4, 4), ema=Figures(), abar=ABAR,
                           device="cpu", autocast=torch.autocast("cpu", enabled=False), folder=tmp_path,
                           state={"task": 2, "update": 0, "kept": kept or {}})


def draw(some, classes=(3, 1), never=(), side="old"):
    return train_jdcl.draw(some, side, [*classes], {"model": {}}, Parity(never))


def test_draw_fills_each_quota_in_order_and_throws_the_rest_away(tmp_path):
    """By hand: batches of 8 times a training batch, each with its own noise; first come, first kept, class by class."""
    (full, about), wanted, found, n = draw(job(tmp_path, replay_per_class=6)), {3: [], 1: []}, [0] * 5, 0
    while any(len(images) < 6 for images in wanted.values()):
        reseed(3, "replay", 2, "old", n)
        for image in data.quantize(sample(Figures(), torch.randn(16, 1, 4, 4), ABAR, 1)):
            c = int(image[0, 0, 0]) % 5  # of the 8-bit image
            found[c] += 1
            if c in wanted and len(wanted[c]) < 6:
                wanted[c].append(image)
        n += 16
    assert about == {"drawn": n, "found": found, "copies": [0, 0]} and sum(found) == n > 16
    assert found[3] > 6 or found[1] > 6, "there was a surplus to throw away"
    assert list(full) == [3, 1] and all(torch.equal(full[c], torch.stack(images)) for c, images in wanted.items())
    assert full[3].dtype == torch.uint8


@pytest.mark.parametrize("quota, classes, drawn", [(5, (3, 0), 32), (4, (3, 0), 16), (4, (0,), 16)])
def test_the_cap_ends_a_draw_and_copies_fill_up(tmp_path, monkeypatch, quota, classes, drawn):
    """At 2 x 5 x 2 = 20 images or more, here two batches of 16; exactly at it where 16 are allowed."""
    views = []
    monkeypatch.setattr(data, "diffusion_view", lambda u8, *how: views.append(how) or u8)
    kept = {"old": {"drawn": 0, "found": [0] * 5, "images": {  # one image of each: what the draw cannot find
        c: torch.full((1, 1, 4, 4), 20 * c, dtype=torch.uint8) for c in classes}}}
    some = job(tmp_path, kept, replay_per_class=quota, replay_cap=2.0, flip=True)
    monkeypatch.setattr(Parity, "classify", lambda self, x: F.one_hot(torch.full((len(x),), 4), 5).float())
    full, about = draw(some, classes)
    assert about == {"drawn": drawn, "found": [0, 0, 0, 0, drawn], "copies": [quota - 1] * len(classes)}
    assert all((full[c] == 20 * c).all() and len(full[c]) == quota for c in classes)
    draw(job(tmp_path, {"new": kept["old"] | {"drawn": 99}}, replay_cap=2.0), classes, side="new")
    assert views == [(True, 0.9)] * len(classes) + [(False, 0.85)] * len(classes)


def test_copies_are_varied_images_of_the_class(tmp_path):
    images = torch.arange(2 * 16, dtype=torch.uint8).view(2, 1, 4, 4)
    kept = {"old": {"drawn": 99, "found": [0] * 5, "images": {3: images}}}
    full, about = draw(job(tmp_path, kept, replay_per_class=9, replay_cap=1.0, flip=True), [3])
    reseed(3, "copies", 2, 3)
    more = data.diffusion_view(images[torch.randint(2, (7,))], True, 0.9)
    assert about["copies"] == [7] and torch.equal(full[3], torch.cat([images, more]))
    assert len({image.sum().item() // 200 for image in more}) == 2, "not always the same one"


def test_a_draw_goes_on_where_it_was_stopped(tmp_path, monkeypatch):
    states = []
    monkeypatch.setattr(run, "save_checkpoint", lambda folder, state: states.append(copy.deepcopy(state["kept"])))
    whole, about = draw(job(tmp_path, replay_per_class=9, save_every=("updates", 1.0)))
    assert [kept["old"]["drawn"] for kept in states] == [*range(16, about["drawn"] + 1, 16)] and len(states) > 2
    for kept in states:
        again, told = draw(job(tmp_path, kept, replay_per_class=9))
        assert same(again, whole) and told == about


def test_a_class_that_never_appears_is_named(tmp_path):
    with pytest.raises(run.InputError, match="none of 32 images drawn for the new classes looks like class 1 .*"
                                             "--local-iterations.*--replay-cap"):
        draw(job(tmp_path, replay_cap=2.0), never=[1], side="new")


# -------------------------------------------------------------------------------------------------- evaluation

def test_correct_answers_are_counted_in_eval_mode_among_all_classes():
    model = random_net(classes=10).train()
    reseed("test")
    test = {c: torch.randint(256, (1005, 1, 4, 4), dtype=torch.uint8) for c in (2, 7)}
    right = train_jdcl.count_correct(model, test, [2, 7])
    assert all(m.training for m in model.modules())
    with torch.no_grad():
        y = {c: model.eval().classify(data.normalize(u8)).argmax(1) for c, u8 in test.items()}
    assert right == {c: int((y[c] == c).sum()) for c in (2, 7)} and len(set(torch.cat([*y.values()]).tolist())) > 1


def test_summary_by_hand():
    found = train_jdcl.summary([[8], [10, 6], [2, 9, 5]], [10, 20, 5])
    assert found["matrix"] == [[0.8], [1.0, 0.3], [0.2, 0.45, 1.0]]
    close(found["accuracy"], [8 / 10, 16 / 30, 16 / 35])
    close(found["average_accuracy"], (0.2 + 0.45 + 1) / 3)
    close(found["average_forgetting"], (0.8 - 0.15) / 2)  # from the best so far; what grew counts against it
    assert train_jdcl.summary([[8]], [10])["average_forgetting"] is None


def test_histograms_share_their_bins():
    real, replayed = torch.arange(100.0), torch.tensor([-20.0, 50, 50, 140])
    h = train_jdcl.histograms(real, replayed)
    close(h["edges"], torch.linspace(-20, 140, 41))
    assert sum(h["real"]["counts"]) == 100 and h["replayed"]["counts"][0] == h["replayed"]["counts"][-1] == 1
    assert (h["replayed"]["mean"], h["real"]["mean"]) == (55, 49.5)
    close(h["real"]["sd"], math.sqrt(100 * 101 / 12))


# -------------------------------------------------------------------------------------------------- whole runs

def test_records_tell_the_stages_and_what_their_losses_are(finished):
    folder = finished()
    assert [(r["task"], r["update"], r["stage"]) for r in records(folder)] == (
        [(1, u, "local") for u in range(1, 7)]
        + [(2, u, "local" if u < 7 else "global") for u in range(1, 13)])
    for r in records(folder):
        u = r["update"] - 6 * (r["stage"] == "global")
        assert ("kd" in r) == (r["stage"] == "global") and ("kd_class" in r) == (r["update"] > 8)  # it starts at 2
        assert ("ce" in r) == ("kd_class" in r or r["stage"] == "local")
        assert ("accuracy" in r) == (u in (4, 6)) and ("accuracy_old_replayed" in r) == ("accuracy" in r and "kd" in r)
    last = records(folder)[-1]
    assert set(last["accuracy_by_class"]) == {"0", "4"} and last["accuracy_task1"] == last["accuracy_old_real"]
    assert last["accuracy"] == sum(last["accuracy_by_class"].values()) / 2
    assert records(folder, 1)[-1]["accuracy_task1"] == records(folder, 1)[-1]["accuracy"]
    local = records(folder, 2)[5]
    assert list(local["accuracy_by_class"]) == ["4"] and "accuracy_task1" not in local


ALL = {"denoise", "ce", "kd", "kd_class"}
ABLATIONS = [  # flags, whether task 1 stays as it is, the stages of task 2, the terms of its last record
    ("--no-kd", True, "lg", {"denoise", "ce"}), ("--one-stage", True, "g", ALL), ("--separate", False, "lg", ALL),
    ("--one-stage --no-kd", True, "g", {"denoise", "ce"}),
    ("--kd-weighting group", True, "lg", ALL), ("--teacher raw", True, "lg", ALL),
    ("--local-init global", True, "lg", ALL), ("--classifier-start 0", True, "lg", ALL),
    ("--labels 0.1", False, "lg", ALL), ("--labels 0.1 --labelled-only", False, "lg", ALL),
    ("--replay none", True, "l", {"denoise", "ce"}), ("--replay all", True, "l", {"denoise", "ce"})]


@pytest.mark.parametrize("flags, first, stages, terms", ABLATIONS)
def test_every_ablation_does_something(finished, flags, first, stages, terms):
    usual, folder = finished(), finished(*flags.split())
    tasks = [[saved(f, f"task{k}")["model"]["conv_in.weight"] for f in (usual, folder)] for k in (1, 2)]
    assert torch.equal(*tasks[0]) == first and not torch.equal(*tasks[1])
    if first:
        assert records(usual, 1) == records(folder, 1)
    two = records(folder, 2)
    assert "".join(r["stage"][0] for r in two) == "".join(stage * 6 for stage in stages)
    assert {name for name in two[-1] if name in {"ce_unlabelled", *ALL}} == terms
    for r in two:
        share, get = 4 / 9, {name: r.get(name, 0) for name in ("ce_unlabelled", *ALL)}
        if flags == "--one-stage":
            loss = ((1 - share) * r["denoise"] + share * r["kd"]) + r["ce"] + share * r["kd_class"]
        elif r["stage"] == "local" or "--no-kd" in flags:
            loss = r["denoise"] + get["ce"] + get["ce_unlabelled"]
        else:
            loss = 0.01 * (r["denoise"] + get["ce"]) + r["kd"] + get["kd_class"]
        close(r["loss"], loss)
    assert ("ce_unlabelled" in two[0]) == (flags == "--labels 0.1")
    files = ["local2.pt"] * (stages == "lg") + ["replay2.pt"] * ("g" in stages) + ["task1.pt", "task2.pt"]
    assert sorted(path.name for path in folder.glob("*.pt")) == files


def test_what_single_ablations_do(finished):
    usual = records(finished(), 2)
    group = records(finished("--kd-weighting", "group"), 2)
    assert group[:6] == usual[:6] and group[6]["denoise"] == usual[6]["denoise"] and group[6]["kd"] != usual[6]["kd"]
    replays = [saved(finished(*flags), "replay2") for flags in ((), ("--kd-weighting", "group"), ("--one-stage",))]
    assert torch.equal(replays[0]["images"], replays[1]["images"]) and len(replays[0]["images"]) == 300
    assert torch.equal(replays[0]["images"][:150], replays[2]["images"]) and set(replays[2]["labels"].tolist()) == {0}
    counts = [saved(finished(*flags), "local2")["count"] for flags in ((), ("--local-init", "global"))]
    assert counts == [6, 12], "of the moving average"
    assert ["ce" in r for r in records(finished("--classifier-start", "0"), 2)] == [True] * 12
    nets = [read(finished(*flags), "accuracy.json")["parameters"] for flags in ((), ("--separate",))]
    unet, resnet = (sum(p.numel() for p in net.parameters()) for net in (UNet(**SMALL), resnet18(1, 10, 16)))
    assert nets[1] == {"unet": unet, "head": resnet} and nets[0]["unet"] == unet != nets[0]["head"] != resnet
    held = [read(finished(*flags), "config.json")["parameters"] for flags in (
        ("--replay", "all"), ("--one-stage",), (), ("--separate",))]
    joint = unet + nets[0]["head"]
    assert held == [2 * joint, 3 * joint, 4 * joint, 4 * (unet + resnet)]


@pytest.mark.parametrize("replay, classes", [("none", {4}), ("all", {0, 4})])
def test_what_task_2_sees_of_task_1_without_a_model(tmp_path, replay, classes):
    seen, weights = [], []

    def note(args, model, x_0, x_c, y, abar, on=True):
        seen.append(set(y.tolist()))
        weights.append(copy.deepcopy(model.state_dict()))
    learn(tmp_path / "run", "--replay", replay, joint_losses=note)
    assert len(seen) == 12 and set().union(*seen[:6]) == {0} and set().union(*seen[6:]) == classes
    assert same(weights[6], saved(tmp_path / "run", "task1")["raw"]), "it goes on from task 1, head and all"


@pytest.mark.parametrize("teacher", ["ema", "raw"])
def test_how_stage_2_starts(tmp_path, teacher):
    """From the global model of task 1 with fresh rows for the classes not seen, taught by the wanted weights."""
    starts, averages, labellers = [], [], []

    def note(args, model, old, new, n_old, x_0, x_c, y, abar, on):
        if not starts:
            starts.append([copy.deepcopy(m.state_dict()) for m in (model, old, new)] + [
                (model.training, old.training, new.training), n_old])
        assert y[:4].eq(0).all() and y[4:].eq(4).all() and len(x_0) == 9 and (x_c is None) == (not on)

    learn(tmp_path / "run", "--teacher", teacher, distillation_losses=note,
          update_ema=lambda ema, model, n: averages.append(copy.deepcopy(ema.state_dict())),
          draw=lambda job, side, classes, drawer, labeller: labellers.append((
              drawer["model"], labeller.training, copy.deepcopy(labeller.state_dict()))))
    (model, old, new, training, n_old), ema = starts[0], averages[12]
    task1, local = saved(tmp_path / "run", "task1"), saved(tmp_path / "run", "local2")
    weights = {"ema": "model", "raw": "raw"}[teacher]
    assert same(old, task1[weights]) and same(new, local[weights])
    assert training == (True, teacher == "raw", teacher == "raw") and n_old == 4
    for made, (drawer, labelling, labeller) in zip((task1, local), labellers, strict=True):
        assert same(drawer, made["model"]) and same(labeller, made[weights]) and labelling == (teacher == "raw")
    for begun, before in ((model, task1["raw"]), (ema, task1["model"])):
        assert [key for key in begun if not torch.equal(begun[key], before[key])] == ["head.3.weight"]
        changed = (begun["head.3.weight"] != before["head.3.weight"]).all(1)
        assert changed.tolist() == [False] + [True] * 9
    fresh = model["head.3.weight"][1:]
    assert torch.equal(fresh, ema["head.3.weight"][1:]) and fresh.abs().max() <= math.sqrt(6 / (32 + 10))
    assert abs(fresh.std() - math.sqrt(2 / (32 + 10))) < 0.03, "Xavier's"


@pytest.mark.parametrize("only", [False, True])
def test_the_labelled_images_are_a_balanced_and_fixed_share(tmp_path, monkeypatch, only):
    """A tenth of the 60 images of each class, for 160 draws of 8 among 12; the same for the same seed.

    The first two pixels of an image are its number, and the views leave them alone.
    """
    labelled, unlabelled = [], []

    def load(dataset, split, data_dir, side):
        u8, y = few_shapes(dataset, split, data_dir, side)
        u8[:, 0, 0, 0], u8[:, 0, 0, 1] = torch.arange(len(y)) // 256, torch.arange(len(y)) % 256
        return u8, y

    def numbers(x):
        level = ((x[:, 0, 0, :2] + 1) * 127.5).round().long()
        return level[:, 0] * 256 + level[:, 1]

    def semi(args, model, x_0, x_l, y_l, x_weak, x_strong, abar):
        assert not only and len(x_l) == 8 and len(x_0) == 56 and torch.equal(y_l, numbers(x_l) % 10)
        assert torch.equal(x_0, x_weak) and torch.equal(x_0, x_strong)
        labelled.extend(numbers(x_l).tolist())
        unlabelled.extend(numbers(x_0).tolist())
        return {"loss": model.conv_in.weight.square().mean()}

    def joint(args, model, x_0, x_c, y, abar, on=True):
        assert only and len(x_0) == 64 and torch.equal(y, numbers(x_0) % 10)
        labelled.extend(numbers(x_0).tolist())
        return {"loss": model.conv_in.weight.square().mean()}

    def found(name, seed):
        labelled.clear()
        learn(tmp_path / name, "--replay", "none", "--class-order", "0,5", "--labels", "0.1", "--batch-size", "64",
              "--local-iterations", "20", "--eval-every", "20", "--seed", seed, *["--labelled-only"] * only, load=load)
        return set(labelled)

    monkeypatch.setattr(train_jdcl, "semi_supervised_losses", semi)
    monkeypatch.setattr(train_jdcl, "joint_losses", joint)
    for view in ("weak_view", "strong_view"):
        monkeypatch.setattr(data, view, lambda u8, flip: u8)
    a, b, c = found("a", "1"), found("b", "1"), found("c", "2")
    assert a == b != c and sorted(i % 10 for i in a) == [0] * 6 + [5] * 6
    assert only or set(unlabelled) == {i for i in range(600) if i % 10 in (0, 5)}


@pytest.mark.parametrize("flags, tally", [
    ("--classifier-view weak", {"weak": 6 + 6 + 4}), ("--classifier-view strong", {"strong": 6 + 6 + 4}),
    ("--classifier-view weak --labels 0.5", {"weak": 24 + 4, "strong": 12})])
def test_views(tmp_path, monkeypatch, flags, tally):
    """--crop is of the denoiser's view, by stage; the classifier's may be strong, and FixMatch has views of its own."""
    crops, views = [], []
    level = {"diffusion": -1, "weak": 2 * 10 / 255 - 1, "strong": 1}

    def note(args, model, x_0, x_l, y_l, x_weak, x_strong, abar):
        for x, name in zip((x_0, x_l, x_weak, x_strong), ("diffusion", "weak", "weak", "strong")):
            close(x, torch.full_like(x, level[name]))
        assert (len(x_l), len(x_0)) == (1, 8)

    def diffusion_view(u8, flip, smallest):
        crops.append((flip, smallest))
        return torch.full_like(u8, 0) if smallest == 0.5 else u8

    monkeypatch.setattr(data, "diffusion_view", diffusion_view)
    for view in ("weak", "strong"):
        monkeypatch.setattr(data, f"{view}_view", lambda u8, flip, view=view: views.append((flip, view)) or (
            torch.full_like(u8, 10 if view == "weak" else 255)))
    learn(tmp_path / "run", "--flip", "--crop", "0.5,0.7", *flags.split(), semi_supervised_losses=note)
    assert crops == [(True, s) for s in [0.5] * 12 + [0.9, 0.85] + [0.7] * 6]
    assert {view: views.count((True, view)) for _, view in views} == tally


def test_accuracies_are_those_of_the_saved_model(finished):
    """Counted here from task<k>.pt's moving average, over the whole test set and all classes."""
    folder, (test, y) = finished(), few_shapes("shapes", "test", "data", 16)
    about = read(folder, "accuracy.json")
    for k, classes in ((1, [0]), (2, [0, 4])):
        model, task = UNet(**SMALL, classes=10).eval(), saved(folder, f"task{k}")
        model.load_state_dict(task["model"])
        with torch.no_grad():
            label = model.classify(data.normalize(test)).argmax(1)
        right = [int((label[y == c] == c).sum()) for c in classes]
        assert about["correct"][k - 1] == about["tasks"][k - 1]["correct"] == right and about["total"] == [20, 20]
        assert about["tasks"][k - 1]["by_class"] == {str(c): n / 20 for c, n in zip(classes, right)}
        assert task["history"] == about["tasks"][:k] and records(folder, k)[-1]["accuracy"] == sum(right) / 20 / k


# -------------------------------------------------------------------------- a run as a person does it, by subprocess

SHAPES = ("--dataset shapes --scale laptop --device cpu --class-order 0,1|4,9 --batch-size 16 --local-iterations 20 "
          "--global-iterations 8 --classifier-start 4 --replay-per-class 12 --replay-steps 3 --replay-cap 1000 "
          "--alpha 0.3 --lr 0.005 --sample-steps 2 --eval-every 30 --seed 1 --out run").split()


def test_a_whole_run_by_subprocess(script, tmp_path, main):
    """Two tasks of two classes each, and everything that is left of them."""
    done, folder = script("train_jdcl.py", *SHAPES), tmp_path / "run"
    assert done.returncode == 0, done.stderr
    assert "next: python eval_fid.py run" in done.stdout and "task 2: average accuracy" in done.stdout
    assert {str(path.relative_to(folder)) for path in folder.rglob("*.*")} - {".lock"} == {
        "config.json", "metrics.jsonl", "accuracy.json", "task1.pt", "task2.pt", "local2.pt", "replay2.pt",
        *(f"samples/{name}.png" for name in ("task1", "task2", "replay2"))}
    assert [r["update"] for r in records(folder, 2) if r["stage"] == "global"] == list(range(21, 29))
    config = read(folder, "config.json")
    assert config["class_tasks"] == [[0, 1], [4, 9]] and config["class_names"][4] == "square"
    assert config["updates"] == [20, 28] and config["preset_updates"] == [400, 800] and config["schedule"] == "jdcl"
    assert [config[key] for key in ("method", "base", "title", "dataset_name")] == ["jdcl", "jdcl", "JDCL", "shapes"]
    assert config["departs"].keys() == {flag.strip("-").replace("-", "_") for flag in SHAPES if flag[0] == "-"} - {
        "dataset", "scale", "device", "seed", "out"}

    for k in (1, 2):
        task = saved(folder, f"task{k}")
        assert set(task) == {"task", "model", "raw", "count", "history", "memory", "config"} and task["task"] == k
        for weights in (task["model"], task["raw"]):
            UNet(**NETS["jdcl-laptop"], classes=10).load_state_dict(weights)
    for name, rows, columns in ("task1", 8, 8), ("task2", 8, 8), ("replay2", 4, 10):  # ten images of each class
        picture = np.asarray(Image.open(folder / "samples" / f"{name}.png"))
        assert picture.std() > 10 and picture.shape == ((rows * 17 + 1) * 2, (columns * 17 + 1) * 2, 3)

    replay, about = saved(folder, "replay2"), read(folder, "accuracy.json")
    assert replay["images"].shape == (48, 1, 16, 16) and replay["images"].dtype == torch.uint8
    assert replay["labels"].tolist() == [c for c in (0, 1, 4, 9) for _ in range(12)]
    for side, classes in (("old", (0, 1)), ("new", (4, 9))):
        told = replay["about"][side]
        assert told["drawn"] == sum(told["found"]) and told["drawn"] % 128 == 0 < told["drawn"]
        assert told["copies"] == [max(0, 12 - told["found"][c]) for c in classes]
    logits = replay["about"]["logits"]
    assert sum(logits["real"]["counts"]) == 1000 and sum(logits["replayed"]["counts"]) == 24
    one, two = about["tasks"]
    assert one["replay"] is None and two["replay"] == replay["about"] and one["local"] is None
    assert two["local"] == saved(folder, "local2")["accuracy"] == records(folder, 2)[19]["accuracy"] > 0.5
    assert about["matrix"][0][0] > 0.5, "two classes out of ten by chance are 0.1"
    assert about["parameters"] == {"unet": 287_073, "head": 23_946} and config["parameters"] == 4 * 311_019

    before = {path: path.read_bytes() for path in folder.rglob("*.*") if path.name != ".lock"}
    assert "is finished" in main("train_jdcl.py", *SHAPES).stdout  # again
    assert {path: path.read_bytes() for path in before} == before


def test_pictures_of_ones_own_in_any_size(tmp_path, main):
    """Three classes of colour pictures, a task each; --image-size is a multiple of the net's factor."""
    for c in range(3):
        (tmp_path / f"photos/class{c}").mkdir(parents=True)
        for i in range(6):
            Image.effect_noise((30, 20), 40 * i).convert("RGB").save(tmp_path / f"photos/class{c}/{i}.png")
    flags = "--dataset photos --scale small --device cpu --tasks 3 --local-iterations 2 --batch-size 4 --sample-steps 1"
    flags = [*flags.split(), "--replay", "none", "--out", "run", "--image-size"]
    done = main("train_jdcl.py", *flags, 12)
    assert done.returncode == 0, done.stderr
    config = read(tmp_path / "run", "config.json")
    assert config["class_names"] == ["class0", "class1", "class2"] and config["unet"] == "jdcl-laptop-rgb"
    assert [config[key] for key in ("dataset_name", "title", "base")] == ["photos", "JDCL, finetuning", "jdcl-finetune"]
    assert Image.open(tmp_path / "run/samples/task3.png").size == (8 * 13 * 2 + 2, 8 * 13 * 2 + 2)
    done = main("train_jdcl.py", *flags, 14)
    assert done.returncode == 2 and "--image-size 14 must be a multiple of 4" in done.stderr


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@pytest.mark.parametrize("more", [[], ["--labels", "0.05"], ["--one-stage"], ["--separate"], ["--no-kd", "--flip"]])
def test_a_run_on_cuda(script, tmp_path, more):
    """The default, in bf16 and compiled, and the plain path."""
    command = [flag if flag != "cpu" else "cuda" for flag in (*TINY, *REPLAY, *more)]
    command += STAGE_2 if "--one-stage" not in more else []
    command[command.index("9")] = "16"
    for out, flags in ("default", []), ("plain", ["--precision", "fp32", "--no-compile"]):
        done = script("train_jdcl.py", *command, *flags, "--out", out, timeout=900)
        assert done.returncode == 0, done.stderr
    for one, two in zip(records(tmp_path / "default", 1), records(tmp_path / "plain", 1)):
        assert one["denoise"] == pytest.approx(two["denoise"], rel=0.1)


# ----------------------------------------------------------------------------------------------- killed and resumed

def stop_inside(folder, flags, name, call, how):
    """What a process of its own does: a run that sends itself a signal at a function's call number `call`."""
    calls = []

    def note(*args, **kwargs):
        calls.append(name)
        if len(calls) == call:
            os.kill(os.getpid(), how)
    learn(folder, *flags, **{name: note})


def everything(folder):
    """All that a run leaves but the clock: records, accuracies, weights, pictures."""
    found = {"records": records(folder), "accuracy": read(folder, "accuracy.json")}
    for path in [*folder.glob("task*.pt"), *folder.glob("local*.pt"), *folder.glob("replay*.pt")]:
        state = torch.load(path, weights_only=True)
        for key in state.keys() & {"model", "raw"}:
            found.update({f"{path.stem} {key} {name}": value for name, value in state.pop(key).items()})
        found.update({f"{path.stem} {key}": value for key, value in state.items() if key != "config"})
    return found | {path.name: path.read_bytes() for path in folder.glob("samples/*.png")}


OFTEN, NEVER = ["--save-every", "2"], ["--save-every", "1000000"]


@pytest.mark.parametrize("flags, save_every, name, call, how, update, samples", [
    ([], OFTEN, "sample", 1 + 3, signal.SIGKILL, 6, 1 + 3 + 1),  # the third batch of old images, of three; a picture
    ([], NEVER, "sample", 1 + 3 + 2, signal.SIGTERM, 6, 1 + 1),  # the second batch of new images
    ([], NEVER, "distillation_losses", 4, signal.SIGKILL, 6, 1),  # back to the start of stage 2
    (["--one-stage"], NEVER, "one_stage_losses", 4, signal.SIGKILL, 0, 1),
    (["--separate", "--teacher", "raw"], OFTEN, "distillation_losses", 4, signal.SIGKILL, 6 + 2, 1),
], ids=["old", "new", "start", "one-stage", "separate"])
def test_a_run_stopped_inside_task_2_ends_bitwise_as_an_unbroken_one(finished, tmp_path, capsys, flags, save_every,
                                                                     name, call, how, update, samples):
    unbroken, broken, drawn = finished(*flags), tmp_path / "run", []
    told = read(unbroken, "accuracy.json")["tasks"][1]["replay"]
    assert all(told[side]["drawn"] == 3 * 72 for side in told.keys() & {"old", "new"}), "three batches"
    context = multiprocessing.get_context("forkserver")  # a fork of this process could not train where CUDA is
    context.set_forkserver_preload(["torch", "torchvision"])
    process = context.Process(target=stop_inside, args=(broken, [*flags, *save_every], name, call, how))
    process.start()
    process.join(300)
    assert process.exitcode == {signal.SIGKILL: -9, signal.SIGTERM: 143}[how]
    assert (broken / "task1.pt").exists() and not (broken / "task2.pt").exists()
    learn(broken, *flags, *save_every, sample=lambda *args, **kwargs: drawn.append(1))
    assert re.search(r"going on from task 2, update (\d+)", capsys.readouterr().out)[1] == str(update)
    assert len(drawn) == samples
    one, other = everything(unbroken), everything(broken)
    assert list(one) == list(other) and len(one) > 100
    for key in one:
        assert torch.equal(one[key], other[key]) if torch.is_tensor(one[key]) else one[key] == other[key], key


# ------------------------------------------------------------------------------------------------------ full size

def zeros(model):
    """How many of the layers that start at zero are still there."""
    last = [m.conv2 for m in model.modules() if isinstance(m, ResBlock)] + [model.conv_out] + [
        m.to_out[0] for m in model.modules() if isinstance(m, Attention)]
    return sum(bool((layer.weight == 0).all()) for layer in last), len(last)


@pytest.mark.parametrize("name, classes, batches, updates", [("jdcl-cifar", 10, [(1, 32), (2, 32)], 2),
                                                             ("jdcl-imagenet100", 100, [(1, 32), (2, 16)], 1)])
def test_the_papers_networks_at_full_size(name, classes, batches, updates):
    """Both stages learn; ImageNet's net does one update of each, on smaller images."""
    args = SimpleNamespace(alpha=1e-3, kd_weighting="sample")
    reseed("full size")
    model = UNet(**NETS[name], classes=classes)
    before, found = zeros(model), []

    def learned(losses, n, side):
        optimizer = torch.optim.AdamW(model.parameters(), 1e-3)
        x_0, x_c, y = torch.randn(n, 3, side, side), torch.randn(n, 3, side, side), torch.arange(n)
        for u in range(updates):
            reseed("update", u)
            terms = losses(x_0, x_c, y)
            optimizer.zero_grad()
            terms["loss"].backward()
            optimizer.step()
            assert all(value.isfinite() for value in terms.values())
            found.append(terms["loss"].item())
        assert all(p.isfinite().all() for p in model.parameters())

    learned(lambda *batch: train_jdcl.joint_losses(args, model, *batch, ABAR), *batches[0])
    assert 0.5 < found[0] < 2, "eps itself, as the net starts at zero, and a thousandth of log(classes)"
    # The first update moves the net's last layer and, through the classifier, all of the encoder; the second the rest.
    assert before[0] == before[1] and zeros(model)[0] == (0 if updates == 2 else sum(
        isinstance(m, (ResBlock, Attention)) for m in model.up_blocks.modules()))
    teacher, kept = copy.deepcopy(model).eval().requires_grad_(False), copy.deepcopy(model.conv_in.weight)
    learned(lambda *batch: train_jdcl.distillation_losses(
        args, model, teacher, teacher, len(batch[0]) // 2, *batch, ABAR, True), *batches[1])
    assert not torch.equal(model.conv_in.weight, kept)


# ------------------------------------------------------------------------------------------------------ arguments

def test_defaults_are_the_papers_runs(tmp_path):
    args = train_jdcl.get_args([])
    assert (args.dataset, args.unet, args.image_size, args.batch_size, args.lr) == (
        "cifar10", "jdcl-cifar", 32, 256, 2e-4)
    assert (args.local_iterations, args.global_iterations, args.classifier_start) == ([50_000], [30_000], 10_000)
    assert (args.replay_per_class, args.replay_steps, args.clip, args.replay_cap) == (1000, 250, False, 2.0)
    assert (args.alpha, args.classifier_view, args.crop, args.flip) == (1e-3, "strong", [0.85, 0.64], True)
    assert (args.local_init, args.teacher, args.kd_weighting, args.schedule) == ("scratch", "ema", "sample", "jdcl")
    assert args.class_tasks == [[0, 1], [2, 3], [4, 5], [6, 7], [8, 9]] and train_jdcl.BETA == 0.01
    for i in range(100):
        for split in ("train", "val"):
            (tmp_path / "imagenet100" / split / f"n{i}").mkdir(parents=True)
            Image.new("RGB", (8, 8)).save(tmp_path / "imagenet100" / split / f"n{i}" / "1.png")
    args = train_jdcl.get_args(["--dataset", "imagenet100", "--data-dir", str(tmp_path)])
    assert (args.unet, args.image_size, args.local_init, args.replay_per_class, args.crop) == (
        "jdcl-imagenet100", 64, "global", 1040, [0.85])
    assert train_jdcl.get_args(["--replay", "none"]).local_init == "global", "or else nothing would be left"
    args = train_jdcl.get_args(["--dataset", "fashion-mnist", "--scale", "small"])
    assert (args.image_size, args.tasks, args.local_iterations, args.global_iterations) == (16, 5, [1000], [1000])
    assert (args.classifier_start, args.replay_per_class, args.unet) == (250, 400, "jdcl-laptop")


@pytest.mark.parametrize("arguments, name", [
    ("", "jdcl"), ("--replay all", "jdcl-joint"), ("--replay none", "jdcl-finetune"), ("--dataset cifar100", "jdcl"),
    ("--dataset cifar100 --tasks 10", "jdcl-tasks10"), ("--no-kd", "jdcl-no_kd"), ("--one-stage", "jdcl-one_stage"),
    ("--separate", "jdcl-separate"), ("--labels 0.05", "jdcl-labels0.05"),
    ("--labels 0.008 --labelled-only", "jdcl-labels0.008-labelled_only"),
    ("--kd-weighting group", "jdcl-kd_weightinggroup"), ("--teacher raw", "jdcl-teacherraw"), ("--clip", "jdcl-clip"),
    ("--no-flip", "jdcl-noflip"), ("--crop 0.85", "jdcl-crop0.85"), ("--image-size 16", "jdcl-image_size16"),
    ("--local-iterations 5,6", "jdcl-local_iterations5_6"), ("--scale laptop --no-kd", "jdcl-no_kd-laptop"),
    ("--dataset shapes --scale laptop", "jdcl-laptop"), ("--dataset cifar100 --scale small", "jdcl-small")])
def test_run_names(arguments, name):
    assert train_jdcl.get_args(arguments.split()).name == name


@pytest.mark.parametrize("arguments, tasks", [
    ("--tasks 2", [[0, 1, 2, 3, 4], [5, 6, 7, 8, 9]]), ("--class-order 7|0,2", [[7], [0, 2]]),
    ("--class-order 7|0,2 --tasks 1", [[7]]), ("--dataset shapes --scale laptop --tasks 2", [[0, 1], [2, 3]]),
    ("--dataset shapes --scale laptop --class-order natural --tasks 1", [[*range(10)]])])
def test_tasks(arguments, tasks):
    args = train_jdcl.get_args(arguments.split())
    assert args.class_tasks == tasks and args.tasks == len(tasks)


@pytest.mark.parametrize("flags, stages", [
    ("", [(7, 0), (8, 5), (8, 6), (8, 6)]), ("--one-stage", [(7, 0), (0, 8), (0, 8), (0, 8)]),
    ("--replay all", [(7, 0), (8, 0), (8, 0), (8, 0)]), ("--tasks 1", [(7, 0)])])
def test_updates_of_the_stages(flags, stages):
    args = train_jdcl.get_args(["--class-order", "0|1|2|3", *flags.split()])
    assert train_jdcl.count_updates(args, [7, 8], [5, 6]) == stages


BAD = """
--dataset nonsense
--replay none --no-kd
--replay all --one-stage
--replay all --replay-per-class 5
--replay none --local-init scratch
--replay all --replay-cap 3
--replay none --teacher raw
--replay all --global-iterations 5
--replay none --kd-weighting group
--one-stage --kd-weighting group
--one-stage --classifier-start 0
--one-stage --labels 0.5
--one-stage --local-init global
--no-kd --kd-weighting group
--labelled-only
--labels 0
--labels 0.5 --batch-size 7
--local-iterations 1,1,1,1,1,1
--global-iterations 1,1,1,1,1
--replay-steps 2000
--replay-cap 1e7
--sample-steps 1001
--tasks 3
--dataset shapes --scale laptop --tasks 4
--class-order 0,1|1,2
--class-order 0,1|2,3 --tasks 3
--class-order 0,1|2,3 --local-iterations 1,1,1
--class-order 0,1|2,3 --global-iterations 1,1
--batch-size 1
--crop 0.5,0.6,0.7
--crop 1.1
--unet jdcl-laptop
--dataset fashion-mnist --unet jdcl-cifar
--image-size 30""".strip().splitlines()


@pytest.mark.parametrize("arguments", BAD)
def test_bad_arguments_end_with_a_sentence_and_code_2(main, tmp_path, tally, arguments):
    done = main("train_jdcl.py", *arguments.split())
    assert done.returncode == 2 and done.stderr.count("error:") == 1 and "Traceback" not in done.stderr, done.stderr
    assert not any(tmp_path.iterdir()), "no folder is made for a run that cannot start"
    tally["bad commands refused"] += 1
