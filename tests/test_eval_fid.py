"""eval_fid.py.

Distances have closed forms for Gaussians. FID's network is compared with pytorch-fid's. Where neither is the subject,
`tiny` stands in its place: 16 features of one random convolution. Runs are of a folder of 240 pictures, so that their
labeller trains in a second.
"""

import functools
import hashlib
import json
import shutil
import socket
import zipfile
from pathlib import Path

import numpy as np
import pytest
import pytorch_fid.inception
import scipy.linalg
import torch
import torch.nn.functional as F
from conftest import ROOT, write_pictures
from PIL import Image
from torch import nn

import data
import eval_fid
import run
from ddim import alpha_bar, reseed, sample
from eval_fid import InputError, Moments, features_of, frechet, get_args, kld, moments
from unet import NETS, UNet, resnet18

CPU = torch.device("cpu")


# ---------------------------------------------------------------------------------------------------- distances

def covariance(rng, d):
    a = rng.standard_normal((d, d))
    return a @ a.T


def gaussian(mu, sigma):
    return Moments(2, np.array(mu, np.float64), np.array(sigma, np.float64))


def of(x):
    return moments(np.asarray(x, np.float64))


def oracle(a, b):
    root = np.real(scipy.linalg.sqrtm(a.sigma @ b.sigma))
    return np.sum((a.mu - b.mu) ** 2) + np.trace(a.sigma + b.sigma - 2 * root)


def near(value, expected, tolerance=1e-9):
    assert value == pytest.approx(expected, rel=tolerance, abs=tolerance)


def test_closed_forms():
    rng = np.random.default_rng(0)
    s, m, zero = covariance(rng, 6), rng.standard_normal(6), np.zeros(6)
    near(frechet(gaussian(m, s), gaussian(zero, s)), m @ m)                                # equal covariances
    a, b = rng.uniform(0.1, 5, (2, 6))
    near(frechet(gaussian(zero, np.diag(a)), gaussian(zero, np.diag(b))), np.sum((a**0.5 - b**0.5) ** 2))  # diagonal
    near(frechet(gaussian(m, s), gaussian(m, 9 * s)), 4 * np.trace(s))                     # (1 - c)^2 tr S
    near(frechet(gaussian(m, s), gaussian(zero, np.zeros((6, 6)))), m @ m + np.trace(s))   # all images the same
    near(frechet(gaussian(m, np.zeros((6, 6))), gaussian(m, np.zeros((6, 6)))), 0)
    near(frechet(gaussian([3.0], [[4.0]]), gaussian([1.0], [[9.0]])), 4 + 1)               # one dimension
    u, v = rng.standard_normal((2, 6))
    near(frechet(gaussian(zero, np.outer(u, u)), gaussian(zero, np.outer(v, v))), u @ u + v @ v - 2 * abs(u @ v))
    p, q = covariance(rng, 2), covariance(rng, 2)                                          # two that do not commute
    root = np.sqrt(np.trace(p @ q) + 2 * np.sqrt(np.linalg.det(p) * np.linalg.det(q)))
    near(frechet(gaussian([0, 0], p), gaussian([0, 0], q)), np.trace(p) + np.trace(q) - 2 * root)
    near(frechet(gaussian(np.ones(512), np.eye(512)), gaussian(np.zeros(512), np.eye(512))), 512)


def test_the_distance_is_that_of_sqrtm_and_exact_where_images_are_few():
    """Exactly, tr (S S_r)^(1/2) is the sum of the singular values of A^T B / (n - 1), A and B the centred features."""
    rng = np.random.default_rng(3)
    a, b = (of((rng.standard_normal((400, 48)) @ covariance(rng, 48) + shift).clip(0)) for shift in (0, 0.5))
    near(frechet(a, b), oracle(a, b))
    x, y = (rng.standard_normal((60, 256)) * np.linspace(1, 0.01, 256) for _ in range(2))
    a, b, centred = of(x), of(y), [z - z.mean(0) for z in (x, y)]
    nuclear = np.linalg.svd(centred[0] @ centred[1].T, compute_uv=False).sum() / 59
    exact = np.sum((a.mu - b.mu) ** 2) + np.trace(a.sigma) + np.trace(b.sigma) - 2 * nuclear
    near(frechet(a, b), exact, 1e-10)
    near(oracle(a, b), exact, 1e-4)  # the usual way is off here
    for n, d in ((300, 32), (40, 256), (4, 4)):
        m = of(rng.standard_normal((n, d)).clip(0))
        assert frechet(m, m) < 1e-6 * np.trace(m.sigma)


def test_moments():
    """Unbiased, whatever the batches and however large the mean."""
    rng = np.random.default_rng(5)
    x = rng.standard_normal((500, 16)) * 3 + 1e4
    np.testing.assert_allclose(of(x).sigma, np.cov(x, rowvar=False), rtol=0, atol=1e-9)
    for size in (1, 7, 64, 500):  # the last, smaller batch included
        assert np.array_equal(features_of(torch.as_tensor(x), lambda batch: batch, size), x)
    once, twice = of(x[:50]), of(np.concatenate([x[:50], x[:50]]))
    near(frechet(once, twice), (1 - np.sqrt(2 * 49 / 99)) ** 2 * np.trace(once.sigma))  # 2 (n - 1) / (2n - 1)
    assert of(x[:, :1]).sigma.shape == (1, 1)


