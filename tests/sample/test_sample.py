"""The sample data sets: layout, proportions, determinism, plausible files, lesions that grow with the grade, refusals."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import simplejpeg

from fastretina.errors import UsageError
from fastretina.sample.camera import CameraSettings, Eye, photograph, render
from fastretina.sample.dataset import EASY, HARD, REAL_COUNTS, Difficulty, apportion, make_sample, plan_eyes
from fastretina.sample.distractors import NO_DISTRACTORS, DistractorSettings, cross_lens
from fastretina.sample.lesions import LesionSettings

TOOL = Path(__file__).parents[2] / "tools" / "make_sample.py"
TRAIN, TEST = 30, 11


def make(
    out: Path, *, train: int = TRAIN, test: int = TEST, seed: int = 0, workers: int = 1, difficulty: Difficulty = EASY
) -> bool:
    return make_sample(out, train, test, seed, workers, lambda sizes, total: sizes, difficulty)


def paint(eye: Eye, difficulty: Difficulty) -> np.ndarray:
    return np.asarray(render(eye, difficulty.lesions, difficulty.camera, difficulty.distractors), int)


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def sample(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("sample") / "set"
    assert make(out, workers=1)
    return out


def test_bytes_do_not_depend_on_the_number_of_workers(sample: Path, tmp_path: Path) -> None:
    make(tmp_path / "again", workers=2)
    assert contents(tmp_path / "again") == contents(sample)


def test_another_seed_gives_other_images(sample: Path, tmp_path: Path) -> None:
    make(tmp_path / "other", train=2, test=1, seed=1)
    images = contents(tmp_path / "other" / "data").values()
    assert not set(images) & set(contents(sample / "data").values())


def test_csv_files_have_the_lab_layout(sample: Path) -> None:
    names = []
    for split, count in (("train", TRAIN), ("test", TEST)):
        image_file, label_file = ((sample / f"{split}_{column}.csv").read_bytes() for column in ("img", "label"))
        assert image_file.count(b"\n") == label_file.count(b"\n") == count
        assert image_file.endswith(b"\n")
        assert b"\r" not in image_file + label_file
        assert [int(label) for label in label_file.split()] == [eye.grade for eye in plan_eyes(TRAIN, TEST, 0)[split]]
        names += image_file.decode().split()
    assert all(name.rpartition("_")[0].isdigit() and name.rpartition("_")[2] in ("left", "right") for name in names)
    assert sorted(names) == sorted(path.stem for path in (sample / "data").glob("*.jpeg"))
    assert len(set(names)) == TRAIN + TEST


def test_images_are_512_px_baseline_420_jpegs_of_20_to_60_kb(sample: Path) -> None:
    for name, encoded in contents(sample / "data").items():
        assert 20_000 <= len(encoded) <= 60_000, name
        assert simplejpeg.decode_jpeg_header(encoded) == (512, 512, "YCbCr", "420"), name
        assert b"\xff\xc0" in encoded, name
        assert b"\xff\xc2" not in encoded, name
        assert simplejpeg.decode_jpeg(encoded, strict=True).shape == (512, 512, 3), name


@pytest.mark.parametrize("total", [1, 7, 300, 1200, 28_097])
def test_grades_have_the_real_proportions(total: int) -> None:
    counts = apportion(total)
    assert sum(counts) == total
    assert all(abs(count - total * real / sum(REAL_COUNTS)) < 1 for count, real in zip(counts, REAL_COUNTS, strict=True))


def test_default_splits_have_exact_grade_counts() -> None:
    plan = plan_eyes(1200, 300, 0)
    for split, expected in (("train", [882, 83, 180, 30, 25]), ("test", [221, 21, 45, 7, 6])):
        grades = Counter(eye.grade for eye in plan[split])
        assert [grades[grade] for grade in range(5)] == expected


def test_eyes_of_a_patient_agree_and_stand_in_both_splits() -> None:
    plan = plan_eyes(1200, 300, 0)
    grades: dict[int, list[int]] = {}
    for eye in plan["train"] + plan["test"]:
        grades.setdefault(eye.patient, []).append(eye.grade)
    pairs = np.array([pair for pair in grades.values() if len(pair) == 2])
    assert len(pairs) == 750
    assert np.corrcoef(pairs.T)[0, 1] > 0.4
    assert {eye.patient for eye in plan["train"]} & {eye.patient for eye in plan["test"]}


def test_right_eye_is_a_mirrored_left_eye() -> None:
    """The optic disc, the brightest spot, lies left of the middle in a left eye. Rotation would blur that: no tilt here."""
    camera = CameraSettings(tilt=0, any_angle=0, overflow=0, vignette=(0, 0), mottle=0, noise=(0, 0))
    for side, sign in (("left", -1), ("right", 1)):
        green = np.mean([render(Eye(0, patient, side, 0), LesionSettings(), camera)[..., 1] for patient in range(6)], axis=0)
        assert sign * (np.argwhere(green > np.quantile(green, 0.99))[:, 1].mean() - 256) > 60


def test_lesions_cover_more_of_the_same_eye_as_the_grade_rises() -> None:
    """Grades 1 and 2 are compared with 2 and 3; a grade-4 eye may bleed in fewer places than grade 3, but not than grade 2."""
    camera = CameraSettings()
    covered = np.zeros(5)
    for patient in range(6):
        clean = render(Eye(0, patient, "left", 0), LesionSettings(), camera).astype(int)
        for grade in range(5):
            painted = render(Eye(0, patient, "left", grade), LesionSettings(), camera).astype(int)
            covered[grade] += (np.abs(painted - clean).max(axis=2) > 12).mean() / 6
    assert covered[0] == 0
    assert 0.0005 < covered[1] < 0.01
    assert 2 * covered[1] < covered[2] < 0.06
    assert 2 * covered[2] < covered[3] < 0.2
    assert 2 * covered[2] < covered[4] < 0.2


def test_lesions_lie_inside_the_lit_disc() -> None:
    clean, painted = (render(Eye(3, 1, "right", grade), LesionSettings(), CameraSettings()).astype(int) for grade in (0, 4))
    dark = clean.max(axis=2) == 0
    assert dark.mean() > 0.1
    assert painted[dark].max() == 0


def test_settings_change_the_difficulty() -> None:
    eye = Eye(0, 5, "left", 2)
    never = ((0, 0), (0, 0), (0, 0), (0, 0), (0, 0))
    none = dataclasses.replace(LesionSettings(), microaneurysms=never, haemorrhages=never, flames=never, exudates=never)
    healthy = photograph(dataclasses.replace(eye, grade=0), LesionSettings(), CameraSettings())
    assert photograph(eye, LesionSettings(), CameraSettings()) != healthy
    assert photograph(eye, none, CameraSettings()) == healthy


# Green at a 4 x 4 grid of five easy eyes, of grade 0-4, as of the first release.
EASY_PIXELS = """
63 45 49 33 91 88 80 53 93 81 80 64 56 70 71 60
55 61 70 54 55 73 77 68 50 79 75 69 53 50 60 43
74 72 72 57 87 84 75 56 83 78 88 31 91 75 68 69
78 84 77 135 73 85 100 117 30 96 101 109 91 85 98 89
75 79 24 58 112 94 86 58 125 92 91 25 107 79 45 71
"""


def test_easy_sample_stays_as_it_was() -> None:
    """Who changes it on purpose changes EASY.recipe too, or old folders pass for new ones. One random number more or less
    changes the sensor's noise of every pixel; a grey level is left to the rounding of another processor's instructions."""
    eyes = [Eye(seed, 5 + grade, ("left", "right")[grade % 2], grade) for grade, seed in enumerate((0, 0, 1, 0, 2))]
    pixels = np.concatenate([paint(eye, EASY)[106:500:100, 106:500:100, 1].ravel() for eye in eyes])
    assert EASY.recipe == 1
    assert np.abs(pixels - np.array(EASY_PIXELS.split(), int)).max() <= 1


def test_hard_lesions_change_the_same_eye_less_than_easy_ones() -> None:
    """Contrast alone: with the easy camera for both, and without distractors."""
    plain = dataclasses.replace(HARD, camera=EASY.camera, distractors=NO_DISTRACTORS)
    for grade in range(1, 5):
        easy, hard = (
            np.mean([np.abs(paint(eye, d) - paint(dataclasses.replace(eye, grade=0), d)).mean() for eye in eyes_of(grade)])
            for d in (EASY, plain)
        )
        assert 0.03 * easy < hard < 0.6 * easy, grade


def eyes_of(grade: int) -> list[Eye]:
    return [Eye(0, patient, "left", grade) for patient in range(5)]


def test_counts_of_neighbouring_hard_grades_overlap() -> None:
    """No count of dark spots, or of bright ones, tells grade 1 from 2 or 2 from 3 in every eye; easy grades 2 and 3 differ so."""
    lesions = HARD.lesions
    for kinds in ((lesions.microaneurysms, lesions.haemorrhages), (lesions.exudates, lesions.cotton_wool)):
        low, high = (np.sum([[counts[end] for counts in kind] for kind in kinds], axis=0) for end in (0, 1))
        assert np.all(high[1:3] >= low[2:4])
    easy = EASY.lesions.haemorrhages
    assert easy[2][1] < easy[3][0]


def test_distractors_are_the_same_in_every_grade() -> None:
    """With lesions too faint to see, hard eyes of all grades are the same picture; and it differs from one without distractors."""
    never = ((0, 0),) * 5
    counts = ("microaneurysms", "haemorrhages", "flames", "exudates", "cotton_wool", "tufts", "preretinal")
    bare = dataclasses.replace(HARD, lesions=dataclasses.replace(HARD.lesions, **dict.fromkeys(counts, never)))
    clean = dataclasses.replace(bare, distractors=NO_DISTRACTORS)
    for patient in range(4):
        pictures = [paint(Eye(0, patient, "right", grade), bare) for grade in range(5)]
        assert all(np.array_equal(picture, pictures[0]) for picture in pictures)
        assert (np.abs(pictures[0] - paint(Eye(0, patient, "right", 0), clean)).max(axis=2) > 6).mean() > 0.0005


@pytest.mark.parametrize("kind", ["drusen", "pigment", "naevi", "dust", "reflections"])
def test_each_kind_of_distractor_changes_the_picture_its_own_way(kind: str) -> None:
    """Drusen and reflections brighten, the others darken; all inside the lit disc."""
    camera = CameraSettings(noise=(0, 0), overflow=0)
    eyes = [Eye(0, patient, "left", 0) for patient in range(4)]
    one = Difficulty("one kind", 1, 1, 10, LesionSettings(), camera, dataclasses.replace(NO_DISTRACTORS, **{kind: (8, 8)}))
    none = dataclasses.replace(one, distractors=NO_DISTRACTORS)
    change = np.stack([paint(eye, one) - paint(eye, none) for eye in eyes])[..., 1]
    grey = np.stack([paint(eye, none) for eye in eyes]).max(axis=3)
    sign = 1 if kind in ("drusen", "reflections") else -1
    assert (sign * change).max() >= 5
    assert (sign * change).min() >= -1
    assert not change[grey == 0].any()


def test_no_distractors_leave_light_and_canvas_alone() -> None:
    light = np.full((64, 64, 3), 100, np.float32)
    assert cross_lens(light, 30, np.random.default_rng(0), NO_DISTRACTORS) is light
    assert not np.array_equal(cross_lens(light, 30, np.random.default_rng(0), DistractorSettings(dust=(3, 3))), light)


def test_hard_sample_has_its_own_stamp_and_the_same_layout(tmp_path: Path) -> None:
    out = tmp_path / "set"
    make(out, train=3, test=1, difficulty=HARD)
    images = contents(out / "data").values()
    assert all(20_000 <= len(encoded) <= 60_000 for encoded in images)
    assert not make(out, train=3, test=1, difficulty=HARD)
    with pytest.raises(UsageError, match="made otherwise"):
        make(out, train=3, test=1)
    make(tmp_path / "easy", train=3, test=1)
    easy, hard = ({eye.patient for eye in plan_eyes(1200, 300, 0, each.first_patient)["train"]} for each in (EASY, HARD))
    assert not easy & hard
    assert json.loads((tmp_path / "easy" / "sample.json").read_text())["recipe"] == 1


def test_complete_sample_is_left_alone_and_an_interrupted_one_is_finished(tmp_path: Path) -> None:
    out = tmp_path / "set"
    make(out, train=3, test=1)
    before = contents(out)
    assert not make(out, train=3, test=1)
    (out / "test_label.csv").unlink()
    next((out / "data").iterdir()).write_bytes(b"cut")
    assert make(out, train=3, test=1)
    assert contents(out) == before


def test_no_csv_file_appears_when_painting_stops(tmp_path: Path) -> None:
    def stop(sizes: Iterator[int], total: int) -> Iterator[int]:
        yield next(sizes)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        make_sample(tmp_path, 3, 1, 0, 1, stop)
    assert not list(tmp_path.glob("*.csv"))
    assert make(tmp_path, train=3, test=1)


def test_other_content_is_refused_and_kept(tmp_path: Path) -> None:
    make(tmp_path / "sample", train=2, test=1)
    before = contents(tmp_path)
    with pytest.raises(UsageError, match="made otherwise"):
        make(tmp_path / "sample", train=3, test=1)
    with pytest.raises(UsageError, match="holds other files"):
        make(tmp_path)
    with pytest.raises(UsageError, match="is a file"):
        make(tmp_path / "sample" / "sample.json")
    assert contents(tmp_path) == before


@pytest.mark.parametrize("wrong", [{"train": 0}, {"test": 0}, {"train": 60_000}, {"seed": -1}, {"workers": 0}])
def test_bad_arguments_are_usage_errors_and_make_nothing(wrong: dict[str, int], tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="--" + next(iter(wrong))):
        make(tmp_path / "set", **wrong)
    assert not (tmp_path / "set").exists()


def test_command_makes_a_sample_and_reports_it(tmp_path: Path) -> None:
    command = [sys.executable, str(TOOL), "--out", str(tmp_path / "set"), "--train", "4", "--test", "2", "--workers", "1"]
    first = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "6 images" in first.stdout
    assert "4 train and 2 test images" in first.stdout
    assert json.loads((tmp_path / "set" / "sample.json").read_text())["train"] == 4
    second = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "nothing to do" in second.stdout


def test_hard_command_makes_a_hard_sample_of_the_size_asked_for_or_of_its_own(tmp_path: Path) -> None:
    command = [sys.executable, str(TOOL), "--hard", "--out", str(tmp_path / "set"), "--workers", "1"]
    asked = subprocess.run([*command, "--train", "2", "--test", "1"], capture_output=True, text=True, check=True)
    assert "2 train and 1 test images" in asked.stdout
    assert json.loads((tmp_path / "set" / "sample.json").read_text())["recipe"] == HARD.recipe
    # 2,000 images would take a minute: the refusal of the folder tells what would have been made.
    default = subprocess.run(command, capture_output=True, text=True)
    assert default.returncode == 2
    assert "'train': 1600, 'test': 400" in default.stderr


@pytest.mark.parametrize("arguments", [[], ["--out", "x", "--test", "0"], ["--out", "x", "--nonsense"]])
def test_wrong_usage_exits_with_2(arguments: list[str], tmp_path: Path) -> None:
    done = subprocess.run([sys.executable, str(TOOL), *arguments], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 2
    assert done.stderr
    assert not list(tmp_path.iterdir())
