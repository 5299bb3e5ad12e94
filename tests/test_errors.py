"""What is taken over from other programs' words."""

import pytest

from loraport.errors import last_words

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
