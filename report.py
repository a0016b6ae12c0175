"""Tables and figures of runs, beside the papers' own numbers; and the commands of what is still to be run.

    mean ± standard error = s / sqrt(n),  s^2 = sum_i (v_i - mean)^2 / (n - 1),  over n seeds

Masip et al., "Continual Learning of Diffusion Models with Generative Distillation", arXiv 2311.14028: Tables 1, 2 and
B.1 to B.5, Figures 2 to 6 and B.1 to B.22. Skiers and Deja, "Joint Diffusion Models in Continual Learning" (JDCL),
arXiv 2411.08224: its tables at second hand, Figures 4 and 5.

    python report.py runs/                       tables to stdout and runs/report.md, figures to runs/*.png
    python report.py runs/ --save results/       besides, a small JSON file of each run, to be committed
    python report.py results/ --out runs/report  the same tables from those files alone
    python report.py --rows "Table 1" | sh       train and evaluate what runs/ and results/ lack of Table 1

All that is asked of a run stands in its folder, so a new method needs no line here. Complete runs alone stand beside
the paper's values: at the paper's scale, after all tasks, with at least the preset's updates.
"""

import argparse
import contextlib
import importlib
import itertools
import json
import operator
import platform
import re
import shlex
import statistics
import sys
import textwrap
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from PIL import Image
from torchvision.utils import make_grid

import data
import run
from ddim import T, alpha_bar, ddpm_sample, reseed, sample
from run import InputError
from unet import NETS, UNet

# The values as the papers print them, mean ± standard error (ms: standard deviation), – where there is none; of the
# same value in two tables the one with more digits. A row begins with the base of its runs and their flags, a column's
# head has dataset, flags and metric. JDCL's values are from a third party's notes of arXiv 2411.08224.
PAPER = """
Tables 1, 2 and B.2 to B.5 | Strategy | fashion-mnist fid | fashion-mnist kld | fashion-mnist acc | \
cifar10 fid | cifar10 kld | cifar10 acc
classifier-joint | Joint (classifier) | – | – | 0.92 ± 0.00 | – | – | 0.77 ± 0.03
classifier-finetune | Finetune (classifier) | – | – | 0.17 ± 0.03 | – | – | 0.19 ± 0.00
joint | Joint | 15.49 ± 1.30 | 0.08 ± 0.02 | – | 31.88 ± 2.89 | 0.12 ± 0.02 | –
finetune | Finetune | 68.76 ± 7.00 | 4.82 ± 1.42 | – | 55.77 ± 2.56 | 1.14 ± 0.10 | –
er-10 | ER, 10 images | 56.2 ± 1.1 | 0.72 ± 0.09 | 0.60 ± 0.02 | 62.0 ± 4.9 | 0.48 ± 0.05 | 0.12 ± 0.01
er-100 | ER, 100 images | 33.3 ± 2.9 | 0.33 ± 0.04 | 0.79 ± 0.01 | 42.3 ± 0.9 | 0.25 ± 0.03 | 0.12 ± 0.01
er-1000 | ER, 1000 images | 21.6 ± 0.9 | 0.28 ± 0.01 | 0.76 ± 0.03 | 49.6 ± 5.4 | 0.48 ± 0.05 | 0.13 ± 0.01
gr-2 | GR, 2 steps | 211.79 ± 6.92 | 3.39 ± 0.30 | 0.50 ± 0.04 | 166.69 ± 15.95 | 1.45 ± 0.45 | 0.27 ± 0.02
gr-10 | GR, 10 steps | 121.42 ± 13.04 | 0.98 ± 0.19 | 0.58 ± 0.04 | 96.39 ± 5.25 | 0.74 ± 0.14 | 0.26 ± 0.01
gr-100 | GR, 100 steps | 57.54 ± 8.61 | 0.61 ± 0.21 | 0.66 ± 0.02 | 66.47 ± 7.39 | 0.43 ± 0.07 | 0.28 ± 0.02
gd-2 | GD, 2 steps | 23.53 ± 1.06 | 0.25 ± 0.10 | 0.72 ± 0.03 | 48.82 ± 2.51 | 0.69 ± 0.02 | 0.33 ± 0.02
gd-10 | GD, 10 steps | 20.29 ± 3.07 | 0.13 ± 0.04 | 0.79 ± 0.01 | 42.34 ± 4.74 | 0.15 ± 0.01 | 0.31 ± 0.03
gd-100 | GD, 100 steps | 23.69 ± 3.42 | 0.12 ± 0.04 | 0.80 ± 0.01 | 30.53 ± 1.29 | 0.27 ± 0.05 | 0.35 ± 0.03
lwf | Current data | 65.01 ± 3.31 | 0.37 ± 0.09 | 0.35 ± 0.01 | 62.09 ± 2.49 | 0.49 ± 0.09 | 0.23 ± 0.02
noise | Gaussian noise | 38.87 ± 2.23 | 0.85 ± 0.05 | 0.63 ± 0.04 | 51.35 ± 2.95 | 0.75 ± 0.05 | 0.30 ± 0.00

Table B.1 | Strategy | fashion-mnist ms | fashion-mnist parameters | cifar10 ms | cifar10 parameters
finetune | Finetune | 253.3 ± 8.8 | 42,855,873 | 383.4 ± 95.3 | 35,746,307
gr-2 | GR, 2 steps | 664.3 ± 3.8 | 85,711,746 | – | –
gr-10 | GR, 10 steps | – | – | 1881.8 ± 42.9 | 71,492,614
gd-2 | GD, 2 steps | 747.9 ± 3.6 | 85,711,746 | – | –
gd-10 | GD, 10 steps | – | – | 1992.7 ± 47.6 | 71,492,614

JDCL, second-hand values | Method | cifar10 average_accuracy | cifar100 average_accuracy | \
cifar100 --tasks 10 average_accuracy | imagenet100 average_accuracy
jdcl-joint | Continual Joint | 86.41 | 73.07 | 64.15 | 50.59
– | GUIDE | 64.47 | 41.66 | 26.13 | 39.07
– | DGR with diffusion | 59.00 | 28.25 | 15.90 | 23.92
– | GFR | 26.70 | 34.80 | 21.90 | 32.95
jdcl | JDCL | 83.69 | 47.95 | 29.04 | 54.53
jdcl --separate | Separate DDPM and ResNet18 | 68.4 | – | – | –
jdcl --no-kd | Without distillation | 48.2 | – | – | –
jdcl --one-stage | One stage | ? | – | – | –
– | NNCSL (buffer 5120), 5 % of the labels | 79.3 | – | 46.0 | –
jdcl --labels 0.05 | JDCL, 5 % of the labels | 79.96 | – | 26.39 | –
– | NNCSL (buffer 5120), 0.8 % of the labels | 73.7 | – | 27.5 | –
jdcl --labels 0.008 | JDCL, 0.8 % of the labels | 78.93 | – | 22.19 | –
"""
COMMANDS = {  # what trains the bases in PAPER and ROWS; gr and gd have the preset's teacher steps
    "joint": "train_gr.py --replay all", "finetune": "train_gr.py --replay none",
    **{f"er-{n}": f"train_gr.py --replay buffer --buffer-size {n}" for n in (10, 100, 1000)},
    **{f"{gr}-{n}": f"train_{gr}.py --teacher-steps {n}" for gr in ("gr", "gd") for n in (2, 10, 100)},
    "lwf": "train_gd.py --distill current", "noise": "train_gd.py --distill noise",
    "classifier-joint": "train_classifier.py --replay all", "classifier-finetune": "train_classifier.py --replay none",
    "gr": "train_gr.py", "gd": "train_gd.py", "ewc": "train_ewc.py", "ewc-random": "train_ewc.py --direction random",
    "jdcl": "train_jdcl.py", "jdcl-joint": "train_jdcl.py --replay all",
    "jdcl-finetune": "train_jdcl.py --replay none"}
