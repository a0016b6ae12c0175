"""eval_fid.py: python -m pytest tests/test_eval_fid.py

Distances have closed forms for Gaussians, FID's network is compared with pytorch-fid's, and where neither is the
subject images go through `tiny`, 16 features of one random convolution. Runs are evaluated with a labeller trained
here.
"""

import hashlib
import importlib.util
import io
import json
import os
import struct
import subprocess
import sys
import threading
import zlib
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import numpy as np
import pytest
import pytorch_fid.inception
import scipy.linalg
import torch
import torch.nn.functional as F
from conftest import ROOT
from PIL import Image
from torch import nn
from torchvision.models import inception

import data
import eval_fid
import run
from eval_fid import InputError, Moments, frechet, get_args, kld, measure, merge, moments
from unet import NETS, UNet

CPU = torch.device("cpu")
NO_NETWORK = {"https_proxy": "http://127.0.0.1:9", "http_proxy": "http://127.0.0.1:9"}  # nobody listens there


# ---------------------------------------------------------------------------------------------------- distances

def gaussian(mu, sigma):
    """Moments of that mean and covariance: of two vectors, so that scatter and covariance are the same."""
    return Moments(2, np.array(mu, np.float64), np.array(sigma, np.float64))


def covariance(rng, d):
    a = rng.standard_normal((d, d))
    return a @ a.T


def of(x):
    return moments(torch.as_tensor(x))


def oracle(a, b):
    """The distance by scipy's square root, whose results differ between releases."""
    try:
        root = scipy.linalg.sqrtm(a.sigma @ b.sigma, disp=False)
    except TypeError:  # disp is gone since scipy 1.18
        root = scipy.linalg.sqrtm(a.sigma @ b.sigma)
    root = root[0] if isinstance(root, tuple) else root
    return np.sum((a.mu - b.mu) ** 2) + np.trace(a.sigma + b.sigma - 2 * np.real(root))


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


def test_unit_mean_shift_in_d_dimensions_is_d():
    near(frechet(gaussian(np.ones(2048), np.eye(2048)), gaussian(np.zeros(2048), np.eye(2048))), 2048)


def test_symmetry_rotation_and_scale():
    rng = np.random.default_rng(1)
    a, b = (gaussian(rng.standard_normal(8), covariance(rng, 8)) for _ in range(2))
    q = np.linalg.qr(rng.standard_normal((8, 8)))[0]
    turned = [gaussian(q @ m.mu, q @ m.sigma @ q.T) for m in (a, b)]
    scaled = [gaussian(3 * m.mu, 9 * m.sigma) for m in (a, b)]
    near(frechet(b, a), frechet(a, b))
    near(frechet(*turned), frechet(a, b))
    near(frechet(*scaled), 9 * frechet(a, b))


def test_covariances_are_unbiased():
    """A set against itself written twice: with n - 1 the covariances differ by the factor 2 (n - 1) / (2n - 1)."""
    x = np.random.default_rng(2).standard_normal((50, 64))  # rank 49 of 64
    once, twice = of(x), of(np.concatenate([x, x]))
    near(frechet(once, twice), (1 - np.sqrt(2 * 49 / 99)) ** 2 * np.trace(once.sigma))
    np.testing.assert_allclose(once.sigma, np.cov(x, rowvar=False), rtol=0, atol=1e-12)


def test_the_distance_of_a_set_to_itself_is_zero():
    for n, d in ((300, 32), (40, 256), (4, 4)):
        m = of(np.random.default_rng(1).standard_normal((n, d)).clip(0))
        assert frechet(m, m) < 1e-6 * np.trace(m.sigma)


@pytest.mark.filterwarnings("ignore:The `disp` argument")
def test_distance_is_that_of_sqrtm_where_images_outnumber_features():
    rng = np.random.default_rng(3)
    a, b = (of((rng.standard_normal((400, 48)) @ covariance(rng, 48) + shift).clip(0)) for shift in (0, 0.5))
    near(frechet(a, b), oracle(a, b), 1e-9)


@pytest.mark.filterwarnings("ignore:The `disp` argument")
def test_distance_is_exact_where_images_are_fewer_than_features():
    """tr (S S_r)^(1/2) is the sum of the singular values of A^T B / (n - 1), A and B the centred features."""
    rng = np.random.default_rng(4)
    x, y = (rng.standard_normal((60, 256)) * np.linspace(1, 0.01, 256) for _ in range(2))
    a, b, centred = of(x), of(y), [z - z.mean(0) for z in (x, y)]
    nuclear = np.linalg.svd(centred[0] @ centred[1].T, compute_uv=False).sum() / 59
    exact = np.sum((a.mu - b.mu) ** 2) + np.trace(a.sigma) + np.trace(b.sigma) - 2 * nuclear
    near(frechet(a, b), exact, 1e-10)
    near(oracle(a, b), exact, 1e-4)  # the usual way is off here


def stream(x, sizes):
    found = None
    for part in np.split(x, np.cumsum(sizes)):
        found = merge(found, of(part)) if len(part) else found
    return found


def test_moments_do_not_depend_on_order_or_batches():
    rng = np.random.default_rng(5)
    x, other = rng.standard_normal((500, 16)) * 3 + 7, of(rng.standard_normal((100, 16)))
    whole = of(x)
    for m in (stream(x, [1] * 499), stream(x, [7] * 71), stream(x, [64] * 7), stream(rng.permutation(x), [250]),
              merge(stream(x[:250], [100]), stream(x[250:], [30]))):
        assert m.n == 500  # the last, smaller batch included
        near(frechet(m, other), frechet(whole, other), 1e-10)


def test_moments_survive_a_large_mean():
    x = np.random.default_rng(6).standard_normal((100_000, 4)) + 1e4
    m = stream(x, [1000] * 99)
    np.testing.assert_allclose(m.sigma, np.cov(x, rowvar=False), rtol=0, atol=1e-6)
    rough = (x.astype(np.float32) ** 2).sum(0, dtype=np.float32) / 1e5 - x.astype(np.float32).mean(0) ** 2
    assert abs(rough - x.var(0)).max() > 1e-2  # sums of squares in float32 would not


