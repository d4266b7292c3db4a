"""Which probes two sides reached at the same time, though each ran alone."""

import pytest

from modernbert_align.core.trace_compare import _in_time


@pytest.mark.parametrize(
    ("ours", "theirs", "found"),
    [
        ("abc", "abc", "abc"),
        ("ac", "abc", "ac"),
        ("abc", "ac", "a"),  # the candidate stands at b, for which the reference never comes
        ("acb", "abc", "ac"),
        ("cab", "abc", "c"),
        ("aabc", "abc", "abc"),
        ("abac", "abc", "abc"),
        ("babc", "abc", "bc"),
        ("abc", "aabbc", "abc"),
        ("", "abc", ""),
        ("abc", "", ""),
    ],
)
def test_a_probe_counts_if_the_candidate_reaches_it_when_the_reference_does(ours, theirs, found):
    assert _in_time(tuple(ours), tuple(theirs)) == set(found)
