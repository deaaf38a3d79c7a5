"""The bucket tables are facts of the published models; the arithmetic on them is ours."""

import subprocess
import sys

import pytest

from sana.resolution import TABLES, nearest_bucket, parse_prompt_size, table_for

# As published: key, height x width.
ASPECT_RATIO_1024 = (
    "0.25 512x2048|0.26 512x1984|0.27 512x1920|0.28 512x1856|0.32 576x1792|0.33 576x1728|0.35 576x1664|0.4 640x1600|"
    "0.42 640x1536|0.48 704x1472|0.5 704x1408|0.52 704x1344|0.57 768x1344|0.6 768x1280|0.68 832x1216|0.72 832x1152|"
    "0.78 896x1152|0.82 896x1088|0.88 960x1088|0.94 960x1024|1.0 1024x1024|1.07 1024x960|1.13 1088x960|1.21 1088x896|"
    "1.29 1152x896|1.38 1152x832|1.46 1216x832|1.67 1280x768|1.75 1344x768|2.0 1408x704|2.09 1472x704|2.4 1536x640|"
    "2.5 1600x640|2.89 1664x576|3.0 1728x576|3.11 1792x576|3.62 1856x512|3.75 1920x512|3.88 1984x512|4.0 2048x512"
)
ASPECT_RATIO_2880 = (
    "0.25 1408x5760|0.26 1408x5568|0.27 1408x5376|0.28 1408x5184|0.32 1600x4992|0.33 1600x4800|0.34 1600x4672|"
    "0.4 1792x4480|0.42 1792x4288|0.47 1920x4096|0.49 1920x3904|0.51 1920x3776|0.55 2112x3840|0.59 2112x3584|"
    "0.68 2304x3392|0.72 2304x3200|0.78 2496x3200|0.83 2496x3008|0.89 2688x3008|0.93 2688x2880|1.0 2880x2880|"
    "1.07 2880x2688|1.12 3008x2688|1.21 3008x2496|1.28 3200x2496|1.39 3200x2304|1.47 3392x2304|1.7 3584x2112|"
    "1.82 3840x2112|2.03 3904x1920|2.13 4096x1920|2.39 4288x1792|2.5 4480x1792|2.92 4672x1600|3.0 4800x1600|"
    "3.12 4992x1600|3.68 5184x1408|3.82 5376x1408|3.95 5568x1408|4.0 5760x1408"
)
NOT_GENERATED = {  # keys of the training table that the _TEST table lacks
    256: {"0.26", "0.27", "2.89", "3.11", "3.62", "3.75", "3.88"},
    512: {"0.26", "0.27", "2.89", "3.11", "3.62", "3.75", "3.88"},
    1024: {"0.26", "0.27", "2.89", "3.11", "3.62", "3.75", "3.88"},
    2048: {"0.27", "0.28", "2.89", "3.11", "3.62", "3.75", "3.88"},
    2880: {"0.27", "0.28", "2.92", "3.12", "3.68", "3.82", "3.95"},
    4096: set(),
}


def _published(text):
    rows = [row.split() for row in text.split("|")]
    return {key: tuple(map(int, size.split("x"))) for key, size in rows}


@pytest.mark.parametrize(("name", "text"), [("1024", ASPECT_RATIO_1024), ("2880", ASPECT_RATIO_2880)])
def test_tables_are_the_published_ones(name, text):
    table = TABLES[f"ASPECT_RATIO_{name}"]
    assert list(table.items()) == list(_published(text).items())
    assert len(table) == 40


@pytest.mark.parametrize("size", [256, 512, 2048, 4096])
def test_other_tables_are_the_1024_table_scaled(size):
    expected = {
        key: (h * size / 1024, w * size / 1024) for key, (h, w) in TABLES["ASPECT_RATIO_1024"].items()
    }
    assert TABLES[f"ASPECT_RATIO_{size}"] == expected


def test_areas_of_the_1024_table():
    areas = [h * w for h, w in TABLES["ASPECT_RATIO_1024"].values()]
    assert (min(areas), max(areas)) == (946_176, 1_048_576)
    assert all(side % 64 == 0 for size in TABLES["ASPECT_RATIO_1024"].values() for side in size)


@pytest.mark.parametrize("size", NOT_GENERATED)
def test_generation_tables_leave_out_the_extreme_ratios(size):
    training, generation = table_for(size, training=True), table_for(size)
    assert set(training) - set(generation) == NOT_GENERATED[size]
    assert generation.items() <= training.items()
    assert len(generation) == (40 if size == 4096 else 33)


