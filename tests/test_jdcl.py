"""train_jdcl.py and the nets of unet.py that classify: losses by hand, replay by stubs, whole runs, killed, resumed."""

import copy
import functools
import json
import math
import os
import re
import signal
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import left_alone, write_pictures
from PIL import Image
from test_faults import assert_same_end
from torch import nn
from torch.testing import assert_close
from torch.utils.flop_counter import FlopCounterMode

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
CLOCK = {"ms_per_update", "peak_memory_mb", "seconds"}  # what a machine decides
ABAR = alpha_bar("jdcl")
shapes = functools.cache(functools.partial(data.load_images, "shapes"))


def few_shapes(dataset, split, data_dir, side):
    """60 shapes of each class to train with, 20 to test."""
    n = {"train": 600, "test": 200}[split]
    return tuple(x[:n].clone() for x in shapes(split, data_dir, side))


def learn(folder, *flags, **notes):
    """main in this process, in a second; notes[name](...) sees the arguments of each call of train_jdcl.<name>."""
    def tapped(function, note):
        def call(*args, **kwargs):
            note(*args, **kwargs)
            return function(*args, **kwargs)
        return call

    two_stages = [] if "--replay" in flags else REPLAY if "--one-stage" in flags else REPLAY + STAGE_2
    with pytest.MonkeyPatch.context() as patch, left_alone():
        patch.setitem(NETS, "jdcl-laptop", SMALL)
        patch.setattr(data, "load_images", few_shapes)
        for name, note in notes.items():
            patch.setattr(train_jdcl, name, tapped(getattr(train_jdcl, name), note))
        train_jdcl.main([*TINY, *two_stages, *flags, "--out", str(folder)])
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


def random_net(**options):
    """A net without a zero in it, so that no layer could be left out unseen."""
    reseed("net")
    model = UNet(**dict(SMALL, **options))
    with torch.no_grad():
        for p in model.parameters():
            p += 0.1 * torch.randn_like(p)
    return model.eval()


def close(a, b):
    assert_close(torch.as_tensor(a).double(), torch.as_tensor(b).double(), rtol=1e-5, atol=1e-6)


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
    ("jdcl-imagenet100", 100, 64, 114_003_459, 11_610_212, [136.3, 39.1])])
def test_the_papers_counts_and_cost(name, classes, side, parameters, head, gflop):
    with torch.device("meta"), FlopCounterMode(display=False) as counter:
        model = UNet(**NETS[name], classes=classes)
        model.classify(torch.empty(1, 3, side, side))
    assert sum(p.numel() for p in model.parameters()) == parameters + head
    assert {m.dropout.p for m in model.modules() if isinstance(m, ResBlock)} == {0.1}
    assert model.head[0].in_features == 29 * NETS[name]["channels"][0]  # 3712, 5568
    if gflop:
        assert cost(name)[:2] == (side, parameters)
        assert [cost(name)[2], counter.get_total_flops()] == pytest.approx([1e9 * g for g in gflop], rel=1e-3)


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
    model, e, x = UNet(**LIKE_CIFAR, classes=10), torch.randn(2, 32), torch.randn(2, 32, 4, 4)
    for block in model.modules():
        if isinstance(block, Attention):
            assert torch.equal(block(x[:, :16]), x[:, :16])
        if isinstance(block, ResBlock):
            y = x[:, :block.conv1.in_channels]
            assert torch.equal(block(y, e), block.conv_shortcut(y))
    assert not model(torch.randn(2, 3, 16, 16), torch.tensor([0, 999])).any(), "and the net as zero"


def test_film_and_dropout_are_those_of_diffusers():
    from diffusers.models.resnet import ResnetBlock2D

    reseed("film")
    norm = functools.partial(nn.GroupNorm, 2, eps=1e-5)
    block = ResBlock(4, 6, 5, norm, dropout=0.3, film=True)
    for p in block.parameters():
        nn.init.normal_(p)
    peer = ResnetBlock2D(in_channels=4, out_channels=6, temb_channels=5, groups=2, eps=1e-5, dropout=0.3,
                         time_embedding_norm="scale_shift")
    peer.load_state_dict(block.state_dict())
    x, e, out = torch.randn(3, 4, 8, 8), torch.randn(3, 5), []
    for training in (True, False):
        for net in (block, peer):
            reseed("dropout")
            out.append(net.train(training)(x, e))
        assert_close(*out[-2:], rtol=0, atol=1e-3)
    assert out[0].std() > 10 and (out[0] - out[2]).abs().max() > 10, "dropout does something"


# ---------------------------------------------------------------------------------------------- moving average

