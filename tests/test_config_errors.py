"""What a config may not say, and how it is said: one line that names the key, the file, and what it got."""

import functools

import pytest

from sana.config import ConfigError, SanaConfig, load_config, parse_overrides
from tests.config_helpers import error_of, leaves_of, write_yaml


@pytest.fixture
def write(tmp_path):
    return functools.partial(write_yaml, tmp_path)


# ---- errors ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("model: {qknorm: true}", "unknown key model.qknorm; did you mean model.qk_norm?"),
        ("model: {flow_shift: 3.0}", "unknown key model.flow_shift; did you mean scheduler.flow_shift?"),
        ("modle: {qk_norm: true}", "unknown key modle; did you mean model?"),
        ("seed: 1", "unknown key seed; did you mean train.seed?"),
        (
            "train: {optimizer: {type: AdamW, lrr: 1.0}}",
            "unknown key train.optimizer.lrr; did you mean train.optimizer.lr?",
        ),
        ("model: {resume_from: {chekpoint: a}}", "did you mean model.resume_from.checkpoint?"),
        ("train: {num_epochs: 1.7}", "train.num_epochs: expected an integer, got 1.7 (a number)"),
        ("train: {num_epochs: 2.0}", "train.num_epochs: expected an integer, got 2.0 (a number)"),
        ("train: {num_epochs: true}", "train.num_epochs: expected an integer, got true (a boolean)"),
        ("train: {gradient_clip: true}", "train.gradient_clip: expected a number, got true (a boolean)"),
        ("train: {gradient_clip: '1'}", "train.gradient_clip: expected a number, got '1' (a text)"),
        ("model: {qk_norm: nope}", "model.qk_norm: expected true or false, got 'nope' (a text)"),
        ("model: {qk_norm: 1}", "model.qk_norm: expected true or false, got 1 (an integer)"),
        ("model: {qk_norm: yes}", "model.qk_norm: expected true or false, got 'yes' (a text)"),
        ("model: {model: }", "model.model: expected a text, got null"),
        ("model: {load_from: 3}", "model.load_from: expected a text or null, got 3 (an integer)"),
        ("train: {max_steps: 1e3}", "train.max_steps: expected an integer or null, got 1000.0 (a number)"),
        ("data: {data_dir: a}", "data.data_dir: expected a list of texts like \"[a,b]\", got 'a' (a text)"),
        ("data: {data_dir: [1]}", "data.data_dir: expected a list of texts"),
        ("data: {image_size: [512]}", "data.image_size: expected an integer or null, got [512] (a list)"),
        ("model: {pag_applied_layers: [8.5]}", "model.pag_applied_layers: expected a list of integers"),
        ("train: {optimizer: AdamW}", "train.optimizer: expected a mapping, got 'AdamW' (a text)"),
        (
            "train: {optimizer: {type: AdamW, lr: fast}}",
            "train.optimizer.lr: expected a number, got 'fast' (a text)",
        ),
        (
            "train: {optimizer: {type: AdamW, lr: 1, eps: [a]}}",
            "train.optimizer.eps: expected a number or a list of numbers",
        ),
        (
            "data: {caption_proportion: {prompt: 0.5}}",
            "data.caption_proportion: expected a mapping of integers",
        ),
        ("train: [1]", "train: expected a section of settings, got [1] (a list)"),
        ("model: {resume_from: true}", "model.resume_from.checkpoint: expected a text or null, got true"),
        ("- a", "expected a mapping of sections, got list"),
        ("base: missing.yaml", "base: no such file: "),
        ("base: [a]", "base: expected the path of a YAML file, got ['a'] (a list)"),
        ("base: .", "base: no such file: "),
        ("model: {a: [}", ":1:13: not valid YAML: expected the node content"),
        ("model:\n  qk_norm: true\n  qk_norm: false", ":2:3: not valid YAML: key 'qk_norm' stands twice"),
        ("name: !!python/object:os.system x", "not valid YAML: could not determine a constructor"),
        ("name: \x07", "not valid YAML"),
    ],
)
def test_faults_are_named_in_one_line(write, text, message):
    path = write(text)
    error = error_of(path)
    assert error.startswith(str(path))
    assert message in error


def test_a_fault_in_a_base_names_the_base(write):
    base = write("model: {qknorm: true}", "base.yaml")
    assert error_of(write("base: base.yaml")).startswith(str(base))


