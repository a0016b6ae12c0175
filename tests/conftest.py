"""Shared by all tests: one thread (two are slower when anything else runs), the repository on the path, the
scripts by subprocess or in this process, folders of pictures and of runs, and a web server."""

import contextlib
import functools
import http.server
import importlib
import json
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

os.environ.update(OMP_NUM_THREADS="1", OPENBLAS_NUM_THREADS="1", MKL_NUM_THREADS="1")  # also for the scripts we start
ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import numpy as np  # noqa: E402
import pytest  # noqa: E402
import torch  # noqa: E402
from PIL import Image  # noqa: E402

import data  # noqa: E402
import run  # noqa: E402
from ddim import reseed  # noqa: E402
from unet import NETS, UNet  # noqa: E402

torch.set_num_threads(1)
data.draw_shapes = functools.cache(data.draw_shapes)  # for the tests of one process


def ended(done, code):
    """The finished process if it has this exit code, and with 2 one sentence."""
    assert done.returncode == code and "Traceback" not in done.stderr, done.stderr
    assert code != 2 or done.stderr.count("error: ") == 1, done.stderr
    return done


@pytest.fixture
def script(tmp_path):
    """script("train_gd.py", "--scale", "laptop", ...) runs it as a person would, from an empty folder, and returns the
    finished process with its output as text; RANK="1" sets an environment variable, RANK=None takes it away."""
    def run_script(name, *arguments, code=0, timeout=300, **environment):
        variables = {key: value for key, value in {**os.environ, **environment}.items() if value is not None}
        command = [sys.executable, str(ROOT / name), *map(str, arguments)]
        return ended(subprocess.run(command, cwd=tmp_path, env=variables, capture_output=True, encoding="utf-8",
                                    errors="replace", timeout=timeout), code)
    return run_script


@contextlib.contextmanager
def left_alone():
    """After a run in this process its locks are released and signals forgotten, and handled as before."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        while run.locks:
            run.locks.pop().release()
        run.signals.clear()
        for number, handler in handlers.items():
            signal.signal(number, handler)


@pytest.fixture
def main(tmp_path, monkeypatch, capfd):
    """main("train_gd.py", ...) is as `script`, but in this process: it takes no seconds to start, and a test may have
    put something in the place of what the script calls."""
    def run_main(name, *arguments, code=0):
        monkeypatch.chdir(tmp_path)
        capfd.readouterr()
        module, found = importlib.import_module(name.removesuffix(".py")), 0
        with left_alone():
            try:
                run.main(lambda: module.main([str(argument) for argument in arguments]))
            except SystemExit as leaving:
                found = leaving.code
        return ended(subprocess.CompletedProcess([name, *arguments], found, *capfd.readouterr()), code)
    return run_main


def write_pictures(folder, images, suffix=".png"):
    """000.png, ... of these uint8 arrays, or of so many of noise, in a new folder."""
    if isinstance(images, int):
        images = np.random.default_rng(images).integers(0, 256, (images, 20, 20), dtype=np.uint8)
    folder.mkdir(parents=True)
    for i, image in enumerate(images):
        Image.fromarray(image).save(folder / f"{i:03}{suffix}")


@pytest.fixture
def fake_run(tmp_path):
    """fake_run("where") makes a finished run folder of two tasks on shapes, whose models are untrained."""
    def make(where="run", classes=0, **changes):
        folder = tmp_path / where
        folder.mkdir()
        config = dict(dataset="shapes", scale="laptop", seed=42, class_tasks=[[0, 1], [2, 3]], schedule="zero-snr",
                      class_names=data.info("shapes").classes, unet="laptop", data_dir="data", image_size=16,
                      flip=False, sample_steps=2, name="gd-2-laptop", title="Generative distillation",
                      base="gd-2", method="gd", departs={}) | changes
        (folder / "config.json").write_text(json.dumps(config))
        for k in (1, 2):
            reseed("generator", k)
            model = UNet(**NETS.get(config["unet"], NETS["laptop"]), classes=classes)
            model.conv_out.weight.data *= 20  # else all untrained nets draw much the same
            run.save(folder / f"task{k}.pt", {"model": model.state_dict(), "config": config})
        return folder
    return make


@pytest.fixture
def server(tmp_path):
    """The address of a web server that offers what lies in tmp_path/server; it hangs up amid a file called half."""
    class Handler(http.server.SimpleHTTPRequestHandler):
        def copyfile(self, source, outputfile):
            content = source.read()
            outputfile.write(content[:len(content) // 2] if self.path == "/half" else content)
    (tmp_path / "server").mkdir()
    handler = functools.partial(Handler, directory=tmp_path / "server")
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}/"
        server.shutdown()
