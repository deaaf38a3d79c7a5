"""DPG-Bench: the aggregation by hand, grids, the published files, judges of every kind, the command."""

import csv
import json

import pytest
import torch
from PIL import Image
from transformers import (
    BertTokenizerFast,
    BlipConfig,
    BlipForQuestionAnswering,
    BlipImageProcessor,
    BlipProcessor,
    ViltConfig,
    ViltForQuestionAnswering,
    ViltImageProcessor,
    ViltProcessor,
)

from sana.metrics.dpg import Question, crop_boxes, is_yes, picture_score, read_answers, read_items, summarise
from sana.metrics.dpg_folder import Protocol, judge_pictures, read_pictures
from sana.metrics.vqa import load_judge
from tests.labellers import write_captioner
from tools.metrics import dpg as command

COLUMNS = "item_id,text,keywords,proposition_id,dependency,category_broad,category_detailed,tuple,question_natural_language"
# Two prompts. Of "cat": 2 and 3 depend on 1, 4 on 2 and 3. Of "dog.1": 1 depends on 2, which comes after it.
ROWS = [
    ("cat", 1, "0", "entity - whole (cat)", "Is there a cat?"),
    ("cat", 2, "1", "attribute - color (cat, red)", "Is the cat red?"),
    ("cat", 3, "1", "attribute - size (cat, big)", "Is the cat big, or huge?"),
    ("cat", 4, "2, 3", "relation - spatial (cat, tree, on)", "Is the red cat on a tree?"),
    ("dog", 1, "2", "attribute - color (dog, blue)", "Is the dog blue?"),
    ("dog", 2, "0", "global - (photo)", "Is it a photo?"),
]


def write_questions(path, rows=ROWS):
    with open(path, "w", newline="") as handle:
        writer = csv.writer(handle)
        writer.writerow(COLUMNS.split(","))
        for item, number, parents, tuple_, question in rows:
            writer.writerow([item, f"a {item}, 🦊", "", number, parents, "", "", tuple_, question])
    return path


@pytest.fixture
def questions(tmp_path):
    return write_questions(tmp_path / "dpg_bench.csv")


def yes(*numbers, of=4):
    return {number: number in numbers for number in range(1, of + 1)}


# Arithmetic


def test_questions_are_read(questions):
    items = read_items(questions)
    assert list(items) == ["cat", "dog"] and items["cat"].prompt == "a cat, 🦊"
    assert items["cat"].questions[3] == Question(4, "Is the red cat on a tree?", (2, 3), "relation - spatial")
    assert items["dog"].questions[1].category == "global -"


@pytest.mark.parametrize(
    ("answered", "expected"),
    [
        ((1, 2, 3, 4), 1.0),
        ((2, 3, 4), 0.0),  # no cat: nothing about it counts, however deep
        ((1, 3, 4), 0.5),  # not red: the red cat on a tree falls too
        ((1, 2, 3), 0.75),
        ((1,), 0.25),
        ((), 0.0),
    ],
)
def test_a_no_spreads(questions, answered, expected):
    assert picture_score(read_items(questions)["cat"].questions, yes(*answered)) == expected


def test_questions_are_gone_through_once_in_order():
    """1 depends on 3 which depends on 2: when 1 is looked at, 3 still has its own answer."""
    chain = [
        Question(1, "a", (3,), "entity - whole"),
        Question(3, "c", (2,), "entity - whole"),
        Question(2, "b", (), "entity - whole"),
    ]
    assert picture_score(chain, {1: True, 2: False, 3: True}) == pytest.approx(1 / 3)
    assert picture_score(chain[::-1], {1: True, 2: False, 3: True}) == 0


ANSWERS = {
    "cat": [yes(1, 2, 3, 4), yes(1, 3, 4), yes(2, 3, 4), yes(1)],  # 1, 0.5, 0, 0.25
    "dog": [yes(1, of=2), yes(1, 2, of=2), yes(2, of=2), yes(of=2)],  # 0, 1, 0.5, 0
}


