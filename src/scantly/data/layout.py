"""The dataset folder: nnU-Net's raw layout, in which a case without a label file is unlabeled.

::

    dataset.json                       channel_names, labels, file_ending (nnU-Net version 2)
    imagesTr/<case>_0000<ending>       one file per channel
    labelsTr/<case><ending>            for the labeled cases
    imagesTs/, labelsTs/               test cases, optional
    splits.json                        optional, see scantly.data.splits

Color PNG and TIFF files may hold three channels in one file. Endings may be in capital letters. Hidden files are
passed over; every other file is a case's, or a fault says that it is not used: an error, unless it is a plain
companion (:mod:`scantly.data.unread`). Here the folder is read as far as it goes, with every fault found;
:class:`scantly.data.dataset.Dataset` is the sound folder.
"""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from scantly import imaging
from scantly.data.unread import is_companion, several
from scantly.errors import ConfigError
from scantly.files import kind_of, normal_name, read_json

__all__ = ["Case", "Description", "Fault", "Scan", "describe", "files_of", "scan", "visible"]

_CHANNEL = re.compile(r"(?P<case>.+)_(?P<channel>\d{4})")
_PARTS = (("imagesTr", "labelsTr"), ("imagesTs", "labelsTs"))
_OWN_FILES = ("dataset.json", "splits.json")


@dataclass(frozen=True)
class Case:
    """One scan: its name, one file per channel, and its annotation's file (None: unlabeled)."""

    name: str
    images: tuple[Path, ...]
    label: Path | None


@dataclass(frozen=True)
class Fault:
    """Something wrong with the folder: a word for machines, the file, a sentence that says what to do."""

    code: str
    file: str
    message: str
    fatal: bool = True


@dataclass(frozen=True)
class Description:
    """What ``dataset.json`` says: names of channels and of classes (index = value), and the file ending."""

    name: str
    channels: tuple[str, ...]
    classes: tuple[str, ...]
    file_ending: str
    info: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Scan:
    """What the folders hold, with every fault found on the way.

    Attributes:
        train: Cases of ``imagesTr`` by name, in order of name.
        test: Cases of ``imagesTs``.
        faults: What is wrong; those that are not ``fatal`` leave the rest usable.
    """

    train: Mapping[str, Case]
    test: Mapping[str, Case]
    faults: tuple[Fault, ...]


def describe(root: Path) -> tuple[Description | None, list[Fault]]:
    """Read and check ``dataset.json``.

    Returns:
        What it says, or None if it cannot be used; then every reason, one sentence each.
    """
    path = root / "dataset.json"
    if not root.is_dir():
        return None, [Fault("no_folder", str(root), f"{root} is not a folder; give the dataset's folder.")]
    if not any(not entry.name.startswith(".") for entry in root.iterdir()):
        return None, [
            Fault(
                "empty_folder",
                str(root),
                f"{root} is empty; make a dataset folder with scantly init {root} --images DIR --labels DIR.",
            )
        ]
    if not path.is_file():
        return None, [
            Fault(
                "no_description",
                str(path),
                f"{root} has no dataset.json, so it is not a dataset folder; make one from bare folders "
                "of scans with scantly init.",
            )
        ]
    try:
        info = read_json(path)
    except ConfigError as error:
        return None, [Fault("description", str(path), str(error))]
    return _interpret(info, path)


def _interpret(info: dict[str, Any], path: Path) -> tuple[Description | None, list[Fault]]:
    sentences: list[str] = []
    channels = _channels(info, sentences)
    classes = _classes(info, sentences)
    ending = info.get("file_ending")
    if "file_ending" not in info:
        sentences.append(
            f'"file_ending" is missing; write for instance "file_ending": ".nii.gz" (it may be '
            f"{', '.join(imaging.ENDINGS)})."
        )
    elif ending not in imaging.ENDINGS:
        sentences.append(
            f'"file_ending" is {json.dumps(ending)}, which cannot be read; use one of {", ".join(imaging.ENDINGS)}, '
            "converting the files if need be."
        )
    if sentences:
        return None, [Fault("description", str(path), f"{path}: {sentence}") for sentence in sentences]
    name = info.get("name")
    return Description(
        name=name if isinstance(name, str) and name else path.parent.resolve().name,
        channels=channels,
        classes=classes,
        file_ending=str(ending),
        info=info,
    ), []


def _channels(info: dict[str, Any], sentences: list[str]) -> tuple[str, ...]:
    names = info.get("channel_names")
    if not isinstance(names, dict) or not names:
        old = ' (nnU-Net version 1 calls it "modality": rename it)' if names is None and "modality" in info else ""
        sentences.append(
            f'"channel_names" {_not_an_object(info, "channel_names")}{old}; write for instance {{"0": "MR"}}.'
        )
        return ()
    if sorted(map(str, names)) != sorted(map(str, range(len(names)))):
        sentences.append(
            f'"channel_names" has the keys {", ".join(map(str, names))}; number the channels from 0 without gaps.'
        )
        return ()
    return tuple(str(names[key]) for key in sorted(names, key=int))


