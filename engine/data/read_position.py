"""How far the reading of data has come, for a progress line that knows its end."""

from collections.abc import Callable, Sequence
from pathlib import Path

from redi.engine.console import Console, Progress
from redi.engine.data.sources import Source, hub_dataset, saved_files

_MEGABYTE = 1_000_000


class ReadPosition:
    """The bytes of sources that have been read, in their order.

    Attributes:
        total: bytes of all sources (on the hub: of the data set in memory).
    """

    def __init__(self, sources: Sequence[Source]) -> None:
        self._sizes = {source.name: _size(source) for source in sources}
        self.total = sum(self._sizes.values())
        self._before = self._current = 0
        self._share: Callable[[], float] = float

    def begin(self, source: Source, share: Callable[[int], float]) -> None:
        """Begin to read a source.

        Args:
            share: takes the source's bytes; returns how many of them have been read.
        """
        self._before += self._current
        self._current = self._sizes[source.name]
        self._share = lambda: share(self._current)

    @property
    def done(self) -> int:
        """Bytes read; an estimate where rows are counted."""
        return self._before + min(self._current, int(self._share()))


def _size(source: Source) -> int:
    if source.kind == "hub":
        return int(hub_dataset(source.name).data.nbytes)
    path = Path(source.name)
    files = saved_files(path) if source.kind == "saved" else [path]
    return sum(file.stat().st_size for file in files if file.exists())


def _megabytes(count: int) -> int:
    return -(-count // _MEGABYTE)


class ReadProgress:
    """A progress line in megabytes of the sources."""

    def __init__(self, what: str, position: ReadPosition, console: Console) -> None:
        """`what` is done with the data, such as "tokenizing"."""
        total = _megabytes(position.total)
        self._line: Progress = console.progress(f"{what} MB", total, endpoints=False)
        self._shown = 0

    def show(self, done: int, *figures: str) -> None:
        """Show that the bytes up to `done` are finished."""
        more = _megabytes(done) - self._shown
        if more > 0:
            self._shown += more
            self._line.update(more, *figures)

    def close(self) -> None:
        """Leave the line on the screen."""
        self._line.close()