@pytest.mark.parametrize("n, most, d", [(1, 0.9999, 2 / 11), (10**6, 0.9999, 0.9999), (990, 0.98, 0.98)])
def test_ema_after_update_n(n, most, d):
    reseed("ema")
    ema, model = nn.Linear(5, 4), nn.Linear(5, 4)
    expected = [d * a.double() + (1 - d) * b.double() for a, b in zip(ema.parameters(), model.parameters())]
    train_jdcl.update_ema(ema, model, n, most)
    for a, b in zip(ema.parameters(), expected):
        assert_close(a.double(), b, rtol=0, atol=1e-6 if n < 1000 else 3e-8)  # 1e-4 of a step is to be seen


def test_the_average_has_the_latest_batch_norms_of_a_separate_classifier():
    model = train_jdcl.build(train_jdcl.get_args(["--dataset", "shapes", "--scale", "laptop", "--separate"]))
    ema = copy.deepcopy(model).eval().requires_grad_(False)
    model.classify(torch.randn(4, 1, 16, 16))
    train_jdcl.update_ema(ema, model, 5, 0.9999)
    assert all(torch.equal(a, b) for a, b in zip(ema.buffers(), model.buffers(), strict=True))
    assert ema.head[0].bn1.num_batches_tracked == 1 and ema.head[0].bn1.running_mean.abs().sum() > 0


def test_a_run_averages_every_update_and_keeps_both_models(finished, tmp_path):
    seen, models = [], []
    learn(tmp_path / "run", update_ema=lambda ema, model, n, most: seen.append(n) or models.append((ema, model)))
    assert seen == [*range(1, 7), *range(1, 7), *range(7, 13)], "a local model counts anew, the global one goes on"
    states = {name: saved(tmp_path / "run", name) for name in ("task1", "local2", "task2")}
    assert [state["count"] for state in states.values()] == [6, 6, 12]
    for model, name in zip(models[-1], ("model", "raw")):
        assert same(states["task2"][name], model.state_dict())
        assert same(states["task2"][name], saved(finished(), "task2")[name]), "the same run twice is the same, bitwise"
    assert not any(torch.equal(*pair) for state in states.values() for pair in zip(
        state["model"].values(), state["raw"].values(), strict=True))


# ------------------------------------------------------------------------------------------------------ losses

class Stub:
    """A model that predicts a x_t + t / T, and whose logits are an image's own pixels times c."""

    def __init__(self, a=1.0, c=1.0):
        self.a, self.c = torch.tensor(a, requires_grad=True), torch.tensor(c, requires_grad=True)

    def __call__(self, x_t, t):
        return self.a * x_t + t.view(-1, 1, 1, 1) / T

    def classify(self, x):
        return self.c * x.flatten(1)


def batch(n=6):
    """x_t, t, eps, x_c, y of n images 2x2, each of one of four classes, and t / T for each pixel."""
    reseed("batch")
    x_t, eps, x_c = torch.randn(3, n, 1, 2, 2)
    t = torch.randint(T, (n,))
    return (x_t, t, eps, 3 * x_c, torch.arange(n) % 4), t.view(-1, 1, 1, 1) / T


def H(q, logits):
    return -(q * logits.log_softmax(1)).sum(1)


def CE(logits, y):
    return -logits.log_softmax(1)[torch.arange(len(y)), y]


def settings(weighting="sample"):
    return SimpleNamespace(alpha=0.7, kd_weighting=weighting)


def check(terms, **expected):
    assert set(terms) == set(expected)
    for name, value in expected.items():
        close(terms[name], value)


def test_joint_losses_by_hand():
    ((x_t, t, eps, x_c, y), time), model = batch(), Stub(0.9, 1.3)
    denoise, ce = (0.9 * x_t + time - eps).square().mean(), CE(1.3 * x_c.flatten(1), y).mean()
    terms = train_jdcl.joint_losses(settings(), model, x_t, t, eps, x_c, y)
    check(terms, loss=denoise + 0.7 * ce, denoise=denoise, ce=ce)
    terms = train_jdcl.joint_losses(settings(), model, x_t, t, eps, None, y)
    check(terms, loss=denoise, denoise=denoise)


@pytest.mark.parametrize("weighting", ["sample", "group"])
@pytest.mark.parametrize("on", [True, False])
def test_distillation_by_hand_each_image_from_its_own_teacher(weighting, on):
    """At an image the teacher's prediction is distilled at the student's own x_t and t, its probabilities at x_c."""
    ((x_t, t, eps, x_c, y), time), model, old, new = batch(), Stub(0.9, 1.3), Stub(0.5, 0.6), Stub(-0.4, 2.0)
    terms = train_jdcl.distillation_losses(
        settings(weighting), model, old, new, 2, 2 / 6, x_t, t, eps, x_c if on else None, y)
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
    assert old.a.grad is old.c.grad is new.a.grad is new.c.grad is None, "no teacher gets a gradient"


