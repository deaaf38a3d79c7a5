"""Text encoding with Gemma's own tokenizer class, the published instruction and 300 tokens.

Two vocabularies: one trained here (SentencePiece-like BPE with byte fallback), and the real one of 32,000
pieces that the package mistral-common ships, where that is installed (`pip install --no-deps mistral-common`:
it asks for an older numpy). Gemma's is behind a licence. Both go through `GemmaTokenizer`, which decides what
happens to spaces.
"""

import importlib.util
from pathlib import Path

import pytest
import torch
import yaml
from diffusers import SanaPipeline
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import Gemma2ForCausalLM, GemmaTokenizer

from sana.models.text_encoder import TextEncoder, unconditional_mask
from sana.utils.hub import ROOT
from tests.factories import make_language_model
from tests.numerics import assert_close

LENGTH = 300
INSTRUCTION = yaml.safe_load((ROOT / "configs/sana_config/base.yaml").read_text())["text_encoder"][
    "chi_prompt"
]
CHI = "\n".join(INSTRUCTION)
CORPUS = (
    CHI,
    "a red cat",
    "two blue stars",
    "a кошка на окне",
    "an Été à Paris",
    "猫が好き",
    "一只红猫",
    "1 2 3 4 5 42",
)
LONG = ("a red cat and two blue stars, " * 334)[:10_000]
# Prompt -> whether the instruction's last space merges with what follows.
MERGES = {
    "a red cat": True,
    "кошка": True,
    "Été 😀 — and a cat\nin two lines": True,
    'a cat with a sign that says "Sana", 3 cats, 猫, <eos> & co.': True,
    LONG: True,
    "": False,
    "3 cats": False,
    "42": False,
    "一只红猫": False,
    "猫が好き": False,
    "😀 cat": False,
    "👩‍👩‍👧": False,
    "\ncat": False,
    "\tcat": False,
    " cat": False,
    "\u3000cat": False,
}
PROMPTS = list(MERGES)


def trained_vocabulary() -> tuple[dict[str, int], list[tuple[str, str]]]:
    """Learnt from CORPUS; as in Gemma's, digits stand alone and no piece has a space but in front."""
    tokenizer = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Metaspace(prepend_scheme="never"), pre_tokenizers.Digits(individual_digits=True)]
    )
    special = ["<pad>", "<eos>", "<bos>", "<unk>", *(f"<0x{byte:02X}>" for byte in range(256))]
    trainer = trainers.BpeTrainer(vocab_size=900, special_tokens=special, show_progress=False)
    tokenizer.train_from_iterator([line for text in CORPUS for line in text.split("\n")], trainer)
    vocabulary = tokenizer.get_vocab()
    pieces = sorted(vocabulary, key=vocabulary.get)
    # The pairs in order of learning: a merge makes the piece that is new at that point.
    merges = [
        pair
        for piece in pieces[len(special) :]
        for pair in ((piece[:cut], piece[cut:]) for cut in range(1, len(piece)))
        if pair[0] in vocabulary and pair[1] in vocabulary
    ]
    return vocabulary, merges


def mistral_vocabulary() -> tuple[dict[str, int], list[tuple[str, str]]]:
    """The SentencePiece file of the first Mistral model, with spaces, digits and bytes as in Gemma's."""
    found = importlib.util.find_spec("mistral_common")
    if found is None:
        pytest.skip("needs the vocabulary in mistral-common: pip install --no-deps mistral-common")
    from transformers.convert_slow_tokenizer import generate_merges, import_protobuf

    content = import_protobuf().ModelProto()
    content.ParseFromString((Path(found.origin).parent / "data/tokenizer.model.v1").read_bytes())
    scores = [(piece.piece, piece.score) for piece in content.pieces]
    names = {"<s>": "<bos>", "</s>": "<eos>"}
    vocabulary = {names.get(piece, piece): index for index, (piece, _) in enumerate(scores)}
    merges = generate_merges(vocabulary, scores, skip_tokens=names)
    return vocabulary | {"<pad>": len(vocabulary)}, merges


@pytest.fixture(scope="module", params=[trained_vocabulary, mistral_vocabulary], ids=["trained", "mistral"])
def folder(request, tmp_path_factory) -> Path:
    """A text encoder as it lies on the hub: a causal Gemma-2 of random weights and a GemmaTokenizer."""
    vocabulary, merges = request.param()
    tokenizer = GemmaTokenizer(vocabulary, merges, add_bos_token=True)
    path = tmp_path_factory.mktemp(request.param.__name__)
    tokenizer.save_pretrained(path)
    make_language_model(len(tokenizer)).save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def encoder(folder) -> TextEncoder:
    return TextEncoder.from_pretrained(folder, max_length=LENGTH, chi_prompt=INSTRUCTION, dtype=torch.float32)


