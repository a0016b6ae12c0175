"""data.py on the real Fashion-MNIST, on files of CIFAR's and ImageNet's form made here, and on damage of every kind.

    python -m pytest tests/test_data.py
"""

import gzip
import hashlib
import http.server
import io
import os
import pickle
import shutil
import socket
import struct
import tarfile
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import data
from run import InputError

DEBIAN = Path("/usr/share/datasets/fashion-mnist")
FILES = [f"{part}-{kind}-ubyte" for part in ("train", "t10k") for kind in ("images-idx3", "labels-idx1")]
RANDOM = np.random.RandomState(0)


@pytest.fixture(autouse=True)
def no_settings(monkeypatch):
    """What a machine may have set in its environment changes no test."""
    monkeypatch.delenv("CL_DATA_UNVERIFIED", raising=False)
    for name in ("http_proxy", "https_proxy", "all_proxy", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)


def error(*arguments):
    """The one sentence with which load_images refuses."""
    with pytest.raises(InputError) as caught:
        data.load_images(*arguments)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# ----------------------------------------------------------------------------- pixels and tasks

def test_every_level_through_normalize_and_quantize():
    u8 = torch.arange(256, dtype=torch.uint8)
    x = data.normalize(u8)
    assert x.dtype == torch.float32 and x[0] == -1 and x[255] == 1
    torch.testing.assert_close(x.double(), u8.double() / 127.5 - 1, atol=1e-6, rtol=0)
    lower = (u8 >= 1) & (u8 <= 63)  # the 63 levels that the released evaluation loses as well
    assert torch.equal(data.quantize(x), u8 - lower.to(torch.uint8))


def test_quantize_clamps_and_truncates():
    x = torch.tensor([-7.0, -1.0, 0.0, 1.0 - 1e-3, 1.0, 7.0])
    assert data.quantize(x).tolist() == [0, 0, 127, 254, 255, 255]  # 127.5 and 254.87 are cut, not rounded
    assert data.quantize(x.bfloat16()[:2]).dtype == torch.uint8


def test_class_orders_of_the_papers_seeds():
    orders = {42: [[2, 6], [1, 8], [4, 5], [0, 9], [3, 7]],
              69: [[0, 2], [3, 5], [4, 1], [6, 9], [8, 7]],
              1714: [[7, 3], [8, 0], [1, 4], [6, 2], [9, 5]]}
    for seed, order in orders.items():
        state = torch.get_rng_state()
        assert data.class_tasks(10, 5, None, seed) == data.class_tasks(10, 5, "random", seed) == order
        assert torch.equal(state, torch.get_rng_state())


def test_class_orders_stated():
    assert data.class_tasks(10, 5, "natural", 42) == [[0, 1], [2, 3], [4, 5], [6, 7], [8, 9]]
    assert data.class_tasks(10, 1, "natural", 42) == [list(range(10))]
    assert data.class_tasks(10, None, "0,1|2,7|8,9", 42) == [[0, 1], [2, 7], [8, 9]]
    assert data.class_tasks(10, 3, "3|0,1,2|9", 42) == [[3], [0, 1, 2], [9]]


@pytest.mark.parametrize("tasks, order, word", [
    (3, None, "choose a divisor"), (0, None, "choose a divisor"), (None, "natural", "choose a divisor"),
    (4, "natural", "choose a divisor"), (None, "0,1|1,2", "at most once"), (None, "0,0", "at most once"),
    (None, "0,10", "at most once"), (None, "0,-1", "at most once"), (None, "0,1||2", "not understood"),
    (None, "", "not understood"), (None, "0,1|", "not understood"), (None, "a,b", "not understood"),
    (None, "0.5", "not understood"), (2, "0|1|2", "states 3 tasks")])
def test_class_orders_that_make_no_sense(tasks, order, word):
    with pytest.raises(InputError, match=word):
        data.class_tasks(10, tasks, order, 0)


def test_tables():
    sizes = {"fashion-mnist": (10, 1, 28), "cifar10": (10, 3, 32), "cifar100": (100, 3, 32),
             "imagenet100": (100, 3, 64), "shapes": (10, 1, 32)}
    assert {k: (len(set(d["classes"])), d["channels"], d["size"]) for k, d in data.DATASETS.items()} == sizes
    assert len(data.figures()) == 10
    assert "no-such" in error("no-such", "train", "", 32)