TARGETS, STEPS = "classifier-joint, classifier-finetune", "gr-2, gd-2, gr-10, gd-10, gr-100, gd-100"
ROWS = {  # the bases and flags of each table and figure; NAME on DATASET replaces NAME there
    "Table 1": "joint, finetune, gr, gd", "Table 2": f"{TARGETS}, gr, gd", "Table B.1": "finetune, gr, gd",
    "Table B.2": "joint, finetune, er-10, er-100, er-1000, gd", "Table B.3": f"{TARGETS}, er-10, er-100, er-1000, gd",
    **dict.fromkeys(["Table B.4", "Table B.5"], f"{TARGETS}, joint, finetune, noise, lwf, {STEPS}"),
    "Figure 2": "gr", **dict.fromkeys(["Figure 3", "Figure 4"], "joint, finetune, gr, gd"), "Figure 5": STEPS,
    "Figure 6": "gr, gd, lwf, noise",
    "Figure B.1": "joint --tasks 1", "Figure B.1 on cifar10": "joint --tasks 1 --batch-size 128",
    "Figure B.2": f"joint, finetune, {STEPS}, lwf, noise",  # in the order of Figures B.3 to B.12, B.13 to B.22
    "lambda": ", ".join(f"{base} --lambda {lam}" for base, sweep in (
        ("gd", "0.1 0.25 0.5 0.75 1 1.25 1.5 1.75 2 2.25 2.5 2.75 3"), ("noise", "1 4 8 12 16 20 24 28"),
        ("lwf", "0.1 0.25 0.5 0.75 1 1.25 1.5 1.75")) for lam in sweep.split()),
    "JDCL": "jdcl-joint, jdcl, jdcl-finetune, jdcl --no-kd, jdcl --one-stage, jdcl --separate, jdcl --labels 0.05, "
            "jdcl --labels 0.008",
    "JDCL on cifar100": "jdcl-joint, jdcl, jdcl-joint --tasks 10, jdcl --tasks 10, jdcl --tasks 10 --labels 0.05, "
                        "jdcl --tasks 10 --labels 0.008",
    "JDCL on imagenet100": "jdcl-joint, jdcl"}
TABLES = [name for name in ROWS if " on " not in name]
FIVE = " --class-order 0,1,2,3,4|5,6,7,8,9"  # two tasks of five classes
BEYOND = {  # docs/beyond.md, docs/jdcl.md
    "first step": ", ".join(f"{base} --teacher-steps {n}{step}" for base in ("gr", "gd") for n in (1, 2)
                            for step in ("", " --first-step analytic")),
    "solver": ", ".join(f"{base} --teacher-steps {n}" for base in ("gr", "gd")
                        for n in ("5", "5 --teacher-solver ipndm", "10")),
    "errors": "joint, finetune, er-10, er-100, er-1000, gr, gd, lwf, noise",
    "ewc": "gd, " + ", ".join(f"{base} --ewc {weight}" for base in ("ewc", "ewc-random")
                              for weight in (150, 1500, 15000)),
    "few labels": f"jdcl{FIVE}, " + ", ".join(
        f"jdcl --labels {share}{more}" for share in (0.05, 0.008)
        for more in ("", " --labelled-only", FIVE, f" --labelled-only{FIVE}", f" --labelled-batch 32{FIVE}"))}
