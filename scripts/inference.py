"""Draw images from prompts: one prompt, or a file of them, with the embedded model or any Sana checkpoint.

Without --config and --model_path the model shipped with the repository is used, and no network. The paths of the images
are printed at the end. A second run draws only what is missing; torchrun divides the work among its processes. Words
like --model.mixed_precision=bf16 override the config.
"""

from argparse import Namespace
from pathlib import Path

from sana.data.prompts import Prompt, read_json, read_picture, read_txt
from sana.utils import hub
from sana.utils.cli import Parser, at_least, boolean, numbers, words


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
    ("dtype", str, None, "fp32, bf16 or fp16, of the transformer (default: the config's, and fp32 on a CPU)"),
)
ABLATIONS = {"cfg_scale": float, "pag_scale": float, "step": steps, "seed": int}
FIELDS = {"cfg_scale": "guidance_scale", "pag_scale": "pag_guidance_scale", "step": "num_inference_steps"}
FIELDS |= {"sampling_algo": "sampler"}
UNUSED = ("version", "exist_time_prefix", "gpu_id", "debug")


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
    how = {name: getattr(args, name) for name in ("device", "dtype", "lowercase", "compile")}
    pipeline = SanaPipeline(config, **how)
    for path in args.lora:
        pipeline.load_lora(path, args.lora_scale)

    for setting in settings:
        if args.from_image is not None:
            generation.compare_with_picture(args.from_image, setting.record(pipeline))
        name = generation.folder_name(pipeline, setting, args.dataset or dataset, args.add_label)
        folder = args.work_dir / name
        extras = {"grid": args.grid, "tar_and_del": args.tar_and_del, "save_name": args.if_save_dirname}
        counts = {"batch_size": args.bs, "num_images_per_prompt": args.num_images_per_prompt}
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
