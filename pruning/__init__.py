"""Static pruning in the Kronecker-factored eigenbasis, in the order of the mathematics:

capture (one pass over images) -> factors -> eigenbasis -> criteria -> selection -> surgery; ``iteration`` calls them.
"""
