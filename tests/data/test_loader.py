"""What each process loads: its share of one global batch, and another sample where one cannot be read."""

import json
import random
from collections import Counter

import pytest
import torch

from sana.config import ConfigError, load_config
from sana.data.build import build_dataset
from sana.data.loader import batches
from sana.data.order import Order
from sana.data.quarantine import Quarantine, TooManyBadSamples


class Numbers:
    """A data set whose picture i is the number i; some cannot be read, and sizes may differ."""

    name = "numbers"

    def __init__(self, count, bad=(), sizes=1, error=OSError, quarantine=None):
        self.count, self.bad, self.sizes, self.error = count, set(bad), sizes, error
        self.quarantine = quarantine
        self.reads = Counter()

    def __len__(self):
        return self.count

    def label(self, index):
        return f"number {index}"

    def size(self, index):
        return 1, 1 + index % self.sizes

    def image(self, index):
        self.reads[index] += 1
        if index in self.bad:
            raise self.error(f"{index} is broken")
        return torch.full(self.size(index), float(index))

    def caption(self, index, epoch):
        return f"{index} in epoch {epoch}"


def stream(rank=0, world_size=1, accumulation=1, first_step=0, workers=0, samples=None, batch_size=8):
    samples = samples or Numbers(20)
    order = Order.of(samples, batch_size=batch_size, seed=3)
    settings = dict(first_step=first_step, accumulation=accumulation, num_workers=workers)
    return batches(samples, order, rank=rank, world_size=world_size, **settings)


@pytest.mark.parametrize("sizes", [1, 3])
@pytest.mark.parametrize("world_size, accumulation", [(1, 1), (2, 1), (1, 2), (2, 2), (4, 2)])
def test_processes_and_accumulation_share_one_global_batch(world_size, accumulation, sizes):
    samples = Numbers(20, sizes=sizes)
    streams = [stream(rank, world_size, accumulation, samples=samples) for rank in range(world_size)]
    order = Order.of(samples, batch_size=8, seed=3)
    for step in range(3 * order.steps_per_epoch):
        parts = [next(s) for _ in range(accumulation) for s in streams]
        assert [key for part in parts for key in part.samples] == order.keys(step)
        assert len({part.pixels.shape for part in parts}) == 1, "every process has the same size"


@pytest.mark.parametrize("seed", range(12))
def test_every_process_has_the_same_number_of_batches(seed):
    draw = random.Random(seed)
    samples = Numbers(draw.randint(1, 50), sizes=draw.randint(1, 7))
    world_size, share = draw.choice([1, 2, 3, 4]), draw.randint(1, 4)
    order = Order.of(samples, batch_size=world_size * share, seed=seed)
    shown = Counter()
    for rank in range(world_size):
        own = stream(rank, world_size, samples=samples, batch_size=world_size * share)
        taken = [next(own) for _ in range(order.steps_per_epoch)]  # one epoch, on every process as many
        assert all(len(batch.captions) == share for batch in taken)
        shown.update(index for batch in taken for _, index in batch.samples)
    assert set(shown) == set(range(len(samples)))


def test_a_batch_that_cannot_be_shared_is_an_error():
    with pytest.raises(ValueError, match="8 samples is not a multiple of 3 processes times 2 batches"):
        stream(0, 3, 2)


def test_a_batch_holds_what_it_says():
    batch = next(stream(first_step=4))
    for pixels, caption, (epoch, index) in zip(batch.pixels, batch.captions, batch.samples, strict=True):
        assert pixels.item() == index and caption == f"{index} in epoch {epoch}"
    assert batch.replaced == {}


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


def test_the_place_of_a_bad_sample_goes_to_the_next_of_its_size(tmp_path):
    log = tmp_path / "bad.jsonl"
    for world_size in (1, 2, 4):
        shown = {}
        for rank in range(world_size):
            samples = Numbers(20, bad=[4, 7, 19], sizes=3, quarantine=Quarantine(log, 3))
            own = stream(rank, world_size, samples=samples)
            for _ in range(12):
                batch = next(own)
                for pixels, caption, (_, index) in zip(
                    batch.pixels, batch.captions, batch.samples, strict=True
                ):
                    loaded = int(pixels[0, 0])
                    assert caption.startswith(f"{loaded} in")
                    assert batch.replaced.get(index, index) == loaded
                    shown.setdefault(index, set()).add(loaded)
            assert all(samples.reads[index] <= 1 for index in samples.bad), "a bad one is not tried again"
        # 4 and 7 are of one size, as are 19 and 1: the next one that can be read, from the first again.
        assert {index: found for index, found in shown.items() if found != {index}} == {
            4: {10},
            7: {10},
            19: {1},
        }
    named = [json.loads(line) for line in log.read_text().splitlines()]
    assert sorted(line["sample"] for line in named) == ["number 19", "number 4", "number 7"], "each once"
    assert named[0]["reason"].endswith("is broken")


