"""`scripts/verify.py` passes on a sound model, and each kind of damage fails in its own line of the table."""

import copy
import dataclasses
import json
import shutil

import pytest
import torch

from sana.diffusion.solvers import SOLVERS, flow_euler
from sana.evaluation import goldens, solvers, verify
from sana.evaluation.checks import FAIL, PASS, SKIP, check_layers, layer_ranges, relative_rms
from sana.models.autoencoder import Autoencoder
from sana.models.state_dict import load_transformer_state, to_diffusers
from sana.pipeline import SanaPipeline
from sana.utils import hub
from scripts.verify import make_parser, run
from tests.factories import make_autoencoder, write_model
from tests.models.twin import build
from tests.models.twin import inputs as twin_inputs
from tests.numerics import assert_close

AUTOENCODER = "asset/sana_tiny/autoencoder"  # a trained one: a random one fails the round trip, as it should

pytestmark = pytest.mark.filterwarnings(
    "ignore:__array__ implementation doesn't accept a copy:DeprecationWarning"  # diffusers' scheduler under numpy 2
)


@pytest.fixture(scope="module")
def config_path(tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("model"), vae={"vae_pretrained": AUTOENCODER})


@pytest.fixture(scope="module")
def pipeline(config_path):
    return SanaPipeline(config_path, device="cpu")


@pytest.fixture(scope="module")
def state(pipeline):
    return to_diffusers(load_transformer_state(pipeline.weights))


@pytest.fixture(scope="module")
def inputs(pipeline):
    return verify.make_inputs(pipeline)


@pytest.fixture(scope="module")
def reference(pipeline, state, inputs):
    return verify.run_twin(pipeline.transformer, state, inputs, torch.float32)


@pytest.fixture(scope="module")
def known(pipeline):
    """Goldens of every part, but of the picture, made by the sound model."""
    made = goldens.Goldens(None, verify.weight_hashes(pipeline))
    checks = [
        *verify.check_autoencoder(pipeline, made),
        *verify.check_text(pipeline, made),
        *verify.check_transformer(
            pipeline, torch.float32, {}, verify.make_inputs(pipeline), None, made, own=True
        ),
    ]
    entries = [check for check in checks if isinstance(check, goldens.Entry)]
    assert [entry.part for entry in entries] == ["autoencoder", "text encoder", "transformer"]
    return goldens.Goldens(entries, made.weights)


def damaged(pipeline, part, change):
    """The pipeline with a copy of one part changed in memory; its files are sound."""
    broken = copy.copy(pipeline)
    setattr(broken, part, copy.deepcopy(getattr(pipeline, part)))
    with torch.no_grad():
        change(getattr(broken, part))
    return broken


def statuses(checks):
    return {check.name: check.status for check in checks}


def command(*words):
    parser = make_parser()
    return run(*parser.parse_known_args([str(word) for word in words]))


# The whole program


def test_a_sound_model_passes_and_changed_goldens_do_not(config_path, tmp_path, capsys):
    arguments = ("--config", config_path, "--goldens", tmp_path, "--device", "cpu")
    command(*arguments, "--update", "--json", tmp_path / "report" / "update.json")
    shown = capsys.readouterr().out
    report = json.loads((tmp_path / "report" / "update.json").read_text())
    assert (report["metric"], report["values"]["failed"], report["values"]["skipped"]) == (
        "verification",
        0,
        1,
    )
    rows = report["values"]["checks"]
    assert rows["transformer: layers (float16 cpu)"]["status"] == SKIP
    assert rows["transformer: diffusers (bfloat16 cpu)"]["status"] == PASS
    assert len(rows["transformer: layers (bfloat16 cpu)"]["max_abs"]) == 8
    assert set(report["weights"]) == {"transformer", "autoencoder", "text_encoder"}
    [file] = tmp_path.glob("transformer-*.json")
    assert f"4 goldens in {file}" in shown
    assert file.stat().st_size < 20_000

    command(*arguments, "--dtype=fp32")
    shown = capsys.readouterr().out
    assert "15 PASS, 0 FAIL, 0 SKIP" in shown, shown

    stored = json.loads(file.read_text())
    [entry] = [entry for entry in stored["entries"] if entry["part"] == "pipeline"]
    entry["fingerprints"]["pixels"]["samples"][5] += 0.01
    file.write_text(json.dumps(stored))
    with pytest.raises(SystemExit) as failure:
        command(*arguments, "--dtype=fp32")
    shown = capsys.readouterr().out
    assert failure.value.code == 1
    assert "14 PASS, 1 FAIL, 0 SKIP" in shown
    assert "pipeline, golden (float32 cpu): The weights are those of the golden" in shown


