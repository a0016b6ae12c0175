"""A classifier that learns the tasks with images replayed by a finished run's models: what are these images worth?

In task k the classifier sees the real images of this task and as many drawn by the diffusion model of task k-1. The
classifier of task k-1 gives those soft labels. The better the model, the more the classifier knows of old classes.

    L = 1/k CE(y, p) + (1 - 1/k) R^2 H(q, p_r),  H(q, p_r) = -sum_c q_c log p_r_c              tasks k >= 2
    p = softmax(model(x_0)), p_r = softmax(model(x_r) / R), q = softmax(prev(x_r) / R), x_r = DDIM(generator), R = 2

Masip et al., "Continual Learning of Diffusion Models with Generative Distillation", arXiv 2311.14028, Sections 4.2.3,
A.1.2 and A.2 (Equations 11 to 13): the accuracies of Tables 2, B.3, B.4 and B.5.

    python train_classifier.py runs/fashion-mnist/gd-2/seed42           any finished run of a train script
    python train_classifier.py --dataset fashion-mnist --replay none    the lower target, no replay; all: the upper one

The result is classifier.json in RUN, or in runs/<dataset>/<name>/seed<seed> with a name such as classifier-joint-small.
It is written after each task. A command that was stopped starts over. At laptop scale it takes two minutes on one core.
"""

import copy
import hashlib
import json
import math
import shlex
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn
from tqdm import tqdm

import data
import run
from ddim import T, alpha_bar, eval_mode, reseed, sample
from run import InputError
from unet import NETS, UNet, why_unfit

BATCH, LR, R = 128, 1e-3, 2.0  # images of the current task, learning rate of Adam (A.4), temperature (A.2)

# -------------------------------------------------------------------------------------------------- arguments

# DEVIATION: batches of 128 and 20 epochs, 1,880 updates of a task on Fashion-MNIST and 1,580 on CIFAR-10, as in the
# released runs; the paper says 1,800 for both, and batches of 64 for CIFAR-10.
# DEVIATION: the paper augments nothing; its released runs mirror CIFAR's images, here too.
PRESETS = {
    "paper": dict(length=("epochs", [20.0]), pool=None, image_size=32, class_order="random"),
    "small": dict(length=("iterations", [900]), pool=None, image_size=16, class_order="random"),
    "laptop": dict(length=("iterations", [150, 60]), pool=None, image_size=16, class_order="0,1|2,7|8,9")}
# On one core the replayed images of an update take a 16x16 model about a second, so small runs draw a pool. Later tasks
# have 250 updates, as with 900 more of the old classes would be forgotten.
SMALL_RUN = dict(length=("iterations", [900, 250]), pool=6400)
TARGETS = {"none": ("classifier-finetune", "Finetune (classifier)"), "all": ("classifier-joint", "Joint (classifier)")}
WHAT = "name title base method departs dataset scale seed class_names".split()  # copied into classifier.json


