"""Where an attempt comes from: the pure parts, and git and the source archive on small trees."""

from __future__ import annotations

import functools
import gzip
import hashlib
import json
import os
import subprocess
import sys
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from orchestrator.backends import nvml
from orchestrator.config import ProvenanceConfig
from orchestrator.config.identity import PARTS, whole_fingerprint
from orchestrator.provenance import archive, difference, summary, system
from orchestrator.provenance.archive import Limits, Reason
from orchestrator.provenance.datasets import BadDataset, declared, fingerprint
from orchestrator.provenance.fingerprint import code, complete, data, different
from orchestrator.provenance.git import SUBMITTED, Repository, without_credentials
from orchestrator.provenance.record import Recorded, record, told_to_jobs
from orchestrator.provenance.tree import NotSource, is_secret_file, trees

SECRET = "canary-s3cret-1234"
LIMITS = Limits(max_bytes=100_000, max_file_bytes=10_000)
ENVIRON = {
    "PATH": os.environ["PATH"],
    "GIT_CONFIG_GLOBAL": "/dev/null",
    "GIT_CONFIG_SYSTEM": "/dev/null",
    **{f"GIT_{who}_{what}": "ann@example.org" for who in ("AUTHOR", "COMMITTER") for what in ("NAME", "EMAIL")},
}


def git(directory: Path, *arguments: str) -> None:
    subprocess.run(["git", "-C", str(directory), *arguments], env=ENVIRON, check=True, capture_output=True)


def fill(directory: Path, files: dict[str, str]) -> None:
    for name, content in files.items():
        (directory / name).parent.mkdir(parents=True, exist_ok=True)
        (directory / name).write_text(content)


@pytest.fixture(scope="module", autouse=True)
def listed_once() -> Iterator[None]:
    """Reading the metadata of all packages takes most of the time of a record."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(system, "packages", functools.cache(system.packages))
        yield


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A repository with one commit and changes on top: staged, not staged, untracked, ignored, secret."""
    root = tmp_path_factory.mktemp("project")
    fill(root, {"train.py": "lr = 1\n", "gone.py": "", "staged.py": "a = 1\n", ".gitignore": "data/\n", ".env": "x\n"})
    git(root, "init", "-q", "-b", "main")
    git(root, "add", "-f", ".")
    git(root, "commit", "-q", "-m", "first")
    git(root, "remote", "add", "origin", f"https://ann:{SECRET}@example.org/team/project.git?token={SECRET}")
    fill(root, {"train.py": f"lr = 2\npassword = '{SECRET}'\n", "staged.py": "a = 2\n", ".env": f"KEY={SECRET}\n"})
    git(root, "add", "staged.py")
    (root / "gone.py").unlink()
    fill(root, {"new.py": "b = 1\n", "data/big.csv": "1\n", "weights.pt": "w", "sub/deep/x.yaml": "k: 1\n"})
    fill(root, {"venv/pyvenv.cfg": "", "venv/lib/p.py": "", "key.txt": key(), "runs/e/r/log.txt": "l"})
    (root / "away").symlink_to("/etc/hostname")
    (root / "near").symlink_to("train.py")
    return root


def key() -> str:
    return "".join(("-----BEGIN ", "PRIVATE KEY-----\nabc\n", "-----END ", "PRIVATE KEY-----\n"))


def describe(project: Path, directory: Path, **given: Any) -> Recorded:
    directory.mkdir(parents=True, exist_ok=True)
    arguments: dict[str, Any] = {
        "attempt": 2, "config": {"lr": 1}, "config_hash": "c" * 64, "settings": ProvenanceConfig(), "environ": ENVIRON,
        "code_paths": [str(project)], "secrets": [SECRET], "outside": [str(project / "runs")],
        "command": ["orc", "run", f"key={SECRET}"],
    }  # fmt: skip
    return record(directory, **(arguments | given))


@pytest.fixture(scope="module")
def recorded(project: Path, tmp_path_factory: pytest.TempPathFactory) -> Recorded:
    return describe(project, tmp_path_factory.mktemp("run"))


# -- git


