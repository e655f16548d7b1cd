"""A GPU gives what the CPU gives, to the bounds stated here; skipped where torch has no CUDA device.

    DML_TEST_DEVICE=cpu python -m pytest tests/test_cuda.py    # the same bodies, but for what only a GPU has

CPU and CUDA draw other noise: where noise matters it is drawn on the CPU for both.
"""
import copy
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import ROOT
from PIL import Image
from torch import nn

import embed
import saliency
import train
from dml_common import command, files, losses, networks

NAME, GPUS = os.environ.get("DML_TEST_DEVICE", "cuda"), torch.cuda.device_count()
pytestmark = pytest.mark.skipif(NAME != "cpu" and not GPUS, reason="no CUDA device that torch can use")
of_a_gpu = pytest.mark.skipif(NAME == "cpu", reason="the CPU has no tf32, no memory of a GPU, no nccl")
NETWORKS = """
import torch
from torch import nn

def smooth(size=28, stride=2):  # no ReLU, whose kink the rounding of float32 could cross
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 8, 5, stride), nn.BatchNorm2d(8), nn.Softplus(), nn.Conv2d(8, 8, 3),
                        nn.BatchNorm2d(8), nn.Softplus(), nn.AdaptiveAvgPool2d(2), nn.Flatten())
    for norm in net[1], net[4]:
        nn.init.uniform_(norm.running_mean, -0.2, 0.2)
        nn.init.uniform_(norm.running_var, 0.5, 2)
    net.preprocessing = {"resize": size, "crop": size, "mean": [0.5] * 3, "std": [0.5] * 3}
    return net.eval()

def large(): return smooth(256, 4)
"""


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    """48 noisy pictures of 4 classes in p/, the networks above, no ranks in the environment."""
    (tmp_path / "networks_for_cuda.py").write_text(NETWORKS)
    for i in range(48):
        (tmp_path / "p" / str(i % 4)).mkdir(parents=True, exist_ok=True)
        rng = np.random.default_rng(i)
        pixels = rng.normal(100 + 20 * (i % 4), 60, (36, 40, 3)).clip(0, 255).astype(np.uint8)
        Image.fromarray(pixels).save(tmp_path / "p" / str(i % 4) / f"{i}.png")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    for name in os.environ:
        if name.startswith("SLURM") or name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"):
            monkeypatch.delenv(name)


@pytest.fixture
def device():
    return command.torch_device(NAME)


@pytest.fixture
def cpu_noise(monkeypatch):
    original = saliency.noisy_copies

    def drawn(given, sigmas, *rest):
        for i, noisy in original(given.cpu(), sigmas.cpu(), *rest):
            yield i, noisy.to(given.device)

    monkeypatch.setattr(saliency, "noisy_copies", drawn)


def smooth():
    return networks.imported("networks_for_cuda:smooth")()


def on_both(step, option, ending, *arguments, precision="fp32"):
    """The command on the CPU, in float32, and on the device: its results in cpu and it, plus the ending."""
    line = [*map(str, arguments), "--dataset", "p", "--model", "networks_for_cuda:smooth"]
    step.main([*line, option, f"cpu{ending}", "--device", "cpu"])
    step.main([*line, option, f"it{ending}", "--device", NAME, "--precision", precision])


@pytest.mark.parametrize("precision, least, most", [
    ("fp32", 0, 1e-5), ("bf16", 1e-5, 2e-2), pytest.param("tf32", 0, 5e-3, marks=of_a_gpu)])
def test_embeddings(precision, least, most):
    on_both(embed, "--out", ".npy", precision=precision)
    ours, theirs = np.load("it.npy"), np.load("cpu.npy")
    assert ours.dtype == np.float32 and ours.shape == theirs.shape == (48, 32)
    difference = np.linalg.norm(ours - theirs, axis=1) / np.linalg.norm(theirs, axis=1)
    assert least <= difference.max() <= most