def test_kld_values():
    uniform = np.ones(10)
    near(kld(uniform, [1] * 9 + [0]), 1.5170, 1e-4)   # one class lost
    near(kld(uniform, [1] * 8 + [0, 0]), 3.0451, 1e-4)
    near(kld(uniform, [1] * 2 + [0] * 8), 12.5726, 1e-4)  # eight lost
    near(kld([1] * 9 + [0], uniform), 0.1054, 1e-3)   # the other direction
    near(kld(np.ones(10), np.full(10, 777)), 0)       # counts and frequencies are the same
    near(kld([1, 0], [1, 1]), np.log(2), 1e-6)


# ------------------------------------------------------------------------------------------------ FID's network

@pytest.fixture(scope="module")
def net():
    """FID's network with random weights that keep activations near 1 through all its layers."""
    torch.manual_seed(0)
    net = eval_fid.inception_network()
    for m in net.modules():
        if isinstance(m, nn.Conv2d):
            m.weight.data.normal_(0, (2 / m.weight[0].numel()) ** 0.5)
        elif isinstance(m, nn.BatchNorm2d):
            for value, centre in ((m.weight, 1), (m.bias, 0), (m.running_mean, 0)):
                value.data.normal_(centre, 0.1)
    return net


@pytest.fixture(scope="module")
def pictures():
    return torch.randint(0, 256, (3, 3, 32, 32), generator=torch.Generator().manual_seed(1), dtype=torch.uint8)


def test_network_has_the_canonical_size():
    net = eval_fid.inception_network()
    assert len(net.state_dict()) == 566
    assert sum(p.numel() for p in net.parameters()) == 23_850_960
    assert not any(p.requires_grad for p in net.parameters()) and not any(m.training for m in net.modules())


def pytorch_fid_network(state):
    """pytorch-fid's own network, put together as it does but for the download."""
    blocks = pytorch_fid.inception
    theirs = blocks._inception_v3(num_classes=1008, aux_logits=False, weights=None)
    for name, channels, pool in (("5b", 192, 32), ("5c", 256, 64), ("5d", 288, 64)):
        setattr(theirs, f"Mixed_{name}", blocks.FIDInceptionA(channels, pool_features=pool))
    for name, width in (("6b", 128), ("6c", 160), ("6d", 160), ("6e", 192)):
        setattr(theirs, f"Mixed_{name}", blocks.FIDInceptionC(768, channels_7x7=width))
    theirs.Mixed_7b, theirs.Mixed_7c = blocks.FIDInceptionE_1(1280), blocks.FIDInceptionE_2(2048)
    theirs.load_state_dict(state)
    theirs.fc = nn.Identity()
    return theirs.eval()


def test_features_are_those_of_pytorch_fid(net, pictures):
    theirs, ours = pytorch_fid_network(net.state_dict()), eval_fid.inception_network()
    ours.load_state_dict(net.state_dict())
    with torch.no_grad():
        expected = theirs(2 * F.interpolate(pictures / 255, size=(299, 299), mode="bilinear") - 1)
    assert 0.1 < expected.abs().mean() < 10
    features = eval_fid.fid_features(ours, "pytorch-fid", CPU)(pictures)
    assert features.shape == (3, 2048)
    torch.testing.assert_close(features, expected, rtol=0, atol=1e-5)


if importlib.util.find_spec("torch_fidelity"):  # not required: it does not install everywhere
    def test_features_are_those_of_torch_fidelity(net, pictures, tmp_path):
        from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
        torch.save(net.state_dict(), tmp_path / "weights.pth")
        theirs = FeatureExtractorInceptionV3("inception-v3-compat", ["2048"], str(tmp_path / "weights.pth")).eval()
        ours = eval_fid.inception_network()
        ours.load_state_dict(net.state_dict())
        features = eval_fid.fid_features(ours, "tf1", CPU)(pictures)
        torch.testing.assert_close(features, theirs(pictures)[0], rtol=0, atol=1e-5)


def test_each_patch_matters(net, pictures):
    x = (eval_fid.resize_matrix(32, "tf1") @ pictures[:1].float() @ eval_fid.resize_matrix(32, "tf1").T - 128) / 128
    expected = net(x)
    for names, block in ((("5b", "5c", "5d"), inception.InceptionA), (("6b", "6c", "6d", "6e"), inception.InceptionC),
                         (("7b",), inception.InceptionE), (("7c",), inception.InceptionE)):
        patched = [getattr(net, f"Mixed_{name}") for name in names]
        for one in patched:
            one._forward = block._forward.__get__(one)  # torchvision's own
        assert (net(x) - expected).abs().max() > 1e-3, names
        for one in patched:
            del one._forward
    torch.testing.assert_close(net(x), expected)


def test_resize_grids():
    x = torch.randint(0, 256, (1, 1, 5, 7)).float()
    for protocol in ("tf1", "pytorch-fid"):
        resized = eval_fid.resize_matrix(5, protocol) @ x @ eval_fid.resize_matrix(7, protocol).T
        slow = torch.empty(299, 299)
        for i in range(0, 299, 13):
            for j in range(0, 299, 13):
                a, b = i * 5 / 299, j * 7 / 299
                if protocol == "pytorch-fid":
                    a, b = max(0, (i + 0.5) * 5 / 299 - 0.5), max(0, (j + 0.5) * 7 / 299 - 0.5)
                i0, j0, f, g = int(a), int(b), a - int(a), b - int(b)
                i1, j1 = min(i0 + 1, 4), min(j0 + 1, 6)
                slow[i, j] = ((1 - f) * ((1 - g) * x[0, 0, i0, j0] + g * x[0, 0, i0, j1])
                              + f * ((1 - g) * x[0, 0, i1, j0] + g * x[0, 0, i1, j1]))
        torch.testing.assert_close(resized[0, 0, ::13, ::13], slow[::13, ::13], rtol=0, atol=2e-3)
        assert resized[0, 0, 0, 0] == x[0, 0, 0, 0]
    torch.testing.assert_close(resized, F.interpolate(x, size=(299, 299), mode="bilinear"), rtol=0, atol=2e-3)


