"""How fast and how large an update is: these scripts, diffusers' U-Net, the floor of the arithmetic, the paper's GPU.

Ours     The scripts, each in a process of its own, learn two tasks of random images in the datasets' own formats. What
         task 2 writes into metrics.jsonl is the measurement, without the records that begin in its first 10 updates (on
         a CPU 1), where kernels are chosen and compiled. A record is a mean of up to 50 updates; the deviation is that
         of records, weighted like the mean by updates. Only JDCL's replay is replaced, by random images: after a few
         updates a model finds no image of some class. Its stage 2 is measured with the classifier's terms on.
Peer     The same update on diffusers' UNet2DModel, of the same weights and output, with DDIMScheduler and plain Adam,
         in blocks of as many updates: fp32 with TF32 off; "defaults", PyTorch's own, which are TF32 in convolutions and
         no search for kernels; bf16 autocast with torch.compile, which is left out on a CPU.
Floor    FLOP of all forward passes, a backward pass counted as two, at the rate of a large matrix product of the same
         precision, measured first. It leaves out norms, activations and the optimizer.
Columns  images/s: new images, not replayed ones. Peak MB: allocated on the device; on a CPU, of the whole process.
         Counted MB: 16 bytes for a learned parameter (itself, gradient, Adam), 4 for a frozen one, 2 more for each in
         bf16, and what autograd keeps of an eager forward pass. Parameters: of all nets that the process holds. Paper:
         Table B.1 of arXiv 2311.14028, on a GTX 1080 Ti.
Others   sample: ddim.sample of a batch; fid: features of 32x32 images by FID's network, random weights; per call.

    python tests/benchmark.py [--scale laptop] [--rows '*gd fp32*' '*sample*'] [--seconds 10] [--out FILE.json]
"""

import argparse
import contextlib
import copy
import functools
import gc
import importlib
import json
import os
import pickle
import re
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

import run  # noqa: E402
from ddim import alpha_bar, sample  # noqa: E402
from unet import NETS, UNet, cost  # noqa: E402

PAPER = {  # ms per update, parameters
    "fashion-mnist finetune": "253.3 ± 8.8; 42,855,873", "cifar10 finetune": "383.4 ± 95.3; 35,746,307",
    "fashion-mnist gr": "664.3 ± 3.8; 85,711,746", "cifar10 gr": "1881.8 ± 42.9; 71,492,614",
    "fashion-mnist gd": "747.9 ± 3.6; 85,711,746", "cifar10 gd": "1992.7 ± 47.6; 71,492,614"}
HEAD = ["row", "ms", "updates", "images/s", "floor, ms", "floor / ms", "peak MB", "counted MB", "parameters",
        "paper: ms; parameters"]


# --------------------------------------------------------------------------------------------- what is measured

