"""Everything that is wrong with a dataset folder, told before any training.

Cases are read one after the other and only a digest of each is kept: the memory needed does not grow with the
cohort.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np

from scantly import imaging
from scantly.arguments import checked
from scantly.data.dataset import channel_sentence, geometry_sentence, label_fault
from scantly.data.layout import Case, Description, Fault, Scan, describe, files_of, scan, visible
from scantly.data.splitfile import SplitFile, left_out, listed, on_both_sides, read_split_file, split_faults
from scantly.errors import DatasetError, ImageError
from scantly.imaging.decoding import within_memory

__all__ = ["Finding", "check"]


@dataclass(frozen=True)
class Finding:
    """One thing wrong.

    Attributes:
        level: ``"error"`` makes training fail or its results wrong; ``"warning"`` deserves a look.
        code: A word that stays the same between versions, for programs.
        file: The file or folder meant.
        message: One sentence: what it is, what it means, what to do.
    """

    level: Literal["error", "warning"]
    code: str
    file: str
    message: str


@checked()
def check(dataset_root: str | Path, *, progress: Callable[[int, int, str], None] | None = None) -> list[Finding]:
    """Read a whole dataset folder and list every fault.

    Args:
        dataset_root: The folder.
        progress: Called with the number of cases done, of all cases, and the name of the next.

    Returns:
        Findings: first those of the folder and its lists, then case by case in order of name. Empty if all is
        well. Bad data never raises.
    """
    root = Path(dataset_root)
    description, faults = describe(root)
    findings = [_finding(fault) for fault in faults]
    ending = description.file_ending if description else _commonest_ending(root / "imagesTr")
    if ending is None:
        return findings
    found = scan(root, ending, channels=len(description.channels) if description else None)
    findings += [_finding(fault) for fault in found.faults]
    findings += _number_of_cases(root, description, found)
    file, of_splits = _read_splits(root, found)
    findings += of_splits
    if found.train and not any(case.label for case in found.train.values()):
        folder = str(root / "labelsTr")
        sentence = f"{folder} holds no label for any scan of imagesTr: training needs at least one labeled case."
        findings.append(Finding("error", "no_labels", folder, sentence))
    findings += _case_findings(found, file, description, progress)
    return findings


def _finding(fault: Fault) -> Finding:
    return Finding("error" if fault.fatal else "warning", fault.code, fault.file, fault.message)


def _commonest_ending(folder: Path) -> str | None:
    endings = [ending for path in visible(folder) if (ending := imaging.file_ending(path))]
    return max(sorted(set(endings)), key=endings.count, default=None)


def _read_splits(root: Path, found: Scan) -> tuple[SplitFile | None, list[Finding]]:
    path = root / "splits.json"
    try:
        file = read_split_file(root)
    except DatasetError as error:
        return None, [Finding("error", "split_file", str(path), str(error))]
    if file is None:
        return None, []
    findings = [_finding(fault) for fault in split_faults(file, path, found.train, found.test)]
    unused = left_out(file, found.train)
    if unused:
        sentence = (
            f"{path}: no list names {listed(unused)} of imagesTr, so no run uses "
            f"{'this case' if len(unused) == 1 else f'these {len(unused)} cases'}; add to 'train' what is to be used."
        )
        findings.append(Finding("warning", "split_leaves_out", str(path), sentence))
    return file, findings


def _number_of_cases(root: Path, description: Description | None, found: Scan) -> Iterator[Finding]:
    """``numTraining`` is nnU-Net's count of the cases: another number there hints at lost files."""
    stated = description.info.get("numTraining") if description else None
    if isinstance(stated, int) and found.train and stated != len(found.train):
        path = root / "dataset.json"
        sentence = (
            f'{path}: "numTraining" is {stated}, but imagesTr holds {len(found.train)} cases; '
            "look for what is missing, or correct the number."
        )
        yield Finding("warning", "case_number", str(path), sentence)


def _case_findings(
    found: Scan,
    file: SplitFile | None,
    description: Description | None,
    progress: Callable[[int, int, str], None] | None,
) -> Iterator[Finding]:
    cases = [*found.train.values(), *found.test.values()]
    seen: dict[bytes, _CaseReader] = {}
    kinds: dict[int, Case] = {}
    used = np.zeros(len(description.classes) if description else 0, dtype=bool)
    any_label = False
    for done, case in enumerate(cases):
        if progress is not None:
            progress(done, len(cases), case.name)
        reader = _CaseReader(case, description, used)
        yield from reader.findings()
        any_label |= reader.label_digest is not None
        if reader.digest is not None:
            twin = seen.setdefault(reader.digest, reader)
            if twin is not reader:
                yield _duplicate(found, file, reader, twin)
        if reader.geometry is not None:
            kinds.setdefault(reader.geometry.spatial_dims, case)
    if progress is not None:
        progress(len(cases), len(cases), "")
    if len(kinds) > 1:
        flat, deep = kinds[2].images[0], kinds[3].images[0]
        sentence = f"{flat} is a picture and {deep} a volume; put 2D and 3D cases into folders of their own."
        yield Finding("error", "mixed_dimensions", str(flat), sentence)
    if description is not None and any_label:
        yield from _absent_classes(description, used, cases[0].images[0].parent.parent / "labelsTr")


