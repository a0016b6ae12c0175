"""From runs to the papers' tables and figures, every number beside the paper's own.

    mean +- standard error = s / sqrt(n), s^2 = sum_i (v_i - mean)^2 / (n - 1), over n seeds

Masip et al., "Continual Learning of Diffusion Models with Generative Distillation", arXiv 2311.14028, Tables 1, 2 and
B.1 to B.5, Figures 2 to 6 and B.1 to B.22; and, at second hand, Skiers and Deja, "Joint Diffusion Models in Continual
Learning" (JDCL), arXiv 2411.08224.

    python report.py runs/                     tables to stdout and runs/report.md, figures to runs/figure*.png
    python report.py runs/ --save results/     besides, one small JSON per run, to be committed
    python report.py results/                  the same tables from those files alone

Beside a value of the paper stands only a complete run: at the paper's scale, finished, with all of its preset's
updates; the others are in tables called shortened. Nothing is averaged over runs of different names (a name tells
every departure from the preset) or over results of different protocols, as of two labellers: these stand on lines of
their own.
"""

import argparse
import csv
import functools
import io
import itertools
import json
import math
import platform
import re
import statistics
import subprocess
import sys
import textwrap
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from torchvision.utils import make_grid

import run
import train_classifier
import train_gr
import train_jdcl
from data import DATASETS, quantize
from ddim import alpha_bar, ddpm_sample, sample, seed
from run import InputError
from unet import NETS, UNet

