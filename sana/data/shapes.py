"""The shapes world as training data: scene i is drawn, and spoken of, afresh from its number."""

import functools
import hashlib
import random
from collections.abc import Callable

from torch import Tensor

from sana.data.buckets import to_tensor
from sana.data.captions import Caption
from sana.shapes.captions import caption
from sana.shapes.render import render
from sana.shapes.scene import Scene
from sana.shapes.splits import training_scene, validation_scene


class ShapesDataset:
    """Scenes 0 to `num_scenes` - 1 of a split: "train" holds no held-out combination, "validation" only such scenes."""

    captions_vary = True

    def __init__(self, size: int, num_scenes: int, split: str = "train") -> None:
        splits: dict[str, Callable[[int], Scene]] = {"train": training_scene, "validation": validation_scene}
        if split not in splits:
            raise ValueError(f"unknown split {split!r} of the shapes; one of {', '.join(splits)}")
        if num_scenes < 1:
            raise ValueError(f"a dataset needs at least one scene, got num_scenes={num_scenes}")
        self.side, self.num_scenes = size, num_scenes
        self.quarantine = None  # nothing is read, so nothing can be unreadable
        self.scene = functools.lru_cache(maxsize=None)(splits[split])
        self.name = f"shapes-{split}-{num_scenes}-{size}"

    def __len__(self) -> int:
        return self.num_scenes

    def label(self, index: int) -> str:
        """The scene's number."""
        return f"scene {index}"

    def size(self, index: int) -> tuple[int, int]:
        """(height, width): a square, whatever `index`."""
        return self.side, self.side

    def digest(self, index: int) -> bytes:
        """16 bytes that say what the picture of scene `index` is."""
        return hashlib.sha256(render(self.scene(index), self.side).tobytes()).digest()[:16]

    def image(self, index: int) -> Tensor:
        """The picture of scene `index`: (3, size, size) in [-1, 1]."""
        return to_tensor(render(self.scene(index), self.side))

    def captions(self, index: int) -> list[Caption]:
        """What is said of scene `index` in epoch 0."""
        return [Caption(text=self.caption(index))]

    def caption(self, index: int, epoch: int = 0) -> str:
        """One caption of scene `index`; another in another `epoch`."""
        return caption(self.scene(index), random.Random(f"caption {index} {epoch}"))
