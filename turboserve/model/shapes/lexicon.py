"""The words `shapes` understands. Values are those of `vocabulary`; plurals are worked out by `lookup`."""

from __future__ import annotations

_SYNONYMS: dict[tuple[str, str], str] = {
    ("shape", "circle"): "circle ball dot disc disk sphere bubble sun moon planet",
    ("shape", "square"): "square box cube block brick tile",
    ("shape", "triangle"): "triangle pyramid arrowhead",
    ("shape", "star"): "star",
    ("shape", "ring"): "ring donut doughnut hoop torus wheel",
    ("colour", "red"): "red crimson scarlet ruby",
    ("colour", "green"): "green emerald lime",
    ("colour", "blue"): "blue azure cobalt",
    ("colour", "yellow"): "yellow gold golden",
    ("colour", "purple"): "purple violet",
    ("colour", "orange"): "orange amber",
    ("colour", "cyan"): "cyan turquoise teal aqua",
    ("colour", "white"): "white",
    ("colour", "pink"): "pink rose magenta",
    ("size", "small"): "small little tiny mini",
    ("size", "medium"): "medium middling midsize",
    ("size", "large"): "large big huge giant",
    ("motion", "left"): "left leftward leftwards west westward",
    ("motion", "right"): "right rightward rightwards east eastward",
    ("motion", "up"): "up upward upwards rising rise rises ascending climbing north",
    ("motion", "down"): "down downward downwards falling fall falls descending sinking dropping south",
    ("motion", "bouncing"): "bouncing bounce bounces jumping hopping",
    ("motion", "growing"): "growing grow grows pulsing pulse pulses pulsating breathing",
    ("motion", "spinning"): "spinning spin spins rotating rotate rotates turning turns twirling",
    ("motion", "still"): "still static stationary motionless resting standing",
    ("speed", "slow"): "slow slowly gently lazily",
    ("speed", "normal"): "normal normally steadily",
    ("speed", "fast"): "fast quick quickly rapid rapidly speedy swiftly",
    ("count", "1"): "one single 1",
    ("count", "2"): "two pair couple both double twin 2",
    (
        "motion_verb",
        "",
    ): "moving move moves drifting drift drifts floating float floats flying fly flies going goes"
    " gliding glide glides sliding slide slides travelling traveling heading sailing",
    # Without a noun beside it these can only speak of the background; with one, BACKGROUND_NOUNS decides.
    ("background", "black"): "black",
    ("background", "grey"): "grey gray",
}
LEXICON: dict[str, tuple[str, str]] = {word: meaning for meaning, words in _SYNONYMS.items() for word in words.split()}

# A background noun and the colour it has when none is named ("" leaves it to the seed).
BACKGROUND_NOUNS: dict[str, str] = {
    "background": "",
    "backdrop": "",
    "sky": "dark blue",
    "night": "black",
    "space": "black",
    "darkness": "black",
    "sea": "dark blue",
    "ocean": "dark blue",
    "water": "dark blue",
    "forest": "dark green",
    "grass": "dark green",
    "meadow": "dark green",
    "field": "dark green",
    "sunset": "dark red",
    "fog": "grey",
    "wall": "grey",
    "dusk": "dark purple",
}
# Backgrounds are dark, so that every shape stands out: a colour means its dark tone.
BACKGROUND_COLOURS: dict[str, str] = {
    "black": "black",
    "blue": "dark blue",
    "navy": "dark blue",
    "cyan": "dark blue",
    "green": "dark green",
    "red": "dark red",
    "maroon": "dark red",
    "orange": "dark red",
    "grey": "grey",
    "gray": "grey",
    "white": "grey",
    "purple": "dark purple",
    "violet": "dark purple",
    "pink": "dark purple",
}
SHADES = frozenset({"dark", "deep", "light", "pale", "bright"})
BACKGROUND_LEADS = frozenset({"on", "over", "against", "above", "across", "in", "through", "under", "before"})
_PLAIN = """
a an the of and or to at by it its is are be with while that which there this from into around then now please
some show me make draw picture video colored coloured color colour shape shapes object objects
"""
STOP_WORDS = frozenset(_PLAIN.split()) | BACKGROUND_LEADS | SHADES


def lookup(word: str) -> tuple[str, str, bool] | None:
    """(kind, value, plural) of a word, or None when it has no meaning here."""
    if word in LEXICON:
        return *LEXICON[word], False
    for ending, replacement in (("es", ""), ("s", "")):
        stem = word.removesuffix(ending) + replacement
        if stem != word and LEXICON.get(stem, ("", ""))[0] == "shape":
            return *LEXICON[stem], True
    return None
