"""What a data set draws at random: a function of the job's seed and of the micro-batch, and of nothing of the world.

Torch's default generator, Python's ``random`` and NumPy's global one are seeded before a micro-batch is fetched, in
this process or in the DataLoader's worker that loads it; its collate function draws on from there. So augmentation is
the same on any world, under any shares, with any number of workers, after a restart, and in a step that is done again.

What the script itself has drawn is not disturbed: its states are put back, so that what all ranks draw alike between
two steps stays alike. That is two thirds of the 30 us that a micro-batch costs in this process. Of NumPy's state one
thing is lost, a second normal number that ``numpy.random.randn`` may have ready: to keep it would cost 0.1 ms.

Without a seed a data set that is read in this process draws from the script's own states, whatever they are; workers
are seeded in the same way as with one, by a number that differs in every run.

Not here: what the model draws (planned.py); generators that a data set has made for itself, which are its own to seed.
A worker's ``get_worker_info().seed`` differs in each replica, worker and restart.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from numpy.random import mtrand

from elasticd.worker.state import derive_seed

#: What a seed is for: the last of the numbers that it is derived from. From 1 on, it is for a stage's model.
MICRO_BATCH, MODEL = 0, 1
STREAM_BATCH, STREAM_EPOCH, LOADER = -1, -2, -3


class Draws:
    """``seed``: where ``given`` is false, a number of this run that all ranks know. ``replica``: this rank's."""

    def __init__(self, *, seed: int, given: bool, replica: int = 0) -> None:
        self.given, self.replica = given, replica
        self._seed = seed
        self._numpy = np.random.MT19937(0)

    def of(self, first: int, second: int, what: int) -> int:
        """The seed for ``what``, of the micro-batch (or whatever it is) that two numbers name."""
        return derive_seed(self._seed, first, second, what)

    def seed_here(self, first: int, second: int, what: int) -> None:
        """In this process, inside of ``aside``. Without a seed of the session: nothing."""
        if self.given:
            seed_global(self.of(first, second, what))

    @contextmanager
    def aside(self) -> Iterator[None]:
        """What is drawn and seeded in here leaves the script's own states as they are."""
        if not self.given:
            yield
            return
        own_torch, own_python = torch.default_generator.get_state(), random.getstate()
        own_numpy = mtrand.get_bit_generator()
        mtrand.set_bit_generator(self._numpy)
        try:
            yield
        finally:
            mtrand.set_bit_generator(own_numpy)
            random.setstate(own_python)
            torch.default_generator.set_state(own_torch)


def seed_global(seed: int) -> None:
    """The generators that a data set finds at hand. torch.manual_seed would take 0.1 ms, for devices not in use.

    Torch and NumPy have the same generator and take 32 bits: they get different ones.
    """
    torch.default_generator.manual_seed(seed)
    random.seed(seed)
    if not isinstance(mtrand.get_bit_generator(), np.random.MT19937):  # a script's own, in a worker forked with it
        mtrand.set_bit_generator(np.random.MT19937())
    np.random.seed(seed >> 31)
