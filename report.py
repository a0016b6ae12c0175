"""Tables and figures of runs, beside the papers' own numbers.

    mean ± standard error = s / sqrt(n),  s^2 = sum_i (v_i - mean)^2 / (n - 1),  over n seeds

Masip et al., "Continual Learning of Diffusion Models with Generative Distillation", arXiv 2311.14028: Tables 1, 2 and
B.1 to B.5, Figures 2 to 6 and B.1 to B.22. Skiers and Deja, "Joint Diffusion Models in Continual Learning" (JDCL),
arXiv 2411.08224: its tables at second hand, Figures 4 and 5.

    python report.py runs/                       tables to stdout and runs/report.md, figures to runs/*.png
    python report.py runs/ --save results/       besides, a small JSON file of each run, to be committed
    python report.py results/                    the same tables from those files alone

All that is asked of a run stands in its folder, so a new method needs no line here. Complete runs alone stand beside
the paper's values: at the paper's scale, after all tasks, with at least the preset's updates. Values are averaged over
seeds; other settings and other protocols have lines of their own.
"""

import argparse
import collections
import csv
import io
import itertools
import json
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
from PIL import Image
from torchvision.utils import make_grid

import run
from data import DATASETS, quantize
from ddim import alpha_bar, ddpm_sample, reseed, sample
from run import InputError
from unet import NETS, UNet

# The values as the papers print them, mean ± standard error (ms: standard deviation), – where there is none; of two
# tables the one with more digits. A row begins with the base of its runs and their flags, a column's head has dataset,
# flags and metric. The paper's main tables have gr-2 and gd-2 of Fashion-MNIST, gr-10 and gd-10 of CIFAR-10. JDCL's
# values are from a third party's notes of arXiv 2411.08224.
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

JDCL, second-hand values | Method | cifar10 --tasks 5 average_accuracy | cifar100 --tasks 5 average_accuracy | \
cifar100 --tasks 10 average_accuracy | imagenet100 --tasks 5 average_accuracy
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
COMMANDS = {  # what trains the bases in PAPER
    "joint": "train_gr.py --replay all", "finetune": "train_gr.py --replay none",
    **{f"er-{n}": f"train_gr.py --replay buffer --buffer-size {n}" for n in (10, 100, 1000)},
    **{f"gr-{n}": f"train_gr.py --teacher-steps {n}" for n in (2, 10, 100)},
    **{f"gd-{n}": f"train_gd.py --teacher-steps {n}" for n in (2, 10, 100)},
    "lwf": "train_gd.py --distill current", "noise": "train_gd.py --distill noise",
    "classifier-joint": "train_classifier.py --replay all", "classifier-finetune": "train_classifier.py --replay none",
    "jdcl": "train_jdcl.py", "jdcl-joint": "train_jdcl.py --replay all",
}
INTRODUCTION = """# Results

Ours are mean ± standard error (sample standard deviation / √n) over n seeds, and (n). A dash was not measured, or is
not in the paper. Different protocols and labellers have lines of their own; beside the paper's values stands what is
not as in the paper. A command trains the row's first value with seed 42; the paper's others are `--seed 69` and
`--seed 1714`. After it come `python eval_fid.py RUN` and, for ACC, `python train_classifier.py RUN` (the paper's ACC:
`--replay-loss reversed`).

ms are means over the last 1000 updates; the paper's are ± standard deviation, of a GeForce 1080 Ti. Parameters are all
that a method holds while it trains. frd is the Frechet distance of another network's features, and not FID. Accuracy is
the mean over tasks. Shortened runs compare with nothing in the paper. JDCL's values are from a third party's notes and
unverified, but for 83.69 and 64.47, which a second source has too; ? is unknown.

"""
METRICS = {  # header and decimals; beside the papers' values ours have as many decimals as they
    "average_accuracy": ("↑ accuracy, %", 2), "average_forgetting": ("↓ forgetting, %", 2),
    "fid": ("↓ FID", 1), "frd": ("↓ frd", 1), "kld": ("↓ KLD", 2), "share_old": ("↑ old classes, %", 1),
    "acc": ("↑ ACC", 2), "ms": ("↓ ms per update", 1), "parameters": ("parameters", 0), "seconds": ("seconds", 0),
    "peak_memory_mb": ("peak memory, MB", 0),
}
# The methods in the order of tables and figures, with their colours. Any other comes after them, in a spare colour.
COLOURS = {"joint": "black", "finetune": "0.6", "er": "tab:olive", "gr": "tab:red", "gd": "tab:blue",
           "lwf": "tab:green", "noise": "tab:purple"}
