"""The parts of `fastrl train`."""
