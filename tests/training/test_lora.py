"""A LoRA in training: only it changes, a run goes on as if never stopped, and its file means the same everywhere."""

from pathlib import Path

import pytest
import torch
from diffusers import SanaPipeline as DiffusersPipeline
from safetensors.torch import load_file, save_file

from sana import SanaPipeline
from sana.config import ConfigError
from sana.models.lora import load_lora
from sana.models.state_dict import load_transformer_state, to_diffusers
from sana.models.transformer import SanaTransformer
from sana.models.zoo import TRANSFORMERS, build_transformer
from sana.training.checkpoint import find_checkpoint, read_checkpoint
from sana.training.lora import ATTENTION, FILE_NAME, LoraSettings, add_lora, save_lora
from sana.training.tracker import read_history
from sana.training.trainer import Trainer
from tests.factories import TEXT_LENGTH, TEXT_WIDTH, write_model
from tests.models.twin import build, build_twin, inputs, make_generic, run_twin
from tests.numerics import assert_close
from tests.training import micro

LORA = "--train.lora={rank: 4, alpha: 6}"
EVERY = (
    *ATTENTION,
    *("mlp.inverted_conv.conv", "mlp.point_conv.conv", "x_embedder.proj", "t_embedder.mlp.0", "t_block.1"),
    *("y_proj.fc2", "final_layer.linear"),
)


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    """A config beside weights of the smallest network, `base.safetensors`."""
    config = write_model(tmp_path_factory.mktemp("model"))
    TRANSFORMERS[micro.NAME] = micro.CONFIG
    network = build_transformer(micro.NAME, caption_channels=TEXT_WIDTH, model_max_length=TEXT_LENGTH)
    save_file(make_generic(network).state_dict(), config.parent / "base.safetensors")
    return config


def settings(model: Path, *more: str) -> tuple[str, ...]:
    return (f"--model.load_from={model.parent / 'base.safetensors'}", LORA, *more)


def run(model: Path, work_dir: Path, *more: str, resume: str | None = None) -> Trainer:
    return micro.trainer(model, work_dir, *settings(model, *more), resume=resume)


def newest(work_dir: Path):
    return read_checkpoint(find_checkpoint("latest", work_dir / "checkpoints"))


def changed(**more) -> SanaTransformer:
    """A generic network with a LoRA of every kind of matrix that is not zero."""
    network = build(patch_size=2, **more)
    add_lora(network, LoraSettings(rank=3, alpha=2.0, targets=EVERY))
    generator = torch.Generator().manual_seed(5)
    for name, value in network.named_parameters():
        if value.requires_grad:
            assert ".lora_" in name
            value.data.normal_(std=0.3, generator=generator)
    return network


@pytest.mark.parametrize("more", [{}, {"qk_norm": True, "cross_norm": True}], ids=["1.0", "1.5"])
def test_the_file_means_the_same_here_and_in_diffusers(tmp_path, more):
    """Every kind of matrix: fused, plain, 1x1 convolution, patch embedding."""
    network = changed(**more)
    plain, arguments = build(patch_size=2, **more), inputs(network.config, (3, 5))
    twin = build_twin(plain)
    save_lora(network, tmp_path / FILE_NAME)
    with torch.no_grad():
        expected, before = network(**arguments), plain(**arguments)
        load_lora(plain, tmp_path)
        assert_close("here", plain(**arguments), expected, rel_rms=1e-5)
        DiffusersPipeline(None, None, None, twin, None).load_lora_weights(tmp_path)
        assert_close("diffusers", run_twin(twin, arguments), expected, rel_rms=1e-5)
    assert (expected - before).norm() > 0.1 * before.norm()
    assert len(load_file(tmp_path / FILE_NAME)) == 2 * (2 * (3 + 1 + 1 + 2 + 1 + 1 + 1) + 5)


