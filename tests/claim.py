"""Do the papers' claims hold in miniature? Results at small scale on Fashion-MNIST, judged claim by claim.

    python tests/claim.py                by the files in results/
    python tests/claim.py --train        first train what they lack into runs/, for many hours; then by both

A claim is about means over the seeds that all its rows have. It holds, FAILS (then the exit code is 1), or is not run
where a row is missing.
"""

import argparse
import statistics
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import report  # noqa: E402

# Claim; metrics, of which the first is judged and the others are shown; rows as in report.ROWS; whether it holds, of
# the rows' means m and standard errors e.
CLAIMS = [
    ("GR collapses: its images are worse than finetuning's", "frd", "gr-2, finetune",
     lambda m, e: m["gr-2"] > m["finetune"]),
    ("GD, with one forward more than GR, is near joint training: below half of finetuning's frd and of GR's", "frd, ms",
     "gd-2, joint, finetune, gr-2", lambda m, e: 2 * m["gd-2"] < min(m["finetune"], m["gr-2"])),
    ("10 teacher steps in place of 2 lower GR's frd by a quarter or more", "frd", "gr-2, gr-10",
     lambda m, e: m["gr-10"] <= 0.75 * m["gr-2"]),
    ("they change GD's frd less than GR's", "frd", "gd-2, gd-10, gr-2, gr-10",
     lambda m, e: abs(m["gd-10"] - m["gd-2"]) < abs(m["gr-10"] - m["gr-2"])),
    ("distillation is better on noise than on current data", "frd", "noise, lwf", lambda m, e: m["noise"] < m["lwf"]),
    # As the paper's FIDs are, 21.6 ± 0.9 and 23.5 ± 1.1. One seed has no standard error.
    ("ER with 1000 images is level with GD, no further apart than both standard errors together", "frd",
     "er-1000, gd-2", lambda m, e: abs(m["er-1000"] - m["gd-2"]) <= sum(e.values()) if all(e.values()) else None),
    ("accuracy falls in the order joint, GD, GR, finetuning", "acc",
     "classifier-joint, gd-2, gr-2, classifier-finetune",
     lambda m, e: m["classifier-joint"] > m["gd-2"] > m["gr-2"] > m["classifier-finetune"]),
    ("KLD rises in the order joint, GD, GR, finetuning", "kld, share_old", "joint, gd-2, gr-2, finetune",
     lambda m, e: m["joint"] < m["gd-2"] < m["gr-2"] < m["finetune"]),
    ("JDCL closes most of the gap from finetuning to joint training", "average_accuracy",
     "jdcl-finetune, jdcl, jdcl-joint", lambda m, e: 2 * m["jdcl"] > m["jdcl-finetune"] + m["jdcl-joint"]),
    *((f"JDCL is better than with --{flag}", "average_accuracy", f"jdcl, jdcl --{flag}",
       lambda m, e, flag=flag: m["jdcl"] > m[f"jdcl --{flag}"]) for flag in ("no-kd", "one-stage", "separate")),
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
    """{row: (mean, standard error, number of seeds)}, over the seeds that all these rows have, measured in one way."""
    measured = [(r.place, r.seed, tuple(c for c in conditions if "pool" not in c), v)  # a target has no pool
                for r in runs if r.place in names.split(", ")
                for (name, task, conditions), v in r.values.items() if name == metric and task == r.done]
    usual, rows = statistics.mode([conditions for _, _, conditions, _ in measured] or [()]), {}
    for row, seed, conditions, v in measured:
        if conditions == usual:
            rows.setdefault(row, {})[seed] = v
    seeds = set.intersection(*map(set, rows.values())) if rows else ()
    return {name: (*report.mean_and_error([rows[name][seed] for seed in sorted(seeds)]), len(seeds))
            for name in names.split(", ") if name in rows and seeds}


def judge(runs):
    """Print a line for each claim; return how many fail."""
    runs = [r for r in runs if r.scale == "small" and r.column == "fashion-mnist" and r.done == r.tasks
            and "precision" not in r.departs]
    fails = 0
    for claim, metrics, names, holds in CLAIMS:
        found = {metric: collect(runs, metric, names) for metric in metrics.split(", ")}
        judged = next(iter(found.values()))
        lacking = [name for name in names.split(", ") if name not in judged]
        outcome = None if lacking else holds(*({name: stats[i] for name, stats in judged.items()} for i in (0, 1)))
        fails += outcome is False
        said = "not run" if outcome is None else "holds" if outcome else "FAILS"
        told = [f"no {next(iter(found))} of {', '.join(lacking)}"] * bool(lacking)
        for metric, stats in found.items():
            numbers = [f"{name} {mean:.4g} ± {error:.2g} ({n})" for name, (mean, error, n) in stats.items()]
            told += [f"{metric} {', '.join(numbers)}"] * bool(numbers)
        print(f"{said}: {claim}; {'; '.join(told)}")
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
