"""How the inference command makes its memory plan from the flags: sizes, batch, limit, and what is refused."""

from argparse import Namespace

import pytest

from sana.config import load_config
from sana.data.prompts import Prompt
from sana.inference import make_memory_plan
from sana.runtime import plan
from sana.runtime.plan import Setting
from tests.factories import write_model


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("model"))


def flags(**changes) -> Namespace:
    given = {
        "device": "cpu",
        "dtype": None,
        "bs": 2,
        "num_images_per_prompt": 1,
        "quantize": None,
        "offload": None,
    }
    return Namespace(**given | {"max_memory_gb": None, "compile": False, "lora": []} | changes)


def test_the_largest_of_the_prompts_counts(config, monkeypatch):
    prompts = [Prompt(text="a red circle --ar 1:2"), Prompt(text="a star --hw 512:512", index=1)]
    loaded = load_config(config)
    chosen = make_memory_plan(loaded, flags(), prompts, (None, None))
    assert chosen.setting == Setting(size=(256, 256), enlarged=(512, 512), batch=2)
    with pytest.raises(
        ValueError,
        match="256 x 256, enlarged to 90000 x 90000, .* does not fit .* what fits: 256 x 256, 1 at",
    ):
        make_memory_plan(loaded, flags(), [Prompt(text="a star")], (90000, 90000))
    one = make_memory_plan(loaded, flags(bs=64), prompts[:1], (None, None))
    assert one.setting.batch == 1 and one.setting.size != (256, 256)  # no more at once than there are
    with pytest.raises(ValueError, match="GiB are taken before anything is loaded"):
        make_memory_plan(loaded, flags(max_memory_gb=0.1), prompts, (None, None))
    with pytest.raises(ValueError, match="--max_memory_gb must be above 0, got nan"):
        make_memory_plan(loaded, flags(max_memory_gb=float("nan")), prompts, (None, None))
    monkeypatch.setattr(plan, "available", lambda device: 2**26)
    for more in (None, 1000.0, float("inf")):  # what is not there cannot be given
        with pytest.raises(ValueError, match="does not fit into 0.06 GiB"):
            make_memory_plan(loaded, flags(max_memory_gb=more), prompts, (256, 256))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"offload": "often"}, "unknown offload 'often'"),
        ({"offload": "model", "compile": True}, "compile needs a transformer that stays where it is"),
        ({"offload": "sequential", "quantize": "text_encoder=int8"}, "use offload model with quantize"),
        ({"lora": ["a"], "quantize": "transformer=int8"}, "--lora is added into weights"),
        ({"lora": ["a"], "offload": "sequential"}, "--lora is added into weights"),
        ({"quantize": "transformer=int3"}, "expected PART=KIND"),
    ],
)
def test_flags_that_do_not_go_together_are_refused_first(config, monkeypatch, changes, message):
    monkeypatch.setattr("sana.inference.make_outline", lambda *_: pytest.fail("something was read"))
    with pytest.raises(ValueError, match=message):
        make_memory_plan(load_config(config), flags(**changes), [Prompt(text="a")], (None, None))
