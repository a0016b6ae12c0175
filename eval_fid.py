"""How good a model's images are, and how much of the old classes is left in them: FID, frd and KLD.

    fid, frd     |m - m_r|^2 + tr(S + S_r - 2 (S S_r)^(1/2))         Heusel et al., arXiv 1706.08500v6, Equation 6
    kld          sum_c (p_c + 1e-8) ln((p_c + 1e-8) / (q_c + 1e-8))  Masip et al., arXiv 2311.14028, 4.2.2 and A.5
    kld_reverse  the same with p and q exchanged
    ard          1/2 sum_c |p_c - q_c|

m and S are mean and covariance of the features of generated images, m_r and S_r those of the test images of all classes
seen so far. FID's features are the 2048 of the Inception network of 2015-12-05. Those of frd are the last ones of the
labeller, a ResNet18 that is trained here on the dataset itself: 512 of them, 128 below 32x32.

p are the frequencies of the classes in these test images, q those that the labeller sees in the generated ones, out of
all classes of the dataset. One lost class of ten makes a kld of 1.5170, eight make 12.5726, sampling alone about
(classes - 1) / 2n. fid_floor and frd_floor are the distances of as many training images, kld_real is the kld of the
test images, frd_by_task the frd of each task's images alone. `denoise` is |eps - model(x_t, t)|^2 on test images of
task 1, by t.

    python eval_fid.py runs/fashion-mnist/gd-2/seed42      every task of a run, into its eval.json
    python eval_fid.py IMAGES --reference fashion-mnist    FID of anybody's images
    python eval_fid.py --train-resnet18 fashion-mnist      the labeller, which a run's evaluation else trains itself

IMAGES is a folder of 8-bit pictures (without its sub-folders), a .npy or .npz of uint8 (N, H, W), (N, H, W, C) or
(N, C, H, W) with 1 or 3 channels, or statistics kept with --save-stats. So is the reference, or it is a dataset:
fashion-mnist (its test images) or fashion-mnist:train. Grey becomes RGB by repetition.
"""

import functools
import hashlib
import http.client
import json
import math
import socket
import sys
import time
import zipfile
import zlib
from collections import namedtuple
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import PIL
import scipy
import torch
import torch.nn.functional as F
import torchvision
from torch import nn
from torchvision.models import inception
from tqdm import tqdm

import data
import run
from ddim import T, alpha_bar, eval_mode, q_sample, reseed, sample
from run import InputError
from unet import NETS, UNet, resnet18

WEIGHTS = {  # option: SHA-256 and where to get it
    "--inception-weights": (
        "6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2",
        "https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/pt_inception-2015-12-05-6726825d.pth"),
    "--resnet18-weights": (
        "f37072fd47e89c5e827621c5baffa7500819f7896bbacec160b1a16c560e07ec",
        "https://download.pytorch.org/models/resnet18-f37072fd.pth")}
# How a labeller is trained: as in the paper's A.1.3 or, below 32x32, on a laptop. `updates` is the least number of
# them, and `least` the test accuracy that it needs.
WIDE = dict(width=64, epochs=100, updates=250, lr=5e-4, decay=False, warp=True,
            least={"fashion-mnist": 0.88, "mnist": 0.95, "cifar10": 0.8, "shapes": 0.8})
NARROW = dict(width=16, epochs=1, updates=250, lr=2e-3, decay=True, warp=False,
              least={"fashion-mnist": 0.8, "mnist": 0.8, "shapes": 0.8})
PICTURES = (".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff", ".webp", ".pgm", ".ppm")
VERSIONS = {package.__name__: package.__version__ for package in (torch, torchvision, np, scipy, PIL)}


# -------------------------------------------------------------------------------------------------- arguments