def test_one_stage_by_hand():
    ((x_t, t, eps, x_c, y), time), model, old = batch(), Stub(0.9, 1.3), Stub(0.5, 0.6)
    terms = train_jdcl.one_stage_losses(settings(), model, old, 2, x_t, t, eps, x_c, y)
    pred, logits = 0.9 * x_t + time, 1.3 * x_c.flatten(1)
    denoise, kd = (pred - eps)[2:].square().mean(), (pred - 0.5 * x_t - time)[:2].square().mean()
    ce, kd_class = CE(logits, y).mean(), H((0.6 * x_c[:2].flatten(1)).softmax(1), logits[:2]).mean()
    check(terms, loss=4 / 6 * denoise + 2 / 6 * kd + 0.7 * (ce + 2 / 6 * kd_class), denoise=denoise, kd=kd, ce=ce,
          kd_class=kd_class)
    terms["loss"].backward()
    assert old.a.grad is old.c.grad is None


def test_fixmatch_by_hand():
    """Of five unlabelled images one is sure, one just sure enough and three are not: the mean is over all five."""
    above, below = (torch.tensor([p, *[(1 - p) / 3] * 3]).log() for p in (0.9501, 0.9499))
    x_weak = torch.stack([torch.tensor([0.0, 0, 9, 0]), above, below, torch.zeros(4), torch.tensor([1.0, 0, 0, 2])])
    ((x_t, t, eps, x_strong, _), time), model = batch(5), Stub(0.9)
    x_weak, x_l, y_l = x_weak.view(5, 1, 2, 2).requires_grad_(), 2 * torch.randn(3, 1, 2, 2), torch.tensor([3, 0, 1])
    terms = train_jdcl.semi_supervised_losses(settings(), model, x_t, t, eps, x_strong, x_l, x_weak, y_l)
    c = torch.ones((), requires_grad=True)
    unlabelled = CE(c * x_strong[:2].flatten(1), torch.tensor([2, 0])).sum() / 5
    labelled, denoise = CE(c * x_l.flatten(1), y_l).mean(), (0.9 * x_t + time - eps).square().mean()
    check(terms, loss=denoise + 0.7 * (labelled + unlabelled), denoise=denoise, ce=labelled, ce_unlabelled=unlabelled)
    terms["loss"].backward()
    assert x_weak.grad is None, "what an image is taken for is a constant"
    (unlabelled + labelled).backward()
    close(model.c.grad, 0.7 * c.grad)


@pytest.mark.parametrize("world", [2, 3, 4, 8])  # of 6 images, 3 of them old: 2 old and 1, 1 each, and all at each
def test_the_mean_over_processes_is_the_loss_of_one(monkeypatch, world):
    whole, old, new = batch()[0], Stub(0.5, 0.6), Stub(-0.4, 2.0)

    def found(losses):
        model, n = Stub(0.9, 1.3), sum(i < 3 for i in run.share(range(6)))
        loss = losses(model, n, *map(run.share, whole))["loss"]
        loss.backward()
        return torch.stack([loss.detach(), model.a.grad, model.c.grad])

    def distil(weighting, model, n, *some):
        return train_jdcl.distillation_losses(settings(weighting), model, old, new, n, 3 / 6, *some)

    for losses in (
            lambda model, n, *some: train_jdcl.joint_losses(settings(), model, *some),
            functools.partial(distil, "sample"), functools.partial(distil, "group"),
            lambda model, n, *some: train_jdcl.one_stage_losses(settings(), model, old, n, *some),
            lambda model, n, x_t, t, eps, x_c, y: train_jdcl.semi_supervised_losses(
                settings(), model, x_t, t, eps, x_t, run.share(whole[3][:5]), x_c, run.share(whole[4][:5]))):
        one, shares = found(losses), []
        for rank in range(world):
            monkeypatch.setattr(run, "rank", rank)
            monkeypatch.setattr(run, "world", world)
            shares.append(found(losses))
        monkeypatch.undo()
        close(torch.stack(shares).mean(0), one)


# ------------------------------------------------------------------------------------------------------ replay

class Figures(nn.Module):
    """A generator whose images are tanh of their noise, so that all of them differ."""

    def forward(self, x_T, t):
        a = ABAR[t].view(-1, 1, 1, 1)
        return (x_T - a.sqrt() * x_T.tanh()) / (1 - a).sqrt()


# Labellers of five classes: by the level of the first pixel, modulo 5, so that half a level changes it; and always 4.
PARITY = SimpleNamespace(classify=lambda x: F.one_hot(((x[:, 0, 0, 0] + 1) * 127.5).round().long() % 5, 5).float())
FOUR = SimpleNamespace(classify=lambda x: F.one_hot(torch.full((len(x),), 4), 5).float())


