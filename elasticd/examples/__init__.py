"""Training scripts that ship with the wheel."""
