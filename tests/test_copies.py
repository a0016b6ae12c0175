"""What README promises of copies: a train script and four files run anywhere, and a changed copy is a new method."""

import json
import os
import re
import shutil
import subprocess
import sys
import textwrap

import pytest
import torch
from conftest import ROOT, write_pictures
from test_faults import RUNS, assert_same_end
from test_train import wait_for

import data


@pytest.mark.parametrize("name", RUNS)
def test_a_train_script_needs_four_files_beside_it(script, tmp_path, name):
    for file in (name, "unet.py", "ddim.py", "data.py", "run.py"):
        shutil.copy(ROOT / file, tmp_path)
    script(tmp_path / name, *RUNS[name][1], "--device", "cpu", "--out", "here")
    assert (tmp_path / "here/task2.pt").exists()


def apply(diff, text):
    """The text with the hunks of a diff, which are parted by @@ and have no line numbers, each in one place."""
    for hunk in diff.split("@@\n"):
        lines = hunk.splitlines()
        old, new = ("".join(line[1:] + "\n" for line in lines if line[0] in kept) for kept in (" -", " +"))
        assert text.count(old) == 1, old
        text = text.replace(old, new)
    return text


def test_a_changed_copy_is_a_method_of_its_own(main, tmp_path, monkeypatch):
    """README's train_mine.py on pictures of four classes: run, killed inside and after a task, resumed, evaluated,
    classified, reported. No other file changes."""
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    diff = re.search(r"`train_mine.py`.*?```diff\n(.*?)```", readme, re.S)[1]
    changed = apply(diff, (ROOT / "train_gd.py").read_text(encoding="utf-8"))
    rules = (ROOT / "docs/add_a_method.md").read_text(encoding="utf-8")
    gradient = re.search(r"```python\n(.*?)```", rules, re.S)[1] + '        memory[k]["gradient"] = mu\n'
    changed = apply(textwrap.indent(gradient, "+") + '         run.save(folder / f"task{k}.pt", {\n', changed)
    for name in ("train_mine.py", "train_second.py"):
        (tmp_path / name).write_text(changed, encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    images, labels = data.load_images("shapes", "train", "data", 28)
    for c, name in enumerate(["disc", "ring", "triangle", "cross"]):
        write_pictures(tmp_path / "pictures" / name, images[labels == c][:60, 0].numpy())

    train = ["train_mine.py", "--dataset", "pictures", "--scale", "laptop", "--batch-size", "8", "--device", "cpu",
             "--iterations", "30,4", "--tasks", "2", "--save-every", "2", "--anchor", "3"]
    main(*train)
    folder = tmp_path / "runs/pictures/anchored-2-anchor3.0-iterations30_4-batch_size8-tasks2-laptop/seed42"
    assert json.loads((folder / "config.json").read_text())["title"] == "GD with anchors"
    memories = [torch.load(folder / f"task{k}.pt", weights_only=True)["memory"] for k in (1, 2)]
    assert [[*memory] for memory in memories] == [[1], [1, 2]]
    first, second = (old["gradient"] for old in memories[1].values())
    assert first.norm() > 0 and not first.equal(second)
    pulls = [(r["task"], r["loss_anchor"]) for r in map(json.loads, open(folder / "metrics.jsonl"))]
    assert all(pull == 0 for task, pull in pulls if task == 1) and pulls[-1][1] > 0, "its term is in the log"

    inside = subprocess.Popen([sys.executable, *train, "--out", "inside"], cwd=tmp_path, stdout=subprocess.DEVNULL,
                              stderr=subprocess.DEVNULL, env=dict(os.environ, PYTHONPATH=str(ROOT)))
    wait_for(tmp_path / "inside", 2, 2)
    inside.kill()
    inside.communicate()
    shutil.copytree(folder, tmp_path / "between", ignore=shutil.ignore_patterns("task2*", "checkpoint*"))
    for out in ("inside", "between"):
        again = main(*train, "--out", out)
        assert "going on from task 2" in again.stdout, again.stderr
        assert_same_end(folder, tmp_path / out)

    for command in (["eval_fid.py", folder, "--n", "20"], ["train_classifier.py", folder, "--iterations", "2"],
                    ["report.py", "runs"]):
        main(*command)
    text = (tmp_path / "runs/report.md").read_text(encoding="utf-8")
    table = [line for line in text.splitlines() if "GD with anchors" in line]
    assert table and all("Shortened" in text[:text.index(line)] for line in table), "it is not complete by accident"
    assert all(f" {metric} " in text for metric in ("↓ frd", "↓ KLD", "↑ ACC")) and "anchored" in text
    assert "figure3" in text, "its samples are in a picture"

    again = main("train_second.py", *train[1:], code=2)
    assert "script was train_mine.py and is train_second.py" in again.stderr
