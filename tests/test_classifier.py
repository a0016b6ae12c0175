"""train_classifier.py: the network of Table A.1, both losses by hand, the accuracies, whole runs on made-up models.

Run: python -m pytest tests/test_classifier.py
"""

import copy
import json
import math

import pytest
import torch
from torch.testing import assert_close

import data
import run
import train_classifier
import train_gr
from ddim import alpha_bar, eval_mode, sample, seed
from train_classifier import R, classifier, count_correct, distillation, get_args, losses, summary, to_x_0
from unet import NETS, UNet

QUICK = ["--iterations", "3,2", "--device", "cpu"]


def logits_of(*key, batch=5, classes=10):
    seed("logits", *key)
    return torch.randn(batch, classes) * 3


def images_of(n=6, side=16):
    seed("images")
    return torch.randint(256, (n, 1, side, side), dtype=torch.uint8)


@pytest.fixture
def fake(tmp_path):
    """fake("name") makes a finished run folder of two tasks on shapes, whose models are untrained laptop U-Nets."""
    def make(name="run", tasks=2, broken=None, **changes):
        folder = tmp_path / name
        folder.mkdir()
        config = dict(dataset="shapes", scale="laptop", seed=42, class_tasks=[[0, 1], [2, 3]], schedule="zero-snr",
                      unet="laptop", name="gd-2-laptop", data_dir="data", image_size=16, flip=False, sample_steps=2,
                      batch_size=64, lr=2e-3, epochs=[3.0], iterations=[])  # the last four are not the classifier's
        (folder / "config.json").write_text(json.dumps(dict(config, **changes)))
        for k in range(1, tasks + 1):
            seed("generator", k)
            model = UNet(**NETS["laptop"])
            model.conv_out.weight.data *= 20  # else all untrained nets draw much the same
            if broken == k:
                torch.nn.init.constant_(model.conv_out.bias, math.nan)
            run.save(folder / f"task{k}.pt", {"model": model.state_dict(), "config": config})
        return folder
    return make


# ------------------------------------------------------------------------------------------------- arguments

def test_a_run_brings_everything_but_the_recipe(fake):
    args = get_args([str(fake())])
    assert (args.dataset, args.seed, args.tasks, args.steps, args.image_size) == ("shapes", 42, 2, 2, 16)
    assert (args.replay, args.replay_loss, args.epochs, args.iterations) == ("generated", "paper", [], [150, 60])
    args = get_args([str(fake("other", scale="paper", flip=True)), "--steps", "20", "--replay-loss", "reversed"])
    assert (args.epochs, args.iterations, args.flip, args.steps, args.replay_loss) == ([20.0], [], True, 20, "reversed")
    assert get_args([str(fake("third")), "--epochs", "2"]).iterations == []
    assert (train_classifier.BATCH, train_classifier.LR, R) == (128, 1e-3, 2)


@pytest.mark.parametrize("arguments, folder", [
    ("--replay none", "fashion-mnist/classifier-finetune/seed42"),
    ("--replay all --dataset cifar10 --seed 69", "cifar10/classifier-joint/seed69"),
    ("--replay all --scale laptop", "fashion-mnist/classifier-joint-laptop/seed42"),
    ("--replay all --epochs 20", "fashion-mnist/classifier-joint/seed42"),
    ("--replay none --epochs 5 --tasks 2", "fashion-mnist/classifier-finetune-tasks2-epochs5.0/seed42")])
def test_folders_of_the_targets(arguments, folder):
    assert get_args(arguments.split()).folder.as_posix() == f"runs/{folder}"


def test_targets_have_the_tasks_of_the_train_scripts():
    for scale, dataset in train_gr.PRESETS:
        for chosen in (["42", "1714"] if scale == "paper" else ["42"]):
            common = ["--dataset", dataset, "--scale", scale, "--seed", chosen]
            ours, theirs = get_args([*common, "--replay", "all"]), train_gr.get_args([*common, "--replay", "all"])
            for key in ("class_tasks", "tasks", "image_size", "flip", "seed", "scale", "dataset"):
                assert getattr(ours, key) == getattr(theirs, key), (scale, dataset, key)
    assert set(train_classifier.PRESETS) == set(train_gr.PRESETS)


# --------------------------------------------------------------------------------------------------- network

@pytest.mark.parametrize("channels, count", [(1, 119_722), (3, 120_298)])
def test_parameter_counts(channels, count):
    assert sum(p.numel() for p in classifier(channels, 10).parameters()) == count


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


