"""What a model of this kind may and may not be used for, in words: for the reports and for the model card."""

from __future__ import annotations

from typing import NamedTuple

from fastretina.grading import RETINOPATHY, Classes


class Purpose(NamedTuple):
    """Sentences. does: what the model does. use, misuse: what it is for and not for, each to follow "It is (not) for". limits: what
    it cannot."""

    does: str
    use: str
    misuse: str
    limits: str


def purpose(classes: Classes) -> Purpose:
    """Of a model that tells these apart. Names of classes are in it as they are: to be escaped."""
    if classes == RETINOPATHY:
        task = f"gives it a grade of diabetic retinopathy, from 0 ({classes[0]}) to {len(classes) - 1} ({classes[-1]})"
        other = "no other disease of the eye"
    else:
        order = ", each worse than the one before" if classes.ordinal else ""
        task = f"gives it one of {len(classes)} {classes.nouns}{order}: {', '.join(classes)}"
        other = f"nothing but these {classes.nouns}"
    referable = ""
    if classes.referable:
        title = classes.referable_title
        referable = f" {title[0].upper()}{title[1:]} is called referable: in screening, an ophthalmologist should see the person."
    return Purpose(
        f"It looks at one photograph of the back of an eye (a fundus photograph) and {task}.{referable}",
        f"research: to compare ways of training, to find photographs whose {classes.noun} deserves a second look, to prepare a "
        "study.",
        "diagnosing or treating anybody, nor for deciding who is sent home. It is no medical device and was never tried in "
        "practice.",
        f"It knows {other}, and it always answers, even if the photograph is too blurred to tell or shows no eye at all. Its "
        "metrics hold for photographs like those of the test set: with another camera, other people or other graders they may be "
        "far worse.",
    )
