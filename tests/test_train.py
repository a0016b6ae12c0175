"""The losses of train_gr.py and train_gd.py, their presets, and whole runs, killed and resumed.

Run: python -m pytest tests/test_train.py
"""

import difflib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import urllib.request
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from conftest import ROOT
from PIL import Image
from torch.testing import assert_close

import data
import run
import train_gd
import train_gr
from ddim import T, alpha_bar, q_sample, reseed, sample
from unet import NETS, UNet

TINY = ["--dataset", "shapes", "--scale", "laptop", "--batch-size", "8", "--device", "cpu"]


def net(name=1):
    reseed("weights", name)
    return UNet(**NETS["laptop"]).eval()


def batch(n=4):
    reseed("batch")
    return data.normalize(torch.randint(256, (n, 1, 16, 16), dtype=torch.uint8))


# ------------------------------------------------------------------------------------------------ arguments

def test_defaults_are_the_papers_runs():
    args = train_gd.get_args([])
    assert (args.dataset, args.unet, args.image_size) == ("fashion-mnist", "fashion-mnist", 32)
    assert (args.batch_size, args.length) == (128, ("epochs", [100]))
    assert (args.teacher_steps, args.sample_steps, args.lam, args.lr, args.tasks) == (2, 10, 0.75, 2e-4, 5)
    assert (args.schedule, args.draw_ahead, args.flip) == ("zero-snr", 8, False)
    args = train_gd.get_args(["--dataset", "cifar10"])
    assert (args.unet, args.batch_size, args.length) == ("cifar10", 64, ("epochs", [200]))
    assert (args.teacher_steps, args.sample_steps) == (10, 20)
    assert args.flip and not train_gd.get_args(["--dataset", "cifar10", "--no-flip"]).flip


@pytest.mark.parametrize("run_seed, order", [(42, [[2, 6], [1, 8], [4, 5], [0, 9], [3, 7]]),
                                             (69, [[0, 2], [3, 5], [4, 1], [6, 9], [8, 7]]),
                                             (1714, [[7, 3], [8, 0], [1, 4], [6, 2], [9, 5]])])
def test_class_orders_of_the_papers_seeds(run_seed, order):
    assert train_gr.get_args(["--seed", str(run_seed)]).class_tasks == order


@pytest.mark.parametrize("script, arguments, name", [
    (train_gr, "", "gr-2"), (train_gr, "--dataset cifar10", "gr-10"), (train_gr, "--teacher-steps 100", "gr-100"),
    (train_gr, "--replay none", "finetune"), (train_gr, "--replay all", "joint"),
    (train_gr, "--replay buffer --buffer-size 100", "er-100"),
    (train_gr, "--replay none --lr 0.001 --schedule linear", "finetune-lr0.001-linear"),
    (train_gr, "--replay all --tasks 1 --batch-size 64", "joint-batch_size64-tasks1"),
    (train_gd, "", "gd-2"),
    (train_gd, "--teacher-steps 5 --teacher-solver ipndm --first-step analytic", "gd-5-ipndm-analytic"),
    (train_gd, "--dataset cifar10 --teacher-steps 10 --lambda 0.75", "gd-10"),
    (train_gd, "--lambda 0.5", "gd-2-lam0.5"), (train_gd, "--scale laptop", "gd-2-laptop"),
    (train_gd, "--distill current", "lwf"), (train_gd, "--distill noise", "noise"),
    (train_gd, "--precision bf16 --iterations 5,3", "gd-2-iterations5_3-bf16"),
    (train_gd, "--precision fp32 --no-compile", "gd-2-fp32"), (train_gd, "--draw-ahead 1", "gd-2-draw_ahead1"),
    (train_gd, "--scale small --class-order natural --tasks 5", "gd-2-class_ordernatural-small"),
    (train_gd, "--scale laptop --tasks 3", "gd-2-laptop"),
    (train_gd, "--scale laptop --epochs 20", "gd-2-epochs20.0-laptop"),
    (train_gd, "--scale laptop --tasks 1", "gd-2-tasks1-laptop"), (train_gd, "--flip", "gd-2-flip"),
    (train_gd, "--unet laptop", "gd-2-unetlaptop"), (train_gd, "--image-size 64", "gd-2-image_size64"),
    (train_gd, "--class-order 0,1|2,7", "gd-2-class_order0_1-2_7"),
    (train_gd, "--class-order 0,1|2,7 --tasks 1 --seed 69", "gd-2-tasks1-class_order0_1-2_7")])
def test_run_names(script, arguments, name):
    assert script.get_args(arguments.split()).name == name


@pytest.mark.parametrize("arguments, class_tasks", [
    ("--scale laptop", [[0, 1], [2, 7], [8, 9]]), ("--scale laptop --tasks 2", [[0, 1], [2, 7]]),
    ("--class-order natural --tasks 2", [[0, 1, 2, 3, 4], [5, 6, 7, 8, 9]]), ("--class-order 4|7,1", [[4], [7, 1]]),
    ("--class-order 4|7,1 --tasks 1", [[4]])])
