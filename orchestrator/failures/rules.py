"""What each wording means: a table from texts and exit codes to kinds of failure. Pure.

The order of RULES is its meaning: the first that matches decides. It goes from words that only one program uses for one
thing to words that many use for much. Two places matter most. Memory stands before everything about dead processes,
because their obituaries guess at memory (`OOM killer`). Waiting for other ranks stands before storage and data, because
a time-out between ranks quotes addresses and "connection reset" like any other.

A rule is searched in `Type: message` of a rank that told its exception, then in the exceptions that caused this one,
and in the last log lines of a process that died without a word where `in_log` allows it. Wordings are those of PyTorch
1.8 to 2.13, NCCL 2, Ray 2, Slurm, Kubernetes, the AWS SDKs for C++ (pyarrow) and Python, and CPython;
tests/data/failures/ holds what was met.
"""

from __future__ import annotations

import re
import signal
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import IntEnum, StrEnum
from typing import Any

from orchestrator.config.names import did_you_mean
from orchestrator.errors import ConfigError


class FailureKind(StrEnum):
    """The values are stored with every failed attempt: names may be added, never changed."""

    preemption = "preemption"
    node_lost = "node_lost"
    worker_killed = "worker_killed"
    host_out_of_memory = "host_out_of_memory"
    device_out_of_memory = "device_out_of_memory"
    device_fault = "device_fault"
    """The GPU or its driver, not the program."""
    diverged = "diverged"
    """NaN, infinity, or a loss that grows."""
    hang = "hang"
    collective_timeout = "collective_timeout"
    time_limit = "time_limit"
    limit = "limit"
    """Of memory or CPU, the user's own."""
    storage = "storage"
    data_error = "data_error"
    user_bug = "user_bug"
    our_bug = "our_bug"
    cancelled = "cancelled"
    service = "service"
    """A server that we need: database, tracker, Ray."""
    unknown = "unknown"
    out_of_memory = "out_of_memory"
    """Only read: of attempts from before host and device were told apart."""


KINDS = tuple(kind.value for kind in FailureKind if kind not in (FailureKind.out_of_memory, FailureKind.unknown))
"""Those that users may name."""


class Blame(IntEnum):
    """How likely a rank that says this is the one that failed first; lower is likelier."""

    cause = 0
    waited = 1
    """It waited in vain for others: the cause only where nobody else failed."""
    echo = 2
    """It saw another one go."""