def get_args(argv=None):
    parser = run.parser(__doc__, __file__)
    add = parser.add_argument
    add("run", nargs="?", metavar="RUN", help="the folder of a finished run")
    add("--replay", choices=list(TARGETS), help="in place of RUN: nothing (lower target), all data so far (upper)")
    add("--dataset", type=data.dataset_name, metavar="NAME|FOLDER", help="of a target (default: fashion-mnist)")
    add("--scale", choices=list(PRESETS), help="of a target (default: paper)")
    add("--seed", type=run.whole, help="of a target (default: 42)")
    add("--tasks", type=run.positive(int), help="of a target (paper: 5)")
    add("--class-order", help="of a target: random (by the seed, as the paper), natural, or '0,1|2,7' states the tasks")
    add("--steps", type=run.positive(int, T), help="of a run: DDIM steps of its models (paper: 10, CIFAR-10 20)")
    add("--pool", type=run.positive(int), metavar="N", help="of a run: draw N images in each task and replay them "
        "again and again (small: 6400), in place of new ones in every update (paper)")
    add("--replay-loss", choices=["paper", "reversed"], help="of a run: Equation 12 (default), or as the released code")
    run.add_length(parser, paper="20")  # --epochs, --iterations: args.length, e.g. ("epochs", [20.0])
    add("--data-dir", help="where the dataset lies or is downloaded to (default: the run's, else data)")
    add("--device", default="auto", help="auto (CUDA, else mps, else cpu), cpu, mps, cuda or cuda:<i>")
    add("--restart", action="store_true", help="start over, whatever classifier.json holds")

    # What the run or the preset says becomes the defaults of the parser, so that the command line wins.
    first = parser.parse_args(argv)
    if bool(first.run) == bool(first.replay):
        parser.error("give a finished run folder, or --replay none or all for a target")
    for key in ("dataset", "scale", "seed", "tasks", "class_order") if first.run else ("steps", "pool", "replay_loss"):
        if getattr(first, key) is not None:
            parser.error(f"--{key.replace('_', '-')} does nothing for a {'run' if first.run else 'target'}")
    preset = run_preset(Path(first.run)) if first.run else target_preset(first)
    parser.set_defaults(**preset)
    args = parser.parse_args(argv)
    departs, info = run.departures(parser, args, "run", "replay"), data.info(args.dataset, args.data_dir)
    args.dataset_name, args.preset_length = info.name, preset["length"]
    if first.replay:
        args.class_names, args.departs = info.classes, departs
        args.class_tasks = data.class_tasks(len(info.classes), args.tasks, args.class_order, args.seed)
        args.name = run.run_name(args.base, departs, args.scale)
        args.folder = Path("runs", info.name, args.name, f"seed{args.seed}")
    elif why := why_unfit(args.unet, info.channels, args.image_size):
        raise InputError(f"{why}: give {args.folder} the data that it was trained on")
    if info.classes != args.class_names:
        raise InputError(f"{args.dataset} has the classes {', '.join(info.classes)}, the run was trained on "
                         f"{', '.join(args.class_names)}: give it the same data")
    if args.image_size < 10:
        raise InputError(f"the classifier takes images of 10x10 pixels or more, these have {args.image_size}")
    if "length" in departs and len(args.length[1]) > len(args.class_tasks):
        parser.error(f"--{args.length[0]} takes at most one value for each of the {len(args.class_tasks)} tasks")
    return args


def target_preset(first):
    """What a target does unless it is told otherwise: data, tasks and scales are those of train_gr.py."""
    dataset, scale, data_dir = first.dataset or "fashion-mnist", first.scale or "paper", first.data_dir or "data"
    preset, (base, title) = dict(PRESETS[scale]), TARGETS[first.replay]
    if dataset not in data.DATASETS:
        preset["class_order"] = "random"  # a stated order is about the classes of a dataset
    if dataset == "imagenet100" and scale == "paper":
        preset["image_size"] = 64
    return dict(preset, dataset=dataset, scale=scale, data_dir=data_dir, seed=42, base=base, method=base, title=title,
                tasks=data.count_tasks(first.class_order or preset["class_order"]),
                flip=data.info(dataset, data_dir).channels == 3)


def run_preset(folder):
    """What the config.json of a run says, whatever train script wrote it."""
    keys = [*WHAT, "data_dir", "class_tasks", "image_size", "flip", "unet", "schedule", "sample_steps"]
    config = run.read_config(folder, keys)
    found = {key: config[key] for key in keys} | {"clip": config.get("clip", True), "steps": config["sample_steps"]}
    if found["unet"] not in NETS or found["scale"] not in PRESETS:
        raise InputError(f"{folder} is of the net {found['unet']} and the scale {found['scale']}: add what is new to "
                         "NETS of unet.py and PRESETS of train_classifier.py")
    length_and_pool = SMALL_RUN if found["scale"] == "small" else PRESETS[found["scale"]]
    return dict(length_and_pool, **found, folder=folder, replay="generated", replay_loss="paper")


# ---------------------------------------------------------------------------------------- network and losses

def classifier(channels, classes):
    """The network of Table A.1: x_0 (B, channels, H, W) -> logits (B, classes), H = W >= 10. No class is ever masked.

    DEVIATION: the table gives no paddings; as in the released code the second and fourth convolution have none.
    """
    return nn.Sequential(
        nn.Conv2d(channels, 32, 3, padding=1), nn.ReLU(), nn.Conv2d(32, 32, 3), nn.ReLU(),
        nn.MaxPool2d(2), nn.Dropout(0.25),                                          # -> (B, 32, H/2 - 1, W/2 - 1)
        nn.Conv2d(32, 64, 3, padding=1), nn.ReLU(), nn.Conv2d(64, 128, 3), nn.ReLU(),
        nn.MaxPool2d(2), nn.Dropout(0.25),                                          # -> (B, 128, H/4 - 2, W/4 - 2)
        nn.Conv2d(128, 128, 1), nn.ReLU(),
        nn.AdaptiveMaxPool2d(1), nn.Flatten(), nn.Dropout(0.25), nn.Linear(128, classes))  # -> (B, 128) -> (B, classes)


