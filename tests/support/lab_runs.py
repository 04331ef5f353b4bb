"""Two small languages, and a laboratory run on them that takes a second or two."""

from __future__ import annotations

import random

LANGUAGES = {"north": "bcdfg", "south": "klmnp"}


def language(name: str, documents: int, seed: int) -> list[str]:
    """Documents of words of two letters; which follows which is fixed by the language, up to chance."""
    words = ["".join(pair) for pair in zip(LANGUAGES[name] * 5, "aeiou" * 5, strict=True)]
    chance, fixed = random.Random(seed), random.Random(name)
    after = {word: fixed.sample(words, 3) for word in words}
    texts = []
    for _ in range(documents):
        word, text = chance.choice(words), []
        for _ in range(chance.randrange(20, 60)):
            text.append(word)
            word = chance.choice(after[word])
        texts.append(" ".join(text) + ".")
    return texts


def lab_config(languages, output, **changes):
    """A laboratory run that takes a second or two."""
    config = {
        "model": {"width": 32, "depth": 2, "head_size": 16},
        "data": str(languages.north),
        "valid": {"north": str(languages.north_valid), "south": str(languages.south_valid)},
        "context": 16,
        "training": {"batch_size": 8, "learning_rate": 1e-2, "warmup_tokens": 512, "log_every": 1},
        "stop": {"tokens": 20 * 8 * 16},
        "evaluation": {"every": 10 * 8 * 16, "rows": 16},
        "output": str(output),
    }
    return config | changes
