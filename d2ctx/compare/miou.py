"""Mean IoU of many resampled sets of images at once: sums of pixels, then ratios.

Letters: S samples, N images, K classes.
"""

import numpy as np

from d2ctx.compare.pq import Floats, known_mean, ratio
from d2ctx.evaluation.semantic_records import SemanticRecord

HEADLINE = ("mIoU", "pixel accuracy")


class MiouScorer:
    """Scores of one run.

    Args:
        record: Of its labels.
    """

    def __init__(self, record: SemanticRecord) -> None:
        self.names = (*HEADLINE, *record.about["classes"])
        self._counts = np.concatenate(list(record.dense()), axis=1)  # [N, 2K]

    def scores(self, weights: Floats) -> Floats:
        """Score samples.

        Args:
            weights: [S, N] how often each image was drawn.

        Returns:
            [S, 2 + K], from 0 to 1: mIoU, pixel accuracy, IoU of each class; NaN where there is
            none.
        """
        right, union = np.split(weights @ self._counts, 2, axis=1)  # [S, K]
        iou = ratio(right, union)
        all_right = right.sum(axis=1)
        # Every pixel lies in one union, or in two where it is wrong.
        total = (all_right + union.sum(axis=1)) / 2
        return np.column_stack([known_mean(iou), ratio(all_right, total), iou])
