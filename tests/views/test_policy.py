import numpy as np
import pytest
import scipy.ndimage
import torch
from torch._subclasses import FakeTensorMode

from scantly import views
from scantly.errors import ConfigError
from scantly.settings import parse
from scantly.views import CutMixConfig, StrongConfig, WeakConfig

SIZES = [(16, 16), (5, 12, 12), (4, 9, 14)]
EVERYTHING_WEAK = WeakConfig(
    rotflip="independent",
    p_rotate=0.7,
    rotate_degrees=60,
    scale=(0.8, 1.2),
    translate=0.1,
    through_plane=True,
)
EVERYTHING_STRONG = StrongConfig(shift=0.2, p_gamma=0.5, p_noise=0.5, blur_through_plane=True)
ACDC = WeakConfig(
    rotflip="official",
    p_rotflip=0.5,
    p_rotate=0.5,
    exclusive=True,
    rotate_integer=True,
    image_interpolation="nearest",
)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def all_views(images: torch.Tensor, labels: torch.Tensor, source: torch.Generator) -> list[torch.Tensor]:
    view = views.weak(EVERYTHING_WEAK, images, [labels], generator=source)
    strong = views.strong(EVERYTHING_STRONG, view.images, generator=source)
    noisy = views.noise(images, generator=source)
    mix = views.sample_cutmix(CutMixConfig(), images.shape[0], images.shape[2:], generator=source)
    back = views.invert_weak(view.images, view.params)
    return [view.images, *view.maps, strong, noisy, back, views.apply_cutmix(strong, mix)]


@pytest.mark.parametrize("size", SIZES)
def test_equal_generators_give_equal_views_and_a_restored_one_continues(size: tuple[int, ...]) -> None:
    images, labels = torch.randn(4, 2, *size), torch.randint(0, 4, (4, *size))
    source = generator(5)
    first = all_views(images, labels, source)
    state = source.get_state()
    second = all_views(images, labels, source)
    assert not torch.equal(first[0], second[0])
    restored = torch.Generator()
    restored.set_state(state)
    for got, expected in zip(all_views(images, labels, restored), second, strict=True):
        assert torch.equal(got, expected)
    for got, expected in zip(all_views(images, labels, generator(5)), first, strict=True):
        assert torch.equal(got, expected)


def test_global_generator_is_left_alone() -> None:
    before = torch.get_rng_state()
    all_views(torch.randn(2, 1, 8, 8, generator=generator()), torch.zeros(2, 8, 8, dtype=torch.long), generator())
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_types_and_shapes_stay(size: tuple[int, ...], dtype: torch.dtype) -> None:
    images, labels = torch.randn(3, 2, *size).to(dtype), torch.randint(0, 4, (3, *size), dtype=torch.uint8)
    image, label, *others = all_views(images, labels, generator())
    assert label.dtype == torch.uint8 and label.shape == labels.shape
    for each in (image, *others):
        assert each.dtype == dtype and each.shape == images.shape
        assert each.is_contiguous()
        assert each.isfinite().all()


@pytest.mark.parametrize("size", SIZES)
def test_no_rows_give_no_rows(size: tuple[int, ...]) -> None:
    for each in all_views(torch.zeros(0, 1, *size), torch.zeros(0, *size, dtype=torch.long), generator()):
        assert each.shape[0] == 0


@pytest.mark.parametrize("size", SIZES)
def test_nothing_is_read_back_from_the_device(size: tuple[int, ...]) -> None:
    # Tensors without values: reading one, or a shape that depends on one, raises.
    source = generator()
    with FakeTensorMode():
        all_views(torch.zeros(3, 1, *size), torch.zeros(3, *size, dtype=torch.long), source)


# --- weak ---