def draw(tmp_path, classes=(3, 1), drawn=None, side="old", labeller=PARITY, **more):
    """What `draw` returns, of images 4x4 in batches of 16; `drawn` is what a checkpoint had of them."""
    args = dict(batch_size=2, replay_per_class=5, replay_cap=1000.0, seed=3, replay_steps=1, clip=True, flip=False,
                save_every=("updates", 1e9), class_names=[*"abcde"])
    job = SimpleNamespace(args=SimpleNamespace(**args | more), k=2, shape=(1, 4, 4), ema=Figures(), abar=ABAR,
                          device="cpu", autocast=torch.autocast("cpu", enabled=False), folder=tmp_path,
                          state={"task": 2, "update": 0, "drawn": {side: drawn} if drawn else {}})
    return train_jdcl.draw(job, side, [*classes], {"model": {}}, labeller)


def test_draw_fills_each_quota_in_order_and_leaves_the_rest_out(tmp_path):
    """By hand: batches of 8 times a training batch, each with its own noise; first come, first kept, class by class."""
    full, labels, about = draw(tmp_path, replay_per_class=6)
    wanted, found, n = {3: [], 1: []}, [0] * 5, 0
    while any(len(images) < 6 for images in wanted.values()):
        reseed(3, "replay", 2, "old", n)
        for image in data.quantize(sample(Figures(), torch.randn(16, 1, 4, 4), ABAR, 1)):
            c = int(image[0, 0, 0]) % 5  # of the 8-bit image
            found[c] += 1
            if c in wanted and len(wanted[c]) < 6:
                wanted[c].append(image)
        n += 16
    assert about == {"drawn": n, "found": found, "copies": [0, 0]} and sum(found) == n > 16
    assert found[3] > 6 or found[1] > 6, "there was a surplus to leave out"
    assert torch.equal(full, torch.stack(wanted[3] + wanted[1])) and labels.tolist() == [3] * 6 + [1] * 6


@pytest.mark.parametrize("side, smallest", [("old", 0.9), ("new", 0.85)])
@pytest.mark.parametrize("quota, classes, n", [(5, (3, 0), 32), (4, (3, 0), 16), (4, (0,), 16)])
def test_the_cap_ends_a_draw_and_varied_copies_fill_up(tmp_path, quota, classes, n, side, smallest):
    """At 2 x 5 x 2 = 20 images or more; exactly at it where 16 are allowed. A checkpoint had 16 images, two of each
    class among them, and the draw finds no other."""
    images = torch.arange(256).to(torch.uint8).view(16, 1, 4, 4)
    y = torch.tensor([*classes, *classes] + [4] * (16 - 2 * len(classes)))
    full, _, about = draw(tmp_path, classes, (images, y), side, FOUR, replay_per_class=quota, replay_cap=2.0, flip=True)
    found = [2 * (c in classes) for c in range(4)] + [n - 2 * len(classes)]
    assert about == {"drawn": n, "found": found, "copies": [quota - 2] * len(classes)}
    for c, some in zip(classes, full.split(quota), strict=True):
        reseed(3, "copies", 2, c)
        more = data.diffusion_view(images[y == c][torch.randint(2, (quota - 2,))], True, smallest)
        assert torch.equal(some, torch.cat([images[y == c], more]))


def test_a_class_that_no_image_shows_is_lost(tmp_path, capsys):
    full, labels, about = draw(tmp_path, [4, 1], labeller=FOUR, replay_cap=2.0)
    assert "none of 32 old images looks like b to the model: stage 2 goes on without" in capsys.readouterr().out
    assert labels.tolist() == [4] * 5 and len(full) == 5
    assert about == {"drawn": 32, "found": [0, 0, 0, 0, 32], "copies": [0]}
    with pytest.raises(run.InputError, match="none of 32 new images looks like d, b .*--local-iter.*--replay-cap"):
        draw(tmp_path, [3, 1], side="new", labeller=FOUR, replay_cap=2.0)


# -------------------------------------------------------------------------------------------------- whole runs

def test_summary_by_hand():
    found = train_jdcl.summary([[8], [10, 6], [2, 9, 5]], [10, 20, 5])
    assert found["matrix"] == [[0.8], [1.0, 0.3], [0.2, 0.45, 1.0]]
    close(found["accuracy"], [8 / 10, 16 / 30, 16 / 35])
    close(found["average_accuracy"], (0.2 + 0.45 + 1) / 3)
    close(found["average_forgetting"], (0.8 - 0.15) / 2)  # from the best so far; what grew counts against it
    assert train_jdcl.summary([[8]], [10])["average_forgetting"] is None


