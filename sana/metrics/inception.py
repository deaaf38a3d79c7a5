"""The Inception-v3 of FID, under the names of its published weight file, and the ways in which pictures are put into it.

The network is TensorFlow's of 2015-12-05 (Szegedy et al., arXiv 1512.00567), not torchvision's: average pools leave the
padding out, and the last block pools by maximum. Libraries agree on it; where they differ is how a picture becomes
299 x 299 pixels, so that is a named preset here, see `Preset`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn
from torchvision.transforms import functional as pictures

from sana.metrics.weights import Published, load_state, read_state

SIDE = 299
DIMS = (64, 192, 768, 2048)
"""Lengths of the features: behind the first and the second pooling, before the last three blocks, at the end."""

_FILE = "pt_inception-2015-12-05-6726825d.pth"
_URL = f"https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/{_FILE}"
_PLACE = f"~/.cache/torch/hub/checkpoints/{_FILE}"  # where pytorch-fid puts it
WEIGHTS = Published(
    "the FID Inception", _PLACE, f"curl -L --create-dirs -o {_PLACE} {_URL}", sha256="6726825d"
)

# A convolution: name, channels, kernel, stride. Padding keeps the size at stride 1; there is none at stride 2.
_Step = tuple[str, int, int | tuple[int, int], int]
# One after another; a list within is a fork whose ends are joined.
_Branch = Sequence[_Step | list[_Step]]


class _Convolution(nn.Module):
    def __init__(
        self, channels: int, out: int, kernel: int | tuple[int, int], stride: int = 1, *, pad: bool = True
    ) -> None:
        super().__init__()
        high, wide = (kernel, kernel) if isinstance(kernel, int) else kernel
        padding = (high // 2, wide // 2) if pad and stride == 1 else 0
        self.conv = nn.Conv2d(channels, out, (high, wide), stride, padding, bias=False)
        self.bn = nn.BatchNorm2d(out, eps=1e-3)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.bn(self.conv(x)), inplace=True)


def _average(x: Tensor) -> Tensor:
    return F.avg_pool2d(x, 3, 1, 1, count_include_pad=False)


def _maximum(x: Tensor) -> Tensor:
    return F.max_pool2d(x, 3, 1, 1)


def _halve(x: Tensor) -> Tensor:
    return F.max_pool2d(x, 3, 2)


class _Mixed(nn.Module):
    """Branches side by side, their channels joined; the last one is a pooling, with a 1 x 1 convolution if it has channels."""

    def __init__(
        self, channels: int, branches: Sequence[_Branch], pool: Callable[[Tensor], Tensor], pooled: int = 0
    ) -> None:
        super().__init__()
        self._branches: list[list[list[str]]] = []
        for branch in branches:
            width, names = channels, []
            for step in branch:
                fork = step if isinstance(step, list) else [step]
                for name, out, kernel, stride in fork:
                    self.add_module(name, _Convolution(width, out, kernel, stride))
                names.append([name for name, *_ in fork])
                width = sum(out for _, out, _, _ in fork)
            self._branches.append(names)
        self._pool = pool
        self.branch_pool = _Convolution(channels, pooled, 1) if pooled else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        outputs = []
        for branch in self._branches:
            y = x
            for fork in branch:
                y = torch.cat([self.get_submodule(name)(y) for name in fork], 1)
            outputs.append(y)
        return torch.cat([*outputs, self.branch_pool(self._pool(x))], 1)


def _a(channels: int, pooled: int) -> _Mixed:
    branches = (
        [("branch1x1", 64, 1, 1)],
        [("branch5x5_1", 48, 1, 1), ("branch5x5_2", 64, 5, 1)],
        [("branch3x3dbl_1", 64, 1, 1), ("branch3x3dbl_2", 96, 3, 1), ("branch3x3dbl_3", 96, 3, 1)],
    )
    return _Mixed(channels, branches, _average, pooled)


def _b(channels: int) -> _Mixed:
    branches = (
        [("branch3x3", 384, 3, 2)],
        [("branch3x3dbl_1", 64, 1, 1), ("branch3x3dbl_2", 96, 3, 1), ("branch3x3dbl_3", 96, 3, 2)],
    )
    return _Mixed(channels, branches, _halve)


def _c(channels: int, inner: int) -> _Mixed:
    wide, high = (1, 7), (7, 1)
    double = [(inner, 1), (inner, high), (inner, wide), (inner, high), (192, wide)]
    branches = (
        [("branch1x1", 192, 1, 1)],
        [("branch7x7_1", inner, 1, 1), ("branch7x7_2", inner, wide, 1), ("branch7x7_3", 192, high, 1)],
        [(f"branch7x7dbl_{place}", out, kernel, 1) for place, (out, kernel) in enumerate(double, 1)],
    )
    return _Mixed(channels, branches, _average, 192)


def _d(channels: int) -> _Mixed:
    double = [("_1", 1, 1), ("_2", (1, 7), 1), ("_3", (7, 1), 1), ("_4", 3, 2)]
    branches = (
        [("branch3x3_1", 192, 1, 1), ("branch3x3_2", 320, 3, 2)],
        [(f"branch7x7x3{end}", 192, kernel, stride) for end, kernel, stride in double],
    )
    return _Mixed(channels, branches, _halve)


def _e(channels: int, pool: Callable[[Tensor], Tensor]) -> _Mixed:
    def fork(name: str) -> list[_Step]:
        return [(f"{name}a", 384, (1, 3), 1), (f"{name}b", 384, (3, 1), 1)]

    branches = (
        [("branch1x1", 320, 1, 1)],
        [("branch3x3_1", 384, 1, 1), fork("branch3x3_2")],
        [("branch3x3dbl_1", 448, 1, 1), ("branch3x3dbl_2", 384, 3, 1), fork("branch3x3dbl_3")],
    )
    return _Mixed(channels, branches, pool, 192)


class Inception(nn.Module):
    """Pixels (B, 3, 299, 299), made by a `Preset` -> features (B, D) of one of `DIMS`, averaged over the places."""

    def __init__(self) -> None:
        super().__init__()
        self.Conv2d_1a_3x3 = _Convolution(3, 32, 3, 2)
        self.Conv2d_2a_3x3 = _Convolution(32, 32, 3, pad=False)
        self.Conv2d_2b_3x3 = _Convolution(32, 64, 3)
        self.Conv2d_3b_1x1 = _Convolution(64, 80, 1)
        self.Conv2d_4a_3x3 = _Convolution(80, 192, 3, pad=False)
        self.Mixed_5b, self.Mixed_5c, self.Mixed_5d = _a(192, 32), _a(256, 64), _a(288, 64)
        self.Mixed_6a = _b(288)
        self.Mixed_6b, self.Mixed_6c, self.Mixed_6d = _c(768, 128), _c(768, 160), _c(768, 160)
        self.Mixed_6e = _c(768, 192)
        self.Mixed_7a = _d(768)
        self.Mixed_7b, self.Mixed_7c = _e(1280, _average), _e(2048, _maximum)
        self.fc = nn.Linear(2048, 1008)  # in the published file; FID reads what comes before it

    def forward(self, pixels: Tensor, dims: int = 2048) -> Tensor:
        x = self.Conv2d_2b_3x3(self.Conv2d_2a_3x3(self.Conv2d_1a_3x3(pixels)))
        x = _halve(x)
        if dims == 64:
            return x.mean((2, 3))
        x = _halve(self.Conv2d_4a_3x3(self.Conv2d_3b_1x1(x)))
        if dims == 192:
            return x.mean((2, 3))
        x = self.Mixed_6a(self.Mixed_5d(self.Mixed_5c(self.Mixed_5b(x))))
        x = self.Mixed_6e(self.Mixed_6d(self.Mixed_6c(self.Mixed_6b(x))))
        if dims == 768:
            return x.mean((2, 3))
        if dims != 2048:
            raise ValueError(f"Inception has features of {', '.join(map(str, DIMS))} numbers, not of {dims}")
        return self.Mixed_7c(self.Mixed_7b(self.Mixed_7a(x))).mean((2, 3))


def load_inception(path: Path, device: torch.device | str = "cpu") -> Inception:
    """The network with the weights of a file under the published names, frozen.

    Raises:
        ValueError: it cannot be read, or its names or shapes are others.
    """
    state = read_state(path, WEIGHTS.what)
    with torch.device("meta"):
        network = Inception()
    # The number of batches seen in training has no effect, and not every copy of the file has it.
    counters = {name for name in network.state_dict() if name.endswith("num_batches_tracked")}
    state |= {name: torch.zeros((), dtype=torch.long) for name in counters - state.keys()}
    load_state(network, state, path, WEIGHTS.what, assign=True)
    return network.float().to(device).eval().requires_grad_(False)


def _pytorch_fid(picture: Image.Image) -> Tensor:
    """As pytorch-fid: [0, 1], half-pixel bilinear grid without antialiasing, 2 x - 1."""
    pixels = pictures.pil_to_tensor(picture)[None].float() / 255
    return 2 * F.interpolate(pixels, (SIDE, SIDE), mode="bilinear", align_corners=False)[0] - 1


def _torch_fidelity(picture: Image.Image) -> Tensor:
    """As torch-fidelity: [0, 255], TensorFlow 1's bilinear grid (output i lies at i * in / out), (x - 128) / 128."""
    pixels = pictures.pil_to_tensor(picture).float()
    for axis in (1, 2):  # columns after rows: torch-fidelity does the opposite, which moves the last bit
        length = pixels.shape[axis]
        place = torch.arange(SIDE, dtype=torch.float32) * torch.tensor(length / SIDE, dtype=torch.float32)
        low = place.long()
        weight = (place - low).unsqueeze(-1) if axis == 1 else place - low
        below = pixels.index_select(axis, low)
        above = pixels.index_select(axis, (low + 1).clamp_max(length - 1))
        pixels = below + (above - below) * weight
    return (pixels - 128) / 128


