"""Frechet distances against pytorch-fid and torch-fidelity on the same features, and on sets whose distance is known."""

import numpy as np
import pytest
import torch
from pytorch_fid.fid_score import calculate_frechet_distance
from torch_fidelity.metric_fid import fid_features_to_statistics, fid_statistics_to_metric
from transformers import CLIPModel, Dinov2Config, Dinov2Model

from sana.metrics.features import feature_network
from sana.metrics.fid import Moments, Statistics, frechet_distance, measure, set_statistics
from sana.metrics.image_set import open_image, read_image_set
from tests.labellers import write_clip
from tests.scorers import write_inception, write_pictures


def draw(dims, count, seed, *, shift=0.0, scale=1.0):
    """Float32 features like a network's: correlated, of very different variances, with a mean."""
    generator = np.random.default_rng(seed)
    mixing = np.random.default_rng(0).normal(size=(dims, dims)) / dims**0.5 * np.linspace(0.01, 1, dims)
    return ((generator.normal(size=(count, dims)) @ mixing + 1) * scale + shift).astype(np.float32)


def statistics(features, parts=3):
    moments = Moments(features.shape[1])
    for part in np.array_split(features, parts):
        moments.add(part)
    return moments.statistics()


def theirs(first, second):
    """(pytorch-fid's distance, torch-fidelity's), each with its own statistics."""
    one, two = (
        fid_features_to_statistics(torch.from_numpy(features.astype(np.float64)))
        for features in (first, second)
    )
    values = [
        (features.mean(0, dtype=np.float64), np.cov(features, rowvar=False)) for features in (first, second)
    ]
    fidelity = fid_statistics_to_metric(one, two, verbose=False)["frechet_inception_distance"]
    return calculate_frechet_distance(*values[0], *values[1]), fidelity


@pytest.mark.filterwarnings("ignore:The `disp` argument is deprecated:DeprecationWarning")
@pytest.mark.parametrize(("first", "second"), [(1000, 900), (100, 120), (256, 40), (2, 300)])
def test_equals_other_implementations(first, second):
    """Of full rank, and of less: with fewer pictures than dimensions both covariances are singular."""
    one, two = draw(256, first, 1), draw(256, second, 2, shift=0.05, scale=1.1)
    found = frechet_distance(statistics(one), statistics(two))
    assert [found] * 2 == pytest.approx(
        list(theirs(one, two)), rel=1e-5
    )  # measured: 6e-8, of which ours is the exact one
    assert found > 1


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:The `disp` argument is deprecated:DeprecationWarning")
def test_equals_other_implementations_at_full_length():
    one, two = draw(2048, 2500, 1), draw(2048, 500, 2, shift=0.05, scale=1.1)
    found = frechet_distance(statistics(one), statistics(two))
    assert [found] * 2 == pytest.approx(list(theirs(one, two)), rel=1e-5)


@pytest.mark.parametrize("count", [600, 40, 2])
def test_known_distances(count):
    """A shifted set is |shift|^2 away, and one scaled by a is (a - 1)^2 (|mu|^2 + tr S) away, singular or not."""
    own = statistics(draw(128, count, 1))
    spread = np.trace(own.sigma)
    assert frechet_distance(own, own) < 1e-12 * spread
    moved = Statistics(own.mu + 0.1, own.sigma)
    assert frechet_distance(own, moved) == pytest.approx(1.28, rel=1e-10)
    scaled = Statistics(1.5 * own.mu, 2.25 * own.sigma)
    assert frechet_distance(own, scaled) == pytest.approx(0.25 * (own.mu @ own.mu + spread), rel=1e-10)
    point = Statistics(own.mu, np.zeros_like(own.sigma))
    assert frechet_distance(own, point) == pytest.approx(spread, rel=1e-12)
    other = statistics(draw(128, 50, 2))
    assert frechet_distance(own, other) == pytest.approx(frechet_distance(other, own), rel=1e-10)


def test_collapse_is_seen():
    reference = statistics(draw(32, 400, 1))
    near = frechet_distance(statistics(draw(32, 400, 2)), reference)
    collapsed = np.repeat(draw(32, 4, 2), 100, axis=0)
    assert frechet_distance(statistics(collapsed), reference) > 5 * near


@pytest.mark.parametrize("parts", [1, 2, 7, 50])
def test_parts_do_not_matter(parts):
    """Neither how features are cut nor in what order processes are joined; also far from 0, where sums of squares fail."""
    features = draw(24, 50, 3).astype(np.float64) + 1e6
    shards = [Moments(24) for _ in range(3)]
    for place, part in enumerate(np.array_split(features, parts)):
        shards[place % 3].add(part)
    total = Moments(24)
    for shard in reversed(shards):
        total.merge(shard)
    found, expected = total.statistics(), np.cov(features, rowvar=False)
    assert found.n == 50
    assert np.allclose(found.mu, features.mean(0), rtol=1e-15)
    assert np.abs(found.sigma - expected).max() < 1e-9 * np.abs(expected).max()  # measured: 1e-10


