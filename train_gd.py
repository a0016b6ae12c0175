"""Generative distillation of a diffusion model, and its variants on current images and on Gaussian noise.

A diffusion model learns a sequence of tasks, two new classes at a time, without keeping old images. Before task k a
copy of the model is frozen. For every update it draws, with a few DDIM steps, as many images as the batch has, and
the model learns to denoise the new images, and on the replayed ones to predict the noise that the copy predicts.

    L = 1/k |eps - model(x_t, t)|^2 + (1 - 1/k) lam |prev(x_r_t, t_r) - model(x_r_t, t_r)|^2       tasks k >= 2
    x_r = DDIM(prev), x_r_t = sqrt(abar_t_r) x_r + sqrt(1 - abar_t_r) eps_r

Masip et al., "Continual Learning of Diffusion Models with Generative Distillation", arXiv 2311.14028, Section 3.

Without arguments it is the paper's run on Fashion-MNIST, for a GPU. A minute and a half on a laptop, no download:

    python train_gd.py --dataset shapes --scale laptop
"""

import copy
import math

import torch
import torch.nn.functional as F

import data
import run
from ddim import T, alpha_bar, q_sample, reseed, sample
from unet import NETS, UNet, misfit

# The columns of the log, a row for each update. If the first or the last is not finite, run.Progress stops the run.
LOG = ("loss", "loss_new", "loss_replay", "gradient_norm")

# -------------------------------------------------------------------------------------------------- arguments

# Defaults of the arguments. `length` has one value for each task; the last one repeats.
PAPER = dict(class_order="random", length=("epochs", [100.0]), batch_size=128, lr=2e-4, unet="fashion-mnist",
             image_size=32, schedule="zero-snr", flip=False, sample_steps=10, teacher_steps=2, teacher_solver="ddim",
             first_step="network", draw_ahead=8)  # draw_ahead is ours, a speed-up
# DEVIATION: the paper augments nothing, its released runs mirror CIFAR's images.
# DEVIATION: on CIFAR-10 the paper evaluates with 20 DDIM steps in Section 4.2.2, with 10 and with 20 in A.5. Here: 20.
CIFAR = dict(PAPER, length=("epochs", [200.0]), batch_size=64, unet="cifar10", flip=True, teacher_steps=10,
             sample_steps=20)
SMALL = dict(PAPER, length=("iterations", [1500, 800]), batch_size=32, lr=5e-4, unet="laptop", image_size=16,
             draw_ahead=1)
LAPTOP = dict(SMALL, length=("iterations", [600, 150]), lr=2e-3,
              class_order="0,1|2,7|8,9")  # three tasks; in Fashion-MNIST, garments that differ even at 16x16
GREY = {"paper": PAPER, "small": SMALL, "laptop": LAPTOP}
COLOUR = {"paper": CIFAR, "small": dict(SMALL, unet="laptop-rgb", flip=True),
          "laptop": dict(LAPTOP, unet="laptop-rgb", flip=True)}
PRESETS = {  # by dataset, then by scale. "paper" is as in its Sections 4 and A.1, "small" the same in miniature.
    "fashion-mnist": GREY, "shapes": GREY, "cifar10": COLOUR, "cifar100": COLOUR,
    "imagenet100": COLOUR | {"paper": dict(CIFAR, image_size=64)},
}
# For each args.source the method, with which the run's name begins, and its title in tables and figures.
METHODS = {"generated": ("gd", "Generative distillation"), "current": ("lwf", "Distil. w/ current data"),
           "noise": ("noise", "Distil. w/ Gaussian noise")}


