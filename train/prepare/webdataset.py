"""Samples from webdataset tars as img2dataset writes them: KEY.jpg, KEY.txt, KEY.json, and TAR.parquet beside them."""

from __future__ import annotations

import json
import os
import tarfile
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from train.prepare.parquet import plain
from train.prepare.rejects import Broken, Rejected
from train.prepare.sources import Bad, Row, Unit, text_or_none, too_large
from train.shapes.corpus import BadArgument

IMAGES = ("jpg", "jpeg", "png", "webp")
OTHER_IMAGES = ("gif", "bmp", "tif", "tiff", "avif", "heic", "svg", "jxl")  # listed as unusable, not overlooked
LONGEST_TEXT = 16 << 20  # bytes of a caption or JSON member
SUFFIXES = (".tar",)
COMPRESSED = (".gz", ".tgz", ".bz2", ".xz", ".zst", ".zstd")


def members(tar: tarfile.TarFile) -> Iterator[tarfile.TarInfo]:
    """The members one by one, none kept. Raises: Broken where the archive ends without its end mark.

    tarfile takes a header that is cut or overwritten for the end, in silence.
    """
    try:
        while (member := tar.next()) is not None:
            tar.members.clear()  # type: ignore[attr-defined]
            yield member
    except (tarfile.TarError, OSError, ValueError, EOFError) as error:
        raise Broken(f"{type(error).__name__}: {error}") from None
    tar.fileobj.seek(tar.offset)
    mark = tar.fileobj.read(tarfile.BLOCKSIZE)
    if mark != bytes(tarfile.BLOCKSIZE):
        raise Broken(f"no end of archive at byte {tar.offset}: cut off, or overwritten")


def samples(tar: tarfile.TarFile) -> Iterator[tuple[str, dict[str, tarfile.TarInfo]]]:
    """(key, members by extension) of neighbours with one key: the name up to the first dot of its last part.

    A second member of one name begins another sample.
    """
    key, group = "", {}  # type: str, dict[str, tarfile.TarInfo]
    try:
        for member in members(tar):
            folder, name = os.path.split(member.name)
            if not member.isreg() or name.startswith("."):
                continue
            stem, _, extension = name.partition(".")
            own, extension = f"{folder}/{stem}" if folder else stem, extension.lower()
            if group and (own != key or extension in group):
                yield key, group
                group = {}
            key, group[extension] = own, member
    except Broken:
        if group:
            yield key, group
        raise
    if group:
        yield key, group


def _read(file: Any, member: tarfile.TarInfo) -> bytes:
    """A member's bytes. Raises: Rejected where the archive ends within it, or the disk cannot read it."""
    if member.issparse():
        raise Rejected("row_cut", f"{member.name} is a sparse file")
    try:
        file.seek(member.offset_data)
        data = file.read(member.size)
    except OSError as error:
        raise Rejected("row_cut", f"{member.name}: {error}") from None
    if len(data) != member.size:
        raise Rejected("row_cut", f"{member.name}: {len(data)} of {member.size} bytes")
    return data