def test_kld_values():
    uniform = np.ones(10)
    near(kld(uniform, [1] * 9 + [0]), 1.5170, 1e-4)       # one class lost
    near(kld(uniform, [1] * 2 + [0] * 8), 12.5726, 1e-4)  # eight lost
    near(kld([1] * 9 + [0], uniform), 0.1054, 1e-3)       # the other direction
    near(kld(np.ones(10), np.full(10, 777)), 0)           # counts and frequencies are the same
    near(kld([1, 0], [1, 1]), np.log(2), 1e-6)


# ------------------------------------------------------------------------------------------------ FID's network

def test_features_are_those_of_pytorch_fid():
    """With random weights that keep activations near 1 through all layers."""
    torch.manual_seed(0)
    net = eval_fid.inception_network()
    for m in net.modules():
        if isinstance(m, nn.Conv2d):
            m.weight.data.normal_(0, (2 / m.weight[0].numel()) ** 0.5)
        elif isinstance(m, nn.BatchNorm2d):
            for value, centre in ((m.weight, 1), (m.bias, 0), (m.running_mean, 0)):
                value.data.normal_(centre, 0.1)
    u8 = torch.randint(0, 256, (3, 3, 32, 32), generator=torch.Generator().manual_seed(1), dtype=torch.uint8)
    assert len(net.state_dict()) == 566 and sum(p.numel() for p in net.parameters()) == 23_850_960
    assert not any(p.requires_grad for p in net.parameters()) and not any(m.training for m in net.modules())
    blocks = pytorch_fid.inception
    theirs = blocks._inception_v3(num_classes=1008, aux_logits=False, weights=None)  # as there but for the download
    for name, channels, pool in (("5b", 192, 32), ("5c", 256, 64), ("5d", 288, 64)):
        setattr(theirs, f"Mixed_{name}", blocks.FIDInceptionA(channels, pool_features=pool))
    for name, width in (("6b", 128), ("6c", 160), ("6d", 160), ("6e", 192)):
        setattr(theirs, f"Mixed_{name}", blocks.FIDInceptionC(768, channels_7x7=width))
    theirs.Mixed_7b, theirs.Mixed_7c = blocks.FIDInceptionE_1(1280), blocks.FIDInceptionE_2(2048)
    theirs.load_state_dict(net.state_dict())
    theirs.fc = nn.Identity()
    with torch.no_grad():
        expected = theirs.eval()(2 * F.interpolate(u8 / 255, size=(299, 299), mode="bilinear") - 1)
    assert 0.1 < expected.abs().mean() < 10
    features = eval_fid.fid_features(net, "pytorch-fid", CPU)(u8)
    torch.testing.assert_close(features, expected, rtol=0, atol=1e-5)


def test_resizing_of_2015():
    x = torch.randint(0, 256, (1, 3, 5, 7)).float()
    found = eval_fid.resize(x, "tf1") * 128 + 128
    for i in range(0, 299, 13):
        for j in range(0, 299, 13):
            a, b = i * 5 / 299, j * 7 / 299
            i0, j0, f, g = int(a), int(b), a - int(a), b - int(b)
            i1, j1 = min(i0 + 1, 4), min(j0 + 1, 6)
            slow = (1 - f) * ((1 - g) * x[0, 0, i0, j0] + g * x[0, 0, i0, j1]) + f * (
                (1 - g) * x[0, 0, i1, j0] + g * x[0, 0, i1, j1])
            assert abs(found[0, 0, i, j] - slow) < 2e-3


class Corner(nn.Module):
    def forward(self, x):
        assert x.shape[1:] == (3, 299, 299)
        return x[:, :, 0, 0]


def test_grey_is_repeated_and_floats_are_truncated():
    extract = eval_fid.fid_features(Corner(), "tf1", CPU)
    x = torch.tensor([-1, 0.0, 0.9999]).view(3, 1, 1, 1).expand(3, 1, 4, 4)  # 0, 127, 254
    torch.testing.assert_close(extract(x), torch.tensor([-1, -1 / 128, 126 / 128])[:, None].expand(3, 3))
    u8 = torch.randint(256, (3, 1, 4, 4), dtype=torch.uint8)
    assert torch.equal(extract(u8), extract(u8.expand(3, 3, 4, 4)))


# --------------------------------------------------------------------------------------------------- weight files

WEIGHTS = bytes(range(256)) * 400


