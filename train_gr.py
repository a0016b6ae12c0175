"""Generative replay of a diffusion model, and its baselines: experience replay, finetuning, joint training.

A diffusion model learns a sequence of tasks, two new classes at a time, without keeping old images. Before task k a
copy of the model is frozen; at every update it draws, with a few DDIM steps, as many images as the batch has, and the
model learns to denoise the new images and the replayed ones. The errors of the replayed images accumulate.

    L = 1/k |eps - model(x_t, t)|^2 + (1 - 1/k) |eps_r - model(x_r_t, t_r)|^2              tasks k >= 2
    x_r = DDIM(prev), x_r_t = sqrt(abar_t_r) x_r + sqrt(1 - abar_t_r) eps_r

Masip et al., "Continual Learning of Diffusion Models with Generative Distillation", arXiv 2311.14028, Section 3.1.

    python train_gr.py                                     Fashion-MNIST as in the paper, on a GPU; --dataset cifar10
    python train_gr.py --dataset shapes --scale laptop     a few minutes on a laptop, no download
"""

import argparse
import copy
import math

import torch
import torch.nn.functional as F
from PIL import Image
from torchvision.utils import make_grid

import data
import run
from ddim import T, alpha_bar, q_sample, sample, seed
from unet import NETS, UNet

LOG = ("loss", "loss_new", "loss_replay", "gradient_norm")

# -------------------------------------------------------------------------------------------------- arguments

PAPER = dict(image_size=32, tasks=5, class_order="random", lr=2e-4, schedule="zero-snr", flip=False, iterations=[],
             draw_ahead=8)
LAPTOP = dict(PAPER, image_size=16, batch_size=32, lr=2e-3, teacher_steps=2, draw_ahead=1, sample_steps=10,
              unet="laptop", tasks=3, class_order="0,1|2,7|8,9")  # these classes look different even at 16x16
PRESETS = {  # what depends on the dataset: the paper's runs (Sections 4 and A.1), and runs for a laptop
    ("paper", "fashion-mnist"): dict(PAPER, unet="fashion-mnist", batch_size=128, epochs=[100], teacher_steps=2,
                                     sample_steps=10),
    # DEVIATION: the paper augments nothing, its released runs mirror CIFAR's images. Appendix A.5 evaluates with 10
    # DDIM steps, its end and Section 4.2.2 say 20 on CIFAR-10, as here.
    ("paper", "cifar10"): dict(PAPER, unet="cifar10", batch_size=64, epochs=[200], teacher_steps=10, sample_steps=20,
                               flip=True),
}
PRESETS["paper", "shapes"] = PRESETS["paper", "fashion-mnist"]
PRESETS["paper", "cifar100"] = PRESETS["paper", "cifar10"]
PRESETS["paper", "imagenet100"] = dict(PRESETS["paper", "cifar10"], image_size=64)
PRESETS["laptop", "fashion-mnist"] = dict(LAPTOP, epochs=[1.6, 0.4])  # 600, 150, 150 updates, as in the next two
PRESETS["laptop", "shapes"] = dict(LAPTOP, epochs=[4.8, 1.2], class_order="0,1|2,3|4,5")
PRESETS["laptop", "cifar10"] = dict(LAPTOP, epochs=[1.917, 0.479], unet="laptop-rgb", flip=True)