def test_totals_by_hand(questions):
    values = summarise(read_items(questions), ANSWERS)
    assert values["overall"] == pytest.approx(100 * (1.75 / 4 + 1.5 / 4) / 2)
    # Pooled over all pictures, as answered: entity 3 of 4; color 2 of 4 and 2 of 4; size 3 of 4; spatial 3 of 4.
    assert values["l2"] == pytest.approx(
        {
            "attribute - color": 50.0,
            "attribute - size": 75.0,
            "entity - whole": 75.0,
            "global -": 50.0,
            "relation - spatial": 75.0,
        }
    )
    assert values["l1"] == pytest.approx(
        {"attribute": 100 * 7 / 12, "entity": 75.0, "global": 50.0, "relation": 75.0}
    )
    assert list(values["l1"]) == sorted(values["l1"]) and list(values["l2"]) == sorted(values["l2"])


def test_totals_with_the_published_faults(questions):
    """The first row is lost; "cat" with it, whose questions 2 and 3 depend on it. Categories: the last picture."""
    items = read_items(questions, compat="ella")
    assert list(items) == ["dog"]
    values = summarise(items, ANSWERS, compat="ella")
    assert values["overall"] == pytest.approx(100 * 1.5 / 4)
    assert values["l2"] == {"attribute - color": 0.0, "global -": 0.0}
    with_three = ANSWERS | {"dog": ANSWERS["dog"][:3]}
    assert summarise(items, with_three, compat="ella")["l2"] == {"attribute - color": 0.0, "global -": 100.0}


def test_a_first_row_that_nothing_depends_on_takes_its_question_only(tmp_path):
    free = [row if row[0] == "dog" else (*row[:2], "0", *row[3:]) for row in ROWS]
    items = read_items(write_questions(tmp_path / "q.csv", free), compat="ella")
    assert [q.number for q in items["cat"].questions] == [2, 3, 4]


def test_what_is_missing_is_named(questions):
    items = read_items(questions)
    with pytest.raises(ValueError, match="prompt dog has no picture"):
        summarise(items, {"cat": ANSWERS["cat"]})
    with pytest.raises(ValueError, match="question 4 of cat has no answer: 'Is the red cat"):
        summarise(items, ANSWERS | {"cat": [yes(1, of=3)]})


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (ROWS[1:], "cat has questions that depend on question 1, which is not there; .* --compat ella"),
        ([(*ROWS[0][:2], "none", *ROWS[0][3:])], "line 2: .*none"),
        ([("cat", "first", *ROWS[0][2:])], "line 2: .*first"),
        ([("cat", 1, "0", "entity", "")], "line 2: a row without an item_id or a question"),
        ([], "holds no question"),
    ],
)
def test_a_wrong_file_is_named(tmp_path, rows, message):
    with pytest.raises(ValueError, match=message):
        read_items(write_questions(tmp_path / "q.csv", rows))


def test_another_file_is_refused(tmp_path, questions):
    (tmp_path / "other.csv").write_text("a,b\n1,2\n")
    with pytest.raises(ValueError, match="it has no column item_id"):
        read_items(tmp_path / "other.csv")
    with pytest.raises(ValueError, match="unknown compat 'Ella'; choose from fixed, ella"):
        read_items(questions, compat="Ella")


@pytest.mark.parametrize(
    ("answer", "expected"),
    [("yes", True), ("Yes.", True), (" yes, it is", True), ("no", False), ("yesterday", False), ("", False)],
)
def test_yes(answer, expected):
    assert is_yes(answer) is expected


# Grids


def test_grids_without_padding():
    boxes = [(0, 0, 8, 6), (8, 0, 16, 6), (0, 6, 8, 12), (8, 6, 16, 12)]
    assert crop_boxes((16, 12), padding=0) == boxes
    assert crop_boxes((16, 12), padding=0, compat="ella") == boxes


