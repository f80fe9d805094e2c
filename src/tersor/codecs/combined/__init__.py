"""Several codecs on one matrix."""
