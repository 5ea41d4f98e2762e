"""The map of the code names every file, once."""

import re
from pathlib import Path

ROOT = Path(__file__).parents[1]


def test_every_file_is_on_the_map_once() -> None:
    rows = (ROOT / "docs" / "code-map.md").read_text(encoding="utf-8").split("| folder |")[0].splitlines()
    named = [name for row in rows if row.startswith("|") for name in re.findall(r"`(\w+)`", row)]
    assert sorted(named) == sorted(path.stem for path in (ROOT / "src" / "coppice").glob("[!_]*.py"))
