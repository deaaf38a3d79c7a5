"""What each option that trades exactness gains and costs, on the embedded model: time, latents, pixels and the score.

    python scripts/bench_options.py --output report.json
    python scripts/bench_options.py --options exact,bf16,step_cache=0.1 --limit 2

Every option draws the same prompts from the same noise. Errors are against a transformer in float32 without options (on a
GPU the options run in the model's own type); the score is that of the shapes benchmark on --limit prompts of each tag.
Times are of denoising and decoding one batch, in turns.
"""

import statistics
import time
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from typing import Any

from sana.utils.cli import Parser, at_least, words

DEFAULT = (
    "exact,bf16,step_cache=0.05,step_cache=0.1,step_cache=0.2,interval=0.2-0.9,interval=0.4-1,"
    "pag=2,steps=14,steps=10,int8,int8-dynamic"
)


def make_parser() -> Parser:
    """The command line."""
    parser = Parser(description=__doc__)
    add = parser.add_argument
    add("--config", help="YAML file (default: the embedded model's)")
    add("--options", type=words, default=words(DEFAULT), help=f"comma between (default: {DEFAULT})")
    add("--limit", type=at_least(1), default=8, help="prompts of each of the six tags (default: 8)")
    add("--bs", type=at_least(1), default=16, help="images drawn at once (default: 16)")
    add("--repeats", type=at_least(1), default=3, help="timed batches; the median counts (default: 3)")
    add("--device", help="cpu, cuda, cuda:1 (default: a GPU where there is one)")
    add("--output", type=Path, help="file for a JSON report")
    return parser


def prepare(option: str, load: Callable[..., Any]) -> tuple[Any, dict[str, Any]]:
    """(pipeline, settings of its calls) of an option such as "step_cache=0.1"."""
    name, _, value = option.partition("=")
    try:
        match name:
            case "exact":
                return load(dtype="fp32"), {}
            case "bf16" | "fp16":
                return load(dtype=name), {}
            case "int8" | "int8-dynamic" | "fp8" | "fp8-dynamic" | "nf4":
                return load(quantize={"transformer": name}), {}
            case "step_cache":
                return load().cache_steps(float(value)), {}
            case "interval":
                low, high = value.split("-")
                return load(), {"interval_guidance": (float(low), float(high))}
            case "pag":
                return load(), {"pag_guidance_scale": float(value)}
            case "steps":
                return load(), {"num_inference_steps": int(value)}
    except ValueError as error:
        raise ValueError(f"--options: {option!r}: {error}") from error
    raise ValueError(f"--options: unknown {option!r}; choose from {DEFAULT}, fp16, fp8, fp8-dynamic, nf4")


def run(args: Namespace) -> None:
    """Draw, compare, score and time. Torch is imported only here."""
    import torch

    from sana.benchmarks import timing
    from sana.evaluation import shapes_benchmark as benchmark
    from sana.metrics.geneval import load_prompts, summarise
    from sana.metrics.geneval_folder import shapes_eyes
    from sana.metrics.report import make_report
    from sana.pipeline import DEFAULT_CONFIG, SanaPipeline
    from sana.shapes.benchmark import PROMPTS_FILE
    from sana.utils import hub, images, logging

    logging.configure("WARNING")
    config = hub.resolve(args.config or DEFAULT_CONFIG)
    prompts = list(benchmark.subset(load_prompts(hub.resolve(PROMPTS_FILE)), args.limit).values())
    pipelines = {
        option: prepare(option, lambda **how: SanaPipeline(config, device=args.device, **how))
        for option in dict.fromkeys(["exact", *args.options])
    }

    def batches(option: str) -> Any:
        """Latents and pixels of every batch of prompts."""
        pipeline, settings = pipelines[option]
        for start in range(0, len(prompts), args.bs):
            texts = [prompt.prompt for prompt in prompts[start : start + args.bs]]
            seeds = list(range(start, start + len(texts)))
            latents = pipeline(texts, seed=seeds, output_type="latent", **settings)
            yield latents, pipeline.autoencoder.decode(latents).float()

    values: dict[str, dict[str, float]] = {}
    eyes = shapes_eyes()
    reference: list[tuple[torch.Tensor, torch.Tensor]] = []
    with torch.inference_mode():
        for option in pipelines:
            drawn = list(batches(option))
            reference = reference or drawn
            (latents, pixels), (exact, exact_pixels) = (
                [torch.cat([part.cpu() for part in parts]) for parts in zip(*each, strict=True)]
                for each in (drawn, reference)
            )
            errors = (pixels.clamp(-1, 1) - exact_pixels.clamp(-1, 1)).square().flatten(1).mean(1)
            psnr = (10 * torch.log10(4 / errors.clamp_min(1e-12))).clamp_max(99)
            records = [
                eyes.look(prompt, image.numpy(), str(i))
                for i, (prompt, image) in enumerate(zip(prompts, images.to_uint8(pixels), strict=True))
            ]
            values[option] = {
                "latent_error": ((latents - exact).norm() / exact.norm()).item(),
                "psnr": psnr.median().item(),
                "worst_psnr": psnr.min().item(),
                "within_40_db": int((psnr >= 40).sum()),
                "score": summarise(records)["overall"],
            }
        times: dict[str, list[float]] = {option: [] for option in pipelines}
        for _ in range(args.repeats):
            for option in pipelines:
                start = time.perf_counter()
                next(batches(option))[1].cpu()  # which waits for a GPU
                times[option].append(time.perf_counter() - start)
    for option, row in values.items():
        row["seconds"] = statistics.median(times[option])
        row["speed"] = statistics.median(times["exact"]) / row["seconds"]
        row["reused_steps"] = getattr(pipelines[option][0]._wrapped, "reused", 0)
        figures = f"{row['speed']:5.2f}x  latents {row['latent_error']:8.1e}"
        figures += (
            f"  PSNR {row['psnr']:5.1f} dB, at worst {row['worst_psnr']:5.1f}, 40 in {row['within_40_db']}"
        )
        print(f"{option:20} {figures}  score {row['score']:.3f}", flush=True)
    if args.output:
        report = make_report(
            metric="options",
            values=values,
            n=len(prompts),
            protocol="against a float32 transformer without options; same prompts and noise; median of interleaved batches",
            settings={
                "batch": args.bs,
                "repeats": args.repeats,
                **timing.settings_of_this_run(pipelines["exact"][0].device),
            },
            dtype=", ".join(sorted({str(pipeline.dtype)[6:] for pipeline, _ in pipelines.values()})),
        )
        report.save(args.output)


if __name__ == "__main__":
    parser = make_parser()
    parser.run(run, parser.parse_args())
