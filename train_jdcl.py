"""JDCL: one network that denoises and classifies learns a sequence of tasks from images that it draws itself.

A classifier's head looks at the pooled features of the denoiser's encoder, so that one model draws images and says
which class they are of. Task k has two stages. In stage 1 a local model learns the new images,

    L_local = |eps - model(x_t, t)|^2 + alpha CE(model.classify(x_c), y)                       --alpha, 0.001

where x_0 and x_c are two augmented views of an image. Then the global model of task k-1 draws and labels images of the
old classes, the local model of the new ones. In stage 2 the global model learns from these alone. The model that drew
an image is its teacher, whose prediction e_T and probabilities q_T are distilled:

    L_global = 2 |e_T - model(x_t, t)|^2 + beta |eps - model(x_t, t)|^2                               beta = 0.01
             + on (2 alpha H(q_T, p) + beta alpha CE(p, y))               p = softmax(model.classify(x_c))

where "on" turns from 0 to 1 at update --classifier-start.

Skiers and Deja, "Joint Diffusion Models in Continual Learning", arXiv 2411.08224; details from their released code.

    python train_jdcl.py --dataset cifar10                               five tasks of two classes, on a GPU
    python train_jdcl.py --dataset shapes --scale laptop                 minutes on a laptop, no download
"""

import argparse
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
from ddim import T, alpha_bar, eval_mode, q_sample, reseed, sample
from unet import NETS, UNet, misfit, resnet18

BETA = 0.01  # weight of what is not distilled in stage 2
LOG = ("loss", "denoise", "ce", "ce_unlabelled", "kd", "kd_class", "gradient_norm")

# -------------------------------------------------------------------------------------------------- arguments

# DEVIATION: the released CIFAR-10 run learns its third global model with a rate of 2e-5, alone of all; we with 2e-4.
PAPER = dict(class_order="natural", batch_size=256, lr=2e-4, alpha=1e-3, classifier_view="strong", crop=[0.85],
             flip=True, unet="jdcl-cifar", image_size=32, local_init="scratch", local_iterations=[50_000],
             global_iterations=[30_000], classifier_start=10_000, replay_per_class=1000, replay_steps=250, clip=False,
             sample_steps=250, eval_every=500)
# A small net does not overfit in a few hundred updates, so strong views and crops would only cost accuracy. It has less
# time to find the classes, hence the larger alpha. Unless x_0 is clipped, some of its images are static.
SMALL = dict(PAPER, batch_size=64, lr=2e-3, alpha=0.03, classifier_view="weak", crop=[1.0], flip=False,
             unet="jdcl-laptop", image_size=16, local_iterations=[1000], global_iterations=[1000],
             classifier_start=250, replay_per_class=400, replay_steps=25, clip=True, sample_steps=25, eval_every=100)
