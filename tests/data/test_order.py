"""The order of samples, over random data sets, bucket counts, batch sizes and numbers of processes."""

import random
from collections import Counter

import pytest
import torch

from sana.data.order import Order


def random_case(seed):
    """(bucket of each sample, share of a process, processes, accumulation); some buckets smaller than a batch."""
    draw = random.Random(seed)
    wanted = [draw.choice([1, 2, draw.randint(1, 40)]) for _ in range(draw.randint(1, 9))]
    buckets = [bucket for bucket, count in enumerate(wanted) for _ in range(count)]
    draw.shuffle(buckets)
    return buckets, draw.randint(1, 6), draw.choice([1, 2, 3, 4, 8]), draw.randint(1, 3)


def order_of(buckets, batch_size, seed=0):
    return Order(num_samples=len(buckets), batch_size=batch_size, seed=seed, buckets=torch.tensor(buckets))


@pytest.mark.parametrize("seed", range(60))
def test_an_epoch_of_buckets(seed):
    buckets, share, processes, accumulation = random_case(seed)
    batch_size = share * processes * accumulation
    order = order_of(buckets, batch_size, seed)
    population = Counter(buckets)
    for epoch in (0, 1, 5):
        seen, batches_of = Counter(), Counter()
        for position in range(order.steps_per_epoch):
            number, bucket, indices = order.batch(epoch * order.steps_per_epoch + position)
            assert number == epoch and len(indices) == batch_size
            assert {buckets[index] for index in indices} == {bucket}, "a batch has one size"
            seen.update(indices)
            batches_of[bucket] += 1
        assert set(seen) == set(range(len(buckets))), "nothing is dropped"
        for bucket, count in population.items():
            assert batches_of[bucket] == -(-count // batch_size) == order.batches_per_epoch[bucket]
            times = [seen[index] for index in range(len(buckets)) if buckets[index] == bucket]
            assert max(times) - min(times) <= 1, "repeats are spread evenly over the bucket"
            assert sum(times) - len(times) < batch_size, "no more repeats than fill one batch"


@pytest.mark.parametrize("seed", range(30))
def test_no_key_comes_twice(seed):
    buckets, share, processes, accumulation = random_case(seed)
    order = order_of(buckets, share * processes * accumulation, seed)
    keys = [key for step in range(4 * order.steps_per_epoch) for key in order.keys(step)]
    assert len(set(keys)) == len(keys)
    for step in range(order.steps_per_epoch):
        assert [index for _, index in order.keys(step)] == order.batch(step).indices


def test_the_pass_is_the_epoch_where_batches_are_full():
    order = order_of([0] * 8 + [1] * 4, 4)
    for step in range(9):
        epoch, _, indices = order.batch(step)
        assert order.keys(step) == [(epoch, index) for index in indices]


def test_a_set_smaller_than_a_batch_repeats_under_new_keys():
    order = order_of([0] * 3, 8)
    assert order.steps_per_epoch == 1
    for epoch in (0, 1):
        assert Counter(passed for passed, _ in order.keys(epoch)) == {
            3 * epoch: 3,
            3 * epoch + 1: 3,
            3 * epoch + 2: 2,
        }


def test_one_bucket_is_the_permutation_cut_into_batches():
    plain = Order(num_samples=23, batch_size=5, seed=3)
    bucketed = order_of([0] * 23, 5, seed=3)
    assert [plain.batch(step) for step in range(12)] == [bucketed.batch(step) for step in range(12)]
    first = [index for step in range(5) for index in plain.batch(step).indices]
    assert sorted(first[:23]) == list(range(23)) and first[23:] == first[:2]


def test_it_is_shuffled_and_differs_between_epochs_and_seeds():
    orders = [Order(num_samples=100, batch_size=100, seed=seed) for seed in (0, 1)]
    epochs = [tuple(order.batch(step).indices) for order in orders for step in (0, 1)]
    assert len(set(epochs)) == 4 and tuple(range(100)) not in epochs


def test_buckets_are_mixed_over_the_epoch():
    order = order_of([0] * 400 + [1] * 400, 4)
    turns = [order.batch(step).bucket for step in range(order.steps_per_epoch)]
    changes = sum(a != b for a, b in zip(turns, turns[1:], strict=False))
    assert changes > 60  # of 199; independent turns would change 100 times, give or take 7


@pytest.mark.parametrize("seed", range(10))
def test_any_step_can_be_asked_for_first(seed):
    buckets, share, processes, _ = random_case(seed)
    whole = order_of(buckets, share * processes, seed)
    steps = list(range(3 * whole.steps_per_epoch))
    expected = {step: whole.keys(step) for step in steps}
    random.Random(seed).shuffle(steps)
    other = order_of(buckets, share * processes, seed)
    assert all(other.keys(step) == expected[step] for step in steps)


def test_buckets_of_a_data_set_are_its_sizes():
    class Sizes:
        def __len__(self):
            return 5

        def size(self, index):
            return [(64, 32), (32, 64), (64, 32), (32, 32), (32, 64)][index]

    order = Order.of(Sizes(), batch_size=2, seed=0)
    assert order.bucket_sizes == ((32, 32), (32, 64), (64, 32))
    assert order.members == [1, 2, 2] and order.buckets.tolist() == [2, 1, 2, 0, 1]


def test_nothing_to_order_is_an_error():
    with pytest.raises(ValueError, match="0 and 4"):
        Order(num_samples=0, batch_size=4, seed=0)
    with pytest.raises(ValueError, match="3 and 0"):
        Order(num_samples=3, batch_size=0, seed=0)
