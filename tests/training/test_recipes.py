"""The recipes that come with Scantly: what they say is known, published, in proportion, and what the page shows."""

from __future__ import annotations

import functools
import json
import re
import runpy
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from scantly.methods import catalogue
from scantly.methods.base import Method, Progress
from scantly.methods.parts.consistency import RampConfig
from scantly.settings import merge, parse
from scantly.training import resolve as resolving
from scantly.training.config import RunConfig
from scantly.training.optimizers import learning_rate
from scantly.training.recipes import (
    METHOD_SECTIONS,
    known_recipes,
    method_layer,
    method_settings,
    read_cohort,
    read_recipe,
)
from scantly.training.resolve import resolve
from scantly.training.stages import stage_spans
from scantly.training.train import build_method

ROOT = Path(__file__).parents[2]
METHODS = [entry.name for entry in catalogue.CATALOGUE]
OWN = {"acdc-cpu", "demo"}  # measured here, published nowhere
PUBLISHED = [name for name in known_recipes() if name not in OWN]
KINDS = ("clean", "literature")


@pytest.fixture(scope="module", autouse=True)
def _files_are_read_once():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(resolving, "read_recipe", functools.cache(read_recipe))
        patch.setattr(catalogue, "methods", functools.cache(catalogue.methods))
        yield


@pytest.fixture(scope="module")
def glands(tmp_path_factory):
    """Six color images with one class, four of them labeled for training."""
    root = tmp_path_factory.mktemp("glands")
    rng = np.random.default_rng(0)
    for part in ("imagesTr", "labelsTr"):
        (root / part).mkdir()
    for number in range(6):
        PIL.Image.fromarray(rng.integers(0, 256, (40, 40, 3), np.uint8)).save(
            root / "imagesTr" / f"g{number}_0000.png", dpi=(300, 300)
        )
        PIL.Image.fromarray(rng.integers(0, 2, (40, 40), np.uint8)).save(
            root / "labelsTr" / f"g{number}.png", dpi=(300, 300)
        )
    description = {
        "channel_names": {"0": "red", "1": "green", "2": "blue"},
        "labels": {"background": 0, "gland": 1},
        "file_ending": ".png",
    }
    (root / "dataset.json").write_text(json.dumps(description))
    return root


@pytest.fixture
def dataset(cohort, glands):
    """A tiny dataset of the kind that a recipe is for, by the recipe's name."""
    return lambda recipe: glands if recipe == "crag" else cohort


def built(config: RunConfig) -> Method:
    """The method without memory for its weights."""
    with torch.device("meta"):
        return build_method(config)


@pytest.mark.parametrize("recipe", known_recipes())
def test_every_recipe_takes_every_method_at_any_length(recipe, dataset):
    kind = list(read_recipe(recipe)["protocols"])[-1]  # clean has a test of its own below
    for name in METHODS:
        flags = {"method": name, "protocol": kind, "labeled": 2}
        whole = resolve(dataset(recipe), recipe=recipe, flags=flags)
        steps = whole.training.steps // 10
        short = resolve(dataset(recipe), recipe=recipe, flags={**flags, "steps": steps})
        assert whole.training.published_steps == short.training.published_steps == whole.training.steps, name
        longer, shorter = (config.training.validation_interval(config.plan.spatial_dims) for config in (whole, short))
        assert shorter == pytest.approx(longer / 10, abs=1), name
        assert short.training.checkpoint_interval == pytest.approx(whole.training.checkpoint_interval / 10, abs=1)
        same = {"training": {"steps": 1, "validate_every": None}}
        changed = [merge(config.model_dump(mode="json"), same) for config in (whole, short)]
        assert changed[0] == changed[1], name
        stages = built(whole).stages()
        spans = zip(stage_spans(stages, whole.training.steps), stage_spans(stages, steps), strict=True)
        assert all(abs(long.stop / 10 - span.stop) <= 1 for long, span in spans), name


@functools.cache
def configs(recipe: str) -> list[tuple[str, str, Any, int]]:
    """Kind, method, its settings and the iterations of its training, for every method with a ramp of its weight."""
    found = []
    written = read_recipe(recipe)
    for kind in written["protocols"]:
        for name in METHODS:
            model = catalogue.load(name).Config
            if issubclass(model, RampConfig):
                layer = method_layer(written, kind, name)
                steps = layer.get("training", {}).get("steps", written["training"]["steps"])
                found.append((kind, name, parse(model, layer.get("method", {}), where=name), steps))
    return found


