"""How many images a network tells the class of."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

import numpy as np

from gkp.errors import UsageError
from gkp.images.image_set import ImageSet, Origin
from gkp.text import plural
from gkp.types import Progress, Run, silent


@dataclass(frozen=True)
class Accuracy:
    """correct of total images, which `origin` describes; left_out: images that were not to be looked at."""

    correct: int
    total: int
    left_out: int
    origin: Origin

    @property
    def share(self) -> float:
        return self.correct / self.total


def accuracy(run: Run, name: str, images: ImageSet, batch: int, without: Collection[bytes] = frozenset(),
             progress: Progress = silent) -> Accuracy:
    """How often the first output of `run` is largest at the label, `batch` images at a time under the input's `name` (the
    last ones filled up with zeros). without: the sha256 of images to leave out, such as those that a network was calibrated
    with.

    UsageError: the network returns something other than [batch, classes], the labels are of other classes or there are none,
    or all images are left out. Else as ImageSet.batches.
    """
    correct, done, digests = 0, 0, []
    for x, labels, found in images.batches(batch, without):
        progress(f"evaluating {plural(images.count, 'image')}", done / images.count)
        done += batch
        if labels is None:
            raise UsageError("there is no accuracy without labels", "give images with labels")
        if found:
            rest = np.zeros((batch - len(x), *x.shape[1:]), x.dtype)
            scores = run({name: np.concatenate([x, rest]) if len(rest) else x})[0]
            if scores.ndim != 2 or len(scores) != batch:
                raise UsageError(f"the model returns shape {list(scores.shape)}, not [batch, classes]",
                                 "accuracy is of classifiers")
            images.check_classes(scores.shape[1])
            best = scores[:len(x)].max(1)  # NaN where a score is: no answer
            correct += int(((scores[:len(x)].argmax(1) == labels) & ~np.isnan(best)).sum())
            digests += found
    if not digests:
        raise UsageError(f"none of {plural(images.count, 'image')} is left to measure accuracy on",
                         "give other images than those to calibrate with")
    return Accuracy(correct, len(digests), images.count - len(digests), images.origin(digests))