def jobs(scale, cuda):
    """What each process has to do, in order: `kind`, the function below that does it, its rows, and what it needs."""
    from eval_fid import inception_network
    from train_gd import PRESETS
    from train_jdcl import PRESETS as JDCL
    from train_jdcl import Separate

    def row(name, setting, batch, passes, flop, net=None, images=0, frozen=0, **more):  # passes, flop: of an image
        precision = setting.split()[0]
        if images:  # that an update learns from
            more["counted_mb"] = round(counted(net, precision, images, frozen) / 2**20)
        return dict(name=name, precision=precision, batch=batch, passes=passes, flop=flop * batch, **more)

    def command(dataset, setting, *first):
        precision, *compiled = setting.split()
        return [*first, "--dataset", dataset, "--scale", scale, "--class-order", "0,1|2,3", "--sample-steps", "1",
                "--precision", precision, "--compile" if compiled else "--no-compile"]

    settings = ["fp32", "tf32", "bf16", "bf16 compile"] if cuda else ["fp32", "bf16"]
    peers = {"fp32": "fp32", "tf32": "defaults", settings[-1]: "bf16 compile"}
    for dataset in ["fashion-mnist", "cifar10"] if scale == "paper" else ["fashion-mnist"]:
        label = dataset if scale == "paper" else "laptop"
        net, B, S = (PRESETS[scale, dataset][key] for key in ("unet", "batch_size", "teacher_steps"))
        flop, batch = cost(net)[3], 1024 if cuda else 64 if scale == "laptop" else 4
        methods = dict(finetune=(3, "train_gr", "--replay", "none"), gr=(6 + S, "train_gr"), gd=(7 + S, "train_gd"))
        for s in settings:
            for method, (passes, *script) in methods.items():
                name = f"{label} {method}"
                frozen = int(method != "finetune")
                for more in [], ["--draw-ahead", "8" if scale == "laptop" else "1"]:  # the other one
                    if method == "gd" or not more:
                        yield dict(
                            kind="script", command=command(dataset, s, *script, "--iterations", "1,{n}", *more),
                            rows=[row(" ".join([name, s, *more]), s, B, passes, passes * flop, net, (1 + frozen) * B,
                                      frozen, paper=PAPER.get(name))])
            if p := peers.get(s):
                yield dict(kind="peer" if cuda or p == "fp32" else None, net=net, batch=B, steps=S, setting=p, rows=[
                    row(f"{label} {method} {p}, diffusers", "tf32" if p == "defaults" else p, B, passes, passes * flop,
                        method=method) for method, (passes, *_) in methods.items()])
        for steps in (2, 10) if S == 2 else (S,):
            for s in settings[:3]:
                yield dict(kind="inference", net=net, batch=batch, steps=steps, setting=s, rows=[
                    row(f"{label} sample, {steps} steps, {s}", s, batch, steps, steps * flop)])
    preset = JDCL[scale, dataset]  # CIFAR-10, or the laptop's Fashion-MNIST
    net, B = preset["unet"], preset["batch_size"]
    with torch.device("meta"), FlopCounterMode(display=False) as counter:
        separate = Separate(10, 16 if scale == "laptop" else 64, **NETS[net])
        separate.classify(torch.empty(1, separate.in_channels, *[cost(net)[0]] * 2))
    for s in settings:
        for name, more, flop in (("jdcl", [], sum(cost(net, 10)[3:])),  # of an image that is denoised and classified
                                 ("jdcl separate", ["--separate"], cost(net)[3] + counter.get_total_flops())):
            held = () if more else (net, B, 3)
            yield dict(kind="script", rows=[
                row(f"{label} {name} {stage} {s}", s, B, 2 * n, n * flop, *held, stage=stage)
                for stage, n in (("local", 3), ("global", 4))], command=command(
                    dataset, s, "train_jdcl", "--local-iterations", "1,{n}", "--global-iterations", "{n}",
                    "--eval-every", "{n}", "--classifier-start", "0", "--replay-per-class", "100", *more))
    with torch.device("meta"), FlopCounterMode(display=False) as counter:
        inception_network()(torch.empty(1, 3, 299, 299))
    batch = 128 if cuda else 2
    yield dict(kind="inference", batch=batch, rows=[row("fid fp32", "fp32", batch, 1, counter.get_total_flops())])


@functools.cache
def counted(net, precision, images, frozen):
    """Bytes of an update on paper, see the top; those of the activations grow by as much with each image."""
    found = {}

    def note(tensor):
        found[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        kept.append(tensor)  # or else another could get its address
        return tensor

    model, sizes, kept = UNet(**NETS[net], classes=10 if "hidden" in NETS[net] else 0), [], []
    for n in 1, 2:
        x, t = torch.randn(n, model.in_channels, *[cost(net)[0]] * 2), torch.zeros(n, dtype=torch.int64)
        autocast = torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16")
        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor), autocast:
            outputs = [model(x, t), model.classify(x) if hasattr(model, "head") else None]
        sizes.append(sum(found.values()))
        found.clear()
        kept.clear()
        del outputs
    bytes_each = 16 + 4 * frozen + (2 + 2 * frozen) * (precision == "bf16")
    return sum(p.numel() for p in model.parameters()) * bytes_each + (sizes[1] - sizes[0]) * images