def distillation(logits_r, prev_logits_r, form="paper"):
    """R^2 H(q, p_r) = -R^2 mean_B sum_c q_c log p_r_c   (Equation 12), a scalar; both logits (B, classes).

    DEVIATION: the released code, and so the accuracies in the paper's tables, has it the wrong way round,
    -sum_c p_r_c log q_c. This drives the student to the teacher's first choice. It is form="reversed" here.
    """
    log_p_r, log_q = F.log_softmax(logits_r / R, dim=1), F.log_softmax(prev_logits_r / R, dim=1)
    if form == "reversed":
        log_p_r, log_q = log_q, log_p_r
    return -R**2 * (log_q.exp() * log_p_r).sum(1).mean()


def losses(model, prev, x_0, y, x_r, form="paper"):
    """CE(y, p) of the new images (Equation 11) and R^2 H(q, p_r) of the replayed ones (Equation 12), two scalars."""
    if x_r is None:
        return F.cross_entropy(model(x_0), y), torch.zeros((), device=x_0.device)
    logits = model(torch.cat([x_0, x_r]))  # one forward for both halves: (2B, classes)
    with torch.no_grad():
        prev_logits_r = prev(x_r)
    return F.cross_entropy(logits[:len(y)], y), distillation(logits[len(y):], prev_logits_r, form)


# --------------------------------------------------------------------------------------------------- accuracy

@torch.no_grad()
def count_correct(model, u8, y):
    """How many of the images u8 (N, C, H, W) get their class y (N,) out of all classes, seen or not."""
    with eval_mode(model):
        return sum(int((model(data.normalize(u)).argmax(1) == c).sum()) for u, c in zip(u8.split(500), y.split(500)))


def summary(correct, total):
    """Of correct[k][j], the test images of task j <= k that are right after task k, out of total[j]:

    matrix    a_kj = correct_kj / total_j, a row for each k
    accuracy  sum_j correct_kj / sum_j total_j for each k, all classes seen; the last is the paper's ACC
    """
    return dict(accuracy=[sum(row) / sum(total[:len(row)]) for row in correct],
                matrix=[[right / of for right, of in zip(row, total)] for row in correct], correct=correct, total=total)


# ------------------------------------------------------------------------------------------------------ train

def is_finished(path, protocol):
    """Whether the file at `path` holds the whole result of this protocol; refuse one of another protocol."""
    if not path.is_file():
        return False
    try:
        before = json.loads(path.read_text(encoding="utf-8"))
        old, done = {**before["protocol"]}, len(before["accuracy"])
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(f"{path} is damaged; --restart replaces it") from error
    differs = [f"{key} was {old.get(key)} and is {protocol.get(key)}" for key in sorted({*old, *protocol})
               if old.get(key) != protocol.get(key)]
    if differs:
        raise InputError(f"{path} holds a result of other settings ({'; '.join(differs)}); --restart replaces it")
    whole = done == len(protocol["updates"])
    print(f"{path} is finished (--restart does it again)" if whole else f"{path} ends after task {done}: starting over")
    return whole


