"""Generative replay of a diffusion model, and its baselines: experience replay, finetuning, joint training.

A diffusion model learns a sequence of tasks, two new classes at a time, without keeping old images. Before task k the
model is copied and frozen: prev. For every update prev draws, with a few DDIM steps, as many images as the batch has
new ones. The model learns to denoise the new images and the drawn ones, whose errors accumulate.

    L = 1/k |eps - model(x_t, t)|^2 + (1 - 1/k) |eps_r - model(x_r_t, t_r)|^2
    x_r = DDIM(prev), x_r_t = sqrt(abar[t_r]) x_r + sqrt(1 - abar[t_r]) eps_r

Masip et al., "Continual Learning of Diffusion Models with Generative Distillation", arXiv 2311.14028, Section 3.

Its defaults are the paper's for Fashion-MNIST, on a GPU. A minute and a half on a laptop, no download:

    python train_gr.py --dataset shapes --scale laptop
"""

import copy

import torch
import torch.nn.functional as F

import data
import run
from ddim import T, alpha_bar, q_sample, reseed, sample
from unet import NETS, UNet, why_unfit

# Columns of the log. The run stops if its first (the loss) or its last (the gradient's norm) is not finite.
LOG = ("loss", "loss_new", "loss_replay", "gradient_norm")

# -------------------------------------------------------------------------------------------------- arguments

# Defaults of the arguments. A length is one number for each task; later tasks take the last one.
PAPER = dict(class_order="random", length=("epochs", [100]), batch_size=128, lr=2e-4, unet="fashion-mnist",
             image_size=32, flip=False, schedule="zero-snr",
             sample_steps=10,  # of the pictures, and of the evaluation
             teacher_steps=2, teacher_solver="ddim", first_step="network")  # how prev draws
# DEVIATION: CIFAR's images are mirrored, as in the released runs; the paper augments nothing.
# DEVIATION: on CIFAR-10 the paper evaluates with 20 DDIM steps in Section 4.2.2, with 10 and with 20 in A.5. Here: 20.
CIFAR = dict(PAPER, length=("epochs", [200]), batch_size=64, unet="cifar10", flip=True, teacher_steps=10,
             sample_steps=20)
# SMALL and LAPTOP share a small net. As they have fewer updates, their learning rates are larger. SMALL makes 1500
# updates in task 1, which starts from random weights, and 800 in each later one.
SMALL = dict(PAPER, length=("iterations", [1500, 800]), batch_size=32, lr=5e-4, unet="laptop", image_size=16)
LAPTOP = dict(SMALL, length=("iterations", [600, 150]), lr=2e-3,
              class_order="0,1|2,7|8,9")  # three tasks: garments of Fashion-MNIST that differ even at 16x16
GREY = {"paper": PAPER, "small": SMALL, "laptop": LAPTOP}
COLOUR = {"paper": CIFAR, "small": dict(SMALL, unet="laptop-rgb", flip=True),
          "laptop": dict(LAPTOP, unet="laptop-rgb", flip=True)}
# By dataset, then by scale. "paper" is the full size: for fashion-mnist and cifar10 the paper's run (Sections 4, A.1).
# All other presets are ours. mnist and grey folders take those of fashion-mnist, colour folders those of cifar10.
PRESETS = {"fashion-mnist": GREY, "shapes": GREY, "cifar10": COLOUR, "cifar100": COLOUR,
           "imagenet100": COLOUR | {"paper": dict(CIFAR, image_size=64)}}
# Key: args.source, what is replayed: see the options. Value: the first part of the run's name, the title in tables.
METHODS = {"generated": ("gr", "Generative replay"), "buffer": ("er", "Experience replay"),
           "none": ("finetune", "Finetune"), "all": ("joint", "Joint")}