@pytest.fixture
def place(tmp_path, monkeypatch, server):
    """place("html") makes this the place where FID's weights are; torch.hub's cache is an empty folder."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "hub"))
    for name, content in ("whole", WEIGHTS), ("half", WEIGHTS), ("html", b"<html>try later</html>"):
        (tmp_path / "server" / name).write_bytes(content)

    def set_place(place):
        known = hashlib.sha256(WEIGHTS).hexdigest(), place if ":" in place else server + place
        monkeypatch.setitem(eval_fid.WEIGHTS, "--inception-weights", known)
        return known
    return set_place


def test_weights_are_downloaded_once_and_always_verified(place, tmp_path):
    place("whole")
    path = eval_fid.weights("--inception-weights", None)
    assert path.read_bytes() == WEIGHTS and path.is_relative_to(tmp_path / "hub")
    assert [f.name for f in path.parent.iterdir()] == [path.name]
    place("http://127.0.0.1:9/whole")
    assert eval_fid.weights("--inception-weights", None) == path  # without network
    path.write_bytes(WEIGHTS[:1000] + b"!" + WEIGHTS[1001:])
    with pytest.raises(InputError, match="damaged or another file"):  # a changed byte, found at every start
        eval_fid.weights("--inception-weights", None)
    with pytest.raises(InputError, match="cannot read .*nothing"):
        eval_fid.weights("--inception-weights", tmp_path / "nothing")


def test_weights_that_cannot_be_had(place, tmp_path, monkeypatch):
    patience = socket.setdefaulttimeout
    monkeypatch.setattr(socket, "setdefaulttimeout", lambda seconds: patience(seconds / 50))
    cache = Path(torch.hub.get_dir(), "checkpoints")
    with socket.create_server(("127.0.0.1", 0)) as silent:  # takes a connection and says nothing
        for where, reason in (("half", "invalid hash"), ("html", "invalid hash"), ("missing", "File not found"),
                              ("http://127.0.0.1:9/closed", "refused"),
                              (f"http://127.0.0.1:{silent.getsockname()[1]}/silent", "timed out")):
            known = place(where)
            with pytest.raises(InputError) as error:
                eval_fid.weights("--inception-weights", None)
            for part in (reason, str(tmp_path / "hub"), "--inception-weights", *known):
                assert part in str(error.value)
            assert cache.is_relative_to(tmp_path) and list(cache.iterdir()) == []
    patience(None)
    cache.rmdir()
    cache.write_text("in the way")
    with pytest.raises(InputError, match="cannot read or download"):
        eval_fid.weights("--inception-weights", None)


# ------------------------------------------------------------------------------------------- images from people

def tiny_extractor(x):
    weight = torch.randn(16, 3, 3, 3, generator=torch.Generator().manual_seed(2)) / 5
    x = (x if x.dtype == torch.uint8 else data.quantize(x)).float() / 255
    return F.conv2d(x.expand(-1, 3, -1, -1), weight).relu().mean((2, 3))


@pytest.fixture
def tiny(monkeypatch):
    """One random convolution in FID's place."""
    monkeypatch.setattr(eval_fid, "load_inception", lambda args, device: (
        tiny_extractor, dict(network="tiny", name=args.protocol)))


def refused(main, sentence, *argv):
    """The command ends with one sentence that has these words, and prints nothing else."""
    done = main("eval_fid.py", *argv, code=2)
    assert done.stdout == "" and sentence in done.stderr.splitlines()[-1], done


def compared(main, *argv):
    return json.loads(main("eval_fid.py", *argv).stdout)


@pytest.fixture
def grey(tmp_path):
    """Images, which are in grey.npy too."""
    images = np.random.default_rng(7).integers(0, 256, (12, 16, 16), dtype=np.uint8)
    np.save(tmp_path / "grey.npy", images)
    return images


