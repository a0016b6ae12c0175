"""How fast and how large an update is: these scripts, diffusers' U-Net, the floor of the arithmetic, the paper's GPU.

Ours     A train script in a process of its own learns two tasks of random images. The records of task 2 in its
         metrics.jsonl are the measurement. Those that begin in the first 10 updates (on a CPU 1) are left out, as
         kernels are chosen and compiled there. A record is a mean of up to 50 updates. The deviation is that of the
         records. Mean and deviation are weighted by updates. JDCL's replay is random too, because a model of a few
         updates draws no image of some class. Its stage 2 is measured with the classifier's terms on.
Peer     The same update on diffusers' UNet2DModel, with the same weights and outputs, DDIMScheduler and plain Adam.
         "fp32" has TF32 off. "defaults" is what PyTorch does by itself: TF32 in convolutions, no search for kernels.
         "bf16 compile" is autocast and torch.compile, on CUDA alone.
Floor    FLOP of all forward passes, a backward pass counted as two, at the speed of a large matrix product of the same
         precision, which is measured first. It leaves out norms, activations and the optimizer.
Others   sample: a call of ddim.sample for a batch. fid: features of 32x32 images by FID's network, random weights.

images/s     new images, not replayed ones
peak MB      allocated on the device; on a CPU that of the whole process
counted MB   16 bytes for a learned parameter (itself, gradient, Adam), 4 for a frozen one, 2 more for each in bf16, and
             what autograd keeps of an eager forward pass
parameters   of all networks that the method needs
paper        Table B.1 of arXiv 2311.14028, on a GTX 1080 Ti

    python tests/benchmark.py [--scale laptop] [--rows '*gd fp32*' '*sample*'] [--seconds 10] [--out FILE.json]
"""

import copy
import functools
import importlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from fnmatch import fnmatch
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import data  # noqa: E402
import run  # noqa: E402
import train_gd  # noqa: E402
import train_jdcl  # noqa: E402
from ddim import alpha_bar, sample  # noqa: E402
from eval_fid import fid_features, inception_network  # noqa: E402
from report import commit, machine  # noqa: E402
from unet import NETS, UNet, cost, resnet18  # noqa: E402

PAPER = {  # ms per update, parameters
    "fashion-mnist finetune": "253.3 ± 8.8; 42,855,873", "cifar10 finetune": "383.4 ± 95.3; 35,746,307",
    "fashion-mnist gr": "664.3 ± 3.8; 85,711,746", "cifar10 gr": "1881.8 ± 42.9; 71,492,614",
    "fashion-mnist gd": "747.9 ± 3.6; 85,711,746", "cifar10 gd": "1992.7 ± 47.6; 71,492,614"}
HEAD = ["row", "ms", "updates", "images/s", "floor, ms", "floor / ms", "peak MB", "counted MB", "parameters",
        "paper: ms; parameters"]


# --------------------------------------------------------------------------------------------- what is measured

