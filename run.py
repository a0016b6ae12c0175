"""What every run has, whatever it computes: arguments, speed, processes, folder, resume, save, stop, progress.

A run folder holds

    config.json          every argument and what follows from it, written before the first update
    metrics.jsonl        one JSON object a line, a record every few updates
    samples/task<k>.png  a picture after each task
    task<k>.pt           after each task {"task", "model": state dict, "memory", "config"}
    checkpoint.pt        inside a task: the same and what resuming needs besides; checkpoint.old.pt: the save before

"memory" is a dict of what a method keeps of old tasks beside its model: tensors, numbers, strings, lists and dicts.
"""

import argparse
import importlib.util
import io
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
from filelock import FileLock, Timeout
from PIL import Image
from torchvision.utils import make_grid
from tqdm import tqdm

COUNTS = "teacher_steps", "buffer_size"  # arguments that are in every run's name, where they apply
# Where and how to compute: not in a run's name, and free to change on resume.
TYPED = ("data_dir", "out", "device", "compile", "save_every", "restart")
rank, world = 0, 1  # this process and how many there are, as torchrun says it
if "TORCHELASTIC_RUN_ID" in os.environ:
    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
locks, signals = [], []  # of this process: the locks that it holds, the signals that asked it to stop
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
        sys.stdout.flush()
        if dist.is_initialized():
            dist.destroy_process_group()
        return
    except InputError as error:
        sentence = str(error)
    except BrokenPipeError:  # what it said went to a `head` that has read enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(128 + 13)  # SIGPIPE
    except OSError as error:
        sentence = f"{error}; make room or mend the folder, and the same command goes on"
    except (RuntimeError, MemoryError) as error:
        if not out_of_memory(error):
            raise
        sentence = "out of memory; where there is the option, lower --batch-size or use --precision bf16"
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        sys.exit(130)
    if not rank:  # all processes meet with the same error, and the first one tells it
        print(f"error: {sentence}", file=sys.stderr)
    sys.exit(2)


def out_of_memory(error):
    """Whether this says that memory is lacking: Python's, torch's on any device, or the CPU's allocator's."""
    return isinstance(error, MemoryError) or bool(re.search("out of memory|(can't allocate|enough) memory", str(error)))


# -------------------------------------------------------------------------------------------------- arguments

def parser(doc, file):
    """An ArgumentParser for the script of this docstring and file."""
    return argparse.ArgumentParser(prog=Path(file).name, description=doc, allow_abbrev=False,
                                   formatter_class=argparse.RawDescriptionHelpFormatter)


def add_arguments(parser):
    """The arguments that every train script has. They follow its own, which say what the method is."""
    add = parser.add_argument
    add("--scale", default="paper", choices=["paper", "small", "laptop"],
        help="paper: the paper's run; small: the same at 16x16; laptop: a quick look at 16x16")
    add("--tasks", type=positive(int), help="number of tasks (paper: 5); where their classes are stated, by "
        "--class-order or by the laptop scale, the first so many")
    add("--class-order", help="random (by the seed), natural, or '0,1|2,7' states the classes of each task")
    add("--seed", type=whole, default=42, help="of weights, class order and noise (paper: 42, 69, 1714)")
    add("--image-size", type=positive(int, 4096), help="side to which images are brought (paper: 32, ImageNet-100 64)")
    add("--flip", action=argparse.BooleanOptionalAction, help="random mirroring (default: of colour images)")
    add("--sample-steps", type=positive(int, 1000), help="DDIM steps of pictures and evaluation")
    add("--precision", default="auto", choices=["auto", "fp32", "tf32", "bf16"], help="auto: bf16 on CUDA, else fp32")
    add("--compile", action=argparse.BooleanOptionalAction, help="torch.compile (default: on CUDA)")
    add("--data-dir", default="data", help="where the dataset lies or is downloaded to (default: data)")
    add("--out", help="the run folder itself (default: runs/<dataset>/<name>/seed<seed>)")
    add("--device", default="auto", help="auto (CUDA, else mps, else cpu), cpu, mps, cuda or cuda:<i>")
    add("--save-every", type=interval, default=("minutes", 10.0), metavar="500|10m",
        help="checkpoint inside a task every so many updates (500) or minutes (10m, the default)")
    add("--restart", action="store_true", help="delete what the run folder holds and start over")