INTRODUCTION = """# Results

Ours are mean ± standard error (sample standard deviation / √n) over n seeds, and (n). A dash was not measured, or is
not in the paper. What is not as in the paper stands beside ours, or below a table if all its rows share it; the paper's
ACC are with `--replay-loss reversed`. Shortened runs compare with nothing in the paper. frd is not FID: its features
are another network's. Frd by task is the mean over tasks of the frd of each task's images, its forgetting how much that
has grown since each task was new. A run that draws fewer than two images of a task is left out of these two. ms are
means over the last 1000 updates; the paper's are ± standard deviation, of a GeForce 1080 Ti. Parameters are those of
all networks that a method trains with. JDCL's values are from a third party's notes and unverified, but for 83.69 and
64.47, which a second source has too; ? is unknown.

"""
METRICS = {  # header and decimals; beside the papers' values ours have as many decimals as they
    "average_accuracy": ("↑ accuracy, %", 2), "average_forgetting": ("↓ forgetting, %", 2),
    "fid": ("↓ FID", 1), "frd": ("↓ frd", 1), "afrd": ("↓ frd by task", 1), "frd_forgetting": ("↓ its forgetting", 1),
    "kld": ("↓ KLD", 2), "share_old": ("old classes, %", 1),
    "acc": ("↑ ACC", 2), "ms": ("↓ ms per update", 1), "parameters": ("parameters", 0), "seconds": ("seconds", 0),
    "peak_memory_mb": ("peak memory, MB", 0)}
# The methods in the order of tables and figures, with their colours. Others follow, a spare colour for each label.
COLOURS = {"joint": "black", "finetune": "0.6", "er": "tab:olive", "gr": "tab:red", "gd": "tab:blue",
           "lwf": "tab:green", "noise": "tab:purple"}
STYLES = "o-", "s--", "^:", "D-.", "v-.", "P--"  # of curves in the same colour
SPARE = "tab:orange tab:brown tab:pink tab:cyan gold navy lime teal salmon orchid".split()
TEACHER = "teacher_solver", "first_step"  # flags that say how a teacher draws
WEIGHTS = "lam", "ewc"  # flags of which one figure shows all values
UNSAID = dict(precision="fp32", clip=True, sample_steps=None, teacher_steps=None, buffer_size=None, preset={},
              parameters=None, script="")  # what not every run says
NEEDED = "dataset_name seed image_size command class_names".split()  # without these a run is left out
DAMAGE = OSError, ValueError, KeyError, TypeError, AttributeError, IndexError  # what reading a damaged file may raise


# ------------------------------ arguments

def get_args(argv=None):
    parser = run.parser(__doc__, __file__)
    add = parser.add_argument
    add("folders", nargs="*", type=Path, metavar="FOLDER",
        help="searched for run folders and files of --save (default: runs and results, where they exist)")
    add("--out", type=Path, help="folder of report.md and of the figures (default: the first FOLDER)")
    add("--save", type=Path, metavar="RESULTS", help="write RESULTS/<dataset>/<name>/seed<seed>.json of every run")
    add("--figures", action=argparse.BooleanOptionalAction, default=True, help="draw them (default: yes)")
    add("--device", default="auto", help="for pictures that a model draws: auto, cpu, mps, cuda or cuda:<i>")
    add("--rows", choices=[*TABLES, *BEYOND, "all"], metavar="TABLE",
        help="print the commands of what a table or figure lacks: 'Table B.2', 'Figure 4', lambda, JDCL, all, ...")
    add("--scale", default="paper", choices=["paper", "small", "laptop"], help="of --rows")
    add("--dataset", default="fashion-mnist", type=data.dataset_name, metavar="NAME|FOLDER",
        help="of --rows (default: fashion-mnist; Table B.5 and JDCL's are cifar10's)")
    add("--seeds", default=[42, 69, 1714], type=run.per_task(int), help="of --rows (default: the paper's, 42,69,1714)")
    args = parser.parse_args(argv)
    for key in ("out", "save", "figures", "device") if args.rows else ("scale", "dataset", "seeds"):
        if getattr(args, key) != parser.get_default(key):
            parser.error(f"--{key} does nothing {'with' if args.rows else 'without'} --rows")
    args.folders = args.folders or [folder for folder in (Path("runs"), Path("results")) if folder.is_dir()]
    return args


# ------------------------------ reading

def parse_metrics(text):
    """What is kept of metrics.jsonl: seconds, peak memory, ms of each task (mean over its last 1000 updates), and where
    the model classifies `curve`, [[task, update, accuracy of task 1's images], ...].
    """
    records = [json.loads(line) for line in text.split("\n")[:-1]]  # a kill may cut the last line short
    speed = []
    for task, some in itertools.groupby(records, key=lambda r: r["task"]):
        update, ms = np.array([(r["update"], r["ms_per_update"]) for r in some]).T
        weights = np.diff(update, prepend=0) * (update > update[-1] - 1000)  # a record is of all updates since the last
        speed.append(dict(task=task, mean=round(np.average(ms, weights=weights), 3)))
    curve = [[r["task"], r["update"], r.get("accuracy" if r["task"] == 1 else "accuracy_task1")] for r in records]
    return dict(seconds=records[-1]["seconds"] if records else None, ms_per_update=speed,
                curve=[point for point in curve if point[2] is not None],
                peak_memory_mb=max((r["peak_memory_mb"] or 0 for r in records), default=0) or None)


def machine(device):
    """What this machine calls its CUDA device, or else its processor."""
    if device != "cpu" and torch.cuda.is_available():
        return torch.cuda.get_device_name()
    info = Path("/proc/cpuinfo")
    found = re.search(r"model name\s*: (.+)", info.read_text(encoding="utf-8")) if info.exists() else None
    return found[1] if found else platform.processor() or platform.machine()