def test_files(tmp_path):
    own = statistics(draw(16, 30, 1))
    named = Statistics(own.mu, own.sigma, 30, "inception clean 16")
    named.save(tmp_path / "ours.npz")
    with np.load(tmp_path / "ours.npz") as file:  # as pytorch-fid reads it
        assert np.array_equal(file["mu"][:], own.mu) and np.array_equal(file["sigma"][:], own.sigma)
    loaded = Statistics.load(tmp_path / "ours.npz")
    assert (loaded.n, loaded.features) == (30, "inception clean 16")
    np.savez_compressed(tmp_path / "theirs.npz", mu=own.mu, sigma=own.sigma)  # as pytorch-fid writes it
    assert Statistics.load(tmp_path / "theirs.npz").n is None
    assert frechet_distance(Statistics.load(tmp_path / "theirs.npz"), loaded) < 1e-12
    other = Statistics(own.mu, own.sigma, 30, "inception pytorch-fid@512 16")
    with pytest.raises(
        ValueError, match="'inception clean 16' and of 'inception pytorch-fid@512 16' do not compare"
    ):
        frechet_distance(loaded, other)
    with pytest.raises(ValueError, match="16 and of 8 dimensions do not compare"):
        frechet_distance(own, statistics(draw(8, 30, 1)))
    with pytest.raises(ValueError, match="at least two pictures, got 1"):
        statistics(draw(8, 1, 1), parts=1)


def test_broken_files(tmp_path):
    path = tmp_path / "stats.npz"
    with pytest.raises(ValueError, match="cannot be read as statistics"):
        Statistics.load(path)
    for fields, message in (
        ({"mu": np.zeros(3)}, "holds no statistics"),
        ({"mu": np.zeros(3), "sigma": np.eye(4)}, "do not fit together"),
        ({"mu": np.array([0, np.nan]), "sigma": np.eye(2)}, "not finite"),
    ):
        np.savez(path, **fields)
        with pytest.raises(ValueError, match=message):
            Statistics.load(path)
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(ValueError, match="cannot be read as statistics"):
        Statistics.load(path)


@pytest.fixture(scope="module")
def inception(tmp_path_factory):
    return write_inception(tmp_path_factory.mktemp("inception") / "random.pth")


def test_from_pictures_to_a_report(inception, tmp_path):
    network = feature_network(dims=64, weights=inception)
    items = read_image_set(write_pictures(tmp_path / "set", 5))
    reference = read_image_set(write_pictures(tmp_path / "reference", 6, seed=1))
    report, own, other = measure(items, reference, network, tmp_path / "work", batch_size=2)
    assert (own.n, other.n, len(own.mu)) == (5, 6, 64)
    assert report.values["FID"] == frechet_distance(own, other) > 0.1
    assert report.protocol == "inception pytorch-fid@512 64; 6 reference pictures"
    assert report.weights == {"features": network.sha256} and report.n == 5
    other.save(tmp_path / "reference.npz")
    again, _, _ = measure(
        items, Statistics.load(tmp_path / "reference.npz"), network, tmp_path / "work", batch_size=2
    )
    assert again.values == report.values
    large = set_statistics(items, network, tmp_path / "large", batch_size=5)
    assert frechet_distance(large, other) == pytest.approx(report.values["FID"], rel=1e-5), "batch size"
    with pytest.raises(ValueError, match="at least two pictures, got 1"):
        measure(items[:1], other, network, tmp_path / "one")


def test_clip_features(tmp_path):
    """clean-fid's convention: the embedding as it is, of pixels that Pillow has resized."""
    folder = write_clip(tmp_path / "clip")
    network = feature_network("clip-vit-b-32", weights=folder)
    items = read_image_set(write_pictures(tmp_path / "set", 3, side=32))
    pixels = torch.stack([network.prepare(open_image(item.path)) for item in items])
    with torch.no_grad():
        expected = CLIPModel.from_pretrained(folder).get_image_features(pixel_values=pixels).pooler_output
    assert torch.equal(network.embed(pixels), expected)
    assert (expected.norm(dim=1) - 1).abs().min() > 0.05, "not normalised"
    report, _, _ = measure(items, items, network, tmp_path / "work")
    assert report.metric == "CLIP-FID" and report.values["CLIP-FID"] < 1e-9


def test_dinov2_features(tmp_path):
    size = dict(hidden_size=16, num_hidden_layers=2, num_attention_heads=2, patch_size=14, image_size=56)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        Dinov2Model(Dinov2Config(**size)).save_pretrained(tmp_path / "dinov2")
    network = feature_network("dinov2-vit-b-14", weights=tmp_path / "dinov2")
    items = read_image_set(write_pictures(tmp_path / "set", 2))
    pixels = torch.stack([network.prepare(open_image(item.path)) for item in items])
    assert pixels.shape == (2, 3, 224, 224)
    with torch.no_grad():
        output = Dinov2Model.from_pretrained(tmp_path / "dinov2")(pixel_values=pixels).last_hidden_state[:, 0]
    torch.testing.assert_close(network.embed(pixels), output)
    assert network.metric == "FD-DINOv2"


def test_wrong_features(tmp_path):
    with pytest.raises(ValueError, match="unknown features 'vgg'; choose from inception, clip-vit-b-32"):
        feature_network("vgg")
    with pytest.raises(ValueError, match="belong to Inception, not to clip-vit-b-32"):
        feature_network("clip-vit-b-32", preset="clean")
    with pytest.raises(ValueError, match="not of 100"):
        feature_network(dims=100)
    with pytest.raises(ValueError, match="to fetch it: hf download openai/clip-vit-base-patch32"):
        feature_network("clip-vit-b-32", weights=tmp_path / "nowhere")
