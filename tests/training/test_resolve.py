import pytest
import yaml

from scantly.errors import ConfigError, DatasetError
from scantly.settings import merge, parse
from scantly.training.config import RunConfig, TrainingSection
from scantly.training.resolve import flags_to_layer, parse_sets, plan, read_recipe, resolve


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
    assert (training.power, training.precision) == (0.9, "32")  # default, recipe
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


LAB = {
    "title": "Lab",
    "plan": {"spatial_dims": 2, "size": [32, 32], "labeled_batch_size": 2, "unlabeled_batch_size": 2},
    "network": {"arguments": {"widths": [4, 4, 8, 8, 8]}},
    "training": {"steps": 1000, "lr": 0.02, "validate_every": 100, "checkpoint_every": 250},
    "methods": {
        "mc_net": {
            "consistency": 1.0,
            "training": {"steps": 3000, "schedule": "constant"},
            "plan": {"labeled_batch_size": 3},
            "data": {"augmentation": {"p_rotate": 0.25}},
            "by_labeled": {
                2: {"consistency": 0.5, "training": {"lr": 0.001}},
                4: {"consistency": 0.25, "training": {"steps": 4000}},
            },
        },
    },
    "protocols": {
        "clean": {},
        "literature": {
            "training": {"schedule": "step"},
            "methods": {
                "mc_net": {
                    "temperature": 0.2,
                    "network": {"name": "vnet"},
                    "evaluation": {"inference": {"largest_component": True}},
                    "by_labeled": {2: {"consistency": 0.75}},
                },
            },
        },
    },
}


@pytest.fixture
def lab(tmp_path):
    """Write the lab's recipe, changed where a test says so; gives its path."""

    def write(**changes):
        path = tmp_path / "lab.yaml"
        path.write_text(yaml.safe_dump(merge(LAB, changes)))
        return str(path)

    return write


def test_a_recipe_says_what_a_method_trains_with(cohort, lab):
    recipe = lab()
    others = resolve(cohort, recipe=recipe, flags={"method": "mean_teacher", "labeled": 3})
    own = resolve(cohort, recipe=recipe, flags={"method": "mc_net", "labeled": 3})
    assert (others.training.steps, others.training.schedule, others.training.lr) == (1000, "poly", 0.02)
    assert (own.training.steps, own.training.schedule, own.training.lr) == (3000, "constant", 0.02)
    assert (others.plan.labeled_batch_size, own.plan.labeled_batch_size) == (2, 3)
    assert own.plan.unlabeled_batch_size == 2
    assert (others.data.augmentation.p_rotate, own.data.augmentation.p_rotate) == (0.5, 0.25)
    assert own.method["consistency"] == 1.0
    assert "training" not in own.method


def test_a_protocol_kind_has_its_say_on_a_methods_training_too(cohort, lab):
    flags = {"method": "mc_net", "labeled": 3, "protocol": "literature"}
    own = resolve(cohort, recipe=lab(), flags=flags)
    assert own.training.schedule == "constant"  # the method's own word, not the kind's for all
    assert (own.network.name, own.method["temperature"]) == ("vnet", 0.2)
    assert own.evaluation.inference.largest_component
    others = resolve(cohort, recipe=lab(), flags={**flags, "method": "mean_teacher"})
    assert (others.training.schedule, others.network.name) == ("step", "unet")


def test_file_flags_and_sets_win_over_a_recipes_method(cohort, lab, tmp_path):
    file = tmp_path / "config.yaml"
    file.write_text("training: {schedule: poly, momentum: 0.5}")
    own = resolve(
        cohort,
        recipe=lab(),
        config_file=file,
        flags={"method": "mc_net", "labeled": 2, "steps": 70},
        sets=["training.lr=0.3", "method.consistency=0.125"],
    )
    assert (own.training.schedule, own.training.steps, own.training.lr) == ("poly", 70, 0.3)
    assert own.method["consistency"] == 0.125


@pytest.mark.parametrize(
    ("labeled", "kind", "consistency", "lr", "steps"),
    [
        (2, "clean", 0.5, 0.001, 3000),
        ("2", "clean", 0.5, 0.001, 3000),
        ("40%", "clean", 0.5, 0.001, 3000),
        (3, "clean", 1.0, 0.02, 3000),
        (4, "clean", 0.25, 0.02, 4000),
        (2, "literature", 0.75, 0.001, 3000),
    ],
)
def test_a_setting_may_depend_on_the_number_of_labeled_subjects(cohort, lab, labeled, kind, consistency, lr, steps):
    flags = {"method": "mc_net", "labeled": labeled, "protocol": kind}
    own = resolve(cohort, recipe=lab(), flags=flags)
    assert own.method["consistency"] == consistency
    assert (own.training.lr, own.training.steps, own.training.published_steps) == (lr, steps, steps)


