"""A trunk's features, computed once for all losses: of all of it, or of what comes before a block."""
import copy
import difflib

import numpy as np
import torch
from torch import nn
from torch.nn.modules.module import register_module_forward_hook

from dml_common import arrays, checkpoints, files, networks, pictures, rowfile


def cached(trunk, width, config, dataset, args, device, home):
    """(features of all pictures, the part of the trunk behind them or None): features.npy in home.

    features: (n, 1, width) of the whole trunk, or with args.train_from (n, 2, …), what that block is given,
    of pictures and of mirrored ones; made by all processes together. config: what config.json says; args:
    with precision, workers, skip_unreadable. trunk.pth beside it has the whole trunk.
    """
    head, tail, shape = trunk, None, (width,)
    if args.train_from:
        size = (3, *pictures.input_size(config["preprocessing"]))
        head, tail = cut(trunk, args.train_from, size)
        shape = (2, *head(torch.zeros(1, *size)).shape[1:])

    def load(row):
        return pictures.load_pixels(dataset.paths[row], config["preprocessing"])

    def stack(pixels):
        return networks.to_input(torch.from_numpy(np.stack(pixels)).to(device), config["preprocessing"])

    @torch.inference_mode()
    def compute(which, rows, batch):
        if len(shape) > 1:
            batch = torch.cat([batch, batch.flip(3)])
        with torch.autocast(device.type, dtype=torch.bfloat16, enabled=args.precision == "bf16"):
            features = head(batch).float().unflatten(0, (-1, len(rows))).transpose(0, 1)
        return [features.reshape(len(rows), *shape).cpu().numpy()]

    keys = ("dataset", "backbone", "preprocessing", "train_from")
    about = {**{key: config[key] for key in keys if key in config},
             "checkpoint_sha256": config["weights_sha256"], "precision": args.precision,
             "pictures": config["split"]["pictures"],
             "bytes": sum(path.stat().st_size for path in dataset.paths)}  # of pictures made anew, too
    rows, path = range(len(dataset.paths)), home / "features.npy"
    state = {name: tensor.cpu() for name, tensor in trunk.state_dict().items()}
    trunk.to(device)
    job = arrays.Job({"name": "features"}, dataset, rows, path, about, home)
    rowfile.fill([job], [shape], np.float32, load, stack, compute, 32, rowfile.BLOCK, args, "pictures")
    checkpoints.write_state(home / "trunk.pth", state)
    features = files.read_array(path)
    return (features, tail) if tail else (np.array(features)[:, None], None)


def feed(features, device, seed=0):
    """A function (batches, epoch) that yields (rows, features of them) for each int array of rows.

    features (n, 1 or 2, …): of pictures and, for half of the training, of mirrored ones.
    """
    def give(batches, epoch=None):
        for rows in batches:
            side = [0] * len(rows)
            if epoch is not None and features.shape[1] > 1:
                side = [np.random.default_rng([seed, epoch, row]).integers(2) for row in rows]
            yield rows, torch.from_numpy(features[rows, side]).to(device)

    return give


class Skipped(nn.Module):
    """Zeros of the shape that a module gives, in place of one that need not run."""

    def __init__(self, shape):
        super().__init__()
        self.shape = shape

    def forward(self, first, *args, **kwargs):
        return first.new_zeros(len(first), *self.shape)


class Reached(Exception):
    """A module is about to run."""


@torch.no_grad()
def cut(trunk, block, shape):
    """A trunk cut before one of its modules -> (head, tail): tail(head(pictures)) is trunk(pictures).

    block: the module's name in trunk.named_modules(); shape (3, H, W): of a picture, to try it with.
    head: a function, pictures -> what the block is given (B, …). tail: a copy of the trunk without what
    has run by then; the others keep their names: {**trunk.state_dict(), **tail.state_dict()} is whole.
    Raises ValueError where the rest needs more than what the block is given.
    """
    names = [name for name, _ in trunk.named_modules()][1:]
    if block not in names:
        near = difflib.get_close_matches(block, names, n=4, cutoff=0.3) or names[:4]
        raise ValueError(f"no block {block!r} in the network; did you mean {', '.join(near)}?")

    def stop(module, inputs):
        raise Reached(inputs[0])

    def head(pictures):
        try:
            with trunk.get_submodule(block).register_forward_pre_hook(stop):
                trunk(pictures)
        except Reached as reached:
            return reached.args[0]

    pictures = torch.randn(2, *shape, generator=torch.Generator().manual_seed(0))
    expected, ran = listen(trunk, pictures)
    try:  # whatever a network does that is not given what it expects
        tail = rest(trunk, block, ran, shape)
        error = float((tail(head(pictures)) - expected).abs().max() / expected.abs().max())
        fault = None if error < 1e-4 else f"the output is {error:.0e} off"
    except Exception as error:
        fault = f"{type(error).__name__}: {error}"
    if fault:
        raise ValueError(f"the network can't be cut before {block}, whose followers need more than it gets "
                         f"({fault}); choose a block of the main path")
    return head, tail


def listen(trunk, pictures):
    """(what trunk gives, [(name of a module, shape of a row of its output)] as one after the other ended)."""
    def note(module, inputs, output):
        if module in names:
            ran.append((names[module], getattr(output, "shape", (0,))[1:]))

    ran, names = [], {module: name for name, module in trunk.named_modules() if name}
    with register_module_forward_hook(note):
        return trunk(pictures), ran


def rest(trunk, block, ran, shape):
    """cut's tail; ran: listen's."""
    first = next(i for i, (name, _) in enumerate(ran) if f"{name}.".startswith(f"{block}."))
    later = {name for name, _ in ran[first:]}
    before = {name: row for name, row in ran[:first] if name not in later}
    tail, waiting = copy.deepcopy(trunk), []
    for name, row in before.items():
        parent, _, leaf = name.rpartition(".")
        if not any(name.startswith(f"{other}.") for other in before):
            setattr(tail.get_submodule(parent), leaf, Skipped(row))

    def take(module, inputs):
        waiting.append(inputs[0])
        return inputs[0].new_zeros(len(inputs[0]), *shape)

    def give(module, inputs):
        return waiting.pop(), *inputs[1:]

    tail.register_forward_pre_hook(take)
    tail.get_submodule(block).register_forward_pre_hook(give)
    return tail
