"""GGUF: ggml's block types, encoders into them, and the files that llama.cpp reads."""
