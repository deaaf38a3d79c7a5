"""Labels: what is asked for, what is kept, and that training reads all of it."""

import io
import json

import pytest
import webdataset
from PIL import Image

from sana.data.buckets import Frame
from sana.data.captions import Caption
from sana.data.image_folder import ImageFolder
from sana.data.labelling import REFUSALS, Labelling, check_kind, kind_of, open_samples
from sana.data.pictures import Reading
from sana.data.sidecars import suffixes_beside
from sana.data.tar_shards import TarShards

COLOURS = ("red", "lime", "blue", "white", "black")
FILES = {"folder": ImageFolder, "shards": TarShards}


def png(colour):
    content = io.BytesIO()
    Image.new("RGB", (8, 6), colour).save(content, "PNG")
    return content.getvalue()


def write(folder, layout):
    """Five pictures of one colour each, named a_0 to a_4, with own captions."""
    if layout == "folder":
        for number, colour in enumerate(COLOURS):
            (folder / f"a_{number}.png").write_bytes(png(colour))
            (folder / f"a_{number}.txt").write_text(f"own {number}\n")
        return
    for shard, numbers in (("b_0", (0, 1, 2)), ("b_1", (3, 4))):
        with webdataset.TarWriter(str(folder / f"{shard}.tar")) as writer:
            for number in numbers:
                content = {"png": png(COLOURS[number]), "txt": f"own {number}"}
                writer.write({"__key__": f"a_{number}"} | content)


class Painter:
    """Answers with the colour of the picture; `stop`: dies after so many pictures."""

    def __init__(self, prefix="", stop=None):
        self.prefix, self.stop, self.asked = prefix, stop, 0

    def __call__(self, pictures, captions):
        self.asked += len(pictures)
        if self.stop is not None and self.asked > self.stop:
            raise KeyboardInterrupt
        return [{"A": f"{self.prefix}{picture.getpixel((0, 0))}"} for picture in pictures]


def label(folder, answer, kind="A", batch_size=2, **settings):
    work = Labelling.captions(open_samples(folder, [f"_{kind}"]), kind, **settings)
    work.run(answer, batch_size=batch_size, threads=2)
    return work.finish()


def score(folder, answer, *kinds, **settings):
    work = Labelling.scores(open_samples(folder, ["_clip_score"], kinds), kinds, **settings)
    work.run(answer, batch_size=2)
    return work.finish()


def read(folder, layout, **suffixes):
    """The captions that training sees, of each picture."""
    samples = FILES[layout]([folder], Reading(frame=Frame(size=4), **suffixes))
    return [samples.captions(index) for index in range(len(samples))]


def lengths(pictures, captions):
    """A score for tests: the length of the caption."""
    return [{kind: str(len(text)) for kind, text in own.items()} for own in captions]


@pytest.mark.parametrize("layout", FILES)
def test_training_reads_what_was_written(tmp_path, layout):
    write(tmp_path, layout)
    outcome = label(tmp_path, Painter())
    assert (outcome.written, outcome.kept, outcome.bad) == (5, 0, {})
    outcome = score(tmp_path, lengths)
    assert (outcome.written, outcome.kept, outcome.bad) == (10, 0, {})
    suffixes = {
        "caption_suffixes": ("_A",),
        "score_suffixes": ("_prompt_clip_score", "_A_clip_score"),
    }
    found = suffixes_beside(open_samples(tmp_path, []))
    assert found == (["_A"], ["_A_clip_score", "_prompt_clip_score"])
    assert read(tmp_path, layout, **suffixes)[1] == [
        Caption(text="own 1", score=5.0),
        Caption(text="(0, 255, 0)", kind="A", score=11.0),
    ]
    name = {"folder": "a_1", "shards": "b_0"}[layout]
    assert json.loads((tmp_path / f"{name}_A.json").read_text())["a_1"] == {"A": "(0, 255, 0)"}
    assert json.loads((tmp_path / f"{name}_A_clip_score.json").read_text())["a_1"] == {"A": "11"}
    assert not list(tmp_path.glob("*.part")) and not list(tmp_path.glob(".*"))


@pytest.mark.parametrize("layout", FILES)
def test_a_run_that_was_ended_goes_on(tmp_path, layout):
    write(tmp_path, layout)
    with pytest.raises(KeyboardInterrupt):
        label(tmp_path, Painter(stop=2))
    journals = list(tmp_path.glob("*.part"))
    assert len(journals) == (1 if layout == "shards" else 0)
    for journal in journals:  # killed inside the third line
        journal.write_bytes(journal.read_bytes() + '{"a_2": {"A": "ü'.encode()[:-1])
    second = Painter()
    outcome = label(tmp_path, second)
    assert second.asked == 3 and (outcome.written, outcome.kept) == (3, 2)
    assert [found[1].text for found in read(tmp_path, layout, caption_suffixes=("_A",))] == [
        str(Image.new("RGB", (1, 1), colour).getpixel((0, 0))) for colour in COLOURS
    ]
    third = Painter()
    assert label(tmp_path, third).kept == 5 and third.asked == 0


@pytest.mark.parametrize("layout", FILES)
def test_a_new_caption_has_no_old_score(tmp_path, layout):
    write(tmp_path, layout)
    label(tmp_path, Painter())
    score(tmp_path, lengths)
    assert label(tmp_path, Painter("new "), overwrite=True).written == 5
    outcome = score(tmp_path, lengths)
    assert (outcome.written, outcome.kept) == (5, 5), "the scores of the own captions stay"
    found = read(tmp_path, layout, caption_suffixes=("_A",), score_suffixes=("_A_clip_score",))
    assert found[1][1] == Caption(text="new (0, 255, 0)", kind="A", score=15.0)
    assert score(tmp_path, lengths, overwrite=True).written == 10


