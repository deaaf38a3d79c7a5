"""What is downloaded, from where it is read, and why it failed, with a hub that is a folder: no network."""

import json
import shutil

import huggingface_hub.constants
import pytest
from huggingface_hub import snapshot_download as real_snapshot_download
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HTTPError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    Response,
)
from huggingface_hub.utils import filter_repo_objects

from sana.utils import hub

INDEX = "diffusion_pytorch_model.safetensors.index.json"
SINGLE = "diffusion_pytorch_model.safetensors"


def write(folder, *files, shards=()):
    """Files that hold their own names; an index lists `shards`."""
    for name in files:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(name)
        if name.endswith(".json") and ".index" in name:
            path.write_text(json.dumps({"weight_map": {f"weight{i}": s for i, s in enumerate(shards)}}))
    return folder


@pytest.fixture
def fake_hub(tmp_path, monkeypatch):
    """A hub with one repository, `remote`; returns it with the list of what was fetched."""
    remote, cache, fetched = tmp_path / "remote", tmp_path / "cache", []
    cache.mkdir()

    def snapshot_download(repo, allow_patterns=None):
        assert repo == "owner/repo"
        files = [str(file.relative_to(remote)) for file in remote.rglob("*") if file.is_file()]
        for name in filter_repo_objects(files, allow_patterns=allow_patterns):
            if not (cache / name).exists():
                (cache / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(remote / name, cache / name)
                fetched.append(name)
        return str(cache)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    return remote, cache, fetched


OTHERS = ("model_index.json", "vae/config.json", "vae/diffusion_pytorch_model.safetensors", "tokenizer/tokenizer.json",
          "text_encoder/model.safetensors", "text_encoder/model.safetensors.index.json", "README.md")  # fmt: skip


@pytest.mark.parametrize("name", ["hf://owner/repo", "owner/repo", "hf://owner/repo/transformer"])
def test_only_the_transformer_of_a_pipeline_is_fetched(fake_hub, name):
    remote, cache, fetched = fake_hub
    variant = "transformer/diffusion_pytorch_model.fp16.safetensors"
    write(remote, *OTHERS, variant, "transformer/config.json", f"transformer/{SINGLE}")
    assert hub.resolve_weights(name) == cache / "transformer" / SINGLE
    assert sorted(fetched) == ["transformer/config.json", f"transformer/{SINGLE}"]


def test_only_the_shards_of_the_index_are_fetched(fake_hub):
    remote, cache, fetched = fake_hub
    shards = ["a-00001-of-00002.safetensors", "a-00002-of-00002.safetensors"]
    files = [f"transformer/{name}" for name in ("config.json", INDEX, *shards)]
    write(remote, *OTHERS, "transformer/a-00001-of-00002.fp16.safetensors", *files, shards=shards)
    assert hub.resolve_weights("hf://owner/repo") == cache / "transformer" / INDEX
    assert sorted(fetched) == sorted(files)


@pytest.mark.parametrize("folder", ["", "transformer/"])
def test_an_index_brings_its_shards(fake_hub, folder):
    remote, cache, fetched = fake_hub
    write(
        remote,
        f"{folder}my.safetensors.index.json",
        f"{folder}one.safetensors",
        "b",
        shards=["one.safetensors"],
    )
    found = hub.resolve_weights(f"hf://owner/repo/{folder}my.safetensors.index.json")
    assert found == cache / folder / "my.safetensors.index.json"
    assert sorted(fetched) == [f"{folder}my.safetensors.index.json", f"{folder}one.safetensors"]


def test_the_only_variant_is_taken(fake_hub):
    remote, cache, fetched = fake_hub
    variant = "transformer/diffusion_pytorch_model.bf16.safetensors"
    write(remote, *OTHERS, variant, "transformer/config.json")
    assert hub.resolve_weights("owner/repo") == cache / variant
    assert sorted(fetched) == sorted(["transformer/config.json", variant])


def test_one_file_is_fetched_alone(fake_hub):
    remote, cache, fetched = fake_hub
    write(remote, *OTHERS, "checkpoints/a.pth", "checkpoints/b.pth")
    assert hub.resolve_weights("hf://owner/repo/checkpoints/a.pth") == cache / "checkpoints" / "a.pth"
    assert fetched == ["checkpoints/a.pth"]


def test_a_network_of_its_own_repository(fake_hub):
    remote, cache, fetched = fake_hub
    write(remote, "README.md", "config.json", SINGLE)
    assert hub.resolve_weights("owner/repo") == cache / SINGLE
    assert sorted(fetched) == ["config.json", SINGLE]


@pytest.mark.parametrize(
    ("weights", "others"),
    [
        (["model.safetensors"], ["model.fp16.safetensors", "pytorch_model.bin", "model.gguf", "tf_model.h5"]),
        ([SINGLE], ["diffusion_pytorch_model.fp16.safetensors", "diffusion_pytorch_model.bin"]),
        (["model.safetensors.index.json", "a.safetensors"], ["model.fp16-00001-of-00002.safetensors"]),
        (["pytorch_model.bin"], []),  # nothing under a usual name: all that there is
        (["pytorch_lora_weights.safetensors"], []),
    ],
    ids=["model", "diffusers", "shards", "bin", "lora"],
)
@pytest.mark.parametrize("place", ["", "vae/"])
def test_of_a_model_no_variant_is_fetched(fake_hub, weights, others, place):
    remote, cache, fetched = fake_hub
    settings = ["config.json", "tokenizer.json", "tokenizer.model", "merges.txt"]
    wanted = [place + name for name in (*weights, *settings)]
    write(remote, *wanted, *(place + name for name in others), shards=["a.safetensors"])
    assert hub.resolve_model(f"hf://owner/repo/{place}") == cache / place
    assert sorted(fetched) == sorted(wanted)
    assert hub.resolve_model(f"hf://owner/repo/{place}{weights[-1]}") == cache / place / weights[-1]


def test_a_text_encoder_comes_with_its_tokenizer(fake_hub):
    remote, cache, fetched = fake_hub
    write(remote, "text_encoder/model.fp16.safetensors", "tokenizer/tokenizer.json", *OTHERS[:3])
    write(remote, "text_encoder/config.json", "text_encoder/model.safetensors")
    assert hub.resolve_model("hf://owner/repo/text_encoder") == cache / "text_encoder"
    assert sorted(fetched) == [
        "text_encoder/config.json",
        "text_encoder/model.safetensors",
        "tokenizer/tokenizer.json",
    ]


def test_a_pipeline_is_known_without_its_weights(fake_hub, tmp_path):
    remote, cache, fetched = fake_hub
    write(remote, *OTHERS, "config.yaml", "scheduler/scheduler_config.json", f"transformer/{SINGLE}")
    assert hub.pipeline_folder("owner/repo") == cache
    assert sorted(fetched) == ["config.yaml", "model_index.json", "scheduler/scheduler_config.json"]
    for name in (
        "hf://owner/repo/transformer",
        "hf://owner/repo/a.pth",
        tmp_path / "none",
        cache / "scheduler",
    ):
        assert hub.pipeline_folder(name) is None
    assert hub.pipeline_folder(remote) == remote


def test_a_repository_without_weights_says_so(fake_hub):
    remote, cache, _ = fake_hub
    write(remote, *OTHERS, "a.pth", "b.pth")
    write(cache, "a.pth")  # fetched by name before: that must not make it the answer
    with pytest.raises(
        ValueError, match="hf://owner/repo: no weights of a transformer .* name the file"
    ) as caught:
        hub.resolve_weights("owner/repo")
    assert "\n" not in str(caught.value)


# Local folders


def test_local_folders(tmp_path):
    pipeline = write(tmp_path / "p", *OTHERS, f"transformer/{SINGLE}", "transformer/other.safetensors")
    assert hub.resolve_weights(pipeline) == pipeline / "transformer" / SINGLE
    assert hub.resolve_weights(pipeline / "transformer") == pipeline / "transformer" / SINGLE
    assert hub.resolve_weights(pipeline, part="vae") == pipeline / "vae" / SINGLE
    sharded = write(tmp_path / "s", "x.safetensors", "my.safetensors.index.json", shards=["x.safetensors"])
    assert hub.resolve_weights(sharded) == sharded / "my.safetensors.index.json"
    alone = write(tmp_path / "one", "epoch_3.pth", "config.yaml")
    assert hub.resolve_weights(alone) == alone / "epoch_3.pth"
    with pytest.raises(ValueError, match=r"holds 2 files of weights \(a.pth, b.pth\): name the one"):
        hub.resolve_weights(write(tmp_path / "two", "a.pth", "b.pth"))
    with pytest.raises(ValueError, match="no weights in it or its transformer/"):
        hub.resolve_weights(write(tmp_path / "none", "config.json"))


def test_a_missing_local_file_is_not_sought_on_the_hub():
    """`weights/model.pth` could be a hub id by its form."""
    for name in ("weights/model.pth", "weights/model.safetensors", "./no/such", ""):
        with pytest.raises(ValueError, match="no such file or folder"):
            hub.resolve_weights(name)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "not an index of shards"),
        ('{"weight_map": {"a": "x.safe', "not an index of shards"),
        ("[1]", "not an index of shards"),
        ('{"metadata": {}}', "not an index of shards"),
        ('{"weight_map": {"a": 1}}', "not an index of shards"),
        ('{"weight_map": {}}', "an empty index"),
        ('{"weight_map": {"a": "../secret.safetensors"}}', "'../secret.safetensors' outside its folder"),
    ],
)
def test_bad_indexes_are_one_line(content, message, tmp_path):
    (tmp_path / INDEX).write_text(content)
    with pytest.raises(ValueError, match=message) as caught:
        hub.read_index(tmp_path / INDEX)
    assert "\n" not in str(caught.value)