def read_folder(folder):
    """What --save writes, of a run folder or of one that holds a classifier alone."""
    record = dict(config=None, eval=[], classifier=None, accuracy=None, metrics={})
    for key in record:
        path = folder / ("metrics.jsonl" if key == "metrics" else f"{key}.json")
        if path.exists():
            text = path.read_text(encoding="utf-8")
            record[key] = parse_metrics(text) if key == "metrics" else json.loads(text)
    c, classifier, accuracy = record["config"], record["classifier"], record["accuracy"]
    if c:
        done = [k for k in range(1, 1 + len(c["class_tasks"])) if (folder / f"task{k}.pt").exists()]
        done += [e["task"] for e in record["eval"]] + ([len(accuracy["matrix"])] if accuracy else [])
    else:
        record["metrics"], done = dict(seconds=sum(classifier["seconds"])), [len(classifier["accuracy"])]
    return dict(record, tasks_done=max(done, default=0), device=machine((c or classifier)["device"]))


def list_values(r):
    """Yield all that was measured of a run, one by one: metric, task, value, conditions.

    The conditions are texts that say what is not as in the paper, such as "n 2000" or "bf16", or nothing. Only values
    with the same conditions may be averaged.
    """
    classifier, accuracy, metrics = r.record["classifier"], r.record["accuracy"], r.record["metrics"]
    precision = r.precision * (r.precision != "fp32")
    errors = {e["task"]: e.get("denoise", []) for e in r.record["eval"]}  # on images of task 1, by noise
    for k in errors:
        for t, error, at_first in zip(range(50, T, 100), errors[k], errors.get(1, [])):
            yield f"error {t}", k, error, [precision]
            yield f"growth {t}", k, error / at_first, [precision]
    first = {}  # (task, conditions): the frd of its images when it was the newest
    for e in r.record["eval"]:
        k, p, fid = e["task"], e["protocol"], e["protocol"]["fid"] or {"name": "tf1"}
        unlike = [precision, f"n {p['n']}" * (p["n"] != 10000), f"{p['steps']} steps" * (p["steps"] != r.sample_steps),
                  f"evaluated with seed {p['seed']}" * (p["seed"] != r.seed)]
        yield "fid", k, e["fid"], [*unlike, fid["name"] * (fid["name"] != "tf1")]
        unlike.append(f"labeller {p['frd']['sha256'][:12]}")
        for metric in ("frd", "kld", "share_old"):
            yield metric, k, e[metric], unlike
        now = e.get("frd_by_task", [None])
        first[(k, *unlike)] = now[-1]
        then = [first.get((task, *unlike)) for task in range(1, 1 + len(now))]
        if all(now + then):  # no task is lost altogether
            yield "afrd", k, statistics.fmean(now), unlike
            yield "frd_forgetting", k, statistics.fmean(now) - statistics.fmean(then), unlike
    if classifier:
        p = dict(steps=None, replay_loss=None, pool=None) | classifier["protocol"]
        unlike = [precision, f"updates {p['updates']}" * (p["updates"] != classifier["preset_updates"]),
                  f"{p['steps']} steps" * (p["steps"] != r.sample_steps),
                  "reversed loss" * (p["replay_loss"] == "reversed"), f"pool of {p['pool']}" * bool(p["pool"])]
        for k, value in enumerate(classifier["accuracy"], 1):
            yield "acc", k, value, unlike
    for s in metrics.get("ms_per_update", []):
        yield "ms", s["task"], s["mean"], [precision, r.record["device"]]
    for metric in ("seconds", "peak_memory_mb"):
        yield metric, r.done, metrics.get(metric), [precision, r.record["device"]]
    for metric in ("average_accuracy", "average_forgetting") if accuracy else ():
        yield metric, r.done, accuracy[metric], [precision]
    yield "parameters", r.done, r.parameters, []


def read(path):
    """The run of a run folder or of a file of --save: its config.json or classifier.json as attributes, and besides

    values, done    {(metric, task, conditions): value} of all that was measured; how many tasks are done
    complete        whether it may stand beside the paper's values, at `place` (row) and `column` of PAPER
    row             sorts the tables; runs with the same row are averaged
    label, usual    what figures call it, and whether the main ones show it
    count, variant  teacher steps or buffer size, and how else its teacher draws, ", analytic" or ", ipndm"
    weighs          which of WEIGHTS are not the preset's, "", "lam" or "ewc"
    curve, logits   of a model that classifies (JDCL): {update: accuracy of task 1's images}, and the histogram of the
                    largest logits of "real" and "replayed" images
    """
    record = read_folder(path) if path.is_dir() else json.loads(path.read_text(encoding="utf-8"))
    r = SimpleNamespace(**UNSAID | (record["config"] or record["classifier"]["protocol"] | record["classifier"]))
    r.path, r.folder, r.record, r.done, r.tasks = path, None, record, record["tasks_done"], len(r.class_tasks)
    r.values = {(metric, task, tuple(filter(None, conditions))): float(value)
                for metric, task, value, conditions in list_values(r) if value is not None}
    r.dataset_title = data.DATASETS[r.dataset].title if r.dataset in data.DATASETS else r.dataset_name
    r.complete = r.scale == "paper" and r.done == r.tasks == len(r.preset_updates) and all(
        map(operator.ge, r.updates, r.preset_updates))

    begin, accuracy = [0, *itertools.accumulate(r.updates)], record["accuracy"]
    r.curve = {begin[task - 1] + update: float(v) for task, update, v in record["metrics"].get("curve", [])}
    replay = accuracy and accuracy["tasks"][-1]["replay"]
    r.logits = replay and replay["logits"]

    steps, images, known = r.teacher_steps, r.buffer_size, [*COLOURS, r.method]
    r.count, r.usual = int(steps or images or 0), steps == r.preset.get("teacher_steps", steps)
    r.style = STYLES[{10: 1, 100: 2, 1000: 3, 1: 4, 5: 5}.get(r.count, 0)]
    r.weighs = " ".join(key for key in WEIGHTS if key in r.departs)
    r.variant = "".join(f", {r.departs[key]}" for key in TEACHER if key in r.departs)
    r.label = r.title + (f", {steps} step" + "s" * (steps > 1) if steps else f", {images} images" if images else "")
    r.row = known.index(r.method), r.method, r.count, len(r.departs), r.name, r.done, sum(r.updates[:r.done]), r.script
    r.column = r.dataset + f" --tasks {r.tasks}" * ("tasks" in r.departs)
    r.place = r.base + "".join(f" --{key.replace('_', '-')}" + f" {value}" * (value is not True)
                               for key, value in r.departs.items() if key not in ("precision", "tasks"))
    if r.script not in ("", COMMANDS.get(r.base, COMMANDS.get(r.method, "")).partition(" ")[0]):
        r.place = None  # of a copy of a script, whatever it calls its method
    operator.attrgetter(*NEEDED)(r)
    return r


