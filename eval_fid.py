"""How good a model's images are, and how much of the old classes is left in them: FID, frd and KLD.

    fid, frd     |m - m_r|^2 + tr(S + S_r - 2 (S S_r)^(1/2))         Heusel et al., arXiv 1706.08500v6, Equation 6
    kld          sum_c (p_c + 1e-8) ln((p_c + 1e-8) / (q_c + 1e-8))  Masip et al., arXiv 2311.14028, 4.2.2 and A.5
    kld_reverse  the same with p and q exchanged
    ard          1/2 sum_c |p_c - q_c|

m and S are mean and covariance of the features of generated images. m_r and S_r are those of real images: the test
images of all classes seen so far. FID's features are the 2048 of the Inception network of 2015-12-05. Those of frd are
the last ones of the labeller, a ResNet18 that is trained here on the dataset itself: 512 of them, 128 below 32x32.

p are the frequencies of the classes in these test images. q are those that the labeller sees in the generated images,
out of all classes of the dataset. One lost class of ten makes a kld of 1.5170, eight make 12.5726, mostly -ln(1e-8).
Sampling alone makes about (classes - 1) / 2n. fid_floor and frd_floor are the distances of as many training images,
kld_real is the kld of the test images.

Of a run besides: frd_by_task, and `denoise`, where in the noise it forgets, |eps - model(x_t, t)|^2 on test images of
task 1 by t.

    python eval_fid.py runs/fashion-mnist/gd-2/seed42                     every task of a run, into its eval.json
    python eval_fid.py IMAGES --reference fashion-mnist                   FID of anybody's images
    python eval_fid.py --train-resnet18 fashion-mnist                     the labeller: minutes on a GPU
    python eval_fid.py --train-resnet18 fashion-mnist --scale laptop      the one for 16x16: a minute on one core

IMAGES is a folder of 8-bit pictures (without its sub-folders), a .npy or .npz of uint8 (N, H, W), (N, H, W, C) or
(N, C, H, W) with 1 or 3 channels, or statistics kept with --save-stats. So is the reference, or it is a dataset:
fashion-mnist (its test images) or fashion-mnist:train. Grey becomes RGB by repetition.
"""

import functools
import hashlib
import http.client
import json
import math
import shlex
import socket
import sys
import time
import zipfile
import zlib
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

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

WEIGHTS = {  # option: SHA-256 and where to get it; the two files of Inception are the same bytes
    "--inception-weights": ("6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2", [
        "https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/pt_inception-2015-12-05-6726825d.pth",
        "https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/weights-inception-2015-12-05-6726825d.pth"]),
    "--resnet18-weights": ("f37072fd47e89c5e827621c5baffa7500819f7896bbacec160b1a16c560e07ec", [
        "https://download.pytorch.org/models/resnet18-f37072fd.pth"]),
}
SILENCE = 15.0  # seconds after which a server that says nothing is given up
# How a labeller is trained: as in the paper's A.1.3 or, below 32x32, on a laptop. A small dataset gets more epochs, for
# at least so many updates. `least` is the test accuracy that a dataset's labeller needs.
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
    add("--train-resnet18", type=data.dataset, metavar="DATASET|FOLDER", help="train the labeller of this dataset")
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

class Moments(NamedTuple):
    """Mean mu (D,) and covariance sigma (D, D) of n feature vectors, float64."""
    n: int
    mu: np.ndarray
    sigma: np.ndarray


def moments(features):
    """The Moments of features (n, D); the covariance is unbiased, as in every FID."""
    return Moments(len(features), features.mean(0), np.cov(features, rowvar=False).reshape(2 * features.shape[1:]))


def features_of(batches, extract):
    """extract(x) of all batches of images, (n, D) float64: 16 kB an image for FID."""
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


def weights(option, path=None):
    """A weights file with the known SHA-256: `path`, else the one in torch.hub's cache, else downloaded into it."""
    expected, urls = WEIGHTS[option]
    cached = [Path(torch.hub.get_dir(), "checkpoints", url.rpartition("/")[2]) for url in urls]
    where = Path(path) if path else next((file for file in cached if file.exists()), cached[0])
    how = f"put {' or '.join(urls)}, SHA-256 {expected}, at {cached[0]} or give its place with {option}"
    failures = []
    socket.setdefaulttimeout(SILENCE)  # torch.hub sets none
    for url in [] if path or where.exists() else urls:
        try:
            where.parent.mkdir(parents=True, exist_ok=True)
            torch.hub.download_url_to_file(url, where, expected, progress=sys.stderr.isatty())
            break
        except (OSError, RuntimeError, http.client.HTTPException) as error:  # RuntimeError: another SHA-256
            failures.append(f"{url}: {error}")
    try:
        found = sha256(where)
    except OSError as error:
        raise InputError(f"cannot read or download {where} ({'; '.join(failures) or error.strerror}): {how}") from error
    if found != expected:
        raise InputError(f"{where} is damaged or another file (its SHA-256 is {found}): remove it, and {how}")
    return where


