"""Every exception of elasticd, on one page, grouped by who has to act.

Not here: how an error is shown (cli.py) or retried (the adapter that raises it).
"""

from __future__ import annotations


class ElasticdError(Exception):
    """The root: whatever elasticd raises on purpose."""


# --- The operator acts: shown as one line, exit status 2, never a traceback ---


class OperatorError(ElasticdError):
    """A mistake that only a person can mend; its text is one line that says what to do."""


class ConfigError(OperatorError):
    """A configuration file, a flag or a job file is wrong; the text names the field."""


class DuplicateNode(OperatorError):
    """Another live daemon already holds this node id."""


class StoreRefused(OperatorError):
    """etcd answered and said no (password, role, certificate): retrying cannot help."""


class JobRefused(OperatorError):
    """The job cannot be taken as asked for (its id is taken, its limits differ, its versions differ)."""


class StateLost(OperatorError):
    """No checkpoint could be restored, and the state was overwritten in the attempt; the text says what to do."""


# --- Time mends it: retry with back-off ---


class StoreUnavailable(ElasticdError):
    """etcd could not be reached, or gave no answer within the deadline. A transaction may or may not have happened.

    Or the object store that holds checkpoints could not be read.
    """


class Compacted(ElasticdError):
    """A watch asked for a revision that etcd has compacted away: load a snapshot and go on from there."""


class ChannelClosed(ElasticdError):
    """The other end of a local socket went away."""


class SaveFailed(ElasticdError):
    """A checkpoint could not be written; training goes on, and the next one is tried when it is due."""


class MemoryRefused(ElasticdError):
    """A copy in RAM cannot be had (it does not fit, nobody keeps it); the text names sizes. Training goes on."""


# --- This process must stop what it does ---


class LeaseLost(ElasticdError):
    """The lease is gone: the keys on it too. Register again."""


class Fenced(ElasticdError):
    """A newer round stands without this node: whatever it was doing no longer counts."""


class StepsDiverged(ElasticdError):
    """The ranks of a job are in different steps: what they compute together means nothing."""


class NotFinite(ElasticdError):
    """In exact mode a gradient is infinite or not a number; the text names the parameter. Raised on all ranks alike."""


# --- The job's budget decides ---


class WorkerFailed(ElasticdError):
    """A worker process ended with an error."""


# --- An older one is taken ---


class CheckpointInvalid(ElasticdError):
    """A checkpoint is incomplete or does not verify; the text says why."""


# --- A bug, here or in a peer of another version ---


class ProtocolError(ElasticdError):
    """A message or a record is not of the form that it must have."""