def test_nothing_is_stored_when_a_check_fails(config_path, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(verify, "MIN_PSNR", 99.0)
    arguments = ("--config", config_path, "--goldens", tmp_path / "goldens", "--device=cpu", "--dtype=fp32")
    with pytest.raises(SystemExit) as failure:
        command(*arguments, "--update")
    assert failure.value.code == 1
    assert (
        "autoencoder, round trip (float32 cpu): Encoder and decoder do not belong together"
        in capsys.readouterr().out
    )
    assert not (tmp_path / "goldens").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--config", "no_such.yaml"], "no_such.yaml"),
        (["--model.load_from="], "no weights to check"),
        (["--dtype", "fp32,fp99"], "unknown dtype 'fp99'"),
        (["--device", "gpu"], "no device 'gpu' here"),
    ],
)
def test_bad_input_is_an_error_of_one_line(config_path, arguments, message, monkeypatch):
    for name in ("check_solver", "check_autoencoder", "check_text", "check_picture", "check_transformer"):
        monkeypatch.setattr(verify, name, lambda *args, **kwargs: iter(()))
    if "--config" not in arguments:
        arguments = ["--config", config_path, *arguments]
    with pytest.raises(ValueError, match=message) as error:
        command(*arguments)
    assert "\n" not in str(error.value)


def test_a_type_that_the_loader_refuses_is_skipped_unless_asked_for(pipeline, monkeypatch):
    for name in ("check_solver", "check_autoencoder", "check_text", "check_picture", "check_transformer"):
        monkeypatch.setattr(verify, name, lambda *args, **kwargs: iter(()))

    def load(dtype):
        if dtype == "bf16":
            raise ValueError("these weights\nare for fp16")
        return pipeline

    def read(path):
        return to_diffusers(load_transformer_state(path))

    weights, *skipped = verify.verify(load, read, None, goldens=goldens.Goldens([]))
    assert weights.status == PASS
    assert [(check.where, check.status, check.found) for check in skipped][0] == (
        "bfloat16 cpu",
        SKIP,
        "these weights are for fp16",
    )
    assert len(skipped) == 2
    with pytest.raises(ValueError, match="are for fp16"):
        list(verify.verify(load, read, ["fp32", "bf16"], goldens=goldens.Goldens([])))


# The transformer


def test_one_damaged_weight_fails_against_diffusers_and_the_golden(pipeline, state, inputs, reference, known):
    def check(subject):
        return statuses(
            verify.check_transformer(subject, torch.float32, state, inputs, reference, known, own=True)
        )

    def flip(transformer):
        transformer.blocks[3].mlp.point_conv.conv.weight[:8].neg_()

    assert check(pipeline) == {"layers": PASS, "diffusers": PASS, "golden": PASS}
    broken = damaged(pipeline, "transformer", flip)
    assert check(broken) == {"layers": PASS, "diffusers": FAIL, "golden": FAIL}