def test_every_parameter_gets_a_gradient():
    model = classifier(3, 10)
    seed("test")
    model(torch.randn(8, 3, 32, 32)).square().sum().backward()
    assert all(p.grad.abs().sum() > 0 for p in model.parameters())


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
    teacher = logits_of("teacher")
    gradients = {}
    for form in ("paper", "reversed"):
        student = teacher.clone().requires_grad_()
        distillation(student, teacher, form).backward()
        gradients[form] = student.grad
    assert_close(gradients["paper"], torch.zeros_like(teacher), rtol=0, atol=1e-6)
    assert gradients["reversed"].abs().max() > 0.01
    best = teacher.argmax(1, keepdim=True)
    assert (gradients["reversed"].gather(1, best) < 0).all(), "it pushes the teacher's first choice up"
    student = logits_of("student").requires_grad_()
    distillation(student, teacher).backward()  # R^2 / R (p_r - q) / B
    expected = R * ((student / R).softmax(1) - (teacher / R).softmax(1)) / len(teacher)
    assert_close(student.grad, expected.detach())


def test_losses_are_of_separate_halves_and_the_teacher_stays_as_it_was():
    seed("nets")
    model, prev = classifier(1, 10).eval(), classifier(1, 10).eval()
    x_0, x_r = to_x_0(images_of(), False), torch.rand(3, 1, 16, 16) * 2 - 1
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


def test_flip_mirrors_and_pixels_lie_in_minus_1_to_1():
    u8 = torch.arange(16, dtype=torch.uint8).view(1, 1, 4, 4).expand(400, -1, -1, -1) * 17
    straight = to_x_0(u8, False)
    assert straight.min() == -1 and straight.max() == 1
    seed("test")
    mirrored = (to_x_0(u8, True) == straight.flip(3)).flatten(1).all(1)
    assert 150 < mirrored.sum() < 250


# -------------------------------------------------------------------------------------------------- accuracy

def test_summary_of_made_up_counts():
    result = summary([[90], [60, 20], [30, 26, 40]], [100, 50, 50])
    assert_close(result["matrix"], [[0.9], [0.6, 0.4], [0.3, 0.52, 0.8]])
    assert_close(result["accuracy"], [0.9, 80 / 150, 96 / 200])
    assert_close(result["average_accuracy"], (0.3 + 0.52 + 0.8) / 3)
    assert_close(result["average_forgetting"], ((0.9 - 0.3) + (0.4 - 0.52)) / 2)  # task 2 got better
    assert summary([[90]], [100])["average_forgetting"] is None
    later = summary([[50], [80, 10], [70, 10, 10]], [100, 50, 50])
    assert_close(later["average_forgetting"], ((0.8 - 0.7) + 0.0) / 2)  # the best of any time, not the first
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
    return {key: value for key, value in result.items() if key not in ("seconds", "device", "versions", "command")}


def ends_with_a_sentence(command, arguments):  # main or script
    done = command("train_classifier.py", *arguments)
    assert done.returncode == 2 and "error:" in done.stderr and "Traceback" not in done.stderr, done.stderr
    return done.stderr


def test_a_run_by_subprocess_and_again_and_with_other_settings(script, main, tmp_path, fake):
    folder = fake("run")
    done = script("train_classifier.py", "run", *QUICK)
    assert done.returncode == 0, done.stderr
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
    error = ends_with_a_sentence(main, ["run", *QUICK, "--replay-loss", "reversed"])
    assert "replay_loss was paper and is reversed" in error and "--restart" in error
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


