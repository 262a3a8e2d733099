"""Two processes for tests of torch.distributed, started once: that takes longer than what they do.

As a script this file is one of them: for each line of its input it calls the worker(rank, folder)
of a test's file.
"""

import importlib.util
import json
import os
import select
import subprocess
import sys
from pathlib import Path

SECONDS = 120


class TwoRanks:
    """Both processes; the first call of `run` starts them."""

    def __init__(self):
        self._processes = []

    def run(self, file, folder):
        """What worker(0, folder) and worker(1, folder) of a test's file have saved in folder."""
        import torch

        if not self._processes:
            environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
            pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
            self._processes = [
                subprocess.Popen([sys.executable, __file__, str(rank)], env=environment, **pipes)
                for rank in (0, 1)
            ]
        for process in self._processes:
            print(json.dumps([str(file), str(folder)]), file=process.stdin, flush=True)
        for process in self._processes:
            answers, _, _ = select.select([process.stdout], [], [], SECONDS)
            assert answers and process.stdout.readline() == "done\n", "see what it has printed"
        return [torch.load(Path(folder) / f"{rank}.pt") for rank in (0, 1)]

    def close(self):
        for process in self._processes:
            process.kill()
            process.communicate()


def main(rank):
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # some versions of gloo say on stdout whom they are connected to
    for line in sys.stdin:
        file, folder = json.loads(line)
        spec = importlib.util.spec_from_file_location(Path(file).stem, file)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        module.worker(rank, folder)
        print("done", file=answers, flush=True)


if __name__ == "__main__":
    main(int(sys.argv[1]))
