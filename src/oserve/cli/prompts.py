"""Generated prompts of a given length."""

import random
from collections.abc import Sequence

_WORDS = tuple(
    word
    for line in (
        "time year people way day man thing woman life child world school state family student",
        "group country problem hand part place case week company system program question work",
        "night point home water room mother area money story fact month lot right study book eye",
        "job word side kind head house friend father power hour game line end member law car city",
        "name team minute idea kid body back parent face level office door health person art war",
        "history party result",
    )
    for word in line.split()
)


def sample_text(words: int, seed: int) -> str:
    """``words`` random words by a seed."""
    return " ".join(random.Random(seed).choices(_WORDS, k=words))


class PromptWriter:
    """Writes prompts of given token counts, all different, so that no prefix cache can help.

    ``tokens`` = ``base`` + ``per_word`` * words; ``calibrated`` if these were measured.
    """

    def __init__(self, *, base: float, per_word: float, seed: int, calibrated: bool = True) -> None:
        self.calibrated = calibrated
        self._base = base
        self._per_word = per_word
        self._draw = random.Random(seed)

    def write(self, tokens: int) -> str:
        """A prompt of about ``tokens`` tokens, if anything fewer."""
        count = max(1, int((tokens - self._base) / self._per_word))
        return " ".join(self._draw.choices(_WORDS, k=count))

    @classmethod
    def measured(cls, samples: Sequence[tuple[int, int]], *, seed: int) -> "PromptWriter":
        """Calibrate from samples (words, tokens): two, one, or none, which is a guess."""
        if not samples:
            return cls(base=0.0, per_word=1.3, seed=seed, calibrated=False)
        few, few_tokens = samples[0]
        if len(samples) == 1:
            return cls(base=0.0, per_word=max(few_tokens / few, 0.1), seed=seed)
        many, many_tokens = samples[1]
        per_word = max((many_tokens - few_tokens) / (many - few), 0.1)
        return cls(base=few_tokens - few * per_word, per_word=per_word, seed=seed)