def get_args(argv=None):
    parser = run.parser(__doc__, __file__)  # --help shows the docstring and this file's name
    add = parser.add_argument
    add("--dataset", default="fashion-mnist", type=data.dataset_name, metavar="NAME|FOLDER",
        help=f"{', '.join(data.DATASETS)} or a folder of class folders (default: fashion-mnist)")
    add("--replay", default="generated", choices=list(METHODS), dest="source",
        help="samples of the previous model (GR), kept images (ER), nothing (finetune), all data so far (joint)")
    add("--buffer-size", type=run.positive(int), help="images the buffer holds in total (paper: 10, 100, 1000)")
    add("--teacher-steps", type=run.positive(int, T - 1), help="DDIM steps to a replayed image, each with a call of "
        "the previous model (paper: 2, CIFAR-10 10)")  # T - 1, as --first-step may add one
    add("--teacher-solver", choices=["ddim", "ipndm"], help="ipndm (improved PNDM): a step's eps is extrapolated from "
        "its own call and the three before, so that fewer steps are needed (paper: ddim)")
    add("--first-step", choices=["network", "analytic"], help="analytic: one more step comes first, without a "
        "call: as x_T is noise alone, it takes eps = x_T and x_0 = 0, mid-grey (paper: network)")
    run.add_length(parser, paper="100; CIFAR-10: 200")  # --epochs, --iterations: args.length, e.g. ("epochs", [100.0])
    add("--batch-size", type=run.positive(int), help="images of the current task per update (paper: 128; CIFAR-10: 64)")
    add("--lr", type=run.positive(float), help="learning rate of Adam (paper: 2e-4)")
    add("--unet", choices=list(NETS), help="network (default: by --dataset and --scale)")
    add("--init", metavar="PATH", help="start from these weights: a task<k>.pt, or diffusers' UNet2DModel .bin")
    add("--schedule", choices=["zero-snr", "linear"], help="linear: DDPM's; zero-snr: the same, rescaled so that "
        "x_999 is noise alone (default, as in the released runs)")
    run.add_arguments(parser)  # those of every train script: --scale, --seed, --compile, ...

    # A first parse finds the preset. In a second one its values are the defaults, so that the command line wins.
    first = parser.parse_args(argv)
    info, preset = data.preset(PRESETS, first)  # info: classes, channels; preset: defaults and how many tasks
    if first.source != "generated":
        preset.update(teacher_steps=None, teacher_solver=None, first_step=None)  # no drawing: run.parse refuses them
    # run.parse refuses an option whose preset is None, and adds args.name (of the run's folder), args.preset, ...
    args = run.parse(argv, parser, info, preset, METHODS)
    if bool(args.buffer_size) != (args.source == "buffer") or (args.buffer_size or args.tasks) < args.tasks - 1:
        parser.error(f"--replay buffer goes with a --buffer-size of at least {max(1, args.tasks - 1)}, one a past task")
    if why := why_unfit(args.unet, info.channels, args.image_size):
        parser.error(why)
    args.class_tasks = data.class_tasks(len(info.classes), args.tasks, args.class_order, args.seed)
    return args


# ----------------------------------------------------------------------------------------------------- losses

def diffuse(x_0, abar):
    """x_t = sqrt(abar_t) x_0 + sqrt(1 - abar_t) eps, each image with its own t from 0 .. T-1 and eps ~ N(0, I).

    Returns x_t, t, eps. With torchrun every process draws t and eps for the whole batch x_0, the same ones, and returns
    its share of the rows (all, if they do not divide evenly). So the mean of their gradients is that of one process.
    """
    t = torch.randint(T, (len(x_0),), device=x_0.device)
    eps = torch.randn_like(x_0)
    return [run.share(x) for x in (q_sample(x_0, t, eps, abar), t, eps)]


def draw(args, prev, abar, shape, k, u):
    """x_r in [-1, 1], of this shape, (B, C, H, W): what prev draws for update u of task k."""
    reseed(args.seed, "replay", k, u)  # a random stream of this name: a resumed run draws the same images
    x_T = torch.randn(shape, device=abar.device)
    x_r = sample(prev, run.share(x_T), abar, args.teacher_steps, first=args.first_step, solver=args.teacher_solver)
    return run.gather(x_r, len(x_T))  # the whole batch: `diffuse` draws noise for it, then shares again


