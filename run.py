"""What a run is, and nothing of what it computes: arguments, speed, processes, folder, resume, save, stop, progress.

A line that could change a number in a paper's table does not stand here (but what --precision auto is); a line that an
MNIST classifier would need as well does. A run folder holds

    config.json          every argument, written before the first update
    metrics.jsonl        one JSON object a line, a record every few updates
    samples/task<k>.png  a picture after each task
    task<k>.pt           {"model": state dict, "config": dict} after each task, all that later steps need
    checkpoint.pt        inside a task: models, optimizer, position; checkpoint.old.pt is the one before
"""

import argparse
import errno
import fcntl
import gc
import json
import os
import pickle
import re
import resource
import shlex
import signal
import sys
import time
import zipfile
import zlib
from contextlib import nullcontext
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from tqdm import tqdm

MACHINE = ("data_dir", "out", "device", "compile", "save_every", "restart", "command", "torch",
           "processes")  # not the mathematics
rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))  # torchrun tells the process
locks, signals = [], []  # of this process: the run folders it holds, the signals that asked it to stop
last_save = time.monotonic()


class InputError(ValueError):
    """A person's mistake, told in one sentence that says what to do; `main` prints it and exits with code 2."""


class LostProcess(RuntimeError):
    """Another process of the run has ended."""


def main(function):
    """Run a script's main: a person's mistake ends it with one sentence and exit code 2, never with a traceback."""
    try:
        function()
        if dist.is_initialized():
            dist.destroy_process_group()
        return
    except InputError as error:
        if rank:  # the first process tells it, and all meet with it
            sys.exit(2)
        sentence, code = f"error: {error}", 2
    except LostProcess as error:
        if signals:
            sys.exit(128 + signals[0])
        sentence, code = f"error: process {rank}: {error}", 2
    except torch.OutOfMemoryError:
        sentence, code = "error: out of device memory; lower --batch-size or use --precision bf16", 2
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.ENOENT):
            raise
        sentence, code = f"error: {error}; make room or mend the folder, and the same command goes on", 2
    except KeyboardInterrupt:
        sentence, code = "stopped", 130
    except RuntimeError as error:
        if "can't allocate memory" not in str(error):
            raise
        sentence, code = "error: out of memory; lower --batch-size", 2
    print(sentence, file=sys.stderr)
    sys.exit(code)


# -------------------------------------------------------------------------------------------------- arguments

def add_arguments(parser):
    """The arguments that say where and how a run happens, the same for every train script."""
    parser.add_argument("--data-dir", default="data", help="where the dataset lies or is downloaded to (default: data)")
    parser.add_argument("--out", help="the run folder itself (default: runs/<dataset>/<name>/seed<seed>)")
    parser.add_argument("--device", default="auto", help="auto (CUDA if there is one), cpu, cuda or cuda:<i>")
    parser.add_argument("--save-every", type=interval, default=("minutes", 10.0), metavar="500|10m",
                        help="checkpoint inside a task every so many updates (500) or minutes (10m, the default)")
    parser.add_argument("--restart", action="store_true", help="delete what the run folder holds and start over")


def positive(kind, most=sys.float_info.max):
    """A type for argparse: a finite number of that kind, int or float, above 0 and at most `most`."""
    def parse(text):
        if not 0 < kind(text) <= most:
            raise argparse.ArgumentTypeError(f"must be above 0 and at most {most:g}, not {text}")
        return kind(text)
    parse.__name__ = f"positive {kind.__name__}"  # argparse names it when the text is no number
    return parse


def per_task(kind):
    """A type for argparse: one positive number, or several with commas, one per task."""
    def parse(text):
        return [positive(kind, 1e8)(part) for part in text.split(",")]
    parse.__name__ = f"comma-separated {kind.__name__}"
    return parse


def spread(values, tasks):
    """One value per task from what `per_task` read: the last one repeats."""
    return (values + values[-1:] * tasks)[:tasks]


def whole(text):
    """A type for argparse: a seed, an int from 0 to 2^63 - 1."""
    if not 0 <= int(text) < 2**63:
        raise argparse.ArgumentTypeError(f"must be 0 to 2^63 - 1, not {text}")
    return int(text)