# The values as the paper prints them, mean ± standard error (Table B.1: standard deviation), – where it has none. A
# row begins with the name of its run, or two names, on Fashion-MNIST and on CIFAR-10. Where two tables differ in a
# quantity (the joint classifier's accuracy on CIFAR-10 is 0.77 ± 0.03 and 0.77 ± 0.00), each keeps its own. Those of
# JDCL are from a third party's notes; a row begins with the flags of its runs, besides a column's, or – if it has none.
PAPER = """
Table 1 | Strategy | fashion-mnist fid | fashion-mnist kld | cifar10 fid | cifar10 kld
joint | Joint (upper target) | 15.5 ± 1.3 | 0.08 ± 0.02 | 31.9 ± 2.9 | 0.12 ± 0.02
finetune | Finetune (lower target) | 68.8 ± 7.0 | 4.82 ± 1.42 | 55.8 ± 2.6 | 1.14 ± 0.10
gr-2 gr-10 | Generative replay | 211.8 ± 6.9 | 3.39 ± 0.30 | 96.4 ± 5.3 | 0.74 ± 0.14
gd-2 gd-10 | Generative distillation | 23.5 ± 1.1 | 0.25 ± 0.10 | 42.3 ± 4.7 | 0.15 ± 0.01

Table 2 | Strategy | fashion-mnist acc | cifar10 acc
classifier-joint | Joint (upper target) | 0.92 ± 0.00 | 0.77 ± 0.03
classifier-finetune | Finetune (lower target) | 0.17 ± 0.03 | 0.19 ± 0.00
gr-2 gr-10 | Generative replay | 0.50 ± 0.04 | 0.26 ± 0.01
gd-2 gd-10 | Generative distillation | 0.72 ± 0.03 | 0.31 ± 0.03

Table B.1 | Strategy | fashion-mnist ms | fashion-mnist parameters | cifar10 ms | cifar10 parameters
finetune | Finetune | 253.3 ± 8.8 | 42,855,873 | 383.4 ± 95.3 | 35,746,307
gr-2 gr-10 | Generative replay | 664.3 ± 3.8 | 85,711,746 | 1881.8 ± 42.9 | 71,492,614
gd-2 gd-10 | Generative distillation | 747.9 ± 3.6 | 85,711,746 | 1992.7 ± 47.6 | 71,492,614

Table B.2 | Strategy | Buffer size | fashion-mnist fid | fashion-mnist kld | cifar10 fid | cifar10 kld
joint | Joint (upper target) | – | 15.5 ± 1.3 | 0.08 ± 0.02 | 31.9 ± 2.9 | 0.12 ± 0.02
finetune | Finetune (lower target) | – | 68.8 ± 7.0 | 4.82 ± 1.42 | 55.8 ± 2.6 | 1.14 ± 0.10
er-10 | Experience replay | 10 | 56.2 ± 1.1 | 0.72 ± 0.09 | 62.0 ± 4.9 | 0.48 ± 0.05
er-100 | Experience replay | 100 | 33.3 ± 2.9 | 0.33 ± 0.04 | 42.3 ± 0.9 | 0.25 ± 0.03
er-1000 | Experience replay | 1000 | 21.6 ± 0.9 | 0.28 ± 0.01 | 49.6 ± 5.4 | 0.48 ± 0.05
gd-2 gd-10 | Generative distillation | – | 23.5 ± 1.1 | 0.25 ± 0.10 | 42.3 ± 4.7 | 0.15 ± 0.01

Table B.3 | Strategy | Buffer size | fashion-mnist acc | cifar10 acc
classifier-joint | Joint (upper target) | – | 0.92 ± 0.00 | 0.77 ± 0.03
classifier-finetune | Finetune (lower target) | – | 0.17 ± 0.03 | 0.19 ± 0.00
er-10 | Experience replay | 10 | 0.60 ± 0.02 | 0.12 ± 0.01
er-100 | Experience replay | 100 | 0.79 ± 0.01 | 0.12 ± 0.01
er-1000 | Experience replay | 1000 | 0.76 ± 0.03 | 0.13 ± 0.01
gd-2 gd-10 | Generative distillation | – | 0.72 ± 0.03 | 0.31 ± 0.03

Table B.4 | Strategy | Teacher steps | λ | fashion-mnist fid | fashion-mnist kld | fashion-mnist acc
classifier-joint | Joint (classifier) | – | – | – | – | 0.92 ± 0.00
classifier-finetune | Finetune (classifier) | – | – | – | – | 0.17 ± 0.03
joint | Joint (generator) | – | – | 15.49 ± 1.30 | 0.08 ± 0.02 | –
finetune | Finetune (generator) | – | – | 68.76 ± 7.00 | 4.82 ± 1.42 | –
noise | Distil. w/ Gaussian noise | – | 8 | 38.87 ± 2.23 | 0.85 ± 0.05 | 0.63 ± 0.04
lwf | Distil. w/ current data | – | 1.25 | 65.01 ± 3.31 | 0.37 ± 0.09 | 0.35 ± 0.01
gr-2 | Generative replay | 2 | – | 211.79 ± 6.92 | 3.39 ± 0.30 | 0.50 ± 0.04
gd-2 | Generative distillation | 2 | 0.75 | 23.53 ± 1.06 | 0.25 ± 0.10 | 0.72 ± 0.03
gr-10 | Generative replay | 10 | – | 121.42 ± 13.04 | 0.98 ± 0.19 | 0.58 ± 0.04
gd-10 | Generative distillation | 10 | 0.75 | 20.29 ± 3.07 | 0.13 ± 0.04 | 0.79 ± 0.01
gr-100 | Generative replay | 100 | – | 57.54 ± 8.61 | 0.61 ± 0.21 | 0.66 ± 0.02
gd-100 | Generative distillation | 100 | 0.75 | 23.69 ± 3.42 | 0.12 ± 0.04 | 0.80 ± 0.01

Table B.5 | Strategy | Teacher steps | λ | cifar10 fid | cifar10 kld | cifar10 acc
classifier-joint | Joint (classifier) | – | – | – | – | 0.77 ± 0.00
classifier-finetune | Finetune (classifier) | – | – | – | – | 0.19 ± 0.00
joint | Joint (generator) | – | – | 31.88 ± 2.89 | 0.12 ± 0.02 | –
finetune | Finetune (generator) | – | – | 55.77 ± 2.56 | 1.14 ± 0.10 | –
noise | Distil. w/ Gaussian noise | – | 8 | 51.35 ± 2.95 | 0.75 ± 0.05 | 0.30 ± 0.00
lwf | Distil. w/ current data | – | 1.25 | 62.09 ± 2.49 | 0.49 ± 0.09 | 0.23 ± 0.02
gr-2 | Generative replay | 2 | – | 166.69 ± 15.95 | 1.45 ± 0.45 | 0.27 ± 0.02
gd-2 | Generative distillation | 2 | 0.75 | 48.82 ± 2.51 | 0.69 ± 0.02 | 0.33 ± 0.02
gr-10 | Generative replay | 10 | – | 96.39 ± 5.25 | 0.74 ± 0.14 | 0.26 ± 0.01
gd-10 | Generative distillation | 10 | 0.75 | 42.34 ± 4.74 | 0.15 ± 0.01 | 0.31 ± 0.03
gr-100 | Generative replay | 100 | – | 66.47 ± 7.39 | 0.43 ± 0.07 | 0.28 ± 0.02
gd-100 | Generative distillation | 100 | 0.75 | 30.53 ± 1.29 | 0.27 ± 0.05 | 0.35 ± 0.03

JDCL, average accuracy, % | Method | cifar10 --tasks 5 | cifar100 --tasks 5 | cifar100 --tasks 10 | \
imagenet100 --tasks 5
--replay all | Continual Joint | 86.41 | 73.07 | 64.15 | 50.59
– | GUIDE | 64.47 | 41.66 | 26.13 | 39.07
– | DGR with diffusion | 59.00 | 28.25 | 15.90 | 23.92
– | GFR | 26.70 | 34.80 | 21.90 | 32.95
| JDCL | 83.69 | 47.95 | 29.04 | 54.53

JDCL, few labels, average accuracy, % | Method | cifar10 --labels 0.008 | cifar10 --labels 0.05 | \
cifar100 --tasks 10 --labels 0.008 | cifar100 --tasks 10 --labels 0.05
– | NNCSL (buffer 5120) | 73.7 | 79.3 | 27.5 | 46.0
| JDCL | 78.93 | 79.96 | 22.19 | 26.39

JDCL, ablation, average accuracy, % | Method | cifar10 --tasks 5
| JDCL | 83.7
--separate | Separate DDPM and ResNet18 | 68.4
--no-kd | Without distillation | 48.2
--one-stage | One stage | ?
"""
INTRODUCTION = """# Results

Mean ± standard error (sample standard deviation / √n) over n seeds, and (n); – was not run, or is not in the
paper, Masip et al., arXiv 2311.14028. A difference is ours minus the value of this very table. Values of different
protocols or labellers stand on lines of their own. A command is for seed 42, the paper's others are `--seed 69` and
`--seed 1714`; after it come `python eval_fid.py RUN` and, for ACC, `python train_classifier.py RUN` (the paper's ACC
comes from `--replay-loss reversed`). Table B.1 has mean ± standard deviation over the last 1000 updates of the last
task, ours of means of up to 50 updates, the paper's of single ones on a GeForce 1080 Ti, and the parameters that the
method has to hold. Below the paper's tables are all metrics: of complete runs, and of shortened ones, which are
smaller than the paper's, have fewer updates than their preset, or are not finished, and compare with nothing above.
frd is not FID, but the same distance of another network's features.

The values of JDCL's paper, Skiers and Deja, arXiv 2411.08224, are second-hand: from a third party's notes of it, and
unverified, except that a second source has 83.69 and 64.47; ? is not known, and no error or forgetting is.

"""
METHODS = {  # in the order of tables and figures: what it is called, its colour
    "joint": ("Joint", "black"), "finetune": ("Finetune", "0.6"), "er": ("Experience replay", "tab:olive"),
    "gr": ("Generative replay", "tab:red"), "gd": ("Generative distillation", "tab:blue"),
    "lwf": ("Distil. w/ current data", "tab:green"), "noise": ("Distil. w/ Gaussian noise", "tab:purple"),
    "classifier-joint": ("Joint (classifier)", None), "classifier-finetune": ("Finetune (classifier)", None),
}
JDCL = {"all": "Continual Joint", "none": "Finetune", "generated": "JDCL"}  # by --replay, in the order of its tables
METRICS = {  # header and decimals; the paper's tables have their own decimals
    "fid": ("↓ FID", 1), "frd": ("↓ frd", 1), "kld": ("↓ KLD", 2), "share_old": ("↑ old classes, %", 1),
    "acc": ("↑ ACC", 2), "ms": ("↓ ms per update", 1), "parameters": ("parameters", 0), "seconds": ("seconds", 0),
    "average_accuracy": ("↑ average accuracy, %", 2), "average_forgetting": ("↓ average forgetting, %", 2),
    "ms_local": ("↓ ms, local", 1), "ms_global": ("↓ ms, global", 1), "unet": ("parameters", 0), "head": ("+ head", 0),
}
TITLES = {"fashion-mnist": "Fashion-MNIST", "cifar10": "CIFAR-10", "cifar100": "CIFAR-100",
          "imagenet100": "ImageNet-100"}
