"""train_classifier.py: the network of Table A.1, both losses by hand, whole runs on made-up models.

Run: python -m pytest tests/test_classifier.py
"""

import copy
import functools
import json
import math

import numpy as np
import pytest
import torch
from conftest import ROOT
from PIL import Image
from torch.testing import assert_close

import data
import run
import train_classifier
import train_gr
from ddim import alpha_bar, eval_mode, reseed, sample
from train_classifier import R, classifier, count_correct, distillation, get_args, losses, summary
from unet import NETS, UNet

QUICK = ["--iterations", "3,2", "--device", "cpu"]
data.draw_shapes = functools.cache(data.draw_shapes)  # for the tests of one process


def logits_of(*key, batch=5, classes=10):
    reseed("logits", *key)
    return torch.randn(batch, classes) * 3


def images_of(n=6, side=16):
    reseed("images")
    return torch.randint(256, (n, 1, side, side), dtype=torch.uint8)


@pytest.fixture
def fake(tmp_path):
    """fake("where") makes a finished run folder of two tasks on shapes, whose models are untrained laptop U-Nets."""
    def make(where="run", tasks=2, broken=None, classes=0, **changes):
        folder = tmp_path / where
        folder.mkdir()
        config = dict(dataset="shapes", scale="laptop", seed=42, class_tasks=[[0, 1], [2, 3]], schedule="zero-snr",
                      class_names=data.info("shapes").classes, unet="laptop", data_dir="data", image_size=16,
                      flip=False, sample_steps=2, name="gd-2-laptop", title="Generative distillation",
                      base="gd-2", method="gd", departs={}) | changes
        (folder / "config.json").write_text(json.dumps(config))
        for k in range(1, tasks + 1):
            reseed("generator", k)
            model = UNet(**NETS[config["unet"]], classes=classes) if classes else UNet(**NETS[config["unet"]])
            model.conv_out.weight.data *= 20  # else all untrained nets draw much the same
            if broken == k:
                torch.nn.init.constant_(model.conv_out.bias, math.nan)
            run.save(folder / f"task{k}.pt", {"model": model.state_dict(), "config": config})
        return folder
    return make


# ------------------------------------------------------------------------------------------------- arguments

def test_a_run_brings_everything_but_the_recipe(fake):
    args = get_args([str(fake())])
    assert (args.dataset, args.seed, args.class_tasks, args.steps, args.image_size) == (
        "shapes", 42, [[0, 1], [2, 3]], 2, 16)
    assert (args.replay, args.replay_loss, args.length) == ("generated", "paper", ("iterations", [150, 60]))
    args = get_args([str(fake("other", scale="paper", flip=True)), "--steps", "20", "--replay-loss", "reversed"])
    assert (args.length, args.flip, args.steps, args.replay_loss) == (("epochs", [20.0]), True, 20, "reversed")
    small = get_args([str(fake("small", scale="small"))])
    assert (small.length, small.pool, args.pool) == (("iterations", [900, 250]), 6400, None)
    assert get_args(["--replay", "all", "--scale", "small"]).length == ("iterations", [900])
    assert get_args([str(fake("third")), "--epochs", "2"]).length == ("epochs", [2.0])
    assert (train_classifier.BATCH, train_classifier.LR, R) == (128, 1e-3, 2)


def test_targets_have_the_tasks_of_the_train_scripts():
    for dataset in ("fashion-mnist", "mnist", "cifar10", "cifar100", "shapes"):
        for more in ("--scale paper --seed 42", "--scale paper --seed 1714", "--scale small", "--scale laptop",
                     "--scale laptop --tasks 2", "--class-order natural --tasks 2"):
            common = ["--dataset", dataset, "--replay", "all", *more.split()]
            ours, theirs = get_args(common), train_gr.get_args(common)
            for key in ("class_tasks", "tasks", "image_size", "flip", "seed", "scale", "dataset", "class_names"):
                assert getattr(ours, key) == getattr(theirs, key), (common, key)
    assert get_args("--replay all --scale laptop --tasks 2".split()).class_tasks == [[0, 1], [2, 7]]


# --------------------------------------------------------------------------------------------------- network

