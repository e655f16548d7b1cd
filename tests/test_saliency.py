"""saliency.py: closed forms, a literal transcription of both orders, invariances, and the command."""
import json
import subprocess
import sys

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch import nn
from torch.nn import functional as F

import saliency


def euclidean(a, b):
    return (F.normalize(a) - F.normalize(b)).norm(dim=1)


def first_output(a, b):
    """A distance whose gradient is the first row of a linear network."""
    return a[:, 0] - b[:, 0]


class Linear(nn.Module):
    """f(I) = W vec(I): the gradient of first_output is W's first row, whatever the noise."""

    def __init__(self, shape, m=3, seed=0):
        super().__init__()
        self.weight = torch.randn(m, int(np.prod(shape)), generator=torch.Generator().manual_seed(seed), dtype=torch.float64)

    def forward(self, pictures):
        return pictures.flatten(1) @ self.weight.T


class Small(nn.Module):
    """Convolutions, batch norms, in-place and plain ReLUs, a branch: what the real networks are made of."""

    def __init__(self, m=5):
        super().__init__()
        self.stem = nn.Conv2d(3, 6, 3, stride=2, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(6)
        self.relu = nn.ReLU(inplace=True)
        self.left = nn.Sequential(nn.Conv2d(6, 4, 1), nn.BatchNorm2d(4), nn.ReLU())
        self.right = nn.Sequential(nn.Conv2d(6, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU6())
        self.last = nn.Linear(8, m)

    def forward(self, pictures):
        x = self.relu(self.norm(self.stem(pictures)))
        return self.last(torch.cat([self.left(x), self.right(x)], 1).mean((2, 3)))


@pytest.fixture
def small():
    torch.manual_seed(0)
    network = Small().double()
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.uniform_(-0.2, 0.2)
            module.running_var.uniform_(0.5, 2)
            module.weight.data.uniform_(0.5, 1.5)
            module.bias.data.uniform_(-0.2, 0.2)
    return network.eval().requires_grad_(False)


@pytest.fixture
def pictures():
    return torch.rand(3, 3, 14, 13, generator=torch.Generator().manual_seed(5), dtype=torch.float64)


BLACK = torch.full((3, 14, 13), -0.5, dtype=torch.float64)


# ---------------------------------------------------------------- the maps


@pytest.mark.parametrize("order", ["paper", "released"])
def test_linear_network_in_closed_form(pictures, order):
    network = Linear(pictures.shape[1:])
    gradient = network.weight[0].view(3, 14, 13).numpy()
    expected = np.abs(gradient).mean(0) if order == "paper" else np.abs(gradient.mean(0))
    top = np.percentile(expected, 90)
    expected = (np.minimum(expected, top) - expected.min()) / (top - expected.min())
    maps = saliency.smoothgrad(network, pictures, BLACK, first_output, samples=4, order=order, percentile=90)
    assert maps.shape == (3, 14, 13)
    for found in maps.numpy():
        np.testing.assert_allclose(found, expected, atol=1e-12)


def literal(network, picture, black, samples, order, seed):
    """Section 3.1 (or the authors' order) line by line in float64, one copy at a time."""
    sigma = 0.15 * (picture.max() - picture.min())
    generator = torch.Generator().manual_seed(seed)
    gradients = []
    for _ in range(samples):
        noise = torch.randn(picture.shape, generator=generator, dtype=torch.float64)
        copy = (picture + sigma * noise).requires_grad_()
        euclidean(network(copy[None]), network(black[None])).backward()
        gradients.append(copy.grad.numpy())
    if order == "paper":
        saliency_map = np.abs(np.mean(gradients, axis=0)).mean(axis=0)
    else:
        saliency_map = np.abs(np.mean(gradients, axis=1)).sum(axis=0)
    saliency_map = np.minimum(saliency_map, np.percentile(saliency_map, 99))
    return (saliency_map - saliency_map.min()) / (saliency_map.max() - saliency_map.min())


@pytest.mark.parametrize("order", ["paper", "released"])
def test_both_orders_against_a_literal_transcription(small, pictures, order):
    maps = saliency.smoothgrad(small, pictures, BLACK, euclidean, samples=6, order=order, seeds=[7, 8, 9])
    for i in range(3):
        np.testing.assert_allclose(maps[i], literal(small, pictures[i], BLACK, 6, order, 7 + i), atol=1e-10)


def test_the_orders_differ(small, pictures):
    one, other = (saliency.smoothgrad(small, pictures, BLACK, euclidean, order=order, samples=8) for order in ("paper", "released"))
    assert not np.allclose(one, other, atol=0.05)


@settings(max_examples=15, deadline=None)
@given(batch=st.integers(1, 40), order=st.sampled_from(["paper", "released"]), antithetic=st.booleans(),
       rows=st.permutations([0, 1, 2]))
def test_a_map_does_not_depend_on_batch_or_order_of_pictures(batch, order, antithetic, rows):
    torch.manual_seed(0)
    network = Small().double().eval()
    pictures = torch.rand(3, 3, 14, 13, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    options = dict(samples=5, order=order, antithetic=antithetic)
    expected = saliency.smoothgrad(network, pictures, BLACK, euclidean, seeds=[4, 5, 6], **options)
    found = saliency.smoothgrad(network, pictures[rows], BLACK, euclidean, seeds=[4 + i for i in rows], batch=batch, **options)
    np.testing.assert_allclose(found, expected[rows], atol=1e-9)


def test_prepared_network_gives_the_same_maps(small, pictures):
    expected = saliency.smoothgrad(small, pictures, BLACK, euclidean, samples=5)
    folded = saliency.fold_batchnorm(small, pictures[:1])
    assert not any(isinstance(module, nn.BatchNorm2d) for module in folded.modules())
    assert any(isinstance(module, nn.BatchNorm2d) for module in small.modules())  # the one given is untouched
    folded.requires_grad_(False).to(memory_format=torch.channels_last)
    stem = saliency.linear_stem(folded, pictures[:1])
    assert stem is folded.stem
    for order in ("paper", "released"):
        expected = saliency.smoothgrad(small, pictures, BLACK, euclidean, samples=5, order=order)
        found = saliency.smoothgrad(folded, pictures, BLACK, euclidean, samples=5, order=order, stem=stem, batch=4)
        np.testing.assert_allclose(found, expected, atol=1e-9)


class WrittenBetween(nn.Module):
    """A ReLU writes in place between convolution and batch norm, and the picture has a second way in."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)

    def forward(self, pictures):
        x = self.norm(F.relu_(self.conv(pictures)))
        return x.mean((2, 3)) + pictures.mean((1, 2, 3))[:, None]


def test_what_can_not_be_folded_is_left_alone(pictures):
    torch.manual_seed(0)
    network = WrittenBetween().double().eval()
    network.norm.running_mean.uniform_(-1, 1)
    folded = saliency.fold_batchnorm(network, pictures[:1])
    assert isinstance(folded.norm, nn.BatchNorm2d)
    torch.testing.assert_close(folded(pictures), network(pictures))
    assert saliency.linear_stem(network, pictures[:1]) is None


# ---------------------------------------------------------------- noise


def test_noise_depends_on_seed_network_and_picture_alone():
    seeds = [saliency.noise_seed(seed, name, i) for seed in (0, 1) for name in ("Triplet fold 0", "Triplet fold 1") for i in range(50)]
    assert len(set(seeds)) == 200 and all(0 <= seed < 2**63 for seed in seeds)
    assert saliency.noise_seed(3, "ArcFace", 7) == saliency.noise_seed(3, "ArcFace", 7)


def test_more_copies_begin_with_the_same_ones(pictures):
    sigmas = torch.full((3,), 0.1, dtype=torch.float64)
    few = [copy for i, copy in saliency.noisy_copies(pictures, sigmas, [1, 2, 3], 4) if i == 1]
    many = [copy for i, copy in saliency.noisy_copies(pictures[1:2], sigmas[1:2], [2], 9)]
    assert all(torch.equal(a, b) for a, b in zip(few, many))


def test_noise_has_the_stated_deviation_and_antithetic_pairs_cancel():
    picture = torch.zeros(1, 3, 64, 64, dtype=torch.float64)
    copies = [copy for _, copy in saliency.noisy_copies(picture, torch.tensor([0.3]), [0], 6, antithetic=True)]
    assert abs(torch.stack(copies).std().item() - 0.3) < 0.005
    assert torch.equal(copies[0], -copies[1]) and not torch.equal(copies[0], copies[2])


# ---------------------------------------------------------------- scaling, edges


def test_scaling_by_hand():
    saliency_map = torch.arange(101, dtype=torch.float64).view(1, 101, 1) + 5  # the 99th percentile of 5 … 105 is 104
    maps = saliency.scale_maps(saliency_map, 99)[0, :, 0]
    np.testing.assert_allclose(maps, np.minimum(np.arange(101) / 99, 1))


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10**6), st.floats(1, 100), st.floats(1e-6, 1e6))
def test_scaling_stays_in_range_and_ignores_scale(seed, percentile, scale):
    values = torch.rand(2, 9, 7, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    maps = saliency.scale_maps(values, percentile)
    assert maps.min() == 0 and maps.max() == 1
    np.testing.assert_allclose(saliency.scale_maps(values * scale, percentile), maps, atol=1e-9)
    expected = np.minimum(values[0].numpy(), np.percentile(values[0].numpy(), percentile))
    np.testing.assert_allclose(maps[0], (expected - expected.min()) / (expected.max() - expected.min()), atol=1e-9)


def test_constant_black_and_broken_pictures(small):
    pictures = torch.stack([BLACK, torch.full_like(BLACK, 0.25), torch.rand_like(BLACK)])
    pictures[2, 0, 0, 0] = torch.nan
    maps = saliency.smoothgrad(small, pictures, BLACK, euclidean, samples=3)
    assert (maps[0] == 0).all()  # equal to the baseline: no distance, no gradient
    assert maps[1].max() == 1 and maps[1].isfinite().all()  # constant, but no baseline: all its copies are alike
    assert maps[2].isnan().all()
    assert (saliency.scale_maps(torch.ones(1, 4, 4)) == 0).all()


def test_bad_options_teach(small, pictures):
    for options, said in [({"samples": 0}, "samples is 0"), ({"noise": -0.1}, "noise is -0.1"), ({"order": "both"}, "'both'"),
                          ({"percentile": 0}, "percentile is 0")]:
        with pytest.raises(ValueError, match=said):
            saliency.smoothgrad(small, pictures, BLACK, euclidean, **options)


class Detached(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU())
        self.last = nn.Linear(4, 2)

    def forward(self, pictures):
        return self.last(self.inner(pictures).mean((2, 3)).detach())


def test_networks_that_can_not_be_explained(pictures):
    pictures = pictures.float()
    with pytest.raises(ValueError, match=r"returned \(3, 4, 12, 11\) for 3 pictures"):
        saliency.smoothgrad(nn.Conv2d(3, 4, 3), pictures, BLACK.float(), euclidean)
    for network in (Detached(), Detached().requires_grad_(False)):
        with pytest.raises(ValueError, match="before layer last"):
            saliency.smoothgrad(network, pictures, BLACK.float(), euclidean)
    network = Detached()
    network.inner[1].forward = lambda x: torch.sign(x).detach()
    with pytest.raises(ValueError, match=r"inside layer inner\.1"):
        saliency.smoothgrad(network, pictures, BLACK.float(), euclidean)
