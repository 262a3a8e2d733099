import sys

from bench.gpu.command import main

sys.exit(main(sys.argv[1:]))
