import json

import pytest

from sana.data.prompts import Prompt, read_json, read_txt
from sana.utils.hub import ROOT


def test_txt_keeps_line_numbers(tmp_path):
    path = tmp_path / "p.txt"
    path.write_bytes(b"\xef\xbb\xbf  a red circle \r\n\r\nthree \xe2\x98\x83\xe2\x80\xa8stars\n\n\n")
    assert [(prompt.index, prompt.text) for prompt in read_txt(path)] == [
        (0, "a red circle"),
        (1, ""),
        (2, "three \u2603\u2028stars"),  # U+2028 ends a line for str.splitlines, not for an editor
    ]


def test_json_keeps_order_keys_and_text(tmp_path):
    path = tmp_path / "p.json"
    entries = {"b": {"prompt": "two\nlines", "category": "x"}, "a/ü": {"prompt": ""}}
    path.write_text(json.dumps(entries), encoding="utf-8")
    assert read_json(path) == [
        Prompt(index=0, text="two\nlines", key="b"),
        Prompt(index=1, text="", key="a/ü"),
    ]


def test_half_a_character_is_refused():
    with pytest.raises(ValueError, match=r"half of a character .* in 'half \\ud83e a fox'"):
        Prompt(text="half \ud83e a fox")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "holds no prompt"),
        (b" \n\n", "holds no prompt"),
        (b"\xff\xfe", "not UTF-8 text"),
    ],
)
def test_bad_txt(tmp_path, content, message):
    path = tmp_path / "bad.txt"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=message) as caught:
        read_txt(path)
    assert "bad.txt" in str(caught.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{\n"a": {"prompt": "x"},\n"b" {}\n}', "line 3, column 5: not valid JSON"),
        ("{}", "holds no prompt"),
        ('["a"]', "not of the form"),
        ('{"a": "x"}', "the entry 'a' is not of the form"),
        ('{"a": {"prompt": 3}}', "the entry 'a' is not of the form"),
        ('{"a": {"prompt": "x"}, "a": {"prompt": "y"}}', "the id 'a' is there twice"),
        ('{"a": {"prompt": "\\ud83e"}}', "entry 'a': half of a character"),
    ],
)
def test_bad_json(tmp_path, content, message):
    path = tmp_path / "bad.json"
    path.write_text(content, encoding="utf-8")
    with pytest.raises(ValueError, match=message) as caught:
        read_json(path)
    assert "bad.json" in str(caught.value)


def test_missing_and_unreadable_files(tmp_path):
    with pytest.raises(ValueError, match="cannot read .*none.txt: No such file"):
        read_txt(tmp_path / "none.txt")
    with pytest.raises(ValueError, match="cannot read .*: Is a directory"):
        read_json(tmp_path)


def test_shipped_prompt_files():
    txt, entries = read_txt(ROOT / "asset/samples_mini.txt"), read_json(ROOT / "asset/samples_mini.json")
    for prompts in (txt, entries):
        assert len(prompts) == 8
        assert len({prompt.text for prompt in prompts}) == 8
