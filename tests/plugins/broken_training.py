"""Trainings that really fail, one function per way. Played by tests/plugins/record_failures.py on two gloo ranks."""

from __future__ import annotations

import ctypes
import datetime
import json
import logging
import os
import pickle
import resource
import signal
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch.utils.data import DataLoader, Dataset

WAYS: dict[str, Callable[[Any, Any], None]] = {}


def way(function: Callable[[Any, Any], None]) -> Callable[[Any, Any], None]:
    WAYS[function.__name__] = function
    return function


def train(run: Any, cfg: Any) -> None:
    """A few good steps together, then what `cfg.way` says."""
    print(f"rank {run.rank} begins")
    for _ in range(3):
        together()
        run.report({"loss": 1.0})
    try:
        WAYS[cfg.way](run, cfg)
    except StopEarly:
        return
    for _ in range(200):  # the others meet in collectives until one is missing
        together()


class StopEarly(Exception):
    """This rank returns while the others go on."""


def together() -> None:
    dist.all_reduce(torch.ones(4))


def on_rank_one(function: Callable[[Any, Any], None]) -> Callable[[Any, Any], None]:
    def only(run: Any, cfg: Any) -> None:
        if run.rank == 1:
            function(run, cfg)

    WAYS[function.__name__] = only
    return function


# -- processes that die ----------------------------------------------------------------------------------------------


@on_rank_one
def sigkill(run: Any, cfg: Any) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


@on_rank_one
def sigterm(run: Any, cfg: Any) -> None:
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(60)


@on_rank_one
def segfault(run: Any, cfg: Any) -> None:
    ctypes.string_at(0)


@on_rank_one
def abort(run: Any, cfg: Any) -> None:
    os.abort()


@on_rank_one
def floating_point_trap(run: Any, cfg: Any) -> None:
    os.kill(os.getpid(), signal.SIGFPE)


@on_rank_one
def bus_error(run: Any, cfg: Any) -> None:
    """Reads a mapped file that somebody made shorter."""
    import mmap
    import tempfile

    with tempfile.TemporaryFile() as file:
        file.truncate(1 << 16)
        mapped = mmap.mmap(file.fileno(), 1 << 16)
        file.truncate(0)
        mapped[100]


@on_rank_one
def os_exit(run: Any, cfg: Any) -> None:
    os._exit(7)


@on_rank_one
def os_exit_zero(run: Any, cfg: Any) -> None:
    os._exit(0)


# -- leaving ---------------------------------------------------------------------------------------------------------


@on_rank_one
def sys_exit(run: Any, cfg: Any) -> None:
    sys.exit(3)


@on_rank_one
def returns_early(run: Any, cfg: Any) -> None:
    run.log({"left": 1.0})
    raise StopEarly


@on_rank_one
def keyboard_interrupt(run: Any, cfg: Any) -> None:
    os.kill(os.getpid(), signal.SIGINT)
    time.sleep(60)


# -- the user's code -------------------------------------------------------------------------------------------------


@on_rank_one
def import_error(run: Any, cfg: Any) -> None:
    import a_module_that_nobody_installed  # noqa: F401


@on_rank_one
def import_name_error(run: Any, cfg: Any) -> None:
    from torch.nn import LinearAttentionLayerOfTomorrow  # noqa: F401


@on_rank_one
def assertion(run: Any, cfg: Any) -> None:
    assert run.world_size == 4, f"this needs four ranks, not {run.world_size}"


@way
def assertion_everywhere(run: Any, cfg: Any) -> None:
    assert run.world_size == 4, f"this needs four ranks, not {run.world_size}"


@on_rank_one
def wrong_shape(run: Any, cfg: Any) -> None:
    torch.nn.Linear(8, 4)(torch.zeros(2, 5))


@on_rank_one
def wrong_type(run: Any, cfg: Any) -> None:
    torch.nn.functional.cross_entropy(torch.zeros(2, 5), torch.zeros(2, dtype=torch.int32))


@on_rank_one
def missing_setting(run: Any, cfg: Any) -> None:
    print(cfg.learning_rate_of_the_head)


@on_rank_one
def state_dict_mismatch(run: Any, cfg: Any) -> None:
    torch.nn.Linear(8, 4).load_state_dict(torch.nn.Sequential(torch.nn.Linear(8, 4)).state_dict())


@on_rank_one
def index_out_of_range(run: Any, cfg: Any) -> None:
    torch.nn.Embedding(10, 4)(torch.tensor([3, 99]))


