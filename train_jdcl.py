"""JDCL: one network that denoises and classifies learns a sequence of tasks from images that it draws itself.

A classifier's head looks at the pooled features of the denoiser's encoder. Task k has two stages, task 1 only the
first. In stage 1 a local model learns the new images. x_0 and x_c are two augmented views of an image:

    L_local = |eps - model(x_t, t)|^2 + alpha CE(model.classify(x_c), y)                       --alpha, 0.001

Then the global model of task k-1 draws and labels images of the old classes, the local model those of the new ones. In
stage 2 the global model learns from these alone. The model that drew an image is its teacher, whose prediction e' and
probabilities q' are distilled:

    L_global = 2 |e' - model(x_t, t)|^2 + beta |eps - model(x_t, t)|^2                                beta = 0.01
             + on (2 alpha H(q', p) + beta alpha CE(p, y))                p = softmax(model.classify(x_c))

where "on" turns from 0 to 1 at update --classifier-start.

Skiers and Deja, "Joint Diffusion Models in Continual Learning", arXiv 2411.08224; details from their released code.

    python train_jdcl.py --dataset cifar10                               five tasks of two classes, on a GPU
    python train_jdcl.py --dataset shapes --scale laptop                 minutes on a laptop, no download
"""

import copy
import math
from types import SimpleNamespace

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from tqdm import tqdm

import data
import run
from ddim import T, alpha_bar, q_sample, reseed, sample
from unet import NETS, UNet, resnet18, why_unfit

BETA = 0.01  # weight in stage 2 of the terms that do not distil, of eps and CE
LOG = ("loss", "denoise", "ce", "ce_unlabelled", "kd", "kd_class", "gradient_norm")

# -------------------------------------------------------------------------------------------------- arguments

# crop: the least share of an image that the denoiser's view keeps, in stage 1 and 2. clip: whether DDIM clips x_0 at
# each step. classifier_view: data.strong_view or weak_view. sample_steps: of pictures and evaluation, not of replay.
# DEVIATION: the released CIFAR-10 run has a rate of 2e-5 for its third global model alone; we have 2e-4.
PAPER = dict(class_order="natural", batch_size=256, lr=2e-4, alpha=1e-3, classifier_view="strong", crop=[0.85, 0.85],
             flip=True, unet="jdcl-cifar", image_size=32, labelled_batch=32, local_init="scratch",
             local_iterations=[50_000], global_iterations=[30_000], classifier_start=10_000, ema_decay=0.9999,
             replay_per_class=1000, replay_steps=250, clip=False, sample_steps=250, eval_every=500)
# A small net does not overfit in a few hundred updates, so strong views and crops would only cost accuracy. It has less
# time to find the classes, hence the larger alpha. Unless x_0 is clipped, some of its images are static. The moving
# average spans a quarter of stage 2 (paper: a third).
SMALL = dict(PAPER, batch_size=64, lr=2e-3, alpha=0.03, classifier_view="weak", crop=[1.0, 1.0], flip=False,
             unet="jdcl-laptop", image_size=16, labelled_batch=8, local_iterations=[1000], global_iterations=[1400],
             classifier_start=350, ema_decay=0.997, replay_per_class=400, replay_steps=25, clip=True, sample_steps=25,
             eval_every=100)
LAPTOP = dict(SMALL, local_iterations=[400], global_iterations=[400], classifier_start=133, ema_decay=0.99,
              replay_per_class=200)
GREY = {"paper": dict(PAPER, unet="jdcl-fashion-mnist", flip=False), "small": SMALL, "laptop": LAPTOP}
COLOUR = {scale: dict(GREY[scale], unet="jdcl-laptop-rgb", flip=True) for scale in ("small", "laptop")}
PRESETS = {  # the released code's runs (grey images are ours), the same in miniature, and minutes on a laptop
    "cifar10": COLOUR | {"paper": dict(PAPER, crop=[0.85, 0.64])},
    "cifar100": COLOUR | {"paper": dict(PAPER, local_iterations=[100_000], global_iterations=[100_000, 70_000],
                                        replay_per_class=400)},
    # DEVIATION: the paper starts every local model from the global one, its released CIFAR runs and we from scratch.
    "imagenet100": COLOUR | {"paper": dict(PAPER, unet="jdcl-imagenet100", image_size=64, local_init="global",
                                           local_iterations=[120_000, 90_000], global_iterations=[90_000],
                                           replay_per_class=1040)},
    "fashion-mnist": GREY, "shapes": GREY | {"laptop": dict(LAPTOP, class_order="0,1|2,3|4,5")},
}
METHODS = {"generated": ("jdcl", "JDCL"), "all": ("jdcl-joint", "Continual Joint"),
           "none": ("jdcl-finetune", "JDCL, finetuning")}