class PoolingBranch:
    """Mixed into Inception's blocks: unlike torchvision's, their last branch pools by a mean without the padding, in
    the very last block by a maximum.
    """
    last = False

    def _forward(self, x):
        pool = F.max_pool2d(x, 3, 1, 1) if self.last else F.avg_pool2d(x, 3, 1, 1, count_include_pad=False)
        return super()._forward(x)[:-1] + [self.branch_pool(pool)]


def inception_network():
    """FID's network, 23,850,960 parameters, still without its weights; (B, 3, 299, 299) in [-1, 1] -> (B, 1008)."""
    a, c, e = (type(block.__name__, (PoolingBranch, block), {})
               for block in (inception.InceptionA, inception.InceptionC, inception.InceptionE))
    net = inception.Inception3(
        num_classes=1008, aux_logits=False, transform_input=False, init_weights=False, inception_blocks=[
            inception.BasicConv2d, a, inception.InceptionB, c, inception.InceptionD, e, inception.InceptionAux])
    net.Mixed_7c.last = True
    return net.eval().requires_grad_(False)


def resize(x, protocol):
    """The input of FID's network, (B, 3, 299, 299) in about [-1, 1], from x (B, 3, H, W) in [0, 255].

    "pytorch-fid" samples pixel i at (i + 1/2) side / 299 - 1/2 and scales to 2 x / 255 - 1. "tf1", that of 2015,
    samples at i side / 299 and scales to (x - 128) / 128: this grid is that of align_corners with one more pixel.
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
        # the 256 levels by one. Here they keep the levels of their files, and only generated images are truncated.
        x = (x if x.dtype == torch.uint8 else data.quantize(x)).to(device).float().expand(-1, 3, -1, -1)
        return net(resize(x, protocol))
    return extract


def load_inception(args, device):
    """FID's function from images to features, and what it is."""
    option, net = "--inception-weights", inception_network()
    net.load_state_dict(torch.load(weights(option, args.inception_weights), "cpu", weights_only=True))
    return fid_features(net, args.protocol, device), dict(
        network="inception-2015-12-05", features=2048, sha256=WEIGHTS[option][0], name=args.protocol)


# ----------------------------------------------------------------------------------------------- the labeller

def load_data(dataset, data_dir, side, args):
    """A dataset at one side, and of its labeller the file, the network, the recipe and the command that trains it."""
    imagenet, recipe = args.labeller == "imagenet", WIDE if side >= 32 else NARROW
    if imagenet and side < 32:
        raise InputError("--labeller imagenet is for 32x32 and more: its stem leaves one pixel of 16x16")
    info = data.info(dataset, data_dir)
    (u8, y), (u8_test, y_test) = (data.load_images(dataset, split, data_dir, side) for split in ("train", "test"))
    if len(u8) < 10:
        raise InputError(f"{dataset} has {len(u8)} training images: a labeller takes at least 10")
    digest = data.digest(u8, y)  # a labeller never judges images of another digest than it was trained on
    path = Path("runs", "labellers", f"{side}x{side}{'-imagenet' * imagenet}-{digest[:8]}.pt")
    command = ["python", "eval_fid.py", "--train-resnet18", dataset, "--image-size", str(side)]
    command += ["--data-dir", data_dir] * (data_dir != "data") + ["--labeller", "imagenet"] * imagenet
    least = recipe["least"].get(dataset, (1 + 1 / len(info.classes)) / 2)  # half-way between chance and 1
    return SimpleNamespace(
        dataset=dataset, info=info, u8=u8, y=y, u8_test=u8_test, y_test=y_test, digest=digest,
        recipe=dict(recipe, least=least), path=Path(args.labeller_path or path),
        network=dict(channels=info.channels, classes=len(info.classes), width=recipe["width"], imagenet=imagenet),
        title=f"{info.title} at {side}x{side}", command=shlex.join(command))


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
                         f"not kept, try {d.command} --epochs {4 * epochs}")
    run.save(d.path, {"model": state, "network": d.network, "images": d.title, "digest": d.digest, "seed": seed,
                      "recipe": dict(recipe, epochs=epochs), "test_accuracy": right})
    print(f"{d.path}: {right:.4f} test accuracy, {time.perf_counter() - begun:.0f} s on {device}", flush=True)


