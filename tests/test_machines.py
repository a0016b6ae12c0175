"""Other machines: Windows and macOS, network disks, launchers, consoles, as far as this one can take their part.

Run: python -m pytest tests/test_machines.py
"""

import errno
import json
import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT

import run

TINY = "--dataset shapes --scale laptop --iterations 1 --tasks 1 --batch-size 8 --sample-steps 1 --device cpu".split()
ALONE = [*TINY, "--out", "run"]


def python(folder, code, *arguments, **environment):
    """Run `code` with the scripts in reach; environment variables may be None, which takes them away."""
    variables = {**os.environ, "PYTHONPATH": str(ROOT), **environment}
    variables = {name: value for name, value in variables.items() if value is not None}
    command = [sys.executable, *(["-c", code] if code else []), *map(str, arguments)]
    return subprocess.run(command, cwd=folder, env=variables, capture_output=True, text=True,
                          encoding="utf-8", errors="replace")


def test_no_script_needs_a_module_that_windows_lacks(tmp_path):
    """Without fcntl and resource a run trains, is locked, and knows nothing of its memory."""
    code = """
import sys
sys.modules.update(fcntl=None, resource=None, pwd=None, grp=None, termios=None)
import eval_fid, report, run, train_classifier, train_gd, train_gr, train_jdcl
run.main(lambda: train_gd.main(sys.argv[1:]))
"""
    done = python(tmp_path, code, *ALONE)
    assert done.returncode == 0, done.stderr
    record = json.loads((tmp_path / "run/metrics.jsonl").read_text().splitlines()[0])
    assert record["peak_memory_mb"] is None


@pytest.mark.parametrize("platform, unit", [("darwin", 2**20), ("linux", 2**10)])
def test_peak_memory_is_in_megabytes_everywhere(monkeypatch, platform, unit):
    usage = SimpleNamespace(ru_maxrss=300 * unit)
    monkeypatch.setitem(sys.modules, "resource", SimpleNamespace(getrusage=lambda who: usage, RUSAGE_SELF=0))
    monkeypatch.setattr(sys, "platform", platform)
    assert run.peak_memory_mb(torch.device("cpu")) == 300


@pytest.mark.parametrize("code", [errno.ENOLCK, errno.EOPNOTSUPP, 524])
def test_a_folder_that_cannot_be_locked_is_said_once(main, monkeypatch, code):
    """On some network disks. The run goes on."""
    fcntl = pytest.importorskip("fcntl")

    def flock(*arguments):
        raise OSError(code, "No locks available")
    monkeypatch.setattr(fcntl, "flock", flock)
    done = main("train_gr.py", *ALONE)
    assert done.returncode == 0 and done.stderr.count("cannot be locked") == 1


@pytest.mark.parametrize("environment", [
    {"RANK": "1"}, {"RANK": "1", "WORLD_SIZE": "2"}, {"WORLD_SIZE": ""}, {"LOCAL_RANK": "3", "RANK": "x"}])
def test_a_launchers_leftovers_do_not_make_a_run_that_writes_nothing(tmp_path, environment):
    done = python(tmp_path, None, ROOT / "train_gr.py", *ALONE, **environment)
    assert done.returncode == 0 and "is finished" in done.stdout, done.stderr
    assert (tmp_path / "run/task1.pt").exists()


def test_mps_is_taken_where_there_is_no_cuda_and_has_fp32_alone(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    args = SimpleNamespace(device="auto", precision="auto", compile=None)
    device, autocast = run.start(args)
    assert (device.type, args.precision, args.compile) == ("mps", "fp32", False) and not autocast._enabled
    for wish in ({"precision": "bf16"}, {"compile": True}):
        with pytest.raises(run.InputError, match="mps"):
            run.start(SimpleNamespace(**{**vars(args), **wish}))
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    assert run.pick_device("auto").type == "cpu"


@pytest.mark.parametrize("device, missing", [("cpu", "compiler"), ("cuda", "compiler"), ("cuda", "triton")])
def test_nothing_is_compiled_where_there_is_no_compiler(monkeypatch, device, missing):
    monkeypatch.setattr(run, "pick_device", lambda name: torch.device(device))
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: True)
    if missing == "compiler":
        monkeypatch.setattr(run.shutil, "which", lambda name: None)
    else:
        monkeypatch.setattr(run.importlib.util, "find_spec", lambda name: None)
    args = SimpleNamespace(device=device, precision="fp32", compile=None)
    run.start(args)
    assert args.compile is False
    with pytest.raises(run.InputError, match="--no-compile"):
        run.start(SimpleNamespace(**{**vars(args), "compile": True}))


@pytest.mark.parametrize("encoding", ["cp1252", "ascii"])
def test_a_console_of_few_letters_takes_all_output(tmp_path, encoding):
    few = dict(PYTHONIOENCODING=encoding, PYTHONUTF8="0")
    assert python(tmp_path, None, ROOT / "train_gr.py", *ALONE, **few).returncode == 0
    done = python(tmp_path, None, ROOT / "report.py", ".", "--no-figures", **few)
    assert done.returncode == 0 and "?" in done.stdout, done.stderr
    assert "±" in (tmp_path / "report.md").read_text(encoding="utf-8")


def test_what_bitwise_depends_on_is_noted_and_said(main, monkeypatch, tmp_path):
    assert main("train_gr.py", *ALONE).returncode == 0
    config = json.loads((tmp_path / "run/config.json").read_text())
    assert config["threads"] == torch.get_num_threads() and config["processor"] and config["torch"]
    monkeypatch.setattr(torch, "get_num_threads", lambda: 64)
    done = main("train_gr.py", *ALONE)
    assert f"begun with threads {config['threads']}, now 64" in done.stderr


@pytest.mark.parametrize("file, sentence", [
    ("a.safetensors", "safetensors"), ("old.pt", "torch before 1.6"), ("nan.pt", "not finite"),
    ("other.pt", "Missing key"), ("cut.pt", "damaged")])
def test_what_is_wrong_with_a_file_of_weights_is_said(main, tmp_path, file, sentence):
    assert main("train_gr.py", *ALONE).returncode == 0
    weights = torch.load(tmp_path / "run/task1.pt", weights_only=True)["model"]
    (tmp_path / "a.safetensors").write_bytes((40).to_bytes(8, "little") + b'{"conv_in.weight": {"dtype": "F32"}}    ')
    torch.save(weights, tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    torch.save({**weights, "conv_in.bias": weights["conv_in.bias"] * float("nan")}, tmp_path / "nan.pt")
    torch.save({f"module.{name}": value for name, value in weights.items()}, tmp_path / "other.pt")
    (tmp_path / "cut.pt").write_bytes((tmp_path / "nan.pt").read_bytes()[:-100])
    done = main("train_gr.py", *TINY, "--out", "second", "--init", file)
    assert done.returncode == 2 and sentence in done.stderr and file in done.stderr
    assert "Traceback" not in done.stderr and not (tmp_path / "second").exists()


@pytest.mark.parametrize("says", ["[print('x', flush=True) or time.sleep(0.01) for _ in range(500)]", "print('x')"])
def test_a_reader_that_has_read_enough_ends_a_script_in_silence(monkeypatch, says):
    """As `| head -1` does, while the script prints or, with little to say, before."""
    monkeypatch.delenv("PYTHONUNBUFFERED", raising=False)
    command = [sys.executable, "-c", f"import run, time; print(flush=True); time.sleep(1); run.main(lambda: {says})"]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        process.stdout.readline()
        process.stdout.close()
        assert process.stderr.read() == b"" and process.wait() == 141
