"""The order of samples: a pure function of the step, the same on any number of processes."""

import random
from collections import Counter

import pytest
import torch

from sana.config import ConfigError, load_config
from sana.data.loader import Order, batches, build_dataset


class Numbers:
    """A data set whose picture i is the number i."""

    name = "numbers"

    def __init__(self, count: int) -> None:
        self.count = count

    def __len__(self) -> int:
        return self.count

    def image(self, index: int) -> torch.Tensor:
        return torch.full((1,), float(index))

    def caption(self, index: int, epoch: int) -> str:
        return f"{index} in epoch {epoch}"


@pytest.mark.parametrize("seed", range(40))
def test_an_epoch_shows_every_sample_and_loses_no_tail(seed):
    draw = random.Random(seed)
    num_samples, batch_size = draw.randint(1, 60), draw.randint(1, 16)
    order = Order(num_samples=num_samples, batch_size=batch_size, seed=seed)
    for epoch in (0, 1):
        seen = Counter()
        for position in range(order.steps_per_epoch):
            number, indices = order.batch(epoch * order.steps_per_epoch + position)
            assert number == epoch and len(indices) == batch_size
            seen.update(indices)
        assert set(seen) == set(range(num_samples))
        assert max(seen.values()) - min(seen.values()) <= 1


def test_order_is_shuffled_and_differs_between_epochs_and_seeds():
    orders = [Order(num_samples=100, batch_size=100, seed=seed) for seed in (0, 1)]
    epochs = [tuple(order.batch(step)[1]) for order in orders for step in (0, 1)]
    assert len(set(epochs)) == 4 and tuple(range(100)) not in epochs


def stream(rank=0, world_size=1, accumulation=1, first_step=0, workers=0, batch_size=8):
    order = Order(num_samples=20, batch_size=batch_size, seed=3)
    settings = dict(first_step=first_step, accumulation=accumulation, num_workers=workers)
    return batches(Numbers(20), order, rank=rank, world_size=world_size, **settings)


@pytest.mark.parametrize("world_size, accumulation", [(1, 1), (2, 1), (1, 2), (2, 2), (4, 2)])
def test_processes_and_accumulation_share_one_global_batch(world_size, accumulation):
    streams = [stream(rank, world_size, accumulation) for rank in range(world_size)]
    for step in range(6):
        parts = [next(s) for _ in range(accumulation) for s in streams]
        together = [sample for part in parts for sample in part.samples]
        epoch, indices = Order(num_samples=20, batch_size=8, seed=3).batch(step)
        assert together == [(epoch, index) for index in indices]


def test_a_batch_holds_what_it_says():
    batch = next(stream(first_step=4))
    for pixels, caption, (epoch, index) in zip(batch.pixels, batch.captions, batch.samples, strict=True):
        assert pixels.item() == index and caption == f"{index} in epoch {epoch}"


def test_starting_at_a_step_is_going_on_there():
    whole, tail = stream(), stream(first_step=5)
    for _ in range(5):
        next(whole)
    for _ in range(4):
        assert next(whole).samples == next(tail).samples


def test_workers_change_nothing():
    plain, parallel = stream(), stream(workers=1)
    for _ in range(5):
        a, b = next(plain), next(parallel)
        assert a.samples == b.samples and torch.equal(a.pixels, b.pixels)


def config(*overrides: str):
    return load_config("configs/sana_config/tiny/Sana_tiny_img256.yaml", overrides)


def test_datasets_by_their_published_names(tmp_path):
    assert len(build_dataset(config("--data.num_scenes=7"))) == 7
    with pytest.raises(ConfigError, match="SanaWebDatasetMS cannot be trained on so far"):
        build_dataset(config("--data.type=SanaWebDatasetMS"))
    with pytest.raises(ConfigError, match="multi_scale"):
        build_dataset(config("--model.multi_scale=true"))
    with pytest.raises(ValueError, match="no picture .* in"):
        build_dataset(config("--data.type=SanaImgDataset", f"--data.data_dir=[{tmp_path}]"))