def get_args(argv=None):
    parser = run.parser(__doc__, __file__)
    add = parser.add_argument
    add("--dataset", default="cifar10", type=data.dataset_name, metavar="NAME|FOLDER",
        help=f"{', '.join(data.DATASETS)} or a folder of class folders (default: cifar10)")
    add("--replay", default="generated", choices=list(METHODS), dest="source", help="old images: drawn, all real, none")
    add("--no-kd", action="store_true", help="ablation: learn the drawn images and labels, distil nothing")
    add("--one-stage", action="store_true", help="ablation: the global model learns the new images itself")
    add("--separate", action="store_true", help="ablation: a ResNet18 of its own classifies, not the denoiser")
    add("--labels", type=run.positive(float, 1), help="share of the labels that is known (paper: 0.008, 0.05)")
    add("--labelled-only", action="store_true", help="with --labels: leave the other images out")
    add("--labelled-batch", type=run.positive(int), help="with --labels: images with a label in a batch (paper: 32)")
    add("--kd-weighting", default="sample", choices=["sample", "group"], help="group: old and new images apart")
    add("--teacher", default="ema", choices=["ema", "raw"], help="weights that teach and label; raw: with dropout")
    add("--local-init", choices=["scratch", "global"], help="of local models (released: scratch, ImageNet-100 global)")
    add("--local-iterations", type=run.per_task(int), metavar="N", help="updates of stage 1: N, or N1,N2,... by task")
    add("--global-iterations", type=run.per_task(int), metavar="N", help="updates of stage 2: N, or N2,N3,... by task")
    add("--classifier-start", type=run.whole, help="update of stage 2 from which on it classifies (paper: 10000)")
    add("--ema-decay", type=run.positive(float, 1), help="upper limit of the EMA's decay (paper: 0.9999)")
    add("--replay-per-class", type=run.positive(int), help="images drawn for each class (paper: 1000, 400, 1040)")
    add("--replay-steps", type=run.positive(int, T), help="DDIM steps of the replay (paper: 250)")
    add("--replay-cap", type=run.positive(float, 1e6), default=2.0, help="draw about so many for each one wanted")
    add("--batch-size", type=run.positive(int), help="images per update (paper: 256)")
    add("--lr", type=run.positive(float), help="learning rate of AdamW (paper: 2e-4)")
    add("--alpha", type=run.positive(float), help="weight of the classifier's terms (paper: 0.001)")
    add("--unet", choices=[name for name in NETS if name.startswith("jdcl")], help="network (default: the dataset's)")
    add("--eval-every", type=run.positive(int), help="updates between two evaluations (paper: 500)")
    run.add_arguments(parser)

    # A first parse finds the preset. In a second one its values are the defaults, so that the command line wins.
    first = parser.parse_args(argv)
    info, preset = data.preset(PRESETS, first)  # info: classes, channels; preset: defaults and the number of tasks
    two_stages = ["kd_weighting", "local_init", "global_iterations", "classifier_start"]
    drawing = ["no_kd", "one_stage", "teacher", "replay_per_class", "replay_steps", "replay_cap"]
    idle = [] if first.labels else ["labelled_only"]
    if first.labelled_only or not first.labels:
        idle += ["labelled_batch"]
    if first.source != "generated":
        idle += drawing + two_stages
    if first.one_stage:
        idle += ["labels", *two_stages]
    if first.no_kd:
        idle += ["kd_weighting"]
    preset.update(dict.fromkeys(idle))  # None: it does not apply, and `run.parse` refuses it
    args = run.parse(argv, parser, info, preset, METHODS)  # adds args.name; args.departs: what differs from preset
    args.class_tasks = data.class_tasks(len(info.classes), args.tasks, args.class_order, args.seed)
    args.schedule = "jdcl"
    for key, most in ("local_iterations", args.tasks), ("global_iterations", max(1, args.tasks - 1)):
        if len(args.departs.get(key, [])) > most:
            parser.error(f"--{key.replace('_', '-')} takes at most {most} values here")
    stage_2 = [n_global for _, n_global in count_updates(args, vars(args)) if n_global]
    if args.classifier_start is not None and args.classifier_start >= min(stage_2, default=math.inf):
        parser.error(f"--classifier-start {args.classifier_start} must be below --global-iterations")
    # In each batch every process needs an old and a new image. ResNet18 needs two.
    sizes = [len(classes) for classes in args.class_tasks]
    least = max(run.world * math.ceil(sum(sizes) / min(sizes)), 2)
    if args.batch_size < least:
        parser.error(f"--batch-size must be {least} or more here")
    if (args.labelled_batch or 0) >= args.batch_size:
        parser.error(f"--labelled-batch {args.labelled_batch} must be below --batch-size {args.batch_size}")
    if why := why_unfit(args.unet, info.channels, args.image_size):
        parser.error(why)
    return args