LAPTOP = dict(SMALL, local_iterations=[400], global_iterations=[400], classifier_start=133, replay_per_class=200)
GREY = {"paper": dict(PAPER, unet="jdcl-fashion-mnist", flip=False), "small": SMALL, "laptop": LAPTOP}
COLOUR = {scale: dict(GREY[scale], unet="jdcl-laptop-rgb", flip=True) for scale in ("small", "laptop")}
PRESETS = {  # the released code's runs (grey images are ours), the same in miniature, and minutes on a laptop
    "cifar10": COLOUR | {"paper": dict(PAPER, crop=[0.85, 0.64])},
    "cifar100": COLOUR | {"paper": dict(PAPER, local_iterations=[100_000], global_iterations=[100_000, 70_000],
                                        replay_per_class=400)},
    # DEVIATION: the paper starts every local model from the global one, its released CIFAR runs from scratch.
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
    add("--dataset", default="cifar10", type=data.dataset, metavar="NAME|FOLDER",
        help=f"{', '.join(data.DATASETS)} or a folder of class folders (default: cifar10)")
    add("--replay", default="generated", choices=list(METHODS), dest="source",
        help="of old tasks: JDCL's own images, all real ones (Continual Joint), none (finetuning)")
    add("--no-kd", action="store_true", help="ablation: learn the drawn images and labels, distil nothing")
    add("--one-stage", action="store_true", help="ablation: the global model learns the new images itself")
    add("--separate", action="store_true", help="ablation: a ResNet18 of its own classifies, not the denoiser")
    add("--labels", type=run.positive(float, 1), help="share of the labels that is known (paper: 0.008, 0.05)")
    add("--labelled-only", action="store_true", help="with --labels: leave the other images out")
    add("--kd-weighting", default="sample", choices=["sample", "group"],
        help="distil every image alike (default, as released), or old and new classes alike (paper)")
    add("--teacher", default="ema", choices=["ema", "raw"],
        help="teachers and labellers: EMA weights without dropout (default), or raw ones with it (as released)")
    add("--local-init", choices=["scratch", "global"], help="of the local model (default: scratch, ImageNet global)")
    add("--local-iterations", type=run.per_task(int), metavar="N", help="updates of stage 1: N, or N1,N2,... by task")
    add("--global-iterations", type=run.per_task(int), metavar="N", help="updates of stage 2: N, or N2,N3,... by task")
    add("--classifier-start", type=run.whole, help="update of stage 2 from which it learns to classify (paper: 10000)")
    add("--replay-per-class", type=run.positive(int), help="images drawn for each class (paper: 1000, 400, 1040)")
    add("--replay-steps", type=run.positive(int, T), help="DDIM steps of the replay (paper: 250)")
    add("--clip", action=argparse.BooleanOptionalAction, help="x_0 to [-1, 1] at each step of DDIM (paper: no)")
    add("--replay-cap", type=run.positive(float, 1e6), default=2.0,
        help="draw at most so many times the images wanted; copies fill up a class (default: 2)")
    add("--batch-size", type=run.positive(int), help="images per update (paper: 256)")
    add("--lr", type=run.positive(float), help="learning rate of AdamW (paper: 2e-4)")
    add("--alpha", type=run.positive(float), help="weight of the classifier's terms (paper: 0.001)")
    add("--classifier-view", choices=["strong", "weak"], help="RandAugment and cutout, or only moved (paper: strong)")
    add("--crop", type=run.per_task(float), metavar="S",
        help="least share of an image in the denoiser's view: S, or S1,S2 by stage (paper: 0.85, CIFAR-10 0.85,0.64)")
    add("--unet", choices=[name for name in NETS if name.startswith("jdcl")], help="network (default: the dataset's)")
    add("--eval-every", type=run.positive(int), help="updates between two accuracies (paper: 500)")
    run.add_arguments(parser, scales=list(GREY))

    # The preset becomes the defaults of the parser, so that the command line wins.
    first, _ = parser.parse_known_args(argv)
    info = data.info(first.dataset, first.data_dir)
    preset = dict(PRESETS[info.like][first.scale])
    preset["tasks"] = data.count_tasks(first.class_order or preset["class_order"])
    if first.source != "generated":
        preset["local_init"] = "global"  # or else nothing would be left of the task before
    parser.set_defaults(**preset)
    args = parser.parse_args(argv)
    departs = run.departures(parser, args, "source")

    two_stages = ["kd_weighting", "local_init", "global_iterations", "classifier_start"]
    drawing = ["no_kd", "one_stage", "teacher", "replay_per_class", "replay_steps", "replay_cap"]
    for case, happens, idle in (  # flags that would do nothing are mistakes
            ("without generated replay", args.source != "generated", drawing + two_stages),
            ("with --one-stage", args.one_stage, ["labels"] + two_stages),
            ("with --no-kd", args.no_kd, ["kd_weighting"]), ("without --labels", not args.labels, ["labelled_only"])):
        for key in idle:
            if happens and key in departs:
                parser.error(f"--{key.replace('_', '-')} does nothing {case}")
    for key, most in ("local_iterations", args.tasks), ("global_iterations", max(1, args.tasks - 1)), ("crop", 2):
        if len(departs.get(key, [])) > most:
            parser.error(f"--{key.replace('_', '-')} takes at most {most} values here")
    if max(args.crop) > 1:
        parser.error("--crop is a share of an image, at most 1")
    if args.batch_size < (8 if args.labels and not args.labelled_only else 2):
        parser.error("--batch-size must be 2 or more, and 8 with --labels, of which one in eight has a label")
    if why := misfit(args.unet, info.channels, args.image_size):
        parser.error(why)

    args.class_tasks = data.class_tasks(len(info.classes), args.tasks, args.class_order, args.seed)
    args.method, args.title = METHODS[args.source]
    args.base, args.schedule = args.method, "jdcl"
    run.describe(args, parser, info, preset, departs)
    return args


def count_updates(args, local_iterations, global_iterations):
    """[(n_local, n_global), ...], the updates of both stages by task; n_global is 0 where there is no stage 2.

    With --one-stage stage 2 is the only one, and takes as many updates as a local model would.
    """
    n_local, n_global = run.spread(local_iterations, args.tasks), run.spread(global_iterations, args.tasks - 1)
    if args.source != "generated":
        return [(n, 0) for n in n_local]
    later = [(0, n) for n in n_local[1:]] if args.one_stage else list(zip(n_local[1:], n_global))
    return [(n_local[0], 0), *later]


# -------------------------------------------------------------------------------------------------- the model

class Separate(UNet):
    """The ablation without a shared encoder: the same denoiser, and a ResNet18 that classifies."""

    def __init__(self, classes, width, **net):
        super().__init__(**net)
        resnet = resnet18(self.in_channels, classes, width)
        last, resnet.fc = resnet.fc, nn.Identity()
        self.head = nn.Sequential(resnet, last)  # head[-1] is the last layer, as in UNet

    def classify(self, x_0):
        return self.head(x_0)


def build(args):
    """The network of the run, with an output for every class of the dataset from the first task on."""
    if args.separate:
        return Separate(len(args.class_names), 16 if args.image_size < 32 else 64, **NETS[args.unet])
    return UNet(**NETS[args.unet], classes=len(args.class_names))


@torch.no_grad()
def update_ema(ema, model, n):
    """ema <- d ema + (1 - d) model after update n = 1, 2, ..., d = min(0.9999, (1 + n) / (10 + n)); buffers copied."""
    torch._foreach_lerp_(list(ema.parameters()), list(model.parameters()), 1 - min(0.9999, (1 + n) / (10 + n)))
    for a, b in zip(ema.buffers(), model.buffers()):
        a.copy_(b)


# ----------------------------------------------------------------------------------------------------- losses
#
# Each returns its terms and their weighted sum, the loss: scalars by name. x_0 and x_c (B, C, H, W) are the denoiser's
# and the classifier's view of the same images, y (B,) their classes.

def diffuse(x_0, abar):
    """x_t = sqrt(abar_t) x_0 + sqrt(1 - abar_t) eps, each image with its own t from 0 .. T-1 and eps ~ N(0, I).

    x_t, t, eps of the whole batch; with torchrun of this process's share of it.
    """
    t = torch.randint(T, (len(x_0),), device=x_0.device)
    eps = torch.randn_like(x_0)
    return [run.share(x) for x in (q_sample(x_0, t, eps, abar), t, eps)]


def joint_losses(args, model, x_0, x_c, y, abar, on=True):
    """|eps - model(x_t, t)|^2 + on alpha CE(model.classify(x_c), y): stage 1, and stage 2 without distillation."""
    x_t, t, eps = diffuse(x_0, abar)
    denoise = F.mse_loss(model(x_t, t), eps)
    if not on:  # then the classifier does not run either
        return dict(loss=denoise, denoise=denoise)
    ce = F.cross_entropy(model.classify(run.share(x_c)), run.share(y))
    return dict(loss=denoise + args.alpha * ce, denoise=denoise, ce=ce)


def semi_supervised_losses(args, model, x_0, x_l, y_l, x_weak, x_strong, abar):
    """Stage 1 where few labels are known: FixMatch (Sohn et al., arXiv 2001.07685) in the place of CE.

    |eps - model(x_t, t)|^2 + alpha CE(x_l, y_l) + alpha mean_u 1[max q_u >= 0.95] CE(x_strong, argmax q_u) with q_u =
    softmax(model.classify(x_weak)), no gradient; x_0, x_weak, x_strong are views of the same images.
    """
    x_t, t, eps = diffuse(x_0, abar)
    x_l, y_l, x_weak, x_strong = map(run.share, (x_l, y_l, x_weak, x_strong))
    with torch.no_grad():
        confidence, label = model.classify(x_weak).softmax(1).max(1)
    logits = model.classify(torch.cat([x_l, x_strong]))
    denoise, ce = F.mse_loss(model(x_t, t), eps), F.cross_entropy(logits[:len(y_l)], y_l)
    each = F.cross_entropy(logits[len(y_l):], label, reduction="none")
    ce_u = (each * (confidence >= 0.95)).mean()
    return dict(loss=denoise + args.alpha * (ce + ce_u), denoise=denoise, ce=ce, ce_unlabelled=ce_u)


def kd_mean(d, n, part, weighting):
    """Of distances d (B,), the first n of old classes: 2 mean(d), or mean(d_old) + mean(d_new); equal at task 2.

    `part` is that of old images in the whole batch, n / B in one process.
    """
    # DEVIATION: the paper's formula is "group"; its released code has weighed samples alike since September 2024.
    if weighting == "sample":
        return 2 * d.mean()
    return (d[:n].sum() / part + d[n:].sum() / (1 - part)) / len(d)


def distillation_losses(args, model, old, new, n_old, x_0, x_c, y, abar, on):
    """L_global of the top: the first n_old images have `old` for a teacher, the others `new`."""
    x_t, t, eps = diffuse(x_0, abar)
    n = sum(i < n_old for i in run.share(range(len(x_0))))  # how many of them are in this process's share
    with torch.no_grad():
        target = torch.cat([old(x_t[:n], t[:n]), new(x_t[n:], t[n:])])
    pred, part = model(x_t, t), n_old / len(x_0)
    denoise = F.mse_loss(pred, eps)
    kd = kd_mean((pred - target).float().square().mean((1, 2, 3)), n, part, args.kd_weighting)
    if not on:
        return dict(loss=BETA * denoise + kd, denoise=denoise, kd=kd)
    x_c = run.share(x_c)
    with torch.no_grad():
        q = torch.cat([old.classify(x_c[:n]), new.classify(x_c[n:])]).float().softmax(1)
    logits = model.classify(x_c)
    ce = F.cross_entropy(logits, run.share(y))
    kd_class = kd_mean(F.cross_entropy(logits, q, reduction="none"), n, part, args.kd_weighting)
    loss = BETA * (denoise + args.alpha * ce) + kd + args.alpha * kd_class
    return dict(loss=loss, denoise=denoise, ce=ce, kd=kd, kd_class=kd_class)


def one_stage_losses(args, model, old, n_old, x_0, x_c, y, abar):
    """The ablation without a local model: the first n_old images are replayed and distil `old`, the others are real.

    n_new/B |eps - model|^2_new + n_old/B |e_T - model|^2_old + alpha (CE(p, y) + n_old/B H(q_T, p)_old)

    DEVIATION: in the released settings 5000 images of each old class are replayed; here as many as in two stages.
    """
    x_t, t, eps = diffuse(x_0, abar)
    x_c, n = run.share(x_c), sum(i < n_old for i in run.share(range(len(x_0))))
    with torch.no_grad():
        target, q = old(x_t[:n], t[:n]), old.classify(x_c[:n]).float().softmax(1)
    pred, logits, part = model(x_t, t), model.classify(x_c), n / len(x_t)
    denoise, kd = F.mse_loss(pred[n:], eps[n:]), F.mse_loss(pred[:n], target)
    ce, kd_class = F.cross_entropy(logits, run.share(y)), F.cross_entropy(logits[:n], q)
    loss = (1 - part) * denoise + part * kd + args.alpha * (ce + part * kd_class)
    return dict(loss=loss, denoise=denoise, ce=ce, kd=kd, kd_class=kd_class)


# ------------------------------------------------------------------------------------------------- evaluation

@torch.no_grad()
def classify(model, u8):
    """Logits (N, classes), on the CPU, of images u8 (N, C, H, W), in eval mode."""
    with eval_mode(model):
        return torch.cat([model.classify(data.normalize(part)).float().cpu() for part in u8.split(1000)])


def count_correct(model, test, classes):
    """Of the images test[c] of each class c how many the model gives class c, out of all it knows: {c: count}."""
    return {c: int((classify(model, test[c]).argmax(1) == c).sum()) for c in classes}


def measure(job, classes, of_old=None):
    """Accuracies of job.ema by name, over the test images of `classes` and over replayed images of_old, {c: u8}."""
    def accuracy(some):
        return sum(right[c] for c in some) / sum(len(job.test[c]) for c in some)

    right, first = count_correct(job.ema, job.test, classes), job.args.class_tasks[0]
    found = {"accuracy": accuracy(classes), "accuracy_by_class": {c: accuracy([c]) for c in classes}}
    if set(first) <= set(classes):
        found["accuracy_task1"] = accuracy(first)
    if of_old:
        replayed = count_correct(job.ema, of_old, of_old)
        found["accuracy_old_real"] = accuracy(of_old)
        found["accuracy_old_replayed"] = sum(replayed.values()) / sum(map(len, of_old.values()))
    return found


def summary(correct, total):
    """What is said of correct[k][j], test images of task j <= k that are right after task k, of total[j]; K tasks done.

    matrix              a_kj = correct_kj / total_j, a row for each k
    accuracy            sum_j correct_kj / sum_j total_j for each k, all classes seen
    average_accuracy    1/K sum_j a_Kj
    average_forgetting  1/(K-1) sum_{j<K} (max_{j<=m<K} a_mj - a_Kj), None for K = 1 (Chaudhry et al., arXiv 1801.10112)
    """
    a = [[right / of for right, of in zip(row, total)] for row in correct]
    lost = [max(row[j] for row in a[j:-1]) - a[-1][j] for j in range(len(a) - 1)]
    return dict(accuracy=[sum(row) / sum(total[:len(row)]) for row in correct], average_accuracy=sum(a[-1]) / len(a),
                average_forgetting=sum(lost) / len(lost) if lost else None, matrix=a, correct=correct, total=total)


def histograms(real, replayed):
    """Counts of the largest logit (N,) of real and of replayed images, both in 40 bins, as in the paper's Figure 4."""
    edges = np.histogram_bin_edges(torch.cat([real, replayed]), 40)
    return {"edges": edges.tolist()} | {
        name: dict(counts=np.histogram(x, edges)[0].tolist(), mean=float(x.mean()), sd=float(x.std()))
        for name, x in (("real", real), ("replayed", replayed))}


# ----------------------------------------------------------------------------------------------------- stages
#
# `job`, made in main, is all that they share. Its networks stay, their weights come and go. In the run folder the
# stages leave files with what get_weights returns, and `saved` is the content of one.

def get_weights(job):
    """Of the model that learns: its moving average, itself, and how many updates are averaged."""
    return {"model": job.ema.state_dict(), "raw": job.model.state_dict(), "count": job.count}


def set_weights(job, saved):
    """Let the model that learns go on from what get_weights has returned."""
    job.ema.load_state_dict(saved["model"])
    job.model.load_state_dict(saved["raw"])
    job.count = saved["count"]


def earlier(path):
    """What a task or stage before has left in the run folder, or a sentence on how to do without."""
    try:
        return run.load(path)
    except run.InputError as error:
        raise run.InputError(f"{error}; delete {path.parent}/checkpoint*.pt, and the same command does this task "
                             "again, or if need be the one before") from error


def pool(of_class, classes, device):
    """A function of n: n images (n, C, H, W) at random of some classes of {c: u8}, and their labels (n,)."""
    images = torch.cat([of_class[c] for c in classes]).to(device)
    labels = torch.cat([torch.full((len(of_class[c]),), c) for c in classes]).to(device)

    def take(n):
        i = torch.randint(len(labels), (n,), device=device)
        return images[i], labels[i]
    return take


def views(args, u8, smallest, classifier_view):
    """Both views of images u8 (B, C, H, W) in [-1, 1]: the denoiser's, and the classifier's where there is one."""
    x_0 = data.normalize(data.diffusion_view(u8, args.flip, smallest))
    view = {"strong": data.strong_view, "weak": data.weak_view}.get(classifier_view)
    return x_0, view and data.normalize(view(u8, args.flip))


def learn(job, stage, losses, classes, of_old=None):
    """All updates of a stage: job.model learns. Now and then it is measured; classes and of_old are for that.

    losses(u) draws the batch of update u = 0, 1, ... of the stage and returns its terms.
    """
    args, model, k = job.args, job.model, job.k
    before, n = (0, job.n_local) if stage == "local" else (job.n_local, job.n_global)  # updates before the stage, in it
    optimizer = torch.optim.AdamW(model.parameters(), args.lr, weight_decay=0.01, fused=job.device.type != "mps")
    log, start, every = torch.zeros(n, len(LOG), device=job.device), 0, max(1, min(50, n // 20))
    if "optimizer" in job.state:  # the run was stopped inside this stage
        set_weights(job, job.state)
        run.restore(optimizer, job.state["optimizer"])
        log.copy_(job.state["log"])
        start = job.state["update"] - before
    model.train()
    job.progress.begin(k, before + start)
    for u in range(start, n):
        reseed(args.seed, "noise", k, stage, u)
        with job.autocast:
            terms = losses(u)
        optimizer.zero_grad()
        terms["loss"].backward()
        means = run.average(model, [terms.get(name, torch.zeros_like(terms["loss"])) for name in LOG[:-1]])
        norm = torch.nn.utils.get_total_norm([p.grad for p in model.parameters() if p.grad is not None])
        run.skip_if_broken(optimizer, norm)
        optimizer.step()
        job.count += 1
        update_ema(job.ema, model, job.count)
        log[u] = torch.cat([means, norm[None]])
        job.progress.step(args.batch_size)

        # Once in a while a record, accuracies or a checkpoint: only here does the script wait for the device.
        done = u + 1
        evaluating = done % args.eval_every == 0 or done == n
        recording = done % every == 0 or evaluating
        saving = run.save_due(args.save_every, before + done)
        if recording or saving:
            run.check_finite(log[:done], LOG, model, k, before)
        if recording:
            recent = dict(zip(LOG, log[u // every * every:done].mean(0).tolist()))  # since the last multiple of `every`
            told = {name: recent[name] for name in LOG if name in terms or name == "gradient_norm"}
            job.progress.record(before + done, told, lambda: {
                "stage": stage, **(measure(job, classes, of_old) if evaluating else {})})
        if saving:
            run.save_checkpoint(job.folder, {"task": k, "update": before + done, "stage": stage, **get_weights(job),
                                             "optimizer": optimizer.state_dict(), "log": log})


def learn_local(job, previous):
    """Stage 1: a model learns the real images of the task, or with --replay all of all tasks so far.

    In:  previous, the content of task<k-1>.pt, where --local-init global begins.
    Out: job's weights; where stage 2 follows, they and their accuracy are saved in local<k>.pt.
    """
    args, seen = job.args, job.learned + job.classes
    real, labelled = (pool(of_class, seen if args.source == "all" else job.classes, job.device)
                      for of_class in (job.train, job.known))

    def losses(u):
        if not args.labels or args.labelled_only:
            u8, y = real(args.batch_size)
            return joint_losses(args, job.model, *views(args, u8, args.crop[0], args.classifier_view), y, job.abar)
        # DEVIATION: with 5 % of CIFAR-10's labels the released batch is half as big; with few labels its EMA has a
        # decay of 0.999 throughout.
        few = args.batch_size // 8
        (u8_l, y_l), (u8, _) = labelled(few), real(args.batch_size - few)
        x_0, x_strong = views(args, u8, args.crop[0], "strong")
        x_l, x_weak = (data.normalize(data.weak_view(some, args.flip)) for some in (u8_l, u8))
        return semi_supervised_losses(args, job.model, x_0, x_l, y_l, x_weak, x_strong, job.abar)

    if job.k == 1 or args.local_init == "scratch":
        reseed(args.seed, "weights", job.k)
        scratch = build(args).state_dict()
        set_weights(job, {"model": scratch, "raw": scratch, "count": 0})
    else:
        set_weights(job, previous)
    learn(job, "local", losses, job.classes if job.n_global else seen)  # a local model knows the new classes alone
    if job.n_global:
        accuracy = measure(job, job.classes)["accuracy"]
        run.save(job.folder / f"local{job.k}.pt", {**get_weights(job), "accuracy": accuracy, "config": job.config})


def set_teachers(job, previous, local):
    """job.old becomes the global model of the task before, job.new the local model of this one, if there is one.

    DEVIATION: the released code draws with EMA weights, but labels and distils with raw ones and dropout on, as
    --teacher raw does.
    """
    raw = job.args.teacher == "raw"
    for teacher, saved in (job.old, previous), (job.new, local):
        if saved:
            teacher.load_state_dict(saved["raw" if raw else "model"])
            teacher.train(raw)


def draw(job, side, classes, saved, labeller):
    """--replay-per-class images of each class, {c: uint8 (quota, C, H, W)}, and numbers about them.

    The saved EMA weights draw images, DDIM from x_T to x_0, until every class has its quota or the cap is reached.
    `labeller` says which of all classes an 8-bit image is of; if that class is not wanted or full, it is thrown away.
    A class that is short is filled with mirrored and cropped copies of its images. `side` is "old" or "new".
    """
    # DEVIATION: the released code stops at abar_0, with 3 % of noise left, and labels floats before clamping them.
    args, batch, quota = job.args, 8 * job.args.batch_size, job.args.replay_per_class
    none = torch.empty(0, *job.shape, dtype=torch.uint8)
    kept = job.state["kept"].setdefault(side, {  # or what a checkpoint had of it
        "drawn": 0, "found": [0] * len(args.class_names), "images": dict.fromkeys(classes, none)})
    job.ema.load_state_dict(saved["model"])
    cap = math.ceil(args.replay_cap * quota * len(classes))
    for drawn in tqdm(range(kept["drawn"], cap, batch), desc=f"task {job.k}, {side} classes, at most", unit="batch",
                      leave=False, disable=True if run.rank else None):
        if all(len(images) == quota for images in kept["images"].values()):
            break
        reseed(args.seed, "replay", job.k, side, drawn)
        x_T = torch.randn(batch, *job.shape, device=job.device)
        with job.autocast, torch.no_grad():
            x = sample(job.ema, run.share(x_T), job.abar, args.replay_steps, clip=args.clip)
            u8 = data.quantize(run.gather(x, batch))
            y = labeller.classify(data.normalize(u8)).argmax(1)
        kept["drawn"] += batch
        kept["found"] = [n + int((y == c).sum()) for c, n in enumerate(kept["found"])]
        kept["images"] = {c: torch.cat([images, u8[y == c].cpu()])[:quota] for c, images in kept["images"].items()}
        if run.save_due(args.save_every, kept["drawn"] // batch):
            run.save_checkpoint(job.folder, job.state)

    full, copies = {}, []
    for c, images in kept["images"].items():
        if not len(images):
            raise run.InputError(
                f"task {job.k}: none of {kept['drawn']} images drawn for the {side} classes looks like class {c} to "
                "the model, so that it cannot be replayed: train longer (--local-iterations, --global-iterations) with "
                "--restart, or draw more with a higher --replay-cap and another --out")
        copies.append(quota - len(images))
        reseed(args.seed, "copies", job.k, c)
        more = images[torch.randint(len(images), (copies[-1],))]
        full[c] = torch.cat([images, data.diffusion_view(more, args.flip, 0.9 if side == "old" else 0.85)])
    print(f"task {job.k}: {kept['drawn']} images drawn for {quota} of each {side} class, {sum(copies)} of them copies",
          flush=True)
    return full, {"drawn": kept["drawn"], "found": kept["found"], "copies": copies}


def draw_and_label(job, previous, local):
    """Between the stages: the old global and the local model draw images of their classes, the teachers label them.

    In:  previous and local, the contents of task<k-1>.pt and local<k>.pt (None in one stage); job.old, job.new.
    Out: replay<k>.pt, {"images" (N, C, H, W) uint8, old classes first, "labels" (N,), "about"}, and a picture.
    """
    about, position = {}, {"task": job.k, "update": job.n_local}
    if "kept" not in job.state:  # else the run was stopped while it drew
        job.state = {**position, "stage": "replay", "kept": {}}
        run.save_checkpoint(job.folder, job.state)
    x_r, about["old"] = draw(job, "old", job.learned, previous, job.old)
    real, replayed = (torch.cat([images[c] for c in job.learned]).to(job.device) for images in (job.test, x_r))
    about["logits"] = histograms(classify(job.ema, real).amax(1), classify(job.ema, replayed).amax(1))
    if local:
        more, about["new"] = draw(job, "new", job.classes, local, job.new)
        x_r |= more
    labels = torch.tensor([*x_r]).repeat_interleave(job.args.replay_per_class)
    run.save(job.folder / f"replay{job.k}.pt", {"images": torch.cat([*x_r.values()]), "labels": labels, "about": about})
    rows = [images[:10] for images in x_r.values()][-20:]
    run.save_picture(job.folder / "samples" / f"replay{job.k}.png", torch.cat(rows), columns=len(rows[0]))
    job.state = {**position, "stage": "global"}
    run.save_checkpoint(job.folder, job.state)


def learn_global(job, previous, replay):
    """Stage 2: the global model learns what was drawn, in one stage also the real images of the task.

    In:  previous, the content of task<k-1>.pt, where it begins; replay, that of replay<k>.pt; job.old, job.new.
    Out: job's weights.
    """
    args, learned, seen = job.args, job.learned, job.learned + job.classes
    x_r = {c: replay["images"][replay["labels"] == c].to(job.device) for c in seen}
    old_images = pool(x_r, learned, job.device)
    new_images = pool(job.train if args.one_stage else x_r, job.classes, job.device)
    # DEVIATION: the released batches are drawn at random from old and new together; at a fixed ratio the teachers'
    # batches keep their shapes.
    n_old = min(args.batch_size - 1, max(1, round(args.batch_size * len(learned) / len(seen))))
    if min(n_old, args.batch_size - n_old) < run.world:
        raise run.InputError(f"task {job.k} has {n_old} old images in a batch of {args.batch_size}, too few of the old "
                             f"or the new for {run.world} processes: choose fewer")

    def losses(u):
        # DEVIATION: the released code counts validation batches too, and begins after 8,636 updates.
        on = args.one_stage or u >= args.classifier_start
        (u8_old, y_old), (u8_new, y_new) = old_images(n_old), new_images(args.batch_size - n_old)
        u8, y = torch.cat([u8_old, u8_new]), torch.cat([y_old, y_new])
        x_0, x_c = views(args, u8, args.crop[-1], args.classifier_view if on else None)
        if args.no_kd:
            return joint_losses(args, job.model, x_0, x_c, y, job.abar, on)
        if args.one_stage:
            return one_stage_losses(args, job.model, job.old, n_old, x_0, x_c, y, job.abar)
        return distillation_losses(args, job.model, job.old, job.new, n_old, x_0, x_c, y, job.abar, on)

    set_weights(job, previous)
    # The last layer's rows of classes not seen so far begin anew: all they have learned is never to answer.
    # DEVIATION: all released settings ask for this, but in the released code it no longer happens.
    unseen = [c for c in range(len(args.class_names)) if c not in learned]
    reseed(args.seed, "head", job.k)
    rows = nn.init.xavier_uniform_(torch.empty(job.model.head[-1].weight.shape))[unseen].to(job.device)
    with torch.no_grad():
        for net in job.model, job.ema:
            net.head[-1].weight[unseen] = rows
    learn(job, "global", losses, seen, {c: x_r[c] for c in learned})


def finish_task(job, previous, local, replay):
    """Measure the model after the task and save it: accuracy.json, samples/task<k>.png, task<k>.pt."""
    args, k, tasks, seen = job.args, job.k, job.args.class_tasks[:job.k], job.learned + job.classes
    right, total = count_correct(job.ema, job.test, seen), {c: len(job.test[c]) for c in seen}
    history = (previous["history"] if previous else []) + [{
        "task": k, "correct": [sum(right[c] for c in classes) for classes in tasks],
        "total": [sum(total[c] for c in classes) for classes in tasks],
        "by_class": {str(c): right[c] / total[c] for c in seen},
        "local": local and local["accuracy"], "replay": replay and replay["about"]}]
    result = summary([h["correct"] for h in history], history[-1]["total"])
    whole, head = (sum(p.numel() for p in net.parameters()) for net in (job.model, job.model.head))
    parameters = {"unet": whole - head, "head": head}
    run.write_json(job.folder / "accuracy.json", dict(result, tasks=history, parameters=parameters))
    reseed("grid")  # the same 64 noises in every run and, as the CPU draws them, on every device
    x_T = torch.randn(64, *job.shape).to(job.device)
    with job.autocast, run.eager(args.compile):
        x = sample(job.ema, x_T, job.abar, args.sample_steps, clip=args.clip)
    run.save_picture(job.folder / "samples" / f"task{k}.png", data.quantize(x), columns=8)
    run.save(job.folder / f"task{k}.pt",
             {"task": k, **get_weights(job), "history": history, "memory": {}, "config": job.config})
    print(f"task {k}: average accuracy {result['average_accuracy']:.4f}, of each task "
          f"{' '.join(f'{a:.4f}' for a in result['matrix'][-1])}", flush=True)
    job.state = {}


# ------------------------------------------------------------------------------------------------------ train

def main(argv=None):
    args = get_args(argv)
    device, autocast = run.start(args)

    # Data: uint8 images of each class, {c: (n, C, H, W)}.
    splits = (data.load_images(args.dataset, split, args.data_dir, args.image_size) for split in ("train", "test"))
    train, test = ({c: u8[y == c] for c in sum(args.class_tasks, [])} for u8, y in splits)
    known = train
    if args.labels:  # the same share of every class
        reseed(args.seed, "labels")
        known = {c: u8[torch.randperm(len(u8))[:max(1, round(args.labels * len(u8)))]] for c, u8 in train.items()}

    # The networks, the run folder, and where the run stands.
    model = build(args).to(device)
    ema, old, new = (copy.deepcopy(model).eval().requires_grad_(False) for _ in range(3))
    held = 2 if args.source != "generated" else 3 if args.one_stage else 4  # of these four the method needs so many
    stages, usual = (count_updates(args, how["local_iterations"], how["global_iterations"])
                     for how in (vars(args), args.preset))
    config = dict(vars(args), updates=[sum(n) for n in stages], preset_updates=[sum(n) for n in usual],
                  parameters=held * sum(p.numel() for p in model.parameters()))
    folder = run.open_folder(config)
    if args.compile:
        for net in model, ema, old, new:
            net.compile(dynamic=False)
        for net in model, old, new:  # not ema: each class that it is tested on may have another number of images
            net.classify = torch.compile(net.classify, dynamic=False)
    state = run.latest(folder, args.tasks) or {"task": 1, "update": 0}
    job = SimpleNamespace(
        args=args, config=config, device=device, autocast=autocast, abar=alpha_bar(args.schedule).to(device),
        folder=folder, state=state, progress=run.Progress(folder, state, config["updates"], device),
        train=known if args.labelled_only else train, known=known,
        test={c: u8.to(device) for c, u8 in test.items()}, shape=(model.in_channels, args.image_size, args.image_size),
        model=model, ema=ema, count=0,  # the model that learns, and its moving average over so many updates
        old=old, new=new)               # the teachers of old and of new classes in stage 2

    for k in range(state["task"], args.tasks + 1):
        job.k, (job.n_local, job.n_global) = k, stages[k - 1]  # updates of stage 1 and 2, 0 where there is none
        job.learned, job.classes = sum(args.class_tasks[:k - 1], []), args.class_tasks[k - 1]
        stage = job.state.get("stage", "local")  # at which the run was stopped, or the first
        previous = earlier(folder / f"task{k - 1}.pt") if k > 1 else None  # the global model of the task before
        local = replay = None
        if job.n_local and stage == "local":
            learn_local(job, previous)
        if job.n_global:
            local = earlier(folder / f"local{k}.pt") if job.n_local else None
            set_teachers(job, previous, local)
            if stage != "global":
                draw_and_label(job, previous, local)
            replay = earlier(folder / f"replay{k}.pt")
            learn_global(job, previous, replay)
        finish_task(job, previous, local, replay)
        if k < args.tasks:
            run.exit_if_stopped(f"task {k}")
    run.finish(folder)


if __name__ == "__main__":
    run.main(main)