@on_rank_one
def backward_twice(run: Any, cfg: Any) -> None:
    loss = (torch.ones(2, requires_grad=True) ** 2).sum()
    loss.backward()
    loss.backward()


@on_rank_one
def unpicklable_weights(run: Any, cfg: Any) -> None:
    with open(os.path.join(cfg.folder, "weights.pt"), "wb") as file:
        pickle.dump({"model": logging.getLogger}, file)
    torch.load(os.path.join(cfg.folder, "weights.pt"))


@way
def unused_parameters(run: Any, cfg: Any) -> None:
    class Two(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.used, self.unused = torch.nn.Linear(2, 2), torch.nn.Linear(2, 2)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.used(x)

    model = torch.nn.parallel.DistributedDataParallel(Two())
    for _ in range(3):
        model(torch.ones(1, 2)).sum().backward()


@way
def collective_shapes_differ(run: Any, cfg: Any) -> None:
    dist.all_reduce(torch.ones(4 if run.rank == 0 else 4096))


@on_rank_one
def too_many_open_files(run: Any, cfg: Any) -> None:
    resource.setrlimit(resource.RLIMIT_NOFILE, (64, 64))
    kept = [open("/dev/null") for _ in range(100)]  # noqa: SIM115
    print(len(kept))


@on_rank_one
def wrapped_error(run: Any, cfg: Any) -> None:
    try:
        json.loads("{'not': json}")
    except json.JSONDecodeError as error:
        raise RuntimeError("the vocabulary could not be read") from error


# -- data ------------------------------------------------------------------------------------------------------------


class Items(Dataset[torch.Tensor]):
    """Item 5 is the one that fails."""

    def __init__(self, fail: Callable[[], Any]) -> None:
        self.fail = fail

    def __len__(self) -> int:
        return 8

    def __getitem__(self, index: int) -> torch.Tensor:
        if index == 5:
            found = self.fail()
            return found if isinstance(found, torch.Tensor) else torch.zeros(2)
        return torch.zeros(2)


def read(fail: Callable[[], Any], **settings: Any) -> None:
    settings = {"num_workers": 1, "batch_size": 2, **settings}
    for _ in DataLoader(Items(fail), **settings):
        pass


@on_rank_one
def loader_key_error(run: Any, cfg: Any) -> None:
    read(lambda: {"a": 1}["label"])


@on_rank_one
def loader_name_error(run: Any, cfg: Any) -> None:
    read(lambda: agument(torch.zeros(2)))  # type: ignore[name-defined]  # noqa: F821


@on_rank_one
def loader_shapes_differ(run: Any, cfg: Any) -> None:
    read(lambda: torch.zeros(3))


@on_rank_one
def loader_file_missing(run: Any, cfg: Any) -> None:
    read(lambda: open("/data/imagenet/train/n01440764_10026.JPEG", "rb"))  # noqa: SIM115


@on_rank_one
def loader_killed(run: Any, cfg: Any) -> None:
    read(lambda: os.kill(os.getpid(), signal.SIGKILL))


@on_rank_one
def loader_segfault(run: Any, cfg: Any) -> None:
    read(lambda: ctypes.string_at(0))


@on_rank_one
def loader_bus_error(run: Any, cfg: Any) -> None:
    read(lambda: os.kill(os.getpid(), signal.SIGBUS))


@on_rank_one
def loader_exits(run: Any, cfg: Any) -> None:
    read(lambda: os._exit(1))


@on_rank_one
def loader_timeout(run: Any, cfg: Any) -> None:
    read(lambda: time.sleep(30), timeout=1)


@on_rank_one
def loader_memory(run: Any, cfg: Any) -> None:
    def much() -> Any:
        resource.setrlimit(resource.RLIMIT_AS, (6 << 30, 6 << 30))
        return bytearray(64 << 30)

    read(much)


@on_rank_one
def loader_pickle_error(run: Any, cfg: Any) -> None:
    read(lambda: None, multiprocessing_context="spawn")


@on_rank_one
def data_file_missing(run: Any, cfg: Any) -> None:
    with open("/data/corpus/train-00017-of-00128.jsonl") as lines:
        print(len(lines.readlines()))


@on_rank_one
def image_damaged(run: Any, cfg: Any) -> None:
    import io

    from PIL import Image

    Image.open(io.BytesIO(b"<html>404 Not Found</html>"))


@on_rank_one
def parquet_damaged(run: Any, cfg: Any) -> None:
    import pyarrow.parquet

    path = os.path.join(cfg.folder, "part-0.parquet")
    with open(path, "wb") as file:
        file.write(b"PAR1" + b"\0" * 64)
    pyarrow.parquet.read_table(path)


@on_rank_one
def text_damaged(run: Any, cfg: Any) -> None:
    b"Gr\xfc\xdfe".decode()


@on_rank_one
def safetensors_damaged(run: Any, cfg: Any) -> None:
    import safetensors.torch

    path = os.path.join(cfg.folder, "model.safetensors")
    safetensors.torch.save_file({"weight": torch.zeros(1000)}, path)
    os.truncate(path, 700)
    safetensors.torch.load_file(path)


@on_rank_one
def torch_file_damaged(run: Any, cfg: Any) -> None:
    path = os.path.join(cfg.folder, "model.pt")
    torch.save({"weight": torch.zeros(1000)}, path)
    os.truncate(path, 700)
    torch.load(path)


# -- memory ----------------------------------------------------------------------------------------------------------


@on_rank_one
def memory_error(run: Any, cfg: Any) -> None:
    resource.setrlimit(resource.RLIMIT_AS, (6 << 30, 6 << 30))
    bytearray(64 << 30)


@on_rank_one
def tensor_memory(run: Any, cfg: Any) -> None:
    resource.setrlimit(resource.RLIMIT_AS, (6 << 30, 6 << 30))
    torch.zeros(16 << 30)


@on_rank_one
def array_memory(run: Any, cfg: Any) -> None:
    import numpy as np

    resource.setrlimit(resource.RLIMIT_AS, (6 << 30, 6 << 30))
    np.zeros((1 << 17, 1 << 17)) + 1


@on_rank_one
def fork_memory(run: Any, cfg: Any) -> None:
    """What fork and mmap say of it."""
    import mmap

    resource.setrlimit(resource.RLIMIT_AS, (6 << 30, 6 << 30))
    mmap.mmap(-1, 64 << 30)


# -- files and storage -----------------------------------------------------------------------------------------------


@on_rank_one
def disk_full(run: Any, cfg: Any) -> None:
    with open("/dev/full", "wb") as file:
        torch.save({"weight": torch.zeros(1000)}, file)


@on_rank_one
def disk_full_path(run: Any, cfg: Any) -> None:
    """A small tmpfs."""
    torch.save({"weight": torch.zeros(1 << 20)}, os.path.join(cfg.small_disk, "model.pt"))


@on_rank_one
def file_too_large(run: Any, cfg: Any) -> None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, 1 << 20))
    with open(os.path.join(cfg.folder, "cache.bin"), "wb") as file:
        file.write(b"\0" * (2 << 20))