def get_args(argv=None):
    parser = run.parser(__doc__, __file__)
    add = parser.add_argument
    add("images", nargs="?", metavar="RUN|IMAGES", help="a run folder, or images")
    add("--reference", metavar="IMAGES|DATASET", help="what IMAGES are compared with")
    add("--save-stats", metavar="PATH.npz", help="keep the statistics of IMAGES")
    add("--train-resnet18", type=data.dataset_name, metavar="DATASET|FOLDER", help="train the labeller of this dataset")
    add("--scale", default="paper", choices=["paper", "small", "laptop"], help="of --train-resnet18")
    add("--image-size", type=run.positive(int, 4096), help="of --train-resnet18 (default: 32, ImageNet-100 64)")
    add("--epochs", type=run.positive(int), help="of --train-resnet18 (default: 100, below 32x32 1)")
    add("--labeller", default="scratch", choices=["scratch", "imagenet"], help="3x3 stem, or as the released code")
    add("--labeller-path", metavar="PATH", help="its file (default: the one in runs/labellers for these images)")
    add("--resnet18-weights", metavar="PATH", help="ImageNet weights, where they cannot be downloaded")
    add("--n", type=run.positive(int), help="images per task (paper scale: 10000, else 2000), or the first n of IMAGES")
    add("--steps", type=run.positive(int, T), help="DDIM steps (default: the run's; paper: 10, CIFAR-10 20)")
    add("--protocol", default="tf1", choices=["tf1", "pytorch-fid"], help="FID's resizing and range (paper: tf1)")
    add("--inception-weights", metavar="PATH", help="FID's network, where it cannot be downloaded")
    add("--fid", action="store_true", help="FID below paper scale too: about 0.4 s an image on a CPU core")
    add("--seed", type=run.whole, help="of the noise (default: the run's), or of --train-resnet18 (42)")
    add("--batch-size", type=run.positive(int), default=128, help="images at a time; changes no number")
    add("--data-dir", help="where the dataset lies or is downloaded to (default: the run's, else data)")
    add("--device", default="auto", help="auto (CUDA, else mps, else cpu), cpu, mps, cuda or cuda:<i>")
    args = parser.parse_args(argv)
    if bool(args.images) == bool(args.train_resnet18):
        parser.error("give a run folder or images, or --train-resnet18 with a dataset")
    if args.n == 1:
        parser.error("--n must be at least 2: one image has no covariance")
    return args


# ------------------------------------------------------------------------------------------------ the metrics

Moments = namedtuple("Moments", "n mu sigma")  # of n feature vectors the mean (D,) and the covariance (D, D), float64


def moments(features):
    """The Moments of features (n, D); the covariance is unbiased, as in every FID."""
    if len(features) < 2:
        raise InputError("one image has no covariance: at least two are needed, of real and of generated ones")
    return Moments(len(features), features.mean(0), np.cov(features, rowvar=False).reshape(2 * features.shape[1:]))


def features_of(images, extract, batch_size):
    """extract(x) of images (N, C, H, W), so many at a time: (N, D) float64, 16 kB an image for FID."""
    batches = tqdm(images.split(batch_size), desc="features", disable=None, leave=False)
    x = np.concatenate([extract(batch).cpu().double().numpy() for batch in batches])  # mps has no float64
    assert np.isfinite(x).all(), "the network's features must be finite"
    return x


def frechet(a, b):
    """|m - m_r|^2 + tr(S + S_r - 2 (S S_r)^(1/2)) of two Moments, a float >= 0 (Heusel et al., Equation 6).

    With S = R R^T the last trace is the sum of the roots of the eigenvalues of R^T S_r R, a symmetric matrix. Where
    images are fewer than features, many of them are rounding noise, whose roots would add up. They become 0.
    So this is exact to 1e-12, where scipy's sqrtm is off by 1e-5.
    """
    def cut(w):
        return np.where(w > len(w) * np.finfo(np.float64).eps * w.max(), w, 0)

    w, v = scipy.linalg.eigh(a.sigma)
    root = v * np.sqrt(cut(w))
    product = root.T @ b.sigma @ root
    w = scipy.linalg.eigh((product + product.T) / 2, eigvals_only=True)
    traces = np.trace(a.sigma) + np.trace(b.sigma)
    d = np.sum((a.mu - b.mu) ** 2) + traces - 2 * np.sum(np.sqrt(cut(w)))
    assert d >= -1e-6 * traces, f"{d} is further below 0 than rounding takes it"
    return max(float(d), 0.0)


