"""Processes of an evaluation: they share the work, fail in words, and end with what started them."""

import os
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import pytest

from consissr.errors import UserError
from consissr.evaluation import workers
from consissr.evaluation.progress import duration, track

ROOT = Path(__file__).resolve().parents[2]


def half(number: int, by: int = 2) -> float:
    if number < 0:
        raise UserError(f"{number} is negative")
    if number == 13:
        os._exit(1)  # as a process ends that the system kills for its memory
    return number / by


def test_results_come_from_all_processes() -> None:
    assert sorted(workers.results(partial(half, by=4), range(8), 3)) == [n / 4 for n in range(8)]


def test_a_failure_is_raised_here_and_a_death_is_said() -> None:
    with pytest.raises(UserError, match="-1 is negative"):
        list(workers.results(half, [1, -1, 2], 2))
    with pytest.raises(UserError, match="has died .*--jobs"):
        list(workers.results(half, [1, 13, 2], 2))


def test_as_many_as_cores_and_memory_allow(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(workers, "cores", lambda: 8)
    monkeypatch.setattr(workers, "free_gigabytes", lambda: 10.0)
    assert workers.count(None) == 8 and workers.count(None, gigabytes=2.0) == 4
    assert workers.count(None, gigabytes=50.0) == 1 == workers.count(None, "cuda", 0.1)
    assert workers.count(3, gigabytes=50.0) == 3
    with pytest.raises(UserError, match="at least 1"):
        workers.count(0)


SLOW = """
import os, pathlib, sys, time
from consissr.evaluation import workers

def slow(item):
    pathlib.Path(sys.argv[1], str(os.getpid())).touch()
    time.sleep(3)

if __name__ == "__main__":
    try:
        list(workers.results(slow, range(50), 2))
    except KeyboardInterrupt:
        sys.exit("interrupted")
"""


@pytest.mark.parametrize(
    "number", [pytest.param(signal.SIGTERM, marks=pytest.mark.slow), signal.SIGKILL, signal.SIGINT]
)
def test_processes_end_with_their_parent(tmp_path: Path, number: signal.Signals) -> None:
    """SIGINT goes to the whole group, as from a keyboard; one line comes of it."""
    code, folder = tmp_path / "slow.py", tmp_path / "pids"
    code.write_text(SLOW)
    folder.mkdir()
    process = subprocess.Popen(
        [sys.executable, str(code), str(folder)], env=os.environ | {"PYTHONPATH": str(ROOT)},
        stderr=subprocess.PIPE, text=True, start_new_session=True,
    )  # fmt: skip
    deadline = time.monotonic() + 120
    while len(list(folder.iterdir())) < 2 and time.monotonic() < deadline:
        time.sleep(0.1)
    pids = [int(path.name) for path in folder.iterdir()]
    assert len(pids) == 2
    os.killpg(process.pid, number) if number == signal.SIGINT else process.send_signal(number)
    assert process.wait(30) != 0
    errors = process.stderr.read()  # ends when the last process that holds it does
    assert errors.strip() == ("interrupted" if number == signal.SIGINT else "")
    while any(alive(pid) for pid in pids) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not any(alive(pid) for pid in pids)


def alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    stat = Path(f"/proc/{process}/stat")
    return not stat.is_file() or stat.read_text().rsplit(")", 1)[1].split()[0] != "Z"


def test_redirected_progress_speaks(capsys) -> None:
    assert list(track("scoring", "abcd", 4, every=0)) == ["a", "b", "c", "d"]
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 3 and lines[0].startswith("scoring: 1 of 4, ") and lines[0].endswith(" left")
    assert list(track("scoring", "ab", 2)) == ["a", "b"]
    assert capsys.readouterr().err == "", "not before half a minute has passed"
    assert [duration(s) for s in (45, 720, 12600)] == ["45 s", "12 min", "3.5 h"]
