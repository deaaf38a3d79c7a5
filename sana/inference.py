"""The inference command: its flags, and how it makes a run fit into memory. Nothing heavy is imported with this file."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from sana.data.prompts import Prompt
from sana.utils.cli import at_least, boolean, numbers, words

if TYPE_CHECKING:
    import torch

    from sana.config import SanaConfig
    from sana.runtime.plan import Outline, Plan


def steps(text: str) -> int | None:
    """Argument type: -1 stands for the sampler's usual number."""
    return None if text == "-1" else at_least(1)(text)


# Flag, type, default, help. The spelling is the published one where there is one.
FLAGS = (
    ("config", str, None, "YAML file (default: what --model_path says of itself, else the embedded model's)"),
    ("model_path", str, None, "weights: path or hf://owner/repo/path (default: the config's load_from)"),
    ("lora_scale", float, 1.0, "weight of every --lora"),
    ("negative_prompt", str, "", "what to steer away from, for all prompts"),
    ("num_images_per_prompt", at_least(1), 1, "images of each prompt"),
    ("height", at_least(1), None, "pixels; --ar H:W or --hw H:W inside a prompt comes first"),
    ("width", at_least(1), None, "pixels"),
    ("custom_image_size", at_least(1), None, "replaces the config's image_size and table of sizes"),
    ("bs", at_least(1), 1, "images drawn at once"),
    ("cfg_scale", float, 4.5, "classifier-free guidance; 1 is off"),
    ("pag_scale", float, 1.0, "perturbed-attention guidance; 1 is off"),
    ("interval_guidance", numbers, (0.0, 1.0), "[LO,HI]: times in [0, 1] at which guidance acts"),
    ("sampling_algo", str, None, "flow_dpm-solver, flow_euler, scm for Sprint (default: the config's)"),
    ("step", steps, None, "network evaluations (default or -1: 20, 28 for flow_euler, 2 for scm)"),
    ("max_timesteps", float, None, "scm: the first angle (default: 1.5708)"),
    ("intermediate_timesteps", float, None, "scm: the second angle of two steps (default: 1.3)"),
    ("timesteps", numbers, None, "[A,B,...,0]: scm: all angles, one more than steps"),
    ("null_mask", str, "prompt", "mask of the negative prompt: prompt (reference) or own (diffusers)"),
    ("lowercase", boolean, False, "lower-case and strip prompts, as diffusers does"),
    ("seed", int, 0, "of the noise, together with a prompt's place in its file"),
    ("sample_nums", at_least(1), 100000, "use the first so many prompts"),
    ("start_index", at_least(0), 0, "of those, use the ones from here ..."),
    ("end_index", at_least(1), 30000, "... to before here; a prompt's noise stays the same"),
    ("work_dir", Path, "output/inference", "the folder of the images is made in here"),
    ("dataset", str, None, "first word of that folder's name (default: the prompt file's name)"),
    ("add_label", str, "", "end of that folder's name"),
    ("image_format", str, "png", "png or jpg"),
    ("jpeg_quality", int, 95, "1 to 100"),
    ("grid", Path, None, "FILE.png: also write one sheet of all images"),
    ("tar_and_del", boolean, False, "leave one .tar instead of the folder"),
    ("if_save_dirname", boolean, False, "write the folder's name to a file in WORK_DIR/metrics"),
    ("ablation_key", str, None, "cfg_scale, pag_scale, step or seed: draw once for each of several values"),
    ("ablation_selections", words, None, "[A,B,...]: those values"),
    ("device", str, None, "cpu, cuda, cuda:1 (default: a GPU where there is one)"),
    ("compile", boolean, False, "compile the transformer: slow first images of a size, faster later ones"),
    (
        "dtype",
        str,
        None,
        "fp32, bf16 or fp16, of the transformer; bf16 on a CPU: of all three networks (default: the config's; CPU: fp32)",
    ),
    ("quantize", str, None, "transformer=KIND,text_encoder=KIND: int8, int8-dynamic, fp8, fp8-dynamic, nf4"),
    ("offload", str, None, "none, text, model or sequential (default: the first of these that fits)"),
    (
        "max_memory_gb",
        float,
        None,
        "GiB to stay within, if the device has as much (default: what it has free)",
    ),
    ("plan", boolean, False, "print what memory the run will take, and leave"),
)
ABLATIONS = {"cfg_scale": float, "pag_scale": float, "step": steps, "seed": int}
FIELDS = {"cfg_scale": "guidance_scale", "pag_scale": "pag_guidance_scale", "step": "num_inference_steps"}
FIELDS |= {"sampling_algo": "sampler"}
UNUSED = ("version", "exist_time_prefix", "gpu_id", "debug")