STRIPS = "joint finetune gr-2 gd-2 gr-10 gd-10 gr-100 gd-100 lwf noise"  # Figures B.3 to B.12; CIFAR-10 B.13 to B.22
# Of an evaluation's protocol: what depends on seed and task, and what is said wherever it is another than here.
VARIES = {"seed", "checkpoint", "reference", "n_real", "n_floor", "class_tasks", "generators", "dataset"}
REMARKED = {"precision": "fp32", "replay_loss": "paper"}


# -------------------------------------------------------------------------------------------------- arguments

def get_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("folders", nargs="+", type=Path, metavar="FOLDER", help="searched for run folders and files of --save")
    add("--out", type=Path, help="folder of report.md and of the figures (default: the first FOLDER)")
    add("--save", type=Path, metavar="RESULTS", help="write RESULTS/<dataset>/<name>/seed<seed>.json of every run")
    add("--csv", type=Path, metavar="PATH", help="write a row per run, task and metric")
    add("--figures", action=argparse.BooleanOptionalAction, default=True,
        help="draw them (default: yes); pictures are sampled from the models, at the paper's scale better on a GPU")
    add("--device", default="auto", help="that samples: auto (CUDA if there is one), cpu, cuda or cuda:<i>")
    return parser.parse_args(argv)


# ---------------------------------------------------------------------------------------------------- reading

def complain(where, what):
    print(f"{where}: {what}", file=sys.stderr)


def part(path, parse, notes):
    """parse(text of the file), or None and a word in `notes` on what is wrong with it."""
    try:
        return parse(path.read_text())
    except FileNotFoundError:
        notes.append(f"no {path.name}")
    except (OSError, ValueError, KeyError, TypeError) as error:
        notes.append(f"{path.name} is damaged ({error})")
    return None


def parse_metrics(text):
    """Seconds, peak memory, and of each task the updates done, mean and deviation of ms over the last 1000 updates.

    A record is the mean of up to 50 updates, and this the deviation of such means, smaller than that of updates. A task
    of JDCL has two stages, the run a curve, [[task, update, accuracy of task 1's images, of old ones, of replayed]].
    """
    lines, speed = text.splitlines(keepends=True), []
    records = [json.loads(line) for line in lines if line.endswith("\n")]  # a kill may cut the last one short
    for (task, stage), some in itertools.groupby(records, key=lambda r: (r["task"], r.get("stage"))):
        update, ms = np.array([(r["update"], r["ms_per_update"]) for r in some]).T
        begin = sum(s["updates"] for s in speed if s["task"] == task)
        weights = np.diff(update, prepend=begin) * (update > update[-1] - 1000)
        mean = np.average(ms, weights=weights)
        sd = np.average((ms - mean) ** 2, weights=weights) ** 0.5
        speed.append(dict(task=task, **{"stage": stage} if stage else {}, updates=int(update[-1] - begin),
                          mean=round(mean, 3), sd=round(sd, 3)))
    curve = [[r["task"], r["update"], *(v and round(v, 6) for v in (
        r.get("accuracy_task1", r["accuracy"]), r.get("accuracy_old_real"), r.get("accuracy_old_replayed")))]
        for r in records if "accuracy" in r and (r["task"] == 1 or "accuracy_task1" in r)]
    return dict(seconds=records[-1]["seconds"] if records else None, ms_per_update=speed, curve=curve,
                peak_memory_mb=max((r["peak_memory_mb"] for r in records), default=None))


def preset_updates(c):
    """The updates of each task in the preset, for the classes of config `c`; None where there is no preset."""
    if c["method"] == "jdcl":
        usual, tasks = train_jdcl.PRESETS.get((c["scale"], c["dataset"])), len(c["class_tasks"])
        two_stages = c["replay"] == "generated" and not c["one_stage"]
        return usual and [a + b * two_stages for a, b in zip(
            run.spread(usual["local_iterations"], tasks), [0, *run.spread(usual["global_iterations"], tasks - 1)])]
    script = train_classifier if c["method"].startswith("classifier") else train_gr
    usual, per_class = script.PRESETS.get((c["scale"], c["dataset"])), DATASETS[c["dataset"]].get("per_class")
    if c["method"] not in METHODS or not usual or not per_class:
        return None
    sizes = [per_class["train"] * len(task) for task in c["class_tasks"]]
    if usual["iterations"]:
        return run.spread(usual["iterations"], len(sizes))
    epochs, batch = run.spread(usual["epochs"], len(sizes)), usual.get("batch_size", train_classifier.BATCH)
    sizes = itertools.accumulate(sizes) if c["replay"] == "all" else sizes
    return [max(1, round(e * math.ceil(n / batch))) for e, n in zip(epochs, sizes)]


def device_name(device):
    """What this machine calls its CUDA device, or else its processor."""
    if device != "cpu" and torch.cuda.is_available():
        return torch.cuda.get_device_name()
    info = Path("/proc/cpuinfo")
    found = re.search(r"model name\s*: (.+)", info.read_text()) if info.exists() else None
    return found[1] if found else platform.machine()


@functools.cache
def commit():
    """The commit that this file is of, and whether any .py differs from it; None outside a git repository."""
    def git(*words):
        return subprocess.run(["git", *words], cwd=Path(__file__).resolve().parent, capture_output=True, text=True,
                              check=True).stdout.strip()
    try:
        return dict(hash=git("rev-parse", "HEAD"), dirty=bool(git("status", "--porcelain", "--", "*.py")))
    except (OSError, subprocess.CalledProcessError):
        return None