# ----------------------------------------------------------------------------- resizing

@pytest.mark.parametrize("channels, small, large", [(1, 28, 32), (3, 32, 64), (1, 28, 45)])
def test_larger_is_pils_bilinear(channels, small, large):
    images = RANDOM.randint(0, 256, (5, channels, small, small)).astype(np.uint8)
    resized = data.resize(images, large)
    for image, ours in zip(images, resized, strict=True):
        for plane, our in zip(image, ours, strict=True):
            assert np.array_equal(our, np.asarray(Image.fromarray(plane).resize((large, large), Image.BILINEAR)))


def test_smaller_is_the_mean_of_blocks_inside_a_border():
    images = RANDOM.randint(0, 256, (3, 1, 28, 28)).astype(np.uint8)
    small = data.resize(images, 16)
    assert small.shape == (3, 1, 16, 16) and small.dtype == np.uint8
    assert not small[..., 0, :].any() and not small[..., :, -1].any()  # two of the 32 columns on each side are border
    padded = np.pad(images, ((0, 0), (0, 0), (2, 2), (2, 2))).astype(np.float64)
    mean = padded.reshape(3, 1, 16, 2, 16, 2).mean((3, 5))
    assert np.array_equal(small, np.floor(mean + 0.5))
    white = np.full((1, 3, 32, 32), 255, np.uint8)
    assert (data.resize(white, 16) == 255).all() and (data.resize(white, 8) == 255).all()
    assert data.resize(white, 32) is white  # 32x32 stays as it is


# ----------------------------------------------------------------------------- Fashion-MNIST

def test_fashion_mnist_is_the_real_one():
    for split, per_class in (("train", 6000), ("test", 1000)):
        images, y = data.load_images("fashion-mnist", split, "no-such-folder", 28)
        assert images.shape == (10 * per_class, 1, 28, 28) and images.dtype == torch.uint8
        assert y.dtype == torch.int64 and y.bincount().tolist() == [per_class] * 10
    assert y[:5].tolist() == [9, 2, 1, 1, 6]  # the test set opens with a boot, a pullover, two trousers, a shirt
    body = hashlib.md5(b"\0\0\10\3" + struct.pack(">3I", 10000, 28, 28) + images.numpy().tobytes()).hexdigest()
    assert body == "8181f5470baa50b63fa0f6fddb340f0a"
    larger, _ = data.load_images("fashion-mnist", "test", "no-such-folder", 32)
    single = Image.fromarray(images[17, 0].numpy()).resize((32, 32), Image.BILINEAR)
    assert np.array_equal(larger[17, 0].numpy(), np.asarray(single))


@pytest.mark.parametrize("place, raw", [("", False), ("fashion-mnist", True), ("FashionMNIST/raw", True)])
def test_fashion_mnist_in_the_data_folder(tmp_path, monkeypatch, place, raw):
    monkeypatch.setattr(data, "DEBIAN", tmp_path / "none")
    (tmp_path / place).mkdir(parents=True, exist_ok=True)
    for file in FILES[2:]:
        packed = (DEBIAN / f"{file}.gz").read_bytes()
        (tmp_path / place / (file if raw else file + ".gz")).write_bytes(gzip.decompress(packed) if raw else packed)
    images, _ = data.load_images("fashion-mnist", "test", tmp_path, 16)
    assert images.shape == (10000, 1, 16, 16)


def idx(array):
    return bytes([0, 0, 8, array.ndim]) + struct.pack(f">{array.ndim}I", *array.shape) + array.tobytes()


def spoil(data_dir, labels=None, images=None, pack=True):
    """A Fashion-MNIST test set in data_dir with the given bytes in place of the real ones; both files' paths."""
    paths = []
    for file, given in zip(FILES[2:], (images, labels), strict=True):
        path = data_dir / (f"{file}.gz" if pack else file)
        content = gzip.decompress((DEBIAN / f"{file}.gz").read_bytes()) if given is None else given
        path.write_bytes(gzip.compress(content, 1) if pack else content)
        paths.append(path)
    return paths


