"""Wrong types in Python are told as wrong settings are: the argument, the value, the cure."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import scantly
from scantly.arguments import checked
from scantly.errors import ScantlyError
from scantly.inference.predict import Predictor

TRAIN = {"dataset": "d", "method": "supervised", "out": "o"}
PREDICT = {"model": "m", "inputs": ["i"], "out": "o"}
PATH = "give a path (text or pathlib.Path)"


def a_run() -> scantly.Run:
    return scantly.Run(Path("runs/a"))


WRONG: list[tuple[str, dict[str, Any], dict[str, Any], str]] = [
    ("train", TRAIN, {"dataset": None}, f"train: dataset is None (NoneType); {PATH}."),
    ("train", TRAIN, {"dataset": 7}, f"train: dataset is 7 (int); {PATH}."),
    ("train", TRAIN, {"dataset": b"d"}, f"train: dataset is b'd' (bytes); {PATH}."),
    ("train", TRAIN, {"dataset": ["d"]}, f"train: dataset is ['d'] (list); {PATH}."),
    ("train", TRAIN, {"out": None}, f"train: out is None (NoneType); {PATH}."),
    ("train", TRAIN, {"method": 3}, "train: method is 3 (int); give text."),
    ("train", TRAIN, {"method": None}, "train: method is None (NoneType); give text."),
    (
        "train",
        TRAIN,
        {"labeled": 3.5},
        "train: labeled is 3.5 (float); give a whole number, text or None, for instance 7 or '10%'.",
    ),
    ("train", TRAIN, {"labeled": True}, "train: labeled is True (bool); give a whole number, text or None"),
    ("train", TRAIN, {"labeled": [3]}, "train: labeled is [3] (list); give a whole number"),
    ("train", TRAIN, {"steps": "10"}, "train: steps is '10' (str); give a whole number or None."),
    ("train", TRAIN, {"steps": 10.0}, "train: steps is 10.0 (float); give a whole number or None."),
    ("train", TRAIN, {"seed": "a"}, "train: seed is 'a' (str); give a whole number or None."),
    (
        "train",
        TRAIN,
        {"size": "64"},
        "train: size is '64' (str); give a list, each item of it a whole number or None, for instance (64, 64).",
    ),
    ("train", TRAIN, {"size": 64}, "train: size is 64 (int); give a list"),
    ("train", TRAIN, {"size": (64, "64")}, "train: size is (64, '64') (tuple); give a list"),
    ("train", TRAIN, {"config": 3}, f"train: config is 3 (int); {PATH} or None."),
    (
        "train",
        TRAIN,
        {"settings": "method.a=1"},
        "train: settings is 'method.a=1' (str); give a dictionary or a list, each item of it text, for instance "
        "['method.consistency=0.5'].",
    ),
    ("train", TRAIN, {"settings": {1: 2}}, "train: settings is {1: 2} (dict); give a dictionary"),
    ("train", TRAIN, {"recipe": 3}, f"train: recipe is 3 (int); {PATH} or None."),
    ("train", TRAIN, {"device": 0}, "train: device is 0 (int); give text or None."),
    ("train", TRAIN, {"precision": 32}, "train: precision is 32 (int); give text or None."),
    ("train", TRAIN, {"protocol": ["clean"]}, "train: protocol is ['clean'] (list); give text or None."),
    ("train", TRAIN, {"resume": "yes"}, "train: resume is 'yes' (str); give True or False."),
    ("predict", PREDICT, {"model": None}, f"predict: model is None (NoneType); {PATH} or a run."),
    ("predict", PREDICT, {"inputs": 3}, f"predict: inputs is 3 (int); {PATH} or a list, each item of it a path"),
    ("predict", PREDICT, {"inputs": [None]}, "predict: inputs is [None] (list); give a path"),
    ("predict", PREDICT, {"inputs": {"a": 1}}, "predict: inputs is {'a': 1} (dict); give a path"),
    ("predict", PREDICT, {"out": 3}, f"predict: out is 3 (int); {PATH}."),
    ("predict", PREDICT, {"uncertainty": 1}, "predict: uncertainty is 1 (int); give True or False."),
    ("predict", PREDICT, {"series": 1.2}, "predict: series is 1.2 (float); give text or None, for instance "),
    (
        "predict",
        PREDICT,
        {"inference": ["flips"]},
        "inference is ['flips'] (list); give a dictionary or None.",
    ),
    ("predict", PREDICT, {"progress": 3}, "predict: progress is 3 (int); give a function or None."),
    ("evaluate", {"predictions": "p", "labels": "l"}, {"labels": None}, f"labels is None (NoneType); {PATH}."),
    ("evaluate", {"predictions": "p", "labels": "l"}, {"classes": "heart"}, "classes is 'heart' (str); give a list"),
    (
        "evaluate",
        {"predictions": "p", "labels": "l"},
        {"convention": "cleen"},
        "convention is 'cleen' (str); give 'clean' or 'literature'.",
    ),
    ("evaluate", {"predictions": "p", "labels": "l"}, {"convention": [1]}, "convention is [1] (list); give 'clean' or"),
    ("compare", {"runs": []}, {"runs": "runs/a"}, "compare: runs is 'runs/a' (str); give a list, each item of it"),
    ("compare", {"runs": []}, {"runs": [3]}, "compare: runs is [3] (list); give a list"),
    ("compare", {"runs": []}, {"out": None}, f"compare: out is None (NoneType); {PATH}."),
    ("compare", {"runs": []}, {"split": 1}, "compare: split is 1 (int); give text or None."),
    ("check", {"dataset_root": "d"}, {"dataset_root": 1}, f"check: dataset_root is 1 (int); {PATH}."),
    ("plan", {"dataset": "d"}, {"dataset": None}, f"plan: dataset is None (NoneType); {PATH}."),
    ("plan", {"dataset": "d"}, {"flags": "a"}, "plan: flags is 'a' (str); give a dictionary or None."),
    ("init", {"dataset_root": "d", "images": "i"}, {"images": None}, f"init: images is None (NoneType); {PATH}."),
    ("init", {"dataset_root": "d", "images": "i"}, {"link": "no"}, "init: link is 'no' (str); give True or False."),
    ("Run", {}, {"folder": None}, f"Run.__init__: folder is None (NoneType); {PATH}."),
]


@pytest.mark.parametrize(("name", "right", "wrong", "said"), WRONG, ids=[f"{w[0]}-{w[2]!r}" for w in WRONG])
def test_a_wrong_type_is_told_with_its_cure(name: str, right: Any, wrong: Any, said: str) -> None:
    with pytest.raises(ScantlyError) as caught:
        getattr(scantly, name)(**{**right, **wrong})
    message = str(caught.value)
    assert said in message and message.endswith(".") and "\n" not in message


def test_a_run_in_place_of_a_path_is_told_its_folder() -> None:
    run = a_run()
    for function, arguments in ((scantly.train, TRAIN | {"dataset": run}), (scantly.check, {"dataset_root": run})):
        with pytest.raises(ScantlyError, match=r"\(Run\); give a path .*; the path of a run is its \.folder\."):
            function(**arguments)


@pytest.mark.parametrize("method", ["evaluate", "summary", "evaluation", "predictions"])
def test_methods_of_a_run_check_too(method: str) -> None:
    with pytest.raises(ScantlyError, match=rf"Run\.{method}: split is 3 \(int\); give text"):
        getattr(a_run(), method)(3)
    with pytest.raises(ScantlyError, match=r"Run\.open: folder is 3 \(int\); give a path"):
        scantly.Run.open(3)
    assert scantly.Run("runs/a").folder == Path("runs/a")


def test_every_public_function_checks_every_argument() -> None:
    told = {(name, key) for name, _, wrong, _ in WRONG for key in wrong}
    for name in ("train", "predict", "evaluate", "compare", "check", "plan", "init"):
        function = getattr(scantly, name)
        for key, parameter in inspect.signature(function).parameters.items():
            right = {"train": TRAIN, "predict": PREDICT}.get(name) or next(r for n, r, _, _ in WRONG if n == name)
            with pytest.raises(ScantlyError, match=rf": {key} is <object"):
                function(**{**right, key: object()})
            assert parameter.annotation is not inspect.Parameter.empty
    assert told


def test_numbers_of_numpy_and_any_path_are_taken() -> None:
    class Place:
        def __fspath__(self) -> str:
            return "a/b"

    @checked()
    def function(place: str | Path, number: int | None = None, share: float = 0.0, sizes: tuple = ()) -> Any:
        return place, number, share

    assert function(Place(), np.int64(3), np.float32(0.5)) == (Path("a/b"), 3, 0.5)
    assert type(function("a", np.int64(3))[1]) is int
    assert function("a", share=1) == ("a", None, 1.0)


def test_one_path_and_a_run_are_taken_by_predict(tmp_path: Path) -> None:
    with pytest.raises(ScantlyError, match=r"has not finished|does not exist"):
        scantly.predict(scantly.Run(tmp_path), tmp_path / "scan.nii.gz", tmp_path / "out")
    with pytest.raises(ScantlyError, match="does not exist"):
        scantly.predict(tmp_path, "scan.nii.gz", tmp_path / "out")


def test_unknown_arguments_are_python_s_own_error() -> None:
    with pytest.raises(TypeError, match=r"train\(\) got an unexpected keyword argument 'lables'"):
        scantly.train("d", method="supervised", out="o", lables=3)
    with pytest.raises(TypeError, match=r"train\(\) missing 1 required keyword-only argument: 'out'"):
        scantly.train("d", method="supervised")


def test_a_device_that_does_not_exist_is_told() -> None:
    with pytest.raises(ScantlyError, match=r"unknown device 'gpu'; .*Known: auto, cpu, cuda"):
        Predictor.load.__func__.__globals__["select_device"]("gpu")