def test_image_and_labels_share_the_geometry() -> None:
    labels = torch.from_numpy(
        scipy.ndimage.gaussian_filter(np.random.default_rng(0).normal(size=(32, 24, 24)), (0, 3, 3))
    )
    labels = (labels > 0).long() * 2
    view = views.weak(EVERYTHING_WEAK, labels[:, None].float(), [labels, labels == 2], generator=generator())
    # A linearly interpolated label image is nearest to the label on the same side of one half.
    clear = (view.images[:, 0] - 1).abs() > 0.9
    assert clear.double().mean() > 0.5
    assert torch.equal(view.images[:, 0][clear].round().long(), view.maps[0][clear])
    assert torch.equal(view.maps[1], view.maps[0] == 2)


def test_float_maps_are_nearest_too() -> None:
    confidence = torch.tensor([0.25, 0.75])[torch.randint(0, 2, (8, 20, 20), generator=generator())]
    view = views.weak(EVERYTHING_WEAK, confidence[:, None], [confidence], generator=generator())
    assert set(view.maps[0].unique().tolist()) <= {0.0, 0.25, 0.75}
    assert view.images.unique().numel() > 100


def test_params_of_a_view_apply_to_other_tensors_and_undo_it() -> None:
    images = torch.randn(6, 2, 5, 10, 10, generator=generator())
    view = views.weak(WeakConfig(rotflip="independent", p_rotate=0), images, generator=generator(1))
    assert view.params.affine is None
    assert not torch.equal(view.images, images)
    assert torch.equal(views.apply_weak(images, view.params), view.images)
    assert torch.equal(views.invert_weak(view.images, view.params), images)


def test_inverse_undoes_the_parts_in_reverse_order() -> None:
    coordinates = torch.linspace(-1, 1, 40)
    bump = torch.exp(-4 * ((coordinates[:, None] - 0.2) ** 2 + (coordinates[None] + 0.1) ** 2))
    images = bump.expand(32, 1, 40, 40)
    view = views.weak(EVERYTHING_WEAK, images, generator=generator())
    seen = views.invert_weak(views.apply_weak(torch.ones_like(images), view.params), view.params) > 0.999
    back = views.invert_weak(view.images, view.params)
    assert seen.double().mean() > 0.6
    assert (back - images)[seen].abs().max() < 0.02


def kind_of(row: np.ndarray, pattern: np.ndarray) -> str:
    if np.array_equal(row, pattern):
        return "same"
    mirrors = [np.flip(np.rot90(pattern, k), axis) for k in range(4) for axis in (0, 1)]
    if any(np.array_equal(row, mirror) for mirror in mirrors):
        return "mirrored"
    for degrees in range(-20, 20):
        turned = scipy.ndimage.rotate(pattern, degrees, reshape=False, order=0, mode="grid-constant")
        if (turned != row).mean() < 0.01:
            return "rotated"
    return "other"


@pytest.mark.parametrize(
    ("config", "shares"),
    [
        (ACDC, {"mirrored": 0.5, "rotated": 0.4875, "same": 0.0125}),
        (ACDC.model_copy(update={"p_rotate": 0.25}), {"mirrored": 0.5, "rotated": 0.24375, "same": 0.25625}),
        (WeakConfig(rotflip="official", p_rotate=0), {"mirrored": 1.0}),
    ],
)
def test_policies_of_the_literature(config: WeakConfig, shares: dict[str, float]) -> None:
    pattern = np.random.default_rng(0).integers(0, 1000, size=(21, 21))
    images = torch.from_numpy(pattern).float().expand(600, 1, 21, 21)
    drawn = views.weak(config, images, generator=generator()).images[:, 0].numpy()
    kinds = [kind_of(row, pattern) for row in drawn]
    assert set(kinds) <= set(shares)
    for kind, share in shares.items():
        assert abs(kinds.count(kind) / 600 - share) < 0.06