def test_fashion_mnist_damaged_gz_is_refused(tmp_path):
    real = (DEBIAN / "t10k-images-idx3-ubyte.gz").read_bytes()
    path = tmp_path / "t10k-images-idx3-ubyte.gz"
    flipped = bytearray(real)
    flipped[len(real) // 2] ^= 1
    for content in (bytes(flipped), real[:len(real) // 2], real[:5], b"", b"<html>404 Not Found</html>"):
        path.write_bytes(content)
        sentence = error("fashion-mnist", "test", tmp_path, 28)
        assert str(path) in sentence and "delete it and run again" in sentence


def test_fashion_mnist_changed_content_is_refused(tmp_path):
    labels = gzip.decompress((DEBIAN / "t10k-labels-idx1-ubyte.gz").read_bytes())
    changed = labels[:-1] + bytes([(labels[-1] + 1) % 10])  # whole file, right form, one image relabelled
    for content in (changed, labels[:-1], labels + b"\0"):
        for pack in (True, False):
            _, path = spoil(tmp_path, labels=content, pack=pack)
            sentence = error("fashion-mnist", "test", tmp_path, 28)
            assert str(path) in sentence and "md5" in sentence and "delete it and run again" in sentence
            path.unlink()


def test_damaged_package_is_to_be_reinstalled(tmp_path, monkeypatch):
    monkeypatch.setattr(data, "DEBIAN", tmp_path)
    path = spoil(tmp_path, labels=b"")[1]
    sentence = error("fashion-mnist", "test", tmp_path / "elsewhere", 28)
    assert str(path) in sentence and "reinstall the package dataset-fashion-mnist" in sentence


SMALL = np.arange(600) % 10


@pytest.mark.parametrize("labels, images, word", [
    (idx(SMALL[:599].astype(np.uint8)), None, "599 labels for 600 images"),
    (idx((SMALL + 1).astype(np.uint8)), None, "labels are not 0 to 9"),
    (idx(np.zeros(600, np.uint8)), None, "0 to 600 images"),
    (idx(SMALL.astype(np.uint8))[:-1], None, "not a whole idx file of labels"),
    (b"<html>not found</html>", None, "not a whole idx file of labels"),
    (None, b"\0\0", "not a whole idx file of images"),
    (None, idx(np.zeros((600, 27, 28), np.uint8)), "not a whole idx file of images"),
    (None, idx(np.zeros((600, 28, 28), np.uint8))[:-1], "not a whole idx file of images"),
    (idx(np.zeros(0, np.uint8)), idx(np.zeros((0, 28, 28), np.uint8)), "labels are not 0 to 9")])
def test_form_is_checked_even_without_md5(tmp_path, monkeypatch, labels, images, word):
    monkeypatch.setenv("CL_DATA_UNVERIFIED", "1")
    spoil(tmp_path, labels or idx(SMALL.astype(np.uint8)), images or idx(np.zeros((600, 28, 28), np.uint8)))
    sentence = error("fashion-mnist", "test", tmp_path, 28)
    assert word in sentence and str(tmp_path) in sentence and "delete it and run again" in sentence


def test_unverified_loads_a_smaller_set_and_says_so(tmp_path, monkeypatch, capsys):
    pictures = RANDOM.randint(0, 256, (600, 28, 28)).astype(np.uint8)
    spoil(tmp_path, idx(SMALL.astype(np.uint8)), idx(pictures))
    assert "md5" in error("fashion-mnist", "test", tmp_path, 28)
    monkeypatch.setenv("CL_DATA_UNVERIFIED", "1")
    images, y = data.load_images("fashion-mnist", "test", tmp_path, 28)
    assert np.array_equal(images[:, 0], pictures) and y.tolist() == SMALL.tolist()
    assert capsys.readouterr().err.startswith("warning: CL_DATA_UNVERIFIED=1")


# ----------------------------------------------------------------------------- CIFAR

def python2_pickle(x, labels, key):
    """What Python 2 and numpy 1 wrote for {"data": x, key: labels}: protocol 2, byte strings, old numpy names."""
    def short(text):
        return b"U" + bytes([len(text)]) + text
    array = (b"cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\x00\x85" + short(b"b") + b"\x87R(K\x01M"
             + struct.pack("<H", x.shape[0]) + b"M" + struct.pack("<H", x.shape[1]) + b"\x86cnumpy\ndtype\n"
             + short(b"u1") + b"K\x00K\x01\x87R(K\x03" + short(b"|") + b"NNNJ" + b"\xff" * 4 + b"J" + b"\xff" * 4
             + b"K\x00tb\x89T" + struct.pack("<I", x.size) + x.tobytes() + b"tb")
    numbers = b"](" + b"".join(b"K" + bytes([c]) for c in labels) + b"e"
    return b"\x80\x02}(" + short(b"data") + array + short(key) + numbers + b"u."


def python3_pickle(x, labels, key):
    return pickle.dumps({b"batch_label": b"a batch", key: labels, b"data": x, b"filenames": [b"a.png"]}, 2)


def python3_pickle_by_columns(x, labels, key):
    return python3_pickle(np.asfortranarray(x), labels, key)


def make_cifar(folder, name, write=python2_pickle, per_class=4):
    """A small CIFAR in its folder: {split: (images, labels)} as load_images must return them."""
    d, made = data.DATASETS[name], {}
    root = folder / d["folder"]
    root.mkdir(parents=True)
    for split, batches in d["batches"].items():
        parts = []
        for batch in batches:
            y = RANDOM.permutation(len(d["classes"]) * per_class) % len(d["classes"])
            x = RANDOM.randint(0, 256, (len(y), 3072)).astype(np.uint8)
            (root / batch).write_bytes(write(x, y.tolist(), d["labels"]))
            parts.append((x, y))
        made[split] = [np.concatenate(both) for both in zip(*parts, strict=True)]
    return made


def pack(folder, name):
    """Turns the folder into the archive."""
    d = data.DATASETS[name]
    with tarfile.open(folder / d["archive"], "w:gz") as tar:
        tar.add(folder / d["folder"], d["folder"])
    shutil.rmtree(folder / d["folder"])
    return folder / d["archive"]


@pytest.mark.parametrize("name", ["cifar10", "cifar100"])
@pytest.mark.parametrize("write", [python2_pickle, python3_pickle, python3_pickle_by_columns])
@pytest.mark.parametrize("archive", [False, True])
def test_cifar_of_the_true_form(tmp_path, monkeypatch, name, write, archive):
    made = make_cifar(tmp_path, name, write)
    if archive:
        pack(tmp_path, name)
    monkeypatch.setenv("CL_DATA_UNVERIFIED", "1")
    for split, (x, labels) in made.items():
        images, y = data.load_images(name, split, tmp_path, 32)
        assert np.array_equal(images.reshape(-1, 3072), x) and y.tolist() == labels.tolist()
    assert images[0, 2, 0, 31] == int(x[0, 2 * 1024 + 31])  # planes of red, green, blue, each row by row
    half, _ = data.load_images(name, "test", tmp_path, 16)
    torch.testing.assert_close(half.float(), torch.nn.functional.avg_pool2d(images.float(), 2), atol=0.5, rtol=0)


def test_cifar_is_refused_without_the_right_md5(tmp_path):
    make_cifar(tmp_path, "cifar10")
    sentence = error("cifar10", "train", tmp_path, 32)
    assert "data_batch_1" in sentence and "md5" in sentence and "delete it and run again" in sentence
    path = pack(tmp_path, "cifar10")
    sentence = error("cifar10", "train", tmp_path, 32)
    assert str(path) in sentence and "md5" in sentence


def test_cifar_with_the_right_md5_must_have_all_its_images(tmp_path, monkeypatch):
    make_cifar(tmp_path, "cifar100")
    path = tmp_path / "cifar-100-python" / "test"
    monkeypatch.setitem(data.MD5, "test", hashlib.md5(path.read_bytes()).hexdigest())
    assert "4 to 4 images" in error("cifar100", "test", tmp_path, 32)
    monkeypatch.setitem(data.DATASETS["cifar100"]["per_class"], "test", 4)
    assert len(data.load_images("cifar100", "test", tmp_path, 32)[1]) == 400


def test_incomplete_cifar_folder_is_passed_over_for_the_archive(tmp_path, monkeypatch):
    monkeypatch.setenv("CL_DATA_UNVERIFIED", "1")
    made = make_cifar(tmp_path, "cifar10")
    pack(tmp_path, "cifar10")
    (tmp_path / "cifar-10-batches-py").mkdir()
    (tmp_path / "cifar-10-batches-py" / "data_batch_1").write_bytes(b"")
    assert np.array_equal(data.load_images("cifar10", "train", tmp_path, 32)[0].reshape(-1, 3072), made["train"][0])


class Hostile:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


X, Y = np.zeros((10, 3072), np.uint8), list(range(10))
GOOD = python2_pickle(X, Y, b"labels")


@pytest.mark.parametrize("content, word", [
    (GOOD[:-1], ""), (GOOD[:1000], ""), (b"", ""), (b"<html>busy</html>", ""), (pickle.dumps([1, 2], 2), ""),
    (python2_pickle(X, Y, b"coarse"), "labels"),
    (python2_pickle(X[:9], Y, b"labels"), "10 labels for images of shape (9, 3072)"),
    (python2_pickle(X[:, :3071], Y, b"labels"), "(10, 3071)"),
    (pickle.dumps({b"data": X.astype(np.int16), b"labels": Y}, 2), ""),
    (pickle.dumps({b"data": X.astype(np.int8), b"labels": Y}, 2), "type i1"),
    (pickle.dumps({b"data": X, b"labels": ["cat"] * 10}, 2), ""), (b"Fno\nnumber\n.", ""),
    (pickle.dumps({b"data": b"x", b"labels": Y}, 2), ""),
    (python2_pickle(X, [*Y[:9], 10], b"labels"), "labels are not 0 to 9"),
    (python2_pickle(X, [0, *Y[:9]], b"labels"), "0 to 2 images"),
    (b"cbuiltins\neval\n(S'1'\ntR.", "builtins.eval"), (b"cnumpy\nload\n.", "numpy.load"),
    (b"cnumpy.core.multiarray\nfromfile\n.", "fromfile")])
def test_bad_cifar_batch_is_refused(tmp_path, monkeypatch, content, word):
    monkeypatch.setenv("CL_DATA_UNVERIFIED", "1")
    (tmp_path / "cifar-10-batches-py").mkdir()
    (tmp_path / "cifar-10-batches-py" / "test_batch").write_bytes(content)
    sentence = error("cifar10", "test", tmp_path, 32)
    assert "cifar-10-batches-py" in sentence and word in sentence and "delete it and run again" in sentence


@pytest.mark.parametrize("archive", [False, True])
def test_hostile_pickle_is_refused_and_not_executed(tmp_path, monkeypatch, archive):
    monkeypatch.setenv("CL_DATA_UNVERIFIED", "1")
    make_cifar(tmp_path, "cifar10")
    target = tmp_path / "executed"
    evil = pickle.dumps({b"data": Hostile(target), b"labels": Y}, 2)
    (tmp_path / "cifar-10-batches-py" / "test_batch").write_bytes(evil)
    if archive:
        pack(tmp_path, "cifar10")
    sentence = error("cifar10", "test", tmp_path, 32)
    assert "test_batch" in sentence and "mkdir" in sentence and not target.exists()
    pickle.loads(evil)
    assert target.exists()  # the file is hostile indeed


@pytest.mark.parametrize("damage", [
    lambda blob: blob[:len(blob) // 2], lambda blob: b"", lambda blob: b"<html></html>",
    lambda blob: blob[:len(blob) // 2] + bytes(99) + blob[len(blob) // 2 + 99:], lambda blob: empty_tar()])
def test_bad_cifar_archive_is_refused(tmp_path, monkeypatch, damage):
    monkeypatch.setenv("CL_DATA_UNVERIFIED", "1")
    make_cifar(tmp_path, "cifar10")
    path = pack(tmp_path, "cifar10")
    path.write_bytes(damage(path.read_bytes()))
    for split in ("train", "test"):
        sentence = error("cifar10", split, tmp_path, 32)
        assert str(path) in sentence and "delete it and run again" in sentence


def empty_tar():
    box = io.BytesIO()
    tarfile.open(fileobj=box, mode="w:gz").close()
    return box.getvalue()


# ----------------------------------------------------------------------------- ImageNet-100

@pytest.fixture
def imagenet(tmp_path):
    """100 class folders, two tiny JPEGs in each for training and one for validation."""
    for split, count in (("train", 2), ("val", 1)):
        for c in range(100):
            folder = tmp_path / "imagenet100" / split / f"n{c:08d}"
            folder.mkdir(parents=True)
            for i in range(count):
                Image.new("RGB", (9 + i, 12), (c, 2 * c, 90 * i)).save(folder / f"{folder.name}_{i}.JPEG")
    return tmp_path


def caches(folder):
    return sorted(p.name for p in (folder / "imagenet100").iterdir() if p.is_file())


def test_imagenet100(imagenet):
    picture = Image.fromarray(RANDOM.randint(0, 256, (50, 91, 3)).astype(np.uint8))
    path = imagenet / "imagenet100" / "train" / "n00000007" / "n00000007_1.JPEG"
    picture.save(path)
    images, y = data.load_images("imagenet100", "train", imagenet, 64)
    assert images.shape == (200, 3, 64, 64) and y.tolist() == [i // 2 for i in range(200)]
    with Image.open(path) as image:
        oracle = image.resize((76, 76), Image.BILINEAR).crop((6, 6, 70, 70))
    assert np.array_equal(images[15].permute(1, 2, 0), np.asarray(oracle))
    grey = imagenet / "imagenet100" / "val" / "n00000003" / "n00000003_0.JPEG"
    Image.new("L", (30, 20), 77).save(grey)
    images, y = data.load_images("imagenet100", "test", imagenet, 32)
    assert images.shape == (100, 3, 32, 32) and (images[3] == 77).all() and y.tolist() == list(range(100))


def test_imagenet100_is_decoded_once_until_its_files_change(imagenet):
    images, _ = data.load_images("imagenet100", "train", imagenet, 64)
    data.load_images("imagenet100", "test", imagenet, 64)
    train, val = caches(imagenet)
    path = imagenet / "imagenet100" / "train" / "n00000000" / "n00000000_0.JPEG"
    content = path.read_bytes()
    path.write_bytes(bytes(len(content)))  # no picture any more; not noticed, since nothing is decoded again
    assert torch.equal(data.load_images("imagenet100", "train", imagenet, 64)[0], images)
    path.write_bytes(content)
    path.rename(path.with_name("n00000000_9.JPEG"))  # now the other picture comes first
    again, _ = data.load_images("imagenet100", "train", imagenet, 64)
    assert torch.equal(again[:2], images[:2].flip(0)) and not torch.equal(again[0], images[0])
    assert train not in caches(imagenet) and len(caches(imagenet)) == 2  # the old array is gone, val's stays
    path.with_name("n00000000_9.JPEG").unlink()
    assert len(data.load_images("imagenet100", "train", imagenet, 64)[1]) == 199
    assert val in caches(imagenet)


def test_imagenet100_bad_image_is_named(imagenet):
    path = imagenet / "imagenet100" / "train" / "n00000042" / "n00000042_1.JPEG"
    content = path.read_bytes()
    for bad in (content[:len(content) // 2], b"", b"a renamed text file"):
        path.write_bytes(bad)
        sentence = error("imagenet100", "train", imagenet, 64)
        assert str(path) in sentence and "replace or remove it" in sentence
        assert caches(imagenet) == []  # nothing half made
    path.write_bytes(content)
    data.load_images("imagenet100", "train", imagenet, 64)


def test_imagenet100_folders_must_be_right(imagenet):
    home = imagenet / "imagenet100"
    assert "now it has 0" in error("imagenet100", "train", imagenet / "nowhere", 64)
    (home / "val" / "n00000099").rename(home / "val" / "n12345678")
    assert "different class folders" in error("imagenet100", "train", imagenet, 64)
    shutil.rmtree(home / "val")
    assert len(data.load_images("imagenet100", "train", imagenet, 64)[1]) == 200
    (home / "train" / "another").mkdir()
    assert "now it has 101, 1 of them empty" in error("imagenet100", "train", imagenet, 64)
    shutil.rmtree(home / "train" / "another")
    cache = home / caches(imagenet)[0]
    cache.write_bytes(cache.read_bytes()[:1000])
    sentence = error("imagenet100", "train", imagenet, 64)
    assert str(cache) in sentence and "delete it and run again" in sentence


# ----------------------------------------------------------------------------- shapes

def test_shapes_are_the_same_every_time_and_of_the_right_form():
    train, y = data.load_images("shapes", "train", "", 16)
    again, _ = data.load_images("shapes", "train", "", 16)
    test, y_test = data.load_images("shapes", "test", "", 16)
    assert torch.equal(train, again) and train.shape == (20000, 1, 16, 16) and test.shape == (5000, 1, 16, 16)
    assert y.bincount().tolist() == [2000] * 10 and y_test.bincount().tolist() == [500] * 10
    assert not torch.equal(train[:5000], test)
    both = torch.cat([train, test]).flatten(1)
    assert len(both.unique(dim=0)) > 0.98 * len(both)  # train and test are different; a disc may come twice
    assert data.DATASETS["shapes"]["classes"][:6] == ["disc", "ring", "triangle", "cross", "square", "bar"]


def test_shapes_are_grey_figures_in_the_middle_that_fill_64_to_88_percent():
    images, _ = data.load_images("shapes", "test", "", 64)  # large, so that the smooth edge counts for little
    images = images[:, 0]
    assert (images[:, 0].max() == 0) and (images[:, :, -1].max() == 0)  # black around
    level = images.flatten(1).amax(1)
    assert level.min() >= 160 and level.max() <= 255 and level.float().std() > 20
    inside = images > level[:, None, None] / 2
    spans = []
    for axis in (1, 2):
        filled = inside.any(axis).long()
        first, last = filled.argmax(1), 63 - filled.flip(1).argmax(1)
        spans.append((last - first + 1) / 64)
        assert ((first + last - 63).abs() <= 2).all()  # centred, to a pixel
    extent = torch.maximum(*spans)
    assert extent.min() >= 0.64 - 1.5 / 64 and extent.max() <= 0.88 + 1.5 / 64
    assert extent.min() < 0.66 and extent.max() > 0.86


def test_shapes_are_turned_by_at_most_11_degrees():
    images, y = data.load_images("shapes", "test", "", 64)
    bars = images[y == 5, 0].double()
    v = torch.arange(64).double() - 31.5
    xx, yy, xy = ((bars * m).sum((1, 2)) for m in (v[None] ** 2, v[:, None] ** 2, v[None] * v[:, None]))
    degrees = torch.rad2deg(torch.atan2(2 * xy, xx - yy) / 2)  # of the long axis, from second moments
    assert degrees.abs().max() < 11.5 and degrees.max() > 10 and degrees.min() < -10


@pytest.mark.parametrize("side", [16, 32])
def test_shapes_classes_are_apart(side):
    train, y = data.load_images("shapes", "train", "", side)
    test, y_test = data.load_images("shapes", "test", "", side)
    means = torch.stack([train[y == c].float().mean(0).flatten() for c in range(10)])
    nearest = torch.cdist(test.float().flatten(1), means).argmin(1)
    assert (nearest == y_test).float().mean() > 0.95
    for c in range(10):
        assert (nearest[y_test == c] == c).float().mean() > 0.8


# ----------------------------------------------------------------------------- downloads

class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.server.asked.append(self.path)  # before the answer, which the test may outrun
        content, length = self.server.files.get(self.path, (None, 0))
        self.send_response(404 if content is None else 200)
        self.send_header("Content-Length", str(length))
        self.end_headers()
        self.wfile.write(content or b"")

    def log_message(self, *arguments):
        pass


@pytest.fixture
def server():
    """A local web server: files maps a path to (bytes sent, length announced), asked lists what was asked for."""
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        server.files, server.asked = {}, []
        server.base = f"http://127.0.0.1:{server.server_port}"
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        yield server
        server.shutdown()


def closed():
    """The address of a port where nobody listens."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return f"http://127.0.0.1:{s.getsockname()[1]}/"


def offline(monkeypatch, tmp_path, name, *sources):
    monkeypatch.setattr(data, "DEBIAN", tmp_path / "none")
    monkeypatch.setitem(data.DATASETS[name], "sources", list(sources))


def test_download_of_fashion_mnist(tmp_path, monkeypatch, server):
    offline(monkeypatch, tmp_path, "fashion-mnist", f"{server.base}/first/", f"{server.base}/mirror/")
    for file in FILES[2:]:
        content = (DEBIAN / f"{file}.gz").read_bytes()
        server.files[f"/mirror/{file}.gz"] = content, len(content)
    images, y = data.load_images("fashion-mnist", "test", tmp_path / "data", 28)  # 404 at the first source
    assert len(images) == 10000 and len(server.asked) == 4
    assert {p.name for p in (tmp_path / "data" / "fashion-mnist").iterdir()} == {f"{file}.gz" for file in FILES[2:]}
    data.load_images("fashion-mnist", "test", tmp_path / "data", 28)
    assert len(server.asked) == 4  # not fetched twice


def test_download_of_cifar(tmp_path, monkeypatch, server):
    made = make_cifar(tmp_path, "cifar100")
    content = pack(tmp_path, "cifar100").read_bytes()
    server.files["/cifar-100-python.tar.gz"] = content, len(content)
    offline(monkeypatch, tmp_path, "cifar100", closed(), server.base + "/")
    monkeypatch.setenv("CL_DATA_UNVERIFIED", "1")
    sentence = error("cifar100", "test", tmp_path / "data", 32)  # what is downloaded must be the original even so
    assert "sent something else" in sentence
    assert list((tmp_path / "data").iterdir()) == []
    monkeypatch.setitem(data.MD5, "cifar-100-python.tar.gz", hashlib.md5(content).hexdigest())
    images, _ = data.load_images("cifar100", "test", tmp_path / "data", 32)
    assert np.array_equal(images.reshape(-1, 3072), made["test"][0])
    assert [p.name for p in (tmp_path / "data").iterdir()] == ["cifar-100-python.tar.gz"]


def test_download_that_fails_leaves_nothing(tmp_path, monkeypatch, server):
    content = (DEBIAN / "t10k-images-idx3-ubyte.gz").read_bytes()
    page = b"<html>maintenance</html>"
    for sent, length in ((content[:99999], len(content)), (content[:99999], 99999), (page, len(page)), (b"", 0)):
        server.files["/t10k-images-idx3-ubyte.gz"] = sent, length
        offline(monkeypatch, tmp_path, "fashion-mnist", server.base + "/")
        sentence = error("fashion-mnist", "test", tmp_path / "data", 28)
        assert "t10k-images-idx3-ubyte.gz" in sentence and f"put it into {tmp_path}/data/fashion-mnist/" in sentence
        assert list((tmp_path / "data" / "fashion-mnist").iterdir()) == []


def test_no_network_is_one_sentence_soon(tmp_path, monkeypatch):
    with socket.create_server(("127.0.0.1", 0)) as silent:  # takes the call and never answers
        silence = f"http://127.0.0.1:{silent.getsockname()[1]}/"
        sources = [closed(), silence, "http://no-such-host.invalid/", *(closed() for _ in range(5))]
        offline(monkeypatch, tmp_path, "cifar10", *sources)
        start = time.monotonic()
        sentence = error("cifar10", "train", tmp_path / "data", 32)
        assert time.monotonic() - start < 15
    assert "cifar-10-python.tar.gz" in sentence and f"put it into {tmp_path}/data/ and run again" in sentence
    assert "no answer" in sentence and all(base in sentence for base in sources)
    assert list((tmp_path / "data").iterdir()) == []


def test_data_folder_that_cannot_be_written(tmp_path, monkeypatch, server):
    (tmp_path / "data").write_text("a file where the folder should be")
    offline(monkeypatch, tmp_path, "cifar10", server.base + "/")
    assert "choose another --data-dir" in error("cifar10", "train", tmp_path / "data", 32)