def test_the_number_of_labeled_subjects_is_that_of_the_split(cohort, lab):
    recipe = lab(data={"labeled": 2})
    assert resolve(cohort, recipe=recipe, flags={"method": "mc_net"}).method["consistency"] == 0.5
    with pytest.raises(DatasetError, match="500"):
        resolve(cohort, recipe=recipe, flags={"method": "mc_net", "labeled": 500})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"methods": {"mc_net": {"trainin": {"lr": 1}}}}, r"lab\.yaml: methods\.mc_net: .*did you mean 'training'"),
        ({"methods": {"mc_net": {"consistancy": 1}}}, r"methods\.mc_net: .*did you mean 'consistency'"),
        ({"methods": {"mc_net": {"training": {"learning_rate": 1}}}}, r"unknown setting 'training\.learning_rate'"),
        ({"methods": {"mc_net": {"training": 5}}}, r"methods\.mc_net\.training is 5; write settings"),
        ({"methods": {"mc_net": 5}}, r"methods\.mc_net is 5; write settings"),
        ({"methods": {"mc_net": {"by_labeled": 5}}}, r"methods\.mc_net\.by_labeled is 5; write settings"),
        ({"methods": {"mc_net": {"by_labeled": {"2": {}}}}}, r"by_labeled: '2' is no number of subjects"),
        ({"methods": {"mc_net": {"by_labeled": {0: {}}}}}, r"by_labeled: 0 is no number of subjects"),
        ({"methods": {"mc_net": {"by_labeled": {2: 7}}}}, r"by_labeled\.2 is 7; write settings"),
        ({"methods": {"mc_net": {"by_labeled": {3: {"steps": 7}}}}}, r"by_labeled\.3: unknown setting 'steps'"),
        (
            {"methods": {"mc_net": {"by_labeled": {3: {"by_labeled": {}}}}}},
            r"by_labeled\.3: unknown setting 'by_labeled'",
        ),
        ({"methods": {"mcnet": {}}}, r"lab\.yaml: methods: .*did you mean 'mc_net'"),
        (
            {"protocols": {"literature": {"trainin": {}}}},
            r"lab\.yaml: protocols\.literature: .*did you mean 'training'",
        ),
        ({"protocols": {"literature": {"methods": {"mcnet": {}}}}}, r"protocols\.literature\.methods: .*'mc_net'"),
        ({"protocols": {"literatur": {}}}, r"lab\.yaml: protocols: .*did you mean 'literature'"),
        ({"protocols": {"literature": 5}}, r"protocols\.literature is 5; write settings"),
        ({"cohort": {"unti": "patient"}}, r"(?s)lab\.yaml: .*did you mean 'cohort\.unit'"),
    ],
)
def test_faults_of_a_recipe_are_named(cohort, lab, changes, message):
    with pytest.raises(ConfigError, match=message):
        resolve(cohort, recipe=lab(**changes), flags={"method": "mc_net", "labeled": 3, "protocol": "literature"})


@pytest.mark.parametrize(
    "changes",
    [
        {"protocols": {"literature": None}},
        {"protocols": None, "methods": None},
        {"methods": {"mc_net": None}, "protocols": {"literature": {"methods": None}}},
        {"methods": {"mc_net": {"training": None, "by_labeled": None}}, "training": None, "cohort": None},
    ],
)
def test_parts_of_a_recipe_may_be_left_empty(cohort, lab, changes):
    config = resolve(cohort, recipe=lab(**changes), flags={"method": "mc_net", "labeled": 3, "protocol": "literature"})
    assert config.plan.size == (32, 32)


def test_a_section_that_holds_no_settings_is_refused(cohort, lab):
    with pytest.raises(ConfigError, match="section 'plan' is 5; write settings"):
        resolve(cohort, recipe=lab(plan=5), flags={"method": "mean_teacher", "labeled": 3})


@pytest.mark.parametrize(
    ("steps", "validate", "checkpoint"),
    [(None, 100, 250), (1000, 100, 250), (100, 10, 25), (7, 1, 2), (2000, 200, 500)],
)
def test_intervals_of_a_recipe_follow_a_run_of_another_length(cohort, lab, steps, validate, checkpoint):
    training = resolve(cohort, recipe=lab(), flags={"method": "mean_teacher", "labeled": 2, "steps": steps}).training
    assert (training.validation_interval(2), training.checkpoint_interval) == (validate, checkpoint)
    assert training.published_steps == 1000


def test_intervals_that_the_user_gives_are_kept(cohort, lab):
    flags = {"method": "mean_teacher", "labeled": 2}
    training = resolve(
        cohort, recipe=lab(), flags=flags, sets=["training.steps=100", "training.validate_every=50"]
    ).training
    assert (training.validate_every, training.checkpoint_every) == (50, 25)


def test_without_a_recipe_there_is_no_published_length(cohort, tiny):
    assert resolve(cohort, flags={"method": "supervised"}, sets=tiny).training.published_steps is None


def test_a_configuration_of_before_published_lengths_is_read(cohort, tiny):
    values = resolve(cohort, flags={"method": "supervised"}, sets=tiny).model_dump(mode="json")
    del values["training"]["published_steps"]
    assert parse(RunConfig, values, where="").training.published_steps is None