def test_what_a_run_leaves_and_that_once_is_enough(finished, capsys):
    folder = finished()
    assert {str(path.relative_to(folder)) for path in folder.rglob("*.*")} - {".lock"} == {
        "config.json", "metrics.jsonl", "accuracy.json", "task1.pt", "task2.pt", "local2.pt", "replay2.pt",
        *(f"samples/{name}.png" for name in ("task1", "task2", "replay2"))}
    config = read(folder, "config.json")
    assert config["updates"] == [6, 12] and config["preset_updates"] == [400, 800] and config["schedule"] == "jdcl"
    assert re.fullmatch(r"[0-9a-f]{40}(-dirty)?", config["commit"] or "0" * 40)  # None without git
    assert [config[key] for key in ("method", "base", "title", "dataset_name")] == ["jdcl", "jdcl", "JDCL", "shapes"]
    assert config["departs"].keys() == {flag.strip("-").replace("-", "_") for flag in (*TINY, *REPLAY, *STAGE_2)
                                        if flag[0] == "-"} - {"dataset", "scale", "device"}
    for k in (1, 2):
        assert set(saved(folder, f"task{k}")) == {"task", "model", "raw", "count", "history", "memory", "config"}
    for name, rows, columns in ("task1", 8, 8), ("task2", 8, 8), ("replay2", 2, 10):  # ten images of each class
        picture = np.asarray(Image.open(folder / "samples" / f"{name}.png"))
        assert picture.std() > 10 and picture.shape == ((rows * 17 + 1) * 2, (columns * 17 + 1) * 2, 3)
    before = {path: path.read_bytes() for path in folder.rglob("*.*") if path.name != ".lock"}
    learn(folder)
    assert "is finished" in capsys.readouterr().out and {path: path.read_bytes() for path in before} == before


def test_accuracies_and_logits_are_those_of_the_saved_model(finished):
    """Computed here from task<k>.pt's moving average, over the whole test set and all classes."""
    folder, (test, y) = finished(), few_shapes("shapes", "test", "data", 16)
    about, replay = read(folder, "accuracy.json"), saved(folder, "replay2")
    assert replay["images"].dtype == torch.uint8 and replay["labels"].tolist() == [0] * 150 + [4] * 150
    for k, classes in ((1, [0]), (2, [0, 4])):
        model, task, last = UNet(**SMALL, classes=10).eval(), saved(folder, f"task{k}"), records(folder, k)[-1]
        model.load_state_dict(task["model"])
        with torch.no_grad():
            logits = model.classify(data.normalize(test))
            old = model.classify(data.normalize(replay["images"][:150]))
        right, told = [int((logits.argmax(1)[y == c] == c).sum()) for c in classes], about["tasks"][k - 1]
        assert about["correct"][k - 1] == told["correct"] == right and about["total"] == [20, 20]
        assert told["by_class"] == last["accuracy_by_class"] == {str(c): n / 20 for c, n in zip(classes, right)}
        assert last["accuracy"] == sum(right) / 20 / k and last["accuracy_task1"] == right[0] / 20
        assert task["history"] == about["tasks"][:k]
        if k == 1:  # it has drawn the replay
            h, largest = replay["about"]["logits"], {"real": logits[y == 0].amax(1), "replayed": old.amax(1)}
            both = torch.cat([*largest.values()])
            close(h["edges"], torch.linspace(both.min(), both.max(), 41))
            for kind, x in largest.items():
                assert sum(h[kind]["counts"]) == len(x) == {"real": 20, "replayed": 150}[kind]
                close([h[kind]["mean"], h[kind]["sd"]], [x.mean(), x.std()])
    assert last["accuracy_old_real"] == right[0] / 20 and about["matrix"][0][0] > 0.5, "by chance it is 0.1"
    assert last["accuracy_old_replayed"] == (old.argmax(1) == 0).sum().item() / 150
    assert told["replay"] == replay["about"] and told["local"] == saved(folder, "local2")["accuracy"]
    for side in ("old", "new"):
        told = replay["about"][side]
        assert told["drawn"] == sum(told["found"]) == 3 * 72 and told["copies"] == [0]


def test_one_replayed_image_of_a_class_is_enough(tmp_path):
    folder = learn(tmp_path / "run", "--replay-per-class", "1")
    assert read(folder, "accuracy.json")["tasks"][1]["replay"]["logits"]["replayed"]["sd"] == 0


def test_records_tell_the_stages_and_what_their_losses_are(finished):
    stages = [(1, u, "local") for u in range(1, 7)] + [(2, u, "local" if u < 7 else "global") for u in range(1, 13)]
    for r, stage in zip(records(finished()), stages, strict=True):
        u = r["update"] - 6 * (r["stage"] == "global")
        assert (r["task"], r["update"], r["stage"]) == stage
        assert ("kd" in r) == (r["stage"] == "global") and ("kd_class" in r) == (r["update"] > 8)  # it starts at 2
        assert ("ce" in r) == ("kd_class" in r or r["stage"] == "local")
        assert ("accuracy" in r) == (u in (4, 6)) and ("accuracy_old_replayed" in r) == ("accuracy" in r and "kd" in r)
        if stage == (2, 6, "local"):
            assert list(r["accuracy_by_class"]) == ["4"] and "accuracy_task1" not in r


