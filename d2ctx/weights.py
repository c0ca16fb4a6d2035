"""Weight files: loaded without running code, and refused when they do not fit the model.

`python -m d2ctx.weights convert IN OUT` and `inspect FILE`: see `d2ctx.convert`.
"""

import logging
import sys
from collections.abc import Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any

from detectron2.checkpoint import DetectionCheckpointer
from torch import Tensor, nn

from d2ctx import compat
from d2ctx.convert import main
from d2ctx.errors import UserError
from d2ctx.recovery.checkpoints import check_sums, to_resume_from, write_checkpoint
from d2ctx.safe_read import read_checkpoint
from d2ctx.weight_files import PATH_FIX, load_weights_file, local_path
from d2ctx.weight_report import WeightReport, compare_state

__all__ = [
    "SafeCheckpointer",
    "WeightReport",
    "compare_state",
    "load_initial_weights",
    "load_weights_file",
    "main",
]
logger = logging.getLogger(__name__)
_VANISHED_FIX = "delete the file last_checkpoint, or name another in it"
_RESUME_FIX = "resume with the configuration that wrote it, or start without --resume"


def load_initial_weights(model: nn.Module, path: str, *, threshold: float = 0.5) -> WeightReport:
    """Load a weight file into `model`, with Detectron2's name matching.

    Args:
        model: The model to fill.
        path: The file, see `load_weights_file`.
        threshold: Least share of the file's tensors that must find a place in the model.

    Returns:
        What was loaded.

    Raises:
        UserError: If the file cannot be read, or fits less than `threshold`.
    """
    checkpointer = SafeCheckpointer(model, save_to_disk=False, min_match=threshold)
    checkpointer.load(path, checkpointables=[])
    return checkpointer.report