SPARE = "tab:orange tab:brown tab:pink tab:cyan gold navy lime teal salmon orchid".split()
STRIPS = "joint finetune gr-2 gd-2 gr-10 gd-10 gr-100 gd-100 lwf noise"  # Figures B.3 to B.12; CIFAR-10 B.13 to B.22


# ------------------------------ arguments

def get_args(argv=None):
    parser = run.parser(__doc__, __file__)
    add = parser.add_argument
    add("folders", nargs="+", type=Path, metavar="FOLDER", help="searched for run folders and files of --save")
    add("--out", type=Path, help="folder of report.md and of the figures (default: the first FOLDER)")
    add("--save", type=Path, metavar="RESULTS", help="write RESULTS/<dataset>/<name>/seed<seed>.json of every run")
    add("--csv", type=Path, metavar="PATH", help="write a row per run, task and metric")
    add("--figures", action=argparse.BooleanOptionalAction, default=True, help="draw them (default: yes)")
    add("--device", default="auto", help="for Figure B.1, which a model draws: auto, cpu, mps, cuda or cuda:<i>")
    return parser.parse_args(argv)


# ------------------------------ reading

def complain(where, what):
    print(f"{where}: {what}", file=sys.stderr)


def parse_metrics(text):
    """Of metrics.jsonl seconds, peak memory, ms of each task (mean over its last 1000 updates), and a curve where the
    model classifies: [[task, update, accuracy of task 1's images], ...].
    """
    whole, speed, curve = text.rpartition("\n")[0], [], []  # a kill may cut the last line short
    records = [json.loads(line) for line in whole.splitlines()]
    for task, some in itertools.groupby(records, key=lambda r: r["task"]):
        update, ms = np.array([(r["update"], r["ms_per_update"]) for r in some]).T
        weights = np.diff(update, prepend=0) * (update > update[-1] - 1000)  # a record is of all updates since the last
        speed.append(dict(task=task, updates=int(update[-1]), mean=round(np.average(ms, weights=weights), 3)))
    for r in records:
        accuracy = r.get("accuracy" if r["task"] == 1 else "accuracy_task1")
        curve += [[r["task"], r["update"], accuracy]] if accuracy is not None else []
    return dict(seconds=records[-1]["seconds"] if records else None, ms_per_update=speed, curve=curve,
                peak_memory_mb=max((r["peak_memory_mb"] or 0 for r in records), default=0) or None)


def machine(device):
    """What this machine calls its CUDA device, or else its processor."""
    if device != "cpu" and torch.cuda.is_available():
        return torch.cuda.get_device_name()
    info = Path("/proc/cpuinfo")
    found = re.search(r"model name\s*: (.+)", info.read_text(encoding="utf-8")) if info.exists() else None
    return found[1] if found else platform.processor() or platform.machine()


def commit():
    """The commit that this file is of, with -dirty if a file in git differs from it; None outside a repository."""
    command = "git describe --always --dirty --exclude=* --abbrev=40".split()
    try:
        return subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True).stdout.strip() or None
    except OSError:  # there is no git
        return None


def read_folder(folder):
    """What --save writes, of a run folder or of one that holds a classifier alone."""
    record = dict(config=None, eval=[], classifier=None, accuracy=None, metrics={})
    for key in record:
        path = folder / (f"{key}.jsonl" if key == "metrics" else f"{key}.json")
        try:
            if path.exists():
                record[key] = (parse_metrics if key == "metrics" else json.loads)(path.read_text(encoding="utf-8"))
        except (OSError, ValueError, KeyError, TypeError) as error:
            complain(path, f"damaged, the rest of the folder goes without it ({error})")
    c, classifier, accuracy = record["config"], record["classifier"], record["accuracy"]
    if (folder / "config.json").exists():
        done = [k for k in range(1, 1 + len(c["class_tasks"])) if (folder / f"task{k}.pt").exists()]
        done += [e["task"] for e in record["eval"]] + ([len(accuracy["matrix"])] if accuracy else [])
    else:
        record["metrics"], done = dict(seconds=sum(classifier["seconds"])), [len(classifier["accuracy"])]
    return dict(record, tasks_done=max(done, default=0), device=machine((c or classifier)["device"]))


