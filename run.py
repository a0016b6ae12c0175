"""What a run is, and nothing of what it computes: arguments, speed, processes, folder, resume, save, stop, progress.

Nothing here changes a number in a paper's table, but what --precision auto means. All of it would serve any training
script. A run folder holds

    config.json          every argument and what follows from it, written before the first update
    metrics.jsonl        one JSON object a line, a record every few updates
    samples/task<k>.png  a picture after each task
    task<k>.pt           after each task {"task", "model": state dict, "memory", "config"}
    checkpoint.pt        inside a task the same and whatever else an unbroken run would know; checkpoint.old.pt is older

"memory" is a dict for what a method keeps of old tasks beside its model: a buffer, importances, prototypes. It may hold
tensors, numbers, strings, lists and dicts. `latest` gives back the whole content of the newest of these files, so that
a run resumed inside a task or between two tasks knows what an unbroken one would.
"""

import argparse
import errno
import gc
import importlib.util
import json
import math
import os
import pickle
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
import zipfile
import zlib
from contextlib import nullcontext
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from filelock import FileLock, SoftFileLock, Timeout
from PIL import Image
from torchvision.utils import make_grid
from tqdm import tqdm

try:
    import resource
except ImportError:  # Windows
    resource = None

FORMAT = 2  # of a run folder: what another version has made is refused
TYPED = ("data_dir", "out", "device", "compile", "save_every", "restart")  # arguments that change no number,
MACHINE = ("command", "commit", "torch", "processes", "threads", "processor")  # and what else is noted of a start
rank, world = 0, 1  # this process and how many there are, as torchrun says it
if "TORCHELASTIC_RUN_ID" in os.environ:
    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
locks, signals = [], []  # of this process: the run folders it holds, the signals that asked it to stop
last_save = time.monotonic()


class InputError(ValueError):
    """A person's mistake, told in one sentence that says what to do; `main` prints it and exits with code 2."""


