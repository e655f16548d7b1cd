"""A GPU gives what the CPU gives, to the bounds stated here; skipped where torch has no CUDA device.

    DML_TEST_DEVICE=cpu python -m pytest tests/test_cuda.py    # the same bodies, but for what only a GPU has
"""
import copy
import os
import subprocess

import numpy as np
import pytest
import torch
from conftest import TORCHRUN, settle, start
from PIL import Image
from torch import nn

import embed
import saliency
import train
from dml_common import command, files, losses, networks

NAME, GPUS = os.environ.get("DML_TEST_DEVICE", "cuda"), torch.cuda.device_count()
pytestmark = pytest.mark.skipif(NAME != "cpu" and not GPUS, reason="no CUDA device that torch can use")
of_a_gpu = pytest.mark.skipif(NAME == "cpu", reason="a CPU has no tf32, no GPU's memory, no nccl")
SMOOTH, TF32 = "tiny_networks:smooth", (torch.backends.cuda.matmul, torch.backends.cudnn)


@pytest.fixture(autouse=True)
def device(tmp_path, monkeypatch):
    """In a folder with 80 noisy pictures of 4 classes in p/, and tiny_networks.py."""
    settle(tmp_path, monkeypatch)
    for folder in "p/0", "p/1", "p/2", "p/3", "cpu", "it":
        (tmp_path / folder).mkdir(parents=True)
    for i in range(80):
        pixels = np.random.default_rng(i).normal(100 + 20 * (i % 4), 60, (36, 40, 3)).clip(0, 255)
        Image.fromarray(pixels.astype(np.uint8)).save(tmp_path / "p" / str(i % 4) / f"{i}.png")
    threads = torch.get_num_threads()  # of which a frozen trunk takes one
    yield command.torch_device(NAME)
    torch.set_num_threads(threads)
    command.torch_device(NAME)  # tf32 off again


@pytest.fixture
def cpu_noise(monkeypatch):
    original = saliency.noisy_copies  # CPU and CUDA draw other noise: here both take the CPU's

    def drawn(given, sigmas, *rest):
        for i, noisy in original(given.cpu(), sigmas.cpu(), *rest):
            yield i, noisy.to(given.device)

    monkeypatch.setattr(saliency, "noisy_copies", drawn)


def on_both(step, option, ending, *arguments, precision="fp32"):
    """The command on the CPU, in float32, and on the device: its results in cpu and it, plus the ending."""
    line = [*map(str, arguments), "--dataset", "p", "--model", SMOOTH]
    step.main([*line, option, f"cpu{ending}", "--device", "cpu"])
    step.main([*line, option, f"it{ending}", "--device", NAME, "--precision", precision])


@pytest.mark.parametrize("precision, least, most", [("fp32", 0, 1e-5), ("bf16", 1e-5, 2e-2)])
def test_embeddings(precision, least, most):
    on_both(embed, "--out", ".npy", precision=precision)
    ours, theirs = np.load("it.npy"), np.load("cpu.npy")
    difference = np.linalg.norm(ours - theirs, axis=1) / np.linalg.norm(theirs, axis=1)
    assert ours.dtype == np.float32 and least <= difference.max() <= most


def test_tf32_is_off_unless_asked_for_and_in_every_check(device):
    network, seen = networks.imported(SMOOTH)().to(device), []
    assert not any(kind.allow_tf32 for kind in TF32)
    network[0].register_forward_hook(lambda *given: seen.append([kind.allow_tf32 for kind in TF32]))
    TF32[0].allow_tf32 = TF32[1].allow_tf32 = True
    ready, stem = saliency.prepare(network, torch.rand(1, 3, 28, 28, device=device))
    assert seen and not any(map(any, seen)) and all(kind.allow_tf32 for kind in TF32)  # as it was
    assert stem is not None and not any(isinstance(module, nn.BatchNorm2d) for module in ready.modules())