def jobs(scale, cuda):
    """All measurements in order, a dict each: `kind` (the function below that makes it), `rows`, and what it needs."""
    def row(name, setting, batch, passes, flop, **more):  # passes and flop are of one image, and all of an update
        return dict(name=name, precision=setting.split()[0], batch=batch, passes=passes, flop=flop * batch, **more)

    def command(setting, *first):
        precision, *compiled = setting.split()
        return [*first, "--dataset", dataset, "--scale", scale, "--class-order", "0,1|2,3", "--sample-steps", "1",
                "--precision", precision, "--compile" if compiled else "--no-compile"]

    settings = ["fp32", "tf32", "bf16", "bf16 compile"] if cuda else ["fp32", "bf16"]
    peers = {"fp32": "fp32", "tf32": "defaults", "bf16 compile": "bf16 compile"}
    for dataset in ["fashion-mnist", "cifar10"] if scale == "paper" else ["fashion-mnist"]:
        label, preset = dataset if scale == "paper" else "laptop", train_gd.PRESETS[dataset][scale]
        net, B, S, ahead = (preset[key] for key in ("unet", "batch_size", "teacher_steps", "draw_ahead"))
        flop, batch = cost(net)[3], 1024 if cuda else 64 if scale == "laptop" else 4
        methods = {"finetune": (3, "train_gr", "--replay", "none"),  # passes: forward, and a backward one is two
                   "gr": (6 + S, "train_gr"), "gd": (7 + S, "train_gd")}
        for s in settings:
            for method, (passes, *first) in methods.items():
                name, frozen = f"{label} {method}", int(method != "finetune")
                more = dict(counted_mb=counted_mb(net, s, (1 + frozen) * B, frozen), paper=PAPER.get(name))
                variants = [[], ["--draw-ahead", "1" if ahead > 1 else "8"]] if method == "gd" else [[]]
                for flags in variants:
                    yield dict(kind="script", command=command(s, *first, "--iterations", "1,{n}", *flags),
                               rows=[row(" ".join([name, s, *flags]), s, B, passes, passes * flop, **more)])
            if p := peers.get(s):
                yield dict(kind="peer", net=net, batch=B, steps=S, setting=p, rows=[
                    row(f"{label} {method} {p}, diffusers", s, B, passes, passes * flop, method=method)
                    for method, (passes, *_) in methods.items()])
        for steps in (2, 10) if S == 2 else (S,):
            for s in settings[:3]:
                yield dict(kind="inference", net=net, batch=batch, steps=steps, setting=s, rows=[
                    row(f"{label} sample, {steps} steps, {s}", s, batch, steps, steps * flop)])

    preset = train_jdcl.PRESETS[dataset][scale]  # of CIFAR-10, or of the laptop's Fashion-MNIST
    net, B = preset["unet"], preset["batch_size"]
    image = NETS[net]["in_channels"], *[cost(net)[0]] * 2
    separate = count_flop(partial(resnet18, image[0], 10, 16 if image[1] < 32 else 64), image)
    for s in settings:
        for name, flags, flop in (("jdcl", [], sum(cost(net, 10)[3:])),  # of an image that is denoised and classified
                                  ("jdcl separate", ["--separate"], cost(net)[3] + separate)):
            more = {} if flags else {"counted_mb": counted_mb(net, s, B, 3)}
            yield dict(kind="script", command=command(
                s, "train_jdcl", "--local-iterations", "1,{n}", "--global-iterations", "{n}", "--eval-every", "{n}",
                "--classifier-start", "0", "--replay-per-class", "100", *flags), rows=[
                row(f"{label} {name} {stage} {s}", s, B, 2 * n, n * flop, stage=stage, **more)
                for stage, n in (("local", 3), ("global", 4))])
    flop, batch = count_flop(inception_network, (3, 299, 299)), 128 if cuda else 2
    yield dict(kind="inference", batch=batch, rows=[row("fid fp32", "fp32", batch, 1, flop)])


def count_flop(build, image):
    """FLOP of a forward pass of build() for an image of this shape."""
    with torch.device("meta"), FlopCounterMode(display=False) as counter:
        build()(torch.empty(1, *image))
    return counter.get_total_flops()


def counted_mb(net, setting, images, frozen):
    """Memory of an update on paper, see the top: it learns from so many images, and `frozen` more nets are held."""
    bf16 = setting.startswith("bf16")
    parameters, activations = memory_of(net, bf16)
    return round((parameters * (16 + 4 * frozen + 2 * bf16 * (1 + frozen)) + activations * images) / 2**20)


@functools.cache
def memory_of(net, bf16):
    """Parameters of a net, and the bytes that autograd keeps of each image's forward pass; nothing is computed."""
    kept, sizes = [], []

    def keep(tensor):
        kept.append(tensor)
        return tensor

    with FakeTensorMode(), torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        model = UNet(**NETS[net], classes=10 if "hidden" in NETS[net] else 0)
        for n in 1, 2:
            kept.clear()
            x, t = torch.empty(n, model.in_channels, *[cost(net)[0]] * 2), torch.zeros(n, dtype=torch.int64)
            with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
                _outputs = [model(x, t), model.classify(x) if hasattr(model, "head") else None]
            storages = {storage._cdata: storage for storage in (tensor.untyped_storage() for tensor in kept)}
            sizes.append(sum(storage.nbytes() for storage in storages.values()))  # each storage once
    return sum(p.numel() for p in model.parameters()), sizes[1] - sizes[0]  # the weights are kept once


