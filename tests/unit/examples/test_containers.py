"""Containers of the SLURM scripts: refusals, the words for each runtime, signals, the definition file and the build of an image.

bubblewrap is the real one. Apptainer, enroot and pyxis's srun are programs that record their words and run the command itself.
"""

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from megatron_ledom.data.shards.shard import check_shard
from tests.support.fake_srun import TWO_TASKS
from tests.support.legible import legible_documents, legible_tokenizer, write_jsonl
from tests.support.paths import ROOT
from tests.unit.examples.test_slurm_scripts import Cluster

FOLDER = ROOT / "examples/slurm"
RECORD = 'printf "%s\\n" "$(basename "$0")" "$@" >> "$RECORD/words"\n'
APPTAINER = f"""#!/bin/bash
{RECORD}
if [[ $1 == build ]]; then touch "${{@: -2:1}}"; exit; fi
until [[ $1 == *.sif ]]; do shift; done
shift
exec "$@"
"""
PYXIS = f"""#!/bin/bash
[[ $1 == --help ]] && echo "      --container-image=[USER@][REGISTRY#]IMAGE[:TAG]|PATH" && exit
{RECORD}
while [[ $1 == --* ]]; do shift; done
{TWO_TASKS}"""
ENROOT = f"""#!/bin/bash
{RECORD}
while (($#)); do [[ $1 == --output ]] && touch "$2"; shift; done
"""
SCONTROL = """#!/bin/bash
[[ $2 == hostnames ]] && printf 'n7\\nn8\\n' && exit
[[ $2 == node ]] && echo "NodeName=$4 NodeAddr=10.0.0.7 NodeHostName=$4" && exit
echo "$@" >> "$RECORD/queued"
"""