def find(folders):
    """All runs in and below the folders, in the order of the tables.

    A run may be there as a folder, as a file of --save, and as a folder of its models alone. The one with most values
    counts.
    """
    every, runs, spare = [], [], {}
    for folder in folders:
        if not folder.is_dir():
            raise InputError(f"there is no folder {folder}: give the one with the runs, usually runs/")
        paths = {path.parent for name in ("config.json", "classifier.json") for path in folder.rglob(name)}
        for path in sorted(paths.union(folder.rglob("seed*.json"))):
            try:
                every.append(read(path))
            except DAMAGE as error:  # the other runs are reported all the same
                print(f"{path}: left out, damaged or of an older version ({type(error).__name__}: {error})",
                      file=sys.stderr)
    for same in group(every, lambda r: (r.dataset_name, r.name, r.seed)).values():
        runs.append(best := max(same, key=lambda r: len(r.values)))
        for r in same:
            if r.record["config"] != best.record["config"]:
                print(f"{r.path}: left out, {r.name} with seed {r.seed} was read from {best.path}", file=sys.stderr)
        folders = [r.path for r in same if r.path.is_dir() and r.record["config"] == best.record["config"]]
        best.folder = max(folders, key=lambda path: len([*path.glob("task*.pt")]), default=None)  # most models
    runs.sort(key=lambda r: (r.dataset_name, r.row, r.scale, r.seed))
    for r in runs:
        r.colour = COLOURS.get(r.method) or spare.setdefault(r.label, SPARE[len(spare) % len(SPARE)])
    return runs


# ------------------------------ commands

def missing(rows, scale, dataset, seeds, runs):
    """[[script, argument, ...], ...]: what trains, evaluates and classifies what `runs` lack, seed by seed.

    `rows` are (row, classify): a base with flags as in ROWS, and whether a classifier learns from its runs. The scripts
    say what their runs are called. If a value is lacking, a run without all its models is trained first.
    """
    def lacks(r, metric):
        return not r or len({task for name, task, _ in r.values if name == metric}) < r.tasks

    there, wanted = {(r.dataset_name, r.name, r.seed): r for r in runs if r.place}, {}  # not of copied scripts
    for seed, (row, classify) in itertools.product(seeds, rows):
        base, _, flags = row.partition(" ")
        script, *typed = shlex.split(f"{COMMANDS[base]} {flags}")
        default = "cifar10" if script == "train_jdcl.py" else "fashion-mnist"
        typed += ["--dataset", dataset] * (dataset != default) + ["--scale", scale] * (scale != "paper")
        train = [script, *typed, "--seed", str(seed)]
        with contextlib.redirect_stdout(sys.stderr):  # what it says of a folder of pictures is no command
            args = importlib.import_module(script.removesuffix(".py")).get_args(train[1:])
        run_key = args.dataset_name, args.name, seed
        r = there.get(run_key)
        whole = r and r.folder and all((r.folder / f"task{k}.pt").exists() for k in range(1, r.tasks + 1))
        folder = (r.folder if whole else Path("runs", args.dataset_name, args.name, f"seed{seed}")).as_posix()
        if script == "train_classifier.py":
            commands = [train] * lacks(r, "acc")
        else:
            commands = [["eval_fid.py", folder]] * lacks(r, "kld")
            commands += [["train_classifier.py", folder]] * (classify and lacks(r, "acc"))
            commands = [train] * (bool(commands) and not whole) + commands
        wanted.setdefault(run_key, commands)
    return sum(wanted.values(), [])


# ------------------------------ tables

def group(runs, key):
    """{key(r): its runs}, in their order."""
    groups = {}
    for r in runs:
        groups.setdefault(key(r), []).append(r)
    return groups


def values(runs, metric, task=None):
    """{conditions: [value, ...]} of a metric after `task`, or after each run's last one."""
    found = {}
    for r in runs:
        for (name, k, conditions), value in r.values.items():
            if name == metric and k == (task or r.done):
                found.setdefault(conditions, []).append(value)
    return found


def mean_and_error(v):
    """Mean and standard error, 0 of a single value."""
    return statistics.fmean(v), statistics.stdev(v) / len(v) ** 0.5 if len(v) > 1 else 0.0


def shared(runs, metric):
    """The conditions that all values of a metric have."""
    return set.intersection(*map(set, values(runs, metric) or [()]))


def cells(runs, metric, digits, unsaid):
    """["23.5 ± 1.1 (3), n 2000", ...] after the runs' last tasks, one for each list of conditions, less the unsaid."""
    found, texts = values(runs, metric), []
    for conditions, v in sorted(found.items(), key=lambda item: (len(item[0]), item)):  # the paper's first
        mean, error = (100 * x if "%" in METRICS[metric][0] else x for x in mean_and_error(v))
        error = f" ± {error:.{digits}f}" * (len(v) > 1) + f" ({len(v)})"
        text = f"{mean:,.{digits}f}" + error * (metric != "parameters")
        texts.append(", ".join([text, *(said for said in conditions if said not in unsaid)]))
    return texts or ["–"]


