"""Array files: exact, partial, readable by blosc2, and never silently wrong."""

from __future__ import annotations

from collections.abc import Sequence

import blosc2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from scantly.data.frames import ArrayIndex, DamagedFrameError, encode, read_part


def index_of(content: bytes) -> ArrayIndex:
    return ArrayIndex.parse(content[-ArrayIndex.needed(content) :])


class Bytes:
    """A file in memory that remembers which spans of it were fetched."""

    def __init__(self, content: bytes) -> None:
        self.content = content
        self.spans: list[tuple[int, int]] = []

    def fetch(self, spans: Sequence[tuple[int, int]]) -> list[bytes]:
        self.spans += spans
        return [self.content[start:stop] for start, stop in spans]


def whole(array: np.ndarray) -> tuple[slice, ...]:
    return tuple(slice(None) for _ in array.shape)


@st.composite
def arrays_and_windows(draw: st.DrawFn) -> tuple[np.ndarray, tuple[int, ...], tuple[slice, ...]]:
    dims = draw(st.integers(1, 4))
    shape = tuple(draw(st.integers(1, 9)) for _ in range(dims))
    chunks = tuple(draw(st.integers(1, n)) for n in shape)
    kind = draw(st.sampled_from([np.float32, np.uint8, np.int16]))
    random = np.random.default_rng(draw(st.integers(0, 99)))
    array = random.integers(0, draw(st.sampled_from([1, 2, 100])), shape).astype(kind)
    if draw(st.booleans()):
        array[: shape[0] // 2] = 0
    window = []
    for n in shape:
        start = draw(st.integers(0, n - 1))
        window.append(slice(start, draw(st.integers(start, n + 2))))
    return array, chunks, tuple(window)


@settings(max_examples=60)
@given(arrays_and_windows())
def test_any_part_of_any_array_is_exact(case: tuple[np.ndarray, tuple[int, ...], tuple[slice, ...]]) -> None:
    array, chunks, window = case
    content = encode(array, chunks)
    assert content == encode(np.asfortranarray(array), chunks)
    part = read_part(index_of(content), window, Bytes(content).fetch)
    assert part.dtype == array.dtype
    np.testing.assert_array_equal(part, array[window])


def test_the_file_is_an_ordinary_b2nd(tmp_path: object) -> None:
    array = np.random.default_rng(0).normal(size=(40, 33, 50)).astype(np.float32)
    path = f"{tmp_path}/a.b2nd"
    with open(path, "wb") as stream:  # noqa: PTH123
        stream.write(encode(array, (32, 32, 32)))
    np.testing.assert_array_equal(blosc2.open(path, mode="r")[:], array)


def test_a_part_fetches_the_bytes_of_its_chunks_and_no_other() -> None:
    array = np.random.default_rng(0).normal(size=(64, 64, 64)).astype(np.float32)
    content = encode(array, (16, 16, 16))
    index = index_of(content)
    file = Bytes(content)
    read_part(index, (slice(0, 16), slice(20, 50), slice(16, 48)), file.fetch)
    # chunk rows 1 to 3 of the first layer, columns 1 and 2 of each, which lie side by side
    numbers = [[row * 4 + 1, row * 4 + 2] for row in (1, 2, 3)]
    expected = [(int(index.starts[a]), int(index.starts[b] + index.sizes[b])) for a, b in numbers]
    assert file.spans == expected
    file = Bytes(content)
    read_part(index, whole(array), file.fetch)
    assert len(file.spans) == 1  # everything, in one piece


def test_zeros_take_no_bytes() -> None:
    array = np.zeros((64, 64, 64), dtype=np.uint8)
    array[40, 40, 40] = 3
    content = encode(array, (32, 32, 32))
    index = index_of(content)
    assert np.flatnonzero(index.sizes).tolist() == [7]
    file = Bytes(content)
    assert not read_part(index, (slice(0, 32),) * 3, file.fetch).any()
    assert file.spans == []
    np.testing.assert_array_equal(read_part(index, whole(array), file.fetch), array)


@pytest.mark.parametrize("kind", ["whole numbers", "real values"])
def test_few_distinct_values_are_stored_better_than_shuffled(kind: str) -> None:
    random = np.random.default_rng(0)
    array = np.clip(random.normal(scale=9, size=(32, 64, 64)), -20, 20).astype(np.int8) / np.float32(7.3)
    if kind == "real values":
        array = np.sin(np.arange(array.size, dtype=np.float32) / 999).reshape(array.shape)
    shuffled = blosc2.CParams(codec=blosc2.Codec.LZ4, clevel=5, filters=[blosc2.Filter.SHUFFLE], nthreads=1)
    plain = blosc2.CParams(codec=blosc2.Codec.LZ4, clevel=5, filters=[blosc2.Filter.NOFILTER], nthreads=1)
    sizes = [blosc2.asarray(array, chunks=(32,) * 3, cparams=way).schunk.cbytes for way in (shuffled, plain)]
    assert (sizes[0] < sizes[1]) == (kind == "real values")
    assert len(encode(array, (32, 32, 32))) <= 1.05 * min(sizes)


def test_a_flipped_bit_anywhere_is_found_or_harmless() -> None:
    random = np.random.default_rng(0)
    array = random.integers(0, 50, (24, 24, 24)).astype(np.float32)
    array[:8] = 0
    content = encode(array, (16, 16, 16))
    index = index_of(content)
    chunks = (int(index.starts[0]), int((index.starts + index.sizes).max()))
    found = {"header": 0, "chunks": 0, "trailer": 0}
    everywhere = {
        "header": range(chunks[0]),
        "chunks": random.integers(*chunks, 300).tolist(),
        "trailer": range(chunks[1], len(content)),
    }
    for region, places in everywhere.items():
        for place in places:
            damaged = bytearray(content)
            damaged[place] ^= 1 << int(random.integers(8))
            try:
                part = read_part(index_of(bytes(damaged)), whole(array), Bytes(bytes(damaged)).fetch)
            except DamagedFrameError:
                found[region] += 1
            else:
                np.testing.assert_array_equal(part, array)
    assert found["chunks"] == 300
    assert found["trailer"] >= ArrayIndex.needed(content)  # the index, to the last byte
    assert found["header"] == 0  # blosc2's own, which Scantly does not read


@pytest.mark.parametrize("length", [0, 5, 23, 24, 100])
def test_a_truncated_file_is_damaged(length: int) -> None:
    content = encode(np.arange(4096, dtype=np.float32).reshape(16, 16, 16), (8, 8, 8))
    for part in (content[:length], content[:-1], content[1:]):
        with pytest.raises(DamagedFrameError):
            read_part(index_of(part), (slice(None),) * 3, Bytes(part).fetch)