def test_grids_of_make_grid():
    """torchvision's padding: its pictures are found, and where the published evaluator cuts instead."""
    from torchvision.utils import make_grid

    pictures = torch.stack([torch.full((3, 8, 8), level) for level in (0.2, 0.4, 0.6, 0.8)])
    grid = make_grid(pictures, nrow=2)
    height, width = grid.shape[1:]
    cut = [grid[:, y:b, x:r] for x, y, r, b in crop_boxes((width, height), padding=2)]
    assert all((found == picture).all() for found, picture in zip(cut, pictures, strict=True))
    assert crop_boxes((width, height), padding=2, compat="ella") == crop_boxes((16, 16), padding=0)


@pytest.mark.parametrize(("size", "padding"), [((1029, 1030), 0), ((1024, 1025), 0), ((1024, 1024), 3)])
def test_what_is_no_grid_is_refused(size, padding):
    with pytest.raises(ValueError, match=f"no 2 x 2 grid with a padding of {padding} .*--grid 2"):
        crop_boxes(size, padding=padding)


# Files of answers


def test_published_answers_are_read(tmp_path, questions):
    lines = []
    for key, pictures in ANSWERS.items():
        for place, answered in enumerate(pictures):
            box = (512 * (place % 2), 512 * (place // 2), 512 * (place % 2) + 512, 512 * (place // 2) + 512)
            for question in read_items(questions)[key].questions:
                answer = "yes" if answered[question.number] else "no"
                lines.append(f"out/a, b/{key}.jpg, {box}, {question.text}, {answer}")
    lines.append("out/stranger.jpg, (0, 0, 512, 512), Is it?, yes")
    path = tmp_path / "dpg_results_detail.txt"
    path.write_text("\n".join(lines) + "\n")
    assert read_answers(path, read_items(questions)) == ANSWERS
    path.write_text("\n".join([*lines, "and so on"]))
    with pytest.raises(ValueError, match=r"line 26 is not of the form .*'and so on'"):
        read_answers(path, read_items(questions))


def test_equal_questions_of_a_prompt_keep_their_own_answers(tmp_path):
    """By their order; where the questions of a picture were asked again, the later answers count."""
    rows = [("cat", number, "0", "entity - whole (cat)", f"{text}?") for number, text in enumerate("ABA", 1)]
    items = read_items(write_questions(tmp_path / "dpg_bench.csv", rows))
    path, asked = tmp_path / "detail.txt", [("A?", "yes"), ("B?", "yes"), ("A?", "no")]
    write = lambda pairs: path.write_text("".join(f"cat.png, (0, 0, 8, 8), {q}, {a}\n" for q, a in pairs))  # noqa: E731
    write(asked)
    assert read_answers(path, items) == {"cat": [{1: True, 2: True, 3: False}]}
    write([*asked, ("A?", "no"), ("B?", "no"), ("A?", "yes")])
    assert read_answers(path, items) == {"cat": [{1: False, 2: False, 3: True}]}


# Judges


class Parrot:
    """Says yes to questions with a word in them; knows the colour that it is shown."""

    name = "parrot"

    def __init__(self):
        self.seen = []

    def __call__(self, image, questions):
        self.seen.append((image.size, image.getpixel((0, 0)), image.getpixel((image.width - 1, 0))))
        return [
            "Yes." if "cat" in question or image.getpixel((0, 0))[0] > 100 else "no" for question in questions
        ]


def test_a_folder_of_grids(tmp_path, questions):
    folder, items = tmp_path / "images", read_items(questions)
    folder.mkdir()
    for key in items:
        grid = Image.new("RGB", (38, 22), "black")
        for place, level in enumerate((0, 200, 0, 0)):
            tile = Image.new("RGB", (16, 8), (level, 1, 2))
            grid.paste(tile, (2 + 18 * (place % 2), 2 + 10 * (place // 2)))
        grid.save(folder / f"{key}.png")
    protocol, judge = Protocol(padding=2), Parrot()
    pictures = read_pictures(folder, items, protocol)
    found = judge_pictures(pictures, items, judge, protocol, tmp_path / "work", {})
    assert [size for size, *_ in judge.seen] == [(16, 8)] * 8 and found.pictures == 8
    assert [left for _, left, _ in judge.seen[:4]] == [(0, 1, 2), (200, 1, 2), (0, 1, 2), (0, 1, 2)]
    assert found.answers == {
        "cat": [yes(1, 2, 3, 4)] * 4,
        "dog": [yes(of=2), yes(1, 2, of=2), yes(of=2), yes(of=2)],
    }
    details = tmp_path / "detail.txt"
    details.write_text("".join(found.details))
    assert read_answers(details, items) == found.answers

    again = judge_pictures(pictures, items, judge, protocol, tmp_path / "work", {})
    assert len(judge.seen) == 8 and again == found, "nothing is asked twice"
    with pytest.raises(ValueError, match="other settings: compat 'fixed' .now 'ella'."):
        judge_pictures(pictures, items, judge, Protocol(padding=2, compat="ella"), tmp_path / "work", {})


def test_four_files_a_prompt(tmp_path, questions, caplog):
    folder, items = tmp_path / "images", read_items(questions)
    folder.mkdir()
    for key in items:
        for place in range(4):
            name = f"{key}-s{place}.png" if place else f"{key}.png"
            Image.new("RGB", (16, 8), (60 * place, 1, 2)).save(folder / name)
    pictures = read_pictures(folder, items, Protocol())
    assert [(picture.name, picture.sample_index) for picture in pictures[:2]] == [
        ("cat.png", 0),
        ("cat-s1.png", 1),
    ]
    found = judge_pictures(pictures, items, Parrot(), Protocol(), tmp_path / "work", {})
    assert found.answers["dog"] == [yes(of=2), yes(of=2), yes(1, 2, of=2), yes(1, 2, of=2)]
    details = tmp_path / "detail.txt"
    details.write_text("".join(found.details))
    assert read_answers(details, items) == found.answers
    for path in folder.glob("*-s*"):
        path.unlink()
    read_pictures(folder, items, Protocol())
    assert "one picture of each prompt" in caplog.text


WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "is", "it", "red", "yes", "no", "?", "a", "cat", "##s"]


def bert_tokenizer(folder):
    (folder / "vocab.txt").write_text("\n".join(WORDS))
    return BertTokenizerFast(str(folder / "vocab.txt"), do_lower_case=True)


def write_blip(folder):
    folder.mkdir()
    tokenizer = bert_tokenizer(folder)
    sizes = dict(hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2)
    text = sizes | dict(vocab_size=len(WORDS), encoder_hidden_size=16, initializer_range=0.5)
    text |= dict(bos_token_id=2, eos_token_id=3, sep_token_id=3, pad_token_id=0)
    config = BlipConfig(text_config=text, vision_config=sizes | dict(image_size=32, patch_size=16))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        BlipForQuestionAnswering(config).save_pretrained(folder)
    BlipProcessor(BlipImageProcessor(size={"height": 32, "width": 32}), tokenizer).save_pretrained(folder)
    return folder


def write_vilt(folder):
    folder.mkdir()
    tokenizer = bert_tokenizer(folder)
    config = ViltConfig(
        vocab_size=len(WORDS), hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
        image_size=32, patch_size=16, max_position_embeddings=8, initializer_range=0.5,
        id2label={0: "yes", 1: "no", 2: "two"}, label2id={"yes": 0, "no": 1, "two": 2},
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        ViltForQuestionAnswering(config).save_pretrained(folder)
    ViltProcessor(ViltImageProcessor(size={"shortest_edge": 32}, size_divisor=16), tokenizer).save_pretrained(
        folder
    )
    return folder


@pytest.mark.parametrize("write", [write_blip, write_vilt, write_captioner])
def test_every_kind_of_judge_runs(write, tmp_path):
    judge = load_judge(write(tmp_path / "judge"))
    assert judge.name == "judge"
    image = Image.radial_gradient("L").resize((40, 30))  # neither RGB nor square
    questions = ["Is it red?", "Is it a cat? " + "Is it red? " * 9]
    answers = judge(image, questions)
    assert len(answers) == 2 and all(isinstance(answer, str) for answer in answers)
    assert answers == [judge(image, [question])[0] for question in questions], "padding changes no answer"
    if write is write_vilt:
        assert set(answers) <= {"yes", "no", "two"}


def test_a_folder_without_a_model_is_refused(tmp_path):
    with pytest.raises(ValueError, match="is no model of transformers"):
        load_judge(tmp_path)


# The command


def run(arguments, capsys):
    parser, status = command.make_parser(), 0
    try:
        parser.run(command.run, parser.parse_args([str(word) for word in arguments]))
    except SystemExit as left:
        status = left.code
    captured = capsys.readouterr()
    return status, captured.out, captured.err


@pytest.fixture
def images(tmp_path, questions):
    folder = tmp_path / "images"
    folder.mkdir()
    for key in read_items(questions):
        for sample in range(2):
            name = f"{key}-s{sample}.png" if sample else f"{key}.png"
            Image.radial_gradient("L").resize((40 + 8 * sample, 40)).save(folder / name)
    return folder


def test_command_with_a_judge_and_again_from_its_answers(images, questions, tmp_path, capsys, caplog):
    judge = write_vilt(tmp_path / "tiny-vilt")
    status, out, err = run([images, "--csv", questions, "--judge", judge, "--device=cpu"], capsys)
    assert status == 0, err
    report = json.loads(out)
    assert report == json.loads((tmp_path / "images.dpg.json").read_text())
    assert report["metric"] == "DPG-Bench (tiny-vilt)" and report["n"] == 4
    assert report["settings"]["prompts"] == 2 and report["settings"]["questions"] == 6
    assert len(report["weights"]["judge"]) == 64
    answers = tmp_path / "images.dpg_detail.txt"
    assert len(answers.read_text().splitlines()) == 2 * 6
    status, out, err = run(["--answers", answers, "--csv", questions], capsys)
    assert status == 0, err
    assert json.loads(out)["values"] == report["values"]
    assert json.loads(out)["metric"] == "DPG-Bench (images.dpg_detail.txt)"


def test_command_says_what_is_wrong_in_one_line(images, questions, tmp_path, capsys):
    judge = write_vilt(tmp_path / "judge")
    base = ["--csv", questions, "--judge", judge, "--device=cpu"]
    (tmp_path / "empty").mkdir()
    capsys.readouterr()  # what making the judge prints

    def fails(*arguments):
        status, out, err = run([*arguments, *base], capsys)
        assert (status, out, len(err.strip().splitlines())) == (2, "", 1), err
        return err

    assert "no picture in it" in fails(tmp_path / "empty")
    whole = (images / "dog-s1.png").read_bytes()
    (images / "dog-s1.png").write_bytes(whole[: len(whole) // 2])
    assert "dog-s1.png: cannot be read as a picture, truncated" in fails(images)
    work = tmp_path / "images.dpg.work"
    done = [
        json.loads(line)["file"]
        for line in "".join(p.read_text() for p in work.glob("manifest*")).splitlines()
    ]
    assert done == ["cat.png", "cat-s1.png", "dog.png"], "what was answered before is kept"
    (images / "dog-s1.png").unlink()
    assert "prompts with fewer than 2 pictures, the first: dog (1)" in fails(images)
    (images / "dog.png").unlink()
    assert "1 of 2 prompts without their picture, the first: dog" in fails(images)
    status, out, err = run([images, "--allow_missing", *base], capsys)
    assert status == 0 and json.loads(out)["settings"]["prompts"] == 1, err
    missing = [images, "--csv", tmp_path / "none.csv"]
    status, out, err = run(missing, capsys)
    assert status == 2 and "to fetch it: curl" in err and len(err.splitlines()) == 1
