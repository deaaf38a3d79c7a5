"""Does this machine compute what the weights mean? Every part of a pipeline against independent recomputation and goldens.

The parts are checked from their files up: diffusers' transformer with the same weights, the language model run prompt by
prompt through transformers, diffusers' scheduler, published trajectories. See asset/docs/verify.md.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType

import torch
from accelerate import init_empty_weights
from diffusers import SanaTransformer2DModel
from torch import Tensor, nn
from transformers import AutoModel, AutoTokenizer

from sana.evaluation.checks import (
    DAMAGED,
    FAIL,
    PASS,
    REINSTALL,
    SKIP,
    WRONG_DTYPE,
    Check,
    bounded,
    check_layers,
    finite,
    layer_ranges,
    relative_rms,
    short,
    worst,
)
from sana.evaluation.goldens import Entry, Fingerprint, Goldens, weight_hashes
from sana.evaluation.solvers import check_solver
from sana.pipeline import DTYPES, SAMPLERS, NonFiniteError, SanaPipeline
from sana.shapes.render import render
from sana.shapes.scene import Object, Scene
from sana.utils import hub, seeding
from sana.utils.pretrained import no_loading_bar

PROMPTS = ("a red circle on a gray background", "three blue stars", "a cat on a sofa, " * 70, "")
"""Short, short, too long for any model's window, empty."""
TIMES = (0.999, 0.7, 0.3, 0.02)
"""One for each prompt: the ranges of activations differ along the path."""
GUIDANCE = 4.5

# Relative RMS. On a GPU convolutions round to TF32, which keeps 10 bits.
EXACT = MappingProxyType({"cpu": 1e-5, "cuda": 1e-3})
# Half types: at most twice the error that diffusers' model makes in the same type; this where it makes none to compare.
HALF_WITHOUT_PEER = MappingProxyType({torch.float16: 1e-2, torch.bfloat16: 5e-2})
TEXT_HALF = 5e-2  # padding and batch change the kernels, so that roundings differ
# `Fingerprint.distance`: single values over the RMS. A picture is some network calls away from its noise.
GOLDEN = MappingProxyType({"cpu": 2e-4, "cuda": 2e-2})
PICTURE_TIMES = 10

MIN_PSNR = 20.0  # dB of the round trip; an encoder and a decoder that do not belong together stay below 14
SPREAD = (0.25, 2.5)  # standard deviation of scaled latents, about 1 over many pictures

Load = Callable[[str], SanaPipeline]
Read = Callable[[Path], Mapping[str, Tensor]]


def verify(
    load: Load, read: Read, dtypes: Sequence[str] | None, *, goldens: Goldens
) -> Iterator[Check | Entry]:
    """Check everything that `load` gives, one check after the other.

    Args:
        load: the pipeline with its transformer in a type of `DTYPES`, weights loaded.
        read: the transformer's weights in a file, under diffusers' names.
        dtypes: the types to check; the parts beside the transformer are checked with the first. None is all that the
            device can, where one that the weights were not made for is skipped, not failed.
        goldens: to compare with, or to be made: new ones are yielded among the checks. Its `weights` are set here.

    Raises:
        ValueError: `load` or `read` refuse the input.
    """
    asked, device, refused = dtypes is not None, None, {}
    for name in dtypes or ("fp32", "bf16", "fp16"):
        if not asked and device and (reason := _cannot(name, device)):
            refused[name] = reason
            continue
        try:
            pipeline = load(name)
        except ValueError as error:
            if asked:
                raise
            # The weights are not for this type; or the input is wrong, and then it is for every type.
            refused[name] = error
            continue
        if device is None:
            device, goldens.weights, state = pipeline.device, weight_hashes(pipeline), read(pipeline.weights)
            yield check_weights(pipeline, state)
            yield from check_solver(pipeline.config.scheduler.vis_sampler, pipeline.flow_shift)
            yield from check_autoencoder(pipeline, goldens)
            yield from check_text(pipeline, goldens)
            yield from check_picture(pipeline, goldens)
            inputs = make_inputs(pipeline)
            reference = run_twin(pipeline.transformer, state, inputs, torch.float32)
        own = asked or name in ("fp32", pipeline.config.model.mixed_precision)
        yield from check_transformer(pipeline, DTYPES[name], state, inputs, reference, goldens, own=own)
    if device is None:
        raise next(iter(refused.values()))
    for name, reason in refused.items():
        where = _where(DTYPES[name], device)
        yield Check(part="transformer", name="layers", where=where, status=SKIP, found=_one_line(reason))