def test_default_rows_that_are_not_drawn_are_bit_identical() -> None:
    images = torch.randn(400, 1, 12, 12, generator=generator())
    view = views.weak(WeakConfig(), images, generator=generator(2))
    same = (view.images == images).flatten(1).all(1).double().mean()
    assert abs(same - 0.125) < 0.05  # no flip (1/4) and no rotation (1/2)


def test_no_rotflip_and_no_rotation_is_the_identity() -> None:
    images = torch.randn(3, 1, 8, 8)
    view = views.weak(WeakConfig(rotflip="none", p_rotate=0), images, generator=generator())
    assert view.images is images


# --- strong ---


@pytest.mark.parametrize("size", [(24, 24), (6, 24, 24)])
def test_strong_view_keeps_the_edges_where_they_are(size: tuple[int, ...]) -> None:
    images = torch.zeros(64, 1, *size)
    images[..., 6:18, 9:15] = 1
    images += 0.01 * torch.rand(images.shape, generator=generator())
    changed = views.strong(StrongConfig(p_gamma=0.5), images, generator=generator())
    halfway = (
        changed.amax((1, *range(2, images.ndim)), keepdim=True)
        + changed.amin((1, *range(2, images.ndim)), keepdim=True)
    ) / 2
    overlap = ((changed > halfway) == (images > 0.5)).flatten(1).double().mean(1)
    assert overlap.min() > 0.9


def test_share_of_strong_rows() -> None:
    images = torch.rand(2000, 1, 8, 8, generator=generator())
    changed = views.strong(StrongConfig(), images, generator=generator())
    same = (changed == images).flatten(1).all(1).double().mean()
    assert abs(same - 0.2 * 0.5) < 0.03


def test_each_draw_of_a_strong_view_differs() -> None:
    images, source = torch.rand(4, 1, 8, 8), generator()
    config = StrongConfig(p_jitter=1.0)
    one, two = (views.strong(config, images, generator=source) for _ in range(2))
    assert not (one == two).flatten(1).all(1).any()


def test_all_probabilities_zero_is_the_identity() -> None:
    images = torch.rand(4, 1, 8, 8)
    assert views.strong(StrongConfig(p_jitter=0, p_blur=0), images, generator=generator()) is images


def test_strong_params_apply_again() -> None:
    images = torch.rand(4, 1, 6, 8, 8)
    params = views.sample_strong(EVERYTHING_STRONG, images.shape, generator=generator())
    assert torch.equal(
        views.apply_strong(images, params), views.strong(EVERYTHING_STRONG, images, generator=generator())
    )


# --- settings ---


@pytest.mark.parametrize(
    ("model", "values", "message"),
    [
        (
            WeakConfig,
            {"exclusive": True},
            "setting 'view.p_rotate' is 0.5: exclusive branches .* p_rotflip takes 1",
        ),
        (WeakConfig, {"rotate_degrees": 12.5, "rotate_integer": True}, "whole rotate_degrees, not 12.5"),
        (
            WeakConfig,
            {"rotflip": "official", "through_plane": True},
            "setting 'view.through_plane' .* in-plane only",
        ),
        (WeakConfig, {"rotflip": "officially"}, "setting 'view.rotflip' is 'officially'"),
        (WeakConfig, {"scale": [0, 1]}, r"setting 'view.scale' is \[0, 1\]: give two positive"),
        (WeakConfig, {"rotate_degree": 5}, "did you mean 'view.rotate_degrees'"),
        (StrongConfig, {"gamma": [2, 1]}, r"setting 'view.gamma' is \[2, 1\]: .* the smaller first"),
        (StrongConfig, {"p_blur": -0.1}, "setting 'view.p_blur' is -0.1"),
    ],
)
def test_bad_settings_are_named(model, values, message) -> None:
    with pytest.raises(ConfigError, match=message):
        parse(model, values, where="view")


def test_the_literature_recipe_reads_from_plain_data() -> None:
    assert parse(WeakConfig, ACDC.model_dump(mode="json"), where="view") == ACDC