def test_git_says_commit_branch_and_what_is_changed(recorded: Recorded) -> None:
    found = recorded.values["git"]
    assert (found["branch"], found["is_dirty"], len(found["commit"]), len(found["tree"])) == ("main", True, 40, 40)
    assert found["changed"] == [".env", "gone.py", "staged.py", "train.py"]
    assert "new.py" in found["untracked"]
    assert not any(name.startswith("data/") for name in found["untracked"])
    assert found["remote"] == "https://example.org/team/project.git"


def test_the_diff_applies_to_the_commit_but_for_secrets(recorded: Recorded, project: Path, tmp_path: Path) -> None:
    diff = next(file for file in recorded.files if file.suffix == ".diff")
    text = diff.read_text()
    assert "+password = '***'" in text
    assert ".env" not in text
    git(tmp_path, "clone", "-q", str(project), "copy")
    git(tmp_path / "copy", "apply", str(diff))
    assert (tmp_path / "copy" / "staged.py").read_text() == "a = 2\n"
    assert not (tmp_path / "copy" / "gone.py").exists()
    assert recorded.values["git"]["diff_sha256"] == hashlib.sha256(diff.read_bytes()).hexdigest()


def test_a_diff_is_cut_at_its_limit(project: Path) -> None:
    repository = Repository.around(project / "sub", ENVIRON)
    assert repository is not None
    assert repository.root == project
    data, is_cut = repository.diff(["train.py", "staged.py"], most=50)
    assert (len(data), is_cut) == (50, True)
    assert repository.diff([], most=50) == (b"", False)


def test_recording_leaves_the_index_alone(project: Path, tmp_path: Path) -> None:
    before = (project / ".git" / "index").read_bytes()
    describe(project, tmp_path)
    assert (project / ".git" / "index").read_bytes() == before
    assert not list(tmp_path.rglob("*.partial"))


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("https://tok3n@github.com/o/r.git", "https://github.com/o/r.git"),
        ("https://u:p@h:8443/o/r?t=1#f", "https://h:8443/o/r"),
        ("git@github.com:o/r.git", "github.com:o/r.git"),
        ("ssh://git@h/o/r", "ssh://h/o/r"),
        ("/srv/git/r", "/srv/git/r"),
    ],
)
def test_a_remote_is_shown_without_who_may_enter(url: str, shown: str) -> None:
    assert without_credentials(url) == shown


def test_a_job_without_git_repeats_what_was_submitted(tmp_path: Path) -> None:
    fill(tmp_path / "code", {"a.py": "1"})
    told = {SUBMITTED: json.dumps({"commit": "abc", "branch": "main"})}
    values = describe(tmp_path / "code", tmp_path / "run", environ=ENVIRON | told).values
    assert values["git"] == {"commit": "abc", "branch": "main"}


def test_what_a_job_is_told_is_what_git_says_here(project: Path, tmp_path: Path) -> None:
    here = describe(project, tmp_path / "here").values["git"]
    told = told_to_jobs(project / "sub", ENVIRON)
    fill(tmp_path / "code", {"a.py": "1"})
    there = describe(tmp_path / "code", tmp_path / "there", environ=ENVIRON | told).values["git"]
    assert here["commit"]
    assert here["changed"]
    assert there == {name: value for name, value in here.items() if not name.startswith("diff_")}
    assert told_to_jobs(tmp_path / "code", ENVIRON) == {}


# -- the archive


def test_the_archive_holds_source_and_no_secret(recorded: Recorded) -> None:
    source = recorded.values["source"]
    file = next(file for file in recorded.files if file.name == source["file"])
    with tarfile.open(file) as tar:
        names = tar.getnames()
        assert names == [".gitignore", "near", "new.py", "staged.py", "sub/deep/x.yaml"]
        assert {member.mtime for member in tar} == {0}
        assert tar.getmember("near").linkname == "train.py"
    assert SECRET.encode() not in gzip.decompress(file.read_bytes())
    reasons = {left["path"]: left["reason"] for left in source["left_out"]}
    assert reasons == {
        ".env": "secret", "weights.pt": "data", "away": "link out of the tree",
        "train.py": "holds a secret", "key.txt": "holds a secret",
    }  # fmt: skip
    assert source["lacks_tracked"]
    assert source["sha256"] == hashlib.sha256(gzip.decompress(file.read_bytes())).hexdigest()
    assert source["file"] == f"source-{source['sha256'][:12]}.tar.gz"


