"""The commands of the pipeline, one module each: flags and a body of a few lines. `scripts/` calls them, too."""

import gc
import sys

# Importing torch makes millions of objects that all stay: an eighth of its time would be spent looking for garbage.
if "torch" not in sys.modules and gc.isenabled():
    gc.disable()
    import torch

    gc.freeze()
    gc.enable()
