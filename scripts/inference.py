"""Draw images from prompts: one prompt, or a file of them, with the embedded model or any Sana checkpoint.

Without --config and --model_path the model shipped with the repository is used, and no network. The paths of the images
are printed at the end. A second run draws only what is missing; torchrun divides the work among its processes. Words
like --model.mixed_precision=bf16 override the config.
"""

from argparse import Namespace
from pathlib import Path

from sana.data.prompts import Prompt, read_json, read_picture, read_txt
from sana.inference import ABLATIONS, FIELDS, FLAGS, UNUSED, make_memory_plan
from sana.utils import hub
from sana.utils.cli import Parser, boolean


def make_parser() -> Parser:
    """The command line."""
    parser = Parser(description=__doc__)
    source = parser.add_mutually_exclusive_group()
    source.add_argument("--prompt", help="one prompt")
    source.add_argument("--txt_file", default="asset/samples_mini.txt", help="lines (default: %(default)s)")
    source.add_argument("--json_file", help='{"id": {"prompt": "..."}}; images are named by the id')
    source.add_argument("--from_image", help="a PNG drawn before: draw it again, but for the flags given")
    for name, kind, default, text in FLAGS:
        optional = {"nargs": "?", "const": True} if kind is boolean else {}
        shown = f"{text} (default: {default})" if isinstance(default, float | int | Path) else text
        parser.add_argument(f"--{name}", type=kind, default=default, help=shown, **optional)
    parser.add_argument("--lora", nargs="+", metavar="PATH", default=[], help="adapters for the transformer")
    for name in UNUSED:
        parser.add_argument(f"--{name}", nargs="?", const=True, help="accepted, without effect")
    return parser


def run(args: Namespace, overrides: list[str]) -> None:
    """Everything after the flags are read. Torch is imported only here."""
    from sana import generation
    from sana.loading import find_config
    from sana.pipeline import SanaPipeline
    from sana.utils import logging

    logging.configure()
    if unused := [f"--{name}" for name in UNUSED if getattr(args, name) is not None]:
        logging.get_logger("inference").warning("accepted, but without effect: %s", ", ".join(unused))
    prompts, dataset = read_prompts(args)
    settings = [generation.Settings.from_names(variant) for variant in variants(args)]

    if size := args.custom_image_size:
        sizes = (f"model.image_size={size}", f"data.image_size={size}")
        overrides = [*overrides, *sizes, f"model.aspect_ratio_type=ASPECT_RATIO_{size}"]
    config = find_config(args.config, args.model_path, overrides)
    plan = make_memory_plan(config, args, prompts, (settings[0].height, settings[0].width))
    if args.plan:
        print(plan)
        return
    how = {name: getattr(args, name) for name in ("device", "dtype", "lowercase", "compile", "quantize")}
    pipeline = SanaPipeline(config, **how, offload=plan.setting.offload)
    pipeline.decode_bytes, pipeline.decode_tile = plan.setting.max_bytes, plan.setting.tile
    for path in args.lora:
        pipeline.load_lora(path, args.lora_scale)

    for setting in settings:
        if args.from_image is not None:
            generation.compare_with_picture(args.from_image, setting.record(pipeline))
        name = generation.folder_name(pipeline, setting, args.dataset or dataset, args.add_label)
        folder = args.work_dir / name
        extras = {"grid": args.grid, "tar_and_del": args.tar_and_del, "save_name": args.if_save_dirname}
        counts = {"batch_size": plan.setting.batch, "num_images_per_prompt": args.num_images_per_prompt}
        for path in generation.generate_folder(pipeline, prompts, folder, setting, **counts, **extras):
            print(path)


def read_prompts(args: Namespace) -> tuple[list[Prompt], str]:
    """The chosen prompts, and a name for them."""
    if args.prompt is not None:
        return [Prompt(text=args.prompt.strip())], "prompt"
    if args.from_image is not None:
        same_seed = args.seed == 0 and args.ablation_key != "seed"
        return [read_picture(args.from_image, with_seed=same_seed)[0]], Path(args.from_image).stem
    file = hub.resolve(args.json_file or args.txt_file)
    prompts = read_json(file) if args.json_file else read_txt(file)
    chosen = prompts[: args.sample_nums][args.start_index : args.end_index]
    if not chosen:
        raise ValueError(f"{file} has {len(prompts)} prompts, none in [{args.start_index}, {args.end_index})")
    return chosen, "MJHQ-30K" if "MJHQ-30K" in str(file) else file.stem


def variants(args: Namespace) -> list[dict]:
    """The flags under the names of `Settings`, once for each of --ablation_selections."""
    flags = {FIELDS.get(flag, flag): value for flag, value in vars(args).items()}
    if args.from_image is not None:
        usual = {FIELDS.get(flag, flag): value for flag, _, value, _ in FLAGS}
        record = read_picture(args.from_image)[1]
        flags |= {key: record[key] for key in usual.keys() & record if flags[key] == usual[key]}
    if args.ablation_key is None and args.ablation_selections is None:
        return [flags]
    if args.ablation_key not in ABLATIONS or not args.ablation_selections or args.grid:
        raise ValueError(
            f"give --ablation_key ({', '.join(ABLATIONS)}) with --ablation_selections, and no --grid"
        )
    field, kind = FIELDS.get(args.ablation_key, args.ablation_key), ABLATIONS[args.ablation_key]
    return [flags | {field: kind(text)} for text in args.ablation_selections]


if __name__ == "__main__":
    parser = make_parser()
    parser.run(run, *parser.parse_known_args())