MENDED_BY_RESTART = frozenset(
    {
        FailureKind.preemption,
        FailureKind.node_lost,
        FailureKind.worker_killed,
        FailureKind.device_fault,
        FailureKind.hang,
        FailureKind.collective_timeout,
        FailureKind.service,
    }
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Rule:
    """One wording. `hint` says why it may be and what to do."""

    kind: FailureKind
    match: re.Pattern[str]
    hint: str = ""
    is_restart_useful: bool | None = None
    """None: as MENDED_BY_RESTART says of the kind."""
    blame: Blame = Blame.cause
    in_log: bool = False
    """Also where it stands in the last log lines of a process that died without a word: only for words that no program
    writes in passing."""
    of_dead: bool = False
    """Only of processes that did not tell an exception of their own."""
    rank: str = ""
    """Name of the group in `match` with the number of the rank that failed, where the words tell it."""


def _rule(kind: FailureKind, pattern: str, hint: str = "", **other: bool | Blame | str | None) -> Rule:
    return Rule(kind=kind, match=re.compile(pattern, re.MULTILINE), hint=hint, **other)  # type: ignore[arg-type]


_K = FailureKind
_NETWORK = "Look at the network between the nodes, and at what the silent rank did: `orc logs` shows each rank's log."

RULES: tuple[Rule, ...] = (
    # -- our own words -----------------------------------------------------------------------------------------------
    _rule(_K.service, r"^ServiceUnavailable:"),
    _rule(_K.user_bug, r"^(ConfigError|BadMetric|CannotShard|CheckpointMismatch|StateRefused|NotStorable):"),
    # -- memory ------------------------------------------------------------------------------------------------------
    _rule(
        _K.device_out_of_memory,
        r"(?i:(CUDA|HIP|XPU|MPS)( backend| driver error:| error:)? out of memory)|cudaErrorMemoryAllocation"
        r"|CU(BLAS|DNN|SOLVER|SPARSE|FFT)_STATUS_(ALLOC_FAILED|INSUFFICIENT_MEMORY)|CUBLAS_STATUS_NOT_INITIALIZED"
        r"|RESOURCE_EXHAUSTED: Out of memory|NVML_SUCCESS == .*CUDACachingAllocator",
        "Use a smaller batch with more accumulation, activation checkpointing or sharding; other processes on the GPU "
        "count.",
        in_log=True,
    ),
    _rule(
        _K.host_out_of_memory,
        r"insufficient shared memory|out of shared memory|unable to (mmap|write to file|allocate shared memory"
        r"|open shared"
        r" memory object|resize file) ?.*(</?torch_|shared memory|/dev/shm)|killed by signal: Bus error",
        "/dev/shm is full: give the container more (--shm-size, an emptyDir of medium Memory) or use fewer loader "
        "workers.",
        in_log=True,
    ),
    _rule(
        _K.host_out_of_memory,
        r"running low on memory|memory pressure \(OOM\)|memory usage threshold|^OutOfMemoryError:",
        "Ray's memory monitor ended the largest process of a full node: fewer workers per node, fewer loader workers, "
        "or "
        "resources.memory_gb_per_worker so that Ray places by memory.",
        in_log=True,
    ),
    _rule(
        _K.host_out_of_memory,
        r"[Oo]om[-_]kill|OOMKilled|OUT_OF_MEMORY|Memory cgroup out of memory|Out of memory: Kill"
        r"|[Ee]xceeded (job|step) memory limit|Some of your processes may have been killed by the cgroup out-of-memory",
        "The kernel ended it for memory: ask for more memory, or use fewer loader workers and smaller buffers.",
        in_log=True,
    ),
    _rule(
        _K.host_out_of_memory,
        r"\bMemoryError\b|DefaultCPUAllocator: (can't|not enough)|[Cc]annot allocate memory|std::bad_alloc"
        r"|ArrowMemoryError"
        r"|ArrowNoMemory|malloc of size \d+ failed",
        "An allocation on the host was refused: fewer loader workers, smaller buffers, or more memory per worker.",
        in_log=True,
    ),
    # -- the device --------------------------------------------------------------------------------------------------
    _rule(
        _K.user_bug,
        r"device-side assert triggered",
        "Most often an index or label out of range inside a kernel; CUDA_LAUNCH_BLOCKING=1 shows the line.",
        in_log=True,
    ),
    _rule(
        _K.device_fault,
        r"uncorrectable ECC|ECC error|NVRM: Xid|\bXid\b.*\d+|fallen off the bus|GPU is lost|cudaErrorECCUncorrectable"
        r"|[Uu]ncorrectable NVLink error|cudaErrorDevicesUnavailable"
        r"|CUDA-capable device\(s\) is/are busy or unavailable"
        r"|CUDA error: (hardware stack error|system not yet initialized|unknown error)"
        r"|no CUDA-capable device is detected"
        r"|Unable to determine the device handle",
        "The GPU or its driver failed: `nvidia-smi -q` and `dmesg` on that host tell; keep the node out until it is "
        "looked at.",
        in_log=True,
    ),
    _rule(
        _K.device_fault,
        r"CUDA error: (an illegal memory access|misaligned address|an illegal instruction|unspecified launch failure"
        r"|the launch timed out)|CU(BLAS|DNN)_STATUS_(EXECUTION_FAILED|INTERNAL_ERROR)",
        "A defect in a kernel, or a failing GPU: if it comes back on another GPU it is the code "
        "(CUDA_LAUNCH_BLOCKING=1 "
        "shows the line, compute-sanitizer the access).",
        in_log=True,
    ),
    # -- what clusters do --------------------------------------------------------------------------------------------
    _rule(
        _K.preemption,
        r"DUE TO PREEMPTION|interrupted by node preemption|node was preempted|preempted_ranks|(?i:spot"
        r"|preemptible)[^\n]*"
        r"(interrupt|reclaim|preempt)|[Pp]reempted by|AUTOSCALER_DRAIN|DRAIN_NODE_REASON_PREEMPTION"
        r"|TerminationByKubernetes"
        r"|node is shutting down|^Preemption",
        "The cluster took the node back; it is no fault of the run.",
        in_log=True,
    ),
    _rule(
        _K.time_limit,
        r"DUE TO TIME LIMIT|(?i:exceeded (its|the) (run ?time|time|wall[- ]?clock|walltime) limit)|DeadlineExceeded"
        r"|TIMEOUT_LIMIT|PBS: job killed: walltime",
        "The scheduler's limit was reached: ask for more time, or resume; the newest checkpoint is kept.",
        in_log=True,
    ),
    _rule(
        _K.node_lost,
        r"DUE TO NODE FAILURE|NODE_FAIL\b|NodeLost",
        "The host went away; the run can go on elsewhere from its newest checkpoint.",
        in_log=True,
    ),
    _rule(
        _K.cancelled,
        r"CANCELLED (AT|by)|^KeyboardInterrupt\b|TaskCancelledError|This task or its dependency was cancelled",
        "Somebody ended it.",
        in_log=True,
    ),
    # -- waiting for each other --------------------------------------------------------------------------------------
    _rule(
        _K.user_bug,
        r"[Dd]etected mismatch between collectives|op\.preamble\.length <= op\.nbytes|ncclInvalidUsage"
        r"|Duplicate GPU detected"
        r"|ncclInvalidArgument",
        "The ranks did not call the same collectives with the same shapes: look for branches that depend on the rank "
        "or "
        "on the data. TORCH_DISTRIBUTED_DEBUG=DETAIL names the call.",
        in_log=True,
    ),
    _rule(
        _K.collective_timeout,
        r"[Rr]anks? (?P<rank>\d+)[\d, ]* failed to pass monitoredBarrier",
        _NETWORK,
        blame=Blame.waited,
        in_log=True,
        rank="rank",
    ),
    _rule(
        _K.worker_killed,
        r"(?is:(gloo|nccl|c10d|DistBackendError|DistNetworkError|process ?group).*"
        r"((closed|reset) by (remote )?peer|remote process exit|socket (was )?closed|peer closed|broken pipe))"
        r"|ncclRemoteError",
        "Its connection broke because the process at the other end went away; that rank's log tells more.",
        blame=Blame.echo,
    ),
    _rule(
        _K.collective_timeout,
        r"Watchdog caught collective operation timeout|Timed out waiting \d+ ?ms for|monitoredBarrier"
        r"|Timed out initializing process group|Timed out after \d+ seconds? waiting for clients"
        r"|wait timeout after \d+ ?ms"
        r"|Some NCCL operations have failed or timed out|DistStoreError: .*[Tt]imed? ?out|store based barrier"
        r"|failed to recv, got 0 bytes|[Cc]ollective operation timed out|watchdog got stuck|Rendezvous(Timeout"
        r"|Connection)",
        _NETWORK,
        blame=Blame.waited,
        in_log=True,
    ),
    _rule(
        _K.collective_timeout,
        r"ncclSystemError|ncclUnhandledSystemError|unhandled system error|ncclInternalError|NCCL error.*internal error"
        r"|connectFullMesh failed|[Nn]o route to host",
        "The ranks could not reach each other: interface names (NCCL_SOCKET_IFNAME, GLOO_SOCKET_IFNAME), firewalls, "
        "/dev/shm; NCCL_DEBUG=INFO tells more.",
        blame=Blame.waited,
        in_log=True,
    ),
    _rule(
        _K.device_fault,
        r"ncclUnhandledCudaError|unhandled cuda error",
        "NCCL met an error of CUDA: `dmesg` on that host tells of the GPU, NCCL_DEBUG=INFO of the call.",
        blame=Blame.waited,
        in_log=True,
    ),
    # -- numbers -----------------------------------------------------------------------------------------------------
    _rule(
        _K.diverged,
        r"returned nan values in its|non-finite, so it cannot be clipped|found invalid values:[\s\S]*\b(nan|inf)\b"
        r"|contains either `inf`, `nan`|(?i:loss (is|was|became|=) *(nan|inf|not finite|non-finite))"
        r"|(?i:(nan|inf|non-finite) (loss|gradients?)\b)|^Diverged:|^FloatingPointError:"
        r"|minimum loss scale reached",
        "Values stopped being finite: a lower learning rate, gradient clipping, bfloat16 instead of float16, or look "
        "at "
        "the batch of that step.",
    ),
    # -- standing still ----------------------------------------------------------------------------------------------
    _rule(
        _K.hang,
        r"WorkerHealthCheckTimeoutError|health check has been hanging|^Hang:|no (progress|report) for \d",
        "No step for much longer than steps take: a deadlock, a loader that waits, or storage that does not answer.",
        in_log=True,
    ),
    # -- loader workers ----------------------------------------------------------------------------------------------
    _rule(
        _K.worker_killed,
        r"DataLoader worker \(pid[^)]*\)+ (is killed by signal|exited unexpectedly)",
        "A process of the DataLoader died: of memory (`dmesg` on that host tells), or in native code of the data "
        "pipeline; "
        "num_workers=0 shows the line.",
    ),
    _rule(
        _K.data_error,
        r"DataLoader timed out after",
        "Reading a batch took longer than the DataLoader's timeout: slow storage, or a worker that hangs.",
        is_restart_useful=True,
    ),
    # -- storage -----------------------------------------------------------------------------------------------------
    _rule(
        _K.storage,
        r"No space left on device|[Dd]isk quota exceeded|\[Errno (28|122)\]|ENOSPC|EDQUOT"
        r"|PytorchStreamWriter failed|inline_container\.cc[^\n]*unexpected pos|iostream error",
        "There is no room for the file: free some, or write elsewhere; `df -h` and quotas on that host tell.",
        is_restart_useful=True,  # others write there too, and delete; where nobody does, `max_repeats` ends it
        in_log=True,
    ),
    _rule(
        _K.storage,
        r"File too large|\[Errno 27\]",
        "The file is larger than the file system or `ulimit -f` of that host allows.",
        in_log=True,
    ),
    _rule(
        _K.storage,
        r"[Ii]nput/output error|Stale (NFS )?file handle|Transport endpoint is not connected|Remote I/O error"
        r"|\[Errno (5|116|107|121)\]",
        "The disk or the mount under the path failed; `dmesg` on that host tells.",
        is_restart_useful=True,
        in_log=True,
    ),
    _rule(
        _K.storage,
        r"ACCESS_DENIED|AccessDenied|Access Denied|INVALID_ACCESS_KEY|InvalidAccessKeyId|SIGNATURE_DOES_NOT_MATCH"
        r"|SignatureDoesNotMatch|ExpiredToken|EXPIRED_TOKEN|NoCredentialsError|Unable to locate credentials"
        r"|403 Forbidden"
        r"|HTTP response code: 403|\(403\)|AuthorizationFailure|AuthenticationFailed",
        "The storage refuses these credentials: look at the key, the role and the bucket's policy.",
    ),
    _rule(
        _K.storage,
        r"NO_SUCH_BUCKET|NoSuchBucket|[Bb]ucket '[^']*' not found|specified bucket does not exist|ContainerNotFound",
        "There is no such bucket at that endpoint: look at its name, region and endpoint.",
    ),
    _rule(
        _K.storage,
        r"SLOW_DOWN|SlowDown|reduce your request rate|INTERNAL_FAILURE|InternalError|SERVICE_UNAVAILABLE"
        r"|ServiceUnavailable\)"
        r"|AWS Error (NETWORK_CONNECTION|REQUEST_TIMEOUT|UNKNOWN|SERVICE)|RequestTimeout|EndpointConnectionError"
        r"|ConnectTimeoutError|ReadTimeoutError|curlCode: \d+|HTTP (response code|status):? 50\d|\(50[0234]\)"
        r"|when calling the \w+ operation",
        "The object storage does not answer as it should; it may the next time.",
        is_restart_useful=True,
    ),
    _rule(
        _K.storage,
        r"^PermissionError:|Caught PermissionError|[Pp]ermission denied|[Oo]peration not permitted"
        r"|[Rr]ead-only file system"
        r"|\[Errno (13|1|30)\]",
        "The user that runs the ranks may not do this there: owner and mode of the path, or a read-only mount.",
    ),
    _rule(
        _K.storage,
        r"^(CheckpointCorrupt|CommitRefused|SaveFailed|TooLarge|Unreadable|SlabDamaged|UnknownFormat|DonorGone"
        r"|NoCheckpoint"
        r"|DeletedMeanwhile|SpoolUnusable|LogInUse):",
        "`orc checkpoint verify` looks at every file; the run resumes from the newest one that is whole.",
    ),
    # -- the code behind the data ------------------------------------------------------------------------------------
    _rule(
        _K.user_bug,
        r"Caught (Name|UnboundLocal|Type|Attribute|Import|ModuleNotFound|Syntax|NotImplemented"
        r"|Recursion)Error in DataLoader",
    ),
    _rule(
        _K.user_bug,
        r"Can't (get local object|get attribute|pickle)|[Cc]an(no|')t pickle|PicklingError",
        "What goes to another process must be defined at the top of a module: no lambda, no local class or function.",
    ),
    # -- data --------------------------------------------------------------------------------------------------------
    _rule(
        _K.data_error,
        r"Caught \w+ in DataLoader worker process|stack expects each tensor to be equal size",
        "Raised while an item was read or batches were put together: look at the item, or at the dataset's code.",
    ),
    _rule(
        _K.data_error,
        r"^FileNotFoundError:|No such file or directory|NoSuchKey|Path does not exist|\[Errno 2\]",
        "The file (or its bucket) is not there, or not on that host: data must lie where every rank sees it.",
    ),
    _rule(
        _K.data_error,
        r"^(PIL\.)?UnidentifiedImageError:|cannot identify image file|image file is truncated|^Unicode(Decode)?Error:"
        r"|\bArrowInvalid:|Parquet magic bytes|^(json\.decoder\.)?JSONDecodeError:|^(zipfile\.)?Bad(Zip|Gzip)File:"
        r"|^zlib\.error:|^error: Error -\d|^EOFError:|(pandas\.errors\.)?ParserError:|SafetensorError:"
        r"|PytorchStreamReader failed|invalid header or archive is corrupted|^(tarfile\.)?ReadError:|unexpected EOF",
        "The file is damaged or not what it is taken for: look at it, or fetch it anew.",
    ),
    # -- the code ----------------------------------------------------------------------------------------------------
    _rule(
        _K.user_bug,
        r"^ModuleNotFoundError:|^ImportError:|No module named",
        "It is not installed where the ranks run, or not under that name.",
    ),
    _rule(
        _K.user_bug,
        r"Error\(s\) in loading state_dict|[Mm]issing key\(s\) in state_dict|size mismatch for ",
        "The weights are of another model: names or sizes differ.",
    ),
    _rule(
        _K.user_bug,
        r"shapes cannot be multiplied|must match the size of tensor|[Ss]izes of tensors must match"
        r"|shape '.*' is invalid for"
        r"|expected (input|target) .*to have|same (shape|size)",
        "Shapes do not fit: print them before this line.",
    ),
    _rule(
        _K.user_bug,
        r"Expected to have finished reduction in the prior iteration",
        "Some parameters got no gradient: use all of them, or give DistributedDataParallel "
        "find_unused_parameters=True.",
    ),
    _rule(
        _K.user_bug,
        r"[Tt]oo many open files",
        "The process may not open more files (`ulimit -n`): close them, use fewer loader workers, or "
        "torch.multiprocessing.set_sharing_strategy('file_system').",
    ),
    _rule(
        _K.user_bug,
        r"Weights only load failed|weights_only",
        "The file holds more than tensors; only where its origin is trusted, weights_only=False reads it.",
    ),
    _rule(
        _K.user_bug,
        r"^SystemExit:",
        "The code called sys.exit(); a training function returns when it is done.",
    ),
    # -- processes that are gone: words of Ray -----------------------------------------------------------------------
    _rule(
        _K.node_lost,
        r"(?i:node (has )?died|node .*(was )?(terminated|lost|dead)\b|NodeDiedError)",
        "The host went away; the run can go on elsewhere from its newest checkpoint.",
        of_dead=True,
    ),
    _rule(_K.unknown, r"(?i:raised in its creation task)", of_dead=True),
    _rule(
        _K.worker_killed,
        r"(?i:ActorDied|ActorUnavailable|WorkerCrashed|WorkerHealthCheck|worker process has died|LocalRayletDied)",
        "Killed by the kernel for memory (`dmesg` on that host tells), by a person, or crashed in native code.",
        of_dead=True,
    ),
)

_NATIVE = "Crashed in native code: a library, an extension or a kernel; the log may hold its last words."
SIGNALS: dict[int, tuple[FailureKind, str]] = {
    signal.SIGKILL: (
        _K.worker_killed,
        "Killed by the kernel for memory (`dmesg` on that host tells), by a person, or crashed in native code.",
    ),
    signal.SIGTERM: (
        _K.preemption,
        "Asked to end by somebody outside: a scheduler, a drain of the node, or a person.",
    ),
    signal.SIGINT: (_K.cancelled, "Somebody ended it."),
    signal.SIGHUP: (_K.cancelled, "The terminal or session under it was closed."),
    signal.SIGXCPU: (_K.time_limit, "The limit of CPU time was reached (`ulimit -t`)."),
    signal.SIGXFSZ: (_K.storage, "A file grew over the limit (`ulimit -f`)."),
    signal.SIGBUS: (
        _K.worker_killed,
        "A mapped file was cut or its disk is full (/dev/shm counts), or native code crashed.",
    ),
    signal.SIGSEGV: (_K.worker_killed, _NATIVE),
    signal.SIGABRT: (_K.worker_killed, _NATIVE),
    signal.SIGFPE: (_K.worker_killed, _NATIVE),
    signal.SIGILL: (_K.worker_killed, _NATIVE + " An illegal instruction: built for another CPU?"),
}
"""What the signal that ended a process means where no words tell more."""

EXITED = "The process ended by itself: something in it called exit."

GENERIC_ECHO = re.compile(
    r"connection (was )?(closed|reset)|gloo|nccl|process group|timed out waiting|broken pipe|DistBackendError"
    r"|DistNetworkError|another rank|by peer",
    re.IGNORECASE,
)
"""Talk of other ranks in a wording that no rule knows: rather an echo than a cause."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Pattern:
    """A user's rule: looked for before ours, in the message and in every last log line."""

    match: re.Pattern[str]
    kind: str = ""
    """Of FailureKind, or a name of the user's; "": as our rules say."""
    hint: str = ""
    action: str = ""
    """What is done: `stop`, whatever the kind; `restart`, as far as there is a budget; "": as the kind says."""
    avoid_node: bool = False
    """Another attempt shall not be on the node where that happened."""


ACTIONS = ("stop", "restart")
"""Those that a pattern may want."""
_PATTERN_KEYS = ("match", "kind", "hint", "action", "avoid_node")
_KIND = re.compile(r"[a-z][a-z0-9_]{0,63}")


def kind_named(key: str, kind: str) -> str:
    """The kind, of ours or of the user's. Raises ConfigError, with `key`, for what is no name and for what looks like a
    mistyped kind of ours."""
    if kind in KINDS:
        return kind
    if not isinstance(kind, str) or not _KIND.fullmatch(kind):
        why = "a kind of failure is a name: small letters, digits, underscores, at most 64."
        raise ConfigError(key, kind, why, f"Known: {', '.join(KINDS)}.")
    hint = did_you_mean(kind, KINDS, cutoff=0.75)
    if hint or kind in (FailureKind.unknown, FailureKind.out_of_memory):
        raise ConfigError(key, kind, "there is no such kind of failure.", hint)
    return kind


def patterns_of(listed: Sequence[Any]) -> tuple[Pattern, ...]:
    """From the setting `failures.patterns`. Raises ConfigError naming the entry that is wrong."""
    found = []
    for number, entry in enumerate(listed):
        key = f"failures.patterns.{number}"
        said = entry if isinstance(entry, Mapping) else {}
        if not said.get("match") or not (said.get("kind") or said.get("action") or said.get("avoid_node")):
            why = "an entry needs `match`, and `kind`, `action` or `avoid_node`."
            raise ConfigError(key, entry, why, 'Example: {match: "EIO", kind: storage}.')
        if unknown := entry.keys() - set(_PATTERN_KEYS):
            known = f"Known: {', '.join(_PATTERN_KEYS)}."
            raise ConfigError(key, sorted(unknown)[0], "there is no such key.", known)
        kind = kind_named(f"{key}.kind", entry["kind"]) if entry.get("kind") else ""
        action, avoids = entry.get("action") or "", entry.get("avoid_node") or False
        if action not in ("", *ACTIONS):
            raise ConfigError(f"{key}.action", action, "there is no such action.", f"Known: {', '.join(ACTIONS)}.")
        if not isinstance(avoids, bool):
            raise ConfigError(f"{key}.avoid_node", avoids, "is neither true nor false.")
        try:
            match = re.compile(str(entry["match"]))
        except re.error as error:
            raise ConfigError(f"{key}.match", entry["match"], f"it is no regular expression: {error}.") from error
        hint = str(entry.get("hint", ""))
        found.append(Pattern(match=match, kind=kind, hint=hint, action=action, avoid_node=avoids))
    return tuple(found)


def signal_of(exit_code: int) -> int:
    """The signal's number, or 0: -9 by `subprocess`, 137 by shells, Slurm and Kubernetes."""
    number = -exit_code if exit_code < 0 else exit_code - 128
    return number if 0 < number < signal.NSIG else 0
