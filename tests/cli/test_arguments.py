import pytest
from hypothesis import given
from hypothesis import strategies as st

from scantly.cli.arguments import join_values, parse_labeled, parse_size, take_debug
from scantly.errors import ConfigError


@pytest.mark.parametrize(
    ("words", "joined"),
    [
        (["--size", "64", "64", "32", "--resume"], ["--size", "64 64 32", "--resume"]),
        (["--size", "64", "64", "data"], ["--size", "64 64", "data"]),
        (["--size=64", "48"], ["--size", "64 48"]),
        (["--size", "wide"], ["--size", "wide"]),
        (["--size"], ["--size"]),
        (["--set", "a=1", "b=[2,3]", "data"], ["--set", "a=1", "--set", "b=[2,3]", "data"]),
        (["--set", "a=1", "--set", "b=2", "c=-3"], ["--set", "a=1", "--set", "b=2", "--set", "c=-3"]),
        (["--set=a=1", "b=2"], ["--set", "a=1", "--set", "b=2"]),
        (["--set", "a=1", "--out=run"], ["--set", "a=1", "--out=run"]),
        (["--", "--size", "1", "2"], ["--", "--size", "1", "2"]),
    ],
)
def test_values_that_belong_to_an_option_are_joined(words: list[str], joined: list[str]) -> None:
    assert join_values(words) == joined


@given(st.lists(st.sampled_from(["train", "7", "a=1", "-x", "--out", "--sizes", "--debug", "-1", ""])))
def test_words_without_such_options_stay_as_they_are(words: list[str]) -> None:
    assert join_values(words) == words


@pytest.mark.parametrize(
    ("words", "kept", "debug"),
    [
        (["--debug", "check", "d"], ["check", "d"], True),
        (["check", "d", "--debug"], ["check", "d"], True),
        (["check", "d"], ["check", "d"], False),
        (["check", "--", "--debug"], ["check", "--", "--debug"], False),
    ],
)
def test_debug_may_stand_anywhere(words: list[str], kept: list[str], debug: bool) -> None:
    assert take_debug(words) == (kept, debug)


def test_size_is_two_or_three_positive_numbers() -> None:
    assert parse_size("256 192") == [256, 192]
    assert parse_size("112 112 80") == [112, 112, 80]
    assert parse_size(None) is None
    for text in ("256", "1 2 3 4", "256x256", "0 16", "-1 16", ""):
        with pytest.raises(ConfigError, match="--size takes H W or H W D"):
            parse_size(text)


def test_labeled_is_a_number_or_a_share() -> None:
    assert (parse_labeled("7"), parse_labeled("10%"), parse_labeled(None)) == (7, "10%", None)
