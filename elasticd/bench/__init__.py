"""What elasticd costs and what it saves, in seconds, with torchrun beside it in the same run: ``make bench``.

Every experiment is a file with one pure summariser (recorded lines in, numbers out), so that what a figure means can
be read and tested without running it. Not here: correctness under faults (tests/chaos), the demo.
"""