@pytest.mark.parametrize("recipe", known_recipes())
@given(share=st.floats(0, 1, exclude_max=True))
def test_a_ramp_keeps_its_proportions_in_a_shortened_run(recipe, share):
    for kind, name, config, steps in configs(recipe):
        short = steps // 10
        weight = config.consistency_weight(Progress(int(share * short), short))
        # one interval of the ramp, and one iteration of each run, on the clock of the published training
        grain = (config.rampup_interval / config.published_iterations) + 1 / short + 1 / steps
        before, after = (
            config.consistency_weight(Progress(min(max(int((share + move) * steps), 0), steps), steps))
            for move in (-grain, grain)
        )
        assert before <= weight <= after, (kind, name)


@pytest.mark.parametrize("recipe", known_recipes())
def test_a_rate_keeps_its_proportions_in_a_shortened_run(recipe, dataset):
    for kind in read_recipe(recipe)["protocols"]:
        config = resolve(dataset(recipe), recipe=recipe, flags={"method": "supervised", "protocol": kind, "labeled": 2})
        settings, steps = config.training, config.training.steps
        for share in (0, 0.2, 0.41, 0.42, 0.6, 0.83, 0.84, 0.95):
            long = learning_rate(settings.schedule, round(share * steps), steps, settings)
            short = learning_rate(settings.schedule, round(share * steps / 10), steps // 10, settings)
            assert short == pytest.approx(long, abs=0.02), (kind, share)


@pytest.mark.parametrize("recipe", PUBLISHED)
def test_every_recipe_of_a_publication_says_where_it_stands(recipe):
    values = read_recipe(recipe)
    assert values["title"]
    assert values["description"]
    assert set(values["protocols"]) == set(KINDS)
    assert values["protocols"]["literature"]["evaluation"]["flaws"]
    assert all(isinstance(text, str) and text.endswith(".") for text in values["deviations"])
    cohort = read_cohort(values)
    assert cohort is not None
    assert list(cohort.labeled) == sorted(cohort.labeled)
    source = (ROOT / "src" / "scantly" / "recipes" / f"{recipe}.yaml").read_text(encoding="utf-8")
    command = re.match(r"# scantly train DATASET --recipe (\S+) --method (\w+) --labeled (\d+) --out RUN\n", source)
    assert command is not None
    assert command[1] == recipe
    assert int(command[3]) in cohort.labeled


@pytest.mark.parametrize("recipe", PUBLISHED)
def test_lines_are_no_longer_than_those_of_the_code(recipe):
    lines = (ROOT / "src" / "scantly" / "recipes" / f"{recipe}.yaml").read_text(encoding="utf-8").splitlines()
    assert max(map(len, lines)) <= 120


@pytest.mark.parametrize("recipe", known_recipes())
def test_clean_compares_on_equal_terms(recipe, dataset):
    """Length, batches, data, network and optimizer are the recipe's; a method may bring what is its own in its code."""
    clean = read_recipe(recipe)["protocols"]["clean"]
    for source in (read_recipe(recipe), clean):
        for name, entry in source.get("methods", {}).items():
            assert not set(entry) & set(METHOD_SECTIONS), name
    flags = {"labeled": 2, "protocol": "clean"}
    plans = [resolve(dataset(recipe), recipe=recipe, flags={**flags, "method": name}) for name in METHODS]
    shared = [config.model_copy(update={"method": {}}) for config in plans]
    assert all(config == shared[0] for config in shared)


@pytest.mark.parametrize("recipe", known_recipes())
def test_what_depends_on_the_labeled_names_listed_counts(recipe):
    values = read_recipe(recipe)
    cohort = read_cohort(values)
    for source in (values, *values["protocols"].values()):
        for name, entry in source.get("methods", {}).items():
            counts = set(entry.get("by_labeled", {}))
            assert not counts or (cohort is not None and counts <= set(cohort.labeled)), name


PUBLISHED_SETTINGS = [
    ("acdc", "clean", "mean_teacher", None, {"method.consistency": 0.1, "training.steps": 30000, "training.lr": 0.01}),
    ("acdc", "clean", "mc_net", None, {"training.schedule": "poly", "data.augmentation.p_rotate": 0.5}),
    ("acdc", "literature", "supervised", None, {"plan.labeled_batch_size": 24, "training.validate_every": 200}),
    ("acdc", "literature", "mean_teacher", None, {"method.start_iteration": 1000, "method.predict_with": "student"}),
    ("acdc", "literature", "ua_mt", None, {"method.official": True, "method.passes": 8}),
    ("acdc", "literature", "mc_net", None, {"training.schedule": "constant", "data.augmentation.p_rotate": 0.25}),
    ("acdc", "literature", "mc_net_plus", None, {"training.schedule": "constant", "training.steps": 30000}),
    ("acdc", "literature", "unimatch", 3, {"training.steps": 30900, "plan.interpolation": "linear"}),
    ("acdc", "literature", "unimatch", 7, {"training.steps": 29400}),
    ("acdc", "literature", "arco", None, {"plan.labeled_batch_size": 4, "network.arguments.upsampling": "transposed"}),
    ("acdc", "literature", "plgcl", 7, {"plan.unlabeled_batch_size": 8, "training.steps": 31100}),
    ("acdc", "literature", "lclpl", None, {"network.name": "unet6", "training.steps": 20000, "method.rounds": 3}),
    ("la", "clean", "mc_net", None, {"training.steps": 6000, "training.schedule": "step"}),
    ("la", "literature", "ua_mt", None, {"training.steps": 6000, "training.schedule": "step", "training.gamma": 0.1}),
    ("la", "literature", "supervised", None, {"plan.labeled_batch_size": 4, "plan.patch_size": [80, 112, 112]}),
    ("la", "literature", "mc_net", None, {"training.steps": 15000, "training.schedule": "constant"}),
    ("la", "literature", "mc_net_plus", None, {"method.consistency": 1.0, "method.rampup_iterations": 6000}),
    ("la", "literature", "dtc", None, {"evaluation.inference.largest_component": True, "method.consistency": 1.0}),
    ("la", "literature", "sassnet", 16, {"method.consistency": 0.01, "evaluation.inference.largest_component": False}),
    ("la", "clean", "sassnet", 8, {"method.consistency": 0.015}),
    ("la", "literature", "arco", None, {"training.schedule": "poly", "evaluation.selection": "last"}),
    ("la", "literature", "gapmatch", None, {"training.steps": 15000, "method.confidence_threshold": 0.7}),
    ("la", "literature", "diffcl", None, {"training.schedule": "poly", "evaluation.inference.stride": [4, 18, 18]}),
    ("brats2019", "literature", "mean_teacher", None, {"network.name": "unet3d", "method.start_iteration": 0}),
    ("brats2019", "literature", "ua_mt", None, {"evaluation.inference.stride": [64, 64, 64], "training.steps": 30000}),
    ("brats2019", "literature", "urpc", None, {"network.arguments.dropout": 0.0}),
    ("acdc", "literature", "arco", 7, {"method.negatives": "released", "method.nearest_neighbor_weight": 0.0}),
    ("acdc", "literature", "lclpl", 7, {"method.normalization": "released", "method.contrast_weight": 0.1}),
    ("acdc", "clean", "lclpl", 7, {"method.normalization": "correct", "method.contrast_weight": 0.0106}),
    ("pancreas-ct", "literature", "mc_net", None, {"training.steps": 15000, "training.schedule": "constant"}),
    ("pancreas-ct", "literature", "dtc", None, {"training.steps": 6000, "data.augmentation.rotflip": "official"}),
    ("pancreas-ct", "literature", "ict", None, {"evaluation.inference.stride": [16, 16, 16], "plan.spacing": None}),
    ("pancreas-ct", "clean", "ict", None, {"plan.spacing": [1.0, 1.0, 1.0], "plan.foreground_fraction": 0.33}),
    (
        "pancreas-ct-coranet",
        "literature",
        "mean_teacher",
        None,
        {
            "evaluation.inference.stride": [4, 16, 16],
            "network.arguments.norm": "instance",
            "training.optimizer": "adam",
        },
    ),
    ("kits19", "literature", "plgcl", None, {"plan.labeled_batch_size": 8, "plan.size": [256, 256]}),
    ("crag", "literature", "plgcl", None, {"plan.patch_size": [512, 512], "evaluation.inference.overlap": 0.5}),
    ("msd-prostate", "literature", "lclpl", None, {"method.crf_sigma": 5.0, "training.steps": 20000}),
    ("mmwhs", "literature", "arco", None, {"training.steps": 60000, "plan.interpolation": "cubic"}),
    ("lits", "literature", "arco", None, {"plan.unlabeled_batch_size": 4, "evaluation.selection": "last"}),
]


@pytest.mark.parametrize(("recipe", "kind", "method", "labeled", "expected"), PUBLISHED_SETTINGS)
def test_published_settings(recipe, kind, method, labeled, expected, dataset, tmp_path):
    """What the specifications of methods and protocols say, typed anew."""
    flags = {"method": method, "protocol": kind, "labeled": 2}
    root = dataset(recipe)
    if labeled is not None:  # the recipe's settings for as many labeled subjects as there are here
        path = tmp_path / "moved.yaml"
        path.write_text(json.dumps(moved(read_recipe(recipe), method, labeled)))
        recipe = str(path)
    values = resolve(root, recipe=recipe, flags=flags).model_dump(mode="json")
    for key, value in expected.items():
        found: Any = values
        for part in key.split("."):
            found = found[part]
        assert found == value, key


def moved(recipe: dict[str, Any], method: str, labeled: int) -> dict[str, Any]:
    """The recipe, with what it says for so many labeled subjects said whatever their number."""
    for source in (recipe, *recipe["protocols"].values()):
        entry = source.get("methods", {}).get(method, {})
        own = entry.pop("by_labeled", {}).get(labeled, {})
        source.setdefault("methods", {})[method] = merge(entry, own)
    recipe.pop("cohort")
    return recipe


def test_epochs_counted_in_iterations():
    """UniMatch: 300 epochs of whole batches of 12 unlabeled slices. PLGCL: 100 and 200 epochs of 8."""
    slices, every = {1: 32, 3: 68, 7: 136, 14: 256}, 1312
    methods = read_recipe("acdc")["protocols"]["literature"]["methods"]
    for labeled, own in methods["unimatch"]["by_labeled"].items():
        assert own["training"]["steps"] == (every - slices[labeled]) // 12 * 300
    for labeled, own in methods["plgcl"]["by_labeled"].items():
        warmup, joint = slices[labeled] // 8 * 100, (every - slices[labeled]) // 8 * 200
        assert own["training"]["steps"] == warmup + joint
        assert own["warmup_share"] == pytest.approx(warmup / (warmup + joint), abs=1e-4)


def test_settings_of_a_method_without_what_it_trains_with():
    entry = {"consistency": 1.0, "training": {"steps": 3}, "by_labeled": {2: {"consistency": 2.0}}}
    assert method_settings(entry) == {"consistency": 1.0}


@pytest.mark.real
def test_labeled_patients_of_acdc_are_those_of_the_folder(real_data):
    listed = json.loads((real_data / "acdc" / "splits.json").read_text())["labeled"]
    cohort = read_cohort(read_recipe("acdc"))
    assert cohort is not None
    told = {count: re.findall(r"\b(\d{3})\b", text.split("(")[0]) for count, text in cohort.labeled.items()}
    for count in (3, 7, 14):
        patients = list(dict.fromkeys(re.findall(r"patient(\d+)_", " ".join(listed[str(count)]))))
        assert patients[-len(told[count]) :] == told[count]


def test_the_page_of_protocols_is_current():
    """``python docs/protocol_page.py`` writes it."""
    made = runpy.run_path(str(ROOT / "docs" / "protocol_page.py"))["page"]()
    assert (ROOT / "docs" / "protocols.md").read_text(encoding="utf-8") == made, "run python docs/protocol_page.py"
    for name in known_recipes():
        section = re.search(rf"^## {name}\n(.*?)(?=^## |\Z)", made, re.M | re.S)
        assert section is not None
        text = " ".join(section[1].split())
        recipe = read_recipe(name)
        told = [recipe["title"], recipe["description"], *recipe.get("deviations", [])]
        told += recipe["protocols"].get("literature", {}).get("evaluation", {}).get("flaws", [])
        cohort = read_cohort(recipe)
        told += [] if cohort is None else [cohort.source, cohort.folder, cohort.split, cohort.metrics]
        for each in told:
            assert " ".join(each.split()) in text