@pytest.mark.parametrize("channels, count", [(1, 119_722), (3, 120_298)])
def test_parameter_counts_and_gradients(channels, count):
    model = classifier(channels, 10)
    assert sum(p.numel() for p in model.parameters()) == count
    reseed("test")
    model(torch.randn(8, channels, 32, 32)).square().sum().backward()
    assert all(p.grad.abs().sum() > 0 for p in model.parameters())


@pytest.mark.parametrize("side, sides", [(32, [32, 30, 15, 15, 13, 6, 6, 1]), (16, [16, 14, 7, 7, 5, 2, 2, 1])])
def test_map_sizes_and_layers_of_table_a1(side, sides):
    model, seen = classifier(1, 10).eval(), []
    for module in model:
        if isinstance(module, (torch.nn.Conv2d, torch.nn.MaxPool2d, torch.nn.AdaptiveMaxPool2d)):
            module.register_forward_hook(lambda module, inputs, output: seen.append(output.shape[2]))
    assert model(torch.zeros(2, 1, side, side)).shape == (2, 10)
    assert seen == sides
    assert [m.out_channels for m in model if isinstance(m, torch.nn.Conv2d)] == [32, 32, 64, 128, 128]
    assert [m.kernel_size for m in model if isinstance(m, torch.nn.Conv2d)] == [(3, 3)] * 4 + [(1, 1)]
    assert [m.p for m in model if isinstance(m, torch.nn.Dropout)] == [0.25] * 3


# ---------------------------------------------------------------------------------------------------- losses

def test_distillation_written_out_by_hand():
    """Both forms, class by class, with R = 2 and the factor R^2 = 4."""
    student, teacher = logits_of("student"), logits_of("teacher")
    paper = reverse = 0.0
    for s, t in zip(student.double().tolist(), teacher.double().tolist()):
        p, q = ([math.exp(v / 2) / sum(math.exp(w / 2) for w in row) for v in row] for row in (s, t))
        paper -= 4 * sum(b * math.log(a) for a, b in zip(p, q)) / len(student)
        reverse -= 4 * sum(a * math.log(b) for a, b in zip(p, q)) / len(student)
    assert_close(distillation(student, teacher).item(), paper, rtol=1e-5, atol=0)
    assert_close(distillation(student, teacher, "reversed").item(), reverse, rtol=1e-5, atol=0)
    assert abs(paper - reverse) > 0.1


def test_equation_12_is_at_rest_where_student_is_teacher_and_the_reversed_form_is_not():
    teacher, gradients = logits_of("teacher"), {}
    for form in ("paper", "reversed"):
        student = teacher.clone().requires_grad_()
        distillation(student, teacher, form).backward()
        gradients[form] = student.grad
    assert_close(gradients["paper"], torch.zeros_like(teacher), rtol=0, atol=1e-6)
    best = teacher.argmax(1, keepdim=True)
    assert (gradients["reversed"].gather(1, best) < -1e-3).all(), "it pushes the teacher's first choice up"
    student = logits_of("student").requires_grad_()
    distillation(student, teacher).backward()  # R^2 / R (p_r - q) / B
    expected = R * ((student / R).softmax(1) - (teacher / R).softmax(1)) / len(teacher)
    assert_close(student.grad, expected.detach())


def test_losses_are_of_separate_halves_and_the_teacher_stays_as_it_was():
    reseed("nets")
    model, prev = classifier(1, 10).eval(), classifier(1, 10).eval()
    x_0, x_r = data.normalize(images_of()), torch.rand(3, 1, 16, 16) * 2 - 1
    y, before = torch.tensor([0, 1, 2, 3, 4, 9]), copy.deepcopy(prev.state_dict())
    for form in ("paper", "reversed"):
        new, old = losses(model, prev, x_0, y, x_r, form)
        assert_close(new, -model(x_0).log_softmax(1)[range(6), y].mean())  # Equation 11
        assert_close(old, distillation(model(x_r), prev(x_r), form))
        (new + old).backward()
    assert all(p.grad is None for p in prev.parameters()), "no gradient, even where prev could take one"
    assert all(torch.equal(v, before[key]) for key, v in prev.state_dict().items())
    new, old = losses(model, prev, x_0, y, None)
    assert old == 0 and new > 0