@pytest.fixture(scope="module")
def by_hand(folder):
    """(ids, length) -> hidden states (length, C) and mask (length,): pad, run the causal model's decoder."""
    model = Gemma2ForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    pad = GemmaTokenizer.from_pretrained(folder).pad_token_id

    def run(ids: list[int], length: int) -> tuple[torch.Tensor, torch.Tensor]:
        ids = ids[:length]
        mask = torch.tensor([1] * len(ids) + [0] * (length - len(ids)))
        padded = torch.tensor([ids + [pad] * (length - len(ids))])
        with torch.no_grad():
            return model.model(input_ids=padded, attention_mask=mask[None]).last_hidden_state[0], mask

    return run


def test_tokenizer_is_gemma_s(encoder):
    tokenizer = encoder.tokenizer
    ids = tokenizer.encode(CHI)
    assert len(CHI) == 1057 and CHI.endswith("User Prompt: ")
    assert isinstance(tokenizer, GemmaTokenizer) and tokenizer.padding_side == "right"
    assert ids[0] == tokenizer.bos_token_id and tokenizer.eos_token_id not in ids
    assert tokenizer.convert_ids_to_tokens(ids)[-1] == "▁"
    assert tokenizer.unk_token_id not in tokenizer.encode("".join(PROMPTS))


@pytest.mark.parametrize("prompt", PROMPTS, ids=lambda prompt: repr(prompt[:12]))
def test_which_positions_are_selected(encoder, prompt):
    """BOS, then positions n - 1 to n + L - 3: the space before the prompt, merged or not, and the prompt."""
    tokenizer = encoder.tokenizer
    n = len(tokenizer.encode(CHI))
    ids = tokenizer.encode(CHI + prompt)
    assert ids[: n - 1] == tokenizer.encode(CHI)[:-1], "the prompt changed a token of the instruction"
    first = tokenizer.convert_ids_to_tokens(ids)[n - 1]
    assert first.startswith("▁") and (len(first) > 1) == MERGES[prompt]
    window = ids[n - 1 : n + LENGTH - 2]
    text = tokenizer.decode(window, clean_up_tokenization_spaces=False)
    if prompt == LONG:
        assert len(window) == LENGTH - 1 and f" {prompt}".startswith(text)
    else:
        assert text == f" {prompt}"
    assert int(encoder.encode([prompt]).mask.sum()) == 1 + len(window)


def test_encode_equals_the_straight_way(encoder, by_hand):
    """All prompts in one batch, the longest of which has 10,000 characters."""
    tokenizer = encoder.tokenizer
    n = len(tokenizer.encode(CHI))
    positions = [0, *range(n - 1, n + LENGTH - 2)]
    assert len(positions) == LENGTH
    features = encoder.encode(PROMPTS)
    for row, prompt in enumerate(PROMPTS):
        hidden, mask = by_hand(tokenizer.encode(CHI + prompt), n + LENGTH - 2)
        valid = mask[positions].bool()
        assert torch.equal(features.mask[row], mask[positions]), prompt
        assert_close(prompt[:12], features.embeds[row, valid], hidden[positions][valid], rel_rms=1e-5)


def test_negative_prompts_equal_the_straight_way(encoder, by_hand):
    """No instruction, no selection; the states of the padding too."""
    for prompts in ([LONG], [prompt for prompt in PROMPTS if prompt != LONG]):
        features = encoder.encode_unconditional(prompts)
        for row, prompt in enumerate(prompts):
            hidden, mask = by_hand(encoder.tokenizer.encode(prompt), LENGTH)
            assert torch.equal(features.mask[row], mask), prompt
            assert_close(prompt[:12], features.embeds[row], hidden, rel_rms=1e-5)


def test_lower_case_and_own_mask_are_diffusers_conventions(encoder):
    """Its pipeline's own encoding, with both options on."""
    ours = TextEncoder(
        encoder.model, encoder.tokenizer, max_length=LENGTH, chi_prompt=INSTRUCTION, lowercase=True
    )
    prompts = ["  A Red CAT\n", "ЁЛКА and 3 Cats"]
    negatives = ["", "Blurry, LOW quality "]
    theirs = SanaPipeline(encoder.tokenizer, encoder.model, vae=None, transformer=None, scheduler=None)
    embeds, mask, null_embeds, null_mask = theirs.encode_prompt(
        prompts, True, negatives, device=torch.device("cpu"), complex_human_instruction=INSTRUCTION
    )
    text, null = ours.encode(prompts), ours.encode_unconditional(negatives)
    assert torch.equal(text.mask, mask)
    assert torch.equal(unconditional_mask(text.mask, null.mask, "own"), null_mask)
    assert_close("prompt", text.embeds[mask.bool()], embeds[mask.bool()], rel_rms=1e-5)
    assert_close("negative", null.embeds, null_embeds, rel_rms=1e-5)