@torch.no_grad()  # as `sample` has it too, a compiled prev is compiled once, not for two grad modes
def replay(args, x_r, x_0, kept, abar):
    """Noisy replayed images x_r_t (N, C, H, W), their times t_r (N,), and what to predict there, (N, C, H, W)."""
    if args.source == "buffer":
        u8 = kept[torch.randperm(len(kept), device=x_0.device)[:len(x_0)]]
        x_r = data.normalize(data.random_mirror(u8, args.flip))
    x_r_t, t_r, eps_r = diffuse(x_r, abar)
    target_r = eps_r  # the noise that was added
    return x_r_t, t_r, target_r


def keep(args, buffer, new, k):
    """The buffer after task k, whose images are `new`: of each task the first buffer_size // k of a random order."""
    reseed(args.seed, "buffer", k)
    new = new[torch.randperm(len(new), device=new.device)[:args.buffer_size]]
    return [kept[:args.buffer_size // k] for kept in [*buffer, new]]


def losses(model, x_t, t, eps, replayed):
    """|eps - model(x_t, t)|^2 of the new images, |target_r - model(x_r_t, t_r)|^2 of the replayed ones: two scalars.

    DEVIATION: means over all elements, as in the released runs; the paper writes squared norms.
    """
    if replayed is None:  # always in task 1
        return F.mse_loss(model(x_t, t), eps), eps.new_zeros(())  # a tensor, for the log
    x_r_t, t_r, target_r = replayed
    pred = model(torch.cat([x_t, x_r_t]), torch.cat([t, t_r]))  # one forward for both: of B + N images
    return F.mse_loss(pred[:len(eps)], eps), F.mse_loss(pred[-len(target_r):], target_r)  # new ones first


# ------------------------------------------------------------------------------------------------------ train

def main(argv=None):
    args = get_args(argv)
    device, autocast = run.start(args)  # joins torchrun's processes; settles --precision auto and --compile

    # Data: one uint8 tensor on the device; a batch is an index into it.
    images, labels = (x.to(device) for x in data.load_images(args.dataset, "train", args.data_dir, args.image_size))
    of_task = data.indices(labels, args.class_tasks)  # for each task the indices of its images
    if args.source == "all":
        of_task = [torch.cat(of_task[:k]) for k in range(1, args.tasks + 1)]  # the images of all tasks so far are new
    shape = images.shape[1:]  # (C, H, W)
    # Updates of each task: of this run, and of its preset, by which report.py sees whether a run is shortened.
    args.updates = run.count_updates(args.length, args.batch_size, of_task)
    args.preset_updates = run.count_updates(args.preset["length"], args.preset["batch_size"], of_task)

    # The networks, the run folder, and where the run stands.
    reseed(args.seed, "weights")
    model = UNet(**NETS[args.unet])
    if args.init:
        run.load_weights(model, args.init)
    model.to(device)  # its first weights are drawn on the CPU, so they are the same on every device
    prev = copy.deepcopy(model).eval().requires_grad_(False)  # in task k it gets the weights after task k-1
    args.parameters = (2 if args.source == "generated" else 1) * sum(p.numel() for p in model.parameters())
    folder = run.open_folder(vars(args))  # writes args into config.json; from here on Ctrl-C saves first, then stops
    if args.compile:
        for net in (model, prev):
            net.compile(fullgraph=True, dynamic=False)  # a graph of the whole net for each batch size
    abar = alpha_bar(args.schedule).to(device)
    # Where the run stands: at a checkpoint inside a task, after a whole task (whichever is further), or at the start.
    state = run.latest(folder, args.tasks, device) or {
        "task": 1, "update": 0, "model": model.state_dict(), "memory": {}}
    model.load_state_dict(state["model"])
    memory = state["memory"]  # what a method keeps of old tasks beside its model (ER: its buffer)
    progress = run.Progress(folder, state, args.updates, LOG, device)  # metrics.jsonl; drops its lines after `state`

    for k in range(state["task"], args.tasks + 1):
        index, end = of_task[k - 1], args.updates[k - 1]
        replaying = k > 1 and args.source in ("generated", "buffer")
        drawing = replaying and args.source == "generated"
        # DEVIATION: of ER the released code averages new and kept images in one mean; we follow the paper.
        part_new = 1 / k if replaying else 1.0  # weight of the new images in the loss
        kept = torch.cat(memory["buffer"]) if replaying and args.source == "buffer" else None
        # DEVIATION: each task starts a new Adam, and the gradient's norm is clipped at 1, as in the released runs. The
        # paper mentions neither.
        optimizer = torch.optim.Adam(model.parameters(), args.lr, fused=True)  # fused: one kernel for all weights
        prev.load_state_dict(model.state_dict())
        log = torch.zeros(end, len(LOG), device=device)  # a row for each update
        if state["update"]:  # the run was stopped inside this task
            prev.load_state_dict(state["prev"])
            optimizer.load_state_dict(state["optimizer"])
            log.copy_(state["log"])  # the next line of metrics.jsonl is a mean that needs these rows

        progress.begin(k, state["update"])  # a new progress bar; stops here if Ctrl-C was pressed between tasks
        # u: number of the update; i (B,): which images it takes. Each pass over the task is in another random order.
        for u, i in data.batches(index, args.batch_size, state["update"], end, args.seed, "order", k):
            with autocast, run.eager(len(i) < args.batch_size):  # an epoch's last, smaller batch: uncompiled
                x_r = draw(args, prev, abar, (len(i), *shape), k, u) if drawing else None
                reseed(args.seed, "noise", k, u)
                x_0 = data.normalize(data.random_mirror(images[i], args.flip))
                x_t, t, eps = diffuse(x_0, abar)
                replayed = replay(args, x_r, x_0, kept, abar) if replaying else None
                loss_new, loss_replay = losses(model, x_t, t, eps, replayed)
            loss = part_new * loss_new + (1 - part_new) * loss_replay
            optimizer.zero_grad()
            loss.backward()
            run.average(*(p.grad for p in model.parameters()))  # over torchrun's processes: that of the whole batch
            norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            log[u] = torch.stack([loss, loss_new, loss_replay, norm]).detach()
            run.average(log[u])
            saving = run.save_due(args.save_every, u + 1)  # every so many minutes or updates, and on Ctrl-C
            # Shows and records progress. Before each record, and if `check`, it stops the run if a value is not finite.
            progress.step(u + 1, log, model, check=saving)
            if saving:
                run.save_checkpoint(folder, {
                    "task": k, "update": u + 1, "model": model.state_dict(), "memory": memory, "log": log,
                    "prev": prev.state_dict(), "optimizer": optimizer.state_dict()})  # all that a resumed run needs

        reseed("grid")  # the same 64 noises in every run and, drawn on the CPU, on every device
        with autocast, run.eager():  # not worth compiling for; `sample` switches to eval mode and back
            x_0 = sample(model, torch.randn(64, *shape).to(device), abar, args.sample_steps)
        run.save_picture(folder / "samples" / f"task{k}.png", data.quantize(x_0), columns=8)
        if args.source == "buffer":
            memory["buffer"] = keep(args, memory.get("buffer", []), images[index], k)
        run.save(folder / f"task{k}.pt", {
            "task": k, "model": model.state_dict(), "memory": memory, "config": vars(args)})
        state = {"update": 0}  # nothing to resume in the next task
    run.finish(folder)  # removes the checkpoints inside tasks


if __name__ == "__main__":
    run.main(main)  # prints a person's mistake as one sentence, without a traceback
