"""Which rank writes what: pure rules."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from orchestrator.checkpoints import plan
from orchestrator.checkpoints.image import TensorSpec

Specs = st.dictionaries(
    st.text("abc.", min_size=1, max_size=6), st.tuples(st.integers(0, 500), st.booleans()), max_size=40
)


def groups_of(model: dict[str, tuple[int, bool]], optim: dict[str, tuple[int, bool]]) -> dict[str, list[TensorSpec]]:
    return {
        group: [TensorSpec(name, "F32", (count,), 4 * count, is_shared) for name, (count, is_shared) in tensors.items()]
        for group, tensors in {"model": model, "optim": optim}.items()
        if tensors
    }


def loads(groups: dict[str, list[TensorSpec]], owners: dict[str, int], world_size: int) -> list[int]:
    found = [0] * world_size
    for group, specs in groups.items():
        for spec in specs:
            found[owners[f"{group}/{spec.name}"]] += spec.size_bytes
    return found


@given(Specs, Specs, st.integers(1, 5))
def test_every_tensor_has_one_owner_and_shares_are_even(model: dict, optim: dict, world_size: int) -> None:
    groups = groups_of(model, optim)
    owners = plan.owners(groups, world_size)
    assert set(owners) == {f"{group}/{spec.name}" for group, specs in groups.items() for spec in specs}
    shared = [spec.size_bytes for specs in groups.values() for spec in specs if spec.is_shared]
    found = loads(groups, owners, world_size)
    most = max([*shared, 0])
    assert max(found[1:], default=0) - min(found[1:], default=0) <= most
    # Rank 0 may have more only by what nobody else may write.
    assert found[0] <= max(plan.own_bytes(groups), min(found[1:], default=sum(found)) + most)
    for group, specs in groups.items():
        assert all(owners[f"{group}/{spec.name}"] == 0 for spec in specs if not spec.is_shared)


@given(Specs, Specs, st.integers(1, 5), st.randoms())
def test_the_plan_does_not_depend_on_the_order_of_names(
    model: dict, optim: dict, world_size: int, random: object
) -> None:
    groups = groups_of(model, optim)
    shuffled = {group: sorted(specs, key=lambda spec: random.random()) for group, specs in reversed(groups.items())}  # type: ignore[attr-defined]
    assert plan.owners(shuffled, world_size) == plan.owners(groups, world_size)
    assert plan.plan_sha256(shuffled, world_size) == plan.plan_sha256(groups, world_size)


@given(Specs, st.integers(1, 4))
def test_the_files_of_all_ranks_hold_every_tensor_once(model: dict, world_size: int) -> None:
    groups = groups_of(model, {"step": (1, True)})
    owners = plan.owners(groups, world_size)
    held: list[str] = []
    for rank in range(world_size):
        layout, heads = plan.layout(groups, owners, rank, world_size, files={"words.txt": 5000})
        assert [image.path for image in layout.images if image.path.startswith("side/")] == ["side/words.txt"] * (
            not rank
        )
        for image, start, head in zip(layout.images, layout.starts, heads, strict=True):
            assert start % 4096 == 0
            assert len(head) == image.head_bytes
            group = image.path.partition("/")[0]
            held += [f"{group}/{piece.name}" for piece in image.pieces if group != "side"]
    assert sorted(held) == sorted(owners)


def test_the_hash_is_of_what_is_divided_and_stays_the_same() -> None:
    groups = groups_of({"w": (6, True), "running_mean": (3, False)}, {"m": (6, True)})
    found = plan.plan_sha256(groups, 2)
    assert len(found) == 64
    assert plan.plan_sha256(groups, 3) != found
    other = groups_of({"w": (6, True), "running_mean": (4, False)}, {"m": (6, True)})
    assert plan.plan_sha256(other, 2) == found, "buffers are rank 0's, whatever the others have"
    changed = groups_of({"w": (5, True)}, {"m": (6, True)})
    assert plan.plan_sha256(changed, 2) != found


def test_the_first_difference_of_two_ranks_is_named() -> None:
    one = plan.described(groups_of({"a": (1, True), "w": (6, True)}, {}))
    two = plan.described(groups_of({"a": (1, True), "w": (5, True), "z": (1, True)}, {}))
    assert plan.difference(one, two) == ("model/w", "F32 [6]", "F32 [5]")
    assert plan.difference(one, one) is None
    assert plan.difference({}, {"model/a": "F32 [1]"}) == ("model/a", "absent", "F32 [1]")


def test_rank_0_begins_with_what_is_its_alone() -> None:
    groups = groups_of({"w": (100, True), "v": (100, True), "buffer": (300, False)}, {})
    assert plan.owners(groups, 2) == {"model/buffer": 0, "model/v": 1, "model/w": 1}
    assert plan.owners(groups, 2, own_bytes=0) == {"model/buffer": 0, "model/v": 0, "model/w": 1}


Shapes = st.dictionaries(st.text("abc.", min_size=1, max_size=4), st.integers(0, 50), max_size=12)


def parts_of(rows: dict[str, int], rank: int, copies: int, parts: int) -> list[TensorSpec]:
    """What a rank has of tensors in so many parts, of each of which there are so many copies."""
    found = []
    for name, count in rows.items():
        step, part = -(-count // parts), rank % parts
        begin, end = min(part * step, count), min((part + 1) * step, count)
        holders = tuple(part + copy * parts for copy in range(copies))
        found.append(TensorSpec(name, "F32", (end - begin,), 4 * (end - begin), False, (begin,), (count,), holders))
    return found


@given(Shapes, Shapes, st.integers(1, 3), st.integers(1, 3))
def test_of_a_split_tensor_each_part_is_written_once(rows: dict, whole: dict, copies: int, parts: int) -> None:
    world_size = copies * parts
    written: dict[str, list[tuple[int, int]]] = {name: [] for name in rows}
    groups = [
        {
            "model": parts_of(rows, rank, copies, parts),
            "optim": [TensorSpec(name, "F32", (count,), 4 * count, True) for name, count in whole.items()],
        }
        for rank in range(world_size)
    ]
    bytes_written = [0] * world_size
    for rank, mine in enumerate(groups):
        owners = plan.owners(mine, world_size)
        for spec in mine["model"]:
            if owners[f"model/{spec.name}"] == rank:
                assert spec.offsets is not None
                written[spec.name].append((spec.offsets[0], spec.offsets[0] + spec.shape[0]))
                bytes_written[rank] += spec.size_bytes
        assert plan.plan_sha256(mine, world_size) == plan.plan_sha256(groups[0], world_size)
        assert plan.described(mine) == plan.described(groups[0])
        assert plan.size_bytes(mine) == 4 * (sum(rows.values()) + sum(whole.values()))
        assert plan.own_bytes(mine) == 0
        assert {key: owner for key, owner in owners.items() if key.startswith("optim/")} == {
            key: owner for key, owner in plan.owners(groups[0], world_size).items() if key.startswith("optim/")
        }
    for name, count in rows.items():
        ends = sorted(written[name])
        assert [begin for begin, _ in ends] + [count] * bool(ends) == [0] * bool(ends) + [end for _, end in ends]
        assert sum(end - begin for begin, end in ends) == count
    for part in range(parts):  # copies share the work
        found = [bytes_written[part + copy * parts] for copy in range(copies)]
        assert max(found) - min(found) <= 4 * max(rows.values(), default=0)


def test_ranks_that_split_a_tensor_otherwise_are_told_so() -> None:
    split = {"model": parts_of({"w": 6}, 0, 1, 2)}
    whole = {"model": [TensorSpec("w", "F32", (6,), 24, True)]}
    assert plan.plan_sha256(split, 2) != plan.plan_sha256(whole, 2)
    found = plan.difference(plan.described(split), plan.described(whole))
    assert found == ("model/w", "F32 [6] in parts", "F32 [6]")
