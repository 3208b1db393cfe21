"""Which checkpoints a round that was over has published all the same. Pure.

A member of an old round asks whether its round still stands before it gives a checkpoint its name (save.py), but it may
be frozen between the answer and the rename. What it publishes then is a whole checkpoint, of training that was given
up: the next round went on from an older step. Each manifest says of which round it is and at which step that round
began, which tells such a *late* one from what the training that stands descends from.

Not here: what is done about one (restore.py takes it last, save.py gives its name away).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from elasticd.checkpoint.manifest import UNKNOWN_STEP, Manifest


def is_late(one: Manifest, other: Manifest) -> bool:
    """Whether ``other`` shows that ``one`` was published when its round was over.

    The other's round is newer, and began before the step of this one, so this one was not there when it chose where to
    go on; and this one does not descend from the other, as it would where the same job was submitted again and counts
    its rounds from the start. Without knowing where both began nothing is shown.
    """
    return (
        one.job_id == other.job_id
        and one.round_number < other.round_number
        and UNKNOWN_STEP not in (one.began_at_step, other.began_at_step)
        and other.began_at_step < one.step
        and one.began_at_step < other.step
    )


def late_ones(manifests: Sequence[Manifest]) -> list[Manifest]:
    return [one for one in manifests if any(is_late(one, other) for other in manifests)]


def in_order(manifests: Iterable[Manifest]) -> list[Manifest]:
    """What a restore tries one after the other: the newest first, late ones only when there is nothing else."""
    newest_first = sorted(manifests, key=lambda manifest: manifest.step, reverse=True)
    late = late_ones(newest_first)
    return [one for one in newest_first if one not in late] + late