def load_labeller(d, args, device):
    """Two functions, images (B, C, H, W), uint8 or floats in [-1, 1], -> features (B, D) and features -> logits, and
    what they are. The labeller is trained now if there is none.
    """
    if not d.path.exists():
        if args.labeller_path:
            raise InputError(f"there is no labeller {d.path}: train it with {d.command}")
        long = "about a minute" if d.recipe["width"] == NARROW["width"] else "minutes on a GPU, days on a CPU"
        print(f"{d.path} is not there yet: training this labeller, {long}", flush=True)
        train_labeller(d, args, 42, device)
    state = run.load(d.path)
    try:
        images, digest, right = state["images"], state["digest"], state["test_accuracy"]
        net = resnet18(**state["network"])
        net.load_state_dict(state["model"])
    except (KeyError, TypeError, AttributeError, RuntimeError) as error:
        raise InputError(f"{d.path} is not a labeller: train one with {d.command}") from error
    if digest != d.digest:
        raise InputError(f"{d.path} was trained on other images ({images}): leave --labeller-path out, or train "
                         f"another with {d.command}")
    net.eval().requires_grad_(False).to(device)
    head, net.fc = net.fc, nn.Identity()

    @torch.inference_mode()
    def extract(x):  # generated images are not quantised here, as in the released code
        x = x.to(device)
        return net((data.normalize(x) if x.dtype == torch.uint8 else x).expand(-1, net.conv1.in_channels, -1, -1))
    kind = "imagenet" if state["network"]["imagenet"] else "scratch"
    about = dict(network=f"resnet18-{kind}", features=head.in_features, sha256=sha256(d.path), digest=digest)
    return extract, head, dict(about, test_accuracy=right)


# ------------------------------------------------------------------------------------------ images from people

def read_pictures(files, size):
    """uint8 (B, 3, H, W) of picture files, which must all have this size (W, H)."""
    pictures = [data.read_picture(file).convert("RGB") for file in files]
    for file, picture in zip(files, pictures):
        if picture.size != size:
            raise InputError(f"{file} is {picture.size}, others {size}: give all one size")
    return np.stack(pictures).transpose(0, 3, 1, 2)


def read_arrays(path):
    """The arrays of a .npz, or {"images": the array} of a .npy, which stays on the disk."""
    try:
        file = np.load(path, mmap_mode="r")  # refuses pickled objects
        if isinstance(file, np.ndarray):
            return {"images": file}
        with file:
            if all(f"{name}.npy" in file.zip.namelist() for name in file.files):  # nothing but arrays
                return dict(file)
    except OSError as error:
        raise InputError(f"cannot read {path} ({error.strerror or error})") from error
    except (ValueError, EOFError, KeyError, SyntaxError, zipfile.BadZipFile, zlib.error):
        pass
    raise InputError(f"{path} is not a whole .npy or .npz of numbers, nor a folder: unpack pictures into a folder, or "
                     "save the images with numpy.save, as uint8")


def pick_images(path, arrays):
    """The images (N, C, H, W) among arrays by name."""
    names = [name for name in ("images", "arr_0") if name in arrays] or list(arrays)
    if len(names) != 1:
        raise InputError(f"{path} holds {len(arrays)} arrays ({', '.join(arrays)}): keep one, or call one images")
    x = arrays[names[0]]
    last, first = (x.ndim == 4 and x.shape[axis] in (1, 3) for axis in (3, 1))
    if x.dtype != np.uint8 or (x.ndim != 3 and last == first) or 0 in x.shape:
        raise InputError(f"{path} holds {x.dtype} of shape {x.shape}: give uint8 (N, H, W), (N, H, W, C) or "
                         "(N, C, H, W), C = 1 or 3, so that one axis alone can be the channels")
    return x[:, None] if x.ndim == 3 else x.transpose(0, 3, 1, 2) if last else x