def kld(p, q):
    """KL(p || q) = sum_c (p_c + 1e-8) ln((p_c + 1e-8) / (q_c + 1e-8)), nats; p, q counts or frequencies (K,)."""
    p, q = (np.asarray(v, np.float64) / np.sum(v) + 1e-8 for v in (p, q))  # 1e-8 after normalising, as released
    return float(np.sum(p * np.log(p / q)))


# ---------------------------------------------------------------------------------------------- FID's network

def sha256(path):
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()


def weights(option, path):
    """The weights file with the known SHA-256: at `path`, else in torch.hub's cache, into which it is downloaded."""
    expected, url = WEIGHTS[option]
    where = Path(path or Path(torch.hub.get_dir(), "checkpoints", Path(url).name))
    cure = f"get {url}, SHA-256 {expected}, and put it there or give its place with {option}"
    try:
        if not path and not where.exists():
            where.parent.mkdir(parents=True, exist_ok=True)
            socket.setdefaulttimeout(15)  # torch.hub sets none
            torch.hub.download_url_to_file(url, where, expected, progress=sys.stderr.isatty())
        found = sha256(where)
    except (OSError, RuntimeError, http.client.HTTPException) as error:  # RuntimeError: another SHA-256
        raise InputError(f"cannot read or download {where} ({error}): {cure}") from error
    if found != expected:
        raise InputError(f"{where} is damaged or another file (its SHA-256 is {found}): remove it, {cure}")
    return where


def inception_network():
    """FID's network, 23,850,960 parameters, still without its weights; (B, 3, 299, 299) in [-1, 1] -> (B, 1008).

    Unlike in torchvision's, the last branch of a block pools by a mean without the padding, and in the last block by a
    maximum.
    """
    def forward(x, block, pool):
        return torch.cat([*block._forward(x)[:-1], block.branch_pool(pool(x, 3, 1, 1))], 1)

    net = inception.Inception3(num_classes=1008, aux_logits=False, transform_input=False, init_weights=False)
    mean = functools.partial(F.avg_pool2d, count_include_pad=False)
    for name, block in net.named_children():
        if hasattr(block, "branch_pool"):
            block.forward = functools.partial(forward, block=block, pool=F.max_pool2d if name == "Mixed_7c" else mean)
    return net.eval().requires_grad_(False)


def resize(x, protocol):
    """The input of FID's network, (B, 3, 299, 299) in about [-1, 1], from x (B, 3, H, W) in [0, 255].

    "pytorch-fid" samples pixel i at (i + 1/2) side / 299 - 1/2. "tf1", that of 2015, samples at i side / 299, which is
    the grid of align_corners with one more pixel.
    """
    if protocol == "pytorch-fid":
        return 2 * F.interpolate(x / 255, size=(299, 299), mode="bilinear") - 1
    x = F.pad(x, (0, 1, 0, 1), mode="replicate")
    return (F.interpolate(x, size=(300, 300), mode="bilinear", align_corners=True)[:, :, :299, :299] - 128) / 128


def fid_features(net, protocol, device):
    """A function from images (B, C, H, W), uint8 or floats in [-1, 1], to (B, 2048), the input of the last layer."""
    net.to(device).fc = nn.Identity()

    @torch.inference_mode()
    def extract(x):
        # DEVIATION: the released code takes real images through floats and truncates them as well, which lowers 63 of
        # the 256 levels by one. Here only generated images are truncated.
        x = (x if x.dtype == torch.uint8 else data.quantize(x)).to(device).float().expand(-1, 3, -1, -1)
        return net(resize(x, protocol))
    return extract


def load_inception(args, device):
    """FID's function from images to features, and what it is."""
    net, path = inception_network(), weights("--inception-weights", args.inception_weights)
    net.load_state_dict(torch.load(path, "cpu", weights_only=True))
    about = dict(network="inception-2015-12-05", features=2048, sha256=WEIGHTS["--inception-weights"][0],
                 name=args.protocol)
    return fid_features(net, args.protocol, device), about