def _cannot(name: str, device: torch.device) -> str | None:
    """Why a type is not checked on a device unless it is asked for."""
    if name == "fp16" and device.type == "cpu":
        return "a CPU computes float16 very slowly; --dtype fp16 checks it all the same"
    on_gpu = device.type == "cuda"
    if name == "bf16" and on_gpu and not torch.cuda.is_bf16_supported(including_emulation=False):
        return "this GPU does not compute in bfloat16"
    return None


# The transformer


def make_inputs(pipeline: SanaPipeline) -> dict[str, Tensor]:
    """Arguments of the transformer as they come in use: noisy latents of a picture, features of `PROMPTS`."""
    with torch.no_grad():
        latents = pipeline.autoencoder.encode(picture(pipeline)).float()
    text = pipeline.text_encoder.encode(list(PROMPTS))
    t = torch.tensor(TIMES, device=latents.device)
    noise = torch.randn((len(PROMPTS), *latents.shape[1:]), generator=seeding.generator("verify")).to(latents)
    mix = t[:, None, None, None]
    return {
        # A broken autoencoder has its own line in the table.
        "latents": (1 - mix) * latents.nan_to_num() + mix * noise,
        "timestep": (1000 * t).round(),
        "text_embeds": text.embeds.float(),
        "text_mask": text.mask,
    }


def plain_inputs(pipeline: SanaPipeline) -> dict[str, Tensor]:
    """Arguments that depend on no network, for the golden."""
    config, generator = pipeline.transformer.config, seeding.generator("golden")
    shapes = {
        "latents": (2, config.in_channels, *(8 * config.patch_size,) * 2),
        "text_embeds": (2, 12, config.caption_channels),
    }
    made = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    made |= {
        "timestep": torch.tensor([900.0, 100.0]),
        "text_mask": torch.arange(12)[None] < torch.tensor([[12], [5]]),
    }
    return {name: tensor.to(pipeline.device) for name, tensor in made.items()}


def run(transformer: nn.Module, inputs: Mapping[str, Tensor]) -> Tensor:
    """The velocity of our transformer, in float32."""
    batch = len(inputs["latents"])
    guided = transformer.config.cfg_embed
    guidance = {"guidance": torch.full((batch,), GUIDANCE, device=inputs["latents"].device)} if guided else {}
    with torch.no_grad():
        return transformer(**inputs, **guidance).float()


def run_twin(
    transformer: nn.Module, state: Mapping[str, Tensor], inputs: Mapping[str, Tensor], dtype: torch.dtype
) -> Tensor | None:
    """The same by diffusers' `SanaTransformer2DModel` with the weights `state`; None where it has no such model."""
    config = transformer.config
    if config.qk_norm != config.cross_norm or not config.y_norm:
        return None
    latents = inputs["latents"]
    twin = _twin(transformer, state, latents.shape[-1], dtype).to(latents.device)
    guidance = torch.full((len(latents),), GUIDANCE * config.cfg_embed_scale, device=latents.device)
    with torch.no_grad():
        return twin(
            latents.to(dtype),
            encoder_hidden_states=inputs["text_embeds"].to(dtype),
            timestep=inputs["timestep"] / config.timestep_norm_scale_factor,
            guidance=guidance if config.cfg_embed else None,
            encoder_attention_mask=inputs["text_mask"].to(dtype),
            return_dict=False,
        )[0].float()