def read_folder(folder, notes):
    """What --save writes, from a run folder or from that of a classifier alone; None without a config."""
    alone = not (folder / "config.json").exists()
    classifier = part(folder / "classifier.json", json.loads, notes)
    c = classifier if alone else part(folder / "config.json", json.loads, notes)
    records, speed, more = [], dict(seconds=None, ms_per_update=[], peak_memory_mb=None), {}
    if c is None:
        return None
    if alone:
        done, speed["seconds"] = len(classifier["accuracy"]), sum(classifier["seconds"])
        c = dict(classifier["protocol"], torch=classifier["versions"]["torch"],
                 method={"none": "classifier-finetune", "all": "classifier-joint"}[classifier["protocol"]["replay"]],
                 **{key: classifier[key] for key in ("name", "scale", "command", "device")})
        updates = sum(c["updates"][:done])
    else:
        records = part(folder / "eval.json", json.loads, notes) or []
        speed = part(folder / "metrics.jsonl", parse_metrics, notes) or speed
        evaluated, curve = [r["task"] for r in records], speed.pop("curve", [])
        if c["method"] == "jdcl":
            more = dict(accuracy=part(folder / "accuracy.json", json.loads, notes), curve=curve)
            evaluated += range(1, 1 + len(more["accuracy"]["matrix"] if more["accuracy"] is not None else []))
        done = next(k for k in itertools.count()
                    if k + 1 not in evaluated and not (folder / f"task{k + 1}.pt").exists())
        updates = sum(s["updates"] for s in speed["ms_per_update"]) or sum(c["updates"][:done])
    if (c["method"] in ("joint", "finetune", "jdcl") or "-lam" in c["name"]) and "no classifier.json" in notes:
        notes.remove("no classifier.json")  # no table asks for it
    if done < len(c["class_tasks"]):
        notes.append(f"{done} of {len(c['class_tasks'])} tasks are done")
    return dict(
        command=re.sub(r"\S*/(train_\w+\.py)", r"\1", c["command"]), commit=commit(), device=device_name(c["device"]),
        torch=c["torch"], tasks_done=done, updates_done=updates, updates_preset=preset_updates(c), **speed,
        labeller=sorted({r["protocol"]["frd"]["sha256"] for r in records}), config=c, eval=records,
        classifier=classifier, **more)


