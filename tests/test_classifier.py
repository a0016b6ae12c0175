"""train_classifier.py: the network of Table A.1, both losses by hand, whole runs on made-up models."""

import copy
import json
import math

import pytest
import torch
from conftest import write_pictures
from PIL import Image
from torch.testing import assert_close

import data
import train_classifier
import train_gr
from ddim import alpha_bar, eval_mode, reseed, sample
from train_classifier import classifier, count_correct, distillation, get_args, losses, summary
from unet import NETS, UNet

QUICK = ["--iterations", "3,2", "--device", "cpu"]


def images_of(n=6, side=16):
    reseed("images")
    return torch.randint(256, (n, 1, side, side), dtype=torch.uint8)


# ------------------------------------------------------------------------------------------------- arguments

def test_a_run_brings_everything_but_the_recipe(fake_run):
    assert get_args([str(fake_run())]).length == ("iterations", [150, 60])
    args = get_args([str(fake_run("other", scale="paper", flip=True)), "--steps", "20", "--replay-loss", "reversed"])
    assert (args.length, args.flip, args.steps, args.replay_loss) == (("epochs", [20.0]), True, 20, "reversed")
    small = get_args([str(fake_run("small", scale="small"))])
    assert (small.length, small.pool, args.pool) == (("iterations", [900, 250]), 6400, None)
    assert get_args(["--replay", "all", "--scale", "small"]).length == ("iterations", [900])
    assert get_args([str(fake_run("third")), "--epochs", "2"]).length == ("epochs", [2.0])


def test_targets_have_the_tasks_of_the_train_scripts():
    for dataset in ("fashion-mnist", "mnist", "cifar10", "cifar100", "shapes"):
        for more in ("--scale paper --seed 42", "--scale paper --seed 1714", "--scale small", "--scale laptop",
                     "--scale laptop --tasks 2", "--class-order natural --tasks 2", "--class-order 4|7,1"):
            common = ["--dataset", dataset, "--replay", "all", *more.split()]
            ours, theirs = get_args(common), train_gr.get_args(common)
            for key in ("class_tasks", "tasks", "image_size", "flip", "seed", "scale", "dataset", "class_names"):
                assert getattr(ours, key) == getattr(theirs, key), (common, key)


@pytest.mark.parametrize("channels, count, side, sides", [(3, 120_298, 32, [32, 30, 15, 15, 13, 6, 6, 1]),
                                                          (1, 119_722, 16, [16, 14, 7, 7, 5, 2, 2, 1])])
def test_map_sizes_and_layers_of_table_a1(channels, count, side, sides):
    model, seen = classifier(channels, 10), []
    for module in model:
        if isinstance(module, (torch.nn.Conv2d, torch.nn.MaxPool2d, torch.nn.AdaptiveMaxPool2d)):
            module.register_forward_hook(lambda module, inputs, output: seen.append(output.shape[2]))
    reseed("test")
    logits = model(torch.randn(8, channels, side, side))
    logits.square().sum().backward()
    assert logits.shape == (8, 10) and seen == sides
    assert all(p.grad.abs().sum() > 0 for p in model.parameters())
    assert sum(p.numel() for p in model.parameters()) == count
    assert [m.out_channels for m in model if isinstance(m, torch.nn.Conv2d)] == [32, 32, 64, 128, 128]
    assert [m.kernel_size for m in model if isinstance(m, torch.nn.Conv2d)] == [(3, 3)] * 4 + [(1, 1)]
    assert [m.p for m in model if isinstance(m, torch.nn.Dropout)] == [0.25] * 3


# ---------------------------------------------------------------------------------------------------- losses

def test_distillation_written_out_by_hand():
    """Both forms, class by class, with R = 2 and the factor R^2 = 4."""
    reseed("logits")
    student, teacher = 3 * torch.randn(2, 5, 10)
    paper = reverse = 0.0
    for s, t in zip(student.double().tolist(), teacher.double().tolist()):
        p, q = ([math.exp(v / 2) / sum(math.exp(w / 2) for w in row) for v in row] for row in (s, t))
        paper -= 4 * sum(b * math.log(a) for a, b in zip(p, q)) / len(student)
        reverse -= 4 * sum(a * math.log(b) for a, b in zip(p, q)) / len(student)
    assert_close(distillation(student, teacher).item(), paper, rtol=1e-5, atol=0)
    assert_close(distillation(student, teacher, "reversed").item(), reverse, rtol=1e-5, atol=0)
    assert abs(paper - reverse) > 0.1


def test_the_teacher_gets_no_gradient_even_where_it_could():
    model, prev = classifier(1, 10), classifier(1, 10)
    new, old = losses(model, prev, data.normalize(images_of()), torch.arange(6), torch.rand(3, 1, 16, 16))
    (new + old).backward()
    assert all(p.grad is None for p in prev.parameters())


def test_summary_of_made_up_counts():
    result = summary([[90], [60, 20], [30, 26, 40]], [100, 50, 50])
    assert_close(result["matrix"], [[0.9], [0.6, 0.4], [0.3, 0.52, 0.8]])
    assert_close(result["accuracy"], [0.9, 80 / 150, 96 / 200])


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
    done = main("train_classifier.py", *arguments, code=2)
    assert sentence in done.stderr.splitlines()[-1], done.stderr