def add_length(parser, paper):
    """The arguments --epochs and --iterations, of which one may be given; `paper` is the paper's number of epochs."""
    add = parser.add_mutually_exclusive_group().add_argument
    add("--epochs", type=per_task(float, "epochs"), dest="length", metavar="E",
        help=f"passes over the images of a task: E, or E1,E2,... (paper: {paper})")
    add("--iterations", type=per_task(int, "iterations"), dest="length", metavar="N",
        help="updates of a task, in place of epochs: N, or N1,N2,...")


def positive(kind, most=sys.float_info.max, zero=False):
    """A type for argparse: an int or float above 0 (or 0, if `zero`) and at most `most`, by default all but inf."""
    def parse(text):
        value = kind(text)
        if not (0 < value <= most or zero and value == 0):
            limit = f" and at most {most:g}" * (most < sys.float_info.max)
            raise argparse.ArgumentTypeError(f"must be {'0 or ' * zero}above 0{limit}, not {text}")
        return value
    parse.__name__ = f"positive {kind.__name__}"  # argparse names it when the text is no number
    return parse


whole = positive(int, 2**63 - 1, zero=True)  # a seed, or the number of an update


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


def count_updates(length, batch_size, of_task):
    """The updates of each task, whose images `of_task` lists; the last, smaller batch of a pass is kept.

    length is ("iterations", updates by task) or ("epochs", passes by task).
    """
    unit, values = length
    values = spread(values, len(of_task))
    if unit == "iterations":
        return values
    return [max(1, round(passes * math.ceil(len(images) / batch_size))) for passes, images in zip(values, of_task)]


def interval(text):
    """A type for argparse: "500" -> ("updates", 500), "10m" -> ("minutes", 10.0)."""
    if text.endswith("m"):
        return "minutes", positive(float, 1e9)(text[:-1])
    return "updates", positive(int, 1e9)(text)


interval.__name__ = "number of updates (500) or minutes (10m)"  # argparse names it when it cannot read the text


def departures(parser, args, *besides):
    """{argument: value} of what differs from the preset, the parser's defaults, less COUNTS, TYPED and `besides`."""
    others = ("dataset", "scale", "seed", "source", *COUNTS, *TYPED, *besides)
    return {key: value for key, value in vars(args).items() if key not in others and value != parser.get_default(key)}


def run_name(base, departs, scale):
    """`base` and whatever departs from the preset: gd-2, gd-2-lam0.5, gd-2-laptop, finetune-lr0.001-linear-noflip."""
    tags = []
    for key, value in departs.items():
        key, value = value if key == "length" else (key, value)  # ("epochs", [20.0])
        text = ",".join(map(str, value)) if isinstance(value, list) else str(value).replace("|", "-")
        tag = text if key in ("schedule", "precision", "teacher_solver", "first_step") else key + text
        tags.append({"True": key, "False": f"no{key}"}.get(text, tag))
    tags += [scale] if scale != "paper" else []
    return "-".join(re.sub(r"[^\w.-]+", "_", tag) for tag in [base, *tags])


def parse(argv, parser, info, preset, methods):
    """The arguments of a train script, and among them what config.json is to tell other scripts.

    The preset's values are their defaults; None means that an argument does not apply and may not be given. info is the
    dataset's, see data.py, methods are {args.source: (name, title)}. args.base, with which the run's name begins, is
    the method's name and those of the arguments COUNTS that apply.
    """
    parser.set_defaults(**preset)
    args = parser.parse_args(argv)
    for key, value in preset.items():
        if value is None and getattr(args, key) is not None:
            parser.error(f"--{key.replace('_', '-')} does nothing beside the other arguments: leave it out")
    args.departs = departures(parser, args)
    args.method, args.title = methods[args.source]
    if "length" in args.departs and len(args.length[1]) > args.tasks:  # a preset may state more than --tasks leaves
        parser.error(f"--{args.length[0]} takes at most one value for each of the {args.tasks} tasks")
    args.base = "-".join([args.method, *(str(vars(args)[key]) for key in COUNTS if vars(args).get(key))])
    args.name = run_name(args.base, args.departs, args.scale)
    args.class_names, args.dataset_name, args.dataset_title = info.classes, info.name, info.title
    args.preset, args.script = preset, parser.prog
    return args