def main(function):
    """Run a script's main: a person's mistake ends it with one sentence and exit code 2, never with a traceback."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")  # a console of few letters shows ? for the others
    try:
        function()
        if dist.is_initialized():
            dist.destroy_process_group()
        return
    except InputError as error:
        sentence = f"error: {error}"
    except torch.OutOfMemoryError:
        sentence = "error: out of device memory; lower --batch-size or use --precision bf16"
    except BrokenPipeError:  # what it said went to a `head` that has read enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(128 + 13)  # SIGPIPE
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.ENOENT):
            raise
        sentence = f"error: {error}; make room or mend the folder, and the same command goes on"
    except RuntimeError as error:
        if not re.search("can't allocate memory|out of memory", str(error)):  # of the CPU, of mps
            raise
        sentence = "error: out of memory; lower --batch-size"
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        sys.exit(130)
    if not rank:  # all processes meet with the same error, and the first one tells it
        print(sentence, file=sys.stderr)
    sys.exit(2)


# -------------------------------------------------------------------------------------------------- arguments

def parser(doc, file):
    """An ArgumentParser for the script of this docstring and file."""
    return argparse.ArgumentParser(prog=Path(file).name, description=doc, allow_abbrev=False,
                                   formatter_class=argparse.RawDescriptionHelpFormatter)


def add_arguments(parser, scales):
    """The arguments that every train script has. They follow its own, which say what the method is."""
    add = parser.add_argument
    add("--scale", default="paper", choices=scales,
        help="paper: the paper's run; small: the same at 16x16; laptop: a quick look at 16x16")
    add("--tasks", type=positive(int), help="number of tasks (paper: 5); where a --class-order is stated, as at "
        "laptop scale, its first so many")
    add("--class-order", help="random (by the seed), natural, or '0,1|2,7' states the classes of each task")
    add("--seed", type=whole, default=42, help="of weights, class order and noise (paper: 42, 69, 1714)")
    add("--image-size", type=positive(int, 4096), help="side to which images are brought (paper: 32, ImageNet-100 64)")
    add("--flip", action=argparse.BooleanOptionalAction, help="random mirroring (default: of colour images)")
    add("--sample-steps", type=positive(int, 1000), help="DDIM steps of pictures and evaluation")
    add("--precision", default="auto", choices=["auto", "fp32", "tf32", "bf16"], help="auto: bf16 on CUDA, else fp32")
    add("--compile", action=argparse.BooleanOptionalAction, help="torch.compile and CUDA graphs (default: on CUDA)")
    add("--data-dir", default="data", help="where the dataset lies or is downloaded to (default: data)")
    add("--out", help="the run folder itself (default: runs/<dataset>/<name>/seed<seed>)")
    add("--device", default="auto", help="auto (CUDA, else mps, else cpu), cpu, mps, cuda or cuda:<i>")
    add("--save-every", type=interval, default=("minutes", 10.0), metavar="500|10m",
        help="checkpoint inside a task every so many updates (500) or minutes (10m, the default)")
    add("--restart", action="store_true", help="delete what the run folder holds and start over")


def positive(kind, most=sys.float_info.max, zero=False):
    """A type for argparse: a number of that kind, int or float, above 0 (or 0, if `zero`) and at most `most`."""
    def parse(text):
        if not (0 < kind(text) <= most or zero and kind(text) == 0):
            raise argparse.ArgumentTypeError(f"must be {'0 or ' * zero}above 0 and at most {most:g}, not {text}")
        return kind(text)
    parse.__name__ = f"positive {kind.__name__}"  # argparse names it when the text is no number
    return parse


def per_task(kind, unit=None):
    """A type for argparse: one positive number, or several with commas, one per task; with a unit (unit, numbers)."""
    def parse(text):
        values = [positive(kind, 1e8)(part) for part in text.split(",")]
        return (unit, values) if unit else values
    parse.__name__ = f"comma-separated {kind.__name__}"
    return parse


def spread(values, tasks):
    """One value per task from what `per_task` read: the last one repeats."""
    return (values + values[-1:] * tasks)[:tasks]


def count_updates(length, batch_size, sizes):
    """The updates of each task, of which `sizes` are the numbers of images; the last, smaller batch of a pass is kept.

    length is ("iterations", [updates of task 1, ...]) or ("epochs", [passes over task 1, ...]); the last value repeats.
    """
    unit, values = length
    values = spread(values, len(sizes))
    if unit == "iterations":
        return values
    return [max(1, round(passes * math.ceil(n / batch_size))) for passes, n in zip(values, sizes)]


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


def departures(parser, args, *besides):
    """{argument: value} of what differs from the parser's defaults, which are the preset's.

    Left out are `besides`, the arguments that say which preset and which repetition it is, and those of the machine.
    """
    others = ("dataset", "scale", "seed", *TYPED, *besides)
    return {key: value for key, value in vars(args).items() if key not in others and value != parser.get_default(key)}


def run_name(base, departs, scale):
    """`base` and whatever departs from the preset: gd-2, gd-2-lam0.5, gd-2-laptop, finetune-lr0.001-linear-noflip."""
    tags = []
    for key, value in departs.items():
        key, value = value if isinstance(value, tuple) else (key, value)  # ("epochs", [20.0])
        text = ",".join(map(str, value)) if isinstance(value, list) else str(value).replace("|", "-")
        tag = text if key in ("schedule", "precision", "teacher_solver", "first_step") else key + text
        tags.append({"True": key, "False": f"no{key}"}.get(text, tag))
    tags += [scale] if scale != "paper" else []
    return "-".join([base, *(re.sub(r"[^\w.-]+", "_", tag) for tag in tags)])


def describe(args, parser, info, preset, departs):
    """Write into args, and so into config.json, what other scripts want to know: info is the dataset's, see data.py."""
    args.class_names, args.dataset_name, args.dataset_title = info.classes, info.name, info.title
    args.departs, args.preset, args.script = departs, preset, parser.prog
    args.name = run_name(args.base, departs, args.scale)


# ------------------------------------------------------------------------------------------- device and speed

def pick_device(name):
    """The torch.device called auto, cpu, mps, cuda or cuda:<i>; auto is CUDA where there is one, else mps, else cpu."""
    launcher = os.environ.get("WORLD_SIZE", "")
    if launcher not in ("", "1") and "TORCHELASTIC_RUN_ID" not in os.environ:
        raise InputError(f"WORLD_SIZE={launcher} is set, but not by torchrun: start with torchrun, or unset it")
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    if not re.fullmatch(r"cpu|mps|cuda(:\d+)?", name):
        raise InputError(f"--device must be auto, cpu, mps, cuda or cuda:<i>, not {name}")
    if world > 1 and name == "cuda":
        name = f"cuda:{os.environ['LOCAL_RANK']}"
    device = torch.device(name)
    if device.type == "mps" and not torch.backends.mps.is_available():
        raise InputError("--device mps is not there; use --device cpu")
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


