"""Scans and annotations as files: NIfTI, DICOM, PNG, TIFF and the literature's ``.h5``, with their geometry.

Arrays are (D, H, W) = (z, y, x); scans have channels first. What is written for an image lies on
exactly its grid.

Example:
    >>> import tempfile
    >>> from pathlib import Path
    >>> import numpy as np
    >>> from scantly import imaging
    >>> path = Path(tempfile.mkdtemp()) / "label.nii.gz"
    >>> geometry = imaging.Geometry(shape=(2, 3, 4), affine=imaging.grid((5.0, 0.7, 0.7)))
    >>> imaging.write_label(path, np.ones((2, 3, 4), np.uint8), geometry)
    >>> imaging.read_label(path).geometry.orientation
    'LPS'
"""

from scantly.imaging.geometry import (
    Geometry,
    Image,
    Label,
    from_canonical,
    geometry_difference,
    grid,
    to_canonical,
)
from scantly.imaging.volumes import (
    ENDINGS,
    file_ending,
    has_label,
    read_geometry,
    read_image,
    read_label,
    stem,
    write_label,
    write_scalar,
)

__all__ = [
    "ENDINGS",
    "Geometry",
    "Image",
    "Label",
    "file_ending",
    "from_canonical",
    "geometry_difference",
    "grid",
    "has_label",
    "read_geometry",
    "read_image",
    "read_label",
    "stem",
    "to_canonical",
    "write_label",
    "write_scalar",
]
