"""The parts of `fastrl label`."""