def main(argv=None):
    args = get_args(argv)
    device, tasks = run.pick_device(args.device), len(args.class_tasks)
    torch.backends.cudnn.benchmark = True
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False  # cudnn's is on by default
    (images, labels), (tests, test_labels) = (
        data.load_images(args.dataset, split, args.data_dir, args.image_size) for split in ("train", "test"))
    of_task, of_test = (data.indices(y, args.class_tasks) for y in (labels, test_labels))  # indices of the images
    # DEVIATION: of the upper target the paper says only "data from all tasks so far"; as in the released runs, training
    # goes on from the task before and a pass is over all of it, so that the updates grow with the tasks.
    if args.replay == "all":
        of_task = [torch.cat(of_task[:k]) for k in range(1, tasks + 1)]
    updates, preset_updates = (run.count_updates(length, BATCH, of_task)
                               for length in (args.length, args.preset_length))

    # All that decides the numbers, and whether they are there already.
    protocol = dict(
        digest=data.digest(images, labels), image_size=args.image_size, flip=args.flip,
        class_tasks=args.class_tasks, seed=args.seed, updates=updates, batch_size=BATCH, lr=LR, replay=args.replay)
    if args.run:
        generator = UNet(**NETS[args.unet]).to(device).requires_grad_(False)
        abar, files = alpha_bar(args.schedule).to(device), [args.folder / f"task{k}.pt" for k in range(1, tasks + 1)]
        for file in files:  # find out now whether one is missing or damaged
            if not file.exists():
                raise InputError(f"{args.folder} is not finished, {file.name} is missing: train it to the end")
            run.load_weights(generator, file)  # of JDCL's models all but the head
        protocol.update(replay_loss=args.replay_loss, temperature=R, steps=args.steps, schedule=args.schedule,
                        clip=args.clip, pool=args.pool,
                        generators=[hashlib.sha256(file.read_bytes()).hexdigest() for file in files])
    path = args.folder / "classifier.json"
    if not args.restart and is_finished(path, protocol):
        return
    run.check_writable(path)
    images, labels, tests, test_labels = (x.to(device) for x in (images, labels, tests, test_labels))
    reseed(args.seed, "classifier", "weights")
    model = classifier(images.shape[1], len(args.class_names)).to(device)

    def draw(n):
        """n images x_r (n, C, H, W) of the generator."""
        return sample(generator, torch.randn(n, *images.shape[1:], device=device), abar, args.steps, clip=args.clip)

    correct, last, seconds = [], [], []  # by task; last: the losses of its last update, all, new and replayed
    print(f"{args.name} on {device}: classes {args.class_tasks}, {updates} updates, into {path}")

    for k in range(1, tasks + 1):
        index, since = of_task[k - 1].to(device), time.perf_counter()
        replaying = args.run and k > 1
        part_new = 1 / k if replaying else 1.0  # weight of the new images in the loss
        optimizer = torch.optim.Adam(model.parameters(), LR, fused=True)  # afresh, nothing clipped
        prev = copy.deepcopy(model).eval()  # the classifier of task k-1
        if replaying:
            run.load_weights(generator, files[k - 2])
        if replaying and args.pool:
            reseed(args.seed, "classifier", "pool", k)
            pool = torch.cat([draw(BATCH) for _ in range(math.ceil(args.pool / BATCH))])[:args.pool]

        each = data.batches(index, BATCH, 0, updates[k - 1], args.seed, "classifier", "order", k)
        for u, i in tqdm(each, desc=f"task {k}/{tasks}", total=updates[k - 1], disable=None, leave=False):
            reseed(args.seed, "classifier", k, u)
            x_0, y = data.normalize(data.random_mirror(images[i], args.flip)), labels[i]
            x_r = None
            if replaying:
                x_r = pool[torch.randint(len(pool), (len(i),), device=device)] if args.pool else draw(len(i))
            loss_new, loss_replay = losses(model, prev, x_0, y, x_r, args.replay_loss)
            loss = part_new * loss_new + (1 - part_new) * loss_replay
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()

        if not loss.isfinite():  # once not finite, it stays so
            raise InputError(f"the loss of task {k} is {loss.item()}" + ": try another --seed" * (not args.run))
        correct.append([count_correct(model, tests[j], test_labels[j]) for j in of_test[:k]])
        last.append([loss.item(), loss_new.item(), loss_replay.item()])
        seconds.append(round(time.perf_counter() - since, 1))
        result = summary(correct, [len(i) for i in of_test])
        run.write_json(path, result | {key: getattr(args, key) for key in (*WHAT, "dataset_name")} | dict(
            protocol=protocol, preset_updates=preset_updates, last_losses=last, seconds=seconds, device=str(device),
            command=shlex.join(["python", *sys.argv])))
        print(f"task {k}/{tasks}: accuracy {result['accuracy'][-1]:.4f} on the classes seen, {seconds[-1]:.0f} s",
              flush=True)
    print(f"{path} is written")


if __name__ == "__main__":
    run.main(main)
