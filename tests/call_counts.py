"""How much work something is, told by the calls that it makes and not by a clock."""

import cProfile
import pstats


def calls(function, *arguments, **named):
    """Return how many calls a call makes, those of built-in functions, too."""
    profile = cProfile.Profile()
    profile.runcall(function, *arguments, **named)
    return pstats.Stats(profile).total_calls
