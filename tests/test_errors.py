"""What is taken over from other programs' words, and how much is told of thousands of problems."""

import pytest

from loraport.errors import LoraportError, Problems, last_words

TRACE = 'Traceback (most recent call last):\n  File "a.py", line 1, in f\n    f(x)\n    ~^^^\n'


@pytest.mark.parametrize(
    ("said", "expected"),
    [
        ("loading\n" + TRACE + "KeyError: 'rope_type'\n", ["KeyError: 'rope_type'"]),
        (TRACE + "ValueError: two\n\nlines\n", ["ValueError: two", "lines"]),
        (
            TRACE + "KeyError: 1\n\nDuring handling of it:\n\n" + TRACE + "TypeError: 2\n",
            ["TypeError: 2"],
        ),
        (TRACE, TRACE.splitlines()),  # it was killed while it wrote
        ("".join(f"{n}\n" for n in range(20)), [str(n) for n in range(12, 20)]),
        ("", []),
    ],
)
def test_what_a_program_said_last(said, expected):
    assert last_words(said) == expected


def test_of_thousands_of_problems_of_one_kind_the_first_are_told_and_every_kind():
    problems = Problems()
    for number in range(1000):
        problems.add(f"layer {number}", "a slot", "none", "export again")
    problems.add("head", "[2, 3]", "[3, 2]")
    for number in range(51):
        problems.add(f"norm {number}", "a slot", "none")
    with pytest.raises(LoraportError) as raised:
        problems.raise_if_any("it does not fit")
    headline, *lines = str(raised.value).splitlines()
    assert headline == "it does not fit"
    assert lines == [
        *(f"  - layer {number}: expected a slot, got none; export again" for number in range(50)),
        "  - head: expected [2, 3], got [3, 2]",
        *(f"  - norm {number}: expected a slot, got none" for number in range(50)),
        "  - and 950 more: expected a slot, got none; export again",
        "  - and 1 more: expected a slot, got none",
    ]
