"""From a face to latents, and from latents to another face: align, encode, refine, translate.

`from encoder.pipeline import Translator` is the front door; every other module works alone.
This package imports `generators`, never the reverse.
"""

import generators  # noqa: F401  # sets what has to be set before torch is loaded
