"""The dashboard: what it says is so, it fits terminals of any size, costs next to nothing, and stands on a real terminal."""

import fcntl
import io
import os
import pty
import re
import select
import signal
import struct
import subprocess
import sys
import termios
import time

import pytest
from rich.console import Console

from hybrid_opt.config.training import Budget
from hybrid_opt.display.dashboard import Dashboard, display_for
from hybrid_opt.display.dashboard_lines import dashboard_lines, duration, short
from hybrid_opt.display.progress import Lines, Silence
from hybrid_opt.display.run_so_far import POINTS, SMOOTHING, Clock, Curve, RunSoFar
from hybrid_opt.display.sparkline import columns, sparkline, strip
from tests.conftest import PROSE

STATISTICS = {"snr": 1.25, "gradient_norm": 0.4375, "cosine": 0.0125}


def row(step: int, *who: str) -> dict:
    """A line of `metrics.jsonl` in which these acted; its loss falls with the step."""
    part = {"forwards": 3000, "backwards": 0, "forward_equivalents": 8.0, "tokens": 5000, "seconds": 1.5}
    return {
        "step": step,
        "weights": dict.fromkeys(who, 1.0),
        "loss": 2.0 - step / 100,
        "losses": dict.fromkeys(who, 2.0 - step / 100),
        "learning_rates": dict.fromkeys(who, 2e-5),
        "tokens": 5000,
        "seconds": 2.0,
        "forward_equivalents": 8.0,
        "peak_memory_bytes": 4_210_000_000 - step,
        "parts": {name: {**part, "statistics": STATISTICS if name == "es" else {}} for name in who},
    }


def run_so_far(steps: int = 100, budget: Budget | None = None, names=("es", "backprop")) -> tuple[RunSoFar, Clock]:
    """A run of 400 steps after some of them, 3 s each, in which two estimators take turns of 9 and 1."""
    run, clock = RunSoFar(budget), Clock(0.0, fresh=True)
    run.steps = 400
    run.add_evaluation(0, {"loss": 2.0, "accuracy": 0.5})
    for step in range(steps):
        run.add(row(step, names[step % 10 == 9]))
        run.done = (step + 1) / 400
        clock.stepped(3.0 * (step + 1), run.done)
    if steps:
        run.add_evaluation(steps, {"loss": 1.25, "accuracy": 0.8125})
    return run, clock


def text_of(run: RunSoFar, clock: Clock, width: int, height: int = 30) -> str:
    return "\n".join(line.plain for line in dashboard_lines(run, clock, 300.0, width, height))


@pytest.mark.parametrize("width", [60, 100, 160])
def test_the_numbers_are_those_of_the_rows(width):
    text = text_of(*run_so_far(budget=Budget(tokens=5_000_000)), width)
    for expected in (
        "100 of 400", " 25%", "15:00 left", "500k of 5M tokens", "validation  loss 1.2500 (-0.7500)", "accuracy 0.8125 (+0.3125)",
        "after 100 steps", "acting      backprop", "2,500 tokens/s", "2 s a step", "peak memory 4.21 GB",
    ):  # fmt: skip
        assert expected in text
    smoothed = 0.0
    for step in range(100):
        smoothed = SMOOTHING * smoothed + (1 - SMOOTHING) * (2.0 - step / 100)
    assert f"smoothed {smoothed / (1 - SMOOTHING**100):.4f}" in text
    header, es, backprop = text[text.index("estimator ") :].splitlines()[:3]
    wide = {"forwards": "270,000", "backwards": "0", "grad norm": "0.438"} if width > 60 else {}
    expected = {
        "steps": "90",
        "seconds": "135.0",
        "lr": "2e-05",
        "loss": "1.0200",
        "snr": "1.25",
        "cosine": "0.0125",
        **wide,
    }
    titles = [title for title in ("steps", "forwards", "backwards", "seconds", "lr", "loss", "snr", "grad norm", "cosine")
              if title in expected]  # fmt: skip
    assert re.split(r"\s{2,}", header.strip()) == ["estimator", *titles]
    assert es.split() == ["■", "es", *(expected[title] for title in titles)]
    assert backprop.split()[:3] == ["■", "backprop", "10"]
    assert backprop.split()[-1] == "1.0100"


@pytest.mark.parametrize("names", [("es", "backprop"), ("e" * 50, "an_estimator_for_adapters")])
@pytest.mark.parametrize("steps", [0, 1, 100])
def test_it_fits_any_terminal(steps, names):
    for width in (1, 20, 60, 61, 100, 160):
        for height in range(1, 30):
            lines = dashboard_lines(*run_so_far(steps, Budget(seconds=60), names), 300.0, width, height)
            assert 1 <= len(lines) <= height
            assert max(line.cell_len for line in lines) <= width
            assert lines[0].plain.startswith("step"[:width]) or width == 1


