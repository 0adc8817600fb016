"""Algorithms of Ray Tune behind our protocol: replayed exactly where they can be, and told what is known where not."""

from __future__ import annotations

import random
from typing import Any, ClassVar

import pytest
from ray.tune.search import Searcher as Algorithm

from orchestrator.config import SweepConfig
from orchestrator.errors import ConfigError
from orchestrator.execution.searchers import library
from orchestrator.sweeps.search import Searcher, searcher_for
from orchestrator.sweeps.space import Space, space
from orchestrator.sweeps.values import Past, Rebuilt, Telling, Told

SPACE = space(
    {
        "lr": "loguniform(1e-4, 1)",
        "size": "qrandint(8, 64, 8)",
        "kind": "choice(a, 1, true)",
        "noise": "normal(0, 1)",
        "always": "fixed(3)",
    },
    ["lr * size <= 16"],
)


class Seeded(Algorithm):
    """Draws with a seed, near the best that it has heard of."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        self._random = random.Random(seed)
        self._asked: dict[str, dict[str, Any]] = {}
        self.heard: list[tuple[float, dict[str, Any]]] = []

    def set_search_properties(self, metric: Any, mode: Any, config: dict[str, Any], **spec: Any) -> bool:
        self._metric, self._mode, self._domains = metric, mode, config
        return True

    def suggest(self, trial_id: str) -> dict[str, Any]:
        found = {
            key: domain.sample(random_state=self._random.randrange(2**31)) for key, domain in self._domains.items()
        }
        if self.heard and self._random.random() < 0.5:
            found["lr"] = min(self.heard, key=lambda pair: pair[0])[1]["lr"]
        self._asked[trial_id] = found
        return dict(found)

    def on_trial_complete(self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False) -> None:
        if result is not None and not error:
            self.heard.append((result[str(self._metric)], self._asked[trial_id]))

    def add_evaluated_point(
        self, parameters: dict[str, Any], value: float, error: bool = False, pruned: bool = False,
        intermediate_values: list[float] | None = None,
    ) -> None:  # fmt: skip
        self.heard.append((value, parameters))


class Restless(Seeded):
    """Every one of them has another random state."""

    lives: ClassVar[list[Restless]] = []

    def __init__(self) -> None:
        super().__init__(100 + len(self.lives))
        self.lives.append(self)


def opened(name: str, where: Space = SPACE, **more: Any) -> Searcher:
    settings = SweepConfig(searcher=f"tune:{name}", samples=12, objective=["loss:min"], **more)
    return searcher_for(settings, where, 3, library=library())


def run(name: str, trials: int, restart: int = -1) -> tuple[list[Past], Rebuilt | None]:
    searcher, rebuilt = opened(name), None
    history: list[Past] = []
    for number in range(trials):
        if number == restart:
            searcher = opened(name)
            rebuilt = searcher.rebuild(history)
        found = searcher.suggest(number)
        assert found is not None
        assert SPACE.contains(found.values) == ""
        result, state = ([abs(found.values["lr"] - 0.01)], Told.complete) if number % 4 else (None, Told.failed)
        searcher.told(number, found.values, 3, result, state)
        telling = Telling(seq=2 * number + 1, resource=3, scores=tuple(result) if result else None, state=state)
        history.append(
            Past(number=number, values=found.values, origin=found.origin, tellings=(telling,), seq=2 * number)
        )
    assert searcher.suggest(12) is None
    return history, rebuilt


@pytest.mark.parametrize("name", [f"{__name__}:Seeded", "optuna"])
def test_what_gives_the_same_again_goes_on_exactly(name: str) -> None:
    undisturbed, _ = run(name, 12)
    killed, rebuilt = run(name, 12, restart=7)
    assert rebuilt == Rebuilt(is_exact=True)
    assert killed == undisturbed


def test_what_does_not_is_told_what_is_known_and_says_so() -> None:
    killed, rebuilt = run(f"{__name__}:Restless", 12, restart=7)
    assert rebuilt is not None
    assert not rebuilt.is_exact
    assert "random state" in rebuilt.why
    known = [(past.tellings[0].scores[0], past.values["lr"]) for past in killed[:7] if past.tellings[0].scores]
    assert [(score, params["lr"]) for score, params in Restless.lives[-1].heard[: len(known)]] == known


@pytest.mark.parametrize(
    ("name", "key", "said"),
    [
        ("hyperopd", "sweep.searcher", "hyperopt"),
        ("bohb", "sweep.searcher", "hb_bohb"),
        ("random", "sweep.searcher", "sweep.searcher=random"),
        ("no.such.module:Class", "sweep.searcher", "cannot be imported"),
        ("json:JSONDecoder", "sweep.searcher", "is no ray.tune.search.Searcher"),
    ],
)
def test_what_there_is_not_is_refused(name: str, key: str, said: str) -> None:
    with pytest.raises(ConfigError) as caught:
        opened(name)
    assert caught.value.key == key
    assert said in str(caught.value)


def test_what_tune_cannot_say_is_refused() -> None:
    conditional = space({"a": "choice(1, 2)", "b": "when(a == 1, uniform(0, 1))"})
    with pytest.raises(ConfigError) as caught:
        opened(f"{__name__}:Seeded", conditional)
    assert caught.value.key == "b"
    with pytest.raises(ConfigError):
        opened(f"{__name__}:Seeded", searcher_args={"sede": 3})
