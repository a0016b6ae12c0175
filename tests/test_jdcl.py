"""train_jdcl.py and the nets of unet.py that classify: losses by hand, replay by stubs, whole runs, killed and resumed.

    python -m pytest tests/test_jdcl.py
"""

import copy
import json
import math
import multiprocessing
import os
import re
import runpy
import shutil
import signal
from contextlib import contextmanager
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT
from PIL import Image
from torch import nn
from torch.testing import assert_close

import data
import eval_fid
import run
import train_jdcl
from ddim import T, alpha_bar, q_sample, sample, seed
from unet import NETS, Attention, ResBlock, UNet, cost

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


@contextmanager
def here():
    """For a main called in this process: gives back the signals and locks that it takes."""
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run, "locks", [])
        patch.setattr(run, "signals", [])
        try:
            yield patch
        finally:
            for lock in run.locks:
                lock.close()
            for number, handler in before.items():
                signal.signal(number, handler)


@contextmanager
def small():
    """The smaller net and dataset."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(NETS, "jdcl-laptop", SMALL)
        patch.setitem(data.DATASETS["shapes"], "per_class", dict(train=60, test=20))
        yield


def learn(folder, *flags, **notes):
    """main in this process, in a second; notes[name](...) sees the arguments of each call of train_jdcl.<name>."""
    def tapped(function, note):
        def call(*args, **kwargs):
            note(*args, **kwargs)
            return function(*args, **kwargs)
        return call

    two_stages = [] if "--replay" in flags else REPLAY if "--one-stage" in flags else REPLAY + STAGE_2
    with small(), here() as patch:
        for name, note in notes.items():
            patch.setattr(train_jdcl, name, tapped(getattr(train_jdcl, name), note))
        train_jdcl.main([*TINY, *two_stages, *flags, "--out", str(folder)])
    return folder


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """finished("--no-kd") is the folder of a run with these flags that nothing disturbed."""
    folders = {}

    def get(*flags):
        if flags not in folders:
            folders[flags] = learn(tmp_path_factory.mktemp("finished") / "run", *flags)
        return folders[flags]
    return get


def records(folder, k=None):
    """The records of a run, or of its task k, without what the machine decides."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{key: r[key] for key in r if key not in CLOCK} for r in lines if k in (None, r["task"])]


def saved(folder, name):
    return torch.load(folder / f"{name}.pt", weights_only=True)


def same(a, b):
    return list(a) == list(b) and all(torch.equal(a[key], b[key]) for key in a)


def random_net(name=1, **options):
    """A net without a zero in it, so that no layer could be left out unseen."""
    seed("net", name)
    model = UNet(**dict(SMALL, **options))
    with torch.no_grad():
        for p in model.parameters():
            p += 0.1 * torch.randn_like(p)
    return model.eval()


def close(a, b, **tolerance):
    assert_close(torch.as_tensor(a).double(), torch.as_tensor(b).double(), **(tolerance or dict(rtol=1e-5, atol=1e-6)))


# ------------------------------------------------------------------------------------------ nets that classify

@pytest.mark.parametrize("name, classes, side, parameters, head", [
    ("jdcl-cifar", 10, 32, 52_542_979, 3_812_362), ("jdcl-cifar", 100, 32, 52_542_979, 3_904_612),
    ("jdcl-imagenet100", 100, 64, 114_003_459, 11_610_212)])
def test_counts(name, classes, side, parameters, head):
    with torch.device("meta"):
        assert sum(p.numel() for p in UNet(**NETS[name]).parameters()) == parameters
        model = UNet(**NETS[name], classes=classes)
    assert sum(p.numel() for p in model.parameters()) == parameters + head
    assert cost(name, classes)[:3] == (side, parameters, head)


def test_cost_of_a_pass_and_of_a_classification():
    *_, flop, flop_classify = cost("jdcl-cifar", 10)
    assert flop / 1e9 == pytest.approx(16.77, abs=0.005) and flop_classify / 1e9 == pytest.approx(5.05, abs=0.005)
    assert cost("jdcl-cifar")[1:4] == (52_542_979, 0, flop) and cost("jdcl-cifar")[4] == 0


def test_command_prints_heads_and_both_costs(capsys):
    runpy.run_path(str(ROOT / "unet.py"), run_name="__main__")
    rows = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert ["jdcl-cifar", "32x32", "52,542,979", "16.77", "10", "3,812,362", "5.05"] in rows
    assert ["jdcl-cifar", "32x32", "52,542,979", "16.77", "100", "3,904,612", "5.05"] in rows
    assert [row[5] for row in rows if row[0] == "jdcl-imagenet100"] == ["11,610,212"]
    assert {row[0] for row in rows[1:]} == {*NETS}
    assert all(len(row) == (7 if row[0].startswith("jdcl") else 4) for row in rows[1:])


def maps_of(model, x, t):
    """The maps of the way down and of the middle as hooks see them in a full pass, in the order of their making."""
    maps, note = [], lambda module, inputs, output: maps.append(output)
    down = [module for block in model.down_blocks for module in (*block.attentions, *block.downsamplers)]
    hooks = [m.register_forward_hook(note) for m in (model.conv_in, *down, model.mid_block.resnets[1])]
    model(x, t)
    for hook in hooks:
        hook.remove()
    return maps