class Containers(Cluster):
    """A folder with fake programs, which also has the project's files where a script looks for them."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        for name, content in {"apptainer": APPTAINER, "enroot": ENROOT, "pyxis": PYXIS, "scontrol": SCONTROL}.items():
            (folder / name).write_text(content)
            (folder / name).chmod(0o755)
        (folder / "examples").symlink_to(ROOT / "examples")
        self.image = folder / "ledom.sif"
        self.image.touch()
        self.variables: dict[str, str] = {}

    def use_pyxis(self) -> None:
        (self.folder / "pyxis").rename(self.folder / "srun")

    def environment(self) -> dict[str, str]:
        return {**super().environment(), "HOME": str(self.folder), **self.variables}

    def source(self, **variables: str) -> "subprocess.CompletedProcess[str]":
        """Read container.sh and print a word of the arrays that it sets in each line."""
        command = 'source examples/slurm/container.sh; printf \'%s\\n\' run: "${container_run[@]}" srun: "${container_srun[@]}"'
        environment = self.environment() | variables
        return subprocess.run(
            ["bash", "-c", command], cwd=self.folder, env=environment, capture_output=True, text=True, check=False
        )

    def words(self) -> list[list[str]]:
        """Return the recorded commands."""
        lines = self.recorded("words").splitlines()
        starts = [number for number, line in enumerate(lines) if line in ("apptainer", "enroot", "srun")]
        return [lines[start:end] for start, end in zip(starts, [*starts[1:], None], strict=True)]


@pytest.fixture
def containers(tmp_path: Path) -> Containers:
    return Containers(tmp_path)


@pytest.mark.parametrize(
    ("variables", "says"),
    [
        ({"CONTAINER_RUNTIME": "apptainer"}, "CONTAINER_RUNTIME=apptainer is set, but CONTAINER is not"),
        ({"CONTAINER": "gone.sif"}, "CONTAINER=gone.sif does not exist"),
        ({"CONTAINER": "./gone.sqsh"}, "CONTAINER=./gone.sqsh does not exist"),
        ({"CONTAINER": "docker://ubuntu"}, "is an address, which every rank would download"),
        ({"CONTAINER": "."}, "CONTAINER=. is a folder: set CONTAINER_RUNTIME to apptainer or bwrap"),
        ({"CONTAINER": "ubuntu"}, "is neither FILE.sif, FILE.sqsh nor REGISTRY#IMAGE:TAG"),
        ({"CONTAINER": "ledom.sif", "CONTAINER_RUNTIME": "pyxis"}, "is not for CONTAINER_RUNTIME=pyxis, which reads FILE.sqsh"),
        ({"CONTAINER": "ledom.sif", "CONTAINER_RUNTIME": "docker"}, "is not one of apptainer, pyxis and bwrap"),
        ({"CONTAINER": "nvcr.io#nvidia/pytorch:1"}, "has no --container-image: SLURM has no pyxis there"),
        ({"CONTAINER": ".", "CONTAINER_RUNTIME": "bwrap"}, "is no folder with the root of a system"),
        ({"CONTAINER": "ledom.sif", "CONTAINER_MOUNTS": "/,/gone:/x"}, "names /gone, which does not exist"),
        ({"CONTAINER": "ledom.sif", "CONTAINER_MOUNTS": "/tmp:/x:rx"}, "is not a list SOURCE[:/TARGET[:ro]]"),
        ({"CONTAINER": "ledom.sif", "CONTAINER_MOUNTS": "/tmp:x"}, "is not a list SOURCE[:/TARGET[:ro]]"),
        ({"CONTAINER": "ledom.sif", "SBATCH_OPTIONS": "-N 2 --container-image=x"}, "both CONTAINER and a --container- option"),
        ({"CONTAINER": "ledom.sif", "APPTAINER_CLEANENV": "1"}, "the ranks would lack SLURM's variables"),
    ],
)
def test_wrong_container_is_refused_before_anything_starts(
    containers: Containers, variables: dict[str, str], says: str
) -> None:
    check_refused(containers, "pretrain", variables, says)


@pytest.mark.parametrize("script", ["preprocess", "evaluate", "evaluate_tasks", "convert", "corpus", "check_hardware"])
def test_every_script_reads_the_container(containers: Containers, script: str) -> None:
    check_refused(containers, script, {"CONTAINER": "gone.sif"}, "CONTAINER=gone.sif does not exist")


def check_refused(containers: Containers, script: str, variables: dict[str, str], says: str) -> None:
    """Check that a script says why it refuses a container, and submits and runs nothing."""
    command = ["bash", f"examples/slurm/{script}.sbatch"]
    environment = containers.environment() | variables
    refused = subprocess.run(
        command, cwd=containers.folder, env=environment, capture_output=True, text=True, check=False, timeout=30
    )
    assert (refused.returncode, containers.recorded("submitted"), containers.recorded("words")) == (2, "", "")
    assert refused.stderr.startswith("error: ")
    assert says in refused.stderr


def test_missing_runtime_is_refused(containers: Containers) -> None:
    """Only the programs that the script itself needs are on the PATH."""
    bare = containers.folder / "bare"
    bare.mkdir()
    for name in ("bash", "env"):
        (bare / name).symlink_to(shutil.which(name) or name)
    for runtime, image in (("apptainer", "ledom.sif"), ("bwrap", "/")):
        refused = containers.source(CONTAINER=image, CONTAINER_RUNTIME=runtime, PATH=str(bare))
        assert refused.returncode == 2
        assert f"there is no {runtime} on" in refused.stderr


def test_words_of_apptainer(containers: Containers) -> None:
    done = containers.source(CONTAINER="ledom.sif", CONTAINER_MOUNTS=f"/usr:/data:ro,{containers.folder}:/runs")
    here = str(containers.folder)
    binds = [f"{here}:{here}:rw", "/usr:/data:ro", f"{here}:/runs:rw"]
    words = ["apptainer", "exec", "--nv", "--pwd", here, *(word for bind in binds for word in ("--bind", bind)), "ledom.sif"]
    assert done.stdout.splitlines() == ["run:", *words, "srun:"], done.stderr


def test_words_of_pyxis(containers: Containers) -> None:
    """A file gets its whole path, an image of a registry does not; NCCL's variables and named ones replace the image's."""
    containers.use_pyxis()
    (containers.folder / "a.sqsh").touch()
    variables = {"NCCL_IB_HCA": "=mlx5_0,mlx5_1", "CONTAINER_ENV": "LD_LIBRARY_PATH", "CONTAINER_MOUNTS": "/usr:/data:ro"}
    for image, word in (("a.sqsh", f"{containers.folder}/a.sqsh"), ("nvcr.io#nvidia/cuda:13", "nvcr.io#nvidia/cuda:13")):
        done = containers.source(CONTAINER=image, **variables)
        options = dict(option.partition("=")[::2] for option in done.stdout.split("srun:\n")[1].splitlines())
        assert options["--container-image"] == word, done.stderr
        here = str(containers.folder)
        assert (options["--container-mounts"], options["--container-workdir"]) == (f"{here}:{here},/usr:/data:ro", here)
        assert {"NCCL_IB_HCA", "PYTHONNOUSERSITE", "LD_LIBRARY_PATH"} <= set(options["--container-env"].split(","))
        assert not [name for name in options["--container-env"].split(",") if name.startswith("SLURM")]
        assert {"--container-readonly", "--container-mount-home", "--no-container-entrypoint"} <= options.keys()


def test_apptainer_gets_named_variables(containers: Containers) -> None:
    command = "source examples/slurm/container.sh; echo $APPTAINERENV_LD_LIBRARY_PATH"
    environment = containers.environment() | {
        "CONTAINER": "ledom.sif",
        "CONTAINER_ENV": "LD_LIBRARY_PATH",
        "LD_LIBRARY_PATH": "/x",
    }
    done = subprocess.run(
        ["bash", "-c", command], cwd=containers.folder, env=environment, capture_output=True, text=True, check=True
    )
    assert done.stdout == "/x\n"


@pytest.mark.parametrize("runtime", ["apptainer", "pyxis"])
@pytest.mark.parametrize("status", [0, 137])
def test_ranks_of_a_container_save_at_the_time_limit_and_their_status_counts(
    containers: Containers, runtime: str, status: int
) -> None:
    image = "ledom.sif"
    if runtime == "pyxis":
        containers.use_pyxis()
        image = "nvcr.io#nvidia/cuda:13"
    containers.variables = {"CONTAINER": image}
    job = containers.start("train.seed=1", seconds=60, status=status, progress="3 7")
    containers.wait_for_ranks()
    job.send_signal(signal.SIGUSR1)
    output, _ = job.communicate(timeout=30)
    assert job.returncode == status, output
    assert containers.recorded("queued") == "requeue 4007"
    assert f"in the container {image} ({runtime}" in output
    assert containers.recorded("rank1") == "-m megatron_ledom.pretrain --config a run.yaml train.seed=1"
    ranks, progress = containers.words()[0], containers.words()[-1]
    assert (ranks[0], progress[0]) == (("srun", "srun") if runtime == "pyxis" else ("apptainer", "apptainer"))
    assert "--progress" in progress
    if runtime == "pyxis":
        assert ranks[1:4] == ["--kill-on-bad-exit=0", "--wait=60", "--cpus-per-task=1"]
        assert progress[1:4] == ["--nodes=1", "--ntasks=1", "--cpus-per-task=1"]
        assert f"--container-image={image}" in ranks
        assert f"--container-image={image}" in progress


BROKEN = {  # a runtime that fails once as pyxis does: srun ends with 1 on the second rank
    "apptainer": 'if [[ "$*" != *--progress* && ${SLURM_PROCID:-0} == 1 ]]; then exit 1; fi\n',
    "pyxis": 'if [[ "$*" != *--progress* ]]; then exit 1; fi\n',
}


@pytest.mark.parametrize("runtime", ["apptainer", "pyxis"])
def test_container_that_does_not_start_is_no_error_of_the_trainer(containers: Containers, runtime: str) -> None:
    """Both end with 1. The trainer's own 1 ends the job; the runtime's is a failure that is tried again."""
    image, program = ("ledom.sif", "apptainer") if runtime == "apptainer" else ("nvcr.io#nvidia/cuda:13", "srun")
    if runtime == "pyxis":
        containers.use_pyxis()
    containers.variables = {"CONTAINER": image}
    assert containers.start(status=1, progress="3 7").wait(timeout=30) == 1
    assert containers.recorded("queued") == ""
    whole = (containers.folder / program).read_text()
    (containers.folder / program).write_text(whole.replace(RECORD, RECORD + BROKEN[runtime]))
    broken = containers.start(status=0, progress="3 7")
    output, _ = broken.communicate(timeout=30)
    assert broken.returncode == 1
    assert f"only {'1' if runtime == 'apptainer' else '0'} of 2 ranks began in their container" in output
    assert "failure 1 since iteration 3" in output
    assert containers.recorded("queued") == "requeue 4007"
    assert not list(containers.folder.glob("*.began"))


def test_ranks_get_the_address_that_slurm_knows(containers: Containers) -> None:
    """Inside there is no scontrol."""
    (containers.folder / "python").write_text(
        '#!/bin/bash\n[[ "$*" == *--progress* ]] && echo "7 7" || echo "$MASTER_ADDR" >> $RECORD/address\n'
    )
    containers.variables = {"CONTAINER": "ledom.sif"}
    assert containers.start().wait(timeout=30) == 0
    assert containers.recorded("address").split() == ["10.0.0.7", "10.0.0.7"]


def test_check_of_the_nodes_needs_a_python_outside(containers: Containers) -> None:
    containers.variables = {"CONTAINER": "ledom.sif", "CHECK_NODES": "1"}
    job = containers.start()
    assert job.wait(timeout=30) == 2
    assert containers.recorded("words") == ""


@pytest.mark.parametrize("runtime", ["apptainer", "pyxis"])
def test_check_of_the_nodes_starts_its_ranks_in_the_container(containers: Containers, runtime: str) -> None:
    (containers.folder / "host_python").write_text(
        f'#!/bin/bash\n[[ $2 == *version_info* ]] && exec {sys.executable} "$@"\nprintf "%s\\n" "$@" >> "$RECORD/check"\n'
    )
    (containers.folder / "host_python").chmod(0o755)
    containers.variables = {"CONTAINER": "ledom.sif", "CHECK_NODES": "1", "HOST_PYTHON": str(containers.folder / "host_python")}
    if runtime == "pyxis":
        containers.use_pyxis()
        containers.variables |= {"CONTAINER": "nvcr.io#nvidia/cuda:13"}
    job = containers.start()
    assert job.wait(timeout=30) == 0
    words = containers.recorded("check").splitlines()
    assert "check-nodes" in words[1]
    expected = str(containers.folder / "python") if runtime == "pyxis" else "examples/slurm/container.sh"
    assert words[words.index("--python") + 1] == expected
    options = [word for word in words if word.startswith("--srun-options=")]
    assert len(options) == (runtime == "pyxis")
    assert all("--container-image=nvcr.io" in option for option in options)


def test_check_before_a_submission_runs_in_the_container(containers: Containers, tmp_path: Path) -> None:
    """With Apptainer here, with pyxis as a job of one task that has the given options."""
    (containers.folder / "python").write_text("#!/bin/bash\n")
    containers.variables = {"CONTAINER": "ledom.sif", "PYTHON": str(containers.folder / "python")}
    command = ["bash", "examples/slurm/pretrain.sbatch"]
    subprocess.run(command, cwd=containers.folder, env=containers.environment(), check=True, capture_output=True)
    containers.use_pyxis()
    containers.variables |= {"CONTAINER": "x#y:1", "CONTAINER_SRUN_OPTIONS": "--partition=debug --time=5"}
    subprocess.run(command, cwd=containers.folder, env=containers.environment(), check=True, capture_output=True)
    apptainer, srun = containers.words()
    assert apptainer[-2:] == srun[-2:] == ["--check", "64"]
    assert srun[1:5] == ["--nodes=1", "--ntasks=1", "--partition=debug", "--time=5"]


def test_array_task_in_a_container_writes_its_shard(containers: Containers, tmp_path: Path) -> None:
    tokenizer = legible_tokenizer(tmp_path / "legible")
    write_jsonl(tmp_path / "a.jsonl", legible_documents(3, 5))
    variables = {
        "CONTAINER": str(containers.image),
        "INPUT": str(tmp_path / "a.jsonl"),
        "TOKENIZER": str(tokenizer),
        "OUTPUT_PREFIX": str(tmp_path / "shard"),
        "NUM_TASKS": "1",
        "SLURM_JOB_ID": "1",
        "SLURM_CPUS_PER_TASK": "1",
        "SLURM_ARRAY_TASK_ID": "0",
        "SLURM_ARRAY_TASK_MAX": "0",
    }
    done = containers.submit("preprocess.sbatch", **variables, PYTHONPATH=str(ROOT))
    assert done.returncode == 0, done.stderr
    assert check_shard(str(tmp_path / "shard")).num_tokens == 3 * 6
    assert len(containers.words()) == 1


has_bubblewrap = pytest.mark.skipif(shutil.which("bwrap") is None, reason="bubblewrap is not installed")


def root_of_a_system(folder: Path) -> Iterator[str]:
    """Make a folder with the links of a root, whose usr is this machine's."""
    for name in ("bin", "sbin", "lib", "lib64"):
        if (Path("/") / name).is_symlink():
            (folder / name).symlink_to(os.readlink(f"/{name}"))
    for name in ("usr", "etc", "home", "scratch"):
        (folder / name).mkdir()
        yield name