def test_every_form_of_the_same_images_gives_the_same_number(main, tiny, tmp_path, grey):
    rgb = np.repeat(grey[..., None], 3, 3)
    np.save(tmp_path / "nhwc.npy", np.asfortranarray(rgb))
    np.save(tmp_path / "n1hw.npy", grey[:, None])
    np.savez(tmp_path / "nchw.npz", arr_0=rgb.transpose(0, 3, 1, 2), arr_1=np.arange(12))
    np.savez_compressed(tmp_path / "named.npz", labels=np.arange(12), images=grey)
    np.savez(tmp_path / "only.npz", mine=grey)
    np.save(tmp_path / "reference.npy", grey[:8] // 2)
    write_pictures(tmp_path / "grey", grey)
    write_pictures(tmp_path / "rgb", rgb, ".PNG")
    write_pictures(tmp_path / "bmp", rgb, ".bmp")
    (tmp_path / "grey" / "inner").mkdir()
    (tmp_path / "grey" / ".hidden.png").write_bytes(b"")  # neither is looked at, nor is a text file
    (tmp_path / "grey" / "notes.txt").write_text("about these pictures")
    sources = "grey.npy nhwc.npy n1hw.npy nchw.npz named.npz only.npz grey rgb bmp".split()
    records = [compared(main, source, "--reference", "reference.npy", "--batch-size", 5) for source in sources]
    assert records[0]["fid"] > 0.01
    for record in records:
        near(record["fid"], records[0]["fid"], 1e-5)
        assert (record["n"], record["n_real"], record["fid_floor"]) == (12, 8, None)


def test_record_of_a_comparison(main, tiny, tmp_path, grey):
    argv = "grey.npy", "--reference", "shapes:test", "--n", 10
    done = main("eval_fid.py", *argv)
    record = json.loads(done.stdout)
    assert "warning: 10 images are fewer than FID's 2048 features" in done.stderr
    other = compared(main, *argv, "--batch-size", 3)
    assert record == {**other, "fid": record["fid"], "fid_floor": record["fid_floor"]}
    near([other["fid"], other["fid_floor"]], [record["fid"], record["fid_floor"]], 1e-5)
    assert (record["n"], record["n_real"], record["n_floor"], record["rank_deficient"]) == (10, 5000, 10, True)
    assert record["image_size"] == [16, 16] and record["versions"]["torch"].startswith(torch.__version__.split("+")[0])
    assert record["protocol"] == dict(network="tiny", name="tf1")
    images, _ = data.load_images("shapes", "test", "data", 16)
    near(record["fid"], frechet(of(tiny_extractor(torch.as_tensor(grey[:10, None]))), of(tiny_extractor(images))), 1e-5)
    assert 0 < record["fid_floor"] < record["fid"]  # ten real training images
    done = main("eval_fid.py", "shapes:test", "--reference", "shapes:test")
    assert done.stderr == "" and json.loads(done.stdout)["fid"] < 1e-6


def test_saved_statistics(main, tiny, tmp_path, grey):
    np.save(tmp_path / "y.npy", grey[:, ::-1] // 2)
    fid = compared(main, "grey.npy", "--reference", "y.npy", "--save-stats", "x.npz")["fid"]
    assert main("eval_fid.py", "y.npy", "--save-stats", "y.npz").stdout == ""
    with np.load(tmp_path / "x.npz") as file:
        assert file["mu"].shape == (16,) and file["sigma"].shape == (16, 16) and file["n"] == 12
    record = compared(main, "x.npz", "--reference", "y.npz")
    near(record["fid"], fid)
    assert record["fid_floor"] is record["n_floor"] is None and record["image_size"] == [16, 16]
    refused(main, "has 12 images, not 5", "x.npz", "--reference", "y.npy", "--n", 5)
    refused(main, "another protocol", "x.npz", "--reference", "y.npy", "--protocol", "pytorch-fid")
    np.savez(tmp_path / "theirs.npz", mu=np.zeros(16), sigma=np.eye(16))
    refused(main, "another protocol", "theirs.npz", "--reference", "y.npy")


def test_bad_arrays_are_refused(main, tiny, tmp_path, grey):
    for sentence, array in (
            ("images: float32", grey.astype(np.float32)), ("images: uint16", grey.astype(np.uint16)),
            ("give one array", grey[0]), ("give one array", grey[:0]),
            ("give one array", np.repeat(grey[..., None], 2, 3)),
            ("give one array", np.repeat(grey[:, None, :, :1], 3, 1)),        # both axes can be the channels
            ("give one array", np.repeat(grey[..., None], 4, 3)),             # alpha
            ("one image has no covariance", grey[:1]), ("give both one size", grey[:, :8, :8])):
        np.save(tmp_path / "x.npy", array)
        refused(main, sentence, "x.npy", "--reference", "grey.npy")
    refused(main, "has 12 images, not 13", "grey.npy", "--reference", "grey.npy", "--n", 13)
    refused(main, "say shapes:train or shapes:test", "grey.npy", "--reference", "shapes:val")
    np.save(tmp_path / "x.npy", grey[:, :8])
    refused(main, "compare square images", "x.npy", "--reference", "shapes")
    # Of several arrays none is taken in silence.
    for names in (["fake", "real"], ["images", "arr_0"], []):
        np.savez(tmp_path / "x.npz", **{name: grey for name in names})
        held = ", ".join(f"{name}: uint8 (12, 16, 16)" for name in names) or "nothing"
        refused(main, f"holds {held}: give one array", "x.npz", "--reference", "grey.npy")


def test_other_files_are_refused_with_the_cure(main, tiny, tmp_path, grey):
    write_pictures(tmp_path / "pictures", grey)
    shutil.make_archive(tmp_path / "pictures", "zip", tmp_path / "pictures")
    with zipfile.ZipFile(tmp_path / "mixed.npz", "w") as archive:  # arrays among other files
        archive.write(tmp_path / "grey.npy", "grey.npy")
        archive.writestr("dataset.json", "{}")
    torch.save(torch.zeros(4, 3, 8, 8), tmp_path / "x.pt")
    torch.save(torch.zeros(4, 3, 8, 8), tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    np.save(tmp_path / "objects.npy", np.array([{}, {}], dtype=object), allow_pickle=True)
    (tmp_path / "text.npy").write_text("no array")
    np.savez(tmp_path / "x.npz", images=grey)
    for name in ("x.npz", "grey.npy"):
        whole = (tmp_path / name).read_bytes()
        for cut in (0, 10, len(whole) // 2, len(whole) - 1):
            (tmp_path / f"cut{cut}-{name}").write_bytes(whole[:cut])
    names = "old.pth objects.npy text.npy pictures/000.png missing.npy".split()
    for name in [*names, *(path.name for path in tmp_path.glob("cut*"))]:
        refused(main, f"{name} is no folder of pictures, nor a whole .npy or .npz", name, "--reference", "grey.npy")
    for name in "pictures.zip", "mixed.npz", "x.pt":
        refused(main, f"{name} holds", name, "--reference", "grey.npy")
    (tmp_path / "empty").mkdir()
    refused(main, "holds no pictures", "empty", "--reference", "grey.npy")


def test_bad_pictures_are_refused_by_name(main, tiny, tmp_path, grey):
    write_pictures(tmp_path / "x", grey)
    for image, sentence in ((np.dstack([grey[0]] * 4), "has transparency"), (grey[0, :8], "is (8, 16, 3), others")):
        Image.fromarray(image).save(tmp_path / "x" / "zzz.png")
        refused(main, f"zzz.png {sentence}", "x", "--reference", "shapes")


def test_a_name_that_is_a_dataset_and_a_folder(main, tiny, tmp_path, grey):
    write_pictures(tmp_path / "shapes", np.repeat(np.repeat(grey, 2, 1), 2, 2))
    done = main("eval_fid.py", "shapes", "--reference", "shapes:train")
    assert json.loads(done.stdout)["n"] == 5000 and "./shapes" in done.stderr
    assert compared(main, "./shapes", "--reference", "shapes:train")["n"] == 12


def test_results_that_cannot_be_written_are_refused_before_the_work(main, tmp_path, grey, folder_run, monkeypatch):
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setattr(eval_fid, "load_inception", None)  # calling it would be a traceback
    monkeypatch.setattr(eval_fid, "resnet18", None)
    refused(main, "cannot write file", "grey.npy", "--save-stats", "file/x.npz")
    refused(main, "cannot write file", "--train-resnet18", "shapes", "--labeller-path", "file/x.pt")
    (folder_run("run") / "eval.json").mkdir()
    refused(main, "eval.json", "run")


# ----------------------------------------------------------------------------------------------------- labeller

@pytest.fixture(scope="module")
def shapes():
    u8, y = data.load_images("shapes", "test", "data", 16)
    return {c: u8[y == c, 0].numpy() for c in range(10)}


CLASSES = {"disc": 0, "ring": 1, "triangle": 2, "cross": 3}


@pytest.fixture(scope="module")
def pictures(tmp_path_factory, shapes):
    """A folder of four classes of 60 pictures each, of 16x16."""
    folder = tmp_path_factory.mktemp("data") / "pictures"
    for name, c in CLASSES.items():
        write_pictures(folder / name, shapes[c][:60])
    return folder


@pytest.fixture(scope="module")
def labeller(tmp_path_factory, pictures):
    """The file of a labeller of `pictures`, under its default name."""
    folder, d = tmp_path_factory.mktemp("labellers"), eval_fid.load_data(str(pictures), "data", 16, get_args(["-"]))
    d.path = folder / d.path.name
    eval_fid.train_labeller(d, get_args(["-", "--epochs", "4"]), 42, CPU)
    return d.path


def train(main, *argv):
    done = main("eval_fid.py", "--train-resnet18", *argv, "--epochs", 4)
    return Path(done.stdout.splitlines()[-1].partition(": ")[0])


def test_augmentation():
    torch.manual_seed(0)
    x = torch.linspace(-1, 1, 256).view(1, 1, 16, 16).expand(400, 1, 16, 16)
    plain = eval_fid.augment(x, warp=False)
    mirrored = (plain - x.flip(3)).flatten(1).std(1) < (plain - x).flatten(1).std(1)
    assert 150 < mirrored.sum() < 250
    noise = plain - torch.where(mirrored.view(-1, 1, 1, 1), x.flip(3), x)
    assert abs(noise.mean()) < 1e-3 and abs(noise.std() - 0.1) < 1e-3
    warped = eval_fid.augment(F.pad(torch.ones(400, 1, 8, 8), (12, 12, 12, 12), value=-1.0))
    light = (warped > 0).float()
    assert abs(light.sum((1, 2, 3)) - 64).max() <= 16           # turned and moved, not resized
    for axis in (2, 3):
        centre = (light.sum((1, axis)) * torch.arange(32)).sum(1) / light.sum((1, 2, 3))
        assert 2 < (centre - 15.5).abs().max() < 4              # at most 3 of 32 pixels, plus a little from the turn
    assert abs(warped[:, :, 0, 0].mean() + 1) < 0.05            # what comes in is black


def test_a_labeller_is_deterministic_and_tells_what_it_is(main, tmp_path, pictures, script):
    argv = pictures, "--image-size", 16
    done = script("eval_fid.py", "--train-resnet18", *argv, "--epochs", 4)
    path = next(tmp_path.glob("runs/labellers/*"))
    assert f"{path.relative_to(tmp_path)}: " in done.stdout, done.stderr
    state, digest = run.load(path), data.digest(*data.load_images(str(pictures), "train", "data", 16))
    assert path.name == f"16x16-{digest[:8]}.pt" and state["digest"] == digest and state["seed"] == 42
    assert state["network"] == dict(channels=1, classes=4, width=16, imagenet=False) and state["recipe"]["epochs"] == 4
    same, other = (run.load(train(main, *argv, "--labeller-path", f"{seed}.pt", "--seed", seed)) for seed in (42, 3))
    for state2, equal in ((same, True), (other, False)):
        assert torch.equal(state["model"]["conv1.weight"], state2["model"]["conv1.weight"]) == equal
    d = eval_fid.load_data(str(pictures), "data", 16, get_args(["-"]))
    extract, head, about = eval_fid.load_labeller(d, get_args(["-"]), CPU)
    near((head(extract(d.u8_test)).argmax(1) == d.y_test).double().mean().item(), state["test_accuracy"], 1e-6)
    torch.testing.assert_close(extract(d.u8[:8]), extract(data.normalize(d.u8[:8])))
    assert about == dict(network="resnet18-scratch", features=128, test_accuracy=state["test_accuracy"], digest=digest,
                         sha256=hashlib.sha256(path.read_bytes()).hexdigest())


def test_a_labeller_never_judges_other_images(main, tmp_path, pictures, folder_run, shapes):
    ours = train(main, pictures, "--image-size", 16)
    for name, c in CLASSES.items():
        write_pictures(tmp_path / "other" / "pictures" / name, shapes[9 - c][:60])
    other = train(main, "other/pictures", "--image-size", 16)
    assert ours != other
    folder_run("run")
    refused(main, "is no labeller of these images", "run", "--labeller-path", other)
    shutil.copy(tmp_path / other, tmp_path / ours)  # under the name of ours
    refused(main, "is no labeller of these images", "run")


def test_bad_labellers(main, tmp_path, pictures, folder_run, monkeypatch, shapes):
    folder_run("run", image_size=32)
    refused(main, "there is no file mine.pt", "run", "--labeller-path", "mine.pt")
    folder_run("small")
    refused(main, "--labeller imagenet is for 32x32 and more", "small", "--labeller", "imagenet")
    run.save(tmp_path / "mine.pt", {"model": {}})
    refused(main, "mine.pt is no labeller of these images", "small", "--labeller-path", "mine.pt")
    # Nothing can be learned from noise; two classes need more than half.
    noise = np.random.default_rng(0).integers(0, 256, (2, 30, 32, 32), dtype=np.uint8)
    for c in range(2):
        write_pictures(tmp_path / "noise" / f"class {c}", noise[c])
    done = main("eval_fid.py", "--train-resnet18", "noise", "--image-size", 16, "--epochs", 1, code=2)
    assert "test accuracy, KLD and frd need 0.75: it is not kept" in done.stderr
    start = tmp_path / "resnet18.pth"
    torch.save(resnet18(3, 1000, imagenet=True).state_dict(), start)
    argv = "--train-resnet18", "noise", "--labeller", "imagenet", "--resnet18-weights", start, "--epochs", 1
    done = main("eval_fid.py", *argv, code=2)
    assert "resnet18.pth is damaged or another file" in done.stderr
    known = hashlib.sha256(start.read_bytes()).hexdigest(), "http://127.0.0.1:9/x"
    monkeypatch.setitem(eval_fid.WEIGHTS, "--resnet18-weights", known)
    monkeypatch.setitem(eval_fid.WIDE["least"], "noise", 0.0)
    path = train(main, *argv[1:])
    assert path.name.startswith("32x32-imagenet-")
    assert len(list((tmp_path / "runs" / "labellers").iterdir())) == 1


# --------------------------------------------------------------------------------------------------------- runs

@pytest.fixture
def folder_run(fake_run, pictures):
    """folder_run("name") makes a run folder of two tasks on `pictures`."""
    return functools.partial(fake_run, dataset=str(pictures), class_names=sorted(CLASSES))


@pytest.fixture
def evaluated(main, tmp_path, labeller):
    """evaluated("run", ...) evaluates a run folder and returns its records."""
    (tmp_path / "runs" / "labellers").mkdir(parents=True)
    shutil.copy(labeller, tmp_path / "runs" / "labellers")

    def evaluate(name, *more):
        evaluate.done = main("eval_fid.py", name, "--n", 50, *more)
        return json.loads((tmp_path / name / "eval.json").read_text())
    return evaluate


def test_a_run_is_evaluated_by_one_command(main, folder_run, pictures, tmp_path, monkeypatch):
    """The labeller is trained on the way; the second task is computed again by other means."""
    monkeypatch.setitem(eval_fid.NARROW, "updates", 12)
    folder, abar = folder_run("run", schedule="jdcl", clip=False), alpha_bar("jdcl")
    done = main("eval_fid.py", "run", "--n", 50)
    records = json.loads((folder / "eval.json").read_text())
    assert "training the labeller" in done.stdout and "task 2: frd " in done.stdout
    assert "without FID" not in done.stdout and "2048" not in done.stderr  # nobody asked for it at this scale
    assert [r["task"] for r in records] == [1, 2] and records[0]["share_old"] is None
    for k, r in enumerate(records, 1):
        assert r["fid"] is None and r["rank_deficient"] and sum(r["counts"]) == 50
        assert r["frd"] > 5 * r["frd_floor"] > 0 and 0.25 < r["confidence"] <= 1 and r["kld_real"] < 0.5
        p, q = np.repeat([0.5 / k, 0], [2 * k, 4 - 2 * k]), np.array(r["counts"]) / 50
        near([r["kld"], r["kld_reverse"], r["ard"]], [kld(p, q), kld(q, p), abs(p - q).sum() / 2])
        protocol = r["protocol"]
        assert (protocol["n"], protocol["n_real"], protocol["n_floor"]) == (50, 20 * k, 50)
        assert (protocol["steps"], protocol["seed"], protocol["schedule"]) == (2, 42, "jdcl")
        assert protocol["reference"] == f"pictures, test images of classes {list(range(2 * k))}"
        assert protocol["frd"]["features"] == 128 and protocol["frd"]["test_accuracy"] > 0.7

    d = eval_fid.load_data(str(pictures), "data", 16, get_args(["-"]))
    labeller, head, _ = eval_fid.load_labeller(d, get_args(["-"]), CPU)
    model = UNet(**NETS["laptop"])
    model.load_state_dict(torch.load(folder / "task2.pt", weights_only=True)["model"])
    x_T = []
    for i in range(50):
        reseed(42, "eval", i)
        x_T.append(torch.randn(1, 16, 16))
    fake = labeller(sample(model, torch.stack(x_T), abar, 2, clip=False).clamp(-1, 1))
    label = head(fake).argmax(1)
    assert records[1]["counts"] == torch.bincount(label, minlength=4).tolist()
    near(records[1]["frd"], oracle(of(fake), of(labeller(d.u8_test))), 1e-4)
    for j, found in enumerate(records[1]["frd_by_task"]):
        classes = torch.tensor([2 * j, 2 * j + 1])
        some = fake[torch.isin(label, classes)], labeller(d.u8_test)[torch.isin(d.y_test, classes)]
        assert found is None if len(some[0]) < 2 else found == pytest.approx(oracle(*map(of, some)), rel=1e-3)
    assert any(records[1]["frd_by_task"])
    near(records[1]["share_old"], (label < 2).double().mean().item())
    near(records[1]["denoise"], eval_fid.denoising_errors(model, d.u8_test[d.y_test < 2][:500], abar, 42), 1e-5)
    near(records[1]["confidence"], head(fake).softmax(1).amax(1).mean().item(), 1e-5)


def test_denoising_errors_of_an_exact_model():
    """Of data N(m, s^2) the best model leaves the variance of eps given x_t, abar s^2 / (abar s^2 + 1 - abar)."""
    reseed("test")
    abar, mean, sd = alpha_bar(), 0.1, 0.25
    u8 = data.quantize(mean + sd * torch.randn(400, 1, 16, 16))

    def model(x_t, t):
        a = abar[t].view(-1, 1, 1, 1)
        return (1 - a).sqrt() * (x_t - a.sqrt() * mean) / (a * sd**2 + 1 - a)
    errors, a = eval_fid.denoising_errors(model, u8, abar, 42), abar[:-1]
    near(errors, (a * sd**2 / (a * sd**2 + 1 - a)).view(10, 100).mean(1).tolist(), 0.02)
    assert errors == eval_fid.denoising_errors(model, u8, abar, 42), "every model meets the same noise"
    near(eval_fid.denoising_errors(lambda x_t, t: torch.zeros_like(x_t), u8, abar, 42), [1] * 10, 0.02)


def test_records_are_kept_skipped_and_replaced(evaluated, folder_run, tiny, tmp_path):
    folder, first = folder_run("run"), evaluated("run")
    assert evaluated("run") == first and evaluated.done.stdout.count("evaluated before") == 2
    with_fid = evaluated("run", "--fid")                    # takes the place of those without
    assert "warning: 50 images are fewer" in evaluated.done.stderr
    assert len(with_fid) == 2 and all(r["fid"] > r["fid_floor"] > 0 for r in with_fid)
    assert [r["frd"] for r in with_fid] == [r["frd"] for r in first]
    assert all(r["protocol"]["fid"]["network"] == "tiny" for r in with_fid)
    assert evaluated("run") == with_fid                     # and does where FID is not asked for
    assert len(evaluated("run", "--seed", 1)) == 4          # another protocol stands beside them
    run.save(folder / "task2.pt", {"model": UNet(**NETS["laptop"]).state_dict()})
    after = evaluated("run")                                # records of a model that is gone are dropped
    assert [(r["task"], r["protocol"]["seed"]) for r in after] == [(1, 42), (1, 1), (2, 42)]


def test_batch_size_changes_no_number(evaluated, folder_run, tiny):
    for name in ("a", "b"):
        folder_run(name)
    a, b = (evaluated(name, "--fid", "--batch-size", size) for name, size in (("a", 50), ("b", 7)))
    for one, other in zip(a, b, strict=True):
        assert one["counts"] == other["counts"] and one["protocol"] == other["protocol"]
        for key in ("fid", "frd", "fid_floor", "frd_floor", "confidence"):
            near(one[key], other[key], 1e-4)


def test_how_many_images(folder_run):
    for scale, n in (("paper", 10000), ("laptop", 2000), ("mine", 2000)):
        folder = folder_run(scale, scale=scale)
        assert eval_fid.read_run(folder, get_args([scale]))[0].n == n


def test_fid_missing_from_a_paper_scale_run_is_said(main, evaluated, folder_run, monkeypatch):
    def no_weights(args, device):
        raise InputError("the weights are not at hand: get them there")
    monkeypatch.setattr(eval_fid, "load_inception", no_weights)
    folder_run("run", scale="paper")
    records = evaluated("run")
    assert all(r["fid"] is None and r["frd"] > 0 for r in records)
    assert "without FID: the weights are not at hand" in evaluated.done.stdout
    for asked in (["--fid"], ["--inception-weights", "bad.pth"]):
        refused(main, "not at hand", "run", *asked)  # what was asked for is never left out


def test_a_model_that_classifies_and_a_script_that_nobody_knows(evaluated, folder_run):
    """JDCL's model has a head beside its U-Net; a copied train script may call its method anything."""
    folder_run("run", classes=4, unet="jdcl-laptop", method="my-own", title="Mine", clip=False)
    records = evaluated("run")
    assert len(records) == 2 and records[0]["protocol"]["clip"] is False


def test_bad_runs_are_refused(main, evaluated, folder_run, tmp_path, pictures):
    folder = folder_run("run")
    records = evaluated("run")
    whole = (folder / "task2.pt").read_bytes()

    def case(sentence, name="run"):
        assert sentence in main("eval_fid.py", name, "--n", 50, "--seed", 3, code=2).stderr
    (folder / "task2.pt").write_bytes(whole[:9000] + bytes([whole[9000] ^ 1]) + whole[9001:])
    case("task2.pt is damaged or was not made by torch.save")
    run.save(folder / "task2.pt", {"model": {"weight": torch.zeros(3)}})
    case("task2.pt holds no weights for this network")
    kept = json.loads((folder / "eval.json").read_text())
    assert kept[0] == records[0] and kept[-1] == records[1]  # nothing is half-written
    for path in folder.glob("task*.pt"):
        path.unlink()
    case("holds no task1.pt yet")
    (folder / "task1.pt").write_bytes(whole)
    (folder / "eval.json").write_text("[{")
    case("eval.json is damaged")
    (folder / "eval.json").unlink()
    (folder / "config.json").write_text("{}")
    case("config.json is damaged or incomplete ('dataset')")
    case("--reference", ".")
    folder_run("mine", unet="my-net")
    case("my-net, which unet.py does not have", "mine")
    folder_run("renamed", class_names=["a", "b", "c", "d"])
    case("has other classes than the run, cross, disc, ring, triangle", "renamed")
    shutil.copytree(pictures, tmp_path / "few", ignore=shutil.ignore_patterns("0[1-5]*"))
    folder_run("few-run", dataset="few", class_tasks=[[0], [1]])
    case("less than 2 training or test images of task 1", "few-run")


@pytest.mark.parametrize("protocol, drawn, expected, tolerance", [
    ("pytorch-fid", None, 3.1525, 0.02),  # 3.1525318697637204 in the tests of pytorch-image-generation-metrics
    ("tf1", 5000, 10.3233, 0.01)])        # 10.3233274 in the tests of torch-fidelity, images drawn as there
def test_cifar10_train_against_test(protocol, drawn, expected, tolerance):
    cache = Path(torch.hub.get_dir(), "checkpoints")
    if not (cache / Path(eval_fid.WEIGHTS["--inception-weights"][1]).name).exists():
        pytest.skip("needs the Inception weights")
    if not any((ROOT / "data" / name).exists() for name in ("cifar-10-batches-py", "cifar-10-python.tar.gz")):
        pytest.skip("needs the CIFAR files")
    if not torch.cuda.is_available():
        pytest.skip("needs CUDA")  # six hours on a CPU
    torch.backends.cudnn.allow_tf32 = False
    extract, _ = eval_fid.load_inception(get_args(["-", "--protocol", protocol]), torch.device("cuda"))
    found = []
    for split in ("train", "test"):
        images, _ = data.load_images("cifar10", split, ROOT / "data", 32)
        chosen = np.random.RandomState(2020).choice(len(images), drawn, replace=False) if drawn else slice(None)
        found.append(moments(features_of(images[chosen], extract, 200)))
    assert frechet(*found) == pytest.approx(expected, abs=tolerance)
