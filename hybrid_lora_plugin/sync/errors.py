"""The one error of a weight sync."""


class WeightSyncError(RuntimeError):
    """Rollout weights are not, or not provably, the trainer's; the message names the tensor and both sides' view.

    It ends the run: an engine in an unknown state is never tried again.
    """
