"""A cluster of daemons on one machine, faults and validators: for our tests, the demo and users' own drills."""