@has_bubblewrap
def test_bubblewrap_sees_the_image_and_the_mounts_only(tmp_path: Path) -> None:
    """Outside of the mounts nothing can be written, and nothing of this machine is seen. The image's usr is mounted from here."""
    image, project = tmp_path / "image", tmp_path / "project"
    image.mkdir()
    list(root_of_a_system(image))
    (image / "usr/marker").touch()
    (image / "etc/marker").touch()
    for folder in (project, tmp_path / "data", tmp_path / "home"):
        folder.mkdir()
    (tmp_path / "data/file").write_text("data\n")
    (project / "examples").symlink_to(ROOT / "examples")
    outside = {name: value for name, value in os.environ.items() if not name.startswith("SLURM")}
    mounts = f"/usr:/usr:ro,{tmp_path}/data:/scratch/data:ro"
    variables = {"CONTAINER": str(image), "CONTAINER_RUNTIME": "bwrap", "CONTAINER_MOUNTS": mounts, "PYTHON": "/bin/bash"}
    commands = "cat /scratch/data/file; ls /etc; pwd; touch a; touch /b || touch /scratch/data/c || touch /etc/d || exit 7"
    done = subprocess.run(
        ["bash", "examples/slurm/container.sh", "-c", commands],
        cwd=project,
        env={**outside, **variables, "HOME": str(tmp_path / "home")},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 7, done.stderr
    assert done.stdout.split() == ["data", "marker", str(project)], done.stderr
    assert done.stderr.count("Read-only file system") == 3
    assert (project / "a").exists()


@has_bubblewrap
@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGTERM])
def test_signal_to_every_process_of_a_task_reaches_the_command_and_its_code_comes_back(tmp_path: Path, number: int) -> None:
    """SLURM signals bwrap as well. Without a handler the signal still ends the command."""
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    handler = f"""
import pathlib, signal, sys, time
assert signal.getsignal({int(number)}) == signal.SIG_DFL
signal.signal({int(number)}, lambda *_: sys.exit(9))
pathlib.Path("ready").touch()
time.sleep(30)
"""
    outside = {name: value for name, value in os.environ.items() if not name.startswith("SLURM")}
    variables = {"CONTAINER": "/", "CONTAINER_RUNTIME": "bwrap", "PYTHON": sys.executable}
    command = ["bash", "examples/slurm/container.sh", "-S", "-c", handler]
    task = subprocess.Popen(command, cwd=tmp_path, env={**outside, **variables}, start_new_session=True)
    until = time.monotonic() + 20
    while not (tmp_path / "ready").exists():
        assert time.monotonic() < until
        assert task.poll() is None
        time.sleep(0.02)
    os.killpg(task.pid, number)
    assert task.wait(timeout=20) == 9