def _twin(transformer: nn.Module, state: Mapping[str, Tensor], side: int, dtype: torch.dtype) -> nn.Module:
    config = transformer.config
    with init_empty_weights(include_buffers=False):
        twin = SanaTransformer2DModel(
            in_channels=config.in_channels,
            out_channels=config.out_channels,
            num_attention_heads=config.hidden_size // config.linear_head_dim,
            attention_head_dim=config.linear_head_dim,
            num_layers=config.depth,
            num_cross_attention_heads=config.num_heads,
            cross_attention_head_dim=config.hidden_size // config.num_heads,
            cross_attention_dim=config.hidden_size,
            caption_channels=config.caption_channels,
            mlp_ratio=config.mlp_ratio,
            patch_size=config.patch_size,
            sample_size=config.pe_base_size * config.patch_size if config.pe_base_size else side,
            interpolation_scale=config.pe_interpolation if config.use_pe else None,
            guidance_embeds=config.cfg_embed,
            qk_norm="rms_norm_across_heads" if config.qk_norm else None,
        )
    twin.load_state_dict({name: tensor.to(dtype) for name, tensor in state.items()}, assign=True)
    for block in twin.transformer_blocks:
        for norm in (block.attn2.norm_q, block.attn2.norm_k) if config.cross_norm else ():
            norm.eps = 1e-6  # the reference's; diffusers' is 1e-5
        if config.clamp_attention:  # which diffusers does in float16 only
            block.attn1.register_forward_hook(lambda module, given, output: output.clamp(-65504, 65504))
    return twin.eval()


def check_transformer(
    pipeline: SanaPipeline,
    dtype: torch.dtype,
    state: Mapping[str, Tensor],
    inputs: Mapping[str, Tensor],
    reference: Tensor | None,
    goldens: Goldens,
    *,
    own: bool,
) -> Iterator[Check | Entry]:
    """In one type: every layer finite, equal to diffusers' model, and in float32 equal to the golden.

    Args:
        own: the weights are to work in this type; otherwise one that they overflow in is skipped.
    """
    transformer, device, where = pipeline.transformer, pipeline.device.type, _where(dtype, pipeline.device)
    part = {"part": "transformer", "where": where}
    ranges, velocity = layer_ranges(transformer, lambda: run(transformer, inputs))
    layers = check_layers(ranges, dtype, **part)
    if layers.status == FAIL and not own:
        yield Check(name="layers", status=SKIP, found=f"not a type for these weights: {layers.found}", **part)
        return
    yield layers
    if pipeline.dtype != dtype:
        found = f"asked for {short(dtype)}, got {short(pipeline.dtype)}"
        yield Check(name="type", status=FAIL, found=found, advice=WRONG_DTYPE, **part)
    elif reference is None:
        found = "diffusers has no such model (one of qk_norm and cross_norm alone, or no y_norm)"
        yield Check(name="diffusers", status=SKIP, found=found, **part)
    else:
        error, note, bound = relative_rms(velocity, reference), "", EXACT[device]
        advice = f"{DAMAGED} If it is sound: {REINSTALL}"
        if dtype != torch.float32:
            theirs = relative_rms(run_twin(transformer, state, inputs, dtype), reference)
            bound = 2 * theirs if math.isfinite(theirs) else HALF_WITHOUT_PEER[dtype]
            note, advice = f", diffusers {theirs:.1e}", f"{WRONG_DTYPE} If float32 fails as well: {DAMAGED}"
        yield bounded("diffusers", error, bound, note=note, advice=advice, **part)
    if dtype == torch.float32:
        golden = {"velocity": run(transformer, plain_inputs(pipeline))}
        yield _check_golden(pipeline, golden, goldens, **part)


def check_weights(pipeline: SanaPipeline, state: Mapping[str, Tensor]) -> Check:
    """All weights in the file are finite; that they fit has been seen on loading."""
    bad = [name for name, tensor in state.items() if not tensor.isfinite().all()]
    found = (
        f"not finite: {', '.join(bad[:3])}"
        if bad
        else f"{pipeline.weights.name}: {len(state)} tensors, all finite"
    )
    return Check(
        part="transformer",
        name="weights",
        where="as stored",
        status=FAIL if bad else PASS,
        found=found,
        advice=DAMAGED,
    )


# The other parts


def picture(pipeline: SanaPipeline) -> Tensor:
    """A drawn scene, (1, 3, s, s) in [-1, 1]; s is 256, or what the model's sides must be multiples of."""
    objects = (
        Object(shape="circle", colour="red", size="large", x=0.3, y=0.32, radius=0.2),
        Object(shape="square", colour="blue", size="large", x=0.7, y=0.68, radius=0.2),
    )
    pixels = render(Scene(background="gray", objects=objects, groups=()), _side(pipeline))
    return (torch.from_numpy(pixels).permute(2, 0, 1)[None] / 127.5 - 1).to(pipeline.device)