@on_rank_one
def permission_denied(run: Any, cfg: Any) -> None:
    path = os.path.join(cfg.folder, "private.csv")
    with open(path, "w") as file:
        file.write("a")
    os.chmod(path, 0o600)
    os.seteuid(65534)
    try:
        open(path)  # noqa: SIM115
    finally:
        os.seteuid(0)


@on_rank_one
def read_only(run: Any, cfg: Any) -> None:
    with open("/proc/version", "w") as file:
        file.write("1")
    with open("/sys/kernel/notes", "w") as file:
        file.write("1")


def s3(address: str, bucket: str) -> None:
    import pyarrow.fs

    files = pyarrow.fs.S3FileSystem(
        access_key="key", secret_key="secret", region="us-east-1", scheme="http", endpoint_override=address,
        connect_timeout=2, request_timeout=5, retry_strategy=pyarrow.fs.AwsStandardS3RetryStrategy(max_attempts=1),
    )  # fmt: skip
    with files.open_input_stream(f"{bucket}/train/shard-000.tar") as stream:
        stream.read()


@on_rank_one
def s3_no_bucket(run: Any, cfg: Any) -> None:
    s3(cfg.s3, "nobody-made-this-bucket")


@on_rank_one
def s3_write_no_bucket(run: Any, cfg: Any) -> None:
    import pyarrow.fs

    files = pyarrow.fs.S3FileSystem(
        access_key="key", secret_key="secret", region="us-east-1", scheme="http", endpoint_override=cfg.s3,
        retry_strategy=pyarrow.fs.AwsStandardS3RetryStrategy(max_attempts=1),
    )  # fmt: skip
    with files.open_output_stream("nobody-made-this-bucket/model.pt") as stream:
        stream.write(b"x")