SECTIONS = {"help", "setup", "files", "environment", "test", "runscript", "post", "pre", "startscript", "labels", "arguments"}
"""Those that Apptainer accepts: validSections of pkg/build/types/parser/deffile.go."""


def definition() -> dict[str, list[str]]:
    """Return the sections of container.def; the header under an empty name."""
    found: dict[str, list[str]] = {"": []}
    section = ""
    for line in (FOLDER / "container.def").read_text().splitlines():
        if match := re.fullmatch(r"%(\w+)", line):
            section = match[1]
            assert section not in found, "a section twice"
            found[section] = []
        elif not line.startswith("#") and line.strip():
            found[section].append(line.strip())
    return found


def test_definition_file_has_known_sections_and_defines_its_variables() -> None:
    sections = definition()
    assert set(sections) - {""} <= SECTIONS
    header = dict(re.fullmatch(r"(\w+): (.+)", line).groups() for line in sections[""])  # type: ignore[union-attr]
    assert header == {"Bootstrap": "docker", "From": "{{ BASE }}"}
    arguments = dict(line.split("=", 1) for line in sections["arguments"])
    used = re.findall(r"\{\{ (\w+) \}\}", (FOLDER / "container.def").read_text())
    assert set(used) == set(arguments)
    assert re.fullmatch(r"nvcr\.io/nvidia/cuda:13\.0\.\d+-devel-ubuntu24\.04", arguments["BASE"])
    assert arguments["LEDOM_CUDA"] == "1"
    for name in ("post", "test", "environment", "runscript"):
        assert subprocess.run(["sh", "-n"], input="\n".join(sections[name]), text=True, check=False).returncode == 0
    programs = re.findall(r"examples/slurm/(\w+\.sh)", "\n".join(sections["post"] + sections["test"]))
    assert [(FOLDER / name).is_file() for name in programs] == [True, True]


