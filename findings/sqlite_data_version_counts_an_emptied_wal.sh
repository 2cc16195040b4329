#!/usr/bin/env bash
# SQLite: `PRAGMA data_version` changes when another connection empties the WAL, though no row has changed.
#
# The pragma is documented as a sign that another connection committed. A checkpoint in the modes PASSIVE, FULL and
# RESTART leaves it alone; TRUNCATE changes it each time, also where the WAL was empty before. Whoever polls it to hear
# of changes hears of one for every TRUNCATE, and where the writer checkpoints after each commit cannot tell the two
# apart. Seen with pysqlite3-binary 0.5.4.post2, which carries a SQLite of its own.
# Source of the expectation: https://www.sqlite.org/pragma.html#pragma_data_version
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check pysqlite3-binary==0.5.4.post2
cd "$folder"
"$folder/venv/bin/python" - <<'PYTHON'
from pysqlite3 import dbapi2 as sqlite3

writer = sqlite3.connect("some.db", isolation_level=None)
writer.execute("PRAGMA journal_mode = WAL")
writer.execute("CREATE TABLE t (x)")
reader = sqlite3.connect("some.db", isolation_level=None)


def version() -> int:
    return int(reader.execute("PRAGMA data_version").fetchone()[0])


def moved(statement: str) -> bool:
    before = version()
    writer.execute(statement).fetchall()
    return version() != before


seen = {"a commit": moved("INSERT INTO t VALUES (1)")}
for mode in ("PASSIVE", "FULL", "RESTART", "TRUNCATE", "TRUNCATE"):
    seen[f"{mode}{' again' if mode in seen else ''}"] = moved(f"PRAGMA wal_checkpoint({mode})")
print("SQLite", sqlite3.sqlite_version, seen)
expected = {"a commit": True, "PASSIVE": False, "FULL": False, "RESTART": False, "TRUNCATE": True, "TRUNCATE again": True}
assert seen == expected, "the behaviour has changed"
PYTHON
