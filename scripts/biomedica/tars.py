"""Pairs out of a tar shard that is read once, from front to back, from a file or from a connection.

Neither webdataset nor tarfile's own loop is taken. webdataset expects that members of a key are neighbours, and tells
no offsets to go on from. tarfile takes a damaged header in mid-archive for its end, so that pairs would be lost
unseen. Headers are parsed by tarfile.
"""

import hashlib
import re
import tarfile
from collections.abc import Iterator
from typing import BinaryIO, NamedTuple

IMAGES = ("jpg", "jpeg", "png", "webp")
MAX_PENDING = 512 * 2**20  # bytes of incomplete keys that are kept
_MAX_PREFIX = 2**20  # bytes of a long name or PAX header
_PIECE = 2**20  # bytes read at once, so that no header makes us ask for more memory than the shard fills
_BLOCK = tarfile.BLOCKSIZE
_NAMES = ("utf-8", "surrogateescape")
_KINDS = dict.fromkeys(IMAGES, "image") | {"txt": "text", "json": "json"}
_REFUSED = {
    tarfile.LNKTYPE: "link", tarfile.SYMTYPE: "link", tarfile.CHRTYPE: "device", tarfile.BLKTYPE: "device",
    tarfile.FIFOTYPE: "device", tarfile.GNUTYPE_SPARSE: "sparse file",
}  # fmt: skip
_LONG_NAMES = {tarfile.GNUTYPE_LONGNAME: "path", tarfile.GNUTYPE_LONGLINK: "linkpath"}
_PAX = (tarfile.XHDTYPE, tarfile.SOLARIS_XHDTYPE, tarfile.XGLTYPE)


class TarError(Exception):
    """A damaged shard; its text is the reason."""


class Raw(NamedTuple):
    """Members of one key. `start` is the offset of its first member's header (or of the long name or PAX header before
    it), `end` that after its last member's padding; `*_at` are (offset, bytes) of the data, (0, 0) without."""

    key: str
    image: bytes
    text: bytes
    meta: bytes | None
    start: int
    end: int
    image_at: tuple[int, int]
    text_at: tuple[int, int]
    meta_at: tuple[int, int]


class Bad(NamedTuple):
    """A key that gives no pair, or not a second one."""

    key: str
    reason: str


class Resume(NamedTuple):
    """Where reading can go on; see `Reader.resume`.

    Attributes:
        offset: where in the shard the stream must start.
        given: items (`Raw` and `Bad`) that were given before.
        seen: 16 hexadecimal digits for each key that was given before `offset`.
    """

    offset: int = 0
    given: int = 0
    seen: str = ""


class _Member(NamedTuple):
    name: str
    type: bytes
    start: int  # of its header, or of the first one that belongs to it
    at: int
    size: int


class _Part(NamedTuple):
    """One member of an incomplete key."""

    data: bytes
    at: tuple[int, int]
    start: int
    end: int


def samples(stream: BinaryIO, offset: int = 0) -> Iterator[Raw | Bad]:
    """The pairs of a shard whose `stream` starts at `offset`, a member's header; see `Reader`."""
    return Reader(stream, Resume(offset))