def test_tf32_is_off_unless_asked_for_and_in_every_check(device):
    kinds, network, seen = (torch.backends.cuda.matmul, torch.backends.cudnn), smooth().to(device), []
    assert not any(kind.allow_tf32 for kind in kinds)
    network[0].register_forward_hook(lambda *given: seen.append([kind.allow_tf32 for kind in kinds]))
    try:
        for kind in kinds:
            kind.allow_tf32 = True
        ready, stem = saliency.prepare(network, torch.rand(1, 3, 28, 28, device=device))
        assert all(kind.allow_tf32 for kind in kinds)  # as it was
    finally:
        command.torch_device(NAME)
    assert seen and not any(map(any, seen)) and stem is not None
    assert not any(isinstance(module, nn.BatchNorm2d) for module in ready.modules())


@of_a_gpu
def test_tf32_rounds(device):
    torch.manual_seed(0)
    network, x = nn.Conv2d(64, 64, 3).to(device), torch.randn(8, 64, 32, 32, device=device)
    exact, error = copy.deepcopy(network).double()(x.double()), {}
    for precision in "fp32", "tf32":
        command.torch_device(NAME, precision)
        error[precision] = ((network(x) - exact).norm() / exact.norm()).item()
    command.torch_device(NAME)
    assert error["fp32"] < 1e-5
    assert error["tf32"] > 1e-5 or torch.cuda.get_device_capability(device) < (8, 0)


@pytest.mark.parametrize("order, antithetic", [("paper", False), ("paper", True), ("released", False)])
def test_maps_of_double_precision(device, cpu_noise, order, antithetic):
    network, distance = smooth().double(), networks.distance("euclidean")
    given = torch.rand(3, 3, 28, 28, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    black, options = torch.full((3, 28, 28), -0.5, dtype=torch.float64), dict(
        samples=4, order=order, antithetic=antithetic, seeds=[4, 5, 6])
    expected = saliency.smoothgrad(network, given, black, distance, **options)
    ready, stem = saliency.prepare(copy.deepcopy(network), given[:1].to(device))
    maps = saliency.smoothgrad(ready, given.to(device), black.to(device), distance, stem=stem, batch=5,
                               **options)
    assert maps.device == device and stem is not None
    np.testing.assert_allclose(maps.cpu(), expected, atol=1e-8)


def test_a_real_network(device, cpu_noise):
    torch.manual_seed(0)
    module = nn.Sequential(networks.BACKBONES["bninception"](), nn.Linear(1024, 128)).eval()
    given = torch.rand(1, 3, 227, 227) * 255 - 110
    black = torch.full((3, 227, 227), -110.0)
    distance, options = networks.distance("euclidean"), {"samples": 2, "batch": 2}
    with torch.no_grad():
        expected = module(given)
    plain = saliency.smoothgrad(module, given, black, distance, **options)
    it = copy.deepcopy(module).to(device), given.to(device)
    folded = saliency.fold_batchnorm(*it)
    assert not any(isinstance(one, nn.BatchNorm2d) for one in folded.modules())
    with torch.no_grad():
        assert (folded(it[1]).cpu() - expected).norm() < 1e-4 * expected.norm()
    ready, stem = saliency.prepare(*it)
    for autocast, least in (None, 0.999), (torch.bfloat16, 0.8):
        maps = saliency.smoothgrad(ready, it[1], black.to(device), distance, stem=stem, autocast=autocast,
                                   **options)
        assert np.corrcoef(maps.cpu().flatten(), plain.flatten())[0, 1] > least


def test_the_maps_command_and_its_checks(cpu_noise):
    on_both(saliency, "--out", "/maps.npy", "--samples", 3, "--limit", 5, "--ceiling", "--faithfulness",
            "--randomise", 2)
    for name, atol in (("maps.npy", 2e-3), ("maps_ceiling.npy", 2e-3), ("maps_faithfulness.npy", 2e-2)):
        ours, theirs = (np.load(f"{folder}/{name}").astype(float) for folder in ("it", "cpu"))
        assert ours.shape == theirs.shape and np.isfinite(ours).all()
        np.testing.assert_allclose(ours, theirs, atol=atol)
    ours, theirs = (files.read_table(f"{folder}/sanity.csv")["correlation"] for folder in ("it", "cpu"))
    np.testing.assert_allclose(np.float64(ours), np.float64(theirs), atol=1e-2)


def test_randomised_layers_leave_the_generators_alone(device):
    network, given = smooth().to(device), torch.rand(2, 3, 28, 28, device=device)
    state = torch.cuda.get_rng_state if device.type == "cuda" else torch.get_rng_state
    before = state()
    fresh = saliency.randomise(network, saliency.weighted_layers(network, given[:1]), given, 3)
    assert torch.equal(state(), before) and not torch.equal(fresh[0].weight, network[0].weight)


@of_a_gpu
def test_half_the_copies_where_memory_ends(device, capsys):
    line = ["--dataset", "p", "--model", "networks_for_cuda:large", "--samples", "250", "--limit", "1",
            "--device", NAME]
    saliency.main([*line, "--out", "few.npy", "--batch", "10"])
    torch.cuda.empty_cache()
    limit = torch.cuda.memory_reserved(device) + 2**29  # 250 copies and their clone alone are 375 MiB
    torch.cuda.set_per_process_memory_fraction(limit / torch.cuda.mem_get_info(device)[1], device)
    try:
        saliency.main([*line, "--out", "many.npy"])
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0, device)
    assert capsys.readouterr().err.count("out of memory with 250 copies at a time: going on with half") == 1
    np.testing.assert_allclose(np.load("many.npy"), np.load("few.npy"), atol=2e-3)


