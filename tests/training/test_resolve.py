import pytest
import yaml

from scantly.errors import ConfigError, DatasetError
from scantly.settings import merge
from scantly.training.config import TrainingSection
from scantly.training.resolve import flags_to_layer, known_recipes, parse_sets, plan, read_recipe, resolve


def test_the_weaker_layer_gives_way(cohort, tmp_path, tiny):
    file = tmp_path / "config.yaml"
    file.write_text(yaml.safe_dump(merge(tiny, {"training": {"lr": 0.5, "momentum": 0.5, "steps": 5}})))
    config = resolve(
        cohort,
        recipe="acdc-cpu",
        config_file=file,
        flags={"method": "mean_teacher", "steps": 7, "labeled": 2},
        sets=["training.lr=0.25", "method.consistency=0.5"],
    )
    training = config.training
    assert (training.power, training.precision) == (0.9, "bf16")  # default, recipe
    assert (training.momentum, training.steps, training.lr) == (0.5, 7, 0.25)  # file, flag, --set
    assert config.method["consistency"] == 0.5
    assert config.method["published_iterations"] == 1500  # the recipe's methods section
    assert config.method["ema_decay"] == 0.99
    assert tuple(config.plan.size) == (32, 32)


def test_protocol_variants_of_a_recipe(cohort):
    flags = {"method": "mean_teacher", "labeled": 2}
    clean = resolve(cohort, recipe="acdc", flags=flags)
    published = resolve(cohort, recipe="acdc", flags={**flags, "protocol": "literature"})
    assert (clean.plan.interpolation, published.plan.interpolation) == ("linear", "nearest")
    assert (clean.method["predict_with"], published.method["predict_with"]) == ("teacher", "student")
    assert published.evaluation.flaws
    assert not clean.evaluation.flaws
    assert published.data.augmentation.rotflip == "official"
    assert published.training.validation_interval(2) == 200
    assert clean.training.steps == 30_000


def test_selection_is_the_last_iteration_without_test_cases(cohort, tiny, tmp_path):
    config = resolve(cohort, flags={"method": "supervised"}, sets=tiny)
    assert config.evaluation.selection == "best"
    assert config.split["test"]


def test_a_method_that_needs_unlabeled_rows_is_refused_without_them(cohort, tiny):
    with pytest.raises(ConfigError, match="all 5 training cases are labeled; give --labeled N"):
        resolve(cohort, flags={"method": "mean_teacher"}, sets=tiny)
    none = merge(tiny, {"plan": {"unlabeled_batch_size": 0}})
    with pytest.raises(ConfigError, match=r"set plan\.unlabeled_batch_size"):
        resolve(cohort, flags={"method": "mean_teacher", "labeled": 2}, sets=none)
    assert resolve(cohort, flags={"method": "supervised"}, sets=none).split["unlabeled"] == []


def test_size_takes_the_order_of_the_literature():
    assert flags_to_layer({"size": [112, 112, 80]}, resized=False) == {"plan": {"patch_size": [80, 112, 112]}}
    assert flags_to_layer({"size": [64, 48]}, resized=True) == {"plan": {"patch_size": [64, 48], "size": [64, 48]}}


def test_sets_are_read_as_yaml():
    assert parse_sets(["a.b=1e-2", "a.c=[1, 2]", "d=null"]) == {"a": {"b": "1e-2", "c": [1, 2]}, "d": None}


@pytest.mark.parametrize(
    ("flags", "sets", "message"),
    [
        ({}, [], "no method given"),
        ({"method": "mean_techer"}, [], "did you mean 'mean_teacher'"),
        ({"method": "mean_teacher"}, ["method.consistancy=1"], "did you mean 'method.consistency'"),
        ({"method": "mean_teacher"}, ["trainning.lr=1"], "did you mean 'training'"),
        ({"method": "mean_teacher"}, ["training.lr=-1"], "training.lr.*-1"),
        ({"method": "mean_teacher", "steps": 5}, ["training.steps=6"], "give one of the two"),
        ({"method": "mean_teacher"}, ["training.steps"], "key=value"),
        ({"method": "mean_teacher", "size": [64]}, [], "H W"),
    ],
)
def test_faults_are_named(cohort, flags, sets, message):
    with pytest.raises(ConfigError, match=message):
        resolve(cohort, flags=flags, sets=sets)


def test_all_faults_are_reported_together(cohort):
    with pytest.raises(ConfigError, match=r"(?s)training\.steps.*training\.lr"):
        resolve(cohort, flags={"method": "supervised"}, sets=["training.lr=-1", "training.steps=0"])


def test_too_many_labeled_units(cohort):
    with pytest.raises(DatasetError, match="500"):
        resolve(cohort, flags={"method": "supervised", "labeled": 500})


def test_a_flag_and_a_set_that_agree_are_fine(cohort):
    config = resolve(cohort, flags={"method": "supervised", "steps": 5}, sets=["training.steps=5"])
    assert config.training.steps == 5


