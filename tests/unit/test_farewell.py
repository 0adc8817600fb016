"""A script's run hears the signals with which machines are taken away."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator

import pytest

from orchestrator.execution import farewell
from orchestrator.execution.farewell import HEARD, Farewell


@pytest.fixture
def killed(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """Signals that would have ended this process. The real ones come from `raise_signal`."""
    sent: list[int] = []
    before = [signal.signal(number, signal.SIG_DFL) for number in HEARD]
    monkeypatch.setattr(farewell.os, "kill", lambda _, number: sent.append(number))
    yield sent
    for number, old in zip(HEARD, before, strict=True):
        signal.signal(number, old)


@pytest.mark.parametrize("number", HEARD)
def test_the_first_signal_asks_to_save_and_later_ones_do_what_they_always_do(
    killed: list[int], number: signal.Signals
) -> None:
    asked: list[str] = []
    listener = Farewell(lambda: not asked.append("to save"))
    listener.listen()
    signal.raise_signal(number)
    assert (listener.heard, asked, killed) == (number.name, ["to save"], [])
    assert [signal.getsignal(each) for each in HEARD] == [signal.SIG_DFL, signal.SIG_DFL]
    listener.close()


def test_a_run_with_nothing_to_save_is_ended_at_once(killed: list[int]) -> None:
    listener = Farewell(lambda: False)
    listener.listen()
    signal.raise_signal(signal.SIGTERM)
    assert killed == [signal.SIGTERM]


def test_one_that_does_not_report_in_time_is_ended(killed: list[int]) -> None:
    listener = Farewell(lambda: True, grace=0.0)
    listener.listen()
    signal.raise_signal(signal.SIGUSR1)
    assert listener._timer is not None
    listener._timer.join(10)
    assert killed == [signal.SIGUSR1]


def test_a_handler_of_the_users_stays(killed: list[int]) -> None:
    heard: list[int] = []
    signal.signal(signal.SIGTERM, lambda number, _: heard.append(number))
    listener = Farewell(lambda: True)
    listener.listen()
    signal.raise_signal(signal.SIGTERM)
    listener.close()
    assert (heard, listener.heard) == ([signal.SIGTERM], "")


def test_another_thread_does_not_listen_and_a_forked_child_is_ended_as_ever(
    killed: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    elsewhere = Farewell(lambda: True)
    thread = threading.Thread(target=elsewhere.listen)
    thread.start()
    thread.join()
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    listener = Farewell(lambda: True)
    listener.listen()
    monkeypatch.setattr(listener, "_process", os.getpid() + 1)
    signal.raise_signal(signal.SIGTERM)
    assert killed == [signal.SIGTERM]