def test_a_wrong_type_fails(config_path, pipeline, state, inputs, reference, known):
    def check(subject, **settings):
        settings = {"own": True} | settings
        return list(
            verify.check_transformer(subject, torch.bfloat16, state, inputs, reference, known, **settings)
        )

    def quantise(transformer):
        for parameter in transformer.parameters():
            parameter.copy_(parameter.to(torch.float8_e4m3fn))

    def overflow(transformer):
        transformer.blocks[2].cross_attn.proj.weight.fill_(3e38)

    half = SanaPipeline(config_path, device="cpu", dtype="bf16")
    assert statuses(check(half)) == {"layers": PASS, "diffusers": PASS}
    assert statuses(check(damaged(half, "transformer", quantise))) == {"layers": PASS, "diffusers": FAIL}
    assert statuses(check(pipeline)) == {"layers": PASS, "type": FAIL}  # float32 where bfloat16 was asked for

    broken = damaged(half, "transformer", overflow)
    layers, diffusers = check(broken)
    assert (layers.status, layers.found) == (FAIL, "not finite, first in blocks.2.cross_attn.proj")
    assert layers.values["max_abs"]["blocks.1"] > 0
    assert layers.values["max_abs"]["blocks.2"] is None
    assert diffusers.status == FAIL
    [skipped] = check(broken, own=False)
    assert skipped.status == SKIP
    assert "blocks.2.cross_attn.proj" in skipped.found


def test_a_model_that_diffusers_lacks_is_skipped(pipeline, state, inputs):
    def change(transformer):
        transformer.config = dataclasses.replace(transformer.config, qk_norm=True)

    odd = damaged(pipeline, "transformer", change)
    assert verify.run_twin(odd.transformer, state, inputs, torch.float32) is None
    checks = verify.check_transformer(odd, torch.float32, state, inputs, None, goldens.Goldens([]), own=True)
    assert statuses(checks)["diffusers"] == SKIP


@pytest.mark.parametrize(
    "overrides",
    [
        {"patch_size": 2, "use_pe": True, "pe_base_size": 3, "pe_interpolation": 2.0},
        {"qk_norm": True, "cross_norm": True, "use_pe": True},
        {"qk_norm": True, "cross_norm": True, "cfg_embed": True, "timestep_norm_scale_factor": 1000.0},
    ],
    ids=["patches", "norms", "sprint"],
)
def test_the_twin_has_every_architecture(overrides):
    model = build(**overrides)
    with torch.no_grad():
        for block in model.blocks:  # small queries, so that the eps of their norm counts
            block.cross_attn.q_linear.weight.mul_(0.01)
            block.cross_attn.q_linear.bias.mul_(0.01)
    arguments = twin_inputs(model.config)
    reference = verify.run_twin(model, to_diffusers(model.state_dict()), arguments, torch.float32)
    assert_close("velocity", verify.run(model, arguments), reference, rel_rms=2e-6)  # measured: at most 2e-7


def test_the_twin_clips_as_weights_of_the_float16_era_need():
    models = {clamp: build(clamp_attention=clamp) for clamp in (False, True)}
    for model in models.values():
        with torch.no_grad():
            model.blocks[0].attn.proj.weight.mul_(1e6)
    arguments, state = twin_inputs(models[True].config), to_diffusers(models[True].state_dict())
    velocity = verify.run(models[True], arguments)
    clipped, free = (
        verify.run_twin(models[clamp], state, arguments, torch.float32) for clamp in (True, False)
    )
    assert_close("velocity", velocity, clipped, rel_rms=1e-4)  # measured 3e-5: activations are near 65504
    assert relative_rms(velocity, free) > 0.1


def test_weights_that_are_not_finite_in_the_file(pipeline, state):
    assert verify.check_weights(pipeline, state).status == PASS
    name = "transformer_blocks.1.attn1.to_q.weight"
    bad = state | {name: torch.full_like(state[name], torch.inf)}
    check = verify.check_weights(pipeline, bad)
    assert (check.status, check.found) == (FAIL, f"not finite: {name}")