def count_updates(args, how):
    """[(n_local, n_global), ...]: the updates of both stages by task; `how` is vars(args), or the preset of the run."""
    n_local = run.spread(how["local_iterations"], args.tasks)
    if args.source != "generated":
        return [(n, 0) for n in n_local]
    if args.one_stage:  # stage 2 takes as many updates as a local model would
        return [(n_local[0], 0), *((0, n) for n in n_local[1:])]
    return list(zip(n_local, [0, *run.spread(how["global_iterations"], args.tasks)]))


# ------------------------------------------------------------------------------------------- model and losses

def build(args):
    """The network of the run, with an output for every class of the dataset from the first task on."""
    classes = len(args.class_names)
    if not args.separate:
        return UNet(**NETS[args.unet], classes=classes)
    model = UNet(**NETS[args.unet])
    resnet = resnet18(model.in_channels, classes, 16 if args.image_size < 32 else 64)
    last, resnet.fc = resnet.fc, nn.Identity()
    model.head = nn.Sequential(resnet, last)  # head[-1] is the last layer, as in UNet
    model.features = lambda x_0: x_0          # model.classify gives these to the head: here the image itself
    return model


@torch.no_grad()
def update_ema(ema, model, n, most):
    """ema <- d ema + (1 - d) model after update n = 1, 2, ..., d = min(most, (1 + n) / (10 + n)); buffers copied."""
    torch._foreach_lerp_(list(ema.parameters()), list(model.parameters()), 1 - min(most, (1 + n) / (10 + n)))
    for a, b in zip(ema.buffers(), model.buffers()):
        a.copy_(b)


# Each returns a dict of scalars: its terms and "loss", their weighted sum. x_t, t, eps are of the denoiser's view, x_c
# (B, C, H, W) is the classifier's view of the same images, y (B,) are their classes.

def joint_losses(args, model, x_t, t, eps, x_c, y):
    """|eps - model(x_t, t)|^2 + alpha CE(model.classify(x_c), y), without the second term where x_c is None."""
    denoise = F.mse_loss(model(x_t, t), eps)
    if x_c is None:
        return dict(loss=denoise, denoise=denoise)
    ce = F.cross_entropy(model.classify(x_c), y)
    return dict(loss=denoise + args.alpha * ce, denoise=denoise, ce=ce)


def semi_supervised_losses(args, model, x_t, t, eps, x_strong, x_l, x_weak, y_l):
    """Stage 1 where few labels are known: FixMatch (Sohn et al., arXiv 2001.07685) in the place of CE.

    |eps - model(x_t, t)|^2 + alpha CE(x_l, y_l) + alpha mean_u 1[max q_u >= 0.95] CE(x_strong, argmax q_u) with q_u =
    softmax(model.classify(x_weak)), no gradient; x_strong and x_weak are views of the images of x_t.
    """
    with torch.no_grad():
        confidence, label = model.classify(x_weak).float().softmax(1).max(1)
    logits = model.classify(torch.cat([x_l, x_strong]))
    denoise, ce = F.mse_loss(model(x_t, t), eps), F.cross_entropy(logits[:len(y_l)], y_l)
    ce_u = (F.cross_entropy(logits[len(y_l):], label, reduction="none") * (confidence >= 0.95)).mean()
    return dict(loss=denoise + args.alpha * (ce + ce_u), denoise=denoise, ce=ce, ce_unlabelled=ce_u)


def kd_mean(args, d, n, part):
    """2 mean(d), or mean(d_old) + mean(d_new), of distances d (B,), the first n of old images.

    Both are equal where half is old. With torchrun n is of this process, `part` the share of old images in the whole
    batch. So the mean over the processes is that of the whole batch.
    DEVIATION: the paper's formula is the second, "group"; the released code weighs samples alike since September 2024.
    """
    if args.kd_weighting == "sample":
        return 2 * d.mean()
    return (d[:n].sum() / part + d[n:].sum() / (1 - part)) / len(d)