def check_autoencoder(pipeline: SanaPipeline, goldens: Goldens) -> Iterator[Check | Entry]:
    """Finite layers, the scale between its own latents and ours, the round trip of `picture`."""
    autoencoder, image = pipeline.autoencoder, picture(pipeline)
    part = {"part": "autoencoder", "where": _where(autoencoder.dtype, pipeline.device)}

    def round_trip() -> tuple[Tensor, Tensor]:
        with torch.no_grad():
            latents = autoencoder.encode(image)
            return latents.float(), autoencoder.decode(latents).float()

    ranges, (latents, pixels) = layer_ranges(autoencoder.model, round_trip)
    yield check_layers(ranges, autoencoder.dtype, **part)

    scale = _written_scale(pipeline)
    with torch.no_grad():
        raw = autoencoder.model.encode(image.to(autoencoder.dtype)).latent
        own_pixels = autoencoder.model.decode(raw).sample.float()
    spread = latents.std().item()
    error = worst(relative_rms(latents, raw.float() * scale), relative_rms(pixels, own_pixels))
    bound = EXACT["cpu"] if autoencoder.dtype == torch.float32 else HALF_WITHOUT_PEER[autoencoder.dtype]
    fits = error <= bound and SPREAD[0] <= spread <= SPREAD[1]
    yield Check(
        name="scale",
        status=PASS if fits else FAIL,
        found=f"factor {scale:g} applied to {error:.1e} <= {bound:.0e}, latents' std {spread:.2f} in {list(SPREAD)}",
        advice="scaling_factor in the autoencoder's config.json must be the released one (0.41407 for DC-AE), once.",
        values={"error": finite(error), "spread": finite(spread), "scaling_factor": scale},
        **part,
    )
    psnr = -10 * math.log10(max(((pixels - image) / 2).square().mean().item(), 1e-10))
    yield Check(
        name="round trip",
        status=PASS if psnr >= MIN_PSNR else FAIL,
        found=f"PSNR {psnr:.1f} dB >= {MIN_PSNR:g}",
        advice="Encoder and decoder do not belong together, or the file is damaged: fetch the autoencoder again.",
        values={"psnr": finite(psnr)},
        **part,
    )
    yield _check_golden(pipeline, {"latents": latents, "pixels": pixels}, goldens, **part)


def check_text(pipeline: SanaPipeline, goldens: Goldens) -> Iterator[Check | Entry]:
    """Finite layers, and features equal to those of the language model run on one prompt at a time, without padding."""
    encoder = pipeline.text_encoder
    dtype = encoder.model.dtype
    part = {"part": "text encoder", "where": _where(dtype, pipeline.device)}
    ranges, features = layer_ranges(encoder.model, lambda: encoder.encode(list(PROMPTS)))
    yield check_layers(ranges, dtype, **part)

    with no_loading_bar():
        model = AutoModel.from_pretrained(encoder.model.name_or_path, dtype=dtype).to(pipeline.device).eval()
    tokenizer = AutoTokenizer.from_pretrained(encoder.tokenizer.name_or_path)
    instruction = "\n".join(pipeline.config.text_encoder.chi_prompt)
    length = pipeline.config.text_encoder.model_max_length
    # The first token, then as many of the last as fit; one token of the instruction merges with the prompt's space.
    first = len(tokenizer(instruction).input_ids) - 1 if instruction else 1
    error = 0.0
    for prompt, row, mask in zip(PROMPTS, features.embeds, features.mask, strict=True):
        ids = tokenizer(instruction + prompt, return_tensors="pt").input_ids[:, : first + length - 1]
        with torch.no_grad():
            hidden = model(input_ids=ids.to(pipeline.device))[0][0]
        expected = torch.cat([hidden[:1], hidden[first:]])
        ours = row[mask.bool()]
        error = worst(error, relative_rms(ours, expected) if ours.shape == expected.shape else math.inf)
    bound = EXACT[pipeline.device.type] if dtype == torch.float32 else TEXT_HALF
    advice = (
        "Fetch the text encoder again; chi_prompt and model_max_length must be the ones of the released config. "
        f"If both are: {REINSTALL}"
    )
    yield bounded("transformers", error, bound, advice=advice, **part)
    null = encoder.encode_unconditional([""]).embeds
    yield _check_golden(pipeline, {"embeds": features.embeds[0, :8], "null": null[0, :8]}, goldens, **part)