def test_layer_ranges_are_the_largest_values():
    model = torch.nn.Sequential(torch.nn.Identity(), torch.nn.ReLU())
    ranges, result = layer_ranges(model, lambda: [model(torch.tensor([value])) for value in (-3.0, 2.0)])
    assert (ranges, [x.item() for x in result]) == ({"0": 3.0, "1": 2.0}, [0.0, 2.0])
    assert not model[0]._forward_hooks
    check = check_layers({"blocks.0": 655.04, "head": 2.0}, torch.float16, part="transformer", where="here")
    assert (check.status, check.found) == (PASS, "max |x| 655 in blocks.0, headroom 1.0e+02x")


# The other parts


def test_autoencoder_scale(pipeline, known):
    assert statuses(verify.check_autoencoder(pipeline, known)) == dict.fromkeys(
        ("layers", "scale", "round trip", "golden"), PASS
    )

    def forget(autoencoder):
        autoencoder.model.register_to_config(scaling_factor=1.0)

    found = statuses(verify.check_autoencoder(damaged(pipeline, "autoencoder", forget), known))
    assert found == {"layers": PASS, "scale": FAIL, "round trip": PASS, "golden": FAIL}


def test_autoencoder_whose_files_are_wrong(pipeline, tmp_path):
    """Code and files agree with each other, so only the pictures tell; and their hash is of no golden."""
    folder = shutil.copytree(AUTOENCODER, tmp_path / "autoencoder")
    settings = json.loads((folder / "config.json").read_text())
    settings["scaling_factor"] *= 5
    (folder / "config.json").write_text(json.dumps(settings))
    other = copy.copy(pipeline)
    other.autoencoder = Autoencoder.from_pretrained(folder)
    vae = dataclasses.replace(pipeline.config.vae, vae_pretrained=str(folder))
    other.config = dataclasses.replace(pipeline.config, vae=vae)
    checks = list(verify.check_autoencoder(other, goldens.Goldens([], verify.weight_hashes(other))))
    assert statuses(checks) == {"layers": PASS, "scale": FAIL, "round trip": PASS, "golden": SKIP}
    assert "no golden is stored for these weights" in checks[-1].found

    random = copy.copy(pipeline)
    random.autoencoder = Autoencoder(make_autoencoder())
    [check] = [
        check for check in verify.check_autoencoder(random, goldens.Goldens([])) if check.name == "round trip"
    ]
    assert check.status == FAIL


def test_text_encoder(pipeline, known):
    def check(change):
        return statuses(verify.check_text(damaged(pipeline, "text_encoder", change), known))

    def other_instruction(encoder):
        encoder.chi = "Describe:\n" + encoder.chi

    def other_weight(encoder):
        encoder.model.layers[1].mlp.up_proj.weight[:8].neg_()

    def overflow(encoder):
        encoder.model.layers[0].mlp.down_proj.weight.mul_(torch.inf)

    assert check(lambda encoder: None) == {"layers": PASS, "transformers": PASS, "golden": PASS}
    assert check(other_instruction) == {"layers": PASS, "transformers": FAIL, "golden": FAIL}
    assert check(other_weight) == {"layers": PASS, "transformers": FAIL, "golden": FAIL}
    assert check(overflow) == {"layers": FAIL, "transformers": FAIL, "golden": FAIL}


def test_parts_in_half_precision_are_not_held_against_goldens(pipeline, known):
    half = damaged(pipeline, "text_encoder", lambda encoder: encoder.model.bfloat16())
    layers, features, golden = verify.check_text(half, known)
    assert (layers.status, features.status, golden.status) == (PASS, PASS, SKIP)
    assert "the text encoder is not" in golden.found


def test_solver(monkeypatch):
    assert statuses(verify.check_solver("flow_dpm-solver", 3.0)) == {"published": PASS, "diffusers": PASS}
    schedule, solver = SOLVERS["flow_dpm-solver"]
    for broken in (
        (schedule, flow_euler),
        (lambda steps, shift: schedule(steps, 1.01 * shift), solver),
        (schedule, lambda velocity, *rest: solver(lambda x, t: velocity(x, t + 1e-3), *rest)),
    ):
        monkeypatch.setitem(SOLVERS, "flow_dpm-solver", broken)
        assert statuses(verify.check_solver("flow_dpm-solver", 3.0)) == {"published": FAIL, "diffusers": FAIL}