def test_a_run_written_out_by_hand(fake):
    """Weights 1/k and 1 - 1/k, the models of task k-1, Adam afresh, each draw from its stream, mirrored images: all of
    a tiny run again as the paper tells it. Its last losses tell whether the updates before were the same."""
    folder, last = fake(flip=True), []
    images, labels = data.load_images("shapes", "train", "data", 16)
    tests, test_labels = data.load_images("shapes", "test", "data", 16)
    seed(42, "classifier", "weights")
    model, generator = classifier(1, 10), UNet(**NETS["laptop"])
    generator.load_state_dict(torch.load(folder / "task1.pt", weights_only=True)["model"])
    for k, classes in ((1, (0, 1)), (2, (2, 3))):
        prev = copy.deepcopy(model).eval()
        optimizer = torch.optim.Adam(model.parameters(), 1e-3)
        task = torch.tensor([i for i, y in enumerate(labels.tolist()) if y in classes])
        seed(42, "classifier", "order", k, 0)
        order = task[torch.randperm(len(task))]
        for u in range({1: 12, 2: 3}[k]):
            seed(42, "classifier", k, u)
            batch = order[u * 128:(u + 1) * 128]
            x, y = images[batch].float() / 127.5 - 1, labels[batch]
            x = torch.where(torch.rand(128, 1, 1, 1) < 0.5, x.flip(3), x)
            x_r = sample(generator, torch.randn(128, 1, 16, 16), alpha_bar(), 2) if k == 2 else x[:0]
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

    train_classifier.main([str(folder), "--iterations", "12,3", "--device", "cpu"])
    result = result_of(folder)
    assert_close(result["last_losses"], last, rtol=1e-4, atol=0)
    with eval_mode(model), torch.no_grad():
        right = model(data.normalize(tests)).argmax(1) == test_labels
    assert_close(result["correct"][1], [right[test_labels // 2 == j].sum().item() for j in (0, 1)], rtol=0, atol=20)


def test_the_upper_target(main, tmp_path):
    done = main("train_classifier.py", "--replay", "all", "--dataset", "shapes", "--scale", "laptop", *QUICK)
    assert done.returncode == 0, done.stderr
    result = result_of(tmp_path / "runs/shapes/classifier-joint-iterations3_2-laptop/seed42")
    assert result["protocol"]["class_tasks"] == [[0, 1], [2, 3], [4, 5]] and result["protocol"]["replay"] == "all"
    assert result["protocol"]["updates"] == [3, 2, 2] and "steps" not in result["protocol"]
    assert [losses[2] for losses in result["last_losses"]] == [0, 0, 0]


def test_passes_of_the_upper_target_are_over_all_tasks_so_far(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    common = ["--dataset", "shapes", "--scale", "laptop", "--class-order", "0|1", "--epochs", "0.1", "--device", "cpu"]
    for replay, name, updates in (("none", "finetune", [2, 2]), ("all", "joint", [2, 3])):  # of 16 and 32 batches
        train_classifier.main([*common, "--replay", replay])
        path, = tmp_path.glob(f"runs/shapes/classifier-{name}*/seed42")
        assert result_of(path)["protocol"]["updates"] == updates


# ------------------------------------------------------------------------------------------------- bad input

@pytest.mark.parametrize("arguments", [line.strip() for line in """
    --dataset fashion-mnist
    nowhere
    nowhere --replay all
    --replay some
    --replay generated
    --replay none --steps 10
    --replay none --replay-loss paper
    --replay none --dataset mnist
    --replay none --dataset shapes --scale tiny
    --replay all --dataset imagenet100 --scale laptop
    --replay all --tasks 3
    --replay all --class-order 0,1|1,2
    --replay all --class-order 0,1|2,3 --tasks 3
    --replay all --epochs 0
    --replay all --iterations 1.5
    --replay all --seed one
    --replay all --device tpu
    --replay all --unknown""".strip().splitlines()])
def test_bad_arguments(main, tmp_path, tally, arguments):
    ends_with_a_sentence(main, arguments.split())
    assert not any(tmp_path.iterdir()), "no folder is made"
    tally["bad commands refused"] += 1


def test_bad_runs(main, tmp_path, fake):
    """Each is refused before a classifier.json is begun; the one that draws NaN only shows it in task 2."""
    folder = fake("run")
    for flag, value in zip(("dataset", "scale", "seed", "tasks", "class-order"), ("shapes", "laptop", 1, 2, "natural")):
        assert f"--{flag} does nothing for a run" in ends_with_a_sentence(main, ["run", f"--{flag}", value])
    assert "at most 1000" in ends_with_a_sentence(main, ["run", "--steps", 1001])
    good = (folder / "task2.pt").read_bytes()
    for bad in (good[:-5000], good[:5000] + bytes([good[5000] ^ 1]) + good[5001:], b"", b"<html>not found</html>"):
        (folder / "task2.pt").write_bytes(bad)
        assert "task2.pt" in ends_with_a_sentence(main, ["run", *QUICK])
    torch.save({"model": {"w": torch.zeros(1)}}, folder / "task2.pt")
    assert "does not hold the network" in ends_with_a_sentence(main, ["run", *QUICK])
    torch.save([1, 2], folder / "task2.pt")
    assert "does not hold the network" in ends_with_a_sentence(main, ["run", *QUICK])
    (folder / "task2.pt").unlink()
    assert "not finished, task2.pt is missing" in ends_with_a_sentence(main, ["run", *QUICK])
    for bad in ("{", "[]", "{}", json.dumps(dict(json.loads((folder / "config.json").read_text()), unet="resnet"))):
        (folder / "config.json").write_text(bad)
        assert "is no run of train_gr.py" in ends_with_a_sentence(main, ["run", *QUICK])
    (folder / "config.json").unlink()
    ends_with_a_sentence(main, ["run", *QUICK])
    assert sorted(p.name for p in folder.iterdir()) == ["task1.pt"]

    fake("nan", broken=1)
    assert "task1.pt draws broken images" in ends_with_a_sentence(main, ["nan", *QUICK])
    assert len(result_of(tmp_path / "nan")["accuracy"]) == 1, "what was measured before stays, and nothing is added"
    (tmp_path / "nan/classifier.json").write_text("{")
    assert "is damaged" in ends_with_a_sentence(main, ["nan", *QUICK])


def test_bad_input(script, main, tmp_path, fake):
    fake("unfinished", tasks=1)
    ends_with_a_sentence(script, ["nowhere"])
    ends_with_a_sentence(main, ["unfinished"])
    ends_with_a_sentence(main, ["--replay", "all", "--steps", "2"])
    assert sorted(p.name for p in tmp_path.iterdir()) == ["unfinished"]
