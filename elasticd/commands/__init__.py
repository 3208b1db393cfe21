"""What each subcommand of elasticd does."""