def _clean(picture: Image.Image) -> Tensor:
    """As clean-fid (arXiv 2104.11222): Pillow's antialiased bicubic filter on floats, clipped to [0, 255], (x - 128) / 128."""
    channels = [
        Image.fromarray(np.asarray(channel, dtype=np.float32)).resize((SIDE, SIDE), Image.Resampling.BICUBIC)
        for channel in picture.split()
    ]
    pixels = torch.from_numpy(np.stack([np.asarray(channel) for channel in channels])).clamp(0, 255)
    return (pixels - 128) / 128


_RESIZES = {"pytorch-fid": _pytorch_fid, "torch-fidelity": _torch_fidelity, "clean": _clean}


@dataclass(frozen=True)
class Preset:
    """How an RGB picture becomes the network's input: "pytorch-fid", "torch-fidelity" or "clean", as the library of that
    name does it; with "@512" behind it, the shorter side is brought to 512 pixels first (Pillow's antialiased bilinear
    filter) and the middle square taken. "pytorch-fid@512" is the protocol of Sana's tables.
    """

    name: str

    def __post_init__(self) -> None:
        self._parts()

    def __call__(self, picture: Image.Image) -> Tensor:
        """A picture in RGB -> (3, 299, 299) float32 in [-1, 1]."""
        resize, size = self._parts()
        if size:
            picture = pictures.center_crop(pictures.resize(picture, size), [size, size])
        return resize(picture)

    def _parts(self) -> tuple[Callable[[Image.Image], Tensor], int | None]:
        match = re.fullmatch(r"([\w-]+)(?:@([1-9]\d{1,3}))?", self.name)
        if not match or match[1] not in _RESIZES:
            raise ValueError(
                f"unknown preset {self.name!r}; choose from {', '.join(_RESIZES)}, each also with a size, as "
                "in pytorch-fid@512"
            )
        return _RESIZES[match[1]], int(match[2]) if match[2] else None
