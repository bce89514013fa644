"""The terminal: a line for each finished job, errors whole, and Snakemake's own words for whoever asks for them."""

import json
import logging
import os
import re
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import workflow
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from snakemake.settings.types import OutputSettings

from scripts.common import heartbeat, job_lines, progress
from scripts.retrieve import transfer

ROOT = Path(__file__).resolve().parents[1]
TARGET = "results/demo/draw_digits/files.json"
LINE = re.compile(r"^ *(\d+)/(\d+) +\d+ s  (\w+): (.*)$", re.M)


def snakemake(directory: Path, *arguments: str, checkout: Path = ROOT, **variables) -> subprocess.CompletedProcess:
    """Snakemake as users call it, in `directory`."""
    command = [sys.executable, "-m", "snakemake", "--snakefile", str(checkout / "Snakefile"), "--cores", "1"]
    return subprocess.run(
        [*command, *arguments, "--", TARGET],
        cwd=directory, env=os.environ | variables, capture_output=True, text=True, timeout=300,
    )  # fmt: skip


@pytest.fixture
def run(tmp_path) -> Path:
    """A folder with settings of a drawing that takes a second."""
    (tmp_path / "config").mkdir()
    drawing = {"device": "cpu", "results": "results", "demo": {"digits": {"pictures": 20, "image_size": 32}}}
    (tmp_path / "config/config.yaml").write_text(yaml.safe_dump(drawing))
    return tmp_path


@pytest.mark.slow
def test_a_finished_job_is_one_line_with_its_result_and_the_log_file_has_all(run):
    done = snakemake(run)
    assert done.returncode == 0, done.stderr
    (line,) = LINE.findall(done.stderr)
    assert line == ("1", "1", "demo_draw_digits", "Draw the demo's pictures of digits among shapes -> 20 items")
    assert not done.stdout, "a step's words belong into its log"
    for noise in ("Reason:", "Job stats:", "Select jobs", "Finished jobid", "rule demo", "Working directory:"):
        assert noise not in done.stderr
    assert len([text for text in done.stderr.splitlines() if text.strip()]) < 6
    (log,) = (run / ".snakemake/log").iterdir()
    assert "Reason: Missing output files" in log.read_text() and "Finished jobid" in log.read_text()


@pytest.mark.slow
@pytest.mark.parametrize("option", ["--printshellcmds", "--verbose"])
def test_who_asks_for_more_gets_all(run, option):
    done = snakemake(run, option)
    assert done.returncode == 0, done.stderr
    assert not LINE.findall(done.stderr)
    assert "Reason: Missing output files" in done.stderr and "Finished jobid" in done.stderr


@pytest.mark.slow
def test_quiet_is_quieter(run):
    done = snakemake(run, "--quiet", "all")
    assert done.returncode == 0 and not LINE.findall(done.stderr) and "demo_draw_digits" not in done.stderr


@pytest.mark.slow
def test_a_dry_run_says_why(run):
    done = snakemake(run, "--dry-run")
    said = done.stdout + done.stderr
    assert "Reason: Missing output files" in said and "Job stats:" in said and "This was a dry-run" in said


@pytest.mark.slow
def test_a_plugin_that_writes_to_the_terminal_is_left_alone(run, tmp_path_factory):
    place = tmp_path_factory.mktemp("plugins") / "snakemake_logger_plugin_probe"
    place.mkdir()
    (place / "__init__.py").write_text(PLUGIN)
    done = snakemake(run, "--logger", "probe", PYTHONPATH=str(place.parent))
    assert done.returncode == 0, done.stderr
    assert "PROBE job_finished" in done.stderr and not LINE.findall(done.stderr)


PLUGIN = """
import sys
from snakemake_interface_logger_plugins.base import LogHandlerBase

class LogHandler(LogHandlerBase):
    writes_to_stream, writes_to_file, has_filter, has_formatter, needs_rulegraph = True, False, True, True, False

    def emit(self, record):
        print("PROBE", getattr(record, "event", None), file=sys.stderr)
"""


RAISE = "lambda argv: (_ for _ in ()).throw(KilnError('no ink', 'buy some'))"


@pytest.mark.slow
def test_a_failing_job_shows_its_error_and_the_end_of_its_log(run, tmp_path_factory):
    checkout = workflow.copy_checkout(tmp_path_factory.mktemp("checkout"))
    broken = checkout / "scripts/demo/draw_digits.py"
    broken.write_text(broken.read_text().replace("step.run(main)", f"step.run({RAISE})"))
    workflow.edit(broken, "import colorsys\n", "import colorsys\nfrom scripts.common.errors import KilnError\n")
    done = snakemake(run, checkout=checkout)
    assert done.returncode == 1 and not LINE.findall(done.stderr)
    assert re.search(
        r"^ FAILED +\d+ s  demo_draw_digits: .* -> see results/logs/demo/draw_digits.log$", done.stderr, re.M
    )
    assert done.stderr.count("-m scripts.demo.draw_digits") == 1, "the command stands in the report, and nowhere else"
    report = done.stderr.partition("1 job failed:")[2]
    assert (
        "Error: no ink" in report and "Hint: buy some" in report and "log: results/logs/demo/draw_digits.log" in report
    )


