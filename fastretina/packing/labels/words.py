"""The words by which columns of public data sets and of clinics' exports are known."""

from __future__ import annotations

import re

_BETWEEN = re.compile(r"[\s_\-]+")


def loose(text: str) -> str:
    """How names of columns and of classes are compared: without case, blanks, underscores and hyphens."""
    return _BETWEEN.sub("", text).casefold()


def _known(names: str) -> frozenset[str]:
    return frozenset(names.split())


IMAGE = _known(
    "image images img imageid imgid imagename imgname imagefile imagepath imgpath idcode name file files filename filepath "
    "path leftfundus rightfundus leftimage rightimage"
)
GRADE = _known(
    "level levels label labels grade grades class classes diagnosis target drgrade drlevel drlabel drclass drseverity "
    "retinopathygrade retinopathylevel diabeticretinopathygrade adjudicateddrgrade dricdr drsdrg icdr finalicdr patientdrlevel "
    "lefteyedrlevel righteyedrlevel leftdr rightdr leftgrade rightgrade"
)
PATIENT = _known("patient patients patientid patientno patientnumber patientcode subject subjectid")
EYE = _known("eye eyes side eyeside laterality exameye imagelaterality")
QUALITY = _known("quality imagequality imgquality overallquality qualitygrade qualitylevel qualitylabel")
GRADABLE = _known("gradable adjudicatedgradable isgradable")  # 0: the image cannot be graded
HEADER = IMAGE | GRADE | PATIENT | EYE | QUALITY | GRADABLE