def start(args):
    """The device, and autocast for --precision; writes into `args` what --precision auto and --compile are there.

    By default a GPU with bf16 (NVIDIA's from Ampere on) computes in bf16, and compiles if there is a compiler. Every
    other device computes in fp32 and does not compile.
    """
    device = pick_device(args.device)
    fast = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    if args.precision == "auto":
        args.precision = "bf16" if fast else "fp32"
    if args.precision == "bf16" and device.type == "mps":
        raise InputError("--precision bf16 is not there on mps; use fp32")

    compilers = [os.environ.get("CXX", "g++"), "g++", "clang++", "cl"]
    able = device.type != "mps" and any(map(shutil.which, compilers))
    able = able and (device.type == "cpu" or importlib.util.find_spec("triton") is not None)
    if args.compile is None:
        args.compile = fast and able
    if args.compile and not able:
        raise InputError("--compile needs a C++ compiler, on CUDA also triton, and is not there on mps; "
                         "use --no-compile")
    if args.compile:
        torch._dynamo.config.recompile_limit = 64  # a small buffer makes another batch in every task
        # The pass that sums over rows and columns in one kernel has given wrong gradients to U-Nets like these
        # (pytorch issues 190796, 193061).
        import torch._inductor.config as inductor
        inductor.triton.mix_order_reduction = False

    torch.backends.cudnn.benchmark = True
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = args.precision == "tf32"
    return device, torch.autocast(device.type, torch.bfloat16, enabled=args.precision == "bf16")


def eager(now=True):
    """`with eager(now):` nothing compiled is used if `now`: for inputs of a rare shape, not worth compiling for."""
    return torch.compiler.set_stance("force_eager") if now else nullcontext()