class Corner(nn.Module):
    def forward(self, x):
        assert x.shape[1:] == (3, 299, 299)
        return x[:, :, 0, 0]


def test_input_range_and_quantisation():
    u8 = torch.tensor([0, 128, 255], dtype=torch.uint8).view(3, 1, 1, 1).expand(3, 1, 4, 4)
    for protocol, expected in (("tf1", [-1, 0, 0.9921875]), ("pytorch-fid", [-1, 1 / 255, 1])):
        extract = eval_fid.fid_features(Corner(), protocol, CPU)
        torch.testing.assert_close(extract(u8), torch.tensor(expected)[:, None].expand(3, 3), rtol=0, atol=1e-6)
        assert torch.equal(extract(u8), extract(u8.expand(3, 3, 4, 4)))  # grey is repeated
    extract = eval_fid.fid_features(Corner(), "tf1", CPU)
    x = torch.tensor([-1, 0.0, 0.9999]).view(3, 1, 1, 1).expand(3, 1, 4, 4)  # a float is truncated to 0, 127, 254
    torch.testing.assert_close(extract(x)[:, 0], torch.tensor([-1, -1 / 128, 126 / 128]))


# --------------------------------------------------------------------------------------------------- weight files

class Server(BaseHTTPRequestHandler):
    """GET /whole, /half (half of it, then the connection closes), /html, anything else is not found."""
    body = bytes(range(256)) * 400

    def do_GET(self):
        body = {"/whole": self.body, "/half": self.body, "/html": b"<html>try later</html>"}.get(self.path)
        self.send_response(200 if body else 404)
        self.send_header("Content-Length", str(len(body or b"")))
        self.end_headers()
        self.wfile.write((body or b"")[: len(self.body) // 2 if self.path == "/half" else None])

    def log_message(self, *args):
        pass


@pytest.fixture
def server(tmp_path, monkeypatch):
    """The address of a local server; torch.hub's cache is an empty folder meanwhile."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "hub"))
    server = HTTPServer(("127.0.0.1", 0), Server)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


SHA256 = hashlib.sha256(Server.body).hexdigest()


def test_weights_are_downloaded_once_from_the_first_mirror_that_has_them(server, tmp_path):
    urls = [f"{server}/missing", f"{server}/html", f"{server}/half", f"{server}/whole"]
    path = eval_fid.weights("--weights", None, SHA256, urls)
    assert path.read_bytes() == Server.body and path.is_relative_to(tmp_path / "hub")
    assert [f.name for f in path.parent.iterdir()] == [path.name]
    assert eval_fid.weights("--weights", None, SHA256, [f"{server}/missing"]) == path  # any mirror's name, no network
    path.write_bytes(Server.body[:1000] + bytes([Server.body[1000] ^ 1]) + Server.body[1001:])
    with pytest.raises(InputError, match="damaged or another file"):  # a flipped bit, found at every start
        eval_fid.weights("--weights", None, SHA256, urls)


def test_weights_that_cannot_be_had(server, tmp_path):
    with pytest.raises(InputError) as error:
        eval_fid.weights("--weights", None, SHA256, [f"{server}/half", f"{server}/html", "http://127.0.0.1:9/closed"])
    for part in ("sent something else", "refused", SHA256, f"{server}/half", str(tmp_path / "hub"), "--weights"):
        assert part in str(error.value)
    cache = Path(torch.hub.get_dir(), "checkpoints")
    assert cache.is_relative_to(tmp_path) and list(cache.iterdir()) == []
    cache.rmdir()
    cache.write_text("in the way")
    with pytest.raises(InputError, match="neither at hand nor to be downloaded"):
        eval_fid.weights("--weights", None, SHA256, [f"{server}/whole"])


def test_a_bad_weights_file_is_refused(tmp_path):
    for content in (b"", b"<html></html>", Server.body[:512], Server.body[:-1], Server.body + b"0"):
        (tmp_path / "bad").write_bytes(content)
        with pytest.raises(InputError, match="damaged or another file"):
            eval_fid.weights("--weights", tmp_path / "bad", SHA256, ["http://127.0.0.1:9/x"])
    with pytest.raises(InputError, match="cannot read .*nothing"):
        eval_fid.weights("--weights", tmp_path / "nothing", SHA256, ["http://127.0.0.1:9/x"])


def test_a_pickle_that_runs_code_is_not_opened(main, tmp_path):
    class Malicious:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "executed"),)
    torch.save({"model": Malicious()}, tmp_path / "bad.pth")
    np.save(tmp_path / "x.npy", np.zeros((4, 8, 8), np.uint8))
    done = main("eval_fid.py", "x.npy", "--reference", "shapes", "--inception-weights", "bad.pth",
                "--save-stats", "s.npz")
    assert done.returncode == 2 and done.stdout == "" and not (tmp_path / "s.npz").exists()
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1 and "bad.pth" in done.stderr
    assert not (tmp_path / "executed").exists()


def test_fid_alone_without_weights_or_network(script, tmp_path):
    np.save(tmp_path / "x.npy", np.zeros((4, 8, 8), np.uint8))
    offline = {**os.environ, **NO_NETWORK, "TORCH_HOME": str(tmp_path)}
    done = script("eval_fid.py", "x.npy", "--reference", "shapes", env=offline)
    assert done.returncode == 2 and done.stdout == "" and done.stderr.count("\n") == 1
    sha256, urls = eval_fid.WEIGHTS["--inception-weights"]
    for part in ("error: pt_inception-2015-12-05-6726825d.pth", sha256, *urls, "--inception-weights"):
        assert part in done.stderr


# ------------------------------------------------------------------------------------------- images from people

def tiny(args=None, device=CPU):
    """An extractor in FID's place: one random convolution, 16 features."""
    weight = torch.randn(16, 3, 3, 3, generator=torch.Generator().manual_seed(2)) / 5

    def extract(x):
        x = (x if x.dtype == torch.uint8 else data.quantize(x)).float() / 255
        return F.conv2d(x.expand(-1, 3, -1, -1), weight).relu().mean((2, 3))
    return extract, dict(network="tiny", name=args.protocol if args else "tf1")


def compared(capsys, *argv):
    """The record printed for these arguments, with `tiny` for the network."""
    eval_fid.compare(get_args([str(a) for a in argv]), CPU, tiny)
    return json.loads(capsys.readouterr().out)


@pytest.fixture
def grey():
    return np.random.default_rng(7).integers(0, 256, (12, 16, 16), dtype=np.uint8)


def write_pictures(folder, images, suffix=".png"):
    folder.mkdir()
    for i, image in enumerate(images):
        Image.fromarray(image).save(folder / f"{i:03}{suffix}")
    return folder


def test_every_form_of_the_same_images_gives_the_same_number(tmp_path, grey, capsys):
    rgb = np.repeat(grey[..., None], 3, 3)
    np.save(tmp_path / "nhw.npy", grey)
    np.save(tmp_path / "nhwc.npy", rgb)
    np.save(tmp_path / "n1hw.npy", grey[:, None])
    np.savez(tmp_path / "nchw.npz", arr_0=rgb.transpose(0, 3, 1, 2), arr_1=np.arange(12))
    np.savez_compressed(tmp_path / "named.npz", labels=np.arange(12), images=grey)
    sources = [tmp_path / name for name in ("nhw.npy", "nhwc.npy", "n1hw.npy", "nchw.npz", "named.npz")]
    sources += [write_pictures(tmp_path / "grey", grey), write_pictures(tmp_path / "rgb", rgb, ".PNG"),
                write_pictures(tmp_path / "bmp", rgb, ".bmp"), write_pictures(tmp_path / "tif", grey, ".tif")]
    (tmp_path / "grey" / "inner").mkdir()
    (tmp_path / "grey" / ".hidden.png").write_bytes(b"")  # neither is looked at, nor is a text file
    (tmp_path / "grey" / "notes.txt").write_text("about these pictures")
    reference = write_array(tmp_path / "reference.npy", grey[:8] // 2)
    records = [compared(capsys, source, "--reference", reference, "--batch-size", 5) for source in sources]
    assert records[0]["fid"] > 0.01
    for record in records:
        near(record["fid"], records[0]["fid"], 1e-5)
        assert (record["n"], record["n_real"], record["fid_floor"]) == (12, 8, None)


def test_record_of_a_comparison(tmp_path, grey, capsys):
    np.save(tmp_path / "x.npy", grey)
    argv = (tmp_path / "x.npy", "--reference", "shapes:test", "--n", 10)
    record = compared(capsys, *argv)
    assert record == compared(capsys, *argv) == {**compared(capsys, *argv, "--batch-size", 3), "fid": record["fid"],
                                                 "fid_floor": record["fid_floor"]}
    assert (record["n"], record["n_real"], record["n_floor"], record["rank_deficient"]) == (10, 5000, 10, True)
    assert record["image_size"] == [16, 16] and record["versions"]["torch"] == torch.__version__
    assert record["protocol"] == dict(network="tiny", name="tf1")
    images, _ = data.load_images("shapes", "test", "data", 16)
    near(record["fid"], frechet(of(tiny()[0](torch.as_tensor(grey[:10, None]))), of(tiny()[0](images))), 1e-5)
    assert 0 < record["fid_floor"] < record["fid"]  # ten real training images
    assert compared(capsys, "shapes:test", "--reference", "shapes:test")["fid"] < 1e-6


def test_saved_statistics(tmp_path, grey, capsys):
    np.save(tmp_path / "x.npy", grey)
    np.save(tmp_path / "y.npy", grey[:, ::-1] // 2)
    argv = (tmp_path / "x.npy", "--reference", tmp_path / "y.npy", "--save-stats", tmp_path / "x.npz")
    fid = compared(capsys, *argv)["fid"]
    eval_fid.compare(get_args([str(tmp_path / "y.npy"), "--save-stats", str(tmp_path / "y.npz")]), CPU, tiny)
    assert capsys.readouterr().out == ""
    with np.load(tmp_path / "x.npz") as file:
        assert file["mu"].shape == (16,) and file["sigma"].shape == (16, 16) and file["n"] == 12
    record = compared(capsys, tmp_path / "x.npz", "--reference", tmp_path / "y.npz")
    near(record["fid"], fid, 1e-9)
    assert record["fid_floor"] is record["n_floor"] is None and record["image_size"] == [16, 16]
    refused(tmp_path / "x.npz", "has 12 images, not 5", "--n", "5")
    refused(tmp_path / "x.npz", "another protocol", "--protocol", "pytorch-fid")
    np.savez(tmp_path / "theirs.npz", mu=np.zeros(16), sigma=np.eye(16))
    refused(tmp_path / "theirs.npz", "another protocol")


def refused(source, sentence, *more):
    with pytest.raises(InputError, match=sentence) as error:
        eval_fid.compare(get_args([str(source), "--reference", "shapes", *more]), CPU, tiny)
    assert "\n" not in str(error.value)


def test_few_images_are_said_to_be_few(tmp_path, grey, capsys):
    np.save(tmp_path / "x.npy", grey)
    eval_fid.compare(get_args([str(tmp_path / "x.npy"), "--reference", "shapes"]), CPU, tiny)
    assert "warning: 12 images are fewer than FID's 2048 features" in capsys.readouterr().err
    eval_fid.compare(get_args(["shapes:train", "--reference", "shapes:test"]), CPU, tiny)
    text = capsys.readouterr()
    assert text.err == "" and not json.loads(text.out)["rank_deficient"]
    write_pictures(tmp_path / "jpegs", grey, ".jpg")
    eval_fid.compare(get_args([str(tmp_path / "jpegs"), "--reference", "shapes"]), CPU, tiny)
    assert "JPEG" in capsys.readouterr().err


def test_bad_arrays_are_refused(tmp_path, grey):
    def case(sentence, array, name="x.npy"):
        np.save(tmp_path / name, array)
        refused(tmp_path / name, sentence)
    bad = grey.astype(np.float32)
    case("holds float32", bad)
    bad[3, 4, 5] = np.nan
    case("image 3 is not finite", bad)
    case("holds uint16", grey.astype(np.uint16))
    case("holds int64", grey.astype(np.int64))
    case("shape", grey[0])
    case("shape", grey[:0])
    case("shape", np.repeat(grey[..., None], 2, 3))
    case("shape", np.repeat(grey[..., None], 4, 3))                   # alpha
    case("shape", np.zeros((5, 3, 16, 3), np.uint8))                  # which axis is the channels?
    case("one image", grey[:1])
    refused(write_array(tmp_path / "few.npy", grey), "has 12 images, not 13", "--n", "13")
    refused(write_array(tmp_path / "wide.npy", grey[:, :8]), "compare square images")
    np.savez(tmp_path / "empty.npz")
    refused(tmp_path / "empty.npz", "shape")
    np.save(tmp_path / "pickle.npy", np.array([{}, {}], dtype=object), allow_pickle=True)
    refused(tmp_path / "pickle.npy", "not a whole")
    (tmp_path / "text.npy").write_text("no array")
    refused(tmp_path / "text.npy", "not a whole")
    refused(tmp_path / "missing.npy", "not a whole")
    np.savez(tmp_path / "x.npz", images=grey)
    for path in (tmp_path / "x.npz", tmp_path / "few.npy"):
        whole = path.read_bytes()
        for cut in (0, 10, len(whole) // 2, len(whole) - 1):
            path.write_bytes(whole[:cut])
            refused(path, "not a whole")
    path = write_array(tmp_path / "other.npy", grey[:, :8, :8])
    with pytest.raises(InputError, match="give both one size"):
        eval_fid.compare(get_args([str(path), "--reference", str(write_array(tmp_path / "y.npy", grey))]), CPU, tiny)
    with pytest.raises(InputError, match="say shapes:train or shapes:test"):
        eval_fid.compare(get_args([str(path), "--reference", "shapes:val"]), CPU, tiny)


def write_array(path, array):
    np.save(path, array)
    return path


def png16(rgb):
    """A PNG of 16 bits a channel, which Pillow cannot write for RGB but reads as if it had 8."""
    h, w, _ = rgb.shape
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in rgb)

    def chunk(name, content):
        return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))
    return (b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", struct.pack(">IIBBBBB", w, h, 16, 2, 0, 0, 0))
            + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b""))


def test_bad_pictures_are_refused_by_name(tmp_path, grey):
    folder, rgb = write_pictures(tmp_path / "images", grey), np.repeat(grey[0][..., None], 3, 2)
    rgba = np.dstack([rgb, rgb[..., :1]])
    see_through = Image.fromarray(grey[0]).convert("P")
    see_through.info["transparency"] = 0
    deep = Image.fromarray((grey[0].astype(np.uint16) * 257))
    cmyk, floats = Image.fromarray(rgb).convert("CMYK"), Image.fromarray(grey[0] / np.float32(255))
    for image, suffix in ((Image.fromarray(rgba), "png"), (Image.fromarray(rgba[..., 2:]), "png"), (deep, "png"),
                          (see_through, "png"), (deep, "tif"), (cmyk, "tif"), (floats, "tiff")):
        bad = folder / f"bad.{suffix}"
        image.save(bad)
        refused(folder, f"{bad.name} is 16-bit, transparent or of mode")
        bad.unlink()
    bad = folder / "zzz.png"
    bad.write_bytes(png16(rgb))
    refused(folder, "zzz.png is 16-bit")
    whole = (folder / "000.png").read_bytes()
    for content in (b"", whole[:20], whole[:len(whole) // 2], whole[:-20], b"GIF89a", b"no picture"):
        bad.write_bytes(content)
        refused(folder, "zzz.png is not a whole picture")
    Image.fromarray(grey[0, :8]).save(bad)
    refused(folder, r"zzz.png is \[8, 16\], 000.png \[16, 16\]")


def test_a_flipped_byte_never_changes_a_picture_unnoticed(tmp_path, grey):
    buffer = io.BytesIO()
    Image.fromarray(grey[0, :4, :4]).save(buffer, "png")
    whole, path, refusals = buffer.getvalue(), tmp_path / "x.png", 0
    path.write_bytes(whole)
    expected = eval_fid.read_picture(path)
    for i in range(len(whole)):
        path.write_bytes(whole[:i] + bytes([whole[i] ^ 4]) + whole[i + 1:])
        try:
            assert torch.equal(eval_fid.read_picture(path), expected)
        except InputError:
            refusals += 1
    assert refusals > len(whole) / 2


def test_folders_without_pictures_are_refused(tmp_path):
    (tmp_path / "empty" / "inner").mkdir(parents=True)
    Image.new("L", (8, 8)).save(tmp_path / "empty" / "inner" / "a.png")
    (tmp_path / "empty" / "notes.txt").write_text("no picture")
    refused(tmp_path / "empty", "holds no pictures")
    refused(tmp_path / "nothing", "not a whole .npy or .npz")


# ----------------------------------------------------------------------------------------- labeller, runs

def test_labeller_networks():
    count = {args: sum(p.numel() for p in eval_fid.resnet18(*args).parameters())
             for args in (("scratch", 3, 10), ("imagenet", 3, 10), ("scratch", 1, 10, 16))}
    assert count == {("scratch", 3, 10): 11_173_962, ("imagenet", 3, 10): 11_181_642, ("scratch", 1, 10, 16): 701_178}
    assert eval_fid.resnet18("scratch", 1, 10).fc.in_features == 512
    assert eval_fid.resnet18("scratch", 1, 10)(torch.zeros(2, 1, 32, 32)).shape == (2, 10)
    assert eval_fid.resnet18("imagenet", 3, 100)(torch.zeros(2, 3, 32, 32)).shape == (2, 100)


def test_augmentation():
    torch.manual_seed(0)
    x = torch.linspace(-1, 1, 256).view(1, 1, 16, 16).expand(400, 1, 16, 16)
    plain = eval_fid.augment(x, warp=False)
    mirrored = (plain - x.flip(3)).flatten(1).std(1) < (plain - x).flatten(1).std(1)
    assert 150 < mirrored.sum() < 250
    noise = plain - torch.where(mirrored.view(-1, 1, 1, 1), x.flip(3), x)
    assert abs(noise.mean()) < 1e-3 and abs(noise.std() - 0.1) < 1e-3
    square = F.pad(torch.ones(400, 1, 8, 8), (12, 12, 12, 12), value=-1.0)
    warped = eval_fid.augment(square)
    light = (warped > 0).float()
    assert abs(light.sum((1, 2, 3)) - 64).max() <= 16           # turned and moved, not resized
    columns, rows = ((light.sum((1, axis)) * torch.arange(32)).sum(1) / light.sum((1, 2, 3)) for axis in (2, 3))
    for centre in (columns, rows):
        assert 2 < (centre - 15.5).abs().max() < 4              # at most 3 of 32 pixels, plus a little from the turn
    assert abs(warped[:, :, 0, 0].mean() + 1) < 0.05            # what comes in is black


def idx(path, array):
    path.write_bytes(struct.pack(f">HBB{array.ndim}I", 0, 8, array.ndim, *array.shape) + array.tobytes())


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """A data folder in Fashion-MNIST's format with 6000 + 1000 images of `shapes`: a labeller trains in seconds."""
    folder = tmp_path_factory.mktemp("small")
    for split, name, n in (("train", "train", 6000), ("test", "t10k", 1000)):
        images, y = data.load_images("shapes", split, "data", 28)
        idx(folder / f"{name}-images-idx3-ubyte", images[:n, 0].numpy())
        idx(folder / f"{name}-labels-idx1-ubyte", y[:n].numpy().astype(np.uint8))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CL_DATA_UNVERIFIED", "1")
        yield folder


def test_labeller_training_is_deterministic_and_kept_with_its_accuracy(tmp_path, small):
    states = []
    for name, key in (("a", 1), ("b", 1), ("c", 2)):
        eval_fid.train_labeller(tmp_path / name, "fashion-mnist", "laptop", small, CPU, key=key, width=4)
        states.append(run.load(tmp_path / name))
    assert states[0]["sha256"] == states[1]["sha256"] != states[2]["sha256"]
    state = states[0]
    assert state["sha256"] == eval_fid.state_hash(state["model"]) and state["test_accuracy"] > 0.8
    assert {k: state["config"][k] for k in ("dataset", "scale", "image_size", "seed", "kind")} == dict(
        dataset="fashion-mnist", scale="laptop", image_size=16, seed=1, kind="scratch")
    extract, head, about = eval_fid.load_labeller(tmp_path / "a", "fashion-mnist", 16, CPU)
    images, y = data.load_images("fashion-mnist", "test", small, 16)
    near((head(extract(images)).argmax(1) == y).double().mean().item(), state["test_accuracy"], 2e-3)
    torch.testing.assert_close(extract(images[:8]), extract(data.normalize(images[:8])))
    assert about["sha256"] == state["sha256"] and about["features"] == 32 == extract(images[:2]).shape[1]

    def case(sentence, dataset="fashion-mnist", **changes):
        run.save(tmp_path / "bad", {**state, **changes})
        with pytest.raises(InputError, match=sentence):
            eval_fid.load_labeller(tmp_path / "bad", dataset, 16, CPU)
    case("has 0.7900 test accuracy on fashion-mnist, KLD and frd need 0.8", test_accuracy=0.79)
    case("has 0.8700 test accuracy on fashion-mnist, KLD and frd need 0.88", test_accuracy=0.87,
         config={**state["config"], "scale": "paper"})
    case("has nan test accuracy", test_accuracy=float("nan"))
    case("does not hold the weights", model={k: v + 1 for k, v in state["model"].items()})
    case("is for fashion-mnist of side 16", "shapes")
    case("is not a labeller", model={})
    case("is not a labeller", config={})
    with pytest.raises(InputError, match="python eval_fid.py --train-resnet18 cifar10"):
        eval_fid.load_labeller(tmp_path / "missing", "cifar10", 32, CPU)


def test_labeller_by_command(tmp_path, small, capsys):
    torch.backends.cudnn.allow_tf32 = True
    eval_fid.main(["--train-resnet18", "fashion-mnist", "--scale", "laptop", "--epochs", "2", "--seed", "3",
                   "--device", "cpu", "--data-dir", str(small), "--labeller-path", str(tmp_path / "new" / "x.pt")])
    state = run.load(tmp_path / "new" / "x.pt")
    assert (state["config"]["epochs"], state["config"]["seed"], state["config"]["width"]) == (2, 3, 16)
    assert "1.0000 test accuracy" in capsys.readouterr().out and not torch.backends.cudnn.allow_tf32
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(InputError, match="cannot write to .*--labeller-path"):
        eval_fid.train_labeller(tmp_path / "file" / "x.pt", "fashion-mnist", "laptop", small, CPU)


def test_imagenet_labeller_starts_from_verified_weights_and_a_bad_one_is_not_kept(tmp_path, monkeypatch):
    monkeypatch.setenv("CL_DATA_UNVERIFIED", "1")
    noise = np.random.default_rng(0).integers(0, 256, (60, 28, 28), dtype=np.uint8)  # nothing can be learned from it
    for split in ("train", "t10k"):
        idx(tmp_path / f"{split}-images-idx3-ubyte", noise)
        idx(tmp_path / f"{split}-labels-idx1-ubyte", np.arange(60, dtype=np.uint8) % 10)
    start = tmp_path / "resnet18.pth"
    torch.save(eval_fid.resnet18("imagenet", 3, 1000).state_dict(), start)
    job = (tmp_path / "out.pt", "fashion-mnist", "paper", tmp_path, CPU, 42, "imagenet", start)
    with pytest.raises(InputError, match="--resnet18-weights"):
        eval_fid.train_labeller(*job, epochs=1)
    known = hashlib.sha256(start.read_bytes()).hexdigest(), ["http://127.0.0.1:9/x"]
    monkeypatch.setitem(eval_fid.WEIGHTS, "--resnet18-weights", known)
    with pytest.raises(InputError, match="test accuracy, KLD and frd need 0.88: it is not kept"):
        eval_fid.train_labeller(*job, epochs=1)
    assert not (tmp_path / "out.pt").exists()


CONFIG = dict(dataset="fashion-mnist", unet="laptop", image_size=16, class_tasks=[[0, 1], [2, 3]], sample_steps=2,
              schedule="zero-snr", seed=42, scale="laptop", tasks=2)


def make_run(folder, data_dir, **changes):
    """A run folder of two tasks; their models are as they were initialised."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps({**CONFIG, "data_dir": str(data_dir), **changes}))
    for k in (1, 2):
        torch.manual_seed(k)
        run.save(folder / f"task{k}.pt", {"model": UNet(**NETS["laptop"]).state_dict(), "config": CONFIG})
    return folder


LABELLER = "runs/labellers/fashion-mnist-16.pt"


@pytest.fixture(scope="module")
def home(tmp_path_factory, small):
    """A folder with a run that was evaluated by the command line, which also trained the labeller."""
    home = tmp_path_factory.mktemp("home")
    make_run(home / "run", small)
    done = subprocess.run([sys.executable, str(ROOT / "eval_fid.py"), "run", "--n", "100"], cwd=home,
                          capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    home.joinpath("stdout").write_text(done.stdout)
    home.joinpath("stderr").write_text(done.stderr)
    return home


@pytest.fixture
def labelled(home, monkeypatch):
    """evaluate(folder, ...) of another run folder with the labeller of `home`: its records."""
    monkeypatch.chdir(home)

    def evaluate(folder, *more, load_fid=tiny):
        eval_fid.evaluate_run(Path(folder), get_args([str(folder), "--n", "50", *more]), CPU, load_fid)
        return json.loads((Path(folder) / "eval.json").read_text())
    return evaluate


def test_a_run_is_evaluated_by_one_command(home):
    records, out = json.loads((home / "run" / "eval.json").read_text()), (home / "stdout").read_text()
    assert "training this labeller" in out and "task 2: fid -, frd" in out and "--fid measures it" in out
    assert "warning: 100 images" in (home / "stderr").read_text()
    assert [r["task"] for r in records] == [1, 2]
    for k, r in enumerate(records, 1):
        assert r["fid"] is None and "--fid" in r["fid_missing"] and r["rank_deficient"]
        assert r["frd"] > 10 * r["frd_floor"] > 0 and sum(r["counts"]) == 100 and len(r["counts"]) == 10
        p = np.repeat([0.5 / k, 0], [2 * k, 10 - 2 * k])
        q = np.array(r["counts"]) / 100
        near(r["kld"], kld(p, q))
        near(r["kld_reverse"], kld(q, p))
        near(r["ard"], abs(p - q).sum() / 2)
        assert r["kld_real"] < 0.1 and 0.1 < r["confidence"] <= 1
        protocol = r["protocol"]
        assert (protocol["n"], protocol["n_real"], protocol["n_floor"]) == (100, 200 * k, 100)
        assert (protocol["steps"], protocol["seed"], protocol["schedule"]) == (2, 42, "zero-snr")
        assert protocol["fid"] is None and protocol["image_size"] == 16 and len(protocol["checkpoint"]) == 64
        assert protocol["reference"] == f"fashion-mnist, test images of classes {list(range(2 * k))}"
        assert protocol["frd"]["features"] == 128 and protocol["frd"]["test_accuracy"] > 0.8
        assert r["versions"]["torch"] == torch.__version__ and r["device"] in ("cpu", "cuda")
    assert records[0]["share_old"] is None
    near(records[1]["share_old"], sum(records[1]["counts"][:2]) / 100)


def test_records_are_kept_skipped_and_replaced(labelled, small, capsys, tmp_path):
    folder = make_run(tmp_path / "run", small)
    first = labelled(folder)
    assert [r["fid"] for r in first] == [None, None]
    capsys.readouterr()
    assert labelled(folder) == first and capsys.readouterr().out.count("evaluated before") == 2
    with_fid = labelled(folder, "--fid")                    # takes the place of those without
    assert len(with_fid) == 2 and all(r["fid"] > r["fid_floor"] > 0 for r in with_fid)
    assert [r["frd"] for r in with_fid] == [r["frd"] for r in first]
    assert all(r["fid_missing"] is None and r["protocol"]["fid"]["network"] == "tiny" for r in with_fid)
    assert labelled(folder) == with_fid                     # and does where FID is not asked for
    assert len(labelled(folder, "--seed", "1")) == 4        # another protocol stands beside them
    torch.manual_seed(9)
    run.save(folder / "task2.pt", {"model": UNet(**NETS["laptop"]).state_dict(), "config": CONFIG})
    after = labelled(folder)                                # records of a model that is gone are dropped
    assert [(r["task"], r["protocol"]["seed"]) for r in after] == [(1, 42), (1, 1), (2, 42)]


def test_batch_size_changes_no_number(labelled, small, tmp_path):
    a, b = (labelled(make_run(tmp_path / size, small), "--fid", "--batch-size", size) for size in ("50", "7"))
    for one, other in zip(a, b, strict=True):
        assert one["counts"] == other["counts"] and one["protocol"] == other["protocol"]
        for key in ("fid", "frd", "fid_floor", "frd_floor", "confidence"):
            near(one[key], other[key], 1e-4)
    x = torch.stack([eval_fid.noise(42, i, (1, 16, 16)) for i in range(200)])
    assert torch.equal(eval_fid.noise(42, 3, (1, 16, 16)), x[3]) and not torch.equal(x[3], x[4])
    assert abs(x.mean()) < 0.02 and abs(x.std() - 1) < 0.02


def test_same_run_twice_gives_the_same_records(labelled, small, tmp_path):
    one, other = ([{**r, "seconds": 0} for r in labelled(make_run(tmp_path / name, small))] for name in ("a", "b"))
    assert one == other


def test_real_images_measure_as_real(home, small):
    extract, head, _ = eval_fid.load_labeller(home / LABELLER, "fashion-mnist", 16, CPU)
    (test, y), (train, _) = (data.load_images("fashion-mnist", split, small, 16) for split in ("test", "train"))
    real, counts, confidence = measure(test.split(100), extract, head, tiny()[0])
    assert kld(torch.bincount(y).numpy(), counts) < 0.01 and confidence > 0.9
    more, _, _ = measure(train.split(500), extract, head)
    noise, _, unsure = measure((torch.randn(100, 1, 16, 16) for _ in range(10)), extract, head)
    assert frechet(noise["frd"], real["frd"]) > 100 * frechet(more["frd"], real["frd"]) and unsure < confidence
    assert real["fid"].n == real["frd"].n == 1000 and more["fid"] is None


def test_fid_missing_from_a_paper_scale_run_is_said(labelled, small, tmp_path, capsys):
    def no_weights(args, device):
        raise InputError("the weights are not at hand: get them there")
    folder = make_run(tmp_path / "run", small, scale="paper")
    records = labelled(folder, load_fid=no_weights)
    assert all(r["fid"] is None and r["frd"] > 0 and r["fid_missing"].endswith("get them there") for r in records)
    assert "fid is null: the weights are not at hand" in capsys.readouterr().out
    with pytest.raises(InputError, match="not at hand"):
        labelled(folder, "--inception-weights", "bad.pth", load_fid=no_weights)
    assert all(r["fid"] > 0 for r in labelled(folder))  # measured once they are there


def test_bad_weights_asked_for_end_an_evaluation(main, tmp_path, home, small):
    make_run(tmp_path / "run", small)
    (tmp_path / "bad.pth").write_bytes(b"<html></html>")
    done = main("eval_fid.py", "run", "--inception-weights", "bad.pth", "--labeller-path", home / LABELLER)
    assert done.returncode == 2 and done.stderr.startswith("error: bad.pth") and done.stderr.count("\n") == 1
    assert done.stdout == "" and not (tmp_path / "run" / "eval.json").exists()


def test_bad_runs_are_refused(labelled, small, tmp_path):
    def case(sentence, folder, *more):
        with pytest.raises(InputError, match=sentence) as error:
            labelled(folder, *more)
        assert "\n" not in str(error.value)
    case("--train-resnet18 cifar10", make_run(tmp_path / "a", small, scale="paper", dataset="cifar10"))
    case("is for fashion-mnist of side 16", make_run(tmp_path / "b", small, dataset="shapes"),
         "--labeller-path", LABELLER)
    case("there is no labeller", make_run(tmp_path / "c", small), "--labeller", "imagenet")
    folder = make_run(tmp_path / "d", small)
    records = labelled(folder, "--seed", "3")
    state = run.load(folder / "task2.pt")
    whole = (folder / "task2.pt").read_bytes()
    flipped = whole[:9000] + bytes([whole[9000] ^ 1]) + whole[9001:]
    for content in (b"", whole[:1000], whole[:-1], b"<html></html>", flipped):
        (folder / "task2.pt").write_bytes(content)
        case("task2.pt is damaged or was not made by torch.save", folder, "--seed", "3")
    run.save(folder / "task2.pt", {"model": {"weight": torch.zeros(3)}})
    case("task2.pt is not of the net laptop", folder, "--seed", "3")
    run.save(folder / "task2.pt", [1, 2])
    case("task2.pt is not of the net laptop", folder, "--seed", "3")
    state["model"]["conv_out.bias"] += float("nan")
    run.save(folder / "task2.pt", state)
    case("image 0 of .*task2.pt is not finite", folder, "--seed", "3")
    assert json.loads((folder / "eval.json").read_text()) == records  # nothing half-written
    (folder / "task1.pt").unlink()
    (folder / "task2.pt").unlink()
    case("holds no task1.pt yet", folder)
    (folder / "eval.json").write_text("[{")
    case("is no whole run folder", folder)
    (folder / "eval.json").unlink()
    (folder / "config.json").write_text(json.dumps({k: v for k, v in CONFIG.items() if k != "schedule"}))
    case("is no whole run folder", folder)
    case("is no whole run folder .*--reference", tmp_path)


def test_arguments(capsys):
    for argv in ([], ["run", "--train-resnet18", "shapes"], ["run", "--n", "0"], ["run", "--n", "1"],
                 ["run", "--steps", "-1"], ["run", "--protocol", "mine"], ["--train-resnet18", "mnist"],
                 ["--train-resnet18", "shapes", "--scale", "laptop", "--labeller", "imagenet"]):
        with pytest.raises(SystemExit) as exit:
            get_args(argv)
        assert exit.value.code == 2 and "error: " in capsys.readouterr().err


# ------------------------------------------------------------------------------------------- published numbers

def needs_weights_and_cifar():
    """Skip where the published numbers cannot be reproduced."""
    cache = Path(torch.hub.get_dir(), "checkpoints")
    if not any((cache / Path(url).name).exists() for url in eval_fid.WEIGHTS["--inception-weights"][1]):
        pytest.skip("needs the Inception weights")
    if not any((ROOT / "data" / name).exists() for name in ("cifar-10-batches-py", "cifar-10-python.tar.gz")):
        pytest.skip("needs the CIFAR files")
    if not torch.cuda.is_available():
        pytest.skip("needs CUDA")  # six hours on a CPU


def published(protocol, train, test):
    """FID between images of CIFAR-10's training and test sets, (N, 3, 32, 32) each."""
    torch.backends.cudnn.allow_tf32 = False
    extract, _ = eval_fid.load_inception(get_args(["-", "--protocol", protocol]), torch.device("cuda"))
    found = []
    for images in (train, test):
        found.append(None)
        for batch in images.split(200):
            found[-1] = merge(found[-1], moments(extract(batch)))
    return frechet(*found)


def test_cifar10_train_against_test_with_the_pytorch_fid_protocol():
    """3.1525318697637204 in the tests of pytorch-image-generation-metrics."""
    needs_weights_and_cifar()
    train, test = (data.load_images("cifar10", split, ROOT / "data", 32)[0] for split in ("train", "test"))
    assert published("pytorch-fid", train, test) == pytest.approx(3.1525, abs=0.02)


def test_cifar10_5k_against_5k_with_the_tf1_protocol():
    """10.3233274 in the tests of torch-fidelity; the images are drawn as there."""
    needs_weights_and_cifar()
    train, test = (data.load_images("cifar10", split, ROOT / "data", 32)[0] for split in ("train", "test"))
    train, test = (x[np.random.RandomState(2020).choice(len(x), 5000, replace=False)] for x in (train, test))
    assert published("tf1", train, test) == pytest.approx(10.3233, abs=0.01)