def test_unreadable_files(tmp_path):
    assert "no such file" in error_of(tmp_path / "missing.yaml")
    assert "cannot read the config file" in error_of(tmp_path)
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00")
    assert "not UTF-8" in error_of(tmp_path / "binary.yaml")


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("model.mixed_precision=fp8", "model.mixed_precision: expected fp16 or bf16 or fp32, got fp8"),
        ("model.attn_type=flash", "model.attn_type: expected linear or triton_linear, got flash"),
        ("model.ffn_type=mlp", "model.ffn_type: expected glumbconv, got mlp"),
        ("model.ffn_type=triton_mbconvpreglu", "triton_mbconvpreglu is another architecture"),
        ("model.kernels=cuda", "model.kernels: expected null or auto or torch or triton, got cuda"),
        (
            "model.mlp_acts=[silu, null, silu]",
            "model.mlp_acts: expected [silu, silu, null], got [silu, null, silu]",
        ),
        (
            "model.guidance_type=magic",
            "model.guidance_type: expected classifier-free or classifier-free_PAG, got magic",
        ),
        ("vae.vae_type=AutoencoderKL", "vae.vae_type: expected AutoencoderDC"),
        ("scheduler.predict_flow_v=false", "scheduler.predict_flow_v: expected true, got false"),
        ("scheduler.pred_sigma=true", "scheduler.pred_sigma: expected false, got true"),
        ("scheduler.flow_shift=0", "scheduler.flow_shift: expected a number above 0, got 0.0"),
        ("scheduler.flow_shift=.nan", "scheduler.flow_shift: expected a number above 0, got nan"),
        ("scheduler.flow_shift=.inf", "scheduler.flow_shift: expected a number above 0, got inf"),
        ("scheduler.inference_flow_shift=-1", "scheduler.inference_flow_shift: expected a number above 0"),
        (
            "scheduler.weighting_scheme=logit",
            "scheduler.weighting_scheme: expected logit_normal or uniform or null",
        ),
        (
            "scheduler.weighting_scheme=logit_normal_trigflow",
            "scheduler.weighting_scheme: logit_normal_trigflow belongs to",
        ),
        (
            "scheduler.vis_sampler=scm",
            "scheduler.vis_sampler: scm belongs to Sprint models (SanaMSCM_...), model.model is",
        ),
        (
            "model.cfg_embed=true",
            "model.cfg_embed: true belongs to Sprint models (SanaMSCM_...), model.model is",
        ),
        ("model.cfg_embed_scale=0", "model.cfg_embed_scale: expected a number above 0, got 0.0"),
        (
            "scheduler.timestep_norm_scale_factor=0",
            "scheduler.timestep_norm_scale_factor: expected a number above 0, got 0.0",
        ),
        ("model.class_dropout_prob=1.5", "model.class_dropout_prob: expected a number from 0 to 1, got 1.5"),
        ("train.seed=-1", "train.seed: expected a number of at least 0, got -1"),
        ("train.max_steps=0", "train.max_steps: expected a number above 0, got 0"),
        ("data.image_size=1024", "data.image_size: 1024 differs from model.image_size, 512"),
        ("model.image_size=500", "model.image_size: 500 is not a multiple of vae.vae_downsample_rate, 32"),
        (
            "model.image_size=640",
            "model.multi_scale: no bucket table for image_size 640, only for 256, 512, 1024, 2048",
        ),
        ("model.aspect_ratio_type=ASPECT", "model.aspect_ratio_type: expected one of ASPECT_RATIO_256, "),
        ("model.pag_applied_layers=[-1]", "model.pag_applied_layers: block indices start at 0, got [-1]"),
        ("text_encoder.model_max_length=1", "text_encoder.model_max_length: expected at least 2"),
        ("train.optimizer={type: AdamW}", "train.optimizer.lr: is missing"),
        ("train.optimizer={lr: 1}", "train.optimizer.type: is missing"),
        ("train.optimizer.lr=0", "train.optimizer.lr: expected a number above 0, got 0"),
        ("train.optimizer.type=CAMEWrapper", "train.optimizer.eps: CAMEWrapper takes two numbers, got 1e-10"),
        (
            "train.optimizer.betas=[0.9,0.9,0.9]",
            "train.optimizer.betas: AdamW takes two numbers, got [0.9, 0.9, 0.9]",
        ),
        ("train.auto_lr.rule=cube", "train.auto_lr.rule: expected sqrt or linear"),
        (
            "train.auto_lr={}",
            "train.auto_lr.rule: expected sqrt or linear (or train.auto_lr: null), got null",
        ),
        ("train.lr_schedule_args.num_warmup_steps=-1", "train.lr_schedule_args.num_warmup_steps: expected"),
        (
            "train.lr_schedule=warp",
            "train.lr_schedule: expected constant or cosine or cosine_decay_to_constant, got warp",
        ),
    ],
)
def test_runs_that_cannot_be_are_refused(write, override, message):
    path = write("")
    assert error_of(path, [override]).startswith(f"{path}: ")
    assert message in error_of(path, [override])


# ---- overrides -------------------------------------------------------------------------------------------------------