class CUDAGraph:
    """function(*inputs), CUDA tensors, as one CUDA graph: all its kernels are launched at once.

    The first three calls run as usual, so that kernels are chosen and compiled. The fourth is recorded, and from then
    on the record is played with new inputs. Inputs smaller than the largest so far run as usual. The function may not
    wait for the device. What it reads besides its inputs must stay where it is in memory and change only in place, but
    for torch's seed. The returned tensor holds until the next call.
    """
    stream = None  # one for the whole run: each new one would keep memory for good

    def __init__(self, function):
        self.function, self.shapes, self.calls, self.graph = function, None, 0, None
        if CUDAGraph.stream is None:
            CUDAGraph.stream = torch.cuda.Stream()  # torch.cuda.graph wants the calls before it on its own stream

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
    processes follow one. If old images come first in the batch, they do in each share.
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
    """The means of `losses`, scalars, over all processes, (len(losses),). Each p.grad becomes its mean too.

    Each process has the losses and gradients of its share of the batch; afterwards all have those of the whole batch.
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
    except RuntimeError as error:
        raise InputError("another process of this run has ended; the same command goes on from the last checkpoint"
                         ) from error


# -------------------------------------------------------------------------------------------- folder and files

def open_folder(config):
    """Make or reopen the run folder of `config` and return its path; refuse one that holds another run or is in use.

    From here on Ctrl-C and SIGTERM only leave a note in `signals`: the run ends after a whole update and a save. The
    third one ends it at once.
    """
    about = dict(format=FORMAT, command=shlex.join(["python", *sys.argv]), commit=commit(),
                 torch=torch.__version__, processes=world, threads=torch.get_num_threads(),
                 processor=torch.backends.cpu.get_cpu_capability())
    config = json.loads(json.dumps(dict(config, **about)))
    folder = Path(config["out"] or Path("runs", config["dataset_name"], config["name"], f"seed{config['seed']}"))
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, note_signal)
    if rank:
        return folder
    try:
        (folder / "samples").mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"cannot write to {folder} ({error.strerror}); choose another folder with --out") from error
    hold(folder)

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
    compare(folder, config)
    tasks = " | ".join(", ".join(config["class_names"][c] for c in task) for task in config["class_tasks"])
    print(f"{config['name']}: tasks {tasks}; updates {config['updates']}; into {folder}")
    return folder


def commit():
    """The commit of the code, with -dirty if a file in git differs from it; None outside a repository."""
    command = "git describe --always --dirty --exclude=* --abbrev=40".split()
    try:
        return subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True).stdout.strip() or None
    except OSError:  # there is no git
        return None


def note_signal(number, frame):
    """What Ctrl-C and SIGTERM do while a run goes on."""
    signals.append(number)
    if len(signals) == 3:
        os._exit(128 + number)


def hold(folder):
    """Lock the run folder for this process, by a soft lock where the disk knows no other (NFS), else not at all."""
    for lock in FileLock(folder / ".lock"), SoftFileLock(folder / ".lock-held"):
        try:
            lock.acquire(timeout=0)
        except Timeout as error:
            # Only a soft lock outlives its process.
            left = f", or delete {lock.lock_file} if no run is going on there" * isinstance(lock, SoftFileLock)
            raise InputError(f"{folder} is in use by another process: wait for it or choose another --out{left}"
                             ) from error
        except OSError:  # the disk refuses this kind of lock
            continue
        locks.append(lock)
        return
    print(f"warning: {folder} cannot be locked, so that a second run in it would not be noticed", file=sys.stderr)


def compare(folder, config):
    """Refuse a folder whose config.json differs from `config`; say what of the machine is another than at its start."""
    before = read_config(folder, [])
    way_out = "choose another --out, or --restart to delete it"
    if before.get("format") != FORMAT:
        raise InputError(f"{folder} holds a run of another version of this program; {way_out}")
    differs = [f"{key} was {str(before.get(key)):.300} and is {str(config.get(key)):.300}"
               for key in sorted({*before, *config} - {*TYPED, *MACHINE}) if before.get(key) != config.get(key)]
    if differs:
        raise InputError(f"{folder} holds a run with other settings ({'; '.join(differs)}); {way_out}")
    for key in ("torch", "device", "compile", "processes", "threads", "processor"):
        if before.get(key) != config[key]:
            print(f"begun with {key} {before.get(key)}, now {config[key]}: the end need not be bitwise that of an "
                  "unbroken run", file=sys.stderr)


def read_config(folder, keys):
    """The config.json of a run folder, a dict that has at least these keys."""
    try:
        config = {**json.loads((folder / "config.json").read_text(encoding="utf-8"))}
        [config[key] for key in keys]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"{folder}/config.json is damaged or incomplete ({error}): give another run folder, or train "
                         "with --restart") from error
    return config


def save(path, state):
    """torch.save that leaves either the old file or the new one, never a part: write aside, flush to disk, rename.

    Of several processes the first writes, and all wait for it.
    """
    replace(path, lambda file: torch.save(state, file))
    together(dist.barrier)


def write_json(path, value):
    """json.dump, as safe as `save`."""
    replace(path, lambda file: file.write((json.dumps(value, indent=1, allow_nan=False) + "\n").encode()))


def save_picture(path, u8, columns):
    """Save images u8 (N, C, H, W) as one PNG, so many in a row, each pixel twice as large."""
    grid = make_grid(u8.cpu(), nrow=columns, padding=1).repeat_interleave(2, 1).repeat_interleave(2, 2)
    replace(path, lambda file: Image.fromarray(grid.permute(1, 2, 0).numpy()).save(file, "PNG"))


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


def check_writable(path):
    """Find out before the work whether its result can be written to `path`."""
    path = Path(path)
    trial = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.is_dir():
            raise IsADirectoryError(errno.EISDIR, "it is a folder")
        trial.touch()
        trial.unlink()
    except OSError as error:
        raise InputError(f"cannot write {path} ({error.strerror}): choose another place or mend it") from error


def load(path, device="cpu"):
    """torch.load of tensors and plain values alone, every byte checked against the file's checksums."""
    try:
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()  # torch.load would not notice a flipped bit
        if not damaged:
            return torch.load(path, map_location=device, weights_only=True)
        reason = f"{damaged} fails its checksum"
    except FileNotFoundError as error:
        raise InputError(f"there is no file {path}") from error
    except pickle.UnpicklingError:
        reason = "it holds more than tensors and plain values, and nothing of it was executed"
    except zipfile.BadZipFile as error:
        with open(path, "rb") as file:
            begin = file.read(16)
        if Path(path).suffix == ".safetensors" or begin[8:10] == b'{"':
            raise InputError(f"{path} is safetensors: load it with that library and torch.save its dict") from error
        if begin[:2] == b"\x80\x02":
            raise InputError(f"{path} is pickled or of torch before 1.6: torch.load it and torch.save it again"
                             ) from error
        reason = "no whole zip archive"
    except (OSError, RuntimeError, ValueError, EOFError, KeyError, zlib.error) as error:
        reason = str(error).partition("\n")[0]
    raise InputError(f"{path} is damaged or was not made by torch.save ({reason})")


def load_weights(model, path):
    """Load a task<k>.pt, or a bare state dict such as a diffusers .bin, into the model.

    Every name must match, but the head of a classifier may go to a model without one.
    """
    weights, own = load(path), model.state_dict()
    try:
        weights = weights.get("model", weights)
        weights = {name: w for name, w in weights.items() if name in own or not name.startswith("head.")}
        model.load_state_dict(weights)
    except (RuntimeError, AttributeError, TypeError) as error:
        about = " ".join(str(error).split()).partition(": ")[2] or "no dict of tensors"
        raise InputError(f"{path} holds no weights for this network ({about:.160}): it belongs to another --unet"
                         ) from error
    if not all(value.isfinite().all() for value in weights.values()):
        raise InputError(f"{path} holds weights that are not finite: take another file, or train it again")


