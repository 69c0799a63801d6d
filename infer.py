"""Photos to anime faces: a picture, a folder or a glob in, as many results out.

    python infer.py --input photos/ --output out/

All of it is `encoder.infer`.
"""

import sys

from encoder.infer import main

if __name__ == "__main__":
    sys.exit(main())