def get_args(argv=None):
    parser = run.parser(__doc__, __file__)  # --help shows the docstring and this file's name
    add = parser.add_argument
    add("--dataset", default="fashion-mnist", type=data.dataset, metavar="NAME|FOLDER",
        help=f"{', '.join(data.DATASETS)} or a folder of class folders (default: fashion-mnist)")
    add("--distill", default="generated", choices=list(METHODS), dest="source",
        help="on DDIM samples of the previous model (GD), on the current images (LwF-like), or on Gaussian noise")
    add("--lambda", dest="lam", type=run.positive(float), help="lam in the loss (paper: GD 0.75, LwF 1.25, noise 8)")
    add("--teacher-steps", type=run.positive(int, T - 1), help="DDIM steps (paper: 2; CIFAR-10: 10)")  # analytic adds 1
    add("--teacher-solver", choices=["ddim", "ipndm"], help="ipndm: of higher order, see ddim.py (paper: ddim)")
    add("--first-step", choices=["network", "analytic"], help="analytic: one step more, at t = 999, without model")
    add("--draw-ahead", type=run.positive(int), help="draw the replay of so many updates at once: faster")
    length = parser.add_mutually_exclusive_group()  # args.length is ("epochs", [E1, ...]) or ("iterations", [N1, ...])
    length.add_argument("--epochs", type=run.per_task(float, "epochs"), dest="length", metavar="E",
                        help="passes over the images of a task: E, or E1,E2,... (paper: 100; CIFAR-10: 200)")
    length.add_argument("--iterations", type=run.per_task(int, "iterations"), dest="length", metavar="N",
                        help="updates of a task, in place of epochs: N, or N1,N2,...")
    add("--batch-size", type=run.positive(int), help="images of the current task per update (paper: 128; CIFAR-10: 64)")
    add("--lr", type=run.positive(float), help="learning rate of Adam (paper: 2e-4)")
    add("--unet", choices=list(NETS), help="network (default: by --dataset and --scale)")
    add("--init", metavar="PATH", help="start from these weights: a task<k>.pt, or diffusers' UNet2DModel .bin")
    add("--schedule", choices=["zero-snr", "linear"], help="noise schedule (default: zero-snr, as the released runs)")
    run.add_arguments(parser, scales=list(GREY))  # those of every train script: --scale, --seed, --compile, ...

    # A first parse finds the preset. Its values become the parser's defaults, so that the command line wins.
    first, _ = parser.parse_known_args(argv)
    info, preset = data.preset(PRESETS, first)
    preset["lam"] = {"generated": 0.75, "current": 1.25, "noise": 8.0}[first.source]
    if first.source != "generated":
        preset.update(teacher_steps=None, teacher_solver=None, first_step=None, draw_ahead=None)  # they do nothing
    parser.set_defaults(**preset)
    args = parser.parse_args(argv)
    # This checks args and adds args.preset, args.name, by which the run's folder is called, and more.
    run.describe(args, parser, info, preset, METHODS[args.source])
    if why := misfit(args.unet, info.channels, args.image_size):
        parser.error(why)
    args.class_tasks = data.class_tasks(len(info.classes), args.tasks, args.class_order, args.seed)  # classes by task
    return args


# ----------------------------------------------------------------------------------------------------- losses

def diffuse(x_0, abar):
    """x_t = sqrt(abar_t) x_0 + sqrt(1 - abar_t) eps, each image with its own t from 0 .. T-1 and eps ~ N(0, I).

    Returns x_t, t, eps. With torchrun x_0 is the whole batch in each process. Each draws the noise of all of it, as one
    process would, and returns its share of the rows.
    """
    t = torch.randint(T, (len(x_0),), device=x_0.device)
    eps = torch.randn_like(x_0)
    return [run.share(x) for x in (q_sample(x_0, t, eps, abar), t, eps)]


