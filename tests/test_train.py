"""The losses of train_gr.py and train_gd.py, their presets, whole runs, damaged run folders."""

import difflib
import itertools
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from types import SimpleNamespace
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from conftest import ROOT, write_pictures
from PIL import Image
from test_faults import assert_same_end
from torch.testing import assert_close

import data
import run
import train_ewc
import train_gd
import train_gr
from ddim import T, alpha_bar, q_sample, reseed, sample
from unet import NETS, UNet

TINY = ["--dataset", "shapes", "--scale", "laptop", "--batch-size", "8", "--device", "cpu"]


# ------------------------------------------------------------------------------------------------ arguments


def test_updates_of_each_task():
    def updates(unit, values, batch_size, *sizes):
        return run.count_updates((unit, values), batch_size, [range(n) for n in sizes])

    assert updates("epochs", [100.0], 128, 12000, 12000) == [9400] * 2, "the paper's Fashion-MNIST"
    assert updates("epochs", [200.0], 64, 10000, 10000) == [31400] * 2, "the paper's CIFAR-10"
    assert updates("iterations", [5, 3], 128, 12000, 12000, 12000) == [5, 3, 3]
    assert updates("epochs", [0.001, 1.0], 10, 20, 41, 41) == [1, 5, 5]


# --------------------------------------------------------------------------------------------------- losses

