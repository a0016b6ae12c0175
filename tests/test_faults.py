"""Runs that are killed, stopped and damaged end as unbroken ones do, bitwise; several processes follow one.

Faults are injected into a fork of this process, which has imported torch already: a life of a run takes a second. An
event is anything worth dying at: before and after an optimizer's step, a step of sampling, half-way through the
writing of a file, before and after a rename.
"""

import collections
import errno
import functools
import io
import json
import os
import random
import re
import shutil
import signal
import socket
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT

import data
import ddim
import run
import train_ewc
import train_gd
import train_gr
import train_jdcl

COMMON = ["--dataset", "shapes", "--scale", "laptop", "--batch-size", "8", "--save-every", "1", "--sample-steps", "2"]
RUNS = {
    "train_gr.py": (train_gr, [*COMMON, "--iterations", "4,5"]),
    "train_gd.py": (train_gd, [*COMMON, "--iterations", "4,5"]),
    "train_ewc.py": (train_ewc, [*COMMON, "--iterations", "4,5", "--ewc-images", "16", "--fisher-images", "2"]),
    "train_jdcl.py": (train_jdcl, [*COMMON, "--class-order", "0|1", "--local-iterations", "4", "--global-iterations",
                                   "4", "--classifier-start", "2", "--eval-every", "3", "--replay-steps", "2",
                                   "--replay-per-class", "160", "--replay-cap", "1000", "--lr", "1e-3"]),
}


@pytest.fixture(autouse=True, scope="module")
def images_drawn_once():
    patch = pytest.MonkeyPatch()
    patch.setattr(data, "load_images", functools.cache(data.load_images))
    for split in ("train", "test"):
        data.load_images("shapes", split, "data", 16)
    yield
    patch.undo()


def fork(function, log):
    """Run function() in a fork whose output goes to the file `log`; returns its pid."""
    pid = os.fork()
    if pid == 0:
        code = 99
        try:
            file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
            os.dup2(file, 1)
            os.dup2(file, 2)
            sys.stdout, sys.stderr = open(1, "w", buffering=1), open(2, "w", buffering=1)
            function()
            code = 0
        except SystemExit as leaving:
            code = leaving.code
        finally:
            os._exit(code)
    return pid


def ended(pid):
    """The exit code of a fork, -9 for SIGKILL."""
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def writes_by(how):
    """In this process let run.py write whole files by how(write, content)."""
    class Disk(io.FileIO):
        def write(self, content):
            how(super().write, content)
    run.open = lambda path, mode="r", **more: Disk(path, mode) if mode == "wb" else open(path, mode, **more)