def test_more_bad_samples_than_the_limit_stop_the_run(tmp_path):
    samples = Numbers(20, bad=[4, 7, 19], quarantine=Quarantine(tmp_path / "bad.jsonl", 2))
    own = stream(samples=samples)
    with pytest.raises(TooManyBadSamples, match="3 samples cannot be read, more than the 2 .*bad.jsonl"):
        for _ in range(12):
            next(own)


def test_a_size_without_a_readable_sample_is_an_error():
    samples = Numbers(4, bad=[1, 3], sizes=2, quarantine=Quarantine(None, 9))
    own = stream(samples=samples, batch_size=1)
    with pytest.raises(RuntimeError, match="no sample of 1 x 2 pixels can be read"):
        for _ in range(4):
            next(own)


class Unpicklable(Exception):
    """Like safetensors' error: its class cannot be imported where it says."""

    __module__ = "nowhere"


@pytest.mark.parametrize("workers", [0, 1])
def test_no_error_of_a_worker_can_hang_the_run(workers):
    samples = Numbers(8, bad=range(8), error=Unpicklable, quarantine=Quarantine(None, 9))
    with pytest.raises(RuntimeError, match="(?s)reading sample .* failed.*Unpicklable: . is broken"):
        next(stream(samples=samples, workers=workers))


def test_the_limit_is_known_in_the_main_process_too(tmp_path):
    samples = Numbers(20, bad=range(20), quarantine=Quarantine(tmp_path / "bad.jsonl", 2))
    with pytest.raises(TooManyBadSamples) as caught:
        next(stream(samples=samples, workers=1))
    # One line for people, though a worker puts its traceback before it.
    assert str(caught.value).startswith(
        "3 samples cannot be read, more than the 2 that data.bad_sample_limit"
    )
    assert "bad.jsonl (delete it once they are mended); the last one is number" in str(caught.value)


def test_a_full_disk_does_not_end_the_run_over_a_bad_sample(tmp_path, monkeypatch, caplog):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("sana.data.quarantine.os.open", full)
    samples = Numbers(20, bad=[4], quarantine=Quarantine(tmp_path / "bad.jsonl", 1))
    own = stream(samples=samples)
    assert 4 in {number for _ in range(3) for number in next(own).replaced}
    assert "left out number 4" in caplog.text and "cannot write" in caplog.text


def test_a_broken_cache_file_is_a_bad_sample(tmp_path):
    from safetensors import safe_open

    (tmp_path / "latents.safetensors").write_bytes(b"not a safetensors file")

    class Latents(Numbers):
        def image(self, index):
            if index == 2:
                with safe_open(tmp_path / "latents.safetensors", "pt") as stored:
                    return stored.get_tensor("x")
            return torch.zeros(1)

    samples = Latents(6, quarantine=Quarantine(tmp_path / "bad.jsonl", 1))
    assert next(stream(samples=samples, batch_size=6)).replaced == {2: 3}
    assert "header" in (tmp_path / "bad.jsonl").read_text().lower()


def config(*overrides: str):
    return load_config("configs/sana_config/tiny/Sana_tiny_img256.yaml", overrides)


def test_datasets_by_their_published_names(tmp_path):
    assert len(build_dataset(config("--data.num_scenes=7"))) == 7
    with pytest.raises(ConfigError, match="SanaVideo cannot be trained on"):
        build_dataset(config("--data.type=SanaVideo", f"--data.data_dir=[{tmp_path}]"))
    with pytest.raises(ConfigError, match="data.data_dir: SanaImgDataset needs a folder"):
        build_dataset(config("--data.type=SanaImgDataset"))
    with pytest.raises(ConfigError, match="multi_scale"):
        build_dataset(config("--model.multi_scale=true"))
    with pytest.raises(ConfigError, match="hq_only"):
        build_dataset(
            config("--data.type=SanaImgDataset", f"--data.data_dir=[{tmp_path}]", "--data.hq_only=true")
        )
    with pytest.raises(ValueError, match="no picture .* in"):
        build_dataset(config("--data.type=SanaImgDataset", f"--data.data_dir=[{tmp_path}]"))
    with pytest.raises(ValueError, match="no tar shard in .*SanaImgDataset"):
        build_dataset(config("--data.type=SanaWebDatasetMS", f"--data.data_dir=[{tmp_path}]"))
    with pytest.raises(ValueError, match="holds no Hugging Face data set"):
        build_dataset(config("--data.type=SanaHFDataset", f"--data.data_dir=[{tmp_path}]"))
