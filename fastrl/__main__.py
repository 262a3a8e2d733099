import sys

from fastrl.cli.main import main

sys.exit(main())