@pytest.mark.parametrize("order, antithetic", [("paper", True), ("released", False)])
def test_maps_in_float64(device, cpu_noise, order, antithetic):
    network, distance = networks.imported(SMOOTH)().double(), networks.distance("euclidean")
    given = torch.rand(3, 3, 28, 28, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    black = torch.full((3, 28, 28), -0.5, dtype=torch.float64)
    options = {"samples": 4, "order": order, "antithetic": antithetic, "seeds": [4, 5, 6]}
    expected = saliency.smoothgrad(network, given, black, distance, **options)
    ready, stem = saliency.prepare(copy.deepcopy(network), given[:1].to(device))
    maps = saliency.smoothgrad(ready, given.to(device), black.to(device), distance, stem=stem, batch=5,
                               **options)
    assert maps.device == device and stem is not None
    np.testing.assert_allclose(maps.cpu(), expected, atol=1e-8)


def test_a_real_network(device, cpu_noise):
    torch.manual_seed(0)
    module = nn.Sequential(networks.BACKBONES["bninception"](), nn.Linear(1024, 128)).eval()
    given, black = torch.rand(1, 3, 227, 227) * 255 - 110, torch.full((3, 227, 227), -110.0)
    distance, options = networks.distance("euclidean"), {"samples": 2, "batch": 2}
    plain = saliency.smoothgrad(module, given, black, distance, **options)
    it = copy.deepcopy(module).to(device), given.to(device)
    with torch.no_grad():
        expected, folded = module(given), saliency.fold_batchnorm(*it)
        assert (folded(it[1]).cpu() - expected).norm() < 1e-5 * expected.norm()  # tf32 is 1e-4 off, or more
    assert not any(isinstance(one, nn.BatchNorm2d) for one in folded.modules())
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
        assert np.isfinite(ours).all()
        np.testing.assert_allclose(ours, theirs, atol=atol)
    ours, theirs = (files.read_table(f"{folder}/sanity.csv")["correlation"] for folder in ("it", "cpu"))
    np.testing.assert_allclose(np.float64(ours), np.float64(theirs), atol=1e-2)


@of_a_gpu
def test_half_the_copies_where_memory_ends(device, capsys):
    line = f"--dataset p --model tiny_networks:large --samples 250 --limit 1 --device {NAME}".split()
    saliency.main([*line, "--out", "few.npy", "--batch", "10"])
    torch.cuda.empty_cache()
    limit = torch.cuda.memory_reserved(device) + 2**28  # 250 copies, their stack and its clone are 560 MiB
    torch.cuda.set_per_process_memory_fraction(limit / torch.cuda.mem_get_info(device)[1], device)
    try:
        saliency.main([*line, "--out", "many.npy"])
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0, device)
    assert capsys.readouterr().err.count("out of memory with 250 copies at a time: going on with half") == 1
    np.testing.assert_allclose(np.load("many.npy"), np.load("few.npy"), atol=2e-3)


def test_gradients_of_a_step_with_every_loss():
    given = torch.randn(24, 3, 28, 28, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    for row in [row for row in files.losses() if row["class"]]:
        gradients, labels, mine = [], torch.arange(24) % 3, np.arange(24)
        for device in "cpu", command.torch_device(NAME):
            torch.manual_seed(2)
            criterion, miner, _ = losses.make_loss(row, 3, 32)
            network = networks.imported(SMOOTH)().double().to(device, memory_format=torch.channels_last)
            train.step(network, criterion.to(device), miner, given.to(device), labels.to(device), mine)
            gradients.append([one.grad.cpu() for one in [*network.parameters(), *criterion.parameters()]])
        for ours, theirs in zip(*gradients):
            assert (ours - theirs).norm() <= 1e-3 * theirs.norm() + 1e-7, row["name"]


TRAINING = "--split pictures --dim 8 --batch 16 --epochs 2 --lr 1e-3 --loss Triplet".split()


def numbers(folder):
    rows = files.read_table(f"{folder}/trained/p@pictures/triplet/fold0/history.csv")
    return np.array([rows[name] for name in ("loss", "positive_mean", "negative_mean")], float)


@pytest.mark.parametrize("how, atol", [("fp32", 1e-2), ("bf16", 1e-1), ("fp32 --freeze-trunk", 1e-3),
                                       ("fp32 --train-from 3", 1e-2)])
def test_training(how, atol):
    precision, *more = how.split()
    on_both(train, "--models", "", *TRAINING, *more, precision=precision)
    np.testing.assert_allclose(numbers("it"), numbers("cpu"), atol=atol)


def torchrun(number, *arguments):
    """(exit status, stderr) of so many processes, whose networks are in of<number>."""
    process = start("train.py", "--dataset", "p", "--model", SMOOTH, "--device", "cuda", *TRAINING,
                    "--models", f"of{number}", *arguments, before=[*TORCHRUN, str(number)],
                    stdout=subprocess.DEVNULL)
    said = process.communicate()[1]
    return process.returncode, said


@pytest.mark.skipif(NAME == "cpu" or GPUS < 2, reason="nccl needs two GPUs")
@pytest.mark.parametrize("how, atol", [("", 1e-2), ("--precision bf16", 1e-1), ("--freeze-trunk", 1e-3)])
def test_two_ranks_with_nccl_train_what_one_does(how, atol):
    for number in 1, 2:
        status, said = torchrun(number, *how.split())
        assert status == 0, said
    np.testing.assert_allclose(numbers("of2"), numbers("of1"), atol=atol)


@of_a_gpu
def test_more_processes_than_gpus_are_told():
    status, said = torchrun(GPUS + 1)
    assert status and f"torchrun --nproc-per-node {GPUS}" in said, said
