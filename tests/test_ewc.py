"""Rank-1 elastic weight consolidation against closed forms, and its runs."""

import json
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch.nn.utils import parameters_to_vector
from torch.testing import assert_close

import data
import train_ewc
from ddim import alpha_bar, reseed
from unet import NETS, UNet

TINY = dict(NETS["laptop"], channels=(8, 8), groups=4)
TASKS = "--dataset shapes --scale laptop --class-order 0|1 --batch-size 8 --sample-steps 1".split()


def options(**more):
    return SimpleNamespace(**{**dict(seed=42, flip=False, compile=False, batch_size=8, source="mean", ewc_images=1000,
                                     fisher_images=6), **more})


def test_the_gradient_is_that_of_the_denoising_loss():
    model, abar, u8 = UNet(**TINY), alpha_bar(), torch.randint(256, (5, 1, 16, 16), dtype=torch.uint8)
    for _ in range(2):  # the first leaves gradients behind
        reseed("draws")
        found = train_ewc.gradient(options(), model, u8, abar, nullcontext())
    reseed("draws")
    x_t, t, eps = train_ewc.diffuse(data.normalize(u8), abar)
    expected = torch.autograd.grad(F.mse_loss(model(x_t, t), eps), list(model.parameters()))
    assert_close(found, torch.cat([g.flatten() for g in expected]))


def test_direction_curvature_and_share_of_known_gradients(monkeypatch):
    """Each image has a gradient of its own, (its level, 1, 0, ...), so that all can be computed by hand."""
    def gradient(args, model, u8, abar, autocast):
        seen.append(u8[:, 0, 0, 0].tolist())
        g = torch.zeros(9)
        g[0], g[1] = u8[:, 0, 0, 0].float().mean(), 1
        return g
    monkeypatch.setattr(train_ewc, "gradient", gradient)
    model, seen = torch.nn.Linear(8, 1), []
    u8 = torch.arange(26, dtype=torch.uint8).view(26, 1, 1, 1).expand(-1, 1, 16, 16)
    u, c, at, share = train_ewc.consolidate(options(), model, u8, None, None, 1).values()
    alone, together = [level for some in seen if len(some) == 1 for level in some], sum(seen[:3], [])
    assert [len(some) for some in seen] == [8, 8, 4] + [1] * 6 and sorted(alone + together) == list(range(26))
    mu = torch.tensor([sum(together) / 20, 1] + [0] * 7)
    g = torch.tensor([[level, 1] + [0] * 7 for level in alone]).float()
    fisher = g.T @ g / 6
    assert_close(u, mu / mu.norm())
    assert_close(c, u @ fisher @ u)
    assert_close(c * (u @ mu) ** 2, mu @ fisher @ mu)  # c mu mu^T of the paper: E[(mu . g)^2] / |mu|^4
    assert_close(at, u @ parameters_to_vector(model.parameters()).detach())
    assert_close(share, c / fisher.trace())
    assert not at.requires_grad

    u, same, _, share = train_ewc.consolidate(options(source="random"), model, u8, None, None, 1).values()
    assert u.norm() == pytest.approx(1) and u[2:].abs().max() > 0.1 and share < 0.9
    assert_close(same, c)  # as strong as with the mean gradient
    assert_close(share, u @ fisher @ u / fisher.trace())


def test_the_loss_has_the_penalty_of_all_old_tasks(main, monkeypatch, tmp_path):
    monkeypatch.setitem(NETS, "laptop", TINY)
    common = [*TASKS, "--ewc", "3", "--ewc-images", "40", "--fisher-images", "5"]
    for out, n in ("one", "6,1"), ("two", "6,2"):
        main("train_ewc.py", *common, "--iterations", n, "--out", out)
    records = [json.loads(line) for line in (tmp_path / "two/metrics.jsonl").read_text().splitlines()]
    first, second = [r for r in records if r["task"] == 2]
    task1, moved = (torch.load(tmp_path / name, weights_only=True) for name in ("two/task1.pt", "one/task2.pt"))
    u, c, at, share = task1["memory"][1].values()
    model = UNet(**TINY)
    model.load_state_dict(moved["model"])
    theta = parameters_to_vector(model.parameters()).detach()
    assert first["loss_ewc"] == pytest.approx(0, abs=1e-12)
    assert second["loss_ewc"] == pytest.approx(float(c / 2 * (u @ theta - at) ** 2), rel=1e-2) and 0 < share < 1
    for r in first, second:
        assert r["loss"] == pytest.approx(r["loss_new"] / 2 + 0.75 / 2 * r["loss_replay"] + 3 * r["loss_ewc"], rel=1e-5)
    assert len(moved["memory"]) == 2


def test_without_a_weight_it_is_distillation(main, monkeypatch, tmp_path):
    monkeypatch.setitem(NETS, "laptop", TINY)
    short, few = [*TASKS, "--iterations", "3,4"], ["--ewc-images", "16", "--fisher-images", "2"]
    main("train_gd.py", *short, "--out", "gd")
    main("train_ewc.py", *short, *few, "--ewc", "0", "--out", "zero")
    gd, zero = (torch.load(tmp_path / name / "task2.pt", weights_only=True)["model"] for name in ("gd", "zero"))
    assert all(torch.equal(gd[name], zero[name]) for name in gd)