# ----------------------------------------------------------------------------------------------- the labeller

def load_data(dataset, data_dir, side, args):
    """A dataset at one side, and the file, network and recipe of its labeller."""
    imagenet, recipe = args.labeller == "imagenet", WIDE if side >= 32 else NARROW
    if imagenet and side < 32:
        raise InputError("--labeller imagenet is for 32x32 and more: its stem leaves one pixel of 16x16")
    info = data.info(dataset, data_dir)
    (u8, y), (u8_test, y_test) = (data.load_images(dataset, split, data_dir, side) for split in ("train", "test"))
    if len(u8) < 10:
        raise InputError(f"{dataset} has {len(u8)} training images: a labeller takes at least 10")
    digest = data.digest(u8, y)  # a labeller never judges images of another digest than it was trained on
    path = Path("runs", "labellers", f"{side}x{side}{'-imagenet' * imagenet}-{digest[:8]}.pt")
    least = recipe["least"].get(dataset, (1 + 1 / len(info.classes)) / 2)  # half-way between chance and 1
    return SimpleNamespace(
        dataset=dataset, info=info, u8=u8, y=y, u8_test=u8_test, y_test=y_test, digest=digest,
        recipe=dict(recipe, least=least), path=Path(args.labeller_path or path), title=f"{info.title} at {side}x{side}",
        network=dict(channels=info.channels, classes=len(info.classes), width=recipe["width"], imagenet=imagenet))


def augment(x, warp=True):
    """x (B, C, H, W) mirrored, turned by up to 10 degrees and moved by up to a tenth if `warp`, plus N(0, 0.01): A.1.3.

    DEVIATION: the paper also says "randomly resized"; its released code resizes all images alike, as they come here.
    """
    b, side = len(x), x.shape[3]
    mirror = 1 - 2 * torch.randint(2, (b,), device=x.device)
    a = (torch.rand(b, device=x.device) * 2 - 1) * math.pi / 18 * warp
    move = ((torch.rand(2, b, device=x.device) * 2 - 1) * warp * side / 10).round() * 2 / side  # whole pixels
    theta = torch.stack([mirror * a.cos(), a.sin(), move[0], -mirror * a.sin(), a.cos(), move[1]], 1).view(b, 2, 3)
    grid = F.affine_grid(theta, x.shape, align_corners=False)
    x = F.grid_sample(x + 1, grid, mode="nearest", align_corners=False) - 1  # what comes in from outside is black
    return x + 0.1 * torch.randn_like(x)


def accuracy(net, u8, y):
    """The share of the images (N, C, H, W) that `net`, in eval mode, gives their labels y (N,)."""
    with torch.inference_mode():
        label = torch.cat([net(data.normalize(batch)).argmax(1) for batch in u8.split(500)])
    return (label == y).sum().item() / len(y)


