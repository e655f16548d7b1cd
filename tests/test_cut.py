"""dml_common/cut.py, train.py --train-from and --input-size: what runs once gives what it would give."""
import numpy as np
import pytest
import test_train
import torch
from test_train import OPTIONS, config_of, history, p, place, run, same, scores_of  # noqa: F401
from torch import nn

import embed
from dml_common import checkpoints, files, networks, pictures
from dml_common.cut import cut, feed

here = test_train.here


class Residual(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.bn = nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4)

    def forward(self, x, scale=1.0):
        return x + scale * self.bn(self.conv(x))


class Odd(nn.Module):
    """A shared activation, keywords, positions, functions between modules, a way round one of them."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.stem, self.act = nn.Conv2d(3, 4, 3, 2), nn.ReLU()
        self.blocks = nn.ModuleList([Residual() for _ in range(3)])
        self.position, self.mix, self.head = nn.Parameter(torch.randn(4)), nn.Linear(4, 4), nn.Linear(4, 5)

    def forward(self, x):
        x = self.act(self.stem(x))
        for block in self.blocks:
            x = block(x, scale=0.5)
        x = x.flatten(2).transpose(1, 2) + self.position
        n, length, width = x.shape
        y = self.mix(x.reshape(n * length, width)).view(n, length, width)
        return self.head((self.act(y) + x.mean(1, keepdim=True)).mean(1))


@pytest.mark.parametrize("block, kept", [
    ("stem", 1.0), ("blocks.0", 0.95), ("blocks.2", 0.5), ("head", 0.1), ("blocks.2.conv", 0), ("mix", 0)])
def test_tail_of_head_is_the_trunk(block, kept):
    """To the bit; a block around which something else flows is refused."""
    trunk = Odd().eval()
    pictures = torch.randn(3, 3, 16, 16)
    if not kept:
        with pytest.raises(ValueError, match=f"can't be cut before {block}, whose followers need more"):
            cut(trunk, block, (3, 16, 16))
        return
    head, tail = cut(trunk, block, (3, 16, 16))
    assert torch.equal(tail(head(pictures)), trunk(pictures))
    whole, rest = (sum(q.numel() for q in module.parameters()) for module in (trunk, tail))
    assert rest <= whole and abs(rest / whole - kept) < 0.25
    assert set(tail.state_dict()) <= set(trunk.state_dict())
    tail.train()
    tail(head(pictures)).sum().backward()  # and it learns


def test_blocks_that_are_not_there():
    with pytest.raises(ValueError, match="no block 'blocks.9' in the network; did you mean blocks.*0"):
        cut(Odd(), "blocks.9", (3, 16, 16))


def test_half_of_the_training_sees_mirrored_pictures():
    features = np.arange(40, dtype=np.float32).reshape(10, 2, 2)
    give, rows = feed(features, "cpu", seed=3), np.arange(10)
    assert np.array_equal(next(give([rows]))[1], features[:, 0])
    sides = np.array([next(give([rows], epoch))[1][:, 0].numpy() % 4 // 2 for epoch in range(1, 101)])
    assert 0.4 < sides.mean() < 0.6 and len({tuple(side) for side in sides}) > 90
    assert np.array_equal(next(give([rows[3:7]], 1))[1], next(give([rows], 1))[1][3:7])  # by row alone


def test_training_from_a_block(p, monkeypatch):  # noqa: F811
    """What is computed once is the head's, the scores are the whole network's, only what follows learns."""
    options = ("--model", "tiny_networks:norm", "--loss", "Triplet,None", "--train-from", "layers.1",
               "--input-size", 24, "--lr", 1e-2)
    run(*options)
    config, dataset = config_of("triplet"), pictures.open_dataset("p")
    assert config["train_from"] == "layers.1" and config["frozen_trunk"] is False
    assert (config["preprocessing"]["resize"], config["preprocessing"]["crop"]) == (30, 24)
    trunk = networks.from_factory("tiny_networks:norm").eval()
    pixels = np.stack([pictures.load_pixels(path, config["preprocessing"]) for path in dataset.paths])
    inputs = pictures.normalise(pixels, config["preprocessing"])
    with torch.inference_mode():
        for side, turned in enumerate((inputs, inputs[..., ::-1].copy())):
            features = trunk.layers[0](torch.from_numpy(turned)).numpy()
            made = np.load("m/trained/p@pictures/features.npy")[:, side]
            np.testing.assert_allclose(made, features, atol=1e-5)
    rows, test = history(place("triplet")), config["split"]["test"]
    assert list(rows.values())[-1][1:] == pytest.approx(scores_of("triplet", test, "norm"), abs=1e-5)
    assert history(place("none"))[0, "test"][1:] == pytest.approx(scores_of("none", test, "norm"), abs=1e-5)
    before, after = trunk.state_dict(), checkpoints.read_state(place("triplet") / "trunk_best.pth")
    assert list(after) == list(before)
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert moved and all(name.startswith("layers.1.") for name in moved)

    embed.main(["--dataset", "p@pictures", "--loss", "Triplet", "--models", "m", "--out", "r",
                "--model", "tiny_networks:norm"])
    beside = files.read_sidecar("r/p@pictures/triplet/fold0/emb.npy")
    assert beside["preprocessing"] == config["preprocessing"]
    whole = files.write_file

    def dies(path, content):
        whole(path, content)
        if path.name == "checkpoint.pth":
            raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        for module in (files, checkpoints):
            patch.setattr(module, "write_file", dies)
        run(*options, "--models", "killed")
    run(*options, "--models", "killed")
    same("triplet", "killed")


def test_geometry_shrinks_in_proportion():
    for usual, side, expected in (
            ((256, 224), 128, (146, 128)), (([299, 299], None), 128, ([128, 128], None)),
            (([256, 128], None), 64, ([128, 64], None)), ((256, 227), 227, (256, 227)),
            ((None, 100), 50, (None, 50))):
        made = pictures.resized({"resize": usual[0], "crop": usual[1], "scale": 1}, side)
        assert (made["resize"], made["crop"], made["scale"]) == (*expected, 1)
