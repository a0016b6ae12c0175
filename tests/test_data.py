"""data.py: tasks, pixels, the originals (made here in their formats; Fashion-MNIST also real), folders of pictures."""

import argparse
import gzip
import hashlib
import os
import pickle
import shutil
import socket
import struct
import tarfile
import time
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps
from torchvision.datasets import CIFAR10, CIFAR100, MNIST

import data
from run import InputError

RANDOM = np.random.RandomState(0)
REAL = next((folder for folder in (data.DEBIAN, Path("data/fashion-mnist"), Path("data"), Path("data/FashionMNIST/raw"))
             if (folder / "train-images-idx3-ubyte.gz").exists()), None)


@pytest.fixture(autouse=True)
def machine(monkeypatch, tmp_path):
    """No proxy, no package, an empty torch cache, nothing printed before."""
    for name in ("http_proxy", "https_proxy", "all_proxy", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(data, "DEBIAN", tmp_path / "none")
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    data.say.cache_clear()


def refusal(function, *arguments):
    """The one sentence with which a function refuses its arguments."""
    with pytest.raises(InputError) as caught:
        function(*arguments)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def load(dataset, split, data_dir="", image_size=32):
    images, y = data.load_images(str(dataset), split, data_dir, image_size)
    assert images.dtype == torch.uint8 and y.dtype == torch.int64
    assert len(images) == len(y) and images.shape[2:] == (image_size, image_size)
    return images.numpy(), y.numpy()


def noise(*shape):
    return RANDOM.randint(0, 256, shape).astype(np.uint8)


# ----------------------------------------------------------------------------- pixels and tasks

def test_every_level_through_normalize_and_quantize():
    u8 = torch.arange(256, dtype=torch.uint8)
    x = data.normalize(u8)
    assert x.dtype == torch.float32 and x[0] == -1 and x[255] == 1
    torch.testing.assert_close(x.double(), u8.double() / 127.5 - 1, atol=1e-6, rtol=0)
    lower = (u8 >= 1) & (u8 <= 63)  # the 63 levels that the released evaluation loses as well
    assert torch.equal(data.quantize(x), u8 - lower.to(torch.uint8))
    x = torch.tensor([-7.0, -1.0, 0.0, 1.0 - 1e-3, 1.0, 7.0])
    assert data.quantize(x).tolist() == [0, 0, 127, 254, 255, 255]  # 127.5 and 254.87 are cut, not rounded


def test_class_orders():
    orders = {42: [[2, 6], [1, 8], [4, 5], [0, 9], [3, 7]],  # of the paper's seeds
              69: [[0, 2], [3, 5], [4, 1], [6, 9], [8, 7]],
              1714: [[7, 3], [8, 0], [1, 4], [6, 2], [9, 5]]}
    state = torch.get_rng_state()
    assert {seed: data.class_tasks(10, 5, "random", seed) for seed in orders} == orders
    assert torch.equal(state, torch.get_rng_state())
    assert data.class_tasks(10, 5, "natural", 42) == [[0, 1], [2, 3], [4, 5], [6, 7], [8, 9]]
    assert data.class_tasks(10, 3, "0,1|2,7|8,9", 42) == [[0, 1], [2, 7], [8, 9]]
    assert data.class_tasks(10, 2, "3|0,1,2|9", 42) == [[3], [0, 1, 2]]  # the first two
    assert [data.count_tasks(order) for order in ("random", "natural", "0", "0,1|2", "0|1|2")] == [5, 5, 1, 2, 3]
    for tasks, order, words in (
            (3, "random", "choose a divisor of 10, or state the tasks with --class-order"),
            (2, "0,1|1,2", "at most once"), (1, "0,10", "at most once"), (3, "0,1||2", "not understood"),
            (5, "0|1|2", "--tasks 5, but the class order '0|1|2' states 3: give another --class-order")):
        assert words in refusal(data.class_tasks, 10, tasks, order, 0)


def test_batches():
    """A pass has every image once and its smaller batch last, the next one another order; the updates can be cut."""
    index = torch.arange(100, 110)
    every = [(u, i.tolist()) for u, i in data.batches(index, 4, 0, 6, 42, "order", 1)]
    assert [u for u, _ in every] == [*range(6)] and [len(i) for _, i in every] == [4, 4, 2] * 2
    first, second = (sum((i for _, i in every[pass_:pass_ + 3]), []) for pass_ in (0, 3))
    assert sorted(first) == sorted(second) == index.tolist() and first != second
    for begin, end in (1, 5), (3, 6), (5, 6):
        assert [(u, i.tolist()) for u, i in data.batches(index, 4, begin, end, 42, "order", 1)] == every[begin:end]
    (_, other), = data.batches(index, 4, 0, 1, 42, "order", 2)
    assert other.tolist() != every[0][1], "another task, another order"


def test_names_and_digests(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for name in "pets", "shapes":
        Path(name).mkdir()
    assert [data.dataset_name(name) for name in ("mnist", "pets", "./shapes")] == ["mnist", "pets", "./shapes"]
    assert not capsys.readouterr().err and data.dataset_name("shapes") == data.dataset_name("shapes") == "shapes"
    assert capsys.readouterr().err == "warning: shapes is the dataset; for the folder of this name give ./shapes\n"
    for wrong in ("fashon-mnist", "pets/none", ""):
        with pytest.raises(argparse.ArgumentTypeError, match="neither a folder nor one of fashion-mnist, mnist, "):
            data.dataset_name(wrong)
    u8, y = torch.arange(24, dtype=torch.uint8).view(2, 1, 3, 4), torch.tensor([0, 1])
    others = [(u8 + 1, y), (u8, y + 1), (u8.view(2, 1, 4, 3), y), (u8, y.flip(0)), (u8[:1], y[:1])]
    assert len({data.digest(*pair) for pair in [(u8, y), (u8.flip(0), y.flip(0)), *others]}) == 6  # in any order


def test_resize():
    for channels, h, side in (1, 28, 32), (3, 32, 64), (1, 28, 45), (3, 64, 48), (1, 32, 28):
        image = noise(1, channels, h, h)
        for plane, ours in zip(image[0], data.resize(image, side)[0], strict=True):
            assert np.array_equal(ours, np.asarray(Image.fromarray(plane).resize((side, side), Image.BILINEAR)))
    images = noise(3, 1, 28, 28)
    padded = np.pad(images, ((0, 0), (0, 0), (2, 2), (2, 2))).astype(np.float64)  # a black border
    means = np.floor(padded.reshape(3, 1, 16, 2, 16, 2).mean((3, 5)) + 0.5)
    assert np.array_equal(data.resize(images, 16), means)
    white = np.full((1, 3, 64, 64), 255, np.uint8)
    assert all((data.resize(white, side) == 255).all() for side in (2, 8, 16, 32, 48, 64, 80))


# ----------------------------------------------------------------------------- (Fashion-)MNIST

FILES = list(data.MD5["mnist"])
SPELLINGS = {"plain": str, "gz": lambda f: f + ".gz", "dot": lambda f: f.replace("-idx", ".idx"),
             "dot.gz": lambda f: f.replace("-idx", ".idx") + ".gz"}


def idx(array):
    return bytes([0, 0, 8, array.ndim]) + struct.pack(f">{array.ndim}I", *array.shape) + array.tobytes()


def make_mnist(monkeypatch, folder, name="mnist", spelling="gz"):
    """A small set in MNIST's format, which from now on is the original: {split: (images, labels)}."""
    folder.mkdir(parents=True, exist_ok=True)
    made = {split: (noise(60, 28, 28), RANDOM.randint(0, 10, 60).astype(np.uint8)) for split in ("train", "test")}
    contents = dict(zip(FILES, map(idx, made["train"] + made["test"])))
    for file, content in contents.items():
        path = folder / SPELLINGS[spelling](file)
        path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)
    monkeypatch.setitem(data.MD5, name, {file: hashlib.md5(content).hexdigest() for file, content in contents.items()})
    return made


def check_loads(made, dataset, data_dir):
    for split, (images, labels) in made.items():
        found, y = load(dataset, split, data_dir, images.shape[-1])
        assert np.array_equal(found.reshape(images.shape), images) and np.array_equal(y, labels)


@pytest.mark.parametrize("place", ["", "mnist", "MNIST/raw"])
@pytest.mark.parametrize("spelling", SPELLINGS)
def test_mnist_in_the_data_folder(tmp_path, monkeypatch, capsys, place, spelling):
    made = make_mnist(monkeypatch, tmp_path / place, spelling=spelling)
    if spelling == "dot":  # as on Kaggle, whose folders have the other spelling
        for file in FILES:
            (tmp_path / place / file).mkdir()
    check_loads(made, "mnist", tmp_path)
    assert capsys.readouterr().out == f"MNIST is read from {tmp_path / place}\n"


def test_the_package_is_used_only_where_the_data_folder_has_no_file(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(data, "DEBIAN", tmp_path / "package")
    check_loads(make_mnist(monkeypatch, tmp_path / "package", "fashion-mnist"), "fashion-mnist", tmp_path / "nothing")
    assert capsys.readouterr().out == f"Fashion-MNIST is read from {tmp_path}/package\n"
    (tmp_path / "own").mkdir()
    (tmp_path / "own" / "t10k-images.idx3-ubyte").write_bytes(idx(noise(60, 28, 28)))
    for split in "train", "test":  # never one file from here and one from there
        sentence = refusal(data.load_images, "fashion-mnist", split, tmp_path / "own", 28)
        assert sentence.startswith(f"{tmp_path}/own/t") and "--dataset FOLDER" in sentence


def test_files_that_are_damaged_or_of_another_set_are_refused(tmp_path, monkeypatch):
    make_mnist(monkeypatch, tmp_path)
    for file in FILES:
        path, split = tmp_path / f"{file}.gz", "train" if file.startswith("train") else "test"
        whole = path.read_bytes()
        flipped = bytearray(gzip.decompress(whole))
        flipped[-1] ^= 1
        for content in (whole[:-9], whole[:5], b"", b"<html>404</html>", gzip.compress(bytes(flipped)), bytes(flipped),
                        whole[:20] + bytes([whole[20] ^ 4]) + whole[21:], None):
            path.write_bytes(content) if content is not None else path.unlink()
            sentence = refusal(data.load_images, "mnist", split, tmp_path, 28)  # the other files are there: no download
            assert sentence.startswith(f"{tmp_path}/{file}") and "--dataset FOLDER" in sentence
            assert "is not MNIST's or is damaged" in sentence
        path.write_bytes(whole)
    load("mnist", "train", tmp_path)


@pytest.mark.skipif(REAL is None, reason="needs the real Fashion-MNIST (Debian's package dataset-fashion-mnist)")
def test_the_real_fashion_mnist_and_its_pictures(tmp_path, monkeypatch):
    monkeypatch.setattr(data, "DEBIAN", REAL)
    assert data.digest(*data.load_images("fashion-mnist", "train", "nothing", 28)) == "bc4b94269a5978f6"
    images, labels = data.load_images("fashion-mnist", "test", "nothing", 28)
    assert data.digest(images, labels) == "f9d0e534d5dfa42b" and labels[:5].tolist() == [9, 2, 1, 1, 6]
    trained = np.arange(500) % 3 > 0
    for i, (image, c) in enumerate(zip(images[:500, 0].numpy(), labels.tolist())):
        folder = tmp_path / ("train" if trained[i] else "val") / f"{c}-{data.info('fashion-mnist').classes[c]}"
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(folder / f"{i}.png")
    for side in (16, 28, 32):
        images, labels = (array[:500] for array in load("fashion-mnist", "test", "nothing", side))
        for split, some in ("train", trained), ("test", ~trained):
            order = np.argsort(labels[some], kind="stable")
            found, y = load(tmp_path, split, "", side)
            assert np.array_equal(found, images[some][order]) and np.array_equal(y, labels[some][order])


# ----------------------------------------------------------------------------- CIFAR

def make_cifar(monkeypatch, folder, original):
    """A small CIFAR, unpacked and packed, which from now on is the original: {split: (images, labels)}."""
    root, made = folder / original.base_folder, {}
    root.mkdir(parents=True)

    def write(file, content):
        (root / file).write_bytes(pickle.dumps(content, 2))
        return [file, hashlib.md5((root / file).read_bytes()).hexdigest()]

    for split in "train", "test":
        batches = getattr(original, f"{split}_list")
        made[split] = noise(6 * len(batches), 3, 32, 32), RANDOM.randint(0, 10, 6 * len(batches))
        parts = [np.split(array, len(batches)) for array in made[split]]
        key = "labels" if original is CIFAR10 else "fine_labels"
        monkeypatch.setattr(original, f"{split}_list", [
            write(file, {"data": x.reshape(6, -1), key: y.tolist()}) for (file, _), x, y in zip(batches, *parts)])
    md5 = write(original.meta["filename"], {original.meta["key"]: list("0123456789")})[1]
    monkeypatch.setattr(original, "meta", original.meta | {"md5": md5})
    with tarfile.open(folder / original.filename, "w:gz") as tar:
        tar.add(root, original.base_folder)
    monkeypatch.setattr(original, "tgz_md5", hashlib.md5((folder / original.filename).read_bytes()).hexdigest())
    return made


@pytest.mark.parametrize("name, original", [("cifar10", CIFAR10), ("cifar100", CIFAR100)])
@pytest.mark.parametrize("packed", [False, True])
def test_cifar(tmp_path, monkeypatch, capsys, name, original, packed):
    folder = tmp_path / name if packed else tmp_path
    made = make_cifar(monkeypatch, folder, original)
    if packed:
        shutil.rmtree(folder / original.base_folder)
    check_loads(made, name, tmp_path)
    assert capsys.readouterr().out == f"{data.info(name).title} is read from {folder}\n"
    assert (folder / original.base_folder).exists() != packed  # nothing is written, as the share may be read-only


def test_cifar_that_is_damaged_is_refused(tmp_path, monkeypatch):
    make_cifar(monkeypatch, tmp_path, CIFAR10)
    archive, batch = tmp_path / CIFAR10.filename, tmp_path / CIFAR10.base_folder / "data_batch_3"
    for path in batch, archive:
        content = path.read_bytes()
        for bad in (content[:99] + bytes([content[99] ^ 1]) + content[100:], content[:100]):
            path.write_bytes(bad)
            for split in ("train", "test"):  # the archive beside a bad batch does not replace it
                sentence = refusal(data.load_images, "cifar10", split, tmp_path, 32)
                assert "is not CIFAR-10's or is damaged" in sentence and "--dataset FOLDER" in sentence
                assert sentence.startswith(str(batch.parent if path == batch else archive)) and path.read_bytes() == bad
        shutil.rmtree(batch.parent, ignore_errors=True)


# ----------------------------------------------------------------------------- downloads

CLOSED = "http://127.0.0.1:9/"  # where nobody listens


@pytest.mark.parametrize("name, original", [("mnist", MNIST), ("cifar10", CIFAR10), ("cifar100", CIFAR100)])
def test_download(tmp_path, monkeypatch, capsys, server, name, original):
    make = make_mnist if original is MNIST else make_cifar
    made = make(monkeypatch, tmp_path / "server", name if original is MNIST else original)
    files = sorted((tmp_path / "server").glob("*.gz"))
    monkeypatch.setattr(MNIST, "resources", [(f.name, hashlib.md5(f.read_bytes()).hexdigest()) for f in files])
    monkeypatch.setitem(data.ORIGINALS, name, (original, [CLOSED, server + "none/", server]))
    content = files[0].read_bytes()
    for bad in (content[:20], b"<html>maintenance</html>", b""):
        files[0].write_bytes(bad)
        sentence = refusal(data.load_images, name, "test", tmp_path / "data", 28)
        assert files[0].name in sentence and server in sentence and f"into {tmp_path}/data/{name}," in sentence
        assert list((tmp_path / "data").iterdir()) == []
    assert "another --data-dir" in refusal(data.load_images, name, "test", files[0], 28)  # no folder, but a file
    files[0].write_bytes(content)
    (tmp_path / "data" / "MNIST" / "raw").mkdir(parents=True)  # of an attempt that failed
    for _ in range(2):
        check_loads(made, name, tmp_path / "data")
        monkeypatch.setitem(data.ORIGINALS, name, (original, []))  # no address is asked again
    place = tmp_path / "data" / ("MNIST/raw" if original is MNIST else "")
    assert capsys.readouterr().out == f"{data.info(name).title} is read from {place}\n"
    assert not list((tmp_path / "data").glob(".*"))


def test_network_that_hangs(tmp_path, monkeypatch):
    patience = socket.setdefaulttimeout
    monkeypatch.setattr(socket, "setdefaulttimeout", lambda seconds: patience(seconds and seconds / 30))
    with socket.create_server(("127.0.0.1", 0)) as silent:  # takes the call and never answers
        mirrors = [f"http://127.0.0.1:{silent.getsockname()[1]}/", "http://no-such-host.invalid/", CLOSED]
        monkeypatch.setitem(data.ORIGINALS, "cifar10", (CIFAR10, mirrors))
        start = time.monotonic()
        sentence = refusal(data.load_images, "cifar10", "train", tmp_path / "data", 32)
        assert time.monotonic() - start < 15
    assert "cifar-10-python.tar.gz" in sentence and all(mirror in sentence for mirror in mirrors)


# ----------------------------------------------------------------------------- pictures

def picture(mode="L", width=28, height=None):
    depth = {"L": (), "LA": (2,), "RGB": (3,), "RGBA": (4,), "CMYK": (4,)}[mode]
    return Image.frombytes(mode, (width, height or width), noise(height or width, width, *depth).tobytes())


def palette(*colours):
    """A palette picture that shows all its colours."""
    image = Image.frombytes("P", (28, 28), bytes(i % len(colours) for i in range(784)))
    image.putpalette([level for colour in colours for level in colour])
    return image


def png(depth, colour, samples):
    """A PNG of one row of four pixels as the standard has it: Pillow itself writes no 16-bit RGB."""
    def chunk(kind, body):
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", struct.pack(">IIBBBBB", 4, 1, depth, colour, 0, 0, 0)) + chunk(
        b"IDAT", zlib.compress(b"\0" + samples)) + chunk(b"IEND", b"")


def saved(path, content, **more):
    """The path of a file with these bytes, or with this picture."""
    path.write_bytes(content) if isinstance(content, bytes) else content.save(path, **more)
    return path


@pytest.mark.parametrize("mode", ["L", "RGB"])
def test_pictures_are_read_level_by_level(tmp_path, mode):
    for end, image in (("png", picture(mode)), ("bmp", picture(mode)), ("tif", picture(mode)), ("ppm", picture(mode)),
                       ("gif", palette(*[(i, i, i if mode == "L" else 255 - i) for i in range(256)]))):
        read = data.read_picture(saved(tmp_path / f"a.{end}", image))
        assert read.mode == mode and read.tobytes() == image.convert(mode).tobytes()
    for end, content, levels in (("pgm", b"P2 2 1 15 0 15", [0, 255]), ("png", png(2, 0, b"\x1b"), [0, 85, 170, 255])):
        assert list(data.read_picture(saved(tmp_path / f"b.{end}", content)).tobytes()) == levels


def test_pictures_that_would_lose_something_are_refused_by_name(tmp_path):
    def made(name, content, **more):
        return saved(tmp_path / name, content, **more)
    make_folder(tmp_path / "own", a="RGB28 RGB28", b="RGB28 RGB28")
    deep, image = np.arange(784, dtype=np.uint16).reshape(28, 28) * 80, picture("RGB")
    whole, jpeg = (made(f"whole.{end}", image).read_bytes() for end in ("png", "jpg"))
    bad = {
        "8 bits": [made("16.png", Image.fromarray(deep)), made("rgb16.png", png(16, 2, bytes(24))),
                   made("a.ppm", b"P6 2 1 65535 " + bytes(12)), made("b.ppm", b"P3 1 1 1023 0 512 1023"),
                   made("16.tif", Image.fromarray(deep)), made("float.tif", Image.fromarray(deep.astype(np.float32)))],
        "transparency": [made("a.png", picture("RGBA")), made("a.webp", picture("RGBA")), made("la.png", picture("LA")),
                         made("key.png", image, transparency=(1, 2, 3)),
                         made("p.gif", palette((0, 0, 0), (9, 9, 9)), transparency=0)],
        "frames": [made(f"many.{end}", image, save_all=True, append_images=[picture("RGB")])
                   for end in ("gif", "tif", "png", "webp", "mpo")],
        "mode CMYK": [made("cmyk.jpg", picture("CMYK"))], "mode LAB": [made("lab.tif", Image.new("LAB", (9, 9)))],
        "not a whole picture": [
            made("text.png", b"a renamed text file"), made("cut.png", whole[:-40]), made("cut.jpg", jpeg[:400]),
            made("flipped.png", whole[:200] + bytes([whole[200] ^ 1]) + whole[201:]), made("empty.png", b""),
            made("bomb.png", Image.new("1", (20000, 10000)))]}
    for words, files in bad.items():
        for file in files:
            inside = Path(shutil.copy(file, tmp_path / "own" / "b"))
            for path, sentence in ((file, refusal(data.read_picture, file)),
                                   (inside, refusal(data.load_images, str(tmp_path / "own"), "train", "", 28))):
                assert sentence.startswith(str(path)) and words in sentence and "remove it" in sentence
            inside.unlink()
    assert data.info(str(tmp_path / "own")).like == "cifar10"


# ----------------------------------------------------------------------------- folders of pictures

def make_folder(home, **classes):
    """name="L28 RGB32x30" makes name/0.png, grey, and name/1.png, 32 wide; __ is a slash: {name: [picture, ...]}."""
    made = {}
    for name, kinds in classes.items():
        folder = home / name.replace("__", "/")
        folder.mkdir(parents=True, exist_ok=True)
        modes = [kind.rstrip("0123456789x") for kind in kinds.split()]
        made[name] = [picture(mode, *map(int, kind[len(mode):].split("x"))) for mode, kind in zip(modes, kinds.split())]
        for i, image in enumerate(made[name]):
            image.save(folder / f"{i}.png")
    return made


def arrays(pictures):
    return np.stack([np.atleast_3d(np.asarray(image)).transpose(2, 0, 1) for image in pictures])


def test_folder_with_train_and_val(tmp_path, capsys):
    home = tmp_path / "My pets"
    made = make_folder(home, train__cat="L28 L28 L28", train__dog="L28", val__cat="L28", val__dog="L28 L28")
    assert data.info(str(home)) == ("My-pets", "My pets", ["cat", "dog"], 1, 28, "fashion-mnist")
    for split, part, labels in ("train", "train", [0, 0, 0, 1]), ("test", "val", [0, 1, 1]):
        images = arrays(made[f"{part}__cat"] + made[f"{part}__dog"])
        for side in (16, 28, 32):
            found, y = load(home, split, "", side)
            assert np.array_equal(found, data.resize(images, side)) and y.tolist() == labels
    assert capsys.readouterr().out == f"{home}: train/ is for training, val/ for testing\n"
    make_folder(home, test__cat="L28", test__dog="L28")
    assert len(load(home, "test")[1]) == 2
    assert capsys.readouterr().out == f"{home}: train/ is for training, test/ for testing\n"


def test_folder_without_train_is_split_the_same_way_every_time(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    made = make_folder(Path("own"), a=" ".join(["RGB32"] * 13), b="RGB32 RGB32", train="RGB32 RGB32 RGB32")
    assert data.info("own").classes == ["a", "b", "train"]  # a class may be called train
    (train, y), (test, y_test) = load("own", "train"), load("own", "test")
    assert np.bincount(y).tolist() == [11, 1, 2] and np.bincount(y_test).tolist() == [2, 1, 1]
    every = {image.tobytes() for image in arrays(sum(made.values(), []))}
    assert {image.tobytes() for image in (*train, *test)} == every and len(every) == 18
    note = "has no train/ and test/ (or val/): 1 picture in 6 of each class is for testing"
    assert capsys.readouterr().out == f"{tmp_path}/own {note}\n"
    shutil.copytree("own", "copy", ignore=shutil.ignore_patterns(".decoded"))
    assert np.array_equal(load("copy/", "test")[0], test)


def test_natural_order_and_what_systems_hide(tmp_path):
    names = ["1", "2", "10", "Class 3", "class 12", "n02", "n10", "été"]
    for split in ("train", "test"):
        make_folder(tmp_path, **{f"{split}__{name}": " ".join(["L32"] * 12) for name in names})
    clean = load(tmp_path, "train")
    assert np.array_equal(clean[0][10, 0], np.asarray(Image.open(tmp_path / "train" / "1" / "10.png")))
    for part in ("train", "train/10", "test/.ipynb_checkpoints", "train/.ipynb_checkpoints", "test/__MACOSX", "."):
        (tmp_path / part).mkdir(exist_ok=True)
        for name in (".DS_Store", "._x.png", "Thumbs.db", "desktop.ini"):
            (tmp_path / part / name).write_text("hidden", encoding="utf-8")
    for beside in "README.txt", "train/labels.csv":
        (tmp_path / beside).write_text("beside the classes", encoding="utf-8")
    assert data.info(str(tmp_path)).classes == names
    assert all(map(np.array_equal, load(tmp_path, "train"), clean))


@pytest.mark.parametrize("change, words", [
    (lambda home: (home / "train/cat/more").mkdir(), "train/cat/more is not a whole picture"),
    (lambda home: (home / "train/cat/notes.txt").write_text("x"), "train/cat/notes.txt is not a whole picture"),
    (lambda home: (home / "val/cow").mkdir(), "give 'cow' pictures"),
    (lambda home: [(home / s / "cow").mkdir() for s in ("train", "val")], "give 'cow' pictures"),
    (lambda home: shutil.rmtree(home / "val/dog"), "give 'dog' pictures"),
    (lambda home: [(home / s).mkdir() for s in ("train/ze\u0300bre", "val/z\u00e8bre")],
     r"give 'ze\u0300bre', 'z\xe8bre' pictures"),
    (lambda home: shutil.rmtree(home / "val"), "give 'cat', 'dog' pictures for training and others"),
    (lambda home: [shutil.rmtree(home / s) for s in ("train", "val")], "0 class folders"),
    (lambda home: shutil.rmtree(home), "0 class folders")])
def test_folder_that_is_not_right(tmp_path, change, words):
    make_folder(tmp_path / "own", train__cat="L28", train__dog="L28", val__cat="L28", val__dog="L28")
    change(tmp_path / "own")
    for function in (data.info, lambda home: data.load_images(home, "test", "", 28)):
        sentence = refusal(function, str(tmp_path / "own"))
        assert words in sentence and str(tmp_path / "own") in sentence


def test_grey_or_colour(tmp_path):
    make_folder(tmp_path, a="L28 L28", b="L28 L28")
    unused = palette((7, 7, 7), (1, 2, 3))
    unused.putdata([0] * 784)  # (1, 2, 3) is in the palette, but no pixel has it
    for image, channels in ((picture().convert("1"), 1), (palette((5, 5, 5), (9, 9, 9)), 1), (unused, 1),
                            (palette((5, 5, 5), (9, 9, 8)), 3), (picture("RGB"), 3)):
        image.save(tmp_path / "b" / "2.png")
        assert data.info(str(tmp_path)).channels == channels
    images = np.concatenate([load(tmp_path, split, "", 28)[0] for split in ("train", "test")])
    assert images.shape[1] == 3 and sum((image == image[:1]).all() for image in images) == 4


def test_sizes(tmp_path):
    made = make_folder(tmp_path, train__a="L28 L64 L100x80", train__b="L30x90", test__a="L28", test__b="L1")
    images, _ = load(tmp_path, "train", "", 64)
    assert np.array_equal(images, arrays([ImageOps.fit(image, (64, 64), Image.BILINEAR)
                                          for image in made["train__a"] + made["train__b"]]))
    assert np.array_equal(images[1, 0], np.asarray(made["train__a"][1]))
    assert np.array_equal(load(tmp_path, "train", "", 16)[0], data.resize(images, 16))
    assert data.info(str(tmp_path)).size == 64
    large, _ = load(tmp_path, "train", "", 300)
    assert np.array_equal(large[2, 0], np.asarray(ImageOps.fit(made["train__a"][2], (300, 300), Image.BILINEAR)))


def test_folder_with_the_name_of_a_dataset(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    make_folder(Path("Shapes"), a="L28 L28", b="L28 L28")
    assert data.info("./Shapes")[:2] == ("Shapes-folder", "Shapes")
    monkeypatch.chdir("Shapes")
    assert data.info(".") == data.info("../Shapes") == data.info(str(tmp_path / "Shapes"))
    assert len(list(Path(".decoded").iterdir())) == 1


# ----------------------------------------------------------------------------- what is kept of them

@pytest.fixture
def decodings(monkeypatch):
    """The names of the pictures that were decoded."""
    read, names = data.read_picture, []
    monkeypatch.setattr(data, "read_picture", lambda path, **more: names.append(path.name) or read(path, **more))
    return names


def test_pictures_are_decoded_once_until_one_changes(tmp_path, decodings):
    make_folder(tmp_path, train__a="RGB28 RGB28", test__a="RGB28")
    file = tmp_path / "train" / "a" / "0.png"

    def paint(level):
        Image.new("RGB", (28, 28), (level,) * 3).save(file, "BMP")

    def repaint_with_the_old_time():
        status = file.stat()
        paint(9)
        os.utime(file, ns=(status.st_atime_ns, status.st_mtime_ns))
        assert (file.stat().st_size, file.stat().st_mtime_ns) == (status.st_size, status.st_mtime_ns)

    changes = [(lambda: paint(255), 255), (lambda: paint(7), 7), (repaint_with_the_old_time, 9),
               (lambda: file.rename(file.with_name("x.png")), None)]  # at last the other picture is the first
    for i, (change, level) in enumerate(changes):
        load(tmp_path, "test", "", 16)
        assert data.info(str(tmp_path)).size == 28 and len(decodings) == 3 * (i + 1)  # whatever the split and the size
        change()
        first = load(tmp_path, "train", "", 28)[0][0]
        assert (first == level).all() or level is None and first.std() > 0


def test_what_is_kept_is_verified(tmp_path, decodings):
    make_folder(tmp_path, a="L28 L28 L28", b="L28 L28")
    images, _ = load(tmp_path, "train", "", 28)
    file, = (tmp_path / ".decoded").iterdir()
    content = file.read_bytes()
    pixels = content.index(images[0].tobytes())
    flipped = [content[:k] + bytes([content[k] ^ 1]) + content[k + 1:] for k in (pixels, pixels + 700)]
    for i, bad in enumerate((content[:-1], content[:9], b"", b"no archive" * 99, *flipped)):
        file.write_bytes(bad)
        assert np.array_equal(load(tmp_path, "train", "", 28)[0], images) and len(decodings) == 5 * (i + 2)
        assert file.read_bytes() == content


def test_read_only_pictures(tmp_path, monkeypatch, capsys, decodings):
    home, twin = tmp_path / "own", tmp_path / "twin"
    make_folder(home, a="L28 L28", b="L28 L28")
    shutil.copytree(home, twin)  # the same names, sizes and times: not the same pictures
    monkeypatch.setattr(os, "access", lambda *arguments: False)
    first = load(home, "train")
    assert all(map(np.array_equal, load(home, "train"), first)) and len(decodings) == 4
    assert sorted(path.name for path in home.iterdir()) == ["a", "b"] and not capsys.readouterr().err
    load(twin, "train")
    assert len(decodings) == 8
    shutil.rmtree(tmp_path / "torch")
    (tmp_path / "torch").write_text("no folder", encoding="utf-8")
    for _ in range(2):
        assert all(map(np.array_equal, load(home, "train"), first))
    assert capsys.readouterr().err.count("warning: ") == 1 and len(decodings) == 16


def test_several_at_once(tmp_path):
    make_folder(tmp_path, a=" ".join(["RGB40"] * 30), b="RGB40 RGB40")
    with ThreadPoolExecutor(6) as pool:
        results = list(pool.map(lambda _: load(tmp_path, "train")[0], range(6)))
    assert all(np.array_equal(result, results[0]) for result in results)
    assert len(list((tmp_path / ".decoded").iterdir())) == 1


def test_imagenet100(tmp_path):
    home, names = tmp_path / "imagenet100", [f"n{c:08d}" for c in range(100)]
    for name in names:
        make_folder(home, **{f"train__{name}": "L9x12 L9x12", f"val__{name}": "L10x9"})
    file = home / "train" / names[7] / "1.png"
    for mode in "CMYK", "RGB":
        picture(mode, 91, 50).save(file, "JPEG")
        images, y = load("imagenet100", "train", tmp_path, 64)
        original = Image.open(file).convert("RGB")
        oracle = original.resize((76, 76), Image.BILINEAR).crop((6, 6, 70, 70))
        assert np.array_equal(images[15], arrays([oracle])[0]) and y.tolist() == [i // 2 for i in range(200)]
    own, _ = load(home, "train", "", 64)  # the same folder, but not as ImageNet-100
    assert np.array_equal(own[15], arrays([ImageOps.fit(original, (64, 64), Image.BILINEAR)])[0])
    images, y = load("imagenet100", "test", tmp_path, 32)
    assert images.shape == (100, 3, 32, 32) and y.tolist() == list(range(100))  # in colour, although all are grey
    assert data.info("imagenet100", tmp_path) == ("imagenet100", "ImageNet-100", names, 3, 64, "imagenet100")
    for split, words in ("train", "'n00000099'"), ("val", "has 99 class folders: make 100"):
        shutil.rmtree(home / split / names[99])
        assert words in refusal(data.info, "imagenet100", tmp_path)


# ----------------------------------------------------------------------------- shapes

def test_shapes():
    (train, y), (test, y_test) = (data.load_images("shapes", split, "", 16) for split in ("train", "test"))
    assert torch.equal(test, data.load_images("shapes", "test", "", 16)[0])
    assert y.bincount().tolist() == [2000] * 10 and y_test.bincount().tolist() == [500] * 10
    assert len(torch.cat([train, test]).flatten(1).unique(dim=0)) > 0.97 * 25000  # a disc may come twice
    means = torch.stack([train[y == c].float().mean(0).flatten() for c in range(10)])
    nearest = torch.cdist(test.float().flatten(1), means).argmin(1)
    assert all((nearest[y_test == c] == c).float().mean() > 0.9 for c in range(10))  # the classes are apart
    images = load("shapes", "test", "", 64)[0][:, 0]  # large, so that the smooth edge counts for little
    level = images.max((1, 2))
    assert level.min() >= 160 and level.std() > 20
    inside = images > level[:, None, None] / 2
    assert not inside[:, [0, -1]].any() and not inside[:, :, [0, -1]].any()  # black around
    widths = inside[y_test == 5].any(1).sum(1) / 64  # of the bars
    assert 0.7 < widths.min() < 0.74 and 0.82 < widths.max() < 0.9
