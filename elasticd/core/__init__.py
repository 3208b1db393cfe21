"""The pure core: decides, never acts. Standard library only; no I/O, clock, randomness or threads."""
