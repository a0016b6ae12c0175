"""How fast and how large an update is: these scripts, diffusers' U-Net, the floor of the arithmetic, the paper's GPU.

Ours     A train script in a process of its own learns two tasks of random images. Measured are the records of task 2 in
         metrics.jsonl, means of up to 50 updates, but for the first 10 updates (on a CPU 1), where kernels are chosen
         and compiled. JDCL's replay is random too, and its stage 2 has the classifier's terms on.
Variants The same with one thing changed: the nets in "channels_last", or compiled in another mode of torch.compile:
         "reduce-overhead", which records CUDA graphs, and "max-autotune-no-cudagraphs".
Peer     The same update on diffusers' UNet2DModel, with the same weights and outputs, DDIMScheduler and plain Adam.
         "fp32" has TF32 off. "defaults" is what PyTorch does by itself: TF32 in convolutions, no search for kernels.
         "bf16 compile" is autocast and torch.compile, on CUDA alone.
Floor    FLOP of all forward passes, a backward pass counted as two, at the speed of a large matrix product of the same
         precision, which is measured first. It leaves out norms, activations and the optimizer.
FID      Features of 32x32 images by FID's network, with random weights.

The rows of a group are measured in turn, twice, so that a machine that slows down slows all of them. Mean and deviation
are weighted by updates; images/s are of new images, parameters of all networks that the method needs. "paper" is Table
B.1 of arXiv 2311.14028, on a GTX 1080 Ti.

    python tests/benchmark.py [--minutes 30] [--scale laptop] [--rows '*gd*' 'fid*'] [--out FILE.json]
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
from torch.utils.flop_counter import FlopCounterMode

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import data  # noqa: E402
import run  # noqa: E402
import train_gd  # noqa: E402
import train_jdcl  # noqa: E402
from eval_fid import fid_features, inception_network  # noqa: E402
from report import machine  # noqa: E402
from run import commit  # noqa: E402
from unet import NETS, UNet, cost, resnet18  # noqa: E402

PAPER = {  # ms per update, parameters
    "fashion-mnist finetune": "253.3 ± 8.8; 42,855,873", "cifar10 finetune": "383.4 ± 95.3; 35,746,307",
    "fashion-mnist gr": "664.3 ± 3.8; 85,711,746", "cifar10 gr": "1881.8 ± 42.9; 71,492,614",
    "fashion-mnist gd": "747.9 ± 3.6; 85,711,746", "cifar10 gd": "1992.7 ± 47.6; 71,492,614"}
HEAD = ["row", "ms", "updates", "images/s", "floor, ms", "floor / ms", "peak MB", "parameters", "paper: ms; parameters"]


# --------------------------------------------------------------------------------------------- what is measured

def groups(scale, cuda):
    """All groups in order of worth, lists of jobs. A job is a dict: `kind` (the function below that makes it), `rows`,
    and what it needs.
    """
    best, *others = ["bf16 compile", "fp32", "tf32"] if cuda else ["fp32", "bf16"]
    peers = {"fp32": "fp32", "tf32": "defaults", "bf16 compile": "bf16 compile"}
    first, *second = datasets = ["fashion-mnist", "cifar10"] if scale == "paper" else ["fashion-mnist"]
    label = "{}" if scale == "paper" else "laptop"

    def row(name, setting, batch, passes, flop, **more):  # passes and flop are of one image, and all of an update
        return dict(name=name, precision=setting.split()[0], batch=batch, passes=passes, flop=flop * batch, **more)

    def command(setting, dataset, *first):
        return [*first, "--dataset", dataset, "--scale", scale, "--class-order", "0,1|2,3", "--sample-steps", "1",
                "--precision", setting.split()[0], "--compile" if "compile" in setting else "--no-compile"]

    def update(dataset, method, setting, variant="", peer=False, **how):
        """A job of one row: an update of finetune, gr or gd, on our U-Net or on diffusers'."""
        preset = train_gd.PRESETS[dataset][scale]
        net, B, S = (preset[key] for key in ("unet", "batch_size", "teacher_steps"))
        passes, *script = {"finetune": (3, "train_gr", "--replay", "none"),  # forward, and a backward one is two
                           "gr": (6 + S, "train_gr"), "gd": (7 + S, "train_gd")}[method]
        name = f"{label.format(dataset)} {method}"
        found = partial(row, setting=setting, batch=B, passes=passes, flop=passes * cost(net)[2])
        if peer:
            return dict(kind="peer", net=net, batch=B, steps=S, setting=peers[setting], method=method,
                        rows=[found(f"{name} {peers[setting]}, diffusers")])
        return dict(kind="script", command=command(setting, dataset, *script, "--iterations", "1,{n}"), **how,
                    rows=[found(f"{name} {setting}{variant}", paper=PAPER.get(name))])

    def beside_peers(dataset, method, settings):
        return [update(dataset, method, setting, peer=peer) for setting in settings
                for peer in (False, True) if setting in peers or not peer]

    def variants(dataset):
        modes = ["reduce-overhead", "max-autotune-no-cudagraphs"] if cuda else []
        return [update(dataset, "gd", best, " channels_last", channels_last=True),
                *(update(dataset, "gd", best, f" {mode}", mode=mode) for mode in modes)]

    def jdcl(dataset, variant="", flags=(), **how):
        """A job of two rows, an update of stage 1 and one of stage 2."""
        preset = train_jdcl.PRESETS[dataset][scale]
        net, B = preset["unet"], preset["batch_size"]
        image = NETS[net]["in_channels"], *[cost(net)[0]] * 2
        classify = lambda: UNet(**NETS[net], classes=10).classify  # noqa: E731
        if flags:
            classify = partial(resnet18, image[0], 10, 16 if image[1] < 32 else 64)
        flop = cost(net)[2] + count_flop(classify, image)  # of an image that is denoised and classified
        length = "--local-iterations 1,{n} --global-iterations {n} --eval-every {n} --classifier-start 0".split()
        rows = [row(f"{label.format(dataset)} jdcl{variant} {stage} {best}", best, B, 2 * n, n * flop, stage=stage)
                for stage, n in (("local", 3), ("global", 4))]
        return dict(kind="script", rows=rows, **how, command=command(
            best, dataset, "train_jdcl", *length, "--replay-per-class", "100", *flags))

    yield beside_peers(first, "gd", [best]) + variants(first)
    yield beside_peers(first, "gd", others)
    for dataset in second:
        yield beside_peers(dataset, "gd", [best]) + variants(dataset)
    for method in "finetune", "gr":
        yield [job for dataset in datasets for job in beside_peers(dataset, method, [best])]
    yield [jdcl(datasets[-1]), jdcl(datasets[-1], " channels_last", channels_last=True),
           jdcl(datasets[-1], " separate", ["--separate"])]
    flop, batch = count_flop(inception_network, (3, 299, 299)), 128 if cuda else 2
    yield [dict(kind="fid", batch=batch, rows=[row("fid fp32", "fp32", batch, 1, flop)])]