def test_solver_of_sprint(monkeypatch):
    assert statuses(verify.check_solver("scm", 1.0)) == {"diffusers": PASS}
    schedule = solvers.scm_schedule
    monkeypatch.setattr(solvers, "scm_schedule", lambda steps: schedule(steps, 1.57))
    assert statuses(verify.check_solver("scm", 1.0)) == {"diffusers": FAIL}


def test_a_picture_that_is_not_finite(pipeline, known):
    def spoil(transformer):
        transformer.final_layer.linear.bias.fill_(torch.nan)

    [check] = verify.check_picture(damaged(pipeline, "transformer", spoil), known)
    assert (check.name, check.status) == ("picture", FAIL)
    assert "latents of image(s) 0 are not finite" in check.found
    assert "--dtype" in check.advice


# Goldens


def test_a_fingerprint_sees_any_of_its_numbers_change():
    values = torch.randn(3, 5, 7, generator=torch.Generator().manual_seed(0))
    golden = goldens.Fingerprint.of(values)
    assert len(golden.samples) == goldens.SAMPLES
    assert goldens.Fingerprint.of(values.clone()).distance(golden) == 0
    assert goldens.Fingerprint.of(values + 0.01).distance(golden) == pytest.approx(0.01 / golden.rms)
    assert goldens.Fingerprint.of(1.01 * values).distance(golden) > 0.005
    assert goldens.Fingerprint.of(values.flatten()).distance(golden) == torch.inf
    spoilt = values.clone()
    spoilt[1, 2, 3] = torch.nan
    assert goldens.Fingerprint.of(spoilt).distance(golden) == torch.inf


def test_goldens_count_for_their_own_weights_only(tmp_path):
    fingerprints = {"velocity": goldens.Fingerprint.of(torch.arange(5.0))}
    entry = goldens.Entry(part="transformer", weights={"transformer": "ab"}, fingerprints=fingerprints)
    goldens.write(tmp_path / "some.json", [entry])
    stored = goldens.Goldens(goldens.read(tmp_path))
    assert stored.find("transformer", {"transformer": "ab"}) == entry
    assert stored.find("transformer", {"transformer": "cd"}) is None
    assert stored.find("autoencoder", {"transformer": "ab"}) is None
    assert goldens.read(tmp_path / "nowhere") == []


def test_the_stored_goldens_are_of_the_shipped_files():
    """New weights need new goldens: scripts/verify.py --update."""
    shipped = {
        "transformer": "transformer.safetensors",
        "autoencoder": "autoencoder",
        "text_encoder": "text_encoder",
    }
    shipped = {part: hub.sha256(hub.ROOT / "asset/sana_tiny" / file) for part, file in shipped.items()}
    entries = goldens.read(hub.ROOT / "asset/verify")
    assert {entry.part for entry in entries} == {"transformer", "autoencoder", "text encoder", "pipeline"}
    for entry in entries:
        assert entry.weights == {part: shipped[part] for part in entry.weights}, entry.part


def test_hashes_where_the_config_has_a_published_name(pipeline):
    """As every published config has: gemma-2-2b-it is no path."""
    named = copy.copy(pipeline)
    text = dataclasses.replace(pipeline.config.text_encoder, text_encoder_name="gemma-2-2b-it")
    named.config = dataclasses.replace(pipeline.config, text_encoder=text)
    assert verify.weight_hashes(named) == verify.weight_hashes(pipeline)
    assert len(set(verify.weight_hashes(pipeline).values())) == 3


@pytest.mark.parametrize("text", ["{", "[]", '{"entries": [{"part": "transformer"}]}'])
def test_a_file_that_is_not_of_goldens(tmp_path, text):
    (tmp_path / "bad.json").write_text(text)
    with pytest.raises(ValueError, match=r"bad.json does not hold goldens.*--update"):
        goldens.read(tmp_path)