def statistics(source, extract, about, args, size=None, n=None):
    """Moments of the features, and [H, W], of images, at most the first n, or of saved statistics.

    Of a dataset it is n images drawn at random, brought to `size`.
    """
    (name, _, split), read = source.partition(":"), np.array
    if name in data.DATASETS:
        if split not in ("", "train", "test") or (size and size[0] != size[1]):
            raise InputError(f"{source}: say {name}:train or {name}:test, and compare square images with it")
        data.dataset(name)  # says so where there is a folder of that name too
        data_dir = args.data_dir or "data"
        side = size[0] if size else data.info(name, data_dir).size
        images, _ = data.load_images(name, split or "test", data_dir, side)
        reseed(args.seed or 0, "floor")
        images = images[torch.randperm(len(images))].numpy()
    elif Path(source).is_dir():
        images = [file for file in data.visible(Path(source)) if file.suffix.lower() in PICTURES]
        if not images:
            raise InputError(f"{source} holds no pictures ({' '.join(PICTURES)}; its sub-folders are not searched)")
        read = functools.partial(read_pictures, size=data.read_picture(images[0]).size)
    else:
        arrays = read_arrays(source)
        if "mu" in arrays:
            if str(arrays.get("protocol")) != json.dumps(about):
                raise InputError(f"{source} has another protocol ({arrays.get('protocol')}): give the images instead")
            return Moments(int(arrays["n"]), arrays["mu"], arrays["sigma"]), arrays["size"].tolist()
        images = pick_images(source, arrays)
    images = images[:n]
    if len(images) < 2:
        raise InputError(f"{source} holds one image: a covariance takes two")
    starts = tqdm(range(0, len(images), args.batch_size), desc=source, disable=None, leave=False)
    features = features_of((torch.from_numpy(read(images[i:i + args.batch_size])) for i in starts), extract)
    return moments(features), list(read(images[:1]).shape[2:])


def compare(args, device):
    """Print FID of IMAGES against --reference as a JSON record; keep the statistics of IMAGES if asked to."""
    if args.save_stats:
        run.check_writable(args.save_stats)
    extract, about = load_inception(args, device)
    fake, size = statistics(args.images, extract, about, args, n=args.n)
    if args.n not in (None, fake.n):
        raise InputError(f"{args.images} has {fake.n} images, not {args.n}: give another --n")
    if args.save_stats:
        arrays = dict(n=fake.n, mu=fake.mu, sigma=fake.sigma, size=size, protocol=json.dumps(about))
        run.replace(args.save_stats, lambda file: np.savez(file, **arrays))
    if not args.reference:
        return
    true, size_r = statistics(args.reference, extract, about, args, size)
    if size != size_r:
        raise InputError(f"{args.images} has images of {size}, {args.reference} of {size_r}: give both one size")
    warn_if_few(n := min(fake.n, true.n))
    record = dict(fid=frechet(fake, true), fid_floor=None, n=fake.n, n_real=true.n, n_floor=None,
                  rank_deficient=n < 2048, images=args.images, reference=args.reference, image_size=size,
                  protocol=about, device=str(device), versions=VERSIONS)
    name, _, split = args.reference.partition(":")
    if name in data.DATASETS:  # as many real images from the dataset's other split
        other = f"{name}:{'test' if split == 'train' else 'train'}"
        floor, _ = statistics(other, extract, about, args, size, n=fake.n)
        record.update(fid_floor=frechet(floor, true), n_floor=floor.n)
    print(json.dumps(record, indent=1, allow_nan=False))


def warn_if_few(n):
    if n < 2048:
        print(f"warning: {n} images are fewer than FID's 2048 features, so that FID is too large: compare it with its "
              "floor alone", file=sys.stderr)


# ------------------------------------------------------------------------------------------------------ a run

def read_run(folder, args):
    """What its evaluation needs of a run's config.json and of the arguments, and the records of eval.json."""
    if not (folder / "config.json").exists():
        raise InputError(f"{folder} is no run folder: give one, or say with --reference what these images are to be "
                         "compared with")
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


def load_fid(scale, args, device):
    """FID's function from images to features, what it is, and None; or None, None, and why there is none."""
    asked = args.fid or args.inception_weights
    if scale != "paper" and not asked:
        return None, None, f"left out of a {scale} run, 0.4 s an image on a CPU core; --fid measures it"
    try:
        return *load_inception(args, device), None
    except InputError as error:
        if asked:
            raise
        return None, None, str(error)


def generate(model, c, abar, args, name):
    """c.n images of a model, floats (n, C, side, side) in [-1, 1], on the CPU."""
    x_T = torch.empty(c.n, model.in_channels, c.image_size, c.image_size)
    for i in range(c.n):
        reseed(c.seed, "eval", i)  # a stream for each image: neither batch size nor device changes it
        x_T[i] = torch.randn(x_T.shape[1:])
    batches = tqdm(x_T.split(args.batch_size), desc=name, disable=None, leave=False)
    return torch.cat([sample(model, x.to(abar.device), abar, c.steps, clip=c.clip).clamp(-1, 1).cpu() for x in batches])