def count_flop(build, image):
    """FLOP of a forward pass of build() for an image of this shape."""
    with torch.device("meta"), FlopCounterMode(display=False) as counter:
        build()(torch.empty(1, *image))
    return counter.get_total_flops()


# ------------------------------------------- in a process of its own, one for each job; each yields what it has found

def script(job):
    """A train script as its command runs it, on random images."""
    def load_images(dataset, split, data_dir, side):
        y = torch.arange(12800 if split == "train" else 100) % 10
        return torch.randint(256, (len(y), data.info(dataset).channels, side, side), dtype=torch.uint8), y

    def draw(job, side, classes, saved, labeller):
        y = torch.tensor(classes).repeat_interleave(job.args.replay_per_class)
        return torch.randint(256, (len(y), *job.shape), dtype=torch.uint8), y, {}

    data.load_images, train_jdcl.draw = load_images, draw
    if job.get("mode"):
        torch.nn.Module.compile = functools.partialmethod(torch.nn.Module.compile, mode=job["mode"])
    if job.get("channels_last"):
        to = torch.nn.Module.to
        torch.nn.Module.to = lambda net, device: to(to(net, device), memory_format=torch.channels_last)
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
    """FLOP/s of a square matrix product, the best of 5, for each precision."""
    n = 8192 if job["device"].startswith("cuda") else 512  # some processors take a second for that in bf16
    for row in job["rows"]:
        device, _ = begin(dict(job, setting=row["name"]))
        dtype = torch.bfloat16 if row["name"] == "bf16" else torch.float32
        a, b = (torch.randn(n, n, device=device, dtype=dtype) for _ in range(2))
        ms = min(r["ms"] for r in timed(partial(torch.mm, a, b), [1] * 6, device))
        yield dict(row=row["name"], rate=2000 * n**3 / ms)


