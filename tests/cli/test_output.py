"""Tables in a narrow terminal, in a wide one, and in a file."""

import io
import os
import re

import pytest

from scantly.cli.output import say_table

COLUMNS = ("class", "Dice", "HD95 (voxels)", "missed")
ROWS = (("left ventricle", "0.912 ± 0.031", "3.10 ± 1.22", "0"), ("myocardium", "0.807 ± 0.052", "4.55 ± 2.01", "1"))


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture
def terminal(monkeypatch):
    def show(width: int, *, is_terminal: bool = True, text_columns: int = 1) -> list[str]:
        stream = Terminal() if is_terminal else io.StringIO()
        monkeypatch.setattr("sys.stdout", stream)
        monkeypatch.setattr("shutil.get_terminal_size", lambda: os.terminal_size((width, 24)))
        say_table(COLUMNS, ROWS, title="title", text_columns=text_columns)
        return [re.sub(r"\x1b\[\d*m", "", line).strip() for line in stream.getvalue().splitlines()]

    return show


def test_rows_stay_rows_where_they_fit_and_in_files(terminal) -> None:
    for lines in (terminal(200), terminal(20, is_terminal=False)):
        assert lines[0] == "title"
        assert lines[1].split() == ["class", "Dice", "HD95", "(voxels)", "missed"]
        assert lines[3].split("  ")[0] == "left ventricle"


def test_a_table_turns_before_a_number_is_cut(terminal) -> None:
    lines = terminal(55)
    assert lines[1].split() == ["class", "left", "ventricle", "myocardium"]
    assert [line.split("  ")[0] for line in lines[3:]] == ["Dice", "HD95 (voxels)", "missed"]
    assert "3.10 ± 1.22" in lines[4]
    assert all(number in "".join(terminal(10)) for row in ROWS for number in row)


def test_text_wraps(terminal) -> None:
    assert max(map(len, terminal(40, text_columns=4))) <= 40