def markdown(title, head, rows):
    """A Markdown table, straight in a terminal too; a row is a list of cells, a cell a list of lines."""
    lines = [head, *(line for columns in rows for line in itertools.zip_longest(*columns, fillvalue=""))]
    lines = [[text.replace("|", "\\|") for text in line] for line in lines]  # as in --class-order '0,1|2,7'
    widths = [max(map(len, column)) for column in zip(*lines)]
    texts = ["| " + " | ".join(text.ljust(width) for text, width in zip(line, widths)) + " |" for line in lines]
    texts.insert(1, "|" + "|".join("-" * (width + 2) for width in widths) + "|")
    return "\n".join([f"## {title}", "", *texts, ""])


def beside_the_papers(runs):
    """The papers' tables, and below their values those of complete runs."""
    for block in PAPER.strip().split("\n\n"):
        (title, first, *heads), *rows = ([cell.strip() for cell in line.split("|")] for line in block.splitlines())
        asked, table = [text.rsplit(" ", 1) for text in heads], []  # (dataset and flags, metric)
        for place, strategy, *printed in rows:
            columns, command = [[text] for text in printed], ""
            for cell, text, (column, metric) in zip(columns, printed, asked):
                if "–" not in (place, text):
                    digits = METRICS[metric][1] if text == "?" else len(text.split()[0].partition(".")[2])
                    beside = [r for r in runs if r.complete and r.column == column]
                    one_labeller = {said for said in shared(beside, metric) if said.startswith("labeller")}
                    some = {(r.seed, r.precision): r for r in beside if r.place == place}  # each once
                    cell += cells(some.values(), metric, digits, one_labeller)
                    base = place.split()[0]
                    command = command or f"`python {COMMANDS[base]}{place[len(base):]} --dataset {column}`"
            kinds = ["paper"] + ["ours"] * (max(map(len, columns)) - 1)
            table.append([[strategy], kinds, *columns, [command]])
        heads = [f"{column} {METRICS[metric][0]}" for column, metric in asked]
        yield markdown(title, [first, "", *heads, "command"], table)


def all_tables(runs):
    """All metrics of complete, and of shortened runs: a table for each dataset, scale, size and number of tasks."""
    def section(r):
        kind, tasks = "Complete" if r.complete else "Shortened", f"{r.tasks} task" + "s" * (r.tasks > 1)
        about = f"{kind}: {r.dataset_title}, {r.scale} scale, {r.image_size}x{r.image_size}, {tasks}"
        return about + ", with a classifier" * bool(r.curve)

    for title, some in sorted(group(runs, section).items()):
        rows = group(some, lambda r: r.row).values()
        metrics, table = [m for m in METRICS if any(values(same, m) for same in rows)], []
        notes = group(metrics, lambda m: ", ".join(sorted(shared(some, m))))  # what all rows have in common
        note = "; ".join(f"{', '.join(METRICS[m][0].strip('↑↓ ').partition(',')[0] for m in those)}: {said}"
                         for said, those in notes.items() if said)
        for same in rows:
            r, measured = same[0], [cells(same, m, METRICS[m][1], shared(some, m)) for m in metrics]
            typed = re.sub(r" --seed[= ]\S+", "", re.sub(r"\S*/(train_\w+\.py)", r"\1", r.command))
            table.append([[r.title], [f"`{r.name}`"], [f"{r.done} of {r.tasks}"], *measured, [f"`{typed}`"]])
        heads = ["Strategy", "name", "tasks", *(METRICS[m][0] for m in metrics), "command"]
        yield markdown(title, heads, table) + f"\nAll rows: {note}\n" * bool(note)


# ------------------------------ figures