@on_rank_one
def s3_access_denied(run: Any, cfg: Any) -> None:
    s3(cfg.s3, "denied")


@on_rank_one
def s3_internal_error(run: Any, cfg: Any) -> None:
    s3(cfg.s3, "internal")


@on_rank_one
def s3_slow_down(run: Any, cfg: Any) -> None:
    s3(cfg.s3, "slow")


@on_rank_one
def s3_connection_refused(run: Any, cfg: Any) -> None:
    s3("127.0.0.1:9", "any")


@on_rank_one
def s3_botocore(run: Any, cfg: Any) -> None:
    import boto3

    client = boto3.client("s3", endpoint_url=f"http://{cfg.s3}", aws_access_key_id="k", aws_secret_access_key="s",
                          region_name="us-east-1")  # fmt: skip
    client.get_object(Bucket="denied", Key="train/shard-000.tar")


@on_rank_one
def our_storage_refused(run: Any, cfg: Any) -> None:
    """Through our own class, which says it in its words."""
    from orchestrator.backends.storage import Storage

    storage = Storage(
        f"s3://key:secret@denied/run-1/?scheme=http&endpoint_override={cfg.s3}&region=us-east-1&attempts=1"
    )
    storage.write_bytes("manifest.json", b"{}")


# -- ranks that wait for each other ----------------------------------------------------------------------------------


@way
def gloo_timeout(run: Any, cfg: Any) -> None:
    group = dist.new_group(timeout=datetime.timedelta(seconds=2))
    if run.rank == 1:
        time.sleep(60)
    dist.all_reduce(torch.ones(4), group=group)


@way
def gloo_timeout_everywhere(run: Any, cfg: Any) -> None:
    """Each waits for the other in another collective."""
    first, second = (dist.new_group(timeout=datetime.timedelta(seconds=2)) for _ in range(2))
    dist.all_reduce(torch.ones(4), group=first if run.rank == 0 else second)


@way
def monitored_barrier(run: Any, cfg: Any) -> None:
    if run.rank == 1:
        time.sleep(60)
    dist.monitored_barrier(timeout=datetime.timedelta(seconds=2))


@way
def rendezvous_timeout(run: Any, cfg: Any) -> None:
    if run.rank == 1:
        time.sleep(60)
    dist.TCPStore("127.0.0.1", 0, 2, is_master=True, timeout=datetime.timedelta(seconds=2))


@way
def store_timeout(run: Any, cfg: Any) -> None:
    if run.rank == 1:
        time.sleep(60)
    store = dist.TCPStore("127.0.0.1", 0, 1, is_master=True, timeout=datetime.timedelta(seconds=2))
    store.get("a key that rank 1 should have set")


@on_rank_one
def rank_one_raises_late(run: Any, cfg: Any) -> None:
    """The other hears of it before this one has told its own word: it hangs up, tidies, then raises."""
    dist.destroy_process_group()
    time.sleep(0.5)
    raise ValueError("the label 11 is not one of 10 classes")


# -- numbers ---------------------------------------------------------------------------------------------------------


@on_rank_one
def anomaly_mode(run: Any, cfg: Any) -> None:
    with torch.autograd.set_detect_anomaly(True):
        (torch.tensor(-1.0, requires_grad=True).sqrt()).backward()


@on_rank_one
def gradient_not_finite(run: Any, cfg: Any) -> None:
    weight = torch.ones(2, requires_grad=True)
    (weight * float("nan")).sum().backward()
    torch.nn.utils.clip_grad_norm_([weight], 1.0, error_if_nonfinite=True)


@on_rank_one
def distribution_of_nan(run: Any, cfg: Any) -> None:
    torch.distributions.Normal(torch.tensor([float("nan")]), 1.0)


@on_rank_one
def sampling_nan(run: Any, cfg: Any) -> None:
    torch.multinomial(torch.tensor([float("nan"), 1.0]), 1)


@on_rank_one
def users_own_nan_check(run: Any, cfg: Any) -> None:
    loss = float("nan")
    if loss != loss:
        raise ValueError(f"Loss is {loss}, stopping training")


# -- ours ------------------------------------------------------------------------------------------------------------


@on_rank_one
def metric_refused(run: Any, cfg: Any) -> None:
    run.log({"loss": "low"})


def wrong_signature(run: Any) -> None:
    """Our worker calls it with two arguments."""