ALL = {"denoise", "ce", "kd", "kd_class"}
ABLATIONS = [  # flags, whether task 1 stays as it is, the stages of task 2, the terms of its last record
    ("--no-kd", True, "lg", {"denoise", "ce"}), ("--one-stage", True, "g", ALL), ("--separate", False, "lg", ALL),
    ("--one-stage --no-kd", True, "g", {"denoise", "ce"}),
    ("--kd-weighting group", True, "lg", ALL), ("--teacher raw", True, "lg", ALL),
    ("--local-init global", True, "lg", ALL), ("--classifier-start 0", True, "lg", ALL),
    ("--labels 0.1 --labelled-batch 1", False, "lg", ALL), ("--labels 0.1 --labelled-only", False, "lg", ALL),
    ("--replay none", True, "l", {"denoise", "ce"}), ("--replay all", True, "l", {"denoise", "ce"})]


@pytest.mark.parametrize("flags, first, stages, terms", ABLATIONS)
def test_every_ablation_does_something(finished, flags, first, stages, terms):
    usual, folder = finished(), finished(*flags.split())
    tasks = [[saved(f, f"task{k}")["model"]["conv_in.weight"] for f in (usual, folder)] for k in (1, 2)]
    assert torch.equal(*tasks[0]) == first and not torch.equal(*tasks[1])
    two = records(folder, 2)
    assert "".join(r["stage"][0] for r in two) == "".join(stage * 6 for stage in stages)
    assert {name for name in two[-1] if name in {"ce_unlabelled", *ALL}} == terms
    assert ("ce_unlabelled" in two[0]) == (flags == "--labels 0.1 --labelled-batch 1")
    files = ["local2.pt"] * (stages == "lg") + ["replay2.pt"] * ("g" in stages) + ["task1.pt", "task2.pt"]
    assert sorted(path.name for path in folder.glob("*.pt")) == files


def test_what_single_ablations_do(finished):
    usual, one_stage = (saved(finished(*flags), "replay2") for flags in ((), ("--one-stage",)))
    assert torch.equal(usual["images"][:150], one_stage["images"]) and set(one_stage["labels"].tolist()) == {0}
    assert saved(finished("--local-init", "global"), "local2")["count"] == 12, "its moving average goes on"
    joint, separate = (read(finished(*flags), "accuracy.json")["parameters"] for flags in ((), ("--separate",)))
    unet, resnet = (sum(p.numel() for p in net.parameters()) for net in (UNet(**SMALL), resnet18(1, 10, 16)))
    assert separate == {"unet": unet, "head": resnet} and joint["unet"] == unet
    whole = unet + joint["head"]
    for flags, held in ("--replay all", 2 * whole), ("--one-stage", 3 * whole), ("", 4 * whole):
        assert read(finished(*flags.split()), "config.json")["parameters"] == held


@pytest.mark.parametrize("replay, classes", [("none", {4}), ("all", {0, 4})])
def test_what_task_2_sees_of_task_1_without_a_model(tmp_path, replay, classes):
    seen, weights = [], []

    def note(args, model, x_t, t, eps, x_c, y):
        seen.append(set(y.tolist()))
        weights.append(copy.deepcopy(model.state_dict()))
    learn(tmp_path / "run", "--replay", replay, joint_losses=note)
    assert len(seen) == 12 and set().union(*seen[:6]) == {0} and set().union(*seen[6:]) == classes
    assert same(weights[6], saved(tmp_path / "run", "task1")["raw"]), "it goes on from task 1, head and all"


