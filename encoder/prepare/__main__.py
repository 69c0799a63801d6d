"""python -m encoder.prepare --help"""

import sys

from encoder.prepare.dataset import main

if __name__ == "__main__":
    sys.exit(main())