def test_nothing_changes_before_the_first_step():
    network, arguments = build(), inputs(build().config)
    with torch.no_grad():
        before = network(**arguments)
        add_lora(network, LoraSettings(rank=4, alpha=4, targets=ATTENTION))
        assert torch.equal(network(**arguments), before)


def test_the_loss_falls_and_the_base_keeps_its_bits(model, tmp_path):
    trainer = run(
        model, tmp_path, "--train.optimizer.lr=2e-2", "--train.lora.target_modules=[qkv, conv, linear]"
    )
    stream = trainer._batches()
    losses = [trainer.train_step([next(stream)]).loss for _ in range(60)]
    assert sum(losses[-8:]) < 0.8 * sum(losses[:8])
    base = load_transformer_state(model.parent / "base.safetensors")
    for network in (trainer.transformer, trainer.ema.model):
        own = {name.replace(".base_layer", ""): value for name, value in network.state_dict().items()}
        assert all(torch.equal(own[name], value) for name, value in base.items())
        assert own.keys() - base.keys() and all(".lora_" in name for name in own.keys() - base.keys())
    places = {value.data_ptr() for value in trainer.transformer.parameters() if not value.requires_grad}
    assert places <= {
        value.data_ptr() for value in trainer.ema.model.parameters()
    }  # frozen weights once in memory


def test_a_run_writes_the_lora_alone_and_the_pipeline_draws_with_it(model, tmp_path):
    online = "--train.feature_cache_dir="  # with both encoders, to draw with
    trainer = run(model, tmp_path, "--train.max_steps=3", "--train.optimizer.lr=2e-2", online)
    assert trainer.train()
    assert not (tmp_path / "transformer.safetensors").exists()
    checkpoint = find_checkpoint("latest", tmp_path / "checkpoints")
    factors = {name for name, value in trainer.transformer.named_parameters() if value.requires_grad}
    for name in ("model", "ema"):
        assert load_file(checkpoint / f"{name}.safetensors").keys() == factors
    assert newest(tmp_path).optimizer.keys() == factors

    arguments = inputs(trainer.transformer.config)
    call = {"height": 64, "width": 64, "num_inference_steps": 2, "seed": 3}
    with torch.no_grad():
        expected = trainer.ema.model(**arguments)
        trained = SanaPipeline.from_components(
            trainer.config, trainer.ema.model, trainer.autoencoder, trainer.text_encoder
        )("a red circle", **call)
        for file in (tmp_path / FILE_NAME, checkpoint / "ema.safetensors"):
            network = build_transformer(
                micro.NAME, caption_channels=TEXT_WIDTH, model_max_length=TEXT_LENGTH
            ).eval()
            network.load_state_dict(load_transformer_state(model.parent / "base.safetensors"))
            before = network(**arguments)
            pipeline = SanaPipeline.from_components(
                trainer.config, network, trainer.autoencoder, trainer.text_encoder
            )
            pipeline.load_lora(file)
            assert_close(file.name, network(**arguments), expected, rel_rms=1e-5)
            assert_close("picture", pipeline("a red circle", **call), trained, rel_rms=1e-5)
            assert not torch.allclose(before, expected, rtol=1e-2)


def test_a_resumed_run_equals_an_uninterrupted_one(model, tmp_path):
    run(model, tmp_path / "whole").train()
    run(model, tmp_path / "parts", "--train.max_steps=3").train()
    second = run(model, tmp_path / "parts", resume="latest")
    assert second.step == 3
    second.train()
    one, two = newest(tmp_path / "whole"), newest(tmp_path / "parts")
    for mine, theirs in ((one.weights, two.weights), (one.ema, two.ema)):
        assert mine.keys() == theirs.keys() and all(torch.equal(mine[name], theirs[name]) for name in mine)
    files = [load_file(tmp_path / name / FILE_NAME) for name in ("whole", "parts")]
    assert files[0].keys() == files[1].keys()
    assert all(torch.equal(files[0][name], files[1][name]) for name in files[0])
    assert read_history(tmp_path / "whole" / "history.jsonl") == read_history(
        tmp_path / "parts" / "history.jsonl"
    )


