"""What an engine decided of labelled images, as reports show it: no more than a page needs."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from .records import Frozen

__all__ = ["MOST_CLASSES", "DomainFindings", "Findings", "Sample"]

# A larger table of labels and predictions is read by nobody: pairs alone are kept.
MOST_CLASSES = 40
_Count = Annotated[int, Field(ge=0)]


class Sample(Frozen):
    """One image and what was made of it.

    Attributes:
        picture: ``image/png`` or ``image/jpeg`` in base64. Of label maps: image, labels and
            prediction side by side.
        kind: The media type.
        label: Name of the class that it shows; empty for label maps.
        predicted: Name of the class that was decided; empty for label maps.
        share: 1 for right and 0 for wrong, or the share of labelled pixels that are right.
    """

    picture: str
    kind: str
    label: str
    predicted: str
    share: float


class DomainFindings(Frozen):
    """The decisions on the images of one domain.

    Attributes:
        table: (classes, classes + 1) counts of images or pixels: the row is the label, the column
            the prediction, the last column all others. None with more than ``MOST_CLASSES``.
        confused: The most frequent mistakes: label, prediction and how often.
        samples: A few images, chosen by their labels alone.
    """

    table: tuple[tuple[_Count, ...], ...] | None
    confused: tuple[tuple[str, str, _Count], ...]
    samples: tuple[Sample, ...]


class Findings(Frozen):
    """The decisions of one engine.

    Attributes:
        classes: Names of the classes, or their numbers.
        domains: By name.
    """

    classes: tuple[str, ...]
    domains: dict[str, DomainFindings]
