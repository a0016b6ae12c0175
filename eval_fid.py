"""How good a model's images are and how much of the old classes is left in them: FID, frd and KLD.

    fid, frd     |m - m_r|^2 + tr(S + S_r - 2 (S S_r)^(1/2))         Heusel et al., arXiv 1706.08500v6, Equation 6
    kld          sum_c (p_c + 1e-8) ln((p_c + 1e-8) / (q_c + 1e-8))  Masip et al., arXiv 2311.14028, 4.2.2 and A.5
    kld_reverse  the same with p and q exchanged
    ard          1/2 sum_c |p_c - q_c|

m, S are mean and covariance of generated images' features, m_r, S_r of real ones': the test images of all classes
seen so far. For fid the features are the 2048 of the Inception network of 2015-12-05; for frd the last ones of the
labeller, a ResNet18 trained here on the dataset itself (512; 128 at laptop scale). The two are different metrics and
never compare. p are the classes' true frequencies in the same test images, q those that the labeller sees in the
generated ones, out of all classes of the dataset: what it takes for a class not yet seen shows only as mass lost
elsewhere. A bad model's kld is mostly -ln(1e-8): one class lost of ten costs 1.5170, eight 12.5726; sampling alone
makes about (classes - 1) / 2n. Both kinds have a floor beside them: `*_floor`, the distance of as many real training
images, and `kld_real`, what the labeller makes of the test images. Below 2048 images distances are biased upwards.

    python eval_fid.py runs/fashion-mnist/gd-2/seed42                     every task of a run, into its eval.json
    python eval_fid.py IMAGES --reference fashion-mnist                   FID of anybody's images
    python eval_fid.py --train-resnet18 fashion-mnist                     the labeller: minutes on a GPU
    python eval_fid.py --train-resnet18 fashion-mnist --scale laptop      a narrow one for 16x16: a minute on one core

IMAGES, and what it is compared with, is a folder of 8-bit pictures (not its sub-folders or hidden files), a .npy or
.npz of uint8 (N, H, W), (N, H, W, C) or (N, C, H, W) with 1 or 3 channels, or statistics kept with --save-stats;
--reference may also name a dataset, fashion-mnist (its test images) or fashion-mnist:train. Grey becomes RGB by
repetition.
"""

import argparse
import concurrent.futures
import hashlib
import http.client
import json
import math
import os
import platform
import struct
import sys
import time
import zipfile
import zlib
from pathlib import Path
from typing import NamedTuple

import numpy as np
import PIL
import scipy
import torch
import torch.nn.functional as F
import torchvision
from PIL import Image
from scipy.linalg import eigh
from torch import nn
from torchvision.models import inception, resnet
from tqdm import tqdm

import data
import run
from ddim import alpha_bar, sample, seed
from run import InputError
from unet import NETS, UNet

WEIGHTS = {  # option: SHA-256 and where to get it; the two files of Inception are the same bytes
    "--inception-weights": ("6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2", [
        "https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/pt_inception-2015-12-05-6726825d.pth",
        "https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/weights-inception-2015-12-05-6726825d.pth"]),
    "--resnet18-weights": ("f37072fd47e89c5e827621c5baffa7500819f7896bbacec160b1a16c560e07ec", [
        "https://download.pytorch.org/models/resnet18-f37072fd.pth"]),
}
PROTOCOLS = {
    "tf1": dict(resize="bilinear to 299, source = out * side / 299", range="(u8 - 128) / 128"),
    "pytorch-fid": dict(resize="bilinear to 299, source = (out + 0.5) * side / 299 - 0.5", range="2 (u8 / 255) - 1"),
}
RECIPES = {  # of the labeller: A.1.3, and for a laptop one epoch of falling learning rate
    "paper": dict(width=64, epochs=100, batch_size=64, lr=5e-4, decay=False, warp=True),
    "laptop": dict(width=16, epochs=1, batch_size=64, lr=2e-3, decay=True, warp=False),
}
MIN_ACCURACY = {("paper", "fashion-mnist"): 0.88, ("paper", "cifar100"): 0.5, ("paper", "imagenet100"): 0.5}  # or 0.8
PICTURES = (".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff", ".webp", ".pgm", ".ppm")


# -------------------------------------------------------------------------------------------------- arguments

