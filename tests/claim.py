"""Do the papers' claims hold in miniature? Results at small scale on Fashion-MNIST, judged claim by claim.

    python tests/claim.py                by the files in results/
    python tests/claim.py --train        first train what they lack into runs/, for many hours; then by both

A claim is judged seed by seed, on the seeds that all its rows have. It holds if it is true with each of two or more
seeds, and FAILS (then the exit code is 1) if it is false with each. Else it is open. It is not run where a row is
missing.
"""

import argparse
import statistics
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import report  # noqa: E402


def few_labels(share, points, classes, order):
    """The claim that beside this share of the labels the images without label gain more than so many points."""
    every, labelled = (f"jdcl --labels {share}{only}{order}" for only in ("", " --labelled-only"))
    claim = f"{100 * share:g} % of the labels, tasks of {classes} classes: the others add more than {points} points"
    return claim, "average_accuracy", f"{every}, {labelled}", lambda v: v[every] - v[labelled] > points / 100


# Claim; metrics, of which the first is judged and the others are shown; rows as in report.ROWS; whether it is true, of
# the rows' values v with one seed.
CLAIMS = [
    ("GR collapses: its images are worse than finetuning's", "frd", "gr-2, finetune",
     lambda v: v["gr-2"] > v["finetune"]),
    ("GD, with one forward pass more than GR, is nearer to joint training than to finetuning and to GR", "frd, ms",
     "gd-2, joint, finetune, gr-2", lambda v: 2 * v["gd-2"] < v["joint"] + min(v["finetune"], v["gr-2"])),
    ("10 teacher steps in place of 2 lower GR's frd by a quarter or more", "frd", "gr-2, gr-10",
     lambda v: v["gr-10"] <= 0.75 * v["gr-2"]),
    ("they change GD's frd less than GR's", "frd", "gd-2, gd-10, gr-2, gr-10",
     lambda v: abs(v["gd-10"] - v["gd-2"]) < abs(v["gr-10"] - v["gr-2"])),
    ("distillation is better on noise than on current data", "frd", "noise, lwf", lambda v: v["noise"] < v["lwf"]),
    ("ER with 1000 images is level with GD, within a quarter", "frd", "er-1000, gd-2",
     lambda v: 0.8 < v["er-1000"] / v["gd-2"] < 1.25),
    ("accuracy falls in the order joint, GD, GR, finetuning", "acc",
     "classifier-joint, gd-2, gr-2, classifier-finetune",
     lambda v: v["classifier-joint"] > v["gd-2"] > v["gr-2"] > v["classifier-finetune"]),
    ("KLD rises in the order joint, GD, GR, finetuning", "kld, share_old", "joint, gd-2, gr-2, finetune",
     lambda v: v["joint"] < v["gd-2"] < v["gr-2"] < v["finetune"]),
    ("JDCL closes at least 85 % of the gap from finetuning to joint training", "average_accuracy",
     "jdcl-finetune, jdcl, jdcl-joint", lambda v: v["jdcl"] >= 0.15 * v["jdcl-finetune"] + 0.85 * v["jdcl-joint"]),
    *((f"JDCL is better than with --{flag}", "average_accuracy, average_forgetting", f"jdcl, jdcl --{flag}",
       lambda v, flag=flag: v["jdcl"] > v[f"jdcl --{flag}"]) for flag in ("no-kd", "one-stage", "separate")),
    *(few_labels(share, points, *tasks) for share, points in ((0.05, 0), (0.008, 2))
      for tasks in (("two", ""), ("five", report.FIVE))),
]


def train():
    """Run what `report.py --rows` would print for the rows of all claims."""
    rows = {}
    for _, metrics, names, _ in CLAIMS:
        for row in names.split(", "):
            rows[row] = rows.get(row, False) or metrics == "acc"
    runs = report.find([folder for folder in (Path("runs"), ROOT / "results") if folder.is_dir()])
    for script, *arguments in report.missing(rows.items(), "small", "fashion-mnist", [42, 69, 1714], runs):
        subprocess.run([sys.executable, str(ROOT / script), *arguments], check=True)


def collect(runs, metric, names):
    """{row: {seed: value}} of the seeds that all these rows have, measured in one way."""
    measured = [(r.place, r.seed, tuple(c for c in conditions if "pool" not in c), v)  # a target has no pool
                for r in runs if r.place in names
                for (name, task, conditions), v in r.values.items() if name == metric and task == r.done]
    usual, rows = statistics.mode([conditions for _, _, conditions, _ in measured] or [()]), {}
    for row, seed, conditions, v in measured:
        if conditions == usual:
            rows.setdefault(row, {})[seed] = v
    seeds = set.intersection(*map(set, rows.values())) if rows else ()
    return {row: {seed: rows[row][seed] for seed in sorted(seeds)} for row in names if row in rows and seeds}


def judge(runs):
    """Print a line for each claim; return how many fail."""
    runs = [r for r in runs if r.scale == "small" and r.column == "fashion-mnist" and r.done == r.tasks
            and "precision" not in r.departs]
    fails = 0
    for claim, metrics, names, true in CLAIMS:
        names = names.split(", ")
        found = {metric: collect(runs, metric, names) for metric in metrics.split(", ")}
        judged = next(iter(found.values()))
        if lacking := ", ".join(row for row in names if row not in judged):
            said, told = "not run", [f"no {next(iter(found))} of {lacking}"]
        else:
            votes = [true({row: judged[row][seed] for row in names}) for seed in judged[names[0]]]
            said = "open" if len(votes) < 2 else "holds" if all(votes) else "open" if any(votes) else "FAILS"
            told = [f"true with {sum(votes)} of {len(votes)} seeds"]
        for metric, rows in found.items():
            numbers = ["{} {:.4g} ± {:.2g} ({})".format(row, *report.mean_and_error([*v.values()]), len(v))
                       for row, v in rows.items()]
            told += [f"{metric} {', '.join(numbers)}"] * bool(numbers)
        print(f"{said}: {claim}; {'; '.join(told)}")
        fails += said == "FAILS"
    return fails


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--train", action="store_true", help="first train, evaluate and classify what is missing")
    args = parser.parse_args(argv)
    if args.train:
        train()
    return judge(report.find([Path("runs")] * args.train + [ROOT / "results"]))


if __name__ == "__main__":
    sys.exit(main() > 0)