@pytest.fixture
def checkout(containers: Containers) -> Path:
    """A folder with the files that an image is made of."""
    folder = containers.folder / "checkout"
    folder.mkdir()
    for name in ("pyproject.toml", "setup.py", "MANIFEST.in", "README.md", "LICENSE", "constraints", "csrc", "megatron_ledom"):
        (folder / name).symlink_to(ROOT / name)
    (folder / "examples").symlink_to(ROOT / "examples")
    return folder


def build(containers: Containers, checkout: Path, target: str, **variables: str) -> "subprocess.CompletedProcess[str]":
    command = ["bash", "examples/slurm/container_build.sh", target]
    environment = containers.environment() | variables
    return subprocess.run(command, cwd=checkout, env=environment, capture_output=True, text=True, check=False)


def test_image_of_apptainer_is_built_from_a_packed_source(containers: Containers, checkout: Path) -> None:
    done = build(containers, checkout, "x.sif", LEDOM_CUDA_ARCHS="90;100", EXTRAS="te,s3")
    assert done.returncode == 0, done.stderr
    assert (checkout / "x.sif").exists()
    [words] = containers.words()
    assert words == [
        "apptainer",
        "build",
        "--build-arg-file",
        "build/container/arguments",
        "x.sif.part.sif",
        "examples/slurm/container.def",
    ]
    arguments = (checkout / "build/container/arguments").read_text().splitlines()
    assert arguments == ["BASE=nvcr.io/nvidia/cuda:13.0.2-devel-ubuntu24.04", "LEDOM_CUDA_ARCHS=90;100", "EXTRAS=te,s3"]
    packed = subprocess.run(
        ["tar", "-tf", checkout / "build/container/source.tar"], capture_output=True, text=True, check=True
    ).stdout.split()
    assert {"pyproject.toml", "source.txt"} <= set(packed)
    assert "exists; name another file" in build(containers, checkout, "x.sif").stderr