def get_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("images", nargs="?", metavar="RUN|IMAGES", help="a run folder, or images to compare with --reference")
    add("--reference", metavar="IMAGES|DATASET", help="what the images are compared with; all of it is used")
    add("--save-stats", metavar="PATH.npz", help="keep mean and covariance of IMAGES, to be given in their place")
    add("--train-resnet18", choices=list(data.DATASETS), metavar="DATASET", help="train the labeller of this dataset")
    add("--scale", default="paper", choices=["paper", "laptop"], help="of --train-resnet18 (a run knows its own)")
    add("--epochs", type=run.positive(int), help="of --train-resnet18 (paper: 100; laptop 1)")
    add("--labeller", default="scratch", choices=["scratch", "imagenet"], help="3x3 stem, or as the released code")
    add("--labeller-path", metavar="PATH", help="the labeller's file (default: runs/labellers/<dataset>-<size>.pt)")
    add("--resnet18-weights", metavar="PATH", help="ImageNet weights, where they cannot be downloaded")
    add("--n", type=run.positive(int), help="images per task (10000; laptop 2000), or the first n of IMAGES")
    add("--steps", type=run.positive(int), help="DDIM steps (default: the run's; paper: 10, CIFAR-10 20)")
    add("--protocol", default="tf1", choices=list(PROTOCOLS), help="FID's resizing and input range (paper: tf1)")
    add("--inception-weights", metavar="PATH", help="FID's network, where it cannot be downloaded")
    add("--fid", action="store_true", help="FID of a laptop run too: about 0.4 s an image on a CPU core")
    add("--seed", type=int, help="of the noise, a stream an image (default: the run's), or of --train-resnet18 (42)")
    add("--batch-size", type=run.positive(int), default=128, help="images at a time; changes no number")
    add("--data-dir", help="where the dataset lies or is downloaded to (default: the run's, else data)")
    add("--device", default="auto", help="auto (CUDA if there is one), cpu, cuda or cuda:<i>")
    args = parser.parse_args(argv)
    if bool(args.images) == bool(args.train_resnet18):
        parser.error("give a run folder or images, or --train-resnet18 with a dataset")
    if args.train_resnet18 and args.scale == "laptop" and args.labeller == "imagenet":
        parser.error("--labeller imagenet is for --scale paper: its stem leaves one pixel of 16x16")
    if args.n == 1:
        parser.error("--n must be at least 2: one image has no covariance")
    return args


# ------------------------------------------------------------------------------------------------ the metrics

class Moments(NamedTuple):
    """Of n feature vectors the mean mu (D,) and the sum of outer products of deviations, scatter (D, D); float64."""
    n: int
    mu: np.ndarray
    scatter: np.ndarray

    @property
    def sigma(self):
        return self.scatter / (self.n - 1)  # unbiased, as in every FID


def moments(features):
    """The moments of one batch of features (B, D)."""
    x = features.double().cpu().numpy()
    assert np.isfinite(x).all(), "the network's features must be finite"
    return Moments(len(x), x.mean(0), (x - x.mean(0)).T @ (x - x.mean(0)))


def merge(a, b):
    """The moments of two sets together (Chan, Golub and LeVeque, 1979): no cancellation, however large the means."""
    if a is None:
        return b
    n, d = a.n + b.n, b.mu - a.mu
    return Moments(n, a.mu + d * (b.n / n), a.scatter + b.scatter + np.outer(d, d) * (a.n * b.n / n))


def frechet(a, b):
    """|m - m_r|^2 + tr(S + S_r - 2 (S S_r)^(1/2)) of two Moments, a float >= 0 (Heusel et al., Equation 6).

    With S = R R^T the last trace is the sum of the roots of the eigenvalues of R^T S_r R, a symmetric matrix.
    Eigenvalues that are rounding noise become 0: the root would make 3e-8 of each 1e-15, and where images are fewer
    than features there are many. So this is exact to 1e-12 where scipy's sqrtm is off by 1e-5.
    """
    def cut(w):
        return np.where(w > len(w) * np.finfo(np.float64).eps * w.max(), w, 0)

    w, v = eigh(a.sigma)
    root = v * np.sqrt(cut(w))
    product = root.T @ b.sigma @ root
    w = eigh((product + product.T) / 2, eigvals_only=True)
    traces = np.trace(a.sigma) + np.trace(b.sigma)
    d = np.sum((a.mu - b.mu) ** 2) + traces - 2 * np.sum(np.sqrt(cut(w)))
    assert d >= -1e-6 * traces, f"{d} is further below 0 than rounding takes it"
    return max(float(d), 0.0)