class Reader:
    """Iterates over the pairs of a shard, as `Raw`, and over keys that give none, as `Bad`.

    A pair is given once image, text and json of its key are there, wherever they lie; without a json at the end of the
    shard. Members of other kinds are ignored. A key is refused altogether if one of its names is absolute or holds
    `..`, control characters or no UTF-8, if one is a link or a device, or if two are of one kind before it is given;
    one that comes again is not given again. Each of these is one `Bad`. Over `max_pending` bytes of incomplete keys,
    the oldest that lack no more than a json are given.

    Args:
        stream: gives the shard from `resume.offset` on by `read(n)`, which may give less than n bytes; it is read to
            its end, and not closed. Its errors pass through.
        resume: `resume` of an earlier reader of the same shard; by default the shard's start.
        max_pending: bytes of incomplete keys that are kept.

    Raises (while iterating):
        TarError: the shard is truncated or damaged. All pairs that are whole before it were given.
    """

    def __init__(self, stream: BinaryIO, resume: Resume | None = None, max_pending: int = MAX_PENDING):
        resume = resume or Resume()
        self._stream, self._at, self._next = stream, resume.offset, resume.offset
        self._given, self._skip = (resume.given, 0) if resume.offset else (0, resume.given)
        digits = resume.seen if resume.offset else ""
        self._seen = {digits[i : i + 16] for i in range(0, len(digits), 16)}
        self._refused: set[str] = set()
        self._open: dict[str, dict[str, _Part]] = {}
        self._bytes, self._max = 0, max_pending
        self._items = self._read()

    @property
    def pending(self) -> int:
        """How many incomplete keys are open."""
        return len(self._open)

    @property
    def resume(self) -> Resume:
        """From where another reader gives exactly the items that follow the last one given.

        That is the next member if no key is open and none was refused, else the shard's start: reading from there, the
        items that were given are skipped. Either is done by the reader that gets it.
        """
        if self._open or self._refused or not self._next:
            return Resume(0, self._given)
        return Resume(self._next, self._given, "".join(sorted(self._seen)))

    def __iter__(self) -> Iterator[Raw | Bad]:
        return self

    def __next__(self) -> Raw | Bad:
        while True:
            item = next(self._items, None)
            if item is None and self._given < self._skip:
                raise TarError(f"ends after {self._given} items; {self._skip} were given before: it is another shard")
            if item is None:
                raise StopIteration
            self._given += 1
            if self._given > self._skip:
                return item

    def _read(self) -> Iterator[Raw | Bad]:
        try:
            while (member := self._header()) is not None:
                yield from self._take(member)
        except TarError as error:
            self._next = 0  # what is left over is given for the whole shard, not for the part from here on
            yield from self._left(f"; the shard is damaged: {error}")
            raise
        yield from self._left("")

    def _take(self, member: _Member) -> Iterator[Raw | Bad]:
        key, kind = _key_and_kind(member)
        why = _reason_to_refuse(member)
        if why is None and (kind is None or key in self._refused):
            self._pass_over(member)
            return
        if why is None and _digits(key) in self._seen:
            why = "duplicate key: it was given before in this shard"
        if why is None and kind in self._open.get(key, ()):
            why = f"duplicate key: a second {kind} before the first pair was whole"
        if why is not None:
            self._pass_over(member)
            if key not in self._refused:
                self._refused.add(key)
                self._close(key)
                yield Bad(_printable(key), why)
            return
        while self._bytes + member.size > self._max:
            yield self._oldest(member)
        parts = self._open.setdefault(key, {})
        data = self._data(member)
        parts[kind] = _Part(data, (member.at, member.size), member.start, self._next)
        self._bytes += member.size
        if len(parts) == 3:
            yield self._whole(key)

    def _oldest(self, member: _Member) -> Raw:
        for key, parts in self._open.items():
            if "image" in parts and "text" in parts and key != _key_and_kind(member)[0]:
                return self._whole(key)
        raise TarError(
            f"over {self._max} bytes of incomplete pairs at byte {member.start}, member {_printable(member.name)}"
        )

    def _whole(self, key: str) -> Raw:
        parts = self._close(key)
        self._seen.add(_digits(key))
        image, text, meta = parts["image"], parts["text"], parts.get("json")
        return Raw(
            key, image.data, text.data, meta.data if meta else None,
            min(one.start for one in parts.values()), max(one.end for one in parts.values()),
            image.at, text.at, meta.at if meta else (0, 0),
        )  # fmt: skip

    def _close(self, key: str) -> dict[str, _Part]:
        parts = self._open.pop(key, {})
        self._bytes -= sum(len(one.data) for one in parts.values())
        return parts

    def _left(self, why: str) -> Iterator[Raw | Bad]:
        """What is open at the end of the shard."""
        for key in list(self._open):
            missing = [kind for kind in ("image", "text") if kind not in self._open[key]]
            if missing:
                self._close(key)
                self._seen.add(_digits(key))
                yield Bad(key, f"incomplete: no {' and no '.join(missing)}{why}")
            else:
                yield self._whole(key)

    def _header(self) -> _Member | None:
        """The next member, with the stream at its data; None at the archive's end."""
        start, given = self._at, {}
        while True:
            at = self._at
            block = self._bytes_of(_BLOCK, f"at byte {at}, where a header or the end of the archive should be")
            try:
                info = tarfile.TarInfo.frombuf(block, *_NAMES)
            except tarfile.EOFHeaderError:
                if at != start:
                    raise TarError(f"damaged at byte {at}: the archive ends after a long name or PAX header") from None
                self._end(at)
                return None
            except tarfile.HeaderError as error:
                raise TarError(f"damaged header at byte {at}: {error}") from None
            if info.size < 0:
                raise TarError(f"damaged header at byte {at}: size {info.size}")
            if info.type in _LONG_NAMES:
                given.setdefault(_LONG_NAMES[info.type], _text(self._prefix(info.size, at).split(b"\0", 1)[0]))
            elif info.type in _PAX:
                records = _pax_records(self._prefix(info.size, at), at)
                if info.type != tarfile.XGLTYPE:
                    given |= records
                elif records.keys() & {"path", "size"}:
                    raise TarError(f"a global PAX header with path or size at byte {at}: not supported")
            else:
                return self._member(info, given, start, at)

    def _member(self, info: tarfile.TarInfo, given: dict[str, str], start: int, at: int) -> _Member:
        size = given.get("size", str(info.size))
        if not re.fullmatch(r"[0-9]{1,19}", size):
            raise TarError(f"damaged header at byte {at}: size {size!r}")
        kind = info.type
        if any(name.startswith("GNU.sparse.") for name in given):
            kind = tarfile.GNUTYPE_SPARSE
        if info.type == tarfile.GNUTYPE_SPARSE:
            raise TarError(f"a sparse file at byte {at}: not supported")  # its headers go on in the data
        if info.type in tarfile.SUPPORTED_TYPES and not info.isreg():
            size = "0"  # links, devices and folders have no data, whatever their header says
        return _Member(given.get("path", info.name), kind, start, self._at, int(size))

    def _prefix(self, size: int, at: int) -> bytes:
        if size > _MAX_PREFIX:
            raise TarError(f"damaged header at byte {at}: a name or PAX header of {size} bytes")
        return self._padded(size, f"in the name or PAX header at byte {at}")

    def _data(self, member: _Member) -> bytes:
        data = self._padded(member.size, f"in member {_printable(member.name)}, which starts at byte {member.start}")
        self._next = self._at
        return data

    def _pass_over(self, member: _Member) -> None:
        where = f"in member {_printable(member.name)}, which starts at byte {member.start}"
        left = member.size + -member.size % _BLOCK
        while left:
            left -= len(self._bytes_of(min(left, _PIECE), where))
        self._next = self._at

    def _end(self, at: int) -> None:
        """Reads to the end of the stream: pairs behind the end of the archive would be lost unseen."""
        self._next = at
        while data := self._stream.read(_PIECE):
            if data.count(0) != len(data):
                raise TarError(f"damaged: the archive ends at byte {at}, but more than zeros follow")

    def _padded(self, size: int, where: str) -> bytes:
        data = self._bytes_of(size, where)
        self._bytes_of(-size % _BLOCK, where)
        return data

    def _bytes_of(self, size: int, where: str) -> bytes:
        pieces, left = [], size
        while left:
            piece = self._stream.read(min(left, _PIECE))
            if not piece:
                raise TarError(f"truncated: it ends at byte {self._at}, {where}")
            pieces.append(piece)
            left -= len(piece)
            self._at += len(piece)
        return pieces[0] if len(pieces) == 1 else b"".join(pieces)