def test_what_says_least_is_left_out_first():
    def has(height):
        text = text_of(*run_so_far(), 100, height)
        return [word for word in ("loss   ", "validation", "estimator", "acting", "speed") if word in text]

    assert [has(h) for h in (1, 2, 3, 6, 7, 8)] == [
        [],
        ["loss   "],
        ["loss   ", "validation"],
        ["loss   ", "validation", "estimator"],
        ["loss   ", "validation", "estimator", "acting"],
        ["loss   ", "validation", "estimator", "acting", "speed"],
    ]


def test_curves_strips_and_times():
    assert sparkline([0, 1, 2, 3, 4, 5, 6, 7]) == ["▁▂▃▄▅▆▇█"]
    assert sparkline([0.0, 15.0], rows=2) == [" █", "▁█"]
    assert sparkline([3.0, 3.0]) == ["▁▁"]
    assert sparkline([]) == [""]
    assert columns([1.0, 3.0, 5.0, 7.0, 9.0], 2) == [2.0, 7.0]
    curve = Curve()
    for value in range(2 * POINTS):
        curve.add(float(value))
    assert curve.points == [4 * i + 1.5 for i in range(POINTS // 2)]
    colours = {"es": "cyan", "backprop": "yellow"}
    both = strip([("es",), ("es", "backprop")], colours)
    assert [(span.start, str(span.style)) for span in both.spans] == [(0, "cyan"), (1, "yellow on cyan")]
    assert strip([("es",), ("backprop",)], colours, colourless=True).plain == "eb"
    assert [duration(s) for s in (0, 65.9, 7445)] == ["0:00", "1:05", "2:04:05"]
    assert [short(v) for v in (0.5, 600, 12_300, 5e6, 2.5e9)] == ["0.5", "600", "12.3k", "5M", "2.5G"]


def test_time_left_of_a_resumed_run_knows_only_its_own_pace():
    clock = Clock(100.0, fresh=False)
    assert clock.left(100.0) is None
    clock.stepped(110.0, 0.50)
    assert clock.left(110.0) is None
    clock.stepped(120.0, 0.55)
    assert clock.left(121.0) == pytest.approx(89.0)


def recorded(width: int = 100, height: int = 30) -> Console:
    return Console(record=True, width=width, height=height, force_terminal=True, file=io.StringIO())


def test_said_lines_stay_above_and_the_last_state_below():
    console = recorded()
    dashboard = Dashboard(console)
    dashboard.start(
        20, 400, [row(step, "es") for step in range(20)], [{"step": 0, "loss": 3.0, "seconds": 0.0, "tokens": 0}]
    )
    dashboard.stepped(row(20, "es", "backprop"), 21 / 400)
    dashboard.evaluated(21, {"loss": 2.5})
    dashboard.say("[all] is well")
    dashboard.stop()
    dashboard.stop()
    shown = console.file.getvalue()
    last = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", shown[shown.rindex("\x1b[2K") :])
    assert re.search(r"step +21 of 400.*5%", last)
    assert "loss 2.5000 (-0.5000)" in last
    assert re.search(r"es +21 .*\n.*backprop +1 ", last)
    assert "es + backprop" in last
    for said in ("after 21 steps: loss 2.5000", "[all] is well"):
        assert shown.count(said) == 1
        assert shown.index(said) < shown.rindex("\x1b[2K")
    assert shown.endswith("\x1b[?25h")  # the cursor is back


def test_steps_cost_nothing_and_are_drawn_four_times_a_second():
    console = recorded()
    dashboard = Dashboard(console)
    dashboard.start(0, 10**6)
    rows, costs, begun = [row(step % 100, "es") for step in range(1000)], [], time.perf_counter()
    while time.perf_counter() - begun < 1.1:
        for line in rows:
            started = time.perf_counter()
            dashboard.stepped(line, 0.5)
            costs.append(time.perf_counter() - started)
    seconds = time.perf_counter() - begun
    dashboard.stop()
    assert sorted(costs)[len(costs) // 2] < 1e-4
    drawn = console.file.getvalue().count(" of 1,000,000")
    assert 3 <= drawn <= 3 + seconds / 0.25  # also one at each end, which `stop` draws twice


def test_a_terminal_that_becomes_too_narrow_is_drawn_anew():
    console = recorded()
    dashboard = Dashboard(console)
    dashboard.start(0, 400)
    dashboard.say("kept")
    for step in range(30):
        dashboard.stepped(row(step, "es"), step / 400)
    with dashboard.lock:
        dashboard._draw()
        console.width = 60
        dashboard._draw()
    dashboard.stop()
    shown = console.file.getvalue()
    fresh = shown[shown.rindex("\x1b[2J") :]
    assert fresh.count("kept") == 1
    lines = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", fresh).splitlines()
    assert max(map(len, lines)) <= 59


def test_the_display_suits_where_it_is_shown():
    terminal, pipe = recorded(), Console(file=io.StringIO())
    assert isinstance(display_for("auto", terminal), Dashboard)
    assert isinstance(display_for("auto", pipe), Lines)
    assert isinstance(display_for("lines", terminal), Lines)
    assert isinstance(display_for("none", terminal), Silence)
    dumb = Console(file=io.StringIO(), force_terminal=True, _environ={"TERM": "dumb"})
    assert isinstance(display_for("auto", dumb), Lines)


def test_lines_for_a_pipe():
    console = Console(file=io.StringIO(), width=40)
    lines = display_for("auto", console)
    lines.start(0, 4)
    for step in range(4):
        lines.stepped(row(step, "es"), (step + 1) / 4)
    lines.evaluated(4, {"loss": 1.5, "accuracy": 0.25})
    lines.stop()
    assert console.file.getvalue().splitlines() == [
        *(f"step {s}: es           loss {2.01 - s / 100:.4f}  lr 2e-05  2,500 tok/s" for s in (1, 2, 3, 4)),
        "after 4 steps: loss 1.5000, accuracy 0.2500",
    ]


class Terminal:
    """A command on a pseudo-terminal, and what it has written there."""

    def __init__(self, *command: str, columns: int, rows: int):
        self.master, slave = pty.openpty()
        self.resize(columns, rows)
        sizes = ("COLUMNS", "LINES")  # would be believed more than the terminal
        environment = {k: v for k, v in os.environ.items() if k not in sizes} | {"TERM": "xterm-256color"}
        self.process = subprocess.Popen(
            command, stdin=slave, stdout=slave, stderr=slave, env=environment, start_new_session=True,
            preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),
        )  # fmt: skip
        os.close(slave)
        self.shown = ""

    def resize(self, columns: int, rows: int) -> None:
        fcntl.ioctl(self.master, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))

    def until(self, pattern: str, seconds: float = 60) -> str:
        """What is shown from now on until the pattern is found in it."""
        seen, end = "", time.monotonic() + seconds
        while not re.search(pattern, seen):
            assert time.monotonic() < end, f"no {pattern!r} in {self.shown}"
            if select.select([self.master], [], [], 0.1)[0]:
                try:
                    piece = os.read(self.master, 65536).decode(errors="replace")
                except OSError:  # the other end is closed
                    raise AssertionError(f"no {pattern!r} in {self.shown}") from None
                seen, self.shown = seen + piece, self.shown + piece
        return seen


def test_on_a_real_terminal(write_run, tmp_path):
    path = write_run(
        data={"train": str(PROSE), "validation": 0.01, "text": "text", "max_tokens": 32},
        objective={"type": "causal_lm"},
        training={"steps": 10_000, "batch_size": 2, "probe_rows": 0, "evaluation_rows": 4},
        schedule="backprop_only",
    )
    terminal = Terminal(sys.executable, "-m", "hybrid_opt", "train", str(path), columns=100, rows=30)
    try:
        terminal.until(r"estimator .*loss")
        terminal.resize(60, 20)  # the kernel sends SIGWINCH
        narrow = terminal.until(r"\x1b\[2J[\s\S]*speed")
        fresh = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]|\r", "", narrow[narrow.index("\x1b[2J") :])
        assert "after 0 steps: loss" in fresh  # what was said is still there
        assert max(map(len, re.split(r"\n", fresh))) <= 60
        os.write(terminal.master, b"\x03")
        terminal.until(r"stopping after the current step")
        ended = terminal.until(r"└─")
        assert re.search(r"stopped after \d+ steps \(saved in", ended)
        assert "\x1b[?25h" in ended
        assert terminal.process.wait(20) == 0
    finally:
        if terminal.process.poll() is None:
            os.killpg(terminal.process.pid, signal.SIGKILL)
        os.close(terminal.master)
    steps = int(re.search(r"stopped after (\d+)", terminal.shown)[1])
    assert [p.name for p in (tmp_path / "out/checkpoints").iterdir()] == [f"step-{steps:08d}"]