def test_image_of_enroot_is_built_by_the_same_installation(containers: Containers, checkout: Path) -> None:
    done = build(containers, checkout, "x.sqsh", LEDOM_CUDA="0")
    assert done.returncode == 0, done.stderr
    assert (checkout / "x.sqsh").exists()
    words = containers.words()
    assert [command[1] for command in words] == ["import", "create", "start", "export", "remove"]
    assert words[0][-1] == "docker://nvcr.io#nvidia/cuda:13.0.2-devel-ubuntu24.04"
    assert {"--root", "--rw", f"{checkout}/build/container:/mnt", "LEDOM_CUDA=0", "LEDOM_CUDA_ARCHS=80;90;100"} <= set(words[2])
    assert "container_install.sh" in words[2][-1]


def test_target_of_another_kind_is_refused(containers: Containers, checkout: Path) -> None:
    refused = build(containers, checkout, "x.tar")
    assert refused.returncode == 2
    assert "is neither FILE.sif (Apptainer) nor FILE.sqsh" in refused.stderr


PIP = """#!/bin/bash
[[ $2 == pip ]] && {{ echo "constraint $PIP_CONSTRAINT cuda $LEDOM_CUDA extensions $LEDOM_EXTENSIONS: ${{@:3}}" >> {record}; exit; }}
exit 0
"""


