"""`make gpu`: build, test and time everything on a machine with an NVIDIA GPU, in nine minutes."""