@torch.no_grad()
def replay(args, prev, x_r, x_0, x_t, t, abar):
    """Noisy replayed images x_r_t (N, C, H, W), N <= B, their times t_r (N,), and what to predict there."""
    if args.source == "current":
        return x_t[:0], t[:0], prev(x_t, t)  # x_r_t is x_t: one model(x_t, t), compared with eps and with this
    if args.source == "noise":  # pure noise, whatever t_r says; of x_0 it takes the shape alone
        x_r_t, t_r = run.share(torch.randn_like(x_0)), run.share(torch.randint(T, (len(x_0),), device=x_0.device))
    if args.source == "generated":
        x_r_t, t_r, _ = diffuse(x_r, abar)
    target_r = prev(x_r_t, t_r)                         # GD: what the previous model says about that noisy image
    return x_r_t, t_r, target_r


def losses(model, x_t, t, eps, replayed):
    """|eps - model(x_t, t)|^2 of the new images and |target_r - model(x_r_t, t_r)|^2 of the replayed ones, two scalars.

    DEVIATION: means over all elements, as in the released runs; the paper writes squared norms.
    """
    if replayed is None:  # as in task 1
        return F.mse_loss(model(x_t, t), eps), torch.zeros((), device=x_t.device)
    x_r_t, t_r, target_r = replayed
    pred = model(torch.cat([x_t, x_r_t]), torch.cat([t, t_r]))  # one forward for both: (B + len(x_r_t), C, H, W)
    return F.mse_loss(pred[:len(eps)], eps), F.mse_loss(pred[-len(target_r):], target_r)


# ------------------------------------------------------------------------------------------------------ train

