"""The loss on pictures that training never sees, always at the same times and with the same noise.

So its curve shows learning and over-fitting without the scatter of drawn times: that of the training loss is larger than
what a hundred steps gain. Times stand in the middle of eight bins of equal share in the levels that training visits.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from sana.config import SanaConfig
from sana.data.build import build_dataset
from sana.data.cache import StaleCache
from sana.data.captions import Caption
from sana.data.loader import Batch
from sana.data.pictures import Encodable, Samples
from sana.data.quarantine import UNREADABLE
from sana.data.shapes import ShapesDataset
from sana.diffusion import flow
from sana.models.text_encoder import TextFeatures
from sana.training.features import padded
from sana.utils.logging import first_line, get_logger
from sana.utils.seeding import generator

log = get_logger(__name__)

BINS = 8


class Subset:
    """Some samples of a data set, as a data set.

    Args:
        samples: the whole.
        indices: which of them.
        part: what they are, in a word; tells the subset's name from the whole's.
    """

    def __init__(self, samples: Samples, indices: list[int], part: str) -> None:
        self.samples, self.indices = samples, indices
        self.name = f"{samples.name} {part} {len(indices)} of {len(samples)}"
        self.quarantine = samples.quarantine

    def __len__(self) -> int:
        return len(self.indices)

    def label(self, index: int) -> str:
        """Where picture `index` comes from."""
        return self.samples.label(self.indices[index])

    def size(self, index: int) -> tuple[int, int]:
        """(height, width) of picture `index`."""
        return self.samples.size(self.indices[index])

    def image(self, index: int) -> Tensor:
        """(3, height, width) in [-1, 1], or a latent where the whole has latents."""
        return self.samples.image(self.indices[index])

    def captions(self, index: int) -> list[Caption]:
        """All captions of picture `index`."""
        return self.samples.captions(self.indices[index])

    def caption(self, index: int, epoch: int) -> str:
        """One caption of picture `index`."""
        return self.samples.caption(self.indices[index], epoch)


def data_sets(config: SanaConfig) -> dict[str, Encodable]:
    """What a config is trained on and, where the data has pictures of its own to hold out, these; first and second.

    The names tell them apart in the cache. Those of the shapes say what they are; "data" is what lies in files.
    Raises as `build_dataset`.
    """
    samples = build_dataset(config)
    if not isinstance(samples, ShapesDataset):
        return {"data": samples}
    sets = {samples.name: samples}
    if config.train.heldout_samples:
        unseen = ShapesDataset(config.model.image_size, config.train.heldout_samples, split="validation")
        sets[unseen.name] = unseen
    return sets


def hold_out(
    config: SanaConfig, samples: Samples, unseen: Samples | None = None
) -> tuple[Samples, Samples | None]:
    """(what to train on, what to hold out): `train.heldout_samples` pictures, at most one in a hundred.

    Args:
        unseen: of the shapes, scenes none of whose combinations is in training.
    """
    count = config.train.heldout_samples
    if count == 0 or config.data.type == "SanaShapes":
        return samples, unseen
    count = min(count, len(samples) // 100)
    if count == 0:
        log.info("%d pictures are too few to hold some out (100 for each): no held-out loss", len(samples))
        return samples, None
    held = torch.randperm(len(samples), generator=generator("held out", config.train.seed))[:count].tolist()
    out = set(held)
    kept = [index for index in range(len(samples)) if index not in out]
    return Subset(samples, kept, "train"), Subset(samples, sorted(held), "held out")


class HeldOutLoss:
    """The velocity loss of any model on `samples`.

    Args:
        config: its flow shift and seed.
        samples: never trained on; encoded here, once.
        encode: as training encodes a batch.
        text: caption -> hidden states, where they are cached.
        accelerator: the processes share the work.
    """

    def __init__(
        self,
        config: SanaConfig,
        samples: Samples,
        encode: Callable[[Batch], tuple[Tensor, TextFeatures]],
        text: Callable[[str], Tensor] | None,
        accelerator: Accelerator,
    ) -> None:
        self.accelerator, self.seed = accelerator, config.train.seed
        self.batch_size = config.train.train_batch_size
        levels = flow.training_levels(config.scheduler.flow_shift)
        self.times = levels[[int((k + 0.5) * flow.NUM_LEVELS / BINS) for k in range(BINS)]]
        self.latents, self.texts = [], []
        for index in range(len(samples)):
            try:
                image, caption = samples.image(index), samples.caption(index, 0)
                texts = [text(caption)] if text else None
            except StaleCache:
                raise
            except UNREADABLE as error:
                if samples.quarantine is None:
                    raise
                samples.quarantine.add(samples.label(index), error)
                continue
            batch = Batch(
                pixels=image[None], captions=[caption], samples=[(0, index)], replaced={}, texts=texts
            )
            latents, found = encode(batch)
            self.latents.append(latents[0].cpu())
            self.texts.append(TextFeatures(found.embeds[0].cpu(), found.mask[0].cpu()))

    @torch.no_grad()
    def __call__(self, model: nn.Module) -> dict[str, float]:
        """ "heldout_loss", the mean, and "heldout_loss/t=..." for each time; `model` keeps its mode."""
        batches = self._batches()
        world, rank = self.accelerator.num_processes, self.accelerator.process_index
        rounds = -(-len(batches) // world)
        sums = torch.zeros(2, BINS, dtype=torch.float64)  # losses, samples
        was_training = model.training
        model.eval()
        try:
            for place in range(rank, rounds * world, world):
                # All processes compute equally often, which sharded weights need; what is too much counts nothing.
                batch = batches[place % len(batches)]
                losses = self._losses(model, batch)
                if place < len(batches):
                    bins = torch.tensor([k for _, k in batch])
                    sums[0].index_add_(0, bins, losses)
                    sums[1].index_add_(0, bins, torch.ones_like(losses))
        except Exception as error:  # noqa: BLE001 a measurement is not worth a run; the others wait for these sums
            log.warning("no held-out loss: %s: %s", type(error).__name__, first_line(error))
            sums.fill_(float("nan"))
        finally:
            model.train(was_training)
        # As float32: not every backend reduces float64.
        losses, counts = self.accelerator.reduce(
            sums.float().to(self.accelerator.device), reduction="sum"
        ).tolist()
        # Not a number where every picture held out is unreadable.
        means = [a / n if n else math.nan for a, n in zip(losses, counts, strict=True)]
        found = {f"heldout_loss/t={t:.3f}": a for t, a in zip(self.times.tolist(), means, strict=True)}
        return {"heldout_loss": sum(means) / BINS} | found

    def _batches(self) -> list[list[tuple[int, int]]]:
        """(sample, bin) pairs in batches of one picture size."""
        sizes: dict[torch.Size, list[tuple[int, int]]] = {}
        for index, latents in enumerate(self.latents):
            sizes.setdefault(latents.shape, []).extend((index, k) for k in range(BINS))
        step = self.batch_size
        return [pairs[i : i + step] for pairs in sizes.values() for i in range(0, len(pairs), step)]

    def _losses(self, model: nn.Module, batch: list[tuple[int, int]]) -> Tensor:
        """(B,) float64, on the CPU."""
        device = self.accelerator.device
        latents = torch.stack([self.latents[index] for index, _ in batch]).to(device)
        noise = torch.stack(
            [
                torch.randn(self.latents[i].shape, generator=generator("held out", self.seed, i, k))
                for i, k in batch
            ]
        ).to(device)
        texts = [self.texts[index] for index, _ in batch]
        text = padded([one.embeds[one.mask.bool()] for one in texts], device)
        t = self.times[[k for _, k in batch]]
        with self.accelerator.autocast():
            prediction = model(
                flow.interpolate(latents, noise, t), flow.network_time(t).to(device), text.embeds, text.mask
            )
        return flow.loss(prediction, flow.velocity_target(latents, noise), per_sample=True).double().cpu()