# ----------------------------------------------------------------------------------- device, speed, processes

def pick_device(name):
    """The torch.device called auto, cpu, mps, cuda or cuda:<i>; auto is CUDA where there is one, else mps, else cpu.

    With torchrun it also joins the processes, and silences all but the first.
    """
    cards = torch.cuda.device_count() if torch.cuda.is_available() else 0
    there = ["cuda"] * (cards > 0) + [f"cuda:{i}" for i in range(cards)] * (world == 1)
    there += ["mps"] * torch.backends.mps.is_available() + ["cpu"]
    if name == "auto":
        name = there[0]
    if name not in there:
        raise InputError(f"--device {name} is not there: choose auto, {', '.join(there)}")
    if world > 1 and name == "cuda":
        name = f"cuda:{os.environ['LOCAL_RANK']}"
        if cards < int(os.environ["LOCAL_WORLD_SIZE"]):  # each process says so, not the one without a card alone
            raise InputError(f"there are {cards} CUDA devices: start {cards} processes at most")
    device = torch.device(name)
    if device.type == "cuda":
        torch.cuda.set_device(device.index or 0)
    if world > 1:
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=timedelta(hours=1))
        if rank:  # the first process speaks for all
            sys.stdout = open(os.devnull, "w")
    return device


def start(args):
    """The device, and autocast for --precision; puts what was chosen in place of "auto" and None into `args`.

    By default a GPU with bf16 (NVIDIA's from Ampere on) computes in bf16 and compiles, if it can. Others do neither.
    """
    device = pick_device(args.device)
    args.device = str(device)
    fast = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    if args.precision == "auto":
        args.precision = "bf16" if fast else "fp32"
    if args.precision == "bf16" and device.type == "mps":
        raise InputError("--precision bf16 is not there on mps; use fp32")

    compiler = any(map(shutil.which, [os.environ.get("CXX", "g++"), "g++", "clang++", "cl"]))
    able = compiler and {"cpu": True, "mps": False, "cuda": importlib.util.find_spec("triton")}[device.type]
    if args.compile is None:
        args.compile = bool(fast and able)
    if args.compile and not able:
        raise InputError("--compile needs a C++ compiler, on CUDA also triton, and is not there on mps; "
                         "use --no-compile")
    if args.compile:
        torch._dynamo.config.recompile_limit = 64  # a small buffer gives each task another batch size
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


def share(x):
    """This process's rows of a batch (B, ...): rank, rank + world, ...; all rows if they do not divide evenly.

    Every process draws the random numbers of the whole batch and computes with its share: so N processes follow one.
    If old images come first in the batch, they do in each share.
    """
    return x[rank::world] if len(x) % world == 0 else x


def gather(x, n):
    """The whole batch (n, ...) of which every process has its share x."""
    if len(x) == n:
        return x
    batch = x.new_zeros(n, *x.shape[1:])
    batch[rank::world] = x
    together(dist.all_reduce, batch)
    return batch