def _not_an_object(info: Mapping[str, Any], key: str) -> str:
    if key not in info:
        return "is missing"
    return "is empty" if info[key] == {} else f"holds {kind_of(info[key])}, not an object"


def _classes(info: dict[str, Any], sentences: list[str]) -> tuple[str, ...]:
    labels = info.get("labels")
    if not isinstance(labels, dict) or not labels:
        sentences.append(
            f'"labels" {_not_an_object(info, "labels")}; write for instance {{"background": 0, "heart": 1}}.'
        )
        return ()
    values: dict[int, str] = {}
    for name, value in labels.items():
        number = _whole(value)
        if number is None or number in values or name == "ignore":
            sentences.append(_label_sentence(str(name), value, values))
            return ()
        values[number] = normal_name(str(name))
    if sorted(values) != list(range(len(values))) or len(values) < 2:
        sentences.append(
            f'"labels" has the values {", ".join(map(str, sorted(values)))}; they must run from 0 '
            "(background) without gaps and name at least one structure: "
            "renumber the label files, as scantly init does."
        )
        return ()
    return tuple(values[number] for number in range(len(values)))


def _label_sentence(name: str, value: Any, earlier: Mapping[int, str]) -> str:
    if name == "ignore":
        return '"labels" has "ignore", which is not supported; label those voxels or leave the case out.'
    if isinstance(value, list):
        return f'"labels" makes {name!r} a region of several values, which is not supported; give it one value.'
    number = _whole(value)
    if number is not None:
        return f'"labels" gives the value {number} to both {earlier[number]!r} and {name!r}; number them apart.'
    old = "version 1 of nnU-Net has them the other way round: " if _whole(name) is not None else ""
    return f'"labels" gives {name!r} the value {value!r}, which is no whole number; {old}write name: value.'


def _whole(value: Any) -> int | None:
    if isinstance(value, bool):
        return None
    if isinstance(value, int):
        return value
    return int(value) if isinstance(value, str) and re.fullmatch(r"\d{1,6}", value) else None


def scan(root: Path, ending: str, *, channels: int | None) -> Scan:
    """List the cases of a dataset folder; no file is opened.

    Args:
        root: The folder.
        ending: File ending of scans and labels.
        channels: How many a case has; None if that is not known.

    Returns:
        All cases that have a channel 0, and every fault.
    """
    faults = list(_root_faults(root))
    train, test = (_scan_part(root / images, root / labels, ending, channels, faults) for images, labels in _PARTS)
    if not train:
        folder = root / "imagesTr"
        faults.insert(
            0,
            Fault(
                "no_images",
                str(folder),
                f"{folder} holds no scans named <case>_0000{ending}; put them there.",
            ),
        )
    for name in train.keys() & test.keys():
        path = test[name].images[0]
        faults.append(
            Fault("name_twice", str(path), f"{path}: a case '{name}' is in imagesTr too; rename one of them.")
        )
    return Scan(train, test, tuple(faults))


def visible(folder: Path) -> Iterator[Path]:
    """Entries of a folder in order of name, without hidden ones (``.DS_Store``, macOS's ``._`` files)."""
    if folder.is_dir():
        yield from sorted(path for path in folder.iterdir() if not path.name.startswith("."))


def _root_faults(root: Path) -> Iterator[Fault]:
    """What lies beside or in place of the four folders."""
    folders = list(itertools.chain.from_iterable(_PARTS))
    for path in visible(root):
        meant = next((name for name in folders if name.casefold() == path.name.casefold()), None)
        if path.name == meant:
            if not path.is_dir():
                what = "is a link that leads nowhere" if path.is_symlink() and not path.exists() else "is not a folder"
                yield Fault("no_folder", str(path), f"{path} {what}; put the folder in its place or remove it.")
        elif meant is not None:
            # file systems that know no capital letters
            if path.exists() and (root / meant).exists() and path.samefile(root / meant):
                continue
            yield Fault("misspelt_folder", str(path), f"{path} is not used; rename it to {meant}, or move it away.")
        elif path.name not in _OWN_FILES and not is_companion(path):
            message = (
                f"{path} is none of {', '.join((*_OWN_FILES, *folders))}, so it is not used; move it if it matters."
            )
            yield Fault("stray_file", str(path), message, fatal=False)