def test_a_run_by_subprocess_and_again_and_with_other_settings(script, main, fake_run):
    folder = fake_run("run")
    script("train_classifier.py", "run", *QUICK)
    result = json.loads((folder / "classifier.json").read_text())
    protocol = result["protocol"]
    assert (protocol["updates"], protocol["batch_size"], protocol["steps"]) == ([3, 2], 128, 2)
    assert (protocol["replay"], protocol["replay_loss"], protocol["temperature"]) == ("generated", "paper", 2)
    assert (result["name"], result["scale"], result["total"]) == ("gd-2-laptop", "laptop", [1000, 1000])
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
    assert "starting over" in again.stdout
    assert result_of(folder) == same, "the same command gives the same numbers"
    main("train_classifier.py", "run", *QUICK, "--replay-loss", "reversed", "--restart")
    other = result_of(folder)
    assert other["protocol"] == dict(same["protocol"], replay_loss="reversed")
    assert other["correct"][0] == same["correct"][0] and other["last_losses"][1] != same["last_losses"][1]


@pytest.mark.parametrize("pool", [0, 200])
def test_a_run_written_out_by_hand(fake_run, pool):
    """Weights 1/k and 1 - 1/k, the models of task k-1, Adam afresh, each draw from its stream, mirrored images: all of
    a tiny run again as the paper tells it, and with replay out of a pool of 200 images. Its last losses tell whether
    the updates before were the same."""
    folder, abar, last = fake_run(flip=True, schedule="linear"), alpha_bar("linear"), []
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
        drawn = torch.cat([sample(generator, torch.randn(128, 1, 16, 16), abar, 2) for _ in range(2)])
        for u in range({1: 12, 2: 3}[k]):
            reseed(42, "classifier", k, u)
            batch = order[u * 128:(u + 1) * 128]
            x, y = images[batch].float() / 127.5 - 1, labels[batch]
            x = torch.where(torch.rand(128, 1, 1, 1) < 0.5, x.flip(3), x)
            x_r = x[:0]
            if k == 2:
                x_r = drawn[torch.randint(200, (128,))] if pool else sample(
                    generator, torch.randn(128, 1, 16, 16), abar, 2)
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
        main("train_classifier.py", *common, replay)
        base = {"none": "classifier-finetune", "all": "classifier-joint"}[replay]
        result = result_of(tmp_path / f"runs/shapes/{base}-class_order0-1-epochs0.1-laptop/seed42")
        assert (result["base"], result["method"], result["title"]) == (base, base, title)
        assert result["departs"] == {"class_order": "0|1", "length": ["epochs", [0.1]]}
        protocol = result["protocol"]
        assert (protocol["class_tasks"], protocol["replay"], protocol["updates"]) == ([[0], [1]], replay, updates)
        assert result["preset_updates"] == [150, 60] and "steps" not in protocol
        assert [losses[2] for losses in result["last_losses"]] == [0, 0]


def test_own_pictures_and_a_method_that_nobody_knows(main, tmp_path, fake_run):
    for c in ("cat", "dog"):
        write_pictures(tmp_path / "pets" / c, 12)
    target = ("--replay", "all", "--dataset", "pets", "--scale", "laptop", "--tasks", 2, *QUICK)
    main("train_classifier.py", *target)
    path, = tmp_path.glob("runs/pets/classifier-joint*/seed42")
    assert result_of(path)["class_names"] == ["cat", "dog"] and result_of(path)["total"] == [2, 2]
    folder = fake_run("run", dataset="pets", class_names=["cat", "dog"], class_tasks=[[1], [0]], unet="jdcl-laptop",
                  classes=2, base="mine", method="my-own", name="mine-laptop", title="Mine", clip=False)
    main("train_classifier.py", "run", *QUICK)
    assert (result_of(folder)["method"], result_of(folder)["protocol"]["clip"]) == ("my-own", False)
    Image.new("L", (20, 20)).save(tmp_path / "pets" / "cat" / "000.png")
    refused(main, "digest was", "run", *QUICK)  # other images make another result
    (tmp_path / "pets" / "cat").rename(tmp_path / "pets" / "mouse")
    refused(main, "has the classes dog, mouse, the run was trained on cat, dog", "run", *QUICK)


def test_bad_runs(main, tmp_path, fake_run):
    folder = fake_run("run")
    for flag, value in zip(("dataset", "scale", "seed", "tasks", "class-order"), ("shapes", "laptop", 1, 2, "natural")):
        refused(main, f"--{flag} does nothing for a run", "run", f"--{flag}", value)
    refused(main, "at most 1000", "run", "--steps", 1001)
    (folder / "task2.pt").write_bytes((folder / "task2.pt").read_bytes()[:-5000])
    refused(main, "task2.pt is damaged", "run", *QUICK)
    torch.save([1, 2], folder / "task2.pt")
    refused(main, "task2.pt holds no weights for this network", "run", *QUICK)
    (folder / "task2.pt").unlink()
    refused(main, "not finished, task2.pt is missing", "run", *QUICK)
    config = json.loads((folder / "config.json").read_text())
    for bad, sentence in (("{", "config.json is damaged"), ("{}", "config.json is damaged"),
                          (json.dumps(dict(config, unet="mine")), "add what is new to NETS"),
                          (json.dumps(dict(config, scale="mine")), "PRESETS of train_classifier.py")):
        (folder / "config.json").write_text(bad)
        refused(main, sentence, "run", *QUICK)
    assert sorted(p.name for p in folder.iterdir()) == ["config.json", "task1.pt"]

    fake_run("tiny", image_size=8)
    refused(main, "images of 10x10 pixels or more, these have 8", "tiny", *QUICK)
    fake_run("grey", unet="laptop-rgb")
    refused(main, "--unet laptop-rgb takes images of 3 channels, these have 1", "grey", *QUICK)
    (fake_run("blocked") / "classifier.json").mkdir()
    refused(main, "classifier.json", "blocked", *QUICK)
    fake_run("damaged")
    for text in "{", '{"protocol": [], "accuracy": []}':
        (tmp_path / "damaged/classifier.json").write_text(text)
        refused(main, "is damaged", "damaged", *QUICK)
