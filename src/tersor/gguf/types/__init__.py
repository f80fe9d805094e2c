"""Block types of ggml, one file each: what a block holds, byte by byte."""