def make_memory_plan(
    config: SanaConfig, args: Namespace, prompts: Sequence[Prompt], asked: tuple[int | None, int | None]
) -> Plan:
    """The plan for these flags, largest of the prompts' sizes: as they say, or changed so that it fits.

    Args:
        asked: height and width of prompts that name none; None is the model's own.

    Raises:
        ValueError: flags do not go together, nothing fits whatever is done, or a network cannot be found.
    """
    import torch

    from sana import loading
    from sana.runtime import offload, plan, quantize
    from sana.utils.logging import get_logger

    device = loading.find_device(args.device)
    kinds = quantize.parse(args.quantize)
    quantize.check(kinds, device)
    offload.check(args.offload or "none", quantized=bool(kinds), compile=args.compile)
    if args.lora and ("transformer" in kinds or args.offload == "sequential"):
        raise ValueError(
            "--lora is added into weights: not with --quantize=transformer=..., --offload=sequential"
        )
    outline = make_outline(config, device, loading.find_dtype(args.dtype))
    multiple = outline.autoencoder.downsample * outline.transformer.config.patch_size
    size, shown = _largest(config.model.image_size, asked, prompts, multiple)
    setting = plan.Setting(
        size=size,
        enlarged=shown if shown[0] * shown[1] > size[0] * size[1] else None,
        batch=min(args.bs, len(prompts) * args.num_images_per_prompt),
        device=device.type,
        quantize=kinds,
        offload=args.offload or "none",
    )
    modes = (args.offload,) if args.offload else ("none", "text") if args.compile else ()
    if args.lora and not modes:
        modes = ("none", "text", "model")
    limit = plan.available(device)
    if args.max_memory_gb is not None:
        if not args.max_memory_gb > 0:
            raise ValueError(f"--max_memory_gb must be above 0, got {args.max_memory_gb}")
        before = plan.held() if device.type == "cpu" else plan.GPU_CONTEXT
        limit = int(min(limit, args.max_memory_gb * plan.GIB - before))
        if limit <= 0:
            raise ValueError(
                f"--max_memory_gb {args.max_memory_gb}: {before / plan.GIB:.2f} GiB are taken before anything is loaded"
            )
    with torch.no_grad():
        chosen = plan.fit(outline, setting, limit, modes=modes)
    if chosen.setting != setting:
        get_logger("inference").info(
            "to fit into memory: %s; about %.2f GiB", chosen.setting, chosen.peak / plan.GIB
        )
    return chosen


def make_outline(config: SanaConfig, device: torch.device, dtype: torch.dtype | None) -> Outline:
    """The networks of a config without weights, in the dtypes that `SanaPipeline` would use.

    Raises:
        ValueError: one is not on this machine, and of unknown shape.
    """
    import torch

    from sana import loading
    from sana.models import outline
    from sana.runtime import plan

    on_cpu = device.type == "cpu"
    text, instruction = outline.outline_text_encoder(
        config.text_encoder.text_encoder_name, config.text_encoder.chi_prompt
    )
    autoencoder = outline.outline_autoencoder(config.vae.vae_pretrained)
    half = on_cpu and dtype == torch.bfloat16
    usual = torch.float32 if on_cpu and not half else torch.bfloat16
    vae = usual if on_cpu else loading.DTYPES[config.vae.weight_dtype]
    mixed = torch.float32 if on_cpu else loading.DTYPES[config.model.mixed_precision]
    return plan.Outline(
        transformer=plan.for_counting(loading.empty_transformer(config).to(dtype or mixed)),
        autoencoder=autoencoder.to(torch.float32 if vae == torch.float16 else vae),
        stored=text.dtype,
        text_encoder=text.to(usual),
        instruction=instruction,
        max_length=config.text_encoder.model_max_length,
    )


def _largest(
    own: int, asked: tuple[int | None, int | None], prompts: Sequence[Prompt], multiple: int
) -> tuple[tuple[int, int], tuple[int, int]]:
    """The largest (height, width) that a model of `own` pixels a side will draw, and the largest that is asked for."""
    from sana.resolution import drawn_size, generation_table, parse_prompt_size

    table = generation_table(own, multiple)
    drawn, shown = set(), set()
    for prompt in prompts:
        try:
            height, width = parse_prompt_size(prompt.text, table)[1] or asked
            shown.add(size := (height or own, width or own))
            drawn.add(drawn_size(*size, table, multiple=multiple, binning=True))
        except ValueError as error:
            name = prompt.index if prompt.key is None else repr(prompt.key)
            raise ValueError(f"prompt {name}: {error}") from error
    return tuple(max(sizes, key=lambda size: size[0] * size[1]) for sizes in (drawn, shown))