@torch.no_grad()
def denoising_errors(model, u8, abar, seed):
    """The mean over images u8 (N, C, H, W) and pixels of |eps - model(x_t, t)|^2 for t in 0 .. 99, ..., 900 .. 999.

    Ten floats. In each bin every image has one t and one eps, the same for every model.
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


def evaluate(fake, real, floor, y, tasks, networks, head, args):
    """The metrics of images `fake` against `real`, whose classes are y, and those of `floor` against `real`.

    `tasks` are the classes of each task seen. frd_by_task is the frd of each task's images alone, of the generated ones
    those to which the labeller gives its classes; None where these are fewer than two.
    """
    record = dict(fid=None, fid_floor=None, rank_deficient=min(len(fake), len(real)) < 2048)
    for metric, extract in networks.items():
        x, x_r, x_f = (features_of(images.split(args.batch_size), extract) for images in (fake, real, floor))
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

    A task that has a record of the same protocol is skipped; one with FID does where FID is not asked for.
    """
    path, (c, records) = folder / "eval.json", read_run(folder, args)
    tasks = [k for k in range(1, len(c.class_tasks) + 1) if (folder / f"task{k}.pt").exists()]
    if not tasks:
        raise InputError(f"{folder} holds no task1.pt yet: train the run first")
    run.check_writable(path)
    d = load_data(c.dataset, c.data_dir, c.image_size, args)
    if d.info.classes != c.class_names:
        raise InputError(f"{c.dataset} has the classes {', '.join(d.info.classes)}, the run was trained on "
                         f"{', '.join(c.class_names)}: give it the same data")
    first = torch.tensor(sum(c.class_tasks[:tasks[0]], []))
    fewest = min(int(torch.isin(y, first).sum()) for y in (d.y, d.y_test))
    if fewest < 2:
        raise InputError(f"{c.dataset} has {fewest} test or training images of the classes seen after task {tasks[0]}: "
                         "a covariance takes two")
    labeller, head, frd_about = load_labeller(d, args, device)
    fid, fid_about, missing = load_fid(c.scale, args, device)
    networks, model = {"frd": labeller}, UNet(**NETS[c.unet]).to(device)
    if fid:
        networks["fid"] = fid
        warn_if_few(c.n)
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
        if any(r["task"] == k and protocol in (r["protocol"], {**r["protocol"], "fid": None}) and "denoise" in r
               for r in records):
            print(f"task {k}: evaluated before")
            continue
        run.load_weights(model, file)
        fake = generate(model, c, abar, args, str(file))
        record = evaluate(
            fake, d.u8_test[real], d.u8[pool], d.y_test[real], c.class_tasks[:k], networks, head, args)
        record.update(task=k, denoise=denoising_errors(model, of_task1, abar, c.seed), fid_missing=missing,
                      protocol=protocol, device=str(device), versions=VERSIONS,
                      seconds=round(time.perf_counter() - begun, 1))
        # Dropped is the same without FID, and what is of a model that is no longer there.
        records = [r for r in records if r["task"] != k or r["protocol"] != {**protocol, "fid": None}
                   and r["protocol"]["checkpoint"] == protocol["checkpoint"]]
        records = sorted([*records, record], key=lambda r: r["task"])
        run.write_json(path, records)
        said = (f"{key} {record[key]:.3f}" for key in ("frd", "fid", "kld", "share_old") if record[key] is not None)
        print(f"task {k}:", ", ".join(said), flush=True)
    print(f"{path} has {len(tasks)} of {len(c.class_tasks)} tasks; next: python report.py runs"
          + f"\nfid is null: {missing}" * bool(missing))


def main(argv=None):
    args = get_args(argv)
    device = run.pick_device(args.device)
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False  # cudnn's is on by default
    if args.train_resnet18:
        data_dir = args.data_dir or "data"
        side = 64 if data.info(args.train_resnet18, data_dir).like == "imagenet100" else 32
        d = load_data(args.train_resnet18, data_dir, args.image_size or (side if args.scale == "paper" else 16), args)
        train_labeller(d, args, 42 if args.seed is None else args.seed, device)
    elif args.reference or args.save_stats:
        compare(args, device)
    else:
        evaluate_run(Path(args.images), args, device)


if __name__ == "__main__":
    run.main(main)