def distillation_losses(args, model, old, new, n, part, x_t, t, eps, x_c, y):
    """L_global of the top: the first n images have `old` for a teacher, the others `new`; x_c is None while on = 0."""
    with torch.no_grad():
        target = torch.cat([old(x_t[:n], t[:n]), new(x_t[n:], t[n:])])
    pred = model(x_t, t)
    denoise = F.mse_loss(pred, eps)
    kd = kd_mean(args, (pred - target).float().square().mean((1, 2, 3)), n, part)
    if x_c is None:
        return dict(loss=BETA * denoise + kd, denoise=denoise, kd=kd)
    with torch.no_grad():
        q = torch.cat([old.classify(x_c[:n]), new.classify(x_c[n:])]).float().softmax(1)
    logits = model.classify(x_c)
    ce = F.cross_entropy(logits, y)
    kd_class = kd_mean(args, F.cross_entropy(logits, q, reduction="none"), n, part)
    loss = BETA * (denoise + args.alpha * ce) + kd + args.alpha * kd_class
    return dict(loss=loss, denoise=denoise, ce=ce, kd=kd, kd_class=kd_class)


def one_stage_losses(args, model, old, n, x_t, t, eps, x_c, y):
    """The ablation without a local model: the first n of B images are replayed and distil `old`, the others are real.

    (1 - n/B) |eps - model|^2_real + n/B |e' - model|^2_replayed + alpha (CE(p, y) + n/B H(q', p)_replayed)

    DEVIATION: in the released settings 5000 images of each old class are replayed; here as many as in two stages.
    """
    with torch.no_grad():
        target, q = old(x_t[:n], t[:n]), old.classify(x_c[:n]).float().softmax(1)
    pred, logits, part = model(x_t, t), model.classify(x_c), n / len(x_t)
    denoise, kd = F.mse_loss(pred[n:], eps[n:]), F.mse_loss(pred[:n], target)
    ce, kd_class = F.cross_entropy(logits, y), F.cross_entropy(logits[:n], q)
    loss = (1 - part) * denoise + part * kd + args.alpha * (ce + part * kd_class)
    return dict(loss=loss, denoise=denoise, ce=ce, kd=kd, kd_class=kd_class)


# ------------------------------------------------------------------------------------------------- evaluation

def classify(model, u8):
    """Logits (N, classes), on the CPU, that a frozen model in eval mode gives images u8 (N, C, H, W)."""
    assert not model.training, "the model must be in eval mode"
    return torch.cat([model.classify(data.normalize(part)).float().cpu() for part in u8.split(1000)])


def of_classes(images, classes):
    """Of images (u8 (N, C, H, W), y (N,)) those of some classes, class by class."""
    u8, y = images
    i = torch.cat(data.indices(y, [[c] for c in classes]))
    return u8[i], y[i]


def count(model, images, classes):
    """{c: (right, of)}: of how many images (u8, y) of class c the largest logit is c's, and how many there are."""
    u8, y = of_classes(images, classes)
    y = y.cpu()
    right = classify(model, u8).argmax(1) == y
    return {c: (int(right[y == c].sum()), int((y == c).sum())) for c in classes}


def accuracy(counts, classes):
    """The share of right answers among the images of some classes; counts are `count`'s."""
    return sum(counts[c][0] for c in classes) / sum(counts[c][1] for c in classes)


def measure(job, stage, replayed=None):
    """Accuracies of job.ema by name, on test images; in stage 2 also on what is replayed (u8, y)."""
    is_local = stage == "local" and job.n_global  # it knows the new classes alone; else it is the global model
    classes = job.classes if is_local else job.seen
    counts, first = count(job.ema, job.test, classes), job.args.class_tasks[0]
    found = {"accuracy": accuracy(counts, classes), "accuracy_by_class": {c: accuracy(counts, [c]) for c in classes}}
    if first[0] in classes:
        found["accuracy_task1"] = accuracy(counts, first)
    if replayed:
        found["accuracy_old_real"] = accuracy(counts, job.learned)
        found["accuracy_old_replayed"] = accuracy(count(job.ema, replayed, job.learned), job.learned)
    return found


def summary(correct, total):
    """What is known after K tasks. correct[k][j]: test images of task j right after task k, out of total[j].

    matrix a_kj = correct_kj / total_j, accuracy of all classes seen after each task k, average_accuracy mean_j a_Kj,
    average_forgetting mean_{j<K} (max_{j<=m<K} a_mj - a_Kj), None for K = 1 (Chaudhry et al., arXiv 1801.10112).
    """
    a = [[right / of for right, of in zip(row, total)] for row in correct]
    lost = [max(row[j] for row in a[j:-1]) - a[-1][j] for j in range(len(a) - 1)]
    return dict(accuracy=[sum(row) / sum(total[:len(row)]) for row in correct], average_accuracy=sum(a[-1]) / len(a),
                average_forgetting=sum(lost) / len(lost) if lost else None, matrix=a, correct=correct, total=total)