def interval(text):
    """A type for argparse: "500" -> ("updates", 500.0), "10m" -> ("minutes", 10.0)."""
    if not re.fullmatch(r"\d+|\d*\.?\d+m", text) or not 0 < float(text.rstrip("m")) < 1e9:
        raise argparse.ArgumentTypeError(f"say 500 for updates or 10m for minutes, not {text}")
    return ("minutes", float(text[:-1])) if text.endswith("m") else ("updates", float(text))


def fill(args, preset):
    """Give every argument left at None its value from the preset; the command line wins."""
    for key, value in preset.items():
        if getattr(args, key, None) is None:
            setattr(args, key, value)


def run_name(base, args, preset):
    """`base` and whatever departs from the preset: gd-2, gd-2-lam0.5, gd-2-laptop, finetune-lr0.001-linear-noflip."""
    for key, usual in preset.items():
        value = getattr(args, key)
        if value != usual and value not in (None, []):
            value = ",".join(map(str, value)) if isinstance(value, list) else str(value)
            tag = value if key in ("scale", "schedule", "precision") else f"{key}{value}"
            tag = {"True": key, "False": f"no{key}"}.get(value, tag.replace("|", "-"))
            base += "-" + re.sub(r"[^\w.-]+", "_", tag)
    return base


def pick_device(name):
    """The torch.device called auto, cpu, cuda or cuda:<i>; auto is CUDA where there is one."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if not re.fullmatch(r"cpu|cuda(:\d+)?", name):
        raise InputError(f"--device must be auto, cpu, cuda or cuda:<i>, not {name}")
    if world > 1 and name == "cuda":
        name = f"cuda:{os.environ['LOCAL_RANK']}"
    device = torch.device(name)
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise InputError(f"--device {name} is not there, torch sees {torch.cuda.device_count()} CUDA devices; "
                         "use --device cpu, or fewer processes")
    if device.type == "cuda":
        torch.cuda.set_device(device.index or 0)
    if world > 1:
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=timedelta(hours=1))
        if rank:  # the first process speaks for all
            sys.stdout = open(os.devnull, "w")
    return device


# ------------------------------------------------------------------------------------------------------ speed

def pick_speed(args, device):
    """Say what --precision auto is, and --compile where nothing was said: bf16 and compiled on a GPU that has bf16
    (from NVIDIA's Ampere on), else fp32 and not.
    """
    fast = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    if args.precision == "auto":
        args.precision = "bf16" if fast else "fp32"
    fill(args, {"compile": fast})
    if args.compile:
        torch._dynamo.config.recompile_limit = 64  # a small buffer makes another batch in every task


def eager(now=True):
    """`with eager(now):` what torch.compile has compiled runs, if `now`, as if it had not: for a rare shape."""
    return torch.compiler.set_stance("force_eager") if now else nullcontext()


class CUDAGraph:
    """function(*inputs), CUDA tensors, as one CUDA graph: all its kernels are launched at once.

    The first three calls run as usual, so that kernels are chosen and compiled, the fourth is recorded, and from then
    on the record is played with new inputs; inputs smaller than the largest so far run as usual. The function may
    not wait for the device, nor depend on anything else that changes, other than in place, but for torch's seed. The
    returned tensor holds until the next call.
    """

    def __init__(self, function):
        self.function, self.shapes, self.calls, self.graph = function, None, 0, None
        self.stream = torch.cuda.Stream()  # not the usual one, as torch.cuda.graph demands of the calls before

    def __call__(self, *inputs):
        shapes = [x.shape for x in inputs]
        if not self.shapes or shapes > self.shapes:
            self.shapes, self.calls, self.graph = shapes, 0, None
        if shapes < self.shapes:
            return self.function(*inputs)
        self.calls += 1
        if self.calls <= 3:
            self.stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(self.stream):
                output = self.function(*inputs)
            torch.cuda.current_stream().wait_stream(self.stream)
            return output
        if self.graph is None:
            self.inputs, self.graph = [x.clone() for x in inputs], torch.cuda.CUDAGraph()
            gc.collect()  # now, as nothing may be freed while recording
            with torch.cuda.graph(self.graph, stream=self.stream):  # computes nothing yet
                self.output = self.function(*self.inputs)
        for mine, given in zip(self.inputs, inputs):
            mine.copy_(given)
        self.graph.replay()
        return self.output


# -------------------------------------------------------------------------------------------------- processes

def share(x):
    """The rows rank, rank + world, ... of a batch (B, ...), this process's share; all of them if they do not divide
    evenly, so that a mean over the batch is always the mean of the processes' means.

    Every process draws all random numbers of an update, for the whole batch, and computes with its rows alone: so N
    processes follow one. Old images before new ones stay so in each share.
    """
    return x[rank::world] if len(x) % world == 0 else x


def gather(x, n):
    """The whole batch (n, ...) of which every process has its share x."""
    if len(x) == n:
        return x
    whole = x.new_zeros(n, *x.shape[1:])
    whole[rank::world] = x
    together(dist.all_reduce, whole)
    return whole


def average(model, losses):
    """The losses, scalars, of the whole batch, (len(losses),), from those of each process's share; the gradients
    likewise, in place.
    """
    losses = torch.stack(losses).detach().float()
    if world > 1:
        gradients = [p.grad for p in model.parameters() if p.grad is not None]
        flat = torch.cat([losses, *(g.flatten() for g in gradients)]) / world
        together(dist.all_reduce, flat)
        losses, flat = flat.split([len(losses), len(flat) - len(losses)])
        for g, mean in zip(gradients, flat.split([g.numel() for g in gradients])):
            g.copy_(mean.view_as(g))
    return losses


def together(operation, *arguments):
    """One of torch.distributed's collective operations, or nothing in a run of one process."""
    try:
        if world > 1:
            operation(*arguments)
    except RuntimeError as error:  # of gloo and NCCL alike
        lost = "another process of this run has ended; the same command goes on from the last checkpoint"
        raise LostProcess(lost) from error


# -------------------------------------------------------------------------------------------- folder and files

def open_folder(config):
    """Make or reopen the run folder of `config` and return its path; refuse one that holds another run or is in use.

    From here on Ctrl-C and SIGTERM only leave a note in `signals`: a run ends after a whole update and a save.
    """
    about = dict(command=shlex.join(["python", *sys.argv]), torch=torch.__version__, processes=world)
    config = json.loads(json.dumps(dict(config, **about)))
    folder = Path(config["out"] or Path("runs", config["dataset"], config["name"], f"seed{config['seed']}"))
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda number, frame: signals.append(number))
    if rank:
        return folder
    try:
        (folder / "samples").mkdir(parents=True, exist_ok=True)
        lock = open(folder / ".lock", "a+")
    except OSError as error:
        raise InputError(f"cannot write to {folder} ({error.strerror}); choose another folder with --out") from error
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # falls with the process, however that ends
    except BlockingIOError as error:
        lock.seek(0)
        raise InputError(f"{folder} is in use by process {lock.read()}; wait for it or choose another --out") from error
    lock.truncate(0)
    lock.write(str(os.getpid()))
    lock.flush()
    locks.append(lock)

    if config["restart"]:
        for pattern in ("config.json", "metrics.jsonl", "eval.json", "classifier.json", "accuracy.json", "task*.pt",
                        "local*.pt", "replay*.pt", "checkpoint*", "samples/*.png"):
            for path in folder.glob(pattern):
                path.unlink()
    for path in [*folder.glob("*.tmp"), *folder.glob("samples/*.tmp")]:  # left by a save that was killed
        path.unlink()
    if not (folder / "config.json").exists():
        if any(folder.glob("*.pt")):
            raise InputError(f"{folder} holds weights but no config.json; choose another --out or use --restart")
        write_json(folder / "config.json", config)
    try:
        before = dict(json.loads((folder / "config.json").read_text()))
    except (ValueError, TypeError) as error:
        raise InputError(f"{folder}/config.json is damaged; choose another --out or use --restart") from error
    differs = [f"{key} was {before.get(key)} and is {config.get(key)}"
               for key in sorted({*before, *config} - {*MACHINE}) if before.get(key) != config.get(key)]
    if differs:
        raise InputError(f"{folder} holds a run with other settings ({'; '.join(differs)}); choose another --out, "
                         "or --restart to delete it")
    for key in ("torch", "device", "compile", "processes"):
        if before.get(key, 1) != config[key]:
            print(f"begun with {key} {before.get(key)}, now {config[key]}: the end need not be bitwise that of an "
                  "unbroken run", file=sys.stderr)
    return folder