def test_the_same_source_elsewhere_gives_the_same_bytes(tmp_path: Path) -> None:
    for place in ("one", "two"):
        fill(tmp_path / place, {"b.py": "2", "a/c.py": "3", "a.py": "1"})
        os.utime(tmp_path / place / "b.py", (len(place), 10**9 if place == "one" else 1))
        (tmp_path / place / "b.py").chmod(0o600 if place == "one" else 0o664)
    one, two = (describe(tmp_path / place, tmp_path / f"run-{place}") for place in ("one", "two"))
    assert one.values["source"]["sha256"] == two.values["source"]["sha256"]
    again = describe(tmp_path / "one", tmp_path / "run-two", attempt=3)
    assert [file.name for file in sorted((tmp_path / "run-two/provenance").glob("*.gz"))] == [
        again.values["source"]["file"]
    ]
    assert one.values["fingerprint"] == two.values["fingerprint"]
    assert "a.py" in archive.digests(gzip_of(one))


def gzip_of(recorded: Recorded) -> Any:
    return next(file for file in recorded.files if file.suffix == ".gz").open("rb")


def test_without_git_a_gitignore_is_respected_at_every_level(tmp_path: Path) -> None:
    fill(tmp_path, {
        ".gitignore": "*.log\n/out/\n!keep.log\n", "a.py": "", "x.log": "", "keep.log": "", "out/o.py": "",
        "sub/.gitignore": "*.py\n!b.py\n", "sub/a.py": "", "sub/b.py": "", "sub/out/c.txt": "", "node_modules/m.js": "",
        "env/pyvenv.cfg": "", "env/e.py": "", "runs/r.py": "", "skip/s.py": "",
    })  # fmt: skip
    (found,) = trees([tmp_path], environ=ENVIRON, outside=[tmp_path / "runs"], exclude=["skip/"])
    kept = [listed.path for listed in found.files]
    assert kept == [".gitignore", "a.py", "keep.log", "sub/.gitignore", "sub/b.py", "sub/out/c.txt"]


def test_import_paths_outside_the_project_come_under_their_names(tmp_path: Path) -> None:
    fill(tmp_path, {"app/a.py": "", "app/inner/b.py": "", "lib/c.py": "", "other/lib/d.py": ""})
    paths = [tmp_path / name for name in ("app", "app/inner", "lib", "other/lib", "missing")]
    found = trees([*paths, Path(os.__file__).parent], environ=ENVIRON)
    assert [tree.prefix for tree in found] == ["", "@lib/", "@lib-2/"]


def test_a_home_directory_is_not_archived(tmp_path: Path) -> None:
    fill(tmp_path, {"diary.txt": "dear", "project/a.py": ""})
    home = ENVIRON | {"HOME": str(tmp_path)}
    with pytest.raises(NotSource, match="is or contains your home directory"):
        trees([tmp_path], environ=home)
    assert len(trees([tmp_path / "project"], environ=home)[0].files) == 1
    values = describe(tmp_path, tmp_path / "run", environ=home)
    assert "home directory" in values.values["missing"]["source"]
    assert "home directory" in values.warnings[0]
    git(tmp_path, "init", "-q")
    git(tmp_path, "add", "project/a.py")
    assert [listed.path for listed in trees([tmp_path], environ=home)[0].files] == ["project/a.py"]


def test_what_is_too_big_or_has_no_room_is_named_once(tmp_path: Path) -> None:
    fill(tmp_path, {"huge.txt": "x" * 10_001, "a.unknown": "x" * 9000, **{f"m{i}.py": "x" * 9000 for i in range(11)}})
    written = archive.write(tmp_path, trees([tmp_path], environ=ENVIRON), LIMITS)
    reasons = {left.path: left.reason for left in written.left_out}
    assert reasons == {"huge.txt": Reason.too_big, "a.unknown": Reason.no_room}
    assert written.source_bytes == 99_000
    assert written.warning().startswith("2 files are not in the source archive: huge.txt (0.0 MB, too big), a.unknown")
    few, left = archive.select(archive.candidates(trees([tmp_path], environ=ENVIRON)), Limits(
        max_bytes=10**6, max_file_bytes=10**6, max_files=2
    ))  # fmt: skip
    assert len(few) == 2
    assert {out.reason for out in left} >= {Reason.no_room}