def _absent_classes(description: Description, used: np.ndarray, folder: Path) -> Iterator[Finding]:
    for index in np.flatnonzero(~used[1:]) + 1:
        sentence = (
            f"{folder} has the class '{description.classes[index]}' (value {index}) of dataset.json in no "
            "file: it cannot be learned; check its value, or remove the class."
        )
        yield Finding("warning", "class_absent", str(folder), sentence)


def _duplicate(found: Scan, file: SplitFile | None, reader: _CaseReader, twin: _CaseReader) -> Finding:
    """Two cases of equal voxels: an error where a split has or could have one on each side."""
    one, other = reader.case, twin.case
    drawn = file is None or (file.train is None and file.val is None and file.dev_split is None)
    folders = {name in found.test for name in (one.name, other.name)}
    apart = len(folders) > 1 or drawn or on_both_sides(file or SplitFile(), one.name, other.name)
    labels = reader.label_digest, twin.label_digest
    differ = ", though their labels differ" if None not in labels and labels[0] != labels[1] else ""
    why = (
        "the model may be tested on what it was trained on"
        if apart
        else "one scan counts twice in its part of the split"
    )
    path = one.images[0]
    sentence = f"{path} has the same voxels as {other.images[0]}{differ}: {why}; remove one of the two cases."
    return Finding("error" if apart else "warning", "duplicate_image", str(path), sentence)


class _CaseReader:
    """Reads one case's files, once each, and tells what is wrong with them.

    Attributes:
        digest: Of the scan's voxels, whatever its header says; None if a channel cannot be read.
        geometry: Of the first channel that can be read.
        label_digest: Of the label's values; None if there is no readable label.
    """

    def __init__(self, case: Case, description: Description | None, used: np.ndarray) -> None:
        self.case = case
        self.description = description
        self.used = used
        self.digest: bytes | None = None
        self.geometry: imaging.Geometry | None = None
        self.label_digest: bytes | None = None

    def findings(self) -> Iterator[Finding]:
        yield from self._scan()
        if self.case.label is not None:
            yield from self._label(self.case.label)

    def _scan(self) -> Iterator[Finding]:
        content = hashlib.blake2b(digest_size=16)
        channels = 0
        whole = True
        for path in self.case.images:
            try:
                image = imaging.read_image([path], finite=False)
                with within_memory(path, image.array.nbytes):
                    content.update(repr(image.array.shape).encode())
                    content.update(np.ascontiguousarray(image.array).data)
                    found = list(self._voxels(path, image))
            except ImageError as error:
                whole = False
                yield Finding("error", "unreadable", str(path), str(error))
                continue
            channels += len(image.array)
            yield from found
        if not whole:
            return
        self.digest = content.digest()
        # missing and additional files are told by the scan of the folder
        names = self.description.channels if self.description else None
        path = self.case.images[0]
        files_fit = names is not None and len(self.case.images) in (len(names), files_of(len(names), path))
        if names and files_fit and channels != len(names):
            yield Finding("error", "channel_count", str(path), channel_sentence(path, channels, names))

    def _voxels(self, path: Path, image: imaging.Image) -> Iterator[Finding]:
        finite = np.isfinite(image.array)
        bad = image.array.size - int(np.count_nonzero(finite))
        if bad:
            sentence = (
                f"{path} has {bad} voxels that are NaN or infinite (of {image.array.size}): "
                "training would fail; replace them, for instance by the image's minimum, and save it again."
            )
            yield Finding("error", "not_finite", str(path), sentence)
        elif image.array.min() == image.array.max():
            sentence = (
                f"{path} has the value {image.array.flat[0]:g} in every voxel: it shows nothing; "
                "export it again or take the case out."
            )
            yield Finding("warning", "constant_image", str(path), sentence)
        if self.geometry is None:
            self.geometry = image.geometry
            return
        difference = imaging.geometry_difference(image.geometry, self.geometry)
        if difference:
            sentence = (
                f"{path} does not lie on the grid of {self.case.images[0].name}: {difference}; "
                "the channels of a case must match voxel by voxel: resample one onto the other."
            )
            yield Finding("error", "channel_geometry", str(path), sentence)

    def _label(self, path: Path) -> Iterator[Finding]:
        try:
            label = imaging.read_label(path)
            with within_memory(path, label.array.nbytes):
                found = list(self._values(path, label))
        except ImageError as error:
            yield Finding("error", "unreadable", str(path), str(error))
            return
        yield from found

    def _values(self, path: Path, label: imaging.Label) -> Iterator[Finding]:
        values = np.ascontiguousarray(label.array)
        self.label_digest = hashlib.blake2b(values.data, digest_size=16).digest()
        if self.geometry is not None:
            difference = imaging.geometry_difference(label.geometry, self.geometry)
            if difference:
                sentence = geometry_sentence(path, self.case.images[0], difference)
                yield Finding("error", "label_geometry", str(path), sentence)
        if not label.array.any():
            sentence = (
                f"{path} is all background: the case would teach that there is nothing to find; "
                "if it was never annotated, remove the file and the case counts as unlabeled."
            )
            yield Finding("warning", "empty_label", str(path), sentence)
        if self.description is not None:
            fault = label_fault(label, path, self.description.classes)
            if fault:
                yield Finding("error", "unknown_label", str(path), fault)
            counts = np.unique(label.array)
            self.used[counts[(counts >= 0) & (counts < len(self.used))]] = True