@pytest.mark.parametrize("teacher", ["ema", "raw"])
def test_how_stage_2_starts(tmp_path, teacher):
    """From the global model of task 1 with fresh rows for the classes not seen, taught by the wanted weights."""
    starts, averages, labellers = [], [], []

    def note(args, model, old, new, n, part, x_t, t, eps, x_c, y):
        if not starts:
            starts.extend(copy.deepcopy(m.state_dict()) for m in (model, old, new))
        assert (model.training, old.training, new.training) == (True, teacher == "raw", teacher == "raw")
        assert n == 4 and part == 4 / 9 and y[:4].eq(0).all() and y[4:].eq(4).all() and len(x_t) == 9

    learn(tmp_path / "run", "--teacher", teacher, distillation_losses=note,
          update_ema=lambda ema, model, n, most: averages.append(copy.deepcopy(ema.state_dict())),
          draw=lambda job, side, classes, drawer, labeller: labellers.append((
              copy.deepcopy(drawer["model"]), labeller.training, copy.deepcopy(labeller.state_dict()))))
    (model, old, new), ema = starts, averages[12]
    task1, local = saved(tmp_path / "run", "task1"), saved(tmp_path / "run", "local2")
    weights = {"ema": "model", "raw": "raw"}[teacher]
    assert same(old, task1[weights]) and same(new, local[weights])
    for made, (drawer, labelling, labeller) in zip((task1, local), labellers, strict=True):
        assert same(drawer, made["model"]) and same(labeller, made[weights]) and labelling == (teacher == "raw")
    for begun, before in ((model, task1["raw"]), (ema, task1["model"])):
        assert [key for key in begun if not torch.equal(begun[key], before[key])] == ["head.3.weight"]
        changed = (begun["head.3.weight"] != before["head.3.weight"]).all(1)
        assert changed.tolist() == [False] + [True] * 9
    fresh = model["head.3.weight"][1:]
    assert torch.equal(fresh, ema["head.3.weight"][1:]) and fresh.abs().max() <= math.sqrt(6 / (32 + 10))
    assert abs(fresh.std() - math.sqrt(2 / (32 + 10))) < 0.03, "Xavier's"


@pytest.mark.parametrize("only", [[], ["--labelled-only"]])
def test_the_labelled_images_are_a_balanced_and_fixed_share(tmp_path, only):
    def pools(name, seed):
        found = []
        learn(tmp_path / name, "--replay", "none", "--class-order", "0,5", "--labels", "0.1", "--seed", seed, *only,
              of_classes=lambda images, classes: found.append(images))
        return found[:2 - len(only)]  # later ones are of the test images

    (*real, labelled), again, other = pools("a", "1"), pools("b", "1")[-1], pools("c", "2")[-1]
    assert all(map(torch.equal, labelled, again)) and not torch.equal(labelled[0], other[0])
    train, y = few_shapes("shapes", "train", "data", 16)
    for c in (0, 5):
        few, there = ({tuple(image.flatten().tolist()) for image in u8[of == c]} for u8, of in (labelled, (train, y)))
        assert (labelled[1] == c).sum() == len(few) == 6 and few < there and len(there) == 60
    assert all(torch.equal(u8, train) for u8, _ in real)


@pytest.mark.parametrize("view, labels, names, tally", [
    ("weak", [], ["weak"], {"weak": 6 + 6 + 4}), ("strong", [], ["strong"], {"strong": 6 + 6 + 4}),
    ("weak", ["--labels", "0.5", "--labelled-batch", "3"], ["strong", "weak", "weak"], {"weak": 24 + 4, "strong": 12})])
def test_views(tmp_path, monkeypatch, view, labels, names, tally):
    """The denoiser's view is cropped by stage; the classifier's may be strong, and FixMatch has views of its own."""
    crops, views, level = [], [], {"weak": 2 * 10 / 255 - 1, "strong": 1}

    def note(args, model, x_t, t, eps, *more):
        close(x_t, q_sample(torch.full_like(x_t, -1), t, eps, ABAR))
        for x, name in zip(more, names):
            close(x, torch.full_like(x, level[name]))
        assert [len(x) for x in (x_t, more[-1])] == ([6, 3] if labels else [9, 9])

    def diffusion_view(u8, flip, smallest):
        crops.append((flip, smallest))
        return torch.full_like(u8, 0) if smallest == 0.5 else u8

    monkeypatch.setitem(train_jdcl.PRESETS["shapes"], "laptop", train_jdcl.LAPTOP | dict(
        crop=[0.5, 0.7], classifier_view=view))
    monkeypatch.setattr(data, "diffusion_view", diffusion_view)
    for name in level:
        monkeypatch.setattr(data, f"{name}_view", lambda u8, flip, name=name: views.append((flip, name)) or (
            torch.full_like(u8, 10 if name == "weak" else 255)))
    learn(tmp_path / "run", "--flip", *labels, joint_losses=note, semi_supervised_losses=note)
    assert crops == [(True, s) for s in [0.5] * 12 + [0.9, 0.85] + [0.7] * 6]
    assert {name: views.count((True, name)) for _, name in views} == tally


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@pytest.mark.parametrize("more", [[], ["--labels", "0.05"], ["--one-stage"], ["--separate"], ["--no-kd", "--flip"]])
def test_a_run_on_cuda(script, tmp_path, more):
    command = [flag if flag != "cpu" else "cuda" for flag in (*TINY, *REPLAY, *more)]
    command += STAGE_2 if "--one-stage" not in more else []
    command[command.index("9")] = "16"
    for out, flags in ("default", []), ("plain", ["--precision", "fp32", "--no-compile"]):
        script("train_jdcl.py", *command, *flags, "--out", out, timeout=900)
    for one, two in zip(records(tmp_path / "default", 1), records(tmp_path / "plain", 1)):
        assert one["denoise"] == pytest.approx(two["denoise"], rel=0.1)