def batches(args, prev, abar, autocast, index, shape, k, begin, end):
    """Yield u, i, x_r for the updates u = begin .. end - 1 of task k.

    `index` (n,) holds the indices of the task's images, i (B,) those of the batch. x_r (B, C, H, W), in [-1, 1], are
    images drawn by prev, for args.draw_ahead updates at once, or None without generated replay; `shape` is (C, H, W).
    """
    epoch_length = math.ceil(len(index) / args.batch_size)  # the last, smaller batch is kept
    for u in range(begin, end):
        epoch, b = divmod(u, epoch_length)
        if b == 0 or u == begin:  # a resumed run finds the same order
            reseed(args.seed, "order", k, epoch)
            order = index[torch.randperm(len(index), device=index.device)]
        i = order[b * args.batch_size:(b + 1) * args.batch_size]
        if k == 1 or args.source != "generated":
            yield u, i, None
            continue
        if u % args.draw_ahead == 0 or u == begin:  # a resumed run draws all of them again
            reseed(args.seed, "replay", k, u // args.draw_ahead)
            x_T = torch.randn(args.draw_ahead * args.batch_size, *shape, device=index.device)
            with autocast:
                drawn = sample(prev, run.share(x_T), abar, args.teacher_steps, first=args.first_step,
                               solver=args.teacher_solver)
            drawn = run.gather(drawn, len(x_T)).split(args.batch_size)  # with torchrun, what all processes have drawn
        yield u, i, drawn[u % args.draw_ahead][:len(i)]


def main(argv=None):
    args = get_args(argv)
    device, autocast = run.start(args)  # sets args.precision and args.compile

    # Data: one uint8 tensor on the device; a batch is an index into it.
    images, labels = (x.to(device) for x in data.load_images(args.dataset, "train", args.data_dir, args.image_size))
    of_task = data.indices(labels, args.class_tasks)  # for each task the indices of its images
    shape = images.shape[1:]  # (C, H, W)
    args.updates = run.count_updates(vars(args), of_task)  # by task
    args.preset_updates = run.count_updates(args.preset, of_task)  # with fewer, report.py calls the run shortened

    # The networks, the run folder, and where the run stands.
    reseed(args.seed, "weights")
    model = UNet(**NETS[args.unet])
    if args.init:
        run.load_weights(model, args.init)
    model.to(device)
    prev = copy.deepcopy(model).eval().requires_grad_(False)  # one for the whole run: no task compiles it anew
    args.parameters = 2 * sum(p.numel() for p in model.parameters())  # of the model and prev
    folder = run.open_folder(vars(args))  # writes args into config.json; from now on Ctrl-C waits for the next save
    if args.compile:
        for net in (model, prev):
            net.compile(fullgraph=True, dynamic=False)  # one graph for each batch size; if it needs two, an error
    graphs = args.compile and device.type == "cuda" and run.world == 1  # `learn` as a CUDA graph; torchrun's runs plain
    abar = alpha_bar(args.schedule).to(device)
    state = run.latest(folder, args.tasks, device) or {
        "task": 1, "update": 0, "model": model.state_dict(), "memory": {}}
    model.load_state_dict(state["model"])
    memory = state["memory"]  # saved with the model: what a method keeps of old tasks, as ER its images, GD nothing
    progress = run.Progress(folder, state, args.updates, LOG, device)

    for k in range(state["task"], args.tasks + 1):
        index, end = of_task[k - 1], args.updates[k - 1]
        replaying = k > 1
        part_new = 1 / k if replaying else 1.0  # weight of the new images in the loss
        # DEVIATION: as in the released runs, and unsaid in the paper, Adam starts afresh with every task and the norm
        # of the gradient is clipped at 1. "fused" makes it one kernel; "capturable" lets a CUDA graph record it.
        optimizer = torch.optim.Adam(model.parameters(), args.lr, fused=device.type != "mps", capturable=graphs)
        prev.load_state_dict(model.state_dict())
        log = torch.zeros(end, len(LOG), device=device)  # a row for each update
        if state["update"]:  # the run was stopped inside this task
            prev.load_state_dict(state["prev"])
            run.restore(optimizer, state["optimizer"])  # its moments only: fused and capturable stay as set above
            log.copy_(state["log"])

        def learn(i, x_r):
            """Update on images[i], i (B,), and replayed x_r, (B, C, H, W) or None; returns a row of the log."""
            x_0 = data.normalize(data.random_mirror(images[i], args.flip))
            with autocast:
                x_t, t, eps = diffuse(x_0, abar)
                replayed = replay(args, prev, x_r, x_0, x_t, t, abar) if replaying else None
                loss_new, loss_replay = losses(model, x_t, t, eps, replayed)
            loss = part_new * loss_new + (1 - part_new) * args.lam * loss_replay
            optimizer.zero_grad()
            loss.backward()
            # With torchrun this makes each gradient, too, the mean over the processes.
            means = run.mean_over_processes(model, [loss, loss_new, loss_replay])
            norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            return torch.cat([means, norm[None]])

        learn = run.CUDAGraph(learn, args.batch_size) if graphs else learn  # anew: a graph is bound to one optimizer
        progress.begin(k, state["update"])
        for u, i, x_r in batches(args, prev, abar, autocast, index, shape, k, state["update"], end):
            reseed(args.seed, "noise", k, u)
            with run.eager(len(i) < args.batch_size):  # an epoch's last, smaller batch is not compiled
                log[u] = learn(i, x_r)
            # step() records now and then, and before a save checks log and weights: only then it waits for the device.
            saving = run.save_due(args.save_every, u + 1)
            progress.step(u + 1, log, model, saving)
            if saving:  # or Ctrl-C asks for it
                run.save_checkpoint(folder, {
                    "task": k, "update": u + 1, "model": model.state_dict(), "memory": memory, "log": log,
                    "prev": prev.state_dict(), "optimizer": optimizer.state_dict()})

        reseed("grid")  # the same 64 noises in every run and, as the CPU draws them, on every device
        with autocast, run.eager():  # 64 images are not worth compiling for
            x_0 = sample(model, torch.randn(64, *shape).to(device), abar, args.sample_steps)
        run.save_picture(folder / "samples" / f"task{k}.png", data.quantize(x_0), columns=8)
        run.save(folder / f"task{k}.pt", {
            "task": k, "model": model.state_dict(), "memory": memory, "config": vars(args)})
        state = {"update": 0}  # nothing to resume in the next task
    run.finish(folder)  # removes the checkpoints inside tasks


if __name__ == "__main__":
    run.main(main)