@pytest.mark.parametrize("name, side, width", [("jdcl-cifar", 32, 128), ("jdcl-imagenet100", 64, 192)])
def test_features_are_of_17_maps(name, side, width):
    with torch.device("meta"):
        model = UNet(**NETS[name], classes=10)
        x, t = torch.empty(1, 3, side, side), torch.zeros(1, dtype=torch.int64)
        maps = maps_of(model, x, t)
        assert model.features(x).shape == (1, 29 * width) and model.head[0].in_features == 29 * width  # 3712, 5568
    wide = 2 * width
    assert [m.shape[1:3] for m in maps] == [
        *[(width, side)] * 4, (width, side // 2), *[(wide, side // 2)] * 3, (wide, side // 4), *[(wide, side // 4)] * 3,
        (wide, side // 8), *[(wide, side // 8)] * 4]  # of the last four three are of the way down, one of the middle


@pytest.mark.parametrize("net, side", [(LIKE_CIFAR, 16), (SMALL, 16)])
def test_features_are_the_pooled_maps_of_a_full_pass_at_time_0(net, side):
    model, x = random_net(**dict(net, classes=10)), torch.randn(3, net["in_channels"], side, side)
    with torch.no_grad():
        maps = maps_of(model, x, torch.zeros(3, dtype=torch.int64))
        features, logits = model.features(x), model.classify(x)
        assert torch.equal(features, torch.cat([m.mean((2, 3)) for m in maps], 1))
        later = torch.cat([m.mean((2, 3)) for m in maps_of(model, x, torch.ones(3, dtype=torch.int64))], 1)
    assert not torch.equal(features, later)
    w = [p for layer in (model.head[0], model.head[-1]) for p in (layer.weight, layer.bias)]
    hidden = features @ w[0].T + w[1]
    close(logits, torch.where(hidden > 0, hidden, 0.2 * hidden) @ w[2].T + w[3])
    assert logits.shape == (3, 10) and model.train() and not torch.equal(model.classify(x), logits), "dropout"


def test_a_net_without_classes_has_no_head():
    names = [set(UNet(**dict(SMALL, **more)).state_dict()) for more in ({}, dict(classes=10))]
    assert names[0] < names[1] and {name.split(".")[0] for name in names[1] - names[0]} == {"head"}


# ------------------------------------------------------------------------------------------------ their blocks

@pytest.mark.parametrize("name", [name for name in NETS if "laptop" in name])
def test_zero_init_starts_at_zero_and_the_other_nets_do_not(name):
    x, t = torch.randn(2, NETS[name]["in_channels"], 16, 16), torch.tensor([0, 999])
    with torch.no_grad():
        assert (UNet(**NETS[name])(x, t) == 0).all() == name.startswith("jdcl")


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


def test_film_and_dropout_by_hand():
    """s(x) + conv2(dropout(SiLU(GN(conv1(SiLU(GN(x)))) (1 + scale) + shift))), [scale, shift] = W SiLU(e) + b."""
    seed("film")
    block = ResBlock(4, 6, 5, partial(nn.GroupNorm, 2, eps=1e-5), dropout=0.3, film=True, zero_init=nn.Identity())
    for p in block.parameters():
        nn.init.normal_(p)
    x, e = torch.randn(3, 4, 8, 8), torch.randn(3, 5)

    def normalised(h, layer):
        groups = h.unflatten(1, (2, -1))
        variance = groups.var((2, 3, 4), keepdim=True, unbiased=False)
        h = ((groups - groups.mean((2, 3, 4), keepdim=True)) / (variance + 1e-5).sqrt()).flatten(1, 2)
        return h * layer.weight[:, None, None] + layer.bias[:, None, None]

    def silu(h):
        return h * h.sigmoid()
    h = F.conv2d(silu(normalised(x, block.norm1)), block.conv1.weight, block.conv1.bias, padding=1)
    scale, shift = (silu(e) @ block.time_emb_proj.weight.T + block.time_emb_proj.bias).split(6, 1)
    h = silu(normalised(h, block.norm2) * (1 + scale[..., None, None]) + shift[..., None, None])
    shortcut = F.conv2d(x, block.conv_shortcut.weight, block.conv_shortcut.bias)
    seed("dropout")
    kept = F.dropout(torch.ones_like(h), 0.3) * h  # 0, or 1 / 0.7 of it
    for training, inside in ((True, kept), (False, h)):
        seed("dropout")
        out = block.train(training)(x, e)
        assert_close(out, shortcut + F.conv2d(inside, block.conv2.weight, block.conv2.bias, padding=1), rtol=0,
                     atol=1e-3)
    assert out.std() > 10


def test_dropout_is_where_the_preset_has_it_and_off_in_eval():
    with torch.device("meta"):
        rates = {name: {m.dropout.p for m in UNet(**net).modules() if isinstance(m, ResBlock)}
                 for name, net in NETS.items()}
    assert {name for name in NETS if rates[name] == {0.1}} == {"jdcl-cifar", "jdcl-fashion-mnist", "jdcl-imagenet100"}
    assert all(rates[name] in ({0.0}, {0.1}) for name in NETS)
    model, x, t = random_net(dropout=0.5), torch.randn(2, 1, 16, 16), torch.tensor([3, 700])
    with torch.no_grad():
        assert torch.equal(model(x, t), model(x, t))
        model.train()
        assert not torch.equal(model(x, t), model(x, t))


# ---------------------------------------------------------------------------------------------- moving average

@pytest.mark.parametrize("n, d", [(0, 0.1), (1, 2 / 11), (8, 0.5), (990, 0.991), (10**6, 0.9999)])
def test_ema_after_update_n(n, d):
    seed("ema")
    ema, model = nn.Linear(5, 4), nn.Linear(5, 4)
    expected = [d * a.double() + (1 - d) * b.double() for a, b in zip(ema.parameters(), model.parameters())]
    before = copy.deepcopy(model.state_dict())
    train_jdcl.update_ema(ema, model, n)
    for a, b in zip(ema.parameters(), expected):
        assert_close(a.double(), b, rtol=0, atol=1e-6 if n < 1000 else 3e-8)  # 1e-4 of a step is to be seen
    assert same(model.state_dict(), before)


def test_ema_copies_the_statistics_of_batch_norm():
    with small():
        model = train_jdcl.build(train_jdcl.get_args([*TINY, "--separate"]))
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
            if n in (0, 6):  # a stage begins
                by_hand[key] = p.double()
            assert_close(p.double(), by_hand[key], rtol=0, atol=1e-6)
        d = min(0.9999, (1 + n) / (10 + n))
        by_hand.update({key: d * by_hand[key] + (1 - d) * p.detach().double() for key, p in model.named_parameters()})
        ends[len(seen)] = dict(by_hand)
    learn(tmp_path / "run", update_ema=note)
    assert seen == [*range(6), *range(6), *range(6, 12)], "a local model from scratch counts anew, the global goes on"
    for name, n in (("task1", 6), ("local2", 12), ("task2", 18)):
        state = saved(tmp_path / "run", name)
        for key, value in ends[n].items():
            assert_close(state["model"][key].double(), value, rtol=0, atol=1e-6)
            assert not torch.equal(state["model"][key], state["raw"][key]), key
        assert state["count"] == seen[n - 1] + 1
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
    seed("batch")
    return torch.randn(n, 1, 2, 2), 3 * torch.randn(n, 1, 2, 2), torch.arange(n) % 4


def diffused(x_0):
    """The x_t, t and eps that a loss will draw after seed("losses")."""
    seed("losses")
    t, eps = torch.randint(T, (len(x_0),)), torch.randn_like(x_0)
    seed("losses")
    return q_sample(x_0, t, eps, ABAR), t, eps


def H(q, logits):
    """-sum_c q_c log p_c of each image."""
    return -(q * logits.log_softmax(1)).sum(1)


def CE(logits, y):
    return -logits.log_softmax(1)[torch.arange(len(y)), y]


def test_diffuse_is_the_forward_process():
    x_0, _, _ = batch()
    x_t, t, eps = diffused(x_0)
    for one, other in zip(train_jdcl.diffuse(x_0, ABAR), (x_t, t, eps)):
        assert torch.equal(one, other)
    _, t, _ = train_jdcl.diffuse(torch.zeros(50_000, 1, 1, 1), ABAR)
    assert t.min() == 0 and t.max() == T - 1 and abs(t.float().mean() - (T - 1) / 2) < 5, "uniform over 0 .. T-1"


def test_kd_mean_of_both_forms():
    d = torch.tensor([1.0, 2, 3, 4, 5, 9])
    assert train_jdcl.kd_mean(d, 2, 2 / 6, "sample") == 2 * 24 / 6
    close(train_jdcl.kd_mean(d, 2, 2 / 6, "group"), torch.tensor(3 / 2 + 21 / 4))
    assert train_jdcl.kd_mean(d, 3, 3 / 6, "sample") == train_jdcl.kd_mean(d, 3, 3 / 6, "group") == 8


def test_joint_losses_by_hand():
    (x_0, x_c, y), args, model = batch(), SimpleNamespace(alpha=0.7), Stub(0.9, 1.3)
    x_t, t, eps = diffused(x_0)
    loss, terms = train_jdcl.joint_losses(args, model, x_0, x_c, y, ABAR)
    assert [name for name in model.names()] == ["denoise", "classify"]
    assert torch.equal(model.calls[0][1], x_t) and torch.equal(model.calls[1][1], x_c)
    denoise, ce = (0.9 * x_t + t.view(-1, 1, 1, 1) / T - eps).square().mean(), CE(1.3 * x_c.flatten(1), y).mean()
    close(terms["denoise"], denoise)
    close(terms["ce"], ce)
    close(loss, denoise + 0.7 * ce)
    model.calls.clear()
    seed("losses")
    loss, terms = train_jdcl.joint_losses(args, model, x_0, x_c, y, ABAR, on=False)
    assert model.names() == ["denoise"] and list(terms) == ["denoise"]
    close(loss, denoise)


@pytest.mark.parametrize("weighting", ["sample", "group"])
def test_distillation_by_hand_each_image_from_its_own_teacher(weighting):
    """At an image the teacher's prediction is distilled at the student's own x_t and t, its probabilities at x_c."""
    (x_0, x_c, y), args = batch(), SimpleNamespace(alpha=0.7, kd_weighting=weighting)
    model, old, new = Stub(0.9, 1.3), Stub(0.5, 0.6), Stub(-0.4, 2.0)
    x_t, t, eps = diffused(x_0)
    loss, terms = train_jdcl.distillation_losses(args, model, old, new, 2, x_0, x_c, y, ABAR, True)
    time = t.view(-1, 1, 1, 1) / T
    for teacher, rows in ((model, slice(None)), (old, slice(2)), (new, slice(2, None))):
        assert sorted(teacher.names()) == ["classify", "denoise"]
        for call in teacher.calls:
            if call[0] == "denoise":
                assert torch.equal(call[1], x_t[rows]) and torch.equal(call[2], t[rows])
            else:
                assert torch.equal(call[1], x_c[rows])
    a, c = torch.tensor([0.5] * 2 + [-0.4] * 4).view(-1, 1, 1, 1), torch.tensor([0.6] * 2 + [2.0] * 4).view(-1, 1)
    pred, logits = 0.9 * x_t + time, 1.3 * x_c.flatten(1)
    d, h = (pred - (a * x_t + time)).square().mean((1, 2, 3)), H((c * x_c.flatten(1)).softmax(1), logits)
    weight = torch.full((6,), 1 / 3) if weighting == "sample" else torch.tensor([1 / 2] * 2 + [1 / 4] * 4)
    for name, value in dict(denoise=(pred - eps).square().mean(), ce=CE(logits, y).mean(), kd=(weight * d).sum(),
                            kd_class=(weight * h).sum()).items():
        close(terms[name], value)
    close(loss, (weight * d).sum() + 0.01 * (pred - eps).square().mean()
          + 0.7 * (weight * h).sum() + 0.01 * 0.7 * CE(logits, y).mean())
    loss.backward()
    assert model.a.grad.abs() > 0 and model.c.grad.abs() > 0
    assert all(p.grad is None for teacher in (old, new) for p in (teacher.a, teacher.c))


@pytest.mark.parametrize("view", [True, False])
def test_distillation_classifies_nothing_before_its_start(view):
    (x_0, x_c, y), args = batch(), SimpleNamespace(alpha=0.7, kd_weighting="sample")
    models = model, old, new = Stub(0.9), Stub(0.5), Stub(-0.4)
    x_t, t, eps = diffused(x_0)
    x_c = x_c if view else None
    loss, terms = train_jdcl.distillation_losses(args, model, old, new, 3, x_0, x_c, y, ABAR, False)
    assert [m.names() for m in models] == [["denoise"]] * 3 and sorted(terms) == ["denoise", "kd"]
    close(loss, 0.01 * terms["denoise"] + terms["kd"])


def test_one_stage_by_hand():
    """The replayed images distil, the real ones are denoised, all are classified."""
    (x_0, x_c, y), args = batch(), SimpleNamespace(alpha=0.7)
    model, old = Stub(0.9, 1.3), Stub(0.5, 0.6)
    x_t, t, eps = diffused(x_0)
    loss, terms = train_jdcl.one_stage_losses(args, model, old, 2, x_0, x_c, y, ABAR)
    assert torch.equal(old.calls[0][1], x_t[:2]) and torch.equal(old.calls[0][2], t[:2])
    assert torch.equal(old.calls[1][1], x_c[:2])
    pred, logits, time = 0.9 * x_t + t.view(-1, 1, 1, 1) / T, 1.3 * x_c.flatten(1), t.view(-1, 1, 1, 1) / T
    denoise, kd = (pred - eps)[2:].square().mean(), (pred - 0.5 * x_t - time)[:2].square().mean()
    kd_class = H((0.6 * x_c[:2].flatten(1)).softmax(1), logits[:2]).mean()
    for name, value in dict(denoise=denoise, kd=kd, ce=CE(logits, y).mean(), kd_class=kd_class).items():
        close(terms[name], value)
    close(loss, 4 / 6 * denoise + 2 / 6 * kd + 0.7 * (CE(logits, y).mean() + 2 / 6 * kd_class))
    loss.backward()
    assert model.a.grad.abs() > 0 and old.a.grad is None and old.c.grad is None


@pytest.mark.parametrize("world", [2, 3, 4, 8])  # of 6 images, 3 of them old: 2 old and 1, 1 each, and all at each
def test_the_mean_over_processes_is_the_loss_of_one(monkeypatch, world):
    (x_0, x_c, y), old, new = batch(), Stub(0.5, 0.6), Stub(-0.4, 2.0)

    def found(losses):
        model = Stub(0.9, 1.3)
        seed("losses")
        loss, _ = losses(model)
        loss.backward()
        return torch.stack([loss.detach(), model.a.grad, model.c.grad])

    def args(weighting):
        return SimpleNamespace(alpha=0.7, kd_weighting=weighting)

    for losses in (
            lambda model: train_jdcl.joint_losses(args(None), model, x_0, x_c, y, ABAR),
            lambda model: train_jdcl.distillation_losses(args("sample"), model, old, new, 3, x_0, x_c, y, ABAR, True),
            lambda model: train_jdcl.distillation_losses(args("group"), model, old, new, 3, x_0, x_c, y, ABAR, True),
            lambda model: train_jdcl.one_stage_losses(args(None), model, old, 3, x_0, x_c, y, ABAR),
            lambda model: train_jdcl.semi_supervised_losses(args(None), model, x_0, x_c[:5], y[:5], x_c, x_0, ABAR)):
        one, shares = found(losses), []
        for rank in range(world):
            monkeypatch.setattr(run, "rank", rank)
            monkeypatch.setattr(run, "world", world)
            shares.append(found(losses))
        monkeypatch.undo()
        close(torch.stack(shares).mean(0), one)


def test_teachers_get_no_gradient_even_where_they_could():
    model, old, new = (random_net(i, classes=10).train() for i in range(3))
    seed("batch")
    x_0, x_c, y = torch.randn(4, 1, 16, 16), torch.randn(4, 1, 16, 16), torch.arange(4)
    args = SimpleNamespace(alpha=0.7, kd_weighting="sample")
    for loss, _ in (train_jdcl.distillation_losses(args, model, old, new, 1, x_0, x_c, y, ABAR, True),
                    train_jdcl.one_stage_losses(args, model, old, 1, x_0, x_c, y, ABAR)):
        model.zero_grad()
        loss.backward()
        assert all(p.grad is None for teacher in (old, new) for p in teacher.parameters())
        assert all(p.grad.abs().sum() > 0 for name, p in model.named_parameters() if not name.endswith("to_k.bias"))


def test_fixmatch_by_hand():
    """Of five unlabelled images one is sure, one just sure enough and three are not: the mean is over all five."""
    above, below = (torch.tensor([p, *[(1 - p) / 3] * 3]).log() for p in (0.9501, 0.9499))
    x_weak = torch.stack([torch.tensor([0.0, 0, 9, 0]), above, below, torch.zeros(4), torch.tensor([1.0, 0, 0, 2])])
    seed("fixmatch")
    x_0, x_strong, x_l = torch.randn(5, 1, 2, 2), 2 * torch.randn(5, 1, 2, 2), 2 * torch.randn(3, 1, 2, 2)
    x_weak, y_l, model = x_weak.view(5, 1, 2, 2).requires_grad_(), torch.tensor([3, 0, 1]), Stub(0.9)
    x_t, t, eps = diffused(x_0)
    args = SimpleNamespace(alpha=0.7)
    loss, terms = train_jdcl.semi_supervised_losses(args, model, x_0, x_l, y_l, x_weak, x_strong, ABAR)
    unlabelled = CE(x_strong[:2].flatten(1), torch.tensor([2, 0])).sum() / 5
    labelled = CE(x_l.flatten(1), y_l).mean()
    denoise = (0.9 * x_t + t.view(-1, 1, 1, 1) / T - eps).square().mean()
    for name, value in dict(ce=labelled, ce_unlabelled=unlabelled, denoise=denoise).items():
        close(terms[name], value)
    close(loss, denoise + 0.7 * (labelled + unlabelled))
    loss.backward()
    assert x_weak.grad is None, "what an image is taken for is a constant"
    c = torch.ones((), requires_grad=True)
    (CE(c * x_strong[:2].flatten(1), torch.tensor([2, 0])).sum() / 5 + CE(c * x_l.flatten(1), y_l).mean()).backward()
    close(model.c.grad, 0.7 * c.grad)


def test_fixmatchs_threshold_is_inclusive(monkeypatch):
    """With probabilities as they are for a softmax, whose rounding may leave out 0.95."""
    monkeypatch.setattr(torch.Tensor, "softmax", lambda p, dim: p)
    x_weak = torch.tensor([[0.95, 0.05, 0, 0], [0, 0.9499999, 0.05, 0]]).view(2, 1, 2, 2)
    x_strong, args, model = batch(2)[0], SimpleNamespace(alpha=1), Stub()
    _, terms = train_jdcl.semi_supervised_losses(args, model, x_strong, x_strong, torch.tensor([0, 1]), x_weak,
                                                 x_strong, ABAR)
    close(terms["ce_unlabelled"], CE(x_strong.flatten(1), torch.tensor([0, 1]))[0] / 2)


def test_unseen_classes_start_afresh_in_the_last_layer():
    model = random_net(classes=10)
    before, fresh = copy.deepcopy(model.state_dict()), torch.randn(10, 32)
    train_jdcl.forget_unseen(model, fresh, [2, 0, 5])
    after = model.state_dict()
    assert [key for key in before if not torch.equal(before[key], after[key])] == ["head.3.weight"]
    for c in range(10):
        assert torch.equal(after["head.3.weight"][c], (before["head.3.weight"] if c in (0, 2, 5) else fresh)[c])


# ------------------------------------------------------------------------------------------------------ replay

class Figures:
    """A generator whose images are tanh of their noise, so that all of them differ, in eval mode as in any other."""
    in_channels = 1

    def __call__(self, x_T, t):
        a = ABAR[t].view(-1, 1, 1, 1)
        return (x_T - a.sqrt() * x_T.tanh()) / (1 - a).sqrt()


class Parity:
    """A labeller that tells classes 0 .. 4 by the level of the first pixel, modulo 5: half a level changes it."""

    def __init__(self, never=()):
        self.never = never

    def classify(self, x):
        level = ((x[:, 0, 0, 0] + 1) * 127.5).round().long()
        y = level % 5
        for c in self.never:
            y = torch.where(y == c, 0, y)
        return F.one_hot(y, 5).float()


def settings(**more):
    return SimpleNamespace(**{**dict(batch_size=2, replay_per_class=5, replay_cap=1000.0, seed=3, image_size=4,
                                     replay_steps=1, clip=True, flip=False), **more})


def drawn(kept=None, save=lambda batches: None, never=(), classes=(3, 1), **more):
    """What `draw` has kept of classes 3 and 1, with stubs."""
    kept = kept or train_jdcl.nothing_kept(torch.zeros(7, 1, 4, 4, dtype=torch.uint8), 5)
    train_jdcl.draw(settings(**more), Figures(), Parity(never), 2, "old", [*classes], ABAR, kept, save)
    return kept


def test_draw_fills_each_quota_in_order_and_throws_the_rest_away():
    """By hand: batches of 8 times a training batch, each with its own noise; first come, first kept, class by class."""
    kept, wanted, found, n = drawn(replay_per_class=6), {3: [], 1: []}, [0] * 5, 0
    while any(len(images) < 6 for images in wanted.values()):
        seed(3, "replay", 2, "old", n)
        u8 = data.quantize(sample(Figures(), torch.randn(16, 1, 4, 4), ABAR, 1))
        for image in u8:
            c = int(image[0, 0, 0]) % 5
            found[c] += 1
            if c in wanted and len(wanted[c]) < 6:
                wanted[c].append(image)
        n += 16
    assert kept["drawn"] == n > 16 and kept["found"] == found and sum(found) == n and len(kept["images"]) == 12
    assert found[3] > 6 or found[1] > 6, "there was a surplus to throw away"
    for c, images in wanted.items():
        assert torch.equal(kept["images"][kept["labels"] == c], torch.stack(images))
    assert kept["images"].dtype == torch.uint8


def test_labels_are_those_of_the_stored_image():
    kept = drawn(replay_per_class=40)
    assert torch.equal(Parity().classify(data.normalize(kept["images"])).argmax(1), kept["labels"])
    floats = sample(Figures(), torch.randn(100, 1, 4, 4), ABAR, 1)  # which the 8 bits do change
    assert (Parity().classify(floats) != Parity().classify(data.normalize(data.quantize(floats)))).any(1).sum() > 20


def test_the_cap_ends_a_draw():
    """At 2 x 5 x 2 = 20 images or more, here two batches of 16; exactly at it where 16 are allowed."""
    kept = drawn(never=[1], replay_cap=2.0)
    assert kept["drawn"] == 32 and kept["found"][1] == 0 and set(kept["labels"].tolist()) == {3}
    assert drawn(never=[1], replay_cap=2.0, replay_per_class=4)["drawn"] == 16
    assert drawn(never=[1], replay_cap=2.0, replay_per_class=4, classes=[1])["drawn"] == 16


def test_a_draw_goes_on_where_it_was_stopped():
    states, kept = [], train_jdcl.nothing_kept(torch.zeros(7, 1, 4, 4, dtype=torch.uint8), 5)
    whole = drawn(kept, lambda batches: states.append((batches, copy.deepcopy(kept))), replay_per_class=9)
    assert [batches for batches, _ in states] == list(range(1, len(states) + 1)) and len(states) > 2
    for _, state in states:
        again = drawn(kept=state, replay_per_class=9)
        assert torch.equal(again["images"], whole["images"]) and torch.equal(again["labels"], whole["labels"])
        assert again["drawn"] == whole["drawn"] and again["found"] == whole["found"]


def few(sizes, quota=6):
    """What a draw has kept of the classes of `sizes`: so many images each, image j of class c of level 20 c + j, with
    one brighter column that a mirrored copy has on the other side.
    """
    images = [torch.full((1, 4, 4), 20 * c + j, dtype=torch.uint8) for c, n in sizes.items() for j in range(n)]
    for image in images:
        image[..., 0] += 10
    labels = torch.tensor([c for c, n in sizes.items() for _ in range(n)])
    return {"images": torch.stack(images), "labels": labels, "drawn": 99, "found": [7] * 5}


def test_fill_copies_the_images_of_a_class_that_is_short(monkeypatch):
    kept, shares = few({3: 2, 1: 6}), []
    seed(3, "copies", 2, 3)
    own = kept["images"][:2]
    more = data.diffusion_view(own[torch.randint(2, (4,))], True, 0.9)
    images, labels, copies = train_jdcl.fill(settings(replay_per_class=6, flip=True), 2, "old", [3, 1], kept)
    assert copies == [4, 0] and labels.tolist() == [3] * 6 + [1] * 6 and labels.dtype == torch.int64
    assert torch.equal(images, torch.cat([own, more, kept["images"][2:]])) and images.dtype == torch.uint8
    assert set(images[:6].flatten().tolist()) <= {*range(60, 72)}, "copies of its own images"
    assert len(kept["images"]) == 8
    monkeypatch.setattr(data, "diffusion_view", lambda u8, *how: shares.append(how) or u8)
    train_jdcl.fill(settings(replay_per_class=6, flip=True), 2, "old", [3], kept)
    images, _, _ = train_jdcl.fill(settings(replay_per_class=6), 2, "new", [3], kept)
    assert shares == [(True, 0.9), (False, 0.85)]
    assert len({int(image[0, 0, 1]) for image in images[2:]}) == 2, "not always the same one"


def test_a_class_that_never_appears_is_named():
    with pytest.raises(run.InputError, match="none of 99 images drawn for the new classes looks like class 3.*"
                                             "--local-iterations.*--replay-cap") as error:
        train_jdcl.fill(settings(), 2, "new", [1, 3], few({1: 5}))
    assert "\n" not in str(error.value)


# -------------------------------------------------------------------------------------------------- evaluation

def test_correct_answers_are_counted_in_eval_mode_among_all_classes():
    model = random_net(classes=10).train()
    seed("test")
    test = {c: torch.randint(256, (1005, 1, 4, 4), dtype=torch.uint8) for c in (2, 7)}
    right = train_jdcl.count_correct(model, test, [2, 7])
    assert model.training and all(m.training for m in model.modules())
    with torch.no_grad():
        y = {c: model.eval().classify(data.normalize(u8)).argmax(1) for c, u8 in test.items()}
    assert right == {c: int((y[c] == c).sum()) for c in (2, 7)} and len(set(torch.cat([*y.values()]).tolist())) > 1


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
        if r["stage"] == "local":
            close(r["loss"], r["denoise"] + r["ce"])
            assert "kd" not in r and r["denoise"] > 0 and r["ce"] > 0
        elif r["update"] <= 8:  # --classifier-start 2
            close(r["loss"], 0.01 * r["denoise"] + r["kd"])
            assert "ce" not in r and "kd_class" not in r
        else:
            close(r["loss"], 0.01 * (r["denoise"] + r["ce"]) + r["kd"] + r["kd_class"])
            assert r["ce"] > 0 and r["kd_class"] > 0
        u = r["update"] - 6 * (r["stage"] == "global")
        assert ("accuracy" in r) == (u in (4, 6)) and ("accuracy_old_replayed" in r) == (
            u in (4, 6) and r["stage"] == "global")
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
    counts = {flags: saved(finished("--local-init", flags) if flags == "global" else finished(), "local2")["count"]
              for flags in ("global", "scratch")}
    assert counts == {"global": 12, "scratch": 6}, "of the moving average"
    assert ["ce" in r for r in records(finished("--classifier-start", "0"), 2)] == [True] * 12
    heads = {flags: json.loads((finished(*flags) / "accuracy.json").read_text())["parameters"] for flags in (
        (), ("--separate",))}
    resnet = sum(p.numel() for p in eval_fid.resnet18("scratch", 1, 10, 16).parameters())
    assert heads["--separate",]["head"] == resnet != heads[()]["head"]
    assert heads["--separate",]["unet"] == heads[()]["unet"] == sum(p.numel() for p in UNet(**SMALL).parameters())


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

    def averaged(ema, model, n):
        averages.append(copy.deepcopy(ema.state_dict()))
    learn(tmp_path / "run", "--teacher", teacher, distillation_losses=note, update_ema=averaged,
          draw=lambda args, generator, labeller, k, source, *more: labellers.append((
              generator.training, labeller.training, copy.deepcopy(generator.state_dict()),
              copy.deepcopy(labeller.state_dict()))))
    (model, old, new, training, n_old), ema = starts[0], averages[12]
    task1, local = saved(tmp_path / "run", "task1"), saved(tmp_path / "run", "local2")
    weights = {"ema": "model", "raw": "raw"}[teacher]
    assert same(old, task1[weights]) and same(new, local[weights])
    assert training == (True, teacher == "raw", teacher == "raw") and n_old == 4
    for made, (_, labelling, generator, labeller) in zip((task1, local), labellers, strict=True):
        assert same(generator, made["model"]) and same(labeller, made[weights]) and labelling == (teacher == "raw")
    for begun, before in ((model, task1["raw"]), (ema, task1["model"])):
        assert [key for key in begun if not torch.equal(begun[key], before[key])] == ["head.3.weight"]
        changed = (begun["head.3.weight"] != before["head.3.weight"]).all(1)
        assert changed.tolist() == [False] + [True] * 9
    fresh = model["head.3.weight"][1:]
    assert torch.equal(fresh, ema["head.3.weight"][1:]) and fresh.abs().max() <= math.sqrt(6 / (32 + 10))
    assert abs(fresh.std() - math.sqrt(2 / (32 + 10))) < 0.03, "Xavier's"


def coded(monkeypatch):
    """Images whose first two pixels are their number, in views that leave them alone; returns a function that reads the
    numbers from a batch in [-1, 1].
    """
    def load(name, split, data_dir, side):
        n = 60 if split == "train" else 20
        u8 = torch.randint(256, (10 * n, 1, side, side), dtype=torch.uint8)
        u8[:, 0, 0, 0], u8[:, 0, 0, 1] = torch.arange(10 * n) // 256, torch.arange(10 * n) % 256
        return u8, torch.arange(10 * n) % 10
    monkeypatch.setattr(data, "load_images", load)
    for view in ("weak_view", "strong_view"):
        monkeypatch.setattr(data, view, lambda u8, flip: u8)

    def numbers(x):
        level = ((x[:, 0, 0, :2] + 1) * 127.5).round().long()
        return level[:, 0] * 256 + level[:, 1]
    return numbers


@pytest.mark.parametrize("only", [False, True])
def test_the_labelled_images_are_a_balanced_and_fixed_share(tmp_path, monkeypatch, only):
    """A tenth of the 60 images of each class, for 160 draws of 8 among 12; the same for the same seed."""
    numbers, found = coded(monkeypatch), {}

    def run_with(key, name):
        labelled, unlabelled = [], []

        def semi(args, model, x_0, x_l, y_l, x_weak, x_strong, abar):
            assert len(x_l) == 8 and len(x_0) == 56 and torch.equal(y_l, numbers(x_l) % 10)
            assert torch.equal(x_0, x_weak) and torch.equal(x_0, x_strong)
            labelled.append(numbers(x_l))
            unlabelled.append(numbers(x_0))
            return model.conv_in.weight.square().mean(), {}

        def joint(args, model, x_0, x_c, y, abar, on=True):
            assert len(x_0) == 64 and torch.equal(y, numbers(x_0) % 10)
            labelled.append(numbers(x_0))
            return model.conv_in.weight.square().mean(), {}
        with monkeypatch.context() as patch:
            patch.setattr(train_jdcl, "semi_supervised_losses", semi)
            patch.setattr(train_jdcl, "joint_losses", joint)
            learn(tmp_path / name, "--replay", "none", "--class-order", "0,5", "--labels", "0.1", "--batch-size", "64",
                  "--local-iterations", "20", "--eval-every", "20", "--seed", key, *["--labelled-only"] * only)
        return set(torch.cat(labelled).tolist()), set(torch.cat(unlabelled).tolist()) if unlabelled else None
    for name, key in (("a", "1"), ("b", "1"), ("c", "2")):
        found[name], everything = run_with(key, name)
        assert sorted(i % 10 for i in found[name]) == [0] * 6 + [5] * 6
        assert only or everything == {i for i in range(600) if i % 10 in (0, 5)}
    assert found["a"] == found["b"] != found["c"]


@pytest.mark.parametrize("flags, tally", [
    ("--classifier-view weak", {"weak": 6 + 6 + 4}), ("--classifier-view strong", {"strong": 6 + 6 + 4}),
    ("--classifier-view weak --labels 0.5", {"weak": 24 + 4, "strong": 12})])
def test_views(tmp_path, monkeypatch, flags, tally):
    """--crop is of the denoiser's view, by stage; the classifier's may be strong, and FixMatch has views of its own."""
    crops, views = [], []
    monkeypatch.setattr(data, "diffusion_view", lambda u8, flip, smallest: crops.append((flip, smallest)) or u8)
    for view in ("weak", "strong"):
        monkeypatch.setattr(data, f"{view}_view", lambda u8, flip, view=view: views.append((flip, view)) or u8)
    learn(tmp_path / "run", "--flip", "--crop", "0.5,0.7", *flags.split())
    assert crops == [(True, s) for s in [0.5] * 12 + [0.9, 0.85] + [0.7] * 6]
    assert {view: views.count((True, view)) for _, view in views} == tally


def test_fixmatch_gets_weak_and_strong_views(tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(data, "diffusion_view", lambda u8, flip, smallest: torch.full_like(u8, 0))
    monkeypatch.setattr(data, "weak_view", lambda u8, flip: torch.full_like(u8, 10))
    monkeypatch.setattr(data, "strong_view", lambda u8, flip: torch.full_like(u8, 255))
    learn(tmp_path / "run", "--replay", "none", "--labels", "0.5", semi_supervised_losses=lambda
          args, model, x_0, x_l, y_l, x_weak, x_strong, abar: seen.append((x_0, x_l, x_weak, x_strong)))
    levels = [-1, 2 * 10 / 255 - 1, 2 * 10 / 255 - 1, 1]
    assert len(seen) == 12 and [len(x) for x in seen[0]] == [8, 1, 8, 8]
    for batch in seen:
        for x, level in zip(batch, levels):
            close(x, torch.full_like(x, level))


def test_accuracies_are_those_of_the_saved_model(finished):
    """Counted here from task<k>.pt's moving average, over the whole test set and all classes."""
    folder = finished()
    about = json.loads((folder / "accuracy.json").read_text())
    with small():
        test, y = data.load_images("shapes", "test", "data", 16)
    for k, classes in ((1, [0]), (2, [0, 4])):
        model = UNet(**SMALL, classes=10).eval()
        model.load_state_dict(saved(folder, f"task{k}")["model"])
        with torch.no_grad():
            label = model.classify(data.normalize(test)).argmax(1)
        right = {c: int((label[y == c] == c).sum()) for c in classes}
        assert about["correct"][k - 1] == [right[c] for c in classes]
        assert about["tasks"][k - 1]["by_class"] == {str(c): right[c] / 20 for c in classes}
        assert saved(folder, f"task{k}")["history"] == about["tasks"][:k]
        last = records(folder, k)[-1]
        assert last["accuracy"] == sum(right.values()) / 20 / k


# -------------------------------------------------------------------------- a run as a person does it, by subprocess

SHAPES = ("--dataset shapes --scale laptop --device cpu --class-order 0,1|4,9 --batch-size 16 --local-iterations 30 "
          "--global-iterations 12 --classifier-start 4 --replay-per-class 12 --replay-steps 3 --replay-cap 1000 "
          "--alpha 0.3 --lr 0.005 --sample-steps 2 --eval-every 30 --seed 1 --out run").split()


def test_a_whole_run_by_subprocess(script, tmp_path, monkeypatch, capsys):
    """Two tasks of two classes each, and everything that is left of them."""
    done = script("train_jdcl.py", *SHAPES)
    assert done.returncode == 0, done.stderr
    folder = tmp_path / "run"
    assert "next: python eval_fid.py run" in done.stdout and "task 2: average accuracy" in done.stdout
    assert {str(path.relative_to(folder)) for path in folder.rglob("*.*")} >= {
        "config.json", "metrics.jsonl", "accuracy.json", "task1.pt", "task2.pt", "local2.pt", "replay2.pt",
        "samples/task1.png", "samples/task2.png", "samples/replay2.png"}
    assert not [*folder.glob("local1*"), *folder.glob("replay1*")]
    assert [r["update"] for r in records(folder, 2) if r["stage"] == "global"] == list(range(31, 43))
    config = json.loads((folder / "config.json").read_text())
    assert config["class_tasks"] == [[0, 1], [4, 9]] and config["updates"] == [30, 42]
    assert config["method"] == config["schedule"] == "jdcl" and config["clip"]

    for k in (1, 2):
        task = saved(folder, f"task{k}")
        assert {"unet", "image_size", "schedule", "seed", "dataset", "sample_steps"} <= {*task["config"]}
        for weights in (task["model"], task["raw"]):
            UNet(**NETS["jdcl-laptop"], classes=10).load_state_dict(weights)
        assert not torch.equal(task["model"]["conv_in.weight"], task["raw"]["conv_in.weight"])
        picture = np.asarray(Image.open(folder / "samples" / f"task{k}.png"))
        assert picture.std() > 10 and picture.shape == ((8 * 17 + 1) * 2, (8 * 17 + 1) * 2, 3)
    picture = np.asarray(Image.open(folder / "samples/replay2.png"))
    assert picture.std() > 10 and picture.shape == ((4 * 17 + 1) * 2, (10 * 17 + 1) * 2, 3)  # ten of each class

    replay, about = saved(folder, "replay2"), json.loads((folder / "accuracy.json").read_text())
    assert replay["images"].shape == (48, 1, 16, 16) and replay["images"].dtype == torch.uint8
    assert replay["labels"].tolist() == [c for c in (0, 1, 4, 9) for _ in range(12)]
    assert about["tasks"][1]["replay"] == replay["about"] and about["tasks"][0]["replay"] is None
    for source, classes in (("old", (0, 1)), ("new", (4, 9))):
        told = replay["about"][source]
        assert told["drawn"] == sum(told["found"]) and told["drawn"] % 128 == 0 < told["drawn"]
        assert told["copies"] == [max(0, 12 - told["found"][c]) for c in classes]
    logits = replay["about"]["logits"]
    assert sum(logits["real"]["counts"]) == 1000 and sum(logits["replayed"]["counts"]) == 24
    assert len(logits["edges"]) == 41 and logits["edges"] == sorted(logits["edges"])

    assert about["total"] == [1000, 1000] and [len(row) for row in about["correct"]] == [1, 2]
    assert about["matrix"] == [[right / 1000 for right in row] for row in about["correct"]]
    assert about["accuracy"] == [about["matrix"][0][0], sum(about["correct"][1]) / 2000]
    assert about["average_accuracy"] == sum(about["matrix"][1]) / 2
    assert about["average_forgetting"] == about["matrix"][0][0] - about["matrix"][1][0]
    for k, task in enumerate(about["tasks"], 1):
        assert task["task"] == k and task["correct"] == about["correct"][k - 1]
        for classes, right in zip(([0, 1], [4, 9]), task["correct"]):
            close(sum(task["by_class"][str(c)] for c in classes) * 500, right)
    assert about["tasks"][0]["local"] is None
    assert about["tasks"][1]["local"] == saved(folder, "local2")["accuracy"] == records(folder, 2)[29]["accuracy"] > 0.5
    assert about["matrix"][0][0] > 0.5, "two classes out of ten by chance are 0.1"
    *_, head, _, _ = cost("jdcl-laptop", 10)
    assert about["parameters"] == {"unet": cost("jdcl-laptop")[1], "head": head} == {"unet": 287_073, "head": 23_946}

    before = {path: path.read_bytes() for path in folder.rglob("*.*") if path.name != ".lock"}
    monkeypatch.chdir(tmp_path)
    with here():
        train_jdcl.main(SHAPES)  # again
    assert "is finished" in capsys.readouterr().out
    assert {path: path.read_bytes() for path in before} == before


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
    found = {"records": records(folder), "accuracy": json.loads((folder / "accuracy.json").read_text())}
    for path in [*folder.glob("task*.pt"), *folder.glob("local*.pt"), *folder.glob("replay*.pt")]:
        state = torch.load(path, weights_only=True)
        for key in state.keys() & {"model", "raw"}:
            found.update({f"{path.stem} {key} {name}": value for name, value in state.pop(key).items()})
        found.update({f"{path.stem} {key}": value for key, value in state.items() if key != "config"})
    return found | {path.name: path.read_bytes() for path in folder.glob("samples/*.png")}


OFTEN, NEVER = ["--save-every", "2"], ["--save-every", "1000000"]


@pytest.mark.parametrize("flags, save_every, name, call, how, update, samples", [
    ([], OFTEN, "joint_losses", 6 + 4, signal.SIGKILL, 2, 3 + 3 + 1),  # update 4 of stage 1; draws and a picture follow
    ([], OFTEN, "sample", 1 + 3, signal.SIGKILL, 6, 1 + 3 + 1),  # the third batch of old images, of three
    ([], OFTEN, "sample", 1 + 6, signal.SIGKILL, 6, 1 + 1),  # the third batch of new ones
    ([], OFTEN, "distillation_losses", 4, signal.SIGKILL, 6 + 2, 1),  # update 4 of stage 2
    ([], NEVER, "distillation_losses", 4, signal.SIGKILL, 6, 1),  # back to its start
    ([], NEVER, "distillation_losses", 4, signal.SIGTERM, 6 + 4, 1),
    ([], NEVER, "sample", 1 + 2, signal.SIGTERM, 6, 1 + 3 + 1),
    (["--one-stage"], NEVER, "one_stage_losses", 4, signal.SIGKILL, 0, 1),
    (["--separate", "--teacher", "raw"], OFTEN, "distillation_losses", 4, signal.SIGKILL, 6 + 2, 1),
], ids=["local", "old", "new", "global", "start", "term", "term-old", "one-stage", "separate"])
def test_a_run_stopped_inside_task_2_ends_bitwise_as_an_unbroken_one(finished, tmp_path, capsys, flags, save_every,
                                                                     name, call, how, update, samples):
    unbroken, broken, drawn = finished(*flags), tmp_path / "run", []
    told = json.loads((unbroken / "accuracy.json").read_text())["tasks"][1]["replay"]
    assert all(told[source]["drawn"] == 3 * 72 for source in told.keys() & {"old", "new"}), "three batches"
    context = multiprocessing.get_context("forkserver")  # a fork of this process could not train where CUDA is
    context.set_forkserver_preload(["torch", "torchvision", "scipy.linalg"])
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


# ------------------------------------------------------------------------------------ full size, and evaluation

def updated(model, losses, n):
    """n updates of a model with these losses, which are finite; returns them."""
    optimizer, found = torch.optim.AdamW(model.parameters(), 1e-3), []
    for u in range(n):
        seed("update", u)
        loss, terms = losses(u)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        found.append(loss.item())
        assert all(value.isfinite() for value in (loss, *terms.values()))
    assert all(p.isfinite().all() for p in model.parameters())
    return found


def zeros(model):
    """How many of the layers that start at zero are still there."""
    last = [m.conv2 for m in model.modules() if isinstance(m, ResBlock)] + [model.conv_out] + [
        m.to_out[0] for m in model.modules() if isinstance(m, Attention)]
    return sum(bool((layer.weight == 0).all()) for layer in last), len(last)


@pytest.mark.parametrize("name, classes, batches, updates", [("jdcl-cifar", 10, [(2, 32), (2, 32)], 2),
                                                             ("jdcl-imagenet100", 100, [(1, 64), (2, 16)], 1)])
def test_the_papers_networks_at_full_size(name, classes, batches, updates):
    """Both stages learn; ImageNet's net does one update of each, of stage 2 on smaller images."""
    args = SimpleNamespace(alpha=1e-3, kd_weighting="sample")
    seed("full size")
    model = UNet(**NETS[name], classes=classes)
    x_0, x_c = (torch.randn(batches[0][0], 3, batches[0][1], batches[0][1]) for _ in range(2))
    y, before = torch.arange(len(x_0)), zeros(model)
    found = updated(model, lambda u: train_jdcl.joint_losses(args, model, x_0, x_c, y, ABAR), updates)
    assert 0.5 < found[0] < 2, "eps itself, as the net starts at zero, and a thousandth of log(classes)"
    # The first update moves the net's last layer and, through the classifier, all of the encoder; the second the rest.
    assert before[0] == before[1] and zeros(model)[0] == (0 if updates == 2 else sum(
        isinstance(m, (ResBlock, Attention)) for m in model.up_blocks.modules()))
    teacher, kept = copy.deepcopy(model).eval().requires_grad_(False), copy.deepcopy(model.conv_in.weight)
    x_0, x_c = (torch.randn(batches[1][0], 3, batches[1][1], batches[1][1]) for _ in range(2))
    y, half = torch.arange(len(x_0)), len(x_0) // 2
    updated(model, lambda u: train_jdcl.distillation_losses(args, model, teacher, teacher, half, x_0, x_c, y, ABAR,
                                                                True), updates)
    assert not torch.equal(model.conv_in.weight, kept)


@pytest.mark.parametrize("flags", [(), ("--separate",)])
def test_eval_fid_takes_a_run(finished, tmp_path, monkeypatch, flags):
    """Without the head, with the run's own schedule and clipping, by a stub for a labeller."""
    folder = shutil.copytree(finished(*flags), tmp_path / "run")
    seed("labeller")
    head = nn.Linear(16, 10)

    def extract(x):
        return F.adaptive_avg_pool2d(data.normalize(x) if x.dtype == torch.uint8 else x, 4).flatten(1)
    monkeypatch.setattr(eval_fid, "load_labeller", lambda *where: (extract, head.requires_grad_(False), {}))
    args = eval_fid.get_args([str(folder), "--n", "20", "--device", "cpu", "--labeller-path", "stub"])
    with small():
        eval_fid.evaluate_run(folder, args, torch.device("cpu"), None)
    found = json.loads((folder / "eval.json").read_text())
    assert [r["task"] for r in found] == [1, 2] and found[0]["protocol"]["schedule"] == "jdcl"
    for k, r in enumerate(found, 1):
        model = UNet(**SMALL).eval()
        weights = saved(folder, f"task{k}")["model"]
        model.load_state_dict({key: weights[key] for key in model.state_dict()})
        x = sample(model, torch.stack([eval_fid.noise(42, i, (1, 16, 16)) for i in range(20)]), ABAR, 2)
        assert r["counts"] == torch.bincount(head(extract(x)).argmax(1), minlength=10).tolist() and r["frd"] > 0


# ------------------------------------------------------------------------------------------------------ arguments

def test_defaults_are_the_papers_runs():
    args = train_jdcl.get_args([])
    assert (args.dataset, args.unet, args.image_size, args.batch_size, args.lr) == (
        "cifar10", "jdcl-cifar", 32, 256, 2e-4)
    assert (args.local_iterations, args.global_iterations, args.classifier_start) == ([50_000], [30_000], 10_000)
    assert (args.replay_per_class, args.replay_steps, args.clip, args.replay_cap) == (1000, 250, False, 2.0)
    assert (args.alpha, args.classifier_view, args.crop, args.flip) == (1e-3, "strong", [0.85, 0.64], True)
    assert (args.local_init, args.teacher, args.kd_weighting, args.schedule) == ("scratch", "ema", "sample", "jdcl")
    assert args.class_tasks == [[0, 1], [2, 3], [4, 5], [6, 7], [8, 9]] and train_jdcl.BETA == 0.01
    args = train_jdcl.get_args(["--dataset", "imagenet100"])
    assert (args.unet, args.image_size, args.local_init, args.replay_per_class) == (
        "jdcl-imagenet100", 64, "global", 1040)
    assert train_jdcl.get_args(["--replay", "none"]).local_init == "global", "or else nothing would be left"


@pytest.mark.parametrize("arguments, name", [
    ("", "jdcl"), ("--replay all", "jdcl-joint"), ("--replay none", "jdcl-finetune"),
    ("--dataset cifar100", "jdcl"), ("--dataset imagenet100", "jdcl"), ("--dataset fashion-mnist", "jdcl"),
    ("--no-kd", "jdcl-no_kd"), ("--one-stage", "jdcl-one_stage"), ("--separate", "jdcl-separate"),
    ("--labels 0.05", "jdcl-labels0.05"), ("--labels 0.008 --labelled-only", "jdcl-labels0.008-labelled_only"),
    ("--kd-weighting group", "jdcl-kd_weightinggroup"), ("--teacher raw", "jdcl-teacherraw"),
    ("--clip", "jdcl-clip"), ("--no-flip", "jdcl-noflip"), ("--crop 0.85", "jdcl-crop0.85"),
    ("--local-iterations 5,6", "jdcl-local_iterations5_6"), ("--replay-cap 3", "jdcl-replay_cap3.0"),
    ("--scale laptop", "jdcl-laptop"), ("--dataset fashion-mnist --scale laptop", "jdcl-laptop"),
    ("--dataset shapes --scale laptop", "jdcl-laptop")])
def test_run_names(arguments, name):
    assert train_jdcl.get_args(arguments.split()).name == name


@pytest.mark.parametrize("arguments", ["--dataset cifar100 --tasks 2", "--dataset imagenet100 --tasks 1",
                                       "--dataset cifar100 --tasks 2 --replay all", "--dataset cifar10 --tasks 1"])
def test_a_presets_own_numbers_of_updates_are_no_mistake(arguments):
    assert train_jdcl.get_args(arguments.split()).tasks < 3


BAD = """
--dataset mnist
--replay some
--replay none --no-kd
--replay all --no-kd
--replay none --one-stage
--replay all --replay-per-class 5
--replay none --replay-steps 5
--replay none --local-init global
--replay all --replay-cap 3
--replay none --teacher raw
--replay all --global-iterations 5
--replay none --classifier-start 0
--replay none --kd-weighting group
--one-stage --kd-weighting group
--one-stage --classifier-start 0
--one-stage --global-iterations 5
--one-stage --labels 0.5
--one-stage --local-init global
--no-kd --kd-weighting group
--labelled-only
--labels 0
--labels 1.5
--labels nan
--labels few
--labels 0.5 --batch-size 7
--kd-weighting class
--teacher old
--local-init old
--local-iterations 1,1,1,1,1,1
--local-iterations 0
--local-iterations 1.5
--local-iterations 5,
--global-iterations 1,1,1,1,1
--global-iterations -1
--classifier-start -1
--classifier-start soon
--replay-per-class 0
--replay-steps 2000
--replay-steps 0
--replay-cap 0
--replay-cap 1e7
--sample-steps 1001
--scale tiny
--scale laptop --dataset cifar100
--tasks 3
--tasks 0
--class-order 0,1|1,2
--class-order 0,1|2,3 --tasks 3
--class-order 0,1|2,3 --local-iterations 1,1,1
--class-order 0,1|2,3 --global-iterations 1,1
--batch-size 0
--batch-size 1
--lr nan
--alpha 0
--classifier-view none
--crop 0.5,0.6,0.7
--crop 0
--crop 1.1
--crop 0.5,
--crop half
--seed -1
--unet laptop
--unet jdcl-laptop
--dataset fashion-mnist --unet jdcl-cifar
--eval-every 0
--precision fp8
--save-every 0
--device tpu
--re
--unknown""".strip().splitlines()


@pytest.mark.parametrize("arguments", BAD)
def test_bad_arguments_end_with_a_sentence_and_code_2(main, tmp_path, tally, arguments):
    done = main("train_jdcl.py", *arguments.split())
    assert done.returncode == 2 and done.stderr.count("error:") == 1 and "Traceback" not in done.stderr, done.stderr
    assert not any(tmp_path.iterdir()), "no folder is made for a run that cannot start"
    tally["bad commands refused"] += 1
