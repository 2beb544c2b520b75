"""Errors a user can catch. Bad arguments raise ``ValueError``; what fails at run time is below."""


class DualPipeError(RuntimeError):
    """Base of every run-time failure raised by dualpipe_ext."""


class CommTimeoutError(DualPipeError):
    """A peer did not answer within the time-out. The message names rank, peer and phase."""


class WorkerFailedError(DualPipeError):
    """A worker process of a launched run died; the message has its rank and its traceback."""

    def __init__(self, rank: int, message: str) -> None:
        super().__init__(f"rank {rank} failed\n{message}")
        self.rank = rank


class CheckpointError(DualPipeError):
    """A checkpoint is missing, unreadable, or belongs to another model."""