def read(path):
    """A run folder or a file of --save as attributes, or None; what is missing or damaged is said on stderr."""
    notes, r = [], None
    try:
        record = read_folder(path, notes) if path.is_dir() else json.loads(path.read_text())
        if record is None:
            return complain(path, f"left out, {notes[-1]}")
        c = record["config"]
        count = int(c.get("teacher_steps") or c.get("buffer_size") or 0)
        start = f"{c['method']}-{count}" if count else c["method"]
        option = r"-(joint|finetune|no_kd|one_stage|separate|labels[\d.]+|labelled_only)(?=-|$)"
        options = re.findall(option, c["name"]) if c["method"] == "jdcl" else []
        finished = record["tasks_done"] == len(c["class_tasks"])
        r = SimpleNamespace(
            **{"accuracy": None, "curve": []} | record, record=record, folder=path if path.is_dir() else None,
            dataset=c["dataset"], name=c["name"], method=c["method"], seed=int(c["seed"]), scale=c["scale"],
            tasks=len(c["class_tasks"]), count=count,
            base="-".join([start, *options]),  # gd-2, er-100, joint, jdcl-no_kd: the name without departures
            departure=re.sub(option if options else r"-lam[\d.]+", "", c["name"]).removeprefix(start),
            order=[*METHODS, *JDCL, c["method"]].index(c["replay"] if c["method"] == "jdcl" else c["method"]),
            name_in_paper=re.sub(r"-(bf16|tf32|fp32)(?=-|$)", "", c["name"]),  # another precision is not another row
            complete=c["scale"] == "paper" and finished and all(
                u >= p for u, p in zip(c["updates"], record["updates_preset"] or [])))
        for metric in METRICS:  # whatever a table may ask for
            for v in [v for some in collect([r], metric)[0].values() for v in some.values()]:
                mean_and_error(metric, [v])
        first_task(r), logits(r), [statistics.fmean(row) for row in (r.accuracy or {"matrix": []})["matrix"]]
    except (OSError, ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
        r = None
        notes.append(f"left out, damaged ({type(error).__name__}: {error})")
    if notes:
        complain(path, "; ".join(notes))
    return r


def find(folders):
    """All runs in and below the folders, in the order of the tables; of two with the same name and seed the first."""
    found = {}
    for folder in folders:
        if not folder.is_dir():
            raise InputError(f"there is no folder {folder}: give the one with the runs, usually runs/")
        inside = {path.parent for name in ("config.json", "classifier.json") for path in folder.rglob(name)}
        saved = {path for path in folder.rglob("seed*.json") if path.is_file()}
        for path in sorted(inside) + sorted(saved):
            r = read(path)
            if r and found.setdefault((r.dataset, r.order, r.count, r.name, r.seed), r) is not r:
                complain(path, f"left out, {r.name} with seed {r.seed} was read from another place")
    if not found:
        raise InputError(f"no run to report in {' or '.join(map(str, folders))}: train one, for example with "
                         "python train_gd.py --scale laptop")
    return [found[key] for key in sorted(found)]


# ----------------------------------------------------------------------------------------------------- numbers

def collect(runs, metric):
    """{protocol: {(index of the run, task): value}}, and the reasons of the FIDs that are missing.

    The protocol, a flat dict as JSON text, is all that must agree before two values are averaged.
    """
    found, reasons = {}, []
    for i, r in enumerate(runs):
        rows = []
        if metric == "acc" and r.classifier:
            rows = [(r.classifier["protocol"], k, v) for k, v in enumerate(r.classifier["accuracy"], 1)]
        elif metric[:2] == "ms":
            rows = [({"device": r.device}, s["task"], (s["mean"], s["sd"]) if metric == "ms" else s["mean"])
                    for s in r.ms_per_update if s.get("stage", "") == metric[3:]]
        elif metric in ("average_accuracy", "average_forgetting", "unet", "head"):
            rows = [({}, r.tasks_done, (r.accuracy | r.accuracy["parameters"])[metric])] if r.accuracy else []
        elif metric == "seconds":
            rows = [({"device": r.device}, r.tasks_done, r.seconds)]
        elif metric == "parameters" and r.method != "jdcl" and r.config.get("unet") in NETS:
            held = 1 if r.method in ("joint", "finetune", "er") else 2  # the previous model replays or distils
            rows = [({}, r.tasks_done, held * parameters(r.config["unet"]))]
        elif metric in ("fid", "frd", "kld", "share_old"):
            network, called = ("fid", "fid") if metric == "fid" else ("frd", "labeller")
            for e in r.eval:
                about = {f"{called}.{k}": v for k, v in (e["protocol"][network] or {}).items()}
                rows.append((e["protocol"] | about, e["task"], e[metric]))
                reasons += [e["fid_missing"]] * (metric == "fid" and e["fid"] is None)
        for protocol, task, value in rows:
            protocol = {k: v for k, v in protocol.items() if k not in VARIES | {"fid", "frd"}}
            protocol["precision"] = r.config.get("precision", "fp32")
            if value is not None:
                found.setdefault(json.dumps(protocol, sort_keys=True), {})[i, task] = value
    return found, reasons


@functools.cache
def parameters(unet):
    with torch.device("meta"):
        return sum(p.numel() for p in UNet(**NETS[unet]).parameters())


def mean_and_error(metric, v):
    """Mean and standard error of values, 0 for a single one; of ms the mean and the mean deviation over updates."""
    if metric == "ms":
        return statistics.fmean(mean for mean, _ in v), statistics.fmean(sd**2 for _, sd in v) ** 0.5
    return statistics.fmean(v), statistics.stdev(v) / len(v) ** 0.5 if len(v) > 1 else 0.0


def cells(runs, metric, digits, footnotes, usual=None):
    """[(text, mean)] of the values after the runs' last tasks, one for each protocol: [("23.5 ± 1.1 (3)", 23.53)].

    The text goes on with whatever sets the protocol apart from the others and from `usual`. In the latter case the
    mean, which nothing may be subtracted from, is None.
    """
    found, reasons = collect(runs, metric)
    found = [(json.loads(protocol), [v for (i, task), v in some.items() if task == runs[i].tasks_done])
             for protocol, some in sorted(found.items())]
    found, texts = [(p, v) for p, v in found if v], []
    for p, v in found:
        apart = [k for k in p if any(other.get(k) != p[k] for other, _ in found)]
        apart = [k for k in apart if "." not in k or k.endswith((".sha256", ".name"))] or apart  # a hash says it all
        departs = [k for k in usual or {} if p.get(k, usual[k]) != usual[k]]
        unusual = [k for k in REMARKED if p.get(k, REMARKED[k]) != REMARKED[k]] + ["device"] * (metric == "ms")
        said = [k.partition(".")[0] + " " + str(p[k]).strip("[]")[:40 if k == "device" else 12].rstrip(", ")
                for k in dict.fromkeys(apart + departs + unusual)]
        mean, error = (100 * x if "%" in METRICS[metric][0] else x for x in mean_and_error(metric, v))
        error = f" ± {error:.{digits}f}" * (len(v) > 1 or metric == "ms") + f" ({len(v)})"
        text = f"{mean:,.{digits}f}" + error * (metric not in ("parameters", "unet", "head"))
        texts.append((", ".join([text, *said]), None if departs else mean))
    if reasons and not texts:
        return [(f"–[^{footnotes.setdefault(reasons[0], len(footnotes) + 1)}]", None)]
    return texts or [("–", None)]


# ------------------------------------------------------------------------------------------------------ tables

def markdown(title, head, rows):
    """A Markdown table, straight in a terminal too; each row is a list of columns that begin on the same line."""
    lines = [head, *(line for columns in rows for line in itertools.zip_longest(*columns, fillvalue=""))]
    lines = [[text.replace("|", "\\|") for text in line] for line in lines]  # as in --class-order '0,1|2,7'
    widths = [max(map(len, column)) for column in zip(*lines)]
    texts = ["| " + " | ".join(text.ljust(width) for text, width in zip(line, widths)) + " |" for line in lines]
    texts.insert(1, "|" + "|".join("-" * (width + 2) for width in widths) + "|")
    return "\n".join([f"## {title}", "", *texts, ""])


def paper_rows():
    """PAPER in pieces: table, header, (dataset, metric) of last columns, [({dataset: name of the run}, cells)].

    JDCL has flags in the place of a run's name, and of a dataset's: {"cifar100 --tasks 10": "--no-kd"}.
    """
    for block in PAPER.strip().split("\n\n"):
        (title, *head), *rows = ([text.strip() for text in line.split("|")] for line in block.splitlines())
        asked = [text.split() for text in head if text.split()[-1] in METRICS]
        if jdcl := title[:4] == "JDCL":
            asked = [(text, "average_accuracy") for text in head[1:]]
        datasets = list(dict.fromkeys(dataset for dataset, _ in asked))
        yield title, head, asked, [
            (dict(zip(datasets, row[:1] * 4 if jdcl else row[0].split() * 2)), row[1:]) for row in rows]


def command(name, dataset):
    """The command that makes the run of this name, or with these flags of JDCL, at the paper's scale, for seed 42."""
    if name[:1] in ("", "-", "–"):
        return f"python train_jdcl.py --dataset {dataset} {name}".strip()
    method, _, count = name.partition("-")
    flags = {"joint": "gr.py --replay all", "finetune": "gr.py --replay none", "gr": "gr.py", "gd": "gd.py",
             "er": f"gr.py --replay buffer --buffer-size {count}", "lwf": "gd.py --distill current",
             "noise": "gd.py --distill noise",
             "classifier": "classifier.py --replay " + ("all" if count == "joint" else "none")}
    steps = str(train_gr.PRESETS["paper", dataset]["teacher_steps"])
    return (f"python train_{flags[method]}" + f" --dataset {dataset}" * (dataset != "fashion-mnist")
            + f" --teacher-steps {count}" * (method in ("gr", "gd") and count != steps))


def paper_tables(runs, footnotes):
    """The papers' tables, with the values of the runs, which are complete ones, and the differences below their own."""
    for title, head, asked, rows in paper_rows():
        above, table, jdcl = len(head) - len(asked), [], title[:4] == "JDCL"
        for names, texts in rows:
            columns = []
            for (dataset, metric), printed in zip(asked, texts[above:]):
                name, usual = names[dataset], {}
                if jdcl and name != "–":
                    name = train_jdcl.get_args(command(name, dataset).split()[2:]).name
                some = [r for r in runs if (r.dataset, r.name_in_paper) == (dataset.split()[0], name)]
                if not jdcl:
                    usual = {"n": 10000, "steps": train_gr.PRESETS["paper", dataset]["sample_steps"], "fid.name": "tf1"}
                if metric == "acc" and some:
                    usual["updates"] = preset_updates(dict(some[0].config, method="classifier-joint"))
                number = printed.split(" ")[0].replace(",", "")
                digits = len(number.partition(".")[2]) or METRICS[metric][1]
                columns.append([printed])
                for text, mean in cells(some, metric, digits, footnotes, usual) if "–" not in (printed, name) else ():
                    unknown = mean is None or number == "?"
                    columns[-1] += [text, "" if unknown else f"{mean - float(number):+,.{digits}f}"]
            kinds = ["paper" + ", second-hand" * jdcl] + ["ours", "difference"] * max(map(len, columns))
            lines = zip(*(line for line in itertools.zip_longest(kinds, *columns, fillvalue="") if any(line[1:])))
            (dataset, name), *more = names.items()
            typed = f"`{command(name, dataset)}{''.join(f' [--dataset {other}]' for other, _ in more)}`"
            table.append([*([text] for text in texts[:above]), *lines, [typed if name != "–" else name]])
        heads = [TITLES[dataset.split()[0]] + dataset[len(dataset.split()[0]):] + f" {METRICS[metric][0]}" * (not jdcl)
                 for dataset, metric in asked]
        title += ": the paper's values are second-hand and unverified" * jdcl
        yield markdown(title, [*head[:above], "", *heads, "command"], table)


def other_tables(runs, footnotes):
    """All metrics of complete, and of shortened runs, a table for each dataset, scale, size and number of tasks.

    JDCL's runs have tables of their own, and below each the accuracies a[k, j] after task k on the images of task j.
    """
    def section(r):
        return ("Complete" if r.complete else "Shortened", TITLES.get(r.dataset, r.dataset), f"{r.scale} scale",
                "{0}x{0}".format(r.config["image_size"]), f"{r.tasks} tasks", *["JDCL"] * (r.method == "jdcl"))

    def row(r):
        return r.order, r.count, r.name, r.tasks_done

    runs = sorted(runs, key=lambda r: (section(r), row(r)))
    for (kind, *what), some in itertools.groupby(runs, key=section):
        table, matrices, jdcl = [], [], what[-1] == "JDCL"
        metrics = ["fid", "frd", "kld", "share_old", "acc", "seconds"] if not jdcl else [
            "average_accuracy", "average_forgetting", "fid", "frd", "ms_local", "ms_global", "unet", "head", "seconds"]
        head = ["Strategy", "name", "tasks", *(METRICS[m][0] for m in metrics), "updates of the preset's", "command"]
        for _, same in itertools.groupby(some, key=row):
            same = list(same)
            r, done = same[0], sorted({r.updates_done for r in same})
            updates = " to ".join(f"{n:,}" for n in (done[0], done[-1])[:len(done)])
            updates += f" of {sum(r.updates_preset):,}" if r.updates_preset else ""
            columns = [[text for text, _ in cells(same, m, METRICS[m][1], footnotes)] for m in metrics]
            typed = re.sub(r" --seed[= ]\S+", "", r.command)
            strategy = METHODS.get(r.method, [JDCL[r.config["replay"]] if jdcl else r.method])[0]
            table.append([[strategy], [f"`{r.name}`"], [f"{r.tasks_done} of {r.tasks}"], *columns, [updates],
                          [f"`{typed}`"]])
            if there := [x.accuracy["matrix"] for x in same if x.accuracy]:
                a = [[f"{100 * value:.2f}" for value in np.mean(rows, 0)] for rows in zip(*there)]
                matrices.append([[f"`{r.name}` ({len(there)})"], [f"after task {k}" for k in range(1, len(a) + 1)],
                                 *([""] * min(j, len(a)) + [line[j] for line in a[j:]] for j in range(r.tasks))])
        yield markdown(f"{kind}: {', '.join(what)}", head, table)
        if matrices:
            head = ["name", "", *(f"task {j}" for j in range(1, r.tasks + 1))]
            yield markdown(f"{kind}: {', '.join(what)}, ↑ accuracy of each task's images, %, mean (n)", head, matrices)


def report(runs):
    """All tables as one Markdown text."""
    footnotes = {}
    tables = [*paper_tables([r for r in runs if r.complete], footnotes), *other_tables(runs, footnotes)]
    return INTRODUCTION + "\n".join([*tables, *(f"[^{i}]: no FID: {why}" for why, i in footnotes.items())])


def save_csv(path, runs):
    text = io.StringIO()
    out = csv.writer(text)
    out.writerow("dataset name method seed scale complete task metric value protocol command".split())
    for r, metric in itertools.product(runs, METRICS):
        for protocol, some in collect([r], metric)[0].items():
            for (_, task), value in some.items():
                out.writerow([r.dataset, r.name, r.method, r.seed, r.scale, r.complete, task, metric,
                              value[0] if metric == "ms" else value, protocol, r.command])
    run.replace(path, lambda file: file.write(text.getvalue().encode()))


# ----------------------------------------------------------------------------------------------------- figures

def save_figure(path, figure):
    run.replace(path, lambda file: figure.savefig(file, format="png", dpi=100))


def tile(u8):
    """uint8 (N, C, H, W) -> (h, w, 3), four images across, pixels repeated until an image has about 64."""
    f = max(1, 64 // u8.shape[2])
    u8 = u8.repeat_interleave(f, 2).repeat_interleave(f, 3)
    return make_grid(u8, nrow=4, padding=2, pad_value=255).permute(1, 2, 0).numpy()


def grid(path, title, rows, columns, images):
    """A picture of labelled cells: images[i][j], uint8 (N, C, H, W) or None, stands in row i and column j."""
    tiles = {(i, j): tile(u8) for i, line in enumerate(images) for j, u8 in enumerate(line) if u8 is not None}
    height, width, _ = next(iter(tiles.values())).shape
    columns = ["\n".join(line for part in text.split("\n") for line in textwrap.wrap(part, 36)) for text in columns]
    left, top, gap = 150, 46 + 17 * (1 + max(text.count("\n") for text in columns)), 16
    h, w = top + len(rows) * (height + gap), max(left + len(columns) * (width + gap), 30 + 10 * len(title))
    canvas = np.full((h, w, 3), 255, np.uint8)
    for (i, j), pixels in tiles.items():
        y, x = top + i * (height + gap), left + j * (width + gap)
        canvas[y:y + height, x:x + width] = pixels
    figure = Figure(figsize=(w / 100, h / 100), dpi=100)
    figure.figimage(canvas)
    figure.text(14 / w, 1 - 12 / h, title, size=12, weight="bold", va="top")
    for i, text in enumerate(rows):
        y = 1 - (top + i * (height + gap) + height / 2) / h
        figure.text(14 / w, y, "\n".join(textwrap.wrap(text, 16)), size=11, va="center")
    for j, text in enumerate(columns):
        figure.text((left + j * (width + gap) + 2) / w, 1 - (top - 6) / h, text, size=11, va="bottom")
    save_figure(path, figure)


def plot(path, title, panels):
    """Curves with error bars and one legend; a panel is (x label, y label, [(name as in gd-2, x, means, errors)])."""
    figure, handles = Figure(figsize=(3.6 * len(panels) + 2.6, 3.2), layout="constrained"), {}
    for axes, (x_label, y_label, curves) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels):
        for name, x, means, errors in curves:
            method, _, count = name.partition("-")
            style = {"10": "s--", "100": "^:", "1000": "D-."}.get(count, "o-")
            handles[name] = axes.errorbar(x, means, errors, fmt=style, color=METHODS[method][1], markersize=4,
                                          capsize=3, label=called(name))
        axes.set(xlabel=x_label, ylabel=y_label)
        axes.set_ylim(bottom=0)
        if x_label == "task":
            axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        else:
            axes.set_xlim(left=0)
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.25)
    figure.suptitle(title, size=11, weight="bold")
    figure.legend(handles=list(handles.values()), loc="outside right center", frameon=False, fontsize=9)
    save_figure(path, figure)