def test_tasks_are_the_first_of_those_stated_or_cut_the_classes(arguments, class_tasks):
    assert train_gr.get_args(arguments.split()).class_tasks == class_tasks


def test_what_other_scripts_want_to_know_is_in_the_arguments():
    args = train_gd.get_args("--scale laptop --lambda 0.5 --precision bf16 --restart --out x".split())
    assert (args.method, args.base, args.title) == ("gd", "gd-2", "Generative distillation")
    assert args.departs == {"lam": 0.5, "precision": "bf16"}
    assert args.class_names[:3] == ["T-shirt", "trouser", "pullover"]


def test_updates_of_each_task():
    def updates(unit, values, batch_size, *sizes):
        return run.count_updates({"length": (unit, values), "batch_size": batch_size}, [range(n) for n in sizes])

    assert updates("epochs", [100.0], 128, 12000, 12000) == [9400] * 2, "the paper's Fashion-MNIST"
    assert updates("epochs", [200.0], 64, 10000, 10000) == [31400] * 2, "the paper's CIFAR-10"
    assert updates("iterations", [5, 3], 128, 12000, 12000, 12000) == [5, 3, 3]
    assert updates("epochs", [0.001, 1.0], 10, 20, 41, 41) == [1, 5, 5]


def test_lambda_of_each_distillation():
    assert [train_gd.get_args(["--distill", d]).lam for d in ("generated", "current", "noise")] == [0.75, 1.25, 8.0]


# --------------------------------------------------------------------------------------------------- losses

def test_diffuse_is_the_forward_process():
    abar, x_0 = alpha_bar(), batch()
    reseed("test")
    x_t, t, eps = train_gd.diffuse(x_0, abar)
    assert_close(x_t, q_sample(x_0, t, eps, abar), rtol=0, atol=0)
    reseed("test")
    _, t, _ = train_gd.diffuse(torch.zeros(50_000, 1, 1, 1), abar)
    assert t.min() == 0 and t.max() == T - 1
    assert abs(t.float().mean() - (T - 1) / 2) < 5, "uniform over 0 .. T-1"


def both(script, args, model, prev, x_0, kept=None, k=2):
    """The two losses of one batch in task k."""
    abar = alpha_bar()
    reseed("losses")
    x_t, t, eps = script.diffuse(x_0, abar)
    x_r = sample(prev, torch.randn_like(x_0), abar, args.teacher_steps) if args.teacher_steps else None
    more = (x_r, x_0, kept) if script is train_gr else (prev, x_r, x_0, x_t, t)
    return script.losses(model, x_t, t, eps, script.replay(args, *more, abar) if k > 1 else None)


def test_distillation_vanishes_where_student_is_teacher_and_replay_does_not():
    model, x_0 = net(), batch()
    for distill in ("generated", "current", "noise"):
        new, old = both(train_gd, train_gd.get_args(["--scale", "laptop", "--distill", distill]), model, model, x_0)
        assert new > 0.1 and old < 1e-8, distill
    new, old = both(train_gr, train_gr.get_args(["--scale", "laptop"]), model, model, x_0)
    assert new > 0.1 and old > 0.1


def test_losses_written_out_by_hand():
    """Both scripts' losses on a batch equal the paper's Equations 4, 7 and 9 written with separate forwards."""
    model, prev, x_0, abar = net(1), net(2), batch(), alpha_bar()
    args = train_gd.get_args(["--scale", "laptop", "--teacher-steps", "3"])
    reseed("losses")
    t, eps = torch.randint(T, (4,)), torch.randn_like(x_0)
    x_r = sample(prev, torch.randn_like(x_0), abar, 3)
    t_r, eps_r = torch.randint(T, (4,)), torch.randn_like(x_0)
    x_r_t = q_sample(x_r, t_r, eps_r, abar)
    mse = [(eps - model(q_sample(x_0, t, eps, abar), t)).square().mean(),
           (prev(x_r_t, t_r) - model(x_r_t, t_r)).square().mean(), (eps_r - model(x_r_t, t_r)).square().mean()]
    gd, gr = both(train_gd, args, model, prev, x_0), both(train_gr, args, model, prev, x_0)
    assert_close(torch.stack(gd), torch.stack(mse[:2]), rtol=1e-4, atol=1e-6)
    assert_close(torch.stack(gr), torch.stack([mse[0], mse[2]]), rtol=1e-4, atol=1e-6)
    first = both(train_gr, args, model, prev, x_0, k=1)
    assert_close(first[0], mse[0], rtol=1e-4, atol=1e-6)
    assert first[1] == 0


def test_current_data_distillation_needs_one_forward_and_the_teacher_gets_no_gradient():
    model, prev, calls = net(1), net(2), []
    model.register_forward_hook(lambda module, inputs, output: calls.append(len(inputs[0])))
    for distill, sizes in (("current", [4]), ("noise", [8]), ("generated", [8])):
        calls.clear()
        new, old = both(train_gd, train_gd.get_args(["--scale", "laptop", "--distill", distill]), model, prev, batch())
        (new + old).backward()
        assert calls == sizes
        assert all(p.grad is None for p in prev.parameters()), "prev gets no gradient even where it could"
        assert model.conv_in.weight.grad.abs().sum() > 0