@pytest.mark.parametrize("path", [".env", "a/.env.local", "prod.env", "id_ed25519", "x/server.pem", ".ssh/config",
    ".netrc", "client_secret_1.json", "conf/secrets.yaml", ".aws/credentials"])  # fmt: skip
def test_secret_files_are_known_by_name(path: str) -> None:
    assert is_secret_file(path)


@pytest.mark.parametrize("path", ["a.py", "secrets.py", ".env.example", "id_rsa.pub", "environment.yaml", "keys.json"])
def test_harmless_files_are_not_taken_for_secret_ones(path: str) -> None:
    assert not is_secret_file(path)


# -- the record


def test_the_record_is_plain_and_holds_no_secret(recorded: Recorded) -> None:
    document = next(file for file in recorded.files if file.suffix == ".json")
    assert document.name == "attempt-2.json"
    stored = json.loads(document.read_text())
    assert stored == json.loads(json.dumps(recorded.values)) | {"config": {"lr": 1}}
    assert SECRET not in document.read_text()
    assert stored["command"] == ["orc", "run", "key=***"]
    assert stored["packages"]["numpy"] == np.__version__
    assert stored["missing"] == {}
    assert set(stored["fingerprint"]) == {"config", "code", "environment"}


def test_a_probe_that_fails_is_noted_and_hinders_nothing(project: Path, tmp_path: Path) -> None:
    def broken() -> dict[str, Any]:
        raise ConnectionError(f"no cluster at {SECRET}")

    (tmp_path / "provenance").write_text("a file where the directory should be")
    found = describe(project, tmp_path, resources=broken, environ=ENVIRON | {"PATH": "/nowhere"})
    assert set(found.values["missing"]) == {"directory", "resources", "git", "source", "document"}
    assert found.values["missing"]["resources"] == "no cluster at ***"
    assert "git is not installed" in found.values["missing"]["git"]
    assert (found.files, found.values["git"]) == ((), {})
    assert found.values["packages"]


def test_resources_without_limit_are_strict_json(project: Path, tmp_path: Path) -> None:
    settings = ProvenanceConfig(source=False)
    found = describe(project, tmp_path, settings=settings, resources=lambda: {"nodes": ({"memory_gb": float("inf")},)})
    assert found.values["resources"] == {"nodes": [{"memory_gb": "inf"}]}
    assert (found.values["source"], [file.suffix for file in found.files]) == ({}, [".diff", ".json"])


def test_a_working_directory_that_is_gone_does_not_fail_a_run(tmp_path: Path) -> None:
    before = os.getcwd()
    (tmp_path / "gone").mkdir()
    os.chdir(tmp_path / "gone")
    try:
        (tmp_path / "gone").rmdir()
        found = describe(tmp_path, tmp_path / "run", code_paths=[])
        assert found.values["directory"] == ""
        assert found.files
    finally:
        os.chdir(before)


# -- containers


@pytest.mark.parametrize(
    ("files", "environ", "known"),
    [
        ({}, {}, {}),
        ({".dockerenv": "", "proc/self/mountinfo": f"1 /docker/containers/{'a' * 64}/hostname /etc/hostname -"},
         {"ORC_IMAGE_DIGEST": "sha256:12"}, {"engine": "docker", "id": "a" * 64, "image_digest": "sha256:12"}),
        ({"run/.containerenv": f'engine="podman-4"\nid="{"b" * 64}"\nimage="reg/x:1"\nimageid="{"c" * 64}"\n'}, {},
         {"engine": "podman", "id": "b" * 64, "image": "reg/x:1", "image_id": "c" * 64}),
        ({"proc/self/cgroup": f"1:cpu:/kubepods/pod1/{'d' * 64}\n"},
         {"KUBERNETES_SERVICE_HOST": "10.0.0.1", "HOSTNAME": "w-0"}, {"id": "d" * 64, "kubernetes": "w-0"}),
        ({}, {"APPTAINER_CONTAINER": "/x.sif"}, {"engine": "apptainer", "image": "/x.sif"}),
    ],
)  # fmt: skip
def test_a_container_says_only_what_can_be_known(
    files: dict[str, str], environ: dict[str, str], known: dict[str, str], tmp_path: Path
) -> None:
    fill(tmp_path, files)
    assert system.container(environ, tmp_path) == known