def test_losses_written_out_by_hand():
    """The paper's Equations 4, 7 and 9, with separate forwards."""
    reseed("nets")
    model, prev = (UNet(**NETS["laptop"]).eval() for _ in range(2))
    args, abar = train_gd.get_args(["--scale", "laptop"]), alpha_bar()
    x_0, x_r = torch.rand(2, 4, 1, 16, 16) * 2 - 1
    reseed("losses")
    t, eps, t_r, eps_r = torch.randint(T, (4,)), torch.randn_like(x_0), torch.randint(T, (4,)), torch.randn_like(x_0)
    x_r_t = q_sample(x_r, t_r, eps_r, abar)
    new = (eps - model(q_sample(x_0, t, eps, abar), t)).square().mean()
    for script, given, target_r in ((train_gr, (x_r, x_0, None), eps_r),
                                    (train_gd, (prev, x_r, x_0, None, None), prev(x_r_t, t_r))):
        reseed("losses")
        batch = script.diffuse(x_0, abar)
        found = script.losses(model, *batch, script.replay(args, *given, abar))
        replayed = (target_r - model(x_r_t, t_r)).square().mean()
        assert_close(found, (new, replayed), rtol=1e-4, atol=1e-6)
        assert_close(script.losses(model, *batch, None), (new, torch.zeros(())), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("script", [train_gr, train_gd, train_ewc])
def test_the_teacher_draws_as_it_is_told(script):
    args = script.get_args("--scale laptop --teacher-steps 3 --first-step analytic --teacher-solver ipndm".split())
    prev, abar = UNet(**NETS["laptop"]).eval(), alpha_bar()
    x_r = script.draw(args, prev, abar, (4, 1, 16, 16), 2, 5)
    reseed(42, "replay", 2, 5)
    assert_close(x_r, sample(prev, torch.randn(4, 1, 16, 16), abar, 3, first="analytic", solver="ipndm"))


def test_experience_replay_draws_from_the_buffer():
    args = train_gr.get_args(["--scale", "laptop", "--replay", "buffer", "--buffer-size", "3"])
    kept, abar = torch.full((3, 1, 16, 16), 200, dtype=torch.uint8), alpha_bar()
    x_r_t, t_r, target_r = train_gr.replay(args, None, torch.zeros(4, 1, 16, 16), kept, abar)
    assert x_r_t.shape == (3, 1, 16, 16)
    assert_close(x_r_t, q_sample(data.normalize(kept), t_r, target_r, abar))


@pytest.mark.parametrize("size, shares", [(4, [4, 2, 1]), (10, [10, 5, 3])])
def test_the_buffer_has_equal_shares_and_what_was_discarded_never_comes_back(main, tmp_path, size, shares):
    main("train_gr.py", *TINY, "--iterations", "1", "--replay", "buffer", "--buffer-size", size, "--out", "run")
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


METHOD = """train_gr train_gd model+learns 1/k replay distill lam prev noise finetun joint buffer kept teacher_steps
    past+task target_r x_r "gr" "gd" of_task[:k] source part_new""".split()


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


def weights(folder, k):
    return torch.load(folder / f"task{k}.pt", weights_only=True)["model"]


@pytest.mark.parametrize("name, arguments, method", [
    ("train_gr.py", [], "gr"), ("train_gr.py", ["--replay", "none"], "finetune"),
    ("train_gr.py", ["--replay", "all"], "joint"), ("train_gr.py", ["--replay", "buffer", "--buffer-size", "4"], "er"),
    ("train_gd.py", [], "gd"), ("train_gd.py", ["--distill", "current"], "lwf"),
    ("train_gd.py", ["--distill", "noise"], "noise")])
def test_a_whole_run(script, main, tmp_path, name, arguments, method):
    done = (main if arguments else script)(name, *TINY, "--iterations", "3,2", "--out", "run", *arguments)
    folder = tmp_path / "run"
    assert "next: python eval_fid.py run" in done.stdout
    records = lives(folder)
    assert [(r["task"], r["update"]) for r in records] == [(1, 1), (1, 2), (1, 3), (2, 1), (2, 2), (3, 1), (3, 2)]
    for r in records:
        weight = 1 / r["task"] if method not in ("finetune", "joint") else 1
        lam = {"gd": 0.75, "lwf": 1.25, "noise": 8}.get(method, 1)
        assert_close(r["loss"], weight * r["loss_new"] + (1 - weight) * lam * r["loss_replay"], rtol=1e-5, atol=1e-7)
        same = r["update"] == 1 and lam != 1  # the student is the teacher still, and nothing is to be distilled
        assert (r["loss_replay"] > 1e-8) == (r["task"] > 1 and weight < 1 and not same)
        assert r["ms_per_update"] > 0 and r["peak_memory_mb"] > 0
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
    assert "finished" in again.stdout
    assert lives(folder) == records, "a finished run does nothing"


def start(tmp_path, *arguments):
    command = [sys.executable, str(ROOT / arguments[0]), *TINY, *arguments[1:]]
    return subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def wait_for(folder, task, update):
    for _ in range(6000):
        if (folder / "metrics.jsonl").exists():
            lines = (folder / "metrics.jsonl").read_text().splitlines(keepends=True)
            records = [json.loads(line) for line in lines if line[-1] == "\n"]
            if any((r["task"], r["update"]) >= (task, update) for r in records):
                return
        time.sleep(0.05)
    raise AssertionError("the run did not get there")


@pytest.mark.parametrize("name, arguments, units", [
    ("train_gr.py", ["--replay", "none"], [3, 3, 3]),
    ("train_gr.py", ["--teacher-steps", "4"], [3, 10, 10]), ("train_gd.py", ["--teacher-steps", "4"], [3, 11, 11]),
    ("train_gd.py", ["--teacher-steps", "4", "--teacher-solver", "ipndm", "--first-step", "analytic"], [3, 11, 11]),
    ("train_gr.py", ["--replay", "buffer", "--buffer-size", "64"], [3, 6, 6]),
    ("train_gd.py", ["--distill", "noise"], [3, 7, 7]), ("train_gd.py", ["--distill", "current"], [3, 4, 4])])
def test_how_the_cost_of_an_update_grows(main, monkeypatch, name, arguments, units):
    """In forward passes of one batch, a backward pass counted as two: docs/speed.md."""
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
    save = run.save  # the picture is drawn between tasks, before the task is saved
    monkeypatch.setattr(run, "save", lambda *what: (images.__setitem__(0, 0), save(*what)))
    main(name, *TINY, "--batch-size", "4", "--iterations", "1", "--out", "run", *arguments)
    assert updates == units


def test_bf16_trains_like_fp32(main, tmp_path):
    last = {}
    for precision in ("fp32", "bf16"):
        main("train_gd.py", *TINY, "--iterations", "3", "--tasks", "2", "--precision", precision, "--out", precision)
        last[precision] = [lives(tmp_path / precision)[-1][key] for key in ("loss_new", "loss_replay")]
        assert all(value.dtype == torch.float32 for value in weights(tmp_path / precision, 2).values())
    assert_close(last["bf16"], last["fp32"], rtol=0.05, atol=0.02)
    assert last["bf16"] != last["fp32"]


@pytest.mark.parametrize("module", [train_gr, train_gd])
def test_each_update_replays_images_of_its_own(main, monkeypatch, module):
    """As many as the batch has, drawn by the previous model."""
    drawn, used = [], []
    few = data.load_images("shapes", "train", "data", 16)
    few = [torch.cat([x[few[1] == c][:10] for c in range(4)]) for x in few]  # 20 a task: batches of 8, 8 and 4

    def note(*how, draw=module.draw):
        drawn.append(draw(*how))
        return drawn[-1]
    monkeypatch.setattr(data, "load_images", lambda *which: few)
    monkeypatch.setattr(module, "draw", note)
    monkeypatch.setattr(module, "replay", lambda *given, replay=module.replay: used.append(
        any(x is drawn[-1] for x in given)) or replay(*given))
    main(f"{module.__name__}.py", *TINY, "--iterations", "3,7", "--class-order", "0,1|2,3", "--out", "run")
    assert [len(x) for x in drawn] == [8, 8, 4, 8, 8, 4, 8] and used == [True] * 7
    assert len({float(x.sum()) for x in drawn}) == 7, "no two updates replay the same images"


@pytest.mark.parametrize("module, more", [(train_gr, ""), (train_gd, ""),
                                          (train_ewc, "--ewc-images 8 --fisher-images 2")])
def test_streams_have_the_seed_and_noise_the_schedule(main, monkeypatch, module, more):
    keys, tables = [], []
    monkeypatch.setattr(module, "reseed", lambda *key: keys.append(key) or reseed(*key))
    monkeypatch.setattr(module, "diffuse", lambda x_0, abar, diffuse=module.diffuse: (
        tables.append(abar) or diffuse(x_0, abar)))
    main(f"{module.__name__}.py", *TINY, "--iterations", "2", "--tasks", "2", "--seed", "7", "--schedule", "linear",
         "--out", "run", *more.split())
    assert {key[0] for key in keys} == {7, "grid"}
    assert len(set(keys)) == len(keys) - 1, "each stream is drawn from once, but for the noise of the pictures"
    assert all(torch.equal(abar, alpha_bar("linear")) for abar in tables)


@pytest.mark.parametrize("backend, channels, arguments, graphs", [
    # The student at B and 2 B, the teacher at B; no code is made for them, as that takes minutes.
    ("aot_eager", (8, 16), ["train_gd", "--tasks", "2"], 3),
    ("inductor", (8,), ["train_gr", "--tasks", "1", "--replay", "none"], 1)])
def test_a_compiled_run_follows_an_eager_one(script, tmp_path, backend, channels, arguments, graphs):
    """Each shape is compiled once, but for those of pictures and short batches. In a process of its own, as one that
    has compiled cannot be forked, which tests/test_faults.py does."""
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
    done = script(tmp_path / "small.py", *TINY, *arguments[1:], "--class-order", "natural", "--iterations", "9",
                  timeout=500, PYTHONPATH=str(ROOT))
    assert re.findall(r"compiled: (\d+)", done.stdout) == ["0", str(graphs)]
    for one, two in zip(lives(tmp_path / "compile"), lives(tmp_path / "no-compile")):
        for key in ("loss_new", "loss_replay", "gradient_norm"):
            assert one[key] == pytest.approx(two[key], rel=0.02, abs=1e-4)


@pytest.mark.parametrize("name, dataset, more", [
    ("train_gr.py", "fashion-mnist", []), ("train_gd.py", "fashion-mnist", []),
    ("train_gr.py", "cifar10", []), ("train_gd.py", "cifar10", ["--unet", "ddpm-cifar10"]),
    ("train_gd.py", "fashion-mnist", ["--scale", "laptop"]), ("train_gd.py", "cifar10", ["--scale", "laptop"]),
    ("train_gd.py", "cifar100", ["--unet", "laptop-rgb"]), ("train_gd.py", "imagenet100", ["--unet", "laptop-rgb"])])
def test_every_preset_does_two_updates_of_two_tasks(main, monkeypatch, tmp_path, name, dataset, more):
    """The paper's networks at full size, for the datasets beyond the paper a small one, and pictures of 4 images."""
    def few(dataset, split, data_dir, side):
        info = data.info(dataset)
        y = torch.arange(2 * len(info.classes)) % len(info.classes)
        return torch.randint(256, (len(y), info.channels, side, side), dtype=torch.uint8), y
    if dataset == "imagenet100":
        for split, i in itertools.product(("train", "val"), range(100)):
            write_pictures(tmp_path / f"data/imagenet100/{split}/n{i}", 1)
    else:
        monkeypatch.setattr(data, "load_images", few)
    for module in (train_gr, train_gd):
        monkeypatch.setattr(module, "sample", lambda net, x_T, *how, **more: sample(net, x_T[:4], *how, **more))
    main(name, "--dataset", dataset, "--batch-size", "2", "--teacher-steps", "2", "--iterations", "2",
         "--sample-steps", "1", "--tasks", "2", "--device", "cpu", "--out", "run", *more)
    assert [(r["task"], r["update"]) for r in lives(tmp_path / "run")] == [(1, 1), (1, 2), (2, 1), (2, 2)]
    assert all(np.isfinite(r["loss"]) for r in lives(tmp_path / "run"))


def test_a_folder_with_other_settings_is_refused_with_the_difference(main, tmp_path):
    common = [*TINY, "--iterations", "1", "--tasks", "2", "--out", "run"]
    main("train_gd.py", *common)
    before = (tmp_path / "run/task2.pt").read_bytes()
    other = main("train_gd.py", *common, "--lambda", "2", code=2)
    assert "lam was 0.75 and is 2.0" in other.stderr and "--restart" in other.stderr
    assert (tmp_path / "run/task2.pt").read_bytes() == before
    (tmp_path / "run/mine.json").write_text("{}")
    (tmp_path / "run/mine.tmp").touch()
    (tmp_path / "run/task1.pt.damaged").touch()
    main("train_gd.py", *common, "--lambda", "2", "--restart", "--init", "typo.pt", code=2)
    assert (tmp_path / "run/task2.pt").read_bytes() == before, "nothing is thrown away for a run that cannot start"
    main("train_gd.py", *common, "--lambda", "2", "--restart")
    there = {path.name for path in (tmp_path / "run").iterdir()}
    assert {"mine.json", "mine.tmp"} < there and "task1.pt.damaged" not in there, (
        "--restart deletes all of a run's own files and no other")
    assert json.loads((tmp_path / "run/config.json").read_text())["lam"] == 2
    assert len(lives(tmp_path / "run")) == 2


def test_init_starts_from_given_weights(main, tmp_path):
    common = [*TINY, "--iterations", "1", "--tasks", "1", "--lr", "1e-12"]
    main("train_gr.py", *common, "--out", "first", "--seed", "1")
    main("train_gr.py", *common, "--out", "second", "--init", "first/task1.pt")
    first, second = weights(tmp_path / "first", 1), weights(tmp_path / "second", 1)
    assert all(torch.allclose(first[key], second[key], atol=1e-6) for key in first)


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
    checkpoints(tmp_path, task=1)
    assert run.latest(tmp_path, 3)["task"] == 2, "checkpoints of a finished task are passed over"
    flip_a_bit(tmp_path / "task1.pt")
    assert run.latest(tmp_path, 3)["update"] == 5, "the end of a task is damaged, its last checkpoint is not"


def test_a_checkpoint_is_due_every_ten_minutes(monkeypatch):
    clock, due = [0.0], []
    monkeypatch.setattr(run, "time", SimpleNamespace(monotonic=lambda: clock[0]))
    monkeypatch.setattr(run, "last_save", 0.0)
    for clock[0] in (599, 601, 1200, 1202):
        due.append(run.save_due(train_gd.get_args([]).save_every, 1))
    assert due == [False, True, False, True]


def test_a_record_is_the_mean_over_the_updates_since_the_one_before(tmp_path):
    """Also if the run was stopped between two records. What is to be saved is checked where nothing is recorded."""
    log, model = torch.arange(100.0)[:, None].repeat(1, 2), torch.nn.Linear(1, 1)

    def progress(update):
        found = run.Progress(tmp_path, {"task": 1, "update": update}, [100], ("loss", "norm"), torch.device("cpu"))
        found.begin(1, update)
        return found
    for begin, end in (0, 7), (7, 100):
        going = progress(begin)
        for u in range(begin + 1, end + 1):
            going.step(u, log, model)
    records = lives(tmp_path)
    assert [(r["update"], r["loss"]) for r in records] == [(u, u - 3) for u in range(5, 101, 5)]
    assert [r["seconds"] for r in records] == sorted(r["seconds"] for r in records)
    log[1, 0], going = float("nan"), progress(0)
    going.step(2, log, model)  # neither recorded nor saved
    with pytest.raises(run.InputError, match="diverged by update 2"):
        going.step(2, log, model, check=True)


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
    main("train_gd.py", *common)
    whole = (tmp_path / "run/config.json").read_text()
    (tmp_path / "run/task2.pt").unlink()
    for name, text in (("config.json", "[]"), ("config.json", "null"), ("metrics.jsonl", "{}\n"),
                       ("metrics.jsonl", "\0\n"), ("metrics.jsonl", '{"task": 1, "update": 1}\n')):
        (tmp_path / "run/config.json").write_text(whole)
        (tmp_path / "run" / name).write_text(text)
        assert re.search("is damaged|other settings", main("train_gd.py", *common, code=2).stderr)


def test_diverged_weights_are_not_saved(main, tmp_path):
    done = main("train_gd.py", *TINY, "--iterations", "1", "--tasks", "1", "--lr", "1e38", "--out", "run", code=2)
    assert "diverged" in done.stderr and "--lr" in done.stderr
    assert not (tmp_path / "run/task1.pt").exists()


@pytest.mark.parametrize("kept", [{1: [torch.tensor([1.0, float("nan")])]}, {"c": {"2": float("inf")}}])
def test_a_memory_that_is_not_finite_is_not_saved(tmp_path, kept):
    for save, path in ((run.save, tmp_path / "task1.pt"), (run.save_checkpoint, tmp_path)):
        with pytest.raises(run.InputError, match="memory, is not finite"):
            save(path, {"task": 1, "update": 2, "memory": kept})
    assert not any(tmp_path.iterdir())


def test_a_folder_in_use_is_refused(main, tmp_path):
    process = start(tmp_path, "train_gd.py", "--iterations", "500", "--tasks", "1", "--out", "run")
    wait_for(tmp_path / "run", 1, 1)
    second = main("train_gd.py", *TINY, "--iterations", "500", "--tasks", "1", "--out", "run", code=2)
    process.kill()
    process.communicate()
    assert "in use by another process" in second.stderr


@pytest.mark.parametrize("name, where", [  # as SIGTERM may come
    ("average", "task 1, update 1"),  # during the only update: it is saved there, before the picture
    ("save_picture", "task 2, update 0")])  # while the picture is drawn: after the task
def test_a_stop_at_the_end_of_a_task_loses_nothing(main, tmp_path, monkeypatch, name, where):
    def stop(*arguments, function=getattr(run, name), **more):
        run.signals.append(signal.SIGTERM)
        return function(*arguments, **more)
    common = ["train_gd.py", *TINY, "--iterations", "1", "--tasks", "2", "--out"]
    with monkeypatch.context() as patch:
        patch.setattr(run, name, stop)
        done = main(*common, "run", code=143)
    assert f"stopped at {where};" in done.stderr
    assert (tmp_path / "run/task1.pt").exists() == (name == "save_picture")
    assert f"going on from {where}" in main(*common, "run").stdout
    main(*common, "unbroken")
    assert_same_end(tmp_path / "unbroken", tmp_path / "run")