def train_labeller(d, args, seed, device):
    """A.1.3: train on 5/6 of Fashion-MNIST's training images, 9/10 of others', and keep the epoch best on the rest.

    DEVIATION: the released code draws the rest without a seed, and augments it too; here neither.
    """
    run.check_writable(d.path)
    begun, recipe = time.perf_counter(), d.recipe
    reseed(seed, "labeller")
    net = resnet18(**d.network)
    u8, y, u8_test, y_test = (x.to(device) for x in (d.u8, d.y, d.u8_test, d.y_test))
    if d.network["imagenet"]:
        state = torch.load(weights("--resnet18-weights", args.resnet18_weights), "cpu", weights_only=True)
        net.load_state_dict({**state, "fc.weight": net.fc.weight, "fc.bias": net.fc.bias})
        u8, u8_test = u8.expand(-1, 3, -1, -1), u8_test.expand(-1, 3, -1, -1)
    net.to(device)
    n = len(u8) // (6 if d.dataset == "fashion-mnist" else 10)
    held_out, train = torch.randperm(len(u8)).to(device).split([n, len(u8) - n])
    per_epoch = max(1, len(train) // 64)
    epochs = args.epochs or max(recipe["epochs"], math.ceil(recipe["updates"] / per_epoch))
    updates = epochs * per_epoch
    optimizer, best = torch.optim.Adam(net.parameters(), recipe["lr"]), -1
    for u in tqdm(range(updates), desc=f"labeller of {d.title}", disable=None, leave=False):
        epoch, b = divmod(u, per_epoch)
        if b == 0:
            reseed(seed, "labeller", epoch)
            batches = train[torch.randperm(len(train)).to(device)].split(64)
            net.train()
        if recipe["decay"]:
            optimizer.param_groups[0]["lr"] = recipe["lr"] * (1 - u / updates)
        loss = F.cross_entropy(net(augment(data.normalize(u8[batches[b]]), recipe["warp"])), y[batches[b]])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if b == per_epoch - 1 and (right := accuracy(net.eval(), u8[held_out], y[held_out])) > best:
            best, state = right, {name: value.cpu().clone() for name, value in net.state_dict().items()}
    net.load_state_dict(state)
    right = accuracy(net, u8_test, y_test)
    if right < recipe["least"]:
        raise InputError(f"this labeller has {right:.4f} test accuracy, KLD and frd need {recipe['least']:.4g}: it is "
                         f"not kept, give --epochs {4 * epochs}")
    run.save(d.path, {"model": state, "network": d.network, "images": d.title, "digest": d.digest, "seed": seed,
                      "recipe": dict(recipe, epochs=epochs), "test_accuracy": right})
    print(f"{d.path}: {right:.4f} test accuracy, {time.perf_counter() - begun:.0f} s on {device}", flush=True)


def load_labeller(d, args, device):
    """Two functions, images (B, C, H, W), uint8 or floats in [-1, 1], -> features (B, D) and features -> logits, and
    what they are. The labeller is trained now if there is none.
    """
    if not d.path.exists() and not args.labeller_path:
        print(f"training the labeller {d.path}: minutes on a GPU, below 32x32 also on a CPU", flush=True)
        train_labeller(d, args, 42, device)
    state = run.load(d.path)
    if not isinstance(state, dict) or state.get("digest") != d.digest:
        raise InputError(f"{d.path} is no labeller of these images: leave --labeller-path out, or remove this file")
    net = resnet18(**state["network"])
    net.load_state_dict(state["model"])
    net.eval().requires_grad_(False).to(device)
    head, net.fc = net.fc, nn.Identity()

    @torch.inference_mode()
    def extract(x):  # generated images are not quantised here, as in the released code
        x = x.to(device)
        return net((data.normalize(x) if x.dtype == torch.uint8 else x).expand(-1, net.conv1.in_channels, -1, -1))
    kind = "imagenet" if state["network"]["imagenet"] else "scratch"
    return extract, head, dict(network=f"resnet18-{kind}", features=head.in_features, sha256=sha256(d.path),
                               digest=d.digest, test_accuracy=state["test_accuracy"])


# ------------------------------------------------------------------------------------------ images from people

def read_images(path):
    """The images (N, C, H, W) uint8 of a folder or file, or the arrays of saved statistics, {name: array}."""
    if Path(path).is_dir():
        files = [file for file in data.visible(Path(path)) if file.suffix.lower() in PICTURES]
        if not files:
            raise InputError(f"{path} holds no pictures, and its sub-folders are not searched")
        pictures = [np.asarray(data.read_picture(file).convert("RGB")) for file in files]
        for file, picture in zip(files, pictures):
            if picture.shape != pictures[0].shape:
                raise InputError(f"{file} is {picture.shape}, others {pictures[0].shape}: give all one size")
        return np.stack(pictures).transpose(0, 3, 1, 2)
    try:
        file = np.load(path)  # refuses pickled objects
        arrays = {"images": file} if isinstance(file, np.ndarray) else {name: np.asarray(file[name]) for name in file}
    except (OSError, ValueError, EOFError, KeyError, SyntaxError, zipfile.BadZipFile, zlib.error) as error:
        raise InputError(f"{path} is no folder of pictures, nor a whole .npy or .npz of numbers ({str(error):.80})"
                         ) from error
    if "mu" in arrays:
        return arrays
    names = [name for name in ("images", "arr_0") if name in arrays] or list(arrays)
    x = arrays[names[0]] if len(names) == 1 else np.zeros(0)
    x = x[..., None] if x.ndim == 3 else x
    axes = [axis for axis in (1, 3) if x.ndim == 4 and x.shape[axis] in (1, 3)]  # that can be the channels
    if x.dtype != np.uint8 or len(axes) != 1 or 0 in x.shape:
        held = ", ".join(f"{name}: {array.dtype} {array.shape}" for name, array in arrays.items()) or "nothing"
        raise InputError(f"{path} holds {held:.200}: give one array, or call one images, uint8 (N, H, W), (N, H, W, C) "
                         "or (N, C, H, W) with 1 or 3 channels")
    return np.moveaxis(x, axes[0], 1)


def statistics(source, extract, about, args, size=None, n=None):
    """Moments of the features, and [H, W], of images, at most the first n, or of saved statistics.

    A dataset's images are brought to `size` and shuffled before.
    """
    name, _, split = source.partition(":")
    if name in data.DATASETS:
        if split not in ("", "train", "test") or (size and size[0] != size[1]):
            raise InputError(f"{source}: say {name}:train or {name}:test, and compare square images with it")
        data.dataset_name(name)  # says so where there is a folder of that name too
        side = size[0] if size else data.info(name, args.data_dir).size
        images, _ = data.load_images(name, split or "test", args.data_dir, side)
        reseed(args.seed or 0, "floor")
        images = images[torch.randperm(len(images))]
    else:
        images = read_images(source)
        if isinstance(images, dict):
            if str(images.get("protocol")) != json.dumps(about):
                raise InputError(f"{source} has another protocol ({images.get('protocol')}): give the images instead")
            return Moments(int(images["n"]), images["mu"], images["sigma"]), images["size"].tolist()
        images = torch.from_numpy(images)
    return moments(features_of(images[:n], extract, args.batch_size)), list(images.shape[2:])


def compare(args, device):
    """Print FID of IMAGES against --reference as a JSON record; keep the statistics of IMAGES if asked to."""
    if args.save_stats:
        run.check_writable(args.save_stats)
    extract, about = load_inception(args, device)
    fake, size = statistics(args.images, extract, about, args, n=args.n)
    if args.n not in (None, fake.n):
        raise InputError(f"{args.images} has {fake.n} images, not {args.n}: give another --n")
    if args.save_stats:
        run.replace(args.save_stats, lambda file: np.savez(
            file, **fake._asdict(), size=size, protocol=json.dumps(about)))
    if not args.reference:
        return
    true, size_r = statistics(args.reference, extract, about, args, size)
    if size != size_r:
        raise InputError(f"{args.images} has images of {size}, {args.reference} of {size_r}: give both one size")
    name, _, split = args.reference.partition(":")
    floor = None  # of as many real images from the dataset's other split
    if name in data.DATASETS:
        other = f"{name}:{'test' if split == 'train' else 'train'}"
        floor, _ = statistics(other, extract, about, args, size, n=fake.n)
    warn_if_few(n := min(fake.n, true.n))
    print(json.dumps(dict(
        fid=frechet(fake, true), fid_floor=floor and frechet(floor, true), n=fake.n, n_real=true.n,
        n_floor=floor and floor.n, rank_deficient=n < 2048, images=args.images, reference=args.reference,
        image_size=size, protocol=about, device=str(device), versions=VERSIONS), indent=1, allow_nan=False))


def warn_if_few(n):
    if n < 2048:
        print(f"warning: {n} images are fewer than FID's 2048 features: compare FID with its floor alone",
              file=sys.stderr)


# ------------------------------------------------------------------------------------------------------ a run

def read_run(folder, args):
    """What its evaluation needs of a run's config.json and of the arguments, and the records of eval.json."""
    if not (folder / "config.json").exists():
        raise InputError(f"{folder} is no run folder; to evaluate images, give --reference")
    keys = "dataset class_names class_tasks scale image_size unet schedule seed sample_steps data_dir".split()
    c, path = SimpleNamespace(**{"clip": True, **run.read_config(folder, keys)}), folder / "eval.json"
    try:
        records = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else []
        [(r["task"], r["protocol"]["checkpoint"]) for r in records]  # each record has them
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(f"{path} is damaged ({error}): remove it") from error
    if c.unet not in NETS:
        raise InputError(f"{folder} is of the net {c.unet}, which unet.py does not have: add it to its NETS")
    c.steps, c.seed = args.steps or c.sample_steps, c.seed if args.seed is None else args.seed
    c.n, c.data_dir = args.n or (10000 if c.scale == "paper" else 2000), args.data_dir or c.data_dir
    return c, records


def generate(model, c, abar, args, name):
    """c.n images of a model, floats (n, C, side, side) in [-1, 1], on the CPU."""
    x_T = []
    for i in range(c.n):
        reseed(c.seed, "eval", i)  # a stream for each image: neither batch size nor device changes it
        x_T.append(torch.randn(model.in_channels, c.image_size, c.image_size))
    batches = tqdm(torch.stack(x_T).split(args.batch_size), desc=name, disable=None, leave=False)
    return torch.cat([sample(model, x.to(abar.device), abar, c.steps, clip=c.clip).clamp(-1, 1).cpu() for x in batches])


@torch.no_grad()
def denoising_errors(model, u8, abar, seed):
    """The mean over images u8 (N, C, H, W) and pixels of |eps - model(x_t, t)|^2 for t in 0 .. 99, ..., 900 .. 999.

    In each of these ten bins every image has one t and one eps, the same for every model.
    """
    errors = []
    for low in range(0, T, 100):
        reseed(seed, "denoise", low)
        t, eps = torch.randint(low, low + 100, (len(u8),)).to(abar.device), torch.randn(u8.shape).to(abar.device)
        x_t = q_sample(data.normalize(u8.to(abar.device)), t, eps, abar)
        with eval_mode(model):
            pred = torch.cat([model(*batch) for batch in zip(x_t.split(100), t.split(100))])
        errors.append(F.mse_loss(pred, eps).item())
    return errors


def evaluate(fake, real, floor, y, tasks, networks, head, batch_size):
    """The metrics of images `fake`, and distances of images `floor`, against `real`, whose classes are y.

    `tasks` are the classes of each task seen. To the frd of a task belong the generated images that the labeller gives
    its classes. It is None where these are fewer than two.
    """
    record = dict(fid=None, fid_floor=None, rank_deficient=min(len(fake), len(real)) < 2048)
    for metric, extract in networks.items():
        x, x_r, x_f = (features_of(images, extract, batch_size) for images in (fake, real, floor))
        record[metric], record[f"{metric}_floor"] = (frechet(moments(v), moments(x_r)) for v in (x, x_f))
        if metric == "frd":
            weight, bias = (v.cpu().double().numpy() for v in (head.weight, head.bias))
            logits, logits_r = (v @ weight.T + bias for v in (x, x_r))
            parts = [(x[np.isin(logits.argmax(1), task)], x_r[np.isin(y, task)]) for task in tasks]
    q, q_r, p = (np.bincount(v, minlength=head.out_features) for v in (logits.argmax(1), logits_r.argmax(1), y))
    by_task = [frechet(moments(a), moments(b)) if min(len(a), len(b)) > 1 else None for a, b in parts]
    old = sum(tasks[:-1], [])
    return dict(record, frd_by_task=by_task, kld=kld(p, q), kld_reverse=kld(q, p), kld_real=kld(p, q_r),
                counts=q.tolist(), ard=float(abs(p / p.sum() - q / q.sum()).sum() / 2),
                share_old=float(q[old].sum() / q.sum()) if old else None,
                confidence=float(scipy.special.softmax(logits, 1).max(1).mean()))


def evaluate_run(folder, args, device):
    """Evaluate every task<k>.pt of a run folder into its eval.json, a list of records, written after each task.

    A task is skipped if it has a record of the same protocol, or of this one with FID.
    """
    path, (c, records) = folder / "eval.json", read_run(folder, args)
    tasks = [k for k in range(1, len(c.class_tasks) + 1) if (folder / f"task{k}.pt").exists()]
    if not tasks:
        raise InputError(f"{folder} holds no task1.pt yet: train the run first")
    run.check_writable(path)
    d = load_data(c.dataset, c.data_dir, c.image_size, args)
    if d.info.classes != c.class_names:
        raise InputError(f"{c.dataset} has other classes than the run, {', '.join(d.info.classes)}: give its data")
    if any(len(data.indices(y, c.class_tasks)[0]) < 2 for y in (d.y, d.y_test)):
        raise InputError(f"{c.dataset} has less than 2 training or test images of task 1: a covariance takes 2")
    labeller, head, frd_about = load_labeller(d, args, device)
    networks, fid_about, asked = {"frd": labeller}, None, args.fid or args.inception_weights
    if asked or c.scale == "paper":
        try:
            networks["fid"], fid_about = load_inception(args, device)
            warn_if_few(c.n)
        except InputError as error:
            if asked:
                raise
            print(f"without FID: {error}", flush=True)
    model = UNet(**NETS[c.unet]).to(device)
    reference_digest, abar = data.digest(d.u8_test, d.y_test), alpha_bar(c.schedule).to(device)
    of_task1 = d.u8_test[data.indices(d.y_test, c.class_tasks)[0][:500]]
    for k in tasks:
        begun, file = time.perf_counter(), folder / f"task{k}.pt"
        seen = sorted(sum(c.class_tasks[:k], []))
        real, pool = (data.indices(y, [seen])[0] for y in (d.y_test, d.y))
        reseed(c.seed, "floor", k)
        pool = pool[torch.randperm(len(pool))[:c.n]]
        protocol = dict(
            n=c.n, n_real=len(real), n_floor=len(pool), seed=c.seed, steps=c.steps, schedule=c.schedule,
            image_size=c.image_size, clip=c.clip, reference=f"{d.info.name}, test images of classes {seen}",
            reference_digest=reference_digest, checkpoint=sha256(file), frd=frd_about, fid=fid_about)
        if any(r["task"] == k and protocol in (r["protocol"], {**r["protocol"], "fid": None}) for r in records):
            print(f"task {k}: evaluated before")
            continue
        run.load_weights(model, file)
        fake = generate(model, c, abar, args, str(file))
        record = evaluate(
            fake, d.u8_test[real], d.u8[pool], d.y_test[real], c.class_tasks[:k], networks, head, args.batch_size)
        record.update(task=k, denoise=denoising_errors(model, of_task1, abar, c.seed), protocol=protocol,
                      device=str(device), versions=VERSIONS, seconds=round(time.perf_counter() - begun, 1))
        # Dropped are the same without FID, and records of a model that is no longer there.
        records = [r for r in records if r["task"] != k or r["protocol"] != {**protocol, "fid": None}
                   and r["protocol"]["checkpoint"] == protocol["checkpoint"]]
        records = sorted([*records, record], key=lambda r: r["task"])
        run.write_json(path, records)
        said = (f"{key} {record[key]:.3f}" for key in ("frd", "fid", "kld", "share_old") if record[key] is not None)
        print(f"task {k}:", ", ".join(said), flush=True)
    print(f"{path} has {len(tasks)} of {len(c.class_tasks)} tasks; next: python report.py runs")


def main(argv=None):
    args = get_args(argv)
    device = run.pick_device(args.device)
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False  # cudnn's is on by default
    if not (args.train_resnet18 or args.reference or args.save_stats):
        return evaluate_run(Path(args.images), args, device)
    args.data_dir = args.data_dir or "data"
    if not args.train_resnet18:
        return compare(args, device)
    side = 64 if data.info(args.train_resnet18, args.data_dir).like == "imagenet100" else 32
    d = load_data(args.train_resnet18, args.data_dir, args.image_size or (side if args.scale == "paper" else 16), args)
    train_labeller(d, args, 42 if args.seed is None else args.seed, device)


if __name__ == "__main__":
    run.main(main)
