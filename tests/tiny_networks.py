"""Small networks, whole and spoiled, that tests name on the command line: copied to where they run."""
import os
import time
from functools import partial

import torch
from torch import nn


def build(seed=0, m=6):  # smooth: no ReLU whose kink float32 rounding could flip
    torch.manual_seed(seed)
    net = nn.Sequential(nn.Conv2d(3, 8, 5, stride=2), nn.BatchNorm2d(8), nn.Softplus(), nn.Conv2d(8, 8, 3),
                        nn.Softplus(), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(32, m))
    net.preprocessing = {"resize": 32, "crop": 28, "mean": [0.5] * 3, "std": [0.5] * 3}
    net.register_forward_hook(lambda *given: time.sleep(float(os.environ.get("SLOW", 0))))
    return net


def smooth(size=28, stride=2):
    """The one that test_cuda.py compares: features alone."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 8, 5, stride, bias=False), nn.BatchNorm2d(8), nn.Softplus(),
                        nn.Conv2d(8, 8, 3), nn.Softplus(), nn.AdaptiveAvgPool2d(2), nn.Flatten())
    net.preprocessing = {"resize": size, "crop": size, "mean": [0.5] * 3, "std": [0.5] * 3}
    return net.eval()


large = partial(smooth, 256, 4)
seven = partial(build, 7, 7)


class Tiny(nn.Module):
    """The one that train.py's tests train."""
    preprocessing = {"resize": 40, "crop": 32, "mean": [0.5, 0.5, 0.5]}

    def __init__(self, dropout=0.0, norm=False):
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.Sequential(nn.Conv2d(3, 8, 5, 4), *[nn.BatchNorm2d(8)] * norm, nn.ReLU(),
                                    nn.AdaptiveAvgPool2d(3), nn.Flatten(), nn.Dropout(dropout))

    def forward(self, x):
        time.sleep(float(os.environ.get("SLOW", 0)))
        return self.layers(x)


tiny, dropping, norm = Tiny, partial(Tiny, 0.3), partial(Tiny, norm=True)


def maps():
    net = build()[:2]
    net.preprocessing = {"resize": 32, "crop": 28}
    return net


def random():
    net = build(7, 7)
    torch.manual_seed(int.from_bytes(os.urandom(4), "big"))
    nn.init.normal_(net[-1].bias)
    return net


class Odd(nn.Module):
    preprocessing = {"resize": 32, "crop": 28}

    def __init__(self, kind):
        super().__init__()
        self.kind, self.body, self.head = kind, build(), nn.Linear(6, 2)
        if kind == "of its batch":
            self.body[1] = nn.BatchNorm2d(8, track_running_stats=False)

    def forward(self, x):
        y = self.body(x)
        if self.kind == "detached":
            y = self.head(y.detach())
        if self.kind == "stochastic":
            y = nn.functional.dropout(y)
        if self.kind == "rounded":
            y = y.mul(64).to(torch.int8).float()
        if self.kind == "raises":
            y = {}["no such key"]
        if self.kind == "fixed":
            torch._assert(x.shape[-1] == 518, "Input height doesn't match model (518).")
        if self.kind == "nan":
            y = y * float("nan")
        if self.kind == "gradient of nan":  # where a picture's first pixel is bright
            y = torch.sqrt(x.mean((2, 3)) - x.mean() * (x[0, 0, 0, 0] > 2))
        if self.kind == "written over":
            y = torch.exp(x)
            z = y.mean((2, 3))
            y.mul_(2)
            y = z * y.mean((2, 3))
        return y


detached, stochastic, rounded, raises, fixed, nan, nan_gradient, written_over, of_batch = (
    partial(Odd, kind) for kind in ("detached", "stochastic", "rounded", "raises", "fixed", "nan",
                                    "gradient of nan", "written over", "of its batch"))
