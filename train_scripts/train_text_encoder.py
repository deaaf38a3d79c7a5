"""Train the text encoder of Sana-tiny: its tokenizer and a small Gemma-2 on the captions of the shapes.

python train_scripts/train_text_encoder.py --steps 4000 --work_dir output/tiny_text_encoder
"""

from argparse import Namespace
from pathlib import Path

from sana.utils.cli import Parser, at_least

CONFIG = "configs/sana_config/tiny/Sana_tiny_img256.yaml"


def make_parser() -> Parser:
    """The command line."""
    parser = Parser(description=__doc__)
    parser.add_argument(
        "--work_dir", type=Path, required=True, help="gets text_encoder/, a transformers folder"
    )
    parser.add_argument("--steps", type=at_least(1), required=True, help="optimizer steps")
    parser.add_argument("--batch_size", type=at_least(1), default=64)
    parser.add_argument("--lr", type=float, default=2e-3, help="peak learning rate")
    parser.add_argument("--config", default=CONFIG, help="its text_encoder.chi_prompt is the instruction")
    parser.add_argument(
        "--load_from", type=Path, help="a text encoder to go on from, with its tokenizer and its size"
    )
    parser.add_argument("--vocabulary", type=at_least(310), default=640, help="tokens; 260 of them are fixed")
    parser.add_argument("--hidden_size", type=at_least(8), default=128)
    parser.add_argument("--layers", type=at_least(1), default=4)
    parser.add_argument("--seed", type=int, default=0)
    return parser


def run(args: Namespace) -> None:
    """Train and save."""
    import torch

    from sana.config import load_config
    from sana.training import text_encoder
    from sana.utils import logging

    logging.configure()
    chi = "\n".join(load_config(args.config).text_encoder.chi_prompt)
    torch.manual_seed(args.seed)
    if args.load_from:
        model, tokenizer = text_encoder.load(args.load_from)
    else:
        texts = (text_encoder.training_text(i, chi) for i in range(20000))
        tokenizer = text_encoder.train_tokenizer(
            [text.given + text.follows for text in texts], args.vocabulary
        )
        model = text_encoder.build_language_model(tokenizer, hidden_size=args.hidden_size, layers=args.layers)
    text_encoder.train_language_model(
        model, tokenizer, chi, steps=args.steps, batch_size=args.batch_size, lr=args.lr, seed=args.seed
    )
    folder = args.work_dir / "text_encoder"
    text_encoder.save(model, tokenizer, folder, torch.float16)
    print(folder)


if __name__ == "__main__":
    parser = make_parser()
    parser.run(run, parser.parse_args())