def called(name):
    """Generative distillation, 2 steps, for gd-2."""
    method, _, count = name.partition("-")
    return METHODS[method][0] + (f", {count} {'images' if method == 'er' else 'steps'}" if count else "")


@functools.cache
def draw(path, steps, device):
    """uint8 (16, C, H, W) drawn from a task<k>.pt by DDIM, for steps = 0 by DDPM; None if it is missing or damaged.

    The noises are the first 16 of the 64 that samples/task<k>.png starts from, the same in every run.
    """
    if not path.exists():
        return None
    try:
        saved = run.load(path)
        c, model = saved["config"], UNet(**NETS[saved["config"]["unet"]])
        model.load_state_dict(saved["model"])
    except (InputError, RuntimeError, KeyError, TypeError, AttributeError) as error:
        return complain(path, f"it is left out of the pictures ({error})")
    seed("grid")
    x_T = torch.randn(64, model.in_channels, c["image_size"], c["image_size"])[:16].to(device)
    model, abar = model.to(device), alpha_bar(c["schedule"]).to(device)
    x_0 = ddpm_sample(model, x_T, abar) if steps == 0 else sample(model, x_T, abar, steps or c["sample_steps"])
    return quantize(x_0).cpu()


def prevalent(runs, *metrics):
    """The metric and protocol with the most values, the first metric of equals; None where there are no values."""
    found = [(len(some), -i, metric, protocol) for i, metric in enumerate(metrics)
             for protocol, some in collect(runs, metric)[0].items()]
    return max(found)[2:] if found else None


