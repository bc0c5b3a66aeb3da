"""From files to batches: finding, decoding, caching, splitting, augmenting and normalising images."""