def _text(data: bytes) -> str:
    return data.decode(*_NAMES)


def _printable(name: str) -> str:
    return "".join(one if one.isprintable() else ascii(one)[1:-1] for one in name)


def _digits(key: str) -> str:
    return hashlib.sha256(key.encode(*_NAMES)).hexdigest()[:16]


def _key_and_kind(member: _Member) -> tuple[str, str | None]:
    """The name up to the first dot of its last part, as webdataset has it, and which of `_KINDS` follows."""
    name = re.sub(r"^(\./+)+", "", member.name)
    folder, _, last = name.rpartition("/")
    stem, _, ending = last.partition(".")
    if not stem or member.type == tarfile.DIRTYPE:
        return name, None
    return (f"{folder}/{stem}" if folder else name.removesuffix(last) + stem), _KINDS.get(ending.lower())


def _reason_to_refuse(member: _Member) -> str | None:
    name = member.name
    if name.startswith("/"):
        return "absolute name"
    if ".." in name.split("/"):
        return "name with .."
    if not all(one.isprintable() for one in name):
        return "name with control characters or not UTF-8"
    return _REFUSED.get(member.type)


def _pax_records(data: bytes, at: int) -> dict[str, str]:
    """{keyword: value} of records `length keyword=value`, a line each (POSIX.1-2001, pax)."""
    records, place = {}, 0
    while place < len(data):
        found = re.compile(rb"(\d{1,7}) ([^=]+)=").match(data, place)
        end = place + int(found[1]) if found else 0
        if not found or not found.end() < end <= len(data) or data[end - 1 : end] != b"\n":
            raise TarError(f"damaged PAX header at byte {at}")
        records[_text(found[2])] = _text(data[found.end() : end - 1])
        place = end
    return records