# ------------------------------------------- in a process of its own, one for each job; each yields what it has found

def script(job):
    """A train script as its command runs it, on random images."""
    def load_images(dataset, split, data_dir, side):
        y = torch.arange(12800 if split == "train" else 100) % 10
        return torch.randint(256, (len(y), data.info(dataset).channels, side, side), dtype=torch.uint8), y

    def draw(job, side, classes, saved, labeller):
        shape = job.args.replay_per_class, *job.shape
        return {c: torch.randint(256, shape, dtype=torch.uint8) for c in classes}, {}

    data.load_images, train_jdcl.draw = load_images, draw
    name, *flags = job["command"]
    n = min(row["n"] for row in job["rows"]) + job["warm"]
    sys.argv = [f"{name}.py", *(flag.format(n=n) for flag in flags), "--save-every", "99999999", "--out", "run",
                "--device", job["device"]]
    run.main(importlib.import_module(name).main)
    parameters = json.loads(Path("run/config.json").read_text())["parameters"]
    records = [json.loads(line) for line in Path("run/metrics.jsonl").read_text().splitlines()]
    for row in job["rows"]:
        found, last = [], n if row.get("stage") == "global" else 0  # JDCL's stage 2 begins after update n
        for r in (r for r in records if r["task"] == 2 and r.get("stage") == row.get("stage")):
            if last % n >= job["warm"]:
                found.append(dict(n=r["update"] - last, ms=r["ms_per_update"], mb=r["peak_memory_mb"]))
            last = r["update"]
        yield dict(row=row["name"], records=found, parameters=parameters, command=sys.argv)


def begin(job):
    """The device and its arithmetic, set as the train scripts do; "defaults" leaves all as PyTorch has it."""
    device, setting = run.pick_device(job["device"]), job.get("setting", "fp32")
    if setting != "defaults":
        torch.backends.cudnn.benchmark = True
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = setting == "tf32"
    return device, torch.autocast(device.type, torch.bfloat16, enabled=setting.startswith("bf16"))


def timed(function, blocks, device):
    """Call it so many times for each block; ms are per call."""
    records = []
    for n in blocks:
        begun = time.perf_counter()
        for _ in range(n):
            function()
        if device.type != "cpu":
            torch.accelerator.synchronize()
        ms = 1000 * (time.perf_counter() - begun) / n
        records.append(dict(n=n, ms=ms, mb=run.peak_memory_mb(device)))
    return records


def rates(job):
    """FLOP/s of a square matrix product, the best of 8, for each precision."""
    n = 8192 if job["device"].startswith("cuda") else 1024
    for row in job["rows"]:
        device, _ = begin(dict(job, setting=row["name"]))
        dtype = torch.bfloat16 if row["name"] == "bf16" else torch.float32
        a, b = (torch.randn(n, n, device=device, dtype=dtype) for _ in range(2))
        ms = min(r["ms"] for r in timed(partial(torch.mm, a, b), [1] + [2] * 8, device))
        yield dict(row=row["name"], rate=2000 * n**3 / ms)


def inference(job):
    """Sampling, or FID's features where no net is named: after a call to warm up, 2 to 20 as the seconds allow."""
    device, autocast = begin(job)
    if "net" in job:
        model, abar, side = UNet(**NETS[job["net"]]).to(device), alpha_bar().to(device), cost(job["net"])[0]
        x_T = torch.randn(job["batch"], model.in_channels, side, side, device=device)
        call = partial(sample, model, x_T, abar, job["steps"])
    else:
        u8 = torch.randint(256, (job["batch"], 1, 32, 32), dtype=torch.uint8)
        call = partial(fid_features(inception_network(), "tf1", device), u8)
    with autocast:
        calls = int(1000 * job["seconds"] / timed(call, [1, 1], device)[1]["ms"])
        yield dict(row=job["rows"][0]["name"], records=timed(call, [1] * max(2, min(20, calls)), device))