def test_recomputing_blocks_changes_no_loss(model, tmp_path):
    losses = []
    for value in ("false", "true"):
        trainer = run(model, tmp_path / value, f"--train.grad_checkpointing={value}")
        stream = trainer._batches()
        losses.append([trainer.train_step([next(stream)]).loss for _ in range(3)])
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)


def test_two_processes_train_as_one(model, tmp_path):
    more = settings(model, "--train.optimizer={type: SGD, lr: 0.05}", "--train.max_steps=3")
    assert micro.trainer(model, tmp_path / "one", *more).train()
    share = (*more, "--train.train_batch_size=2")
    assert micro.finish(micro.start_group(2, model, tmp_path / "two", share)) == [0, 0]
    one, two = newest(tmp_path / "one"), newest(tmp_path / "two")
    for name, value in one.weights.items():
        assert_close(name, two.weights[name], value, rel_rms=1e-5)
    rows, others = (read_history(tmp_path / name / "history.jsonl") for name in ("one", "two"))
    assert [row["loss"] for row in rows] == pytest.approx([row["loss"] for row in others], rel=1e-5)


def test_weights_of_diffusers_get_the_text_encoder_s_null_caption(model, tmp_path):
    """They have none, and a dropped caption must not become noise."""
    state = to_diffusers(load_transformer_state(model.parent / "base.safetensors"))
    save_file(state, tmp_path / "diffusers.safetensors")
    trainer = run(model, tmp_path, f"--model.load_from={tmp_path / 'diffusers.safetensors'}")
    expected = trainer.text_encoder.encode_unconditional([""]).embeds[0]
    assert torch.equal(trainer.transformer.y_embedder.y_embedding, expected)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--model.load_from="], "train.lora: needs the weights that it changes: set model.load_from"),
        (["--train.lora.rank=0"], "train.lora.rank: expected a number of at least 1, got 0"),
        (["--train.lora={alpha: 2}"], "train.lora.rank: expected a number of at least 1, got null"),
        (["--train.lora.alpha=-1"], "train.lora.alpha: expected a number above 0, got -1"),
        (["--train.lora.rank=2.5"], "train.lora.rank: expected an integer, got 2.5"),
        (["--train.lora.ranks=2"], "unknown key train.lora.ranks; did you mean train.lora.rank"),
        (["--train.lora.target_modules=[]"], "train.lora.target_modules: is empty"),
        (["--train.use_fsdp=true"], "train.use_fsdp: a LoRA is too small to shard"),
        (
            ["--train.lora.target_modules=[to_q]"],
            "no matrix is called 'to_q'; there are attn.proj, attn.qkv, ",
        ),
        (["--train.lora.target_modules=[depth_conv.conv]"], "no matrix is called 'depth_conv.conv'"),
    ],
)
def test_what_cannot_be_is_one_clear_error(model, tmp_path, words, message):
    with pytest.raises(ConfigError, match="(?s).*") as error:
        run(model, tmp_path, *words)
    assert message in str(error.value) and "\n" not in str(error.value)


def test_checkpoints_of_a_lora_and_of_weights_are_not_taken_for_each_other(model, tmp_path):
    run(model, tmp_path / "lora", "--train.max_steps=1").train()
    with pytest.raises(ValueError, match="the checkpoint is of a LoRA: set train.lora and model.load_from"):
        run(model, tmp_path / "lora", "--train.lora=", resume="latest")
    with pytest.raises(ValueError, match="the checkpoint's LoRA is not that of train.lora: .*lora_A"):
        run(model, tmp_path / "lora", "--train.lora.rank=2", resume="latest")
    run(model, tmp_path / "whole", "--train.lora=", "--train.max_steps=1").train()
    with pytest.raises(ValueError, match="the checkpoint holds whole weights, no LoRA"):
        run(model, tmp_path / "whole", resume="latest")