def test_the_memory_limit_of_a_control_group_counts(tmp_path: Path) -> None:
    assert system.memory_limit(tmp_path) is None
    fill(tmp_path, {"sys/fs/cgroup/memory.max": "max\n", "sys/fs/cgroup/memory/memory.limit_in_bytes": "4096\n"})
    assert system.memory_limit(tmp_path) == 4096


# -- fingerprints


def test_code_is_the_archive_wherever_it_lies_and_else_the_commit_with_its_changes() -> None:
    one = code({"tree": "t"}, {"sha256": "s"})
    assert one == code({}, {"sha256": "s"})
    assert one != code({"tree": "t"}, {"sha256": "s2"})
    without = [code({"tree": "t"}, {}), code({"tree": "t", "diff_sha256": "d"}, {})]
    assert len({one, *without}) == 3
    lacking = {"sha256": "s", "lacks_tracked": True}
    assert code({"tree": "t"}, lacking) != code({"tree": "u"}, lacking)
    assert code({"tree": "t", "untracked": ["a.py"]}, {}) == code({}, {}) == ""


def test_data_is_known_by_its_fingerprint_and_else_by_its_address() -> None:
    def of(**given: Any) -> str:
        return data(dict([declared("d", **given)]))

    assert of(fingerprint="f", uri="/a") == of(fingerprint="f", uri="/b")
    assert of(uri="/a") != of(uri="/b")
    assert of(fingerprint="f") != of(fingerprint="g")
    assert data({}) == ""


def test_an_unknown_part_is_equal_to_nothing_but_no_data_is_no_data() -> None:
    parts = {"config": "c", "code": "k", "environment": "e"}
    full = complete(parts)
    assert full["run"] == whole_fingerprint(parts) != ""
    assert set(different(full, full).values()) == {"same"}
    assert different(full, complete({**parts, "data": "d", "code": "x"})) == {
        "config": "same", "code": "differs", "data": "differs", "environment": "same",
    }  # fmt: skip
    empty = complete({}, "c")
    assert empty["run"] == ""
    assert different(empty, full) == {part: "same" if part in ("config", "data") else "unknown" for part in PARTS}


def test_files_count_by_name_and_content(tmp_path: Path) -> None:
    fill(tmp_path, {"one/a": "1", "one/b/c": "2", "two/a": "1", "two/b/c": "2", "three/a": "12", "three/b/c": ""})
    one, two, three = (fingerprint(tmp_path / name) for name in ("one", "two", "three"))
    assert one == two != three
    assert one.startswith("xxh128:")
    assert fingerprint(str(tmp_path / "one"), method="sha256").startswith("sha256:")
    files = [tmp_path / "one/a", tmp_path / "one/b/c"]
    assert fingerprint(files) == fingerprint(files[::-1])
    cheap = fingerprint(tmp_path / "one", method="stat")
    os.utime(tmp_path / "one/a", (1, 1))
    assert cheap.startswith("stat:")
    assert fingerprint(tmp_path / "one", method="stat") != cheap
    assert fingerprint(tmp_path / "one") == one


def test_arrays_count_by_type_shape_and_values() -> None:
    a = np.arange(6, dtype=np.float32)
    seen = {fingerprint(x) for x in (a, a.reshape(2, 3), a.astype(np.float64), a + 1, [a, a], {"a": a}, b"abc")}
    assert len(seen) == 7
    assert fingerprint(a.reshape(2, 3).T) == fingerprint(np.ascontiguousarray(a.reshape(2, 3).T))
    assert fingerprint(a.astype(">f4")) == fingerprint(a)
    assert fingerprint(np.zeros(0)) != fingerprint(np.zeros((0, 3)))


