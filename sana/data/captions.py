"""Which of a picture's captions a step sees: the clip-score rule of Sana (arXiv 2410.10629, section 4.2)."""

import json
import math
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

MINIMAL_TEMPERATURE = 0.01  # the reference's floor; an exponent of 100


@dataclass(frozen=True, kw_only=True, slots=True)
class Caption:
    """One caption of a picture."""

    text: str
    """Never empty."""
    kind: str = "prompt"
    """Who wrote it: `prompt` (the caption that came with the picture), `VILA1-5-13B`, ..."""
    score: float | None = None
    """CLIP score, 100 * cosine, about 0 to 40; None where it was not measured."""


@dataclass(frozen=True, kw_only=True, slots=True)
class CaptionChoice:
    """The rule, from the settings of the same names in `sana.config.schema.DataConfig`."""

    selection: str = "clipscore"
    """`clipscore` (power law, as the reference's code), `softmax` (as the paper's text) or `proportion`."""
    threshold: float = 0.0
    temperature: float = 1.0
    proportion: Mapping[str, int] = field(default_factory=lambda: {"prompt": 1})

    def probabilities(self, captions: Sequence[Caption]) -> list[float]:
        """The probability of each caption.

        With s a score and T the temperature (at least 0.01): among the captions with s >= threshold, proportional to
        s^(1/T) for `clipscore`, to exp(s / T) for `softmax`; if no score reaches the threshold, the best caption alone;
        if none has a score, the one of kind `prompt`, else the first. Captions without a score are not drawn beside
        others with one. For `proportion`: proportional to the weight of the kind, shared by captions of one kind.

        Raises:
            ValueError: there is no caption, or none of a kind with a weight.
        """
        if not captions:
            raise ValueError("has no caption")
        if self.selection == "proportion":
            return self._by_proportion(captions)
        scores = [caption.score for caption in captions]
        known = [score for score in scores if score is not None]
        if not known:
            kinds = [caption.kind for caption in captions]
            return _only(kinds.index("prompt") if "prompt" in kinds else 0, len(captions))
        best = max(known)
        if best < self.threshold:
            return _only(scores.index(best), len(captions))
        weights = [
            self._weight(score, best) if score is not None and score >= self.threshold else 0.0
            for score in scores
        ]
        return [weight / sum(weights) for weight in weights]

    def draw(self, captions: Sequence[Caption], source: random.Random) -> Caption:
        """One of the captions by these probabilities."""
        return source.choices(captions, self.probabilities(captions))[0]

    def _weight(self, score: float, best: float) -> float:
        """Relative to the best score's weight, so that nothing overflows."""
        temperature = max(self.temperature, MINIMAL_TEMPERATURE)
        if self.selection == "softmax":
            return math.exp((score - best) / temperature)
        # A score of 0 or below has no power; where even the best has none, all are equal.
        return (max(score, 0.0) / best) ** (1 / temperature) if best > 0 else 1.0

    def _by_proportion(self, captions: Sequence[Caption]) -> list[float]:
        kinds = [caption.kind for caption in captions]
        weights = [self.proportion.get(kind, 0) / kinds.count(kind) for kind in kinds]
        if not sum(weights) > 0:
            raise ValueError(
                f"has captions of {', '.join(sorted(set(kinds)))}, none of which has a weight in "
                f"data.caption_proportion ({', '.join(self.proportion)})"
            )
        return [weight / sum(weights) for weight in weights]


def _only(index: int, count: int) -> list[float]:
    return [float(place == index) for place in range(count)]


def assembled(texts: Mapping[str, str], scores: Mapping[str, float]) -> list[Caption]:
    """The captions of a picture from kind -> text and kind -> score; empty texts are no captions.

    Raises:
        ValueError: none is left.
    """
    captions = [
        Caption(text=text.strip(), kind=kind, score=scores.get(kind))
        for kind, text in texts.items()
        if text.strip()
    ]
    if not captions:
        raise ValueError("has no caption" if not texts else f"has only empty captions ({', '.join(texts)})")
    return captions


def parsed(content: bytes | str, key: str | None, source: str) -> Mapping[str, Any]:
    """The mapping of a JSON text, or what it holds under `key` ({} where it has no such key).

    Raises:
        ValueError: it is no JSON, or no mapping; the message starts with `source`.
    """
    try:
        entries = json.loads(content)
    except ValueError as error:  # also bytes that are no text
        raise ValueError(f"{source} is not valid JSON: {error}") from error
    found = entries.get(key, {}) if isinstance(entries, dict) and key is not None else entries
    if not isinstance(found, dict):
        expected = '{"kind": ...}' if key is None else f'{{"{key}": {{"kind": ...}}}}'
        raise ValueError(f"{source} is not of the form {expected}: {str(entries)[:60]}")
    return found


def texts_of(entries: Mapping[str, Any]) -> dict[str, str]:
    """The entries that are texts: kind -> caption."""
    return {kind: text for kind, text in entries.items() if isinstance(text, str)}


def scores_of(entries: Mapping[str, Any], source: str) -> dict[str, float]:
    """kind -> CLIP score; published files write numbers also as texts.

    Raises:
        ValueError: one is no finite number.
    """
    scores = {}
    for kind, value in entries.items():
        try:
            scores[kind] = float(value)
        except (TypeError, ValueError) as error:
            raise ValueError(f"{source}: the CLIP score of {kind} is no number: {value!r}") from error
        if not math.isfinite(scores[kind]):
            raise ValueError(f"{source}: the CLIP score of {kind} is not finite: {value!r}")
    return scores
