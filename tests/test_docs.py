"""What the documentation names must exist: paths, links, Python names, configs, commands and their flags.

"(planned)" behind a path or name says that it is not here yet; the test goes red once it is.
"""

import ast
import functools
import re
import shlex
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

from sana.config import load_config

ROOT = Path(__file__).resolve().parents[1]
DOCUMENTS = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    *sorted(
        path
        for folder in ("asset", "configs", "integrations", "tools")
        for path in (ROOT / folder).rglob("*.md")
    ),
]
DEFAULT_CONFIG = ROOT / "configs/sana_config/tiny/Sana_tiny_img256.yaml"
# Written by runs and users, absent from a clone.
PRODUCTS = ("output/", "checkpoints/", "logs/", "log_vis/", "data/", ".venv")
SOURCE_SUFFIXES = {".py", ".sh", ".md", ".toml"}
SUFFIXES = SOURCE_SUFFIXES | {".yaml", ".yml", ".txt", ".json", ".jsonl", ".png", ".safetensors"}


@dataclass(frozen=True)
class Document:
    """A Markdown file taken apart: prose lines, and fenced blocks as (language, text)."""

    folder: Path
    prose: list[str]
    blocks: list[tuple[str, str]]


def read(text: str, folder: Path) -> Document:
    fence = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
    return Document(folder, fence.sub("", text).splitlines(), fence.findall(text))


def inline_code(line: str) -> list[str]:
    return re.findall(r"`([^`]+)`", line)


# Paths and Python names


def looks_like_path(token: str) -> bool:
    if not re.fullmatch(r"[\w.*/-]+", token) or token.startswith((*PRODUCTS, "/", "-")):
        return False
    suffix = Path(token).suffix
    return "/" in token and (suffix in SUFFIXES or token.endswith("/")) or suffix in SOURCE_SUFFIXES


def path_exists(token: str, folder: Path) -> bool:
    """Relative to the root, to the package or to the document; a bare file name may lie anywhere of ours."""
    if any(any(base.glob(token.rstrip("/"))) for base in (ROOT, ROOT / "sana", folder)):
        return True
    tops = ("sana", "scripts", "train_scripts", "tools", "tests", "app", "asset", "configs")
    return "/" not in token and any(any((ROOT / top).rglob(token)) for top in tops)


def name_exists(dotted: str) -> bool:
    """Whether `sana.a.b.name` is a module, or a word in the module (or package) that the leading parts name."""
    path, parts = ROOT / "sana", dotted.split(".")[1:]
    while parts and (path / parts[0]).is_dir():
        path /= parts.pop(0)
    if parts and (path / f"{parts[0]}.py").is_file():
        path = path / f"{parts.pop(0)}.py"
    source = path if path.is_file() else path / "__init__.py"
    return not parts or (source.is_file() and re.search(rf"\b{parts[0]}\b", source.read_text()) is not None)


def prose_problems(document: Document) -> list[str]:
    found = []
    for line in document.prose:
        for token, planned in re.findall(r"`([^`]+)`( \(planned\))?", line):
            name = re.match(r"sana(\.[A-Za-z_]\w*)+(?=$|\()", token)
            if looks_like_path(token):
                exists = path_exists(token, document.folder)
            elif name:
                exists = name_exists(name[0])
            else:
                continue
            if exists == bool(planned):
                found.append(f"{token} is said to be planned and exists" if exists else f"no {token}")
        for target in re.findall(r"\]\(([^)#\s]+)", line):
            if "://" not in target and not (document.folder / target).exists():
                found.append(f"no link target {target}")
    return found


def python_problems(document: Document) -> list[str]:
    found = []
    for language, text in document.blocks:
        if language == "python":
            for node in ast.walk(ast.parse(text)):
                if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "sana":
                    names = [f"{node.module}.{alias.name}" for alias in node.names]
                    found += [f"no {name}" for name in names if not name_exists(name)]
    return found


# Commands