def test_experience_replay_draws_from_the_buffer():
    """With a buffer of one grey the replayed batch is that grey, noised; a small buffer makes a small batch."""
    args = train_gr.get_args(["--scale", "laptop", "--replay", "buffer", "--buffer-size", "3"])
    kept, abar = torch.full((3, 1, 16, 16), 200, dtype=torch.uint8), alpha_bar()
    x_r_t, t_r, target_r = train_gr.replay(args, None, batch(), kept, abar)
    assert x_r_t.shape == (3, 1, 16, 16)
    assert_close(x_r_t, q_sample(data.normalize(kept), t_r, target_r, abar))


@pytest.mark.parametrize("size, shares", [(4, [4, 2, 1]), (10, [10, 5, 3])])
def test_the_buffer_has_equal_shares_and_what_was_discarded_never_comes_back(main, tmp_path, size, shares):
    done = main("train_gr.py", *TINY, "--iterations", "1", "--replay", "buffer", "--buffer-size", size, "--out", "run")
    assert done.returncode == 0, done.stderr
    images, labels = data.load_images("shapes", "train", "data", 16)
    before = None
    for k, (share, classes) in enumerate(zip(shares, [[0, 1], [2, 7], [8, 9]]), 1):
        buffer = torch.load(tmp_path / f"run/task{k}.pt", weights_only=True)["memory"]["buffer"]
        assert [len(part) for part in buffer] == [share] * k
        assert all(any(torch.equal(image, of) for of in images[torch.isin(labels, torch.tensor(classes))])
                   for image in buffer[-1]), "its newest images are of the task"
        for part, old in zip(buffer, before or []):
            assert torch.equal(part, old[:share])
        before = buffer


# ------------------------------------------------------------------------------------------------------ devices

@pytest.mark.parametrize("name, index", [("auto", 0), ("cuda", 0), ("cuda:0", 0), ("cuda:2", 2)])
def test_cuda_by_any_name_is_one_that_torch_takes(monkeypatch, name, index):
    chosen = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    monkeypatch.setattr(torch._C, "_cuda_setDevice", chosen.append)
    assert run.pick_device(name).type == "cuda"
    assert chosen == [index]


@pytest.mark.parametrize("asked, has_bf16, found", [
    ("", True, ("bf16", True)), ("", False, ("fp32", False)), ("--precision fp32 --no-compile", True, ("fp32", False)),
    ("--precision tf32", True, ("tf32", True)), ("--precision bf16", False, ("bf16", False)),
    ("--no-compile", True, ("bf16", False)), ("--compile", False, ("fp32", True))])
def test_what_is_fast_is_the_default_where_the_gpu_has_it(monkeypatch, asked, has_bf16, found):
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: has_bf16 or including_emulation)
    monkeypatch.setattr(run, "pick_device", lambda name: torch.device("cuda" if name == "auto" else name))
    args = train_gd.get_args(asked.split())
    run.start(args)
    assert (args.precision, args.compile) == found
    args = train_gd.get_args(["--device", "cpu"])
    run.start(args)
    assert (args.precision, args.compile) == ("fp32", False)


# --------------------------------------------------------------------------------------- the scripts' parallelism

METHOD = """train_gr train_gd model+learns 1/k replay distill lam prev noise finetun joint buffer kept teacher_steps
    past+task target_r x_r held "gr" "gd" of_task[:k] source""".split()


def test_the_diff_of_the_two_scripts_is_the_papers_contribution():
    """At most 60 changed lines, each about what is replayed or distilled: nothing is mended in one file only."""
    gr, gd = ((ROOT / name).read_text().splitlines() for name in ("train_gr.py", "train_gd.py"))
    changed = [line for line in difflib.ndiff(gr, gd) if line[0] in "+-" and line[1:].strip(' "')]
    assert 30 <= len(changed) <= 60, len(changed)
    stray = [line for line in changed if not any(word.replace("+", " ") in line for word in METHOD)]
    assert not stray


# --------------------------------------------------------------------------------------------------- whole runs