def get_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
                                     allow_abbrev=False)
    add = parser.add_argument
    add("--dataset", default="fashion-mnist", choices=list(data.DATASETS), help="default: fashion-mnist")
    add("--replay", default="generated", choices=["generated", "buffer", "none", "all"],
        help="samples of the previous model (GR), kept images (ER), nothing (finetune), all data so far (joint)")
    add("--buffer-size", type=run.positive(int), help="images the buffer holds in total (paper: 10, 100, 1000)")
    add("--teacher-steps", type=run.positive(int, T), help="DDIM steps of the previous model (paper: 2, CIFAR-10 10)")
    add("--draw-ahead", type=run.positive(int, 1e4), help="replay is drawn for so many updates (default: 8, laptop 1)")
    add("--scale", default="paper", choices=["paper", "laptop"], help="the paper's run, or minutes at 16x16")
    add("--tasks", type=run.positive(int), help="number of tasks the classes are split into (paper: 5)")
    add("--class-order", help="random (by the seed, as the paper), natural, or '0,1|2,7' states the tasks")
    add("--epochs", type=run.per_task(float), help="passes over a task: E, or E1,E2,... (paper: 100, CIFAR-10 200)")
    add("--iterations", type=run.per_task(int), help="updates of each task, in place of epochs: N, or N1,N2,...")
    add("--batch-size", type=run.positive(int), help="images of the current task per update (paper: 128, CIFAR-10 64)")
    add("--lr", type=run.positive(float), help="learning rate of Adam (paper: 2e-4)")
    add("--seed", type=run.whole, default=42, help="of weights, class order and noise (paper: 42, 69, 1714)")
    add("--unet", choices=list(NETS), help="network (default: the paper's for the dataset)")
    add("--init", metavar="PATH", help="start from these weights: a task<k>.pt, or diffusers' UNet2DModel .bin")
    add("--schedule", choices=["zero-snr", "linear"], help="noise schedule (default: zero-snr, as the released runs)")
    add("--flip", action=argparse.BooleanOptionalAction, help="random mirroring (default: CIFAR, ImageNet)")
    add("--sample-steps", type=run.positive(int, T), help="DDIM steps of pictures and evaluation (paper: 10 and 20)")
    add("--precision", default="auto", choices=["auto", "fp32", "tf32", "bf16"], help="auto: bf16 on CUDA, else fp32")
    add("--compile", action=argparse.BooleanOptionalAction, help="torch.compile and CUDA graphs (default: on CUDA)")
    run.add_arguments(parser)
    args = parser.parse_args(argv)

    for key in "teacher_steps", "draw_ahead":
        if getattr(args, key) and args.replay != "generated":
            parser.error(f"--{key.replace('_', '-')} does nothing where the replay is {args.replay}")
    if (args.scale, args.dataset) not in PRESETS:
        parser.error(f"--scale laptop is not there for {args.dataset}; try fashion-mnist, shapes or cifar10")
    usual, asked_tasks = dict(PRESETS[args.scale, args.dataset]), args.tasks
    if asked_tasks not in (None, usual["tasks"]) and args.class_order is None:
        args.class_order = "random"
    if args.iterations:
        args.epochs = []
    run.fill(args, usual)
    if args.replay != "generated":
        args.teacher_steps = args.draw_ahead = None
    info, net = data.DATASETS[args.dataset], NETS[args.unet]
    if net["in_channels"] != info["channels"]:
        parser.error(f"--unet {args.unet} takes {net['in_channels']} channels, {args.dataset} has {info['channels']}")
    tasks = args.tasks if args.class_order in ("random", "natural") else asked_tasks  # a stated order says how many
    args.class_tasks = data.class_tasks(len(info["classes"]), tasks, args.class_order, args.seed)
    args.tasks = len(args.class_tasks)
    if args.epochs != usual["epochs"] and len(args.iterations + args.epochs) > args.tasks:  # one of them is empty
        parser.error(f"--iterations and --epochs take at most one value for each of the {args.tasks} tasks")
    if args.buffer_size and args.replay != "buffer":
        parser.error("--buffer-size is for --replay buffer")
    if args.replay == "buffer" and (args.buffer_size or 0) < max(1, args.tasks - 1):
        parser.error(f"--replay buffer needs a --buffer-size of at least {max(1, args.tasks - 1)}, one per past task")

    args.method = {"generated": "gr", "buffer": "er", "none": "finetune", "all": "joint"}[args.replay]
    count = args.teacher_steps or args.buffer_size
    base = f"{args.method}-{count}" if count else args.method
    usual.update(teacher_steps=args.teacher_steps, scale="paper", precision="auto", init=None)
    args.name = run.run_name(base, args, usual)
    return args


# ----------------------------------------------------------------------------------------------------- losses

def diffuse(x_0, abar):
    """x_t = sqrt(abar_t) x_0 + sqrt(1 - abar_t) eps, each image with its own t from 0 .. T-1 and eps ~ N(0, I).

    x_t, t, eps of the whole batch; with torchrun of this process's share of it.
    """
    t = torch.randint(T, (len(x_0),), device=x_0.device)
    eps = torch.randn_like(x_0)
    return [run.share(x) for x in (q_sample(x_0, t, eps, abar), t, eps)]