class Stream:
    """Lines as the terminal would show them."""

    def __init__(self, applies: bool = True, total: int = 12, results: Path = Path("results")) -> None:
        self.shown: list[str] = []
        inner = logging.Formatter("inner %(message)s")
        self.lines = job_lines.Lines(inner, lambda: total, lambda: applies, results)

    def say(self, message: object, level: int = logging.INFO, **facts) -> None:
        record = logging.makeLogRecord({"msg": message, "levelno": level, "levelname": "", **facts})
        if self.lines.filter(record):
            self.shown.append(self.lines.format(record))


def begin(stream: Stream, number: int, outputs: list[Path], rule: str = "busi_split") -> None:
    facts = {"jobid": number, "rule_name": rule, "rule_msg": "Split", "output": [*map(str, outputs)]}
    stream.say(f" Rule: {rule}", event="job_info", **facts)


def test_of_a_metrics_file_the_first_headlines_are_shown(tmp_path):
    one = {"value": 0.93666, "baseline": 0.62, "baseline_kind": "majority_answer"}
    (tmp_path / "metrics.json").write_text(f'{{"summary": {{"accuracy": {one}, "other": {one}}}}}'.replace("'", '"'))
    (tmp_path / "meta.json").write_text('{"items": 3}')
    stream = Stream()
    begin(stream, 4, [tmp_path / "meta.json", tmp_path / "metrics.json"])
    stream.say("Finished jobid: 4 (Rule: busi_split)", event="job_finished", job_id=4)
    (line,) = stream.shown
    assert line.startswith(" 1/12 ")
    assert line.endswith(
        "busi_split: Split -> accuracy 0.937 (majority answer 0.62), other 0.937 (majority answer 0.62)"
    )


@pytest.mark.parametrize("text", ["", "[]", '{"summary": []}', '{"summary": {"a": {}}}', '{"items": "x"}', "\0"])
def test_records_of_another_form_stop_nothing(tmp_path, text):
    for name in ("metrics.json", "meta.json"):
        (tmp_path / name).write_text(text)
    assert isinstance(job_lines.outcome([str(tmp_path / "metrics.json"), str(tmp_path / "meta.json")]), str)
    assert job_lines.outcome([str(tmp_path / "gone/meta.json"), "pipe (pipe)"]) == ""


def test_warnings_and_errors_always_pass_in_their_own_words():
    stream = Stream()
    stream.say("Building DAG of jobs...")
    stream.say("Select jobs to execute...", level=logging.WARNING)
    stream.say("Error in rule x", level=logging.ERROR, event="job_error", jobid=3)
    stream.say("Trying to restart job 3.")
    assert stream.shown == [
        f"inner {m}" for m in ("Select jobs to execute...", "Error in rule x", "Trying to restart job 3.")
    ]


def test_a_failed_command_is_one_line_and_any_other_error_is_told_whole():
    stream = Stream()
    begin(stream, 3, [])
    command = "CalledProcessError in file \"x.smk\", line 3:\nCommand 'a\nb' returned non-zero exit status 1."
    stream.say(f"RuleException:\n{command}", level=logging.ERROR, event="error")
    stream.say("RuleException:\nKeyError in file x.smk", level=logging.ERROR, event="error")
    stream.say("Error in rule x", level=logging.ERROR, event="job_error", jobid=3, log=["x.log"])
    assert stream.shown[0] == "inner RuleException:\nKeyError in file x.smk"
    assert re.fullmatch(r" FAILED +\d+ s  busi_split: Split -> see x.log", stream.shown[1]), stream.shown
    assert len(stream.shown) == 2 and stream.lines.running() == ""


def test_on_a_cluster_all_is_as_snakemake_says_it():
    stream = Stream(applies=False)
    begin(stream, 1, [])
    stream.say("Finished jobid: 1 (Rule: busi_split)", event="job_finished", job_id=1)
    stream.say("Job stats:", event="run_info")
    assert len(stream.shown) == 3 and all(line.startswith("inner ") for line in stream.shown)


def test_jobs_that_take_long_are_named_until_they_end(monkeypatch, tmp_path):
    monkeypatch.setattr(job_lines, "FIRST_SILENCE", 0.01)
    stream, said, enough = Stream(), [], threading.Event()

    def say(text: str) -> None:
        said.append((time.monotonic(), text))
        if len(said) == 4:
            enough.set()

    begin(stream, 1, [], "coca_train")
    begin(stream, 2, [], "rae_train")
    stream.say("Error in rule rae_train", level=logging.ERROR, event="job_error", jobid=2)
    threading.Thread(target=stream.lines.name_running, args=(say,), daemon=True).start()
    assert enough.wait(10)
    assert {text for _, text in said} == {"running: coca_train (0 s)"}
    stream.lines._running[1][1]["log"] = [str(tmp_path / "train.log")]
    (tmp_path / "train.log").write_text("10:00:00 train: 3 of 9, 1.5/s\n10:00:01 saved\n")
    assert stream.lines.running() == "coca_train (0 s, train: 3 of 9, 1.5/s)"
    gaps = [after[0] - before[0] for before, after in zip(said[:4], said[1:4], strict=False)]
    assert gaps[2] >= 0.079, gaps  # 0.01, 0.02, 0.04, 0.08 s: each silence is twice the one before
    stream.say("Finished jobid: 1", event="job_finished", job_id=1)
    assert stream.lines.running() == ""


