"""Builds fastrl._C in place for one GPU: `python -m bench.gpu.build 9.0`; "" builds for a CPU."""

import os
import subprocess
import sys


def main(argv: list[str]) -> int:
    capability = argv[0]
    env = os.environ | ({"TORCH_CUDA_ARCH_LIST": capability} if capability else {})
    status = subprocess.run(
        [sys.executable, "setup.py", "build_ext", "--inplace"], env=env, check=False
    ).returncode
    if status != 0:
        return status
    from fastrl.ops import _binary

    if _binary.module is None:
        print(f"build: expected the new fastrl._C to load, got: {_binary.missing}")
        return 1
    facts = _binary.module.build_facts()
    print(f"{_binary.module.__file__}: {facts}")
    wanted = f"sm_{capability.replace('.', '')}"
    built = facts["cuda_architectures"].split(", ")
    if capability and wanted not in built:
        print(f"build: expected code for {wanted}, got {', '.join(built) or 'none'}.")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