@dataclass(frozen=True)
class Webdataset:
    """Tars.

    Args:
        files: the tars.
        fields: captions: each the extension of a member, a key of KEY.json, or a column of the Parquet file beside.
        max_bytes: size an image member may have.
    """

    files: tuple[str, ...]
    fields: tuple[str, ...]
    max_bytes: int

    def units(self, tick: Callable[[int], None]) -> Iterator[Unit]:
        """A tar each. Raises: BadArgument for compressed ones: their members cannot be read where they lie."""
        for path in self.files:
            if path.endswith(COMPRESSED):
                raise BadArgument(f"input: wanted tars that are not compressed, got {path}; decompress it first")
            tick(os.path.getsize(path))
            yield Unit(path, 0, None)

    def rows(self, unit: Unit) -> Iterator[Row | Bad]:
        """A row for every key that has an image.

        Raises: Broken, too, after the last row where rows had to do without a JSON member or the Parquet file.
        """
        try:
            tar = tarfile.open(unit.path, "r:", errors="surrogateescape")  # noqa: SIM115 (entered below)
        except (tarfile.TarError, OSError) as error:
            raise Broken(f"{type(error).__name__}: {error}") from None
        with tar:
            beside: dict[str, dict[str, Any]] | None = None
            no_beside: Rejected | None = None
            unread: list[str] = []  # one of a kind is listed
            seen: Counter[str] = Counter()
            for key, group in samples(tar):
                key = key.encode("utf-8", "replace").decode()
                image = next((group[e] for e in IMAGES if e in group), None)
                if image is None:
                    other = next((e for e in group if e.rpartition(".")[2] in IMAGES + OTHER_IMAGES), None)
                    if other is not None:
                        wanted = f"wanted {', '.join(f'{key}.{e}' for e in IMAGES)}"
                        yield Bad(key, Rejected("image_format", f"{wanted}, got .{other}"))
                    elif any(field in group for field in self.fields):
                        yield Bad(key, Rejected("image_missing", f"the tar holds {', '.join(sorted(group))} alone"))
                    continue
                try:
                    captions: dict[str, Any] = {f: self._text(tar.fileobj, group[f]) for f in self.fields if f in group}
                except Rejected as why:
                    yield Bad(key, why)
                    continue
                bad_json: Rejected | None = None
                try:
                    record = self._json(tar.fileobj, group)
                except Rejected as why:
                    record, bad_json = {}, why
                for field in self.fields:
                    captions.setdefault(field, record.get(field))
                missing = [f for f in self.fields if captions[f] is None]
                if missing:
                    if beside is None:
                        try:
                            beside = self._beside(unit.path)
                        except Rejected as why:
                            beside, no_beside = {}, why
                            unread.append(why.detail)
                    own = beside.get(key.rsplit("/", 1)[-1], {})
                    captions.update({f: own.get(f) for f in missing})
                    record = {"url": own.get("url"), **record}
                    lost = bad_json or no_beside
                    if lost is not None and any(captions[f] is None for f in missing):
                        yield Bad(key, lost)
                        continue
                if bad_json is not None and not unread:
                    unread.append(f"{group['json'].name}: {bad_json}")

                def load(member: tarfile.TarInfo = image) -> bytes:
                    too_large(member.size, self.max_bytes)
                    return _read(tar.fileobj, member)

                yield Row(key, load, captions, text_or_none(record.get("url")), str(seen[key]))
                seen[key] += 1
            if unread:
                raise Broken(f"done without a file beside the pictures: {'; '.join(unread)}")

    def _text(self, file: Any, member: tarfile.TarInfo) -> bytes:
        if member.size > LONGEST_TEXT:
            raise Rejected("row_long", f"{member.name}: {member.size} bytes, wanted at most {LONGEST_TEXT}")
        return _read(file, member)

    def _json(self, file: Any, group: dict[str, tarfile.TarInfo]) -> dict[str, Any]:
        if "json" not in group:
            return {}
        try:
            record = json.loads(self._text(file, group["json"]))
        except (ValueError, RecursionError) as error:
            raise Rejected("row_not_json", f"{type(error).__name__}: {error}") from None
        return record if isinstance(record, dict) else {}

    def _beside(self, path: str) -> dict[str, dict[str, Any]]:
        """The caption fields and url by key from the Parquet file beside a tar; {} where there is none.

        Raises: Rejected where it cannot be read.
        """
        sidecar = os.path.splitext(path)[0] + ".parquet"
        if not os.path.isfile(sidecar):
            return {}
        try:
            from pyarrow import parquet
        except ImportError:
            raise BadArgument(
                "input: reading .parquet needs pyarrow: pip install 'semantic-routing[prepare]'"
            ) from None
        try:
            with parquet.ParquetFile(sidecar) as file:
                there = [name for name in dict.fromkeys((*self.fields, "url")) if name in file.schema_arrow.names]
                if "key" not in file.schema_arrow.names or not there:
                    return {}
                found = {}
                for batch in file.iter_batches(batch_size=1024, columns=["key", *there]):
                    for i in range(batch.num_rows):
                        found[str(plain(batch.column("key")[i]))] = {c: plain(batch.column(c)[i]) for c in there}
                return found
        except Exception as error:  # pyarrow's readers raise nearly anything on broken files
            raise Rejected("sidecar_broken", f"{sidecar}: {type(error).__name__}: {error}") from None