def fid(job):
    """FID's features: after a call to warm up, 2 to 20 as the seconds allow."""
    device, _ = begin(job)
    u8 = torch.randint(256, (job["batch"], 1, 32, 32), dtype=torch.uint8)
    call = partial(fid_features(inception_network(), "tf1", device), u8)
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
    """The update on diffusers' U-Net."""
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
    def replay():
        x = torch.randn(B, *shape, device=device)
        for tau in taus:
            eps = prev(x, torch.full((B,), tau, device=device)).sample.float()
            x = scheduler.step(eps, tau, x).prev_sample
        x_t, t, eps = diffuse(x)
        return x_t, t, prev(x_t, t).sample if job["method"] == "gd" else eps

    def update():
        with autocast:
            x_0 = images[torch.randint(len(images), (B,), device=device)].float() / 127.5 - 1
            parts = [diffuse(x_0)] + ([replay()] if job["method"] != "finetune" else [])
            x_t, t, target = (torch.cat(some) for some in zip(*parts))
            loss = F.mse_loss(model(x_t, t).sample, target)  # at task 2 both halves weigh the same
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()

    n = job["rows"][0]["n"]
    timed(update, [job["warm"]], device)
    every = max(1, min(50, (n + job["warm"]) // 20))  # as in the train scripts
    records = timed(update, [min(every, n - i) for i in range(0, n, every)], device)
    nets = 1 if job["method"] == "finetune" else 2
    parameters = nets * sum(p.numel() for p in model.parameters())
    yield dict(row=job["rows"][0]["name"], records=records, parameters=parameters)


# --------------------------------------------------------------------------------------------------- the table

def work(folder, job):
    """Do a job in a new process: of each row what was found, or a note why it failed."""
    process = subprocess.run([sys.executable, __file__, "--job", json.dumps(job)], cwd=folder, capture_output=True,
                             encoding="utf-8")
    shutil.rmtree(folder / "run", ignore_errors=True)
    found = [json.loads(line) for line in process.stdout.splitlines() if line.startswith("{")]
    found = {line.pop("row"): line for line in found}
    last = ["", *process.stderr.replace("|", "/").splitlines()][-1][:150]
    return [found.get(row["name"], dict(note=f"exit code {process.returncode}: {last}")) for row in job["rows"]]


def cells(row, rate):
    """A line of the table; its numbers are added to `row`."""
    row["floor"] = 1000 * row["flop"] / rate[row["precision"]]
    measured = ["–"] * 7
    if row["records"]:
        n, ms, mb = np.array([(r["n"], r["ms"], r["mb"]) for r in row["records"]]).T
        mean = np.average(ms, weights=n)
        sd = np.average((ms - mean) ** 2, weights=n) ** 0.5
        row.update(mean=mean, sd=sd, updates=int(n.sum()), peak_mb=int(mb.max()))
        measured = [f"{mean:.1f} ± {sd:.1f}", f"{row['updates']}", f"{1000 * row['batch'] / mean:.1f}",
                    f"{row['floor']:.1f}", f"{row['floor'] / mean:.0%}", f"{row['peak_mb']:,}",
                    f"{row['parameters']:,}" if "parameters" in row else ""]
    return [row["name"] + (f" ({row['note']})" if "note" in row else ""), *measured, row.get("paper") or ""]


def main(folder):
    parser = run.parser(__doc__, __file__)
    add = parser.add_argument
    add("--out", type=Path, metavar="FILE.json", help="all numbers, with every record; written anew after each row")
    add("--minutes", type=run.positive(float), help="begin no row after so many (default: all rows, as is said first)")
    add("--rows", nargs="+", default=["*"], metavar="GLOB", help="rows so named, such as '* gd fp32*'; 'x' lists them")
    add("--seconds", type=run.positive(float), default=10.0, help="of a row each time, 3 to 1000 updates (default: 10)")
    add("--device", default="auto", help="auto (CUDA, else mps, else cpu), cpu, mps, cuda or cuda:<i>")
    add("--scale", choices=["paper", "laptop"], help="default: paper on CUDA, else laptop")
    args = parser.parse_args()
    begun, device = time.monotonic(), run.pick_device(args.device)
    cuda = device.type == "cuda"
    planned = list(groups(args.scale or ("paper" if cuda else "laptop"), cuda))
    names = [row["name"] for jobs in planned for job in jobs for row in job["rows"]]
    for jobs in planned:
        jobs[:] = [job for job in jobs if any(fnmatch(row["name"], glob) for row in job["rows"] for glob in args.rows)]
    rows = [row for jobs in planned for job in jobs for row in job["rows"]]
    if not rows:
        parser.error(f"--rows {' '.join(args.rows)} matches none of: {'; '.join(names)}")
    if args.out:
        run.check_writable(args.out)

    # What will be done, and a guess of how long that takes: a process starts in 10 s, compiles a network in 60 s.
    seconds = sum(2 * (10 + len(job["rows"]) * args.seconds) + 60 * ("compile" in job["rows"][0]["name"])
                  for jobs in planned for job in jobs)
    print(f"{len(rows)} rows in this order, about {seconds / 60:.0f} minutes"
          + (f", but none begins after {args.minutes:g}:" if args.minutes else ":"))
    print(*(f"  {row['name']}" for row in rows), sep="\n")
    if not cuda:
        print("Left out are compiled code and TF32, which need CUDA.")

    found = dict(device=machine(device.type), torch=torch.__version__, threads=torch.get_num_threads(),
                 load=os.getloadavg()[0], commit=commit() or "unknown", arguments=sys.argv[1:], rows=rows)
    common = dict(device=str(device), seconds=args.seconds, warm=10 if cuda else 1)
    precisions = sorted({row["precision"] for row in rows})
    products = work(folder, dict(common, kind="rates", rows=[dict(name=precision) for precision in precisions]))
    if "note" in products[-1]:
        raise run.InputError(f"{device} fails at a matrix product: {products[-1]['note']}")
    rate = found["rates"] = {precision: product["rate"] for precision, product in zip(precisions, products)}
    print("\n{device}, torch {torch}, {threads} threads, load {load:.1f}, commit {commit}".format(**found)
          + "; matrix products in TFLOP/s: "
          + ", ".join(f"{precision} {value / 1e12:.3g}" for precision, value in rate.items())
          + f"\n\n| {' | '.join(HEAD)} |\n|{'---|' * len(HEAD)}", flush=True)
    for row in rows:  # a guess: an update takes twice its floor, and 5 ms a pass to launch kernels
        guess = 2 * row["flop"] / rate[row["precision"]] + 0.005 * row["passes"] * cuda
        row["n"] = max(3, min(1000, int(args.seconds / guess)))
    for jobs in planned:
        for job in 2 * jobs:
            if args.minutes and time.monotonic() - begun > 60 * args.minutes:
                break
            for row, new in zip(job["rows"], work(folder, dict(job, **common))):
                row.update(new, records=row.get("records", []) + new.get("records", []))
            if args.out:
                run.write_json(args.out, found)
        for row in (row for job in jobs for row in job["rows"] if "records" in row):
            print(f"| {' | '.join(cells(row, rate))} |", flush=True)
    if args.out:
        run.write_json(args.out, found)
    if left := [row["name"] for row in rows if "records" not in row]:
        print(f"\nThe minutes are spent; left out are: {'; '.join(left)}")


if __name__ == "__main__":
    if sys.argv[1:2] == ["--job"]:  # how it starts itself
        job = json.loads(sys.argv[2])
        for told in dict(script=script, rates=rates, fid=fid, peer=peer)[job["kind"]](job):
            print(json.dumps(told), flush=True)
    else:
        signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
        with tempfile.TemporaryDirectory(prefix="benchmark-") as folder:
            os.environ["TORCHINDUCTOR_CACHE_DIR"] = f"{folder}/compiled"
            run.main(partial(main, Path(folder)))
