"""The ledger of a search: which subnets are measured, by which process, and with which errors. It survives a kill of
any of them."""

import json
import sqlite3
import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from filelock import FileLock, Timeout

from modeling_lighthubert import Subnet
from modeling_lighthubert.errors import UserError, user_error


FILE = "evaluations.sqlite3"


class Evaluation(NamedTuple):
    """The measurement of a subnet.

    Attributes:
        number: of the evaluation, from 1.
        errors: after each stage of the fitness; fewer if it was stopped.
        seconds: wall time that it took.
    """

    number: int
    subnet: Subnet
    errors: tuple[float, ...]
    seconds: float


class Ledger:
    """Evaluations in an SQLite file, shared by processes of one machine, and whole after a kill at any moment.

    A subnet is claimed before it is measured, and claimed once. Claims of dead processes are taken over.

    Args:
        folder: for the file, and for a lock that this process holds as long as it lives.

    Raises:
        UserError: the folder cannot be written to, or the file is damaged; of any method: the disk is full.
    """

    def __init__(self, folder: Path):
        self.folder, self.owner = folder, uuid.uuid4().hex
        self.alive = FileLock(folder / f"process-{self.owner}.lock")
        with user_error():
            folder.mkdir(parents=True, exist_ok=True)
            self.alive.acquire()
        # turning to a write-ahead log does not wait for another process that does the same
        with FileLock(folder / ".opening.lock"):
            self.database = sqlite3.connect(folder / FILE, timeout=60, isolation_level=None)
            self._execute("PRAGMA journal_mode=WAL")
            self._execute("PRAGMA synchronous=NORMAL")  # outlives any kill; a power cut may undo the last second
            self._execute(
                "CREATE TABLE IF NOT EXISTS evaluations (number INTEGER PRIMARY KEY, subnet TEXT UNIQUE NOT NULL,"
                " owner TEXT NOT NULL, errors TEXT, seconds REAL, finished INTEGER UNIQUE)"
            )
            self._execute("CREATE TABLE IF NOT EXISTS settings (name TEXT PRIMARY KEY, value TEXT NOT NULL)")

    def _execute(self, statement: str, values: Sequence[Any] = ()) -> sqlite3.Cursor:
        try:
            return self.database.execute(statement, values)
        except sqlite3.DatabaseError as error:
            raise UserError(
                f"{self.folder / FILE} cannot be used ({error}): see to it that the disk has room, and start the same"
                " command again; if it is damaged, delete it"
            ) from error

    def close(self) -> None:
        self.database.close()
        self.alive.release()
        Path(self.alive.lock_file).unlink(missing_ok=True)

    def __len__(self) -> int:
        """Number of evaluations, finished or not."""
        return self._execute("SELECT count(*) FROM evaluations").fetchone()[0]

    def check_settings(self, settings: Mapping[str, Any]) -> None:
        """Keeps the settings of a new search, and compares them with those of one that goes on.

        Raises:
            UserError: evaluations in the file were made with others.
        """
        for name, value in settings.items():
            text = json.dumps(value)
            self._execute("INSERT OR IGNORE INTO settings VALUES (?, ?)", (name, text))
            (kept,) = self._execute("SELECT value FROM settings WHERE name = ?", (name,)).fetchone()
            if kept != text:
                raise UserError(
                    f"{self.folder} has evaluations of a search with {name}={kept}, not {text}: give the same,"
                    " or another --output_dir"
                )

    def claim(self, subnet: Subnet, most: int) -> int | None:
        """Number of the evaluation that this process now has to make; `None` if there are `most` of them already, or
        the subnet is claimed."""
        claimed = self._execute(
            "INSERT OR IGNORE INTO evaluations (subnet, owner)"
            " SELECT ?, ? WHERE (SELECT count(*) FROM evaluations) < ?",
            (subnet.to_json_string(), self.owner, most),
        )
        return claimed.lastrowid if claimed.rowcount else None

    def take_over(self) -> tuple[int, Subnet] | None:
        """Number and subnet of an evaluation that a dead process has left, which this process now has to make."""
        unfinished = self._execute("SELECT number, subnet, owner FROM evaluations WHERE errors IS NULL")
        for number, subnet, owner in unfinished.fetchall():
            if owner == self.owner or self._is_alive(owner):
                continue
            taken = self._execute(
                "UPDATE evaluations SET owner = ? WHERE number = ? AND owner = ?", (self.owner, number, owner)
            )
            if taken.rowcount:
                return number, Subnet.from_json_string(subnet)
        return None

    def _is_alive(self, owner: str) -> bool:
        lock = FileLock(self.folder / f"process-{owner}.lock")
        try:
            lock.acquire(timeout=0)
        except Timeout:
            return True
        lock.release()
        Path(lock.lock_file).unlink(missing_ok=True)
        return False

    def finish(self, number: int, errors: Sequence[float], seconds: float) -> None:
        self._execute(
            "UPDATE evaluations SET errors = ?, seconds = ?, finished = (SELECT count(finished) FROM evaluations)"
            " WHERE number = ?",
            (json.dumps(list(errors)), seconds, number),
        )

    def finished(self, after: int = 0) -> list[Evaluation]:
        """Finished evaluations in the order in which they were finished, without the first `after`."""
        rows = self._execute(
            "SELECT number, subnet, errors, seconds FROM evaluations WHERE finished >= ? ORDER BY finished", (after,)
        )
        return [
            Evaluation(number, Subnet.from_json_string(subnet), tuple(json.loads(errors)), seconds)
            for number, subnet, errors, seconds in rows
        ]
