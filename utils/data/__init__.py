"""From files to batches: finding, decoding, splitting, augmenting and normalising images."""