@pytest.mark.parametrize("bad", [lambda: fingerprint(3), lambda: fingerprint("/nowhere/at/all"),
    lambda: fingerprint(np.array([object()])), lambda: fingerprint(np.zeros(1), method="stat"),
    lambda: fingerprint("x", method="md5"), lambda: declared(""), lambda: declared("d", size=-1)])  # fmt: skip
def test_what_has_no_fingerprint_is_refused(bad: Callable[[], Any]) -> None:
    with pytest.raises(BadDataset):
        bad()


def test_an_address_is_kept_without_what_opens_it() -> None:
    key, values = declared("d", split="train", uri="https://u:pw@h/x.tar?X-Signature=abc", size=3)
    assert (key, values) == ("d/train", {"name": "d", "split": "train", "uri": "https://u:***@h/x.tar", "size": 3})


# -- differences and summaries


def test_changes_of_packages_files_and_machines_are_named() -> None:
    a = {"packages": {"x": "1", "y": "1"}, "ranks": {"0": {"host": "h1", "pid": 1}}, "python": "3.11.1"}
    b = {"packages": {"x": "2", "z": "1"}, "ranks": {"0": {"host": "h2", "pid": 2}}, "python": "3.11.1"}
    assert difference.package_changes(a, b) == {
        "added": {"z": "1"}, "removed": {"y": "1"}, "changed": {"x": ["1", "2"]},
    }  # fmt: skip
    changes = difference.change_documents(difference.system_changes(a, b))
    assert changes == [{"key": "ranks.hosts", "a": ["h1"], "b": ["h2"]}]
    assert difference.file_changes({"a": "1", "b": "1"}, {"b": "2", "c": "1"}) == {
        "added": ["c"], "removed": ["a"], "changed": ["b"],
    }  # fmt: skip
    assert difference.patch("f", "1\n2\n", "1\n3\n")[-2:] == ["-2", "+3"]
    assert difference.patch("f", None, "x") == ["f: no text"]
    assert len(difference.patch("f", "", "x\n" * 1000)) == difference.MAX_LINES + 1


def test_one_line_tells_the_code_and_one_the_fingerprint(recorded: Recorded) -> None:
    line = summary.code_line(recorded.values)
    commit = recorded.values["git"]["commit"]
    assert line.startswith(f"main {commit[:12]}, 4 changed, ")
    assert summary.code_line({"source": {"sha256": "f" * 64}}) == f"source {'f' * 12} (no git)"
    assert summary.fingerprint_line({"fingerprint": {"config": "c" * 64, "run": "9" * 64}}) == (
        "999999999999 = config cccccccc, code unknown, data none, environment unknown"
    )
    assert (summary.code_line({}), summary.fingerprint_line({})) == ("", "")


class Driver:
    """What pynvml offers, of a host with two GPUs; without one when `is_there` is False."""

    class NVMLError(Exception):
        pass

    is_there = True
    opened = 0

    def nvmlInit(self) -> None:
        if not self.is_there:
            raise self.NVMLError("Driver Not Loaded")
        self.opened += 1

    def nvmlShutdown(self) -> None:
        self.opened -= 1

    def nvmlSystemGetCudaDriverVersion_v2(self) -> int:
        return 12090

    def nvmlSystemGetDriverVersion(self) -> bytes:
        return b"575.57.08"

    def nvmlDeviceGetCount(self) -> int:
        return 2

    def nvmlDeviceGetHandleByIndex(self, index: int) -> int:
        return index

    def nvmlDeviceGetName(self, handle: int) -> str:
        return f"GPU {handle}"


def test_the_driver_is_asked_and_silence_is_no_error(monkeypatch: pytest.MonkeyPatch) -> None:
    driver = Driver()
    monkeypatch.setitem(sys.modules, "pynvml", driver)  # type: ignore[arg-type]
    assert nvml.gpus() == {"driver": "575.57.08", "cuda": "12.9", "devices": ["GPU 0", "GPU 1"]}
    assert driver.opened == 0
    driver.is_there = False
    assert nvml.gpus() == {}
