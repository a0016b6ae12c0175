"""Tables and figures of made-up runs with known means: python -m pytest tests/test_report.py"""

import csv
import itertools
import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import eval_fid
import report
import train_classifier
import train_gd
import train_gr
from data import quantize
from ddim import alpha_bar, sample, seed
from run import InputError
from unet import NETS, UNet

SEEDS = (42, 69, 1714)
HASH = "0123456789abcdef" * 4
GR, GD = "Generative replay", "Generative distillation"
FM_FID, FM_KLD, FM_ACC = "Fashion-MNIST ↓ FID", "Fashion-MNIST ↓ KLD", "Fashion-MNIST ↑ ACC"
C10_FID, C10_KLD, C10_ACC, UPDATES = "CIFAR-10 ↓ FID", "CIFAR-10 ↓ KLD", "CIFAR-10 ↑ ACC", "updates of the preset's"
FID = dict(network="inception-2015-12-05", sha256="6726825d", name="tf1")


def make(root, argv, seed=42, fid=None, kld=1.0, frd=100.0, share_old=0.5, acc=None, ms=(100, 110), done=None,
         labeller=HASH, n=10000, protocol="tf1", missing="there are no weights", replay_loss="paper", **changes):
    """A run folder as the train scripts, eval_fid.py and train_classifier.py leave it, with these results after its
    last task; only the weights are missing. Returns the folder."""
    script, *argv = argv.split()
    args = {"gr": train_gr, "gd": train_gd}[script].get_args([*argv, "--seed", str(seed)])
    per_task = {"fashion-mnist": 9400, "cifar10": 31400}[args.dataset] if args.scale == "paper" else 100
    updates = [per_task * (k if args.replay == "all" else 1) for k in range(1, args.tasks + 1)]
    updates = args.iterations * args.tasks or updates
    command = " ".join(["python", f"/home/me/train_{script}.py", *argv, "--seed", str(seed)])
    config = dict(vars(args), updates=updates, command=command, torch="2.15.0", device="cpu", **changes)
    folder = root / args.dataset / config["name"] / f"seed{seed}"
    folder.mkdir(parents=True)
    done = args.tasks if done is None else done
    records, lines, seconds = [], [], 0.0
    for k in range(1, done + 1):
        last = k == done
        records.append(dict(
            task=k, fid=None if fid is None else float(fid if last else 5), fid_missing=None if fid else missing,
            frd=float(frd if last else 50), kld=float(kld if last else 0.1), share_old=share_old if k > 1 else None,
            protocol=dict(
                n=n, n_real=2000 * k, seed=seed, steps=args.sample_steps, schedule="zero-snr", kld_eps=1e-8,
                reference=f"test images of {2 * k} classes", checkpoint=f"{k}{seed}",
                frd=dict(network="resnet18-scratch", sha256=labeller, test_accuracy=0.9),
                fid=fid and dict(FID, name=protocol))))
        for u in range(50, updates[k - 1] + 1, 50):
            seconds += 0.5
            speed = ms[u // 50 % 2] if last else 7
            lines.append(dict(task=k, update=u, ms_per_update=speed, peak_memory_mb=800, seconds=seconds))
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "eval.json").write_text(json.dumps(records))
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    if acc is not None:
        (folder / "classifier.json").write_text(json.dumps(classifier(args, acc, replay_loss)))
    return folder


def classifier(args, acc, replay_loss=None):
    """What train_classifier.py writes at the paper's scale: of a run, or of a target, which has no `replay_loss`."""
    updates = {"fashion-mnist": [1880] * 5, "cifar10": [1580] * 5}[args.dataset]
    updates = [1880, 3760, 5640, 7500, 9380] if args.replay == "all" else updates  # 20 ceil(12000 k / 128)
    protocol = dict(dataset=args.dataset, image_size=32, class_tasks=args.class_tasks, seed=args.seed,
                    updates=updates, batch_size=128, lr=1e-3, replay="generated" if replay_loss else args.replay)
    protocol |= dict(replay_loss=replay_loss, steps=10, generators=[str(args.seed)]) if replay_loss else {}
    return dict(accuracy=[0.99, 0.95, 0.9, 0.85, acc], protocol=protocol, name=args.name, scale="paper", device="cpu",
                seconds=[1.0] * 5, versions=dict(torch="2.15.0"), command="python train_classifier.py")