def list_values(record, c):
    """Yield all that was measured of a run with config `c`, one by one: metric, task, value, conditions.

    The conditions are texts such as "n 2000" or "bf16": how the value was measured, where that is not as in the paper.
    Only values with the same conditions may be averaged. An empty text says nothing.
    """
    done, metrics, classifier = record["tasks_done"], record["metrics"], record["classifier"]
    precision = c["precision"] if c.get("precision", "fp32") != "fp32" else ""
    for e in record["eval"]:
        p, fid = e["protocol"], e["protocol"]["fid"] or {"name": "tf1"}
        unlike = [precision, f"n {p['n']}" * (p["n"] != 10000),
                  f"{p['steps']} steps" * (p["steps"] != c["sample_steps"])]
        yield "fid", e["task"], e["fid"], [*unlike, fid["name"] * (fid["name"] != "tf1")]
        for metric in ("frd", "kld", "share_old"):
            yield metric, e["task"], e[metric], [*unlike, f"labeller {p['frd']['sha256'][:12]}"]
    if classifier:
        p = classifier["protocol"]
        unlike = [precision, f"updates {p['updates']}" * (p["updates"] != classifier["preset_updates"]),
                  f"{p.get('steps')} steps" * (p.get("steps") != c.get("sample_steps")),
                  "reversed loss" * (p.get("replay_loss") == "reversed")]
        for task, value in enumerate(classifier["accuracy"], 1):
            yield "acc", task, value, unlike
    for s in metrics.get("ms_per_update", []):
        yield "ms", s["task"], s["mean"], [precision, record["device"]]
    for metric in ("seconds", "peak_memory_mb"):
        yield metric, done, metrics.get(metric), [precision, record["device"]]
    for metric in ("average_accuracy", "average_forgetting") if record["accuracy"] else ():
        yield metric, done, record["accuracy"][metric], [precision]
    yield "parameters", done, c.get("parameters"), []


def make_run(record, c):
    """A run as an object: its config `c` as attributes, and besides

    values      all that was measured, {(metric, task, conditions): value}, see list_values
    done        its tasks; progress: its updates, as a text; complete: whether it may stand beside the paper's values
    place       its row of PAPER; columns: how the heads of its columns of PAPER begin
    row         sorts the tables; runs with the same row are averaged
    label       what figures call it; heads: what they call its tasks; usual: whether the main figures show it
    count       its teacher steps or buffer size, else 0

    Of a model that classifies (JDCL), else empty: matrix, the accuracy [after task][of task]; curve, {update: accuracy
    of task 1's images}; logits, {"real" or "replayed": (shares, edges)}, the histogram of the largest logits.
    """
    r, accuracy, speed = SimpleNamespace(**c), record["accuracy"], record["metrics"].get("ms_per_update", [])
    r.record, r.seed, r.done, r.tasks = record, int(r.seed), record["tasks_done"], len(r.class_tasks)
    r.values = {(metric, int(task), tuple(filter(None, conditions))): float(value)
                for metric, task, value, conditions in list_values(record, c) if value is not None}
    r.dataset_title = DATASETS[r.dataset].title if r.dataset in DATASETS else r.dataset_name
    r.command = re.sub(r"\S*/(train_\w+\.py)", r"\1", r.command)
    preset, updates_done = c.get("preset_updates") or [], sum(s["updates"] for s in speed) or sum(r.updates[:r.done])
    r.progress = f"{updates_done:,}" + (f" of {sum(preset):,}" if preset else "")
    r.complete = r.scale == "paper" and 0 < r.done == r.tasks == len(r.updates) == len(preset) and all(
        u >= p for u, p in zip(r.updates, preset))

    r.matrix = [[float(v) for v in row] for row in accuracy["matrix"]] if accuracy else []
    begin = [0, *itertools.accumulate(r.updates)]
    r.curve = {begin[task - 1] + update: float(v) for task, update, v in record["metrics"].get("curve", [])}
    r.curve |= {begin[k]: row[0] for k, row in enumerate(r.matrix, 1)}
    r.logits, replay = {}, accuracy["tasks"][-1]["replay"] if accuracy else None
    for kind in ("real", "replayed") if replay else ():
        counts, edges = replay["logits"][kind]["counts"], replay["logits"]["edges"]
        r.logits[kind] = np.divide(counts, sum(counts)), np.reshape(edges, len(counts) + 1)

    r.heads = [f"task {k}\n" + ", ".join(r.class_names[i] for i in ids) for k, ids in enumerate(r.class_tasks, 1)]
    steps, images, known = c.get("teacher_steps"), c.get("buffer_size"), list(COLOURS)
    r.count, r.usual = int(steps or images or 0), steps == c.get("preset", {}).get("teacher_steps", steps)
    r.label = r.name if r.curve else r.title + (f", {steps} steps" if steps else f", {images} images" if images else "")
    r.row = (known.index(r.method) if r.method in known else len(known), r.method, r.count, r.base, len(r.departs),
             json.dumps(r.departs), r.done, updates_done, c.get("script", ""))
    r.place = r.base + "".join(f" --{key.replace('_', '-')}" + f" {value}" * (value is not True)
                               for key, value in r.departs.items() if key not in ("precision", "tasks"))
    if c.get("script") not in (None, COMMANDS.get(r.base, "").partition(" ")[0]):
        r.place = None  # of a copy of a script, whatever it calls its method
    r.columns = [f"{r.dataset} --tasks {r.tasks}"] + [r.dataset] * ("tasks" not in r.departs)
    return r