def curve(name, points, metric, protocol):
    """(name, x, means, errors) of points [(x, runs, task)]."""
    found = []
    for x, runs, task in points:
        v = [v for (_, k), v in collect(runs, metric)[0].get(protocol, {}).items() if k == task]
        found += [(x, *mean_and_error(metric, v))] if v else []
    return (name, *zip(*found)) if found else (name, [], [], [])


def curve_figures(by_name, swept, usual):
    """(figure, panels for `plot`): quality over tasks, over lambda, over the time of training."""
    plain = sum(by_name.values(), [])
    tasks = (plain + swept)[0].tasks
    quality, classes, time = prevalent(plain, "fid", "frd"), prevalent(plain, "kld"), prevalent(plain, "seconds")
    for figure, names in ("figure4", [n for n in by_name if n in usual]), ("figureB2", list(by_name)):
        if quality and names and (figure == "figure4" or len(names) > len(usual)):
            yield figure, [("task", METRICS[metric][0], [
                curve(n, [(k, by_name[n], k) for k in range(1, tasks + 1)], metric, protocol) for n in names])
                for metric, protocol in (quality, classes)]

    panels = []
    for name in dict.fromkeys(r.base for r in swept):
        same = [r for r in plain + swept if r.base == name]
        lams = sorted({r.config["lam"] for r in same})
        points = [(lam, [r for r in same if r.config["lam"] == lam], tasks) for lam in lams]
        if found := prevalent(same, "fid", "frd"):
            panels.append(("λ", METRICS[found[0]][0], [curve(name, points, *found)]))
    if panels:
        yield "lambda", panels

    curves = []
    for name, runs in by_name.items() if quality and time else ():
        _, _, seconds, _ = curve(name, [(0, runs, tasks)], *time)
        curves.append(curve(name, [(s / 60, runs, tasks) for s in seconds], *quality))
    if any(x for _, x, _, _ in curves):
        yield "time", [(f"minutes of training, {json.loads(time[1])['device']}", METRICS[quality[0]][0], curves)]


