"""Tables and figures of made-up runs with known means, and of real ones."""

import itertools
import json
import re
import shlex
import shutil
from types import SimpleNamespace

import claim
import numpy as np
import pytest
import torch
from conftest import write_pictures
from PIL import Image

import data
import report
import run
import train_classifier
import train_gd
import train_gr
import train_jdcl
from unet import NETS, UNet

SEEDS = (42, 69, 1714)
HASH = "0123456789abcdef" * 4
TITLES = {"joint": "Joint", "finetune": "Finetune", "er": "Experience replay", "jdcl-joint": "Continual Joint",
          "gd": "Generative distillation", "classifier-finetune": "Finetune (classifier)", "jdcl": "JDCL"}
MAIN, JDCL = "Tables 1, 2 and B.2 to B.5", "JDCL, second-hand values"
FM_FID, FM_KLD, FM_ACC = "fashion-mnist ↓ FID", "fashion-mnist ↓ KLD", "fashion-mnist ↑ ACC"
C10_FID = "cifar10 ↓ FID"
COMPLETE = "Complete: Fashion-MNIST, paper scale, 32x32, 5 tasks"
SHORTENED = "Shortened: Fashion-MNIST, paper scale, 32x32, 5 tasks"


def write(path, value):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(value if isinstance(value, str) else json.dumps(value), encoding="utf-8")


def make_config(base, seed=42, dataset="fashion-mnist", scale="paper", departs=None, tasks=5, per_task=100, method=None,
                title=None, image_size=None, **more):
    """What a train script writes into config.json; gd-2 is the method gd with two teacher steps."""
    departs, count = departs or {}, re.fullmatch(r"(\w+)-(\d+)", base)
    method = method or (count[1] if count else base)
    info = data.DATASETS[dataset]
    name = run.run_name(base, departs, scale)
    config = dict(
        name=name, base=base, method=method, title=title or TITLES.get(method, method), departs=departs,
        dataset=dataset, dataset_name=dataset, scale=scale, seed=seed, tasks=tasks, class_names=info.classes,
        image_size=image_size or (32 if scale == "paper" else 16), updates=[per_task] * tasks,
        class_tasks=[[2 * k, 2 * k + 1] for k in range(tasks)], preset_updates=[100] * tasks, parameters=1234567,
        precision="fp32", sample_steps=10, preset={"teacher_steps": None}, lam=departs.get("lam", 0.75), device="cpu",
        unet="laptop", schedule="zero-snr", command=f"python /home/me/train_{method}.py --seed {seed}")
    if count and method == "er":
        config.update(buffer_size=int(count[2]))
    elif count:
        config.update(teacher_steps=int(count[2]), preset={"teacher_steps": 2})
    return config | more


def make(root, base, seed=42, done=None, fid=None, kld=1.0, frd=100.0, acc=None, ms=(100, 110), labeller=HASH, n=10000,
         protocol="tf1", steps=10, memory=800, classifier=None, **config):
    """A run folder with these results after its last task, whatever the models are; the folder."""
    c = make_config(base, seed, **config)
    folder = root / c["dataset"] / c["name"] / f"seed{seed}"
    done, records, lines = c["tasks"] if done is None else done, [], []
    for k in range(1, done + 1):
        last = k == done
        records.append(dict(
            task=k, fid=None if fid is None else float(fid if last else 5), frd=frd if last else 50.0,
            kld=kld if last else 0.1, share_old=0.25 if k > 1 else None,
            protocol=dict(n=n, n_real=2000 * k, seed=seed, steps=steps, checkpoint=f"{k}{seed}",
                          frd=dict(sha256=labeller), fid=fid and dict(name=protocol))))
        for i, u in enumerate(range(50, c["updates"][k - 1] + 1, 50)):
            lines.append(dict(task=k, update=u, ms_per_update=ms[i % 2] if last else 7, peak_memory_mb=memory,
                              seconds=float(10 * (len(lines) + 1))))
    write(folder / "config.json", c)
    write(folder / "eval.json", records)
    write(folder / "metrics.jsonl", "".join(json.dumps(line) + "\n" for line in lines))
    if acc is not None:
        write(folder / "classifier.json", make_classifier(c, acc, **classifier or {}))
    return folder


def make_classifier(c, acc, **protocol):
    """What train_classifier.py writes of a run, or with `replay` of a target."""
    protocol = dict(class_tasks=c["class_tasks"], seed=c["seed"], updates=[50] * 5, replay="generated", steps=10,
                    replay_loss="paper", image_size=32, generators=[c["seed"]]) | protocol
    keys = "name title base method departs dataset dataset_name scale seed class_names device command"
    return dict(accuracy=[0.99, 0.95, 0.9, 0.85, acc], protocol=protocol, preset_updates=[50] * 5, seconds=[2.0] * 5,
                **{key: c[key] for key in keys.split()})


def make_target(root, acc, seed=42, base="classifier-finetune", **config):
    c = make_config(base, seed, **config)
    found = make_classifier(c, acc, replay="none")
    del found["protocol"]["steps"], found["protocol"]["replay_loss"]
    write(root / "fashion-mnist" / c["name"] / f"seed{seed}" / "classifier.json", found)


def make_jdcl(root, base="jdcl", seed=42, final=0.8, done=None, dataset="cifar10", **config):
    """A run whose model classifies: a task's images are right at 0.9 until after the last task, then at `final`, those
    of the first at 0.01 more, of the second at 0.01 less."""
    c = make_config(base, seed, dataset, **config)
    folder, tasks = root / dataset / c["name"] / f"seed{seed}", c["tasks"]
    matrix = [[0.9] * k for k in range(1, tasks)] + [[final + {0: 0.01, 1: -0.01}.get(j, 0) for j in range(tasks)]]
    matrix, lines = matrix[:done], []
    logits = dict(edges=[0.5 * i for i in range(41)], real=dict(counts=[2] * 40), replayed=dict(counts=[0] * 39 + [4]))
    for k in range(1, len(matrix) + 1):
        for u, value in ((50, 0.6), (100, matrix[k - 1][0])):
            lines.append(dict(task=k, update=u, ms_per_update=9, peak_memory_mb=None, seconds=1.0,
                              **(dict(accuracy=0.7, accuracy_task1=value) if k > 1 else dict(accuracy=value))))
    write(folder / "config.json", c)
    write(folder / "metrics.jsonl", "".join(json.dumps(line) + "\n" for line in lines))
    write(folder / "accuracy.json", dict(
        matrix=matrix, average_accuracy=float(np.mean(matrix[-1])), average_forgetting=0.9 - final,
        tasks=[dict(task=k + 1, replay=dict(logits=logits) if k else None) for k in range(len(matrix))]))
    return folder


