"""Small random parts of a Sana, so that the whole product runs on a CPU in seconds.

Every part is seeded and generic: no weight stays at an initial value that would hide a mistake (the norm of the caption
is about 1, not 0.01). `write_model` saves all of it as a folder with a config, as a released model lies on disk.
"""

from pathlib import Path

import torch
import yaml
from diffusers import AutoencoderDC
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import Gemma2Config, Gemma2ForCausalLM, PreTrainedTokenizerFast

from sana.models.transformer import SanaTransformer
from sana.models.zoo import build_transformer

TEXT_WIDTH = 32
TEXT_LENGTH = 24
CHI_PROMPT = ("Describe the scene in full:", "User prompt: ")
SENTENCES = (
    "a red circle on a gray background",
    "three blue stars and two green squares",
    "a small yellow heart to the left of a large black ring",
    "Describe the scene in full: User prompt: ",
)


def make_tokenizer() -> PreTrainedTokenizerFast:
    """Byte-fallback BPE that treats spaces as Gemma does: a space joins the word after it ("▁red"), BOS in front."""
    special = ["<pad>", "<eos>", "<bos>", "<unk>"]
    tokenizer = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never")
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=special + [f"<0x{byte:02X}>" for byte in range(256)],
        show_progress=False,
    )
    tokenizer.train_from_iterator(SENTENCES, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", 2)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>", bos_token="<bos>", unk_token="<unk>"
    )


def make_language_model(vocab_size: int, seed: int = 0) -> Gemma2ForCausalLM:
    """A random Gemma-2 of two layers, TEXT_WIDTH wide."""
    config = Gemma2Config(
        vocab_size=vocab_size,
        hidden_size=TEXT_WIDTH,
        intermediate_size=2 * TEXT_WIDTH,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
        query_pre_attn_scalar=16,
        max_position_embeddings=512,
        sliding_window=512,
        initializer_range=0.2,
        pad_token_id=0,
        eos_token_id=1,
        bos_token_id=2,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return Gemma2ForCausalLM(config).eval()


def make_autoencoder(seed: int = 0) -> AutoencoderDC:
    """A random F32C32 deep-compression autoencoder with the narrowest layers that it can have."""
    stages = dict(
        encoder_block_out_channels=(8, 8, 16, 16, 32, 32),
        decoder_block_out_channels=(8, 8, 16, 16, 32, 32),
        encoder_layers_per_block=(0, 1, 1, 1, 1, 1),
        decoder_layers_per_block=(0, 1, 1, 1, 1, 1),
        encoder_qkv_multiscales=((),) * 6,
        decoder_qkv_multiscales=((),) * 6,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return AutoencoderDC(
            latent_channels=32,
            encoder_block_types="ResBlock",
            decoder_block_types="ResBlock",
            downsample_block_type="stride_conv",
            upsample_block_type="interpolate",
            decoder_norm_types="rms_norm",
            decoder_act_fns="silu",
            scaling_factor=0.5,
            **stages,
        ).eval()


def make_transformer(name: str = "SanaMS_Tiny_P1_D8", seed: int = 0, **overrides) -> SanaTransformer:
    """A transformer of the zoo for the small text encoder, with generic weights."""
    settings = dict(caption_channels=TEXT_WIDTH, model_max_length=TEXT_LENGTH, y_norm_scale_factor=1.0)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return build_transformer(name, **(settings | overrides)).eval()


def model_config(folder: str | Path) -> dict:
    """The YAML of a small model in `folder`, in the published keys."""
    folder = Path(folder)
    return {
        "model": {
            "model": "SanaMS_Tiny_P1_D8",
            "image_size": 256,
            "mixed_precision": "bf16",
            "aspect_ratio_type": "ASPECT_RATIO_256",
            "class_dropout_prob": 0.1,
            "pag_applied_layers": [3],
            "load_from": str(folder / "transformer.safetensors"),
        },
        "vae": {"vae_type": "AutoencoderDC", "vae_pretrained": str(folder / "autoencoder")},
        "text_encoder": {
            "text_encoder_name": str(folder / "text_encoder"),
            "caption_channels": TEXT_WIDTH,
            "y_norm": True,
            "y_norm_scale_factor": 1.0,
            "model_max_length": TEXT_LENGTH,
            "chi_prompt": list(CHI_PROMPT),
        },
        "scheduler": {"flow_shift": 3.0, "vis_sampler": "flow_dpm-solver"},
    }


def write_text_encoder(folder: str | Path) -> Path:
    """Save tokenizer and language model as a transformers folder."""
    tokenizer = make_tokenizer()
    tokenizer.save_pretrained(folder)
    make_language_model(len(tokenizer)).save_pretrained(folder)
    return Path(folder)


def write_model(folder: str | Path, **changes: dict) -> Path:
    """Save a complete small model in `folder`; returns its config. `changes`: section -> keys that differ."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    write_text_encoder(folder / "text_encoder")
    make_autoencoder().save_pretrained(folder / "autoencoder")
    state = {name: tensor.contiguous() for name, tensor in make_transformer().state_dict().items()}
    save_file(state, folder / "transformer.safetensors")
    config = model_config(folder)
    for section, values in changes.items():
        config[section] |= values
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(config, sort_keys=False, allow_unicode=True), encoding="utf-8")
    return path
