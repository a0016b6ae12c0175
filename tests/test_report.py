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
import train_jdcl
from data import quantize
from ddim import alpha_bar, sample, seed
from run import InputError, pick_speed, spread
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
    pick_speed(args, torch.device("cpu"))
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


def make_jdcl(root, argv="", seed=42, final=0.8, done=None, ms=(100, 200)):
    """The folder of a run of train_jdcl.py. Each task's images are right at 0.9 until after the last task: at `final`,
    but those of the first at 0.01 more, of the second at 0.01 less."""
    args = train_jdcl.get_args([*argv.split(), "--seed", str(seed)])
    pick_speed(args, torch.device("cpu"))
    K, one = args.tasks, args.replay != "generated" or args.one_stage
    stages = [(["global"] if k and args.one_stage else ["local"]) + ["global"] * (k > 0 and not one) for k in range(K)]
    sizes = dict(local=spread(args.local_iterations, K), **{"global": [0, *spread(args.global_iterations, K - 1)]})
    size = [[sizes["local" if one else stage][k] for stage in stages[k]] for k in range(K)]
    command = " ".join(["python", "/home/me/train_jdcl.py", *argv.split(), "--seed", str(seed)])
    config = dict(vars(args), updates=[sum(n) for n in size], command=command, torch="2.15.0", device="cpu")
    folder = root / args.dataset / args.name / f"seed{seed}"
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config))
    correct, tasks, lines = [], [], []
    for k in range(done or K):
        last = [round(1000 * final) + {0: 10, 1: -10}.get(j, 0) for j in range(K)]
        correct.append(last if k == K - 1 else [900] * (k + 1))
        shown = dict(edges=[0.5 * i for i in range(41)], real=dict(counts=[2] * 40, mean=10.0, sd=1.0),
                     replayed=dict(counts=[0] * 39 + [4], mean=19.75, sd=0.0))
        replay = dict(old=dict(drawn=64, found=[32, 32], copies=[0, 0]), logits=shown)
        tasks.append(dict(task=k + 1, correct=correct[-1], total=[1000] * (k + 1), by_class={"0": 0.5}, local=None,
                          replay=replay if "global" in stages[k] else None))
        before = 0
        for stage, n in zip(stages[k], size[k]):
            half, speed = min(500, n // 2), ms[stage == "global"]
            for u, v in [(n - 2 * half, 7), (n - half, speed - 5), (n, speed + 5)][n == 2 * half:]:
                line = dict(task=k + 1, update=before + u, loss=1.0, denoise=1.0, ms_per_update=v, peak_memory_mb=800,
                            seconds=100.0 * len(lines), stage=stage, accuracy=0.7)
                if stage == "global":
                    line |= dict(accuracy_by_class={"0": 0.5}, accuracy_task1=0.6, accuracy_old_real=0.5,
                                 accuracy_old_replayed=0.4)
                lines.append(line)
            before += n
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    found = train_classifier.summary(correct, tasks[-1]["total"])
    found |= dict(tasks=tasks, parameters=dict(unet=1234567, head=89012))
    (folder / "accuracy.json").write_text(json.dumps(found))
    return folder


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
    rows = 4 + 4 + 3 + 6 + 6 + 12 + 12 + 2 + 1 + 4  # one line a row; JDCL's last
    assert text.count("ours") - report.INTRODUCTION.count("ours") == rows
    assert "difference" not in text.replace(report.INTRODUCTION, "")


def test_the_commands_make_the_runs_of_their_rows():
    seen = set()
    for title, _, _, rows in report.paper_rows():
        for names, _ in rows if "JDCL" not in title else ():
            for dataset, name in names.items():
                _, script, *argv = report.command(name, dataset).split()
                module = {m.__name__ + ".py": m for m in (train_gr, train_gd, train_classifier)}[script]
                args = module.get_args(argv)
                assert (args.dataset, args.name, args.scale) == (dataset, name, "paper")
                seen.add((dataset, name))
    assert len(seen) == 2 * (2 + 2 + 3 + 6 + 2)


def test_the_commands_of_the_results_readme_are_valid():
    text = (Path(report.__file__).parent / "results" / "README.md").read_text()
    for name, value in dict(dataset="fashion-mnist", seed="42", steps="2", images="100", labels="0.05", tasks="5",
                            replay="all", flag="--no-kd", **{"lambda": "0.5"}).items():
        text = text.replace(f"${name}", value)
    found = re.findall(r"python (\w+)\.py ([^#`\n]*)", text.replace("RUN", "runs/x"))
    modules = {m.__name__: m for m in (train_gr, train_gd, train_jdcl, train_classifier, eval_fid, report)}
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
    assert column(text, laptop, GD, UPDATES) == ["300 of 900"]
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
    assert {r["metric"] for r in rows} == set("fid frd kld share_old ms parameters seconds".split())
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


# --------------------------------------------------------------------------------------------------------- JDCL

MAIN, FEW, ABLATION = (f"JDCL{about}, average accuracy, %: the paper's values are second-hand and unverified"
                       for about in ("", ", few labels", ", ablation"))
C10, C100, C100_10, I100 = "CIFAR-10 --tasks 5", "CIFAR-100 --tasks 5", "CIFAR-100 --tasks 10", "ImageNet-100 --tasks 5"
ACCURACY, FORGETTING = "↑ average accuracy, %", "↓ average forgetting, %"
COMPLETE = "Complete: CIFAR-10, paper scale, 32x32, 5 tasks, JDCL"
LAPTOP = "Shortened: Fashion-MNIST, laptop scale, 16x16, 5 tasks, JDCL"
EACH = ", ↑ accuracy of each task's images, %, mean (n)"
ON_LAPTOP = "--dataset fashion-mnist --scale laptop"


def test_jdcl_values_are_those_that_are_known():
    """A second copy, and that the tables themselves say where the values are from."""
    text = report.report([])
    main = {"Continual Joint": "86.41 73.07 64.15 50.59", "GUIDE": "64.47 41.66 26.13 39.07",
            "DGR with diffusion": "59.00 28.25 15.90 23.92", "GFR": "26.70 34.80 21.90 32.95",
            "JDCL": "83.69 47.95 29.04 54.53"}
    for method, values in main.items():
        lines = [column(text, MAIN, method, head) for head in (C10, C100, C100_10, I100)]
        assert [line[0] for line in lines] == values.split()
        assert {tuple(line[1:]) for line in lines} == {("–",) if method in ("Continual Joint", "JDCL") else ()}
        assert column(text, MAIN, method, "")[0] == "paper, second-hand"
    heads = [f"{dataset} --labels {n}" for dataset in ("CIFAR-10", "CIFAR-100 --tasks 10") for n in (0.008, 0.05)]
    assert sum([column(text, FEW, "NNCSL (buffer 5120)", head) for head in heads], []) == "73.7 79.3 27.5 46.0".split()
    assert [column(text, FEW, "JDCL", head)[0] for head in heads] == "78.93 79.96 22.19 26.39".split()
    ablation = {"JDCL": "83.7", "Separate DDPM and ResNet18": "68.4", "Without distillation": "48.2", "One stage": "?"}
    assert {method: column(text, ABLATION, method, C10)[0] for method in ablation} == ablation


def test_jdcl_commands_make_the_runs_of_their_rows():
    seen = {}
    for title, _, _, rows in report.paper_rows():
        for names, texts in rows if "JDCL" in title else ():
            for dataset, flags in names.items() if "–" not in names.values() else ():
                _, script, *argv = report.command(flags, dataset).split()
                args = train_jdcl.get_args(argv)
                what = [args.replay, args.labels, *(k for k in ("no_kd", "one_stage", "separate") if getattr(args, k))]
                seen.setdefault((title, texts[0]), []).append((args.dataset, args.tasks, *what))
                assert script == "train_jdcl.py" and args.scale == "paper"
    columns = [("cifar10", 5), ("cifar100", 5), ("cifar100", 10), ("imagenet100", 5)]
    main, few, ablation = (title.partition(":")[0] for title in (MAIN, FEW, ABLATION))
    of_ablation = {"JDCL": (), "Separate DDPM and ResNet18": ("separate",), "Without distillation": ("no_kd",),
                   "One stage": ("one_stage",)}
    assert seen == {
        (main, "Continual Joint"): [(*c, "all", None) for c in columns],
        (main, "JDCL"): [(*c, "generated", None) for c in columns],
        (few, "JDCL"): [(*c, "generated", n) for c in (("cifar10", 5), ("cifar100", 10)) for n in (0.008, 0.05)],
        **{(ablation, m): [("cifar10", 5, "generated", None, *more)] for m, more in of_ablation.items()}}


def test_jdcl_mean_standard_error_and_difference(tmp_path):
    for s, final, ms in zip(SEEDS, (0.82, 0.84, 0.89), (100, 110, 120)):
        make_jdcl(tmp_path, "", s, final, ms=(ms, 200))
    make_jdcl(tmp_path, "--one-stage", final=0.3)
    make_jdcl(tmp_path, "--labels 0.05", final=0.8)
    make_jdcl(tmp_path, "--dataset cifar100 --tasks 10", final=0.3)
    make_jdcl(tmp_path, "--replay all", final=0.85)
    make_jdcl(tmp_path, "--no-kd --precision bf16", final=0.5)
    text = text_of(tmp_path)
    # deviations -3, -1 and 4 of 85: s = sqrt(26 / 2), divided by sqrt(3)
    assert column(text, MAIN, "JDCL", C10) == ["83.69", "85.00 ± 2.08 (3)", "+1.31"]
    assert column(text, MAIN, "JDCL", "") == ["paper, second-hand", "ours", "difference"]
    assert column(text, MAIN, "JDCL", C100) == ["47.95", "–", ""]
    assert column(text, MAIN, "JDCL", C100_10) == ["29.04", "30.00 (1)", "+0.96"]
    assert column(text, MAIN, "Continual Joint", C10) == ["86.41", "85.00 (1)", "-1.41"]
    assert column(text, ABLATION, "JDCL", C10) == ["83.7", "85.0 ± 2.1 (3)", "+1.3"]
    assert column(text, ABLATION, "One stage", C10) == ["?", "30.00 (1)"]
    assert column(text, ABLATION, "Without distillation", C10) == ["48.2", "50.0 (1), precision bf16", "+1.8"]
    assert column(text, ABLATION, "Separate DDPM and ResNet18", C10) == ["68.4", "–"]
    assert column(text, FEW, "JDCL", "CIFAR-10 --labels 0.05") == ["79.96", "80.00 (1)", "+0.04"]
    assert column(text, FEW, "JDCL", "CIFAR-10 --labels 0.008") == ["78.93", "–", ""]

    row = {head: column(text, COMPLETE, "JDCL", head, "`jdcl`") for head in (
        ACCURACY, FORGETTING, "↓ ms, local", "↓ ms, global", "parameters", "+ head", "seconds", UPDATES, "↓ FID")}
    # forgotten of tasks 1 to 4: 0.9 less final, 0.01 less of the first and more of the second: 8, 6 and 1 %
    assert row == {ACCURACY: ["85.00 ± 2.08 (3)"], FORGETTING: ["5.00 ± 2.08 (3)"], "↓ ms, local": ["110.0 ± 5.8 (3)"],
                   "↓ ms, global": ["200.0 ± 0.0 (3)"], "parameters": ["1,234,567"], "+ head": ["89,012"],
                   "seconds": ["2,600 ± 0 (3)"], UPDATES: ["370,000 of 370,000"], "↓ FID": ["–"]}
    assert column(text, COMPLETE, "JDCL", "↓ ms, local", "`jdcl-labels0.05`") == ["100.0 (1)"]
    assert column(text, COMPLETE, "Continual Joint", UPDATES) == ["250,000 of 250,000"]
    assert "Shortened" not in text.replace(report.INTRODUCTION, "")


def test_jdcl_accuracies_of_each_task(tmp_path):
    make_jdcl(tmp_path, ON_LAPTOP, 42, 0.7)
    make_jdcl(tmp_path, ON_LAPTOP, 69, 0.6)
    make_jdcl(tmp_path, ON_LAPTOP + " --replay none", 42, 0.5, done=2)
    text = text_of(tmp_path)
    after = [column(text, LAPTOP + EACH, "`jdcl-laptop` (2)", f"task {j}") for j in (1, 2, 3, 4, 5)]
    assert after == [["90.00"] * 4 + ["66.00"], ["", *["90.00"] * 3, "64.00"], ["", "", "90.00", "90.00", "65.00"],
                     ["", "", "", "90.00", "65.00"], ["", "", "", "", "65.00"]]
    assert column(text, LAPTOP + EACH, "`jdcl-finetune-laptop` (1)", "") == ["after task 1", "after task 2"]
    assert column(text, LAPTOP + EACH, "`jdcl-finetune-laptop` (1)", "task 2") == ["", "90.00"]


def test_jdcl_shortened_runs_stand_apart(tmp_path):
    make_jdcl(tmp_path, "", 42, 0.8)
    make_jdcl(tmp_path, "", 69, 0.7, done=3)
    file = make_jdcl(tmp_path, "", 1714, 0.6) / "config.json"  # an update fewer under the preset's name
    file.write_text(file.read_text().replace("80000]", "79999]"))
    make_jdcl(tmp_path, "--global-iterations 100", 42, 0.5)
    make_jdcl(tmp_path, "--global-iterations 40000", 42, 0.5)  # complete, but no row of the paper
    make_jdcl(tmp_path, ON_LAPTOP, 42, 0.4)
    text = text_of(tmp_path)
    assert column(text, MAIN, "JDCL", C10) == ["83.69", "80.00 (1)", "-3.69"]
    assert column(text, COMPLETE, "JDCL", ACCURACY, "`jdcl`", "5 of 5") == ["80.00 (1)"]
    assert column(text, COMPLETE, "JDCL", ACCURACY, "`jdcl-global_iterations40000`") == ["50.00 (1)"]
    shortened = COMPLETE.replace("Complete", "Shortened")
    assert column(text, shortened, "JDCL", ACCURACY, "`jdcl`", "3 of 5") == ["90.00 (1)"]
    assert column(text, shortened, "JDCL", FORGETTING, "`jdcl`", "3 of 5") == ["0.00 (1)"]
    assert column(text, shortened, "JDCL", UPDATES, "`jdcl`", "3 of 5") == ["210,000 of 370,000"]
    assert column(text, shortened, "JDCL", ACCURACY, "`jdcl`", "5 of 5") == ["60.00 (1)"]
    assert column(text, shortened, "JDCL", UPDATES, "`jdcl-global_iterations100`") == ["250,400 of 370,000"]
    assert column(text, LAPTOP, "JDCL", UPDATES) == ["3,600 of 3,600"]
    assert column(text, LAPTOP, "JDCL", "command") == [f"`python train_jdcl.py {ON_LAPTOP}`"]


def test_jdcl_runs_and_the_others_leave_each_other_alone(tmp_path, capsys):
    """With JDCL's runs beside them, even with their networks, all tables and figures of the others are as before."""
    runs, more = tmp_path / "runs", tmp_path / "more"
    for argv in ("gr --replay all", "gr --replay none", "gr", "gd"):
        make(runs, f"{argv} --scale laptop", fid=20)
    make(runs, "gd", fid=21)
    config = json.loads(make(runs, "gr", fid=22).joinpath("config.json").read_text())
    for k in range(1, 6):
        folder = make_jdcl(more, f"{ON_LAPTOP} --labels 0.{k}")
        torch.save({"model": {"head.0.weight": torch.zeros(1)}, "config": config}, folder / f"task{k}.pt")
    make_jdcl(more, "--dataset fashion-mnist")
    report.main([str(runs), "--no-figures"])
    before = capsys.readouterr().out
    report.main([str(runs), str(more), "--csv", str(tmp_path / "all.csv")])
    after, err = capsys.readouterr()
    kept = [block for block in after.split("## ") if "JDCL" not in block.splitlines()[0]]
    assert "## ".join(kept).strip() == "## ".join(
        block for block in before.split("## ") if "JDCL" not in block.splitlines()[0]).strip()
    assert "left out of the pictures" not in err
    names = {p.name for p in runs.glob("*.png")}
    assert {n for n in names if "jdcl" in n} == {
        f"jdcl-figure{i}-fashion-mnist{scale}.png" for i, scale in ((4, ""), (5, ""), (5, "-laptop"))}
    assert {n for n in names if "jdcl" not in n} == {
        f"{figure}-fashion-mnist{scale}.png" for figure in ("figure4", "time") for scale in ("", "-laptop")}
    metrics = {r["metric"] for r in csv.DictReader((tmp_path / "all.csv").open()) if "jdcl" in r["name"]}
    assert metrics == {"average_accuracy", "average_forgetting", "ms_local", "ms_global", "unet", "head", "seconds"}


def test_jdcl_speed_by_stage_and_curve():
    lines = [dict(task=1, update=500, ms_per_update=9, stage="local", accuracy=0.5),
             dict(task=1, update=1500, ms_per_update=10, stage="local", accuracy=2 / 3),
             dict(task=2, update=100, ms_per_update=20, stage="local", accuracy=0.9),  # of the local model
             dict(task=2, update=400, ms_per_update=30, stage="global"),
             dict(task=2, update=500, ms_per_update=50, stage="global", accuracy=0.8, accuracy_task1=0.75,
                  accuracy_old_real=0.7, accuracy_old_replayed=0.65)]
    lines = [json.dumps(dict(line, peak_memory_mb=1, seconds=1.0)) + "\n" for line in lines]
    found = report.parse_metrics("".join(lines))
    assert found["ms_per_update"] == [
        dict(task=1, stage="local", updates=1500, mean=10.0, sd=0.0),  # the first record is over 1000 updates old
        dict(task=2, stage="local", updates=100, mean=20.0, sd=0.0),
        dict(task=2, stage="global", updates=400, mean=35.0, sd=8.66)]  # 300 updates of 30 ms, 100 of 50
    assert found["curve"] == [[1, 500, 0.5, None, None], [1, 1500, 0.666667, None, None], [2, 500, 0.75, 0.7, 0.65]]


def test_jdcl_saved_results_give_the_same_tables_and_figures(tmp_path, capsys):
    runs, results = tmp_path / "runs", tmp_path / "results"
    for s in SEEDS:
        for argv in ("", " --separate", " --replay all", " --replay none", " --one-stage"):
            make_jdcl(runs, ON_LAPTOP + argv, s, 0.5 + s / 10000)
    make_jdcl(runs, "", 42, 0.8)
    make(runs, "gd", fid=20)
    report.main([str(runs), "--save", str(results)])
    first = capsys.readouterr().out
    report.main([str(results)])
    assert capsys.readouterr().out == first and column(first, LAPTOP, "JDCL", ACCURACY, "`jdcl-laptop`") != ["–"]
    figures = {f"jdcl-figure{i}-{dataset}.png" for i in (4, 5) for dataset in ("fashion-mnist-laptop", "cifar10")}
    for folder in (runs, results):
        assert {p.name for p in folder.glob("jdcl-*.png")} == figures
    for name in figures:
        pictures = [np.asarray(Image.open(folder / name).convert("RGB")) for folder in (runs, results)]
        assert (pictures[0] == pictures[1]).all() and pictures[0].std() > 10
        assert f"({name})" in (results / "report.md").read_text()
    both, one = (Image.open(runs / f"jdcl-figure4-{name}.png").width for name in ("fashion-mnist-laptop", "cifar10"))
    assert both > 1.8 * one  # jdcl beside jdcl-separate

    saved = json.loads((results / "fashion-mnist/jdcl-laptop/seed42.json").read_text())
    assert saved["accuracy"] == json.loads((runs / "fashion-mnist/jdcl-laptop/seed42/accuracy.json").read_text())
    assert [(s["task"], s["stage"], s["updates"], s["mean"]) for s in saved["ms_per_update"]] == [
        (1, "local", 400, 100), *((k, stage, 400, ms) for k in (2, 3, 4, 5)
                                  for stage, ms in (("local", 100), ("global", 200)))]
    assert saved["curve"][:3] == [[1, 200, 0.7, None, None], [1, 400, 0.7, None, None], [2, 600, 0.6, 0.5, 0.4]]
    assert (saved["updates_done"], saved["updates_preset"]) == (3600, [400, 800, 800, 800, 800])
    assert not {"accuracy", "curve"} & set(json.loads((results / "fashion-mnist/gd-2/seed42.json").read_text()))


def test_jdcl_figures_show_the_last_task_and_the_first(tmp_path):
    folder = make_jdcl(tmp_path, ON_LAPTOP, 42, 0.7)
    r = report.read(folder)
    (real, shares, edges, about), (replayed, *more) = report.logits(r)
    assert (real, about, replayed, more[2]) == ("real", "10.0 ± 1.0", "replayed", "19.8 ± 0.0")
    assert list(shares) == [2 / 80] * 40 and list(more[0]) == [0] * 39 + [1] and len(edges) == 41
    curve = report.first_task(r)
    # twice in task 1; in a later task half through the second stage, then what accuracy.json has after it
    assert curve == {200: 0.7, 400: 0.9, 1000: 0.6, 1200: 0.9, 1800: 0.6, 2000: 0.9, 2600: 0.6, 2800: 0.9,
                     3400: 0.6, 3600: 0.71}
    joint = report.read(make_jdcl(tmp_path, ON_LAPTOP + " --replay all", 42, 0.7))
    assert report.logits(joint) == [] and report.first_task(joint) == {
        200: 0.7, 400: 0.9, 800: 0.9, 1200: 0.9, 1600: 0.9, 2000: 0.71}
    assert (r.base, r.departure, joint.base, joint.departure) == ("jdcl", "-laptop", "jdcl-joint", "-laptop")
    drawn = dict(report.jdcl_figures({"jdcl": [r], "jdcl-joint": [joint]}))
    assert [axes.get_title() for axes in drawn["jdcl-figure4"].axes] == ["jdcl, task 5, seed 42"]
    lines = {line.get_label(): line.get_xydata() for line in drawn["jdcl-figure5"].axes[0].lines}
    assert set(lines) == {"jdcl (1)", "jdcl-joint (1)"}
    np.testing.assert_allclose(lines["jdcl (1)"], [(x, 100 * y) for x, y in sorted(curve.items())])
    assert dict(report.jdcl_figures({"jdcl-joint": [joint]})).keys() == {"jdcl-figure5"}


def test_jdcl_half_finished_runs_are_reported_as_far_as_they_go(tmp_path, capsys):
    make_jdcl(tmp_path, "", 42, 0.8)
    missing = make_jdcl(tmp_path, "", 1, 0.8, done=2)
    (missing / "accuracy.json").unlink()
    (missing / "task1.pt").touch()
    make_jdcl(tmp_path, "", 2, done=2).joinpath("accuracy.json").write_text('{"accuracy": [0.9')
    for s, text in enumerate(("{}", "[]", '{"matrix": [["x"]]}', '"matrix"'), 3):
        make_jdcl(tmp_path, "", s).joinpath("accuracy.json").write_text(text)
    broken = make_jdcl(tmp_path, "", 7) / "accuracy.json"
    broken.write_text(broken.read_text().replace('"counts"', '"count"'))
    make_jdcl(tmp_path, "", 8, 0.1, done=1)
    text = text_of(tmp_path)
    assert column(text, MAIN, "JDCL", C10) == ["83.69", "80.00 (1)", "-3.69"]
    shortened = COMPLETE.replace("Complete", "Shortened")
    assert column(text, shortened, "JDCL", ACCURACY, "`jdcl`", "0 of 5") == ["–"]
    # the run without accuracy.json, and the one with a single task, whose forgetting nobody knows
    assert column(text, shortened, "JDCL", ACCURACY, "`jdcl`", "1 of 5") == ["90.00 (1)"]
    assert column(text, shortened, "JDCL", FORGETTING, "`jdcl`", "1 of 5") == ["–"]
    assert column(text, shortened, "JDCL", "↓ ms, local", "`jdcl`", "1 of 5") == ["100.0 ± 0.0 (2)"]
    lines = {int(line.partition(": ")[0].rpartition("seed")[2]): line for line in capsys.readouterr().err.splitlines()}
    assert "no accuracy.json" in lines[1] and "1 of 5 tasks are done" in lines[1]
    assert "accuracy.json is damaged" in lines[2] and "0 of 5 tasks are done" in lines[2]
    assert all("left out, damaged (" in lines[s] for s in (3, 4, 5, 6, 7)) and "left out" not in lines[8]
    report.main([str(tmp_path), "--out", str(tmp_path / "out")])
    assert {p.name for p in (tmp_path / "out").glob("*.png")} == {f"jdcl-figure{i}-cifar10.png" for i in (4, 5)}
