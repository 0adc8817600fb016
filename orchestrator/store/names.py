"""Identities of runs: an id that sorts by time, a name that can be said aloud, a directory any file system takes."""

from __future__ import annotations

import hashlib
import re
import secrets
from datetime import UTC, datetime

ADJECTIVES = [
    "able",
    "agile",
    "amber",
    "ample",
    "azure",
    "bold",
    "brave",
    "breezy",
    "bright",
    "brisk",
    "calm",
    "candid",
    "civil",
    "clear",
    "clever",
    "copper",
    "coral",
    "cosmic",
    "cozy",
    "crisp",
    "curious",
    "daring",
    "deft",
    "eager",
    "early",
    "easy",
    "fair",
    "fancy",
    "fleet",
    "fond",
    "fresh",
    "gentle",
    "glad",
    "golden",
    "grand",
    "happy",
    "hardy",
    "honest",
    "humble",
    "ivory",
    "jolly",
    "keen",
    "kind",
    "light",
    "lively",
    "lucid",
    "lucky",
    "lunar",
    "mellow",
    "merry",
    "mild",
    "mighty",
    "misty",
    "modest",
    "neat",
    "nimble",
    "noble",
    "novel",
    "olive",
    "patient",
    "placid",
    "plucky",
    "polar",
    "prime",
    "proud",
    "quick",
    "quiet",
    "rapid",
    "ready",
    "royal",
    "ruby",
    "rustic",
    "sage",
    "scarlet",
    "serene",
    "sharp",
    "silent",
    "silver",
    "simple",
    "sleek",
    "smart",
    "smooth",
    "snowy",
    "solar",
    "solid",
    "spry",
    "stable",
    "steady",
    "sterling",
    "stout",
    "subtle",
    "sunny",
    "sure",
    "swift",
    "tidy",
    "tranquil",
    "trusty",
    "upbeat",
    "valiant",
    "velvet",
    "vivid",
    "warm",
    "wise",
    "witty",
    "young",
    "zesty",
]

NOUNS = [
    "acorn",
    "alder",
    "badger",
    "bear",
    "beaver",
    "birch",
    "bison",
    "brook",
    "canyon",
    "cedar",
    "cliff",
    "cloud",
    "comet",
    "condor",
    "coral",
    "cove",
    "crane",
    "creek",
    "cricket",
    "dawn",
    "deer",
    "delta",
    "dolphin",
    "dove",
    "dune",
    "eagle",
    "elk",
    "ember",
    "falcon",
    "fern",
    "finch",
    "fjord",
    "forest",
    "fox",
    "garden",
    "gecko",
    "glacier",
    "grove",
    "gull",
    "harbor",
    "hare",
    "hawk",
    "hazel",
    "heron",
    "hill",
    "ibex",
    "island",
    "jaguar",
    "jay",
    "juniper",
    "kestrel",
    "kite",
    "koala",
    "lagoon",
    "lake",
    "lark",
    "laurel",
    "lemur",
    "lily",
    "linden",
    "lion",
    "lotus",
    "lynx",
    "maple",
    "marsh",
    "marten",
    "meadow",
    "mesa",
    "meteor",
    "moon",
    "moose",
    "moss",
    "mountain",
    "newt",
    "oak",
    "ocean",
    "orca",
    "orchid",
    "osprey",
    "otter",
    "owl",
    "panda",
    "pebble",
    "pelican",
    "pine",
    "planet",
    "plover",
    "pond",
    "poplar",
    "prairie",
    "puffin",
    "quail",
    "rain",
    "raven",
    "reef",
    "ridge",
    "river",
    "robin",
    "sable",
    "salmon",
    "seal",
    "sequoia",
    "shore",
    "sparrow",
    "spring",
    "spruce",
    "star",
    "stork",
    "stream",
    "summit",
    "swallow",
    "swan",
    "thrush",
    "tiger",
    "trout",
    "tulip",
    "tundra",
    "turtle",
    "valley",
    "walrus",
    "wave",
    "willow",
    "wind",
    "wolf",
    "wombat",
    "wren",
    "yak",
    "zebra",
]


_ODD = 2654435761
"""Any odd number takes what is below 2**32 to different places; this one scatters neighbours."""


def run_id(now: float) -> str:
    """Example: 20261121-081530-a1b2c3d4. The time is UTC; the rest tells runs of one second apart."""
    return f"{datetime.fromtimestamp(now, UTC):%Y%m%d-%H%M%S}-{secrets.token_hex(4)}"


def is_run_id(text: str) -> bool:
    return re.fullmatch(r"\d{8}-\d{6}-[0-9a-f]{8}", text) is not None


def trial_run_id(sweep: str, trial: str) -> str:
    """The id of a trial's run, whoever asks for it. Example: trial_run_id("20261121-081530-a1b2c3d4", "7.0").

    Of a trial that is `<number>.<repeat>` it is no other's of the sweep: a hash of each would meet another one's in one
    of eighty sweeps with 10,000 trials.
    """
    numbered = re.fullmatch(r"(\d{1,6})\.(\d{1,3})", trial, re.ASCII)
    if numbered is None:
        return f"{sweep[:15]}-{_hashed(f'{sweep} {trial}'):08x}"
    place = int(numbered[1]) * 1000 + int(numbered[2])
    return f"{sweep[:15]}-{(_hashed(sweep) + place * _ODD) % 2**32:08x}"


def _hashed(text: str) -> int:
    return int(hashlib.sha256(text.encode()).hexdigest()[:8], 16)


def run_name(number: int) -> str:
    """Example: brisk-otter-142. Unique, because the number is."""
    return f"{secrets.choice(ADJECTIVES)}-{secrets.choice(NOUNS)}-{number}"


def path_safe(name: str) -> str:
    """The name as one part of a path or URL. What had to be changed gets a hash, so that two names never become one."""
    safe = re.sub(r"[^A-Za-z0-9._-]+", "_", name).strip("._-")[:80]
    if safe and safe == name:
        return safe
    return f"{safe}-{hashlib.sha256(name.encode(errors='replace')).hexdigest()[:8]}".lstrip("-")


def run_directory(storage_url: str, experiment: str, run: str) -> str:
    """`<storage_url>/<experiment>/<run>`; empty when there is no storage. What a URL has after `?` stays at its end."""
    if not storage_url:
        return ""
    place, mark, options = storage_url.partition("?") if "://" in storage_url else (storage_url, "", "")
    return f"{place.rstrip('/')}/{path_safe(experiment)}/{run}{mark}{options}"