def diffusers_net(name):
    """Diffusers' UNet2DModel that computes the same as UNet(**NETS[name]), and the shape of its images."""
    from diffusers import UNet2DModel

    net, side = NETS[name], cost(name)[0]
    down = ["AttnDownBlock2D" if i in net["attention"] else "DownBlock2D" for i in range(len(net["channels"]))]
    ours, model = UNet(**net), UNet2DModel(
        in_channels=net["in_channels"], out_channels=net["in_channels"], layers_per_block=net["layers"],
        block_out_channels=net["channels"], norm_num_groups=net["groups"], norm_eps=net["eps"],
        attention_head_dim=net["head_width"], down_block_types=down,
        up_block_types=[block.replace("Down", "Up") for block in reversed(down)])
    model.load_state_dict(ours.state_dict())
    x, t = torch.randn(2, net["in_channels"], side, side), torch.tensor([7, 999])
    with torch.no_grad():
        torch.testing.assert_close(model(x, t).sample, ours(x, t), rtol=0, atol=1e-4)
    return model, x.shape[1:]


def peer(job):
    """The update of each row's method, on diffusers' U-Net."""
    from diffusers import DDIMScheduler

    (device, autocast), B = begin(job), job["batch"]
    model, shape = diffusers_net(job["net"])
    model.to(device)
    prev, optimizer = copy.deepcopy(model).eval().requires_grad_(False), torch.optim.Adam(model.parameters(), 2e-4)
    if job["setting"].endswith("compile"):
        for net in model, prev:
            net.compile(dynamic=False)
    images = torch.randint(256, (1000, *shape), dtype=torch.uint8, device=device)
    scheduler = DDIMScheduler(1000, rescale_betas_zero_snr=True, timestep_spacing="trailing")
    scheduler.set_timesteps(job["steps"])
    taus = scheduler.timesteps.tolist()

    def diffuse(x_0):
        eps, t = torch.randn_like(x_0), torch.randint(1000, (len(x_0),), device=device)
        return scheduler.add_noise(x_0, eps, t), t, eps

    @torch.no_grad()
    def replay(method):
        x = torch.randn(B, *shape, device=device)
        for tau in taus:
            eps = prev(x, torch.full((B,), tau, device=device)).sample.float()
            x = scheduler.step(eps, tau, x).prev_sample
        x_t, t, eps = diffuse(x)
        return x_t, t, prev(x_t, t).sample if method == "gd" else eps

    def update(method):
        with autocast:
            x_0 = images[torch.randint(len(images), (B,), device=device)].float() / 127.5 - 1
            parts = [diffuse(x_0)] + ([replay(method)] if method != "finetune" else [])
            x_t, t, target = (torch.cat(some) for some in zip(*parts))
            loss = F.mse_loss(model(x_t, t).sample, target)  # at task 2 both halves weigh the same
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()

    for row in job["rows"]:
        call, n = partial(update, row["method"]), row["n"]
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        timed(call, [job["warm"]], device)
        every = max(1, min(50, (n + job["warm"]) // 20))  # as in the train scripts
        records = timed(call, [min(every, n - i) for i in range(0, n, every)], device)
        nets = 1 if row["method"] == "finetune" else 2
        yield dict(row=row["name"], records=records, parameters=nets * sum(p.numel() for p in model.parameters()))


# --------------------------------------------------------------------------------------------------- the table

def work(folder, job):
    """Do a job in a new process: its rows, with what was found or why it failed."""
    process = subprocess.run([sys.executable, __file__, "--job", json.dumps(job)], cwd=folder, capture_output=True,
                             encoding="utf-8")
    shutil.rmtree(folder / "run", ignore_errors=True)
    found = [json.loads(line) for line in process.stdout.splitlines() if line.startswith("{")]
    found = {line.pop("row"): line for line in found}
    last = ["", *process.stderr.replace("|", "/").splitlines()][-1][:150]
    return [dict(row, **found.get(row["name"], dict(note=f"exit code {process.returncode}: {last}")))
            for row in job["rows"]]


def cells(row, rate):
    """A line of the table; its numbers are added to `row`."""
    row["floor"] = 1000 * row["flop"] / rate[row["precision"]]
    measured = ["–"] * 8
    if "note" not in row:
        n, ms, mb = np.array([(r["n"], r["ms"], r["mb"]) for r in row["records"]]).T
        mean = np.average(ms, weights=n)
        sd = np.average((ms - mean) ** 2, weights=n) ** 0.5
        row.update(mean=mean, sd=sd, updates=int(n.sum()), peak_mb=int(mb.max()))
        measured = [f"{mean:.1f} ± {sd:.1f}", f"{row['updates']}", f"{1000 * row['batch'] / mean:.1f}",
                    f"{row['floor']:.1f}", f"{row['floor'] / mean:.0%}", f"{row['peak_mb']:,}",
                    f"{row['counted_mb']:,}" if "counted_mb" in row else "",
                    f"{row['parameters']:,}" if "parameters" in row else ""]
    return [row["name"] + (f" ({row['note']})" if "note" in row else ""), *measured, row.get("paper") or ""]


def main(folder):
    parser = run.parser(__doc__)
    add = parser.add_argument
    add("--out", type=Path, metavar="FILE.json", help="all numbers, with every record; written anew after each row")
    add("--rows", nargs="+", default=["*"], metavar="GLOB", help="rows so named, such as '* gd fp32*'; 'x' lists them")
    add("--updates", type=run.positive(int, 1e6), help="measured in a row (default: as many as the seconds allow)")
    add("--seconds", type=run.positive(float), default=30.0, help="for a row, about; 3 to 1000 updates (default: 30)")
    add("--device", default="auto", help="auto (CUDA, else mps, else cpu), cpu, mps, cuda or cuda:<i>")
    add("--scale", choices=["paper", "laptop"], help="default: paper on CUDA, else laptop")
    args = parser.parse_args()
    device = run.pick_device(args.device)
    cuda = device.type == "cuda"
    planned = list(jobs(args.scale or ("paper" if cuda else "laptop"), cuda))
    names = [row["name"] for job in planned for row in job["rows"]]
    for job in planned:
        job["rows"] = [row for row in job["rows"] if any(fnmatch(row["name"], pattern) for pattern in args.rows)]
    planned = [job for job in planned if job["rows"]]
    if not planned:
        parser.error(f"--rows {' '.join(args.rows)} matches none of: {'; '.join(names)}")

    found = dict(device=machine(device.type), torch=torch.__version__, threads=torch.get_num_threads(),
                 load=os.getloadavg()[0], commit=commit() or "unknown", arguments=sys.argv[1:], rows=[])
    if args.out:
        run.check_writable(args.out)
    common = dict(device=str(device), seconds=args.seconds, warm=10 if cuda else 1)
    precisions = sorted({row["precision"] for job in planned for row in job["rows"]})
    products = work(folder, dict(common, kind="rates", rows=[dict(name=precision) for precision in precisions]))
    if "note" in products[-1]:
        raise run.InputError(f"{device} fails at a matrix product: {products[-1]['note']}")
    rate = found["rates"] = {row["name"]: row["rate"] for row in products}
    print("{device}, torch {torch}, {threads} threads, load {load:.1f}, commit {commit}".format(**found)
          + "; matrix products in TFLOP/s: "
          + ", ".join(f"{precision} {value / 1e12:.3g}" for precision, value in rate.items())
          + f"\n\n| {' | '.join(HEAD)} |\n|{'---|' * len(HEAD)}", flush=True)
    for job in planned:
        for row in job["rows"]:  # a guess: an update takes twice its floor, and 5 ms a pass to launch kernels
            guess = 2 * row["flop"] / rate[row["precision"]] + 0.005 * row["passes"] * cuda
            row["n"] = args.updates or max(3, min(1000, int(args.seconds / guess)))
        for row in work(folder, dict(job, **common)):
            print(f"| {' | '.join(cells(row, rate))} |", flush=True)
            found["rows"].append(row)
        if args.out:
            run.write_json(args.out, found)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--job"]:  # how it starts itself
        job = json.loads(sys.argv[2])
        for told in dict(script=script, rates=rates, inference=inference, peer=peer)[job["kind"]](job):
            print(json.dumps(told), flush=True)
    else:
        signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
        with tempfile.TemporaryDirectory(prefix="benchmark-") as folder:
            os.environ["TORCHINDUCTOR_CACHE_DIR"] = f"{folder}/compiled"
            run.main(partial(main, Path(folder)))