def to_x_0(u8, flip):
    """uint8 (B, C, H, W) -> x_0 in [-1, 1], mirrored left to right with probability 1/2 if `flip`."""
    x_0 = data.normalize(u8)
    return torch.where(torch.rand(len(x_0), 1, 1, 1, device=x_0.device) < 0.5, x_0.flip(3), x_0) if flip else x_0


def keep(args, tasks, k):
    """Indices of the buffer in task k: floor(size / (k - 1)) of each past task, the first in a fixed random order.

    DEVIATION: the released code averages new and kept images in one mean; we follow the paper, 1/k and 1 - 1/k.
    """
    seed(args.seed, "buffer")
    return torch.cat([task[torch.randperm(len(task))[:args.buffer_size // (k - 1)]] for task in tasks[:k - 1]])


@torch.no_grad()
def replay(args, x_r, x_0, kept, abar):
    """The replayed half of a batch: noisy images x_r_t (B, C, H, W), their times t_r (B,), what to predict there."""
    if args.replay == "buffer":
        x_r = to_x_0(kept[torch.randperm(len(kept), device=x_0.device)[:len(x_0)]], args.flip)
    x_r_t, t_r, eps_r = diffuse(x_r, abar)
    target_r = eps_r                                    # GR: the noise that was added
    return x_r_t, t_r, target_r


def losses(model, x_t, t, eps, replayed):
    """|eps - model(x_t, t)|^2 of the new images and |target_r - model(x_r_t, t_r)|^2 of the replayed ones, two scalars.

    DEVIATION: means over all elements, as in the released runs, where the paper writes squared norms.
    """
    if replayed is None:
        return F.mse_loss(model(x_t, t), eps), torch.zeros((), device=x_t.device)
    x_r_t, t_r, target_r = replayed
    pred = model(torch.cat([x_t, x_r_t]), torch.cat([t, t_r]))  # one forward for both halves: (2B, C, H, W)
    return F.mse_loss(pred[:len(eps)], eps), F.mse_loss(pred[-len(target_r):], target_r)


# ------------------------------------------------------------------------------------------------------ train

def main(argv=None):
    args = get_args(argv)
    device = run.pick_device(args.device)
    run.pick_speed(args, device)
    torch.backends.cudnn.benchmark = True
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = args.precision == "tf32"
    autocast = torch.autocast(device.type, torch.bfloat16, enabled=args.precision == "bf16")

    # Data: one uint8 tensor on the device; a batch is an index.
    images, labels = data.load_images(args.dataset, "train", args.data_dir, args.image_size)
    tasks = [torch.isin(labels, torch.tensor(classes)).nonzero().squeeze(1) for classes in args.class_tasks]
    if args.replay == "all":
        tasks = [torch.cat(tasks[:k + 1]) for k in range(args.tasks)]
    images = images.to(device)  # (N, C, H, W)
    per_epoch = [math.ceil(len(task) / args.batch_size) for task in tasks]  # the last, smaller batch is kept
    updates = run.spread(args.iterations, args.tasks) if args.iterations else [
        max(1, round(e * n)) for e, n in zip(run.spread(args.epochs, args.tasks), per_epoch)]
    # Forward passes of one batch in an update, for the time left: a backward pass counts as two of them.
    passes = [3] + [{"gr": 6 + (args.teacher_steps or 0), "er": 6}.get(args.method, 3)] * (args.tasks - 1)

    # The networks, the run folder, and where the run stands.
    seed(args.seed, "weights")
    model = UNet(**NETS[args.unet])
    if args.init:
        run.load_weights(model, args.init)
    model.to(device)
    config = dict(vars(args), updates=updates)
    folder = run.open_folder(config)
    prev = args.teacher_steps and copy.deepcopy(model).eval().requires_grad_(False)  # the model of task k-1, for GR
    if args.compile:
        for net in filter(None, (model, prev)):
            net.compile(fullgraph=True, dynamic=False)
    graphs = args.compile and device.type == "cuda" and run.world == 1
    abar = alpha_bar(args.schedule).to(device)
    state = run.latest(folder, args.tasks) or {"task": 1, "update": 0, "model": model.state_dict()}
    model.load_state_dict(state["model"])
    report = run.reporter(folder, state, updates, passes, device)
    if state["task"] <= args.tasks:
        print(f"{args.name} on {device}: classes {args.class_tasks}, {updates} updates, into {folder}")

    for k in range(state["task"], args.tasks + 1):
        task, n, every = tasks[k - 1], updates[k - 1], max(1, min(50, updates[k - 1] // 20))
        replaying = passes[k - 1] > 3  # whether this task replays anything
        generating = replaying and args.replay == "generated"
        r = 1 / k if replaying else 1.0
        kept = images[keep(args, tasks, k).to(device)] if args.method == "er" and k > 1 else None
        # DEVIATION: as in the released runs, and unsaid in the paper, Adam starts afresh with every task and the norm
        # of the gradient is clipped at 1.
        optimizer = torch.optim.Adam(model.parameters(), args.lr, fused=True, capturable=graphs)
        if prev:
            prev.load_state_dict(state.get("prev", model.state_dict()))
        log = torch.zeros(n, len(LOG), device=device)  # of every update
        if state["update"]:
            optimizer.load_state_dict(optimizer.state_dict() | {"state": state["optimizer"]["state"]})
            log.copy_(state["log"])

        def update(i, x_r=None):
            """Learn from images[i], i (B,), and the replayed x_r (B, C, H, W): a row of the log, (len(LOG),)."""
            x_0 = to_x_0(images[i], args.flip)
            with autocast:
                x_t, t, eps = diffuse(x_0, abar)
                replayed = replay(args, x_r, x_0, kept, abar) if replaying else None
                loss_new, loss_replay = losses(model, x_t, t, eps, replayed)
            loss = r * loss_new + (1 - r) * loss_replay
            optimizer.zero_grad()
            loss.backward()
            means = run.average(model, [loss, loss_new, loss_replay])
            norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.found_inf = (~norm.isfinite()).float()  # then step() does nothing, and check_finite will say so
            optimizer.step()
            return torch.cat([means, norm[None]])

        step = run.CUDAGraph(update) if graphs else update
        report(k, state["update"])
        for u in range(state["update"], n):
            epoch, batch = divmod(u, per_epoch[k - 1])
            if batch == 0 or u == state["update"]:
                seed(args.seed, "order", k, epoch)
                order = task[torch.randperm(len(task))].to(device)
            if generating and (u % args.draw_ahead == 0 or u == state["update"]):
                seed(args.seed, "replay", k, u // args.draw_ahead)
                x_T = torch.randn(args.draw_ahead * args.batch_size, *images.shape[1:], device=device)
                with autocast:
                    drawn = run.gather(sample(prev, run.share(x_T), abar, args.teacher_steps), len(x_T))
                drawn = drawn.split(args.batch_size)
            seed(args.seed, "noise", k, u)
            i = order[batch * args.batch_size:(batch + 1) * args.batch_size]
            with run.eager(args.compile and len(i) < args.batch_size):  # an epoch's last batch is not worth compiling
                log[u] = step(i, drawn[u % args.draw_ahead][:len(i)]) if generating else step(i)

            # Once in a while a record or a checkpoint: only here does the script wait for the device.
            u += 1
            recording = u % every == 0 or u == n
            saving = run.save_due(args.save_every, u) and (u < n or run.signals)
            if recording or saving:
                run.check_finite(log[:u], LOG, model, k)
            means = log[(u - 1) // every * every:u].mean(0).tolist() if recording else []
            report(k, u, len(i), dict(zip(LOG, means)) or None)
            if saving:
                run.save_checkpoint(folder, {"task": k, "update": u, "model": model.state_dict(), "log": log,
                                             "prev": prev and prev.state_dict(), "optimizer": optimizer.state_dict()})

        # A task is learned once its weights are saved. The picture starts from the same 64 noises in every run.
        seed("grid")
        x_T = torch.randn(64, *images.shape[1:]).to(device)
        with autocast, run.eager(args.compile):
            grid = make_grid(data.quantize(sample(model, x_T, abar, args.sample_steps)).cpu(), nrow=8, padding=1)
        picture = Image.fromarray(grid.repeat_interleave(2, 1).repeat_interleave(2, 2).permute(1, 2, 0).numpy())
        run.save_png(folder / "samples" / f"task{k}.png", picture)
        run.save(folder / f"task{k}.pt", {"model": model.state_dict(), "config": config})
        state = {"task": k + 1, "update": 0}
        if k < args.tasks:
            run.exit_if_stopped(f"task {k}")
    run.finish(folder)


if __name__ == "__main__":
    run.main(main)