def column(text, title, header, *first):
    """The cells under `header` of the row that begins with these cells."""
    block = text.split(f"## {title}\n\n")[1].split("\n\n")[0]
    head, _, *lines = [[cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in block.splitlines()]
    begin = next(i for i, line in enumerate(lines) if line[:len(first)] == list(first))
    rest = itertools.takewhile(lambda line: not line[0], lines[begin + 1:])
    return [line[head.index(header)] for line in [lines[begin], *rest]]


def text_of(*folders):
    runs = report.find(list(folders))
    return "\n".join([*report.beside_the_papers(runs), *report.all_tables(runs)])


# ------------------------------------------------------------------------------------------- the papers' values


@pytest.mark.parametrize("row, values", [
    ("Joint", "15.49 ± 1.30, 0.08 ± 0.02, –, 31.88 ± 2.89, 0.12 ± 0.02, –"),
    ("Finetune", "68.76 ± 7.00, 4.82 ± 1.42, –, 55.77 ± 2.56, 1.14 ± 0.10, –"),
    ("GR, 2 steps", "211.79 ± 6.92, 3.39 ± 0.30, 0.50 ± 0.04"), ("ER, 1000 images", "21.6 ± 0.9, 0.28 ± 0.01"),
    ("GR, 10 steps", "121.42 ± 13.04, 0.98 ± 0.19, 0.58 ± 0.04, 96.39 ± 5.25"),
    ("GD, 10 steps", "20.29 ± 3.07, 0.13 ± 0.04, 0.79 ± 0.01, 42.34 ± 4.74, 0.15 ± 0.01, 0.31 ± 0.03"),
    ("Gaussian noise", "38.87 ± 2.23, 0.85 ± 0.05"), ("Current data", "65.01 ± 3.31, 0.37 ± 0.09"),
    ("Continual Joint", "86.41, 73.07, 64.15, 50.59"), ("JDCL", "83.69, 47.95, 29.04, 54.53")])
def test_the_papers_values_are_those_of_the_papers(row, values):
    """A second copy of a part, typed from the papers."""
    line, ours = re.findall(rf"^\| {re.escape(row)} +\| paper +\| (.*)\n(.*)", "\n".join(report.beside_the_papers([])),
                            re.M)[0]
    assert re.split(r" +\| ", line)[:values.count(", ") + 1] == values.split(", ") and set(ours) <= set("| ours–")


def test_the_commands_make_the_runs_of_their_rows():
    """Each script makes of a row's command the base and the flags that the row asks for, at the paper's scale."""
    modules = {m.__name__ + ".py": m for m in (train_gr, train_gd, train_classifier, train_jdcl)}
    names = {strategy: place for place, strategy in re.findall(r"^(.*?) \| (.*?) \| ", report.PAPER, re.M)}
    commands = re.findall(r"^\| (\S.*?) +\| paper .*`python (.*)`", "\n".join(report.beside_the_papers([])), re.M)
    assert len(commands) == 15 + 5 + 7
    for strategy, command in commands:
        script, *argv = shlex.split(command)
        args = modules[script].get_args(argv)
        base, *flags = names[strategy].split(" --")
        assert (args.base, args.scale) == (base, "paper")
        assert {key: str(v) for key, v in args.departs.items()} == {
            flag.split()[0].replace("-", "_"): (flag.split() + ["True"])[1] for flag in flags}


# ---------------------------------------------------------------------------------- commands of what is missing

def rows(main, *arguments):
    return main("report.py", "--rows", *arguments).stdout.splitlines()


def test_rows_prints_the_commands_of_a_table(tmp_path, main):
    assert rows(main, "Table 2", "--scale", "small", "--seeds", "69") == [
        "python train_classifier.py --replay all --scale small --seed 69",
        "python train_classifier.py --replay none --scale small --seed 69",
        "python train_gr.py --scale small --seed 69",
        "python eval_fid.py runs/fashion-mnist/gr-2-small/seed69",
        "python train_classifier.py runs/fashion-mnist/gr-2-small/seed69",
        "python train_gd.py --scale small --seed 69",
        "python eval_fid.py runs/fashion-mnist/gd-2-small/seed69",
        "python train_classifier.py runs/fashion-mnist/gd-2-small/seed69"]
    assert rows(main, "Figure B.1", "--dataset", "cifar10", "--seeds", "1,2") == [
        line for seed in (1, 2) for line in (
            f"python train_gr.py --replay all --tasks 1 --batch-size 128 --dataset cifar10 --seed {seed}",
            f"python eval_fid.py runs/cifar10/joint-batch_size128-tasks1/seed{seed}")]
    names = [*report.TABLES, *report.BEYOND, "all"]
    for name in names:
        printed = rows(main, name, "--scale", "laptop")
        assert printed and len(printed) == len(set(printed)), name
    assert len(printed) == 3 * ((13 + 1 + 12 + 7 + 7 + 8) * 2 + 11 + 2)  # of all, each run once
    done = main("report.py", "--rows", "Table 3", code=2)
    assert not done.stdout and all(f"'{name}'" in done.stderr for name in names)
    for argv in (["--rows", "all", "--save", "x"], [".", "--scale", "small"]):
        assert "does nothing" in main("report.py", *argv, code=2).stderr

    for name in "abcde":
        write_pictures(tmp_path / "my pictures" / name, 2)
    assert rows(main, "Figure 2", "--dataset", "my pictures", "--seeds", "7") == [
        "python train_gr.py --dataset 'my pictures' --seed 7",
        "python eval_fid.py runs/my-pictures/gr-2/seed7"]


def test_rows_are_missing_that_neither_folders_nor_files_have(tmp_path, main):
    folder = {base: make(tmp_path / "my runs", base, scale="small", acc=acc, done=done) for base, acc, done in (
        ("gd-2", 0.7, 5), ("gd-10", None, 5), ("gr-2", 0.5, 4), ("gr-10", 0.5, 4), ("lwf", 0.3, 5), ("noise", 0.6, 5))}
    make_target(tmp_path / "my runs", 0.9, base="classifier-joint", scale="small")
    for base, models in {"gd-10": 5, "gr-2": 5, "gr-10": 4}.items():  # not classified, half evaluated, half trained
        for k in range(1, 1 + models):
            (folder[base] / f"task{k}.pt").touch()
    write(tmp_path / "results/fashion-mnist/lwf-small/seed42.json", report.read_folder(folder["lwf"]))
    write(tmp_path / "results/models/noise/config.json", (folder["noise"] / "config.json").read_text())
    (tmp_path / "results/models/noise/task5.pt").touch()  # the last model alone is no run to evaluate
    for base in ("lwf", "noise"):
        shutil.rmtree(folder[base])
    runs, at = report.find([tmp_path / "my runs", tmp_path / "results"]), "runs/fashion-mnist"
    assert [" ".join(command).replace(tmp_path.as_posix(), "X") for command in report.missing(
            [*((row, True) for row in folder), ("classifier-joint", False), ("joint", False)], "small",
            "fashion-mnist", [42], runs)] == [
        f"train_classifier.py X/my {at}/gd-10-small/seed42", f"eval_fid.py X/my {at}/gr-2-small/seed42",
        "train_gr.py --teacher-steps 10 --scale small --seed 42", f"eval_fid.py {at}/gr-10-small/seed42",
        "train_gd.py --distill noise --scale small --seed 42", f"eval_fid.py {at}/noise-small/seed42",
        f"train_classifier.py {at}/noise-small/seed42",
        "train_gr.py --replay all --scale small --seed 42", f"eval_fid.py {at}/joint-small/seed42"]
    assert rows(main, "Figure 2", "--scale", "small", "--seeds", "42", "my runs") == [
        f"python eval_fid.py 'my {at}/gr-2-small/seed42'"]


def test_the_claims_hold_of_the_papers_own_numbers(tmp_path, capsys):
    """Three values m - a, m, m + a have the standard error a / sqrt(3)."""
    for line in report.PAPER.split("\n\n")[0].splitlines()[2:]:
        base, _, *printed = line.split(" | ")
        values = [list(map(float, cell.split(" ± "))) if "±" in cell else [1, 0] for cell in printed[:3]]
        for seed, sign in zip(SEEDS, (-1, 0, 1)):
            frd, kld, acc = (m + sign * e * 3 ** 0.5 for m, e in values)
            if base.startswith("classifier"):
                make_target(tmp_path, acc, seed, base, scale="small")
            else:
                make(tmp_path, base, seed, frd=frd, kld=kld, acc=acc, scale="small")
    for base, final, departs in (("jdcl", 0.84, {}), ("jdcl-joint", 0.86, {}), ("jdcl-finetune", 0.2, {}),
                                 ("jdcl", 0.48, {"no_kd": True}), ("jdcl", 0.68, {"separate": True}),
                                 ("jdcl", 0.70, {"labels": 0.008}),
                                 ("jdcl", 0.67, {"labels": 0.008, "labelled_only": True})):
        make_jdcl(tmp_path, base, final=final, dataset="fashion-mnist", departs=departs, scale="small")
    assert claim.judge(report.find([tmp_path])) == 0
    lines = capsys.readouterr().out.splitlines()
    # With one seed finetuning's KLD is below GR's. JDCL and what it is compared with have one seed.
    assert [line.partition(":")[0] for line in lines] == (
        ["holds"] * 7 + ["open"] * 3 + ["not run", "open"] + ["not run"] * 2 + ["open", "not run"])
    assert "add more than 2 points; true with 1 of 1 seeds" in lines[14]
    assert "no average_accuracy of jdcl --one-stage" in lines[10] and "er-1000 21.6 ± 0.9 (3)" in lines[5]
    assert "true with 2 of 3 seeds" in lines[7]

    for seed in SEEDS:
        make(tmp_path, "gd-2", seed, frd=300, kld=2, acc=0.72, scale="small")
    make(tmp_path, "noise", 42, frd=100, kld=1, acc=0.6, scale="small")
    for seed in (69, 1714):
        shutil.rmtree(tmp_path / f"fashion-mnist/er-1000-small/seed{seed}")
    assert claim.judge(report.find([tmp_path])) == 2
    lines = capsys.readouterr().out.splitlines()
    assert [line.partition(":")[0] for line in lines[:7]] == [
        "holds", "FAILS", "holds", "FAILS", "open", "open", "holds"]
    assert "er-1000 20.04 ± 0 (1), gd-2 300 ± 0 (1)" in lines[5], "over the seeds that both have"


# ------------------------------------------------------------------------------------------------------ numbers

def test_mean_standard_error_and_n(tmp_path):
    for s, fid, kld, acc, ms in zip(SEEDS, (20, 23, 26), (0.1, 0.2, 0.6), (0.71, 0.72, 0.76), (100, 110, 120)):
        make(tmp_path, "gd-2", s, fid=fid, kld=kld, acc=acc, ms=(ms - 5, ms + 5))
        make_target(tmp_path, acc - 0.5, s)
        make(tmp_path, "gd-10", s, fid=fid + 20, dataset="cifar10")
    text = text_of(tmp_path)
    # sample standard deviations 3, 0.2646, 0.0265 and 10, each divided by sqrt(3)
    assert column(text, MAIN, FM_FID, "GD, 2 steps") == ["23.53 ± 1.06", "23.00 ± 1.73 (3)"]
    assert column(text, MAIN, FM_KLD, "GD, 2 steps") == ["0.25 ± 0.10", "0.30 ± 0.15 (3)"]
    assert column(text, MAIN, C10_FID, "GD, 10 steps") == ["42.34 ± 4.74", "43.00 ± 1.73 (3)"]
    assert column(text, MAIN, FM_ACC, "GD, 2 steps") == ["0.72 ± 0.03", "0.73 ± 0.02 (3)"]
    assert column(text, MAIN, FM_ACC, "Finetune (classifier)") == ["0.17 ± 0.03", "0.23 ± 0.02 (3)"]
    assert column(text, MAIN, FM_FID, "GR, 2 steps") == ["211.79 ± 6.92", "–"]
    ours = column(text, "Table B.1", "fashion-mnist ↓ ms per update", "GD, 2 steps")[1]
    assert ours.startswith("110.0 ± 5.8 (3), ")  # and the device, which is not the paper's
    assert column(text, "Table B.1", "fashion-mnist parameters", "GD, 2 steps") == ["85,711,746", "1,234,567"]
    assert column(text, COMPLETE, "↓ frd", TITLES["gd"]) == ["100.0 ± 0.0 (3)"]
    assert column(text, COMPLETE, "command", TITLES["gd"]) == ["`python train_gd.py`"]
    assert "Shortened" not in text


def test_one_run_has_no_error_and_is_counted_once(tmp_path, capsys):
    """In two folders, one of them not evaluated, and as a file; one that was trained otherwise is left out."""
    folder = make(tmp_path / "runs", "gr-2", fid=200, memory=None)
    shutil.copytree(folder, tmp_path / "a/seed42", ignore=shutil.ignore_patterns("eval.json"))
    write(tmp_path / "a/seed42.json", report.read_folder(folder))
    assert column(text_of(tmp_path), MAIN, FM_FID, "GR, 2 steps")[1] == "200.00 (1)"
    assert report.find([tmp_path])[0].folder == tmp_path / "a/seed42" and not capsys.readouterr().err
    make(tmp_path / "runs", "gr-2", fid=300, memory=None, torch="another")
    text = text_of(tmp_path)
    assert column(text, MAIN, FM_FID, "GR, 2 steps")[1] == "200.00 (1)" and "peak memory" not in text
    assert "runs/fashion-mnist/gr-2/seed42: left out, gr-2 with seed 42 was read from" in capsys.readouterr().err


def test_ms_are_of_the_last_thousand_updates():
    lines = [dict(task=1, update=500, ms_per_update=9), dict(task=1, update=1500, ms_per_update=10),
             dict(task=2, update=300, ms_per_update=30), dict(task=2, update=400, ms_per_update=50)]
    lines = [json.dumps(line | dict(peak_memory_mb=3, seconds=4.5)) for line in lines]
    found = report.parse_metrics("\n".join([*lines, '{"task": 2, "upd']))  # cut short by a kill
    assert found == dict(seconds=4.5, peak_memory_mb=3, curve=[], ms_per_update=[
        dict(task=1, mean=10.0), dict(task=2, mean=35.0)])  # 300 updates of 30 ms, 100 of 50


# ------------------------------------------------------------------------- what may not be averaged or compared

def test_shortened_runs_stand_apart(tmp_path):
    make(tmp_path, "gd-2", fid=20, scale="tiny", tasks=3, n=50)                     # a scale never heard of
    make(tmp_path, "gd-2", fid=21, departs={"length": ("iterations", [50])}, per_task=50)
    make(tmp_path, "gd-2", fid=22, done=3)                                          # not finished
    make(tmp_path, "gr-2", fid=23, updates=[100, 100, 100, 100, 99])                # under the preset's name
    make(tmp_path, "joint", fid=24, preset_updates=[])
    make(tmp_path, "noise", fid=26, preset_updates=[100] * 4)
    text = text_of(tmp_path)
    for row in ("GD, 2 steps", "GR, 2 steps", "Joint", "Gaussian noise"):
        assert column(text, MAIN, FM_FID, row)[1] == "–"
    assert "Complete" not in text
    tiny = "Shortened: Fashion-MNIST, tiny scale, 16x16, 3 tasks"
    assert column(text, tiny, "↓ FID", TITLES["gd"]) == ["20.0 (1)"]
    assert "All rows: FID: n 50; frd, KLD, old classes: labeller 0123456789ab, n 50" in text, "what needs no cell"
    assert column(text, SHORTENED, "old classes, %", TITLES["gd"], "`gd-2`", "3 of 5") == ["25.0 (1)"]
    assert column(text, SHORTENED, "↓ FID", TITLES["gd"], "`gd-2-iterations50`", "5 of 5") == ["21.0 (1)"]
    assert column(text, SHORTENED, "↓ FID", "Joint") == ["24.0 (1)"]


def test_departures_from_the_preset_are_no_row_of_the_paper(tmp_path):
    make(tmp_path, "gd-2", fid=20, departs={"lam": 0.5})
    make(tmp_path, "gd-2", fid=21, departs={"class_order": "0,1|2,3"}, command="train_gd.py --class-order '0,1|2,3'")
    own = make(tmp_path, "gd-2", fid=20, dataset_name="fashion-mnist-folder")  # a folder that is called as the dataset
    write(own / "config.json", json.loads((own / "config.json").read_text()) | {"dataset": "my/fashion-mnist/"})
    text = text_of(tmp_path)
    assert column(text, MAIN, FM_FID, "GD, 2 steps")[1] == "–"
    assert column(text, COMPLETE, "↓ FID", TITLES["gd"], "`gd-2-lam0.5`") == ["20.0 (1)"]
    assert "--class-order '0,1\\|2,3'" in text  # a bare | would end the cell
    assert "Complete: fashion-mnist-folder, paper scale" in text


def test_protocols_and_labellers_are_never_averaged(tmp_path):
    make(tmp_path, "gd-2", 42, fid=20, kld=0.2)
    make(tmp_path, "gd-2", 69, fid=40, kld=0.4, n=2000)
    make(tmp_path, "gd-2", 1714, fid=60, kld=0.6, protocol="pytorch-fid", labeller="f" * 64)
    make(tmp_path, "gr-2", 42, fid=200, kld=0.7, steps=20, precision="bf16", departs={"precision": "bf16"}, acc=0.5,
         classifier=dict(replay_loss="reversed"))
    twice = make(tmp_path, "gr-10", 42, fid=120, acc=0.5, classifier=dict(updates=[1] * 5))
    records = json.loads((twice / "eval.json").read_text())
    again = [r | {"protocol": r["protocol"] | {"n": 2000}, "fid": 130.0} for r in records]
    other = [r | {"protocol": r["protocol"] | {"seed": 7}, "fid": 125.0} for r in records]
    write(twice / "eval.json", records + again + other)
    text = text_of(tmp_path)
    assert column(text, MAIN, FM_FID, "GR, 10 steps")[1:] == [
        "120.00 (1)", "125.00 (1), evaluated with seed 7", "130.00 (1), n 2000"]
    assert column(text, MAIN, FM_FID, "GD, 2 steps")[1:] == ["20.00 (1)", "40.00 (1), n 2000", "60.00 (1), pytorch-fid"]
    assert column(text, MAIN, FM_KLD, "GD, 2 steps")[1:] == [
        "0.20 (1), labeller 0123456789ab", "0.60 (1), labeller ffffffffffff", "0.40 (1), n 2000, labeller 0123456789ab"]
    assert column(text, MAIN, FM_FID, "GR, 2 steps")[1] == "200.00 (1), bf16, 20 steps"
    assert column(text, MAIN, FM_ACC, "GR, 2 steps")[1] == "0.50 (1), bf16, reversed loss"
    assert column(text, MAIN, FM_ACC, "GR, 10 steps")[1] == "0.50 (1), updates [1, 1, 1, 1, 1]"


# ------------------------------------------------------------------------------------------------ files, faults

def test_saved_results_give_the_same_tables_and_figures(tmp_path, capsys):
    runs, results = tmp_path / "runs", tmp_path / "results"
    for s in SEEDS:
        make(runs, "gd-2", s, fid=20 + s / 1000, acc=0.7)
        make(runs, "gr-2", s, n=2000, scale="laptop", tasks=3)
        make_target(runs, 0.2, s)
        make_jdcl(runs, "jdcl", s, 0.5 + s / 10000, scale="small", dataset="fashion-mnist")
    make_jdcl(runs, "jdcl", scale="small", dataset="fashion-mnist", departs={"class_order": "0|1,2", "labels": 0.05})
    make(runs, "gr-2", done=2)
    report.main([str(runs), "--save", str(results)])
    first = capsys.readouterr().out
    assert "20.61 ± 0.55 (3)" in first
    for folders in ([str(results)], [str(runs), str(results), "--no-figures"]):  # nothing is counted twice
        report.main(folders)
        assert capsys.readouterr().out == first
    assert {p.parent.name for p in results.glob("fashion-mnist/*/seed42.json")} == {
        "gd-2", "gr-2-laptop", "classifier-finetune", "gr-2", "jdcl-small", "jdcl-class_order0-1_2-labels0.05-small"}
    saved = json.loads((results / "fashion-mnist/gd-2/seed42.json").read_text())
    assert set(saved) == {"device", "tasks_done", "config", "eval", "classifier", "accuracy", "metrics"}
    assert saved["device"]
    assert saved["config"] == json.loads((runs / "fashion-mnist/gd-2/seed42/config.json").read_text())
    text = (results / "report.md").read_text(encoding="utf-8")
    assert text.startswith(first)
    assert {p.name for p in results.glob("*.png")} == {  # what needs neither weights nor pictures
        *(f"{name}-fashion-mnist{scale}.png" for name in ("figure4", "figureB2") for scale in ("", "-laptop")),
        "jdcl-figure4-fashion-mnist-small.png", "jdcl-figure5-fashion-mnist-small.png",
        "jdcl-figure5-fashion-mnist-class_order0-1_2-labels-small.png"}
    for path in results.glob("*.png"):
        pictures = [np.asarray(Image.open(folder / path.name).convert("RGB")) for folder in (runs, results)]
        assert (pictures[0] == pictures[1]).all() and pictures[0].std() > 10 and f"({path.name})" in text


def test_damaged_old_and_half_finished_runs_are_told_in_one_sentence_each(tmp_path, capsys):
    make(tmp_path, "gd-2", fid=20)
    make(tmp_path, "gd-2", 69, fid=22).joinpath("eval.json").unlink()
    make(tmp_path, "gd-2", 1714, fid=24).joinpath("eval.json").write_text('[{"task": 1,')
    make(tmp_path, "gr-2").joinpath("config.json").write_text("{")
    make(tmp_path, "gr-2", 69).joinpath("eval.json").write_text('[{"task": "x"}]')
    make(tmp_path, "gr-2", 1).joinpath("metrics.jsonl").write_text('{"task": 1}\n[]\n')
    make(tmp_path, "gr-2", 2, seed_=0).joinpath("classifier.json").write_text('{"accuracy": [0.9]}')
    make(tmp_path, "finetune", fid=60).joinpath("metrics.jsonl").write_text("")
    make(tmp_path, "gr-2", 3, class_tasks=[[0, 1], [2, "x"]])
    for i, text in enumerate(('{"matrix": [["x"]]}', "[1]", '"matrix"', '{"matrix": [[0.5]], "tasks": 3}'), 10):
        make_jdcl(tmp_path, "jdcl", i).joinpath("accuracy.json").write_text(text)
    (tmp_path / "fashion-mnist" / "begun" / "seed42").mkdir(parents=True)
    for name, text in ("seed7.json", "[]"), ("seed8.json", '{"config": {"name": "gd-2", "command": "python x.py"}}'):
        write(tmp_path / name, text)
    text = text_of(tmp_path)
    assert column(text, MAIN, FM_FID, "GD, 2 steps")[1] == "20.00 (1)"
    assert column(text, MAIN, FM_FID, "Finetune")[1] == "60.00 (1)"
    lines = capsys.readouterr().err.splitlines()
    for name in ("gd-2/seed1714", "gr-2/seed1", "gr-2/seed42", "gr-2/seed69", "gr-2/seed2", "seed7.json", "seed8.json",
                 "jdcl/seed10", "jdcl/seed11", "jdcl/seed12", "jdcl/seed13"):
        about = [line for line in lines if f"{name}: " in line]
        assert len(about) == 1 and "left out, damaged or of an older version" in about[0], (name, lines)
    assert not any("seed69/" in line or "gd-2/seed42" in line for line in lines)


def test_a_persons_mistakes_are_one_sentence_and_exit_code_2(tmp_path, main):
    (tmp_path / "empty").mkdir()
    for argv, said in ((["empty"], "no run to report in empty"), (["missing"], "there is no folder missing"),
                       ([], "no run to report in runs or results")):
        done = main("report.py", *argv, code=2)
        assert not done.stdout and done.stderr.startswith(f"error: {said}")
        assert done.stderr.count("\n") == 1
    make(tmp_path, "gd-2")
    write(tmp_path / "file", "")
    for flag in ("--out", "--save"):
        done = main("report.py", "fashion-mnist", flag, "file/x", code=2)
        assert "error: cannot write" in done.stderr and not done.stdout


# ------------------------------------------------------------------------------------------------------ figures

def paint(folder, side, value):
    """samples/task<k>.png as the train scripts save them, image i of task k with the level `value` + 10 k + i."""
    (folder / "samples").mkdir()
    for k in (1, 2, 3):
        u8 = torch.arange(64).view(64, 1, 1, 1).expand(64, 1, side, side).add(value + 10 * k).to(torch.uint8)
        train_gr_grid = torch.nn.functional.pad(u8, (0, 1, 0, 1)).view(8, 8, side + 1, side + 1).permute(0, 2, 1, 3)
        pixels = np.pad(train_gr_grid.reshape(8 * (side + 1), -1).numpy(), ((1, 0), (1, 0)))
        Image.fromarray(pixels.repeat(2, 0).repeat(2, 1)).save(folder / "samples" / f"task{k}.png")


def test_samples_are_the_upper_left_quarter_of_the_runs_pictures(tmp_path, capsys):
    folder = make(tmp_path, "gd-2", scale="laptop", tasks=3)
    paint(folder, 16, 100)
    r, = report.find([tmp_path])
    pixels, = report.samples(r, 2, "cpu")
    assert pixels.shape == (69, 69, 3)
    assert [[pixels[2 + 17 * i, 2 + 17 * j, 0] for j in range(4)] for i in range(4)] == [
        [120 + 8 * i + j for j in range(4)] for i in range(4)]
    assert (pixels[:1] == 0).all() and (pixels[-1:] == 0).all()  # the lines between images
    (folder / "samples/task1.png").write_bytes(b"PNG")
    (folder / "samples/task3.png").unlink()
    assert report.samples(r, 1, "cpu") == report.samples(r, 3, "cpu") == []
    (folder / "task3.pt").write_bytes(b"PK")
    assert report.samples(r, 3, "cpu") == []
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 2 and all(f"task {k} is left out of the figures" in line for k, line in zip((1, 3), said))


def test_a_model_draws_as_its_own_run_did(tmp_path, monkeypatch):
    monkeypatch.setitem(NETS, "laptop", dict(NETS["laptop"], channels=(8, 8), groups=4, attention=()))
    model, drawn = UNet(**NETS["laptop"]), []
    for clip in (True, False):  # JDCL does not clip x_0 at the paper's size
        folder = make(tmp_path, "jdcl", scale="laptop", image_size=8, clip=clip)
        torch.save({"task": 5, "model": model.state_dict(), "memory": {}}, folder / "task5.pt")
        drawn += report.samples(report.find([tmp_path])[0], 5, "cpu")
    assert (drawn[0] != drawn[1]).any()
    monkeypatch.setattr(report, "T", 10)  # as many as its own DDIM steps: that does not make them DDPM's
    assert (drawn[1] == report.samples(report.find([tmp_path])[0], 5, "cpu")[0]).all()


def test_grid_puts_each_picture_into_its_cell():
    a, b, c, d, e = (np.full((9, 9, 3), v, np.uint8) for v in (10, 20, 30, 40, 60))
    rows = [("up", {1: a, 2: b, 4: c}), ("empty", {}), ("down", {4: e, 1: d})]
    figure = report.grid("A title", {1: "left", 2: "middle\nof three", 3: "an empty one", 4: "right"}, rows)
    shown = [[int(image.get_array().mean()) for image in axes.images] for axes in figure.axes]
    assert shown == [[10], [20], [30], [40], [], [60]]
    assert [axes.get_ylabel() for axes in figure.axes] == ["up", "", "", "down", "", ""]
    assert [axes.get_title(loc="left") for axes in figure.axes] == ["left", "middle\nof three", "right", "", "", ""]
    assert report.grid("A title", {1: "left"}, [("empty", {})]) is None


def test_an_unknown_method_is_in_tables_curves_and_grids_after_the_known(tmp_path):
    unknown = [dict(base="gd-ewc-2", method="gd-ewc", title="GD with EWC", teacher_steps=2, preset={}),
               dict(base="a|b", method="a|b", title="A or B")]
    for s, c in itertools.product(SEEDS, [*unknown, dict(base="gd-2"), dict(base="joint"), dict(base="er-100")]):
        folder = make(tmp_path, seed=s, fid=20 + s / 100, tasks=3, **c)
        paint(folder, 32, 50)
    make(tmp_path, "half", method="half", title="Half", tasks=3, per_task=50)
    runs = report.find([tmp_path])
    text, title = "\n".join(report.all_tables(runs)), "Complete: Fashion-MNIST, paper scale, 32x32, 3 tasks"
    assert column(text, title, "↓ FID", "GD with EWC", "`gd-ewc-2`")[0].endswith("(3)")
    assert column(text, title, "name", "A or B") == ["`a_b`"]
    assert column(text, title.replace("Complete", "Shortened"), "name", "Half") == ["`half`"]

    runs = [r for r in runs if r.base != "half"]
    everything = ["Joint", "Experience replay, 100 images", "Generative distillation, 2 steps", "A or B",
                  "GD with EWC, 2 steps"]
    drawn = dict(report.curve_figures(runs))
    names = {name: [t.get_text() for t in figure.legends[0].get_texts()] for name, figure in drawn.items() if figure}
    assert names["figure4"] == [everything[0], everything[2]] and names["figureB2"] == everything
    colours = [bars.lines[0].get_color() for bars in drawn["figureB2"].axes[0].containers]
    assert len(set(colours)) == 5 and colours[:3] == [report.COLOURS[m] for m in ("joint", "er", "gd")]
    axes = dict(report.sample_figures(runs, "cpu"))["figure3"].axes
    assert [" ".join(a.get_ylabel().split()) for a in axes if a.get_ylabel()] == [everything[0], *everything[2:]]
    assert [a.get_title(loc="left") for a in axes[:2]] == ["task 1\nT-shirt, trouser", "task 2\npullover, dress"]


def test_all_figures_of_a_tree(tmp_path, capsys, monkeypatch):
    tiny = dict(NETS["laptop"], channels=(8, 8), groups=4, attention=())
    monkeypatch.setitem(NETS, "laptop", tiny)  # Figure B.1 calls it a thousand times
    runs, small = tmp_path / "runs", dict(n=2000, scale="laptop", tasks=3, image_size=8)
    for number, base in enumerate("joint finetune er-10 gr-2 gr-10 gd-2 gd-10 noise".split()):
        for s in (42, 69):
            folder = make(runs, base, s, frd=100.0 + 10 * number + s / 20, **small)
            if s == 42 or base == "joint":
                paint(folder, 8, 10 * number)
    model = {"task": 3, "model": UNet(**NETS["laptop"]).state_dict(), "memory": {}}
    torch.save(model, runs / "fashion-mnist/joint-laptop/seed42/task3.pt")
    for lam in (0.25, 1.5):
        make(runs, "gd-2", frd=90.0, departs={"lam": lam}, **small)
    report.main([str(runs), "--out", str(tmp_path / "out"), "--device", "cpu"])
    assert "figures" in capsys.readouterr().err
    names = {p.name.removesuffix("-fashion-mnist-laptop.png") for p in (tmp_path / "out").glob("*.png")}
    assert names == {f"figure{n}" for n in "2 3 4 5 6 B1 B2 B3 B4 B5 B6 B7 B8 B12".split()} | {"lambda"}
    text = (tmp_path / "out/report.md").read_text(encoding="utf-8")
    for name in names:
        path = tmp_path / f"out/{name}-fashion-mnist-laptop.png"
        picture = np.asarray(Image.open(path).convert("RGB"))
        assert min(picture.shape[:2]) > 200 and picture.std() > 10, name
        assert f"({path.name})" in text


def test_quality_over_lambda_and_over_tasks(tmp_path):
    for s in (42, 69):
        make(tmp_path, "gd-2", s, frd=100.0 + s)
        for lam in (0.25, 1.5):
            make(tmp_path, "gd-2", s, frd=200.0 * lam + s, departs={"lam": lam})
    make(tmp_path, "gd-2", 1714, frd=999.0, departs={"lam": 1.5}, done=3)  # not yet to be averaged with those
    make(tmp_path, "gd-2", 1714, frd=888.0, departs={"teacher_solver": "ipndm"})  # nor those of another solver
    drawn = dict(report.curve_figures(report.find([tmp_path])))
    assert list(drawn) == ["figure4", "figureB2", "denoise", "lambda", "calls"] and drawn["denoise"] is None
    line, *_ = drawn["lambda"].axes[0].containers[0]
    np.testing.assert_allclose(line.get_xydata(), [(0.25, 50 + 55.5), (0.75, 155.5), (1.5, 355.5)])
    line, *_ = drawn["figure4"].axes[0].containers[0]
    np.testing.assert_allclose(line.get_xydata(), [(1, 50), (2, 50), (3, 50), (4, 50), (5, 155.5)])


def test_quality_over_the_weight_of_ewc(tmp_path):
    """A curve for each direction, beside that of GD; runs with another weight get into no other figure."""
    for s, (base, frd) in itertools.product((42, 69), (("ewc-2", 100.0), ("ewc-random-2", 10.0))):
        for weight, departs in (15000.0, {}), (150.0, {"ewc": 150.0}):
            make(tmp_path, base, s, frd=frd + weight + s, departs=departs, ewc=weight, method=base[:-2])
    make(tmp_path, "gd-2", frd=77.0)
    drawn = dict(report.curve_figures(report.find([tmp_path])))
    assert list(drawn) == ["figure4", "figureB2", "denoise", "lambda", "ewc"] and drawn["lambda"] is None
    gd, *curves = [bars[0].get_xydata() for bars in drawn["ewc"].axes[0].containers[::-1]]
    xs = [150, 15000]
    assert {axes.get_xscale() for axes in drawn["ewc"].axes} == {"log"}
    np.testing.assert_allclose(gd, [(x, 77) for x in xs])
    np.testing.assert_allclose(sorted(curve[0, 1] for curve in curves), [150 + 65.5, 150 + 155.5])
    for curve in curves:
        np.testing.assert_allclose(curve[:, 0], xs)
        assert curve[1, 1] - curve[0, 1] == pytest.approx(15000 - 150)


def test_a_plot_shows_every_value_and_its_whole_legend():
    """From 0 on, or from below a negative value; as high as its many labels."""
    looks = [SimpleNamespace(label=f"method {i}", colour="k", style="o-") for i in range(30)]
    for low, bottom in (2.0, 0), (0.0, 0), (-1.0, -2):
        figure = report.plot([("task", "y", [(look, {1: [low], 2: [5.0]}) for look in looks])])
        assert bottom <= figure.axes[0].get_ylim()[0] <= min(0, low)
        figure.draw_without_rendering()
        box, whole = figure.legends[0].get_window_extent(), figure.bbox
        assert whole.y0 <= box.y0 and box.y1 <= whole.y1


def test_quality_over_the_calls_of_the_teacher(tmp_path):
    """One curve for each method and what departs in its teacher; such runs get into no other figure."""
    for s, (n, frd, departs) in itertools.product((42, 69), (
            (2, 100, {}), (10, 50, {}), (2, 80, {"first_step": "analytic"}),
            (5, 60, {"teacher_solver": "ipndm", "first_step": "analytic"}))):
        make(tmp_path, f"gd-{n}", s, frd=frd + s / 10, departs=departs, scale="small")
    runs = report.find([tmp_path])
    figure = dict(report.curve_figures(runs))["calls"]
    curves = {text.get_text(): bars for text, bars in zip(figure.legends[0].get_texts(), figure.axes[0].containers)}
    points = {name: bars.lines[0].get_xydata().round(6).tolist() for name, bars in curves.items()}
    title = TITLES["gd"]
    assert points == {title: [[2, 105.55], [10, 55.55]], f"{title}, analytic": [[2, 85.55]],
                      f"{title}, ipndm, analytic": [[5, 65.55]]}
    assert "calls" not in dict(report.curve_figures([r for r in runs if not r.variant]))
    made = report.figures(runs, tmp_path, "cpu")
    assert set(made) == {f"{name}-fashion-mnist-small.png" for name in ("figure4", "figureB2", "calls")}


def test_frd_by_task_is_a_mean_over_tasks_and_what_it_was_before(tmp_path):
    """A_FID = mean_i FID_i(m_T) and F = mean_i (FID_i(m_T) - FID_i(m_i)) of arXiv 2509.23593, with frd."""
    path = make(tmp_path, "gr-2", tasks=2) / "eval.json"
    rows = {10000: ([10.0], [30.0, 14.0]), 2000: ([11.0], [51.0, 15.0]), 500: ([10.0], [None, 14.0])}  # by n
    write(path, [r | dict(frd_by_task=row[r["task"] - 1], protocol=r["protocol"] | dict(n=n))
                 for r in json.loads(path.read_text()) for n, row in rows.items()])
    (r,) = report.find([tmp_path])
    found = {(metric, conditions[:-1]): v for (metric, k, conditions), v in r.values.items() if k == 2}
    assert found["afrd", ()] == 22 and found["afrd", ("n 2000",)] == 33
    assert found["frd_forgetting", ()] == 10 and found["frd_forgetting", ("n 2000",)] == 20
    assert ("afrd", ("n 500",)) not in found, "the images of task 1 are lost"


def test_error_by_noise_after_the_last_task_and_over_that_after_task_1(tmp_path):
    make(tmp_path, "gr-2", 42)
    make(tmp_path, "gd-10", 42)  # not the preset's steps
    for base, s, factor, precision in (("gd-2", 42, 2.0, "fp32"), ("gd-2", 69, 4.0, "fp32"), ("gd-2", 7, 50.0, "bf16"),
                                       ("gd-10", 42, 9.0, "fp32")):
        path = make(tmp_path, base, s, precision=precision) / "eval.json"
        records = json.loads(path.read_text())
        for r in records:
            r["denoise"] = [0.1 * (i + 1) * (factor if r["task"] == 5 else 1) for i in range(10)]
        write(path, records)
    runs = report.find([tmp_path])
    assert dict(report.curve_figures([r for r in runs if r.base == "gr-2"]))["denoise"] is None
    figure = dict(report.curve_figures(runs))["denoise"]
    for axes, expected in zip(figure.axes, ([0.3 * (i + 1) for i in range(10)], [3.0] * 10), strict=True):
        (bars,) = axes.containers
        np.testing.assert_allclose(bars.lines[0].get_xydata().T, [range(50, 1000, 100), expected])
        assert np.ptp(bars.lines[2][0].get_segments()[9][:, 1]) == pytest.approx(2 * expected[9] / 3)


# --------------------------------------------------------------------------------------------------------- JDCL

def test_jdcl_rows_are_told_by_their_flags(tmp_path):
    for s, final in zip(SEEDS, (0.82, 0.84, 0.89)):
        make_jdcl(tmp_path, "jdcl", s, final)
    make_jdcl(tmp_path, "jdcl", final=0.3, departs={"one_stage": True})
    make_jdcl(tmp_path, "jdcl", final=0.5, departs={"no_kd": True, "precision": "bf16"}, precision="bf16")
    make_jdcl(tmp_path, "jdcl", final=0.8, departs={"labels": 0.05})
    make_jdcl(tmp_path, "jdcl", final=0.1, departs={"labels": 0.05, "labelled_only": True})
    make_jdcl(tmp_path, "jdcl-joint", final=0.85)
    make_jdcl(tmp_path, "jdcl", 42, 0.2, dataset="cifar100")
    make_jdcl(tmp_path, "jdcl", 42, 0.3, dataset="cifar100", departs={"tasks": 10}, tasks=10)
    make_jdcl(tmp_path, "jdcl", 7, 0.4, done=3)
    text, (c5, c100, c100_10) = text_of(tmp_path), (f"{head} ↑ accuracy, %" for head in (
        "cifar10", "cifar100", "cifar100 --tasks 10"))
    # deviations -3, -1 and 4 of 85: s = sqrt(26 / 2), divided by sqrt(3)
    assert column(text, JDCL, c5, "JDCL") == ["83.69", "85.00 ± 2.08 (3)"]
    assert column(text, JDCL, c100, "JDCL") == ["47.95", "20.00 (1)"]
    assert column(text, JDCL, c100_10, "JDCL") == ["29.04", "30.00 (1)"]
    assert column(text, JDCL, c5, "Continual Joint") == ["86.41", "85.00 (1)"]
    assert column(text, JDCL, c5, "One stage") == ["?", "30.00 (1)"]
    assert column(text, JDCL, c5, "Without distillation") == ["48.2", "50.0 (1), bf16"]
    assert column(text, JDCL, c5, "Separate DDPM and ResNet18") == ["68.4", "–"]
    assert column(text, JDCL, c5, "JDCL, 5 % of the labels") == ["79.96", "80.00 (1)"]
    assert column(text, JDCL, c5, "GUIDE") == ["64.47"]
    title = "Complete: CIFAR-10, paper scale, 32x32, 5 tasks, with a classifier"
    assert column(text, title, "↓ forgetting, %", "JDCL", "`jdcl`") == ["5.00 ± 2.08 (3)"]


def test_jdcl_figures_show_the_last_task_and_the_first(tmp_path):
    for s in (42, 69):
        make_jdcl(tmp_path, "jdcl", s, 0.5 + s / 1000)
    make_jdcl(tmp_path, "jdcl", final=0.6, departs={"separate": True})
    make_jdcl(tmp_path, "jdcl", final=0.6, departs={"no_kd": True})
    runs = report.find([tmp_path])
    # half through each task, and after it
    assert runs[0].curve == {50: 0.6, 100: 0.9, 150: 0.6, 200: 0.9, 250: 0.6, 300: 0.9, 350: 0.6, 400: 0.9, 450: 0.6,
                             500: 0.552}
    drawn = dict(report.jdcl_figures(runs))
    real, replayed = (patch.get_data() for patch in drawn["jdcl-figure4"].axes[0].patches)
    assert list(replayed.values) == [0] * 39 + [1] and len(replayed.edges) == 41
    assert real.values == pytest.approx([1 / 40] * 40)
    assert [axes.get_title() for axes in drawn["jdcl-figure4"].axes] == [
        "jdcl, seed 42, task 5", "jdcl-separate, seed 42, task 5"]
    names = [t.get_text() for t in drawn["jdcl-figure5"].legends[0].get_texts()]
    assert names == ["jdcl", "jdcl-no_kd", "jdcl-separate"]
    line, *_ = drawn["jdcl-figure5"].axes[0].containers[0]
    assert line.get_xydata()[-1].tolist() == pytest.approx([500, 56.55])  # mean of 0.552 and 0.579, in %


def test_real_runs_are_reported_and_their_last_models_draw(tmp_path, main):
    tiny = "--dataset shapes --scale laptop --tasks 2 --iterations 1 --batch-size 4 --device cpu".split()
    for script, *argv in (["train_gr.py", "--replay", "none"], ["train_gd.py"]):
        done = main(script, *tiny, *argv)
    folder, = (tmp_path / "runs").glob("shapes/gd-2-*/seed42")
    main("train_classifier.py", folder, "--iterations", "1")
    done = main("report.py", "runs", "--save", "results")
    title = "Shortened: Shapes, laptop scale, 16x16, 2 tasks"
    assert re.fullmatch(r"0\.\d\d \(1\)", column(done.stdout, title, "↑ ACC", TITLES["gd"])[0])
    assert column(done.stdout, title, "parameters", TITLES["gd"]) == ["534,626"]
    assert column(done.stdout, title, "↑ ACC", "Finetune") == ["–"]
    assert {p.name.partition("-")[0] for p in (tmp_path / "runs").glob("*.png")} == {
        "figure3", "figure6", "figureB4", "figureB6"}

    models = tmp_path / "results/models/seed42"  # as they are committed, beside the files of --save
    models.mkdir(parents=True)
    for name in ("config.json", "task2.pt"):
        shutil.copy(folder / name, models / name)
    assert main("report.py", "results").stdout == done.stdout
    assert {p.name.partition("-")[0] for p in (tmp_path / "results").glob("*.png")} == {
        "figure3", "figure6", "figureB6"}
    made, r = report.read(folder), report.read(models)
    made.folder, r.folder = folder, models
    assert report.samples(r, 1, "cpu") == []
    (drawn,), (trained,) = report.samples(r, 2, "cpu"), report.samples(made, 2, "cpu")
    assert (drawn == trained).all() and drawn.std() > 10
