"""Losses of one's own for train.py: a table like models/losses.csv, or a class package.module:Class."""
import inspect
import json
from importlib import metadata

import torch
from torch import nn

from dml_common.files import losses, read_table
from dml_common.networks import DISTANCES, imported, slug

TYPES = ("ranking", "classification")
USUAL = {"class": "", "parameters": "", "miner": "", "distance": "euclidean"}  # of a row


def own(name, kind):
    """The row of a loss package.module:Class; kind: its type, or None."""
    return {**USUAL, "name": name, "slug": slug(name), "type": kind, "class": name}


def read(path):
    """Rows of a table with columns name, type, class and perhaps parameters, miner and distance."""
    table, rows, taken = read_table(path), [], {row["slug"] for row in losses()}
    lacking = [column for column in ("name", "type", "class") if column not in table]
    unknown = [column for column in table if column not in ("name", "type", *USUAL)]
    if lacking or unknown:
        raise ValueError(f"{path}: columns {', '.join(table)}; expected name, type, class and perhaps "
                         "parameters, miner, distance")
    for cells in zip(*table.values()):
        row = {**USUAL, **{column: cell for column, cell in zip(table, cells) if cell}}
        row["slug"] = slug(row.get("name", ""))
        if row["slug"] in ("", *taken):
            raise ValueError(f"{path}: the name {row.get('name', '')!r} is empty or another's; choose one")
        good = row["class"].isidentifier() and row["distance"] in DISTANCES
        if not good or row.get("type") not in TYPES:
            raise ValueError(f"{path}: {row['name']}: class {row['class']!r}, distance {row['distance']!r}, "
                             f"type {row.get('type')!r}; expected a class of pytorch_metric_learning.losses, "
                             f"one of {', '.join(DISTANCES)}, and {' or '.join(TYPES)}")
        taken.add(row["slug"])
        rows.append(row)
    return rows


def make_loss(row, classes, dimension):
    """A row of losses.csv -> (criterion, miner or None, its parameters); proxies by torch's generator.

    Its class is one of pytorch-metric-learning, or package.module:Class. ValueError where it can't be made.
    """
    if ":" in row["class"]:
        own = OwnLoss(row["class"], classes, dimension)
        return own, None, {"class": row["class"], **own.given}
    try:
        from pytorch_metric_learning import distances, losses, miners
    except ImportError:
        raise ValueError("training needs pytorch-metric-learning: pip install '.[train]'") from None
    known = {"classes": classes, "dimension": dimension, "True": True, "False": False, "None": None}

    def make(library, base, name, settings=""):
        parameters, objects = {}, {}
        try:
            for key, value in (setting.split("=") for setting in settings.split()):
                if value[0].isupper() and value not in known:
                    parameters[key], objects[key] = value, getattr(distances, value)()
                else:
                    parameters[key] = known[value] if value in known else json.loads(value)
            kind = getattr(library, name)
            if not issubclass(kind, base):
                raise TypeError(f"expected a kind of {base.__name__}")
            return kind(**{**parameters, **objects}), {"class": name, **parameters}
        except (AttributeError, TypeError, ValueError, AssertionError) as error:
            raise ValueError(f"loss {row['name']}: {name} {settings}: {error}; expected a class of "
                             "pytorch-metric-learning and key=value with JSON values") from None

    criterion, parameters = make(losses, losses.BaseMetricLossFunction, row["class"], row["parameters"])
    if not row["miner"]:
        return criterion, None, parameters
    miner, parameters["miner"] = make(miners, miners.BaseMiner, *row["miner"].split(maxsplit=1))
    return criterion, miner, parameters


def tried(row, classes, dimension):
    """(parameters, pytorch-metric-learning's version) of a row's loss, None of no loss; ValueError where it
    can't be made or, one of one's own, called: before any work."""
    if not row["class"]:
        return None, None
    criterion, _, parameters = make_loss(row, classes, dimension)
    if ":" in row["class"]:
        x = torch.randn(8, dimension, requires_grad=True)
        criterion(x, torch.arange(8) // 2 % classes).backward()
    return parameters, metadata.version("pytorch-metric-learning")


class OwnLoss(nn.Module):
    """A loss package.module:Class with forward(embeddings, labels), called as pytorch-metric-learning's are.

    It is given the numbers of classes and dimensions where its constructor takes them by these names.
    """

    def __init__(self, name, classes, dimension):
        super().__init__()
        known = {"classes": classes, "num_classes": classes,
                 "dimension": dimension, "embedding_size": dimension}
        self.name = name
        try:
            kind = imported(name)
            self.given = {key: known[key] for key in inspect.signature(kind).parameters if key in known}
            self.loss = kind(**self.given)
        except (Exception, SystemExit) as error:  # whatever the user's module raises
            raise ValueError(f"{name}: can't be made ({type(error).__name__}: {error}); expected package."
                             "module:Class, whose constructor needs classes, dimension or nothing") from None
        if not isinstance(self.loss, nn.Module):
            raise ValueError(f"{name} gives {type(self.loss).__name__}; expected a torch.nn.Module")

    def forward(self, embeddings, labels, pairs=None):
        try:
            loss = self.loss(embeddings, labels)
            fault = None if loss.shape == () else f"it gives a tensor {tuple(loss.shape)}"
            if embeddings.requires_grad and not loss.requires_grad:
                fault = "it has no gradient"
        except Exception as error:  # whatever the user's module raises
            fault = f"{type(error).__name__}: {error}"
        if fault:
            raise ValueError(f"{self.name} fails on embeddings {tuple(embeddings.shape)} and labels "
                             f"{tuple(labels.shape)}: {fault}; expected one number")
        return loss