def average(*tensors):
    """Give each tensor, in place, its mean over torchrun's processes. In one process nothing happens."""
    if world > 1:
        flat = torch.cat([x.flatten() for x in tensors]) / world
        together(dist.all_reduce, flat)
        for x, mean in zip(tensors, flat.split([x.numel() for x in tensors])):
            x.copy_(mean.view_as(x))


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

    From here on Ctrl-C and SIGTERM only leave a note: the run ends after a save. Only a third one ends it at once.
    """
    machine = dict(torch=torch.__version__, processes=world, threads=torch.get_num_threads(),
                   processor=torch.backends.cpu.get_cpu_capability())
    about = dict(format=3, command=shlex.join(["python", *sys.argv]), commit=commit())
    config = json.loads(json.dumps({**config, **about, **machine}))  # as in the file, where tuples are lists
    folder = Path(config["out"] or Path("runs", config["dataset_name"], config["name"], f"seed{config['seed']}"))

    def note(number, frame):
        signals.append(number)
        if len(signals) == 3:
            os._exit(128 + number)
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, note)
    if rank:
        return folder
    check_writable(folder / "samples" / "task1.png")
    locks.append(FileLock(folder / ".lock"))
    try:
        locks[-1].acquire(timeout=0)
    except Timeout as error:
        raise InputError(f"{folder} is in use by another process: wait for it or choose another --out") from error
    except (OSError, NotImplementedError):  # the disk knows no locks
        print(f"warning: {folder} cannot be locked, so that a second run in it would not be noticed", file=sys.stderr)

    if config["restart"]:
        for pattern in ("config.json", "metrics.jsonl", "eval.json", "classifier.json", "accuracy.json", "task*.pt*",
                        "local*.pt", "replay*.pt", "checkpoint*", "samples/*.png"):
            for path in folder.glob(pattern):
                path.unlink()
    if not (folder / "config.json").exists():
        if any(folder.glob("*.pt")):
            raise InputError(f"{folder} holds weights but no config.json; choose another --out or move them away")
        write_json(folder / "config.json", config)
    compare(folder, config, machine)
    for path in [*folder.glob("*.[0-9]*.tmp"), *folder.glob("samples/*.[0-9]*.tmp")]:  # left by a save that was killed
        path.unlink()
    tasks = " | ".join(", ".join(config["class_names"][c] for c in task) for task in config["class_tasks"])
    print(f"{config['name']}: tasks {tasks}; updates {config['updates']}; into {folder}")
    return folder


def commit():
    """The commit of the code, with -dirty if a file in git differs from it; None outside a repository."""
    git = ["git", "-C", Path(__file__).parent, *"describe --always --dirty --exclude=* --abbrev=40".split()]
    return shutil.which("git") and subprocess.run(git, capture_output=True, text=True).stdout.strip() or None


def compare(folder, config, machine):
    """Refuse a folder whose config.json differs from `config`; warn of what has changed in the machine since then."""
    before = read_config(folder, [])
    free = {*TYPED, "command", "commit", *machine}
    differs = [f"{key} was {str(before.get(key)):.300} and is {str(config.get(key)):.300}"
               for key in sorted({*before, *config} - free) if before.get(key) != config.get(key)]
    if differs:
        raise InputError(f"{folder} holds a run with other settings ({'; '.join(differs)}); choose another --out, or "
                         "--restart to delete it")
    for key in ("device", "compile", *machine):
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
    """torch.save, all or nothing; of several processes the first writes, and all wait for it."""
    check_memory(state.get("memory"))
    replace(path, lambda file: torch.save(state, file))
    together(dist.barrier)


def write_json(path, value):
    """json.dump, all or nothing."""
    replace(path, lambda file: file.write((json.dumps(value, indent=1, allow_nan=False) + "\n").encode()))


def save_picture(path, u8, columns):
    """Save images u8 (N, C, H, W) as one PNG, so many in a row, each pixel twice as large, for the eye."""
    grid = make_grid(u8.cpu(), nrow=columns, padding=1).repeat_interleave(2, 1).repeat_interleave(2, 2)
    replace(path, lambda file: Image.fromarray(grid.permute(1, 2, 0).numpy()).save(file, "PNG"))


def replace(path, write):
    """Replace the file at `path` by what write(file) writes: at any time the old one or the new one is there, whole.
    Only the first process does it.
    """
    if rank:
        return
    content = io.BytesIO()  # first into memory: of a full disk torch.save would make a RuntimeError
    write(content)
    tmp = Path(f"{path}.{os.getpid()}.tmp")
    try:
        with open(tmp, "wb") as file:
            file.write(content.getbuffer())
            file.flush()
            os.fsync(file.fileno())
        os.replace(tmp, path)
    except OSError as error:  # which may lack the path
        raise OSError(error.errno, error.strerror, str(path)) from error
    finally:
        tmp.unlink(missing_ok=True)


def check_writable(path):
    """Find out before the work whether its result can be written to `path`; make its folder."""
    path, trial = Path(path), Path(f"{path}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        trial.touch()
        trial.unlink()
    except OSError as error:
        raise InputError(f"cannot write {path} ({error.strerror}): choose another place or mend it") from error
    if path.is_dir():
        raise InputError(f"cannot write {path}, it is a folder: choose another place")


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
    except zipfile.BadZipFile:
        reason = "no whole zip archive; if it is safetensors or of torch before 1.6, load it so and torch.save it again"
    except (OSError, RuntimeError, ValueError, EOFError, KeyError, zlib.error) as error:
        if out_of_memory(error):
            raise
        reason = str(error).partition("\n")[0]
    raise InputError(f"{path} is damaged or was not made by torch.save ({reason})")


def load_weights(model, path):
    """Load a task<k>.pt, or a bare state dict such as a diffusers .bin, into the model; it may have no head."""
    weights, own = load(path), model.state_dict()
    try:
        weights = weights.get("model", weights)
        weights = {name: w for name, w in weights.items() if name in own or not name.startswith("head.")}
        model.load_state_dict(weights)
    except (RuntimeError, AttributeError, TypeError) as error:
        about = " ".join(str(error).split())
        raise InputError(f"{path} holds no weights for this network ({about:.200}): it belongs to another --unet"
                         ) from error
    if not all(value.isfinite().all() for value in weights.values()):
        raise InputError(f"{path} holds weights that are not finite: take another file, or train it again")


def save_due(every, update):
    """Whether to save after this update: `every` is ("minutes", x) or ("updates", n); at once if asked to stop."""
    global last_save
    unit, n = every
    due = update % n == 0 if unit == "updates" else time.monotonic() - last_save > 60 * n
    if due:
        last_save = time.monotonic()
    return not rank and (due or bool(signals))  # only the first process saves


def save_checkpoint(folder, state):
    """Save `state`, a dict with "task", "update" (how many are done) and whatever else; leave if asked to stop."""
    if rank:
        return
    check_memory(state.get("memory"))
    if (folder / "checkpoint.pt").exists():
        os.replace(folder / "checkpoint.pt", folder / "checkpoint.old.pt")
    replace(folder / "checkpoint.pt", lambda file: torch.save(state, file))
    exit_if_stopped(state["task"], state["update"])


def exit_if_stopped(task, update):
    """Leave with exit code 130 or 143 if Ctrl-C or SIGTERM asked for it; everything up to this update is saved."""
    if signals and not rank:
        print(f"stopped at task {task}, update {update}; the same command goes on from there", file=sys.stderr)
        sys.exit(128 + signals[0])


def finish(folder):
    """Say that the run is finished, and remove its checkpoints, which nothing needs any more."""
    for path in [] if rank else folder.glob("checkpoint*.pt"):
        path.unlink()
    print(f"{folder} is finished (--restart does it again); next: python eval_fid.py {shlex.quote(str(folder))}")


def latest(folder, tasks, device="cpu"):
    """The newest whole checkpoint, or the newest whole task<k>.pt as a state at update 0 of task k + 1, or None.

    Damaged files are set aside, so that no later save puts them in the place of a good one.
    """
    if rank:
        together(dist.barrier)  # the first process looks first, and sets aside
    found, damaged = {}, []  # the newest whole file of either kind
    for name in ("checkpoint", "checkpoint.old", *(f"task{k}" for k in range(tasks, 0, -1))):
        path, done = folder / f"{name}.pt", name.startswith("task")
        if done in found or not path.exists():
            continue
        try:
            state = load(path, device)
        except InputError as error:
            damaged.append((path, error))
            continue
        found[done] = {**state, "task": state["task"] + 1, "update": 0} if done else state
    state = max(found.values(), key=lambda state: (state["task"], state["update"]), default=None)
    if damaged and not state:
        raise InputError(f"{damaged[0][1]}, and there is no other to go on from; start over with --restart")
    for path, error in damaged:
        path.rename(f"{path}.damaged")
        print(f"{error}; it is set aside", file=sys.stderr)
    if state and state["task"] <= tasks:
        print(f"going on from task {state['task']}, update {state['update']}")
    if not rank:
        together(dist.barrier)
    together(dist.barrier)  # no later save renames a file before all have read it
    return state


# --------------------------------------------------------------------------------------------- records, progress

class Progress:
    """The live line and the records in metrics.jsonl. Records of updates after `state`, which come again, are dropped.

    `updates` are the updates of each task, `names` those of the values in a row of the log. A loss that an update does
    not have is 0 or NaN there; a NaN is left out of the means.
    """

    def __init__(self, folder, state, updates, names, device):
        self.path, self.updates, self.names, self.device = folder / "metrics.jsonl", updates, names, device
        self.bar, self.recorded = tqdm(disable=True), (0, 0)  # task and update of the last record
        if rank:
            return
        try:
            lines = self.path.read_text(encoding="utf-8").splitlines(keepends=True) if self.path.exists() else []
            records = [json.loads(line) for line in lines if line.endswith("\n")]  # a kill may cut the last line short
            records = [r for r in records if (r["task"], r["update"]) <= (state["task"], state["update"])]
            last = records[-1] if records else {"task": 0, "update": 0, "seconds": 0}
            self.begun, self.recorded = time.perf_counter() - last["seconds"], (last["task"], last["update"])
        except (ValueError, TypeError, KeyError) as error:
            raise InputError(f"{self.path} is damaged; delete it, and the same command goes on") from error
        replace(self.path, lambda file: file.write("".join(json.dumps(r) + "\n" for r in records).encode()))

    def begin(self, task, update):
        """Call it at the start of a task and on resume, when all before is saved; leave if asked to stop."""
        exit_if_stopped(task, update)
        self.bar.close()
        self.bar = tqdm(total=self.updates[task - 1], initial=update, desc=f"task {task}/{len(self.updates)}",
                        disable=True if rank else None, leave=False)  # None: no line where there is no terminal
        self.task, self.last, self.since = task, update, time.perf_counter()

    def step(self, update, log, model, check=False, record=False, more=dict):
        """Call it after update 1, 2, ... of the task, with the log, a row an update.

        Every 50 updates, in a short task 20 times, or if `record`, it adds a record: means over the updates since the
        record before, and what the function `more` returns, whose time is not counted. It stops the run if what is to
        be recorded, or to be saved after this `check`, is not finite.
        """
        self.bar.update()
        n = self.updates[self.task - 1]
        record = record or update % max(1, min(50, n // 20)) == 0 or update == n
        if record or check:
            check_finite(log[:update], self.names, model, self.task)
        if not record or rank:
            return
        now, begin = time.perf_counter(), self.recorded[1] if self.recorded[0] == self.task else 0
        seconds, means = (now - self.since) / (update - self.last), log[begin:update].nanmean(0).tolist()
        means = {name: mean for name, mean in zip(self.names, means) if not math.isnan(mean)}
        row = {"task": self.task, "update": update, **means, "ms_per_update": round(1000 * seconds, 2),
               "peak_memory_mb": peak_memory_mb(self.device), "seconds": round(now - self.begun, 2), **more()}
        with open(self.path, "a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
        said = ", ".join(f"{name.replace('_', ' ')} {mean:.4g}" for name, mean in means.items())
        said += f", {1000 * seconds:.1f} ms"
        self.bar.set_postfix_str(said)
        self.recorded, self.last, self.since = (self.task, update), update, time.perf_counter()
        if update == n:
            self.bar.close()
            print(f"task {self.task}/{len(self.updates)}: {n} updates, {said} per update, {now - self.begun:.0f} s "
                  "so far", flush=True)


def check_finite(log, names, model, task):
    """Stop the run if a weight, a loss (first in a row of `log`) or a gradient's norm (last) is not finite."""
    bad = (~(log[:, 0] + log[:, -1]).isfinite()).nonzero()
    u = int(bad[0, 0]) if len(bad) else len(log) - 1
    if len(bad) or not torch.stack([p.sum() for p in model.parameters()]).isfinite().all():
        terms = ", ".join(f"{name} {value:g}" for name, value in zip(names, log[u].tolist()))
        raise InputError(f"task {task} has diverged by update {u + 1} ({terms}): lower --lr or use "
                         "--precision fp32, with another --out or --restart; what was saved before is intact")


def check_memory(kept):
    """Stop the run before a save if any number of "memory", however deep in dicts and lists, is not finite."""
    for part in kept.values() if isinstance(kept, dict) else kept if isinstance(kept, (list, tuple)) else ():
        check_memory(part)
    if isinstance(kept, (float, torch.Tensor)) and not torch.as_tensor(kept).isfinite().all():
        raise InputError("what the method keeps of old tasks, its memory, is not finite: lower --lr, with another "
                         "--out or --restart; what was saved before is intact")


def peak_memory_mb(device):
    """The most memory in MB of 2^20 bytes: on the device for CUDA, else of the whole process; None on Windows."""
    if device.type == "cuda":
        return round(torch.cuda.max_memory_allocated(device) / 2**20)
    try:
        import resource
    except ImportError:
        return None
    unit = 2**20 if sys.platform == "darwin" else 2**10  # macOS counts bytes, Linux kilobytes
    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit)