# -------------------------------------------------------------------------------------------------- accuracy

def test_summary_of_made_up_counts():
    result = summary([[90], [60, 20], [30, 26, 40]], [100, 50, 50])
    assert_close(result["matrix"], [[0.9], [0.6, 0.4], [0.3, 0.52, 0.8]])
    assert_close(result["accuracy"], [0.9, 80 / 150, 96 / 200])
    assert summary([[90], [60, 20]], [100, 50, 50])["accuracy"][1] == 80 / 150, "tasks to come do not count"


def test_correct_means_the_largest_of_all_outputs_in_eval_mode():
    class Darkness(torch.nn.Module):
        """Says class 9 of black images and 1 of others; counts the passes in train mode."""
        passes = 0

        def forward(self, x):
            self.passes += self.training
            black = (x == -1).flatten(1).all(1)
            return torch.where(black[:, None], torch.eye(10)[9], torch.eye(10)[1])

    u8, model = images_of(8), Darkness()
    u8[:3] = 0
    assert count_correct(model, u8, torch.tensor([9, 0, 0, 1, 1, 1, 1, 0])) == 5
    assert model.passes == 0 and model.training


# ------------------------------------------------------------------------------------------------ whole runs

def result_of(folder):
    """classifier.json without what a clock or the machine decides."""
    result = json.loads((folder / "classifier.json").read_text())
    return {key: value for key, value in result.items() if key not in ("seconds", "device", "torch", "command")}


def refused(main, sentence, *arguments):
    done = main("train_classifier.py", *arguments)
    assert done.returncode == 2 and "Traceback" not in done.stderr, done.stderr
    last = done.stderr.splitlines()[-1]
    assert "error: " in last and sentence in last, done.stderr


def test_a_run_by_subprocess_and_again_and_with_other_settings(script, main, fake):
    folder = fake("run")
    done = script("train_classifier.py", "run", *QUICK)
    assert done.returncode == 0, done.stderr
    result = json.loads((folder / "classifier.json").read_text())
    protocol = result["protocol"]
    assert (protocol["updates"], protocol["batch_size"], protocol["steps"]) == ([3, 2], 128, 2)
    assert (protocol["replay"], protocol["replay_loss"], protocol["temperature"]) == ("generated", "paper", 2)
    assert (result["name"], result["scale"], result["total"]) == ("gd-2-laptop", "laptop", [1000, 1000])
    assert (result["title"], result["base"], result["method"]) == ("Generative distillation", "gd-2", "gd")
    assert (result["dataset_name"], result["class_names"][0], result["preset_updates"]) == ("shapes", "disc", [150, 60])
    assert [len(row) for row in result["matrix"]] == [1, 2]
    assert len(protocol["generators"]) == len(result["seconds"]) == 2
    assert result["accuracy"][1] == sum(result["correct"][1]) / 2000
    assert not list(folder.glob("*.tmp"))

    before = (folder / "classifier.json").read_bytes()
    assert "finished" in main("train_classifier.py", "run", *QUICK).stdout
    refused(main, "replay_loss was paper and is reversed", "run", *QUICK, "--replay-loss", "reversed")
    assert (folder / "classifier.json").read_bytes() == before

    same = result_of(folder)
    (folder / "classifier.json").write_text(json.dumps(dict(result, accuracy=result["accuracy"][:1])))  # as if killed
    again = main("train_classifier.py", "run", *QUICK)
    assert again.returncode == 0 and "starting over" in again.stdout
    assert result_of(folder) == same, "the same command gives the same numbers"
    assert main("train_classifier.py", "run", *QUICK, "--replay-loss", "reversed", "--restart").returncode == 0
    other = result_of(folder)
    assert other["protocol"] == dict(same["protocol"], replay_loss="reversed")
    assert other["correct"][0] == same["correct"][0] and other["last_losses"][1] != same["last_losses"][1]