def lives(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def comparable(records):
    """Records without what a clock or the machine decides."""
    return [tuple(r[key] for key in ("task", "update", "loss", "loss_new", "loss_replay")) for r in records]


def weights(folder, k):
    return torch.load(folder / f"task{k}.pt", weights_only=True)["model"]


@pytest.mark.parametrize("name, arguments, method", [
    ("train_gr.py", [], "gr"), ("train_gr.py", ["--replay", "none"], "finetune"),
    ("train_gr.py", ["--replay", "all"], "joint"), ("train_gr.py", ["--replay", "buffer", "--buffer-size", "4"], "er"),
    ("train_gd.py", [], "gd"), ("train_gd.py", ["--distill", "current"], "lwf"),
    ("train_gd.py", ["--distill", "noise"], "noise")])
def test_a_whole_run(script, main, tmp_path, name, arguments, method):
    """The default of each script by subprocess."""
    done = (main if arguments else script)(name, *TINY, "--iterations", "3,2", "--out", "run", *arguments)
    assert done.returncode == 0, done.stderr
    folder = tmp_path / "run"
    assert "next: python eval_fid.py run" in done.stdout
    records = lives(folder)
    assert [(r["task"], r["update"]) for r in records] == [(1, 1), (1, 2), (1, 3), (2, 1), (2, 2), (3, 1), (3, 2)]
    for r in records:
        weight = 1 / r["task"] if method not in ("finetune", "joint") else 1
        lam = {"gd": 0.75, "lwf": 1.25, "noise": 8}.get(method, 1)
        assert_close(r["loss"], weight * r["loss_new"] + (1 - weight) * lam * r["loss_replay"], rtol=1e-5, atol=1e-7)
        if r["update"] > 1:  # at the first update of a task the student is the teacher, and distillation starts from 0
            assert (r["loss_replay"] > 0) == (r["task"] > 1 and weight < 1)
        assert r["ms_per_update"] > 0 and r["images_per_s"] > 0 and r["peak_memory_mb"] > 0
    config = json.loads((folder / "config.json").read_text())
    assert config["method"] == method and config["updates"] == [3, 2, 2]
    for k in (1, 2, 3):
        task = torch.load(folder / f"task{k}.pt", weights_only=True)
        assert task["config"]["class_tasks"] == [[0, 1], [2, 7], [8, 9]]
        assert {"unet", "image_size", "schedule", "seed", "dataset", "sample_steps"} <= set(task["config"])
        UNet(**NETS[task["config"]["unet"]]).load_state_dict(task["model"])
        picture = np.asarray(Image.open(folder / "samples" / f"task{k}.png"))
        assert picture.std() > 10 and picture.shape == ((8 * 17 + 1) * 2, (8 * 17 + 1) * 2, 3)
    again = main(name, *TINY, "--iterations", "3,2", "--out", "run", *arguments)
    assert again.returncode == 0 and "finished" in again.stdout
    assert lives(folder) == records, "a finished run does nothing"


def start(tmp_path, *arguments):
    command = [sys.executable, str(ROOT / arguments[0]), *TINY, *arguments[1:]]
    return subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def wait_for(folder, task, update):
    """Wait until the run has done this update, as metrics.jsonl tells."""
    for _ in range(6000):
        if (folder / "metrics.jsonl").exists():
            lines = (folder / "metrics.jsonl").read_text().splitlines(keepends=True)
            records = [json.loads(line) for line in lines if line[-1] == "\n"]
            if any((r["task"], r["update"]) >= (task, update) for r in records):
                return
        time.sleep(0.05)
    raise AssertionError("the run did not get there")


KILLED = ["--iterations", "4,25", "--tasks", "2", "--save-every", "4", "--draw-ahead", "5"]  # amid what was drawn


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory):
    """The folder of a run that nothing disturbs."""
    folder = tmp_path_factory.mktemp("unbroken") / "train_gd.py"
    command = [sys.executable, str(ROOT / "train_gd.py"), *TINY, *KILLED, "--out", str(folder)]
    subprocess.run(command, check=True, capture_output=True)
    return folder


@pytest.mark.parametrize("name, how", [("train_gd.py", signal.SIGKILL), ("train_gd.py", signal.SIGTERM)])
def test_a_run_killed_inside_a_task_ends_bitwise_as_an_unbroken_one(main, unbroken, tmp_path, tally, name, how):
    """By whole processes, at any time; tests/test_faults.py kills at chosen events, and the other scripts."""
    broken = tmp_path / "broken"
    process = start(tmp_path, name, *KILLED, "--out", "broken")
    wait_for(broken, 2, 6)
    process.send_signal(how)
    process.communicate(timeout=60)
    assert process.returncode == {signal.SIGKILL: -9, signal.SIGTERM: 143, signal.SIGINT: 130}[how]
    assert not (broken / "task2.pt").exists(), "it was killed inside task 2"
    resumed = main(name, *TINY, *KILLED, "--out", "broken")
    assert resumed.returncode == 0, resumed.stderr
    where = re.search(r"going on from task 2, update (\d+)", resumed.stdout)
    assert where and int(where[1]) >= 4, "it went on inside task 2"
    for k in (1, 2):
        for key, value in weights(unbroken, k).items():
            assert torch.equal(value, weights(broken, k)[key]), f"task {k}, {key}"
        assert (unbroken / f"samples/task{k}.png").read_bytes() == (broken / f"samples/task{k}.png").read_bytes()
    assert comparable(lives(unbroken)) == comparable(lives(broken)), "no update is recorded twice or missing"
    tally["faults injected"] += 1
    tally["faults survived"] += 1


@pytest.mark.parametrize("name, arguments, units", [
    ("train_gr.py", ["--replay", "none"], [3, 3, 3]), ("train_gr.py", ["--replay", "all"], [3, 3, 3]),
    ("train_gr.py", ["--teacher-steps", "4"], [3, 10, 10]), ("train_gd.py", ["--teacher-steps", "4"], [3, 11, 11]),
    ("train_gd.py", ["--teacher-steps", "4", "--teacher-solver", "ipndm", "--first-step", "analytic"], [3, 11, 11]),
    ("train_gr.py", ["--replay", "buffer", "--buffer-size", "64"], [3, 6, 6]),
    ("train_gr.py", ["--draw-ahead", "5"], [3, 16, 16]), ("train_gd.py", ["--draw-ahead", "5"], [3, 17, 17]),
    ("train_gd.py", ["--distill", "noise"], [3, 7, 7]), ("train_gd.py", ["--distill", "current"], [3, 4, 4])])