def picture_figures(by_name, usual, device):
    """(figure, subtitle, row labels, column labels, images for `grid`) of runs of one seed, most runs have it."""
    there = [r for runs in by_name.values() for r in runs if r.folder]
    chosen = statistics.mode(sorted(r.seed for r in there)) if there else None
    at, (joint, finetune, gr, gd) = {r.base: r for r in there if r.seed == chosen}, usual
    if not at:
        return
    r = next(iter(at.values()))
    names, first = DATASETS[r.dataset]["classes"], 13 if r.dataset == "cifar10" else 3
    heads = [f"task {k}\n" + ", ".join(names[i] for i in task) for k, task in enumerate(r.config["class_tasks"], 1)]
    strips = {"figure2": [gr], "figure3": [joint, finetune, *(n for n in at if n[:2] == "er"), gr, gd],
              "figure6": [gr, gd, "lwf", "noise"]}
    strips |= {f"figureB{i}": [n] for i, n in enumerate(STRIPS.split(), first)}
    plans = {figure: ("after each task", heads, {n: [(n, k, None) for k in range(1, r.tasks + 1)] for n in rows})
             for figure, rows in strips.items()}
    steps = [n for n in (2, 10, 100) if f"gr-{n}" in at or f"gd-{n}" in at]
    if len(steps) > 1:
        plans["figure5"] = ("after the last task", [f"{n} teacher steps" for n in steps], {
            m: [(f"{m}-{n}", r.tasks, None) for n in steps] for m in ("gr", "gd")})
    plans["figureB1"] = ("joint training", ["2 DDIM steps", "10 DDIM steps", "100 DDIM steps", "1000 DDPM steps"], {
        "joint": [("joint", r.tasks, n) for n in (2, 10, 100, 0)]})
    for figure, (subtitle, columns, rows) in plans.items():
        images = {called(label): [draw(at[n].folder / f"task{k}.pt", steps, device) if n in at else None
                                  for n, k, steps in line] for label, line in rows.items()}
        images = {label: line for label, line in images.items() if any(u8 is not None for u8 in line)}
        if len(images) > (figure in ("figure3", "figure6")):  # these compare
            yield figure, f"seed {chosen}, {subtitle}", list(images), columns, list(images.values())


def logits(r):
    """[(real or replayed, shares, edges, "mean ± sd")] of the largest logits after the last task, if it replayed."""
    about = ((r.accuracy["tasks"][-1]["replay"] if r.accuracy else None) or {"logits": {}})["logits"]
    return [(kind, np.divide(of["counts"], sum(of["counts"])), about["edges"], f"{of['mean']:.1f} ± {of['sd']:.1f}")
            for kind, of in about.items() if kind != "edges"]


def first_task(r):
    """{updates since the run began: accuracy of the first task's images}."""
    begin = [0, *itertools.accumulate(r.config["updates"])]
    found = {begin[k - 1] + u: accuracy for k, u, accuracy, *_ in r.curve}
    return found | {begin[k]: row[0] for k, row in enumerate(r.accuracy["matrix"] if r.accuracy else [], 1)}


def jdcl_figures(by_name):
    """(figure, drawing): logits of real and of replayed images, of one seed; accuracy of the first task's images."""
    shown = {name: r for name in ("jdcl", "jdcl-separate") for r in by_name.get(name, [])[::-1] if logits(r)}
    figure = Figure(figsize=(3.8 * max(1, len(shown)), 3.4), layout="constrained")
    for i, (name, r) in enumerate(shown.items(), 1):
        axes = figure.add_subplot(1, len(shown), i)
        for kind, shares, edges, about in logits(r):
            axes.stairs(shares, edges, fill=True, alpha=0.5, label=f"{kind}, {about}")
        axes.set(xlabel="largest logit", ylabel="share of the images")
        axes.set_title(f"{name}, task {r.accuracy['tasks'][-1]['task']}, seed {r.seed}", size=10)
        axes.legend(frameon=False, fontsize=8)
    yield from [("jdcl-figure4", figure)] * bool(shown)

    figure = Figure(figsize=(6.4, 3.4), layout="constrained")
    axes = figure.add_subplot(xlabel="updates", ylabel="accuracy of task 1's images, %", ylim=(0, 101))
    for name, runs in by_name.items():
        found = [first_task(r) for r in runs]
        if x := sorted(set().union(*found)):
            mean, error = 100 * np.array([mean_and_error("", [f[u] for f in found if u in f]) for u in x]).T
            line, = axes.plot(x, mean, label=f"{name} ({len(found)})")
            axes.fill_between(x, mean - error, mean + error, alpha=0.25, color=line.get_color())
    figure.legend(loc="outside right center", frameon=False, fontsize=9)
    yield from [("jdcl-figure5", figure)] * bool(axes.lines)


def figures(runs, out, device):
    """Draw all figures whose runs are there, for each dataset and departure from its presets; return their names."""
    def kind(r):
        return r.dataset, r.departure, r.scale, r.method == "jdcl"

    made = []
    runs = [r for r in runs if "unet" in r.config and r.method in ("jdcl", *METHODS) and r.updates_preset]
    for (dataset, departure, scale, jdcl), some in itertools.groupby(sorted(runs, key=kind), key=kind):
        by_name, swept = {}, []
        for r in some:
            (swept if "-lam" in r.name else by_name.setdefault(r.base, [])).append(r)
        title = TITLES.get(dataset, dataset) + f" ({departure[1:]})" * bool(departure)
        for figure, drawing in jdcl_figures(by_name) if jdcl else ():
            made.append(f"{figure}-{dataset}{departure}.png")
            drawing.suptitle(textwrap.fill(title, 45), size=11, weight="bold")
            save_figure(out / made[-1], drawing)
        if jdcl:
            continue
        n = train_gr.PRESETS[scale, dataset]["teacher_steps"]
        usual = ["joint", "finetune", f"gr-{n}", f"gd-{n}"]
        for figure, panels in curve_figures(by_name, swept, usual):
            made.append(f"{figure}-{dataset}{departure}.png")
            plot(out / made[-1], title, panels)
        for figure, subtitle, *what in picture_figures(by_name, usual, device):
            made.append(f"{figure}-{dataset}{departure}.png")
            grid(out / made[-1], f"{title}, {subtitle}", *what)
    return made


# -------------------------------------------------------------------------------------------------------- main

def main(argv=None):
    args = get_args(argv)
    device, runs = run.pick_device(args.device), find(args.folders)
    text, out = report(runs), args.out or args.folders[0]
    print(text)
    out.mkdir(parents=True, exist_ok=True)
    for r in runs if args.save else ():
        path = args.save / r.dataset / r.name / f"seed{r.seed}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        run.write_json(path, r.record)
    if args.csv:
        save_csv(args.csv, runs)
    made = figures(runs, out, device) if args.figures else []
    pictures = "".join(f"\n![{Path(name).stem}]({name})\n" for name in made)
    run.replace(out / "report.md", lambda file: file.write((text + "\n" + pictures).encode()))
    print(f"written: {out / 'report.md'}" + f" and {len(made)} figures beside it" * bool(made), file=sys.stderr)


if __name__ == "__main__":
    run.main(main)
