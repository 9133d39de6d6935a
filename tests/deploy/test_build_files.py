"""The images' build files: pinned, without root, for any builder; their locks fit the project."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.deploy.building import FILES, IMAGES, BuildFile, context, elsewhere
from tests.deploy.rendering import ROOT, find, rendered, run


@pytest.fixture(scope="module")
def sent(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What a builder is sent."""
    folder = tmp_path_factory.mktemp("context")
    context(folder)
    return folder


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_bases_are_pinned_and_can_be_pinned_to_the_bit(path: Path) -> None:
    build = BuildFile.read(path)
    assert {stage.base for stage in build.stages} == {"${PYTHON_IMAGE}"}
    assert re.fullmatch(r"docker\.io/library/python:3\.11\.\d+-slim-bookworm", build.arguments["PYTHON_IMAGE"])


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_the_image_runs_without_root_as_the_account_of_the_chart(path: Path) -> None:
    last = BuildFile.read(path).stages[-1]
    security = find(rendered("cpu"), "Deployment", "kvpilot-steering")["spec"]["template"]["spec"]["securityContext"]
    assert last.of("USER") == [f"{security['runAsUser']}:{security['runAsGroup']}"]
    assert last.steps.index(("USER", last.of("USER")[0])) > max(
        index for index, (instruction, _) in enumerate(last.steps) if instruction in ("RUN", "COPY")
    )
    assert f"id={security['runAsUser']}\n" in (IMAGES / "account.sh").read_text()


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_what_is_copied_is_sent_and_what_installs_stays_behind(path: Path, sent: Path) -> None:
    build, last = BuildFile.read(path).stages
    assert build.name == "build"
    for stage in (build, last):
        assert not stage.of("ADD")
        for rest in stage.of("COPY"):
            *sources, _ = [word for word in rest.split() if not word.startswith("--")]
            if not rest.startswith("--from="):
                assert all((sent / source).exists() for source in sources)
    assert [rest for rest in last.of("COPY") if rest.startswith("--from=")] == [
        "--from=build /opt/kvpilot /opt/kvpilot"
    ]


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_what_is_written_lies_where_the_chart_mounts_something(path: Path) -> None:
    mounts = {
        mount["mountPath"]
        for name in ("kvpilot-steering", "kvpilot-worker-small")
        for container in find(rendered("cpu"), "Deployment", name)["spec"]["template"]["spec"]["containers"]
        for mount in container["volumeMounts"]
        if not mount.get("readOnly")
    }
    assert mounts == {"/var/cache/kvpilot", "/tmp"}
    written = {
        name: value
        for name, value in BuildFile.read(path).stages[-1].environment().items()
        if name.endswith(("_DIR", "_CACHE", "HOME", "MPLCONFIGDIR"))
    }
    assert {"KVPILOT_CACHE", "NUMBA_CACHE_DIR", "HOME"} <= set(written)
    assert all(any(value == mount or value.startswith(f"{mount}/") for mount in mounts) for value in written.values())


def test_the_sent_context_holds_the_program_and_no_more(sent: Path) -> None:
    assert {path.name for path in sent.iterdir()} == {
        "LICENSE", "README.md", "pyproject.toml", "bench", "cli", "controller", "deploy", "kernels", "models",
        "protos", "workers",
    }  # fmt: skip
    size = sum(path.stat().st_size for path in sent.rglob("*") if path.is_file())
    assert size < 24 << 20, f"{size} bytes"


def test_the_locks_fit_the_project() -> None:
    done = run("images/lock.py", "--check")
    assert done.returncode == 0, f"{done.stderr}\nMake them anew: python deploy/images/lock.py"


def test_the_worker_pins_torch_as_its_lock_does() -> None:
    (pinned,) = re.findall(r"^# (torch==\S+)$", (IMAGES / "worker.txt").read_text(), re.MULTILINE)
    build = BuildFile.read(IMAGES / "worker.Containerfile").stages[0]
    assert f"TORCH={pinned}" in build.of("ARG")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda text: re.sub(r"(?m)^redis==.*\n", "", text), "controller.txt lacks redis"),
        (lambda text: re.sub(r"(?m)^grpcio==.*$", "grpcio==1.2.0", text), "controller.txt has grpcio 1.2.0"),
    ],
)
def test_a_lock_that_does_not_fit_is_found(tmp_path: Path, change, said: str) -> None:
    shutil.copytree(IMAGES, tmp_path / "deploy" / "images")
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    lock = tmp_path / "deploy" / "images" / "controller.txt"
    lock.write_text(change(lock.read_text()))
    done = run(str(tmp_path / "deploy" / "images" / "lock.py"), "--check")
    assert done.returncode == 1
    assert said in done.stderr


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "command '': expected dependencies or program"),
        (["dependencies", "planner", "/nowhere"], "role 'planner': expected controller or worker"),
        (["program", "/src"], "program: expected two arguments, got 1"),
    ],
)
def test_the_install_script_says_what_it_expects(arguments: list[str], said: str) -> None:
    script = ["sh", str(IMAGES / "install.sh"), *arguments]
    done = subprocess.run(script, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert said in done.stderr


def test_the_account_owns_its_cache_and_no_more(tmp_path: Path) -> None:
    (tmp_path / "etc").mkdir()
    done = subprocess.run(
        ["sh", str(IMAGES / "account.sh")], env={"ROOT": str(tmp_path), "PATH": "/usr/bin:/bin"}, check=False
    )
    assert done.returncode == 0, "needs root, as the build of an image has"
    assert "kvpilot:x:10001:10001" in (tmp_path / "etc" / "passwd").read_text()
    assert (tmp_path / "var" / "cache" / "kvpilot").stat().st_uid == 10001
    assert (tmp_path / "models").stat().st_uid == 0


def test_paths_of_an_image_are_found_where_they_begin() -> None:
    folders = {"/opt/kvpilot": Path("/tmp/x/opt/kvpilot"), "/tmp": Path("/tmp/x/tmp"), "/build": Path("/tmp/x/build")}
    said = "sh /build/install.sh program /src /opt/kvpilot && /opt/kvpilot/bin/python /tmp/a /my/tmp"
    here = "/tmp/x/opt/kvpilot"
    assert elsewhere(said, folders) == (
        f"sh /tmp/x/build/install.sh program /src {here} && {here}/bin/python /tmp/x/tmp/a /my/tmp"
    )