def test_gradients_of_a_step_with_every_loss(device):
    pytest.importorskip("pytorch_metric_learning")
    given = torch.randn(24, 3, 28, 28, generator=torch.Generator().manual_seed(1))
    labels, rows = torch.arange(24) % 3, [row for row in files.losses() if row["class"]]
    for row in rows:
        gradients = []
        for name in "cpu", NAME:
            torch.manual_seed(2)
            place, network = command.torch_device(name), smooth()
            criterion, miner, _ = losses.make_loss(row, 3, 32)
            network, criterion = network.to(place, memory_format=torch.channels_last), criterion.to(place)
            train.step(network, criterion, miner, given.to(place), labels.to(place), np.arange(24))
            gradients.append([one.grad.cpu() for one in [*network.parameters(), *criterion.parameters()]])
        for ours, theirs in zip(*gradients):
            assert (ours - theirs).norm() <= 1e-4 * theirs.norm() + 1e-7, row["name"]


def numbers(folder, loss="triplet"):
    """Loss and the two mean similarities of each row of history.csv (the ranks may turn on equal ones)."""
    rows = files.read_table(f"{folder}/trained/p@pictures/{loss}/fold0/history.csv")
    return np.array([rows[name] for name in ("loss", "positive_mean", "negative_mean")], float)


TRAINING = ("--split", "pictures", "--dim", 8, "--batch", 16, "--epochs", 2, "--lr", 1e-3)


@pytest.mark.parametrize("how", [(), ("--freeze-trunk",), ("--train-from", "3")])
def test_training(how):
    on_both(train, "--models", "", *TRAINING, "--loss", "Triplet,Normalized Softmax", *how)
    for loss in "triplet", "normalized_softmax":
        np.testing.assert_allclose(numbers("it", loss), numbers("cpu", loss), atol=5e-3)


def test_training_in_bf16():
    on_both(train, "--models", "", *TRAINING, "--loss", "Triplet", precision="bf16")
    np.testing.assert_allclose(numbers("it"), numbers("cpu"), atol=5e-2)


def torchrun(number, *arguments):
    line = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", number, "--rdzv-backend",
            "c10d", "--rdzv-endpoint", "localhost:0", ROOT / "train.py", "--dataset", "p", "--device", "cuda",
            "--model", "networks_for_cuda:smooth", *TRAINING, "--loss", "Triplet", *arguments]
    return subprocess.run(list(map(str, line)), capture_output=True, text=True)


@pytest.mark.skipif(NAME == "cpu" or GPUS < 2, reason="nccl needs two GPUs")
@pytest.mark.parametrize("how", [(), ("--precision", "bf16"), ("--freeze-trunk",)])
def test_two_ranks_train_what_one_does(how):
    for number in 1, 2:
        done = torchrun(number, "--models", str(number), *how)
        assert done.returncode == 0, done.stderr
    np.testing.assert_allclose(numbers("2"), numbers("1"), atol=5e-2 if "bf16" in how else 5e-3)


@of_a_gpu
def test_more_processes_than_gpus_are_told():
    done = torchrun(GPUS + 1, "--models", "m")
    assert done.returncode and f"give torchrun --nproc-per-node {GPUS}" in done.stderr, done.stderr
