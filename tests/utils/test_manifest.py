import json

import pytest

from sana.utils.manifest import Manifest


def write(manifest, *rows, rank=0):
    with manifest.part(rank) as part:
        for row in rows:
            part.add(row)


def test_rows_of_no_folder(tmp_path):
    manifest = Manifest(tmp_path / "none")
    assert manifest.rows() == {}
    manifest.merge()
    assert not (tmp_path / "none").exists()


def test_a_part_without_lines_writes_nothing(tmp_path):
    with Manifest(tmp_path / "none").part(0):
        pass
    assert not (tmp_path / "none").exists()


def test_parts_are_read_then_merged_in_order(tmp_path):
    manifest = Manifest(tmp_path)
    write(manifest, {"file": "a", "index": 0}, {"file": "c", "index": 2})
    write(manifest, {"file": "b", "index": 1, "prompt": "é\n🦊"}, rank=1)
    assert set(manifest.rows()) == {"a", "b", "c"}
    manifest.merge()
    assert [path.name for path in tmp_path.iterdir()] == ["manifest.jsonl"]
    lines = manifest.path.read_text(encoding="utf-8").splitlines()
    assert [json.loads(line)["file"] for line in lines] == ["a", "b", "c"]
    assert "é\\n🦊" in lines[1]
    before = manifest.path.read_bytes()
    write(manifest, {"file": "d", "index": 0})
    manifest.merge()
    assert manifest.path.read_bytes().startswith(before)
    assert list(manifest.rows()) == ["a", "b", "c", "d"]


def test_the_later_of_two_lines_counts(tmp_path):
    manifest = Manifest(tmp_path)
    write(manifest, {"file": "a", "seed": 1})
    manifest.merge()
    write(manifest, {"file": "a", "seed": 2})
    assert manifest.rows()["a"]["seed"] == 2
    manifest.merge()
    assert manifest.rows()["a"]["seed"] == 2


def test_the_part_of_a_process_at_work_is_left_alone(tmp_path):
    manifest = Manifest(tmp_path)
    with manifest.part(0) as part:
        part.add({"file": "a"})
        write(Manifest(tmp_path), {"file": "b"}, rank=1)
        Manifest(tmp_path).merge()
        assert [json.loads(line)["file"] for line in manifest.path.read_text().splitlines()] == ["b"]
        part.add({"file": "c"})
        assert set(manifest.rows()) == {"a", "b", "c"}
    manifest.merge()
    assert set(manifest.rows()) == {"a", "b", "c"}
    assert len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize("name", ["manifest.jsonl", "manifest.rank0-0.jsonl"])
def test_a_line_cut_short_by_a_kill_is_ignored(tmp_path, name):
    (tmp_path / name).write_bytes(b'{"file": "a"}\n{"file": "b", "pro')
    manifest = Manifest(tmp_path)
    assert set(manifest.rows()) == {"a"}
    write(manifest, {"file": "c"})
    manifest.merge()
    assert set(manifest.rows()) == {"a", "c"}
    assert manifest.path.read_bytes().count(b"\n") == 2


@pytest.mark.parametrize("line", [b"{half", b"[1]", b'{"index": 1}', b"\xff"])
def test_a_broken_line_is_named(tmp_path, line):
    (tmp_path / "manifest.jsonl").write_bytes(b'{"file": "a"}\n' + line + b"\n")
    with pytest.raises(ValueError, match=r"manifest\.jsonl, line 2 is not"):
        Manifest(tmp_path).rows()
