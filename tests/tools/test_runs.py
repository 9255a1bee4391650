"""Plans of trainings, what is said of their runs, and the command that trains them."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil
import pytest
from conftest import whole_benchmark

from dman_runtime.errors import UsageError
from dman_train.config import BaselineConfig, ModelConfig, to_dict
from dman_train.presets import Preset, decided
from dman_train.run import Run
from tools import run_process, runs
from tools.record_file import Record, add, drop, read_records
from tools.records import record_of
from tools.run_plan import PlannedRun, read_plan
from tools.run_process import RunProcess, claim, log_file
from tools.run_progress import Progress, progress_of

ROOT = Path(__file__).resolve().parents[2]
PAPER = ROOT / "tools" / "plans" / "paper.toml"
TINY = "--preset tiny --epochs 1 --lanes 16"  # the options of the fixture trained_run
WritePlan = Callable[..., Path]


@pytest.fixture
def write_plan(tmp_path: Path, small_log: Path) -> WritePlan:
    """Writes a plan whose log `small` is `small_log`, with these entries of runs."""

    def write(*entries: str, data: str = "") -> Path:
        path = tmp_path / "plan.toml"
        logs = f'[data]\nsmall = "--data {small_log}"\nnone = "--data {tmp_path / "none.csv"}"\n{data}\n'
        path.write_text(logs + "".join(f"[[runs]]\n{entry}\n" for entry in entries))
        return path

    return write


@pytest.fixture
def small(write_plan: WritePlan) -> PlannedRun:
    """The run of a plan that trained_run is."""
    (planned,) = read_plan(write_plan(f'name = "one"\ntrain = "{TINY}"\ndata = "small"'))
    return planned


@pytest.fixture
def directory(trained_run: Path, tmp_path: Path) -> Path:
    """A directory of runs that holds trained_run as one-s0."""
    shutil.copytree(trained_run, tmp_path / "runs" / "one-s0")
    return tmp_path / "runs"


def change_config(run: Path, part: str, **changes: object) -> None:
    config = json.loads((run / "config.json").read_text())
    config[part] |= changes
    (run / "config.json").write_text(json.dumps(config))


def is_claimed(run: Path) -> bool:
    log = claim(run)
    if log is not None:
        log.close()
    return log is None


# Plans


def test_plan_names_a_run_for_each_log_and_seed(write_plan: WritePlan, small_log: Path) -> None:
    first = 'name = "{data}-dman"\ntrain = "--preset tiny"\ndata = ["small", "other"]\nseeds = [0, 3]'
    second = 'name = "latest"\nbaselines = "--system sasrec --history 20"\ndata = "small"'
    plan = read_plan(write_plan(first, second, data='other = "--data b.csv --min-user-events 3"'))
    assert [run.name for run in plan] == [
        "small-dman-s0",
        "small-dman-s3",
        "other-dman-s0",
        "other-dman-s3",
        "latest-s0",
    ]
    assert plan[1].arguments == ("--data", str(small_log), "--preset", "tiny", "--seed", "3")
    assert plan[0].log == small_log and plan[2].log == Path("b.csv")
    model, train, data = plan[3].configs()
    assert isinstance(model, ModelConfig) and (model.width, train.seed, data.min_user_events) == (32, 3, 3)
    baseline = plan[4].configs()[0]
    assert isinstance(baseline, BaselineConfig) and (baseline.system, baseline.history) == ("sasrec", 20)


@pytest.mark.parametrize(
    ("entry", "cause"),
    [
        ('train = ""\ndata = "small"', "has no name"),
        ('name = "a"\ntrain = ""\ndata = "small"\nseed = 1', "unknown key 'seed'"),
        ('name = "a"\ndata = "small"', "needs one of train and baselines"),
        ('name = "a"\ntrain = ""\nbaselines = ""\ndata = "small"', "needs one of train and baselines"),
        ('name = "a"\ntrain = ""\ndata = "small"\nseeds = ["0"]', "seeds that are no list of whole numbers"),
        ('name = "a"\ntrain = ""\ndata = "small"\nseeds = []', "seeds that are no list of whole numbers"),
        ('name = "a"\ntrain = ""\ndata = "absent"', "log 'absent' that the table data lacks"),
        ('name = "a"\ntrain = ""\ndata = 3', "data that is no name of a log or list of them"),
        ('name = "a"\ntrain = "--run=x"\ndata = "small"', "gives --run, which is not for a plan"),
        ('name = "a"\ntrain = "--help"\ndata = "small"', "gives --help, which is not for a plan"),
        ('name = "a"\nbaselines = "-h"\ndata = "small"', "gives -h, which is not for a plan"),
        ('name = "a"\ntrain = "\'"\ndata = "small"', "no command line"),
        ('name = "a"\ntrain = 3\ndata = "small"', "a has arguments that are no text; correct the plan"),
        ('name = "a"\ntrain = ""\ndata = ["small", "none"]', "two runs are called a-s0"),
        ('name = "../a"\ntrain = ""\ndata = "small"', "no name of letters"),
        ('name = "a"\ntrain = ""\ndata = "empty"', "has no --data"),
        ('name = "a"\ntrain = "--widht 3"\ndata = "small"', "a-s0: unrecognized arguments: --widht 3"),
        ('name = "a"\ntrain = "--width 3"\ndata = "small"', "a-s0: width is 3.*; choose"),
    ],
)
def test_plan_that_cannot_work_is_refused(write_plan: WritePlan, entry: str, cause: str) -> None:
    with pytest.raises(UsageError, match=cause):
        read_plan(write_plan(entry, data='empty = ""'))


@pytest.mark.parametrize(
    "text", ["", "[data]\n[[runs]]\nname = ", "[data]\n", "runs = []\n[data]\n", "runs = 3\n[data]\n"]
)
def test_file_that_is_no_plan_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "plan.toml").write_text(text)
    with pytest.raises(UsageError, match=r"plan\.toml"):
        read_plan(tmp_path / "plan.toml")
    with pytest.raises(UsageError, match="cannot be read"):
        read_plan(tmp_path / "absent.toml")


def test_plan_of_the_paper_begins_with_its_model_and_trains_nothing_twice() -> None:
    plan = read_plan(PAPER)
    assert [run.name for run in plan[:3]] == ["paper-s0", "paper-s1", "paper-s2"]
    settings = {run.name: str((run.log, *run.configs())) for run in plan}
    assert len(set(settings.values())) == len(settings)


# Progress


def test_run_without_record_or_directory_is_missing(small: PlannedRun, tmp_path: Path) -> None:
    assert progress_of(small, {}, tmp_path) == Progress("missing", "")


def test_run_with_its_record_is_done(small: PlannedRun, trained_run: Path, tmp_path: Path) -> None:
    record = record_of(Run(trained_run), small.name)
    progress = progress_of(small, {small.name: record}, tmp_path)
    assert progress.kind == "done" and f"HR@10 {record.metric('hr@10'):.4f}" in progress.text


def test_record_of_older_settings_is_that_of_the_run_if_nothing_that_decides_differs(
    write_plan: WritePlan, trained_run: Path, tmp_path: Path
) -> None:
    (planned,) = read_plan(write_plan(f'name = "one"\ntrain = "{TINY} --variant xl"\ndata = "small"'))
    record = record_of(Run(trained_run), planned.name)
    record.content["model"] |= {"variant": "xl", "memory_slots": 3}  # xl has no memory
    del record.content["train"]["adam_beta2"]
    assert progress_of(planned, {planned.name: record}, tmp_path).kind == "done"
    record.content["model"]["layers"] += 1
    assert progress_of(planned, {planned.name: record}, tmp_path).kind == "missing"


def test_earlier_form_of_a_system_does_not_count_and_is_not_continued(write_plan: WritePlan, directory: Path) -> None:
    (planned,) = read_plan(write_plan('name = "one"\nbaselines = "--system shan"\ndata = "small"'))
    model, train, _ = planned.configs()
    record = record_of(Run(directory / planned.name), planned.name)
    found = decided(Preset(model, train), has_times=True, events=record.content["dataset"]["events"], items=9)
    record.content.update(model=to_dict(found.model), train=to_dict(found.train))
    assert progress_of(planned, {planned.name: record}, directory / "none").kind == "done"
    del record.content["model"]["hops"]
    assert progress_of(planned, {planned.name: record}, directory / "none") == Progress(
        "missing", "the record of that name has the form of an earlier version"
    )
    config = json.loads((directory / planned.name / "config.json").read_text()) | {"model": record.content["model"]}
    (directory / planned.name / "config.json").write_text(json.dumps(config))
    progress = progress_of(planned, {}, directory)
    assert progress.kind == "blocked" and "a run with the form of an earlier version" in progress.text


@pytest.mark.parametrize(
    ("part", "changes", "cause"),
    [
        ("train", {"seed": 1}, "other settings"),
        ("model", {"layers": 1}, "other settings"),
        ("model", {"long_term": "light"}, "settings of another version"),
        ("dataset", {"fingerprint": "0" * 64}, "other data"),
    ],
)
def test_record_of_another_run_does_not_count(
    small: PlannedRun, directory: Path, tmp_path: Path, part: str, changes: dict[str, object], cause: str
) -> None:
    record = record_of(Run(directory / small.name), small.name)
    record.content[part] |= changes
    progress = progress_of(small, {small.name: record}, tmp_path)
    assert progress == Progress("missing", f"the record of that name has {cause}")
    change_config(directory / small.name, part, **changes)
    progress = progress_of(small, {}, directory)
    assert progress.kind == "blocked" and cause in progress.text


def test_finished_run_without_record_is_trained(small: PlannedRun, directory: Path) -> None:
    assert progress_of(small, {}, directory).kind == "trained"


def test_run_with_a_checkpoint_is_under_way(small: PlannedRun, directory: Path) -> None:
    (directory / small.name / "metrics.json").unlink()
    assert progress_of(small, {}, directory).kind == "missing", "nothing to continue from"
    (directory / small.name / "checkpoint.pt").touch()
    progress = progress_of(small, {}, directory)
    assert progress.kind == "under way" and "1 of 1 epochs, best validation NDCG@10 0." in progress.text


@pytest.mark.parametrize("config", [True, False])
def test_directory_with_other_files_is_blocked_before_it_would_be_removed(
    small: PlannedRun, directory: Path, tmp_path: Path, config: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    run, notes = directory / small.name, directory / small.name / "notes.txt"
    (run / "metrics.json").unlink()
    if not config:
        (run / "config.json").unlink()
    (run / ".best.pt.tmp").touch()
    assert progress_of(small, {}, directory).kind == "missing", "killed before its first checkpoint"
    notes.write_text("mine")
    progress = progress_of(small, {}, directory)
    assert progress.kind == "blocked" and "holds notes.txt, which is not of a run" in progress.text
    assert train(tmp_path / "plan.toml", tmp_path) == 1
    assert "one-s0: failed: " in capsys.readouterr().out and notes.read_text() == "mine"


def test_list_shows_every_run_and_counts_them(
    write_plan: WritePlan, directory: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plan = write_plan(
        f'name = "one"\ntrain = "{TINY}"\ndata = "small"\nseeds = [0, 1]',
        f'name = "lost"\ntrain = "{TINY}"\ndata = "none"',
    )
    shutil.copytree(directory / "one-s0", directory / "lost-s0")
    options = [str(plan), "--runs", str(directory), "--records", str(tmp_path / "records.parquet")]
    assert runs.main([*options, "--list"]) == 0
    first, second, third, total = capsys.readouterr().out.splitlines()
    assert (first, second) == ("one-s0   trained", "one-s1   missing")
    assert third.startswith("lost-s0  unreadable: ") and "none.csv" in third
    assert total == "1 trained, 1 missing, 1 unreadable"
    assert runs.main([*options, "--dry-run", "--only", "*-s1"]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == "1 missing"
    assert runs.main([*options, "--only", "two-*"]) == 2
    assert "no run of the plan is called two-*; list the runs (--only)" in capsys.readouterr().err


# Training


def train(plan: Path, tmp_path: Path, *options: str) -> int:
    places = ["--runs", str(tmp_path / "runs"), "--records", str(tmp_path / "records.parquet")]
    return runs.main([str(plan), *places, "--device", "cpu", *options])


def test_trained_run_is_recorded_and_its_directory_goes(
    write_plan: WritePlan, directory: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plan, run = write_plan(f'name = "one"\ntrain = "{TINY}"\ndata = "small"'), directory / "one-s0"
    assert train(plan, tmp_path, "--keep-runs") == 0
    (record,) = read_records(tmp_path / "records.parquet")
    assert record.name == "one-s0" and run.exists()
    drop(tmp_path / "records.parquet", ["one-s0"])
    assert train(plan, tmp_path) == 0
    assert [record.name for record in read_records(tmp_path / "records.parquet")] == ["one-s0"] and not run.exists()
    capsys.readouterr()
    assert train(plan, tmp_path) == 0
    assert capsys.readouterr().out == "", "it is done"


def test_run_that_another_call_trains_is_left_alone(
    write_plan: WritePlan, directory: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plan, run = write_plan(f'name = "one"\ntrain = "{TINY}"\ndata = "small"'), directory / "one-s0"
    log = claim(run)
    assert log is not None and claim(run) is None
    assert train(plan, tmp_path) == 0
    out = capsys.readouterr().out
    assert "one-s0: another call trains it" in out and out.splitlines()[-1] == "1 left to another call: one-s0"
    assert run.exists() and not read_records(tmp_path / "records.parquet")
    log.close()
    assert train(plan, tmp_path) == 0
    assert len(read_records(tmp_path / "records.parquet")) == 1


def test_directory_that_a_killed_call_left_beside_its_record_goes(
    write_plan: WritePlan, directory: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plan, run = write_plan(f'name = "one"\ntrain = "{TINY}"\ndata = "small"'), directory / "one-s0"
    add(tmp_path / "records.parquet", record_of(Run(run), "one-s0"))
    assert train(plan, tmp_path, "--keep-runs") == 0 and run.exists()
    log = claim(run)
    assert log is not None and train(plan, tmp_path) == 0 and run.exists(), "another call has it"
    log.close()
    (run / "checkpoint.pt").touch()
    assert train(plan, tmp_path) == 0 and run.exists(), "it trains anew"
    (run / "checkpoint.pt").unlink()
    change_config(run, "train", seed=1)
    assert train(plan, tmp_path) == 0 and run.exists(), "another run"
    (run / "config.json").unlink()
    assert train(plan, tmp_path) == 0 and not run.exists()
    assert capsys.readouterr().out == ""


def test_directory_that_cannot_be_removed_is_one_line(
    write_plan: WritePlan, directory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    def refuse(_path: Path) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(run_process.shutil, "rmtree", refuse)
    assert train(write_plan(f'name = "one"\ntrain = "{TINY}"\ndata = "small"'), tmp_path) == 1
    assert "one-s0 cannot be removed (Permission denied); remove it yourself\n" in capsys.readouterr().out
    assert len(read_records(tmp_path / "records.parquet")) == 1


def test_run_stays_claimed_until_its_directory_is_gone(
    write_plan: WritePlan, directory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan, run = read_plan(write_plan(f'name = "one"\ntrain = "{TINY}"\ndata = "small"')), directory / "one-s0"
    log, seen = claim(run), list[bool]()
    assert log is not None
    worker = runs.Worker([], directory=directory, records=tmp_path / "records.parquet", device="cpu", keep=False)
    worker.running.append(RunProcess(plan[0].name, subprocess.Popen([sys.executable, "-c", ""]), log))

    def watched(records: Path, record: Record) -> None:
        seen.append(is_claimed(run))
        add(records, record)

    def removed(path: Path) -> None:
        seen.append(is_claimed(run))
        shutil.rmtree(path)

    monkeypatch.setattr(runs, "add", watched)
    monkeypatch.setattr(runs, "remove_run", removed)
    assert worker.work(1, 60) == "complete" and not worker.failed
    assert seen == [True, True] and not run.exists() and not is_claimed(run)


def test_directory_of_another_run_is_not_touched(
    write_plan: WritePlan, directory: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    change_config(directory / "one-s0", "train", epochs=9)
    before = sorted(directory.rglob("*"))
    assert train(write_plan(f'name = "one"\ntrain = "{TINY}"\ndata = "small"'), tmp_path) == 1
    assert "one-s0: failed: " in (out := capsys.readouterr().out) and "a run with other settings" in out
    assert sorted(path for path in directory.rglob("*") if path != log_file(directory / "one-s0")) == before


@whole_benchmark
@pytest.mark.slow
def test_failing_run_is_reported_and_does_not_stop_the_others(
    write_plan: WritePlan, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plan = write_plan(
        f'name = "lost"\ntrain = "{TINY}"\ndata = "none"', f'name = "one"\ntrain = "{TINY}"\ndata = "small"'
    )
    assert train(plan, tmp_path, "--jobs", "1") == 1
    out = capsys.readouterr().out
    (line,) = [line for line in out.splitlines() if "lost-s0: failed: " in line]
    assert "failed: exit status 2: " in line and "none.csv: no such file" in line
    assert f"({log_file(tmp_path / 'runs' / 'lost-s0')} has the rest)" in line
    assert out.splitlines()[-1] == "1 failed: lost-s0"
    (record,) = read_records(tmp_path / "records.parquet")
    assert record.name == "one-s0" and f"HR@10 {record.metric('hr@10'):.4f}" in out
    assert "--device cpu" in record.content["command"] and "--threads" not in record.content["command"]


@whole_benchmark
def test_stopped_run_is_continued_by_the_next_call(
    write_plan: WritePlan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    plan, run = (
        write_plan(f'name = "one"\ntrain = "{TINY} --epochs 4 --patience 4"\ndata = "small"'),
        tmp_path / "runs",
    )
    epochs = run / "one-s0" / "metrics.jsonl"

    @contextmanager
    def after_an_epoch() -> Iterator[Callable[[], bool]]:
        yield epochs.exists

    monkeypatch.setattr(runs, "stop_requests", after_an_epoch)
    assert train(plan, tmp_path) == 130
    out, trained = capsys.readouterr().out, len(epochs.read_text().splitlines())
    assert "one-s0: stopped" in out and out.splitlines()[-1] == "stopped; the same command continues"
    assert 1 <= trained < 4 and (run / "one-s0" / "checkpoint.pt").exists()
    monkeypatch.undo()
    assert train(plan, tmp_path) == 0
    assert f"one-s0: continued after {trained} of 4 epochs" in capsys.readouterr().out
    (record,) = read_records(tmp_path / "records.parquet")
    assert [epoch["epoch"] for epoch in record.content["epochs"]] == list(range(1, 5))


@contextmanager
def started(plan: Path, tmp_path: Path) -> Iterator[tuple[subprocess.Popen[str], psutil.Process]]:
    """The real command and the training that it started, which is in an epoch; both are ended."""
    places = ["--runs", str(tmp_path / "runs"), "--records", str(tmp_path / "records.parquet")]
    command = [sys.executable, "-m", "tools.runs", str(plan), *places, "--device", "cpu", "--jobs", "1"]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    training: list[psutil.Process] = []
    try:
        wait_for((tmp_path / "runs" / "one-s0" / "metrics.jsonl").exists)
        training += psutil.Process(process.pid).children()
        assert len(training) == 1
        yield process, training[0]
    finally:
        for one in training:
            with suppress(psutil.NoSuchProcess):
                one.kill()
        process.kill()
        process.communicate()


def wait_for(done: Callable[[], bool], *, seconds: float = 150.0) -> None:
    end = time.monotonic() + seconds
    while not done():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.1)


@whole_benchmark
def test_signal_stops_the_command_and_its_training(write_plan: WritePlan, tmp_path: Path) -> None:
    plan = write_plan(f'name = "one"\ntrain = "{TINY} --epochs 9999 --patience 9999"\ndata = "small"')
    with started(plan, tmp_path) as (command, training):
        command.send_signal(signal.SIGTERM)
        out, _ = command.communicate(timeout=150)
        assert command.returncode == 130 and "one-s0: stopped\n" in out
        assert out.splitlines()[-1] == "stopped; the same command continues"
        assert not training.is_running() and (tmp_path / "runs" / "one-s0" / "checkpoint.pt").exists()


@whole_benchmark
@pytest.mark.slow
def test_training_whose_command_was_killed_keeps_its_claim(
    write_plan: WritePlan, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plan, run = (
        write_plan(f'name = "one"\ntrain = "{TINY} --epochs 9999 --patience 9999"\ndata = "small"'),
        tmp_path / "runs" / "one-s0",
    )
    with started(plan, tmp_path) as (command, training):
        command.kill()
        command.wait()
        assert training.is_running() and is_claimed(run)
        assert train(plan, tmp_path) == 0
        assert "one-s0: another call trains it" in capsys.readouterr().out
        training.terminate()
        wait_for(lambda: not is_claimed(run))
        assert (run / "checkpoint.pt").exists(), "the next call can continue it"


def test_time_ends_what_runs_without_a_failure(
    write_plan: WritePlan, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plan = write_plan(f'name = "one"\ntrain = "{TINY} --epochs 1000 --patience 1000"\ndata = "small"\nseeds = [0, 1]')
    assert train(plan, tmp_path, "--jobs", "1", "--minutes", "0.02") == 0
    out = capsys.readouterr().out
    assert "one-s0: started" in out and "one-s0: stopped" in out and "one-s1" not in out


@pytest.mark.parametrize("options", [["--jobs", "-1"], ["--minutes", "0"], ["--minutes", "nan"]])
def test_numbers_that_make_no_sense_are_refused(write_plan: WritePlan, tmp_path: Path, options: list[str]) -> None:
    assert train(write_plan(f'name = "one"\ntrain = "{TINY}"\ndata = "small"'), tmp_path, *options) == 2


def test_records_that_others_add_are_kept(write_plan: WritePlan, directory: Path, tmp_path: Path) -> None:
    add(tmp_path / "records.parquet", record_of(Run(directory / "one-s0"), "another"))
    assert train(write_plan(f'name = "one"\ntrain = "{TINY}"\ndata = "small"'), tmp_path) == 0
    assert [record.name for record in read_records(tmp_path / "records.parquet")] == ["another", "one-s0"]
