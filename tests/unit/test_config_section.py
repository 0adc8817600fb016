"""What a train function gets as cfg, and the dataclasses behind it."""

from __future__ import annotations

import copy
import pickle
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from typing import Any, Literal

import pytest

from orchestrator.config import Section, build, dump, user_config
from orchestrator.errors import ConfigError

VALUES = {"epochs": 3, "optim": {"lr": 0.1, "betas": [0.9, 0.99]}, "items": 5, "nets": [{"hidden": 8}]}


def test_keys_are_attributes_and_items() -> None:
    cfg = user_config(VALUES)
    assert (cfg.epochs, cfg.optim.lr, cfg["optim"]["betas"][1]) == (3, 0.1, 0.99)
    assert (cfg.get("hidden", 64), cfg["items"], cfg.nets[0].hidden) == (64, 5, 8)
    assert "optim" in cfg
    assert dict(**cfg.optim) == {"lr": 0.1, "betas": [0.9, 0.99]}
    assert cfg == VALUES
    assert cfg.to_dict() == VALUES
    assert "epochs" in dir(cfg)


def test_missing_key_names_itself_and_the_nearest() -> None:
    cfg = user_config(VALUES)
    with pytest.raises(AttributeError, match=r"no key optim\.rl\. Did you mean optim\.lr\?"):
        _ = cfg.optim.rl
    with pytest.raises(KeyError, match="no key epoch. Did you mean epochs"):
        _ = cfg["epoch"]
    assert not hasattr(cfg, "nothing")
    assert getattr(cfg, "nothing", 1) == 1


def test_it_cannot_be_changed() -> None:
    cfg = user_config(VALUES)
    with pytest.raises(AttributeError, match="read-only: optim.lr"):
        cfg.optim.lr = 1
    with pytest.raises(AttributeError, match="read-only"):
        del cfg.epochs
    cfg.optim.betas.append(1)
    cfg.to_dict()["optim"]["lr"] = 7
    assert cfg == VALUES


def test_it_travels() -> None:
    cfg = user_config(VALUES)
    for there in (pickle.loads(pickle.dumps(cfg)), copy.deepcopy(cfg)):
        assert isinstance(there, Section)
        assert there == cfg
        with pytest.raises(AttributeError, match=r"optim\.rl"):
            _ = there.optim.rl


def test_it_shows_itself_without_secrets() -> None:
    assert "hunter2" not in repr(user_config({"db": {"password": "hunter2"}, "url": "redis://u:hunter2@h"}))


class Color(Enum):
    red = 1
    blue = 2


@dataclass(kw_only=True)
class Leaf:
    size: int
    ratio: float = 0.5


@dataclass(frozen=True)
class Everything:
    leaf: Leaf
    color: Color = Color.red
    mode: Literal["fast", "slow"] = "fast"
    path: Path = Path("x")
    shape: tuple[int, int] = (1, 2)
    sizes: tuple[int, ...] = ()
    leaves: list[Leaf] = field(default_factory=list)
    named: dict[str, Leaf] = field(default_factory=dict)
    words: set[str] = field(default_factory=set)
    maybe: Leaf | None = None
    number: int | float | None = None
    choice: int | str = 1
    on: bool = False
    anything: Any = None


FULL = {
    "leaf": {"size": "4", "ratio": 1},
    "color": "blue",
    "mode": "slow",
    "path": "/data",
    "shape": [3, 4],
    "sizes": [1, 2, 3],
    "leaves": [{"size": 1}],
    "named": {"a": {"size": 2}},
    "words": ["b", "a"],
    "maybe": {"size": 9},
    "number": 1.5,
    "choice": "auto",
    "on": "true",
    "anything": {"a": [1]},
}


def test_a_dataclass_is_built_whole() -> None:
    made = user_config(FULL, Everything)
    assert made == Everything(
        leaf=Leaf(size=4, ratio=1.0), color=Color.blue, mode="slow", path=Path("/data"), shape=(3, 4), sizes=(1, 2, 3),
        leaves=[Leaf(size=1)], named={"a": Leaf(size=2)}, words={"a", "b"}, maybe=Leaf(size=9), number=1.5,
        choice="auto", on=True, anything={"a": [1]},
    )  # fmt: skip
    assert build(Everything, dump(made)) == made


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"leaf": {}}, "leaf.size: has no value, and Leaf has no default for it. Give it: leaf.size=…"),
        ({"leaf": {"size": 1, "rato": 2}}, "leaf.rato = 2: there is no such key. Did you mean leaf.ratio?"),
        ({"leaf": 3}, "leaf = 3: must be a group of keys (size, ratio), not a number."),
        ({"color": "blu"}, "color = 'blu': must be one of red, blue. The nearest is color=blue."),
        ({"mode": "fats"}, "mode = 'fats': must be one of fast, slow. The nearest is mode=fast."),
        ({"shape": [1]}, "shape = [1]: must be a list of 2 values"),
        ({"sizes": "12"}, "sizes = '12': must be a list, for example [1,2], not text."),
        ({"leaves": [{"size": "x"}]}, "leaves.0.size = 'x': must be a whole number, not text."),
        ({"named": {"a": {"size": 1, "b": 2}}}, "named.a.b = 2: there is no such key."),
        ({"maybe": {"sice": 1}}, "maybe.sice = 1: there is no such key. Did you mean maybe.size?"),
        ({"number": "x"}, "number = 'x': must be a whole number or a number or null, not text."),
        ({"on": 1}, "on = 1: must be true or false, not a number."),
        ({"leaf": {"size": True}}, "leaf.size = True: must be a whole number, not true/false."),
    ],
)
def test_wrong_values_are_named_by_their_dotted_key(change: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError) as caught:
        build(Everything, FULL | change)
    assert str(caught.value).startswith(said)


def test_a_refusal_of_the_dataclass_itself_is_passed_on() -> None:
    @dataclass
    class Picky:
        a: int = 1
        password: str = ""

        def __post_init__(self) -> None:
            if self.a > 3:
                raise ValueError("a is more than 3")

    with pytest.raises(ConfigError, match="Picky refuses these values: a is more than 3") as caught:
        build(Picky, {"a": 4, "password": "hunter2"})
    assert "hunter2" not in str(caught.value)


def test_a_value_without_a_plain_form_is_refused() -> None:
    with pytest.raises(ConfigError, match="not bytes"):
        dump({"a": b"x"})
