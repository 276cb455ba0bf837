"""Cases of a grid and the rows that stand for them."""

from __future__ import annotations

from turboserve.sim.cases import Case
from turboserve.sim.profile_files import load_profile, shipped_profiles


def test_each_profile_has_rows_of_its_own():
    """Names have dots: 1.3b-h100 and 1.3b-b300 once shared their rows."""
    names = shipped_profiles()
    assert len(names) >= 8 and all(load_profile(name).name == name for name in names)
    assert len({Case("window.csv.gz", "turboserve", profile=name).key for name in names}) == len(names)


def test_where_the_files_lie_changes_no_row():
    here = Case("/a/window.csv.gz", "turboserve", profile="/a/1.3b-h100.json", curve=True)
    assert here.key == Case("window.csv", "turboserve", profile="1.3b-h100").key