class SafeCheckpointer(DetectionCheckpointer):
    """`DetectionCheckpointer` that refuses code in files, and files of another architecture.

    It writes files whole or not at all, and resumes from an older one where the last is unreadable.
    Initial weights must find a place for `min_match` of their tensors: backbone-only files are
    welcome, those of another network are not. A checkpoint to resume from must fit completely.

    Args:
        model: The model to fill and save.
        save_dir: Folder of the checkpoints.
        min_match: Least share of an initial file's tensors that must find a place; 0: any.
        save_to_disk: Whether `save` writes; None: on the main process only.
        checkpointables: Named objects that are saved and resumed along with the model.

    Attributes:
        report: What the last `load` found; None before the first.
        path: Of the last `load`; "" before the first.
    """

    def __init__(
        self,
        model: nn.Module,
        save_dir: str = "",
        *,
        min_match: float = 0.5,
        save_to_disk: bool | None = None,
        **checkpointables: Any,
    ) -> None:
        super().__init__(model, save_dir, save_to_disk=save_to_disk, **checkpointables)
        self.min_match = min_match
        self.report: WeightReport | None = None
        self.path = ""
        self._resuming = False
        self._read: tuple[str, dict[str, Any]] | None = None

    def save(self, name: str, **kwargs: Any) -> None:
        """Write model and checkpointables to `save_dir`, and let `last_checkpoint` name the file.

        Args:
            name: Of the file, without its ending.
            kwargs: More to save.

        Raises:
            UserError: If it cannot be written; the checkpoints before it are intact.
        """
        if not (self.save_dir and self.save_to_disk):
            return
        states = {key: part.state_dict() for key, part in self.checkpointables.items()}
        content = {"model": self.model.state_dict(), **states, **kwargs}
        write_checkpoint(Path(self.save_dir), f"{name}.pth", content)
        logger.info("Saved %s", Path(self.save_dir, f"{name}.pth"))

    def has_checkpoint(self) -> bool:
        """Whether there is something in `save_dir` to resume from."""
        return bool(self.save_dir and to_resume_from(Path(self.save_dir)))

    def get_checkpoint_file(self) -> str:
        """The newest checkpoint in `save_dir` that can be read, the oldest without being tried."""
        files = to_resume_from(Path(self.save_dir))
        for path, before in pairwise(files):
            try:
                if path.is_file():
                    content = read_checkpoint(str(path))
                    check_sums(path)
                    self._read = (str(path), content)
            except UserError as error:
                logger.warning("%s; going on from %s instead", error, before.name)
                continue
            return str(path)
        return str(files[-1]) if files else ""

    def resume_or_load(self, path: str, *, resume: bool = True) -> dict[str, Any]:
        """Continue from the last checkpoint of `save_dir` if `resume`, else load `path`.

        Args:
            path: Initial weights; "" starts from scratch.
            resume: Whether a checkpoint in `save_dir` takes precedence.

        Returns:
            What the file holds besides model and checkpointables.

        Raises:
            UserError: If the file is absent, unsafe, or does not fit.
        """
        self._resuming = resume and self.has_checkpoint()
        try:
            return super().resume_or_load(path, resume=resume)
        finally:
            self._resuming, self._read = False, None

    def load(self, path: str, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """Load as Detectron2 does.

        Args:
            path: The file; "" loads nothing.
            args: Passed on.
            kwargs: Passed on.

        Returns:
            What the file holds besides model and checkpointables.

        Raises:
            UserError: If the file is absent, unsafe, or does not fit.
        """
        # Detectron2's later way to ask for name matching, here for all versions.
        file, asked, _ = path.partition("?matching_heuristics=True")
        self.path, self._match_names = path, bool(asked)
        if file:
            local_path(file, fix=_VANISHED_FIX if self._resuming else PATH_FIX)
        try:
            return super().load(file, *args, **kwargs)
        except (KeyError, ValueError) as error:
            if isinstance(error, UserError) or not self._resuming:
                raise
            raise UserError(f"{path} does not fit this run ({error}); {_RESUME_FIX}") from error

    def _load_file(self, filename: str) -> dict[str, Any]:
        read, self._read = self._read, None
        return read[1] if read and read[0] == filename else read_checkpoint(filename)

    def _load_model(self, checkpoint: dict[str, Any]) -> Any:
        if self._resuming:
            self._check_complete(checkpoint)
        weights = self._aligned(checkpoint)
        self.report = compare_state(self.model, weights)
        if not self._fits(self.report):
            raise UserError(self._refusal(self.report))
        logger.info("Weights from %s:\n%s", self.path, self.report.table())
        checkpoint.pop("matching_heuristics", None)  # done
        checkpoint["model"] = weights
        return super()._load_model(checkpoint)

    def _aligned(self, checkpoint: Mapping[str, Any]) -> dict[str, Tensor]:
        """Give the file's tensors the model's names, by Detectron2's suffix matching if needed."""
        weights = dict(checkpoint["model"])
        self._convert_ndarray_to_tensor(weights)
        asked = self._match_names or checkpoint.get("matching_heuristics", False)
        # A backbone saved alone lacks the prefix that the whole model gives it.
        foreign = not compare_state(self.model, weights).matched
        if self._resuming or not (asked or foreign):
            return weights
        try:
            return compat.align_names(
                self.model.state_dict(), weights, caffe2=checkpoint.get("__author__") == "Caffe2"
            )
        except ValueError as error:
            raise UserError(
                f"{self.path} fits the model in more than one way ({error}); save the weights "
                "under the model's own names"
            ) from error

    def _fits(self, report: WeightReport) -> bool:
        if self._resuming:
            return report.complete
        return report.file_fraction >= self.min_match

    def _check_complete(self, checkpoint: Mapping[str, Any]) -> None:
        absent = [name for name in self.checkpointables if name not in checkpoint]
        if absent:
            raise UserError(
                f"{self.path} holds no state of {', '.join(absent)}: training cannot continue "
                "from it; start without --resume and give it as MODEL.WEIGHTS"
            )

    def _refusal(self, report: WeightReport) -> str:
        if self._resuming:
            fix = _RESUME_FIX
        else:
            fix = (
                f"expected at least {self.min_match:.0%}; choose weights of this architecture, or "
                "lower MODEL.WEIGHTS_MIN_MATCH"
            )
        return (
            f"{self.path} does not fit the model: {report.file_fraction:.0%} of its tensors have "
            f"a place there, {len(report.missing)} of the model's are missing; {fix}\n"
            f"{report.table()}"
        )


if __name__ == "__main__":
    sys.exit(main())