def test_how_the_cost_of_an_update_grows(main, monkeypatch, name, arguments, units):
    """In forward passes of one batch, a backward pass counted as two: 3, GR 6 + S, GD 7 + S, the same in every task.

    An update that draws ahead, for 5 of them, has 5 S.
    """
    images, updates = [0], []

    def count(model, x_t, t, forward=UNet.forward):
        images[0] += len(x_t) * (3 if torch.is_grad_enabled() else 1)
        return forward(model, x_t, t)

    def step(optimizer, *more, step=torch.optim.Adam.step):
        updates.append(images[0] / 4)
        images[0] = 0
        return step(optimizer, *more)
    monkeypatch.setattr(UNet, "forward", count)
    monkeypatch.setattr(torch.optim.Adam, "step", step)
    save = train_gr.run.save  # the picture is drawn between tasks, before the task is saved
    monkeypatch.setattr(run, "save", lambda *what: (images.__setitem__(0, 0), save(*what)))
    done = main(name, *TINY, "--batch-size", "4", "--iterations", "1", "--out", "run", *arguments)
    assert done.returncode == 0 and updates == units


def test_bf16_trains_like_fp32(main, tmp_path):
    """After a few updates the losses are those of fp32 to bf16's precision; weights and files stay float32."""
    last = {}
    for precision in ("fp32", "bf16"):
        done = main("train_gd.py", *TINY, "--iterations", "3", "--tasks", "2", "--precision", precision,
                    "--out", precision)
        assert done.returncode == 0, done.stderr
        last[precision] = [lives(tmp_path / precision)[-1][key] for key in ("loss_new", "loss_replay")]
        assert all(value.dtype == torch.float32 for value in weights(tmp_path / precision, 2).values())
    assert_close(last["bf16"], last["fp32"], rtol=0.05, atol=0.02)
    assert last["bf16"] != last["fp32"]