def make_data(folder):
    """Random images as files of Fashion-MNIST and CIFAR-10, 1,280 of each class to train with, 10 to test."""
    random, cifar = np.random.default_rng(0), folder / "cifar-10-batches-py"
    cifar.mkdir(parents=True)
    for split, n in ("train", 12800), ("t10k", 100):
        size, sides = n.to_bytes(4, "big"), bytes([0, 0, 0, 28] * 2)
        (folder / f"{split}-images-idx3-ubyte").write_bytes(b"\0\0\x08\x03" + size + sides + random.bytes(n * 28 * 28))
        (folder / f"{split}-labels-idx1-ubyte").write_bytes(b"\0\0\x08\x01" + size + bytes(range(10)) * (n // 10))
    for file, n in [(f"data_batch_{i}", 2560) for i in range(1, 6)] + [("test_batch", 100)]:
        batch = {b"data": random.integers(256, size=(n, 3072), dtype=np.uint8), b"labels": [*range(10)] * (n // 10)}
        (cifar / file).write_bytes(pickle.dumps(batch, protocol=4))


# ------------------------------------------- in a process of its own, one for each job; each yields what it has found

def script(job):
    """A train script as its command runs it; it also counts the parameters of its nets when it saves task 2."""
    name, *rest = job["command"]
    module, save, held = importlib.import_module(name), run.save, []

    def save_and_count(path, state):
        nets = [net for net in gc.get_objects() if isinstance(net, UNet)]
        held.append(sum(p.numel() for net in nets for p in net.parameters()))
        save(path, state)

    def draw(args, generator, labeller, k, source, classes, abar, kept, save):
        kept["labels"] = torch.tensor(classes).repeat_interleave(args.replay_per_class)
        kept["images"] = torch.randint(256, (len(kept["labels"]), *kept["images"].shape[1:]), dtype=torch.uint8)

    run.save = save_and_count
    if name == "train_jdcl":
        module.draw = draw
    n = min(row["n"] for row in job["rows"]) + job["warm"]
    sys.argv = [f"{name}.py", *(part.format(n=n) for part in rest), "--save-every", "99999999", "--data-dir", "data",
                "--out", "run", "--device", job["device"]]
    run.main(module.main)
    lines = [json.loads(line) for line in Path("run/metrics.jsonl").read_text().splitlines()]
    for row in job["rows"]:
        some, last = [], n if row.get("stage") == "global" else 0  # update n is where JDCL's second stage begins
        for r in (r for r in lines if r["task"] == 2 and r.get("stage") == row.get("stage")):
            some.append(dict(begin=last % n, n=r["update"] - last, ms=r["ms_per_update"], mb=r["peak_memory_mb"]))
            last = r["update"]
        some = [r for r in some if r["begin"] >= job["warm"]]
        yield dict(row=row["name"], records=some, parameters=held[-1], command=sys.argv)


def begin(job):
    """The device, and its arithmetic set as the train scripts do, but "defaults" leaves all as PyTorch has it."""
    device, setting = torch.device(job["device"]), job.get("setting", "fp32")
    if device.type == "cuda":
        torch.cuda.set_device(device.index or 0)
    if setting != "defaults":
        torch.backends.cudnn.benchmark = True
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = setting == "tf32"
    return device, torch.autocast(device.type, torch.bfloat16, enabled=setting.startswith("bf16"))


def timed(function, blocks, device):
    """Call it so many times for each block; ms are per call."""
    def mark():
        if device.type == "cpu":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    records = []
    for n in blocks:
        begun = mark()
        for _ in range(n):
            function()
        end = mark()
        if device.type == "cuda":
            end.synchronize()
        ms = 1000 * (end - begun) if device.type == "cpu" else begun.elapsed_time(end)
        records.append(dict(n=n, ms=ms / n, mb=run.peak_memory_mb(device)))
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
        x = torch.randn(job["batch"], model.in_channels, side, side, device=device)
        call = partial(sample, model, x, abar, job["steps"])
    else:
        from eval_fid import fid_features, inception_network
        x = torch.randint(256, (job["batch"], 1, 32, 32), dtype=torch.uint8)
        call = partial(fid_features(inception_network(), "tf1", device), x)
    with autocast:
        calls = int(1000 * job["seconds"] / timed(call, [1, 1], device)[1]["ms"])
        yield dict(row=job["rows"][0]["name"], records=timed(call, [1] * max(2, min(20, calls)), device))


def peer(job):
    """The update of each row's method, on diffusers' U-Net."""
    from diffusers import DDIMScheduler, UNet2DModel

    device, autocast = begin(job)
    net, side, B = NETS[job["net"]], cost(job["net"])[0], job["batch"]
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
    model.to(device)
    images = torch.randint(256, (1000, *x.shape[1:]), dtype=torch.uint8, device=device)
    scheduler = DDIMScheduler(1000, rescale_betas_zero_snr=True, timestep_spacing="trailing")
    scheduler.set_timesteps(job["steps"])
    taus, prev, optimizer = scheduler.timesteps.tolist(), None, torch.optim.Adam(model.parameters(), 2e-4)

    def diffuse(x):
        eps, t = torch.randn_like(x), torch.randint(1000, (len(x),), device=device)
        return scheduler.add_noise(x, eps, t), t, eps

    @torch.no_grad()
    def replay(method):
        x = torch.randn(B, *images.shape[1:], device=device)
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

    compiled = job["setting"].endswith("compile")
    if compiled:
        model.compile(dynamic=False)
    for row in job["rows"]:
        if row["method"] != "finetune" and prev is None:
            prev = copy.deepcopy(model).eval().requires_grad_(False)
            if compiled:
                prev.compile(dynamic=False)
        call, n = partial(update, row["method"]), row["n"]
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        timed(call, [job["warm"]], device)
        every = max(1, min(50, (n + job["warm"]) // 20))  # as in the train scripts
        records = timed(call, [min(every, n - i) for i in range(0, n, every)], device)
        held = sum(p.numel() for some in (model, prev) if some for p in some.parameters())
        yield dict(row=row["name"], records=records, parameters=held)


# --------------------------------------------------------------------------------------------------- the table

def work(folder, job):
    """Do a job in a new process, no part of which outlives this: its rows, with what was found or why it failed."""
    with open(folder / "out", "w+") as out, open(folder / "err", "w+") as err:
        process = subprocess.Popen([sys.executable, __file__, "--job", json.dumps(job)], cwd=folder, stdout=out,
                                   stderr=err, start_new_session=True)
        try:
            code = process.wait()
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)  # also what compiles for it
            process.wait()
            shutil.rmtree(folder / "run", ignore_errors=True)
    found = [json.loads(line) for line in (folder / "out").read_text().splitlines() if line.startswith("{")]
    found = {line.pop("row"): line for line in found}
    last = ["", *(folder / "err").read_text().replace("|", "/").splitlines()][-1][:150]
    return [dict(row, **found.get(row["name"], dict(note=f"exit code {code}: {last}"))) for row in job["rows"]]


def cells(row, rate):
    """A row of the table; its numbers are added to `row`."""
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
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--out", type=Path, metavar="FILE.json", help="all numbers, with every record; written anew after each row")
    add("--rows", nargs="+", default=["*"], metavar="GLOB", help="rows so named, such as '* gd fp32*'; 'x' lists them")
    add("--updates", type=run.positive(int, 1e6), help="measured in a row (default: as many as the seconds allow)")
    add("--seconds", type=run.positive(float), default=30.0, help="for a row, about; 3 to 1000 updates (default: 30)")
    add("--device", default="auto", help="auto (CUDA if there is one), cpu, cuda or cuda:<i>")
    add("--scale", choices=["paper", "laptop"], help="default: paper on CUDA, laptop on a CPU")
    args = parser.parse_args()
    device = run.pick_device(args.device)
    cuda = device.type == "cuda"
    planned = list(jobs(args.scale or ("paper" if cuda else "laptop"), cuda))
    names = [row["name"] for job in planned for row in job["rows"]]
    chosen = {name for name in names for pattern in args.rows if fnmatch(name, pattern)}
    if not chosen:
        parser.error(f"--rows {' '.join(args.rows)} matches none of: {'; '.join(names)}")
    for job in planned:
        job["rows"] = [row for row in job["rows"] if row["name"] in chosen]
    planned = [job for job in planned if job["rows"]]

    cpu = re.findall(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text()) if sys.platform == "linux" else []
    git = ["git", "-C", str(ROOT), "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"]
    commit = subprocess.run(git, capture_output=True, text=True).stdout.strip() if shutil.which("git") else ""
    found = dict(device=torch.cuda.get_device_name(device) if cuda else (cpu + ["a CPU"])[0], torch=torch.__version__,
                 threads=torch.get_num_threads(), load=os.getloadavg()[0], commit=commit or "unknown",
                 arguments=sys.argv[1:], rows=[])
    save = partial(run.write_json, args.out) if args.out else lambda found: None
    save(found)  # if that cannot be, it is told now
    make_data(folder / "data")
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
        done = work(folder, dict(job, **common)) if job["kind"] else [
            dict(row, note="not measured on a CPU") for row in job["rows"]]
        for row in done:
            print(f"| {' | '.join(cells(row, rate))} |", flush=True)
        found["rows"] += done
        save(found)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--job"]:  # how it starts itself
        job = json.loads(sys.argv[2])
        for told in dict(script=script, rates=rates, inference=inference, peer=peer)[job["kind"]](job):
            print(json.dumps(told), flush=True)
    else:
        signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
        with tempfile.TemporaryDirectory(prefix="benchmark-") as folder:
            os.environ.update(CL_DATA_UNVERIFIED="1", TORCHINDUCTOR_CACHE_DIR=f"{folder}/compiled")
            run.main(partial(main, Path(folder)))