def test_2880_generation_table_has_2880_sizes_not_those_of_4096():
    """The published ASPECT_RATIO_2880_TEST holds the sizes of 4096."""
    areas = [h * w for h, w in table_for(2880).values()]
    assert max(areas) <= 2880 * 2880
    assert table_for(2880)["1.0"] == (2880, 2880)


@pytest.mark.parametrize("size", [768, 1280, 1536])
def test_sizes_that_are_generated_as_squares_only(size):
    assert table_for(size) == {"1.0": (size, size)}
    with pytest.raises(ValueError, match=f"training at {size}.*1024"):
        table_for(size, training=True)


def test_unknown_size_names_the_known_ones():
    with pytest.raises(
        ValueError, match=r"generation at 640 .*\[256, 512, 768, 1024, 1280, 1536, 2048, 2880, 4096\]"
    ):
        table_for(640)


@pytest.mark.parametrize("name", TABLES)
def test_every_bucket_is_its_own_nearest(name):
    # Three published 2880 keys are nearer to the size before theirs: 1408x5568 is 0.253, its key 0.26.
    misnamed = {"0.26": "0.25", "0.27": "0.26", "0.28": "0.27"} if name == "ASPECT_RATIO_2880" else {}
    misnamed = {"0.26": "0.25"} if name == "ASPECT_RATIO_2880_TEST" else misnamed
    table = TABLES[name]
    for key, (height, width) in table.items():
        nearest = misnamed.get(key, key)
        assert nearest_bucket(height, width, table) == (nearest, table[nearest])
        assert nearest_bucket(10 * height, 10 * width, table) == (nearest, table[nearest])


def test_nearest_bucket_goes_by_the_ratio_key():
    table = table_for(1024)
    assert nearest_bucket(9, 16, table) == ("0.57", (768, 1344))
    assert nearest_bucket(16, 9, table) == ("1.75", (1344, 768))
    assert nearest_bucket(1000, 1, table) == ("4.0", (2048, 512))
    # 1.035 lies between 1.0 and 1.07; 1.2 is nearer to 1.21 than to 1.13.
    assert nearest_bucket(1.03, 1, table)[0] == "1.0"
    assert nearest_bucket(1.2, 1, table)[0] == "1.21"
    assert nearest_bucket(1.5, 1, {"1.0": (1, 1), "2.0": (2, 1)})[0] == "1.0"  # a tie goes to the first


@pytest.mark.parametrize(("height", "width"), [(0, 10), (10, 0), (-1, 10), (float("nan"), 10)])
def test_nearest_bucket_refuses_sizes_that_are_not_positive(height, width):
    with pytest.raises(ValueError, match="must be positive"):
        nearest_bucket(height, width, table_for(1024))


@pytest.mark.parametrize(
    ("prompt", "rest", "size"),
    [
        ("a cat", "a cat", None),
        ("a cat --ar 9:16", "a cat", (768, 1344)),
        ("a cat --aspect_ratio 16:9", "a cat", (1344, 768)),
        ("a cat --ar=1:1", "a cat", (1024, 1024)),
        ("a cat --hw 768:1300", "a cat", (768, 1300)),
        ("a cat --ar 9:16, at night", "a cat at night", (768, 1344)),
        ("--ar 2:1 a cat", "a cat", (1408, 704)),
        ("an --arrow and a --arc", "an --arrow and a --arc", None),
        ("dash--ar 1:1", "dash--ar 1:1", None),
        ("", "", None),
    ],
)
def test_size_option_in_a_prompt(prompt, rest, size):
    assert parse_prompt_size(prompt, table_for(1024)) == (rest, size)


@pytest.mark.parametrize(
    "option", ["--ar", "--ar banana", "--ar 16x9", "--ar 0:1", "--hw 1:00", "--hw 1.5:1", "--ar -1:2"]
)
def test_size_option_without_two_positive_integers(option):
    with pytest.raises(ValueError, match=r"expected --(ar|hw) height:width"):
        parse_prompt_size(f"a cat {option}", table_for(1024))


def test_two_size_options():
    with pytest.raises(ValueError, match="2 size options"):
        parse_prompt_size("a cat --ar 1:1 --hw 512:512", table_for(1024))


def test_import_needs_no_torch():
    code = "import sys, sana.resolution; sys.exit('torch' in sys.modules or 'numpy' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