def kld(p, q):
    """KL(p || q) = sum_c (p_c + 1e-8) ln((p_c + 1e-8) / (q_c + 1e-8)), nats; p, q counts or frequencies (K,)."""
    p, q = (np.asarray(v, np.float64) / np.sum(v) + 1e-8 for v in (p, q))  # 1e-8 after normalising, as released
    return float(np.sum(p * np.log(p / q)))


# ---------------------------------------------------------------------------------------------- FID's network

def weights(option, path, sha256, urls):
    """A weights file whose SHA-256 was verified just now: `path`, else torch.hub's cache, else downloaded into it."""
    cached = [Path(torch.hub.get_dir(), "checkpoints", Path(url).name) for url in urls]
    where = Path(path) if path else next((file for file in cached if file.exists()), cached[0])
    how = f"put {' or '.join(urls)}, SHA-256 {sha256}, at {cached[0]} or give its place with {option}"
    if path or where.exists():
        try:
            found = hashlib.sha256(where.read_bytes()).hexdigest()
        except OSError as error:
            raise InputError(f"cannot read {where} ({error.strerror}): {how}") from error
        if found != sha256:
            raise InputError(f"{where} is damaged or another file (its SHA-256 is {found}): delete it, and {how}")
        return where
    part, failures = where.with_name(f"{where.name}.{os.getpid()}.part"), []
    for url in urls:
        try:
            where.parent.mkdir(parents=True, exist_ok=True)
            with data.contact(url, 12 / len(urls)) as answer, open(part, "wb") as file:
                size = int(answer.headers.get("Content-Length", 0)) or None
                with tqdm(desc=where.name, total=size, unit="B", unit_scale=True, disable=None) as bar:
                    while chunk := answer.read(1 << 16):
                        bar.update(file.write(chunk))
            if hashlib.sha256(part.read_bytes()).hexdigest() == sha256:
                os.replace(part, where)
                return where
            failures.append("it sent something else")
        except (OSError, http.client.HTTPException, concurrent.futures.TimeoutError) as error:
            failures.append(str(error) or "no answer")
        finally:
            if part.exists():
                part.unlink()
    raise InputError(f"{where.name} is neither at hand nor to be downloaded ({'; '.join(failures)}): {how}")


class PoolingBranch:
    """Mixed into Inception's blocks: their last branch pools as the network of 2015 does, and torchvision's does not.

    The mean leaves out the padding, and in the very last block it is a maximum.
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


def resize_matrix(side, protocol):
    """W (299, side): W X resizes the columns of X by bilinear interpolation on the protocol's grid."""
    out = torch.arange(299)
    source = out * side / 299 if protocol == "tf1" else ((out + 0.5) * side / 299 - 0.5).clamp(min=0)
    low = source.floor().long().clamp(max=side - 1)
    w = torch.zeros(299, side)
    w[out, low] += 1 - (source - low)
    w[out, (low + 1).clamp(max=side - 1)] += source - low
    return w


def fid_features(net, protocol, device):
    """A function from images (B, C, H, W), uint8 or floats in [-1, 1], to (B, 2048), the input of the last layer."""
    net.to(device).fc = nn.Identity()

    @torch.inference_mode()
    def extract(x):
        # DEVIATION: the released code takes real images through floats and truncates them as well, which lowers 63 of
        # the 256 levels by one; here they keep the levels of their files, and only generated images are truncated.
        x = (x if x.dtype == torch.uint8 else data.quantize(x)).to(device).float().expand(-1, 3, -1, -1)
        x = x if protocol == "tf1" else x / 255
        rows, columns = (resize_matrix(side, protocol).to(device) for side in x.shape[2:])
        x = rows @ x @ columns.T                                                # (B, 3, H, W) -> (B, 3, 299, 299)
        return net((x - 128) / 128 if protocol == "tf1" else 2 * x - 1)
    return extract


def load_inception(args, device):
    """FID's function from images to features, and what it is."""
    option, net = "--inception-weights", inception_network()
    path = weights(option, args.inception_weights, *WEIGHTS[option])
    net.load_state_dict(torch.load(path, "cpu", weights_only=True))
    about = dict(network="inception-2015-12-05", features=2048, sha256=WEIGHTS[option][0], name=args.protocol,
                 grey="repeated", quantisation="of generated images floor(255 clamp(x / 2 + 0.5, 0, 1))")
    return fid_features(net, args.protocol, device), dict(about, **PROTOCOLS[args.protocol])


