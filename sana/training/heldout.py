"""The loss on pictures that training never sees, always at the same times and with the same noise.

So its curve shows learning and over-fitting without the scatter of drawn times: that of the training loss is larger than
what a hundred steps gain. Times stand in the middle of eight bins of equal share in the levels that training visits.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from sana.config import SanaConfig
from sana.data.captions import Caption
from sana.data.loader import Samples
from sana.data.quarantine import UNREADABLE
from sana.data.shapes import ShapesDataset
from sana.diffusion import flow
from sana.models.text_encoder import TextEncoder, TextFeatures
from sana.utils.logging import get_logger
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
        """(3, height, width) in [-1, 1]."""
        return self.samples.image(self.indices[index])

    def captions(self, index: int) -> list[Caption]:
        """All captions of picture `index`."""
        return self.samples.captions(self.indices[index])

    def caption(self, index: int, epoch: int) -> str:
        """One caption of picture `index`."""
        return self.samples.caption(self.indices[index], epoch)


def hold_out(config: SanaConfig, samples: Samples) -> tuple[Samples, Samples | None]:
    """(what to train on, what to hold out): `train.heldout_samples` pictures, at most one in a hundred.

    The shapes have scenes of their own for it, none of whose combinations is in training.
    """
    count = config.train.heldout_samples
    if count == 0:
        return samples, None
    if config.data.type == "SanaShapes":
        return samples, ShapesDataset(config.model.image_size, count, split="validation")
    count = min(count, len(samples) // 100)
    if count == 0:
        log.info("%d pictures are too few to hold some out (100 for each): no held-out loss", len(samples))
        return samples, None
    held = torch.randperm(len(samples), generator=generator("held out", config.train.seed))[:count].tolist()
    kept = [index for index in range(len(samples)) if index not in set(held)]
    return Subset(samples, kept, "train"), Subset(samples, sorted(held), "held out")


class HeldOutLoss:
    """The velocity loss of any model on `samples`.

    Args:
        config: its flow shift and seed.
        samples: never trained on; encoded here, once.
        encode_images: pixels (1, 3, H, W) on the CPU -> scaled latents.
        text_encoder: for the captions.
        accelerator: the processes share the work.
    """

    def __init__(
        self,
        config: SanaConfig,
        samples: Samples,
        encode_images: Callable[[Tensor], Tensor],
        text_encoder: TextEncoder,
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
            except UNREADABLE as error:
                if samples.quarantine is None:
                    raise
                samples.quarantine.add(samples.label(index), error)
                continue
            text = text_encoder.encode([caption])
            self.latents.append(encode_images(image[None])[0].cpu())
            self.texts.append(TextFeatures(text.embeds[0].cpu(), text.mask[0].cpu()))

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
        except (
            RuntimeError
        ) as error:  # an out-of-memory error among them; the others wait for this process's sums
            log.warning("no held-out loss: %s", str(error).splitlines()[0])
            sums.fill_(float("nan"))
        finally:
            model.train(was_training)
        # As float32: not every backend reduces float64.
        losses, counts = self.accelerator.reduce(
            sums.float().to(self.accelerator.device), reduction="sum"
        ).tolist()
        found = {
            f"heldout_loss/t={t:.3f}": a / n
            for t, a, n in zip(self.times.tolist(), losses, counts, strict=True)
        }
        return {"heldout_loss": sum(losses) / sum(counts)} | found

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
        embeds = torch.stack([self.texts[index].embeds for index, _ in batch])
        mask = torch.stack([self.texts[index].mask for index, _ in batch])
        text = TextFeatures(embeds.to(device), mask.to(device)).trimmed()
        t = self.times[[k for _, k in batch]]
        with self.accelerator.autocast():
            prediction = model(
                flow.interpolate(latents, noise, t), flow.network_time(t).to(device), text.embeds, text.mask
            )
        return flow.loss(prediction, flow.velocity_target(latents, noise), per_sample=True).double().cpu()