# ----------------------------------------------------------------------------------------------------- stages
#
# `job`, made in main, is all that they share. Its four networks are made once; each stage loads weights into them.

def snapshot(job, **more):
    """What each file of weights holds: the moving average, the raw weights, over how many updates it has averaged."""
    return {"task": job.k, "model": job.ema.state_dict(), "raw": job.model.state_dict(), "count": job.averaged,
            "memory": {}, "config": vars(job.args), **more}


def earlier(path):
    """What a task or stage before has left in the run folder."""
    try:
        return run.load(path)
    except run.InputError as error:
        cure = f"delete {path.parent}/checkpoint*.pt, and the same command does this task again, or the one before"
        raise run.InputError(f"{error}; {cure}") from error


def pick(images, n):
    """n of the images (u8, y), at random."""
    u8, y = images
    i = torch.randint(len(y), (n,), device=y.device)
    return u8[i], y[i]


def make_batch(job, smallest, u8, y, *views):
    """x_t, t, eps of the denoiser's view of images u8, x_c for each (view, images), and y; a view of None makes None.

    x_t = sqrt(abar_t) x_0 + sqrt(1 - abar_t) eps, each image with its own t from 0 .. T-1 and eps ~ N(0, I). With
    torchrun each process draws the random numbers of the whole batch and returns its own share.
    """
    x_0 = data.normalize(data.diffusion_view(u8, job.args.flip, smallest))
    x_c = [view and data.normalize(getattr(data, f"{view}_view")(some, job.args.flip)) for view, some in views]
    t = torch.randint(T, (len(x_0),), device=x_0.device)
    eps = torch.randn_like(x_0)
    return [x if x is None else run.share(x) for x in (q_sample(x_0, t, eps, job.abar), t, eps, *x_c, y)]


def learn(job, stage, saved, losses, replayed=None):
    """All updates of a stage, "local" or "global": job.model and job.ema go on from a snapshot.

    losses(u) draws the batch of update u = 0, 1, ... of the stage and returns its terms; `replayed` is for `measure`.
    """
    args, model, k = job.args, job.model, job.k
    before, n = (0, job.n_local) if stage == "local" else (job.n_local, job.n_global)  # updates before the stage, in it
    optimizer = torch.optim.AdamW(model.parameters(), args.lr, weight_decay=0.01, fused=True)
    log, start = torch.zeros(before + n, len(LOG), device=job.device), 0  # a row for each update of the task
    lacking = torch.full((), math.nan, device=job.device)  # of a term that an update does not have; no mean counts it
    if "optimizer" in job.state:  # the run was stopped inside this stage
        saved, start = job.state, job.state["update"] - before
        optimizer.load_state_dict(saved["optimizer"])
        log.copy_(saved["log"])
    model.load_state_dict(saved["raw"])
    job.ema.load_state_dict(saved["model"])
    job.averaged = saved["count"]
    job.progress.begin(k, before + start)
    for u in range(start, n):
        reseed(args.seed, "noise", k, stage, u)
        with job.autocast:
            terms = losses(u)
        optimizer.zero_grad()
        terms["loss"].backward()
        grads = [p.grad for p in model.parameters() if p.grad is not None]  # the head has none while "on" is 0
        run.average(*grads)  # over torchrun's processes: shares are of one size
        terms["gradient_norm"] = nn.utils.get_total_norm(grads)
        optimizer.step()
        job.averaged += 1
        update_ema(job.ema, model, job.averaged, args.ema_decay)
        update = before + u + 1
        log[update - 1] = torch.stack([terms.get(name, lacking) for name in LOG]).detach()
        run.average(log[update - 1])

        # Once in a while a record, accuracies or a checkpoint: only here does the script wait for the device.
        saving = run.save_due(args.save_every, update)
        evaluating = (u + 1) % args.eval_every == 0 or u + 1 == n
        job.progress.step(update, log, model, check=saving, record=evaluating, more=lambda: {
            "stage": stage, **(measure(job, stage, replayed) if evaluating else {})})
        if saving:
            run.save_checkpoint(job.folder, snapshot(job, update=update, stage=stage, log=log,
                                                     optimizer=optimizer.state_dict()))