# ----------------------------------------------------------------------------------------------- the labeller

def labeller_path(dataset, side, kind):
    return Path("runs", "labellers", f"{dataset}-{side}{'-imagenet' if kind == 'imagenet' else ''}.pt")


def resnet18(kind, channels, classes, width=64):
    """torchvision's ResNet18: "imagenet" as it is, "scratch" with a 3x3 stem, no max pooling, `width` channels first.

    DEVIATION: the released code starts from ImageNet weights and their stem, which leaves one pixel of 32x32. The
    default needs no download and classifies better; `--labeller imagenet` is the released one.
    """
    net = torchvision.models.resnet18()
    if kind == "scratch":
        net.inplanes, net.maxpool = width, nn.Identity()
        net.conv1, net.bn1 = nn.Conv2d(channels, width, 3, 1, 1, bias=False), nn.BatchNorm2d(width)
        for i in range(4):
            setattr(net, f"layer{i + 1}", net._make_layer(resnet.BasicBlock, width << i, 2, stride=1 + (i > 0)))
        for conv in (m for m in net.modules() if isinstance(m, nn.Conv2d)):
            nn.init.kaiming_normal_(conv.weight, mode="fan_out", nonlinearity="relu")  # torchvision's own
    net.fc = nn.Linear(net.layer4[1].conv2.out_channels, classes)
    return net.to(memory_format=torch.channels_last)  # a fifth faster on a CPU


