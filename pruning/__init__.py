"""Static pruning of any network in the Kronecker-factored eigenbasis, in the order of the mathematics:

survey (which layers) -> capture (one pass over images) -> factors -> eigenbasis -> forms -> prediction -> choice ->
surgery -> refit; ``compress`` calls them in turn.
"""

from pruning.isolation import own_modules

with own_modules():
    from models.edits import apply_edits, edits_of
    from pruning.compress import compress

__all__ = ["apply_edits", "compress", "edits_of"]