def _scan_part(images: Path, labels: Path, ending: str, channels: int | None, faults: list[Fault]) -> dict[str, Case]:
    files: dict[str, dict[int, Path]] = {}
    for path in visible(images):
        match = _CHANNEL.fullmatch(_stem(path, ending) or "")
        if match is None:
            faults.append(_stray(path, f"<case>_0000{ending}", "scan", _numbered(path, ending)))
            continue
        by_channel, channel = files.setdefault(normal_name(match["case"]), {}), int(match["channel"])
        if channel in by_channel:
            faults.append(_twice(path, by_channel[channel]))
        by_channel[channel] = path
    found: dict[str, Path] = {}
    for path in visible(labels):
        name = _stem(path, ending)
        if name is None:
            faults.append(_stray(path, f"<case>{ending}", "label", ""))
            continue
        name = normal_name(name)
        if name in found:
            faults.append(_twice(path, found[name]))
        found[name] = path
    for name in sorted(found.keys() - files.keys()):
        message = (
            f"{found[name]} has no scan {name}_0000{ending} in {images.name}; rename it to its scan or move it away."
        )
        faults.append(Fault("label_without_image", str(found[name]), message))
    cases = {}
    for name in sorted(files):
        faults.extend(_channel_faults(name, files[name], images, ending, channels))
        paths = tuple(path for _, path in sorted(files[name].items()))
        cases[name] = Case(name, paths, found.get(name))
    return cases


def _stem(path: Path, ending: str) -> str | None:
    """The file's name without its ending, in whatever letters; None for a folder or another ending."""
    name = path.name[: -len(ending)]
    return name if name and path.name.lower().endswith(ending) and not path.is_dir() else None


def _numbered(path: Path, ending: str) -> str:
    """What a scan without the number of its channel is to be called; empty for other files."""
    name = _stem(path, ending)
    return f"{name}_0000{ending}" if name else ""


def files_of(channels: int, path: Path) -> int:
    """Fewest files that a case of so many channels may have: color pictures hold three in one."""
    return 1 if channels == 3 and path.suffix.lower() in (".png", ".tif", ".tiff") else channels


def _stray(path: Path, pattern: str, kind: str, better: str) -> Fault:
    """A file or folder that is no case's: an error, unless it cannot be a scan or label."""
    inside = [file for file in _below(path) if not is_companion(file)] if path.is_dir() else []
    if (path.is_dir() and not inside) or (not path.is_dir() and is_companion(path)):
        message = f"{path} is not named {pattern}, so it is not used; rename it or move it away."
        return Fault("stray_file", str(path), message, fatal=False)
    loss = "its case would count as unlabeled" if kind == "label" else "its case would be lost"
    if path.is_dir():
        message = (
            f"{path} is a folder, whose {len(inside)} file{'' if len(inside) == 1 else 's'} ({several(inside, path)}) "
            f"would not be used; move them up, named {pattern}, or away."
        )
    elif better:
        message = f"{path} is not named {pattern} and would not be used; rename it to {better}, or move it away."
    else:
        message = f"{path} is not named {pattern}, and {loss}; convert it to that, or move it away."
    if kind == "label":
        return Fault("label_not_read", str(path), message)
    return Fault("scan_not_read", str(path), message)


def _below(folder: Path) -> list[Path]:
    """Files in a folder and its subfolders, without hidden ones."""
    found = sorted(path for path in folder.rglob("*") if not path.is_dir())
    return [path for path in found if not any(part.startswith(".") for part in path.relative_to(folder).parts)]


def _twice(path: Path, earlier: Path) -> Fault:
    if normal_name(path.name) == normal_name(earlier.name):
        message = (
            f"{path} and {earlier} have the same name, with letters and accents stored in two ways (Unicode NFC and "
            "NFD); remove or rename one."
        )
        return Fault("name_twice", str(path), message)
    return Fault("file_twice", str(path), f"{path} and {earlier.name} are one file of one case; keep one of them.")


def _channel_faults(
    name: str, files: Mapping[int, Path], images: Path, ending: str, channels: int | None
) -> Iterator[Fault]:
    if channels is None:
        expected = range(len(files))
    else:
        path = images / f"{name}_0000{ending}"
        expected = range(1 if set(files) == {0} and files_of(channels, path) == 1 else channels)
    for channel in itertools.islice((c for c in expected if c not in files), 8):
        path = images / f"{name}_{channel:04d}{ending}"
        message = (
            f"{path} is missing: case {name} has channels {', '.join(map(str, sorted(files)))}, "
            f"dataset.json names {channels}; add the file or take the case out."
        )
        yield Fault("missing_channel", str(path), message)
    for channel in sorted(set(files) - set(expected)):
        message = (
            f"{files[channel]} is channel {channel}, but dataset.json names {channels or len(files)} "
            "(from 0); name it under channel_names or move it away."
        )
        yield Fault("extra_channel", str(files[channel]), message)
