"""The command line: `fastrl <command>`."""
