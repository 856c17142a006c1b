"""Languages that a chain of thought can be asked to keep to, and the scripts that each is written in.

Read by the prompt sources (`data/records.py`), which check the codes of a column, and by the language reward
(`rewards/language.py`), which counts words by script. Two languages of one script cannot be told apart that way: of
the Latin ones an English thought is as good as a German one.
"""

from __future__ import annotations

DEFAULT_LANGUAGE = "en"
HAN_PER_WORD = 1.6
"""Han characters that count as one word: the mean length of a Chinese word."""

_LATIN = "en af ca cs cy da de es et eu fi fr ga gl hr hu id is it lt lv ms nl no pl pt ro sk sl sq sv sw tl tr vi"
LANGUAGES: dict[str, tuple[str, ...]] = {
    **dict.fromkeys(_LATIN.split(), ("latin",)),
    "zh": ("han",),
    "ja": ("kana", "han"),
    "ko": ("hangul",),
    **dict.fromkeys(("ru", "be", "bg", "kk", "ky", "mk", "mn", "sr", "uk"), ("cyrillic",)),
    **dict.fromkeys(("ar", "fa", "ps", "ur"), ("arabic",)),
    **dict.fromkeys(("hi", "mr", "ne"), ("devanagari",)),
    **dict.fromkeys(("bn", "as"), ("bengali",)),
    "am": ("ethiopic",),
    "el": ("greek",),
    "gu": ("gujarati",),
    "he": ("hebrew",),
    "hy": ("armenian",),
    "ka": ("georgian",),
    "km": ("khmer",),
    "kn": ("kannada",),
    "lo": ("lao",),
    "ml": ("malayalam",),
    "my": ("myanmar",),
    "pa": ("gurmukhi",),
    "si": ("sinhala",),
    "ta": ("tamil",),
    "te": ("telugu",),
    "th": ("thai",),
}
"""ISO 639-1 code -> scripts whose words are its words. The first language of a script stands for it where nothing else
says which of them is meant."""


def language_code(value: str) -> str | None:
    """The code that a value means: "zh", "ZH", "zh-CN" and "zh_Hans" are "zh"; None where it is none of LANGUAGES."""
    code = value.strip().lower().replace("_", "-").partition("-")[0]
    return code if code in LANGUAGES else None


def check_language(code: str) -> str:
    """The code itself; raises ValueError for one that is not in LANGUAGES, spelled exactly."""
    if code not in LANGUAGES:
        meant = language_code(code)
        cure = f'write "{meant}"' if meant else "take the one of the same script, if yours is missing"
        raise ValueError(f"language {code!r} is unknown; allowed are {', '.join(sorted(LANGUAGES))}: {cure}")
    return code
