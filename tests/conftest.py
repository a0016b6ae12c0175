"""Shared by all tests: one thread (two are slower when anything else runs), the repository on the path, the
scripts by subprocess or in this process, and a tally."""

import collections
import importlib
import os
import signal
import subprocess
import sys
from pathlib import Path

os.environ.update(OMP_NUM_THREADS="1", OPENBLAS_NUM_THREADS="1", MKL_NUM_THREADS="1")  # also for the scripts we start
ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import pytest  # noqa: E402
import torch  # noqa: E402

import run  # noqa: E402

torch.set_num_threads(1)


@pytest.fixture
def script(tmp_path):
    """script("train_gd.py", "--scale", "laptop", ...) runs it as a person would, from an empty folder, and returns the
    finished process with its output as text."""
    def run_script(name, *arguments, timeout=300, **more):
        command = [sys.executable, str(ROOT / name), *map(str, arguments)]
        return subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=timeout, **more)
    return run_script


@pytest.fixture
def main(tmp_path, monkeypatch, capfd):
    """main("train_gd.py", ...) is as `script`, but in this process, as the script's last line does it: it takes no
    seconds to start, and a test may have put something in the place of what the script calls."""
    def run_main(name, *arguments):
        monkeypatch.chdir(tmp_path)
        capfd.readouterr()
        module, code = importlib.import_module(name.removesuffix(".py")), 0
        handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            run.main(lambda: module.main([str(argument) for argument in arguments]))
        except SystemExit as leaving:
            code = leaving.code
        finally:
            while run.locks:
                run.locks.pop().release()
            for number, handler in handlers.items():
                signal.signal(number, handler)
        return subprocess.CompletedProcess([name, *arguments], code, *capfd.readouterr())
    return run_main


counts = collections.Counter()


@pytest.fixture
def tally():
    """Counts of what the tests have done to the scripts, printed at the end."""
    return counts


def pytest_sessionfinish(session):
    if hasattr(session.config, "workeroutput"):  # one of pytest-xdist's processes
        session.config.workeroutput["counts"] = dict(counts)


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node, error):
    counts.update(getattr(node, "workeroutput", {}).get("counts", {}))


def pytest_terminal_summary(terminalreporter):
    if counts:
        terminalreporter.write_line(", ".join(f"{name}: {n}" for name, n in sorted(counts.items())))