def test_the_hash_of_an_index_is_that_of_its_shards(tmp_path):
    index = write(tmp_path, INDEX, "a.safetensors", "other.txt", shards=["a.safetensors"]) / INDEX
    before = hub.sha256(index)
    (tmp_path / "other.txt").write_text("changed")
    assert hub.sha256(index) == before
    (tmp_path / "a.safetensors").write_text("changed")
    assert hub.sha256(index) != before


# Failures


def http_error(kind: type[HfHubHTTPError], status: int) -> HfHubHTTPError:
    return kind("403 Client Error.\nA long story.", response=Response(status, request=object()))


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (
            http_error(GatedRepoError, 403),
            "owner/repo is gated: accept its terms on https://huggingface.co/owner/repo",
        ),
        (
            http_error(RepositoryNotFoundError, 401),
            "the hub has no repository 'owner/repo', or it is private: check the",
        ),
        (
            LocalEntryNotFoundError("a\nb"),
            "the hub cannot be reached, and it is not in the local cache; give a local",
        ),
        (
            OfflineModeIsEnabled("Cannot reach it: offline mode"),
            "Cannot reach it: offline mode; without a network",
        ),
        (HTTPError("proxy refused\nmore"), "proxy refused; without a network, give a local path"),
        (http_error(HfHubHTTPError, 500), "403 Client Error.; without a network"),
    ],
    ids=["gated", "misspelt", "no network", "offline", "proxy", "server"],
)
def test_why_a_download_failed(error, message, monkeypatch):
    def snapshot_download(*args, **kwargs):
        raise error

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)  # tests/run.sh sets it
    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    for resolve in (hub.resolve, hub.resolve_weights):
        with pytest.raises(ValueError, match="could not fetch hf://owner/repo/a.pth: ") as caught:
            resolve("hf://owner/repo/a.pth")
        assert message in str(caught.value)
        assert "\n" not in str(caught.value)


@pytest.fixture
def offline_cache(tmp_path, monkeypatch):
    """huggingface_hub itself in offline mode, with one repository in its cache."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    repo = tmp_path / "models--owner--repo"
    write(repo, "refs/main")
    (repo / "refs" / "main").write_text("0" * 40)
    return write(repo / "snapshots" / ("0" * 40), "transformer/config.json", f"transformer/{SINGLE}", "a.pth")


def test_offline_mode_reads_the_cache_alone(offline_cache):
    assert real_snapshot_download("owner/repo") == str(offline_cache)
    assert hub.resolve_weights("owner/repo") == offline_cache / "transformer" / SINGLE
    assert hub.resolve_weights("hf://owner/repo/a.pth") == offline_cache / "a.pth"
    for name in ("hf://owner/repo/b.pth", "hf://owner/other", "hf://owner/repo/no/such/folder"):
        with pytest.raises(
            ValueError, match="it is not in the local cache, and HF_HUB_OFFLINE is set"
        ) as caught:
            hub.resolve_weights(name)
        assert "\n" not in str(caught.value)
