"""Other machines: Windows and macOS, network disks, launchers, consoles, as far as this one can take their part."""

import errno
import json
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT

import run
import train_gd

TINY = "--dataset shapes --scale laptop --iterations 1 --tasks 1 --batch-size 8 --sample-steps 1 --device cpu".split()
ALONE = [*TINY, "--out", "run"]


def test_no_script_needs_a_module_that_windows_lacks(script, tmp_path):
    """Without fcntl and resource a run trains, is locked, and knows nothing of its memory."""
    (tmp_path / "windows.py").write_text("""
import sys
sys.modules.update(fcntl=None, resource=None, pwd=None, grp=None, termios=None)
import eval_fid, report, run, train_classifier, train_gd, train_gr, train_jdcl
run.main(lambda: train_gd.main(sys.argv[1:]))
""")
    script(tmp_path / "windows.py", *ALONE, PYTHONPATH=str(ROOT))
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
    fcntl = pytest.importorskip("fcntl")

    def flock(*arguments):
        raise OSError(code, "No locks available")
    monkeypatch.setattr(fcntl, "flock", flock)
    done = main("train_gr.py", *ALONE)
    assert done.stderr.count("cannot be locked") == 1


@pytest.mark.parametrize("environment", [
    {"RANK": "1"}, {"RANK": "1", "WORLD_SIZE": "2"}, {"WORLD_SIZE": ""}, {"LOCAL_RANK": "3", "RANK": "x"}])
def test_a_launchers_leftovers_do_not_make_a_run_that_writes_nothing(script, tmp_path, environment):
    done = script("train_gr.py", *ALONE, **environment)
    assert "is finished" in done.stdout, done.stderr
    assert (tmp_path / "run/task1.pt").exists()


@pytest.mark.parametrize("name, cards, mps, device", [
    ("auto", 3, False, "cuda"), ("cuda", 3, False, "cuda"), ("cuda:2", 3, False, "cuda:2"), ("auto", 0, True, "mps"),
    ("auto", 0, False, "cpu")])
def test_a_device_by_any_name_is_one_that_torch_takes(monkeypatch, name, cards, mps, device):
    chosen = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cards > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: cards)
    monkeypatch.setattr(torch._C, "_cuda_setDevice", chosen.append)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: mps)
    found = run.pick_device(name)
    assert found == torch.device(device) and chosen == [found.index or 0] * (found.type == "cuda")


def test_more_processes_than_cards_are_refused_by_each(monkeypatch):
    for name, value in dict(is_available=True, device_count=2).items():
        monkeypatch.setattr(torch.cuda, name, lambda value=value: value)
    monkeypatch.setattr(run, "world", 3)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "3")
    for rank in "012":
        monkeypatch.setenv("LOCAL_RANK", rank)
        with pytest.raises(run.InputError, match="there are 2 CUDA devices: start 2 processes at most"):
            run.pick_device("auto")


@pytest.mark.parametrize("device, lacks, asked, found", [
    ("cuda", "", "", "bf16 True"), ("cuda", "bf16", "", "fp32 False"), ("cuda", "compiler", "", "bf16 False"),
    ("cuda", "triton", "", "bf16 False"), ("cuda", "", "--precision fp32 --no-compile", "fp32 False"),
    ("cuda", "", "--precision tf32", "tf32 True"), ("cuda", "bf16", "--precision bf16", "bf16 False"),
    ("cuda", "bf16", "--compile", "fp32 True"), ("cpu", "", "", "fp32 False"), ("mps", "", "", "fp32 False"),
    ("cpu", "compiler", "--compile", "use --no-compile"), ("cuda", "compiler", "--compile", "use --no-compile"),
    ("cuda", "triton", "--compile", "use --no-compile"), ("mps", "", "--compile", "use --no-compile"),
    ("mps", "", "--precision bf16", "mps; use fp32")])
def test_what_is_fast_is_the_default_where_it_can_be_had(monkeypatch, device, lacks, asked, found):
    which, find_spec = run.shutil.which, run.importlib.util.find_spec
    monkeypatch.setattr(run, "pick_device", lambda name: torch.device(device))
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: (
        lacks != "bf16" or including_emulation))
    monkeypatch.setattr(run.shutil, "which", lambda name: None if lacks == "compiler" else which(name))
    monkeypatch.setattr(run.importlib.util, "find_spec", lambda name: None if lacks == name else find_spec(name))
    args = train_gd.get_args(asked.split())
    try:
        run.start(args)
        said = f"{args.precision} {args.compile}"
    except run.InputError as error:
        said = str(error)
    assert said.endswith(found)


def test_a_console_of_few_letters_takes_all_output(script, tmp_path):
    few = dict(PYTHONIOENCODING="ascii", PYTHONUTF8="0")
    script("train_gr.py", *ALONE, **few)
    done = script("report.py", ".", "--no-figures", **few)
    assert "?" in done.stdout, done.stderr
    assert "±" in (tmp_path / "report.md").read_text(encoding="utf-8")


def test_what_bitwise_depends_on_is_noted_and_said(main, monkeypatch, tmp_path):
    main("train_gr.py", *ALONE)  # by --device auto
    config = json.loads((tmp_path / "run/config.json").read_text())
    assert "begun with" not in main("train_gr.py", *ALONE, "--device", config["device"]).stderr
    assert config["threads"] == torch.get_num_threads() and config["processor"] and config["torch"]
    monkeypatch.setattr(torch, "get_num_threads", lambda: 64)
    done = main("train_gr.py", *ALONE)
    assert f"begun with threads {config['threads']}, now 64" in done.stderr


@pytest.mark.parametrize("file, sentence", [
    ("a.safetensors", "safetensors"), ("old.pt", "torch before 1.6"), ("nan.pt", "not finite"),
    ("other.pt", "it belongs to another --unet"), ("cut.pt", "damaged")])
def test_what_is_wrong_with_a_file_of_weights_is_said(main, tmp_path, file, sentence):
    main("train_gr.py", *ALONE)
    weights = torch.load(tmp_path / "run/task1.pt", weights_only=True)["model"]
    (tmp_path / "a.safetensors").write_bytes((40).to_bytes(8, "little") + b'{"conv_in.weight": {"dtype": "F32"}}    ')
    torch.save(weights, tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    torch.save({**weights, "conv_in.bias": weights["conv_in.bias"] * float("nan")}, tmp_path / "nan.pt")
    torch.save({f"module.{name}": value for name, value in weights.items()}, tmp_path / "other.pt")
    (tmp_path / "cut.pt").write_bytes((tmp_path / "nan.pt").read_bytes()[:-100])
    done = main("train_gr.py", *TINY, "--out", "second", "--init", file, code=2)
    assert sentence in done.stderr and file in done.stderr and not (tmp_path / "second").exists()


@pytest.mark.parametrize("says", ["[print('x', flush=True) or time.sleep(0.01) for _ in range(500)]", "print('x')"])
def test_a_reader_that_has_read_enough_ends_a_script_in_silence(monkeypatch, says):
    """As `| head -1` does, while the script prints or, with little to say, before."""
    monkeypatch.delenv("PYTHONUNBUFFERED", raising=False)
    command = [sys.executable, "-c", f"import run, time; print(flush=True); time.sleep(1); run.main(lambda: {says})"]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        process.stdout.readline()
        process.stdout.close()
        assert process.stderr.read() == b"" and process.wait() == 141