def at_events(happen):
    """In this process call happen(name) at every event."""
    def around(function, name):
        @functools.wraps(function)
        def wrapped(*arguments, **options):
            happen(f"before {name}")
            result = function(*arguments, **options)
            happen(f"after {name}")
            return result
        return wrapped

    def in_halves(write, content):
        write(content[:len(content) // 2])
        happen("inside a save")
        write(content[len(content) // 2:])

    writes_by(in_halves)
    os.replace = around(os.replace, "a rename")
    torch.optim.Adam.step = around(torch.optim.Adam.step, "a step")
    ddim.predict = around(ddim.predict, "sampling")


def live(name, folder, happen=lambda event: None):
    module, arguments = RUNS[name]
    log = folder.with_suffix(".log")
    log.unlink(missing_ok=True)

    def life():
        at_events(happen)
        run.main(lambda: module.main([*arguments, "--out", str(folder)]))
    return ended(fork(life, log)), log.read_text()


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory):
    """unbroken(script): the folder of a run that nothing disturbs, and the number of its events."""
    @functools.cache
    def once(name):
        folder = tmp_path_factory.mktemp("unbroken") / name
        counter = folder.with_suffix(".events")

        def count(event):
            with open(counter, "a") as file:
                file.write(".")
        code, said = live(name, folder, count)
        assert code == 0, said
        return folder, counter.stat().st_size
    return once


def assert_same_end(folder, other):
    """Weights, records, accuracies and pictures are the same, bit by bit; only times and memory differ."""
    files = sorted(path.relative_to(folder) for path in folder.rglob("*") if path.suffix in (".pt", ".png"))
    files = [path for path in files if not path.name.startswith("checkpoint")]
    assert files, folder
    for path in files:
        if path.suffix == ".png":
            assert (folder / path).read_bytes() == (other / path).read_bytes(), path
        else:
            assert_equal(*(torch.load(where / path, weights_only=True) for where in (folder, other)), str(path))
    records = [[{key: value for key, value in json.loads(line).items() if key not in
                 ("ms_per_update", "peak_memory_mb", "seconds")}
                for line in (where / "metrics.jsonl").read_text().splitlines()] for where in (folder, other)]
    assert records[0] == records[1], "no update is recorded twice or missing"
    if (folder / "accuracy.json").exists():
        assert (folder / "accuracy.json").read_text() == (other / "accuracy.json").read_text()


def assert_equal(a, b, where):
    if isinstance(a, torch.Tensor):
        assert torch.equal(a, b), where
    elif isinstance(a, dict):
        assert a.keys() == b.keys(), where
        for key in set(a) - {"out", "config"}:
            assert_equal(a[key], b[key], f"{where} {key}")
    elif isinstance(a, list):
        assert len(a) == len(b), where
        for one, other in zip(a, b):
            assert_equal(one, other, where)
    else:
        assert a == b, where


# -------------------------------------------------------------------------------------------------- killed, stopped

@pytest.mark.parametrize("name", RUNS)
def test_twenty_lives(unbroken, tmp_path, name):
    """Killed twenty times at events drawn at random, the run ends as the unbroken one."""
    whole, events = unbroken(name)
    draw, deaths = random.Random(name), collections.Counter()
    for _ in range(20):
        fuse = draw.randint(1, events // 10)

        def burn(event):
            nonlocal fuse
            fuse -= 1
            if fuse == 0:
                print("killed", event, flush=True)
                os.kill(os.getpid(), signal.SIGKILL)
        code, said = live(name, tmp_path / "run", burn)
        assert code == -signal.SIGKILL, said
        deaths[said.split("killed ")[-1].strip()] += 1
    code, said = live(name, tmp_path / "run")
    assert code == 0, said
    assert_same_end(whole, tmp_path / "run")
    assert not list((tmp_path / "run").rglob("*.tmp")), "what a killed save has left is cleared away"
    assert len(deaths) >= 4, f"they died in too few ways: {deaths}"


@pytest.mark.parametrize("name", RUNS)
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_stop_saves_once_and_a_second_one_does_not_break_it(unbroken, tmp_path, name, number):
    whole, events = unbroken(name)
    sent = []

    def stop(event):
        sent.append(event)
        if len(sent) == events // 2 or (len(sent) > events // 2 and event == "inside a save"):
            os.kill(os.getpid(), number)
    code, said = live(name, tmp_path / "run", stop)
    assert code == 128 + number and "the same command goes on from there" in said, said
    code, said = live(name, tmp_path / "run")
    assert code == 0 and "going on from task" in said, said
    assert_same_end(whole, tmp_path / "run")


def broken_off(name, folder, at):
    """A run killed before the at-th optimizer step of its life."""
    steps = 0

    def kill(event):
        nonlocal steps
        steps += event == "before a step"
        if steps == at:
            os.kill(os.getpid(), signal.SIGKILL)
    assert live(name, folder, kill)[0] == -signal.SIGKILL


@pytest.mark.parametrize("damage", ["cut", "bit", "empty", "gone"])
def test_a_damaged_checkpoint_gives_way_to_the_one_before(unbroken, tmp_path, damage):
    whole, _ = unbroken("train_gd.py")
    broken_off("train_gd.py", tmp_path / "run", 8)
    path = tmp_path / "run/checkpoint.pt"
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 4
    path.write_bytes({"cut": content[:-9], "bit": content, "empty": b"", "gone": b""}[damage])
    if damage == "gone":
        path.unlink()
    code, said = live("train_gd.py", tmp_path / "run")
    assert code == 0 and "going on from task 2, update 2" in said, said
    assert damage == "gone" or ("checkpoint.pt is damaged" in said and "set aside" in said)
    assert_same_end(whole, tmp_path / "run")


@pytest.mark.parametrize("file", ["local2.pt", "replay2.pt"])
def test_a_damaged_part_of_a_jdcl_run_is_named_with_its_cure(unbroken, tmp_path, file):
    whole, _ = unbroken("train_jdcl.py")
    broken_off("train_jdcl.py", tmp_path / "run", 10)  # the second update of stage 2
    (tmp_path / "run" / file).write_bytes(b"PK")
    code, said = live("train_jdcl.py", tmp_path / "run")
    assert code == 2 and f"{file} is damaged" in said and "checkpoint*.pt" in said and "Traceback" not in said
    for path in (tmp_path / "run").glob("checkpoint*.pt"):
        path.unlink()
    code, said = live("train_jdcl.py", tmp_path / "run")
    assert code == 0, said
    assert_same_end(whole, tmp_path / "run")


# ---------------------------------------------------------------------------------------- disk, numbers and memory

def full_disk(write, content):
    write(content[:1000])
    if len(content) > 1000:
        raise OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize("trouble, sentence", [
    ("full disk", "No space left on device"), ("vanished folder", "No such file or directory"),
    ("loss", "task 2 has diverged by update 3 .*loss_replay nan"),
    ("gradient", "task 2 has diverged by update 3 .*gradient_norm inf"), ("memory", "lower --batch-size")])
def test_trouble_ends_with_a_sentence_and_the_same_command_goes_on(unbroken, tmp_path, trouble, sentence):
    whole, _ = unbroken("train_gd.py")
    folder, steps = tmp_path / "run", 0

    def make_trouble(event):
        nonlocal steps
        steps += event == "after a step"
        if steps < 6 or event != "after a step":  # four updates of task 1, two of task 2
            return
        if trouble == "full disk":
            writes_by(full_disk)
        elif trouble == "vanished folder":
            shutil.copytree(folder, tmp_path / "kept", dirs_exist_ok=True)
            shutil.rmtree(folder)
        elif trouble == "memory":
            def full(*arguments):
                raise torch.OutOfMemoryError("CUDA out of memory")
            ddim.predict = full
        elif trouble == "loss" and steps == 6:
            mse, calls = F.mse_loss, iter([1, float("nan")])
            F.mse_loss = lambda a, b: mse(a, b) * next(calls, 1)
        elif trouble == "gradient" and steps == 6:
            clip = torch.nn.utils.clip_grad_norm_

            def explode(parameters, most):
                parameters = list(parameters)
                parameters[0].grad.fill_(float("inf"))
                torch.nn.utils.clip_grad_norm_ = clip
                return clip(parameters, most)
            torch.nn.utils.clip_grad_norm_ = explode
    code, said = live("train_gd.py", folder, make_trouble)
    assert code == 2 and "Traceback" not in said, said
    errors = [line for line in said.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1 and re.search(sentence, errors[0]), said
    if trouble == "vanished folder":
        (tmp_path / "kept").rename(folder)
    code, said = live("train_gd.py", folder)
    assert code == 0 and "going on from task 2" in said, said
    assert_same_end(whole, folder)


# ----------------------------------------------------------------------------------------------- several processes

def processes(name, folder, n, more=(), happen=lambda rank, event: None):
    """n processes of one run as torchrun would start them; their exit codes and what they printed."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    module, arguments = RUNS[name]
    logs = [folder.with_suffix(f".{rank}.log") for rank in range(n)]

    def process(rank):
        os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), RANK=str(rank), WORLD_SIZE=str(n),
                          LOCAL_RANK=str(rank), TORCHELASTIC_RUN_ID="test")
        run.rank, run.world = rank, n
        at_events(lambda event: happen(rank, event))
        run.main(lambda: module.main([*arguments, *more, "--out", str(folder)]))
    pids = [fork(functools.partial(process, rank), log) for rank, log in enumerate(logs)]
    return [ended(pid) for pid in pids], [log.read_text() for log in logs]


@pytest.mark.parametrize("name, more", [
    ("train_gr.py", []), ("train_gd.py", []), ("train_ewc.py", []), ("train_gd.py", ["--distill", "noise"]),
    ("train_gd.py", ["--distill", "current"]), ("train_gr.py", ["--replay", "buffer", "--buffer-size", "7"])])
def test_two_processes_follow_one(tmp_path, name, more):
    """The losses of every update are those of one process, to float error, which Adam's first steps enlarge."""
    module, arguments = RUNS[name]
    single = fork(lambda: module.main([*arguments, *more, "--out", str(tmp_path / "one")]), tmp_path / "one.log")
    assert ended(single) == 0, (tmp_path / "one.log").read_text()
    codes, said = processes(name, tmp_path / "two", 2, more)
    assert codes == [0, 0], said
    assert "finished" in said[0] and said[1] == "", "the first process speaks and writes for all"
    one, two = ([json.loads(line) for line in (tmp_path / where / "metrics.jsonl").read_text().splitlines()]
                for where in ("one", "two"))
    assert len(one) == len(two)
    for a, b in zip(one, two):
        for key in ("loss", "loss_new", "loss_replay", "gradient_norm"):
            first = a["task"] == 1 and a["update"] == 1
            assert a[key] == pytest.approx(b[key], rel=1e-5 if first else 0.02, abs=1e-6), (a, b)
    for k in (1, 2, 3):
        a, b = (torch.load(tmp_path / where / f"task{k}.pt", weights_only=True)["model"] for where in ("one", "two"))
        assert max((a[key] - b[key]).abs().max().item() for key in a) < 0.01
    assert json.loads((tmp_path / "two/config.json").read_text())["processes"] == 2


def test_jdcl_on_two_processes(tmp_path):
    """Its head's dropout differs between processes, its replay and its first losses of the denoiser do not."""
    codes, said = processes("train_jdcl.py", tmp_path / "two", 2)
    assert codes == [0, 0], said
    one = live("train_jdcl.py", tmp_path / "one")
    assert one[0] == 0, one[1]
    first = [json.loads((tmp_path / where / "metrics.jsonl").read_text().splitlines()[0]) for where in ("one", "two")]
    assert first[0]["denoise"] == pytest.approx(first[1]["denoise"], rel=1e-5)
    assert first[0]["ce"] == pytest.approx(first[1]["ce"], rel=0.1)
    sizes = [len(torch.load(tmp_path / where / "replay2.pt", weights_only=True)["labels"]) for where in ("one", "two")]
    assert sizes == [320, 320]


def test_a_lost_process_ends_the_run_with_a_sentence(unbroken, tmp_path):
    """The second of two is killed; the first says so, and the run goes on later, even alone."""
    steps = 0

    def die(rank, event):
        nonlocal steps
        steps += event == "before a step"
        if rank == 1 and steps == 6:
            os.kill(os.getpid(), signal.SIGKILL)
    codes, said = processes("train_gd.py", tmp_path / "run", 2, happen=die)
    assert codes == [2, -signal.SIGKILL], said
    assert "error: another process of this run has ended" in said[0] and "Traceback" not in said[0]
    code, said = live("train_gd.py", tmp_path / "run")
    assert code == 0 and "going on from task 2" in said and "begun with processes 2, now 1" in said, said


def test_torchrun(tmp_path):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2",
               str(ROOT / "train_gd.py"), *COMMON, "--iterations", "1", "--tasks", "1", "--class-order", "0,1",
               "--out", "run"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("is finished") == 1 and (tmp_path / "run/task1.pt").exists()