# ----------------------------------------------------------------------------------------------- killed and resumed

OFTEN, NEVER = ["--save-every", "2"], ["--save-every", "1000000"]


@pytest.mark.parametrize("flags, save_every, name, call, how, update, samples", [
    ([], OFTEN, "sample", 1 + 3, KeyboardInterrupt, 6, 1 + 3 + 1),  # the third batch of old images, of three; a picture
    ([], NEVER, "sample", 1 + 3 + 2, SystemExit, 6, 1 + 1),  # the second batch of new images, which is saved
    ([], NEVER, "distillation_losses", 4, KeyboardInterrupt, 6, 1),  # back to the start of stage 2
    (["--one-stage"], NEVER, "one_stage_losses", 4, KeyboardInterrupt, 0, 1),
    (["--separate", "--teacher", "raw"], OFTEN, "distillation_losses", 4, KeyboardInterrupt, 6 + 2, 1),
], ids=["old", "new", "start", "one-stage", "separate"])
def test_a_run_stopped_inside_task_2_ends_bitwise_as_an_unbroken_one(finished, tmp_path, capsys, flags, save_every,
                                                                     name, call, how, update, samples):
    """An exception stops it as SIGKILL would, SIGTERM after a save; tests/test_faults.py kills in earnest."""
    unbroken, broken, drawn, calls = finished(*flags), tmp_path / "run", [], []
    told = read(unbroken, "accuracy.json")["tasks"][1]["replay"]
    assert all(told[side]["drawn"] == 3 * 72 for side in told.keys() & {"old", "new"}), "three batches"

    def stop(*args, **kwargs):
        calls.append(name)
        if len(calls) == call and how is KeyboardInterrupt:
            raise how
        if len(calls) == call:
            os.kill(os.getpid(), signal.SIGTERM)
    with pytest.raises(how):
        learn(broken, *flags, *save_every, **{name: stop})
    assert (broken / "task1.pt").exists() and not (broken / "task2.pt").exists()
    learn(broken, *flags, *save_every, sample=lambda *args, **kwargs: drawn.append(1))
    assert re.search(r"going on from task 2, update (\d+)", capsys.readouterr().out)[1] == str(update)
    assert len(drawn) == samples
    assert_same_end(unbroken, broken)


# ------------------------------------------------------------------------------------------------------ arguments

def test_defaults_are_the_papers_runs(tmp_path):
    """Those that a flag sets are in test_arguments.py."""
    args = train_jdcl.get_args([])
    assert (args.clip, args.classifier_view, args.crop) == (False, "strong", [0.85, 0.64])
    for i in range(100):
        write_pictures(tmp_path / f"imagenet100/train/n{i}", 1)
        write_pictures(tmp_path / f"imagenet100/val/n{i}", 1)
    args = train_jdcl.get_args(["--dataset", "imagenet100", "--data-dir", str(tmp_path)])
    assert (args.unet, args.image_size, args.local_init, args.replay_per_class, args.crop) == (
        "jdcl-imagenet100", 64, "global", 1040, [0.85, 0.85])


@pytest.mark.parametrize("flags, stages", [
    ("", [(7, 0), (8, 5), (8, 6), (8, 6)]), ("--one-stage", [(7, 0), (0, 8), (0, 8), (0, 8)]),
    ("--replay all", [(7, 0), (8, 0), (8, 0), (8, 0)]), ("--tasks 1", [(7, 0)])])
def test_updates_of_the_stages(flags, stages):
    args = train_jdcl.get_args(["--class-order", "0|1|2|3", *flags.split()])
    assert train_jdcl.count_updates(args, {"local_iterations": [7, 8], "global_iterations": [5, 6]}) == stages


def test_colour_pictures_of_ones_own(tmp_path, main):
    for c, images in enumerate(np.random.default_rng(0).integers(0, 256, (3, 6, 20, 30, 3), np.uint8)):
        write_pictures(tmp_path / f"photos/class{c}", images)
    flags = "--dataset photos --scale small --device cpu --tasks 3 --local-iterations 2 --batch-size 4 --sample-steps 1"
    main("train_jdcl.py", *flags.split(), "--replay", "none", "--out", "run", "--image-size", 12)
    config = json.loads((tmp_path / "run/config.json").read_text())
    assert config["class_names"] == ["class0", "class1", "class2"] and config["unet"] == "jdcl-laptop-rgb"
