"""Shares of a dataset, positions in it, and the seeds of both."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import DataLoader, IterableDataset, SubsetRandomSampler, TensorDataset, WeightedRandomSampler
from torch.utils.data.distributed import DistributedSampler

from orchestrator.seeding import derive
from orchestrator.training.loader import CannotShard, ShardedLoader, ShardedSampler

torch.set_num_threads(1)
CPU = torch.device("cpu")


def dataset(size: int = 20) -> TensorDataset:
    return TensorDataset(torch.arange(size))


def sharded(loader: DataLoader, rank: int = 0, world_size: int = 1, **settings: Any) -> ShardedLoader:
    return ShardedLoader(loader, rank=rank, world_size=world_size, device=CPU, **{"seed": 1, **settings})


def samples(loader: ShardedLoader) -> list[int]:
    return [int(value) for (batch,) in loader for value in batch]


@settings(max_examples=60, deadline=None)
@given(size=st.integers(1, 40), world=st.integers(1, 5), shuffle=st.booleans(), skip=st.integers(0, 5))
def test_shares_are_even_and_complete(size: int, world: int, shuffle: bool, skip: int) -> None:
    def shares(**kind: bool) -> list[list[int]]:
        given = [ShardedSampler(size, shuffle=shuffle, seed=0, rank=r, world_size=world, **kind) for r in range(world)]
        return [list(sampler) for sampler in given]

    even = shares()
    assert len({len(share) for share in even}) == 1
    assert set().union(*even) == set(range(size))
    dropped = shares(drop_last=True)
    assert sum(map(len, dropped)) == size // world * world
    assert sorted(sample for share in shares(even=False) for sample in share) == list(range(size))


def test_our_shares_are_those_of_torch() -> None:
    for rank in range(3):
        theirs: DistributedSampler = DistributedSampler(dataset(), num_replicas=3, rank=rank, shuffle=False)
        assert list(ShardedSampler(20, shuffle=False, seed=0, rank=rank, world_size=3)) == list(theirs)


def test_each_epoch_and_each_pass_has_its_own_order() -> None:
    loader = sharded(DataLoader(dataset(), batch_size=4, shuffle=True))
    loader.set_epoch(0)
    orders = [samples(loader), samples(loader)]
    loader.set_epoch(1)
    orders.append(samples(loader))
    assert all(sorted(order) == list(range(20)) for order in orders)
    assert orders[0] != orders[1] != orders[2] != orders[0]
    loader.set_epoch(0)
    assert samples(loader) == orders[0]


def test_settings_of_the_loader_are_kept() -> None:
    def collate(batch: list[Any]) -> list[Any]:
        return batch

    generator = torch.Generator().manual_seed(77)
    original = DataLoader(
        dataset(), batch_size=3, shuffle=True, collate_fn=collate, drop_last=True, generator=generator
    )
    loader = sharded(original, seed=5)
    assert (loader.batch_size, loader.collate_fn, loader.drop_last, len(loader)) == (3, collate, True, 6)
    same_generator = sharded(original, seed=6)
    assert list(loader) == list(same_generator), "the user's generator seeds the order"


def test_the_process_generators_are_not_used() -> None:
    loader = sharded(DataLoader(dataset(), shuffle=True))
    before = torch.get_rng_state()
    samples(loader)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("world_size", [1, 2])
@pytest.mark.parametrize("taken", [1, 3, 5])
def test_a_position_continues_where_it_was(world_size: int, taken: int) -> None:
    def loaders() -> list[ShardedLoader]:
        plain = DataLoader(dataset(19 if world_size == 1 else 20), batch_size=4 // world_size, shuffle=True)
        return [sharded(plain, rank, world_size) for rank in range(world_size)]

    want = [samples(loader) for loader in loaders()]
    for rank, loader in enumerate(loaders()):
        batches = iter(loader)
        first = [int(value) for _ in range(taken) for value in next(batches)[0]]
        position = loader.state_dict()
        continued = loaders()[rank]
        continued.load_state_dict(position)
        continued.set_epoch(0)
        assert first + samples(continued) == want[rank]
        assert samples(continued) != want[rank], "the next pass is a new one"


def test_a_position_fits_another_number_of_workers() -> None:
    plain = DataLoader(dataset(24), batch_size=2, shuffle=True)
    first: list[int] = []
    for rank in range(2):
        loader = sharded(plain, rank, 2)
        batches = iter(loader)
        first += [int(value) for _ in range(3) for value in next(batches)[0]]
    position = loader.state_dict()
    rest: list[int] = []
    for rank in range(3):
        loader = sharded(plain, rank, 3)
        loader.load_state_dict(position)
        rest += samples(loader)
    assert sorted(first + rest) == list(range(24))


def test_a_loop_left_early_is_no_longer_active() -> None:
    loader = sharded(DataLoader(dataset(), shuffle=True))
    for _ in loader:
        assert loader.is_active
        break
    assert not loader.is_active
    assert loader.state_dict()["used"] == 0


@pytest.mark.parametrize(("size", "drop_last"), [(20, False), (19, False), (19, True)])
def test_the_last_batch_knows_that_it_is(size: int, drop_last: bool) -> None:
    loader = sharded(DataLoader(dataset(size), batch_size=3, drop_last=drop_last))
    flags = [loader.is_last_batch for _ in loader]
    assert flags == [False] * (len(loader) - 1) + [True]


def test_an_order_that_cannot_be_divided_is_refused_on_several_ranks_only() -> None:
    odd = DataLoader(dataset(), sampler=WeightedRandomSampler([1.0] * 20, 20))
    with pytest.raises(CannotShard, match="WeightedRandomSampler"):
        sharded(odd, world_size=2)
    assert len(samples(sharded(odd))) == 20
    subset = DataLoader(dataset(), sampler=SubsetRandomSampler([1, 2, 3]))
    assert sorted(samples(sharded(subset))) == [1, 2, 3]


def test_a_sampler_that_divides_by_itself_stays() -> None:
    own: DistributedSampler = DistributedSampler(dataset(), num_replicas=2, rank=1, shuffle=True, seed=9)
    loader = sharded(DataLoader(dataset(), sampler=own, batch_size=2), rank=1, world_size=2)
    loader.set_epoch(3)
    assert own.epoch == 3
    want = samples(loader)
    batches = iter(loader)
    first = [int(value) for _ in range(2) for value in next(batches)[0]]
    again = sharded(DataLoader(dataset(), sampler=own, batch_size=2), rank=1, world_size=2)
    again.load_state_dict(loader.state_dict())
    again.set_epoch(3)
    assert first + samples(again) == want


def test_streams_pass_through() -> None:
    class Stream(IterableDataset):
        def __iter__(self) -> Iterator[int]:
            return iter(range(5))

    loader = sharded(DataLoader(Stream(), batch_size=2), world_size=2)
    assert [batch.tolist() for batch in loader] == [[0, 1], [2, 3], [4]]
    assert [int(value) for value in sharded(DataLoader(Stream(), batch_size=None))] == [0, 1, 2, 3, 4]


def test_worker_processes_get_seeds_that_repeat() -> None:
    def seeds_of(epoch: int) -> list[int]:
        loader = sharded(DataLoader(_Seeds(), num_workers=1))
        loader.set_epoch(epoch)
        return [int(value) for value in loader]

    assert seeds_of(0) == seeds_of(0)
    assert seeds_of(0) != seeds_of(1)


class _Seeds(torch.utils.data.Dataset):
    def __len__(self) -> int:
        return 2

    def __getitem__(self, index: int) -> int:
        return torch.initial_seed() % 2**31


def test_streams_of_random_numbers_have_their_own_seeds() -> None:
    seeds = {derive(root, *name) for root in (0, 1) for name in (("torch", 0), ("torch", 1), ("python", 0))}
    assert len(seeds) == 6
    assert all(0 <= seed < 2**63 for seed in seeds)
    assert derive(0, "torch", 1) == derive(0, "torch", 1) == 5611872886699419553