def test_a_training_is_told_by_its_heartbeat(tmp_path):
    """Its log has a line for each epoch, which may take hours."""
    stream = Stream(results=tmp_path)
    state = tmp_path / "state/rae/train_autoencoder/main/dinov2"
    log = tmp_path / "logs/rae/train_autoencoder/main/dinov2.log"
    for folder in (state / "key", state / "earlier", log.parent):
        folder.mkdir(parents=True)
    heart = heartbeat.Heartbeat(state / "earlier", 7, 9)
    heart.write()
    begun = json.loads((state / "earlier/heartbeat.json").read_text())["updated"] + 1e-3
    stream.say("", event="job_info", created=begun, jobid=1, rule_name="rae_train", output=[], log=[str(log)])
    while time.time() <= begun:
        time.sleep(1e-3)
    assert re.fullmatch(r"rae_train \(\d+ s\)", stream.lines.running()), "that heartbeat is of an earlier attempt"
    heart = heartbeat.Heartbeat(state / "key", 1200, 24000)
    heart.write()
    assert re.fullmatch(r"rae_train \(\d+ s, step 1,200 of 24,000\)", stream.lines.running())
    heart.turn("evaluating")
    told = json.loads((state / "key/heartbeat.json").read_text()) | {"eta_seconds": 7500}
    (state / "key/heartbeat.json").write_text(json.dumps(told))
    assert re.fullmatch(r"rae_train \(\d+ s, step 1,200 of 24,000, 2h 05m left, evaluating\)", stream.lines.running())
    for text in ("", "[]", "{}"):
        (state / "key/heartbeat.json").write_text(text)
        assert re.fullmatch(r"rae_train \(\d+ s\)", stream.lines.running())


@given(st.floats(0, 1e6))
@settings(deadline=None)
def test_durations_are_short_and_do_not_shrink(seconds):
    text = job_lines.duration(seconds)
    number, unit = text.split()
    size = {"s": 1, "min": 60, "h": 3600}[unit]
    assert abs(float(number) * size - seconds) <= size / 2 + 1e-6 and len(text) <= 8


@pytest.mark.parametrize(
    "asked", [{"quiet": {"all"}}, {"verbose": True}, {"printshellcmds": True}, {"dryrun": True}, {}]
)
def test_the_terminal_handler_is_changed_where_nothing_else_is_asked_for(asked):
    """Without that handler, as where a logger plugin writes to the terminal, nothing is changed either."""
    logger, handler, formatter = logging.Logger("probe"), logging.StreamHandler(), logging.Formatter()
    settings = OutputSettings(**asked)
    assert job_lines.show(logger, settings, lambda: 0, lambda: True, Path()) is None
    handler.name = job_lines.STREAM
    handler.setFormatter(formatter)
    logger.addHandler(handler)
    shown = job_lines.show(logger, settings, lambda: 0, lambda: True, Path())
    assert (handler.formatter is formatter) == (shown is None) == bool(asked)


@pytest.mark.parametrize("total", [4 * 10**9, None])
def test_how_far_a_download_is_is_told(tmp_path, caplog, total):
    log = tmp_path / "retrieve_model.log"
    (tmp_path / "staged").mkdir()
    (tmp_path / "staged/model.safetensors").write_bytes(bytes(10**7))
    with caplog.at_level("INFO", logger="kiln"), pytest.MonkeyPatch.context() as patch:
        patch.setattr(transfer, "LOG_SECONDS", 0.01)
        with transfer.progress("qwen2.5-vl-3b-instruct", tmp_path / "staged", total):
            while not caplog.records:
                time.sleep(0.01)
    log.write_text(f"10:00:01 {caplog.records[0].getMessage()}\n10:00:02 something else\n")
    assert progress.last(log) == f"qwen2.5-vl-3b-instruct: 0.01 GB of {'4.00 GB' if total else '?'}"


def test_the_newest_line_of_progress_is_told(tmp_path, caplog):
    log = tmp_path / "rule.log"
    assert progress.last(log) == ""
    log.write_text("10:00:00 loading 3 of 4\n")
    assert progress.last(log) == ""
    with caplog.at_level("INFO", logger="kiln"), pytest.MonkeyPatch.context() as patch:
        patch.setattr(progress, "LOG_SECONDS", -1)
        list(progress.bar(iter("abc"), "read pairs"))
        list(progress.bar("abc", "train"))
    told = [one.getMessage() for one in caplog.records]
    for line in told:
        with log.open("a") as handle:
            handle.write(f"x\n10:00:01 {line}\n")
        assert progress.last(log) == line
    assert len(told) == 6
    with log.open("a") as handle:
        handle.write("y\n" * 5000)
    assert progress.last(log) == ""
