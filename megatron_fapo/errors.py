"""The one error tree. Foreign errors are translated once, at the border where they are met.

    FapoError
    ├── ConfigError            a setting is wrong: which key, what it is, what it should be
    ├── DataError              a row, file, tokenizer or checkpoint on disk is not what it must be
    ├── TaskError              a task's checker failed (not: the answer is wrong)
    ├── ServerError            a generation server answered wrongly
    │   ├── ServerUnreachable      no answer, or it died
    │   └── RequestRejected        it understood the request and refused it; a retry will not help
    │       └── BaseDiffers            it holds other weights than those that a change was made from
    ├── JudgeError             too many verdicts failed for the run to be trusted
    ├── WeightsError           the weights on a server are not the ones that were published
    ├── MemoryHeld             between two phases, memory of a shared device was not given back or not taken again
    ├── PolicyError            a Megatron rank failed: which rank, which phase
    │   ├── Diverged               a loss or a gradient norm is not finite
    │   └── RankLost               its process died or froze; the run goes on from its last checkpoint
    └── ResumeError            a run folder cannot be continued
        └── CheckpointDamaged      a file of a checkpoint is missing, half written or changed; an earlier one may serve

Every class takes one message and survives pickling (a rank raises it, the driver receives it); `where` is
appended as "(rank 1, step 12)" so that the place travels with the text.
"""


class FapoError(Exception):
    """Root of all errors that this package raises on purpose."""

    def __init__(self, message: str, **where: object) -> None:
        place = ", ".join(f"{name} {value}" for name, value in where.items())
        super().__init__(f"{message} ({place})" if place else message)


class ConfigError(FapoError):
    """A setting is wrong."""


class DataError(FapoError):
    """Something on disk is not what it must be."""


class TaskError(FapoError):
    """A task's own checker failed."""


class ServerError(FapoError):
    """A generation server answered wrongly."""


class ServerUnreachable(ServerError):
    """A generation server did not answer."""


class RequestRejected(ServerError):
    """A generation server refused a request that it understood."""


class BaseDiffers(RequestRejected):
    """A server does not hold the weights that a change was made from."""


class JudgeError(FapoError):
    """Too many verdicts failed."""


class WeightsError(FapoError):
    """A server does not hold the weights that were published."""


class MemoryHeld(FapoError):
    """Memory of a device is not with whom the phase gives it to."""


class PolicyError(FapoError):
    """A Megatron rank failed."""


class Diverged(PolicyError):
    """A loss or a gradient norm is not finite."""


class RankLost(PolicyError):
    """A rank's process died, is frozen, or waits for another that does not come."""


class ResumeError(FapoError):
    """A run folder cannot be continued."""


class CheckpointDamaged(ResumeError):
    """A checkpoint is not what was written."""