def test_a_share_may_be_given_as_text(cohort, tiny):
    config = resolve(cohort, flags={"method": "supervised", "labeled": "2"}, sets=tiny)
    assert len(config.split["labeled"]) == 2


@pytest.mark.parametrize("name", known_recipes())
def test_every_recipe_resolves_for_every_method_it_names(name, cohort):
    recipe = read_recipe(name)
    assert recipe["title"]
    for method in ["supervised", *recipe.get("methods", {})]:
        for kind in recipe.get("protocols", {"clean": {}}):
            resolve(cohort, recipe=name, flags={"method": method, "protocol": kind, "labeled": 2})


def test_unknown_recipe():
    with pytest.raises(ConfigError, match="did you mean 'acdc'"):
        read_recipe("acdcc")


def test_plan_needs_no_method(cohort):
    assert plan(cohort, recipe="demo").patch_size == (64, 64)


VOLUMES = {"spatial_dims": 3, "spacing": [5, 5, 5], "patch_size": [16, 32, 32]}


@pytest.mark.parametrize(
    ("plan_section", "name"),
    [
        ({"spatial_dims": 2}, "unet"),
        (VOLUMES, "vnet"),
        (VOLUMES | {"spacing": [10, 2, 2], "patch_size": [4, 32, 32]}, "dynunet"),
    ],
)
def test_the_automatic_network_is_named_in_the_configuration(cohort, plan_section, name):
    config = resolve(cohort, flags={"method": "supervised"}, sets={"plan": plan_section})
    assert config.network.name == name
    if name == "dynunet":
        assert config.network.arguments["strides"] == [list(level) for level in config.plan.strides]
        assert config.network.arguments["kernel_sizes"] == [list(level) for level in config.plan.kernel_sizes]
        assert 1 in config.plan.kernel_sizes[0]
        again = resolve(cohort, flags={"method": "supervised"}, sets={"plan": plan_section, "network": {"name": name}})
        assert again.network == config.network
    else:
        assert config.network.arguments == {}


def test_a_named_network_is_kept_and_takes_what_the_user_sets(cohort):
    flags = {"method": "supervised"}
    assert resolve(cohort, flags=flags, sets={"plan": VOLUMES, "network": {"name": "unet"}}).network.name == "unet"
    arguments = {"deep_supervision": True, "widths": [4, 8, 16, 16]}
    config = resolve(
        cohort, flags=flags, sets={"plan": VOLUMES, "network": {"name": "dynunet", "arguments": arguments}}
    )
    assert config.network.arguments["widths"] == [4, 8, 16, 16]
    assert config.network.arguments["deep_supervision"] is True
    assert len(config.network.arguments["strides"]) == 4


@pytest.mark.parametrize(
    ("size", "sets", "message"),
    [
        ([64, 64, 30], {}, r"side 30 is not divisible by 16.*use 16 or 32"),
        ([64, 64, 8], {}, r"8 x 64 x 64 do not fit network vnet, .* 16 x 16 x 16; use --size 64 64 16"),
        ([48, 64, 32], {"network": {"name": "vnet", "arguments": {"widths": [2] * 6}}}, r"--size 64 64 32"),
        ([64, 64, 32], {"network": {"arguments": {"width": 3}}}, "did you mean 'widths'"),
    ],
)
def test_a_size_that_the_network_cannot_halve_is_refused_with_one_that_fits(cohort, size, sets, message):
    plan_section = {"spatial_dims": 3, "spacing": [5, 5, 5]}
    with pytest.raises(ConfigError, match=message):
        resolve(cohort, flags={"method": "supervised", "size": size}, sets={"plan": plan_section, **sets})


@pytest.mark.parametrize("size", [[64, 64, 32], [112, 112, 80]])
def test_sizes_of_the_literature_resolve(cohort, size):
    config = resolve(
        cohort, flags={"method": "supervised", "size": size}, sets={"plan": {"spatial_dims": 3, "spacing": [5, 5, 5]}}
    )
    assert list(config.plan.patch_size) == [size[2], size[0], size[1]]


@pytest.mark.parametrize(("sides", "fits"), [([10, 10, 10], False), ([64, 64, 64], True)])
def test_a_monai_network_that_cannot_take_the_patch_is_refused_beforehand(cohort, sides, fits):
    sets = {
        "plan": {"spatial_dims": 3, "spacing": [5, 5, 5], "patch_size": sides, "strides": None, "kernel_sizes": None},
        "network": {"name": "SegResNet", "arguments": {"init_filters": 8}},
    }
    if not fits:
        with pytest.raises(ConfigError, match=r"10 x 10 x 10 do not fit network SegResNet.*--size 64 64 64"):
            resolve(cohort, flags={"method": "supervised"}, sets=sets)
    else:
        assert resolve(cohort, flags={"method": "supervised"}, sets=sets).network.name == "SegResNet"


def test_volumes_are_validated_less_often():
    training = TrainingSection(steps=1000)
    assert (training.validation_interval(2), training.validation_interval(3)) == (50, 200)
    assert TrainingSection(steps=1000, validate_every=10).validation_interval(3) == 10