def check_picture(pipeline: SanaPipeline, goldens: Goldens) -> Iterator[Check | Entry]:
    """A few steps from prompt to pixels: finite, and in float32 equal to the golden."""
    sampler = pipeline.config.scheduler.vis_sampler
    part = {"part": "pipeline", "where": _where(pipeline.dtype, pipeline.device)}
    side, states = _side(pipeline), []
    settings = {"num_inference_steps": min(4, SAMPLERS[sampler]), "use_resolution_binning": False, "seed": 0}
    try:
        pixels = pipeline(
            PROMPTS[0], side, side, callback=lambda step, total, x, x0: states.append(x), **settings
        )
    except NonFiniteError as error:
        yield Check(name="picture", status=FAIL, found=_one_line(error), advice=WRONG_DTYPE, **part)
        return
    largest = pixels.abs().max().item()
    yield Check(name="picture", status=PASS, found=f"finite, |pixel| up to {largest:.2f}", **part)
    yield _check_golden(
        pipeline, {"latents": states[-1], "pixels": pixels}, goldens, tolerance=PICTURE_TIMES, **part
    )


# What the checks share


def _check_golden(
    pipeline: SanaPipeline,
    tensors: Mapping[str, Tensor],
    goldens: Goldens,
    *,
    part: str,
    where: str,
    tolerance: float = 1,
) -> Check | Entry:
    """Compare with the golden of these weights, or make it (`entries` is None)."""
    key = part.replace(" ", "_")
    weights = {key: goldens.weights[key]} if key in goldens.weights else goldens.weights
    fixed = {"part": part, "name": "golden", "where": where}
    in_half = [
        name for name, dtype in _dtypes(pipeline).items() if name in weights and dtype != torch.float32
    ]
    if in_half:
        found = f"goldens are of float32, here the {in_half[0].replace('_', ' ')} is not: --device cpu compares them"
        return Check(status=SKIP, found=found, **fixed)
    made = {name: Fingerprint.of(tensor) for name, tensor in tensors.items()}
    if goldens.entries is None:
        return Entry(part=part, weights=weights, fingerprints=made)
    entry = goldens.find(part, weights)
    if entry is None:
        digest = ", ".join(f"{name} {value[:8]}" for name, value in weights.items())
        return Check(
            status=SKIP, found=f"no golden is stored for these weights ({digest}); --update", **fixed
        )
    error = max(
        made[name].distance(golden) if name in made else math.inf
        for name, golden in entry.fingerprints.items()
    )
    advice = (
        "The weights are those of the golden, so the config, the packages or the machine differ from it: "
        f"use the config of the weights. {REINSTALL}"
    )
    bound = tolerance * GOLDEN[pipeline.device.type]
    return bounded(error=error, bound=bound, advice=advice, **fixed)


def _dtypes(pipeline: SanaPipeline) -> dict[str, torch.dtype]:
    return {
        "transformer": pipeline.dtype,
        "autoencoder": pipeline.autoencoder.dtype,
        "text_encoder": pipeline.text_encoder.model.dtype,
    }


def _written_scale(pipeline: SanaPipeline) -> float:
    """The scaling factor in the autoencoder's config.json; that of the published ones where it has none."""
    file = hub.resolve_model(pipeline.config.vae.vae_pretrained) / "config.json"
    return json.loads(file.read_text(encoding="utf-8")).get("scaling_factor", 0.41407)


def _side(pipeline: SanaPipeline) -> int:
    """Pixels a side: 256, or the multiple of the model's next to it."""
    return pipeline.multiple * max(1, round(256 / pipeline.multiple))


def _where(dtype: torch.dtype, device: torch.device) -> str:
    return f"{short(dtype)} {device}"


def _one_line(error: Exception | str) -> str:
    return " ".join(str(error).split())