def test_override_words():
    words = ["--a.b=c", "d=e=f", "--g", "h", "--i", "-1", "--j=", "--k=--l", "--m.n-o=p q"]
    pairs = [("a.b", "c"), ("d", "e=f"), ("g", "h"), ("i", "-1"), ("j", ""), ("k", "--l"), ("m.n-o", "p q")]
    assert parse_overrides(words) == pairs
    assert parse_overrides([]) == []


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["a.b"], "command line: expected --key=value, got 'a.b'"),
        (["-a=b"], "expected --key=value, got '-a=b'"),
        (["--=b"], "expected --key=value, got '--=b'"),
        (["--a..b=c"], "expected --key=value"),
        (["--a.b"], "command line: --a.b has no value; write --a.b=VALUE"),
        (["--debug", "--name=x"], "--debug has no value"),
    ],
)
def test_words_that_are_no_overrides(words, message):
    with pytest.raises(ConfigError) as error:
        parse_overrides(words)
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("words", "key", "value"),
    [
        (["--model.multi_scale=false"], "model.multi_scale", False),
        (["model.qk_norm=true"], "model.qk_norm", True),
        (["--train.seed", "7"], "train.seed", 7),
        (["--scheduler.flow_shift", "3"], "scheduler.flow_shift", 3.0),
        (["--scheduler.logit_mean", "-0.5"], "scheduler.logit_mean", -0.5),
        (["--data.data_dir=[a,b/c]"], "data.data_dir", ("a", "b/c")),
        (["--data.data_dir=[asset/example_data]"], "data.data_dir", ("asset/example_data",)),
        (["--data.data_dir=[]"], "data.data_dir", ()),
        (["--work_dir=output/x y"], "work_dir", "output/x y"),
        (["--train.work_dir=output/x"], "work_dir", "output/x"),
        (["--name=1e-5"], "name", "1e-5"),
        (["--name=2: 3 # [x"], "name", "2: 3 # [x"),
        (["--name='null'"], "name", "null"),
        (["--name="], "name", ""),
        (["--model.load_from=hf://a/b/c.pth"], "model.load_from", "hf://a/b/c.pth"),
        (["--model.load_from=a", "--model.load_from="], "model.load_from", None),
        (["--model.load_from=a", "--model.load_from=null"], "model.load_from", None),
        (["--load_from=a"], "model.load_from", "a"),
        (["--load_from=a", "--load_from="], "model.load_from", None),
        (["--resume_from=latest"], "model.resume_from.checkpoint", "latest"),
        (["--model.resume_from=latest"], "model.resume_from.checkpoint", "latest"),
        (["--model.resume_from.checkpoint=latest"], "model.resume_from.checkpoint", "latest"),
        (["--train.auto_lr=null"], "train.auto_lr", None),
        (["--train.auto_lr=", "--train.auto_lr.rule=linear"], "train.auto_lr", {"rule": "linear"}),
        (["--train.max_steps=10", "--train.max_steps=20"], "train.max_steps", 20),
        (["--data.caption_proportion.VILA1.5-x=2"], "data.caption_proportion", {"prompt": 1, "VILA1.5-x": 2}),
        (["--train.gradient_clip=.inf"], "train.gradient_clip", float("inf")),
        (["--train={seed: 5}"], "train.seed", 5),
    ],
)
def test_overrides(write, words, key, value):
    found = leaves_of(load_config(write(""), words))[key]
    assert found == value
    assert type(found) is type(value)


def test_an_override_into_a_mapping_keeps_its_other_entries(write):
    path = write("train: {optimizer: {type: Lion, lr: 1.0, betas: [0.9, 0.99]}}")
    optimizer = load_config(
        path, ["--train.optimizer.lr=1e-5", "--train.optimizer.betas=[0.8,0.9]"]
    ).train.optimizer
    assert optimizer == {"type": "Lion", "lr": 1e-5, "betas": [0.8, 0.9]}
    assert SanaConfig().train.optimizer["lr"] == 1e-4


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("--model.qknorm=true", "command line: unknown key model.qknorm; did you mean model.qk_norm?"),
        (
            "--train.optimizer.lrr=1",
            "command line: unknown key train.optimizer.lrr; did you mean train.optimizer.lr?",
        ),
        ("--train.seed.x=1", "command line: unknown key train.seed.x; did you mean train.seed?"),
        ("--train.seed=x", "command line: train.seed: expected an integer, got 'x' (a text)"),
        ("--train.seed=", "command line: train.seed: expected an integer, got null"),
        (
            "--data.data_dir=a",
            "command line: data.data_dir: expected a list of texts like \"[a,b]\", got 'a' (a text)",
        ),
        (
            "--train.optimizer.betas=0.9",
            "command line: train.optimizer.betas: expected a list of numbers, got 0.9",
        ),
        ("--train.optimizer.lr={", "command line: train.optimizer.lr:1:2: not valid YAML"),
        ("--base=x.yaml", "command line: unknown key base"),
    ],
)
def test_faulty_overrides(write, word, message):
    assert message in error_of(write(""), [word])
