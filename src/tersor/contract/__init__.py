"""What a codec is, what an encoded matrix is, and how codecs nest."""