@pytest.mark.parametrize("module", [train_gr, train_gd])
def test_what_is_drawn_ahead(main, monkeypatch, module):
    """Each update gets its own part of what the previous model has drawn, a short one as much as it needs; another run
    from the same seed draws the same, of however many updates it is begun in the middle."""
    drawn, used, train = [], [], ["--iterations", "3,7", "--class-order", "0,1|2,3", "--draw-ahead", "3"]
    few = data.load_images("shapes", "train", "data", 16)
    few = [torch.cat([x[few[1] == c][:10] for c in range(6)]) for x in few]  # 20 a task: batches of 8, 8 and 4

    def note(*arguments, **more):
        x = sample(*arguments, **more)
        drawn.append(x)
        return x

    def use(args, *more, replay=module.replay):
        used.append(more[0] if module is train_gr else more[1])
        return replay(args, *more)
    monkeypatch.setattr(data, "load_images", lambda *which: few)
    monkeypatch.setattr(module, "sample", note)
    monkeypatch.setattr(module, "replay", use)
    assert main(f"{module.__name__}.py", *TINY, *train, "--out", "run").returncode == 0
    drawn = [x for x in drawn if len(x) == 24]  # the others are the pictures
    assert len(drawn) == 3 and [len(x) for x in used] == [8, 8, 4, 8, 8, 4, 8]
    for u, x in enumerate(used):
        assert torch.equal(x, drawn[u // 3][8 * (u % 3):][:len(x)])
    assert len({float(x.sum()) for x in used}) == 7, "no two updates replay the same images"


@pytest.mark.parametrize("backend, channels, arguments, graphs", [
    # The student at B and 2 B, the teacher at 2 B, to draw, and at B; no code is made for them, as that takes minutes.
    ("aot_eager", (8, 16), ["train_gd", "--tasks", "2", "--draw-ahead", "2"], 4),
    ("inductor", (8,), ["train_gr", "--tasks", "1", "--replay", "none"], 1)])
def test_a_compiled_run_follows_an_eager_one(tmp_path, backend, channels, arguments, graphs):
    """Each shape is compiled once, but for the picture's and the short last batch of an epoch, and in one piece. In a
    process of its own, as one that has compiled cannot be forked, which tests/test_faults.py does."""
    (tmp_path / "small.py").write_text(f"""
import functools, sys, torch, torch._dynamo, data, unet, {arguments[0]} as script
few = data.load_images("shapes", "train", "data", 16)
data.load_images = lambda *which: [x[:60] for x in few]
unet.NETS["laptop"]["channels"] = {channels}
torch.nn.Module.compile = functools.partialmethod(torch.nn.Module.compile, backend="{backend}")
for flag in "--no-compile", "--compile":
    script.main([*sys.argv[1:], flag, "--out", flag[2:]])
    print("compiled:", torch._dynamo.utils.counters["stats"]["unique_graphs"])
""")
    command = [sys.executable, "small.py", *TINY, *arguments[1:], "--class-order", "natural", "--iterations", "9"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=500,
                          env=dict(os.environ, PYTHONPATH=str(ROOT)))
    assert done.returncode == 0, done.stderr
    assert re.findall(r"compiled: (\d+)", done.stdout) == ["0", str(graphs)]
    for one, two in zip(lives(tmp_path / "compile"), lives(tmp_path / "no-compile")):
        for key in ("loss_new", "loss_replay", "gradient_norm"):
            assert one[key] == pytest.approx(two[key], rel=0.02, abs=1e-4)


# ---------------------------------------------------------------------------- the paper's networks, every preset

def imagenet_files(folder):
    for path in (folder / "imagenet100" / split / f"n{i:08d}" for split in ("train", "val") for i in range(100)):
        path.mkdir(parents=True)
        Image.fromarray(np.random.default_rng(0).integers(0, 256, (80, 70, 3), dtype=np.uint8)).save(path / "a.JPEG")


@pytest.mark.parametrize("name, dataset, more", [
    ("train_gr.py", "fashion-mnist", []), ("train_gd.py", "fashion-mnist", []),
    ("train_gd.py", "shapes", ["--unet", "laptop"]),
    ("train_gr.py", "cifar10", []), ("train_gd.py", "cifar10", ["--unet", "ddpm-cifar10"]),
    ("train_gd.py", "fashion-mnist", ["--scale", "laptop"]), ("train_gd.py", "cifar10", ["--scale", "laptop"]),
    ("train_gd.py", "cifar100", ["--unet", "laptop-rgb"]), ("train_gd.py", "imagenet100", ["--unet", "laptop-rgb"])])
def test_every_preset_does_two_updates_of_two_tasks(main, monkeypatch, tmp_path, name, dataset, more):
    """The paper's networks at full size, for the datasets beyond the paper a small one. The pictures show only four
    images of the 64."""
    def few(dataset, split, data_dir, side):
        info = data.info(dataset)
        y = torch.arange(2 * len(info.classes)) % len(info.classes)
        return torch.randint(256, (len(y), info.channels, side, side), dtype=torch.uint8), y
    if dataset == "imagenet100":
        imagenet_files(tmp_path / "data")
    else:
        monkeypatch.setattr(data, "load_images", few)
    for module in (train_gr, train_gd):
        monkeypatch.setattr(module, "sample", lambda net, x_T, *how, **more: sample(net, x_T[:4], *how, **more))
    done = main(name, "--dataset", dataset, "--batch-size", "2", "--teacher-steps", "2", "--iterations", "2",
                "--draw-ahead", "2", "--sample-steps", "1", "--tasks", "2", "--device", "cpu", "--out", "run", *more)
    assert done.returncode == 0, done.stderr
    assert [(r["task"], r["update"]) for r in lives(tmp_path / "run")] == [(1, 1), (1, 2), (2, 1), (2, 2)]
    assert all(np.isfinite(r["loss"]) for r in lives(tmp_path / "run"))


# ------------------------------------------------------------------------------------------------- bad arguments

BAD = [line.split(" ", 1) for line in """
train_gd.py --dataset emnist
train_gd.py --dataset fashion_mnist
train_gd.py --lambda 0
train_gd.py --lambda minus
train_gd.py --lambda nan
train_gd.py --lambda inf
train_gd.py --teacher-steps 0
train_gd.py --teacher-steps 1001
train_gd.py --sample-steps 1001
train_gd.py --teacher-steps 2.5
train_gd.py --teacher-steps 2 --distill noise
train_gd.py --teacher-solver ipndm --distill current
train_gd.py --teacher-steps 1000 --first-step analytic
train_gd.py --draw-ahead 2 --distill noise
train_gr.py --draw-ahead 0
train_gd.py --distill everything
train_gd.py --tasks 3
train_gd.py --tasks 0
train_gd.py --class-order 0,1|1,2
train_gd.py --class-order 0,1|12
train_gd.py --class-order a,b
train_gd.py --class-order 0,1|2,3 --tasks 3
train_gd.py --epochs 0
train_gd.py --epochs 1e300
train_gd.py --iterations 99999999999999999999
train_gd.py --iterations 1,1,1,1,1,1
train_gd.py --seed -1
train_gd.py --seed 99999999999999999999999
train_gd.py --re
train_gd.py --save-every 99999999999999
train_gd.py --epochs -1
train_gd.py --iterations 1.5
train_gd.py --iterations 5,0
train_gd.py --batch-size 0
train_gd.py --lr -1
train_gd.py --seed one
train_gd.py --unet resnet
train_gd.py --unet cifar10
train_gd.py --dataset cifar10 --unet laptop
train_gd.py --schedule cosine
train_gd.py --precision fp8
train_gd.py --scale tiny
train_gd.py --scale laptop --tasks 4
train_gd.py --image-size 30
train_gd.py --epochs 1 --iterations 1
train_gd.py --device tpu
train_gd.py --device cuda:99
train_gd.py --device mps
train_gd.py --save-every 0
train_gd.py --save-every soon
train_gd.py --unknown
train_gr.py --replay some
train_gr.py --replay buffer
train_gr.py --buffer-size 100
train_gr.py --replay buffer --buffer-size 3
train_gr.py --replay buffer --tasks 1
train_gr.py --replay none --teacher-steps 2
train_gr.py --replay none --first-step analytic
train_gr.py --lambda 1
train_gr.py --replay all --buffer-size 10
train_gr.py --scale laptop --dataset shapes --init nowhere.pt --out run
train_gr.py --scale laptop --dataset shapes --out /proc/run""".strip().splitlines()]


@pytest.mark.parametrize("name, arguments", BAD)
def test_bad_arguments_end_with_a_sentence_and_code_2(main, tmp_path, tally, name, arguments):
    done = main(name, *arguments.split())
    assert done.returncode == 2 and "error:" in done.stderr and "Traceback" not in done.stderr, done.stderr
    assert not any(tmp_path.iterdir()), "no folder is made for a run that cannot start"
    tally["bad commands refused"] += 1


def test_a_bad_argument_by_subprocess(script, tmp_path):
    done = script("train_gd.py", "--tasks", "3")
    assert done.returncode == 2 and "error:" in done.stderr and "Traceback" not in done.stderr
    assert not any(tmp_path.iterdir())


def test_a_folder_with_other_settings_is_refused_with_the_difference(main, tmp_path):
    common = [*TINY, "--iterations", "1", "--tasks", "2", "--out", "run"]
    assert main("train_gd.py", *common).returncode == 0
    before = (tmp_path / "run/task2.pt").read_bytes()
    other = main("train_gd.py", *common, "--lambda", "2")
    assert other.returncode == 2 and "lam was 0.75 and is 2.0" in other.stderr and "--restart" in other.stderr
    assert (tmp_path / "run/task2.pt").read_bytes() == before
    (tmp_path / "run/mine.json").write_text("{}")
    (tmp_path / "run/task1.pt.damaged").touch()
    assert main("train_gd.py", *common, "--lambda", "2", "--restart", "--init", "typo.pt").returncode == 2
    assert (tmp_path / "run/task2.pt").read_bytes() == before, "nothing is thrown away for a run that cannot start"
    restarted = main("train_gd.py", *common, "--lambda", "2", "--restart")
    assert (tmp_path / "run/mine.json").exists() and not (tmp_path / "run/task1.pt.damaged").exists(), (
        "--restart deletes all of a run's own files and no other")
    assert restarted.returncode == 0 and json.loads((tmp_path / "run/config.json").read_text())["lam"] == 2
    assert len(lives(tmp_path / "run")) == 2


def test_cifar_without_files_and_network_ends_with_a_sentence(main, monkeypatch):
    for name in ("http_proxy", "https_proxy", "HTTPS_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")  # nowhere
    monkeypatch.setattr(urllib.request, "_opener", None)  # urllib keeps the first proxy it meets
    done = main("train_gd.py", "--dataset", "cifar10", "--teacher-steps", "10", "--lambda", "0.75")
    assert done.returncode == 2 and "cifar-10-python.tar.gz" in done.stderr and "Traceback" not in done.stderr


def test_init_starts_from_given_weights(main, tmp_path):
    common = [*TINY, "--iterations", "1", "--tasks", "1", "--lr", "1e-12"]
    assert main("train_gr.py", *common, "--out", "first", "--seed", "1").returncode == 0
    assert main("train_gr.py", *common, "--out", "second", "--init", "first/task1.pt").returncode == 0
    first, second = weights(tmp_path / "first", 1), weights(tmp_path / "second", 1)
    assert all(torch.allclose(first[key], second[key], atol=1e-6) for key in first)
    wrong = main("train_gr.py", "--dataset", "shapes", "--out", "third", "--init", "first/task1.pt")
    assert wrong.returncode == 2 and "--unet" in wrong.stderr


# ---------------------------------------------------------------------------------------------- damaged run folders

def flip_a_bit(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def checkpoints(folder, task=2):
    """A run of three tasks that has ended inside task 2, with two checkpoints."""
    for name, update in (("checkpoint.old", 3), ("checkpoint", 5)):
        run.save(folder / f"{name}.pt", {"task": task, "update": update, "model": {"w": torch.arange(1000.0) + update}})
    learned = {"task": 1, "model": {"w": torch.arange(1000.0)}, "memory": {"mine": 1}, "config": {}}
    run.save(folder / "task1.pt", learned)


def test_the_latest_whole_state_is_found(tmp_path, capsys):
    checkpoints(tmp_path)
    assert run.latest(tmp_path, 3)["update"] == 5
    flip_a_bit(tmp_path / "checkpoint.pt")
    assert run.latest(tmp_path, 3)["update"] == 3
    assert "checkpoint.pt is damaged" in capsys.readouterr().err
    run.save_checkpoint(tmp_path, {"task": 2, "update": 6})
    assert run.latest(tmp_path, 3)["update"] == 6
    flip_a_bit(tmp_path / "checkpoint.pt")
    assert run.latest(tmp_path, 3)["update"] == 3, "the damaged file was not moved over the good one"
    flip_a_bit(tmp_path / "checkpoint.old.pt")
    state = run.latest(tmp_path, 3)
    assert (state["task"], state["update"], state["memory"]) == (2, 0, {"mine": 1}), "all that the file holds"
    flip_a_bit(tmp_path / "task1.pt")
    with pytest.raises(run.InputError, match="--restart"):
        run.latest(tmp_path, 3)  # never afresh in silence


def test_checkpoints_of_finished_tasks_are_passed_over_and_at_the_end_removed(tmp_path):
    checkpoints(tmp_path, task=1)
    assert run.latest(tmp_path, 3)["task"] == 2
    for k in (2, 3):
        run.save(tmp_path / f"task{k}.pt", {"task": k, "model": {}, "config": {}})
    assert run.latest(tmp_path, 3)["task"] == 4
    run.finish(tmp_path)
    assert not list(tmp_path.glob("checkpoint*"))


def test_a_checkpoint_with_code_in_it_is_refused_and_nothing_runs(tmp_path):
    class Evil:
        def __reduce__(self):
            return (os.mkdir, (str(tmp_path / "executed"),))
    torch.save({"task": 1, "update": 1, "model": Evil()}, tmp_path / "checkpoint.pt")
    for _ in range(2):  # a second command does not start afresh either
        with pytest.raises(run.InputError, match="nothing of it was executed.*--restart"):
            run.latest(tmp_path, 3)
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("CUDA out of memory"), MemoryError(),
                                   RuntimeError("DefaultCPUAllocator: can't allocate memory")])
def test_a_file_that_does_not_fit_into_memory_is_not_taken_for_damaged(tmp_path, monkeypatch, error):
    torch.save({"task": 1, "update": 1}, tmp_path / "checkpoint.pt")
    shutil.copy(tmp_path / "checkpoint.pt", tmp_path / "task1.pt")
    with monkeypatch.context() as patch, pytest.raises(type(error)):
        patch.setattr(torch, "load", Mock(side_effect=error))
        run.latest(tmp_path, 3)
    assert not list(tmp_path.glob("*.damaged")) and run.latest(tmp_path, 3)["task"] == 2


def test_damaged_json_in_a_run_folder_is_one_sentence(main, tmp_path):
    common = [*TINY, "--iterations", "1", "--tasks", "2", "--out", "run"]
    assert main("train_gd.py", *common).returncode == 0
    whole = (tmp_path / "run/config.json").read_text()
    (tmp_path / "run/task2.pt").unlink()
    for name, text in (("config.json", "[]"), ("config.json", "null"), ("metrics.jsonl", "{}\n"),
                       ("metrics.jsonl", "\0\n"), ("metrics.jsonl", '{"task": 1, "update": 1}\n')):
        (tmp_path / "run/config.json").write_text(whole)
        (tmp_path / "run" / name).write_text(text)
        done = main("train_gd.py", *common)
        assert done.returncode == 2 and re.search("is damaged|other settings", done.stderr)
        assert "Traceback" not in done.stderr


def test_diverged_weights_are_not_saved(main, tmp_path):
    done = main("train_gd.py", *TINY, "--iterations", "1", "--tasks", "1", "--lr", "1e38", "--out", "run")
    assert done.returncode == 2 and "diverged" in done.stderr and "--lr" in done.stderr
    assert not (tmp_path / "run/task1.pt").exists()


def test_a_folder_in_use_is_refused(main, tmp_path):
    process = start(tmp_path, "train_gd.py", "--iterations", "500", "--tasks", "1", "--out", "run")
    wait_for(tmp_path / "run", 1, 1)
    second = main("train_gd.py", *TINY, "--iterations", "500", "--tasks", "1", "--out", "run")
    process.kill()
    process.communicate()
    assert second.returncode == 2 and "in use by another process" in second.stderr


@pytest.mark.parametrize("name, where", [     # as SIGTERM may come
    ("skip_if_broken", "task 1, update 1"),   # during the only update: it is saved there, before the picture
    ("save_picture", "task 2, update 0")])    # while the picture is drawn: after the task
def test_a_stop_at_the_end_of_a_task_loses_nothing(main, tmp_path, monkeypatch, name, where):
    def stop(*arguments, function=getattr(run, name), **more):
        function(*arguments, **more)
        run.signals.append(signal.SIGTERM)
    common = ["train_gd.py", *TINY, "--iterations", "1", "--tasks", "2", "--out"]
    monkeypatch.setattr(run, "signals", [])
    with monkeypatch.context() as patch:
        patch.setattr(run, name, stop)
        done = main(*common, "run")
    assert done.returncode == 143 and f"stopped at {where};" in done.stderr
    assert (tmp_path / "run/task1.pt").exists() == (name == "save_picture")
    monkeypatch.setattr(run, "signals", [])
    assert f"going on from {where}" in main(*common, "run").stdout
    assert main(*common, "unbroken").returncode == 0
    for key, value in weights(tmp_path / "unbroken", 2).items():
        assert torch.equal(value, weights(tmp_path / "run", 2)[key])
    assert comparable(lives(tmp_path / "unbroken")) == comparable(lives(tmp_path / "run"))