def augment(x, warp=True):
    """x (B, C, H, W) mirrored, turned by up to 10 degrees and moved by up to a tenth if `warp`, plus N(0, 0.01).

    The paper's A.1.3; at 16x16 a warp does more harm than good.

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


def state_hash(state):
    """SHA-256 over the names and bytes of a state dict."""
    digest = hashlib.sha256()
    for name, value in state.items():
        digest.update(name.encode() + value.cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def train_labeller(path, dataset, scale, data_dir, device, key=42, kind="scratch", imagenet=None, **recipe):
    """A.1.3: train on 5/6 of Fashion-MNIST's training images, 9/10 of others', and keep the epoch best on the rest.

    DEVIATION: the released code draws the rest without a seed, and augments it too; here neither.
    """
    recipe = {**RECIPES[scale], **recipe}
    side = 16 if scale == "laptop" else 64 if dataset == "imagenet100" else 32
    path = Path(path or labeller_path(dataset, side, kind))
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"cannot write to {path.parent} ({error.strerror}): give another --labeller-path") from error
    u8, y = (t.to(device) for t in data.load_images(dataset, "train", data_dir, side))
    u8_test, y_test = (t.to(device) for t in data.load_images(dataset, "test", data_dir, side))
    channels, classes = data.DATASETS[dataset]["channels"], len(data.DATASETS[dataset]["classes"])
    seed(key, "labeller")
    net = resnet18(kind, channels, classes, recipe["width"])
    if kind == "imagenet":
        option, channels = "--resnet18-weights", 3
        state = torch.load(weights(option, imagenet, *WEIGHTS[option]), "cpu", weights_only=True)
        net.load_state_dict({**state, "fc.weight": net.fc.weight, "fc.bias": net.fc.bias})
        u8, u8_test = u8.expand(-1, 3, -1, -1), u8_test.expand(-1, 3, -1, -1)
    net.to(device)
    order = torch.randperm(len(u8)).to(device)
    n = len(u8) // (6 if dataset == "fashion-mnist" else 10)
    held_out, train = order[:n], order[n:]
    optimizer = torch.optim.Adam(net.parameters(), recipe["lr"])
    updates = recipe["epochs"] * math.ceil(len(train) / recipe["batch_size"])
    i, best, begun = 0, -1, time.perf_counter()
    with tqdm(total=updates, desc=f"labeller of {dataset}", disable=None, leave=False) as bar:
        for epoch in range(recipe["epochs"]):
            seed(key, "labeller", epoch)
            net.train()
            for batch in train[torch.randperm(len(train)).to(device)].split(recipe["batch_size"]):
                optimizer.param_groups[0]["lr"] = recipe["lr"] * (1 - i / updates if recipe["decay"] else 1)
                loss = F.cross_entropy(net(augment(data.normalize(u8[batch]), recipe["warp"])), y[batch])
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                bar.update()
                i += 1
            right = accuracy(net.eval(), u8[held_out], y[held_out])
            bar.set_postfix_str(f"held out {right:.4f}")
            if right > best:
                best, state = right, {name: value.cpu().clone() for name, value in net.state_dict().items()}
    net.load_state_dict(state)
    right, least = accuracy(net, u8_test, y_test), MIN_ACCURACY.get((scale, dataset), 0.8)
    if right < least:
        raise InputError(f"this labeller has {right:.4f} test accuracy, KLD and frd need {least}: it is not kept, "
                         "try more --epochs")
    config = dict(recipe, kind=kind, dataset=dataset, scale=scale, image_size=side, channels=channels,
                  classes=classes, seed=key, held_out_accuracy=best, torch=str(torch.__version__))
    run.save(path, {"model": state, "config": config, "sha256": state_hash(state), "test_accuracy": right})
    print(f"{path}: {right:.4f} test accuracy, {time.perf_counter() - begun:.0f} s on {device}", flush=True)


def load_labeller(path, dataset, side, device):
    """Two functions, images (B, C, H, W), uint8 or floats in [-1, 1], -> features (B, D) and features -> logits, and
    what they are.
    """
    how = f"train it with python eval_fid.py --train-resnet18 {dataset} (--scale laptop for 16x16)"
    if not path.exists():
        raise InputError(f"there is no labeller {path}: {how}")
    state = run.load(path)
    try:
        c, right, sha256 = state["config"], state["test_accuracy"], state["sha256"]
        least = MIN_ACCURACY.get((c["scale"], c["dataset"]), 0.8)
        net = resnet18(c["kind"], c["channels"], c["classes"], c["width"])
        net.load_state_dict(state["model"])
    except (KeyError, TypeError, AttributeError, RuntimeError) as error:
        raise InputError(f"{path} is not a labeller: {how}") from error
    if (c["dataset"], c["image_size"]) != (dataset, side):
        raise InputError(f"{path} is for {c['dataset']} of side {c['image_size']}, not {dataset} of {side}: give "
                         "another --labeller-path")
    if state_hash(state["model"]) != sha256:
        raise InputError(f"{path} does not hold the weights it was stored with: {how}")
    if not right >= least:
        raise InputError(f"{path} has {right:.4f} test accuracy on {dataset}, KLD and frd need {least}: {how}")
    net.eval().requires_grad_(False).to(device)
    head, net.fc = net.fc, nn.Identity()

    @torch.inference_mode()
    def extract(x):  # generated images are not quantised here, as in the released code
        x = x.to(device)
        return net((data.normalize(x) if x.dtype == torch.uint8 else x).expand(-1, c["channels"], -1, -1))
    about = dict(network=f"resnet18-{c['kind']}", features=head.in_features, sha256=sha256, test_accuracy=right,
                 quantisation="none")
    return extract, head, about


# ------------------------------------------------------------------------------------------ images from people

def read_picture(path):
    """One 8-bit picture -> uint8 (3, H, W); alpha, 16 bits, CMYK are refused rather than converted in silence."""
    try:
        with Image.open(path) as image:
            if image.format == "PNG":
                image.verify()  # the checksums: decoding alone overlooks some flipped bits
        with Image.open(path) as image:
            deep = ";16" in str(image.tile)  # 16-bit RGB, which Pillow cuts to 8
            image.load()
    except (OSError, SyntaxError, ValueError, struct.error, zlib.error, Image.DecompressionBombError) as error:
        raise InputError(f"{path} is not a whole picture ({error}): replace or remove it") from error
    if deep or image.mode not in ("1", "L", "P", "RGB") or "transparency" in image.info:
        raise InputError(f"{path} is 16-bit, transparent or of mode {image.mode}: convert it to 8-bit grey or RGB")
    return torch.from_numpy(np.asarray(image.convert("RGB")).transpose(2, 0, 1).copy())


def open_pictures(path):
    """How many pictures a folder holds, their (H, W), and read(i, j) -> uint8 (j - i, 3, H, W)."""
    files = sorted(f for f in path.iterdir() if f.suffix.lower() in PICTURES and not f.name.startswith("."))
    if not files:
        raise InputError(f"{path} holds no pictures ({' '.join(PICTURES)}; its sub-folders are not searched)")
    if any(f.suffix.lower() in (".jpg", ".jpeg") for f in files):
        print(f"warning: {path} holds JPEG pictures, whose compression alone changes FID", file=sys.stderr)
    size = read_picture(files[0]).shape[1:]

    def read(i, j):
        pictures = {f: read_picture(f) for f in files[i:j]}
        for f, picture in pictures.items():
            if picture.shape[1:] != size:
                raise InputError(f"{f} is {list(picture.shape[1:])}, {files[0].name} {list(size)}: give all one size")
        return torch.stack(list(pictures.values()))
    return len(files), size, read


def read_arrays(path):
    """The arrays of a .npz, or {"images": the array} of a .npy, which stays on the disk."""
    try:
        file = np.load(path, mmap_mode="r")  # refuses pickled objects
        if isinstance(file, np.ndarray):
            return {"images": file}
        with file:
            return {name: file[name] for name in file.files}
    except (OSError, ValueError, EOFError, KeyError, SyntaxError, zipfile.BadZipFile, zlib.error) as error:
        raise InputError(f"{path} is not a whole .npy or .npz of numbers ({error}): replace it") from error


def open_array(path, arrays):
    """The same of an array: the one called images or arr_0, else the first."""
    x = next((arrays[name] for name in ("images", "arr_0", *arrays) if name in arrays), np.zeros(0))
    if x.dtype.kind == "f" and not np.isfinite(x).all():
        raise InputError(f"{path}: image {np.argwhere(~np.isfinite(x))[0, 0]} is not finite: give uint8, 0 to 255")
    last, first = (x.ndim == 4 and x.shape[axis] in (1, 3) for axis in (3, 1))
    if x.dtype != np.uint8 or (x.ndim != 3 and last == first) or 0 in x.shape:
        raise InputError(f"{path} holds {x.dtype} of shape {x.shape}: give uint8 (N, H, W), (N, H, W, C) or "
                         "(N, C, H, W), C = 1 or 3, so that one axis alone can be the channels")
    x = x[:, None] if x.ndim == 3 else x.transpose(0, 3, 1, 2) if last else x                   # (N, C, H, W)
    return len(x), x.shape[2:], lambda i, j: torch.from_numpy(np.array(x[i:j]))


def statistics(source, extract, about, args, size=None, n=None):
    """Moments of the features, and [H, W], of a dataset, a folder, an array or saved statistics, or at most of the
    first n images, which of a dataset's are n drawn at random.
    """
    name, _, split = source.partition(":")
    arrays = read_arrays(source) if name not in data.DATASETS and not Path(source).is_dir() else {}
    if "mu" in arrays:
        if str(arrays.get("protocol")) != json.dumps(about):
            raise InputError(f"{source} has another protocol ({arrays.get('protocol')}): give the images themselves")
        count = int(arrays["n"])
        return Moments(count, arrays["mu"], arrays["sigma"] * (count - 1)), arrays["size"].tolist()
    if name in data.DATASETS:
        if split not in ("", "train", "test") or (size and size[0] != size[1]):
            raise InputError(f"{source}: say {name}:train or {name}:test, and compare square images with it")
        side = size[0] if size else data.DATASETS[name]["size"]
        u8, _ = data.load_images(name, split or "test", args.data_dir or "data", side)
        seed(args.seed or 0, "floor")
        u8 = u8[torch.randperm(len(u8))[:n]]
        count, size, read = len(u8), (side, side), lambda i, j: u8[i:j]
    elif Path(source).is_dir():
        count, size, read = open_pictures(Path(source))
    else:
        count, size, read = open_array(source, arrays)
    if count < 2:
        raise InputError(f"{source} holds one image: a covariance takes two")
    count, found = min(n or count, count), None
    for i in tqdm(range(0, count, args.batch_size), desc=source, disable=None, leave=False):
        found = merge(found, moments(extract(read(i, min(i + args.batch_size, count)))))
    return found, list(size)


# ------------------------------------------------------------------------------------------------- evaluation

def noise(key, i, shape):
    """x_T of image i: each image has its own stream, so that neither the batch size nor the device changes it."""
    seed(key, "eval", i)
    return torch.randn(shape)


def generated(model, side, abar, n, steps, clip, key, batch_size, name):
    """The n images of a model in batches, floats (B, C, side, side) in [-1, 1]; `clip` is of every step of DDIM."""
    for i in tqdm(range(0, n, batch_size), desc=name, disable=None, leave=False):
        x_T = [noise(key, j, (model.in_channels, side, side)) for j in range(i, min(i + batch_size, n))]
        x = sample(model, torch.stack(x_T).to(abar.device), abar, steps, clip=clip)
        broken = (~x.isfinite().flatten(1).all(1)).nonzero()
        if len(broken):
            raise InputError(f"image {i + int(broken[0])} of {name} is not finite: it diverged, train it again")
        yield x.clamp(-1, 1)


def measure(batches, labeller, head, fid=None):
    """One pass over batches of images: moments of the labeller's features and of FID's if asked for, how many images
    the labeller gives each class, (classes,), and the mean of its largest softmax.
    """
    found, counts, confidence = {"frd": None, "fid": None}, 0, 0.0
    for x in batches:
        features = labeller(x)
        top, label = head(features).softmax(1).max(1)
        counts = counts + torch.bincount(label, minlength=head.out_features).cpu().numpy()
        confidence += top.double().sum().item()
        found["frd"] = merge(found["frd"], moments(features))
        if fid:
            found["fid"] = merge(found["fid"], moments(fid(x)))
    return found, counts, confidence / counts.sum()


def warn_if_few(n):
    if n < 2048:
        print(f"warning: {n} images are fewer than FID's 2048 features, so its covariance is rank-deficient and its "
              "value too large: compare it with its floor alone", file=sys.stderr)


def machine(device):
    """Where a record was made."""
    versions = {module.__name__: module.__version__ for module in (torch, torchvision, np, scipy, PIL)}
    return dict(device=str(device), versions=dict(versions, python=platform.python_version()))


def covers(one, other):
    """Whether a record of protocol `one` does for `other`: they are equal, or `other` is the same without FID."""
    return other in (one, {**one, "fid": None})


def evaluate_run(folder, args, device, load_fid=load_inception):
    """Evaluate every task<k>.pt of a run folder into its eval.json, a list of records, written after each task.

    A task that has a record of the same protocol is skipped; a record without FID gives way to one with it.
    """
    path = folder / "eval.json"
    try:
        config = json.loads((folder / "config.json").read_text())
        records = json.loads(path.read_text()) if path.exists() else []
        dataset, scale, side, net = config["dataset"], config["scale"], config["image_size"], NETS[config["unet"]]
        steps, key = args.steps or config["sample_steps"], config["seed"] if args.seed is None else args.seed
        class_tasks, schedule, clip = config["class_tasks"], config["schedule"], config.get("clip", True)
        data_dir = args.data_dir or config["data_dir"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"{folder} is no whole run folder ({error}): give one, or say with --reference what these "
                         "images are to be compared with") from error
    tasks = [k for k in range(1, len(class_tasks) + 1) if (folder / f"task{k}.pt").exists()]
    if not tasks:
        raise InputError(f"{folder} holds no task1.pt yet: train the run first")

    # The networks that look at the images.
    where = Path(args.labeller_path or labeller_path(dataset, side, args.labeller))
    if not where.exists() and scale == "laptop" and not args.labeller_path and args.labeller == "scratch":
        print(f"{where} is not there yet: training this labeller, about a minute", flush=True)
        train_labeller(where, dataset, "laptop", data_dir, device)
    labeller, head, about = load_labeller(where, dataset, side, device)
    fid, fid_about, missing = None, None, "left out of a laptop run, 0.4 s an image on a CPU core; --fid measures it"
    if scale == "paper" or args.fid or args.inception_weights:
        try:
            (fid, fid_about), missing = load_fid(args, device), None
        except InputError as error:
            if args.inception_weights:
                raise
            missing = str(error)

    n, abar = args.n or (2000 if scale == "laptop" else 10000), alpha_bar(schedule).to(device)
    warn_if_few(n)
    test, y_test = data.load_images(dataset, "test", data_dir, side)
    train, y_train = data.load_images(dataset, "train", data_dir, side)
    model = UNet(**net).to(device)
    for k in tasks:
        begun, file = time.perf_counter(), folder / f"task{k}.pt"
        old, seen = (sorted(sum(class_tasks[:i], [])) for i in (k - 1, k))
        real, pool = (torch.isin(y, torch.tensor(seen)).nonzero().squeeze(1) for y in (y_test, y_train))
        seed(key, "floor", k)
        pool = pool[torch.randperm(len(pool))[:n]]
        protocol = dict(
            n=n, n_real=len(real), n_floor=len(pool), seed=key, steps=steps, schedule=schedule, image_size=side,
            sampler="DDIM, eta 0, x_0 clipped" if clip else "DDIM, eta 0", kld_eps=1e-8,
            reference=f"{dataset}, test images of classes {seen}",
            checkpoint=hashlib.sha256(file.read_bytes()).hexdigest(), frd=about, fid=fid_about)
        mine = [r for r in records if r["task"] == k]
        if any(covers(r["protocol"], protocol) for r in mine):
            print(f"task {k}: evaluated before")
            continue
        try:
            state = run.load(file)["model"]
            model.load_state_dict({name: w for name, w in state.items() if not name.startswith("head.")})
        except (KeyError, TypeError, AttributeError, RuntimeError) as error:
            raise InputError(f"{file} is not of the net {config['unet']} of config.json: train it again") from error
        images = generated(model, side, abar, n, steps, clip, key, args.batch_size, str(file))
        fake, q, confidence = measure(images, labeller, head, fid)
        true, q_real, _ = measure(test[real].split(args.batch_size), labeller, head, fid)
        floor, _, _ = measure(train[pool].split(args.batch_size), labeller, head, fid)

        p = torch.bincount(y_test[real], minlength=head.out_features).numpy()
        record = dict(task=k, fid=None, fid_floor=None, fid_missing=missing)
        for metric in ("frd", "fid") if fid else ("frd",):
            record[metric] = frechet(fake[metric], true[metric])
            record[f"{metric}_floor"] = frechet(floor[metric], true[metric])
        record.update(
            kld=kld(p, q), kld_reverse=kld(q, p), kld_real=kld(p, q_real),
            ard=float(abs(p / p.sum() - q / n).sum() / 2), share_old=float(q[old].sum() / n) if old else None,
            confidence=confidence, counts=q.tolist(), rank_deficient=min(n, len(real)) < 2048, protocol=protocol,
            **machine(device), seconds=round(time.perf_counter() - begun, 1))
        stale = [r for r in mine if covers(protocol, r["protocol"])  # or of a model that is no longer there
                 or r["protocol"]["checkpoint"] != protocol["checkpoint"]]
        records = sorted([r for r in records if r not in stale] + [record], key=lambda r: r["task"])
        run.write_json(path, records)
        print(f"task {k}: fid {'-' if fid is None else format(record['fid'], '.2f')}, frd {record['frd']:.2f} (floor "
              f"{record['frd_floor']:.2f}), kld {record['kld']:.3f}, old classes "
              f"{format(record['share_old'], '.1%') if old else '-'}, {record['seconds']} s", flush=True)
    print(f"{path} has {len(tasks)} of {len(class_tasks)} tasks; next: python report.py runs"
          + f"\nfid is null: {missing}" * bool(missing))


def compare(args, device, load_fid=load_inception):
    """Print FID of IMAGES against --reference as a JSON record; keep the statistics of IMAGES if asked to."""
    extract, about = load_fid(args, device)
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
    name, _, split = args.reference.partition(":")
    floor = None
    if name in data.DATASETS:  # as many real images from the dataset's other split
        other = f"{name}:{'test' if split == 'train' else 'train'}"
        floor, _ = statistics(other, extract, about, args, size, n=fake.n)
    warn_if_few(n := min(fake.n, true.n))
    record = dict(
        fid=frechet(fake, true), fid_floor=frechet(floor, true) if floor else None, n=fake.n, n_real=true.n,
        n_floor=floor.n if floor else None, rank_deficient=n < 2048, images=args.images, reference=args.reference,
        image_size=size, protocol=about, **machine(device))
    print(json.dumps(record, indent=1, allow_nan=False))


def main(argv=None):
    args = get_args(argv)
    device = run.pick_device(args.device)
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False  # cudnn's is on by default
    if args.train_resnet18:
        train_labeller(args.labeller_path, args.train_resnet18, args.scale, args.data_dir or "data", device,
                       42 if args.seed is None else args.seed, args.labeller, args.resnet18_weights,
                       epochs=args.epochs or RECIPES[args.scale]["epochs"])
    elif args.reference or args.save_stats:
        compare(args, device)
    else:
        evaluate_run(Path(args.images), args, device)


if __name__ == "__main__":
    run.main(main)