@pytest.mark.parametrize("pool", [0, 200])
def test_a_run_written_out_by_hand(fake, pool):
    """Weights 1/k and 1 - 1/k, the models of task k-1, Adam afresh, each draw from its stream, mirrored images: all of
    a tiny run again as the paper tells it, and with replay out of a pool of 200 images. Its last losses tell whether
    the updates before were the same."""
    folder, last = fake(flip=True), []
    images, labels = data.load_images("shapes", "train", "data", 16)
    tests, test_labels = data.load_images("shapes", "test", "data", 16)
    reseed(42, "classifier", "weights")
    model, generator = classifier(1, 10), UNet(**NETS["laptop"])
    generator.load_state_dict(torch.load(folder / "task1.pt", weights_only=True)["model"])
    for k, classes in ((1, (0, 1)), (2, (2, 3))):
        prev = copy.deepcopy(model).eval()
        optimizer = torch.optim.Adam(model.parameters(), 1e-3)
        task = torch.tensor([i for i, y in enumerate(labels.tolist()) if y in classes])
        reseed(42, "classifier", "order", k, 0)
        order = task[torch.randperm(len(task))]
        reseed(42, "classifier", "pool", k)
        drawn = torch.cat([sample(generator, torch.randn(128, 1, 16, 16), alpha_bar(), 2) for _ in range(2)])
        for u in range({1: 12, 2: 3}[k]):
            reseed(42, "classifier", k, u)
            batch = order[u * 128:(u + 1) * 128]
            x, y = images[batch].float() / 127.5 - 1, labels[batch]
            x = torch.where(torch.rand(128, 1, 1, 1) < 0.5, x.flip(3), x)
            x_r = x[:0]
            if k == 2:
                x_r = drawn[torch.randint(200, (128,))] if pool else sample(
                    generator, torch.randn(128, 1, 16, 16), alpha_bar(), 2)
            p, p_r = model(torch.cat([x, x_r])).split([128, len(x_r)])
            new = -p.log_softmax(1)[range(128), y].mean()
            replayed = torch.zeros(())
            if k == 2:
                q = (prev(x_r) / 2).softmax(1).detach()
                replayed = 4 * -(q * (p_r / 2).log_softmax(1)).sum(1).mean()
            loss = new if k == 1 else new / 2 + replayed / 2
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        last.append([loss.item(), new.item(), replayed.item()])

    train_classifier.main([str(folder), "--iterations", "12,3", "--device", "cpu", *["--pool", "200"] * (pool > 0)])
    result = result_of(folder)
    assert_close(result["last_losses"], last, rtol=1e-4, atol=0)
    with eval_mode(model), torch.no_grad():
        right = model(data.normalize(tests)).argmax(1) == test_labels
    assert_close(result["correct"][1], [right[test_labels // 2 == j].sum().item() for j in (0, 1)], rtol=0, atol=20)


def test_targets(main, tmp_path):
    """A pass of the upper one is over all tasks so far: 16 batches in task 1, then 32."""
    common = "--dataset shapes --scale laptop --class-order 0|1 --epochs 0.1 --device cpu --replay".split()
    for replay, updates, title in (("none", [2, 2], "Finetune (classifier)"), ("all", [2, 3], "Joint (classifier)")):
        done = main("train_classifier.py", *common, replay)
        assert done.returncode == 0, done.stderr
        base = {"none": "classifier-finetune", "all": "classifier-joint"}[replay]
        result = result_of(tmp_path / f"runs/shapes/{base}-class_order0-1-epochs0.1-laptop/seed42")
        assert (result["base"], result["method"], result["title"]) == (base, base, title)
        assert result["departs"] == {"class_order": "0|1", "length": ["epochs", [0.1]]}
        protocol = result["protocol"]
        assert (protocol["class_tasks"], protocol["replay"], protocol["updates"]) == ([[0], [1]], replay, updates)
        assert result["preset_updates"] == [150, 60] and "steps" not in protocol
        assert [losses[2] for losses in result["last_losses"]] == [0, 0]


def test_own_pictures_and_a_method_that_nobody_knows(main, tmp_path, fake):
    """A target and a run of a folder of pictures; the run's model has a head beside its U-Net, as JDCL's."""
    random = np.random.default_rng(0)
    for c in ("cat", "dog"):
        (tmp_path / "pets" / c).mkdir(parents=True)
        for i in range(12):
            Image.fromarray(random.integers(0, 256, (20, 20), dtype=np.uint8)).save(tmp_path / "pets" / c / f"{i}.png")
    target = ("--replay", "all", "--dataset", "pets", "--scale", "laptop", "--tasks", 2, *QUICK)
    assert main("train_classifier.py", *target).returncode == 0
    path, = tmp_path.glob("runs/pets/classifier-joint*/seed42")
    assert result_of(path)["class_names"] == ["cat", "dog"] and result_of(path)["total"] == [2, 2]
    folder = fake("run", dataset="pets", class_names=["cat", "dog"], class_tasks=[[1], [0]], unet="jdcl-laptop",
                  classes=2, base="mine", method="my-own", name="mine-laptop", title="Mine", clip=False)
    done = main("train_classifier.py", "run", *QUICK)
    assert done.returncode == 0, done.stderr
    assert (result_of(folder)["method"], result_of(folder)["protocol"]["clip"]) == ("my-own", False)
    Image.new("L", (20, 20)).save(tmp_path / "pets" / "cat" / "0.png")
    refused(main, "digest was", "run", *QUICK)  # other images make another result
    (tmp_path / "pets" / "cat").rename(tmp_path / "pets" / "mouse")
    refused(main, "has the classes dog, mouse, the run was trained on cat, dog", "run", *QUICK)


# ------------------------------------------------------------------------------------------------- bad input

def test_bad_runs(main, tmp_path, fake):
    """Each is refused before a classifier.json is begun; the one that draws NaN only shows it in task 2."""
    folder = fake("run")
    for flag, value in zip(("dataset", "scale", "seed", "tasks", "class-order"), ("shapes", "laptop", 1, 2, "natural")):
        refused(main, f"--{flag} does nothing for a run", "run", f"--{flag}", value)
    refused(main, "at most 1000", "run", "--steps", 1001)
    good = (folder / "task2.pt").read_bytes()
    for bad in (good[:-5000], good[:5000] + bytes([good[5000] ^ 1]) + good[5001:], b"<html>not found</html>"):
        (folder / "task2.pt").write_bytes(bad)
        refused(main, "task2.pt", "run", *QUICK)
    for wrong in ({"model": {"w": torch.zeros(1)}}, [1, 2]):
        torch.save(wrong, folder / "task2.pt")
        refused(main, "task2.pt holds no weights for this network", "run", *QUICK)
    (folder / "task2.pt").unlink()
    refused(main, "not finished, task2.pt is missing", "run", *QUICK)
    config = json.loads((folder / "config.json").read_text())
    for bad, sentence in (*((text, "config.json is damaged") for text in ("{", "[]", "{}")),
                          (json.dumps(dict(config, unet="mine")), "add what is new to NETS"),
                          (json.dumps(dict(config, scale="mine")), "PRESETS of train_classifier.py")):
        (folder / "config.json").write_text(bad)
        refused(main, sentence, "run", *QUICK)
    assert sorted(p.name for p in folder.iterdir()) == ["config.json", "task1.pt"]

    fake("tiny", image_size=8)
    refused(main, "images of 10x10 pixels or more, these have 8", "tiny", *QUICK)
    fake("grey", unet="laptop-rgb")
    refused(main, "--unet laptop-rgb takes images of 3 channels, these have 1", "grey", *QUICK)
    (fake("blocked") / "classifier.json").mkdir()
    refused(main, "classifier.json", "blocked", *QUICK)
    fake("nan", broken=1)
    refused(main, "task1.pt holds weights that are not finite", "nan", *QUICK)
    fake("damaged")
    for text in "{", '{"protocol": [], "accuracy": []}':
        (tmp_path / "damaged/classifier.json").write_text(text)
        refused(main, "is damaged", "damaged", *QUICK)


@pytest.mark.parametrize("name", ["eval_fid.py", "train_classifier.py"])
def test_every_console_can_show_what_is_said(name):
    assert (ROOT / name).read_text(encoding="utf-8").isascii()