def learn_local(job, previous):
    """Stage 1: a model learns the real images of the task, or with --replay all of all tasks so far.

    In:  previous, the content of task<k-1>.pt, from which it starts with --local-init global.
    Out: job's weights; where stage 2 follows, they and their accuracy are saved in local<k>.pt.
    """
    args = job.args
    classes = job.seen if args.source == "all" else job.classes
    real, labelled = of_classes(job.train, classes), job.labelled and of_classes(job.labelled, classes)

    def losses(u):
        if not labelled:
            u8, y = pick(real, args.batch_size)
            return joint_losses(args, job.model, *make_batch(job, args.crop[0], u8, y, (args.classifier_view, u8)))
        # DEVIATION: released runs with few labels have an EMA decay of 0.999, CIFAR-10's with 5 % a batch of 128 and
        # crops of 0.64 and more.
        (u8_l, y_l), (u8, _) = pick(labelled, args.labelled_batch), pick(real, args.batch_size - args.labelled_batch)
        # u8 are of all the images, those with a label too, whose labels are not used.
        batch = make_batch(job, args.crop[0], u8, y_l, ("strong", u8), ("weak", u8_l), ("weak", u8))
        return semi_supervised_losses(args, job.model, *batch)

    if job.k == 1 or args.local_init == "scratch":
        reseed(args.seed, "weights", job.k)
        scratch = build(args).state_dict()
        previous = {"model": scratch, "raw": scratch, "count": 0}
    learn(job, "local", previous, losses)
    if job.n_global:
        right = accuracy(count(job.ema, job.test, job.classes), job.classes)
        run.save(job.folder / f"local{job.k}.pt", snapshot(job, accuracy=right))