def commands(document: Document) -> list[list[str]]:
    """Every shell command as words, from shell blocks and from inline code that starts like one."""
    lines = [code for line in document.prose for code in inline_code(line)]
    lines = [line for line in lines if re.match(r"(bash|python|torchrun|accelerate) \S", line)]
    for language, text in document.blocks:
        if language in {"bash", "sh"}:
            lines += text.replace("\\\n", " ").splitlines()
    words = (shlex.split(part, comments=True) for line in lines for part in re.split(r"&&|\|", line))
    without_variables = (
        [word for i, word in enumerate(w) if i or not re.match(r"[A-Z_]+=", word)] for w in words
    )
    return [command for command in without_variables if command]


@functools.cache
def help_text(script: Path) -> str:
    """What `--help` prints; for a shell script its own text and the help of the Python scripts that it runs."""
    if script.suffix == ".py":
        result = subprocess.run([sys.executable, script, "--help"], cwd=ROOT, capture_output=True, text=True)
        assert result.returncode == 0, result.stderr
        return result.stdout
    text = script.read_text(encoding="utf-8")
    called = [ROOT / name for name in re.findall(r"[\w/]+\.py", text)]
    return text + "".join(help_text(path) for path in called if path.is_file())


def command_problems(command: list[str]) -> list[str]:
    if command[0] not in {"bash", "python", "torchrun", "accelerate"} or command[1:2] == ["-m"]:
        return []
    script = next(
        (word for word in command[1:] if Path(word).suffix in {".py", ".sh"} or word == ".ci/run"), None
    )
    if script is None or not (ROOT / script).is_file():
        return [f"no script {script} in {shlex.join(command)}"]
    arguments = command[command.index(script) + 1 :]
    configs = [ROOT / word.split("=")[-1] for word in arguments if word.endswith(".yaml")]
    found, overrides = [], []
    for flag, following in zip(arguments, [*arguments[1:], "--"][: len(arguments)], strict=True):
        name, _, value = flag.partition("=")
        if name.startswith("--") and "." in name:
            overrides.append(
                f"{name}={value}" if value or following.startswith("--") else f"{name}={following}"
            )
        elif name.startswith("--") and not re.search(rf"(?<![\w-]){name}(?![\w-])", help_text(ROOT / script)):
            found.append(f"{script} has no flag {name}")
    if overrides:
        try:
            load_config((configs or [DEFAULT_CONFIG])[0], overrides)
        except ValueError as error:
            found.append(f"{shlex.join(command)}: {error}")
    return found


def config_problems(text: str) -> list[str]:
    return [
        f"no {name}" for name in re.findall(r"configs/[\w./-]+\.yaml", text) if not (ROOT / name).is_file()
    ]


def problems(text: str, folder: Path = ROOT) -> list[str]:
    document = read(text, folder)
    found = prose_problems(document) + python_problems(document) + config_problems(text)
    for command in commands(document):
        found += command_problems(command)
    return found


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_what_the_docs_name_exists(path):
    found = problems(path.read_text(encoding="utf-8"), path.parent)
    assert not found, "\n".join(found)


@pytest.mark.parametrize(
    "text",
    [
        "see `sana/nowhere.py`",
        "see `configs/*.nothing.yaml`",
        "see `sana/resolution.py` (planned)",
        "see `sana.pipeline.NoSuchName`",
        "[a picture](no/such.png)",
        "run `bash scripts/no_such.sh`",
        "run `python scripts/inference.py --no_such_flag`",
        "```bash\npython scripts/inference.py \\\n  --model.no_such_key=1\n```",
        "```bash\nCUDA_VISIBLE_DEVICES=0 torchrun --nproc_per_node=2 scripts/no_such.py\n```",
        "```bash\nbash train_scripts/train.sh configs/no_such.yaml\n```",
        "```python\nfrom sana.models.zoo import no_such_name\n```",
    ],
)
def test_planted_errors_are_caught(text):
    assert problems(text)


def test_true_statements_pass():
    text = """
`sana/resolution.py`, `utils/hub.py`, `sana.models.zoo.build_transformer`, `output/demo/`, [tests](tests/run.sh)
`Efficient-Large-Model/Sana_1600M_1024px`
`sana/nowhere.py` (planned)
```bash
OMP_NUM_THREADS=1 python scripts/inference.py --prompt='a red circle' --text_encoder.model_max_length 64
```
"""
    assert problems(text) == []