def test_names_that_begin_alike(tmp_path):
    write(tmp_path, "folder")
    (tmp_path / "a.png").write_bytes(png("red"))
    assert label(tmp_path, Painter()).written == 6
    assert suffixes_beside(open_samples(tmp_path, [])) == (["_A"], []), "a_0_A.json is that of a_0, not of a"


def test_other_kinds_in_a_file_stay(tmp_path):
    write(tmp_path, "folder")
    (tmp_path / "a_0_A.json").write_text('{"a_0": {"B": "by B"}, "else": {"B": "x"}}')
    assert label(tmp_path, Painter()).written == 5
    content = json.loads((tmp_path / "a_0_A.json").read_text())
    assert content == {"a_0": {"B": "by B", "A": "(255, 0, 0)"}, "else": {"B": "x"}}


def test_what_cannot_be_labelled_is_named(tmp_path):
    write(tmp_path, "folder")
    whole = (tmp_path / "a_1.png").read_bytes()
    (tmp_path / "a_1.png").write_bytes(whole[:-30])
    (tmp_path / "a_2.jpg").write_bytes(png("red"))
    (tmp_path / "a_3_A.json").write_text("{")

    def answer(pictures, captions):
        return [{"A": " " if p.getpixel((0, 0)) == (0, 0, 0) else "a word"} for p in pictures]

    outcome = label(tmp_path, answer)
    reasons = {path.rpartition("/")[2]: reason for path, reason in outcome.bad.items()}
    assert "cannot read the picture" in reasons.pop("a_1.png")
    assert "a_2.jpg: rename one" in reasons.pop("a_2.png")
    assert "a_3_A.json is not valid JSON" in reasons.pop("a_3.png")
    assert "the answer for A is empty" in reasons.pop("a_4.png")
    assert not reasons and outcome.written == 2
    assert sorted(path.name for path in tmp_path.glob("*_A.json")) == [
        "a_0_A.json",
        "a_2_A.json",
        "a_3_A.json",
    ]
    assert (tmp_path / "a_3_A.json").read_text() == "{", "a broken file is its owner's to mend"


def test_a_refused_picture_does_not_take_its_batch_along(tmp_path):
    write(tmp_path, "folder")

    def answer(pictures, captions):
        if any(picture.getpixel((0, 0)) == (0, 0, 255) for picture in pictures):
            raise ValueError("too blue")
        return [{"A": "a word"} for _ in pictures]

    outcome = label(tmp_path, answer, batch_size=5)
    assert outcome.written == 4 and list(outcome.bad.values()) == ["too blue"]


def test_a_model_that_refuses_all_is_an_error(tmp_path):
    for number in range(REFUSALS + 1):
        (tmp_path / f"{number}.png").write_bytes(png("red"))
    asked = []

    def answer(pictures, captions):
        asked.append(len(pictures))
        raise ValueError("the template is wrong")

    with pytest.raises(ValueError, match="the template is wrong"):
        label(tmp_path, answer, batch_size=1)
    assert len(asked) == REFUSALS


def test_scores_of_some_kinds(tmp_path):
    write(tmp_path, "folder")
    label(tmp_path, Painter())
    (tmp_path / "a_4_A.json").unlink()
    outcome = score(tmp_path, lengths, "A")
    assert outcome.written == 4 and list(outcome.bad.values()) == ["has no caption of kind A"]
    assert not list(tmp_path.glob("*_prompt_clip_score.json"))
    with pytest.raises(ValueError, match="no picture has a caption of kind B or C to score"):
        score(tmp_path, lengths, "B", "C")


def test_fields_of_a_shard_are_captions_when_they_are_named(tmp_path):
    with webdataset.TarWriter(str(tmp_path / "0.tar")) as writer:
        own = {"prompt": "own", "A": "long caption", "author": "nobody"}
        writer.write({"__key__": "x", "png": png("red"), "json": json.dumps(own).encode()})
    score(tmp_path, lengths, "prompt", "A")
    suffixes = ("_prompt_clip_score", "_A_clip_score")
    assert read(tmp_path, "shards", score_suffixes=suffixes) == [
        [Caption(text="own", score=3.0), Caption(text="long caption", kind="A", score=12.0)]
    ]


def test_a_kind_never_leads_out_of_the_folder(tmp_path):
    write(tmp_path, "folder")
    (tmp_path / "a_0_A.json").write_text('{"a_0": {"../A": "by A"}}')
    outcome = score(tmp_path, lengths)
    assert outcome.written == 5 and "no file can be named after" in next(iter(outcome.bad.values()))
    assert len(list(tmp_path.parent.glob("*.json"))) == 0


def test_names_of_kinds():
    assert kind_of("Qwen/Qwen2.5-VL-3B-Instruct") == "Qwen2.5-VL-3B-Instruct"
    assert kind_of("models/my model/") == "my-model"
    for kind in ("prompt", "A_clip_score", "../A", "", "a b"):
        with pytest.raises(ValueError, match="is no name for a kind"):
            check_kind(kind)


def test_wrong_folders(tmp_path):
    with pytest.raises(ValueError, match="no such folder"):
        open_samples(tmp_path / "nowhere", [])
    with pytest.raises(ValueError, match="no picture"):
        open_samples(tmp_path, [])
    (tmp_path / "state.json").write_text("{}")
    with pytest.raises(ValueError, match="is a Hugging Face data set"):
        open_samples(tmp_path, [])
