"""Files that are not read: which of them may be passed over, and how the others are named.

One rule for all commands: whatever lies in a folder of scans, labels or predictions is used, or the command says
that it is not. Only plain companions (:func:`is_companion`) and hidden files are passed over.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path

from scantly import imaging

__all__ = ["is_companion", "looks_like_volume", "not_readable", "several"]

_NAMES = re.compile(
    r"(readme|licen[cs]e|copying|notice|changelog|changes|citation|authors|manifest)\b.*|"
    r"thumbs\.db|ehthumbs\.db|desktop\.ini|icon\r|dicomdir",
    re.IGNORECASE,
)
_ENDINGS = (
    *(".txt", ".md", ".rst", ".pdf", ".doc", ".docx", ".odt", ".rtf", ".html", ".htm", ".tex", ".bib", ".log"),
    *(".csv", ".tsv", ".xls", ".xlsx", ".ods", ".json", ".yaml", ".yml", ".toml", ".ini", ".cfg", ".xml"),
    *(".py", ".ipynb", ".sh", ".m", ".r", ".bat", ".md5", ".sha1", ".sha256"),
)
_VOLUMES = (".mha", ".mhd", ".nrrd", ".nhdr", ".hdr", ".img", ".mgz", ".mgh", ".mnc")
_NAMED = 5


def is_companion(path: Path) -> bool:
    """Whether a file plainly goes with scans and is none: documentation, tables, descriptions, scripts, thumbnails.

    Example:
        >>> [is_companion(Path(name)) for name in ("README.md", "Thumbs.db", "subjects.xlsx", "c1.seg.nrrd", "c1")]
        [True, True, True, False, False]
    """
    name = path.name.lower()
    if _NAMES.fullmatch(name) and not imaging.file_ending(path):
        return True
    return name.endswith(_ENDINGS)


def not_readable(files: Iterable[Path]) -> list[Path]:
    """Those that are of no readable type and no companions: a scan or label in another format may be among them.

    DICOM files (with the mark that :func:`scantly.imaging.dicom.is_dicom` looks for) are of no type here.
    """
    return [path for path in files if not imaging.file_ending(path) and not is_companion(path)]


def looks_like_volume(path: Path) -> bool:
    """Whether a file's ending is that of a volume or label map of a format that is not read."""
    return path.name.lower().endswith(_VOLUMES)


def several(paths: Iterable[Path | str], folder: Path | None = None) -> str:
    """The first five of some files, below a folder, and how many more there are.

    Example:
        >>> several([Path("d/a/1.mha"), Path("d/2.mha")], Path("d"))
        'a/1.mha, 2.mha'
    """
    names = [str(path.relative_to(folder)) if folder and isinstance(path, Path) else str(path) for path in paths]
    more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
    return ", ".join(names[:_NAMED]) + more