def skip_if_broken(optimizer, norm):
    """Let the next step do nothing if the norm of the gradient is not finite, so that no weight becomes NaN.

    found_inf is the flag of torch.amp.GradScaler. A fused step looks at it on the device, so that nothing waits for the
    host. A step that is not fused (on mps) knows no such flag, and there check_finite alone stops the run.
    """
    if optimizer.defaults["fused"]:
        optimizer.found_inf = (~norm.isfinite()).float()


def restore(optimizer, saved):
    """Give the optimizer the moments of a saved one, and leave its settings, such as fused, which fit this device."""
    optimizer.load_state_dict(optimizer.state_dict() | {"state": saved["state"]})


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
    """Save `state`, a dict with "task", "update" (how many are done) and whatever else. The checkpoint before becomes
    checkpoint.old.pt. If Ctrl-C or SIGTERM asked for it, leave with exit code 130 or 143.
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


def latest(folder, tasks, device="cpu"):
    """The newest whole state of a run, its tensors on `device`; None if there is none.

    It is all that the newest checkpoint holds, or all that task<k>.pt holds, but with "task" k + 1 and "update" 0.
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
            found = load(path, device)
        except InputError as error:
            damaged.append((path, error))
            continue
        if path not in checkpoints:
            state = dict(found, task=int(path.stem[4:]) + 1, update=0)
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

class Progress:
    """The live line of tqdm's and the records in metrics.jsonl; `updates` is a list by task.

    Records after `state`, whose updates a resumed run does again, are dropped from the file.
    """

    def __init__(self, folder, state, updates, device):
        self.path, self.updates, self.device = folder / "metrics.jsonl", updates, device
        self.bar = tqdm(disable=True)
        if rank:
            return
        lines = self.path.read_text(encoding="utf-8").splitlines(keepends=True) if self.path.exists() else []
        try:
            records = [json.loads(line) for line in lines if line.endswith("\n")]  # a kill may cut the last line short
            records = [r for r in records if (r["task"], r["update"]) <= (state["task"], state["update"])]
        except (ValueError, TypeError, KeyError) as error:
            raise InputError(f"{self.path} is damaged; delete it, and the same command goes on") from error
        replace(self.path, lambda file: file.write("".join(json.dumps(r) + "\n" for r in records).encode()))
        self.begun = time.perf_counter() - (records[-1]["seconds"] if records else 0)

    def begin(self, task, update):
        """Call it when a task begins, and when it goes on after something other than an update."""
        self.bar.close()
        self.bar = tqdm(total=self.updates[task - 1], initial=update, desc=f"task {task}/{len(self.updates)}",
                        disable=True if rank else None, leave=False)  # None: no line where there is no terminal
        self.task, self.last, self.since, self.seen = task, update, time.perf_counter(), 0

    def step(self, images):
        """Call it after every update, with the number of new images in its batch."""
        self.bar.update()
        self.seen += images

    def record(self, update, losses, more=dict):
        """Add a record: `losses`, floats by name, after so many updates of the task, and what the function `more`
        returns, whose time is not counted.
        """
        if rank:
            return
        n, now = self.updates[self.task - 1], time.perf_counter()
        seconds = (now - self.since) / (update - self.last)
        left = tqdm.format_interval(seconds * (sum(self.updates[self.task - 1:]) - update))
        record = {"task": self.task, "update": update, **losses, "ms_per_update": round(1000 * seconds, 2),
                  "images_per_s": round(self.seen / (now - self.since), 1),
                  "peak_memory_mb": peak_memory_mb(self.device), "seconds": round(now - self.begun, 2), **more()}
        with open(self.path, "a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")
        said = ", ".join(f"{name.replace('_', ' ')} {value:.4g}" for name, value in losses.items())
        said += f", {1000 * seconds:.1f} ms"
        self.bar.set_postfix_str(f"{said}, {left} to the end of the run at this speed")
        self.last, self.since, self.seen = update, time.perf_counter(), 0
        if update == n:
            self.bar.close()
            print(f"task {self.task}/{len(self.updates)}: {n} updates, {said} per update, {now - self.begun:.0f} s "
                  "so far", flush=True)


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
    """The most memory in MB of 2^20 bytes: on the device for CUDA, else of the whole process; None if unknown."""
    if device.type == "cuda":
        return round(torch.cuda.max_memory_allocated(device) / 2**20)
    if resource is None:
        return None
    unit = 2**20 if sys.platform == "darwin" else 2**10  # macOS counts bytes, Linux kilobytes
    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit)