def plot(panels, title=""):
    """Curves of means with standard errors, and one legend; None without values.

    A panel is (x label, y label, curves), a curve (what has the label, colour and style of a run, {x: all values}).
    """
    figure, handles = Figure(figsize=(3.6 * len(panels) + 2.6, 3.2), layout="constrained"), {}
    for i, (x_label, y_label, curves) in enumerate(panels, 1):
        axes = figure.add_subplot(1, len(panels), i, xlabel=x_label, ylabel=y_label)
        for r, points in curves:
            points = {x: mean_and_error(v) for x, v in sorted(points.items()) if v}
            if points:
                handles[textwrap.fill(r.label, 40)] = axes.errorbar(
                    [*points], *zip(*points.values()), fmt=r.style if len(points) < 20 else "-",
                    color=r.colour, markersize=4, capsize=3, errorevery=max(1, len(points) // 20))
        axes.set_ylim(None if axes.dataLim.ymin < 0 else 0)  # forgetting may be below 0
        if x_label in ("--ewc", "teacher calls in an update"):
            axes.set_xscale("log")
        else:
            axes.set_xlim(None if x_label == "task" else 0)
            axes.xaxis.set_major_locator(MaxNLocator(6, integer=x_label == "task"))
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.25)
    figure.legend(handles.values(), handles, loc="outside right center", frameon=False, fontsize=9)
    figure.set_figheight(max(3.2, 0.4 + 0.21 * "\n".join(["", *handles]).count("\n")))  # the whole legend fits
    figure.suptitle(title)
    return figure if handles else None


def grid(title, heads, rows):
    """A picture of rows (label, {column: pixels (h, w, 3)}) under heads {column: text}; None if all are empty."""
    rows = [row for row in rows if row[1]]
    columns = sorted(set().union(*(pictures for _, pictures in rows)))
    if not rows:
        return None
    figure = Figure(figsize=(max(7, 1.6 + 2.8 * len(columns)), 1 + 2.9 * len(rows)), layout="constrained")
    axes = figure.subplots(len(rows), len(columns), squeeze=False)
    for line, (label, pictures) in zip(axes, rows):
        line[0].set_ylabel(textwrap.fill(label, 16), rotation=0, ha="right", va="center", size=11)
        for cell, column in zip(line, columns):
            cell.set(xticks=[], yticks=[])
            cell.spines[:].set_visible(False)
            if column in pictures:
                cell.imshow(pictures[column], interpolation="nearest")
    for cell, column in zip(axes[0], columns):
        cell.set_title(heads[column], size=11, loc="left")
    figure.suptitle(title)
    return figure


def samples(r, k, device, steps=()):
    """16 images after task k as a picture (h, w, 3), out of samples/task<k>.png, or drawn by task<k>.pt from the same
    noises. With `steps` one is drawn for each number of DDIM steps, where T means DDPM. A list, empty without files.
    """
    picture, weights, n = r.folder / f"samples/task{k}.png", r.folder / f"task{k}.pt", 4 * (r.image_size + 1) + 1
    try:
        if picture.exists() and not steps:
            return [np.asarray(Image.open(picture).convert("RGB"))[::2, ::2][:n, :n]]  # each pixel is there twice
        if not weights.exists():
            return []
        model, abar = UNet(**NETS[r.unet]).to(device), alpha_bar(r.schedule).to(device)
        run.load_weights(model, weights)
    except (SyntaxError, *DAMAGE) as error:
        print(f"{r.folder}: task {k} is left out of the figures ({error})", file=sys.stderr)
        return []
    reseed("grid")
    x_T = torch.randn(64, model.in_channels, r.image_size, r.image_size)
    x_T = x_T.unflatten(0, (8, 8))[:4, :4].flatten(0, 1).to(device)  # of a picture of 8x8 the upper left quarter
    drawn = [ddpm_sample(model, x_T, abar, r.clip) if steps and n == T else
             sample(model, x_T, abar, n, clip=r.clip) for n in steps or [r.sample_steps]]
    return [make_grid(data.quantize(x_0).cpu(), nrow=4, padding=1).permute(1, 2, 0).numpy() for x_0 in drawn]


def usual(figure, runs):
    """The runs that this figure of the paper shows, with the preset's teacher steps."""
    return [r for r in runs if r.usual and r.method in ROWS[figure].split(", ")]


def curve_figures(runs):
    """(name, figure): quality over tasks, over lambda, EWC's weight and the teacher's calls, and error by noise.

    Each shows the values whose conditions are the commonest.
    """
    measured = [(metric, conditions) for r in runs for metric, _, conditions in r.values]
    quality, last = max("fid", "frd", key=[metric for metric, _ in measured].count), runs[0].tasks
    plain = [r for r in runs if not r.weighs and not r.variant]

    def pick(runs, metric, task):
        commonest = statistics.mode([conditions for name, conditions in measured if name == metric] or [()])
        return values(runs, metric, task).get(commonest)

    def bases(runs):
        return group(runs, lambda r: r.base).values()

    for name, shown in ("figure4", usual("Figure 4", plain)), ("figureB2", plain):
        panels = []
        for metric in quality, "kld":
            curves = [(same[0], {k: pick(same, metric, k) for k in range(1, 1 + last)}) for same in bases(shown)]
            panels.append(("task", METRICS[metric][0], curves))
        yield name, plot(panels)

    panels = []
    for metric, label in ("error", "error after the last task"), ("growth", "error over that after task 1"):
        curves = [(same[0], {t: pick(same, f"{metric} {t}", last) for t in range(50, T, 100)})
                  for same in bases([r for r in plain if r.usual])]
        panels.append(("t", label, curves))
    yield "denoise", plot(panels, "mean |eps - model(x_t, t)|² on test images of task 1")

    panels = []
    for same in bases([r for r in runs if not r.variant and r.weighs in ("", "lam")]):
        if any(r.weighs for r in same):
            points = {lam: pick(some, quality, last) for lam, some in group(same, lambda r: r.lam).items()}
            panels.append(("λ", METRICS[quality][0], [(same[0], points)]))
    yield "lambda", plot(panels)

    swept = [r for r in runs if vars(r).get("ewc") and not r.variant and r.weighs in ("", "ewc")]
    beside = [r for r in plain if r.method == "gd" and r.usual]
    panels = []
    for metric in quality, "afrd", "frd_forgetting":
        curves = [(same[0], {weight: pick(some, metric, last) for weight, some in group(same, lambda r: r.ewc).items()})
                  for same in bases(swept)]
        weights = {x for _, points in curves for x in points}
        curves += [(same[0], dict.fromkeys(weights, pick(same, metric, last))) for same in bases(beside)]
        panels.append(("--ewc", METRICS[metric][0], curves))
    if any(r.weighs for r in swept):
        yield "ewc", plot(panels)

    teachers, curves = [], []  # of the methods that have several
    for same in group([r for r in runs if r.teacher_steps and not r.weighs], lambda r: r.title).values():
        teachers += same * (len({(r.count, r.variant) for r in same}) > 1)
    variants = sorted({r.variant for r in teachers})
    for (title, variant), same in group(teachers, lambda r: (r.title, r.variant)).items():
        look = SimpleNamespace(label=title + variant, colour=same[0].colour, style=STYLES[variants.index(variant)])
        points = {n: pick(some, quality, last) for n, some in group(same, lambda r: r.teacher_steps).items()}
        curves.append((look, points))
    if len(variants) > 1:
        yield "calls", plot([("teacher calls in an update", METRICS[quality][0], curves)])


def sample_figures(runs, device):
    """(name, figure): samples of one seed, the one that most runs have."""
    there = [r for r in runs if r.folder and not r.weighs and not r.variant and any(r.folder.rglob("task*"))]
    if not there:
        return
    seed = statistics.mode(sorted(r.seed for r in there))
    shown = [r for r in there if r.seed == seed]
    first = shown[0]
    heads = {k: f"task {k}\n" + textwrap.fill(", ".join(first.class_names[c] for c in classes), 36, max_lines=4)
             for k, classes in enumerate(first.class_tasks, 1)}
    pictures = {r.base: {k: pixels for k in heads for pixels in samples(r, k, device)} for r in shown}
    own = [r for r in shown if r.usual and r.method not in COLOURS]
    plans = {f"figure{n}": usual(f"Figure {n}", shown) for n in (2, 3, 6)}
    plans["figure3"] += own
    for i, base in enumerate(ROWS["Figure B.2"].split(", "), 13 if first.dataset == "cifar10" else 3):
        plans[f"figureB{i}"] = [r for r in shown if r.base == base]
    for name, wanted in plans.items():
        yield name, grid(f"seed {seed}, after each task", heads, [(r.label, pictures[r.base]) for r in wanted])

    title, rows = f"seed {seed}, after the last task", {}
    for r in shown:
        if r.method in ("gr", "gd") and r.tasks in pictures[r.base]:
            rows.setdefault(r.title, {})[r.count] = pictures[r.base][r.tasks]
    heads = {n: f"{n} teacher step" + "s" * (n > 1) for n in set().union(*rows.values())}
    if len(heads) > 1:
        yield "figure5", grid(title, heads, rows.items())
    heads = {2: "2 DDIM steps", 10: "10 DDIM steps", 100: "100 DDIM steps", T: "1000 DDPM steps"}
    yield "figureB1", grid(title, heads, [(r.label, dict(zip(heads, samples(r, r.tasks, device, heads))))
                                          for r in shown if r.method == "joint"])


def jdcl_figures(runs):
    """(name, figure): JDCL's Figure 4, the largest logits of real and of replayed images, of a joint and of a separate
    classifier; and its Figure 5, the accuracy of the first task's images over all updates.
    """
    shown = {r.name: r for r in runs[::-1] if r.logits and set(r.departs) <= {"separate", "precision"}}
    figure = Figure(figsize=(0.1 + 3.8 * len(shown), 3.4), layout="constrained")
    for i, r in enumerate(sorted(shown.values(), key=lambda r: r.row), 1):
        axes = figure.add_subplot(1, len(shown), i, xlabel="largest logit", ylabel="share of the images")
        for kind in "real", "replayed":
            counts = r.logits[kind]["counts"]
            axes.stairs(np.divide(counts, sum(counts)), r.logits["edges"], fill=True, alpha=0.5, label=kind)
        axes.set_title(f"{r.name}, seed {r.seed}, task {r.done}", size=10)
        axes.legend(frameon=False, fontsize=8)
    yield "jdcl-figure4", figure if shown else None

    curves = []
    for (name, same), colour in zip(group(runs, lambda r: r.name).items(), itertools.cycle(SPARE)):
        points = {}
        for update, accuracy in itertools.chain(*(r.curve.items() for r in same)):
            points.setdefault(update, []).append(100 * accuracy)
        curves.append((SimpleNamespace(label=name, colour=colour, style=STYLES[0]), points))
    yield "jdcl-figure5", plot([("updates", "accuracy of task 1's images, %", curves)])


def figures(runs, out, device):
    """Draw all figures whose runs are there, for each dataset and what departs from its presets; return their names."""
    def family(r):
        if r.curve:  # JDCL's: one figure shows all with the same tasks, another those with few labels
            same = {key: key == "labels" or r.departs[key] for key in ("tasks", "class_order", "labels")
                    if key in r.departs}
        else:  # one figure shows all lambdas and teachers
            same = {key: value for key, value in r.departs.items() if key not in WEIGHTS + TEACHER}
        return r.dataset_name, run.run_name("", same, r.scale), bool(r.curve)

    made = []
    for (dataset, departs, classifies), some in sorted(group(runs, family).items()):
        drawn = jdcl_figures(some) if classifies else itertools.chain(
            curve_figures(some), sample_figures(some, device))
        for name, figure in drawn:
            if figure:
                about = ", ".join(filter(None, [some[0].dataset_title, departs[1:], figure.get_suptitle()]))
                figure.suptitle(about, size=12, weight="bold")
                made.append(f"{name}-{dataset}{departs}.png")
                run.replace(out / made[-1], lambda file: figure.savefig(file, format="png", dpi=100))
    return made


def main(argv=None):
    args = get_args(argv)
    if args.rows:
        lists, rows = ROWS | BEYOND, []
        for name in TABLES if args.rows == "all" else [args.rows]:
            listed = lists.get(f"{name} on {args.dataset}", lists[name])
            rows += [(row, TARGETS in listed and row not in ("joint", "finetune")) for row in listed.split(", ")]
        rows.sort(key=lambda row: not row[1])  # of a row in two tables the one with an accuracy counts
        for command in missing(rows, args.scale, args.dataset, args.seeds, find(args.folders)):
            print("python", shlex.join(command))
        return
    device, runs = run.pick_device(args.device), find(args.folders)
    if not runs:
        raise InputError(f"no run to report in {' or '.join(map(str, args.folders)) or 'runs or results'}: train one, "
                         "for example with python train_gd.py --scale laptop")
    out = args.out or args.folders[0]
    paths = [args.save / r.dataset_name / r.name / f"seed{r.seed}.json" for r in runs] if args.save else []
    for path in [out / "report.md", *paths]:
        run.check_writable(path)
    papers, ours = [*beside_the_papers(runs)], [*all_tables(runs)]
    text = INTRODUCTION + "\n".join(papers + ours if any(r.complete for r in runs) else ours + papers)
    print(text)
    for path, r in zip(paths, runs):
        run.write_json(path, r.record)
    made = figures(runs, out, device) if args.figures else []
    text += "".join(f"\n![{Path(name).stem}]({name})\n" for name in made)
    run.replace(out / "report.md", lambda file: file.write(text.encode()))
    print(f"written: {out / 'report.md'}" + f" and {len(made)} figures beside it" * bool(made), file=sys.stderr)


if __name__ == "__main__":
    run.main(main)
