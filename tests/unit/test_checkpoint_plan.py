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