def draw(job, side, classes, saved, labeller):
    """--replay-per-class images of each class, u8 (N, C, H, W) class by class, their labels, and numbers about them.

    The moving average in `saved` draws until every class has its quota or the cap is reached; `labeller` says what an
    8-bit image shows. Surplus is left out, varied copies fill up a class that is short. A class that no image shows is
    lost: it gets none. `side` is "old" or "new".
    """
    # DEVIATION: the released code stops at abar_0, with 3 % of noise left, and labels the floats as drawn, not clamped.
    args, batch, quota = job.args, 8 * job.args.batch_size, job.args.replay_per_class  # released: batches of 2000
    nothing = torch.empty(0, *job.shape, dtype=torch.uint8), torch.empty(0, dtype=torch.int64)
    u8, y = job.state["drawn"].get(side, nothing)  # what a checkpoint had of it
    job.ema.load_state_dict(saved["model"])
    cap = math.ceil(args.replay_cap * quota * len(classes))
    for n in tqdm(range(len(y), cap, batch), f"task {job.k}: {side} images", leave=False, disable=run.rank > 0 or None):
        if all((y == c).sum() >= quota for c in classes):
            break
        reseed(args.seed, "replay", job.k, side, n)
        x_T = torch.randn(batch, *job.shape, device=job.device)
        with job.autocast:
            x = sample(job.ema, run.share(x_T), job.abar, args.replay_steps, clip=args.clip)
            more = data.quantize(run.gather(x, batch))
            labels = labeller.classify(data.normalize(more)).argmax(1)
        u8, y = torch.cat([u8, more.cpu()]), torch.cat([y, labels.cpu()])
        job.state["drawn"][side] = u8, y
        if run.save_due(args.save_every, n // batch + 1):
            run.save_checkpoint(job.folder, job.state)

    images, found = [], torch.bincount(y, minlength=len(args.class_names)).tolist()
    there = [c for c in classes if found[c]]
    # DEVIATION: where a class is lost, the released code would draw for ever.
    if lost := ", ".join(args.class_names[c] for c in classes if not found[c]):
        said = f"task {job.k}: none of {len(y)} {side} images looks like {lost} to the model"
        if not there:
            raise run.InputError(f"{said}: try --restart and more --local-iterations, --global-iterations or "
                                 "--replay-cap")
        print(f"{said}: stage 2 goes on without", flush=True)
    for c in there:
        own = u8[y == c][:quota]
        reseed(args.seed, "copies", job.k, c)
        copies = own[torch.randint(len(own), (quota - len(own),))]
        images += [own, data.diffusion_view(copies, args.flip, 0.9 if side == "old" else 0.85)]
    about = {"drawn": len(y), "found": found, "copies": [max(0, quota - found[c]) for c in there]}
    return torch.cat(images), torch.tensor(there).repeat_interleave(quota), about


def draw_and_label(job, previous, local):
    """Between the stages: the old global and the local model draw images of their classes, the teachers label them.

    In:  previous and local, the contents of task<k-1>.pt and local<k>.pt (None in one stage); job.old, job.new.
    Out: replay<k>.pt, {"images" (N, C, H, W) uint8, old classes first, "labels" (N,), "about"}, and a picture.
    """
    if "drawn" not in job.state:  # else the run was stopped while it drew
        job.state = {"task": job.k, "update": job.n_local, "stage": "replay", "drawn": {}}
        run.save_checkpoint(job.folder, job.state)
    about = {}
    u8, y, about["old"] = draw(job, "old", job.learned, previous, job.old)
    # The largest logits of real and of replayed images, in the same 40 bins, as in the paper's Figure 4. They are of
    # the old global model, with which `draw` has just drawn.
    real, _ = of_classes(job.test, job.learned)
    largest = [classify(job.ema, images.to(job.device)).amax(1) for images in (real, u8)]
    edges = np.histogram_bin_edges(torch.cat(largest), 40)
    about["logits"] = {"edges": edges.tolist()}
    for name, x in zip(("real", "replayed"), largest):
        sd = float(x.std(correction=min(1, len(x) - 1)))  # 0 of a single image
        about["logits"][name] = dict(counts=np.histogram(x, edges)[0].tolist(), mean=float(x.mean()), sd=sd)
    if local:
        u8_new, y_new, about["new"] = draw(job, "new", job.classes, local, job.new)
        u8, y = torch.cat([u8, u8_new]), torch.cat([y, y_new])
    run.save(job.folder / f"replay{job.k}.pt", {"images": u8, "labels": y, "about": about})
    rows = [images[:10] for images in u8.split(job.args.replay_per_class)[-20:]]
    run.save_picture(job.folder / "samples" / f"replay{job.k}.png", torch.cat(rows), columns=len(rows[0]))
    job.state = {"task": job.k, "update": job.n_local, "stage": "global"}
    run.save_checkpoint(job.folder, job.state)


def learn_global(job, previous, replay):
    """Stage 2: the global model learns what was drawn, in one stage also the real images of the task.

    In:  previous, the content of task<k-1>.pt, where it begins; replay, that of replay<k>.pt; job.old, job.new.
    Out: job's weights.
    """
    args, replayed = job.args, [replay[name].to(job.device) for name in ("images", "labels")]
    of_old = of_classes(replayed, job.learned)
    of_new = of_classes(job.train if args.one_stage else replayed, job.classes)
    # DEVIATION: released batches mix old and new images at random; here each teacher has batches of one size.
    n_old = round(args.batch_size * len(job.learned) / len(job.seen))
    n = sum(i < n_old for i in run.share(range(args.batch_size)))  # old ones in this process's share: they come first

    def losses(u):
        # DEVIATION: the released code counts validation batches too, and begins after 8,636 updates.
        on = args.one_stage or u >= args.classifier_start  # without a local model nobody else learns the new classes
        u8, y = map(torch.cat, zip(pick(of_old, n_old), pick(of_new, args.batch_size - n_old)))
        batch = make_batch(job, args.crop[1], u8, y, (args.classifier_view if on else None, u8))
        if args.no_kd:
            return joint_losses(args, job.model, *batch)
        if args.one_stage:
            return one_stage_losses(args, job.model, job.old, n, *batch)
        return distillation_losses(args, job.model, job.old, job.new, n, n_old / args.batch_size, *batch)

    # The last layer's rows of classes not yet learned are drawn anew: they have only learned not to be chosen. The
    # biases stay. This changes `previous` in place, of which the teacher has its own copy.
    # DEVIATION: all released settings ask for this, but the released code now ignores them.
    last = f"head.{len(job.model.head) - 1}.weight"
    not_learned = [c not in job.learned for c in range(len(args.class_names))]
    reseed(args.seed, "head", job.k)
    rows = nn.init.xavier_uniform_(torch.empty_like(previous["raw"][last]))[not_learned]
    for weights in previous["raw"], previous["model"]:
        weights[last][not_learned] = rows
    learn(job, "global", previous, losses, replayed)


def finish_task(job, previous, local, replay):
    """Measure the model after the task and save it: accuracy.json, samples/task<k>.png, task<k>.pt."""
    args, k, counts = job.args, job.k, count(job.ema, job.test, job.seen)
    correct, total = ([sum(counts[c][i] for c in classes) for classes in args.class_tasks[:k]] for i in (0, 1))
    history = previous["history"] + [{
        "task": k, "correct": correct, "total": total, "by_class": {str(c): accuracy(counts, [c]) for c in job.seen},
        "local": local and local["accuracy"], "replay": replay and replay["about"]}]
    result = summary([h["correct"] for h in history], total)
    whole, head = (sum(p.numel() for p in net.parameters()) for net in (job.model, job.model.head))
    run.write_json(job.folder / "accuracy.json",
                   dict(result, tasks=history, parameters={"unet": whole - head, "head": head}))
    reseed("grid")  # the same 64 noises in every run and, as the CPU draws them, on every device
    x_T = torch.randn(64, *job.shape).to(job.device)
    with job.autocast, run.eager():
        x = sample(job.ema, x_T, job.abar, args.sample_steps, clip=args.clip)
    run.save_picture(job.folder / "samples" / f"task{k}.png", data.quantize(x), columns=8)
    run.save(job.folder / f"task{k}.pt", snapshot(job, history=history))
    of_each = ", ".join(f"{a:.4f}" for a in result["matrix"][-1])
    print(f"task {k}: average accuracy {result['average_accuracy']:.4f}, of each task {of_each}", flush=True)
    job.state = {}


# ------------------------------------------------------------------------------------------------------ train

def main(argv=None):
    args = get_args(argv)
    device, autocast = run.start(args)

    # Data: images u8 (N, C, H, W) and their classes y (N,), on the device.
    train, test = ([x.to(device) for x in data.load_images(args.dataset, split, args.data_dir, args.image_size)]
                   for split in ("train", "test"))
    labelled = None  # for FixMatch, the same share of every class
    if args.labels:
        reseed(args.seed, "labels")
        by_class = data.indices(train[1], [[c] for c in sum(args.class_tasks, [])])
        i = torch.cat([i[torch.randperm(len(i))[:max(1, round(args.labels * len(i)))]] for i in by_class])
        labelled = [x[i] for x in train]
    if args.labelled_only:
        train, labelled = labelled, None

    # The networks, the run folder, and where the run stands.
    model = build(args).to(device)
    ema, old, new = (copy.deepcopy(model).eval().requires_grad_(False) for _ in range(3))
    held = 2 if args.source != "generated" else 3 if args.one_stage else 4  # how many of these four the method needs
    stages = count_updates(args, vars(args))
    args.updates, args.preset_updates = ([sum(n) for n in of] for of in (stages, count_updates(args, args.preset)))
    args.parameters = held * sum(p.numel() for p in model.parameters())
    folder = run.open_folder(vars(args))
    if args.compile:
        for net in model, ema, old, new:
            net.compile(dynamic=False)
            if net is not ema:  # ema classifies the test images, in batches of many sizes
                net.classify = torch.compile(net.classify, dynamic=False)
    # Where the run stands: at a checkpoint inside a task, after a whole task (whichever is further), or at the start.
    state = run.latest(folder, args.tasks) or {"task": 1, "update": 0}
    job = SimpleNamespace(
        args=args, device=device, autocast=autocast, abar=alpha_bar(args.schedule).to(device), folder=folder,
        state=state, progress=run.Progress(folder, state, args.updates, LOG, device),
        train=train, labelled=labelled, test=test, shape=train[0].shape[1:],
        model=model, ema=ema, averaged=0,  # the model that learns; its EMA, which also draws, and of how many updates
        old=old, new=new)                  # the teachers of old and of new classes in stage 2

    for k in range(state["task"], args.tasks + 1):
        job.k, (job.n_local, job.n_global) = k, stages[k - 1]  # updates of stage 1 and 2, 0 where there is none
        job.learned, job.classes = sum(args.class_tasks[:k - 1], []), args.class_tasks[k - 1]
        job.seen = job.learned + job.classes
        stage = job.state.get("stage", "local")  # at which the run was stopped, or the first
        previous = earlier(folder / f"task{k - 1}.pt") if k > 1 else {"history": []}  # the global model before
        local = replay = None
        if job.n_local and stage == "local":
            learn_local(job, previous)
        if job.n_global:
            local = earlier(folder / f"local{k}.pt") if job.n_local else None
            # DEVIATION: the released code labels and distils with raw weights and dropout, as --teacher raw; it draws
            # with dropout too.
            for teacher, saved in (old, previous), (new, local):
                if saved:
                    teacher.load_state_dict(saved["raw" if args.teacher == "raw" else "model"])
                    teacher.train(args.teacher == "raw")
            if stage != "global":
                draw_and_label(job, previous, local)
            replay = earlier(folder / f"replay{k}.pt")
            learn_global(job, previous, replay)
        finish_task(job, previous, local, replay)
    run.finish(folder)


if __name__ == "__main__":
    run.main(main)