def read(path):
    """The run of a run folder or of a file of --save; None and a sentence on stderr if it is damaged or old."""
    try:
        record = read_folder(path) if path.is_dir() else json.loads(path.read_text(encoding="utf-8"))
        c = record["config"] or record["classifier"]["protocol"] | record["classifier"]
        if "dataset_name" not in c:
            return complain(path, f"made by an older version: run it again with {c['command']}")
        r = make_run(record, c)
        r.folder = path if path.is_dir() else None
        return r
    except (OSError, ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
        return complain(path, f"damaged and left out ({type(error).__name__}: {error})")


def find(folders):
    """All runs in and below the folders, in the order of the tables; of two with one name and seed the first."""
    found, spare = {}, {}
    for folder in folders:
        if not folder.is_dir():
            raise InputError(f"there is no folder {folder}: give the one with the runs, usually runs/")
        inside = {path.parent for name in ("config.json", "classifier.json") for path in folder.rglob(name)}
        for path in [*sorted(inside), *sorted(folder.rglob("seed*.json"))]:
            r = read(path)
            if r and found.setdefault((r.dataset_name, r.name, r.seed), r) is not r:
                complain(path, f"left out, {r.name} with seed {r.seed} was read from another place")
    if not found:
        raise InputError(f"no run to report in {' or '.join(map(str, folders))}: train one, for example with "
                         "python train_gd.py --scale laptop")
    runs = sorted(found.values(), key=lambda r: (r.dataset_name, r.row, r.scale, r.seed))
    for r in runs:
        r.colour = COLOURS.get(r.method) or spare.setdefault(r.label, SPARE[len(spare) % len(SPARE)])
    return runs


# ------------------------------ tables

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


def cells(runs, metric, digits, in_paper):
    """["23.5 ± 1.1 (3), n 2000", ...] after the runs' last tasks, one for each list of conditions."""
    found, texts = values(runs, metric), []
    for conditions, v in sorted(found.items(), key=lambda item: (len(item[0]), item)):  # the paper's first
        mean, error = (100 * x if "%" in METRICS[metric][0] else x for x in mean_and_error(v))
        error = f" ± {error:.{digits}f}" * (len(v) > 1) + f" ({len(v)})"
        text = f"{mean:,.{digits}f}" + error * (metric != "parameters")
        texts.append(", ".join([text, *(said for said in conditions if len(found) > 1 or (
            in_paper and not said.startswith("labeller")))]))
    return texts or ["–"]


def markdown(title, head, rows):
    """A Markdown table, straight in a terminal too; each row is a list of columns that begin on the same line."""
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
                    some = [r for r in runs if r.complete and r.place == place and column in r.columns]
                    cell += cells(some, metric, digits, in_paper=True)
                    base = place.split()[0]
                    command = command or f"`python {COMMANDS[base]}{place[len(base):]} --dataset {column}`"
            kinds = ["paper"] + ["ours"] * (max(map(len, columns)) - 1)
            table.append([[strategy], kinds, *columns, [command]])
        heads = [f"{column} {METRICS[metric][0]}" for column, metric in asked]
        yield markdown(title, [first, "", *heads, "command"], table)


def all_tables(runs):
    """All metrics of complete, and of shortened runs: a table for each dataset, scale, size and number of tasks."""
    def section(r):
        about = f"{r.dataset_title}, {r.scale} scale, {r.image_size}x{r.image_size}, {r.tasks} tasks"
        return ("Complete: " if r.complete else "Shortened: ") + about + ", with a classifier" * bool(r.curve)

    runs = sorted(runs, key=lambda r: (section(r), r.row))
    for title, some in itertools.groupby(runs, key=section):
        rows = [list(same) for _, same in itertools.groupby(some, key=lambda r: r.row)]
        metrics, table = [m for m in METRICS if any(values(same, m) for same in rows)], []
        by_task = ["↑ accuracy by task, %"] * title.endswith("classifier")
        for r, *more in rows:
            matrices, typed = [x.matrix for x in (r, *more) if x.matrix], re.sub(r" --seed[= ]\S+", "", r.command)
            last = " ".join(f"{100 * statistics.fmean(v):.1f}" for v in zip(*(matrix[-1] for matrix in matrices)))
            table.append([[r.title], [f"`{r.name}`"], [f"{r.done} of {r.tasks}"], *[[last or "–"] for _ in by_task],
                          *(cells([r, *more], m, METRICS[m][1], in_paper=False) for m in metrics),
                          [r.progress], [f"`{typed}`"]])
        heads = ["Strategy", "name", "tasks", *by_task, *(METRICS[m][0] for m in metrics)]
        yield markdown(title, [*heads, "updates of the preset's", "command"], table)


def save_csv(path, runs):
    text = io.StringIO()
    out = csv.writer(text)
    out.writerow("dataset name method seed scale complete task metric value protocol command".split())
    out.writerows([r.dataset, r.name, r.method, r.seed, r.scale, r.complete, task, metric, value,
                   ", ".join(conditions), r.command]
                  for r in runs for (metric, task, conditions), value in r.values.items())
    run.replace(path, lambda file: file.write(text.getvalue().encode()))


# ------------------------------ figures

def plot(panels):
    """Curves with error bars and one legend, None without curves. A panel is (x label, y label, curves); a curve is
    (a run, x, means, errors), or None.
    """
    figure, handles = Figure(figsize=(3.6 * len(panels) + 2.6, 3.2), layout="constrained"), {}
    for i, (x_label, y_label, curves) in enumerate(panels, 1):
        axes = figure.add_subplot(1, len(panels), i, xlabel=x_label, ylabel=y_label)
        for r, x, means, errors in filter(None, curves):
            style = {10: "s--", 100: "^:", 1000: "D-."}.get(r.count, "o-") if len(x) < 20 else "-"
            label = textwrap.fill(r.label, 40)
            handles[label] = axes.errorbar(x, means, errors, fmt=style, color=r.colour, markersize=4, capsize=3,
                                           errorevery=max(1, len(x) // 20))
        axes.set(ylim=(0, None), xlim=(None if x_label == "task" else 0, None))
        axes.xaxis.set_major_locator(MaxNLocator(6, integer=x_label == "task"))
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.25)
    figure.legend(handles.values(), handles, loc="outside right center", frameon=False, fontsize=9)
    return figure if handles else None


def grid(title, heads, rows):
    """A picture of rows {label: [pixels (h, w, 3) or None, ...]}, None if all are empty."""
    rows = {label: line for label, line in rows.items() if any(pixels is not None for pixels in line)}
    if not rows:
        return None
    figure = Figure(figsize=(1.6 + 2.8 * len(heads), 1 + 2.9 * len(rows)), layout="constrained")
    for axes, (label, line) in zip(figure.subplots(len(rows), len(heads), squeeze=False), rows.items()):
        axes[0].set_ylabel(textwrap.fill(label, 16), rotation=0, ha="right", va="center", size=11)
        for cell, pixels in zip(axes, line):
            cell.set(xticks=[], yticks=[])
            cell.spines[:].set_visible(False)
            if pixels is not None:
                cell.imshow(pixels, interpolation="nearest")
    for cell, text in zip(figure.axes, heads):
        lines = [textwrap.fill(line, 36, max_lines=4) for line in text.split("\n")]
        cell.set_title("\n".join(lines), size=11, loc="left")
    figure.suptitle(title)
    return figure


def samples(r, k):
    """16 of the 64 images of samples/task<k>.png, from the same noises in every run: (h, w, 3), or None without."""
    path, n = r.folder / "samples" / f"task{k}.png", 8 * (r.image_size + 1) + 2
    try:
        return np.asarray(Image.open(path).convert("RGB"))[:n, :n]
    except FileNotFoundError:
        return None
    except (OSError, SyntaxError) as error:
        return complain(path, f"damaged and left out of the figures ({error})")


def draw(r, device):
    """16 images from the same noises by the run's last model, with 2, 10 and 100 DDIM steps and with DDPM."""
    path = r.folder / f"task{r.tasks}.pt"
    try:
        model, abar = UNet(**NETS[r.unet]), alpha_bar(r.schedule).to(device)
        run.load_weights(model, path)
    except (ValueError, KeyError) as error:
        complain("Figure B.1 is left out", error)
        return [None]
    reseed("grid")
    x_T = torch.randn(64, model.in_channels, r.image_size, r.image_size)[:16].to(device)
    drawn = [sample(model.to(device), x_T, abar, steps) for steps in (2, 10, 100)] + [ddpm_sample(model, x_T, abar)]
    return [make_grid(quantize(x_0).cpu(), nrow=4, padding=1).permute(1, 2, 0).numpy() for x_0 in drawn]


def commonest(runs, metric):
    """(metric, conditions) with the conditions of most of its values; None where there are none."""
    found = collections.Counter(conditions for r in runs for name, _, conditions in r.values if name == metric)
    return (metric, found.most_common(1)[0][0]) if found else None


def curve(points, metric, conditions):
    """A curve of `plot` through points (x, runs, task), task None for the last; None where there are no values."""
    found = [(runs[0], x, *mean_and_error(v)) for x, runs, task in points
             if (v := values(runs, metric, task).get(conditions))]
    return (found[0][0], *list(zip(*found))[1:]) if found else None


def usual(bases, *methods):
    """The bases of these methods with the preset's teacher steps: what the main figures show."""
    return [base for base, (r, *_) in bases.items() if r.method in methods and r.usual]


def curve_figures(bases, sweeps):
    """(name, figure): quality over tasks, over lambda, and over the minutes of training."""
    runs = sum([*bases.values(), *sweeps.values()], [])
    fid, frd, kld, time = (commonest(runs, metric) for metric in ("fid", "frd", "kld", "seconds"))
    quality = fid or frd
    if not quality or not time:
        return
    header, tasks = METRICS[quality[0]][0], range(1, 1 + runs[0].tasks)
    for name, shown in ("figure4", usual(bases, "joint", "finetune", "gr", "gd")), ("figureB2", bases):
        panels = [("task", METRICS[metric][0], [curve([(k, bases[base], k) for k in tasks], metric, conditions)
                                                for base in shown])
                  for metric, conditions in (quality, kld)]
        yield name, plot(panels)

    panels = []
    for base in sweeps:
        same = [r for r in runs if r.base == base]
        points = [(lam, [r for r in same if r.lam == lam], None) for lam in sorted({r.lam for r in same})]
        panels.append(("λ", header, [curve(points, *quality)]))
    yield "lambda", plot(panels)

    trained = [(values(same, "seconds").get(time[1]), same) for same in bases.values()]
    curves = [curve([(statistics.fmean(seconds) / 60, same, None)], *quality) for seconds, same in trained if seconds]
    yield "time", plot([("minutes of training, " + ", ".join(time[1]), header, curves)])


def sample_figures(bases, device):
    """(name, figure): samples of one seed, the one that most runs have."""
    there = [r for same in bases.values() for r in same if r.folder and (r.folder / "samples").is_dir()]
    if not there:
        return
    seed = statistics.mode(sorted(r.seed for r in there))
    shown = {r.base: r for r in there if r.seed == seed}
    first = next(iter(shown.values()))
    plans = {"figure2": usual(bases, "gr"), "figure3": shown, "figure6": usual(bases, "gr", "gd", "lwf", "noise")}
    plans |= {f"figureB{i}": [base] for i, base in enumerate(STRIPS.split(), 13 if first.dataset == "cifar10" else 3)}
    for name, wanted in plans.items():
        rows = {shown[base].label: [samples(shown[base], k) for k in range(1, 1 + first.tasks)]
                for base in wanted if base in shown}
        yield name, grid(f"seed {seed}, after each task", first.heads, rows)

    last, rows = f"seed {seed}, after the last task", {}
    replaying = [r for r in shown.values() if r.method in ("gr", "gd")]
    steps = sorted({r.count for r in replaying})
    for r in replaying:
        rows.setdefault(r.title, [None] * len(steps))[steps.index(r.count)] = samples(r, r.tasks)
    if len(steps) > 1:
        yield "figure5", grid(last, [f"{n} teacher steps" for n in steps], rows)
    rows = {r.label: draw(r, device) for r in shown.values() if r.method == "joint" and r.done == r.tasks}
    yield "figureB1", grid(last, ["2 DDIM steps", "10 DDIM steps", "100 DDIM steps", "1000 DDPM steps"], rows)


def jdcl_figures(runs):
    """(name, figure): JDCL's Figure 4, the largest logits of real and of replayed images, of a joint and of a separate
    classifier; and its Figure 5, the accuracy of the first task's images over all updates.
    """
    shown = {r.name: r for r in runs[::-1] if r.logits and set(r.departs) <= {"separate", "precision"}}
    figure = Figure(figsize=(0.1 + 3.8 * len(shown), 3.4), layout="constrained")
    for i, r in enumerate(sorted(shown.values(), key=lambda r: r.row), 1):
        axes = figure.add_subplot(1, len(shown), i, xlabel="largest logit", ylabel="share of the images")
        for kind, (shares, edges) in r.logits.items():
            axes.stairs(shares, edges, fill=True, alpha=0.5, label=kind)
        axes.set_title(f"{r.name}, seed {r.seed}, task {r.done}", size=10)
        axes.legend(frameon=False, fontsize=8)
    yield "jdcl-figure4", figure if shown else None

    curves = []
    for _, same in itertools.groupby(runs, key=lambda r: r.name):
        same = list(same)
        x = sorted(set().union(*(r.curve for r in same)))
        stats = [mean_and_error([100 * r.curve[u] for r in same if u in r.curve]) for u in x]
        curves.append((same[0], x, *zip(*stats)))
    yield "jdcl-figure5", plot([("updates", "accuracy of task 1's images, %", curves)])


def figures(runs, out, device):
    """Draw all figures whose runs are there, for each dataset and what departs from its presets; return their names."""
    def family(r):
        scale, lam = f"-{r.scale}" * (r.scale != "paper"), f"-lam{r.departs.get('lam')}"
        return r.dataset_name, scale if r.curve else r.name.removeprefix(r.base).replace(lam, ""), bool(r.curve)

    made = []
    for (dataset, departs, classifies), some in itertools.groupby(sorted(runs, key=family), key=family):
        some, bases, sweeps = list(some), {}, {}
        for r in some:
            (sweeps if "lam" in r.departs else bases).setdefault(r.base, []).append(r)
        drawn = jdcl_figures(some) if classifies else itertools.chain(
            curve_figures(bases, sweeps), sample_figures(bases, device))
        for name, figure in drawn:
            if figure:
                about = ", ".join(filter(None, [some[0].dataset_title, departs[1:], figure.get_suptitle()]))
                figure.suptitle(about, size=12, weight="bold")
                made.append(f"{name}-{dataset}{departs}.png")
                run.replace(out / made[-1], lambda file: figure.savefig(file, format="png", dpi=100))
    return made


# ------------------------------ main

def main(argv=None):
    args = get_args(argv)
    device, runs, out = run.pick_device(args.device), find(args.folders), args.out or args.folders[0]
    paths = [args.save / r.dataset_name / r.name / f"seed{r.seed}.json" for r in runs] if args.save else []
    for path in [out / "report.md", *paths] + [args.csv] * bool(args.csv):
        run.check_writable(path)
    papers, ours = [*beside_the_papers(runs)], [*all_tables(runs)]
    text = INTRODUCTION + "\n".join(papers + ours if any(r.complete for r in runs) else ours + papers)
    print(text)
    for path, r in zip(paths, runs):
        run.write_json(path, {"commit": commit()} | r.record)  # what was saved before keeps its own
    if args.csv:
        save_csv(args.csv, runs)
    made = figures(runs, out, device) if args.figures else []
    text += "".join(f"\n![{Path(name).stem}]({name})\n" for name in made)
    run.replace(out / "report.md", lambda file: file.write(text.encode()))
    print(f"written: {out / 'report.md'}" + f" and {len(made)} figures beside it" * bool(made), file=sys.stderr)


if __name__ == "__main__":
    run.main(main)