def save(path, state):
    """torch.save that leaves either the old file or the new one, never a part: write aside, flush to disk, rename.

    Of several processes the first writes, and all wait for it.
    """
    replace(path, lambda file: torch.save(state, file))
    together(dist.barrier)


def write_json(path, value):
    """json.dump, as safe as `save`."""
    replace(path, lambda file: file.write((json.dumps(value, indent=1, allow_nan=False) + "\n").encode()))


def save_png(path, picture):
    """Save a PIL image, as safe as `save`."""
    replace(path, lambda file: picture.save(file, "PNG"))


def replace(path, write):
    """Replace the file at `path` by what write(file) writes, all or nothing; only the first process does it."""
    if rank:
        return
    path = Path(path)
    tmp = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        with open(tmp, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(tmp, path)
    except (OSError, RuntimeError) as error:  # torch.save makes a RuntimeError of a full disk
        tmp.unlink(missing_ok=True)
        reason = error.__context__ if isinstance(error.__context__, OSError) else error
        raise InputError(f"cannot write {path} ({str(reason).splitlines()[0]}); what was saved before is intact: make "
                         "room or mend the folder, and the same command goes on from there") from error


def load(path):
    """torch.load to the CPU of tensors and plain values alone, every byte checked against the file's checksums."""
    try:
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()  # torch.load would not notice a flipped bit
        if not damaged:
            return torch.load(path, map_location="cpu", weights_only=True)
        reason = f"{damaged} fails its checksum"
    except FileNotFoundError as error:
        raise InputError(f"there is no file {path}") from error
    except pickle.UnpicklingError:
        reason = "it holds more than tensors and plain values, and nothing of it was executed"
    except (OSError, RuntimeError, ValueError, EOFError, KeyError, zipfile.BadZipFile, zlib.error) as error:
        reason = str(error).partition("\n")[0]
    raise InputError(f"{path} is damaged or was not made by torch.save ({reason})")


def load_weights(model, path):
    """Load a task<k>.pt, or a bare state dict such as a diffusers .bin, into the model; every name must match."""
    weights = load(path)
    try:
        model.load_state_dict(weights.get("model", weights))
    except (RuntimeError, AttributeError, TypeError) as error:
        raise InputError(f"{path} holds no weights for this network; choose the matching --unet") from error


def save_due(every, update):
    """Whether to save after this update: `every` is ("minutes", x) or ("updates", x); at once if asked to stop."""
    global last_save
    if rank:  # only the first process saves
        return False
    minutes = (time.monotonic() - last_save) / 60
    due = minutes > every[1] if every[0] == "minutes" else update % int(every[1]) == 0
    if due:
        last_save = time.monotonic()
    return due or bool(signals)


def save_checkpoint(folder, state):
    """Save the state inside a task (`task`, `update`, the number done, and whatever else), keep the checkpoint before,
    and leave with exit code 130 or 143 if Ctrl-C or SIGTERM asked for it.
    """
    if rank:
        return
    if (folder / "checkpoint.pt").exists():
        os.replace(folder / "checkpoint.pt", folder / "checkpoint.old.pt")
    replace(folder / "checkpoint.pt", lambda file: torch.save(state, file))
    exit_if_stopped(f"task {state['task']}, update {state['update']}")


def exit_if_stopped(where):
    """Leave with exit code 130 or 143 if Ctrl-C or SIGTERM asked for it; everything up to `where` is saved."""
    if signals and not rank:
        print(f"stopped after {where}; the same command goes on from there", file=sys.stderr)
        sys.exit(128 + signals[0])


def finish(folder):
    """Say that the run is finished, and remove its checkpoints, which nothing needs any more."""
    for path in [] if rank else folder.glob("checkpoint*.pt"):
        path.unlink()
    print(f"{folder} is finished (--restart does it again); next: python eval_fid.py {shlex.quote(str(folder))}")


def latest(folder, tasks):
    """The newest whole state of a run or None: a checkpoint inside a task, or {"task", "update": 0, "model"} after one.

    Damaged files are set aside, so that no later save puts them in the place of a good one.
    """
    if rank:
        together(dist.barrier)  # the first process looks first, and sets aside
    state, damaged = None, []
    newest = max((k for k in range(1, tasks + 1) if (folder / f"task{k}.pt").exists()), default=0)
    checkpoints = [path for path in (folder / "checkpoint.pt", folder / "checkpoint.old.pt") if path.exists()]
    if newest == tasks:  # the run is finished
        checkpoints = []
    for path in [*checkpoints, *(folder / f"task{k}.pt" for k in range(newest, 0, -1))]:
        try:
            found = load(path)
        except InputError as error:
            damaged.append((path, error))
            continue
        if path not in checkpoints:
            state = {"task": int(path.stem[4:]) + 1, "update": 0, "model": found["model"]}
        elif found["task"] > newest:
            state = found
        if state:
            break
    if damaged and not state:
        raise InputError(f"{damaged[0][1]}, and there is no other to go on from; start over with --restart")
    for path, error in damaged:
        path.rename(path.with_name(path.name + ".damaged"))
        print(f"{error}; it is set aside", file=sys.stderr)
    if state and state["task"] <= tasks:
        print(f"going on from task {state['task']}, update {state['update']}")
    if not rank:
        together(dist.barrier)
    return state


# --------------------------------------------------------------------------------------------- records, progress

def reporter(folder, state, updates, passes, device):
    """A function report(task, update, images, losses, more), to call whenever a task begins or goes on after something
    else, report(task, update), and then after every update.

    It moves a live line of tqdm's, and where `losses`, floats by name, are given adds a record to metrics.jsonl, with
    whatever the function `more` returns, whose time is not counted. `updates` and `passes`, the cost of an update, are
    lists by task, for the time left in the whole run. The records after `state`, whose updates a resumed run does
    again, are dropped.
    """
    if rank:
        return lambda *_, **__: None
    path = folder / "metrics.jsonl"
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    try:
        records = [json.loads(line) for line in lines if line.endswith("\n")]  # a kill may cut the last line short
        records = [r for r in records if (r["task"], r["update"]) <= (state["task"], state["update"])]
    except (ValueError, TypeError, KeyError) as error:
        raise InputError(f"{path} is damaged; delete it, and the same command goes on") from error
    replace(path, lambda file: file.write("".join(json.dumps(r) + "\n" for r in records).encode()))
    begun = time.perf_counter() - (records[-1]["seconds"] if records else 0)
    bar = last = since = seen = None

    def report(task, update, images=0, losses=None, more=dict):
        nonlocal bar, last, since, seen
        n, now = updates[task - 1], time.perf_counter()
        if not images:
            if bar is None or bar.n == bar.total:
                bar = tqdm(total=n, initial=update, desc=f"task {task}/{len(updates)}", disable=None, leave=False)
            last, since, seen = update, now, 0
            return
        bar.update()
        seen += images
        if losses is None:
            return
        ms = 1000 * (now - since) / (update - last)
        costs = [n * cost for n, cost in zip(updates, passes)]
        left = ms / 1000 * (sum(costs[task - 1:]) - update * passes[task - 1]) / passes[task - 1]
        record = {"task": task, "update": update, **losses,
                  "ms_per_update": round(ms, 2), "images_per_s": round(seen / (now - since), 1),
                  "peak_memory_mb": peak_memory_mb(device), "seconds": round(now - begun, 2), **more()}
        with open(path, "a") as file:
            file.write(json.dumps(record) + "\n")
        said = ", ".join(f"{name.replace('_', ' ')} {value:.4f}" for name, value in losses.items())
        bar.set_postfix_str(f"{said}, {ms:.1f} ms, {tqdm.format_interval(left)} to the end of the run")
        last, since, seen = update, time.perf_counter(), 0
        if update == n:
            bar.close()
            print(f"task {task}/{len(updates)}: {n} updates, {said}, {ms:.1f} ms per update, {now - begun:.0f} s "
                  "so far", flush=True)
    return report


def check_finite(log, names, model, task, before=0):
    """Stop the run if a row of log (updates, len(names)), of `task` after its first `before` updates, is not finite, or
    a weight. Of a gradient that is not, the optimizer has left out the step.
    """
    bad = (~log.isfinite()).any(1).nonzero()
    u = int(bad[0, 0]) if len(bad) else len(log) - 1
    if len(bad) or not torch.stack([p.sum() for p in model.parameters()]).isfinite().all():
        terms = ", ".join(f"{name} {value:g}" for name, value in zip(names, log[u].tolist()))
        raise InputError(f"task {task} has diverged by update {before + u + 1} ({terms}): lower --lr or use "
                         "--precision fp32, with another --out or --restart; what was saved before is intact")


def peak_memory_mb(device):
    """The most memory this process has held, in MB of 2^20 bytes: on the device for CUDA, in all for the CPU."""
    if device.type == "cuda":
        return round(torch.cuda.max_memory_allocated(device) / 2**20)
    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10)
