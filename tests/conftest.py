"""Shared by all tests: one thread (two are slower when anything else runs), the repository on the path, a helper."""

import collections
import os
import subprocess
import sys
from pathlib import Path

os.environ.update(OMP_NUM_THREADS="1", OPENBLAS_NUM_THREADS="1", MKL_NUM_THREADS="1")  # also for the scripts we start
ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import pytest  # noqa: E402
import torch  # noqa: E402

torch.set_num_threads(1)


@pytest.fixture
def script(tmp_path):
    """script("train_gd.py", "--scale", "laptop", ...) runs it as a person would, from an empty folder, and returns the
    finished process with its output as text."""
    def run(name, *arguments, timeout=300, **more):
        command = [sys.executable, str(ROOT / name), *map(str, arguments)]
        return subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=timeout, **more)
    return run


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
