"""How an error is shown."""

from hybrid_opt.errors import error_line


def test_ranks_say_who_they_are():
    assert error_line("a: b", 0) == "error: a: b"
    assert error_line("a: b", 3) == "error (rank 3): a: b"


def test_what_a_terminal_would_act_upon_is_shown_as_text():
    assert error_line("a: \x1b[2J\u202e\r\ud800é🙂\nb\0", 0) == "error: a: \\x1b[2J\\u202e\\r\\ud800é🙂\nb\\x00"


def test_a_line_is_no_longer_than_one_can_read():
    shown = error_line("x" * 10_000 + "\nend", 0)
    assert shown == f"error: {'x' * 997}...\nend"