def make_target(root, replay, acc, seed=42, dataset="fashion-mnist"):
    args = train_classifier.get_args(["--replay", replay, "--seed", str(seed), "--dataset", dataset])
    folder = root / dataset / args.name / f"seed{seed}"
    folder.mkdir(parents=True)
    (folder / "classifier.json").write_text(json.dumps(classifier(args, acc)))


def column(text, title, strategy, header, *above):
    """The cells under `header` of all lines of a strategy's row (given what else its first line begins with)."""
    block = text.split(f"## {title}\n\n")[1].split("\n\n")[0]
    head, _, *lines = [[cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in block.splitlines()]
    first = next(i for i, line in enumerate(lines) if line[:1 + len(above)] == [strategy, *above])
    rest = itertools.takewhile(lambda line: not line[0], lines[first + 1:])
    return [line[head.index(header)] for line in [lines[first], *rest]]


def text_of(*folders):
    return report.report(report.find(list(folders)))


# ------------------------------------------------------------------------------------------- the paper's values

def test_the_papers_values_are_those_of_the_paper():
    """A second copy, typed from the paper: all of Table 1, a part of the others."""
    text = report.report([])
    table1 = {"Joint (upper target)": "15.5 ± 1.3, 0.08 ± 0.02, 31.9 ± 2.9, 0.12 ± 0.02",
              "Finetune (lower target)": "68.8 ± 7.0, 4.82 ± 1.42, 55.8 ± 2.6, 1.14 ± 0.10",
              GR: "211.8 ± 6.9, 3.39 ± 0.30, 96.4 ± 5.3, 0.74 ± 0.14",
              GD: "23.5 ± 1.1, 0.25 ± 0.10, 42.3 ± 4.7, 0.15 ± 0.01"}
    heads = [FM_FID, FM_KLD, C10_FID, C10_KLD]
    for strategy, values in table1.items():
        assert [column(text, "Table 1", strategy, head)[0] for head in heads] == values.split(", ")
    assert column(text, "Table 2", "Joint (upper target)", C10_ACC)[0] == "0.77 ± 0.03"
    assert column(text, "Table 2", GR, FM_ACC)[0] == "0.50 ± 0.04"
    assert column(text, "Table B.1", "Finetune", "CIFAR-10 ↓ ms per update")[0] == "383.4 ± 95.3"
    assert column(text, "Table B.1", GR, "Fashion-MNIST parameters")[0] == "85,711,746"
    assert column(text, "Table B.2", "Experience replay", C10_FID, "1000")[0] == "49.6 ± 5.4"
    assert column(text, "Table B.3", "Experience replay", FM_ACC, "100")[0] == "0.79 ± 0.01"
    assert column(text, "Table B.4", GR, FM_FID, "10", "–")[0] == "121.42 ± 13.04"
    assert column(text, "Table B.4", "Distil. w/ Gaussian noise", FM_FID, "–", "8")[0] == "38.87 ± 2.23"
    assert column(text, "Table B.5", "Joint (classifier)", C10_ACC)[0] == "0.77 ± 0.00"
    assert column(text, "Table B.5", GD, C10_KLD, "100", "0.75")[0] == "0.27 ± 0.05"
    assert text.count("ours") - report.INTRODUCTION.count("ours") == 4 + 4 + 3 + 6 + 6 + 12 + 12  # one line a row
    assert "difference" not in text.replace(report.INTRODUCTION, "")


def test_the_commands_make_the_runs_of_their_rows():
    seen = set()
    for _, _, _, rows in report.paper_rows():
        for names, _ in rows:
            for dataset, name in names.items():
                _, script, *argv = report.command(name, dataset).split()
                module = {m.__name__ + ".py": m for m in (train_gr, train_gd, train_classifier)}[script]
                args = module.get_args(argv)
                assert (args.dataset, args.name, args.scale) == (dataset, name, "paper")
                seen.add((dataset, name))
    assert len(seen) == 2 * (2 + 2 + 3 + 6 + 2)


def test_the_commands_of_the_results_readme_are_valid():
    text = (Path(report.__file__).parent / "results" / "README.md").read_text()
    for name, value in dict(dataset="fashion-mnist", seed="42", steps="2", images="100", **{"lambda": "0.5"}).items():
        text = text.replace(f"${name}", value)
    found = re.findall(r"python (\w+)\.py ([^#`\n]*)", text.replace("RUN", "runs/x"))
    modules = {m.__name__: m for m in (train_gr, train_gd, train_classifier, eval_fid, report)}
    for script, argv in found:
        if "${config" not in argv:
            modules[script].get_args(argv.split())
    assert len(found) > 25 and {script for script, _ in found} == set(modules)


# ------------------------------------------------------------------------------------------------------ numbers

def test_mean_standard_error_n_and_difference(tmp_path):
    for s, fid, kld, acc in zip(SEEDS, (20, 23, 26), (0.1, 0.2, 0.6), (0.71, 0.72, 0.76)):
        make(tmp_path, "gd", s, fid=fid, kld=kld, acc=acc)
        make_target(tmp_path, "all", acc + 0.2, s)
        make(tmp_path, "gd --dataset cifar10", s, fid=fid + 20)
    text = text_of(tmp_path)
    # sample standard deviations 3, 0.2646 and 0.0265, each divided by sqrt(3)
    assert column(text, "Table 1", GD, FM_FID) == ["23.5 ± 1.1", "23.0 ± 1.7 (3)", "-0.5"]
    assert column(text, "Table 1", GD, FM_KLD) == ["0.25 ± 0.10", "0.30 ± 0.15 (3)", "+0.05"]
    assert column(text, "Table 1", GD, C10_FID) == ["42.3 ± 4.7", "43.0 ± 1.7 (3)", "+0.7"]
    assert column(text, "Table B.4", GD, FM_FID, "2", "0.75") == ["23.53 ± 1.06", "23.00 ± 1.73 (3)", "-0.53"]
    for title in ("Table 2", "Table B.3"):
        assert column(text, title, GD, FM_ACC) == ["0.72 ± 0.03", "0.73 ± 0.02 (3)", "+0.01"]
        assert column(text, title, "Joint (upper target)", FM_ACC) == ["0.92 ± 0.00", "0.93 ± 0.02 (3)", "+0.01"]
    assert column(text, "Table 1", GR, FM_FID) == ["211.8 ± 6.9", "–"]
    assert column(text, "Table 1", GR, "command")[0] == "`python train_gr.py [--dataset cifar10]`"
    assert column(text, "Complete: Fashion-MNIST, paper scale, 32x32, 5 tasks", GD, "↓ frd") == ["100.0 ± 0.0 (3)"]
    assert "Shortened" not in text.replace(report.INTRODUCTION, "")


def test_one_run_has_no_error_and_is_counted_once(tmp_path, capsys):
    folder = make(tmp_path, "gr", fid=200)
    shutil.copytree(folder, tmp_path / "copy" / "seed42")
    assert column(text_of(tmp_path), "Table 1", GR, FM_FID) == ["211.8 ± 6.9", "200.0 (1)", "-11.8"]
    assert "left out, gr-2 with seed 42 was read from another place" in capsys.readouterr().err


def test_table_b1_is_of_the_last_thousand_updates(tmp_path):
    make(tmp_path, "gr", ms=(100, 110))  # a record each 50 updates; 7 ms in the tasks before
    make(tmp_path, "gr", seed=69, ms=(120, 130))
    make(tmp_path, "gr --replay none", ms=(50, 50))
    text = text_of(tmp_path)
    paper, ours, difference = column(text, "Table B.1", GR, "Fashion-MNIST ↓ ms per update")
    assert ours.startswith("115.0 ± 5.0 (2), device ") and difference == "-549.3"
    assert column(text, "Table B.1", "Finetune", "Fashion-MNIST ↓ ms per update")[1].startswith("50.0 ± 0.0 (1), ")
    assert column(text, "Table B.1", GR, "Fashion-MNIST parameters") == ["85,711,746", "85,711,746", "+0"]
    assert column(text, "Table B.1", "Finetune", "Fashion-MNIST parameters") == ["42,855,873", "42,855,873", "+0"]


# ------------------------------------------------------------------------- what may not be averaged or compared

def test_shortened_runs_stand_apart(tmp_path):
    make(tmp_path, "gd --scale laptop", fid=20, n=2000)                     # small
    make(tmp_path, "gd --iterations 500", fid=21)                           # fewer updates
    make(tmp_path, "gd", fid=22, done=3, share_old=0.25)                    # not finished
    file = make(tmp_path, "gr", fid=23) / "config.json"                     # an update fewer under the preset's name
    file.write_text(file.read_text().replace("9400, 9400]", "9400, 9399]"))
    text = text_of(tmp_path)
    for strategy in (GR, GD):
        assert column(text, "Table 1", strategy, FM_FID)[1:] == ["–"]
    assert "Complete" not in text and "difference" not in text.replace(report.INTRODUCTION, "")
    laptop = "Shortened: Fashion-MNIST, laptop scale, 16x16, 3 tasks"
    assert column(text, laptop, GD, "↓ FID") == ["20.0 (1)"]
    assert column(text, laptop, GD, UPDATES) == ["300 of 700"]
    assert column(text, laptop, GD, "command") == ["`python train_gd.py --scale laptop`"]
    paper = "Shortened: Fashion-MNIST, paper scale, 32x32, 5 tasks"
    assert column(text, paper, GD, "↑ old classes, %", "`gd-2`", "3 of 5") == ["25.0 (1)"]
    assert column(text, paper, GD, UPDATES, "`gd-2`") == ["28,200 of 47,000"]
    assert column(text, paper, GD, UPDATES, "`gd-2-iterations500`") == ["2,500 of 47,000"]
    assert column(text, paper, GR, "↓ FID", "`gr-2`", "5 of 5") == ["23.0 (1)"]


def test_departures_from_the_preset_are_no_row_of_the_paper(tmp_path):
    make(tmp_path, "gd --lambda 0.5", fid=20)
    make(tmp_path, "gd --class-order 0,1|2,3|4,5|6,7|8,9", fid=21)
    text = text_of(tmp_path)
    assert column(text, "Table 1", GD, FM_FID)[1:] == ["–"]
    complete = "Complete: Fashion-MNIST, paper scale, 32x32, 5 tasks"
    assert column(text, complete, GD, "↓ FID", "`gd-2-lam0.5`") == ["20.0 (1)"]
    assert "--class-order 0,1\\|2,3" in text  # a bare | would end the cell


def test_labellers_are_never_averaged(tmp_path):
    make(tmp_path, "gd", 42, fid=20, kld=0.2)
    make(tmp_path, "gd", 69, fid=22, kld=0.4)
    make(tmp_path, "gd", 1714, fid=24, kld=0.6, labeller="f" * 64)
    text = text_of(tmp_path)
    assert column(text, "Table 1", GD, FM_KLD) == [
        "0.25 ± 0.10", "0.30 ± 0.10 (2), labeller 0123456789ab", "+0.05", "0.60 (1), labeller ffffffffffff", "+0.35"]
    assert column(text, "Table 1", GD, FM_FID)[1] == "22.0 ± 1.2 (3)"  # asks no labeller


def test_protocols_are_never_averaged_and_only_the_papers_is_compared(tmp_path):
    make(tmp_path, "gd", 42, fid=20)
    make(tmp_path, "gd", 69, fid=40, n=2000)
    make(tmp_path, "gd", 1714, fid=60, protocol="pytorch-fid")
    ours = column(text_of(tmp_path), "Table 1", GD, FM_FID)
    assert sorted(ours[1::2]) == [
        "20.0 (1), fid tf1, n 10000", "40.0 (1), fid tf1, n 2000", "60.0 (1), fid pytorch-fid, n 10000"]
    assert ours[2::2].count("-3.5") == 1 and set(ours[2::2]) == {"-3.5", ""}


def test_two_evaluations_of_one_run_are_two_values_of_one_seed(tmp_path):
    folder = make(tmp_path, "gd", fid=20)
    records = json.loads((folder / "eval.json").read_text())
    again = [r | {"protocol": r["protocol"] | {"n": 2000}, "fid": 30.0} for r in records]
    (folder / "eval.json").write_text(json.dumps(records + again))
    assert column(text_of(tmp_path), "Table 1", GD, FM_FID) == [
        "23.5 ± 1.1", "20.0 (1), n 10000", "-3.5", "30.0 (1), n 2000"]


def test_precision_and_loss_are_remarked(tmp_path):
    make(tmp_path, "gr --precision bf16", fid=200, acc=0.5, replay_loss="reversed")
    text = text_of(tmp_path)
    assert column(text, "Table 1", GR, FM_FID)[1:] == ["200.0 (1), precision bf16", "-11.8"]
    assert column(text, "Table 2", GR, FM_ACC)[1] == "0.50 (1), precision bf16, replay_loss reversed"


def test_a_missing_fid_is_a_dash_with_its_reason(tmp_path):
    make(tmp_path, "gd", kld=0.2, missing="the weights are nowhere")
    make(tmp_path, "gr", kld=0.2, missing="the weights are nowhere")
    text = text_of(tmp_path)
    assert column(text, "Table 1", GD, FM_FID) == ["23.5 ± 1.1", "–[^1]", ""]
    assert column(text, "Table B.4", GR, FM_FID, "2") == ["211.79 ± 6.92", "–[^1]", ""]
    assert text.endswith("[^1]: no FID: the weights are nowhere") and text.count("[^1]:") == 1


# -------------------------------------------------------------------------------------------------- files, faults

def test_csv_has_a_row_per_run_task_and_metric(tmp_path):
    make(tmp_path, "gd --scale laptop", fid=20, n=2000, acc=None)
    report.main([str(tmp_path), "--no-figures", "--csv", str(tmp_path / "all.csv")])
    rows = list(csv.DictReader((tmp_path / "all.csv").open()))
    assert [r["value"] for r in rows if r["metric"] == "fid"] == ["5.0", "5.0", "20.0"]
    assert {r["metric"] for r in rows} == set(report.METRICS) - {"acc"}
    assert {(r["name"], r["seed"], r["complete"]) for r in rows} == {("gd-2-laptop", "42", "False")}
    assert json.loads(next(r for r in rows if r["metric"] == "kld")["protocol"])["labeller.sha256"] == HASH


def test_saved_results_give_the_same_tables(tmp_path, capsys):
    runs, results = tmp_path / "runs", tmp_path / "results"
    for s in SEEDS:
        make(runs, "gd", s, fid=20 + s / 1000, acc=0.7)
        make(runs, "gr --scale laptop", s, n=2000)
        make_target(runs, "none", 0.2, s)
    make(runs, "gr", done=2)
    report.main([str(runs), "--no-figures", "--save", str(results)])
    first = capsys.readouterr().out
    report.main([str(results)])
    assert capsys.readouterr().out == first and "20.6" in first
    report.main([str(runs), str(results), "--no-figures"])  # nothing is counted twice
    assert capsys.readouterr().out == first
    names = {p.parent.name for p in results.glob("fashion-mnist/*/seed42.json")}
    assert names == {"gd-2", "gr-2-laptop", "classifier-finetune", "gr-2"}
    saved = json.loads((results / "fashion-mnist/gd-2/seed42.json").read_text())
    assert saved["command"] == "python train_gd.py --seed 42"
    assert saved["torch"] == "2.15.0" and saved["labeller"] == [HASH]
    assert (saved["updates_done"], saved["updates_preset"], saved["tasks_done"]) == (47000, [9400] * 5, 5)
    assert saved["device"] and saved["peak_memory_mb"] == 800 and saved["seconds"] == 470.0
    assert saved["ms_per_update"][-1] == dict(task=5, updates=9400, mean=105.0, sd=5.0)
    assert saved["commit"] is None or set(saved["commit"]) == {"hash", "dirty"}
    assert len(saved["eval"]) == len(saved["classifier"]["accuracy"]) == 5 and saved["config"]["lam"] == 0.75
    assert (results / "report.md").read_text().startswith(first)
    assert {p.name for p in results.glob("*.png")} == {  # what needs no weights
        f"{figure}-fashion-mnist{scale}.png" for figure in ("figure4", "time") for scale in ("", "-laptop")}


def test_half_finished_trees_are_reported_as_far_as_they_go(tmp_path, capsys):
    make(tmp_path, "gd", fid=20)
    make(tmp_path, "gd", 69, fid=22).joinpath("eval.json").unlink()
    make(tmp_path, "gd", 1714, fid=24).joinpath("eval.json").write_text('[{"task": 1,')
    make(tmp_path, "gr").joinpath("config.json").write_text("{")
    make(tmp_path, "gr", 69).joinpath("eval.json").write_text('[{"task": "x"}]')
    cut = make(tmp_path, "gr", 1714, fid=200, done=2) / "metrics.jsonl"
    cut.write_text(cut.read_text()[:-20])
    make(tmp_path, "gr --replay none", fid=60).joinpath("metrics.jsonl").write_text("")
    (tmp_path / "fashion-mnist" / "begun" / "seed42").mkdir(parents=True)
    (tmp_path / "seed7.json").write_text("[]")
    text = text_of(tmp_path)
    assert column(text, "Table 1", GD, FM_FID) == ["23.5 ± 1.1", "20.0 (1)", "-3.5"]
    assert column(text, "Table 1", "Finetune (lower target)", FM_FID) == ["68.8 ± 7.0", "60.0 (1)", "-8.8"]
    shortened = "Shortened: Fashion-MNIST, paper scale, 32x32, 5 tasks"
    assert column(text, shortened, GR, UPDATES, "`gr-2`", "2 of 5") == ["18,750 of 47,000"]
    lines = capsys.readouterr().err.splitlines()
    about = {name: [line for line in lines if name in line] for name in (
        "gd-2/seed69", "gd-2/seed1714", "gr-2/seed42", "gr-2/seed69", "gr-2/seed1714", "seed7.json")}
    assert all(len(found) == 1 for found in about.values()), lines
    assert "no eval.json" in about["gd-2/seed69"][0] and "0 of 5 tasks are done" in about["gd-2/seed69"][0]
    assert "eval.json is damaged" in about["gd-2/seed1714"][0]
    assert "left out, config.json is damaged" in about["gr-2/seed42"][0]
    assert "left out, damaged (KeyError" in about["gr-2/seed69"][0]
    assert "2 of 5 tasks are done" in about["gr-2/seed1714"][0]


def test_nothing_to_report_is_one_sentence_and_exit_code_2(tmp_path, script):
    (tmp_path / "empty").mkdir()
    finished = script("report.py", "empty")
    assert finished.returncode == 2 and not finished.stdout
    assert finished.stderr.startswith("error: no run to report in empty") and finished.stderr.count("\n") == 1
    with pytest.raises(InputError, match="there is no folder"):
        report.find([tmp_path / "missing"])


# ------------------------------------------------------------------------------------------------------ figures

def test_grid_puts_each_image_into_its_cell(tmp_path):
    """Cell (i, j) has the level 10 (3 i + j + 1), its n-th image one more each; one cell is empty."""
    levels = [[10 * (3 * i + j + 1) for j in range(3)] for i in range(2)]
    images = [[torch.arange(v, v + 8, dtype=torch.uint8).view(8, 1, 1, 1).expand(8, 1, 16, 16) for v in line]
              for line in levels]
    images[1][1] = None
    report.grid(tmp_path / "grid.png", "A title", ["up", "down"], ["left", "middle", "right"], images)
    pixels = np.asarray(Image.open(tmp_path / "grid.png").convert("RGB"))
    assert (pixels[..., 0] == pixels[..., 2]).all()
    where = {}
    for i, j in ((0, 0), (0, 1), (0, 2), (1, 0), (1, 2)):
        for n in range(8):
            y, x = np.nonzero((pixels == levels[i][j] + n).all(2))
            y, x = y[x > 150], x[x > 150]  # left of it are labels, whose edges have any grey
            inside = (y >= np.median(y) - 32) & (y < np.median(y) + 33) & (abs(x - np.median(x)) < 33)
            assert inside.sum() >= 64 * 64  # 16 pixels enlarged four times, and hard edges
            where[i, j, n] = np.median(y), np.median(x)
    for i, j in ((0, 0), (0, 1), (0, 2), (1, 0), (1, 2)):
        for n in range(8):  # four across, in reading order
            assert where[i, j, n][0] - where[i, j, 0][0] == pytest.approx(66 * (n // 4), abs=1)
            assert where[i, j, n][1] - where[i, j, 0][1] == pytest.approx(66 * (n % 4), abs=1)
    assert where[0, 0, 3][1] + 66 < where[0, 1, 0][1] < where[0, 1, 3][1] < where[0, 2, 0][1] - 66
    assert where[1, 0, 0][0] > where[0, 0, 4][0] + 66
    for a, b, axis in ((0, 0), (0, 1), 0), ((0, 0), (0, 2), 0), ((1, 0), (1, 2), 0), ((0, 0), (1, 0), 1):
        assert where[(*a, 0)][axis] == pytest.approx(where[(*b, 0)][axis], abs=1)  # rows and columns are straight
    y, x = int(where[1, 0, 0][0]), int(where[0, 1, 0][1])
    assert (pixels[y, x] == 255).all()  # the empty cell


def test_all_figures_of_a_tree_with_weights(tmp_path, capsys):
    """Random laptop networks on 8x8 images: what is drawn is what `sample` makes of the grid's noise."""
    runs = tmp_path / "runs"
    for number, argv in enumerate(("gr --replay all", "gr --replay none", "gr", "gd", "gr --teacher-steps 10",
                                   "gd --teacher-steps 10", "gd --distill noise")):
        make(runs, f"{argv} --scale laptop", 69, frd=110 + 10 * number, n=2000, image_size=8)
        folder = make(runs, f"{argv} --scale laptop", 42, frd=100 + 10 * number, n=2000, image_size=8)
        config = json.loads((folder / "config.json").read_text())
        for k in (1, 2, 3):
            seed("test", number, k)
            torch.save({"model": UNet(**NETS["laptop"]).state_dict(), "config": config}, folder / f"task{k}.pt")
    for lam in ("0.25", "1.5"):
        make(runs, f"gd --scale laptop --lambda {lam}", frd=90, n=2000, image_size=8)
    broken = runs / "fashion-mnist/noise-laptop/seed42/task2.pt"
    broken.write_bytes(broken.read_bytes()[:1000])
    report.main([str(runs), "--out", str(tmp_path / "out")])
    captured = capsys.readouterr()
    assert captured.err.count("task2.pt: it is left out of the pictures") == 1

    names = {p.name.removesuffix("-fashion-mnist-laptop.png") for p in (tmp_path / "out").glob("*.png")}
    assert names == {f"figure{n}" for n in "2 3 4 5 6 B1 B2 B3 B4 B5 B6 B7 B8 B12".split()} | {"lambda", "time"}
    text = (tmp_path / "out/report.md").read_text()
    for name in names:
        path = tmp_path / f"out/{name}-fashion-mnist-laptop.png"
        picture = np.asarray(Image.open(path).convert("RGB"))
        assert min(picture.shape[:2]) > 200 and picture.std() > 10, name
        assert f"({path.name})" in text

    # Figure 3's third row, generative replay, in its last column, after task 3.
    picture = np.asarray(Image.open(tmp_path / "out/figure3-fashion-mnist-laptop.png").convert("RGB"))
    seed("grid")
    x_T, model = torch.randn(64, 1, 8, 8), UNet(**NETS["laptop"])
    model.load_state_dict(torch.load(runs / "fashion-mnist/gr-2-laptop/seed42/task3.pt")["model"])
    expected = report.tile(quantize(sample(model, x_T[:16], alpha_bar("zero-snr"), 10)))
    height, width, _ = expected.shape
    bottom, right = picture.shape[0] - 16 - (height + 16), picture.shape[1] - 16
    assert (picture[bottom - height:bottom, right - width:right] == expected).all()