@pytest.mark.parametrize("has_cuda_torch", [False, True])
def test_installation_in_an_image_uses_the_tested_versions(tmp_path: Path, has_cuda_torch: bool) -> None:
    """A fake Python makes the environment. An image's own CUDA torch stays: pip gets no pins for it."""
    source, record = tmp_path / "source", tmp_path / "pip"
    (source / "examples").mkdir(parents=True)
    shutil.copytree(FOLDER, source / "examples/slurm")
    shutil.copytree(ROOT / "constraints", source / "constraints")
    (source / "source.txt").write_text("source: abc\n")
    (source / "examples/slurm/container_test.sh").write_text(f'echo "tested $PREFIX" >> {record}\n')
    (tmp_path / "pip_program").write_text(PIP.format(record=record))
    (tmp_path / "pip_program").chmod(0o755)
    (tmp_path / "python").write_text(f"""#!/bin/bash
[[ $2 == *import\\ sys,\\ torch* ]] && exit {int(not has_cuda_torch)}
[[ $1 == -c ]] && echo 3.12 && exit
echo "venv ${{@:3}}" >> {record}
mkdir -p "${{@: -1}}/bin" && cp {tmp_path}/pip_program "${{@: -1}}/bin/python"
""")
    (tmp_path / "python").chmod(0o755)
    variables = {"PYTHON": str(tmp_path / "python"), "PREFIX": str(tmp_path / "env"), "SYSTEM_PACKAGES": "0", "EXTRAS": "s3"}
    script = source / "examples/slurm/container_install.sh"
    done = subprocess.run(["bash", str(script)], env={**os.environ, **variables}, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    pins = tmp_path / "env.pins" if has_cuda_torch else source / "constraints/python3.12.txt"
    lines = record.read_text().splitlines()
    assert lines[0] == f"venv {'--system-site-packages ' * has_cuda_torch}{tmp_path}/env"
    assert lines[1].startswith(f"constraint {pins} cuda 1 extensions 1: --disable-pip-version-check install")
    assert lines[2].endswith("--no-build-isolation .[s3]")
    assert lines[-1] == f"tested {tmp_path}/env"
    assert ("torch==" in pins.read_text()) == (not has_cuda_torch)
    assert "megatron-core==" in pins.read_text()
    assert (tmp_path / "env/source.txt").read_text() == "source: abc\n"
